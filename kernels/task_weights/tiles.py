"""What the convolution kernels share: how a tile finds its task, its rows and its weights.

A *row* is one pixel of one sample: the rows of a batch are counted in the order of tasks, of the samples in `order`,
and of their pixels, line by line. A tile holds rows of one task only. In signatures:

    p_*      a pointer; may be None where the argument says so
    b_*      a block of values in registers
    *_ok     a mask: which elements of a block exist
    x_*      strides of the input or its gradient,      [N, Cin, H, W]:                  x_n, x_c, x_h, x_w
    y_*      strides of the result or its gradient,     [N, Cout, Ho, Wo]:               y_n, y_c, y_h, y_w
    w_*      strides of W, of its gradient or of the workspace,
                                                        [Cout, Cin / groups, kh, kw]:    w_co, w_ci, w_kh, w_kw;
             before them w_t, from one task's slot of the workspace to the next, or w_chunk, from one sum to the next
    d_*      strides of the deltas, likewise, with d_t from task to task: 0 where p_table holds their addresses
    g_*      strides of the deltas' gradients, likewise
    MULTIPLE, W_MULTIPLE, D_MULTIPLE, G_MULTIPLE
             what divides these strides, but for those of channels (x_c, y_c, w_ci, d_ci, g_ci); see `known_multiple`
    KH, KW; SH, SW; DH, DW; pad_h, pad_w
             taps, stride, dilation and padding of the filter
    channels, features
             input and output channels of one group
    pixels   of one picture, over which rows are counted
    TB       a power of two above the number of tasks
    INT64_OFFSETS
             whether counts of rows and offsets inside a sample or a filter can pass 32 bits
    SMALL    whether a picture has 2^20 pixels at most, see `find_pixels`
    CAST     whether operands are made float32 before they are multiplied, see `launches.in_interpreter`
"""

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
def known_multiples(a, b, c, M: tl.constexpr):
    """Three strides of one tensor, see `known_multiple`."""
    return known_multiple(a, M), known_multiple(b, M), known_multiple(c, M)


@triton.jit
def find_tile(
    p_offsets,  # [T + 1]
    tile,
    rows_per_tile,
    num_tasks,
    num_samples,
    pixels,
    INT64_OFFSETS: tl.constexpr,
    TB: tl.constexpr,
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
def find_rows(
    p_order,  # [N]
    low,
    high,
    pixels,
    width,
    SMALL: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile's rows from `low` on: which are there, their samples (int64) and their pixels (h, w), each [BLOCK]."""
    row_ok = tl.arange(0, BLOCK) < high - low
    sample, h, w = find_pixels(low, pixels, width, SMALL, BLOCK)
    if INT64_OFFSETS:
        h = h.to(tl.int64)
        w = w.to(tl.int64)
    n = tl.load(p_order + sample, mask=row_ok, other=0).to(tl.int64)
    return row_ok, n, h, w


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


@triton.jit
def added_weights(
    p_w,  # [BN], where W's columns begin; None: there is no W
    p_delta,  # [BN], likewise of the task's delta; None: no task has one
    w_offset,  # [BK]
    d_offset,  # [BK]
    ok,  # [BK, BN]
    opened,
    scale,
    DTYPE: tl.constexpr,
):
    """W + s_t Delta_t of one step of the product, added in float32: [BK, BN] in the dtype of x."""
    b_eff = tl.zeros(ok.shape, tl.float32)
    if p_w is not None:
        b_eff = tl.load(p_w[None, :] + w_offset[:, None], mask=ok, other=0.0).to(tl.float32)
    if p_delta is not None:
        b_d = tl.load(p_delta[None, :] + d_offset[:, None], mask=ok & opened, other=0.0)
        # a gate that is not finite must not reach a task without a delta
        b_eff += tl.where(opened, scale, 0.0) * b_d.to(tl.float32)
    return b_eff.to(DTYPE)
