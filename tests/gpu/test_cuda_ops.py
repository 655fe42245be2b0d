"""The shared table on CUDA tensors, by CUDA C++, Triton and the plain torch reference; streams, graphs, no waiting."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import cases
import pytest
import torch
from cases import BANK_CASES, FEW_BANKS, FEW_LISTS, LIST_CASES, OPCHECK_SAMPLES, BankCase, ListCase
from torch import Tensor

import fastmtl
from fastmtl import _backend
from fastmtl.ops import (
    combine,
    gram,
    order_state,
    pcgrad,
    pcgrad_coefficients,
    pcgrad_project,
    random_order,
    reference,
)
from fastmtl.ops._rows import bank_rows
from fastmtl.ops.order import Draw, drawn_order
from fastmtl.ops.pcgrad import operate_rows

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
NAMES = ("reference", "cuda", "triton", None)
SMALLEST = {dtype: 2.0**-25 if dtype == torch.float16 else 0.0 for dtype in cases.DTYPES}
# op -> where its implementations are listed
TABLES = {
    "gram": ("gram", "_BANK"),
    "combine": ("combine", "_BANK"),
    "pcgrad_coefficients": ("pcgrad", "_COEFFICIENTS"),
    "pcgrad": ("pcgrad", "_FUSED"),
}
# a kernel for every number of tasks, long enough for several groups of partial sums; an odd length misaligns rows
LONG_BANKS = [
    *(BankCase(t, p) for t in (1, 2, 4, 7, 8, 13, 16, 17, 32, 40, 50, 64, 65, 100, 128) for p in (300_032, 300_001)),
    *(BankCase(t, 300_032, d) for t in (2, 8, 16, 40, 64, 100) for d in cases.DTYPES if d != torch.float32),
]


def _kernels(op: str) -> set[str]:
    module, name = TABLES[op]
    table = getattr(sys.modules[f"fastmtl.ops.{module}"], name)
    return set(table["pcgrad"] if name == "_FUSED" else table)


@pytest.fixture(params=NAMES, ids=str)
def forced(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """Each backend in turn; None: the one that the package chooses."""
    name = request.param
    if name is not None and (reason := _backend.unavailable(name, DEVICE)) is not None:
        pytest.skip(reason)
    yield name


def by_backend(table: Sequence[Any], few: Sequence[Any] = ()) -> pytest.MarkDecorator:
    """Each case on each backend. Triton compiles for seconds per kernel: only a few of its cases are not slow."""
    combinations = [
        pytest.param(case, name, id=f"{case}-{name}", marks=[pytest.mark.slow] if name == "triton" and _is_slow else [])
        for case in table
        for name in NAMES
        for _is_slow in [case not in few]
    ]
    return pytest.mark.parametrize(("case", "forced"), combinations, indirect=["forced"])


def use(op: str, name: str | None) -> Any:
    """Forces the backend, or skips where it has no kernel for the op."""
    if name is None:
        return nullcontext()
    if name not in _kernels(op):
        pytest.skip(f"{name} has no kernel for {op}")
    return fastmtl.use_backend(name)


def served_by(name: str | None) -> str:
    """The backend that serves a call: the forced one, or the one that the package must choose."""
    if name is not None:
        return name
    return next((b for b in ("cuda", "triton") if _backend.unavailable(b, DEVICE) is None), "reference")


def slack(forced: str | None, case: BankCase | ListCase | None = None) -> float:
    return cases.gram_slack(served_by(forced), case)


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


def tensors_in(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    return [x for y in found if y is not None for x in tensors_in(y)]


def assert_same_bits(found: Any, expected: Any) -> None:
    for x, y in zip(tensors_in(found), tensors_in(expected), strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


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


# --- random orders

ORDER_TASKS = (1, 2, 8, 17, 50, 128)


@pytest.mark.parametrize("num_tasks", ORDER_TASKS)
def test_drawn_orders_are_those_of_the_cpu(num_tasks: int, forced: str | None) -> None:
    """For a seed of torch's generator, a state, both at once, and lists: the bits of a call with that order given."""
    grads = BankCase(num_tasks, 1000).make(DEVICE)
    lists = [[row[:333].clone(), row[333:].clone()] for row in grads]
    with use("pcgrad", forced):
        for form in (grads, lists):
            for call in (pcgrad, pcgrad_project):
                torch.manual_seed(5)
                order = random_order(num_tasks)
                assert order.device.type == "cpu"
                torch.manual_seed(5)
                assert_same_bits(call(form), call(form, order.to(DEVICE)))
                torch.manual_seed(5)
                assert_same_bits(random_order(num_tasks, device=DEVICE).cpu(), order)
        state, twin = order_state(-7, device=DEVICE), order_state(-7)
        for count in range(1, 4):
            order = random_order(num_tasks, generator=twin)
            assert_same_bits(pcgrad(grads, generator=state), pcgrad(grads, order.to(DEVICE)))
            assert state.tolist() == twin.tolist() == [-7, count]
        # a key of the host's and a state, as in a captured graph
        rows, out = bank_rows(grads), [torch.empty_like(grads[0])]
        order = drawn_order(Draw(2**62 + 3, twin), num_tasks, torch.device("cpu"))
        operate_rows(rows, None, Draw(2**62 + 3, state), out)
        assert_same_bits(out[0], pcgrad(grads, order.to(DEVICE)))
        assert state.tolist() == twin.tolist()


