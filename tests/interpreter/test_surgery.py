"""The kernels of gradient surgery in Triton's interpreter, against the float64 oracle."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import cases
import pytest
import torch
from cases import BankCase, ListCase
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import fastmtl
from fastmtl.core import dispatch
from fastmtl.core.gradient_rows import GradientRows, accumulate_dtype, bank_rows, first_of_params
from fastmtl.ops import combine, gram, order_state, pcgrad, pcgrad_coefficients, pcgrad_project, random_order
from fastmtl.ops.gradients import reference
from fastmtl.ops.gradients.arguments import read_lists
from fastmtl.ops.gradients.combine import combine_into
from fastmtl.ops.gradients.gram import gram_rows
from fastmtl.ops.gradients.groups import Grouped, combine_groups_into, gram_groups
from fastmtl.ops.gradients.order import Draw, drawn_order, drawn_orders
from fastmtl.ops.gradients.pcgrad import pcgrad_rows_into, pcgrad_weights_groups

if not dispatch.interpreting():
    pytest.skip("needs TRITON_INTERPRET=1, set before Triton is imported", allow_module_level=True)
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from fastmtl.kernels.common import launches  # noqa: E402
from fastmtl.kernels.gradients import launchers as kernels  # noqa: E402
from fastmtl.kernels.gradients.pcgrad import draw_visits  # noqa: E402

# the interpreter cuts bfloat16 off instead of rounding: 2^-8 on a GPU
UNIT = {**{dtype: cases.unit_roundoff(dtype) for dtype in cases.DTYPES}, torch.bfloat16: 2.0**-7}
SMALLEST = {dtype: 2.0**-25 if dtype == torch.float16 else 0.0 for dtype in cases.DTYPES}


@pytest.fixture(autouse=True)
def triton_backend() -> Iterator[None]:
    with fastmtl.use_backend("triton"):
        yield
    # what counts arrivals is left as the next launch needs it
    assert all(not kept.any() for kept in launches.tickets._by_stream.values())


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks of few columns, added up in two levels of several groups."""
    monkeypatch.setattr(kernels, "LANES", 16)
    monkeypatch.setattr(kernels, "MAX_TILES", 2)
    monkeypatch.setattr(kernels, "SUM_TILE", 4)
    monkeypatch.setattr(kernels, "MAX_GROUPS", 3)
    blocks = {width: dict.fromkeys(sizes, 16) for width, sizes in kernels.PRODUCT_BLOCKS.items()}
    monkeypatch.setattr(kernels, "PRODUCT_BLOCKS", blocks)


def columns_of(found: Any) -> Tensor:
    """`[P]` or `[K, P]` float64 of a result, a bank's or lists'."""
    if isinstance(found, Tensor):
        return found.double()
    if found and isinstance(found[0], list):
        return torch.stack([cases.flat(row) for row in found])
    return cases.flat(found)


def units_of(grads: Any) -> Tensor | float:
    if isinstance(grads, Tensor):
        return UNIT[grads.dtype]
    first = [next((row[i] for row in grads if row[i] is not None), None) for i in range(len(grads[0]))]
    parts = [torch.full((x.numel(),), UNIT[x.dtype], dtype=torch.float64) for x in first if x is not None]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def dtypes_of(grads: Any) -> list[torch.dtype]:
    return [grads.dtype] if isinstance(grads, Tensor) else [x.dtype for x in cases.tensors_of(grads)]


