"""A linear layer with a small difference per task."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.nn.layer import TaskLayer, Tasks, check_plain
from fastmtl.ops import task_linear


def _must_run(layer: nn.Module, args: Any) -> None:
    """A hook that does nothing: torch's fused Transformer layers read `weight` past a forward that has none."""


class TaskLinear(TaskLayer):
    """`nn.Linear` in which sample b sees `weight + gate[t] * delta[t]`, t its task as `fastmtl.nn.tasks` tells it.

    Args:
        in_features: columns of the input.
        out_features: columns of the result.
        tasks: the number of tasks (named "0", "1", ...) or their names; ids count in this order.
        bias: whether there is a shared bias.
        gate: the first value of a learned scalar per task; None: no gates. At 0 neither the gate nor a delta that is
            still zero gets a gradient other than zero.
        per_task_bias: whether each task has a bias of its own, added to the shared one; zero at first.
        device: of all parameters.
        dtype: of all parameters.

    `forward(x)` takes `[N, ..., in_features]`; the ids have the shape of one or more leading dimensions.
    Parameters: `weight` and `bias` as in `nn.Linear`, under the same names; `delta`, `gate` and `task_bias` are
    dictionaries of one parameter per task (`gate` and `task_bias` None if not asked for), which gradient surgery leaves
    alone.

    Raises:
        TypeError, ValueError: tasks or a gate that are none; a name with a dot or one that `nn.ParameterDict` uses.
        RuntimeError: (from forward) outside `fastmtl.nn.tasks`.

    Example:
        >>> layer = TaskLinear(4, 2, ["left", "right"])
        >>> sorted(layer.delta)
        ['left', 'right']
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        tasks: Tasks,
        bias: bool = True,
        *,
        gate: float | None = None,
        per_task_bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__((out_features, in_features), tasks, bias, gate, per_task_bias, device, dtype)
        self.in_features, self.out_features = in_features, out_features
        self.register_forward_pre_hook(_must_run)

    @classmethod
    def from_layer(
        cls, layer: nn.Linear, tasks: Tasks, *, gate: float | None = None, per_task_bias: bool = False
    ) -> TaskLinear:
        """The same layer with a delta of zero per task. It holds the very parameters of the plain layer.

        Args:
            layer: an `nn.Linear`.
            tasks: as for the class.
            gate: as for the class.
            per_task_bias: as for the class.

        Raises:
            TypeError: another layer, or one with a forward of its own.
            ValueError: a weight that is computed (weight_norm, parametrizations), hooks, or what the class raises.
        """
        if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
            raise TypeError(
                "layer: expected a layer whose forward runs, got the out_proj of nn.MultiheadAttention, which reads "
                "its weight only"
            )
        check_plain(layer, nn.Linear, "forward")
        size = layer.in_features, layer.out_features
        made = cls(*size, tasks, layer.bias is not None, gate=gate, per_task_bias=per_task_bias, device="meta")
        return made._take(layer)

    def forward(self, x: Tensor) -> Tensor:
        return task_linear(x, self.weight, **self._of_tasks())

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}" + self._repr_of_tasks()
