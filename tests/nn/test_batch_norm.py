"""`TaskBatchNorm2d`: against one `nn.BatchNorm2d` per task, with its state, its tasks and its way from plain layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmtl
from fastmtl.nn import TaskBatchNorm2d, tasks
from fastmtl.parameters import is_per_task

F64 = torch.float64
NAMES = ["photo", "sketch", "clipart"]
IDS = torch.tensor([1, 0, 1, 1, 0, 1])  # no clipart


def _x(n: int = 6) -> Tensor:
    return torch.randn(n, 4, 3, 5, dtype=F64) * 2 + 1


def _made(**options: Any) -> TaskBatchNorm2d:
    norm = TaskBatchNorm2d(4, NAMES, **options, dtype=F64)
    with torch.no_grad():
        for p in norm.parameters():
            p.copy_(torch.randn_like(p))
    return norm


def _plain(norm: TaskBatchNorm2d) -> dict[str, nn.BatchNorm2d]:
    """A layer of torch's own for each task, with the task's numbers."""
    found = {}
    for name in norm.tasks:
        plain = nn.BatchNorm2d(4, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, dtype=F64)
        if norm.affine and norm.bias is None:
            plain.register_parameter("bias", None)
        plain.load_state_dict(norm.part(name))
        found[name] = plain.train(norm.training)
    return found


def _loop(layers: dict[str, nn.BatchNorm2d], names: tuple[str, ...], x: Tensor, ids: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for t, name in enumerate(names):
        rows = (ids == t).nonzero()[:, 0]
        if len(rows):
            y = y.index_copy(0, rows, layers[name](x[rows]))
    return y


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "cumulative": {"momentum": None},
    "not affine": {"affine": False},
    "no bias": {"bias": False},
    "no statistics": {"track_running_stats": False},
    "eps": {"eps": 0.1, "momentum": 0.5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_plain_layer_for_each_task(options: dict[str, Any]) -> None:
    """Two steps of training, then eval mode: results, gradients and statistics."""
    norm = _made(**options)
    layers = _plain(norm)
    for ids, training in ((IDS, True), (IDS.flip(0), True), (torch.tensor([2, 0, 1, 2, 2, 0]), False)):
        norm.train(training)
        norm.zero_grad()
        for plain in layers.values():
            plain.train(training)
            plain.zero_grad()
        x, g = _x().requires_grad_(), _x()
        other = x.detach().clone().requires_grad_()
        with tasks(ids):
            y = norm(x)
        want = _loop(layers, norm.tasks, other, ids)
        torch.testing.assert_close(y, want)
        y.backward(g)
        want.backward(g)
        torch.testing.assert_close(x.grad, other.grad)
        for name, plain in layers.items():
            for child, expected in plain.state_dict().items():
                torch.testing.assert_close(norm.part(name)[child], expected)
            for child, p in plain.named_parameters():
                grad = norm.part(name)[child].grad
                assert (grad is None) == (p.grad is None), (name, child)
                if grad is not None:
                    torch.testing.assert_close(grad, p.grad)


def test_parameters_belong_to_their_tasks() -> None:
    norm = TaskBatchNorm2d(4, NAMES)
    assert len(list(norm.parameters())) == 6 and all(is_per_task(p) for p in norm.parameters())
    assert set(norm.part("sketch")) == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    copied = copy.deepcopy(norm)
    assert all(is_per_task(p) for p in copied.parameters())
    losses = []
    x = torch.randn(6, 4, 3, 5)
    with tasks(IDS):
        y = norm(x * nn.Parameter(torch.ones(4, 1, 1)))
    for t in (0, 1):
        losses.append(y[t == IDS].square().sum())
    fastmtl.backward(losses, method="pcgrad")
    assert norm.weight["photo"].grad is not None and norm.weight["clipart"].grad is None


def test_state_of_the_plain_layer_is_every_tasks() -> None:
    plain = nn.BatchNorm2d(4)
    with torch.no_grad():
        plain.weight.normal_()
        plain.bias.normal_()
    plain(torch.randn(5, 4, 3, 3))
    model = nn.Sequential(nn.Conv2d(4, 4, 1), TaskBatchNorm2d(4, NAMES))
    model.load_state_dict(nn.Sequential(nn.Conv2d(4, 4, 1), plain).state_dict())
    norm = model[1]
    for name in NAMES:
        for child, value in norm.part(name).items():
            assert torch.equal(value, plain.state_dict()[child]), (name, child)
    # each has its own
    norm.running_mean["photo"].zero_()
    assert torch.equal(norm.running_mean["sketch"], plain.running_mean)
    assert norm.changed("photo") and not norm.changed("sketch")
    # and what is added later begins there, too
    norm.add_task("drawing")
    assert torch.equal(norm.weight["drawing"], plain.weight) and torch.equal(
        norm.running_var["drawing"], plain.running_var
    )


def test_from_layer_and_back() -> None:
    plain = nn.BatchNorm2d(4, eps=0.01, momentum=None)
    with torch.no_grad():
        plain.weight.normal_()
    plain(torch.randn(5, 4, 3, 3))
    norm = TaskBatchNorm2d.from_layer(plain.eval(), NAMES)
    assert not norm.training and norm.eps == 0.01 and norm.momentum is None
    x = torch.randn(6, 4, 3, 3)
    with tasks(IDS):
        torch.testing.assert_close(norm(x), plain(x))
    for name in NAMES:
        assert not norm.changed(name) and norm.added(name) == 0
        for child, value in norm.part(name).items():
            assert torch.equal(value, plain.state_dict()[child])
            assert value.data_ptr() != plain.state_dict()[child].data_ptr()
    norm.train()
    with tasks(IDS):
        norm(x).sum().backward()
    assert norm.changed("photo") and not norm.changed("clipart") and norm.added("photo") == 16
    merged = norm.merged("photo").eval()
    assert type(merged) is nn.BatchNorm2d
    with tasks(torch.zeros(6, dtype=torch.long)):
        torch.testing.assert_close(merged(x), norm.eval()(x))
    merged.running_mean.zero_()
    assert norm.running_mean["photo"].any()


@pytest.mark.parametrize(
    "options", [{"affine": False}, {"track_running_stats": False}, {"affine": False, "track_running_stats": False}]
)
def test_from_a_layer_without(options: dict[str, bool]) -> None:
    plain = nn.BatchNorm2d(4, **options)
    norm = TaskBatchNorm2d.from_layer(plain, 2)
    x = torch.randn(6, 4, 3, 3)
    for training in (True, False):
        norm.train(training)
        plain.train(training)
        with tasks(torch.ones(6, dtype=torch.long)):
            torch.testing.assert_close(norm(x), plain(x))
    assert set(norm.part(1)) == set(plain.state_dict()) == set(norm.merged(1).state_dict())


def test_tasks_come_and_go() -> None:
    norm = _made()
    with tasks(IDS):
        norm(_x())
    norm.add_task("drawing", like="sketch")
    assert torch.equal(norm.running_mean["drawing"], norm.running_mean["sketch"])
    assert norm.num_batches_tracked["drawing"] == 1 and is_per_task(norm.weight["drawing"])
    norm.add_task("chalk")
    assert norm.num_batches_tracked["chalk"] == 0 and bool((norm.running_var["chalk"] == 1).all())
    norm.remove_task("sketch")
    assert norm.tasks == ("photo", "clipart", "drawing", "chalk")
    assert all("sketch" not in name for name in norm.state_dict())
    layers = _plain(norm)
    x, ids = _x(), torch.tensor([2, 0, 2, 3, 3, 0])
    with tasks(ids):
        torch.testing.assert_close(norm(x), _loop(layers, norm.tasks, x, ids))


def test_state_goes_through_saving_and_conversion() -> None:
    norm = _made()
    with tasks(IDS):
        norm(_x())
    other = TaskBatchNorm2d(4, NAMES, dtype=F64)
    other.load_state_dict(norm.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(norm.state_dict().values(), other.state_dict().values(), strict=True))
    narrow = copy.deepcopy(norm).to(torch.bfloat16)
    assert narrow.running_mean["photo"].dtype == torch.bfloat16
    assert narrow.num_batches_tracked["photo"].dtype == torch.int64
    with tasks(IDS):
        assert narrow(_x().bfloat16()).dtype == torch.bfloat16
        assert norm.float()(_x().bfloat16()).dtype == torch.bfloat16
    # one task on its own
    photo = {k: v for k, v in norm.state_dict().items() if k.endswith(".photo")}
    assert len(photo) == 5
    other.float().load_state_dict(photo, strict=False)


def test_resets() -> None:
    norm = _made()
    with tasks(IDS):
        norm(_x())
    norm.reset_running_stats()
    fresh = TaskBatchNorm2d(4, NAMES, dtype=F64)
    for child in ("running_mean", "running_var", "num_batches_tracked"):
        for name in NAMES:
            assert torch.equal(norm.part(name)[child], fresh.part(name)[child])
    norm.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(norm.parameters(), fresh.parameters(), strict=True))
    _made(track_running_stats=False).reset_parameters()


@pytest.mark.parametrize("training", [True, False])
def test_compile(training: bool, fresh_compiler: None) -> None:
    norm = _made().train(training)
    other = copy.deepcopy(norm)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for ids in (IDS, torch.tensor([2, 2, 0, 1, 1, 0])):
        x = _x()
        with tasks(ids):
            torch.testing.assert_close(compiled(x), norm(x))
        for a, b in zip(norm.state_dict().values(), other.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b)


def test_under_a_checkpoint() -> None:
    """The recomputed pass takes the batch's own statistics again, whatever has become of the running ones."""
    norm = _made()
    other = copy.deepcopy(norm)
    x = _x().requires_grad_()
    same = x.detach().clone().requires_grad_()
    with tasks(IDS):
        y = torch.utils.checkpoint.checkpoint(norm, x, use_reentrant=False, context_fn=fastmtl.nn.checkpoint_contexts)
        want = other(same)
    y.square().sum().backward()
    want.square().sum().backward()
    torch.testing.assert_close(x.grad, same.grad)
    for p, q in zip(norm.parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad)


