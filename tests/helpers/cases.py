"""The shared table of the op tests: inputs by shape, dtype and memory layout, tolerances, samples for opcheck.

Oracles are float64: inputs are first rounded to the dtype under test, then upcast and given to
`fastmtl.ops.gradients.reference`.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmtl.core.gradient_rows import GradientRows, bank_rows, first_of_params
from fastmtl.ops.gradients import reference
from fastmtl.ops.gradients.arguments import read_lists

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# relative to |g_s| |g_t|: products of 16-bit inputs are exact in float32, so their sums are as good as float32's
GRAM_TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}
# the reference sums a whole row as one matrix product in float32
REFERENCE_SLACK = 50.0
# a sum of equal products, or one that starts with a huge one, is rounded the same way at every step
BIASED_SLACK = 8.0
# relative to sum |w| |g|, on top of one rounding of the result to its dtype
COMBINE_TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}
# relative to `pcgrad_scale`, on top of one rounding of the result to its dtype
PCGRAD_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
# relative to the largest coefficient of a row, Gram matrix in float64
COEFFICIENT_TOLERANCE = 1e-11

Lists = list[list[Tensor | None]]


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def gram_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def generator_of(key: object) -> torch.Generator:
    """A seed that depends on the case alone, so that a test gives the same numbers when run by itself."""
    return torch.Generator().manual_seed(zlib.crc32(str(key).encode()))


def random_gradients(num_tasks: int, num_columns: int, generator: torch.Generator) -> Tensor:
    """`[T, P]` float64: a common direction, taken along or against, so that many tasks conflict; uneven norms."""
    noise = torch.randn(num_tasks, num_columns, generator=generator, dtype=torch.float64)
    common = torch.randn(1, num_columns, generator=generator, dtype=torch.float64)
    sign = torch.randn(num_tasks, 1, generator=generator, dtype=torch.float64)
    scale = torch.randn(num_tasks, 1, generator=generator, dtype=torch.float64).mul(0.5).exp()
    return scale * (noise + sign * common)


# --- layouts: each stores the values of `x` in other strides; what lies between them is NaN


def _contiguous(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _row_strided(x: Tensor) -> Tensor:
    wide = x.new_full((x.shape[0], x.shape[1] + 13), torch.nan)
    view = wide[:, 5 : 5 + x.shape[1]]
    view.copy_(x)
    return view


def _transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def _transposed_slice(x: Tensor) -> Tensor:
    wide = x.new_full((x.shape[1], x.shape[0] + 3), torch.nan)
    view = wide[:, 1 : 1 + x.shape[0]].mT
    view.copy_(x)
    return view


def _step2(x: Tensor) -> Tensor:
    wide = x.new_full((x.shape[0], 2 * x.shape[1] + 1), torch.nan)
    view = wide[:, 1::2]
    view.copy_(x)
    return view


def _misaligned(x: Tensor) -> Tensor:
    flat = x.new_full((x.numel() + 3,), torch.nan)
    view = flat[1 : 1 + x.numel()].view(x.shape)
    view.copy_(x)
    return view


def _expanded_row(x: Tensor) -> Tensor:
    return x[:1].clone().expand(x.shape)


def _expanded_column(x: Tensor) -> Tensor:
    return x[:, :1].clone().expand(x.shape)


def _overlapping_rows(x: Tensor) -> Tensor:
    flat = x.reshape(-1)[: x.shape[0] + x.shape[1] - 1].clone()
    return flat.as_strided(x.shape, (1, 1))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": _contiguous,
    "row_strided": _row_strided,
    "transposed": _transposed,
    "transposed_slice": _transposed_slice,
    "step2": _step2,
    "misaligned": _misaligned,
    "expanded_row": _expanded_row,
    "expanded_column": _expanded_column,
    "overlapping_rows": _overlapping_rows,
}


@dataclass(frozen=True)
class BankCase:
    """One `[T, P]` bank."""

    num_tasks: int
    num_columns: int
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"

    def __str__(self) -> str:
        return f"T{self.num_tasks}-P{self.num_columns}-{short(self.dtype)}-{self.layout}"

    def make(self, device: str = "cpu") -> Tensor:
        x = random_gradients(self.num_tasks, self.num_columns, generator_of(self))
        return LAYOUTS[self.layout](x.to(device, self.dtype))


# every T meets several P and every P several T; block edges are 64 columns (registers) and 1024 (cache)
BANK_SHAPES = (
    (1, 0),
    (1, 1),
    (1, 1000),
    (2, 3),
    (2, 65),
    (2, 4097),
    (3, 0),
    (3, 31),
    (3, 1023),
    (3, 70000),
    (5, 63),
    (5, 1025),
    (8, 1),
    (8, 64),
    (8, 1024),
    (8, 70000),
    (9, 65),
    (9, 4097),
    (17, 31),
    (17, 1000),
    (33, 3),
    (33, 63),
    (33, 1025),
    (64, 1000),
    (128, 0),
    (128, 64),
    (128, 1025),
)
LAYOUT_SHAPES = ((1, 1), (3, 65), (8, 1000), (3, 4097), (17, 1025))

# results of 4 MB and more take another way to memory, and more columns than 128 chunks of 8192 make chunks longer
LARGE_BANKS = (BankCase(3, 1_200_003), BankCase(2, 2_200_003, torch.bfloat16))

BANK_CASES = [BankCase(t, p, dtype) for t, p in BANK_SHAPES for dtype in DTYPES] + [
    BankCase(t, p, dtype, layout)
    for layout in LAYOUTS
    if layout != "contiguous"
    for t, p in LAYOUT_SHAPES
    for dtype in DTYPES
]
BANK_CASES += LARGE_BANKS


# --- lists of tensors


def _identity(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last) if x.dim() == 4 else _identity(x)


def _reversed_dims(x: Tensor) -> Tensor:
    order = list(range(x.dim()))[::-1]
    return x.permute(order).contiguous().permute(order)


def _sliced(x: Tensor) -> Tensor:
    if x.dim() == 0:
        return x.new_full((3,), torch.nan).fill_(x.item())[1]
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan)
    view = wide[..., 1::2]
    view.copy_(x)
    return view


def _expanded(x: Tensor) -> Tensor:
    return x[:1].clone().expand(x.shape) if x.dim() else _identity(x)


def _offset(x: Tensor) -> Tensor:
    view = x.new_full((x.numel() + 1,), torch.nan)[1:].view(x.shape)
    view.copy_(x)
    return view


_NET = ((16, 3, 3, 3), (16,), (8, 16, 3, 3), (8,), (10, 200), (10,))
_MIXED_LAYOUTS = (_channels_last, _identity, _reversed_dims, _sliced, _expanded, _offset)

LIST_SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "dense": _NET,
    "nones": _NET,
    "absent_parameter": _NET,
    "absent_task": _NET,
    "all_none": _NET,
    "no_parameter": (),
    "channels_last": _NET,
    "mixed_layouts": (*_NET, (2, 5, 4, 3)),
    "empty_tensors": ((0,), (7,), (3, 0, 2), (5,)),
    "only_empty": ((0,), (2, 0)),
    "scalars": ((), (3,), ()),
    "mixed_dtypes": ((9, 9), (130,), (33,), (), (65,)),
    "large": ((70000,), (3,), (257, 129)),
    "huge": ((1_100_003,), (7,), (300, 401)),
    "many": tuple((1 + k % 7, 1 + k % 5) for k in range(70)),
}


@dataclass(frozen=True)
class ListCase:
    """T lists of n tensors."""

    kind: str
    num_tasks: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.kind}-T{self.num_tasks}-{short(self.dtype)}"

    def _exists(self, t: int, i: int) -> bool:
        if self.kind == "nones":
            return (3 * t + i) % 4 != 1
        if self.kind == "absent_parameter":
            return i not in (0, 3) and (t + i) % 5 != 0
        if self.kind == "absent_task":
            return t != self.num_tasks // 2
        return self.kind != "all_none"

    def _layout(self, t: int, i: int) -> Callable[[Tensor], Tensor]:
        if self.kind == "channels_last":
            return _channels_last
        if self.kind == "mixed_layouts":
            return _MIXED_LAYOUTS[(t + i) % len(_MIXED_LAYOUTS)]
        return _identity

    def _dtype(self, i: int) -> torch.dtype:
        if self.kind != "mixed_dtypes":
            return self.dtype
        # the first one is the case's own, so that one case has no float64 and another has
        return (self.dtype, torch.bfloat16, torch.float32, torch.float16, self.dtype)[i]

    def make(self, device: str = "cpu") -> Lists:
        generator = generator_of(self)
        lists: Lists = [[] for _ in range(self.num_tasks)]
        for i, shape in enumerate(LIST_SHAPES[self.kind]):
            numel = torch.Size(shape).numel()
            values = random_gradients(self.num_tasks, numel, generator).to(device, self._dtype(i))
            for t in range(self.num_tasks):
                x = values[t].reshape(shape)
                lists[t].append(self._layout(t, i)(x) if self._exists(t, i) else None)
        return lists


LIST_CASES = [
    *(ListCase(kind, 3, dtype) for kind in LIST_SHAPES if kind != "huge" for dtype in DTYPES),
    *(ListCase(kind, t) for kind in ("dense", "nones", "mixed_layouts") for t in (1, 2, 8, 17, 33)),
    ListCase("nones", 128),
    ListCase("huge", 2),
    ListCase("many", 64, torch.bfloat16),
]

# a few of each, for the tests that need not see everything
FEW_BANKS = [
    BankCase(1, 31),
    BankCase(3, 0),
    BankCase(5, 1025, torch.float64),
    BankCase(9, 4097),
    BankCase(8, 1000, torch.bfloat16, "row_strided"),
    BankCase(3, 65, torch.float16, "transposed"),
    BankCase(17, 1025, torch.float32, "misaligned"),
]
FEW_LISTS = [
    ListCase("nones", 3),
    ListCase("nones", 5, torch.float64),
    ListCase("mixed_layouts", 8),
    ListCase("mixed_dtypes", 3),
    ListCase("empty_tensors", 2),
    ListCase("channels_last", 3, torch.bfloat16),
    ListCase("no_parameter", 2),
    ListCase("all_none", 2),
]


def tensors_of(lists: Lists) -> list[Tensor]:
    return [x for row in lists for x in row if x is not None]


def with_tensors(lists: Lists, tensors: Sequence[Tensor]) -> Lists:
    """The same Nones, other tensors."""
    rest: Iterator[Tensor] = iter(tensors)
    return [[None if x is None else next(rest) for x in row] for row in lists]


def double(grads: Tensor | Lists) -> Tensor:
    """The `[T, P]` bank in float64 of a bank or of lists (parameters absent everywhere take no column)."""
    if isinstance(grads, Tensor):
        return grads.detach().to("cpu", torch.float64)
    lists = [[None if x is None else x.detach().to("cpu", torch.float64) for x in row] for row in grads]
    rows = read_lists(lists)
    return reference.bank_from_lists(*rows).to(torch.float64)


def flat(columns: Sequence[Tensor | None]) -> Tensor:
    """One list of results as a float64 vector, without the Nones."""
    parts = [x.detach().to("cpu", torch.float64).reshape(-1) for x in columns if x is not None]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def units(columns: Sequence[Tensor | None]) -> Tensor:
    """`unit_roundoff` of every element of a list of results."""
    parts = [torch.full((x.numel(),), unit_roundoff(x.dtype), dtype=torch.float64) for x in columns if x is not None]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def random_order(num_tasks: int, num_visits: int | None = None, key: object = 0) -> Tensor:
    """`[T, K]` int64; K = T: permutations, else any entries (repeated, or the task itself)."""
    generator = generator_of((key, num_tasks, num_visits))
    if num_visits is None:
        return torch.rand(num_tasks, num_tasks, generator=generator).argsort(dim=1)
    return torch.randint(num_tasks, (num_tasks, num_visits), generator=generator)


def random_weights(shape: Sequence[int], dtype: torch.dtype = torch.float64, key: object = 0) -> Tensor:
    """Weights of both signs, some of them zero."""
    w = torch.randn(*shape, generator=generator_of((key, tuple(shape))), dtype=torch.float64)
    return (w * (w.abs() > 0.2)).to(dtype)


# --- comparison


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor) -> None:
    """`|actual - expected| <= bound` everywhere; NaN is never within."""
    actual = actual.detach().to("cpu", torch.float64)
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error = (actual - expected).abs()
    wrong = ~(error <= bound)
    if wrong.any():
        worst = tuple(int(k) for k in wrong.nonzero()[0])
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} elements are off; at {worst}: got {actual[worst].item()!r}, "
            f"expected {expected[worst].item()!r} within {bound.expand_as(error)[worst].item():.3g}, "
            f"off by {error[worst].item():.3g}"
        )


def gram_slack(backend: str, case: BankCase | ListCase | None = None) -> float:
    """How much more than `GRAM_TOLERANCE` a backend may be off on a case."""
    slack = REFERENCE_SLACK * max(1.0, getattr(case, "num_columns", 0) / 1e5) if backend == "reference" else 1.0
    return slack * (BIASED_SLACK if getattr(case, "layout", "") == "expanded_column" else 1.0)


def assert_gram(actual: Tensor, bank: Tensor, dtypes: Sequence[torch.dtype], slack: float) -> None:
    """`actual` is the Gram matrix of the float64 `bank`, up to what the dtypes of the gradients allow."""
    assert actual.dtype == gram_dtype(dtypes)
    norms = bank.norm(dim=1)
    tolerance = slack * max((GRAM_TOLERANCE[d] for d in dtypes), default=0.0)
    assert_within(actual, reference.gram(bank), tolerance * norms[:, None] * norms)


def assert_combine(
    actual: Tensor, weights: Tensor, bank: Tensor, unit: Tensor | float, tolerance: float, smallest: float = 0.0
) -> None:
    """`actual` is `weights @ bank`, rounded once to a dtype of roundoff `unit` and smallest number `smallest`."""
    w = weights.detach().to("cpu", torch.float64)
    expected = w @ bank
    assert_within(actual, expected, tolerance * (w.abs() @ bank.abs()) + unit * expected.abs() * 1.001 + smallest)


@functools.cache
def bank64(case: BankCase | ListCase) -> Tensor:
    return double(case.make())


@functools.cache
def projected64(case: BankCase | ListCase) -> Tensor:
    """Every projected gradient of the case under `random_order(T)`, by the paper's loop on the vectors."""
    bank = bank64(case)
    return reference.pcgrad_loop(bank, random_order(bank.shape[0]))


