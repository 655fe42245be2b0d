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
    "int[] padding, int[] dilation, int groups, Tensor(a!)? sums, bool channels_last, bool joined, int call_bytes) "
    "-> Tensor[]"
)
_linear_weight_grads = define_kernel(
    "_linear_weight_grads(Tensor grad_out, Tensor x, Tensor order, Tensor offsets, Tensor(a!)? sums) -> Tensor[]"
)


def weight_grad(x: Tensor, grad_out: Tensor, batch: SortedBatch, geometry: Geometry, out: Tensor) -> None:
    """`task_conv2d_weight_grad_out`; see there."""
    if not (x.numel() and grad_out.numel() and out.numel()):
        out.zero_()
        return
    for row, grad in zip(out, weight_grads(x, grad_out, batch, geometry, out[0])[0], strict=True):
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
) -> tuple[list[Tensor | None], Tensor | None]:
    """Each task's weight gradient, as oneDNN makes it, None without samples; and with `bias` `[T, Cout]` sums of
    `grad_out`, in at least float32.

    One thread to a task, where there are as many tasks as threads. Of `weight` only the shape and, beside pictures in
    NCHW, the memory order are read. Weight gradients are in the dtype of x, or float32 where x is widened.
    """
    misread = is_misread(x, geometry, weight.shape[2:])
    x, grad_out = widen(x, misread), widen(grad_out, misread)
    pixelwise = geometry.pixelwise(weight.shape[2:])
    source, back = Samples(x, pixelwise=pixelwise), Samples(grad_out, like=x, pixelwise=pixelwise)
    # torch copies a weight that does not lie as the pictures do, though it reads nothing of it
    fmt = torch.channels_last if source.channels_last else memory_format(weight)
    like = torch.empty(weight.shape, dtype=x.dtype, memory_format=fmt)
    sums = _sums_of(grad_out, batch.num_tasks) if bias else None
    found = _convolution_weight_grads(
        back.x,
        source.x,
        like,
        *batch,
        *geometry,
        sums,
        source.channels_last,
        source.joined,
        call_bytes(like.nbytes),
    )
    return _by_task(found, batch.offsets), sums


def _sums_of(grad_out: Tensor, num_tasks: int) -> Tensor:
    """Memory for each task's sums over all but the channels: zeros, as tasks without samples have them."""
    channels = grad_out.shape[1 if grad_out.dim() == 4 else -1]
    return torch.zeros(num_tasks, channels, dtype=torch.promote_types(grad_out.dtype, torch.float32))


def _by_task(found: list[Tensor], offsets: Tensor) -> list[Tensor | None]:
    """Gradients of the tasks with samples, in turn, as those of all tasks."""
    of_task = iter(found)
    return [next(of_task) if begin < end else None for begin, end in itertools.pairwise(offsets.tolist())]


def linear_weight_grads(
    x: Tensor, grad_out: Tensor, order: Tensor, offsets: Tensor, bias: bool = False
) -> tuple[list[Tensor | None], Tensor | None]:
    """Each task's `[Cout, Cin]` from `[n, r, Cin]` and `[n, r, Cout]`, None without samples; and with `bias` sums of
    `grad_out`, `[T, Cout]` in at least float32.

    One thread to a task, where there are as many tasks as threads. Weight gradients are in the dtype of x, or float32
    where x is widened.
    """
    x, grad_out = (widen(y.detach()).contiguous() for y in (x, grad_out))
    sums = _sums_of(grad_out, offsets.shape[0] - 1) if bias else None
    if unavailable("cpu", "cpu") is None:
        return _by_task(_linear_weight_grads(grad_out, x, order, offsets, sums), offsets), sums
    out: list[Tensor | None] = [None] * (offsets.shape[0] - 1)
    for t, samples in SortedBatch(order, offsets).segments():
        back = grad_out[samples].flatten(0, 1)
        out[t] = back.t() @ x[samples].flatten(0, 1)
        if sums is not None:
            sums[t] = back.sum(0, dtype=sums.dtype)
    return out, sums
