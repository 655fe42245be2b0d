"""Triton's PTX of its kernels, for sm_80, on the host (tests/helpers/triton_on_host.py), against the float64 oracle.

Every run is checked for races. That it sees what it should: faults are planted in the PTX. A few cases run always;
`FASTMTL_AOT=all` (`make aot`) runs every kernel in every dtype, in both orders of turns, and plants all faults of
order.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import cases
import cases_lora
import host_kernels as host
import pytest
import torch
from cases import BankCase, ListCase
from cases_lora import LoraCase
from cases_task import (
    BF16,
    F16,
    F32,
    F64,
    TASK_TOLERANCE,
    ConvCase,
    LinearCase,
    TaskCase,
    assert_gradients,
    assert_result,
    bound,
    expected,
    gradients,
)
from conftest import skip_or_fail
from host.ptx.faults import CONTROL, ORDER
from host.ptx.mutations import Fault, Outcome, faults_in, outcome
from torch import Tensor

from fastmtl import ops
from fastmtl.core import dispatch
from fastmtl.ops.gradients import reference
from fastmtl.ops.task_weights import reference as task_reference

if dispatch.interpreting():
    pytest.skip("TRITON_INTERPRET=1: the kernels are not compiled", allow_module_level=True)
pytest.importorskip("triton")

import triton
from triton_on_host import Ran, running

from fastmtl.kernels.build_targets import build_targets
from fastmtl.kernels.gradients import launchers as surgery
from fastmtl.kernels.gradients.gram import MAX_PAIRED
from fastmtl.kernels.task_weights import configs, task_scale_shift
from fastmtl.kernels.task_weights import task_plan as plans

ALL = os.environ.get("FASTMTL_AOT") == "all"
only_in_aot = pytest.mark.skipif(not ALL, reason="part of `make aot`")
DTYPES = (F32, BF16, F16)
# float32 as three products of truncated tf32 parts: up to 3 * 2^-20 of each product
SLACK = {F32: 4.0, BF16: 1.0, F16: 1.0}
# tensor cores that cut every term of a sum off, where up to 256 columns of 16 bits are added before one sum is rounded
CUT_SLACK = 4.0
SCHEDULES = {"falling": host.REVERSE, "rising": host.FORWARD}


# --- gradient surgery


def check_surgery(case: BankCase | ListCase, dtype: torch.dtype, num_sums: int) -> None:
    """PCGrad, its Gram matrix and coefficients; and other weighted sums."""
    grads, bank = case.make(), cases.bank64(case)
    order = cases.random_order(case.num_tasks)
    unit, smallest = cases.unit_roundoff(dtype), 2.0**-25 if dtype == F16 else 0.0
    slack = CUT_SLACK if dtype.itemsize == 2 and case.num_tasks > MAX_PAIRED else 1.0
    m = ops.gram(grads)
    cases.assert_gram(m, bank, [dtype], slack)
    assert torch.equal(m, m.mT)
    w = cases.random_weights((num_sums, case.num_tasks))
    tolerance = cases.COMBINE_TOLERANCE[dtype]
    cases.assert_combine(_columns(ops.combine(w, grads)), w, bank, unit, tolerance, smallest)
    projected = cases.projected64(case)
    error = slack * cases.PCGRAD_TOLERANCE[dtype] * cases.pcgrad_scale(bank, projected)
    update = _columns(ops.pcgrad(grads, order))
    total = projected.sum(0)
    cases.assert_within(update, total, error.sum(0) + unit * total.abs() * 1.001 + smallest)
    # with an order that is drawn
    state, twin = ops.order_state(11), ops.order_state(11)
    drawn = _columns(ops.pcgrad(grads, generator=state))
    assert torch.equal(drawn, _columns(ops.pcgrad(grads, ops.random_order(case.num_tasks, generator=twin))))
    assert state.tolist() == twin.tolist() == [11, 1]
    found = ops.pcgrad_coefficients(reference.gram(bank), order)
    torch.testing.assert_close(found, reference.pcgrad_coefficients(reference.gram(bank), order), rtol=1e-9, atol=1e-9)


def _columns(found: Any) -> Tensor:
    """`[P]` or `[K, P]` float64 of a result, a bank's or lists'."""
    if isinstance(found, Tensor):
        return found.double()
    return torch.stack([cases.flat(row) for row in found]) if isinstance(found[0], list) else cases.flat(found)


def long_chunks(check: Callable[[], None]) -> None:
    """With few chunks, so that each is many steps long; their sums are added up in two levels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(surgery, "CHUNKS", dict.fromkeys(surgery.CHUNKS, 5))
        patch.setattr(surgery, "SUM_TILE", 256)
        check()


