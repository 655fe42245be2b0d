"""Short ways of `one_pass`: what is kept of a call holds for no other call, and rows are those of the long way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases_one_pass import IDS, N, T, cross_entropy, of
from torch import Tensor, nn

import fastmtl
from fastmtl.task_gradients.one_pass import short_ways
from fastmtl.task_gradients.one_pass.sample_axis import PerSample, SampleAxis
from fastmtl.task_gradients.one_pass.task_ids import TaskIds
from fastmtl.task_gradients.one_pass.tensors import nested
from fastmtl.task_gradients.one_pass.tracker import Tracker


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short_ways, "_kept", {})


class Call:
    """A call on tensors whose axes are given: `(axis, outer, inner)`, with "assumed" behind them where nothing but a
    size says so; or None of a constant."""

    def __init__(
        self,
        run: Callable[..., Any],
        *shapes: tuple[int, ...],
        axes: tuple[Any, ...] = ((0, 1, 1),),
        grads: tuple[bool, ...] = (True, True),
        grad_mode: bool = True,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.run, self.shapes, self.axes, self.grads = run, shapes, axes, grads
        self.grad_mode, self.dtype = grad_mode, dtype

    def follow(self, short: bool, times: int = 1) -> list[tuple[Any, ...]]:
        """What is known of the results, on a short way where there is one, or on the long way."""
        found: list[tuple[Any, ...]] = []
        for _ in range(times):
            ids = torch.arange(4) % 2
            tracker = Tracker(TaskIds(ids, 2, ("batch",)), 0, {}, {}, (), bounded=not short, backward=lambda *a: None)
            tensors = []
            for shape, axis, grad in zip(self.shapes, self.axes, self.grads, strict=False):
                x = torch.rand(shape, dtype=self.dtype).requires_grad_(grad)
                if axis is None:
                    tracker.mark(x, fastmtl.task_gradients.one_pass.sample_axis.CONSTANT)
                else:
                    ids = tracker.outside if len(axis) > 3 else tracker.task_ids
                    tracker.mark(x, PerSample(axis[0], ids, *axis[1:3]))
                tensors.append(x)
            with torch.set_grad_enabled(self.grad_mode), tracker:
                out = self.run(*tensors)
            found = [_described(tracker, tracker.axis_of(x)) for x in nested(out)]
        return found


def _described(tracker: Tracker, axis: SampleAxis) -> tuple[Any, ...]:
    fields = tuple(x.key if isinstance(x, TaskIds) else x for x in axis)
    assumed = [x.assumed for x in axis if isinstance(x, TaskIds)]
    return type(axis).__name__, *fields, *assumed


def _product(x: Tensor, y: Tensor) -> Tensor:
    return x * y


# two calls of which what is known of one must not be taken for the other
SQUARE = (4, 4)
BOTH = ((0, 1, 1), (1, 1, 1))
PAIRS = {
    "axis": (Call(lambda x: x.sum(0), SQUARE), Call(lambda x: x.sum(0), SQUARE, axes=((1, 1, 1),))),
    "function": (Call(lambda x: x.sum(0), SQUARE), Call(lambda x: x.softmax(0), SQUARE)),
    "argument": (Call(lambda x: x.sum(1), SQUARE), Call(lambda x: x.sum(0), SQUARE)),
    "named argument": (Call(lambda x: x.sum(dim=1), SQUARE), Call(lambda x: x.sum(dim=0), SQUARE)),
    "name of an argument": (
        Call(lambda x: torch.flatten(x, start_dim=1), (4, 3, 2)),
        Call(lambda x: torch.flatten(x, end_dim=1), (4, 3, 2)),
    ),
    "dimension kept": (
        Call(lambda x: x.sum(0, True), (2, 4), axes=((1, 1, 1),)),
        Call(lambda x: x.sum(0, False), (2, 4), axes=((1, 1, 1),)),
    ),
    "type of an argument": (
        Call(lambda x: x.view(4, 4), SQUARE),
        Call(lambda x: x.view(torch.float64), SQUARE),
    ),
    "index": (Call(lambda x: x[:, 1], SQUARE), Call(lambda x: x[1], SQUARE)),
    "slice": (Call(lambda x: x[:4], SQUARE), Call(lambda x: x[:2], SQUARE)),
    "order of merged dimensions": (
        Call(lambda x: x.view(2, 4), (8,), axes=((0, 2, 1),)),
        Call(lambda x: x.view(2, 4), (8,), axes=((0, 1, 2),)),
    ),
    "shape": (Call(lambda x: x.flatten(0, 1), (4, 3)), Call(lambda x: x.flatten(0, 1), (4, 2))),
    "other samples": (
        Call(_product, SQUARE, SQUARE, axes=((0, 1, 1), (0, 1, 1))),
        Call(_product, SQUARE, SQUARE, axes=BOTH),
    ),
    "a constant": (
        Call(_product, SQUARE, SQUARE, axes=((0, 1, 1), None), grads=(True, False)),
        Call(_product, SQUARE, SQUARE, axes=BOTH, grads=(True, False), grad_mode=False),
    ),
    "gradient of an operand": (
        Call(_product, SQUARE, SQUARE, axes=BOTH, grads=(True, False)),
        Call(_product, SQUARE, SQUARE, axes=BOTH, grads=(True, True)),
    ),
    "what is assumed": (
        Call(_product, SQUARE, SQUARE, axes=((0, 1, 1, "assumed"), (0, 1, 1)), grads=(True, True)),
        Call(_product, SQUARE, SQUARE, axes=((0, 1, 1), (0, 1, 1)), grads=(True, True)),
    ),
    "grad mode": (
        Call(_product, SQUARE, SQUARE, axes=BOTH, grads=(True, False)),
        Call(_product, SQUARE, SQUARE, axes=BOTH, grads=(True, False), grad_mode=False),
    ),
    "several results": (
        Call(lambda x: x.chunk(2, 1), (4, 6)),
        Call(lambda x: x.chunk(3, 1), (4, 6)),
    ),
    "index by values": (
        Call(lambda x: x[torch.tensor([0, 1, 2, 3])], SQUARE),
        Call(lambda x: x[torch.tensor([1, 0, 3, 2])], SQUARE),
    ),
    "in place": (
        Call(lambda x: F.relu(x * 1, inplace=True), SQUARE),
        Call(lambda x: F.relu(x * 1, inplace=False), SQUARE),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("turned", [False, True])
def test_what_is_kept_holds_for_no_other_call(name: str, turned: bool) -> None:
    first, second = PAIRS[name][::-1] if turned else PAIRS[name]
    assert first.follow(short=True, times=2) == first.follow(short=False)
    assert second.follow(short=True, times=2) == second.follow(short=False)


def test_dtypes_are_told_apart() -> None:
    """Of two calls that differ in nothing else both are kept."""
    for dtype in (torch.float32, torch.float64):
        Call(torch.relu, SQUARE, dtype=dtype).follow(short=True)
    assert len(short_ways._kept) == 2


def test_a_known_call_is_not_followed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Call(lambda x: torch.relu(x).unflatten(1, (2, -1)).transpose(0, 1).chunk(2, 0)[1].mean((0, 2)), (4, 8))
    expected = call.follow(short=True)

    def follow(*args: Any) -> Any:
        raise AssertionError("followed again")

    monkeypatch.setattr(Tracker, "follow", follow)
    assert call.follow(short=True) == expected == [("PerSample", 0, ("batch",), 1, 1, None)]


class _Layers(nn.Module):
    """The layers that have short ways; a part of them is used twice, or has its bias outside the bank."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.plane = nn.Conv1d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, groups=2, bias=False)
        self.space = nn.Conv3d(1, 2, 2)
        self.group, self.layer = nn.GroupNorm(2, 4), nn.LayerNorm((4, 3))
        self.twice, self.out = nn.Linear(4, 4), nn.Linear(4, 5)
        self.out.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.line(x.flatten(2)).view(N, 4, 7, 7)
        y = self.layer(self.group(F.relu(self.plane(y))).permute(0, 2, 1, 3))
        y = (
            y.permute(0, 1, 3, 2)
            + self.space(x[:, :1, None, :4, :4].expand(-1, -1, 2, -1, -1)).flatten(1).mean(1)[:, None, None, None]
        )
        y = self.twice(torch.tanh(self.twice(y.reshape(-1, 4)))).view(N, -1, 4)  # 9 positions of a sample are merged
        return self.out(y.mean(1))


