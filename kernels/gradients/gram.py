"""The Gram matrix: sums over chunks of columns, then by whoever comes last their sum and PCGrad's T x T problem.

For the names and shapes of arguments see `rows.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastmtl.kernels.gradients.pcgrad import draw_visits, solve_rows
from fastmtl.kernels.gradients.rows import find_columns, find_row

# tasks up to which products are made on the ordinary cores
MAX_PAIRED = 8
_UNSPECIALISED = [
    "num_tasks", "num_params", "row_stride", "col_stride", "num_columns", "tiles_per_chunk", "first_part",
    "num_parts", "group_size", "num_visits", "include_self", "mean", "key", "present_low", "present_high",
]  # fmt: skip


@triton.jit
def _sum_of(p_from, p_to, count, ENTRIES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums `[count, ENTRIES]` over the first dimension in float64, in a fixed order."""
    for begin in range(0, ENTRIES, BLOCK):
        entry = begin + tl.arange(0, BLOCK)
        total = tl.zeros((ROWS, BLOCK), tl.float64)
        for first in range(0, count, ROWS):
            row = first + tl.arange(0, ROWS)
            at = row[:, None].to(tl.int64) * ENTRIES + entry[None, :]
            # not from L1: other programs have written this
            total += tl.load(p_from + at, mask=(row < count)[:, None], other=0.0, cache_modifier=".cg").to(tl.float64)
        tl.store(p_to + entry, tl.sum(total, axis=0))


@triton.jit
def _mirror(p_total, p_matrix, p_gram, num_tasks, ROWS: tl.constexpr, TP: tl.constexpr):
    """The upper triangle of the sums as a symmetric matrix: `[TP, TP]` float64, and `[T, T]` for the caller."""
    for begin in range(0, TP, ROWS):
        s = begin + tl.arange(0, ROWS)[:, None]
        t = tl.arange(0, TP)[None, :]
        b_gram = tl.load(p_total + tl.minimum(s, t) * TP + tl.maximum(s, t))
        tl.store(p_matrix + s * TP + t, b_gram)
        inside = (s < num_tasks) & (t < num_tasks)
        tl.store(p_gram + s * num_tasks + t, b_gram.to(p_gram.dtype.element_ty), mask=inside)


@triton.jit
def _here(task, present_low, present_high):
    """Whether tasks are present: bits of two words."""
    word = tl.where(task < 64, present_low, present_high)
    return ((word >> (task & 63).to(tl.int64)) & 1) != 0


@triton.jit
def _solve(
    p_matrix, p_order, p_weights, num_tasks, num_visits, include_self, mean, present_low, present_high,
    PROJECT: tl.constexpr, ROWS: tl.constexpr, TP: tl.constexpr,
):  # fmt: skip
    """PCGrad's coefficients `[T, T]` (PROJECT), or what each gradient is multiplied by `[T]`."""
    t = tl.arange(0, TP)
    t_here = _here(t, present_low, present_high) & (t < num_tasks)
    total = tl.zeros((TP,), tl.float64)
    for first in range(0, num_tasks, ROWS):
        # the matrix is symmetric: its columns are read as rows
        c = solve_rows(p_matrix, p_order, first, num_tasks, num_visits, include_self, 1, TP, ROWS, TP)
        i = first + tl.arange(0, ROWS)
        if PROJECT:
            inside = (i < num_tasks)[:, None] & (t < num_tasks)[None, :]
            tl.store(p_weights + i[:, None] * num_tasks + t[None, :], c, mask=inside)
        else:
            counts = _here(i, present_low, present_high) & (i < num_tasks)
            total += tl.sum(tl.where(counts[:, None], c, 0.0), axis=0)
    if not PROJECT:
        divisor = tl.where(mean != 0, tl.sum(t_here.to(tl.int32), axis=0), 1).to(tl.float64)
        tl.store(p_weights + t, tl.where(t_here, total / divisor, 0.0), mask=t < num_tasks)


