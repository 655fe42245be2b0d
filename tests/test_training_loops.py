"""Loops that people have around `fastmtl.backward`, for several steps, against plain torch and the paper's loop.

The reference of each loop is a copy of the model, trained by T explicit `torch.autograd.grad` passes, projected in
float64 by the loop of the paper, and the same optimizer.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases_backward import ORDER, PCGRAD, expected, grad64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastmtl
from fastmtl.ops.gradients.reference import pcgrad_loop

STEPS = 4
PAIR = torch.tensor([[1], [0]])
Losses = Callable[[Any, Tensor], "Sequence[Tensor]"]


class Net(nn.Module):
    """A trunk of the test's choice, and three heads pulled to opposite targets, so that tasks conflict."""

    def __init__(self, trunk: nn.Module, width: int = 6) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(nn.Linear(width, 2) for _ in range(3))
        for head in self.heads:  # alike: what one pulls up, the other pulls down
            head.weight.data.mul_(0.1).add_(self.heads[0].weight.data)

    def forward(self, x: Tensor) -> list[Tensor]:
        h = self.trunk(x)
        return [head(h) for head in self.heads]


def losses_of(outputs: Sequence[Tensor]) -> list[Tensor]:
    return [(y.float() if y.dtype == torch.bfloat16 else y).sub(3.0 * (-1) ** t).square().mean()
            for t, y in enumerate(outputs)]  # fmt: skip


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())


def batches(*shape: int, dtype: torch.dtype = torch.float64, steps: int = STEPS) -> Iterator[Tensor]:
    for step in range(steps):
        yield torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(step))


def set_grads(want: Mapping[Tensor, Tensor]) -> None:
    for p, g in want.items():
        p.grad = g.to(p.dtype)


def reference(net: Any, losses: Sequence[Tensor], order: Tensor = ORDER) -> None:
    """Sets `.grad` by T explicit passes and the paper's loop."""
    set_grads(expected(losses, [*net.trunk.parameters()], [*net.heads.parameters()], order))


def assert_same(ours: nn.Module, ref: nn.Module, start: nn.Module, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    """Equal to the reference (parameters and buffers), and every parameter was trained."""
    state, other, before = ours.state_dict(), ref.state_dict(), start.state_dict()
    for name, value in other.items():
        torch.testing.assert_close(state[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
        assert not torch.equal(state[name], before[name]), f"{name} was not trained"


def sgd(net: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)


def train_both(
    net: Net, data: Callable[[], Iterator[Tensor]], losses: Losses, *, rtol: float = 1e-9, **how: Any
) -> Net:
    """Trains `net` by `fastmtl.backward` and a copy by the reference, with the same seeds; compares at every step."""
    ref, start = copy.deepcopy(net), copy.deepcopy(net)
    optimizer, other = sgd(net), sgd(ref)
    conflicts = 0
    for step, x in enumerate(data()):
        torch.manual_seed(step)
        optimizer.zero_grad()
        surgery = fastmtl.backward(losses(net, x), method=PCGRAD, **how)
        optimizer.step()
        torch.manual_seed(step)
        reference(ref, losses(ref, x))
        other.step()
        conflicts += int(surgery.conflicts().sum())
        assert_same(net, ref, start, rtol=rtol, atol=rtol * 1e-2)
    assert conflicts
    return net


# --- kinds of models


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.rnn = kind(4, 3 if options.get("bidirectional") else 6, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0].mean(1)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "dropout": 0.5}, {"bidirectional": True}])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_recurrent_trunks(kind, options, chunk_size):
    net = Net(Recurrent(kind, **options)).double()
    train_both(net, lambda: batches(5, 7, 4), lambda net, x: losses_of(net(x)), chunk_size=chunk_size)


def test_a_recurrent_trunk_whose_state_is_carried_on():
    net = Net(nn.LSTM(4, 6, batch_first=True)).double()
    states: dict[int, Any] = {}

    def losses(net: Net, x: Tensor) -> list[Tensor]:
        before = states.get(id(net))
        y, state = net.trunk(x, before)
        states[id(net)] = tuple(s.detach() for s in state)  # truncated backpropagation through time
        return losses_of([head(y) for head in net.heads])

    train_both(net, lambda: batches(5, 7, 4), losses)


