"""Short ways for calls that come again at every step: what `Tracker.follow` answers, in a tenth of its time.

A short way is taken only where all that the answer depends on is the same as when it was found out, or is asked here;
else it declines, and the call is followed as any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtl.core.schemas import autocast_is_on
from fastmtl.task_gradients.one_pass.autograd.conv import ConvByTask
from fastmtl.task_gradients.one_pass.autograd.linear import LinearByTask
from fastmtl.task_gradients.one_pass.autograd.norms import GroupNormByTask, LayerNormByTask
from fastmtl.task_gradients.one_pass.autograd.rows import STACKED
from fastmtl.task_gradients.one_pass.layers.protocol import plan_of
from fastmtl.task_gradients.one_pass.sample_axis import (
    ATTRIBUTE,
    CONSTANT,
    SAMPLE_SUM,
    Axes,
    Constant,
    PerSample,
    SampleAxis,
    SampleSum,
    packed,
)
from fastmtl.task_gradients.one_pass.task_ids import TaskIds
from fastmtl.task_gradients.one_pass.torch_names import ELEMENTWISE_LOSSES, POINTWISE, name_of, writes


class ShortTracker(Protocol):
    """What a short way may ask of the tracker."""

    task_ids: TaskIds
    whole: tuple[TaskIds, ...]

    def axis_of(self, x: Tensor) -> SampleAxis:
        """What is known of a tensor."""
        ...

    def mark(self, x: Tensor, axis: SampleAxis) -> None:
        """Says what is known of a tensor that was made here."""
        ...

    def held(self, x: Tensor) -> tuple[Any, ...] | None:
        """The fields of `Held` of a parameter of the bank; of other tensors None."""
        ...

    def use(self, p: Tensor) -> None:
        """Called where a parameter meets all samples of the batch."""
        ...


# --- calls in which no parameter of the bank takes part

# whose result is known from shapes, the axes of the samples and other arguments alone, and never from values
_FROM_SHAPES = (
    (
        POINTWISE
        - frozenset(("copy", "fill", "zero", "set", "requires_grad", "data.get", "real.get", "broadcast_tensors"))
    )
    | (ELEMENTWISE_LOSSES - frozenset(("gaussian_nll_loss",)))
    | frozenset(
        """view reshape flatten unflatten transpose permute unsqueeze squeeze expand t T.get mT.get movedim pad
        sum mean softmax log_softmax matmul getitem unbind chunk split cross_entropy nll_loss
        max_pool1d avg_pool1d adaptive_avg_pool1d max_pool2d avg_pool2d adaptive_avg_pool2d max_pool3d avg_pool3d
        adaptive_avg_pool3d scaled_dot_product_attention pixel_shuffle pixel_unshuffle interpolate""".split()  # noqa: SIM905
    )
)

# of one result: `(axis, outer, inner, which of tracker.whole)` of the batch's samples, or what it is instead
_Short: TypeAlias = tuple[int, int, int, int] | SampleAxis

_kept: dict[Any, list[_Short]] = {}
_MOST = 20_000

# of a function that was met: its name, or None where what is known of its results is not kept
_names: dict[Any, str | None] = {}


def call_key(tracker: ShortTracker, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """All that the axes of the results of a call are told by; None: it is not to be kept.

    Tensors count by what is known of them, shape, dtype and whether they need a gradient; samples are those of the
    batch itself. All else counts by type and value, floats by type alone.
    """
    if func not in _names:
        name = name_of(func)
        _names[func] = None if writes(func) or name not in _FROM_SHAPES else name
    name = _names[func]
    if name is None or (name == "getitem" and not _is_plain_index(args[1])):
        return None
    key: list[Any] = [func, torch.is_grad_enabled(), tracker.task_ids.count]
    if not _add_to_key(tracker, key, args):
        return None
    if kwargs:
        if kwargs.get("inplace") or not _UNUSUAL.isdisjoint(kwargs):
            return None
        key.extend(kwargs)
        if not _add_to_key(tracker, key, kwargs.values()):
            return None
    return tuple(key)


# results in memory that was there before, and numpy's names
_UNUSUAL = frozenset(("out", "axis", "keepdims"))

_OF_INDEX = (int, slice, type(None), type(Ellipsis))
_COUNTED = (*_OF_INDEX, bool, str, torch.dtype, torch.device, torch.memory_format)


def _is_plain_index(index: Any) -> bool:
    return all(type(i) in _OF_INDEX for i in index) if type(index) is tuple else type(index) in _OF_INDEX


def _add_to_key(tracker: ShortTracker, key: list[Any], values: Iterable[Any]) -> bool:
    """Whether all values could be added."""
    task_ids = tracker.task_ids
    for x in values:
        kind = type(x)
        if kind is Tensor or isinstance(x, Tensor):
            found = getattr(x, ATTRIBUTE, None)
            if found is not None and found[0] is task_ids and (node := x.grad_fn) and found[2] == node._sequence_nr():
                which, fields = found[1]
            elif (known := _known_of(tracker, x)) is None:
                return False
            else:
                which, fields = known
            if which == 0:
                axis, ids, outer, inner = fields
                if ids not in tracker.whole:
                    return False
                key += (axis, outer, inner, ids is task_ids, x.shape, x.dtype, x.requires_grad)
            elif which == 1 and fields[0] is None and not fields[1]:
                key += (CONSTANT, x.shape, x.dtype, x.requires_grad)
            else:
                return False
        elif kind is float:
            key.append(float)
        elif kind is slice:
            if not all(type(part) in _OF_INDEX for part in (x.start, x.stop, x.step)):
                return False
            key += (slice, x.start, x.stop, x.step)
        elif kind in _COUNTED:
            key += (kind, x)
        elif kind is tuple or kind is list or kind is torch.Size:
            key += (tuple, len(x))
            if not _add_to_key(tracker, key, x):
                return False
        else:
            return False
    return True


def _known_of(tracker: ShortTracker, x: Tensor) -> tuple[int, tuple[Any, ...]] | None:
    """What is known of a tensor, as `packed` writes it; None: a parameter of the bank, or a subclass with samples."""
    found = getattr(x, ATTRIBUTE, None)
    if found is not None and found[0] is tracker.task_ids:
        node = x.grad_fn
        if found[2] == (None if node is None else node._sequence_nr()):
            return found[1]
    return None if tracker.held(x) is not None else packed(tracker.axis_of(x))


def keep(tracker: ShortTracker, key: Any, out: Any, axes: Axes) -> None:
    """Keeps what is known of the results of a call that was followed, if it holds for every batch of its size."""
    several = type(out) is tuple or type(out) is list
    if not all(type(x) is Tensor for x in (out if several else (out,))):
        return
    listed = axes if isinstance(axes, list) else [axes] * (len(out) if several else 1)
    short = [_short(tracker, axis) for axis in listed]
    if len(_kept) < _MOST and None not in short:
        _kept[key] = short


def forget() -> None:
    """Forgets every call."""
    _kept.clear()


def _short(tracker: ShortTracker, axis: SampleAxis) -> _Short | None:
    """An axis without the batch; None: it holds for this one alone."""
    if isinstance(axis, PerSample):
        if axis.task_ids not in tracker.whole:
            return None
        return axis.axis, axis.outer, axis.inner, tracker.whole.index(axis.task_ids)
    if isinstance(axis, SampleSum):
        return SAMPLE_SUM if axis.row is None else None
    return CONSTANT if isinstance(axis, Constant) and axis == CONSTANT else None


def _mark(tracker: ShortTracker, out: Tensor, short: _Short) -> None:
    samples = type(short) is tuple
    node = out.grad_fn
    if node is None:
        axis = PerSample(short[0], tracker.whole[short[3]], short[1], short[2]) if samples else short
        tracker.mark(out, axis)
        return
    known = (0, (short[0], tracker.whole[short[3]], short[1], short[2])) if samples else packed(short)
    setattr(out, ATTRIBUTE, (tracker.task_ids, known, node._sequence_nr()))


# --- layers whose weights are parameters of the bank


def _samples(tracker: ShortTracker, x: Any) -> PerSample | None:
    """The axis of a tensor that carries the samples of the batch itself."""
    if type(x) is not Tensor:
        return None
    known = _known_of(tracker, x)
    if known is None or known[0] != 0 or known[1][1] not in tracker.whole:
        return None
    return PerSample(*known[1])


def _weights(tracker: ShortTracker, x: Tensor, w: Any, b: Any) -> tuple[Any, Any, int, tuple[Tensor, ...]] | None:
    """Values of weight and bias, the form of the bias, and the targets; None unless all are parameters of the bank, in
    the dtype of x. The use of them is noted."""
    if not isinstance(w, Tensor):
        return None
    held_w = tracker.held(w)
    if held_w is None or x.dtype is not w.dtype:
        return None
    if b is None:
        tracker.use(w)
        return held_w[1], None, 0, (held_w[0],)
    held_b = tracker.held(b)
    if held_b is None or b.dtype is not w.dtype:
        return None
    tracker.use(w)
    tracker.use(b)
    return held_w[1], held_b[1], STACKED, (held_w[0], held_b[0])


# `torch.autograd.Function.apply` without its search for tensors of functorch that are dead: a third of its time. There
# are none, since short ways are not taken inside functorch
_apply_conv, _apply_linear, _apply_group_norm, _apply_layer_norm = (
    super(torch.autograd.Function, f).apply for f in (ConvByTask, LinearByTask, GroupNormByTask, LayerNormByTask)
)


def _conv(tracker: ShortTracker, args: Any, kwargs: dict[str, Any]) -> Any:
    if kwargs or len(args) != 7:
        return NotImplemented
    x, w, b, stride, padding, dilation, groups = args
    axis = _samples(tracker, x)
    if axis is None or axis.axis != 0 or not (type(stride) is type(padding) is type(dilation) is tuple):
        return NotImplemented
    if not len(stride) == len(padding) == len(dilation) == x.dim() - 2:
        return NotImplemented
    weights = _weights(tracker, x, w, b)
    if weights is None:
        return NotImplemented
    value, offset, form, targets = weights
    return axis, _apply_conv(
        x, value, offset, *axis.task_ids.plan(axis.outer, axis.inner), stride, padding, dilation, False,
        (0,) * len(stride), groups, STACKED, form, *targets,
    )  # fmt: skip


def _linear(tracker: ShortTracker, args: Any, kwargs: dict[str, Any]) -> Any:
    if kwargs or len(args) != 3:
        return NotImplemented
    x, w, b = args
    axis = _samples(tracker, x)
    if axis is None or x.dim() < 2 or axis.axis == x.dim() - 1 or w.dim() != 2:
        return NotImplemented
    weights = _weights(tracker, x, w, b)
    if weights is None:
        return NotImplemented
    value, offset, form, targets = weights
    return axis, _apply_linear(x, value, offset, *plan_of(x, axis), axis.axis, False, STACKED, form, *targets)


def _group_norm(tracker: ShortTracker, args: Any, kwargs: dict[str, Any]) -> Any:
    if len(args) != 2 or len(kwargs) != 3:
        return NotImplemented
    x, groups = args
    axis = _samples(tracker, x)
    if axis is None or axis.axis != 0:
        return NotImplemented
    weights = _weights(tracker, x, kwargs["weight"], kwargs["bias"])
    if weights is None:
        return NotImplemented
    value, offset, form, targets = weights
    plan = axis.task_ids.plan(axis.outer, axis.inner)
    return axis, _apply_group_norm(x, value, offset, *plan, groups, kwargs["eps"], STACKED, form, *targets)


def _layer_norm(tracker: ShortTracker, args: Any, kwargs: dict[str, Any]) -> Any:
    if len(args) != 2 or len(kwargs) != 3:
        return NotImplemented
    x, shape = args
    axis = _samples(tracker, x)
    if axis is None or type(shape) is not tuple or axis.axis >= x.dim() - len(shape):
        return NotImplemented
    weights = _weights(tracker, x, kwargs["weight"], kwargs["bias"])
    if weights is None:
        return NotImplemented
    value, offset, form, targets = weights
    plan = plan_of(x, axis)
    return axis, _apply_layer_norm(x, value, offset, *plan, shape, kwargs["eps"], STACKED, form, *targets)


_LAYERS: dict[Any, tuple[str, Callable[[ShortTracker, Any, dict[str, Any]], Any]]] = {
    F.conv1d: ("conv1d", _conv),
    F.conv2d: ("conv2d", _conv),
    F.conv3d: ("conv3d", _conv),
    F.linear: ("linear", _linear),
    F.group_norm: ("group_norm", _group_norm),
    F.layer_norm: ("layer_norm", _layer_norm),
}


# --- both


def take(tracker: ShortTracker, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[str | None, Any]:
    """The name of the function, and the result of the call, which is marked; or None, and the key by which what will
    be known of it is to be kept (None: it is not)."""
    if torch._C._are_functorch_transforms_active():
        return None, None
    layer = _LAYERS.get(func)
    if layer is not None:
        if not torch.is_grad_enabled() or autocast_is_on(tracker.task_ids.ids.device.type):
            return None, None
        found = layer[1](tracker, args, kwargs)
        if found is NotImplemented:
            return None, None
        axis, out = found
        _mark(tracker, out, (axis.axis, axis.outer, axis.inner, tracker.whole.index(axis.task_ids)))
        return layer[0], out
    key = call_key(tracker, func, args, kwargs)
    short = None if key is None else _kept.get(key)
    if short is None:
        return None, key
    out = func(*args, **kwargs)
    if len(short) == 1 and isinstance(out, Tensor):
        _mark(tracker, out, short[0])
    else:
        for x, each in zip(out, short, strict=True):
            _mark(tracker, x, each)
    return _names[func], out
