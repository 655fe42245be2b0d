"""`fastmtl.methods.Every`: a step that reuses weights leaves what T passes with the same weights leave."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases_backward import PCGRAD, Net, make
from torch import Tensor, nn

import fastmtl
from fastmtl import methods
from fastmtl.methods import every as every_module

WEIGHTS = torch.tensor([0.5, 2.0, -1.25, 0.75, 3.0], dtype=torch.float64)


class Fixed(methods.Method):
    """Weights that no two tasks have in common, and how often they were asked for."""

    def __init__(self) -> None:
        self.asked = 0

    def _weights(self, gram: Tensor, present: Tensor | None) -> Tensor:
        self.asked += 1
        return WEIGHTS[: len(gram)].clone()


class Double(torch.autograd.Function):
    """Two inputs and an argument that is no tensor between them."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, k: int, b: Tensor) -> Tensor:
        ctx.k = k
        return a * k + b

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, Tensor]:
        return g * ctx.k, None, g


def grads_of(params: Sequence[Tensor]) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in params]


def full_and_reused(
    params: Sequence[nn.Parameter], losses: Callable[[], tuple[Any, dict[str, Any]]], every: methods.Every | None = None
) -> tuple[list[Tensor | None], list[Tensor | None], fastmtl.Surgery]:
    """Gradients of a step with T passes, and of one that reuses its weights. `losses` may name options of backward."""
    every = every or methods.Every(Fixed(), 2)
    found = []
    for reused in (False, True):
        for p in params:
            p.grad = None
        given, options = losses()
        surgery = fastmtl.backward(given, method=every, **options)
        assert surgery.reused is reused
        found.append(grads_of(params))
    return *found, surgery


def assert_same(got: Sequence[Tensor | None], want: Sequence[Tensor | None], rtol: float = 1e-5) -> None:
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert (g is None) == (w is None), i
        if g is not None:
            assert g.dtype == w.dtype
            torch.testing.assert_close(
                g.to_dense(), w.to_dense(), rtol=rtol, atol=1e-6 * float(w.to_dense().abs().max())
            )


# --- what one pass leaves, on graphs of every kind


