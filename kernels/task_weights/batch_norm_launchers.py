"""What launches the kernels of batch norm by task: how a batch is cut, and how many launches that takes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmtl.core.task_weights import SortedBatch
from fastmtl.core.tensors import has_rows, laid_out
from fastmtl.kernels.common.build_target import BuildTarget, as_target
from fastmtl.kernels.common.launches import launch, next_power_of_2, pointer_table, recording
from fastmtl.kernels.task_weights.task_batch_norm import (
    task_batch_norm_apply_kernel,
    task_batch_norm_bwd_kernel,
    task_batch_norm_finish_kernel,
    task_batch_norm_fwd_kernel,
    task_batch_norm_sums_kernel,
    task_batch_norm_update_kernel,
)

# elements of a tile: two 16-byte loads of a 16-bit type per thread of four warps
TILE = 2048
# half of it, and of what a thread has, where elements are loaded one by one, each by an address of its own
NARROW = 8
# longest extent of a tile along pixels, rows and channels
PIXELS, ROWS, CHANNELS = 1024, 256, 64
# programs that share out the pieces of a large batch: some eight for each processor of a device
PROGRAMS = 1024
MAX_TILES_PER_PIECE = 64
# elements of all samples in one block of channels up to which one launch does both passes: a task may have them all
ONE_LAUNCH_ELEMENTS = 1 << 17
# pieces and channels that the second launch looks at together
FINISH_PIECES, FINISH_CHANNELS = 16, 64
UPDATE_CHANNELS = 1024
# so that the assembler does not spill a few bytes to fit one more block
MAX_REGISTERS = 168


class _Shape(NamedTuple):
    """How x lies, and how it is cut."""

    is_rows: bool
    num_samples: int
    num_channels: int
    num_pixels: int
    num_tasks: int

    @property
    def block_pixels(self) -> int:
        return 1 if self.is_rows else min(next_power_of_2(self.num_pixels), PIXELS)

    @property
    def tile(self) -> int:
        """Elements of a tile at most."""
        return TILE if self.width >= NARROW else TILE // 2

    @property
    def block_channels(self) -> int:
        return min(next_power_of_2(self.num_channels), CHANNELS if self.is_rows else self.tile // self.block_pixels)

    @property
    def lines(self) -> int:
        """Of a tile."""
        if not self.is_rows:
            return 1
        return min(next_power_of_2(self.num_samples * self.num_pixels), ROWS, self.tile // self.block_channels)

    @property
    def lines_per_sample(self) -> int:
        return self.num_pixels if self.is_rows else -(-self.num_pixels // self.block_pixels)

    @property
    def total_lines(self) -> int:
        return self.num_samples * self.lines_per_sample

    @property
    def channel_blocks(self) -> int:
        return -(-self.num_channels // self.block_channels)

    @property
    def one_launch(self) -> bool:
        return self.num_samples * self.num_pixels * self.block_channels <= ONE_LAUNCH_ELEMENTS

    @property
    def lines_per_piece(self) -> int:
        tiles = -(-self.total_lines // self.lines)
        return self.lines * min(max(tiles * self.channel_blocks // PROGRAMS, 1), MAX_TILES_PER_PIECE)

    @property
    def num_pieces(self) -> int:
        """As many as there can be where no piece holds two tasks; samples of no task are one more."""
        return -(-self.total_lines // self.lines_per_piece) + min(self.num_tasks + 1, self.num_samples) - 1

    @property
    def width(self) -> int:
        return math.gcd(self.num_channels if self.is_rows else self.num_pixels, 16)

    @property
    def int64_offsets(self) -> bool:
        return self.total_lines >= 2**31 - 2 * TILE * MAX_TILES_PER_PIECE

    def arguments(self, pieces: bool) -> dict[str, Any]:
        """What the kernels are told of it; `pieces`: those that find theirs."""
        units = (1, self.width) if self.is_rows else (self.width, 1)
        found = {
            "num_tasks": self.num_tasks,
            "num_samples": self.num_samples,
            "lines_per_sample": self.lines_per_sample,
            "num_pixels": self.num_pixels // units[0],
            "num_channels": self.num_channels // units[1],
            "IS_ROWS": self.is_rows,
            "LINES": self.lines,
            "BLOCK_PIXELS": self.block_pixels,
            "BLOCK_CHANNELS": self.block_channels,
            "WIDTH": self.width,
            "INT64_OFFSETS": self.int64_offsets,
            "max_registers": MAX_REGISTERS,
            "num_warps": min(max(4 * self.lines * self.block_pixels * self.block_channels // self.tile, 1), 4),
        }
        if pieces:
            found |= {"lines_per_piece": self.lines_per_piece, "TB": next_power_of_2(self.num_tasks + 1)}
        return found


class _Table(NamedTuple):
    """Values by task and channel, `[T, C]` or `[C]`, and the stride from task to task."""

    values: Tensor | None
    stride: int


def _tables(*lists: Sequence[Tensor]) -> list[_Table]:
    """Each list as a table: no tensor, one `[T, C]` or `[C]`, or one per task; these are stacked in one launch."""
    by_task = [params for params in lists if len(params) > 1]
    rows = iter(torch.stack([p for params in by_task for p in params]).split(len(by_task[0])) if by_task else ())
    found = []
    for params in lists:
        if not params:
            found.append(_Table(None, 0))
            continue
        table = next(rows) if len(params) > 1 else params[0].contiguous()
        found.append(_Table(table, table.shape[1] if table.dim() == 2 else 0))
    return found


def _shape_of(x: Tensor, num_tasks: int) -> _Shape:
    return _Shape(bool(has_rows(x)), x.shape[0], x.shape[1], math.prod(x.shape[2:]), num_tasks)


def _apply(
    shape: _Shape, batch: SortedBatch, x: Tensor, out: Tensor, weight: _Table, bias: _Table, mean: Tensor | None,
    var: Tensor | None, eps: float, grad: Tensor | None = None, terms: Tensor | None = None,
) -> None:  # fmt: skip
    launch(
        task_batch_norm_apply_kernel,
        (shape.num_pieces, shape.channel_blocks),
        p_grad=grad,
        p_x=x,
        p_weight=weight.values,
        p_bias=bias.values,
        p_mean=mean,
        p_var=var,
        p_terms=terms,
        p_order=batch.order,
        p_offsets=batch.offsets,
        p_out=out,
        eps=eps,
        weight_stride=weight.stride,
        bias_stride=bias.stride,
        **shape.arguments(pieces=True),
    )


class _Sums(NamedTuple):
    """Partial sums of pieces."""

    first: Tensor
    second: Tensor
    count: Tensor


def _sums(
    shape: _Shape, batch: SortedBatch, x: Tensor, grad: Tensor | None = None, mean: Tensor | None = None
) -> _Sums:
    size = shape.num_pieces, shape.num_channels
    first, second = (torch.empty(size, dtype=torch.float32, device=x.device) for _ in "ab")
    count = torch.empty(shape.num_pieces, dtype=torch.float32, device=x.device)
    launch(
        task_batch_norm_sums_kernel,
        (shape.num_pieces, shape.channel_blocks),
        p_grad=grad,
        p_x=x,
        p_mean=mean,
        p_order=batch.order,
        p_offsets=batch.offsets,
        p_first=first,
        p_second=second,
        p_count=count,
        **shape.arguments(pieces=True),
    )
    return _Sums(first, second, count)


def _finish(
    shape: _Shape, batch: SortedBatch, sums: _Sums, mean: Tensor | None, var: Tensor, eps: float = 0.0,
    weight: _Table | None = None, terms: Tensor | None = None, tables: Sequence[Tensor | None] = (None, None),
) -> None:  # fmt: skip
    launch(
        task_batch_norm_finish_kernel,
        (shape.num_tasks, -(-shape.num_channels // FINISH_CHANNELS)),
        p_first=sums.first,
        p_second=sums.second,
        p_count=sums.count,
        p_offsets=batch.offsets,
        p_weight=weight.values if weight else None,
        p_mean=mean,
        p_var=var,
        p_terms=terms,
        p_grad_weight=tables[0],
        p_grad_bias=tables[1],
        eps=eps,
        weight_stride=weight.stride if weight else 0,
        lines_per_piece=shape.lines_per_piece,
        num_tasks=shape.num_tasks,
        lines_per_sample=shape.lines_per_sample,
        num_channels=shape.num_channels,
        INT64_OFFSETS=shape.int64_offsets,
        TB=next_power_of_2(shape.num_tasks + 1),
        PIECES=FINISH_PIECES,
        BLOCK_CHANNELS=min(next_power_of_2(shape.num_channels), FINISH_CHANNELS),
    )


def batch_norm(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    mean: Sequence[Tensor],
    var: Sequence[Tensor],
    batch: SortedBatch,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result in x's dtype and memory order, and means and variances `[T, C]` in float32."""
    num_tasks = batch.offsets.shape[0] - 1
    w, b, given_mean, given_var = _tables(weight, bias, mean, var)
    found = []
    for table in (given_mean, given_var):
        # memory of their own: what the op returns may not be an argument
        like = torch.empty(num_tasks, x.shape[1], dtype=torch.float32, device=x.device)
        found.append(like if table.values is None else like.copy_(table.values))
    y = torch.empty_like(x)
    if x.numel() == 0:
        if not mean:
            for table in found:
                table.zero_()
        return y, found[0], found[1]
    batch = SortedBatch(batch.order.contiguous(), batch.offsets.contiguous())
    shape = _shape_of(x, num_tasks)
    source = laid_out(x, shape.is_rows)
    target = y if source is x and has_rows(y) == shape.is_rows else torch.empty_like(source)
    if mean or not shape.one_launch:
        if not mean:
            _finish(shape, batch, _sums(shape, batch, source), found[0], found[1])
        _apply(shape, batch, source, target, w, b, found[0], found[1], eps)
    else:
        launch(
            task_batch_norm_fwd_kernel,
            (num_tasks + 1, shape.channel_blocks),
            p_x=source,
            p_weight=w.values,
            p_bias=b.values,
            p_order=batch.order,
            p_offsets=batch.offsets,
            p_mean=found[0],
            p_var=found[1],
            p_out=target,
            eps=eps,
            weight_stride=w.stride,
            bias_stride=b.stride,
            **shape.arguments(pieces=False),
        )
    return (y if target is y else y.copy_(target)), found[0], found[1]


