"""Per-task scale and shift of channels: the model patch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmtl.core.dispatch import checking, choose, triton_kernels
from fastmtl.core.schemas import define_op
from fastmtl.core.task_weights import TaskPlan
from fastmtl.ops.task_weights import reference
from fastmtl.ops.task_weights.arguments import check_companion, check_ids, check_input, triton_declines
from fastmtl.ops.task_weights.composed import composed_backward
from fastmtl.ops.task_weights.cpu import scale_shift as scale_shift_cpu
from fastmtl.ops.task_weights.precision import cast_by_autocast
from fastmtl.ops.task_weights.task_plan import check_range


def task_scale_shift(x: Tensor, scale: Tensor, shift: Tensor, task_ids: Tensor | TaskPlan) -> Tensor:
    """Per-task channel scale and shift: `y[b] = x[b] * scale[t] + shift[t]` with `t = task_ids[b]`.

    Args:
        x: `[N, C, ...]` of any rank from 2 on, any strides; float64 (CPU), float32, bfloat16 or float16. Under autocast
            it is cast to autocast's dtype.
        scale: `[T, C]`, in the dtype of x, or float32 beside a 16-bit x.
        shift: as `scale`.
        task_ids: `[N]` int32 or int64 from 0 to T - 1, or a `TaskPlan`.

    Returns:
        The shape, dtype and memory order of x; computed in at least float32, rounded once.

    Raises:
        TypeError: arguments of the wrong kind or dtype.
        ValueError: shapes or devices that do not agree; on the CPU an id out of range. On a GPU such a sample's result
            is NaN; `FASTMTL_CHECK=1` raises there too, and waits.

    Differentiable in x, scale and shift, twice (the second derivative through plain torch). Source: Mudrakarta et al.
    2019 (K for the price of 1), model patches of scale and bias.

    Example:
        >>> scale, shift = torch.tensor([[1.0], [10.0]]), torch.tensor([[0.0], [0.5]])
        >>> task_scale_shift(torch.ones(2, 1), scale, shift, torch.tensor([1, 0])).flatten()
        tensor([10.5000,  1.0000])
    """
    check_input(x)
    if x.dim() < 2:
        raise ValueError(f"x: expected shape [N, C, ...], got {list(x.shape)}")
    x = cast_by_autocast(x)
    check_ids(task_ids, x.device)
    for name, table in (("scale", scale), ("shift", shift)):
        check_companion(table, name, x)
        if table.dim() != 2 or table.shape[1] != x.shape[1]:
            raise ValueError(f"{name}: expected shape [T, {x.shape[1]}], got {list(table.shape)}")
    if scale.shape != shift.shape:
        raise ValueError(f"shift: expected {scale.shape[0]} tasks as in scale, got {shift.shape[0]}")
    if scale.shape[0] == 0:
        raise ValueError("scale: expected at least one task, got 0")
    ids = task_ids.task_ids if isinstance(task_ids, TaskPlan) else task_ids
    if list(ids.shape) != [x.shape[0]]:
        raise ValueError(f"task_ids: expected shape [{x.shape[0]}], as x, got {list(ids.shape)}")
    if isinstance(task_ids, TaskPlan) and task_ids.offsets.shape[0] - 1 != scale.shape[0]:
        raise ValueError(f"task_ids: expected a plan of {scale.shape[0]} tasks, got one of {task_ids.num_tasks}")
    return task_scale_shift_op(x, scale, shift, ids)


def _triton(x: Tensor, scale: Tensor, shift: Tensor, task_ids: Tensor) -> Tensor:
    return triton_kernels("task_weights.task_scale_shift").scale_shift(x, scale, shift, task_ids)


_FORWARD = {"cpu": scale_shift_cpu.scale_shift, "triton": _triton, "reference": reference.task_scale_shift}


def _task_scale_shift(x: Tensor, scale: Tensor, shift: Tensor, task_ids: Tensor) -> Tensor:
    if x.device.type == "cpu" or checking():
        check_range(task_ids, scale.shape[0])
    return choose("task_scale_shift", x.device.type, _FORWARD, triton_declines(x))(x, scale, shift, task_ids)


def _fake(x: Tensor, scale: Tensor, shift: Tensor, task_ids: Tensor) -> Tensor:
    return torch.empty_like(x)


def _backward_triton(grad_out, x, scale, shift, task_ids, wanted) -> list[Tensor]:
    return triton_kernels("task_weights.task_scale_shift").scale_shift_backward(
        grad_out, x, scale, shift, task_ids, wanted
    )


_BACKWARD = {
    "cpu": scale_shift_cpu.scale_shift_backward,
    "triton": _backward_triton,
    "reference": reference.task_scale_shift_backward,
}


def _task_scale_shift_backward(
    grad_out: Tensor, x: Tensor, scale: Tensor, shift: Tensor, task_ids: Tensor, wanted: Sequence[bool]
) -> list[Tensor]:
    run = choose("task_scale_shift", x.device.type, _BACKWARD, triton_declines(x))
    return run(grad_out, x, scale, shift, task_ids, wanted)


def _backward_fake(grad_out, x, scale, shift, task_ids, wanted) -> list[Tensor]:
    out = [torch.empty_like(x)] if wanted[0] else []
    return out + [
        torch.empty(p.shape, dtype=p.dtype, device=p.device)
        for p, want in zip((scale, shift), wanted[1:], strict=True)
        if want
    ]


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_out: Tensor):
    wanted = list(ctx.needs_input_grad[:3])
    found = iter(task_scale_shift_backward_op(grad_out, *ctx.saved_tensors, wanted))
    return (*(next(found) if want else None for want in wanted), None)


def _setup_backward(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.wanted = inputs
    ctx.save_for_backward(*tensors)


def _backward_backward(ctx: Any, grads: Sequence[Tensor]):
    args = (*ctx.saved_tensors, ctx.wanted)
    return composed_backward(reference.task_scale_shift_backward, args, ctx.needs_input_grad, grads)


task_scale_shift_op = define_op(
    "task_scale_shift(Tensor x, Tensor scale, Tensor shift, Tensor task_ids) -> Tensor",
    _task_scale_shift,
    _fake,
    backward=_backward,
    setup_context=_setup,
)
task_scale_shift_backward_op = define_op(
    "task_scale_shift_backward(Tensor grad_out, Tensor x, Tensor scale, Tensor shift, Tensor task_ids, "
    "bool[] wanted) -> Tensor[]",
    _task_scale_shift_backward,
    _backward_fake,
    backward=_backward_backward,
    setup_context=_setup_backward,
)