@pytest.mark.parametrize(("num_tasks", "key"), [(20, 84120), (50, 84120), (128, 1136), (128, 21465)])
def test_drawn_orders_of_equal_halves(num_tasks: int, key: int, forced: str | None) -> None:
    """Keys of which a row draws two numbers with the same upper half, as tests/test_cuda_on_host.py makes sure."""
    grads = BankCase(num_tasks, 1000).make(DEVICE)
    order = drawn_order(Draw(key, None), num_tasks, torch.device("cpu"))
    out = [torch.empty_like(grads[0])]
    with use("pcgrad", forced):
        operate_rows(bank_rows(grads), None, Draw(key, None), out)
        assert_same_bits(out[0], pcgrad(grads, order.to(DEVICE)))


def test_order_of_a_generator_on_the_device(forced: str | None) -> None:
    grads = BankCase(9, 1000).make(DEVICE)
    with use("pcgrad", forced):
        found = pcgrad(grads, generator=torch.Generator(DEVICE).manual_seed(3))
        again = torch.randint(0, (1 << 63) - 1, (2,), generator=torch.Generator(DEVICE).manual_seed(3), device=DEVICE)
        order = drawn_order(Draw(0, again.cpu()), 9, torch.device("cpu"))
        assert_same_bits(found, pcgrad(grads, order.to(DEVICE)))


def test_orders_differ(forced: str | None) -> None:
    """Four tasks of which every two conflict: the coefficients tell the orders apart."""
    m = torch.full((4, 4), -0.5).fill_diagonal_(1.6)
    rows, state = bank_rows(torch.linalg.cholesky(m).to(DEVICE)), order_state(1, device=DEVICE)
    seen = set()
    with use("pcgrad", forced):
        for _ in range(12):
            out = [torch.empty(4, 4, device=DEVICE)]
            _, c = operate_rows(rows, None, Draw(0, state), out, project=True)
            seen.add(tuple(c.flatten().tolist()))
    assert len(seen) > 6 and int(state[1]) == 12


