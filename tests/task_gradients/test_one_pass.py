"""`one_pass`: rows, against a backward pass per task in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases_one_pass import (
    IDS,
    MODELS,
    Case,
    Lambda,
    LowRank,
    N,
    T,
    assert_rows,
    cross_entropy,
    expected_rows,
    make,
    of,
    one_pass_bank,
)
from torch import Tensor, nn

import fastmtl

ORDER = torch.tensor([[0, 1, 2], [2, 1, 0], [1, 0, 2]])
pcgrad = fastmtl.methods.PCGrad(order=ORDER)


def _mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5)).double()


def _x() -> Tensor:
    return torch.randn(N, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def _grads(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def _by_backward(model: nn.Module, losses: list[Tensor], method: Any = pcgrad, **more: Any) -> list[Tensor]:
    for p in model.parameters():
        p.grad = None
    fastmtl.backward(losses, method=method, **more)
    return _grads(model)


@pytest.mark.parametrize("name", MODELS)
def test_rows_equal_a_backward_pass_per_task(name: str) -> None:
    case, model, x = make(name)
    state = copy.deepcopy(model.state_dict())
    rows = expected_rows(case, model, x)
    model.load_state_dict(state)
    bank = one_pass_bank(case, model, x)
    assert [id(p) for p in bank.params] == [id(p) for p in model.parameters()]
    assert_rows(bank, rows)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["conv, group norm", "encoder", "conv3d", "layer norm, rms norm", "lstm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_in_lower_precision(name: str, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and name == "lstm":
        pytest.skip("torch's own LSTM in bfloat16 strays by more than any tolerance here")
    case, model, x = make(name)
    model.eval()  # dropout draws by dtype
    rows = expected_rows(case, model, x)
    model.to(dtype)
    bank = one_pass_bank(case, model, x.to(dtype) if x.is_floating_point() else x)
    assert all(g is None or g.dtype == dtype for g in bank.row(0))
    assert_rows(bank, rows, 1e-5 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("name", MODELS)
def test_streamed_equals_banked(name: str) -> None:
    case, model, x = make(name)
    other = copy.deepcopy(model)
    one_pass_bank(case, model, x).apply(pcgrad)
    surgery = one_pass_bank(case, other, x, memory="stream").apply(pcgrad)
    assert surgery.gram.dtype == torch.float64
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        if p.grad is None:
            assert q.grad is None or not q.grad.any()
        else:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["mlp", "encoder", "lstm", "attention, crossed", "weight norm", "positions repeated", "spectrum"]
)
def test_check_passes(name: str) -> None:
    case, model, x = make(name)
    assert_rows(one_pass_bank(case, model, x, check=True), expected_rows(case, model, x))


def test_apply_equals_backward() -> None:
    model, x = _mlp(), _x()
    losses = cross_entropy(model(x)) / N
    want = _by_backward(model, [losses[of(t)].sum() for t in range(T)])
    before = [torch.ones_like(p) for p in model.parameters()]
    for p, g in zip(model.parameters(), before, strict=True):
        p.grad = g.clone()
    with fastmtl.one_pass(model, IDS, ["a", "b", "c"]) as bank:
        F.cross_entropy(model(x), torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])).backward()
        surgery = bank.apply(pcgrad)  # inside the block
    assert surgery.names == ("a", "b", "c") and surgery.present == (True, True, True)
    for p, g in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, g + 1)
    assert "weight/a" in surgery.log_dict() and surgery.conflicts().shape == (3, 3)
    with pytest.raises(RuntimeError, match="was applied, which empties it"):
        bank.apply()


def test_named_methods_and_callables() -> None:
    model, x = _mlp(), _x()
    for method in ("sum", "mean", lambda gram: torch.ones(gram.shape[0], dtype=gram.dtype) / 7):
        want = _by_backward(model, [cross_entropy(model(x))[of(t)].sum() for t in range(T)], method)
        for memory in ("bank", "stream"):
            model.zero_grad()
            with fastmtl.one_pass(model, IDS, T, memory=memory) as bank:
                cross_entropy(model(x)).sum().backward()
            bank.apply(method)
            for g, h in zip(_grads(model), want, strict=True):
                torch.testing.assert_close(g, h)


@pytest.mark.parametrize("memory", ["bank", "stream"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_samples_of_no_task_are_added_unprojected(memory: str, dtype: torch.dtype) -> None:
    model, x = _mlp(), _x()
    ids = torch.tensor([0, -1, 1, 1, 0, 2, -1, 0])
    losses = cross_entropy(model(x))
    tasks = _by_backward(model, [losses[ids == t].sum() for t in range(T)], retain_graph=True)
    free = torch.autograd.grad(losses[ids == -1].sum(), list(model.parameters()))
    model.zero_grad()
    with fastmtl.one_pass(model, ids.to(dtype), T, memory=memory) as bank:
        cross_entropy(model(x)).sum().backward()
    bank.apply(pcgrad)
    for got, a, b in zip(_grads(model), tasks, free, strict=True):
        torch.testing.assert_close(got, a + b)


@pytest.mark.parametrize("memory", ["bank", "stream"])
def test_only_samples_of_no_task(memory: str) -> None:
    model, x = _mlp(), _x()
    want = torch.autograd.grad(cross_entropy(model(x)).sum(), list(model.parameters()))
    with fastmtl.one_pass(model, torch.full((N,), -1), T, memory=memory) as bank:
        cross_entropy(model(x)).sum().backward()
    surgery = bank.apply(pcgrad)
    assert surgery.present == (False,) * T and not surgery.weights.any()
    for got, w in zip(_grads(model), want, strict=True):
        torch.testing.assert_close(got, w)


@pytest.mark.parametrize("memory", ["bank", "stream"])
def test_absent_tasks_are_left_out(memory: str) -> None:
    model, x = _mlp(), _x()
    ids = torch.tensor([0, 3, 0, 3, 3, 0, 0, 3])
    losses = cross_entropy(model(x))
    parts = [losses[ids == t].sum() if t in (0, 3) else None for t in range(4)]

    def half(gram: Tensor) -> Tensor:  # of the present tasks alone
        assert gram.shape == (2, 2)
        return torch.full((2,), 0.5, dtype=torch.float64)

    for method in (half, fastmtl.methods.PCGrad("mean"), "mean"):
        want = _by_backward(model, parts, method, retain_graph=True)
        model.zero_grad()
        with fastmtl.one_pass(model, ids, 4, memory=memory) as bank:
            cross_entropy(model(x)).sum().backward()
        surgery = bank.apply(method)
        assert surgery.present == (True, False, False, True)
        for g, h in zip(_grads(model), want, strict=True):
            torch.testing.assert_close(g, h)


def test_penalties_go_to_grad_and_not_into_the_rows() -> None:
    model, x = _mlp(), _x()
    bank_rows = None
    for scale in (0.0, 0.3):
        model.zero_grad()
        with fastmtl.one_pass(model, IDS, T) as bank:
            loss = cross_entropy(model(x)).mean()
            if scale:
                loss = loss + scale * sum(p.square().sum() for p in model.parameters())
            loss.backward()
        rows = [bank.row(t) for t in range(T)]
        if bank_rows is not None:
            for a, b in zip(rows, bank_rows, strict=True):
                for g, h in zip(a, b, strict=True):
                    torch.testing.assert_close(g, h)
            for p in model.parameters():
                torch.testing.assert_close(p.grad, 2 * scale * p.detach())
        bank_rows = rows


def test_a_penalty_of_its_own_backward() -> None:
    model, x = _mlp(), _x()
    with fastmtl.one_pass(model, IDS, T) as bank:
        cross_entropy(model(x)).mean().backward()
        (0.5 * model[0].weight.square().sum()).backward()
    torch.testing.assert_close(model[0].weight.grad, model[0].weight.detach())
    assert model[2].weight.grad is None and bank.row(0)[0] is not None


class _Heads(nn.Module):
    """A trunk and a head per task, each on the samples of its own task."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 7), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(7, 5) for _ in range(T)])

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        h = self.trunk(x)
        out = h.new_zeros(len(x), 5)
        for t, head in enumerate(self.heads):
            out[ids == t] = head(h[ids == t])
        return out


