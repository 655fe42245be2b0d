"""Launching of Triton kernels, and what launchers need around it: pointer tables, recording."""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmtl.core.dispatch import interpreting
from fastmtl.kernels.common.interpreter import mend_interpreter

if interpreting():
    mend_interpreter()

POINTERS_PER_LAUNCH = 16
TABLES_KEPT = 512
PLANS_KEPT = 4096
Plan = TypeVar("Plan")
# an address that no tensor has: the arguments must be 64 bit whatever they hold
NO_POINTER = -(1 << 62)


class Launch(NamedTuple):
    """A launch as it would be made, for compiling ahead of time."""

    fn: Any
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int | None = None


class _Tables:
    """The tables used last, by key. Autograd has a thread for each device, and users have theirs: all may meet here."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_key: collections.OrderedDict[tuple[Any, ...], Tensor] = collections.OrderedDict()

    def find(self, key: tuple[Any, ...]) -> Tensor | None:
        with self._lock:
            table = self._by_key.get(key)
            if table is not None:
                self._by_key.move_to_end(key)
            return table

    def keep(self, key: tuple[Any, ...], table: Tensor) -> None:
        with self._lock:
            self._by_key[key] = table
            while len(self._by_key) > TABLES_KEPT:
                self._by_key.popitem(last=False)


_recorded: list[list[Launch]] = []
_tables = _Tables()


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collects the launches made inside the block, on tensors of the meta device, instead of running them."""
    _recorded.append([])
    try:
        yield _recorded[-1]
    finally:
        _recorded.pop()


class Prepared:
    """A launch that is settled but for its pointers: where the same shapes come again, only these are filled in.

    Triton binds some 50 arguments by name and specialises each at every launch. Here numbers and constants stay as they
    are, so that a build depends on nothing but the pointers' dtypes, which of them there are, and which are multiples
    of 16: Triton's own path is taken for each such set once, and its build is launched directly from then on.
    """

    def __init__(
        self,
        fn: Any,
        grid: Sequence[int],
        num_warps: int = 4,
        num_stages: int = 1,
        max_registers: int | None = None,
        **settled: Any,
    ) -> None:
        """`settled`: by name, every argument but pointers and numbers that Triton doesn't specialise; see `launch`."""
        self._fn, self._grid = fn, (*grid, 1, 1)[:3]
        self._num_warps, self._num_stages, self._max_registers = num_warps, num_stages, max_registers
        self._settled = settled
        self._filled = [(k, name) for k, name in enumerate(fn.arg_names) if name not in settled]
        self._values = [settled.get(name) for name in fn.arg_names]
        self._builds: dict[tuple[Any, ...], Any] = {}

    def __call__(self, **filled: Tensor | int | None) -> None:
        """Runs on the device of its tensors; an empty grid runs nothing."""
        if _recorded:
            arguments = {**self._settled, **filled}
            made = Launch(self._fn, arguments, self._num_warps, self._num_stages, self._max_registers)
            _recorded[-1].append(made)
            return
        if 0 in self._grid:
            return
        values, kinds, device = self._values.copy(), [], None
        for k, name in self._filled:
            x = filled[name]
            if x is None:
                kinds.append(None)
                continue
            if isinstance(x, int):
                values[k] = x
                kinds.append(-(1 << 31) <= x < 1 << 31)  # else it is an int64
                continue
            values[k] = address = x.data_ptr()
            kinds.append((x.dtype, address % 16 == 0))
            device = x.device
        with _on(device):
            key = (device, *kinds)
            build = self._builds.get(key)
            if build is not None and not self._fn.pre_run_hooks:
                build(*values)
                return
            options = {"num_warps": self._num_warps, "num_stages": self._num_stages, "maxnreg": self._max_registers}
            found = self._fn[self._grid](**self._settled, **filled, **options)
            # not in the interpreter, which builds nothing; not for AMD, where builds depend on sizes of memory too
            if isinstance(found, triton.compiler.CompiledKernel) and torch.version.hip is None:
                self._builds[key] = found[self._grid]


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """`device` as the current one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


_plans: dict[Any, Any] = {}


def planned(key: Any, make: Callable[[], Plan]) -> Plan:
    """What `make` gives, kept by what it depends on: shapes, strides, dtypes, device, number of tasks.

    A thread that makes what another has just made does no harm. All are forgotten where there are too many, as with
    batches of ever new sizes.
    """
    plan = _plans.get(key)
    if plan is None:
        plan = make()
        if len(_plans) >= PLANS_KEPT:
            _plans.clear()
        _plans[key] = plan
    return plan


def launch(
    fn: Any,
    grid: Sequence[int],
    num_warps: int = 4,
    num_stages: int = 1,
    max_registers: int | None = None,
    **arguments: Any,
) -> None:
    """Runs `fn` on the device of its tensors; an empty grid runs nothing.

    `max_registers` per thread; None: the assembler's choice, which may spill a few bytes to fit one more block.
    """
    settled = {name: x for name, x in arguments.items() if not isinstance(x, Tensor)}
    pointers = {name: x for name, x in arguments.items() if name not in settled}
    options = (tuple(grid), num_warps, num_stages, max_registers)
    prepared = planned((id(fn), options, tuple(settled.items())), lambda: Prepared(fn, *options, **settled))
    prepared(**pointers)


@contextlib.contextmanager
def forgetting() -> Iterator[None]:
    """Nothing that was kept before is used inside the block, and nothing that is kept there stays."""
    global _plans, _tables
    before = _plans, _tables
    _plans, _tables = {}, _Tables()
    try:
        yield
    finally:
        _plans, _tables = before


@triton.jit(do_not_specialize=[f"a{k}" for k in range(POINTERS_PER_LAUNCH)] + ["first", "count"])
def pointer_table_kernel(
    p_table,
    first,
    count,
    a0: tl.int64, a1: tl.int64, a2: tl.int64, a3: tl.int64, a4: tl.int64, a5: tl.int64, a6: tl.int64, a7: tl.int64,
    a8: tl.int64, a9: tl.int64, a10: tl.int64, a11: tl.int64, a12: tl.int64, a13: tl.int64, a14: tl.int64,
    a15: tl.int64,
    NONE: tl.constexpr,
):  # fmt: skip
    addresses = (a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15)
    for k in tl.static_range(16):
        if k < count:
            address = addresses[k]
            tl.store(p_table + first + k, tl.where(address == NONE, 0, address))


def _written_by_launches(values: Sequence[int], device: torch.device) -> Tensor:
    """int64 on the device, which travel as kernel arguments."""
    table = torch.empty(len(values), dtype=torch.int64, device=device)
    prepared = planned("pointer table", lambda: Prepared(pointer_table_kernel, (1,), num_warps=1, NONE=NO_POINTER))
    for first in range(0, len(values), POINTERS_PER_LAUNCH):
        part = list(values[first : first + POINTERS_PER_LAUNCH])
        filled = part + [NO_POINTER] * (POINTERS_PER_LAUNCH - len(part))
        prepared(p_table=table, first=first, count=len(part), **{f"a{k}": a for k, a in enumerate(filled)})
    return table


def pointer_table(tensors: Sequence[Tensor | None]) -> Tensor:
    """Addresses as an int64 tensor on the device; 0 for None.

    They travel as kernel arguments: no copy from the host, so this may stand in a captured graph. Tables are kept by
    device, stream and addresses; a graph under capture gets one of its own, which lives as long as the graph does.
    """
    device = next(x.device for x in tensors if x is not None)
    addresses = [NO_POINTER if x is None else x.data_ptr() for x in tensors]
    if device.type == "cuda":
        captured = capturing(device)
        key = (device, torch.cuda.current_stream(device).cuda_stream, *addresses)
    else:
        captured, key = bool(_recorded), (device, 0, *addresses)
    if captured:
        return _written_by_launches(addresses, device)
    table = _tables.find(key)
    if table is None:
        # two threads may both write one: each is good, and lies on the stream that uses it
        table = _written_by_launches(addresses, device)
        _tables.keep(key, table)
    return table


def in_interpreter() -> bool:
    """For kernels: the interpreter's bfloat16 products are wrong, so operands are made float32 there."""
    return interpreting()


