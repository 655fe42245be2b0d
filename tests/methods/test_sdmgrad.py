"""`SDMGrad`: its steps written out, where they lead, the weights that it keeps, and TorchJD's numbers."""

from __future__ import annotations

import io

import pytest
import torch
from conftest import Backend
from torch import Tensor

import fastmtl
from fastmtl import methods, ops
from fastmtl.methods import Seen

F64 = torch.float64


def two_batches(num_tasks: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gradients of two batches, `[T, P]` each: alike, and with noise of their own."""
    generator = torch.Generator().manual_seed(100 * num_tasks + seed)
    g, *noise = torch.randn(3, num_tasks, 2 * num_tasks + 3, dtype=F64, generator=generator)
    g = (g - 0.7 * g.mean(0)) * (1 + torch.arange(num_tasks, dtype=F64)[:, None] % 3)
    return g + 0.3 * noise[0], g + 0.3 * noise[1]


def seen_of(second: Tensor, present: list[bool] | Tensor | None = None) -> Seen:
    num_tasks = len(second)
    here = [True] * num_tasks if present is None else present
    return Seen([str(t) for t in range(num_tasks)], here, second=second)


def on_simplex(v: Tensor) -> Tensor:
    """By bisection of the shift."""
    low, high = v.max() - 1, v.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (v - middle).clamp(min=0).sum() > 1 else (low, middle)
    return (v - low).clamp(min=0)


@pytest.mark.parametrize("num_tasks", [1, 2, 5, 20, 64])
@pytest.mark.parametrize(("lr", "momentum", "lambda_"), [(0.05, 0.0, 0.0), (0.05, 0.5, 0.3), (10.0, 0.5, 1.5)])
def test_steps(num_tasks: int, lr: float, momentum: float, lambda_: float, backend: Backend) -> None:
    preferences = 1.0 + torch.arange(num_tasks, dtype=F64)
    method = methods.SDMGrad(lr, momentum, 7, lambda_, preferences)
    wanted, w = preferences / preferences.sum(), torch.full((num_tasks,), 1 / num_tasks, dtype=F64)
    for step in range(3):
        g, other = two_batches(num_tasks, step)
        a, moving = g @ other.mT, torch.zeros_like(w)
        size = a.diagonal().clamp(min=0).sqrt().mean()
        for _ in range(7):
            moving = momentum * moving + a / size**2 @ (w + lambda_ * wanted)
            w = on_simplex(w - lr * moving)
        found = method.weigh(g @ g.mT, seen_of(a))
        torch.testing.assert_close(found, (w + lambda_ * wanted) / (1 + lambda_), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(method.state_dict()["weights"], w, rtol=1e-6, atol=1e-9)


def test_many_small_steps_lead_to_the_shortest_combination(backend: Backend) -> None:
    """With one batch twice and no preferred direction: MGDA."""
    g, _ = two_batches(5)
    m = g @ g.mT
    w = methods.SDMGrad(0.1, 0.0, 5000, 0.0).weigh(m, seen_of(m))
    torch.testing.assert_close(w, methods.MGDA().weights(m), rtol=0.0, atol=1e-6)


def test_a_large_lambda_is_the_preferred_direction(backend: Backend) -> None:
    g, other = two_batches(3)
    w = methods.SDMGrad(lambda_=1e9, preferences=[3.0, 1.0, 0.0]).weigh(g @ g.mT, seen_of(g @ other.mT))
    torch.testing.assert_close(w, torch.tensor([0.75, 0.25, 0.0], dtype=F64), rtol=0.0, atol=1e-8)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scale_and_permutation(scale: float, backend: Backend) -> None:
    g, other = two_batches(6)
    w = methods.SDMGrad(0.1).weigh(g @ g.mT, seen_of(g @ other.mT))
    found = methods.SDMGrad(0.1).weigh(scale**2 * g @ g.mT, seen_of(scale**2 * g @ other.mT))
    torch.testing.assert_close(found, w, rtol=1e-10, atol=1e-12)
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    found = methods.SDMGrad(0.1).weigh(g[order] @ g[order].mT, seen_of(g[order] @ other[order].mT))
    torch.testing.assert_close(found, w[order], rtol=1e-10, atol=1e-12)


def test_weights_stay_where_no_scale_is_known(backend: Backend) -> None:
    method = methods.SDMGrad()
    g, other = two_batches(3)
    method.weigh(g @ g.mT, seen_of(g @ other.mT))
    before = method.state_dict()["weights"]
    for second in (-torch.eye(3, dtype=F64), torch.zeros(3, 3, dtype=F64)):
        method.weigh(g @ g.mT, seen_of(second))
        torch.testing.assert_close(method.state_dict()["weights"], before, rtol=0.0, atol=1e-15)


def test_long_steps_stay_on_the_simplex(backend: Backend) -> None:
    """Where the diagonal is small beside the rest."""
    second = torch.tensor([[1e-20, 1.0, -2.0], [1.0, -1.0, 0.5], [-3.0, 0.5, -1.0]], dtype=F64)
    w = ops.method_weights(second, "sdmgrad", [10.0, 0.5, 20.0, 0.3])
    assert (w >= 0).all() and abs(w.sum() - 1) < 1e-12


def test_absent_tasks_and_tasks_that_come(backend: Backend) -> None:
    g, other = two_batches(5)
    a = g @ other.mT
    a[1], a[:, 1] = torch.nan, torch.inf
    here = [True, False, True, True, True]
    found = []
    for present in (here, torch.tensor(here)):
        method = methods.SDMGrad(0.1)
        w = method.weigh(g @ g.mT, seen_of(a, present))
        assert w[1] == 0 and method.state_dict()["weights"][1].isnan()
        found.append(w)
    assert torch.equal(*found)
    small = methods.SDMGrad(0.1).weigh(torch.eye(4), seen_of(g[here] @ other[here].mT))
    torch.testing.assert_close(found[0][here], small, rtol=1e-10, atol=1e-12)
    # the absent one comes: it starts at its share of all
    kept = method.state_dict()["weights"]
    start = torch.where(kept.isnan(), 0.2, kept)
    expected = ops.method_weights(g @ other.mT, "sdmgrad", [0.1, 0.5, 20, 0.3], per_task=start)
    method.weigh(g @ g.mT, seen_of(g @ other.mT))
    torch.testing.assert_close(method.state_dict()["weights"], expected, rtol=1e-10, atol=1e-12)


def test_state_is_saved_and_loaded(backend: Backend) -> None:
    method, other_method = methods.SDMGrad(0.1), methods.SDMGrad(0.1)
    g, other = two_batches(4)
    method.weigh(g @ g.mT, seen_of(g @ other.mT))
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    other_method.load_state_dict(torch.load(file, weights_only=True))
    g, other = two_batches(4, 1)
    expected = method.weigh(g @ g.mT, seen_of(g @ other.mT))
    assert torch.equal(other_method.weigh(g @ g.mT, seen_of(g @ other.mT)), expected)
    method.reset()
    fresh = methods.SDMGrad(0.1).weigh(g @ g.mT, seen_of(g @ other.mT))
    assert torch.equal(method.weigh(g @ g.mT, seen_of(g @ other.mT)), fresh) and not torch.equal(fresh, expected)


def test_a_step_that_overflows_shows_and_is_not_kept(backend: Backend) -> None:
    """Its weights were zeros, and these were kept."""
    method, one = methods.MoDo(gamma=1e10), torch.eye(2, dtype=F64)
    before = method.weigh(one, seen_of(one))
    second = torch.tensor([[1e200, -1e308], [1e308, 1e200]], dtype=F64)
    assert method.weigh(one, seen_of(second)).isnan().all()
    assert torch.equal(method.state_dict()["lambda"], before)


def test_what_is_not_finite_shows_and_is_not_kept(backend: Backend) -> None:
    method = methods.SDMGrad()
    g, other = two_batches(3)
    method.weigh(g @ g.mT, seen_of(g @ other.mT))
    before = method.state_dict()["weights"]
    for bad in (torch.nan, torch.inf):
        for first, second in ((bad, 1.0), (1.0, bad)):
            worse = [g.clone(), other.clone()]
            worse[0][1, 0] *= first
            worse[1][2, 0] *= second
            w = method.weigh(worse[0] @ worse[0].mT, seen_of(worse[0] @ worse[1].mT))
            assert w.isnan().all() and torch.equal(method.state_dict()["weights"], before)


@pytest.mark.parametrize("num_tasks", [2, 5, 12])
def test_torchjd(num_tasks: int, backend: Backend) -> None:
    jd = pytest.importorskip("torchjd.aggregation")
    for lr in (0.1, 10.0):
        preferences = torch.rand(num_tasks, dtype=F64, generator=torch.Generator().manual_seed(1))
        preferences /= preferences.sum()
        theirs = jd.SDMGradWeighting(lr=lr, pref_vector=preferences)
        ours = methods.SDMGrad(lr, preferences=preferences)
        for step in range(4):
            g, other = two_batches(num_tasks, step)
            expected = theirs(g @ other.mT)
            torch.testing.assert_close(ours.weigh(g @ g.mT, seen_of(g @ other.mT)), expected, rtol=0.0, atol=1e-6)


def test_backward_hands_it_two_batches() -> None:
    net = torch.nn.Linear(4, 3, dtype=F64)
    heads = [torch.nn.Linear(3, 1, dtype=F64) for _ in range(2)]
    batches = [torch.randn(2, 8, 4, dtype=F64, generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    losses = [[head(net(x).tanh()).square().mean() for head, x in zip(heads, batch, strict=True)] for batch in batches]
    shared = list(net.parameters())
    rows = [[torch.autograd.grad(loss, shared, retain_graph=True) for loss in some] for some in losses]
    grads = [torch.stack([torch.cat([x.flatten() for x in row]) for row in some]) for some in rows]
    method = methods.SDMGrad(0.1)
    fastmtl.backward(losses[0], net, second_losses=losses[1], method=method)
    w = methods.SDMGrad(0.1).weigh(grads[0] @ grads[0].mT, seen_of(grads[0] @ grads[1].mT))
    found = torch.cat([p.grad.flatten() for p in shared])
    torch.testing.assert_close(found, w @ grads[0], rtol=1e-9, atol=1e-12)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="lr: expected a positive number, got 0"):
        methods.SDMGrad(0.0)
    with pytest.raises(ValueError, match="momentum: expected a number from 0 to below 1, got 1"):
        methods.SDMGrad(momentum=1.0)
    with pytest.raises(ValueError, match="steps: expected an integer from 1 to 10000, got 0"):
        methods.SDMGrad(steps=0)
    with pytest.raises(ValueError, match="lambda_: expected a number from 0, got -1"):
        methods.SDMGrad(lambda_=-1.0)
    with pytest.raises(TypeError, match="method SDMGrad: needs the task gradients of a second, independent batch"):
        methods.SDMGrad().weights(torch.eye(2))
    with pytest.raises(ValueError, match="per_task: mgda takes none; pcd, sdmgrad, modo do"):
        ops.method_weights(torch.eye(2), "mgda", per_task=torch.ones(2))
    with pytest.raises(ValueError, match=r"per_task: expected shape \[2\], got \[3\]"):
        ops.method_weights(torch.eye(2), "sdmgrad", [1.0, 0.0, 1.0, 0.0], per_task=torch.ones(3))
