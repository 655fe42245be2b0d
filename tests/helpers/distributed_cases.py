"""What each rank runs for `tests/distributed/test_distributed.py`: cases by name, all in one start of the processes.

A case gets its rank and returns what the test compares: tensors by name, or the error of each call. A rank that waits
for another in vain fails after `TIMEOUT`.
"""

from __future__ import annotations

import contextlib
import datetime
import traceback
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import absent_tasks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import fastmtl
from fastmtl import methods
from fastmtl.core.gradient_rows import GradientRows
from fastmtl.distributed.averaging import average_rows
from fastmtl.distributed.wrappers import find_ranks
from fastmtl.methods.state import Field, StatefulMethod
from fastmtl.ops.gradients.gram import gram_rows

TIMEOUT = datetime.timedelta(seconds=20)
ORDER = torch.tensor([[1, 2, 0], [2, 0, 1], [0, 1, 2]])
SEED = 7


def min_norm(gram: Tensor) -> Tensor:
    """The weights on the simplex of the shortest combination (the problem of MGDA), exactly, for a few tasks."""
    m = gram.double()
    best, least = None, None
    for size in range(1, len(m) + 1):
        for some in combinations(range(len(m)), size):
            w = torch.linalg.lstsq(m[list(some)][:, list(some)], torch.ones(size, 1, dtype=m.dtype)).solution[:, 0]
            w = w / w.sum()
            full = torch.zeros(len(m), dtype=m.dtype)
            full[list(some)] = w
            if (w >= 0).all() and (least is None or full @ m @ full < least):
                best, least = full, full @ m @ full
    assert best is not None
    return best


METHODS: dict[str, Any] = {
    "fixed": methods.PCGrad(order=ORDER),
    "random": "pcgrad",  # rank 0 is seeded as one process is, the others in their own way
    "min_norm": min_norm,
    "random_weights": "randomweights",
}


class Net(nn.Module):
    """A trunk and three heads; 6 rows over 4 ranks are uneven shards."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(6, 2) for _ in range(3))

    def forward(self, x: Tensor, tasks: Sequence[int] = (0, 1, 2), features: bool = False) -> list[Any]:
        h = self.trunk(x)
        # no loss uses the first
        out = [len(x), *(self.heads[t](h) for t in tasks)]
        return [*out, h] if features else out


def net(seed: int = 19, cls: type[nn.Module] = Net) -> Any:
    # a seed for which all tasks conflict, so that another order is another result
    torch.manual_seed(seed)
    return cls()


def batch(rank: int, size: int, seed: int = 1, n: int = 8) -> Tensor:
    """This rank's part of the batch."""
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))
    return x.chunk(size)[rank]


def loss_of(t: int, out: Tensor) -> Tensor:
    # pulled to opposite targets, so that tasks conflict
    return F.mse_loss(out, torch.full_like(out, 3.0 * (-1) ** t))


def losses_of(outs: Sequence[Any]) -> list[Tensor]:
    return [loss_of(t, out) for t, out in enumerate(outs[1:4])]


def whole(x: Tensor | None) -> Tensor | None:
    if x is None:
        return None
    return x.full_tensor().clone() if hasattr(x, "full_tensor") else x.detach().clone()


def seen(model: nn.Module, surgery: fastmtl.Surgery | None = None) -> dict[str, Any]:
    """Gradients, whole, and what the surgery saw."""
    grads = {n.removeprefix("module."): whole(p.grad) for n, p in model.named_parameters()}
    if surgery is None:
        return {"grads": grads}
    return {"grads": grads, "gram": surgery.gram, "weights": surgery.weights, "present": surgery.present}


def seed_for(rank: int) -> None:
    torch.manual_seed(SEED + 100 * rank)


# --- loops that run alike in one process and in several: `wrap` is what makes a model parallel


def by_backward(
    model: Any, rank: int, size: int, method: str, absent: Callable[[int], Sequence[int]] = lambda r: (), **options: Any
) -> dict[str, Any]:
    losses: list[Tensor | None] = [*losses_of(model(batch(rank, size)))]
    for t in absent(rank):
        losses[t] = None
    seed_for(rank)
    surgery = fastmtl.backward(losses, options.pop("params", model), method=METHODS[method], **options)
    return seen(model, surgery)


def by_features(model: Any, rank: int, size: int, method: str, absent: Sequence[int] = ()) -> dict[str, Any]:
    *outs, h = model(batch(rank, size), features=True)
    losses: list[Tensor | None] = [None if t in absent else loss for t, loss in enumerate(losses_of(outs))]
    seed_for(rank)
    # of the trunk, the first layer's bias is to get the plain sum
    inner = getattr(model, "module", model)
    shared = [p for n, p in inner.trunk.named_parameters() if n != "0.bias"]
    surgery = fastmtl.backward(losses, model, features=h, shared=shared, method=METHODS[method])
    return seen(model, surgery)


def by_bank(
    model: Any,
    rank: int,
    size: int,
    method: str,
    *,
    sync: bool = True,
    parts: int = 1,
    tasks: Sequence[int] = (0, 1, 2),
    params: Any = None,
    before: bool = False,
    group: Any = None,
) -> dict[str, Any]:
    bank = fastmtl.GradientBank(model if params is None else params, 3, process_group=group)
    x = batch(rank, size)
    if before:  # gradients that are there already, in DDP's buckets where it has such
        loss_of(0, model(batch(rank, size, seed=2), tasks=[0])[1]).backward()
    for part in x.chunk(parts):
        for t in tasks:
            with bank.task(t):
                if sync:
                    (loss_of(t, model(part, tasks=[t])[1]) / parts).backward()
                else:
                    with model.no_sync():
                        (loss_of(t, model(part, tasks=[t])[1]) / parts).backward()
    seed_for(rank)
    return seen(model, bank.apply(METHODS[method]))


