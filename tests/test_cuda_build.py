"""What the CUDA compiler makes of the kernels, without a GPU: registers, spills, wide accesses, tensor cores."""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from torch.utils import cpp_extension

from fastmtl import _backend

ROOT = Path(__file__).parent.parent
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
ALL = os.environ.get("FASTMTL_AOT") == "all"
# a block's static shared memory
SHARED_LIMIT = 48 * 1024
# blocks of 256 threads of which a multiprocessor has 64 Ki registers
REGISTERS = {1: 255, 2: 128, 3: 80}

_DTYPES = {"f": "f32", "d": "f64", "13__nv_bfloat16": "bf16", "6__half": "f16"}
_ARGUMENTS = re.compile(r"(?:I(f|d|13__nv_bfloat16|6__half)?((?:Li\d+E)*)E)?")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


class Kernel(NamedTuple):
    """An instantiation: `dtype` is empty where the kernel has none."""

    name: str
    dtype: str = ""
    numbers: tuple[int, ...] = ()

    def __str__(self) -> str:
        return "-".join([self.name, *filter(None, [self.dtype]), *map(str, self.numbers)])


class Built(NamedTuple):
    """What the machine code of one kernel takes and does."""

    registers: int
    stack: int
    shared: int
    instructions: collections.Counter[str]

    def has(self, pattern: str) -> bool:
        return any(re.match(pattern, name) for name in self.instructions)


def _kernels_of(dtype: str) -> set[Kernel]:
    return {
        *(Kernel("gram_rows_kernel", dtype, (n,)) for n in (2, 4, 8)),
        *(Kernel("gram_mma_kernel", dtype, (n,)) for n in (2, 4, 6, 8)),
        *(Kernel("combine_kernel", dtype, (n,)) for n in (1, 8)),
        Kernel("combine_split_kernel", dtype),
    }


# source -> what it launches; that these are all is checked against the sources and against the extension
KERNELS = {
    **{f"kernels_{dtype}": _kernels_of(dtype) for dtype in _DTYPES.values()},
    "kernels_solve": {Kernel("pcgrad_coefficients_kernel", "", (n,)) for n in (16, 32, 64, 128)},
    "runtime": {Kernel("write_table_kernel", "", (n,)) for n in (480, 1536, 4093)},
    "surgery": set(),
}
# always every kernel for one architecture, and one dtype for the other
SELECTED = [
    (source, arch)
    for arch in (80, 90, 100)
    for source, kernels in KERNELS.items()
    if kernels and (ALL or arch == 90 or (arch == 80 and source == "kernels_f32"))
]
# without one of these a kernel would still be right, but slow
MATRIX_INSTRUCTIONS = {
    "f32": r"HMMA\.1688\.F32\.TF32",
    "f64": r"DMMA\.",
    "bf16": r"HMMA\.16816\.F32\.BF16",
    "f16": r"HMMA\.16816\.F32$",
}


def wanted_blocks(kernel: Kernel) -> int:
    """Blocks that should fit on a multiprocessor at once: enough loads in flight without them to hide latency."""
    first = kernel.numbers[0] if kernel.numbers else 0
    if kernel.name == "combine_split_kernel":
        return 3
    if kernel.name == "combine_kernel":
        return 3 if first == 1 else 2 if kernel.dtype == "f32" else 1
    if kernel.name == "gram_mma_kernel":
        return {2: 3, 4: 2}.get(first, 1)
    return 2 if kernel.name == "gram_rows_kernel" and kernel.dtype != "f64" else 1


def problems(kernel: Kernel, built: Built) -> list[str]:
    """What is wrong with a compiled kernel; empty: nothing."""
    found = []
    if not built.instructions["EXIT"]:
        found.append("no machine code was read")
    local = sum(n for name, n in built.instructions.items() if name.split(".")[0] in ("LDL", "STL"))
    if built.stack or local:
        found.append(f"spills: {built.stack} bytes of stack, {local} accesses")
    limit = REGISTERS[wanted_blocks(kernel)]
    if built.registers > limit:
        found.append(f"{built.registers} registers, {limit} are wanted at most")
    if built.shared > SHARED_LIMIT:
        found.append(f"{built.shared} bytes of shared memory")
    streams = kernel.name.startswith(("gram_", "combine_"))
    load = "LDGSTS" if kernel.name == "gram_mma_kernel" else "LDG"  # by way of a queue in shared memory
    if streams and not built.has(rf"{load}\.E\.(\w+\.)*128\b"):
        found.append("no load of 128 bits")
    if kernel.name == "combine_kernel" and not built.has(r"STG\.E\.(\w+\.)*128\b"):
        found.append("no store of 128 bits")
    if kernel.name == "gram_mma_kernel" and not built.has(MATRIX_INSTRUCTIONS[kernel.dtype]):
        found.append("no matrix instruction")
    return found


def kernel_of(mangled: str) -> Kernel:
    # names stand behind their lengths, which may stand behind other digits
    for length in re.finditer(r"(?=(\d+))", mangled):
        start = length.end(1)
        name = mangled[start : start + int(length[1])]
        if name.endswith("_kernel") and len(name) == int(length[1]):
            arguments = _ARGUMENTS.match(mangled, start + len(name))
            assert arguments is not None
            dtype, numbers = arguments.groups()
            return Kernel(name, _DTYPES.get(dtype or "", ""), tuple(int(n) for n in re.findall(r"\d+", numbers or "")))
    raise AssertionError(f"no kernel's name: {mangled}")


