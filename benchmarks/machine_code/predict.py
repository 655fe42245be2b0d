"""Predicted times of gradient surgery beside measured ones, on an H100 and an H200.

    python -m fastmtl.benchmarks.machine_code.predict

From a checkout: a wheel has neither the results nor the table of kernels. What a prediction is made of, and where that
comes from:

- bytes, at the rate of a copy, which the committed results of each card say;
- steps of the compiled loops: registers, instructions, rounds of load latency and bytes of a step are read from
  `benchmarks/machine_code/kernels_sm_90.json`, which `make kernel-table` writes;
- how a call is cut among blocks: asked of `csrc/cuda/gradients/plan.h` through the extension;
- how long the T x T problem takes, which the results on the H100 say;
- assumed latencies, the constants below.

Each prediction stands beside what was measured and the ratio of the two: where that is far from 1, the model is wrong,
or the kernel is not what the model takes it for.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmtl.benchmarks.machine_code import kernel_table
from fastmtl.benchmarks.machine_code.kernel_table import THREADS, Kernel

RESULTS = Path(__file__).resolve().parents[1] / "results"
MULTIPROCESSORS, WARPS = 132, THREADS // 32  # of both cards; of a block
# read again from the second-level cache
FROM_CACHE, CACHE_BYTES = 7e12, 45_000_000
# assumed, in seconds: a load under traffic; one of sums that lie in the second-level cache; a kernel's way onto the
# card in a graph, and its last block's end; the sums of a block's warps; a ticket with its barriers
LOAD, LOAD_OF_SUMS, RAMP, BLOCK_SUMS, TICKET = 650e-9, 300e-9, 2e-6, 1.5e-6, 0.8e-6

ITEMSIZE = {"f32": 4, "bf16": 2}
NAMES = {"float32": "f32", "bfloat16": "bf16"}


# --- what was measured


@dataclass(frozen=True)
class Card:
    """A card, and its committed results; the first section `rates` of them is read."""

    name: str
    results: str

    @functools.cached_property
    def text(self) -> str:
        return (RESULTS / self.results).read_text()

    @functools.cached_property
    def _rates(self) -> str:
        found = re.search(r"^== .*surgery_check rates.*\n((?:(?!== ).*\n?)*)", self.text, re.M)
        if found is None:
            raise ValueError(f"{self.results}: expected the output of surgery_check rates")
        return found[1]

    @functools.cached_property
    def copy(self) -> float:
        """Bytes per second of a device-to-device copy, read and written."""
        found = re.search(r"^copy: ([\d.]+) TB/s", self._rates, re.M)
        if found is None:
            raise ValueError(f"{self.results}: expected the rate of a copy")
        return 1e12 * float(found[1])

    @functools.cached_property
    def measured(self) -> dict[tuple[str, int, int, str], float]:
        """Seconds by op, T, P and dtype, of CUDA C++."""
        line = re.compile(r"^T= *(\d+) P=([\d.]+)M (\w+) +(\w+) +cuda +([\d.]+) us", re.M)
        return {
            (op, int(t), round(float(p) * 1e6), dtype): 1e-6 * float(us)
            for t, p, dtype, op, us in line.findall(self._rates)
        }


H100 = Card("H100", "nvidia-h100-2026-11-26.txt")
H200 = Card("H200", "nvidia-h200-2026-11-26.txt")
CARDS = (H100, H200)


def _number(card: Card, what: str, pattern: str) -> float:
    found = re.search(pattern, card.text, re.M)
    if found is None:
        raise ValueError(f"{card.results}: expected {what}")
    return float(found[1])


@functools.cache
def clock() -> float:
    """Of a busy card, in Hz."""
    return 1e6 * _number(H200, "the clock", r"^== .* at (\d+) MHz")


@functools.cache
def launch() -> float:
    """Seconds of a graph's node: an add to one element."""
    return 1e-6 * _number(H100, "the time of a tiny add", r"^tiny add in a graph ([\d.]+) us")


@functools.cache
def solve_times() -> dict[int, float]:
    """Seconds of `pcgrad_coefficients` of a given order by itself, by T, less a launch."""
    found = re.findall(r"^T (\d+) coefficients ([\d.]+)", H100.text, re.M)
    if not found:
        raise ValueError(f"{H100.results}: expected the times of pcgrad_coefficients")
    return {int(t): 1e-6 * float(us) - launch() for t, us in found}


