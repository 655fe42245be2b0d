"""`fastmtl.GradientBank`: rows from ordinary `.backward()` calls."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmtl
from fastmtl import methods
from fastmtl.ops.gradients.reference import pcgrad_loop

ORDER = torch.tensor([[1, 2, 0], [2, 0, 1], [0, 1, 2]])
PCGRAD = methods.PCGrad(order=ORDER)


class Net(nn.Module):
    def __init__(self, num_tasks: int = 3) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(6, 2) for _ in range(num_tasks))

    def loss(self, t: int, x: Tensor) -> Tensor:
        return F.mse_loss(self.heads[t](self.trunk(x)), torch.full((len(x), 2), 3.0 * (-1) ** t))


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 4)


def flat(net: nn.Module) -> Tensor:
    return torch.cat(
        [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in net.parameters()]
    ).double()


def plain(net: Net, t: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Task t's gradient of the trunk and of the heads, by autograd alone, float64."""
    grads = torch.autograd.grad(net.loss(t, x), [*net.parameters()], materialize_grads=True)
    split = len([*net.trunk.parameters()])
    trunk, heads = grads[:split], grads[split:]
    return torch.cat([g.flatten() for g in trunk]).double(), torch.cat([g.flatten() for g in heads]).double()


def expected(net: Net, x: Tensor, order: Tensor = ORDER) -> Tensor:
    trunk, heads = zip(*[plain(net, t, x) for t in range(3)], strict=True)
    return torch.cat([pcgrad_loop(torch.stack(trunk), order).sum(0), sum(heads)])


