"""What the CUDA compiler makes of the kernels, without a GPU: registers, spills, wide accesses, tensor cores."""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from paths import ROOT

from fastmtl.benchmarks.machine_code import cubin, kernel_table
from fastmtl.benchmarks.machine_code.kernel_table import Kernel, kernel_of, memory_bound
from fastmtl.core import dispatch

NVCC = kernel_table.nvcc()
ALL = os.environ.get("FASTMTL_AOT") == "all"
# a block's static shared memory
SHARED_LIMIT = 48 * 1024
# blocks of 256 threads of which a multiprocessor has 64 Ki registers
REGISTERS = {1: 255, 2: 128, 3: 80}


class Built(NamedTuple):
    """What the machine code of one kernel takes and does."""

    registers: int
    stack: int
    shared: int
    instructions: collections.Counter[str]
    loops: tuple[cubin.Loop, ...] = ()

    def has(self, pattern: str) -> bool:
        return any(re.match(pattern, name) for name in self.instructions)


def _kernels_of(dtype: str) -> set[Kernel]:
    return {
        *(Kernel("gram_rows_kernel", dtype, (n,)) for n in (2, 4, 8)),
        *(Kernel("gram_mma_kernel", dtype, (n,)) for n in (2, 4, 6, 8)),
        *(Kernel("combine_kernel", dtype, (n,)) for n in (1, 8)),
        Kernel("combine_split_kernel", dtype),
    }


def _group_kernels_of(dtype: str) -> set[Kernel]:
    return {
        *(Kernel("gram_groups_rows_kernel", dtype, (n,)) for n in (2, 4, 8)),
        *(Kernel("gram_groups_mma_kernel", dtype, (n,)) for n in (2, 4, 6, 8)),
        Kernel("combine_groups_kernel", dtype),
    }


def _task_kernels_of(dtype: str) -> set[Kernel]:
    """Of the task convolution. The largest tiles are for 16 bits."""
    narrow = dtype != "f32"
    return {
        *(Kernel("task_product_kernel", dtype, (n,)) for n in range(0 if narrow else 1, 4)),
        *(Kernel("task_pieces_kernel", dtype, (n,)) for n in range(0 if narrow else 2, 4)),
        *(
            Kernel(f"task_stage_{line}kernel", dtype, (n,))
            for line in ("", "line_", "taps_")
            for n in {4, 2 if narrow else 4}
        ),
        *(Kernel("task_bias_kernel", dtype, (n,)) for n in (1, 8 if narrow else 4)),
        *(Kernel("task_finish_kernel", dtype, (n,)) for n in (1, 4)),
        Kernel("task_chunks_kernel", dtype),
        Kernel("task_gates_kernel", dtype),
    }


# source -> what it launches; that these are all is checked against the sources and against the extension
KERNELS = {
    **{f"kernels_{dtype}": _kernels_of(dtype) for dtype in kernel_table.DTYPES.values()},
    **{f"kernels_groups_{dtype}": _group_kernels_of(dtype) for dtype in kernel_table.DTYPES.values()},
    "kernels_solve": {
        Kernel(f"pcgrad_{what}_kernel", "", (n,)) for what in ("coefficients", "weights") for n in (16, 32, 64, 128)
    },
    "kernels_gradvac": {Kernel("gradvac_kernel", "", (n,)) for n in (16, 32, 64, 128)},
    "kernels_methods": {Kernel("method_weights_kernel", "", (n,)) for n in (16, 64, 128)},
    **{f"kernels_task_{dtype}": _task_kernels_of(dtype) for dtype in ("f32", "bf16", "f16")},
    "kernels_task": set(),
    "functions": set(),
    "runtime": {Kernel("write_table_kernel", "", (n,)) for n in (480, 1536, 4093)},
    "surgery": set(),
}
# takes more than a minute to compile; that it does not spill, the test of the extension sees on every architecture
SLOW = "kernels_methods"
# always every other kernel for one architecture, and one dtype for the other
AT_80 = ("kernels_f32", "kernels_groups_f32", "kernels_task_bf16")
SELECTED = [
    (source, arch)
    for arch in (80, 90, 100)
    for source, kernels in KERNELS.items()
    if kernels and (ALL or (arch == 90 and source != SLOW) or (arch == 80 and source in AT_80))
]
# without one of these a kernel would still be right, but slow
MATRIX_INSTRUCTIONS = {
    "f32": r"HMMA\.1688\.F32\.TF32",
    "f64": r"DMMA\.",
    "bf16": r"HMMA\.16816\.F32\.BF16",
    "f16": r"HMMA\.16816\.F32$",
}

