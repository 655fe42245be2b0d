"""The task of each sample of a batch, of a part of it, or of several parts that were joined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmtl.ops.task_weights.task_plan import task_plan_op


class TaskIds:
    """The tasks of the samples that a tensor carries, in their order.

    Args:
        ids: `[n]` int64 rows of the bank: 0 to T - 1, or T for samples that belong to no task.
        num_rows: T, or T + 1 where there may be samples without a task.
        key: tells two of these apart: equal keys, equal samples.
        plan: order and offsets of `ids` sorted by row, where that is known already.
        parent: the batch that this is a part of.
        parts: what this was joined from.
        partial: some positions carry no sample: what lies there is constant, and their id means nothing.

    Attributes:
        count: n.
        assumed: the dimension of tensors from outside that is taken for that of the samples, where nothing but its size
            says that a tensor carries them; else None.
    """

    def __init__(
        self,
        ids: Tensor,
        num_rows: int,
        key: tuple[Any, ...],
        plan: tuple[Tensor, Tensor] | None = None,
        parent: TaskIds | None = None,
        parts: Sequence[TaskIds] = (),
        partial: bool = False,
    ) -> None:
        self.ids = ids
        self.count = ids.shape[0]
        self.num_rows = num_rows
        self.key = key
        self.parent = parent
        self.parts = tuple(parts)
        self.partial = partial
        self.assumed: int | None = None
        self._row: int | None = None
        self._row_known = False
        self._plans: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
        if plan is not None:
            self._plans[1, 1] = (ids, *plan)

    def assume(self, dim: int) -> TaskIds:
        """The same, of tensors whose size along `dim` alone says that they carry the samples."""
        same = TaskIds(self.ids, self.num_rows, self.key, None, self.parent, self.parts, self.partial)
        same.assumed, same._plans = dim, self._plans
        return same

    def __len__(self) -> int:
        return self.count

    @staticmethod
    def of_rows(rows: Tensor, num_rows: int) -> TaskIds:
        """Positions of which each belongs to a row of the bank that the host knows; below 0: to none."""
        none = rows < 0
        partial = bool(none.any())
        ids = torch.where(none, 0, rows) if partial else rows
        return TaskIds(ids, num_rows, ("rows", rows.numpy().tobytes()), partial=partial)

    @staticmethod
    def of_row(row: int, size: int, num_rows: int) -> TaskIds:
        """Positions that all belong to one row of the bank."""
        return TaskIds(torch.full((size,), row), num_rows, ("row", row, size))

    def on_host(self) -> bool:
        """Whether the tasks can be looked at without waiting for a device."""
        return not torch.compiler.is_compiling() and self.ids.device.type == "cpu"

    def single_row(self) -> int | None:
        """The row of the bank that all samples belong to; None: there are several, or the host can't know."""
        if not self.on_host():
            return None
        if not self._row_known:
            self._row_known = True
            if len(self) and not self.partial:
                low, high = self.ids.aminmax()
                self._row = int(low) if int(low) == int(high) else None
        return self._row

    def plan(self, outer: int, inner: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, order and offsets of `outer x n x inner` elements in that order."""
        known = self._plans.get((outer, inner))
        if known is not None:
            return known
        ids = self.ids
        if inner != 1:
            ids = ids[:, None].expand(-1, inner).reshape(-1)
        if outer != 1:
            ids = ids[None].expand(outer, -1).reshape(-1)
        made = (ids, *task_plan_op(ids, self.num_rows))
        if not torch.compiler.is_compiling():  # a graph that wrote here would not fit the next call
            self._plans[outer, inner] = made
        return made

    def meets_others(self, outer: int, inner: int, order: Tensor, offsets: Tensor) -> Tensor:
        """`[]` bool: whether a segment of another plan of `outer x n x inner` elements has those of several rows."""
        ids, _, _ = self.plan(outer, inner)
        known, position = ids[order], torch.arange(order.shape[0], device=order.device)
        begins = offsets[torch.searchsorted(offsets[1:], position, right=True)]
        return (known != known[begins]).any()

    def take(self, index: Any, key: Any) -> TaskIds:
        """Those that an index of the first axis picks; `key` tells this index from others."""
        return TaskIds(self.ids[index], self.num_rows, (*self.key, key), parent=self, partial=self.partial)

    def part(self, start: int, stop: int) -> TaskIds | None:
        """One of the parts that this was joined from, if it lies there."""
        for part in self.parts:
            if start == 0:
                return part if stop == len(part) else None
            start, stop = start - len(part), stop - len(part)
        return None

    @staticmethod
    def join(parts: Sequence[TaskIds]) -> TaskIds:
        """Those of `parts` one after another; slices that make up what they were taken from are that again."""
        parent, end = parts[0].parent, 0
        for p in parts:
            here = ("slice", end, end + len(p), 1)
            if parent is None or p.parent is None or p.parent.key != parent.key or p.key[-1] != here:
                break
            end += len(p)
        else:
            if parent is not None and end == len(parent):
                return parent
        key = ("joined", *[p.key for p in parts])
        partial = any(p.partial for p in parts)
        return TaskIds(torch.cat([p.ids for p in parts]), parts[0].num_rows, key, parts=parts, partial=partial)
