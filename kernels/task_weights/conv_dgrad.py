"""Gradient of the input: an implicit GEMM over (sample, input pixel) in order of tasks.

For names, strides and shapes see `tiles.py`; here a row is an input pixel of one residue class. A block of the product
is [BM rows, BN input channels], in steps of BK output channels at one tap.
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


@triton.jit
def first_tap(rest, K: tl.constexpr, S: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr):
    """The first tap k with (rest - k D) divisible by the stride, and how many there are, each STEP after the last."""
    first = rest * 0 + K
    for k in tl.static_range(STEP):
        first = tl.where((rest - k * D) % S == 0, k, first)
    return first, (tl.maximum(K - first, 0) + STEP - 1) // STEP


@triton.jit(do_not_specialize=["num_samples", "num_tasks", "shared_slot", "height", "width", "out_height", "out_width"])
def task_conv2d_dgrad_kernel(
    p_dy,  # [N, Cout, Ho, Wo]
    p_w,  # W, or the workspace of `stage_kernel`, [T + 1, Cout, kh, kw, Cin / groups]; None: there is no W
    p_delta,  # [T, Cout, Cin / groups, kh, kw], or any delta of a list; None: no task has one
    p_table,  # [T] addresses of a list's deltas, 0: none; None: p_delta is one tensor
    p_gate,  # [T]; None: all ones
    p_dx,  # [N, Cin, H, W]
    p_order,  # [N]
    p_offsets,  # [T + 1]
    num_samples,
    num_tasks,
    shared_slot,
    height,
    width,
    out_height,
    out_width,
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
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    STEP_H: tl.constexpr,
    STEP_W: tl.constexpr,
    FUSED: tl.constexpr,
    EDGES: tl.constexpr,
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
    """dx[row, ci] = sum over (tap, co) dy[row moved back by tap, co] W_eff[co, tap, ci]. One task per tile.

    With a stride, the pixels of one residue class (program axis 2) are met by the same taps: only these are walked.
    STEP_H, STEP_W: from one of them to the next.
    No EDGES: each input pixel is met at one output pixel, in the same place. The rest as in `task_conv2d_fwd_kernel`.
    """
    channels = known_multiple(channels, MULTIPLE)
    features = known_multiple(features, MULTIPLE)
    x_n, x_h, x_w = known_multiples(x_n, x_h, x_w, MULTIPLE)
    y_n, y_h, y_w = known_multiples(y_n, y_h, y_w, MULTIPLE)
    w_t = known_multiple(w_t, W_MULTIPLE)
    w_co, w_kh, w_kw = known_multiples(w_co, w_kh, w_kw, W_MULTIPLE)
    d_co, d_kh, d_kw = known_multiples(d_co, d_kh, d_kw, D_MULTIPLE)
    blocks_n = tl.cdiv(channels, BN)
    tile = tl.program_id(0) // blocks_n
    column = tl.program_id(0) - tile * blocks_n
    group = tl.program_id(1)
    class_h = tl.program_id(2) // SW
    class_w = tl.program_id(2) - class_h * SW
    rows_h = (height - class_h + SH - 1) // SH
    rows_w = (width - class_w + SW - 1) // SW
    pixels = rows_h * rows_w
    task, low, high = find_tile(p_offsets, tile, BM, num_tasks, num_samples, pixels, INT64_OFFSETS, TB)
    if low >= high:
        return

    # pixels are counted in the class
    row_ok, n, qh, qw = find_rows(p_order, low, high, pixels, rows_w, SMALL, INT64_OFFSETS, BM)
    p_rows = p_dy + n * y_n + (qh * y_h + qw * y_w)

    c = column * BN + tl.arange(0, BN)
    c_ok = c < channels
    k = tl.arange(0, BK)
    if INT64_OFFSETS:
        c = c.to(tl.int64)
        k = k.to(tl.int64)

    scale = task_scale(p_gate, task, num_tasks)
    opened = has_delta(p_delta, p_table, task, num_tasks) & (scale != 0)
    # where the columns of the weights begin, each [BN]
    if FUSED:
        p_w_columns = None if p_w is None else p_w + c * w_ci
        if p_delta is None:
            p_d_columns = None
        else:
            p_d_columns = delta_pointer(p_delta, p_table, task, num_tasks, d_t, D_MULTIPLE) + c * d_ci
    else:
        slot = tl.where(opened, task, shared_slot).to(tl.int64)
        p_w_columns = p_w + slot * w_t + c * w_ci

    rest_h = class_h + pad_h
    rest_w = class_w + pad_w
    if INT64_OFFSETS:
        rest_h = rest_h.to(tl.int64)
        rest_w = rest_w.to(tl.int64)
    first_h, taps_h = first_tap(rest_h, KH, SH, DH, STEP_H)
    first_w, taps_w = first_tap(rest_w, KW, SW, DW, STEP_W)
    blocks_k = tl.cdiv(features, BK)
    # rows of no task become NaN: no weight is read for them
    steps = tl.where(task == num_tasks, 0, taps_h * taps_w * blocks_k)
    acc = tl.zeros((BM, BN), tl.float32)
    # counted along, and the only tap spelled out, as in the forward
    kh = first_h if KH > 1 else 0
    kw = first_w if KW > 1 else 0
    first_k = 0
    for _ in range(0, steps):
        f = first_k + k
        f_ok = f < features
        co = group * features + f
        back_h = (rest_h - kh * DH) // SH
        back_w = (rest_w - kw * DW) // SW
        oh = qh + back_h
        ow = qw + back_w
        inside = row_ok
        if EDGES:
            inside = inside & (oh >= 0) & (oh < out_height) & (ow >= 0) & (ow < out_width)
        moved = back_h * y_h + back_w * y_w + co * y_c
        a = tl.load(p_rows[:, None] + moved[None, :], mask=inside[:, None] & f_ok[None, :], other=0.0)
        w_ok = f_ok[:, None] & c_ok[None, :]
        moved_w = kh * w_kh + kw * w_kw + co * w_co
        if FUSED:
            moved_d = kh * d_kh + kw * d_kw + co * d_co
            b = added_weights(p_w_columns, p_d_columns, moved_w, moved_d, w_ok, opened, scale, a.dtype)
        else:
            b = tl.load(p_w_columns[None, :] + moved_w[:, None], mask=w_ok, other=0.0)
        acc = multiply(a, b, acc, CAST)
        first_k += BK
        if KH * KW > 1:
            over = first_k >= features
            first_k = tl.where(over, 0, first_k)
            if KW > 1:
                kw += tl.where(over, STEP_W, 0)
                over = over & (kw >= KW)
                kw = tl.where(over, first_w, kw)
            if KH > 1:
                kh += tl.where(over, STEP_H, 0)

    acc = tl.where(task == num_tasks, float("nan"), acc)
    ih = qh * SH + class_h
    iw = qw * SW + class_w
    ci = group * channels + c
    p_dx_rows = p_dx + n * x_n + (ih * x_h + iw * x_w)
    p_out = p_dx_rows[:, None] + (ci * x_c)[None, :]
    tl.store(p_out, acc.to(p_dx.dtype.element_ty), mask=row_ok[:, None] & c_ok[None, :])
