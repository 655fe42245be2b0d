"""The sort of a batch by task: made once per batch, on the device, without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.core.dispatch import checking, choose, interpreting, straight_to_cpu, triton_kernels
from fastmtl.core.schemas import define_op
from fastmtl.core.task_weights import TaskPlan
from fastmtl.ops.task_weights import reference
from fastmtl.ops.task_weights.arguments import check_ids
from fastmtl.ops.task_weights.cpu import task_plan as task_plan_cpu
from fastmtl.ops.task_weights.operators import known_bounds


def task_plan(task_ids: Tensor, num_tasks: int) -> TaskPlan:
    """Sorts a batch by task, once, for all task ops of a network.

    Args:
        task_ids: `[N]` or `[N, L]` int32 or int64, each from 0 to T - 1.
        num_tasks: T, at least 1.

    Returns:
        A `TaskPlan`, a NamedTuple of tensors on the device of the ids: `task_ids` as given, `order` `[N]` int64 (flat
        positions, sorted by task, stable), `offsets` `[T + 1]` int64 (where each task begins in `order`).

    Raises:
        TypeError: ids that are not int32 or int64; `num_tasks` that is not an int.
        ValueError: `num_tasks` below 1; on the CPU an id out of range. On a GPU that can't be seen without waiting:
            such samples come last in `order`, from `offsets[T]` on, and the task ops make their rows NaN;
            `FASTMTL_CHECK=1` checks them there too, and waits.

    Example:
        >>> task_plan(torch.tensor([1, 0, 1]), 2).order
        tensor([1, 0, 2])
    """
    if isinstance(task_ids, TaskPlan):
        raise TypeError("task_ids: expected an int64 or int32 tensor, got a TaskPlan")
    check_ids(task_ids)
    if task_ids.dim() == 0:
        raise ValueError("task_ids: expected shape [N] or [N, L], got []")
    _check_num_tasks(num_tasks)
    if not torch.compiler.is_compiling() and type(task_ids) is Tensor and task_ids.is_cpu and straight_to_cpu():
        found = task_plan_cpu.task_plan(task_ids, num_tasks)
        if found is not None:
            return TaskPlan(task_ids, *found)
    # says what is wrong with ids that are out of range
    order, offsets = task_plan_op(task_ids, num_tasks)
    return TaskPlan(task_ids, order, offsets)


def read_plan(task_ids: Tensor | TaskPlan, num_tasks: int) -> TaskPlan:
    """The plan of ids that `check_ids` has passed, or a given one, of `num_tasks` tasks."""
    if not isinstance(task_ids, TaskPlan):
        return task_plan(task_ids, num_tasks)
    plan = task_ids
    planned = plan.offsets.shape[0] - 1  # `plan.num_tasks`, which dynamo of torch 2.10 does not trace
    if planned != num_tasks:
        raise ValueError(f"task_ids: expected a plan of {num_tasks} tasks, got one of {planned}")
    for name, x in (("order", plan.order), ("offsets", plan.offsets)):
        if x.dtype != torch.int64 or x.dim() != 1 or x.device != plan.task_ids.device:
            raise ValueError(f"task_ids: expected a plan as `task_plan` makes it, got {name} {x.dtype} on {x.device}")
    if plan.order.shape[0] != plan.task_ids.numel():
        raise ValueError(
            f"task_ids: expected a plan as `task_plan` makes it, got {plan.order.shape[0]} positions for "
            f"{plan.task_ids.numel()} ids"
        )
    bounds = known_bounds(plan.offsets)
    if bounds is not None:
        count = plan.order.shape[0]
        # in Triton's interpreter a plan may leave samples out, as one made on a GPU may
        complete = bounds[-1] <= count if interpreting() else bounds[-1] == count
        if bounds[0] != 0 or not complete or sorted(bounds) != bounds:
            raise ValueError(
                f"task_ids: expected a plan as `task_plan` makes it, got offsets that do not cut {count} "
                "samples by task"
            )
    return plan


def _check_num_tasks(num_tasks: int) -> None:
    if not isinstance(num_tasks, int) or isinstance(num_tasks, bool):
        raise TypeError(f"num_tasks: expected an int, got {type(num_tasks).__name__}")
    if num_tasks < 1:
        raise ValueError(f"num_tasks: expected at least 1, got {num_tasks}")


def check_range(task_ids: Tensor, num_tasks: int) -> None:
    """Raises for an id out of range. Waits for the device."""
    if task_ids.numel() == 0:
        return
    least, most = (int(x) for x in task_ids.aminmax())
    if least < 0 or most >= num_tasks:
        raise ValueError(f"task_ids: expected ids from 0 to {num_tasks - 1}, got {least if least < 0 else most}")


def _triton(task_ids: Tensor, num_tasks: int) -> tuple[Tensor, Tensor]:
    return triton_kernels("task_weights.task_plan").task_plan(task_ids, num_tasks)


def _compiled(task_ids: Tensor, num_tasks: int) -> tuple[Tensor, Tensor]:
    found = task_plan_cpu.task_plan(task_ids, num_tasks)
    if found is None:
        check_range(task_ids, num_tasks)  # raises
    assert found is not None
    return found


# in CUDA C++ there is no kernel of its own: torch's sort on the device is one
_IMPLEMENTATIONS = {
    "cpu": _compiled,
    "cuda": reference.task_plan,
    "triton": _triton,
    "reference": reference.task_plan,
}
_ORDER = {"cuda": ("triton", "cuda")}


def _task_plan(task_ids: Tensor, num_tasks: int) -> tuple[Tensor, Tensor]:
    device_type = task_ids.device.type
    run = choose("task_plan", device_type, _IMPLEMENTATIONS, order=_ORDER.get(device_type))
    if run is not _compiled and (task_ids.device.type == "cpu" or checking()):
        check_range(task_ids, num_tasks)
    return run(task_ids, num_tasks)


def _fake(task_ids: Tensor, num_tasks: int) -> tuple[Tensor, Tensor]:
    return (
        task_ids.new_empty((task_ids.numel(),), dtype=torch.int64),
        task_ids.new_empty((num_tasks + 1,), dtype=torch.int64),
    )


task_plan_op = define_op("task_plan(Tensor task_ids, int num_tasks) -> (Tensor, Tensor)", _task_plan, _fake)
