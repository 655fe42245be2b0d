"""Low-rank deltas: rows through A_t, then through B_t, and the gradients of both. One task per tile, no atomics.

A *factor* is A_t `[r_t, Cin]` or B_t `[Cout, r_t]`, dense. *Wide* are the rows of x, y and their gradients, with
`columns` numbers each; *thin* are those between the factors, with `width` numbers, of which the first r_t are used:
z = x A_t^T, and u = dY B_t. Thin rows lie in the order of tasks, wide ones as the batch has them.

For other names see `tiles.py`; a sample has `pixels` rows here. Beside them:

    p_ranks, rank   `[T]` int64; None: all tasks have `rank`
    f_t             from one task's factor to the next, where p_table is None
    IS_A            the factor is A: else B
    MULTIPLE        what divides channels and features; RANK_MULTIPLE: what divides the ranks
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastmtl.kernels.task_weights.tiles import (
    advance,
    delta_pointer,
    find_pixels,
    find_rows,
    find_tile,
    has_delta,
    known_multiple,
    multiply,
    steps_of,
    task_scale,
)


@triton.jit
def rank_of(p_ranks, rank, task, num_tasks, RANK_MULTIPLE: tl.constexpr):
    """r_t."""
    if p_ranks is None:
        return rank
    else:
        r = tl.load(p_ranks + task, mask=task < num_tasks, other=0).to(tl.int32)
        return known_multiple(r, RANK_MULTIPLE)


@triton.jit
def factor_offset(c, j, columns, rank, IS_A: tl.constexpr):
    """Where column c of the wide rows and number j of the thin ones meet in a factor."""
    if IS_A:
        return j * columns + c
    else:
        return c * rank + j


@triton.jit
def thin_rows(
    p_rows,  # [BM], where each wide row begins
    row_ok,
    p_factor,
    columns,
    rank,
    j,
    IS_A: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
    CAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Wide rows times a factor: [BM, BN] in float32, 0 from the rank on."""
    acc = tl.zeros((BM, BN), tl.float32)
    for first in range(0, columns, BK):
        c = first + tl.arange(0, BK)
        if INT64_OFFSETS:
            c = c.to(tl.int64)
        a = tl.load(p_rows[:, None] + c[None, :], mask=row_ok[:, None] & (c < columns)[None, :], other=0.0)
        offset = factor_offset(c[:, None], j[None, :], columns, rank, IS_A)
        b = tl.load(p_factor + offset, mask=(c < columns)[:, None] & (j < rank)[None, :], other=0.0)
        acc = multiply(a, b.to(a.dtype), acc, CAST)
    return acc


