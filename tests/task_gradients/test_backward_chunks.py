"""`fastmtl.backward(chunk_size=)`: several backward passes at once give what one at a time gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases_backward import assert_grads, expected, make, refuses
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastmtl
from fastmtl import methods

ORDER = torch.tensor([[1, 2, 3, 4], [2, 3, 4, 0], [3, 4, 0, 1], [4, 0, 1, 2], [0, 1, 2, 3]])
PCGRAD = methods.PCGrad(order=ORDER)


def count_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many losses went into each call of `torch.autograd.grad`."""
    seen: list[int] = []
    grad = torch.autograd.grad

    def spy(outputs, *args, **kwargs):
        seen.append(len(outputs))
        return grad(outputs, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", spy)
    return seen


@pytest.mark.parametrize(
    ("chunk_size", "passes"), [(None, [1] * 5), (1, [1] * 5), (2, [2, 2, 1]), (3, [3, 2]), (5, [5]), (50, [5])]
)
@pytest.mark.parametrize("retain_graph", [False, True])
def test_equals_one_pass_for_each_task(backend, monkeypatch, chunk_size, passes, retain_graph):
    net, x = make(5)
    losses = net.losses(x)
    want = expected(losses, [*net.trunk.parameters()], [*net.heads.parameters()], ORDER)
    plain = fastmtl.backward(net.losses(x), method=PCGRAD)
    net.zero_grad()
    seen = count_passes(monkeypatch)
    surgery = fastmtl.backward(losses, method=PCGRAD, chunk_size=chunk_size, retain_graph=retain_graph)
    assert seen == passes
    assert_grads(want)
    torch.testing.assert_close(surgery.gram, plain.gram)
    if retain_graph:
        losses[0].backward()
    else:
        with pytest.raises(RuntimeError, match="second time"):
            losses[0].backward()


def test_what_a_loss_does_not_reach_stays_absent(backend):
    torch.manual_seed(0)
    trunk, pair, heads = nn.Linear(4, 5), nn.Linear(5, 5), nn.ModuleList(nn.Linear(5, 1) for _ in range(4))
    h = trunk(torch.randn(6, 4))
    p = pair(h)
    losses = [heads[0](p).mean(), None, -heads[1](p).square().mean(), -heads[2](h).mean()]
    order = torch.tensor([[2, 3, 0], [1, 1, 1], [3, 0, 2], [0, 2, 3]])
    own = [*heads[:3].parameters()]
    want = expected(losses, [*trunk.parameters(), *pair.parameters()], own, order)
    alone = fastmtl.backward(losses, method=methods.PCGrad(order=order), retain_graph=True)
    for q in (*trunk.parameters(), *pair.parameters(), *heads.parameters()):
        q.grad = None
    surgery = fastmtl.backward(losses, method=methods.PCGrad(order=order), chunk_size=4)
    assert_grads(want)
    torch.testing.assert_close(surgery.gram, alone.gram)
    assert all(q.grad is None for q in heads[3].parameters())


def test_a_loss_that_reaches_nothing_of_the_chunk_has_no_pass(monkeypatch):
    net, x = make()
    losses = net.losses(x)
    lonely = nn.Parameter(torch.ones(()))
    seen = count_passes(monkeypatch)
    fastmtl.backward([losses[0], lonely * 2, losses[1]], net, chunk_size=3, method="sum")
    assert seen == [2] and lonely.grad is None


def test_another_loss_of_the_chunk_leaves_no_trace_on_a_head():
    # the other losses' rows of zeros times an infinite derivative would be NaN
    net, x = make(5)
    losses = net.losses(x)
    losses[0] = losses[0] * torch.inf
    fastmtl.backward(losses, net, method="sum", chunk_size=5, retain_graph=True)
    chunked = [p.grad.clone() for p in net.heads.parameters()]
    net.zero_grad()
    fastmtl.backward(losses, net, method="sum")
    for p, g in zip(net.heads.parameters(), chunked, strict=True):
        torch.testing.assert_close(g, p.grad, equal_nan=True)
    assert net.heads[0].bias.grad.isinf().all() and net.heads[1].bias.grad.isfinite().all()
    assert not net.trunk[0].weight.grad.isfinite().all()


def test_losses_of_several_dtypes():
    net, x = make()
    losses = net.losses(x)
    order = torch.tensor([[1, 2, 0], [2, 0, 1], [0, 1, 2]])
    want = expected(losses, [*net.trunk.parameters()], [*net.heads.parameters()], order)
    mixed = [losses[0].double(), losses[1], losses[2].double()]
    fastmtl.backward(mixed, method=methods.PCGrad(order=order), chunk_size=3)
    assert_grads(want)


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.GELU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(32, 5),
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutions": (conv_net, (4, 3, 12, 12)),
    "channels_last": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(512, 5)
        ).to(memory_format=torch.channels_last),
        (4, 3, 12, 12),
    ),
    "attention": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(40, 5)),
        (4, 5, 8),
    ),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, 5), nn.LayerNorm(5)), (4, 6),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("shared", [False, True])
