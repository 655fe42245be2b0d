"""Several ranks: which gradients they average or shard, what they must agree on, and the collectives for it.

Ranks that average (DDP, `process_group=`): every rank has the gradients of its own part of the batch, and the rows of a
surgery are their means, in a few large all-reduces. Ranks that shard (`fully_shard`): torch has reduced every row to
this rank's shard already, and one all-reduce of the `[T, T]` Gram matrix is left to do. In both, the first rank's
weights are taken, so that a random order, or whatever a method of the caller's own does, is the same everywhere.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastmtl._graph import Reach
from fastmtl._marks import Params, describe, is_per_task
from fastmtl._memory import can_keep, references_alone

# bytes of one all-reduce of several gradients, where there are as many; and what is worth one of its own: a copy into
# new memory costs more than an all-reduce's latency
BUCKET_BYTES = 32 << 20
LARGE_BYTES = 1 << 18

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


class Slot(NamedTuple):
    """A place of a gradient, missing where this rank has none."""

    holder: dict[Tensor, Tensor]
    param: Tensor
    kind: Kind = DENSE


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
        wide = gram.to(torch.float64, copy=True)
        if not self.sharded:
            wide /= self.size**2
        for group in self._gram_groups:
            dist.all_reduce(wide, group=group)
        return wide.to(gram.dtype)

    def first_of(self, weights: Tensor) -> Tensor:
        """The first rank's weights, plus nothing of the others' unless NaN: a rank whose method raised says so."""
        weights = weights.clone() if self._is_first else torch.where(weights.isnan(), weights, 0.0)
        for group in self.groups:
            dist.all_reduce(weights, group=group)
        return weights

    def average(self, slots: Sequence[Slot]) -> None:
        """Replaces every gradient by its mean over the ranks; one that this rank lacks counts as zero.

        The slots must be the same on all ranks, in the same order. Small dense gradients are copied into buckets of
        `BUCKET_BYTES`, one all-reduce each, and the means are views of these. Large ones are reduced where they are,
        if nobody else holds them. All are in the layout of the parameter. What a copy replaces is let go of at once,
        so that the peak is one bucket above what there was. Sparse ones go one by one.
        """
        works = []
        seen: set[int] = set()
        with torch.no_grad():
            for bucket in _buckets([s for s in slots if s.kind == DENSE]):
                if len(bucket) == 1:
                    mean = self._scaled(bucket[0], seen)
                    # ranks may hold it in one memory order only: flat, it is the parameter's on each
                    works.append(self.start_sum(mean.as_strided((mean.numel(),), (1,))))
                    continue
                first = bucket[0].param
                flat = torch.empty(sum(s.param.numel() for s in bucket), dtype=first.dtype, device=first.device)
                offset = 0
                for s in bucket:
                    strides = torch.empty_like(s.param, device="meta").stride()  # of the parameter, without gaps
                    self._fill(flat.as_strided(s.param.shape, strides, offset), s)
                    offset += s.param.numel()
                works.append(self.start_sum(flat))
            for s in slots:
                if s.kind == DENSE:
                    continue
                g = s.holder.get(s.param)
                s.holder[s.param] = mean = (_no_rows(s) if g is None else g / self.size).coalesce()
                works.append(self.start_sum(mean))
        for work in works:
            work.wait()

    def _scaled(self, s: Slot, seen: set[int]) -> Tensor:
        """The gradient over the number of ranks, in its own memory if that can be."""
        g = s.holder.get(s.param)
        dense = g is not None and g.layout is torch.strided and g.dtype == s.param.dtype
        if dense and sys.getrefcount(g) <= references_alone() and can_keep(s.param, g, seen):
            return g.div_(self.size)
        return self._fill(torch.empty_like(s.param), s)

    def _fill(self, mean: Tensor, s: Slot) -> Tensor:
        """Puts `mean` in the slot, with what this rank contributes to it."""
        g = s.holder.get(s.param)
        if g is None:
            mean.zero_()
        elif g.layout is torch.strided:
            torch.div(g, self.size, out=mean)
        else:
            mean.copy_(g.to_dense()).div_(self.size)
        s.holder[s.param] = mean
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


# --- who takes part


def find_ranks(
    params: Params | None,
    shared: Params | None,
    process_group: Any,
    call: str,
) -> Ranks | None:
    """The ranks that take part in a call with these arguments; None: this process alone.

    Args:
        params, shared: what may be, or contain, `DistributedDataParallel` or `fully_shard` modules.
        process_group: the ranks to average over, whatever the modules are.
        call: the name that errors begin with.

    Raises:
        TypeError: `process_group` is no process group; modules or parameters of other kinds of parallelism.
        ValueError: a group that this rank is not in, or for modules that have their own; several different groups.
        RuntimeError: several ranks, and no way to know what to do; modules that don't reduce their gradients.
    """
    if process_group is not None:
        if dist.is_available() and process_group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(f"{call}: process_group: expected a group that this rank is in")
        if not dist.is_available() or not isinstance(process_group, dist.ProcessGroup):
            raise TypeError(
                f"{call}: process_group: expected a process group or None, got {type(process_group).__name__}"
            )
    if not (dist.is_available() and dist.is_initialized()):
        return None
    modules = [x for x in (params, shared) if isinstance(x, nn.Module)]
    _refuse_fsdp1(modules, call)
    states = _fully_shard_params(modules)
    if states:
        if process_group is not None:
            raise ValueError(
                f"{call}: process_group: expected None for a fully_shard module, which has its own device mesh"
            )
        check_reduces(modules, call)
        return _sharding(states, call)
    if process_group is not None:
        if dist.get_rank(process_group) < 0:
            raise ValueError(f"{call}: process_group: expected a group that this rank is in")
        return _averaging(process_group, None, modules)
    wrapped = [m for top in modules for m in top.modules() if isinstance(m, nn.parallel.DistributedDataParallel)]
    if not wrapped:
        size = dist.get_world_size()
        if size == 1:
            return None
        raise RuntimeError(
            f"{call}: {size} ranks, and no way to know how their gradients belong together; they would silently "
            f"diverge: {WAYS}"
        )
    groups = {tuple(dist.get_process_group_ranks(m.process_group)): m.process_group for m in wrapped}
    if len(groups) > 1:
        raise ValueError(
            f"{call}: the DistributedDataParallel modules have different process groups, of ranks "
            f"{' and '.join(str(list(ranks)) for ranks in groups)}: one Gram matrix needs one group"
        )
    managed = {}
    for m in wrapped:
        if m.mixed_precision is not None:
            raise TypeError(
                f"{call}: DistributedDataParallel(mixed_precision=) puts other parameters into the graph: use "
                "torch.autocast instead"
            )
        for name, p in m.module.named_parameters():
            if name not in m.parameters_to_ignore:
                managed[p] = p
    return _averaging(wrapped[0].process_group, managed, modules)


def _averaging(
    group: dist.ProcessGroup, managed: Mapping[Tensor, Tensor] | None, modules: Sequence[nn.Module]
) -> Ranks | None:
    ranks = dist.get_process_group_ranks(group)
    if len(ranks) == 1:
        return None
    waits = any(isinstance(m, nn.SyncBatchNorm) and m.training for top in modules for m in top.modules())
    return Ranks([group], ranks, managed, same_passes=waits)


def _sharding(states: Sequence[Any], call: str) -> Ranks:
    mesh = None
    managed: dict[Tensor, Tensor] = {}
    for state in states:
        p = state.sharded_param
        name = repr(getattr(state, "_param_fqn", None) or state._module_info.param_name)
        # sharded, or sharded within replicas; what was a DTensor before is tensor-parallel
        kinds = "".join("S" if x.is_shard() else "R" if x.is_replicate() else "?" for x in p.placements)
        if getattr(state, "is_dtensor", False) or kinds not in ("S", "RS"):
            raise not_fully_shard(p, name, call)
        if mesh is None:
            mesh, placements = p.device_mesh, p.placements
        elif p.device_mesh != mesh:
            raise ValueError(
                f"{call}: {describe(p, name)} is on {p.device_mesh}, others on {mesh}: one Gram matrix needs one mesh"
            )
        managed[p] = p
        for attribute in ("_unsharded_param", "_sharded_post_forward_param"):
            if getattr(state, attribute, None) is not None:
                managed[getattr(state, attribute)] = p
    assert mesh is not None
    groups = [mesh.get_group(d) for d in range(mesh.ndim)]
    apart = [group for group, placement in zip(groups, placements, strict=True) if placement.is_shard()]
    return Ranks(groups, mesh.mesh.flatten().tolist(), managed, apart, same_passes=True)


def _fsdp(name: str) -> Any:
    """A class of torch.distributed.fsdp; None where it was not imported, so that nobody uses it."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), name, None)


