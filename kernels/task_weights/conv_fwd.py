"""Forward: an implicit GEMM over (sample, output pixel) in order of tasks.

For names, strides and shapes see `tiles.py`; here a row is an output pixel. A block of the product is [BM rows, BN
output channels], in steps of BK pairs (tap, ci).
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastmtl.kernels.task_weights.tiles import (
    added_weights,
    delta_pointer,
    find_rows,
    find_tile,
    has_delta,
    known_multiple,
    known_multiples,
    multiply,
    task_scale,
)


@triton.jit(do_not_specialize=["num_samples", "num_tasks", "shared_slot", "height", "width", "out_width", "pixels"])
def task_conv2d_fwd_kernel(
    p_x,  # [N, Cin, H, W]
    p_w,  # W, or the workspace of `stage_kernel`, [T + 1, Cout, kh, kw, Cin / groups]; None: there is no W
    p_delta,  # [T, Cout, Cin / groups, kh, kw], or any delta of a list; None: no task has one
    p_table,  # [T] addresses of a list's deltas, 0: none; None: p_delta is one tensor
    p_gate,  # [T]; None: all ones
    p_bias,  # [Cout] or [T, Cout]; None: there is none
    p_y,  # [N, Cout, Ho, Wo]
    p_order,  # [N]
    p_offsets,  # [T + 1]
    num_samples,
    num_tasks,
    shared_slot,
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
    w_t,
    w_co,
    w_ci,
    w_kh,
    w_kw,
    d_t,
    d_co,
    d_ci,
    d_kh,
    d_kw,
    y_n,
    y_c,
    y_h,
    y_w,
    b_t,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    PACKED: tl.constexpr,
    FUSED: tl.constexpr,
    PADDED: tl.constexpr,
    MULTIPLE: tl.constexpr,
    W_MULTIPLE: tl.constexpr,
    D_MULTIPLE: tl.constexpr,
    SMALL: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
    CAST: tl.constexpr,
    TB: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """y[row, co] = sum over (tap, ci) of x[row moved by tap, ci] W_eff[co, tap, ci] + bias[co]. One task per tile.

    FUSED: p_w is W, and W + s_t Delta_t is added in each step. Else the weights are staged: p_w is the workspace, where
    tasks without an open delta have `shared_slot`.
    PACKED: a K block spans taps, for few channels. Not PADDED: every tap of every pixel is inside the picture.
    MULTIPLE: of channels and features too. b_t: from one task's bias to the next.
    """
    channels = known_multiple(channels, MULTIPLE)
    features = known_multiple(features, MULTIPLE)
    x_n, x_h, x_w = known_multiples(x_n, x_h, x_w, MULTIPLE)
    y_n, y_h, y_w = known_multiples(y_n, y_h, y_w, MULTIPLE)
    w_t = known_multiple(w_t, W_MULTIPLE)
    w_co, w_kh, w_kw = known_multiples(w_co, w_kh, w_kw, W_MULTIPLE)
    d_co, d_kh, d_kw = known_multiples(d_co, d_kh, d_kw, D_MULTIPLE)
    blocks_n = tl.cdiv(features, BN)
    tile = tl.program_id(0) // blocks_n
    column = tl.program_id(0) - tile * blocks_n
    group = tl.program_id(1)
    task, low, high = find_tile(p_offsets, tile, BM, num_tasks, num_samples, pixels, INT64_OFFSETS, TB)
    if low >= high:
        return

    row_ok, n, oh, ow = find_rows(p_order, low, high, pixels, out_width, SMALL, INT64_OFFSETS, BM)
    ih = oh * SH - pad_h
    iw = ow * SW - pad_w
    p_rows = p_x + n * x_n + (ih * x_h + iw * x_w)

    f = column * BN + tl.arange(0, BN)
    f_ok = f < features
    co = group * features + f
    if INT64_OFFSETS:
        co = co.to(tl.int64)
    first_channel = group * channels

    scale = task_scale(p_gate, task, num_tasks)
    opened = has_delta(p_delta, p_table, task, num_tasks) & (scale != 0)
    # where the columns of the weights begin, each [BN]
    if FUSED:
        p_w_columns = None if p_w is None else p_w + co * w_co
        if p_delta is None:
            p_d_columns = None
        else:
            p_d_columns = delta_pointer(p_delta, p_table, task, num_tasks, d_t, D_MULTIPLE) + co * d_co
    else:
        slot = tl.where(opened, task, shared_slot).to(tl.int64)
        p_w_columns = p_w + slot * w_t + co * w_co

    k = tl.arange(0, BK)
    if INT64_OFFSETS:
        k = k.to(tl.int64)
    if PACKED:
        depth = KH * KW * channels
        steps = tl.cdiv(depth, BK)
    else:
        blocks_k = tl.cdiv(channels, BK)
        steps = KH * KW * blocks_k
    # rows of no task become NaN: no weight is read for them
    steps = tl.where(task == num_tasks, 0, steps)
    acc = tl.zeros((BM, BN), tl.float32)
    if not PACKED:
        # counted along, without a division in each step; of a 1x1 the only tap stays the constant that it is, as the
        # compiler would load single elements if it did not see that
        kh = tl.zeros((), tl.int64) if INT64_OFFSETS and KH * KW > 1 else 0
        kw = tl.zeros((), tl.int64) if INT64_OFFSETS and KH * KW > 1 else 0
        first_k = 0
    for step in range(0, steps):
        if PACKED:
            flat = step * BK + k
            tap = flat // channels
            ci = flat % channels
            k_ok = flat < depth
            kh = tap // KW
            kw = tap - kh * KW
        else:
            ci = first_k + k
            k_ok = ci < channels
        inside = row_ok[:, None]
        if PADDED:
            if PACKED:
                at_h = ih[:, None] + (kh * DH)[None, :]
                at_w = iw[:, None] + (kw * DW)[None, :]
            else:
                at_h = (ih + kh * DH)[:, None]
                at_w = (iw + kw * DW)[:, None]
            inside = inside & (at_h >= 0) & (at_h < height) & (at_w >= 0) & (at_w < width)
        moved = kh * DH * x_h + kw * DW * x_w + (first_channel + ci) * x_c
        a = tl.load(p_rows[:, None] + moved[None, :], mask=inside & k_ok[None, :], other=0.0)
        w_ok = k_ok[:, None] & f_ok[None, :]
        moved_w = kh * w_kh + kw * w_kw + ci * w_ci
        if FUSED:
            moved_d = kh * d_kh + kw * d_kw + ci * d_ci
            b = added_weights(p_w_columns, p_d_columns, moved_w, moved_d, w_ok, opened, scale, a.dtype)
        else:
            b = tl.load(p_w_columns[None, :] + moved_w[:, None], mask=w_ok, other=0.0)
        acc = multiply(a, b, acc, CAST)
        if not PACKED:
            first_k += BK
            if KH * KW > 1:
                over = first_k >= channels
                first_k = tl.where(over, 0, first_k)
                kw += over.to(tl.int32)
                over = kw == KW
                kw = tl.where(over, 0, kw)
                kh += over.to(tl.int32)

    if p_bias is not None:
        bias_task = tl.minimum(task, num_tasks - 1)
        acc += tl.load(p_bias + bias_task * b_t + co, mask=f_ok, other=0.0).to(tl.float32)[None, :]
    acc = tl.where(task == num_tasks, float("nan"), acc)
    p_y_rows = p_y + n * y_n + (oh * y_h + ow * y_w)
    p_out = p_y_rows[:, None] + (co * y_c)[None, :]
    tl.store(p_out, acc.to(p_y.dtype.element_ty), mask=row_ok[:, None] & f_ok[None, :])