NORMS = {
    "layer": lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 6), nn.RMSNorm(6)),
    "group": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 6, 3, bias=False),
        nn.InstanceNorm2d(6, affine=True),
        nn.Flatten(2), nn.AdaptiveMaxPool1d(1), nn.Flatten(),
    ),
    "batch": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 6, bias=False),
        nn.BatchNorm1d(6),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_autocast_with_normalisation(kind, chunk_size):
    net = Net(NORMS[kind]())

    def losses(net: Net, x: Tensor) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = net(x)
        assert outputs[0].dtype == torch.bfloat16
        return losses_of(outputs)

    shape = (8, 4) if kind == "layer" else (8, 1, 6, 6)
    # float32 weights, gradients rounded to bfloat16 alike on both sides
    train_both(net, lambda: batches(*shape, dtype=torch.float32), losses, rtol=1e-4, chunk_size=chunk_size)


@pytest.mark.parametrize("kind", NORMS)
def test_normalisation_in_double(kind):
    shape = (8, 4) if kind == "layer" else (8, 1, 6, 6)
    train_both(Net(NORMS[kind]()).double(), lambda: batches(*shape), lambda net, x: losses_of(net(x)), rtol=1e-8)


def test_dropout_has_one_mask_for_all_tasks_of_a_forward():
    net = Net(nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 6), nn.Dropout(0.5))).double()
    train_both(net, lambda: batches(5, 4), lambda net, x: losses_of(net(x)))
    # the same head twice: equal gradients if and only if the mask is the same
    h = net.trunk(next(batches(5, 4)))
    same = fastmtl.backward([net.heads[0](h).sum(), net.heads[0](h).sum()], net.trunk, method="sum")
    torch.testing.assert_close(same.cosines(), torch.ones(2, 2, dtype=torch.float64))
    two = [net.heads[0](net.trunk(x)).sum() for x in [next(batches(5, 4))] * 2]
    assert fastmtl.backward(two, net.trunk, method="sum").cosines()[0, 1] < 0.999


class Recomputed(nn.Module):
    """A checkpointed trunk that counts its forward passes."""

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        self.inside = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 6), nn.Tanh())
        self.runs = 0

    def run(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.inside(x)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.run, x, use_reentrant=False)


def test_activation_checkpointing_with_dropout():
    # recomputed in each pass, each time with the mask of the forward
    train_both(Net(Recomputed()).double(), lambda: batches(5, 4), lambda net, x: losses_of(net(x)))


@pytest.mark.parametrize(
    ("how", "runs"),
    [({}, 1 + 3), ({"chunk_size": 3}, 1 + 1), ({"features": True}, 1 + 1)],
    ids=["loop", "chunk", "features"],
)
def test_how_often_a_checkpointed_trunk_is_recomputed(how, runs):
    net = Net(Recomputed(dropout=0.0)).double()
    x = next(batches(5, 4))
    want = expected(losses_of(net(x)), [*net.trunk.parameters()], [*net.heads.parameters()])
    net.trunk.runs = 0
    h = net.trunk(x)
    losses = losses_of([head(h) for head in net.heads])
    method: Any = PCGRAD
    if how.get("features"):
        how = {"features": h}
        method = "sum"
        want = dict(zip(net.parameters(), grad64(sum(losses_of(net(x))), [*net.parameters()]), strict=True))
        net.trunk.runs = 1
    fastmtl.backward(losses, method=method, **how)
    assert net.trunk.runs == runs
    for p, g in want.items():
        torch.testing.assert_close(p.grad, g)


