"""Cases of suite `conv` for low-rank deltas: `task_lora` beside the loop over adapters and beside deltas in full."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtl import ops
from fastmtl.benchmarks.runner.registry import Candidate, Case, Check
from fastmtl.benchmarks.suites.conv_check import error, largest
from fastmtl.benchmarks.suites.conv_shapes import LAYERS, SHORT, Direction, Layer, dtype_name, random_ids
from fastmtl.core.task_weights import LowRankDeltas, SortedBatch, TaskLoraCall
from fastmtl.ops import TaskPlan
from fastmtl.ops.task_weights import reference

SCALING = 0.5


@dataclass(frozen=True)
class LoraSpec:
    """What tells one case of `task_lora` from another.

    Args:
        layer, num_tasks, batch, direction, dtype: as in `conv_shapes.Spec`.
        ranks: of the tasks, in turn.
        sort: whether the ids come sorted by task.
        train_weight: W gets a gradient too; as adapters are trained it is frozen.
        packed: an id per token, not per sample.
        quick: belongs to the telling few.
    """

    layer: Layer
    num_tasks: int
    batch: int
    direction: Direction = "both"
    dtype: torch.dtype = torch.float32
    ranks: tuple[int, ...] = (16,)
    sort: bool = False
    train_weight: bool = False
    packed: bool = False
    quick: bool = False

    @property
    def ids_shape(self) -> tuple[int, ...]:
        return (self.batch, self.layer.size) if self.packed else (self.batch,)

    @property
    def name(self) -> str:
        marks = ["sorted" if self.sort else "unsorted", *(["packed"] if self.packed else [])]
        marks += ["W trained"] if self.train_weight else []
        rank = "/".join(map(str, self.ranks))
        head = f"{self.layer.name} {SHORT[self.direction]} T={self.num_tasks} B={self.batch} r={rank}"
        return f"task_lora {head} {dtype_name(self.dtype)} {', '.join(marks)}"

    @property
    def samples_bytes(self) -> int:
        """Of x and y."""
        layer = self.layer
        return self.batch * layer.size * (layer.cin + layer.cout) * self.dtype.itemsize

    @property
    def factor_bytes(self) -> int:
        """Of A and B of the tasks that have samples."""
        present = set(random_ids(self.num_tasks, self.ids_shape, sort=self.sort).flatten().tolist())
        ranks = sum(self.ranks[t % len(self.ranks)] for t in present)
        return ranks * (self.layer.cin + self.layer.cout) * self.dtype.itemsize


@dataclass
class LoraBatch:
    """A layer, its low-rank deltas and a mixed-task batch. What loops need of the ids is worked out once."""

    x: Tensor
    weight: Tensor
    A: list[Tensor]
    B: list[Tensor]
    ids: Tensor
    grad_out: Tensor
    sorted: bool
    plan: TaskPlan = field(init=False)
    rows: dict[int, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.plan = ops.task_plan(self.ids, len(self.A))
        bounds = enumerate(itertools.pairwise(self.plan.offsets.tolist()))
        self.rows = {t: self.plan.order[begin:end] for t, (begin, end) in bounds if end > begin}

    @property
    def samples(self) -> Tensor:
        """x with one dimension for all that has an id of its own."""
        return self.x.flatten(0, self.ids.dim() - 1) if self.ids.dim() > 1 else self.x

    def like_y(self, y: Tensor) -> Tensor:
        return y.view(*self.x.shape[:-1], -1)

    @property
    def leaves(self) -> list[Tensor]:
        return [w for w in (self.x, self.weight, *self.A, *self.B) if w.requires_grad]


def make_batch(spec: LoraSpec, device: torch.device) -> LoraBatch:
    """Random inputs; what trains asks for a gradient."""
    layer = spec.layer

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, dtype=spec.dtype, device=device).mul_(scale)

    ranks = [spec.ranks[t % len(spec.ranks)] for t in range(spec.num_tasks)]
    batch = LoraBatch(
        x=draw(spec.batch, layer.size, layer.cin),
        weight=draw(layer.cout, layer.cin, scale=layer.cin**-0.5),
        A=[draw(r, layer.cin, scale=layer.cin**-0.5) for r in ranks],
        B=[draw(layer.cout, r, scale=r**-0.5) for r in ranks],
        ids=random_ids(spec.num_tasks, spec.ids_shape, sort=spec.sort).to(device),
        grad_out=draw(spec.batch, layer.size, layer.cout),
        sorted=spec.sort,
    )
    if spec.direction != "forward":
        for leaf in (batch.x, *batch.A, *batch.B, *([batch.weight] if spec.train_weight else [])):
            leaf.requires_grad_()
    return batch


# --- candidates


def ours(b: LoraBatch) -> Tensor:
    return ops.task_lora(b.x, b.weight, b.A, b.B, b.plan, scaling=SCALING)


def shared(b: LoraBatch) -> Tensor:
    """W alone: what the work would cost without tasks."""
    return F.linear(b.x, b.weight)


def adapter(b: LoraBatch) -> Tensor:
    """As PEFT serves a mixed batch: W on all rows, then each task's two products on its own, added in their place."""
    x, y = b.samples, F.linear(b.samples, b.weight)
    for t, rows in b.rows.items():
        y = y.index_add(0, rows, F.linear(F.linear(x[rows], b.A[t]), b.B[t]) * SCALING)
    return b.like_y(y)


