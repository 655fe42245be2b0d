"""Linear layers and other products of samples with parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.task_gradients.one_pass.autograd.linear import LinearByTask
from fastmtl.task_gradients.one_pass.layers.broadcast import lift
from fastmtl.task_gradients.one_pass.layers.protocol import (
    NO_WEIGHT,
    Followed,
    Layer,
    LayerTracker,
    Unproven,
    Weight,
    carries_samples,
    follow_one,
    from_parameters,
    plan_of,
    sample_axis,
    weight_of,
)
from fastmtl.task_gradients.one_pass.sample_axis import PerSample
from fastmtl.task_gradients.one_pass.tensors import nested
from fastmtl.task_gradients.one_pass.torch_call import TorchCall


def _linear(tracker: LayerTracker, call: TorchCall) -> Followed:
    x, w, b = call.argument(0, "input"), call.argument(1, "weight"), call.argument(2, "bias")
    return _affine(tracker, x, w, b, transposed=False)


def _affine(
    tracker: LayerTracker, x: Tensor, w: Tensor, b: Tensor | None, *, transposed: bool
) -> tuple[Tensor, PerSample]:
    """`x W^T + b`, or with `transposed` `x W + b`."""
    axis = sample_axis(tracker, x)
    if w.dim() != 2 or x.dim() < 2 or axis.axis == x.dim() - 1:
        raise Unproven("samples along the last axis, or a weight that is no matrix")
    if carries_samples(tracker, w):
        raise Unproven("a weight that belongs to samples")
    return _apply(x, tracker.weight(w), weight_of(tracker, b), axis, transposed)


def _apply(x: Tensor, weight: Weight, bias: Weight, axis: PerSample, transposed: bool) -> tuple[Tensor, PerSample]:
    y = LinearByTask.apply(
        x, weight.value, bias.value, *plan_of(x, axis), axis.axis, transposed, weight.form, bias.form,
        *weight.targets, *bias.targets,
    )  # fmt: skip
    return y, axis


def _addmm(tracker: LayerTracker, call: TorchCall) -> Followed:
    b, x, w = (call.argument(k, n) for k, n in enumerate(("input", "mat1", "mat2")))
    if call.kwargs.get("alpha", 1) != 1 or call.kwargs.get("beta", 1) != 1:
        raise Unproven("addmm with alpha or beta")
    if carries_samples(tracker, x) and not carries_samples(tracker, b) and b.dim() == 1:
        return _affine(tracker, x, w, b, transposed=True)
    y, axis = _product(tracker, x, w)
    tracker.mark(y, axis)
    return tracker.follow(torch.add, (b, y), {})


def _baddbmm(tracker: LayerTracker, call: TorchCall) -> Followed:
    if call.kwargs.get("alpha", 1) != 1 or call.kwargs.get("beta", 1) != 1:
        raise Unproven("baddbmm with alpha or beta")
    b, x, y = (call.argument(k, n) for k, n in enumerate(("input", "batch1", "batch2")))
    product, _ = follow_one(tracker, torch.matmul, x, y)
    return tracker.follow(torch.add, (b, product), {})


def _matmul(tracker: LayerTracker, call: TorchCall) -> Followed:
    return _product(tracker, *call.factors())


def _product(tracker: LayerTracker, a: Tensor, b: Tensor) -> tuple[Tensor, PerSample]:
    """`a @ b`."""
    left = carries_samples(tracker, a)
    x, p = (a, b) if left else (b, a)
    axis, last = sample_axis(tracker, x), x.dim() - 1
    if left and p.dim() == 2:
        return _affine(tracker, x, p, None, transposed=True)
    if left and p.dim() == 1 and x.dim() >= 2:
        if axis.axis == last:
            raise Unproven("a product over the axis of the samples")
        weight = tracker.weight(p).viewed(lambda v: v.reshape(-1, 1))
        y, axis = _apply(x, weight, NO_WEIGHT, axis, True)
        return y.squeeze(-1), axis
    if not left and p.dim() == 2 and x.dim() >= 2 and axis.axis != x.dim() - 2:
        turned, swapped = x.mT, {last: last - 1, last - 1: last}
        tracker.mark(turned, axis.at(swapped.get(axis.axis, axis.axis)))
        y, found = _affine(tracker, turned, p, None, transposed=False)
        return y.mT, found.at(swapped.get(found.axis, found.axis))
    right = x.dim() - axis.axis
    if p.dim() < 3 or right < 3:
        raise Unproven("a product over the axis of the samples")
    lifted = lift(tracker, p, right, axis)
    out = torch.matmul(x, lifted) if left else torch.matmul(lifted, x)
    return out, axis.at(out.dim() - right)


def _einsum(tracker: LayerTracker, call: TorchCall) -> Followed:
    equation, operands = call.args[0], nested(call.args[1:])
    if not isinstance(equation, str) or "." in equation or "->" not in equation:
        raise Unproven("einsum with an ellipsis, or without a result")
    left, _, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    letters: dict[str, PerSample] = {}
    for term, x in zip(terms, operands, strict=True):
        axis = tracker.axis_of(x)
        if isinstance(axis, PerSample):
            letters[term[axis.axis]] = axis
    if len(letters) != 1:
        raise Unproven("einsum of samples along several letters")
    letter, axis = next(iter(letters.items()))
    if letter not in result:
        raise Unproven("einsum sums over the samples")
    changed = []
    for k, (term, p) in enumerate(zip(terms, operands, strict=True)):
        if from_parameters(tracker, p):
            if letter in term:
                raise Unproven("a parameter along the letter of the samples")
            terms[k] = letter + term
            p = lift(tracker, p, p.dim() + 1, axis)
        changed.append(p)
    out = torch.einsum(f"{','.join(terms)}->{result}", *changed)
    return out, axis.at(result.index(letter))


LAYERS: dict[str, Layer] = {
    "linear": _linear,
    "addmm": _addmm,
    "baddbmm": _baddbmm,
    "matmul": _matmul,
    "rmatmul": _matmul,
    "einsum": _einsum,
}
