"""`torch.ops.fastmtl.task_batch_norm`: statistics by task, and a scale and a shift that all tasks share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl.task_gradients.one_pass.layers.norms import affine_after
from fastmtl.task_gradients.one_pass.layers.protocol import (
    Followed,
    Layer,
    LayerTracker,
    Unproven,
    first_sample_axis,
    follow_one,
    from_parameters,
)
from fastmtl.task_gradients.one_pass.sample_axis import CONSTANT, PerSample
from fastmtl.task_gradients.one_pass.torch_call import TorchCall

NAME = "task_batch_norm.default"


def run_task_norm(tracker: LayerTracker, call: TorchCall) -> tuple[Tensor, Tensor, Tensor]:
    """The op as it is, if it takes no statistics over samples of several tasks, as its ids would have it.

    On a GPU nobody can tell without waiting: its results are NaN then.
    """
    x, _, _, mean, _, order, offsets, _ = call.args
    axis = tracker.axis_of(x)
    if mean or not isinstance(axis, PerSample) or axis.axis != 0:
        return tracker.run(call.func, call.args, call.kwargs)
    mixed = _mixes(axis, order, offsets)
    if order.device.type == "cpu" and not torch.compiler.is_compiling():
        if mixed:
            tracker.meet_shared_statistics()
        return tracker.run(call.func, call.args, call.kwargs)
    if tracker.partition:
        return tracker.run(call.func, call.args, call.kwargs)
    # a batch of samples of no task is NaN
    args = [*call.args]
    args[6] = torch.where(mixed, 0, offsets)
    y, means, variances = tracker.run(call.func, args, call.kwargs)
    poison = torch.where(mixed, torch.nan, 0.0)
    return y, means + poison, variances + poison


def _mixes(axis: PerSample, order: Tensor, offsets: Tensor) -> Tensor:
    """Whether a segment of the norm's plan holds samples of two rows of the bank."""
    ids = axis.task_ids.plan(axis.outer, axis.inner)[0][order]
    segment = torch.searchsorted(offsets[1:], torch.arange(len(order), device=order.device), right=True)
    return ((ids[1:] != ids[:-1]) & (segment[1:] == segment[:-1])).any()


def _task_norm(tracker: LayerTracker, call: TorchCall) -> Followed:
    """What is normalised keeps its samples; a shared scale and shift come behind it, by broadcasting."""
    x, weight, bias, *rest = call.args
    axis = first_sample_axis(tracker, x)
    shared_weight, shared_bias = (_shared(tracker, params) for params in (weight, bias))
    if shared_weight is not None and bias and shared_bias is None:
        raise Unproven("its scale is in the bank, and its shift is not: let tasks share both, or have both by task")
    own_weight = [] if shared_weight is not None else weight
    own_bias = [] if shared_bias is not None else bias
    y, means, variances = run_task_norm(tracker, call._replace(args=[x, own_weight, own_bias, *rest]))
    y, known = affine_after(tracker, y, axis, shared_weight, shared_bias, channels=True)
    if y.dtype != x.dtype:
        y, known = follow_one(tracker, torch.Tensor.to, y, x.dtype)
    return (y, means, variances), [known, CONSTANT, CONSTANT]


def _shared(tracker: LayerTracker, params: Sequence[Tensor]) -> Tensor | None:
    """The one tensor of all tasks, if it is in the bank."""
    if not any(from_parameters(tracker, p) for p in params):
        return None
    if len(params) == 1 and params[0].dim() == 1:
        return params[0]
    raise Unproven(
        "what belongs to single tasks is in the bank: keep it out by fastmtl.mark_per_task, or in "
        "fastmtl.nn.TaskParameters"
    )


LAYERS: dict[str, Layer] = {NAME: _task_norm}
