"""What each rank runs for `tests/nn/test_converted_ddp.py`: converted networks, of which each rank has other tasks."""

from __future__ import annotations

import contextlib
import datetime
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import task_models
import torch
import torch.distributed as dist
from task_models import NAMES, move
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import fastmtl
from fastmtl.nn import convert, param_groups, tasks

TIMEOUT = datetime.timedelta(seconds=60)
PCGRAD = fastmtl.methods.PCGrad(order=torch.tensor([[2, 1, 0], [0, 2, 1], [1, 0, 2]]))
STEPS = 3
# which tasks each rank's samples have, by network: statistics of batch norms are those of a rank
IDS: dict[str, list[list[int]]] = {
    "resnet": [[1, 0, 0, 1], [2, 2, 2]],
    "encoder": [[1, 0, 0, 1], [2, 1, 2]],
    # in the end the first rank has one task, and nobody the second
    "few": [[0, 0], [2, 0, 2]],
}
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "resnet": ("resnet", "taps", {"joint": True}),
    "encoder": ("encoder", "lora", {"joint": True, "rank": 2}),
    "few": ("encoder", "dense", {"per_task_bias": True}),
}


def net(name: str) -> nn.Module:
    network, kind, options = KINDS[name]
    model = convert(task_models.make(network).model, NAMES, kind, **options).double()
    move(model)
    return model.train(network == "resnet")


def batch(name: str, step: int, rank: int | None) -> tuple[Tensor, Tensor]:
    """Pictures and their tasks, of one rank or of all; the tasks of a rank stay, and the pictures are new."""
    found = []
    for r, ids in enumerate(IDS[name]):
        generator = torch.Generator().manual_seed(10 * step + r)
        size = 8 if KINDS[name][0] == "resnet" else 16
        found.append((torch.randn(len(ids), 3, size, size, generator=generator).double(), torch.tensor(ids)))
    if rank is not None:
        return found[rank]
    return torch.cat([x for x, _ in found]), torch.cat([ids for _, ids in found])


def each_loss(model: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
    return (model(x) - 3.0 * (-1.0) ** ids.double()[:, None]).square().mean(1)


# --- a step by each way; `scale` makes the loss of one process the mean over the ranks


def plain(model: Any, x: Tensor, ids: Tensor, scale: float) -> None:
    with tasks(ids):
        (each_loss(model, x, ids).sum() * scale).backward()


def by_backward(model: Any, x: Tensor, ids: Tensor, scale: float) -> None:
    with tasks(ids):
        each = each_loss(model, x, ids) * scale
    losses = {name: each[ids == t].sum() if (ids == t).any() else None for t, name in enumerate(NAMES)}
    fastmtl.backward(losses, model, method=PCGRAD)


def by_bank(model: Any, x: Tensor, ids: Tensor, scale: float) -> None:
    bank = fastmtl.GradientBank(model, NAMES)
    for t, name in enumerate(NAMES):
        if (ids == t).any():
            with bank.task(name), tasks(name), model.no_sync() if isinstance(model, DDP) else contextlib.nullcontext():
                (each_loss(model, x[ids == t], ids[ids == t]).sum() * scale).backward()
    bank.apply(PCGRAD)


def by_one_pass(model: Any, x: Tensor, ids: Tensor, scale: float) -> None:
    target = 3.0 * (-1.0) ** ids.double()[:, None]
    with tasks(ids), fastmtl.one_pass(model, ids, NAMES) as bank:
        ((model(x) - target).square().mean(1).sum() * scale).backward()
    bank.apply(PCGRAD)


WAYS: dict[str, Callable[[Any, Tensor, Tensor, float], None]] = {
    "plain": plain,
    "backward": by_backward,
    "bank": by_bank,
    "one_pass": by_one_pass,
    "one_pass, static graph": by_one_pass,
}


def trained(name: str, way: str, rank: int | None, size: int) -> dict[str, Tensor | None]:
    """Parameters after some steps, and the last gradients; of one process on all samples if `rank` is None."""
    model = net(name)
    # the statistics of a task that the first rank does not have would be lost otherwise
    settings = {"static_graph": True} if "static" in way else {"find_unused_parameters": True}
    wrapped = model if rank is None else DDP(model, broadcast_buffers=False, **settings)
    optimizer = torch.optim.SGD(param_groups(model), lr=0.05, momentum=0.9, weight_decay=0.01)
    for step in range(STEPS):
        optimizer.zero_grad()
        x, ids = batch(name, step, rank)
        WAYS[way](wrapped, x, ids, 1.0 if rank is not None else 1 / size)
        optimizer.step()
    found: dict[str, Tensor | None] = {n: p.detach() for n, p in model.named_parameters()}
    return found | {f"{n}.grad": p.grad for n, p in model.named_parameters()}


def cases() -> Iterator[tuple[str, str]]:
    for name in IDS:
        for way in WAYS:
            if name == "few" or "static" not in way:
                yield name, way


def main(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # and memory from torch.empty is NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    path = Path(folder)
    dist.init_process_group("gloo", init_method=f"file://{path}/meeting", rank=rank, world_size=size, timeout=TIMEOUT)
    found: dict[tuple[str, str], Any] = {}
    for case in cases():
        try:
            found[case] = trained(*case, rank, size)
        except Exception:
            found[case] = f"rank {rank} failed:\n{traceback.format_exc()}"
    torch.save(found, path / f"found{rank}")
    dist.destroy_process_group()
