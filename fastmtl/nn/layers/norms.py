"""Layer norm and RMS norm whose scale and shift each task has for itself: model patches of a transformer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmtl.core.task_weights import TaskPlan
from fastmtl.nn.containers import TaskParameters, Tasks, present_rows
from fastmtl.nn.layers.weights import check_plain
from fastmtl.nn.module import TaskModule, as_parameter
from fastmtl.ops import task_scale_shift


class _TaskNorm(TaskModule):
    """Scale and shift of the last dimensions, one of each per task, behind a norm without them."""

    weight: TaskParameters | None
    bias: TaskParameters | None

    def __init__(
        self, shape: int | list[int] | tuple[int, ...] | torch.Size, tasks: Tasks, eps: float | None, affine: bool,
        bias: bool, device: Any, dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        super().__init__(tasks)
        self.normalized_shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.eps, self.elementwise_affine = eps, affine
        # what a new task begins with: the values of the plain layer
        self.register_buffer("_scale", torch.ones(self.normalized_shape, device=device, dtype=dtype), persistent=False)
        self.register_buffer("_shift", torch.zeros_like(self._scale), persistent=False)
        self.register_module("weight", TaskParameters() if affine else None)
        self.register_module("bias", TaskParameters() if affine and bias else None)
        self._start_tasks()

    def _start(self, name: str) -> None:
        for held, value in ((self.weight, self._scale), (self.bias, self._shift)):
            if held is not None:
                held[name] = nn.Parameter(value.detach().clone())

    def _take(self, layer: nn.Module) -> Any:
        for buffer, param in (("_scale", layer._parameters["weight"]), ("_shift", layer._parameters.get("bias"))):
            if param is not None:
                setattr(self, buffer, param.detach().clone())
        for name in self.tasks:
            self._start(name)
        return self.train(layer.training)

    def _read_plain(self, state_dict: dict[str, Any], prefix: str) -> None:
        for child, buffer in (("weight", self._scale), ("bias", self._shift)):
            plain = state_dict.get(prefix + child)
            if plain is not None and plain.shape == buffer.shape:
                with torch.no_grad():
                    buffer.copy_(plain)
        super()._read_plain(state_dict, prefix)

    @torch.no_grad()
    def changed(self, task: int | str) -> bool:
        name = self.task_name(task)
        return any(
            held is not None and not torch.equal(held[name].to(value.dtype), value)
            for held, value in ((self.weight, self._scale), (self.bias, self._shift))
        )

    def _merge_into(self, plain: nn.Module, task: int | str) -> Any:
        name = self.task_name(task)
        for child, held in (("weight", self.weight), ("bias", self.bias)):
            if held is not None:
                setattr(plain, child, as_parameter(held[name]))
        return plain.train(self.training)

    def _patched(self, y: Tensor, plan: TaskPlan) -> Tensor:
        """Scale and shift by task; the ids have the shape of leading dimensions of y."""
        if self.weight is None:
            return y
        channels = self._scale.numel()
        scale = torch.stack(present_rows(self.weight, self.tasks, plan.offsets)).view(-1, channels)
        if self.bias is None:
            shift = torch.zeros_like(scale)
        else:
            shift = torch.stack(present_rows(self.bias, self.tasks, plan.offsets)).view(-1, channels)
        if plan.task_ids.dim() == 1:
            rows = y.reshape(y.shape[0], -1, channels).movedim(-1, 1)
            return task_scale_shift(rows, scale, shift, plan).movedim(1, -1).reshape(y.shape)
        rows = y.reshape(plan.task_ids.numel(), -1, channels).movedim(-1, 1)
        return task_scale_shift(rows, scale, shift, plan.task_ids.reshape(-1)).movedim(1, -1).reshape(y.shape)

    def _leading(self, x: Tensor) -> int:
        return max(1, x.dim() - len(self.normalized_shape))

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, {self._repr_of_tasks()}"


class TaskLayerNorm(_TaskNorm):
    """`nn.LayerNorm` in which sample b is scaled and shifted by its task's own `weight[t]` and `bias[t]`.

    Args:
        normalized_shape: of the last dimensions, as in `nn.LayerNorm`.
        tasks: the number of tasks (named "0", "1", ...) or their names; ids count in this order.
        eps: as in `nn.LayerNorm`.
        elementwise_affine: as in `nn.LayerNorm`; False: no task has anything of its own.
        bias: as in `nn.LayerNorm`.
        device: of all parameters.
        dtype: of all parameters.

    `forward(x)` takes `[N, ..., *normalized_shape]`; the ids have the shape of one or more leading dimensions. A
    `state_dict` of the plain layer gives every task its values.

    Raises:
        TypeError, ValueError: tasks that are none; a name with a dot or one that `nn.ParameterDict` uses.
        RuntimeError: (from forward) outside `fastmtl.nn.tasks`.

    Source: Mudrakarta et al. 2019 (K for the price of 1), model patches of scale and bias.

    Example:
        >>> norm = TaskLayerNorm(4, ["left", "right"])
        >>> with tasks(torch.tensor([1, 0])):
        ...     y = norm(torch.randn(2, 3, 4))
        >>> y.shape
        torch.Size([2, 3, 4])
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | tuple[int, ...] | torch.Size,
        tasks: Tasks,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, tasks, eps, elementwise_affine, bias, device, dtype)

    @classmethod
    def from_layer(cls, layer: nn.LayerNorm, tasks: Tasks) -> TaskLayerNorm:
        """The same layer, with a copy of its scale and shift for each task.

        Args:
            layer: an `nn.LayerNorm`.
            tasks: as for the class.

        Raises:
            TypeError: another layer, or one with a forward of its own.
            ValueError: no scale to have by task; a weight that is computed, hooks, or what the class raises.
        """
        check_plain(layer, nn.LayerNorm, "forward")
        made = cls(layer.normalized_shape, tasks, layer.eps, True, layer.bias is not None, device="meta")
        return made._take(layer)

    def merged(self, task: int | str, memo: dict[int, Any] | None = None) -> nn.LayerNorm:
        plain = nn.LayerNorm(
            self.normalized_shape, self.eps, self.elementwise_affine, self.bias is not None, device="meta"
        )
        return self._merge_into(plain, task)

    def forward(self, x: Tensor) -> Tensor:
        plan = self._plan(x, self._leading(x))
        return self._patched(F.layer_norm(x, self.normalized_shape, eps=self.eps), plan)


