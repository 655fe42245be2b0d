"""Products over a dimension: matrix products, linear layers whose weight is a constant, einsum."""

from __future__ import annotations

from torch import Tensor

from fastmtl.task_gradients.one_pass.rules.agreement import joined, only_axis
from fastmtl.task_gradients.one_pass.sample_axis import SAMPLE_SUM, Axes, MixedSamples, PerSample, Unknown
from fastmtl.task_gradients.one_pass.tensors import nested
from fastmtl.task_gradients.one_pass.torch_call import Rule, TorchCall


def _matmul(call: TorchCall) -> Axes:
    a, b = call.factors()
    left, right = call.axis_of(a), call.axis_of(b)
    if isinstance(left, PerSample) and isinstance(right, PerSample):
        matrices = max(a.dim(), b.dim()) <= 2
        if left.axis == a.dim() - 1 and right.axis == max(b.dim() - 2, 0) and left.agrees(right) and matrices:
            return SAMPLE_SUM  # over the samples, of products of each one's own
        if a.dim() < 3 or b.dim() < 3 or left.axis >= a.dim() - 2 or right.axis >= b.dim() - 2:
            return MixedSamples("a product of samples with samples")
        found = joined(call._replace(name="matmul"), [a, b])
        return found if isinstance(found, Unknown) else found.axis.at(call.out.dim() - found.right)
    if isinstance(left, PerSample):
        contracted = a.dim() - 1
        return _product_with_constant(call, a, b, left, contracted)
    if not isinstance(right, PerSample):
        return Unknown(f"{call.name} of constants, added to samples")
    contracted = 0 if b.dim() == 1 else b.dim() - 2
    return _product_with_constant(call, b, a, right, contracted)


def _product_with_constant(call: TorchCall, x: Tensor, other: Tensor, axis: PerSample, contracted: int) -> Axes:
    """Of samples `x` along `axis`, summed over the dimension `contracted` of x."""
    if axis.axis == contracted:
        return SAMPLE_SUM
    out = call.out
    if x.dim() == 1 and other.dim() > 1:
        return axis.at(out.dim() - 1)
    right = x.dim() - axis.axis
    gone = other.dim() == 1 and right > 1  # a vector takes a dimension behind the samples with it
    # rows of the left factor stay rows, columns of the right one stay columns
    return axis.at(out.dim() - right + gone)


def _addmm(call: TorchCall) -> Axes:
    return _matmul(call._replace(args=call.args[1:3], kwargs={}))


def _baddbmm(call: TorchCall) -> Axes:
    found = joined(call)
    if isinstance(found, Unknown):
        return found
    if found.right < 3:
        return Unknown(call.name)
    return found.axis.at(call.out.dim() - found.right)


def _linear(call: TorchCall) -> Axes:
    axis = only_axis(call)
    if isinstance(axis, PerSample) and axis.axis == call.first().dim() - 1:
        return MixedSamples(f"{call.name} over the axis of the samples")
    return axis


def _einsum(call: TorchCall) -> Axes:
    equation, operands = call.args[0], nested(call.args[1:])
    if not isinstance(equation, str) or "." in equation:
        return Unknown("einsum with an ellipsis or in its list form can't be followed")
    equation = equation.replace(" ", "")
    left, _, result = equation.partition("->")
    if "->" not in equation:
        every = left.replace(",", "")
        result = "".join(sorted(c for c in set(every) if every.count(c) == 1))
    letters: dict[str, PerSample] = {}
    several: list[PerSample] = []
    for term, x in zip(left.split(","), operands, strict=True):
        axis = call.axis_of(x)
        if isinstance(axis, PerSample):
            letters[term[axis.axis]] = axis
            several.append(axis)
    if len(letters) != 1:
        return MixedSamples("einsum of samples along several letters")
    letter, axis = next(iter(letters.items()))
    if not all(each.agrees(axis) for each in several):
        return Unknown("einsum joins different samples")
    if letter in result:
        return axis.at(result.index(letter))
    return SAMPLE_SUM


RULES: dict[str, Rule] = {
    **dict.fromkeys(("matmul", "rmatmul"), _matmul),
    "addmm": _addmm,
    "baddbmm": _baddbmm,
    "linear": _linear,
    "einsum": _einsum,
}