# Rounds of load latency in a step, at most, of the loops that are bound by memory. One is what loads into registers can
# have. More, with the reason:
ROUNDS = {
    # a queue of two steps or more in shared memory
    ("gram_mma_kernel", "rows"): 0.5,
    # lists: the rows' pointers come out of device memory first
    ("combine_split_kernel", "rows"): 2,
    # Once a call. 16 loads of a thread, 32 from 17 tasks on, are more than six scoreboards tell apart: a wait for the
    # pointer of one is a wait for another.
    ("gram_rows_kernel", "sums"): 2,
    ("gram_mma_kernel", "sums"): 3,
}
# loads to a round of sums, whatever the rounds: less was measured to take tens of microseconds
SUMS_AT_ONCE = 8


class MainLoop(NamedTuple):
    """Of a product of the task convolution: blocks of 128 threads that fit on a multiprocessor, and of a step matrix
    products, loads of fragments, copies, and instructions at most."""

    blocks: int
    products: int
    fragments: int
    copies: int
    instructions: int


# by the size of the tile: 128 x 128, 128 x 64, 64 x 64; of 16 bits, and of float32, which takes three products for one
PRODUCTS = {
    ("f16", 0): MainLoop(2, 64, 16, 8, 240),
    ("f16", 1): MainLoop(3, 32, 12, 6, 200),
    ("f16", 2): MainLoop(4, 16, 8, 4, 165),
    ("f32", 1): MainLoop(2, 96, 12, 6, 400),
    ("f32", 2): MainLoop(3, 48, 8, 4, 280),
}
# of weight gradients: 128 x 128, 64 x 192, 64 x 64; of float32 fragments come number by number
PIECES = {
    ("f16", 0): MainLoop(2, 64, 16, 8, 265),
    ("f16", 1): MainLoop(2, 48, 14, 8, 255),
    ("f16", 2): MainLoop(4, 16, 8, 4, 150),
    ("f32", 2): MainLoop(3, 48, 0, 4, 330),
}


def main_loop_of(kernel: Kernel) -> MainLoop | None:
    table = {"task_product_kernel": PRODUCTS, "task_pieces_kernel": PIECES}.get(kernel.name, {})
    return table.get((kernel.dtype.replace("bf16", "f16"), *kernel.numbers))


def slow_products(kernel: Kernel, loops: Sequence[cubin.Loop]) -> list[str]:
    """What is wrong with the main loop of a product of the task convolution."""
    wanted = main_loop_of(kernel)
    if wanted is None:
        return []
    found = [
        MainLoop(wanted.blocks, count["HMMA"], count["LDSM"], count["LDGSTS"], len(loop.own))
        for loop in loops
        for count in [collections.Counter(one.name.split(".")[0] for one in loop.own)]
        if count["HMMA"]
    ]
    if len(found) != 1 or found[0][:4] != wanted[:4]:
        return [f"main loops {found}, one of {wanted} is wanted"]
    (loop,) = (loop for loop in loops if loop.has("HMMA"))
    wrong = [f"{found[0].instructions} instructions in a step"] if found[0].instructions > wanted.instructions else []
    # two of four stages are under way
    return wrong + [f"{loop.rounds:.3g} rounds of copies in a step"] * (not 0 < loop.rounds <= 0.5)


def most_rounds(kernel: Kernel, kind: str) -> float:
    return ROUNDS.get((kernel.like, kind), 1)


