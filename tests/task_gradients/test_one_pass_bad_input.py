"""`one_pass` refuses what it can't get right, and says what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases_one_pass import IDS, N, T, cross_entropy, of
from torch import Tensor, nn

import fastmtl


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5)).double()


def _x() -> Tensor:
    return torch.randn(N, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def _other_bank() -> fastmtl.OnePassBank:
    net, x = _net(), _x()
    with fastmtl.one_pass(net, IDS, T) as bank:
        cross_entropy(net(x)).sum().backward()
    return bank


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"task_ids": [0, 1]}, TypeError, "task_ids: expected an int64 or int32 tensor, got list"),
        ({"task_ids": IDS.float()}, TypeError, "task_ids: expected int64 or int32"),
        ({"task_ids": IDS[None]}, ValueError, r"task_ids: expected shape \[N\]"),
        ({"task_ids": IDS[:0]}, ValueError, "task_ids: expected at least one sample"),
        ({"task_ids": IDS + 1}, ValueError, r"task_ids: expected -1 \(no task\) or 0..2, got 3"),
        ({"task_ids": IDS - 2}, ValueError, r"task_ids: expected -1 \(no task\) or 0..2, got -2"),
        ({"num_tasks": 0}, ValueError, "num_tasks: expected 1 to 128"),
        ({"num_tasks": 129}, ValueError, "num_tasks: expected 1 to 128"),
        ({"num_tasks": 2.0}, TypeError, "num_tasks: expected a number or names"),
        ({"num_tasks": ["a", "a", "b"]}, ValueError, "num_tasks: expected different names"),
        ({"batch_dim": 1.0}, TypeError, "batch_dim: expected an int"),
        ({"mixing": "yes"}, ValueError, "mixing: expected 'error' or 'partition', got 'yes'"),
        ({"fallback": "no"}, ValueError, "fallback: expected 'error' or 'loop'"),
        ({"memory": "disk"}, ValueError, "memory: expected 'bank' or 'stream'"),
        ({"loss_reduction": "max"}, ValueError, "loss_reduction: expected 'sum' or 'mean'"),
        ({"model": 3}, TypeError, "model: expected a module"),
        ({"model": []}, ValueError, "model: expected at least one parameter"),
        ({"model": nn.Linear(2, 2).requires_grad_(False)}, ValueError, "model: .* needs a gradient and is shared"),
        ({"model": fastmtl.mark_per_task(nn.Linear(2, 2))}, ValueError, "model: .* needs a gradient and is shared"),
        ({"model": nn.Linear(2, 2, dtype=torch.complex32)}, TypeError, "'weight' of shape .*expected float64"),
        ({"model": [torch.ones(2, device=d).requires_grad_() for d in ("cpu", "meta")]}, ValueError, "shared= names"),
        ({"shared": nn.Linear(2, 2)}, ValueError, "shared: parameter 'weight'"),
        ({"bank": _other_bank()}, ValueError, "bank: expected a bank of the same parameters"),
    ],
)  # fmt: skip
def test_arguments(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    given = {"model": _net(), "task_ids": IDS, "num_tasks": T, **arguments}
    with pytest.raises(error, match=match):
        fastmtl.one_pass(**given)


def test_a_bank_of_other_tasks() -> None:
    net = _net()
    bank = fastmtl.OnePassBank(dict.fromkeys(net.parameters(), ""), ("0", "1", "2"))
    with pytest.raises(ValueError, match=r"bank: expected the tasks \['a', 'b', 'c'\]"):
        fastmtl.one_pass(net, IDS, ["a", "b", "c"], bank=bank)
    with pytest.raises(ValueError, match="bank: memory='stream'"):
        fastmtl.one_pass(net, IDS, T, bank=bank, memory="stream")


def test_ids_of_another_length_than_the_batch() -> None:
    net, x = _net(), _x()
    with (
        pytest.raises(ValueError, match="task_ids: expected the length of the batch, got 5"),
        fastmtl.one_pass(net, IDS[:5], T),
    ):
        net(x).square().sum().backward()


def _refused(
    loss: Callable[[nn.Module, Tensor], Tensor], match: str, net: nn.Module | None = None, **more: Any
) -> None:
    net, x = _net() if net is None else net, _x()
    with pytest.raises((ValueError, RuntimeError), match=match), fastmtl.one_pass(net, IDS, T, **more):
        loss(net, x).backward()
    # the block has let go of everything
    cross_entropy(_net()(_x())).sum().backward()
    with fastmtl.one_pass(_net(), IDS, T):
        pass


def test_losses_that_mix_tasks() -> None:
    _refused(lambda m, x: cross_entropy(m(x)).mean().square(), "mixes samples.*mul of a sum|mixes samples.*square")
    _refused(lambda m, x: cross_entropy(m(x)).max(), "mixes samples of different tasks .max over the axis")
    _refused(lambda m, x: (m(x) @ m(x).T).mean(), "mixes samples of different tasks .a product of samples")
    _refused(lambda m, x: cross_entropy(m(x).softmax(0)).mean(), "softmax along the axis of the samples")
    _refused(lambda m, x: (m(x) - m(x).mean(0)).square().mean(), "joins a sum over samples")
    _refused(lambda m, x: torch.cdist(m(x), m(x)).mean(), "cdist can't be followed")


def test_a_batch_made_inside_the_block() -> None:
    """It is taken for a constant of the model."""
    net = _net()
    with pytest.raises(ValueError, match="was the input made inside the block"), fastmtl.one_pass(net, IDS, T):
        cross_entropy(net(_x()))
    with fastmtl.one_pass(net, IDS, T) as bank:
        cross_entropy(net(bank.samples(_x()))).sum().backward()
    assert bank.row(2)[0] is not None


def test_layers_that_mix_samples() -> None:
    torch.manual_seed(0)
    norm = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Linear(7, 5)).double()
    ways = r"(?s)batch norm in training mode.*norm.eval.*GroupNorm.*TaskBatchNorm2d.*GradientBank.*mixing='partition'"
    _refused(lambda m, x: cross_entropy(m(x)).mean(), ways, norm)
    plain = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7, affine=False), nn.Linear(7, 5)).double()
    _refused(lambda m, x: cross_entropy(m(x)).mean(), ways, plain)
    frozen = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Linear(7, 5)).double()
    frozen[0].requires_grad_(False)
    frozen[1].requires_grad_(False)  # no gradient flows through these statistics
    x = _x()
    with fastmtl.one_pass(frozen, IDS, T):
        cross_entropy(frozen(x)).mean().backward()


def test_layers_that_are_not_taken_apart() -> None:
    norm = nn.Embedding(7, 5, max_norm=1.0).double()
    index = torch.arange(N) % 7
    _refused(lambda m, x: m(index).sum(), "max_norm", norm)


def test_a_parameter_along_the_axis_of_the_samples() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(N, 6, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.table  # a row for each position in the batch: of no task

    _refused(lambda m, x: m(x).sum(), r"'table' of shape \[8, 6\] meets the samples in add", Table())


def test_time_first_with_as_many_steps_as_samples() -> None:
    """A table of positions against a batch whose dimension was not named."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.table = nn.Linear(6, 6), nn.Parameter(torch.randn(N, 1, 6))

        def forward(self, x: Tensor) -> Tensor:  # [L, N, D]
            return self.first(x) + self.table

    torch.manual_seed(0)
    model, x = Positions(), torch.randn(N, N, 6)
    with pytest.raises(ValueError, match="'table'"), fastmtl.one_pass(model, IDS, T):
        model(x)
    with fastmtl.one_pass(model, IDS, T, batch_dim=1) as bank:
        model(x).square().sum().backward()
    losses = model(x).square().sum((0, 2))
    for t in range(T):
        want = torch.autograd.grad(losses[of(t)].sum(), list(model.parameters()), retain_graph=True)
        for g, w in zip(bank.row(t), want, strict=True):
            torch.testing.assert_close(g, w)


