"""Launchers of the task convolution: forward, input gradient, weight gradients. All on the device, no waiting.

`task_linear` comes here as a 1x1 convolution of `[N, C, 1, R]` channels-last views. See docs/task-kernels.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmtl.kernels import configs
from fastmtl.kernels._launch import in_interpreter, launch, num_sms, pointer_table, shared_memory
from fastmtl.kernels.conv_fwd import task_conv2d_fwd_kernel
from fastmtl.kernels.stage import stage_kernel
from fastmtl.ops._task import Geometry, TaskWeights, memory_format

INT32_MAX = 2**31 - 1


class Deltas(NamedTuple):
    """Where the kernels find each task's delta, or write its gradient."""

    base: Tensor | None  # one `[T, ...]` tensor, or one of the list for its dtype and strides; None: no task has one
    table: Tensor | None  # addresses by task, 0 for none; None for one tensor
    strides: tuple[int, ...]  # t, co, ci, kh, kw
    aligned: bool
    held: list[Tensor]  # what the table points to


def conv2d(
    x: Tensor, weights: TaskWeights, bias: Tensor | None, order: Tensor, offsets: Tensor, geometry: Geometry
) -> Tensor:
    """Forward: `[N, Cout, Ho, Wo]`, channels_last if x is; rows of no task are NaN."""
    features, channels, kh, kw = weights.shape
    out_size = geometry.output_size(x.shape[2:], (kh, kw))
    y = torch.empty((x.shape[0], features, *out_size), dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    x = _read_by_channel(x, channels)
    groups, pixels = geometry.groups, out_size[0] * out_size[1]
    num_tasks, parts, rows_per_task = _split_of_batch(x.shape[0], offsets, pixels)
    features //= groups
    tile = configs.pick_tile(
        "fwd", x.dtype, parts, rows_per_task, features, channels * kh * kw, groups,
        num_sms(x.device), shared_memory(x.device),
    )  # fmt: skip
    operand = _weights(x.dtype, weights, offsets, rows_per_task)
    launch(
        task_conv2d_fwd_kernel,
        (_row_tiles(x.shape[0], num_tasks, pixels, tile.rows) * -(-features // tile.cols), groups),
        tile.num_warps,
        tile.num_stages,
        p_x=x,
        **operand,
        p_gate=None if weights.gate is None else weights.gate.contiguous(),
        p_bias=None if bias is None else bias.contiguous(),
        p_y=y,
        p_order=order,
        p_offsets=offsets,
        num_samples=x.shape[0],
        num_tasks=num_tasks,
        height=x.shape[2],
        width=x.shape[3],
        out_width=out_size[1],
        pixels=pixels,
        channels=channels,
        features=features,
        pad_h=geometry.padding[0],
        pad_w=geometry.padding[1],
        **_strides("x", "n c h w", x),
        **_strides("y", "n c h w", y),
        b_t=0 if bias is None or bias.dim() == 1 else bias.shape[1],
        **_filter_constants(kh, kw, geometry),
        PACKED=channels <= configs.PACKED_MAX_CHANNELS,
        WIDE=_wide(x.shape[0] * pixels, x, y, *_operands(weights)),
        CAST=in_interpreter(),
        TB=configs.next_power_of_2(num_tasks + 1),
        BM=tile.rows,
        BN=tile.cols,
        BK=tile.depth,
    )
    return y


# --- operands


def _read_by_channel(x: Tensor, channels: int) -> Tensor:
    """x with channels next to each other, by a copy unless it is so or has few: else single elements are loaded."""
    if x.stride(1) == 1 or channels < configs.CHANNELS_LAST_MIN_CHANNELS:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def _deltas(tensors: Sequence[Tensor], tasks: Sequence[int], num_tasks: int) -> Deltas:
    if not tensors:
        return Deltas(None, None, (0,) * 5, False, [])
    if not tasks:
        (stacked,) = tensors
        return Deltas(stacked, None, stacked.stride(), False, [stacked])
    # one kernel reads them all by the same strides: the odd ones are copied
    strides = tensors[0].stride()
    same = [d if d.stride() == strides else d.new_empty_strided(d.shape, strides).copy_(d) for d in tensors]
    by_task: list[Tensor | None] = [None] * num_tasks
    for t, d in zip(tasks, same, strict=True):
        by_task[t] = d
    aligned = all(d.data_ptr() % 16 == 0 for d in same)
    return Deltas(same[0], pointer_table(by_task), (0, *strides), aligned, same)


def _weights(dtype: torch.dtype, weights: TaskWeights, offsets: Tensor, rows_per_task: int) -> dict[str, Any]:
    """The kernels' arguments for W + s_t Delta_t: staged here, or to be added in their main loop."""
    num_tasks = offsets.shape[0] - 1
    weight, (features, channels, kh, kw) = weights.weight, weights.shape
    deltas = _deltas(weights.delta, weights.delta_tasks, num_tasks)
    common = {"p_delta": deltas.base, "p_table": deltas.table, "ALIGNED": deltas.aligned}
    if deltas.base is None and weight is not None and weight.dtype == dtype and weight.stride(1) == 1:
        # every task sees W, which can be read as it is
        return {
            **common, "p_w": weight, "shared_slot": 0, "FUSED": False, "w_t": 0,
            **_strides("w", "co ci kh kw", weight), **_named("d", "t co ci kh kw", deltas.strides),
        }  # fmt: skip
    contiguous = (weight is None or weight.stride(1) == 1) and (deltas.base is None or deltas.strides[2] == 1)
    if configs.pick_schedule(rows_per_task, contiguous) == "fused":
        return {
            **common, "p_w": weight, "shared_slot": 0, "FUSED": True, "w_t": 0,
            **_named("w", "co ci kh kw", (0,) * 4 if weight is None else weight.stride()),
            **_named("d", "t co ci kh kw", deltas.strides),
        }  # fmt: skip
    slots = 1 if deltas.base is None else num_tasks + 1
    staged = torch.empty((slots, features, kh, kw, channels), dtype=dtype, device=offsets.device)
    taps = configs.next_power_of_2(kh * kw)
    block = max(16, configs.STAGE_BLOCK // taps)
    launch(
        stage_kernel,
        (-(-features * channels // block), slots),
        p_out=staged,
        p_w=weight,
        p_delta=deltas.base,
        p_table=deltas.table,
        p_gate=None if weights.gate is None else weights.gate.contiguous(),
        p_offsets=offsets,
        num_tasks=slots - 1,
        channels=channels,
        rows=features * channels,
        **_named("w", "co ci kh kw", (0,) * 4 if weight is None else weight.stride()),
        **_named("d", "t co ci kh kw", deltas.strides),
        KH=kh,
        KW=kw,
        ALIGNED=deltas.aligned,
        WIDE=_wide(0, *_operands(weights)),
        BR=block,
        BT=taps,
    )
    # the deltas are not read any more: constants in place of their strides, so that layers share a kernel
    size = features * channels * kh * kw
    return {
        **common, "p_w": staged, "shared_slot": slots - 1, "FUSED": False, "ALIGNED": False,
        **_named("w", "t co ci kh kw", (size, kh * kw * channels, 1, kw * channels, channels)),
        **_named("d", "t co ci kh kw", (0,) * 5),
    }  # fmt: skip


def _operands(weights: TaskWeights) -> list[Tensor]:
    return [w for w in (weights.weight, *weights.delta[:1]) if w is not None]


# --- arguments


def _named(prefix: str, names: str, values: Sequence[int]) -> dict[str, int]:
    return {f"{prefix}_{name}": v for name, v in zip(names.split(), values, strict=True)}


def _strides(prefix: str, names: str, x: Tensor) -> dict[str, int]:
    return _named(prefix, names, x.stride())


def _filter_constants(kh: int, kw: int, geometry: Geometry) -> dict[str, int]:
    (sh, sw), (dh, dw) = geometry.stride, geometry.dilation
    return {"KH": kh, "KW": kw, "SH": sh, "SW": sw, "DH": dh, "DW": dw}


def _split_of_batch(num_samples: int, offsets: Tensor, pixels: int) -> tuple[int, int, int]:
    """T, how many tasks a batch can hold at most, and the rows that each then has."""
    num_tasks = offsets.shape[0] - 1
    parts = max(1, min(num_tasks, num_samples))
    return num_tasks, parts, -(-num_samples * pixels // parts)


def _row_tiles(num_samples: int, num_tasks: int, pixels: int, rows: int) -> int:
    """As many as there can be where no tile holds two tasks; samples of no task are one more."""
    if num_samples * pixels == 0:
        return 0
    return -(-num_samples * pixels // rows) + min(num_tasks + 1, num_samples) - 1


def _wide(rows: int, *tensors: Tensor) -> bool:
    """Whether offsets inside one sample or one weight, or counts of rows, can pass 32 bits."""
    longest = max(
        (sum((n - 1) * s for n, s in zip(x.shape[1:], x.stride()[1:], strict=True)) for x in tensors), default=0
    )
    return max(2 * longest, rows + 2**16) > INT32_MAX
