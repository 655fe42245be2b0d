"""The T gradients of the shared parameters, as a surgery takes them: whoever collected them, and however."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from fastmtl.core.gradient_rows import GradientRows, accumulate_dtype, present_params
from fastmtl.core.memory import can_keep, references_alone
from fastmtl.core.schemas import without_autocast
from fastmtl.core.tensors import as_real
from fastmtl.methods import Method, Seen
from fastmtl.ops.gradients.combine import combine_into
from fastmtl.ops.gradients.gram import gram_rows
from fastmtl.ops.gradients.groups import Grouped, combine_groups_into, gram_groups
from fastmtl.ops.gradients.order import is_plain
from fastmtl.surgery.accumulate import Updates

Row: TypeAlias = list[Tensor | None]  # one task's gradients by parameter; None: zero


class SurgeryInput(Protocol):
    """What `solve` asks of task gradients.

    Attributes:
        names: of the T tasks.
        present: which of them take part; `[T]` bool where the device alone knows.
        device: of the Gram matrix.
        poison: NaN where something was wrong that the host can't see, else 0; None: nothing can be.
        is_empty: no parameter is shared, so that the method has nothing to decide.
        partitioned: each rank has columns of its own, and perhaps none, so that the Gram matrix is a sum over ranks;
            else all have equal gradients.
    """

    @property
    def names(self) -> Sequence[str]: ...
    @property
    def present(self) -> Sequence[bool] | Tensor: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def poison(self) -> Tensor | None: ...
    @property
    def is_empty(self) -> bool: ...
    @property
    def partitioned(self) -> bool: ...

    def gram(self) -> Tensor:
        """`[T, T]` inner products of the gradients that this process has; `[2T, 2T]` where there are those of a second
        batch, which come last."""

    def combine(self, weights: Tensor) -> Updates:
        """What is to be added to each parameter's `.grad`; only once."""


