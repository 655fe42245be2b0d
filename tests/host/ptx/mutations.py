"""What a fault in a kernel's PTX brings about, in a process of its own: it may hang, or write to wild pointers."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import resource
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from host.ptx.faults import faults_of, kind_of
from host.ptx.module import Instruction, Kernel

SECONDS = 20  # of CPU time; what takes longer hangs


@dataclass(frozen=True)
class Fault:
    """The `number`-th of its kernel, as translate.py counts them."""

    kernel: str
    number: int
    right: Instruction
    wrong: Instruction | None

    def __str__(self) -> str:
        return f"{self.right} ({self.right.source}, line {self.right.line}) -> {self.wrong or 'nothing'}"


def faults_in(kernel: Kernel, kind: str) -> list[Fault]:
    """Of one of the kinds of faults.py."""
    pairs = [(one, wrong) for one in kernel.instructions for wrong in faults_of(one)]
    numbered = [Fault(kernel.name, k, *pair) for k, pair in enumerate(pairs, 1)]
    return [fault for fault in numbered if kind_of(fault.right) == kind]


@dataclass(frozen=True)
class Outcome:
    """`reached`: a case ran the faulty instruction; `seen`: what told of it, empty if nothing did."""

    reached: bool
    seen: str


def _child(library: ctypes.CDLL, fault: Fault, cases: Mapping[str, Callable[[], None]], writing: int) -> None:
    ctypes.c_int.in_dll(library, f"planted_{fault.kernel}").value = fault.number
    for name, case in cases.items():
        try:
            case()
        except BaseException as e:
            os.write(writing, f"seen {name}: {type(e).__name__}: {e}".encode()[:4000])
            return
    os.write(writing, b"reached" if library.ptx_fault_reached() else b"not reached")


def outcome(
    library: ctypes.CDLL, fault: Fault, cases: Mapping[str, Callable[[], None]], seconds: int = SECONDS
) -> Outcome:
    """Of the cases up to the first that tells of it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            faulthandler.disable()
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            _child(library, fault, cases, writing)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as said:
        text = said.read()
    status = os.waitpid(child, 0)[1]
    if status != 0:
        return Outcome(True, f"ended by signal {status}")
    return Outcome(text != "not reached", text.removeprefix("seen ") if text.startswith("seen ") else "")