def assert_update(net: nn.Module, want: Tensor) -> None:
    torch.testing.assert_close(flat(net), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seen", [None, "trunk"])
def test_one_forward_per_task(net, x, seen, backend):
    want = expected(net, x)
    bank = fastmtl.GradientBank(net, ["a", "b", "c"], shared=seen and net.trunk)
    for t, name in enumerate(bank.names):
        with bank.task(t if t % 2 else name):
            net.loss(t, x).backward()
        assert all(p.grad is None for p in net.parameters())
    surgery = bank.apply(PCGRAD)
    assert_update(net, want)
    assert bool(surgery.conflicts().any()) and surgery.names == ("a", "b", "c")
    trunk = torch.stack([plain(net, t, x)[0] for t in range(3)])
    torch.testing.assert_close(surgery.gram.double(), trunk @ trunk.mT, rtol=1e-5, atol=1e-7)


def test_micro_batches_add_up_and_are_operated_on_once(net, x):
    want = expected(net, x)
    bank = fastmtl.GradientBank(net, 3)
    for part in (x[:3], x[3:]):  # equal halves: the mean over x is the mean of the two
        for t in range(3):
            with bank.task(t):
                (net.loss(t, part) / 2).backward()
    bank.apply(PCGRAD)
    assert_update(net, want)


def test_two_backward_passes_in_one_visit(net, x):
    want = expected(net, x)
    bank = fastmtl.GradientBank(net, 3)
    for t in range(3):
        with bank.task(t):
            for part in (x[:3], x[3:]):
                (net.loss(t, part) / 2).backward()
    bank.apply(PCGRAD)
    assert_update(net, want)


def test_equals_backward(net, x):
    fastmtl.backward([net.loss(t, x) for t in range(3)], net, method=PCGRAD)
    want = flat(net)
    net.zero_grad()
    bank = fastmtl.GradientBank(net.parameters(), 3)
    for t in (2, 0, 1):
        with bank.task(t):
            net.loss(t, x).backward()
    bank.apply(PCGRAD)
    assert_update(net, want)


def test_apply_accumulates_and_empties(net, x):
    want = expected(net, x)
    held = []
    for p in net.parameters():
        p.grad = torch.ones_like(p)
        held.append(p.grad)
    bank = fastmtl.GradientBank(net, 3)
    for _ in range(2):
        for t in range(3):
            with bank.task(t):
                net.loss(t, x).backward()
        bank.apply(PCGRAD)
    assert_update(net, 1 + 2 * want)
    assert all(p.grad is g for p, g in zip(net.parameters(), held, strict=True))
    with pytest.raises(RuntimeError, match="no gradient was collected"):
        bank.apply()


def test_zero_grad_before_the_backward_pass_is_harmless(net, x):
    want = expected(net, x)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    bank = fastmtl.GradientBank(net, 3)
    for visit in range(2):
        for t in range(3):
            with bank.task(t):
                net.zero_grad(set_to_none=bool(visit))
                net.loss(t, x).backward()
    assert_update(net, torch.ones_like(want))
    bank.apply(PCGRAD)
    assert_update(net, 1 + 2 * want)


def test_an_exception_restores_grad_and_drops_this_visit(net, x):
    want = expected(net, x)
    for p in net.trunk.parameters():
        p.grad = torch.ones_like(p)
    before = [p.grad for p in net.parameters()]
    bank = fastmtl.GradientBank(net, 3)
    for t in range(3):
        with bank.task(t):
            net.loss(t, x).backward()
    with pytest.raises(ArithmeticError), bank.task(1):
        net.loss(1, x).backward()
        raise ArithmeticError
    assert all(p.grad is g for p, g in zip(net.parameters(), before, strict=True))
    for p in net.parameters():
        p.grad = None
    bank.apply(PCGRAD)
    assert_update(net, want)


def test_absent_tasks(net, x):
    bank = fastmtl.GradientBank(net, 3)
    for t in (0, 2):
        with bank.task(t):
            net.loss(t, x).backward()
    with bank.task(1):
        pass
    order = torch.tensor([[2], [1], [0]])
    surgery = bank.apply(methods.PCGrad("mean", order=order))
    (a, head_a), (c, head_c) = plain(net, 0, x), plain(net, 2, x)
    update = pcgrad_loop(torch.stack([a, c]), torch.tensor([[1], [0]])).mean(0)
    assert_update(net, torch.cat([update, head_a + head_c]))
    assert surgery.present == (True, False, True) and surgery.weights[1] == 0
    assert net.heads[1].weight.grad is None


def test_a_single_task(net, x):
    bank = fastmtl.GradientBank(net, 3)
    with bank.task(1):
        net.loss(1, x).backward()
    surgery = bank.apply()
    assert_update(net, torch.cat(plain(net, 1, x)))
    assert surgery.weights.tolist() == [0, 1, 0]


def test_row(net, x):
    bank = fastmtl.GradientBank(net, ["a", "b", "c"], shared=net.trunk)
    for t in (0, 2, 2):
        with bank.task(t):
            net.loss(t, x).backward()
    trunk = len([*net.trunk.parameters()])
    assert all(p is q for p, q in zip(bank.params, net.parameters(), strict=True))
    for task, times in ((0, 1), ("c", 2)):
        t = "abc".index(task) if isinstance(task, str) else task
        found = torch.cat([g.flatten() for g in bank.row(task)[:trunk]]).double()
        torch.testing.assert_close(found, times * plain(net, t, x)[0], rtol=1e-5, atol=1e-7)
        assert bank.row(task)[trunk:] == [None] * (len(bank.params) - trunk)
    assert bank.row("b") == [None] * len(bank.params)
    with pytest.raises(ValueError, match="expected one of a, b, c, got 'd'"):
        bank.row("d")
    with bank.task(1), pytest.raises(RuntimeError, match="inside a task of this bank"):
        bank.row(1)
    bank.apply("sum")
    with pytest.raises(RuntimeError, match="no gradient was collected since the bank was made or applied"):
        bank.row(0)


def test_marked_and_unshared_parameters_are_summed(net, x):
    fastmtl.mark_per_task(net.trunk[2])
    bank = fastmtl.GradientBank(net, 3)
    for t in range(3):
        with bank.task(t):
            net.loss(t, x).backward()
    bank.apply(PCGRAD)
    trunk = torch.stack([plain(net, t, x)[0] for t in range(3)])
    first = 4 * 6 + 6
    want = torch.cat([pcgrad_loop(trunk[:, :first], ORDER).sum(0), trunk[:, first:].sum(0)])
    assert_update(net.trunk, want)


@pytest.mark.parametrize("visits", [1, 2])
def test_sparse_gradients(visits):
    table, trunk, heads = nn.Embedding(9, 4, sparse=True), nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 1)] * 2)
    model = nn.ModuleDict({"table": table, "trunk": trunk, "heads": heads})

    def collect(bank: fastmtl.GradientBank, first: bool) -> None:
        for _ in range(visits):
            for t in range(2 - first):
                with bank.task(t):
                    (heads[t](trunk(table(torch.tensor([t, 5, 5])))).mean() * (-1) ** t).backward()

    bank = fastmtl.GradientBank(model, 2, shared=trunk)
    collect(bank, False)
    bank.apply("sum")
    assert table.weight.grad.is_sparse
    want = torch.zeros(9, 4)
    for t in range(2):
        loss = heads[t](trunk(table(torch.tensor([t, 5, 5])))).mean() * (-1) ** t
        want += visits * torch.autograd.grad(loss, table.weight)[0].to_dense()
    torch.testing.assert_close(table.weight.grad.to_dense(), want)

    model.zero_grad()
    bank = fastmtl.GradientBank(model, 2)
    collect(bank, True)  # reached by one task alone: its own
    bank.apply("sum")
    assert table.weight.grad.is_sparse
    model.zero_grad()
    collect(bank, False)
    with pytest.raises(TypeError, match=r"'table.weight'.*shared.*sparse.*shared="):
        bank.apply("sum")
    assert all(p.grad is None for p in model.parameters())


