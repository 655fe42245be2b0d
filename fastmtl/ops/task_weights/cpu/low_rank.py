"""`task_lora` on the CPU: torch multiplies the whole batch with W, and one pass over the rows adds the deltas.

The pass is `csrc/cpu/task_weights/task_lora.cpp`: some rows of one task at a time go through both factors where they
lie, and what comes out is added where W has left its result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl.core.schemas import define_kernel
from fastmtl.core.task_weights import LoraGradients, LowRankDeltas, SortedBatch, TaskLoraCall
from fastmtl.ops.task_weights.cpu.memory import fresh_rows
from fastmtl.ops.task_weights.precision import widen

_DELTAS = "Tensor[] A, Tensor[] B, int[] tasks, float[] scaling"
_kernel = define_kernel(
    f"_task_lora(Tensor x, {_DELTAS}, Tensor? bias, Tensor order, Tensor offsets, Tensor(a!) y) -> ()"
)
_backward_kernel = define_kernel(
    f"_task_lora_backward(Tensor grad_out, Tensor x, {_DELTAS}, Tensor order, Tensor offsets, Tensor(a!)? grad_x, "
    "Tensor(b!)[] grad_a, int[] wanted_a, Tensor(c!)[] grad_b, int[] wanted_b, Tensor(d!)? grad_scaling, "
    "Tensor(e!)? grad_bias) -> ()"
)


def _samples(x: Tensor, count: int) -> Tensor:
    """`[N, ..., C]` as `[count, rows, C]`; a copy only where its rows are not dense or lie apart within a sample."""
    x = x.reshape(count, -1, x.shape[-1])
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _rows(samples: Tensor) -> Tensor:
    """`[rows, C]`; a copy where samples lie apart that have several rows."""
    return samples.reshape(-1, samples.shape[-1])


def _spelled_out(deltas: LowRankDeltas) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[int], list[float]]:
    return deltas.A, deltas.B, deltas.tasks, [] if deltas.scaling is None else deltas.scaling.tolist()


def _plan(batch: SortedBatch) -> tuple[Tensor, Tensor]:
    return batch.order.contiguous(), batch.offsets.contiguous()


def lora(x: Tensor, call: TaskLoraCall) -> Tensor:
    """`task_lora`; see there."""
    weight, deltas, batch, bias = call
    y = fresh_rows((*x.shape[:-1], call.shape[0]), x.dtype)
    if y.numel() == 0:
        return y
    x = widen(x)
    count, dtype = batch.order.shape[0], x.dtype
    made = y if y.dtype == dtype else fresh_rows(y.shape, dtype)
    samples, target = _samples(x, count), made.view(count, -1, y.shape[-1])
    shared = own = None
    if bias is not None and bias.dim() == 2:
        own = bias.to(torch.promote_types(dtype, torch.float32)).contiguous()
    elif bias is not None:
        shared = bias.to(dtype)
    _base(samples, None if weight is None else weight.to(dtype).t(), shared, target)
    if deltas.A or own is not None:
        _kernel(samples, *_spelled_out(deltas), own, *_plan(batch), target)
    return y if made is y else y.copy_(made)


def _base(samples: Tensor, weight: Tensor | None, bias: Tensor | None, out: Tensor) -> None:
    """`rows weight + bias`; zeros and the bias without a weight."""
    if weight is None:
        out.copy_(bias.expand_as(out)) if bias is not None else out.zero_()
    elif bias is None:
        torch.mm(_rows(samples), weight, out=_rows(out))
    else:
        torch.addmm(bias, _rows(samples), weight, out=_rows(out))


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
    out = LoraGradients.empty(x, call, wanted, wanted_a, wanted_b)
    if grad_out.numel() == 0 or x.numel() == 0:
        return out.zero_()
    x, grad_out = widen(x), widen(grad_out)
    count, dtype = batch.order.shape[0], x.dtype
    sums = torch.promote_types(dtype, torch.float32)
    samples, back = _samples(x, count), _samples(grad_out, count)
    if out.weight is not None:
        product = out.weight if out.weight.dtype == dtype else torch.empty(out.weight.shape, dtype=dtype)
        torch.mm(_rows(back).t(), _rows(samples), out=product)
        _put(product, out.weight)
    made = target = None
    if out.x is not None:
        made = out.x if out.x.dtype == dtype else fresh_rows(out.x.shape, dtype)
        target = made.view(samples.shape)
        _base(back, None if weight is None else weight.to(dtype), None, target)
    # in the dtype of the sums, and rounded to that of the parameter alone
    of_a, of_b = ([_as(g, sums) for g in grads] for grads in (out.A, out.B))
    of_scaling = None if out.scaling is None else torch.empty(batch.num_tasks, dtype=torch.float64)
    of_bias = None if out.bias is None else torch.empty(batch.num_tasks, back.shape[-1], dtype=sums)
    if deltas.A or of_bias is not None:
        spelled, plan = _spelled_out(deltas), _plan(batch)
        found = target, of_a, wanted_a, of_b, wanted_b, of_scaling, of_bias
        _backward_kernel(back, samples, *spelled, *plan, *found)
    elif of_scaling is not None:
        of_scaling.zero_()
    if made is not None:
        _put(made, out.x)
    for made_of, grads in ((of_a, out.A), (of_b, out.B)):
        for g, into in zip(made_of, grads, strict=True):
            _put(g, into)
    if of_scaling is not None:
        _put(of_scaling, out.scaling)
    if of_bias is not None:
        _put(of_bias if bias.dim() == 2 else of_bias.sum(0), out.bias)
    return out.listed()


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory of a result in another dtype: its own, if it has that dtype."""
    return x if x.dtype == dtype else torch.empty(x.shape, dtype=dtype)


def _put(made: Tensor, out: Tensor | None) -> None:
    if out is not None and made is not out:
        out.copy_(made)