@triton.jit
def _finish(
    p_parts, p_sums, p_gram, p_tickets, p_order, p_state, p_weights,
    part, num_tasks, num_parts, group_size, num_visits, include_self, mean, present_low, present_high,
    METHOD: tl.constexpr, SOLVE_ROWS: tl.constexpr, TP: tl.constexpr,
    SUM_ROWS: tl.constexpr, SUM_BLOCK: tl.constexpr,
):  # fmt: skip
    """What follows a program's own part: the last one of a group sums the group, the last of those does the rest."""
    ENTRIES: tl.constexpr = TP * TP
    num_groups = (num_parts + group_size - 1) // group_size
    group = part // group_size
    members = tl.minimum(group_size, num_parts - group * group_size)
    # every thread has written before the ticket is taken
    tl.debug_barrier()
    if tl.atomic_add(p_tickets + 1 + group, 1, sem="acq_rel") == members - 1:
        tl.store(p_tickets + 1 + group, 0)
        p_from = p_parts + (group * group_size).to(tl.int64) * ENTRIES
        _sum_of(p_from, p_sums + group * ENTRIES, members, ENTRIES, SUM_ROWS, SUM_BLOCK)
        tl.debug_barrier()
        if tl.atomic_add(p_tickets, 1, sem="acq_rel") == num_groups - 1:
            tl.store(p_tickets, 0)
            p_total = p_sums + num_groups * ENTRIES
            p_matrix = p_total + ENTRIES
            _sum_of(p_sums, p_total, num_groups, ENTRIES, SUM_ROWS, SUM_BLOCK)
            tl.debug_barrier()
            _mirror(p_total, p_matrix, p_gram, num_tasks, SOLVE_ROWS, TP)
            if METHOD != "gram":
                tl.debug_barrier()
                _solve(
                    p_matrix, p_order, p_weights, num_tasks, num_visits, include_self, mean, present_low,
                    present_high, METHOD == "project", SOLVE_ROWS, TP,
                )  # fmt: skip
                if p_state is not None:
                    # all programs have drawn: they did so before they took their tickets
                    tl.atomic_add(p_state + 1, 1, sem="relaxed")


@triton.jit
def _draw(p_order, p_state, key, part, num_parts, num_tasks, TP: tl.constexpr):
    """This program's rows of the random order, which needs no Gram matrix: nobody waits for it in the end."""
    for row in range(part, num_tasks, num_parts):
        draw_visits(p_order, p_state, key, row, num_tasks, TP)


