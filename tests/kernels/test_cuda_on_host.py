"""The bodies of the CUDA kernels, run by the host compiler's code: every path, cutting and order of blocks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cases
import host_kernels as host
import pytest
import torch
from cases import BankCase, ListCase, double, random_order, random_weights
from conftest import skip_or_fail
from host_kernels import FORWARD, REVERSE, Cut, HostError, Output
from torch import Tensor

from fastmtl import ops
from fastmtl.core import dispatch
from fastmtl.core.gradient_rows import first_of_params, present_params
from fastmtl.ops.gradients import method_weights, reference
from fastmtl.ops.gradients.arguments import read_lists
from fastmtl.ops.gradients.groups import Grouped
from fastmtl.ops.gradients.order import Draw, drawn_order, drawn_orders, order_state

SCHEDULES = (FORWARD, REVERSE, 2, 3)
SMALLEST = {dtype: 2.0**-25 if dtype == torch.float16 else 0.0 for dtype in cases.DTYPES}
# the edges of what each kernel takes: 2, 4, 8 rows on CUDA cores; 16, 32, 48, 64 rows, bands of 32 on tensor cores
FEW_TASKS = tuple(range(1, 18))
MANY_TASKS = (24, 32, 33, 48, 50, 64, 65, 96, 97, 128)
SOLVED_FOR_GROUPS = (1, 3, 16, 17, 33, 66, 128)


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    if host.compiler() is None:
        skip_or_fail("no C++ compiler")
    host.library()


def columns_of(case: ListCase) -> list[Tensor]:
    """The first tensor of each present parameter."""
    rows = read_lists(case.make())
    return list(first_of_params(rows.tensors, rows.index, rows.num_params).values())


def list_outputs(case: ListCase, count: int) -> list[list[Output]]:
    return [[Output((x.numel(),), x.dtype) for x in columns_of(case)] for _ in range(count)]


def tensors(outputs: Sequence[Sequence[Output]]) -> list[list[Tensor]]:
    return [[o.tensor for o in row] for row in outputs]


def flat(outputs: Sequence[Sequence[Output]]) -> Tensor:
    """`[K, P]` float64, after a look at what lies around each."""
    for row in outputs:
        for o in row:
            o.check()
    return torch.stack([cases.flat(row) for row in tensors(outputs)])


# --- Gram


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.short)
@pytest.mark.parametrize("num_tasks", FEW_TASKS + MANY_TASKS)
def test_gram_of_a_bank(num_tasks: int, dtype: torch.dtype) -> None:
    case = BankCase(num_tasks, 1031 if num_tasks < 18 else 419, dtype)
    cut = Cut(192, 0)
    m = host.gram(host.bank_gradients(case.make()), cut)
    assert cut.slots == (6 if num_tasks < 18 else 3)
    assert torch.equal(m, m.mT)
    cases.assert_gram(m, cases.bank64(case), [dtype], 1.0)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.short)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize(("num_tasks", "num_columns"), [(1, 1), (3, 65), (8, 1000), (16, 127), (17, 259), (66, 131)])
def test_gram_of_a_bank_of_any_strides(num_tasks: int, num_columns: int, layout: str, dtype: torch.dtype) -> None:
    case = BankCase(num_tasks, num_columns, dtype, layout)
    m = host.gram(host.bank_gradients(case.make()), Cut(128, 2))
    cases.assert_gram(m, cases.bank64(case), [dtype], cases.gram_slack("cuda", case))


@pytest.mark.parametrize(
    "case",
    [
        BankCase(1, 70001),
        BankCase(3, 70001, torch.bfloat16),
        BankCase(8, 33333),
        BankCase(16, 9001),
        BankCase(20, 4099),
        BankCase(64, 1031, torch.float16),
        BankCase(128, 700),
        *(BankCase(t, p, dtype) for t in (1, 8, 9, 33, 65) for p in (0, 1, 7) for dtype in cases.DTYPES),
    ],
    ids=str,
)
def test_gram_as_it_is_planned(case: BankCase) -> None:
    cut = Cut()
    m = host.gram(host.bank_gradients(case.make()), cut)
    assert cut.slots >= 1 and cut.groups >= 1 and cut.launches == 1
    cases.assert_gram(m, cases.bank64(case), [case.dtype], 1.0)


# to 8 tasks `kLongestSlot` of csrc/cuda/gradients/plan.h; beyond, slots of any length
LONGEST = {2: 24576, 8: 24576, 12: 49152, 20: 40000, 64: 12288}


@pytest.mark.parametrize("num_tasks", LONGEST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.short)
def test_equal_products_in_the_longest_slot(num_tasks: int, dtype: torch.dtype) -> None:
    """Every addition to a float32 sum then errs the same way, in every thread: nothing averages out."""
    value = 1.1 + torch.arange(num_tasks, dtype=torch.float64) / 7
    bank = value.to(dtype)[:, None].expand(num_tasks, LONGEST[num_tasks]).contiguous()
    cut = Cut(LONGEST[num_tasks], 0)
    m = host.gram(host.bank_gradients(bank), cut)
    assert cut.slots == 1
    cases.assert_gram(m, bank.double(), [dtype], 2.0)


@pytest.mark.parametrize("num_tasks", [1, 8, 9, 16, 17, 32, 33, 64, 65, 96, 97, 128])
def test_plan(num_tasks: int) -> None:
    """Slots hold all columns, and there is a ticket for every group, however many columns there are."""
    bands = -(-num_tasks // 32)
    blocks = 1 if num_tasks <= 64 else bands * (bands - 1) // 2
    for columns in (0, 64, 1024, 100_032, 1_000_000, 25_600_000, 10**9, 10**11):
        each, count, per_group = host.plan(columns, num_tasks)
        assert each % 64 == 0 and (count - 1) * each < max(columns, 1) <= count * each
        assert 1 <= -(-count // per_group) <= 255
        if num_tasks > 8:
            assert count * blocks <= (1056 if num_tasks <= 16 else 528)
            assert each < 2**31  # columns of a slot are 32-bit numbers


HOST_LISTS = [
    *(ListCase(k, 3, d) for k in cases.LIST_SHAPES if k not in ("huge", "large") for d in cases.DTYPES),
    *(ListCase(kind, t) for kind in ("dense", "nones", "mixed_layouts") for t in (1, 2, 8, 16, 17, 33)),
    *(ListCase("nones", t, torch.bfloat16) for t in (12, 40, 70)),
    ListCase("nones", 128),
    ListCase("absent_task", 97, torch.float64),
    ListCase("many", 20, torch.float16),
    ListCase("large", 2),
]


@pytest.mark.parametrize("case", HOST_LISTS, ids=str)
# 4480 columns hold all 70 parameters of "many"; 192 end within one, or take three
@pytest.mark.parametrize("columns", [192, 64 * 70, 0])
def test_gram_of_lists(case: ListCase, columns: int) -> None:
    if case.kind == "large" and columns == 192:
        columns = 2048
    rows = read_lists(case.make())
    cut = Cut(columns, 0)
    m = host.gram(host.list_gradients(rows), cut)
    dtypes = {x.dtype for x in rows.tensors if x.numel()}
    assert cut.launches == max(len(dtypes), 1)
    cases.assert_gram(m, cases.bank64(case), [x.dtype for x in rows.tensors], 1.0)


@pytest.mark.parametrize(
    "case",
    [
        BankCase(3, 2000),
        BankCase(9, 1000, torch.float64),
        BankCase(16, 2000, torch.bfloat16),
        BankCase(17, 1000, torch.float16),
        BankCase(66, 700),
        ListCase("mixed_dtypes", 3, torch.float64),
        ListCase("mixed_dtypes", 19),
    ],
    ids=str,
)
@pytest.mark.parametrize("slots_per_group", [1, 3, 1000])
def test_the_order_of_blocks_does_not_matter(case: BankCase | ListCase, slots_per_group: int) -> None:
    grads = case.make()
    make = host.bank_gradients if isinstance(grads, Tensor) else lambda g: host.list_gradients(read_lists(g))
    order = random_order(case.num_tasks)
    found = []
    for schedule in SCHEDULES:
        cut = Cut(64, slots_per_group, schedule)
        found.append(host.solved_gram(make(grads), order, cut))
        assert cut.slots >= 6 and cut.groups == -(-cut.slots // slots_per_group)
    for m, w in found[1:]:
        assert torch.equal(m, found[0][0]) and torch.equal(w, found[0][1])


def test_more_slots_than_tickets() -> None:
    case = BankCase(2, 64 * 300)
    m = host.gram(host.bank_gradients(case.make()), Cut(64, 2, 5))
    cases.assert_gram(m, cases.bank64(case), [case.dtype], 1.0)
    with pytest.raises(HostError, match="more groups than tickets"):
        host.gram(host.bank_gradients(case.make()), Cut(64, 1))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.short)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("num_tasks", "task"), [(3, 1), (9, 8), (16, 0), (20, 19), (64, 33), (97, 64)])
def test_what_is_not_finite_shows(num_tasks: int, task: int, value: float, dtype: torch.dtype) -> None:
    bank = BankCase(num_tasks, 259, dtype).make()
    bank[task, 130] = value
    m = host.gram(host.bank_gradients(bank), Cut(128, 0))
    hit = torch.zeros(num_tasks, num_tasks, dtype=torch.bool)
    hit[task] = hit[:, task] = True
    assert torch.equal(~m.isfinite(), hit)
    if dtype == torch.float32 and value != value:  # as GPUs make it
        bank.view(torch.int32)[task, 130] = 0x7FFFFFFF
        assert torch.equal(~host.gram(host.bank_gradients(bank), Cut(128, 0)).isfinite(), hit)
    w = host.solved_gram(host.bank_gradients(bank), random_order(num_tasks), Cut(128, 0))[1]
    assert w.isnan().all()


@pytest.mark.parametrize("num_tasks", [3, 16, 20])
def test_layers_of_very_different_scale(num_tasks: int) -> None:
    """Where tf32 without its second part would be off by far more than the small layers hold."""
    scale = torch.logspace(-6, 6, 13, dtype=torch.float64).repeat_interleave(64)
    bank = (cases.random_gradients(num_tasks, scale.numel(), cases.generator_of("scales")) * scale).to(torch.float32)
    m = host.gram(host.bank_gradients(bank), Cut(256, 0))
    cases.assert_gram(m, double(bank), [torch.float32], 1.0)


# --- groups of parameters, each with a Gram matrix and weights of its own


def grouped(case: ListCase, count: int) -> tuple[Grouped, list[int], list[Tensor]]:
    """The parameters by turns in some of so many groups, of which the last has none; the group of each parameter with a
    gradient; each group's float64 bank."""
    rows = read_lists(case.make())
    groups = [(5 * i + 2) % max(count - 1, 1) for i in range(rows.num_params)]
    found = Grouped(rows, groups, count)
    banks = []
    for part in found.split():
        tensors = [x.double() for x in part.tensors]
        banks.append(reference.bank_from_lists(tensors, part.index, part.num_tasks, part.num_params))
    return found, [groups[i] for i in present_params(rows.index, rows.num_params)], banks