def solve_seconds(num_tasks: int) -> float:
    """The T x T problem, as long as that of the next larger number of tasks that was measured, by its visits."""
    known = min(t for t in solve_times() if t >= num_tasks)
    return solve_times()[known] * num_tasks / known


# --- loops as compiled


@dataclass(frozen=True)
class Loop:
    """A loop over the gradients: `rounds` below 1 where the loads of later steps are under way.

    Args:
        blocks: of a multiprocessor, at once.
        instructions: of a warp's step.
        rounds: of load latency in a step.
        columns: that a warp's step takes.
    """

    blocks: int
    instructions: int
    rounds: float
    columns: int

    @classmethod
    def of(cls, kernel: Kernel, rows: int) -> Loop:
        """`rows`: that a warp's step takes."""
        entry = kernels()[kernel]
        loop = entry["rows"]
        columns = loop["bytes"] // (rows * ITEMSIZE[kernel.dtype])
        return cls(entry["blocks"], loop["instructions"], loop["rounds"], columns)

    @property
    def step(self) -> float:
        """Seconds of a step: one warp's latencies, and its instructions where they wait for its own loads; or the
        instructions of all warps, which four schedulers share, if those are more.
        """
        alone = self.rounds * LOAD + (self.instructions / clock() if self.rounds >= 1 else 0.0)
        return max(alone, self.blocks * WARPS / 4 * self.instructions / clock())

    def walk(self, blocks: int, steps: int) -> float:
        """Seconds of so many blocks with so many steps each: few, whole waves; many, the average."""
        waves = blocks / (MULTIPROCESSORS * self.blocks)
        return (math.ceil(waves) if waves <= 2 else waves) * steps * self.step


@functools.cache
def kernels() -> dict[Kernel, dict[str, Any]]:
    return kernel_table.load()


def gram_kernel(num_tasks: int, dtype: str) -> tuple[Kernel, int]:
    """The one that `kernels.inc` launches, and the rows that it has room for: beyond 64 tasks two bands."""
    room = {k: k.numbers[0] * (8 if k.name == "gram_mma_kernel" else 1) for k in kernels() if k.name.startswith("gram")}
    rows, kernel = min((rows, k) for k, rows in room.items() if k.dtype == dtype and rows >= min(num_tasks, 64))
    return kernel, rows


def plan(num_params: int, num_tasks: int, num_out: int) -> dict[str, Any]:
    """How `csrc/cuda/gradients/plan.h` cuts a call."""
    from fastmtl.core.dispatch import extension, extension_error

    if extension is None:
        raise RuntimeError(f"no compiled extension, which knows how a call is cut: {extension_error}")
    return extension.cuda_plan(64 * math.ceil(num_params / 64), num_tasks, num_out)


# --- predictions