def test_calls_of_backward() -> None:
    net, x = _net(), _x()
    with fastmtl.one_pass(net, IDS, T) as bank:
        losses = cross_entropy(net(x))
        losses.sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="backward was called before in this block"):
            losses.mean().backward()
    assert bank.row(0)[0] is not None
    with fastmtl.one_pass(net, IDS, T) as bank:
        loss = cross_entropy(net(x)).sum()
        with pytest.raises(RuntimeError, match=r"not (through )?torch\.autograd"):
            torch.autograd.backward(loss, retain_graph=True)
        with pytest.raises(ValueError, match="create_graph"):
            loss.backward(create_graph=True)
        with pytest.raises(ValueError, match="create_graph"):
            loss.backward(inputs=[x])
    with pytest.raises(RuntimeError, match=r"outside loss\.backward"):
        loss.backward()
    with pytest.raises(RuntimeError, match="no backward pass has filled"):
        bank.apply()
    with pytest.raises(RuntimeError, match="no backward pass has filled"):
        bank.row(0)


def test_a_model_changed_inside() -> None:
    net, x = _net(), _x()
    with fastmtl.one_pass(net, IDS, T):
        loss = cross_entropy(net(x)).sum()
        with torch.no_grad():
            net[2].weight.mul_(2)
        with pytest.raises(RuntimeError, match=r"'2.weight' of shape \[5, 7\] was changed since the block began"):
            loss.backward()
    net = _net()
    with fastmtl.one_pass(net, IDS, T):
        loss = cross_entropy(net(x)).sum()
        net[0] = nn.Linear(6, 7).double()
        with pytest.raises(RuntimeError, match=r"'0.weight'.* is no longer in the model"):
            loss.backward()
    net = _net()
    with fastmtl.one_pass(net, IDS, T) as bank:
        cross_entropy(net(x)).sum().backward()
    with torch.no_grad():
        net[0].weight.add_(1)
    with pytest.raises(RuntimeError, match=r"'0.weight'.*changed"):
        bank.apply()


