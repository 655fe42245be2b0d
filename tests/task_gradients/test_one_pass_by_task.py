"""Calls that no layer takes apart: recurrent layers, and functions of samples and parameters that nobody knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases_one_pass import IDS, N, T, assert_rows
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import fastmtl

L, D, H = 4, 6, 5


class States(nn.Module):
    """A layer of several kinds, whose first states are learned, or come from the samples."""

    def __init__(self, kind: Any, states: str, **options: Any) -> None:
        super().__init__()
        self.first, self.rnn = nn.Linear(D, D), kind(D, H, **options)
        self.states = states
        self.depth = self.rnn.num_layers * (1 + self.rnn.bidirectional)
        self.learned = nn.Parameter(torch.randn(self.depth, 1, H))
        self.of_samples = nn.Linear(D, self.depth * H)
        self.proj = self.rnn.proj_size

    def forward(self, x: Tensor) -> Tensor:  # [N, L, D] or [L, N, D]
        x = self.first(x)
        samples = x if self.rnn.batch_first else x.transpose(0, 1)
        h = {
            "learned": lambda: self.learned.expand(-1, N, -1).contiguous(),
            "samples": lambda: self.of_samples(samples.mean(1)).view(N, self.depth, H).transpose(0, 1),
            "none": lambda: None,
        }[self.states]()
        if h is not None and isinstance(self.rnn, nn.LSTM):
            h = (h[..., : self.proj or H], 0.5 * h)
        out, state = self.rnn(x, h)
        last = state[1] if isinstance(state, tuple) else state
        out = out if self.rnn.batch_first else out.transpose(0, 1)
        return out.flatten(1).square().sum(1) + last.sum((0, 2)).tanh()


class Packed(nn.Module):
    """Sequences of several lengths; the loss takes what the layer says of each step, and its last state."""

    def __init__(self, kind: Any, in_turn: bool) -> None:
        super().__init__()
        self.first, self.of_samples = nn.Linear(D, D), nn.Linear(D, 2 * H)
        self.rnn = kind(D, H, bidirectional=True, batch_first=True)
        self.lengths = torch.tensor([4, 4, 3, 3, 2, 2, 1, 1] if in_turn else [2, 4, 1, 3, 4, 1, 2, 3])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        h = self.of_samples(x.mean(1)).view(N, 2, H).transpose(0, 1)
        sorted_ = bool((self.lengths.diff() <= 0).all())
        packed = pack_padded_sequence(x, self.lengths, batch_first=True, enforce_sorted=sorted_)
        packed = packed._replace(data=packed.data.tanh())
        out, state = self.rnn(packed, (h, h) if isinstance(self.rnn, nn.LSTM) else h)
        last = state[1] if isinstance(state, tuple) else state
        padded, lengths = pad_packed_sequence(out, batch_first=True)
        return padded.flatten(1).square().sum(1) / lengths + last.sum((0, 2)).tanh()


class Steps(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.first, self.cell, self.state = nn.Linear(D, D), kind(D, H), nn.Linear(D, H)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        h = self.state(x[:, 0])
        state: Any = (h, h.tanh()) if isinstance(self.cell, nn.LSTMCell) else h
        for k in range(L):
            state = self.cell(x[:, k], state)
        return (state[0] * state[1] if isinstance(state, tuple) else state).square().sum(1)


class Distances(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.table = nn.Linear(D, D), nn.Parameter(torch.randn(7, D))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(self.first(x), self.table).square().sum((1, 2))


class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, w)
        return x @ w.T, x.detach() > 0

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> Any:
        x, w = ctx.saved_tensors
        return g @ w, g.flatten(0, -2).T @ x.flatten(0, -2)


class OfItsOwn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight = nn.Linear(D, D), nn.Parameter(torch.randn(7, D))

    def forward(self, x: Tensor) -> Tensor:
        out, positive = Hidden.apply(self.first(x), self.weight)
        return (out.tanh().mean(2) * positive.sum(2)).sum(1)


def _time_first(**options: Any) -> Callable[[], nn.Module]:
    return lambda: States(nn.LSTM, "none", num_layers=2, **options)


def _normed() -> nn.Module:
    model = States(nn.GRU, "none", batch_first=True)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        weight_norm(model.rnn, name)
    return model


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = States(nn.LSTM, "samples", batch_first=True, num_layers=2, dropout=0.4)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: States(nn.LSTM, "samples", batch_first=True, num_layers=2, bidirectional=True),
    "lstm, projected": lambda: States(nn.LSTM, "learned", batch_first=True, proj_size=3),
    "lstm, dropped out": lambda: States(nn.LSTM, "none", batch_first=True, num_layers=3, dropout=0.4),
    "lstm, time first": _time_first(),
    "lstm, time first, no bias": _time_first(bias=False),
    "lstm, checkpointed": Checkpointed,
    "gru": lambda: States(nn.GRU, "learned", batch_first=True, num_layers=2, dropout=0.4),
    "gru, states of samples": lambda: States(nn.GRU, "samples", batch_first=True, bidirectional=True),
    "gru, weight norm": _normed,
    "tanh": lambda: States(nn.RNN, "samples", batch_first=True),
    "relu": lambda: States(nn.RNN, "learned", batch_first=True, nonlinearity="relu"),
    "lstm, packed": lambda: Packed(nn.LSTM, False),
    "gru, packed in turn": lambda: Packed(nn.GRU, True),
    "lstm cell": lambda: Steps(nn.LSTMCell),
    "gru cell": lambda: Steps(nn.GRUCell),
    "tanh cell": lambda: Steps(nn.RNNCell),
    "distances": Distances,
    "a Function": OfItsOwn,
}
MODES: list[dict[str, Any]] = [{}, {"check": True}, {"memory": "stream"}]


def _case(name: str) -> tuple[nn.Module, Tensor, int]:
    torch.manual_seed(0)
    model, x = MODELS[name]().double(), torch.randn(N, L, D, dtype=torch.float64)
    return (model, x.transpose(0, 1).contiguous(), 1) if "time first" in name else (model, x, 0)


def _losses(model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(1)
    return model(x)


def _expected(model: nn.Module, x: Tensor, ids: Tensor) -> list[list[Tensor]]:
    losses, params = _losses(model, x), list(model.parameters())
    found = [
        torch.autograd.grad(losses[ids == t].sum(), params, retain_graph=True, allow_unused=True) for t in range(T)
    ]
    return [[torch.zeros_like(p) if g is None else g for p, g in zip(params, row, strict=True)] for row in found]


@pytest.mark.parametrize("arguments", MODES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_rows_equal_a_backward_pass_per_task(name: str, arguments: dict[str, Any]) -> None:
    """On the random numbers of the plain model; task 1 is absent in the stream, and one sample of no task."""
    model, x, batch_dim = _case(name)
    ids = torch.tensor([0, 2, 2, -1, 0, 2, 2, 0]) if arguments.get("memory") == "stream" else IDS
    rows = _expected(model, x, ids)
    with fastmtl.one_pass(model, ids, T, batch_dim=batch_dim, **arguments) as bank:
        losses = _losses(model, x)
        losses.sum().backward()
    torch.testing.assert_close(losses, _losses(model, x), rtol=0, atol=0)
    if "memory" not in arguments:
        assert_rows(bank, rows)
    surgery = bank.apply("sum")
    plain = torch.autograd.grad(_losses(model, x).sum(), list(model.parameters()), allow_unused=True)
    for p, g in zip(model.parameters(), plain, strict=True):
        got = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(got, torch.zeros_like(p) if g is None else g)
    flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    torch.testing.assert_close(surgery.gram.double(), flat @ flat.T)


def test_rows_are_added_up_over_blocks() -> None:
    model, x, _ = _case("lstm")
    rows, bank = _expected(model, x, IDS), None
    for _ in range(2):
        with fastmtl.one_pass(model, IDS, T, bank=bank) as bank:
            _losses(model, x).sum().backward()
    assert_rows(bank, [[2 * g for g in row] for row in rows])


def test_autocast() -> None:
    torch.manual_seed(0)
    model, x = MODELS["lstm"](), torch.randn(N, L, D)
    with torch.autocast("cpu", torch.bfloat16):
        rows = _expected(model, x, IDS)
        with fastmtl.one_pass(model, IDS, T) as bank:
            _losses(model, x).sum().backward()
    assert_rows(bank, rows, 1e-2)


def test_parameters_outside_the_bank_keep_their_gradient() -> None:
    model, x, _ = _case("lstm")
    plain = torch.autograd.grad(_losses(model, x).sum(), list(model.rnn.parameters()))
    rows = _expected(model, x, IDS)
    with fastmtl.one_pass(model, IDS, T, shared=model.first) as bank:
        _losses(model, x).sum().backward()
    assert_rows(bank, [row[1:3] for row in rows])
    for p, g in zip(model.rnn.parameters(), plain, strict=True):
        torch.testing.assert_close(p.grad, g)


class Strays(torch.autograd.Function):
    """Forwards samples stay apart; backwards each gets the mean of all gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return (g * w).mean(0, keepdim=True).expand_as(x), (g * x).sum((0, 1))


