"""Functions over dimensions, which they take away (sums, extremes) or work along (softmax, sorting, running sums)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmtl.task_gradients.one_pass.rules.agreement import input_axis, joined
from fastmtl.task_gradients.one_pass.rules.elementwise import pointwise
from fastmtl.task_gradients.one_pass.sample_axis import CONSTANT, SAMPLE_SUM, Axes, MixedSamples, Unknown
from fastmtl.task_gradients.one_pass.tensors import nested
from fastmtl.task_gradients.one_pass.torch_call import Rule, TorchCall, dims_of, sizes_of
from fastmtl.task_gradients.one_pass.torch_names import ALONG, REDUCTIONS

_VARIANCES = ("var", "std", "var_mean", "std_mean")


def _reduction(call: TorchCall) -> Axes:
    name, x = call.name, call.first()
    if name in ("max", "min") and len(nested(call.args)) == 2:
        return pointwise(call)
    axis = input_axis(call)
    if isinstance(axis, Unknown):
        return axis
    position = 2 if name in ("norm", "quantile", "nanquantile", "kthvalue") else 1
    dim = call.argument(position, "dim", call.kwargs.get("axis"))
    if name in _VARIANCES and isinstance(dim, bool):  # var(unbiased)
        dim = None
    dims = dims_of(x, dim)
    if x.dim() == 0:
        return axis
    if name in ("quantile", "nanquantile") and isinstance(call.argument(1, "q"), Tensor):
        return Unknown(f"{name} of several q can't be followed")
    if axis.axis in dims:
        if REDUCTIONS[name]:
            return SAMPLE_SUM
        return CONSTANT if not _differentiable(call.out) else MixedSamples(f"{name} over the axis of the samples")
    keep = call.argument(position + 1, "keepdim", False)
    if name in _VARIANCES and "keepdim" in call.kwargs:
        keep = call.kwargs["keepdim"]
    if keep and isinstance(keep, bool):
        return axis
    return axis.at(axis.axis - sum(d < axis.axis for d in dims))


def _differentiable(out: Any) -> bool:
    return any(x.requires_grad for x in nested(out))


# where the dimension stands among the arguments, if not second; and which it is, if none is given
_POSITIONS = {"topk": 2, "normalize": 2, "gumbel_softmax": 4, "diff": 2, "glu": 1}
_DEFAULTS = {"normalize": 1, "flip": None, "msort": 0, "softmax": None, "log_softmax": None}


def _along(call: TorchCall) -> Axes:
    name, x = call.name, call.first()
    if name in ("cosine_similarity", "pairwise_distance"):
        return _distance(call)
    axis = input_axis(call)
    if isinstance(axis, Unknown):
        return axis
    dim = call.argument(_POSITIONS.get(name, 1), "dim", call.kwargs.get("dims", _DEFAULTS.get(name, -1)))
    if name == "flip":
        dim = sizes_of(call.args[1:]) if len(call.args) > 1 else call.kwargs.get("dims")
    if dim is None or isinstance(dim, torch.dtype):
        return Unknown(f"{name} without dim can't be followed")
    if axis.axis in dims_of(x, dim):
        return MixedSamples(f"{name} along the axis of the samples")
    return axis


def _distance(call: TorchCall) -> Axes:
    """Of two tensors that broadcast, along one of their dimensions."""
    found = joined(call)
    if isinstance(found, Unknown):
        return found
    axis, right = found
    largest = max(call.tensors(), key=lambda v: v.dim())
    if call.name == "pairwise_distance":
        if right == 1:
            return MixedSamples(f"{call.name} over the axis of the samples")
        return axis.at(largest.dim() - right)
    dim = dims_of(largest, call.argument(2, "dim", 1))[0]
    before = largest.dim() - right
    if before == dim:
        return MixedSamples(f"{call.name} over the axis of the samples")
    return axis.at(before - (dim < before))


RULES: dict[str, Rule] = {**dict.fromkeys(REDUCTIONS, _reduction), **dict.fromkeys(ALONG, _along)}
