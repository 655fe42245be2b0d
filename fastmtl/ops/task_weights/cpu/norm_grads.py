"""Backward passes of group and layer norm on the CPU, with the gradients of weight and bias of each task."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl.core.dispatch import unavailable
from fastmtl.core.schemas import define_kernel
from fastmtl.core.task_weights import SortedBatch

_group_norm_kernel = define_kernel(
    "_group_norm_backward_by_task(Tensor grad_out, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor order, "
    "Tensor offsets, int groups, Tensor(a!)? grad_x, Tensor(b!)? grad_weight, Tensor(c!)? grad_bias) -> ()"
)
_layer_norm_kernel = define_kernel(
    "_layer_norm_backward_by_task(Tensor grad_out, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor order, "
    "Tensor offsets, Tensor(a!)? grad_x, Tensor(b!)? grad_weight, Tensor(c!)? grad_bias) -> ()"
)


def can_take(grad_out: Tensor, x: Tensor, *others: Tensor | None) -> bool:
    """Whether the functions below serve these tensors: of one dtype, float32 or float64, on the CPU, and contiguous but
    for `grad_out`."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or not x.numel():
        return False
    if torch.compiler.is_compiling() or unavailable("cpu", "cpu") is not None:
        return False
    given = [x, *(y for y in others if y is not None)]
    return grad_out.dtype == x.dtype and all(y.dtype == x.dtype and y.is_contiguous() for y in given)


def group_norm_backward(
    grad_out: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    batch: SortedBatch,
    groups: int,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x `[N, C, ...]`, and `[T, C]` of weight and bias; None where not wanted. All samples have a task."""
    found = _memory(x, x.shape[1:2], batch, wanted)
    _group_norm_kernel(grad_out.contiguous(), x, mean, rstd, weight, *batch, groups, *found)
    return found


def layer_norm_backward(
    grad_out: Tensor,
    x: Tensor,
    shape: tuple[int, ...],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    batch: SortedBatch,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As `group_norm_backward`, of x `[..., *shape]`: as many rows of `shape` for each of the N samples, in turn."""
    found = _memory(x, shape, batch, wanted)
    lines = batch.order.shape[0], mean.numel() // batch.order.shape[0], math.prod(shape)
    of_x = None if found[0] is None else found[0].view(lines)
    grad_out = grad_out.reshape(lines)
    if grad_out.stride(2) != 1:
        grad_out = grad_out.contiguous()
    _layer_norm_kernel(grad_out, x.view(lines), mean, rstd, weight, *batch, of_x, *found[1:])
    return found


def _memory(
    x: Tensor, shape: Sequence[int], batch: SortedBatch, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    of_x, of_weight, of_bias = wanted
    rows = (batch.num_tasks, *shape)
    return (
        torch.empty_like(x) if of_x else None,
        torch.empty(rows, dtype=x.dtype) if of_weight else None,
        torch.empty(rows, dtype=x.dtype) if of_bias else None,
    )