class TaskRMSNorm(_TaskNorm):
    """`nn.RMSNorm` in which sample b is scaled by its task's own `weight[t]`.

    Args:
        normalized_shape: of the last dimensions, as in `nn.RMSNorm`.
        tasks: the number of tasks (named "0", "1", ...) or their names; ids count in this order.
        eps: as in `nn.RMSNorm`.
        elementwise_affine: as in `nn.RMSNorm`; False: no task has anything of its own.
        device: of all parameters.
        dtype: of all parameters.

    `forward(x)` takes `[N, ..., *normalized_shape]`; the ids have the shape of one or more leading dimensions. A
    `state_dict` of the plain layer gives every task its values.

    Raises:
        TypeError, ValueError: tasks that are none; a name with a dot or one that `nn.ParameterDict` uses.
        RuntimeError: (from forward) outside `fastmtl.nn.tasks`.

    Example:
        >>> norm = TaskRMSNorm(4, 2)
        >>> with tasks(torch.tensor([1, 0])):
        ...     y = norm(torch.randn(2, 3, 4))
        >>> y.shape
        torch.Size([2, 3, 4])
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | tuple[int, ...] | torch.Size,
        tasks: Tasks,
        eps: float | None = None,
        elementwise_affine: bool = True,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, tasks, eps, elementwise_affine, False, device, dtype)

    @classmethod
    def from_layer(cls, layer: nn.RMSNorm, tasks: Tasks) -> TaskRMSNorm:
        """The same layer, with a copy of its scale for each task.

        Args:
            layer: an `nn.RMSNorm`.
            tasks: as for the class.

        Raises:
            TypeError: another layer, or one with a forward of its own.
            ValueError: no scale to have by task; a weight that is computed, hooks, or what the class raises.
        """
        check_plain(layer, nn.RMSNorm, "forward")
        return cls(layer.normalized_shape, tasks, layer.eps, True, device="meta")._take(layer)

    def merged(self, task: int | str, memo: dict[int, Any] | None = None) -> nn.RMSNorm:
        plain = nn.RMSNorm(self.normalized_shape, self.eps, self.elementwise_affine, device="meta")
        return self._merge_into(plain, task)

    def forward(self, x: Tensor) -> Tensor:
        plan = self._plan(x, self._leading(x))
        return self._patched(F.rms_norm(x, self.normalized_shape, eps=self.eps), plan)
