"""What the layers with per-task weights share: the parameters of each task, by its name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastmtl.core.task_weights import TaskWeights
from fastmtl.nn.context import current_plan
from fastmtl.ops import TaskPlan
from fastmtl.ops.task_weights import reference
from fastmtl.parameters import mark_per_task

Tasks = int | Sequence[str]
_Layer = TypeVar("_Layer", bound="TaskLayer")

# of a plain layer: what runs beside its forward, and would not run any more
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


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

    def extra_repr(self) -> str:
        # one line for all tasks: a network has dozens of such layers
        shapes = list(dict.fromkeys(str(list(p.shape)) for p in self.values()))
        return f"{len(self)} x {' or '.join(shapes)}" if shapes else ""

    def _mark(self) -> None:
        mark_per_task([p for p in self._parameters.values() if p is not None])


# a name of one of these would hide it
_TAKEN = frozenset(dir(nn.ParameterDict())) | frozenset(dir(TaskParameters))


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


def check_plain(layer: Any, kind: type[nn.Module], *methods: str) -> None:
    """Whether a layer computes what `kind` does from its own `weight` and `bias`, and nothing else."""
    if not isinstance(layer, kind):
        raise TypeError(f"layer: expected nn.{kind.__name__}, got {type(layer).__name__}")
    for method in methods:
        if getattr(type(layer), method) is not getattr(kind, method):
            raise TypeError(f"layer: expected the {method} of nn.{kind.__name__}, got {type(layer).__name__}'s own")
    weight = layer._parameters.get("weight")
    if weight is None or isinstance(weight, nn.parameter.UninitializedParameter):
        raise ValueError(
            "layer: expected a plain parameter 'weight', got one that is computed (weight_norm, parametrizations), or "
            "not initialised"
        )
    if any(getattr(layer, hooks) for hooks in _HOOKS):
        raise ValueError("layer: expected no hooks, since they would be lost, got some; remove them first")


class TaskLayer(nn.Module):
    """Shared `weight` and `bias`, and per-task `delta`, `gate` and `task_bias` by the task's name."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    delta: TaskParameters
    gate: TaskParameters | None
    task_bias: TaskParameters | None

    def __init__(
        self,
        shape: Sequence[int],
        tasks: Tasks,
        bias: bool,
        gate: float | None,
        per_task_bias: bool,
        device: Any,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        names = read_names(tasks)
        if gate is not None:
            if isinstance(gate, bool) or not isinstance(gate, (int, float)):
                raise TypeError(f"gate: expected a number or None, got {type(gate).__name__}")
            if not math.isfinite(gate):
                raise ValueError(f"gate: expected a finite number, got {gate}")
        self.initial_gate = None if gate is None else float(gate)
        self.weight = nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))
        bias_of = nn.Parameter(torch.empty(shape[0], device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", bias_of)
        self.delta = TaskParameters()
        self.register_module("gate", None if gate is None else TaskParameters())
        self.register_module("task_bias", TaskParameters() if per_task_bias else None)
        self.tasks: tuple[str, ...] = names
        for name in names:
            self._start(name)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the plain layer for `weight` and `bias`; deltas and per-task biases zero, gates at their first value."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(max(1, self.weight[0].numel()))
            nn.init.uniform_(self.bias, -bound, bound)
        for name in self.tasks:
            nn.init.zeros_(self.delta[name])
            if self.gate is not None:
                nn.init.constant_(self.gate[name], self.initial_gate)
            if self.task_bias is not None:
                nn.init.zeros_(self.task_bias[name])

    def _start(self, name: str) -> None:
        # zeros_like keeps the memory order of the weight, so channels_last stays channels_last
        with torch.no_grad():
            self.delta[name] = nn.Parameter(torch.zeros_like(self.weight))
            if self.gate is not None:
                self.gate[name] = nn.Parameter(self.weight.new_full((), self.initial_gate))
            if self.task_bias is not None:
                self.task_bias[name] = nn.Parameter(self.weight.new_zeros(self.weight.shape[0]))

    def _take(self: _Layer, layer: nn.Module) -> _Layer:
        """Makes the parameters of a plain layer the shared ones."""
        self.weight, self.bias = layer.weight, layer.bias
        for name in self.tasks:
            self._start(name)
        return self.train(layer.training)

    def add_task(self, name: str) -> None:
        """Adds a task behind the others: its id is the number of tasks before. An optimizer must be told of it.

        Args:
            name: a new name. The delta and the per-task bias are zero, the gate is what it was at first.

        Raises:
            TypeError, ValueError: not a name, or one that is taken.
        """
        check_name(name)
        if name in self.tasks:
            raise ValueError(f"name: expected a new task, got {name!r}, one of {', '.join(self.tasks)}")
        self._start(name)
        self.tasks = (*self.tasks, name)

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

    def effective_weight(self, task: int | str) -> Tensor:
        """`W + s_t Delta_t`, differentiable; under `torch.no_grad` a closed gate's delta is not read.

        Args:
            task: position or name.

        Raises:
            TypeError, ValueError: no such task.
        """
        name = self.task_name(task)
        gate = None if self.gate is None else self.gate[name][None]
        weights = TaskWeights(self.weight, [self.delta[name]], [0], gate)
        return reference.effective_weight(weights, 0, self.weight.dtype, 1)

    def effective_bias(self, task: int | str) -> Tensor | None:
        """The shared bias plus the task's own, as far as there are any.

        Args:
            task: position or name.

        Raises:
            TypeError, ValueError: no such task.
        """
        name = self.task_name(task)
        if self.task_bias is None:
            return self.bias
        return self.task_bias[name] if self.bias is None else self.bias + self.task_bias[name]

    def _plan(self) -> TaskPlan:
        return current_plan(len(self.tasks), type(self).__name__)

    def _in_order(self, params: TaskParameters) -> list[Tensor]:
        # not params[name]: twice the time, and there may be dozens of tasks
        return [getattr(params, name) for name in self.tasks]

    def _stacked(self, params: TaskParameters, plan: TaskPlan) -> Tensor:
        rows = self._in_order(params)
        if plan.offsets.device.type == "cpu" and not torch.compiler.is_compiling():
            # a task without samples gets no gradient, as its delta gets none
            bounds = plan.offsets.tolist()
            rows = [p if bounds[t + 1] > bounds[t] else p.detach() for t, p in enumerate(rows)]
        return torch.stack(rows)

    def _of_tasks(self) -> dict[str, Any]:
        """Ids, delta, gate and bias as the ops take them."""
        plan = self._plan()
        bias = self.bias
        if self.task_bias is not None:
            own = self._stacked(self.task_bias, plan)
            bias = own if bias is None else bias + own
        gate = None if self.gate is None else self._stacked(self.gate, plan)
        return {"task_ids": plan, "delta": self._in_order(self.delta), "gate": gate, "bias": bias}

    def _repr_of_tasks(self) -> str:
        named = len(self.tasks) <= 8 and self.tasks != tuple(str(t) for t in range(len(self.tasks)))
        text = f", tasks={list(self.tasks) if named else len(self.tasks)}"
        if self.bias is None:
            text += ", bias=False"
        if self.gate is not None:
            text += f", gate={self.initial_gate:g}"
        return text + (", per_task_bias=True" if self.task_bias is not None else "")
