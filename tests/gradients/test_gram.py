"""`gram`: values, gradients, determinism and bad input, on every backend and CPU level."""

from __future__ import annotations

from typing import Any

import cases
import numpy as np
import pytest
import torch
from cases import BAD_GRADS, BANK_CASES, FEW_BANKS, FEW_LISTS, LIST_CASES, BadGrads, BankCase, ListCase
from conftest import Backend
from torch import Tensor

from fastmtl.ops import gram
from fastmtl.ops.gradients import reference


@pytest.mark.parametrize("case", BANK_CASES, ids=str)
def test_bank(case: BankCase, level: Backend) -> None:
    grads = case.make()
    before = grads.clone()
    m = gram(grads)
    cases.assert_gram(m, cases.bank64(case), [case.dtype], cases.gram_slack(level.name, case))
    assert torch.equal(m, m.mT)
    assert torch.equal(grads, before)


@pytest.mark.parametrize("case", LIST_CASES, ids=str)
def test_lists(case: ListCase, level: Backend) -> None:
    lists = case.make()
    m = gram(lists)
    assert m.shape == (case.num_tasks, case.num_tasks)
    cases.assert_gram(m, cases.bank64(case), [x.dtype for x in cases.tensors_of(lists)], cases.gram_slack(level.name))
    assert torch.equal(m, m.mT)


@pytest.mark.parametrize("num_tasks", range(1, 41))
def test_every_number_of_tasks(num_tasks: int, level: Backend) -> None:
    """Register tiles end at every remainder of T, vectors at every remainder of P."""
    slack = cases.gram_slack(level.name)
    for num_columns in range(1, 36, 3 if num_tasks > 8 else 1):
        case = BankCase(num_tasks, num_columns)
        cases.assert_gram(gram(case.make()), cases.bank64(case), [case.dtype], slack)


def test_lists_equal_bank(level: Backend) -> None:
    """A bank cut into parameters has the same Gram matrix, up to the order of summation."""
    grads = BankCase(5, 4097, torch.float64).make()
    lists = [list(row.split([1, 63, 0, 1024, 3009])) for row in grads]
    cases.assert_gram(gram(lists), grads, [torch.float64], cases.gram_slack(level.name))


def test_tuples_are_lists(backend: Backend) -> None:
    x, y = BankCase(2, 3).make()
    assert torch.equal(gram(((x,), (y,))), gram([[x], [y]]))


def test_requires_no_grad_by_default(backend: Backend) -> None:
    assert not gram(BankCase(2, 3).make()).requires_grad


# --- sums


def test_long_sum_of_ones_is_exact(level: Backend) -> None:
    """More than 2**25 ones: a plain float32 sum stops at 2**24."""
    n = 2**25 + 4
    if level.name == "reference":
        pytest.skip("the reference sums as its matrix product does")
    assert gram(torch.ones(1, 1).expand(1, n)).item() == n


def test_one_huge_column(level: Backend) -> None:
    """A column of size 1e4 next to 70000 small ones: what is summed in float32 must be short."""
    grads = BankCase(3, 70000).make()
    grads[:, 17] *= 1e4
    slack = cases.gram_slack(level.name) * cases.BIASED_SLACK
    cases.assert_gram(gram(grads), grads.double(), [torch.float32], slack)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.short)
def test_overflow_is_never_finite(dtype: torch.dtype, level: Backend) -> None:
    for num_columns in (1, 7, 64, 5000):
        grads = (BankCase(5, num_columns).make() * 1e30).to(dtype)
        m = gram(grads)
        out_of_range = reference.gram(grads.double()).abs() > torch.finfo(torch.float32).max
        assert out_of_range.diagonal().all()
        assert not torch.isfinite(m[out_of_range]).any()


def test_one_overflowing_task_leaves_the_others(level: Backend) -> None:
    grads = BankCase(5, 1000).make()
    grads[2] *= 1e30
    m = gram(grads)
    assert torch.isinf(m[2, 2])
    rest = torch.tensor([0, 1, 3, 4])
    cases.assert_gram(m[rest][:, rest], grads[rest].double(), [torch.float32], cases.gram_slack(level.name))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("num_columns", [1, 65, 2049])