class Graphs:
    """Parameters, and a function from nothing to losses and options: one case each."""

    @staticmethod
    def trunk_and_heads() -> Any:
        net, x = make()
        return list(net.parameters()), lambda: (net.losses(x), {})

    @staticmethod
    def heads_of_several_layers() -> Any:
        net, x = make()
        deep = nn.ModuleList(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)) for _ in range(3))

        def losses() -> Any:
            h = net.trunk(x)
            return {f"task {t}": (head(h) - t).square().mean() for t, head in enumerate(deep)}, {
                "params": [*net.trunk.parameters(), *deep.parameters()]
            }

        return [*net.trunk.parameters(), *deep.parameters()], losses

    @staticmethod
    def with_params_as_a_module() -> Any:
        net, x = make()
        return list(net.parameters()), lambda: (net.losses(x), {"params": net})

    @staticmethod
    def a_head_that_two_tasks_share() -> Any:
        # its weight is a leaf that the parts of single tasks reach at once, with no node between that both have
        net, x = make()

        def losses() -> Any:
            h = net.trunk(x)
            return [net.heads[t](h).square().mean() + t for t in (0, 0, 1)], {}

        return [*net.trunk.parameters(), *net.heads[0].parameters(), *net.heads[1].parameters()], losses

    @staticmethod
    def a_parameter_of_the_trunk_that_is_per_task() -> Any:
        net, x = make()
        fastmtl.mark_per_task(net.trunk[0].weight)
        return list(net.parameters()), lambda: (net.losses(x), {})

    @staticmethod
    def nothing_but_per_task_parameters_and_one_shared() -> Any:
        net, x = make()
        return list(net.parameters()), lambda: (net.losses(x), {"shared": [net.trunk[2].bias]})

    @staticmethod
    def shared_that_one_task_reaches() -> Any:
        net, x = make()
        shared = [*net.trunk.parameters(), net.heads[1].weight]
        return list(net.parameters()), lambda: (net.losses(x), {"shared": shared})

    @staticmethod
    def one_task() -> Any:
        net, x = make(1)
        return list(net.parameters()), lambda: (net.losses(x), {"shared": net.trunk})

    @staticmethod
    def pairs_of_tasks() -> Any:
        # a tower of two tasks behind a trunk of three: two places where tasks meet
        net, x = make()
        tower = nn.Linear(6, 6)

        def losses() -> Any:
            h = net.trunk(x)
            k = tower(h).tanh()
            return [net.heads[0](k).mean(), net.heads[1](k).square().mean(), net.heads[2](h).square().mean()], {}

        return [*net.parameters(), *tower.parameters()], losses

    @staticmethod
    def a_loss_made_of_another() -> Any:
        net, x = make()

        def losses() -> Any:
            a, b, c = net.losses(x)
            return [a, a * b, c + 0.5 * b], {}

        return list(net.parameters()), losses

    @staticmethod
    def one_loss_twice() -> Any:
        net, x = make()

        def losses() -> Any:
            a, b, _ = net.losses(x)
            return [a, b, a], {"shared": net.trunk}

        return list(net.parameters())[:-2], losses

    @staticmethod
    def a_stack_of_losses() -> Any:
        net, x = make()
        return list(net.parameters()), lambda: (torch.stack(net.losses(x)) * torch.tensor([1.0, 2.0, 0.5]), {})

    @staticmethod
    def a_vector_that_is_not_told_apart() -> Any:
        net, x = make()

        def losses() -> Any:
            h = net.trunk(x)
            matrix = torch.stack([head(h)[:, 0] - 3 * t for t, head in enumerate(net.heads)], 1)
            return matrix.square().mean(0), {"shared": net.trunk}

        return list(net.parameters()), losses

    @staticmethod
    def the_same_vector_unbound() -> Any:
        params, losses = Graphs.a_vector_that_is_not_told_apart()

        def unbound() -> Any:
            vector, options = losses()
            return list(vector.unbind()), options

        return params, unbound

    @staticmethod
    def a_function_of_ones_own() -> Any:
        net, x = make()

        def losses() -> Any:
            h, k = net.trunk[:2](x), net.trunk(x)
            return [head(Double.apply(h, 3 + t, k)).square().mean() for t, head in enumerate(net.heads)], {}

        return list(net.parameters()), losses

    @staticmethod
    def a_function_that_takes_one_input_twice() -> Any:
        net, x = make()

        def losses() -> Any:
            h = net.trunk(x)
            return [head(h * h + h).square().mean() for head in net.heads], {}

        return list(net.parameters()), losses

    @staticmethod
    def an_input_that_needs_a_gradient() -> Any:
        net, x = make()
        x.requires_grad_()
        return [*net.parameters(), x], lambda: (net.losses(x), {})

    @staticmethod
    def a_sparse_table_of_one_task() -> Any:
        net, x = make()
        table = nn.Embedding(7, 4, sparse=True)

        def losses() -> Any:
            losses = net.losses(x)
            losses[1] = losses[1] + net.trunk(table(torch.tensor([1, 5, 1]))).square().mean()
            return losses, {}

        return [*net.parameters(), table.weight], losses

    @staticmethod
    def features() -> Any:
        net, x = make()

        def losses() -> Any:
            h = net.trunk(x)
            return [F.mse_loss(head(h), torch.full((5, 2), 3.0 * t)) for t, head in enumerate(net.heads)], {
                "features": h
            }

        return list(net.parameters()), losses

    @staticmethod
    def features_behind_each_other_with_plain_sums() -> Any:
        net, x = make()
        shared = [net.trunk[0].weight, net.trunk[2].weight]

        def losses() -> Any:
            h = net.trunk[:2](x)
            k = net.trunk[2:](h)
            losses = [F.mse_loss(head(k + t * h), torch.full((5, 2), 3.0 * t)) for t, head in enumerate(net.heads)]
            return losses, {"features": [h, k], "shared": shared, "params": net}

        return list(net.parameters()), losses

    @staticmethod
    def features_of_a_sparse_table() -> Any:
        net, _ = make()
        table = nn.Embedding(7, 4, sparse=True)

        def losses() -> Any:
            h = net.trunk(table(torch.tensor([1, 5, 1, 0])))
            return [(head(h) - t).square().mean() for t, head in enumerate(net.heads)], {"features": h}

        return [*net.parameters(), table.weight], losses

    @staticmethod
    def checkpointed() -> Any:
        net, x = make()

        def losses() -> Any:
            h = torch.utils.checkpoint.checkpoint(net.trunk, x, use_reentrant=False)
            return [head(h).square().mean() for head in net.heads], {}

        return list(net.parameters()), losses

    @staticmethod
    def compiled_as_a_whole() -> Any:
        net, x = make()

        def forward(x: Tensor) -> list[Tensor]:
            h = net.trunk(x)
            return [head(h).square().mean() for head in net.heads]

        compiled = torch.compile(forward, backend="aot_eager")
        return list(net.parameters()), lambda: (compiled(x), {"shared": net.trunk})

    @staticmethod
    def compiled_trunk() -> Any:
        net, x = make()
        trunk = torch.compile(net.trunk, backend="aot_eager")

        def losses() -> Any:
            h = trunk(x)
            return [(head(h) - t).square().mean() for t, head in enumerate(net.heads)], {"shared": net.trunk}

        return list(net.parameters()), losses

    @staticmethod
    def features_of_a_compiled_trunk() -> Any:
        net, x = make()
        trunk = torch.compile(net.trunk, backend="aot_eager")

        def losses() -> Any:
            h = trunk(x)
            losses = [(head(h) - t).square().mean() for t, head in enumerate(net.heads)]
            return losses, {"shared": net.trunk, "features": h}

        return list(net.parameters()), losses

    @staticmethod
    def double() -> Any:
        net, x = make()
        net.double()
        return list(net.parameters()), lambda: (net.losses(x.double()), {})


