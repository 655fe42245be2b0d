"""Streams, threads and CUDA graphs: tickets, pointer tables and memory are a stream's or a graph's own."""

from __future__ import annotations

import threading
from typing import Any

import cases
import cases_cuda
import pytest
import torch
from cases import BankCase
from cases_cuda import (
    DEVICE,
    assert_same_bits,
    captured,
    run_python,
    served_by,
    use,
)
from torch import Tensor

from fastmtl.core import dispatch
from fastmtl.ops import (
    combine,
    gram,
    order_state,
    pcgrad,
    pcgrad_project,
    random_order,
)
from fastmtl.ops.gradients.order import Draw, drawn_order

pytestmark = pytest.mark.gpu
forced = cases_cuda.forced


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
    if (reason := dispatch.unavailable("cuda", DEVICE)) is not None:
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
    if (reason := dispatch.unavailable("cuda", DEVICE)) is not None:
        pytest.skip(reason)
    assert run_python(KEPT_MEMORY) == ["0"]
