"""What compiled GPU kernels ask of a multiprocessor, read from their machine code, without a GPU.

    python -m fastmtl.benchmarks.machine_code.cubin kernels.cubin [--kernel gram_mma] [--threads 256]

Needs cuobjdump and nvdisasm, which come with CUDA and in Triton's wheel. Prints, of every kernel, registers, stack,
shared memory and how many blocks fit on a multiprocessor; and of every loop that reads global memory:

- *Loads of a step*: how many a warp issues each time around, and their bytes.
- *Rounds*: how often, in a step, the warp stands still for the whole latency of a load, some 600 to 1000 clocks. Eight
  loads that are issued one behind the other and then waited for take one round. Eight that are each waited for before
  the next one is issued take eight, and the kernel a multiple of the time, though both have as many and as wide loads.
  Loads that are issued several steps ahead take less than one.
- *In flight*: a step's bytes over its rounds: what a warp has under way at once; times the warps of a multiprocessor.
  Bandwidth times latency (some 20 KB for each multiprocessor of an H100) must be in flight to keep memory busy.
- *Instructions of a step*: what a warp issues each time around, on the path with the widest loads.

How a wait is seen: a load's result comes whenever it comes, so the assembler gives every such instruction one of six
counters, the *scoreboards*: up when it is issued, down when its result is there. Whoever needs the result carries a
mask of scoreboards that must be zero before it is issued. Both stand in each instruction's upper 64 bits, from bit 41
on: clocks to stall (4 bits), yield (1), the scoreboard that its result (3) and the reading of its operands (3)
release, and the mask to wait for (6). Copies to shared memory (LDGSTS, `cp.async`) are counted by groups instead:
LDGDEPBAR ends one, `DEPBAR.LE SB0, 3` waits until no more than the last three are under way. These fields are as on
sm_80 to sm_100; NVIDIA does not document them.

Rounds are counted by playing the loop for one warp with a clock that only loads move: one unit each.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import math
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

WARP = 32
NO_BOARD = 7
# per multiprocessor: registers, warps, blocks; bytes of shared memory, of which each block's first KiB is the system's
REGISTERS, WARPS, BLOCKS = 65536, 64, 32
SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
# steps that are played before counting begins, and counted; with copies ahead a multiple of every likely depth
PLAYED, PLAYED_AHEAD = 8, 240

_LINE = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);"
    r"\s*/\* 0x[0-9a-f]{16} \*/\s*/\* 0x([0-9a-f]{16}) \*/"
)
_HEAD = re.compile(
    r"^[ \t]*(?:Function ?: ?|Function )(?P<name>[^:\s]*_kernel[^:\s]*)|^[ \t]*(?:code for|arch =) (?P<arch>sm_\d+)",
    re.M,
)
_WIDTH = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
_AT_MOST = re.compile(r"SB(\d), 0x([0-9a-f]+)")


@dataclass(frozen=True)
class Instruction:
    """One instruction of a warp: what it does, and what the assembler says about waiting."""

    address: int
    name: str  # with its modifiers: LDG.E.128
    operands: str
    guarded: bool  # by a predicate
    stall: int  # clocks before the warp's next one
    board: int  # the scoreboard that its result releases; NO_BOARD: none
    waits: frozenset[int]  # the scoreboards that must be free

    @property
    def loads(self) -> int:
        """Bytes that a lane reads of global memory; an address of unknown space counts as that."""
        if not self.name.startswith(("LDG.", "LDGSTS.", "LD.")):
            return 0
        return next((size for word, size in _WIDTH.items() if word in self.name.split(".")), 4)

    @property
    def is_copy(self) -> bool:
        """Global to shared memory, waited for by groups."""
        return self.name.startswith("LDGSTS")

    @property
    def target(self) -> int | None:
        """Where a branch goes. A call under a predicate is one too, over a far branch; others come back."""
        name = self.name.split(".")[0]
        found = _TARGET.search(self.operands) if name == "BRA" or (name == "CALL" and self.guarded) else None
        return int(found[1], 16) if found else None

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may follow."""
        name = self.name.split(".")[0]
        if name in ("EXIT", "RET", "BRX", "JMP"):
            return self.guarded
        return name != "BRA" or self.guarded or "," in self.operands


