"""The product for segments with few rows, where the weights are what counts: `csrc/cpu/task_weights/task_conv.cpp`.

One call serves all of them: on small layers the way to a kernel takes longer than the kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmtl.core.schemas import define_kernel
from fastmtl.core.task_weights import Geometry, TaskWeights
from fastmtl.core.tensors import is_channels_last
from fastmtl.ops.task_weights.cpu.batch import Batch, Segment
from fastmtl.ops.task_weights.cpu.ways import Ways, in_pairs

_rows_kernel = define_kernel(
    "_task_conv2d_rows(Tensor x, Tensor? weight, Tensor[] deltas, float[] gates, Tensor? bias, int[] bias_rows, "
    "int[] samples, int[] bounds, int[] geometry, Tensor(a!) y) -> ()"
)
_rows_backward_kernel = define_kernel(
    "_task_conv2d_rows_backward(Tensor grad_out, Tensor x, Tensor? weight, Tensor[] deltas, float[] gates, "
    "int[] samples, int[] bounds, int[] geometry, Tensor(a!)? grad_x, int[] wants_x, Tensor(b!)? grad_weight, "
    "bool add, int[] wants_weight, Tensor(c!)[] grad_deltas, int[] delta_places, Tensor(d!)? grad_gate, "
    "int[] gate_places) -> ()"
)


class Job(NamedTuple):
    """What the direct product is to make of a segment: dx, and the weight gradient of its task."""

    segment: Segment
    wants_x: bool
    wants_weight: bool


class Direct:
    """The direct product for segments with few rows: one group, all weights dense in one memory order.

    It computes in float32; samples in 16 bits are widened first, once for all segments, unless the processor multiplies
    bfloat16 in pairs: such samples are read as they are, and weights are rounded to bfloat16 once.
    """

    def __init__(
        self, x: Tensor, weights: TaskWeights, batch: Batch, geometry: Geometry, pixels: int, ways: Ways
    ) -> None:
        self.pixels, self.batch, self._ways = pixels, batch, ways
        self.last = is_channels_last(weights.like)
        kernel = weights.shape[2:]
        self.geometry = [*kernel, *geometry.stride, *geometry.padding, *geometry.dilation, int(self.last)]
        self.serves = geometry.groups == 1 and x.numel() > 0 and torch.float64 not in (x.dtype, weights.like.dtype)
        self._pairs = in_pairs(x.dtype)
        # widening all samples must be little beside the weights
        pictures = x.numel() + x.shape[0] * weights.shape[0] * pixels
        self.serves = self.serves and (x.dtype == torch.float32 or self._pairs or pictures <= 2 * weights.shape.numel())
        self.weight: Tensor | None = None
        if self.serves and weights.weight is not None:
            self.weight = self.rows(weights.weight)
            self.serves = self.weight is not None
        if self.serves:
            ways.beside_others([len(segment.samples) * pixels for segment in batch.segments])
        self._deltas: dict[int, Tensor | None] = {}
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}

    def rows(self, w: Tensor) -> Tensor | None:
        """`[Cout, Cin kh kw]` in the order of memory; None if `w` is not dense in the common order."""
        w = w.detach()
        w = w.permute(0, 2, 3, 1) if self.last else w
        return w.view(w.shape[0], -1) if w.is_contiguous() else None

    def as_filter(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """Rows back as `[Cout, Cin, kh, kw]`."""
        out, channels, height, width = shape
        if self.last:
            return rows.view(out, height, width, channels).permute(0, 3, 1, 2)
        return rows.view(out, channels, height, width)

    def _delta(self, task: int) -> Tensor | None:
        if task not in self._deltas:
            delta = self.batch.deltas[task]
            assert delta is not None
            self._deltas[task] = self.rows(delta)
        return self._deltas[task]

    def takes(self, product: str, segment: Segment) -> bool:
        """Whether a product of the segment is made here: it has few enough rows, a weight at all, and that as rows."""
        if not self.serves or not self._ways.takes_direct(product, len(segment.samples) * self.pixels):
            return False
        return self.weight is not None if segment.task is None else self._delta(segment.task) is not None

    def _packed(self, segments: Sequence[Segment]) -> tuple[list[Tensor], list[float], list[int], list[int]]:
        """Deltas and gates of segments, of which those of a task come first; samples, and where each one's begin."""
        deltas, gates, samples, bounds = [], [], [], [0]
        for segment in segments:
            if segment.task is not None:
                delta = self._delta(segment.task)
                assert delta is not None and len(deltas) == len(bounds) - 1
                deltas.append(delta)
                gates.append(self.batch.gate(segment.task))
            samples += segment.samples.tolist()
            bounds.append(len(samples))
        return deltas, gates, samples, bounds

    def _as_multiplied(self, x: Tensor, copy: bool = True) -> Tensor:
        """x itself or in float32, that with its numbers if they are to be copied."""
        if x.dtype == torch.float32 or self._pairs:
            return x
        if id(x) not in self._copies:
            in_float32 = torch.empty_like(x, dtype=torch.float32, requires_grad=False)
            self._copies[id(x)] = x, in_float32.copy_(x) if copy else in_float32
        return self._copies[id(x)][1]

    def _put(self, result: Tensor, out: Tensor, segment: Segment) -> None:
        if result is not out:
            for first, end in segment.runs:
                out[first:end].copy_(result[first:end])

    def forward(self, segments: Sequence[Segment], x: Tensor, bias: Tensor | None, y: Tensor) -> None:
        """Into their samples of y. bias: of the layer; of several tasks' own, those that share a segment get none."""
        result = self._as_multiplied(y, copy=False)
        rows = [-1] * len(segments)
        if bias is not None:
            by_task = bias.dim() == 2
            rows = [0 if not by_task else -1 if s.task is None else s.task for s in segments]
            bias = (bias.detach() if by_task else bias.detach()[None]).to(torch.float32).contiguous()
        deltas, gates, samples, bounds = self._packed(segments)
        _rows_kernel(
            self._as_multiplied(x), self.weight, deltas, gates, bias, rows, samples, bounds, self.geometry, result
        )
        for segment in segments:
            self._put(result, y, segment)

    def backward(
        self,
        jobs: Sequence[Job],
        grad_out: Tensor,
        x: Tensor,
        grad_x: Tensor | None,
        weight: Tensor | None,
        add: bool,
        deltas: Mapping[int, Tensor],
        gate: Tensor | None,
    ) -> None:
        """The jobs' dx into their samples of `grad_x`; their tasks' weight gradients into `weight` (added with `add`),
        that of a task in `deltas` into what stands there, and the gates' into `gate`, those that are given."""
        jobs = sorted(jobs, key=lambda job: job.segment.task is None)
        segments = [job.segment for job in jobs]
        own, gates, samples, bounds = self._packed(segments)
        dx = None if grad_x is None else self._as_multiplied(grad_x, copy=False)
        total = None if weight is None else self.rows(weight)
        targets: list[Tensor] = []
        places: list[int] = []
        elsewhere: list[tuple[Tensor, Tensor]] = []
        for job in jobs:
            target = deltas.get(job.segment.task) if job.wants_weight and job.segment.task is not None else None
            if target is None:
                places.append(-1)
                continue
            rows = self.rows(target)
            if rows is None:
                # dDelta_t is wanted in another memory order than the weights have
                rows = torch.empty(target.shape[0], target[0].numel(), dtype=target.dtype)
                elsewhere.append((target, rows))
            places.append(len(targets))
            targets.append(rows)
        of_gates = [
            -1 if gate is None or not job.wants_weight or job.segment.task is None else job.segment.task for job in jobs
        ]
        _rows_backward_kernel(
            self._as_multiplied(grad_out), self._as_multiplied(x), self.weight, own, gates, samples, bounds,
            self.geometry, dx, [int(job.wants_x) for job in jobs], total, add, [int(job.wants_weight) for job in jobs],
            targets, places, gate, of_gates,
        )  # fmt: skip
        if grad_x is not None and dx is not None:
            for job in jobs:
                if job.wants_x:
                    self._put(dx, grad_x, job.segment)
        for target, rows in elsewhere:
            target.copy_(self.as_filter(rows, target.shape))