def _fully_shard_groups(modules: Sequence[nn.Module]) -> Iterator[tuple[str, Any]]:
    """Module name and torch's record of each group of parameters that `fully_shard` made in these modules."""
    kind = _fsdp("FSDPModule")
    for top in modules if kind is not None and dist.is_initialized() else ():
        for name, m in top.named_modules():
            if isinstance(m, kind):
                state = m._get_fsdp_state()
                groups = getattr(state, "_fsdp_param_groups", None)
                if groups is None:  # before torch 2.11
                    groups = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
                for group in groups:
                    yield name or type(m).__name__, group


def _fully_shard_params(modules: Sequence[nn.Module]) -> list[Any]:
    """torch's records of the parameters under `fully_shard` in these modules, each once."""
    found = {id(state): state for _, group in _fully_shard_groups(modules) for state in group.fsdp_params}
    return list(found.values())


def check_reduces(modules: Sequence[nn.Module], call: str) -> None:
    """Raises where a fully_shard module was told not to reduce gradients: none would arrive."""
    for name, group in _fully_shard_groups(modules):
        if not (group.reduce_grads and group.all_reduce_grads):
            raise RuntimeError(
                f"{call}: module {name!r} has set_requires_gradient_sync(False), so that no rank gets a reduced "
                "gradient: set it to True, and accumulate in a GradientBank"
            )


