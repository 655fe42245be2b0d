"""A scale and a shift of each channel, by task: the smallest model patch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.core.task_weights import TaskPlan
from fastmtl.nn.containers import TaskParameters, Tasks
from fastmtl.nn.module import TaskModule
from fastmtl.ops import task_scale_shift
from fastmtl.ops.task_weights.arguments import check_leading


class TaskScaleShift(TaskModule):
    """`y[b] = x[b] * scale[t] + shift[t]` for each channel, t the task of sample b as `fastmtl.nn.tasks` tells it.

    Args:
        num_channels: C.
        tasks: the number of tasks (named "0", "1", ...) or their names; ids count in this order.
        device: of all parameters.
        dtype: of all parameters.

    `forward(x)` takes `[N, C, ...]` and needs ids `[N]`. Parameters: `scale` (ones at first) and `shift` (zeros) are
    dictionaries of one `[C]` parameter per task, which gradient surgery leaves alone.

    Raises:
        TypeError, ValueError: tasks that are none; a name with a dot or one that `nn.ParameterDict` uses.
        RuntimeError: (from forward) outside `fastmtl.nn.tasks`.

    Source: Mudrakarta et al. 2019 (K for the price of 1), model patches of scale and bias.

    Example:
        >>> patch = TaskScaleShift(3, ["left", "right"])
        >>> with tasks(torch.tensor([1, 0])):
        ...     y = patch(torch.ones(2, 3, 5, 5))
        >>> y.shape
        torch.Size([2, 3, 5, 5])
    """

    def __init__(
        self, num_channels: int, tasks: Tasks, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(tasks)
        if isinstance(num_channels, bool) or not isinstance(num_channels, int):
            raise TypeError(f"num_channels: expected an int, got {type(num_channels).__name__}")
        if num_channels < 1:
            raise ValueError(f"num_channels: expected at least 1, got {num_channels}")
        self.num_channels = num_channels
        self._like = {"device": device, "dtype": dtype}
        self.scale, self.shift = TaskParameters(), TaskParameters()
        self._start_tasks()

    def _start(self, name: str) -> None:
        like = next(iter(self.scale.values()), None)
        where = self._like if like is None else {"device": like.device, "dtype": like.dtype}
        self.scale[name] = nn.Parameter(torch.ones(self.num_channels, **where))
        self.shift[name] = nn.Parameter(torch.zeros(self.num_channels, **where))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Scales of 1 and shifts of 0."""
        for name in self.tasks:
            self.scale[name].fill_(1)
            self.shift[name].zero_()

    @torch.no_grad()
    def changed(self, task: int | str) -> bool:
        name = self.task_name(task)
        return bool((self.scale[name] != 1).any() or (self.shift[name] != 0).any())

    def merged(self, task: int | str, memo: dict[int, Any] | None = None) -> nn.Module:
        """`nn.Identity` for a task that is unchanged.

        Raises:
            ValueError: another task: plain torch has no layer that scales and shifts channels and does nothing else.
        """
        name = self.task_name(task)
        if self.changed(name):
            raise ValueError(
                f"task {name!r}: expected a layer that plain torch has, got a TaskScaleShift; use a norm by task, as "
                "convert(kind='patch') makes it, for a model that is to be merged"
            )
        return nn.Identity().train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        plan = self._plan(x)
        scale = self._stacked(self.scale, plan)
        shift = self._stacked(self.shift, plan)
        return task_scale_shift(x, scale, shift, plan)

    def extra_repr(self) -> str:
        return f"{self.num_channels}, {self._repr_of_tasks()}"


def scale_shift_of_last(x: Tensor, scale: Tensor, shift: Tensor, plan: TaskPlan) -> Tensor:
    """`task_scale_shift` of the last dimensions, as many as have C elements; ids have the shape of leading ones.

    Args:
        x: `[N, ..., C]`.
        scale: `[T, C]`, as is `shift`.
        shift: see `scale`.
        plan: of ids `[N]` or `[N, L]`.
    """
    check_leading(plan, x.shape)
    channels, ids = scale.shape[1], plan.task_ids
    rows = x.reshape(ids.numel(), math.prod(x.shape[ids.dim() :]) // channels, channels).movedim(-1, 1)
    return (
        task_scale_shift(rows, scale, shift, plan if ids.dim() == 1 else ids.reshape(-1)).movedim(1, -1).view(x.shape)
    )
