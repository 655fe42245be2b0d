"""Several ranks: what they must agree on before a surgery, and the few numbers that they exchange for it.

Ranks that average (DDP, `process_group=`): every rank has the gradients of its own part of the batch, and the rows of a
surgery are their means, in a few large all-reduces. Ranks that shard (`fully_shard`): torch has reduced every row to
this rank's shard already, and one all-reduce of the `[T, T]` Gram matrix is left to do. In both, the first rank's
weights are taken, so that a random order, or whatever a method of the caller's own does, is the same everywhere.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastmtl.distributed.dtensors import is_dtensor, not_fully_shard
from fastmtl.parameters import describe, is_per_task

WAYS = (
    "pass params= the DistributedDataParallel or fully_shard module itself (not what it wraps, nor a list of its "
    "parameters), or process_group= the ranks to average over (torch.distributed.group.WORLD; a group of this rank "
    "alone for a model that is its own)"
)

SAME_PASSES = (
    "with fully_shard, and with SyncBatchNorm in training, all ranks must run the same backward passes. For a task "
    "without samples on one rank pass a loss of zero that reaches the same parameters, such as 0 * output.sum()"
)

Kind = int  # of a gradient: DENSE, or the number of sparse dimensions
DENSE: Kind = 0


class Statement(NamedTuple):
    """What one rank brings to a surgery. The ranks must agree on all that stands before `present`."""

    call: str
    tasks: tuple[str, ...] = ()
    method: str = ""
    waits: bool = False  # tasks and reached parameters must agree too
    params: tuple[tuple[Any, ...], ...] = ()  # name, shape, dtype, and `_PARAM_FACTS`
    present: int = 0  # bit mask of tasks
    masks: tuple[int, ...] = ()  # of each parameter: tasks that reach it, as a bit mask
    kinds: tuple[tuple[Kind, ...], ...] = ()  # of each parameter: kinds of gradients that it has here
    error: str | None = None


class Joint(NamedTuple):
    """What all ranks have together."""

    present: list[bool]
    masks: dict[Tensor, int]
    kinds: dict[Tensor, set[Kind]]


class Ranks:
    """The ranks that take part in a surgery, as one sees them.

    Attributes:
        groups: process groups whose product they are: one, or one for each dimension of a mesh.
        ranks: their global ranks, the last group's fastest.
        size: how many they are.
        sharded: gradients are shards of DTensors, already reduced; else they are to be averaged, over one group.
        same_passes: the ranks wait for each other in their backward passes.
        managed: the parameters whose gradients are known to belong together, by what stands for them in the module
            (`fully_shard` shows other tensors between forward and backward); None: the caller vouches for all.
    """

    def __init__(
        self,
        groups: Sequence[dist.ProcessGroup],
        ranks: Sequence[int],
        managed: Mapping[Tensor, Tensor] | None = None,
        gram_groups: Sequence[dist.ProcessGroup] | None = None,
        same_passes: bool = False,
    ) -> None:
        self.groups = list(groups)
        self.ranks = list(ranks)
        self.size = len(self.ranks)
        self.managed = managed
        self.sharded = gram_groups is not None
        self.same_passes = same_passes
        self._gram_groups = self.groups if gram_groups is None else list(gram_groups)
        self._is_first = all(dist.get_rank(group) == 0 for group in self.groups)

    def rename(self, named: Mapping[Tensor, str]) -> dict[Tensor, str]:
        """The parameters that get gradients, in place of those that a `fully_shard` module shows just now."""
        if not self.sharded or self.managed is None:
            return dict(named)
        return {self.managed.get(p, p): name for p, name in named.items()}

    def check_params(self, named: Mapping[Tensor, str], call: str) -> None:
        """Raises where nobody knows how a parameter's gradients belong together."""
        for p, name in named.items():
            if not p.requires_grad:
                continue
            if not self.sharded and is_dtensor(p):
                raise not_fully_shard(p, name, call)
            if self.managed is not None and p not in self.managed:
                of, ways = "DistributedDataParallel", WAYS
                if self.sharded:
                    of, ways = "fully_shard", "leave it out of params"
                raise RuntimeError(
                    f"{call}: {describe(p, name)} is in no {of} module of params, or ignored by it: there is no "
                    f"way to know how its gradients belong together: {ways}"
                )

    # --- what the ranks agree on

    def meet(self, statement: Statement, named: Mapping[Tensor, str], *, same: str | None = None) -> Joint:
        """What all ranks have together.

        Two integers of each rank are gathered, before any other collective. Where these differ every rank shows
        all that it has: what the ranks must agree on and don't is then the same error on each of them.

        Args:
            statement: of this rank, with an entry for each parameter in `named`.
            same: tasks and reached parameters must agree too, and why.

        Raises:
            ValueError: the ranks disagree.
            RuntimeError: another rank raised, and what.
        """
        statement = statement._replace(waits=same is not None)
        mine = [int(statement.error is not None), _digest(statement)]
        if any(theirs != mine for theirs in self._gather(mine)):
            statements = self._gather_objects(statement)
            self._check(statements, same)
        else:
            statements = [statement]
        present, masks = 0, [0] * len(named)
        kinds: list[set[Kind]] = [set() for _ in named]
        for s in statements:
            present |= s.present
            for i, (mask, some) in enumerate(zip(s.masks, s.kinds, strict=True)):
                masks[i] |= mask
                kinds[i].update(some)
        return Joint(
            [bool(present >> t & 1) for t in range(len(statement.tasks))],
            dict(zip(named, masks, strict=True)),
            dict(zip(named, kinds, strict=True)),
        )

    def any_of(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return any(theirs for (theirs,) in self._gather([int(flag)]))

    @contextlib.contextmanager
    def reporting(self, call: str) -> Iterator[None]:
        """What is raised inside is raised on the other ranks too, where they meet; the block must not meet them."""
        try:
            yield
        except Exception as error:
            statement = Statement(call, error=f"{type(error).__name__}: {error}")
            self._gather([1, _digest(statement)])
            self._gather_objects(statement)
            raise

    @contextlib.contextmanager
    def together(self, call: str) -> Iterator[None]:
        """No rank goes on past the block unless all did."""
        with self.reporting(call):
            yield
        self.meet(Statement(call), {})

    def _check(self, statements: Sequence[Statement], same: str | None) -> None:
        for r, s in zip(self.ranks, statements, strict=True):
            if s.error is not None:
                raise RuntimeError(f"{s.call}: rank {r} raised, so that no rank goes on: {s.error}")
        first = statements[0]
        for r, s in zip(self.ranks, statements, strict=True):
            difference = _difference(first, s)
            if difference is not None:
                what, a, b = difference
                raise ValueError(
                    f"{first.call}: the ranks disagree on {what}: rank {self.ranks[0]} has {a}, rank {r} has {b}"
                )
            if same is not None and s != first:
                shown = [
                    ", ".join(name for t, name in enumerate(x.tasks) if x.present >> t & 1) or "none"
                    for x in (first, s)
                ]
                what = "present tasks" if s.present != first.present else "parameters that the tasks reach"
                raise ValueError(
                    f"{first.call}: the ranks disagree on the {what} (tasks on rank {self.ranks[0]}: {shown[0]}; on "
                    f"rank {r}: {shown[1]}): {same}"
                )

    def _gather(self, numbers: Sequence[int]) -> list[list[int]]:
        """A few integers of every rank, in the order of `ranks`; as many on each of them."""
        device = self._meeting_device()
        with self._beside(device):
            x = torch.tensor(numbers, dtype=torch.int64, device=device)
            for group in reversed(self.groups):
                parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
                dist.all_gather(parts, x, group=group)
                x = torch.cat(parts)
            return x.reshape(self.size, len(numbers)).tolist()

    def _gather_objects(self, x: Statement) -> list[Statement]:
        found = [x]
        for group in reversed(self.groups):
            parts: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(parts, found, group=group)
            found = [s for part in parts for s in part]
        return found

    def _meeting_device(self) -> torch.device:
        """The CPU, where all groups communicate there too, so that no one waits for an accelerator."""
        configs = [str(dist.get_backend_config(group)) for group in self.groups]
        if all("cpu:" in config for config in configs):
            return torch.device("cpu")
        kind = configs[0].split(":")[0]
        return torch.device(kind, torch.get_device_module(kind).current_device())

    def _beside(self, device: torch.device) -> Any:
        """On a stream of its own, so that reading the result does not wait for what the caller has queued."""
        if device.type != "cuda":
            return contextlib.nullcontext()
        return torch.cuda.stream(_side_stream(device))

    # --- numbers on the device

    def total_gram(self, gram: Tensor) -> Tensor:
        """The Gram matrix of the whole gradients, where each rank has columns of its own.

        These are shards; or gradients of features, each rank's of its own samples, which the mean over the ranks of
        the losses divides by their number. In float64 on the way: T x T numbers cost nothing.
        """
        total = gram.to(torch.float64, copy=True)
        if not self.sharded:
            total /= self.size**2
        for group in self._gram_groups:
            dist.all_reduce(total, group=group)
        return total.to(gram.dtype)

    def first_of(self, weights: Tensor) -> Tensor:
        """The first rank's weights, plus nothing of the others' unless NaN: a rank whose method raised says so."""
        weights = weights.clone() if self._is_first else torch.where(weights.isnan(), weights, 0.0)
        for group in self.groups:
            dist.all_reduce(weights, group=group)
        return weights

    def mean_of(self, x: Tensor) -> Tensor:
        """The mean over all ranks."""
        mean = x / self.size
        for group in self.groups:
            dist.all_reduce(mean, group=group)
        return mean

    def start_sum(self, x: Tensor) -> Any:
        """Begins to replace `x` by its sum over ranks that average; what is returned is to be waited for."""
        (group,) = self.groups
        return dist.all_reduce(x, group=group, async_op=True)

    def __repr__(self) -> str:
        return f"Ranks({self.ranks}, {'sharded' if self.sharded else 'averaged'})"


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def reporting(ranks: Ranks | None, call: str) -> contextlib.AbstractContextManager[None]:
    """`Ranks.reporting`, or nothing for a process alone."""
    return contextlib.nullcontext() if ranks is None else ranks.reporting(call)


def statement_of(
    call: str,
    tasks: Sequence[str],
    method: object,
    named: Mapping[Tensor, str],
    shared: Mapping[Tensor, str] | None,
    present: Sequence[bool],
    masks: Mapping[Tensor, int],
    holders: Sequence[Mapping[Tensor, Tensor]],
) -> Statement:
    """This rank's statement: which tasks reach which parameter, and the gradients that there are, by parameter."""
    kinds: dict[Tensor, set[Kind]] = {p: set() for p in named}
    for holder in holders:
        for p, g in holder.items():
            kinds[p].add(g.sparse_dim() if g.layout is torch.sparse_coo else DENSE)
    return Statement(
        call,
        tuple(tasks),
        "" if method is None else _name_of(method),
        params=tuple(
            (
                name,
                tuple(p.shape),
                str(p.dtype),
                p.stride(),
                shared is not None and p in shared,
                is_per_task(p),
                p.requires_grad,
            )
            for p, name in named.items()
        ),
        present=sum(1 << t for t, here in enumerate(present) if here),
        masks=tuple(masks.get(p, 0) for p in named),
        kinds=tuple(tuple(sorted(some)) for some in kinds.values()),
    )


def _name_of(method: object) -> str:
    """The name of a method, with that of the one inside it, if it has one."""
    name = getattr(method, "__qualname__", type(method).__qualname__)
    inner = getattr(method, "method", None)
    return name if inner is None else f"{name}({_name_of(inner)})"


def _digest(statement: Statement) -> int:
    return int.from_bytes(hashlib.blake2b(repr(statement).encode(), digest_size=8).digest(), "little", signed=True)


_PARAM_FACTS = (
    "the strides of parameter {}",
    "whether parameter {} is in shared=",
    "whether parameter {} is marked by mark_per_task",
    "whether parameter {} is trained",
)


def _difference(a: Statement, b: Statement) -> tuple[str, object, object] | None:
    """What two ranks first differ in, of what they must agree on."""
    if a.call != b.call:
        return "what they call", a.call, b.call
    if len(a.tasks) != len(b.tasks):
        return "the number of tasks", len(a.tasks), len(b.tasks)
    if a.tasks != b.tasks:
        return "the names of the tasks", list(a.tasks), list(b.tasks)
    if a.method != b.method:
        return "the method", a.method, b.method
    if a.waits != b.waits:
        return "whether a SyncBatchNorm is in training", a.waits, b.waits
    if len(a.params) != len(b.params):
        return "the number of parameters", len(a.params), len(b.params)
    for i, (p, q) in enumerate(zip(a.params, b.params, strict=True)):
        if p[:3] != q[:3]:
            shown = [f"{name} of shape {list(shape)}, {dtype}" for name, shape, dtype in (p[:3], q[:3])]
            return f"parameter {i} (are they in the same order?)", shown[0], shown[1]
        for what, x, y in zip(_PARAM_FACTS, p[3:], q[3:], strict=True):
            if x != y:
                return what.format(p[0]), x, y
    return None
