"""A 2-D convolution with a small difference per task."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.nn.layer import TaskLayer, Tasks, check_plain
from fastmtl.ops import task_conv2d
from fastmtl.ops.task_weights.arguments import Pair, read_pair
from fastmtl.ops.task_weights.task_conv2d import read_geometry


class TaskConv2d(TaskLayer):
    """`nn.Conv2d` in which sample b sees `weight + gate[t] * delta[t]`, t its task as `fastmtl.nn.tasks` tells it.

    Args:
        in_channels: of the input.
        out_channels: of the result.
        kernel_size: an int, or height and width.
        tasks: the number of tasks (named "0", "1", ...) or their names; ids count in this order.
        stride: as in `nn.Conv2d`.
        padding: as in `nn.Conv2d`, `"same"` and `"valid"` included; of zeros.
        dilation: as in `nn.Conv2d`.
        groups: as in `nn.Conv2d`.
        bias: whether there is a shared bias.
        gate: the first value of a learned scalar per task; None: no gates. At 0 neither the gate nor a delta that is
            still zero gets a gradient other than zero.
        per_task_bias: whether each task has a bias of its own, added to the shared one; zero at first.
        device: of all parameters.
        dtype: of all parameters.

    `forward(x)` takes `[N, in_channels, H, W]` and needs ids `[N]`. Parameters: `weight` and `bias` as in
    `nn.Conv2d`, under the same names; `delta`, `gate` and `task_bias` are dictionaries of one parameter per task
    (`gate` and `task_bias` None if not asked for), which gradient surgery leaves alone.

    Raises:
        TypeError, ValueError: tasks, a gate or a geometry that are none; a name with a dot or one that
            `nn.ParameterDict` uses.
        RuntimeError: (from forward) outside `fastmtl.nn.tasks`.

    Example:
        >>> layer = TaskConv2d(3, 8, 3, ["photo", "sketch"], padding=1)
        >>> with tasks(torch.tensor([1, 0])):
        ...     y = layer(torch.ones(2, 3, 5, 5))
        >>> y.shape
        torch.Size([2, 8, 5, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        tasks: Tasks,
        stride: Pair = 1,
        padding: Pair | str = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        gate: float | None = None,
        per_task_bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        kernel = read_pair(kernel_size, "kernel_size", 1)
        geometry, _ = read_geometry(stride, padding, dilation, groups, kernel)
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups: expected a divisor of in_channels = {in_channels} and out_channels = {out_channels}, "
                f"got {groups}"
            )
        shape = (out_channels, in_channels // groups, *kernel)
        super().__init__(shape, tasks, bias, gate, per_task_bias, device, dtype)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel
        self.stride, self.dilation, self.groups = geometry.stride, geometry.dilation, groups
        self.padding: str | tuple[int, int] = padding if isinstance(padding, str) else geometry.padding

    @classmethod
    def from_layer(
        cls, layer: nn.Conv2d, tasks: Tasks, *, gate: float | None = None, per_task_bias: bool = False
    ) -> TaskConv2d:
        """The same layer with a delta of zero per task. It holds the very parameters of the plain layer.

        Args:
            layer: an `nn.Conv2d` that pads with zeros.
            tasks: as for the class.
            gate: as for the class.
            per_task_bias: as for the class.

        Raises:
            TypeError: another layer, or one with a forward of its own.
            ValueError: another `padding_mode`; a weight that is computed (weight_norm, parametrizations); hooks; or
                what the class raises.
        """
        check_plain(layer, nn.Conv2d, "forward", "_conv_forward")
        if layer.padding_mode != "zeros":
            raise ValueError(f"layer: expected padding_mode 'zeros', got {layer.padding_mode!r}")
        size = layer.in_channels, layer.out_channels, layer.kernel_size
        geometry = layer.stride, layer.padding, layer.dilation, layer.groups
        has_bias = layer.bias is not None
        made = cls(*size, tasks, *geometry, has_bias, gate=gate, per_task_bias=per_task_bias, device="meta")
        return made._take(layer)

    def forward(self, x: Tensor) -> Tensor:
        return task_conv2d(
            x,
            self.weight,
            **self._of_tasks(),
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        if self.padding not in ((0, 0), "valid"):
            text += f", padding={self.padding!r}"
        if self.dilation != (1, 1):
            text += f", dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        return text + self._repr_of_tasks()