GRAPHS = [name for name in vars(Graphs) if not name.startswith("_")]


@pytest.mark.parametrize("name", GRAPHS)
def test_a_reused_step_leaves_what_t_passes_leave(name):
    torch._dynamo.reset()  # else a graph of another test's, whose buffers are donated, may serve
    params, losses = getattr(Graphs, name)()
    # T passes through a compiled graph need its saved tensors; with features there is one
    donated = name == "features_of_a_compiled_trunk"
    with torch._functorch.config.patch(donated_buffer=donated):
        want, got, surgery = full_and_reused(params, losses)
    assert_same(got, want)
    assert surgery.weights.tolist() == WEIGHTS[: len(surgery.names)].tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_round_gradients_and_not_weights(dtype):
    net, x = make()
    net.to(dtype)
    exact = copy.deepcopy(net).double()
    every = methods.Every(lambda gram: torch.tensor([1 / 3, 1.0005, 1.0], dtype=torch.float64), 2)
    _, got, _ = full_and_reused(list(net.parameters()), lambda: (net.losses(x.to(dtype)), {}), every)
    every.reset()
    _, want, _ = full_and_reused(list(exact.parameters()), lambda: (exact.losses(x.to(dtype).double()), {}), every)
    for g, w in zip(got, want, strict=True):
        assert float((g.double() - w).norm() / w.norm()) < 4 * torch.finfo(dtype).eps
    # ahead of the place where the tasks meet nothing is rounded a second time
    third = torch.full((), 1 / 3, dtype=torch.float64)
    big = torch.full((1000,), 1.0, dtype=dtype)
    assert torch.equal(fastmtl.task_gradients.weighted_pass._scaled(big, third), (big.double() / 3).to(dtype))


