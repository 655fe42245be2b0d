"""What the task kernels share: finding a tile's task, its gate and its delta; and staging of `W + s_t Delta_t`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def multiply(a, b, acc, CAST: tl.constexpr):
    """a b + acc. float32 as three tf32 products: one alone truncates; CAST: see `launches.in_interpreter`."""
    if CAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def known_multiple(x, M: tl.constexpr):
    """x, seen by the compiler as a multiple of M; the launcher has made sure of it (M = 1: it has not)."""
    if M == 1:
        return x
    else:
        return x // M * M


@triton.jit
def find_tile(
    p_offsets, tile, rows_per_tile, num_tasks, num_samples, pixels, INT64_OFFSETS: tl.constexpr, TB: tl.constexpr
):
    """Task, first row and end of the task's rows, of a tile of rows (sample, pixel) that holds no other task.

    Task T is that of samples whose ids are out of range; beyond the last tile there are no rows.
    """
    t = tl.arange(0, TB)
    begin = tl.load(p_offsets + t, mask=t <= num_tasks, other=num_samples)
    end = tl.load(p_offsets + t + 1, mask=t < num_tasks, other=num_samples)
    if not INT64_OFFSETS:
        begin = begin.to(tl.int32)
        end = end.to(tl.int32)
    rows = (end - begin) * pixels
    tiles = rows // rows_per_tile
    # not rounded up by adding before the division, which could pass 32 bits
    tiles += (rows > tiles * rows_per_tile).to(tl.int32)
    last = tl.cumsum(tiles, 0)
    task = tl.sum((last <= tile).to(tl.int32), 0)
    here = t == task
    first = tl.sum(tl.where(here, last - tiles, 0), 0)
    low = tl.sum(tl.where(here, begin, 0), 0) * pixels + (tile - first) * rows_per_tile
    high = tl.sum(tl.where(here, end, 0), 0) * pixels
    low = tl.where(task > num_tasks, high, low)
    return task, low, high


@triton.jit
def quotient(x, y):
    """x // y for 0 <= x < 2^20 + 2^16 and y > 0 in a few instructions.

    x + 1/2 is at least 1 / (2 y) of the quotient away from where it would be rounded otherwise, and the product is off
    by less than 5/4 * 2^-22 of itself: by less than that where x < 1.6 million.
    """
    return ((x.to(tl.float32) + 0.5) * (1.0 / y.to(tl.float32))).to(tl.int32)


@triton.jit
def find_pixels(low, pixels, width, SMALL: tl.constexpr, BLOCK: tl.constexpr):
    """Place in the order of samples, and pixel (h, w), of BLOCK rows from `low` on. SMALL: of 2^20 pixels at most."""
    first = low // pixels
    # of the sample that `low` is in, and perhaps of those that follow
    row = low - first * pixels + tl.arange(0, BLOCK)
    if SMALL:
        row = row.to(tl.int32)
        sample = quotient(row, pixels)
        row -= sample * pixels
        h = quotient(row, width)
    else:
        sample = row // pixels
        row -= sample * pixels
        h = row // width
    return first + sample, h, row - h * width


@triton.jit
def steps_of(rows, pixels, width):
    """How far `rows` rows further is, as samples, lines and columns of a picture; for `advance`."""
    samples = rows // pixels
    rows -= samples * pixels
    lines = rows // width
    return samples, lines, rows - lines * width


@triton.jit
def advance(sample, h, w, samples, lines, columns, height, width):
    """The place of rows (sample, h, w) after `steps_of`, without a division."""
    w += columns
    over = w >= width
    w = tl.where(over, w - width, w)
    h += lines + over.to(tl.int32)
    over = h >= height
    h = tl.where(over, h - height, h)
    return sample + samples + over.to(tl.int32), h, w


@triton.jit
def task_scale(p_gate, task, num_tasks):
    """s_t in float32: 1 without gates, 0 for samples of no task."""
    if p_gate is None:
        return (task < num_tasks).to(tl.float32)
    else:
        return tl.load(p_gate + task, mask=task < num_tasks, other=0.0).to(tl.float32)


@triton.jit
def has_delta(p_delta, p_table, task, num_tasks):
    if p_delta is None:
        return task < 0
    elif p_table is None:
        return task < num_tasks
    else:
        return tl.load(p_table + task, mask=task < num_tasks, other=0) != 0


@triton.jit
def delta_pointer(p_delta, p_table, task, num_tasks, d_t, MULTIPLE: tl.constexpr):
    """Where task's delta begins: in one `[T, ...]` tensor, or by the table. To be read only if the task has one.

    MULTIPLE: of the strides, see `known_multiple`; more than 1: the table's addresses are multiples of 16 bytes.
    """
    if p_table is None:
        return p_delta + task.to(tl.int64) * known_multiple(d_t, MULTIPLE)
    else:
        # a null pointer where there is none: loads through it are masked
        p = tl.load(p_table + task, mask=task < num_tasks, other=0).to(tl.pointer_type(p_delta.dtype.element_ty))
        if MULTIPLE > 1:
            p = tl.multiple_of(p, 16)
        return p


@triton.jit(do_not_specialize=["num_tasks"])
def stage_kernel(
    p_out,
    p_w,
    p_delta,
    p_table,
    p_gate,
    p_offsets,
    num_tasks,
    channels,
    rows,
    w_co,
    w_ci,
    w_kh,
    w_kw,
    d_t,
    d_co,
    d_ci,
    d_kh,
    d_kw,
    KH: tl.constexpr,
    KW: tl.constexpr,
    MULTIPLE: tl.constexpr,
    W_MULTIPLE: tl.constexpr,
    D_MULTIPLE: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
):
    """`[T + 1, Cout, kh, kw, Cin / groups]`: W + s_t Delta_t of the tasks that need one, and W itself in slot T.

    MULTIPLE: of channels; W_MULTIPLE, D_MULTIPLE: of the strides, but for that of the input channels.
    """
    channels = known_multiple(channels, MULTIPLE)
    rows = known_multiple(rows, MULTIPLE)
    w_co = known_multiple(w_co, W_MULTIPLE)
    w_kh = known_multiple(w_kh, W_MULTIPLE)
    w_kw = known_multiple(w_kw, W_MULTIPLE)
    d_co = known_multiple(d_co, D_MULTIPLE)
    d_kh = known_multiple(d_kh, D_MULTIPLE)
    d_kw = known_multiple(d_kw, D_MULTIPLE)
    task = tl.program_id(1)
    scale = task_scale(p_gate, task, num_tasks)
    opened = has_delta(p_delta, p_table, task, num_tasks) & (scale != 0)
    if p_delta is not None:
        begin = tl.load(p_offsets + task, mask=task < num_tasks, other=0)
        end = tl.load(p_offsets + task + 1, mask=task < num_tasks, other=0)
        opened = opened & (end > begin)
    if opened | (task == num_tasks):
        block = tl.program_id(0)
        if INT64_OFFSETS:
            block = block.to(tl.int64)
        row = block * BR + tl.arange(0, BR)
        tap = tl.arange(0, BT)
        if INT64_OFFSETS:
            tap = tap.to(tl.int64)
        co = row // channels
        ci = row % channels
        if KH * KW == 1:
            # the compiler does not see that the only tap is 0, and would load single elements
            kh = tl.zeros((BT,), tl.int32)
            kw = kh
        else:
            kh = tap // KW
            kw = tap - kh * KW
        inside = (row < rows)[:, None] & (tap < KH * KW)[None, :]
        value = tl.zeros((BR, BT), tl.float32)
        if p_w is not None:
            offset = (co * w_co + ci * w_ci)[:, None] + (kh * w_kh + kw * w_kw)[None, :]
            value = tl.load(p_w + offset, mask=inside, other=0.0).to(tl.float32)
        if p_delta is not None:
            p_d = delta_pointer(p_delta, p_table, task, num_tasks, d_t, D_MULTIPLE)
            offset = (co * d_co + ci * d_ci)[:, None] + (kh * d_kh + kw * d_kw)[None, :]
            d = tl.load(p_d + offset, mask=inside & opened, other=0.0).to(tl.float32)
            value += tl.where(opened, scale * d, 0.0)
        p = p_out + task.to(tl.int64) * rows * (KH * KW)
        target = (co * (KH * KW * channels) + ci)[:, None] + (tap * channels)[None, :]
        tl.store(p + target, value.to(p_out.dtype.element_ty), mask=inside)
