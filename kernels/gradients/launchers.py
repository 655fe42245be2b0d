"""Gradient surgery: Gram matrix, weighted sums and PCGrad of a bank or of lists, two launches for all three.

The Gram matrix is summed over chunks of columns, whose number depends on the shapes alone; whoever comes last adds
them up in order and solves the T x T problem. A call has one launch of each kernel for every dtype among its
parameters, and for those with memory that is not aligned to 16 bytes another.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmtl.core.gradient_rows import GradientRows, first_of_params
from fastmtl.core.tensors import is_dense
from fastmtl.kernels.common.build_target import BuildTarget, as_target
from fastmtl.kernels.common.launches import (
    MAX_GROUPS,
    Launch,
    in_interpreter,
    integer_table,
    launch,
    next_power_of_2,
    recording,
    tickets,
)
from fastmtl.kernels.gradients.combine import combine_fwd_kernel
from fastmtl.kernels.gradients.gram import MAX_PAIRED, gram_paired_kernel, gram_product_kernel
from fastmtl.kernels.gradients.pcgrad import pcgrad_coefficients_kernel

# lanes of a program that each read a vector of every row
LANES = 128
# chunks that fill a large GPU several times over; and the tiles that a chunk has at most: float32 sums must be short
CHUNKS = {"paired": 1056, "product": 528}
MAX_TILES = 64
# tasks -> columns of a product, by bytes of an element, and warps. Of 16 bits few: tensor cores cut their sums off, and
# those of two products of 128 columns were off by 1.1e-6 on an H100
PRODUCT_BLOCKS = {2: {16: 64, 32: 64, 64: 64, 128: 16}, 4: {16: 64, 32: 64, 64: 32, 128: 16}}
PRODUCT_BLOCKS[8] = {16: 64, 32: 16, 64: 16, 128: 16}
PRODUCT_WARPS = {16: 4, 32: 8, 64: 8, 128: 8}
# stages of its loads; by bytes of an element for 128 tasks, where registers are scarce
PRODUCT_STAGES = 3
# as many as there are: left to itself, the assembler spills a few bytes for the sake of one more block
MAX_REGISTERS = 255
PRODUCT_STAGES_128 = {2: 3, 4: 2, 8: 1}
# entries of partial sums that a program adds up at once; coefficients that it holds
SUM_TILE = 2048
SOLVE_TILE = 2048
# sums that are made of one tile while it is in registers; rows that are read before they are added to a single sum
# (with several sums, one row: more of them spill registers)
MAX_SUMS, MAX_ROWS = 8, 16
# tiles of a program of the weighted sums; fewer where there are not this many
BLOCK_TILES, BLOCKS = 4, 8192

_ACC = {torch.float64: tl.float64}


class _Param(NamedTuple):
    """One parameter with elements: where it stands, its gradients (None: zero) and the memory of its sums."""

    position: int
    numel: int
    rows: list[Tensor | None]
    out: list[Tensor]


class _Group:
    """What one launch of each kernel takes: a bank, or parameters of one dtype; aligned16: all aligned to 16 bytes."""

    def __init__(self, num_tasks: int, dtype: torch.dtype, aligned16: bool, like: Tensor) -> None:
        self.num_tasks, self.dtype, self.aligned16, self.like = num_tasks, dtype, aligned16, like
        self.bank: Tensor | None = None
        self.params: list[_Param] = []
        self.out: Tensor | None = None  # of a bank
        self.aligned16_out = aligned16
        padded = next_power_of_2(num_tasks)
        self.paired = padded <= MAX_PAIRED
        if self.paired:
            self.tile = LANES * (16 // dtype.itemsize if aligned16 else 1)
        else:
            # without loads of 16 bytes a tile passes through registers
            self.tile = 2 * max(PRODUCT_BLOCKS[dtype.itemsize][padded] // (1 if aligned16 else 2), 16)
        self.tiles_per_chunk = 1
        self.tiles_per_block = 1

    @property
    def lengths(self) -> list[int]:
        return [p.numel for p in self.params] if self.bank is None else [self.bank.shape[1]]

    @property
    def acc(self) -> Any:
        return _ACC.get(self.dtype, tl.float32)

    @property
    def block(self) -> int:
        """Columns of a tile of the weighted sums."""
        return LANES * 16 // self.dtype.itemsize if self.aligned16_out else LANES

    def num_chunks(self) -> int:
        # a bank without columns has one, empty, so that its Gram matrix is written
        return max(1, sum(triton.cdiv(n, self.tile * self.tiles_per_chunk) for n in self.lengths))

    def num_blocks(self) -> int:
        return sum(triton.cdiv(n, self.block * self.tiles_per_block) for n in self.lengths)

    def table(self, positions: bool = False) -> Tensor | None:
        """See `rows.py`; None for a bank. positions: those of the parameters follow."""
        if self.bank is not None:
            return None
        values = [0 if x is None else x.data_ptr() for p in self.params for x in p.rows]
        values += self.lengths
        for columns in (self.tile * self.tiles_per_chunk, self.block * self.tiles_per_block):
            parts = [triton.cdiv(n, columns) for n in self.lengths]
            values += itertools.accumulate([0, *parts[:-1]])
        for k in range(len(self.params[0].out)):
            values += [p.out[k].data_ptr() for p in self.params]
        if positions:
            values += [p.position for p in self.params]
        return integer_table(values, self.like.device)

    def arguments(self, table: Tensor | None, aligned16: bool) -> dict[str, Any]:
        """What both kernels are told of the rows; aligned16: read by 16 bytes."""
        bank = self.bank
        vec = 16 // self.dtype.itemsize if aligned16 else 1
        return {
            "p_rows": self.like if bank is None else bank,
            "p_table": table,
            "num_tasks": self.num_tasks,
            "num_params": len(self.params),
            "row_stride": 0 if bank is None else bank.stride(0) // vec,
            "col_stride": 1 if bank is None else bank.stride(1),
            "num_columns": 0 if bank is None else bank.shape[1],
            "ALIGNED16": aligned16,
            "VEC": vec,
            "ACC": self.acc,
        }


def _aligned(x: Tensor | None) -> bool:
    return x is None or x.data_ptr() % 16 == 0


def _aligned16_rows(x: Tensor) -> bool:
    """Whether the rows of a `[n, P]` tensor can be read by 16 bytes."""
    step = x.stride(0) * x.element_size()
    return _aligned(x) and (x.shape[1] <= 1 or x.stride(1) == 1) and (x.shape[0] <= 1 or step % 16 == 0)


def _same_strides(a: Tensor, b: Tensor) -> bool:
    # a dimension of size 1 is never stepped along
    return all(n <= 1 or s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True))


def _reordered(x: Tensor, like: Tensor) -> Tensor:
    """A copy in the memory order of another tensor, whose dtype may differ."""
    return torch.empty_like(like, dtype=x.dtype).copy_(x)


def _groups(rows: GradientRows, out: Sequence[Tensor]) -> list[_Group]:
    """The launches. Gradients in another memory order than their parameter's are copied."""
    groups = [_bank_group(rows.bank, out)] if rows.bank is not None else _list_groups(rows, out)
    # all together, so that the number of chunks depends on the sizes alone
    for kind, target in CHUNKS.items():
        here = [g for g in groups if g.paired == (kind == "paired")]
        tiles = sum(triton.cdiv(n, g.tile) for g in here for n in g.lengths)
        for g in here:
            g.tiles_per_chunk = min(max(triton.cdiv(tiles, target), 1), MAX_TILES)
    for g in groups:
        tiles = sum(triton.cdiv(n, g.block) for n in g.lengths)
        g.tiles_per_block = min(max(tiles // BLOCKS, 1), BLOCK_TILES)
    return groups


def _bank_group(bank: Tensor, out: Sequence[Tensor]) -> _Group:
    group = _Group(bank.shape[0], bank.dtype, _aligned16_rows(bank), bank)
    group.bank = bank
    if out:
        (target,) = out
        group.out = target if target.dim() == 2 else target[None]
        group.aligned16_out = group.aligned16 and _aligned16_rows(group.out)
    return group


def _list_groups(rows: GradientRows, out: Sequence[Tensor]) -> list[_Group]:
    first = first_of_params(rows.tensors, rows.index, rows.num_params)
    gradients: dict[int, list[Tensor | None]] = {i: [None] * rows.num_tasks for i in first}
    for x, k in zip(rows.tensors, rows.index, strict=True):
        gradients[k % rows.num_params][k // rows.num_params] = x
    found: dict[tuple[torch.dtype, bool], _Group] = {}
    for position, (i, x) in enumerate(first.items()):
        if x.numel() == 0:
            continue
        targets = list(out[position :: len(first)])
        like = targets[0] if targets else x if is_dense(x) else torch.empty_like(x)
        read = [g if g is None or _same_strides(g, like) else _reordered(g, like) for g in gradients[i]]
        aligned16 = all(map(_aligned, read)) and all(map(_aligned, targets))
        key = (x.dtype, aligned16)
        if key not in found:
            found[key] = _Group(rows.num_tasks, x.dtype, aligned16, x)
        found[key].params.append(_Param(i, x.numel(), read, targets))
    return list(found.values())


def _launch_gram(
    groups: Sequence[_Group], tables: Sequence[Tensor | None], num_tasks: int, out: Tensor, **method: Any
) -> None:
    """`method`: what PCGrad needs beyond the Gram matrix."""
    padded = next_power_of_2(num_tasks)
    entries = padded * padded
    num_parts = sum(g.num_chunks() for g in groups)
    # one level where a program adds up all parts in few steps, else about as many groups as members
    one_level = num_parts * entries <= SUM_TILE
    group_size = num_parts if one_level else max(math.isqrt(num_parts - 1) + 1, triton.cdiv(num_parts, MAX_GROUPS))
    parts = torch.empty(num_parts, entries, dtype=out.dtype, device=out.device)
    # sums of groups, their sum, and that as a symmetric matrix
    sums = torch.empty(triton.cdiv(num_parts, group_size) + 2, entries, dtype=torch.float64, device=out.device)
    sum_block = min(entries, 512)
    common = {
        "p_parts": parts,
        "p_sums": sums,
        "p_gram": out,
        "p_tickets": tickets.take(out.device, len(groups)),
        "num_parts": num_parts,
        "group_size": group_size,
        "TP": padded,
        "SOLVE_ROWS": min(padded, SOLVE_TILE // padded),
        "SUM_ROWS": max(SUM_TILE // sum_block, 1),
        "SUM_BLOCK": sum_block,
        **(_NO_METHOD | method),
    }
    first_part = 0
    for g, table in zip(groups, tables, strict=True):
        own = {"tiles_per_chunk": g.tiles_per_chunk, "first_part": first_part}
        rows = g.arguments(table, g.aligned16)
        if g.paired:
            unroll = max(1, 8 // padded)
            launch(
                gram_paired_kernel,
                (g.num_chunks(),),
                max_registers=MAX_REGISTERS,
                **rows,
                **common,
                **own,
                LANES=LANES,
                UNROLL=unroll,
            )
        else:
            cast = in_interpreter() and g.dtype == torch.bfloat16
            launch(
                gram_product_kernel,
                (g.num_chunks(),),
                PRODUCT_WARPS[padded],
                PRODUCT_STAGES_128[g.dtype.itemsize] if padded == 128 else PRODUCT_STAGES,
                None if padded == 128 else MAX_REGISTERS,
                **rows,
                **common,
                **own,
                BLOCK=g.tile // 2,
                CAST=cast,
            )
        first_part += g.num_chunks()


_NO_METHOD = {
    "p_order": None,
    "p_state": None,
    "p_weights": None,
    "num_visits": 0,
    "include_self": 0,
    "mean": 0,
    "key": 0,
    "present_low": 0,
    "present_high": 0,
    "METHOD": "gram",
    "DRAW": False,
}


def _launch_combine(groups: Sequence[_Group], tables: Sequence[Tensor | None], weights: Tensor) -> None:
    num_sums, num_tasks = weights.shape
    sums = min(next_power_of_2(num_sums), MAX_SUMS)
    for g, table in zip(groups, tables, strict=True):
        target = g.out if g.bank is not None else g.params[0].out[0]
        rows = g.arguments(table, g.aligned16_out)
        launch(
            combine_fwd_kernel,
            (g.num_blocks(),),
            max_registers=MAX_REGISTERS,
            **rows,
            p_weights=weights,
            p_sum=target,
            num_sums=num_sums,
            out_stride=0 if g.bank is None else target.stride(0) // rows["VEC"],
            tiles_per_block=g.tiles_per_block,
            TASKS=min(next_power_of_2(num_tasks), MAX_ROWS) if sums == 1 else 1,
            SUMS=sums,
            BLOCK=g.block,
        )


def gram(rows: GradientRows, out: Tensor) -> None:
    """The Gram matrix into `out`, `[T, T]` float32 or float64."""
    groups = _groups(rows, ())
    if not groups:
        out.zero_()
        return
    _launch_gram(groups, [g.table() for g in groups], rows.num_tasks, out)


def combine(weights: Tensor, rows: GradientRows, out: Sequence[Tensor]) -> None:
    """K weighted sums into `out`; weights: `[K, T]` float64, contiguous."""
    if weights.shape[0] == 0:
        return
    groups = _groups(rows, out)
    _launch_combine(groups, [g.table() for g in groups], weights)


def coefficients(gram: Tensor, order: Tensor, include_self: bool, out: Tensor) -> None:
    """PCGrad's coefficients into `out`, `[T, T]` float64; gram: likewise; order: `[T, K]` int64, all contiguous."""
    padded = next_power_of_2(gram.shape[0])
    rows = min(padded, SOLVE_TILE // padded)
    launch(
        pcgrad_coefficients_kernel,
        (triton.cdiv(gram.shape[0], rows),),
        p_gram=gram,
        p_order=order,
        p_out=out,
        num_tasks=gram.shape[0],
        num_visits=order.shape[1],
        include_self=int(include_self),
        ROWS=rows,
        TP=padded,
    )


def _word(flags: Sequence[int]) -> int:
    """64 flags as a signed integer."""
    bits = sum(1 << k for k, here in enumerate(flags) if here)
    return bits - (1 << 64) if bits >= 1 << 63 else bits


def pcgrad(
    rows: GradientRows,
    order: Tensor | None,
    key: int,
    state: Tensor | None,
    include_self: bool,
    present: Sequence[int],
    mean: bool,
    out: Sequence[Tensor],
    gram: Tensor,
    weights: Tensor,
) -> None:
    """Gram matrix, coefficients and sums in two launches; see `_pcgrad_kernel` in `fastmtl/ops/gradients/pcgrad.py`."""
    groups = _groups(rows, out)
    if not groups:
        # nothing to read: the T x T problem of a zero matrix
        groups = [_bank_group(gram.new_zeros(rows.num_tasks, 0), [gram.new_zeros(weights[..., :0].shape)])]
    tables = [g.table() for g in groups]
    flags = list(present) or [1] * rows.num_tasks
    drawn = order is None
    if order is None:
        order = torch.empty(rows.num_tasks, rows.num_tasks, dtype=torch.int64, device=gram.device)
    _launch_gram(
        groups,
        tables,
        rows.num_tasks,
        gram,
        p_order=order,
        p_state=state if drawn else None,
        p_weights=weights,
        num_visits=order.shape[1],
        include_self=int(include_self),
        mean=int(mean),
        key=key,
        present_low=_word(flags[:64]),
        present_high=_word(flags[64:]),
        METHOD="project" if weights.dim() == 2 else "sum",
        DRAW=drawn,
    )
    _launch_combine(groups, tables, weights if weights.dim() == 2 else weights[None])


_TARGET_COLUMNS = 1 << 20


def _record(dtype: torch.dtype, num_tasks: int, form: str, num_sums: int) -> list[Launch]:
    """The launches of one call on the meta device: PCGrad with an order drawn, its sums or projections; and `gram`."""
    total = torch.float64 if dtype == torch.float64 else torch.float32
    # rows of an odd length are not aligned
    columns = _TARGET_COLUMNS + (form == "strided")
    out: list[Tensor] = [torch.empty(columns, dtype=dtype, device="meta") for _ in range(num_sums)]
    if form == "lists":
        tensors = [torch.empty(columns, dtype=dtype, device="meta") for _ in range(num_tasks)]
        rows = GradientRows(tensors, list(range(num_tasks)), num_tasks, 1)
    else:
        rows = GradientRows([torch.empty(num_tasks, columns, dtype=dtype, device="meta")], [], num_tasks, 1)
        out = [torch.empty(num_sums, columns, dtype=dtype, device="meta")]
    m = torch.empty(num_tasks, num_tasks, dtype=total, device="meta")
    state = torch.empty(2, dtype=torch.int64, device="meta")
    weights = torch.empty((num_sums, num_tasks) if num_sums > 1 else (num_tasks,), dtype=torch.float64, device="meta")
    with recording() as launches:
        pcgrad(rows, None, 0, state, False, [], False, out, m, weights)
        if form == "bank":
            gram(rows, m)
    return launches


def build_targets() -> Iterator[BuildTarget]:
    """Every kernel for every dtype, padded number of tasks and form of the gradients."""
    for dtype, padded in itertools.product(
        (torch.bfloat16, torch.float16, torch.float32, torch.float64), (1, 2, 4, 8, 16, 32, 64, 128)
    ):
        short = str(dtype).removeprefix("torch.")
        for form in ("bank", "strided", "lists"):
            made = _record(dtype, padded, form, 1)
            if padded > 1:
                made += [_record(dtype, padded, form, padded)[1]]
            for k, one in enumerate(made):
                name = f"{one.fn.__name__}-{form}-T{padded}-{k}-{short}"
                product = one.fn is gram_product_kernel
                representative = form == "bank" and padded in (8, 64) and k < 2
                # float64 has matrix instructions too, under another name
                mma = product and dtype != torch.float64
                yield as_target(name, one, dtype, representative, mma, form != "strided")
    for padded in (1, 2, 4, 8, 16, 32, 64, 128):
        with recording() as launches:
            matrix = torch.empty(padded, padded, dtype=torch.float64, device="meta")
            coefficients(matrix, torch.empty(padded, padded, dtype=torch.int64, device="meta"), False, matrix)
        name = f"pcgrad_coefficients_kernel-T{padded}"
        yield as_target(name, launches[0], torch.float64, padded in (8, 64), False, False)
