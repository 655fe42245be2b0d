"""Batch norm by task: sums of each task's samples, then one pass that uses them; or both in one launch for small parts.

x is read in one of two layouts, as are its gradient and the results:

    IS_ROWS      [N, S, C], channels_last: rows of C channels, S of them a sample. A tile is [rows, channels].
    not IS_ROWS  [N, C, S], contiguous: a sample's S pixels of a channel side by side. A tile is [channels, pixels].

What the kernels count is *lines*: rows, or blocks of BLOCK_PIXELS pixels of all channels of a sample, in the order of
tasks, of the samples in `order` and within a sample. A tile has LINES of them: one, if not IS_ROWS. A *piece* is at
most `lines_per_piece` lines of one task, which a program walks for a block of channels. In signatures:

    p_x, p_grad, p_out      x or the incoming gradient; the result or the gradient of x
    p_weight, p_bias        [T, C] contiguous, or [C] for all tasks (task_stride 0); None
    p_mean, p_var           [T, C] contiguous
    p_order, p_offsets      [N] and [T + 1] int64
    p_first, p_second       [pieces, C] float32: mean and squared deviations, or sums of g and of g (x - mean)
    p_count                 [pieces] float32, the values of a channel in a piece
    p_terms                 [3, T, C] float32: dx = g * first + (x - mean) * second + third
    lines_per_sample        S, or blocks of pixels
    num_pixels, num_channels
                            the one that lies side by side is counted in units of WIDTH, so that the compiler knows by
                            what rows are aligned
    INT64_OFFSETS           whether counts of lines can pass 32 bits
    TB                      a power of two above the number of tasks
    b_*                     a block of values in registers
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastmtl.kernels.task_weights.tiles import find_tile

_SIZES = ["lines_per_piece", "num_tasks", "num_samples", "lines_per_sample", "num_pixels", "num_channels"]


@triton.jit
def sizes_of(num_pixels, num_channels, IS_ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Pixels and channels, of which one is counted in units of WIDTH."""
    if IS_ROWS:
        return num_pixels, num_channels * WIDTH
    else:
        return num_pixels * WIDTH, num_channels


@triton.jit
def spread(b_values, IS_ROWS: tl.constexpr):
    """[channels], along a tile."""
    if IS_ROWS:
        return b_values[None, :]
    else:
        return b_values[:, None]


@triton.jit
def tile_at(
    p_order, line, end, channel, lines_per_sample, num_pixels, num_channels,
    IS_ROWS: tl.constexpr, LINES: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
):  # fmt: skip
    """Where the elements of the tile from `line` on lie, which of them exist, and how many a channel has."""
    if IS_ROWS:
        row = line + tl.arange(0, LINES)
        there = row < end
        place = row // lines_per_sample
        sample = tl.load(p_order + place, mask=there, other=0)
        start = (sample * num_pixels + (row - place * lines_per_sample)) * num_channels
        ok = there[:, None] & (channel < num_channels)[None, :]
        return start[:, None] + channel[None, :], ok, tl.minimum(end - line, LINES).to(tl.float32)
    else:
        place = line // lines_per_sample
        sample = tl.load(p_order + place)
        first = (line - place * lines_per_sample) * BLOCK_PIXELS
        pixel = first + tl.arange(0, BLOCK_PIXELS)
        start = (sample * num_channels + channel) * num_pixels
        ok = (channel < num_channels)[:, None] & (pixel < num_pixels)[None, :]
        return start[:, None] + pixel[None, :], ok, tl.minimum(num_pixels - first, BLOCK_PIXELS).to(tl.float32)


