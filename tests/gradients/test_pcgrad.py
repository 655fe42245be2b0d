"""`pcgrad_coefficients`, `pcgrad`, `pcgrad_project`, `random_order`: against the paper's loop, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
from cases import BAD_GRADS, BANK_CASES, FEW_BANKS, FEW_LISTS, LIST_CASES, BadGrads, BankCase, ListCase
from conftest import Backend
from torch import Tensor

from fastmtl.ops import gram, pcgrad, pcgrad_coefficients, pcgrad_project, random_order
from fastmtl.ops.gradients import reference

SMALLEST = {dtype: 2.0**-25 if dtype == torch.float16 else 0.0 for dtype in cases.DTYPES}


def _bounds(bank: Tensor, projected: Tensor, dtypes: list[torch.dtype], slack: float) -> Tensor:
    tolerance = slack * max((cases.PCGRAD_TOLERANCE[d] for d in dtypes), default=0.0)
    return tolerance * cases.pcgrad_scale(bank, projected)


# --- values


@pytest.mark.parametrize("case", BANK_CASES, ids=str)
def test_bank(case: BankCase, level: Backend) -> None:
    grads = case.make()
    before = grads.clone()
    order = cases.random_order(case.num_tasks)
    bank, expected = cases.bank64(case), cases.projected64(case)
    bound = _bounds(bank, expected, [case.dtype], cases.gram_slack(level.name, case))
    unit = cases.unit_roundoff(case.dtype) * 1.001
    smallest = SMALLEST[case.dtype]

    projected = pcgrad_project(grads, order)
    assert projected.dtype == case.dtype
    cases.assert_within(projected, expected, bound + unit * expected.abs() + smallest)
    for reduction, scale in (("sum", 1.0), ("mean", 1.0 / case.num_tasks)):
        update, total = pcgrad(grads, order, reduction=reduction), expected.sum(0) * scale
        assert update.dtype == case.dtype
        cases.assert_within(update, total, bound.sum(0) * scale + unit * total.abs() + smallest)
    assert torch.equal(grads, before)


@pytest.mark.parametrize("case", LIST_CASES, ids=str)
def test_lists(case: ListCase, level: Backend) -> None:
    made = case.make()
    dtypes = [x.dtype for x in cases.tensors_of(made)]
    order = cases.random_order(case.num_tasks)
    bank, expected = cases.bank64(case), cases.projected64(case)
    # conflicts are decided in float32 as soon as one parameter is
    bound = _bounds(bank, expected, dtypes, cases.gram_slack(level.name, case))
    smallest = max((SMALLEST[d] for d in dtypes), default=0.0)

    def check(row: Any, values: Tensor, limit: Tensor) -> None:
        like = [next((r[i] for r in made if r[i] is not None), None) for i in range(len(made[0]))]
        assert isinstance(row, list) and [x is None for x in row] == [x is None for x in like]
        for x, y in zip(like, row, strict=True):
            if x is not None:
                assert (y.dtype, y.shape, y.stride()) == (x.dtype, x.shape, torch.empty_like(x).stride())
        cases.assert_within(cases.flat(row), values, limit + cases.units(row) * values.abs() * 1.001 + smallest)

    rows = pcgrad_project(made, order)
    assert len(rows) == case.num_tasks
    for t, row in enumerate(rows):
        check(row, expected[t], bound[t])
    check(pcgrad(made, order), expected.sum(0), bound.sum(0))
    check(pcgrad(made, order, reduction="mean"), expected.mean(0), bound.mean(0))


@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 5, 9, 17])
def test_equals_the_paper(num_tasks: int, include_self: bool, level: Backend) -> None:
    """Algorithm 1 on the vectors, float64: random orders, with repeated entries, short, and none."""
    for seed in range(4):
        grads = cases.random_gradients(num_tasks, 40, torch.Generator().manual_seed(seed))
        for num_visits in (None, 0, 1, 2 * num_tasks + 1):
            order = cases.random_order(num_tasks, num_visits, seed)
            expected = reference.pcgrad_loop(grads, order, include_self)
            bound = 1e-12 * cases.pcgrad_scale(grads, expected)
            projected = pcgrad_project(grads, order, include_self=include_self)
            cases.assert_within(projected, expected, bound)
            cases.assert_within(pcgrad(grads, order, include_self=include_self), expected.sum(0), bound.sum(0))
            c = pcgrad_coefficients(gram(grads), order, include_self=include_self)
            cases.assert_within(c @ grads, expected, bound)


def test_include_self_matters(level: Backend) -> None:
    """After two projections g_0 points against its own origin: visiting itself then changes it."""
    grads = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [-2.0, -1.0]], dtype=torch.float64)
    order = torch.tensor([[1, 2, 0], [1, 1, 1], [2, 2, 2]])
    plain, own = pcgrad_project(grads, order), pcgrad_project(grads, order, include_self=True)
    for include_self, actual in ((False, plain), (True, own)):
        torch.testing.assert_close(actual, reference.pcgrad_loop(grads, order, include_self))
    assert plain[0] @ grads[0] < 0
    assert not torch.allclose(plain[0], own[0])


@pytest.mark.parametrize("num_tasks", [1, 2, 7, 33, 128])
def test_hard_gram(num_tasks: int, level: Backend) -> None:
    """Norms spread over decades (log-normal, sigma 1.5) on top of a common direction, float64."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        grads = torch.randn(num_tasks, 200, generator=generator, dtype=torch.float64)
        sign = torch.randn(num_tasks, 1, generator=generator, dtype=torch.float64).sign()
        grads = grads + 3 * sign * torch.randn(1, 200, generator=generator, dtype=torch.float64)
        grads = grads * torch.randn(num_tasks, 1, generator=generator, dtype=torch.float64).mul(1.5).exp()
        m, order = grads @ grads.mT, cases.random_order(num_tasks, key=seed)
        c, expected = pcgrad_coefficients(m, order), reference.pcgrad_coefficients(m, order)
        # what g_j adds to g_i has the size of the coefficient times |g_j|
        norms = grads.norm(dim=1)
        size = norms[:, None] * expected.isfinite() + (expected.abs() * norms).amax(1, keepdim=True)
        cases.assert_within(c * norms, expected * norms, cases.COEFFICIENT_TOLERANCE * num_tasks * size)


