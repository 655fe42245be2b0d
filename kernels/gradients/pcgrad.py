"""PCGrad's T x T problem and its random orders: `csrc/common/solvers.h` in Triton, many rows side by side.

For the names and shapes of arguments see `rows.py`; here the Gram matrix has any strides, `stride_s` and `stride_t`.
"""

from __future__ import annotations

import triton
import triton.language as tl

# fastmtl/ops/gradients/order.py says the same
NUMBERS_PER_COUNT = tl.constexpr(128 * 128)
GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
MIX_2 = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def random_number(key, n):
    """Number n of the SplitMix64 stream `key` (Steele, Lea, Flood 2014), both uint64, as a signed integer."""
    z = key + (n + 1) * GOLDEN
    z = (z ^ (z >> 30)) * MIX_1
    z = (z ^ (z >> 27)) * MIX_2
    return (z ^ (z >> 31)).to(tl.int64, bitcast=True)


@triton.jit
def draw_visits(p_order, p_state, key, row, num_tasks, TP: tl.constexpr):
    """Writes row `row` of the random order: the tasks by rising random number, equal ones by task."""
    stream = key.to(tl.int64).to(tl.uint64, bitcast=True)
    n = (row * num_tasks).to(tl.uint64)
    if p_state is not None:
        stream = stream ^ tl.load(p_state).to(tl.uint64, bitcast=True)
        n += tl.load(p_state + 1).to(tl.uint64, bitcast=True) * NUMBERS_PER_COUNT
    BLOCK: tl.constexpr = min(TP, 32)
    t = tl.arange(0, TP)
    mine = random_number(stream, n + t.to(tl.uint64))[:, None]  # [TP, 1]
    rank = tl.zeros((TP,), tl.int32)
    for begin in range(0, num_tasks, BLOCK):
        u = begin + tl.arange(0, BLOCK)
        other = random_number(stream, n + u.to(tl.uint64))[None, :]  # [1, BLOCK]
        before = (other < mine) | ((other == mine) & (u[None, :] < t[:, None]))
        rank += tl.sum((before & (u < num_tasks)[None, :]).to(tl.int32), axis=1)
    tl.store(p_order + row * num_tasks + rank, t.to(tl.int64), mask=t < num_tasks)


@triton.jit
def _visit(p_order, i, k, num_tasks, num_visits):
    """Task that each of the rows i visits at step k; -1 past the end."""
    return tl.load(p_order + i.to(tl.int64) * num_visits + k, mask=(i < num_tasks) & (k < num_visits), other=-1)


@triton.jit
def _column(p_gram, j, num_tasks, stride_s, stride_t, TP: tl.constexpr):
    """M[:, j] and M[j, j] for every j of a block: `[rows, TP]` and `[rows]`; NaN where j is out of range."""
    t = tl.arange(0, TP)
    known = (j >= 0) & (j < num_tasks)
    at = tl.minimum(tl.maximum(j, 0), num_tasks - 1)
    inside = known[:, None] & (t < num_tasks)[None, :]
    column = tl.load(p_gram + at[:, None] * stride_t + t[None, :] * stride_s, mask=inside, other=0.0)
    return column, tl.load(p_gram + at * (stride_s + stride_t), mask=known, other=float("nan"))


@triton.jit
def solve_rows(
    p_gram, p_order, first, num_tasks, num_visits, include_self, stride_s, stride_t, ROWS: tl.constexpr,
    TP: tl.constexpr,
):  # fmt: skip
    """Rows `first` to `first + ROWS` of PCGrad's coefficients (Yu et al. 2020, Algorithm 1), float64 `[ROWS, TP]`.

    M[s, t] lies at `s * stride_s + t * stride_t`. A non-finite entry met, or a visit out of range, makes the row NaN.
    """
    i = first + tl.arange(0, ROWS)
    t = tl.arange(0, TP)[None, :]
    c = (i[:, None] == t).to(tl.float64)
    bad = i < 0
    # visits are read two steps ahead and columns one: neither depends on the coefficients
    j = _visit(p_order, i, 0, num_tasks, num_visits)
    j_next = _visit(p_order, i, 1, num_tasks, num_visits)
    column, norm = _column(p_gram, j, num_tasks, stride_s, stride_t, TP)
    for k in range(num_visits):
        j_later = _visit(p_order, i, k + 2, num_tasks, num_visits)
        column_next, norm_next = _column(p_gram, j_next, num_tasks, stride_s, stride_t, TP)
        visits = (i < num_tasks) & ((j != i) | (include_self != 0))
        # a column that the row does not use is not met: 0 * NaN must not leak
        d = tl.sum(tl.where(c != 0, c * column, 0.0), axis=1)
        bad = bad | (visits & ~((tl.abs(d) < float("inf")) & (tl.abs(norm) < float("inf"))))
        conflict = visits & (d < 0) & (norm != 0)
        step = tl.where(conflict, d / tl.where(conflict, norm, 1.0), 0.0)
        c = tl.where(t == j[:, None], c - step[:, None], c)
        j = j_next
        j_next = j_later
        column = column_next
        norm = norm_next
    return tl.where(bad[:, None], float("nan"), c)


@triton.jit(do_not_specialize=["num_tasks", "num_visits", "include_self"])
def pcgrad_coefficients_kernel(
    p_gram, p_order, p_out, num_tasks, num_visits, include_self, ROWS: tl.constexpr, TP: tl.constexpr
):
    """ROWS rows of the coefficients of a `[T, T]` float64 matrix, in `[T, T]` float64."""
    first = tl.program_id(0) * ROWS
    c = solve_rows(p_gram, p_order, first, num_tasks, num_visits, include_self, num_tasks, 1, ROWS, TP)
    i = first + tl.arange(0, ROWS)[:, None]
    t = tl.arange(0, TP)[None, :]
    tl.store(p_out + i * num_tasks + t, c, mask=(i < num_tasks) & (t < num_tasks))
