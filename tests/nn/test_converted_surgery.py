"""Converted networks and gradient surgery: `backward`, `GradientBank` and `one_pass`, against a pass per task."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import task_models
import torch
from task_models import NAMES, move
from torch import Tensor, nn

import fastmtl
from fastmtl.nn import (
    TapsGate,
    TaskBatchNorm2d,
    TaskEmbedding,
    TaskHeads,
    TaskModule,
    TaskMultiheadAttention,
    TaskParameters,
    TaskScaleShift,
    convert,
    tasks,
)
from fastmtl.ops import task_batch_norm
from fastmtl.ops.gradients import reference
from fastmtl.parameters import is_per_task

IDS = torch.tensor([2, 0, 1, 0, 1, 2, 2, 0])
# "clipart" has no sample
TWO = torch.tensor([1, 0, 1, 0, 1, 0, 0, 0])
ORDER = torch.tensor([[2, 1, 0], [0, 2, 1], [1, 0, 2]])
PCGRAD = fastmtl.methods.PCGrad(order=ORDER)
# a convolutional network with batch norm, torch's own transformer, one of `transformers`
MODELS = ("resnet", "encoder", "gpt2")
KINDS: dict[str, dict[str, Any]] = {
    "taps": {"joint": True},
    "dense": {"per_task_bias": True},
    "lora": {"joint": True, "rank": 2, "gate": 0.5},
    "patch": {"joint": True},
    "separate": {"where": "bottom:1"},
    "modulator": {"joint": True},
    "hypergrid": {},
}
# of kinds that refuse torch's fused attention
LAYERS = (nn.Conv2d, nn.Linear)
# whose batch norms are all by task, so that training mixes samples of one task alone
BATCH_NORM_BY_TASK = ("taps", "patch", "modulator")


class Trial(NamedTuple):
    """A converted network, a batch that mixes tasks, and what a pass for each task gives."""

    model: nn.Module
    inputs: dict[str, Tensor]
    target: Tensor
    ids: Tensor
    rows: dict[str, list[Tensor]]  # of each shared parameter, by task
    own: dict[str, Tensor | None]  # of each parameter of a task

    def losses(self, model: nn.Module, some: Tensor) -> Tensor:
        """A loss for each of some samples."""
        y = model(**{name: x[some] for name, x in self.inputs.items()})
        y = y if isinstance(y, Tensor) else y.logits
        return (y - self.target[some].view(-1, *(1,) * (y.dim() - 1))).square().flatten(1).mean(1)

    def of(self, t: int) -> Tensor:
        return torch.nonzero(self.ids == t).flatten()

    def all(self) -> Tensor:
        return torch.arange(len(self.ids))

    def present(self) -> list[int]:
        return [t for t in range(len(NAMES)) if len(self.of(t))]

    def bank(self) -> Tensor:
        """`[T, P]` gradients of the shared parameters."""
        return torch.stack([torch.cat([row[t].flatten() for row in self.rows.values()]) for t in range(len(NAMES))])


@functools.lru_cache(maxsize=2)
def trial(name: str, kind: str, absent: bool = False) -> Trial:
    case = task_models.make(name)
    options = dict(KINDS[kind])
    if name == "encoder" and kind in ("modulator", "hypergrid"):
        options["where"] = LAYERS
    model = convert(case.model, NAMES, kind, **options).double()
    move(model, 0.03 if name == "gpt2" else 0.1)
    model.train(name == "resnet" and kind in BATCH_NORM_BY_TASK)
    generator = torch.Generator().manual_seed(3)
    inputs = {}
    for argument, x in case.inputs.items():
        # much alike, and pulled to opposite sides below: so tasks conflict
        one, shape = x[:1], (len(IDS), *x.shape[1:])
        if x.is_floating_point():
            inputs[argument] = one.double() + 0.5 * torch.randn(shape, generator=generator).double()
        else:
            kept = torch.rand(shape, generator=generator) < 0.7
            inputs[argument] = torch.where(kept, one, torch.randint(0, 50, shape, generator=generator))
    ids = TWO if absent else IDS
    found = Trial(model, inputs, 3.0 * (-1.0) ** ids.double(), ids, {}, {})
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    apart = copy.deepcopy(model)
    params = {n: p for n, p in apart.named_parameters() if p.requires_grad}
    found.own.update((n, None) for n, p in named.items() if is_per_task(p))
    found.rows.update((n, [torch.zeros_like(p)] * len(NAMES)) for n, p in named.items() if not is_per_task(p))
    for t in found.present():
        with tasks(NAMES[t]):
            loss = found.losses(apart, found.of(t)).sum()
        for n, g in zip(params, torch.autograd.grad(loss, list(params.values()), allow_unused=True), strict=True):
            if g is None:
                continue
            if n in found.own:
                assert found.own[n] is None, f"{n} belongs to a single task"
                found.own[n] = g
            else:
                found.rows[n] = [*found.rows[n][:t], g, *found.rows[n][t + 1 :]]
    assert found.rows and any(g is not None for g in found.own.values())
    return found


def by_backward(given: Trial, model: nn.Module) -> fastmtl.Surgery:
    with tasks(given.ids):
        each = given.losses(model, given.all())
    losses = {name: each[given.of(t)].sum() if t in given.present() else None for t, name in enumerate(NAMES)}
    return fastmtl.backward(losses, method=PCGRAD)


def by_bank(given: Trial, model: nn.Module) -> fastmtl.Surgery:
    bank = fastmtl.GradientBank(model, NAMES)
    for t in given.present():
        with bank.task(NAMES[t]), tasks(NAMES[t]):
            given.losses(model, given.of(t)).sum().backward()
    return bank.apply(PCGRAD)


def by_one_pass(given: Trial, model: nn.Module, **options: Any) -> fastmtl.Surgery:
    with tasks(given.ids), fastmtl.one_pass(model, given.ids, NAMES, **options) as bank:
        # the batch is taken apart before the block, if at all
        y = model(**given.inputs)
        y = y if isinstance(y, Tensor) else y.logits
        target = given.target.view(-1, *(1,) * (y.dim() - 1))
        (y - target).square().flatten(1).mean(1).sum().backward()
    if options.get("memory") != "stream":
        named = {p: n for n, p in model.named_parameters()}
        assert {named[p] for p in bank.params} == given.rows.keys()
        for t, name in enumerate(NAMES):
            for p, g in zip(bank.params, bank.row(name), strict=True):
                assert_near(torch.zeros_like(p) if g is None else g, given.rows[named[p]][t], given, named[p])
    return bank.apply(PCGRAD)


def assert_near(got: Tensor, want: Tensor, given: Trial, name: str) -> None:
    """Against the size of the gradient, or, of one that is zero but for rounding, of all of them."""
    error = float((got - want).norm())
    assert error <= 1e-10 * float(want.norm()) + 1e-13 * float(given.bank().norm()), f"{name}: {error}"


WAYS: dict[str, Callable[[Trial, nn.Module], fastmtl.Surgery]] = {
    "backward": by_backward,
    "bank": by_bank,
    "one_pass": functools.partial(by_one_pass, check=True),
    "stream": functools.partial(by_one_pass, memory="stream"),
}


def check(given: Trial, way: str) -> None:
    model = copy.deepcopy(given.model)
    surgery = WAYS[way](given, model)
    bank = given.bank()
    assert surgery.names == NAMES
    assert list(surgery.present) == [t in given.present() for t in range(len(NAMES))]
    torch.testing.assert_close(surgery.gram.double(), reference.gram(bank), rtol=1e-9, atol=1e-12)
    update = reference.pcgrad(bank, ORDER)
    assert not torch.allclose(update, bank.sum(0)), "tasks must conflict for this to tell anything"
    parts = dict(zip(given.rows, update.split([row[0].numel() for row in given.rows.values()]), strict=True))
    for name, p in model.named_parameters():
        if name in parts:
            got = torch.zeros_like(p) if p.grad is None else p.grad
            assert_near(got, parts[name].view(p.shape), given, name)
        elif given.own.get(name) is None:
            # of an absent task, or frozen
            assert p.grad is None, name
        else:
            assert p.grad is not None, name
            assert_near(p.grad, given.own[name], given, name)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_shared_weights_are_operated_on_and_those_of_tasks_are_not(name: str, kind: str, way: str) -> None:
    check(trial(name, kind), way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["taps", "patch"])
def test_an_absent_task(kind: str, way: str) -> None:
    check(trial("resnet", kind, True), way)


# --- what one_pass takes apart beside the layers above, against a pass per task on its samples alone


class TaskShift(TaskModule):
    """A layer of a user's own, as docs/guides/task-models.md has it."""

    def __init__(self) -> None:
        super().__init__(NAMES)
        self.shift = TaskParameters()
        self._start_tasks()

    def _start(self, name: str) -> None:
        self.shift[name] = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        plan = self._plan(x)
        return x + torch.stack([self.shift[name] for name in self.tasks])[plan.task_ids][:, None]


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = TaskMultiheadAttention(6, 2, NAMES, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x, need_weights=False)[0]