def test_hard_gradients_float32(level: Backend) -> None:
    generator = torch.Generator().manual_seed(3)
    grads = cases.random_gradients(17, 5000, generator)
    grads = (grads * torch.randn(17, 1, generator=generator, dtype=torch.float64).mul(1.5).exp()).float()
    order = cases.random_order(17)
    expected = reference.pcgrad_loop(grads.double(), order)
    bound = _bounds(grads.double(), expected, [torch.float32], cases.gram_slack(level.name))
    cases.assert_within(pcgrad_project(grads, order), expected, bound)


# --- coefficients


def test_coefficients_form(level: Backend) -> None:
    for dtype in cases.DTYPES:
        m = reference.gram(cases.bank64(BankCase(5, 65, torch.float64))).to(dtype)
        order = cases.random_order(5)
        c = pcgrad_coefficients(m, order)
        assert c.dtype == torch.float64 and c.shape == (5, 5)
        torch.testing.assert_close(c, reference.pcgrad_coefficients(m.double(), order))


def test_order_forms(level: Backend) -> None:
    m = gram(BankCase(5, 65, torch.float64).make())
    order = cases.random_order(5)
    expected = pcgrad_coefficients(m, order)
    wide = torch.full((5, 12), 99)
    wide[:, 1:11:2] = order
    assert torch.equal(pcgrad_coefficients(m, order.to(torch.int32)), expected)
    assert torch.equal(pcgrad_coefficients(m, order.mT.contiguous().mT), expected)
    assert torch.equal(pcgrad_coefficients(m, wide[:, 1:11:2]), expected)
    grads = BankCase(5, 65, torch.float64).make()
    assert torch.equal(pcgrad(grads, order.to(torch.int32)), pcgrad(grads, order))


def test_strided_gram(level: Backend) -> None:
    m = gram(BankCase(5, 65, torch.float64).make())
    # not symmetric, so that rows and columns can't be mixed up
    m = m + torch.randn(5, 5, dtype=torch.float64)
    order = cases.random_order(5)
    expected = reference.pcgrad_coefficients(m, order)
    torch.testing.assert_close(pcgrad_coefficients(m, order), expected)
    torch.testing.assert_close(pcgrad_coefficients(m.mT.contiguous().mT, order), expected)


