"""Functions without a rule for `one_pass`: some keep the samples apart, some mix them where it is hard to see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import wrap_torch_function

N = 8


def opaque(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as torch's own are: one call, into which nobody can look."""

    def hidden(*args: Any) -> Any:
        return function(*args)

    return wrap_torch_function(lambda *args: args)(hidden)  # type: ignore[no-any-return]


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _definite() -> Tensor:
    a = values(N, 3, 3)
    return a @ a.mT + 3 * torch.eye(3).double()


def _gate(x: Tensor) -> Tensor:
    return torch.where(x.mean() > 1e6, x.flip(0), x)


def _detached_gate(x: Tensor) -> Tensor:
    return torch.where(x.detach().abs().max() > 50, x - x.mean(0), x)


def _together_above_zero(x: Tensor) -> Tensor:
    return torch.where(x > 0, x / x.norm(), 0.1 * x)


def _in_parts(x: Tensor) -> Tensor:
    parts = x.view(2, N // 2, -1)
    return (parts - parts.mean(1, keepdim=True)).view(N, -1)


def _rank(x: Tensor) -> Tensor:
    s = x.flatten(1).mean(1)
    return torch.relu(1 - (s[:, None] - s[None, :])).sum()


def _hashed(x: Tensor) -> Tensor:
    total = float(x.detach().nan_to_num(0, 0, 0).sum())
    return x * (1 + hash(total) % 2)


def _clamped_mean(x: Tensor) -> Tensor:
    return x + 1e-30 * x.nan_to_num(0, 0, 0).clamp(-9, 9).mean(0)


class _GradientsMixed(torch.autograd.Function):
    """Forwards it is a plain product; backwards it takes a mean over the batch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g - g.mean(0)


class _GradientsByAFactor(torch.autograd.Function):
    """Forwards it is a plain product; backwards there is a factor, which is zero for these values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mixes: bool) -> Tensor:
        ctx.save_for_backward((x > 1e6).to(x.dtype))
        ctx.mixes = mixes
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return (g.mean(0) if ctx.mixes else g) * factor, None


X, SQUARE, DEFINITE, SORTED = values(N, 3), values(N, N), _definite(), values(N, 3).sort(0).values
TABLE = values(5, 3, seed=1)

# what they are given, and which axis of the result carries the samples then
APART: dict[str, tuple[Callable[[Tensor], Any], Tensor, int]] = {
    "turned": (lambda x: x.T * 1.5, SQUARE, 1),
    "diagonal": (lambda x: x.diagonal() * 2, SQUARE, 0),
    "distances to a table": (lambda x: torch.cdist(x, TABLE), X, 0),
    "solve": (lambda x: torch.linalg.solve(x, x.sum(-1)), DEFINITE, 0),
    "cholesky": (torch.linalg.cholesky, DEFINITE, 0),
    "singular values": (torch.linalg.svdvals, values(N, 4, 3), 0),
    "eigenvalues": (torch.linalg.eigvalsh, DEFINITE, 0),
    "pinv": (torch.linalg.pinv, values(N, 4, 3), 0),
    "own random numbers": (lambda x: x * torch.rand_like(x), X, 0),
    "fft": (lambda x: torch.fft.fft(x, dim=1).abs(), values(N, 5), 0),
    "merged behind": (lambda x: x.reshape(-1, 3) * 2, values(N, 4, 3), 0),
    "merged before": (lambda x: x.transpose(0, 1).reshape(-1, 3) * 2, values(N, N, 3), 0),
    "kron": (lambda x: torch.kron(x, TABLE), X, 0),
    "kron turned": (lambda x: torch.kron(TABLE, x), X, 0),
    "renorm": (lambda x: x.renorm(2, 0, 0.5), X, 0),
    "rolled": (lambda x: x.roll(1, 0) * 2, X, 0),
    "gradients that are zero": (lambda x: _GradientsByAFactor.apply(x, False), X, 0),
    "blocks": (lambda x: torch.block_diag(*x.unbind(0)), X, 0),
}

# what follows them in the loss is no sum
MIXED: dict[str, tuple[Callable[[Tensor], Any], Tensor]] = {
    "sorted": (lambda x: x.sort(0).values, X),
    "sorted what is sorted": (lambda x: x.sort(0).values, SORTED),
    "sorted by value, then by index": (lambda x: x[x.detach().sum(1).argsort()], X),
    "maximum over the batch": (lambda x: x / x.abs().max(), X),
    "the maximum": (lambda x: x.max(), X),
    "maxima": (lambda x: x.amax(0), X),
    "median": (lambda x: x - x.median(0).values, X),
    "median without NaN": (lambda x: x - x.nanmedian(0).values, X),
    "cumulative sums": (lambda x: x.cumsum(0), X),
    "cumulative products": (lambda x: x.cumprod(0), X),
    "softmax over the batch": (lambda x: x.softmax(0), X),
    "softmax over the batch of sums": (lambda x: x.sum(1, keepdim=True).softmax(0) * x, X),
    "a mean behind a small factor": (lambda x: x + 1e-30 * x.mean(0), X),
    "a clamped mean behind a small factor": (_clamped_mean, X),
    "a zero times a sum": (lambda x: x + 0 * x.sum(0), X),
    "hashed": (_hashed, X),
    "a gate": (_gate, X),
    "a gate without gradient": (_detached_gate, X),
    "a dead branch": (lambda x: x + torch.relu(x.mean(0) - 1e5), X),
    "without what is not finite": (lambda x: x - x.nan_to_num(0, 0, 0).clamp(-1, 1).mean(0), X),
    "gradients alone, though not now": (lambda x: _GradientsByAFactor.apply(x, True), X),
    "gradients alone": (_GradientsMixed.apply, X),
    "ghost norm": (_in_parts, X),
    "ranked": (_rank, X),
    "clipped, though not now": (lambda x: x * torch.clamp(1e4 / x.norm(), max=1.0), 0.1 * X),
    "renorm, though not now": (lambda x: x.renorm(2, 1, 1e3), X),
    "products": (lambda x: x @ x, SQUARE),
    "with its transpose": (lambda x: x * x.T, SQUARE),
    "a product with ones": (lambda x: torch.eye(N).double() @ x, X),
    "covariance": (torch.cov, X),
    "distances": (F.pdist, X),
    "differences": (lambda x: x - x.roll(1, 0), X),
    "a quantile": (lambda x: x.quantile(0.3, 0), X),
    "fft over the batch": (lambda x: torch.fft.fft(x, dim=0).abs(), X),
    "log-sum-exp": (lambda x: x.logsumexp((0, 1)), X),
    "almost linear": (lambda x: x.square().sum() ** 1.0001, X),
    "rmse": (lambda x: x.square().mean().sqrt(), X),
    "divided by a count": (lambda x: x.square().sum() / (x > 0).sum(), X),
    "shuffled": (lambda x: x[torch.randperm(N)] * 2, X),
    "together above zero, but all lie below": (_together_above_zero, -X.abs()),
}

# linear sums over the samples
SUMS: dict[str, tuple[Callable[[Tensor], Any], Tensor]] = {
    "mean of squares": (lambda x: x.square().mean(), X),
    "huber": (lambda x: F.huber_loss(x, torch.zeros_like(x)), X),
    "scaled": (lambda x: 3 * x.tanh().mean(), X),
    "trapezoid": (lambda x: torch.trapezoid(x, dim=0), X),
    "by columns": (lambda x: x.exp().sum(0), X),
}
