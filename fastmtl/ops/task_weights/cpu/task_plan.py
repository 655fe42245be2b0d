"""What the host asks of a batch and of gates, on the CPU, in C++: in less time than a small layer takes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastmtl.core.dispatch import extension
from fastmtl.core.schemas import define_kernel

# whether all ids are those of a task; else nothing is sorted
_plan_kernel = define_kernel("_task_plan(Tensor ids, Tensor(a!) order, Tensor(b!) offsets) -> bool")


def task_plan(task_ids: Tensor, num_tasks: int) -> tuple[Tensor, Tensor] | None:
    """Positions sorted by task, and where each task begins; None: an id is out of range."""
    order = torch.empty(task_ids.numel(), dtype=torch.int64, device="cpu")
    offsets = torch.empty(num_tasks + 1, dtype=torch.int64, device="cpu")
    return (order, offsets) if _plan_kernel(task_ids.contiguous(), order, offsets) else None


def all_closed(
    gates: Mapping[str, Tensor | None], names: tuple[str, ...], present: tuple[int, ...], limit: float | None
) -> bool | None:
    """Whether all gates of the tasks that are present are 0, or with a limit all scores below it.

    Not a number is neither.

    None: one can't be read here, because it is parametrised, on another device, or of another dtype than the first; or
    there is no extension.
    """
    return None if extension is None else extension.all_closed(gates, names, present, limit)