def test_no_visits_is_identity(level: Backend) -> None:
    order = torch.zeros(3, 0, dtype=torch.int64)
    grads = BankCase(3, 65).make()
    assert torch.equal(pcgrad_coefficients(gram(grads), order), torch.eye(3, dtype=torch.float64))
    assert torch.equal(pcgrad_project(grads, order), grads)


def test_order_of_visits_matters(level: Backend) -> None:
    m = torch.tensor([[1.0, -0.5, -0.6], [-0.5, 1.0, 0.9], [-0.6, 0.9, 1.0]])
    one = pcgrad_coefficients(m, torch.tensor([[1, 2], [0, 2], [0, 1]]))
    two = pcgrad_coefficients(m, torch.tensor([[2, 1], [2, 0], [1, 0]]))
    torch.testing.assert_close(one[0], torch.tensor([1.0, 0.5, 0.15], dtype=torch.float64), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(two[0], torch.tensor([1.0, 0.0, 0.6], dtype=torch.float64), rtol=1e-6, atol=1e-7)


def test_zero_diagonal_is_not_divided_by(level: Backend) -> None:
    m = torch.tensor([[1.0, -0.5], [-0.5, 0.0]])
    c = pcgrad_coefficients(m, torch.tensor([[1], [0]]))
    assert torch.equal(c, torch.tensor([[1.0, 0.0], [0.5, 1.0]], dtype=torch.float64))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_entry_met(value: float, level: Backend) -> None:
    good = torch.tensor([[1.0, -0.5, 0.2], [-0.5, 1.0, 0.1], [0.2, 0.1, 1.0]])
    for at in ((0, 1), (1, 1)):
        m = good.clone()
        m[at] = value
        c = pcgrad_coefficients(m, torch.tensor([[2, 1], [2, 2], [0, 0]]))
        assert torch.isnan(c[0]).all(), at
        assert torch.equal(c[1:], torch.eye(3, dtype=torch.float64)[1:]), at


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_entry_not_met(value: float, level: Backend) -> None:
    """A task never visited, or one whose coefficient is 0, can't reach the row."""
    m = torch.tensor([[1.0, -0.5, 0.2], [-0.5, 1.0, 0.1], [0.2, 0.1, 1.0]])
    m[2, :] = m[:, 2] = value
    c = pcgrad_coefficients(m, torch.tensor([[1, 1], [0, 0], [0, 1]]))
    expected = torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(c[:2], expected)
    assert torch.isnan(c[2]).all()
    m = torch.tensor([[1.0, 0.5, -0.2], [0.5, 1.0, value], [-0.2, 0.1, 1.0]])
    c = pcgrad_coefficients(m, torch.tensor([[1, 2], [0, 0], [0, 1]]))
    assert torch.isfinite(c[0]).all()


def test_non_finite_entries_anywhere(level: Backend) -> None:
    """Many Gram matrices with entries replaced: NaN in the same rows as the oracle, equal values elsewhere."""
    generator = torch.Generator().manual_seed(1)
    seen = 0
    for _ in range(200):
        m = torch.randn(4, 4, generator=generator, dtype=torch.float64)
        m = m @ m.mT
        at = torch.randint(4, (2,), generator=generator).tolist()
        m[at[0], at[1]] = (torch.nan, torch.inf, -torch.inf, 0.0)[int(torch.randint(4, (1,), generator=generator))]
        order = torch.randint(4, (4, 3), generator=generator)
        for include_self in (False, True):
            expected = reference.pcgrad_coefficients(m, order, include_self)
            actual = pcgrad_coefficients(m, order, include_self=include_self)
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10, equal_nan=True)
            seen += int(torch.isnan(expected).any() and not torch.isnan(expected).all())
    assert seen > 20


def test_oracle_turns_a_wrong_order_into_nan() -> None:
    """On a GPU nobody can look at the values first: nothing out of bounds is read, and the row shows it."""
    m = torch.tensor([[1.0, -0.5, 0.2], [-0.5, 1.0, 0.1], [0.2, 0.1, 1.0]], dtype=torch.float64)
    for wrong in (3, -1, 2**40):
        c = reference.pcgrad_coefficients(m, torch.tensor([[1, 2], [0, wrong], [0, 1]]))
        assert torch.isnan(c[1]).all() and torch.isfinite(c[[0, 2]]).all()