def by_optimizer(model: Any, rank: int, size: int, method: str, **options: Any) -> dict[str, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    seed_for(rank)
    generator = torch.Generator().manual_seed(SEED + rank) if method == "random" else None
    pcgrad = fastmtl.optim.PCGrad(optimizer, generator=generator, **options)
    for step in range(3):
        pcgrad.pc_backward(losses_of(model(batch(rank, size, seed=step))))
        pcgrad.step()
    return {"weights": {n.removeprefix("module."): whole(p) for n, p in model.named_parameters()}, **seen(model)}


def by_every(
    model: Any,
    rank: int,
    size: int,
    method: str = "random",
    *,
    absent: Callable[[int, int], Sequence[int]] = lambda step, r: (),
    features: bool = False,
    forgets: bool = False,
    broken: int | None = None,
    steps: int = 5,
    **options: Any,
) -> dict[str, Any]:
    """Steps of `methods.Every(method, 3)`, each on a batch of its own.

    `absent`: step and rank -> tasks. `forgets`: the last rank's weights are gone after two steps. `broken`: the step at
    which the last rank's first loss is not finite.
    """
    every = methods.Every(methods.get(METHODS[method]), 3)
    seed_for(rank)
    grads: dict[str, Any] = {}
    weights, norms, reused, present = [], [], [], []
    for step in range(steps):
        model.zero_grad()
        if forgets and step == 2 and rank == size - 1:
            every.reset()
        *outs, h = model(batch(rank, size, seed=step), features=True)
        losses: list[Tensor | None] = [*losses_of(outs)]
        if step == broken and rank == size - 1:
            losses[0] = losses[0] * float("inf")
        for t in absent(step, rank):
            losses[t] = None
        given: dict[str, Any] = dict(options)
        if features:
            inner = getattr(model, "module", model)
            shared = [p for n, p in inner.trunk.named_parameters() if n != "0.bias"]
            given |= {"features": h, "shared": shared}
        surgery = fastmtl.backward(losses, given.pop("params", model), method=every, **given)
        found = seen(model)["grads"]
        grads |= {f"{step} {n}": g for n, g in found.items()}
        weights.append(surgery.weights)
        norms.append(surgery.grad_norm())
        reused.append(surgery.reused)
        present.append(surgery.present)
    return {
        "grads": grads,
        "weights": torch.stack(weights),
        "norms": torch.stack(norms),
        "reused": reused,
        "present": present,
    }


class Embedded(nn.Module):
    """A sparse table that no Gram matrix sees, one row per sample; the last task does not use it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4, sparse=True)
        self.trunk = nn.Linear(4, 4)

    def losses(self, rank: int, size: int, absent: Sequence[int]) -> list[Tensor | None]:
        ids = torch.arange(8).chunk(size)[rank]
        x = self.trunk(self.table(ids)).tanh()
        y = self.trunk(batch(rank, size)).tanh()
        losses = [(x - 1).square().mean(), (x + 1).square().mean(), (y - 2).square().mean()]
        return [None if t in absent else loss for t, loss in enumerate(losses)]


def by_sparse(model: Any, rank: int, size: int, absent: Sequence[int], **options: Any) -> dict[str, Any]:
    model.zero_grad()
    surgery = fastmtl.backward(
        model.losses(rank, size, absent), model, shared=model.trunk, method=METHODS["fixed"], **options
    )
    out = seen(model, surgery)
    out["sparse"] = model.table.weight.grad.layout is torch.sparse_coo
    out["grads"]["table.weight"] = model.table.weight.grad.to_dense()
    return out


class Needy(StatefulMethod):
    """Weights of the losses, of a second batch and of what it drew before, which each rank draws in its own way."""

    needs = frozenset({"losses", "second_batch"})

    def __init__(self) -> None:
        super().__init__(drawn=Field(1, 0.0))

    def _weigh(self, gram: Tensor, seen: methods.Seen, present: Tensor | None) -> Tensor:
        drawn = self._state.read(seen.names, gram.device)["drawn"]
        now = torch.rand(len(gram), dtype=torch.float64)
        self._state.keep(seen.names, present, drawn=now)
        return drawn + now + seen.losses + 0.1 * seen.second.sum(1)


class Median(methods.Method):
    """The median of each element: no weighted sum. Plus a number that ranks must agree on."""

    needs = frozenset({"gradients"})

    def update(self, rows: GradientRows, out: Sequence[Tensor], seen: methods.Seen) -> tuple[Tensor, None]:
        gram = seen.total(gram_rows(rows))
        drawn = seen.first(torch.rand(1, dtype=torch.float64))
        n = rows.num_params
        for i, column in zip(sorted({k % n for k in rows.index}), out, strict=True):
            some = [x for x, k in zip(rows.tensors, rows.index, strict=True) if k % n == i]
            column.copy_(torch.stack(some).median(0).values + drawn.to(column.dtype))
        return gram, None


def by_needs(model: Any, rank: int, size: int) -> dict[str, Any]:
    method = Needy()
    seed_for(rank)
    for step in range(2):
        model.zero_grad()
        losses, second = (
            [4.0 * loss for loss in losses_of(model(batch(rank, size, seed=s)))] for s in (1 + step, 5 + step)
        )
        surgery = fastmtl.backward(losses, model, method=method, second_losses=second, loss_scale=4.0)
    state = method.state_dict()
    return {**seen(model, surgery), "names": state["names"], "drawn": state["drawn"]}


def by_needs_of_bank(model: Any, rank: int, size: int) -> dict[str, Any]:
    method = Needy()
    bank, second = (fastmtl.GradientBank(model, 3) for _ in range(2))
    losses = []
    for filled, x in ((bank, batch(rank, size)), (second, batch(rank, size, seed=5))):
        for t in range(3):
            with filled.task(t), model.no_sync() if isinstance(model, DDP) else contextlib.nullcontext():
                loss = loss_of(t, model(x, tasks=[t])[1])
                loss.backward()
                losses.append(loss.detach())
    seed_for(rank)
    surgery = bank.apply(method, losses=losses[:3], second=second)
    return {**seen(model, surgery), "drawn": method.state_dict()["drawn"]}


def by_median(model: Any, rank: int, size: int) -> dict[str, Any]:
    losses = [4.0 * loss for loss in losses_of(model(batch(rank, size)))]
    seed_for(rank)
    surgery = fastmtl.backward(losses, model, method=Median(), loss_scale=4.0)
    assert surgery.weights is None
    return {**seen(model, surgery), "norm": surgery.grad_norm()}


# --- cases


CASES: dict[str, tuple[Callable[[int, int], Any], tuple[int, ...]]] = {}


def case(*sizes: int, name: str | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        CASES[name or function.__name__] = function, sizes or (2, 4)
        return function

    return register


for _way, _mode in absent_tasks.CASES:
    _sizes = (2, 4) if (_way, _mode) in absent_tasks.ON_FOUR else (2,)
    case(*_sizes, name=f"{_way}, {_mode}")(lambda r, n, w=_way, m=_mode: absent_tasks.train(w, m, r, n))
for _m in METHODS:
    case(name=f"backward {_m}")(lambda r, n, m=_m: by_backward(DDP(net()), r, n, m))
    case(name=f"fully_shard backward {_m}")(lambda r, n, m=_m: by_backward(shard(net()), r, n, m))
    case(2, name=f"features {_m}")(lambda r, n, m=_m: by_features(DDP(net()), r, n, m))
for _name, _f in (("needs", by_needs), ("needs of bank", by_needs_of_bank), ("median", by_median)):
    case(name=_name)(lambda r, n, f=_f: f(DDP(net()), r, n))
    case(name=f"fully_shard {_name}")(lambda r, n, f=_f: f(shard(net()), r, n))
for _m in ("fixed", "random", "min_norm"):
    case(2, name=f"bank {_m}")(lambda r, n, m=_m: by_bank(DDP(net()), r, n, m, sync=False))
    case(name=f"fully_shard bank {_m}")(lambda r, n, m=_m: by_bank(shard(net()), r, n, m, parts=2))
for _m in ("fixed", "random"):
    case(name=f"optimizer {_m}")(lambda r, n, m=_m: by_optimizer(d := DDP(net()), r, n, m, params=d))
    case(2, name=f"fully_shard optimizer {_m}")(lambda r, n, m=_m: by_optimizer(d := shard(net()), r, n, m, params=d))


@case(2)
def optimizer_by_process_group(rank: int, size: int) -> Any:
    return by_optimizer(net(), rank, size, "random", process_group=dist.group.WORLD)


@case(2)
def backward_find_unused(rank: int, size: int) -> Any:
    return by_backward(DDP(net(), find_unused_parameters=True), rank, size, "fixed")


@case(2)
def backward_static_graph(rank: int, size: int) -> Any:
    model = DDP(net(), static_graph=True)
    first = by_backward(model, rank, size, "fixed")
    model.zero_grad()
    return {**by_backward(model, rank, size, "fixed"), "first": first["grads"]}


@case(2)
def backward_process_group(rank: int, size: int) -> Any:
    return by_backward(net(), rank, size, "random", process_group=dist.group.WORLD)


@case(2)
def backward_process_group_and_no_params(rank: int, size: int) -> Any:
    return by_backward(net(), rank, size, "random", params=None, process_group=dist.group.WORLD)


@case(2)
def backward_chunks(rank: int, size: int) -> Any:
    return by_backward(DDP(net()), rank, size, "fixed", chunk_size=2)


@case(2)
def backward_loss_scale(rank: int, size: int) -> Any:
    return by_backward(DDP(net()), rank, size, "min_norm", loss_scale=4.0)


@case(2)
def backward_in_many_buckets(rank: int, size: int) -> Any:
    with buckets(100, 1 << 20):
        return by_backward(DDP(net()), rank, size, "fixed")


@case(2)
def backward_in_its_own_memory(rank: int, size: int) -> Any:
    # weights are large, biases small; on rank 1 a task is absent, so that only rank 0 has memory of its own
    with buckets(1 << 20, 40):
        return by_backward(DDP(net()), rank, size, "fixed", lambda r: [2] if r == 1 else [])


@case(2)
def gradients_that_somebody_holds(rank: int, size: int) -> Any:
    held: list[tuple[Tensor, Tensor]] = []
    model = DDP(net())
    model.module.trunk[0].weight.register_hook(lambda g: held.append((g, g.clone())))
    with buckets(1 << 20, 1):
        with model.no_sync():  # else DDP waits for its hooks to run, and complains in the bank's passes
            by_backward(model, rank, size, "fixed")
        bank = fastmtl.GradientBank(model, 3)
        for t in range(3):
            with bank.task(t), model.no_sync():
                loss_of(t, model(batch(rank, size), tasks=[t])[1]).backward()
                held.append((model.module.trunk[2].weight.grad, model.module.trunk[2].weight.grad.clone()))
        bank.apply()
    return [torch.equal(g, copy) for g, copy in held]


@contextlib.contextmanager
def buckets(bucket_bytes: int, large_bytes: int) -> Iterator[None]:
    """Other sizes for all-reduces: many buckets, or gradients reduced in their own memory."""
    d = fastmtl.distributed.averaging
    before = d.BUCKET_BYTES, d.LARGE_BYTES
    d.BUCKET_BYTES, d.LARGE_BYTES = bucket_bytes, large_bytes
    try:
        yield
    finally:
        d.BUCKET_BYTES, d.LARGE_BYTES = before


@case(2)
def backward_channels_last_and_mixed_dtypes(rank: int, size: int) -> Any:
    return by_convolution(DDP(convolution()), rank, size)


def convolution() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2).double())
    model[0].to(memory_format=torch.channels_last)
    model[1].register_forward_hook(lambda module, x, out: out.double())
    return model


def by_convolution(model: Any, rank: int, size: int) -> Any:
    x = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(3)).chunk(size)[rank]
    y = model(x)
    surgery = fastmtl.backward([(y[:, 0] - 1).square().mean(), (y.sum(1) + 2).square().mean()], model)
    conv = getattr(model, "module", model)[0].weight
    return {**seen(model, surgery), "channels_last": conv.grad.is_contiguous(memory_format=torch.channels_last)}


@case()
def backward_absent_on_rank_1(rank: int, size: int) -> Any:
    return by_backward(DDP(net()), rank, size, "fixed", lambda r: [2] if r == 1 else [])


@case(2)
def backward_nothing_on_rank_1(rank: int, size: int) -> Any:
    return by_backward(DDP(net()), rank, size, "min_norm", lambda r: [0, 1, 2] if r == 1 else [])


@case(2)
def backward_each_rank_a_task(rank: int, size: int) -> Any:
    # on each rank one loss alone reaches the trunk, which is shared all the same
    return by_backward(DDP(net()), rank, size, "fixed", lambda r: [t for t in range(3) if t != r])


@case(2)
def features_nothing_on_rank_1(rank: int, size: int) -> Any:
    return by_features(DDP(net()), rank, size, "min_norm", [0, 1, 2] if rank == 1 else [1])


class Towers(nn.Module):
    """Nothing in common but what DDP puts around the outputs, of which the second is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleList(nn.Linear(4, 2) for _ in range(3))

    def forward(self, x: Tensor) -> list[Any]:
        a, b, c = (tower(x) for tower in self.towers)
        return [a, "nothing", {"b": b, "c": torch.stack([loss_of(2, c), loss_of(1, c)])}]


def by_towers(model: Any, rank: int, size: int) -> Any:
    a, _, rest = model(batch(rank, size))
    both = (rest["c"] * 2).unbind()
    surgery = fastmtl.backward(
        [loss_of(0, a), loss_of(1, rest["b"]), *both], model, method=lambda gram: gram[0] * 0 + 1
    )
    return seen(model, surgery)


@case(2)
def backward_towers(rank: int, size: int) -> Any:
    return by_towers(DDP(net(cls=Towers), find_unused_parameters=True), rank, size)


class Scaled(nn.Module):
    """All that the two tasks share, behind two inputs that each came from parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a * self.scale, b * self.scale


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleList(nn.Sequential(nn.Linear(4, 2), nn.Tanh()) for _ in range(2))
        self.trunk = Scaled()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.trunk(*[tower(x) for tower in self.towers])


def by_joined(model: Any, rank: int, size: int) -> Any:
    losses = [loss_of(t, out) for t, out in enumerate(model(batch(rank, size)))]
    return seen(model, fastmtl.backward(losses, model))


@case(2)
def fully_shard_with_two_inputs(rank: int, size: int) -> Any:
    return by_joined(shard(net(cls=Joined)), rank, size)


@case(2)
def not_finite_on_rank_1(rank: int, size: int) -> Any:
    # a gradient scaler must skip the step on every rank, or on none
    out = []
    for method in (METHODS["fixed"], "sum"):
        model = DDP(net())
        losses = losses_of(model(batch(rank, size)))
        fastmtl.backward([losses[0] * (float("inf") if rank else 1.0), *losses[1:]], model, method=method)
        out.append({n: bool(g.isfinite().all()) for n, g in seen(model)["grads"].items()})
    return out


@case(2)
def backward_compiled(rank: int, size: int) -> Any:
    inner = net()
    model = torch.compile(DDP(inner), backend="aot_eager")
    losses = losses_of(model(batch(rank, size)))
    surgery = fastmtl.backward(losses, model, shared=inner.trunk, method=METHODS["fixed"])
    return seen(inner, surgery)


@case(2)
def sparse_tables(rank: int, size: int) -> Any:
    group = dist.group.WORLD
    return [
        by_sparse(net(cls=Embedded), rank, size, absent, process_group=group)
        for absent in ([], [0, 1] if rank == 1 else [])
    ]


for _sync in (False, True):
    for _view in (False, True):

        def _bank(rank: int, size: int, sync: bool = _sync, view: bool = _view) -> Any:
            model = DDP(net(), gradient_as_bucket_view=view, find_unused_parameters=sync)
            return by_bank(model, rank, size, "fixed", sync=sync, parts=2, before=sync)

        case(2, name=f"bank {'synced' if _sync else 'no_sync'} {'views' if _view else 'copies'}")(_bank)


@case(2)
def bank_process_group(rank: int, size: int) -> Any:
    model = net()
    return by_bank(model, rank, size, "random", params=list(model.parameters()), group=dist.group.WORLD)


@case(2)
def bank_each_rank_a_task(rank: int, size: int) -> Any:
    return by_bank(DDP(net()), rank, size, "fixed", sync=False, tasks=[rank])


@case(2)
def bank_nothing_on_rank_1(rank: int, size: int) -> Any:
    return by_bank(DDP(net()), rank, size, "fixed", sync=False, tasks=[] if rank else [0, 1, 2])


@case(2)
def every_with_a_rank_that_forgets(rank: int, size: int) -> Any:
    return by_every(DDP(net()), rank, size, "fixed", forgets=size > 1)


@case(2)
def every_with_tasks_absent(rank: int, size: int) -> Any:
    # first on one rank, which changes nothing, then on both
    return by_every(
        DDP(net()), rank, size, "fixed", absent=lambda step, r: [2] if step == 3 or (step == 1 and r) else []
    )


@case(2)
def every_with_nothing_on_rank_1(rank: int, size: int) -> Any:
    return by_every(DDP(net()), rank, size, "fixed", absent=lambda step, r: [0, 1, 2] if step == 1 and r else [])


@case(2)
def every_not_finite_on_rank_1(rank: int, size: int) -> Any:
    found = by_every(DDP(net()), rank, size, "fixed", broken=1)
    finite = {n: bool(g.isfinite().all()) for n, g in found["grads"].items()}
    return {"reused": found["reused"], "finite": finite, "norms": found["norms"].isfinite().tolist()}


for _wrap in ("ddp", "fully_shard"):
    for _m in ("fixed", "random", "min_norm"):
        case(name=f"every {_wrap} {_m}")(
            lambda r, n, m=_m, w=_wrap: by_every(DDP(net()) if w == "ddp" else shard(net()), r, n, m)
        )
for _m in ("random", "min_norm"):
    case(2, name=f"groups ddp {_m}")(lambda r, n, m=_m: by_backward(DDP(net()), r, n, m, groups="tensor"))
    case(2, name=f"groups fully_shard {_m}")(lambda r, n, m=_m: by_backward(shard(net()), r, n, m, groups="tensor"))


@case(2)
def groups_of_modules(rank: int, size: int) -> Any:
    model = shard(net())
    return by_backward(model, rank, size, "fixed", groups=[model.trunk[2], model.trunk[0]])


@case(2)
def groups_and_reused_methods_that_disagree(rank: int, size: int) -> Any:
    model = DDP(net())
    every = methods.Every(methods.Sum() if rank else methods.Mean(), 4)
    return [
        error(lambda: by_backward(model, rank, size, "fixed", groups="tensor" if rank else "layer")),
        error(lambda: fastmtl.backward(losses_of(model(batch(rank, size))), model, method=every)),
    ]


case(2, name="every features")(lambda r, n: by_every(DDP(net()), r, n, features=True))
case(2, name="every process_group")(lambda r, n: by_every(net(), r, n, process_group=dist.group.WORLD))
case(2, name="every loss_scale")(lambda r, n: by_every(DDP(net()), r, n, "min_norm", loss_scale=4.0))


def shard(model: Any, mesh: Any = None) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if mesh is None:  # else it would be of GPUs where there are some
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.trunk, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@case(4)
def hybrid_shard(rank: int, size: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return [by_backward(shard(net(), mesh), rank, size, m) for m in ("random", "min_norm")]


@case(2)
def fully_shard_accumulates_and_stays_sharded(rank: int, size: int) -> Any:
    from torch.distributed.tensor import DTensor

    model = shard(net())
    calls: list[str] = []
    model.trunk[0].weight.register_post_accumulate_grad_hook(lambda p: calls.append(type(p.grad).__name__))
    by_backward(model, rank, size, "fixed")
    out = by_backward(model, rank, size, "fixed")
    kinds = {isinstance(p.grad, DTensor) and p.grad.placements == p.placements for p in model.parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()
    return {**out, "calls": calls, "kinds": kinds, "moved": seen_weights(model)}


@case(2)
def fully_shard_bank_made_in_mid_step(rank: int, size: int) -> Any:
    model = shard(net())
    losses = losses_of(model(batch(rank, size)))  # the root's parameters are whole now
    bank = fastmtl.GradientBank(model, 3)
    for t, loss in enumerate(losses):
        with bank.task(t):
            loss.backward(retain_graph=t < 2)
    return seen(model, bank.apply(METHODS["fixed"]))


def seen_weights(model: nn.Module) -> dict[str, Any]:
    return {n: whole(p) for n, p in model.named_parameters()}


# --- refusals: the error of each call, on each rank


def error(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return "nothing was raised"


@case()
def refuses_where_it_cannot_know(rank: int, size: int) -> Any:
    model, ddp = net(), DDP(net())
    x = batch(rank, size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outside = nn.Sequential(ddp, nn.Linear(2, 2))
    bank = fastmtl.GradientBank(model, 3, process_group=dist.group.WORLD)
    bank._process_group = None  # as if the group was made after the bank
    return {
        "no params": error(lambda: fastmtl.backward(losses_of(model(x)))),
        "a plain module": error(lambda: fastmtl.backward(losses_of(model(x)), model)),
        "what DDP wraps": error(lambda: fastmtl.backward(losses_of(ddp(x)), ddp.module)),
        "a list": error(lambda: fastmtl.backward(losses_of(ddp(x)), list(ddp.parameters()))),
        "bank": error(lambda: fastmtl.GradientBank(model, 3)),
        "apply": error(bank.apply),
        "optimizer": error(lambda: fastmtl.optim.PCGrad(optimizer)),
        "outside": error(lambda: fastmtl.backward(losses_of(ddp(x)), outside)),
        "a number": error(lambda: fastmtl.backward(losses_of(ddp(x)), process_group=1)),
        "copies": error(lambda: by_features(DDP(net(), find_unused_parameters=True), rank, size, "fixed")),
        "grads": all(p.grad is None for m in (model, ddp) for p in m.parameters()),
    }


@case()
def refuses_disagreement(rank: int, size: int) -> Any:
    last = rank == size - 1
    ddp = DDP(net())
    losses = losses_of(ddp(batch(rank, size)))
    group = dist.group.WORLD
    params = list(ddp.parameters())
    names = ["a", "b", "x"] if last else ["a", "b", "c"]
    model = DDP(net())

    def bank() -> None:
        made = fastmtl.GradientBank(ddp, 4 if last else 3)
        with ddp.no_sync(), made.task(0):
            loss_of(0, ddp(batch(rank, size))[1]).backward()
        made.apply()

    back = fastmtl.backward
    keep = {"retain_graph": True, "process_group": group}
    return {
        "number of tasks": error(lambda: back(losses[: 2 if last else 3], ddp, retain_graph=True)),
        "names": error(lambda: back(dict(zip(names, losses, strict=True)), ddp, retain_graph=True)),
        "order": error(lambda: back(losses, params[::-1] if last else params, **keep)),
        "count": error(lambda: back(losses, params[1:] if last else params, **keep)),
        "method": error(lambda: back(losses, ddp, method="sum" if last else "pcgrad", retain_graph=True)),
        "shared": error(lambda: back(losses, ddp, shared=params[:2] if last else params[:4], retain_graph=True)),
        "bank": error(bank),
        "one rank raises": error(lambda: back([loss.detach() for loss in losses] if last else losses, ddp)),
        "absent everywhere": error(lambda: back([None, None], ddp)),
        "shape": error(lambda: wide(last)),
        "features": error(lambda: (by_features if last else by_backward)(model, rank, size, "fixed")),
        "waiting": error(lambda: waiting(rank, size, last)),
        "still works": by_backward(DDP(net()), rank, size, "fixed")["present"],
        "grads": all(p.grad is None for p in params),
    }


def waiting(rank: int, size: int, last: bool) -> None:
    model = nn.Sequential(DDP(net()), nn.SyncBatchNorm(2, affine=False)).train(not last)
    fastmtl.backward(losses_of(model[0](batch(rank, size))), model)


def wide(last: bool) -> None:
    layer = nn.Linear(4, 3 if last else 2)
    y = layer(torch.ones(1, 4))
    fastmtl.backward([y[:, 0].sum(), y.square().sum()], layer, process_group=dist.group.WORLD)


@case(2)
def refuses_absent_tasks_where_ranks_wait_in_backward(rank: int, size: int) -> Any:
    model = nn.Sequential(DDP(net()), nn.SyncBatchNorm(2, affine=False))
    losses: list[Tensor | None] = [*losses_of(model[0](batch(rank, size)))]
    message = error(lambda: fastmtl.backward([None if rank and t else loss for t, loss in enumerate(losses)], model))
    surgery = fastmtl.backward(losses, model, method=METHODS["fixed"])
    return message, surgery.weights


@case(2)
def bank_keeps_its_rows_when_the_method_raises(rank: int, size: int) -> Any:
    model = DDP(net())

    def fails(gram: Tensor) -> Tensor:
        raise KeyError("mine")

    bank = fastmtl.GradientBank(model, 3)
    for t in range(3):
        with bank.task(t), model.no_sync():
            loss_of(t, model(batch(rank, size), tasks=[t])[1]).backward()
    messages = [error(lambda: bank.apply(fails)), error(lambda: bank.apply("nash" if rank else "pcgrad"))]
    return {**seen(model, bank.apply(METHODS["fixed"])), "errors": messages}


@case(2)
def method_that_raises_on_one_rank(rank: int, size: int) -> Any:
    def weigh(gram: Tensor) -> Tensor:
        if rank == 1:
            raise KeyError("mine")
        return gram[0] * 0 + 1

    out: dict[str, Any] = {}
    for key in ("plain", "features", "groups"):
        model = DDP(net())
        *outs, h = model(batch(rank, size), features=True)
        options = {"features": {"features": h}, "groups": {"groups": "layer"}}.get(key, {})
        message = error(
            lambda m=model, o=outs, more=options: fastmtl.backward(
                losses_of(o), m, shared=m.module.trunk, method=weigh, **more
            )
        )
        out[key] = message, seen(model)["grads"]["trunk.0.weight"]
    return out


@case(2)
def refuses_other_parallelism(rank: int, size: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    x = batch(rank, size)
    mesh = init_device_mesh("cpu", (size,))
    tensor_parallel = parallelize_module(net(), mesh, {"trunk.0": ColwiseParallel(use_local_output=True)})
    sharded = shard(net())
    quiet = shard(net())
    quiet.set_requires_gradient_sync(False)
    whole_group = dist.group.WORLD
    alone = [dist.new_group([r]) for r in range(size)]

    def visit() -> None:
        model = shard(net())
        bank = fastmtl.GradientBank(model, 3)
        with bank.task(0):
            model.set_requires_gradient_sync(False)
            loss_of(0, model(x, tasks=[0])[1]).backward()

    def absent() -> None:
        losses: list[Tensor | None] = [*losses_of(sharded(x))]
        if rank:
            losses[1] = None
        fastmtl.backward(losses, sharded)

    *outs, h = sharded(x, features=True)
    return {
        "tensor parallel": error(lambda: fastmtl.GradientBank(tensor_parallel, 3, process_group=whole_group)),
        "tensor parallel alone": error(lambda: fastmtl.GradientBank(tensor_parallel, 3, process_group=alone[rank])),
        "not a member": error(lambda: fastmtl.backward([], net(), process_group=alone[1 - rank])),
        "list of shards": error(lambda: fastmtl.GradientBank(list(sharded.parameters()), 3, process_group=whole_group)),
        "group of shards": error(lambda: fastmtl.GradientBank(sharded, 3, process_group=whole_group)),
        "features of shards": error(lambda: fastmtl.backward(losses_of(outs), sharded, features=h)),
        "chunks of shards": error(lambda: fastmtl.backward(losses_of(outs), sharded, chunk_size=2)),
        "absent": error(absent),
        "not reduced": error(lambda: fastmtl.backward(losses_of(quiet(x)), quiet)),
        "not reduced in the bank": error(visit),
        "alone": by_backward(net(), 0, 1, "fixed", process_group=alone[rank]),
    }


# --- rows of a batch whose samples have a task each


def rows_of_mixed_batch(
    x: Tensor, ids: Tensor, reduction: str, *, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, dict[Tensor, Tensor], dict[Tensor, Tensor], Tensor]:
    """Model, rows, gradients of samples without a task, counts: by autograd, one task at a time.

    The losses are sums divided by 8, or means over each task's samples. A part without samples has no rows at all.
    """
    model = net(3).to(dtype)
    params = list(model.trunk.parameters())
    rows: dict[Tensor, Tensor] = {}
    loose: dict[Tensor, Tensor] = {}
    counts = torch.bincount(torch.where(ids < 0, 3, ids), minlength=4)
    for t in range(4):
        here = ids == (t if t < 3 else -1)
        if not here.any():
            continue
        part = (model.heads[t % 3](model.trunk(x[here].to(dtype))) - t).square().sum(1)
        loss = part.sum() / 8 if reduction == "sum" else part.mean()
        for p, g in zip(params, torch.autograd.grad(loss, params), strict=True):
            if t == 3:
                loose[p] = g
                continue
            if p not in rows:
                rows[p] = torch.zeros(3, *p.shape, dtype=p.dtype)
                if p.dim() == 2:  # a memory order of their own, as rows of a bank may have
                    rows[p] = rows[p].transpose(1, 2).contiguous().transpose(1, 2)
            rows[p][t] = g
    return model, rows, loose, counts


IDS = torch.tensor([0, 0, 1, 2, 0, -1, 1, 1])


def split_unevenly(size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """7 and 1 of 8 samples on two ranks; on four some have no sample of a task, and one none at all."""
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(5))
    parts = [7, 1] if size == 2 else [4, 3, 1, 0]
    return zip(x.split(parts), IDS.split(parts), strict=True)


def average(model: nn.Module, rows: Any, loose: Any, counts: Tensor, reduction: str, **changed: Any) -> Any:
    named = changed.pop("named", {p: name for name, p in model.trunk.named_parameters()})
    names = changed.pop("names", ["a", "b", "c"])
    ranks = find_ranks(None, None, dist.group.WORLD, "test")
    totals = average_rows(ranks, named, names, rows, loose, counts, reduction)
    by_name = [{named[p]: g for p, g in some.items()} for some in (rows, loose)]
    return {"rows": by_name[0], "loose": by_name[1], "totals": totals}


@case()
def rows_of_uneven_parts(rank: int, size: int) -> Any:
    x, ids = [*split_unevenly(size)][rank]
    return {
        f"{reduction} {dtype}": average(*rows_of_mixed_batch(x, ids, reduction, dtype=dtype), reduction)
        for reduction in ("sum", "mean")
        for dtype in (torch.float32, torch.bfloat16, torch.float64)
    }


class OneTaskEach(nn.Module):
    """A trunk in the bank, and a head outside it that all samples go through."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))


def one_pass_step(x: Tensor, ids: Tensor, size: int, reduction: str, method: Any, wrap: str) -> dict[str, Any]:
    """A step on one rank's part of the batch, of `size` ranks."""
    model = OneTaskEach()
    if reduction == "mean":
        model.head.requires_grad_(False)
    outer = DDP(model) if wrap == "ddp" else model
    group = dist.group.WORLD if wrap == "group" else None
    with fastmtl.one_pass(outer, ids, 3, shared=model.trunk, loss_reduction=reduction, process_group=group) as bank:
        losses = (outer(x) - ids[:, None]).square().sum(1)
        if reduction == "sum":
            loss = losses.sum() * size / 8
        else:
            loss = sum(losses[ids == t].mean() for t in (-1, 0, 1, 2) if (ids == t).any())  # type: ignore[assignment]
        loss.backward()
    each = [losses[ids == t].detach() for t in range(3)]
    given = [x.sum() * size / 8 if reduction == "sum" else x.mean() if len(x) else None for x in each]
    surgery = bank.apply(method, losses=given)
    if wrap == "ddp":  # and DDP is as it was
        before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        outer(x).sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        synced = [g for g in grads.values() if g is not None]
        for p, g in zip(model.parameters(), before, strict=True):
            p.grad = g
        assert synced
    return {
        "grads": {name: p.grad for name, p in model.named_parameters()},
        "gram": surgery.gram,
        "weights": surgery.weights,
        "present": surgery.present,
    }


class OfLosses(StatefulMethod):
    """Weights that are the losses."""

    needs = frozenset({"losses"})

    def _weigh(self, gram: Tensor, seen: methods.Seen, present: Tensor | None) -> Tensor:
        return seen.losses


ONE_PASS_METHODS = {"fixed": METHODS["fixed"], "min_norm": min_norm, "losses": OfLosses()}


def one_pass_parts(size: int) -> Iterator[tuple[Tensor, Tensor]]:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(5))
    parts = [7, 1] if size == 2 else [4, 2, 1, 1]
    return zip(x.split(parts), IDS.split(parts), strict=True)


