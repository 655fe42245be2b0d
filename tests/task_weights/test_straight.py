"""Eager calls of `task_linear` and `task_conv2d` past their ops: the same values, wherever they may be made."""

from __future__ import annotations

from typing import Any

import cases_task as table
import pytest
import torch
from cases_task import BF16, F64, GEOMETRIES, ConvCase, LinearCase, TaskCase
from conftest import Backend
from torch import Tensor

from fastmtl import ops
from fastmtl.core import dispatch
from fastmtl.ops import task_plan
from fastmtl.ops.task_weights import straight as straight_calls
from fastmtl.ops.task_weights.cpu.ways import watching
from fastmtl.tuning.search import use_table
from fastmtl.tuning.table import PRODUCTS, Limits, uniform

pytestmark = pytest.mark.skipif(dispatch.extension is None, reason="without the extension there is no other way")

LAYERS: list[TaskCase] = [
    LinearCase(leading=(6,)),
    LinearCase(leading=(3, 4), ids_dims=2, cin=70),
    LinearCase(leading=(6, 3), cin=64, cout=13, weight_layout="contiguous"),
    ConvCase(size=(3, 3)),
    ConvCase(kernel=(1, 1), padding=0, size=(2, 4), x_layout="channels_last"),
    ConvCase(**GEOMETRIES["k3_s2"], x_layout="channels_last", weight_layout="channels_last", cin=20),
]
TASKS = [
    {"ids": "turns"},
    {"ids": "absent", "num_tasks": 5, "gate": "values", "bias": "shared"},
    {"ids": "random", "num_tasks": 4, "gate": "zeros", "bias": "per_task"},
    {"ids": "turns", "num_tasks": 4, "gate": "zeros", "delta": "nones", "bias": "shared", "ids_dtype": torch.int32},
    {"ids": "runs", "gate": "closed"},
    {"ids": "runs", "delta": "stacked", "gate": "zeros"},
    {"ids": "turns", "delta": None, "bias": "per_task"},
    {"ids": "turns", "shared": False, "gate": "values"},
    {"ids": "turns", "shared": False, "delta": "stacked"},
]
CASES = [layer.but(**tasks) for layer in LAYERS for tasks in TASKS]
# a stack in the order of a channels_last filter is the op's
CASES = [c for c in CASES if not (c.weight_layout == "channels_last" and c.delta == "stacked" and c.shared)]


class Spied:
    """The extension, which writes down whether it served a layer's gradients."""

    def __init__(self, extension: Any, answers: list[bool]) -> None:
        self.extension, self.answers = extension, answers

    def __getattr__(self, name: str) -> Any:
        return getattr(self.extension, name)

    def task_conv_few_backward(self, *args: Any) -> bool:
        self.answers.append(self.extension.task_conv_few_backward(*args))
        return self.answers[-1]


def is_straight(y: Tensor) -> bool:
    return "Few" in y.grad_fn.name()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_the_op(case: TaskCase) -> None:
    made, want = case.make().leaves(), table.expected(case)
    y = case.run(made)
    assert is_straight(y)
    found = table.gradients(y, made)
    table.assert_result(case, y, want)
    table.assert_gradients(case, made, found, want)
    with torch.no_grad():
        assert torch.equal(case.run(made, task_plan(made.task_ids, case.num_tasks)), y)
    op = table.by_op(case, made)
    assert not is_straight(op) and op.stride() == y.stride()
    of_op = table.gradients(op, made)
    for name, grad in found.items():
        assert (grad is None) == (of_op[name] is None), name
        assert grad is None or grad.stride() == of_op[name].stride(), name
    # it is the same product
    assert torch.equal(op, y)


@pytest.mark.parametrize("layer", [LAYERS[0], LAYERS[3]], ids=["linear", "conv"])
def test_second_derivatives_are_those_of_the_op(layer: TaskCase) -> None:
    case = layer.but(gate="values", bias="per_task")
    made = case.make().leaves()
    inputs = [p for p in made.named().values() if p is not None]

    def second(y: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))

    y = case.run(made)
    assert is_straight(y)
    torch.testing.assert_close(second(y), second(table.by_op(case, made)))


@pytest.mark.parametrize("layer", [LAYERS[0], LAYERS[4]], ids=["linear", "conv"])
def test_a_limit_of_rows_sends_it_to_the_op(layer: TaskCase) -> None:
    case = layer.but(gate="zeros", ids="turns")
    made, want = case.make().leaves(), table.expected(case)
    direct, never = uniform(Limits(None, 0)), uniform(Limits(0, 0))
    with use_table(direct._replace(limits=direct.limits | {"input_gradient": never.limits["input_gradient"]})):
        y = case.run(made)
        assert is_straight(y)
        table.assert_gradients(case, made, table.gradients(y, made), want)
    with use_table(never):
        y = case.run(made)
        assert not is_straight(y)
        table.assert_result(case, y, want)


