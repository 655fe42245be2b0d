"""Launchers of `task_lora`: W on all rows by the device's own matrix product, the low-rank deltas by the kernels of
`lora.py`. All on the device, no waiting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtl.core.task_weights import STILL, LoraGradients, TaskLoraCall
from fastmtl.kernels.common.launches import (
    Prepared,
    in_interpreter,
    integer_table,
    next_power_of_2,
    planned,
    pointer_table,
)
from fastmtl.kernels.task_weights import configs
from fastmtl.kernels.task_weights.conv_launchers import _bias_grad, _weight_grads
from fastmtl.kernels.task_weights.lora import (
    task_lora_expand_kernel,
    task_lora_finish_kernel,
    task_lora_scaling_grad_kernel,
    task_lora_shrink_kernel,
    task_lora_wgrad_kernel,
)
from fastmtl.kernels.task_weights.operands import INT32_MAX, Batch, block_sizes, multiple_of, signature


class Factor(NamedTuple):
    """Where the kernels find each task's A or B, or write its gradient."""

    base: Tensor | None  # one `[T, ...]` tensor, or one of the list, for its dtype; None: no task has one
    table: Tensor | None  # addresses by task, 0 for none; None for one tensor
    step: int  # from one task's to the next
    aligned: bool  # whether all begin at multiples of 16 bytes

    @property
    def key(self) -> tuple[Any, ...]:
        return (None if self.base is None else self.base.dtype, self.table is None, self.step, self.aligned)


def factor_of(tensors: Sequence[Tensor], tasks: Sequence[int], num_tasks: int) -> Factor:
    """Of dense tensors."""
    if not tensors:
        return Factor(None, None, 0, False)
    if not tasks:
        (stacked,) = tensors
        step = stacked.shape[1] * stacked.shape[2]
        return Factor(stacked, None, step, stacked.data_ptr() % 16 == 0 and step * stacked.itemsize % 16 == 0)
    by_task: list[Tensor | None] = [None] * num_tasks
    for t, w in zip(tasks, tensors, strict=True):
        by_task[t] = w
    return Factor(tensors[0], pointer_table(by_task), 0, all(w.data_ptr() % 16 == 0 for w in tensors))


