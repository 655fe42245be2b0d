"""A plain network of one task."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from fastmtl.nn.models.plain import forget_contexts, tie_again
from fastmtl.nn.module import TaskComposite, TaskModule, task_layers
from fastmtl.parameters import unwrapped


def merge(model: nn.Module, task: int | str) -> nn.Module:
    """The plain model that computes what a converted one computes for one task, with no trace of fastmtl.

    Args:
        model: with layers of `fastmtl.nn`; it stays as it is. Of one that is compiled, in DDP or an `AveragedModel`,
            the model inside is merged.
        task: position or name.

    Returns:
        A deep copy with plain layers: deltas and gates are multiplied out, the other tasks are gone, and all
        parameters train. It needs no `tasks` block, and `checkpoint_contexts` is gone from its checkpoints. Layers that
        had a weight in common have one, as far as it is the same still, also where a model of transformers says that
        it ties them.

    Raises:
        TypeError: no module.
        ValueError: no layers with parts of tasks, no such task, a low-rank delta whose halves do not fit.

    Warns:
        UserWarning: weights that a model of transformers ties, an embedding and the head say, are others of this task,
            so that they are untied. `save_pretrained` and `from_pretrained` (of transformers 5) keep them so.

    Example:
        >>> model = convert(torch.nn.Sequential(torch.nn.Linear(4, 2)), ["left", "right"])
        >>> merge(model, "left")
        Sequential(
          (0): Linear(in_features=4, out_features=2, bias=True)
        )
    """
    name = name_of_task(model, task)
    model = unwrapped(model)
    memo: dict[Any, Any] = {}
    seen: set[int] = set()

    def walk(module: nn.Module) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        if isinstance(module, (TaskModule, TaskComposite)):
            memo[id(module)] = module.merged(name, memo)
            return
        for child in module.children():
            walk(child)

    walk(model)
    plain = copy.deepcopy(model, memo)
    for p in plain.parameters():
        if p.is_floating_point():
            p.requires_grad_(True)
    forget_contexts(plain)
    tie_again(plain, name)
    return plain


def task_names(model: nn.Module) -> tuple[str, ...]:
    """The tasks of a model, in the order in which ids count.

    Args:
        model: with layers of `fastmtl.nn`.

    Raises:
        TypeError: no module.
        ValueError: no layers with parts of tasks, or some with other tasks than the rest.

    Example:
        >>> task_names(convert(torch.nn.Linear(4, 2), ["left", "right"]))
        ('left', 'right')
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")
    found: tuple[str, ...] | None = None
    for path, layer in task_layers(model):
        if found is None:
            found = layer.tasks
        elif layer.tasks != found:
            raise ValueError(
                f"model: expected the same tasks in all layers, got {', '.join(found)} and, in {path!r}, "
                f"{', '.join(layer.tasks)}"
            )
    if found is None:
        raise ValueError("model: expected layers with parts of tasks (see fastmtl.nn.convert), got none")
    return found


def name_of_task(model: nn.Module, task: int | str) -> str:
    """The name of a model's task given by position or name."""
    task_names(model)
    return next(layer for _, layer in task_layers(model)).task_name(task)
