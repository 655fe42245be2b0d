"""Functions that lay the elements of one tensor out anew: views, transposes, copies of it, borders around it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl.task_gradients.one_pass.rules.agreement import first_axis, input_axis
from fastmtl.task_gradients.one_pass.rules.indexing import index_key, taken
from fastmtl.task_gradients.one_pass.sample_axis import (
    CONSTANT,
    SAMPLE_SUM,
    Axes,
    MixedSamples,
    PerSample,
    SampleSum,
    Unknown,
)
from fastmtl.task_gradients.one_pass.tensors import nested
from fastmtl.task_gradients.one_pass.torch_call import Rule, TorchCall, dims_of, sizes_of


def _view(call: TorchCall) -> Axes:
    x = call.first()
    if call.name == "view" and len(call.args) > 1 and isinstance(call.args[1], torch.dtype):
        return Unknown("view as another dtype can't be followed")
    axis = call.axis_of(x)
    if not isinstance(axis, PerSample):  # such as a constant in the shape of samples
        return axis
    return _reshaped(call.name, x.shape, axis, call.out.shape)


def _reshaped(
    name: str, before: Sequence[int], axis: PerSample, after: Sequence[int]
) -> PerSample | SampleSum | Unknown:
    """The axis after the elements of a tensor were laid out anew in the same order."""
    n = len(axis.task_ids)
    total_outer = math.prod(before[: axis.axis]) * axis.outer
    total_inner = math.prod(before[axis.axis + 1 :]) * axis.inner
    if list(after[: axis.axis + 1]) == list(before[: axis.axis + 1]):
        return axis
    if total_outer * n * total_inner == 0:
        return Unknown(f"{name} of an empty tensor can't be followed")
    if n == 1:
        return _reshaped_one(axis, after)
    # the samples are the stretch of memory order from total_inner on: one dimension must hold it whole
    inner = 1
    for dim in range(len(after) - 1, -1, -1):
        size = after[dim]
        if total_inner % inner == 0 and (inner * size) % (total_inner * n) == 0:
            here = total_inner // inner
            return PerSample(dim, axis.task_ids, size // (here * n), here)
        inner *= size
    return Unknown(f"{name} from {list(before)} to {list(after)} takes the axis of the samples apart")


def _reshaped_one(axis: PerSample, after: Sequence[int]) -> PerSample | SampleSum:
    """A batch of one sample: all elements are its own, and any dimension of size 1 may stand for it."""
    for dim in [axis.axis, *range(len(after))]:
        if dim < len(after) and after[dim] == 1:
            return PerSample(dim, axis.task_ids, 1, 1)
    if len(after) == 0:
        return SAMPLE_SUM
    return PerSample(0, axis.task_ids, 1, after[0])


def _transpose(call: TorchCall) -> Axes:
    x, axis = call.args[0], input_axis(call)
    if isinstance(axis, Unknown):
        return axis
    a, b = call.argument(1, "dim0"), call.argument(2, "dim1")
    if a is None:
        a, b = call.kwargs.get("axis0"), call.kwargs.get("axis1")
    a, b = dims_of(x, a)[0], dims_of(x, b)[0]
    return axis.at({a: b, b: a}.get(axis.axis, axis.axis))


def _t(call: TorchCall) -> Axes:
    x, axis = call.args[0], input_axis(call)
    if isinstance(axis, Unknown) or x.dim() < 2:
        return axis
    last = x.dim() - 1
    if call.name in ("mT.get", "mH.get", "adjoint", "t", "H.get"):
        return axis.at({last: last - 1, last - 1: last}.get(axis.axis, axis.axis))
    return axis.at(last - axis.axis)  # T reverses all


def _permute(call: TorchCall) -> Axes:
    x, axis = call.args[0], input_axis(call)
    if isinstance(axis, Unknown):
        return axis
    dims = sizes_of(call.args[1:]) if len(call.args) > 1 else list(call.kwargs["dims"])
    return axis.at([d % x.dim() for d in dims].index(axis.axis))


def _movedim(call: TorchCall) -> Axes:
    x, axis = call.args[0], input_axis(call)
    if isinstance(axis, Unknown):
        return axis
    source = dims_of(x, call.argument(1, "source"))
    target = dims_of(x, call.argument(2, "destination"))
    order = [d for d in range(x.dim()) if d not in source]
    for t, s in sorted(zip(target, source, strict=True)):
        order.insert(t, s)
    return axis.at(order.index(axis.axis))


def _unsqueeze(call: TorchCall) -> Axes:
    x, axis = call.args[0], input_axis(call)
    if isinstance(axis, Unknown):
        return axis
    dim = call.argument(1, "dim")
    dim = dim + x.dim() + 1 if dim < 0 else dim
    return axis.at(axis.axis + (dim <= axis.axis))


def _squeeze(call: TorchCall) -> Axes:
    x, axis = call.args[0], input_axis(call)
    if isinstance(axis, Unknown):
        return axis
    gone = [d for d in dims_of(x, call.argument(1, "dim")) if x.shape[d] == 1]
    if axis.axis in gone:
        return _reshaped_one(axis, call.out.shape) if len(axis.task_ids) == 1 else Unknown("squeeze")
    return axis.at(axis.axis - sum(d < axis.axis for d in gone))


def _expand(call: TorchCall) -> Axes:
    x, out = call.args[0], call.out
    axis = call.axis_of(x)
    if not isinstance(axis, PerSample):  # expand_as something that carries samples
        return CONSTANT
    dim = axis.axis + out.dim() - x.dim()
    if out.shape[dim] != x.shape[axis.axis]:  # one sample, several times
        return PerSample(dim, axis.task_ids, axis.outer, axis.inner * out.shape[dim])
    return axis.at(dim)


def _repeat(call: TorchCall) -> Axes:
    x, args, kwargs = call.args[0], call.args, call.kwargs
    axis = input_axis(call)
    if isinstance(axis, Unknown):
        return axis
    times = sizes_of(args[1:]) if len(args) > 1 else list(kwargs.get("repeats", kwargs.get("dims", ())))
    times = [1] * (x.dim() - len(times)) + list(times)
    dim = axis.axis + len(times) - x.dim()
    return PerSample(dim, axis.task_ids, axis.outer * times[dim], axis.inner)


def _repeat_interleave(call: TorchCall) -> Axes:
    x, times, dim = call.first(), call.argument(1, "repeats"), call.argument(2, "dim")
    axis = call.axis_of(x)
    if times is None:  # the numbers 0, 1, ..., each as often as the only argument says
        times = x
    if dim is None and x.dim() != 1 and isinstance(axis, PerSample):
        found = _reshaped(call.name, x.shape, axis, (x.numel(),))
        if not isinstance(found, PerSample):
            return found
        axis, length = found, x.numel()
    elif dim is None and x.dim() != 1:
        return Unknown("repeat_interleave of several dimensions of a constant, by samples")
    else:
        own = dims_of(x, 0 if dim is None else dim)[0]
        length = x.shape[own]
        if isinstance(axis, PerSample):
            if own != axis.axis:
                return axis
        elif isinstance(times, Tensor) and not x.requires_grad and times.shape == (length,):
            # a constant for each sample, as often as that sample says
            by = call.axis_of(times)
            if not isinstance(by, PerSample):
                return by
            axis = by.at(own)
        else:
            return Unknown("repeat_interleave of what carries no samples, as often as samples say")
    if isinstance(times, int):
        return PerSample(axis.axis, axis.task_ids, axis.outer, axis.inner * times)
    if torch.compiler.is_compiling():
        return Unknown("repeat_interleave by a tensor, in a compiled model")
    # on a GPU the call has waited for the host already, unless it was told how long its result is
    if times.numel() and (times.device.type == "cpu" or call.kwargs.get("output_size") is None):
        low, high = (int(x) for x in times.aminmax())
        if low == high > 0:
            return PerSample(axis.axis, axis.task_ids, axis.outer, axis.inner * low)
    index = torch.arange(length, device=times.device).repeat_interleave(times)
    if axis.outer == axis.inner == 1:
        return PerSample(axis.axis, axis.task_ids.take(index, ("repeated", index_key(times))))
    return taken(axis, index, axis.axis)


def _pad(call: TorchCall) -> Axes:
    x, axis = call.first(), input_axis(call)
    if isinstance(axis, Unknown):
        return axis
    widths = call.argument(1, "pad")
    last = x.dim() - len(widths) // 2
    if axis.axis >= last and any(widths[2 * (x.dim() - 1 - axis.axis) :][:2]):
        return Unknown("pad along the axis of the samples")
    return axis


def _unfold(call: TorchCall) -> Axes:
    """`Tensor.unfold(dimension, size, step)`, or `F.unfold` of pictures."""
    x, results = call.args[0], nested(call.out)
    if len(results) and isinstance(call.argument(3, "step"), int) and results[0].dim() == x.dim() + 1:
        axis = input_axis(call)
        if isinstance(axis, PerSample) and dims_of(x, call.argument(1, "dimension"))[0] == axis.axis:
            return MixedSamples("unfold along the axis of the samples")
        return axis
    return first_axis(call)


def _roll(call: TorchCall) -> Axes:
    axis, dims = input_axis(call), call.argument(2, "dims")
    if isinstance(axis, Unknown):
        return axis
    if dims is None or dims == () or axis.axis in dims_of(call.args[0], dims):
        return Unknown("roll along the axis of the samples")
    return axis


RULES: dict[str, Rule] = {
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as"), _view),
    **dict.fromkeys(("t", "T.get", "mT.get", "H.get", "mH.get", "adjoint"), _t),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    **dict.fromkeys(("repeat", "tile"), _repeat),
    "transpose": _transpose,
    "permute": _permute,
    "movedim": _movedim,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "repeat_interleave": _repeat_interleave,
    "pad": _pad,
    "unfold": _unfold,
    "roll": _roll,
}