class Ranks(NamedTuple):
    """The ranks of all tasks: one, or a table."""

    table: Tensor | None
    most: int
    multiple: int  # of all of them, in elements of 16 bytes; 1: of none

    @property
    def width(self) -> int:
        """Numbers of a thin row: a multiple of 16."""
        return -(-self.most // 16) * 16

    @classmethod
    def of(cls, A: Sequence[Tensor], tasks: Sequence[int], num_tasks: int) -> Ranks:
        held = [a.shape[-2] for a in A]
        most = max(held, default=1)
        multiple = multiple_of(A[0].dtype, *held) if A else 1
        if not tasks or min(held) == most:
            return cls(None, most, multiple)
        by_task = [0] * num_tasks
        for t, r in zip(tasks, held, strict=True):
            by_task[t] = r
        return cls(integer_table(by_task, A[0].device), most, multiple)

    @property
    def key(self) -> tuple[Any, ...]:
        return self.table is None, self.most, self.multiple


class Layer(NamedTuple):
    """What all launches of a call share."""

    batch: Batch
    pixels: int  # rows of a sample
    channels: int
    features: int
    dtype: torch.dtype
    device: torch.device
    A: Factor
    B: Factor
    ranks: Ranks
    scaling: Tensor | None
    held: Sequence[Tensor]  # what the tables point to

    @classmethod
    def of(cls, x: Tensor, call: TaskLoraCall) -> Layer:
        deltas, batch = call.deltas, Batch.of(call.batch)
        features, channels = call.shape
        A, B = ([w.contiguous() for w in held] for held in (deltas.A, deltas.B))
        return cls(
            batch,
            x.shape[:-1].numel() // batch.num_samples,
            channels,
            features,
            x.dtype,
            x.device,
            factor_of(A, deltas.tasks, batch.num_tasks),
            factor_of(B, deltas.tasks, batch.num_tasks),
            Ranks.of(A, deltas.tasks, batch.num_tasks),
            None if deltas.scaling is None else deltas.scaling.contiguous(),
            (*A, *B),
        )

    @property
    def rows(self) -> int:
        return self.batch.num_samples * self.pixels

    @property
    def key(self) -> tuple[Any, ...]:
        return (
            "lora", self.device, self.dtype, self.batch.num_samples, self.batch.num_tasks, self.pixels, self.channels,
            self.features, self.A.key, self.B.key, self.ranks.key,
            None if self.scaling is None else self.scaling.dtype, configs.choices(),
        )  # fmt: skip

    @property
    def settled(self) -> dict[str, Any]:
        """The arguments that most kernels take."""
        largest = max(self.pixels, self.ranks.width) * max(self.channels, self.features)
        return {
            "num_samples": self.batch.num_samples,
            "num_tasks": self.batch.num_tasks,
            "pixels": self.pixels,
            "rank": self.ranks.most,
            "width": self.ranks.width,
            "RANK_MULTIPLE": self.ranks.multiple if self.A.aligned and self.B.aligned else 1,
            "SMALL": self.pixels <= configs.SMALL_PIXELS,
            "INT64_OFFSETS": max(2 * largest, self.rows + 2**16) > INT32_MAX,
            "CAST": in_interpreter(),
            "TB": self.batch.block,
        }

    @property
    def pointers(self) -> dict[str, Tensor | None]:
        return {
            "p_ranks": self.ranks.table,
            "p_scaling": self.scaling,
            "p_order": self.batch.order,
            "p_offsets": self.batch.offsets,
        }

    def multiple(self, *columns: int) -> int:
        """What divides these columns; 1 where factors do not begin at multiples of 16 bytes."""
        if not (self.A.aligned and self.B.aligned):
            return 1
        return multiple_of(self.dtype, *columns)

    def thin(self) -> Tensor:
        return torch.empty(self.rows, self.ranks.width, dtype=self.dtype, device=self.device)


def lora(x: Tensor, call: TaskLoraCall) -> Tensor:
    """Forward: `[N, ..., Cout]`, contiguous; rows of no task are NaN."""
    weight, deltas, _, bias = call
    shape = (*x.shape[:-1], call.shape[0])
    if x.shape[:-1].numel() * shape[-1] == 0:
        return torch.empty(shape, dtype=x.dtype, device=x.device)
    x = x.contiguous()
    layer = Layer.of(x, call)
    bias = None if bias is None else bias.contiguous()
    if weight is None:
        y = torch.empty(shape, dtype=x.dtype, device=x.device)
    else:
        shared = None if bias is None or bias.dim() == 2 else bias.to(x.dtype)
        y = F.linear(x, weight.to(x.dtype), shared)
        bias = None if shared is not None else bias
    z = None
    if deltas.A:
        z = layer.thin()
        _shrink(layer, x=x, z=z)
    _expand(layer, z, y, weight is not None, bias=bias, is_a=False)
    return y


def lora_backward(
    grad_out: Tensor,
    x: Tensor,
    call: TaskLoraCall,
    wanted: Sequence[bool],
    wanted_a: Sequence[int],
    wanted_b: Sequence[int],
) -> list[Tensor]:
    """The gradients of x, weight, A, B, scaling and bias, of these the wanted ones; as the reference gives them."""
    weight, deltas, _, _ = call
    out = LoraGradients.empty(x, call, wanted, wanted_a, wanted_b)
    if grad_out.numel() == 0 or x.numel() == 0:
        return out.zero_()
    grad_x, grad_weight, grad_a, grad_b, grad_scaling, grad_bias = out

    x, grad_out = x.contiguous(), grad_out.contiguous()
    layer = Layer.of(x, call)
    z = u = partial = None
    if deltas.A:
        z = layer.thin() if grad_b or grad_scaling is not None else None
        u = layer.thin() if grad_x is not None or grad_a or grad_scaling is not None else None
        if z is not None or u is not None:
            partial = _shrink(layer, x=x, dy=grad_out, z=z, u=u, with_partial=grad_scaling is not None)
    if grad_x is not None:
        if weight is not None:
            rows = grad_out.view(-1, layer.features)
            torch.mm(rows, weight.to(x.dtype), out=grad_x.view(-1, layer.channels))
        _expand(layer, u, grad_x, weight is not None, bias=None, is_a=True)
    for wide, thin, grads, positions, is_a in (
        (x, u, grad_a, wanted_a, True),
        (grad_out, z, grad_b, wanted_b, False),
    ):
        if grads:
            tasks = [deltas.tasks[k] for k in positions] if deltas.tasks else []
            _factor_grad(layer, wide, thin, factor_of(grads, tasks, layer.batch.num_tasks), is_a)
    if grad_scaling is not None:
        _scaling_grad(layer, partial, grad_scaling)
    if grad_weight is not None:
        # samples of no task stay out, as nowhere else than in these kernels
        _weight_grads(
            _pictures(x, layer),
            _pictures(grad_out, layer),
            layer.batch.together(),
            STILL,
            (*grad_weight.shape, 1, 1),
            grad_weight=grad_weight[..., None, None],
        )
    if grad_bias is not None:
        batch = layer.batch if grad_bias.dim() == 2 else layer.batch.together()
        _bias_grad(_pictures(grad_out, layer), batch, grad_bias)
    return out.listed()


def _pictures(x: Tensor, layer: Layer) -> Tensor:
    """Contiguous rows as pictures of one line, `[N, C, 1, R]`, as the kernels of convolutions take them."""
    count, rows, columns = layer.batch.num_samples, layer.pixels, x.shape[-1]
    return x.as_strided((count, columns, 1, rows), (rows * columns, 1, rows * columns, columns))


# --- launches


def _shrink_tile(layer: Layer) -> configs.Tile:
    per_task = layer.batch.rows_per_task(layer.pixels)
    operand = torch.empty(0, dtype=layer.dtype, device=layer.device)
    return configs.pick_tile("lora_shrink", layer.batch.parts, per_task, layer.ranks.most, 1, operand)


def _shrink(
    layer: Layer,
    x: Tensor | None = None,
    dy: Tensor | None = None,
    z: Tensor | None = None,
    u: Tensor | None = None,
    with_partial: bool = False,
) -> Tensor | None:
    """Fills z from x and u from dy, where they are given; parts of the sums of their products."""
    key = (*layer.key, "shrink", z is None, u is None, with_partial)
    plan, shape = planned(key, lambda: _plan_shrink(layer))
    partial = torch.empty(shape, dtype=torch.float32, device=layer.device) if with_partial else None
    plan(
        p_x=None if z is None else x,
        p_dy=None if u is None else dy,
        p_a=layer.A.base,
        p_a_table=layer.A.table,
        p_b=layer.B.base,
        p_b_table=layer.B.table,
        p_z=z,
        p_u=u,
        p_partial=partial,
        **layer.pointers,
    )
    return partial


def _plan_shrink(layer: Layer) -> tuple[Prepared, tuple[int, int]]:
    tile = _shrink_tile(layer)
    grid = layer.batch.row_tiles(layer.pixels, tile.rows), -(-layer.ranks.width // tile.cols)
    prepared = Prepared(
        task_lora_shrink_kernel,
        grid,
        tile.num_warps,
        tile.num_stages,
        **layer.settled,
        channels=layer.channels,
        features=layer.features,
        a_t=layer.A.step,
        b_t=layer.B.step,
        MULTIPLE=layer.multiple(layer.channels, layer.features),
        **block_sizes(tile, "BK"),
    )
    return prepared, grid


def _expand(layer: Layer, thin: Tensor | None, wide: Tensor, add: bool, bias: Tensor | None, is_a: bool) -> None:
    """Thin rows times A or B, and the bias, into the wide ones or added to them."""
    key = (*layer.key, "expand", add, signature(bias), is_a, thin is None)
    plan = planned(key, lambda: _plan_expand(layer, wide, add, bias, is_a))
    factor = layer.A if is_a else layer.B
    plan(p_thin=thin, p_factor=factor.base, p_table=factor.table, p_bias=bias, p_wide=wide, **layer.pointers)


def _plan_expand(layer: Layer, wide: Tensor, add: bool, bias: Tensor | None, is_a: bool) -> Prepared:
    columns, factor = wide.shape[-1], layer.A if is_a else layer.B
    tile = configs.pick_tile(
        "lora_expand", layer.batch.parts, layer.batch.rows_per_task(layer.pixels), columns, 1, wide
    )
    return Prepared(
        task_lora_expand_kernel,
        (layer.batch.row_tiles(layer.pixels, tile.rows) * -(-columns // tile.cols),),
        tile.num_warps,
        tile.num_stages,
        **layer.settled,
        columns=columns,
        f_t=factor.step,
        bias_t=0 if bias is None or bias.dim() == 1 else columns,
        IS_A=is_a,
        ADD=add,
        MULTIPLE=layer.multiple(columns) if factor.base is not None else multiple_of(layer.dtype, columns),
        **block_sizes(tile, "BK"),
    )


class GradPlan(NamedTuple):
    product: Prepared
    finish: Prepared | None
    parts: tuple[int, ...]  # where rows are split


def _factor_grad(layer: Layer, wide: Tensor, thin: Tensor, grad: Factor, is_a: bool) -> None:
    """s_t times each task's sum of wide rows times thin rows."""
    plan = planned((*layer.key, "factor", grad.key, is_a), lambda: _plan_factor_grad(layer, wide, grad, is_a))
    into = {"p_grad": grad.base, "p_table": grad.table}
    parts = None if plan.finish is None else torch.empty(plan.parts, dtype=torch.float32, device=layer.device)
    plan.product(p_wide=wide, p_thin=thin, p_parts=parts, **into, **layer.pointers)
    if plan.finish is not None:
        pointers = {name: p for name, p in layer.pointers.items() if name != "p_order"}
        plan.finish(p_parts=parts, **into, **pointers)


def _plan_factor_grad(layer: Layer, wide: Tensor, grad: Factor, is_a: bool) -> GradPlan:
    columns, width, batch = wide.shape[-1], layer.ranks.width, layer.batch
    tile, split_rows = configs.pick_lora_wgrad(columns, width, batch.num_tasks, batch.parts, layer.rows, wide)
    splits = batch.row_tiles(layer.pixels, split_rows) if split_rows else 0
    settled = {**layer.settled, "columns": columns, "f_t": grad.step, "IS_A": is_a, "split_rows": max(split_rows, 1)}
    product = Prepared(
        task_lora_wgrad_kernel,
        (-(-columns // tile.rows), -(-width // tile.cols), splits or batch.num_tasks),
        tile.num_warps,
        tile.num_stages,
        **settled,
        MULTIPLE=multiple_of(layer.dtype, columns),
        **block_sizes(tile, "BP"),
    )
    if not split_rows:
        return GradPlan(product, None, ())
    for name in ("num_samples", "SMALL", "CAST"):
        settled.pop(name)
    blocks = -(-columns * width // configs.FINISH_BLOCK)
    finish = Prepared(task_lora_finish_kernel, (blocks, batch.num_tasks), **settled, BE=configs.FINISH_BLOCK)
    return GradPlan(product, finish, (splits, columns, width))


def _scaling_grad(layer: Layer, partial: Tensor | None, out: Tensor) -> None:
    if partial is None:
        out.zero_()
        return
    plan = planned((*layer.key, "scaling"), lambda: _plan_scaling_grad(layer, partial.shape[1]))
    plan(p_partial=partial, p_offsets=layer.batch.offsets, p_a=layer.A.base, p_a_table=layer.A.table, p_out=out)


def _plan_scaling_grad(layer: Layer, blocks: int) -> Prepared:
    return Prepared(
        task_lora_scaling_grad_kernel,
        (layer.batch.num_tasks,),
        num_tasks=layer.batch.num_tasks,
        pixels=layer.pixels,
        tile_rows=_shrink_tile(layer).rows,
        blocks=blocks,
        TB=next_power_of_2(layer.batch.num_tasks + 1),
        BE=configs.FINISH_BLOCK,
    )