def batch_norm_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Sequence[Tensor],
    mean: Tensor,
    var: Tensor,
    batch: SortedBatch,
    of_batch: bool,
    eps: float,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """The gradient of x, and those of weight and bias as `[T, C]` in float32; of these the wanted ones."""
    num_tasks = batch.offsets.shape[0] - 1
    (w,) = _tables(weight)
    grad_x = torch.empty_like(x) if wanted[0] else None
    tables = [torch.empty(mean.shape, dtype=torch.float32, device=x.device) for _ in "wb"]
    out = [g for g, want in zip((grad_x, *tables), wanted, strict=True) if g is not None and want]
    if x.numel() == 0:
        for table in tables:
            table.zero_()
        return out
    batch = SortedBatch(batch.order.contiguous(), batch.offsets.contiguous())
    shape = _shape_of(x, num_tasks)
    source, grad = (laid_out(g.detach(), shape.is_rows) for g in (x, grad_out))
    target = grad_x
    if grad_x is not None and has_rows(grad_x) != shape.is_rows:
        target = torch.empty_like(source)
    mean, var = mean.contiguous(), var.contiguous()
    sums_wanted = wanted[1] or wanted[2]
    if shape.one_launch and (of_batch or sums_wanted):
        launch(
            task_batch_norm_bwd_kernel,
            (num_tasks + 1, shape.channel_blocks),
            p_grad=grad,
            p_x=source,
            p_weight=w.values,
            p_mean=mean,
            p_var=var,
            p_order=batch.order,
            p_offsets=batch.offsets,
            p_out=target if of_batch else None,
            p_grad_weight=tables[0],
            p_grad_bias=tables[1],
            eps=eps,
            weight_stride=w.stride,
            **shape.arguments(pieces=False),
        )
    elif of_batch or sums_wanted:
        terms = torch.empty(3, *mean.shape, dtype=torch.float32, device=x.device)
        sums = _sums(shape, batch, source, grad, mean)
        _finish(shape, batch, sums, None, var, eps, w, terms, tables)
        if of_batch and target is not None:
            _apply(shape, batch, source, target, w, _Table(None, 0), mean, var, eps, grad, terms)
    if not of_batch and target is not None:
        # given statistics do not depend on x, which is not read
        _apply(shape, batch, grad, target, w, _Table(None, 0), None, var, eps)
    if grad_x is not None and target is not None and target is not grad_x:
        grad_x.copy_(target)
    return out


