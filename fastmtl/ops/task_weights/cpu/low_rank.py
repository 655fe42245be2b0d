"""`task_lora` on the CPU: rows in the order of their tasks, and two thin products for each task that has a delta."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastmtl.core.task_weights import LowRankDeltas, SortedBatch, TaskLoraCall, empty_lora_gradients
from fastmtl.ops.task_weights.cpu.batch import _copy_rows
from fastmtl.ops.task_weights.cpu.memory import fresh
from fastmtl.ops.task_weights.precision import widen


class SortedRows:
    """The rows of a batch in the order of their tasks: copied together once, unless the batch has them so."""

    def __init__(self, batch: SortedBatch) -> None:
        self._order = batch.order
        self._bounds = batch.offsets.tolist()
        self.is_sorted = bool((batch.order[1:] > batch.order[:-1]).all())

    def _samples(self, x: Tensor) -> Tensor:
        """`[N, R C]`, of which only the last dimension need be without gaps."""
        width = x.numel() // max(self._order.shape[0], 1)
        return x.reshape(self._order.shape[0], width)

    def take(self, x: Tensor) -> Tensor:
        """`[N R, C]` of `[N, ..., C]`."""
        samples = self._samples(x.detach())
        if not self.is_sorted:
            samples = samples if samples.stride(1) == 1 or samples.shape[1] <= 1 else samples.contiguous()
            made = fresh(samples.shape, samples)
            _copy_rows(samples, self._order, made, None)
            samples = made
        return samples.reshape(-1, x.shape[-1])

    def put(self, rows: Tensor, target: Tensor) -> None:
        """`take`, backwards, into contiguous memory; rounds to the dtype of the target."""
        if rows.dtype != target.dtype:
            rows = rows.to(target.dtype)
        if self.is_sorted:
            target.view(rows.shape).copy_(rows)
        else:
            _copy_rows(self._samples(rows), None, self._samples(target), self._order)

    def segments(self, rows_per_sample: int) -> Iterator[tuple[int, int, int]]:
        """Each task that has rows, with the first of them and their end."""
        for t, (begin, end) in enumerate(itertools.pairwise(self._bounds)):
            if end * rows_per_sample > begin * rows_per_sample:
                yield t, begin * rows_per_sample, end * rows_per_sample


class Factors:
    """A and B of each task in the dtype of x, and its s on the host."""

    def __init__(self, deltas: LowRankDeltas, num_tasks: int, dtype: torch.dtype) -> None:
        self._pairs = deltas.by_task(num_tasks)
        self._scaling = None if deltas.scaling is None else deltas.scaling.detach().tolist()
        self._dtype = dtype

    def scale(self, task: int) -> float:
        return 1.0 if self._scaling is None else self._scaling[task]

    def exists(self, task: int) -> bool:
        return self._pairs[task] is not None

    def is_open(self, task: int) -> bool:
        """Whether the task sees its delta. A scaling that is NaN is open."""
        return self.exists(task) and self.scale(task) != 0

    def __call__(self, task: int) -> tuple[Tensor, Tensor]:
        pair = self._pairs[task]
        assert pair is not None
        a, b = (w.detach().to(self._dtype) for w in pair)
        return a, b


def lora(x: Tensor, call: TaskLoraCall) -> Tensor:
    """`task_lora`; see there."""
    weight, deltas, batch, bias = call
    y = _empty((*x.shape[:-1], call.shape[0]), x.dtype)
    if y.numel() == 0:
        return y
    rows = SortedRows(batch)
    inputs = rows.take(widen(x))
    in_place = rows.is_sorted and inputs.dtype == y.dtype
    made = y.view(-1, y.shape[-1]) if in_place else _empty((inputs.shape[0], y.shape[-1]), inputs.dtype)
    _base(inputs, weight, bias, made)
    factors = Factors(deltas, batch.num_tasks, inputs.dtype)
    for t, begin, end in rows.segments(inputs.shape[0] // batch.order.shape[0]):
        part = made[begin:end]
        if factors.is_open(t):
            a, b = factors(t)
            part.addmm_(inputs[begin:end] @ a.t(), b.t(), alpha=factors.scale(t))
        if bias is not None and bias.dim() == 2:
            part += bias[t].detach().to(part.dtype)
    if not in_place:
        rows.put(made, y)
    return y


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return fresh(shape, torch.empty(0, dtype=dtype))


def _base(inputs: Tensor, weight: Tensor | None, bias: Tensor | None, out: Tensor) -> None:
    """x W^T, and the bias if all tasks share it; zeros without a weight."""
    shared = None if bias is None or bias.dim() == 2 else bias.detach().to(inputs.dtype)
    if weight is None:
        out.copy_(shared.expand_as(out)) if shared is not None else out.zero_()
        return
    w = weight.detach().to(inputs.dtype).t()
    if shared is None:
        torch.mm(inputs, w, out=out)
    else:
        torch.addmm(shared, inputs, w, out=out)


def lora_backward(
    grad_out: Tensor,
    x: Tensor,
    call: TaskLoraCall,
    wanted: Sequence[bool],
    wanted_a: Sequence[int],
    wanted_b: Sequence[int],
) -> list[Tensor]:
    """`task_lora_backward`; see there."""
    weight, deltas, batch, bias = call
    out = empty_lora_gradients(x, call, wanted, wanted_a, wanted_b)
    if grad_out.numel() == 0 or x.numel() == 0:
        for g in out:
            g.zero_()
        return out
    left = iter(out)
    grad_x = next(left) if wanted[0] else None
    grad_weight = next(left) if wanted[1] and weight is not None else None
    grad_a, grad_b = ([next(left) for _ in positions] for positions in (wanted_a, wanted_b))
    grad_scaling = next(left) if wanted[2] and deltas.scaling is not None else None
    grad_bias = next(left) if wanted[3] and bias is not None else None

    rows = SortedRows(batch)
    grads = rows.take(widen(grad_out))
    per_sample = grads.shape[0] // batch.order.shape[0]
    with_deltas = grad_a or grad_b or grad_scaling is not None
    inputs = rows.take(widen(x)) if grad_weight is not None or with_deltas else None
    if grad_weight is not None:
        assert inputs is not None
        grad_weight.copy_(grads.t() @ inputs)
    if grad_bias is not None:
        _bias_gradient(grads, rows, per_sample, grad_bias)
    made = None
    if grad_x is not None:
        in_place = rows.is_sorted and grads.dtype == grad_x.dtype
        made = grad_x.view(-1, x.shape[-1]) if in_place else _empty((grads.shape[0], x.shape[-1]), grads.dtype)
        if weight is None:
            made.zero_()
        else:
            torch.mm(grads, weight.detach().to(grads.dtype), out=made)
    for g in (*grad_a, *grad_b, *(() if grad_scaling is None else (grad_scaling,))):
        g.zero_()
    into_a, into_b = (
        _by_task(tensors, positions, deltas) for tensors, positions in ((grad_a, wanted_a), (grad_b, wanted_b))
    )
    factors = Factors(deltas, batch.num_tasks, grads.dtype)
    for t, begin, end in rows.segments(per_sample):
        is_open = factors.is_open(t)
        if not (is_open or (grad_scaling is not None and factors.exists(t))):
            continue
        own, scale = grads[begin:end], factors.scale(t)
        a, b = factors(t)
        # of one column for each column of A
        inner = own @ b
        if made is not None and is_open:
            made[begin:end].addmm_(inner, a, alpha=scale)
        if inputs is None:
            continue
        seen = inputs[begin:end]
        if is_open and t in into_a:
            _store(inner.t() @ seen, scale, into_a[t])
        if (is_open and t in into_b) or grad_scaling is not None:
            shrunk = seen @ a.t()
            if is_open and t in into_b:
                _store(own.t() @ shrunk, scale, into_b[t])
            if grad_scaling is not None:
                promoted = torch.promote_types(inner.dtype, torch.float32)
                grad_scaling[t] = (inner.to(promoted) * shrunk.to(promoted)).sum()
    if made is not None and not in_place:
        rows.put(made, grad_x)
    return out


def _by_task(tensors: Sequence[Tensor], positions: Sequence[int], deltas: LowRankDeltas) -> dict[int, Tensor]:
    """Memory for each task's gradient."""
    if deltas.stacked:
        return dict(enumerate(tensors[0].unbind(0))) if tensors else {}
    return {deltas.tasks[k]: g for k, g in zip(positions, tensors, strict=True)}


def _store(product: Tensor, scale: float, target: Tensor) -> None:
    """Rounded to the dtype of the parameter alone, which may be wider than that of x, or narrower."""
    torch.mul(product.to(torch.promote_types(product.dtype, target.dtype)), scale, out=target)


def _bias_gradient(grads: Tensor, rows: SortedRows, per_sample: int, out: Tensor) -> None:
    promoted = torch.promote_types(grads.dtype, torch.float32)
    if out.dim() == 1:
        out.copy_(grads.sum(0, dtype=promoted))
        return
    out.zero_()
    for t, begin, end in rows.segments(per_sample):
        out[t] = grads[begin:end].sum(0, dtype=promoted)