def adapter_inplace(b: LoraBatch) -> Tensor:
    """The same, added in place."""
    x, y = b.samples, F.linear(b.samples, b.weight)
    for t, rows in b.rows.items():
        y.index_add_(0, rows, F.linear(F.linear(x[rows], b.A[t]), b.B[t]), alpha=SCALING)
    return b.like_y(y)


def masked(b: LoraBatch) -> Tensor:
    """All tasks' factors side by side: one product, of which each row keeps its own task's part, and another."""
    x, y = b.samples, F.linear(b.samples, b.weight)
    owner = torch.arange(len(b.A), device=x.device).repeat_interleave(
        torch.tensor([a.shape[0] for a in b.A], device=x.device), output_size=sum(a.shape[0] for a in b.A)
    )
    keep = (b.ids.flatten()[:, None] == owner).view(x.shape[0], *[1] * (x.dim() - 2), -1)
    z = F.linear(x, torch.cat(b.A)) * keep
    return b.like_y(y + F.linear(z, torch.cat(b.B, 1)) * SCALING)


def gathered(b: LoraBatch) -> Tensor:
    """A pair of factors per sample and two batched products; of one rank."""
    x, ids = b.samples, b.ids.flatten()
    x = x if x.dim() == 3 else x[:, None]
    z = torch.bmm(x, torch.stack(b.A)[ids].mT)
    return F.linear(b.x, b.weight) + b.like_y(torch.bmm(z, torch.stack(b.B)[ids].mT) * SCALING)


def dense(b: LoraBatch) -> Tensor:
    """`task_linear`, with the products `B_t A_t` made in full."""
    return ops.task_linear(b.x, b.weight, [v @ u * SCALING for u, v in zip(b.A, b.B, strict=True)], b.plan)


BASELINES: dict[str, tuple[Callable[[LoraBatch], Tensor], str]] = {
    "adapter": (adapter, "W on all rows, then each task's two products on its rows, as adapter libraries do"),
    "adapter_inplace": (adapter_inplace, "the same, added in place"),
    "masked": (masked, "the factors of all tasks side by side, and a mask"),
    "gathered": (gathered, "a pair of factors per sample, two batched products"),
}


def _candidates(spec: LoraSpec) -> tuple[Candidate, ...]:
    def timed(forward: Callable[[LoraBatch], Tensor]) -> Callable[[LoraBatch], Any]:
        if spec.direction == "forward":
            return forward

        def both(b: LoraBatch) -> tuple[Tensor, tuple[Tensor | None, ...]]:
            y = forward(b)
            return y, torch.autograd.grad(y, b.leaves, b.grad_out, allow_unused=True)

        return both

    def shared_both(b: LoraBatch) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        y = shared(b)
        return y, torch.autograd.grad(y, [w for w in (b.x, b.weight) if w.requires_grad], b.grad_out)

    found = [
        Candidate("ours", timed(ours), "fastmtl.ops.task_lora, lists, plan given", "ours", graph=True),
        Candidate("shared", shared if spec.direction == "forward" else shared_both, "W alone", "yardstick", graph=True),
    ]
    detail = "`task_linear`, with the products of the factors made in full"
    found.append(Candidate("dense", timed(dense), detail, "yardstick", graph=True))
    for label, (forward, detail) in BASELINES.items():
        if label == "gathered" and (len(spec.ranks) > 1 or spec.packed):
            continue
        found.append(Candidate(label, timed(forward), detail, graph=True))
    return tuple(found)


