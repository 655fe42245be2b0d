"""`fastmtl.backward` against gradients computed apart in float64."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from cases_backward import PCGRAD, Table, assert_grads, expected, grad64, in_conflict, make, refuses
from torch import Tensor, nn

import fastmtl
from fastmtl import methods

# --- what it computes


@pytest.mark.parametrize("form", ["list", "tuple", "dict", "stack", "cat", "scaled stack", "picked"])
def test_trunk_is_operated_on_and_heads_are_not(backend, form):
    net, x = make()
    losses = net.losses(x)
    factor = torch.tensor([1.0, 2.0, 0.5]) if form == "scaled stack" else torch.ones(3)
    want = expected(
        [loss * f for loss, f in zip(losses, factor, strict=True)], [*net.trunk.parameters()], [*net.heads.parameters()]
    )
    vector = torch.stack(losses)
    given = {
        "list": losses,
        "tuple": tuple(losses),
        "dict": dict(zip("abc", losses, strict=True)),
        "stack": vector,
        "cat": torch.cat([loss.reshape(1) for loss in losses]),
        "scaled stack": (vector * factor).double() / 1.0,
        "picked": [vector[0], vector.unbind()[1], vector[-1]],
    }[form]
    surgery = fastmtl.backward(given, method=PCGRAD)
    assert_grads(want)
    assert in_conflict(surgery)
    assert surgery.names == (("a", "b", "c") if form == "dict" else ("0", "1", "2"))


@pytest.mark.parametrize("give", [lambda net: net, lambda net: net.parameters(), lambda net: [*net.parameters()] * 2])
def test_params_as_module_iterable_or_with_repeats(give):
    net, x = make()
    losses = net.losses(x)
    want = expected(losses, [*net.trunk.parameters()], [*net.heads.parameters()])
    fastmtl.backward(losses, give(net), method=PCGRAD)
    assert_grads(want)


def test_params_limit_what_is_written():
    net, x = make()
    losses = net.losses(x)
    want = expected(losses, [net.trunk[0].weight], [net.heads[0].bias])
    fastmtl.backward(losses, [net.trunk[0].weight, net.heads[0].bias], method=PCGRAD)
    assert_grads(want)
    assert net.trunk[0].bias.grad is None and net.heads[1].weight.grad is None


def test_gram_and_weights_are_those_of_the_shared_gradients():
    net, x = make()
    losses = net.losses(x)
    bank = torch.stack([torch.cat([g.flatten() for g in grad64(loss, [*net.trunk.parameters()])]) for loss in losses])
    surgery = fastmtl.backward(losses, method=lambda gram: torch.tensor([0.5, 2.0, -1.0]))
    torch.testing.assert_close(surgery.gram.double(), bank @ bank.mT, rtol=1e-5, atol=1e-7)
    assert surgery.gram.dtype == torch.float32
    assert surgery.weights.tolist() == [0.5, 2.0, -1.0] and surgery.weights.dtype == torch.float64
    update = torch.cat([p.grad.flatten() for p in net.trunk.parameters()]).double()
    torch.testing.assert_close(surgery.grad_norm(), update.norm(), rtol=1e-5, atol=0)
    cosines = bank @ bank.mT / bank.norm(dim=1) / bank.norm(dim=1)[:, None]
    torch.testing.assert_close(surgery.cosines(), cosines, rtol=1e-5, atol=1e-6)
    assert torch.equal(surgery.conflicts(), (bank @ bank.mT) < 0)
    assert repr(surgery).startswith("Surgery(0, 1, 2; cosines [[1.0, ")
    surgery.gram = surgery.gram.to("meta")  # as on a GPU: no value is read
    assert repr(surgery) == "Surgery(0, 1, 2)"


def test_log_dict():
    net, x = make()
    a, _, c = net.losses(x)
    surgery = fastmtl.backward({"a": a, "b": None, "c": -a + 0 * c}, method="sum")
    log = surgery.log_dict("train/")
    assert {k.removeprefix("train/") for k in log} == {
        "grad_norm", "conflicts", "weight/a", "norm/a", "conflicts/a", "weight/c", "norm/c", "conflicts/c",
    }  # fmt: skip
    assert all(v.dim() == 0 for v in log.values())
    assert log["train/conflicts"] == 1 and log["train/conflicts/a"] == 1
    torch.testing.assert_close(log["train/norm/a"], surgery.gram[0, 0].sqrt())
    assert log["train/weight/c"] == 1 and surgery.weights[1] == 0
    assert repr(surgery).startswith("Surgery(a, b (absent), c; cosines [[1.0, 0.0, ")


def test_a_parameter_that_some_losses_reach_counts_as_zero_for_the_others():
    torch.manual_seed(0)
    trunk, pair, heads = nn.Linear(4, 5), nn.Linear(5, 5), nn.ModuleList(nn.Linear(5, 1) for _ in range(3))
    h = trunk(torch.randn(6, 4)).tanh()
    p = pair(h)
    losses = [heads[0](p).mean(), -heads[1](p).square().mean(), -heads[2](h).mean()]
    want = expected(losses, [*trunk.parameters(), *pair.parameters()], [*heads.parameters()])
    fastmtl.backward(losses, method=PCGRAD)
    assert_grads(want)


def test_shared_overrides_reach():
    net, x = make()
    losses = net.losses(x)
    first, last = [*net.trunk[0].parameters()], [*net.trunk[2].parameters(), *net.heads.parameters()]
    want = expected(losses, first, last)
    fastmtl.backward(losses, shared=net.trunk[0], method=PCGRAD)
    assert_grads(want)


def test_marked_parameters_get_the_plain_sum():
    net, x = make()
    assert fastmtl.mark_per_task(net.trunk[2]) is net.trunk[2]
    losses = net.losses(x)
    want = expected(losses, [*net.trunk[0].parameters()], [*net.trunk[2].parameters(), *net.heads.parameters()])
    fastmtl.backward(losses, shared=net.trunk, method=PCGRAD)
    assert_grads(want)


def test_absent_tasks(backend):
    net, x = make(4)
    losses = net.losses(x)
    losses[1] = None
    order = torch.tensor([[2, 3, 0], [1, 1, 1], [3, 0, 2], [0, 2, 3]])
    own = [p for t in (0, 2, 3) for p in net.heads[t].parameters()]
    want = expected(losses, [*net.trunk.parameters()], own, order)
    surgery = fastmtl.backward(losses, net, method=methods.PCGrad(order=order))
    assert_grads(want)
    assert net.heads[1].weight.grad is None
    assert surgery.weights[1] == 0 and surgery.gram[1].abs().sum() == 0
    assert surgery.present == (True, False, True, True)


def test_absent_tasks_and_a_callable():
    net, x = make()
    losses = net.losses(x)
    fastmtl.backward([losses[0], None, losses[2]], net, method=lambda gram: torch.tensor([1.0, 2.0]))
    first, _, last = [grad64(loss, [*net.trunk.parameters()]) for loss in net.losses(x)]
    assert_grads({p: a + 2 * c for p, a, c in zip(net.trunk.parameters(), first, last, strict=True)})


@pytest.mark.parametrize("seen", [None, "trunk"])
def test_a_single_loss_gives_its_gradient(seen):
    net, x = make()
    _, loss, _ = net.losses(x)
    own = [*net.heads[1].parameters(), *net.trunk.parameters()]
    want = dict(zip(own, grad64(loss, own), strict=True))
    surgery = fastmtl.backward([None, loss, None], net, shared=seen and net.trunk)
    assert_grads(want)
    assert surgery.weights.tolist() == [0, 1, 0]
    norm = torch.cat([g.flatten() for g in grad64(net.losses(x)[1], [*net.trunk.parameters()])]).norm()
    torch.testing.assert_close(surgery.grad_norm(), norm if seen else torch.zeros_like(norm), rtol=1e-5, atol=0)


def test_separate_networks_share_nothing():
    torch.manual_seed(0)
    nets = nn.ModuleList(nn.Linear(3, 1) for _ in range(3))
    losses = [net(torch.randn(4, 3)).square().mean() for net in nets]
    want = dict(
        zip(nets.parameters(), [g for i in range(3) for g in grad64(losses[i], [*nets[i].parameters()])], strict=True)
    )
    surgery = fastmtl.backward(losses, method=lambda gram: pytest.fail("nothing to weigh"))
    assert_grads(want)
    assert surgery.gram.tolist() == torch.zeros(3, 3).tolist() and surgery.weights.tolist() == [1, 1, 1]
    assert surgery.cosines().abs().sum() == 0 and surgery.grad_norm() == 0


def test_a_loss_may_be_a_parameter():
    p = nn.Parameter(torch.tensor(2.0))
    surgery = fastmtl.backward([p, p * 3], method="sum")
    assert p.grad == 4 and surgery.gram.tolist() == [[1, 3], [3, 9]]


def test_a_vector_of_losses_may_be_a_parameter():
    p = nn.Parameter(torch.tensor([2.0, 3.0]))
    fastmtl.backward(p, method="sum")
    assert p.grad.tolist() == [1, 1]


def test_one_loss_built_on_another():
    net, x = make(2)
    a, b = net.losses(x)
    both = a + b
    order = torch.tensor([[1], [0]])
    shared = [*net.trunk.parameters(), *net.heads[0].parameters()]
    want = expected([a, both], shared, [*net.heads[1].parameters()], order)
    fastmtl.backward([a, both], method=methods.PCGrad(order=order))
    assert_grads(want)


def test_accumulates_as_backward_does():
    net, x = make()
    losses = net.losses(x)
    want = expected(losses, [*net.trunk.parameters()], [*net.heads.parameters()])
    held = {}
    for p in net.parameters():
        p.grad = torch.full_like(p, 2.0)
        held[p] = p.grad
    fastmtl.backward(losses, method=PCGRAD)
    assert_grads({p: g + 2 for p, g in want.items()})
    assert all(p.grad is g for p, g in held.items())


def test_one_call_for_each_micro_batch():
    net, x = make()
    total: dict[Tensor, Tensor] = {}
    for part in (x[:2], x[2:]):
        losses = net.losses(part)
        for p, g in expected(losses, [*net.trunk.parameters()], [*net.heads.parameters()]).items():
            total[p] = total.get(p, 0) + g
        fastmtl.backward(losses, method=PCGRAD)
    assert_grads(total)


def test_retain_graph():
    net, x = make()
    losses = net.losses(x)
    want = expected(losses, [*net.trunk.parameters()], [*net.heads.parameters()])
    fresh = net.losses(x)
    fastmtl.backward(fresh, method=PCGRAD, retain_graph=True)
    fastmtl.backward(fresh, method=PCGRAD)
    assert_grads({p: 2 * g for p, g in want.items()})
    with pytest.raises(RuntimeError, match="second time"):
        fastmtl.backward(fresh, method=PCGRAD)


def test_separate_graphs_are_freed_one_by_one():
    class Freed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sum()

        @staticmethod
        def backward(ctx, g):
            return g * ctx.saved_tensors[0]

    w = nn.Parameter(torch.ones(3))
    losses = [Freed.apply(w), Freed.apply(w)]
    fastmtl.backward([losses[0], losses[1]], method="sum")
    for loss in losses:
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


def test_works_under_no_grad():
    net, x = make()
    losses = net.losses(x)
    want = expected(losses, [*net.trunk.parameters()], [*net.heads.parameters()])
    with torch.no_grad():
        fastmtl.backward(losses, method=PCGRAD)
    assert_grads(want)
    assert not any(p.grad.requires_grad for p in net.parameters())


def test_autocast_does_not_touch_the_gram(backend):
    rows = torch.randn(3, 500)
    table = Table(rows)
    losses = table.losses()
    with torch.autocast("cpu", torch.bfloat16):
        surgery = fastmtl.backward(losses, method=PCGRAD)
    torch.testing.assert_close(surgery.gram.double(), rows.double() @ rows.double().mT, rtol=1e-5, atol=1e-4)
    assert surgery.gram.dtype == torch.float32


def test_a_vector_of_losses_under_no_grad():
    net, x = make()
    vector = torch.stack(net.losses(x))
    want = expected(net.losses(x), [*net.trunk.parameters()], [*net.heads.parameters()])
    with torch.no_grad():
        fastmtl.backward(vector, method=PCGRAD)
    assert_grads(want)


def test_a_deep_graph_with_many_paths_is_walked_once():
    p = nn.Parameter(torch.ones(2))
    y = p * 1
    for _ in range(5000):  # a walk of every path would take 2**5000 steps
        y = y * 0.5 + y * 0.5
    fastmtl.backward([y.sum(), -y.mean()], method="mean")
    torch.testing.assert_close(p.grad, torch.full((2,), 0.25))


# --- kinds of parameters


def test_channels_last_convolutions(backend):
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(
        memory_format=torch.channels_last
    )
    heads = nn.ModuleList(nn.Conv2d(4, 1, 1) for _ in range(3))
    h = trunk(torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last))
    losses = [head(h).mul((-1.0) ** t).exp().mean() for t, head in enumerate(heads)]
    want = expected(losses, [*trunk.parameters()], [*heads.parameters()])
    fastmtl.backward(losses, method=PCGRAD)
    assert_grads(want)
    for p in trunk.parameters():
        assert p.grad.stride() == p.stride()


def test_tied_parameters_count_once():
    torch.manual_seed(0)
    embed, out = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
    out.weight = embed.weight
    model = nn.ModuleDict({"embed": embed, "out": out, "head": nn.Linear(4, 1)})
    h = embed(torch.tensor([0, 3, 3, 6])).tanh()
    losses = [F.cross_entropy(out(h), torch.tensor([1, 2, 3, 4])), model["head"](h).square().mean(), -h.mean()]
    want = expected(losses, [embed.weight], [*model["head"].parameters()])
    fastmtl.backward(losses, model, method=PCGRAD)
    assert_grads(want)


def test_frozen_parameters_are_left_alone():
    net, x = make()
    net.trunk[0].requires_grad_(False)
    losses = net.losses(x)
    want = expected(losses, [*net.trunk[2].parameters()], [*net.heads.parameters()])
    fastmtl.backward(losses, net, shared=net.trunk, method=PCGRAD)
    assert_grads(want)
    assert net.trunk[0].weight.grad is None
    net.trunk.requires_grad_(False)
    surgery = fastmtl.backward(net.losses(x), net, shared=net.trunk)
    assert surgery.grad_norm() == 0


@pytest.mark.parametrize("before", [None, "dense", "sparse"])
def test_sparse_gradients_outside_the_shared_set(before):
    torch.manual_seed(0)
    embed, trunk = nn.Embedding(9, 4, sparse=True), nn.Linear(4, 4)
    heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(3))
    h = trunk(embed(torch.tensor([1, 1, 5]))).tanh()
    losses = [head(h).mean() * (-1.0) ** t for t, head in enumerate(heads)]
    want = expected(losses, [*trunk.parameters()], [embed.weight, *heads.parameters()])
    if before:
        embed.weight.grad = torch.ones(9, 4) if before == "dense" else torch.ones(9, 4).to_sparse(1)
        want[embed.weight] = want[embed.weight] + 1
    fastmtl.backward(losses, shared=trunk, method=PCGRAD)
    assert_grads(want)
    assert embed.weight.grad.is_sparse == (before != "dense")


def test_sparse_and_dense_gradients_of_one_parameter():
    weight = nn.Parameter(torch.randn(5, 2))
    p = nn.Parameter(torch.ones(()))
    index = torch.tensor([1, 3])
    losses = [F.embedding(index, weight, sparse=True).sum() * p, weight.square().sum() * p]
    want = expected(losses, [p], [weight], torch.tensor([[1], [0]]))
    fastmtl.backward(losses, shared=[p], method="sum")
    assert_grads({weight: want[weight]})
    weight.grad = torch.ones(5, 2).to_sparse(1)  # and a dense gradient onto a sparse one
    fastmtl.backward([weight.sum() * p, p * 2], method="sum")
    assert weight.grad.to_dense().tolist() == [[2.0, 2.0]] * 5


def test_several_dtypes_in_one_call(backend):
    torch.manual_seed(0)
    a, b = nn.Linear(4, 8), nn.Linear(8, 4, bias=False, dtype=torch.bfloat16)
    c = nn.Linear(4, 4, dtype=torch.float64)
    heads = nn.ModuleList(nn.Linear(4, 1, dtype=torch.float64) for _ in range(3))
    h = c(b(a(torch.randn(16, 4)).tanh().bfloat16()).double()).tanh()
    losses = [(head(h) - (-1.0) ** t).square().mean() for t, head in enumerate(heads)]
    shared = [*a.parameters(), *b.parameters(), *c.parameters()]
    want = expected(losses, shared, [*heads.parameters()])
    surgery = fastmtl.backward(losses, method=PCGRAD)
    assert_grads({p: g for p, g in want.items() if p is not b.weight})
    assert_grads({b.weight: want[b.weight]}, rtol=1e-2, atol=1e-4)
    assert b.weight.grad.dtype == torch.bfloat16 and surgery.gram.dtype == torch.float64


def test_written_gradients_share_no_memory():
    p, q, r = (nn.Parameter(torch.randn(3)) for _ in range(3))
    kept = []
    r.register_hook(kept.append)
    fastmtl.backward([(p + q).sum(), (r * r).sum()])
    p.grad.add_(1)
    r.grad.add_(1)
    assert p.grad.tolist() == [2, 2, 2] and q.grad.tolist() == [1, 1, 1]
    torch.testing.assert_close(kept[0], 2 * r.detach())
    assert all(g.stride() == (1,) for g in (p.grad, q.grad))


def test_a_gradient_that_the_graph_still_holds_is_copied():
    class Saved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(torch.ones_like(x))
            return x.sum()

        @staticmethod
        def backward(ctx, g):
            return ctx.saved_tensors[0]

    p = nn.Parameter(torch.zeros(3))
    loss = Saved.apply(p)
    for _ in range(3):
        fastmtl.backward([loss], retain_graph=True)
    assert p.grad.tolist() == [3, 3, 3]


def test_a_transposed_parameter_keeps_its_layout():
    p = nn.Parameter(torch.randn(4, 3).t())
    x = torch.randn(3, 4)
    fastmtl.backward([(p * x).sum(), -(p * x).square().sum()], method="sum")
    assert p.grad.stride() == p.stride()
    q = nn.Parameter(torch.randn(4, 3).t())
    fastmtl.backward([q.reshape(-1).exp().sum()])
    assert q.grad.stride() == q.stride()


# --- compiled models


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x).tanh()
        return self.a(h).square().mean(), -self.b(h).square().mean()


def test_a_compiled_model_needs_shared():
    torch.manual_seed(0)
    model, x = Pair(), torch.randn(5, 4)
    want = expected(
        model(x), [*model.trunk.parameters()], [*model.a.parameters(), *model.b.parameters()], torch.tensor([[1], [0]])
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(model, backend="aot_eager")
        losses = compiled(x)
    refuses(
        lambda: fastmtl.backward(dict(zip("ab", losses, strict=True)), model),
        ValueError,
        r"'a', 'b' .*torch.compile.*shared=",
        model,
    )
    fastmtl.backward(losses, shared=model.trunk, method=methods.PCGrad(order=torch.tensor([[1], [0]])))
    assert_grads(want)


def test_compiled_heads_on_an_eager_trunk_need_nothing():
    torch.manual_seed(0)
    net, x = make(2)
    heads = [torch.compile(head, backend="aot_eager") for head in net.heads]
    order = torch.tensor([[1], [0]])
    h = net.trunk(x)
    losses = [heads[0](h).mean(), -heads[1](h).square().mean()]
    want = expected(losses, [*net.trunk.parameters()], [*net.heads.parameters()], order)
    fastmtl.backward(losses, method=methods.PCGrad(order=order))
    assert_grads(want)
