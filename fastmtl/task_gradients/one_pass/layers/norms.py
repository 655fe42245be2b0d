"""Norms with a weight and a bias: layer, RMS, group, instance and batch norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtl.core.schemas import autocast_is_on
from fastmtl.task_gradients.one_pass.autograd.norms import BatchNormByTask, GroupNormByTask, LayerNormByTask
from fastmtl.task_gradients.one_pass.layers.protocol import (
    Followed,
    Layer,
    LayerTracker,
    Unproven,
    Weight,
    first_sample_axis,
    follow_one,
    from_parameters,
    plan_of,
    sample_axis,
    weight_of,
)
from fastmtl.task_gradients.one_pass.sample_axis import CONSTANT, PerSample, SampleAxis
from fastmtl.task_gradients.one_pass.torch_call import TorchCall


def _in_float32(x: Tensor) -> Tensor:
    """Norms run in float32 under autocast."""
    kind = x.device.type
    if autocast_is_on(kind) and kind != "cpu":
        return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return x


def _same_dtype(x: Tensor, *weights: Weight) -> bool:
    return all(w.value is None or w.value.dtype == x.dtype for w in weights)


def _affine_after(
    tracker: LayerTracker, y: Tensor, axis: PerSample, w: Tensor | None, b: Tensor | None, channels: bool = False
) -> Followed:
    """`y * w + b` by broadcasting, for norms that are not taken apart in one piece; w, b along dimension 1 or last."""
    tracker.mark(y, axis)
    known: SampleAxis = axis
    for op, p in ((torch.mul, w), (torch.add, b)):
        if p is None:
            continue
        if channels:
            p, _ = follow_one(tracker, torch.Tensor.reshape, p, (-1, *(1,) * (y.dim() - 2)))
        y, known = follow_one(tracker, op, y, p)
    return y, known


def _layer_norm(tracker: LayerTracker, call: TorchCall) -> Followed:
    x, shape = call.argument(0, "input"), call.argument(1, "normalized_shape")
    w, b, eps = call.argument(2, "weight"), call.argument(3, "bias"), call.argument(4, "eps", 1e-5)
    shape = [shape] if isinstance(shape, int) else list(shape)
    axis = sample_axis(tracker, x)
    if axis.axis >= x.dim() - len(shape):
        raise Unproven("a norm over the axis of the samples")
    x = _in_float32(x)
    weight, bias = weight_of(tracker, w), weight_of(tracker, b)
    if not _same_dtype(x, weight, bias):
        return _affine_after(tracker, F.layer_norm(x, shape, None, None, eps), axis, w, b)
    y = LayerNormByTask.apply(
        x, weight.value, bias.value, *plan_of(x, axis), shape, eps, weight.form, bias.form,
        *weight.targets, *bias.targets,
    )  # fmt: skip
    return y, axis


def _rms_norm(tracker: LayerTracker, call: TorchCall) -> Followed:
    x, shape = call.argument(0, "input"), call.argument(1, "normalized_shape")
    w, eps = call.argument(2, "weight"), call.argument(3, "eps")
    axis = sample_axis(tracker, x)
    shape = [shape] if isinstance(shape, int) else list(shape)
    if axis.axis >= x.dim() - len(shape):
        raise Unproven("a norm over the axis of the samples")
    return _affine_after(tracker, torch.rms_norm(x, shape, None, eps), axis, w, None)


def _group_norm(tracker: LayerTracker, call: TorchCall) -> Followed:
    x, groups = call.argument(0, "input"), call.argument(1, "num_groups")
    w, b, eps = call.argument(2, "weight"), call.argument(3, "bias"), call.argument(4, "eps", 1e-5)
    axis = first_sample_axis(tracker, x)
    x = _in_float32(x)
    weight, bias = weight_of(tracker, w), weight_of(tracker, b)
    if not _same_dtype(x, weight, bias):
        return _affine_after(tracker, F.group_norm(x, groups, None, None, eps), axis, w, b, channels=True)
    y = GroupNormByTask.apply(
        x, weight.value, bias.value, *axis.task_ids.plan(axis.outer, axis.inner), groups, eps, weight.form, bias.form,
        *weight.targets, *bias.targets,
    )  # fmt: skip
    return y, axis


def _instance_norm(tracker: LayerTracker, call: TorchCall) -> Followed:
    x, mean, var = (call.argument(k, n) for k, n in enumerate(("input", "running_mean", "running_var")))
    w, b = call.argument(3, "weight"), call.argument(4, "bias")
    rest = [call.argument(k, n, d) for k, n, d in
            ((5, "use_input_stats", True), (6, "momentum", 0.1), (7, "eps", 1e-5))]  # fmt: skip
    axis = first_sample_axis(tracker, x)
    y = F.instance_norm(x, mean, var, None, None, *rest)
    return _affine_after(tracker, y, axis, w, b, channels=True)


def _batch_norm(tracker: LayerTracker, call: TorchCall) -> Followed:
    x, mean, var = (call.argument(k, n) for k, n in enumerate(("input", "running_mean", "running_var")))
    w, b = call.argument(3, "weight"), call.argument(4, "bias")
    training = call.argument(5, "training", False)
    momentum, eps = call.argument(6, "momentum", 0.1), call.argument(7, "eps", 1e-5)
    axis = first_sample_axis(tracker, x)
    if training:
        tracker.meet_shared_statistics()
    x = _in_float32(x)
    weight, bias = weight_of(tracker, w), weight_of(tracker, b)
    if not _same_dtype(x, weight, bias):
        y = F.batch_norm(x, mean, var, None, None, training, momentum, eps)
        return _affine_after(tracker, y, axis, w, b, channels=True)
    ids, _, _ = axis.task_ids.plan(axis.outer, axis.inner)
    y = BatchNormByTask.apply(
        x, weight.value, bias.value, ids, (mean, var), training, momentum, eps, weight.form, bias.form,
        axis.task_ids.num_rows, *weight.targets, *bias.targets,
    )  # fmt: skip
    return y, axis


def _task_batch_norm(tracker: LayerTracker, call: TorchCall) -> Followed:
    """A scale or a shift that all tasks share, behind statistics by task."""
    x, w, b, mean, var, order, offsets, eps = call.args
    axis = first_sample_axis(tracker, x)
    shared = [bool(p) and from_parameters(tracker, p[0]) for p in (w, b)]
    if any(len(p) > 1 or p[0].dim() > 1 for p, here in zip((w, b), shared, strict=True) if here):
        raise Unproven("what belongs to single tasks is in the bank")
    if shared == [True, False] and b:
        raise Unproven("a shift that is not in the bank, behind a scale that is")
    kept = [[] if here else p for p, here in zip((w, b), shared, strict=True)]
    y, *statistics = call.func(x, *kept, mean, var, order, offsets, eps)
    if not mean:
        y = tracker.meet_task_statistics(y, axis, order, offsets)
    w, b = (p[0] if here else None for p, here in zip((w, b), shared, strict=True))
    y, known = _affine_after(tracker, y, axis, w, b, channels=True)
    return (y, *statistics), [known, CONSTANT, CONSTANT]


LAYERS: dict[str, Layer] = {
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    "batch_norm": _batch_norm,
    "task_batch_norm.default": _task_batch_norm,
}
