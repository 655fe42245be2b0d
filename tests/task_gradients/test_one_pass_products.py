"""Products of samples with parameters in every form: rows, against a backward pass per task in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases_one_pass import IDS, N, T
from torch import Tensor, nn

import fastmtl

K, D, E, L = 4, 6, 5, 3  # experts, width in and out, length of a sequence


def _values(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


X, OUT, SEQUENCES, BY_EXPERT, GATES = _values(N, D), _values(N, E), _values(N, L, D), _values(N, K, D), _values(N, K)
TURNED, SQUARES, COMPLEX = _values(N, D, K), _values(N, D, D), _values(N, D, dtype=torch.complex128)
PICTURES = _values(N, 2, 4, 6)
CONSTANT = _values(K)


def _weights(dtype: torch.dtype = torch.float64) -> dict[str, nn.Parameter]:
    shapes = {"W": (K, D, E), "b": (K, E), "one": (K, 1, E), "m": (D, E), "v": (E,), "w": (D,), "dk": (D, K),
              "many": (N, D, E), "modes": (2, 3, 2, 4)}  # fmt: skip
    return {name: nn.Parameter(_values(*shape, dtype=dtype)) for name, shape in shapes.items()}


P = Callable[[Any], Tensor]

# the result, and the axis where it carries the samples
FORMS: dict[str, tuple[P, int]] = {
    "experts": (lambda p: X @ p["W"] + p["one"], 1),
    "experts, a bias of two dimensions": (lambda p: torch.matmul(X[None], p["W"]) + p["b"][:, None], 1),
    "as many experts as samples": (lambda p: X @ p["many"], 1),
    "experts on sequences": (lambda p: SEQUENCES[:, None] @ p["W"] + p["one"], 0),
    "experts turned": (lambda p: p["W"].mT @ X.T, 2),
    "an expert for each part": (lambda p: BY_EXPERT[:, :, None] @ p["W"], 0),
    "expanded": (lambda p: torch.bmm(X.expand(K, N, D), p["W"]), 1),
    "repeated": (lambda p: torch.bmm(X.repeat(K, 1, 1), p["W"]), 1),
    "stacked": (lambda p: torch.bmm(torch.stack([X] * K), p["W"]), 1),
    "sequences expanded": (lambda p: torch.bmm(SEQUENCES.reshape(1, -1, D).expand(K, -1, -1), p["W"]), 1),
    "parts first": (lambda p: torch.bmm(BY_EXPERT.transpose(0, 1), p["W"]), 1),
    "baddbmm": (lambda p: torch.baddbmm(p["one"], X.expand(K, N, D), p["W"], beta=0.5, alpha=2), 1),
    "addmm": (lambda p: torch.addmm(p["b"][:1], X, p["m"], beta=0.5, alpha=2), 0),
    "addmm, nothing added": (lambda p: torch.addmm(torch.full((E,), torch.nan).double(), X, p["m"], beta=0), 0),
    "addbmm": (lambda p: torch.addbmm(OUT, X.expand(K, N, D), p["W"]), 0),
    "addmv": (lambda p: torch.addmv(X[:, 0], X, p["w"]), 0),
    "addr": (lambda p: torch.addr(OUT, X[:, 0], p["v"]), 0),
    "einsum": (lambda p: torch.einsum("nd,kde->nke", X, p["W"]), 0),
    "einsum on sequences": (lambda p: torch.einsum("lnd,kde->lnke", SEQUENCES.transpose(0, 1), p["W"]), 1),
    "einsum without a result": (lambda p: torch.einsum("ad,de", X, p["m"]), 0),
    "einsum of lists": (lambda p: torch.einsum(X, [0, 3], p["W"], [2, 3, 4], [0, 2, 4]), 0),
    "ellipsis": (lambda p: torch.einsum("...d,kde->...ke", SEQUENCES, p["W"]), 0),
    "ellipsis in the parameter": (lambda p: torch.einsum("nd,...de->n...e", X, p["W"]), 0),
    "ellipsis in both": (lambda p: torch.einsum("...d,...de->...e", BY_EXPERT, p["W"]), 0),
    "ellipsis behind the parameter": (lambda p: torch.einsum("kde,...d->...ke", p["W"], SEQUENCES), 0),
    "ellipsis in the middle": (lambda p: torch.einsum("n...d,kde->n...ke", SEQUENCES, p["W"]), 0),
    "three operands": (lambda p: torch.einsum("nd,nk,kde->ne", X, GATES, p["W"]), 0),
    "a constant among them": (lambda p: torch.einsum("nd,k,kde->ne", X, CONSTANT, p["W"]), 0),
    "two parameters among them": (lambda p: torch.einsum("nd,dk,kde->ne", X, p["dk"], p["W"]), 0),
    "samples twice": (lambda p: torch.einsum("nd,kde,ne->nk", X, p["W"], OUT), 0),
    "summed alone": (lambda p: torch.einsum("nd,kde->nd", X, p["W"]), 0),
    "copied by einsum": (
        lambda p: torch.einsum("nd,nde->ne", X, torch.einsum("n,de->nde", torch.ones(N).double(), p["m"])), 0
    ),
    "repeated for heads and samples": (
        lambda p: torch.bmm(BY_EXPERT.view(N * K, 1, D), F.dropout(p["W"], 0.5).repeat(N, 1, 1)).view(N, K, E), 0
    ),
    "repeated by interleaving": (
        lambda p: torch.bmm(TURNED.mT.reshape(N * K, 1, D), p["m"][None].repeat_interleave(N * K, 0)).view(N, K, E), 0
    ),
    "expanded and merged": (
        lambda p: torch.bmm(
            BY_EXPERT.view(N * K, 1, D), p["W"].expand(N, K, D, E).reshape(N * K, D, E).div_(2)
        ).view(N, K, E), 0
    ),
    "tensordot": (lambda p: torch.tensordot(p["W"], X, dims=([1], [1])), 2),
    "tensordot of two dimensions": (lambda p: torch.tensordot(BY_EXPERT, p["W"], dims=2), 0),
    "inner": (lambda p: torch.inner(X, p["W"].mT), 0),
    "outer": (lambda p: torch.outer(X[:, 0], p["v"]), 0),
    "bilinear": (lambda p: F.bilinear(X, OUT, p["W"], CONSTANT), 0),
    "bilinear with a bias": (lambda p: F.bilinear(X, OUT, p["W"], p["b"][:, 0]), 0),
    "cosines": (lambda p: F.cosine_similarity(OUT[:, None], p["b"], dim=-1), 0),
}  # fmt: skip
COMPLEX_FORMS: dict[str, tuple[P, int]] = {
    "matmul": (lambda p: COMPLEX @ p["m"], 0),
    "vector": (lambda p: COMPLEX @ p["w"], 0),
    "real samples": (lambda p: X @ p["m"].real + torch.einsum("nd,de->ne", X + 0j, p["m"]), 0),
    "experts": (lambda p: torch.einsum("nd,kde->nke", COMPLEX, p["W"]), 0),
    "linear": (lambda p: F.linear(COMPLEX, p["m"].mH, p["v"]), 0),
    "broadcast": (lambda p: COMPLEX * p["w"].conj() + p["w"].abs(), 0),
    "real samples by broadcasting": (lambda p: X * p["w"], 0),
    "spectrum": (lambda p: torch.fft.irfft(torch.fft.rfft(X) * p["w"][:4], n=D), 0),
    "modes": (lambda p: torch.fft.irfft2(torch.einsum("bixy,ioxy->boxy", torch.fft.rfft2(PICTURES)[:, :, :2],
                                                      p["modes"])), 0),
    "table": (lambda p: p["b"][IDS] * X[:, :E], 0),
}  # fmt: skip


def _losses(form: P, axis: int, weights: dict[str, nn.Parameter]) -> Tensor:
    torch.manual_seed(1)
    y = form(weights).movedim(axis, 0)
    y = torch.view_as_real(y.resolve_conj()) if y.is_complex() else y
    return y.reshape(N, -1).sin().sum(1).square()


def _assert_right(form: P, axis: int, weights: dict[str, nn.Parameter], **arguments: Any) -> None:
    losses = _losses(form, axis, weights)
    params = list(weights.values())
    with fastmtl.one_pass(params, IDS, T, **arguments) as bank:
        _losses(form, axis, weights).sum().backward()
    met = 0
    for t in range(T):
        want = torch.autograd.grad(losses[t == IDS].sum(), params, retain_graph=True, allow_unused=True)
        for got, w in zip(bank.row(t), want, strict=True):
            assert (got is None) == (w is None)
            if w is not None:
                met += 1
                assert got.dtype == w.dtype
                torch.testing.assert_close(got, w, rtol=1e-9, atol=1e-12)
    assert met >= T


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_rows(name: str, check: bool) -> None:
    _assert_right(*FORMS[name], _weights(), check=check)


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("name", COMPLEX_FORMS)
def test_rows_of_complex_parameters(name: str, check: bool) -> None:
    _assert_right(*COMPLEX_FORMS[name], _weights(torch.complex128), check=check)


def test_real_parameters_beside_complex_samples() -> None:
    _assert_right(lambda p: COMPLEX @ p["m"].to(torch.complex128) + COMPLEX[:, :E] * p["v"], 0, _weights())


@pytest.mark.parametrize("frozen", [False, True])
def test_grouped_products(frozen: bool) -> None:
    """Rows of samples sorted by expert, one of which gets none; torch has no such product in float64."""
    torch.manual_seed(0)
    experts = nn.Parameter(torch.randn(3, 4, 8), requires_grad=not frozen)
    scale, x, ends = nn.Parameter(torch.ones(4)), torch.randn(N, 4), torch.tensor([3, 3, N], dtype=torch.int32)

    def losses(double: bool) -> Tensor:
        if double:
            parts = [(x * scale).double()[a:b] @ w.double() for w, a, b in zip(experts, (0, 3, 3), ends, strict=True)]
            return torch.cat(parts).square().sum(1)
        return F.grouped_mm(x * scale, experts, offs=ends).square().sum(1)

    params = [scale] if frozen else [experts, scale]
    rows = [torch.autograd.grad(losses(True)[t == IDS].sum(), params) for t in range(T)]
    with fastmtl.one_pass(params, IDS, T) as bank:
        losses(False).sum().backward()
    for t, row in enumerate(rows):
        for got, want in zip(bank.row(t), row, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "form",
    [
        lambda p: torch.einsum("nii,ij->nj", SQUARES, p["dk"]),
        lambda p: torch.einsum("nd,nde->ne", X, p["many"]),
        lambda p: torch.einsum("nd,ne->de", X, OUT)[:E] @ p["v"],
    ],
    ids=["diagonal", "positions of its own", "sum over the samples"],
)
def test_forms_that_are_refused(form: P) -> None:
    weights = _weights()
    match = r"meets the samples in .* and its rows can't be told"
    with pytest.raises(ValueError, match=match), fastmtl.one_pass(weights.values(), IDS, T):
        form(weights).square().sum().backward()


def test_what_has_no_layer() -> None:
    """Where the samples lie is found out by experiment. The loop takes forms that the layers refuse, too."""
    _assert_right(lambda p: torch.cdist(OUT, p["b"]), 0, _weights())
    _assert_right(lambda p: torch.kron(OUT, p["b"][:1]), 0, _weights())
    _assert_right(lambda p: torch.einsum("nii,ij->nj", SQUARES, p["dk"]), 0, _weights(), fallback="loop")
    weights = _weights()
    match = "linalg_solve is not among the layers that one_pass takes apart; linalg_solve works along the axis"
    with pytest.raises(ValueError, match=match), fastmtl.one_pass(weights.values(), IDS, T, fallback="loop"):
        torch.linalg.solve(OUT[:E], weights["v"]).sum().backward()
