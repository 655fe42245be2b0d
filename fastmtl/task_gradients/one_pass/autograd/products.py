"""Parameters in products that are no linear layers: stacked matrices, several operands, complex numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl.core.autograd import no_view
from fastmtl.core.tensors import as_real
from fastmtl.ops.task_weights.task_plan import task_plan_op
from fastmtl.task_gradients.one_pass.autograd.linear import linear_rows
from fastmtl.task_gradients.one_pass.autograd.rows import deliver, give_rows, receiver_of, unseen, wants
from fastmtl.task_gradients.one_pass.equations import Equation, contracted, narrowed, sizes_of_letters


class ProductByTask(torch.autograd.Function):
    """The rows of one operand of a product whose result `y` is handed through.

    The product has run with a detached operand: a plain gradient, where that is wanted, comes from here, too.
    """

    @staticmethod
    def forward(ctx, y, p, ids, order, offsets, equation, place, letter, form, *others_and_targets):
        """`p` is the operand at `place` of the equation, the others follow in their order, `letter` is the samples'."""
        others = others_and_targets[: len(equation.terms) - 1]
        ctx.save_for_backward(p, ids, order, offsets, *others)
        ctx.equation, ctx.place, ctx.letter, ctx.form = equation, place, letter, form
        ctx.receiver = receiver_of(form, others_and_targets[len(others) :])
        return no_view(y)

    @unseen
    def backward(ctx, g, p, ids, order, offsets, *others):
        want_rows, want_plain = wants(ctx.form, ctx.needs_input_grad[1])
        gp = rows = None
        if want_plain:
            one = torch.zeros_like(ids), torch.arange(len(ids), device=ids.device), offsets[[0, -1]]
            gp = _rows(g, p, others, ctx.equation, ctx.place, ctx.letter, *one[1:])[0]
        elif want_rows:
            rows = _rows(g, p, others, ctx.equation, ctx.place, ctx.letter, order, offsets)
            rows = deliver(ctx.receiver, rows)
        nothing = (None,) * (7 + len(others))
        return (g, gp, *nothing, *give_rows(rows, ctx.form))


def _rows(
    g: Tensor,
    p: Tensor,
    others: Sequence[Tensor],
    equation: Equation,
    place: int,
    letter: str,
    order: Tensor,
    offsets: Tensor,
) -> Tensor:
    """`[R, ...]`: the gradient of p by the segments of the samples, products of matrices."""
    operands = list(others)
    operands.insert(place, p)
    sizes = sizes_of_letters(equation, operands)
    pairs = [narrowed(term, x, sizes) for term, x in zip(equation.terms, operands, strict=True)]
    own = pairs.pop(place)[0]
    known = own + equation.result
    terms, factors = [term for term, _ in pairs], [x.to(g.dtype) for _, x in pairs]
    term, x = contracted(terms, [f.conj() if f.is_complex() else f for f in factors], known)
    # a letter of p is summed with x, is one of the result's alone, of both, or of p alone
    batch = [c for c in own if c in term and c in equation.result]
    summed = [c for c in own if c in term and c not in equation.result]
    free = [c for c in own if c not in term and c in equation.result]
    beside = [c for c in equation.result if c not in own and c != letter]

    def canonical(x: Tensor, letters: str, last: Sequence[str]) -> Tensor:
        """`[batch, n, beside, last]`."""
        x = torch.einsum(str(Equation((letters,), "".join([*batch, letter, *beside, *last]))), x)
        return x.reshape(*(math.prod(sizes[c] for c in part) for part in (batch, letter, beside, last)))

    a, b = canonical(x, term, summed), canonical(g, equation.result, free)
    rows = torch.stack([_segment_products(*pair, order, offsets) for pair in zip(a, b, strict=True)], 1)
    # [R, batch, free, summed], and the order of p
    made = [*batch, *free, *summed]
    rows = rows.reshape(rows.shape[0], *(sizes[c] for c in made))
    lone = [c for c in own if c not in made]
    rows = rows.reshape(*rows.shape, *(1 for _ in lone)).expand(*rows.shape, *(sizes[c] for c in lone))
    rows = rows.permute(0, *(1 + [*made, *lone].index(c) for c in own)).reshape(-1, *p.shape)
    if rows.is_complex() and not p.is_complex():
        rows = rows.real
    return rows.to(p.dtype).contiguous()


def _segment_products(x: Tensor, g: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """`[R, E, D]` from `x` `[n, s, D]` and `g` `[n, s, E]`: for each segment the sum of `g^T x`."""
    if not g.is_complex():
        like = g.new_empty(g.shape[-1], x.shape[-1])
        return linear_rows(x, g, order, offsets, like)
    x, g = (as_real(v).movedim(-1, -2).flatten(-2) for v in (x, g))
    parts = linear_rows(x.contiguous(), g.contiguous(), order, offsets, g.new_empty(g.shape[-1], x.shape[-1]))
    (rr, ri), (ir, ii) = (half.chunk(2, -1) for half in parts.chunk(2, -2))
    return torch.complex(rr - ii, ri + ir)


class GroupedByTask(torch.autograd.Function):
    """The rows of stacked matrices `p` `[K, D, E]`, of which each multiplies a part of the sorted rows of `x`."""

    @staticmethod
    def forward(ctx, y, p, x, ends, ids, form, num_rows, *targets):
        """`y` is the product, handed through; `ends` `[K]`: behind the rows of `x` of each matrix."""
        ctx.save_for_backward(p, x, ends, ids)
        ctx.form, ctx.num_rows = form, num_rows
        ctx.receiver = receiver_of(form, targets)
        return no_view(y)

    @unseen
    def backward(ctx, g, p, x, ends, ids):
        want_rows, want_plain = wants(ctx.form, ctx.needs_input_grad[1])
        gp = rows = None
        if want_plain:
            gp = _grouped_rows(g, p, x, ends, torch.zeros_like(ids), 1)[0]
        elif want_rows:
            rows = deliver(ctx.receiver, _grouped_rows(g, p, x, ends, ids, ctx.num_rows))
        return (g, gp, *(None,) * 5, *give_rows(rows, ctx.form))


def _grouped_rows(g: Tensor, p: Tensor, x: Tensor, ends: Tensor, ids: Tensor, num_rows: int) -> Tensor:
    """`[R, K, D, E]`: a segment for each matrix and row of the bank, and one for what no matrix multiplies."""
    count = p.shape[0]
    matrix = torch.searchsorted(ends.to(ids.dtype), torch.arange(len(ids), device=ids.device), right=True)
    segment = torch.where(matrix < count, matrix * num_rows + ids, count * num_rows)
    order, offsets = task_plan_op(segment, count * num_rows + 1)
    like = p.new_empty(p.shape[1:])
    found = linear_rows(g.unsqueeze(1), x.to(g.dtype).unsqueeze(1), order, offsets, like)[:-1]
    return found.reshape(count, num_rows, *p.shape[1:]).transpose(0, 1).contiguous()
