"""Models and losses for `one_pass`, and the T backward passes that its rows must equal."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import fastmtl
from fastmtl.ops import task_lora

N, T, CLASSES = 8, 3, 5
IDS = torch.tensor([0, 2, 1, 1, 0, 2, 2, 0])
LABELS = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])


def of(task: int) -> Tensor:
    """Which samples are that task's."""
    return task == IDS


def cross_entropy(out: Tensor) -> Tensor:
    return F.cross_entropy(out, LABELS[: out.shape[0]], reduction="none")


class Case(NamedTuple):
    model: Callable[[], nn.Module]
    x: Callable[[], Tensor]
    batch_dim: int = 0
    per_sample: Callable[[Any], Tensor] = cross_entropy
    arguments: dict[str, Any] = {}  # noqa: RUF012  # of one_pass


def expected_rows(case: Case, model: nn.Module, x: Tensor, ids: Tensor = IDS, num_tasks: int = T) -> list[list[Tensor]]:
    """Row t: the gradient of task t's part of the summed loss, by a backward pass of its own."""
    params = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(1)
    losses = case.per_sample(model(x))
    rows = []
    for t in range(num_tasks):
        found = torch.autograd.grad(losses[ids == t].sum(), params, retain_graph=True, allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)])
    return rows


def one_pass_bank(case: Case, model: nn.Module, x: Tensor, ids: Tensor = IDS, **more: Any) -> fastmtl.OnePassBank:
    torch.manual_seed(1)
    with fastmtl.one_pass(model, ids, T, batch_dim=case.batch_dim, **case.arguments, **more) as bank:
        case.per_sample(model(x)).sum().backward()
    return bank


