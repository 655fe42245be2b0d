"""Per-task weights on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastmtl.ops import reference
from fastmtl.ops._task import Geometry, TaskWeights

scale_shift = reference.task_scale_shift
scale_shift_backward = reference.task_scale_shift_backward


def conv2d(
    x: Tensor, weights: TaskWeights, bias: Tensor | None, order: Tensor, offsets: Tensor, geometry: Geometry
) -> Tensor:
    y = reference.task_conv2d(x, *weights, bias, order, offsets, *geometry)
    return y


def conv2d_backward(
    grad_out: Tensor,
    x: Tensor,
    weights: TaskWeights,
    bias: Tensor | None,
    order: Tensor,
    offsets: Tensor,
    geometry: Geometry,
    wanted: Sequence[bool],
    wanted_delta: Sequence[int],
) -> list[Tensor]:
    return reference.task_conv2d_backward(grad_out, x, *weights, bias, order, offsets, *geometry, wanted, wanted_delta)


def weight_grad(x: Tensor, grad_out: Tensor, order: Tensor, offsets: Tensor, geometry: Geometry, out: Tensor) -> None:
    reference.task_conv2d_weight_grad_out(x, grad_out, order, offsets, *geometry, out)
