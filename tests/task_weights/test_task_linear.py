"""`task_linear`: values and every gradient, rows and packed sequences."""

from __future__ import annotations

import cases_task as table
import pytest
import torch
import torch.nn.functional as F
from cases_task import BF16, F32, F64, LINEAR_CASES, LinearCase, Made
from conftest import Backend
from torch import Tensor

from fastmtl.ops import task_conv2d, task_linear, task_plan


def row_by_row(case: LinearCase, made: Made) -> Tensor:
    """Every sample alone, through `F.linear`."""
    rows = []
    for t, x in zip(made.task_ids.flatten().tolist(), made.x.flatten(0, case.ids_dims - 1), strict=True):
        delta = None if made.delta is None else made.delta[t]
        if delta is not None and made.gate is not None:
            delta = made.gate[t] * delta
        parts = [w for w in (made.weight, delta) if w is not None] or [made.x.new_zeros(case.cout, case.cin)]
        bias = made.bias if made.bias is None or made.bias.dim() == 1 else made.bias[t]
        rows.append(F.linear(x, sum(parts[1:], parts[0]), bias))
    return torch.stack(rows).reshape(case.out_shape) if rows else made.x.new_zeros(case.out_shape)


_ONE_DTYPE = list(dict.fromkeys(case.but(dtype=F64, weight_dtype=None) for case in LINEAR_CASES))


@pytest.mark.parametrize("case", _ONE_DTYPE, ids=str)
def test_oracle(case: LinearCase) -> None:
    """The oracle itself: a loop over samples and autograd."""
    made = case.make().leaves()
    y, named = row_by_row(case, made), made.named()
    want = table.expected_of(case, made)
    torch.testing.assert_close(want.y, y, rtol=1e-12, atol=1e-12)
    if not y.requires_grad:
        assert case.leading[0] == 0
        return
    found = torch.autograd.grad(y, list(named.values()), made.grad_out.detach(), allow_unused=True)
    for (name, parameter), g in zip(named.items(), found, strict=True):
        g = torch.zeros_like(parameter) if g is None else g
        torch.testing.assert_close(want.grads[name], g, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_values_and_gradients(case: LinearCase, backend: Backend) -> None:
    made = case.make().leaves()
    before = made.map(lambda x: x.detach().clone())
    y = case.run(made)
    want = table.expected(case)
    table.assert_result(case, y, want)
    found = table.gradients(y, made)
    table.assert_gradients(case, made, found, want)
    assert y.is_contiguous() and found["x"].is_contiguous(), (y.stride(), found["x"].stride())
    for name, g in found.items():
        if g is not None:
            table.assert_dense(g, name)
    table.assert_own_memory({"y": y, **{f"grad {n}": g for n, g in found.items()}}, made.named())
    for (name, x), old in zip(made.named().items(), before.named().values(), strict=True):
        assert torch.equal(x, old), f"{name} was written to"


@pytest.mark.parametrize("ids", ["random", "sorted", "runs"])
def test_packed_equals_flat(ids: str, backend: Backend) -> None:
    """Ids `[N, L]` are those of the N L rows."""
    case = LinearCase(leading=(4, 5), ids_dims=2, ids=ids, gate="values", bias="per_task")
    made = case.make()
    y = case.run(made)
    flat = task_linear(
        made.x.flatten(0, 1), made.weight, made.delta, made.task_ids.flatten(), gate=made.gate, bias=made.bias
    )
    assert torch.equal(y.flatten(0, 1), flat)


def test_ids_of_samples_hold_for_all_their_rows(backend: Backend) -> None:
    case = LinearCase(leading=(4, 5), ids_dims=1, gate="values", bias="per_task")
    made = case.make()
    packed = made.task_ids[:, None].expand(4, 5)
    again = task_linear(made.x, made.weight, made.delta, packed, gate=made.gate, bias=made.bias)
    torch.testing.assert_close(case.run(made), again, rtol=1e-5, atol=1e-5)


def test_is_a_1x1_convolution(backend: Backend) -> None:
    case = LinearCase(leading=(6,), dtype=F64, gate="zeros", bias="per_task")
    made = case.make()
    filters = [d[..., None, None] for d in made.delta]
    images = made.x[..., None, None]
    y = task_conv2d(images, made.weight[..., None, None], filters, made.task_ids, gate=made.gate, bias=made.bias)
    torch.testing.assert_close(case.run(made), y[..., 0, 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ids_dims", [1, 2])
def test_plan_equals_ids(ids_dims: int, backend: Backend) -> None:
    case = LinearCase(leading=(5, 3), ids_dims=ids_dims, gate="zeros", bias="per_task")
    made = case.make().leaves()
    plan = task_plan(made.task_ids, case.num_tasks)
    y, planned = case.run(made), case.run(made, plan)
    assert torch.equal(y, planned)
    a, b = table.gradients(y, made), table.gradients(planned, made)
    assert all((a[n] is None and b[n] is None) or torch.equal(a[n], b[n]) for n in a)


def test_no_task_anywhere_is_a_plain_layer(backend: Backend) -> None:
    case = LinearCase(delta=None, bias="shared", dtype=BF16, weight_dtype=F32)
    made = case.make()
    assert torch.equal(case.run(made), F.linear(made.x, made.weight.bfloat16(), made.bias.bfloat16()))


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_non_finite_delta_shows_in_its_task_only(kind: str, backend: Backend) -> None:
    case = LinearCase(leading=(9,), ids="turns", delta="stacked", gate="values")
    made = case.make().leaves()
    with torch.no_grad():
        made.delta[1] = float(kind)
    y = case.run(made)
    own = made.task_ids == 1
    assert not torch.isfinite(y[own]).any() and torch.isfinite(y[~own]).all()
    found = table.gradients(y, made)
    assert not torch.isfinite(found["x"][own]).any() and torch.isfinite(found["x"][~own]).all()
    assert torch.isfinite(found["weight"]).all() and torch.isfinite(found["delta"]).all()


@pytest.mark.parametrize("delta", ["none", "list", "stacked"])
@pytest.mark.parametrize("per_task", [False, True])
def test_no_columns_leave_the_bias(delta: str, per_task: bool, backend: Backend) -> None:
    x, ids = torch.empty(5, 2, 0, requires_grad=True), torch.tensor([0, 2, 2, 0, 2])
    weight, bias = torch.empty(4, 0, requires_grad=True), torch.randn(*([3] if per_task else []), 4, requires_grad=True)
    deltas = {"none": None, "list": [None, torch.empty(4, 0), torch.empty(4, 0)], "stacked": torch.empty(3, 4, 0)}
    y = task_linear(x, weight, deltas[delta], ids, bias=bias)
    want = (bias[ids] if per_task else bias.expand(5, 4))[:, None].expand(5, 2, 4)
    assert torch.equal(y, want)
    grad = torch.randn(5, 2, 4)
    found = torch.autograd.grad(y, [x, weight, bias], grad)
    assert [g.shape for g in found] == [x.shape, weight.shape, bias.shape]
    torch.testing.assert_close(found[2], torch.autograd.grad(want, bias, grad)[0])