def _cuobjdump() -> str | None:
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if bundled.exists():
            return str(bundled)
    return shutil.which("cuobjdump")


CUOBJDUMP = _cuobjdump()
needs_tools = pytest.mark.skipif(NVCC is None or CUOBJDUMP is None, reason="no nvcc, or no cuobjdump")


def _dump(flag: str, file: Path) -> dict[str, list[str]]:
    """Mangled name -> the sections about that function."""
    assert CUOBJDUMP is not None
    text = subprocess.run([CUOBJDUMP, flag, str(file)], capture_output=True, check=True, text=True).stdout
    found = collections.defaultdict(list)
    for section in re.split(r"\bFunction\s*:?\s+(?=\S*_kernel)", text)[1:]:
        name, rest = re.split(r"[:\s]", section, maxsplit=1)
        found[name].append(rest)
    return found


def read_cubin(file: Path) -> dict[Kernel, Built]:
    usage, code = _dump("--dump-resource-usage", file), _dump("-sass", file)
    assert usage.keys() == code.keys()
    found = {}
    for name, (text,) in usage.items():
        registers, stack, shared = (int(re.findall(rf"\b{word}:(\d+)", text)[0]) for word in ("REG", "STACK", "SHARED"))
        counter = collections.Counter(_INSTRUCTION.findall(code[name][0]))
        found[kernel_of(name)] = Built(registers, stack, shared, counter)
    return found


@functools.cache
def _architectures() -> set[int]:
    assert NVCC is not None
    text = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, check=True, text=True).stdout
    return {int(number) for number in re.findall(r"compute_(\d+)", text)}


def compile_source(source: str, arch: int, folder: Path) -> dict[Kernel, Built]:
    """The real translation unit, with the flags of setup.py that matter to machine code."""
    assert NVCC is not None
    target = folder / f"{source}_{arch}.cubin"
    flags = ["-O3", "-std=c++20", f"-I{ROOT / 'csrc'}", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    flags += cpp_extension.COMMON_NVCC_FLAGS
    if not source.startswith("kernels_"):  # the launchers know nothing of torch
        flags += [f"-I{path}" for path in cpp_extension.include_paths()]
        flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"]
    report = subprocess.run(
        [NVCC, *flags, "-cubin", str(ROOT / "csrc" / "cuda" / f"{source}.cu"), "-o", str(target)],
        capture_output=True,
        text=True,
    )
    assert report.returncode == 0, report.stderr
    return read_cubin(target)


class Compiled:
    """The selected translation units, compiled two at a time."""

    def __init__(self, wanted: list[tuple[str, int]], pool: concurrent.futures.Executor, folder: Path) -> None:
        self.running = {one: pool.submit(compile_source, *one, folder) for one in wanted}

    def __call__(self, source: str, arch: int) -> dict[Kernel, Built]:
        return self.running[source, arch].result()


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
    found = {str(kernel): problems(kernel, one) for kernel, one in built.items()}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


def test_every_source_is_compiled() -> None:
    assert {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")} == set(KERNELS)
    assert "<<<" not in (ROOT / "csrc" / "cuda" / "surgery.cu").read_text()


def _extension() -> Path:
    if _backend.extension is None:
        pytest.skip(f"no compiled extension ({_backend.extension_error})")
    if not _backend.build_info()["cuda_architectures"]:
        pytest.skip(f"an extension without CUDA ({_backend.build_note('cuda')})")
    return Path(_backend.extension.__file__)


@needs_tools
def test_the_extension_holds_every_kernel_without_spills() -> None:
    extension = _extension()
    usage = {kernel_of(name): text for name, text in _dump("--dump-resource-usage", extension).items()}
    assert set(usage) == set().union(*KERNELS.values())
    for kernel, texts in usage.items():
        assert len(texts) == len(_backend.build_info()["cuda_architectures"])
        for text in texts:
            assert re.search(r"\bSTACK:0\b", text) and re.search(r"\bLOCAL:0\b", text), f"{kernel}: {text}"


def test_extension_needs_libtorch_and_holds_the_architectures() -> None:
    extension = _backend.extension
    if extension is None:
        pytest.skip(f"no compiled extension ({_backend.extension_error})")
    needed = subprocess.run(["readelf", "-d", extension.__file__], capture_output=True, text=True, check=True).stdout
    # dropped, the weak symbol of the CUDA half stays null on a CUDA torch
    assert "[libtorch.so]" in needed
    assert not re.search(r"NEEDED.*(libtorch_python|libtorch_cuda|libcudart)", needed)
    info = _backend.build_info()
    with_cuda = _backend.build_note("cuda") is None and NVCC is not None
    if with_cuda and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        assert info["cuda_architectures"] == [80, 90]
    kernels = ["combine", "gram", "pcgrad", "pcgrad_coefficients", "pcgrad_project"]
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


def test_names_are_read() -> None:
    text = "_ZN7fastmtl4cuda15gram_mma_kernelI13__nv_bfloat16Li8EEEvNS0_10GramParamsE"
    assert kernel_of(text) == Kernel("gram_mma_kernel", "bf16", (8,))
    text = "_ZN7fastmtl4cuda26pcgrad_coefficients_kernelILi4ELi16EEEvPKdiNS0_5SolveE"
    assert kernel_of(text) == Kernel("pcgrad_coefficients_kernel", "", (4, 16))
    text = "_ZN7fastmtl4cuda53_GLOBAL__N__3a68_10_runtime_cu_58c8_218write_table_kernelENS1_10TableWordsE"
    assert kernel_of(text) == Kernel("write_table_kernel")
