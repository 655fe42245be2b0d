"""Numbers that are not finite: they show where torch's own layer of one task shows them, and reach no other task.

Without padding: whether a weight that is not finite meets its zeros depends on torch's algorithm
(docs/reference/limits.md).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Backend
from torch import Tensor

from fastmtl.ops import task_batch_norm, task_conv2d, task_linear, task_lora, task_scale_shift

IDS = torch.tensor([0, 2, 0, 2, 2])  # nothing of task 1
Deltas = list[tuple[Tensor, ...] | None]  # by task: delta, or A and B

SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...], list[tuple[int, ...]]]] = {  # of x, weight, delta
    "linear": ((5, 7), (6, 7), [(6, 7)]),
    "linear of many rows": ((5, 40, 7), (6, 7), [(6, 7)]),
    "conv": ((5, 4, 5, 5), (6, 4, 3, 3), [(6, 4, 3, 3)]),
    "conv of many rows": ((5, 4, 18, 18), (6, 4, 3, 3), [(6, 4, 3, 3)]),
    "lora": ((5, 7), (6, 7), [(2, 7), (6, 2)]),
}
each_layer = pytest.mark.parametrize("layer", SHAPES)
each_value = pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])


def by_task(layer: str, x: Tensor, weight: Tensor | None, deltas: Any, gate: Tensor | None, bias: Any) -> Tensor:
    """The op. deltas: by task, or stacked ones."""
    if layer == "lora":
        A, B = deltas if isinstance(deltas[0], Tensor) else zip(*(d or (None, None) for d in deltas), strict=True)
        A, B = (w if isinstance(w, Tensor) else list(w) for w in (A, B))
        return task_lora(x, weight, A, B, IDS, scaling=gate, bias=bias)
    delta = deltas[0] if isinstance(deltas[0], Tensor) else [d and d[0] for d in deltas]
    op = task_conv2d if layer.startswith("conv") else task_linear
    return op(x, weight, delta, IDS, gate=gate, bias=bias)


def of_task(task: int) -> Tensor:
    return torch.eq(IDS, task)


def composed(layer: str, x: Tensor, weight: Tensor | None, deltas: Any, gate: Tensor | None, bias: Any) -> Tensor:
    """Each task's layer in plain torch; a closed gate's delta is not read."""
    if isinstance(deltas[0], Tensor):
        deltas = list(zip(*(w.unbind(0) for w in deltas), strict=True))
    y = None
    for t in (0, 2):
        own = x[of_task(t)]
        delta = None if gate is not None and gate[t] == 0 else deltas[t]
        s = torch.ones(()) if gate is None else gate[t]
        b = bias[t] if bias is not None and bias.dim() == 2 else bias
        if layer == "lora":
            out = torch.zeros(len(own), 6) if weight is None else F.linear(own, weight)
            out = out if delta is None else out + s * F.linear(F.linear(own, delta[0]), delta[1])
            out = out if b is None else out + b
        else:
            w = torch.zeros(SHAPES[layer][1]) if weight is None else weight
            run = F.conv2d if layer.startswith("conv") else F.linear
            out = run(own, w if delta is None else w + s * delta[0], b)
        y = torch.zeros(len(x), *out.shape[1:]) if y is None else y
        y = y.index_copy(0, (of_task(t)).nonzero()[:, 0], out)
    assert y is not None
    return y


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def finite(run: Callable[..., Tensor], layer: str, inputs: Sequence[Any], grad_out: Tensor) -> list[Tensor]:
    """Of the result and of all gradients, which elements are finite. Those of closed gates' own are left out."""
    x, weight, deltas, gate, bias = inputs
    x, weight, gate, bias = (None if y is None else leaf(y) for y in (x, weight, gate, bias))
    if isinstance(deltas[0], Tensor):
        held = deltas = [leaf(d) for d in deltas]
    else:
        deltas = [None if d is None else tuple(leaf(w) for w in d) for d in deltas]
        held = [w for d in deltas if d is not None for w in d]
    y = run(layer, x, weight, deltas, gate, bias)
    wanted = [p for p in (x, weight, *held, bias) if p is not None]
    grads = torch.autograd.grad(y, [*wanted, *([] if gate is None else [gate])], grad_out, allow_unused=True)
    found = [y, *(torch.zeros(()).expand_as(p) if g is None else g for p, g in zip(wanted, grads, strict=False))]
    if gate is not None:
        found.append(torch.zeros(3) if grads[-1] is None else torch.where(gate == 0, 0.0, grads[-1]))
    return [each.detach().isfinite() for each in found]