@pytest.mark.parametrize("how", ["shared", "marked", "iterable"])
def test_heads_outside_the_bank_keep_their_gradient(how: str) -> None:
    torch.manual_seed(0)
    model, x = _Heads().double(), _x()
    losses = cross_entropy(model(x, IDS))
    want = _by_backward(model, [losses[of(t)].sum() for t in range(T)], shared=model.trunk)
    model.zero_grad()
    if how == "marked":
        fastmtl.mark_per_task(model.heads)
    with fastmtl.one_pass(
        model.trunk.parameters() if how == "iterable" else model,
        IDS,
        T,
        shared=model.trunk if how == "shared" else None,
    ) as bank:
        cross_entropy(model(x, IDS)).sum().backward()
    assert len(bank.params) == 2
    bank.apply(pcgrad)
    for g, h in zip(_grads(model), want, strict=True):
        torch.testing.assert_close(g, h)


def test_heads_in_a_list_of_losses() -> None:
    torch.manual_seed(0)
    model, x = _Heads().double(), _x()
    want = _by_backward(model, [cross_entropy(model(x, IDS))[of(t)].sum() for t in range(T)], shared=model.trunk)
    model.zero_grad()
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    with fastmtl.one_pass(model, IDS, T, shared=model.trunk) as bank:
        h = model.trunk(x)
        losses = []
        for t, head in enumerate(model.heads):
            here = of(t)
            losses.append(F.cross_entropy(head(h[here]), labels[here], reduction="sum"))
        sum(losses).backward()
    bank.apply(pcgrad)
    for g, w in zip(_grads(model), want, strict=True):
        torch.testing.assert_close(g, w)


def test_a_head_in_the_bank_is_refused() -> None:
    model, x = _Heads().double(), _x()
    alone = r"'heads.0.weight'.*task '0' alone.*shared="
    with pytest.raises(ValueError, match=alone), fastmtl.one_pass(model, IDS, T):
        cross_entropy(model(x, IDS)).sum().backward()


def test_accumulation_adds_rows() -> None:
    model = _mlp()
    batches = [(_x() * k, IDS.roll(k)) for k in (1, 2)]
    ids = [torch.where(b == 2, 0, b) for _, b in batches]  # task 2 only in the second one
    ids[1] = batches[1][1]
    rows = [
        [sum(cross_entropy(model(x))[i == t].sum() for (x, _), i in zip(batches, ids, strict=True)) for t in range(T)]
    ][0]
    want = _by_backward(model, rows)
    model.zero_grad()
    bank = None
    for (x, _), i in zip(batches, ids, strict=True):
        with fastmtl.one_pass(model, i, T, bank=bank) as bank:
            cross_entropy(model(x)).sum().backward()
    surgery = bank.apply(pcgrad)
    assert surgery.present == (True,) * T
    for g, h in zip(_grads(model), want, strict=True):
        torch.testing.assert_close(g, h)