def slow_loops(kernel: Kernel, loops: Sequence[cubin.Loop]) -> list[str]:
    """What keeps a kernel from having its loads in flight together; empty: nothing."""
    found, seen = [], set()
    for loop in loops:
        kind = memory_bound(kernel, loop)
        if kind is None:
            continue
        seen.add(kind)
        most = most_rounds(kernel, kind)
        if not 0 < loop.rounds <= most:
            found.append(f"{kind}: {loop.rounds:.3g} rounds of loads in a step, {most} are wanted at most")
        if kind == "sums" and loop.loads[8] < SUMS_AT_ONCE * loop.rounds:
            found.append(f"sums: {loop.loads[8]} loads in {loop.rounds:.3g} rounds")
    wanted = {"rows", "sums"} if kernel.name.startswith("gram_") else {"rows"}
    return found + [f"no loop over {kind}" for kind in sorted(wanted - seen)]


def wanted_blocks(kernel: Kernel) -> int:
    """Blocks that should fit on a multiprocessor at once: enough loads in flight without them to hide latency."""
    first = kernel.numbers[0] if kernel.numbers else 0
    if kernel.like == "combine_split_kernel":
        return 3
    if kernel.like == "combine_kernel":
        return 3 if first <= 1 else 2 if kernel.dtype == "f32" else 1
    if kernel.like == "gram_mma_kernel":
        return {2: 3, 4: 2}.get(first, 1)
    return 2 if kernel.like == "gram_rows_kernel" and kernel.dtype != "f64" else 1


def problems(kernel: Kernel, built: Built) -> list[str]:
    """What is wrong with a compiled kernel; empty: nothing."""
    found = []
    if not built.instructions["EXIT"]:
        found.append("no machine code was read")
    local = sum(n for name, n in built.instructions.items() if name.split(".")[0] in ("LDL", "STL"))
    if built.stack or local:
        found.append(f"spills: {built.stack} bytes of stack, {local} accesses")
    product = main_loop_of(kernel)
    limit = REGISTERS[wanted_blocks(kernel)] if product is None else min(255, 65536 // (128 * product.blocks))
    if built.registers > limit:
        found.append(f"{built.registers} registers, {limit} are wanted at most")
    if built.shared > SHARED_LIMIT:
        found.append(f"{built.shared} bytes of shared memory")
    streams = kernel.name.startswith(("gram_", "combine_"))
    load = "LDGSTS" if kernel.like == "gram_mma_kernel" else "LDG"  # by way of a queue in shared memory
    if streams and not built.has(rf"{load}\.E\.(\w+\.)*128\b"):
        found.append("no load of 128 bits")
    if kernel.like == "combine_kernel" and not built.has(r"STG\.E\.(\w+\.)*128\b"):
        found.append("no store of 128 bits")
    if kernel.name.startswith("task_"):
        generic = sum(n for name, n in built.instructions.items() if name.split(".")[0] in ("LD", "ST"))
        found += [f"{generic} accesses of memory of any kind"] * (generic > 0)
    if product is not None and not built.has(r"LDGSTS\.E\.(\w+\.)*128\b"):
        found.append("no load of 128 bits")
    wide_store = kernel.name in ("task_product_kernel", "task_stage_line_kernel")
    if wide_store and not built.has(r"STG\.E\.(\w+\.)*128\b"):
        found.append("no store of 128 bits")
    products = ("gram_mma_kernel", "task_product_kernel", "task_pieces_kernel")
    if kernel.like in products and not built.has(MATRIX_INSTRUCTIONS[kernel.dtype]):
        found.append("no matrix instruction")
    return found


def all_problems(kernel: Kernel, built: Built) -> list[str]:
    loops = slow_loops(kernel, built.loops) if kernel.name.startswith(("gram_", "combine_")) else []
    return problems(kernel, built) + loops + slow_products(kernel, built.loops)


CUOBJDUMP = cubin.tool("cuobjdump")
needs_tools = pytest.mark.skipif(NVCC is None or CUOBJDUMP is None, reason="no nvcc, or no cuobjdump")


def read_cubin(file: Path) -> dict[Kernel, Built]:
    found = {}
    for name, code in cubin.read(file).items():
        counter = collections.Counter(one.name for one in code.instructions)
        found[kernel_of(name)] = Built(code.registers, code.stack, code.shared, counter, tuple(code.loops))
    return found


@functools.cache
def _architectures() -> set[int]:
    assert NVCC is not None
    text = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, check=True, text=True).stdout
    return {int(number) for number in re.findall(r"compute_(\d+)", text)}


