"""`task_conv2d` on the CPU: a walk over the segments of the batch."""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtl.core.task_weights import TaskConvCall
from fastmtl.ops.task_weights.cpu.batch import Batch, Samples, Segment, cuts
from fastmtl.ops.task_weights.cpu.direct import Direct
from fastmtl.ops.task_weights.cpu.memory import fresh
from fastmtl.ops.task_weights.cpu.stage import Stage
from fastmtl.ops.task_weights.cpu.ways import Ways, as_matrix, as_weight, note
from fastmtl.ops.task_weights.precision import is_misread, widen


def conv2d(x: Tensor, call: TaskConvCall) -> Tensor:
    """`task_conv2d`; see there."""
    weights, sorted_batch, geometry, bias = call
    shape = weights.shape
    size = (x.shape[0], shape[0], *geometry.output_size(x.shape[2:], shape[2:]))
    y = fresh(size, x)
    if y.numel() == 0:
        return y
    # pictures narrower than the stride make oneDNN's convolution of bfloat16 crash
    result, x = y, widen(x, is_misread(x, geometry, shape[2:]))
    if x.dtype != y.dtype:
        y = fresh(size, x)
    batch = Batch(weights, sorted_batch)
    stage = Stage(weights, batch, x.dtype)
    source, target = Samples(x, pixelwise=geometry.pixelwise(shape[2:])), Samples(y, like=x)
    ways = Ways(x.dtype, shape, source.joined and geometry.groups == 1, source.channels_last, geometry.stride != (1, 1))
    direct = Direct(x, weights, batch, geometry, size[2] * size[3], ways)
    shared_bias = None if bias is None or bias.dim() == 2 else bias.detach().to(x.dtype)
    weight_bytes = shape.numel() * x.element_size()
    few: list[Segment] = []
    many: list[Segment] = []
    for segment in batch.segments:
        (few if direct.takes("forward", segment) else many).append(segment)
    if few:
        for _ in few:
            note("forward", "direct")
        direct.forward(few, source.x, bias, y)
        if bias is not None and bias.dim() == 2 and few[-1].task is None:
            _add_bias(y, bias.detach(), batch, few[-1])
    for segment in many:
        own_bias = shared_bias
        if bias is not None and bias.dim() == 2 and segment.task is not None:
            own_bias = bias[segment.task].detach().to(x.dtype)
        w = stage.weight(segment.task)
        way = ways.of_torch("forward", len(segment.samples) * direct.pixels)
        note("forward", way)
        for cut in cuts(segment, source.sample_bytes + target.sample_bytes, weight_bytes):
            if way == "matmul":
                target.fill(cut, functools.partial(_product, as_matrix(source.take(cut)), as_weight(w), own_bias))
            else:
                target.put(cut, F.conv2d(source.take(cut), w, own_bias, *geometry))
        if bias is not None and bias.dim() == 2 and segment.task is None:
            _add_bias(y, bias.detach(), batch, segment)
    return result if y is result else result.copy_(y)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """`x weight^T + bias` of rows."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def _add_bias(y: Tensor, bias: Tensor, batch: Batch, segment: Segment) -> None:
    """To the samples of the segment of all tasks that see W itself, each its own: `[T, Cout]`."""
    members = [t for t in batch.present if not batch.is_open(t)]
    bias = bias.to(y.dtype)
    if len(members) == batch.num_tasks or segment.num_runs > len(members):
        samples = torch.from_numpy(np.concatenate([batch.samples([t]) for t in members]))
        counts = torch.tensor([len(batch.samples([t])) for t in members])
        rows = bias.index_select(0, torch.tensor(members).repeat_interleave(counts))
        y.index_add_(0, samples, rows[:, :, None, None].expand(-1, -1, *y.shape[2:]))
        return
    for t in members:
        row = bias[t][:, None, None]
        for first, end in Segment(t, batch.samples([t])).runs:
            y[first:end] += row
