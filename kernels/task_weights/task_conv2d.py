"""Launchers of the task convolution: forward, input gradient, weight gradients. All on the device, no waiting.

`task_linear` comes here as a 1x1 convolution of `[N, C, 1, R]` channels-last views. See docs/task-kernels.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmtl.core.task_weights import Geometry, SortedBatch, TaskConvCall, TaskWeights, empty_gradients
from fastmtl.core.tensors import is_channels_last
from fastmtl.kernels.common.launches import Prepared, in_interpreter, next_power_of_2, planned, pointer_table
from fastmtl.kernels.task_weights import configs
from fastmtl.kernels.task_weights.conv_dgrad import task_conv2d_dgrad_kernel
from fastmtl.kernels.task_weights.conv_fwd import task_conv2d_fwd_kernel
from fastmtl.kernels.task_weights.conv_wgrad import (
    bias_grad_kernel,
    gate_grad_kernel,
    sum_parts_kernel,
    task_conv2d_wgrad_split_kernel,
    task_conv2d_wgrad_walk_kernel,
    wgrad_finish_kernel,
)
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
        """Of the strides and addresses, see `_multiple`."""
        return _multiple(self.base) if self.base is not None and self.aligned else 1

    @property
    def key(self) -> tuple[Any, ...] | None:
        """What a plan depends on."""
        return None if self.base is None else (*_sign(self.base), self.strides, self.aligned, self.table is None)


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


class Result(NamedTuple):
    """Memory for a result: as the op promises it, and as the kernel writes it if that is another order."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    written: tuple[int, ...] | None

    @classmethod
    def of(cls, shape: Sequence[int], strides: Sequence[int], channels: int) -> Result:
        """`channels`: of a group. Where they lie apart they are stored one at a time, which costs more than a copy."""
        written = None
        if strides[1] != 1 and channels >= configs.CHANNELS_LAST_MIN_CHANNELS:
            written = torch.empty(shape, device="meta", memory_format=torch.channels_last).stride()
        return cls(tuple(shape), tuple(strides), written)

    @property
    def kernel_strides(self) -> tuple[int, ...]:
        return self.written or self.strides


class ForwardPlan(NamedTuple):
    result: Result
    operand: Operand
    product: Prepared


def conv2d(x: Tensor, call: TaskConvCall) -> Tensor:
    """Forward: `[N, Cout, Ho, Wo]`, channels_last if x is; rows of no task are NaN."""
    weights, sorted_batch, geometry, bias = call
    last = is_channels_last(x)
    x = _by_channel(x, weights.shape[1])
    batch = Batch.of(sorted_batch)
    gate = None if weights.gate is None else weights.gate.contiguous()
    bias = None if bias is None else bias.contiguous()
    deltas = _deltas(weights.delta, weights.delta_tasks, batch.num_tasks)
    key = ("forward", x.device, _sign(x), last, _sign(weights.weight), deltas.key, gate is None, _sign(bias))
    plan = planned(
        (*key, batch.num_tasks, geometry, configs.choices()),
        lambda: _plan_forward(x, last, weights, deltas, bias, batch, geometry),
    )
    y = made = torch.empty_strided(plan.result.shape, plan.result.strides, dtype=x.dtype, device=x.device)
    if plan.result.written is not None:
        made = torch.empty_strided(plan.result.shape, plan.result.written, dtype=x.dtype, device=x.device)
    operand = plan.operand.pointers(weights, deltas, gate, batch, x.dtype)
    plan.product(**operand, p_x=x, p_bias=bias, p_y=made, p_order=batch.order, p_offsets=batch.offsets)
    return y if made is y else y.copy_(made)


