"""What the kernels of gradient surgery share: finding a program's parameter and columns, and a row's memory.

A bank is read by its strides. Lists come with a table of int64, for n parameters that have elements:

    [n, T]  addresses of the gradients, 0: none
    [n]     numbers of elements
    [n]     the Gram matrix's first chunks
    [n]     the weighted sums' first blocks
    [K, n]  addresses of the sums

A kernel works on one *part*: a chunk of columns (Gram matrix) or a block of them (weighted sums) of one parameter. In
signatures, with P columns, T rows and TP the power of two from T on:

    p_rows     [T, P], a bank; of lists: any of the gradients, for its dtype
    p_table    as above; None: a bank
    p_parts    [parts, TP, TP], each chunk's products
    p_sums     [groups + 2, TP, TP] float64: the sums of groups of parts, their sum, and that as a symmetric matrix
    p_gram     [T, T]
    p_tickets  [1 + MAX_GROUPS] int32, zero: how many groups, and how many parts of each, are done
    p_order    [T, num_visits] int64: which tasks each row visits
    p_state    [2] int64: the key of the random orders, and how many were drawn; None: `key` alone is told
    p_weights  [T] or [K, T] float64
    p_sum      [K, P], the weighted sums, K = num_sums
    row_stride, col_stride, out_stride
               from row to row, from column to column, and from sum to sum of a bank, in elements
    ALIGNED16  whether each row is dense and begins at a multiple of 16 bytes: row_stride and out_stride are counted in
               vectors of VEC elements then, so that the compiler knows by what they are aligned
    ACC        the dtype of sums
    b_*        a block of values in registers
"""

from __future__ import annotations

import triton
import triton.language as tl

# parameters that a program looks at together when it searches for its own
SEARCH = tl.constexpr(128)


@triton.jit
def find_columns(
    p_table,
    section,
    part,
    num_tasks,
    num_params,
    num_columns,  # P, of a bank
    columns_per_part,
):
    """Parameter, first column and number of columns of part `part`; `section`: where the parameters' parts begin.

    The number of columns is an int32 and may be 0.
    """
    if p_table is None:
        param = part * 0
        first = part.to(tl.int64) * columns_per_part
        left = num_columns - first
    else:
        p_first = p_table + num_params.to(tl.int64) * (num_tasks + section)
        known = tl.zeros((SEARCH,), tl.int32)
        for begin in range(0, num_params, SEARCH):
            k = begin + tl.arange(0, SEARCH)
            known += (tl.load(p_first + k, mask=k < num_params, other=1 << 62) <= part).to(tl.int32)
        param = tl.sum(known, axis=0) - 1
        first = (part - tl.load(p_first + param)) * columns_per_part
        left = tl.load(p_table + num_params.to(tl.int64) * num_tasks + param) - first
    return param, first, tl.minimum(left, columns_per_part).to(tl.int32)


@triton.jit
def find_row(
    p_rows, p_table, param, task, num_tasks, row_stride, first, col_stride, ALIGNED16: tl.constexpr, VEC: tl.constexpr
):
    """Address of column `first` of a task's row (one task or a block of them), and whether there is such a row.

    ALIGNED16: rows are 16-byte aligned, `row_stride` counts vectors and `first` is a multiple of one.
    """
    if p_table is None:
        there = task < num_tasks
        p = p_rows + task * (row_stride * VEC if ALIGNED16 else row_stride)
    else:
        address = tl.load(p_table + param.to(tl.int64) * num_tasks + task, mask=task < num_tasks, other=0)
        there = address != 0
        p = address.to(tl.pointer_type(p_rows.dtype.element_ty))
        if ALIGNED16:
            p = tl.multiple_of(p, 16)
    return p + (first if ALIGNED16 else first * col_stride), there