def batch_norm_update(
    mean: Tensor,
    var: Tensor,
    offsets: Tensor,
    values: int,
    momentum: float | None,
    running_mean: Sequence[Tensor],
    running_var: Sequence[Tensor],
    num_batches_tracked: Sequence[Tensor],
) -> None:
    """Moves the running statistics of tasks with two values or more, in place."""
    num_tasks, num_channels = mean.shape
    lists = running_mean, running_var, num_batches_tracked
    # the kernel reads dense memory
    dense = [[p.contiguous() for p in params] for params in lists]
    (held_mean, mean_table), (held_var, var_table), (tracked, tracked_table) = (_addressed(params) for params in dense)
    launch(
        task_batch_norm_update_kernel,
        (num_tasks,),
        p_mean=mean.contiguous(),
        p_var=var.contiguous(),
        p_offsets=offsets.contiguous(),
        p_running_mean=held_mean,
        p_mean_table=mean_table,
        p_running_var=held_var,
        p_var_table=var_table,
        p_tracked=tracked,
        p_tracked_table=tracked_table,
        momentum=0.0 if momentum is None else momentum,
        num_channels=num_channels,
        values=values,
        CUMULATIVE=momentum is None,
        BLOCK_CHANNELS=min(next_power_of_2(num_channels), UPDATE_CHANNELS),
    )
    for params, copies in zip(lists, dense, strict=True):
        for p, copied in zip(params, copies, strict=True):
            if copied is not p:
                p.copy_(copied)