def test_rows_of_weights_that_have_changed_are_not_added_up() -> None:
    model, x = _mlp(), _x()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with fastmtl.one_pass(model, IDS, T) as bank:
        cross_entropy(model(x)).sum().backward()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"bank: parameter '0\.weight' .*was changed since the block that filled it"):
        fastmtl.one_pass(model, IDS, T, bank=bank)
    bank.clear()
    with fastmtl.one_pass(model, IDS, T, bank=bank):
        cross_entropy(model(x)).sum().backward()
    bank.apply(pcgrad)
    optimizer.step()
    # an applied bank is an empty one
    with fastmtl.one_pass(model, IDS, T, bank=bank):
        cross_entropy(model(x)).sum().backward()


def test_frozen_parameters_and_inputs_with_gradients() -> None:
    model, x = _mlp(), _x().requires_grad_()
    model[0].weight.requires_grad_(False)
    want = torch.autograd.grad(cross_entropy(model(x)).sum(), [x, model[2].weight])
    with fastmtl.one_pass(model, IDS, T) as bank:
        cross_entropy(model(x)).sum().backward()
    assert len(bank.params) == 3
    torch.testing.assert_close(x.grad, want[0])
    torch.testing.assert_close(sum(bank.row(t)[1] for t in range(T)), want[1])


def test_two_models_that_share_parameters() -> None:
    model, x = _mlp(), _x()
    other = nn.Sequential(model[0], nn.Sigmoid(), nn.Linear(7, 5).double())
    losses = cross_entropy(model(x)) + cross_entropy(other(x))
    params = list(model.parameters())
    want = [torch.autograd.grad(losses[of(t)].sum(), params, retain_graph=True) for t in range(T)]
    with fastmtl.one_pass(model, IDS, T) as bank:
        (cross_entropy(model(x)) + cross_entropy(other(x))).sum().backward()
    assert_rows(bank, [list(row) for row in want])
    assert other[2].weight.grad is not None


def test_two_losses_and_tied_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()
    model[2].weight = model[0].weight
    x = _x()

    def losses() -> Tensor:
        out = model(x)
        return cross_entropy(out[:, :5]) + (out - x).square().mean(1)

    params = list(model.parameters())
    want = [torch.autograd.grad(losses()[of(t)].sum(), params) for t in range(T)]
    with fastmtl.one_pass(model, IDS, T) as bank:
        losses().sum().backward()
    assert_rows(bank, [list(row) for row in want])


@pytest.mark.parametrize("memory", ["bank", "stream"])
@pytest.mark.parametrize("per_task_bias", [False, True])
def test_task_layers(per_task_bias: bool, memory: str) -> None:
    """Weights that all tasks share are in the bank; deltas, gates and biases of tasks are not."""
    torch.manual_seed(0)
    model = nn.Sequential(
        fastmtl.nn.TaskConv2d(3, 4, 3, T, padding=1, gate=0.5, per_task_bias=per_task_bias),
        nn.GroupNorm(2, 4),
        nn.Flatten(2),
        fastmtl.nn.TaskLinear(16, 5, T, per_task_bias=per_task_bias),
        nn.Flatten(),
        nn.Linear(20, 5),
    ).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
    x = torch.randn(N, 3, 4, 4, dtype=torch.float64)
    with fastmtl.nn.tasks(IDS):
        losses = cross_entropy(model(x))
    want = _by_backward(model, [losses[of(t)].sum() for t in range(T)])
    model.zero_grad()
    with fastmtl.nn.tasks(IDS), fastmtl.one_pass(model, IDS, T, memory=memory) as bank:
        cross_entropy(model(x)).sum().backward()
    assert len(bank.params) == 8
    bank.apply(pcgrad)
    for g, h in zip(_grads(model), want, strict=True):
        torch.testing.assert_close(g, h)


@pytest.mark.parametrize("memory", ["bank", "stream"])
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("bias", ["shared", "per_task", "derived"])
def test_low_rank_deltas(bias: str, stacked: bool, memory: str) -> None:
    """W and a bias that all tasks share are in the bank; A, B, scalings and biases of tasks are not."""
    torch.manual_seed(0)
    model = nn.Sequential(LowRank(bias, stacked), nn.Tanh(), nn.Flatten(), nn.Linear(20, 5)).double()
    x = torch.randn(N, 4, 6, dtype=torch.float64)
    losses = cross_entropy(model(x))
    want = _by_backward(model, [losses[of(t)].sum() for t in range(T)])
    model.zero_grad()
    with fastmtl.one_pass(model, IDS, T, memory=memory) as bank:
        cross_entropy(model(x)).sum().backward()
    in_bank = {id(p) for p in bank.params}
    held = {n for n, p in model[0].named_parameters() if id(p) in in_bank}
    assert held == ({"weight"} if bias == "per_task" else {"weight", "bias"})
    bank.apply(pcgrad)
    for g, h in zip(_grads(model), want, strict=True):
        torch.testing.assert_close(g, h)


