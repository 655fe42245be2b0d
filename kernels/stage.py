"""What the task kernels share: finding a tile's task, its gate and its delta; and staging of `W + s_t Delta_t`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def multiply(a, b, acc, CAST: tl.constexpr):
    """a b + acc. float32 as three tf32 products: one alone truncates; CAST: see `_launch.in_interpreter`."""
    if CAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def find_tile(p_offsets, tile, rows_per_tile, num_tasks, num_samples, pixels, TB: tl.constexpr):
    """Task, first row and end of the task's rows, of a tile of rows (sample, pixel) that holds no other task.

    Task T is that of samples whose ids are out of range; beyond the last tile there are no rows.
    """
    t = tl.arange(0, TB)
    begin = tl.load(p_offsets + t, mask=t <= num_tasks, other=num_samples)
    end = tl.load(p_offsets + t + 1, mask=t < num_tasks, other=num_samples)
    tiles = ((end - begin) * pixels + rows_per_tile - 1) // rows_per_tile
    last = tl.cumsum(tiles, 0)
    task = tl.sum((last <= tile).to(tl.int32), 0)
    here = t == task
    first = tl.sum(tl.where(here, last - tiles, 0), 0)
    low = tl.sum(tl.where(here, begin, 0), 0) * pixels + (tile - first) * rows_per_tile
    high = tl.sum(tl.where(here, end, 0), 0) * pixels
    return task, low, high


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
def delta_pointer(p_delta, p_table, task, num_tasks, d_t, ALIGNED: tl.constexpr):
    """Where task's delta begins: in one `[T, ...]` tensor, or by the table. To be read only if the task has one."""
    if p_table is None:
        return p_delta + task.to(tl.int64) * d_t
    else:
        # a null pointer where there is none: loads through it are masked
        p = tl.load(p_table + task, mask=task < num_tasks, other=0).to(tl.pointer_type(p_delta.dtype.element_ty))
        if ALIGNED:
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
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
):
    """`[T + 1, Cout, kh, kw, Cin / groups]`: W + s_t Delta_t of the tasks that need one, and W itself in slot T."""
    task = tl.program_id(1)
    scale = task_scale(p_gate, task, num_tasks)
    opened = has_delta(p_delta, p_table, task, num_tasks) & (scale != 0)
    if p_delta is not None:
        begin = tl.load(p_offsets + task, mask=task < num_tasks, other=0)
        end = tl.load(p_offsets + task + 1, mask=task < num_tasks, other=0)
        opened = opened & (end > begin)
    if opened | (task == num_tasks):
        block = tl.program_id(0)
        if WIDE:
            block = block.to(tl.int64)
        row = block * BR + tl.arange(0, BR)
        tap = tl.arange(0, BT)
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
            p_d = delta_pointer(p_delta, p_table, task, num_tasks, d_t, ALIGNED)
            offset = (co * d_co + ci * d_ci)[:, None] + (kh * d_kh + kw * d_kw)[None, :]
            d = tl.load(p_d + offset, mask=inside & opened, other=0.0).to(tl.float32)
            value += tl.where(opened, scale * d, 0.0)
        p = p_out + task.to(tl.int64) * rows * (KH * KW)
        target = (co * (KH * KW * channels) + ci)[:, None] + (tap * channels)[None, :]
        tl.store(p + target, value.to(p_out.dtype.element_ty), mask=inside)
