"""Staging: `W + s_t Delta_t` of the tasks that need it, written to a workspace that the product then reads.

Names and strides as in `tiles.py`; here a *row* is one pair (co, ci) of a filter, in that order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastmtl.kernels.task_weights.tiles import delta_pointer, has_delta, known_multiple, known_multiples, task_scale


@triton.jit(do_not_specialize=["num_tasks"])
def stage_kernel(
    p_out,  # [T + 1, Cout, kh, kw, Cin / groups], dense
    p_w,  # [Cout, Cin / groups, kh, kw]; None: there is no W
    p_delta,  # [T, Cout, Cin / groups, kh, kw], or any delta of a list; None: no task has one
    p_table,  # [T] addresses of a list's deltas, 0: none; None: p_delta is one tensor
    p_gate,  # [T]; None: all ones
    p_offsets,  # [T + 1]
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

    MULTIPLE: of channels and rows. BR rows, BT taps in a block.
    """
    channels = known_multiple(channels, MULTIPLE)
    rows = known_multiple(rows, MULTIPLE)
    w_co, w_kh, w_kw = known_multiples(w_co, w_kh, w_kw, W_MULTIPLE)
    d_co, d_kh, d_kw = known_multiples(d_co, d_kh, d_kw, D_MULTIPLE)
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