def test_one_pass_and_no_hook_that_stays():
    net, x = make()
    counts = {"trunk": 0, "head": 0}

    def count(name: str) -> Callable[[Tensor], None]:
        def hook(g: Tensor) -> None:
            counts[name] += 1

        return hook

    net.trunk[0].weight.register_hook(count("trunk"))
    net.heads[1].weight.register_hook(count("head"))
    every = methods.Every(PCGRAD, 3)
    seen = []
    for _ in range(7):
        losses = net.losses(x)
        fastmtl.backward(losses, net, method=every)
        seen.append((counts["trunk"], counts["head"]))
        counts.update(trunk=0, head=0)
    assert seen == [(3, 1), (1, 1), (1, 1)] * 2 + [(3, 1)]
    net.zero_grad()
    losses = net.losses(x)
    fastmtl.backward(losses, net, method=every, retain_graph=True)
    net.zero_grad()
    sum(losses).backward()
    plain = grads_of(list(net.parameters()))
    net.zero_grad()
    sum(net.losses(x)).backward()
    assert_same(plain, grads_of(list(net.parameters())), rtol=0)


def test_an_error_in_the_pass_writes_nothing_and_leaves_no_hook():
    net, x = make()
    every = methods.Every(Fixed(), 4)
    fastmtl.backward(net.losses(x), net, method=every)
    net.zero_grad()
    losses = net.losses(x)
    fails = net.trunk[2].weight.register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fastmtl.backward(losses, net, method=every, retain_graph=True)
    assert all(p.grad is None for p in net.parameters())
    fails.remove()
    torch.autograd.backward(losses, retain_graph=True)
    plain = grads_of(list(net.parameters()))
    net.zero_grad()
    sum(net.losses(x)).backward()
    assert_same(plain, grads_of(list(net.parameters())))


def test_gradients_add_up_over_micro_batches():
    net, _ = make()
    parts = torch.randn(4, 5, 4)
    every = methods.Every(Fixed(), 4)
    for part in parts:
        fastmtl.backward([loss / 4 for loss in net.losses(part)], net, method=every)
    got = grads_of(list(net.parameters()))
    assert every.method.asked == 1
    net.zero_grad()
    for part in parts:
        fastmtl.backward([loss / 4 for loss in net.losses(part)], net, method=Fixed())
    assert_same(got, grads_of(list(net.parameters())))


def test_post_accumulate_hooks_run_once_when_all_is_written():
    net, x = make()
    every = methods.Every(Fixed(), 2)
    fastmtl.backward(net.losses(x), net, method=every)
    seen = []
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(lambda p: seen.append(all(q.grad is not None for q in net.parameters())))
    net.zero_grad()
    fastmtl.backward(net.losses(x), net, method=every)
    assert seen == [True] * len(list(net.parameters()))


# --- when the method is asked


def steps(every: methods.Every, *absent: int, names: Sequence[str] = "abc", net: Any = None) -> list[bool]:
    """For each number a step in which that task is absent (-1: none): whether weights were reused."""
    net, x = net or make()
    out = []
    for t in absent:
        losses = {
            name: None if i == t else loss for i, (name, loss) in enumerate(zip(names, net.losses(x), strict=True))
        }
        out.append(fastmtl.backward(losses, net, method=every, shared=net.trunk).reused)
    return out


@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_method_is_asked_at_every_kth_step(k):
    method = Fixed()
    assert steps(methods.Every(method, k), *[-1] * 11) == [i % k != 0 for i in range(11)]
    assert method.asked == len(range(0, 11, k))


def test_a_task_that_goes_or_comes_back_asks_the_method():
    every = methods.Every(Fixed(), 4)
    assert steps(every, -1, -1, 2, 2, 2, -1, -1, 0, 1, -1) == [
        False, True, False, True, True, False, True, False, False, False,
    ]  # fmt: skip
    # and the count begins anew
    assert steps(every, -1, -1, -1, -1) == [True, True, True, False]