# --- gradients that are zero, tiny, huge, not finite


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.short)
def test_all_zero(dtype: torch.dtype, level: Backend) -> None:
    grads = torch.zeros(3, 65, dtype=dtype, requires_grad=True)
    out = pcgrad(grads)
    assert torch.equal(out, torch.zeros(65, dtype=dtype))
    assert torch.equal(pcgrad_project(grads), grads)
    assert torch.equal(pcgrad([[row.detach()] for row in grads])[0], out)
    (grad,) = torch.autograd.grad(out.sum(), grads)
    assert torch.equal(grad, torch.ones_like(grad))


def test_one_zero_task(level: Backend) -> None:
    grads = BankCase(3, 65).make()
    grads[1] = 0
    order = cases.random_order(3)
    rest = torch.tensor([0, 2])
    # visiting the zero task changes nothing
    expected = reference.pcgrad_loop(grads[rest].double(), torch.tensor([[1], [0]]))
    torch.testing.assert_close(pcgrad_project(grads, order)[rest].double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(pcgrad(grads, order)).all()


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e-40), (torch.float64, 1e-310)])
def test_subnormal(dtype: torch.dtype, scale: float, level: Backend) -> None:
    """Their products underflow to zero, so no conflict is seen; the sum stays."""
    grads = (BankCase(3, 65, torch.float64).make() * scale).to(dtype)
    out = pcgrad(grads)
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    torch.testing.assert_close(out, grads.sum(0), rtol=1e-3, atol=4 * smallest)
    assert (out != 0).any()


def test_partly_underflowing(level: Backend) -> None:
    """Products of float32 gradients near 1e-22 keep few bits: whatever is seen, nothing blows up to NaN."""
    out = pcgrad(BankCase(5, 65).make() * 1e-22)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.short)
@pytest.mark.parametrize("scale", [1e25, 1e30])
def test_overflowing_gram_is_never_a_finite_result(dtype: torch.dtype, scale: float, level: Backend) -> None:
    grads = (BankCase(5, 1000).make() * scale).to(dtype)
    order = cases.random_order(5)
    assert not torch.isfinite(pcgrad(grads, order)).any()
    assert not torch.isfinite(pcgrad_project(grads, order)).any()
    assert not torch.isfinite(pcgrad([[row] for row in grads], order)[0]).any()