GROUP_CASES = [
    *(
        ListCase(kind, 3, d)
        for kind in ("nones", "mixed_layouts", "mixed_dtypes", "empty_tensors")
        for d in cases.DTYPES
    ),
    *(ListCase("nones", t, d) for t in (1, 2, 8, 9, 17, 33, 50, 66) for d in cases.DTYPES),
    *(ListCase("many", t) for t in (2, 5, 12, 97)),
    ListCase("mixed_dtypes", 19, torch.float64),
    ListCase("absent_parameter", 7),
    ListCase("all_none", 2),
    ListCase("no_parameter", 2),
]


@pytest.mark.parametrize("case", GROUP_CASES, ids=str)
@pytest.mark.parametrize(("columns", "per_ticket", "count"), [(64, 2, 3), (192, 0, 2), (0, 0, 4), (64, 1, 60)])
def test_gram_of_groups(case: ListCase, columns: int, per_ticket: int, count: int) -> None:
    both, groups, banks = grouped(case, count)
    cut = Cut(columns, per_ticket)
    m = host.gram_groups(host.list_gradients(both.rows), groups, count, cut)
    dtypes = {x.dtype for x in both.rows.tensors if x.numel()}
    assert cut.launches == max(len(dtypes), 1) and cut.slots >= count and cut.groups >= count
    for part, bank, found in zip(both.split(), banks, m, strict=True):
        assert torch.equal(found, found.mT)
        if not part.tensors:
            assert not bool(found.any())
            continue
        own = [x.dtype for x in part.tensors]
        cases.assert_gram(found.to(cases.gram_dtype(own)), bank, own, 1.0)
        if columns:  # cut alike, the group by itself has the same sums
            alone = host.gram(host.list_gradients(part), Cut(columns, per_ticket))
            assert torch.equal(found.to(alone.dtype), alone)
    for schedule in SCHEDULES[1:3]:
        assert torch.equal(
            host.gram_groups(host.list_gradients(both.rows), groups, count, Cut(columns, per_ticket, schedule)), m
        )


def test_more_groups_than_parameters() -> None:
    """A ticket for each; those without a column have zeros."""
    case = ListCase("many", 3)
    both, groups, banks = grouped(case, 400)
    for columns, schedule in ((0, FORWARD), (64, 3)):
        cut = Cut(columns, 0, schedule)
        m = host.gram_groups(host.list_gradients(both.rows), groups, 400, cut)
        assert cut.groups == 400
        for found, bank in zip(m, banks, strict=True):
            if bank.numel():
                cases.assert_gram(found, bank, [case.dtype], 1.0)
            else:
                assert not bool(found.any())


