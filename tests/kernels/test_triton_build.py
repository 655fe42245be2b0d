"""What Triton's compiler makes of the kernels, without a GPU: registers, spills, matrix instructions, 16-byte loads."""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fastmtl.core import dispatch

if dispatch.interpreting():
    pytest.skip("TRITON_INTERPRET=1: the kernels are not compiled", allow_module_level=True)
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
if not CUOBJDUMP.exists():
    pytest.skip("this Triton has no cuobjdump", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fastmtl.kernels.build_targets import build_targets  # noqa: E402
from fastmtl.kernels.common.build_target import BuildTarget  # noqa: E402

ALL = os.environ.get("FASTMTL_AOT") == "all"
# bytes of shared memory that a block may ask for
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
MATRIX_INSTRUCTIONS = ("HMMA", "HGMMA")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


class Built(NamedTuple):
    """What the machine code of one kernel takes and does."""

    registers: int
    stack: int
    shared: int
    instructions: collections.Counter[str]

    def count(self, fits: Callable[[str], Any]) -> int:
        return sum(n for name, n in self.instructions.items() if fits(name))


def compile_for(target: BuildTarget, arch: int) -> Built:
    source = ASTSource(fn=target.fn, signature=target.signature, constexprs=target.constexprs, attrs=target.attrs)
    options = {"num_warps": target.num_warps, "num_stages": target.num_stages, "maxnreg": target.max_registers}
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return read_cubin(kernel.asm["cubin"], kernel.metadata.shared)


def read_cubin(cubin: bytes, shared: int) -> Built:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage, code = (
            subprocess.run([str(CUOBJDUMP), flag, str(file)], capture_output=True, check=True, text=True).stdout
            for flag in ("--dump-resource-usage", "-sass")
        )
    registers, stack = (int(re.findall(rf"\b{name}:(\d+)", usage)[0]) for name in ("REG", "STACK"))
    return Built(registers, stack, shared, collections.Counter(_INSTRUCTION.findall(code)))


def problems(target: BuildTarget, arch: int, built: Built) -> list[str]:
    """What is wrong with a compiled kernel; empty: nothing."""
    found = []
    if not built.instructions["EXIT"]:
        found.append("no machine code was read")
    local = built.count(lambda name: name.split(".")[0] in ("LDL", "STL"))
    if built.stack or local:
        found.append(f"spills: {built.stack} bytes of stack, {local} accesses")
    if built.registers > 255:
        found.append(f"{built.registers} registers")
    if built.shared > SHARED_LIMIT[arch]:
        found.append(f"{built.shared} bytes of shared memory, {SHARED_LIMIT[arch]} are there")
    if target.expects_mma and not built.count(lambda name: name.split(".")[0] in MATRIX_INSTRUCTIONS):
        found.append("no matrix instruction")
    elif target.expects_wgmma and arch == 90 and not built.count(lambda name: name.split(".")[0] == "HGMMA"):
        found.append("no matrix instruction of a warp group")
    if target.expects_loads16 and not built.count(lambda name: re.match(r"(LDG|LDGSTS)\..*\b128\b", name)):
        found.append("no 16-byte load")
    return found


@functools.cache
def _targets() -> dict[str, BuildTarget]:
    found = {}
    for target in build_targets():
        assert target.name not in found, f"two targets are named {target.name}"
        found[target.name] = target
    return found


def _compile_by_name(name: str, arch: int) -> Built:
    """In a process of its own: kernels do not travel, names do."""
    return compile_for(_targets()[name], arch)


def _selected(target: BuildTarget, arch: int) -> bool:
    """Always: every kernel in every dtype. float16 for the newest of its architectures only, since bfloat16, whose code
    differs from it by the names of instructions, is compiled for each. `make aot`: everything."""
    return ALL or (target.representative and (target.dtype != torch.float16 or arch == max(target.archs)))


SELECTED = [
    pytest.param(name, arch, id=f"{name}-sm_{arch}")
    for name, target in _targets().items()
    for arch in target.archs
    if _selected(target, arch)
]


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest) -> Iterator[Callable[[str, int], Built]]:
    """Compiles what the selected tests ask for, two at a time."""
    wanted = [
        (item.callspec.params["name"], item.callspec.params["arch"])
        for item in request.session.items
        if getattr(item, "function", None) is test_compiles_to_what_it_should
    ]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        running = {one: pool.submit(_compile_by_name, *one) for one in wanted}
        yield lambda name, arch: running[name, arch].result()
        for one in running.values():
            one.cancel()


@pytest.mark.parametrize(("name", "arch"), SELECTED)
def test_compiles_to_what_it_should(name: str, arch: int, built: Callable[[str, int], Built]) -> None:
    result = built(name, arch)
    found = problems(_targets()[name], arch, result)
    if not triton.__version__.startswith("3.6."):
        # other releases assign registers otherwise: the tiles are those that don't spill under the pinned one
        found = [problem for problem in found if not problem.startswith("spills: ")]
    assert not found, f"{'; '.join(found)} ({result.registers} registers, {result.shared} bytes of shared memory)"