def test_what_mixes_samples_is_refused() -> None:
    model, x, _ = _case("lstm")
    table = nn.Parameter(torch.randn(D, dtype=torch.float64))
    roll = torch.arange(N).roll(1)

    def of_others() -> Tensor:
        h = model.of_samples(x.mean(1)).view(N, 4, H).transpose(0, 1)
        return model.rnn(model.first(x), (h[:, roll], h))[0]

    calls: dict[str, Callable[[], Tensor]] = {
        "lstm runs along the axis": lambda: model.rnn(model.first(x).transpose(0, 1))[0],
        "lstm with states of other samples": of_others,
        "mixes samples": lambda: Strays.apply(model.first(x), table),
    }
    for match, call in calls.items():
        with pytest.raises(ValueError, match=match), fastmtl.one_pass([*model.parameters(), table], IDS, T):
            call().square().sum().backward()


class Lines(nn.Module):
    """Patches of pictures of several sizes one after another, each with its part of a table of positions.

    Args:
        ask: "table", by numbers; "picture", at places between its points.
    """

    def __init__(self, ask: str) -> None:
        super().__init__()
        self.first, self.table, self.ask = nn.Linear(D, D), nn.Parameter(torch.randn(9, D)), ask

    def forward(self, x: Tensor, sizes: Tensor) -> Tensor:  # [N, 6, D], [N] -> [lines, D]
        lines = self.first(x)[torch.arange(6) < sizes[:, None]]
        begins = torch.repeat_interleave(nn.functional.pad(sizes.cumsum(0)[:-1], (1, 0)), sizes)
        place = torch.arange(sizes.sum()) - begins
        if self.ask == "table":
            return lines * nn.functional.embedding(place + torch.repeat_interleave(sizes, sizes) % 3, self.table)
        owner = (torch.arange(len(lines))[None] >= sizes.cumsum(0)[:, None]).sum(0)
        at = torch.stack([place / sizes[owner], 0.5 * place / 6], -1)[None, :, None]
        picture = self.table.view(3, 3, D).permute(2, 0, 1)[None]
        asked = nn.functional.grid_sample(picture, at.to(x.dtype), mode="bicubic", align_corners=False)
        return lines * asked.squeeze(0).squeeze(-1).T


@pytest.mark.parametrize("sizes", [[4, 1, 6, 3, 3, 2, 5, 1], [3] * N], ids=["ragged", "even"])
@pytest.mark.parametrize("ask", ["table", "picture"])
def test_lines_of_pictures(ask: str, sizes: list[int]) -> None:
    torch.manual_seed(0)
    model, x, count = Lines(ask).double(), torch.randn(N, 6, D, dtype=torch.float64), torch.tensor(sizes)
    params, tasks = list(model.parameters()), IDS.repeat_interleave(count)
    losses = model(x, count).square().sum(1)
    rows = [list(torch.autograd.grad(losses[tasks == t].sum(), params, retain_graph=True)) for t in range(T)]
    with fastmtl.one_pass(model, IDS, T) as bank:
        model(x, count).square().sum().backward()
    assert_rows(bank, rows)
