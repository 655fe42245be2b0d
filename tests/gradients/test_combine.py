"""`combine`: values, layouts, gradients, determinism and bad input, on every backend and CPU level."""

from __future__ import annotations

from typing import Any

import cases
import numpy as np
import pytest
import torch
from cases import BAD_GRADS, BANK_CASES, FEW_BANKS, FEW_LISTS, LIST_CASES, BadGrads, BankCase, ListCase
from conftest import Backend
from torch import Tensor

import fastmtl
from fastmtl import ops
from fastmtl.core import dispatch
from fastmtl.ops import combine
from fastmtl.ops.gradients import reference

# the smallest float16 is 2**-24: below it a result is rounded by half of that
SMALLEST = {dtype: 2.0**-25 if dtype == torch.float16 else 0.0 for dtype in cases.DTYPES}


def _assert_combined(actual: Tensor, weights: Tensor, bank: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    unit, tolerance = cases.unit_roundoff(dtype), cases.COMBINE_TOLERANCE[dtype]
    cases.assert_combine(actual, weights, bank, unit, tolerance, SMALLEST[dtype])


@pytest.mark.parametrize("case", BANK_CASES, ids=str)
def test_bank(case: BankCase, level: Backend) -> None:
    grads = case.make()
    before = grads.clone()
    for shape in ((case.num_tasks,), (3, case.num_tasks)):
        weights = cases.random_weights(shape)
        _assert_combined(combine(weights, grads), weights, cases.bank64(case), case.dtype)
    assert torch.equal(grads, before)


def _assert_lists(made: cases.Lists, results: Any, weights: Tensor, bank: Tensor) -> None:
    """Each list of results: its values, and per parameter the dtype, shape and strides of its first gradient."""
    like = [next((row[i] for row in made if row[i] is not None), None) for i in range(len(made[0]))]
    rows = [results] if weights.dim() == 1 else results
    for w, row in zip(weights.reshape(-1, weights.shape[-1]), rows, strict=True):
        assert isinstance(row, list)
        for x, y in zip(like, row, strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                assert (y.dtype, y.shape, y.stride()) == (x.dtype, x.shape, torch.empty_like(x).stride())
        # parameters of several dtypes in one case: float32 accumulation is the least that is promised
        dtypes = [x.dtype for x in like if x is not None]
        tolerance = max((cases.COMBINE_TOLERANCE[d] for d in dtypes), default=0.0)
        smallest = max((SMALLEST[d] for d in dtypes), default=0.0)
        cases.assert_combine(cases.flat(row), w, bank, cases.units(row), tolerance, smallest)


@pytest.mark.parametrize("case", LIST_CASES, ids=str)
def test_lists(case: ListCase, level: Backend) -> None:
    made = case.make()
    for shape in ((case.num_tasks,), (2, case.num_tasks)):
        weights = cases.random_weights(shape)
        _assert_lists(made, combine(weights, made), weights, cases.bank64(case))


@pytest.mark.parametrize("num_tasks", range(1, 41))
def test_every_number_of_tasks(num_tasks: int, level: Backend) -> None:
    """Groups of tasks end at every remainder of T, vectors at every remainder of P."""
    for num_columns in range(1, 36, 3 if num_tasks > 8 else 1):
        case = BankCase(num_tasks, num_columns)
        weights = cases.random_weights((num_tasks,))
        _assert_combined(combine(weights, case.make()), weights, cases.bank64(case), case.dtype)


@pytest.mark.parametrize("num_rows", [0, 1, 2, 4, 5, 7, 17, 128, 130])
def test_number_of_sums(num_rows: int, level: Backend) -> None:
    for case in (BankCase(5, 65), BankCase(17, 1025, torch.bfloat16), BankCase(3, 0)):
        weights = cases.random_weights((num_rows, case.num_tasks))
        out = combine(weights, case.make())
        assert out.shape == (num_rows, case.num_columns)
        _assert_combined(out, weights, cases.bank64(case), case.dtype)
    made = ListCase("nones", 3)
    weights = cases.random_weights((num_rows, 3))
    out_lists = combine(weights, made.make())
    assert len(out_lists) == num_rows
    _assert_lists(made.make(), out_lists, weights, cases.bank64(made))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.short)
def test_dtype_of_weights(dtype: torch.dtype, level: Backend) -> None:
    """The result has the dtype of the gradients, whatever that of the weights."""
    for case in (BankCase(5, 65, torch.float64), BankCase(5, 65), BankCase(5, 65, torch.bfloat16)):
        weights = cases.random_weights((5,), dtype)
        out = combine(weights, case.make())
        _assert_combined(out, weights, cases.bank64(case), case.dtype)


def test_strided_weights(level: Backend) -> None:
    case = BankCase(5, 65)
    wide = torch.full((7, 10), torch.nan)
    for view in (wide[1:6, 2], wide[3, ::2], wide[:3, 1:6], wide[1:6, 1:5].mT):
        view.copy_(cases.random_weights(view.shape))
        _assert_combined(combine(view, case.make()), view, cases.bank64(case), case.dtype)


def test_result_is_new_memory(level: Backend) -> None:
    grads = BankCase(1, 8).make()
    out = combine(torch.ones(1), grads)
    assert torch.equal(out, grads[0]) and out.data_ptr() != grads.data_ptr()
    column = combine(torch.ones(1, 1), [[grads[0]]])[0][0]
    assert torch.equal(column, grads[0]) and column.data_ptr() != grads.data_ptr()


def test_empty_tensor_with_any_strides(level: Backend) -> None:
    """`sum().backward()` hands over an expanded gradient: of an empty tensor too, with every stride 0."""
    empty = torch.ones(()).expand(3, 0, 2)
    out = combine(torch.ones(2), [[empty, torch.ones(2)], [empty, torch.ones(2)]])
    assert out[0].shape == (3, 0, 2) and torch.equal(out[1], torch.full((2,), 2.0))
    made = [[torch.ones(3, 0, 2, requires_grad=True), torch.ones(2, requires_grad=True)] for _ in range(2)]
    sum(x.sum() for x in combine(torch.ones(2), made)).backward()
    assert made[1][0].grad.shape == (3, 0, 2) and torch.equal(made[1][1].grad, torch.ones(2))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_zero_weight_is_not_skipped(value: float, level: Backend) -> None:
    for num_columns in (1, 65, 2049):
        grads = BankCase(3, num_columns).make()
        grads[1, num_columns // 2] = value
        out = combine(torch.tensor([1.0, 0.0, 1.0]), grads)
        assert torch.isnan(out[num_columns // 2])
        assert torch.isfinite(out).sum() == num_columns - 1
        columns = combine(torch.tensor([1.0, 0.0, 1.0]), [[row] for row in grads])
        assert torch.equal(columns[0], out) or torch.isnan(columns[0][num_columns // 2])


def test_non_finite_weight_shows(level: Backend) -> None:
    grads = BankCase(3, 65).make()
    assert torch.isnan(combine(torch.tensor([1.0, torch.nan, 0.0]), grads)).all()
    assert not torch.isfinite(combine(torch.tensor([1.0, torch.inf, 0.0]), grads)).any()


def test_overflow_of_the_result(level: Backend) -> None:
    grads = torch.full((2, 65), 3e38)
    assert torch.isinf(combine(torch.ones(2), grads)).all()
    half = torch.full((2, 65), 60000.0, dtype=torch.float16)
    assert torch.isinf(combine(torch.ones(2), half)).all()
    # float32 accumulation: the partial sum is beyond float16, the result is not
    assert torch.equal(combine(torch.tensor([1.0, 1.0, -1.0]), torch.cat([half, half[:1]])), half[0])


def test_subnormal_gradients_stay(level: Backend) -> None:
    grads = torch.full((3, 65), 1e-40)
    torch.testing.assert_close(combine(torch.ones(3), grads), torch.full((65,), 3e-40), rtol=1e-4, atol=0)


def test_row_stride_beyond_32_bits(level: Backend) -> None:
    stride, columns = 2**31 + 8, 100
    # numpy: torch.empty would be filled with NaN here; pages never written take no memory
    flat = torch.from_numpy(np.empty(stride + columns, np.float16))
    grads = flat.as_strided((2, columns), (stride, 1))
    grads.copy_(BankCase(2, columns, torch.float16).make())
    for weights in (cases.random_weights((2,)), cases.random_weights((3, 2))):
        _assert_combined(combine(weights, grads), weights, grads.double(), torch.float16)


# --- determinism


def _columns(out: Any) -> list[Tensor]:
    """The tensors of a result, in order."""
    if isinstance(out, Tensor):
        return [out]
    return [x for row in out for x in (row if isinstance(row, list) else [row]) if x is not None]


@pytest.mark.parametrize("case", FEW_BANKS + FEW_LISTS, ids=str)
def test_same_bits(case: BankCase | ListCase, level: Backend) -> None:
    grads = case.make()
    for weights in (cases.random_weights((case.num_tasks,)), cases.random_weights((3, case.num_tasks))):
        first = _columns(combine(weights, grads))
        for _ in range(3):
            again = _columns(combine(weights, grads))
            assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("case", [*FEW_BANKS, *FEW_LISTS, BankCase(8, 70000), ListCase("large", 5)], ids=str)
def test_number_of_threads(case: BankCase | ListCase, level: Backend, threads: None) -> None:
    grads = case.make()
    for weights in (cases.random_weights((case.num_tasks,)), cases.random_weights((3, case.num_tasks))):
        torch.set_num_threads(1)
        one = _columns(combine(weights, grads))
        torch.set_num_threads(2)
        two = _columns(combine(weights, grads))
        size = (weights.abs() @ cases.bank64(case).abs()).reshape(-1)
        # two results that are each rounded once may end on two sides of a rounding boundary
        bound = 1e-6 * size + 2 * cases.units(one) * cases.flat(one).abs()
        cases.assert_within(cases.flat(two), cases.flat(one), bound)


# --- gradients


def _weights64(*shape: int) -> Tensor:
    return cases.random_weights(shape).requires_grad_()


@pytest.mark.parametrize("num_rows", [None, 1, 3])
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
def test_gradcheck_bank(case: BankCase, num_rows: int | None, backend: Backend) -> None:
    grads = case.make().detach().requires_grad_()
    weights = _weights64(case.num_tasks) if num_rows is None else _weights64(num_rows, case.num_tasks)
    assert torch.autograd.gradcheck(combine, (weights, grads))
    assert torch.autograd.gradgradcheck(combine, (weights, grads))


@pytest.mark.parametrize("num_rows", [None, 2])
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
def test_gradcheck_lists(shapes: Any, num_rows: int | None, backend: Backend) -> None:
    generator = cases.generator_of(shapes)
    made: cases.Lists = [
        [None if s is None else torch.randn(s, generator=generator, dtype=torch.float64) for s in row] for row in shapes
    ]
    weights = _weights64(len(made)) if num_rows is None else _weights64(num_rows, len(made))
    tensors = [x.requires_grad_() for x in cases.tensors_of(made)]

    def function(w: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        out = combine(w, cases.with_tensors(made, given))
        rows = [out] if w.dim() == 1 else out
        return tuple(x for row in rows for x in row if x is not None)

    assert torch.autograd.gradcheck(function, (weights, *tensors))
    assert torch.autograd.gradgradcheck(function, (weights, *tensors))


@pytest.mark.parametrize("num_rows", [None, 0, 3, 130])
@pytest.mark.parametrize(
    "case",
    [BankCase(5, 65, dtype, layout) for dtype in cases.DTYPES for layout in ("contiguous", "transposed")]
    + [BankCase(33, 1025), BankCase(128, 3), BankCase(3, 0)],
    ids=str,
)
def test_gradient_bank(case: BankCase, num_rows: int | None, backend: Backend) -> None:
    """Against the float64 oracle's gradient; 130 sums are more than one combine takes on the way back."""
    grads = case.make().requires_grad_()
    shape = (case.num_tasks,) if num_rows is None else (num_rows, case.num_tasks)
    weights = cases.random_weights(shape, torch.float32).requires_grad_()
    out = combine(weights, grads)
    grad_out = cases.random_gradients(1 if num_rows is None else num_rows, case.num_columns, cases.generator_of(case))
    grad_out = grad_out.reshape(out.shape).to(out.dtype)
    d_weights, d_grads = torch.autograd.grad(out, (weights, grads), grad_out)
    assert (d_weights.dtype, d_grads.dtype) == (torch.float32, case.dtype)
    w64 = weights.detach().double().requires_grad_()
    g64 = cases.bank64(case).clone().requires_grad_()
    e_weights, e_grads = torch.autograd.grad(reference.combine(w64, g64), (w64, g64), grad_out.double())
    left = grad_out.double().reshape(1 if num_rows is None else num_rows, case.num_columns)
    rows = w64.detach().reshape(-1, case.num_tasks)
    size = (left.norm(dim=1)[:, None] * cases.bank64(case).norm(dim=1)).reshape(shape)
    cases.assert_within(d_weights, e_weights, 5e-5 * size)
    # each part of at most 128 sums is rounded, and so is their total
    parts = 1 if (num_rows or 1) <= 128 else 3
    scale = rows.abs().mT @ left.abs()
    bound = 1e-6 * scale + parts * cases.unit_roundoff(case.dtype) * (scale if parts > 1 else e_grads.abs()) * 1.001
    cases.assert_within(d_grads, e_grads, bound + SMALLEST[case.dtype])


@pytest.mark.parametrize("num_rows", [None, 2, 130])
@pytest.mark.parametrize("case", [c for c in FEW_LISTS if c.kind not in ("no_parameter", "all_none")], ids=str)
def test_gradient_lists(case: ListCase, num_rows: int | None, backend: Backend) -> None:
    made = case.make()
    tensors = [x.requires_grad_() for x in cases.tensors_of(made)]
    shape = (case.num_tasks,) if num_rows is None else (num_rows, case.num_tasks)
    weights = cases.random_weights(shape).requires_grad_()
    out = combine(weights, made)
    columns = [x for row in ([out] if num_rows is None else out) for x in row if x is not None]
    generator = cases.generator_of(case)
    grad_columns = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in columns]
    d_weights, *d_tensors = torch.autograd.grad(columns, (weights, *tensors), grad_columns)
    # the same through plain torch in float64, tensor by tensor
    w64 = weights.detach().clone().requires_grad_()
    t64 = [x.detach().double().requires_grad_() for x in tensors]
    again = cases.with_tensors(made, t64)
    expected_columns = [
        sum(w[t] * row[i] for t, row in enumerate(again) if row[i] is not None)
        for w in w64.reshape(-1, case.num_tasks)
        for i in range(len(made[0]))
        if any(row[i] is not None for row in made)
    ]
    e_weights, *e_tensors = torch.autograd.grad(expected_columns, (w64, *t64), [x.double() for x in grad_columns])
    torch.testing.assert_close(d_weights, e_weights, rtol=1e-4, atol=1e-3)
    for a, e in zip(d_tensors, e_tensors, strict=True):
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[a.dtype]
        scale = weights.detach().abs().sum() / case.num_tasks
        torch.testing.assert_close(a.double(), e, rtol=tolerance, atol=tolerance * scale.item())


def test_unused_results_get_no_gradient(backend: Backend) -> None:
    made = [[torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)] for _ in range(2)]
    out = combine(torch.tensor([2.0, 3.0]), made)
    out[0].sum().backward()
    assert torch.equal(made[1][0].grad, torch.full((3,), 3.0))
    assert made[1][1].grad is None or torch.equal(made[1][1].grad, torch.zeros(2))


# --- compiled graphs


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_compile_bank(shape: tuple[int, ...], backend: Backend, fresh_compiler: None) -> None:
    compiled = torch.compile(lambda w, g: combine(w * 2, g), fullgraph=True, backend="aot_eager")
    made = [(cases.random_weights(shape, torch.float32), BankCase(3, 31).make()) for _ in range(2)]
    (w, g), (v, h) = [[x.requires_grad_() for x in pair] for pair in made]
    out, expected = compiled(w, g), combine(v * 2, h)
    assert torch.equal(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(w.grad, v.grad) and torch.equal(g.grad, h.grad)


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_compile_lists(shape: tuple[int, ...], backend: Backend, fresh_compiler: None) -> None:
    made = ListCase("absent_parameter", 3).make()

    def function(w: Tensor, *tensors: Tensor) -> list[Tensor | None]:
        out = combine(w, cases.with_tensors(made, tensors))
        return out if w.dim() == 1 else [x for row in out for x in row]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    w = cases.random_weights(shape, torch.float32)
    a = [x.clone().requires_grad_() for x in cases.tensors_of(made)]
    b = [x.clone().requires_grad_() for x in cases.tensors_of(made)]
    out, expected = compiled(w, *a), function(w, *b)
    assert [x is None for x in out] == [x is None for x in expected]
    pairs = [(x, y) for x, y in zip(out, expected, strict=True) if y is not None]
    assert all(torch.equal(x, y) for x, y in pairs)
    sum(x.square().sum() for x, _ in pairs).backward()
    sum(y.square().sum() for _, y in pairs).backward()
    assert all(torch.equal(x.grad, y.grad) for x, y in zip(a, b, strict=True))


# --- bad input


@pytest.mark.parametrize("bad", BAD_GRADS, ids=str)
def test_bad_gradients(bad: BadGrads, backend: Backend) -> None:
    with pytest.raises(bad.error, match=bad.match):
        combine(torch.ones(2), bad.make())


_BANK = torch.ones(3, 4)
_LISTS = [[torch.ones(4)]] * 3


@pytest.mark.parametrize("grads", [_BANK, _LISTS], ids=["bank", "lists"])
@pytest.mark.parametrize(
    ("weights", "error", "match"),
    [
        ([1.0, 1.0, 1.0], TypeError, r"weights: expected a tensor, got list"),
        (1.0, TypeError, r"weights: expected a tensor, got float"),
        (torch.ones(3, dtype=torch.int64), TypeError, r"weights: expected a floating-point tensor, got torch.int64"),
        (torch.ones(3, dtype=torch.complex64), TypeError, r"weights: expected a floating-point.*torch.complex64"),
        (torch.ones(2), ValueError, r"weights: expected shape \[3\] or \[K, 3\] for 3 tasks, got \[2\]"),
        (torch.ones(4), ValueError, r"weights: expected shape \[3\].*got \[4\]"),
        (torch.ones(3, 2), ValueError, r"weights: expected shape \[3\].*got \[3, 2\]"),
        (torch.ones(2, 2, 3), ValueError, r"weights: expected shape \[3\].*got \[2, 2, 3\]"),
        (torch.tensor(1.0), ValueError, r"weights: expected shape \[3\].*got \[\]"),
        (torch.ones(3, device="meta"), ValueError, r"weights: expected device cpu as the gradients, got meta"),
    ],
    ids=["list", "number", "int64", "complex", "short", "long", "transposed", "3-d", "0-d", "device"],
)
def test_bad_weights(grads: Any, weights: Any, error: type[Exception], match: str, backend: Backend) -> None:
    with pytest.raises(error, match=match):
        combine(weights, grads)


def test_op_itself_checks_a_bank(backend: Backend) -> None:
    with pytest.raises(ValueError, match=r"weights: expected shape \[3\]"):
        torch.ops.fastmtl.combine(torch.ones(2), torch.ones(3, 4))


# --- out=


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_out_of_lists_and_banks(backend: str) -> None:
    if (reason := dispatch.unavailable(backend, "cpu")) is not None:
        pytest.skip(reason)
    g, w = torch.randn(3, 70), torch.randn(2, 3)
    rows = [[x[:60].reshape(6, 10), None, x[60:]] for x in g]
    order = ops.random_order(3)
    with fastmtl.use_backend(backend):
        for weights, shape in ((w, (2, 70)), (w[0], (70,))):
            out = torch.full(shape, torch.nan)
            assert ops.combine(weights, g, out=out) is out
            torch.testing.assert_close(out, weights @ g)
        lists = [[torch.full((6, 10), torch.nan), None, torch.full((10,), torch.nan)] for _ in range(2)]
        assert ops.combine(w, rows, out=lists) is lists
        torch.testing.assert_close(torch.stack([torch.cat([x[0].flatten(), x[2]]) for x in lists]), w @ g)
        expected = ops.pcgrad(g, order)
        mine = g.clone()
        ops.pcgrad(mine, order, out=mine[1])  # a gradient's own memory
        torch.testing.assert_close(mine[1], expected)
        target = [torch.empty(6, 10), None, torch.empty(10)]
        ops.pcgrad(rows, order, out=target)
        torch.testing.assert_close(torch.cat([target[0].flatten(), target[2]]), expected)


def test_out_is_seen_by_autograd() -> None:
    a, x = torch.ones(5, requires_grad=True), torch.ones(5)
    for call in (
        lambda: ops.combine(torch.ones(2), torch.ones(2, 5), out=x),
        lambda: ops.pcgrad(torch.ones(2, 5), out=x),
    ):
        y = (a * x).sum()
        call()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


def test_refuses_out_that_does_not_fit() -> None:
    g, w = torch.randn(2, 6), torch.ones(2)
    one, two = torch.randn(3), torch.randn(3)
    rows = [[one, two], [torch.randn(3), torch.randn(3)]]
    needs = torch.zeros(6, requires_grad=True)
    refused = [
        (lambda: ops.combine(w, g, out=torch.empty(5)), ValueError, "shape"),
        (lambda: ops.combine(w, g, out=torch.empty(6, dtype=torch.float64)), ValueError, "float64"),
        (lambda: ops.combine(w, g, out=[torch.empty(6)]), TypeError, "got list"),
        (lambda: ops.combine(w, g, out=torch.empty(12)[::2]), ValueError, "without gaps"),
        (lambda: ops.combine(torch.eye(2), g, out=torch.zeros(6).expand(2, 6)), ValueError, "overlap"),
        (lambda: ops.combine(torch.eye(2), g, out=g), ValueError, "memory of the gradients"),
        (lambda: ops.combine(w, g, out=needs), RuntimeError, "autograd"),
        (lambda: ops.pcgrad(g, out=needs), RuntimeError, "autograd"),
        (lambda: ops.combine(w, rows, out=[torch.empty(3)]), ValueError, "2 tensors"),
        (lambda: ops.combine(w, rows, out=[torch.empty(3), None]), TypeError, r"out\[1\]"),
        (lambda: ops.combine(w, rows, out=[torch.empty(3), torch.empty(4)]), ValueError, r"out\[1\]"),
        (lambda: ops.combine(w, rows, out=[needs[:3].detach()] * 2), ValueError, "one twice"),
        (lambda: ops.combine(w, rows, out=[two, torch.empty(3)]), ValueError, "gradient of parameter 1"),
    ]
    before = (g.clone(), one.clone(), two.clone())
    for call, error, match in refused:
        with pytest.raises(error, match=match):
            call()
    assert torch.equal(g, before[0]) and torch.equal(one, before[1]) and torch.equal(two, before[2])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_does_not_lower_the_precision(backend: str) -> None:
    if (reason := dispatch.unavailable(backend, "cpu")) is not None:
        pytest.skip(reason)
    g = torch.randn(4, 500, requires_grad=True)
    w = torch.randn(4, requires_grad=True)
    with fastmtl.use_backend(backend):
        expected = (ops.gram(g), ops.combine(w, g), *torch.autograd.grad(ops.combine(w, g).square().sum(), (w, g)))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = (ops.gram(g), ops.combine(w, g), *torch.autograd.grad(ops.combine(w, g).square().sum(), (w, g)))
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_out_may_be_a_row_but_not_overlap_one(backend: Backend) -> None:
    weights = torch.tensor([1.0, 2.0, -1.0])
    memory = torch.arange(3 * 7 + 20, dtype=torch.float32)
    rows = memory[:21].view(3, 7)
    apart = memory.as_strided((3, 7), (10, 1))  # with room between the rows
    overlapping = [
        (rows, memory[1:8], 0),
        (rows, memory[6:13], 0),
        (rows, memory[15:22], 2),
        (apart, memory[8:15], 1),
        (memory[:21].view(7, 3).mT, memory[0:7], 0),
        (memory[:1].expand(3, 7), memory[0:7], 0),
    ]
    for grads, out, row in overlapping:
        with pytest.raises(ValueError, match=f"out: overlaps row {row} of the gradients"):
            combine(weights, grads, out=out)
        with pytest.raises(ValueError, match=f"out: overlaps row {row} of the gradients"):
            ops.pcgrad(grads, torch.zeros(3, 1, dtype=torch.int64), out=out)
    for grads, out in ((rows, memory[7:14]), (rows, memory[21:28]), (apart, memory[10:17]), (apart, memory[27:34])):
        saved = memory.clone()
        expected = weights @ grads
        assert torch.equal(combine(weights, grads, out=out), expected)
        memory.copy_(saved)


def test_a_bank_that_memory_holds_as_its_negative() -> None:
    bank = torch.complex(torch.ones(3, 4), torch.randn(3, 4)).conj().imag.as_strided((2, 5), (5, 1))
    assert bank.is_neg()
    weights = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(combine(weights, bank), weights @ bank.resolve_neg())