class TaskGradients:
    """T gradients of n shared parameters (or features), and the gradients of the others, which no method weighs.

    Args:
        params: the n shared parameters.
        rows: the T task gradients of them; 2T with those of a second batch, which come last and enter the Gram matrix
            alone. Emptied: the update is written into the memory of gradients that nobody else holds, so that it costs
            none.
        unshared: the other parameters, each with the sum of its gradients. Emptied likewise.
        names, present, poison, partitioned: see `SurgeryInput`.
        device: where the Gram matrix goes if nothing is shared.
        references: how many the caller keeps to each gradient, besides `rows`.
        receivers: what the updates are for, in the order of `params`; None: `params` themselves.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        rows: list[Row],
        unshared: dict[Tensor, Tensor],
        names: Sequence[str],
        present: Sequence[bool] | Tensor,
        device: torch.device,
        *,
        poison: Tensor | None = None,
        references: int = 0,
        receivers: Sequence[Tensor] | None = None,
        partitioned: bool = False,
    ) -> None:
        n, num_rows = len(params), max(len(rows), len(names))  # a rank without a loss has none
        # what ops.gram checks is known here: autograd gives every gradient its parameter's shape, dtype and device
        index = [t * n + i for t, row in enumerate(rows) for i, g in enumerate(row) if g is not None]
        # complex gradients as pairs of real ones, from here until they are written
        tensors = [as_real(g) for row in rows for g in row if g is not None]
        rows.clear()
        self.names, self.present, self.poison, self.partitioned = names, present, poison, partitioned
        self.device = params[0].device if params else device
        self.is_empty = not (tensors or (partitioned and params))
        self._all = GradientRows(tensors, index, num_rows, n)
        self._gradients = self._all
        if num_rows > len(names):
            first = sum(k < len(names) * n for k in index)
            self._gradients = GradientRows(tensors[:first], index[:first], len(names), n)
        self._params, self._unshared = [as_real(p.detach()) if p.is_complex() else p for p in params], unshared
        self._receivers = params if receivers is None else receivers
        self._references = references

    def gram(self) -> Tensor:
        num_rows = self._all.num_tasks
        if self._all.tensors:
            return gram_rows(self._all)
        dtype = accumulate_dtype([p.dtype for p in self._params])
        return torch.zeros(num_rows, num_rows, dtype=dtype, device=self.device)

    def combine(self, weights: Tensor) -> Updates:
        self._drop_second()
        columns = self._result_memory()
        if columns:
            with without_autocast(self.device.type):
                combine_into(weights, self._gradients, columns)
        return self._updates(columns)

    def can_group(self, groups: Sequence[int], count: int) -> bool:
        """Whether `gram_groups` and `combine_groups` serve these groups of the parameters: no group is empty, and one
        dtype serves all of their Gram matrices. Equal on all ranks."""
        kept: list[set[torch.dtype]] = [set() for _ in range(count)]
        for p, group in zip(self._params, groups, strict=True):
            kept[group].add(p.dtype)
        if not all(kept) or len({accumulate_dtype([*dtypes]) for dtypes in kept}) > 1:
            return False
        if self.partitioned:
            return True
        n = len(self._params)
        with_gradient = {groups[k % n] for k in self._all.index}
        return len(with_gradient) == count and is_plain(self._all.tensors)

    def gram_groups(self, groups: Sequence[int], count: int) -> Tensor:
        """As `gram`, of each group of the parameters: `[L, T, T]` or `[L, 2T, 2T]`."""
        dtype = accumulate_dtype([p.dtype for p in self._params])
        return gram_groups(Grouped(self._all, groups, count), dtype, self.device)

    def combine_groups(self, weights: Tensor, groups: Sequence[int]) -> Updates:
        """As `combine`, with weights `[L, T]` of each group."""
        self._drop_second()
        columns = self._result_memory()
        if columns:
            combine_groups_into(weights, Grouped(self._gradients, groups, weights.shape[0]), columns)
        return self._updates(columns)

    def update(self, method: Method, seen: Seen) -> tuple[Tensor, Tensor | None, Tensor | None, Updates]:
        """Gram matrix, weights and updates by a method that makes them itself; without weights the squared norm of the
        update, `[1, 1]`, too."""
        self._drop_second()
        columns = self._result_memory()
        with without_autocast(self.device.type):
            gram, weights = method.update(self._gradients, columns, seen)
            if self.poison is not None:
                for column in columns:
                    column.add_(self.poison)
            square = None
            if weights is None and columns:
                square = gram_rows(GradientRows(columns, list(range(len(columns))), 1, len(columns)))
            elif weights is None:
                square = torch.zeros(1, 1, dtype=torch.float64, device=self.device)
        return gram.to(self.device), weights, square, self._updates(columns)

    def split(self, parts: Mapping[str, Sequence[int]]) -> list[TaskGradients]:
        """The same task gradients, a part for each of these lists of positions among the parameters; used up. Tasks are
        named for their part too, since what a method keeps of a task it keeps for each part."""
        n, num_rows = len(self._params), self._all.num_tasks
        rows: list[Row] = [[None] * n for _ in range(num_rows)]
        for position, g in zip(self._all.index, self._all.tensors, strict=True):
            rows[position // n][position % n] = g
        self._all.tensors.clear()
        self._gradients.tensors.clear()
        found = []
        for name, positions in parts.items():
            part = TaskGradients(
                [self._params[i] for i in positions],
                [[row[i] for i in positions] for row in rows],
                {},
                [f"{name}/{task}" for task in self.names],
                self.present,
                self.device,
                poison=self.poison,
                references=self._references,
                receivers=[self._receivers[i] for i in positions],
                partitioned=self.partitioned,
            )
            found.append(part)
        found[0]._unshared = self._unshared
        return found

    @property
    def receivers(self) -> Sequence[Tensor]:
        """What the updates of the shared parameters are for."""
        return self._receivers

    def _drop_second(self) -> None:
        """Lets go of a second batch's gradients, which only the Gram matrix is made of."""
        if self._all is not self._gradients:
            self._all.tensors.clear()
            self._all = self._gradients

    def _result_memory(self) -> list[Tensor]:
        """For each parameter with a gradient its first task's, to be overwritten, if nobody else holds it; else new
        memory, which would add P to the peak, and whose first touch on a CPU costs as much as the combine itself."""
        tensors, n = self._gradients.tensors, len(self._params)
        first: dict[int, int] = {}
        for k, position in enumerate(self._gradients.index):
            first.setdefault(position % n, k)
        kept: set[int] = set()
        alone = references_alone() + self._references
        memory = []
        for i, k in sorted(first.items()):
            p, g = self._params[i], tensors[k]
            # of a complex gradient g is a view, of which nobody else knows
            if not self._receivers[i].is_complex() and sys.getrefcount(g) <= alone and can_keep(p, g, kept):
                memory.append(g)
            else:
                memory.append(torch.empty_like(p, dtype=g.dtype))
        return memory

    def _updates(self, columns: list[Tensor]) -> Updates:
        """Lets go of all that it holds: whoever writes an update asks whether others do."""
        with_gradient = present_params(self._gradients.index, len(self._params))
        receivers = [self._receivers[i] for i in with_gradient]
        updates = [
            (p, torch.view_as_complex(column) if p.is_complex() else column)
            for p, column in zip(receivers, columns, strict=True)
        ]
        updates.extend(self._unshared.items())
        self._gradients.tensors.clear()
        self._unshared.clear()
        return updates