@triton.jit
def moments(
    p_x, p_order, low, high, channel, lines_per_sample, num_pixels, num_channels,
    IS_ROWS: tl.constexpr, LINES: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
):  # fmt: skip
    """Values of a channel, their mean and their squared deviations, over the lines from `low` to `high`, at least one.

    The deviations are those from the mean of the first tile, which keeps them small beside a mean that is not.
    """
    axis: tl.constexpr = 0 if IS_ROWS else 1
    at, ok, count = tile_at(
        p_order, low, high, channel, lines_per_sample, num_pixels, num_channels, IS_ROWS, LINES, BLOCK_PIXELS
    )
    b_about = tl.sum(tl.load(p_x + at, mask=ok, other=0.0).to(tl.float32), axis=axis) / count
    b_sum = tl.zeros(ok.shape, tl.float32)
    b_square = tl.zeros(ok.shape, tl.float32)
    total = count * 0.0
    for line in range(low, high, LINES):
        at, ok, count = tile_at(
            p_order, line, high, channel, lines_per_sample, num_pixels, num_channels, IS_ROWS, LINES, BLOCK_PIXELS
        )
        b_x = tl.load(p_x + at, mask=ok, other=0.0).to(tl.float32)
        b_x = tl.where(ok, b_x - spread(b_about, IS_ROWS), 0.0)
        b_sum += b_x
        b_square += b_x * b_x
        total += count
    b_first = tl.sum(b_sum, axis=axis)
    return total, b_about + b_first / total, tl.sum(b_square, axis=axis) - b_first * (b_first / total)


@triton.jit
def products(
    p_grad, p_x, p_order, low, high, channel, b_mean, lines_per_sample, num_pixels, num_channels,
    IS_ROWS: tl.constexpr, LINES: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
):  # fmt: skip
    """Values of a channel, and the sums of g and of g (x - mean), over the lines from `low` to `high`."""
    axis: tl.constexpr = 0 if IS_ROWS else 1
    _, ok, count = tile_at(
        p_order, low, high, channel, lines_per_sample, num_pixels, num_channels, IS_ROWS, LINES, BLOCK_PIXELS
    )
    b_sum = tl.zeros(ok.shape, tl.float32)
    b_product = tl.zeros(ok.shape, tl.float32)
    total = count * 0.0
    for line in range(low, high, LINES):
        at, ok, count = tile_at(
            p_order, line, high, channel, lines_per_sample, num_pixels, num_channels, IS_ROWS, LINES, BLOCK_PIXELS
        )
        b_grad = tl.load(p_grad + at, mask=ok, other=0.0).to(tl.float32)
        b_x = tl.load(p_x + at, mask=ok, other=0.0).to(tl.float32) - spread(b_mean, IS_ROWS)
        b_sum += b_grad
        # what lies beyond the tile has a gradient of zero, times a mean that may not be finite
        b_product += tl.where(ok, b_grad * b_x, 0.0)
        total += count
    return total, tl.sum(b_sum, axis=axis), tl.sum(b_product, axis=axis)


@triton.jit
def row_of(p_table, task, task_stride, channel, mask, OTHER: tl.constexpr):
    """A task's values of some channels in float32; OTHER where there is no table, NaN where there is no task."""
    if p_table is None:
        return tl.where(mask, OTHER, float("nan"))
    else:
        at = task.to(tl.int64) * task_stride + channel
        return tl.load(p_table + at, mask=mask, other=float("nan")).to(tl.float32)


@triton.jit
def terms_of(b_scale, b_weight, b_sum, b_product, total):
    """What the gradient of x is made of, from sums over all values of a channel."""
    b_of_grad = b_scale * b_weight
    return b_of_grad, -b_of_grad * b_scale * b_scale * b_product / total, -b_of_grad * b_sum / total


@triton.jit
def apply_affine(
    p_x, p_out, p_order, low, high, channel, b_mean, b_scale, b_shift, lines_per_sample, num_pixels, num_channels,
    IS_ROWS: tl.constexpr, LINES: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
):  # fmt: skip
    """`(x - mean) scale + shift` of some lines."""
    for line in range(low, high, LINES):
        at, ok, _ = tile_at(
            p_order, line, high, channel, lines_per_sample, num_pixels, num_channels, IS_ROWS, LINES, BLOCK_PIXELS
        )
        b_x = tl.load(p_x + at, mask=ok, other=0.0).to(tl.float32) - spread(b_mean, IS_ROWS)
        b_y = b_x * spread(b_scale, IS_ROWS) + spread(b_shift, IS_ROWS)
        tl.store(p_out + at, b_y.to(p_out.dtype.element_ty), mask=ok)