def check_everything(case: BankCase | ListCase, num_sums: int = 2, project: bool = True) -> None:
    grads = case.make()
    bank, dtypes, unit = cases.bank64(case), dtypes_of(grads), units_of(grads)
    slack = cases.BIASED_SLACK if getattr(case, "layout", "") == "expanded_column" else 1.0
    smallest = max((SMALLEST[dtype] for dtype in dtypes), default=0.0)
    num_tasks = bank.shape[0]

    m = gram(grads)
    cases.assert_gram(m, bank, dtypes, slack)
    assert torch.equal(m, m.mT)

    tolerance = max((cases.COMBINE_TOLERANCE[dtype] for dtype in dtypes), default=0.0)
    for shape in ((num_tasks,), (num_sums, num_tasks)):
        w = cases.random_weights(shape)
        cases.assert_combine(columns_of(combine(w, grads)), w, bank, unit, tolerance, smallest)

    order = cases.random_order(num_tasks, None if num_tasks <= 64 else 6)
    expected = cases.projected64(case) if num_tasks <= 64 else reference.pcgrad_loop(bank, order)
    bound = max((cases.PCGRAD_TOLERANCE[d] for d in dtypes), default=0.0) * cases.pcgrad_scale(bank, expected) * slack
    total = expected.sum(0)
    update = columns_of(pcgrad(grads, order))
    cases.assert_within(update, total, bound.sum(0) + unit * total.abs() * 1.001 + smallest)
    if not project:
        return
    projected = columns_of(pcgrad_project(grads, order))
    cases.assert_within(projected, expected, bound + unit * expected.abs() * 1.001 + smallest)


# --- values

LAYOUTS = [layout for layout in cases.LAYOUTS if layout != "contiguous"]
BANKS = [
    *(BankCase(t, 40 + t) for t in (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17)),
    BankCase(33, 63),
    BankCase(64, 33),
    BankCase(128, 35),
    BankCase(1, 0),
    BankCase(3, 0, torch.bfloat16),
    BankCase(9, 0, torch.float64),
    BankCase(2, 1024),
    BankCase(4, 2056, torch.bfloat16),
    BankCase(8, 516),
    BankCase(9, 513),
    BankCase(17, 256, torch.float16),
    *(BankCase(t, 72, dtype) for t in (1, 5, 12) for dtype in cases.DTYPES if dtype != torch.float32),
    *(BankCase(t, p, layout=layout) for layout in LAYOUTS for t, p in ((3, 65), (9, 70))),
    *(BankCase(3, 33, dtype, layout) for layout in LAYOUTS[::3] for dtype in (torch.float64, torch.bfloat16)),
]
LISTS = [
    *(ListCase(kind, 2) for kind in cases.LIST_SHAPES if kind not in ("large", "huge", "many")),
    *(ListCase("nones", 3, dtype) for dtype in (torch.float64, torch.bfloat16)),
    ListCase("mixed_dtypes", 3, torch.float64),
    ListCase("mixed_dtypes", 9, torch.bfloat16),
    ListCase("nones", 11),
]


@pytest.mark.parametrize("case", BANKS, ids=str)
def test_bank(case: BankCase) -> None:
    # 128 sums of 128 rows are slow here
    check_everything(case, project=case.num_tasks <= 33)


@pytest.mark.parametrize("case", LISTS, ids=str)
def test_lists(case: ListCase) -> None:
    check_everything(case)


@pytest.mark.parametrize(
    "case",
    [
        BankCase(1, 513),
        BankCase(3, 257),
        BankCase(8, 200, torch.float64),
        BankCase(9, 193),
        BankCase(17, 192, torch.float16),
        ListCase("mixed_dtypes", 3),
        ListCase("mixed_dtypes", 9),
    ],
    ids=str,
)
def test_many_parts_in_two_levels(case: BankCase | ListCase, small_parts: None) -> None:
    launches = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "launch", lambda fn, grid, *args, **rest: launches.append((grid, rest)))
        gram(case.make())
    num_parts = sum(grid[0] for grid, _ in launches)
    group_size = launches[0][1]["group_size"]
    assert 1 < triton.cdiv(num_parts, group_size) <= 3 and group_size > 1
    check_everything(case, num_sums=11)


@pytest.mark.parametrize("num_sums", [0, 1, 3, 8, 9, 21])
@pytest.mark.parametrize("case", [BankCase(5, 300), BankCase(19, 64, torch.bfloat16), ListCase("scalars", 3)], ids=str)
def test_numbers_of_sums(case: BankCase | ListCase, num_sums: int) -> None:
    grads, bank = case.make(), cases.bank64(case)
    w = cases.random_weights((num_sums, case.num_tasks))
    found = combine(w, grads)
    assert len(found) == num_sums
    if num_sums:
        cases.assert_combine(columns_of(found), w, bank, units_of(grads), 1e-6)


