"""The product for segments with few rows, where the weights are what counts: `csrc/cpu/task_weights/task_conv.cpp`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl.core.schemas import define_kernel
from fastmtl.core.task_weights import Geometry, TaskWeights
from fastmtl.core.tensors import is_channels_last
from fastmtl.ops.task_weights.cpu.batch import Batch, Segment

_rows_kernel = define_kernel(
    "_task_conv2d_rows(Tensor x, Tensor? weight, Tensor? delta, float gate, Tensor? bias, int[] samples, "
    "int[] geometry, Tensor(a!) y) -> ()"
)
_rows_backward_kernel = define_kernel(
    "_task_conv2d_rows_backward(Tensor grad_out, Tensor x, Tensor? weight, Tensor? delta, float gate, int[] samples, "
    "int[] geometry, Tensor(a!)? grad_x, Tensor(b!)? grad_weight, bool add, Tensor(c!)? grad_delta, "
    "Tensor(d!)? grad_gate) -> ()"
)

# a segment of at most so many rows (output pixels) is served; docs/cpu-kernels.md has the figures
FORWARD_ROWS = 96
INPUT_GRADIENT_ROWS = 64
# the weight gradient, by whether x is channels_last: oneDNN is slow for few rows then
WEIGHT_GRADIENT_ROWS = {True: 256, False: 128}


class Direct:
    """The direct product for segments with few rows: one group, all weights dense in one memory order.

    It computes in float32; samples in 16 bits are widened first, once for all segments.
    """

    def __init__(self, x: Tensor, weights: TaskWeights, batch: Batch, geometry: Geometry, pixels: int) -> None:
        self.pixels, self.batch = pixels, batch
        self.last = is_channels_last(weights.like)
        self._weight_gradient_rows = WEIGHT_GRADIENT_ROWS[is_channels_last(x)]
        kernel = weights.shape[2:]
        self.geometry = [*kernel, *geometry.stride, *geometry.padding, *geometry.dilation, int(self.last)]
        self.serves = geometry.groups == 1 and x.numel() > 0 and torch.float64 not in (x.dtype, weights.like.dtype)
        # widening all samples must be little beside the weights
        pictures = x.numel() + x.shape[0] * weights.shape[0] * pixels
        self.serves = self.serves and (x.dtype == torch.float32 or pictures <= 2 * weights.shape.numel())
        self.weight: Tensor | None = None
        if self.serves and weights.weight is not None:
            self.weight = self.rows(weights.weight)
            self.serves = self.weight is not None
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

    def _delta(self, task: int | None) -> Tensor | None:
        if task is None:
            return None
        delta = self.batch.deltas[task]
        assert delta is not None
        return self.rows(delta)

    def _takes(self, segment: Segment, limit: int) -> bool:
        """Whether the segment has few rows, a weight at all, and that as rows."""
        if not self.serves or len(segment.samples) * self.pixels > limit:
            return False
        return self.weight is not None if segment.task is None else self._delta(segment.task) is not None

    def takes_forward(self, segment: Segment) -> bool:
        return self._takes(segment, FORWARD_ROWS)

    def takes_input_gradient(self, segment: Segment) -> bool:
        return self._takes(segment, INPUT_GRADIENT_ROWS)

    def takes_weight_gradient(self, segment: Segment) -> bool:
        return self._takes(segment, self._weight_gradient_rows)

    def _weights(self, segment: Segment) -> tuple[Tensor | None, Tensor | None, float]:
        gate = 1.0 if segment.task is None else self.batch.gate(segment.task)
        return self.weight, self._delta(segment.task), gate

    def _in_float32(self, x: Tensor, copy: bool = True) -> Tensor:
        if x.dtype == torch.float32:
            return x
        if id(x) not in self._copies:
            in_float32 = torch.empty_like(x, dtype=torch.float32, requires_grad=False)
            self._copies[id(x)] = x, in_float32.copy_(x) if copy else in_float32
        return self._copies[id(x)][1]

    def _put(self, in_float32: Tensor, out: Tensor, segment: Segment) -> None:
        if in_float32 is not out:
            for first, end in segment.runs:
                out[first:end].copy_(in_float32[first:end])

    def forward(self, segment: Segment, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
        """Into the samples of y."""
        in_float32 = self._in_float32(y, copy=False)
        bias = None if bias is None else bias.to(torch.float32).contiguous()
        samples = segment.samples.tolist()
        _rows_kernel(self._in_float32(x), *self._weights(segment), bias, samples, self.geometry, in_float32)
        self._put(in_float32, y, segment)

    def input_gradient(self, segment: Segment, grad_out: Tensor, grad_x: Tensor) -> None:
        """Into the samples of grad_x."""
        in_float32 = self._in_float32(grad_x, copy=False)
        # in the place of x, of which the kernel takes the sizes here
        sides = self._in_float32(grad_out), in_float32
        none = None, False, None, None
        samples = segment.samples.tolist()
        _rows_backward_kernel(*sides, *self._weights(segment), samples, self.geometry, in_float32, *none)
        self._put(in_float32, grad_x, segment)

    def weight_gradient(
        self,
        segment: Segment,
        grad_out: Tensor,
        x: Tensor,
        weight: Tensor | None,
        add: bool,
        delta: Tensor | None,
        gate: Tensor | None,
    ) -> None:
        """Into `weight` (added with `add`), `delta` and one element of the gate's gradient, those that are given."""
        sides = self._in_float32(grad_out), self._in_float32(x)
        samples = segment.samples.tolist()
        total = None if weight is None else self.rows(weight)
        own = None if delta is None else self.rows(delta)
        if delta is not None and own is None:
            # dDelta_t is wanted in another memory order than the weights have
            own = torch.empty(delta.shape[0], delta[0].numel(), dtype=delta.dtype)
        targets = None, total, add, own, gate
        _rows_backward_kernel(*sides, *self._weights(segment), samples, self.geometry, *targets)
        if delta is not None and own is not None and own.data_ptr() != delta.data_ptr():
            delta.copy_(self.as_filter(own, delta.shape))
