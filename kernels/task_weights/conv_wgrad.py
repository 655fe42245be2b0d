"""Gradients of W, the deltas, the gates and the bias: the products dY^T X of each task's rows, in order of tasks.

Sums have a fixed order: no atomics. *walk*: a block owns a tile of the filter and walks the tasks. *split*: blocks
also share the rows; their parts are added up by `wgrad_finish_kernel`.

For names, strides and shapes see `tiles.py`. A tile of the filter is [BM output channels, BN columns], a column being a
pair (tap, ci); it is a product over rows (output pixels), in steps of BP rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastmtl.kernels.task_weights.tiles import (
    advance,
    delta_pointer,
    find_pixels,
    find_tile,
    has_delta,
    known_multiple,
    known_multiples,
    multiply,
    steps_of,
    task_scale,
)


@triton.jit
def filter_columns(tile, channels, pad_h, pad_w, KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr,
                   DW: tl.constexpr, PACKED: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """The columns (tap, ci) of a tile: ci, kh, kw, which exist, and how the input pixel is moved.

    PACKED: a tile spans taps, and all are vectors. Else kh, kw and the moves are single numbers.
    """
    if PACKED:
        flat = tile * BN + tl.arange(0, BN)
        tap = flat // channels
        ci = flat % channels
        ok = flat < KH * KW * channels
    else:
        blocks = tl.cdiv(channels, BN)
        # the compiler does not see that the only tap is 0, and would load single elements
        tap = tile // blocks if KH * KW > 1 else 0
        ci = (tile - tap * blocks) * BN + tl.arange(0, BN)
        ok = ci < channels
    kh = tap // KW
    kw = tap % KW
    return ci, kh, kw, ok, kh * DH - pad_h, kw * DW - pad_w


@triton.jit
def filter_tile(
    features, channels, pad_h, pad_w,
    KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, PACKED: tl.constexpr,
    INT64_OFFSETS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The program's tile (axis 0) of a group's filter (axis 1): its output channels and which exist, each [BM]; and its
    columns, see `filter_columns`.
    """
    blocks_m = tl.cdiv(features, BM)
    tile = tl.program_id(0) // blocks_m
    if INT64_OFFSETS:
        tile = tile.to(tl.int64)
    f = (tl.program_id(0) - tile * blocks_m) * BM + tl.arange(0, BM)
    co = tl.program_id(1) * features + f
    ci, kh, kw, column_ok, move_h, move_w = filter_columns(
        tile, channels, pad_h, pad_w, KH, KW, DH, DW, PACKED, BN
    )  # fmt: skip
    return co, f < features, ci, kh, kw, column_ok, move_h, move_w