def _plan_forward(
    x: Tensor,
    last: bool,
    weights: TaskWeights,
    deltas: Deltas,
    bias: Tensor | None,
    batch: Batch,
    geometry: Geometry,
) -> ForwardPlan:
    """x: with its channels as they will be read; `last`: whether the given one is channels_last."""
    features, channels, kh, kw = weights.shape
    height, width = geometry.output_size(x.shape[2:], (kh, kw))
    pixels, groups = height * width, geometry.groups
    shape = (x.shape[0], features, height, width)
    order = torch.channels_last if last else torch.contiguous_format
    features //= groups
    result = Result.of(shape, torch.empty(shape, device="meta", memory_format=order).stride(), features)
    y = torch.empty_strided(shape, result.kernel_strides, dtype=x.dtype, device="meta")
    rows = batch.rows_per_task(pixels)
    operand = _plan_operand(x.dtype, weights, deltas, batch, rows)
    packed = channels <= configs.PACKED_MAX_CHANNELS
    kernel = "fwd_packed" if packed else "fwd_fused" if operand.settled["FUSED"] else "fwd"
    tile = configs.pick_tile(kernel, batch.parts, rows, features, groups, x)
    product = Prepared(
        task_conv2d_fwd_kernel,
        (batch.row_tiles(pixels, tile.rows) * -(-features // tile.cols), groups),
        tile.num_warps,
        tile.num_stages,
        **operand.settled,
        num_samples=batch.num_samples,
        num_tasks=batch.num_tasks,
        height=x.shape[2],
        width=x.shape[3],
        out_width=width,
        pixels=pixels,
        channels=channels,
        features=features,
        **_picture("x", x),
        **_picture("y", y),
        b_t=0 if bias is None or bias.dim() == 1 else bias.shape[1],
        **_moves(kh, kw, geometry),
        PACKED=packed,
        PADDED=geometry.padding != (0, 0),
        MULTIPLE=_multiple(x, y, sizes=(channels, features)),
        SMALL=pixels <= configs.SMALL_PIXELS,
        INT64_OFFSETS=_int64_offsets(batch.num_samples * pixels, (x, y), _held(weights)),
        CAST=in_interpreter(),
        TB=batch.block,
        **_block(tile, "BK"),
    )
    return ForwardPlan(result, operand, product)


def conv2d_backward(
    grad_out: Tensor, x: Tensor, call: TaskConvCall, wanted: Sequence[bool], wanted_delta: Sequence[int]
) -> list[Tensor]:
    """The gradients of x, weight, deltas, gate and bias, of these the wanted ones; as the reference gives them."""
    weights, sorted_batch, geometry, bias = call
    batch = Batch.of(sorted_batch)
    out = empty_gradients(x, call, wanted, wanted_delta, _together(weights, wanted_delta, batch.num_tasks))
    left = iter(out)
    grad_x = next(left) if wanted[0] else None
    grad_weight = next(left) if wanted[1] and weights.weight is not None else None
    grad_delta = [next(left) for _ in wanted_delta]
    grad_gate = next(left) if wanted[2] and weights.gate is not None else None
    grad_bias = next(left) if wanted[3] and bias is not None else None

    features, channels = weights.shape[:2]
    grad_out = _by_channel(grad_out, features // geometry.groups)
    by_task = grad_gate is not None or bool(grad_delta)
    deltas = None
    if grad_x is not None or grad_gate is not None:
        deltas = _deltas(weights.delta, weights.delta_tasks, batch.num_tasks)
    if grad_x is not None:
        _input_grad(grad_out, grad_x, weights, deltas, batch, geometry)
    if grad_weight is not None or by_task:
        tasks = [weights.delta_tasks[k] for k in wanted_delta] if weights.delta_tasks else []
        _weight_grads(
            _by_channel(x, channels),
            grad_out,
            batch if by_task else batch.together(),
            geometry,
            tuple(weights.shape),
            gate=weights.gate if by_task else None,
            deltas=deltas if grad_gate is not None else None,
            grad_delta=grad_delta,
            grad_tasks=tasks,
            grad_gate=grad_gate,
            grad_weight=grad_weight,
        )
    if grad_bias is not None:
        _bias_grad(grad_out, batch if grad_bias.dim() == 2 else batch.together(), grad_bias)
    return out


def weight_grad(x: Tensor, grad_out: Tensor, batch: SortedBatch, geometry: Geometry, out: Tensor) -> None:
    """Each task's gradient of a shared filter into out, `[T, Cout, Cin / groups, kh, kw]` of any strides and dtype."""
    features, channels = out.shape[1:3]
    x, grad_out = _by_channel(x, channels), _by_channel(grad_out, features // geometry.groups)
    _weight_grads(x, grad_out, Batch.of(batch), geometry, tuple(out.shape[1:]), grad_delta=[out])


# --- gradients


def _input_grad(
    grad_out: Tensor, grad_x: Tensor, weights: TaskWeights, deltas: Deltas, batch: Batch, geometry: Geometry
) -> None:
    gate = None if weights.gate is None else weights.gate.contiguous()
    key = ("input", grad_x.device, _sign(grad_out), _sign(grad_x), _sign(weights.weight), deltas.key, gate is None)
    plan = planned(
        (*key, batch.num_tasks, geometry, configs.choices()),
        lambda: _plan_input_grad(grad_out, grad_x, weights, deltas, batch, geometry),
    )
    made = grad_x
    if plan.result.written is not None:
        made = torch.empty_strided(plan.result.shape, plan.result.written, dtype=grad_x.dtype, device=grad_x.device)
    operand = plan.operand.pointers(weights, deltas, gate, batch, grad_out.dtype)
    plan.product(**operand, p_dy=grad_out, p_dx=made, p_order=batch.order, p_offsets=batch.offsets)
    if made is not grad_x:
        grad_x.copy_(made)


def _plan_input_grad(
    grad_out: Tensor, grad_x: Tensor, weights: TaskWeights, deltas: Deltas, batch: Batch, geometry: Geometry
) -> ForwardPlan:
    features, channels, kh, kw = weights.shape
    groups, (sh, sw) = geometry.groups, geometry.stride
    features //= groups
    height, width = grad_x.shape[2:]
    result = Result.of(grad_x.shape, grad_x.stride(), channels)
    made = torch.empty_strided(grad_x.shape, result.kernel_strides, dtype=grad_x.dtype, device="meta")
    # of the largest residue class
    pixels = -(-height // sh) * -(-width // sw)
    rows = batch.rows_per_task(pixels)
    operand = _plan_operand(grad_out.dtype, weights, deltas, batch, rows)
    tile = configs.pick_tile(
        "dgrad_fused" if operand.settled["FUSED"] else "dgrad", batch.parts, rows, channels, groups * sh * sw, grad_out
    )
    product = Prepared(
        task_conv2d_dgrad_kernel,
        (batch.row_tiles(pixels, tile.rows) * -(-channels // tile.cols), groups, sh * sw),
        tile.num_warps,
        tile.num_stages,
        **operand.settled,
        num_samples=batch.num_samples,
        num_tasks=batch.num_tasks,
        height=height,
        width=width,
        out_height=grad_out.shape[2],
        out_width=grad_out.shape[3],
        channels=channels,
        features=features,
        **_picture("x", made),
        **_picture("y", grad_out),
        **_moves(kh, kw, geometry),
        STEP_H=sh // math.gcd(sh, geometry.dilation[0]),
        STEP_W=sw // math.gcd(sw, geometry.dilation[1]),
        EDGES=not geometry.pixelwise((kh, kw)),
        MULTIPLE=_multiple(made, grad_out, sizes=(channels, features)),
        SMALL=pixels <= configs.SMALL_PIXELS,
        INT64_OFFSETS=_int64_offsets(batch.num_samples * pixels, (made, grad_out), _held(weights)),
        CAST=in_interpreter(),
        TB=batch.block,
        **_block(tile, "BK"),
    )
    return ForwardPlan(result, operand, product)


class WeightPlan(NamedTuple):
    """`product` writes all, or, where rows are split, `parts`, of which `finish` makes the rest."""

    product: Prepared
    finish: Prepared | None
    parts: tuple[int, int]
    total: tuple[int, ...] | None  # sums of W's gradient over chunks of tasks, which `add` adds up
    add: Prepared | None
    gate_parts: tuple[int, int]
    gate: Prepared | None


def _weight_grads(
    x: Tensor,
    grad_out: Tensor,
    batch: Batch,
    geometry: Geometry,
    shape: tuple[int, ...],
    gate: Tensor | None = None,
    deltas: Deltas | None = None,
    grad_delta: Sequence[Tensor] = (),
    grad_tasks: Sequence[int] = (),
    grad_gate: Tensor | None = None,
    grad_weight: Tensor | None = None,
) -> None:
    """One walk over the batch for the gradients of W, deltas and gate. `deltas` are read for the gate's only."""
    if deltas is None or deltas.base is None:
        if grad_gate is not None:
            grad_gate.zero_()
            grad_gate = None
        deltas = NO_DELTAS
        if grad_weight is None and not grad_delta:
            return
    # gradients of another memory order than the first's are written in its order, and copied
    grads = _deltas(grad_delta, grad_tasks, batch.num_tasks, copy=False)
    gate = None if gate is None else gate.contiguous()
    key = ("weights", x.device, _sign(x), _sign(grad_out), shape, deltas.key, grads.key, _sign(grad_weight))
    plan = planned(
        (*key, grad_gate is None, batch.num_tasks, batch.num_samples, geometry, configs.choices()),
        lambda: _plan_weight_grads(x, grad_out, batch, geometry, shape, deltas, grads, grad_gate, grad_weight),
    )
    total, gate_parts = grad_weight, None
    if plan.total is not None:
        total = torch.empty(plan.total, dtype=torch.float32, device=x.device)
    if plan.gate is not None:
        gate_parts = torch.empty(plan.gate_parts, dtype=torch.float32, device=x.device)
    read = {"p_x": x, "p_dy": grad_out, "p_order": batch.order, "p_offsets": batch.offsets, "p_gate": gate}
    written = {"p_grad": grads.base, "p_grad_table": grads.table}
    into = {**written, "p_delta": deltas.base, "p_table": deltas.table, "p_partial": gate_parts, "p_dw": total}
    if plan.finish is None:
        plan.product(**read, **into)
    else:
        parts = torch.empty(plan.parts, dtype=torch.float32, device=x.device)
        plan.product(**read, **written, p_parts=parts)
        plan.finish(p_parts=parts, p_offsets=batch.offsets, p_gate=gate, **into)
    if plan.add is not None:
        plan.add(p_parts=total, p_out=grad_weight)
    if plan.gate is not None:
        plan.gate(p_partial=gate_parts, p_out=grad_gate)
    for made, grad in zip(grads.held, grad_delta, strict=True):
        if made is not grad:
            grad.copy_(made)


def _plan_weight_grads(
    x: Tensor,
    grad_out: Tensor,
    batch: Batch,
    geometry: Geometry,
    shape: tuple[int, ...],
    deltas: Deltas,
    grads: Deltas,
    grad_gate: Tensor | None,
    grad_weight: Tensor | None,
) -> WeightPlan:
    features, channels, kh, kw = shape
    groups, pixels = geometry.groups, grad_out.shape[2] * grad_out.shape[3]
    size = features * channels * kh * kw
    filter_ = configs.Filter.of(features, channels, kh * kw, groups)
    rows, summed = batch.num_samples * pixels, grad_weight is not None
    plan = configs.pick_wgrad(filter_, batch.num_tasks, batch.parts, rows, summed, x)
    tile, tiles, rows_out = plan.tile, filter_.tiles(plan.tile), filter_.rows
    chunks = -(-batch.num_tasks // plan.chunk_tasks)

    total, total_strides, total_multiple = None, (0, 0, 0, 0, 0), 1
    if grad_weight is not None:
        total_dtype, total_strides = grad_weight.dtype, (0, *grad_weight.stride())
        if chunks > 1:
            total, total_dtype = (chunks, features, kh, kw, channels), torch.float32
            total_strides = (size, kh * kw * channels, 1, kw * channels, channels)
        total_multiple = _multiple_of(total_dtype, *total_strides[:2], *total_strides[3:])
    blocks = -(-size // configs.FINISH_BLOCK)
    gate_parts = (batch.num_tasks, tiles * groups if plan.split_rows == 0 else blocks)
    written = [w for w in (grad_weight, grads.base, deltas.base) if w is not None]
    int64_offsets = _int64_offsets(rows, (x, grad_out), written)
    into: dict[str, Any] = {
        "num_tasks": batch.num_tasks,
        "chunk_tasks": plan.chunk_tasks,
        **_filters("d", deltas.strides),
        **_filters("g", grads.strides),
        **_named("w", "chunk co ci kh kw", total_strides),
        "W_MULTIPLE": total_multiple,
        "D_MULTIPLE": deltas.multiple,
        "G_MULTIPLE": grads.multiple,
    }
    read: dict[str, Any] = {
        "height": x.shape[2],
        "width": x.shape[3],
        "out_width": grad_out.shape[3],
        "pixels": pixels,
        "channels": channels,
        "features": rows_out,
        **_picture("x", x),
        **_picture("y", grad_out),
        **_moves(kh, kw, geometry),
        "PACKED": filter_.packed,
        "PADDED": geometry.padding != (0, 0),
        "MULTIPLE": _multiple(x, grad_out, sizes=(channels, rows_out)),
        "SMALL": pixels <= configs.SMALL_PIXELS,
        "INT64_OFFSETS": int64_offsets,
        "CAST": in_interpreter(),
        **_block(tile, "BP"),
    }
    finish, parts = None, (0, size)
    options = (tile.num_warps, tile.num_stages)
    if plan.split_rows == 0:
        product = Prepared(task_conv2d_wgrad_walk_kernel, (tiles, groups, chunks), *options, **read, **into)
    else:
        parts = (batch.row_tiles(pixels, plan.split_rows), size)
        product = Prepared(
            task_conv2d_wgrad_split_kernel,
            (tiles, groups, parts[0]),
            *options,
            **read,
            num_samples=batch.num_samples,
            num_tasks=batch.num_tasks,
            split_rows=plan.split_rows,
            size=size,
            DELTA_ONLY=grad_weight is None and grad_gate is None,
            TB=batch.block,
        )
        finish = _plan_finish(batch, pixels, plan.split_rows, (size, channels, kh, kw), int64_offsets, chunks, into)
    add = gate = None
    if total is not None:
        add = Prepared(
            sum_parts_kernel,
            (blocks,),
            count=chunks,
            size=size,
            channels=channels,
            step=size,
            **_named("o", "co ci kh kw", grad_weight.stride()),
            KH=kh,
            KW=kw,
            INT64_OFFSETS=int64_offsets,
            BE=configs.FINISH_BLOCK,
        )
    if grad_gate is not None:
        gate = Prepared(gate_grad_kernel, (batch.num_tasks,), count=gate_parts[1], BE=configs.FINISH_BLOCK)
    return WeightPlan(product, finish, parts, total, add, gate_parts, gate)


def _plan_finish(
    batch: Batch,
    pixels: int,
    split_rows: int,
    shape: tuple[int, ...],
    int64_offsets: bool,
    chunks: int,
    into: dict[str, Any],
) -> Prepared:
    size, channels, kh, kw = shape
    return Prepared(
        wgrad_finish_kernel,
        (-(-size // configs.FINISH_BLOCK), chunks),
        **into,
        pixels=pixels,
        split_rows=split_rows,
        channels=channels,
        size=size,
        KH=kh,
        KW=kw,
        MULTIPLE=_multiple_of(torch.float32, channels),
        INT64_OFFSETS=int64_offsets,
        TB=batch.block,
        BE=configs.FINISH_BLOCK,
    )


class BiasPlan(NamedTuple):
    parts: tuple[int, int]
    product: Prepared
    finish: Prepared


def _bias_grad(grad_out: Tensor, batch: Batch, grad_bias: Tensor) -> None:
    """Sums of grad_out by task, `[T, Cout]`, or over one, `[Cout]`."""
    plan = planned(
        ("bias", grad_out.device, _sign(grad_out), batch.num_tasks, configs.choices()),
        lambda: _plan_bias_grad(grad_out, batch),
    )
    parts = torch.empty(plan.parts, dtype=torch.float32, device=grad_out.device)
    plan.product(p_dy=grad_out, p_order=batch.order, p_offsets=batch.offsets, p_parts=parts)
    none = dict.fromkeys(("p_gate", "p_delta", "p_table", "p_grad_table", "p_partial", "p_dw"))
    plan.finish(p_parts=parts, p_offsets=batch.offsets, p_grad=grad_bias, **none)


def _plan_bias_grad(grad_out: Tensor, batch: Batch) -> BiasPlan:
    features, pixels = grad_out.shape[1], grad_out.shape[2] * grad_out.shape[3]
    columns, rows = configs.BIAS_TILE
    blocks = -(-features // columns)
    split_rows = configs.pick_split_rows(blocks, batch.num_samples * pixels, rows, grad_out)
    splits = batch.row_tiles(pixels, split_rows)
    int64_offsets = _int64_offsets(batch.num_samples * pixels, (grad_out,))
    product = Prepared(
        bias_grad_kernel,
        (blocks, splits),
        num_samples=batch.num_samples,
        num_tasks=batch.num_tasks,
        split_rows=split_rows,
        out_width=grad_out.shape[3],
        pixels=pixels,
        features=features,
        **_picture("y", grad_out),
        MULTIPLE=_multiple(grad_out, sizes=(features,)),
        SMALL=pixels <= configs.SMALL_PIXELS,
        INT64_OFFSETS=int64_offsets,
        TB=batch.block,
        BP=rows,
        BN=columns,
    )
    # the same finish as for a filter of one tap and one channel, with each task's sum as its delta's gradient
    into: dict[str, Any] = {
        "num_tasks": batch.num_tasks,
        "chunk_tasks": 1,
        **_filters("d", NO_DELTAS_STRIDES),
        **_filters("g", (features, 1, 0, 0, 0)),
        **_named("w", "chunk co ci kh kw", (0,) * 5),
        "W_MULTIPLE": 1,
        "D_MULTIPLE": 1,
        "G_MULTIPLE": 1,
    }
    finish = _plan_finish(batch, pixels, split_rows, (features, 1, 1, 1), int64_offsets, batch.num_tasks, into)
    return BiasPlan((splits, features), product, finish)


# --- operands


def _by_channel(x: Tensor, channels: int) -> Tensor:
    """x with channels next to each other, by a copy unless it is so or has few: else single elements are loaded."""
    if x.stride(1) == 1 or channels < configs.CHANNELS_LAST_MIN_CHANNELS:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def _deltas(tensors: Sequence[Tensor], tasks: Sequence[int], num_tasks: int, copy: bool = True) -> Deltas:
    if not tensors:
        return NO_DELTAS
    if not tasks:
        (stacked,) = tensors
        return Deltas(stacked, None, stacked.stride(), True, tensors)
    # one kernel meets them all with the same strides: for odd ones there are others in their place
    strides = tensors[0].stride()
    same = [d if d.stride() == strides else d.new_empty_strided(d.shape, strides) for d in tensors]
    by_task: list[Tensor | None] = [None] * num_tasks
    for t, d, given in zip(tasks, same, tensors, strict=True):
        if copy and d is not given:
            d.copy_(given)
        by_task[t] = d
    aligned = all(d.data_ptr() % 16 == 0 for d in same)
    return Deltas(same[0], pointer_table(by_task), (0, *strides), aligned, same)


def _together(weights: TaskWeights, wanted_delta: Sequence[int], num_tasks: int) -> Tensor | None:
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
        ("together", num_tasks, last, _sign(first)), lambda: _plan_together(first, last, num_tasks)
    )
    return torch.empty_strided(shape, strides, dtype=first.dtype, device=first.device)


def _plan_together(first: Tensor, last: bool, num_tasks: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    # in the memory order of `like_parameter`
    order = torch.channels_last if last else torch.contiguous_format
    strides = torch.empty(first.shape, device="meta", memory_format=order).stride()
    line = 128 // first.element_size()
    return (num_tasks, *first.shape), (-(-first.numel() // line) * line, *strides)


def _plan_operand(dtype: torch.dtype, weights: TaskWeights, deltas: Deltas, batch: Batch, rows: int) -> Operand:
    """For W + s_t Delta_t: staged, or to be added in the kernels' main loop."""
    weight, (features, channels, kh, kw) = weights.weight, weights.shape
    w_strides = (0,) * 4 if weight is None else weight.stride()
    w_multiple = 1 if weight is None else _multiple(weight)
    given = {
        "W_MULTIPLE": w_multiple,
        "D_MULTIPLE": deltas.multiple,
        "shared_slot": 0,
        **_filters("w", (0, *w_strides)),
        **_filters("d", deltas.strides),
        "FUSED": False,
    }
    # of what is not read: constants, so that layers share a compiled kernel
    unread = {**_filters("d", NO_DELTAS_STRIDES), "D_MULTIPLE": 1}
    if deltas.base is None and weight is not None and weight.dtype == dtype and weight.stride(1) == 1:
        # every task sees W, which can be read as it is
        return Operand(given, None, (), False)
    if weight is None and weights.stacked and weights.gate is None:
        (delta,) = weights.delta
        if delta.dtype == dtype and deltas.strides[2] == 1:
            # the tasks' own weights lie in slots as a workspace's would
            own = {**_filters("w", deltas.strides), "W_MULTIPLE": deltas.multiple}
            return Operand({**given, **own, **unread}, None, (), True)
    contiguous = (weight is None or weight.stride(1) == 1) and (deltas.base is None or deltas.strides[2] == 1)
    if configs.pick_schedule(rows, contiguous) == "fused":
        return Operand({**given, "FUSED": True}, None, (), False)
    slots = 1 if deltas.base is None else batch.num_tasks + 1
    size = features * channels * kh * kw
    shape = {"channels": channels, "rows": features * channels, "KH": kh, "KW": kw}
    strides = {**_named("w", "co ci kh kw", w_strides), **_filters("d", deltas.strides)}
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
            **_named("w", "co ci kh kw", (0, 1, 0, 0)),
            **_filters("d", (deltas.strides[0], 0, 1, 0, 0)),
        }
        w_multiple = 1 if weight is None else _multiple_of(weight.dtype)
    taps = next_power_of_2(shape["KH"] * shape["KW"])
    block = max(16, configs.STAGE_BLOCK // taps)
    stage = Prepared(
        stage_kernel,
        (-(-shape["rows"] // block), slots),
        num_tasks=slots - 1,
        **shape,
        **strides,
        MULTIPLE=_multiple_of(dtype, shape["channels"]),
        W_MULTIPLE=w_multiple,
        D_MULTIPLE=deltas.multiple,
        INT64_OFFSETS=_int64_offsets(0, filters=_held(weights)),
        BR=block,
        BT=taps,
    )
    staged = {
        "shared_slot": slots - 1,
        **_filters("w", (size, kh * kw * channels, 1, kw * channels, channels)),
        "W_MULTIPLE": _multiple_of(dtype, channels),
    }
    return Operand({**given, **staged, **unread}, stage, (slots, features, kh, kw, channels), False)


def _held(weights: TaskWeights) -> list[Tensor]:
    return [w for w in (weights.weight, *weights.delta[:1]) if w is not None]


# --- arguments


def _sign(x: Tensor | None) -> tuple[Any, ...] | None:
    """What a plan depends on of a tensor."""
    return None if x is None else (x.dtype, x.shape, x.stride())


def _named(prefix: str, names: str, values: Sequence[int]) -> dict[str, int]:
    """Arguments of a kernel; see the legend of `tiles.py`."""
    return {f"{prefix}_{name}": v for name, v in zip(names.split(), values, strict=True)}


def _picture(prefix: str, x: Tensor) -> dict[str, int]:
    """The strides of x or a result, `[N, C, H, W]`."""
    return _named(prefix, "n c h w", x.stride())


def _filters(prefix: str, strides: Sequence[int]) -> dict[str, int]:
    """Those of filters that lie one behind another: `[T, Cout, Cin / groups, kh, kw]`."""
    return _named(prefix, "t co ci kh kw", strides)


def _moves(kh: int, kw: int, geometry: Geometry) -> dict[str, int]:
    """How a filter of kh x kw taps goes over a picture."""
    (sh, sw), (dh, dw) = geometry.stride, geometry.dilation
    return {**_named("pad", "h w", geometry.padding), "KH": kh, "KW": kw, "SH": sh, "SW": sw, "DH": dh, "DW": dw}


def _block(tile: configs.Tile, depth: str) -> dict[str, int]:
    return {"BM": tile.rows, "BN": tile.cols, depth: tile.depth}


def _multiple_of(dtype: torch.dtype, *numbers: int) -> int:
    """Elements of 16 bytes, if all numbers are multiples of that; else 1."""
    most = 16 // dtype.itemsize
    return most if all(n % most == 0 for n in numbers) else 1


def _multiple(*tensors: Tensor, sizes: Sequence[int] = ()) -> int:
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
    return _multiple_of(tensors[0].dtype, *sizes, *strides)


def _int64_offsets(rows: int, pictures: Sequence[Tensor] = (), filters: Sequence[Tensor] = ()) -> bool:
    """Whether counts of rows, or offsets inside one sample or one filter, can pass 32 bits.

    Where a sample, or a task of a `[T, ...]` tensor, begins is 64 bit in any case. A filter's copies in a workspace
    are dense: they have as many elements as it has, whatever its strides. Twice, for a tile's masked rows and columns.
    """
    inside = [(x.shape[1:], x.stride()[1:]) for x in pictures] + [(w.shape[-4:], w.stride()[-4:]) for w in filters]
    reach = [sum((n - 1) * s for n, s in zip(*each, strict=True)) for each in inside]
    sizes = [math.prod(w.shape[-4:]) for w in filters]
    return max(2 * max([*reach, *sizes], default=0), rows + 2**16) > INT32_MAX
