"""What `fastmtl tune` measures: the CPU's own ops on layers of several sizes, each way in turn."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.core.task_weights import Geometry, SortedBatch, TaskConvCall, TaskWeights
from fastmtl.ops.task_weights.cpu.backward import conv2d_backward
from fastmtl.ops.task_weights.cpu.batch import Cut, Samples
from fastmtl.ops.task_weights.cpu.forward import conv2d
from fastmtl.ops.task_weights.precision import WIDENED
from fastmtl.tuning.search import use_table
from fastmtl.tuning.table import DTYPES, KINDS, PRODUCTS, Limits, Shape, uniform

# the ways, each by the limits under which every segment takes it
WAYS = {"direct": Limits(None, 0), "matmul": Limits(0, None), "convolution": Limits(0, 0)}
# the direct product is not tried with more rows once it took so much longer than another way at two numbers of them
HOPELESS = 1.6
# of `call_bytes`: no call costs as much as a copy
_BY_RUNS = 0


@dataclass(frozen=True)
class Layer:
    """A filter, and pictures of its input: as many rows as there are pixels of all samples of one task."""

    cin: int
    cout: int
    kernel: int
    height: int
    width: int
    samples: int

    @property
    def rows(self) -> int:
        return self.samples * self.height * self.width

    @property
    def shape(self) -> Shape:
        return Shape(self.cin * self.kernel**2, self.cout)


class Sizes(NamedTuple):
    """How much a run measures: channels of the layers by kernel, tasks of a batch, calls of each way, and seconds after
    which a layer has had enough of them."""

    matrices: Sequence[tuple[int, int]]
    rows: Sequence[int]
    channels: Sequence[int]
    pictures: Sequence[tuple[int, int, int]]  # height, width, samples of a task
    tasks: int
    rounds: int
    calls: int
    longest_s: float


# of one size each as networks have them: oneDNN takes less for one large picture than for several small ones
_PICTURES = ((2, 2, 1), (4, 4, 1), (7, 7, 1), (7, 7, 2), (7, 7, 4), (14, 14, 2), (28, 28, 1))
# more inputs than outputs, and the other way: their crossovers differ
_MATRICES = ((64, 256), (256, 256), (1024, 256), (768, 768), (512, 2048), (768, 3072), (3072, 768))
SHORT = Sizes(_MATRICES, (4, 16, 49, 98, 196, 392, 784), (64, 256, 512), _PICTURES, 4, 2, 5, 0.3)
FULL = Sizes(
    _MATRICES,
    (1, 4, 16, 49, 98, 196, 392, 784, 1568),
    (64, 128, 256, 512),
    ((1, 1, 1), *_PICTURES, (28, 28, 2)),
    4,
    2,
    5,
    0.4,
)


class Group(NamedTuple):
    """What is measured in one go, on weights of every shape."""

    product: str
    kind: str
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.product}, {self.kind}, {self.dtype_name}"


def groups() -> list[Group]:
    """Those that the ops of this machine ask for; 16-bit samples that are widened to float32 ask for float32's."""
    dtypes = [d for d in (getattr(torch, name) for name in DTYPES) if d not in WIDENED]
    return [Group(product, kind, dtype) for product in PRODUCTS for kind in KINDS for dtype in dtypes]


def layers(kind: str, sizes: Sizes) -> list[list[Layer]]:
    """By shape of the weight, those with few rows first."""
    if kind == "pixelwise":
        return [[Layer(cin, cout, 1, 1, rows, 1) for rows in sizes.rows] for cin, cout in sizes.matrices]
    return [[Layer(c, c, 3, *picture) for picture in sizes.pictures] for c in sizes.channels]


def _laid_out(x: Tensor, kind: str) -> Tensor:
    return x.contiguous(memory_format=torch.contiguous_format if kind == "contiguous" else torch.channels_last)