def test_absent_tasks_and_mean(forced: str | None) -> None:
    """As `PCGrad.operate` calls it: weights of the present tasks alone."""
    grads = BankCase(6, 1000).make(DEVICE)
    present = [True, False, True, True, False, True]
    grads[[1, 4]] = 0.0
    order = cases.random_order(6)
    for mean in (False, True):
        out = [torch.empty_like(grads[0])]
        with use("pcgrad", forced):
            m, w = operate_rows(bank_rows(grads), order.to(DEVICE), Draw(0, None), out, mean=mean, present=present)
        c = reference.pcgrad_coefficients(reference.gram(grads.cpu().double()), order)
        expected = c[torch.tensor(present)].sum(0) / (4 if mean else 1)
        expected[[1, 4]] = 0.0
        torch.testing.assert_close(w.cpu(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out[0].cpu().double(), expected @ grads.cpu().double(), rtol=1e-4, atol=1e-3)
        cases.assert_gram(m, grads.cpu().double(), [torch.float32], slack(forced))


@pytest.mark.parametrize("num_tasks", [3, 40])
def test_nothing_to_read_still_draws(num_tasks: int, forced: str | None) -> None:
    """P = 0, and lists of empty tensors: the order is drawn and the state advanced all the same."""
    state = order_state(2, device=DEVICE)
    bank = torch.zeros(num_tasks, 0, device=DEVICE)
    empty = [[torch.zeros(0, 3, device=DEVICE)] for _ in range(num_tasks)]
    with use("pcgrad", forced):
        assert pcgrad(bank, generator=state).shape == (0,)
        assert pcgrad_project(bank, generator=state).shape == (num_tasks, 0)
        assert pcgrad(empty, generator=state)[0].shape == (0, 3)
        assert torch.equal(gram(bank), torch.zeros(num_tasks, num_tasks, device=DEVICE))
    assert int(state[1]) == 3


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


def kernels_launched(call: Callable[[], Any]) -> list[str]:
    """What one call has the device do, by name; copies and fills included."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    found = [event for event in recorded.events() if event.device_type == DeviceType.CUDA]
    return [event.name for event in sorted(found, key=lambda event: event.time_range.start)]


@pytest.mark.parametrize("form", ["drawn", "given", "state", "lists"])
@pytest.mark.parametrize("num_tasks", [8, 50])
def test_two_launches(num_tasks: int, form: str, forced: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if served_by(forced) == "reference":
        pytest.skip("the reference is plain torch")
    # filling what torch.empty gives is a launch too
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    grads: Any = BankCase(num_tasks, 100_000).make(DEVICE)
    out: Any = torch.empty_like(grads[0])
    options: dict[str, Any] = {}
    if form == "given":
        options["order"] = cases.random_order(num_tasks).to(DEVICE)
    if form == "state":
        options["generator"] = order_state(0, device=DEVICE)
    if form == "lists":
        grads = [list(row.split((64, 90_000, 9_936))) for row in grads]
        out = list(out.split((64, 90_000, 9_936)))
    with use("pcgrad", forced):
        for _ in range(2):
            pcgrad(grads, out=out, **options)
        launched = kernels_launched(lambda: pcgrad(grads, out=out, **options))
    assert len(launched) == 2, launched
    assert "gram" in launched[0] and "combine" in launched[1]


def test_runs_on_the_current_stream(forced: str | None) -> None:
    grads = torch.zeros(3, 70000, device=DEVICE)
    values = BankCase(3, 70000).make(DEVICE)
    weights = torch.ones(3, device=DEVICE)
    order = cases.random_order(3).to(DEVICE)
    stream = torch.cuda.Stream()
    with use("combine", forced):
        expected = combine(weights, values), gram(values), pcgrad(values, order)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            # long enough for a kernel on another stream to read the zeros first
            torch.cuda._sleep(50_000_000)
            grads.copy_(values)
            found = combine(weights, grads), gram(grads), pcgrad(grads, order)
        stream.synchronize()
    assert_same_bits(found, expected)


def test_several_streams_at_once(forced: str | None) -> None:
    """The counters of arriving blocks are a stream's own."""
    banks = [BankCase(8, 300_000 + 64 * k).make(DEVICE) for k in range(4)]
    order = cases.random_order(8).to(DEVICE)
    streams = [torch.cuda.Stream() for _ in banks]
    with use("pcgrad", forced):
        expected = [pcgrad(bank, order) for bank in banks]
        torch.cuda.synchronize()
        found: list[list[Tensor]] = [[] for _ in banks]
        for _ in range(20):
            for k, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    found[k].append(pcgrad(banks[k], order))
        torch.cuda.synchronize()
    for mine, one in zip(found, expected, strict=True):
        for x in mine:
            assert_same_bits(x, one)


def test_two_threads_on_two_streams(forced: str | None) -> None:
    lists = [[[row[:1000], row[1000:]] for row in BankCase(5, 90_000 + 64 * k).make(DEVICE)] for k in range(2)]
    order = cases.random_order(5).to(DEVICE)
    errors: list[BaseException] = []

    def work(k: int, expected: Any) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(30):
                    found = pcgrad(lists[k], order)
                    torch.cuda.current_stream().synchronize()
                    assert_same_bits(found, expected)
        except BaseException as error:
            errors.append(error)

    with use("pcgrad", forced):
        expected = [pcgrad(grads, order) for grads in lists]
        torch.cuda.synchronize()
        threads = [threading.Thread(target=work, args=(k, expected[k])) for k in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors, errors


def captured(call: Callable[[], Any], stream: torch.cuda.Stream | None = None) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of the call, and its result's memory; after two calls outside of it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = call()
    return graph, result


@pytest.mark.parametrize("form", ["bank", "lists"])
@pytest.mark.parametrize("num_tasks", [8, 40])
def test_graph_with_other_gradients(num_tasks: int, form: str, forced: str | None) -> None:
    grads = BankCase(num_tasks, 20_000).make(DEVICE)
    lists = [list(row.split((7, 12_000, 7_993))) for row in grads]
    order = cases.random_order(num_tasks).to(DEVICE)
    weights = cases.random_weights((num_tasks,)).to(DEVICE)
    given: Any = grads if form == "bank" else lists

    def call() -> Any:
        return gram(given), combine(weights, given), pcgrad(given, order), pcgrad_project(given, order)

    with use("pcgrad", forced):
        graph, result = captured(call)
        for _ in range(3):
            grads.copy_(torch.randn_like(grads))
            graph.replay()
            assert_same_bits(result, call())


def test_every_replay_draws_another_order(forced: str | None) -> None:
    """Of torch's generator (a counter of the graph's own), of a state, and of `random_order` itself."""
    grads = BankCase(8, 20_000).make(DEVICE)
    state = order_state(11, device=DEVICE)
    with use("pcgrad", forced):
        for call in (
            lambda: pcgrad_project(grads),
            lambda: pcgrad_project(grads, generator=state),
            lambda: random_order(8, device=DEVICE),
        ):
            graph, result = captured(call)
            found = []
            for _ in range(6):
                graph.replay()
                found.append(tuple(result.flatten().tolist()))
            assert len(set(found)) >= 5
        state.copy_(order_state(11))
        graph, result = captured(lambda: pcgrad(grads, generator=state))
        state[1].fill_(40)
        for count in range(40, 44):
            order = drawn_order(Draw(0, torch.tensor([11, count])), 8, torch.device("cpu"))
            graph.replay()
            assert_same_bits(result, pcgrad(grads, order.to(DEVICE)))
        assert state.tolist() == [11, 44]


def test_graphs_beside_each_other(forced: str | None) -> None:
    """Several graphs replayed at once on different streams, and eager calls beside them."""
    if served_by(forced) == "reference":
        pytest.skip(
            "graphs of plain torch hang beside each other: those captured on one stream share cuBLAS's workspace"
        )
    banks = [BankCase(8, 300_000 + 64 * k).make(DEVICE) for k in range(4)]
    order = cases.random_order(8).to(DEVICE)
    streams = [torch.cuda.Stream() for _ in banks]
    with use("pcgrad", forced):
        expected = [pcgrad(bank, order) for bank in banks]
        graphs = [captured(lambda bank=bank: pcgrad(bank, order)) for bank in banks]
        torch.cuda.synchronize()
        wrong = [torch.zeros((), dtype=torch.int64, device=DEVICE) for _ in banks]
        for _ in range(20):
            for k, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    graphs[k][0].replay()
                    wrong[k] += (graphs[k][1] != expected[k]).sum()
            assert_same_bits(pcgrad(banks[0], order), expected[0])
        torch.cuda.synchronize()
    assert [int(x) for x in wrong] == [0, 0, 0, 0]


@pytest.mark.parametrize("num_params", [3, 161, 700])
def test_tables_in_one_graph(num_params: int, forced: str | None) -> None:
    """Each call's table goes back to the graph's pool, where the next one may find it; eager calls keep theirs."""
    if served_by(forced) == "reference":
        pytest.skip("the reference has no tables")
    banks = [BankCase(8, num_params * 67).make(DEVICE) for _ in range(3)]
    lists = [[list(row.split(67)) for row in bank] for bank in banks]
    weights = cases.random_weights((8,)).to(DEVICE)
    order = cases.random_order(8).to(DEVICE)

    def call() -> list[Any]:
        return [(gram(one), combine(weights, one), pcgrad(one, order)) for one in [*lists, lists[0]]]

    with use("pcgrad", forced):
        graph, result = captured(call, torch.cuda.Stream())
        for _ in range(3):
            for bank in banks:
                bank.copy_(torch.randn_like(bank))
            graph.replay()
            assert_same_bits(result, call())
            # after what was kept has been written over: more tables than a stream keeps
            for k in range(40):
                combine(weights, [row[k % num_params :] for row in lists[k % 3]])
            graph.replay()
            assert_same_bits(result, call())


def run_python(script: str, **environment: str) -> list[str]:
    """The lines that a new process prints; `cases` and this package as here."""
    path = os.pathsep.join([os.path.dirname(cases.__file__), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path, "FASTMTL_BACKEND": "cuda", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout.splitlines()


FIRST_IN_A_CAPTURE = """
import torch
from cases import BankCase, random_order
from fastmtl.ops import pcgrad

bank = BankCase(8, 300_032).make("cuda")
given = [list(row.split(1875)) for row in bank] if FORM == "lists" else bank
order = random_order(8).to("cuda")
flat = lambda x: torch.cat([y.flatten() for y in x]) if isinstance(x, list) else x
side, other = torch.cuda.Stream(), torch.cuda.Stream()
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph, stream=side, capture_error_mode=MODE):
    result = pcgrad(given, order)
# a replay and an eager call at once, on two streams, before either has run
with torch.cuda.stream(other):
    graph.replay()
found = pcgrad(given, order)
torch.cuda.synchronize()
print(torch.equal(flat(result), flat(found)), bool(flat(found).isfinite().all()))
for _ in range(20):
    bank.copy_(torch.randn_like(bank))
    graph.replay()
    if not torch.equal(flat(result), flat(pcgrad(given, order))):
        print("differs")
"""


@pytest.mark.parametrize("mode", ["global", "thread_local"])
@pytest.mark.parametrize("form", ["bank", "lists"])
def test_the_first_call_is_captured(form: str, mode: str) -> None:
    """On a stream of its own, in a new process: nothing was made before, and nothing can be made on that stream."""
    if (reason := _backend.unavailable("cuda", DEVICE)) is not None:
        pytest.skip(reason)
    assert run_python(f"FORM, MODE = {form!r}, {mode!r}\n{FIRST_IN_A_CAPTURE}") == ["True True"]


KEPT_MEMORY = """
import torch
from cases import BankCase, random_order
from fastmtl.ops import combine, gram, pcgrad

bank = BankCase(8, 300_032).make("cuda")
lists = [list(row.split(1875)) for row in bank]
order = random_order(8).to("cuda")
weights = torch.ones(8, device="cuda")
torch.cuda.synchronize()
before = torch.cuda.memory_allocated()
for given in (bank, lists):
    gram(given), combine(weights, given), pcgrad(given, order)
print(torch.cuda.memory_allocated() - before)
"""


def test_nothing_is_kept_in_torchs_memory() -> None:
    """What outlives a call must not lie in a pool that torch.compile's graphs, warming up, may write over."""
    if (reason := _backend.unavailable("cuda", DEVICE)) is not None:
        pytest.skip(reason)
    assert run_python(KEPT_MEMORY) == ["0"]


SAME_BITS = """
import torch
from cases import BankCase, ListCase, random_order
from fastmtl.ops import pcgrad, pcgrad_project

def tensors(x):
    return [x] if isinstance(x, torch.Tensor) else [z for y in x for z in tensors(y)]

def show(name, x):
    total = 0
    for y in tensors(x):
        # a tensor's bytes, each times a number of its own
        byte = y.flatten().view(torch.uint8).to(torch.int64)
        total = total * 31 + int((byte * (torch.arange(byte.numel(), device="cuda") % 1_000_003 + 1)).sum())
    print(name, total % (1 << 64), flush=True)

def steps(bank, order, count):
    # each step reads what the last one's combine wrote, and writes what it still read
    for k in range(count):
        bank[k % len(bank)].copy_(0.3 * pcgrad(bank, order))

for T in (2, 8, 9, 17, 40, 64, 100):
    for P, dtype in ((1000, "float32"), (100_000, "float32"), (300_001, "float32"), (100_000, "bfloat16")):
        case = BankCase(T, P, getattr(torch, dtype))
        order = random_order(T).to("cuda")
        bank = case.make("cuda")
        show(f"{case} once", [pcgrad(bank, order), pcgrad_project(bank, order)])
        steps(bank, order, 20)
        show(f"{case} steps", bank)
        row = bank.clone()
        pcgrad(row, order, out=row[1])
        show(f"{case} in place", row)
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.graph(graph, stream=side):
            steps(bank, order, 4)
        for _ in range(5):
            graph.replay()
        show(f"{case} graph", bank)
for case in (ListCase("nones", 5), ListCase("mixed_dtypes", 19), ListCase("many", 12), ListCase("large", 8)):
    made, order = case.make("cuda"), random_order(case.num_tasks).to("cuda")
    for _ in range(20):
        found = pcgrad(made, order)
    show(str(case), found)
"""


def test_early_launches_give_the_same_bits() -> None:
    """The combine kernel begins while the Gram kernel still solves, unless FASTMTL_PDL=0."""
    if (reason := _backend.unavailable("cuda", DEVICE)) is not None:
        pytest.skip(reason)
    expected = run_python(SAME_BITS, FASTMTL_PDL="0")
    assert len(expected) == 7 * 4 * 4 + 4
    for _ in range(3):
        assert run_python(SAME_BITS, FASTMTL_PDL="1") == expected


OVERLAP = """
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from cases import BankCase, random_order
from fastmtl.ops import pcgrad

bank, order = BankCase(128, 100_000).make("cuda"), random_order(128).to("cuda")
for _ in range(3):
    pcgrad(bank, order)
torch.cuda.synchronize()
with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
    pcgrad(bank, order)
    torch.cuda.synchronize()
events = {("gram" if "gram" in e.name else "combine"): e.time_range
          for e in recorded.events() if e.device_type == DeviceType.CUDA and "_kernel" in e.name}
print(events["combine"].start < events["gram"].end)
"""


@pytest.mark.parametrize("early", [False, True])
def test_launches_are_early_if_asked(early: bool) -> None:
    """The T x T problem of 128 tasks takes hundreds of microseconds: time enough for the next launch to begin."""
    if (reason := _backend.unavailable("cuda", DEVICE)) is not None:
        pytest.skip(reason)
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("before sm_90 a launch waits for the one in front")
    assert run_python(OVERLAP, FASTMTL_PDL=str(int(early)))[-1] == str(early)


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
