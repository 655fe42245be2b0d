"""What methods need beside the Gram matrix, as `backward`, `GradientBank` and `one_pass` hand it over."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmtl
from fastmtl import methods
from fastmtl.core.gradient_rows import GradientRows
from fastmtl.methods.state import Field, StatefulMethod
from fastmtl.ops.gradients.combine import combine_into
from fastmtl.ops.gradients.gram import gram_rows
from fastmtl.surgery.solve import SurgeryOptions, solve
from fastmtl.surgery.task_gradients import Row, TaskGradients

F64 = torch.float64


class Net(nn.Module):
    def __init__(self, num_tasks: int = 3) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(6, 2) for _ in range(num_tasks))

    def losses(self, x: Tensor) -> list[Tensor]:
        h = self.trunk(x)
        return [F.mse_loss(head(h), torch.full((len(x), 2), 3.0 * (-1) ** t)) for t, head in enumerate(self.heads)]

    def of_trunk(self, x: Tensor) -> Tensor:
        """`[T, P]` float64 gradients, by autograd alone."""
        rows = [torch.autograd.grad(loss, [*self.trunk.parameters()], retain_graph=True) for loss in self.losses(x)]
        return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).double()


@pytest.fixture
def net() -> Net:
    torch.manual_seed(3)
    return Net()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 4)


@pytest.fixture
def other() -> Tensor:
    return torch.randn(6, 4)


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters()]).double()


def close(found: Tensor, want: Tensor, rtol: float = 1e-5) -> None:
    torch.testing.assert_close(found.double(), want.double(), rtol=rtol, atol=rtol * want.abs().max().item())


class Recorder(StatefulMethod):
    """Keeps what it was handed, and how often each task was there."""

    def __init__(self, *needs: str) -> None:
        super().__init__(steps=Field(1, 0.0))
        self.needs = frozenset(needs)

    def _weigh(self, gram: Tensor, seen: methods.Seen, present: Tensor | None) -> Tensor:
        self.gram, self.seen, self.present = gram, seen, present
        steps = self._state.read(seen.names, gram.device)["steps"] + 1
        self._state.keep(seen.names, present, steps=steps)
        return steps


class Largest(methods.Method):
    """Of each element the largest gradient."""

    needs = frozenset({"gradients"})

    def update(self, rows: GradientRows, out: Sequence[Tensor], seen: methods.Seen) -> tuple[Tensor, None]:
        self.seen = seen
        gram, n = gram_rows(rows), rows.num_params
        for i, column in zip(sorted({k % n for k in rows.index}), out, strict=True):
            some = [x for x, k in zip(rows.tensors, rows.index, strict=True) if k % n == i]
            column.copy_(torch.stack(some).amax(0))
        return gram, None


class Halved(methods.Method):
    """Half the sum, by weights that it makes itself."""

    needs = frozenset({"gradients", "losses"})

    def update(self, rows: GradientRows, out: Sequence[Tensor], seen: methods.Seen) -> tuple[Tensor, Tensor]:
        assert seen.losses is not None
        gram, w = gram_rows(rows), torch.full((rows.num_tasks,), 0.5, dtype=F64)
        combine_into(w, rows, out)
        return gram, w


# --- backward


def test_losses_come_without_the_loss_scale(net, x):
    method = Recorder("losses")
    losses = net.losses(x)
    for scale in (8.0, torch.tensor(8.0)):
        scaled = {name: 8 * loss for name, loss in zip("abc", net.losses(x), strict=True)}
        fastmtl.backward(scaled, net, method=method, loss_scale=scale)
        assert method.seen.losses.dtype == F64 and not method.seen.losses.requires_grad
        close(method.seen.losses, torch.stack(losses).detach())
        assert method.seen.names == ["a", "b", "c"] and method.seen.second is None
        assert method.seen.loss_scale == scale


def test_losses_are_only_made_for_a_method_that_needs_them(net, x):
    method = Recorder()
    fastmtl.backward(net.losses(x), net, method=method)
    assert method.seen.losses is None


def test_an_absent_task_has_a_loss_of_zero(net, x):
    method = Recorder("losses")
    losses = net.losses(x)
    fastmtl.backward([losses[0], None, losses[2]], net, method=method)
    assert method.seen.losses.tolist() == pytest.approx([losses[0].item(), 0, losses[2].item()])
    assert method.present.tolist() == [True, False, True]


def test_a_second_batch_enters_the_gram_matrices_alone(net, x, other):
    g, h = net.of_trunk(x), net.of_trunk(other)
    method = Recorder("second_batch")
    second = net.losses(other)
    surgery = fastmtl.backward(net.losses(x), net, method=method, second_losses=second)
    close(method.seen.second, g @ h.mT)
    close(surgery.gram, g @ g.mT)
    close(flat(net.trunk), g.sum(0))
    # the heads have the first batch's gradients
    close(net.heads[0].weight.grad, torch.autograd.grad(net.losses(x)[0], net.heads[0].weight)[0])
    with pytest.raises(RuntimeError, match="second time"):
        second[0].backward()  # its graph is free


def test_a_second_batch_with_scale_names_absent_tasks_and_chunks(net, x, other):
    g, h = net.of_trunk(x), net.of_trunk(other)
    method = Recorder("second_batch", "losses")
    losses, second = net.losses(x), net.losses(other)
    fastmtl.backward(
        {"a": 4 * losses[0], "b": None, "c": 4 * losses[2]},
        net,
        method=method,
        second_losses={"c": 4 * second[2], "b": None, "a": 4 * second[0]},
        loss_scale=4.0,
        chunk_size=2,
    )
    want = g @ h.mT
    want[1] = want[:, 1] = 0
    close(method.seen.second, want)
    close(flat(net.trunk), 4 * (g[0] + g[2]))


def test_second_losses_of_the_same_graph(net, x):
    """Both may come from one forward pass."""
    method = Recorder("second_batch")
    both = net.trunk(torch.cat([x, -x])).chunk(2)
    losses, second = ([head(h).square().mean() for head in net.heads] for h in both)
    fastmtl.backward(losses, net, shared=net.trunk, method=method, second_losses=second)
    rows = []
    for part in (x, -x):
        each = [net.heads[t](net.trunk(part)).square().mean() for t in range(3)]
        grads = [torch.autograd.grad(loss, [*net.trunk.parameters()]) for loss in each]
        rows.append(torch.stack([torch.cat([g.flatten() for g in row]) for row in grads]))
    close(method.seen.second, rows[0] @ rows[1].mT)


@pytest.mark.parametrize(
    ("second", "options", "text"),
    [
        (lambda net, x: None, {}, "method Recorder needs the task gradients of a second.*: pass second_losses="),
        (lambda net, x: net.losses(x)[:2], {}, r"second_losses: expected the tasks of losses, \['0', '1', '2'\]"),
        (lambda net, x: {"a": 1}, {}, "second_losses: loss 'a': expected a scalar tensor or None, got int"),
        (lambda net, x: [*net.losses(x)[:2], None], {}, "task '2' has a loss in losses and none in second_losses"),
        (lambda net, x: [loss.detach() for loss in net.losses(x)], {}, "second_losses: loss '0': needs no gradient"),
        (lambda net, x: net.losses(x), {"features": True}, "second_losses: expected None beside features="),
        (lambda net, x: net.losses(x), {"method": "sum"}, "second_losses: method .* takes no second batch"),
    ],
)
def test_bad_second_batches(net, x, second, options, text):
    h = net.trunk(x)
    losses = [F.mse_loss(head(h), torch.ones(6, 2)) for head in net.heads]
    if "features" in options:
        options = {"features": h}
    options = {"method": Recorder("second_batch"), **options}
    with pytest.raises((ValueError, TypeError), match=text):
        fastmtl.backward(losses, net, second_losses=second(net, x), **options)
    assert all(p.grad is None for p in net.parameters())


def test_at_most_64_tasks_with_a_second_batch():
    p = nn.Parameter(torch.ones(3))
    losses = [(t + 1.0) * p.sum() for t in range(65)]
    with pytest.raises(ValueError, match="second_losses: expected at most 64 tasks, got 65"):
        fastmtl.backward(losses, [p], method=Recorder("second_batch"), second_losses=losses)
    method = Recorder("second_batch")
    second = [(t + 1.0) * p.square().sum() for t in range(64)]
    fastmtl.backward(losses[:64], [p], method=method, second_losses=second)
    assert method.seen.second[3, 5] == 4 * 6 * 2 * 3


# --- methods that make the update themselves


def test_an_update_of_the_gradients(net, x):
    g = net.of_trunk(x)
    method = Largest()
    surgery = fastmtl.backward([4 * loss for loss in net.losses(x)], net, method=method, loss_scale=4.0)
    close(flat(net.trunk), 4 * g.amax(0))
    close(surgery.gram, g @ g.mT)
    assert surgery.weights is None and method.seen.loss_scale == 4.0
    close(surgery.grad_norm(), g.amax(0).norm())
    found = surgery.log_dict("train/")
    assert found["train/grad_norm"] == surgery.grad_norm()
    assert not any("weight" in key for key in found)
    assert {f"train/{what}/{t}" for what in ("norm", "conflicts") for t in range(3)} < set(found)
    assert surgery.cosines().shape == (3, 3)


def test_an_update_with_weights_and_losses(net, x):
    g = net.of_trunk(x)
    surgery = fastmtl.backward(net.losses(x), net, method=Halved())
    close(flat(net.trunk), g.sum(0) / 2)
    assert surgery.weights.tolist() == [0.5] * 3
    close(surgery.grad_norm(), g.sum(0).norm() / 2)


def test_an_update_of_features(net, x):
    h = net.trunk(x)
    losses = [F.mse_loss(head(h), torch.full((6, 2), 3.0 * (-1) ** t)) for t, head in enumerate(net.heads)]
    of_features = torch.stack([torch.autograd.grad(loss, h, retain_graph=True)[0] for loss in losses]).amax(0)
    want = torch.autograd.grad(h, [*net.trunk.parameters()], of_features, retain_graph=True)
    surgery = fastmtl.backward(losses, net, features=h, method=Largest())
    close(flat(net.trunk), torch.cat([g.flatten() for g in want]))
    close(surgery.grad_norm(), of_features.norm())


def test_an_update_into_memory_that_somebody_holds(net, x):
    held = []
    for p in net.trunk.parameters():
        p.register_hook(lambda g: held.append((g, g.clone())))
    fastmtl.backward(net.losses(x), net, method=Largest())
    assert held and all(torch.equal(g, before) for g, before in held)


def test_what_is_not_finite_shows_in_the_norm(net, x):
    x[0, 0] = torch.inf
    surgery = fastmtl.backward(net.losses(x * torch.nan), net, method=Largest())
    assert surgery.grad_norm().isnan()


@pytest.mark.parametrize("poison", [0.0, torch.nan])
def test_tasks_that_the_device_alone_knows(poison):
    """As after `one_pass` with ids on a device: a mask there, rows of zeros, and what went wrong unseen as a NaN."""
    p, present = nn.Parameter(torch.zeros(4)), torch.tensor([True, False, True])
    g = torch.tensor([[1.0, -2.0, 3.0, -4.0], [0.0] * 4, [-1.0, 2.0, 0.5, -5.0]])
    losses = [torch.tensor(2.0), torch.tensor(torch.nan), torch.tensor(6.0)]
    for method in (Largest(), Recorder("losses"), methods.PCGrad()):
        given = losses if method.needs == {"losses"} else None
        rows: list[Row] = [[row.clone()] for row in g]
        gradients = TaskGradients([p], rows, {}, "abc", present, p.device, poison=torch.tensor(poison))
        (update,), surgery = solve(gradients, SurgeryOptions(method, loss_scale=2.0, losses=given))
        if poison != 0:
            assert update[1].isnan().all() and surgery.grad_norm().isnan()
        elif isinstance(method, Recorder):
            assert method.seen.losses.tolist() == [1, 0, 3] and surgery.weights.tolist() == [1, 0, 1]
            assert torch.equal(update[1], g.sum(0))
        elif isinstance(method, Largest):
            assert torch.equal(method.seen.mask(p.device), present) and torch.equal(update[1], g.amax(0))
        else:
            assert surgery.weights[1] == 0


# --- GradientBank


def filled(net: Net, x: Tensor, tasks: Sequence[int] = (0, 1, 2), scale: float = 1.0) -> fastmtl.GradientBank:
    bank = fastmtl.GradientBank(net, ["a", "b", "c"])
    for t in tasks:
        with bank.task(t):
            (scale * net.losses(x)[t]).backward()
    return bank


def test_a_bank_takes_losses_and_a_second_bank(net, x, other):
    g, h = net.of_trunk(x), net.of_trunk(other)
    method = Recorder("losses", "second_batch")
    losses = [4 * loss for loss in net.losses(x)]
    second = filled(net, other, scale=4.0)
    numbers = [float(loss.detach()) for loss in losses]
    by_name = dict(zip("cba", losses[::-1], strict=True))
    for given in (
        losses,
        by_name,
        torch.stack(losses),
        numbers,
        np.array(numbers, np.float32),
        {**by_name, "a": numbers[0]},
    ):
        net.zero_grad()
        method.reset()
        bank = filled(net, x, scale=4.0)
        bank.apply(method, losses=given, second=filled(net, other, scale=4.0), loss_scale=4.0)
        close(method.seen.losses, torch.stack(net.losses(x)).detach())
        close(method.seen.second, g @ h.mT)
        close(flat(net.trunk), 4 * g.sum(0))
        close(net.heads[0].weight.grad, 4 * torch.autograd.grad(net.losses(x)[0], net.heads[0].weight)[0])
    filled(net, x, scale=4.0).apply(method, losses=losses, second=second, loss_scale=4.0)
    with pytest.raises(RuntimeError, match="no gradient was collected"):
        second.apply("sum")


def test_a_bank_with_absent_tasks(net, x, other):
    method = Recorder("losses", "second_batch")
    losses = net.losses(x)
    filled(net, x, [0, 2]).apply(method, losses=losses, second=filled(net, other, [0, 2]))
    assert method.seen.losses[1] == 0 and method.present.tolist() == [True, False, True]
    assert method.seen.second[1].tolist() == [0] * 3


def test_a_bank_of_an_update(net, x):
    g = net.of_trunk(x)
    surgery = filled(net, x).apply(Largest())
    close(flat(net.trunk), g.amax(0))
    close(surgery.grad_norm(), g.amax(0).norm())


def test_what_a_bank_refuses(net, x):
    bank, method = filled(net, x), Recorder("losses", "second_batch")
    second, losses = filled(net, x), net.losses(x)
    foreign = fastmtl.GradientBank(Net(), ["a", "b", "c"])
    unnamed = fastmtl.GradientBank(net, 3)
    few = filled(net, x, [0])
    for options, kind, text in (
        ({"losses": losses}, ValueError, "GradientBank.apply: method Recorder needs .* second.*: pass second="),
        ({"second": second}, ValueError, "GradientBank.apply: method Recorder needs the tasks' losses: pass losses="),
        ({"losses": losses[:2], "second": second}, ValueError, r"losses: expected those of .* \['a', 'b', 'c'\], got"),
        ({"losses": {"a": losses[0]}, "second": second}, ValueError, r"losses: expected those .* got \['a'\]"),
        ({"losses": [*losses[:2], None], "second": second}, ValueError, "losses: expected a loss of task 'c'"),
        ({"losses": [True] * 3, "second": second}, TypeError, "expected a scalar tensor, a number or None, got bool"),
        ({"losses": losses, "second": bank}, ValueError, "second: expected another bank"),
        ({"losses": losses, "second": 1}, TypeError, "second: expected a GradientBank or None, got int"),
        ({"losses": losses, "second": foreign}, ValueError, "second: expected a bank of the same parameters"),
        ({"losses": losses, "second": unnamed}, ValueError, "second: expected a bank of the tasks"),
        ({"losses": losses, "second": few}, ValueError, "task 'b' has gradients in the bank and none in the second"),
        ({"losses": losses, "second": second, "method": "sum"}, ValueError, "second: method .* takes no second batch"),
    ):
        with pytest.raises(kind, match=text):
            bank.apply(**{"method": method, **options})
    with second.task("a"), pytest.raises(RuntimeError, match="inside a task of the second bank"):
        bank.apply(method, losses=losses, second=second)
    assert all(p.grad is None for p in net.parameters())
    bank.apply(method, losses=losses, second=second)  # all rows are still there
    close(flat(net.trunk), net.of_trunk(x).sum(0))


# --- one_pass


def in_one_pass(net: Net, x: Tensor, ids: Tensor, **options: str) -> tuple[fastmtl.OnePassBank, list[Tensor]]:
    with fastmtl.one_pass(net.trunk, ids, ["a", "b", "c"], **options) as bank:
        each = net.trunk(x).square().mean(1)
        each.sum().backward()
    return bank, [each[ids == t].sum().detach() for t in range(3)]


@pytest.mark.parametrize("memory", ["bank", "stream"])
def test_one_pass_takes_losses(net, x, memory):
    ids = torch.tensor([0, 2, 0, 2, 2, 0])
    method = Recorder("losses")
    bank, losses = in_one_pass(net, x, ids, memory=memory)
    with pytest.raises(ValueError, match=r"OnePassBank\.apply: method Recorder needs the tasks' losses: pass losses="):
        bank.apply(method)
    with pytest.raises(ValueError, match="losses: expected a loss of task 'c'"):
        bank.apply(method, losses={"a": losses[0], "b": None, "c": None})
    bank.apply(method, losses=losses)
    assert method.seen.losses[1] == 0 and method.seen.names == ("a", "b", "c")
    close(method.seen.losses, torch.stack(losses))


def test_one_pass_of_an_update(net, x):
    ids = torch.tensor([0, 1, 0, 2, 2, 1])
    bank, _ = in_one_pass(net, x, ids)
    rows = torch.stack([torch.cat([g.flatten() for g in bank.row(t)]) for t in range(3)])
    surgery = bank.apply(Largest())
    close(flat(net.trunk), rows.amax(0))
    close(surgery.grad_norm(), rows.amax(0).norm())


def test_what_one_pass_refuses(net, x):
    ids = torch.tensor([0, 1, 0, 2, 2, 1])
    bank, _ = in_one_pass(net, x, ids, memory="stream")
    with pytest.raises(ValueError, match="Largest needs the task gradients themselves: memory='stream' keeps none"):
        bank.apply(Largest())
    with pytest.raises(ValueError, match=r"method MoDo needs .* second, independent batch: use fastmtl.backward with"):
        bank.apply("modo")
    bank.apply("sum")


# --- state over steps


def test_state_follows_names_over_steps_and_checkpoints(net, x):
    method = Recorder()

    def step(method: Recorder, **losses: Tensor | None) -> list[float]:
        return fastmtl.backward(losses, net, method=method).weights.tolist()

    a, b, c = net.losses(x)
    assert step(method, a=a, b=b, c=c) == [1, 1, 1]
    a, b, c = net.losses(x)
    assert step(method, c=c, a=None, b=b) == [2, 0, 2]
    saved = io.BytesIO()
    torch.save(method.state_dict(), saved)
    saved.seek(0)
    other = Recorder()
    other.load_state_dict(torch.load(saved, weights_only=True))
    for m in (method, other):
        a, b, c = net.losses(x)
        assert step(m, new=c, b=b, a=a) == [1, 3, 2]
    method.reset()
    a, b, c = net.losses(x)
    assert step(method, new=c, b=b, a=a) == [1, 1, 1]


def test_a_step_that_a_scaler_skips_leaves_the_state(net, x):
    """The loss scale is so large that the gradients overflow; the scaler skips the step and lowers it."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    method, plain = (methods.CRMOGM(methods.MGDA(), momentum=0.5) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
    for step in range(3):
        optimizer.zero_grad()
        losses = [scaler.scale(loss * 8) for loss in net.losses(x)]
        surgery = fastmtl.backward(losses, net, method=method, loss_scale=scaler.get_scale())
        assert surgery.weights.isnan().all() == (step == 0)
        scaler.step(optimizer)
        scaler.update(2.0**10 if step == 0 else None)
        if step > 0:
            net.zero_grad()
            want = fastmtl.backward([loss * 8 for loss in net.losses(x)], net, method=plain).weights
            close(surgery.weights, want)
    assert scaler.get_scale() == 2.0**10
