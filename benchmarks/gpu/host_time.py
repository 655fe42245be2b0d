"""What a task layer costs the host: `python -m fastmtl.benchmarks.gpu.host_time`, on any machine, from a checkout.

The ops, their launchers and Triton's own part of a launch run as they do before a GPU. Compilation and what the driver
is asked for are stubbed out, so that no kernel runs, and tensors lie in the CPU's memory. Of CUDA C++ the launcher and
the plans of its launches run, which then do nothing: that half is compiled here, by a C++ compiler. Not counted, since
they are missing here: the driver's time, the CUDA allocator's, and the questions for stream and capture.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import ctypes
import functools
import importlib
import itertools
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import fastmtl
from fastmtl import ops
from fastmtl.benchmarks.runner.machine import describe
from fastmtl.core import dispatch
from fastmtl.core.task_weights import STILL, Geometry, SortedBatch, TaskConvCall, TaskWeights
from fastmtl.ops.task_weights import reference

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = ("triton", "cuda")
TASKS = 8
# layers of a network, so that what torch does once for a backward pass is shared
DEPTH = 4
_NUMBERS = itertools.count(10_000)


class Launched(NamedTuple):
    """What the driver's launcher would get: the build, the grid and every argument of the kernel."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]

    @classmethod
    def of(cls, kernel: Any, given: tuple[Any, ...]) -> Launched:
        """`given`: what Triton calls the launcher with: the grid, stream, function, metadata of two kinds, two hooks,
        and the arguments."""
        return cls(kernel, given[:3], given[9:])


@contextlib.contextmanager
def without_gpu(compiled: Callable[..., Any], arch: int = 90) -> Iterator[None]:
    """Inside the block Triton's kernels take tensors of the CPU; bound and specialised as for a GPU, launched by whom
    `compiled` says.

    Args:
        compiled: in the place of `triton.compiler.compile`: takes what that takes, and gives a `CompiledKernel`.
        arch: of the GPU that is not there, 90 for sm_90.
    """
    import triton.compiler
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from fastmtl.kernels.common import launches

    number = next(_NUMBERS)
    stub = SimpleNamespace(
        # of its own, under which Triton keeps these builds
        get_current_device=lambda: number,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
    )
    with (
        mock.patch.object(triton.compiler, "compile", compiled),
        mock.patch.object(dispatch, "_triton_unavailable", lambda device_type: None),
        mock.patch.object(driver, "_active", stub),
        launches.forgetting(),
        fastmtl.use_backend("triton"),
    ):
        yield


@contextlib.contextmanager
def with_conv_functions(address: int) -> Iterator[None]:
    """Inside the block the backend `cuda` takes tensors of the CPU, for `task_conv2d` and `task_linear` alone.

    address: of a `ConvFunctions` (csrc/cuda/task_weights/functions.h), which the launcher calls in the place of CUDA's.
    """
    from fastmtl.ops.task_weights import cuda

    unavailable = dispatch._compiled_unavailable

    def on_cpu(backend: str, device_type: str) -> str | None:
        return None if (backend, device_type) == ("cuda", "cpu") else unavailable(backend, device_type)

    # what a build refuses is kept by size
    cuda._declines.cache_clear()
    dispatch.extension.use_conv_functions(address)
    try:
        with mock.patch.object(dispatch, "_compiled_unavailable", on_cpu):
            yield
    finally:
        dispatch.extension.use_conv_functions(0)
        cuda._declines.cache_clear()


@contextlib.contextmanager
def stubbed(record: bool = False) -> Iterator[list[Launched]]:
    """Inside the block Triton's kernels take tensors of the CPU, are compiled to nothing and run as nothing.

    Args:
        record: whether launches are added to the list that the block gets.
    """
    import triton.compiler

    launched: list[Launched] = []

    class Nothing(triton.compiler.CompiledKernel):
        """A build without code, launched by Triton's own methods."""

        def __init__(self, src: Any, **_: Any) -> None:
            self.src, self.name, self.hash = src, src.fn.__name__, ""
            self.module = self.function = self.packed_metadata = 0
            self._run = self._launch if record else lambda *_: None

        def _launch(self, *given: Any) -> None:
            launched.append(Launched.of(self, given))

        def __del__(self) -> None:
            pass

    with without_gpu(Nothing):
        yield launched


@contextlib.contextmanager
def without_launches() -> Iterator[ctypes.CDLL]:
    """Inside the block the backend `cuda` is forced and takes tensors of the CPU, for `task_conv2d` and `task_linear`;
    its launches do nothing. The block gets what no_launches.cpp says of them."""
    library = ctypes.CDLL(str(_built_without_launches()))
    library.host_conv_functions.restype = ctypes.c_void_p
    for name in ("launches_made", "product_tile", "pieces_tile"):
        getattr(library, name).restype = ctypes.c_int64
    with with_conv_functions(library.host_conv_functions()), fastmtl.use_backend("cuda"):
        yield library


@functools.cache
def _built_without_launches() -> Path:
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise FileNotFoundError("a C++ compiler (c++, g++ or clang++), for the launcher of CUDA C++")
    host = ROOT / "tests" / "host"
    sources = [
        ROOT / "benchmarks" / "gpu" / "no_launches.cpp",
        host / "task_functions_on_host.cpp",
        ROOT / "csrc" / "cuda" / "task_weights" / "kernels_task.cu",
    ]
    library = Path(tempfile.mkdtemp(prefix="fastmtl-host-time-")) / "no_launches.so"
    atexit.register(shutil.rmtree, library.parent, ignore_errors=True)
    flags = ["-std=c++20", "-O2", "-fPIC", "-shared", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]
    command = [compiler, *flags, f"-I{ROOT / 'csrc'}", f"-I{host}", "-x", "c++", *map(str, sources)]
    subprocess.run([*command, "-o", str(library)], check=True)
    return library


