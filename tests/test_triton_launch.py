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

from fastmtl.kernels import _launch, configs
from fastmtl.kernels import task_conv2d as launchers
from fastmtl.ops._task import Geometry, TaskWeights


def in_threads(work: Callable[[int], None], count: int = 4) -> list[BaseException]:
    """What went wrong in threads that start together and take turns at every line of the launching module."""
    failed: list[BaseException] = []
    together = threading.Barrier(count)

    def give_way(frame: Any, event: str, arg: Any) -> Any:
        if event == "line":
            time.sleep(0)
        return give_way if frame.f_code.co_filename == _launch.__file__ else None

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
    monkeypatch.setattr(_launch, "TABLES_KEPT", 1)
    monkeypatch.setattr(_launch, "_written_by_launches", lambda values, device: torch.tensor(values))
    lists = [[torch.zeros(1)], [torch.zeros(1), torch.zeros(1)]]
    wrong: list[Tensor] = []

    def work(k: int) -> None:
        for i in range(200):
            tensors = lists[(i + k) % 2]
            table = _launch.pointer_table(tensors)
            if table.tolist() != [x.data_ptr() for x in tensors]:
                wrong.append(table)

    assert in_threads(work) == [] and wrong == []


def test_tickets_of_threads_that_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    # in captures of several threads: the last that was made beforehand must not be taken twice
    monkeypatch.setattr(_launch, "TICKETS_PER_BATCH", 4)
    monkeypatch.setattr(_launch, "capturing", lambda device: True)
    device = torch.device("cpu")
    for _ in range(50):
        tickets = _launch._Tickets()
        tickets.prepare(device)
        taken: list[Tensor] = []
        assert in_threads(lambda k, t=tickets, to=taken: to.extend(t.take(device, 1) for _ in range(2))) == []
        assert len({ticket.data_ptr() for ticket in taken}) == len(taken) == 8


def test_one_ticket_for_a_stream() -> None:
    device = torch.device("cpu")
    for _ in range(50):
        tickets = _launch._Tickets()
        taken: list[Tensor] = []
        assert in_threads(lambda k, t=tickets, to=taken: to.append(t.take(device, 1))) == []
        assert len({ticket.data_ptr() for ticket in taken}) == 1


# --- 64-bit offsets


def recorded(weight: Tensor, delta: Any, x: Tensor, backward: bool = True) -> list[_launch.Launch]:
    """The launches of a layer on the meta device, forward and backward."""
    listed = not isinstance(delta, Tensor)
    deltas = list(delta) if listed else [delta]
    tasks = list(range(len(deltas))) if listed else []
    num_tasks = len(deltas) if listed else delta.shape[0]
    gate = torch.empty(num_tasks, device="meta")
    order = torch.empty(x.shape[0], dtype=torch.int64, device="meta")
    offsets = torch.empty(num_tasks + 1, dtype=torch.int64, device="meta")
    weights = TaskWeights(weight, deltas, tasks, gate)
    geometry = Geometry()
    with _launch.recording() as launches:
        y = launchers.conv2d(x, weights, None, order, offsets, geometry)
        if backward:
            wanted = [True, weight is not None, True, False]
            launchers.conv2d_backward(y, x, weights, None, order, offsets, geometry, wanted, list(range(len(deltas))))
    return launches


def wide(launches: list[_launch.Launch]) -> dict[str, bool]:
    return {made.fn.__name__: made.arguments["WIDE"] for made in launches if "WIDE" in made.arguments}


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
        found = wide(recorded(meta(*shape), delta, meta(4, 2**15, 1, 1)))
    assert {"task_conv2d_fwd_kernel", "task_conv2d_dgrad_kernel"} < set(found)
    assert found == dict.fromkeys(found, expected)


def test_workspace_of_an_expanded_filter_past_32_bits() -> None:
    # the filter reaches over one row of memory, its copies do not
    weight, shape = meta(1, 2**15, 1, 1).expand(2**15, -1, -1, -1), (2**15, 2**15, 1, 1)
    deltas = [meta(1, 2**15, 1, 1).expand(shape)] * 2
    with configs.force(schedule="staged"):
        found = wide(recorded(weight, deltas, meta(4, 2**15, 1, 1), backward=False))
    assert found == {"stage_kernel": True, "task_conv2d_fwd_kernel": True}


@pytest.mark.parametrize(("width", "expected"), [(2**14 + 1, True), (2**14, False)])
def test_samples_past_32_bits(width: int, expected: bool) -> None:
    # one sample of 2^30 elements and some more, or not; how many there are does not matter
    x = torch.empty((4, 64, 2**10, width), dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)
    found = wide(recorded(meta(64, 64, 1, 1), meta(2, 64, 64, 1, 1), x))
    assert found.pop("stage_kernel", False) is False
    assert {"task_conv2d_fwd_kernel", "task_conv2d_dgrad_kernel"} < set(found)
    assert found == dict.fromkeys(found, expected)