def test_huge_without_visits_is_right(level: Backend) -> None:
    grads = BankCase(1, 65).make() * 1e30
    assert torch.equal(pcgrad(grads), grads[0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_gradient_shows(value: float, level: Backend) -> None:
    for num_tasks in (1, 2, 5):
        grads = BankCase(num_tasks, 65).make()
        grads[num_tasks - 1, 40] = value
        assert not torch.isfinite(pcgrad(grads)[40])
        lists = [[row[:30], row[30:]] for row in grads]
        assert not torch.isfinite(pcgrad(lists)[1][10])
        assert not torch.isfinite(pcgrad_project(grads)[-1, 40])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=cases.short)
def test_scale_of_gradients_does_not_matter(dtype: torch.dtype, level: Backend) -> None:
    """G and about 1e-6 G give the same direction: no absolute epsilon anywhere. Powers of 2: to the bit."""
    grads = BankCase(9, 1025, dtype).make()
    order = cases.random_order(9)
    scale = 2.0**-20
    assert torch.equal(pcgrad(grads * scale, order), pcgrad(grads, order) * scale)
    assert torch.equal(pcgrad_project(grads * scale, order), pcgrad_project(grads, order) * scale)
    if dtype != torch.bfloat16:
        direction, other = pcgrad(grads, order), pcgrad(grads * 1e-6, order)
        torch.testing.assert_close(other * 1e6, direction, rtol=1e-4, atol=1e-4)


# --- random orders


def test_random_order_is_permutations() -> None:
    for num_tasks in (1, 2, 5, 128):
        order = random_order(num_tasks)
        assert order.dtype == torch.int64
        assert torch.equal(order.sort(dim=1).values, torch.arange(num_tasks).expand(num_tasks, num_tasks))


def test_random_order_is_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.cat([random_order(3, generator=generator) for _ in range(1000)])
    _, counts = rows.unique(dim=0, return_counts=True)
    assert counts.shape == (6,)
    # 3000 rows, 500 each expected, standard deviation 20
    assert (counts - 500).abs().max() < 100


@pytest.mark.parametrize("call", [pcgrad, pcgrad_project])
def test_generator(call: Callable[..., Any], backend: Backend) -> None:
    grads = BankCase(9, 65, torch.float64).make()

    def drawn(seed: int) -> Tensor:
        return call(grads, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(drawn(5), drawn(5))
    assert not torch.equal(drawn(5), drawn(6))
    order = random_order(9, generator=torch.Generator().manual_seed(5))
    assert torch.equal(drawn(5), call(grads, order))


def test_default_generator(backend: Backend) -> None:
    grads = BankCase(9, 65, torch.float64).make()
    torch.manual_seed(7)
    first, second = pcgrad(grads), pcgrad(grads)
    torch.manual_seed(7)
    assert torch.equal(pcgrad(grads), first)
    # a fresh order at each call
    assert not torch.equal(first, second)


def test_generator_goes_on(backend: Backend) -> None:
    grads = BankCase(9, 65, torch.float64).make()
    generator = torch.Generator().manual_seed(5)
    assert not torch.equal(pcgrad(grads, generator=generator), pcgrad(grads, generator=generator))


def test_same_seed_same_order_on_lists(backend: Backend) -> None:
    grads = BankCase(9, 65, torch.float64).make()
    bank = pcgrad(grads, generator=torch.Generator().manual_seed(5))
    lists = pcgrad([[row] for row in grads], generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(lists[0], bank)


# --- determinism


@pytest.mark.parametrize("case", FEW_BANKS + FEW_LISTS, ids=str)
def test_same_bits(case: BankCase | ListCase, level: Backend) -> None:
    grads, order = case.make(), cases.random_order(case.num_tasks)

    def run() -> list[Tensor]:
        update, rows = pcgrad(grads, order), pcgrad_project(grads, order)
        if isinstance(update, Tensor):
            return [update, rows]
        return [x for row in (update, *rows) for x in row if x is not None]

    first = run()
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(first, run(), strict=True))


@pytest.mark.parametrize("case", [BankCase(9, 4097), BankCase(8, 70000, torch.float64), BankCase(33, 1025)], ids=str)
def test_number_of_threads(case: BankCase, level: Backend, threads: None) -> None:
    grads, order = case.make(), cases.random_order(case.num_tasks)
    torch.set_num_threads(1)
    one = pcgrad_project(grads, order)
    torch.set_num_threads(2)
    two = pcgrad_project(grads, order)
    bound = _bounds(cases.bank64(case), one.double(), [case.dtype], cases.gram_slack(level.name))
    cases.assert_within(two, one.double(), bound)


# --- gradients


@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize("num_visits", [None, 7])
def test_gradcheck_coefficients(num_visits: int | None, include_self: bool, backend: Backend) -> None:
    for num_tasks in (1, 2, 4):
        m = gram(cases.random_gradients(num_tasks, 6, torch.Generator().manual_seed(num_tasks))).requires_grad_()
        order = cases.random_order(num_tasks, num_visits)
        assert torch.autograd.gradcheck(lambda g, o=order: pcgrad_coefficients(g, o, include_self=include_self), m)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.short)
def test_gradient_of_coefficients(dtype: torch.dtype, level: Backend) -> None:
    """T = 33: more steps than finite differences can follow; against autograd through the oracle."""
    m = reference.gram(cases.bank64(BankCase(33, 65, torch.float64))).to(dtype).requires_grad_()
    order = cases.random_order(33)
    grad = torch.randn(33, 33, dtype=torch.float64)
    (actual,) = torch.autograd.grad(pcgrad_coefficients(m, order), m, grad)
    assert actual.dtype == dtype
    m64 = m.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(reference.pcgrad_coefficients(m64, order), m64, grad)
    bound = 1e-9 * expected.abs().max() + 1.001 * cases.unit_roundoff(dtype) * expected.abs() + SMALLEST[dtype]
    cases.assert_within(actual, expected, bound.expand_as(expected))


@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        BankCase(1, 3, torch.float64),
        BankCase(4, 5, torch.float64),
        BankCase(3, 4, torch.float64, "transposed_slice"),
        BankCase(2, 0, torch.float64),
    ],
    ids=str,
)
def test_gradcheck_bank(case: BankCase, include_self: bool, backend: Backend) -> None:
    grads, order = case.make().detach().requires_grad_(), cases.random_order(case.num_tasks)
    for reduction in ("sum", "mean"):
        assert torch.autograd.gradcheck(
            lambda g, r=reduction: pcgrad(g, order, reduction=r, include_self=include_self), grads
        )
    assert torch.autograd.gradcheck(lambda g: pcgrad_project(g, order, include_self=include_self), grads)