class SharedAffine(nn.Module):
    """Statistics by task, and one scale and shift for all."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.ids = IDS

    def forward(self, x: Tensor) -> Tensor:
        return task_batch_norm(x, fastmtl.ops.task_plan(self.ids, len(NAMES)), self.weight, self.bias, training=True)


class OneTable(TaskEmbedding):
    """An embedding as it runs on a GPU and in compiled graphs, where nothing is asked of the ids."""

    def _add_by_segments(self, y: Tensor, x: Tensor, plan: Any) -> Tensor:
        return y + self._from_one_table(x, plan).to(y.dtype)


class Positions(nn.Module):
    """An embedding of positions, whose numbers all samples have in common."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.table = nn.Linear(6, 6), TaskEmbedding(5, 6, NAMES)

    def forward(self, x: Tensor) -> Tensor:
        return (self.inner(x) + self.table(torch.arange(x.shape[1])[None])).relu()


def _any_head() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 4))


TOKENS = torch.randint(0, 11, (len(IDS), 5), generator=torch.Generator().manual_seed(1))
ROWS = torch.randn(len(IDS), 6, generator=torch.Generator().manual_seed(1)).double()
LINES = torch.randn(len(IDS), 5, 6, generator=torch.Generator().manual_seed(1)).double()
PICTURES = torch.randn(len(IDS), 3, 5, 5, generator=torch.Generator().manual_seed(1)).double()
# around each layer something that all tasks share
PARTS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "embedding": (lambda: nn.Sequential(TaskEmbedding(11, 6, NAMES, 0), nn.Linear(6, 4)), TOKENS),
    "embedding, separate": (lambda: nn.Sequential(TaskEmbedding(11, 6, NAMES, shared=False), nn.Linear(6, 4)), TOKENS),
    "embedding, gated": (
        lambda: nn.Sequential(TaskEmbedding(11, 6, NAMES, 0, gate=TapsGate()), nn.Linear(6, 4)), TOKENS
    ),
    "embedding, one table": (
        lambda: nn.Sequential(OneTable(11, 6, NAMES, 0, gate=TapsGate()), nn.Linear(6, 4)), TOKENS
    ),
    "embedding of positions": (Positions, LINES),
    "heads": (lambda: nn.Sequential(nn.Linear(6, 6), TaskHeads(6, dict.fromkeys(NAMES, 4))), ROWS),
    "heads, padded": (
        lambda: nn.Sequential(
            nn.Linear(6, 6), TaskHeads(6, dict(zip(NAMES, (4, 3, 5), strict=True)), output="padded", fill=0.0)
        ), ROWS,
    ),
    "heads, a list": (
        lambda: nn.Sequential(nn.Linear(6, 6), TaskHeads(6, dict(zip(NAMES, (4, 3, 5), strict=True)))), ROWS
    ),
    "heads of any kind": (
        lambda: nn.Sequential(nn.Linear(6, 6), TaskHeads.from_modules({name: _any_head() for name in NAMES})), ROWS
    ),
    "scale and shift": (lambda: nn.Sequential(nn.Linear(6, 6), TaskScaleShift(6, NAMES)), ROWS),
    "a layer of one's own": (lambda: nn.Sequential(nn.Linear(6, 6), TaskShift(), nn.Linear(6, 4)), ROWS),
    "attention": (lambda: nn.Sequential(nn.Linear(6, 6), SelfAttention(), nn.Linear(6, 4)), LINES),
    "batch norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), TaskBatchNorm2d(4, NAMES), nn.Conv2d(4, 4, 3)), PICTURES
    ),
    "batch norm, shared affine": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), SharedAffine(), nn.Conv2d(4, 4, 3)), PICTURES
    ),
}  # fmt: skip


