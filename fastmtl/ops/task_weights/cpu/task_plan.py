"""What the host asks of a batch and of gates, on the CPU, in C++: in less time than a small layer takes."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.core.schemas import define_kernel

# whether all ids are those of a task; else nothing is sorted
_plan_kernel = define_kernel("_task_plan(Tensor ids, Tensor(a!) order, Tensor(b!) offsets) -> bool")
# whether all gates are 0, or with a limit all scores below it
all_closed = define_kernel("_all_closed(Tensor[] gates, float? limit) -> bool")


def task_plan(task_ids: Tensor, num_tasks: int) -> tuple[Tensor, Tensor] | None:
    """Positions sorted by task, and where each task begins; None: an id is out of range."""
    order = torch.empty(task_ids.numel(), dtype=torch.int64, device="cpu")
    offsets = torch.empty(num_tasks + 1, dtype=torch.int64, device="cpu")
    return (order, offsets) if _plan_kernel(task_ids.contiguous(), order, offsets) else None
