"""`task_conv2d_backward` on the CPU: one walk over the segments for all gradients but the bias'."""

from __future__ import annotations

import functools
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
from fastmtl.ops.task_weights.cpu.ways import Way, Ways, as_matrix, as_weight, note
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
    misread = is_misread(x, geometry, weights.shape[2:])
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
        _Walk(back, source, weights, batch, geometry, target, grads).run()
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


class _Walk:
    """One walk over the segments for dx, and for the weight gradients of the tasks that need one of their own."""

    def __init__(
        self,
        grad_out: Samples,
        source: Samples,
        weights: TaskWeights,
        batch: Batch,
        geometry: Geometry,
        grad_x: Samples | None,
        grads: Gradients,
    ) -> None:
        self.grad_out, self.source, self.grad_x, self.grads = grad_out, source, grad_x, grads
        self.batch, self.geometry, self.has_weight = batch, geometry, weights.weight is not None
        x, g = source.x, grad_out.x
        self.stage = Stage(weights, batch, x.dtype)
        matrix = source.joined and geometry.groups == 1
        self.ways = Ways(x.dtype, weights.shape, matrix, source.channels_last, geometry.stride != (1, 1))
        self.direct = Direct(x, weights, batch, geometry, g.shape[2] * g.shape[3], self.ways)
        self.weight_bytes = weights.shape.numel() * x.element_size()
        self.sample_bytes = source.sample_bytes + grad_out.sample_bytes

    def run(self) -> None:
        batch, grads, direct, stage = self.batch, self.grads, self.direct, self.stage
        alone = grads.alone
        # the samples whose weight gradient goes into dW alone
        rest = [t for t in batch.present if t not in alone] if grads.weight is not None else []
        done: set[int] = set()
        jobs: list[Job] = []
        for segment in batch.segments:
            members = [segment.task] if segment.task is not None else [t for t in batch.present if not batch.is_open(t)]
            own = segment.task is not None and segment.task in alone
            joint = segment.task is None and members == rest
            want_x = self.grad_x is not None
            want_weight = own or (joint and self.has_weight)
            few = own and direct.takes("weight_gradient", segment)
            if few:
                done.add(segment.task)
                want_weight = own = False
            few_x = want_x and direct.takes("input_gradient", segment) and not (want_weight and self._joint(segment))
            if few or few_x:
                jobs.append(Job(segment, few_x, few))
            want_x = want_x and not few_x
            if not want_x and not want_weight:
                continue
            self._segment(segment, stage.weight(segment.task) if want_x else stage.like, want_x, want_weight)
            if own:
                grads.spread(segment.task)
                done.add(segment.task)
            elif want_weight:
                grads.add_held_to_weight()
                rest = []
        for t in sorted(alone - done):
            # closed, and only its gate wants to know
            segment = Segment(t, batch.samples([t]))
            if direct.takes("weight_gradient", segment):
                jobs.append(Job(segment, False, True))
                continue
            self._segment(segment, stage.like, False, True)
            grads.spread(t)
        if rest:
            everything = len(rest) == len(batch.present)
            whole = np.arange(self.source.x.shape[0]) if everything else batch.samples(rest)
            self._segment(Segment(None, whole), stage.like, False, True)
            grads.add_held_to_weight()
        for job in jobs:
            if job.wants_x:
                note("input_gradient", "direct")
            if job.wants_weight:
                note("weight_gradient", "direct")
        if jobs:
            grads.by_direct(
                direct, jobs, self.grad_out.x, self.source.x, None if self.grad_x is None else self.grad_x.x
            )

    def _way(self, product: str, segment: Segment) -> Way:
        return self.ways.of_torch(product, len(segment.samples) * self.direct.pixels)

    def _joint(self, segment: Segment) -> bool:
        """Whether dx and dW of a segment are one call of torch's."""
        return self._way("weight_gradient", segment) == self._way("input_gradient", segment) == "convolution"

    def _segment(self, segment: Segment, weight: Tensor, want_x: bool, want_weight: bool) -> None:
        """dx of a segment into its samples; its weight gradient is held."""
        way, way_of_weight = self._way("input_gradient", segment), self._way("weight_gradient", segment)
        if want_x:
            note("input_gradient", way)
        if want_weight:
            note("weight_gradient", way_of_weight)
        by_matmul, weight_by_matmul = want_x and way == "matmul", want_weight and way_of_weight == "matmul"
        want_x, want_weight = want_x and not by_matmul, want_weight and not weight_by_matmul
        for cut in cuts(segment, self.sample_bytes, self.weight_bytes):
            g = self.grad_out.take(cut)
            x = self.source.take(cut) if want_x or want_weight or weight_by_matmul else None
            if by_matmul and self.grad_x is not None:
                self.grad_x.fill(cut, functools.partial(_product, as_matrix(g), as_weight(weight)))
            if weight_by_matmul and x is not None:
                self.grads.hold((as_matrix(g).t() @ as_matrix(x)).view(weight.shape))
            if x is None or not (want_x or want_weight):
                continue
            gx, gw = convolution_backward(g, x, weight, self.geometry, want_x, want_weight)
            if want_x and self.grad_x is not None:
                self.grad_x.put(cut, gx)
            if want_weight:
                self.grads.hold(gw)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    torch.mm(a, b, out=out)


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
