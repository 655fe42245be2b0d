"""The shared table on CUDA tensors, by CUDA C++, Triton and the plain torch reference: values, derivatives, errors."""

from __future__ import annotations

from typing import Any

import cases
import cases_cuda
import pytest
import torch
from cases import BANK_CASES, FEW_BANKS, FEW_LISTS, LIST_CASES, OPCHECK_SAMPLES, BankCase, ListCase
from cases_cuda import (
    DEVICE,
    SMALLEST,
    assert_same_bits,
    by_backend,
    slack,
    tensors_in,
    use,
)
from torch import Tensor

import fastmtl
from fastmtl.ops import combine, gram, order_state, pcgrad, pcgrad_coefficients, pcgrad_project
from fastmtl.ops.gradients import reference

pytestmark = pytest.mark.gpu
forced = cases_cuda.forced

# a kernel for every number of tasks, long enough for several groups of partial sums; an odd length misaligns rows
LONG_BANKS = [
    *(BankCase(t, p) for t in (1, 2, 4, 7, 8, 13, 16, 17, 32, 40, 50, 64, 65, 100, 128) for p in (300_032, 300_001)),
    *(BankCase(t, 300_032, d) for t in (2, 8, 16, 40, 64, 100) for d in cases.DTYPES if d != torch.float32),
]


@by_backend(BANK_CASES, FEW_BANKS)
def test_gram_bank(case: BankCase, forced: str | None) -> None:
    with use("gram", forced):
        m = gram(case.make(DEVICE))
    assert m.device.type == DEVICE
    cases.assert_gram(m, cases.bank64(case), [case.dtype], slack(forced, case))
    assert torch.equal(m, m.mT)


@by_backend(LIST_CASES, FEW_LISTS)
def test_gram_lists(case: ListCase, forced: str | None) -> None:
    made = case.make(DEVICE)
    with use("gram", forced if cases.tensors_of(made) else None):  # without a tensor there is no device either
        m = gram(made)
    dtypes = [x.dtype for x in cases.tensors_of(made)]
    cases.assert_gram(m, cases.bank64(case), dtypes, slack(forced, case))


@by_backend(BANK_CASES, FEW_BANKS)
def test_combine_bank(case: BankCase, forced: str | None) -> None:
    with use("combine", forced):
        for shape in ((case.num_tasks,), (3, case.num_tasks)):
            weights = cases.random_weights(shape)
            out = combine(weights.to(DEVICE), case.make(DEVICE))
            assert out.dtype == case.dtype and out.device.type == DEVICE
            unit, tolerance = cases.unit_roundoff(case.dtype), cases.COMBINE_TOLERANCE[case.dtype]
            cases.assert_combine(out, weights, cases.bank64(case), unit, tolerance, SMALLEST[case.dtype])


@by_backend(LIST_CASES, FEW_LISTS)
def test_combine_lists(case: ListCase, forced: str | None) -> None:
    made = case.make(DEVICE)
    device = DEVICE if cases.tensors_of(made) else "cpu"
    weights = cases.random_weights((2, case.num_tasks))
    with use("combine", forced if device == DEVICE else None):
        rows = combine(weights.to(device), made)
    for w, row in zip(weights, rows, strict=True):
        for i, y in enumerate(row):
            x = next((r[i] for r in made if r[i] is not None), None)
            assert (x is None) == (y is None)
            if x is not None:
                assert (y.dtype, y.shape, y.stride()) == (x.dtype, x.shape, torch.empty_like(x).stride())
        dtypes = [x.dtype for x in cases.tensors_of(made)]
        tolerance = max((cases.COMBINE_TOLERANCE[d] for d in dtypes), default=0.0)
        smallest = max((SMALLEST[d] for d in dtypes), default=0.0)
        cases.assert_combine(cases.flat(row), w, cases.bank64(case), cases.units(row), tolerance, smallest)


@by_backend(BANK_CASES, FEW_BANKS)
def test_pcgrad_bank(case: BankCase, forced: str | None) -> None:
    bank, expected = cases.bank64(case), cases.projected64(case)
    bound = slack(forced, case) * cases.PCGRAD_TOLERANCE[case.dtype] * cases.pcgrad_scale(bank, expected)
    unit = cases.unit_roundoff(case.dtype) * 1.001
    order = cases.random_order(case.num_tasks).to(DEVICE)
    with use("pcgrad", forced):
        projected, update = pcgrad_project(case.make(DEVICE), order), pcgrad(case.make(DEVICE), order)
    cases.assert_within(projected, expected, bound + unit * expected.abs() + SMALLEST[case.dtype])
    total = expected.sum(0)
    cases.assert_within(update, total, bound.sum(0) + unit * total.abs() + SMALLEST[case.dtype])