def test_loss_scale(net, x):
    bank = fastmtl.GradientBank(net, 3)
    surgeries = []
    for scale in (None, 256.0):
        for t in range(3):
            with bank.task(t):
                (net.loss(t, x) * (scale or 1)).backward()
        surgeries.append(bank.apply(PCGRAD, loss_scale=scale))
    torch.testing.assert_close(surgeries[0].gram, surgeries[1].gram, rtol=1e-5, atol=0)
    assert_update(net, 257 * expected(net, x))


@pytest.mark.filterwarnings("ignore:Using backward")
def test_gradients_with_a_graph(net, x):
    bank = fastmtl.GradientBank(net, 3)
    for t in range(3):
        with bank.task(t):
            net.loss(t, x).backward(create_graph=True)
    bank.apply(PCGRAD)
    assert_update(net, expected(net, x))
    assert not any(p.grad.requires_grad for p in net.parameters())


def test_several_dtypes(x):
    first, second = nn.Linear(4, 8), nn.Linear(8, 3, dtype=torch.bfloat16)
    model = nn.Sequential(first, second)
    bank = fastmtl.GradientBank(model, 3)
    for t in range(3):
        with bank.task(t):
            second(first(x).bfloat16())[:, t].float().sub((-1) ** t).square().mean().backward()
    rows = [second(first(x).bfloat16())[:, t].float().sub((-1) ** t).square().mean() for t in range(3)]
    bank.apply("sum")
    grads = torch.autograd.grad(sum(rows), [*model.parameters()])
    for p, g in zip(model.parameters(), grads, strict=True):
        assert p.grad.dtype == p.dtype
        torch.testing.assert_close(p.grad, g, rtol=2e-2, atol=1e-3)


def test_tasks_cannot_be_nested(net, x):
    bank = fastmtl.GradientBank(net, 3)
    with bank.task(0):
        with pytest.raises(RuntimeError, match="nested"), bank.task(1):
            pass
        with pytest.raises(RuntimeError, match="inside a task"):
            bank.apply()
        net.loss(0, x).backward()
    with bank.task(1):
        net.loss(1, x).backward()
    assert bank.apply().present == (True, True, False)


