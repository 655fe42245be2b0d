"""Tables of parameters, from which samples pick rows by numbers."""

from __future__ import annotations

import math

import torch

from fastmtl.task_gradients.one_pass.autograd.rows import (
    by_position,
    deliver,
    give_rows,
    receiver_of,
    sum_by_row,
    unseen,
    wants,
)


class EmbeddingByTask(torch.autograd.Function):
    """`w[index]` for the first dimension of w; samples lie along `axis` of the index."""

    @staticmethod
    def forward(ctx, w, index, ids, padding_idx, form, num_rows, *targets):
        ctx.save_for_backward(index, ids)
        ctx.shape, ctx.dtype, ctx.padding, ctx.form, ctx.num_rows = w.shape, w.dtype, padding_idx, form, num_rows
        ctx.receiver = receiver_of(form, targets)
        return w[index]

    @unseen
    def backward(ctx, g, index, ids):
        size = ctx.shape[0]
        want_rows, want_plain = wants(ctx.form, ctx.needs_input_grad[0])
        gw = rows = None
        n = ids.shape[0]
        index = torch.where(index < 0, index + size, index)
        flat = g.reshape(index.numel(), math.prod(ctx.shape[1:]))
        if ctx.padding >= 0:
            flat = torch.where((index == ctx.padding).reshape(-1, 1), 0.0, flat)
        if want_plain:
            gw = sum_by_row(flat, index.reshape(-1), size, ctx.dtype).reshape(ctx.shape)
        elif want_rows:
            both = (ids[:, None] * size + by_position(index, n, 0)).reshape(-1)
            rows = sum_by_row(flat, both, ctx.num_rows * size, ctx.dtype).reshape(ctx.num_rows, *ctx.shape)
            rows = deliver(ctx.receiver, rows)
        return (gw, *(None,) * 5, *give_rows(rows, ctx.form))
