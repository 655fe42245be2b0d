"""The tasks of a converted model: which there are, what belongs to each, what an optimizer is told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from fastmtl.nn.layers.gate import finite
from fastmtl.nn.layers.heads import TaskHeads
from fastmtl.nn.models.merge import name_of_task, task_names
from fastmtl.nn.module import task_layers, together
from fastmtl.parameters import is_per_task


def add_task(model: nn.Module, name: str, like: str | None = None, *, head: int | nn.Module | None = None) -> None:
    """Adds a task to every layer, behind the others: its id is the number of tasks before.

    An optimizer must be told of the new parameters: `optimizer.add_param_group(...)` with those of
    `param_groups(model, task=name)`.

    Args:
        model: with layers of `fastmtl.nn`.
        name: a new name.
        like: the task whose parts are copied; None: what a new task begins with.
        head: of the new task in a `TaskHeads`: the size of a linear one, or the module itself. Heads of different sizes
            need it, or `like`.

    Raises:
        TypeError, ValueError: not a name, or one that is taken; no such task to copy; no layers with parts of tasks; a
            head that is none, that is missing, or that no `TaskHeads` takes.

    Example:
        >>> model = convert(torch.nn.Linear(4, 2), ["left", "right"])
        >>> add_task(model, "up", like="left")
        >>> task_names(model)
        ('left', 'right', 'up')
    """
    task_names(model)
    layers = [layer for _, layer in task_layers(model)]
    heads = [layer for layer in layers if isinstance(layer, TaskHeads)]
    if head is not None and not heads:
        raise ValueError(f"head: expected None for a model without TaskHeads, got {head!r}")
    given: dict[str, Any] = {} if head is None else {"module" if isinstance(head, nn.Module) else "size": head}
    for layer in layers:
        if isinstance(layer, TaskHeads):
            layer.check_new_task(name, None if given else like, **given)
        else:
            layer.check_new_task(name, like)
    with together(layers):
        for layer in layers:
            if isinstance(layer, TaskHeads):
                layer.add_task(name, None if given else like, **given)
            else:
                layer.add_task(name, like)


def remove_task(model: nn.Module, task: int | str) -> None:
    """Removes a task from every layer: those behind it move up, so that their ids are one less.

    An optimizer goes on holding the parameters that are gone: make a new one.

    Args:
        model: with layers of `fastmtl.nn`.
        task: position or name.

    Raises:
        TypeError, ValueError: no such task, or the only one; no layers with parts of tasks.

    Example:
        >>> model = convert(torch.nn.Linear(4, 2), ["left", "right"])
        >>> remove_task(model, "left")
        >>> task_names(model)
        ('right',)
    """
    name = name_of_task(model, task)
    if len(task_names(model)) == 1:
        raise ValueError(f"task: expected one of several tasks, got {name!r}, the only one")
    layers = [layer for _, layer in task_layers(model)]
    with together(layers):
        for layer in layers:
            layer.remove_task(name)


def task_parameters(model: nn.Module, task: int | str) -> list[nn.Parameter]:
    """The parameters that belong to one task, each once.

    Args:
        model: with layers of `fastmtl.nn`.
        task: position or name.

    Raises:
        TypeError, ValueError: no such task; no layers with parts of tasks.

    Example:
        >>> model = convert(torch.nn.Linear(4, 2), ["left", "right"], "dense")
        >>> [tuple(p.shape) for p in task_parameters(model, "left")]
        [(2, 4)]
    """
    return [p for _, p in _parts(model, name_of_task(model, task))]


def shared_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that belong to no single task, each once: what gradient surgery is about.

    Args:
        model: with layers of `fastmtl.nn`.

    Raises:
        TypeError, ValueError: no layers with parts of tasks.

    Example:
        >>> model = convert(torch.nn.Linear(4, 2), ["left", "right"], "dense")
        >>> [tuple(p.shape) for p in shared_parameters(model)]
        [(2, 4), (2,)]
    """
    task_names(model)
    return [p for p in model.parameters() if not is_per_task(p)]


def freeze_task(model: nn.Module, task: int | str, frozen: bool = True) -> None:
    """Stops the training of one task's parameters, or begins it again.

    Args:
        model: with layers of `fastmtl.nn`.
        task: position or name.
        frozen: False: they are trained again.

    Raises:
        TypeError, ValueError: no such task; no layers with parts of tasks.

    Running statistics of a batch norm are no parameters: they move while the model is in training mode and sees
    samples of the task.

    Example:
        >>> model = convert(torch.nn.Linear(4, 2), ["left", "right"])
        >>> freeze_task(model, "left")
        >>> any(p.requires_grad for p in task_parameters(model, "left"))
        False
    """
    if not isinstance(frozen, bool):
        raise TypeError(f"frozen: expected a bool, got {type(frozen).__name__}")
    for p in task_parameters(model, task):
        p.requires_grad_(not frozen)


def param_groups(
    model: nn.Module, *, task: int | str | None = None, gate_lr: float | None = None
) -> list[dict[str, Any]]:
    """Groups of parameters for an optimizer: shared ones, those of tasks, and gates without weight decay.

    Args:
        model: with layers of `fastmtl.nn`.
        task: position or name: of this task's parameters alone, for an optimizer per task; None: all.
        gate_lr: the gates' own learning rate; None: the optimizer's.

    Returns:
        Dictionaries with `params` and a `name` (`"shared"`, `"tasks"`, `"gates"`), without those that are empty and
        without parameters that do not train.

    Raises:
        TypeError, ValueError: no such task; a rate that is none; no layers with parts of tasks.

    Example:
        >>> model = convert(torch.nn.Linear(4, 2), ["left", "right"])
        >>> optimizer = torch.optim.AdamW(param_groups(model, gate_lr=1e-2), lr=1e-3)
        >>> [(g["name"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
        [('tasks', 0.001, 0.01), ('gates', 0.01, 0.0)]
    """
    names = task_names(model) if task is None else (name_of_task(model, task),)
    rate = {} if gate_lr is None else {"lr": finite(gate_lr, "gate_lr")}
    if gate_lr is not None and gate_lr < 0:
        raise ValueError(f"gate_lr: expected at least 0, got {gate_lr}")
    gates: dict[nn.Parameter, None] = {}
    others: dict[nn.Parameter, None] = {}
    for name in names:
        for part, p in _parts(model, name):
            (gates if part.rpartition(".")[2] == "gate" else others).setdefault(p)
    if task is None:
        # marked by hand: heads, for instance
        others.update({p: None for p in model.parameters() if is_per_task(p) and p not in gates})
    shared = [] if task is not None else [p for p in model.parameters() if not is_per_task(p)]
    groups: list[dict[str, Any]] = [
        {"name": "shared", "params": shared},
        {"name": "tasks", "params": list(others)},
        {"name": "gates", "params": list(gates), "weight_decay": 0.0, **rate},
    ]
    for group in groups:
        group["params"] = [p for p in group["params"] if p.requires_grad]
    return [group for group in groups if group["params"]]


def _parts(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """A task's parameters, each once, by their names in the layers."""
    seen: set[int] = set()
    for _, layer in task_layers(model):
        for part, p in layer.part(name).items():
            if isinstance(p, nn.Parameter) and id(p) not in seen:
                seen.add(id(p))
                yield part, p
