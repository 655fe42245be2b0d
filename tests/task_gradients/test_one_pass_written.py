"""What is written in place: parameters into samples, and samples into views of one another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases_one_pass import IDS, N, T, assert_rows
from torch import Tensor, nn

import fastmtl

L, D = 6, 4
MASK = torch.rand(N, L, generator=torch.Generator().manual_seed(0)) > 0.5
X = torch.randn(N, L, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Written(nn.Module):
    """A linear layer, and parameters that are written into its result: one word, three words, one number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.word = nn.Linear(D, D), nn.Parameter(torch.randn(D))
        self.words, self.number = nn.Parameter(torch.randn(3, D)), nn.Parameter(torch.randn(()))
        self.register_buffer("kept", torch.zeros(N, L, D))


Form = Callable[[Written, Tensor], Tensor]


def _set(index: Any, value: Callable[[Written], Tensor]) -> Form:
    def form(m: Written, h: Tensor) -> Tensor:
        h = h * 1
        h[index] = value(m)
        return h

    return form


def _filled(m: Written, h: Tensor) -> Tensor:
    out = torch.zeros_like(X)
    out[MASK] = h[MASK]
    out[~MASK] = m.word
    return out


def _constant(m: Written, h: Tensor) -> Tensor:
    out = X.new_zeros(N, L, D)
    out[MASK] = 2 * m.word
    return h + out


def _data(m: Written, h: Tensor) -> Tensor:
    x = X.clone()
    x[MASK] = m.word
    return h * m.first(x)


def _transposed(m: Written, h: Tensor) -> Tensor:
    h = (h * 1).transpose(0, 1)
    h[1:3] = m.word
    return h.transpose(0, 1)


def _view(m: Written, h: Tensor) -> Tensor:
    h = h * 1
    h[:, 1:][:, 2] = m.word
    return h


def _copied(m: Written, h: Tensor) -> Tensor:
    h = h * 1
    h[:, 1:].index_copy_(1, torch.tensor([3, 0]), m.words[1:].expand(N, 2, D))
    return h


def _part_added(m: Written, h: Tensor) -> Tensor:
    several = torch.stack([h, 2 * h, 3 * h])
    several[1:] += h
    several[-1] *= m.word
    return m.first(several).transpose(0, 1)


def _permuted(m: Written, h: Tensor) -> Tensor:
    several = torch.stack([h, 2 * h]).permute(0, 2, 1, 3)
    several += h.transpose(0, 1)
    return m.first(several).movedim(2, 0)


FORMS: dict[str, Form] = {
    "a mask": _set(MASK, lambda m: m.word),
    "a mask of elements": _set(MASK[:, :, None].expand(N, L, D), lambda m: m.number),
    "a slice": _set((slice(None), slice(1, 4)), lambda m: m.words * 2),
    "the last numbers": _set((..., -1), lambda m: m.number),
    "by numbers": _set((slice(None), torch.tensor([0, 3])), lambda m: m.word),
    "some samples": _set(torch.tensor([0, 3, 5]), lambda m: m.word),
    "one sample": _set(3, lambda m: m.word),
    "one number of samples that lie last": lambda m, h: _set((..., 3), lambda m: m.number)(m, h.sum((1, 2))),
    "everywhere": _set(slice(None), lambda m: m.word),
    "memory that is filled": _filled,
    "a constant": _constant,
    "data": _data,
    "transposed": _transposed,
    "a view": _view,
    "added by numbers": lambda m, h: (h * 1).index_add_(1, torch.tensor([5, 0]), m.words[:2].expand(N, 2, D)),
    "copied into a view": _copied,
    "in turn by a mask": lambda m, h: (h * 1).masked_scatter_(MASK[:, :, None], m.word.repeat(int(MASK.sum()))),
    "a part is added to": _part_added,
    "a permuted view is added to": _permuted,
}


def _losses(form: Form, model: Written) -> Tensor:
    return form(model, model.first(X)).reshape(N, -1).square().sum(1)


@pytest.mark.parametrize("memory", ["bank", "stream"])
@pytest.mark.parametrize("name", FORMS)
def test_rows_equal_a_backward_pass_per_task(name: str, memory: str) -> None:
    model = Written().double()
    params, losses = list(model.parameters()), _losses(FORMS[name], model)
    rows = []
    for t in range(T):
        found = torch.autograd.grad(losses[t == IDS].sum(), params, retain_graph=True, allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)])
    with fastmtl.one_pass(model, IDS, T, memory=memory) as bank:
        _losses(FORMS[name], model).sum().backward()
    if memory == "bank":
        assert_rows(bank, rows)
    flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    torch.testing.assert_close(bank.apply("sum").gram, flat @ flat.T)


def _kept(m: Written, h: Tensor) -> Tensor:
    m.kept[MASK] = m.word
    return h + m.kept


def _own_rows(m: Written, h: Tensor) -> Tensor:
    h = h * 1
    h[torch.tensor([0, 3, 5])] = m.words[:, None]
    return h


@pytest.mark.parametrize(
    ("form", "match"),
    [
        (_kept, "written into a tensor of the model"),
        (_own_rows, "its own positions would lie along the axis of the samples"),
    ],
    ids=["a buffer", "a word for each sample"],
)
def test_what_is_refused(form: Form, match: str) -> None:
    model = Written().double()
    with pytest.raises(ValueError, match=match), fastmtl.one_pass(model, IDS, T):
        _losses(form, model).sum().backward()