def level_seconds(sums: dict[str, Any], slots: int, num_tasks: int) -> float:
    """One ticket, and the sums of so many slots by one block: `sum_rows` of `csrc/cuda/gradients/finish.cuh`."""
    entries = num_tasks * (num_tasks + 1) // 2
    across = 1 if num_tasks <= 16 else 4
    down = sums["loads"] // across
    split = 1
    while split < 32 and 2 * split * entries <= THREADS:
        split *= 2
    passes = math.ceil(entries / (across * THREADS // split)) * math.ceil(slots / (down * split))
    return TICKET + passes * sums["rounds"] * LOAD_OF_SUMS


def gram_seconds(card: Card, num_tasks: int, num_params: int, dtype: str) -> float:
    kernel, rows = gram_kernel(num_tasks, dtype)
    cut = plan(num_params, num_tasks, 1)
    loop, sums = Loop.of(kernel, rows), kernels()[kernel]["sums"]
    slots, group = cut["gram_slots"], cut["slots_per_group"]
    steps = math.ceil(cut["gram_columns"] / (WARPS * loop.columns))
    walked = loop.walk(slots * cut["blocks_per_slot"], steps)
    reads = max(math.ceil(num_tasks / 32) - 1, 1)  # each band meets every other
    partial = 2 * slots * num_tasks * (num_tasks + 1) // 2 * 8  # written and read
    moved = reads * num_tasks * num_params * ITEMSIZE[dtype] + partial
    levels = level_seconds(sums, min(slots, group), num_tasks)
    if slots > group:
        levels += level_seconds(sums, math.ceil(slots / group), num_tasks)
    return RAMP + max(moved / card.copy, walked) + BLOCK_SUMS + levels


def combine_seconds(
    card: Card, num_tasks: int, num_params: int, dtype: str, num_out: int = 1, *, after_gram: bool = False
) -> float:
    """`after_gram`: the gradients may still lie in the second-level cache."""
    size, cut = ITEMSIZE[dtype], plan(num_params, num_tasks, num_out)
    outputs = 1 if num_out == 1 else 8
    passes = math.ceil(num_out / outputs)
    if cut["combine_split"]:
        loop = Loop.of(Kernel("combine_split_kernel", dtype), 8)
        # warps that have columns of their own share them with the others, which take other tasks
        sharing = WARPS * loop.columns // cut["combine_columns"]
        steps = math.ceil(num_tasks / (8 * sharing))
    else:
        loop = Loop.of(Kernel("combine_kernel", dtype, (outputs,)), 8)
        steps = math.ceil(cut["combine_columns"] / (WARPS * loop.columns)) * math.ceil(num_tasks / 8)
    row = num_params * size
    cached = after_gram and num_tasks * row <= CACHE_BYTES
    moved = (num_tasks * passes + num_out) * row
    return RAMP + max(moved / (FROM_CACHE if cached else card.copy), loop.walk(cut["combine_slots"] * passes, steps))


@dataclass(frozen=True)
class Prediction:
    """Seconds: PCGrad's floor (two passes over G and the results), its parts, and the parts by themselves."""

    floor: float
    gram: float
    solve: float
    combine: float
    combine_alone: float

    @property
    def total(self) -> float:
        return self.gram + self.solve + self.combine


def predict(card: Card, num_tasks: int, num_params: int, dtype: str, *, project: bool = False) -> Prediction:
    """PCGrad with a drawn order on one bank, dtype `"float32"` or `"bfloat16"`; `project`: T results."""
    kind, sums = NAMES[dtype], num_tasks if project else 1
    at = card, num_tasks, num_params, kind
    return Prediction(
        (2 * num_tasks + sums) * num_params * ITEMSIZE[kind] / card.copy,
        gram_seconds(*at),
        solve_seconds(num_tasks),
        combine_seconds(*at, sums, after_gram=True),
        combine_seconds(*at, sums),
    )


# T, P, dtype, whether projected: the rows of `surgery_check rates`, and some that were not measured by it
ROWS: tuple[tuple[int, int, str, bool], ...] = (
    (2, 25_600_000, "float32", False),
    (8, 25_600_000, "float32", False),
    (8, 25_600_000, "bfloat16", False),
    (8, 25_600_000, "float32", True),
    (16, 25_600_000, "float32", False),
    (16, 25_600_000, "bfloat16", False),
    (32, 25_600_000, "float32", False),
    (32, 25_600_000, "bfloat16", False),
    (64, 25_600_000, "float32", False),
    (64, 25_600_000, "bfloat16", False),
    (4, 1_000_000_000, "bfloat16", False),
    (8, 1_000_000, "float32", False),
    (50, 1_000_000, "float32", False),
    (8, 100_000, "float32", False),
    (50, 100_000, "float32", False),
)


def microseconds(seconds: float) -> str:
    us = 1e6 * seconds
    return f"{us:.0f}" if us >= 100 else f"{us:.3g}"


def cell(predicted: float, measured: float | None) -> str:
    """Predicted; and measured, with its multiple of the prediction."""
    if measured is None:
        return microseconds(predicted)
    return f"{microseconds(predicted)}; {microseconds(measured)}, {measured / predicted:.2f}x"


def table() -> list[str]:
    """Markdown."""
    columns = ["T, P, dtype", "T x T"]
    for card in CARDS:
        columns += [f"{card.name} Gram", "combine", "pcgrad", "floor"]
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    for t, p, dtype, project in ROWS:
        cells = [f"{t}, {p / 1e6:g}M, {dtype}{', projected' if project else ''}", microseconds(solve_seconds(t))]
        for card in CARDS:
            x = predict(card, t, p, dtype, project=project)
            parts = {"gram": x.gram, "combine": x.combine_alone, "pcgrad": x.total}
            for op, seconds in parts.items():
                known = None if project else card.measured.get((op, t, p, dtype))
                cells.append(cell(seconds, known))
            cells.append(microseconds(x.floor))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    print("microseconds: predicted; measured, times the prediction")
    print("combine: by itself, its gradients not in the cache; T x T: by the H100's times on both\n")
    print("\n".join(table()))
