"""The sort of a batch by task, as one launch for batches of ordinary size."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmtl.kernels.common.build_target import BuildTarget, as_target
from fastmtl.kernels.common.launches import launch, recording

# beyond either a radix sort is less work: here each task reads all ids, twice
MAX_IDS = 16384
MAX_TASKS = 1024


@triton.jit(do_not_specialize=["num_ids", "num_tasks"])
def task_plan_kernel(p_ids, p_order, p_offsets, num_ids, num_tasks, BLOCK: tl.constexpr):
    """Program t of T + 1 finds where task t begins and lists its samples; T stands for ids out of range."""
    task = tl.program_id(0)
    b_before = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, num_ids, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        # what lies past the end counts as later than every task
        ids = tl.load(p_ids + at, mask=at < num_ids, other=-1)
        ids = tl.where((ids < 0) | (ids >= num_tasks), num_tasks, ids)
        b_before += ((ids < task) & (at < num_ids)).to(tl.int32)
    first = tl.sum(b_before, axis=0)
    tl.store(p_offsets + task, first.to(tl.int64))
    for begin in range(0, num_ids, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        ids = tl.load(p_ids + at, mask=at < num_ids, other=-1)
        ids = tl.where((ids < 0) | (ids >= num_tasks), num_tasks, ids)
        mine = (ids == task) & (at < num_ids)
        rank = tl.cumsum(mine.to(tl.int32), axis=0)
        tl.store(p_order + first + rank - 1, at.to(tl.int64), mask=mine)
        first += tl.sum(mine.to(tl.int32), axis=0)


def task_plan(task_ids: Tensor, num_tasks: int) -> tuple[Tensor, Tensor]:
    """`order [N]` and `offsets [T + 1]`, int64; samples whose id is out of range come last."""
    ids = task_ids.reshape(-1).contiguous()
    num_ids = ids.shape[0]
    if num_ids > MAX_IDS or num_tasks > MAX_TASKS:
        return _sorted(ids, num_tasks)
    order = torch.empty(num_ids, dtype=torch.int64, device=ids.device)
    offsets = torch.empty(num_tasks + 1, dtype=torch.int64, device=ids.device)
    block, num_warps = (1024, 4) if num_ids <= 1024 else (4096, 8)
    launch(
        task_plan_kernel,
        (num_tasks + 1,),
        num_warps=num_warps,
        p_ids=ids,
        p_order=order,
        p_offsets=offsets,
        num_ids=num_ids,
        num_tasks=num_tasks,
        BLOCK=block,
    )
    return order, offsets


def _sorted(ids: Tensor, num_tasks: int) -> tuple[Tensor, Tensor]:
    # a radix sort of 32-bit keys is half the passes of one of 64-bit keys
    keys = torch.where((ids < 0) | (ids >= num_tasks), num_tasks, ids).to(torch.int32)
    keys, order = torch.sort(keys, stable=True)
    return order, torch.searchsorted(keys, torch.arange(num_tasks + 1, dtype=torch.int32, device=ids.device))


def build_targets() -> Iterator[BuildTarget]:
    """Every configuration that `task_plan` launches."""
    for dtype in (torch.int64, torch.int32):
        for num_ids in (1, MAX_IDS):
            with recording() as launches:
                task_plan(torch.empty(num_ids, dtype=dtype, device="meta"), 8)
            (made,) = launches
            name = f"task_plan_kernel-{made.arguments['BLOCK']}-{dtype.itemsize * 8}-bit-ids"
            yield as_target(name, made, dtype, num_ids == MAX_IDS, False, False)