def test_long_equal_sums_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums that a single float32 could not hold: 2^13 in each of 4097 columns."""
    monkeypatch.setattr(kernels, "MAX_TILES", 1)
    for num_tasks in (1, 9):
        grads = torch.full((num_tasks, 4097), 2.0**13 + 1)
        expected = (2.0**13 + 1) ** 2 * 4097
        found = gram(grads)
        assert (found.double() - expected).abs().max() <= 2.0**-22 * expected


def test_what_a_call_launches() -> None:
    """Two launches; for every further dtype, and for memory that is not aligned, two more."""

    def launched(grads: Any) -> list[str]:
        names = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "launch", lambda fn, grid, *args, **rest: names.append(fn.__name__))
            pcgrad(grads)
        return names

    assert launched(BankCase(3, 65).make()) == ["gram_paired_kernel", "combine_fwd_kernel"]
    assert launched(BankCase(9, 65, layout="transposed").make()) == ["gram_product_kernel", "combine_fwd_kernel"]
    assert len(launched(ListCase("nones", 3).make())) == 2
    assert len(launched(ListCase("mixed_dtypes", 3).make())) == 6
    aligned, apart = torch.randn(2, 8), torch.randn(2, 9)[:, 1:]
    assert len(launched([[aligned[t], apart[t]] for t in range(2)])) == 4


def test_number_of_parts_depends_on_the_shape_alone() -> None:
    for num_tasks, columns in ((8, 25_600_000), (64, 25_600_000), (4, 1_000_000_000), (2, 10)):
        bank = torch.empty(num_tasks, columns, device="meta")
        (group,) = kernels._groups(bank_rows(bank), ())
        chunks = group.num_chunks()
        assert group.tiles_per_chunk <= kernels.MAX_TILES
        assert chunks * group.tile * group.tiles_per_chunk >= columns
        assert (chunks - 1) * group.tile * group.tiles_per_chunk < columns


# --- pcgrad's options


@pytest.mark.parametrize("num_tasks", [1, 3, 8, 12])
def test_equals_the_paper(num_tasks: int) -> None:
    for seed, num_visits in enumerate((None, 0, 1, 2 * num_tasks + 1)):
        grads = cases.random_gradients(num_tasks, 40, torch.Generator().manual_seed(seed))
        order = cases.random_order(num_tasks, num_visits, seed)
        include_self = seed % 2 == 1
        expected = reference.pcgrad_loop(grads, order, include_self)
        bound = 1e-12 * cases.pcgrad_scale(grads, expected)
        cases.assert_within(pcgrad_project(grads, order, include_self=include_self), expected, bound)
        mean = pcgrad(grads, order, include_self=include_self, reduction="mean")
        cases.assert_within(mean, expected.mean(0), bound.mean(0))
        c = pcgrad_coefficients(gram(grads), order, include_self=include_self)
        cases.assert_within(c @ grads, expected, bound)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize(("num_tasks", "absent"), [(3, (1,)), (9, (0, 8)), (4, (0, 1, 2, 3)), (70, (3, 63, 64, 69))])
def test_absent_tasks(num_tasks: int, absent: Sequence[int], mean: bool) -> None:
    grads = BankCase(num_tasks, 20, torch.float64).make()
    grads[list(absent)] = 0.0
    order = cases.random_order(num_tasks)
    here = torch.tensor([t not in absent for t in range(num_tasks)])
    out = torch.empty(20, dtype=torch.float64)
    found, w = pcgrad_rows_into(bank_rows(grads), order, Draw(0, None), [out], mean=mean, present=here.tolist())
    torch.testing.assert_close(found, grads @ grads.mT)
    expected = reference.pcgrad_coefficients(found, order)[here].sum(0) * here
    if mean and here.any():
        expected = expected / here.sum()
    torch.testing.assert_close(w, expected, rtol=1e-10, atol=1e-10)
    assert not w[~here].any()
    torch.testing.assert_close(out, w @ grads)


def test_results_beside_the_sums() -> None:
    grads, order = BankCase(5, 65).make(), cases.random_order(5)
    out = torch.empty(5, 65)
    found, c = pcgrad_rows_into(bank_rows(grads), order, Draw(0, None), [out], project=True)
    assert torch.equal(found, gram(grads)) and c.dtype == torch.float64
    exact = reference.gram(grads.double())
    torch.testing.assert_close(c, reference.pcgrad_coefficients(exact, order), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.double(), c @ grads.double(), rtol=1e-5, atol=1e-5)


def test_lists_of_no_tensors() -> None:
    rows = GradientRows([], [], 3, 2)
    found, w = pcgrad_rows_into(rows, cases.random_order(3), Draw(0, None), [], mean=True)
    assert torch.equal(found, torch.zeros(3, 3))
    torch.testing.assert_close(w, torch.full((3,), 1 / 3, dtype=torch.float64))


def test_empty_tensors_advance_the_state() -> None:
    state = order_state(3)
    assert pcgrad([[torch.zeros(0)], [torch.zeros(0)]], generator=state)[0].shape == (0,)
    assert pcgrad(torch.zeros(2, 0), generator=state).shape == (0,)
    assert state.tolist() == [3, 2]


# --- in place


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.short)
@pytest.mark.parametrize("num_columns", [64, 300])
def test_into_a_row_of_the_bank(num_columns: int, dtype: torch.dtype) -> None:
    w, order = cases.random_weights((5,)), cases.random_order(5)
    for run in (lambda g, out: combine(w, g, out=out), lambda g, out: pcgrad(g, order, out=out)):
        grads = BankCase(5, num_columns, dtype).make()
        expected = run(grads, torch.empty_like(grads[0]))
        before = grads.clone()
        assert run(grads, grads[3]).data_ptr() == grads[3].data_ptr()
        assert torch.equal(grads[3], expected)
        rest = torch.arange(5) != 3
        assert torch.equal(grads[rest], before[rest])


def test_into_gradients_of_lists() -> None:
    case = ListCase("mixed_layouts", 3)
    order = cases.random_order(3)
    expected = columns_of(pcgrad(case.make(), order))
    grads = case.make()
    # a dense result in the memory of a gradient where that is dense, else in memory of its own
    out = [next((row[i] for row in grads if _is_plain(row[i])), None) for i in range(len(grads[0]))]
    out = [torch.empty(grads[0][i].shape) if x is None else x for i, x in enumerate(out)]
    assert any(x.data_ptr() == g.data_ptr() for x, g in zip(out, grads[1], strict=True))
    assert pcgrad(grads, order, out=out) is out
    assert torch.equal(columns_of(out), expected)


def _is_plain(x: Tensor) -> bool:
    return x.dim() > 0 and x.is_contiguous()


def test_rows_of_the_result_that_lie_apart() -> None:
    grads, w = BankCase(5, 64).make(), cases.random_weights((3, 5))
    expected = combine(w, grads)
    for gap in (4, 5):
        wide = torch.full((3, 64 + gap), 7.0)
        combine(w, grads, out=wide[:, :64])
        assert torch.equal(wide[:, :64], expected)
        assert (wide[:, 64:] == 7).all()


# --- what is not finite


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("num_tasks", [5, 9])
def test_non_finite_shows_in_its_row_only(num_tasks: int, value: float) -> None:
    grads = BankCase(num_tasks, 65).make()
    grads[4, 64] = value
    m = gram(grads)
    assert not torch.isfinite(m[4]).any() and not torch.isfinite(m[:, 4]).any()
    rest = torch.arange(num_tasks) != 4
    assert torch.isfinite(m[rest][:, rest]).all()
    assert torch.isnan(pcgrad(grads, cases.random_order(num_tasks))).all()
    w = torch.ones(num_tasks)
    w[4] = 0.0
    assert torch.isfinite(combine(w, grads)).tolist() == [True] * 64 + [False]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_entries_of_the_matrix(value: float) -> None:
    good = torch.tensor([[1.0, -0.5, 0.2], [-0.5, 1.0, 0.1], [0.2, 0.1, 1.0]])
    for at in ((0, 1), (1, 1)):
        m = good.clone()
        m[at] = value
        c = pcgrad_coefficients(m, torch.tensor([[2, 1], [2, 2], [0, 0]]))
        assert torch.isnan(c[0]).all(), at
        assert torch.equal(c[1:], torch.eye(3, dtype=torch.float64)[1:]), at
    # a task never visited can't reach the row
    m = good.clone()
    m[2, :] = m[:, 2] = value
    c = pcgrad_coefficients(m, torch.tensor([[1], [0], [2]]))
    torch.testing.assert_close(c[:2, :2], torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64))
    assert torch.equal(c[2], torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("entry", [-1, 3, 4, 1 << 40, -(1 << 62)])
def test_order_out_of_range(entry: int) -> None:
    """The ops refuse it on the CPU; on a GPU they can't see it."""
    order = torch.tensor([[1, 2], [0, entry], [0, 1]])
    grads = BankCase(3, 65, torch.float64).make()
    m = gram(grads)
    expected = reference.pcgrad_coefficients(m, order)
    assert torch.isnan(expected[1]).all() and torch.isfinite(expected[::2]).all()
    c = torch.empty(3, 3, dtype=torch.float64)
    kernels.coefficients(m, order, False, c)
    torch.testing.assert_close(c, expected, equal_nan=True)
    out, w = torch.empty(65, dtype=torch.float64), torch.empty(3, dtype=torch.float64)
    kernels.pcgrad(bank_rows(grads), order, 0, None, False, [1, 0, 1], False, [out], m, w)
    assert w[1] == 0 and torch.isfinite(w).all()
    kernels.pcgrad(bank_rows(grads), order, 0, None, False, [], False, [out], m, w)
    assert torch.isnan(w).all() and torch.isnan(out).all()


