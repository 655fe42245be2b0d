"""Products over a dimension: matrix products, linear layers whose weight is a constant, einsum."""

from __future__ import annotations

from torch import Tensor

from fastmtl.task_gradients.one_pass.equations import equation_of
from fastmtl.task_gradients.one_pass.rules.agreement import joined
from fastmtl.task_gradients.one_pass.sample_axis import SAMPLE_SUM, Axes, MixedSamples, PerSample, Unknown
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
    bias = call.argument(2, "bias")
    if bias is not None and bias.requires_grad and call.carries_samples(bias):
        return Unknown(f"{call.name} with a bias that was computed from samples")
    if call.carries_samples(call.argument(1, "weight")):
        return _by_equation(call)
    axis = call.axis_of(call.argument(0, "input"))
    if not isinstance(axis, PerSample):
        return Unknown(f"{call.name} of constants, with a bias that carries samples")
    if axis.axis == call.first().dim() - 1:
        return MixedSamples(f"{call.name} over the axis of the samples")
    return axis


def _by_equation(call: TorchCall) -> Axes:
    """Of einsum and of products that have no rule of their own."""
    found = equation_of(call)
    if found is None:
        return Unknown(f"{call.name} in this form can't be followed")
    equation, operands = found
    carried = [(term[axis.axis], axis) for term, x in zip(equation.terms, operands, strict=True)
               if isinstance(axis := call.axis_of(x), PerSample)]  # fmt: skip
    if not carried:
        return Unknown(f"{call.name} of constants, added to samples")
    letter, axis = carried[0]
    if any(other != letter for other, _ in carried):
        return MixedSamples(f"{call.name} of samples along several letters")
    if not all(each.agrees(axis) for _, each in carried):
        return Unknown(f"{call.name} joins different samples")
    return axis.at(equation.result.index(letter)) if letter in equation.result else SAMPLE_SUM


def _grouped(call: TorchCall) -> Axes:
    """Rows of x, sorted by which matrix multiplies them."""
    axis = call.axis_of(call.args[0])
    plain = isinstance(axis, PerSample) and call.args[0].dim() == 2 and call.args[1].dim() == 3
    if not plain or axis.axis != 0 or call.carries_samples(call.args[1]):
        return Unknown(f"{call.name} in this form can't be followed")
    return axis


RULES: dict[str, Rule] = {
    **dict.fromkeys(("matmul", "rmatmul"), _matmul),
    "addmm": _addmm,
    "baddbmm": _baddbmm,
    "linear": _linear,
    "_grouped_mm": _grouped,
    **dict.fromkeys(("einsum", "tensordot", "inner", "outer", "ger", "bilinear"), _by_equation),
}
