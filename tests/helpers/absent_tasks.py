"""Every layer with parts of tasks under DDP, where each rank has samples of other tasks in each step."""

from __future__ import annotations

import functools
import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

import fastmtl
from fastmtl import nn as fnn

NAMES = ("a", "b", "c", "d")
MODES: dict[str, dict[str, bool]] = {
    "plain": {},
    "find_unused": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
}
# a way to take a step, and the modes in which torch lets a network of one's own do so; see docs/guides/distributed.md
WAYS: dict[str, tuple[str, ...]] = {
    "backward()": tuple(MODES),
    "bucket views": tuple(MODES),
    "a rank without samples": tuple(MODES),
    "no_sync": ("plain", "find_unused"),
    "no_sync later": ("static_graph",),
    "checkpoint": tuple(MODES),
    "reentrant checkpoint": ("plain", "static_graph"),
    "fastmtl.backward": tuple(MODES),
}
CASES = [(way, mode) for way, modes in WAYS.items() for mode in modes]
ON_FOUR = [(way, mode) for way, mode in CASES if way == "backward()"]


class EveryLayer(nn.Module):
    """Layers side by side, behind one that all tasks share; heads of any kind need a sample on every rank."""

    def __init__(self, reentrant: bool | None = None, any_heads: bool = True) -> None:
        super().__init__()
        self.reentrant = reentrant
        both: dict[str, Any] = {"gate": 0.5, "per_task_bias": True}
        sizes = {"a": 2, "b": 1, "c": 3, "d": 2}
        self.front = nn.Linear(4, 4)
        self.rows = nn.ModuleList([
            fnn.TaskLinear(4, 3, NAMES), fnn.TaskLinear(4, 3, NAMES, **both), fnn.TaskLinear(4, 3, NAMES, rank=2),
            fnn.TaskLinear(4, 3, NAMES, rank=2, **both), fnn.TaskLinear(4, 3, NAMES, shared=False),
            fnn.TaskLinear(4, 3, NAMES, gate=fnn.TapsGate(), per_task_bias=True), fnn.TaskConv1D(4, 3, NAMES, **both),
            fnn.TaskLayerNorm(4, NAMES), fnn.TaskRMSNorm(4, NAMES), fnn.TaskHeads(4, dict.fromkeys(NAMES, 2)),
            fnn.TaskHeads(4, sizes, output="padded", fill=0.0), fnn.TaskHeads(4, sizes, output="list"),
            fnn.TaskModulator(nn.Linear(4, 3), NAMES), fnn.TaskHyperGrid(nn.Linear(4, 4), NAMES),
            # all closed: a pass without gradients runs the plain layer
            fnn.TaskLinear(4, 3, NAMES, gate=fnn.TapsGate(threshold=9.0)),
        ])  # fmt: skip
        self.pictures = nn.ModuleList([
            fnn.TaskConv2d(1, 2, 2, NAMES), fnn.TaskConv2d(1, 2, 2, NAMES, **both),
            fnn.TaskConv2d(1, 2, 2, NAMES, rank=1), fnn.TaskConv2d(1, 2, 2, NAMES, rank=1, **both),
            fnn.TaskConv2d(1, 2, 2, NAMES, shared=False), fnn.TaskBatchNorm2d(1, NAMES).eval(),
            fnn.TaskScaleShift(1, NAMES), fnn.TaskModulator(nn.Conv2d(1, 2, 2), NAMES),
        ])  # fmt: skip
        self.tables = nn.ModuleList([
            fnn.TaskEmbedding(6, 2, NAMES), fnn.TaskEmbedding(6, 2, NAMES, padding_idx=0, gate=0.5),
            fnn.TaskEmbedding(6, 2, NAMES, shared=False),
        ])  # fmt: skip
        attention = nn.MultiheadAttention(2, 1, batch_first=True)
        self.attention = fnn.TaskMultiheadAttention.from_layer(attention, NAMES, **both)
        heads = {name: nn.Sequential(nn.Linear(4, 2), nn.Tanh()) for name in NAMES if any_heads}
        self.any_heads = nn.ModuleList(
            fnn.TaskHeads.from_modules({n: nn.Sequential(*h) for n, h in heads.items()}, output)
            for output in (None, "list") if any_heads
        )  # fmt: skip

    def forward(self, x: Tensor) -> list[Any]:
        """Results of all samples, and lists with those of each task."""
        if self.reentrant is None:
            found = self._run(x)
        elif self.reentrant:
            found = checkpoint(self._run, x.requires_grad_(), use_reentrant=True)
        else:
            found = checkpoint(self._run, x, use_reentrant=False, context_fn=fnn.checkpoint_contexts)
        size = len(NAMES)
        begin = len(found) - size * sum(is_heads(m) and m.output == "list" for m in (*self.rows, *self.any_heads))
        return [*found[:begin], *(found[k : k + size] for k in range(begin, len(found), size))]

    def _run(self, x: Tensor) -> tuple[Tensor, ...]:
        h, tokens = self.front(x), (10 * x[:, :3]).long() % 6
        folded = h.unflatten(1, (2, 2))
        found = [layer(h) for layer in (*self.rows, *self.any_heads)]
        found += [layer(folded[:, None]) for layer in self.pictures]
        found += [layer(tokens) for layer in self.tables]
        found.append(self.attention(folded, folded, folded)[0])
        flat = [y for some in found if isinstance(some, list) for y in some]
        return *(y for y in found if not isinstance(y, list)), *flat