def assert_rows(bank: fastmtl.OnePassBank, rows: list[list[Tensor]], tolerance: float = 1e-10) -> None:
    """Each row of each parameter, against the size of the row."""
    for t, row in enumerate(rows):
        size = math.sqrt(sum(float(g.abs().double().norm()) ** 2 for g in row))
        for p, got, want in zip(bank.params, bank.row(t), row, strict=True):
            error = float(((torch.zeros_like(want) if got is None else got) - want).abs().double().norm())
            assert error <= tolerance * max(size, 1e-300), (t, tuple(p.shape), error, size)


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class LowRank(nn.Module):
    """`task_lora` with A and B marked per task: of two ranks in lists, or stacked.

    bias: "shared", "per_task", or "derived": one per task, computed from a parameter that all share.
    """

    def __init__(self, bias: str = "shared", stacked: bool = False, ids: Tensor = IDS) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6))
        self.bias = nn.Parameter(torch.randn(*((T, 5) if bias == "per_task" else (5,))))
        self.kind, self.ids = bias, ids
        if stacked:
            self.A, self.B = (nn.Parameter(torch.randn(T, *shape)) for shape in ((2, 6), (5, 2)))
            fastmtl.mark_per_task([self.A, self.B])
        else:
            self.A = nn.ParameterList(torch.randn(r, 6) for r in (2, 1, 3))
            self.B = nn.ParameterList(torch.randn(5, r) for r in (2, 1, 3))
            fastmtl.mark_per_task([*self.A, *self.B])
        self.scaling = fastmtl.mark_per_task(nn.Parameter(torch.randn(T)))
        if bias == "per_task":
            fastmtl.mark_per_task(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.expand(T, 5) * torch.arange(1, T + 1)[:, None] if self.kind == "derived" else self.bias
        return task_lora(x, self.weight, self.A, self.B, self.ids, scaling=self.scaling, bias=bias)


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Tokens(nn.Module):
    """Embedding, class token, positions, torch's own encoder, layer scale."""

    def __init__(self, batch_first: bool = True, norm_first: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8, padding_idx=0)
        self.positions = nn.Parameter(torch.randn(1, 9, 8))
        self.cls = nn.Parameter(torch.randn(1, 1, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=batch_first, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.scale = nn.Parameter(torch.rand(8))
        self.head = nn.Linear(8, CLASSES)
        self.batch_first = batch_first

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.table(tokens)
        h = torch.cat([self.cls.expand(h.shape[0], -1, -1), h], 1)
        h = h + self.positions.expand_as(h)
        h = self.encoder(h if self.batch_first else h.transpose(0, 1)) * self.scale
        return self.head(h[:, 0] if self.batch_first else h[0])


class Attention(nn.Module):
    """Torch's attention in all its options, time first, as many steps as samples."""

    def __init__(self, same: bool, need_weights: bool, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, dropout=0.1, **options)
        self.query = nn.Parameter(torch.randn(1, 1, 6))
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, CLASSES)
        self.same, self.need_weights = same, need_weights

    def forward(self, x: Tensor) -> Tensor:
        q = x if self.same else self.query.expand(3, x.shape[1], 6)
        key = x[..., : self.attention.kdim]
        mask = None if not self.same else torch.triu(torch.ones(len(q), len(key), dtype=torch.bool, device=x.device), 1)
        padding = torch.zeros(x.shape[1], len(key), dtype=torch.bool, device=x.device)
        padding[2, -1] = True
        h, weights = self.attention(
            q, x if self.same else key, x, need_weights=self.need_weights, attn_mask=mask, key_padding_mask=padding
        )
        return self.head(self.norm(h[-1])) * (1.0 if weights is None else weights.square().mean((1, 2))[:, None])


class RelativeAttention(nn.Module):
    """A table of relative positions, added to the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)
        self.table = nn.Parameter(torch.randn(9, 2))
        self.register_buffer("index", torch.randint(0, 9, (4, 4)))
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, 2, 3).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(length, length, -1).permute(2, 0, 1)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.unsqueeze(0))
        return self.head(h.transpose(1, 2).reshape(n, length, -1).mean(1))


class PerTaskScale(nn.Module):
    """`log_alpha[ids]`, `x @ W`, einsum and addmm with parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, CLASSES)
        self.log_alpha = nn.Parameter(torch.randn(T))
        self.w = nn.Parameter(torch.randn(CLASSES, CLASSES))
        self.v = nn.Parameter(torch.randn(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x) * self.log_alpha[IDS].exp()[:, None]
        h = torch.addmm(self.v, h, self.w) + torch.einsum("nc,cd->nd", h, self.w.T) + (self.w @ h.T).T
        return h * (h @ self.v)[:, None] + self.log_alpha.sum()


class Recurrent(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.rnn = kind(6, 7, batch_first=True, num_layers=2)
        self.head = nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Cells(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.cell, self.head = kind(6, 7), nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Queries(nn.Module):
    """Queries that every sample has a copy of, dropped out and turned before they meet it; a padded batch."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(3, 8))
        self.norm, self.drop = nn.LayerNorm(8), nn.Dropout(0.2)
        self.inner = nn.Linear(6, 8)
        self.decoder = nn.TransformerDecoderLayer(8, 2, 16, 0.1, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        queries = self.drop(self.norm(self.queries[None].expand(n, -1, -1)))
        kept = torch.ones(n, length, dtype=torch.bool, device=x.device)
        kept[2, 2:] = False
        positions = torch.arange(length, device=x.device)[None, :]
        padding = ~kept[torch.arange(n, device=x.device)[:, None], positions]
        return self.head(self.decoder(queries, self.inner(x), memory_key_padding_mask=padding).mean(1))


class Gaussian(nn.Module):
    """A policy with a standard deviation of its own, through torch.distributions."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Linear(6, 2), nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        policy = torch.distributions.Normal(self.mean(x), self.log_std.exp())
        return policy.log_prob(x[:, :2]).sum(-1) + policy.entropy().sum(-1)


class Mixture(nn.Module):
    """Experts on the samples that a gate picks."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 3)
        self.experts = nn.ModuleList([nn.Linear(6, CLASSES) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        weights, picked = self.gate(x).softmax(-1).topk(2, -1)
        out = x.new_zeros(len(x), CLASSES)
        for k, expert in enumerate(self.experts):
            rows, columns = torch.where(picked == k)
            out[rows] += expert(x[rows]) * weights[rows, columns, None]
        return out


class Experts(nn.Module):
    """All experts in one product, their outputs weighted by a gate, on vectors or sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.up_bias = nn.Parameter(torch.randn(3, 6, 4)), nn.Parameter(torch.randn(3, 1, 4))
        self.down, self.gate = nn.Parameter(torch.randn(3, 4, CLASSES)), nn.Parameter(torch.randn(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 6)
        h = torch.baddbmm(self.up_bias, rows.expand(3, -1, -1), self.up).tanh().permute(1, 0, 2)
        gates = torch.einsum("...d,dk->...k", rows, self.gate).softmax(-1)
        y = torch.einsum("nkd,nk,kde->ne", h, gates, self.down)
        return y.view(*x.shape[:-1], CLASSES).reshape(len(x), -1, CLASSES).mean(1)


class RepeatedPositions(nn.Module):
    """Relative positions that go through layers, are repeated over heads and samples, and multiplied by queries and
    keys; added to the scores by a table, too."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(7, 6)
        self.norm, self.drop, self.act = nn.LayerNorm(6), nn.Dropout(0.2), nn.ReLU(inplace=True)
        self.query, self.key, self.value = (nn.Linear(6, 6) for _ in range(3))
        self.table = nn.Embedding(7, 2)
        self.head = nn.Linear(6, CLASSES)
        self.register_buffer("distance", torch.arange(4)[:, None] - torch.arange(4) + 3)

    def heads(self, x: Tensor) -> Tensor:  # [n, L, 6] to [2 n, L, 3]
        return x.view(*x.shape[:2], 2, 3).permute(0, 2, 1, 3).reshape(-1, x.shape[1], 3)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = (self.heads(layer(x)) for layer in (self.query, self.key, self.value))
        table = self.act(self.drop(self.norm(self.positions.weight)))[None]
        keys, queries = (self.heads(layer(table)).repeat(n, 1, 1) for layer in (self.key, self.query))
        queries /= 3**0.5
        scores = q @ k.mT + torch.gather(torch.bmm(q, keys.mT), 2, self.distance.expand(2 * n, length, length))
        scores = scores + torch.gather(torch.bmm(k, queries.mT), 2, self.distance.expand(2 * n, length, length)).mT
        bias = self.table(self.distance).permute(2, 0, 1).unsqueeze(0).expand(n, -1, -1, -1)
        scores = scores.view(n, 2, length, length) + bias
        h = scores.softmax(-1) @ v.view(n, 2, length, 3)
        return self.head(h.transpose(1, 2).reshape(n, length, 6).mean(1))


class Spectrum(nn.Module):
    """Between two linear layers a complex weight for each frequency."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight = nn.Linear(6, 8), nn.Parameter(torch.randn(5, dtype=torch.complex128))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.fft.irfft(torch.fft.rfft(self.first(x)) * self.weight, n=8))


def _images() -> Tensor:
    return torch.randn(N, 3, 8, 8, dtype=torch.float64)


def _vectors() -> Tensor:
    return torch.randn(N, 6, dtype=torch.float64)


def _sequences() -> Tensor:
    return torch.randn(N, 4, 6, dtype=torch.float64)


def _lines() -> Tensor:
    return torch.randn(N, 3, 9, dtype=torch.float64)


def _tokens() -> Tensor:
    return torch.randint(0, 11, (N, 8))


def _time_first() -> Tensor:
    return torch.randn(N, N, 6, dtype=torch.float64)


def _image_net(*layers: nn.Module, width: int = 4) -> nn.Module:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, CLASSES))


def _line_net(*layers: nn.Module, width: int = 4) -> nn.Module:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(width, CLASSES))


MODELS: dict[str, Case] = {
    "mlp": Case(lambda: nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, CLASSES)), _vectors),
    "linear on sequences": Case(
        lambda: nn.Sequential(nn.Linear(6, 7), nn.GELU(), Lambda(lambda h: h.mean(1)), nn.Linear(7, CLASSES)),
        _sequences,
    ),
    "conv, group norm": Case(
        lambda: _image_net(
            nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            Residual(nn.Conv2d(4, 4, 3, 1, 1, groups=2)),
        ), _images,
    ),
    "conv without bias, strided, dilated": Case(
        lambda: _image_net(nn.Conv2d(3, 4, 3, 2, 2, 2, bias=False), nn.SiLU(), nn.Conv2d(4, 4, (1, 3), padding="same")),
        _images,
    ),
    "conv padded otherwise": Case(
        lambda: _image_net(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), nn.Conv2d(4, 4, 2, padding="same")),
        _images,
    ),
    "conv channels last": Case(
        lambda: _image_net(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU()).to(memory_format=torch.channels_last),
        lambda: _images().to(memory_format=torch.channels_last),
    ),
    "group norm channels last, its gradient not": Case(
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(144, CLASSES)
        ).to(memory_format=torch.channels_last),
        lambda: _images().to(memory_format=torch.channels_last),
    ),
    "conv_transpose2d": Case(
        lambda: _image_net(nn.ConvTranspose2d(3, 4, 3, 2, 1, 1), nn.ReLU(), nn.ConvTranspose2d(4, 4, 2, groups=2)),
        _images,
    ),
    "conv1d, prelu": Case(lambda: _line_net(nn.Conv1d(3, 4, 3, padding=1), nn.PReLU(4), nn.PReLU()), _lines),
    "conv_transpose1d": Case(lambda: _line_net(nn.ConvTranspose1d(3, 4, 3, 2), nn.Tanh()), _lines),
    "conv3d": Case(
        lambda: nn.Sequential(
            nn.Conv3d(3, 4, 3, (2, 1, 1), 1, bias=True), nn.Tanh(), nn.ConvTranspose3d(4, 2, 2), nn.Flatten(2),
            Lambda(lambda h: h.mean(2)), nn.Linear(2, CLASSES),
        ), lambda: torch.randn(N, 3, 4, 5, 6, dtype=torch.float64),
    ),
    "batch norm, eval": Case(
        lambda: _image_net(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.InstanceNorm2d(4, affine=True)).eval(),
        _images,
    ),
    "batch norm 1d, eval": Case(
        lambda: nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Linear(7, CLASSES)).eval(), _vectors
    ),
    "layer norm, rms norm": Case(
        lambda: nn.Sequential(
            nn.LayerNorm(6), nn.RMSNorm(6), nn.LayerNorm((4, 6)), nn.Flatten(), nn.Linear(24, CLASSES),
            nn.LayerNorm(CLASSES, bias=False),
        ), _sequences,
    ),
    "encoder": Case(Tokens, _tokens),
    "encoder, time first": Case(lambda: Tokens(False), _tokens),
    "encoder, norm first": Case(lambda: Tokens(True, True), _tokens),
    "attention": Case(lambda: Attention(True, False), _time_first, 1),
    "attention, weights": Case(lambda: Attention(True, True), _time_first, 1),
    "attention, crossed": Case(lambda: Attention(False, False, add_zero_attn=True, add_bias_kv=True), _time_first, 1),
    "attention, apart": Case(lambda: Attention(False, True, kdim=4, vdim=6, bias=False), _time_first, 1),
    "relative positions": Case(RelativeAttention, _sequences),
    "indexed and multiplied": Case(PerTaskScale, _vectors),
    "weight norm": Case(
        lambda: nn.Sequential(weight_norm(nn.Linear(6, 7)), nn.Tanh(), weight_norm(nn.Linear(7, CLASSES))), _vectors
    ),
    "spectral norm": Case(
        lambda: nn.Sequential(spectral_norm(nn.Linear(6, 7)), nn.Tanh(), nn.Linear(7, CLASSES)).eval(), _vectors
    ),
    "bilinear": Case(
        lambda: nn.Sequential(nn.Linear(6, CLASSES), nn.Softplus(), nn.Dropout(0.3)), _vectors,
        per_sample=lambda out: (out.squeeze(-1) - 1.0).square().mean(1),
    ),
    "queries": Case(Queries, _sequences),
    "policy": Case(Gaussian, _vectors, per_sample=lambda out: out),
    "mixture": Case(Mixture, _vectors),
    "experts": Case(Experts, _vectors),
    "experts on sequences": Case(Experts, _sequences),
    "positions repeated": Case(RepeatedPositions, _sequences),
    "spectrum": Case(Spectrum, _vectors),
    "lstm": Case(lambda: Recurrent(nn.LSTM), _sequences),
    "gru": Case(lambda: Recurrent(nn.GRU), _sequences),
    "gru cell": Case(lambda: Cells(nn.GRUCell), _sequences),
    "lstm cell": Case(lambda: Cells(nn.LSTMCell), _sequences),
    "rnn": Case(lambda: Recurrent(nn.RNN), _sequences),
}  # fmt: skip


def make(name: str) -> tuple[Case, nn.Module, Tensor]:
    case = MODELS[name]
    torch.manual_seed(0)
    return case, case.model().double(), case.x()
