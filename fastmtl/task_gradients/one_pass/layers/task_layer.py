"""`torch.ops.fastmtl.task_conv2d` and `task_linear`: the weight and the bias that all tasks share."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.task_gradients.one_pass.autograd.task_layer import SharedByTask
from fastmtl.task_gradients.one_pass.layers.embeddings import looked_up
from fastmtl.task_gradients.one_pass.layers.protocol import (
    Followed,
    Layer,
    LayerTracker,
    Unproven,
    first_sample_axis,
    from_parameters,
    weight_of,
)
from fastmtl.task_gradients.one_pass.sample_axis import PerSample
from fastmtl.task_gradients.one_pass.torch_call import TorchCall


def _task_layer(tracker: LayerTracker, call: TorchCall) -> Followed:
    """The op runs as it is; only its shared weight gets rows, deltas and gates keep their own gradients."""
    x, w, delta, delta_tasks, gate, b, *rest = call.args
    axis = first_sample_axis(tracker, x)
    if any(from_parameters(tracker, p) for p in (*delta, gate) if p is not None):
        raise Unproven("what belongs to single tasks is in the bank")
    added = None
    if b is not None and b.dim() > 1 and from_parameters(tracker, b):
        added = _picked(tracker, b, axis, *rest[:2])
        b = None
    weight, bias = weight_of(tracker, w), weight_of(tracker, b)
    y = call.func(x, weight.value, delta, delta_tasks, gate, bias.value, *rest)
    plan = axis.task_ids.plan(axis.outer, axis.inner)
    y = SharedByTask.apply(
        y, x.detach(), weight.value, bias.value, *plan, tuple(rest[2:]) or None, weight.form, bias.form,
        *weight.targets, *bias.targets,
    )  # fmt: skip
    if added is not None:
        spread = (-1, added.shape[1], *(1,) * (y.dim() - 2)) if len(rest) > 2 else (len(y), *(1,) * (y.dim() - 2), -1)
        y = y + added.reshape(spread).to(y.dtype)
    return y, axis


def _picked(tracker: LayerTracker, bias: Tensor, axis: PerSample, order: Tensor, offsets: Tensor) -> Tensor:
    """Each sample's row of a bias per task that is computed from a shared one, by the plan of the layer."""
    task = torch.searchsorted(offsets[1:], torch.arange(len(order), device=order.device), right=True)
    index = torch.empty_like(order).scatter_(0, order, task)
    tracker.mark(index, axis)
    return looked_up(tracker, bias, index)[0]


LAYERS: dict[str, Layer] = {"task_conv2d.default": _task_layer, "task_linear.default": _task_layer}
