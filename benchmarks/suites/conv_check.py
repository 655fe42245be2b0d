"""What the results of suite `conv` are compared with: the oracle in float64, on some of the channels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastmtl.benchmarks.runner.registry import Check
from fastmtl.benchmarks.suites.conv_shapes import Batch
from fastmtl.core.task_weights import STILL, Geometry, SortedBatch, TaskConvCall, TaskWeights
from fastmtl.ops.task_weights import reference

# the oracle computes this many output channels of y, dW and dDelta, and input channels of dx; all samples and tasks
CHECKED_CHANNELS = 16


def largest(
    errors: Sequence[Tensor], dtype: torch.dtype, device: torch.device, against: str = "float64 oracle, some channels"
) -> Check:
    """The check that all errors make; torch.max hands NaN on."""
    return Check(float(torch.stack(list(errors)).max()), tolerance(dtype, device), against)


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """Relative to the scale of a result; 16-bit types round each weight and each result once."""
    if dtype == torch.float32:
        # torch's default on a GPU
        return 2e-3 if device.type == "cuda" and torch.backends.cudnn.allow_tf32 else 5e-5
    return {torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]


def error(got: Tensor | None, expected: Tensor) -> Tensor:
    """The largest error relative to the scale of the expected; a gradient that is None counts as zero."""
    if got is None:
        got = torch.zeros_like(expected)
    most, scale = (got.double() - expected).abs().max(), expected.abs().max()
    # exactly zero is expected of a closed gate's delta
    return torch.where(scale == 0, torch.where(most == 0, 0.0, torch.inf), most / scale)


def _some(count: int, device: torch.device) -> Tensor:
    return torch.arange(0, count, max(1, -(-count // CHECKED_CHANNELS)), device=device)


class Oracle:
    """float64 values of some channels of a batch's output and gradients; over all samples and tasks.

    Output channel c of y, dW and dDelta depends on row c of the weights alone, input channel c of dx on column c: so
    a few of each are exact at a fraction of the cost. A gate's gradient takes all of them.
    """

    def __init__(self, b: Batch) -> None:
        self.b, device = b, b.x.device
        layer = b.layer
        everything = torch.arange(layer.cout, device=device)
        self.outputs = everything if b.gate_grad else _some(layer.cout, device)
        self.inputs = _some(layer.cin, device)
        self.channel = -1 if layer.linear else 1
        self.geometry = STILL if layer.linear else Geometry((layer.stride,) * 2, (layer.padding,) * 2)
        self.batch = SortedBatch(b.plan.order, b.plan.offsets)

    def _call(self, rows: Tensor | None, columns: Tensor | None) -> TaskConvCall:
        b = self.b

        def part(w: Tensor) -> Tensor:
            w = w.detach() if rows is None else w.detach()[rows]
            return (w if columns is None else w[:, columns]).double()

        tasks = list(range(len(b.deltas)))
        weights = TaskWeights(part(b.weight), [part(d) for d in b.deltas], tasks, b.gate.detach().double())
        return TaskConvCall(weights, self.batch, self.geometry, None)

    def pick(self, x: Tensor, channels: Tensor) -> Tensor:
        return x.detach().index_select(self.channel % x.dim(), channels).double()

    @torch.no_grad()
    def forward(self, y: Tensor) -> list[Tensor]:
        run = reference.task_linear if self.b.layer.linear else reference.task_conv2d
        expected = run(self.b.x.detach().double(), self._call(self.outputs, None))
        return [error(self.pick(y, self.outputs), expected)]

    @torch.no_grad()
    def backward(self, grads: Sequence[Tensor | None]) -> list[Tensor]:
        b, tasks = self.b, list(range(len(self.b.deltas)))
        grad_x, grad_weight, *rest = grads
        assert grad_x is not None and grad_weight is not None
        grad_gate = rest.pop() if b.gate_grad else None
        stacked = len(rest) == 1 and rest[0] is not None and rest[0].dim() == b.weight.dim() + 1
        grad_deltas: Iterable[Tensor | None] = rest[0].unbind(0) if stacked else rest  # type: ignore[union-attr]
        run = reference.task_linear_backward if b.layer.linear else reference.task_conv2d_backward
        (dx,) = run(
            b.grad_out.double(),
            self.pick(b.x, self.inputs),
            self._call(None, self.inputs),
            [True, False, False, False],
            [],
        )
        dw, *others = run(
            self.pick(b.grad_out, self.outputs),
            b.x.detach().double(),
            self._call(self.outputs, None),
            [False, True, b.gate_grad, False],
            tasks,
        )
        errors = [error(self.pick(grad_x, self.inputs), dx), error(grad_weight[self.outputs], dw)]
        for got, expected in zip(grad_deltas, others[: len(tasks)], strict=True):
            errors.append(error(None if got is None else got[self.outputs], expected))
        if b.gate_grad:
            errors.append(error(grad_gate, others[-1]))
        return errors
