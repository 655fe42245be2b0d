"""What is known of the result of a call: the rule of its function, or what holds for whole kinds of arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmtl.task_gradients.one_pass.rules import (
    elementwise,
    functional,
    indexing,
    losses,
    parts,
    products,
    recurrent,
    reductions,
    shapes,
)
from fastmtl.task_gradients.one_pass.rules.owners import in_row, stacked_rows
from fastmtl.task_gradients.one_pass.sample_axis import (
    CONSTANT,
    SAMPLE_SUM,
    Axes,
    Constant,
    MixedSamples,
    PerSample,
    SampleAxis,
    SampleSum,
    Unknown,
)
from fastmtl.task_gradients.one_pass.torch_call import Rule, TorchCall
from fastmtl.task_gradients.one_pass.torch_names import LINEAR, writes

RULES: dict[str, Rule] = {
    **elementwise.RULES,
    **losses.RULES,
    **reductions.RULES,
    **shapes.RULES,
    **parts.RULES,
    **indexing.RULES,
    **products.RULES,
    **functional.RULES,
    **recurrent.RULES,
}


def is_known(name: str) -> bool:
    """Whether there is a rule for the function of that name."""
    return name in RULES


_CONSTANT_IF_ALL_ARE = ("new_", "zeros_like", "ones_like", "empty_like", "full_like", "rand")


def axes_of_result(call: TorchCall) -> Axes:
    """What is known of what `call` returned. None of its arguments is computed from parameters of the bank."""
    found = _by_rule(call)
    if _settled(found) or torch.compiler.is_compiling():
        return found
    results = call.results()
    if not any(x.requires_grad for x in results):
        return _of_one_batch(call, found)
    # a gradient flows through some arguments alone: whatever samples the others carry, they are constants beside it.
    # They may carry none at all, and only have as many elements as there are samples
    if any(not x.requires_grad and not isinstance(call.axis_of(x), Constant) for x in call.tensors()):
        call = call._replace(axis_of=functools.partial(_constant_without_gradient, call.axis_of))
        found = _by_rule(call)
    row, num_rows = _single_row(call)
    if row is None or call.name == "setitem":  # the rest of what is written into belongs to others
        return found
    axes = found if isinstance(found, list) else [found] * len(results)
    of_row = [axis if _settled(axis) else in_row(x, row, num_rows) for x, axis in zip(results, axes, strict=True)]
    return of_row if isinstance(found, list) else of_row[0]


def _of_one_batch(call: TorchCall, found: Axes) -> Axes:
    """Of data whose samples do not agree, where their size alone says of some that they carry any: a mean for each
    feature, a table of positions, of as many elements as there are samples.

    Whichever of them carries the samples, those of the result must keep their order, and in one case alone lie where
    those of tensors from outside do; or where the user has named a batch.
    """
    carried: dict[int, tuple[Tensor, PerSample]] = {}
    for x in call.tensors():
        axis = call.axis_of(x)
        if isinstance(axis, PerSample):
            carried[id(x)] = (x, axis)
    told = [k for k, (x, axis) in carried.items() if axis.task_ids.assumed is None or x.requires_grad]
    results = call.results()
    if len(carried) < 2 or len(told) == len(carried) or len(results) != 1 or writes(call.func):
        return found
    if torch._C._are_functorch_transforms_active():  # its tensors tell no memory
        return found
    places = [axis.task_ids.assumed for _, axis in carried.values() if axis.task_ids.assumed is not None]
    batch_dim = places[0] % max(results[0].dim(), 1)
    key = next(axis.task_ids.key for _, axis in carried.values())
    memory = {x.untyped_storage().data_ptr() for x, _ in carried.values()}
    if len(memory) < len(carried):
        return found  # the batch against itself
    accepted: list[SampleAxis] = []
    for kept in ([told] if told else []) + [[k] for k in carried if k not in told]:
        rest = frozenset(k for k in carried if k not in kept)
        axis = _by_rule(call._replace(axis_of=functools.partial(_constant_if, call.axis_of, rest)))
        if not isinstance(axis, PerSample) or axis.task_ids.key != key:
            return found
        if kept is told or (not told and axis.axis == batch_dim):
            accepted.append(axis)
    return accepted[0] if len(accepted) == 1 else found


def _constant_if(axis_of: Callable[[Tensor], SampleAxis], constant: frozenset[int], x: Tensor) -> SampleAxis:
    return CONSTANT if id(x) in constant else axis_of(x)


def _settled(axes: Axes) -> bool:
    """Whether there is no more to be found out: it is neither unknown nor has it lost which samples are whose."""
    if isinstance(axes, list):
        return all(_settled(axis) for axis in axes)
    return not isinstance(axes, (MixedSamples, Unknown)) and (not isinstance(axes, SampleSum) or axes.row is not None)


def _constant_without_gradient(axis_of: Callable[[Tensor], SampleAxis], x: Tensor) -> SampleAxis:
    axis = axis_of(x)
    return axis if x.requires_grad or isinstance(axis, Constant) else CONSTANT


def _single_row(call: TorchCall) -> tuple[int | None, int]:
    """The row of the bank, if all samples in the call belong to one, and how many rows there are."""
    row, num_rows = None, 0
    for x in call.tensors():
        axis = call.axis_of(x)
        if isinstance(axis, Constant):
            continue
        if isinstance(axis, PerSample):
            here, num_rows = axis.task_ids.single_row(), axis.task_ids.num_rows
        else:
            here = None
            if isinstance(axis, SampleSum):
                here, num_rows = axis.row, axis.num_rows or num_rows
        if here is None or (row is not None and here != row):
            return None, 0
        row = here
    return row, num_rows


def _by_rule(call: TorchCall) -> Axes:
    name = call.name
    if name == "arange":
        return Constant(arange_length=_arange_length(call.args, call.kwargs))
    axes = [call.axis_of(x) for x in call.tensors()]
    constant, samples, total = True, False, False
    unknown = mixed = None
    for axis in axes:
        if isinstance(axis, Constant):
            continue
        constant = False
        if isinstance(axis, PerSample):
            samples = True
        elif isinstance(axis, SampleSum):
            total = True
        elif isinstance(axis, Unknown):
            unknown = axis if unknown is None else unknown
        elif isinstance(axis, MixedSamples):
            mixed = axis if mixed is None else mixed
    if constant:
        if name.startswith(_CONSTANT_IF_ALL_ARE) or name in ("nonzero", "argwhere"):
            return CONSTANT
        return _of_constants(name, axes, call.out)
    if name.startswith("new_") or name in ("nonzero", "argwhere"):
        return CONSTANT
    if name == "where" and len(call.args) + len(call.kwargs) == 1:  # positions
        return CONSTANT
    if name in ("detach", "data.get") and not samples and unknown is None:
        return CONSTANT
    if unknown is not None:
        return unknown
    if mixed is not None:
        return mixed
    if total:
        return _of_sums(call, samples)
    rule = RULES.get(name)
    return Unknown(f"{name} can't be followed") if rule is None else rule(call)


def _of_constants(name: str, axes: Sequence[SampleAxis], out: Any) -> Constant:
    for axis in axes:
        if isinstance(axis, Constant) and axis.from_samples:
            return axis
    if len(axes) == 1 and name in _KEEPS_ORDER and isinstance(out, Tensor):
        known = axes[0]
        if isinstance(known, Constant) and known.arange_length is not None and out.numel() == known.arange_length:
            return known
    return CONSTANT


# an arange stays one, in whatever shape
_KEEPS_ORDER = frozenset(("getitem", "view", "reshape", "unsqueeze", "to", "long", "int", "contiguous"))


def _of_sums(call: TorchCall, with_samples: bool) -> Axes:
    """Of sums over samples, and constants."""
    name, args = call.name, call.args
    if name == "stack":
        apart = stacked_rows(call)
        if apart is not None:
            return apart
    if name == "setitem":
        # an element of what is constant, or the sum of other samples, becomes a sum
        return MixedSamples("setitem by samples") if with_samples else SAMPLE_SUM
    if with_samples:
        return MixedSamples(f"{name} joins a sum over samples with single ones")
    if name in LINEAR:
        return SAMPLE_SUM
    if name == "mul" and not all(_is_sum(call, x) for x in args[:2]):
        return SAMPLE_SUM
    if name == "div" and args and _is_sum(call, args[0]):
        other = args[1] if len(args) > 1 else None
        if not isinstance(other, Tensor) or isinstance(call.axis_of(other), Constant):
            return SAMPLE_SUM
    return MixedSamples(f"{name} of a sum over samples is no sum over samples")


def _is_sum(call: TorchCall, x: Any) -> bool:
    return isinstance(x, Tensor) and isinstance(call.axis_of(x), SampleSum)


def _arange_length(args: Any, kwargs: dict[str, Any]) -> int | None:
    """Of `arange(n)`, or with a start of 0: n."""
    values = [kwargs[k] for k in ("start", "end", "step") if k in kwargs]
    values = [*args, *values]
    if len(values) == 1:
        return values[0] if isinstance(values[0], int) else None
    start, end, step = [*values, 1][:3]
    return end if start == 0 and step == 1 and isinstance(end, int) else None
