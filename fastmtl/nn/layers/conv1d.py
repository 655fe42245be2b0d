"""The linear layer of GPT-2, whose weight lies the other way round, with a difference per task."""

from __future__ import annotations

import sys
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastmtl.nn.containers import Tasks
from fastmtl.nn.layers.weights import TaskLayer, check_plain, low_rank_linear, product_of_halves
from fastmtl.ops import task_linear


def conv1d_class() -> type[nn.Module] | None:
    """`transformers.pytorch_utils.Conv1D`, if a model of that library has been made; nothing is imported."""
    module = sys.modules.get("transformers.pytorch_utils")
    return getattr(module, "Conv1D", None)


class TaskConv1D(TaskLayer):
    """`Conv1D` of `transformers`, as GPT-2 has it (`y = x W + b`, W `[Cin, Cout]`), with a difference per task.

    Made by `from_layer` alone, as that class belongs to `transformers`.

    Args:
        in_features: columns of the input.
        out_features: columns of the result.
        tasks: as for `TaskLinear`.
        options: `gate`, `rank`, `scaling`, `shared`, `per_task_bias`, `device` and `dtype`, as for `TaskLinear`.

    `forward(x)` takes `[N, ..., in_features]`; the ids have the shape of one or more leading dimensions. Parameters as
    those of `TaskLinear`, with `weight` and `delta` of shape `[in_features, out_features]`.

    Raises:
        TypeError, ValueError: tasks, a gate or a rank that are none; a name with a dot or one that `nn.ParameterDict`
            uses.
        RuntimeError: (from forward) outside `fastmtl.nn.tasks`.

    Example:
        >>> layer = TaskConv1D(4, 2, ["left", "right"])
        >>> layer.weight.shape
        torch.Size([4, 2])
    """

    def __init__(self, in_features: int, out_features: int, tasks: Tasks, **options: Any) -> None:
        usual: dict[str, Any] = {
            "gate": None, "rank": None, "scaling": 1.0, "shared": True, "per_task_bias": False, "device": None,
            "dtype": None,
        }  # fmt: skip
        for name in options:
            if name not in usual:
                raise TypeError(f"options: expected {', '.join(usual)}, got {name!r}")
        super().__init__((in_features, out_features), tasks, True, **{**usual, **options}, out_dim=1)
        self.nx, self.nf = in_features, out_features

    @classmethod
    def from_layer(cls, layer: nn.Module, tasks: Tasks, **options: Any) -> TaskConv1D:
        """The same layer with a delta of zero per task. It holds the very parameters of the plain layer.

        With `shared=False` each task has a copy of them instead.

        Args:
            layer: a `Conv1D` of `transformers`.
            tasks: as for `TaskLinear`.
            options: `gate`, `rank`, `scaling`, `shared` and `per_task_bias`, as for `TaskLinear`.

        Raises:
            TypeError: another layer, or one with a forward of its own.
            ValueError: a weight that is computed (weight_norm, parametrizations), hooks, or what the class raises.
        """
        kind = conv1d_class()
        if kind is None:
            raise TypeError(f"layer: expected Conv1D of transformers, got {type(layer).__name__}")
        check_plain(layer, kind, "forward")
        return cls(*layer.weight.shape, tasks, **options, device="meta")._take(layer)

    def merged(self, task: int | str, memo: dict[int, Any] | None = None) -> nn.Module:
        kind = conv1d_class()
        if kind is None:
            from transformers.pytorch_utils import Conv1D as kind
        return self._merge_into(kind(self.nf, self.nx), task, memo)

    def forward(self, x: Tensor) -> Tensor:
        if self._is_plain(x, x.dim() - 1):
            plain = self._plain_parameters(x, -1, self._shape[0])
            if plain is not None:
                return F.linear(x, plain[0].t(), plain[1])
        plan = self._plan(x, x.dim() - 1)
        if self.rank is None:
            given = self._of_tasks(plan)
            given["delta"] = [d.t() for d in given["delta"]]
            return task_linear(x, self.weight.t() if self.shared else None, **given)
        return low_rank_linear(self, x, plan, self.weight.t())

    def _shapes_of_rank(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, self._shape[0]), (self._shape[1], rank)

    def _product(self, down: Tensor, up: Tensor, task: str) -> Tensor:
        return product_of_halves(down, up, self.weight.t(), task).t()

    def extra_repr(self) -> str:
        return f"in_features={self.nx}, out_features={self.nf}" + self._repr_of_layer()
