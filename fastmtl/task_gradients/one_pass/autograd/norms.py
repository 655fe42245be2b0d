"""Layer, group and batch norm with their weights and biases."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmtl.core.task_weights import SortedBatch
from fastmtl.core.tensors import is_channels_last
from fastmtl.ops.task_weights.cpu.norm_grads import can_take, group_norm_backward, layer_norm_backward
from fastmtl.task_gradients.one_pass.autograd.rows import by_position, give_rows, sum_by_row, unseen, wants


def _one_of_several(y: Tensor) -> Tensor:
    """One of several results of an op: torch.compile lets none have attributes when a Function returns it."""
    return y.clone() if torch.compiler.is_compiling() else y


class LayerNormByTask(torch.autograd.Function):
    """`F.layer_norm` with weight and bias; samples lie before the normalised dimensions, as the plan says."""

    @staticmethod
    def forward(ctx, x, w, b, ids, order, offsets, shape, eps, form_w, form_b, *targets):
        y, mean, rstd = torch.native_layer_norm(x, shape, w, b, eps)
        y = _one_of_several(y)
        ctx.save_for_backward(x, w, b, mean, rstd, ids, order, offsets)
        ctx.shape, ctx.forms = shape, (form_w, form_b)
        return y

    @unseen
    def backward(ctx, g, x, w, b, mean, rstd, ids, order, offsets):
        needs, num_rows = ctx.needs_input_grad, offsets.shape[0] - 1
        rows, plain = zip(*(wants(c, need) for c, need in zip(ctx.forms, needs[1:3], strict=True)), strict=True)
        if any(rows) and not any(plain) and can_take(g, x, mean, rstd, w):
            batch, wanted = SortedBatch(order, offsets), (needs[0], *rows)
            gx, rows_w, rows_b = layer_norm_backward(g, x, ctx.shape, mean, rstd, w, batch, wanted)
            return (gx, *(None,) * 9, *give_rows(rows_w, ctx.forms[0]), *give_rows(rows_b, ctx.forms[1]))
        gx, gw, gb = torch.ops.aten.native_layer_norm_backward(
            g, x, ctx.shape, mean, rstd, w, b, (needs[0], plain[0], plain[1])
        )
        n = ids.shape[0]
        rows_w = rows_b = None
        promoted = torch.promote_types(g.dtype, torch.float32)
        if rows[0]:
            product = ((x.to(promoted) - mean) * rstd).mul_(g)
            each = by_position(product, n, len(ctx.shape)).sum(1)
            rows_w = sum_by_row(each, ids, num_rows, w.dtype)
        if rows[1]:
            each = by_position(g, n, len(ctx.shape)).sum(1, dtype=promoted)
            rows_b = sum_by_row(each, ids, num_rows, b.dtype)
        return (gx, gw, gb, *(None,) * 7, *give_rows(rows_w, ctx.forms[0]), *give_rows(rows_b, ctx.forms[1]))


class GroupNormByTask(torch.autograd.Function):
    """`F.group_norm` with weight and bias; samples lie along axis 0."""

    @staticmethod
    def forward(ctx, x, w, b, ids, order, offsets, groups, eps, form_w, form_b, *targets):
        n, c = x.shape[:2]
        # the CPU alone has a kernel for channels_last
        x = _in_order_of(x, x) if x.device.type == "cpu" else x.contiguous()
        size = math.prod(x.shape[2:])
        y, mean, rstd = torch.native_group_norm(x, w, b, n, c, size, groups, eps)
        y = _one_of_several(y)
        ctx.save_for_backward(x, w, mean, rstd, ids, order, offsets)
        ctx.groups, ctx.size, ctx.forms = groups, size, (form_w, form_b)
        ctx.bias_dtype = None if b is None else b.dtype
        return y

    @unseen
    def backward(ctx, g, x, w, mean, rstd, ids, order, offsets):
        needs, num_rows = ctx.needs_input_grad, offsets.shape[0] - 1
        rows, plain = zip(*(wants(c, need) for c, need in zip(ctx.forms, needs[1:3], strict=True)), strict=True)
        n, c = x.shape[:2]
        g = _in_order_of(x, g)  # torch's kernel takes the order of x for that of both
        if any(rows) and not any(plain) and can_take(g, x, mean, rstd, w):
            batch, wanted = SortedBatch(order, offsets), (needs[0], *rows)
            gx, rows_w, rows_b = group_norm_backward(g, x, mean, rstd, w, batch, ctx.groups, wanted)
            return (gx, *(None,) * 9, *give_rows(rows_w, ctx.forms[0]), *give_rows(rows_b, ctx.forms[1]))
        rows_w = rows_b = None
        gx = gw = gb = None
        if (rows[0] or rows[1]) and x.numel() and g.is_contiguous() and x.is_contiguous():
            # with samples and channels in one dimension, what torch sums over samples stays apart
            gx, each_w, each_b = torch.ops.aten.native_group_norm_backward(
                g.view(1, n * c, -1), x.view(1, n * c, -1), mean.view(1, -1), rstd.view(1, -1),
                None if w is None else w.repeat(n), 1, n * c, ctx.size, n * ctx.groups,
                (needs[0], rows[0], rows[1]),
            )  # fmt: skip
            gx = None if gx is None else gx.view(x.shape)
            if rows[0]:
                rows_w = sum_by_row(each_w.view(n, c), ids, num_rows, w.dtype)
            if rows[1]:
                rows_b = sum_by_row(each_b.view(n, c), ids, num_rows, ctx.bias_dtype)
            return (gx, gw, gb, *(None,) * 7, *give_rows(rows_w, ctx.forms[0]), *give_rows(rows_b, ctx.forms[1]))
        if needs[0] or any(plain):
            # of what is channels_last, torch's kernel writes the gradient of x whether it is asked for or not
            gx, gw, gb = torch.ops.aten.native_group_norm_backward(
                g, x, mean, rstd, w, n, c, ctx.size, ctx.groups, (True, plain[0], plain[1])
            )
        if rows[0] or rows[1]:
            ds, db = _channel_sums(g, x, rows[0])
            if rows[0]:
                each = c // ctx.groups
                centre, scale = mean.repeat_interleave(each, 1), rstd.repeat_interleave(each, 1)
                rows_w = sum_by_row((ds - centre * db) * scale, ids, num_rows, w.dtype)
            if rows[1]:
                rows_b = sum_by_row(db, ids, num_rows, ctx.bias_dtype)
        return (gx, gw, gb, *(None,) * 7, *give_rows(rows_w, ctx.forms[0]), *give_rows(rows_b, ctx.forms[1]))


class BatchNormByTask(torch.autograd.Function):
    """`F.batch_norm` with weight and bias; samples lie along axis 0."""

    @staticmethod
    def forward(ctx, x, w, b, ids, running, training, momentum, eps, form_w, form_b, num_rows, *targets):
        mean, var = running
        y, saved_mean, saved_rstd = torch.native_batch_norm(x, w, b, mean, var, training, momentum, eps)
        y = _one_of_several(y)
        ctx.save_for_backward(x, w, saved_mean, saved_rstd, ids, mean, var)
        ctx.training, ctx.eps, ctx.forms, ctx.num_rows = training, eps, (form_w, form_b), num_rows
        ctx.bias_dtype = None if b is None else b.dtype
        return y

    @unseen
    def backward(ctx, g, x, w, saved_mean, saved_rstd, ids, mean, var):
        needs = ctx.needs_input_grad
        rows, plain = zip(*(wants(c, need) for c, need in zip(ctx.forms, needs[1:3], strict=True)), strict=True)
        centre = saved_mean if ctx.training else mean
        scale = saved_rstd if ctx.training else (var + ctx.eps).rsqrt()
        gx = gw = gb = rows_w = rows_b = None
        if needs[0] and ctx.training:
            # in one memory order: torch's kernel on the CPU takes some pairs of two for the same
            gx, _, _ = torch.ops.aten.native_batch_norm_backward(
                _in_order_of(x, g), _in_order_of(x, x), w, mean, var, saved_mean, saved_rstd, True, ctx.eps,
                (True, False, False),
            )  # fmt: skip
        elif needs[0]:
            factor = scale if w is None else scale * w
            gx = (g * factor.view(-1, *(1,) * (g.dim() - 2))).to(x.dtype)
        weight, bias = rows[0] or plain[0], rows[1] or plain[1]
        if weight or bias:
            ds, db = _channel_sums(g, x, weight)
            each = (ds - centre * db) * scale if weight else None
            if rows[0]:
                rows_w = sum_by_row(each, ids, ctx.num_rows, w.dtype)
            elif plain[0]:
                gw = each.sum(0).to(w.dtype)
            if rows[1]:
                rows_b = sum_by_row(db, ids, ctx.num_rows, ctx.bias_dtype)
            elif plain[1]:
                gb = db.sum(0).to(ctx.bias_dtype)
        return (gx, gw, gb, *(None,) * 8, *give_rows(rows_w, ctx.forms[0]), *give_rows(rows_b, ctx.forms[1]))


def _in_order_of(x: Tensor, y: Tensor) -> Tensor:
    """`y`, of the shape of `x`, with its channels last if they are last in `x`, and else contiguous."""
    last = x.dim() == 4 and is_channels_last(x)
    return y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _channel_sums(g: Tensor, x: Tensor, both: bool) -> tuple[Tensor | None, Tensor]:
    """`sum(g * x)` (if `both`) and `sum(g)` over the pixels, `[n, C]`."""
    promoted = torch.promote_types(g.dtype, torch.float32)
    pixels = tuple(range(2, g.dim()))
    if not pixels:
        return (g.to(promoted) * x if both else None), g.to(promoted)
    return ((g.to(promoted) * x).sum(pixels) if both else None), g.sum(pixels, dtype=promoted)
