"""Parameters that meet the samples by broadcasting: every sample gets its own copy of them, which is a view."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmtl.task_gradients.one_pass.autograd.broadcast import ExpandByTask, SplitByTask
from fastmtl.task_gradients.one_pass.equations import equation_of
from fastmtl.task_gradients.one_pass.layers.protocol import (
    Followed,
    Layer,
    LayerTracker,
    Unproven,
    Weight,
    carries_samples,
    follow_one,
    from_parameters,
)
from fastmtl.task_gradients.one_pass.rules.agreement import joined
from fastmtl.task_gradients.one_pass.rules.registry import axes_of_result
from fastmtl.task_gradients.one_pass.sample_axis import CONSTANT, FromParameters, PerSample, SampleAxis, Unknown
from fastmtl.task_gradients.one_pass.tensors import nested, replaced
from fastmtl.task_gradients.one_pass.torch_call import TorchCall
from fastmtl.task_gradients.one_pass.torch_names import POINTWISE, name_of

# broadcast as pointwise functions do
BROADCASTS = POINTWISE | frozenset(
    ("cat", "stack", "where", "masked_fill", "lerp", "addcmul", "cosine_similarity", "pairwise_distance")
)


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


def _as_other(tracker: LayerTracker, call: TorchCall) -> Followed:
    """A parameter in the shape of samples, of which nothing else is asked."""
    p, other = call.args[0], call.argument(1, "other")
    if not from_parameters(tracker, p) or from_parameters(tracker, other):
        raise Unproven(f"samples in the shape of a parameter, by {call.name}")
    return follow_one(tracker, Tensor.expand if call.name == "expand_as" else Tensor.reshape, p, tuple(other.shape))


LAYERS: dict[str, Layer] = dict.fromkeys(("expand_as", "view_as", "reshape_as"), _as_other)


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
        if not copied(tracker.axis_of(p), p, p.dim() - right, axis):
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
_KEEP = frozenset(("view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "flatten", "layer_norm",
                   "rms_norm", "chunk", "split", "getitem", "softmax", "mT.get", "contiguous", 
                   "unflatten", "select", "narrow", "T.get", "movedim"))  # fmt: skip


def copied(known: SampleAxis, p: Tensor, dim: int, samples: PerSample) -> bool:
    """Whether no parameter has positions of its own for the samples, as after `expand` or `repeat` of one.

    Args:
        known: of p, which was computed from parameters.
        dim: of p, where the samples would lie as `samples` has them along its own axis.
    """
    if not isinstance(known, FromParameters) or known.recipe is None:
        return False
    recipe, outer, inner = known.recipe, samples.outer, samples.inner
    name, args = name_of(recipe.func), recipe.args
    sources = recipe.sources()

    def all_copied(places: Iterable[tuple[Tensor, int]]) -> bool:
        return all(copied(axis, x, own, samples) for x, own in places for y, axis in sources if x is y)

    first = args[0] if args and isinstance(args[0], Tensor) else None
    if name in _COPIES and first is not None:
        own = dim - (p.dim() - first.dim())
        if own < 0 or first.shape[own] == 1:
            return True
        if first.shape[own] == p.shape[dim]:
            return all_copied([(first, own)])
        return inner % first.shape[own] == 0  # one after another, each for one sample
    if name == "repeat_interleave" and first is not None and first.dim() == p.dim():
        times = p.shape[dim] // first.shape[dim]
        return all_copied([(first, dim)]) if times == 1 else times % (len(samples.task_ids) * inner) == 0
    if name in ("embedding", "getitem", "index_select") and _picks_along(args, recipe.kwargs):
        return outer * inner == 1 and _same_along(nested((args, recipe.kwargs)), p, dim)
    if name in POINTWISE or name in ("where", "masked_fill"):
        # whatever constants there are, every parameter must be spread, or hold the same
        right = p.dim() - dim
        return all_copied((x, x.dim() - right) for x, _ in sources if x.dim() >= right and x.shape[-right] != 1)
    call = TorchCall(name, recipe.func, args, recipe.kwargs, lambda x: CONSTANT, p)
    if name in ("cat", "stack"):
        along = call.argument(1, "dim", 0) % p.dim()
        own = dim - (name == "stack" and dim > along)
        return dim != along and all_copied((x, own) for x, _ in sources if x.dim() > own)
    product = equation_of(call)
    if product is not None:
        equation, operands = product
        letter = equation.result[dim]
        pairs = zip(operands, equation.terms, strict=True)
        return all_copied((x, k) for x, term in pairs if (k := term.find(letter)) >= 0 and x.shape[k] != 1)
    if name not in _KEEP:
        return False
    # the samples alone, or merged already with what stands beside them
    forms = {(1, 1), (outer, inner)}
    for x, axis in sources:
        for own, form in itertools.product(range(x.dim()), sorted(forms)):
            if x.shape[own] != len(samples.task_ids) * form[0] * form[1]:
                continue
            here = PerSample(own, samples.task_ids, *form)
            found = axes_of_result(call._replace(axis_of=functools.partial(_as_samples, x, here)))
            if isinstance(found, list):
                found = found[known.result]
            if isinstance(found, PerSample) and (found.axis, found.outer, found.inner) == (dim, outer, inner):
                return copied(axis, x, own, here)
    return False


def _picks_along(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether there is an index among the arguments that is a tensor of numbers, and no slice or mask alone."""
    return any(not x.is_floating_point() and x.dtype != torch.bool for x in nested((args, kwargs)))


def _as_samples(x: Tensor, axis: PerSample, y: Tensor) -> SampleAxis:
    """As if `x` carried the samples like that, and everything else were constant."""
    return axis if y is x else CONSTANT


def _same_along(tensors: Sequence[Tensor], picked: Tensor, dim: int) -> bool:
    """Whether a table was asked for the same at every position of a dimension of the result."""
    for index in tensors:
        if not index.is_floating_point() and index.shape == picked.shape[: index.dim()] and dim < index.dim():
            # where an index was expanded, nothing needs to be compared
            return index.stride(dim) == 0 or bool((index == index.narrow(dim, 0, 1)).all())
    return False
