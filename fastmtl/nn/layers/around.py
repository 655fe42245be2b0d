"""What the layers share that leave a plain layer's weight alone, and compute something by task around it."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmtl.nn.containers import Tasks
from fastmtl.nn.layers.conv1d import conv1d_class
from fastmtl.nn.layers.linear import must_run
from fastmtl.nn.layers.weights import check_plain
from fastmtl.nn.module import TaskModule, as_parameter, copied, lacks
from fastmtl.ops.task_weights.arguments import check_companion, check_input
from fastmtl.ops.task_weights.precision import cast_by_autocast

_Layer = TypeVar("_Layer", bound="AroundPlain")

# of each kind of layer: its attributes, which code around a layer may ask for, and which its forward needs
_ATTRIBUTES = {
    "Conv2d": ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    "Linear": ("in_features", "out_features"),
    "Conv1D": ("nx", "nf"),
}


class AroundPlain(TaskModule):
    """The `weight` and `bias` of an `nn.Conv2d`, an `nn.Linear` or a `Conv1D`, under the same names."""

    bias: nn.Parameter | None

    def __init__(self, layer: nn.Module, tasks: Tasks) -> None:
        super().__init__(tasks)
        self.kind = _kind_of(layer)
        for name in _ATTRIBUTES[self.kind]:
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))
        self.weight = layer._parameters["weight"]
        self.register_parameter("bias", layer._parameters.get("bias"))
        if self.kind == "Conv1D":
            self.nx, self.nf = self.weight.shape
        if self.kind == "Linear":
            self.register_forward_pre_hook(must_run)
        self.train(layer.training)

    @classmethod
    def from_layer(cls: type[_Layer], layer: nn.Module, tasks: Tasks, **options: Any) -> _Layer:
        """The same as the class: for its sake all layers of `fastmtl.nn` are made from a plain one alike.

        Args:
            layer: as for the class.
            tasks: as for the class.
            options: of the class.

        Raises:
            TypeError, ValueError: as the class.
        """
        return cls(layer, tasks, **options)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As the plain layer for `weight` and `bias`; what belongs to tasks is what it was at first."""
        if self.kind == "Conv1D":
            nn.init.normal_(self.weight, std=0.02)
            bound = 0.0
        else:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
            bound = 1 / math.sqrt(self.weight[0].numel())
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        for name in self.tasks:
            self._reset_task(name)

    def _reset_task(self, name: str) -> None:
        raise lacks(self, "_reset_task")

    def _sizes(self) -> tuple[int, int]:
        """Channels or columns of the result, and of the input."""
        if self.kind == "Conv2d":
            return self.weight.shape[0], self.weight.shape[1] * self.groups
        return tuple(self.weight.shape) if self.kind == "Linear" else tuple(self.weight.shape[::-1])

    def _leading(self, x: Tensor) -> int:
        """How many dimensions of x the ids may have."""
        return 1 if self.kind == "Conv2d" else x.dim() - 1

    def _checked(self, x: Tensor) -> Tensor:
        """The input as autocast wants it, if the plain layer can take it."""
        check_input(x)
        x, width = cast_by_autocast(x), self._sizes()[1]
        if self.kind == "Conv2d" and (x.dim() != 4 or x.shape[1] != width):
            raise ValueError(f"x: expected shape [N, {width}, H, W], got {list(x.shape)}")
        if self.kind != "Conv2d" and (x.dim() < 2 or x.shape[-1] != width):
            raise ValueError(f"x: expected shape [N, ..., {width}], got {list(x.shape)}")
        check_companion(self.weight, "weight", x)
        return x

    def _through_plain(self, x: Tensor) -> Tensor:
        """The plain layer without its bias."""
        w = self.weight
        if w.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16):
            w = w.to(x.dtype)
        if self.kind == "Conv2d":
            return F.conv2d(x, w, None, self.stride, self.padding, self.dilation, self.groups)
        return F.linear(x, w if self.kind == "Linear" else w.t())

    def _merged_layer(self, weight: Tensor | None, memo: dict[int, Any] | None, groups: int | None = None) -> nn.Module:
        """The plain layer with another weight, or with its own."""
        has_bias = self.bias is not None
        if self.kind == "Conv2d":
            size = self.in_channels, self.out_channels, self.kernel_size
            geometry = self.stride, self.padding, self.dilation, self.groups if groups is None else groups
            plain: nn.Module = nn.Conv2d(*size, *geometry, has_bias, device="meta")
        elif self.kind == "Linear":
            plain = nn.Linear(self.in_features, self.out_features, has_bias, device="meta")
        else:
            kind = conv1d_class()
            if kind is None:
                from transformers.pytorch_utils import Conv1D as kind
            plain = kind(self.nf, self.nx)
        plain.weight = copied(self.weight, memo) if weight is None else as_parameter(weight)
        plain.bias = copied(self.bias, memo)
        return plain.train(self.training)

    def _repr_of_plain(self) -> str:
        shape = f"{self.kind}{list(self.weight.shape)}"
        return f"{shape}, {self._repr_of_tasks()}" + ("" if self.bias is not None else ", bias=False")


def _kind_of(layer: Any) -> str:
    if isinstance(layer, nn.Conv2d):
        check_plain(layer, nn.Conv2d, "forward", "_conv_forward")
        if layer.padding_mode != "zeros":
            raise ValueError(f"layer: expected padding_mode 'zeros', got {layer.padding_mode!r}")
        return "Conv2d"
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise TypeError(
            "layer: expected a layer whose forward runs, got the out_proj of nn.MultiheadAttention, which reads its "
            "weight only"
        )
    if isinstance(layer, nn.Linear):
        check_plain(layer, nn.Linear, "forward")
        return "Linear"
    kind = conv1d_class()
    if kind is None or not isinstance(layer, kind):
        raise TypeError(f"layer: expected nn.Conv2d, nn.Linear or Conv1D of transformers, got {type(layer).__name__}")
    check_plain(layer, kind, "forward")
    return "Conv1D"