def part(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, x = PARTS[name]
    model = make().to(dtype)
    move(model)
    return model, x.to(dtype) if x.is_floating_point() else x


def summed(y: Tensor | list[Tensor]) -> Tensor:
    return sum(each.square().sum() for each in y) if isinstance(y, list) else y.square().sum()


def rows_apart(model: nn.Module, x: Tensor, params: list[Tensor]) -> list[list[Tensor]]:
    """Of each task, a pass on its samples alone."""
    rows = []
    for t, name in enumerate(NAMES):
        for layer in model.modules():
            if isinstance(layer, SharedAffine):
                layer.ids = IDS[t == IDS]
        with tasks(name):
            found = torch.autograd.grad(summed(model(x[t == IDS])), params, allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)])
    return rows


def assert_rows(bank: fastmtl.OnePassBank, rows: list[list[Tensor]], tolerance: float) -> None:
    size = torch.cat([g.flatten() for row in rows for g in row]).norm()
    for t, row in enumerate(rows):
        for p, got, want in zip(bank.params, bank.row(t), row, strict=True):
            error = (torch.zeros_like(p) if got is None else got) - want
            assert error.norm() <= tolerance * (want.norm() + 1e-3 * size), (t, tuple(p.shape))


@pytest.mark.parametrize("name", PARTS)
def test_rows_of_one_layer(name: str) -> None:
    model, x = part(name)
    apart = copy.deepcopy(model)
    rows = rows_apart(apart, x, [p for p in apart.parameters() if not is_per_task(p)])
    with tasks(IDS), fastmtl.one_pass(model, IDS, NAMES, check=True) as bank:
        summed(model(x)).backward()
    assert len(bank.params) == len(rows[0])
    assert_rows(bank, rows, 1e-10)
    own = {n: p for n, p in apart.named_parameters() if is_per_task(p)}
    with tasks(IDS):
        found = torch.autograd.grad(summed(apart(x)), list(own.values())) if own else []
    for (n, _p), g in zip(own.items(), found, strict=True):
        torch.testing.assert_close(model.get_parameter(n).grad, g, rtol=1e-9, atol=1e-12)