def deltas_of(layer: str, stacked: bool) -> Any:
    shapes = SHAPES[layer][2]
    if stacked:
        return [torch.randn(3, *shape) for shape in shapes]
    return [tuple(torch.randn(shape) for shape in shapes) for _ in range(3)]


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "list"])
@each_layer
def test_they_show_where_plain_torch_shows_them(layer: str, stacked: bool, backend: Backend) -> None:
    draw, places = random.Random(f"{layer} {stacked}"), ["x", "weight", "delta", "gate", "bias", "grad_out"]
    for trial in range(24):
        x, weight, deltas = torch.randn(SHAPES[layer][0]), torch.randn(SHAPES[layer][1]), deltas_of(layer, stacked)
        gate, bias = torch.rand(3) + 0.5, torch.randn(draw.choice([(6,), (3, 6)]))
        parts = [w[t] for w in deltas for t in (0, 2)] if stacked else [*deltas[0], *deltas[2]]
        at: dict[str, Tensor] = {"x": x, "weight": weight, "delta": draw.choice(parts), "gate": gate, "bias": bias}
        inputs = [x, weight if draw.random() < 0.5 else None, deltas, gate if draw.random() < 0.7 else None, bias]
        if draw.random() < 0.4:
            gate[draw.choice([0, 2])] = 0
        if not stacked and draw.random() < 0.4:
            deltas[draw.choice([0, 2])] = None
        at["grad_out"] = grad_out = torch.randn_like(composed(layer, *inputs))
        bad = at[places[trial % len(places)]].view(-1)
        bad[draw.randrange(len(bad))] = draw.choice([torch.nan, torch.inf, -torch.inf])
        expected, found = (finite(run, layer, inputs, grad_out) for run in (composed, by_task))
        for k, (a, b) in enumerate(zip(expected, found, strict=True)):
            assert torch.equal(a, b), (trial, places[trial % len(places)], k)


@each_value
@pytest.mark.parametrize("alone", [True, False], ids=["no weight", "weight"])
@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "list"])
@each_layer
def test_a_task_without_samples_reaches_nothing(
    layer: str, stacked: bool, alone: bool, value: float, backend: Backend
) -> None:
    x, weight, deltas, gate = torch.randn(SHAPES[layer][0]), None, deltas_of(layer, stacked), torch.rand(3)
    if not alone:
        weight = torch.randn(SHAPES[layer][1])
    bias = torch.randn(3, 6)
    for w in (*(d[1] for d in deltas), gate, bias) if stacked else (*deltas[1], gate, bias):
        w[1 if w.dim() == 1 or w is bias else ...] = value
    inputs = x, weight, deltas, gate, bias
    for each in finite(by_task, layer, inputs, torch.ones_like(by_task(layer, *inputs))):
        assert each.all()


@each_value
def test_a_task_without_samples_reaches_nothing_by_channel(value: float, backend: Backend) -> None:
    x, tables = torch.randn(5, 4, 3, requires_grad=True), [torch.randn(3, 4) for _ in "mvwb"]
    tables[1].abs_()
    for table in tables:
        table[1] = value
    mean, var, *parameters = tables
    for p in parameters:
        p.requires_grad_()
    results = [
        task_scale_shift(x, *parameters, IDS),
        task_batch_norm(x, IDS, *parameters, mean, var, training=False),
        task_batch_norm(x, IDS, *parameters, mean.clone(), var.clone(), training=True),
    ]
    for y in results:
        for each in (y, *torch.autograd.grad(y.square().sum(), [x, *parameters])):
            assert each.isfinite().all()


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@each_layer
def test_a_task_with_neither_weight_nor_delta_sees_zeros(layer: str, biased: bool, backend: Backend) -> None:
    x, bias = torch.randn(SHAPES[layer][0], requires_grad=True), torch.randn(3, 6) if biased else None
    deltas = deltas_of(layer, False)
    y = by_task(layer, x, None, [None, None, deltas[2]], None, bias)
    assert torch.equal(y[of_task(2)], by_task(layer, x, None, deltas, None, bias)[of_task(2)])
    # the channels last: that is where those of linear layers are
    without = (y.movedim(1, -1) if layer.startswith("conv") else y)[of_task(0)]
    assert torch.equal(without, (torch.zeros(6) if bias is None else bias[0]).expand_as(without))
    (grad_x,) = torch.autograd.grad(y.square().sum(), [x])
    assert not grad_x[of_task(0)].any() and grad_x[of_task(2)].any()
