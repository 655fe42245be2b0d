"""`task_lora` on the CPU: W on the whole batch, then a walk over parts of it whose rows have one task.

A part goes through both factors of its task before the next one begins, and what comes out is added where W has left
its result. Large samples are multiplied where they are; a batch of small ones is copied into the order of its tasks,
and its result back, so that a task is two products. W with each part in turn, while its rows are in cache, took longer
in every case tried: each product arranges W anew.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtl.core.task_weights import LoraGradients, LowRankDeltas, SortedBatch, TaskLoraCall
from fastmtl.ops.task_weights.cpu.batch import Segment, _copy_rows
from fastmtl.ops.task_weights.cpu.memory import fresh
from fastmtl.ops.task_weights.precision import widen

# bytes of a sample's input and output rows, up to which copies of it cost less than products of its own
SORTED_BYTES = 128 << 10
# bytes of input and output rows of a part; whatever the number of threads, as sums are added up part by part
PART_BYTES = 8 << 20
# rows that a part has at least, however long they are
FEWEST_ROWS = 64


class Part(NamedTuple):
    """Samples of one task that lie side by side, in the batch or in the copy of it that is sorted."""

    task: int
    first: int
    end: int


class Rows:
    """`[N, ..., C]` as N samples of rows; a copy only where the elements of a sample are not side by side."""

    def __init__(self, x: Tensor, count: int) -> None:
        self.columns = x.shape[-1]
        flat = x.detach().reshape(count, x.numel() // count)
        self.samples = flat if flat.stride(1) == 1 or flat.shape[1] <= 1 else flat.contiguous()
        self.per_sample = flat.shape[1] // self.columns

    @functools.cached_property
    def all(self) -> Tensor:
        """`[N * rows, C]`; a copy where samples lie apart that have several rows."""
        return self.samples.reshape(-1, self.columns)

    def of(self, part: Part) -> Tensor:
        """`[rows, C]`, a view."""
        return self.all.narrow(0, part.first * self.per_sample, (part.end - part.first) * self.per_sample)


class Factors:
    """A and B of each task in the dtype of x, and its s on the host."""

    def __init__(self, deltas: LowRankDeltas, num_tasks: int, dtype: torch.dtype) -> None:
        self._pairs = deltas.by_task(num_tasks)
        self._scaling = None if deltas.scaling is None else deltas.scaling.detach().tolist()
        self._dtype = dtype
        self._cast: tuple[int, tuple[Tensor, Tensor]] | None = None  # those of the last task

    def scale(self, task: int) -> float:
        return 1.0 if self._scaling is None else self._scaling[task]

    def exists(self, task: int) -> bool:
        return self._pairs[task] is not None

    def is_open(self, task: int) -> bool:
        """Whether the task sees its delta. A scaling that is NaN is open."""
        return self.exists(task) and self.scale(task) != 0

    def __call__(self, task: int) -> tuple[Tensor, Tensor]:
        if self._cast is None or self._cast[0] != task:
            pair = self._pairs[task]
            assert pair is not None
            a, b = pair
            if a.dtype != self._dtype:
                a, b = a.to(self._dtype), b.to(self._dtype)
            self._cast = task, (a, b)
        return self._cast[1]


class Walk:
    """The parts of a batch, and its rows in the order that they are parts of."""

    def __init__(self, batch: SortedBatch, per_sample: int, row_bytes: int) -> None:
        order, bounds = batch.order.numpy(), batch.offsets.tolist()
        in_order = bool((order[1:] > order[:-1]).all())
        self._order = None if in_order or per_sample * row_bytes > SORTED_BYTES else batch.order
        self._runs = [
            (task, first, end)
            for task, (a, b) in enumerate(itertools.pairwise(bounds))
            if a < b
            for first, end in ([(a, b)] if in_order or self._order is not None else Segment(task, order[a:b]).runs)
        ]
        self._most_samples = max(1, max(PART_BYTES // row_bytes, FEWEST_ROWS) // per_sample)

    def __iter__(self) -> Iterator[Part]:
        for task, first, end in self._runs:
            for k in range(first, end, self._most_samples):
                yield Part(task, k, min(k + self._most_samples, end))

    def rows(self, x: Tensor, count: int) -> Rows:
        found = Rows(x, count)
        if self._order is not None:
            source, found.samples = found.samples, torch.empty(found.samples.shape, dtype=x.dtype)
            _copy_rows(source, self._order, found.samples, None)
        return found

    def target(self, out: Tensor, dtype: torch.dtype) -> Tensor:
        """Memory for rows that `finish` brings into `out`: `out` itself, where they belong there as they are."""
        return out if out.dtype == dtype and self._order is None else _empty(out.shape, dtype)

    def finish(self, made: Tensor, out: Tensor) -> Tensor:
        if self._order is not None:
            back = out if out.dtype == made.dtype else _empty(out.shape, made.dtype)
            count = self._order.shape[0]
            _copy_rows(made.view(count, -1), None, back.view(count, -1), self._order)
            made = back
        return out if made is out else out.copy_(made)


def lora(x: Tensor, call: TaskLoraCall) -> Tensor:
    """`task_lora`; see there."""
    weight, deltas, batch, bias = call
    y = _empty((*x.shape[:-1], call.shape[0]), x.dtype)
    if y.numel() == 0:
        return y
    count = batch.order.shape[0]
    x = widen(x)
    dtype, per_sample = x.dtype, y.numel() // (count * y.shape[-1])
    walk = Walk(batch, per_sample, (x.shape[-1] + y.shape[-1]) * dtype.itemsize)
    source, made = walk.rows(x, count), walk.target(y, dtype)
    target = Rows(made, count)
    shared = None if bias is None or bias.dim() == 2 else bias.detach().to(dtype)
    weight = None if weight is None else weight.detach().to(dtype).t()
    _base(source.all, weight, shared, target.all)
    factors = Factors(deltas, batch.num_tasks, dtype)
    for part in walk:
        if factors.is_open(part.task):
            a, b = factors(part.task)
            target.of(part).addmm_(F.linear(source.of(part), a), b.t(), alpha=factors.scale(part.task))
        if bias is not None and bias.dim() == 2:
            target.of(part).add_(bias[part.task].detach().to(dtype))
    return walk.finish(made, y)


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return fresh(shape, torch.empty(0, dtype=dtype))


def _base(inputs: Tensor, weight: Tensor | None, bias: Tensor | None, out: Tensor) -> None:
    """`inputs weight + bias`; zeros and the bias without a weight."""
    if weight is None:
        out.copy_(bias.expand_as(out)) if bias is not None else out.zero_()
    elif bias is None:
        torch.mm(inputs, weight, out=out)
    else:
        torch.addmm(bias, inputs, weight, out=out)


def lora_backward(
    grad_out: Tensor,
    x: Tensor,
    call: TaskLoraCall,
    wanted: Sequence[bool],
    wanted_a: Sequence[int],
    wanted_b: Sequence[int],
) -> list[Tensor]:
    """`task_lora_backward`; see there."""
    weight, deltas, batch, _ = call
    out = LoraGradients.empty(x, call, wanted, wanted_a, wanted_b)
    if grad_out.numel() == 0 or x.numel() == 0:
        return out.zero_()
    grad_x, grad_weight, grad_a, grad_b, grad_scaling, grad_bias = out

    count = batch.order.shape[0]
    x, grad_out = widen(x), widen(grad_out)
    dtype, per_sample = grad_out.dtype, grad_out.numel() // (count * grad_out.shape[-1])
    walk = Walk(batch, per_sample, (x.shape[-1] + grad_out.shape[-1]) * dtype.itemsize)
    source, back = walk.rows(x, count), walk.rows(grad_out, count)
    if grad_weight is not None:
        grad_weight.copy_(back.all.t() @ source.all)
    factors = Factors(deltas, batch.num_tasks, dtype)
    sums = Sums(deltas, factors, (grad_a, wanted_a), (grad_b, wanted_b), grad_scaling, grad_bias)
    made, target = None, None
    if grad_x is not None:
        made = walk.target(grad_x, dtype)
        target = Rows(made, count)
        _base(back.all, None if weight is None else weight.detach().to(dtype), None, target.all)
    for part in walk:
        moved = target is not None and factors.is_open(part.task)
        if not (moved or sums.takes(part.task)):
            continue
        own = back.of(part)
        inner = None
        if factors.is_open(part.task) or sums.needs_inner(part.task):
            inner = own @ factors(part.task)[1]
        if moved:
            target.of(part).addmm_(inner, factors(part.task)[0], alpha=factors.scale(part.task))
        sums.add(part, own, inner, source)
    sums.finish()
    if made is not None:
        walk.finish(made, grad_x)
    return out.listed()


class Sums:
    """The gradients that are sums over a task's rows, added up part by part: those of A, B, s and the bias."""

    def __init__(
        self,
        deltas: LowRankDeltas,
        factors: Factors,
        of_a: tuple[Sequence[Tensor], Sequence[int]],
        of_b: tuple[Sequence[Tensor], Sequence[int]],
        scaling: Tensor | None,
        bias: Tensor | None,
    ) -> None:
        self._factors = factors
        self._a, self._b = (_by_task(*of, deltas) for of in (of_a, of_b))
        self._scaling, self._bias = scaling, bias
        for g in (*of_a[0], *of_b[0], scaling, bias):
            if g is not None:
                g.zero_()
        self._task: int | None = None
        self._held: dict[str, Tensor] = {}  # of the task that is on
        self._all_rows: Tensor | None = None  # of a bias that all tasks share

    def needs_inner(self, task: int) -> bool:
        """Whether anything here is made of dY B_t."""
        return self._wants(self._a, task) or (self._scaling is not None and self._factors.exists(task))

    def takes(self, task: int) -> bool:
        return self.needs_inner(task) or self._wants(self._b, task) or self._bias is not None

    def _wants(self, grads: dict[int, Tensor], task: int) -> bool:
        return task in grads and self._factors.is_open(task)

    def add(self, part: Part, own: Tensor, inner: Tensor | None, source: Rows) -> None:
        """`own`: the rows of dY; `inner`: their product with B_t, if `needs_inner`."""
        if part.task != self._task:
            self._spread()
            self._task = part.task
        promoted = torch.promote_types(own.dtype, torch.float32)
        if self._bias is not None:
            self._hold("bias", own.sum(0, dtype=promoted))
        of_a, of_b = (self._wants(grads, part.task) for grads in (self._a, self._b))
        of_scaling = self._scaling is not None and self._factors.exists(part.task)
        if not (of_a or of_b or of_scaling):
            return
        seen = source.of(part)
        if of_a:
            self._hold("A", inner.t() @ seen)
        if of_b or of_scaling:
            shrunk = F.linear(seen, self._factors(part.task)[0])
            if of_b:
                self._hold("B", own.t() @ shrunk)
            if of_scaling:
                self._hold("scaling", (inner.to(promoted) * shrunk.to(promoted)).sum())

    def _hold(self, name: str, part: Tensor) -> None:
        before = self._held.get(name)
        # parts of 16-bit rows are rounded once each, their sum is not
        self._held[name] = part if before is None else before.to(torch.promote_types(part.dtype, torch.float32)) + part

    def _spread(self) -> None:
        task, held, self._held = self._task, self._held, {}
        for name, grads in (("A", self._a), ("B", self._b)):
            if name in held:
                # rounded to the dtype of the parameter alone, which may be wider than that of x, or narrower
                product, target = held[name], grads[task]
                product = product.to(torch.promote_types(product.dtype, target.dtype))
                torch.mul(product, self._factors.scale(task), out=target)
        if "scaling" in held:
            self._scaling[task] = held["scaling"]
        if "bias" in held:
            if self._bias.dim() == 2:
                self._bias[task] = held["bias"]
            else:
                self._all_rows = held["bias"] if self._all_rows is None else self._all_rows + held["bias"]

    def finish(self) -> None:
        self._spread()
        if self._all_rows is not None:
            self._bias.copy_(self._all_rows)


def _by_task(tensors: Sequence[Tensor], positions: Sequence[int], deltas: LowRankDeltas) -> dict[int, Tensor]:
    """Memory for each task's gradient."""
    if deltas.stacked:
        return dict(enumerate(tensors[0].unbind(0))) if tensors else {}
    return {deltas.tasks[k]: g for k, g in zip(positions, tensors, strict=True)}
