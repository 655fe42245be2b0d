"""Batch norm of which each task has statistics, scale and shift of its own, on batches that mix tasks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.nn.containers import TaskBuffers, TaskParameters, Tasks
from fastmtl.nn.layers.weights import check_plain
from fastmtl.nn.module import TaskModule, as_parameter
from fastmtl.ops import task_batch_norm

# what a plain layer has as parameters and as buffers, and tasks have under the same names
_PARAMETERS = ("weight", "bias")
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class TaskBatchNorm2d(TaskModule):
    """`nn.BatchNorm2d` in which each task's samples are normalised on their own, t as `fastmtl.nn.tasks` tells it.

    In training sample b is normalised by the mean and variance of the samples of its task in the batch, and the running
    statistics of the tasks that are present move; in eval mode by its task's running statistics. It computes what one
    `nn.BatchNorm2d` per task would, each on its task's samples.

    Args:
        num_features: C.
        tasks: the number of tasks (named "0", "1", ...) or their names; ids count in this order.
        eps: as in `nn.BatchNorm2d`.
        momentum: as in `nn.BatchNorm2d`; None: the average of all batches in which a task had samples.
        affine: whether each task has a `weight` (ones at first) and a `bias` (zeros).
        track_running_stats: as in `nn.BatchNorm2d`; False: the batch's statistics in eval mode too.
        bias: whether an affine norm has the `bias`.
        device: of all parameters and buffers.
        dtype: of all parameters, and of the running statistics.

    `forward(x)` takes `[N, C, H, W]` and needs ids `[N]`. `weight` and `bias` are dictionaries of one `[C]` parameter
    per task, which gradient surgery leaves alone; `running_mean`, `running_var` and `num_batches_tracked` of one buffer
    per task. A `state_dict` of the plain layer gives every task its values.

    Raises:
        TypeError, ValueError: tasks that are none; a name with a dot or one that `nn.ParameterDict` uses; no number of
            features.
        RuntimeError: (from forward) outside `fastmtl.nn.tasks`.
        ValueError: (from forward) another shape; on the CPU, in training, a task with a single value per channel. On a
            GPU its result is NaN, see `fastmtl.ops.task_batch_norm`.

    Source: Bilen and Vedaldi 2017 (Universal representations), domain-specific batch norm.

    Example:
        >>> norm = TaskBatchNorm2d(3, ["photo", "sketch"])
        >>> with tasks(torch.tensor([1, 0, 1])):
        ...     y = norm(torch.randn(3, 3, 4, 4))
        >>> norm.num_batches_tracked["sketch"]
        tensor(1)
    """

    weight: TaskParameters | None
    bias: TaskParameters | None
    running_mean: TaskBuffers | None
    running_var: TaskBuffers | None
    num_batches_tracked: TaskBuffers | None

    def __init__(
        self,
        num_features: int,
        tasks: Tasks,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(tasks)
        if isinstance(num_features, bool) or not isinstance(num_features, int):
            raise TypeError(f"num_features: expected an int, got {type(num_features).__name__}")
        if num_features < 1:
            raise ValueError(f"num_features: expected at least 1, got {num_features}")
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        # what a new task begins with: the values of the plain layer
        ones = torch.ones(num_features, device=device, dtype=dtype)
        first = (ones, torch.zeros_like(ones), torch.zeros_like(ones), ones.clone())
        for name, value in zip((*_PARAMETERS, *_BUFFERS), (*first, torch.tensor(0, device=device)), strict=True):
            self.register_buffer(f"_first_{name}", value, persistent=False)
        self.register_module("weight", TaskParameters() if affine else None)
        self.register_module("bias", TaskParameters() if affine and bias else None)
        for name in _BUFFERS:
            self.register_module(name, TaskBuffers() if track_running_stats else None)
        self._start_tasks()

    def _start(self, name: str) -> None:
        for child, held in self.containers().items():
            value = self._first(child).detach().clone()
            held[name] = nn.Parameter(value) if isinstance(held, TaskParameters) else value

    def _first(self, child: str) -> Tensor:
        value = getattr(self, f"_first_{child}")
        assert isinstance(value, Tensor)
        return value

    @classmethod
    def from_layer(cls, layer: nn.BatchNorm2d, tasks: Tasks) -> TaskBatchNorm2d:
        """The same layer, with a copy of its statistics, scale and shift for each task.

        Args:
            layer: an `nn.BatchNorm2d`.
            tasks: as for the class.

        Raises:
            TypeError: another layer, or one with a forward of its own.
            ValueError: a weight that is computed, hooks, or what the class raises.
        """
        check_plain(layer, nn.BatchNorm2d, "forward", "_check_input_dim", weight=getattr(layer, "affine", False))
        options = layer.eps, layer.momentum, layer.affine, layer.track_running_stats
        made = cls(layer.num_features, tasks, *options, bias=layer.bias is not None, device="meta")
        held = {**layer._parameters, **layer._buffers}
        like = next((x for x in held.values() if x is not None), torch.empty(0))
        made.to_empty(device=like.device)
        for child in (*_PARAMETERS, *_BUFFERS):
            value, first = held.get(child), made._first(child)
            if value is None:
                value = torch.ones_like(first) if child in ("weight", "running_var") else torch.zeros_like(first)
            setattr(made, f"_first_{child}", value.detach().clone())
        for name in made.tasks:
            made._start(name)
        return made.train(layer.training)

    def reset_running_stats(self) -> None:
        """Means of zero, variances of one and no batches seen, for every task."""
        for child in _BUFFERS:
            held = getattr(self, child)
            for name in self.tasks if held is not None else ():
                held[name].fill_(1 if child == "running_var" else 0)

    def reset_parameters(self) -> None:
        """As `reset_running_stats`, with scales of one and shifts of zero."""
        self.reset_running_stats()
        with torch.no_grad():
            for child in _PARAMETERS:
                held = getattr(self, child)
                for name in self.tasks if held is not None else ():
                    held[name].fill_(1 if child == "weight" else 0)

    def _read_plain(self, state_dict: dict[str, Any], prefix: str) -> None:
        for child in self.containers():
            plain, first = state_dict.get(prefix + child), self._first(child)
            if plain is not None and plain.shape == first.shape:
                with torch.no_grad():
                    first.copy_(plain)
        super()._read_plain(state_dict, prefix)

    @torch.no_grad()
    def changed(self, task: int | str) -> bool:
        name = self.task_name(task)
        return any(
            child != "num_batches_tracked"
            and not torch.equal(held[name].to(self._first(child).dtype), self._first(child))
            for child, held in self.containers().items()
        )

    def kept(self, task: int | str) -> dict[str, Tensor]:
        return {child: x for child, x in super().kept(task).items() if child != "num_batches_tracked"}

    def plain_size(self) -> int:
        return sum(self._first(child).numel() for child in self.containers() if child in _PARAMETERS)

    def merged(self, task: int | str, memo: dict[int, Any] | None = None) -> nn.BatchNorm2d:
        name = self.task_name(task)
        options = self.eps, self.momentum, self.affine, self.track_running_stats
        plain = nn.BatchNorm2d(self.num_features, *options, device="meta")
        if self.bias is None:
            plain.register_parameter("bias", None)
        for child, held in self.containers().items():
            own = as_parameter(held[name]) if isinstance(held, TaskParameters) else held[name].detach().clone()
            setattr(plain, child, own)
        return plain.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.num_features:
            raise ValueError(f"x: expected shape [N, {self.num_features}, H, W], got {list(x.shape)}")
        plan = self._plan(x)
        training = self.training or not self.track_running_stats
        options: dict[str, Any] = {"training": training, "momentum": self.momentum, "eps": self.eps}
        names = ("weight", "bias", "running_mean", "running_var")
        given: dict[str, Any] = {name: self._in_order(getattr(self, name)) for name in names}
        if training:
            return task_batch_norm(
                x, plan, **given, num_batches_tracked=self._in_order(self.num_batches_tracked), **options
            )
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()) and x.device.type == "cpu":
            # one table of each kind: the op would look at each of 4 T tensors, for longer than a small layer takes
            given = {name: None if held is None else torch.stack(held) for name, held in given.items()}
        return task_batch_norm(x, plan, **given, **options)

    def _in_order(self, held: TaskParameters | TaskBuffers | None) -> list[Tensor] | None:
        return None if held is None else held.of_tasks(self.tasks)

    def extra_repr(self) -> str:
        text = f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
        return text + f"track_running_stats={self.track_running_stats}, {self._repr_of_tasks()}"