def test_blocks_in_blocks() -> None:
    net, other = _net(), fastmtl.one_pass(_net(), IDS, T)
    with fastmtl.one_pass(net, IDS, T), pytest.raises(RuntimeError, match="can't be nested"):
        other.__enter__()


def test_what_the_bank_refuses() -> None:
    net, x = _net(), _x()
    with fastmtl.one_pass(net, IDS, ["a", "b", "c"], memory="stream") as bank:
        with pytest.raises(ValueError, match="dim: expected a dimension of 8 samples, got 6"):
            bank.samples(x, 1)
        with pytest.raises(ValueError, match="dim: expected a dimension of a tensor"):
            bank.samples(x, 2)
        with pytest.raises(TypeError, match="x: expected a tensor"):
            bank.constant(3)
        with pytest.raises(ValueError, match="needs no gradient"):
            bank.constant(net(x))
        with pytest.raises(TypeError, match="loss: expected a tensor"):
            bank.summed(3)
        with pytest.raises(ValueError, match="task: expected one of a, b, c"):
            bank.verify(cross_entropy(net(x)).sum(), "d")
        cross_entropy(net(x)).sum().backward()
    with pytest.raises(RuntimeError, match="keeps no rows"):
        bank.row("a")
    with pytest.raises(ValueError, match="task: expected one of a, b, c"):
        bank.row("d")
    for call in (bank.samples, bank.constant, bank.summed, bank.verify):
        with pytest.raises(RuntimeError, match="call it inside the one_pass block"):
            call(x)
    with pytest.raises(ValueError, match="method: expected one of"):
        bank.apply("nothing")
    with pytest.raises(TypeError, match="loss_scale"):
        bank.apply(loss_scale="1")
    bank.apply()


