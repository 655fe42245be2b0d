"""A linear layer with a small difference per task."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmtl.nn.containers import Tasks
from fastmtl.nn.layers.gate import TapsGate
from fastmtl.nn.layers.weights import Rank, TaskLayer, check_plain, low_rank_linear
from fastmtl.ops import task_linear


def must_run(layer: nn.Module, args: Any) -> None:
    """A hook that does nothing: torch's fused Transformer layers read `weight` past a forward that has none."""


class TaskLinear(TaskLayer):
    """`nn.Linear` in which sample b sees `weight + gate[t] * delta[t]`, t its task as `fastmtl.nn.tasks` tells it.

    Args:
        in_features: columns of the input.
        out_features: columns of the result.
        tasks: the number of tasks (named "0", "1", ...) or their names; ids count in this order.
        bias: whether there is a shared bias.
        gate: the first value of a learned scalar per task, or a `TapsGate`, which opens and closes by a learned score;
            None: no gates. At 0 neither the gate nor a delta that is still zero gets a gradient other than zero.
        rank: of a low-rank delta `B A`: an int, or one for each task by name; None: a dense delta.
        scaling: of a low-rank delta (alpha / rank in LoRA).
        shared: whether there is a weight that all tasks share; False: wholly separate weights and biases, the same for
            all tasks at first.
        per_task_bias: whether each task has a bias of its own, added to the shared one; zero at first.
        device: of all parameters.
        dtype: of all parameters.

    `forward(x)` takes `[N, ..., in_features]`; the ids have the shape of one or more leading dimensions.
    Parameters: `weight` and `bias` as in `nn.Linear`, under the same names; `delta` (or `A` and `B`), `gate` and
    `task_bias` are dictionaries of one parameter per task (None if not asked for), which gradient surgery leaves alone.
    Without a shared weight, `delta` holds the weights and `task_bias` the biases; `weight` then reads as the first
    task's.

    Raises:
        TypeError, ValueError: tasks, a gate or a rank that are none; a name with a dot or one that `nn.ParameterDict`
            uses.
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
        gate: float | TapsGate | None = None,
        rank: Rank | None = None,
        scaling: float = 1.0,
        shared: bool = True,
        per_task_bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            (out_features, in_features), tasks, bias, gate=gate, rank=rank, scaling=scaling, shared=shared,
            per_task_bias=per_task_bias, device=device, dtype=dtype,
        )  # fmt: skip
        self.in_features, self.out_features = in_features, out_features
        # of a child, which is never called: torch looks at all modules of a Transformer layer, and a hook of this one
        # would make each of its calls slower
        next(iter(self.children())).register_forward_pre_hook(must_run)

    @classmethod
    def from_layer(cls, layer: nn.Linear, tasks: Tasks, **options: Any) -> TaskLinear:
        """The same layer with a delta of zero per task. It holds the very parameters of the plain layer.

        With `shared=False` each task has a copy of them instead.

        Args:
            layer: an `nn.Linear`.
            tasks: as for the class.
            options: `gate`, `rank`, `scaling`, `shared` and `per_task_bias` of the class.

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
        return cls(*size, tasks, layer.bias is not None, **options, device="meta")._take(layer)

    def merged(self, task: int | str, memo: dict[int, Any] | None = None) -> nn.Linear:
        name = self.task_name(task)
        has_bias = self.effective_bias(name) is not None
        plain = nn.Linear(self.in_features, self.out_features, has_bias, device="meta")
        self._merge_into(plain, name, memo)
        return plain

    def forward(self, x: Tensor) -> Tensor:
        if self._is_plain(x, x.dim() - 1):
            plain = self._plain_parameters(x, -1, self._shape[1])
            if plain is not None:
                return F.linear(x, *plain)
        plan = self._plan(x, x.dim() - 1)
        if self.rank is None:
            return task_linear(x, self.weight if self.shared else None, **self._of_tasks(plan))
        weight = self._parameters.get("weight")
        # one that is parametrised is computed
        return low_rank_linear(self, x, plan, self.weight if weight is None else weight)

    def _shapes_of_rank(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, self._shape[1]), (self._shape[0], rank)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}" + self._repr_of_layer()
