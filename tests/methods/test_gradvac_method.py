"""`GradVac`: its targets over several steps, by the tasks' names, and TorchJD's and LibMTL's variants."""

from __future__ import annotations

import io

import pytest
import torch
from conftest import Backend
from torch import Tensor

from fastmtl import methods, ops
from fastmtl.methods import Seen
from fastmtl.ops.gradients import reference

F64 = torch.float64


def gradients(num_tasks: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(100 * num_tasks + seed)
    g = torch.randn(num_tasks, 20, dtype=F64, generator=generator)
    return g - 0.8 * g.mean(0)


def order_of(num_tasks: int) -> Tensor:
    return ops.random_order(num_tasks, generator=torch.Generator().manual_seed(num_tasks))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_steps_follow_the_papers_loop(reduction: str, backend: Backend) -> None:
    method, targets = methods.GradVac(0.2, reduction, order=order_of(6)), torch.zeros(6, 6, dtype=F64)
    for step in range(5):
        g = gradients(6, step)
        turned, targets = reference.gradvac_loop(g, order_of(6), targets, 0.2)
        torch.testing.assert_close(method(g), getattr(turned, reduction)(0), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(method.state_dict()["targets"], targets, rtol=0.0, atol=1e-12)


def test_the_first_step_is_pcgrads(backend: Backend) -> None:
    g = gradients(5)
    expected = methods.PCGrad(order=order_of(5))(g)
    torch.testing.assert_close(methods.GradVac(order=order_of(5))(g), expected, rtol=1e-12, atol=1e-12)


def test_triggered_targets(backend: Backend) -> None:
    """As LibMTL's: the loop with the last line under the condition."""
    method = methods.GradVac(0.2, update="triggered", order=order_of(4))
    targets = torch.zeros(4, 4, dtype=F64)
    for step in range(3):
        g = gradients(4, step)
        for i, visits in enumerate(order_of(4).tolist()):
            turned = g[i].clone()
            for j in (j for j in visits if j != i):
                c = torch.cosine_similarity(turned, g[j], dim=0)
                if c < targets[i, j]:
                    across, wanted = (1 - c**2).sqrt(), (1 - targets[i, j] ** 2).sqrt()
                    factor = turned.norm() * (targets[i, j] * across - c * wanted) / (g[j].norm() * wanted)
                    turned = turned + factor * g[j]
                    targets[i, j] = 0.8 * targets[i, j] + 0.2 * c
        method(g)
        torch.testing.assert_close(method.state_dict()["targets"], targets, rtol=0.0, atol=1e-12)


def test_targets_are_kept_by_name(backend: Backend) -> None:
    method, g = methods.GradVac(0.5), gradients(3)
    method.weigh(g @ g.mT, Seen(["a", "b", "c"], [True] * 3))
    before = method.state_dict()["targets"]
    method.weigh(g @ g.mT, Seen(["b", "d", "a"], [True, True, False]))
    state = method.state_dict()
    assert state["names"] == ["a", "b", "c", "d"]
    # no pair of old ones that was present again; b and d are new to each other
    assert torch.equal(state["targets"][:3, :3], before) and (state["targets"][[1, 3], [3, 1]] != 0).all()
    assert (state["targets"][[0, 2, 3, 3], [3, 3, 0, 2]] == 0).all()


@pytest.mark.parametrize("num_tasks", [3, 40])
def test_absent_tasks_by_host_and_by_device(num_tasks: int, backend: Backend) -> None:
    """Neither turns anything nor moves a target; and what the matrix holds of them is not looked at."""
    g, here = gradients(num_tasks), [t % 3 != 1 for t in range(num_tasks)]
    m = g @ g.mT
    m[1], m[:, 1] = torch.nan, torch.inf
    found = []
    for present in (here, torch.tensor(here)):
        method = methods.GradVac(0.5, order=order_of(num_tasks))
        w = method.weigh(m, Seen([str(t) for t in range(num_tasks)], present))
        found.append((w, method.state_dict()["targets"]))
        assert (w[1::3] == 0).all() and w.isfinite().all()
        assert (found[-1][1][1::3] == 0).all() and (found[-1][1][:, 1::3] == 0).all()
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    places = {t: k for k, t in enumerate(t for t in range(num_tasks) if here[t])}
    rows = order_of(num_tasks)[torch.tensor(here)].tolist()
    order = torch.tensor([[places[j] for j in row if here[j]] for row in rows])
    less = methods.GradVac(0.5, order=order).weights(g[here] @ g[here].mT)
    torch.testing.assert_close(found[0][0][here], less, rtol=1e-10, atol=1e-12)


def test_state_is_saved_and_loaded(backend: Backend) -> None:
    method = methods.GradVac(0.3, order=order_of(4))
    for step in range(3):
        method(gradients(4, step))
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    other = methods.GradVac(0.3, order=order_of(4))
    other.load_state_dict(torch.load(file, weights_only=True))
    g = gradients(4, 3)
    assert torch.equal(other(g), method(g))
    method.reset()
    assert torch.equal(method(g), methods.GradVac(0.3, order=order_of(4))(g))


def test_state_of_any_layout_is_loaded(backend: Backend) -> None:
    """A step changes it in place, where it must be dense."""
    g, targets = gradients(3), torch.linspace(-0.5, 0.5, 9, dtype=F64).reshape(3, 3)
    one, other = methods.GradVac(0.3, order=order_of(3)), methods.GradVac(0.3, order=order_of(3))
    one.load_state_dict({"names": ["0", "1", "2"], "targets": targets})
    other.load_state_dict({"names": ["0", "1", "2"], "targets": targets.mT.contiguous().mT})
    assert torch.equal(one(g), other(g))
    assert torch.equal(one.state_dict()["targets"], other.state_dict()["targets"])


def test_what_is_not_finite_shows_and_is_not_kept(backend: Backend) -> None:
    method, g = methods.GradVac(0.3), gradients(4)
    method(g)
    before = method.state_dict()["targets"]
    for bad in (torch.nan, torch.inf):
        worse = g.clone()
        worse[2, 3] = bad
        assert method(worse).isnan().all()
        assert torch.equal(method.state_dict()["targets"], before)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scale_and_one_task(scale: float, backend: Backend) -> None:
    one, other = methods.GradVac(0.3, order=order_of(4)), methods.GradVac(0.3, order=order_of(4))
    for step in range(3):
        g = gradients(4, step)
        found = other.weights((scale * g) @ (scale * g).mT)
        torch.testing.assert_close(found, one.weights(g @ g.mT), rtol=1e-10, atol=1e-12)
    assert methods.GradVac().weights(torch.full((1, 1), scale)).tolist() == [1.0]


def test_equal_gradients_in_float32_stay_as_they_are(backend: Backend) -> None:
    """Though their cosines are 1 but for rounding, and the targets come to 1."""
    method, g = methods.GradVac(1.0), torch.randn(1, 1000).expand(4, 1000).contiguous()
    for _ in range(3):
        assert method.weights(ops.gram(g)).tolist() == [1.0] * 4


def test_orders_are_drawn_anew_and_from_a_state(backend: Backend) -> None:
    g = gradients(8)
    assert len({tuple(methods.GradVac().weights(g @ g.mT).tolist()) for _ in range(5)}) > 1
    draws = [methods.GradVac(generator=ops.order_state(3)).weights(g @ g.mT) for _ in range(2)]
    assert torch.equal(*draws)


@pytest.mark.parametrize("num_tasks", [2, 7])
def test_torchjd(num_tasks: int, backend: Backend) -> None:
    jd = pytest.importorskip("torchjd.aggregation")
    theirs, ours = jd.GradVac(beta=0.1), methods.GradVac(beta=0.1)
    for step in range(5):
        g = gradients(num_tasks, step)
        torch.manual_seed(step)
        expected = theirs(g)
        torch.manual_seed(step)
        others = [torch.tensor([j for j in range(num_tasks) if j != i]) for i in range(num_tasks)]
        ours.order = torch.stack([x[torch.randperm(num_tasks - 1)] for x in others])
        torch.testing.assert_close(ours(g), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="beta: expected a number from 0 to 1, got 2"):
        methods.GradVac(2.0)
    with pytest.raises(ValueError, match="reduction: expected 'sum' or 'mean', got 'max'"):
        methods.GradVac(reduction="max")
    with pytest.raises(ValueError, match="update: expected 'always' or 'triggered', got 'never'"):
        methods.GradVac(update="never")
    with pytest.raises(TypeError, match="order: expected a tensor or None, got list"):
        methods.GradVac(order=[[0]])
    with pytest.raises(ValueError, match="generator: expected None beside a given order"):
        methods.GradVac(order=order_of(3), generator=torch.Generator())