def test_weights_belong_to_names_and_not_positions():
    net, x = make()
    every = methods.Every(Fixed(), 3)
    losses = dict(zip("abc", net.losses(x), strict=True))
    fastmtl.backward(losses, net, method=every)
    losses = dict(zip("abc", net.losses(x), strict=True))
    surgery = fastmtl.backward({"c": losses["c"], "x": None, "a": losses["a"], "b": losses["b"]}, net, method=every)
    assert surgery.reused
    assert surgery.weights.tolist() == [WEIGHTS[2], 0.0, WEIGHTS[0], WEIGHTS[1]]
    assert not fastmtl.backward(dict(zip("abd", net.losses(x), strict=True)), net, method=every).reused


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["a full step", "a reused step"])
def test_what_is_not_finite_shows_and_asks_the_method_next_time(bad, where):
    net, x = make()
    every = methods.Every(PCGRAD, 5)
    reused = []
    for step in range(5):
        net.zero_grad()
        losses = net.losses(x)
        if step == (0 if where == "a full step" else 2):
            losses[1] = losses[1] * bad
        surgery = fastmtl.backward(losses, net, method=every)
        reused.append(surgery.reused)
        broken = not all(bool(p.grad.isfinite().all()) for p in net.trunk.parameters())
        assert broken == (step == (0 if where == "a full step" else 2))
        assert bool(surgery.grad_norm().isfinite()) != broken
        # the others' heads have gradients of their own
        assert bool(net.heads[0].weight.grad.isfinite().all())
    assert reused == ([False, False, True, True, True] if where == "a full step" else [False, True, True, False, True])


def test_a_flag_that_comes_late_counts_when_it_comes(monkeypatch):
    # as on a GPU, where the host does not wait for it
    read, arrived = every_module._Flag.read, False
    monkeypatch.setattr(
        every_module._Flag, "read", lambda flag, *, wait: read(flag, wait=wait) if wait or arrived else None
    )
    net, x = make()
    every = methods.Every(Fixed(), 8)
    fastmtl.backward(net.losses(x), net, method=every)
    fastmtl.backward([loss * float("nan") for loss in net.losses(x)], net, method=every)
    for _ in range(2):
        surgery = fastmtl.backward(net.losses(x), net, method=every)
        assert surgery.reused and surgery.weights.tolist() == WEIGHTS[:3].tolist()
    arrived = True
    assert not fastmtl.backward(net.losses(x), net, method=every).reused
    assert fastmtl.backward(net.losses(x), net, method=every).reused
    arrived = False
    fastmtl.backward([loss * float("nan") for loss in net.losses(x)], net, method=every)
    # a checkpoint waits for it
    assert every.state_dict()["weights"] == {}


def test_a_shared_parameter_with_a_sparse_gradient_is_refused_at_every_step():
    net, _ = make()
    table = nn.Embedding(7, 4, sparse=True)
    every = methods.Every(Fixed(), 4)
    for shared in (net.trunk, [*net.trunk.parameters(), table.weight]):
        h = net.trunk(table(torch.tensor([1, 5, 1, 0])))
        call = lambda shared=shared, h=h: fastmtl.backward(  # noqa: E731
            [head(h).square().mean() for head in net.heads], method=every, shared=shared
        )
        if shared is net.trunk:
            call()
        else:
            assert not every.due("012", [True] * 3)
            with pytest.raises(TypeError, match="is shared and has a sparse gradient"):
                call()


def test_weights_that_are_not_finite_are_not_kept():
    net, x = make()
    every = methods.Every(Fixed(), 2)
    fastmtl.backward(net.losses(x), net, method=every)
    fastmtl.backward(net.losses(x), net, method=every)
    surgery = fastmtl.backward([loss * float("inf") for loss in net.losses(x)], net, method=every)
    assert not surgery.reused
    # on a GPU the next step may come before the host has heard of it: then it has the weights of the step before
    every._flags.clear()
    surgery = fastmtl.backward(net.losses(x), net, method=every)
    assert surgery.reused and surgery.weights.tolist() == WEIGHTS[:3].tolist()


