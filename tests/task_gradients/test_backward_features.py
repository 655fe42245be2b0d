"""`fastmtl.backward(features=)` against gradients of features and parameters computed apart in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from cases_backward import ORDER, PCGRAD, assert_grads, expected, grad64, in_conflict, make, refuses
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastmtl
from fastmtl.ops.gradients.reference import pcgrad_coefficients


def losses_of(net: nn.Module, h: Tensor) -> list[Tensor]:
    return [F.mse_loss(head(h), torch.full((len(h), 2), 3.0 * (-1) ** t)) for t, head in enumerate(net.heads)]


def apart(
    losses: Sequence[Tensor], partial: Tensor, shared: Sequence[Tensor], own: Sequence[Tensor]
) -> tuple[dict[Tensor, Tensor], Tensor]:
    """Weights by the paper's loop from `[T, F]` gradients of the features; T whole backward passes in float64."""
    gram = partial @ partial.mT
    weights = pcgrad_coefficients(gram, ORDER).sum(0)
    rows = [grad64(loss, shared) for loss in losses]
    want = {p: sum(w * row[i] for w, row in zip(weights, rows, strict=True)) for i, p in enumerate(shared)}
    plain = [grad64(loss, own) if own else [] for loss in losses]
    want |= {p: sum(row[i] for row in plain) for i, p in enumerate(own)}
    return want, gram


def flat(losses: Sequence[Tensor], features: Sequence[Tensor]) -> Tensor:
    return torch.stack([torch.cat([g.flatten() for g in grad64(loss, features)]) for loss in losses])


@pytest.mark.parametrize("form", ["tensor", "list", "repeated"])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_weights_come_from_the_features_and_gradients_from_one_pass(backend, form, chunk_size):
    net, x = make()
    h = net.trunk(x)
    losses = losses_of(net, h)
    want, gram = apart(losses, flat(losses, [h]), [*net.trunk.parameters()], [*net.heads.parameters()])
    passes = []
    net.trunk[0].weight.register_hook(lambda g: passes.append(1))
    given = {"tensor": h, "list": [h], "repeated": (h, h)}[form]
    surgery = fastmtl.backward(losses, features=given, method=PCGRAD, chunk_size=chunk_size)
    assert_grads(want)
    torch.testing.assert_close(surgery.gram.double(), gram, rtol=1e-5, atol=1e-7)
    assert in_conflict(surgery) and len(passes) == 1
    # the parameters' own Gram matrix gives other weights here: the two roads are told apart
    by_parameters = expected(losses_of(net, net.trunk(x)), [*net.trunk.parameters()], [*net.heads.parameters()])
    assert not torch.allclose(by_parameters[net.trunk[0].weight], want[net.trunk[0].weight], rtol=1e-2)


def test_fixed_weights_give_exactly_what_passes_to_the_parameters_give():
    net, x = make()
    for method in ("sum", lambda gram: torch.tensor([0.5, 2.0, -1.0])):
        net.zero_grad()
        fastmtl.backward(net.losses(x), method=method)
        want = {p: p.grad.double() for p in net.parameters()}
        net.zero_grad()
        h = net.trunk(x)
        fastmtl.backward(losses_of(net, h), features=h, method=method)
        assert_grads(want)