@triton.jit
def apply_gradient(
    p_grad, p_x, p_out, p_order, low, high, channel, b_mean, b_of_grad, b_of_x, b_constant,
    lines_per_sample, num_pixels, num_channels,
    IS_ROWS: tl.constexpr, LINES: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
):  # fmt: skip
    """`g of_grad + (x - mean) of_x + constant` of some lines."""
    for line in range(low, high, LINES):
        at, ok, _ = tile_at(
            p_order, line, high, channel, lines_per_sample, num_pixels, num_channels, IS_ROWS, LINES, BLOCK_PIXELS
        )
        b_x = tl.load(p_x + at, mask=ok, other=0.0).to(tl.float32) - spread(b_mean, IS_ROWS)
        b_grad = tl.load(p_grad + at, mask=ok, other=0.0).to(tl.float32)
        b_dx = b_grad * spread(b_of_grad, IS_ROWS) + (b_x * spread(b_of_x, IS_ROWS) + spread(b_constant, IS_ROWS))
        tl.store(p_out + at, b_dx.to(p_out.dtype.element_ty), mask=ok)


@triton.jit
def lines_of(p_offsets, task, num_tasks, num_samples, lines_per_sample, INT64_OFFSETS: tl.constexpr):
    """First line and end of a task's; task T: samples of no task."""
    low = tl.load(p_offsets + task)
    high = tl.load(p_offsets + task + 1, mask=task < num_tasks, other=num_samples)
    if not INT64_OFFSETS:
        low = low.to(tl.int32)
        high = high.to(tl.int32)
    return low * lines_per_sample, high * lines_per_sample


# --- one launch


@triton.jit(do_not_specialize=[x for x in _SIZES if x != "lines_per_piece"] + ["weight_stride", "bias_stride"])
def task_batch_norm_fwd_kernel(
    p_x, p_weight, p_bias, p_order, p_offsets, p_mean, p_var, p_out, eps, weight_stride, bias_stride,
    num_tasks, num_samples, lines_per_sample, num_pixels, num_channels,
    IS_ROWS: tl.constexpr, LINES: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr, INT64_OFFSETS: tl.constexpr,
):  # fmt: skip
    """Statistics and result of a block of channels of one task; program T of T + 1: NaN for samples of no task."""
    task = tl.program_id(0)
    num_pixels, num_channels = sizes_of(num_pixels, num_channels, IS_ROWS, WIDTH)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    known = (task < num_tasks) & (channel < num_channels)
    low, high = lines_of(p_offsets, task, num_tasks, num_samples, lines_per_sample, INT64_OFFSETS)
    entry = task.to(tl.int64) * num_channels + channel
    if low >= high:
        tl.store(p_mean + entry, tl.zeros((BLOCK_CHANNELS,), tl.float32), mask=known)
        tl.store(p_var + entry, tl.zeros((BLOCK_CHANNELS,), tl.float32), mask=known)
    else:
        total, b_mean, b_square = moments(
            p_x, p_order, low, high, channel, lines_per_sample, num_pixels, num_channels, IS_ROWS, LINES, BLOCK_PIXELS
        )
        b_mean = tl.where(known & (total > 1.0), b_mean, float("nan"))
        b_var = tl.where(known & (total > 1.0), b_square / total, float("nan"))
        tl.store(p_mean + entry, b_mean, mask=known)
        tl.store(p_var + entry, b_var, mask=known)
        b_scale = tl.rsqrt(b_var + eps) * row_of(p_weight, task, weight_stride, channel, known, 1.0)
        b_shift = row_of(p_bias, task, bias_stride, channel, known, 0.0)
        apply_affine(
            p_x, p_out, p_order, low, high, channel, b_mean, b_scale, b_shift, lines_per_sample, num_pixels,
            num_channels, IS_ROWS, LINES, BLOCK_PIXELS,
        )  # fmt: skip


