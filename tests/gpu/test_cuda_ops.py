"""The shared table on CUDA tensors, on whatever serves them: CUDA C++, Triton or the plain torch reference."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import cases
import pytest
import torch
from cases import BANK_CASES, FEW_BANKS, FEW_LISTS, LIST_CASES, OPCHECK_SAMPLES, BankCase, ListCase
from torch import Tensor

import fastmtl
from fastmtl import _backend
from fastmtl.ops import combine, gram, pcgrad, pcgrad_coefficients, pcgrad_project, reference

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
SMALLEST = {dtype: 2.0**-25 if dtype == torch.float16 else 0.0 for dtype in cases.DTYPES}
# op -> where its implementations are listed
TABLES = {
    "gram": ("gram", "_BANK"),
    "combine": ("combine", "_BANK"),
    "pcgrad_coefficients": ("pcgrad", "_COEFFICIENTS"),
    "pcgrad": ("pcgrad", "_FUSED"),
}


def _kernels(op: str) -> set[str]:
    module, name = TABLES[op]
    table = getattr(sys.modules[f"fastmtl.ops.{module}"], name)
    return set(table["pcgrad"] if name == "_FUSED" else table)


@pytest.fixture(params=["reference", "cuda", "triton", None], ids=str)
def forced(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """Each backend in turn; None: the one that the package chooses."""
    name = request.param
    if name is not None and (reason := _backend.unavailable(name, DEVICE)) is not None:
        pytest.skip(reason)
    yield name


def use(op: str, name: str | None) -> Any:
    """Forces the backend, or skips where it has no kernel for the op."""
    if name is None:
        return nullcontext()
    if name not in _kernels(op):
        pytest.skip(f"{name} has no kernel for {op}")
    return fastmtl.use_backend(name)


@pytest.mark.parametrize("case", BANK_CASES, ids=str)
def test_gram_bank(case: BankCase, forced: str | None) -> None:
    with use("gram", forced):
        m = gram(case.make(DEVICE))
    assert m.device.type == DEVICE
    cases.assert_gram(m, cases.bank64(case), [case.dtype], cases.gram_slack("reference", case))
    assert torch.equal(m, m.mT)


@pytest.mark.parametrize("case", LIST_CASES, ids=str)
def test_gram_lists(case: ListCase, forced: str | None) -> None:
    made = case.make(DEVICE)
    with use("gram", forced):
        m = gram(made)
    dtypes = [x.dtype for x in cases.tensors_of(made)]
    cases.assert_gram(m, cases.bank64(case), dtypes, cases.gram_slack("reference", case))


@pytest.mark.parametrize("case", BANK_CASES, ids=str)
def test_combine_bank(case: BankCase, forced: str | None) -> None:
    with use("combine", forced):
        for shape in ((case.num_tasks,), (3, case.num_tasks)):
            weights = cases.random_weights(shape)
            out = combine(weights.to(DEVICE), case.make(DEVICE))
            assert out.dtype == case.dtype and out.device.type == DEVICE
            unit, tolerance = cases.unit_roundoff(case.dtype), cases.COMBINE_TOLERANCE[case.dtype]
            cases.assert_combine(out, weights, cases.bank64(case), unit, tolerance, SMALLEST[case.dtype])


@pytest.mark.parametrize("case", LIST_CASES, ids=str)
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


@pytest.mark.parametrize("case", BANK_CASES, ids=str)
def test_pcgrad_bank(case: BankCase, forced: str | None) -> None:
    bank, expected = cases.bank64(case), cases.projected64(case)
    slack = cases.gram_slack("reference", case)
    bound = slack * cases.PCGRAD_TOLERANCE[case.dtype] * cases.pcgrad_scale(bank, expected)
    unit = cases.unit_roundoff(case.dtype) * 1.001
    order = cases.random_order(case.num_tasks).to(DEVICE)
    with use("pcgrad", forced):
        projected, update = pcgrad_project(case.make(DEVICE), order), pcgrad(case.make(DEVICE), order)
    cases.assert_within(projected, expected, bound + unit * expected.abs() + SMALLEST[case.dtype])
    total = expected.sum(0)
    cases.assert_within(update, total, bound.sum(0) + unit * total.abs() + SMALLEST[case.dtype])


@pytest.mark.parametrize("case", LIST_CASES, ids=str)
def test_pcgrad_lists(case: ListCase, forced: str | None) -> None:
    made = case.make(DEVICE)
    if not cases.tensors_of(made):
        pytest.skip("nothing on the device")
    bank, expected = cases.bank64(case), cases.projected64(case)
    dtypes = [x.dtype for x in cases.tensors_of(made)]
    tolerance = cases.gram_slack("reference", case) * max(cases.PCGRAD_TOLERANCE[d] for d in dtypes)
    bound = tolerance * cases.pcgrad_scale(bank, expected) + max(SMALLEST[d] for d in dtypes)
    with use("pcgrad", forced):
        row = pcgrad(made, cases.random_order(case.num_tasks).to(DEVICE))
    total = expected.sum(0)
    cases.assert_within(cases.flat(row), total, bound.sum(0) + cases.units(row) * total.abs() * 1.001)


@pytest.mark.parametrize("include_self", [False, True])
def test_coefficients(include_self: bool, forced: str | None) -> None:
    with use("pcgrad_coefficients", forced):
        for num_tasks in (1, 2, 5, 17, 33, 128):
            m = reference.gram(cases.bank64(BankCase(num_tasks, 65, torch.float64)))
            order = cases.random_order(num_tasks)
            c = pcgrad_coefficients(m.to(DEVICE), order.to(DEVICE), include_self=include_self)
            expected = reference.pcgrad_coefficients(m, order, include_self)
            torch.testing.assert_close(c.cpu(), expected, rtol=1e-8, atol=1e-8)


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


@pytest.mark.parametrize("case", FEW_BANKS + FEW_LISTS, ids=str)
def test_same_bits(case: BankCase | ListCase) -> None:
    grads = case.make(DEVICE)
    if isinstance(grads, list) and not cases.tensors_of(grads):
        pytest.skip("nothing on the device")
    order = cases.random_order(case.num_tasks).to(DEVICE)
    weights = cases.random_weights((case.num_tasks,)).to(DEVICE)

    def run() -> list[Tensor]:
        results = [gram(grads)]
        for out in (combine(weights, grads), pcgrad(grads, order)):
            results += [out] if isinstance(out, Tensor) else [x for x in out if x is not None]
        return results

    first = run()
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(first, run(), strict=True))


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


@pytest.mark.parametrize("order", [None, "given"])
def test_never_waits_for_the_host(order: str | None) -> None:
    grads = BankCase(5, 4097).make(DEVICE)
    lists = [[row[:100], row[100:]] for row in grads]
    given = None if order is None else cases.random_order(5).to(DEVICE)
    weights = torch.ones(5, device=DEVICE)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x in (grads, lists):
            gram(x)
            combine(weights, x)
            pcgrad(x, given)
            pcgrad_project(x, given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_runs_on_the_current_stream(forced: str | None) -> None:
    grads = torch.zeros(3, 70000, device=DEVICE)
    values = BankCase(3, 70000).make(DEVICE)
    weights = torch.ones(3, device=DEVICE)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with use("combine", forced), torch.cuda.stream(stream):
        # long enough for a kernel on another stream to read the zeros first
        torch.cuda._sleep(50_000_000)
        grads.copy_(values)
        out = combine(weights, grads)
    stream.synchronize()
    torch.testing.assert_close(out, values.sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_more_than_2_31_elements(forced: str | None) -> None:
    num_columns = 2**30 + 5
    free, _ = torch.cuda.mem_get_info()
    if free < 12 * 2**30:
        pytest.skip(f"needs 12 GiB of GPU memory, {free / 2**30:.0f} are free")
    if forced == "reference":
        pytest.skip("the reference upcasts the whole bank")
    grads = torch.zeros(3, num_columns, dtype=torch.bfloat16, device=DEVICE)
    at = torch.tensor([0, 1, 2**29, num_columns - 2, num_columns - 1], device=DEVICE)
    grads[:, at] = torch.arange(1, 16, device=DEVICE).reshape(3, 5).to(torch.bfloat16)
    with use("combine", forced):
        out = combine(torch.tensor([1.0, 2.0, -1.0], device=DEVICE), grads)
    assert torch.equal(out[at], grads[0, at] + 2 * grads[1, at] - grads[2, at])
    assert out.count_nonzero() == 5


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