class SharedAffine(nn.Module):
    """Statistics by task, and a scale and a shift that all tasks share."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, dtype=dtype))
        self.bias = nn.Parameter(torch.randn(4, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        plan = fastmtl.ops.task_plan(IDS, T)
        return fastmtl.ops.task_batch_norm(x, plan, self.weight, self.bias, training=True)


def _normed(norm: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 4, 2), norm, nn.Flatten(), nn.Linear(16, 5)
    ).double()


@pytest.mark.parametrize("memory", ["bank", "stream"])
@pytest.mark.parametrize("kind", ["training", "eval", "shared"])
def test_batch_norm_by_task(kind: str, memory: str) -> None:
    """Statistics by task keep tasks apart; weights and biases of tasks stay out of the bank, shared ones are in it."""
    torch.manual_seed(0)
    norm = SharedAffine() if kind == "shared" else fastmtl.nn.TaskBatchNorm2d(4, T)
    model = _normed(norm)
    with torch.no_grad():
        for p in norm.parameters():
            p.copy_(torch.randn_like(p))
    x = torch.randn(N, 3, 5, 5, dtype=torch.float64)
    model.train(kind != "eval")
    before = {name: b.clone() for name, b in model.named_buffers()}
    with fastmtl.nn.tasks(IDS):
        losses = cross_entropy(model(x))
    after = {name: b.clone() for name, b in model.named_buffers()}
    want = _by_backward(model, [losses[of(t)].sum() for t in range(T)])
    model.zero_grad()
    for name, b in model.named_buffers():
        b.copy_(before[name])
    with fastmtl.nn.tasks(IDS), fastmtl.one_pass(model, IDS, T, memory=memory) as bank:
        cross_entropy(model(x)).sum().backward()
    assert len(bank.params) == (8 if kind == "shared" else 6)
    assert all(torch.equal(b, after[name]) for name, b in model.named_buffers())
    bank.apply(pcgrad)
    for g, h in zip(_grads(model), want, strict=True):
        torch.testing.assert_close(g, h)


def test_low_rank_factors_in_the_bank_are_refused() -> None:
    model, x = LowRank().double(), _x()
    model.A[1] = nn.Parameter(model.A[1].detach().clone())
    with (
        pytest.raises(ValueError, match=r"task_lora.*what belongs to single tasks is in the bank"),
        fastmtl.one_pass(model, IDS, T),
    ):
        cross_entropy(model(x)).sum().backward()


def test_batch_norm_by_other_tasks_is_refused() -> None:
    torch.manual_seed(0)
    model = _normed(fastmtl.nn.TaskBatchNorm2d(4, T))
    x = torch.randn(N, 3, 5, 5, dtype=torch.float64)

    def step(ids: Tensor, **options: Any) -> fastmtl.OnePassBank:
        with fastmtl.nn.tasks(ids), fastmtl.one_pass(model, IDS, T, **options) as bank:
            cross_entropy(model(x)).sum().backward()
        return bank

    mixed = IDS.roll(1)
    with pytest.raises(ValueError, match="batch norm by task takes its statistics over samples of several tasks"):
        step(mixed)
    step(mixed, mixing="partition")
    # the names of the tasks may be others, as long as no statistics are of two
    step((IDS + 1) % T)
    # given statistics are of no sample
    model.eval()
    step(mixed)


def test_partition_accepts_batch_statistics() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Linear(7, 5)).double()
    x = _x()
    whole = torch.autograd.grad(cross_entropy(model(x)).sum(), list(model.parameters()))
    with fastmtl.one_pass(model, IDS, T, mixing="partition") as bank:
        cross_entropy(model(x)).sum().backward()
    total = [sum(bank.row(t)[k] for t in range(T)) for k in range(len(whole))]
    for a, b in zip(total, whole, strict=True):
        torch.testing.assert_close(a, b)  # the parts sum up to the batch's gradient
    surgery = bank.apply(pcgrad)
    with pytest.raises(RuntimeError, match="partition"):
        surgery.cosines()
    with pytest.raises(RuntimeError, match="partition"):
        surgery.conflicts()
    assert set(surgery.log_dict()) == {"grad_norm", *(f"{k}/{t}" for k in ("weight", "norm") for t in range(T))}


def test_partition_accepts_a_loss_over_pairs() -> None:
    model, x = _mlp(), _x()
    whole = torch.autograd.grad(torch.cdist(model(x), model(x)).square().mean(), list(model.parameters()))
    with fastmtl.one_pass(model, IDS, T, mixing="partition") as bank:
        out = model(x)
        bank.summed((out.square().sum(1).mean() - out.mean(0).square().sum()) * 2).backward()
    total = [sum(bank.row(t)[k] for t in range(T)) for k in range(len(whole))]
    for a, b in zip(total, whole, strict=True):
        torch.testing.assert_close(a, b)


def test_verify_finds_samples_that_meet() -> None:
    model, x = _mlp(), _x()
    with fastmtl.one_pass(model, IDS, T) as bank:
        losses = cross_entropy(model(x))
        bank.verify(losses[of(1)].mean(), 1)
        bank.verify(losses[of(1)].mean())
        with pytest.raises(RuntimeError, match="task '0' has a gradient in the row of task '2'"):
            bank.verify(losses[~of(1)].mean())
        with pytest.raises(RuntimeError, match="of task '2' has a gradient in the row of task '1'"):
            bank.verify(losses[of(1)].mean(), 2)
        losses.mean().backward()
    assert all(p.grad is None for p in model.parameters())
    assert bank.row(1)[0] is not None
    hidden = nn.Parameter(torch.randn(6, 6, dtype=torch.float64))
    with fastmtl.one_pass([*model.parameters(), hidden], IDS, T) as bank:
        h = x @ hidden
        mixed = bank.samples(_Mix.apply(h), 0)
        with pytest.raises(RuntimeError, match="meet in the model"):
            bank.verify(cross_entropy(model(mixed))[of(1)].sum(), 1)


class _Mix(torch.autograd.Function):
    """What calls can't be seen in: every sample gets something of the next one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x + x.roll(1, 0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g + g.roll(-1, 0)


