"""`task_scale_shift` on the CPU: a batch norm by task with a mean of 0 and a variance of 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl.ops.task_weights.cpu.batch_norm import gradients, normalised
from fastmtl.ops.task_weights.cpu.task_plan import task_plan


def _statistics(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """A mean of 0 and a variance of 1, in the dtype that is computed in."""
    mean = torch.zeros(scale.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    return mean, torch.ones_like(mean)


def _plan(task_ids: Tensor, num_tasks: int) -> tuple[Tensor, Tensor]:
    plan = task_plan(task_ids, num_tasks)
    assert plan is not None  # the op has looked at their range
    return plan


def scale_shift(x: Tensor, scale: Tensor, shift: Tensor, task_ids: Tensor) -> Tensor:
    """`task_scale_shift`; see there."""
    mean, var = _statistics(x, scale)
    a, b = (table.detach().to(mean.dtype).contiguous() for table in (scale, shift))
    return normalised(x.detach(), a, b, mean, var, *_plan(task_ids, scale.shape[0]), False, 0.0)


def scale_shift_backward(
    grad_out: Tensor, x: Tensor, scale: Tensor, shift: Tensor, task_ids: Tensor, wanted: Sequence[bool]
) -> list[Tensor]:
    """`task_scale_shift_backward`; see there."""
    mean, var = _statistics(x, scale)
    a, plan = scale.detach().to(mean.dtype).contiguous(), _plan(task_ids, scale.shape[0])
    found = iter(gradients(grad_out.detach(), x.detach(), a, mean, var, *plan, False, 0.0, wanted))
    return [next(found).to(like.dtype) for like, want in zip((x, scale, shift), wanted, strict=True) if want]