def test_parameters_used_where_calls_cant_be_seen() -> None:
    net, x = _net(), _x()
    traced = torch.jit.trace(lambda x, w: torch.tanh(x @ w.T), (x, net[0].weight.detach()))
    match = r"what torch does not show \(a scripted function, torch.func\).* x = bank.samples\(x, dim\) tells"
    with pytest.raises(ValueError, match=match), fastmtl.one_pass(net, IDS, T):
        cross_entropy(net[2](traced(x, net[0].weight))).sum().backward()
    for tell in ("samples", "summed"):
        with (
            fastmtl.one_pass(net, IDS, T) as bank,
            pytest.raises(ValueError, match=r"'0.weight'.* was used on the way"),
        ):
            out = traced(x, net[0].weight)
            getattr(bank, tell)(out.relu() if tell == "samples" else out.sum())
    scripted = torch.jit.script(nn.Linear(6, 5).double())
    with pytest.raises(ValueError, match="can't be told"), fastmtl.one_pass(scripted, IDS, T):
        cross_entropy(scripted(x)).sum().backward()


def test_weights_on_losses_belong_outside_the_bank() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.log_var = _net(), nn.Parameter(torch.zeros(T, dtype=torch.float64))

    model, x = Weighted(), _x()

    def total() -> Tensor:
        losses = cross_entropy(model.net(x))
        return sum((-model.log_var[t]).exp() * losses[of(t)].sum() + model.log_var[t] for t in range(T))  # type: ignore[return-value]

    with pytest.raises(ValueError, match=r"'log_var'.*sum over the samples.*shared="), fastmtl.one_pass(model, IDS, T):
        total().backward()
    want = torch.autograd.grad(total(), model.log_var)[0]
    with fastmtl.one_pass(model, IDS, T, shared=model.net):
        total().backward()
    torch.testing.assert_close(model.log_var.grad, want)


def test_values_written_in_place() -> None:
    net = nn.Linear(6, 5).double()

    def with_a_part_written(m: nn.Module, x: Tensor) -> Tensor:
        w = m.weight * 1
        w[0].mul_(2)
        return F.linear(x, w).sum()

    _refused(with_a_part_written, "can't be told", net)

    def beside_a_constant(m: nn.Module, x: Tensor) -> Tensor:
        mask = torch.ones(5, 6, dtype=torch.float64)
        w = m.weight * mask
        mask.zero_()
        return F.linear(x, w).sum()

    _refused(beside_a_constant, "a constant beside them was changed in place", net)


