"""What launchers keep between launches: no kernel runs here, on no device."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from fastmtl.benchmarks.gpu import host_time
from fastmtl.core.task_weights import STILL, SortedBatch, TaskConvCall, TaskWeights, empty_gradients
from fastmtl.kernels.common import launches
from fastmtl.kernels.task_weights import configs, operands
from fastmtl.kernels.task_weights import conv_launchers as launchers


def in_threads(work: Callable[[int], None], count: int = 4) -> list[BaseException]:
    """What went wrong in threads that start together and take turns at every line of the launching module."""
    failed: list[BaseException] = []
    together = threading.Barrier(count)

    def give_way(frame: Any, event: str, arg: Any) -> Any:
        if event == "line":
            time.sleep(0)
        return give_way if frame.f_code.co_filename == launches.__file__ else None

    def run(k: int) -> None:
        together.wait()
        sys.settrace(give_way)
        try:
            work(k)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failed


def test_tables_of_threads_that_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    # two tables are in use and one is kept, so that each thread throws away what another has just found
    monkeypatch.setattr(launches, "TABLES_KEPT", 1)
    monkeypatch.setattr(launches, "_written_by_launches", lambda values, device: torch.tensor(values))
    lists = [[torch.zeros(1)], [torch.zeros(1), torch.zeros(1)]]
    wrong: list[Tensor] = []

    def work(k: int) -> None:
        for i in range(200):
            tensors = lists[(i + k) % 2]
            table = launches.pointer_table(tensors)
            if table.tolist() != [x.data_ptr() for x in tensors]:
                wrong.append(table)

    assert in_threads(work) == [] and wrong == []


def test_tickets_of_threads_that_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    # in captures of several threads: the last that was made beforehand must not be taken twice
    monkeypatch.setattr(launches, "TICKETS_PER_BATCH", 4)
    monkeypatch.setattr(launches, "capturing", lambda device: True)
    device = torch.device("cpu")
    for _ in range(50):
        tickets = launches._Tickets()
        tickets.prepare(device)
        taken: list[Tensor] = []
        assert in_threads(lambda k, t=tickets, to=taken: to.extend(t.take(device, 1) for _ in range(2))) == []
        assert len({ticket.data_ptr() for ticket in taken}) == len(taken) == 8


def test_one_ticket_for_a_stream() -> None:
    device = torch.device("cpu")
    for _ in range(50):
        tickets = launches._Tickets()
        taken: list[Tensor] = []
        assert in_threads(lambda k, t=tickets, to=taken: to.append(t.take(device, 1))) == []
        assert len({ticket.data_ptr() for ticket in taken}) == 1


# --- 64-bit offsets


def recorded(weight: Tensor, delta: Any, x: Tensor, backward: bool = True) -> list[launches.Launch]:
    """The launches of a layer on the meta device, forward and backward."""
    listed = not isinstance(delta, Tensor)
    deltas = list(delta) if listed else [delta]
    tasks = list(range(len(deltas))) if listed else []
    num_tasks = len(deltas) if listed else delta.shape[0]
    gate = torch.empty(num_tasks, device="meta")
    order = torch.empty(x.shape[0], dtype=torch.int64, device="meta")
    offsets = torch.empty(num_tasks + 1, dtype=torch.int64, device="meta")
    call = TaskConvCall(TaskWeights(weight, deltas, tasks, gate), SortedBatch(order, offsets), STILL, None)
    with launches.recording() as made:
        y = launchers.conv2d(x, call)
        if backward:
            wanted = [True, weight is not None, True, False]
            launchers.conv2d_backward(y, x, call, wanted, list(range(len(deltas))))
    return made


def int64_offsets(made: list[launches.Launch]) -> dict[str, bool]:
    return {one.fn.__name__: one.arguments["INT64_OFFSETS"] for one in made if "INT64_OFFSETS" in one.arguments}


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


# a filter has 2^30 elements, twice which is the first number past 32 bits; or one row less
@pytest.mark.parametrize(("features", "expected"), [(2**15, True), (2**15 - 1, False)])
@pytest.mark.parametrize("schedule", ["staged", "fused"])
@pytest.mark.parametrize("mode", ["walk", "split"])
@pytest.mark.parametrize("held", ["list", "stacked"])
def test_filters_past_32_bits(held: str, mode: str, schedule: str, features: int, expected: bool) -> None:
    shape = (features, 2**15, 1, 1)
    delta = [meta(*shape), meta(*shape)] if held == "list" else meta(2, *shape)
    with configs.force(schedule=schedule, mode=mode):
        found = int64_offsets(recorded(meta(*shape), delta, meta(4, 2**15, 1, 1)))
    assert {"task_conv2d_fwd_kernel", "task_conv2d_dgrad_kernel"} < set(found)
    assert found == dict.fromkeys(found, expected)


def test_workspace_of_an_expanded_filter_past_32_bits() -> None:
    # the filter reaches over one row of memory, its copies do not
    weight, shape = meta(1, 2**15, 1, 1).expand(2**15, -1, -1, -1), (2**15, 2**15, 1, 1)
    deltas = [meta(1, 2**15, 1, 1).expand(shape)] * 2
    with configs.force(schedule="staged"):
        found = int64_offsets(recorded(weight, deltas, meta(4, 2**15, 1, 1), backward=False))
    assert found == {"stage_kernel": True, "task_conv2d_fwd_kernel": True}


@pytest.mark.parametrize(("width", "expected"), [(2**14 + 1, True), (2**14, False)])
def test_samples_past_32_bits(width: int, expected: bool) -> None:
    # one sample of 2^30 elements and some more, or not; how many there are does not matter
    x = torch.empty((4, 64, 2**10, width), dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)
    found = int64_offsets(recorded(meta(64, 64, 1, 1), meta(2, 64, 64, 1, 1), x))
    assert found.pop("stage_kernel", False) is False
    assert {"task_conv2d_fwd_kernel", "task_conv2d_dgrad_kernel"} < set(found)
    assert found == dict.fromkeys(found, expected)


# --- launches of a build directly


@triton.jit(do_not_specialize=["count"])
def some_kernel(p_x, p_y, count, stride, other, SIZE: tl.constexpr):
    tl.store(p_x + count * stride + other, SIZE)


def by_triton(launched: list[host_time.Launched]) -> list[Any]:
    """What the driver gets in the end: builds by what they are specialised to, and addresses in place of tensors."""
    return [
        (
            made.kernel.name,
            made.kernel.src.signature,
            made.kernel.src.attrs,
            made.grid,
            *(x.data_ptr() if isinstance(x, Tensor) else x for x in made.arguments),
        )
        for made in launched
    ]


def test_a_build_is_launched_as_triton_would_launch_it() -> None:
    memory = torch.zeros(64)
    same = {"count": 3, "stride": 16, "other": 1, "SIZE": 4}
    pointers = [memory, memory[4:], memory[1:], memory[:0], memory.half(), memory.half()[1:], None]
    pairs = [(x, y) for x in pointers[:-1] for y in pointers] * 2
    with host_time.stubbed(record=True) as direct:
        prepared = launches.Prepared(some_kernel, (2, 3), 8, 2, **same)
        for x, y in pairs:
            prepared(p_x=x, p_y=y)
        kept = len(prepared._builds)
    with host_time.stubbed(record=True) as bound:
        for x, y in pairs:
            some_kernel[(2, 3)](p_x=x, p_y=y, **same, num_warps=8, num_stages=2, maxnreg=None)
    assert by_triton(direct) == by_triton(bound)
    # two dtypes, whether aligned; for the second, whether there is one
    assert kept == 4 * 5 and len(direct) == len(pairs)
    # without tensors: Triton has not bound what is launched directly
    assert all(not isinstance(x, Tensor) for made in direct[len(pairs) // 2 :] for x in made.arguments)


def test_numbers_that_are_not_specialised() -> None:
    x = torch.zeros(1)
    with host_time.stubbed(record=True) as direct:
        prepared = launches.Prepared(some_kernel, (1,), stride=16, other=1, SIZE=4)
        for count in (3, 1, 16, 2**40, 3, 2**40):
            prepared(p_x=x, p_y=None, count=count)
        assert len(prepared._builds) == 2
    with host_time.stubbed(record=True) as bound:
        for count in (3, 1, 16, 2**40, 3, 2**40):
            some_kernel[(1,)](x, None, count, 16, 1, 4, num_warps=4, num_stages=1, maxnreg=None)
    assert by_triton(direct) == by_triton(bound)


def test_an_empty_grid_launches_nothing() -> None:
    with host_time.stubbed(record=True) as launched:
        launches.Prepared(some_kernel, (0, 3), count=3, stride=16, other=1, SIZE=4)(p_x=torch.zeros(1), p_y=None)
    assert launched == []


def test_hooks_of_a_kernel_are_called() -> None:
    called = []
    with host_time.stubbed(record=True) as launched:
        prepared = launches.Prepared(some_kernel, (1,), count=3, stride=16, other=1, SIZE=4)
        prepared(p_x=torch.zeros(1), p_y=None)
        some_kernel.add_pre_run_hook(lambda *args, **kwargs: called.append(kwargs["count"]))
        try:
            prepared(p_x=torch.zeros(1), p_y=None)
        finally:
            some_kernel.pre_run_hooks.clear()
    assert called == [3] and len(launched) == 2


@pytest.mark.parametrize("layer", host_time.layers(), ids=lambda layer: layer.name)
def test_layers_are_launched_as_triton_would_launch_them(
    layer: host_time.Layer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step() -> None:
        y = layer.run()
        torch.autograd.grad(y, layer.leaves, torch.zeros_like(y))

    def kinds(launched: list[host_time.Launched]) -> list[Any]:
        # memory that a call takes lies elsewhere in the next
        shapes = [
            [isinstance(kind, str) and kind.startswith("*") for kind in made.kernel.src.signature.values()]
            for made in launched
        ]
        return [
            (*entry[:4], *(None if pointer else x for pointer, x in zip(shape, entry[4:], strict=True)))
            for entry, shape in zip(by_triton(launched), shapes, strict=True)
        ]

    with host_time.stubbed(record=True) as direct:
        step()
        first = len(direct)
        step()
    monkeypatch.setattr(torch.version, "hip", "on AMD builds are not kept")
    with host_time.stubbed(record=True) as bound:
        step()
    again = direct[first:]
    # a table of addresses is written where they are new
    tables = [made for made in bound if made.kernel.name == "pointer_table_kernel"]
    expected = [each for each in kinds(bound) if each[0] != "pointer_table_kernel"]
    assert [each for each in kinds(again) if each[0] != "pointer_table_kernel"] == expected
    assert len(expected) >= 4 * host_time.DEPTH and len(tables) == 2 * host_time.DEPTH


def test_plans_are_forgotten_where_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "PLANS_KEPT", 3)
    with launches.forgetting():
        for k in range(10):
            assert launches.planned(k % 5, lambda k=k: [k]) == [k]
            assert len(launches._plans) <= 3
        assert launches.planned(4, lambda: ["another"]) == [9]


# --- memory of gradients


def test_gradients_of_a_list_lie_in_one_allocation() -> None:
    deltas = [torch.randn(5, 3, 3, 3).contiguous(memory_format=torch.channels_last) for _ in range(3)]
    weights = TaskWeights(None, deltas, [0, 1, 2], None)
    together = operands.memory_together(weights, [0, 1, 2], 3)
    x = torch.randn(2, 3, 4, 4)
    order, offsets = torch.zeros(2, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    call = TaskConvCall(weights, SortedBatch(order, offsets), STILL, None)
    found = empty_gradients(x, call, [False] * 4, [0, 1, 2], together)
    alone = empty_gradients(x, call, [False] * 4, [0, 1, 2])
    assert [g.stride() for g in found] == [g.stride() for g in alone] == [d.stride() for d in deltas]
    assert len({g.untyped_storage().data_ptr() for g in found}) == 1
    ends = [g.data_ptr() + 4 * g.numel() for g in found]
    assert all((g.data_ptr() - found[0].data_ptr()) % 128 == 0 for g in found)
    assert all(end <= g.data_ptr() for end, g in zip(ends, found[1:], strict=False))


def test_gradients_that_need_a_table_have_one() -> None:
    deltas = [torch.randn(5, 3, 3, 3) for _ in range(3)]
    odd = [*deltas[:2], deltas[2].contiguous(memory_format=torch.channels_last)]
    # not all are wanted, not every task has one, one is of another memory order, they are stacked
    assert operands.memory_together(TaskWeights(None, deltas, [0, 1, 2], None), [0, 2], 3) is None
    assert operands.memory_together(TaskWeights(None, deltas, [0, 1, 3], None), [0, 1, 2], 4) is None
    assert operands.memory_together(TaskWeights(None, odd, [0, 1, 2], None), [0, 1, 2], 3) is None
    assert operands.memory_together(TaskWeights(None, [torch.stack(deltas)], [], None), [0], 3) is None


# --- the memory order of results


@pytest.mark.parametrize(("channels", "through"), [(8, True), (7, False)])
def test_pictures_without_channels_last_are_copied_into_place(channels: int, through: bool) -> None:
    x = torch.empty(4, channels, 6, 6, dtype=torch.bfloat16, device="meta")
    made = recorded(meta(channels, channels, 1, 1), meta(2, channels, channels, 1, 1), x)
    strides = {
        each.fn.__name__: (each.arguments["y_c"], each.arguments["x_c"])
        for each in made
        if each.fn.__name__ in ("task_conv2d_fwd_kernel", "task_conv2d_dgrad_kernel")
    }
    assert strides == dict.fromkeys(strides, (1, 1) if through else (36, 36)) and len(strides) == 2
