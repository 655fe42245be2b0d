"""`Krum`: against the scores written out, TorchJD's numbers, and what its tasks may be."""

from __future__ import annotations

import pytest
import torch
from conftest import Backend
from torch import Tensor

from fastmtl import methods, ops

F64 = torch.float64


def gradients(num_tasks: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(100 * num_tasks + seed)
    g = torch.randn(num_tasks, 7, dtype=F64, generator=generator)
    return g * (3 * torch.rand(num_tasks, 1, dtype=F64, generator=generator))


def selected(g: Tensor, byzantine: int, count: int, squared: bool) -> list[int]:
    """From the vectors themselves."""
    scores = []
    for i in range(len(g)):
        distances = sorted((g[i] - g[k]).norm().item() ** (2 if squared else 1) for k in range(len(g)) if k != i)
        scores.append(sum(distances[: len(g) - byzantine - 2]))
    return sorted(sorted(range(len(g)), key=lambda i: scores[i])[:count])


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize(
    ("num_tasks", "byzantine", "count"), [(3, 0, 1), (5, 2, 5), (8, 1, 3), (20, 6, 4), (64, 20, 7)]
)
def test_the_lowest_scores(num_tasks: int, byzantine: int, count: int, squared: bool, backend: Backend) -> None:
    for seed in range(5):
        g = gradients(num_tasks, seed)
        w = methods.Krum(byzantine, count, squared=squared).weights(g @ g.mT)
        expected = torch.zeros(num_tasks, dtype=F64)
        expected[selected(g, byzantine, count, squared)] = 1 / count
        torch.testing.assert_close(w, expected, rtol=1e-15, atol=0.0)


@pytest.mark.parametrize("num_tasks", [4, 7, 12])
def test_torchjd(num_tasks: int, backend: Backend) -> None:
    """It sums distances, and not their squares."""
    jd = pytest.importorskip("torchjd.aggregation")
    for seed in range(5):
        g = gradients(num_tasks, seed)
        expected = jd.KrumWeighting(1, 2)(g @ g.mT)
        torch.testing.assert_close(methods.Krum(1, 2, squared=False).weights(g @ g.mT), expected, rtol=1e-15, atol=0.0)


def test_a_wrong_gradient_is_not_selected(backend: Backend) -> None:
    g = torch.ones(9, 5, dtype=F64) + 0.1 * gradients(9)[:, :5]
    for wrong in (-100.0, 1e6):
        g[4] = wrong
        assert methods.Krum(1, 3).weights(g @ g.mT)[4] == 0


def test_equal_gradients_are_taken_in_order(backend: Backend) -> None:
    g = torch.ones(5, 3, dtype=F64)
    assert methods.Krum(1, 2).weights(g @ g.mT).tolist() == [0.5, 0.5, 0.0, 0.0, 0.0]


def test_absent_tasks_are_not_in_the_problem(backend: Backend) -> None:
    g = gradients(8)
    present = torch.tensor([True, False, True, True, True, False, True, True])
    m = g @ g.mT
    m[1], m[:, 5] = torch.nan, torch.inf
    method = methods.Krum(1, 3)
    w = method.weights(m, present=present)
    assert (w[~present] == 0).all()
    torch.testing.assert_close(w[present], method.weights(g[present] @ g[present].mT), rtol=1e-15, atol=0.0)
    # of three that are left each has one neighbour at least; of two, each other
    for here in ([0, 3, 6], [2, 4], [7]):
        present = torch.zeros(8, dtype=torch.bool)
        present[here] = True
        w = methods.Krum(2, 2).weights(m, present=present)
        assert w.sum() == 1 and (w > 0).sum() == min(2, len(here)) and (w[~present] == 0).all()


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scale_and_permutation(scale: float, backend: Backend) -> None:
    g, method = gradients(9), methods.Krum(2, 3)
    w = method.weights(g @ g.mT)
    assert torch.equal(method.weights((scale * g) @ (scale * g).mT), w)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    assert torch.equal(method.weights(g[order] @ g[order].mT), w[order])


def test_what_is_not_finite_shows(backend: Backend) -> None:
    m = torch.eye(4, dtype=F64)
    m[1, 2] = torch.nan
    assert methods.Krum().weights(m).isnan().all()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="byzantine: expected an integer from 0, got -1"):
        methods.Krum(-1)
    with pytest.raises(ValueError, match="selected: expected an integer from 1, got 0"):
        methods.Krum(1, 0)
    with pytest.raises(TypeError, match="byzantine: expected an integer, got float"):
        methods.Krum(1.0)
    with pytest.raises(ValueError, match=r"gram: Krum\(byzantine=2, .*\) needs at least 5 tasks, got 4"):
        methods.Krum(2).weights(torch.eye(4))
    assert methods.Krum().weights(torch.eye(2)).tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="needs at least 6 tasks, got 4"):
        methods.Krum(0, 6).weights(torch.eye(4))
    with pytest.raises(ValueError, match="krum takes 3 numbers"):
        ops.method_weights(torch.eye(4), "krum", [1.0])
