"""Parameters that meet the samples by broadcasting."""

from __future__ import annotations

import torch

from fastmtl.task_gradients.one_pass.autograd.rows import give_rows, sum_by_row, unseen, wants


class ExpandByTask(torch.autograd.Function):
    """A parameter with a new or single axis, on which every sample gets its own copy: no memory, a view."""

    @staticmethod
    def forward(ctx, p, ids, axis, form, num_rows, *targets):
        """`p` has size 1 at `axis`."""
        ctx.save_for_backward(ids)
        ctx.axis, ctx.form, ctx.num_rows, ctx.dtype, ctx.shape = axis, form, num_rows, p.dtype, p.shape
        size = list(p.shape)
        size[axis] = ids.shape[0]
        return p.expand(size)

    @unseen
    def backward(ctx, g, ids):
        want_rows, want_plain = wants(ctx.form, ctx.needs_input_grad[0])
        gp = rows = None
        if want_plain:
            gp = g.sum(ctx.axis, keepdim=True, dtype=torch.promote_types(g.dtype, torch.float32)).to(ctx.dtype)
        elif want_rows:
            rows = sum_by_row(g.movedim(ctx.axis, 0), ids, ctx.num_rows, ctx.dtype)
            rows = rows.reshape(ctx.num_rows, *ctx.shape)
        return (gp, *(None,) * 4, *give_rows(rows, ctx.form))


class SplitByTask(torch.autograd.Function):
    """A value computed from parameters that has a part for every sample along `axis`."""

    @staticmethod
    def forward(ctx, p, ids, axis, form, num_rows, *targets):
        ctx.save_for_backward(ids)
        ctx.axis, ctx.form, ctx.num_rows = axis, form, num_rows
        return p.view_as(p)

    @unseen
    def backward(ctx, g, ids):
        want_rows, want_plain = wants(ctx.form, ctx.needs_input_grad[0])
        rows = None
        if want_rows:
            shape = [1] * g.dim()
            shape[ctx.axis] = -1
            rows = torch.stack([torch.where((ids == t).reshape(shape), g, 0.0) for t in range(ctx.num_rows)])
        return (g if want_plain else None, *(None,) * 4, *give_rows(rows, ctx.form))