def test_terms_on_data_without_tasks() -> None:
    net, x = _net(), _x()
    more, square = torch.randn(7, 6, dtype=torch.float64), torch.rand(N, N, dtype=torch.float64)

    def with_term(data: Callable[[], Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
        return lambda m, _: cross_entropy(m(x)).mean() + m(data()).square().mean()

    for data in (lambda: more, lambda: torch.randn(N, 6).double(), lambda: x.new_ones(N, 6)):
        _refused(with_term(data), "data without tasks: linear of a tensor", net)
        _refused(lambda m, _, data=data: m(data()).square().mean(), "data without tasks|the length of the batch", net)
    for mixed in (lambda: x.flip(0), lambda: x.sort(0)[0], lambda: x.softmax(0), lambda: square @ x):
        _refused(with_term(mixed), "it meets what depends on several samples", net)
    for p in net.parameters():
        p.grad = None
    with fastmtl.one_pass(net, IDS, T) as bank:  # told to be no batch, the term goes to .grad
        (cross_entropy(net(x)).mean() + net(bank.constant(more)).square().mean()).backward()
    want = torch.autograd.grad(net(more).square().mean(), list(net.parameters()))
    for p, g in zip(net.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, g)
    assert bank.row(0)[0] is not None


def test_a_backward_pass_that_fails() -> None:
    net, x = _net(), _x()
    with fastmtl.one_pass(net, IDS, T) as bank:
        h = net[1](net[0](x))
        h.register_hook(lambda g: 1 / 0)
        loss = cross_entropy(net[2](h)).sum()
        with pytest.raises(ZeroDivisionError):
            loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="backward was called before"):
            cross_entropy(net(x)).sum().backward()
    with pytest.raises(RuntimeError, match="no backward pass has filled"):
        bank.row(0)


def test_constants_changed_after_they_met_a_parameter() -> None:
    net, x = nn.Linear(6, 5).double(), _x()
    factor = torch.ones(5, 6, dtype=torch.float64)

    def changed(m: nn.Module, _: Tensor) -> Tensor:
        w = m.weight * factor
        factor.zero_()
        return F.linear(x, w).sum()

    _refused(changed, "changed in place since", net)


def test_nothing_is_left_on_tensors() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 5).double()
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.steps.add_(1)
            return self.inner(x.contiguous())

    net, x = Counting(), _x()
    with fastmtl.one_pass(net, IDS, T) as bank:
        cross_entropy(net(bank.samples(x))).sum().backward()
    assert not vars(x) and not vars(net.steps) and not vars(IDS)


# --- gradients that are changed or taken inside the block


def _hooked(hook, **options):
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh()).double(), torch.randn(6, 4).double()
    ids = torch.arange(6) % 3

    def loss(which):
        h = model(x[which])
        h.register_hook(hook)
        return h.square().sum()

    with fastmtl.one_pass(model, ids, 3, **options) as bank:
        loss(...).backward()
    rows = [bank.row(t) for t in range(3)]
    for t, row in enumerate(rows):
        expected = torch.autograd.grad(loss(ids == t), list(model.parameters()))
        torch.testing.assert_close(list(row), list(expected))


@pytest.mark.parametrize(
    "hook", [lambda g: -0.5 * g, lambda g: g.clamp(-1, 1), lambda g: None, lambda g: g / g.norm(dim=1, keepdim=True)]
)
def test_hooks_of_activations_that_keep_samples_apart(hook):
    _hooked(hook)


@pytest.mark.parametrize(
    "hook",
    [
        lambda g: g / g.norm(),
        lambda g: g - g.mean(0),
        lambda g: g * torch.special.log_ndtr(g.sum()),
        lambda g: g / g.norm().item(),
        lambda g: (g.div_(g.detach().abs().max()), None)[1],
        lambda g: g.flip(0),
    ],
)
def test_hooks_of_activations_that_mix_samples(hook):
    with pytest.raises(ValueError, match="a hook of the gradient"):
        _hooked(hook)


def test_hooks_of_activations_under_a_stream():
    with pytest.raises(ValueError, match="memory='bank'"):
        _hooked(lambda g: g.clamp(-1, 1), memory="stream")


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.Identity()])
def test_gradient_penalties_are_refused(norm):
    model, x = nn.Sequential(norm, nn.Linear(6, 4), nn.SiLU()).double(), torch.randn(6, 6).double().requires_grad_()
    with fastmtl.one_pass(model, torch.arange(6) % 3, 3):
        y = model(x).sum(1)
        with pytest.raises(ValueError, match="GradientBank"):
            torch.autograd.grad(y.sum(), x, create_graph=True)


def test_the_loss_of_another_model():
    model, other, x = nn.Linear(4, 2), nn.Linear(4, 2), torch.randn(6, 4)
    with pytest.raises(ValueError, match="another model"), fastmtl.one_pass(other, torch.arange(6) % 3, 3):
        model(x).sum().backward()


def test_a_partition_can_not_be_checked():
    with pytest.raises(ValueError, match="check: "):
        fastmtl.one_pass(nn.Linear(4, 2), torch.arange(6) % 3, 3, mixing="partition", check=True)
