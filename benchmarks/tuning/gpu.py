"""What `fastmtl tune` measures of a GPU: each layer by CUDA C++, by Triton and by torch's operators, in turn."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmtl.core.task_weights import STILL, Geometry, SortedBatch, TaskConvCall, TaskWeights
from fastmtl.ops.task_weights import plain, reference
from fastmtl.tuning.gpu import BACKENDS, DTYPES, KINDS, PRODUCTS, GpuTable, key
from fastmtl.tuning.table import Shape

# of the largest result: a rounding of each to its dtype, and of sums in another order
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2.0**-6}


class Sizes(NamedTuple):
    """Channels in and out of linear layers and of 3x3 filters, samples of a batch, rows of a sample, pixels of a side,
    tasks, and calls of each backend."""

    matrices: Sequence[tuple[int, int]] = ((64, 256), (256, 1024), (768, 3072), (2048, 512))
    filters: Sequence[tuple[int, int]] = ((64, 64), (128, 128), (256, 256), (512, 512))
    samples: int = 64
    rows: int = 49
    side: int = 14
    tasks: int = 8
    calls: int = 9


def graph_seconds(call: Callable[[], Any], calls: int) -> Callable[[], float]:
    """Captures a call; what is returned replays it `calls` times and says how long one took on the device."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def measure() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000 / calls

    measure.kept = kept  # type: ignore[attr-defined]  # the graph writes into it
    return measure


def calls_of(
    product: str, kind: str, dtype: torch.dtype, pair: tuple[int, int], sizes: Sizes, device: torch.device
) -> dict[str, Callable[[], list[Tensor]]]:
    """By backend, the call of its launcher, to its results."""
    linear, one_weight = kind.startswith("pixelwise"), kind.endswith("of one weight")
    tasks = 1 if one_weight else sizes.tasks
    op = importlib.import_module(f"fastmtl.ops.task_weights.task_{'linear' if linear else 'conv2d'}")
    inner, outer = pair
    shape = (outer, inner) if linear else (outer, inner, 3, 3)

    def draw(*size: int) -> Tensor:
        x = 0.1 * torch.randn(size, device=device)
        return x.to(dtype).contiguous(memory_format=torch.channels_last if len(size) == 4 else torch.contiguous_format)

    ids = torch.randint(tasks, (sizes.samples,), device=device)
    batch = SortedBatch(*reference.task_plan(ids, tasks))
    geometry = STILL if linear else Geometry(padding=(1, 1))
    lead = (sizes.samples, sizes.rows) if linear else (sizes.samples,)
    x, grad_out = (
        draw(*lead, width) if linear else draw(sizes.samples, width, sizes.side, sizes.side) for width in (inner, outer)
    )
    each = list(range(tasks))
    call = TaskConvCall(TaskWeights(draw(*shape), [draw(*shape) for _ in each], each, None), batch, geometry, None)
    out = torch.empty(tasks, *shape, dtype=dtype, device=device)
    wanted = [True, True, False, False]

    def weight_grad(backend: str) -> list[Tensor]:
        op._WEIGHT_GRAD[backend](x, grad_out, batch, geometry, out)
        return [out]

    runs: dict[str, Callable[[str], list[Tensor]]] = {
        "forward": lambda backend: [op._FORWARD[backend](x, call)],
        "backward": lambda backend: op._BACKWARD[backend](grad_out, x, call, wanted, each),
        "weight_grad": weight_grad,
    }
    declined = plain.declines(product, x, shape, one_weight, tasks, wider=False)
    asked = [backend for backend in BACKENDS if backend != "torch" or declined is None]
    return {backend: lambda backend=backend: runs[product](backend) for backend in asked}


def check(what: str, calls: dict[str, Callable[[], list[Tensor]]], dtype: torch.dtype) -> None:
    """Nothing is timed that is wrong.

    Raises:
        ValueError: the backends do not give the same.
    """
    one, *others = ([x.double() for x in call()] for call in calls.values())
    for other in others:
        for x, y in zip(one, other, strict=True):
            off, most = float((x - y).abs().max()), float(x.abs().max())
            if not off <= TOLERANCE[dtype] * most:
                raise ValueError(f"{what}: {' and '.join(calls)} differ by {off:.2g}, of results up to {most:.2g}")


def measured(
    card: str,
    device: torch.device,
    origin: dict[str, Any],
    sizes: Sizes = Sizes(),  # noqa: B008
    timer: Callable[[Callable[[], Any], int], Callable[[], float]] = graph_seconds,
    progress: Callable[[str], None] = print,
) -> GpuTable:
    """The table of a card: of each shape the backends by their medians, of calls that take turns.

    timer: of a call and how often it is to be made at a time, to a function that says how long one took.

    Raises:
        ValueError: the backends do not give the same results.
    """
    fastest: dict[str, dict[str, dict[Shape, Sequence[str]]]] = {}
    times: dict[str, Any] = {}
    for product, kind, dtype_name in _groups():
        progress(f"{product}, {kind}, {dtype_name}")
        entries = fastest.setdefault(product, {}).setdefault(key(kind, dtype_name), {})
        linear = kind.startswith("pixelwise")
        for pair in sizes.matrices if linear else sizes.filters:
            calls = calls_of(product, kind, getattr(torch, dtype_name), pair, sizes, device)
            shape = Shape(pair[0] * (1 if linear else 9), pair[1])
            check(f"{product}, {kind}, {dtype_name}, {shape}", calls, getattr(torch, dtype_name))
            timers = {backend: timer(call, sizes.calls) for backend, call in calls.items()}
            rounds = [{backend: one() for backend, one in timers.items()} for _ in range(3)]
            seconds = {backend: median(each[backend] for each in rounds) for backend in timers}
            entries[shape] = tuple(sorted(seconds, key=lambda backend: seconds[backend]))
            microseconds = {backend: round(1e6 * s, 1) for backend, s in seconds.items()}
            times[f"{product}, {kind}, {dtype_name}, {shape}"] = microseconds
    return GpuTable(card, "measured", fastest, origin, times)


def _groups() -> Iterator[tuple[str, str, str]]:
    for product in PRODUCTS:
        for kind in KINDS:
            for dtype in DTYPES:
                yield product, kind, dtype
