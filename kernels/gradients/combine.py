"""Weighted sums of gradient rows, w G and C G: one read of G.

For the names and shapes of arguments see `rows.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastmtl.kernels.gradients.rows import find_columns, find_row


@triton.jit
def _combine_tile(
    p_rows, p_table, p_weights, p_sum, param, first, at, inside, num_tasks, num_sums, num_params, row_stride,
    col_stride, out_stride,
    ALIGNED16: tl.constexpr, ACC: tl.constexpr, TASKS: tl.constexpr, SUMS: tl.constexpr, VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """All sums of one tile of columns; inside None: all of them."""
    offset = at if ALIGNED16 else at * col_stride
    for sums in range(0, num_sums, SUMS):
        acc = ()
        for _ in tl.static_range(SUMS):
            acc += (tl.zeros((BLOCK,), ACC),)
        for tasks in range(0, num_tasks, TASKS):
            tiles = ()
            for k in tl.static_range(TASKS):
                row, there = find_row(
                    p_rows, p_table, param, tasks + k, num_tasks, row_stride, first, col_stride, ALIGNED16, VEC
                )
                # streamed: nobody reads it again but for further sums
                tiles += (tl.load(row + offset, mask=there if inside is None else there & inside, other=0.0),)
            for k in tl.static_range(TASKS):
                added = ()
                for m in tl.static_range(SUMS):
                    known = (tasks + k < num_tasks) & (sums + m < num_sums)
                    weight = tl.load(p_weights + (sums + m) * num_tasks + tasks + k, mask=known, other=0.0)
                    added += (acc[m] + weight.to(ACC) * tiles[k].to(ACC),)
                acc = added
        for m in tl.static_range(SUMS):
            if p_table is None:
                p_to = p_sum + (sums + m) * (out_stride * VEC if ALIGNED16 else out_stride)
            else:
                n = num_params.to(tl.int64)
                p_address = p_table + n * (num_tasks + 3 + sums + m) + param
                p_to = tl.load(p_address, mask=sums + m < num_sums, other=0)
                p_to = p_to.to(tl.pointer_type(p_sum.dtype.element_ty))
                if ALIGNED16:
                    p_to = tl.multiple_of(p_to, 16)
            wanted = sums + m < num_sums
            b_sum = acc[m].to(p_sum.dtype.element_ty)
            tl.store(p_to + first + at, b_sum, mask=wanted if inside is None else wanted & inside)


@triton.jit(
    do_not_specialize=[
        "num_tasks", "num_sums", "num_params", "row_stride", "col_stride", "out_stride",
        "num_columns", "tiles_per_block",
    ]
)  # fmt: skip
def combine_fwd_kernel(
    p_rows, p_table, p_weights, p_sum,
    num_tasks, num_sums, num_params, row_stride: tl.int64, col_stride: tl.int64, out_stride: tl.int64,
    num_columns: tl.int64, tiles_per_block,
    ALIGNED16: tl.constexpr, ACC: tl.constexpr, TASKS: tl.constexpr, SUMS: tl.constexpr, VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`num_sums` sums of T rows, `[K, T]` float64 times `[T, P]`: TASKS rows are read, then added, SUMS sums at once.

    The columns are walked backwards: what the Gram matrix has read last, the cache still holds.
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    param, first, left = find_columns(p_table, 2, block, num_tasks, num_params, num_columns, tiles_per_block * BLOCK)
    column = tl.arange(0, BLOCK)
    for k in range((left + BLOCK - 1) // BLOCK - 1, -1, -1):
        at = k * BLOCK + column
        if (k + 1) * BLOCK <= left:
            _combine_tile(
                p_rows, p_table, p_weights, p_sum, param, first, at, None, num_tasks, num_sums, num_params,
                row_stride, col_stride, out_stride, ALIGNED16, ACC, TASKS, SUMS, VEC, BLOCK,
            )  # fmt: skip
        else:
            _combine_tile(
                p_rows, p_table, p_weights, p_sum, param, first, at, at < left, num_tasks, num_sums, num_params,
                row_stride, col_stride, out_stride, ALIGNED16, ACC, TASKS, SUMS, VEC, BLOCK,
            )  # fmt: skip
