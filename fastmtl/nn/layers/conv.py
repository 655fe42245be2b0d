"""A 2-D convolution with a small difference per task."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmtl.nn.containers import Tasks
from fastmtl.nn.layers.gate import TapsGate
from fastmtl.nn.layers.weights import Rank, TaskLayer, check_plain, equal_ranks
from fastmtl.ops import task_conv2d
from fastmtl.ops.task_weights.arguments import Pair, read_geometry, read_pair


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
        gate: the first value of a learned scalar per task, or a `TapsGate`, which opens and closes by a learned score;
            None: no gates. At 0 neither the gate nor a delta that is still zero gets a gradient other than zero.
        rank: of a low-rank delta, `B` (1 x 1) behind `A` (the kernel's size, to `rank` channels); an int, or one for
            each task by name; None: a dense delta. It needs `groups=1`.
        scaling: of a low-rank delta (alpha / rank in LoRA).
        shared: whether there is a weight that all tasks share; False: wholly separate weights and biases, the same for
            all tasks at first.
        per_task_bias: whether each task has a bias of its own, added to the shared one; zero at first.
        device: of all parameters.
        dtype: of all parameters.

    `forward(x)` takes `[N, in_channels, H, W]` and needs ids `[N]`. Parameters: `weight` and `bias` as in
    `nn.Conv2d`, under the same names; `delta` (or `A` and `B`), `gate` and `task_bias` are dictionaries of one
    parameter per task (None if not asked for), which gradient surgery leaves alone. Without a shared weight, `delta`
    holds the weights and `task_bias` the biases; `weight` then reads as the first task's.

    Raises:
        TypeError, ValueError: tasks, a gate, a rank or a geometry that are none; a name with a dot or one that
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
        gate: float | TapsGate | None = None,
        rank: Rank | None = None,
        scaling: float = 1.0,
        shared: bool = True,
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
        if rank is not None and groups != 1:
            raise ValueError(f"rank: expected None for a convolution of {groups} groups, got {rank!r}")
        super().__init__(
            shape, tasks, bias, gate=gate, rank=rank, scaling=scaling, shared=shared, per_task_bias=per_task_bias,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel
        self.stride, self.dilation, self.groups = geometry.stride, geometry.dilation, groups
        self.padding: str | tuple[int, int] = padding if isinstance(padding, str) else geometry.padding

    @classmethod
    def from_layer(cls, layer: nn.Conv2d, tasks: Tasks, **options: Any) -> TaskConv2d:
        """The same layer with a delta of zero per task. It holds the very parameters of the plain layer.

        With `shared=False` each task has a copy of them instead.

        Args:
            layer: an `nn.Conv2d` that pads with zeros.
            tasks: as for the class.
            options: `gate`, `rank`, `scaling`, `shared` and `per_task_bias` of the class.

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
        return cls(*size, tasks, *geometry, layer.bias is not None, **options, device="meta")._take(layer)

    def merged(self, task: int | str, memo: dict[int, Any] | None = None) -> nn.Conv2d:
        name = self.task_name(task)
        size = self.in_channels, self.out_channels, self.kernel_size
        geometry = self.stride, self.padding, self.dilation, self.groups
        plain = nn.Conv2d(*size, *geometry, self.effective_bias(name) is not None, device="meta")
        self._merge_into(plain, name, memo)
        return plain

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4 and self._is_plain(x, 1) and self._spans(x):
            plain = self._plain_parameters(x, 1, self._shape[1] * self.groups)
            if plain is not None:
                return F.conv2d(x, *plain, self.stride, self.padding, self.dilation, self.groups)
        plan = self._plan(x)
        geometry = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}
        if self.rank is None:
            return task_conv2d(x, self.weight if self.shared else None, **self._of_tasks(plan), **geometry)
        down, up = self._listed(plan, self.A, self.B)
        if self.gate is not None:
            # a closed gate must hide what is behind it, also a NaN, and still get a gradient: the dense delta's op does
            delta = [self._product(*half) * self.scaling for half in zip(down, up, self.tasks, strict=True)]
            gate, bias = self._gates(plan), self._biases(plan)
            return task_conv2d(x, self.weight, delta, plan, gate=gate, bias=bias, **geometry)
        down, up = equal_ranks(down, 0), equal_ranks(up, 1)
        y = task_conv2d(x, self.weight, None, plan, bias=self._biases(plan), **geometry)
        low = task_conv2d(task_conv2d(x, None, down, plan, **geometry), None, up, plan)
        return y + (low if self.scaling == 1 else low * self.scaling)

    def _spans(self, x: Tensor) -> bool:
        """Whether the pictures are as large as the filter, which the op says, else."""
        padding = self.padding
        if padding == "same":
            return True
        height, width = (0, 0) if isinstance(padding, str) else padding
        _, _, rows, columns = self._shape
        _, _, h, w = x.shape
        over_rows, over_columns = self.dilation
        return h + 2 * height > over_rows * (rows - 1) and w + 2 * width > over_columns * (columns - 1)

    def _shapes_of_rank(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, *self._shape[1:]), (self._shape[0], rank, 1, 1)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        if self.padding not in ((0, 0), "valid"):
            text += f", padding={self.padding!r}"
        if self.dilation != (1, 1):
            text += f", dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        return text + self._repr_of_layer()