def test_compiled_modules_need_shared(net, x):
    with pytest.raises(ValueError, match=r"OptimizedModule.*compiled.*shared="):
        fastmtl.GradientBank(torch.compile(net, backend="aot_eager"), 3)
    bank = fastmtl.GradientBank(torch.compile(net, backend="aot_eager"), 3, shared=net.trunk)
    assert len(bank.names) == 3
    inside = Net()
    inside.trunk.compile(backend="aot_eager")
    with pytest.raises(ValueError, match=r"'trunk'.*compiled.*shared="):
        fastmtl.GradientBank(inside, 3)


def test_a_compiled_model_with_shared(x):
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.trunk(x).tanh()
            return self.a(h).square().mean(), -self.b(h).square().mean()

    model = Pair()
    order = methods.PCGrad(order=torch.tensor([[1], [0]]))
    fastmtl.backward(model(x), method=order)
    want = flat(model)
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager")
    bank = fastmtl.GradientBank(compiled, 2, shared=model.trunk)
    for t in range(2):
        with bank.task(t):
            compiled(x)[t].backward()
    bank.apply(order)
    assert_update(model, want)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (lambda net: ([], 3), ValueError, "at least one parameter"),
        (lambda net: (3, 3), TypeError, "params.*int"),
        (lambda net: ([net.trunk[0].weight * 1], 3), ValueError, r"params\[0\].*computed"),
        (lambda net: (net, 0), ValueError, "1 to 128 tasks, got 0"),
        (lambda net: (net, -1), ValueError, "1 to 128 tasks, got -1"),
        (lambda net: (net, 129), ValueError, "got 129"),
        (lambda net: (net, []), ValueError, "got 0"),
        (lambda net: (net, "abc"), TypeError, "got str"),
        (lambda net: (net, 2.0), TypeError, "got float"),
        (lambda net: (net, [1, 2]), TypeError, "names, got int"),
        (lambda net: (net, ["a", "a"]), ValueError, "different names"),
    ],
)
def test_refuses_bad_arguments(net, arguments, error, match):
    with pytest.raises(error, match=match):
        fastmtl.GradientBank(*arguments(net))


def test_refuses_bad_shared_process_groups_and_tasks(net, monkeypatch):
    with pytest.raises(ValueError, match=r"shared: parameter 'weight'.*not among params"):
        fastmtl.GradientBank(net, 3, shared=nn.Linear(1, 1))
    with pytest.raises(TypeError, match="process_group: expected a process group or None, got int"):
        fastmtl.GradientBank(net, 3, process_group=1)
    bank = fastmtl.GradientBank(net, ["a", "b"])
    for task, error in ((2, ValueError), (-1, ValueError), ("c", ValueError), (1.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="task"), bank.task(task):
            pass
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    with pytest.raises(RuntimeError, match="4 ranks"):
        fastmtl.GradientBank(net, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"method": "nash"}, ValueError, "nash"),
        ({"method": lambda gram: torch.ones(1)}, ValueError, r"3 weights.*\[1\]"),
        ({"loss_scale": -1.0}, ValueError, "loss_scale"),
    ],
)
def test_a_refused_apply_writes_nothing_and_keeps_the_rows(net, x, arguments, error, match):
    bank = fastmtl.GradientBank(net, 3)
    for t in range(3):
        with bank.task(t):
            net.loss(t, x).backward()
    with pytest.raises(error, match=match):
        bank.apply(**arguments)
    assert all(p.grad is None for p in net.parameters())
    assert repr(bank) == "GradientBank(10 parameters, 3 tasks, collected: ['0', '1', '2'])"
    bank.apply(PCGRAD)
    assert_update(net, expected(net, x))
    bank.clear()
    with pytest.raises(RuntimeError, match="no gradient"):
        bank.apply()


def test_gradient_that_the_caller_still_holds_is_not_overwritten() -> None:
    net = torch.nn.Linear(4, 3)
    bank = fastmtl.GradientBank(net, 3, shared=net)
    kept = []
    for t in range(3):
        with bank.task(t):
            net(torch.randn(5, 4))[:, t].mean().backward()
            kept.append((net.weight.grad, net.weight.grad.clone()))
    bank.apply()
    assert all(torch.equal(held, copy) for held, copy in kept)