@pytest.mark.parametrize("case", GROUP_CASES, ids=str)
@pytest.mark.parametrize(("columns", "count"), [(64, 3), (192, 2), (0, 60)])
def test_combine_of_groups(case: ListCase, columns: int, count: int) -> None:
    both, groups, banks = grouped(case, count)
    weights = random_weights((count, case.num_tasks))
    results = []
    for schedule in SCHEDULES[:2]:
        (out,) = list_outputs(case, 1)
        cut = Cut(columns, 0, schedule)
        host.combine_groups(weights, host.list_gradients(both.rows, tensors([out])), groups, cut)
        assert cut.launches == len({x.dtype for x in both.rows.tensors if x.numel()})
        results.append(flat([out]))
    assert torch.equal(*results)
    columns_by_group: list[list[Output]] = [[] for _ in range(count)]
    for group, one in zip(groups, out, strict=True):
        columns_by_group[group].append(one)
    tolerance = max((cases.COMBINE_TOLERANCE[x.dtype] for x in both.rows.tensors), default=0.0)
    smallest = max((SMALLEST[x.dtype] for x in both.rows.tensors), default=0.0)
    for w, part, bank, mine in zip(weights, both.split(), banks, columns_by_group, strict=True):
        if part.tensors:
            first = [*first_of_params(part.tensors, part.index, part.num_params).values()]
            cases.assert_combine(flat([mine]), w[None], bank, cases.units(first), tolerance, smallest)


@pytest.mark.parametrize("num_tasks", SOLVED_FOR_GROUPS)
@pytest.mark.parametrize("schedule", [FORWARD, REVERSE])
def test_pcgrad_weights_of_groups(num_tasks: int, schedule: int) -> None:
    """Each matrix as by itself, with an order that is given, and with the orders of so many draws in a row."""
    count = 5
    m = torch.stack([gram_matrix(num_tasks) * scale for scale in (1.0, 1e-3, 7.0, 1e6, 0.5)])
    m[2] = reference.gram(BankCase(num_tasks, 33, torch.float64).make())
    m[4, num_tasks - 1] = m[4, :, num_tasks - 1] = torch.nan
    key, state = -0x123456789ABCDEF, order_state(0xFEDCBA9876543210)
    state[1] = (1 << 40) + 3
    device = torch.device("cpu")
    for order, source in (
        (random_order(num_tasks), Draw(0, None)),
        (random_order(num_tasks, num_tasks + 3), Draw(0, state.clone())),
        (None, Draw(key, None)),
        (None, Draw(key, state)),
    ):
        before = None if source.state is None else source.state.clone()
        for mean, present in ((False, None), (True, absent_tasks(num_tasks))):
            drawn = Draw(source.key, None if source.state is None else source.state.clone())
            orders = drawn_orders(drawn, count, num_tasks, device) if order is None else [order] * count
            options: dict[str, Any] = {"mean": mean, "present": present, "key": source.key, "state": source.state}
            w = host.pcgrad_weights(m, order, schedule, **options)
            for found, matrix, visits in zip(w, m, orders, strict=True):
                c = host.coefficients(matrix, visits)
                expected = expected_weights(c, present, mean)
                assert torch.equal(found.isnan(), expected.isnan())
                slack = torch.full((num_tasks,), 1e-15, dtype=torch.float64) * c.nan_to_num().abs().sum()
                cases.assert_within(found.nan_to_num(), expected.nan_to_num(), slack)
            if before is not None:
                advanced = 0 if order is not None else count
                assert torch.equal(source.state, before + torch.tensor([0, advanced]))
                source.state.copy_(before)
    orders = drawn_orders(Draw(key, state.clone()), count, num_tasks, device)
    again = state.clone()
    assert torch.equal(orders, torch.stack([drawn_order(Draw(key, again), num_tasks, device) for _ in range(count)]))


@pytest.mark.parametrize("method", method_weights.OPTIONS)
@pytest.mark.parametrize("num_tasks", [3, 18, 66])
def test_method_weights_of_groups(num_tasks: int, method: str) -> None:
    """Bit for bit those of each matrix alone, whichever block comes first."""
    if num_tasks == 66 and method not in ("dualproj", "upgrad"):
        pytest.skip("beyond shared memory one method in parts and one without are enough")
    options = METHOD_OPTIONS.get(method, [])
    number = list(method_weights.OPTIONS).index(method)
    present = torch.arange(num_tasks) != 1
    m = torch.stack([method_gram(num_tasks, kind) for kind in ("conflicts", "lengths", "few dimensions")])
    alone = [host.method_weights(one, number, options, present=present) for one in m]
    for schedule in SCHEDULES[:2]:
        w = host.method_weights(m, number, options, present=present, schedule=schedule)
        assert torch.equal(w.nan_to_num(nan=-1.0), torch.stack(alone).nan_to_num(nan=-1.0))


# --- weights of the methods that need the Gram matrix alone