def test_check_finds_wrong_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastmtl.task_gradients.one_pass.autograd import linear

    right = linear.linear_rows
    monkeypatch.setattr(linear, "deliver_linear_rows", lambda receiver, *a: (right(*a[:-1]).roll(1, 0), None))
    x = _x()
    model = _mlp()
    wrong = r"row 0 of parameter '0.weight'.*differs from a backward pass"
    with pytest.raises(RuntimeError, match=wrong), fastmtl.one_pass(model, IDS, T, check=True):
        cross_entropy(model(x)).sum().backward()


def test_samples_and_constants_named_by_hand() -> None:
    torch.manual_seed(0)
    model = nn.Linear(N, 5).double()
    x = torch.randn(6, N, N, dtype=torch.float64)  # [.., sample, feature]
    table = torch.randn(N, N, dtype=torch.float64)  # as many positions as samples, and no samples
    with fastmtl.one_pass(model, IDS, T) as bank:
        bank.samples(x, 1)
        out = model(x + bank.constant(table).sum(0))
        cross_entropy(out.mean(0)).sum().backward()
    want = [
        torch.autograd.grad(cross_entropy(model(x + table.sum(0)).mean(0))[of(t)].sum(), list(model.parameters()))
        for t in range(T)
    ]
    assert_rows(bank, [list(r) for r in want])


def test_a_whole_step_inside_the_block() -> None:
    model, x = _mlp(), _x()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    with fastmtl.one_pass(model, IDS, T) as bank:
        optimizer.zero_grad()
        out = model(x)
        accuracy = (out.argmax(1) == torch.arange(N) % 5).double().mean().item()
        assert 0 <= accuracy <= 1 and repr(out)
        cross_entropy(out).sum().backward()
        bank.apply("pcgrad")
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model(torch.randn(3, 6, dtype=torch.float64))
    for p, old in zip(model.parameters(), before, strict=True):
        assert not torch.equal(p, old)
        assert not hasattr(p, "_fastmtl_tag")


def test_the_model_and_the_inputs_are_left_as_they_were() -> None:
    model, x, ids = _mlp(), _x(), IDS.clone()
    names = set(vars(model[0]))
    with fastmtl.one_pass(model, ids, T) as bank:
        cross_entropy(model(x)).sum().backward()
    bank.apply()
    assert set(vars(model[0])) == names and not vars(ids)
    loss = cross_entropy(model(x)).sum()  # outside the block all is plain torch
    assert type(loss.grad_fn).__name__ == "SumBackward0"
    loss.backward()


