"""Linear layers and other products of samples with parameters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtl.task_gradients.one_pass.autograd.linear import LinearByTask
from fastmtl.task_gradients.one_pass.equations import equation_of
from fastmtl.task_gradients.one_pass.layers.products import by_equation
from fastmtl.task_gradients.one_pass.layers.protocol import (
    NO_WEIGHT,
    Followed,
    Layer,
    LayerTracker,
    Unproven,
    Weight,
    carries_samples,
    follow_one,
    plan_of,
    sample_axis,
    weight_of,
)
from fastmtl.task_gradients.one_pass.sample_axis import PerSample
from fastmtl.task_gradients.one_pass.torch_call import TorchCall
from fastmtl.task_gradients.one_pass.torch_names import writes


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
    if x.is_complex() or w.is_complex():
        func, name = (torch.matmul, "matmul") if transposed else (F.linear, "linear")
        y, found = _by_equation(tracker, TorchCall(name, func, (x, w), {}, tracker.axis_of))
        if b is None:
            return y, found
        tracker.mark(y, found)
        y, _ = follow_one(tracker, torch.add, y, b)
        return y, found
    return _apply(x, tracker.weight(w), weight_of(tracker, b), axis, transposed)


def _by_equation(tracker: LayerTracker, call: TorchCall) -> tuple[Tensor, PerSample]:
    """A product of the first two arguments."""
    found = equation_of(call)
    assert found is not None
    return by_equation(tracker, *found, lambda values: call.func(*values))


def _apply(x: Tensor, weight: Weight, bias: Weight, axis: PerSample, transposed: bool) -> tuple[Tensor, PerSample]:
    y = LinearByTask.apply(
        x, weight.value, bias.value, *plan_of(x, axis), axis.axis, transposed, weight.form, bias.form,
        *weight.targets, *bias.targets,
    )  # fmt: skip
    return y, axis


def _addmm(tracker: LayerTracker, call: TorchCall) -> Followed:
    b, x, w = (call.argument(k, n) for k, n in enumerate(("input", "mat1", "mat2")))
    plain = call.kwargs.get("alpha", 1) == call.kwargs.get("beta", 1) == 1 and b.dim() == 1
    if plain and carries_samples(tracker, x) and not carries_samples(tracker, b):
        return _affine(tracker, x, w, b, transposed=True)
    return _added(tracker, call, b, torch.matmul, x, w)


def _baddbmm(tracker: LayerTracker, call: TorchCall) -> Followed:
    b, x, y = (call.argument(k, n) for k, n in enumerate(("input", "batch1", "batch2")))
    return _added(tracker, call, b, torch.matmul, x, y)


def _addbmm(tracker: LayerTracker, call: TorchCall) -> Followed:
    b, x, y = (call.argument(k, n) for k, n in enumerate(("input", "batch1", "batch2")))
    return _added(tracker, call, b, torch.einsum, "bij,bjk->ik", x, y)


def _addmv(tracker: LayerTracker, call: TorchCall) -> Followed:
    b, x, v = (call.argument(k, n) for k, n in enumerate(("input", "mat", "vec")))
    return _added(tracker, call, b, torch.matmul, x, v)


def _addr(tracker: LayerTracker, call: TorchCall) -> Followed:
    b, x, y = (call.argument(k, n) for k, n in enumerate(("input", "vec1", "vec2")))
    return _added(tracker, call, b, torch.outer, x, y)


def _added(tracker: LayerTracker, call: TorchCall, b: Tensor, *product: Any) -> Followed:
    """`beta b + alpha y`, where y is a product: its function, and what that is called with."""
    if writes(call.func):
        raise Unproven("a product that is added in place")
    func, *args = product
    alpha, beta = call.kwargs.get("alpha", 1), call.kwargs.get("beta", 1)
    y, axis = follow_one(tracker, func, *args)
    if alpha != 1:
        y, axis = follow_one(tracker, torch.mul, y, alpha)
    if beta == 0:  # whatever b is
        return y, axis
    if beta != 1:
        b, _ = follow_one(tracker, torch.mul, b, beta)
    return tracker.follow(torch.add, (b, y), {})


def _matmul(tracker: LayerTracker, call: TorchCall) -> Followed:
    return _product(tracker, *call.factors())


def _product(tracker: LayerTracker, a: Tensor, b: Tensor) -> tuple[Tensor, PerSample]:
    """`a @ b`."""
    left = carries_samples(tracker, a)
    x, p = (a, b) if left else (b, a)
    axis, last = sample_axis(tracker, x), x.dim() - 1
    if left and p.dim() == 2:
        return _affine(tracker, x, p, None, transposed=True)
    if left and p.dim() == 1 and x.dim() >= 2 and not x.is_complex() and not p.is_complex():
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
    return _by_equation(tracker, TorchCall("matmul", torch.matmul, (a, b), {}, tracker.axis_of))


LAYERS: dict[str, Layer] = {
    "linear": _linear,
    "addmm": _addmm,
    "baddbmm": _baddbmm,
    "addbmm": _addbmm,
    "addmv": _addmv,
    "addr": _addr,
    "matmul": _matmul,
    "rmatmul": _matmul,
}
