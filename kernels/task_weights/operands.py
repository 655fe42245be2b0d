"""What the launchers of the task convolution hand to its kernels: the sorted batch, the filters, and flat arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmtl.core.task_weights import Geometry, SortedBatch, TaskWeights
from fastmtl.core.tensors import is_channels_last
from fastmtl.kernels.common.launches import Prepared, next_power_of_2, planned, pointer_table
from fastmtl.kernels.task_weights import configs
from fastmtl.kernels.task_weights.stage import stage_kernel

INT32_MAX = 2**31 - 1
NO_DELTAS_STRIDES = (0,) * 5


class Batch(NamedTuple):
    """A sorted batch, with what the choice of tiles needs to know of it."""

    order: Tensor
    offsets: Tensor
    num_samples: int
    num_tasks: int

    @classmethod
    def of(cls, batch: SortedBatch) -> Batch:
        order, offsets = batch
        return cls(order, offsets, order.shape[0], offsets.shape[0] - 1)

    def together(self) -> Batch:
        """The same samples as those of one task; samples of no task stay out."""
        offsets = self.offsets if self.num_tasks == 1 else self.offsets[:: self.num_tasks].contiguous()
        return Batch.of(SortedBatch(self.order, offsets))

    @property
    def parts(self) -> int:
        """How many tasks it can hold at most."""
        return max(1, min(self.num_tasks, self.num_samples))

    def rows_per_task(self, pixels: int) -> int:
        return -(-self.num_samples * pixels // self.parts)

    def row_tiles(self, pixels: int, rows: int) -> int:
        """As many as there can be where no tile holds two tasks; samples of no task are one more."""
        if self.num_samples * pixels == 0:
            return 0
        return -(-self.num_samples * pixels // rows) + min(self.num_tasks + 1, self.num_samples) - 1

    @property
    def block(self) -> int:
        """For the kernels' search among the offsets."""
        return next_power_of_2(self.num_tasks + 1)


class Deltas(NamedTuple):
    """Where the kernels find each task's delta, or write its gradient."""

    base: Tensor | None  # one `[T, ...]` tensor, or one of the list for its dtype and strides; None: no task has one
    table: Tensor | None  # addresses by task, 0 for none; None for one tensor
    strides: tuple[int, ...]  # t, co, ci, kh, kw
    aligned: bool  # whether addresses in the table are multiples of 16 bytes
    held: Sequence[Tensor]  # what the table points to

    @property
    def multiple(self) -> int:
        """Of the strides and addresses, see `common_multiple`."""
        return common_multiple(self.base) if self.base is not None and self.aligned else 1

    @property
    def key(self) -> tuple[Any, ...] | None:
        """What a plan depends on."""
        return None if self.base is None else (*signature(self.base), self.strides, self.aligned, self.table is None)


NO_DELTAS = Deltas(None, None, NO_DELTAS_STRIDES, False, ())


class Operand(NamedTuple):
    """How the kernels come to W + s_t Delta_t."""

    settled: dict[str, Any]  # of the kernels' arguments, but for pointers
    stage: Prepared | None  # None: nothing is staged
    workspace: tuple[int, ...]  # `[slots, Cout, kh, kw, Cin / groups]`, where something is
    own: bool  # the stacked deltas are the tasks' weights, which are read as they are

    def pointers(self, weights: TaskWeights, deltas: Deltas, gate: Tensor | None, batch: Batch, dtype: torch.dtype):
        """The kernels' pointers; stages, if that is planned."""
        p_w = deltas.base if self.own else weights.weight
        if self.stage is not None:
            p_w = torch.empty(self.workspace, dtype=dtype, device=batch.offsets.device)
            self.stage(
                p_out=p_w,
                p_w=weights.weight,
                p_delta=deltas.base,
                p_table=deltas.table,
                p_gate=gate,
                p_offsets=batch.offsets,
            )
        return {"p_w": p_w, "p_delta": deltas.base, "p_table": deltas.table, "p_gate": gate}