def integer_table(values: Sequence[int], device: torch.device) -> Tensor:
    """`values` as int64 on the device, without waiting for it. Kept and captured as `pointer_table`'s are."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.int64, device=device)
    captured = capturing(device)
    key = (device, torch.cuda.current_stream(device).cuda_stream, "integers", *values)
    if captured:
        return _written_by_launches(values, device)
    table = _tables.find(key)
    if table is None:
        # pinned, so that the copy is one of the stream's; its memory is not given out again before the copy is done
        table = torch.tensor(values, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)
        _tables.keep(key, table)
    return table


# groups of programs whose last one is found by a ticket, and one ticket more for the groups
MAX_GROUPS = 255
TICKETS_PER_BATCH = 256


def capturing(device: torch.device) -> bool:
    """Whether the current stream of this device is being captured in a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


class _Tickets:
    """Zeroed counters; a launch that counts with them leaves them zero. Threads may take them at the same time."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._by_stream: dict[tuple[torch.device, int], Tensor] = {}
        self._free: dict[torch.device, list[Tensor]] = {}
        self._kept: list[Tensor] = []  # graphs hold addresses, which must stay theirs

    def take(self, device: torch.device, launches: int) -> Tensor:
        """`[1 + MAX_GROUPS]` int32: of the current stream; in a CUDA graph capture of this one call for good.

        A call of several launches gets new ones: another thread's call may come between its launches, or it may end
        between them.
        """
        if launches > 1:
            return self._zeros(1, device)[0]
        captured = capturing(device)
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        with self._lock:
            if captured:
                free = self._free.get(device)
                # without one made before the capture, zeroing it is a part of the graph
                return free.pop() if free else self._zeros(1, device)[0]
            if device.type == "cuda":
                self.prepare(device)
            key = (device, stream)
            if key not in self._by_stream:
                self._by_stream[key] = self._zeros(1, device)[0]
            return self._by_stream[key]

    def prepare(self, device: torch.device) -> None:
        """Sets for the graphs that will be captured: torch synchronises before it captures."""
        with self._lock:
            free = self._free.setdefault(device, [])
            if len(free) < TICKETS_PER_BATCH // 2:
                self._kept.append(self._zeros(TICKETS_PER_BATCH, device))
                free.extend(self._kept[-1].unbind(0))

    @staticmethod
    def _zeros(count: int, device: torch.device) -> Tensor:
        return torch.zeros(count, 1 + MAX_GROUPS, dtype=torch.int32, device=device)


tickets = _Tickets()


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
