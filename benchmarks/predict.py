"""Predicted times of gradient surgery on an H200, where none was at hand: bytes, instructions, registers, latencies.

    python -m fastmtl.benchmarks.predict

Nothing here was measured but the copy rate. Counts of registers and instructions are the compiler's (nvcc 13.0, sm_90),
latencies are assumptions. `fastmtl bench --suite surgery --device cuda` measures every row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# measured on such a card: bytes per second of a device-to-device copy, read and written
COPY = 4.3e12
# read again from the second-level cache
FROM_CACHE, CACHE_BYTES = 7e12, 45_000_000
MULTIPROCESSORS, CLOCK, REGISTERS, THREADS = 132, 1.755e9, 65536, 256
# assumed, in seconds: a load under traffic; a kernel's way onto the card in a graph, and its last block's end; the sums
# of a block's warps; one level of tickets and sums; drawing an order; the weights' way out
LOAD, RAMP, BLOCK_SUMS, LEVEL, DRAW, RESULT = 650e-9, 2e-6, 1.5e-6, 1.5e-6, 0.5e-6, 0.5e-6
# assumed, in clocks: one visit of the T x T problem (a shuffle, a division in float64, dependent multiply-adds)
VISIT = 300


@dataclass(frozen=True)
class Loop:
    """The inner loop of a kernel as compiled.

    Args:
        registers: of a thread.
        instructions: of a warp's step; of the tensor core kernels' aligned path, by estimate, without the other one.
        columns: that a warp's step takes.
        sharing: warps that take the same columns.
        ahead: whether the next step's loads are under way during this one's products.
    """

    registers: int
    instructions: int
    columns: int
    sharing: int = 1
    ahead: bool = False

    @property
    def blocks(self) -> int:
        """Of a multiprocessor, at once."""
        return REGISTERS // (THREADS * 8 * math.ceil(self.registers / 8))

    @property
    def step(self) -> float:
        """Seconds of a step: one warp's loads and instructions, one after the other or at once; or the instructions of
        all warps, if those are more."""
        alone, all_warps = self.instructions / CLOCK, 2 * self.blocks * self.instructions / CLOCK
        return max(LOAD if self.ahead else LOAD + alone, all_warps)

    @property
    def block_columns(self) -> int:
        """Columns of a block's step."""
        return THREADS // 32 * self.columns // self.sharing

    def seconds(self, columns: int) -> float:
        """With enough blocks, for one pass over that many columns, whatever the memory does."""
        return columns * self.step / (MULTIPROCESSORS * self.blocks * self.block_columns)


# largest T -> loop of the Gram kernel, by bytes of an element
GRAM: dict[int, dict[int, Loop]] = {
    4: {
        2: Loop(86, 115, 512),
        4: Loop(94, 145, 256),
        8: Loop(128, 207, 128),
        16: Loop(78, 110, 16, ahead=True),
        32: Loop(154, 260, 16, ahead=True),
        64: Loop(238, 420, 16, sharing=2, ahead=True),
    },
    2: {
        4: Loop(106, 403, 512),
        8: Loop(127, 531, 256),
        16: Loop(78, 60, 32, ahead=True),
        32: Loop(128, 110, 32),
        64: Loop(234, 170, 32, sharing=2, ahead=True),
    },
}
# eight rows at a time: one sum, eight sums
COMBINE = {4: {1: Loop(80, 100, 128), 8: Loop(128, 338, 128)}, 2: {1: Loop(71, 311, 256), 8: Loop(212, 773, 256)}}