@by_backend(LIST_CASES, FEW_LISTS)
def test_pcgrad_lists(case: ListCase, forced: str | None) -> None:
    """The sum, every projected gradient, and the sum into given memory."""
    made = case.make(DEVICE)
    if not cases.tensors_of(made):
        pytest.skip("nothing on the device")
    bank, expected = cases.bank64(case), cases.projected64(case)
    dtypes = [x.dtype for x in cases.tensors_of(made)]
    tolerance = slack(forced, case) * max(cases.PCGRAD_TOLERANCE[d] for d in dtypes)
    bound = tolerance * cases.pcgrad_scale(bank, expected) + max(SMALLEST[d] for d in dtypes)
    order = cases.random_order(case.num_tasks).to(DEVICE)
    with use("pcgrad", forced):
        row, projected = pcgrad(made, order), pcgrad_project(made, order)
        out = [None if x is None else torch.full_like(x, torch.nan) for x in row]
        pcgrad(made, order, out=out)
    total = expected.sum(0)
    for found in (row, out):
        cases.assert_within(cases.flat(found), total, bound.sum(0) + cases.units(found) * total.abs() * 1.001)
    for t, found in enumerate(projected):
        cases.assert_within(cases.flat(found), expected[t], bound[t] + cases.units(found) * expected[t].abs() * 1.001)


@by_backend(LONG_BANKS, [BankCase(8, 300_032), BankCase(8, 300_001), BankCase(40, 300_001)])
def test_long_banks(case: BankCase, forced: str | None) -> None:
    """Gram matrix and PCGrad by way of the float64 coefficients: the paper's loop on long vectors takes too long."""
    grads, bank = case.make(DEVICE), cases.bank64(case)
    order = cases.random_order(case.num_tasks)
    with use("pcgrad", forced):
        m, update = gram(grads), pcgrad(grads, order.to(DEVICE))
    exact = reference.gram(bank)
    cases.assert_gram(m, bank, [case.dtype], slack(forced, case))
    assert torch.equal(m, m.mT)
    projected = reference.pcgrad_coefficients(exact, order) @ bank
    tolerance = slack(forced, case) * cases.PCGRAD_TOLERANCE[case.dtype]
    bound = (tolerance * cases.pcgrad_scale(bank, projected)).sum(0)
    total = projected.sum(0)
    unit = cases.unit_roundoff(case.dtype) * 1.001
    cases.assert_within(update, total, bound + unit * total.abs() + SMALLEST[case.dtype])


@pytest.mark.parametrize("include_self", [False, True])
def test_coefficients(include_self: bool, forced: str | None) -> None:
    with use("pcgrad_coefficients", forced):
        for num_tasks in (1, 2, 5, 16, 17, 33, 64, 65, 128):
            m = reference.gram(cases.bank64(BankCase(num_tasks, 65, torch.float64)))
            # permutations; and any tasks, also more than there are
            for order in (cases.random_order(num_tasks), cases.random_order(num_tasks, 2 * num_tasks + 1)):
                c = pcgrad_coefficients(m.to(DEVICE), order.to(DEVICE), include_self=include_self)
                expected = reference.pcgrad_coefficients(m, order, include_self)
                largest = expected.abs().amax(1, keepdim=True).expand_as(expected)
                cases.assert_within(c, expected, cases.COEFFICIENT_TOLERANCE * largest)


@pytest.mark.parametrize("wrong", [3, -1, 2**40])
def test_order_out_of_range_gives_nan(wrong: int, forced: str | None) -> None:
    """Values can't be seen without waiting for the device: nothing out of bounds is read, the row is NaN."""
    order = torch.tensor([[1, 2], [0, wrong], [0, 1]], device=DEVICE)
    with use("pcgrad_coefficients", forced):
        c = pcgrad_coefficients(torch.eye(3, device=DEVICE), order)
    assert torch.isnan(c[1]).all() and torch.isfinite(c[[0, 2]]).all()


def test_non_finite_shows(forced: str | None) -> None:
    grads = BankCase(3, 4097).make(DEVICE)
    grads[1, 4000] = torch.nan
    with use("combine", forced):
        out = combine(torch.tensor([1.0, 0.0, 1.0], device=DEVICE), grads)
    assert torch.isnan(out[4000]) and torch.isfinite(out).sum() == 4096


@by_backend(FEW_BANKS + FEW_LISTS + [BankCase(40, 300_001)], FEW_BANKS[:4] + FEW_LISTS[:3])
def test_same_bits(case: BankCase | ListCase, forced: str | None) -> None:
    grads = case.make(DEVICE)
    if isinstance(grads, list) and not cases.tensors_of(grads):
        pytest.skip("nothing on the device")
    order = cases.random_order(case.num_tasks).to(DEVICE)
    weights = cases.random_weights((case.num_tasks,)).to(DEVICE)

    def run() -> list[Tensor]:
        calls = (gram(grads), combine(weights, grads), pcgrad(grads, order), pcgrad_project(grads, order))
        return tensors_in(calls)

    with use("pcgrad", forced):
        first = run()
        for _ in range(3):
            assert_same_bits(run(), first)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.short)