def compile_source(source: str, arch: int, folder: Path) -> dict[Kernel, Built]:
    return read_cubin(kernel_table.compile_cubin(source, arch, folder))


def extension_is_of_these_sources() -> bool:
    """Whether it has kernels, and was built after every one of their sources was last changed."""
    if dispatch.extension is None or not dispatch.build_info()["cuda_architectures"]:
        return False
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cu", ".cuh", ".h", ".inc")]
    built = Path(dispatch.extension.__file__).stat().st_mtime
    return built > max(path.stat().st_mtime for path in [*sources, ROOT / "setup.py"])


class Compiled:
    """The selected translation units: of the extension, else compiled, two at a time. `make aot` compiles all."""

    def __init__(self, wanted: list[tuple[str, int]], pool: concurrent.futures.Executor, folder: Path) -> None:
        self.built: dict[tuple[frozenset[Kernel], int], Path] = {}
        if not ALL and extension_is_of_these_sources():
            for file, (names, arch) in cubin.extract(Path(dispatch.extension.__file__), folder).items():
                self.built[frozenset(map(kernel_of, names)), arch] = file
        missing = [(source, arch) for source, arch in wanted if (frozenset(KERNELS[source]), arch) not in self.built]
        self.running = {one: pool.submit(compile_source, *one, folder) for one in missing}

    def __call__(self, source: str, arch: int) -> dict[Kernel, Built]:
        if (source, arch) in self.running:
            return self.running[source, arch].result()
        return read_cubin(self.built[frozenset(KERNELS[source]), arch])


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiled]:
    wanted = [
        (item.callspec.params["source"], item.callspec.params["arch"])
        for item in request.session.items
        if getattr(item, "function", None) is test_every_kernel_compiles_to_what_it_should
    ]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        it = Compiled([one for one in wanted if one[1] in _architectures()], pool, tmp_path_factory.mktemp("cubin"))
        yield it
        for running in it.running.values():
            running.cancel()


@needs_tools
@pytest.mark.parametrize(("source", "arch"), SELECTED, ids=lambda one: f"sm_{one}" if isinstance(one, int) else one)
def test_every_kernel_compiles_to_what_it_should(source: str, arch: int, compiled: Compiled) -> None:
    if arch not in _architectures():
        pytest.skip(f"this nvcc does not know sm_{arch}")
    built = compiled(source, arch)
    assert set(built) == KERNELS[source]
    found = {str(kernel): all_problems(kernel, one) for kernel, one in built.items()}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


def test_every_source_is_compiled() -> None:
    assert {path.stem for path in (ROOT / "csrc" / "cuda").rglob("*.cu")} == set(KERNELS)
    assert "<<<" not in (ROOT / "csrc" / "cuda" / "gradients" / "surgery.cu").read_text()


def _extension() -> Path:
    if dispatch.extension is None:
        pytest.skip(f"no compiled extension ({dispatch.extension_error})")
    if not dispatch.build_info()["cuda_architectures"]:
        pytest.skip(f"an extension without CUDA ({dispatch.build_note('cuda')})")
    return Path(dispatch.extension.__file__)


@needs_tools
def test_the_extension_holds_every_kernel_without_spills() -> None:
    extension = _extension()
    usage = {kernel_of(name): text for name, text in cubin.dump("--dump-resource-usage", extension).items()}
    assert set(usage) == set().union(*KERNELS.values())
    for kernel, texts in usage.items():
        assert len(texts) == len(dispatch.build_info()["cuda_architectures"])
        for text in texts:
            assert re.search(r"\bSTACK:0\b", text) and re.search(r"\bLOCAL:0\b", text), f"{kernel}: {text}"


