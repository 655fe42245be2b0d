"""Linear layers, `y = x W^T + b` or `x W + b`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtl.ops.task_weights.cpu.weight_grads import linear_weight_grads
from fastmtl.ops.task_weights.task_linear import task_linear_weight_grad_op, task_linear_weight_grad_out_op
from fastmtl.task_gradients.one_pass.autograd.rows import (
    STACKED,
    Receiver,
    by_position,
    deliver,
    give_rows,
    receiver_of,
    rows_like,
    sum_by_row,
    takes_parts,
    unseen,
    wants,
)


class LinearByTask(torch.autograd.Function):
    """`F.linear`, or with `transposed` `x @ W`; samples lie along `axis`, `[outer, n, inner]` of them by the plan."""

    @staticmethod
    def forward(ctx, x, w, b, ids, order, offsets, axis, transposed, form_w, form_b, *targets):
        ctx.save_for_backward(x, w, ids, order, offsets)
        ctx.axis, ctx.transposed, ctx.forms = axis, transposed, (form_w, form_b)
        ctx.receiver = receiver_of(form_w, targets)
        ctx.bias_dtype = None if b is None else b.dtype
        if transposed:
            y = torch.matmul(x, w)
            return y if b is None else y + b.to(y.dtype)
        y = F.linear(x, w, b)
        # torch multiplies matrices, and returns a view of the product: nothing may be written into a view from here
        return y if y.dim() == 2 else torch.ops.aten._unsafe_view(y, y.shape)

    @unseen
    def backward(ctx, g, x, w, ids, order, offsets):
        form_w, form_b = ctx.forms
        needs = ctx.needs_input_grad
        n, num_rows = ids.shape[0], offsets.shape[0] - 1
        gx = gw = gb = rows_w = rows_b = None
        if needs[0]:
            weight = w.to(g.dtype)
            # two-dimensional, which torch otherwise does for some strides alone
            flat = torch.mm(g.reshape(-1, g.shape[-1]), weight.t() if ctx.transposed else weight)
            gx = flat.view(x.shape).to(x.dtype)
        want_rows, want_plain = wants(form_w, needs[1])
        if want_rows:
            x3, g3 = by_position(x.to(g.dtype), n), by_position(g, n)
            a, b = (g3, x3) if ctx.transposed else (x3, g3)
            bias = form_b == STACKED and not ctx.transposed
            rows_w, rows_b = deliver_linear_rows(ctx.receiver, a, b, order, offsets, w, bias)
        elif want_plain:
            x2, g2 = x.to(g.dtype).reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
            gw = (x2.mT @ g2 if ctx.transposed else g2.mT @ x2).to(w.dtype)
        want_rows, want_plain = wants(form_b, needs[2])
        if rows_b is not None:
            rows_b = rows_b.to(ctx.bias_dtype)
        elif want_rows:
            each = by_position(g, n)
            each = each[:, 0] if each.shape[1] == 1 else each.sum(1, dtype=torch.promote_types(g.dtype, torch.float32))
            rows_b = sum_by_row(each, ids, num_rows, ctx.bias_dtype)
        elif want_plain:
            promoted = torch.promote_types(g.dtype, torch.float32)
            gb = g.reshape(-1, g.shape[-1]).sum(0, dtype=promoted).to(ctx.bias_dtype)
        return (gx, gw, gb, *(None,) * 7, *give_rows(rows_w, form_w), *give_rows(rows_b, form_b))


def deliver_linear_rows(
    receiver: Receiver | None, x: Tensor, g: Tensor, order: Tensor, offsets: Tensor, w: Tensor, bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The rows, unless `receiver` has taken them; and with `bias` those of the bias, if they came with the others."""
    if x.device.type != "cpu" or not x.numel() or not g.numel() or not takes_parts(receiver):
        return deliver(receiver, linear_rows(x, g, order, offsets, w)), None
    found, sums = linear_weight_grads(x, g, order, offsets, bias)
    receiver.parts([None if row is None else row.to(w.dtype) for row in found])
    return None, sums


def linear_rows(x: Tensor, g: Tensor, order: Tensor, offsets: Tensor, w: Tensor) -> Tensor:
    """`[R, Cout, Cin]` from `x` `[n, r, Cin]` and `g` `[n, r, Cout]`, in the dtype of `w`."""
    if torch.compiler.is_compiling():
        return task_linear_weight_grad_op(x, g, order, offsets, w.dtype)
    rows = rows_like(w, offsets.shape[0] - 1)
    task_linear_weight_grad_out_op(x, g, order, offsets, rows)
    return rows