# --- task layers


def check_layer(case: TaskCase, **forced: Any) -> None:
    """The result and every gradient, with every choice of a kernel as `forced` says, else as the rules have it."""
    made, want = case.make().leaves(), expected(case)
    tolerance = SLACK[case.dtype] * TASK_TOLERANCE[case.dtype]
    with configs.force(**forced):
        y = case.run(made)
        assert_result(case, y, want, tolerance)
        assert_gradients(case, made, gradients(y, made), want, tolerance)


def check_forward(case: TaskCase, **forced: Any) -> None:
    with configs.force(**forced), torch.no_grad():
        assert_result(case, case.run(case.make()), expected(case), SLACK[case.dtype] * TASK_TOLERANCE[case.dtype])


STAGED = {"schedule": "staged", "mode": "walk", "chunks": 2}
FUSED = {"schedule": "fused", "mode": "split", "split_rows": 64, "chunks": 2}
# more steps than a pipeline has buffers; channels that no tile divides, task 1 without samples
CONV = ConvCase(
    n=9, cin=40, cout=24, size=(5, 6), num_tasks=4, ids="absent", gate="zeros", bias="per_task",
    x_layout="channels_last", weight_layout="channels_last", grad_layout="channels_last",
)  # fmt: skip
PACKED = ConvCase(n=5, cin=3, cout=20, size=(6, 7), stride=2, gate="values", bias="shared", delta="stacked")
LINEAR = LinearCase(leading=(3, 50), cin=70, cout=36, gate="values", bias="per_task", delta="nones")


def check_lora(case: LoraCase, **forced: Any) -> None:
    """The result and every gradient."""
    made, want = case.make().leaves(), cases_lora.expected(case)
    tolerance = SLACK[case.dtype] * cases_lora.tolerance_of(case.dtype)
    with configs.force(**forced):
        y = case.run(made)
        cases_lora.assert_result(case, y, want, tolerance)
        cases_lora.assert_gradients(case, made, cases_lora.gradients(y, made), want, tolerance=tolerance)


# ranks and columns that no tile divides, and that 16 bytes do; several steps of each sum
LORA = LoraCase(leading=(5, 40), cin=150, cout=70, ranks=(3, 0, 20), num_tasks=3, scaling="values", bias="per_task")
LORA_EIGHTS = LoraCase(leading=(200,), cin=136, cout=72, factors="stacked", ranks=(8,), scaling="zeros", ids="absent")


def check_plan(ids_dtype: torch.dtype, num_ids: int, num_tasks: int) -> None:
    ids = torch.randint(-1, num_tasks + 1, (num_ids,)).to(ids_dtype)
    for x, y in zip(plans.task_plan(ids, num_tasks), task_reference.task_plan(ids, num_tasks), strict=True):
        assert torch.equal(x, y)