def _layers() -> tuple[_Layers, Tensor]:
    torch.manual_seed(0)
    return _Layers().double(), torch.randn(N, 2, 7, 7, dtype=torch.float64)


def test_rows_of_layers_with_short_ways() -> None:
    """Against T backward passes, in the first step and in the next one, where calls are known."""
    model, x = _layers()
    params = [p for p in model.parameters() if p.requires_grad]
    losses = cross_entropy(model(x))
    for _ in range(2):
        with fastmtl.one_pass(model, IDS, T, unknown="error") as bank:
            cross_entropy(model(x)).sum().backward()
        for t in range(T):
            expected = torch.autograd.grad(losses[of(t)].sum(), params, retain_graph=True)
            for got, g in zip(bank.row(t), expected, strict=True):
                torch.testing.assert_close(got, g, rtol=1e-9, atol=1e-12)


def test_autocast_takes_the_long_way() -> None:
    """A step under autocast after one without: its casts are those of the long way."""
    model, x = nn.Linear(6, 5), torch.randn(N, 6)
    rows = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), fastmtl.one_pass(model, IDS, T) as bank:
            y = model(torch.relu(x))
            assert y.dtype == (torch.bfloat16 if enabled else torch.float32)
            cross_entropy(y.float()).sum().backward()
        rows.append(bank.row(0))
    for a, b in zip(*rows, strict=True):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.05)
        assert not torch.equal(a, b)
