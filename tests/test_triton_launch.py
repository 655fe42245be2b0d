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

from fastmtl.kernels import _launch


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
