"""`fastmtl.analysis`: affinities against steps taken by hand, groups against all sets of groups."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import Backend
from torch import Tensor, nn

import fastmtl
from fastmtl.analysis import TaskAffinity, first_order_affinity, group_tasks, task_affinity


class Model(nn.Module):
    """A trunk with everything that a call leaves traces in, and a head for each task."""

    def __init__(self, tasks: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 5))
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(tasks))
        self.to(dtype)

    def losses(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        h = self.trunk(x).tanh()
        return {f"t{t}": (head(h)[:, 0] - y[:, t]).square().mean() for t, head in enumerate(self.heads)}


def batch(tasks: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(16, 6, dtype=dtype), torch.randn(16, tasks, dtype=dtype)


def by_hand(model: Model, x: Tensor, y: Tensor, lr: float) -> Tensor:
    """A copy for every step, and torch's own optimiser."""
    rng = torch.get_rng_state()
    before = model.losses(x, y)
    rows = []
    for name in before:
        again = Model(len(model.heads), x.dtype)
        again.load_state_dict(model.state_dict())
        torch.set_rng_state(rng)
        loss = again.losses(x, y)[name]
        optimizer = torch.optim.SGD(again.trunk.parameters(), lr)
        loss.backward()
        optimizer.step()
        torch.set_rng_state(rng)
        after = again.losses(x, y)
        rows.append([1 - float(after[n]) / float(before[n]) for n in before])
    torch.set_rng_state(rng)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_lookahead_is_a_step_of_each_task(dtype: torch.dtype, backend: Backend) -> None:
    model = Model(3, dtype)
    x, y = batch(3, dtype)
    expected = by_hand(model, x, y, 0.1)
    found = task_affinity(lambda: model.losses(x, y), model, lr=0.1)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(found.matrix, expected, rtol=tolerance, atol=tolerance)
    assert (found.kind, found.names, found.lr) == ("lookahead", ("t0", "t1", "t2"), 0.1)
    assert expected.abs().min() > 10 * tolerance and (expected.diagonal() > 0).all()


def test_leaves_the_model_as_one_call_does() -> None:
    model, same = Model(3), Model(3)
    same.load_state_dict(model.state_dict())
    x, y = batch(3)
    rng = torch.get_rng_state()
    same.losses(x, y)
    expected = torch.get_rng_state()
    torch.set_rng_state(rng)
    pointers = [p.data_ptr() for p in model.parameters()]
    task_affinity(lambda: model.losses(x, y), model, lr=0.3)
    assert torch.equal(torch.get_rng_state(), expected)
    for (name, value), other in zip(model.state_dict().items(), same.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    assert all(p.grad is None for p in model.parameters())
    assert [p.data_ptr() for p in model.parameters()] == pointers


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_parameters_come_back_where_the_losses_raise(fails_at: int) -> None:
    model = Model(3)
    x, y = batch(3)
    before = {name: value.clone() for name, value in model.named_parameters()}
    calls = 0

    def losses() -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        if calls == fails_at + 1:
            raise KeyError("no data")
        return model.losses(x, y)

    with pytest.raises(KeyError):
        task_affinity(losses, model, lr=0.3)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_first_order_is_the_limit_of_small_steps() -> None:
    model = Model(3).eval()
    x, y = batch(3)
    losses = model.losses(x, y)
    surgery = fastmtl.backward(losses, model, method="sum")
    first = first_order_affinity(surgery, losses, lr=1.0)
    assert first.kind == "first order" and first.names == ("t0", "t1", "t2")
    errors = []
    for lr in (1e-2, 1e-3, 1e-4):
        ahead = task_affinity(lambda: model.losses(x, y), model, lr=lr)
        errors.append(float((ahead.matrix / lr - first.matrix).abs().max() / first.matrix.abs().max()))
    assert errors[2] < 1e-3 and all(5 < a / b < 20 for a, b in itertools.pairwise(errors)), errors


def test_absent_tasks_and_means() -> None:
    model = Model(3).eval()
    x, y = batch(3)
    whole = task_affinity(lambda: model.losses(x, y), model, lr=0.1)
    part = task_affinity(lambda: model.losses(x, y) | {"t1": None}, model, lr=0.1)
    assert part.matrix[1].isnan().all() and part.matrix[:, 1].isnan().all()
    kept = [[0, 0, 2, 2], [0, 2, 0, 2]]
    torch.testing.assert_close(part.matrix[kept], whole.matrix[kept], rtol=1e-12, atol=1e-12)
    mean = TaskAffinity.mean([whole, part, part])
    torch.testing.assert_close(mean.matrix, whole.matrix, rtol=1e-12, atol=1e-12)
    first = first_order_affinity(torch.eye(3), [1.0, None, 2.0], lr=0.5)
    assert first.matrix.isnan().tolist() == [[False, True, False], [True] * 3, [False, True, False]]
    assert first.matrix[0, 0] == 0.5 and first.matrix[2, 2] == 0.25
    with pytest.raises(ValueError, match="same tasks"):
        TaskAffinity.mean([whole, TaskAffinity(torch.eye(2), ["a", "b"], "lookahead", 0.1)])
    with pytest.raises(ValueError, match="one kind"):
        TaskAffinity.mean([whole, TaskAffinity(whole.matrix, whole.names, "first order", 0.1)])


def test_only_shared_parameters_take_the_step() -> None:
    trunk, heads = nn.Parameter(torch.tensor(2.0)), [nn.Parameter(torch.tensor(v)) for v in (1.0, 3.0)]

    def losses() -> list[Tensor]:
        return [(trunk * head).square() for head in heads]

    # w h: the step of task i moves w alone, by 2 w h_i^2
    expected = [[1 - ((2 - 0.01 * 4 * h * h) / 2) ** 2] * 2 for h in (1.0, 3.0)]
    found = task_affinity(losses, lr=0.01)
    torch.testing.assert_close(found.matrix, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)
    assert found.names == ("0", "1")
    fastmtl.mark_per_task(trunk)
    with pytest.raises(ValueError, match="no parameter is reached by two losses"):
        task_affinity(losses, lr=0.01)


def test_bad_arguments() -> None:
    model = Model(2)
    x, y = batch(2)
    losses = model.losses(x, y)
    with pytest.raises(TypeError, match="expected a function"):
        task_affinity(losses, model, lr=0.1)
    for lr in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="lr: expected a positive"):
            task_affinity(lambda: model.losses(x, y), model, lr=lr)
    with pytest.raises(ValueError, match="'t1': expected a positive number"):
        task_affinity(lambda: {n: v - 100 * (n == "t1") for n, v in model.losses(x, y).items()}, model, lr=0.1)
    calls = iter([{"a": 1.0, "b": 2.0}, {"a": 1.0, "c": 2.0}])
    w = nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match=r"those of the first call, \['a', 'b'\], got \['a', 'c'\]"):
        task_affinity(lambda: {name: w * v for name, v in next(calls).items()}, lr=0.1)
    assert w == 1
    with pytest.raises(ValueError, match="pass shared="):
        task_affinity(lambda: (w * torch.ones(3)).unbind(), lr=0.1)
    assert task_affinity(lambda: (w * torch.ones(3)).unbind(), shared=[w], lr=0.1).matrix.shape == (3, 3)
    with pytest.raises(TypeError, match="a Gram matrix or a Surgery"):
        first_order_affinity([[1.0]], [1.0], lr=0.1)
    with pytest.raises(ValueError, match="losses: expected 2"):
        first_order_affinity(torch.eye(2), [1.0], lr=0.1)