def test_gradients(dtype: torch.dtype) -> None:
    """Of every op on a bank, against the float64 oracle on the CPU."""
    case = BankCase(5, 300, dtype)
    order, weights = cases.random_order(5), cases.random_weights((5,), torch.float32)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}[dtype]
    calls = (
        (lambda g: gram(g), lambda g: reference.gram(g)),
        (lambda g: combine(weights.to(DEVICE), g), lambda g: reference.combine(weights.double(), g)),
        (lambda g: pcgrad(g, order.to(DEVICE)), lambda g: reference.pcgrad(g, order)),
        (lambda g: pcgrad_project(g, order.to(DEVICE)), lambda g: reference.pcgrad_project(g, order)),
    )
    for call, oracle in calls:
        grads = case.make(DEVICE).requires_grad_()
        out = call(grads)
        grad_out = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
        (actual,) = torch.autograd.grad(out, grads, grad_out.to(DEVICE))
        leaf = cases.bank64(case).clone().requires_grad_()
        (expected,) = torch.autograd.grad(oracle(leaf), leaf, grad_out.double())
        assert actual.dtype == dtype
        cases.assert_within(actual, expected, tolerance * expected.abs().amax(1, keepdim=True).expand_as(expected))


def _to_device(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.detach().to(DEVICE).requires_grad_(x.requires_grad)
    return [_to_device(y) for y in x] if isinstance(x, list) else x


@pytest.mark.parametrize("name", sorted(OPCHECK_SAMPLES))
def test_opcheck(name: str) -> None:
    for args in OPCHECK_SAMPLES[name]():
        torch.library.opcheck(getattr(torch.ops.fastmtl, name).default, tuple(_to_device(list(args))))


def test_another_device(forced: str | None) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    case, lists = BankCase(8, 20_000), ListCase("nones", 5)
    order, weights = cases.random_order(8), cases.random_weights((8,))
    assert torch.cuda.current_device() == 0
    with use("pcgrad", forced):
        found = []
        for device in ("cuda:0", "cuda:1"):
            grads = case.make(device)
            update = pcgrad(grads, order.to(device))
            found.append(
                [gram(grads), combine(weights.to(device), grads), update, *tensors_in(gram(lists.make(device)))]
            )
            state = order_state(3, device=device)
            found[-1].append(pcgrad(grads, generator=state))
            assert all(x.device == torch.device(device) for x in found[-1])
    assert torch.cuda.current_device() == 0
    assert_same_bits([x.cpu() for x in found[1]], [x.cpu() for x in found[0]])
    with pytest.raises(ValueError, match=r"expected device cuda:0"):
        gram([[torch.ones(3, device="cuda:0")], [torch.ones(3, device="cuda:1")]])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_tasks", "num_columns"),
    [
        (3, 2**30 + 5),  # an odd length: rows that are not aligned, read element by element
        (3, 2**30 + 8),  # aligned ones, read 16 bytes at a time
        (2, 2**31 + 8),  # within one row
        (17, 2**27 + 8),  # on tensor cores
    ],
)
def test_more_than_2_31_elements(num_tasks: int, num_columns: int, forced: str | None) -> None:
    assert num_tasks * num_columns > 2**31
    if forced == "reference":
        pytest.skip("the reference upcasts the whole bank")
    needed = (num_tasks + 2) * num_columns * 2 + 2**31
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free")
    grads = torch.zeros(num_tasks, num_columns, dtype=torch.bfloat16, device=DEVICE)
    wide = num_columns % 8 == 0
    assert (grads[1].data_ptr() % 16 == 0) == wide
    at = torch.tensor([0, 1, num_columns // 2, num_columns - 2, num_columns - 1], device=DEVICE)
    grads[:, at] = torch.arange(1, 5 * num_tasks + 1, device=DEVICE).reshape(num_tasks, 5).to(torch.bfloat16)
    picked = grads[:, at].double()
    weights = (torch.arange(num_tasks, device=DEVICE) % 3 + 1.0).double()
    with use("combine", forced):
        out = combine(weights, grads)
        m = gram(grads)
    assert torch.equal(out[at], (weights @ picked).to(torch.bfloat16))
    assert out.count_nonzero() == 5
    torch.testing.assert_close(m.double(), picked @ picked.mT)
    del out
    with use("pcgrad", forced):
        # everything agrees: nothing is projected
        update = pcgrad(grads, generator=order_state(0, device=DEVICE))
    assert torch.equal(update[at], picked.sum(0).to(torch.bfloat16))
    assert update.count_nonzero() == 5


def test_devices_must_agree() -> None:
    grads = BankCase(3, 65).make(DEVICE)
    with pytest.raises(ValueError, match=r"weights: expected device cuda:0 as the gradients, got cpu"):
        combine(torch.ones(3), grads)
    with pytest.raises(ValueError, match=r"order: expected device cuda:0, got cpu"):
        pcgrad(grads, cases.random_order(3))
    with pytest.raises(ValueError, match=r"grads\[1\]\[0\]: expected device cuda:0, got cpu"):
        gram([[grads[0]], [grads[1].cpu()], [grads[2]]])


def test_forced_cpu_refuses_cuda_tensors() -> None:
    with fastmtl.use_backend("cpu"), pytest.raises(RuntimeError, match="backend 'cpu' is forced but cannot serve"):
        gram(BankCase(3, 65).make(DEVICE))