def method_gram(num_tasks: int, kind: str) -> Tensor:
    """Gram matrices with conflicts, of few dimensions, of lengths far apart, and with a zero and two opposite rows."""
    generator = cases.generator_of(("methods", num_tasks, kind))
    width = max(2, num_tasks // 2) if kind == "few dimensions" else 2 * num_tasks + 1
    bank = torch.randn(num_tasks, width, generator=generator, dtype=torch.float64)
    if kind == "conflicts":
        bank = bank - 1.2 * bank.mean(0)
    elif kind == "lengths":
        bank = bank * torch.exp(3 * torch.randn(num_tasks, 1, generator=generator, dtype=torch.float64))
    elif kind == "degenerate" and num_tasks > 2:
        bank[0] = 0
        bank[2] = -bank[1]
    return bank @ bank.mT


METHOD_OPTIONS = {"cagrad": [0.5], "nashmtl": [0.0], "fairgrad": [2.0], "alignedmtl": [0.0, 0.0]}
METHOD_OPTIONS |= {"upgrad": [1e-4], "dualproj": [1e-4], "krum": [1.0, 2.0, 1.0], "pcd": [0.0, 0.1]}
METHOD_OPTIONS |= {"sdmgrad": [10.0, 0.5, 20.0, 0.3], "modo": [0.1, 0.2]}


@pytest.mark.parametrize("method", method_weights.OPTIONS)
@pytest.mark.parametrize("kind", ["conflicts", "few dimensions", "lengths", "degenerate"])
@pytest.mark.parametrize("num_tasks", [1, 2, 7, 17, 66])
def test_method_weights(num_tasks: int, kind: str, method: str) -> None:
    """What the block finds is what one thread finds, which adds up in another order and has another eigensolver."""
    if (reason := dispatch.unavailable("cpu", "cpu")) is not None:
        skip_or_fail(reason)
    if num_tasks == 66 and (method, kind) not in {("dualproj", "conflicts"), ("imtlg", "conflicts")}:
        pytest.skip("beyond shared memory one method of each kind of solver is enough")
    m = method_gram(num_tasks, kind)
    options = METHOD_OPTIONS.get(method, [])
    present = torch.arange(num_tasks) != 4
    number = list(method_weights.OPTIONS).index(method)
    # where no direction serves all tasks, only rounding keeps these weights from being infinite
    tolerance = 0.1 if kind == "few dimensions" and method in ("nashmtl", "fairgrad") else 1e-7
    if (method, kind) in {("fairgrad", "degenerate"), ("alignedmtl", "lengths")}:
        tolerance = 1e-6  # condition of 1e9, at which two ways of solving may differ
    wanted = ops.method_weights(m, method, options, present=present)
    for schedule in SCHEDULES[: 2 if num_tasks < 17 else 1]:
        w = host.method_weights(m, number, options, present=present, schedule=schedule)
        wrong = w - wanted
        # as updates: where gradients cancel the weights are large
        assert wrong @ m @ wrong <= tolerance**2 * (wanted @ m @ wanted).abs() + 1e-24 * m.diagonal().max()
        compared = torch.ones(num_tasks, dtype=torch.bool)
        if method == "nashmtl" and kind == "degenerate" and num_tasks > 2:
            # rounding alone keeps the two opposite gradients' weights finite: they meet their equations, and the others
            # are compared without them
            compared[1:3] = False
            slack = num_tasks * torch.finfo(torch.float64).eps * (m.abs() @ w)
            assert ((m @ w - 1 / w).abs() <= slack)[~compared].all()
            assert (wrong.abs() <= 1e-3 * wanted)[~compared].all()
        assert wrong[compared].abs().max() <= max(tolerance, 1e-6) * wanted[compared].abs().max()


@pytest.mark.parametrize("method", [name for name in method_weights.OPTIONS if name not in ("nashmtl", "fairgrad")])
@pytest.mark.parametrize("kind", ["opposite pairs", "duplicates", "sums", "nearly opposite", "all alike"])
@pytest.mark.parametrize("num_tasks", [8, 17, 33])
def test_method_weights_of_dependent_gradients(num_tasks: int, kind: str, method: str) -> None:
    """The block decides on the rank, and on what rounding has made, as one thread does."""
    if (reason := dispatch.unavailable("cpu", "cpu")) is not None:
        skip_or_fail(reason)
    generator = cases.generator_of(("dependent", num_tasks, kind))
    bank = torch.randn(num_tasks, 2 * num_tasks + 1, generator=generator, dtype=torch.float64)
    half = num_tasks // 2
    if kind == "opposite pairs":
        bank[half : 2 * half] = -bank[:half]
    elif kind == "duplicates":
        bank[half : 2 * half] = bank[:half]
    elif kind == "sums":
        bank[-1] = bank[:half].sum(0)
    elif kind == "nearly opposite":
        bank[-1] = -bank[0] + 1e-3 * bank[-1]
    else:
        bank = bank[:, :1].expand(-1, 1000)
    m = bank @ bank.mT
    options = METHOD_OPTIONS.get(method, [])
    wanted = ops.method_weights(m, method, options)
    w = host.method_weights(m, list(method_weights.OPTIONS).index(method), options)
    wrong = w - wanted
    size = (w.abs() + wanted.abs()) @ m.diagonal().sqrt()
    assert size > 0 or kind == "opposite pairs"
    assert wrong @ m @ wrong <= (1e-7 * size) ** 2


def bordered(m: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix inside a larger one, as those of two batches lie in theirs."""
    num_tasks = len(m)
    large = torch.full((num_tasks, 2 * num_tasks), torch.nan, dtype=dtype)
    large[:, num_tasks:] = m
    return large[:, num_tasks:]


# sdmgrad, modo: steps so short that rounding does not grow from one to the next
STEP_OPTIONS = {"pcd": [0.0, 0.1, 0.9, 1e-8], "sdmgrad": [0.1, 0.5, 20.0, 0.3], "modo": [0.01, 0.2]}
STEP_OPTIONS |= {"paretomtl": [1.0, 5.0], "upgrad": [1e-4], "given": []}
NUMBERS = [*method_weights.OPTIONS, "paretomtl", "given"]
STEP_SIZES = {"paretomtl": [2, 9, 40], "upgrad": [3, 17]}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("method", "num_tasks"), [(method, n) for method in STEP_OPTIONS for n in STEP_SIZES.get(method, [1, 3, 17, 66])]
)
def test_method_steps(num_tasks: int, method: str, dtype: torch.dtype, schedules: Sequence[int] = SCHEDULES) -> None:
    """Weights, their average and what is kept over steps, one of which is bad; absent tasks' entries are neither read
    nor changed."""
    m = bordered(method_gram(num_tasks, "conflicts"), dtype)
    also = bordered(method_gram(num_tasks, "lengths"), dtype) if method in ("sdmgrad", "modo") else None
    present = torch.arange(num_tasks) != 2
    m[2:3], m[:, 2:3] = torch.nan, torch.nan
    eps, options = torch.finfo(dtype).eps, STEP_OPTIONS[method]
    numbers = torch.linspace(0.1, 1.1, num_tasks, dtype=torch.float64)
    kept: dict[str, Tensor] = {"average": torch.full_like(numbers, torch.nan)}
    given: dict[str, Tensor | None] = {"preferences": numbers} if method in ("sdmgrad", "given") else {}
    if method == "pcd":
        kept |= {"kept": torch.zeros_like(numbers), "counted": torch.zeros_like(numbers)}
        given["per_task"] = numbers
    elif method in ("sdmgrad", "modo"):
        kept["kept"] = torch.full_like(numbers, torch.nan)
        given["also"] = also
    elif method == "paretomtl":
        kept |= {"kept": torch.zeros((), dtype=torch.float64), "counted": torch.zeros((), dtype=torch.float64)}
        vectors = torch.rand(3, num_tasks, dtype=torch.float64, generator=torch.Generator().manual_seed(num_tasks))
        given |= {"per_task": numbers.flip(0).contiguous(), "vectors": vectors / vectors.norm(dim=1, keepdim=True)}
    wanted_kept = {name: x.clone() for name, x in kept.items()}
    bad = m if also is None else also
    for step in range(4):
        entry = bad[0, 0].clone()
        if step == 1:
            bad[0, 0] = torch.inf
        if method == "paretomtl" and step == 2:
            given["per_task"] = given["vectors"][1].clone()  # it keeps to its part
        wanted = reference.method_step(m, method, options, momentum=0.6, present=present, **wanted_kept, **given)
        schedule = schedules[step % len(schedules)]
        w = host.method_weights(
            m, NUMBERS.index(method), options, eps, present, momentum=0.6, schedule=schedule, **kept, **given
        )
        bad[0, 0] = entry
        torch.testing.assert_close(w, wanted, rtol=1e-6, atol=1e-9, equal_nan=True)
        assert w.isnan().any() == (step == 1)
        for name, x in kept.items():
            torch.testing.assert_close(x, wanted_kept[name], rtol=1e-6, atol=1e-9, equal_nan=True)


# --- GradVac


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("num_tasks", [1, 2, 7, 16, 17, 33, 64, 65, 128])
def test_gradvac_steps(num_tasks: int, reduction: str, schedules: Sequence[int] = SCHEDULES) -> None:
    """Weights and targets over steps, with orders that are drawn or given, absent tasks, and a step that is bad."""
    targets = gradvac_targets(num_tasks)
    expected, states = targets.clone(), [torch.tensor([11, 4]), torch.tensor([11, 4])]
    for step in range(3):
        m = bordered(method_gram(num_tasks, "conflicts"), torch.float32 if step == 2 else torch.float64)
        if step == 1:
            m[-1, -1] = torch.nan
        present = (torch.arange(num_tasks) % 5 != 3) if step == 0 else None
        order = random_order(num_tasks, num_tasks + 3) if step == 2 else None
        wanted = reference.gradvac_step(m, expected, order, 5, states[0], present, 0.1, "always", reduction)
        schedule = schedules[step % len(schedules)]
        w = host.gradvac_step(m, targets, order, 5, states[1], present, 0.1, "always", reduction, schedule)
        torch.testing.assert_close(w, wanted, rtol=1e-9, atol=1e-9, equal_nan=True)
        torch.testing.assert_close(targets, expected, rtol=1e-9, atol=1e-9)
        # one task alone visits no one, so that no bad entry is met
        assert torch.equal(*states) and w.isnan().any() == (step == 1 and num_tasks > 1)


@pytest.mark.parametrize("update", ["always", "triggered"])
@pytest.mark.parametrize("num_tasks", [1, 2, 7, 16, 17, 32, 33, 64, 65, 128])
def test_gradvac(num_tasks: int, update: str) -> None:
    """Rows that are in hand at once, tasks that are visited again, a zero and two opposite gradients, no visits."""
    targets = gradvac_targets(num_tasks)
    for kind, num_visits in (("conflicts", None), ("conflicts", num_tasks + 3), ("degenerate", None), ("lengths", 0)):
        m, order = method_gram(num_tasks, kind), random_order(num_tasks, num_visits)
        expected = reference.gradvac_coefficients(m, order, targets, 0.1, update)
        for schedule in SCHEDULES[: 2 if num_tasks < 33 else 1]:
            found = host.gradvac(m, order, targets, 0.1, update == "always", schedule=schedule)
            for x, y in zip(found, expected, strict=True):
                scale = y.abs().amax(dim=1, keepdim=True).clamp(min=1.0)
                # opposite gradients come to what is left of rounding
                assert ((x - y).abs() <= (1e-6 if kind == "degenerate" else 1e-10) * scale).all()


@pytest.mark.parametrize("num_tasks", [5, 20, 40, 80])
def test_gradvac_of_bad_entries(num_tasks: int) -> None:
    m, order, targets = method_gram(num_tasks, "conflicts"), random_order(num_tasks), gradvac_targets(num_tasks)
    order[0], order[1, 0], order[3, 1] = 0, num_tasks, -1
    m[4, :] = m[:, 4] = torch.nan
    expected = reference.gradvac_coefficients(m, order, targets, 0.1)
    found = host.gradvac(m, order, targets, 0.1)
    assert torch.equal(found[0].isnan(), expected[0].isnan()) and found[0][1:].isnan().all()
    assert torch.equal(found[1], targets) and torch.equal(found[0][0], expected[0][0])


def gradvac_targets(num_tasks: int) -> Tensor:
    generator = cases.generator_of(("gradvac", num_tasks))
    return 1.2 * torch.rand(num_tasks, num_tasks, dtype=torch.float64, generator=generator) - 0.6


# --- the solver


def assert_coefficients(actual: Tensor, expected: Tensor) -> None:
    rows = expected.isnan().any(dim=1)
    assert torch.equal(actual.isnan(), expected.isnan())
    scale = expected.abs().amax(dim=1, keepdim=True).expand_as(expected)
    cases.assert_within(actual[~rows], expected[~rows], cases.COEFFICIENT_TOLERANCE * scale[~rows])


def gram_matrix(num_tasks: int) -> Tensor:
    return reference.gram(cases.bank64(BankCase(num_tasks, 65, torch.float64)))


SOLVED_TASKS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128)


@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize("num_tasks", SOLVED_TASKS)
def test_coefficients(num_tasks: int, include_self: bool) -> None:
    m = gram_matrix(num_tasks)
    # permutations; fewer visits; more than there are tasks, so that some come again
    for num_visits in (None, 0, 1, num_tasks // 2, num_tasks + 5):
        order = random_order(num_tasks, num_visits)
        expected = reference.pcgrad_coefficients(m, order, include_self)
        for schedule in (FORWARD, REVERSE):
            assert_coefficients(host.coefficients(m, order, include_self, schedule), expected)


@pytest.mark.parametrize("num_tasks", [5, 16, 17, 32, 33, 50, 64, 65, 128])
def test_coefficients_of_tasks_visited_again(num_tasks: int) -> None:
    """Rows that visit a task twice add to a coefficient; one such row is enough to be found, wherever it is."""
    m = gram_matrix(num_tasks)
    generator = torch.Generator().manual_seed(num_tasks)
    anything = torch.randint(num_tasks, (num_tasks, num_tasks), generator=generator)
    last = random_order(num_tasks)
    last[-1, -1] = last[-1, 0]
    same = torch.full((num_tasks, 2), num_tasks - 1)
    for order in (anything, last, same):
        for include_self in (False, True):
            expected = reference.pcgrad_coefficients(m, order, include_self)
            assert_coefficients(host.coefficients(m, order, include_self), expected)


@pytest.mark.parametrize("num_tasks", [5, 16, 40, 70])
def test_coefficients_of_bad_entries(num_tasks: int) -> None:
    m = gram_matrix(num_tasks)
    m[2, :] = m[:, 2] = torch.nan
    m[0, 4] = m[4, 0] = torch.inf
    order = random_order(num_tasks, num_tasks - 2)
    order[1, 0] = num_tasks
    order[3, 1] = -1
    order[0, 0] = 1 << 40
    expected = reference.pcgrad_coefficients(m, order)
    assert expected.isnan().any()
    found = host.coefficients(m, order)
    assert_coefficients(found, expected)
    assert found[[0, 1, 3]].isnan().all()


@pytest.mark.parametrize("num_tasks", [3, 16, 20, 40, 80])
def test_coefficients_of_a_matrix_of_no_gradients(num_tasks: int) -> None:
    """Off the diagonal larger than any Gram matrix allows: products overflow on the way, and their rows become NaN."""
    order = random_order(num_tasks)
    for size in (1e20, 1e155):
        m = torch.full((num_tasks, num_tasks), -size, dtype=torch.float64).fill_diagonal_(1.0)
        expected = reference.pcgrad_coefficients(m, order)
        assert_coefficients(host.coefficients(m, order), expected)
    assert expected.isnan().any()


@pytest.mark.parametrize("num_tasks", [4, 16, 33, 80])
def test_zero_gradients_and_gradients_alike(num_tasks: int) -> None:
    bank = BankCase(num_tasks, 31, torch.float64).make()
    bank[1] = 0.0
    bank[3] = -bank[2]
    order = random_order(num_tasks)
    m, c = host.solved_gram(host.bank_gradients(bank), order, project=True)
    assert_coefficients(c, reference.pcgrad_coefficients(m, order))


def absent_tasks(num_tasks: int) -> list[bool]:
    return [t % 3 != 1 for t in range(num_tasks)]


def expected_weights(c: Tensor, present: Sequence[bool] | None, mean: bool) -> Tensor:
    here = torch.tensor([True] * c.shape[0] if present is None else list(present))
    return torch.where(here, c[here].sum(0) / (int(here.sum()) if mean else 1), 0.0)


@pytest.mark.parametrize("num_tasks", SOLVED_TASKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=cases.short)
def test_fused_solver(num_tasks: int, dtype: torch.dtype) -> None:
    bank = BankCase(num_tasks, 65, dtype).make()
    for num_visits, include_self, mean, absent in (
        (None, False, False, False),
        (None, True, True, True),
        (num_tasks + 3, False, True, False),
        (2, True, False, True),
        (0, False, False, False),
    ):
        order = random_order(num_tasks, num_visits)
        present = absent_tasks(num_tasks) if absent else None
        options: dict[str, Any] = {"include_self": include_self, "mean": mean, "present": present}
        m, w = host.solved_gram(host.bank_gradients(bank), order, Cut(64, 1), **options)
        same, c = host.solved_gram(host.bank_gradients(bank), order, Cut(64, 1), project=True, **options)
        assert torch.equal(m, same)
        scale = c.abs().sum()
        cases.assert_within(w, expected_weights(c, present, mean), torch.full((num_tasks,), 1e-15) * scale)
        if dtype == torch.float64:  # the matrix that the kernel returns is the one that it has solved
            assert_coefficients(c, reference.pcgrad_coefficients(m, order, include_self))


def test_out_of_range_in_the_fused_call() -> None:
    for num_tasks in (4, 16, 20, 65):
        bank = BankCase(num_tasks, 33, torch.float64).make()
        order = random_order(num_tasks)
        order[2, 0] = 255  # also what the kernel itself writes for one out of range
        order[3, num_tasks - 1] = 256  # 0 in 8 bits
        m, c = host.solved_gram(host.bank_gradients(bank), order, project=True)
        assert c[[2, 3]].isnan().all()
        assert_coefficients(c, reference.pcgrad_coefficients(m, order))


def test_every_task_absent() -> None:
    bank = BankCase(3, 33).make()
    _, w = host.solved_gram(host.bank_gradients(bank), random_order(3), mean=True, present=[False] * 3)
    assert torch.equal(w, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("num_tasks", [1, 2, 5, 16, 17, 45, 64, 65, 90, 128])
@pytest.mark.parametrize("schedule", [FORWARD, REVERSE])
def test_drawn_orders(num_tasks: int, schedule: int) -> None:
    grads = host.bank_gradients(BankCase(num_tasks, 65, torch.float64).make())
    key = -0x123456789ABCDEF
    state = order_state(0xFEDCBA9876543210)
    state[1] = (1 << 40) + 3
    for source in (Draw(key, None), Draw(key, state), Draw(key, state), Draw(0, state)):
        before = None if source.state is None else source.state.clone()
        found = host.solved_gram(grads, None, Cut(64, 0, schedule), project=True, key=source.key, state=source.state)
        order = drawn_order(Draw(source.key, before), num_tasks, torch.device("cpu"))
        assert torch.equal(order.sort(dim=1).values, torch.arange(num_tasks).expand(num_tasks, num_tasks))
        expected = host.solved_gram(grads, order, Cut(64, 0), project=True)
        assert torch.equal(found[1], expected[1])
        if before is not None:
            assert torch.equal(source.state, before)  # drawn_order has advanced the copy


# Keys of which a row draws two numbers with the same upper half: ranked by halves, both tasks have one rank.
EQUAL_HALVES = (
    (20, 84120, (10, 0, 18)),
    (50, 84120, (4, 0, 18)),
    (128, 1136, (122, 25, 36)),
    (128, 21465, (69, 109, 117)),
)


@pytest.mark.parametrize(("num_tasks", "key", "where"), EQUAL_HALVES)
def test_drawn_orders_of_equal_halves(num_tasks: int, key: int, where: tuple[int, int, int]) -> None:
    order = drawn_order(Draw(key, None), num_tasks, torch.device("cpu"))
    row, first, second = where
    numbers = [splitmix64(key, row * num_tasks + task) for task in (first, second)]
    assert numbers[0] != numbers[1] and numbers[0] >> 32 == numbers[1] >> 32
    step = {int(task): k for k, task in enumerate(order[row])}
    assert abs(step[first] - step[second]) == 1 and (step[first] < step[second]) == (numbers[0] < numbers[1])
    grads = host.bank_gradients(BankCase(num_tasks, 65, torch.float64).make())
    found = host.solved_gram(grads, None, Cut(64, 0), project=True, key=key)
    assert torch.equal(found[1], host.solved_gram(grads, order, Cut(64, 0), project=True)[1])


def splitmix64(key: int, n: int) -> int:
    """Number n of a stream, as a signed integer."""
    mask = (1 << 64) - 1
    z = (key + (n + 1) * 0x9E3779B97F4A7C15) & mask
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    z ^= z >> 31
    return z - (1 << 64) if z >> 63 else z


@pytest.mark.parametrize("num_tasks", [16, 17, 33, 66])
@pytest.mark.parametrize("slots_per_group", [1, 1000])
def test_orders_drawn_apart(num_tasks: int, slots_per_group: int) -> None:
    """By the first block of several launches' first, whichever arrives last; absent tasks; what is not finite."""
    case = ListCase("mixed_dtypes", num_tasks)
    grads = host.list_gradients(read_lists(case.make()))
    order = drawn_order(Draw(5, None), num_tasks, torch.device("cpu"))
    present = absent_tasks(num_tasks)
    for mean in (False, True):
        expected = host.solved_gram(grads, order, Cut(64, slots_per_group), mean=mean, present=present)
        for schedule in SCHEDULES:
            cut = Cut(64, slots_per_group, schedule)
            found = host.solved_gram(grads, None, cut, mean=mean, present=present, key=5)
            assert cut.launches > 1
            assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    bank = BankCase(num_tasks, 259).make()
    bank[num_tasks // 2, 7] = torch.nan
    for schedule in SCHEDULES:
        found = host.solved_gram(host.bank_gradients(bank), None, Cut(64, slots_per_group, schedule), key=5)
        assert found[1].isnan().all()


# --- combine


def assert_combined(actual: Tensor, weights: Tensor, bank: Tensor, dtype: torch.dtype) -> None:
    cases.assert_combine(
        actual, weights, bank, cases.unit_roundoff(dtype), cases.COMBINE_TOLERANCE[dtype], SMALLEST[dtype]
    )


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.short)
@pytest.mark.parametrize("num_tasks", [1, 3, 8, 9, 17, 33, 128])
@pytest.mark.parametrize("num_out", [1, 3, 8, 9, None])
def test_combine_of_a_bank(num_tasks: int, num_out: int | None, dtype: torch.dtype) -> None:
    count = num_tasks if num_out is None else num_out
    case = BankCase(num_tasks, 131 if num_tasks * count > 2000 else 531, dtype)
    weights = random_weights((count, num_tasks))
    for offset, schedule in ((0, FORWARD), (1, REVERSE)):
        out = Output((case.num_columns,), dtype, rows=count, offset=offset)
        cut = Cut(64 * 3, 0, schedule)
        host.combine(weights, host.bank_gradients(case.make(), out.pieces), cut)
        out.check()
        assert cut.slots == (1 if case.num_columns < 192 else 3)
        assert_combined(out.tensor, weights, cases.bank64(case), dtype)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.short)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize(("num_tasks", "num_columns", "num_out"), [(1, 1, 1), (3, 65, 2), (9, 1000, 1), (17, 259, 10)])
def test_combine_of_a_bank_of_any_strides(
    num_tasks: int, num_columns: int, num_out: int, layout: str, dtype: torch.dtype
) -> None:
    case = BankCase(num_tasks, num_columns, dtype, layout)
    weights = random_weights((num_out, num_tasks))
    out = Output((num_columns,), dtype, rows=num_out)
    host.combine(weights, host.bank_gradients(case.make(), out.pieces), Cut(128))
    out.check()
    assert_combined(out.tensor, weights, cases.bank64(case), dtype)


@pytest.mark.parametrize("case", HOST_LISTS, ids=str)
@pytest.mark.parametrize("num_out", [1, 9])
def test_combine_of_lists(case: ListCase, num_out: int) -> None:
    rows = read_lists(case.make())
    weights = random_weights((num_out, case.num_tasks))
    unit = cases.units(columns_of(case))
    found = []
    for columns, schedule in ((192 if case.kind != "large" else 0, FORWARD), (64 * 70, REVERSE)):
        out = list_outputs(case, num_out)
        host.combine(weights, host.list_gradients(rows, tensors(out)), Cut(columns, 0, schedule))
        found.append(flat(out))
    assert torch.equal(*found)
    tolerance = max((cases.COMBINE_TOLERANCE[x.dtype] for x in rows.tensors), default=0.0)
    smallest = max((SMALLEST[x.dtype] for x in rows.tensors), default=0.0)
    cases.assert_combine(found[0], weights, cases.bank64(case), unit, tolerance, smallest)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.short)