@triton.jit(do_not_specialize=[x for x in _SIZES if x != "lines_per_piece"] + ["weight_stride"])
def task_batch_norm_bwd_kernel(
    p_grad, p_x, p_weight, p_mean, p_var, p_order, p_offsets, p_out, p_grad_weight, p_grad_bias, eps, weight_stride,
    num_tasks, num_samples, lines_per_sample, num_pixels, num_channels,
    IS_ROWS: tl.constexpr, LINES: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr, INT64_OFFSETS: tl.constexpr,
):  # fmt: skip
    """All gradients of a block of channels of one task; program T of T + 1: NaN for samples of no task."""
    task = tl.program_id(0)
    num_pixels, num_channels = sizes_of(num_pixels, num_channels, IS_ROWS, WIDTH)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    known = (task < num_tasks) & (channel < num_channels)
    low, high = lines_of(p_offsets, task, num_tasks, num_samples, lines_per_sample, INT64_OFFSETS)
    entry = task.to(tl.int64) * num_channels + channel
    if low >= high:
        tl.store(p_grad_weight + entry, tl.zeros((BLOCK_CHANNELS,), tl.float32), mask=known)
        tl.store(p_grad_bias + entry, tl.zeros((BLOCK_CHANNELS,), tl.float32), mask=known)
    else:
        b_mean = row_of(p_mean, task, num_channels, channel, known, 0.0)
        b_scale = tl.rsqrt(row_of(p_var, task, num_channels, channel, known, 1.0) + eps)
        total, b_sum, b_product = products(
            p_grad, p_x, p_order, low, high, channel, b_mean, lines_per_sample, num_pixels, num_channels,
            IS_ROWS, LINES, BLOCK_PIXELS,
        )  # fmt: skip
        tl.store(p_grad_weight + entry, b_product * b_scale, mask=known)
        tl.store(p_grad_bias + entry, b_sum, mask=known)
        if p_out is not None:
            b_weight = row_of(p_weight, task, weight_stride, channel, known, 1.0)
            b_of_grad, b_of_x, b_constant = terms_of(b_scale, b_weight, b_sum, b_product, total)
            apply_gradient(
                p_grad, p_x, p_out, p_order, low, high, channel, b_mean, b_of_grad, b_of_x, b_constant,
                lines_per_sample, num_pixels, num_channels, IS_ROWS, LINES, BLOCK_PIXELS,
            )  # fmt: skip


# --- several launches: sums of pieces, their totals, and what is made with these


@triton.jit
def piece_of(
    p_offsets, piece, lines_per_piece, num_tasks, num_samples, lines_per_sample,
    INT64_OFFSETS: tl.constexpr, TB: tl.constexpr,
):  # fmt: skip
    """Task, first line and end of a piece; beyond the last piece there are no lines."""
    task, low, high = find_tile(
        p_offsets, piece, lines_per_piece, num_tasks, num_samples, lines_per_sample, INT64_OFFSETS, TB
    )
    return task, low, tl.minimum(high, low + lines_per_piece)


@triton.jit(do_not_specialize=_SIZES)
def task_batch_norm_sums_kernel(
    p_grad, p_x, p_mean, p_order, p_offsets, p_first, p_second, p_count,
    lines_per_piece, num_tasks, num_samples, lines_per_sample, num_pixels, num_channels,
    IS_ROWS: tl.constexpr, LINES: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr, INT64_OFFSETS: tl.constexpr, TB: tl.constexpr,
):  # fmt: skip
    """Of a piece the moments of x; with a gradient, the sums of it and of its products with x - mean."""
    piece = tl.program_id(0)
    num_pixels, num_channels = sizes_of(num_pixels, num_channels, IS_ROWS, WIDTH)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    task, low, high = piece_of(
        p_offsets, piece, lines_per_piece, num_tasks, num_samples, lines_per_sample, INT64_OFFSETS, TB
    )
    if (task < num_tasks) & (low < high):
        if p_grad is None:
            total, b_first, b_second = moments(
                p_x, p_order, low, high, channel, lines_per_sample, num_pixels, num_channels,
                IS_ROWS, LINES, BLOCK_PIXELS,
            )  # fmt: skip
        else:
            b_mean = row_of(p_mean, task, num_channels, channel, channel < num_channels, 0.0)
            total, b_first, b_second = products(
                p_grad, p_x, p_order, low, high, channel, b_mean, lines_per_sample, num_pixels, num_channels,
                IS_ROWS, LINES, BLOCK_PIXELS,
            )  # fmt: skip
        to = piece.to(tl.int64) * num_channels + channel
        tl.store(p_first + to, b_first, mask=channel < num_channels)
        tl.store(p_second + to, b_second, mask=channel < num_channels)
        if tl.program_id(1) == 0:
            tl.store(p_count + piece, total)