def check_scale_shift(shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype) -> None:
    """In parts: of samples, and of the sums over them."""
    x, grad_out = (torch.randn(shape).to(dtype).contiguous(memory_format=layout) for _ in range(2))
    scale, shift = (torch.randn(4, shape[1], requires_grad=True) for _ in range(2))
    task_ids = torch.arange(shape[0]) * 7 % 4
    everything = [True, True, True]

    def oracle(*args: Tensor) -> list[Tensor]:
        grad, *rest = (y.detach().double() for y in args)
        y = task_reference.task_scale_shift(*rest, task_ids)
        return [y, *task_reference.task_scale_shift_backward(grad, *rest, task_ids, everything)]

    want, sizes = oracle(grad_out, x, scale, shift), oracle(*(y.abs() for y in (grad_out, x, scale, shift)))
    leaves = [x.requires_grad_(), scale, shift]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task_scale_shift, "ROWS_PER_CHUNK", 32)
        patch.setattr(task_scale_shift, "PIXELS_PER_SUM", dict.fromkeys(task_scale_shift.PIXELS_PER_SUM, 16))
        y = ops.task_scale_shift(*leaves, task_ids)
        found = [y, *torch.autograd.grad(y, leaves, grad_out)]
    for actual, exact, size in zip(found, want, sizes, strict=True):
        cases.assert_within(actual, exact, bound(size, exact, 1e-6, actual.dtype))


# --- the cases


def _cases() -> Iterator[tuple[str, torch.dtype | None, Callable[[], None]]]:
    """Name, dtype of the kernels, and what runs them."""
    bind = functools.partial
    for dtype in (*DTYPES, F64):
        for case in (BankCase(3, 1501, dtype), BankCase(20, 1501, dtype), BankCase(9, 130, dtype, "transposed")):
            yield f"bank-{case}", dtype, bind(long_chunks, bind(check_surgery, case, dtype, 3))
        for case in (ListCase("nones", 3, dtype), ListCase("nones", 11, dtype)):
            yield f"lists-{case}", dtype, bind(check_surgery, case, dtype, 9)
    for dtype in DTYPES:
        d = cases.short(dtype)
        yield f"conv-staged-{d}", dtype, bind(check_layer, CONV.but(dtype=dtype), **STAGED)
        yield f"conv-fused-{d}", dtype, bind(check_layer, CONV.but(dtype=dtype), **FUSED)
        yield f"conv-strided-{d}", dtype, bind(check_layer, CONV.but(dtype=dtype, x_layout="contiguous", stride=(2, 1)))
        yield f"conv-packed-walk-{d}", dtype, bind(check_layer, PACKED.but(dtype=dtype), **STAGED)
        yield f"conv-packed-split-{d}", dtype, bind(check_layer, PACKED.but(dtype=dtype), **FUSED)
        for name, lora in (("odd", LORA), ("eights", LORA_EIGHTS)):
            yield f"lora-{name}-walk-{d}", dtype, bind(check_lora, lora.but(dtype=dtype), mode="walk")
            split = {"mode": "split", "split_rows": 64}
            yield f"lora-{name}-split-{d}", dtype, bind(check_lora, lora.but(dtype=dtype), **split)
        yield f"linear-staged-{d}", dtype, bind(check_layer, LINEAR.but(dtype=dtype), **STAGED)
        yield f"linear-fused-{d}", dtype, bind(check_layer, LINEAR.but(dtype=dtype), **FUSED)
        for name, layout in (("nchw", torch.contiguous_format), ("nhwc", torch.channels_last)):
            yield f"scale-shift-{name}-{d}", dtype, bind(check_scale_shift, (17, 20, 5, 7), layout, dtype)
        yield f"scale-shift-rows-{d}", dtype, bind(check_scale_shift, (70, 48), torch.contiguous_format, dtype)
    for ids_dtype in (torch.int64, torch.int32):
        for num_ids, num_tasks in ((37, 5), (1025, 3)):
            yield f"plan-{num_ids}-{cases.short(ids_dtype)}", ids_dtype, bind(check_plan, ids_dtype, num_ids, num_tasks)


CASES = {name: (dtype, run) for name, dtype, run in _cases()}


def check_sum(num_tasks: int) -> None:
    """PCGrad alone: one build of the Gram matrix with its solver, and one of the weighted sums."""
    case, order = BankCase(num_tasks, 700), cases.random_order(num_tasks)
    found, total = ops.pcgrad(case.make(), order).double(), cases.projected64(case).sum(0)
    error = cases.PCGRAD_TOLERANCE[F32] * cases.pcgrad_scale(cases.bank64(case), cases.projected64(case)).sum(0)
    cases.assert_within(found, total, error + cases.unit_roundoff(F32) * total.abs() * 1.001)