@pytest.mark.parametrize("num", [1, 2, 50, 128])
def test_numbers_of_tasks(num: int) -> None:
    model, x = _mlp(), torch.randn(131, 6, dtype=torch.float64)
    ids = torch.randint(0, num, (131,))
    labels = torch.randint(0, 5, (131,))
    with fastmtl.one_pass(model, ids, num) as bank:
        F.cross_entropy(model(x), labels, reduction="sum").backward()
    losses = F.cross_entropy(model(x), labels, reduction="none")
    for t in {0, num // 2, num - 1}:
        want = torch.autograd.grad(losses[ids == t].sum(), list(model.parameters()), retain_graph=True)
        for g, h in zip(bank.row(t), want, strict=True):
            torch.testing.assert_close(torch.zeros_like(h) if g is None else g, h)
    bank.apply("pcgrad")


def test_one_sample() -> None:
    model, x = _mlp(), _x()[:1]
    want = torch.autograd.grad(cross_entropy(model(x)).sum(), list(model.parameters()))
    with fastmtl.one_pass(model, torch.tensor([1]), T) as bank:
        cross_entropy(model(x)).sum().backward()
    for g, h in zip(bank.row(1), want, strict=True):
        torch.testing.assert_close(g, h)


def test_hooks_of_parameters() -> None:
    model, x = _mlp(), _x()
    ran: list[str] = []
    model[0].weight.register_hook(lambda g: ran.append("gradient"))
    model[0].weight.register_post_accumulate_grad_hook(lambda p: ran.append("accumulated"))
    with fastmtl.one_pass(model, IDS, T) as bank:
        cross_entropy(model(x)).sum().backward()
    assert ran == []
    bank.apply()
    assert ran == ["accumulated"]


@pytest.mark.parametrize("arguments", [{}, {"memory": "stream"}, {"check": True}], ids=str)
def test_random_numbers_drawn_on_parameters(arguments: dict[str, Any]) -> None:
    """Each row is that of the masks that were drawn, and the generator stands where it would without `one_pass`."""
    torch.manual_seed(0)
    net, x = nn.Linear(6, 5).double(), _x()

    def loss() -> Tensor:
        torch.manual_seed(2)
        noisy = net.weight * torch.bernoulli(net.weight.detach().sigmoid()) + torch.rand_like(net.weight)
        w = F.dropout(noisy, 0.4) + F.gumbel_softmax(net.weight, dim=1)
        latent = net.weight.view(1, 1, 5, 6)
        w = w + F.scaled_dot_product_attention(latent, latent, latent, dropout_p=0.4).view(5, 6)
        return cross_entropy(F.linear(x, w, net.bias))

    losses = loss()
    after = torch.rand(1)
    with fastmtl.one_pass(net, IDS, T, **arguments) as bank:
        loss().sum().backward()
        assert torch.equal(torch.rand(1), after)
    if "memory" in arguments:
        bank.apply("sum")
        want = torch.autograd.grad(losses.sum(), list(net.parameters()))
        torch.testing.assert_close(_grads(net), list(want))
        return
    rows = [torch.autograd.grad(losses[of(t)].sum(), list(net.parameters()), retain_graph=True) for t in range(T)]
    assert_rows(bank, [list(row) for row in rows])


def test_parameters_written_in_place() -> None:
    """What was made before a value is written into is that of the value before, and what is made after, after."""
    torch.manual_seed(0)
    net, x = nn.Linear(6, 5).double(), _x()

    def losses() -> Tensor:
        w = net.weight * 1
        before = w * 2
        w.mul_(3).add_(net.bias[:, None])
        w[1] = 0.5
        F.relu(w, inplace=True)
        padded = torch.zeros(5, 8, dtype=torch.float64)
        padded[:, 1:7] = net.weight
        spread = torch.zeros(5, 6, dtype=torch.float64)
        spread.index_add_(0, torch.tensor([4, 0]), net.weight[:2])
        return cross_entropy(F.linear(x, before + w + padded[:, 2:] + spread, net.bias))

    want = losses()
    rows = [torch.autograd.grad(want[of(t)].sum(), list(net.parameters()), retain_graph=True) for t in range(T)]
    with fastmtl.one_pass(net, IDS, T) as bank:
        losses().sum().backward()
    assert_rows(bank, [list(row) for row in rows])


@pytest.mark.parametrize("shape", [(N, 6), (N, 3, 6), (N, 2, 3, 6)])
def test_results_of_linear_layers_written_in_place(shape: tuple[int, ...]) -> None:
    net = _mlp()
    x = torch.randn(shape, dtype=torch.float64)

    def losses() -> Tensor:
        h = net[0](x)
        h /= 3
        return net[2](F.relu(h, inplace=True)).flatten(1).mul_(2).square().sum(1)

    want = losses()
    rows = [torch.autograd.grad(want[of(t)].sum(), list(net.parameters()), retain_graph=True) for t in range(T)]
    with fastmtl.one_pass(net, IDS, T) as bank:
        losses().sum().backward()
    assert_rows(bank, [list(row) for row in rows])


def test_complex_parameters_are_pairs_of_real_ones() -> None:
    """In every way of collecting task gradients, and with whatever stands in `.grad` before."""
    torch.manual_seed(0)
    model, x = MODELS["spectrum"].model().double(), _x()
    real = nn.Parameter(torch.view_as_real(model.weight.detach()).clone())

    def losses(weight: Tensor | None = None) -> list[Tensor]:
        replaced = {} if weight is None else {"weight": weight}
        each = cross_entropy(torch.func.functional_call(model, replaced, (x,)))
        return [each[of(t)].sum() for t in range(T)]

    params = [model.first.weight, real]
    for p in params:
        p.grad = torch.ones_like(p)
    surgery = fastmtl.backward(losses(torch.view_as_complex(real)), params, method=pcgrad, shared=params)
    assert (surgery.gram - surgery.gram.diag().diag()).min() < 0  # there is something to decide
    want = [p.grad for p in params]

    def by_bank() -> None:
        bank = fastmtl.GradientBank(model, T, shared=shared)
        for t in range(T):
            with bank.task(t):
                losses()[t].backward()
        bank.apply(pcgrad)

    def by_one_pass(**more: Any) -> None:
        with fastmtl.one_pass(model, IDS, T, shared=shared, **more) as bank:
            sum(losses()).backward()  # type: ignore[union-attr]
        bank.apply(pcgrad)

    shared = [model.first.weight, model.weight]
    for collect in (
        lambda: fastmtl.backward(losses(), method=pcgrad, shared=shared),
        by_bank,
        by_one_pass,
        lambda: by_one_pass(memory="stream"),
        lambda: by_one_pass(check=True),
    ):
        model.first.weight.grad = torch.ones_like(model.first.weight)
        model.weight.grad = torch.complex(torch.ones(5), torch.ones(5)).to(torch.complex128)
        collect()
        assert model.weight.grad.dtype == torch.complex128
        torch.testing.assert_close(model.first.weight.grad, want[0])
        torch.testing.assert_close(torch.view_as_real(model.weight.grad), want[1])
    # outside the Gram matrix it has its ordinary gradient
    model.weight.grad = None
    fastmtl.backward(losses(), method=pcgrad, shared=model.first)
    torch.testing.assert_close(model.weight.grad, torch.autograd.grad(sum(losses()), model.weight)[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [fastmtl.methods.Every("sum", 2), "graddrop", "mean", "cagrad"], ids=str)
def test_methods_on_complex_parameters(method: Any) -> None:
    torch.manual_seed(0)
    model, x = MODELS["spectrum"].model().double(), _x()
    for _ in range(2):
        model.zero_grad()
        each = cross_entropy(model(x))
        fastmtl.backward([each[of(t)].sum() for t in range(T)], method=method)
        assert model.weight.grad.dtype == torch.complex128 and bool(model.weight.grad.abs().sum() > 0)
    if not isinstance(method, str):
        torch.testing.assert_close(
            model.weight.grad, torch.autograd.grad(cross_entropy(model(x)).sum(), model.weight)[0]
        )


def _filled_by_halves(x: Tensor) -> Tensor:
    out = x.new_empty(N, 6)
    out[:, :4].copy_(x)
    out[:, 4:].copy_(x[:, :2] * 2)
    return out


def _filled_transposed(x: Tensor) -> Tensor:
    out = x.new_zeros(4, N)
    out.T.copy_(x)
    return out.T


def _filled_in_one_place(x: Tensor) -> Tensor:
    out = x.new_zeros(N, N, 4)
    out[1].copy_(x)
    return out.transpose(0, 1)


def _filled_with_nothing(x: Tensor) -> Tensor:
    out = x.new_empty(N, 4)
    out[:, :4].copy_(x)
    out[:, 4:].copy_(x[:, :0].reshape(N, 1, 0).expand(-1, 2, -1)[:, 1])
    return out


def _samples_scaled(x: Tensor) -> Tensor:
    out = x * 1.0
    out[:3].mul_(2)
    out[4].zero_()
    out.diagonal().add_(1)
    out[0].contiguous()
    return out


def _filled_in_two_orders(x: Tensor) -> Tensor:
    out = x.new_zeros(N, N, 4)
    out[2].copy_(x)
    out[:, 1].copy_(x)
    return out


def _filled_with_others(x: Tensor) -> Tensor:
    out = x.new_zeros(N, 4)
    out[1:].copy_(x[:-1])
    return out


def _one_value_cleared(x: Tensor) -> Tensor:
    out = x.sum(1)
    out.select(0, 1).zero_()
    return out[:, None]


@pytest.mark.parametrize("memory", ["bank", "stream"])
@pytest.mark.parametrize(
    "write",
    [_filled_by_halves, _filled_transposed, _filled_in_one_place, _filled_with_nothing, _samples_scaled],
)
def test_written_into_views(write: Callable[[Tensor], Tensor], memory: str) -> None:
    weight, x = nn.Parameter(torch.randn(4, dtype=torch.float64)), torch.randn(N, 4, dtype=torch.float64)
    with fastmtl.one_pass([weight], IDS, T, memory=memory) as bank:
        write(x * weight).square().sum().backward()
    copies = weight.detach().expand(T, 4).clone().requires_grad_()
    write(x * copies[IDS]).square().sum().backward()
    if memory == "bank":
        torch.testing.assert_close(torch.stack([bank.row(t)[0] for t in range(T)]), copies.grad)
    bank.apply("sum")
    torch.testing.assert_close(weight.grad, copies.grad.sum(0))


@pytest.mark.parametrize("write", [_filled_in_two_orders, _filled_with_others])
def test_written_into_views_so_that_samples_lie_otherwise(write: Callable[[Tensor], Tensor]) -> None:
    weight, x = nn.Parameter(torch.randn(4, dtype=torch.float64)), torch.randn(N, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="wrote into a view"), fastmtl.one_pass([weight], IDS, T):
        write(x * weight).square().sum().backward()


def test_a_stream_and_a_write_into_one_value() -> None:
    weight, x = nn.Parameter(torch.randn(4, dtype=torch.float64)), torch.randn(N, 4, dtype=torch.float64)
    told = pytest.raises(ValueError, match="zero writes into a view of a single sample's value")
    with told, fastmtl.one_pass([weight], IDS, T, memory="stream"):
        _one_value_cleared(x * weight).square().sum().backward()


@pytest.mark.parametrize("n", [1, 2])
def test_batch_norm_in_evaluation_in_any_memory_order(n: int) -> None:
    """torch's own backward pass on the CPU takes some pairs of memory orders for the same."""
    norm, weight = nn.BatchNorm2d(2).double().eval(), nn.Parameter(torch.randn(2, 1, 4, dtype=torch.float64))
    x, order = torch.randn(n, 2, 1, 4, dtype=torch.float64), torch.randn(4, n, 2, 1, dtype=torch.float64)

    def losses(p: Tensor) -> Tensor:
        return (norm(x * p) * order.permute(1, 2, 3, 0)).sum((1, 2, 3))

    with fastmtl.one_pass([weight, *norm.parameters()], IDS[:n], T) as bank:
        losses(weight).sum().backward()
    scale = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
    want = x * order.permute(1, 2, 3, 0) * scale[:, None, None]
    for t in range(T):
        row = bank.row(t)[0]
        torch.testing.assert_close(torch.zeros_like(weight) if row is None else row, want[IDS[:n] == t].sum(0))


def _patches_merged_and_back(x: Tensor) -> Tensor:
    """As some networks of pictures take patches for samples: `[N, C, 4, 4]`."""
    n, c = x.shape[:2]
    tokens = x.reshape(n * c * 2, 2, 2, 2).transpose(1, 2).reshape(n, c, 4, 4).transpose(1, 2).reshape(n, 4, 4, c)
    out = tokens.new_zeros(4, n, 4, c)
    out[:, :, 1:] = tokens.transpose(0, 1)[:, :, 1:]
    return torch.cumsum(out.permute(1, 3, 0, 2).reshape(-1, c, 2, 8), 1)


@pytest.mark.parametrize("memory", ["bank", "stream"])
def test_a_batch_of_one_sample(memory: str) -> None:
    """Whatever is done to it, all is its own."""
    model = nn.Sequential(
        nn.Conv2d(2, 3, 1), Lambda(_patches_merged_and_back), nn.Conv2d(3, 2, 1), Lambda(torch.linalg.svdvals)
    ).double()
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    want = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    with fastmtl.one_pass(model, IDS[1:2], T, memory=memory) as bank:
        model(x).square().sum().backward()
    if memory == "bank":
        torch.testing.assert_close(bank.row(2), list(want))
    bank.apply("sum")
    torch.testing.assert_close(_grads(model), list(want))


def _in_one_line(x: Tensor) -> Tensor:
    """Each element depends on all before it: `[1, 6, 16]`."""
    return torch.cumsum(x.flatten(), 0).reshape(1, 6, 16)


@pytest.mark.parametrize("memory", ["bank", "stream"])
def test_all_samples_of_one_task(memory: str) -> None:
    """They may be mixed as one likes before they meet a parameter again, along any axis."""
    model = nn.Sequential(
        nn.Conv2d(2, 3, 1), Lambda(_in_one_line), nn.Conv1d(6, 4, 2), nn.Linear(15, 3), nn.LayerNorm([4, 3]),
        Lambda(torch.squeeze), nn.Linear(3, 2),
    ).double()  # fmt: skip
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    want = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    with fastmtl.one_pass(model, torch.tensor([2, 2]), T, memory=memory) as bank:
        model(x).square().sum().backward()
    if memory == "bank":
        torch.testing.assert_close(bank.row(2), list(want))
    bank.apply("sum")
    torch.testing.assert_close(_grads(model), list(want))


class _Expert(nn.Module):
    """A layer on those rows of `[n, 6]` that are sent to it: here none."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(6, 6), layer

    def forward(self, x: Tensor) -> Tensor:
        out = self.first(x)
        sent = torch.nonzero(out[:, 0] > 1e9)[:, 0]
        return out.index_add(0, sent, self.layer(out[sent]))


_OF_NONE = {
    "linear": lambda: nn.Linear(6, 6),
    "conv": lambda: nn.Sequential(nn.Unflatten(1, (6, 1)), nn.Conv1d(6, 6, 1), nn.Flatten()),
    "layer norm": lambda: nn.LayerNorm(6),
    "group norm": lambda: nn.GroupNorm(2, 6),
    "table": lambda: nn.Sequential(Lambda(lambda x: x[:, 0].long()), nn.Embedding(5, 6)),
}


@pytest.mark.parametrize("name", _OF_NONE)
def test_a_layer_on_no_samples(name: str) -> None:
    case = Case(lambda: _Expert(_OF_NONE[name]()).double(), _x)
    model, x = case.model(), _x()
    want = expected_rows(case, model, x)
    assert_rows(one_pass_bank(case, model, x), want)


class _Stacked(nn.Module):
    """A matrix for each word."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nwi,wij->nwj", x, self.weight)


@pytest.mark.parametrize("memory", ["bank", "stream"])
@pytest.mark.parametrize("layer", [nn.Linear, _Stacked], ids=["linear", "stacked"])
def test_the_result_of_a_layer_is_written_into(layer: Callable[..., nn.Module], memory: str) -> None:
    made = layer(6, 6) if layer is nn.Linear else layer()
    model = nn.Sequential(made, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(24, 2)).double()
    x = torch.randn(N, 4, 6, dtype=torch.float64)
    losses = model(x).square().sum(1)
    want = [torch.autograd.grad(losses[of(t)].sum(), list(model.parameters()), retain_graph=True) for t in range(T)]
    with fastmtl.one_pass(model, IDS, T, memory=memory) as bank:
        model(x).square().sum().backward()
    if memory == "bank":
        assert_rows(bank, [list(row) for row in want])
    bank.apply("sum")
    torch.testing.assert_close(_grads(model), [sum(each) for each in zip(*want, strict=True)])


def test_parameters_copied_for_every_sample_and_joined() -> None:
    table = nn.Parameter(torch.randn(2, 3, dtype=torch.float64))
    x = torch.randn(N, 3, dtype=torch.float64)

    def losses(p: Tensor) -> Tensor:
        first, second = p[0].expand(N, 3), p[1].repeat(N, 1)
        wide = torch.cat([first, second], 1) * x.repeat(1, 2)
        return wide.square().sum(1) + (torch.stack([first, second], 1) * x[:, None]).sin().sum((1, 2))

    with fastmtl.one_pass([table], IDS, T) as bank:
        losses(table).sum().backward()
    each = losses(table)
    for t in range(T):
        torch.testing.assert_close(bank.row(t)[0], torch.autograd.grad(each[of(t)].sum(), table, retain_graph=True)[0])


def test_no_experiments_inside_vmap() -> None:
    """As models make their masks; its tensors show no values."""
    weight, x = nn.Parameter(torch.randn(4, dtype=torch.float64)), torch.randn(N, 4, dtype=torch.float64)
    with fastmtl.one_pass([weight], IDS, T) as bank:
        mask = torch.func.vmap(lambda row: row.roll(1))(torch.ones(5, N))[0, :4]
        (x * weight * mask).square().sum().backward()
    for t in range(T):
        torch.testing.assert_close(bank.row(t)[0], 2 * weight.detach() * x[of(t)].square().sum(0))