def test_extension_needs_libtorch_and_holds_the_architectures() -> None:
    extension = dispatch.extension
    if extension is None:
        pytest.skip(f"no compiled extension ({dispatch.extension_error})")
    needed = subprocess.run(["readelf", "-d", extension.__file__], capture_output=True, text=True, check=True).stdout
    # dropped, the weak symbol of the CUDA half stays null on a CUDA torch
    assert "[libtorch.so]" in needed
    assert not re.search(r"NEEDED.*(libtorch_python|libtorch_cuda|libcudart)", needed)
    info = dispatch.build_info()
    with_cuda = dispatch.build_note("cuda") is None and NVCC is not None
    if with_cuda and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        assert info["cuda_architectures"] == [80, 90]
    kernels = ["combine", "combine_groups", "gradvac_coefficients", "gram", "gram_groups", "method_weights", "pcgrad"]
    kernels += ["pcgrad_coefficients", "pcgrad_project", "task_conv2d", "task_linear"]
    assert info["cuda_kernels"] == (kernels if with_cuda else [])


# --- that the check can fail


def _built(*instructions: str, registers: int = 80, stack: int = 0, shared: int = 0) -> Built:
    return Built(registers, stack, shared, collections.Counter(["EXIT", *instructions]))


def test_faults_are_found() -> None:
    combine = Kernel("combine_kernel", "bf16", (1,))
    good = _built("LDG.E.128", "STG.E.128")
    assert problems(combine, good) == []
    assert problems(combine, _built("LDG.E.128", "STG.E.U16")) == ["no store of 128 bits"]
    # generic accesses: whose memory it is was not seen
    assert problems(combine, _built("LD.E.128", "ST.E.128")) == ["no load of 128 bits", "no store of 128 bits"]
    assert problems(combine, good._replace(registers=81)) == ["81 registers, 80 are wanted at most"]
    assert problems(combine, good._replace(stack=8)) == ["spills: 8 bytes of stack, 0 accesses"]
    spilled = good._replace(instructions=good.instructions + collections.Counter(["LDL.64", "STL"]))
    assert problems(combine, spilled) == ["spills: 0 bytes of stack, 2 accesses"]
    assert problems(combine, good._replace(shared=SHARED_LIMIT + 1)) == [f"{SHARED_LIMIT + 1} bytes of shared memory"]
    assert problems(combine, good._replace(instructions=collections.Counter()))[0] == "no machine code was read"
    rows = Kernel("gram_rows_kernel", "f32", (8,))
    assert problems(rows, _built("LDG.E.64")) == ["no load of 128 bits"]
    for dtype, instruction in {"f32": "HMMA.1688.F32.TF32", "f16": "HMMA.16816.F32", "f64": "DMMA.8x8x4"}.items():
        kernel = Kernel("gram_mma_kernel", dtype, (4,))
        assert problems(kernel, _built("LDGSTS.E.BYPASS.LTC128B.128", instruction)) == []
        # not ahead
        assert problems(kernel, _built("LDG.E.128", instruction)) == ["no load of 128 bits"]
        assert problems(kernel, _built("LDGSTS.E.BYPASS.LTC128B.64", instruction)) == ["no load of 128 bits"]
        # the right width with another type
        wrong = _built("LDGSTS.E.BYPASS.LTC128B.128", "HMMA.16816.F32.BF16")
        assert problems(kernel, wrong) == ["no matrix instruction"]


def _loop(*names: str, waits: Sequence[int] = ()) -> cubin.Loop:
    """Instructions that each set scoreboard 0; those at `waits` wait for it."""
    code = [
        cubin.Instruction(0, name, "", False, 1, 0, frozenset({0} if k in waits else ()))
        for k, name in enumerate(names)
    ]
    return cubin.Loop(tuple(code), tuple(code))