class Case:
    """A batch of a layer: samples of all tasks, and what is asked of it.

    `turns`: samples of the tasks come in turns, so that none has neighbours; else sorted by task.
    """

    def __init__(self, layer: Layer, kind: str, dtype: torch.dtype, tasks: int, *, turns: bool = False) -> None:
        def pictures(channels: int) -> Tensor:
            shape = (tasks * layer.samples, channels, layer.height, layer.width)
            return _laid_out(torch.randn(shape).to(dtype), kind)

        def filters() -> Tensor:
            w = torch.randn(layer.cout, layer.cin, layer.kernel, layer.kernel) * (layer.cin * layer.kernel**2) ** -0.5
            return _laid_out(w.to(dtype), kind)

        ids = torch.arange(tasks).repeat(layer.samples)
        plan = ops.task_plan(ids if turns else ids.sort().values, tasks)
        pad = layer.kernel // 2
        gate = torch.linspace(0.5, 1.5, tasks).to(dtype)
        weights = TaskWeights(filters(), [filters() for _ in range(tasks)], list(range(tasks)), gate)
        self.call = TaskConvCall(
            weights, SortedBatch(plan.order, plan.offsets), Geometry((1, 1), (pad, pad), (1, 1), 1), None
        )
        self.x, self.grad_out = pictures(layer.cin), pictures(layer.cout)
        self.every = list(range(tasks))

    def run(self, product: str) -> None:
        """The CPU's implementation of the op, for this product alone."""
        if product == "forward":
            conv2d(self.x, self.call)
        elif product == "input_gradient":
            conv2d_backward(self.grad_out, self.x, self.call, [True, False, False, False], [])
        else:
            conv2d_backward(self.grad_out, self.x, self.call, [False, True, False, False], self.every)


def in_turns(runs: dict[str, Callable[[], None]], calls: int, longest_s: float) -> dict[str, float]:
    """Median seconds of each, which take turns, after two calls that are not counted."""
    for run in runs.values():
        run()
        run()
    taken: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + longest_s
    for k in range(calls):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - begin)
        if k >= 2 and time.perf_counter() > end:
            break
    return {name: median(found) for name, found in taken.items()}


class Timed(NamedTuple):
    """Seconds of each way that was tried on one layer; for all tasks together. `shape` is that of the weight."""

    shape: Shape
    rows: int
    seconds: dict[str, float]


def measure(group: Group, sizes: Sizes) -> Iterator[Timed]:
    """Every layer of a group, once."""
    for by_rows in layers(group.kind, sizes):
        slow = 0
        for layer in by_rows:
            case = Case(layer, group.kind, group.dtype, sizes.tasks)

            def run_by(way: str, case: Case = case) -> Callable[[], None]:
                table = uniform(WAYS[way])

                def run() -> None:
                    with use_table(table):
                        case.run(group.product)

                return run

            left_out = {"direct"} if slow >= 2 else set()
            left_out |= {"matmul"} if group.kind != "pixelwise" else set()
            runs = {way: run_by(way) for way in WAYS if way not in left_out}
            seconds = in_turns(runs, sizes.calls, sizes.longest_s)
            slow += seconds.get("direct", 0.0) > HOPELESS * min(seconds.values())
            yield Timed(layer.shape, layer.rows, seconds)


def fastest(rounds: Sequence[Sequence[Timed]]) -> list[Timed]:
    """Of each layer the round in which the machine was least disturbed: that with the smallest sum, by what all of
    them tried."""
    found = []
    for same in zip(*rounds, strict=True):
        tried = set.intersection(*(set(one.seconds) for one in same))
        found.append(min(same, key=lambda one: sum(one.seconds[way] for way in tried)))
    return found


class CallCost(NamedTuple):
    """What one more call costs: bytes of a weight, and bytes that could be copied meanwhile."""

    weight_bytes: int
    bytes: float


def measure_calls(sizes: Sizes) -> Iterator[CallCost]:
    """A call for each sample of a task against one call for all of them, and the copies that such a call needs where
    they are no neighbours."""
    for channels in sizes.channels:
        layer = Layer(channels, channels, 3, 7, 7, 8)
        together, apart = (Case(layer, "channels_last", torch.float32, sizes.tasks, turns=t) for t in (False, True))
        source, target = Samples(apart.x), Samples(apart.grad_out)
        everything = Cut(0, 0, apart.call.batch.order)

        def run(case: Case, call_bytes: int) -> None:
            with use_table(uniform(WAYS["convolution"], call_bytes, 0)):
                case.run("forward")

        def copy(source: Samples = source, target: Samples = target, cut: Cut = everything) -> None:
            source.take(cut)
            target.put(cut, target.x)

        runs: dict[str, Callable[[], None]] = {
            "one call": functools.partial(run, together, _BY_RUNS),
            "a call each": functools.partial(run, apart, _BY_RUNS),
            "copy": copy,
        }
        seconds = in_turns(runs, 3 * sizes.calls, 3 * sizes.longest_s)
        samples = sizes.tasks * layer.samples
        more = max(seconds["a call each"] - seconds["one call"], 0.0) / (samples - sizes.tasks)
        # read and written, as `cuts` counts them
        copied = 2 * (apart.x.nbytes + apart.grad_out.nbytes)
        weight = apart.call.weights.like
        yield CallCost(weight.nbytes, more * copied / seconds["copy"])
