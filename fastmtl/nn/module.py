"""What all layers with parts of their own for each task can do: name tasks, add and remove them, hand out a part."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.core.task_weights import TaskPlan
from fastmtl.nn.containers import TaskBuffers, TaskParameters, Tasks, check_name, read_names
from fastmtl.nn.context import current_plan


class TaskModule(nn.Module):
    """A layer of which each task has a part of its own, under the task's name.

    What belongs to single tasks lies in children that are `TaskParameters` or `TaskBuffers`. A layer of one's own makes
    these in `__init__`, fills them in `_start`, and calls `_start_tasks` in the end; then `fastmtl.nn.convert`'s
    companions (`add_task`, `extract`, `merge`, `layer_report`, ...) know it.

    A `state_dict` of the plain layer loads, too: what is called as a child of tasks' tensors (the `weight` of a
    norm) then becomes every task's, and tensors of tasks that it does not have stay as they are.

    Args:
        tasks: the number of tasks (named "0", "1", ...) or their names; ids count in this order.

    Raises:
        TypeError, ValueError: tasks that are none; a name with a dot or one that `nn.ParameterDict` uses.
    """

    def __init__(self, tasks: Tasks) -> None:
        super().__init__()
        self.tasks: tuple[str, ...] = ()
        self._names = read_names(tasks)

    def _start_tasks(self) -> None:
        """Makes the part of each task that the layer was made for."""
        for name in self._names:
            self._start(name)
        self.tasks = self._names
        del self._names

    # --- what a kind of layer says of itself

    def _start(self, name: str) -> None:
        """Makes the tensors of a new task, as they are at first."""
        raise NotImplementedError

    def merged(self, task: int | str, memo: dict[int, Any] | None = None) -> nn.Module:
        """The plain layer that computes what this one computes for one task, with tensors of its own.

        Args:
            task: position or name.
            memo: of `copy.deepcopy`, so that what is shared in a model stays shared.

        Raises:
            TypeError, ValueError: no such task; a low-rank delta whose halves do not fit.
        """
        raise NotImplementedError

    def changed(self, task: int | str) -> bool:
        """Whether the task computes something else than the plain layer. Waits for the device."""
        raise NotImplementedError

    def added(self, task: int | str) -> int:
        """How many numbers the task adds to the plain network, once those that change nothing are dropped."""
        if not self.changed(task):
            return 0
        return sum(x.numel() for x in self.part(task).values())

    # --- tasks

    def task_name(self, task: int | str) -> str:
        """The name of a task given by position or name."""
        if isinstance(task, str):
            if task not in self.tasks:
                raise ValueError(f"task: expected one of {', '.join(self.tasks)}, got {task!r}")
            return task
        if isinstance(task, bool) or not isinstance(task, int):
            raise TypeError(f"task: expected a position or a name, got {type(task).__name__}")
        if not 0 <= task < len(self.tasks):
            raise ValueError(f"task: expected 0..{len(self.tasks) - 1}, got {task}")
        return self.tasks[task]

    def containers(self) -> dict[str, TaskParameters | TaskBuffers]:
        """The children that hold tensors of single tasks, by name."""
        return {
            name: child for name, child in self.named_children() if isinstance(child, (TaskParameters, TaskBuffers))
        }

    def part(self, task: int | str) -> dict[str, Tensor]:
        """The tensors of one task, by their names in the layer: `"delta"`, `"gate"` and so on.

        Args:
            task: position or name.

        Raises:
            TypeError, ValueError: no such task.
        """
        name = self.task_name(task)
        return {child: held[name] for child, held in self.containers().items() if name in held}

    def check_new_task(self, name: str, like: str | None = None) -> None:
        """Raises what `add_task` would raise."""
        check_name(name)
        if name in self.tasks:
            raise ValueError(f"name: expected a new task, got {name!r}, one of {', '.join(self.tasks)}")
        if like is not None:
            if not isinstance(like, str):
                raise TypeError(f"like: expected the name of a task or None, got {type(like).__name__}")
            if like not in self.tasks:
                raise ValueError(f"like: expected one of {', '.join(self.tasks)}, got {like!r}")

    def add_task(self, name: str, like: str | None = None) -> None:
        """Adds a task behind the others: its id is the number of tasks before. An optimizer must be told of it.

        Args:
            name: a new name.
            like: the task whose part is copied; None: the part is what it was at first (a delta of zero).

        Raises:
            TypeError, ValueError: not a name, or one that is taken; no such task to copy.
        """
        self.check_new_task(name, like)
        self._start(name)
        self.tasks = (*self.tasks, name)
        if like is not None:
            self._copy(like, name)

    def _copy(self, source: str, target: str) -> None:
        for held in self.containers().values():
            if source not in held:
                continue
            if isinstance(held, TaskParameters):
                held[target] = nn.Parameter(held[source].detach().clone(), requires_grad=held[source].requires_grad)
            else:
                held[target] = held[source].clone()

    def remove_task(self, task: int | str) -> None:
        """Removes a task: those behind it move up, so that their ids are one less. An optimizer must be told of it.

        Args:
            task: position or name.

        Raises:
            TypeError, ValueError: no such task, or the only one.
        """
        name = self.task_name(task)
        if len(self.tasks) == 1:
            raise ValueError(f"task: expected one of several tasks, got {name!r}, the only one")
        self._end(name)
        self.tasks = tuple(t for t in self.tasks if t != name)

    def _end(self, name: str) -> None:
        for held in self.containers().values():
            if name in held:
                del held[name]

    # --- for the layers

    def _plan(self, x: Tensor, dims: int = 1) -> TaskPlan:
        """The batch sorted by task; `dims`: how many leading dimensions of x the ids may have."""
        return current_plan(self.tasks, type(self).__name__, x.shape[:dims], x.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self._read_plain(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _read_plain(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Adds to a plain layer's `state_dict` what it has not: tensors of tasks."""
        for child, held in self.containers().items():
            begin = f"{prefix}{child}."
            if any(key.startswith(begin) for key in state_dict):
                continue
            plain = state_dict.pop(prefix + child, None)
            for name in self.tasks:
                if plain is not None:
                    # each task's its own, also where load_state_dict(assign=True) keeps what it is given
                    state_dict[begin + name] = plain.detach().clone()
                elif name in held:
                    state_dict[begin + name] = held[name].detach()

    def _repr_of_tasks(self) -> str:
        named = len(self.tasks) <= 8 and self.tasks != tuple(str(t) for t in range(len(self.tasks)))
        return f"tasks={list(self.tasks) if named else len(self.tasks)}"


def copied(param: Tensor | None, memo: dict[int, Any] | None) -> nn.Parameter | None:
    """A parameter for a merged layer: a copy that trains, the same one for all that share it."""
    if param is None:
        return None
    found = copy.deepcopy(param, {} if memo is None else memo)
    assert isinstance(found, nn.Parameter)
    return found.requires_grad_(True)


def as_parameter(x: Tensor) -> nn.Parameter:
    """A parameter for a merged layer, of a tensor that was computed."""
    with torch.no_grad():
        return nn.Parameter(x.detach().clone(memory_format=torch.preserve_format))
