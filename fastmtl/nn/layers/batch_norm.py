"""Batch norm of which each task has statistics, scale and shift of its own, on batches that mix tasks."""

from __future__ import annotations

from math import inf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmtl.core.tensors import FLOAT_DTYPES
from fastmtl.nn.containers import TaskBuffers, TaskParameters, Tasks
from fastmtl.nn.context import present_tasks
from fastmtl.nn.layers.norm import TaskNorm
from fastmtl.nn.layers.weights import check_plain
from fastmtl.ops import task_batch_norm
from fastmtl.ops.task_weights.task_batch_norm import task_batch_norm_given

# of a layer without statistics or samples so far
_FRESH = {"running_mean": 0, "running_var": 1, "num_batches_tracked": 0}


class TaskBatchNorm2d(TaskNorm):
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
        if isinstance(num_features, bool) or not isinstance(num_features, int):
            raise TypeError(f"num_features: expected an int, got {type(num_features).__name__}")
        if num_features < 1:
            raise ValueError(f"num_features: expected at least 1, got {num_features}")
        ones = torch.ones(num_features, device=device, dtype=dtype)
        parameters = {"weight": ones if affine else None, "bias": torch.zeros_like(ones) if affine and bias else None}
        buffers = {}
        if track_running_stats:
            count = torch.zeros((), dtype=torch.int64, device=device)
            buffers = {
                "running_mean": torch.zeros_like(ones), "running_var": ones.clone(), "num_batches_tracked": count
            }  # fmt: skip
        super().__init__(tasks, parameters, buffers)
        for name in () if track_running_stats else _FRESH:
            self.register_module(name, None)
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats

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
        return made._take(layer)

    def reset_running_stats(self) -> None:
        """Means of zero, variances of one and no batches seen, for every task and those to come."""
        self._refill(_FRESH)

    def reset_parameters(self) -> None:
        """As `reset_running_stats`, with scales of one and shifts of zero."""
        self._refill({**_FRESH, "weight": 1, "bias": 0})

    def merged(self, task: int | str, memo: dict[int, Any] | None = None) -> nn.BatchNorm2d:
        options = self.eps, self.momentum, self.affine, self.track_running_stats
        plain = nn.BatchNorm2d(self.num_features, *options, device="meta")
        if self.bias is None:
            plain.register_parameter("bias", None)
        return self._merge_into(plain, task)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.num_features:
            raise ValueError(f"x: expected shape [N, {self.num_features}, H, W], got {list(x.shape)}")
        training = self.training or not self.track_running_stats
        if not (training or torch.is_grad_enabled() or torch.compiler.is_compiling()):
            y = self._evaluated(x)
            if y is not None:
                return y
        plan = self._plan(x)
        options: dict[str, Any] = {"training": training, "momentum": self.momentum, "eps": self.eps}
        given: dict[str, Any] = {name: self._in_order(getattr(self, name)) for name in ("running_mean", "running_var")}
        given["weight"], given["bias"] = self._listed(plan, self.weight, self.bias)
        if training:
            return task_batch_norm(
                x, plan, **given, num_batches_tracked=self._in_order(self.num_batches_tracked), **options
            )
        return task_batch_norm(x, plan, **given, **options)

    def _evaluated(self, x: Tensor) -> Tensor | None:
        """In eval mode, where nothing asks for gradients: without the op, if a shorter way serves; else None."""
        eps = self.eps
        if x.dtype not in FLOAT_DTYPES or x.layout is not torch.strided or type(eps) is not float or not 0 <= eps < inf:
            # the op says more
            return None
        self._see_static_graph()
        present = present_tasks(self.tasks, x, 1)
        if present is None:
            return None
        positions, plan = present
        if len(positions) == 1 or plan is None:
            return self._of_one_task(x, self.tasks[positions[0]])
        held = self._modules
        of = [None if (child := held[name]) is None else child._parameters for name in ("weight", "bias")]
        means, variances = held["running_mean"]._buffers, held["running_var"]._buffers
        return task_batch_norm_given(x, plan, self.tasks, *of, means, variances, eps)

    def _of_one_task(self, x: Tensor, task: str) -> Tensor | None:
        """torch's batch norm, if it takes these dtypes as the op does."""
        # past nn.Module's getattr, which is slow beside a small layer
        held = self._modules
        mean, var = held["running_mean"]._buffers.get(task), held["running_var"]._buffers.get(task)
        weights, biases = held["weight"], held["bias"]
        weight = None if weights is None else weights._parameters.get(task)
        bias = None if biases is None else biases._parameters.get(task)
        if mean is None or var is None or (weight is None) != (weights is None) or (bias is None) != (biases is None):
            # one that is parametrised is computed
            return None
        dtype = mean.dtype
        if dtype != x.dtype and not (dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)):
            return None
        for x_of_task in (mean, var, weight, bias):
            if x_of_task is not None and (x_of_task.dtype != dtype or x_of_task.device != x.device):
                return None
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, self.eps)

    def _in_order(self, held: TaskBuffers | None) -> list[Tensor] | None:
        return None if held is None else held.of_tasks(self.tasks)

    def extra_repr(self) -> str:
        text = f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
        return text + f"track_running_stats={self.track_running_stats}, {self._repr_of_tasks()}"
