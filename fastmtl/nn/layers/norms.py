"""Layer norm and RMS norm whose scale and shift each task has for itself: model patches of a transformer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmtl.core.schemas import autocast_is_on, without_autocast
from fastmtl.core.task_weights import TaskPlan
from fastmtl.nn.containers import TaskParameters, Tasks
from fastmtl.nn.layers.linear import must_run
from fastmtl.nn.layers.norm import TaskNorm
from fastmtl.nn.layers.scale_shift import scale_shift_of_last
from fastmtl.nn.layers.weights import check_plain

_NARROW = (torch.bfloat16, torch.float16)


def _dtype_of(norm: Callable[[Tensor], Tensor], x: Tensor) -> torch.dtype:
    """What the plain norm of x comes in: autocast widens it on some devices."""
    if not autocast_is_on(x.device.type):
        return x.dtype
    return norm(torch.empty(0, *x.shape[1:], dtype=x.dtype, device=x.device)).dtype


class _ScaledByTask(TaskNorm):
    """Scale and shift of the last dimensions, one of each per task, behind a norm without them."""

    weight: TaskParameters | None
    bias: TaskParameters | None
    # the norm of a library that this one was made of, if its class is its own; in a tuple, so that it is no child
    _library: tuple[nn.Module, ...] = ()
    channels_first = False

    def __init__(
        self, shape: int | list[int] | tuple[int, ...] | torch.Size, tasks: Tasks, eps: float | None, affine: bool,
        bias: bool, device: Any, dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        size = (shape,) if isinstance(shape, int) else tuple(shape)
        ones = torch.ones(size, device=device, dtype=dtype) if affine else None
        shift = torch.zeros_like(ones) if ones is not None and bias else None
        super().__init__(tasks, {"weight": ones, "bias": shift}, {})
        self.normalized_shape, self.eps, self.elementwise_affine = size, eps, affine
        self.register_forward_pre_hook(must_run)

    def reset_parameters(self) -> None:
        """As the plain layer, for each task and those to come: scales of 1 and shifts of 0."""
        self._refill({"weight": 1, "bias": 0})

    def _merge_into(self, plain: nn.Module, task: int | str) -> Any:
        return super()._merge_into(copy.deepcopy(self._library[0]) if self._library else plain, task)

    def _is_library(self, layer: nn.Module, channels_first: bool) -> None:
        self._library, self.channels_first = (copy.deepcopy(layer),), channels_first

    def _normed(self, x: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
        if self.channels_first:
            x = x.movedim(1, -1)
        plan = self._plan(x, self._leading(x))
        if x.dtype in _NARROW and self.weight is not None:
            # as the plain layer, rounded once: behind scale and shift
            y = self._patched(norm(x.float()), plan).to(_dtype_of(norm, x))
        else:
            y = self._patched(norm(x), plan)
        return y.movedim(-1, 1) if self.channels_first else y

    def _patched(self, y: Tensor, plan: TaskPlan) -> Tensor:
        """Scale and shift by task; the ids have the shape of leading dimensions of y."""
        if self.weight is None:
            return y
        channels = math.prod(self.normalized_shape)
        scale = self._stacked(self.weight, plan).view(-1, channels)
        shift = torch.zeros_like(scale) if self.bias is None else self._stacked(self.bias, plan).view(-1, channels)
        if y.dtype == torch.float32 and scale.dtype in _NARROW:
            scale, shift = scale.float(), shift.float()
        # in the dtype of the norm, which autocast would narrow
        with without_autocast(y.device.type):
            return scale_shift_of_last(y, scale, shift, plan)

    def _leading(self, x: Tensor) -> int:
        return x.dim() - len(self.normalized_shape)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, {self._repr_of_tasks()}"


class TaskLayerNorm(_ScaledByTask):
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
            layer: an `nn.LayerNorm`, or one of a class of its own that is seen to compute the same, over the last
                dimensions or over the channels of pictures (as ConvNeXt's).
            tasks: as for the class.

        Raises:
            TypeError: another layer, or one that computes something else.
            ValueError: no scale to have by task; a weight that is computed, hooks, or what the class raises.
        """
        if not isinstance(layer, nn.LayerNorm):
            raise TypeError(f"layer: expected nn.LayerNorm, got {type(layer).__name__}")
        check_plain(layer, nn.LayerNorm)
        made = cls(layer.normalized_shape, tasks, layer.eps, True, layer.bias is not None, device="meta")
        if type(layer).forward is not nn.LayerNorm.forward:
            made._is_library(layer, _seen(layer, layer.normalized_shape, layer.eps, F.layer_norm))
        return made._take(layer)

    def merged(self, task: int | str, memo: dict[int, Any] | None = None) -> nn.LayerNorm:
        plain = nn.LayerNorm(
            self.normalized_shape, self.eps, self.elementwise_affine, self.bias is not None, device="meta"
        )
        return self._merge_into(plain, task)

    def forward(self, x: Tensor) -> Tensor:
        return self._normed(x, lambda x: F.layer_norm(x, self.normalized_shape, eps=self.eps))


