"""What training a converted model adds to a loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastmtl.core.task_weights import TaskPlan
from fastmtl.nn.context import current_tasks
from fastmtl.nn.models.merge import task_names
from fastmtl.nn.module import task_layers
from fastmtl.ops import task_plan


def sparsity_loss(model: nn.Module, tasks: Sequence[str] | str | None = None) -> Tensor:
    """TAPS's price of a difference: the mean of `|s|` over the layers with a gate, summed over tasks.

    Args:
        model: with gates.
        tasks: names of the tasks that count, or the name of one. None: inside a `fastmtl.nn.tasks` block those that
            have samples in the batch, as a gate of another task would close without a single sample of it; outside,
            all.

    Returns:
        A scalar, to be multiplied with lambda and added to the loss. On a GPU nothing waits: a task without samples
        counts zero times.

    Raises:
        TypeError, ValueError: a model without gates; no such task.

    Source: Wallingford et al. 2022 (TAPS), eq. 4: `lambda / L * sum_l |s_l|`.

    Example:
        >>> model = convert(torch.nn.Linear(4, 2), ["left", "right"])
        >>> round(float(sparsity_loss(model)), 4)
        0.3
    """
    names = task_names(model)
    gates = [layer.get_submodule("gate") for _, layer in task_layers(model) if "gate" in layer.containers()]
    gates = list({id(held): held for held in gates}.values())
    if not gates:
        raise ValueError("model: expected layers with gates (kind 'taps', or gate=), got none")
    block = current_tasks()
    present: Tensor | None = None
    if tasks is not None:
        chosen = [tasks] if isinstance(tasks, str) else list(tasks)
    elif block is None:
        chosen = list(names)
    elif isinstance(block.task_ids, str):
        chosen = [block.task_ids]
    elif isinstance(block.task_ids, tuple) and not isinstance(block.task_ids, TaskPlan):
        chosen = [name for name in names if name in block.task_ids]
    else:
        chosen = list(names)
        ids = block.task_ids
        plan = ids if isinstance(ids, TaskPlan) else task_plan(ids, len(names))
        present = plan.offsets[1:] > plan.offsets[:-1]
        if present.device.type == "cpu" and not torch.compiler.is_compiling():
            chosen, present = [name for name, here in zip(names, present.tolist(), strict=True) if here], None
    for name in chosen:
        if name not in names:
            raise ValueError(f"tasks: expected one of {', '.join(names)}, got {name!r}")
    if not chosen:
        return sum((getattr(gates[0], name) for name in names), start=torch.zeros(())) * 0
    by_task = torch.stack([torch.stack([getattr(held, name) for held in gates]).abs().mean() for name in chosen])
    return by_task.sum() if present is None else (by_task * present).sum()