@case()
def one_pass_of_uneven_parts(rank: int, size: int) -> Any:
    x, ids = [*one_pass_parts(size)][rank]
    return {
        f"{reduction} {method} {wrap}": one_pass_step(x, ids, size, reduction, ONE_PASS_METHODS[method], wrap)
        for reduction in ("sum", "mean")
        for method in ONE_PASS_METHODS
        for wrap in ("ddp", "group")
    }


@case(2)
def one_pass_of_wrong_ids(rank: int, size: int) -> Any:
    """Ids out of range on a device, which only that device can see: NaN in `_poison`, here on the last rank alone."""
    x, ids = [*one_pass_parts(size)][rank]
    found = {}
    for name, method in METHODS.items():
        model = OneTaskEach()
        with fastmtl.one_pass(model, ids, 3, shared=model.trunk, process_group=dist.group.WORLD) as bank:
            model(x).square().sum().backward()
        bank._poison = torch.tensor(torch.nan if rank == size - 1 else 0.0)
        surgery = bank.apply(method)
        found[name] = [surgery.weights, *(p.grad for p in model.trunk.parameters())]
    return found


@case(2)
def one_pass_errors(rank: int, size: int) -> Any:
    x, ids = [*one_pass_parts(size)][rank]
    model = OneTaskEach()
    world = dist.group.WORLD

    def heads() -> None:
        with fastmtl.one_pass(model, ids, 3, shared=model.trunk, loss_reduction="mean", process_group=world) as bank:
            model(x).square().sum().backward()
        bank.apply()

    def tasks() -> None:
        with fastmtl.one_pass(model, ids, 3 + rank, shared=model.trunk, process_group=world) as bank:
            model(x).square().sum().backward()
        bank.apply()

    def empty() -> None:
        with fastmtl.one_pass(model, ids, 3, shared=model.trunk, process_group=world) as bank:
            if rank == 0:
                model(x).square().sum().backward()
        bank.apply()

    return {
        "no group": error(lambda: fastmtl.one_pass(model, ids, 3)),
        "stream": error(lambda: fastmtl.one_pass(model, ids, 3, memory="stream", process_group=world)),
        "sharded": error(lambda: fastmtl.one_pass(shard(net()), ids, 3)),
        "heads": error(heads),
        "tasks": error(tasks),
        "empty": error(empty),
    }


