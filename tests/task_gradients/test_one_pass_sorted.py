"""`one_pass(..., sort=True)`: a batch in the order of its tasks has the rows of the batch as it came."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases_one_pass import IDS, LABELS, N, T, assert_rows, expected_rows, make
from torch import Tensor, nn

import fastmtl


def _net() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5)).double(), torch.randn(N, 6, dtype=torch.float64)


@pytest.mark.parametrize(
    "name", ["mlp", "conv, group norm", "conv channels last", "encoder", "layer norm, rms norm", "lstm"]
)
def test_rows_equal_a_backward_pass_per_task(name: str) -> None:
    case, model, x = make(name)
    model.eval()  # dropout draws by position
    rows = expected_rows(case, model, x)
    with fastmtl.one_pass(model, IDS, T, batch_dim=case.batch_dim, sort=True, **case.arguments) as bank:
        out = model(bank.sorted(x))
        F.cross_entropy(out, bank.sorted(LABELS, dim=0)).mul(N).backward()
    assert_rows(bank, rows)


def test_streamed_equals_banked() -> None:
    model, x = _net()
    order, ids = torch.tensor([[0, 1, 2], [2, 1, 0], [1, 0, 2]]), IDS.clone()
    ids[3] = -1  # of no task: added as it is
    found = []
    for arguments in ({"sort": True}, {"sort": True, "memory": "stream"}, {}):
        other = copy.deepcopy(model)
        with fastmtl.one_pass(other, ids, T, **arguments) as bank:
            a, b = bank.sorted(x, LABELS) if arguments else (x, LABELS)
            F.cross_entropy(other(a), b).backward()
        bank.apply(fastmtl.methods.PCGrad(order=order))
        found.append([p.grad for p in other.parameters()])
    for some in found[:2]:
        for a, b in zip(some, found[2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_samples_of_a_task_keep_their_order() -> None:
    model, _ = _net()
    ids = torch.tensor([2, -1, 0, 2, 0, -1, 2, 0])
    with fastmtl.one_pass(model, ids, T, sort=True) as bank:
        places, sorted_ids = bank.sorted(torch.arange(N), ids)
        columns = bank.sorted(torch.arange(2 * N).view(2, N), dim=1)
        assert bank.sorted(places) is places
    assert places.tolist() == [2, 4, 7, 0, 3, 6, 1, 5]
    assert sorted_ids.tolist() == [0, 0, 0, 2, 2, 2, -1, -1]
    assert columns.tolist() == [places.tolist(), (places + N).tolist()]


def test_a_batch_in_order_is_not_copied() -> None:
    model, x = _net()
    with fastmtl.one_pass(model, IDS.sort().values, T, sort=True) as bank:
        assert bank.sorted(x) is x
        F.cross_entropy(model(x), LABELS).backward()  # what did not go through it is in order, too
    assert all(g is not None for g in bank.row(0))


def test_what_is_made_inside_goes_through_it_with_its_graph() -> None:
    """Sorted behind the first layer: the gradients of that layer are in the order of the batch."""
    model, x = _net()
    losses = F.cross_entropy(model(x), LABELS, reduction="none")
    with fastmtl.one_pass(model, IDS, T, sort=True) as bank:
        out = model[1:](bank.sorted(model[0](x)))
        F.cross_entropy(out, bank.sorted(LABELS), reduction="sum").backward()
    for t in range(T):
        expected = torch.autograd.grad(losses[t == IDS].sum(), [*model.parameters()], retain_graph=True)
        for got, g in zip(bank.row(t), expected, strict=True):
            torch.testing.assert_close(got, g, rtol=1e-9, atol=1e-12)


def test_sorted_meets_unsorted() -> None:
    """Labels that were forgotten raise; they would be those of other samples."""
    model, x = _net()
    with (
        fastmtl.one_pass(model, IDS, T, sort=True) as bank,
        pytest.raises(ValueError, match="cross_entropy joins samples in the order of bank"),
    ):
        F.cross_entropy(model(bank.sorted(x)), LABELS)


X = torch.ones(N, 6, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda bank: bank.sorted(), TypeError, "tensors: expected at least one"),
        (lambda bank: bank.sorted([1, 2]), TypeError, "x: expected a tensor, got list"),
        (lambda bank: bank.sorted(X[:5]), ValueError, f"dim: expected a dimension of {N} samples, got 5 in"),
        (lambda bank: bank.sorted(torch.tensor(1.0)), ValueError, r"dim: expected a dimension of a tensor .*\[\]"),
        (lambda bank: bank.sorted(X, dim=2), ValueError, "dim: expected a dimension of a tensor of shape"),
        (lambda bank: bank.sorted(X, dim=1.0), TypeError, "dim: expected an int, got float"),
        (lambda bank: bank.sorted(X, X[:, 0], dim=1), ValueError, f"dim: expected a dimension of {N} samples, got 6"),
        (lambda bank: bank.sorted(X[torch.tensor([7, 1, 2, 3, 4, 5, 6, 0])]), ValueError, "another order"),
    ],
    ids=["nothing", "list", "length", "number", "no such dimension", "dimension", "second", "order"],
)
def test_bad_input(call: Callable[[Any], Any], error: type[Exception], match: str) -> None:
    model, _ = _net()
    with fastmtl.one_pass(model, IDS, T, sort=True) as bank, pytest.raises(error, match=match):
        call(bank)


def test_where_it_is_not_to_be_called() -> None:
    model, x = _net()
    with pytest.raises(TypeError, match="sort: expected a bool, got int"):
        fastmtl.one_pass(model, IDS, T, sort=1)
    with fastmtl.one_pass(model, IDS, T) as bank, pytest.raises(RuntimeError, match="expected a block of one_pass"):
        bank.sorted(x)
    with fastmtl.one_pass(model, IDS, T, sort=True) as bank:
        F.cross_entropy(model(bank.sorted(x)), bank.sorted(LABELS)).backward()
    with pytest.raises(RuntimeError, match=r"OnePassBank\.sorted: call it inside the one_pass block"):
        bank.sorted(x)


def test_a_parameter_that_was_used_unseen() -> None:
    model, x = _net()
    before = model[0](x)
    with (
        fastmtl.one_pass(model, IDS, T, sort=True) as bank,
        pytest.raises(ValueError, match=r"'0\.weight'.* was used on the way"),
    ):
        bank.sorted(before)
