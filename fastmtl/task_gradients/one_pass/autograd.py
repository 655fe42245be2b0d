"""Layers whose weight gradient comes apart by task: plain forward passes, and in the backward pass `[R, ...]` rows of
each parameter where torch would give their sum.

Every function takes the parameters as plain values and after them `targets`, stand-ins that receive the rows: for each
parameter one `[R, ...]` tensor (`count` STACKED), R tensors (`count` R: the task copies of a computed parameter), or
none (`count` 0: the parameter is not in a bank and gets its own gradient). In the phase `native()` the parameters get
their plain gradient instead: the sum over the samples, weighted as the cotangents are.

Source: task t's gradient of a shared weight is the weight gradient over task t's samples (the bridge in README).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtl.core.dispatch import unavailable
from fastmtl.core.task_weights import Geometry
from fastmtl.core.tensors import is_channels_last
from fastmtl.ops.task_weights.cpu.conv2d import HUGE_BYTES, linear_weight_grads
from fastmtl.ops.task_weights.task_conv2d import (
    task_conv2d_weight_grad_op,
    task_conv2d_weight_grad_out_op,
    weight_grad_parts,
)
from fastmtl.ops.task_weights.task_linear import task_linear_weight_grad_op, task_linear_weight_grad_out_op

STACKED = -1

# process-wide: on a GPU the backward pass runs on autograd's threads
_native = [False]


@contextlib.contextmanager
def native() -> Iterator[None]:
    """Backward passes inside the block give every parameter its plain gradient, and no rows."""
    before, _native[0] = _native[0], True
    try:
        yield
    finally:
        _native[0] = before


def unseen(compute: Callable[..., Any]) -> Any:
    """The backward of a Function, `compute(ctx, g, *saved)`, whose calls no torch function mode sees.

    What unpacks the saved tensors is still seen: recomputation under checkpointing.
    """

    def backward(ctx: Any, g: Tensor) -> Any:
        saved = ctx.saved_tensors
        if torch.compiler.is_compiling():
            return compute(ctx, g, *saved)
        with torch._C.DisableTorchFunction():
            return compute(ctx, g, *saved)

    return staticmethod(backward)


def rows_like(param: Tensor, num_rows: int) -> Tensor:
    """Memory for the rows of a parameter, each in its memory order."""
    shape = (num_rows, *param.shape)
    if is_channels_last(param) and not param.is_contiguous():
        a, b, c, d = param.shape
        rows = torch.empty((num_rows, a, c, d, b), dtype=param.dtype, device=param.device).permute(0, 1, 4, 2, 3)
    else:
        rows = torch.empty(shape, dtype=param.dtype, device=param.device)
    large = rows.device.type == "cpu" and rows.nbytes >= HUGE_BYTES and not torch.compiler.is_compiling()
    if large and unavailable("cpu", "cpu") is None:
        torch.ops.fastmtl._advise_huge_pages.default(rows)
    return rows


def sum_by_row(values: Tensor, ids: Tensor, num_rows: int, dtype: torch.dtype) -> Tensor:
    """`[n, ...] -> [R, ...]`: sums of the rows of equal id, in at least float32, in a fixed order."""
    wide = torch.promote_types(values.dtype, torch.float32)
    flat = values.reshape(values.shape[0], -1).to(wide)
    if flat.shape[1] == 0 or flat.shape[0] == 0:
        return torch.zeros((num_rows, *values.shape[1:]), dtype=dtype, device=values.device)
    # the gradient of a table that the ids look up: sorted first on a GPU, so the same bits come twice
    total = torch.ops.aten.embedding_dense_backward(flat, ids, num_rows, -1, False)
    return total.to(dtype).reshape(num_rows, *values.shape[1:])


def _give(rows: Tensor | None, count: int) -> tuple[Tensor | None, ...]:
    """The rows in the form of the targets."""
    if count == STACKED:
        return (rows,)
    if rows is None:
        return (None,) * count
    return tuple(rows.unbind(0))[:count]


# the attribute of a stand-in that takes rows as they are made, one tensor for each task, past autograd
RECEIVE = "_fastmtl_receive"


def _receiver(count: int, targets: Sequence[Tensor]) -> Any:
    """What takes the parts of the first target, if that is a stand-in itself."""
    if count != STACKED or torch.compiler.is_compiling():
        return None
    return getattr(targets[0], RECEIVE, None)


def _takes_parts(receive: Any) -> bool:
    return receive is not None and receive.takes_parts()


def _deliver(receive: Any, rows: Tensor) -> Tensor | None:
    """Hands the rows over at once, if that can be: through autograd they would wait until the backward pass ends."""
    if not _takes_parts(receive):
        return rows
    receive.parts(rows)
    return None


def _wants(count: int, needs: bool) -> tuple[bool, bool]:
    """Whether the rows of a parameter, and whether its plain gradient."""
    if count == 0:
        return False, needs
    return (False, needs) if _native[0] else (True, False)


# --- linear: y = x W^T + b, or x W


class Linear(torch.autograd.Function):
    """`F.linear`, or with `transposed` `x @ W`; samples lie along `axis`, `[outer, n, inner]` of them by the plan."""

    @staticmethod
    def forward(ctx, x, w, b, ids, order, offsets, axis, transposed, count_w, count_b, *targets):
        ctx.save_for_backward(x, w, ids, order, offsets)
        ctx.axis, ctx.transposed, ctx.counts = axis, transposed, (count_w, count_b)
        ctx.receive = _receiver(count_w, targets)
        ctx.bias_dtype = None if b is None else b.dtype
        if transposed:
            y = torch.matmul(x, w)
            return y if b is None else y + b.to(y.dtype)
        return F.linear(x, w, b)

    @unseen
    def backward(ctx, g, x, w, ids, order, offsets):
        count_w, count_b = ctx.counts
        needs = ctx.needs_input_grad
        n, num_rows = ids.shape[0], offsets.shape[0] - 1
        gx = gw = gb = rows_w = rows_b = None
        if needs[0]:
            wide = w.to(g.dtype)
            # two-dimensional, which torch otherwise does for some strides alone
            flat = torch.mm(g.reshape(-1, g.shape[-1]), wide.t() if ctx.transposed else wide)
            gx = flat.view(x.shape).to(x.dtype)
        want_rows, want_own = _wants(count_w, needs[1])
        if want_rows:
            x3, g3 = x.to(g.dtype).reshape(n, -1, x.shape[-1]), g.reshape(n, -1, g.shape[-1])
            a, b = (g3, x3) if ctx.transposed else (x3, g3)
            rows_w = _linear_rows(ctx.receive, a, b, order, offsets, w)
        elif want_own:
            x2, g2 = x.to(g.dtype).reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
            gw = (x2.mT @ g2 if ctx.transposed else g2.mT @ x2).to(w.dtype)
        want_rows, want_own = _wants(count_b, needs[2])
        if want_rows:
            each = g.reshape(n, -1, g.shape[-1])
            each = each[:, 0] if each.shape[1] == 1 else each.sum(1, dtype=torch.promote_types(g.dtype, torch.float32))
            rows_b = sum_by_row(each, ids, num_rows, ctx.bias_dtype)
        elif want_own:
            wide = torch.promote_types(g.dtype, torch.float32)
            gb = g.reshape(-1, g.shape[-1]).sum(0, dtype=wide).to(ctx.bias_dtype)
        return (gx, gw, gb, *(None,) * 7, *_give(rows_w, count_w), *_give(rows_b, count_b))


def _linear_rows(receive: Any, x: Tensor, g: Tensor, order: Tensor, offsets: Tensor, w: Tensor) -> Tensor | None:
    """The rows, unless `receive` has taken them."""
    if x.device.type != "cpu" or not x.numel() or not g.numel() or not _takes_parts(receive):
        return _deliver(receive, linear_rows(x, g, order, offsets, w))
    receive.parts([None if row is None else row.to(w.dtype) for row in linear_weight_grads(x, g, order, offsets)])
    return None


def linear_rows(x: Tensor, g: Tensor, order: Tensor, offsets: Tensor, w: Tensor) -> Tensor:
    """`[R, Cout, Cin]` from `x` `[n, r, Cin]` and `g` `[n, r, Cout]`, in the dtype of `w`."""
    if torch.compiler.is_compiling():
        return task_linear_weight_grad_op(x, g, order, offsets, w.dtype)
    rows = rows_like(w, offsets.shape[0] - 1)
    task_linear_weight_grad_out_op(x, g, order, offsets, rows)
    return rows


# --- convolutions


class Conv(torch.autograd.Function):
    """`torch.convolution` in 1, 2 or 3 dimensions, transposed or not; samples lie along axis 0."""

    @staticmethod
    def forward(
        ctx, x, w, b, ids, order, offsets, stride, padding, dilation, transposed, output_padding, groups,
        count_w, count_b, *targets,
    ):  # fmt: skip
        ctx.save_for_backward(x, w, ids, order, offsets)
        ctx.geometry = stride, padding, dilation, transposed, output_padding, groups
        ctx.counts, ctx.bias_dtype = (count_w, count_b), None if b is None else b.dtype
        ctx.receive = _receiver(count_w, targets)
        return torch.convolution(x, w, b, *ctx.geometry)

    @unseen
    def backward(ctx, g, x, w, ids, order, offsets):
        count_w, count_b = ctx.counts
        needs = ctx.needs_input_grad
        n, num_rows = ids.shape[0], offsets.shape[0] - 1
        rows_w = rows_b = gb = None
        stride, padding, dilation, transposed, output_padding, groups = ctx.geometry
        want_rows, want_own = _wants(count_w, needs[1])
        gx = gw = None
        if needs[0] or want_own:
            gx, gw, _ = torch.ops.aten.convolution_backward(
                g, x, w, None, stride, padding, dilation, transposed, output_padding, groups,
                (needs[0], want_own, False),
            )  # fmt: skip
        if want_rows:
            # a transposed convolution is the gradient of a plain one, with input and output changing places
            source, back = (g, x) if transposed else (x, g)
            bias = count_b == STACKED and not transposed
            rows_w, rows_b = _conv_rows(
                ctx.receive, source, back, order, offsets, w, bias, stride, padding, dilation, groups
            )
        want_rows, want_own = _wants(count_b, needs[2])
        if rows_b is not None:
            rows_b = rows_b.to(ctx.bias_dtype)
        elif want_rows or want_own:
            wide = torch.promote_types(g.dtype, torch.float32)
            each = g.sum(tuple(range(2, g.dim())), dtype=wide) if g.dim() > 2 else g
            if want_rows:
                rows_b = sum_by_row(each.reshape(n, -1, each.shape[-1]).sum(1), ids, num_rows, ctx.bias_dtype)
            else:
                gb = each.sum(0).to(ctx.bias_dtype)
        return (gx, gw, gb, *(None,) * 11, *_give(rows_w, count_w), *_give(rows_b, count_b))


def _conv_rows(
    receive: Any, x: Tensor, g: Tensor, order: Tensor, offsets: Tensor, w: Tensor, bias: bool, *geometry: Any
) -> tuple[Tensor | None, Tensor | None]:
    """The rows, unless `receive` has taken them; and with `bias` those of the bias, if they came with the others."""
    if w.dim() in (3, 4) and _takes_parts(receive):
        line = w.dim() == 3
        stride, padding, dilation = ([k, *v] if line else v for k, v in zip((1, 0, 1), geometry[:3], strict=True))
        if line:
            x, g, w = x.unsqueeze(2), g.unsqueeze(2), w.unsqueeze(2)
        moves = Geometry.of(stride, padding, dilation, geometry[3])
        parts = weight_grad_parts(x, g, order, offsets, moves, w, bias)
        if parts is not None:
            receive.parts([p.squeeze(2) if line and p is not None else p for p in parts[0]])
            sums = [torch.zeros(w.shape[0], dtype=g.dtype) if each is None else each for each in parts[1]]
            return None, torch.stack(sums) if bias else None
        if line:
            x, g, w = x.squeeze(2), g.squeeze(2), w.squeeze(2)
    return _deliver(receive, conv_rows(x, g, order, offsets, w, *geometry)), None


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


class Shared(torch.autograd.Function):
    """The rows of the weight and bias that all tasks share in a task layer, whose output `y` is handed through."""

    @staticmethod
    def forward(ctx, y, x, w, b, ids, order, offsets, geometry, count_w, count_b, *targets):
        ctx.save_for_backward(x, w, ids, order, offsets)
        ctx.geometry, ctx.counts, ctx.bias_dtype = geometry, (count_w, count_b), None if b is None else b.dtype
        ctx.receive = _receiver(count_w, targets)
        return y.view_as(y)

    @unseen
    def backward(ctx, g, x, w, ids, order, offsets):
        count_w, count_b = ctx.counts
        n, rows_w, rows_b = ids.shape[0], None, None
        if count_w and _wants(count_w, False)[0]:
            if ctx.geometry is None:
                x3, g3 = x.reshape(n, -1, x.shape[-1]), g.reshape(n, -1, g.shape[-1])
                rows_w = _linear_rows(ctx.receive, x3, g3, order, offsets, w)
            else:
                rows_w, _ = _conv_rows(ctx.receive, x, g, order, offsets, w, False, *ctx.geometry)
        if count_b and _wants(count_b, False)[0]:
            channels = g.movedim(1, -1) if ctx.geometry is not None else g
            each = channels.reshape(n, -1, channels.shape[-1]).sum(1, dtype=torch.promote_types(g.dtype, torch.float32))
            rows_b = sum_by_row(each, ids, offsets.shape[0] - 1, ctx.bias_dtype)
        return (g, *(None,) * 9, *_give(rows_w, count_w), *_give(rows_b, count_b))


# --- tables: rows of a parameter picked by numbers


class Embedding(torch.autograd.Function):
    """`w[index]` for the first dimension of w; samples lie along `axis` of the index."""

    @staticmethod
    def forward(ctx, w, index, ids, padding_idx, count, num_rows, *targets):
        ctx.save_for_backward(index, ids)
        ctx.shape, ctx.dtype, ctx.padding, ctx.count, ctx.num_rows = w.shape, w.dtype, padding_idx, count, num_rows
        ctx.receive = _receiver(count, targets)
        return w[index]

    @unseen
    def backward(ctx, g, index, ids):
        size = ctx.shape[0]
        want_rows, want_own = _wants(ctx.count, ctx.needs_input_grad[0])
        gw = rows = None
        n = ids.shape[0]
        index = torch.where(index < 0, index + size, index)
        flat = g.reshape(index.numel(), -1)
        if ctx.padding >= 0:
            flat = torch.where((index == ctx.padding).reshape(-1, 1), 0.0, flat)
        if want_own:
            gw = sum_by_row(flat, index.reshape(-1), size, ctx.dtype).reshape(ctx.shape)
        elif want_rows:
            both = (ids[:, None] * size + index.reshape(n, -1)).reshape(-1)
            rows = sum_by_row(flat, both, ctx.num_rows * size, ctx.dtype).reshape(ctx.num_rows, *ctx.shape)
            rows = _deliver(ctx.receive, rows)
        return (gw, *(None,) * 5, *_give(rows, ctx.count))


# --- parameters that meet the samples by broadcasting


class Expand(torch.autograd.Function):
    """A parameter with a new or single axis, on which every sample gets its own copy: no memory, a view."""

    @staticmethod
    def forward(ctx, p, ids, axis, count, num_rows, *targets):
        """`p` has size 1 at `axis`."""
        ctx.save_for_backward(ids)
        ctx.axis, ctx.count, ctx.num_rows, ctx.dtype, ctx.shape = axis, count, num_rows, p.dtype, p.shape
        size = list(p.shape)
        size[axis] = ids.shape[0]
        return p.expand(size)

    @unseen
    def backward(ctx, g, ids):
        want_rows, want_own = _wants(ctx.count, ctx.needs_input_grad[0])
        gp = rows = None
        if want_own:
            gp = g.sum(ctx.axis, keepdim=True, dtype=torch.promote_types(g.dtype, torch.float32)).to(ctx.dtype)
        elif want_rows:
            rows = sum_by_row(g.movedim(ctx.axis, 0), ids, ctx.num_rows, ctx.dtype)
            rows = rows.reshape(ctx.num_rows, *ctx.shape)
        return (gp, *(None,) * 4, *_give(rows, ctx.count))


class PerSample(torch.autograd.Function):
    """A value computed from parameters that has a part for every sample along `axis`."""

    @staticmethod
    def forward(ctx, p, ids, axis, count, num_rows, *targets):
        ctx.save_for_backward(ids)
        ctx.axis, ctx.count, ctx.num_rows = axis, count, num_rows
        return p.view_as(p)

    @unseen
    def backward(ctx, g, ids):
        want_rows, want_own = _wants(ctx.count, ctx.needs_input_grad[0])
        rows = None
        if want_rows:
            shape = [1] * g.dim()
            shape[ctx.axis] = -1
            rows = torch.stack([torch.where((ids == t).reshape(shape), g, 0.0) for t in range(ctx.num_rows)])
        return (g if want_own else None, *(None,) * 4, *_give(rows, ctx.count))


# --- norms


def of_several(y: Tensor) -> Tensor:
    """One of several results of an op: torch.compile lets none have attributes when a Function returns it."""
    return y.clone() if torch.compiler.is_compiling() else y


class LayerNorm(torch.autograd.Function):
    """`F.layer_norm` with weight and bias; samples lie along `axis`, before the normalised dimensions."""

    @staticmethod
    def forward(ctx, x, w, b, ids, axis, shape, eps, count_w, count_b, num_rows, *targets):
        y, mean, rstd = torch.native_layer_norm(x, shape, w, b, eps)
        y = of_several(y)
        ctx.save_for_backward(x, w, b, mean, rstd, ids)
        ctx.shape, ctx.counts, ctx.num_rows = shape, (count_w, count_b), num_rows
        return y

    @unseen
    def backward(ctx, g, x, w, b, mean, rstd, ids):
        needs = ctx.needs_input_grad
        rows, own = zip(*(_wants(c, need) for c, need in zip(ctx.counts, needs[1:3], strict=True)), strict=True)
        gx, gw, gb = torch.ops.aten.native_layer_norm_backward(
            g, x, ctx.shape, mean, rstd, w, b, (needs[0], own[0], own[1])
        )
        n = ids.shape[0]
        rows_w = rows_b = None
        wide = torch.promote_types(g.dtype, torch.float32)
        if rows[0]:
            product = ((x.to(wide) - mean) * rstd).mul_(g)
            each = product.reshape(n, -1, *ctx.shape).sum(1)
            rows_w = sum_by_row(each, ids, ctx.num_rows, w.dtype)
        if rows[1]:
            each = g.reshape(n, -1, *ctx.shape).sum(1, dtype=wide)
            rows_b = sum_by_row(each, ids, ctx.num_rows, b.dtype)
        return (gx, gw, gb, *(None,) * 7, *_give(rows_w, ctx.counts[0]), *_give(rows_b, ctx.counts[1]))


class GroupNorm(torch.autograd.Function):
    """`F.group_norm` with weight and bias; samples lie along axis 0."""

    @staticmethod
    def forward(ctx, x, w, b, ids, groups, eps, count_w, count_b, num_rows, *targets):
        n, c = x.shape[:2]
        # the CPU alone has a kernel for channels_last
        if x.device.type != "cpu" or not is_channels_last(x):
            x = x.contiguous()
        size = x.numel() // (n * c)
        y, mean, rstd = torch.native_group_norm(x, w, b, n, c, size, groups, eps)
        y = of_several(y)
        ctx.save_for_backward(x, w, mean, rstd, ids)
        ctx.groups, ctx.size, ctx.counts, ctx.num_rows = groups, size, (count_w, count_b), num_rows
        ctx.bias_dtype = None if b is None else b.dtype
        return y

    @unseen
    def backward(ctx, g, x, w, mean, rstd, ids):
        needs = ctx.needs_input_grad
        rows, own = zip(*(_wants(c, need) for c, need in zip(ctx.counts, needs[1:3], strict=True)), strict=True)
        n, c = x.shape[:2]
        if not g.is_contiguous() and (g.device.type != "cpu" or not is_channels_last(g)):
            g = g.contiguous()
        rows_w = rows_b = None
        gx = gw = gb = None
        if (rows[0] or rows[1]) and g.is_contiguous() and x.is_contiguous():
            # with samples and channels in one dimension, what torch sums over samples stays apart
            gx, each_w, each_b = torch.ops.aten.native_group_norm_backward(
                g.view(1, n * c, -1), x.view(1, n * c, -1), mean.view(1, -1), rstd.view(1, -1),
                None if w is None else w.repeat(n), 1, n * c, ctx.size, n * ctx.groups,
                (needs[0], rows[0], rows[1]),
            )  # fmt: skip
            gx = None if gx is None else gx.view(x.shape)
            if rows[0]:
                rows_w = sum_by_row(each_w.view(n, c), ids, ctx.num_rows, w.dtype)
            if rows[1]:
                rows_b = sum_by_row(each_b.view(n, c), ids, ctx.num_rows, ctx.bias_dtype)
            return (gx, gw, gb, *(None,) * 6, *_give(rows_w, ctx.counts[0]), *_give(rows_b, ctx.counts[1]))
        gx, gw, gb = torch.ops.aten.native_group_norm_backward(
            g, x, mean, rstd, w, n, c, ctx.size, ctx.groups, (needs[0], own[0], own[1])
        )
        if rows[0] or rows[1]:
            ds, db = channel_sums(g, x, rows[0])
            if rows[0]:
                each = c // ctx.groups
                centre, scale = mean.repeat_interleave(each, 1), rstd.repeat_interleave(each, 1)
                rows_w = sum_by_row((ds - centre * db) * scale, ids, ctx.num_rows, w.dtype)
            if rows[1]:
                rows_b = sum_by_row(db, ids, ctx.num_rows, ctx.bias_dtype)
        return (gx, gw, gb, *(None,) * 6, *_give(rows_w, ctx.counts[0]), *_give(rows_b, ctx.counts[1]))


class BatchNorm(torch.autograd.Function):
    """`F.batch_norm` with weight and bias; samples lie along axis 0."""

    @staticmethod
    def forward(ctx, x, w, b, ids, running, training, momentum, eps, count_w, count_b, num_rows, *targets):
        mean, var = running
        y, saved_mean, saved_rstd = torch.native_batch_norm(x, w, b, mean, var, training, momentum, eps)
        y = of_several(y)
        ctx.save_for_backward(x, w, saved_mean, saved_rstd, ids, mean, var)
        ctx.training, ctx.eps, ctx.counts, ctx.num_rows = training, eps, (count_w, count_b), num_rows
        ctx.bias_dtype = None if b is None else b.dtype
        return y

    @unseen
    def backward(ctx, g, x, w, saved_mean, saved_rstd, ids, mean, var):
        needs = ctx.needs_input_grad
        rows, own = zip(*(_wants(c, need) for c, need in zip(ctx.counts, needs[1:3], strict=True)), strict=True)
        gx, gw, gb = torch.ops.aten.native_batch_norm_backward(
            g, x, w, mean, var, saved_mean, saved_rstd, ctx.training, ctx.eps, (needs[0], own[0], own[1])
        )
        rows_w = rows_b = None
        if rows[0] or rows[1]:
            ds, db = channel_sums(g, x, rows[0])
            if rows[0]:
                centre = saved_mean if ctx.training else mean
                scale = saved_rstd if ctx.training else (var + ctx.eps).rsqrt()
                rows_w = sum_by_row((ds - centre * db) * scale, ids, ctx.num_rows, w.dtype)
            if rows[1]:
                rows_b = sum_by_row(db, ids, ctx.num_rows, ctx.bias_dtype)
        return (gx, gw, gb, *(None,) * 8, *_give(rows_w, ctx.counts[0]), *_give(rows_b, ctx.counts[1]))


def channel_sums(g: Tensor, x: Tensor, both: bool) -> tuple[Tensor | None, Tensor]:
    """`sum(g * x)` (if `both`) and `sum(g)` over the pixels, `[n, C]`."""
    wide = torch.promote_types(g.dtype, torch.float32)
    pixels = tuple(range(2, g.dim()))
    if not pixels:
        return (g.to(wide) * x if both else None), g.to(wide)
    return ((g.to(wide) * x).sum(pixels) if both else None), g.sum(pixels, dtype=wide)


# --- the ends of the graph


class Collect(torch.autograd.Function):
    """The stand-in of a parameter for its rows, `[R, ...]` without memory: what arrives there goes to `receive`."""

    @staticmethod
    def forward(ctx, token, param, num_rows, receive):
        ctx.receive = receive
        ctx.set_materialize_grads(False)  # no zeros where all rows went to `receive` by parts
        return param.detach().expand(num_rows, *param.shape)

    @unseen
    def backward(ctx, g):
        if g is not None:
            ctx.receive(g)
        return None, None, None, None


class Place:
    """Where samples flow together into a loss: keeps the cotangent that arrived there."""

    def __init__(self) -> None:
        self.cotangent: Tensor | None = None


class Boundary(torch.autograd.Function):
    """Nothing, but a place in the graph."""

    @staticmethod
    def forward(ctx, x, place):
        ctx.place = place
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        ctx.place.cotangent = g if ctx.place.cotangent is None else ctx.place.cotangent + g
        return g, None
