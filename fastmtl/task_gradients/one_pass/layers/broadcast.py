"""Parameters that meet the samples by broadcasting: every sample gets its own copy of them, which is a view."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor

from fastmtl.task_gradients.one_pass.autograd.broadcast import ExpandByTask, SplitByTask
from fastmtl.task_gradients.one_pass.layers.protocol import (
    Followed,
    LayerTracker,
    Unproven,
    Weight,
    carries_samples,
    from_parameters,
)
from fastmtl.task_gradients.one_pass.rules.agreement import joined
from fastmtl.task_gradients.one_pass.rules.registry import axes_of_result
from fastmtl.task_gradients.one_pass.sample_axis import CONSTANT, FromParameters, PerSample, SampleAxis, Unknown
from fastmtl.task_gradients.one_pass.tensors import nested, replaced
from fastmtl.task_gradients.one_pass.torch_call import TorchCall
from fastmtl.task_gradients.one_pass.torch_names import POINTWISE, name_of

# broadcast as pointwise functions do
BROADCASTS = POINTWISE | frozenset(("cat", "stack", "where", "masked_fill", "lerp", "addcmul"))


def broadcast(tracker: LayerTracker, call: TorchCall) -> Followed:
    """The parameters are lifted to the samples, and the function runs as it is."""
    name, tensors = call.name, call.tensors()
    found = joined(call, tensors)
    if isinstance(found, Unknown):
        raise Unproven(found.why)
    axis, right = found
    if name in ("cat", "stack"):
        whole = next(x for x in tensors if carries_samples(tracker, x)).dim()
        dim = call.argument(1, "dim", 0) % (whole + (name == "stack"))
        if name == "cat" and dim == whole - right:
            raise Unproven("a parameter joins the samples as one more of them")

    def lifted(x: Tensor) -> Tensor:
        return lift(tracker, x, right, axis) if from_parameters(tracker, x) else x

    args, kwargs = replaced(call.args, lifted), replaced(call.kwargs, lifted)
    out = tracker.run(call.func, args, kwargs)
    return out, axes_of_result(call._replace(args=args, kwargs=kwargs, out=out))


def lift(tracker: LayerTracker, p: Tensor, right: int, axis: PerSample) -> Tensor:
    """A parameter with an axis of samples, `right` counted from the right: a tensor that carries samples."""
    weight = tracker.weight(p)
    if p.dim() < right:
        shape = (1,) * (right - p.dim()) + tuple(p.shape)
        weight = weight.viewed(lambda x: x.reshape(shape))
    value = weight.tensor()
    dim = value.dim() - right
    ids, _, _ = axis.task_ids.plan(axis.outer, axis.inner)
    n = ids.shape[0]
    if value.shape[dim] == n and n > 1:
        if value.stride(dim) == 0:
            # expanded by hand: all samples have the same
            return _expanded(tracker, weight.narrowed(dim), dim, ids, axis)
        if not copied(tracker, p, p.dim() - right):
            raise Unproven("its own positions would lie along the axis of the samples")
        out = SplitByTask.apply(value, ids, dim, weight.form, axis.task_ids.num_rows, *weight.targets)
    elif value.shape[dim] == 1:
        return _expanded(tracker, weight, dim, ids, axis)
    else:
        raise Unproven(f"a parameter of size {value.shape[dim]} along the axis of {n} samples")
    tracker.mark(out, axis.at(dim))
    return out


def _expanded(tracker: LayerTracker, weight: Weight, dim: int, ids: Tensor, axis: PerSample) -> Tensor:
    out = ExpandByTask.apply(weight.value, ids, dim, weight.form, axis.task_ids.num_rows, *weight.targets)
    tracker.mark(out, axis.at(dim))
    return out


# --- whether a parameter was copied for every sample before it meets them

_COPIES = frozenset(("repeat", "tile", "expand", "expand_as", "broadcast_to"))
# of the rest these keep positions apart, whatever else they are given
_KEEP = frozenset(("view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "flatten", "linear", "layer_norm",
                   "rms_norm", "chunk", "split", "getitem", "softmax", "mT.get"))  # fmt: skip


def copied(tracker: LayerTracker, p: Tensor, dim: int) -> bool:
    """Whether all positions of dimension `dim` hold the same, as after `expand` or `repeat` of a parameter."""
    known = tracker.axis_of(p)
    if tracker.in_bank(p) or not isinstance(known, FromParameters) or known.recipe is None:
        return False
    recipe = known.recipe
    name, args = name_of(recipe.func), recipe.args
    if name in _COPIES:
        source = dim - (p.dim() - args[0].dim())
        return source < 0 or args[0].shape[source] == 1 or copied(tracker, args[0], source)
    if name in ("embedding", "getitem", "index_select"):
        return _same_along(nested((args, recipe.kwargs)), p, dim)
    params = [x for x in nested((args, recipe.kwargs)) if from_parameters(tracker, x)]
    if name in POINTWISE or name in ("where", "masked_fill"):
        # whatever constants there are, every parameter must be spread, or hold the same
        right = p.dim() - dim
        spread = [x for x in params if x.dim() >= right and x.shape[-right] != 1]
        return all(copied(tracker, x, x.dim() - right) for x in spread)
    if name not in _KEEP:
        return False
    for x in params:
        for own in range(x.dim()):
            if x.shape[own] != p.shape[dim]:
                continue
            alone = functools.partial(_as_samples, x, own, tracker)
            found = axes_of_result(TorchCall(name, recipe.func, args, recipe.kwargs, alone, p))
            if isinstance(found, list):
                found = found[known.result]
            if isinstance(found, PerSample) and found.axis == dim and found.outer * found.inner == 1:
                return copied(tracker, x, own)
    return False


def _as_samples(x: Tensor, dim: int, tracker: LayerTracker, y: Tensor) -> SampleAxis:
    """As if `x` carried the samples along `dim`, and everything else were constant."""
    return PerSample(dim, tracker.task_ids) if y is x else CONSTANT


def _same_along(tensors: Sequence[Tensor], picked: Tensor, dim: int) -> bool:
    """Whether a table was asked for the same at every position of a dimension of the result."""
    for index in tensors:
        if not index.is_floating_point() and index.shape == picked.shape[: index.dim()] and dim < index.dim():
            # where an index was expanded, nothing needs to be compared
            return index.stride(dim) == 0 or bool((index == index.narrow(dim, 0, 1)).all())
    return False
