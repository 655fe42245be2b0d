"""Oracles of the ops that look at the gradients element by element, in plain PyTorch; see `reference.py`.

They take the gradients as the kernels do: lists with positions, or one bank and no position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmtl.core.gradient_rows import accumulate_dtype, first_of_params
from fastmtl.ops.gradients.order import NUMBERS_PER_COUNT, split_mix

# numbers that a parameter has in a stream: those of its columns begin at its position times this
COLUMNS = 1 << 40


class _Parameter(NamedTuple):
    position: int
    rows: Tensor  # `[T, P]` in the dtype of sums
    out: Tensor  # memory for one value a column


def _parameters(
    tensors: Sequence[Tensor], index: Sequence[int], num_tasks: int, num_params: int
) -> Iterator[_Parameter]:
    """Each parameter that has a gradient."""
    if tensors and not index:
        (bank,) = tensors
        yield _Parameter(0, bank.to(accumulate_dtype([bank.dtype])), bank.new_empty(bank.shape[1:]))
        return
    by_position = dict(zip(index, tensors, strict=True))
    for i, like in first_of_params(tensors, index, num_params).items():
        zero = torch.zeros_like(like)
        rows = torch.stack([by_position.get(t * num_params + i, zero).reshape(-1) for t in range(num_tasks)])
        yield _Parameter(i, rows.to(accumulate_dtype([like.dtype])), torch.empty_like(like))


def graddrop(
    tensors: Sequence[Tensor],
    index: Sequence[int],
    num_tasks: int,
    num_params: int,
    key: int,
    state: Tensor | None,
    leak: Tensor | None,
    present: Tensor | None = None,
) -> list[Tensor]:
    """Chen et al. 2020, Algorithm 1: in each column the elements of one sign, and `leak` of the others.

    With P the positive elements' share of the sum of absolute values, they are kept if u < P.
    """
    device = tensors[0].device if tensors else None
    zero = torch.zeros((), dtype=torch.int64, device=device)
    word, counter = (zero, zero) if state is None else state.unbind(0)
    stream = split_mix(word ^ key, counter * NUMBERS_PER_COUNT)
    columns = []
    for i, rows, out in _parameters(tensors, index, num_tasks, num_params):
        numbers = split_mix(stream, torch.arange(out.numel(), device=device) + i * COLUMNS)
        # the numbers follow the memory of the result
        numbers = numbers.as_strided(out.shape, out.stride()).reshape(-1)
        if present is not None:
            rows = torch.where(present[:, None], rows, 0.0)
        u = ((numbers >> 41 & (1 << 23) - 1).to(rows.dtype) + 0.5) * 2.0**-23
        above, below, kept_above, kept_below = (torch.zeros_like(rows[0]) for _ in range(4))
        for t, g in enumerate(rows):  # one after the other, as every backend adds them
            positive, negative = torch.where(g > 0, g, 0.0), torch.where(g > 0, 0.0, -g)
            above, below = above + positive, below + negative
            if leak is not None:
                share = leak[t].to(rows.dtype)
                kept_above, kept_below = kept_above + share * positive, kept_below + share * negative
        total = above + below
        found = torch.where(u * total < above, above - kept_below, kept_above - below)
        found = found + (total - total)  # NaN unless the total is finite
        columns.append(out.copy_(found.reshape(out.shape)))
    return columns


def trimmed_mean(
    tensors: Sequence[Tensor],
    index: Sequence[int],
    num_tasks: int,
    num_params: int,
    trim: int,
    present: Tensor | None = None,
) -> list[Tensor]:
    """Yin et al. 2018: the mean of each sorted column without `trim` elements at either end."""
    columns = []
    for _, rows, out in _parameters(tensors, index, num_tasks, num_params):
        here = torch.ones(num_tasks, dtype=torch.bool, device=rows.device) if present is None else present
        count = here.sum()
        # those that are not there are sorted to the end
        ordered = torch.where(here[:, None], rows, torch.inf).sort(dim=0).values
        place = torch.arange(num_tasks, device=rows.device)
        inside = (place >= trim) & (place < count - trim)
        left = count - 2 * trim
        mean = torch.where(inside[:, None], ordered, 0.0).sum(0) / torch.where(left > 0, left, torch.nan)
        poison = torch.where(here[:, None], rows - rows, 0.0).sum(0)
        columns.append(out.copy_((mean + poison).to(out.dtype).reshape(out.shape)))
    return columns


def _held_of(held: Sequence[Tensor], index: Sequence[int], slot: int, num_tasks: int) -> list[Tensor]:
    """What runs along with the `slot`-th parameter that has a gradient, for every task."""
    return list(held[0].unbind(0)) if not index else list(held[slot :: len(held) // num_tasks])


def average_gradients(
    tensors: Sequence[Tensor],
    index: Sequence[int],
    num_tasks: int,
    num_params: int,
    keep: Tensor,
    take: Tensor,
    averages: Sequence[Tensor],
    gram: bool,
) -> Tensor:
    """`averages = keep averages + take g`, in place; their squared lengths or their Gram matrix, float64."""
    device = tensors[0].device if tensors else None
    m = torch.zeros(num_tasks, num_tasks, dtype=torch.float64, device=device)
    poison = torch.zeros(num_tasks, dtype=torch.float64, device=device)
    for slot, (_, rows, _) in enumerate(_parameters(tensors, index, num_tasks, num_params)):
        after = []
        for t, held in enumerate(_held_of(averages, index, slot, num_tasks)):
            before = held.reshape(-1)
            added = torch.where(take[t] != 0, take[t].to(rows.dtype) * rows[t], 0.0)
            x = keep[t].to(rows.dtype) * before + added
            finite = torch.isfinite(x)
            poison[t] += (x - x).sum(dtype=torch.float64)
            held.copy_(torch.where(finite, x, before).reshape(held.shape))
            after.append(held.reshape(-1).to(torch.float64))
        stacked = torch.stack(after)
        m += stacked @ stacked.mT
    m = m.triu() + m.triu(1).mT
    return m + poison[:, None] + poison if gram else m.diagonal() + poison


def excess_risks(
    tensors: Sequence[Tensor],
    index: Sequence[int],
    num_tasks: int,
    num_params: int,
    scale: Tensor,
    squares: Sequence[Tensor],
) -> Tensor:
    """`squares += (scale g)²`, in place, and the sums of `(scale g)² / sqrt(squares)`, `[T]` float64."""
    device = tensors[0].device if tensors else None
    risks = torch.zeros(num_tasks, dtype=torch.float64, device=device)
    for slot, (_, rows, _) in enumerate(_parameters(tensors, index, num_tasks, num_params)):
        for t, held in enumerate(_held_of(squares, index, slot, num_tasks)):
            before = held.reshape(-1)
            x = torch.where(scale[t] != 0, scale[t].to(rows.dtype) * rows[t], 0.0)
            after = before + x * x
            risks[t] += (x * x / torch.where(after > 0, after, 1.0).sqrt() + (after - after)).sum(dtype=torch.float64)
            held.copy_(torch.where(torch.isfinite(after), after, before).reshape(held.shape))
    return risks