@pytest.mark.parametrize("offset", [0, 1])
def test_combine_in_place(dtype: torch.dtype, offset: int) -> None:
    for num_tasks, target, split in ((1, 0, False), (5, 3, False), (40, 0, False), (5, 4, True), (40, 7, True)):
        case = BankCase(num_tasks, 531, dtype)
        memory = Output((case.num_columns,), dtype, rows=num_tasks, offset=offset)
        memory.tensor.copy_(case.make())
        weights = random_weights((1, num_tasks))
        cut = Cut(128, 0, REVERSE)
        host.combine(weights, host.bank_gradients(memory.tensor, [memory.pieces[target]]), cut, split=split)
        memory.check()
        assert_combined(memory.tensor[target], weights[0], cases.bank64(case), dtype)
        rest = [t for t in range(num_tasks) if t != target]
        assert torch.equal(memory.tensor[rest], case.make()[rest])


# tasks, columns, outputs -> blocks' columns: eight tasks, one output and 256 Ki columns are the most or the least
@pytest.mark.parametrize(
    ("num_tasks", "num_columns", "num_out", "slots"),
    [
        (2, 40_003, 1, 40),
        (8, 5000, 1, 5),
        (9, 5000, 1, 20),
        (9, 5000, 2, 5),
        (9, 1 << 18, 1, 1024),
        (9, 263_000, 1, 257),
    ],
)
def test_combine_as_it_is_planned(num_tasks: int, num_columns: int, num_out: int, slots: int) -> None:
    case = BankCase(num_tasks, num_columns)
    weights = random_weights((num_out, num_tasks))
    out = Output((case.num_columns,), case.dtype, rows=num_out)
    cut = Cut()
    host.combine(weights, host.bank_gradients(case.make(), out.pieces), cut)
    out.check()
    assert cut.slots == slots
    assert_combined(out.tensor, weights, cases.bank64(case), case.dtype)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.short)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize(("num_tasks", "num_columns"), [(1, 1), (3, 65), (8, 257), (17, 1000), (50, 770), (128, 261)])