@case(2)
def rows_in_large_and_small_buckets(rank: int, size: int) -> Any:
    with buckets(200, 200):
        x, ids = [*split_unevenly(size)][rank]
        return average(*rows_of_mixed_batch(x, ids, "mean"), "mean")


@case(2)
def rows_that_disagree(rank: int, size: int) -> Any:
    x, ids = [*split_unevenly(size)][rank]
    model, rows, loose, counts = rows_of_mixed_batch(x, ids, "sum")
    before = {p: g.clone() for p, g in rows.items()}
    named = {p: name for name, p in model.trunk.named_parameters()}
    names = ["a", "b", "c"]
    wide = {p: torch.cat([g, g[:1]]) for p, g in rows.items()}

    def call(*changed: Any, reduction: str = "sum", **kwargs: Any) -> str:
        return error(lambda: average(model, *(changed or (rows, loose, counts)), reduction, **kwargs))

    return {
        "tasks": call(wide, loose, torch.ones(5).long(), names=[*names, "d"]) if rank else call(),
        "names": call(names=["a", "b", "x" if rank else "c"]),
        "order": call(named=dict([*named.items()][:: -1 if rank else 1])),
        "reduction": call(reduction="mean" if rank else "sum"),
        "unknown": call(reduction="median" if rank else "sum"),
        "counts": call(rows, loose, counts.float() if rank else counts),
        "rows": call(wide if rank else rows, loose, counts),
        "untouched": all(torch.equal(g, before[p]) for p, g in rows.items()),
    }


# --- the processes


def main(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # and memory from torch.empty is NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    path = Path(folder)
    dist.init_process_group("gloo", init_method=f"file://{path}/meeting", rank=rank, world_size=size, timeout=TIMEOUT)
    found: dict[str, Any] = {}
    for name, (function, sizes) in CASES.items():
        if size in sizes:
            (path / f"running{rank}").write_text(name)
            try:
                found[name] = function(rank, size)
            except Exception:
                found[name] = f"rank {rank} failed:\n{traceback.format_exc()}"
    torch.save(found, path / f"found{rank}")
    dist.destroy_process_group()
