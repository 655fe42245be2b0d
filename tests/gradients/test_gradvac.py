"""`gradvac_coefficients`: against its oracle, the oracle against the paper's loop on vectors, and what is no cosine."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import random_order
from conftest import Backend
from torch import Tensor

from fastmtl.ops import gradvac_coefficients
from fastmtl.ops.gradients import reference

F64 = torch.float64
SIZES = (1, 2, 3, 8, 31, 33, 65, 128)


def bank(num_tasks: int, seed: int = 0) -> Tensor:
    """`[T, P]` float64: gradients that conflict."""
    generator = torch.Generator().manual_seed(100 * num_tasks + seed)
    g = torch.randn(num_tasks, 2 * num_tasks + 3, dtype=F64, generator=generator)
    return (g - 0.8 * g.mean(0)) * (1 + torch.arange(num_tasks, dtype=F64)[:, None] % 3)


def targets_of(num_tasks: int, largest: float = 0.6) -> Tensor:
    generator = torch.Generator().manual_seed(num_tasks)
    return (2 * torch.rand(num_tasks, num_tasks, dtype=F64, generator=generator) - 1) * largest


def assert_rows(found: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    scale = expected.nan_to_num().abs().amax(dim=1, keepdim=True).clamp(min=1.0)
    torch.testing.assert_close(found / scale, expected / scale, rtol=0.0, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("update", ["always", "triggered"])
@pytest.mark.parametrize("num_tasks", SIZES)
def test_coefficients(num_tasks: int, update: str, backend: Backend) -> None:
    g, targets = bank(num_tasks), targets_of(num_tasks)
    for order in (random_order(num_tasks), random_order(num_tasks, num_tasks + 5), random_order(num_tasks, 0)):
        c, moved = gradvac_coefficients(g @ g.mT, order, targets, 0.1, update=update)
        assert c.dtype == moved.dtype == F64 and c.shape == moved.shape == (num_tasks, num_tasks)
        expected, expected_moved = reference.gradvac_coefficients(g @ g.mT, order, targets, 0.1, update)
        assert_rows(c, expected)
        assert_rows(moved, expected_moved)


@pytest.mark.parametrize("num_tasks", [2, 3, 8, 20])
def test_the_papers_loop(num_tasks: int, backend: Backend) -> None:
    g, targets, order = bank(num_tasks), targets_of(num_tasks), random_order(num_tasks, num_tasks + 3)
    c, moved = gradvac_coefficients(g @ g.mT, order, targets, 0.1)
    turned, expected = reference.gradvac_loop(g, order, targets, 0.1)
    assert_rows(c @ g, turned, 1e-10)
    assert_rows(moved, expected, 1e-10)


def test_a_turned_gradient_has_the_target_as_its_cosine(backend: Backend) -> None:
    g = bank(6)
    for j in range(1, 6):
        order = torch.full((6, 1), j)
        for target in (-0.9, 0.0, 0.7, 0.999):
            c, _ = gradvac_coefficients(g @ g.mT, order, torch.full((6, 6), target, dtype=F64))
            for i in range(6):
                if i == j:
                    continue
                before = torch.cosine_similarity(g[i], g[j], dim=0)
                after = torch.cosine_similarity(c[i] @ g, g[j], dim=0)
                torch.testing.assert_close(after, before.clamp(min=target), rtol=0.0, atol=1e-10)


def test_targets_of_zero_are_pcgrad(backend: Backend) -> None:
    """A gradient that is turned to a cosine of 0 is projected."""
    g = bank(9)
    order = random_order(9)
    c, moved = gradvac_coefficients(g @ g.mT, order, torch.zeros(9, 9), 0.0)
    assert_rows(c, reference.pcgrad_coefficients(g @ g.mT, order))
    assert torch.equal(moved, torch.zeros(9, 9, dtype=F64))


def test_triggered_moves_only_targets_that_turn(backend: Backend) -> None:
    m = torch.tensor([[1.0, 0.5, -0.5], [0.5, 1.0, 0.0], [-0.5, 0.0, 1.0]], dtype=F64)
    order, targets = torch.tensor([[1, 2]] * 3), torch.zeros(3, 3)
    always = gradvac_coefficients(m, order, targets, 0.1)[1]
    triggered = gradvac_coefficients(m, order, targets, 0.1, update="triggered")[1]
    assert always[0].tolist() == pytest.approx([0.0, 0.05, -0.05])
    assert triggered[0].tolist() == pytest.approx([0.0, 0.0, -0.05])


@pytest.mark.parametrize("num_tasks", [4, 20, 40, 80])
def test_zero_gradients_are_not_met(num_tasks: int, backend: Backend) -> None:
    """Neither their coefficients nor their targets move, and the others are as without them."""
    g, targets, order = bank(num_tasks), targets_of(num_tasks), random_order(num_tasks)
    g[1] = 0.0
    c, moved = gradvac_coefficients(g @ g.mT, order, targets, 0.3)
    assert torch.equal(c[1], torch.eye(num_tasks, dtype=F64)[1]) and (c[:, 1].nonzero() == 1).all()
    assert torch.equal(moved[1], targets[1]) and torch.equal(moved[:, 1], targets[:, 1])
    here = torch.arange(num_tasks) != 1
    rest = torch.stack([row[row != 1] for row in order])[here]
    rest = rest - (rest > 1).to(rest.dtype)
    less = gradvac_coefficients((g @ g.mT)[here][:, here], rest, targets[here][:, here], 0.3)
    assert_rows(c[here][:, here], less[0])
    assert_rows(moved[here][:, here], less[1])


@pytest.mark.parametrize("num_tasks", [2, 8, 20, 40, 80])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_opposite_and_equal_gradients(num_tasks: int, dtype: torch.dtype, backend: Backend) -> None:
    """What rounding leaves of a gradient that has come to nothing is no direction, and equal ones stay as they are."""
    eps = torch.finfo(dtype).eps
    g = torch.ones(num_tasks, 3, dtype=dtype) * torch.tensor([0.1, 0.7, -0.3], dtype=dtype)
    g[1::2] *= -1
    order = torch.arange(num_tasks).expand(num_tasks, num_tasks)
    c, moved = gradvac_coefficients(g @ g.mT, order, torch.zeros(num_tasks, num_tasks), 0.5)
    turned = c @ g.double()
    assert (turned.abs() <= 20 * eps**0.5).all() and c.abs().max() < 10 and moved.abs().max() <= 0.5
    equal = g.abs()
    for target in (0.0, 0.9, 1.0):
        targets = torch.full((num_tasks, num_tasks), target, dtype=F64)
        c, moved = gradvac_coefficients(equal @ equal.mT, order, targets, 0.5)
        assert torch.equal(c, torch.eye(num_tasks, dtype=F64))
        expected = torch.where(torch.eye(num_tasks) == 1, targets, targets + 0.5 * (1 - targets))
        torch.testing.assert_close(moved, expected, rtol=0.0, atol=20 * eps)


def test_many_visits_of_opposite_gradients_end(backend: Backend) -> None:
    g = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.3, -1.0], [0.3, 1.0]], dtype=F64)
    order = torch.arange(4).repeat(4, 200)
    c, moved = gradvac_coefficients(g @ g.mT, order, torch.full((4, 4), 0.9), 0.01)
    assert c.isfinite().all() and moved.abs().max() <= 1.0


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e12, 1e120])
def test_scale(scale: float, backend: Backend) -> None:
    g, targets, order = bank(7), targets_of(7), random_order(7)
    expected = gradvac_coefficients(g @ g.mT, order, targets, 0.1)
    found = gradvac_coefficients((scale * g) @ (scale * g).mT, order, targets, 0.1)
    for x, y in zip(found, expected, strict=True):
        assert_rows(x, y)


@pytest.mark.parametrize("num_tasks", [4, 20, 40, 80])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows(num_tasks: int, bad: float, backend: Backend) -> None:
    """In the rows that meet it, and not in the targets."""
    g, targets = bank(num_tasks), targets_of(num_tasks)
    m = g @ g.mT
    m[2, :] = m[:, 2] = bad
    order = random_order(num_tasks)
    order[0] = 1  # does not meet it
    order[3, 0] = 0
    c, moved = gradvac_coefficients(m, order, targets, 0.1)
    assert c[1:].isnan().all() and torch.equal(moved[1:], targets[1:])
    assert c[0].isfinite().all() and moved[0].isfinite().all()
    expected = reference.gradvac_coefficients(m, order, targets, 0.1)
    assert_rows(c, expected[0])
    targets[0, 1] = torch.nan
    c, moved = gradvac_coefficients(g @ g.mT, order, targets, 0.1)
    assert c[0].isnan().all() and moved[0, 2:].equal(targets[0, 2:])


def test_other_dtypes_and_strides(backend: Backend) -> None:
    g, targets, order = bank(5), targets_of(5), random_order(5)
    expected = gradvac_coefficients(g @ g.mT, order, targets, 0.1)
    found = gradvac_coefficients((g @ g.mT).mT, order.to(torch.int32), targets.mT.contiguous().mT, 0.1)
    for x, y in zip(found, expected, strict=True):
        assert_rows(x, y)
    found = gradvac_coefficients((g @ g.mT).to(torch.float32), order, targets.to(torch.float32), 0.1)
    for x, y in zip(found, expected, strict=True):
        assert_rows(x, y, 1e-4)


def test_bad_arguments() -> None:
    m, order, targets = torch.eye(3), random_order(3), torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"beta: expected a number from 0 to 1, got 1\.5"):
        gradvac_coefficients(m, order, targets, 1.5)
    with pytest.raises(TypeError, match="beta: expected a number, got str"):
        gradvac_coefficients(m, order, targets, "0.1")
    with pytest.raises(ValueError, match="update: expected 'always' or 'triggered', got 'never'"):
        gradvac_coefficients(m, order, targets, update="never")
    with pytest.raises(ValueError, match=r"targets: expected shape \[3, 3\], got \[2, 2\]"):
        gradvac_coefficients(m, order, torch.zeros(2, 2))
    with pytest.raises(TypeError, match="targets: expected a floating-point tensor"):
        gradvac_coefficients(m, order, torch.zeros(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"order: expected entries in 0\.\.2, got 0\.\.3"):
        gradvac_coefficients(m, torch.tensor([[0], [3], [1]]), targets)
    with pytest.raises(ValueError, match=r"gram: expected a square \[T, T\] matrix"):
        gradvac_coefficients(torch.ones(2, 3), order, targets)


@pytest.mark.parametrize("num_tasks", [2, 5, 12])
def test_torchjd(num_tasks: int, backend: Backend) -> None:
    """Over several steps, with the orders that it draws. It adds an absolute eps to lengths and to square roots."""
    theirs = pytest.importorskip("torchjd.aggregation").GradVac(beta=0.2)
    targets = torch.zeros(num_tasks, num_tasks, dtype=F64)
    for step in range(4):
        g = bank(num_tasks, step)
        torch.manual_seed(step)
        expected = theirs(g)
        torch.manual_seed(step)
        order = torch.stack([torchjd_order(i, num_tasks) for i in range(num_tasks)])
        c, targets = gradvac_coefficients(g @ g.mT, order, targets, 0.2)
        torch.testing.assert_close(c.sum(0) @ g, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def torchjd_order(i: int, num_tasks: int) -> Tensor:
    others = torch.tensor([j for j in range(num_tasks) if j != i], dtype=torch.int64)
    return others[torch.randperm(num_tasks - 1)]


def test_opcheck_samples_cover_both_updates() -> None:
    assert {sample[4] for sample in cases.OPCHECK_SAMPLES["gradvac_coefficients"]()} == {"always", "triggered"}
