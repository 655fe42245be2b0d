"""What the layers with per-task weights share: a weight for all tasks, and the difference of each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastmtl.core.autograd import has_tangent
from fastmtl.core.task_weights import TaskPlan, TaskWeights
from fastmtl.core.tensors import FLOAT_DTYPES
from fastmtl.nn.containers import TaskParameters, Tasks
from fastmtl.nn.context import present_tasks
from fastmtl.nn.layers.gate import TapsGate, finite, rounded
from fastmtl.nn.module import TaskModule, as_parameter, copied, lacks, left_out
from fastmtl.ops import task_lora
from fastmtl.ops.task_weights import reference
from fastmtl.ops.task_weights.cpu.task_plan import all_closed

_Layer = TypeVar("_Layer", bound="TaskLayer")
Rank = int | Mapping[str, int]

# of a plain layer: what runs beside its forward, and would not run any more
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def check_plain(layer: Any, kind: type[nn.Module], *methods: str, weight: bool = True) -> None:
    """Whether a layer computes what `kind` does from its own `weight` and `bias`, and nothing else."""
    if not isinstance(layer, kind):
        raise TypeError(f"layer: expected nn.{kind.__name__}, got {type(layer).__name__}")
    for method in methods:
        if getattr(type(layer), method) is not getattr(kind, method):
            raise TypeError(f"layer: expected the {method} of nn.{kind.__name__}, got {type(layer).__name__}'s own")
    found = layer._parameters.get("weight")
    if (weight and found is None) or isinstance(found, nn.parameter.UninitializedParameter):
        raise ValueError(
            "layer: expected a plain parameter 'weight', got one that is computed (weight_norm, parametrizations), or "
            "not initialised"
        )
    if any(getattr(layer, hooks) for hooks in HOOKS):
        raise ValueError("layer: expected no hooks, since they would be lost, got some; remove them first")


class TaskLayer(TaskModule):
    """A layer with a shared `weight` and `bias`, and a difference of each task by its name.

    Children: `delta` (dense), or `A` and `B` (of a low rank); `gate` and `task_bias`, each None if not asked for.
    """

    bias: nn.Parameter | None
    delta: TaskParameters | None
    A: TaskParameters | None
    B: TaskParameters | None
    gate: TaskParameters | None
    task_bias: TaskParameters | None

    def __init__(
        self,
        shape: Sequence[int],
        tasks: Tasks,
        bias: bool,
        *,
        gate: float | TapsGate | None,
        rank: Rank | None,
        scaling: float,
        shared: bool,
        per_task_bias: bool,
        device: Any,
        dtype: torch.dtype | None,
        out_dim: int = 0,
    ) -> None:
        super().__init__(tasks)
        if not isinstance(shared, bool):
            raise TypeError(f"shared: expected a bool, got {type(shared).__name__}")
        if not shared and (rank is not None or gate is not None):
            raise ValueError("shared: expected True beside a gate or a rank, got False: there is no delta to scale")
        self.taps = gate if isinstance(gate, TapsGate) else None
        self.initial_gate = _first_gate(gate)
        self.rank = None if rank is None else read_rank(rank, self._names)
        self.scaling = finite(scaling, "scaling")
        self._out_dim, self._shape = out_dim, tuple(shape)
        # of separate weights there is no shared one, but what a new task starts from
        like = torch.empty(*shape, device=device, dtype=dtype)
        if shared:
            self.weight = nn.Parameter(like)
        bias_of = nn.Parameter(like.new_empty(shape[out_dim])) if bias and shared else None
        self.register_parameter("bias", bias_of)
        self.shared = shared
        dense = rank is None
        self.register_module("delta", TaskParameters() if dense else None)
        self.register_module("A", None if dense else TaskParameters())
        self.register_module("B", None if dense else TaskParameters())
        self.register_module("gate", None if gate is None else TaskParameters())
        self.register_module("task_bias", TaskParameters() if per_task_bias or (bias and not shared) else None)
        self._begin = (like, like.new_empty(shape[out_dim]))
        self._start_tasks()
        del self._begin
        self.reset_parameters()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            separate = name == "weight" and not self.__dict__.get("shared", True)
            delta = self._modules.get("delta") if separate else None
            if delta is None or not len(delta):
                raise
            # code around a layer asks for the dtype, device or shape of its weight
            return next(iter(delta.values()))

    def reset_parameters(self) -> None:
        """As the plain layer for `weight` and `bias`; deltas and per-task biases zero, gates at their first value.

        Separate weights and biases are the same for all tasks. Of a low-rank delta `A` is random and `B` zero.
        """
        weight, bias = self.weight, self.bias
        if not self.shared:
            weight = torch.empty_like(weight)
            bias = None if self.task_bias is None else torch.empty_like(self.task_bias[self.tasks[0]])
        with torch.no_grad():
            self._reset_plain(weight, bias)
            for name in self.tasks:
                self._reset_task(name, weight, bias)

    def _reset_plain(self, weight: Tensor, bias: Tensor | None) -> None:
        """Fills what a plain layer has, as that layer does."""
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        if bias is not None:
            bound = 1 / math.sqrt(max(1, weight.numel() // max(1, weight.shape[self._out_dim])))
            nn.init.uniform_(bias, -bound, bound)

    def _reset_task(self, name: str, weight: Tensor, bias: Tensor | None) -> None:
        if not self.shared:
            assert self.delta is not None
            self.delta[name].copy_(weight)
            if self.task_bias is not None and bias is not None:
                self.task_bias[name].copy_(bias)
            return
        if self.delta is not None:
            self.delta[name].zero_()
        if self.A is not None and self.B is not None:
            nn.init.kaiming_uniform_(self.A[name], a=math.sqrt(5))
            self.B[name].zero_()
        if self.gate is not None:
            self.gate[name].fill_(self.initial_gate)
        if self.task_bias is not None:
            self.task_bias[name].zero_()

    def _shapes_of_rank(self, rank: int) -> tuple[Sequence[int], Sequence[int]]:
        """Of `A` and `B`."""
        raise lacks(self, "_shapes_of_rank")

    def _start(self, name: str) -> None:
        like, bias = self._first()
        with torch.no_grad():
            if self.delta is not None:
                # zeros_like keeps the memory order of the weight, so channels_last stays channels_last
                start = torch.zeros_like(like) if self.shared else torch.empty_like(like).copy_(like)
                self.delta[name] = nn.Parameter(start)
            if self.A is not None and self.B is not None and self.rank is not None:
                down, up = self._shapes_of_rank(self.rank.setdefault(name, next(iter(self.rank.values()))))
                self.A[name] = nn.Parameter(like.new_empty(down))
                nn.init.kaiming_uniform_(self.A[name], a=math.sqrt(5))
                self.B[name] = nn.Parameter(like.new_zeros(up))
            if self.gate is not None:
                self.gate[name] = nn.Parameter(like.new_full((), self.initial_gate))
            if self.task_bias is not None:
                zeros = like.new_zeros(self._shape[self._out_dim])
                self.task_bias[name] = nn.Parameter(zeros if self.shared else zeros.copy_(bias))

    def _first(self) -> tuple[Tensor, Tensor]:
        """What a task's weight and bias begin with or are shaped like: the shared ones, or the mean of the separate."""
        if self.shared:
            return self.weight, self.weight
        if "_begin" in self.__dict__:
            return self._begin
        assert self.delta is not None
        mean = torch.stack([self.delta[t].detach() for t in self.tasks]).mean(0)
        # in the memory order of the others, which stack does not keep
        weight = torch.empty_like(self.delta[self.tasks[0]]).copy_(mean)
        if self.task_bias is None:
            return weight, weight
        return weight, torch.stack([self.task_bias[t].detach() for t in self.tasks]).mean(0)

    def _take(self: _Layer, layer: nn.Module) -> _Layer:
        """Makes the parameters of a plain layer the shared ones, or each task's first."""
        weight, bias = layer._parameters["weight"], layer._parameters.get("bias")
        assert weight is not None
        if self.shared:
            self.weight, self.bias = weight, bias
        else:
            self._begin = (weight.detach(), weight.detach() if bias is None else bias.detach())
        for name in self.tasks:
            self._start(name)
        if not self.shared:
            del self._begin
        return self.train(layer.training)

    def _end(self, name: str) -> None:
        super()._end(name)
        if self.rank is not None:
            del self.rank[name]

    def add_task(self, name: str, like: str | None = None, *, rank: int | None = None) -> None:
        """Adds a task behind the others: its id is the number of tasks before. An optimizer must be told of it.

        Args:
            name: a new name.
            like: the task whose part is copied; None: the delta and the per-task bias are zero, the gate is what it was
                at first. Separate weights begin with the mean of the other tasks'.
            rank: of a low-rank delta; None: that of the task to copy, or of the first task.

        Raises:
            TypeError, ValueError: not a name, or one that is taken; no such task to copy; a rank that is none;
                a layer that is tied to another one.
        """
        self.check_new_task(name, like)
        self._check_untied("add_task")
        if rank is not None and self.rank is None:
            raise ValueError(f"rank: expected None for a dense delta, got {rank!r}")
        if self.rank is not None:
            if like is not None and rank not in (None, self.rank[like]):
                raise ValueError(f"rank: expected {self.rank[like]} as of {like!r}, which is copied, got {rank!r}")
            chosen = rank if rank is not None else self.rank[like if like is not None else self.tasks[0]]
            self.rank[name] = read_rank({name: chosen}, (name,))[name]
        super().add_task(name, like)

    def effective_delta(self, task: int | str) -> Tensor | None:
        """`s_t Delta_t`, differentiable; None if its gate is closed (read under `torch.no_grad` alone) or it has none.

        Args:
            task: position or name.

        Raises:
            TypeError, ValueError: no such task; a low-rank delta whose halves do not fit.
        """
        name = self.task_name(task)
        if not self.shared:
            raise ValueError(f"{type(self).__name__}: expected a shared weight to differ from, got separate ones")
        gate = self._gate_of(name)
        if gate is not None and not torch.is_grad_enabled() and float(gate) == 0:
            return None
        if self.delta is not None:
            delta = self.delta[name]
        else:
            assert self.A is not None and self.B is not None
            delta = self._product(self.A[name], self.B[name], name)
            if self.scaling != 1:
                delta = delta * self.scaling
        return delta if gate is None else gate * delta

    def _gate_of(self, name: str) -> Tensor | None:
        if self.gate is None:
            return None
        gate = self.gate[name]
        return gate if self.taps is None else self.taps(gate)

    def _product(self, down: Tensor, up: Tensor, task: str) -> Tensor:
        """The low-rank delta in the shape of the weight."""
        return product_of_halves(down, up, self.weight, task)

    def effective_weight(self, task: int | str) -> Tensor:
        """`W + s_t Delta_t`, differentiable; under `torch.no_grad` a closed gate's delta is not read.

        Args:
            task: position or name.

        Raises:
            TypeError, ValueError: no such task; a low-rank delta whose halves do not fit.
        """
        name = self.task_name(task)
        if not self.shared:
            assert self.delta is not None
            return self.delta[name]
        if self.delta is not None:
            gate = self._gate_of(name)
            weights = TaskWeights(self.weight, [self.delta[name]], [0], None if gate is None else gate[None])
            return reference.effective_weight(weights, 0, self.weight.dtype, 1)
        delta = self.effective_delta(name)
        return self.weight if delta is None else self.weight + delta

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

    @torch.no_grad()
    def changed(self, task: int | str) -> bool:
        """Whether the task's weight or bias is another than the shared one. Waits for the device."""
        name = self.task_name(task)
        if not self.shared:
            return True
        bias = self.task_bias is not None and bool((self.task_bias[name] != 0).any())
        return bias or self._delta_counts(name)

    def _delta_counts(self, name: str) -> bool:
        gate = self._gate_of(name)
        if gate is not None and float(gate) == 0:
            return False
        held = self.delta if self.delta is not None else self.B
        return held is not None and bool((held[name] != 0).any())

    @torch.no_grad()
    def kept(self, task: int | str) -> dict[str, Tensor]:
        name = self.task_name(task)
        part = self.part(name)
        if not self.shared:
            return part
        of_delta = ("delta", "A", "B") if self._delta_counts(name) else ()
        found = {child: part[child] for child in of_delta if child in part}
        if "task_bias" in part and bool((part["task_bias"] != 0).any()):
            found["task_bias"] = part["task_bias"]
        return found

    def meaning(self) -> str:
        text = "" if self.scaling == 1 else f"scaling={self.scaling!r}"
        return text if self.taps is None else f"{text} threshold={self.taps.threshold!r}"

    def plain_name(self, child: str) -> str:
        return child if self.shared else {"delta": "weight", "task_bias": "bias"}.get(child, child)

    def plain_children(self) -> frozenset[str]:
        return frozenset() if self.shared else frozenset(("delta", "task_bias"))

    def plain_size(self) -> int:
        return 0 if self.shared else sum(x.numel() for x in self.part(self.tasks[0]).values())

    @torch.no_grad()
    def unused(self, task: int | str) -> frozenset[str]:
        name = self.task_name(task)
        if not self.shared or self.gate is None or self._delta_counts(name):
            return frozenset()
        return frozenset(("delta", "A", "B")) & frozenset(self.part(name))

    def expected_part(self, part: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        expected = super().expected_part(part)
        if self.A is not None and "A" in part and part["A"].dim() > 0 and len(part["A"]) > 0:
            down, up = self._shapes_of_rank(len(part["A"]))
            expected.update(A=tuple(down), B=tuple(up))
        return expected

    @torch.no_grad()
    def optional(self, part: Mapping[str, Tensor]) -> frozenset[str]:
        gate = part.get("gate")
        if self.gate is None or gate is None or gate.numel() != 1 or gate.is_complex():
            return frozenset()
        closed = float(gate if self.taps is None else self.taps(gate.float())) == 0
        # behind an open gate a file says that it leaves them out: one that merely lacks them is cut off
        names = frozenset(
            n for n in ("delta", "A", "B") if (closed and n not in part) or (n in part and left_out(part[n]))
        )
        # one half of a low-rank delta without the other is none
        return names if ("A" in names) == ("B" in names) else names - {"A", "B"}

    def add_part(self, name: str, part: Mapping[str, Tensor]) -> None:
        self.add_task(name, rank=len(part["A"]) if "A" in part else None)
        self.set_part(name, part)

    def set_part(self, task: int | str, part: Mapping[str, Tensor]) -> None:
        super().set_part(task, part)
        name = self.task_name(task)
        if self.rank is not None and "A" in part:
            self.rank[name] = len(part["A"])
        elif self.A is not None:
            # two halves of zero would never be trained
            with torch.no_grad():
                nn.init.kaiming_uniform_(self.A[name], a=math.sqrt(5))

    def _merge_into(self, plain: nn.Module, task: int | str, memo: dict[int, Any] | None) -> nn.Module:
        """Gives a plain layer the weight and bias of one task."""
        name = self.task_name(task)
        plain.weight = self._merged_weight(name, memo)
        with torch.no_grad():
            if self.task_bias is None:
                plain.bias = copied(self.bias, memo)
            else:
                bias = self.effective_bias(name)
                assert bias is not None
                plain.bias = as_parameter(bias)
        return plain.train(self.training)

    @torch.no_grad()
    def _merged_weight(self, name: str, memo: dict[Any, Any] | None) -> nn.Parameter:
        """The task's weight, as one parameter for all layers that have it in common."""
        memo = {} if memo is None else memo
        if self.shared and not self._delta_counts(name):
            if self.A is not None and self.B is not None and self._gate_of(name) is None:
                self._product(self.A[name], self.B[name], name)  # halves that do not fit are no zero delta
            found = copied(self.weight, memo)
        else:
            held = self.delta if self.delta is not None else self.B
            assert held is not None
            key = ("merged", id(self._parameters.get("weight")), id(held[name]))
            if key not in memo:
                memo[key] = as_parameter(self.effective_weight(name))
            found = memo[key]
        assert isinstance(found, nn.Parameter)
        return found

    # --- for forward

    def _of_tasks(self, plan: TaskPlan) -> dict[str, Any]:
        """Ids, delta, gate and bias as the ops take them."""
        (deltas,) = self._listed(plan, self._modules["delta"])
        return {"task_ids": plan, "delta": deltas, "gate": self._gates(plan), "bias": self._biases(plan)}

    def _gates(self, plan: TaskPlan) -> Tensor | None:
        # past nn.Module's getattr, here and below: it is slow beside a small layer
        held = self._modules["gate"]
        if held is None:
            return None
        gates = self._stacked(held, plan)
        return gates if self.taps is None else self.taps(gates)

    def _biases(self, plan: TaskPlan) -> Tensor | None:
        held, shared = self._modules["task_bias"], self._parameters.get("bias")
        if shared is None:
            # there is none, or it is parametrised
            shared = self.bias
        if held is None:
            return shared
        own = self._stacked(held, plan)
        return own if shared is None else shared + own

    def _scalings(self, plan: TaskPlan) -> Tensor | float | None:
        """Of low-rank deltas: one number, or one for each task that has a gate."""
        gates = self._gates(plan)
        if gates is None:
            return None if self.scaling == 1 else self.scaling
        return gates if self.scaling == 1 else gates * self.scaling

    def _is_plain(self, x: Tensor, dims: int) -> bool:
        """Whether the host knows, without waiting, that the plain layer is all that this batch needs.

        So it is if nothing asks for gradients and the gates of all tasks that have samples are closed. `dims`: how many
        leading dimensions of x the ids may have.
        """
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return False
        # past nn.Module's getattr, which is slow beside a small layer
        children = self._modules
        held = children["gate"]
        if held is None or children["task_bias"] is not None:
            return False
        self._see_static_graph()
        present = present_tasks(self.tasks, x, dims)
        if present is None:
            return False
        taps = children.get("taps")
        if taps is not None and type(taps) is not TapsGate:
            return False
        own, names, positions = held._parameters, self.tasks, present.positions
        if forward_ad._current_level >= 0 and has_tangent([own.get(names[t]) for t in positions]):
            return False
        first = own.get(names[positions[0]]) if positions else None
        if first is not None:
            closed = all_closed(own, names, positions, None if taps is None else rounded(taps.threshold, first.dtype))
            if closed is not None:
                return closed
        for t in positions:
            gate = own.get(names[t])
            # one that is parametrised is computed; a gate on a GPU would have to be waited for; of those that vmap has
            # stacked some may be open
            if gate is None or not gate.is_cpu or torch._C._functorch.is_functorch_wrapped_tensor(gate):
                return False
            value = gate.item()
            # not a number closes no gate
            if not (value == 0 if taps is None else value < rounded(taps.threshold, gate.dtype)):
                return False
        return True

    def _plain_parameters(self, x: Tensor, axis: int, columns: int) -> tuple[Tensor, Tensor | None] | None:
        """The shared weight and bias in the dtype of x; None: the op must see them, or say what is wrong with x.

        Args:
            x: the input.
            axis: its channels or columns.
            columns: how many of these the weight takes.
        """
        own = self._parameters
        weight = own.get("weight")
        # one that is parametrised or pruned is computed
        if weight is None or "bias" not in own:
            return None
        bias, dtype = own["bias"], x.dtype
        if x.shape[axis] != columns or x.layout is not torch.strided:
            return None
        # a device is made anew each time that it is asked for
        if not (x.is_cpu and weight.is_cpu) and x.device != weight.device:
            return None
        if weight.dtype != dtype:
            if weight.dtype != torch.float32 or dtype not in (torch.bfloat16, torch.float16):
                return None
            return weight.to(dtype), None if bias is None else bias.to(dtype)
        return (weight, bias) if dtype in FLOAT_DTYPES else None

    def _repr_of_layer(self, may_have_bias: bool = True) -> str:
        text = ", " + self._repr_of_tasks()
        if may_have_bias and self.bias is None and (self.shared or self.task_bias is None):
            text += ", bias=False"
        if not self.shared:
            text += ", shared=False"
        if self.rank is not None:
            ranks = sorted(set(self.rank.values()))
            text += f", rank={ranks[0] if len(ranks) == 1 else ranks}"
        if self.scaling != 1:
            text += f", scaling={self.scaling:g}"
        if self.gate is not None and self.taps is None:
            text += f", gate={self.initial_gate:g}"
        return text + (", per_task_bias=True" if self.task_bias is not None and self.shared else "")


def _first_gate(gate: Any) -> float | None:
    if gate is None or isinstance(gate, TapsGate):
        return None if gate is None else gate.start
    if isinstance(gate, bool) or not isinstance(gate, (int, float)):
        raise TypeError(f"gate: expected a number, a TapsGate or None, got {type(gate).__name__}")
    return finite(gate, "gate")


def read_rank(rank: Any, names: Sequence[str]) -> dict[str, int]:
    """A rank of each task.

    Raises:
        TypeError: no int, and no dict of such; a key that is no name.
        ValueError: a rank below 1; a task without one, or a rank of no task.
    """
    if isinstance(rank, Mapping):
        for name in rank:
            if not isinstance(name, str):
                raise TypeError(f"rank: expected ranks by the names of tasks (str), got a key {name!r}")
        missing = [repr(name) for name in names if name not in rank]
        unknown = [repr(name) for name in rank if name not in names]
        if missing or unknown:
            got = [f"none for {', '.join(missing)}"] if missing else []
            got += [f"one for {', '.join(unknown)}, no task of the layer"] if unknown else []
            raise ValueError(f"rank: expected one for each of {', '.join(names)}, got {' and '.join(got)}")
    found = dict(rank) if isinstance(rank, Mapping) else dict.fromkeys(names, rank)
    for name, r in found.items():
        argument = f"rank[{name!r}]" if isinstance(rank, Mapping) else "rank"
        if isinstance(r, bool) or not isinstance(r, int):
            or_by_task = "" if isinstance(rank, Mapping) else ", or a dict of one for each task"
            raise TypeError(f"{argument}: expected an int{or_by_task}, got {type(r).__name__}")
        if r < 1:
            raise ValueError(f"{argument}: expected at least 1, got {r}")
    return found


def product_of_halves(down: Tensor, up: Tensor, weight: Tensor, task: str) -> Tensor:
    """`B A` in the shape of a weight whose first dimension is that of the output."""
    if down.shape[0] != up.shape[1] or down.shape[1:] != weight.shape[1:] or up.shape[0] != weight.shape[0]:
        raise ValueError(
            f"task {task!r}: expected a low-rank delta whose halves fit, got A {list(down.shape)} and "
            f"B {list(up.shape)} for a weight {list(weight.shape)}"
        )
    # in the dtype of the parameters: what autocast casts is the input alone
    with torch.autocast(up.device.type, enabled=False):
        return (up.flatten(1) @ down.flatten(1)).view(weight.shape)


def low_rank_linear(layer: TaskLayer, x: Tensor, plan: TaskPlan, weight: Tensor) -> Tensor:
    """`x W^T + s_t (x A_t^T) B_t^T`, W `[Cout, Cin]`."""
    # past nn.Module's getattr, as in `_gates`
    down, up = layer._listed(plan, *(layer._modules[name] for name in "AB"))
    return task_lora(x, weight, down, up, plan, scaling=layer._scalings(plan), bias=layer._biases(plan))


def equal_ranks(halves: Sequence[Tensor], dim: int) -> list[Tensor]:
    """Halves of low-rank deltas with zeros up to the largest rank, where their ranks differ."""
    most = max(h.shape[dim] for h in halves)
    padded = []
    for h in halves:
        missing = most - h.shape[dim]
        padding = [0, 0] * (h.dim() - 1 - dim) + [0, missing]
        padded.append(nn.functional.pad(h, padding) if missing else h)
    return padded