@triton.jit(do_not_specialize=["lines_per_piece", "num_tasks", "lines_per_sample", "num_channels", "weight_stride"])
def task_batch_norm_finish_kernel(
    p_first, p_second, p_count, p_offsets, p_weight, p_mean, p_var, p_terms, p_grad_weight, p_grad_bias,
    eps, weight_stride, lines_per_piece, num_tasks, lines_per_sample, num_channels,
    INT64_OFFSETS: tl.constexpr, TB: tl.constexpr, PIECES: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean and variance of a task from those of its pieces; or, of sums of gradients, what dx is made of.

    Totals are float64, and are added up in the order of the pieces.
    """
    task = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    known = channel < num_channels
    t = tl.arange(0, TB)
    inside = t < num_tasks
    lines = tl.load(p_offsets + t + 1, mask=inside, other=0) - tl.load(p_offsets + t, mask=inside, other=0)
    if not INT64_OFFSETS:
        lines = lines.to(tl.int32)
    lines = lines * lines_per_sample
    pieces = lines // lines_per_piece
    pieces += (lines > pieces * lines_per_piece).to(tl.int32)
    begin = tl.sum(tl.where(t < task, pieces, 0), 0)
    end = begin + tl.sum(tl.where(t == task, pieces, 0), 0)
    b_first = tl.zeros((BLOCK_CHANNELS,), tl.float64)
    b_second = tl.zeros((BLOCK_CHANNELS,), tl.float64)
    total = tl.zeros((BLOCK_CHANNELS,), tl.float64)
    for start in range(begin, end, PIECES):
        piece = start + tl.arange(0, PIECES)
        at = piece.to(tl.int64)[:, None] * num_channels + channel[None, :]
        ok = (piece < end)[:, None] & known[None, :]
        b_count = tl.load(p_count + piece, mask=piece < end, other=0.0).to(tl.float64)
        b_part = tl.load(p_first + at, mask=ok, other=0.0).to(tl.float64)
        total += tl.sum(b_count, axis=0)
        if p_terms is None:
            b_first += tl.sum(b_part * b_count[:, None], axis=0)
        else:
            b_first += tl.sum(b_part, axis=0)
            b_second += tl.sum(tl.load(p_second + at, mask=ok, other=0.0).to(tl.float64), axis=0)
    entry = task.to(tl.int64) * num_channels + channel
    if p_terms is None:
        b_mean = b_first / tl.where(total > 0.0, total, 1.0)
        for start in range(begin, end, PIECES):
            piece = start + tl.arange(0, PIECES)
            at = piece.to(tl.int64)[:, None] * num_channels + channel[None, :]
            ok = (piece < end)[:, None] & known[None, :]
            b_count = tl.load(p_count + piece, mask=piece < end, other=0.0).to(tl.float64)
            b_off = tl.load(p_first + at, mask=ok, other=0.0).to(tl.float64) - b_mean[None, :]
            b_off = tl.where(ok, b_off * b_off * b_count[:, None], 0.0)
            b_second += tl.sum(b_off + tl.load(p_second + at, mask=ok, other=0.0).to(tl.float64), axis=0)
        # no value: zero, as of a task without samples; a single one has no variance
        b_var = b_second / tl.where(total > 0.0, total, 1.0)
        b_mean = tl.where(total == 1.0, float("nan"), b_mean)
        b_var = tl.where(total == 1.0, float("nan"), b_var)
        tl.store(p_mean + entry, b_mean.to(tl.float32), mask=known)
        tl.store(p_var + entry, b_var.to(tl.float32), mask=known)
    else:
        here = end > begin
        b_scale = tl.rsqrt(tl.load(p_var + entry, mask=known & here, other=1.0) + eps)
        b_sum = b_first.to(tl.float32)
        b_product = b_second.to(tl.float32)
        tl.store(p_grad_weight + entry, tl.where(here, b_product * b_scale, 0.0), mask=known)
        tl.store(p_grad_bias + entry, b_sum, mask=known)
        b_weight = row_of(p_weight, task, weight_stride, channel, known, 1.0)
        count = tl.where(here, total, 1.0).to(tl.float32)
        b_of_grad, b_of_x, b_constant = terms_of(b_scale, b_weight, b_sum, b_product, count)
        plane = num_tasks.to(tl.int64) * num_channels
        tl.store(p_terms + entry, b_of_grad, mask=known)
        tl.store(p_terms + plane + entry, b_of_x, mask=known)
        tl.store(p_terms + 2 * plane + entry, b_constant, mask=known)


@triton.jit(do_not_specialize=[*_SIZES, "weight_stride", "bias_stride"])
def task_batch_norm_apply_kernel(
    p_grad, p_x, p_weight, p_bias, p_mean, p_var, p_terms, p_order, p_offsets, p_out,
    eps, weight_stride, bias_stride,
    lines_per_piece, num_tasks, num_samples, lines_per_sample, num_pixels, num_channels,
    IS_ROWS: tl.constexpr, LINES: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr, INT64_OFFSETS: tl.constexpr, TB: tl.constexpr,
):  # fmt: skip
    """The result of a piece of x; or, with a gradient, that of x from `p_terms`. Samples of no task are NaN.

    The gradient by given statistics is the result for it in place of x, without a mean and a bias.
    """
    piece = tl.program_id(0)
    num_pixels, num_channels = sizes_of(num_pixels, num_channels, IS_ROWS, WIDTH)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    task, low, high = piece_of(
        p_offsets, piece, lines_per_piece, num_tasks, num_samples, lines_per_sample, INT64_OFFSETS, TB
    )
    known = (task < num_tasks) & (channel < num_channels)
    b_mean = row_of(p_mean, task, num_channels, channel, known, 0.0)
    if p_grad is None:
        b_scale = tl.rsqrt(row_of(p_var, task, num_channels, channel, known, 1.0) + eps)
        b_scale *= row_of(p_weight, task, weight_stride, channel, known, 1.0)
        b_shift = row_of(p_bias, task, bias_stride, channel, known, 0.0)
        apply_affine(
            p_x, p_out, p_order, low, high, channel, b_mean, b_scale, b_shift, lines_per_sample, num_pixels,
            num_channels, IS_ROWS, LINES, BLOCK_PIXELS,
        )  # fmt: skip
    else:
        plane = num_tasks.to(tl.int64) * num_channels
        b_of_grad = row_of(p_terms, task, num_channels, channel, known, 0.0)
        b_of_x = row_of(p_terms + plane, task, num_channels, channel, known, 0.0)
        b_constant = row_of(p_terms + 2 * plane, task, num_channels, channel, known, 0.0)
        apply_gradient(
            p_grad, p_x, p_out, p_order, low, high, channel, b_mean, b_of_grad, b_of_x, b_constant,
            lines_per_sample, num_pixels, num_channels, IS_ROWS, LINES, BLOCK_PIXELS,
        )  # fmt: skip


# --- running statistics


@triton.jit
def held_row(p_held, p_table, task, num_channels):
    """Where a task's running statistics begin: in one `[T, C]` tensor, or by a table of addresses."""
    if p_table is None:
        return p_held + task.to(tl.int64) * num_channels
    else:
        return tl.load(p_table + task).to(tl.pointer_type(p_held.dtype.element_ty))


@triton.jit
def move_towards(p_held, b_found, share, ok):
    b_held = tl.load(p_held, mask=ok, other=0.0).to(tl.float32)
    tl.store(p_held, ((1.0 - share) * b_held + share * b_found).to(p_held.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["num_channels", "values"])
def task_batch_norm_update_kernel(
    p_mean, p_var, p_offsets,
    p_running_mean, p_mean_table, p_running_var, p_var_table, p_tracked, p_tracked_table,
    momentum, num_channels, values: tl.int64, CUMULATIVE: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Moves one task's running statistics, if it has two values or more; `values`: of a channel in a sample."""
    task = tl.program_id(0)
    count = (tl.load(p_offsets + task + 1) - tl.load(p_offsets + task)) * values
    if count > 1:
        share = momentum
        if p_tracked is not None:
            if p_tracked_table is None:
                p_own = p_tracked + task
            else:
                p_own = tl.load(p_tracked_table + task).to(tl.pointer_type(tl.int64))
            tracked = tl.load(p_own) + 1
            tl.store(p_own, tracked)
            if CUMULATIVE:
                share = 1.0 / tracked.to(tl.float32)
        p_to_mean = held_row(p_running_mean, p_mean_table, task, num_channels)
        p_to_var = held_row(p_running_var, p_var_table, task, num_channels)
        unbiased = count.to(tl.float32) / (count - 1).to(tl.float32)
        for start in range(0, num_channels, BLOCK_CHANNELS):
            channel = start + tl.arange(0, BLOCK_CHANNELS)
            ok = channel < num_channels
            at = task.to(tl.int64) * num_channels + channel
            move_towards(p_to_mean + channel, tl.load(p_mean + at, mask=ok, other=0.0), share, ok)
            move_towards(p_to_var + channel, tl.load(p_var + at, mask=ok, other=0.0) * unbiased, share, ok)
