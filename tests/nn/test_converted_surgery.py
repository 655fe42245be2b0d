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
from fastmtl.nn import convert, tasks
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