def test_checkpointing_in_a_bank():
    net = Net(Recomputed()).double()
    ref, start = copy.deepcopy(net), copy.deepcopy(net)
    optimizer, other = sgd(net), sgd(ref)
    bank = fastmtl.GradientBank(net, 3)
    for x in batches(5, 4):
        optimizer.zero_grad()
        for t in range(3):
            torch.manual_seed(t)
            with bank.task(t):
                losses_of(net(x))[t].backward()
        bank.apply(PCGRAD)
        optimizer.step()
        losses = []
        for t in range(3):
            torch.manual_seed(t)  # a mask for each task's forward
            losses.append(losses_of(ref(x))[t])
        reference(ref, losses)
        other.step()
        assert_same(net, ref, start)


# --- mixed precision with a scaler


@pytest.mark.parametrize("clip", [None, 0.5])
def test_grad_scaler_skips_and_goes_on(clip):
    net = Net(mlp())
    ref, start = copy.deepcopy(net), copy.deepcopy(net)
    optimizer, other = sgd(net), sgd(ref)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    scale, good = 2.0**10, 0
    for step, x in enumerate(batches(5, 4, dtype=torch.float32, steps=6)):
        overflow = step == 2
        optimizer.zero_grad()
        losses = losses_of(net(x))
        if overflow:
            losses[1] = losses[1] * torch.inf
        fastmtl.backward([scaler.scale(loss) for loss in losses], method=PCGRAD, loss_scale=scaler.get_scale())
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()

        if overflow:
            scale, good = scale / 2, 0
        else:
            reference(ref, losses_of(ref(x)))
            if clip:
                nn.utils.clip_grad_norm_(ref.parameters(), clip)
            other.step()
            good += 1
            if good == 2:
                scale, good = scale * 2, 0
        assert scaler.get_scale() == scale
        assert_same(net, ref, start, rtol=1e-4, atol=1e-6)
    assert scale == 2.0**11


# --- losses


def test_a_dict_of_losses_that_are_sums_of_several_terms():
    net = Net(mlp()).double()

    def terms(net: Net, x: Tensor) -> dict[str, Tensor]:
        a, b, c = net(x)
        return {
            "depth": (a - 3).abs().mean() + 0.5 * (a - 3).square().mean(),
            "normals": 1 - F.cosine_similarity(b, -torch.ones_like(b)).mean() + 0.1 * b.square().mean(),
            "edges": sum(F.softplus(-3 * c[:, i]).mean() for i in range(2)) - a.detach().mean(),
        }

    ref, start = copy.deepcopy(net), copy.deepcopy(net)
    optimizer, other = sgd(net), sgd(ref)
    for x in batches(5, 4):
        optimizer.zero_grad()
        surgery = fastmtl.backward(terms(net, x), net, method=PCGRAD)
        optimizer.step()
        reference(ref, [*terms(ref, x).values()])
        other.step()
        assert_same(net, ref, start)
    assert surgery.names == ("depth", "normals", "edges")


class Uncertain(Net):
    """Losses weighted by learned uncertainties: one parameter for each task, or one vector for all."""

    def __init__(self, vector: bool) -> None:
        super().__init__(mlp())
        self.log_var = nn.Parameter(torch.zeros(3)) if vector else nn.ParameterList(torch.zeros(()) for _ in range(3))

    def losses(self, x: Tensor) -> list[Tensor]:
        return [torch.exp(-self.log_var[t]) * loss + self.log_var[t] for t, loss in enumerate(losses_of(self(x)))]


@pytest.mark.parametrize("how", ["a parameter for each task", "shared", "marked", "features"])
def test_learned_uncertainty_weights_get_their_own_gradients(how):
    net = Uncertain(vector=how != "a parameter for each task").double()
    ref, start = copy.deepcopy(net), copy.deepcopy(net)
    if how in ("marked", "features"):
        fastmtl.mark_per_task(net.log_var)
    optimizer, other = sgd(net), sgd(ref)
    for x in batches(5, 4):
        optimizer.zero_grad()
        if how == "features":
            h = net.trunk(x)
            losses = [torch.exp(-net.log_var[t]) * loss + net.log_var[t]
                      for t, loss in enumerate(losses_of([head(h) for head in net.heads]))]  # fmt: skip
            fastmtl.backward(losses, features=h, method="sum")
            sum(ref.losses(x)).backward()
        else:
            arguments = {"shared": net.trunk} if how == "shared" else {}
            fastmtl.backward(net.losses(x), method=PCGRAD, **arguments)
            own = [*ref.heads.parameters(), *([ref.log_var] if how != "a parameter for each task" else ref.log_var)]
            set_grads(expected(ref.losses(x), [*ref.trunk.parameters()], own))
        optimizer.step()
        other.step()
        other.zero_grad()
        assert_same(net, ref, start)


