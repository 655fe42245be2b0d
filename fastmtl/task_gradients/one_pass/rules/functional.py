"""Layers and other functions of `torch.nn.functional` whose weights, if they have any, carry no gradient."""

from __future__ import annotations

from fastmtl.task_gradients.one_pass.rules.agreement import (
    computed_from_samples,
    first_axis,
    input_axis,
    only_axis,
)
from fastmtl.task_gradients.one_pass.sample_axis import CONSTANT, Axes, MixedSamples, PerSample, Unknown
from fastmtl.task_gradients.one_pass.torch_call import Rule, TorchCall
from fastmtl.task_gradients.one_pass.torch_names import BATCH_FIRST, SPATIAL


def _spatial(call: TorchCall) -> Axes:
    """They work on the last dimensions, as pools do: `SPATIAL` says on how many."""
    axis = only_axis(call)
    if isinstance(axis, PerSample) and axis.axis >= call.first().dim() - SPATIAL[call.name]:
        if call.name == "one_hot":
            return axis
        return MixedSamples(f"{call.name} works along the axis of the samples")
    return axis


def _batch_first(call: TorchCall) -> Axes:
    if call.name.endswith("_norm") and _has_weights_of_samples(call):
        return Unknown(f"{call.name} with weights that were computed from samples")
    return first_axis(call)


def _grid_sample(call: TorchCall) -> Axes:
    """Pictures `[N, C, ...]`, or one picture for all, asked at places `[N, ..., dims]`."""
    x, grid = call.argument(0, "input"), call.argument(1, "grid")
    axis = call.axis_of(grid)
    if isinstance(axis, PerSample) and not call.carries_samples(x) and 0 < axis.axis < grid.dim() - 1:
        return axis.at(axis.axis + 1)  # behind the channels
    return first_axis(call)


def _has_weights_of_samples(call: TorchCall) -> bool:
    """Whether another tensor than the input was computed from samples, and has not their number by chance."""
    return computed_from_samples(call, call.tensors()[1:])


def _channelwise(call: TorchCall) -> Axes:
    """Convolutions and prelu: behind the samples come the channels."""
    name = call.name
    if _has_weights_of_samples(call):
        return Unknown(f"{name} with weights that were computed from samples")
    if name.startswith("conv") and name[-1] == "d" and call.first().dim() == int(name[-2]) + 1:
        return MixedSamples(f"{name} of a single sample takes the axis of the samples for its channels")
    return first_axis(call)


def _layer_norm(call: TorchCall) -> Axes:
    if _has_weights_of_samples(call):
        return Unknown(f"{call.name} with weights that were computed from samples")
    axis, shape = input_axis(call), call.argument(1, "normalized_shape")
    width = 1 if isinstance(shape, int) else len(shape)
    if isinstance(axis, PerSample) and axis.axis >= call.first().dim() - width:
        return MixedSamples(f"{call.name} over the axis of the samples")
    return axis


def _batch_norm(call: TorchCall) -> Axes:
    if _has_weights_of_samples(call):
        return Unknown(f"{call.name} with weights that were computed from samples")
    axis = first_axis(call)
    if isinstance(axis, PerSample) and call.argument(5, "training", False):
        return MixedSamples(f"{call.name} in training mode takes its statistics over the whole batch")
    return axis


def _task_op(call: TorchCall) -> Axes:
    """Layers with parts of tasks: x carries the samples, whatever the layer's own plan says of their tasks."""
    x, *others = call.tensors()
    axis = call.axis_of(x)
    for p in others:
        # from outside, a tensor of as many tasks as there are samples is taken for one of samples
        if call.carries_samples(p) and p.requires_grad and not p.is_leaf:
            return Unknown(f"{call.name}, in which what belongs to tasks was computed from samples")
    if not isinstance(axis, PerSample):
        return Unknown(f"{call.name} of a tensor without samples, and samples among its other arguments")
    if axis.axis != 0:
        return Unknown(f"{call.name} takes samples along axis 0, but they lie along axis {axis.axis}")
    return axis


def _task_batch_norm(call: TorchCall) -> Axes:
    """With statistics of the batch: the tracker sees to it that they are those of one task's samples."""
    axis = _task_op(call)
    assert not isinstance(axis, list)
    return [axis, CONSTANT, CONSTANT]


def _task_plan(call: TorchCall) -> Axes:
    return CONSTANT


RULES: dict[str, Rule] = {
    **dict.fromkeys(SPATIAL, _spatial),
    **dict.fromkeys(BATCH_FIRST, _batch_first),
    **dict.fromkeys(
        ("task_conv2d.default", "task_linear.default", "task_lora.default", "task_scale_shift.default"), _task_op
    ),
    "task_batch_norm.default": _task_batch_norm,
    **dict.fromkeys(
        (
            "conv1d",
            "conv2d",
            "conv3d",
            "conv_transpose1d",
            "conv_transpose2d",
            "conv_transpose3d",
            "convolution",
            "prelu",
        ),
        _channelwise,
    ),
    **dict.fromkeys(("layer_norm", "rms_norm", "native_layer_norm"), _layer_norm),
    **dict.fromkeys(("grid_sample", "grid_sampler"), _grid_sample),
    "batch_norm": _batch_norm,
    "task_plan.default": _task_plan,
}
