"""What all tasks share in a layer with a delta for each: its weight and bias."""

from __future__ import annotations

import torch

from fastmtl.task_gradients.one_pass.autograd.conv import deliver_conv_rows
from fastmtl.task_gradients.one_pass.autograd.linear import deliver_linear_rows
from fastmtl.task_gradients.one_pass.autograd.rows import give_rows, receiver_of, sum_by_row, unseen, wants


class SharedByTask(torch.autograd.Function):
    """The rows of the weight and bias that all tasks share in a task layer, whose output `y` is handed through."""

    @staticmethod
    def forward(ctx, y, x, w, b, ids, order, offsets, geometry, form_w, form_b, *targets):
        ctx.save_for_backward(x, w, ids, order, offsets)
        ctx.geometry, ctx.forms, ctx.bias_dtype = geometry, (form_w, form_b), None if b is None else b.dtype
        ctx.receiver = receiver_of(form_w, targets)
        return y.view_as(y)

    @unseen
    def backward(ctx, g, x, w, ids, order, offsets):
        form_w, form_b = ctx.forms
        n, rows_w, rows_b = ids.shape[0], None, None
        if form_w and wants(form_w, False)[0]:
            if ctx.geometry is None:
                x3, g3 = x.reshape(n, -1, x.shape[-1]), g.reshape(n, -1, g.shape[-1])
                rows_w = deliver_linear_rows(ctx.receiver, x3, g3, order, offsets, w)
            else:
                rows_w, _ = deliver_conv_rows(ctx.receiver, x, g, order, offsets, w, False, *ctx.geometry)
        if form_b and wants(form_b, False)[0]:
            channels = g.movedim(1, -1) if ctx.geometry is not None else g
            each = channels.reshape(n, -1, channels.shape[-1]).sum(1, dtype=torch.promote_types(g.dtype, torch.float32))
            rows_b = sum_by_row(each, ids, offsets.shape[0] - 1, ctx.bias_dtype)
        return (g, *(None,) * 9, *give_rows(rows_w, form_w), *give_rows(rows_b, form_b))