def is_heads(layer: nn.Module) -> bool:
    return isinstance(layer, fnn.TaskHeads)


def net(way: str) -> EveryLayer:
    torch.manual_seed(3)
    reentrant = {"checkpoint": False, "reentrant checkpoint": True}.get(way)
    model = EveryLayer(reentrant, any_heads=way != "a rank without samples").double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def ids_of(way: str, size: int) -> list[list[list[int]]]:
    """The tasks of each rank's samples, by step: of all ranks, one, none; some come and go."""
    last = size - 1
    some = [
        [[0, 0, *([1] * (r == 0)), *([2] * (r == last))] for r in range(size)],
        [[3, 3] if r == 0 else [0, 2] for r in range(size)],
        [[1, 0] if r == last else [2, 2] for r in range(size)],
    ]
    if way == "a rank without samples":
        return [[[] if r == 0 else [0, 1] for r in range(size)], [[2, 2] if r == 0 else [] for r in range(size)], *some]
    chosen = random.Random(size)
    drawn = [[[chosen.randrange(4) for _ in range(chosen.randint(1, 3))] for _ in range(size)] for _ in range(4)]
    return [*some, *(drawn if way == "backward()" else [])]


def batch(ids: list[int], step: int, rank: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(len(ids), 4, generator=torch.Generator().manual_seed(100 * step + rank)).double()
    return x, torch.tensor(ids, dtype=torch.int64)


def losses(model: nn.Module, x: Tensor, ids: Tensor) -> list[Tensor | None]:
    """A sum over each task's samples; None: it has none."""
    with fnn.tasks(ids):
        found = model(x)
    return [
        sum((0.3 * t - (y[ids == t] if isinstance(y, Tensor) else y[t])).square().sum() for y in found)
        if (ids == t).any()
        else None
        for t in range(len(NAMES))
    ]


def backward(model: nn.Module, x: Tensor, ids: Tensor, scale: float) -> None:
    if len(ids):
        loss = sum(loss for loss in losses(model, x, ids) if loss is not None)
    else:
        with fnn.tasks(ids):  # zero, and yet every result's
            loss = sum(y.sum() for some in model(x) for y in ([some] if isinstance(some, Tensor) else some))
    with fnn.tasks(ids):  # a reentrant checkpoint asks again
        (loss * scale).backward()


def step(way: str, number: int, model: nn.Module, x: Tensor, ids: Tensor, scale: float) -> None:
    if way.startswith("no_sync") and isinstance(model, DDP) and (number or way == "no_sync"):
        with model.no_sync():
            backward(model, x[:1], ids[:1], scale)
        x, ids = x[1:], ids[1:]
    if way == "fastmtl.backward":
        given = [None if loss is None else loss * scale for loss in losses(model, x, ids)]
        fastmtl.backward(given, model, method="sum")
    else:
        backward(model, x, ids, scale)


def train(way: str, mode: str | None, rank: int, size: int) -> list[dict[str, Tensor | None]]:
    """The gradients of each step; of one process that has the whole batch if `mode` is None."""
    model = net(way)
    if mode is None:
        wrapped: nn.Module = model
    else:
        wrapped = DDP(model, **MODES[mode], gradient_as_bucket_view=way == "bucket views")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    found = []
    for number, ids in enumerate(ids_of(way, size)):
        optimizer.zero_grad()
        parts = [batch(some, number, r) for r, some in enumerate(ids)]
        if mode is None:
            step(way, number, wrapped, *(torch.cat(some) for some in zip(*parts, strict=True)), 1 / size)
        else:
            step(way, number, wrapped, *parts[rank], 1.0)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        found.append({n: None if p.grad is None else p.grad.clone() for n, p in trained.items()})
        optimizer.step()
    return found


@functools.cache
def of_one_process(way: str, size: int) -> list[dict[str, Tensor | None]]:
    return train(way, None, 0, size)