@pytest.mark.parametrize("num_tasks", [2, 7, 33, 128])
def test_coefficients_of_hard_matrices(num_tasks: int) -> None:
    generator = torch.Generator().manual_seed(num_tasks)
    grads = cases.random_gradients(num_tasks, 200, generator)
    grads = grads * torch.randn(num_tasks, 1, generator=generator, dtype=torch.float64).mul(1.5).exp()
    m = grads @ grads.mT
    # not symmetric, so that rows and columns can't be mixed up
    m += torch.randn(num_tasks, num_tasks, generator=generator, dtype=torch.float64).triu(1) * m.abs().amin()
    order = cases.random_order(num_tasks, 12)
    c, expected = pcgrad_coefficients(m, order), reference.pcgrad_coefficients(m, order)
    norms = grads.norm(dim=1)
    size = norms[:, None] + (expected.abs() * norms).amax(1, keepdim=True)
    cases.assert_within(c * norms, expected * norms, cases.COEFFICIENT_TOLERANCE * num_tasks * size)


# --- random orders


@triton.jit(do_not_specialize=["key", "num_tasks"])
def _order_kernel(p_order, p_state, key: tl.int64, num_tasks, TP: tl.constexpr):
    draw_visits(p_order, p_state, key, tl.program_id(0), num_tasks, TP)