class Layer(NamedTuple):
    """`DEPTH` layers of `TASKS` tasks behind each other, in bfloat16, small: their launches cost what a large one's
    cost."""

    name: str
    run: Callable[[], Tensor]
    leaves: list[Tensor]
    launchers: Callable[[str], Any]  # of a backend and one layer, forward and backward: no checks, no autograd


def layers() -> list[Layer]:
    ids = torch.arange(2 * TASKS) % TASKS
    plan = ops.TaskPlan(ids, *reference.task_plan(ids, TASKS))
    batch = SortedBatch(plan.order, plan.offsets)

    def leaf(*shape: int, channels_last: bool = False) -> Tensor:
        x = torch.randn(shape, dtype=torch.bfloat16)
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        return x.requires_grad_()

    def layer(
        name: str,
        op: str,
        x: Tensor,
        weights: list[list[Tensor]],
        gate: Tensor | None,
        geometry: Geometry,
        **moves: int,
    ) -> Layer:
        public = getattr(ops, op)
        module = importlib.import_module(f"fastmtl.ops.task_weights.{op}")  # the module, not the function

        def run() -> Tensor:
            y = x
            for weight, *deltas in weights:
                y = public(y, weight, deltas, plan, gate=gate, **moves)
            return y

        def launch(backend: str) -> None:
            weight, *deltas = weights[0]
            call = TaskConvCall(TaskWeights(weight, deltas, list(range(TASKS)), gate), batch, geometry, None)
            y = module._FORWARD[backend](x, call)
            module._BACKWARD[backend](y, x, call, [True, True, gate is not None, False], range(TASKS))

        leaves = [x, *itertools.chain(*weights), *([] if gate is None else [gate])]
        return Layer(name, run, leaves, launch)

    x, rows = leaf(2 * TASKS, 32, 4, 4, channels_last=True), leaf(2 * TASKS, 32)
    filters = [[leaf(32, 32, 3, 3, channels_last=True) for _ in range(TASKS + 1)] for _ in range(DEPTH)]
    matrices = [[leaf(32, 32) for _ in range(TASKS + 1)] for _ in range(DEPTH)]
    gate, conv = torch.rand(TASKS, requires_grad=True), Geometry((1, 1), (1, 1))
    return [
        layer("conv 3x3, a list of deltas", "task_conv2d", x, filters, None, conv, padding=1),
        layer("conv 3x3, and gates", "task_conv2d", x, filters, gate, conv, padding=1),
        layer("linear, a list of deltas", "task_linear", rows, matrices, None, STILL),
    ]


def microseconds(call: Callable[[], Any], seconds: float) -> float:
    """20th percentile of the processor's time for a call, so that what others do on this machine counts little."""
    for _ in range(20):
        call()
    found, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.thread_time_ns()
        call()
        found.append((time.thread_time_ns() - begin) / 1000)
    return statistics.quantiles(found, n=5)[0]


class Row(NamedTuple):
    """Microseconds of the host for a layer: forward and backward, autograd included, and what the launchers take of
    both."""

    name: str
    backend: str
    forward: float
    backward: float
    launchers: float
    launches: int  # in forward and backward


def measure(layer: Layer, backend: str, seconds: float) -> Row:
    stub = stubbed if backend == "triton" else without_launches
    with stub(), torch.no_grad():
        launchers = microseconds(lambda: layer.launchers(backend), seconds)
    with stub():
        grad_out = torch.empty_like(layer.run())
        forward = microseconds(layer.run, seconds)
        both = microseconds(lambda: torch.autograd.grad(layer.run(), layer.leaves, grad_out), seconds)
    each = forward / DEPTH, (both - forward) / DEPTH
    return Row(layer.name, backend, *each, launchers, count_launches(layer, backend))


def count_launches(layer: Layer, backend: str) -> int:
    """Of a layer's forward and backward."""
    with stubbed(record=True) if backend == "triton" else without_launches() as made:
        for _ in range(2):  # the first call of Triton's writes the tables of addresses
            before = len(made) if backend == "triton" else made.launches_made()
            y = layer.run()
            torch.autograd.grad(y, layer.leaves, torch.empty_like(y))
        return ((len(made) if backend == "triton" else made.launches_made()) - before) // DEPTH


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="this one alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe(torch.device("cpu"))
    print(f"{machine['device']}, torch {torch.__version__}, {TASKS} tasks; microseconds of the host, no kernel runs")
    backends = options.backend or BACKENDS
    if "cuda" in backends and not (ROOT / "csrc").is_dir():
        # an installed package has no sources to compile
        print(f"of CUDA C++ nothing is measured: {ROOT} is no checkout")
        backends = [backend for backend in backends if backend != "cuda"]
    print(f"{'layer':28}{'backend':>9}{'forward':>10}{'backward':>10}{'launchers':>11}{'launches':>10}")
    for layer in layers():
        for backend in backends:
            row = measure(layer, backend, options.seconds)
            figures = f"{row.forward:10.0f}{row.backward:10.0f}{row.launchers:11.0f}{row.launches:10}"
            print(f"{row.name:28}{row.backend:>9}{figures}")


if __name__ == "__main__":
    main()