def by_channel(x: Tensor, channels: int) -> Tensor:
    """x with channels next to each other, by a copy unless it is so or has few: else single elements are loaded."""
    if x.stride(1) == 1 or channels < configs.CHANNELS_LAST_MIN_CHANNELS:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def deltas_of(tensors: Sequence[Tensor], tasks: Sequence[int], num_tasks: int, copy: bool = True) -> Deltas:
    if not tensors:
        return NO_DELTAS
    if not tasks:
        (stacked,) = tensors
        return Deltas(stacked, None, stacked.stride(), True, tensors)
    # one kernel meets them all with the same strides: for odd ones there are others in their place
    given_strides = [d.stride() for d in tensors]
    strides = given_strides[0]
    if given_strides.count(strides) == len(tensors):
        same = list(tensors)
    else:
        # without overlaps, such as an expanded delta has: the odd ones are copied to such memory
        strides = torch.empty_like(tensors[0], device="meta").stride()
        same = [
            d if own == strides else d.new_empty_strided(d.shape, strides)
            for d, own in zip(tensors, given_strides, strict=True)
        ]
    by_task: list[Tensor | None] = [None] * num_tasks
    for t, d, given in zip(tasks, same, tensors, strict=True):
        if copy and d is not given:
            d.copy_(given)
        by_task[t] = d
    aligned = all(d.data_ptr() % 16 == 0 for d in same)
    return Deltas(same[0], pointer_table(by_task), (0, *strides), aligned, same)


def memory_together(weights: TaskWeights, wanted_delta: Sequence[int], num_tasks: int) -> Tensor | None:
    """Memory for the gradients of a list, `[T, ...]`, if every task has one and wants it; else None.

    One allocation in place of T. Each begins at a multiple of 128 bytes. The kernels still go by a table of addresses:
    by a stride the largest walk with W's and the gates' gradients spills 8 bytes on sm_90.
    """
    if list(weights.delta_tasks) != list(range(num_tasks)) or len(wanted_delta) < num_tasks:
        return None
    first = weights.delta[0]
    last = is_channels_last(first)
    if any(d.stride() != first.stride() and is_channels_last(d) != last for d in weights.delta):
        return None
    shape, strides = planned(
        ("together", num_tasks, last, signature(first)), lambda: _plan_memory_together(first, last, num_tasks)
    )
    return torch.empty_strided(shape, strides, dtype=first.dtype, device=first.device)


