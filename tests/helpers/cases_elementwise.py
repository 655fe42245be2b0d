"""The ops that look at the gradients element by element, against plain float64 written from the papers: one table for
the CPU's tests and for Triton's interpreter."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from cases import BankCase, ListCase, assert_within, bank64, double, flat, gram_dtype, units
from torch import Tensor

from fastmtl import ops
from fastmtl.ops.gradients.arguments import read_rows

# sums of T numbers in float32 or float64, relative to the sum of their absolute values
SUM_TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6}
# sums over columns, relative; float32 within a block
LENGTH_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
# of float16, whose smallest number is 2**-24
SMALLEST = 2.0**-25

BANKS = [
    BankCase(1, 31),
    BankCase(3, 0),
    *(BankCase(t, p) for t, p in ((2, 1), (2, 4097), (3, 1023), (4, 1024), (5, 63), (8, 1025), (9, 65), (17, 130))),
    BankCase(64, 65),
    BankCase(128, 70),
    *(BankCase(5, 1025, dtype) for dtype in (torch.float64, torch.bfloat16, torch.float16)),
    BankCase(8, 1000, torch.bfloat16, "row_strided"),
    BankCase(3, 65, torch.float16, "transposed"),
    BankCase(17, 1025, torch.float32, "misaligned"),
    BankCase(3, 70, torch.float64, "step2"),
    BankCase(4, 70, torch.float32, "expanded_column"),
    BankCase(4, 70, torch.float32, "overlapping_rows"),
]
LISTS = [
    *(ListCase(kind, 3) for kind in ("dense", "nones", "absent_parameter", "absent_task", "scalars")),
    ListCase("nones", 5, torch.float64),
    ListCase("mixed_layouts", 8),
    ListCase("mixed_layouts", 5, torch.bfloat16),
    ListCase("mixed_dtypes", 3),
    ListCase("mixed_dtypes", 4, torch.float64),
    ListCase("empty_tensors", 2),
    ListCase("channels_last", 3, torch.bfloat16),
    ListCase("nones", 17, torch.float16),
    ListCase("no_parameter", 2),
    ListCase("all_none", 2),
    ListCase("many", 3),
]
CASES = [*BANKS, *LISTS]


def result(found: Any) -> Tensor:
    """`[P]` float64, of a bank's result or of lists'."""
    return found.double().cpu() if isinstance(found, Tensor) else flat(found)


def rounding(found: Any, unit: dict[torch.dtype, float] | None) -> Tensor:
    """The unit roundoff of each column's dtype; `unit`: of a backend that rounds otherwise."""
    columns = [found] if isinstance(found, Tensor) else found
    if unit is None:
        return units(columns)
    parts = [torch.full((x.numel(),), unit[x.dtype], dtype=torch.float64) for x in columns if x is not None]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _sum_tolerance(found: Any) -> Tensor:
    columns = [found] if isinstance(found, Tensor) else [x for x in found if x is not None]
    parts = [torch.full((x.numel(),), SUM_TOLERANCE[gram_dtype([x.dtype])], dtype=torch.float64) for x in columns]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def split_mix64(key: int, n: int) -> int:
    """Number n of the stream, as Steele, Lea and Flood (2014) have it, in Python's integers."""
    mask = (1 << 64) - 1
    z = (key + (n + 1) * 0x9E3779B97F4A7C15) & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return z ^ z >> 31


@functools.cache
def _drawn(stream: int, position: int, count: int) -> Tensor:
    bits = [split_mix64(stream, (position << 40) + k) >> 41 for k in range(count)]
    return (torch.tensor(bits, dtype=torch.float64) + 0.5) * 2.0**-23


def uniform_numbers(grads: Any, key: int, counter: int) -> Tensor:
    """The number in (0, 1) of each column, `[P]` float64."""
    stream = split_mix64(key & (1 << 64) - 1, counter * 2**14)

    if isinstance(grads, Tensor):
        return _drawn(stream, 0, grads.shape[1])
    parts = []
    for i in range(len(grads[0])):
        like = next((row[i] for row in grads if row[i] is not None), None)
        if like is not None:
            strides = torch.empty_like(like).stride()
            parts.append(_drawn(stream, i, like.numel()).as_strided(like.shape, strides).reshape(-1))
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def graddrop64(bank: Tensor, u: Tensor, leak: Tensor | None) -> tuple[Tensor, Tensor]:
    """Chen et al. 2020, Algorithm 1, word for word; and how near each draw was to the purity, relatively."""
    purity = 0.5 * (1 + bank.sum(0) / bank.abs().sum(0))
    leaks = torch.zeros(len(bank), dtype=torch.float64) if leak is None else leak.double()
    total = torch.zeros_like(bank[0])
    for g, share in zip(bank, leaks, strict=True):
        mask = (purity > u) * (g > 0) + (purity < u) * (g < 0)
        total = total + (share + (1 - share) * mask) * g
    return total, (purity - u).abs()


