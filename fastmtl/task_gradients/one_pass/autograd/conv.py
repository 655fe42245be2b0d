"""Convolutions in one, two and three dimensions, transposed or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtl.core.task_weights import Geometry
from fastmtl.ops.task_weights.task_conv2d import (
    task_conv2d_weight_grad_op,
    task_conv2d_weight_grad_out_op,
    weight_grad_parts,
)
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


class ConvByTask(torch.autograd.Function):
    """`torch.convolution` in 1, 2 or 3 dimensions, transposed or not; samples lie along axis 0."""

    @staticmethod
    def forward(
        ctx, x, w, b, ids, order, offsets, stride, padding, dilation, transposed, output_padding, groups,
        form_w, form_b, *targets,
    ):  # fmt: skip
        ctx.save_for_backward(x, w, ids, order, offsets)
        ctx.geometry = stride, padding, dilation, transposed, output_padding, groups
        ctx.forms, ctx.bias_dtype = (form_w, form_b), None if b is None else b.dtype
        ctx.receiver = receiver_of(form_w, targets)
        return torch.convolution(x, w, b, *ctx.geometry)

    @unseen
    def backward(ctx, g, x, w, ids, order, offsets):
        form_w, form_b = ctx.forms
        needs = ctx.needs_input_grad
        n, num_rows = ids.shape[0], offsets.shape[0] - 1
        rows_w = rows_b = gb = None
        stride, padding, dilation, transposed, output_padding, groups = ctx.geometry
        want_rows, want_plain = wants(form_w, needs[1])
        gx = gw = None
        if needs[0] or want_plain:
            gx, gw, _ = torch.ops.aten.convolution_backward(
                g, x, w, None, stride, padding, dilation, transposed, output_padding, groups,
                (needs[0], want_plain, False),
            )  # fmt: skip
        if want_rows:
            # a transposed convolution is the gradient of a plain one, with input and output changing places
            source, back = (g, x) if transposed else (x, g)
            bias = form_b == STACKED and not transposed
            rows_w, rows_b = deliver_conv_rows(
                ctx.receiver, source, back, order, offsets, w, bias, stride, padding, dilation, groups
            )
        want_rows, want_plain = wants(form_b, needs[2])
        if rows_b is not None:
            rows_b = rows_b.to(ctx.bias_dtype)
        elif want_rows or want_plain:
            promoted = torch.promote_types(g.dtype, torch.float32)
            each = g.sum(tuple(range(2, g.dim())), dtype=promoted) if g.dim() > 2 else g
            if want_rows:
                rows_b = sum_by_row(by_position(each, n).sum(1), ids, num_rows, ctx.bias_dtype)
            else:
                gb = each.sum(0).to(ctx.bias_dtype)
        return (gx, gw, gb, *(None,) * 11, *give_rows(rows_w, form_w), *give_rows(rows_b, form_b))


def deliver_conv_rows(
    receiver: Receiver | None,
    x: Tensor,
    g: Tensor,
    order: Tensor,
    offsets: Tensor,
    w: Tensor,
    bias: bool,
    *geometry: Any,
) -> tuple[Tensor | None, Tensor | None]:
    """The rows, unless `receiver` has taken them; and with `bias` those of the bias, if they came with the others."""
    if w.dim() in (3, 4) and takes_parts(receiver):
        line = w.dim() == 3
        stride, padding, dilation = ([k, *v] if line else v for k, v in zip((1, 0, 1), geometry[:3], strict=True))
        if line:
            x, g, w = x.unsqueeze(2), g.unsqueeze(2), w.unsqueeze(2)
        moves = Geometry.of(stride, padding, dilation, geometry[3])
        parts = weight_grad_parts(x, g, order, offsets, moves, w, bias)
        if parts is not None:
            receiver.parts([p.squeeze(2) if line and p is not None else p for p in parts[0]])
            return None, parts[1]
        if line:
            x, g, w = x.squeeze(2), g.squeeze(2), w.squeeze(2)
    return deliver(receiver, conv_rows(x, g, order, offsets, w, *geometry)), None


def conv_rows(
    x: Tensor,
    g: Tensor,
    order: Tensor,
    offsets: Tensor,
    w: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """`[R, *w.shape]`: the weight gradient of a convolution with input x and output gradient g, by row."""
    dims = w.dim() - 2
    kernel = list(w.shape[2:])
    stride, padding, dilation = list(stride), list(padding), list(dilation)
    if dims == 1:
        # one line of pixels; contiguous, or channels that lie last stay last
        rows = conv_rows(
            x.unsqueeze(2), g.unsqueeze(2), order, offsets, w.unsqueeze(2),
            [1, *stride], [0, *padding], [1, *dilation], groups,
        )  # fmt: skip
        return rows.squeeze(3)
    if dims == 2:
        if torch.compiler.is_compiling():
            return task_conv2d_weight_grad_op(x, g, order, offsets, kernel, stride, padding, dilation, groups, w.dtype)
        rows = rows_like(w, offsets.shape[0] - 1)
        task_conv2d_weight_grad_out_op(x, g, order, offsets, stride, padding, dilation, groups, rows)
        return rows
    # three dimensions: each plane of the filter is a 2-D convolution of the planes that it meets
    depth = g.shape[2]
    inner = (order[:, None] * depth + torch.arange(depth, device=order.device)).reshape(-1)
    x = F.pad(x, (0, 0, 0, 0, padding[0], padding[0]))
    planes_g = g.movedim(2, 1).reshape(-1, g.shape[1], *g.shape[3:])
    found = []
    for k in range(kernel[0]):
        first = k * dilation[0]
        planes = x[:, :, first : first + (depth - 1) * stride[0] + 1 : stride[0]]
        planes = planes.movedim(2, 1).reshape(-1, x.shape[1], *x.shape[3:])
        found.append(
            task_conv2d_weight_grad_op(
                planes,
                planes_g,
                inner,
                offsets * depth,
                kernel[1:],
                stride[1:],
                padding[1:],
                dilation[1:],
                groups,
                w.dtype,
            )
        )
    return torch.stack(found, 3)