class Doubled(torch.autograd.Function):
    """Gets zeros where autograd has nothing to hand on."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        assert g is not None
        return 2 * g


class Custom(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return Doubled.apply(super().forward(x))


class Recomputed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


class Recurrent(nn.GRU):
    def __init__(self, width: int, _: int) -> None:
        super().__init__(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class Normed(nn.Linear):
    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


def compiled_linear(*args: int) -> nn.Module:
    layer = nn.Linear(*args)
    layer.compile(backend="aot_eager")
    return layer


STAGES: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": nn.Linear,
    "custom": Custom,
    "recomputed": Recomputed,
    "recurrent": Recurrent,
    "batch norm": Normed,
    "compiled": compiled_linear,
}


class Stages(nn.Module):
    """Each stage's output is a feature, and the next stage's input."""

    def __init__(self, stage: Callable[[int, int], nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stage(4, 4) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(12, 1) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        features = []
        for stage in self.stages:
            x = stage(x).tanh()
            features.append(x)
        return features, self.losses(features)

    def losses(self, features: Sequence[Tensor]) -> list[Tensor]:
        joined = torch.cat([*features], 1)
        return [(head(joined) - 3.0 * (-1) ** t).square().mean() for t, head in enumerate(self.heads)]


@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_features_that_depend_on_each_other(kind, chunk_size):
    torch.manual_seed(0)
    net, x = Stages(STAGES[kind]), torch.randn(5, 4)
    features, losses = net(x)
    # what each stage's output gets from the heads alone, computed with the stages cut apart
    detached = [f.detach().requires_grad_() for f in features]
    partial = flat(net.losses(detached), detached)
    want, gram = apart(losses, partial, [*net.stages.parameters()], [*net.heads.parameters()])
    surgery = fastmtl.backward(losses, features=features, method=PCGRAD, chunk_size=chunk_size)
    assert_grads(want)
    torch.testing.assert_close(surgery.gram.double(), gram, rtol=1e-5, atol=1e-7)


def test_both_outputs_of_a_recurrent_network():
    # two outputs of one node of the graph: one is a feature of all, the other is not
    torch.manual_seed(0)
    trunk, heads = nn.LSTM(4, 6), nn.ModuleList(nn.Linear(6, 1) for _ in range(3))
    y, (_, cell) = trunk(torch.randn(7, 4))
    y, cell = y[-1], cell[0]
    losses = [(head(y) - 3.0 * (-1) ** t).square().mean() for t, head in enumerate(heads)]
    losses[2] = losses[2] + heads[2](cell).mean()
    want, gram = apart(losses, flat(losses, [y, cell]), [*trunk.parameters()], [*heads.parameters()])
    surgery = fastmtl.backward(losses, features=[y, cell], method=PCGRAD, retain_graph=True)
    assert_grads(want)
    torch.testing.assert_close(surgery.gram.double(), gram, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="is shared, but losses '2' reach it past the features, as well"):
        fastmtl.backward(losses, features=y)


def test_nothing_is_left_on_the_graph_of_nested_features():
    net, x = Stages(), torch.randn(5, 4)
    features, losses = net(x)
    (before,) = torch.autograd.grad(features[2].sum(), net.stages[0].weight, retain_graph=True)
    fastmtl.backward(losses, features=features, retain_graph=True)
    (after,) = torch.autograd.grad(features[2].sum(), net.stages[0].weight)
    assert torch.equal(before, after)


def test_losses_that_use_different_features():
    torch.manual_seed(0)
    a, b, c = (nn.Linear(4, 4) for _ in range(3))
    x = torch.randn(5, 4)
    base = a(x).tanh()
    f, g = b(base).tanh(), c(base).tanh()
    losses = [(f - 3).square().mean() + g.mean(), (f + 3).square().mean(), -f.exp().mean()]
    # only the first loss goes through c, so its gradient is taken as it is
    want, gram = apart(losses, flat(losses, [f, g]), [*a.parameters(), *b.parameters()], [*c.parameters()])
    surgery = fastmtl.backward(losses, features=[f, g], method=PCGRAD)
    assert_grads(want)
    torch.testing.assert_close(surgery.gram.double(), gram, rtol=1e-5, atol=1e-7)


def test_outside_shared_and_marked_parameters_behind_the_features_get_the_plain_sum():
    net, x = make()
    x.requires_grad_()
    fastmtl.mark_per_task(net.trunk[0].bias)
    h = net.trunk(x)
    losses = losses_of(net, h)
    trunk = [net.trunk[0].weight, *net.trunk[2].parameters()]
    want, _ = apart(losses, flat(losses, [h]), trunk, [net.trunk[0].bias, x, *net.heads.parameters()])
    fastmtl.backward(losses, features=h, method=PCGRAD)
    assert_grads(want)
    net.zero_grad()
    x.grad = None
    h = net.trunk(x)
    losses = losses_of(net, h)
    want, _ = apart(losses, flat(losses, [h]), trunk[1:], [trunk[0], *net.heads.parameters()])
    fastmtl.backward(losses, net, features=h, shared=net.trunk[2], method=PCGRAD)
    assert_grads(want)
    assert x.grad is None


def tied() -> tuple[nn.ModuleDict, Tensor, list[Tensor]]:
    torch.manual_seed(0)
    net = nn.ModuleDict({"table": nn.Embedding(6, 4), "mix": nn.Linear(4, 4), "head": nn.Linear(4, 1)})
    h = net["mix"](net["table"](torch.tensor([0, 3, 3, 5]))).tanh()
    words = F.cross_entropy(h @ net["table"].weight.mT, torch.tensor([1, 2, 3, 4]))
    return net, h, [words, net["head"](h).square().mean(), -h.mean()]


def test_a_tied_parameter_past_the_features_is_refused_or_summed():
    net, h, losses = tied()
    match = r"'table.weight' of shape \[6, 4\] is shared, but losses 'words' reach it past the features, as well"
    named = dict(zip(["words", "b", "c"], losses, strict=True))
    refuses(lambda: fastmtl.backward(named, net, features=h), ValueError, match, net)
    want, _ = apart(losses, flat(losses, [h]), [*net["mix"].parameters()], [net["table"].weight])
    fastmtl.backward(losses, net, features=h, shared=net["mix"], method=PCGRAD)
    assert_grads(want)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_a_neck_past_the_features_is_refused_or_summed(chunk_size):
    net, x = make()
    neck = nn.Linear(6, 6)
    model = nn.ModuleList([net, neck])
    h = net.trunk(x)
    losses = losses_of(net, neck(h).tanh())
    match = r"'1.weight' of shape \[6, 6\] is shared, but losses '0', '1', '2' reach it past.*not through.*pass shared="
    refuses(lambda: fastmtl.backward(losses, model, features=h), ValueError, match, model)
    refuses(lambda: fastmtl.backward(losses, model, features=h, shared=model), ValueError, "leave it out of", model)
    own = [*neck.parameters(), *net.heads.parameters()]
    want, _ = apart(losses, flat(losses, [h]), [*net.trunk.parameters()], own)
    fastmtl.backward(losses, model, features=h, shared=net.trunk, method=PCGRAD, chunk_size=chunk_size)
    assert_grads(want)


def test_absent_tasks_loss_scale_and_accumulation():
    net, x = make()
    h = net.trunk(x)
    losses = losses_of(net, h)
    order = torch.tensor([[2, 2, 2], [1, 1, 1], [0, 0, 0]])
    z = flat(losses, [h])[[0, 2]]
    weights = pcgrad_coefficients(z @ z.mT, torch.tensor([[1, 1], [0, 0]])).sum(0)
    rows = [grad64(losses[t], [*net.trunk.parameters()]) for t in (0, 2)]
    want = {
        p: 64 * (weights[0] * a + weights[1] * b) + 2 for p, a, b in zip(net.trunk.parameters(), *rows, strict=True)
    }
    for p in net.parameters():
        p.grad = torch.full_like(p, 2.0)
    scaled = [losses[0] * 64.0, None, losses[2] * 64.0]
    method = fastmtl.methods.PCGrad(order=order)
    surgery = fastmtl.backward(scaled, features=h, method=method, loss_scale=64.0)
    assert_grads(want)
    assert surgery.weights[1] == 0 and surgery.present == (True, False, True)
    torch.testing.assert_close(surgery.gram[::2, ::2].double(), z @ z.mT, rtol=1e-5, atol=1e-7)
    assert net.heads[1].weight.grad.eq(2).all()


def test_frozen_parts():
    net, x = make()
    net.trunk[0].requires_grad_(False)
    net.heads[1].requires_grad_(False)
    h = net.trunk(x)
    losses = losses_of(net, h)
    own = [*net.heads[0].parameters(), *net.heads[2].parameters()]
    want, _ = apart(losses, flat(losses, [h]), [*net.trunk[2].parameters()], own)
    fastmtl.backward(losses, net, features=h, method=PCGRAD)
    assert_grads(want)
    assert net.trunk[0].weight.grad is None and net.heads[1].weight.grad is None
    net.trunk.requires_grad_(False)
    net.heads.requires_grad_(True)
    h = net.trunk(x)
    refuses(lambda: fastmtl.backward(losses_of(net, h), net, features=h), ValueError, "features: needs no grad", net)


def test_retain_graph_and_its_absence():
    net, x = make()
    h = net.trunk(x)
    losses = losses_of(net, h)
    fastmtl.backward(losses, features=h, method=PCGRAD, retain_graph=True)
    want = {p: 2 * p.grad.double() for p in net.parameters()}
    fastmtl.backward(losses, features=h, method=PCGRAD)
    assert_grads(want)
    with pytest.raises(RuntimeError, match="second time"):
        losses[0].backward()
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(h.sum(), net.trunk[0].weight)


def test_a_hook_on_the_features_is_applied_once_to_each_task():
    net, x = make()
    h = net.trunk(x)
    h.register_hook(lambda g: g * 0.25)
    losses = losses_of(net, h)
    want, gram = apart(losses, flat(losses, [h]), [*net.trunk.parameters()], [*net.heads.parameters()])
    surgery = fastmtl.backward(losses, features=h, method=PCGRAD)
    assert_grads(want)
    torch.testing.assert_close(surgery.gram.double(), gram, rtol=1e-5, atol=1e-7)
    assert len(h._backward_hooks) == 1


def test_a_compiled_trunk_and_eager_heads_need_no_shared():
    net, x = make()
    h = net.trunk(x)
    losses = losses_of(net, h)
    want, _ = apart(losses, flat(losses, [h]), [*net.trunk.parameters()], [*net.heads.parameters()])
    h = torch.compile(net.trunk, backend="aot_eager")(x)
    fastmtl.backward(losses_of(net, h), features=h, method=PCGRAD)
    assert_grads(want)


@pytest.mark.parametrize("kind", ["joined", "compiled"])
def test_features_whose_origins_cannot_be_told_apart(kind):
    torch.manual_seed(0)
    net, x = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)]), torch.randn(5, 4)

    def trunk(x: Tensor) -> tuple[Tensor, Tensor]:
        if kind == "joined":
            h = torch.cat([net[0](x), net[1](x)], 1)
            return h[:, :3], h[:, 3:]
        return net[0](x), net[1](x)

    run = torch.compile(trunk, backend="aot_eager") if kind == "compiled" else trunk
    f, g = run(x)
    # each loss takes one of them: whether its parameters are shared is not to be seen
    losses = [(f - 1).square().mean(), g.exp().mean()]
    match = "torch.compile.*shared=" if kind == "compiled" else r"torch\.cat or torch\.stack.*shared="
    refuses(lambda: fastmtl.backward(losses, net, features=[f, g]), ValueError, match, net)
    surgery = fastmtl.backward(losses, net, features=[f, g], shared=net, method=lambda gram: torch.tensor([2.0, 3.0]))
    assert surgery.gram[0, 1] == 0
    weighted = 2 * (net[0](x) - 1).square().mean() + 3 * net[1](x).exp().mean()
    want = dict(zip(net.parameters(), grad64(weighted, [*net.parameters()]), strict=True))
    assert_grads(want)
    # every loss takes both: nothing is unclear
    f, g = run(x)
    losses = [(f - 1).square().mean() + g.mean(), (g.exp() * f).mean(), -g.mean() - f.sum()]
    want, _ = apart(losses, flat(losses, [f, g]), [*net.parameters()], [])
    net.zero_grad()
    fastmtl.backward(losses, net, features=[f, g], method=PCGRAD)
    assert_grads(want)


def test_outputs_of_one_compiled_graph_are_refused():
    net, x = make()

    @torch.compile(backend="aot_eager")
    def run(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        h = net.trunk(x)
        return h, losses_of(net, h)

    h, losses = run(x)
    match = "loss '0' does not reach any.*one compiled graph"
    refuses(lambda: fastmtl.backward(losses, net, features=h, shared=net.trunk), ValueError, match, net)


@pytest.mark.parametrize("channels_last", [False, True])
def test_feature_maps_under_autocast(channels_last, backend):
    torch.manual_seed(0)
    trunk, heads = nn.Conv2d(3, 8, 3), nn.ModuleList(nn.Conv2d(8, 1, 1) for _ in range(3))
    x = torch.randn(2, 3, 6, 6)
    if channels_last:
        trunk, x = trunk.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        h = trunk(x)
        losses = [(head(h).float() - 3.0 * (-1) ** t).square().mean() for t, head in enumerate(heads)]
    assert h.dtype == torch.bfloat16
    surgery = fastmtl.backward(losses, features=h, method="sum", retain_graph=True)
    z = flat(losses, [h])
    torch.testing.assert_close(surgery.gram.double(), z @ z.mT, rtol=1e-4, atol=1e-6)
    want = dict(zip(trunk.parameters(), grad64(sum(losses), [*trunk.parameters()]), strict=True))
    assert_grads(want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("features", "error", "match"),
    [
        (lambda net, h: 3, TypeError, "features: expected a tensor or an iterable.*int"),
        (lambda net, h: {"h": h}, TypeError, "features:.*dict"),
        (lambda net, h: [h, None], TypeError, r"features\[1\]: expected a tensor, got NoneType"),
        (lambda net, h: [], ValueError, "features: expected at least one"),
        (lambda net, h: h.detach(), ValueError, "features: needs no gradient.*detached"),
        (lambda net, h: [h, h.detach().requires_grad_()], ValueError, r"features\[1\]: is a leaf.*shared="),
        (lambda net, h: net.trunk[0].weight, ValueError, "features: is a leaf"),
        (lambda net, h: h * 1, ValueError, "loss '0' does not reach any"),
        (lambda net, h: h * 1j, TypeError, "features:.*complex64"),
        (lambda net, h: [h, h.to("meta")], ValueError, r"features\[1\]: expected a tensor on cpu.*meta"),
    ],
)
def test_refuses_bad_features(features, error, match):
    net, x = make()
    h = net.trunk(x)
    losses = losses_of(net, h)
    refuses(lambda: fastmtl.backward(losses, net, features=features(net, h)), error, match, net)


def test_refuses_losses_that_do_not_go_through_the_features():
    net, x = make()
    h = net.trunk(x)
    a, b, c = losses_of(net, h)
    other = losses_of(net, net.trunk(x))[2]
    refuses(lambda: fastmtl.backward({"a": a, "c": other}, net, features=h), ValueError, "loss 'c' does not", net)
    penalty = net.trunk[0].weight.square().sum()
    match = "'trunk.0.weight'.*losses '1' reach it past the features, as well as through them"
    refuses(lambda: fastmtl.backward([a, b + penalty], net, features=h), ValueError, match, net)
    refuses(lambda: fastmtl.backward([a, c], net, features=[h, c]), ValueError, "loss '1' is one of them", net)
    match = "no shared parameter among params lies behind"
    refuses(lambda: fastmtl.backward([a, b], net.heads, features=h), ValueError, match, net)


def test_refuses_a_hook_on_a_feature_that_others_are_computed_from():
    net, x = Stages(), torch.randn(5, 4)
    features, losses = net(x)
    features[0].register_hook(lambda g: g * 2)
    match = r"features: one of shape \[5, 4\] has a hook, and others are computed from it"
    refuses(lambda: fastmtl.backward(losses, net, features=features), ValueError, match, net)


def test_an_error_in_the_pass_through_the_trunk_writes_nothing():
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise ArithmeticError("no gradient today")

    net, x = make()
    h = Fails.apply(net.trunk(x)) * 1
    h.register_hook(lambda g: g)
    losses = losses_of(net, h)
    refuses(lambda: fastmtl.backward(losses, net, features=h), ArithmeticError, "today", net)
    assert len(h._backward_hooks) == 1


def test_a_non_finite_feature_gradient_shows():
    net, x = make()
    h = net.trunk(x)
    losses = losses_of(net, h)
    losses[1] = losses[1] * torch.inf
    fastmtl.backward(losses, net, features=h)
    assert not torch.isfinite(net.trunk[0].weight.grad).all()
    assert torch.isfinite(net.heads[0].weight.grad).all()