@triton.jit
def _paired_tile(acc, rows, there, at, inside, ACC: tl.constexpr, TP: tl.constexpr):
    """Adds the products of one tile `[LANES, VEC]` of every two rows: one sum per lane and pair; inside None: all."""
    tiles = ()
    for t in tl.static_range(TP):
        if inside is None:
            tile = tl.load(rows[t] + at, mask=there[t], other=0.0)
        else:
            tile = tl.load(rows[t] + at, mask=there[t] & inside, other=0.0)
        tiles += (tile.to(ACC),)
    added = ()
    for s in tl.static_range(TP):
        for t in tl.static_range(s, TP):
            product = tl.sum(tiles[s] * tiles[t], axis=1)
            added += (acc[s * TP - s * (s - 1) // 2 + t - s] + product,)
    return added


@triton.jit(do_not_specialize=_UNSPECIALISED)
def gram_paired_kernel(
    p_rows, p_table, p_parts, p_sums, p_gram, p_tickets, p_order, p_state, p_weights,
    num_tasks, num_params, row_stride: tl.int64, col_stride: tl.int64, num_columns: tl.int64, tiles_per_chunk,
    first_part, num_parts, group_size, num_visits, include_self, mean, key: tl.int64, present_low: tl.int64,
    present_high: tl.int64,
    METHOD: tl.constexpr, DRAW: tl.constexpr, ALIGNED16: tl.constexpr, ACC: tl.constexpr, TP: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr, SOLVE_ROWS: tl.constexpr,
    SUM_ROWS: tl.constexpr, SUM_BLOCK: tl.constexpr,
):  # fmt: skip
    """Up to 8 tasks: every lane reads a vector of every row and keeps a sum for every two rows."""
    TILE: tl.constexpr = LANES * VEC
    chunk = tl.program_id(0)
    part = first_part + chunk
    if DRAW:
        _draw(p_order, p_state, key, part, num_parts, num_tasks, TP)
    param, first, left = find_columns(p_table, 1, chunk, num_tasks, num_params, num_columns, tiles_per_chunk * TILE)
    rows = ()
    there = ()
    for t in tl.static_range(TP):
        row, is_there = find_row(p_rows, p_table, param, t, num_tasks, row_stride, first, col_stride, ALIGNED16, VEC)
        rows += (row,)
        there += (is_there,)
    column = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    acc = ()
    for _ in tl.static_range(TP * (TP + 1) // 2):
        acc += (tl.zeros((LANES,), ACC),)
    full = left // TILE
    for k in tl.range(0, full, loop_unroll_factor=UNROLL):
        at = k * TILE + column
        acc = _paired_tile(acc, rows, there, at if ALIGNED16 else at * col_stride, None, ACC, TP)
    if full * TILE < left:
        at = full * TILE + column
        acc = _paired_tile(acc, rows, there, at if ALIGNED16 else at * col_stride, at < left, ACC, TP)
    p_own = p_parts + part.to(tl.int64) * (TP * TP)
    for s in tl.static_range(TP):
        for t in tl.static_range(s, TP):
            tl.store(p_own + s * TP + t, tl.sum(acc[s * TP - s * (s - 1) // 2 + t - s], axis=0))
    _finish(
        p_parts, p_sums, p_gram, p_tickets, p_order, p_state, p_weights,
        part, num_tasks, num_parts, group_size, num_visits, include_self, mean, present_low, present_high,
        METHOD, SOLVE_ROWS, TP, SUM_ROWS, SUM_BLOCK,
    )  # fmt: skip


@triton.jit
def _product_tile(acc, row, there, at, inside, CAST: tl.constexpr):
    """Adds a tile `[TP, BLOCK]` times its transpose; inside None: all columns. CAST: see `launches.in_interpreter`."""
    if inside is None:
        tile = tl.load(row[:, None] + at[None, :], mask=there[:, None], other=0.0)
    else:
        tile = tl.load(row[:, None] + at[None, :], mask=there[:, None] & inside[None, :], other=0.0)
    if CAST:
        tile = tile.to(tl.float32)
    return tl.dot(tile, tl.trans(tile), acc, input_precision="tf32x3", out_dtype=acc.dtype)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def gram_product_kernel(
    p_rows, p_table, p_parts, p_sums, p_gram, p_tickets, p_order, p_state, p_weights,
    num_tasks, num_params, row_stride: tl.int64, col_stride: tl.int64, num_columns: tl.int64, tiles_per_chunk,
    first_part, num_parts, group_size, num_visits, include_self, mean, key: tl.int64, present_low: tl.int64,
    present_high: tl.int64,
    METHOD: tl.constexpr, DRAW: tl.constexpr, ALIGNED16: tl.constexpr, ACC: tl.constexpr, TP: tl.constexpr,
    BLOCK: tl.constexpr, VEC: tl.constexpr, CAST: tl.constexpr, SOLVE_ROWS: tl.constexpr,
    SUM_ROWS: tl.constexpr, SUM_BLOCK: tl.constexpr,
):  # fmt: skip
    """More than 8 tasks: products of tiles on the tensor cores, two at a time."""
    TILE: tl.constexpr = 2 * BLOCK
    chunk = tl.program_id(0)
    part = first_part + chunk
    if DRAW:
        _draw(p_order, p_state, key, part, num_parts, num_tasks, TP)
    param, first, left = find_columns(p_table, 1, chunk, num_tasks, num_params, num_columns, tiles_per_chunk * TILE)
    task = tl.arange(0, TP)
    row, there = find_row(p_rows, p_table, param, task, num_tasks, row_stride, first, col_stride, ALIGNED16, VEC)
    column = tl.arange(0, BLOCK)
    acc = tl.zeros((TP, TP), ACC)
    full = left // TILE
    if p_rows.dtype.element_ty.primitive_bitwidth == 16:
        # tensor cores may round sums toward zero: few terms there, the rest here. Two products, because the compiler
        # would fold the sum with a single one into the product again
        for k in range(full):
            one = k * TILE + column
            two = one + BLOCK
            b_gram = _product_tile(
                tl.zeros((TP, TP), ACC), row, there, one if ALIGNED16 else one * col_stride, None, CAST
            )
            acc += _product_tile(b_gram, row, there, two if ALIGNED16 else two * col_stride, None, CAST)
    else:
        # tf32x3 adds each product to the sum outside of the tensor cores, and those of float64 round to nearest
        for k in range(2 * full):
            one = k * BLOCK + column
            acc = _product_tile(acc, row, there, one if ALIGNED16 else one * col_stride, None, CAST)
    for at in tl.range(full * TILE, left, BLOCK, num_stages=1):
        one = at + column
        acc += _product_tile(
            tl.zeros((TP, TP), ACC), row, there, one if ALIGNED16 else one * col_stride, one < left, CAST
        )
    entry = task[:, None] * TP + task[None, :]
    tl.store(p_parts + part.to(tl.int64) * (TP * TP) + entry, acc.to(p_parts.dtype.element_ty))
    _finish(
        p_parts, p_sums, p_gram, p_tickets, p_order, p_state, p_weights,
        part, num_tasks, num_parts, group_size, num_visits, include_self, mean, present_low, present_high,
        METHOD, SOLVE_ROWS, TP, SUM_ROWS, SUM_BLOCK,
    )  # fmt: skip
