"""Products of samples with parameters that are no linear layers: stacked matrices, einsum, several operands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmtl.task_gradients.one_pass.autograd.products import GroupedByTask, ProductByTask
from fastmtl.task_gradients.one_pass.equations import Equation, equation_of, narrowed, sizes_of_letters
from fastmtl.task_gradients.one_pass.layers.broadcast import lift
from fastmtl.task_gradients.one_pass.layers.protocol import (
    Followed,
    Layer,
    LayerTracker,
    Unproven,
    first_sample_axis,
    follow_one,
    from_parameters,
)
from fastmtl.task_gradients.one_pass.sample_axis import PerSample
from fastmtl.task_gradients.one_pass.tensors import replaced
from fastmtl.task_gradients.one_pass.torch_call import TorchCall


def product(tracker: LayerTracker, call: TorchCall) -> Followed:
    """Any call that is a product of its tensors, run as it is."""
    found = equation_of(call)
    if found is None:
        raise Unproven(f"{call.name} in this form")
    equation, operands = found

    def run(values: Sequence[Tensor]) -> Any:
        given = {id(x): value for x, value in zip(operands, values, strict=True)}
        args, kwargs = (replaced(a, lambda x: given.get(id(x), x)) for a in (call.args, call.kwargs))
        return call.func(*args, **kwargs)

    return by_equation(tracker, equation, operands, run)


def by_equation(
    tracker: LayerTracker,
    equation: Equation,
    operands: Sequence[Tensor],
    run: Callable[[Sequence[Tensor]], Tensor],
) -> tuple[Tensor, PerSample]:
    """A product whose parameters get rows.

    Args:
        equation, operands: what it is.
        run: the product itself, from the values of the operands.
    """
    sizes = sizes_of_letters(equation, operands)
    letter, axis = _letter_of_samples(tracker, equation, operands)
    if letter not in equation.result:
        raise Unproven("a product over the axis of the samples")
    if any(len(set(term)) < len(term) for term in equation.terms):
        raise Unproven("a product along a diagonal")
    operands, weights = list(operands), {}
    for k, (term, p) in enumerate(zip(equation.terms, operands, strict=True)):
        if not from_parameters(tracker, p):
            continue
        if letter in narrowed(term, p, sizes)[0]:  # copied for every sample
            operands[k] = lift(tracker, p, p.dim() - term.index(letter), axis)
        else:
            weights[k] = tracker.weight(p)
    # of a parameter that is not in the bank, the product itself gives the gradient
    values = [weights[k].tensor().detach() if k in weights else x for k, x in enumerate(operands)]
    y = run(values)
    plan = axis.task_ids.plan(axis.outer, axis.inner)
    for k, weight in weights.items():
        others = [x.detach() for i, x in enumerate(values) if i != k]
        y = ProductByTask.apply(
            y, weight.value, *plan, equation, k, letter, weight.form, *others, *weight.targets
        )  # fmt: skip
    return y, axis.at(equation.result.index(letter))


def _letter_of_samples(tracker: LayerTracker, equation: Equation, operands: Sequence[Tensor]) -> tuple[str, PerSample]:
    letter, found = "", None
    for term, x in zip(equation.terms, operands, strict=True):
        axis = tracker.axis_of(x)
        if not isinstance(axis, PerSample):
            continue
        if found is not None and (term[axis.axis] != letter or not axis.agrees(found)):
            raise Unproven("a product of samples with others")
        letter, found = term[axis.axis], axis
    if found is None:
        raise Unproven("a product of constants, added to samples")
    return letter, found


def _bilinear(tracker: LayerTracker, call: TorchCall) -> Followed:
    bias = call.argument(3, "bias")
    if bias is None:
        return product(tracker, call)
    x, y, w = (call.argument(k, n) for k, n in enumerate(("input1", "input2", "weight")))
    out, _ = follow_one(tracker, torch.nn.functional.bilinear, x, y, w)
    return tracker.follow(torch.add, (out, bias), {})


def _grouped(tracker: LayerTracker, call: TorchCall) -> Followed:
    """Rows of samples sorted by matrix, such as experts on the tokens that were sent to each."""
    x, w, ends = call.args[0], call.args[1], call.argument(2, "offs")
    axis = first_sample_axis(tracker, x)
    if x.dim() != 2 or w.dim() != 3 or ends is None or call.argument(3, "bias") is not None:
        raise Unproven("grouped products of other forms than [S, D] with [K, D, E]")
    if not from_parameters(tracker, w):
        raise Unproven("a weight that belongs to samples")
    weight, ids = tracker.weight(w), axis.task_ids.plan(axis.outer, axis.inner)[0]
    y = call.func(x, weight.tensor().detach(), *call.args[2:], **call.kwargs)
    y = GroupedByTask.apply(
        y, weight.value, x.detach(), ends, ids, weight.form, axis.task_ids.num_rows, *weight.targets
    )  # fmt: skip
    return y, axis


LAYERS: dict[str, Layer] = {
    **dict.fromkeys(("einsum", "tensordot", "inner", "outer", "ger"), product),
    "bilinear": _bilinear,
    "_grouped_mm": _grouped,
}
