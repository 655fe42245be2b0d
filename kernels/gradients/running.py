"""What runs along with T gradients: their averages, and the sums of their squares, with a number for each task.

For the names and shapes of arguments see `rows.py`; here

    p_held       [T, P], what runs along, in the dtype of sums, read and written; of lists: any of them
    held_stride  from row to row of a bank; HELD_VEC: 16 bytes of it
    p_totals     [programs, T] float64: each program's part of the numbers
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastmtl.kernels.gradients.rows import find_columns, find_row


@triton.jit
def find_held(
    p_held, p_table, param, task, num_tasks, num_params, held_stride, first,
    ALIGNED16: tl.constexpr, HELD_VEC: tl.constexpr,
):  # fmt: skip
    """Address of column `first` of what runs along with a task."""
    if p_table is None:
        p = p_held + task * (held_stride * HELD_VEC if ALIGNED16 else held_stride)
    else:
        address = tl.load(p_table + num_params.to(tl.int64) * (num_tasks + 3 + task) + param)
        p = address.to(tl.pointer_type(p_held.dtype.element_ty))
        if ALIGNED16:
            p = tl.multiple_of(p, 16)
    return p + first


@triton.jit
def _average_tile(row, there, held, at, inside, keep, take, col_stride, ALIGNED16: tl.constexpr, ACC: tl.constexpr):
    """The squares of the new averages; NaN where one would not be finite, which then stays as it was."""
    offset = at if ALIGNED16 else at * col_stride
    x = tl.load(row + offset, mask=there if inside is None else there & inside, other=0.0).to(ACC)
    before = tl.load(held + at, mask=inside)
    after = keep * before + take * x
    finite = after - after == 0
    tl.store(held + at, tl.where(finite, after, before), mask=inside)
    squares = tl.where(finite, after * after, float("nan"))
    return squares if inside is None else tl.where(inside, squares, 0.0)


@triton.jit(
    do_not_specialize=[
        "num_tasks", "num_params", "row_stride", "col_stride", "held_stride", "num_columns", "tiles_per_block"
    ]
)  # fmt: skip
def average_gradients_kernel(
    p_rows, p_table, p_keep, p_take, p_held, p_totals,
    num_tasks, num_params, row_stride: tl.int64, col_stride: tl.int64, held_stride: tl.int64, num_columns: tl.int64,
    tiles_per_block,
    ALIGNED16: tl.constexpr, ACC: tl.constexpr, VEC: tl.constexpr, HELD_VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`held = keep held + take row` for every task, and the squared lengths; p_keep, p_take: `[T]` float64."""
    block = tl.program_id(0)
    param, first, left = find_columns(p_table, 2, block, num_tasks, num_params, num_columns, tiles_per_block * BLOCK)
    column = tl.arange(0, BLOCK)
    for task in range(0, num_tasks):
        keep = tl.load(p_keep + task).to(ACC)
        take = tl.load(p_take + task).to(ACC)
        row, there = find_row(p_rows, p_table, param, task, num_tasks, row_stride, first, col_stride, ALIGNED16, VEC)
        there = there & (take != 0)  # a task that gives nothing may hold anything
        held = find_held(p_held, p_table, param, task, num_tasks, num_params, held_stride, first, ALIGNED16, HELD_VEC)
        acc = tl.zeros((BLOCK,), ACC)
        for k in range(0, left // BLOCK):
            at = k * BLOCK + column
            acc += _average_tile(row, there, held, at, None, keep, take, col_stride, ALIGNED16, ACC)
        if left % BLOCK != 0:
            at = left // BLOCK * BLOCK + column
            acc += _average_tile(row, there, held, at, at < left, keep, take, col_stride, ALIGNED16, ACC)
        tl.store(p_totals + block.to(tl.int64) * num_tasks + task, tl.sum(acc, axis=0).to(tl.float64))


@triton.jit
def _excess_tile(row, there, held, at, inside, scale, col_stride, ALIGNED16: tl.constexpr, ACC: tl.constexpr):
    """Each element's share; NaN where its square would not be finite, whose sum then stays as it was."""
    offset = at if ALIGNED16 else at * col_stride
    x = tl.load(row + offset, mask=there if inside is None else there & inside, other=0.0).to(ACC) * scale
    before = tl.load(held + at, mask=inside)
    after = before + x * x
    finite = after - after == 0
    tl.store(held + at, tl.where(finite, after, before), mask=inside)
    # x / 1 where there is nothing yet: x * x may have been too small, and is 0 then
    share = x * x / tl.sqrt(tl.where(after > 0, after, 1.0))
    share = tl.where(finite, share, float("nan"))
    return share if inside is None else tl.where(inside, share, 0.0)


@triton.jit(
    do_not_specialize=[
        "num_tasks", "num_params", "row_stride", "col_stride", "held_stride", "num_columns", "tiles_per_block"
    ]
)  # fmt: skip
def excess_risks_kernel(
    p_rows, p_table, p_scale, p_held, p_totals,
    num_tasks, num_params, row_stride: tl.int64, col_stride: tl.int64, held_stride: tl.int64, num_columns: tl.int64,
    tiles_per_block,
    ALIGNED16: tl.constexpr, ACC: tl.constexpr, VEC: tl.constexpr, HELD_VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With x = scale row, `held += x²` for every task, and the sums of `x² / sqrt(held)`; p_scale: `[T]` float64."""
    block = tl.program_id(0)
    param, first, left = find_columns(p_table, 2, block, num_tasks, num_params, num_columns, tiles_per_block * BLOCK)
    column = tl.arange(0, BLOCK)
    for task in range(0, num_tasks):
        scale = tl.load(p_scale + task).to(ACC)
        row, there = find_row(p_rows, p_table, param, task, num_tasks, row_stride, first, col_stride, ALIGNED16, VEC)
        acc = tl.zeros((BLOCK,), ACC)
        if there & (scale != 0):
            held = find_held(
                p_held, p_table, param, task, num_tasks, num_params, held_stride, first, ALIGNED16, HELD_VEC
            )
            for k in range(0, left // BLOCK):
                at = k * BLOCK + column
                acc += _excess_tile(row, there, held, at, None, scale, col_stride, ALIGNED16, ACC)
            if left % BLOCK != 0:
                at = left // BLOCK * BLOCK + column
                acc += _excess_tile(row, there, held, at, at < left, scale, col_stride, ALIGNED16, ACC)
        tl.store(p_totals + block.to(tl.int64) * num_tasks + task, tl.sum(acc, axis=0).to(tl.float64))