def test_check_in_float32_allows_for_a_gradient_that_is_zero_but_for_rounding() -> None:
    # the bias of an attention's keys moves all scores of a query alike
    model, x = part("attention", torch.float32)
    with tasks(IDS), fastmtl.one_pass(model, IDS, NAMES, check=True) as bank:
        summed(model(x)).backward()
    key = model[1].layer.k_proj.bias
    at = next(k for k, p in enumerate(bank.params) if p is key)
    assert bank.row(0)[at].norm() < 1e-4 * bank.row(0)[at - 1].norm()


def test_windows_that_are_folded_into_the_batch() -> None:
    case = task_models.make("swin")
    model = convert(case.model, NAMES, "taps", joint=True).double()
    move(model)
    x, ids = case.inputs["pixel_values"].double(), task_models.IDS
    params = [p for p in model.parameters() if not is_per_task(p)]
    with tasks(ids, repeat=True):
        each = model(x).logits.square().sum(1)
    want = [torch.autograd.grad(each[ids == t].sum(), params, retain_graph=True) for t in range(len(NAMES))]
    with tasks(ids, repeat=True), fastmtl.one_pass(model, ids, NAMES) as bank:
        model(x).logits.square().sum().backward()
    assert_rows(bank, [list(row) for row in want], 1e-10)


