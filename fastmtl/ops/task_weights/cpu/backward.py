"""`task_conv2d_backward` on the CPU: one walk over the segments for all gradients but the bias'."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastmtl.core.task_weights import Geometry, TaskConvCall, TaskWeights
from fastmtl.ops.task_weights.cpu.batch import Batch, Samples, Segment, cuts
from fastmtl.ops.task_weights.cpu.collected import Gradients
from fastmtl.ops.task_weights.cpu.convolution import convolution_backward
from fastmtl.ops.task_weights.cpu.direct import Direct, Job
from fastmtl.ops.task_weights.cpu.memory import fresh
from fastmtl.ops.task_weights.cpu.stage import Stage
from fastmtl.ops.task_weights.precision import is_misread, widen


def conv2d_backward(
    grad_out: Tensor, x: Tensor, call: TaskConvCall, wanted: Sequence[bool], wanted_delta: Sequence[int]
) -> list[Tensor]:
    """`task_conv2d_backward`; see there."""
    weights, sorted_batch, geometry, bias = call
    want_x, want_weight = wanted[0], wanted[1] and weights.weight is not None
    want_gate, want_bias = wanted[2] and weights.gate is not None, wanted[3] and bias is not None
    batch = Batch(weights, sorted_batch)
    empty = grad_out.numel() == 0 or x.numel() == 0
    if empty:
        batch.present = []
    misread = is_misread(x, geometry)
    given, x, grad_out = x, widen(x, misread), widen(grad_out, misread)
    grads = Gradients(x, weights, batch, want_weight, wanted_delta, want_gate)
    grad_x = None
    if want_x:
        grad_x = fresh(x.shape, x)
    if not empty:
        pixelwise = geometry.pixelwise(weights.shape[2:])
        source = Samples(x, pixelwise=pixelwise)
        # dx and dW of a segment are one call: both sides in one memory order
        back = Samples(grad_out, like=x, pixelwise=pixelwise)
        target = None if grad_x is None else Samples(grad_x, like=x)
        _walk(back, source, weights, batch, geometry, target, grads)
    elif grad_x is not None:
        grad_x.zero_()
    if grad_x is not None and grad_x.dtype != given.dtype:
        grad_x = fresh(given.shape, given).copy_(grad_x)
    out = [] if grad_x is None else [grad_x]
    out += grads.collect()
    if want_bias:
        assert bias is not None
        out.append(_bias_gradient(grad_out, bias, batch))
    return out


def _walk(
    grad_out: Samples,
    source: Samples,
    weights: TaskWeights,
    batch: Batch,
    geometry: Geometry,
    grad_x: Samples | None,
    grads: Gradients,
) -> None:
    """One walk over the segments for dx, and for the weight gradients of the tasks that need one of their own."""
    x, g = source.x, grad_out.x
    stage = Stage(weights, batch, x.dtype)
    direct = Direct(x, weights, batch, geometry, g.shape[2] * g.shape[3])
    weight_bytes = weights.shape.numel() * x.element_size()
    sample_bytes = source.sample_bytes + grad_out.sample_bytes
    alone = grads.alone
    # the samples whose weight gradient goes into dW alone
    rest = [t for t in batch.present if t not in alone] if grads.weight is not None else []
    done: set[int] = set()
    jobs: list[Job] = []
    for segment in batch.segments():
        members = [segment.task] if segment.task is not None else [t for t in batch.present if not batch.is_open(t)]
        own = segment.task is not None and segment.task in alone
        joint = segment.task is None and members == rest
        want_x = grad_x is not None
        want_weight = own or (joint and weights.weight is not None)
        few = own and direct.takes_weight_gradient(segment)
        if few:
            done.add(segment.task)
            want_weight = own = False
        few_x = want_x and not want_weight and direct.takes_input_gradient(segment)
        if few or few_x:
            jobs.append(Job(segment, few_x, few))
        want_x = want_x and not few_x
        if not want_x and not want_weight:
            continue
        w = stage.weight(segment.task)
        for cut in cuts(segment, sample_bytes, weight_bytes):
            gx, gw = convolution_backward(grad_out.take(cut), source.take(cut), w, geometry, want_x, want_weight)
            if want_x and grad_x is not None:
                grad_x.put(cut, gx)
            if own:
                grads.hold(gw)
            elif want_weight:
                grads.add_to_weight(gw)
        if own:
            grads.spread(segment.task)
            done.add(segment.task)
        elif want_weight:
            rest = []
    for t in sorted(alone - done):
        # closed, and only its gate wants to know
        segment = Segment(t, batch.samples([t]))
        if direct.takes_weight_gradient(segment):
            jobs.append(Job(segment, False, True))
            continue
        for cut in cuts(segment, sample_bytes, weight_bytes):
            grads.hold(convolution_backward(grad_out.take(cut), source.take(cut), stage.like, geometry, False, True)[1])
        grads.spread(t)
    if rest:
        everything = len(rest) == len(batch.present)
        whole = np.arange(x.shape[0]) if everything else batch.samples(rest)
        for cut in cuts(Segment(None, whole), sample_bytes, weight_bytes):
            gw = convolution_backward(grad_out.take(cut), source.take(cut), stage.like, geometry, False, True)[1]
            grads.add_to_weight(gw)
    if jobs:
        grads.by_direct(direct, jobs, g, x, None if grad_x is None else grad_x.x)


def _bias_gradient(grad_out: Tensor, bias: Tensor, batch: Batch) -> Tensor:
    promoted = torch.promote_types(grad_out.dtype, torch.float32)
    if bias.dim() == 1:
        return grad_out.sum((0, 2, 3), dtype=promoted).to(bias.dtype)
    each = grad_out.sum((2, 3), dtype=promoted)
    total = torch.zeros(bias.shape, dtype=promoted)
    for t in batch.present:
        samples = batch.samples([t])
        total[t] = each[torch.from_numpy(samples)].sum(0)
    return total.to(bias.dtype)
