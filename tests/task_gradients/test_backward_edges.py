"""`fastmtl.backward` where memory, graphs and leaves are not the plain case."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastmtl
from fastmtl.surgery.task_gradients import TaskGradients

# --- the result is written into the first gradient, unless somebody else can see it


class _ReturnsWhatItSaved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, constant: Tensor) -> Tensor:
        ctx.constant = constant
        return (weight * constant).sum()

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.constant, None


class _ReturnsAView(_ReturnsWhatItSaved):
    @staticmethod
    def forward(ctx, weight: Tensor, constant: Tensor) -> Tensor:
        ctx.constant = constant
        return (weight * constant.t()).sum()

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.constant.t(), None


@pytest.mark.parametrize("function", [_ReturnsWhatItSaved, _ReturnsAView])
def test_tensor_that_a_custom_backward_returns_is_not_overwritten(function: type) -> None:
    weight = torch.nn.Parameter(torch.ones(3, 3))
    constants = [torch.randn(3, 3) for _ in range(2)]
    before = [c.clone() for c in constants]
    fastmtl.backward([function.apply(weight, c) for c in constants], method="sum")
    assert all(torch.equal(c, b) for c, b in zip(constants, before, strict=True))
    expected = sum(before) if function is _ReturnsWhatItSaved else sum(before).t()
    torch.testing.assert_close(weight.grad, expected)


def test_gradient_that_a_hook_kept_is_not_overwritten() -> None:
    weight = torch.nn.Parameter(torch.randn(4))
    kept: list[Tensor] = []
    weight.register_hook(kept.append)
    fastmtl.backward([(weight * 2.0).sum(), (weight * torch.arange(4.0)).sum()], method="sum")
    torch.testing.assert_close(kept[0], torch.full((4,), 2.0))
    torch.testing.assert_close(kept[1], torch.arange(4.0))
    torch.testing.assert_close(weight.grad, 2.0 + torch.arange(4.0))


def test_two_parameters_with_one_gradient_tensor() -> None:
    # the gradient of a + b is one and the same tensor for both
    a, b = (torch.nn.Parameter(torch.randn(5)) for _ in range(2))
    x, y = torch.randn(5), torch.randn(5)
    fastmtl.backward([((a + b) * x).sum(), ((a + b) * y).sum()], method="sum")
    for p in (a, b):
        torch.testing.assert_close(p.grad, x + y)
    assert a.grad.data_ptr() != b.grad.data_ptr()


def test_result_takes_the_memory_of_the_first_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[set[int], list[int]]] = []
    choose_memory = TaskGradients._result_memory

    def spy(self: TaskGradients) -> list[Tensor]:
        memory = choose_memory(self)
        seen.append(({x.data_ptr() for x in self._gradients.tensors}, [x.data_ptr() for x in memory]))
        return memory

    monkeypatch.setattr(TaskGradients, "_result_memory", spy)
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 16, 3))
    out = net(torch.randn(2, 1, 6, 6))
    fastmtl.backward([out[:, t].square().mean() for t in range(3)])
    ((gradients, memory),) = seen
    assert len(memory) == 4 and all(pointer in gradients for pointer in memory)
    assert sorted(p.grad.data_ptr() for p in net.parameters()) == sorted(memory)
    assert all(p.grad._base is None for p in net.parameters())


def test_step_under_torch_compile_runs_backward_eagerly() -> None:
    torch.manual_seed(0)
    trunk, heads = torch.nn.Linear(6, 8), torch.nn.ModuleList(torch.nn.Linear(8, 1) for _ in range(3))
    x = torch.randn(4, 6)

    def step(x: Tensor, **options: object) -> None:
        z = trunk(x).relu()
        fastmtl.backward([head(z).square().mean() for head in heads], method="sum", **options)

    step(x)
    expected = [p.grad.clone() for p in (*trunk.parameters(), *heads.parameters())]
    for backend, options in (("eager", {}), ("eager", {"shared": trunk}), ("aot_eager", {"shared": trunk})):
        for p in (*trunk.parameters(), *heads.parameters()):
            p.grad = None
        torch.compile(step, backend=backend)(x, **options)
        for p, g in zip((*trunk.parameters(), *heads.parameters()), expected, strict=True):
            torch.testing.assert_close(p.grad, g)
        torch.compiler.reset()


def test_input_that_needs_a_gradient_stays_out_of_the_gram() -> None:
    net = torch.nn.Linear(3, 2)
    x = torch.randn(5, 3)

    def losses(x: Tensor) -> list[Tensor]:
        return [net(x)[:, t].square().mean() for t in range(2)]

    expected = fastmtl.backward(losses(x), method="sum").gram
    net.zero_grad()
    x.requires_grad_()
    torch.testing.assert_close(fastmtl.backward(losses(x), method="sum").gram, expected)
    (plain,) = torch.autograd.grad(sum(losses(x)), x)
    torch.testing.assert_close(x.grad, plain)


def test_plain_tensors_are_shared_where_there_is_no_parameter() -> None:
    theta = torch.tensor([0.5, -3.0], requires_grad=True)
    surgery = fastmtl.backward([theta.square().sum(), (theta - 1.0).square().sum()])
    assert (surgery.gram.diagonal() > 0).all() and theta.grad is not None


def test_losses_as_values_of_a_dict() -> None:
    theta = torch.nn.Parameter(torch.tensor([0.5, -3.0]))
    losses = {"a": theta.square().sum(), "b": theta.sum()}
    assert fastmtl.backward(losses.values(), method="SUM").names == ("0", "1")
    torch.testing.assert_close(theta.grad, torch.tensor([2.0, -5.0]))


# --- heads joined into one tensor


def _joined(how: str, heads: torch.nn.ModuleList, z: Tensor) -> list[Tensor]:
    outs = [head(z) for head in heads]
    if how == "cat":
        y = torch.cat(outs, 1)
        return [y[:, i].square().mean() for i in range(3)]
    if how == "stack":
        y = torch.stack(outs)
        return [y[i].square().mean() for i in range(3)]
    if how == "slice":
        y = torch.cat(outs, 1)
        return [y[:, i : i + 1].square().mean() for i in range(3)]
    if how == "iterate":
        return [x.square().mean() for x in torch.stack(outs)]
    return [x.square().mean() for x in torch.cat(outs, 1).split(1, 1)]


@pytest.mark.parametrize("how", ["cat", "stack", "slice", "iterate", "split"])
def test_heads_joined_and_taken_apart_need_shared(how: str) -> None:
    trunk, heads = torch.nn.Linear(4, 6), torch.nn.ModuleList(torch.nn.Linear(6, 1) for _ in range(3))
    x = torch.randn(5, 4)
    with pytest.raises(ValueError, match=r"torch\.cat or torch\.stack.*shared="):
        fastmtl.backward(_joined(how, heads, trunk(x)))
    assert all(p.grad is None for p in (*trunk.parameters(), *heads.parameters()))
    apart = fastmtl.backward([head(trunk(x)).square().mean() for head in heads], method="sum")
    expected = [p.grad for p in (*trunk.parameters(), *heads.parameters())]
    for p in (*trunk.parameters(), *heads.parameters()):
        p.grad = None
    together = fastmtl.backward(_joined(how, heads, trunk(x)), shared=trunk, method="sum")
    torch.testing.assert_close(together.gram, apart.gram)
    for p, g in zip((*trunk.parameters(), *heads.parameters()), expected, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_a_join_inside_the_trunk_is_followed() -> None:
    a, b, c = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3), torch.nn.Linear(6, 2)
    x = torch.randn(5, 4)
    y = c(torch.cat([a(x), b(x)], 1))
    surgery = fastmtl.backward([y[:, 0].square().mean(), y[:, 1].square().mean()], method="sum")
    assert (surgery.gram.diagonal() > 0).all()


# --- own gradients are not shared with what the caller holds


def test_own_gradient_that_a_hook_on_an_activation_kept_is_copied() -> None:
    trunk, head = torch.nn.Linear(3, 3), torch.nn.Parameter(torch.randn(5, 3))
    stash: list[Tensor] = []
    h = head + 0.0
    h.register_hook(stash.append)
    z = trunk(torch.randn(5, 3))
    fastmtl.backward([(z * h).sum(), z.square().sum()], method="sum")
    before = stash[0].clone()
    head.grad.zero_()
    assert torch.equal(stash[0], before)


@pytest.mark.parametrize("kind", ["storage", "numpy", "tensor"])
def test_memory_that_the_caller_holds_in_another_way_is_not_overwritten(kind: str) -> None:
    np = pytest.importorskip("numpy")
    cache = np.arange(4, dtype=np.float32)
    held: list[object] = []

    class Returns(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight: Tensor) -> Tensor:
            return weight.sum()

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            if kind == "numpy":
                return torch.from_numpy(cache)
            t = torch.arange(4.0)
            held.append(t if kind == "tensor" else t.untyped_storage())
            return t

    weight = torch.nn.Parameter(torch.ones(4))
    fastmtl.backward([Returns.apply(weight), (weight * 3.0).sum()], method="sum")
    torch.testing.assert_close(weight.grad, torch.arange(4.0) + 3.0)
    assert cache.tolist() == [0.0, 1.0, 2.0, 3.0]
    for x in held:
        values = x if isinstance(x, Tensor) else torch.empty(0).set_(x)  # type: ignore[arg-type]
        assert torch.equal(values, torch.arange(4.0))


def test_expanded_grad_is_accumulated_into() -> None:
    v, w = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    v.grad = torch.ones(()).expand(3)
    fastmtl.backward([(v * w).sum(), (v + w).sum()], method="sum")
    torch.testing.assert_close(v.grad, torch.full((3,), 3.0))
    torch.testing.assert_close(w.grad, torch.full((3,), 2.0))