def check_graddrop(
    case: BankCase | ListCase, unit: dict[torch.dtype, float] | None = None, device: str = "cpu"
) -> None:
    bank = bank64(case)
    for seed, leak in ((3, None), (-5, torch.linspace(0, 1, case.num_tasks))):
        grads = case.make(device)
        state = ops.order_state(seed, device=device)
        for counter in range(2):
            found = ops.graddrop(grads, leak=None if leak is None else leak.to(device), generator=state)
            assert state.tolist() == [seed, counter + 1]
            u = uniform_numbers(grads, seed, counter)
            expected, distance = graddrop64(bank, u, leak)
            size = bank.abs().sum(0)
            # a tie to within rounding may fall to either side
            clear = (distance > 1e-6) & (size > 0)
            bound = _sum_tolerance(found) * size + rounding(found, unit) * expected.abs() * 1.001 + SMALLEST
            assert clear.double().mean() > 0.9 or clear.numel() < 80
            actual = result(found)
            assert_within(actual[clear], expected[clear], bound[clear])
            assert (actual[size == 0] == 0).all()


def check_trimmed_mean(
    case: BankCase | ListCase, unit: dict[torch.dtype, float] | None = None, device: str = "cpu"
) -> None:
    bank = bank64(case)
    most = (case.num_tasks - 1) // 2
    for trim in sorted({0, min(1, most), min(3, most), most}):
        absent = torch.zeros(case.num_tasks, dtype=torch.bool)
        for flags in (None, ~absent, torch.arange(case.num_tasks) % 3 != 1):
            rows = bank if flags is None else bank[flags]
            if len(rows) <= 2 * trim:
                continue
            found = ops.trimmed_mean(case.make(device), trim, present=None if flags is None else flags.to(device))
            ordered = rows.sort(dim=0).values[trim : len(rows) - trim]
            expected = ordered.mean(0)
            bound = _sum_tolerance(found) * ordered.abs().mean(0) + rounding(found, unit) * expected.abs() * 1.001
            assert_within(result(found), expected, bound + SMALLEST)


def held_for(grads: Any, generator: torch.Generator, positive: bool = False) -> Any:
    """Random memory that runs along with gradients, in their form and in the order of their results."""

    def made(like: Tensor, shape: Sequence[int]) -> Tensor:
        x = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
        x = x.square() if positive else x
        return torch.empty_like(like, dtype=gram_dtype([like.dtype])).copy_(x)

    if isinstance(grads, Tensor):
        like = torch.empty(grads.shape, dtype=grads.dtype, device=grads.device)
        return made(like, grads.shape)
    first = [next((row[i] for row in grads if row[i] is not None), None) for i in range(len(grads[0]))]
    return [[None if x is None else made(x, x.shape) for x in first] for _ in grads]


def _tolerance(grads: Any) -> dict[str, float]:
    dtypes = [x.dtype for x in read_rows(grads).tensors] or [torch.float64]
    # lists of several dtypes are as exact as the least of them
    dtype = torch.float32 if any(d != torch.float64 for d in dtypes) else torch.float64
    return {"sum": SUM_TOLERANCE[dtype], "length": LENGTH_TOLERANCE[dtype]}


def check_average_gradients(case: BankCase | ListCase, device: str = "cpu") -> None:
    generator = torch.Generator().manual_seed(5)
    bank = bank64(case)
    keep = torch.linspace(0.3, 1.2, case.num_tasks, dtype=torch.float64)
    take = torch.linspace(-1, 2, case.num_tasks, dtype=torch.float64)
    take[0] = 0.0
    for gram in (False, True):
        grads = case.make(device)
        held = held_for(grads, generator)
        before = double(held).clone() if bank.numel() else torch.zeros_like(bank)
        found = ops.average_gradients(grads, held, keep.to(device), take.to(device), gram=gram)
        after = double(held) if bank.numel() else torch.zeros_like(bank)
        tolerance = _tolerance(grads)
        expected = keep[:, None] * before + take[:, None] * bank
        size = (keep[:, None] * before).abs() + (take[:, None] * bank).abs()
        assert_within(after, expected, tolerance["sum"] * size)
        lengths = expected.norm(dim=1)
        assert found.dtype == torch.float64
        if gram:
            assert torch.equal(found, found.mT)
            assert_within(found, expected @ expected.mT, tolerance["length"] * lengths[:, None] * lengths)
        else:
            assert_within(found, lengths.square(), tolerance["length"] * lengths.square())


def check_excess_risks(case: BankCase | ListCase, device: str = "cpu") -> None:
    generator = torch.Generator().manual_seed(6)
    bank = bank64(case)
    scale = torch.linspace(0.5, 2, case.num_tasks, dtype=torch.float64)
    scale[1:2] = 0.0
    grads = case.make(device)
    held = held_for(grads, generator, positive=True)
    before = double(held).clone() if bank.numel() else torch.zeros_like(bank)
    found = ops.excess_risks(grads, held, scale.to(device))
    after = double(held) if bank.numel() else torch.zeros_like(bank)
    tolerance = _tolerance(grads)
    squares = (scale[:, None] * bank).square()
    assert_within(after, before + squares, tolerance["sum"] * (before + squares))
    expected = (squares / (before + squares).sqrt()).sum(1)
    assert_within(found, expected, tolerance["length"] * expected)
