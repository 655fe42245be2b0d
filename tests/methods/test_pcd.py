"""`PCD`: the conditions of its quadratic program, its averages, special cases and TorchJD's numbers."""

from __future__ import annotations

import io

import pytest
import torch
from conftest import Backend
from test_gram_methods import HARD, REGULAR, gradients
from torch import Tensor

from fastmtl import methods, ops, use_backend
from fastmtl.methods import Seen

F64 = torch.float64


def assert_nearest(g: Tensor, w: Tensor, floors: Tensor, primary: int = 0) -> None:
    """w makes the d nearest to g_1 with `g_j . d >= floors_j |g_j|^2`, at the length of g_1, with multipliers >= 0."""
    update, others = w @ g, [j for j in range(len(g)) if j != primary]
    torch.testing.assert_close(update.norm(), g[primary].norm(), rtol=1e-8, atol=0.0)
    assert (w >= 0).all() and w[primary] > 0
    d, y = update / w[primary], w / w[primary]
    for j in others:
        length = g[j].norm()
        if length == 0:
            continue
        # in units of the lengths, and of what the multipliers add up to
        size = g[primary].norm() + (y * g.norm(dim=1)).sum() + floors[j] * length
        slack = (g[j] @ d / length - floors[j] * length) / size
        assert slack >= -2e-9
        assert abs(slack * y[j] * length / size) <= 1e-9


