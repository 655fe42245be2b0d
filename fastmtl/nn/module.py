"""What all layers with parts of their own for each task can do: name tasks, add and remove them, hand out a part."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.core.task_weights import TaskPlan
from fastmtl.nn.absent import in_graph, in_process_group, in_static_graph, listed, stacked
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

    _zeros = False  # whether what belongs to tasks without samples gets a gradient of zero, and not None

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
        raise lacks(self, "_start")

    def merged(self, task: int | str, memo: dict[int, Any] | None = None) -> nn.Module:
        """The plain layer that computes what this one computes for one task, with tensors of its own.

        Args:
            task: position or name.
            memo: of `copy.deepcopy`, so that what is shared in a model stays shared.

        Raises:
            TypeError, ValueError: no such task; a low-rank delta whose halves do not fit.
        """
        raise lacks(self, "merged")

    def changed(self, task: int | str) -> bool:
        """Whether the task computes something else than the plain layer. Waits for the device."""
        raise lacks(self, "changed")

    def added(self, task: int | str) -> int:
        """How many numbers the task adds to the plain network, once those that change nothing are dropped."""
        return sum(x.numel() for x in self.kept(task).values())

    def kept(self, task: int | str) -> dict[str, Tensor]:
        """Of `part(task)`, what must be kept beside the plain network: not what changes nothing."""
        return self.part(task) if self.changed(task) else {}

    def plain_size(self) -> int:
        """How many numbers the plain layer has that this one has not: where each task has a copy of its own."""
        return 0

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
            TypeError, ValueError: not a name, or one that is taken; no such task to copy; a layer that is tied to
                another one.
        """
        self.check_new_task(name, like)
        self._check_untied("add_task")
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
            TypeError, ValueError: no such task, or the only one; a layer that is tied to another one.
        """
        name = self.task_name(task)
        if len(self.tasks) == 1:
            raise ValueError(f"task: expected one of several tasks, got {name!r}, the only one")
        self._check_untied("remove_task")
        self._end(name)
        self.tasks = tuple(t for t in self.tasks if t != name)

    def _check_untied(self, method: str) -> None:
        """Raises where another layer has these very tensors of tasks, and would go on naming other tasks."""
        tied = [child for child, held in self.containers().items() if held._tied]
        if tied:
            raise ValueError(
                f"layer: expected one whose tensors of tasks are its own, got a {type(self).__name__} whose "
                f"{', '.join(tied)} another layer has, too; call fastmtl.nn.{method} with the model that both are in"
            )

    @property
    def _tied_weights_keys(self) -> dict[str, str]:
        """What `save_pretrained` of transformers asks every module for: patterns of names that it may drop from a file,
        since another layer has these very tensors.
        """
        return {f"{child}.": child for child, held in self.containers().items() if held._tied}

    def _end(self, name: str) -> None:
        for held in self.containers().values():
            if name in held:
                del held[name]

    # --- a part from elsewhere

    def unused(self, task: int | str) -> frozenset[str]:
        """Names in `part(task)` of tensors that change nothing at present. Waits for the device."""
        self.task_name(task)
        return frozenset()

    def meaning(self) -> str:
        """What a part's numbers depend on beside the shared parameters: layers that swap parts must agree in it."""
        return ""

    def expected_part(self, part: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """The names and shapes that a task's part has; where they differ by task, they are read from `part`."""
        return {name: tuple(x.shape) for name, x in self.part(self.tasks[0]).items()}

    def check_part(self, part: Mapping[str, Tensor], where: str) -> None:
        """Raises if `part` is none that a task of this layer can have.

        Args:
            part: tensors by their names in the layer; those that change nothing may be left out.
            where: how errors call the layer.

        Raises:
            ValueError: a tensor that is missing, that nobody expects, or of another shape or kind of numbers.
        """
        expected, here = self.expected_part(part), self.part(self.tasks[0])
        for name, x in part.items():
            if name not in expected:
                raise ValueError(f"{where}: expected {', '.join(expected) or 'nothing'}, got {name!r}")
            if left_out(x) and name in self.optional(part):
                continue
            if tuple(x.shape) != expected[name]:
                raise ValueError(f"{where}: expected {name} of shape {list(expected[name])}, got {list(x.shape)}")
            if x.is_complex():
                raise ValueError(f"{where}: expected {name} of real numbers, got {x.dtype}")
            # heads may have tensors that the first task's has not
            own = here.get(name, x)
            if x.is_floating_point() != own.is_floating_point():
                kind = "floating-point numbers" if own.is_floating_point() else "integers"
                raise ValueError(f"{where}: expected {name} of {kind}, got {x.dtype}")
        missing = [name for name in expected if name not in part and name not in self.optional(part)]
        if missing:
            raise ValueError(f"{where}: expected {', '.join(missing)}, got {', '.join(part) or 'nothing'}")

    def optional(self, part: Mapping[str, Tensor]) -> frozenset[str]:
        """Names that a task's part may do without: tensors that change nothing, and are then zero."""
        return frozenset()

    def add_part(self, name: str, part: Mapping[str, Tensor]) -> None:
        """Adds a task with a part that `check_part` has passed."""
        self.add_task(name)
        self.set_part(name, part)

    @torch.no_grad()
    def set_part(self, task: int | str, part: Mapping[str, Tensor]) -> None:
        """Gives a task the values of a part that `check_part` has passed; a parameter stays the tensor that it is."""
        name = self.task_name(task)
        for child, held in self.containers().items():
            if name not in held:
                continue
            given, here = part.get(child), held[name]
            if given is None:
                here.zero_()
            elif given.shape == here.shape:
                here.copy_(given)
            elif isinstance(held, TaskParameters):
                like = torch.empty(given.shape, dtype=here.dtype, device=here.device).copy_(given)
                held[name] = nn.Parameter(like, requires_grad=here.requires_grad)

    # --- for the layers

    def _plan(self, x: Tensor, dims: int = 1) -> TaskPlan:
        """The batch sorted by task; `dims`: how many leading dimensions of x the ids may have."""
        if x.is_nested:
            raise ValueError(
                "x: expected a padded batch, got a nested tensor; where nn.TransformerEncoder makes it of a padding "
                "mask, set its use_nested_tensor = False"
            )
        if x.dim() == 0 or dims < 1:
            raise ValueError(f"x: expected samples in its first dimension, got shape {list(x.shape)}")
        if not torch.compiler.is_compiling():
            self._see_static_graph()
        return current_plan(self.tasks, type(self).__name__, x.shape[:dims], x.device)

    def _see_static_graph(self) -> None:
        """To be called in each forward pass, also in one without gradients: a checkpoint's second pass knows by it."""
        if in_process_group():
            self.__dict__["_zeros"] = in_static_graph(self._zeros)

    def _stacked(self, held: TaskParameters, plan: TaskPlan) -> Tensor:
        """`[T, ...]`, each task's tensor; one without samples gets no gradient, where the host knows the samples."""
        return stacked(held, self.tasks, plan.offsets, self._zeros)

    def _listed(self, plan: TaskPlan, *held: TaskParameters | None) -> list[Any]:
        """Of each of `held` a list of the tasks' tensors, for an op that gives those without samples no gradient."""
        return listed(held, self.tasks, plan.offsets, self._zeros)

    def _in_graph(self, x: Tensor, absent: Sequence[Tensor]) -> Tensor:
        """A view of `x` with tensors of tasks without samples in its graph, or `x` itself; see `fastmtl.nn.absent`."""
        return in_graph(x, absent, self._zeros)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self._read_plain(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._begin_from_meta(state_dict, prefix)

    def plain_name(self, child: str) -> str:
        """What a plain layer calls the tensor that becomes every task's in `child`."""
        return child

    def plain_children(self) -> frozenset[str]:
        """The children whose tensors a plain layer has, too, under their `plain_name`; it lacks those of the others."""
        return frozenset()

    def _read_plain(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Adds to a plain layer's `state_dict` what it has not: tensors of tasks.

        One that has tensors of tasks is no plain layer's: what it lacks is missing.
        """
        containers = self.containers()
        if any(key.startswith(f"{prefix}{child}.") for child in containers for key in state_dict):
            return
        needed = self.plain_children()
        for child, held in containers.items():
            plain = state_dict.pop(prefix + self.plain_name(child), None)
            for name in self.tasks:
                if plain is not None:
                    # each task's its own, also where load_state_dict(assign=True) keeps what it is given
                    state_dict[f"{prefix}{child}.{name}"] = plain.detach().clone()
                elif name in held and child not in needed:
                    state_dict[f"{prefix}{child}.{name}"] = held[name].detach()

    def _begin_from_meta(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Parts of tasks that have no memory, and that `state_dict` says nothing of, begin beside a loaded weight.

        So a network that was converted on the meta device takes a plain network's `state_dict` by `assign=True`.
        """
        if not any(p is not None and not p.is_meta for p in self._parameters.values()):
            return
        containers = self.containers()
        for name in self.tasks:
            keys = {child: f"{prefix}{child}.{name}" for child, held in containers.items() if name in held}
            if not any(key in state_dict and state_dict[key].is_meta for key in keys.values()):
                continue
            trained = {child: containers[child][name].requires_grad for child in keys}
            self._start(name)
            for child, key in keys.items():
                here = containers[child][name]
                if isinstance(here, nn.Parameter):
                    here.requires_grad_(trained[child])
                if key not in state_dict or state_dict[key].is_meta:
                    state_dict[key] = here.detach()

    def _repr_of_tasks(self) -> str:
        named = len(self.tasks) <= 8 and self.tasks != tuple(str(t) for t in range(len(self.tasks)))
        return f"tasks={list(self.tasks) if named else len(self.tasks)}"


class TaskComposite(nn.Module):
    """A module made of task layers, which together become one plain module: it has no part of its own.

    The attention of torch is one: four linear layers, whose weights torch keeps in one tensor. Whoever walks a model
    finds the layers inside (`task_layers`); the methods here do for all of them what those of a `TaskModule` do.
    """

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks, in the order in which ids count."""
        return self._inner()[0][1].tasks

    def _inner(self) -> list[tuple[str, TaskModule]]:
        return [found for name, child in self.named_children() for found in task_layers(child, name)]

    def task_name(self, task: int | str) -> str:
        """The name of a task given by position or name."""
        return self._inner()[0][1].task_name(task)

    def merged(self, task: int | str, memo: dict[int, Any] | None = None) -> nn.Module:
        """The plain module that computes what this one computes for one task, as `TaskModule.merged`."""
        raise lacks(self, "merged")

    def part(self, task: int | str) -> dict[str, Tensor]:
        """The tensors of one task, by their names in this module: `"q_proj.delta"` and so on.

        Args:
            task: position or name.

        Raises:
            TypeError, ValueError: no such task.
        """
        return {f"{path}.{key}": x for path, layer in self._inner() for key, x in layer.part(task).items()}

    def changed(self, task: int | str) -> bool:
        """Whether the task computes something else than the plain module. Waits for the device."""
        return any(layer.changed(task) for _, layer in self._inner())

    def added(self, task: int | str) -> int:
        """How many numbers the task adds to the plain network, once those that change nothing are dropped."""
        return sum(layer.added(task) for _, layer in self._inner())

    def add_task(self, name: str, like: str | None = None, **options: Any) -> None:
        """Adds a task behind the others: its id is the number of tasks before. An optimizer must be told of it.

        Args:
            name: a new name.
            like: the task whose part is copied; None: the part is what it was at first.
            options: of the layers' own `add_task`, as `rank`.

        Raises:
            TypeError, ValueError: not a name, or one that is taken; no such task to copy.
        """
        for _, layer in self._inner():
            layer.check_new_task(name, like)
            layer._check_untied("add_task")
        for _, layer in self._inner():
            layer.add_task(name, like, **options)

    def remove_task(self, task: int | str) -> None:
        """Removes a task: those behind it move up, so that their ids are one less. An optimizer must be told of it.

        Args:
            task: position or name.

        Raises:
            TypeError, ValueError: no such task, or the only one.
        """
        name = self.task_name(task)
        for _, layer in self._inner():
            layer._check_untied("remove_task")
        for _, layer in self._inner():
            layer.remove_task(name)


def lacks(layer: nn.Module, method: str) -> NotImplementedError:
    """What is raised for a method that every kind of layer has to have."""
    return NotImplementedError(f"layer {type(layer).__name__}: has no {method}, which a class of its own implements")


def task_layers(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, TaskModule]]:
    """Every layer with parts of tasks, once, by its path, in the order in which the model has them."""
    seen: set[int] = set()

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, TaskModule]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        if isinstance(module, TaskModule):
            yield path, module
            return
        for name, child in module.named_children():
            yield from walk(child, f"{path}.{name}" if path else name)

    return walk(model, prefix)


@contextlib.contextmanager
def together(layers: Iterable[TaskModule]) -> Iterator[None]:
    """Inside, tasks are added to and removed from all layers of a model, tied ones among them, in turn."""
    tied = {held: True for layer in layers for held in layer.containers().values() if held._tied}
    try:
        for held in tied:
            held._tied = False
        yield
    finally:
        for held in tied:
            held._tied = True


def left_out(x: Tensor) -> bool:
    """Whether it stands in a task's part for a tensor that changes nothing."""
    return tuple(x.shape) == (0,)


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
