"""What the tests of gradient surgery on CUDA tensors share: backends by turns, bits, graphs, new processes."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import cases
import pytest
import torch
from cases import BankCase, ListCase
from torch import Tensor

import fastmtl
from fastmtl.core import dispatch

DEVICE = "cuda"
NAMES = ("reference", "cuda", "triton", None)
SMALLEST = {dtype: 2.0**-25 if dtype == torch.float16 else 0.0 for dtype in cases.DTYPES}
# op -> where its implementations are listed
TABLES = {
    "gram": ("gram", "_BANK"),
    "combine": ("combine", "_BANK"),
    "pcgrad_coefficients": ("pcgrad", "_COEFFICIENTS"),
    "pcgrad": ("pcgrad", "_FUSED"),
}


def _kernels(op: str) -> set[str]:
    module, name = TABLES[op]
    table = getattr(sys.modules[f"fastmtl.ops.gradients.{module}"], name)
    return set(table["pcgrad"] if name == "_FUSED" else table)


@pytest.fixture(params=NAMES, ids=str)
def forced(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """Each backend in turn; None: the one that the package chooses."""
    name = request.param
    if name is not None and (reason := dispatch.unavailable(name, DEVICE)) is not None:
        pytest.skip(reason)
    yield name


def by_backend(table: Sequence[Any], few: Sequence[Any] = ()) -> pytest.MarkDecorator:
    """Each case on each backend. Triton compiles for seconds per kernel: only a few of its cases are not slow."""
    combinations = [
        pytest.param(case, name, id=f"{case}-{name}", marks=[pytest.mark.slow] if name == "triton" and _is_slow else [])
        for case in table
        for name in NAMES
        for _is_slow in [case not in few]
    ]
    return pytest.mark.parametrize(("case", "forced"), combinations, indirect=["forced"])


def use(op: str, name: str | None) -> Any:
    """Forces the backend, or skips where it has no kernel for the op."""
    if name is None:
        return nullcontext()
    if name not in _kernels(op):
        pytest.skip(f"{name} has no kernel for {op}")
    return fastmtl.use_backend(name)


def served_by(name: str | None) -> str:
    """The backend that serves a call: the forced one, or the one that the package must choose."""
    if name is not None:
        return name
    return next((b for b in ("cuda", "triton") if dispatch.unavailable(b, DEVICE) is None), "reference")


def slack(forced: str | None, case: BankCase | ListCase | None = None) -> float:
    return cases.gram_slack(served_by(forced), case)


def tensors_in(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    return [x for y in found if y is not None for x in tensors_in(y)]


def assert_same_bits(found: Any, expected: Any) -> None:
    for x, y in zip(tensors_in(found), tensors_in(expected), strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


def captured(call: Callable[[], Any], stream: torch.cuda.Stream | None = None) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of the call, and its result's memory; after two calls outside of it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = call()
    return graph, result


def run_python(script: str, **environment: str) -> list[str]:
    """The lines that a new process prints; `cases` and this package as here."""
    path = os.pathsep.join([os.path.dirname(cases.__file__), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path, "FASTMTL_BACKEND": "cuda", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout.splitlines()


def driver_version() -> int:
    """The newest CUDA that the driver knows, 12030 for 12.3."""
    version = ctypes.c_int()
    assert ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) == 0
    return version.value


def never_early(driver: int, capability: tuple[int, int], architectures: Sequence[int]) -> str | None:
    """Why no launch is early, as `launches_early` of `csrc/cuda/runtime.cu` decides; None if it does.

    Args:
        driver: the newest CUDA that the driver knows, 12030 for 12.3.
        capability: of the device.
        architectures: that the kernels were compiled for, 90 for sm_90.
    """
    if driver < 12_030:
        return f"a graph has no early launches with a driver before 12.3, got {driver // 1000}.{driver % 1000 // 10}"
    major, minor = capability
    served = [arch for arch in architectures if arch <= 10 * major + minor]
    if not served or max(served) < 90:
        return f"code for sm_90 launches early: the device has sm_{major}{minor}, the build has {sorted(architectures)}"
    return None