def test_a_vector_of_uncertainties_left_alone_enters_the_gram():
    # why the table says mark it: every loss reaches the whole vector
    net, x = Uncertain(vector=True).double(), next(batches(5, 4))
    alone = fastmtl.backward(net.losses(x), method="sum").gram
    apart = fastmtl.backward(net.losses(x), shared=net.trunk, method="sum").gram
    added = torch.stack([torch.autograd.grad(loss, net.log_var)[0] for loss in net.losses(x)])
    torch.testing.assert_close(alone - apart, added @ added.mT)
    assert (alone - apart).diagonal().abs().max() > 0


# --- optimizers


class Agent(nn.Module):
    """Multi-task actor and critic on one batch of states and tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.actor = nn.ModuleDict({"trunk": mlp(), "heads": nn.ModuleList(nn.Linear(6, 2) for _ in range(3))})
        self.critic = nn.ModuleDict(
            {
                "trunk": nn.Sequential(nn.Linear(6, 6), nn.Tanh()),
                "heads": nn.ModuleList(nn.Linear(6, 1) for _ in range(3)),
            }
        )

    def act(self, x: Tensor, t: int) -> Tensor:
        return self.actor["heads"][t](self.actor["trunk"](x)).tanh()

    def value(self, x: Tensor, action: Tensor, t: int) -> Tensor:
        return self.critic["heads"][t](self.critic["trunk"](torch.cat([x, action], 1)))

    def critic_losses(self, x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            actions = [self.act(x, t) for t in range(3)]
        return [(self.value(x, a, t) - 3.0 * (-1) ** t).square().mean() for t, a in enumerate(actions)]

    def actor_losses(self, x: Tensor) -> list[Tensor]:
        return [-((-1) ** t) * self.value(x, self.act(x, t), t).mean() for t in range(3)]


def test_actor_and_critic_with_an_optimizer_each():
    agent = Agent().double()
    ref, start = copy.deepcopy(agent), copy.deepcopy(agent)
    ours = [sgd(part) for part in (agent.critic, agent.actor)]
    plain = [sgd(part) for part in (ref.critic, ref.actor)]
    for x in batches(5, 4):
        ours[0].zero_grad()
        fastmtl.backward(agent.critic_losses(x), agent.critic, method=PCGRAD)
        ours[0].step()
        kept = [p.grad.clone() for p in agent.critic.parameters()]
        ours[1].zero_grad()
        fastmtl.backward(agent.actor_losses(x), agent.actor, method=PCGRAD)  # through the critic, not into it
        ours[1].step()
        assert all(torch.equal(p.grad, g) for p, g in zip(agent.critic.parameters(), kept, strict=True))

        for part, losses, optimizer in zip(
            (ref.critic, ref.actor), (ref.critic_losses, ref.actor_losses), plain, strict=True
        ):
            trunk, heads = [*part["trunk"].parameters()], [*part["heads"].parameters()]
            set_grads(expected(losses(x), trunk, heads))
            optimizer.step()
        assert_same(agent, ref, start)


def test_one_forward_for_actor_and_critic_keeps_its_graph():
    # both kinds of losses from one graph: the first call must keep it, the second frees it
    agent = Agent().double()
    ref, x = copy.deepcopy(agent), next(batches(5, 4))
    critic, actor = agent.critic_losses(x), agent.actor_losses(x)
    fastmtl.backward(
        [c + 0 * a for c, a in zip(critic, actor, strict=True)], agent.critic, method=PCGRAD, retain_graph=True
    )
    fastmtl.backward(actor, agent.actor, method=PCGRAD)
    for part, losses in ((ref.critic, ref.critic_losses(x)), (ref.actor, ref.actor_losses(x))):
        set_grads(expected(losses, [*part["trunk"].parameters()], [*part["heads"].parameters()]))
    for p, q in zip(agent.parameters(), ref.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("limit", [0.05, 100.0])
def test_clipping_afterwards(limit):
    net = Net(mlp()).double()
    ref, start = copy.deepcopy(net), copy.deepcopy(net)
    optimizer, other = sgd(net), sgd(ref)
    for x in batches(5, 4):
        optimizer.zero_grad(set_to_none=False)
        fastmtl.backward(losses_of(net(x)), method=PCGRAD)
        norm = nn.utils.clip_grad_norm_(net.parameters(), limit)
        optimizer.step()
        reference(ref, losses_of(ref(x)))
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(ref.parameters(), limit))
        other.step()
        assert_same(net, ref, start)
        assert (norm > limit) == (limit < 1)


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"foreach": False}])
def test_adam_of_every_kind(options):
    net = Net(mlp()).double()
    ref, start = copy.deepcopy(net), copy.deepcopy(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, **options)
    other = torch.optim.AdamW(ref.parameters(), lr=0.01)
    for x in batches(5, 4):
        optimizer.zero_grad()
        fastmtl.backward(losses_of(net(x)), method=PCGRAD)
        optimizer.step()
        reference(ref, losses_of(ref(x)))
        other.step()
        assert_same(net, ref, start, rtol=1e-7, atol=1e-9)


def test_accumulation_in_a_bank_is_not_repeated_backward():
    nets = [Net(mlp()).double() for _ in range(1)]
    nets += [copy.deepcopy(nets[0]) for _ in range(4)]
    banked, repeated, ref_banked, ref_repeated, start = nets
    optimizers = {id(net): sgd(net) for net in nets}
    bank = fastmtl.GradientBank(banked, 3)
    for x in batches(8, 4):
        parts = x.split([2, 3, 3])
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        # once on what was accumulated: equals one call on the whole batch
        for part in parts:
            for t, loss in enumerate(losses_of(banked(part))):
                with bank.task(t):
                    (loss * len(part) / len(x)).backward(retain_graph=t < 2)
        bank.apply(PCGRAD)
        reference(ref_banked, losses_of(ref_banked(x)))
        # on each micro-batch alone: the sum of three surgeries
        total: dict[Tensor, Tensor] = {}
        for part in parts:
            fastmtl.backward([loss * len(part) / len(x) for loss in losses_of(repeated(part))], method=PCGRAD)
            losses = [loss * len(part) / len(x) for loss in losses_of(ref_repeated(part))]
            one = expected(losses, [*ref_repeated.trunk.parameters()], [*ref_repeated.heads.parameters()])
            total = {p: total.get(p, 0) + g for p, g in one.items()}
        set_grads(total)
        for optimizer in optimizers.values():
            optimizer.step()
        assert_same(banked, ref_banked, start)
        assert_same(repeated, ref_repeated, start)
    away = [(a - b).abs().max() for a, b in zip(banked.parameters(), repeated.parameters(), strict=True)]
    assert max(away) > 1e-4


class Two(Net):
    def __init__(self) -> None:
        super().__init__(mlp())
        self.heads = self.heads[:2]


def test_learning_rate_schedule_on_the_wrapper():
    net = Two().double()
    ref, start = copy.deepcopy(net), copy.deepcopy(net)
    wrapped = fastmtl.optim.PCGrad(torch.optim.SGD(net.parameters(), lr=0.4))
    schedule = torch.optim.lr_scheduler.SequentialLR(
        wrapped.optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(wrapped.optimizer, 0.5, total_iters=2),
            torch.optim.lr_scheduler.StepLR(wrapped.optimizer, 2, gamma=0.1),
        ],
        milestones=[2],
    )
    rates = []
    for x in batches(5, 4, steps=6):
        wrapped.pc_backward(losses_of(net(x)))  # no zero_grad, as in loops written for the port
        rates.append(wrapped.param_groups[0]["lr"])
        wrapped.step()
        schedule.step()

        losses = losses_of(ref(x))
        trunk = [*ref.trunk.parameters()]
        rows = torch.stack([torch.cat([g.flatten() for g in grad64(loss, trunk)]) for loss in losses])
        update = pcgrad_loop(rows, PAIR).mean(0)
        set_grads({p: g.reshape(p.shape) for p, g in zip(trunk, update.split([p.numel() for p in trunk]), strict=True)})
        own = [*ref.heads.parameters()]
        set_grads({p: a + b for p, a, b in zip(own, *[grad64(loss, own) for loss in losses], strict=True)})
        with torch.no_grad():
            for p in ref.parameters():
                p -= rates[-1] * p.grad
        assert_same(net, ref, start)
    assert rates == pytest.approx([0.2, 0.3, 0.4, 0.4, 0.04, 0.04])


def test_copies_of_the_model():
    net = Net(mlp()).double()
    ref = copy.deepcopy(net)
    decay = torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    ema, ref_ema = (torch.optim.swa_utils.AveragedModel(n, multi_avg_fn=decay) for n in (net, ref))
    start = copy.deepcopy(ema)
    optimizer, other = sgd(net), sgd(ref)
    for x in batches(5, 4):
        optimizer.zero_grad()
        fastmtl.backward(losses_of(net(x)), method=PCGRAD)
        optimizer.step()
        ema.update_parameters(net)
        reference(ref, losses_of(ref(x)))
        other.step()
        ref_ema.update_parameters(ref)
        assert_same(ema, ref_ema, start)
    assert all(p.grad is None for p in ema.parameters())
    # a copy made in the middle of training is a model of its own
    twin, before = copy.deepcopy(net), [p.grad.clone() for p in net.parameters()]
    x = next(batches(5, 4))
    want = expected(losses_of(twin(x)), [*twin.trunk.parameters()], [*twin.heads.parameters()])
    fastmtl.backward(losses_of(twin(x)), twin, method=PCGRAD)
    for p, g in want.items():
        torch.testing.assert_close(p.grad, g)
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), before, strict=True))


def test_a_teacher_beside_the_student():
    net = Net(mlp()).double()
    teacher = copy.deepcopy(net)
    for p in teacher.parameters():
        torch.nn.init.normal_(p)
        p.grad = torch.ones_like(p)

    def losses(net: Net, x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            goals = teacher(x)
        return [(y - g).square().mean() + loss for y, g, loss in zip(net(x), goals, losses_of(net(x)), strict=True)]

    train_both(net, lambda: batches(5, 4), losses)
    assert all(p.grad.eq(1).all() for p in teacher.parameters())


# --- wrapped and compiled modules


def test_params_as_a_data_parallel_module(monkeypatch: pytest.MonkeyPatch):
    net = Net(mlp()).double()
    with monkeypatch.context() as patch:
        # on a machine with a GPU it would move the model there
        patch.setattr(torch.cuda, "is_available", lambda: False)
        wrapped = nn.DataParallel(net)
    train_both(net, lambda: batches(5, 4), lambda net, x: losses_of(net(x)), params=wrapped)
    with pytest.raises(ValueError, match="needs no gradient"):
        fastmtl.backward([torch.ones(())], wrapped)
    with pytest.raises(TypeError, match=r"'module\.trunk\.0\.weight'"):
        trunk = wrapped.module.trunk[0]
        trunk.weight = nn.Parameter(trunk.weight.detach().to(torch.complex32))
        y = (trunk.weight.real.float().sum()) * next(wrapped.module.heads.parameters()).sum()
        fastmtl.backward([y, y * 2], wrapped)


def quiet_compile(f: Any, **options: Any) -> Any:
    # the first compilation of a process warns of this and that
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.compile(f, **options)


@pytest.fixture
def donated(request: pytest.FixtureRequest) -> Iterator[bool]:
    with torch._functorch.config.patch(donated_buffer=request.param):
        yield request.param


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("compiler", BACKENDS)
@pytest.mark.parametrize("donated", [False], indirect=True)
@pytest.mark.usefixtures("fresh_compiler", "donated")
def test_a_compiled_model(compiler):
    net = Net(NORMS["batch"]())
    ref, start = copy.deepcopy(net), copy.deepcopy(net)
    compiled = quiet_compile(net, backend=compiler)
    optimizer, other = sgd(net), sgd(ref)
    for x in batches(8, 1, 6, 6, dtype=torch.float32):
        optimizer.zero_grad()
        # the compiled module names its parameters otherwise; they are the same
        fastmtl.backward(losses_of(compiled(x)), compiled, shared=compiled.trunk, method=PCGRAD)
        optimizer.step()
        reference(ref, losses_of(ref(x)))
        other.step()
        assert_same(net, ref, start, rtol=1e-3, atol=1e-5)


def eager_backward_first(net: Net, compiled: Any, x: Tensor) -> None:
    """One ordinary training step: inductor then compiles a backward that reuses what was saved."""
    sum(losses_of(compiled(x))).backward()
    net.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize("donated", [True], indirect=True)
@pytest.mark.usefixtures("fresh_compiler", "donated")
def test_donated_buffers_are_refused_with_what_to_do():
    net, x = Net(NORMS["batch"]()), next(batches(8, 1, 6, 6, dtype=torch.float32))
    compiled = quiet_compile(net)
    eager_backward_first(net, compiled, x)
    # turned off too late torch would not refuse any more: the second task's gradient would be wrong
    for setting in (True, False):
        with torch._functorch.config.patch(donated_buffer=setting):
            for chunk_size in (None, 2):
                with pytest.raises(RuntimeError, match=r"donated_buffer = False before.*features=.*GradientBank"):
                    fastmtl.backward(losses_of(compiled(x)), shared=net.trunk, chunk_size=chunk_size)
                assert all(p.grad is None for p in net.parameters())
            fastmtl.backward([losses_of(compiled(x))[1]], shared=net.trunk, method="sum")  # one pass may
            net.zero_grad()
    # a head of its own is passed once, but beside an eager trunk that is passed again: here torch refuses
    head = quiet_compile(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)))
    head(net.trunk(x)).sum().backward()
    net.zero_grad()
    h = net.trunk(x)
    losses = [head(h).mean(), net.heads[1](h).mean()]
    with pytest.raises(RuntimeError, match="donated_buffer = False before"):
        fastmtl.backward(losses, shared=net.trunk)


@pytest.mark.slow
@pytest.mark.parametrize("donated", [True], indirect=True)
@pytest.mark.usefixtures("fresh_compiler", "donated")
def test_donated_buffers_do_not_matter_to_features_and_banks():
    net = Net(NORMS["batch"]())
    x = next(batches(8, 1, 6, 6, dtype=torch.float32))
    ref, start = copy.deepcopy(net), copy.deepcopy(net)
    trunk = quiet_compile(net.trunk)
    optimizer, other = sgd(net), sgd(ref)
    for x in batches(8, 1, 6, 6, dtype=torch.float32):
        optimizer.zero_grad()
        h = trunk(x)
        losses = losses_of([head(h) for head in net.heads])
        surgery = fastmtl.backward(losses, features=h, method=PCGRAD)
        optimizer.step()
        h = ref.trunk(x)
        losses = losses_of([head(h) for head in ref.heads])
        rows = torch.stack([grad64(loss, [h])[0].flatten() for loss in losses])
        torch.testing.assert_close(surgery.gram.double(), rows @ rows.mT, rtol=1e-3, atol=1e-5)
        other.zero_grad()
        sum(w * loss for w, loss in zip(surgery.weights.float(), losses, strict=True)).backward(
            inputs=[*ref.trunk.parameters()], retain_graph=True
        )
        sum(losses).backward(inputs=[*ref.heads.parameters()])
        other.step()
        assert_same(net, ref, start, rtol=1e-3, atol=1e-5)
    bank = fastmtl.GradientBank(net, 3, shared=net.trunk)
    net.zero_grad()
    for t in range(3):
        with bank.task(t):
            net.heads[t](trunk(x)).sub(3.0 * (-1) ** t).square().mean().backward()
    bank.apply(PCGRAD)
    reference(ref := copy.deepcopy(net), [losses_of(ref(x))[t] for t in range(3)])
    for p, q in zip(net.parameters(), ref.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("compiler", ["eager", *BACKENDS])
@pytest.mark.parametrize("donated", [False], indirect=True)
@pytest.mark.usefixtures("fresh_compiler", "donated")
def test_a_whole_compiled_step(compiler):
    net = Net(mlp()).double()
    ref, start = copy.deepcopy(net), copy.deepcopy(net)
    optimizer, other = torch.optim.SGD(net.parameters(), lr=0.1), torch.optim.SGD(ref.parameters(), lr=0.1)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        losses = losses_of(net(x))
        fastmtl.backward(losses, shared=net.trunk, method=PCGRAD)
        optimizer.step()

    compiled = quiet_compile(step, backend=compiler)
    for x in batches(5, 4):
        compiled(x)
        reference(ref, losses_of(ref(x)))
        other.step()
        assert_same(net, ref, start, rtol=1e-7, atol=1e-9)


# --- hooks


def count(hooks: dict[str, int], name: str) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        hooks[name] = hooks.get(name, 0) + 1

    return hook


def listen(net: Net) -> dict[str, int]:
    hooks: dict[str, int] = {}
    for part, p in (("trunk", net.trunk[0].weight), ("head", net.heads[1].weight)):
        p.register_hook(count(hooks, f"{part} tensor"))
        p.register_post_accumulate_grad_hook(count(hooks, f"{part} accumulated"))
    net.trunk[2].register_full_backward_hook(count(hooks, "trunk module"))
    net.trunk.register_forward_hook(count(hooks, "trunk forward"))
    return hooks


@pytest.mark.parametrize(
    ("how", "trunk", "module"), [("plain", 3, 3), ("chunks of 2", 2, 2), ("features", 1, 1), ("bank", 3, 3)]
)
def test_how_often_hooks_run(how, trunk, module):
    net, x = Net(mlp()).double(), next(batches(5, 4))
    hooks = listen(net)
    if how == "bank":
        bank = fastmtl.GradientBank(net, 3)
        for t in range(3):
            with bank.task(t):
                losses_of(net(x))[t].backward()
        bank.apply(PCGRAD)
    else:
        h = net.trunk(x)
        options = {"plain": {}, "chunks of 2": {"chunk_size": 2}, "features": {"features": h}}[how]
        fastmtl.backward(losses_of([head(h) for head in net.heads]), net, method=PCGRAD, **options)
    assert hooks == {
        "trunk tensor": trunk,
        "trunk accumulated": 3 if how == "bank" else 1,
        "head tensor": 1,
        "head accumulated": 1,
        "trunk module": module,
        "trunk forward": 3 if how == "bank" else 1,
    }


def test_an_optimizer_in_the_hook_after_accumulation():
    net = Net(mlp()).double()
    ref, start = copy.deepcopy(net), copy.deepcopy(net)
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in net.parameters()}

    def step(p: Tensor) -> None:
        assert not torch.is_grad_enabled()
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(step)
    other = torch.optim.SGD(ref.parameters(), lr=0.1)
    for x in batches(5, 4):
        fastmtl.backward(losses_of(net(x)), method=PCGRAD)
        reference(ref, losses_of(ref(x)))
        other.step()
        assert_same(net, ref, start)
        assert all(p.grad is None for p in net.parameters())


def test_a_tensor_hook_that_changes_the_gradient_counts_in_the_gram():
    net, x = Net(mlp()).double(), next(batches(5, 4))
    weight = net.trunk[2].weight
    weight.register_hook(lambda g: g * 3)
    want = expected(losses_of(net(x)), [*net.trunk.parameters()], [*net.heads.parameters()])
    fastmtl.backward(losses_of(net(x)), method=PCGRAD)
    for p, g in want.items():
        torch.testing.assert_close(p.grad, g)