def test_kinds_of_models(kind, shared):
    make_model, shape = MODELS[kind]
    model = make_model().double()
    x = torch.randn(shape, dtype=torch.float64)
    if kind == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    out = model(x)
    losses = [(out[:, t] - 3.0 * (-1) ** t).square().mean() for t in range(5)]
    where = {"shared": model} if shared else {}
    plain = fastmtl.backward(losses, method=PCGRAD, retain_graph=True, **where)
    want = {p: p.grad.clone() for p in model.parameters()}
    assert plain.conflicts().any()
    model.zero_grad()
    chunked = fastmtl.backward(losses, method=PCGRAD, chunk_size=2, **where)
    assert_grads(want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(chunked.gram, plain.gram, rtol=1e-9, atol=1e-12)
    for p in model.parameters():
        assert p.grad.stride() == p.stride()


def test_recurrent_networks_on_the_cpu():
    model = nn.ModuleList([nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 5)]).double()
    y = model[1](model[0](torch.randn(3, 7, 4, dtype=torch.float64))[0][:, -1])
    losses = [(y[:, t] - 3.0 * (-1) ** t).square().mean() for t in range(5)]
    fastmtl.backward(losses, method=PCGRAD, retain_graph=True)
    want = {p: p.grad.clone() for p in model.parameters()}
    model.zero_grad()
    fastmtl.backward(losses, method=PCGRAD, chunk_size=5)
    assert_grads(want, rtol=1e-9, atol=1e-12)


class WritesItsGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return torch.from_numpy(g.numpy() * 1)


def test_what_vmap_cannot_batch_says_so():
    net, x = make()
    net.trunk[0].register_forward_hook(lambda module, args, out: WritesItsGradient.apply(out))
    losses = net.losses(x)
    refuses(
        lambda: fastmtl.backward(losses, net, chunk_size=2),
        RuntimeError,
        r"2 backward passes at once \(chunk_size=2\) failed.*use chunk_size=1. torch says: ",
        net,
    )
    losses = net.losses(x)
    order = torch.tensor([[1, 2, 0], [2, 0, 1], [0, 1, 2]])
    want = expected(losses, [*net.trunk.parameters()], [*net.heads.parameters()], order)
    fastmtl.backward(losses, net, method=methods.PCGrad(order=order), chunk_size=1)
    assert_grads(want)


BATCHED_SINCE = pytest.mark.skipif(torch.__version__ >= (2, 14), reason="torch 2.14 batches it")


@pytest.mark.parametrize("kind", [pytest.param("channels_last batch norm", marks=BATCHED_SINCE), "dropout recomputed"])
def test_layers_that_torch_cannot_batch(kind):
    if kind == "dropout recomputed":
        net, x = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 5)), torch.randn(6, 4)
        out = checkpoint(net, x, use_reentrant=False)
    else:
        net, x = conv_net().to(memory_format=torch.channels_last), torch.randn(4, 3, 12, 12)
        out = net(x.to(memory_format=torch.channels_last))
    losses = [(out[:, t] - 3.0 * (-1) ** t).square().mean() for t in range(5)]
    refuses(lambda: fastmtl.backward(losses, net, chunk_size=2), RuntimeError, "use chunk_size=1", net)


def test_recomputed_activations():
    net, x = make(5)
    want = expected(net.losses(x), [*net.trunk.parameters()], [*net.heads.parameters()], ORDER)
    h = checkpoint(net.trunk, x, use_reentrant=False)
    losses = [F.mse_loss(head(h), torch.full((5, 2), 3.0 * (-1) ** t)) for t, head in enumerate(net.heads)]
    fastmtl.backward(losses, net, method=PCGRAD, chunk_size=3)
    assert_grads(want)


@pytest.mark.parametrize(
    ("chunk_size", "error", "match"),
    [
        (0, ValueError, "chunk_size: expected at least 1, got 0"),
        (-3, ValueError, "chunk_size: expected at least 1, got -3"),
        (2.0, TypeError, "chunk_size: expected an int or None, got float"),
        (True, TypeError, "chunk_size:.*bool"),
        ("all", TypeError, "chunk_size:.*str"),
    ],
)
def test_refuses_bad_sizes(chunk_size, error, match):
    net, x = make()
    refuses(lambda: fastmtl.backward(net.losses(x), net, chunk_size=chunk_size), error, match, net)


def test_a_hook_on_a_parameter_runs_once_for_each_chunk():
    net, x = make(5)
    want = expected(net.losses(x), [*net.trunk.parameters()], [*net.heads.parameters()], ORDER)
    shapes: list[tuple[int, ...]] = []
    net.trunk[0].weight.register_hook(lambda g: shapes.append(tuple(g.shape)))
    fastmtl.backward(net.losses(x), net, method=PCGRAD, chunk_size=3)
    assert shapes == [(6, 4)] * 2  # as vmap shows it
    assert_grads(want)
