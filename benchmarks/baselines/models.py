"""Tasks in a network without fastmtl: a network for each task, and adapters that a loop adds to each linear layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# of each task, by name, the positions of its samples in the batch
Rows = Mapping[str, Tensor]


def merge_outputs(parts: Sequence[Tensor], rows: Rows) -> Tensor:
    """The outputs `[N, ...]` in the order of the batch, from those of each task's samples."""
    out = torch.empty(sum(map(len, parts)), *parts[0].shape[1:], dtype=parts[0].dtype, device=parts[0].device)
    for part, where in zip(parts, rows.values(), strict=True):
        out.index_copy_(0, where, part.detach())
    return out


def forward_by_task(x: Tensor, rows: Rows, run: Callable[[str, Tensor], Tensor]) -> Tensor:
    """A forward pass of each task's samples on their own: `run(task, samples)`."""
    return merge_outputs([run(task, x[where]) for task, where in rows.items()], rows)


def step_by_task(
    x: Tensor, rows: Rows, run: Callable[[str, Tensor], Tensor], loss: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """A forward and backward pass of each task's samples on their own; gradients add up in `.grad`.

    Args:
        x: `[N, ...]`.
        rows: of each task.
        run: task, samples -> outputs.
        loss: outputs, positions in the batch -> the task's part of the loss of the batch.
    """
    parts = []
    for task, where in rows.items():
        parts.append(run(task, x[where]))
        loss(parts[-1], where).backward()
    return merge_outputs(parts, rows)


class AdapterLinear(nn.Module):
    """`y = W x + b` of all rows, and then for each adapter `s B A x` of its rows, added where they stand.

    So libraries of adapters serve a batch that mixes them. W and b do not train.

    Args:
        layer: the linear layer.
        A, B: the halves of each adapter by name, `[r, in]` and `[out, r]`; copied.
        scaling: s.
        rows: of each adapter in the batch at hand; one mapping for all layers, filled before a forward pass.
    """

    def __init__(
        self, layer: nn.Linear, A: Mapping[str, Tensor], B: Mapping[str, Tensor], scaling: float, rows: Rows
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
        self.A, self.B = (nn.ParameterDict({k: x.detach().clone() for k, x in held.items()}) for held in (A, B))
        self.scaling, self.rows = scaling, rows

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        for name, where in self.rows.items():
            low = F.linear(F.linear(x[where], self.A[name]), self.B[name])
            y.index_add_(0, where, low, alpha=self.scaling)
        return y


def with_adapters(
    model: nn.Module,
    halves: Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, Tensor]]],
    scaling: float,
    rows: Rows,
) -> nn.Module:
    """A copy of a network in which the linear layers at some paths have adapters, and nothing else trains.

    Args:
        model: the plain network.
        halves: path -> A and B of each adapter by name.
        scaling: of all of them.
        rows: as for `AdapterLinear`.
    """
    found = copy.deepcopy(model).requires_grad_(False)
    for path, (A, B) in halves.items():
        layer = found.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        above, _, name = path.rpartition(".")
        setattr(found.get_submodule(above), name, AdapterLinear(layer, A, B, scaling, rows))
    return found
