"""The tasks of a model: added, removed, frozen, handed to optimizers; gates and task vectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from task_models import IDS, NAMES, ResNet, move
from torch import nn

from fastmtl.nn import (
    add_task,
    convert,
    freeze_task,
    layer_report,
    line_scale,
    merge,
    param_groups,
    remove_task,
    shared_parameters,
    sparsity_loss,
    task_names,
    task_parameters,
    task_vectors,
    tasks,
)
from fastmtl.nn.module import task_layers
from fastmtl.ops import task_plan

KINDS = ("taps", "dense", "lora", "patch", "separate", "modulator", "hypergrid")
X = torch.linspace(-2, 2, 4 * 3 * 8 * 8).view(4, 3, 8, 8)


def made(kind: str = "taps", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = convert(ResNet().eval(), NAMES, kind, **options)
    move(model)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_tasks_come_and_go(kind: str) -> None:
    model = made(kind)
    with tasks(IDS):
        before = model(X)
    with tasks("sketch"):
        sketch = model(X)
    add_task(model, "twin", like="sketch")
    add_task(model, "fresh")
    assert task_names(model) == (*NAMES, "twin", "fresh")
    with tasks(torch.tensor([3, 3, 3, 3])):
        torch.testing.assert_close(model(X), sketch)
    # a copy is no view
    for a, b in zip(task_parameters(model, "twin"), task_parameters(model, "sketch"), strict=True):
        assert a.data_ptr() != b.data_ptr() and a.requires_grad == b.requires_grad
    with tasks(IDS):
        torch.testing.assert_close(model(X), before)
    remove_task(model, "photo")
    assert task_names(model) == ("sketch", "clipart", "twin", "fresh")
    with tasks([NAMES[t] if t else "twin" for t in IDS]):
        torch.testing.assert_close(model(X)[IDS > 0], before[IDS > 0])
    assert not any(".photo" in name for name in model.state_dict())
    remove_task(model, 3)
    assert task_names(model) == ("sketch", "clipart", "twin")


@pytest.mark.parametrize("kind", ["taps", "dense", "lora", "patch", "modulator", "hypergrid"])
def test_a_new_task_computes_what_the_plain_network_computes(kind: str) -> None:
    torch.manual_seed(0)
    plain = ResNet().eval()
    expected = plain(X)
    model = convert(plain, NAMES, kind)
    move(model)
    add_task(model, "fresh")
    with tasks("fresh"):
        torch.testing.assert_close(model(X), expected, atol=1e-6, rtol=1e-5)


def test_a_frozen_task_stays() -> None:
    model = made("dense")
    freeze_task(model, "photo")
    assert not any(p.requires_grad for p in task_parameters(model, "photo"))
    with tasks(IDS):
        model(X).sum().backward()
    assert all(p.grad is None for p in task_parameters(model, "photo"))
    assert all(p.grad is not None for p in task_parameters(model, "sketch"))
    freeze_task(model, "photo", False)
    assert all(p.requires_grad for p in task_parameters(model, "photo"))


def test_whose_parameters() -> None:
    model = made("taps", joint=True)
    mine = [set(map(id, task_parameters(model, name))) for name in NAMES]
    shared = set(map(id, shared_parameters(model)))
    assert not mine[0] & mine[1] and not mine[0] & shared and mine[0]
    assert set().union(*mine, shared) == set(map(id, model.parameters()))


def test_groups_for_an_optimizer() -> None:
    model = made("taps", joint=True)
    groups = {g["name"]: g for g in param_groups(model, gate_lr=0.5)}
    assert list(groups) == ["shared", "tasks", "gates"]
    found = [id(p) for g in groups.values() for p in g["params"]]
    assert sorted(found) == sorted(map(id, model.parameters()))
    assert groups["gates"]["weight_decay"] == 0.0 and groups["gates"]["lr"] == 0.5
    assert all(p.shape == () for p in groups["gates"]["params"]) and "lr" not in groups["tasks"]
    optimizer = torch.optim.AdamW(list(groups.values()), lr=0.1, weight_decay=0.1)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.1, 0.5]
    # an optimizer per task moves its task alone
    own = torch.optim.SGD(param_groups(model, task="sketch"), lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with tasks(IDS):
        model(X).pow(2).sum().backward()
    own.step()
    moved = {id(p) for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and moved <= set(map(id, task_parameters(model, "sketch")))
    freeze_task(model, "photo")
    names = [g["name"] for g in param_groups(made("taps"))]
    assert names == ["tasks", "gates"]  # what is frozen is left out
    assert not {id(p) for g in param_groups(model) for p in g["params"]} & set(map(id, task_parameters(model, "photo")))


def test_the_price_of_a_difference() -> None:
    model = made("taps")
    scores = {
        name: torch.stack([layer.gate[name] for _, layer in task_layers(model) if hasattr(layer, "gate")])
        for name in NAMES
    }
    price = {name: s.abs().mean() for name, s in scores.items()}
    torch.testing.assert_close(sparsity_loss(model), sum(price.values()))
    torch.testing.assert_close(sparsity_loss(model, "sketch"), price["sketch"])
    torch.testing.assert_close(sparsity_loss(model, ["photo", "clipart"]), price["photo"] + price["clipart"])
    ids = torch.tensor([2, 0, 0])
    for told in (ids, ids.int(), ["clipart", "photo"], task_plan(ids, 3)):
        with tasks(told):
            torch.testing.assert_close(sparsity_loss(model), price["photo"] + price["clipart"])
    with tasks("sketch"):
        torch.testing.assert_close(sparsity_loss(model), price["sketch"])
    model.zero_grad()
    with tasks(ids):
        sparsity_loss(model).backward()
    for _, layer in task_layers(model):
        if hasattr(layer, "gate"):
            assert layer.gate["sketch"].grad is None
            assert abs(float(layer.gate["photo"].grad)) == pytest.approx(1 / len(scores["photo"]))
    with tasks(ids):
        compiled = torch.compile(sparsity_loss, backend="aot_eager")(model)
    torch.testing.assert_close(compiled, price["photo"] + price["clipart"])


@pytest.mark.parametrize("kind", ["taps", "dense", "lora"])
def test_task_vectors_add_up(kind: str) -> None:
    model = made(kind)
    vectors = task_vectors(model)
    assert list(vectors) == list(NAMES)
    for name in NAMES:
        single = merge(model, name).state_dict()
        for key, delta in vectors[name].items():
            torch.testing.assert_close(single[key], model.state_dict()[key] + delta)
        for path, layer in task_layers(model):
            if f"{path}.weight" not in vectors[name] and hasattr(layer, "gate") and layer.gate is not None:
                assert float(layer.taps(layer.gate[name])) == 0  # a closed gate


@pytest.mark.parametrize("kind", ["dense", "lora"])
def test_line_scale(kind: str) -> None:
    model = made(kind)
    before, paths = task_vectors(model), [path for path, _ in task_layers(model)]
    line_scale(model, 0.2, 0.6)
    line_scale(model, 2.0, 0.0, task="photo")
    for name in NAMES:
        for at, path in enumerate(paths):
            factor = (0.2 + 0.6 * at / (len(paths) - 1)) * (2 if name == "photo" else 1)
            torch.testing.assert_close(
                task_vectors(model)[name][f"{path}.weight"], factor * before[name][f"{path}.weight"]
            )


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: add_task(made(), "photo"), ValueError, "name: expected a new task, got 'photo'"),
        (lambda: add_task(made(), "a", like="b"), ValueError, "like: expected one of photo, sketch, clipart, got 'b'"),
        (lambda: add_task(made(), "a", like=0), TypeError, "like: expected the name of a task or None, got int"),
        (lambda: add_task(made(), 3), TypeError, r"expected names \(str\), got int"),
        (lambda: add_task(ResNet(), "a"), ValueError, "expected layers with parts of tasks"),
        (lambda: remove_task(made(), "a"), ValueError, "expected one of photo, sketch, clipart, got 'a'"),
        (lambda: remove_task(made(), 3), ValueError, r"expected 0\.\.2, got 3"),
        (
            lambda: remove_task(convert(nn.Linear(2, 2), 1, "dense"), 0),
            ValueError,
            "one of several tasks, got '0', the only",
        ),
        (lambda: freeze_task(made(), "photo", 1), TypeError, "frozen: expected a bool, got int"),
        (lambda: param_groups(made(), gate_lr=-1.0), ValueError, "gate_lr: expected at least 0, got -1.0"),
        (lambda: param_groups(made(), gate_lr="a"), TypeError, "gate_lr: expected a number, got str"),
        (lambda: param_groups(made(), task="a"), ValueError, "got 'a'"),
        (lambda: task_parameters(made(), None), TypeError, "a position or a name, got NoneType"),
        (lambda: shared_parameters(ResNet()), ValueError, "expected layers with parts of tasks"),
        (
            lambda: sparsity_loss(made("dense")),
            ValueError,
            r"expected layers with gates \(kind 'taps', or gate=\), got none",
        ),
        (lambda: sparsity_loss(made(), "a"), ValueError, "tasks: expected one of photo, sketch, clipart, got 'a'"),
        (lambda: task_vectors(made("patch")), ValueError, "expected layers with deltas"),
        (lambda: line_scale(made(), float("nan"), 0), ValueError, "alpha: expected a finite number, got nan"),
        (lambda: line_scale(made(), 1, "a"), TypeError, "beta: expected a number, got str"),
        (lambda: line_scale(made(), 1, 0, task="a"), ValueError, "got 'a'"),
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_a_new_separate_layer_keeps_the_memory_order() -> None:
    plain = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)
    model = convert(nn.Sequential(plain), ["left", "right"], "separate")
    add_task(model, "new")
    assert model[0].delta["new"].is_contiguous(memory_format=torch.channels_last)


def norms_of_two_kinds() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LayerNorm(144), nn.Linear(144, 8), nn.RMSNorm(8)
    )
    move_plain(model)
    return model.eval()


@torch.no_grad()
def move_plain(model: nn.Module) -> None:
    for x in (*model.parameters(), *model.buffers()):
        if x.is_floating_point():
            x.add_(0.1 * torch.rand(x.shape))


@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_knows_what_new_tasks_begin_with(assign: bool) -> None:
    plain = norms_of_two_kinds()
    expected = plain(X)
    model = convert(plain, NAMES, "separate", [nn.BatchNorm2d, nn.LayerNorm, nn.RMSNorm])
    move(model, 0.1)
    fresh = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LayerNorm(144), nn.Linear(144, 8), nn.RMSNorm(8)
    )
    other = convert(fresh.eval(), NAMES, "separate", [nn.BatchNorm2d, nn.LayerNorm, nn.RMSNorm])
    other.load_state_dict(model.state_dict(), assign=assign)
    for one in (model, other):
        add_task(one, "fresh")
        with tasks("fresh"):
            torch.testing.assert_close(one(X), expected)
    assert layer_report(other).to_dict() == layer_report(model).to_dict()
    assert layer_report(other).to_dict()["tasks"]["fresh"]["changed"] == []
    # in memory of its own
    first = {x.data_ptr() for name, x in other.named_buffers() if "first_" in name}
    assert first.isdisjoint(p.data_ptr() for p in other.parameters())