def test_non_finite_shows_in_its_row_only(value: float, num_columns: int, level: Backend) -> None:
    for column in {0, num_columns // 2, num_columns - 1}:
        grads = BankCase(9, num_columns).make()
        grads[4, column] = value
        m = gram(grads)
        assert not torch.isfinite(m[4]).any() and not torch.isfinite(m[:, 4]).any()
        rest = torch.arange(9) != 4
        assert torch.isfinite(m[rest][:, rest]).all()


def test_float64_tiny_and_huge(level: Backend) -> None:
    grads = BankCase(5, 100, torch.float64).make()
    for scale in (2.0**-400, 2.0**400):
        assert torch.equal(gram(grads * scale), gram(grads) * scale**2)


def test_subnormal(level: Backend) -> None:
    m = gram(torch.full((3, 100), 1e-40))
    assert torch.equal(m, torch.zeros(3, 3))


# --- more than 2**31 elements


def test_row_stride_beyond_32_bits(level: Backend) -> None:
    """Rows 2**31 elements apart; pages never written take no memory."""
    stride, columns = 2**31 + 8, 100
    # numpy: torch.empty would be filled with NaN here, see `poisoned_memory`
    flat = torch.from_numpy(np.empty(stride + columns, np.float16))
    grads = flat.as_strided((2, columns), (stride, 1))
    grads.copy_(BankCase(2, columns, torch.float16).make())
    cases.assert_gram(gram(grads), grads.double(), [torch.float16], cases.gram_slack(level.name))
    cases.assert_gram(gram([[grads[0]], [grads[1]]]), grads.double(), [torch.float16], cases.gram_slack(level.name))


def test_column_stride_beyond_32_bits(level: Backend) -> None:
    stride = 2**30 + 4
    flat = torch.from_numpy(np.empty(2 * stride + 2, np.float16))
    grads = flat.as_strided((2, 3), (1, stride))
    grads.copy_(BankCase(2, 3, torch.float16).make())
    cases.assert_gram(gram(grads), grads.double(), [torch.float16], cases.gram_slack(level.name))


@pytest.mark.slow
def test_more_than_2_31_elements(backend: Backend) -> None:
    if backend.name == "reference":
        pytest.skip("the reference would copy the expanded rows")
    n = 2**31 + 5
    m = gram(torch.full((1, 1), 1.0, dtype=torch.float16).expand(1, n))
    assert m.item() == torch.tensor(float(n), dtype=torch.float32).item()


# --- determinism


@pytest.mark.parametrize("case", FEW_BANKS + FEW_LISTS, ids=str)
def test_same_bits(case: BankCase | ListCase, level: Backend) -> None:
    grads = case.make()
    first = gram(grads)
    assert all(torch.equal(first, gram(grads)) for _ in range(3))


@pytest.mark.parametrize(
    "case",
    [*FEW_BANKS, *FEW_LISTS, BankCase(3, 70000), BankCase(33, 70000), ListCase("large", 5), ListCase("many", 8)],
    ids=str,
)
def test_number_of_threads(case: BankCase | ListCase, level: Backend, threads: None) -> None:
    grads = case.make()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(gram(grads))
    for other in results[1:]:
        if level.name == "reference":
            size = cases.double(grads).norm(dim=1)
            cases.assert_within(other, results[0].double(), 1e-5 * size[:, None] * size)
        else:
            assert torch.equal(other, results[0])


# --- gradients


def _list_function(lists: cases.Lists) -> Any:
    return lambda *tensors: gram(cases.with_tensors(lists, tensors))


GRADCHECK_BANKS = [
    BankCase(1, 3, torch.float64),
    BankCase(4, 5, torch.float64),
    BankCase(3, 4, torch.float64, "transposed_slice"),
    BankCase(2, 0, torch.float64),
]
GRADCHECK_LISTS: dict[str, list[list[tuple[int, ...] | None]]] = {
    "dense": [[(3,), (2, 2)], [(3,), (2, 2)]],
    "nones": [[(3,), None], [None, (2, 2)], [(3,), (2, 2)]],
    "absent": [[None, (2,), None], [None, (2,), ()]],
    "empty": [[(0,), (2,)], [(0,), (2,)]],
    "one task": [[(2,), ()]],
}


def lists_of_shapes(shapes: list[list[tuple[int, ...] | None]]) -> cases.Lists:
    generator = cases.generator_of(shapes)
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64, "requires_grad": True}
    return [[None if s is None else torch.randn(s, **options) for s in row] for row in shapes]


@pytest.mark.parametrize("case", GRADCHECK_BANKS, ids=str)
def test_gradcheck_bank(case: BankCase, backend: Backend) -> None:
    grads = case.make().detach().requires_grad_()
    assert torch.autograd.gradcheck(gram, grads)
    assert torch.autograd.gradgradcheck(gram, grads)


def test_gradcheck_expanded(backend: Backend) -> None:
    row = torch.randn(1, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gram(x.expand(3, 4)), row)
    assert torch.autograd.gradgradcheck(lambda x: gram(x.expand(3, 4)), row)


@pytest.mark.parametrize("shapes", GRADCHECK_LISTS.values(), ids=GRADCHECK_LISTS)
def test_gradcheck_lists(shapes: Any, backend: Backend) -> None:
    lists = lists_of_shapes(shapes)
    tensors = cases.tensors_of(lists)
    assert torch.autograd.gradcheck(_list_function(lists), tensors)
    assert torch.autograd.gradgradcheck(_list_function(lists), tensors)


