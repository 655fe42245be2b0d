"""GradDrop: of each column the elements of one sign, drawn by how much of the column has it; one read of G.

For the names and shapes of arguments see `rows.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastmtl.kernels.gradients.pcgrad import NUMBERS_PER_COUNT, random_number
from fastmtl.kernels.gradients.rows import find_columns, find_row

# columns that a parameter has at most; fastmtl/ops/gradients/graddrop.py says the same
COLUMNS = tl.constexpr(1 << 40)


@triton.jit
def _graddrop_tile(
    p_rows, p_table, p_leak, p_present, p_to, param, first, at, inside, number, stream, num_tasks, row_stride,
    col_stride,
    ALIGNED16: tl.constexpr, ACC: tl.constexpr, TASKS: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of columns; inside None: all of them."""
    offset = at if ALIGNED16 else at * col_stride
    above = tl.zeros((BLOCK,), ACC)
    below = tl.zeros((BLOCK,), ACC)
    above_leak = tl.zeros((BLOCK,), ACC)
    below_leak = tl.zeros((BLOCK,), ACC)
    for tasks in range(0, num_tasks, TASKS):
        tiles = ()
        for k in tl.static_range(TASKS):
            row, there = find_row(
                p_rows, p_table, param, tasks + k, num_tasks, row_stride, first, col_stride, ALIGNED16, VEC
            )
            if p_present is not None:
                there = there & (tl.load(p_present + tasks + k, mask=tasks + k < num_tasks, other=0) != 0)
            tiles += (tl.load(row + offset, mask=there if inside is None else there & inside, other=0.0),)
        for k in tl.static_range(TASKS):
            x = tiles[k].to(ACC)
            positive = tl.where(x > 0, x, 0.0)
            negative = tl.where(x > 0, 0.0, -x)  # a NaN too
            above += positive
            below += negative
            if p_leak is not None:
                share = tl.load(p_leak + tasks + k, mask=tasks + k < num_tasks, other=0.0).to(ACC)
                above_leak += share * positive
                below_leak += share * negative
    bits = random_number(stream, (number + at).to(tl.uint64, bitcast=True)).to(tl.uint64, bitcast=True) >> 41
    # within (0, 1), exact in float32; the sign purity is above / total
    u = (bits.to(tl.int32).to(ACC) + 0.5) * (2.0**-23)
    total = above + below
    kept = tl.where(u * total < above, above - below_leak, above_leak - below)
    result = (kept + (total - total)).to(p_to.dtype.element_ty)  # NaN unless the total is finite
    tl.store(p_to + at, result, mask=inside)


@triton.jit(
    do_not_specialize=["num_tasks", "num_params", "row_stride", "col_stride", "num_columns", "tiles_per_block", "key"]
)
def graddrop_fwd_kernel(
    p_rows, p_table, p_state, p_leak, p_present, p_out,
    num_tasks, num_params, row_stride: tl.int64, col_stride: tl.int64, num_columns: tl.int64, tiles_per_block,
    key: tl.int64,
    ALIGNED16: tl.constexpr, ACC: tl.constexpr, TASKS: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """p_leak: `[T]` float64, what of the other sign passes, or None; p_present: `[T]` uint8, which rows count, or
    None. A table ends in the parameters' positions.
    """
    param, first, left = find_columns(
        p_table, 2, tl.program_id(0), num_tasks, num_params, num_columns, tiles_per_block * BLOCK
    )
    # each call has a stream of its own: a counter has too few numbers for all columns
    stream = key.to(tl.int64).to(tl.uint64, bitcast=True)
    counter = stream * 0
    if p_state is not None:
        stream = stream ^ tl.load(p_state).to(tl.uint64, bitcast=True)
        counter = tl.load(p_state + 1).to(tl.uint64, bitcast=True)
    stream = random_number(stream, counter * NUMBERS_PER_COUNT).to(tl.uint64, bitcast=True)
    if p_table is None:
        p_to = p_out + first
        number = first
    else:
        n = num_params.to(tl.int64)
        p_to = tl.load(p_table + n * (num_tasks + 3) + param).to(tl.pointer_type(p_out.dtype.element_ty))
        if ALIGNED16:
            p_to = tl.multiple_of(p_to, 16)
        p_to += first
        number = tl.load(p_table + n * (num_tasks + 4) + param) * COLUMNS + first
    column = tl.arange(0, BLOCK)
    for k in range(0, (left + BLOCK - 1) // BLOCK):
        at = k * BLOCK + column
        if (k + 1) * BLOCK <= left:
            _graddrop_tile(
                p_rows, p_table, p_leak, p_present, p_to, param, first, at, None, number, stream, num_tasks,
                row_stride, col_stride, ALIGNED16, ACC, TASKS, VEC, BLOCK,
            )  # fmt: skip
        else:
            _graddrop_tile(
                p_rows, p_table, p_leak, p_present, p_to, param, first, at, at < left, number, stream, num_tasks,
                row_stride, col_stride, ALIGNED16, ACC, TASKS, VEC, BLOCK,
            )  # fmt: skip
