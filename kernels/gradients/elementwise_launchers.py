"""What looks at the gradients element by element: GradDrop, trimmed means, running averages and squares.

A call has one launch for every dtype among its parameters, and for those with memory that is not aligned to 16 bytes
another, as the weighted sums of `launchers.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmtl.core.gradient_rows import GradientRows
from fastmtl.kernels.common.build_target import BuildTarget, as_target
from fastmtl.kernels.common.launches import Launch, launch, next_power_of_2, recording
from fastmtl.kernels.gradients.graddrop import graddrop_fwd_kernel
from fastmtl.kernels.gradients.launchers import LANES, MAX_REGISTERS, _Group, _groups
from fastmtl.kernels.gradients.running import average_gradients_kernel, excess_risks_kernel
from fastmtl.kernels.gradients.trimmed_mean import trimmed_mean_fwd_kernel

# rows that are read before they are worked on
MAX_ROWS = 8
# registers of a thread that hold what a trimmed mean cuts off, before tiles become narrow
HELD_REGISTERS = 96
# and at most
MOST_REGISTERS = 160


def graddrop(
    rows: GradientRows,
    key: int,
    state: Tensor | None,
    leak: Tensor | None,
    present: Tensor | None,
    out: Sequence[Tensor],
) -> None:
    """GradDrop into `out`; state: `[2]` int64, leak: `[T]` float64, present: `[T]` bool."""
    flags = None if present is None else present.view(torch.uint8)
    for g in _groups(rows, out):
        table = g.table(positions=True)
        launch(
            graddrop_fwd_kernel,
            (g.num_blocks(),),
            max_registers=MAX_REGISTERS,
            **g.arguments(table, g.aligned16_out),
            p_state=state,
            p_leak=leak,
            p_present=flags,
            p_out=_target(g),
            key=key,
            tiles_per_block=g.tiles_per_block,
            TASKS=min(next_power_of_2(rows.num_tasks), MAX_ROWS),
            BLOCK=g.block,
        )


def trimmed_mean(rows: GradientRows, trim: int, present: Tensor | None, out: Sequence[Tensor]) -> None:
    """The trimmed mean into `out`; present: `[T]` bool."""
    flags = None if present is None else present.view(torch.uint8)
    for g in _groups(rows, out):
        registers = 2 * trim * (g.block // LANES) * (2 if g.dtype == torch.float64 else 1)
        narrow = g.block // LANES if registers > HELD_REGISTERS else 1
        launch(
            trimmed_mean_fwd_kernel,
            (g.num_blocks(),),
            max_registers=MAX_REGISTERS,
            **g.arguments(g.table(), g.aligned16_out),
            p_present=flags,
            p_out=_target(g),
            tiles_per_block=g.tiles_per_block * narrow,
            TASKS=min(next_power_of_2(rows.num_tasks), MAX_ROWS if trim <= 1 else 4 if trim <= 4 else 1),
            TRIM=trim,
            BLOCK=g.block // narrow,
        )


def trimmed_mean_declined(rows: GradientRows, trim: int) -> str | None:
    """Why there is no kernel for these: what is cut off must fit into a thread's registers."""
    doubles = any(x.dtype == torch.float64 for x in rows.tensors)
    if 2 * trim * (2 if doubles else 1) <= MOST_REGISTERS:
        return None
    return f"a trim of {trim} elements in {'float64' if doubles else 'float32'} takes more registers than a thread has"


def average_gradients(rows: GradientRows, keep: Tensor, take: Tensor, averages: Sequence[Tensor], out: Tensor) -> None:
    """`averages = keep averages + take rows`, and the squared lengths into `out`, `[T]` float64."""
    _run_along(average_gradients_kernel, rows, averages, out, p_keep=keep, p_take=take)


def excess_risks(rows: GradientRows, scale: Tensor, squares: Sequence[Tensor], out: Tensor) -> None:
    """`squares += (scale rows)²`, and the sums of `(scale rows)² / sqrt(squares)` into `out`, `[T]` float64."""
    _run_along(excess_risks_kernel, rows, squares, out, p_scale=scale)


def _run_along(kernel: Any, rows: GradientRows, held: Sequence[Tensor], out: Tensor, **factors: Tensor) -> None:
    groups = _groups(rows, held)
    counts = [g.num_blocks() for g in groups]
    totals = torch.empty(sum(counts), rows.num_tasks, dtype=torch.float64, device=out.device)
    for g, part in zip(groups, totals.split(counts), strict=True):
        target = _target(g)
        vec = 16 // target.element_size()
        launch(
            kernel,
            (g.num_blocks(),),
            max_registers=MAX_REGISTERS,
            **g.arguments(g.table(), g.aligned16_out),
            **factors,
            p_held=target,
            p_totals=part,
            held_stride=0 if g.bank is None else target.stride(0) // (vec if g.aligned16_out else 1),
            tiles_per_block=g.tiles_per_block,
            HELD_VEC=vec,
            BLOCK=g.block,
        )
    torch.sum(totals, 0, out=out)


def _target(g: _Group) -> Tensor:
    return g.params[0].out[0] if g.out is None else g.out


_TARGET_COLUMNS = 1 << 20


def _record(dtype: torch.dtype, num_tasks: int, form: str) -> list[Launch]:
    """The launches of one call of each on the meta device."""
    total = torch.float64 if dtype == torch.float64 else torch.float32
    # rows of an odd length are not aligned
    columns = _TARGET_COLUMNS + (form == "strided")

    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=of, device="meta")

    if form == "lists":
        rows = GradientRows([empty(columns) for _ in range(num_tasks)], list(range(num_tasks)), num_tasks, 1)
        held = [empty(columns, of=total) for _ in range(num_tasks)]
    else:
        rows = GradientRows([empty(num_tasks, columns)], [], num_tasks, 1)
        held = [empty(num_tasks, columns, of=total)]
    factors = empty(num_tasks, of=torch.float64)
    with recording() as launches:
        graddrop(rows, 0, empty(2, of=torch.int64), None, None, [empty(columns)])
        graddrop(rows, 0, None, factors, None, [empty(columns)])
        most = (num_tasks - 1) // 2 if total == torch.float32 else min((num_tasks - 1) // 2, MOST_REGISTERS // 4)
        for trim in sorted({0, min(1, most), most}):
            trimmed_mean(rows, trim, None, [empty(columns)])
        average_gradients(rows, factors, factors, held, factors)
        excess_risks(rows, factors, held, factors)
    return launches


def build_targets() -> Iterator[BuildTarget]:
    """Every kernel for every dtype and form of the gradients, for few tasks and for many."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    for dtype, num_tasks, form in itertools.product(dtypes, (1, 8, 128), ("bank", "strided", "lists")):
        short = str(dtype).removeprefix("torch.")
        seen: set[str] = set()
        for k, one in enumerate(_record(dtype, num_tasks, form)):
            name = f"{one.fn.__name__}-{form}-T{num_tasks}-{k}-{short}"
            wide = form != "strided" and one.arguments["BLOCK"] > LANES
            # the simplest of each kernel
            representative = form == "bank" and num_tasks == 8 and one.fn.__name__ not in seen
            seen.add(one.fn.__name__)
            yield as_target(name, one, dtype, representative, False, wide)
