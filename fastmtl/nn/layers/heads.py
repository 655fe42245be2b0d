"""The heads of a network: one for each task, chosen by the ids of the batch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmtl.core.task_weights import TaskPlan
from fastmtl.nn.absent import presence
from fastmtl.nn.containers import TaskModules, Tasks, known_ids, segments
from fastmtl.nn.layers.weights import HOOKS, check_plain
from fastmtl.nn.module import TaskModule
from fastmtl.ops import task_linear
from fastmtl.ops.task_weights.arguments import check_companion, check_input, check_leading
from fastmtl.ops.task_weights.precision import cast_by_autocast

Output = Literal["list", "padded"] | None


class TaskHeads(TaskModule):
    """A head for each task: sample b goes through that of its task, as `fastmtl.nn.tasks` tells it.

    Heads of any other kind than linear ones: see `from_modules`.

    Args:
        in_features: columns of the input.
        sizes: by the tasks' names, columns of each task's result; ids count in this order.
        bias: whether the heads have biases.
        output: what `forward` gives, see below; `"list"`, `"padded"`, or None: one tensor if all results have the same
            shape, else a list.
        fill: what stands in a padded result behind the columns of a smaller head. With `-inf`, a softmax there gives 0.
        device: of all parameters.
        dtype: of all parameters.

    `forward(x)` takes `[N, ..., in_features]`; the ids have the shape of one or more leading dimensions. It gives

    - one tensor `[N, ..., C]`, in the order of the batch, of heads of one size C;
    - a list of T tensors `[N_t, ..., C_t]` in the order of the tasks, each with its task's samples in the order of the
      batch (their leading dimensions are flat where ids are `[N, L]`). A task without samples has an empty one. As its
      shapes depend on the ids, this waits for a GPU, and breaks a compiled graph;
    - with `output="padded"` one tensor `[N, ..., C]` with C the largest size, and `fill` where a head has no column.
      This waits for nothing.

    The heads are modules, `heads.heads["cars"]`, with their parameters marked as by `fastmtl.mark_per_task`, which
    gradient surgery leaves alone. On the CPU the head of a task without samples gets no gradient.

    Raises:
        TypeError, ValueError: sizes, an `output` or a `fill` that are none; a name with a dot or one that
            `nn.ParameterDict` uses.
        RuntimeError: (from forward) outside `fastmtl.nn.tasks`.

    Example:
        >>> head = TaskHeads(8, {"cars": 196, "birds": 200}, output="padded")
        >>> with tasks(["birds", "cars", "birds"]):
        ...     y = head(torch.ones(3, 8))
        >>> y.shape, y[1, 196:].tolist()
        (torch.Size([3, 200]), [-inf, -inf, -inf, -inf])
    """

    def __init__(
        self,
        in_features: int,
        sizes: Mapping[str, int],
        bias: bool = True,
        output: Output = None,
        fill: float = -math.inf,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_size(in_features, "in_features")
        if not isinstance(sizes, Mapping):
            raise TypeError(f"sizes: expected a dict from names to sizes, got {type(sizes).__name__}")
        for name, size in sizes.items():
            _check_size(size, f"sizes[{name!r}]")
        self._set_up(
            list(sizes), output, fill,
            lambda name: nn.Linear(in_features, sizes[name], bias, device=device, dtype=dtype),
        )  # fmt: skip

    def _set_up(self, names: list[str], output: Any, fill: Any, make: Callable[[str], nn.Module]) -> None:
        super().__init__(names)
        if output not in (None, "list", "padded"):
            raise ValueError(f"output: expected None, 'list' or 'padded', got {output!r}")
        if isinstance(fill, bool) or not isinstance(fill, (int, float)):
            raise TypeError(f"fill: expected a number, got {type(fill).__name__}")
        self.output, self.fill = output, float(fill)
        self.heads = TaskModules({name: make(name) for name in self._names})
        self.tasks = self._names
        del self._names

    @classmethod
    def from_modules(
        cls, modules: Mapping[str, nn.Module], output: Output = None, fill: float = -math.inf
    ) -> TaskHeads:
        """Heads of any kind. Those that are all `nn.Linear` run in one call, others one after another.

        Heads that are not all `nn.Linear` are called with their samples, `[N_t, ...]`; those without samples are not
        called, and their place in a list is taken by an empty tensor `[0]`. Which tasks have samples is asked of the
        ids, which waits for a GPU and breaks a compiled graph, whatever `output` is. Without `output` all results must
        have one shape; `"padded"` pads their last dimension to the largest in the batch.

        Args:
            modules: by the tasks' names; ids count in this order. They are held as they are.
            output: as for the class.
            fill: as for the class.

        Raises:
            TypeError, ValueError: modules that are none, or the same one twice; what the class raises; (from forward)
                results that are no tensor of their samples, or of several shapes; a batch without samples.

        Example:
            >>> left, right = torch.nn.Linear(4, 2), torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
            >>> heads = TaskHeads.from_modules({"left": left, "right": right})
            >>> with tasks(["right", "left"]):
            ...     y = heads(torch.ones(2, 4))
            >>> y.shape
            torch.Size([2, 2])
        """
        if not isinstance(modules, Mapping):
            raise TypeError(f"modules: expected a dict from names to modules, got {type(modules).__name__}")
        for name, module in modules.items():
            _check_head(module, f"modules[{name!r}]")
        if len({id(module) for module in modules.values()}) < len(modules):
            raise ValueError("modules: expected a module for each task, got the same one twice; use copy.deepcopy")
        made = cls.__new__(cls)
        made._set_up(list(modules), output, fill, modules.__getitem__)
        return made

    @classmethod
    def from_layer(cls, layer: nn.Linear, tasks: Tasks, output: Output = None, fill: float = -math.inf) -> TaskHeads:
        """A copy of a plain head for each task.

        Args:
            layer: an `nn.Linear`.
            tasks: the number of tasks (named "0", "1", ...) or their names; ids count in this order.
            output: as for the class.
            fill: as for the class.

        Raises:
            TypeError: another layer, or one with a forward of its own.
            ValueError: a weight that is computed (weight_norm, parametrizations), hooks, or what the class raises.
        """
        check_plain(layer, nn.Linear, "forward")
        made = cls.__new__(cls)
        made._set_up(tasks, output, fill, lambda _: copy.deepcopy(layer))
        return made.train(layer.training)

    # --- tasks

    @property
    def sizes(self) -> dict[str, int]:
        """Columns of each linear head's result, by the task's name; heads of other kinds are left out."""
        return {name: head.out_features for name, head in self.heads.items() if isinstance(head, nn.Linear)}

    def part(self, task: int | str) -> dict[str, Tensor]:
        """The tensors of one task's head, by their names in it: `"weight"`, `"bias"` of a linear one.

        Args:
            task: position or name.

        Raises:
            TypeError, ValueError: no such task.
        """
        head = self.heads[self.task_name(task)]
        saved = head.state_dict().keys()
        tensors = {**dict(head.named_parameters(remove_duplicate=False)), **dict(head.named_buffers())}
        return {key: x for key, x in tensors.items() if key in saved}

    def changed(self, task: int | str) -> bool:
        """True: a head is its task's own."""
        self.task_name(task)
        return True

    def add_task(
        self, name: str, like: str | None = None, *, size: int | None = None, module: nn.Module | None = None
    ) -> None:
        """Adds a task behind the others: its id is the number of tasks before. An optimizer must be told of it.

        Args:
            name: a new name.
            like: the task whose head is copied; None: a new linear head.
            size: columns of a new linear head's result; None: those of the other heads, if all have the same.
            module: the head itself, of any kind.

        Raises:
            TypeError, ValueError: not a name, or one that is taken; no such task to copy; a size or a module that is
                none, or more than one of `like`, `size` and `module`; heads whose kind or size the new one cannot have
                from them.
        """
        self.check_new_task(name, like, size=size, module=module)
        if module is None:
            module = copy.deepcopy(self.heads[like]) if like is not None else self._new_head(size)
        self.heads[name] = module
        self.tasks = (*self.tasks, name)

    def check_new_task(
        self, name: str, like: str | None = None, *, size: int | None = None, module: nn.Module | None = None
    ) -> None:
        super().check_new_task(name, like)
        given = [k for k, v in (("like", like), ("size", size), ("module", module)) if v is not None]
        if len(given) > 1:
            raise ValueError(f"{given[1]}: expected None beside {given[0]}, got both")
        if module is not None:
            _check_head(module, "module")
            if any(module is head for head in self.heads.values()):
                raise ValueError("module: expected a new one, got another task's head; use like=")
        if size is not None:
            _check_size(size, "size")
        if like is None and module is None:
            if len(self.sizes) < len(self.heads):
                raise ValueError(f"module: expected the head of {name!r}, or like=, since not all heads are linear")
            if size is None and len(set(self.sizes.values())) > 1:
                raise ValueError(
                    f"size: expected that of the head of {name!r}, or like=, since the heads' sizes differ"
                )

    def _new_head(self, size: int | None) -> nn.Linear:
        last = self.heads[self.tasks[-1]]
        assert isinstance(last, nn.Linear)
        size = last.out_features if size is None else size
        where = {"device": last.weight.device, "dtype": last.weight.dtype}
        return nn.Linear(last.in_features, size, last.bias is not None, **where).train(self.training)

    def _end(self, name: str) -> None:
        del self.heads[name]

    # --- a part from elsewhere

    def expected_part(self, part: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        expected = _shapes(self.part(self._head_like(part) or self.tasks[0]))
        if len(self.sizes) == len(self.heads) and "weight" in part and part["weight"].dim() == 2:
            # linear heads differ in size
            expected["weight"] = (part["weight"].shape[0], expected["weight"][1])
            if "bias" in expected:
                expected["bias"] = expected["weight"][:1]
        return expected

    def add_part(self, name: str, part: Mapping[str, Tensor]) -> None:
        linear = len(self.sizes) == len(self.heads)
        self.add_task(name, **({"size": part["weight"].shape[0]} if linear else {"like": self._head_like(part)}))
        self.set_part(name, part)

    @torch.no_grad()
    def set_part(self, task: int | str, part: Mapping[str, Tensor]) -> None:
        name = self.task_name(task)
        like = self._head_like(part)
        if _shapes(self.part(name)) != _shapes(part):
            self.heads[name] = self._new_head(len(part["weight"])) if like is None else copy.deepcopy(self.heads[like])
        for key, x in self.part(name).items():
            x.copy_(part[key])

    def _head_like(self, part: Mapping[str, Tensor]) -> str | None:
        """The first task whose head has tensors of these names and shapes."""
        return next((name for name in self.tasks if _shapes(self.part(name)) == _shapes(part)), None)

    def merged(self, task: int | str, memo: dict[int, Any] | None = None) -> nn.Module:
        """The task's head, as a plain module.

        Args:
            task: position or name.
            memo: of `copy.deepcopy`, so that what is shared in a model stays shared.

        Raises:
            TypeError, ValueError: no such task.
        """
        plain = copy.deepcopy(self.heads[self.task_name(task)], {} if memo is None else memo)
        return plain.requires_grad_(True)

    def _read_plain(self, state_dict: dict[str, Any], prefix: str) -> None:
        """A plain head's `state_dict` becomes every task's."""
        begin = f"{prefix}heads."
        plain = {
            key: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix) and not key.startswith(begin)
        }
        for name in self.tasks:
            if any(key.startswith(f"{begin}{name}.") for key in state_dict):
                continue
            for key, x in plain.items():
                state_dict[f"{begin}{name}.{key[len(prefix) :]}"] = x.detach().clone()

    # --- forward

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        linear = self._linear_heads()
        if not linear:
            return self._one_after_another(x)
        plan = self._plan(x, x.dim() - 1)
        sizes = [head.out_features for head in linear]
        if self.output == "list" or (self.output is None and len(set(sizes)) > 1):
            return self._list_of_linear(x, plan, linear)
        most = max(sizes)
        here = presence(plan.offsets)
        present = None if here is None else [t for t, has in enumerate(here) if has]
        rows, absent = _present(linear, present)
        weight = [_padded(w, most, 0) for w, _ in rows]
        weight[0] = self._in_graph(weight[0], absent)
        bias = None if linear[0].bias is None else torch.stack([_padded(b, most, 0) for _, b in rows])
        y = task_linear(x, None, weight, plan, bias=bias)
        if min(sizes) == most:
            return y
        known, ids = known_ids(plan)
        # compared on the device: a tensor made of the sizes would be copied there
        columns = torch.arange(most, device=y.device)
        has = torch.stack([columns < size for size in sizes])[ids] | ~known[..., None]
        has = has.view(*ids.shape, *(1,) * (y.dim() - 1 - ids.dim()), most)
        return torch.where(has, y, self.fill)

    def _linear_heads(self) -> list[nn.Linear]:
        """All heads in the order of the tasks, if one call can serve them; else none."""
        heads = [self.heads[name] for name in self.tasks]
        first = heads[0]
        for head in heads:
            if type(head) is not nn.Linear or type(first) is not nn.Linear or any(getattr(head, h) for h in HOOKS):
                return []
            alike = head.in_features == first.in_features and head.weight.dtype == first.weight.dtype
            if not alike or (head.bias is None) != (first.bias is None):
                return []
        return heads

    def _list_of_linear(self, x: Tensor, plan: TaskPlan, heads: list[nn.Linear]) -> list[Tensor]:
        check_input(x)
        check_leading(plan, x.shape[:-1])
        if x.shape[-1] != heads[0].in_features:
            raise ValueError(f"x: expected shape [N, ..., {heads[0].in_features}], got {list(x.shape)}")
        x = cast_by_autocast(x)
        check_companion(heads[0].weight, "weight", x)
        rows = x.flatten(0, plan.task_ids.dim() - 1)
        at = dict(segments(plan))
        nothing = plan.order[:0]
        found, absent = _present(heads, None if torch.compiler.is_compiling() else at)
        # each result alone may be all that is used of them
        weights = [
            self._in_graph(w, absent if t in at else list(heads[t].parameters())) for t, (w, _) in enumerate(found)
        ]
        return [
            F.linear(rows[at.get(t, nothing)], w.to(x.dtype), None if b is None else b.to(x.dtype))
            for t, (w, (_, b)) in enumerate(zip(weights, found, strict=True))
        ]

    def _one_after_another(self, x: Tensor) -> Tensor | list[Tensor]:
        # how many leading dimensions ids may have is not known of heads of any kind
        plan = self._plan(x, x.dim())
        check_leading(plan, x.shape)
        leading = plan.task_ids.shape
        rows = x.flatten(0, len(leading) - 1)
        found = {t: (at, self.heads[self.tasks[t]](rows[at])) for t, at in segments(plan)}
        for t, (at, y) in found.items():
            if not isinstance(y, Tensor) or y.shape[:1] != at.shape:
                got = f"shape {list(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
                raise ValueError(f"head {self.tasks[t]!r}: expected a tensor of {len(at)} samples, got {got}")
        sizes = self.sizes.values()
        absent = _absent_parameters([self.heads[name] for name in self.tasks], found)
        if self.output == "list" or (self.output is None and len(set(sizes)) > 1):
            return [self._beside(found[t][1], absent) if t in found else x.new_empty(0) for t in range(len(self.tasks))]
        if not found:
            raise ValueError(
                f"x: expected samples, since heads of any kind do not tell their sizes, got {list(x.shape)}"
            )
        parts = [y for _, y in found.values()]
        if self.output == "padded":
            most = max([*sizes, *(y.shape[-1] for y in parts)])
            parts = [F.pad(y, (0, most - y.shape[-1]), value=self.fill) for y in parts]
        for y in parts:
            if y.shape[1:] != parts[0].shape[1:]:
                raise ValueError(
                    f"output: expected 'list', or 'padded' for results that differ in their last dimension, since "
                    f"heads give {list(parts[0].shape[1:])} and {list(y.shape[1:])} for a sample, got {self.output!r}"
                )
        out = parts[0].new_zeros(rows.shape[0], *parts[0].shape[1:])
        if out.is_floating_point():
            out = self._in_graph(out, absent)
        for (at, _), y in zip(found.values(), parts, strict=True):
            out = out.index_add(0, at, y)
        if out.device.type != "cpu":
            known = known_ids(plan)[0].view(-1, *(1,) * (out.dim() - 1))
            out = torch.where(known, out, torch.nan)
        return out.unflatten(0, leading)

    def _beside(self, y: Tensor, absent: Sequence[Tensor]) -> Tensor:
        """`y` with tensors of tasks without samples in its graph, as a sum, since the caller may write into it."""
        if not y.is_floating_point():
            return y
        zero = y.new_full((), -0.0)  # of which the sum with any number is that number
        held = self._in_graph(zero, absent)
        return y if held is zero else y + held

    def extra_repr(self) -> str:
        text = self._repr_of_tasks()
        return text if self.output is None else f"{text}, output={self.output!r}"