class TaskRMSNorm(_ScaledByTask):
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
            layer: an `nn.RMSNorm`, or one of a library (Llama's, for instance) that has a `weight` and is seen to
                compute the same.
            tasks: as for the class.

        Raises:
            TypeError: another layer, or one that computes something else (Gemma's, which scales by `1 + weight`).
            ValueError: no scale to have by task; a weight that is computed, hooks, or what the class raises.
        """
        if not is_rms_norm(layer):
            raise TypeError(f"layer: expected nn.RMSNorm, got {type(layer).__name__}")
        check_plain(layer, nn.Module)
        if type(layer) is nn.RMSNorm:
            return cls(layer.normalized_shape, tasks, layer.eps, True, device="meta")._take(layer)
        eps = getattr(layer, "variance_epsilon", getattr(layer, "eps", None))
        made = cls(layer.weight.shape, tasks, eps, True, device="meta")
        made._is_library(layer, _seen(layer, tuple(layer.weight.shape), eps, _rms_norm))
        return made._take(layer)

    def merged(self, task: int | str, memo: dict[int, Any] | None = None) -> nn.RMSNorm:
        plain = nn.RMSNorm(self.normalized_shape, self.eps, self.elementwise_affine, device="meta")
        return self._merge_into(plain, task)

    def forward(self, x: Tensor) -> Tensor:
        return self._normed(x, lambda x: F.rms_norm(x, self.normalized_shape, eps=self.eps))


def is_rms_norm(layer: nn.Module) -> bool:
    """`nn.RMSNorm`, or a class of a library that looks like one: what it computes is not known yet."""
    if isinstance(layer, nn.RMSNorm):
        return True
    weight = layer._parameters.get("weight")
    # T5 calls its own a layer norm
    called_so = type(layer).__name__.endswith("RMSNorm") or hasattr(layer, "variance_epsilon")
    return called_so and weight is not None and set(layer._parameters) == {"weight"}


def _rms_norm(x: Tensor, shape: Any, weight: Tensor, bias: None, eps: float | None) -> Tensor:
    return F.rms_norm(x, shape, weight, eps)


@torch.no_grad()
def _seen(layer: nn.Module, shape: Any, eps: float | None, norm: Callable[..., Tensor]) -> bool:
    """Whether a layer norms channels first; it is run on numbers, and must compute what torch's norm computes.

    Raises:
        TypeError: it computes something else, or can't be run.
    """
    weight, bias = layer._parameters["weight"], layer._parameters.get("bias")
    assert weight is not None
    channels = weight.numel()
    trial = copy.deepcopy(layer).double()
    trial.weight.copy_(torch.linspace(0.5, 1.5, channels).view_as(weight))
    if bias is not None:
        trial.bias.copy_(torch.linspace(-1, 1, channels).view_as(weight))
    own = trial._parameters.get("bias")
    for first in (False, True) if len(shape) == 1 else (False,):
        x = torch.sin(torch.arange(6 * channels, dtype=torch.float64, device=weight.device)) * 3
        x = x.view(2, 3, 1, channels).movedim(-1, 1) if first else x.view(2, 3, *shape)
        rows = x.movedim(1, -1) if first else x
        expected = norm(rows, shape, trial.weight, own, eps)
        try:
            found = trial(x)
        except Exception:
            continue
        found = found.movedim(1, -1) if first else found
        # some norms compute in float32 whatever they are given
        if found.shape == expected.shape and torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-4):
            return first
    raise TypeError(f"layer: expected what torch's norm computes, got {type(layer).__name__}, which computes another")
