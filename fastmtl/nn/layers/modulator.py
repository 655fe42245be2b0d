"""A frozen layer behind which each task mixes the channels in its own way: reparameterised convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.core.task_weights import TaskPlan
from fastmtl.nn.containers import TaskParameters, Tasks, segments
from fastmtl.nn.layers.around import AroundPlain
from fastmtl.ops import task_conv2d, task_linear


class TaskModulator(AroundPlain):
    """`y = M_t (W x) + b`: a filter bank that all tasks share, and a 1 x 1 modulator of each task behind it.

    The filter bank and the bias are frozen, so that a new task leaves the others as they are. A modulator is
    weight-normalised, `M_t = g_t v_t / |v_t|` with a norm for each row, and the identity at first: the layer then
    computes what the plain one does.

    Args:
        layer: an `nn.Conv2d` that pads with zeros, an `nn.Linear`, or a `Conv1D` of `transformers`, whose very
            parameters it holds. They are frozen (`requires_grad_(False)`), unless `joint`.
        tasks: the number of tasks (named "0", "1", ...) or their names; ids count in this order.
        joint: whether the filter bank and the bias are trained, too.

    `forward(x)` takes what the plain layer takes; the ids are `[N]`, for linear layers also the shape of more leading
    dimensions. Parameters: `weight` and `bias` as in the plain layer; `v` (`[Cout, Cout]`) and `g` (`[Cout]`) are
    dictionaries of one parameter per task, which gradient surgery leaves alone. A row of `v` that is zero has no
    direction, and makes its channel NaN.

    Raises:
        TypeError: another layer, or one with a forward of its own.
        ValueError: another `padding_mode`; a weight that is computed (weight_norm, parametrizations); hooks; tasks that
            are none; a name with a dot or one that `nn.ParameterDict` uses.
        RuntimeError: (from forward) outside `fastmtl.nn.tasks`.

    Source: Kanakis et al. 2020 (Reparameterizing convolutions for incremental multi-task learning without task
    interference).

    Example:
        >>> layer = TaskModulator(torch.nn.Conv2d(3, 8, 3, padding=1), ["depth", "normals"])
        >>> with tasks(torch.tensor([1, 0])):
        ...     y = layer(torch.ones(2, 3, 5, 5))
        >>> y.shape, layer.weight.requires_grad
        (torch.Size([2, 8, 5, 5]), False)
    """

    def __init__(self, layer: nn.Module, tasks: Tasks, *, joint: bool = False) -> None:
        super().__init__(layer, tasks)
        if not isinstance(joint, bool):
            raise TypeError(f"joint: expected a bool, got {type(joint).__name__}")
        if not joint:
            for p in (self.weight, self.bias):
                if p is not None:
                    p.requires_grad_(False)
        self.v, self.g = TaskParameters(), TaskParameters()
        self._start_tasks()

    def _start(self, name: str) -> None:
        where = {"device": self.weight.device, "dtype": self.weight.dtype}
        size = self._sizes()[0]
        self.v[name] = nn.Parameter(torch.eye(size, **where))
        self.g[name] = nn.Parameter(torch.ones(size, **where))

    def _reset_task(self, name: str) -> None:
        nn.init.eye_(self.v[name])
        self.g[name].fill_(1)

    def modulator(self, task: int | str) -> Tensor:
        """The task's `[Cout, Cout]` matrix `M_t`, differentiable.

        Args:
            task: position or name.

        Raises:
            TypeError, ValueError: no such task.
        """
        name = self.task_name(task)
        return _normalised(self.v[name], self.g[name])

    def effective_weight(self, task: int | str) -> Tensor:
        """`M_t W`, differentiable: `[Cout, Cin, kh, kw]` also of a grouped convolution, since M joins the groups.

        Args:
            task: position or name.

        Raises:
            TypeError, ValueError: no such task.
        """
        mixing, w = self.modulator(task), self.weight
        if self.kind == "Conv1D":
            return w @ mixing.t()
        if self.kind == "Conv2d" and self.groups > 1:
            blocks = w.unflatten(0, (self.groups, -1))
            w = w.new_zeros(self.groups, w.shape[0] // self.groups, self.groups, *w.shape[1:])
            each = torch.arange(self.groups, device=w.device)
            w = w.index_put((each[:, None], torch.arange(w.shape[1], device=w.device), each[:, None]), blocks)
            w = w.flatten(2, 3).flatten(0, 1)
        return (mixing @ w.flatten(1)).view(w.shape)

    @torch.no_grad()
    def changed(self, task: int | str) -> bool:
        """Whether the task's modulator is another than the identity. Waits for the device."""
        mixing = self.modulator(task)
        return not torch.equal(mixing, torch.eye(len(mixing), dtype=mixing.dtype, device=mixing.device))

    def kept(self, task: int | str) -> dict[str, Tensor]:
        # g goes into the matrix
        return {"v": self.v[self.task_name(task)]} if self.changed(task) else {}

    def merged(self, task: int | str, memo: dict[int, Any] | None = None) -> nn.Module:
        """The plain layer with the weight `M_t W`; of a grouped convolution one without groups, if the task is changed.

        Args:
            task: position or name.
            memo: of `copy.deepcopy`, so that what is shared in a model stays shared.

        Raises:
            TypeError, ValueError: no such task.
        """
        name = self.task_name(task)
        if not self.changed(name):
            return self._merged_layer(None, memo)
        return self._merged_layer(self.effective_weight(name), memo, groups=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self._checked(x)
        plan = self._plan(x, self._leading(x))
        y, mixing = self._through_plain(x), self._modulators(plan)
        if self.kind == "Conv2d":
            mixing = mixing[..., None, None] if isinstance(mixing, Tensor) else [m[..., None, None] for m in mixing]
            return task_conv2d(y, None, mixing, plan, bias=self.bias)
        return task_linear(y, None, mixing, plan, bias=self.bias)

    def _modulators(self, plan: TaskPlan) -> Tensor | list[Tensor]:
        """Those of all tasks; where the host knows the samples, none is computed for a task without."""
        v, g = (held.of_tasks(self.tasks) for held in (self.v, self.g))
        if plan.offsets.device.type == "cpu" and not torch.compiler.is_compiling():
            present = {t for t, _ in segments(plan)}
            return [
                _normalised(v[t], g[t]) if t in present else self._in_graph(v[t].detach(), (v[t], g[t]))
                for t in range(len(v))
            ]
        return _normalised(torch.stack(v), torch.stack(g))

    def extra_repr(self) -> str:
        return self._repr_of_plain()


def _normalised(v: Tensor, g: Tensor) -> Tensor:
    """`g v / |v|`, a norm for each row."""
    promoted = torch.promote_types(v.dtype, torch.float32)
    size = torch.linalg.vector_norm(v, dim=-1, dtype=promoted)
    return (v.to(promoted) * (g.to(promoted) / size)[..., None]).to(v.dtype)