@triton.jit(do_not_specialize=["num_samples", "num_tasks", "pixels"])
def task_lora_shrink_kernel(
    p_x,  # [N, pixels, Cin]; None: z is not wanted
    p_dy,  # [N, pixels, Cout]; None: u is not wanted
    p_a,  # [T, r, Cin], or any A of a list
    p_a_table,  # [T] addresses of a list's, 0: none; None: p_a is one tensor
    p_b,  # as p_a
    p_b_table,
    p_ranks,
    p_scaling,  # [T]; None: all ones
    p_z,  # [rows, width]
    p_u,  # [rows, width]
    p_partial,  # [tiles, blocks of the rank] float32: parts of the sums of z u; None: not wanted
    p_order,  # [N]
    p_offsets,  # [T + 1]
    num_samples,
    num_tasks,
    pixels,
    channels,
    features,
    rank,
    width,
    a_t,
    b_t,
    MULTIPLE: tl.constexpr,
    RANK_MULTIPLE: tl.constexpr,
    SMALL: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
    CAST: tl.constexpr,
    TB: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """z = x A_t^T and u = dY B_t, of a tile of rows (program axis 0) and BN of the rank's numbers (axis 1).

    Rows of closed tasks are left out, unless the scaling's gradient is wanted: then nobody reads them.
    """
    channels = known_multiple(channels, MULTIPLE)
    features = known_multiple(features, MULTIPLE)
    rank = known_multiple(rank, RANK_MULTIPLE)
    width = known_multiple(width, 16)
    tile = tl.program_id(0)
    task, low, high = find_tile(p_offsets, tile, BM, num_tasks, num_samples, pixels, INT64_OFFSETS, TB)
    if (low >= high) | (task >= num_tasks):
        return
    wanted = has_delta(p_a, p_a_table, task, num_tasks)
    if p_partial is None:
        wanted = wanted & (task_scale(p_scaling, task, num_tasks) != 0)
    if not wanted:
        return

    row_ok, n, _, w = find_rows(p_order, low, high, pixels, pixels, SMALL, INT64_OFFSETS, BM)
    row = n * pixels + w
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    r = rank_of(p_ranks, rank, task, num_tasks, RANK_MULTIPLE)
    place = low.to(tl.int64) + tl.arange(0, BM)
    thin = place[:, None] * width + j[None, :]
    stored = row_ok[:, None] & (j < width)[None, :]
    if INT64_OFFSETS:
        j = j.to(tl.int64)
    if p_x is not None:
        p_factor = delta_pointer(p_a, p_a_table, task, num_tasks, a_t, MULTIPLE)
        z = thin_rows(p_x + row * channels, row_ok, p_factor, channels, r, j, True, INT64_OFFSETS, CAST, BM, BN, BK)
        tl.store(p_z + thin, z.to(p_z.dtype.element_ty), mask=stored)
    if p_dy is not None:
        p_factor = delta_pointer(p_b, p_b_table, task, num_tasks, b_t, RANK_MULTIPLE)
        u = thin_rows(p_dy + row * features, row_ok, p_factor, features, r, j, False, INT64_OFFSETS, CAST, BM, BN, BK)
        tl.store(p_u + thin, u.to(p_u.dtype.element_ty), mask=stored)
    if p_partial is not None:
        partial = tile.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(p_partial + partial, tl.sum(z * u))


@triton.jit(do_not_specialize=["num_samples", "num_tasks", "pixels"])
def task_lora_expand_kernel(
    p_thin,  # [rows, width]
    p_factor,  # as p_a of `task_lora_shrink_kernel`; None: no task has one
    p_table,
    p_ranks,
    p_scaling,  # [T]; None: all ones
    p_bias,  # [columns] or [T, columns]; None: there is none
    p_wide,  # [N, pixels, columns]
    p_order,  # [N]
    p_offsets,  # [T + 1]
    num_samples,
    num_tasks,
    pixels,
    columns,
    rank,
    width,
    f_t,
    bias_t,
    IS_A: tl.constexpr,
    ADD: tl.constexpr,
    MULTIPLE: tl.constexpr,
    RANK_MULTIPLE: tl.constexpr,
    SMALL: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
    CAST: tl.constexpr,
    TB: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """s_t times thin rows times the factor, and the bias, into wide rows; ADD: to what is there. NaN for no task."""
    columns = known_multiple(columns, MULTIPLE)
    rank = known_multiple(rank, RANK_MULTIPLE)
    width = known_multiple(width, 16)
    blocks = tl.cdiv(columns, BN)
    tile = tl.program_id(0) // blocks
    task, low, high = find_tile(p_offsets, tile, BM, num_tasks, num_samples, pixels, INT64_OFFSETS, TB)
    scale = task_scale(p_scaling, task, num_tasks)
    opened = has_delta(p_factor, p_table, task, num_tasks) & (scale != 0)
    if ADD and p_bias is None:
        # what is there stays as it is
        high = tl.where(opened | (task == num_tasks), high, low)
    if low >= high:
        return

    row_ok, n, _, w = find_rows(p_order, low, high, pixels, pixels, SMALL, INT64_OFFSETS, BM)
    c = (tl.program_id(0) - tile * blocks) * BN + tl.arange(0, BN)
    c_ok = c < columns
    if INT64_OFFSETS:
        c = c.to(tl.int64)
    acc = tl.zeros((BM, BN), tl.float32)
    if p_factor is not None:
        r = rank_of(p_ranks, rank, task, num_tasks, RANK_MULTIPLE)
        p_f = delta_pointer(p_factor, p_table, task, num_tasks, f_t, MULTIPLE if IS_A else RANK_MULTIPLE)
        place = low.to(tl.int64) + tl.arange(0, BM)
        p_rows = p_thin + place * width
        for first in range(0, tl.where(opened, r, 0), BK):
            j = first + tl.arange(0, BK)
            if INT64_OFFSETS:
                j = j.to(tl.int64)
            a = tl.load(p_rows[:, None] + j[None, :], mask=row_ok[:, None] & (j < width)[None, :], other=0.0)
            offset = factor_offset(c[None, :], j[:, None], columns, r, IS_A)
            b = tl.load(p_f + offset, mask=(j < r)[:, None] & c_ok[None, :], other=0.0)
            acc = multiply(a, b.to(a.dtype), acc, CAST)
        # a scaling that is not finite must not reach a task without a delta
        acc *= tl.where(opened, scale, 0.0)
    if p_bias is not None:
        bias_task = tl.minimum(task, num_tasks - 1)
        acc += tl.load(p_bias + bias_task * bias_t + c, mask=c_ok, other=0.0).to(tl.float32)[None, :]
    p_out = (p_wide + (n * pixels + w) * columns)[:, None] + c[None, :]
    ok = row_ok[:, None] & c_ok[None, :]
    if ADD:
        acc += tl.load(p_out, mask=ok, other=0.0).to(tl.float32)
    acc = tl.where(task == num_tasks, float("nan"), acc)
    tl.store(p_out, acc.to(p_wide.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["num_samples", "num_tasks", "pixels", "split_rows"])
def task_lora_wgrad_kernel(
    p_wide,  # [N, pixels, columns]: x for the gradient of A, dY for that of B
    p_thin,  # [rows, width]: u for the gradient of A, z for that of B
    p_ranks,
    p_scaling,  # [T]; None: all ones
    p_grad,  # the gradients, as p_a of `task_lora_shrink_kernel`
    p_table,
    p_parts,  # [splits, columns, width] float32, for `task_lora_finish_kernel`; None: whole tasks
    p_order,  # [N]
    p_offsets,  # [T + 1]
    num_samples,
    num_tasks,
    pixels,
    split_rows,
    columns,
    rank,
    width,
    f_t,
    IS_A: tl.constexpr,
    MULTIPLE: tl.constexpr,
    RANK_MULTIPLE: tl.constexpr,
    SMALL: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
    CAST: tl.constexpr,
    TB: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
):
    """s_t times the sum over a task's rows of wide row times thin row: BM columns (axis 0), BN of the rank (axis 1).

    Program axis 2: a task, or `split_rows` rows of one.
    """
    columns = known_multiple(columns, MULTIPLE)
    rank = known_multiple(rank, RANK_MULTIPLE)
    width = known_multiple(width, 16)
    part = tl.program_id(2)
    if p_parts is None:
        task = part
        low = tl.load(p_offsets + task) * pixels
        high = tl.load(p_offsets + task + 1) * pixels
        if not INT64_OFFSETS:
            low = low.to(tl.int32)
            high = high.to(tl.int32)
    else:
        task, low, high = find_tile(p_offsets, part, split_rows, num_tasks, num_samples, pixels, INT64_OFFSETS, TB)
        if (low >= high) | (task >= num_tasks):
            return
        high = low + tl.minimum(high - low, split_rows)
    scale = task_scale(p_scaling, task, num_tasks)
    wanted = has_delta(p_grad, p_table, task, num_tasks)
    opened = scale != 0
    if p_parts is not None:
        wanted = wanted & opened
    if not wanted:
        return
    high = tl.where(opened, high, low)

    c = tl.program_id(0) * BM + tl.arange(0, BM)
    c_ok = c < columns
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    j_ok = j < width
    if INT64_OFFSETS:
        c = c.to(tl.int64)
        j = j.to(tl.int64)
    acc = tl.zeros((BM, BN), tl.float32)
    samples, lines, steps = steps_of(tl.full((), BP, tl.int32), pixels, pixels)
    row = tl.arange(0, BP)
    sample, h, w = find_pixels(low, pixels, pixels, SMALL, BP)
    # known a step ahead, so that what is loaded by it can be under way before the step begins
    n = tl.load(p_order + sample, mask=row < high - low, other=0)
    for first in range(low, high, BP):
        row_ok = row < high - first
        p_rows = p_wide + (n * pixels + w) * columns
        a = tl.load(p_rows[:, None] + c[None, :], mask=row_ok[:, None] & c_ok[None, :], other=0.0)
        place = (row + first).to(tl.int64)
        b = tl.load(p_thin + (place[:, None] * width + j[None, :]), mask=row_ok[:, None] & j_ok[None, :], other=0.0)
        sample, h, w = advance(sample, h, w, samples, lines, steps, 1, pixels)
        n = tl.load(p_order + sample, mask=row < high - first - BP, other=0)
        acc = multiply(tl.trans(a), b, acc, CAST)
    if p_parts is None:
        r = rank_of(p_ranks, rank, task, num_tasks, RANK_MULTIPLE)
        value = tl.where(high > low, acc * scale, 0.0)
        p_out = delta_pointer(p_grad, p_table, task, num_tasks, f_t, 1)
        offset = factor_offset(c[:, None], j[None, :], columns, r, IS_A)
        tl.store(p_out + offset, value.to(p_grad.dtype.element_ty), mask=c_ok[:, None] & (j < r)[None, :])
    else:
        p_out = p_parts + part.to(tl.int64) * columns * width
        tl.store(p_out + (c[:, None] * width + j[None, :]), acc, mask=c_ok[:, None] & j_ok[None, :])


@triton.jit(do_not_specialize=["num_tasks", "pixels", "split_rows"])
def task_lora_finish_kernel(
    p_parts,  # [splits, columns, width] float32
    p_offsets,  # [T + 1]
    p_ranks,
    p_scaling,  # [T]; None: all ones
    p_grad,  # the gradients, as p_a of `task_lora_shrink_kernel`
    p_table,
    num_tasks,
    pixels,
    split_rows,
    columns,
    rank,
    width,
    f_t,
    IS_A: tl.constexpr,
    RANK_MULTIPLE: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
    TB: tl.constexpr,
    BE: tl.constexpr,
):
    """Adds up the splits of a task (program axis 1), in order, times s_t."""
    rank = known_multiple(rank, RANK_MULTIPLE)
    width = known_multiple(width, 16)
    task = tl.program_id(1)
    if not has_delta(p_grad, p_table, task, num_tasks):
        return
    block = tl.program_id(0)
    if INT64_OFFSETS:
        block = block.to(tl.int64)
    e = block * BE + tl.arange(0, BE)
    c = e // width
    j = e % width
    ok = c < columns
    t = tl.arange(0, TB)
    begins = tl.load(p_offsets + t, mask=t <= task, other=0)
    ends = tl.load(p_offsets + t + 1, mask=t <= task, other=0)
    splits = ((ends - begins) * pixels + split_rows - 1) // split_rows
    first = tl.sum(tl.where(t < task, splits, 0), 0)
    scale = task_scale(p_scaling, task, num_tasks)
    count = tl.where(scale != 0, tl.sum(tl.where(t == task, splits, 0), 0), 0).to(tl.int32)
    acc = tl.zeros((BE,), tl.float32)
    # eight loads under way at a time
    for k in tl.range(0, count, loop_unroll_factor=8):
        acc += tl.load(p_parts + (first + k) * columns * width + e, mask=ok, other=0.0)
    r = rank_of(p_ranks, rank, task, num_tasks, RANK_MULTIPLE)
    value = tl.where(count > 0, acc * scale, 0.0)
    p_out = delta_pointer(p_grad, p_table, task, num_tasks, f_t, 1)
    tl.store(p_out + factor_offset(c, j, columns, r, IS_A), value.to(p_grad.dtype.element_ty), mask=ok & (j < r))


@triton.jit(do_not_specialize=["num_tasks", "pixels", "tile_rows", "blocks"])
def task_lora_scaling_grad_kernel(
    p_partial,  # [tiles, blocks] float32
    p_offsets,  # [T + 1]
    p_a,  # as in `task_lora_shrink_kernel`
    p_a_table,
    p_out,  # [T]
    num_tasks,
    pixels,
    tile_rows,
    blocks,
    TB: tl.constexpr,
    BE: tl.constexpr,
):
    """ds_t: the sum of z u over the tiles of a task, in order; 0 without rows or without a delta."""
    task = tl.program_id(0)
    t = tl.arange(0, TB)
    begins = tl.load(p_offsets + t, mask=t <= task, other=0)
    ends = tl.load(p_offsets + t + 1, mask=t <= task, other=0)
    tiles = ((ends - begins) * pixels + tile_rows - 1) // tile_rows
    first = tl.sum(tl.where(t < task, tiles, 0), 0) * blocks
    count = tl.sum(tl.where(t == task, tiles, 0), 0) * blocks
    count = tl.where(has_delta(p_a, p_a_table, task, num_tasks), count, 0).to(tl.int32)
    acc = tl.zeros((BE,), tl.float32)
    e = tl.arange(0, BE)
    for k in range(0, count, BE):
        acc += tl.load(p_partial + first + k + e, mask=k + e < count, other=0.0)
    tl.store(p_out + task, tl.sum(acc, 0).to(p_out.dtype.element_ty))