def test_split_combine_of_a_bank(num_tasks: int, num_columns: int, layout: str, dtype: torch.dtype) -> None:
    case = BankCase(num_tasks, num_columns, dtype, layout)
    weights = random_weights((1, num_tasks))
    found = []
    for offset, schedule in ((0, FORWARD), (1, REVERSE), (0, 2)):
        out = Output((num_columns,), dtype, rows=1, offset=offset)
        cut = Cut(0, 0, schedule)
        host.combine(weights, host.bank_gradients(case.make(), out.pieces), cut, split=True)
        out.check()
        assert cut.slots == -(-num_columns // 256)
        assert_combined(out.tensor, weights, cases.bank64(case), dtype)
        found.append(out.tensor)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("case", HOST_LISTS, ids=str)
def test_split_combine_of_lists(case: ListCase) -> None:
    rows = read_lists(case.make())
    weights = random_weights((1, case.num_tasks))
    unit = cases.units(columns_of(case))
    found = []
    for schedule in (FORWARD, REVERSE):
        out = list_outputs(case, 1)
        host.combine(weights, host.list_gradients(rows, tensors(out)), Cut(0, 0, schedule), split=True)
        found.append(flat(out))
    assert torch.equal(*found)
    tolerance = max((cases.COMBINE_TOLERANCE[x.dtype] for x in rows.tensors), default=0.0)
    smallest = max((SMALLEST[x.dtype] for x in rows.tensors), default=0.0)
    cases.assert_combine(found[0], weights, cases.bank64(case), unit, tolerance, smallest)


def test_combine_of_what_is_not_finite() -> None:
    bank = BankCase(3, 100).make()
    bank[1, 50] = torch.nan
    out = Output((100,), bank.dtype, rows=2)
    weights = torch.ones(2, 3, dtype=torch.float64)
    weights[1, 2] = torch.inf
    host.combine(weights, host.bank_gradients(bank, out.pieces))
    assert torch.equal(out.tensor[0].isnan(), torch.arange(100) == 50)
    assert not out.tensor[1].isfinite().any()
    for k in range(2):
        one = Output((100,), bank.dtype, rows=1)
        host.combine(weights[k : k + 1].contiguous(), host.bank_gradients(bank, one.pieces), split=True)
        assert torch.equal(one.tensor[0].isfinite(), out.tensor[k].isfinite())


# --- pointer tables


def test_tables() -> None:
    """At the edges of what a launch carries: with 4 KiB of arguments, and with 32,764 bytes."""
    resnet50 = 161 * (3 + 2 * 8 + 1) + 1
    for count, few, many in (
        (1, 1, 1),
        (257, 1, 1),
        (480, 1, 1),
        (481, 2, 1),
        (1536, 4, 1),
        (1537, 4, 1),
        (resnet50, 7, 1),
        (4093, 9, 1),
        (4094, 9, 2),
        (3 * 4093 + 5, 26, 4),
    ):
        words = torch.arange(count, dtype=torch.int64) * 0x0123456789ABCD + 5
        for large, launches in ((False, few), (True, many)):
            found, taken = host.table(words, large)
            assert torch.equal(found, words)
            assert taken == launches


# --- the whole of PCGrad


@pytest.mark.parametrize(
    "case",
    [
        *(BankCase(t, 259, d) for t in (2, 5, 16, 17) for d in cases.DTYPES),
        BankCase(66, 131),
        BankCase(8, 531, torch.bfloat16, "row_strided"),
        *(c for c in cases.FEW_LISTS if c.kind not in ("no_parameter", "all_none")),
    ],
    ids=str,
)
@pytest.mark.parametrize("project", [False, True])
def test_pcgrad(case: BankCase | ListCase, project: bool) -> None:
    """Gram, solver and combine, as surgery.cu calls them, against the paper's loop on the vectors."""
    grads = case.make()
    order = random_order(case.num_tasks)
    count = case.num_tasks if project else 1
    projected = cases.projected64(case)
    if isinstance(grads, Tensor):
        out = Output((case.num_columns,), case.dtype, rows=count)
        given = host.bank_gradients(grads, out.pieces)
        dtypes, unit = [case.dtype], torch.tensor(cases.unit_roundoff(case.dtype), dtype=torch.float64)
    else:
        outs = list_outputs(case, count)
        given = host.list_gradients(read_lists(grads), tensors(outs))
        dtypes, unit = [x.dtype for x in columns_of(case)], cases.units(columns_of(case))
    _, w = host.solved_gram(given, order, Cut(64, 2, 2), project=project)
    host.combine(w.reshape(count, -1), given, Cut(64))
    found = out.tensor.to(torch.float64) if isinstance(grads, Tensor) else flat(outs)
    tolerance = max(cases.PCGRAD_TOLERANCE[d] for d in dtypes)
    scale = cases.pcgrad_scale(cases.bank64(case), projected)
    expected, scale = (projected, scale) if project else (projected.sum(0, keepdim=True), scale.sum(0, keepdim=True))
    smallest = max(SMALLEST[d] for d in dtypes)
    cases.assert_within(found, expected, tolerance * scale + 1.001 * unit * expected.abs() + smallest)


# --- the header itself: what its checks see, and its arithmetic


@pytest.mark.parametrize("schedule", [FORWARD, REVERSE])
def test_what_a_kernel_does_wrong_is_seen(schedule: int) -> None:
    right = float(sum(range(64)))
    assert host.faulty(0, schedule) == right
    # 4: a value that is not written
    assert host.faulty(4, schedule) != right
    unreached = "a barrier or a warp's operation that not all of its threads reach"
    for fault in (1, 2, 3):
        with pytest.raises(HostError, match=f"{unreached}|lanes of one warp in different operations"):
            host.faulty(fault, schedule)
    # 8: a copy into shared memory that is read before it has been waited for; 9: that is never waited for
    assert host.faulty(8, schedule) != right
    with pytest.raises(HostError, match="a copy to shared memory that nobody waits for"):
        host.faulty(9, schedule)
    with pytest.raises(HostError, match="a misaligned copy"):
        host.faulty(10, schedule)
    # a whole warp may leave before a barrier; the others go on
    if schedule == FORWARD:
        assert host.faulty(6, schedule) == right
    with pytest.raises(HostError, match="a shuffle among some lanes only"):
        host.faulty(7, schedule)
    assert host.faulty(0, schedule) == right


def test_a_missing_barrier_is_seen() -> None:
    """In one of the two orders at least some thread reads what is not there yet."""
    found = [host.faulty(5, schedule) for schedule in (FORWARD, REVERSE)]
    assert found != [float(sum(range(64)))] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=cases.short)