def test_a_grad_scaler_skips_the_step_and_training_goes_on():
    net, x = make()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3)
    every = methods.Every(PCGRAD, 4)
    moved, reused = [], []
    for step in range(8):
        optimizer.zero_grad()
        factor = float("inf") if step == 5 else 1.0
        losses = [scaler.scale(loss * factor) for loss in net.losses(x)]
        scale = scaler.get_scale()
        surgery = fastmtl.backward(losses, net, method=every, loss_scale=scale)
        reused.append(surgery.reused)
        true = torch.cat([p.grad.flatten() for p in net.trunk.parameters()]).double().norm() / scale
        if step != 5:
            torch.testing.assert_close(surgery.grad_norm(), true, rtol=1e-5, atol=0)
        before = net.trunk[0].weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        moved.append(not torch.equal(before, net.trunk[0].weight))
    assert moved == [step != 5 for step in range(8)]
    assert reused == [False, True, True, True, False, True, False, True]


def test_nothing_shared_asks_no_method():
    nets = [make(1, seed) for seed in range(2)]
    method = Fixed()
    every = methods.Every(method, 2)
    for _ in range(3):
        surgery = fastmtl.backward([net.losses(x)[0] for net, x in nets], method=every)
        assert surgery.weights.tolist() == [1.0, 1.0]
    assert method.asked == 0


# --- what a surgery tells of such a step


def test_a_reused_surgery_tells_what_it_knows():
    net, x = make()
    every = methods.Every(Fixed(), 2)
    fastmtl.backward({"a": net.losses(x)[0], "b": None, "c": net.losses(x)[2]}, net, method=every, shared=net.trunk)
    net.zero_grad()
    a, _, c = net.losses(x)
    surgery = fastmtl.backward({"a": a, "b": None, "c": c}, net, method=every, shared=net.trunk)
    log = surgery.log_dict("train/")
    assert set(log) == {"train/grad_norm", "train/weight/a", "train/weight/c"}
    assert log["train/weight/c"] == WEIGHTS[2] and surgery.weights[1] == 0
    norm = torch.cat([p.grad.flatten() for p in net.trunk.parameters()]).double().norm()
    torch.testing.assert_close(log["train/grad_norm"], norm, rtol=1e-6, atol=0)
    assert surgery.gram.shape == (3, 3) and bool(surgery.gram.isnan().all())
    for name in ("cosines", "conflicts"):
        with pytest.raises(RuntimeError, match=rf"Surgery.{name}: this step reused weights"):
            getattr(surgery, name)()
    assert repr(surgery) == "Surgery(a, b (absent), c)"


# --- state


def test_state_by_torch_save_goes_on_where_it_was():
    net = make()
    every = methods.Every(methods.PCGrad(generator=torch.Generator().manual_seed(0)), 4)
    steps(every, -1, -1, net=net)
    file = io.BytesIO()
    torch.save(every.state_dict(), file)
    file.seek(0)
    other = methods.Every(methods.PCGrad(generator=torch.Generator().manual_seed(9)), 4)
    other.load_state_dict(torch.load(file, weights_only=True))
    surgeries = []
    for one in (every, other):
        losses = dict(zip("abc", net[0].losses(net[1]), strict=True))
        surgeries.append(fastmtl.backward(losses, net[0], method=one, shared=net[0].trunk))
    assert all(s.reused for s in surgeries) and torch.equal(surgeries[0].weights, surgeries[1].weights)
    assert steps(other, -1, -1, net=net) == [True, False]
    other.reset()
    assert steps(other, -1, -1, net=net) == [False, True]


def test_a_state_after_a_step_that_was_not_finite_asks_the_method():
    net, x = make()
    every = methods.Every(Fixed(), 4)
    fastmtl.backward([loss * float("nan") for loss in net.losses(x)], net, method=every)
    other = methods.Every(Fixed(), 4)
    other.load_state_dict(every.state_dict())
    assert not fastmtl.backward(net.losses(x), net, method=other).reused


# --- where there are task gradients in any case


