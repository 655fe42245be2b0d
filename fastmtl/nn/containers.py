"""What belongs to single tasks, by the task's name: parameters, and tensors that are saved and not trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.core.task_weights import SortedBatch, TaskPlan
from fastmtl.parameters import mark_per_task

Tasks = int | Sequence[str]


class TaskParameters(nn.ParameterDict):
    """Parameters of single tasks, by the task's name: an `nn.ParameterDict` that keeps them out of gradient surgery.

    Each is marked as by `fastmtl.mark_per_task`, and stays marked through deep copies, pickling, conversions that make
    new parameters, and `load_state_dict(assign=True)`.

    Raises:
        TypeError: a name that is not a str.
        ValueError: a name that is empty, has a dot, or is an attribute of `nn.ParameterDict`.

    Example:
        >>> heads = TaskParameters({"left": torch.zeros(3), "right": torch.zeros(3)})
        >>> list(heads)
        ['left', 'right']
    """

    _tied = False  # whether several layers have it

    def __setitem__(self, key: str, value: Any) -> None:
        check_name(key)
        super().__setitem__(key, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        if param is not None:
            mark_per_task(param)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TaskParameters:
        super()._apply(fn, recurse)
        self._mark()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._mark()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark()

    def of_tasks(self, names: Sequence[str]) -> list[Tensor]:
        """Those of some tasks, in the order of `names`."""
        return _of_tasks(self, self._parameters, names)

    def extra_repr(self) -> str:
        # one line for all tasks: a network has dozens of such layers
        return _one_line(self.values())

    def _mark(self) -> None:
        mark_per_task([p for p in self._parameters.values() if p is not None])


class TaskBuffers(nn.Module):
    """Tensors of single tasks that are saved with a model and not trained, by the task's name.

    Args:
        tensors: by the tasks' names; None: none at first.

    Raises:
        TypeError: a name that is not a str, a value that is no tensor.
        ValueError: a name that is empty, has a dot, or is an attribute of `nn.ParameterDict`.

    Example:
        >>> means = TaskBuffers({"left": torch.zeros(3)})
        >>> means["right"] = torch.ones(3)
        >>> list(means)
        ['left', 'right']
    """

    _tied = False  # as of `TaskParameters`

    def __init__(self, tensors: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        for name, x in (tensors or {}).items():
            self[name] = x

    def __setitem__(self, name: str, x: Tensor) -> None:
        check_name(name)
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if name in self._buffers:
            self._buffers[name] = x
        else:
            self.register_buffer(name, x)

    def __getitem__(self, name: str) -> Tensor:
        found = self._buffers[name]
        assert found is not None
        return found

    def __delitem__(self, name: str) -> None:
        del self._buffers[name]

    def __contains__(self, name: object) -> bool:
        return name in self._buffers

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def __len__(self) -> int:
        return len(self._buffers)

    def of_tasks(self, names: Sequence[str]) -> list[Tensor]:
        """Those of some tasks, in the order of `names`."""
        return _of_tasks(self, self._buffers, names)

    def extra_repr(self) -> str:
        return _one_line(self._buffers.values())


class TaskModules(nn.ModuleDict):
    """Modules of single tasks, by the task's name: an `nn.ModuleDict` that keeps them out of gradient surgery.

    Their parameters are marked as by `fastmtl.mark_per_task`, and stay marked as those of `TaskParameters` do.

    Raises:
        TypeError: a name that is not a str, a value that is no module.
        ValueError: a name that is empty, has a dot, or is an attribute of `nn.ParameterDict`.

    Example:
        >>> heads = TaskModules({"left": torch.nn.Linear(4, 2), "right": torch.nn.Linear(4, 3)})
        >>> list(heads)
        ['left', 'right']
    """

    def __init__(self, modules: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__(modules)
        # once the children have been read, too
        self.register_load_state_dict_post_hook(_mark_loaded)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        check_name(name)
        super().add_module(name, module)
        self._mark()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TaskModules:
        super()._apply(fn, recurse)
        self._mark()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark()

    def _mark(self) -> None:
        mark_per_task(self)


def _mark_loaded(module: nn.Module, _: Any) -> None:
    mark_per_task(module)


def _one_line(tensors: Any) -> str:
    found = list(tensors)
    shapes = list(dict.fromkeys(str(list(x.shape)) for x in found))
    return f"{len(found)} x {' or '.join(shapes)}" if shapes else ""


def _of_tasks(held: nn.Module, own: Mapping[str, Tensor | None], names: Sequence[str]) -> list[Tensor]:
    # past nn.Module's getattr, which is slow for dozens of tasks; a graph being traced asks the module as ever, and one
    # that is parametrised has no entry
    if torch.compiler.is_compiling():
        return [getattr(held, name) for name in names]
    found = [own.get(name) for name in names]
    return [getattr(held, name) if x is None else x for name, x in zip(names, found, strict=True)]


# a name of one of these would hide it
_TAKEN = (
    frozenset(dir(nn.ParameterDict()))
    | frozenset(dir(TaskParameters))
    | frozenset(dir(TaskBuffers()))
    | frozenset(dir(nn.ModuleDict()))
)


def check_name(name: Any) -> None:
    if not isinstance(name, str):
        raise TypeError(f"tasks: expected names (str), got {type(name).__name__}")
    if not name or "." in name:
        raise ValueError(f"tasks: expected names without dots that are not empty, got {name!r}")
    if name in _TAKEN:
        raise ValueError(f"tasks: expected names that are no attribute of nn.ParameterDict, got {name!r}")


def read_names(tasks: Tasks) -> tuple[str, ...]:
    if isinstance(tasks, int) and not isinstance(tasks, bool):
        if tasks < 1:
            raise ValueError(f"tasks: expected at least 1, got {tasks}")
        return tuple(str(t) for t in range(tasks))
    if isinstance(tasks, (str, bytes)) or not isinstance(tasks, Sequence):
        raise TypeError(f"tasks: expected a number or a sequence of names, got {type(tasks).__name__}")
    for name in tasks:
        check_name(name)
    if len(tasks) == 0:
        raise ValueError("tasks: expected at least one name, got none")
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"tasks: expected different names, got {list(tasks)}")
    return tuple(tasks)


def segments(plan: TaskPlan) -> Iterator[tuple[int, Tensor]]:
    """Each task that has samples, with their flat positions. Waits for the device."""
    return SortedBatch(plan.order, plan.offsets).segments()


def known_ids(plan: TaskPlan) -> tuple[Tensor, Tensor]:
    """Which samples have a task, and each sample's task; 0 where it has none, as a GPU cannot say without waiting."""
    ids = plan.task_ids
    known = (ids >= 0) & (ids < plan.offsets.shape[0] - 1)
    return known, torch.where(known, ids, 0)


def rows_of_samples(table: Tensor, plan: TaskPlan) -> Tensor:
    """Each sample's row of a `[T, ...]` table; NaN for a sample of no task, as the ops have it."""
    if table.device.type == "cpu":
        return table[plan.task_ids]
    known, ids = known_ids(plan)
    return torch.where(known.view(*ids.shape, *(1,) * (table.dim() - 1)), table[ids], torch.nan)