def _plan_memory_together(first: Tensor, last: bool, num_tasks: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    # in the memory order of `like_parameter`
    order = torch.channels_last if last else torch.contiguous_format
    strides = torch.empty(first.shape, device="meta", memory_format=order).stride()
    line = 128 // first.element_size()
    return (num_tasks, *first.shape), (-(-first.numel() // line) * line, *strides)


def plan_operand(dtype: torch.dtype, weights: TaskWeights, deltas: Deltas, batch: Batch, rows: int) -> Operand:
    """For W + s_t Delta_t: staged, or to be added in the kernels' main loop."""
    weight, (features, channels, kh, kw) = weights.weight, weights.shape
    w_strides = (0,) * 4 if weight is None else weight.stride()
    w_multiple = 1 if weight is None else common_multiple(weight)
    given = {
        "W_MULTIPLE": w_multiple,
        "D_MULTIPLE": deltas.multiple,
        "shared_slot": 0,
        **filter_strides("w", (0, *w_strides)),
        **filter_strides("d", deltas.strides),
        "FUSED": False,
    }
    # of what is not read: constants, so that layers share a compiled kernel
    unread = {**filter_strides("d", NO_DELTAS_STRIDES), "D_MULTIPLE": 1}
    if deltas.base is None and weight is not None and weight.dtype == dtype and weight.stride(1) == 1:
        # every task sees W, which can be read as it is
        return Operand(given, None, (), False)
    if weight is None and weights.stacked and weights.gate is None:
        (delta,) = weights.delta
        if delta.dtype == dtype and deltas.strides[2] == 1:
            # the tasks' own weights lie in slots as a workspace's would
            own = {**filter_strides("w", deltas.strides), "W_MULTIPLE": deltas.multiple}
            return Operand({**given, **own, **unread}, None, (), True)
    contiguous = (weight is None or weight.stride(1) == 1) and (deltas.base is None or deltas.strides[2] == 1)
    if configs.pick_schedule(rows, contiguous) == "fused":
        return Operand({**given, "FUSED": True}, None, (), False)
    slots = 1 if deltas.base is None else batch.num_tasks + 1
    size = features * channels * kh * kw
    shape = {"channels": channels, "rows": features * channels, "KH": kh, "KW": kw}
    strides = {**arguments("w", "co ci kh kw", w_strides), **filter_strides("d", deltas.strides)}
    dense = (kh * kw * channels, 1, kw * channels, channels)
    if all(
        n == 1 or s in (None, d)
        for held in (
            w_strides if weight is not None else (None,) * 4,
            deltas.strides[1:] if deltas.held else (None,) * 4,
        )
        for n, s, d in zip(weights.shape, held, dense, strict=True)
    ):
        # memory in the order of the workspace: one line of elements, without taps that fill no power of two
        shape = {"channels": size, "rows": size, "KH": 1, "KW": 1}
        strides = {
            **arguments("w", "co ci kh kw", (0, 1, 0, 0)),
            **filter_strides("d", (deltas.strides[0], 0, 1, 0, 0)),
        }
        w_multiple = 1 if weight is None else multiple_of(weight.dtype)
    taps = next_power_of_2(shape["KH"] * shape["KW"])
    block = max(16, configs.STAGE_BLOCK // taps)
    stage = Prepared(
        stage_kernel,
        (-(-shape["rows"] // block), slots),
        num_tasks=slots - 1,
        **shape,
        **strides,
        MULTIPLE=multiple_of(dtype, shape["channels"]),
        W_MULTIPLE=w_multiple,
        D_MULTIPLE=deltas.multiple,
        INT64_OFFSETS=needs_int64_offsets(0, filters=held_weights(weights)),
        BR=block,
        BT=taps,
    )
    staged = {
        "shared_slot": slots - 1,
        **filter_strides("w", (size, kh * kw * channels, 1, kw * channels, channels)),
        "W_MULTIPLE": multiple_of(dtype, channels),
    }
    return Operand({**given, **staged, **unread}, stage, (slots, features, kh, kw, channels), False)


def held_weights(weights: TaskWeights) -> list[Tensor]:
    return [w for w in (weights.weight, *weights.delta[:1]) if w is not None]


# --- arguments


def signature(x: Tensor | None) -> tuple[Any, ...] | None:
    """What a plan depends on of a tensor."""
    return None if x is None else (x.dtype, x.shape, x.stride())


def arguments(prefix: str, names: str, values: Sequence[int]) -> dict[str, int]:
    """Arguments of a kernel; see the legend of `tiles.py`."""
    return {f"{prefix}_{name}": v for name, v in zip(names.split(), values, strict=True)}


def picture_strides(prefix: str, x: Tensor) -> dict[str, int]:
    """The strides of x or a result, `[N, C, H, W]`."""
    return arguments(prefix, "n c h w", x.stride())


def filter_strides(prefix: str, strides: Sequence[int]) -> dict[str, int]:
    """Those of filters that lie one behind another: `[T, Cout, Cin / groups, kh, kw]`."""
    return arguments(prefix, "t co ci kh kw", strides)


def filter_moves(kh: int, kw: int, geometry: Geometry) -> dict[str, int]:
    """How a filter of kh x kw taps goes over a picture."""
    (sh, sw), (dh, dw) = geometry.stride, geometry.dilation
    return {**arguments("pad", "h w", geometry.padding), "KH": kh, "KW": kw, "SH": sh, "SW": sw, "DH": dh, "DW": dw}


def block_sizes(tile: configs.Tile, depth: str) -> dict[str, int]:
    return {"BM": tile.rows, "BN": tile.cols, depth: tile.depth}


def multiple_of(dtype: torch.dtype, *numbers: int) -> int:
    """Elements of 16 bytes, if all numbers are multiples of that; else 1."""
    most = 16 // dtype.itemsize
    return most if all(n % most == 0 for n in numbers) else 1


def common_multiple(*tensors: Tensor, sizes: Sequence[int] = ()) -> int:
    """The same of sizes and of all strides but the channels'; tensors of one dtype, `[.., channels, height, width]`.

    With it the kernels load 16 bytes at a time, also of 40 channels or 1000, which Triton takes for single elements:
    by itself it looks for multiples of 16.
    """
    strides = [
        s
        for x in tensors
        for d, (n, s) in enumerate(zip(x.shape, x.stride(), strict=True))
        if d != x.dim() - 3 and n > 1
    ]
    return multiple_of(tensors[0].dtype, *sizes, *strides)


def needs_int64_offsets(rows: int, pictures: Sequence[Tensor] = (), filters: Sequence[Tensor] = ()) -> bool:
    """Whether counts of rows, or offsets inside one sample or one filter, can pass 32 bits.

    Where a sample, or a task of a `[T, ...]` tensor, begins is 64 bit in any case. A filter's copies in a workspace
    are dense: they have as many elements as it has, whatever its strides. Twice, for a tile's masked rows and columns.
    """
    inside = [(x.shape[1:], x.stride()[1:]) for x in pictures] + [(w.shape[-4:], w.stride()[-4:]) for w in filters]
    reach = [sum((n - 1) * s for n, s in zip(*each, strict=True)) for each in inside]
    sizes = [math.prod(w.shape[-4:]) for w in filters]
    return max(2 * max([*reach, *sizes], default=0), rows + 2**16) > INT32_MAX