# --- groups


def best_of_all(z: Tensor, count: int, alone: float | None) -> float:
    """Every set of at most `count` groups."""
    tasks = range(len(z))
    groups = [g for k in tasks for g in itertools.combinations(tasks, k + 1) if k or alone is not None]

    def onto(j: int, group: tuple[int, ...]) -> float:
        others = [float(z[i, j]) for i in group if i != j]
        return sum(others) / len(others) if others else alone

    values = [{j: onto(j, group) for j in group} for group in groups]
    best = -math.inf
    for k in range(1, count + 1):
        for chosen in itertools.combinations(values, k):
            found = [max((v[j] for v in chosen if j in v), default=-math.inf) for j in tasks]
            best = max(best, sum(found) / len(found))
    return best


@pytest.mark.parametrize("alone", [None, 0.0])
@pytest.mark.parametrize("tasks, count", [(2, 1), (2, 3), (4, 2), (5, 1), (5, 2), (5, 3)])
def test_groups_are_the_best(tasks: int, count: int, alone: float | None) -> None:
    for seed in range(4):
        z = torch.randn(tasks, tasks, generator=torch.Generator().manual_seed(seed))
        found = group_tasks(z, count, alone=alone)
        assert found.affinity == pytest.approx(best_of_all(z, count, alone), rel=1e-12)
        assert 1 <= len(found.groups) <= count
        assert all(name in found.groups[g] for name, g in found.served_by.items())
        assert list(found.served_by) == [str(t) for t in range(tasks)]


def test_groups_of_two_families() -> None:
    z = torch.full((8, 8), -0.1)
    z[:4, :4] = z[4:, 4:] = 0.2
    found = TaskAffinity(z, "abcdefgh", "lookahead", 0.1).groups(2)
    assert sorted(found.groups) == [tuple("abcd"), tuple("efgh")] and found.affinity == pytest.approx(0.2)
    # one task that all others harm, and that helps them
    z[:, 0], z[0, 1:] = -0.5, 0.4
    found = group_tasks(z, 3, names="abcdefgh", alone=0.0)
    assert found.groups[found.served_by["a"]] == ("a",)
    assert sum("a" in group for group in found.groups) > 1


def test_groups_refuse() -> None:
    for matrix in (torch.eye(1), torch.zeros(11, 11), torch.zeros(2, 3), torch.full((2, 2), math.nan)):
        with pytest.raises(ValueError, match="matrix: expected"):
            group_tasks(matrix, 1)
    with pytest.raises(ValueError, match="count: expected at least 1"):
        group_tasks(torch.eye(2), 0)
    with pytest.raises(TypeError, match="count: expected an int"):
        group_tasks(torch.eye(2), 1.0)
    with pytest.raises(ValueError, match="names: expected 2"):
        group_tasks(torch.eye(2), 1, names=["a"])


def test_heat_map() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot

    z = torch.tensor([[9.0, 0.5, math.nan], [-0.25, 8.0, 0.1], [0.0, 0.2, 7.0]], dtype=torch.float64)
    ax = TaskAffinity(z, ["x", "y", "z"], "first order", 0.1).plot()
    (image,) = ax.images
    drawn = image.get_array()
    assert image.get_clim() == (-0.5, 0.5) and drawn[1, 0] == -0.25 and drawn.mask.diagonal().all()
    assert [text.get_text() for text in ax.texts] == ["9", "0.5", "", "-0.25", "8", "0.1", "0", "0.2", "7"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["x", "y", "z"]
    assert "first order" in ax.get_title()
    pyplot.close(ax.figure)