@pytest.mark.parametrize("tau", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("kind", HARD)
def test_the_nearest_with_least_progress(kind: str, num_tasks: int, tau: float, backend: Backend) -> None:
    g = gradients(kind, num_tasks)
    m, scales = g @ g.mT, 1 / (1 + torch.arange(num_tasks, dtype=F64) % 4)
    w = ops.method_weights(m, "pcd", [0, tau], preferences=scales)
    with use_backend("reference"):
        expected = ops.method_weights(m, "pcd", [0, tau], preferences=scales)
    wrong = w - expected
    assert wrong @ m @ wrong <= 1e-14 * m[0, 0]
    solved = w.any() and not torch.equal(w, torch.eye(num_tasks, dtype=F64)[0])
    # dependent gradients may leave no direction; regular ones leave one
    if kind in REGULAR or solved:
        assert_nearest(g, w, tau * scales / scales[0])


@pytest.mark.parametrize("noise", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("num_tasks", [5, 30, 100])
def test_nearly_dependent_gradients(num_tasks: int, noise: float, backend: Backend) -> None:
    """In a plane but for noise, with a direction that serves all: constraints come and go many times."""
    if backend.name == "reference" and num_tasks == 100:
        pytest.skip("takes seconds")
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        g = torch.randn(num_tasks, 2, dtype=F64, generator=generator) @ torch.randn(
            2, 16, dtype=F64, generator=generator
        )
        g = g + noise * torch.randn(num_tasks, 16, dtype=F64, generator=generator)
        g = g + 2 * torch.randn(16, dtype=F64, generator=generator)
        unit = g / g.norm(dim=1, keepdim=True)
        w = ops.method_weights(unit @ unit.mT, "pcd", [0, 0.02])
        if w[1:].any():
            assert_nearest(unit, w, torch.full((num_tasks,), 0.02), 0)


def test_two_tasks(backend: Backend) -> None:
    """d = g_1 + y g_2 with `y = (tau |g_2|^2 - g_1 . g_2) / |g_2|^2` where that is positive."""
    m = torch.tensor([[4.0, -1.0], [-1.0, 1.0]], dtype=F64)
    y = 0.5 + 1.0
    length = (4 - 2 * y + y**2) ** 0.5
    w = ops.method_weights(m, "pcd", [0, 0.5])
    torch.testing.assert_close(w, torch.tensor([2 / length, 2 * y / length], dtype=F64), rtol=1e-12, atol=0.0)
    assert ops.method_weights(m.abs(), "pcd", [0, 0.5]).tolist() == [1.0, 0.0]
    # 1 is less than 0.5 * 4: the primary g_2 and a fourth of g_1
    w = ops.method_weights(m.abs(), "pcd", [1, 0.5])
    torch.testing.assert_close(w, torch.tensor([0.25, 1.0], dtype=F64) / 1.75**0.5, rtol=1e-12, atol=0.0)


def test_no_direction_for_all(backend: Backend) -> None:
    g = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=F64)
    assert ops.method_weights(g @ g.mT, "pcd", [0, 0.1]).tolist() == [1.0, 0.0, 0.0]
    g[0] = torch.tensor([1.0, 0.5])
    # without a least progress what is across both is left
    w = ops.method_weights(g @ g.mT, "pcd", [0, 0.0])
    torch.testing.assert_close(w @ g, torch.tensor([1.25**0.5, 0.0], dtype=F64), rtol=1e-12, atol=1e-12)
    # an opposite pair leaves nothing
    g = torch.tensor([[1.0, 0.0], [-2.0, 0.0]], dtype=F64)
    assert ops.method_weights(g @ g.mT, "pcd", [0, 0.0]).tolist() == [0.0, 0.0]
    # the primary gradient is zero; absent, it leaves its place to the next
    assert ops.method_weights(torch.eye(3).fill_diagonal_(0), "pcd", [0, 0.1]).tolist() == [0.0] * 3
    present = torch.tensor([False, True, True])
    m = torch.tensor([[1.0, 0.0, 0.0], [0.0, 4.0, -1.0], [0.0, -1.0, 1.0]])
    w = ops.method_weights(m, "pcd", [0, 0.5], present=present)
    assert w.tolist() == [0.0, *ops.method_weights(m[1:, 1:], "pcd", [0, 0.5]).tolist()]


def test_averages_over_steps(backend: Backend) -> None:
    method, squares, counted = methods.PCD(0.3, 0.8, eps=0.01, primary="2"), torch.zeros(4, dtype=F64), 0.0
    for step in range(5):
        g = gradients("lengths", 4, step)
        m = g @ g.mT
        squares, counted = 0.8 * squares + 0.2 * m.diagonal(), 0.8 * counted + 0.2
        scales = (squares / counted + 0.01).rsqrt()
        expected = ops.method_weights(m, "pcd", [2, 0.3], preferences=scales)
        torch.testing.assert_close(method.weights(m), expected, rtol=1e-9, atol=1e-12)
        assert_nearest(g, expected, 0.3 * scales / scales[2], primary=2)


def test_tau_by_name(backend: Backend) -> None:
    g = gradients("conflicting", 4)
    same = methods.PCD({"1": 0.3, "2": 0.3, "3": 0.3}).weights(g @ g.mT)
    torch.testing.assert_close(same, methods.PCD(0.3).weights(g @ g.mT), rtol=1e-10, atol=1e-12)
    # in unit gradients at the first step
    unit = g / g.norm(dim=1, keepdim=True)
    method = methods.PCD({"a": 0.9, "c": 0.5}, primary="b")
    w = method.weigh(unit @ unit.mT, Seen(["a", "b", "c", "d"], [True] * 4))
    assert_nearest(unit, w, torch.tensor([0.9, 0.0, 0.5, 0.0]), primary=1)


def test_state_is_kept_by_name(backend: Backend) -> None:
    method, m = methods.PCD(0.1, 0.5), torch.diag(torch.tensor([1.0, 4.0, 9.0], dtype=F64))
    method.weigh(m, Seen(["a", "b", "c"], [True] * 3))
    method.weigh(m, Seen(["a", "b", "c"], torch.tensor([True, False, True])))
    state = method.state_dict()
    torch.testing.assert_close(state["squares"] / state["counted"], m.diagonal())
    torch.testing.assert_close(state["counted"], torch.tensor([0.75, 0.5, 0.75], dtype=F64))
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = methods.PCD(0.1, 0.5)
    other.load_state_dict(torch.load(file, weights_only=True))
    g = gradients("conflicting", 3)
    seen = Seen(["c", "d", "a"], [True] * 3)
    assert torch.equal(other.weigh(g @ g.mT, seen), method.weigh(g @ g.mT, seen))
    method.reset()
    assert torch.equal(method.weights(g @ g.mT), methods.PCD(0.1, 0.5).weights(g @ g.mT))


def test_what_is_not_finite_shows_and_is_not_kept(backend: Backend) -> None:
    method, g = methods.PCD(0.1), gradients("conflicting", 3)
    method(g)
    before = method.state_dict()
    for bad in (torch.nan, torch.inf):
        worse = g.clone()
        worse[2, 3] = bad
        assert method(worse).isnan().all()
        after = method.state_dict()
        assert all(torch.equal(before[key], after[key]) for key in ("squares", "counted"))


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scale_and_permutation(scale: float, backend: Backend) -> None:
    g = gradients("conflicting", 7)
    w = methods.PCD(0.2).weights(g @ g.mT)
    found = methods.PCD(0.2).weights((scale * g) @ (scale * g).mT)
    torch.testing.assert_close(found, w, rtol=1e-9, atol=1e-12)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    found = methods.PCD(0.2, primary="1").weights(g[order] @ g[order].mT)
    torch.testing.assert_close(found, w[order], rtol=1e-9, atol=1e-12)


def test_absent_tasks_are_not_in_the_problem(backend: Backend) -> None:
    g = gradients("conflicting", 6)
    present = torch.tensor([True, False, True, True, False, True])
    m = g @ g.mT
    m[1], m[:, 4] = torch.nan, torch.inf
    w = methods.PCD(0.2).weights(m, present=present)
    assert (w[~present] == 0).all()
    torch.testing.assert_close(w[present], methods.PCD(0.2).weights(g[present] @ g[present].mT), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("num_tasks", [2, 5, 20])
@pytest.mark.parametrize("kind", ["ordinary", "conflicting", "lengths", "duplicates"])
def test_torchjd(kind: str, num_tasks: int, backend: Backend) -> None:
    theirs = pytest.importorskip("torchjd.aggregation").PCD(tau=0.1, beta=0.9, eps=1e-8)
    ours = methods.PCD(0.1, 0.9, eps=1e-8)
    for step in range(4):
        g = gradients(kind, num_tasks, step)
        expected = theirs(g)
        torch.testing.assert_close(ours(g), expected, rtol=1e-7, atol=1e-7 * expected.abs().max().item())


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="tau: expected a number from 0 to 1, got 2"):
        methods.PCD(2.0)
    with pytest.raises(TypeError, match="tau: expected a number, got list"):
        methods.PCD([0.1])
    with pytest.raises(ValueError, match=r"tau\['a'\]: expected a number from 0 to 1, got -1"):
        methods.PCD({"a": -1.0})
    with pytest.raises(ValueError, match="beta: expected a number from 0 to below 1, got 1"):
        methods.PCD(0.1, 1.0)
    with pytest.raises(ValueError, match="eps: expected a number from 0, got -1"):
        methods.PCD(eps=-1.0)
    with pytest.raises(TypeError, match="expected the name of a task, got int"):
        methods.PCD(primary=0)
    with pytest.raises(ValueError, match="primary: expected one of 0, 1, got 'x'"):
        methods.PCD(primary="x").weights(torch.eye(2))