def gram_slots(columns: int, num_tasks: int) -> tuple[int, int]:
    """Columns of a slot, and their number, as in csrc/cuda/plan.h."""
    few = min(128 if num_tasks > 16 else 264, math.ceil(columns / (256 if num_tasks > 8 else 1024)))
    wanted = min(max(columns // (16384 if num_tasks > 16 else 4096), few), 1056)
    longest = 24576 if num_tasks <= 8 else 8192 if num_tasks <= 32 else 3072
    each = min(math.ceil(math.ceil(columns / wanted) / 64) * 64, longest)
    return each, math.ceil(columns / each)


@dataclass(frozen=True)
class Prediction:
    """Seconds of the two launches, and the floor of two passes over G and one result."""

    floor: float
    gram: float
    solve: float
    combine: float

    @property
    def total(self) -> float:
        return self.gram + self.solve + self.combine


def predict(num_tasks: int, num_params: int, itemsize: int, *, project: bool = False, solve: bool = True) -> Prediction:
    """PCGrad with a drawn order on one bank; `solve=False`: Gram matrix and one sum."""
    t, row = num_tasks, num_params * itemsize
    loops = GRAM[itemsize]
    loop = loops[min(most for most in loops if most >= t)]
    each, slots = gram_slots(num_params, t)
    waves = math.ceil(slots / (MULTIPROCESSORS * loop.blocks))
    steps = waves * math.ceil(each / loop.block_columns) * loop.step
    # few slots: what one block takes; many: the average
    walked = steps if waves <= 2 else loop.seconds(num_params)
    levels = 1 if slots <= 128 and t <= 16 else 2
    sums_moved = 2 * slots * t * (t + 1) / 2 * 8  # written and read
    gram = RAMP + max((t * row + sums_moved) / COPY, walked) + BLOCK_SUMS + levels * LEVEL
    solved = DRAW + t * VISIT / CLOCK + RESULT if solve else 0.0

    sums = t if project else 1
    passes = math.ceil(sums / 8) if project else 1
    kind = COMBINE[itemsize][8 if project else 1]
    chunks = math.ceil(t / 8)
    columns = num_params * chunks * passes
    alone = chunks * passes * kind.step
    cached = t * row <= CACHE_BYTES
    moved = (t * row * passes + sums * row) / (FROM_CACHE if cached else COPY)
    combine = RAMP + max(moved, kind.seconds(columns), alone)
    return Prediction((2 * t + sums) * row / COPY, gram, solved, combine)


# T, P, bytes, what: the table of targets, its multiples of the floor or seconds
TARGETS: tuple[tuple[str, int, int, int, dict[str, bool], str], ...] = (
    ("Gram + wG", 2, 25_600_000, 4, {"solve": False}, "1.15x"),
    ("pcgrad", 8, 25_600_000, 4, {}, "1.12x"),
    ("pcgrad", 8, 25_600_000, 2, {}, "1.15x"),
    ("pcgrad", 8, 1_000_000, 4, {}, "25 us"),
    ("pcgrad", 8, 100_000, 4, {}, "12 us"),
    ("pcgrad", 50, 100_000, 4, {}, "12 us"),
    ("pcgrad", 50, 1_000_000, 4, {}, "-"),
    ("pcgrad", 16, 25_600_000, 4, {}, "-"),
    ("pcgrad", 16, 25_600_000, 2, {}, "-"),
    ("pcgrad", 32, 25_600_000, 4, {}, "-"),
    ("pcgrad", 32, 25_600_000, 2, {}, "-"),
    ("pcgrad", 64, 25_600_000, 4, {}, "1.25x"),
    ("pcgrad", 64, 25_600_000, 2, {}, "-"),
    ("pcgrad", 4, 1_000_000_000, 2, {}, "1.08x"),
    ("pcgrad_project", 8, 25_600_000, 4, {"project": True}, "1.12x of C G"),
)


def table() -> list[str]:
    """Markdown."""
    lines = ["| op, T, P, bytes | floor | Gram | T x T | combine | sum | x floor | target |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|")
    for op, t, p, size, options, target in TARGETS:
        x = predict(t, p, size, **options)
        times = (1e6 * s for s in (x.floor, x.gram, x.solve, x.combine, x.total))
        figures = (f"{s:.0f}" if s >= 100 else f"{s:.3g}" for s in times)
        name = f"{op}, {t}, {p / 1e6:g}M, {size}"
        lines.append(f"| {name} | {' | '.join(figures)} | {x.total / x.floor:.2f} | {target} |")
    return lines


if __name__ == "__main__":
    print("predicted, in microseconds")
    print("\n".join(table()))