def pcgrad_scale(bank: Tensor, projected: Tensor) -> Tensor:
    """`[T, P]`: how large an error of relative size 1 in the Gram matrix makes each projected gradient's element.

    Each step moves g_i along g_j / |g_j| by at most |g_i|.
    """
    norms = bank.norm(dim=1, keepdim=True)
    directions = (bank / torch.where(norms > 0, norms, 1.0)).abs().sum(0)
    return bank.abs() + projected.abs() + norms * directions


# --- samples for opcheck: every op that fastmtl registers, by name; inputs that need a gradient where it has one


def _leaf(case: BankCase) -> Tensor:
    return case.make().detach().requires_grad_()


def _rows(case: ListCase) -> tuple[list[Tensor], list[int], int, int]:
    lists = case.make()
    rows = read_lists(with_tensors(lists, [x.detach().requires_grad_() for x in tensors_of(lists)]))
    return rows.tensors, rows.index, rows.num_tasks, rows.num_params


_SAMPLE_BANKS = (
    BankCase(3, 31),
    BankCase(2, 0),
    BankCase(5, 65, torch.float64, "transposed"),
    BankCase(3, 33, torch.bfloat16, "row_strided"),
)
_SAMPLE_LISTS = (
    ListCase("nones", 3),
    ListCase("channels_last", 2, torch.bfloat16),
    ListCase("mixed_dtypes", 2, torch.float64),
    ListCase("empty_tensors", 2),
)


