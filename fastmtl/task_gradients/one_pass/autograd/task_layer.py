"""What all tasks share in a layer with a delta for each: its weight and bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmtl.core.autograd import no_view
from fastmtl.task_gradients.one_pass.autograd.conv import deliver_conv_rows
from fastmtl.task_gradients.one_pass.autograd.linear import deliver_linear_rows
from fastmtl.task_gradients.one_pass.autograd.rows import (
    by_position,
    give_rows,
    receiver_of,
    sum_by_row,
    unseen,
    wants,
)


class SharedByTask(torch.autograd.Function):
    """The rows of the weight and bias that all tasks share in a task layer, whose output `y` is handed through.

    The layer itself has run with detached ones: a plain gradient, where that is wanted, comes from here, too.
    """

    @staticmethod
    def forward(ctx, y, x, w, b, ids, order, offsets, geometry, form_w, form_b, *targets):
        ctx.save_for_backward(x, w, ids, order, offsets)
        ctx.geometry, ctx.forms, ctx.bias_dtype = geometry, (form_w, form_b), None if b is None else b.dtype
        ctx.receiver = receiver_of(form_w, targets)
        return no_view(y)

    @unseen
    def backward(ctx, g, x, w, ids, order, offsets):
        form_w, form_b = ctx.forms
        needs = ctx.needs_input_grad
        n, gw, gb, rows_w, rows_b = ids.shape[0], None, None, None, None
        want_rows, want_plain = wants(form_w, needs[2])
        if want_plain:
            gw = _weight_gradient(x, g, w, ctx.geometry)
        elif want_rows:
            if ctx.geometry is None:
                x3, g3 = by_position(x, n), by_position(g, n)
                rows_w, _ = deliver_linear_rows(ctx.receiver, x3, g3, order, offsets, w, False)
            else:
                rows_w, _ = deliver_conv_rows(ctx.receiver, x, g, order, offsets, w, False, *ctx.geometry)
        want_rows, want_plain = wants(form_b, needs[3])
        if want_rows or want_plain:
            channels = g.movedim(1, -1) if ctx.geometry is not None else g
            each = by_position(channels, n).sum(1, dtype=torch.promote_types(g.dtype, torch.float32))
            if want_plain:
                gb = each.sum(0).to(ctx.bias_dtype)
            else:
                rows_b = sum_by_row(each, ids, offsets.shape[0] - 1, ctx.bias_dtype)
        return (g, None, gw, gb, *(None,) * 6, *give_rows(rows_w, form_w), *give_rows(rows_b, form_b))


def _weight_gradient(x: Tensor, g: Tensor, w: Tensor, geometry: tuple[Any, ...] | None) -> Tensor:
    """Of a convolution with that geometry, or of a linear layer."""
    x = x.to(g.dtype)
    if geometry is None:
        return (g.reshape(-1, g.shape[-1]).mT @ x.reshape(-1, x.shape[-1])).to(w.dtype)
    stride, padding, dilation, groups = geometry
    _, found, _ = torch.ops.aten.convolution_backward(
        g, x, w.to(g.dtype), None, stride, padding, dilation, False, [0, 0], groups, (False, True, False)
    )
    return found.to(w.dtype)