def _refuse_fsdp1(modules: Sequence[nn.Module], call: str) -> None:
    kind = _fsdp("FullyShardedDataParallel")
    for top in modules if kind is not None else ():
        for name, m in top.named_modules():
            if isinstance(m, kind):
                raise TypeError(
                    f"{call}: module {name or type(m).__name__!r} is a FullyShardedDataParallel, which flattens its "
                    "parameters: use torch.distributed.fsdp.fully_shard"
                )


def is_dtensor(p: Tensor) -> bool:
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and isinstance(p, tensor.DTensor)


def not_fully_shard(p: Any, name: str, call: str) -> TypeError:
    return TypeError(
        f"{call}: {describe(p, name)} is a DTensor with placements {p.placements}, and not known to be one of a "
        "fully_shard module. Tensor-parallel parameters are not supported: no rank has whole rows, and nobody has "
        "reduced them. For a fully_shard module pass params= the module itself, not a list of its parameters"
    )


def refuse_dtensors(named: Mapping[Tensor, str], call: str) -> None:
    """Raises TypeError for DTensors where nobody said what they are."""
    for p, name in named.items():
        if is_dtensor(p):
            raise not_fully_shard(p, name, call)


# --- what a surgery does with them


def state(
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
        "" if method is None else getattr(method, "__qualname__", type(method).__qualname__),
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


def average_gradients(
    ranks: Ranks, joint: Joint, rows: Sequence[dict[Tensor, Tensor]], own: dict[Tensor, Tensor], common: set[Tensor]
) -> None:
    """Means over the ranks of the rows of parameters in `common`, and of the gradients of all others, in place."""
    slots = []
    for p, kinds in joint.kinds.items():
        if not kinds:
            continue
        kind = next(iter(kinds)) if len(kinds) == 1 else DENSE
        if p in common:
            slots.extend(Slot(row, p) for t, row in enumerate(rows) if joint.masks[p] >> t & 1)
        else:
            slots.append(Slot(own, p, kind))
    ranks.average(slots)


def average_rows(
    ranks: Ranks,
    named: Mapping[Tensor, str],
    names: Sequence[str],
    rows: dict[Tensor, Tensor],
    loose: dict[Tensor, Tensor],
    counts: Tensor,
    loss_reduction: str = "sum",
    call: str = "fastmtl.one_pass",
) -> Tensor:
    """From the rows of one rank's part of a batch, in which every sample has a task, to those of the whole batch.

    They are replaced, in place where there are any, and equal bits on every rank.

    Args:
        ranks: those that the batch is spread over, not sharded.
        named: the parameters in the bank, with their names.
        names: the T tasks.
        rows: by parameter `[T, ...]`, of any strides: row t is the gradient of task t's part of this rank's loss as
            written, zero for a task without samples here. A parameter that this rank's loss does not reach is missing,
            and is put in if another's does.
        loose: by parameter, the gradient of samples that belong to no task, likewise.
        counts: `[T + 1]` int64, on the device of the rows: this rank's samples of each task, and of none.
        loss_reduction: what the one loss over the whole batch is.
            `"sum"`: the mean over the R ranks of their losses, each as written, which is what DDP's gradients belong
            to. Row t becomes `sum_r rows[r][t] / R`. One process has the same where a loss is a sum over samples
            divided by a constant (`N / R` for the mean over all N), and where it is a mean and the parts are equal.
            `"mean"`: every rank's loss is the sum over tasks of the mean over that rank's samples of the task, and so
            is that of the whole batch, over all of them. Row t becomes
            `sum_r rows[r][t] * counts[r][t] / sum_r counts[r][t]`, however unequal the parts are.

    Returns:
        `[T + 1]` int64, on the device of `counts`: the samples on all ranks. A task with zero is absent.

    Raises:
        ValueError: ranks that disagree on T, names, parameters or the reduction (on every rank).
    """
    with ranks.reporting(call):
        if loss_reduction not in ("sum", "mean"):
            raise ValueError(f"loss_reduction: expected 'sum' or 'mean', got {loss_reduction!r}")
        if counts.dtype != torch.int64 or counts.shape != (len(names) + 1,):
            raise ValueError(
                f"counts: expected torch.int64 of shape [{len(names) + 1}], got {counts.dtype} of {list(counts.shape)}"
            )
        for p, x in rows.items():
            if x.shape != (len(names), *p.shape):
                raise ValueError(
                    f"rows of {describe(p, named[p])}: expected shape {[len(names), *p.shape]}, got {list(x.shape)}"
                )
    mine = state(call, names, None, named, None, [True] * len(names), {}, [])
    # which of the two a parameter has here stands in place of its gradient's kind
    kinds = tuple(tuple(k for k, held in enumerate((rows, loose)) if p in held) for p in named)
    joint = ranks.meet(mine._replace(method=f"loss_reduction={loss_reduction!r}", kinds=kinds), named)
    totals = counts.clone()
    work = ranks.start_sum(totals)
    for p, some in joint.kinds.items():
        if 0 in some and p not in rows:
            rows[p] = torch.stack([torch.zeros_like(p)] * len(names))
        if 1 in some and p not in loose:
            loose[p] = torch.zeros_like(p)
    work.wait()
    factors = torch.full_like(totals, 1 / ranks.size, dtype=torch.float64)
    if loss_reduction == "mean":
        factors = counts.double() / totals.clamp(min=1)
    with torch.no_grad():
        scaled = [(rows[p], factors[:-1]) for p in named if p in rows]
        scaled += [(loose[p], factors[-1:]) for p in named if p in loose]
        for x, factor in scaled:
            wide = torch.promote_types(x.dtype, torch.float32)  # 7/8 of a bfloat16 row is rounded once
            torch.mul(x, factor.to(wide).reshape(-1, *[1] * (x.dim() - 1)), out=x)
        _sum_in_place(ranks, [x for x, _ in scaled])
    return totals


def _sum_in_place(ranks: Ranks, tensors: Sequence[Tensor]) -> None:
    """Sums over the ranks: large tensors as they are, small ones in buckets."""
    works, packed = [], []
    for bucket in _buckets([Slot({}, x) for x in tensors]):
        xs = [s.param for s in bucket]
        if len(xs) == 1 and xs[0].is_contiguous():
            works.append(ranks.start_sum(xs[0]))
            continue
        flat = torch.cat([x.reshape(-1) for x in xs])
        works.append(ranks.start_sum(flat))
        packed.append((flat, xs))
    for work in works:
        work.wait()
    for flat, xs in packed:
        for x, part in zip(xs, flat.split([x.numel() for x in xs]), strict=True):
            x.copy_(part.reshape(x.shape))


def sharded_gradients(
    ranks: Ranks,
    losses: Sequence[Tensor | None],
    found: Reach,
    named: Mapping[Tensor, str],
    retain_graph: bool,
) -> Iterator[tuple[int, list[tuple[Tensor, Tensor]]]]:
    """For each task its parameters in `named` and this rank's shards of their gradients, from `.backward()`.

    `autograd.grad` would go past the hooks of `fully_shard`, which gather and reduce. Every `.grad` in reach
    is set aside meanwhile, and so are hooks after accumulation: torch runs them in
    each pass, where no `.grad` is final.
    """
    assert ranks.managed is not None
    inside = {ranks.managed.get(leaf, leaf) for leaf in found.leaves} | set(named)
    aside = [(p, p.grad) for p in inside]
    hooks = []
    try:
        for p in inside:
            if waiting := getattr(p, "_post_accumulate_grad_hooks", None):
                hooks.append((waiting, dict(waiting)))
                waiting.clear()
        for t, loss in enumerate(losses):
            if loss is None or not any(mask >> t & 1 for mask in found.leaves.values()):
                continue
            for p in inside:
                p.grad = None
            loss.backward(retain_graph=retain_graph or bool(found.overlap[t] >> (t + 1)))
            yield t, [(p, local(p.grad)) for p in named if p.grad is not None]
    finally:
        for waiting, kept in hooks:
            waiting.update(kept)
        for p, g in aside:
            p.grad = g


def local(x: Any) -> Tensor:
    """This rank's shard of a DTensor."""
    with torch.no_grad():
        return x.to_local() if is_dtensor(x) else x


def write_sharded(updates: Sequence[tuple[Any, Tensor]]) -> None:
    """Accumulates shards into `.grad`, which stays a DTensor in the parameter's placements."""
    kind = sys.modules["torch.distributed.tensor"].DTensor
    with torch.no_grad():
        for p, g in updates:
            if p.grad is not None:
                local(p.grad).add_(g)
            else:
                p.grad = kind.from_local(
                    g, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
                )


def _buckets(slots: Sequence[Slot]) -> Iterator[list[Slot]]:
    """Large ones, each alone; small ones of one dtype and device, about `BUCKET_BYTES` together."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Slot]] = {}
    for s in slots:
        if s.param.numel() * s.param.element_size() >= LARGE_BYTES:
            yield [s]
        else:
            kinds.setdefault((s.param.dtype, s.param.device), []).append(s)
    for some in kinds.values():
        bucket: list[Slot] = []
        held = 0
        for s in some:
            bucket.append(s)
            held += s.param.numel() * s.param.element_size()
            if held >= BUCKET_BYTES:
                yield bucket
                bucket, held = [], 0
        if bucket:
            yield bucket


def _no_rows(slot: Slot) -> Tensor:
    """A sparse gradient without entries."""
    p, n = slot.param, slot.kind
    return torch.sparse_coo_tensor(
        torch.empty(n, 0, dtype=torch.int64, device=p.device),
        torch.empty(0, *p.shape[n:], dtype=p.dtype, device=p.device),
        p.shape,
        check_invariants=False,
    )


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