def _leaf_weights(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return random_weights(shape, dtype).requires_grad_()


def _gram_leaf(num_tasks: int, dtype: torch.dtype) -> Tensor:
    return reference.gram(bank64(BankCase(num_tasks, 65, torch.float64))).to(dtype).requires_grad_()


def _combine_samples() -> list[tuple[Any, ...]]:
    banks = [_leaf(case) for case in _SAMPLE_BANKS]
    return [(_leaf_weights(x.shape[0]), x) for x in banks] + [(_leaf_weights(2, x.shape[0]), x) for x in banks[2:]]


def _combine_list_samples() -> list[tuple[Any, ...]]:
    rows = [_rows(case) for case in _SAMPLE_LISTS]
    samples = [(_leaf_weights(r[2]), r[0], r[1], r[3]) for r in rows]
    return [*samples, *((_leaf_weights(2, r[2]), r[0], r[1], r[3]) for r in rows[:2])]


def _method_samples() -> list[tuple[Any, ...]]:
    m = _gram_leaf(5, torch.float64).detach()
    here = torch.tensor([True, True, False, True, True])
    wanted = torch.tensor([0.1, 0.4, 9.0, 0.2, 0.3])
    return [
        (m, "mgda", []),
        (m.to(torch.float32), "mgda", [], here),
        (m, "cagrad", [0.5]),
        (m, "imtlg", [], here),
        (m, "config", [], here, wanted),
        (m, "nashmtl", [0.0], here),
        (m, "nashmtl", [0.1]),
        (m, "fairgrad", [2.0]),
        (m, "alignedmtl", [1.0, 1.0], here),
        (m.mT, "alignedmtl", [0.0, 0.0], None, wanted.double()),
        (m, "upgrad", [1e-4], here, wanted),
        (m, "dualproj", [1e-4]),
        (m, "krum", [1.0, 2.0, 1.0], here),
        (m, "pcd", [3.0, 0.1], here, wanted),
        (m.to(torch.float32), "sdmgrad", [10.0, 0.5, 20.0, 0.3], here, wanted, wanted.flip(0)),
        (m, "sdmgrad", [1.0, 0.0, 3.0, 0.0]),
        (m.to(torch.float32), "modo", [0.1, 0.2], here, None, wanted),
    ]


def _step_samples() -> list[tuple[Any, ...]]:
    m = _gram_leaf(5, torch.float64).detach()
    here = torch.tensor([True, True, False, True, True])
    kept = torch.tensor([0.1, 0.4, torch.nan, 0.2, 0.3], dtype=torch.float64)
    numbers = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    vectors = torch.eye(5, dtype=torch.float64)[:3]
    pareto = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    none = None, None
    return [
        (m, "pcd", [3.0, 0.1, 0.9, 1e-8], numbers.clone(), numbers.clone(), kept.clone(), 0.9, here),
        (m.float(), "pcd", [0.0, 0.1, 0.9, 0.0], numbers.clone(), numbers.clone(), None, 0.0, None, None, numbers),
        (m.mT, "sdmgrad", [10.0, 0.5, 20.0, 0.3], kept.clone(), None, None, 0.0, here, numbers, None, m),
        (m, "sdmgrad", [1.0, 0.0, 3.0, 0.0], numbers.clone()),
        (m.float(), "modo", [0.1, 0.2], kept.clone(), None, None, 0.0, here, None, None, m),
        (m, "mgda", [], *none, kept.clone(), 0.5, here),
        (m.float(), "given", [], *none, kept.clone(), 0.5, here, numbers),
        (m, "paretomtl", [2.0, 5.0], *pareto, kept.clone(), 0.2, here, None, numbers, None, vectors),
        (m, "paretomtl", [0.0, 0.0], *(x.clone() for x in pareto), None, 0.0, None, None, numbers, None, vectors),
    ]


def _gradvac_step_samples() -> list[tuple[Any, ...]]:
    m = _gram_leaf(5, torch.float64).detach()
    here = torch.tensor([True, True, False, True, True])
    targets = torch.eye(5, dtype=torch.float64)
    return [
        (m, targets.clone(), random_order(5), 0, None, None, 0.1, "always", "sum"),
        (
            m.to(torch.float32),
            targets.clone(),
            random_order(5, 7).to(torch.int32),
            0,
            None,
            here,
            0.0,
            "always",
            "mean",
        ),
        (m.mT, targets.clone(), None, 7, None, here, 1.0, "triggered", "sum"),
        (m, targets.clone(), None, -3, torch.tensor([5, 9]), None, 0.3, "always", "mean"),
    ]


def _plain_rows() -> list[tuple[list[Tensor], list[int], int, int]]:
    """Lists and banks, without a gradient of their own, in the one form that the ops element by element take."""
    lists = [read_lists(case.make()) for case in _SAMPLE_LISTS]
    banks = [bank_rows(case.make()) for case in _SAMPLE_BANKS]
    return [tuple(rows) for rows in (*lists, *banks)]


def held_like(rows: GradientRows, value: float = 0.25) -> list[Tensor]:
    """Memory that runs along with gradients, in the dtype of their sums."""
    if rows.bank is not None:
        return [torch.full(rows.bank.shape, value, dtype=gram_dtype([rows.bank.dtype]), device=rows.bank.device)]
    first = first_of_params(rows.tensors, rows.index, rows.num_params).values()
    return [torch.full_like(x, value, dtype=gram_dtype([x.dtype])) for _ in range(rows.num_tasks) for x in first]


def _graddrop_samples() -> list[tuple[Any, ...]]:
    samples: list[tuple[Any, ...]] = []
    for k, rows in enumerate(_plain_rows()):
        leak = torch.linspace(0, 1, rows[2], dtype=torch.float64) if k % 2 else None
        samples.append((*rows, 7 * k - 9, torch.tensor([k, 3]) if k % 3 else None, leak, torch.arange(rows[2]) != 1))
    return samples


def _trimmed_mean_samples() -> list[tuple[Any, ...]]:
    samples: list[tuple[Any, ...]] = []
    for k, rows in enumerate(_plain_rows()):
        here = torch.arange(rows[2]) != 0 if k % 2 else None
        samples.append((*rows, (rows[2] - 1) // 2 if here is None else 0, here))
    return samples


def _average_samples() -> list[tuple[Any, ...]]:
    samples: list[tuple[Any, ...]] = []
    for k, rows in enumerate(_plain_rows()):
        keep = torch.linspace(0.2, 1, rows[2], dtype=torch.float64)
        samples.append((*rows, keep, 1 - keep, held_like(GradientRows(*rows)), k % 2 == 0))
    return samples


def _excess_samples() -> list[tuple[Any, ...]]:
    scale = torch.linspace(0, 2, 8, dtype=torch.float64)
    return [(*rows, scale[-rows[2] :].clone(), held_like(GradientRows(*rows))) for rows in _plain_rows()]


OPCHECK_SAMPLES: dict[str, Callable[[], list[tuple[Any, ...]]]] = {
    "gram": lambda: [(_leaf(case),) for case in _SAMPLE_BANKS],
    "gram_list": lambda: [_rows(case) for case in _SAMPLE_LISTS],
    "combine": _combine_samples,
    "combine_list": _combine_list_samples,
    "pcgrad_coefficients": lambda: [
        (_gram_leaf(5, torch.float64), random_order(5)),
        (_gram_leaf(3, torch.float32), random_order(3, 5).to(torch.int32), True),
        (_gram_leaf(1, torch.float64), random_order(1, 0)),
    ],
    "pcgrad_coefficients_backward": lambda: [
        (torch.ones(5, 5, dtype=torch.float64), _gram_leaf(5, torch.float64).detach(), random_order(5), False),
        (torch.ones(3, 3, dtype=torch.float64), _gram_leaf(3, torch.float32).detach(), random_order(3, 5), True),
        (torch.ones(3, 3, dtype=torch.float64), _gram_leaf(3, torch.float64).detach().mT, random_order(3), False),
    ],
    "pcgrad_weights": lambda: [
        (_gram_leaf(5, torch.float64).detach(), random_order(5), 0, None, False, "sum"),
        (_gram_leaf(3, torch.float32).detach(), random_order(3, 5).to(torch.int32), 0, None, True, "mean"),
        (_gram_leaf(4, torch.float64).detach().mT, None, -9, None, False, "mean"),
        (_gram_leaf(4, torch.float64).detach(), None, 0, torch.tensor([5, 9]), False, "sum"),
    ],
    "gradvac_coefficients": lambda: [
        (_gram_leaf(5, torch.float64).detach(), random_order(5), torch.zeros(5, 5).double(), 0.1, "always"),
        (_gram_leaf(3, torch.float32).detach(), random_order(3, 5).to(torch.int32), torch.eye(3), 0.0, "triggered"),
        (_gram_leaf(3, torch.float64).detach().mT, random_order(3, 0), torch.ones(3, 3).mT, 1.0, "always"),
    ],
    "gradvac_step": _gradvac_step_samples,
    "method_weights": _method_samples,
    "method_step": _step_samples,
    "graddrop": _graddrop_samples,
    "trimmed_mean": _trimmed_mean_samples,
    "average_gradients": _average_samples,
    "excess_risks": _excess_samples,
    "pcgrad": lambda: [
        (x, random_order(x.shape[0]), reduction, include_self)
        for x, reduction, include_self in zip(
            map(_leaf, _SAMPLE_BANKS), ("sum", "mean", "mean", "sum"), (False, False, True, False), strict=True
        )
    ],
    "pcgrad_list": lambda: [(*_rows(case), random_order(case.num_tasks), "mean", False) for case in _SAMPLE_LISTS],
    "pcgrad_project": lambda: [(_leaf(case), random_order(case.num_tasks), False) for case in _SAMPLE_BANKS],
    "pcgrad_project_list": lambda: [(*_rows(case), random_order(case.num_tasks), True) for case in _SAMPLE_LISTS],
}


# --- bad input that every op on gradients refuses: (gradients, exception, what the message says)


@dataclass(frozen=True)
class BadGrads:
    name: str
    make: Callable[[], Any]
    error: type[Exception]
    match: str

    def __str__(self) -> str:
        return self.name


def _v(*shape: int, **options: Any) -> Tensor:
    return torch.ones(*shape, **options)


BAD_GRADS = [
    BadGrads("number", lambda: 3.0, TypeError, r"grads: expected a \[T, P\] tensor or T lists of tensors, got float"),
    BadGrads("none", lambda: None, TypeError, r"grads: expected a \[T, P\] tensor or T lists.*got NoneType"),
    BadGrads("string", lambda: "ab", TypeError, r"grads: expected .* got str"),
    BadGrads("generator", lambda: (x for x in [[_v(3)]]), TypeError, r"grads: expected .* got generator"),
    BadGrads("vector", lambda: _v(3), ValueError, r"grads: expected a \[T, P\] tensor, got shape \(3,\)"),
    BadGrads("3-d", lambda: _v(2, 3, 4), ValueError, r"grads: expected a \[T, P\] tensor, got shape \(2, 3, 4\)"),
    BadGrads("T=0", lambda: _v(0, 3), ValueError, r"grads: expected 1 to 128 tasks, got 0"),
    BadGrads("T=129", lambda: _v(129, 3), ValueError, r"grads: expected 1 to 128 tasks, got 129"),
    BadGrads("int64", lambda: _v(2, 3, dtype=torch.int64), TypeError, r"grads: expected float64.*got torch.int64"),
    BadGrads("bool", lambda: _v(2, 3, dtype=torch.bool), TypeError, r"grads: expected float64.*got torch.bool"),
    BadGrads("complex", lambda: _v(2, 3, dtype=torch.complex64), TypeError, r"grads: .*got torch.complex64"),
    BadGrads(
        "sparse",
        lambda: _v(2, 3).to_sparse(),
        TypeError,
        r"grads: expected a dense \(strided\) tensor, got layout torch.sparse_coo",
    ),
    BadGrads("no lists", lambda: [], ValueError, r"grads: expected 1 to 128 tasks, got 0"),
    BadGrads("129 lists", lambda: [[_v(2)]] * 129, ValueError, r"grads: expected 1 to 128 tasks, got 129"),
    BadGrads(
        "list of tensors", lambda: [_v(3), _v(3)], TypeError, r"grads\[0\]: expected a list of tensors, got Tensor"
    ),
    BadGrads("row none", lambda: [[_v(3)], None], TypeError, r"grads\[1\]: expected a list of tensors, got NoneType"),
    BadGrads("ragged", lambda: [[_v(3)], [_v(3)] * 2], ValueError, r"grads\[1\]: expected 1 tensors .* got 2"),
    BadGrads("entry", lambda: [[_v(3), None], [_v(3), 2.0]], TypeError, r"grads\[1\]\[1\]: expected a tensor.*float"),
    BadGrads("shapes", lambda: [[_v(3)], [_v(4)]], ValueError, r"grads\[1\]\[0\]: expected shape \(3,\).*got \(4,\)"),
    BadGrads("same size", lambda: [[_v(2, 3)], [_v(3, 2)]], ValueError, r"grads\[1\]\[0\]: expected shape \(2, 3\)"),
    BadGrads(
        "dtypes",
        lambda: [[None, _v(3)], [None, _v(3, dtype=torch.float64)]],
        TypeError,
        r"grads\[1\]\[1\]: expected torch.float32.*got torch.float64",
    ),
    BadGrads(
        "devices",
        lambda: [[_v(3)], [_v(3, device="meta")]],
        ValueError,
        r"grads\[1\]\[0\]: expected device cpu, got meta",
    ),
    BadGrads(
        "devices between parameters",
        lambda: [[_v(3), _v(3, device="meta")]],
        ValueError,
        r"grads\[0\]\[1\]: expected device cpu, got meta",
    ),
    BadGrads("list int", lambda: [[_v(3, dtype=torch.int32)]], TypeError, r"grads\[0\]\[0\]: .*got torch.int32"),
    BadGrads("list complex", lambda: [[_v(3, dtype=torch.complex128)]], TypeError, r"grads\[0\]\[0\]: .*complex128"),
    BadGrads("list sparse", lambda: [[_v(3).to_sparse()]], TypeError, r"grads\[0\]\[0\]: .*sparse_coo"),
    BadGrads(
        "sparse later",
        lambda: [[_v(3, 3)], [_v(3, 3).to_sparse()]],
        TypeError,
        r"grads\[1\]\[0\]: expected a dense \(strided\) tensor, got layout torch.sparse_coo",
    ),
]