@pytest.mark.parametrize("way", ["bank", "one_pass"])
def test_banks_save_the_methods_work(way):
    net, x = make()
    method = Fixed()
    every = methods.Every(method, 3)
    fixed = Fixed()
    for step in range(5):
        net.zero_grad()
        surgery = collect(net, x, way, every)
        got = grads_of(list(net.parameters()))
        net.zero_grad()
        want = collect(net, x, way, fixed)
        assert_same(got, grads_of(list(net.parameters())))
        assert surgery.weights.tolist() == WEIGHTS[:3].tolist()
        # the Gram matrix is there at every step
        torch.testing.assert_close(surgery.gram, want.gram)
        assert not surgery.reused and set(surgery.log_dict()) == set(want.log_dict())
        assert method.asked == 1 + step // 3


def collect(net: Net, x: Tensor, way: str, method: methods.Method) -> fastmtl.Surgery:
    if way == "bank":
        bank = fastmtl.GradientBank(net, 3)
        for t in range(3):
            with bank.task(t):
                net.losses(x)[t].backward()
        return bank.apply(method)
    ids = torch.tensor([0, 1, 2, 0, 1])
    with fastmtl.one_pass(net, ids, 3, shared=net.trunk) as bank:
        h = net.trunk(x)
        out = sum(head(h) for head in net.heads)
        (out - ids[:, None]).square().sum(1).mean().backward()
    return bank.apply(method)


# --- the method itself


def test_weights_of_gram_matrices_by_hand():
    every = methods.Every(lambda gram: 1 / gram.diagonal().double(), 3)
    found = [float(every.weights(scale * torch.eye(2))[0]) for scale in (1.0, 2.0, 4.0, 8.0)]
    assert found == [1.0, 1.0, 1.0, 0.125]
    # a mask that the device alone knows: the method is asked, and what was kept stays
    masked = every.weights(2 * torch.eye(2), present=torch.tensor([True, False]))
    assert masked.tolist() == [0.5, 0.0]
    assert every.weights(torch.eye(2))[0] == 0.125
    assert every.weights(torch.eye(3)).tolist() == [1.0, 1.0, 1.0]


def test_weights_kept_are_no_alias_of_those_handed_out():
    every = methods.Every(Fixed(), 3)
    every.weights(torch.eye(2)).zero_()
    w = every.weights(torch.eye(2))
    assert w.tolist() == WEIGHTS[:2].tolist()
    w.zero_()
    assert every.weights(torch.eye(2)).tolist() == WEIGHTS[:2].tolist()


def test_called_on_gradients():
    g = torch.randn(3, 11, dtype=torch.float64)
    every = methods.Every(Fixed(), 2)
    torch.testing.assert_close(every(g), WEIGHTS[:3] @ g)
    torch.testing.assert_close(every(2 * g), WEIGHTS[:3] @ (2 * g))
    assert every.method.asked == 1
    assert repr(methods.Every(methods.Sum(), 4)) == "Every(Sum(), 4)"


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((methods.Sum(), 0), ValueError, "k: expected an integer from 1, got 0"),
        ((methods.Sum(), -3), ValueError, "k: expected an integer from 1, got -3"),
        ((methods.Sum(), 2.0), TypeError, "k: expected an integer, got float"),
        ((methods.Sum(), True), TypeError, "k: expected an integer, got bool"),
        ((methods.Sum, 2), TypeError, "got the class Sum"),
        (("nothing", 2), ValueError, "method: expected one of .* got 'nothing'"),
        ((3, 2), TypeError, "got int"),
    ],
)
def test_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        methods.Every(*arguments)


def test_a_method_without_weights_is_refused():
    class Elementwise(methods.Method):
        needs = frozenset({"gradients"})

    with pytest.raises(TypeError, match="expected one with weights, which can be kept"):
        methods.Every(Elementwise(), 4)


def test_a_foreign_callable_that_returns_nonsense_is_refused_at_the_step_that_asks():
    net, x = make()
    every = methods.Every(lambda gram: gram, 2)
    with pytest.raises(ValueError, match="expected 3 weights"):
        fastmtl.backward(net.losses(x), net, method=every)
    assert all(p.grad is None for p in net.parameters())


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
