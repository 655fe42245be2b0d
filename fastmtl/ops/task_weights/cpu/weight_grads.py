"""Each task's gradient of a weight that all tasks share, on the CPU."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from fastmtl.core.dispatch import unavailable
from fastmtl.core.schemas import define_kernel
from fastmtl.core.task_weights import Geometry, SortedBatch
from fastmtl.core.tensors import memory_format
from fastmtl.ops.task_weights.cpu.batch import Samples, call_bytes
from fastmtl.ops.task_weights.precision import is_misread, widen

_convolution_weight_grads = define_kernel(
    "_convolution_weight_grads(Tensor grad_out, Tensor x, Tensor weight, Tensor order, Tensor offsets, int[] stride, "
    "int[] padding, int[] dilation, int groups, bool bias, bool channels_last, bool joined, int call_bytes) -> Tensor[]"
)
_linear_weight_grads = define_kernel(
    "_linear_weight_grads(Tensor grad_out, Tensor x, Tensor order, Tensor offsets) -> Tensor[]"
)


def weight_grad(x: Tensor, grad_out: Tensor, batch: SortedBatch, geometry: Geometry, out: Tensor) -> None:
    """`task_conv2d_weight_grad_out`; see there."""
    if not (x.numel() and grad_out.numel() and out.numel()):
        out.zero_()
        return
    for row, (grad, _) in zip(out, weight_grads(x, grad_out, batch, geometry, out[0]), strict=True):
        if grad is None:
            row.zero_()
        else:
            row.copy_(grad)


def weight_grads(
    x: Tensor,
    grad_out: Tensor,
    batch: SortedBatch,
    geometry: Geometry,
    weight: Tensor,
    bias: bool = False,
) -> list[tuple[Tensor | None, Tensor | None]]:
    """Each task's weight gradient, as oneDNN makes it, and with `bias` that of the bias; None without samples.

    One thread to a task, where there are as many tasks as threads. Of `weight` only the shape and the memory order are
    read. In the dtype of x, or float32 where x is widened.
    """
    misread = is_misread(x, geometry)
    x, grad_out = widen(x, misread), widen(grad_out, misread)
    pixelwise = geometry.pixelwise(weight.shape[2:])
    source, back = Samples(x, pixelwise=pixelwise), Samples(grad_out, like=x, pixelwise=pixelwise)
    like = torch.empty(weight.shape, dtype=x.dtype, memory_format=memory_format(weight))
    found = _convolution_weight_grads(
        back.x,
        source.x,
        like,
        *batch,
        *geometry,
        bias,
        source.channels_last,
        source.joined,
        call_bytes(like.nbytes),
    )
    present = _present(batch.offsets)
    sums = found[len(found) // 2 :] if bias else [None] * len(found)
    of_task = zip(found, sums, strict=False)
    return [next(of_task) if here else (None, None) for here in present]


def _present(offsets: Tensor) -> list[bool]:
    """Of each task whether it has samples."""
    return [begin < end for begin, end in itertools.pairwise(offsets.tolist())]


def linear_weight_grads(x: Tensor, grad_out: Tensor, order: Tensor, offsets: Tensor) -> list[Tensor | None]:
    """Each task's `[Cout, Cin]` from `[n, r, Cin]` and `[n, r, Cout]`; None for a task without samples.

    One thread to a task, where there are as many tasks as threads. In the dtype of x, or float32 where x is widened.
    """
    x, grad_out = (widen(y.detach()).contiguous() for y in (x, grad_out))
    if unavailable("cpu", "cpu") is None:
        of_task = iter(_linear_weight_grads(grad_out, x, order, offsets))
        return [next(of_task) if here else None for here in _present(offsets)]
    out: list[Tensor | None] = [None] * (offsets.shape[0] - 1)
    for t, samples in SortedBatch(order, offsets).segments():
        out[t] = grad_out[samples].flatten(0, 1).t() @ x[samples].flatten(0, 1)
    return out