BAD: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("features", lambda: TaskBatchNorm2d(0, 2), ValueError, "num_features: expected at least 1, got 0"),
    ("features kind", lambda: TaskBatchNorm2d(2.0, 2), TypeError, "num_features: expected an int, got float"),
    ("tasks", lambda: TaskBatchNorm2d(2, 0), ValueError, "tasks: expected at least 1, got 0"),
    ("layer", lambda: TaskBatchNorm2d.from_layer(nn.BatchNorm1d(2), 2), TypeError, "layer: expected nn.BatchNorm2d"),
    (
        "synchronised",
        lambda: TaskBatchNorm2d.from_layer(nn.SyncBatchNorm(2), 2),
        TypeError,
        "layer: expected nn.BatchNorm2d, got SyncBatchNorm",
    ),
    ("lazy", lambda: TaskBatchNorm2d.from_layer(nn.LazyBatchNorm2d(), 2), TypeError, "got LazyBatchNorm2d"),
]


@pytest.mark.parametrize(("call", "error", "match"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(call: Callable[[], Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


def test_a_layer_with_hooks_is_refused() -> None:
    plain = nn.BatchNorm2d(2)
    plain.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="layer: expected no hooks"):
        TaskBatchNorm2d.from_layer(plain, 2)


def test_bad_calls() -> None:
    norm = TaskBatchNorm2d(4, NAMES)
    with pytest.raises(RuntimeError, match="TaskBatchNorm2d: the tasks of the batch are not known"):
        norm(torch.randn(6, 4, 2, 2))
    with tasks(IDS):
        for shape in ((6, 4, 2), (6, 3, 2, 2)):
            with pytest.raises(ValueError, match=r"x: expected shape \[N, 4, H, W\], got"):
                norm(torch.randn(shape))
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    with tasks(torch.tensor([0, 0, 1])), pytest.raises(ValueError, match="got 1 for task 1"):
        norm(torch.randn(3, 4, 1, 1))
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())


def test_repr_is_short() -> None:
    assert repr(TaskBatchNorm2d(4, 2)).splitlines()[1].strip() == (
        "4, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True, tasks=2"
    )