def test_loops_that_wait_too_often_are_found() -> None:
    combine, rows = Kernel("combine_kernel", "bf16", (1,)), Kernel("gram_rows_kernel", "f32", (8,))
    together = _loop(*["LDG.E.128"] * 8, "FADD", waits=[8])
    each = _loop(*["LDG.E.128", "FADD"] * 4, waits=[1, 3, 5, 7])
    assert slow_loops(combine, [together]) == []
    assert slow_loops(combine, [together, each]) == ["rows: 4 rounds of loads in a step, 1 are wanted at most"]
    assert slow_loops(combine, []) == ["no loop over rows"]
    # loads that nobody waits for are no loop over rows
    assert slow_loops(combine, [_loop("LDG.E.128")]) == ["rows: 0 rounds of loads in a step, 1 are wanted at most"]
    one, sums = "LDG.E.64.STRONG.GPU", _loop(*["LDG.E.64.STRONG.GPU"] * 16, "DADD", waits=[16])
    assert slow_loops(rows, [together, sums]) == []
    assert slow_loops(rows, [together]) == ["no loop over sums"]
    late = _loop(*[one] * 4, "DADD", *[one] * 12, "DADD", waits=[4, 8, 17])
    assert slow_loops(rows, [together, late]) == [
        "sums: 3 rounds of loads in a step, 2 are wanted at most",
        "sums: 16 loads in 3 rounds",
    ]
    # a queue: as many steps ahead as it is deep
    mma = Kernel("gram_mma_kernel", "f32", (2,))
    copies = (cubin.Instruction(0, "DEPBAR.LE", "SB0, 0x1", False, 1, 7, frozenset()), *_loop("LDGSTS.E.128").own)
    queue = cubin.Loop((*copies, *_loop("LDGDEPBAR", "HMMA.1688.F32.TF32").own), (*copies, *_loop("LDGDEPBAR").own))
    assert slow_loops(mma, [queue, sums]) == []
    at_once = cubin.Loop(queue.path, (replace(copies[0], operands="SB0, 0x0"), *queue.own[1:]))
    assert slow_loops(mma, [at_once, sums]) == ["rows: 1 rounds of loads in a step, 0.5 are wanted at most"]


def test_products_that_are_slow_are_found() -> None:
    kernel = Kernel("task_product_kernel", "bf16", (2,))
    step = ["LDGSTS.E.BYPASS.LTC128B.128"] * 4 + ["LDGDEPBAR"] + ["LDSM.16.M88.4"] * 8 + ["HMMA.16816.F32.BF16"] * 16
    waits = cubin.Instruction(0, "DEPBAR.LE", "SB0, 0x2", False, 1, 7, frozenset())

    def loop(*names: str, wait: cubin.Instruction = waits) -> cubin.Loop:
        own = (wait, *_loop(*names).own)
        return cubin.Loop(own, own)

    assert slow_products(kernel, [loop(*step)]) == []
    assert slow_products(kernel, []) != [] and slow_products(kernel, [loop(*step[:-1])]) != []
    assert slow_products(kernel, [loop(*step, *["IADD3"] * 200)]) == ["230 instructions in a step"]
    at_once = replace(waits, operands="SB0, 0x0")
    assert slow_products(kernel, [loop(*step, wait=at_once)]) == ["1 rounds of copies in a step"]
    assert main_loop_of(Kernel("task_product_kernel", "bf16", (3,))) is None


def test_names_are_read() -> None:
    text = "_ZN7fastmtl4cuda15gram_mma_kernelI13__nv_bfloat16Li8EEEvNS0_10GramParamsE"
    assert kernel_of(text) == Kernel("gram_mma_kernel", "bf16", (8,))
    text = "_ZN7fastmtl4cuda26pcgrad_coefficients_kernelILi4ELi16EEEvPKdiNS0_5SolveE"
    assert kernel_of(text) == Kernel("pcgrad_coefficients_kernel", "", (4, 16))
    text = "_ZN7fastmtl4cuda53_GLOBAL__N__3a68_10_runtime_cu_58c8_218write_table_kernelENS1_10TableWordsE"
    assert kernel_of(text) == Kernel("write_table_kernel")