ALWAYS = {
    "gram": functools.partial(long_chunks, functools.partial(check_sum, 12)),
    "conv": functools.partial(check_forward, CONV.but(dtype=BF16), **STAGED),
}


@pytest.fixture(scope="module", params=SCHEDULES)
def launched(request: pytest.FixtureRequest) -> Iterator[list[Ran]]:
    if host.compiler() is None:
        skip_or_fail("no C++ compiler")
    with running(SCHEDULES[request.param]) as found:
        yield found


@pytest.mark.parametrize("launched", ["falling"], indirect=True)
@pytest.mark.parametrize("case", ALWAYS)
def test_ptx(case: str, launched: list[Ran]) -> None:
    launched.clear()
    ALWAYS[case]()
    assert launched


FOUND: set[tuple[str, torch.dtype | None]] = set()  # kernels that ran, and the dtype of the case


@only_in_aot
@pytest.mark.parametrize("case", CASES)
def test_every_case(case: str, launched: list[Ran]) -> None:
    launched.clear()
    dtype, run = CASES[case]
    run()
    FOUND.update((ran.name, dtype) for ran in launched)


@only_in_aot
def test_every_kernel_ran() -> None:
    wanted = {(target.fn.__name__, target.dtype) for target in build_targets()}
    assert len(wanted) >= 57
    assert wanted - FOUND == set()


# --- that faults are seen

WAITS_TWICE = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)
FAULTY = {"gram": "gram_product_kernel", "conv": "task_conv2d_fwd_kernel"}


def is_predicate(fault: Fault) -> bool:
    """Of an access that is made without its guard."""
    return fault.right.opcode in ("ld", "st", "cp") and fault.wrong is not None


def tried(case: str, kind: str) -> list[tuple[Fault, Outcome]]:
    """Faults of one kind in the kernel of a case: barriers left out and copies waited for too late, or predicates."""
    with running(host.REVERSE, FAULTY[case]) as launched:
        ALWAYS[case]()
        (ran,) = {id(ran.library): ran for ran in launched if ran.name == FAULTY[case]}.values()
        faults = [fault for fault in faults_in(ran.kernel, kind) if kind == ORDER or is_predicate(fault)]
        return [(fault, outcome(ran.library, fault, {case: ALWAYS[case]})) for fault in faults]


def unseen(found: list[tuple[Fault, Outcome]]) -> list[str]:
    return [str(fault) for fault, one in found if one.reached and not one.seen]


@pytest.fixture
def one_thread(threads: None) -> None:
    torch.set_num_threads(1)  # a forked process has no others


@pytest.mark.parametrize("case", FAULTY)
def test_faults_of_order_are_seen(case: str, one_thread: None) -> None:
    """All copies that are waited for too late. Triton begins some uses of shared memory with a barrier that another one
    makes superfluous, and may commit two groups that are waited for together: those may go. From 3.8 on it also waits
    for some groups twice."""
    found = tried(case, ORDER)
    late = [(fault, one) for fault, one in found if fault.right.modifiers[-1] == "wait_group"]
    if WAITS_TWICE:
        assert len(late) - len(unseen(late)) >= 2, unseen(late)
    else:
        assert len(late) == 2 and unseen(late) == []
    assert any(fault.right.opcode == "bar" and one.seen for fault, one in found)
    assert len(unseen(found)) <= (0.5 if WAITS_TWICE else 0.25) * len(found), unseen(found)


@pytest.mark.parametrize("case", FAULTY)
def test_removed_predicates_are_seen(case: str, one_thread: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the stores of results, which then meet in a neighbour's row. A load that is made without its guard often only
    reads what nobody uses, or what happens to lie beside a tensor."""
    found = tried(case, CONTROL)
    if ALL:
        with capsys.disabled():
            print(f"\n{case}: {len(found)} tried, {len(unseen(found))} not seen", *unseen(found), sep="\n  ")
    last = max((fault.right.line, one.seen) for fault, one in found if fault.right.opcode == "st")
    assert last[1], "results stored without a guard"