@pytest.mark.parametrize(
    ("samples", "gate", "straight"),
    [
        ([4, 4, 12], None, True),
        ([4, 4, 13], None, False),
        ([4, 12], None, False),
        ([5, 5], None, False),
        # those that see W alone are one segment
        ([4, 4, 6, 6], [1.0, 1.0, 0.0, 0.0], True),
        ([4, 4, 6, 7], [1.0, 1.0, 0.0, 0.0], False),
        ([0, 4, 4, 12], None, True),
    ],
)
@pytest.mark.parametrize("product", PRODUCTS)
def test_segments_beside_others_as_in_the_op(
    product: str, samples: list[int], gate: list[float] | None, straight: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is stretched for what is served beside segments below it, forward and backward."""
    ids = torch.arange(len(samples)).repeat_interleave(torch.tensor(samples))
    x, weight = torch.randn(len(ids), 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    deltas = [torch.randn(4, 8, requires_grad=True) for _ in samples]
    gates = None if gate is None else torch.tensor(gate)
    table = uniform(Limits(None, 0))
    with use_table(table._replace(limits=table.limits | {product: uniform(Limits(4, 0)).limits[product]})):
        y = ops.task_linear(x, weight, deltas, ids, gate=gates)
        with watching() as taken:
            of_op = ops.task_linear(x, weight, deltas, ids, gate=gates)
            of_op.sum().backward()
        assert is_straight(y) == (straight or product != "forward")
        answers: list[bool] = []
        few = Spied(dispatch.extension, answers)
        monkeypatch.setattr(straight_calls, "extension", few)
        y.sum().backward()
    if product != "forward":
        # samples that see W alone have no weight gradient of their own: the limit is that of one segment for them
        assert answers == [straight and not (gate is not None and product == "weight_gradient")]
    # backward, the op makes dx and dW of those that see W alone in one call of torch's
    if gate is None or product == "forward":
        assert ({way for of, way in taken if of == product} == {"direct"}) == straight
    assert torch.equal(y, of_op)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": F64},
        {"dtype": BF16, "weight_dtype": torch.float32},
        {"x_layout": "sliced"},
        {"weight_layout": "transposed"},
        {"delta": "stacked_sliced"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
@pytest.mark.parametrize("layer", [LAYERS[0], LAYERS[3]], ids=["linear", "conv"])
def test_what_is_left_to_the_op(layer: TaskCase, changes: dict[str, object]) -> None:
    case = layer.but(**changes)
    made, want = case.make().leaves(), table.expected(case)
    y = case.run(made)
    assert not is_straight(y)
    table.assert_result(case, y, want)


def test_other_backends_are_asked_through_the_op(backend: Backend) -> None:
    case = LAYERS[0]
    made = case.make().leaves()
    y = case.run(made)
    assert is_straight(y) == (backend.name == "cpu")
    table.assert_result(case, y, table.expected(case))


def test_gradient_of_a_sum() -> None:
    """It is one number, seen everywhere."""
    case = LAYERS[0].but(gate="values")
    made = case.make().leaves()
    case.run(made).sum().backward()
    found = {name: p.grad for name, p in made.named().items()}
    want = torch.autograd.grad(table.by_op(case, made).sum(), list(made.named().values()), allow_unused=True)
    torch.testing.assert_close(list(found.values()), list(want))


def negated(like: Tensor) -> Tensor:
    """These values, in memory without gaps that holds their negatives."""
    held = torch.complex(torch.zeros(2, like.numel()), -like.detach().flatten().repeat(2, 1))
    held.imag.as_strided((like.numel(),), (1,)).copy_(-like.detach().flatten())
    found = held.conj().imag.as_strided(like.shape, like.stride())
    assert found.is_neg() and torch.equal(found, like)
    return found


@pytest.mark.parametrize("layer", [LAYERS[0], LAYERS[3]], ids=["linear", "conv"])
def test_numbers_that_memory_holds_as_their_negatives(layer: TaskCase) -> None:
    made = layer.make().leaves()
    y = layer.run(made)
    grad = torch.randn_like(y)
    want, found = (torch.autograd.grad(y, [made.x, made.weight], g, retain_graph=True) for g in (grad, negated(grad)))
    torch.testing.assert_close(found, want)
    made.x = negated(made.x)
    torch.testing.assert_close(layer.run(made), y)