@pytest.mark.parametrize(
    "shapes",
    [
        [[(3,), (2, 2)], [(3,), (2, 2)]],
        [[(3,), None], [None, (2, 2)], [(3,), (2, 2)]],
        [[None, (2,), None], [None, (2,), ()]],
        [[(0,), (2,)], [(0,), (2,)]],
        [[(2,), ()]],
    ],
    ids=["dense", "nones", "absent", "empty", "one task"],
)
def test_gradcheck_lists(shapes: Any, backend: Backend) -> None:
    generator = cases.generator_of(shapes)
    made: cases.Lists = [
        [None if s is None else torch.randn(s, generator=generator, dtype=torch.float64) for s in row] for row in shapes
    ]
    order = cases.random_order(len(made))
    tensors = [x.requires_grad_() for x in cases.tensors_of(made)]

    def update(*given: Tensor) -> tuple[Tensor, ...]:
        out = pcgrad(cases.with_tensors(made, given), order, reduction="mean")
        return tuple(x for x in out if x is not None)

    def project(*given: Tensor) -> tuple[Tensor, ...]:
        return tuple(x for row in pcgrad_project(cases.with_tensors(made, given), order) for x in row if x is not None)

    assert torch.autograd.gradcheck(update, tensors)
    assert torch.autograd.gradcheck(project, tensors)


# a conflict decided otherwise in float32 would give another gradient altogether: T and P without near ties
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.short)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("num_tasks", [1, 5, 9])
def test_gradient_bank(num_tasks: int, layout: str, dtype: torch.dtype, backend: Backend) -> None:
    case = BankCase(num_tasks, 300, dtype, layout)
    order = cases.random_order(num_tasks)
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}[dtype]
    for call, oracle in ((pcgrad, reference.pcgrad), (pcgrad_project, reference.pcgrad_project)):
        grads = case.make().requires_grad_()
        out = call(grads, order)
        grad_out = torch.randn(out.shape, dtype=torch.float64).to(dtype)
        (actual,) = torch.autograd.grad(out, grads, grad_out)
        leaf = cases.bank64(case).clone().requires_grad_()
        (expected,) = torch.autograd.grad(oracle(leaf, order), leaf, grad_out.double())
        assert actual.dtype == dtype
        cases.assert_within(actual, expected, tolerance * expected.abs().amax(1, keepdim=True).expand_as(expected))


@pytest.mark.parametrize("case", [c for c in FEW_LISTS if c.kind not in ("no_parameter", "all_none")], ids=str)
def test_gradient_lists(case: ListCase, backend: Backend) -> None:
    order = cases.random_order(case.num_tasks)
    for call, oracle in ((pcgrad, reference.pcgrad), (pcgrad_project, reference.pcgrad_project)):
        made = case.make()
        tensors = [x.requires_grad_() for x in cases.tensors_of(made)]
        out = call(made, order)
        columns = [x for row in (out if call is pcgrad_project else [out]) for x in row if x is not None]
        grad_columns = [torch.randn(x.shape).to(x.dtype) for x in columns]
        actual = torch.autograd.grad(columns, tensors, grad_columns)
        leaf = cases.bank64(case).clone().requires_grad_()
        grad_out = cases.flat(grad_columns).reshape(oracle(leaf, order).shape)
        (expected,) = torch.autograd.grad(oracle(leaf, order), leaf, grad_out)
        # the places of the Nones have a gradient in the oracle's bank, which nobody asks for
        like = [next((row[i] for row in made if row[i] is not None), None) for i in range(len(made[0]))]
        for row, bank_row in zip(cases.with_tensors(made, actual), expected, strict=True):
            start = 0
            for x, g in zip(like, row, strict=True):
                if x is None:
                    continue
                part = bank_row[start : start + x.numel()].reshape(x.shape)
                start += x.numel()
                if g is not None:
                    assert g.dtype == x.dtype
                    tolerance = {
                        torch.float64: 1e-11,
                        torch.float32: 1e-4,
                        torch.bfloat16: 1.5e-2,
                        torch.float16: 2e-3,
                    }[g.dtype]
                    cases.assert_within(g, part, (tolerance * expected.abs().max()).expand_as(part))