def _shapes(part: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(x.shape) for key, x in part.items()}


def _check_size(size: Any, argument: str) -> None:
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"{argument}: expected an int, got {type(size).__name__}")
    if size < 1:
        raise ValueError(f"{argument}: expected at least 1, got {size}")


def _check_head(module: Any, argument: str) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{argument}: expected a module, got {type(module).__name__}")
    if any(isinstance(child, TaskModule) for child in module.modules()):
        raise ValueError(f"{argument}: expected a plain module, got one with layers that differ by task")


def _present(
    heads: Sequence[nn.Linear], present: Collection[int] | None
) -> tuple[list[tuple[Tensor, Tensor | None]], list[Tensor]]:
    """Weight and bias of each head, those of tasks without samples detached; and what was detached.

    `present`: the tasks that have samples; None: nobody knows.
    """
    rows = [(head.weight, head.bias) for head in heads]
    if present is None:
        return rows, []
    absent = _absent_parameters(heads, present)
    return [
        (w, b) if t in present else (w.detach(), None if b is None else b.detach()) for t, (w, b) in enumerate(rows)
    ], absent


def _absent_parameters(heads: Sequence[nn.Module], present: Collection[int]) -> list[Tensor]:
    return [p for t, head in enumerate(heads) if t not in present for p in head.parameters()]


def _padded(x: Tensor, size: int, value: float) -> Tensor:
    """With rows behind x, up to `size` of them."""
    missing = size - x.shape[0]
    return F.pad(x, [0, 0] * (x.dim() - 1) + [0, missing], value=value) if missing else x
