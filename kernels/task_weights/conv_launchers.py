"""Launchers of the task convolution: forward, input gradient, weight gradients. All on the device, no waiting.

`task_linear` comes here as a 1x1 convolution of `[N, C, 1, R]` channels-last views. See docs/kernels/task-kernels.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmtl.core.task_weights import Geometry, SortedBatch, TaskConvCall, TaskWeights, empty_gradients
from fastmtl.core.tensors import is_channels_last
from fastmtl.kernels.common.launches import Prepared, in_interpreter, planned
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
from fastmtl.kernels.task_weights.operands import (
    NO_DELTAS,
    NO_DELTAS_STRIDES,
    Batch,
    Deltas,
    Operand,
    arguments,
    block_sizes,
    by_channel,
    common_multiple,
    deltas_of,
    filter_moves,
    filter_strides,
    held_weights,
    memory_together,
    multiple_of,
    needs_int64_offsets,
    picture_strides,
    plan_operand,
    signature,
)


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
    x = by_channel(x, weights.shape[1])
    batch = Batch.of(sorted_batch)
    gate = None if weights.gate is None else weights.gate.contiguous()
    bias = None if bias is None else bias.contiguous()
    deltas = deltas_of(weights.delta, weights.delta_tasks, batch.num_tasks)
    key = (
        "forward",
        x.device,
        signature(x),
        last,
        signature(weights.weight),
        deltas.key,
        gate is None,
        signature(bias),
    )
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
    operand = plan_operand(x.dtype, weights, deltas, batch, rows)
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
        **picture_strides("x", x),
        **picture_strides("y", y),
        b_t=0 if bias is None or bias.dim() == 1 else bias.shape[1],
        **filter_moves(kh, kw, geometry),
        PACKED=packed,
        PADDED=geometry.padding != (0, 0),
        MULTIPLE=common_multiple(x, y, sizes=(channels, features)),
        SMALL=pixels <= configs.SMALL_PIXELS,
        INT64_OFFSETS=needs_int64_offsets(batch.num_samples * pixels, (x, y), held_weights(weights)),
        CAST=in_interpreter(),
        TB=batch.block,
        **block_sizes(tile, "BK"),
    )
    return ForwardPlan(result, operand, product)


def conv2d_backward(
    grad_out: Tensor, x: Tensor, call: TaskConvCall, wanted: Sequence[bool], wanted_delta: Sequence[int]
) -> list[Tensor]:
    """The gradients of x, weight, deltas, gate and bias, of these the wanted ones; as the reference gives them."""
    weights, sorted_batch, geometry, bias = call
    batch = Batch.of(sorted_batch)
    out = empty_gradients(x, call, wanted, wanted_delta, memory_together(weights, wanted_delta, batch.num_tasks))
    left = iter(out)
    grad_x = next(left) if wanted[0] else None
    grad_weight = next(left) if wanted[1] and weights.weight is not None else None
    grad_delta = [next(left) for _ in wanted_delta]
    grad_gate = next(left) if wanted[2] and weights.gate is not None else None
    grad_bias = next(left) if wanted[3] and bias is not None else None

    features, channels = weights.shape[:2]
    grad_out = by_channel(grad_out, features // geometry.groups)
    by_task = grad_gate is not None or bool(grad_delta)
    deltas = None
    if grad_x is not None or grad_gate is not None:
        deltas = deltas_of(weights.delta, weights.delta_tasks, batch.num_tasks)
    if grad_x is not None:
        _input_grad(grad_out, grad_x, weights, deltas, batch, geometry)
    if grad_weight is not None or by_task:
        tasks = [weights.delta_tasks[k] for k in wanted_delta] if weights.delta_tasks else []
        _weight_grads(
            by_channel(x, channels),
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
    x, grad_out = by_channel(x, channels), by_channel(grad_out, features // geometry.groups)
    _weight_grads(x, grad_out, Batch.of(batch), geometry, tuple(out.shape[1:]), grad_delta=[out])


# --- gradients


def _input_grad(
    grad_out: Tensor, grad_x: Tensor, weights: TaskWeights, deltas: Deltas, batch: Batch, geometry: Geometry
) -> None:
    gate = None if weights.gate is None else weights.gate.contiguous()
    key = (
        "input",
        grad_x.device,
        signature(grad_out),
        signature(grad_x),
        signature(weights.weight),
        deltas.key,
        gate is None,
    )
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
    operand = plan_operand(grad_out.dtype, weights, deltas, batch, rows)
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
        **picture_strides("x", made),
        **picture_strides("y", grad_out),
        **filter_moves(kh, kw, geometry),
        STEP_H=sh // math.gcd(sh, geometry.dilation[0]),
        STEP_W=sw // math.gcd(sw, geometry.dilation[1]),
        EDGES=not geometry.pixelwise((kh, kw)),
        MULTIPLE=common_multiple(made, grad_out, sizes=(channels, features)),
        SMALL=pixels <= configs.SMALL_PIXELS,
        INT64_OFFSETS=needs_int64_offsets(batch.num_samples * pixels, (made, grad_out), held_weights(weights)),
        CAST=in_interpreter(),
        TB=batch.block,
        **block_sizes(tile, "BK"),
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
    grads = deltas_of(grad_delta, grad_tasks, batch.num_tasks, copy=False)
    gate = None if gate is None else gate.contiguous()
    key = ("weights", x.device, signature(x), signature(grad_out), shape, deltas.key, grads.key, signature(grad_weight))
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
        total_multiple = multiple_of(total_dtype, *total_strides[:2], *total_strides[3:])
    blocks = -(-size // configs.FINISH_BLOCK)
    gate_parts = (batch.num_tasks, tiles * groups if plan.split_rows == 0 else blocks)
    written = [w for w in (grad_weight, grads.base, deltas.base) if w is not None]
    int64_offsets = needs_int64_offsets(rows, (x, grad_out), written)
    into: dict[str, Any] = {
        "num_tasks": batch.num_tasks,
        "chunk_tasks": plan.chunk_tasks,
        **filter_strides("d", deltas.strides),
        **filter_strides("g", grads.strides),
        **arguments("w", "chunk co ci kh kw", total_strides),
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
        **picture_strides("x", x),
        **picture_strides("y", grad_out),
        **filter_moves(kh, kw, geometry),
        "PACKED": filter_.packed,
        "PADDED": geometry.padding != (0, 0),
        "MULTIPLE": common_multiple(x, grad_out, sizes=(channels, rows_out)),
        "SMALL": pixels <= configs.SMALL_PIXELS,
        "INT64_OFFSETS": int64_offsets,
        "CAST": in_interpreter(),
        **block_sizes(tile, "BP"),
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
            **arguments("o", "co ci kh kw", grad_weight.stride()),
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
        MULTIPLE=multiple_of(torch.float32, channels),
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
        ("bias", grad_out.device, signature(grad_out), batch.num_tasks, configs.choices()),
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
    int64_offsets = needs_int64_offsets(batch.num_samples * pixels, (grad_out,))
    product = Prepared(
        bias_grad_kernel,
        (blocks, splits),
        num_samples=batch.num_samples,
        num_tasks=batch.num_tasks,
        split_rows=split_rows,
        out_width=grad_out.shape[3],
        pixels=pixels,
        features=features,
        **picture_strides("y", grad_out),
        MULTIPLE=common_multiple(grad_out, sizes=(features,)),
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
        **filter_strides("d", NO_DELTAS_STRIDES),
        **filter_strides("g", (features, 1, 0, 0, 0)),
        **arguments("w", "chunk co ci kh kw", (0,) * 5),
        "W_MULTIPLE": 1,
        "D_MULTIPLE": 1,
        "G_MULTIPLE": 1,
    }
    finish = _plan_finish(batch, pixels, split_rows, (features, 1, 1, 1), int64_offsets, batch.num_tasks, into)
    return BiasPlan((splits, features), product, finish)
