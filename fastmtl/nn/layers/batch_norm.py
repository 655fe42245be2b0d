"""Batch norm of which each task has its statistics, its scale and its shift."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.nn.containers import TaskBuffers, TaskParameters, Tasks, present_rows
from fastmtl.nn.layers.weights import check_plain
from fastmtl.nn.module import TaskModule, as_parameter
from fastmtl.ops import task_batch_norm

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class TaskBatchNorm2d(TaskModule):
    """`nn.BatchNorm2d` by task: sample b is normalised by the statistics of its task, as `fastmtl.nn.tasks` tells it.

    In training these are the mean and the variance of the task's samples in the batch, so that a mixed batch gives what
    a batch for each task would give; in evaluation, or with `track_running_stats=False` never, the task's running ones.

    Args:
        num_features: C.
        tasks: the number of tasks (named "0", "1", ...) or their names; ids count in this order.
        eps: as in `nn.BatchNorm2d`.
        momentum: as in `nn.BatchNorm2d`; None: the average of all batches in which the task had samples.
        affine: whether each task has a scale `weight[t]` and a shift `bias[t]`.
        track_running_stats: whether each task has a `running_mean[t]`, a `running_var[t]` and a
            `num_batches_tracked[t]`.
        device: of all tensors.
        dtype: of all tensors.

    `forward(x)` takes `[N, C, H, W]` and needs ids `[N]`. A task without samples keeps its statistics. A `state_dict`
    of the plain layer gives every task its values.

    Raises:
        TypeError, ValueError: tasks that are none; a name with a dot or one that `nn.ParameterDict` uses; (from
            forward) another shape; on the CPU, in training, a task with a single value per channel.
        RuntimeError: (from forward) outside `fastmtl.nn.tasks`.

    Source: Bilen and Vedaldi 2017 (Universal representations), domain-specific batch norm; TAPS trains batch norms by
    task, too.

    Example:
        >>> norm = TaskBatchNorm2d(3, ["left", "right"])
        >>> with tasks(torch.tensor([1, 0])):
        ...     y = norm(torch.randn(2, 3, 5, 5))
        >>> y.shape, [int(norm.num_batches_tracked[name]) for name in norm.tasks]
        (torch.Size([2, 3, 5, 5]), [1, 1])
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
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(tasks)
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        # what a new task begins with: the values of the plain layer
        ones = torch.ones(num_features, device=device, dtype=dtype)
        first = {"weight": ones, "bias": torch.zeros_like(ones)} if affine else {}
        if track_running_stats:
            count = torch.zeros((), dtype=torch.int64, device=device)
            first |= {"running_mean": torch.zeros_like(ones), "running_var": ones.clone(), "num_batches_tracked": count}
        for name, x in first.items():
            self.register_buffer(f"_{name}", x, persistent=False)
        for name in ("weight", "bias"):
            self.register_module(name, TaskParameters() if affine else None)
        for name in _STATISTICS:
            self.register_module(name, TaskBuffers() if track_running_stats else None)
        self._start_tasks()

    @classmethod
    def from_layer(cls, layer: nn.BatchNorm2d, tasks: Tasks) -> TaskBatchNorm2d:
        """The same layer, with a copy of its statistics, scale and shift for each task.

        Args:
            layer: an `nn.BatchNorm2d`.
            tasks: as for the class.

        Raises:
            TypeError: another layer, or one with a forward of its own.
            ValueError: neither statistics nor a scale to have by task; hooks, or what the class raises.
        """
        check_plain(layer, nn.BatchNorm2d, "forward", weight=False)
        options = layer.eps, layer.momentum, layer.affine, layer.track_running_stats
        made = cls(layer.num_features, tasks, *options, device="meta")
        for name, held in made.containers().items():
            x = getattr(layer, name)
            setattr(made, f"_{name}", x.detach().clone())
            for task in made.tasks:
                made._fill(task, name, held)
        return made.train(layer.training)

    def _start(self, name: str) -> None:
        for child, held in self.containers().items():
            self._fill(name, child, held)

    def _fill(self, task: str, child: str, held: TaskParameters | TaskBuffers) -> None:
        first = getattr(self, f"_{child}").detach().clone()
        held[task] = nn.Parameter(first) if isinstance(held, TaskParameters) else first

    def _read_plain(self, state_dict: dict[str, Any], prefix: str) -> None:
        for child in self.containers():
            plain, first = state_dict.get(prefix + child), getattr(self, f"_{child}")
            if plain is not None and plain.shape == first.shape:
                with torch.no_grad():
                    first.copy_(plain)
        super()._read_plain(state_dict, prefix)

    @torch.no_grad()
    def changed(self, task: int | str) -> bool:
        part = self.part(task)
        return any(
            not torch.equal(x.to(getattr(self, f"_{name}").dtype), getattr(self, f"_{name}"))
            for name, x in part.items()
            if name != "num_batches_tracked"
        )

    def added(self, task: int | str) -> int:
        if not self.changed(task):
            return 0
        return sum(x.numel() for name, x in self.part(task).items() if name != "num_batches_tracked")

    def plain_size(self) -> int:
        return 2 * self.num_features if self.affine else 0

    def merged(self, task: int | str, memo: dict[int, Any] | None = None) -> nn.BatchNorm2d:
        options = self.eps, self.momentum, self.affine, self.track_running_stats
        plain = nn.BatchNorm2d(self.num_features, *options, device="meta")
        for name, x in self.part(task).items():
            setattr(plain, name, as_parameter(x) if name in ("weight", "bias") else x.detach().clone())
        return plain.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.num_features:
            raise ValueError(f"x: expected shape [N, {self.num_features}, H, W], got {list(x.shape)}")
        plan = self._plan(x)
        training = self.training or self.running_mean is None
        options: dict[str, Any] = {"training": training, "momentum": self.momentum, "eps": self.eps}
        given: dict[str, Any] = {}
        if not (training or torch.is_grad_enabled() or torch.compiler.is_compiling()) and x.device.type == "cpu":
            # one table of each kind: the op would look at each of 4 T tensors, for longer than a small layer takes
            for name in ("weight", "bias", "running_mean", "running_var"):
                held = getattr(self, name)
                if held is not None:
                    given[name] = torch.stack(held.of_tasks(self.tasks))
            return task_batch_norm(x, plan, **given, **options)
        if self.weight is not None and self.bias is not None:
            given["weight"] = present_rows(self.weight, self.tasks, plan.offsets)
            given["bias"] = present_rows(self.bias, self.tasks, plan.offsets)
        if self.running_mean is not None:
            for name in _STATISTICS:
                held = getattr(self, name)
                given[name] = held.of_tasks(self.tasks)
        return task_batch_norm(x, plan, **given, **options)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, {self._repr_of_tasks()}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, track_running_stats={self.track_running_stats}"
        )