def test_every_kernel_and_dtype_has_one_that_is_always_compiled() -> None:
    kernels: dict[tuple[str, torch.dtype], bool] = collections.defaultdict(bool)
    for target in _targets().values():
        kernels[target.fn.__name__, target.dtype] |= target.representative
    assert [f"{name} {dtype}" for (name, dtype), there in kernels.items() if not there] == []
    expected = {"task_conv2d_fwd_kernel", "task_plan_kernel", "task_scale_shift_fwd_kernel"}
    assert expected <= {name for name, _ in kernels}


# --- that the check can fail


@triton.jit
def _product_kernel(p_a, p_b, p_c, stride, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr):
    m = tl.arange(0, BM)[:, None] * stride
    n = tl.arange(0, BN)[None, :]
    k = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for first in range(0, stride, BK):
        a = tl.load(p_a + m + (first + k)[None, :])
        b = tl.load(p_b + (first + k)[:, None] * stride + n)
        acc = tl.dot(a, b, acc) if DOT else acc + tl.sum(a.to(tl.float32), 1)[:, None] * tl.sum(b.to(tl.float32), 0)
    tl.store(p_c + m + n, acc)


def _product(size: int, num_warps: int, dot: bool, aligned: bool) -> BuildTarget:
    return BuildTarget(
        name="product",
        fn=_product_kernel,
        signature={
            "p_a": "*bf16",
            "p_b": "*bf16",
            "p_c": "*fp32",
            "stride": "i32",
            "BM": "constexpr",
            "BN": "constexpr",
            "BK": "constexpr",
            "DOT": "constexpr",
        },
        constexprs={"BM": size, "BN": size, "BK": 32, "DOT": dot},
        attrs={(k,): [["tt.divisibility", 16]] for k in range(4)} if aligned else {},
        num_warps=num_warps,
        num_stages=2,
        dtype=torch.bfloat16,
        representative=True,
        expects_mma=True,
        expects_loads16=True,
        expects_wgmma=num_warps >= 4,
    )


@pytest.mark.parametrize("arch", SHARED_LIMIT, ids=lambda arch: f"sm_{arch}")
@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (_product(64, 4, dot=True, aligned=True), []),
        # 16384 accumulators in the registers of one warp
        (_product(128, 1, dot=True, aligned=True), ["spills: "]),
        (_product(64, 4, dot=False, aligned=True), ["no matrix instruction"]),
        (_product(64, 4, dot=True, aligned=False), ["no 16-byte load"]),
    ],
    ids=["good", "spills", "no matrix instruction", "narrow loads"],
)
def test_faults_are_found(target: BuildTarget, expected: list[str], arch: int) -> None:
    found = problems(target, arch, compile_for(target, arch))
    assert len(found) == len(expected)
    assert all(text.startswith(start) for text, start in zip(found, expected, strict=True)), found


def test_products_of_a_warp_are_not_enough_on_sm_90() -> None:
    """Half as many registers' worth of operands, a fraction of the rate: what a tile of 32 rows compiles to."""
    small = _product(32, 4, dot=True, aligned=True)
    built = compile_for(small, 90)
    assert problems(small, 90, built) == ["no matrix instruction of a warp group"]
    assert problems(small._replace(expects_wgmma=False), 90, built) == []
    assert problems(small, 80, compile_for(small, 80)) == []


def test_limits_are_checked() -> None:
    target = _product(64, 4, dot=True, aligned=True)
    instructions = collections.Counter({"EXIT": 1, "HMMA.16816.F32.BF16": 1, "LDGSTS.E.BYPASS.LTC128B.128": 1})
    good = Built(registers=255, stack=0, shared=163 * 1024, instructions=instructions)
    assert problems(target, 80, good) == []
    assert problems(target, 80, good._replace(shared=163 * 1024 + 1)) == [
        f"{163 * 1024 + 1} bytes of shared memory, {163 * 1024} are there"
    ]
    wgmma = collections.Counter({**instructions, "HGMMA.64x64x16.F32.BF16": 1})
    assert problems(target, 90, good._replace(shared=163 * 1024 + 1, instructions=wgmma)) == []
    assert problems(target, 90, good) == ["no matrix instruction of a warp group"]
    assert problems(target, 80, good._replace(registers=256)) == ["256 registers"]
    only_in_name = collections.Counter({"EXIT": 1, "HMMA.16816.F32": 1, "LDGSTS.E.LTC128B": 1})
    assert problems(target, 80, good._replace(instructions=only_in_name)) == ["no 16-byte load"]
    assert problems(target, 80, good._replace(instructions=collections.Counter()))[0] == "no machine code was read"
