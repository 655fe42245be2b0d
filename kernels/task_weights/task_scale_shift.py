"""Per-task scale and shift of channels: one pass forward, one pass and a small reduction backward.

All layouts are read as `[batch, outer, inner]` with inner contiguous:

    contiguous    [N, C, S]     rows of S pixels, one channel each
    channels_last [N, S, C]     rows of C channels
    flat          [1, N, C]     the same with S = 1, so that a tile can hold several samples

In signatures:

    p_x, p_y, p_grad, p_grad_x    [N, C, ...] in one of these layouts
    p_scale, p_shift              [T, C], contiguous, as are their gradients
    p_ids                         [N]
    p_scale_sums, p_shift_sums    [N, num_sums, C] float32
    num_outer, num_inner          sizes of a batch entry; num_inner, and num_channels of the reduction, in units of
                                  WIDTH, so that the compiler knows by what rows are aligned
    OUTER, INNER                  sizes of a tile
    INT64_OFFSETS                 whether positions within a batch entry need 64 bits
    b_*                           a block of values in registers
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmtl.kernels.common.build_target import BuildTarget, as_target
from fastmtl.kernels.common.launches import launch, recording

# elements of a tile: two 16-byte loads of a 16-bit type per thread of four warps
TILE = 2048
# longest rows of a tile
PIXELS, CHANNELS = 1024, 256
# what one program of the backward pass sums up: few enough to fill a GPU, enough for few partial sums
PIXELS_PER_SUM = {"contiguous": 4096, "channels_last": 128}
# partial sums that one program of the reduction walks, and its tile
ROWS_PER_CHUNK = 256
REDUCE_ROWS, REDUCE_CHANNELS = 16, 128
FINISH_BLOCK = 256

_SIZES = ["num_tasks", "num_outer", "num_inner", "tiles_outer", "tiles_inner"]


@triton.jit(do_not_specialize=_SIZES)
def task_scale_shift_fwd_kernel(
    p_x, p_scale, p_shift, p_ids, p_y,
    num_tasks, num_outer, num_inner, tiles_outer, tiles_inner,
    LAYOUT: tl.constexpr, HAS_SHIFT: tl.constexpr, WIDTH: tl.constexpr, INT64_OFFSETS: tl.constexpr,
    OUTER: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """`y = x * scale[task] + shift[task]`; without a shift, the gradient of x."""
    tile = tl.program_id(0)
    tile_inner = tile % tiles_inner
    tile_outer = tile // tiles_inner % tiles_outer
    batch = (tile // tiles_inner // tiles_outer).to(tl.int64)
    if INT64_OFFSETS:
        num_inner = num_inner.to(tl.int64)
        num_outer = num_outer.to(tl.int64)
    # in units of WIDTH, so that the compiler knows by what rows are aligned
    num_inner = num_inner * WIDTH
    outer = tile_outer.to(num_outer.dtype) * OUTER + tl.arange(0, OUTER)  # [OUTER]
    inner = tile_inner.to(num_inner.dtype) * INNER + tl.arange(0, INNER)  # [INNER]
    inside = (outer < num_outer)[:, None] & (inner < num_inner)[None, :]
    at = batch * num_outer * num_inner + outer[:, None] * num_inner + inner[None, :]  # [OUTER, INNER]
    if LAYOUT == "flat":
        task = tl.load(p_ids + outer, mask=outer < num_outer, other=-1).to(tl.int64)[:, None]
        num_channels = num_inner
        channel = inner[None, :]
    else:
        task = tl.load(p_ids + batch).to(tl.int64)
        if LAYOUT == "contiguous":
            num_channels = num_outer
            channel = outer[:, None]
        else:
            num_channels = num_inner
            channel = inner[None, :]
    # an id out of range reads nothing, and its scale is NaN
    known = (task >= 0) & (task < num_tasks) & (channel < num_channels)
    entry = task * num_channels + channel
    b_scale = tl.load(p_scale + entry, mask=known, other=float("nan")).to(tl.float32)
    b_y = tl.load(p_x + at, mask=inside, other=0.0).to(tl.float32) * b_scale
    if HAS_SHIFT:
        b_y += tl.load(p_shift + entry, mask=known, other=0.0).to(tl.float32)
    tl.store(p_y + at, b_y.to(p_y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=[*_SIZES, "steps", "num_sums"])
def task_scale_shift_bwd_kernel(
    p_grad, p_x, p_scale, p_ids, p_grad_x, p_scale_sums, p_shift_sums,
    num_tasks, num_outer, num_inner, tiles_outer, tiles_inner, steps, num_sums,
    LAYOUT: tl.constexpr, WANT_X: tl.constexpr, WANT_SCALE: tl.constexpr, WANT_SHIFT: tl.constexpr,
    WIDTH: tl.constexpr, INT64_OFFSETS: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """The gradient of x, and sums over `steps` tiles of one sample: `[batch, part, C]`, `num_sums` parts a sample."""
    program = tl.program_id(0)
    if INT64_OFFSETS:
        num_inner = num_inner.to(tl.int64)
        num_outer = num_outer.to(tl.int64)
    num_inner = num_inner * WIDTH
    # one axis is channels, the other is walked
    if LAYOUT == "contiguous":
        part = program % num_sums
        tile_outer = program // num_sums % tiles_outer
        batch = (program // num_sums // tiles_outer).to(tl.int64)
        outer = tile_outer.to(num_outer.dtype) * OUTER + tl.arange(0, OUTER)
        inner = part.to(num_inner.dtype) * steps * INNER + tl.arange(0, INNER)
        channel = outer
        num_channels = num_outer
    else:
        tile_inner = program % tiles_inner
        part = program // tiles_inner % num_sums
        batch = (program // tiles_inner // num_sums).to(tl.int64)
        outer = part.to(num_outer.dtype) * steps * OUTER + tl.arange(0, OUTER)
        inner = tile_inner.to(num_inner.dtype) * INNER + tl.arange(0, INNER)
        channel = inner
        num_channels = num_inner
    if WANT_X:
        task = tl.load(p_ids + batch).to(tl.int64)
        known = (task >= 0) & (task < num_tasks) & (channel < num_channels)
        b_scale = tl.load(p_scale + task * num_channels + channel, mask=known, other=float("nan")).to(tl.float32)
        b_scale = b_scale[:, None] if LAYOUT == "contiguous" else b_scale[None, :]
    start = batch * num_outer * num_inner
    b_scale_sum = tl.zeros((OUTER, INNER), tl.float32)
    b_shift_sum = tl.zeros((OUTER, INNER), tl.float32)
    for _ in range(steps):
        inside = (outer < num_outer)[:, None] & (inner < num_inner)[None, :]
        at = start + outer[:, None] * num_inner + inner[None, :]
        b_grad = tl.load(p_grad + at, mask=inside, other=0.0).to(tl.float32)
        if WANT_X:
            tl.store(p_grad_x + at, (b_grad * b_scale).to(p_grad_x.dtype.element_ty), mask=inside)
        if WANT_SCALE:
            b_scale_sum += b_grad * tl.load(p_x + at, mask=inside, other=0.0).to(tl.float32)
        if WANT_SHIFT:
            b_shift_sum += b_grad
        if LAYOUT == "contiguous":
            inner += INNER
        else:
            outer += OUTER
    axis: tl.constexpr = 1 if LAYOUT == "contiguous" else 0
    to = (batch * num_sums + part) * num_channels + channel
    if WANT_SCALE:
        tl.store(p_scale_sums + to, tl.sum(b_scale_sum, axis=axis), mask=channel < num_channels)
    if WANT_SHIFT:
        tl.store(p_shift_sums + to, tl.sum(b_shift_sum, axis=axis), mask=channel < num_channels)


@triton.jit(do_not_specialize=["num_tasks", "num_rows", "num_sums", "num_channels", "rows_per_chunk"])
def task_scale_shift_bwd_reduce_kernel(
    p_scale_rows, p_shift_rows, p_ids, p_grad_scale, p_grad_shift,
    num_tasks, num_rows, num_sums, num_channels, rows_per_chunk,
    DIRECT: tl.constexpr, WANT_SCALE: tl.constexpr, WANT_SHIFT: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums the rows `[num_rows, C]` of each task, `num_sums` rows a sample, in order: `[chunk, T, C]`.

    DIRECT: the rows are x and the incoming gradient themselves, and their products are summed.
    """
    task = tl.program_id(0) % num_tasks
    chunk = tl.program_id(0) // num_tasks
    num_channels = num_channels * WIDTH
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    begin = chunk.to(tl.int64) * rows_per_chunk
    end = tl.minimum(begin + rows_per_chunk, num_rows)
    b_scale = tl.zeros((ROWS, CHANNELS), tl.float32)
    b_shift = tl.zeros((ROWS, CHANNELS), tl.float32)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        ids = tl.load(p_ids + row // num_sums, mask=row < end, other=-1)
        # rows of other tasks are not read
        mine = (ids == task)[:, None] & (channel < num_channels)[None, :]
        at = row[:, None] * num_channels + channel[None, :]
        if DIRECT:
            b_grad = tl.load(p_shift_rows + at, mask=mine, other=0.0).to(tl.float32)
            if WANT_SCALE:
                b_scale += b_grad * tl.load(p_scale_rows + at, mask=mine, other=0.0).to(tl.float32)
            if WANT_SHIFT:
                b_shift += b_grad
        else:
            if WANT_SCALE:
                b_scale += tl.load(p_scale_rows + at, mask=mine, other=0.0)
            if WANT_SHIFT:
                b_shift += tl.load(p_shift_rows + at, mask=mine, other=0.0)
    to = (chunk.to(tl.int64) * num_tasks + task) * num_channels + channel
    if WANT_SCALE:
        total = tl.sum(b_scale, axis=0).to(p_grad_scale.dtype.element_ty)
        tl.store(p_grad_scale + to, total, mask=channel < num_channels)
    if WANT_SHIFT:
        total = tl.sum(b_shift, axis=0).to(p_grad_shift.dtype.element_ty)
        tl.store(p_grad_shift + to, total, mask=channel < num_channels)


@triton.jit(do_not_specialize=["num_chunks", "num_entries"])
def task_scale_shift_bwd_finish_kernel(p_chunks, p_total, num_chunks, num_entries, BLOCK: tl.constexpr):
    """Sums `[num_chunks, num_entries]` over the chunks, in order."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_total = tl.zeros((BLOCK,), tl.float32)
    for chunk in range(num_chunks):
        b_total += tl.load(p_chunks + chunk * num_entries.to(tl.int64) + entry, mask=entry < num_entries, other=0.0)
    tl.store(p_total + entry, b_total.to(p_total.dtype.element_ty), mask=entry < num_entries)


class _Tiling(NamedTuple):
    """x as `[batch, outer, inner]`, and how it is cut."""

    layout: str
    batch: int
    outer: int
    inner: int
    tile_outer: int
    tile_inner: int

    @property
    def tiles_outer(self) -> int:
        return triton.cdiv(self.outer, self.tile_outer)

    @property
    def tiles_inner(self) -> int:
        return triton.cdiv(self.inner, self.tile_inner)

    @property
    def width(self) -> int:
        return math.gcd(self.inner, 16)

    @property
    def int64_offsets(self) -> bool:
        """Whether positions within a batch entry need 64 bits."""
        return self.outer * self.inner >= 2**31 - 2 * TILE

    def arguments(self) -> dict[str, Any]:
        """What the kernels are told of it."""
        return {
            "num_outer": self.outer,
            "num_inner": self.inner // self.width,
            "tiles_outer": self.tiles_outer,
            "tiles_inner": self.tiles_inner,
            "LAYOUT": self.layout,
            "WIDTH": self.width,
            "INT64_OFFSETS": self.int64_offsets,
            "OUTER": self.tile_outer,
            "INNER": self.tile_inner,
            "num_warps": min(max(self.tile_outer * self.tile_inner // 512, 1), 4),
        }


def _tiling(layout: str, batch: int, outer: int, inner: int) -> _Tiling:
    longest = PIXELS if layout == "contiguous" else CHANNELS
    tile_inner = min(triton.next_power_of_2(inner), longest)
    tile_outer = min(triton.next_power_of_2(outer), TILE // tile_inner)
    return _Tiling(layout, batch, outer, inner, tile_outer, tile_inner)


def _layout(x: Tensor) -> str | None:
    """How the elements of x lie; None: in no order that the kernels read."""
    pixels = math.prod(x.shape[2:])
    if x.is_contiguous():
        return "flat" if pixels == 1 else "contiguous"
    return ("flat" if pixels == 1 else "channels_last") if x.movedim(1, -1).is_contiguous() else None


def _in_layout(x: Tensor, layout: str) -> Tensor:
    """x, copied where it lies in another order."""
    if _layout(x) == layout:
        return x
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "channels_last" else x.contiguous()


def _tiling_of(x: Tensor, layout: str) -> _Tiling:
    num_samples, num_channels = x.shape[:2]
    if layout == "flat":
        return _tiling(layout, 1, num_samples, num_channels)
    pixels = math.prod(x.shape[2:])
    sizes = (num_channels, pixels) if layout == "contiguous" else (pixels, num_channels)
    return _tiling(layout, num_samples, *sizes)


def _readable(x: Tensor) -> tuple[Tensor, str]:
    layout = _layout(x)
    return (x, layout) if layout is not None else (x.contiguous(), _layout(x.contiguous()) or "contiguous")


def _multiply_add(x: Tensor, scale: Tensor, shift: Tensor | None, task_ids: Tensor, y: Tensor, layout: str) -> None:
    tiling = _tiling_of(x, layout)
    launch(
        task_scale_shift_fwd_kernel,
        (tiling.batch * tiling.tiles_outer * tiling.tiles_inner,),
        p_x=x,
        p_scale=scale,
        p_shift=scale if shift is None else shift,
        p_ids=task_ids,
        p_y=y,
        num_tasks=scale.shape[0],
        HAS_SHIFT=shift is not None,
        **tiling.arguments(),
    )


def scale_shift(x: Tensor, scale: Tensor, shift: Tensor, task_ids: Tensor) -> Tensor:
    """`x * scale[task] + shift[task]` in x's dtype and memory order, computed in float32."""
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    source, layout = _readable(x)
    target = y if _layout(y) == layout and source is x else torch.empty_like(source)
    _multiply_add(source, scale.contiguous(), shift.contiguous(), task_ids.contiguous(), target, layout)
    return y if target is y else y.copy_(target)


def scale_shift_backward(
    grad_out: Tensor, x: Tensor, scale: Tensor, shift: Tensor, task_ids: Tensor, wanted: Sequence[bool]
) -> list[Tensor]:
    """The gradients of x, scale and shift, of these the wanted ones."""
    want_x, want_scale, want_shift = wanted
    grad_x = torch.empty_like(x) if want_x else None
    tables = [
        torch.empty(p.shape, dtype=p.dtype, device=p.device) if want else None
        for p, want in ((scale, want_scale), (shift, want_shift))
    ]
    out = [g for g in (grad_x, *tables) if g is not None]
    if x.numel() == 0:
        for table in tables:
            if table is not None:
                table.zero_()
        return out
    source, layout = _readable(x)
    grad, ids, scale = _in_layout(grad_out, layout), task_ids.contiguous(), scale.contiguous()
    target = grad_x
    if grad_x is not None and (_layout(grad_x) != layout or source is not x):
        target = torch.empty_like(source)
    if not want_scale and not want_shift:
        if target is not None:
            _multiply_add(grad, scale, None, ids, target, layout)
    elif layout == "flat":
        if target is not None:
            _multiply_add(grad, scale, None, ids, target, layout)
        _reduce((source, grad), ids, 1, tables, direct=True)
    else:
        rows, num_sums = _sum_samples(grad, source, scale, ids, target, wanted, layout)
        _reduce(rows, ids, num_sums, tables, direct=False)
    if grad_x is not None and target is not grad_x:
        grad_x.copy_(target)
    return out


def _sum_samples(
    grad: Tensor, x: Tensor, scale: Tensor, ids: Tensor, grad_x: Tensor | None, wanted: Sequence[bool], layout: str
) -> tuple[tuple[Tensor, Tensor], int]:
    """Writes `grad_x`; returns the sums of parts of samples, `[N, parts, C]`, for scale and shift."""
    tiling = _tiling_of(x, layout)
    walked, step, other = (
        (tiling.inner, tiling.tile_inner, tiling.tiles_outer)
        if layout == "contiguous"
        else (tiling.outer, tiling.tile_outer, tiling.tiles_inner)
    )
    steps = min(triton.cdiv(walked, step), max(PIXELS_PER_SUM[layout] // step, 1))
    num_sums = triton.cdiv(walked, steps * step)
    shape = (x.shape[0], num_sums, x.shape[1])
    # one memory for both: what is not wanted is not touched
    sums = torch.empty((sum(wanted[1:]), *shape), dtype=torch.float32, device=x.device)
    launch(
        task_scale_shift_bwd_kernel,
        (tiling.batch * num_sums * other,),
        p_grad=grad,
        p_x=x,
        p_scale=scale,
        p_ids=ids,
        p_grad_x=grad if grad_x is None else grad_x,
        p_scale_sums=sums[0],
        p_shift_sums=sums[-1],
        num_tasks=scale.shape[0],
        steps=steps,
        num_sums=num_sums,
        WANT_X=grad_x is not None,
        WANT_SCALE=wanted[1],
        WANT_SHIFT=wanted[2],
        **tiling.arguments(),
    )
    return (sums[0], sums[-1]), num_sums


def _reduce(
    rows: tuple[Tensor, Tensor], ids: Tensor, num_sums: int, tables: Sequence[Tensor | None], direct: bool
) -> None:
    """Sums rows by task into the tables that are there."""
    wanted = [table for table in tables if table is not None]
    num_tasks, num_channels = wanted[0].shape
    num_rows = ids.shape[0] * num_sums
    num_chunks = triton.cdiv(num_rows, ROWS_PER_CHUNK)
    # several chunks: their sums first
    chunks = None
    if num_chunks > 1:
        chunks = torch.empty((len(wanted), num_chunks, *wanted[0].shape), dtype=torch.float32, device=ids.device)
    targets = wanted if chunks is None else list(chunks.unbind(0))
    width = math.gcd(num_channels, 16)
    launch(
        task_scale_shift_bwd_reduce_kernel,
        (num_tasks * num_chunks, triton.cdiv(num_channels, REDUCE_CHANNELS)),
        p_scale_rows=rows[0],
        p_shift_rows=rows[1],
        p_ids=ids,
        p_grad_scale=targets[0],
        p_grad_shift=targets[-1],
        num_tasks=num_tasks,
        num_rows=num_rows,
        num_sums=num_sums,
        num_channels=num_channels // width,
        rows_per_chunk=ROWS_PER_CHUNK,
        DIRECT=direct,
        WANT_SCALE=tables[0] is not None,
        WANT_SHIFT=tables[1] is not None,
        WIDTH=width,
        ROWS=REDUCE_ROWS,
        CHANNELS=REDUCE_CHANNELS,
    )
    if chunks is None:
        return
    for table, parts in zip(wanted, targets, strict=True):
        launch(
            task_scale_shift_bwd_finish_kernel,
            (triton.cdiv(table.numel(), FINISH_BLOCK),),
            p_chunks=parts,
            p_total=table,
            num_chunks=num_chunks,
            num_entries=table.numel(),
            BLOCK=FINISH_BLOCK,
        )


def build_targets() -> Iterator[BuildTarget]:
    """Every kernel in every layout, dtype and tile shape that is not a smaller one of the same."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for layout, size in _TARGET_SIZES.items():
            x = torch.empty(size, dtype=dtype, device="meta")
            if layout.startswith("channels_last"):
                x = x.contiguous(memory_format=torch.channels_last)
            # float32 tables beside 16-bit pictures, as under autocast
            table = torch.empty(8, size[1], dtype=torch.float32, device="meta")
            ids = torch.empty(size[0], dtype=torch.int64, device="meta")
            with recording() as launches:
                scale_shift(x, table, table, ids)
                scale_shift_backward(x, x, table, table, ids, [True, True, True])
                scale_shift_backward(x, x, table, table, ids, [True, False, False])
                scale_shift_backward(x, x, table, table, ids, [False, False, True])
            for k, made in enumerate(launches):
                name = f"{made.fn.__name__}-{layout}-{k}-{str(dtype).removeprefix('torch.')}"
                # the last kernel reads one float32 per thread and row
                loads16 = not layout.endswith("odd") and made.fn is not task_scale_shift_bwd_finish_kernel
                yield as_target(name, made, dtype, layout == "channels_last" and k < 4, False, loads16)


_TARGET_SIZES = {
    "contiguous": (64, 64, 56, 56),
    "contiguous-small": (64, 512, 8, 8),
    "contiguous-odd": (64, 64, 7, 7),
    "channels_last": (64, 256, 56, 56),
    "channels_last-odd": (64, 3, 33, 33),
    "flat": (4096, 768),
    "flat-odd": (64, 33),
}
