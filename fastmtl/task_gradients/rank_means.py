"""Task gradients of several ranks: their means, or this rank's shards of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastmtl.distributed.averaging import average_gradients
from fastmtl.distributed.dtensors import local
from fastmtl.distributed.ranks import DENSE, Joint, Ranks
from fastmtl.surgery.task_gradients import Row, TaskGradients
from fastmtl.task_gradients.sharing import add_unshared, sparse_shared


def averaged(
    ranks: Ranks,
    joint: Joint,
    shared: Sequence[Tensor],
    held: list[dict[Tensor, Tensor]],
    unshared: dict[Tensor, Tensor],
    named: Mapping[Tensor, str],
    names: Sequence[str],
    device: torch.device,
    references: int = 0,
) -> TaskGradients:
    """The means over the ranks of the task gradients by parameter (`held`) and of the other gradients, in place.

    What `held` has of parameters that turned out not to be shared goes to `unshared`; that of a second batch, whose
    rows stand behind those of the tasks in `names`, is dropped. `references`: to each mean, of a caller that keeps
    `held`.
    """
    for p in shared:
        if joint.kinds[p] - {DENSE}:
            raise sparse_shared(torch.sparse_coo, p, named)
    is_shared = set(shared)
    for row in held[: len(names)]:
        for p, g in row.items():
            if p not in is_shared:
                add_unshared(unshared, p, g)
    average_gradients(ranks, joint, held, unshared, is_shared)
    rows: list[Row] = [[row.get(p) for p in shared] for row in held]
    return TaskGradients(shared, rows, unshared, names, joint.present, device, references=references)


def of_shards(
    shared: Sequence[Tensor],
    rows: list[Row],
    unshared: dict[Tensor, Tensor],
    names: Sequence[str],
    present: Sequence[bool],
    device: torch.device,
    references: int = 0,
) -> TaskGradients:
    """Rows of this rank's shards of the gradients of DTensors, which the updates are for."""
    shards = [local(p) for p in shared]
    return TaskGradients(
        shards, rows, unshared, names, present, device, references=references, receivers=shared, partitioned=True
    )