# --- batch norm by task whose tasks are not those of one_pass


def test_statistics_over_samples_of_several_tasks() -> None:
    model, x = part("batch norm")
    others = IDS.roll(1)
    for told in (others, NAMES[0], torch.where(IDS == 1, 0, IDS)):
        with (
            pytest.raises(ValueError, match=r"batch norm by task .* several tasks of one_pass.*different ids"),
            tasks(told),
            fastmtl.one_pass(model, IDS, NAMES),
        ):
            summed(model(x)).backward()
    # parts of a task's samples are samples of one task
    finer = torch.tensor([2, 0, 1, 0, 1, 2, 2, 3])
    model[1].add_task("painting")
    with tasks(finer), fastmtl.one_pass(model, IDS, NAMES, check=True) as bank:
        summed(model(x)).backward()
    bank.apply(PCGRAD)
    # a sample of no task, beside others of the same statistics
    with (
        pytest.raises(ValueError, match="some are -1"),
        tasks(IDS),
        fastmtl.one_pass(model, torch.where(torch.arange(len(IDS)) == 1, -1, IDS), NAMES),
    ):
        summed(model(x)).backward()
    # in eval mode, any ids
    with tasks(others), fastmtl.one_pass(model.eval(), IDS, NAMES, check=True):
        summed(model(x)).backward()
    with tasks(others), fastmtl.one_pass(model.train(), IDS, NAMES, mixing="partition") as bank:
        summed(model(x)).backward()
    with pytest.raises(RuntimeError, match="partition"):
        bank.apply(PCGRAD).cosines()


@pytest.mark.parametrize("memory", ["bank", "stream"])
def test_what_the_device_alone_can_see_makes_the_update_nan(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the ids are not read; here a tensor stands in that says it lies on one."""

    class OnDevice:
        device = torch.device("cuda")

        def __init__(self, x: Tensor) -> None:
            self.x = x

    from fastmtl.task_gradients.one_pass import tracker
    from fastmtl.task_gradients.one_pass.task_ids import TaskIds

    meets, where = TaskIds.meets_others, torch.where
    monkeypatch.setattr(TaskIds, "meets_others", lambda *args: OnDevice(meets(*args)))
    monkeypatch.setattr(
        tracker.torch, "where", lambda c, *rest: where(c.x if isinstance(c, OnDevice) else c, *rest), raising=True
    )
    for told, fine in ((IDS, True), (IDS.roll(1), False)):
        model, x = part("batch norm")
        with tasks(told), fastmtl.one_pass(model, IDS, NAMES, memory=memory) as bank:
            summed(model(x)).backward()
        bank.apply(PCGRAD)
        assert bool(model[0].weight.grad.isfinite().all()) == fine


def test_shares_of_single_tasks_in_the_bank_are_refused_by_name() -> None:
    class PerTaskAffine(SharedAffine):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(len(NAMES), 4))

    model = nn.Sequential(nn.Conv2d(3, 4, 3), PerTaskAffine()).double()
    with (
        pytest.raises(ValueError, match=r"'1.weight'.*task_batch_norm.*what belongs to single tasks is in the bank"),
        fastmtl.one_pass(model, IDS, NAMES),
    ):
        summed(model(PICTURES)).backward()
    fastmtl.mark_per_task(model[1].bias)
    model[1].weight = nn.Parameter(torch.randn(4).double())
    with (
        pytest.raises(ValueError, match=r"'1.weight'.*a shift that is not in the bank, behind a scale that is"),
        fastmtl.one_pass(model, IDS, NAMES),
    ):
        summed(model(PICTURES)).backward()


def test_nothing_that_tasks_share() -> None:
    model = convert(task_models.make("resnet").model, NAMES, "taps")
    with pytest.raises(ValueError, match="expected at least one parameter that needs a gradient and is shared"):
        fastmtl.one_pass(model, IDS, NAMES)
