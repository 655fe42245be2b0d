"""`task_lora` on the CPU: torch multiplies the whole batch with W, and one pass over the rows adds the deltas.

The pass is `csrc/cpu/task_weights/task_lora.cpp`: some rows of one task at a time go through both factors where they
lie, and what comes out is added where W has left its result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtl.core.schemas import define_kernel
from fastmtl.core.task_weights import LoraGradients, LowRankDeltas, SortedBatch, TaskLoraCall
from fastmtl.ops.task_weights.cpu.memory import HUGE_BYTES, fresh_rows
from fastmtl.ops.task_weights.precision import widen

_DELTAS = "Tensor[] A, Tensor[] B, int[] tasks, float[] scaling"
_kernel = define_kernel(
    f"_task_lora(Tensor x, {_DELTAS}, Tensor? bias, Tensor order, Tensor offsets, Tensor(a!) y) -> ()"
)
# whether the arguments of the op are what it asks for; it says what is wrong
fits = define_kernel(
    "_task_lora_fits(Tensor x, Tensor? weight, Tensor[] A, Tensor[] B, int[] tasks, int num_tasks, Tensor? scaling, "
    "Tensor? bias, Tensor ids, Tensor order, Tensor offsets) -> bool"
)
_backward_kernel = define_kernel(
    f"_task_lora_backward(Tensor grad_out, Tensor x, {_DELTAS}, Tensor order, Tensor offsets, Tensor(a!)? grad_x, "
    "Tensor(b!)[] grad_a, int[] wanted_a, Tensor(c!)[] grad_b, int[] wanted_b, Tensor(d!)? grad_scaling, "
    "Tensor(e!)? grad_bias) -> ()"
)


def _samples(x: Tensor, count: int) -> Tensor:
    """`[N, ..., C]` as `[count, rows, C]`; a copy only where its rows are not dense or lie apart within a sample."""
    columns = x.shape[-1]
    x = x.reshape(count, x.numel() // (count * columns), columns)
    return x if x.stride(2) == 1 or columns == 1 else x.contiguous()


def _rows(samples: Tensor) -> Tensor:
    """`[rows, C]`; a copy where samples lie apart that have several rows."""
    return samples.reshape(-1, samples.shape[-1])


def _spelled_out(
    deltas: LowRankDeltas, num_tasks: int
) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[int], Sequence[float]]:
    A, B, tasks, scaling = deltas
    if scaling is None:
        return A, B, tasks, []
    return A, B, tasks, [scaling] * num_tasks if isinstance(scaling, float) else scaling.tolist()


def _plan(batch: SortedBatch) -> tuple[Tensor, Tensor]:
    return batch.order.contiguous(), batch.offsets.contiguous()


def lora(x: Tensor, call: TaskLoraCall) -> Tensor:
    """`task_lora`; see there."""
    weight, deltas, batch, bias = call
    shape = *x.shape[:-1], call.shape[0]
    if 0 in shape:
        return torch.empty(shape, dtype=x.dtype, device="cpu")
    rounded = x.dtype
    x = widen(x)
    dtype = x.dtype
    shared = own = None
    if bias is not None and bias.dim() == 2:
        own = bias.to(torch.promote_types(dtype, torch.float32)).contiguous()
    elif bias is not None:
        shared = bias.to(dtype)
    samples = _samples(x, batch.order.shape[0])
    y = _product(samples, None if weight is None else weight.to(dtype), shared, shape[-1])
    if deltas.A or own is not None:
        _kernel(samples, *_spelled_out(deltas, batch.num_tasks), own, *_plan(batch), y)
    y = y.view(shape)
    return y if dtype == rounded else y.to(rounded)


def _product(samples: Tensor, weight: Tensor | None, bias: Tensor | None, columns: int) -> Tensor:
    """`x weight^T + bias`, `[N, rows, columns]`, contiguous; zeros and the bias without a weight."""
    shape, dtype = (*samples.shape[:2], columns), samples.dtype
    if weight is None:
        out = fresh_rows(shape, dtype)
        return out.zero_() if bias is None else out.copy_(bias.expand(shape))
    if shape[0] * shape[1] * columns * dtype.itemsize < HUGE_BYTES:
        return F.linear(samples, weight, bias).contiguous()
    out = fresh_rows(shape, dtype)
    if bias is None:
        torch.mm(_rows(samples), weight.t(), out=_rows(out))
    else:
        torch.addmm(bias, _rows(samples), weight.t(), out=_rows(out))
    return out


def _sums_of(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for the gradient of a factor, contiguous. torch is asked by example where it may be: that is quicker."""
    if factor.dtype == dtype and factor.is_contiguous():
        return torch.empty_like(factor)
    return torch.empty(factor.shape, dtype=dtype, device="cpu")


def lora_backward(
    grad_out: Tensor,
    x: Tensor,
    call: TaskLoraCall,
    wanted: Sequence[bool],
    wanted_a: Sequence[int],
    wanted_b: Sequence[int],
) -> list[Tensor]:
    """`task_lora_backward`; see there."""
    if grad_out.numel() == 0 or x.numel() == 0:
        return LoraGradients.empty(x, call, wanted, wanted_a, wanted_b).zero_()
    weight, deltas, batch, bias = call
    of_x, of_weight, of_scaling, of_bias = wanted
    rounded = x.dtype
    x, grad_out = widen(x), widen(grad_out)
    count, num_tasks, dtype = batch.order.shape[0], batch.num_tasks, x.dtype
    # in which sums are made; each is rounded once, to the dtype of its parameter
    sums = torch.promote_types(dtype, torch.float32)
    samples, back = _samples(x, count), _samples(grad_out, count)
    grad_x = grad_scaling = grad_bias = None
    if of_x:
        grad_x = _product(back, None if weight is None else weight.to(dtype).t(), None, x.shape[-1])
    grad_a, grad_b = (
        [_sums_of(held[k], sums) for k in ks] for held, ks in ((deltas.A, wanted_a), (deltas.B, wanted_b))
    )
    if of_scaling and deltas.scaling is not None:
        grad_scaling = torch.empty(num_tasks, dtype=torch.float64, device="cpu")
    if of_bias and bias is not None:
        # of each task, also where all share one
        grad_bias = torch.empty(num_tasks, back.shape[-1], dtype=sums, device="cpu")
    found = grad_x, grad_a, wanted_a, grad_b, wanted_b, grad_scaling, grad_bias
    _backward_kernel(back, samples, *_spelled_out(deltas, num_tasks), *_plan(batch), *found)
    out: list[Tensor] = []
    if grad_x is not None:
        out.append(grad_x.view(x.shape).to(rounded))
    if of_weight and weight is not None:
        out.append((_rows(back).t() @ _rows(samples)).to(weight.dtype))
    for grads, held in ((grad_a, deltas.A), (grad_b, deltas.B)):
        out += [g if g.dtype == held[0].dtype else g.to(held[0].dtype) for g in grads]
    if grad_scaling is not None:
        out.append(grad_scaling.to(deltas.scaling.dtype))
    if grad_bias is not None:
        out.append((grad_bias if bias.dim() == 2 else grad_bias.sum(0)).to(bias.dtype))
    return out
