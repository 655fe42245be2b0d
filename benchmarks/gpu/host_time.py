"""What a task layer costs the host: `python -m fastmtl.benchmarks.gpu.host_time`, on any machine.

The ops, their launchers and Triton's own part of a launch run as they do before a GPU. Compilation and what the driver
is asked for are stubbed out, so that no kernel runs, and tensors lie in the CPU's memory. Not counted, since they are
missing here: the driver's time, the CUDA allocator's, and the questions for stream and capture.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
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

TASKS = 8
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


class Layer(NamedTuple):
    """A layer of `TASKS` tasks, in bfloat16, small: its launches cost what a large one's cost."""

    name: str
    run: Callable[[], Tensor]
    leaves: list[Tensor]
    launchers: Callable[[], Any]  # forward and backward without torch's part: operators, autograd


def layers() -> list[Layer]:
    ids = torch.arange(2 * TASKS) % TASKS
    plan = ops.TaskPlan(ids, *reference.task_plan(ids, TASKS))
    batch = SortedBatch(plan.order, plan.offsets)

    def leaf(*shape: int, channels_last: bool = False) -> Tensor:
        x = torch.randn(shape, dtype=torch.bfloat16)
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        return x.requires_grad_()

    x = leaf(2 * TASKS, 32, 4, 4, channels_last=True)
    filters = [leaf(32, 32, 3, 3, channels_last=True) for _ in range(TASKS + 1)]
    rows = leaf(2 * TASKS, 32)
    matrices = [leaf(32, 32) for _ in range(TASKS + 1)]
    gate = torch.rand(TASKS, requires_grad=True)

    def conv(gate: Tensor | None = None) -> Layer:
        def launch() -> None:
            from fastmtl.kernels.task_weights import conv_launchers

            weights = TaskWeights(filters[0], filters[1:], range(TASKS), gate)
            call = TaskConvCall(weights, batch, Geometry((1, 1), (1, 1)), None)
            y = conv_launchers.conv2d(x, call)
            conv_launchers.conv2d_backward(y, x, call, [True, True, gate is not None, False], range(TASKS))

        leaves = [x, *filters] if gate is None else [x, *filters, gate]
        name = "conv 3x3, a list of deltas" if gate is None else "conv 3x3, and gates"
        return Layer(
            name, lambda: ops.task_conv2d(x, filters[0], filters[1:], plan, gate=gate, padding=1), leaves, launch
        )

    def linear() -> Layer:
        def launch() -> None:
            _linear = importlib.import_module("fastmtl.ops.task_weights.task_linear")  # the module, not the function
            weights = TaskWeights(matrices[0], matrices[1:], range(TASKS), None)
            call = TaskConvCall(weights, batch, STILL, None)
            y = _linear._triton(rows, call)
            _linear._triton_backward(y, rows, call, [True, True, False, False], range(TASKS))

        run = lambda: ops.task_linear(rows, matrices[0], matrices[1:], plan)  # noqa: E731
        return Layer("linear, a list of deltas", run, [rows, *matrices], launch)

    return [conv(), conv(gate), linear()]


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
    """Microseconds of the host: the op's forward, its forward and backward, and the launchers' part of the latter."""

    name: str
    forward: float
    both: float
    launchers: float
    launches: int  # in forward and backward


def measure(layer: Layer, seconds: float) -> Row:
    with stubbed(), torch.no_grad():
        forward = microseconds(layer.run, seconds)
        launchers = microseconds(layer.launchers, seconds)
    with stubbed():
        grad_out = torch.empty_like(layer.run())
        both = microseconds(lambda: torch.autograd.grad(layer.run(), layer.leaves, grad_out), seconds)
    with stubbed(record=True) as launched:
        for _ in range(2):
            launched.clear()  # of the first call, which writes the tables of addresses
            torch.autograd.grad(layer.run(), layer.leaves, grad_out)
    return Row(layer.name, forward, both, launchers, len(launched))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe(torch.device("cpu"))
    print(f"{machine['device']}, torch {torch.__version__}, {TASKS} tasks; microseconds of the host, no kernel runs")
    print(f"{'layer':32}{'forward':>12}{'fwd + bwd':>12}{'launchers':>12}{'launches':>12}")
    for row in (measure(layer, options.seconds) for layer in layers()):
        print(f"{row.name:32}{row.forward:12.0f}{row.both:12.0f}{row.launchers:12.0f}{row.launches:12}")


if __name__ == "__main__":
    main()