@triton.jit
def rows_product(
    p_x, p_dy, p_order, low, high, co, co_ok, channel, column_ok, move_h, move_w,
    height, width, out_width, pixels, x_n, x_c, x_h, x_w, y_n, y_c, y_h, y_w,
    SH: tl.constexpr, SW: tl.constexpr, PACKED: tl.constexpr, PADDED: tl.constexpr, SMALL: tl.constexpr,
    INT64_OFFSETS: tl.constexpr, CAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """sum over rows of dy[row, co] x[row moved by the column's tap, ci]: [BM, BN] in float32."""
    acc = tl.zeros((BM, BN), tl.float32)
    moved_y = co * y_c
    moved_x = channel * x_c + move_h * x_h + move_w * x_w
    # where samples have no pixels no row is read, but these are divided by
    pixels = tl.maximum(pixels, 1)
    out_width = tl.maximum(out_width, 1)
    out_height = pixels // out_width
    samples, lines, columns = steps_of(tl.full((), BP, tl.int32), pixels, out_width)
    row = tl.arange(0, BP)
    sample, oh, ow = find_pixels(low, pixels, out_width, SMALL, BP)
    # known a step ahead, so that what is loaded by it can be under way before the step begins
    n = tl.load(p_order + sample, mask=row < high - low, other=0)
    for first in range(low, high, BP):
        row_ok = row < high - first
        at_h = oh.to(tl.int64) if INT64_OFFSETS else oh
        at_w = ow.to(tl.int64) if INT64_OFFSETS else ow
        p_y = p_dy + n * y_n + (at_h * y_h + at_w * y_w)
        a = tl.load(p_y[:, None] + moved_y[None, :], mask=row_ok[:, None] & co_ok[None, :], other=0.0)
        inside = row_ok[:, None]
        if PADDED:
            if PACKED:
                ih = (oh * SH)[:, None] + move_h[None, :]
                iw = (ow * SW)[:, None] + move_w[None, :]
            else:
                ih = (oh * SH + move_h)[:, None]
                iw = (ow * SW + move_w)[:, None]
            inside = inside & (ih >= 0) & (ih < height) & (iw >= 0) & (iw < width)
        p_in = p_x + n * x_n + (at_h * SH * x_h + at_w * SW * x_w)
        b = tl.load(p_in[:, None] + moved_x[None, :], mask=inside & column_ok[None, :], other=0.0)
        sample, oh, ow = advance(sample, oh, ow, samples, lines, columns, out_height, out_width)
        n = tl.load(p_order + sample, mask=row < high - first - BP, other=0)
        acc = multiply(tl.trans(a), b, acc, CAST)
    return acc


@triton.jit
def needs_product(p_grad, p_grad_table, p_partial, p_dw, scale, task, num_tasks):
    """Whether anything is wanted of a task's product: a closed gate alone needs none for its delta."""
    if p_partial is not None or p_dw is not None:
        return task < num_tasks
    else:
        return has_delta(p_grad, p_grad_table, task, num_tasks) & (scale != 0)


@triton.jit
def emit(
    acc, ok, filter_offset, delta_offset, task, num_tasks, scale, present, partial,
    p_delta, p_table, d_t, p_grad, p_grad_table, g_t, p_partial,
    D_MULTIPLE: tl.constexpr, G_MULTIPLE: tl.constexpr,
):  # fmt: skip
    """At a task's end: s_t dW_eff into its delta's gradient, and the tile's part of <dW_eff, Delta_t>."""
    if p_partial is not None:
        with_delta = has_delta(p_delta, p_table, task, num_tasks) & present
        p_d = delta_pointer(p_delta, p_table, task, num_tasks, d_t, D_MULTIPLE)
        d = tl.load(p_d + delta_offset, mask=ok & with_delta, other=0.0).to(tl.float32)
        tl.store(p_partial + partial, tl.sum(tl.where(ok & with_delta, acc * d, 0.0)))
    if p_grad is not None:
        wanted = has_delta(p_grad, p_grad_table, task, num_tasks)
        p_g = delta_pointer(p_grad, p_grad_table, task, num_tasks, g_t, G_MULTIPLE)
        value = tl.where(present & (scale != 0), acc * scale, 0.0)
        tl.store(p_g + filter_offset, value.to(p_grad.dtype.element_ty), mask=ok & wanted)


@triton.jit(do_not_specialize=["num_tasks", "chunk_tasks", "height", "width", "out_width", "pixels"])
def task_conv2d_wgrad_walk_kernel(
    p_x,  # [N, Cin, H, W]
    p_dy,  # [N, Cout, Ho, Wo]
    p_order,  # [N]
    p_offsets,  # [T + 1]
    p_gate,  # [T]; None: all ones
    p_delta,  # [T, Cout, Cin / groups, kh, kw], or any delta of a list; None: no task has one
    p_table,  # [T] addresses of a list's deltas, 0: none; None: p_delta is one tensor
    p_grad,  # the deltas' gradients, as p_delta; None: not wanted
    p_grad_table,  # as p_table, of p_grad
    p_partial,  # [T, tiles] float32: the tiles' parts of the gates' gradients; None: not wanted
    p_dw,  # [chunks, Cout, Cin / groups, kh, kw], or W's gradient itself; None: not wanted
    num_tasks,
    chunk_tasks,
    height,
    width,
    out_width,
    pixels,
    channels,
    features,
    pad_h,
    pad_w,
    x_n,
    x_c,
    x_h,
    x_w,
    y_n,
    y_c,
    y_h,
    y_w,
    d_t,
    d_co,
    d_ci,
    d_kh,
    d_kw,
    g_t,
    g_co,
    g_ci,
    g_kh,
    g_kw,
    w_chunk,
    w_co,
    w_ci,
    w_kh,
    w_kw,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    PACKED: tl.constexpr,
    PADDED: tl.constexpr,
    MULTIPLE: tl.constexpr,
    W_MULTIPLE: tl.constexpr,
    D_MULTIPLE: tl.constexpr,
    G_MULTIPLE: tl.constexpr,
    SMALL: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
    CAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
):
    """A tile (co, (tap, ci)) of the filter, over a chunk of the tasks (program axis 2), one after another.

    p_dw: the sum over the chunk's tasks. w_*: its strides. The rest as in `task_conv2d_fwd_kernel`.
    """
    channels = known_multiple(channels, MULTIPLE)
    features = known_multiple(features, MULTIPLE)
    x_n, x_h, x_w = known_multiples(x_n, x_h, x_w, MULTIPLE)
    y_n, y_h, y_w = known_multiples(y_n, y_h, y_w, MULTIPLE)
    d_co, d_kh, d_kw = known_multiples(d_co, d_kh, d_kw, D_MULTIPLE)
    g_co, g_kh, g_kw = known_multiples(g_co, g_kh, g_kw, G_MULTIPLE)
    w_chunk = known_multiple(w_chunk, W_MULTIPLE)
    w_co, w_kh, w_kw = known_multiples(w_co, w_kh, w_kw, W_MULTIPLE)
    group = tl.program_id(1)
    chunk = tl.program_id(2)
    co, f_ok, ci, kh, kw, column_ok, move_h, move_w = filter_tile(
        features, channels, pad_h, pad_w, KH, KW, DH, DW, PACKED, INT64_OFFSETS, BM, BN
    )
    ok = f_ok[:, None] & column_ok[None, :]
    delta_offset = (co * d_co)[:, None] + (ci * d_ci + kh * d_kh + kw * d_kw)[None, :]
    grad_offset = (co * g_co)[:, None] + (ci * g_ci + kh * g_kh + kw * g_kw)[None, :]
    tiles = tl.num_programs(0) * tl.num_programs(1)

    if p_dw is not None:
        total = tl.zeros((BM, BN), tl.float32)
    first_task = chunk * chunk_tasks
    for k in range(0, tl.minimum(chunk_tasks, num_tasks - first_task)):
        task = first_task + k
        begin = tl.load(p_offsets + task)
        end = tl.load(p_offsets + task + 1)
        scale = task_scale(p_gate, task, num_tasks)
        low = begin * pixels
        high = tl.where(needs_product(p_grad, p_grad_table, p_partial, p_dw, scale, task, num_tasks), end, begin)
        high = high * pixels
        if not INT64_OFFSETS:
            low = low.to(tl.int32)
            high = high.to(tl.int32)
        acc = rows_product(
            p_x, p_dy, p_order, low, high, co, f_ok, group * channels + ci, column_ok, move_h, move_w,
            height, width, out_width, pixels, x_n, x_c, x_h, x_w, y_n, y_c, y_h, y_w,
            SH, SW, PACKED, PADDED, SMALL, INT64_OFFSETS, CAST, BM, BN, BP,
        )  # fmt: skip
        partial = task.to(tl.int64) * tiles + group * tl.num_programs(0) + tl.program_id(0)
        emit(
            acc, ok, grad_offset, delta_offset, task, num_tasks, scale, end > begin, partial,
            p_delta, p_table, d_t, p_grad, p_grad_table, g_t, p_partial, D_MULTIPLE, G_MULTIPLE,
        )  # fmt: skip
        if p_dw is not None:
            total += acc
    if p_dw is not None:
        offset = (co * w_co)[:, None] + (ci * w_ci + kh * w_kh + kw * w_kw)[None, :]
        p_out = p_dw + chunk.to(tl.int64) * w_chunk
        tl.store(p_out + offset, total.to(p_dw.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["num_samples", "num_tasks", "split_rows", "height", "width", "out_width", "pixels"])
def task_conv2d_wgrad_split_kernel(
    p_x,  # [N, Cin, H, W]
    p_dy,  # [N, Cout, Ho, Wo]
    p_order,  # [N]
    p_offsets,  # [T + 1]
    p_gate,  # [T]; None: all ones
    p_grad,  # the deltas' gradients, as p_delta; None: not wanted
    p_grad_table,  # as p_table, of p_grad
    p_parts,  # [splits, Cout, kh, kw, Cin / groups] float32
    num_samples,
    num_tasks,
    split_rows,
    height,
    width,
    out_width,
    pixels,
    channels,
    features,
    pad_h,
    pad_w,
    x_n,
    x_c,
    x_h,
    x_w,
    y_n,
    y_c,
    y_h,
    y_w,
    size,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    DELTA_ONLY: tl.constexpr,
    PACKED: tl.constexpr,
    PADDED: tl.constexpr,
    MULTIPLE: tl.constexpr,
    SMALL: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
    CAST: tl.constexpr,
    TB: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
):
    """A tile of the filter over `split_rows` rows of one task (program axis 2): p_parts[split, co, tap, ci].

    DELTA_ONLY: nothing but the deltas' gradients is wanted, so that closed gates need no product.
    """
    channels = known_multiple(channels, MULTIPLE)
    features = known_multiple(features, MULTIPLE)
    x_n, x_h, x_w = known_multiples(x_n, x_h, x_w, MULTIPLE)
    y_n, y_h, y_w = known_multiples(y_n, y_h, y_w, MULTIPLE)
    group = tl.program_id(1)
    split = tl.program_id(2)
    task, low, high = find_tile(p_offsets, split, split_rows, num_tasks, num_samples, pixels, INT64_OFFSETS, TB)
    if (low >= high) | (task >= num_tasks):
        return
    if DELTA_ONLY:
        scale = task_scale(p_gate, task, num_tasks)
        if not (has_delta(p_grad, p_grad_table, task, num_tasks) & (scale != 0)):
            return
    high = low + tl.minimum(high - low, split_rows)
    co, f_ok, ci, kh, kw, column_ok, move_h, move_w = filter_tile(
        features, channels, pad_h, pad_w, KH, KW, DH, DW, PACKED, INT64_OFFSETS, BM, BN
    )
    acc = rows_product(
        p_x, p_dy, p_order, low, high, co, f_ok, group * channels + ci, column_ok, move_h, move_w,
        height, width, out_width, pixels, x_n, x_c, x_h, x_w, y_n, y_c, y_h, y_w,
        SH, SW, PACKED, PADDED, SMALL, INT64_OFFSETS, CAST, BM, BN, BP,
    )  # fmt: skip
    offset = (co * (KH * KW * channels))[:, None] + (ci + (kh * KW + kw) * channels)[None, :]
    p_out = p_parts + split.to(tl.int64) * size
    tl.store(p_out + offset, acc, mask=f_ok[:, None] & column_ok[None, :])


@triton.jit(do_not_specialize=["num_tasks", "chunk_tasks", "pixels", "split_rows"])
def wgrad_finish_kernel(
    p_parts,  # [splits, Cout, kh, kw, Cin / groups] float32
    p_offsets,  # [T + 1]
    p_gate,  # [T]; None: all ones
    p_delta,  # [T, Cout, Cin / groups, kh, kw], or any delta of a list; None: no task has one
    p_table,  # [T] addresses of a list's deltas, 0: none; None: p_delta is one tensor
    p_grad,  # the deltas' gradients, as p_delta; None: not wanted
    p_grad_table,  # as p_table, of p_grad
    p_partial,  # [T, tiles] float32: the tiles' parts of the gates' gradients; None: not wanted
    p_dw,  # [chunks, Cout, Cin / groups, kh, kw], or W's gradient itself; None: not wanted
    num_tasks,
    chunk_tasks,
    pixels,
    split_rows,
    channels,
    size,
    d_t,
    d_co,
    d_ci,
    d_kh,
    d_kw,
    g_t,
    g_co,
    g_ci,
    g_kh,
    g_kw,
    w_chunk,
    w_co,
    w_ci,
    w_kh,
    w_kw,
    KH: tl.constexpr,
    KW: tl.constexpr,
    MULTIPLE: tl.constexpr,
    W_MULTIPLE: tl.constexpr,
    D_MULTIPLE: tl.constexpr,
    G_MULTIPLE: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
    TB: tl.constexpr,
    BE: tl.constexpr,
):
    """Adds up the splits of each task of a chunk (program axis 1), and does with them what the walk does.

    MULTIPLE: of channels; the rest as in the walk.
    """
    channels = known_multiple(channels, MULTIPLE)
    size = known_multiple(size, MULTIPLE)
    d_co, d_kh, d_kw = known_multiples(d_co, d_kh, d_kw, D_MULTIPLE)
    g_co, g_kh, g_kw = known_multiples(g_co, g_kh, g_kw, G_MULTIPLE)
    w_chunk = known_multiple(w_chunk, W_MULTIPLE)
    w_co, w_kh, w_kw = known_multiples(w_co, w_kh, w_kw, W_MULTIPLE)
    block = tl.program_id(0)
    chunk = tl.program_id(1)
    if INT64_OFFSETS:
        block = block.to(tl.int64)
    e = block * BE + tl.arange(0, BE)
    ok = e < size
    ci = e % channels
    if KH * KW == 1:
        kh = 0
        kw = 0
        co = e // channels
    else:
        tap = e // channels % (KH * KW)
        kh = tap // KW
        kw = tap % KW
        co = e // (channels * (KH * KW))
    delta_offset = co * d_co + ci * d_ci + kh * d_kh + kw * d_kw
    grad_offset = co * g_co + ci * g_ci + kh * g_kh + kw * g_kw

    first_task = chunk * chunk_tasks
    t = tl.arange(0, TB)
    begins = tl.load(p_offsets + t, mask=t < first_task, other=0)
    ends = tl.load(p_offsets + t + 1, mask=t < first_task, other=0)
    split = tl.sum(((ends - begins) * pixels + split_rows - 1) // split_rows, 0)
    if p_dw is not None:
        total = tl.zeros((BE,), tl.float32)
    for k in range(0, tl.minimum(chunk_tasks, num_tasks - first_task)):
        task = first_task + k
        begin = tl.load(p_offsets + task)
        end = tl.load(p_offsets + task + 1)
        splits = ((end - begin) * pixels + split_rows - 1) // split_rows
        scale = task_scale(p_gate, task, num_tasks)
        wanted = needs_product(p_grad, p_grad_table, p_partial, p_dw, scale, task, num_tasks)
        acc = tl.zeros((BE,), tl.float32)
        # eight loads under way at a time
        for j in tl.range(0, tl.where(wanted, splits, 0).to(tl.int32), loop_unroll_factor=8):
            acc += tl.load(p_parts + (split + j) * size + e, mask=ok, other=0.0)
        split += splits
        emit(
            acc, ok, grad_offset, delta_offset, task, num_tasks, scale, end > begin,
            task.to(tl.int64) * tl.num_programs(0) + tl.program_id(0),
            p_delta, p_table, d_t, p_grad, p_grad_table, g_t, p_partial, D_MULTIPLE, G_MULTIPLE,
        )  # fmt: skip
        if p_dw is not None:
            total += acc
    if p_dw is not None:
        p_out = p_dw + chunk.to(tl.int64) * w_chunk
        offset = co * w_co + ci * w_ci + kh * w_kh + kw * w_kw
        tl.store(p_out + offset, total.to(p_dw.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["count"])
def sum_parts_kernel(
    p_parts,  # [count, Cout, kh, kw, Cin / groups] float32
    p_out,  # [Cout, Cin / groups, kh, kw], by the strides o_*
    count,
    size,
    channels,
    step,
    o_co,
    o_ci,
    o_kh,
    o_kw,
    KH: tl.constexpr,
    KW: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
    BE: tl.constexpr,
):
    """out[co, ci, kh, kw] = the sum of `count` parts `[co, tap, ci]` that lie `step` apart, in order."""
    block = tl.program_id(0)
    if INT64_OFFSETS:
        block = block.to(tl.int64)
    e = block * BE + tl.arange(0, BE)
    ok = e < size
    acc = tl.zeros((BE,), tl.float32)
    p_part = p_parts + e
    for _ in tl.range(0, count, loop_unroll_factor=8):
        acc += tl.load(p_part, mask=ok, other=0.0)
        p_part += step
    ci = e % channels
    tap = e // channels % (KH * KW)
    co = e // (channels * (KH * KW))
    offset = co * o_co + ci * o_ci + tap // KW * o_kh + tap % KW * o_kw
    tl.store(p_out + offset, acc.to(p_out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["count"])
def gate_grad_kernel(
    p_partial,  # [T, count] float32
    p_out,  # [T]
    count,
    BE: tl.constexpr,
):
    """ds_t: the sum of the tiles' parts of <dW_eff, Delta_t>, in order."""
    task = tl.program_id(0)
    acc = tl.zeros((BE,), tl.float32)
    e = tl.arange(0, BE)
    for first in range(0, count, BE):
        acc += tl.load(p_partial + task.to(tl.int64) * count + first + e, mask=first + e < count, other=0.0)
    tl.store(p_out + task, tl.sum(acc, 0).to(p_out.dtype.element_ty))


@triton.jit(do_not_specialize=["num_samples", "num_tasks", "split_rows", "out_width", "pixels"])
def bias_grad_kernel(
    p_dy,  # [N, Cout, Ho, Wo]
    p_order,  # [N]
    p_offsets,  # [T + 1]
    p_parts,  # [splits, Cout] float32
    num_samples,
    num_tasks,
    split_rows,
    out_width,
    pixels,
    features,
    y_n,
    y_c,
    y_h,
    y_w,
    MULTIPLE: tl.constexpr,
    SMALL: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
    TB: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
):
    """p_parts[split, co] = the sum of dy over `split_rows` rows of one task. MULTIPLE: of features and dy's strides."""
    features = known_multiple(features, MULTIPLE)
    y_n, y_h, y_w = known_multiples(y_n, y_h, y_w, MULTIPLE)
    split = tl.program_id(1)
    task, low, high = find_tile(p_offsets, split, split_rows, num_tasks, num_samples, pixels, INT64_OFFSETS, TB)
    if (low >= high) | (task >= num_tasks):
        return
    high = low + tl.minimum(high - low, split_rows)
    co = tl.program_id(0) * BN + tl.arange(0, BN)
    co_ok = co < features
    if INT64_OFFSETS:
        co = co.to(tl.int64)
    acc = tl.zeros((BP, BN), tl.float32)
    samples, lines, columns = steps_of(tl.full((), BP, tl.int32), pixels, out_width)
    row = tl.arange(0, BP)
    sample, oh, ow = find_pixels(low, pixels, out_width, SMALL, BP)
    n = tl.load(p_order + sample, mask=row < high - low, other=0)
    for first in range(low, high, BP):
        row_ok = row < high - first
        at_h = oh.to(tl.int64) if INT64_OFFSETS else oh
        at_w = ow.to(tl.int64) if INT64_OFFSETS else ow
        p_block = (p_dy + n * y_n + (at_h * y_h + at_w * y_w))[:, None] + (co * y_c)[None, :]
        sample, oh, ow = advance(sample, oh, ow, samples, lines, columns, pixels // out_width, out_width)
        n = tl.load(p_order + sample, mask=row < high - first - BP, other=0)
        acc += tl.load(p_block, mask=row_ok[:, None] & co_ok[None, :], other=0.0).to(tl.float32)
    tl.store(p_parts + split.to(tl.int64) * features + co, tl.sum(acc, 0), mask=co_ok)
