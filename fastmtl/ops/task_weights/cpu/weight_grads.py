"""Each task's gradient of a weight that all tasks share, on the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fastmtl.core.dispatch import unavailable
from fastmtl.core.schemas import define_kernel
from fastmtl.core.task_weights import Geometry, SortedBatch
from fastmtl.core.tensors import memory_format
from fastmtl.ops.task_weights.cpu.batch import Cut, Samples, Segment, cuts
from fastmtl.ops.task_weights.cpu.convolution import convolution_backward
from fastmtl.ops.task_weights.precision import is_misread, widen

_convolution_weight_grads = define_kernel(
    "_convolution_weight_grads(Tensor[] grad_out, Tensor[] x, Tensor weight, int[] stride, int[] padding, "
    "int[] dilation, int groups, bool bias) -> Tensor[]"
)
_linear_weight_grads = define_kernel(
    "_linear_weight_grads(Tensor grad_out, Tensor x, Tensor? order, int[] bounds) -> Tensor[]"
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
) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """Each task's weight gradient, as oneDNN makes it, and with `bias` that of the bias; None without samples.

    Of `weight` only the shape and the memory order are read. In the dtype of x, or float32 where x is widened.
    """
    misread = is_misread(x, geometry)
    x, grad_out = widen(x, misread), widen(grad_out, misread)
    bounds, positions = batch.offsets.tolist(), batch.order.numpy()
    pixelwise = geometry.pixelwise(weight.shape[2:])
    source, back = Samples(x, pixelwise=pixelwise), Samples(grad_out, like=x, pixelwise=pixelwise)
    like = torch.empty(weight.shape, dtype=x.dtype, memory_format=memory_format(weight))
    promoted = torch.promote_types(x.dtype, torch.float32)
    weight_bytes, sample_bytes = like.nbytes, source.sample_bytes + back.sample_bytes
    segments = [Segment(t, positions[a:b]) for t, (a, b) in enumerate(itertools.pairwise(bounds)) if a < b]
    pieces = {segment.task: list(cuts(segment, sample_bytes, weight_bytes)) for segment in segments}
    whole = [segment for segment in segments if len(pieces[segment.task]) == 1]
    together = {}
    if len(whole) >= torch.get_num_threads() > 1:
        together = _together(whole, pieces, source, back, like, geometry, bias)
    for t in range(len(bounds) - 1):
        if t not in pieces:
            yield None, None
            continue
        if t in together:
            yield together.pop(t)
            continue
        total: Tensor | None = None
        summed: Tensor | None = None
        for cut in pieces[t]:
            part = back.take(cut)
            grad = convolution_backward(part, source.take(cut), like, geometry, False, True)[1]
            # parts of 16-bit samples are rounded once each, their sum is not
            total = grad if total is None else total.to(promoted).add_(grad)
            if bias:
                each = part.sum((0, 2, 3), dtype=promoted)
                summed = each if summed is None else summed + each
        yield total, summed


def _together(
    segments: Sequence[Segment],
    pieces: Mapping[int | None, Sequence[Cut]],
    source: Samples,
    back: Samples,
    like: Tensor,
    geometry: Geometry,
    bias: bool,
) -> dict[int | None, tuple[Tensor, Tensor | None]]:
    """Weight gradients of tasks whose samples go in one call each, one thread to a task: the longest first."""
    order = sorted(segments, key=lambda segment: -len(segment.samples))
    cut = [pieces[segment.task][0] for segment in order]
    found = _convolution_weight_grads(
        [back.take(c) for c in cut],
        [source.take(c) for c in cut],
        like,
        *map(list, geometry[:3]),
        geometry.groups,
        bias,
    )
    sums = found[len(order) :] if bias else [None] * len(order)
    return {segment.task: (grad, each) for segment, grad, each in zip(order, found, sums, strict=False)}


def linear_weight_grads(x: Tensor, grad_out: Tensor, order: Tensor, offsets: Tensor) -> list[Tensor | None]:
    """Each task's `[Cout, Cin]` from `[n, r, Cin]` and `[n, r, Cout]`; None for a task without samples.

    In the dtype of x, or float32 where x is widened.
    """
    x, grad_out = (widen(y.detach()).contiguous() for y in (x, grad_out))
    bounds = offsets.tolist()
    present = [(t, a, b) for t, (a, b) in enumerate(itertools.pairwise(bounds)) if a < b]
    is_sorted = bool((order[1:] > order[:-1]).all())
    out: list[Tensor | None] = [None] * (len(bounds) - 1)
    if unavailable("cpu", "cpu") is None and len(present) >= torch.get_num_threads():
        # the longest first: tasks are handed to whichever thread is free
        present.sort(key=lambda task: task[1] - task[2])
        cuts_of = [at for _, a, b in present for at in (a, b)]
        found = _linear_weight_grads(grad_out, x, None if is_sorted else order, cuts_of)
        for (t, _, _), grad in zip(present, found, strict=True):
            out[t] = grad
        return out
    if not is_sorted:
        x, grad_out = x.index_select(0, order), grad_out.index_select(0, order)
    for t, a, b in present:
        out[t] = grad_out[a:b].reshape(-1, grad_out.shape[2]).t() @ x[a:b].reshape(-1, x.shape[2])
    return out