def oracle_errors(b: LoraBatch, y: Tensor, grads: Sequence[Tensor | None]) -> list[Tensor]:
    """Of y and of the gradients of `b.leaves`, against the oracle in float64."""
    tasks = list(range(len(b.A)))
    A, B = ([w.detach().double() for w in held] for held in (b.A, b.B))
    deltas = LowRankDeltas(A, B, tasks, torch.full((len(tasks),), SCALING, dtype=torch.float64, device=b.x.device))
    call = TaskLoraCall(b.weight.detach().double(), deltas, SortedBatch(b.plan.order, b.plan.offsets), None)
    x = b.x.detach().double()
    with torch.no_grad():
        errors = [error(y, reference.task_lora(x, call))]
        if grads:
            wanted = [True, b.weight.requires_grad, False, False]
            expected = reference.task_lora_backward(b.grad_out.double(), x, call, wanted, tasks, tasks)
            errors += [error(g, e) for g, e in zip(grads, expected, strict=True)]
    return errors


def lora_case(spec: LoraSpec) -> Case:
    """Forward, or forward and backward, of `task_lora`."""

    def check(b: LoraBatch, call: Callable[[Any], Any]) -> Check:
        y, grads = (call(b), ()) if spec.direction == "forward" else call(b)
        return largest(oracle_errors(b, y, grads), spec.dtype, b.x.device, "float64 oracle on the timed inputs")

    layer = spec.layer
    # forward reads the factors; backward reads them for dx and writes their gradients
    passes = 1 if spec.direction == "forward" else 3
    return Case(
        suite="conv",
        name=spec.name,
        op="task_lora",
        covers=frozenset({"task_lora"}),
        params={
            "layer": layer.name,
            "N": spec.batch,
            "Cin": layer.cin,
            "H": 1,
            "W": layer.size,
            "Cout": layer.cout,
            "ranks": list(spec.ranks),
            "T": spec.num_tasks,
            "B": spec.batch,
            "dtype": dtype_name(spec.dtype),
            "direction": spec.direction,
            "sorted": spec.sort,
            "layout": "rows",
            "ids": "per token" if spec.packed else "per sample",
            "W trained": spec.train_weight,
        },
        make=lambda device: make_batch(spec, device),
        candidates=_candidates(spec),
        check=check,
        input_bytes=spec.samples_bytes + spec.factor_bytes + layer.cin * layer.cout * spec.dtype.itemsize,
        moved={"floor": passes * spec.factor_bytes},
        floor_from="shared",
        quick=spec.quick,
    )


def cases(gpu: bool) -> list[Case]:
    """The rows of `task_lora`; on a GPU larger batches in bfloat16."""
    qkv, proj, fc1, fc2 = (LAYERS[f"ViT-B {name}"] for name in ("qkv", "proj", "fc1", "fc2"))
    dtype, batch = (torch.bfloat16, 64) if gpu else (torch.float32, 8)

    def at(layer: Layer, num_tasks: int, **more: Any) -> LoraSpec:
        return LoraSpec(layer, num_tasks, more.pop("batch", batch), **{"dtype": dtype, **more})

    specs = [
        at(proj, 8, quick=True),
        at(proj, 8, sort=True),
        at(proj, 8, direction="forward"),
        at(proj, 8, ranks=(4, 8, 64)),
        at(proj, 8, packed=True),
        at(proj, 8, train_weight=True),
        at(proj, 32, batch=4 * batch),
        at(qkv, 8),
        at(fc1, 8),
        at(fc2, 8),
        at(fc1, 8, ranks=(64,)),
    ]
    if gpu:
        specs += [
            at(proj, 50, batch=256),
            at(proj, 8, dtype=torch.float32),
            at(fc1, 8, direction="forward", quick=True),
        ]
    return [lora_case(spec) for spec in specs]
