"""`fastmtl.backward(groups=)`: each group of shared parameters as if it were all there is."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from cases_backward import ORDER, PCGRAD, Net, assert_grads, expected, make, refuses
from torch import Tensor, nn

import fastmtl
from fastmtl import methods, ops
from fastmtl.surgery.task_gradients import TaskGradients


def trunk_names(net: Net) -> list[str]:
    return [f"trunk.{name}" for name, _ in net.trunk.named_parameters()]


def by(net: Net, kind: str) -> tuple[Any, dict[str, list[Tensor]]]:
    """The argument, and what it stands for."""
    named = {f"trunk.{name}": p for name, p in net.trunk.named_parameters()}
    first, second = [*net.trunk[0].parameters()], [*net.trunk[2].parameters()]
    return {
        "tensor": ("tensor", {name: [p] for name, p in named.items()}),
        "layer": ("layer", {"trunk.0": first, "trunk.2": second}),
        "modules": ([net.trunk[2], net.trunk[0]], {"0": second, "1": first}),
        # a head is in a group, and not shared
        "lists": (
            [[net.trunk[0].weight, net.trunk[2].bias, net.heads[0].weight], [net.trunk[0].bias, net.trunk[2].weight]],
            {"0": [net.trunk[0].weight, net.trunk[2].bias], "1": [net.trunk[0].bias, net.trunk[2].weight]},
        ),
        "names": ({"early": net.trunk[0], "late": net.trunk[2]}, {"early": first, "late": second}),
        "one": ([net.trunk], {"0": [*first, *second]}),
        "with an empty one": ([net.trunk, net.heads[1]], {"0": [*first, *second], "1": []}),
    }[kind]


KINDS = ["tensor", "layer", "modules", "lists", "names", "one", "with an empty one"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_group_has_pcgrad_of_its_own(kind):
    net, x = make()
    losses = net.losses(x)
    groups, want = by(net, kind)
    grads: dict[Tensor, Tensor] = {}
    for params in want.values():
        if params:
            grads |= expected(losses, params, [*net.heads.parameters()])
    surgery = fastmtl.backward(losses, net, method=PCGRAD, groups=groups)
    assert_grads(grads)
    assert surgery.groups == tuple(want)
    assert surgery.gram.shape == (len(want), 3, 3) and surgery.weights.shape == (len(want), 3)


def test_groups_are_no_whole():
    # else the test above would see nothing
    net, x = make()
    found = {}
    for groups in (None, "layer", "tensor"):
        net.zero_grad()
        fastmtl.backward(net.losses(x), net, method=PCGRAD, groups=groups)
        found[groups] = torch.cat([p.grad.flatten() for p in net.trunk.parameters()])
    assert not torch.allclose(found[None], found["layer"], rtol=1e-2)
    assert not torch.allclose(found["tensor"], found["layer"], rtol=1e-2)


def test_gram_weights_and_what_is_told_of_them():
    net, x = make()
    losses = dict(zip("abc", net.losses(x), strict=True))
    rows = {
        name: torch.stack(
            [torch.autograd.grad(loss, p, retain_graph=True)[0].flatten().double() for loss in losses.values()]
        )
        for name, p in zip(trunk_names(net), net.trunk.parameters(), strict=True)
    }
    surgery = fastmtl.backward({**losses, "d": None}, net, method=lambda gram: gram.diagonal() + 1, groups="tensor")
    gram = torch.stack([g @ g.mT for g in rows.values()])
    torch.testing.assert_close(surgery.gram[:, :3, :3].double(), gram, rtol=1e-5, atol=1e-7)
    assert not bool(surgery.gram[:, 3].any()) and not bool(surgery.weights[:, 3].any())
    torch.testing.assert_close(surgery.weights[:, :3], gram.diagonal(dim1=1, dim2=2) + 1, rtol=1e-5, atol=1e-7)
    norms = torch.stack([g.norm(dim=1) for g in rows.values()])
    torch.testing.assert_close(
        surgery.cosines()[:, :3, :3], gram / norms[:, :, None] / norms[:, None], rtol=1e-4, atol=1e-5
    )
    assert torch.equal(surgery.conflicts()[:, :3, :3], gram < 0)
    update = torch.cat([p.grad.flatten() for p in net.trunk.parameters()]).double()
    torch.testing.assert_close(surgery.grad_norm(), update.norm(), rtol=1e-5, atol=0)
    log = surgery.log_dict("train/")
    assert set(log) == {"train/grad_norm", "train/conflicts"} | {
        f"train/{what}/{group}/{task}" for what in ("weight", "norm", "conflicts") for group in rows for task in "abc"
    }
    assert all(v.dim() == 0 for v in log.values())
    assert log["train/conflicts"] == int((gram < 0).sum()) // 2
    assert log["train/weight/trunk.2.bias/c"] == surgery.weights[3, 2]
    torch.testing.assert_close(log["train/norm/trunk.0.weight/b"].double(), norms[0, 1], rtol=1e-5, atol=0)


def test_the_loss_scale_is_taken_out_of_each_group():
    net, x = make()
    want = fastmtl.backward(net.losses(x), net, method="nashmtl", groups="layer")
    grads = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    surgery = fastmtl.backward(
        [64.0 * loss for loss in net.losses(x)], net, method="nashmtl", groups="layer", loss_scale=64.0
    )
    torch.testing.assert_close(surgery.weights, want.weights, rtol=1e-4, atol=0)
    torch.testing.assert_close(surgery.grad_norm(), want.grad_norm(), rtol=1e-4, atol=0)
    for p, g in zip(net.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, 64 * g, rtol=1e-4, atol=1e-6)


def test_a_method_keeps_its_state_for_each_group():
    net, _ = make()
    together = methods.CRMOGM(methods.MGDA(), momentum=0.5)
    apart = {layer: methods.CRMOGM(methods.MGDA(), momentum=0.5) for layer in (0, 2)}
    for step in range(3):
        parts = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        net.zero_grad()
        surgery = fastmtl.backward(net.losses(parts), net, method=together, groups="layer")
        for i, (layer, method) in enumerate(apart.items()):
            alone = fastmtl.backward(net.losses(parts), net.trunk[layer], method=method)
            torch.testing.assert_close(surgery.weights[i], alone.weights, rtol=1e-5, atol=1e-7)
    state = together.state_dict()
    assert state["average"]["names"] == [f"trunk.{layer}/{t}" for layer in (0, 2) for t in range(3)]


def test_unshared_parameters_and_heads_are_left_as_they_are():
    net, x = make()
    fastmtl.mark_per_task(net.trunk[2].bias)
    losses = net.losses(x)
    want = expected(losses, [*net.trunk[0].parameters()], [net.trunk[2].bias, *net.heads.parameters()])
    want |= expected(losses, [net.trunk[2].weight], [net.trunk[2].bias])
    fastmtl.backward(losses, net, method=PCGRAD, groups="layer")
    assert_grads(want)


def test_absent_tasks_and_a_second_batch():
    net, x = make()
    moved = methods.MoDo()
    a, _, c = net.losses(x)
    second = net.losses(x + 1)
    surgery = fastmtl.backward(
        [a, None, c], net, method=moved, second_losses=[second[0], None, second[2]], shared=net.trunk, groups="layer"
    )
    assert surgery.weights.shape == (2, 3) and not bool(surgery.weights[:, 1].any())
    for i, layer in enumerate((0, 2)):
        a, _, c = net.losses(x)
        second = net.losses(x + 1)
        alone = fastmtl.backward(
            [a, None, c],
            net.trunk[layer],
            method=methods.MoDo(),
            second_losses=[second[0], None, second[2]],
            shared=net.trunk[layer],
        )
        torch.testing.assert_close(surgery.weights[i], alone.weights, rtol=1e-5, atol=1e-7)


def test_nothing_shared():
    nets = nn.ModuleList(make(1, seed)[0] for seed in range(2))
    x = torch.randn(5, 4)
    surgery = fastmtl.backward([net.losses(x)[0] for net in nets], nets, groups="layer")
    assert surgery.weights.tolist() == [1.0, 1.0]
    assert all(p.grad is not None for p in nets.parameters())


# --- all groups at once, and one after the other


class Counted(NamedTuple):
    """How often a surgery on all groups at once and one on a single group made a Gram matrix."""

    together: list[int]
    alone: list[int]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    found = Counted([], [])
    gram, gram_groups = TaskGradients.gram, TaskGradients.gram_groups

    def one(self: TaskGradients) -> Tensor:
        found.alone.append(1)
        return gram(self)

    def several(self: TaskGradients, groups: Any, count: int) -> Tensor:
        found.together.append(count)
        return gram_groups(self, groups, count)

    monkeypatch.setattr(TaskGradients, "gram", one)
    monkeypatch.setattr(TaskGradients, "gram_groups", several)
    return found


def made(name: str) -> Any:
    """A method with nothing kept yet, and random numbers that begin anew."""
    torch.manual_seed(3)
    if name == "callable":
        return lambda gram: gram.diagonal() + 1
    if name in ("pcgrad", "gradvac"):
        return methods.get(name).__class__(generator=ops.order_state(5))
    if name == "crmogm":
        return methods.CRMOGM(methods.MGDA())
    return methods.get(name)


def one_step(
    net: Net,
    x: Tensor,
    method: Any,
    at_once: bool,
    monkeypatch: pytest.MonkeyPatch,
    *,
    absent: bool = False,
    **options: Any,
) -> tuple[Any, list[Tensor]]:
    net.zero_grad()
    losses = net.losses(x)
    if absent:
        losses[1] = None
    with monkeypatch.context() as patch:
        if not at_once:
            patch.setattr(TaskGradients, "can_group", lambda *_: False)
        surgery = fastmtl.backward(losses, net, method=method, **options)
    return surgery, [p.grad.clone() for p in net.parameters() if p.grad is not None]


BY_GROUP = [*(name for name in methods.names.METHODS if methods.get(name).by_group), "crmogm", "callable"]
ALONE = {"graddrop", "trimmedmean"}  # they make the update themselves


@pytest.mark.parametrize("groups", ["layer", "tensor"])
@pytest.mark.parametrize("name", BY_GROUP)
def test_at_once_is_one_after_the_other(name, groups, counted, monkeypatch):
    """Bit for bit, state and absent tasks included; PCGrad alone sees Gram matrices that are rounded to float32."""
    net, x = make()
    needs = methods.needs_of(made(name))
    together, apart = made(name), made(name)
    for step in range(3):
        options: dict[str, Any] = {"groups": groups, "absent": step == 1, "loss_scale": 4.0 if step == 2 else None}
        found = []
        for method, at_once in ((together, True), (apart, False)):
            if "second_batch" in needs:
                second = net.losses(x + step + 1)
                options["second_losses"] = [None if options["absent"] and t == 1 else s for t, s in enumerate(second)]
                options["shared"] = net.trunk
            torch.manual_seed(step)
            found.append(one_step(net, x + step, method, at_once, monkeypatch, **options))
        (a, grads), (b, wanted) = found
        assert a.groups == b.groups and a.present == b.present and torch.equal(a.gram, b.gram)
        if name == "pcgrad":
            torch.testing.assert_close(a.weights, b.weights, rtol=1e-5, atol=1e-6)
            for g, w in zip(grads, wanted, strict=True):
                torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)
        else:
            assert a.weights is None or torch.equal(a.weights, b.weights)
            assert all(torch.equal(g, w) for g, w in zip(grads, wanted, strict=True))
        torch.testing.assert_close(a.grad_norm(), b.grad_norm(), rtol=1e-6, atol=0)
    assert len(counted.together) == (0 if name in ALONE else 3)
    if isinstance(together, methods.Method):
        assert_equal(together.state_dict(), apart.state_dict())


def assert_equal(state: Any, other: Any) -> None:
    if isinstance(other, dict):
        assert state.keys() == other.keys()
        for key in other:
            assert_equal(state[key], other[key])
    else:
        assert torch.equal(state, other) if isinstance(other, Tensor) else state == other


def test_dtypes_and_groups_that_are_solved_one_after_the_other(counted):
    """A group whose Gram matrix has another dtype than the rest, and one without a gradient."""
    net, x = make()
    net.trunk[2].double()
    net.heads.double()

    def losses() -> list[Tensor]:
        h = torch.tanh(net.trunk[2](torch.tanh(net.trunk[0](x)).double()))
        return [head(h).square().mean() for head in net.heads]

    by_layer = fastmtl.backward(losses(), net, method="mgda", groups="layer")
    assert not counted.together and by_layer.gram.dtype == torch.float64
    fastmtl.backward(losses(), net, method="mgda", groups=[net.trunk])
    assert counted.together == [1]
    net, x = make()
    fastmtl.backward(net.losses(x), net, method="mgda", groups=[net.trunk, net.heads[1]])
    assert counted.together == [1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_several_dtypes_at_once(dtype, counted):
    net, x = make()
    net.trunk[2].to(dtype)
    net.heads.to(dtype)

    def losses() -> list[Tensor]:
        h = torch.tanh(net.trunk[2](torch.tanh(net.trunk[0](x)).to(dtype)))
        return [head(h).float().square().mean() for head in net.heads]

    rows = [torch.autograd.grad(loss, [*net.trunk.parameters()], retain_graph=True) for loss in losses()]
    surgery = fastmtl.backward(losses(), net, method=lambda gram: gram.diagonal() + 1, groups="tensor")
    assert counted.together == [4] and surgery.gram.dtype == torch.float32
    for i, p in enumerate(net.trunk.parameters()):
        g = torch.stack([row[i].flatten().double() for row in rows])
        torch.testing.assert_close(surgery.gram[i].double(), g @ g.mT, rtol=1e-5, atol=1e-7)
        unit = torch.finfo(dtype).eps if p.dtype == dtype else 1e-6
        want = ((g @ g.mT).diagonal() + 1) @ g
        torch.testing.assert_close(
            p.grad.flatten().double(), want, rtol=2 * unit, atol=2 * unit * float(want.abs().max())
        )


def test_what_is_not_finite_stays_in_its_group():
    net, x = make()
    net.trunk[2].bias.register_hook(lambda g: g * torch.nan)
    surgery = fastmtl.backward(net.losses(x), net, method="mgda", groups="tensor")
    finite = [bool(w.isfinite().all()) for w in surgery.weights]
    assert finite == [True, True, True, False]


def test_layers_without_parameters_are_no_groups():
    """`list(model.trunk)` has activations too."""
    net, x = make()
    surgery = fastmtl.backward(net.losses(x), net, method=PCGRAD, groups=list(net.trunk))
    found = [p.grad for p in net.parameters()]
    net.zero_grad()
    assert surgery.groups == tuple(str(i) for i, layer in enumerate(net.trunk) if any(True for _ in layer.parameters()))
    assert len(surgery.groups) < len(net.trunk)
    fastmtl.backward(net.losses(x), net, method=PCGRAD, groups="layer")
    assert all(torch.equal(g, p.grad) for g, p in zip(found, net.parameters(), strict=True))


def test_bad_groups():
    net, x = make()
    h = net.trunk(x)
    heads = [head(h).square().mean() for head in net.heads]
    w = net.trunk[0].weight

    def call(groups: Any, params: Any = net, losses: Any = None, **options: Any) -> Any:
        return lambda: fastmtl.backward(losses or net.losses(x), params, groups=groups, **options)

    for groups, error, match in (
        ("layers", ValueError, "expected 'layer', 'tensor' or groups of parameters, got 'layers'"),
        (3, TypeError, "expected 'layer', 'tensor' or groups of parameters .*, got int"),
        ([], ValueError, "at least one group, got none"),
        (
            [net.trunk[0]],
            ValueError,
            r"parameter 'trunk.2.weight' of shape \[6, 6\] is shared, and in none of the groups",
        ),
        (
            [net.trunk, [w]],
            ValueError,
            r"groups: parameter 'trunk.0.weight' .* in groups\[0\] and in groups\[1\]",
        ),
        ({"a": net.trunk, "b": [w]}, ValueError, r"'trunk.0.weight' .* is in groups\['a'\] and in groups\['b'\]"),
        ([net.trunk, []], ValueError, r"groups\[1\]: expected at least one parameter"),
        ([net.trunk, [torch.ones(3)]], ValueError, r"groups\[1\]\[0\]: expected a parameter, got another tensor"),
        ([net.trunk, [x.requires_grad_()]], ValueError, r"groups\[1\]\[0\]: expected a parameter, got another tensor"),
        ({1: net.trunk, "1": net.heads}, ValueError, r"groups: expected different names, got \[1, '1'\]"),
        ([nn.Tanh(), nn.ReLU()], ValueError, "groups: expected groups of parameters, got modules without any"),
        (net.trunk.children(), TypeError, r"a list of modules or of lists, or a dict of them.*, got generator"),
        ([net.trunk, 3], TypeError, r"groups\[1\]: expected a module or an iterable of parameters, got int"),
    ):
        refuses(call(groups), error, match, net)
    refuses(call("layer", list(net.parameters())), ValueError, "expected a module as params, whose names", net)
    refuses(call("layer", losses=heads, features=h), ValueError, "expected None beside features=", net)
    refuses(call("layer", method=methods.Every(PCGRAD, 2)), ValueError, "expected None beside methods.Every", net)


def test_names_of_groups_without_a_module():
    net, x = make()
    surgery = fastmtl.backward(net.losses(x), [*net.parameters()], groups="tensor", method=methods.PCGrad(order=ORDER))
    assert surgery.groups == tuple(f"params[{i}]" for i in range(4))