@dataclass(frozen=True)
class Loop:
    """The way around a loop on which a warp reads most.

    Args:
        path: the instructions of a step. Of a loop within, one step.
        own: those of them that lie in no loop within.
    """

    path: tuple[Instruction, ...]
    own: tuple[Instruction, ...]

    @property
    def loads(self) -> Counter[int]:
        """Bytes of a lane -> how many such loads a step issues."""
        return Counter(one.loads for one in self.own if one.loads)

    @property
    def bytes(self) -> int:
        """Of a warp's step."""
        return WARP * self.loads_of_a_lane

    @property
    def loads_of_a_lane(self) -> int:
        return sum(size * count for size, count in self.loads.items())

    @functools.cached_property
    def rounds(self) -> float:
        """Latencies of a load in a step, in the long run."""
        return count_rounds(self.own)

    @property
    def in_flight(self) -> float:
        """Bytes of a warp under way at once; infinite where the loop does not wait for what it loads."""
        return self.bytes / self.rounds if self.rounds else math.inf

    def has(self, pattern: str) -> bool:
        return any(re.match(pattern, one.name) for one in self.path)


@dataclass(frozen=True)
class Code:
    """A kernel's machine code. `shared` is what its declarations take; the launch may add some.

    Args:
        stack: bytes of a thread.
        shared: bytes of a block.
    """

    name: str  # mangled
    arch: int  # 90: sm_90
    registers: int
    stack: int
    shared: int
    instructions: tuple[Instruction, ...] = field(repr=False)

    def blocks(self, threads: int = 256, dynamic_shared: int = 0) -> int:
        """Blocks of a multiprocessor, at once."""
        warps = threads // WARP
        # registers are given out to warps, by eights to a thread
        by_registers = REGISTERS // (warps * WARP * 8 * math.ceil(max(self.registers, 1) / 8))
        by_shared = SHARED.get(self.arch, SHARED[80]) // (self.shared + dynamic_shared + 1024)
        return min(by_registers, by_shared, WARPS // warps, BLOCKS)

    @functools.cached_property
    def loops(self) -> list[Loop]:
        """Those that read global memory outside of loops within, in the order of the code."""
        return list(_loops(self.instructions))


# --- rounds


def count_rounds(step: Sequence[Instruction]) -> float:
    """Latencies of a load that a warp waits for in each step, where it takes one step after the other."""
    # nothing but loads takes time, so what neither loads nor waits may be left out
    step = [one for one in step if one.loads or one.waits or one.name.startswith(("LDGDEPBAR", "DEPBAR"))]
    turns = PLAYED_AHEAD if any(one.is_copy for one in step) else PLAYED
    now, half = 0, 0
    under_way: dict[int, list[int]] = defaultdict(list)  # scoreboard -> when what it counts is done
    group = 0  # when the copies since the last LDGDEPBAR are done
    for turn in range(2 * turns):
        if turn == turns:
            half = now
        for one in step:
            for board in one.waits:
                now = max([now, *under_way.pop(board, [])])
            if one.name.startswith("DEPBAR") and (at_most := _AT_MOST.search(one.operands)):
                board, left = int(at_most[1]), int(at_most[2], 16)
                waited = under_way[board][: max(len(under_way[board]) - left, 0)]
                now = max([now, *waited])
                del under_way[board][: len(waited)]
            elif one.name.startswith("LDGDEPBAR"):
                under_way[one.board].append(group)
            elif one.is_copy:
                group = now + 1
            elif one.loads and one.board != NO_BOARD:
                under_way[one.board].append(now + 1)
    return (now - half) / turns


# --- loops


@dataclass
class _Block:
    """Instructions first, ..., last - 1, which follow each other without a branch between."""

    first: int
    last: int
    next: list[int] = field(default_factory=list)
    before: list[int] = field(default_factory=list)


def _blocks(code: Sequence[Instruction]) -> list[_Block]:
    index = {one.address: k for k, one in enumerate(code)}
    starts = {0}
    for k, one in enumerate(code):
        if one.target is not None or not one.falls_through:
            starts.add(k + 1)
        if one.target in index:
            starts.add(index[one.target])
    edges = sorted(k for k in starts if k < len(code))
    blocks = [_Block(a, b) for a, b in zip(edges, [*edges[1:], len(code)], strict=True)]
    at = {block.first: k for k, block in enumerate(blocks)}
    for k, block in enumerate(blocks):
        last = code[block.last - 1]
        after = [index[last.target]] if last.target in index else []
        if last.falls_through and block.last < len(code):
            after.append(block.last)
        block.next = sorted({at[i] for i in after})
        for n in block.next:
            blocks[n].before.append(k)
    return blocks


def _order(blocks: Sequence[_Block]) -> list[int]:
    """Reachable blocks, each before what follows it but for branches back."""
    seen, done = {0}, []
    stack = [(0, iter(blocks[0].next))]
    while stack:
        k, rest = stack[-1]
        n = next((n for n in rest if n not in seen), None)
        if n is None:
            done.append(k)
            stack.pop()
        else:
            seen.add(n)
            stack.append((n, iter(blocks[n].next)))
    return done[::-1]


def _dominators(blocks: Sequence[_Block], order: Sequence[int]) -> dict[int, int]:
    """Block -> the last block that every way to it passes (Cooper, Harvey and Kennedy 2001)."""
    rank = {k: i for i, k in enumerate(order)}
    found = {order[0]: order[0]}
    changed = True
    while changed:
        changed = False
        for k in order[1:]:
            ways = [b for b in blocks[k].before if b in found]
            common = ways[0]
            for b in ways[1:]:
                while common != b:
                    if rank[common] > rank[b]:
                        common = found[common]
                    else:
                        b = found[b]
            if found.get(k) != common:
                found[k] = common
                changed = True
    return found


def _bodies(blocks: Sequence[_Block], order: Sequence[int]) -> dict[int, set[int]]:
    """A loop's first block -> all of its blocks: the natural loops."""
    dominator = _dominators(blocks, order)

    def dominates(a: int, b: int) -> bool:
        while b != a and dominator[b] != b:
            b = dominator[b]
        return a == b

    bodies: dict[int, set[int]] = {}
    for k in order:
        for head in blocks[k].next:
            if dominates(head, k):
                body = bodies.setdefault(head, {head})
                stack = [k]
                while stack:
                    b = stack.pop()
                    if b not in body:
                        body.add(b)
                        stack += [x for x in blocks[b].before if x in dominator]
    return bodies


def _loops(code: Sequence[Instruction]) -> Iterator[Loop]:
    if not code:
        return
    blocks = _blocks(code)
    order = _order(blocks)
    bodies = _bodies(blocks, order)
    for head in sorted(bodies):
        body = bodies[head]
        within = set().union(*(b for h, b in bodies.items() if h != head and h in body))
        widest = max((one.loads for k in body - within for one in code[blocks[k].first : blocks[k].last]), default=0)
        if not widest:
            continue

        def value(k: int, within: set[int] = within, widest: int = widest) -> tuple[int, int, int]:
            """What a block brings to a path: loads of the widest kind, few others, few instructions."""
            ones = code[blocks[k].first : blocks[k].last]
            own = Counter(one.loads for one in ones if one.loads and k not in within)
            return own[widest], own[widest] - own.total(), -len(ones)

        path = _best(blocks, [k for k in order if k in body], head, value)
        yield Loop(
            tuple(one for k in path for one in code[blocks[k].first : blocks[k].last]),
            tuple(one for k in path if k not in within for one in code[blocks[k].first : blocks[k].last]),
        )


def _best(blocks: Sequence[_Block], order: Sequence[int], head: int, value) -> list[int]:
    """The blocks of the most valuable way from a loop's head to a branch back to it; `order`: of its blocks."""
    rank = {k: i for i, k in enumerate(order)}
    best = {head: value(head)}
    via: dict[int, int] = {}
    for k in order:
        for n in blocks[k].next if k in best else ():
            if n in rank and rank[n] > rank[k]:
                here = tuple(a + b for a, b in zip(best[k], value(n), strict=True))
                if n not in best or here > best[n]:
                    best[n], via[n] = here, k
    k = max((k for k in best if head in blocks[k].next), key=lambda k: best[k])
    path = deque([k])
    while k in via:
        k = via[k]
        path.appendleft(k)
    return list(path)


# --- files


def tool(name: str) -> str | None:
    """cuobjdump or nvdisasm: of Triton's wheel, else of CUDA."""
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
        if bundled.exists():
            return str(bundled)
    return shutil.which(name) or shutil.which(f"/usr/local/cuda/bin/{name}")


def dump(flag: str, file: Path) -> dict[str, list[str]]:
    """cuobjdump's answer: mangled name -> the sections about that kernel, one for each architecture in the file."""
    program = tool("cuobjdump")
    if program is None:
        raise FileNotFoundError("cuobjdump: not in CUDA, and no Triton here")
    text = subprocess.run([program, flag, str(file)], capture_output=True, check=True, text=True).stdout
    found = defaultdict(list)
    arch, name, start = "", "", 0
    for head in [*_HEAD.finditer(text), None]:
        if name:
            found[name].append(f"{arch}\n{text[start : head.start() if head else len(text)]}")
        if head is None:
            break
        arch, name, start = head["arch"] or arch, head["name"] or "", head.end()
    return found


def parse(text: str) -> tuple[Instruction, ...]:
    """The instructions in what cuobjdump or nvdisasm print of a kernel, encodings and all."""
    found = []
    for address, guard, name, operands, high in _LINE.findall(text):
        control = int(high, 16) >> 41
        waits = frozenset(k for k in range(6) if control >> 11 + k & 1)
        found.append(
            Instruction(int(address, 16), name, operands.strip(), bool(guard), control & 15, control >> 5 & 7, waits)
        )
    return tuple(found)


def read(file: Path) -> dict[str, Code]:
    """The kernels of a cubin, by mangled name."""
    usage, code = dump("--dump-resource-usage", file), dump("-sass", file)
    if usage.keys() != code.keys():
        raise ValueError(f"{file}: kernels without machine code: {sorted(usage.keys() ^ code.keys())}")
    found = {}
    for name, (text,) in usage.items():
        registers, stack, shared = (int(re.findall(rf"\b{word}:(\d+)", text)[0]) for word in ("REG", "STACK", "SHARED"))
        sass = code[name][0]
        arch = re.match(r"sm_(\d+)", sass)
        found[name] = Code(name, int(arch[1]) if arch else 0, registers, stack, shared, parse(sass))
    return found


def extract(library: Path, folder: Path) -> dict[Path, tuple[list[str], int]]:
    """The cubins in a library, written to an empty folder: file -> the mangled names of its kernels, and their sm_."""
    program = tool("cuobjdump")
    if program is None:
        raise FileNotFoundError("cuobjdump: not in CUDA, and no Triton here")
    subprocess.run([program, "-xelf", "all", str(library)], cwd=folder, capture_output=True, check=True)
    return {
        file: (list(dump("--dump-resource-usage", file)), int(re.findall(r"sm_(\d+)", file.name)[-1]))
        for file in sorted(folder.glob("*.cubin"))
    }


# --- report


def describe(code: Code, threads: int = 256, dynamic_shared: int = 0) -> Iterator[str]:
    blocks = code.blocks(threads, dynamic_shared)
    yield (
        f"{code.name}: {code.registers} registers, {code.stack} bytes of stack, {code.shared} of shared memory, "
        f"{blocks} blocks of {threads} threads a multiprocessor"
    )
    for loop in code.loops:
        loads = ", ".join(f"{count} x {size} B" for size, count in sorted(loop.loads.items(), reverse=True))
        flight = loop.in_flight * blocks * threads / WARP / 1024
        yield (
            f"  {loop.path[0].address:#07x}: loads of a step {loads}; rounds {loop.rounds:.3g}; "
            f"in flight {flight:.3g} KB a multiprocessor; {len(loop.path)} instructions"
        )


def main(argv: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastmtl.benchmarks.machine_code.cubin", description=__doc__.splitlines()[0]
    )
    parser.add_argument("cubin", type=Path, nargs="+")
    parser.add_argument("--kernel", default="", help="only names that match this regular expression")
    parser.add_argument("--threads", type=int, default=256, help="of a block")
    parser.add_argument("--dynamic-shared", type=int, default=0, help="bytes that the launch adds to a block's")
    parser.add_argument("--trace", action="store_true", help="also every instruction that loads or waits")
    options = parser.parse_args(argv)
    for file in options.cubin:
        for name, code in read(file).items():
            if not re.search(options.kernel, name):
                continue
            print("\n".join(describe(code, options.threads, options.dynamic_shared)))
            for loop in code.loops if options.trace else ():
                print(f"  {loop.path[0].address:#07x}:")
                for one in loop.own:
                    if one.loads or one.waits or "DEPBAR" in one.name:
                        waits = "".join(map(str, sorted(one.waits))) or "-"
                        print(f"    {one.address:#07x} waits {waits:6} sets {one.board}  {one.name} {one.operands}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