def _assert_gradient(actual: Tensor, bank: Tensor, grad_out: Tensor, unit: Tensor | float) -> None:
    """d<grad_out, M>/dG = (grad_out + grad_out^T) G."""
    m = grad_out.double() + grad_out.double().mT
    leaf = bank.clone().requires_grad_()
    (expected,) = torch.autograd.grad(reference.gram(leaf), leaf, grad_out.double())
    torch.testing.assert_close(expected, m @ bank)
    cases.assert_combine(actual, m, bank, unit, tolerance=1e-6, smallest=2.0**-25)


@pytest.mark.parametrize(
    "case",
    [BankCase(5, 65, dtype, layout) for dtype in cases.DTYPES for layout in ("contiguous", "transposed", "step2")]
    + [BankCase(33, 1025), BankCase(128, 3), BankCase(3, 0)],
    ids=str,
)
def test_gradient_bank(case: BankCase, backend: Backend) -> None:
    grads = case.make().requires_grad_()
    m = gram(grads)
    grad_out = cases.random_weights(m.shape, m.dtype)
    (actual,) = torch.autograd.grad(m, grads, grad_out)
    assert actual.dtype == grads.dtype
    _assert_gradient(actual, cases.bank64(case), grad_out, cases.unit_roundoff(case.dtype))


@pytest.mark.parametrize("case", [*FEW_LISTS, ListCase("scalars", 5), ListCase("nones", 33)], ids=str)
def test_gradient_lists(case: ListCase, backend: Backend) -> None:
    made = case.make()
    tensors = [x.requires_grad_() for x in cases.tensors_of(made)]
    m = gram(made)
    if not tensors:
        assert not m.requires_grad
        return
    grad_out = cases.random_weights(m.shape, m.dtype)
    actual = torch.autograd.grad(m, tensors, grad_out)
    for x, g in zip(tensors, actual, strict=True):
        assert g.dtype == x.dtype and g.shape == x.shape
    # what a None would have got is not asked for: compare task by task, with those places put in
    rows = cases.with_tensors(made, actual)
    bank = cases.bank64(case)
    w = grad_out.double() + grad_out.double().mT
    like = [next((r[i] for r in made if r[i] is not None), None) for i in range(len(made[0]))]
    for t, row in enumerate(rows):
        here = torch.cat(
            [torch.full((x.numel(),), g is not None) for x, g in zip(like, row, strict=True) if x is not None]
        )
        cases.assert_combine(cases.flat(row), w[t], bank[:, here], cases.units(row), 1e-6, smallest=2.0**-25)


def test_only_some_need_a_gradient(backend: Backend) -> None:
    lists = lists_of_shapes([[(3,), (2,)], [(3,), (2,)]])
    lists[0][1] = lists[0][1].detach()
    wanted = [lists[0][0], lists[1][1]]
    grads = torch.autograd.grad(gram(lists).sum(), wanted)
    everything = lists_of_shapes([[(3,), (2,)], [(3,), (2,)]])
    expected = torch.autograd.grad(gram(everything).sum(), [everything[0][0], everything[1][1]])
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b)


# --- compiled graphs


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_bank(backend: Backend, fresh_compiler: None, dynamic: bool) -> None:
    compiled = torch.compile(lambda g: gram(g * 1.5), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for case in (BankCase(3, 31), BankCase(5, 65)):
        grads = case.make().requires_grad_()
        again = grads.detach().clone().requires_grad_()
        m, expected = compiled(grads), gram(again * 1.5)
        assert torch.equal(m, expected)
        m.square().sum().backward()
        expected.square().sum().backward()
        assert torch.equal(grads.grad, again.grad)


def test_compile_lists(backend: Backend, fresh_compiler: None) -> None:
    lists = ListCase("nones", 3).make()
    compiled = torch.compile(_list_function(lists), fullgraph=True, backend="aot_eager")
    a = [x.clone().requires_grad_() for x in cases.tensors_of(lists)]
    b = [x.clone().requires_grad_() for x in cases.tensors_of(lists)]
    m, expected = compiled(*a), _list_function(lists)(*b)
    assert torch.equal(m, expected)
    m.square().sum().backward()
    expected.square().sum().backward()
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.grad, y.grad)


# --- bad input


@pytest.mark.parametrize("bad", BAD_GRADS, ids=str)
def test_bad_input(bad: BadGrads, backend: Backend) -> None:
    with pytest.raises(bad.error, match=bad.match):
        gram(bad.make())


def test_op_itself_checks_a_bank(backend: Backend) -> None:
    """`torch.ops` is public too: a kernel never sees what it can't read."""
    with pytest.raises(ValueError, match="expected 1 to 128 tasks, got 129"):
        torch.ops.fastmtl.gram(torch.ones(129, 2))
    with pytest.raises(TypeError, match=r"torch\.int64"):
        torch.ops.fastmtl.gram(torch.ones(3, 2, dtype=torch.int64))