@pytest.mark.parametrize("num_tasks", [1, 2, 5, 8, 100, 128])
def test_drawn_order(num_tasks: int) -> None:
    states = [None, *(torch.tensor(s) for s in ([0, 0], [7, 3], [-(1 << 63), (1 << 62) + 5], [(1 << 63) - 1, -1]))]
    keys = (0, 1, -1, 1 << 40, -(1 << 63), 12345)
    for state, key in itertools.islice(zip(itertools.cycle(states), keys), 6 if num_tasks < 100 else 2):
        expected = drawn_order(Draw(key, None if state is None else state.clone()), num_tasks, torch.device("cpu"))
        order = torch.empty(num_tasks, num_tasks, dtype=torch.int64)
        padded = triton.next_power_of_2(num_tasks)
        _order_kernel[(num_tasks,)](order, state, key, num_tasks, TP=padded)
        assert torch.equal(order, expected), (key, state)


@pytest.mark.parametrize("case", [BankCase(6, 70), BankCase(17, 40, torch.float64), ListCase("scalars", 3)], ids=str)
def test_draws_what_random_order_draws(case: BankCase | ListCase, small_parts: None) -> None:
    grads = case.make()
    state, twin = order_state(11), order_state(11)
    seen = set()
    for count in range(2):
        order = random_order(case.num_tasks, generator=twin)
        update = columns_of(pcgrad(grads, generator=state))
        assert state.tolist() == [11, count + 1] == twin.tolist()
        assert torch.equal(update, columns_of(pcgrad(grads, order)))
        seen.add(tuple(order.flatten().tolist()))
    assert len(seen) == 2
    order = random_order(case.num_tasks, generator=twin)
    assert torch.equal(columns_of(pcgrad_project(grads, generator=state)), columns_of(pcgrad_project(grads, order)))
    # a key drawn on the host
    keyed = pcgrad(grads, generator=torch.Generator().manual_seed(5))
    order = random_order(case.num_tasks, generator=torch.Generator().manual_seed(5))
    assert torch.equal(columns_of(keyed), columns_of(pcgrad(grads, order)))