def test_16_bit_numbers(dtype: torch.dtype) -> None:
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    exact = bits.view(dtype).to(torch.float32)
    found = host.from_16_bits(bits, dtype)
    assert torch.equal(found.isnan(), exact.isnan())
    assert torch.equal(found.nan_to_num(7.0).view(torch.int32), exact.nan_to_num(7.0).view(torch.int32))
    finite = exact[exact.isfinite()].sort().values
    middle = (finite[1:].double() + finite[:-1].double()).mul(0.5).to(torch.float32)
    near = torch.cat([middle, middle.nextafter(torch.tensor(torch.inf)), middle.nextafter(torch.tensor(-torch.inf))])
    edge = torch.tensor([65519.99, 65520.0, 65536.0, 3e38, torch.inf, -torch.inf, 0.0, -0.0, 1e-8, -1e-45])
    x = torch.cat([exact[~exact.isnan()], near, edge, torch.randn(1000)]).contiguous()
    rounded = host.to_16_bits(x, dtype)
    assert torch.equal(rounded, x.to(dtype).view(torch.int16))
    assert host.from_16_bits(host.to_16_bits(torch.tensor([torch.nan]), dtype), dtype).isnan().all()


def test_tf32() -> None:
    # 10 digits behind the point; ties away from zero
    one = torch.tensor([1.0, 1 + 2.0**-11, 1 + 2.0**-12, 1 + 3 * 2.0**-11, 2 - 2.0**-12, torch.inf])
    up = torch.tensor([1.0, 1 + 2.0**-10, 1.0, 1 + 4 * 2.0**-11, 2.0, torch.inf])
    assert torch.equal(host.to_tf32(torch.cat([one, -one])), torch.cat([up, -up]))
    assert host.to_tf32(torch.tensor([torch.nan])).isnan().all()


@pytest.mark.slow
@pytest.mark.skipif(host.chosen() is not host.PLAIN, reason="this is that run")
def test_under_the_address_sanitizer() -> None:
    """Reads and writes beyond any buffer, in a process of its own."""
    cxx = host.compiler()
    assert cxx is not None
    # the second one because an exception's interceptor looks it up when the first one starts
    preload = [
        subprocess.run([cxx, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not all(Path(name).is_absolute() for name in preload):
        pytest.skip("the compiler has no shared address sanitizer")
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "FASTMTL_HOST": "sanitized",
    }
    # without capture: what the sanitizer prints when it ends the process
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", __file__, "-m", "not slow"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