def test_second_derivative_is_refused(backend: Backend) -> None:
    grads = BankCase(3, 6, torch.float64).make().requires_grad_()
    (first,) = torch.autograd.grad(pcgrad(grads, cases.random_order(3)).square().sum(), grads, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once, not twice"):
        torch.autograd.grad(first.sum(), grads)


# --- compiled graphs


@pytest.mark.parametrize("call", [pcgrad, pcgrad_project])
def test_compile_bank(call: Callable[..., Any], backend: Backend, fresh_compiler: None) -> None:
    order = cases.random_order(5)
    compiled = torch.compile(lambda g: call(g * 1.5, order), fullgraph=True, backend="aot_eager")
    grads = BankCase(5, 65).make().requires_grad_()
    again = grads.detach().clone().requires_grad_()
    out, expected = compiled(grads), call(again * 1.5, order)
    assert torch.equal(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(grads.grad, again.grad)


def test_compile_coefficients(backend: Backend, fresh_compiler: None) -> None:
    m, order = gram(BankCase(5, 65).make()), cases.random_order(5)
    compiled = torch.compile(lambda a: pcgrad_coefficients(a, order), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(m), pcgrad_coefficients(m, order))


def test_compile_random_order(backend: Backend, fresh_compiler: None) -> None:
    """A compiled graph draws a new order at each run, the same as eager mode does from the same seed."""
    grads = BankCase(9, 65, torch.float64).make()
    compiled = torch.compile(lambda g: pcgrad(g), fullgraph=True, backend="aot_eager")
    compiled(grads)
    torch.manual_seed(3)
    first, second = compiled(grads), compiled(grads)
    torch.manual_seed(3)
    assert torch.equal(pcgrad(grads), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("call", [pcgrad, pcgrad_project])
def test_compile_lists(call: Callable[..., Any], backend: Backend, fresh_compiler: None) -> None:
    made, order = ListCase("absent_parameter", 3).make(), cases.random_order(3)

    def function(*tensors: Tensor) -> list[Tensor | None]:
        out = call(cases.with_tensors(made, tensors), order)
        return out if call is pcgrad else [x for row in out for x in row]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    a = [x.clone().requires_grad_() for x in cases.tensors_of(made)]
    b = [x.clone().requires_grad_() for x in cases.tensors_of(made)]
    out, expected = compiled(*a), function(*b)
    assert [x is None for x in out] == [x is None for x in expected]
    pairs = [(x, y) for x, y in zip(out, expected, strict=True) if y is not None]
    assert all(torch.equal(x, y) for x, y in pairs)
    sum(x.square().sum() for x, _ in pairs).backward()
    sum(y.square().sum() for _, y in pairs).backward()
    assert all(torch.equal(x.grad, y.grad) for x, y in zip(a, b, strict=True))


# --- bad input


@pytest.mark.parametrize("call", [pcgrad, pcgrad_project])
@pytest.mark.parametrize("bad", BAD_GRADS, ids=str)
def test_bad_gradients(bad: BadGrads, call: Callable[..., Any], backend: Backend) -> None:
    with pytest.raises(bad.error, match=bad.match):
        call(bad.make())


BAD_ORDERS = [
    ([[0, 1]] * 3, TypeError, r"order: expected a tensor, got list"),
    (torch.zeros(3, 2), TypeError, r"order: expected int32 or int64, got torch.float32"),
    (torch.zeros(3, 2, dtype=torch.int16), TypeError, r"order: expected int32 or int64, got torch.int16"),
    (torch.zeros(3, 2, dtype=torch.bool), TypeError, r"order: expected int32 or int64, got torch.bool"),
    (torch.zeros(3, dtype=torch.int64), ValueError, r"order: expected shape \[3, K\] for 3 tasks, got \[3\]"),
    (torch.zeros(2, 3, dtype=torch.int64), ValueError, r"order: expected shape \[3, K\] for 3 tasks, got \[2, 3\]"),
    (torch.zeros(3, 2, dtype=torch.int64, device="meta"), ValueError, r"order: expected device cpu, got meta"),
    (torch.tensor([[0, 1], [0, 3], [0, 1]]), ValueError, r"order: expected entries in 0\.\.2, got 0\.\.3"),
    (torch.tensor([[0, 1], [0, -1], [0, 1]]), ValueError, r"order: expected entries in 0\.\.2, got -1\.\.1"),
    (
        torch.tensor([[0, 1], [0, 2**40], [0, 1]]),
        ValueError,
        r"order: expected entries in 0\.\.2, got 0\.\.1099511627776",
    ),
    (torch.tensor([[0], [3], [1]], dtype=torch.int32), ValueError, r"order: expected entries in 0\.\.2, got 0\.\.3"),
]
ON_ORDERS: dict[str, Callable[[Any], Any]] = {
    "coefficients": lambda order: pcgrad_coefficients(torch.eye(3), order),
    "pcgrad": lambda order: pcgrad(torch.ones(3, 4), order),
    "pcgrad lists": lambda order: pcgrad([[torch.ones(4)]] * 3, order),
    "project": lambda order: pcgrad_project(torch.ones(3, 4), order),
    "project lists": lambda order: pcgrad_project([[torch.ones(4)]] * 3, order),
}


@pytest.mark.parametrize("call", ON_ORDERS.values(), ids=ON_ORDERS)
@pytest.mark.parametrize(("order", "error", "match"), BAD_ORDERS, ids=range(len(BAD_ORDERS)))
def test_bad_order(order: Any, error: type[Exception], match: str, call: Callable[..., Any], backend: Backend) -> None:
    with pytest.raises(error, match=match):
        call(order)


def test_order_without_any_gradient_is_checked(backend: Backend) -> None:
    with pytest.raises(ValueError, match=r"entries in 0\.\.1, got 0\.\.5"):
        pcgrad([[None], [None]], torch.tensor([[0], [5]]))


@pytest.mark.parametrize(
    ("m", "error", "match"),
    [
        ([[1.0]], TypeError, r"gram: expected a tensor, got list"),
        (torch.eye(3, dtype=torch.int64), TypeError, r"gram: expected a floating-point tensor, got torch.int64"),
        (
            torch.eye(3, dtype=torch.complex64),
            TypeError,
            r"gram: expected a floating-point tensor, got torch.complex64",
        ),
        (torch.ones(3, 4), ValueError, r"gram: expected a square \[T, T\] matrix, got shape \[3, 4\]"),
        (torch.ones(3), ValueError, r"gram: expected a square \[T, T\] matrix, got shape \[3\]"),
        (torch.ones(1, 3, 3), ValueError, r"gram: expected a square \[T, T\] matrix, got shape \[1, 3, 3\]"),
        (torch.ones(0, 0), ValueError, r"gram: expected 1 to 128 tasks, got 0"),
        (torch.ones(129, 129), ValueError, r"gram: expected 1 to 128 tasks, got 129"),
    ],
    ids=["list", "int64", "complex", "3x4", "1-d", "3-d", "T=0", "T=129"],
)
def test_bad_gram(m: Any, error: type[Exception], match: str, backend: Backend) -> None:
    with pytest.raises(error, match=match):
        pcgrad_coefficients(m, torch.zeros(3, 2, dtype=torch.int64))


@pytest.mark.parametrize("reduction", ["max", "", None, "SUM"])
def test_bad_reduction(reduction: Any, backend: Backend) -> None:
    with pytest.raises(ValueError, match=rf"reduction: expected 'sum' or 'mean', got {reduction!r}"):
        pcgrad(torch.ones(3, 4), reduction=reduction)


@pytest.mark.parametrize("num_tasks", [0, -1, 129])
def test_bad_num_tasks(num_tasks: int) -> None:
    with pytest.raises(ValueError, match=rf"num_tasks: expected 1 to 128 tasks, got {num_tasks}"):
        random_order(num_tasks)