@pytest.mark.parametrize("case", [BankCase(5, 200), BankCase(9, 300, torch.bfloat16)], ids=str)
def test_the_same_bits_twice(case: BankCase, small_parts: None) -> None:
    grads, order = case.make(), cases.random_order(case.num_tasks)
    assert torch.equal(gram(grads), gram(grads.clone()))
    assert torch.equal(pcgrad(grads, order), pcgrad(grads.clone(), order))


@pytest.mark.parametrize(
    "case", [ListCase("nones", 3), ListCase("mixed_dtypes", 9), ListCase("absent_parameter", 2, torch.float64)], ids=str
)
def test_groups_by_a_call_for_each(case: ListCase) -> None:
    rows = read_lists(case.make())
    both = Grouped(rows, [(5 * i + 2) % 2 for i in range(rows.num_params)], 3)
    found = gram_groups(both, accumulate_dtype([x.dtype for x in rows.tensors]), torch.device("cpu"))
    weights = cases.random_weights((3, case.num_tasks))
    out = {i: torch.empty_like(x) for i, x in first_of_params(rows.tensors, rows.index, rows.num_params).items()}
    combine_groups_into(weights, both, [*out.values()])
    for k, part in enumerate(both.split()):
        members = [i for i, group in enumerate(both.groups) if group == k and i in out]
        if not part.tensors:
            assert not members and not bool(found[k].any())
            continue
        assert torch.equal(found[k], gram_rows(part).to(found.dtype))
        alone = [torch.empty_like(out[i]) for i in members]
        combine_into(weights[k], part, alone)
        assert all(torch.equal(out[i], x) for i, x in zip(members, alone, strict=True))
    m = found.double()
    w = pcgrad_weights_groups(m, None, Draw(7, None), mean=True)
    for k, order in enumerate(drawn_orders(Draw(7, None), 3, case.num_tasks, torch.device("cpu"))):
        wanted = reference.pcgrad_coefficients(m[k], order).mean(0)
        torch.testing.assert_close(w[k], wanted, rtol=1e-9, atol=1e-9)


def test_tickets_of_graphs_stay_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "TICKETS_PER_BATCH", 4)
    made, device = launches._Tickets(), torch.device("cpu")
    addresses, storages = set(), []
    for _ in range(4):
        made.prepare(device)
        for _ in range(2):
            taken = made._free[device].pop()
            addresses.add(taken.data_ptr())
            storages.append(StorageWeakRef(taken.untyped_storage()))
            del taken
    assert len(addresses) == 8
    assert not any(storage.expired() for storage in storages)


def test_a_call_that_stops_between_its_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves nothing behind that a later call could stumble over."""
    mixed = ListCase("mixed_dtypes", 3, torch.float64).make()
    bank = BankCase(3, 300).make()
    expected = gram(mixed), gram(bank)
    launched = []

    def stops(fn: Any, *args: Any, **kwargs: Any) -> None:
        launched.append(fn)
        if len(launched) == 2:
            raise KeyboardInterrupt
        launches.launch(fn, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(kernels, "launch", stops)
        with pytest.raises(KeyboardInterrupt):
            gram(mixed)
    assert len(launched) == 2
    assert torch.equal(gram(mixed), expected[0])
    assert torch.equal(gram(bank), expected[1])
