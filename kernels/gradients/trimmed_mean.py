"""The mean of each column without its smallest and largest elements: one read of G, nothing sorted but what is cut off.

For the names and shapes of arguments see `rows.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastmtl.kernels.gradients.rows import find_columns, find_row


@triton.jit
def _trimmed_mean_tile(
    p_rows, p_table, p_present, p_to, param, first, at, inside, num_tasks, row_stride, col_stride,
    ALIGNED16: tl.constexpr, ACC: tl.constexpr, TASKS: tl.constexpr, TRIM: tl.constexpr, VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of columns; inside None: all of them.

    The TRIM smallest and largest elements so far are held in order. A new element goes through the smallest, and what
    it pushes out of them, or itself, through the largest: what comes out is neither, now and for good, and is summed.
    """
    offset = at if ALIGNED16 else at * col_stride
    total = tl.zeros((BLOCK,), ACC)
    poison = tl.zeros((BLOCK,), ACC)
    smallest = ()
    largest = ()
    for _ in tl.static_range(TRIM):
        smallest += (tl.full((BLOCK,), float("inf"), ACC),)
        largest += (tl.full((BLOCK,), float("-inf"), ACC),)
    seen = num_tasks * 0
    for tasks in range(0, num_tasks, TASKS):
        tiles = ()
        for k in tl.static_range(TASKS):
            row, there = find_row(
                p_rows, p_table, param, tasks + k, num_tasks, row_stride, first, col_stride, ALIGNED16, VEC
            )
            tiles += (tl.load(row + offset, mask=there if inside is None else there & inside, other=0.0),)
        for k in tl.static_range(TASKS):
            taken = tasks + k < num_tasks
            if p_present is not None:
                taken = taken & (tl.load(p_present + tasks + k, mask=taken, other=0) != 0)
            x = tiles[k].to(ACC)
            poison += tl.where(taken, x - x, 0.0)
            if TRIM == 0:
                total += tl.where(taken, x, 0.0)
            else:
                # infinities, which go through without moving anything, stand for what is not there
                y = tl.where(taken, x, float("inf"))
                held = ()
                for i in tl.static_range(TRIM):
                    held += (tl.minimum(smallest[i], y),)
                    y = tl.maximum(smallest[i], y)
                smallest = held
                y = tl.where(taken & (seen >= TRIM), y, float("-inf"))
                held = ()
                for i in tl.static_range(TRIM):
                    held += (tl.maximum(largest[i], y),)
                    y = tl.minimum(largest[i], y)
                largest = held
                total += tl.where(taken & (seen >= 2 * TRIM), y, 0.0)
            seen += taken.to(tl.int32)
    left = seen - 2 * TRIM
    mean = tl.where(left > 0, total / left.to(ACC), float("nan")) + poison
    tl.store(p_to + at, mean.to(p_to.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_tasks", "num_params", "row_stride", "col_stride", "num_columns", "tiles_per_block"])
def trimmed_mean_fwd_kernel(
    p_rows, p_table, p_present, p_out,
    num_tasks, num_params, row_stride: tl.int64, col_stride: tl.int64, num_columns: tl.int64, tiles_per_block,
    ALIGNED16: tl.constexpr, ACC: tl.constexpr, TASKS: tl.constexpr, TRIM: tl.constexpr, VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """p_present: `[T]` uint8, which rows count, or None."""
    param, first, left = find_columns(
        p_table, 2, tl.program_id(0), num_tasks, num_params, num_columns, tiles_per_block * BLOCK
    )
    if p_table is None:
        p_to = p_out + first
    else:
        p_to = tl.load(p_table + num_params.to(tl.int64) * (num_tasks + 3) + param)
        p_to = p_to.to(tl.pointer_type(p_out.dtype.element_ty))
        if ALIGNED16:
            p_to = tl.multiple_of(p_to, 16)
        p_to += first
    column = tl.arange(0, BLOCK)
    for k in range(0, (left + BLOCK - 1) // BLOCK):
        at = k * BLOCK + column
        if (k + 1) * BLOCK <= left:
            _trimmed_mean_tile(
                p_rows, p_table, p_present, p_to, param, first, at, None, num_tasks, row_stride, col_stride,
                ALIGNED16, ACC, TASKS, TRIM, VEC, BLOCK,
            )  # fmt: skip
        else:
            _trimmed_mean_tile(
                p_rows, p_table, p_present, p_to, param, first, at, at < left, num_tasks, row_stride, col_stride,
                ALIGNED16, ACC, TASKS, TRIM, VEC, BLOCK,
            )  # fmt: skip