def _addressed(params: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """The one tensor of all tasks; or one of a list, for its dtype, and a table of the addresses of all."""
    if not params:
        return None, None
    return params[0], pointer_table(params) if len(params) > 1 else None


# --- what is compiled ahead of time


def build_targets() -> Iterator[BuildTarget]:
    """Every kernel in every layout, dtype and tile shape that is not a smaller one of the same."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for layout, size in _TARGET_SIZES.items():
            x = torch.empty(size, dtype=dtype, device="meta")
            if layout.startswith("channels_last"):
                x = x.contiguous(memory_format=torch.channels_last)
            tables = [torch.empty(8, size[1], dtype=torch.float32, device="meta")] * 4
            listed = [torch.empty(size[1], dtype=torch.float32, device="meta") for _ in range(8)]
            counts = [torch.empty((), dtype=torch.int64, device="meta") for _ in range(8)]
            order, offsets = (torch.empty(n, dtype=torch.int64, device="meta") for n in (size[0], 9))
            batch = SortedBatch(order, offsets)
            with recording() as launches:
                _, mean, var = batch_norm(x, *([p] for p in tables[:2]), [], [], batch, 1e-5)
                batch_norm_backward(x, x, [tables[0]], mean, var, batch, True, 1e-5, [True] * 3)
                batch_norm_backward(x, x, [tables[0]], mean, var, batch, False, 1e-5, [True, False, False])
                batch_norm_update(mean, var, offsets, math.prod(size[2:]), None, listed, listed, counts)
            for k, made in enumerate(launches):
                # these read no pictures: once is enough
                of_tables = made.fn in (task_batch_norm_finish_kernel, task_batch_norm_update_kernel)
                if not made.fn.__name__.startswith("task_batch_norm") or (
                    of_tables and (layout, dtype) != ("channels_last", torch.float32)
                ):
                    continue
                name = f"{made.fn.__name__}-{layout}-{k}-{str(dtype).removeprefix('torch.')}"
                representative = layout == "channels_last" or (
                    layout == "channels_last-small"
                    and made.fn in (task_batch_norm_fwd_kernel, task_batch_norm_bwd_kernel)
                )
                loads16 = not of_tables and not layout.endswith("odd")
                yield as_target(name, made, dtype, representative, False, loads16)


_TARGET_SIZES = {
    "contiguous": (64, 64, 56, 56),
    "contiguous-small": (8, 512, 8, 8),
    "contiguous-odd": (64, 64, 7, 7),
    "channels_last": (64, 256, 56, 56),
    "channels_last-small": (8, 512, 7, 7),
    "channels_last-odd": (64, 3, 33, 33),
}
