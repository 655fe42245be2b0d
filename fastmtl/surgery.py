"""`fastmtl.backward`: the backward passes of several losses, with gradient surgery on what they share."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmtl import _features, distributed, methods
from fastmtl._graph import Reach, names_of, reach, read_loss_scale, read_losses
from fastmtl._library import without_autocast
from fastmtl._marks import Params, describe, is_per_task, read_params
from fastmtl._memory import can_keep, references_alone
from fastmtl._passes import DONATED, gradients, read_chunk_size
from fastmtl.distributed import Ranks, find_ranks, reporting
from fastmtl.methods import Weighting
from fastmtl.ops._rows import FLOAT_DTYPES, Rows, accumulate_dtype, present_params
from fastmtl.ops.combine import combine_into
from fastmtl.ops.gram import gram_rows

Row = list[Tensor | None]


class Surgery:
    """What one surgery saw and decided. All tensors are on the device of the gradients; nothing is copied to the
    host until asked.

    Attributes:
        gram: `[T, T]` Gram matrix of the shared parameters' gradients, float32 (float64 for float64 gradients),
            already divided by `loss_scale**2`. Zero for absent tasks. After `backward(features=)` it is the features'
            gradients that this, the cosines, conflicts and norms are about.
        weights: `[T]` float64 (what a callable returned, for one): the update of the shared parameters is
            `sum_t weights[t] * g_t`, where g_t are their own gradients in any case. 0 for absent tasks. Where no
            parameter is shared the method is not asked: every present task has weight 1.
        names: the T task names.
        present: per task, whether it had a loss (or a gradient, in a bank). After `one_pass` with task ids on a
            device a `[T]` bool tensor there, and `log_dict` then has all tasks.
    """

    __slots__ = ("gram", "names", "present", "weights")

    def __init__(self, gram: Tensor, weights: Tensor, names: Sequence[str], present: Sequence[bool] | Tensor) -> None:
        self.gram = gram
        self.weights = weights
        self.names = tuple(names)
        self.present = present if isinstance(present, Tensor) else tuple(present)

    def cosines(self) -> Tensor:
        """`[T, T]` float64 cosines between the tasks' gradients; 0 where one of the two is zero."""
        m = self.gram.to(torch.float64)
        norms = m.diagonal().sqrt()
        scale = norms[:, None] * norms
        return torch.where(scale == 0, 0.0, m / torch.where(scale == 0, 1.0, scale))

    def conflicts(self) -> Tensor:
        """`[T, T]` bool: which pairs of gradients have a negative inner product."""
        return self.gram < 0  # a diagonal entry is a squared norm

    def grad_norm(self) -> Tensor:
        """0-d float64: norm of the shared parameters' update (with `features=`: of the gradient that enters the
        trunk), `sqrt(w^T M w)`, without the loss scale."""
        w = self.weights.to(torch.float64)
        return (w @ self.gram.to(torch.float64) @ w).clamp(min=0).sqrt()

    def log_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """0-d tensors for a logger: `weight/<task>`, `norm/<task>` and `conflicts/<task>` (with how many tasks) of
        every present task, `grad_norm`, and `conflicts` (pairs). `prefix` is put before each key.
        """
        norms = self.gram.diagonal().sqrt()
        conflicts = self.conflicts().sum(1)
        out = {f"{prefix}grad_norm": self.grad_norm(), f"{prefix}conflicts": conflicts.sum() // 2}
        known = [True] * len(self.names) if isinstance(self.present, Tensor) else self.present
        for t, (name, here) in enumerate(zip(self.names, known, strict=True)):
            if here:
                out[f"{prefix}weight/{name}"] = self.weights[t]
                out[f"{prefix}norm/{name}"] = norms[t]
                out[f"{prefix}conflicts/{name}"] = conflicts[t]
        return out

    def __repr__(self) -> str:
        # no values: showing them would wait for the device
        if isinstance(self.present, Tensor):
            return f"Surgery({', '.join(self.names)})"
        tasks = zip(self.names, self.present, strict=True)
        return f"Surgery({', '.join(name if here else f'{name} (absent)' for name, here in tasks)})"


@torch._disable_dynamo  # inside a compiled step it runs eagerly, between two graphs
def backward(
    losses: Sequence[Tensor | None] | Tensor | Mapping[Any, Tensor | None],
    params: Params | None = None,
    *,
    shared: Params | None = None,
    method: str | Weighting = "pcgrad",
    retain_graph: bool = False,
    features: Tensor | Sequence[Tensor] | None = None,
    chunk_size: int | None = None,
    loss_scale: float | Tensor | None = None,
    groups: Any = None,
    process_group: Any = None,
) -> Surgery:
    """Replaces `sum(losses).backward()`: accumulates into `.grad`, with gradient surgery on shared parameters.

    A parameter that two or more losses reach is shared: its T gradients go into the Gram matrix, and their sum
    weighted by `method` comes out. A loss that does not reach it counts as a zero gradient. A parameter that one
    loss alone reaches (a head) gets that gradient as it is.

    Args:
        losses: a sequence or 1-D tensor of T scalars (named "0", "1", ...), or a dict name -> scalar; T from 1 to
            128. None in a sequence or dict: that task is absent. Elements of one vector are told apart where it
            was made by `torch.stack` or `torch.cat` of scalars and scaled by constants since; of other vectors
            (a mean over one dimension of a loss matrix) each element reaches everything, and `shared` is needed.
        params: a module or an iterable of parameters; others get nothing. None: every leaf that the losses
            reach; a leaf that is no `nn.Parameter` (an input that needs a gradient) then gets the plain sum of its
            gradients, unless no `nn.Parameter` is reached at all. Frozen parameters are left out, tied ones count
            once.
        shared: the shared ones among `params`, as a module or an iterable, where reach does not say it: all others
            get the plain sum of their gradients. Needed for compiled models. Parameters marked by
            `mark_per_task` are never shared.
        method: "pcgrad" (which draws its order from torch's default CPU generator) or another name (see
            `fastmtl.methods.get`), a `Method`, or a callable from the Gram matrix `[T, T]` to the weights `[T]`. It
            is not asked when nothing is shared, as with a single loss and no `shared`.
        retain_graph: keep the graphs for a further backward pass.
        loss_scale: what the losses were multiplied by (`scaler.get_scale()`, or better a device tensor): the
            method sees the Gram matrix divided by its square. The result stays scaled like the losses.
        features: the shared representation: a tensor, or an iterable of tensors (which may depend on each other, as
            the stages of a backbone), of any shape, float64, 32, 16 or bfloat16, that every loss goes through. T
            passes then stop there, `method` sees the Gram matrix of the gradients with respect to the features, and
            one pass takes their weighted sum through the trunk: exactly `sum_t weights[t] * g_t` of the shared
            parameters, with weights that are an approximation (docs/training-loops.md says what holds). Shared
            parameters must lie behind the features, and be reached through them alone. Those behind them that are
            not shared (outside `shared`, marked, reached by one loss) get the plain sum, for one more pass.
        chunk_size: how many backward passes to run at once (`torch.autograd.grad` with `is_grads_batched`, which is
            `vmap`). None or 1: one at a time. Equal up to rounding; more memory, and no custom function or
            compiled graph that vmap can't batch.
        groups: not available yet.
        process_group: the ranks whose gradients are averaged, whatever `params` is. None: those of the
            `DistributedDataParallel` or `fully_shard` module that `params` (or `shared`) itself is or contains; else
            this process alone. docs/distributed.md says what each rank passes and what is sent.

    Returns:
        A `Surgery`: Gram matrix, weights, cosines, conflicts.

    Raises:
        TypeError: losses that are not floating-point tensors; shared parameters or features of other dtypes than
            float64, 32, 16 and bfloat16, complex parameters, a sparse gradient of a shared parameter; a method that
            returns no floating-point tensor; `chunk_size` no int; `process_group` no process group; tensor-parallel
            parameters, `FullyShardedDataParallel` modules.
        ValueError: no loss, more than 128, a loss that is not a scalar or needs no gradient; no parameter reached;
            reach that can't be read without `shared`; shared parameters on several devices; weights of the wrong
            length; an unknown method. `features` that are leaves, need no gradient, are on several devices or that
            a loss does not reach; a shared parameter that a loss reaches past them. `chunk_size` below 1. Ranks that
            disagree on tasks, parameters or method (on every rank); a `process_group` without this rank; `features`,
            `chunk_size` or `process_group` with a `fully_shard` module.
        RuntimeError: several ranks and neither `params` nor `process_group` says what to do; another rank raised; what
            autograd raises; what vmap can't batch; a compiled graph with donated buffers (see below).
        NotImplementedError: `groups` is given.
        Nothing has been written to any `.grad` when one of these is raised.

    A non-finite gradient in any task shows in `.grad`, so that `GradScaler` skips the step. Peak extra memory: the
    T gradients of the shared parameters (with `features`: of the features); the result is written into the first of
    them where nobody else holds it. Hooks on a parameter run once per pass that reaches it: for each task (with
    `features` once, with `chunk_size` once per chunk, on a batch of gradients). Hooks after accumulation
    (`register_post_accumulate_grad_hook`) run once, when every `.grad` is written. Graphs compiled by inductor with
    donated buffers refuse a second backward pass: set `torch._functorch.config.donated_buffer = False` before their
    first call, pass `features=` where the trunk alone is compiled, or use `GradientBank`.

    Source: the shared/own split and PCGrad, Yu et al. 2020, Algorithm 1; the gradient of the representation, Sener
    and Koltun 2018, *Multi-Task Learning as Multi-Objective Optimization*, section 3.3.

    Example:
        >>> trunk, heads = torch.nn.Linear(4, 8), torch.nn.ModuleList(torch.nn.Linear(8, 1) for _ in range(2))
        >>> x = trunk(torch.ones(3, 4)).relu()
        >>> surgery = backward([head(x).square().mean() for head in heads], method="sum")
        >>> surgery.weights
        tensor([1., 1.], dtype=torch.float64)
    """
    if groups is not None:
        raise NotImplementedError("fastmtl.backward: groups is not available yet")
    return run_backward(
        losses,
        params,
        shared,
        method,
        retain_graph,
        loss_scale,
        accumulate=True,
        features=features,
        chunk_size=chunk_size,
        process_group=process_group,
    )


def run_backward(
    losses: Sequence[Tensor | None] | Tensor | Mapping[Any, Tensor | None],
    params: Params | None,
    shared: Params | None,
    method: str | Weighting,
    retain_graph: bool,
    loss_scale: float | Tensor | None,
    *,
    accumulate: bool,
    features: Tensor | Sequence[Tensor] | None = None,
    chunk_size: int | None = None,
    process_group: Any = None,
    module: torch.nn.Module | None = None,
    call: str = "fastmtl.backward",
) -> Surgery:
    """`backward`; with `accumulate=False` every `.grad` of `params` is overwritten, by None where not reached.

    `module`: what `params` are the parameters of, if that is known, for the ranks that take part.
    """
    ranks = find_ranks(params if module is None else module, shared, process_group, call)
    with reporting(ranks, call):
        read = _read(losses, params, shared, method, loss_scale, features, chunk_size, ranks, call)
    if ranks is None:
        updates, surgery = _operate_on(read, retain_graph)
    else:
        updates, surgery = _operate_over(ranks, read, retain_graph, call)
    if not accumulate:
        for p in read.named:
            p.grad = None
    if ranks is not None and ranks.sharded:
        distributed.write_sharded(updates)
    else:
        write(updates)
    after_accumulation(updates)
    return surgery


class _Read(NamedTuple):
    """Arguments of `backward`, read and checked, and what was found in the graph."""

    method: Weighting
    scale: float | Tensor | None
    names: list[str]
    tasks: list[Tensor | None]
    named: dict[Tensor, str]
    shared: dict[Tensor, str] | None
    any_leaf: bool  # named are the leaves that were found
    chunk_size: int
    features: list[Tensor]
    parts: _features.Split | None  # None: no features, or no loss
    found: Reach

    @property
    def present(self) -> list[bool]:
        return [loss is not None for loss in self.tasks]

    @property
    def device(self) -> torch.device:
        """Where a Gram matrix of nothing goes."""
        return next((loss.device for loss in self.tasks if loss is not None), next(iter(self.named)).device)

    def reached(self) -> dict[Tensor, int]:
        """Parameters with the bit mask of the tasks that reach them."""
        return {p: self.found.leaves[p] for p in self.named if p in self.found.leaves}

    def split(self, reached: Mapping[Tensor, int]) -> list[Tensor]:
        """The shared ones among them."""
        if not reached:
            raise ValueError(f"params: no loss reaches any of the {len(self.named)} parameters")
        if self.any_leaf and self.shared is None and any(isinstance(p, torch.nn.Parameter) for p in reached):
            # the gradient of a picture is no part of the tasks' conflict over the network
            reached = {p: mask for p, mask in reached.items() if isinstance(p, torch.nn.Parameter)}
        return split_shared(reached, self.named, self.shared, in_gram=not self.features)


def _read(
    losses: Sequence[Tensor | None] | Tensor | Mapping[Any, Tensor | None],
    params: Params | None,
    shared: Params | None,
    method: str | Weighting,
    loss_scale: float | Tensor | None,
    features: Tensor | Sequence[Tensor] | None,
    chunk_size: int | None,
    ranks: Ranks | None,
    call: str,
) -> _Read:
    method = methods.get(method)
    scale = read_loss_scale(loss_scale)
    averaged = ranks is not None and not ranks.sharded
    names, tasks = read_losses(losses, may_be_absent=averaged and params is not None)
    named = None if params is None else read_params(params, "params")
    shared_named = None if shared is None else read_params(shared, "shared")
    if ranks is not None:
        named = named and ranks.rename(named)
        shared_named = shared_named and ranks.rename(shared_named)
    chunk = read_chunk_size(chunk_size)
    cut = [] if features is None else _features.read_features(features)
    if ranks is not None and ranks.sharded and (cut or chunk > 1):
        raise ValueError(
            f"{call}: {'features' if cut else 'chunk_size'}: not available for fully_shard modules, whose gradients "
            "come from one ordinary .backward() per task"
        )
    parts = _features.split(tasks, names, cut) if cut and any(loss is not None for loss in tasks) else None
    found = reach(tasks) if parts is None else parts.found
    if ranks is not None and ranks.managed is not None:
        found = found._replace(leaves={ranks.managed.get(p, p): mask for p, mask in found.leaves.items()})
    if shared is None and (found.compiled or found.entangled or found.joined):
        through = names_of(found.compiled or found.entangled or found.joined, names)
        if found.compiled:
            raise ValueError(
                f"losses {through} pass through the same compiled graph (torch.compile), which does not tell what "
                "each of them reaches: pass shared=, the parameters (or the module) that the tasks share"
            )
        if not found.entangled:
            raise ValueError(
                f"losses {through} take different parts of one tensor made by torch.cat or torch.stack, which does "
                "not tell what each of them reaches: use what was joined apart, or pass shared=, the parameters (or "
                "the module) that the tasks share"
            )
        raise ValueError(
            f"losses {through} are elements of one vector, each of which reaches all that the vector reaches: "
            "pass them as a list of scalars computed apart, or pass shared=, the parameters (or the module) that "
            "the tasks share"
        )
    if named is not None and shared_named is not None:
        check_within(shared_named, named)
    if named is None:
        # a name for what was found in the graph: the one in `shared`, else its position
        known = shared_named or {}
        named = {p: known.get(p, f"{i} (of those that the losses reach)") for i, p in enumerate(found.leaves)}
    if ranks is None:
        distributed.refuse_dtensors(named, call)
    else:
        ranks.check_params(named, call)
    return _Read(method, scale, names, tasks, named, shared_named, params is None, chunk, cut, parts, found)


def _operate_on(read: _Read, retain_graph: bool) -> tuple[list[tuple[Tensor, Tensor]], Surgery]:
    """Each parameter's update, in one process."""
    reached = read.reached()
    common = read.split(reached)
    decide = functools.partial(
        operate, present=read.present, names=read.names, method=read.method, scale=read.scale, device=read.device
    )
    if read.parts is None:
        rows, own = _task_gradients(read, reached, common, read.named, retain_graph)
        return decide(common, rows, own)
    rows, own, plain, sums = _feature_gradients(read, read.parts, reached, common, retain_graph)
    updates, surgery = decide(list(read.parts.features), rows, {})
    return _through_trunk(updates, common, own, plain, sums, retain_graph), surgery


def _operate_over(
    ranks: Ranks, read: _Read, retain_graph: bool, call: str
) -> tuple[list[tuple[Tensor, Tensor]], Surgery]:
    """Each parameter's update, over several ranks."""
    call = f"{call} with features=" if read.features else call
    reached = read.reached()
    decide = functools.partial(
        operate, names=read.names, method=read.method, scale=read.scale, device=read.device, ranks=ranks
    )

    def meet(
        holders: Sequence[Mapping[Tensor, Tensor]], same: str | None = None
    ) -> tuple[distributed.Joint, list[Tensor]]:
        mine = distributed.state(call, read.names, read.method, read.named, read.shared, read.present, reached, holders)
        joint = ranks.meet(mine, read.named, same=same)
        if not any(joint.present):
            raise ValueError(f"losses: expected at least one loss, got {len(read.names)} times None on every rank")
        return joint, read.split({p: mask for p, mask in joint.masks.items() if mask})

    if ranks.sharded:
        joint, common = meet([], same=distributed.SAME_PASSES)
        rows, own = [[None] * len(common) for _ in read.names], {}
        slots = {p: i for i, p in enumerate(common)}
        for t, grads in distributed.sharded_gradients(ranks, read.tasks, read.found, read.named, retain_graph):
            for p, g in grads:
                if p in slots:
                    rows[t][slots[p]] = g
                else:
                    add_own(own, p, g)
        return on_shards(common, functools.partial(decide, rows=rows, own=own, present=joint.present))

    if ranks.same_passes:
        meet([], same=distributed.SAME_PASSES)
    if read.features:
        joint, common = meet([])
        rows, own, plain, sums = [], {}, [], []
        with ranks.together(call):
            if read.parts is not None:
                rows, own, plain, sums = _feature_gradients(read, read.parts, reached, common, retain_graph)
        features = read.features if read.parts is None else list(read.parts.features)
        with ranks.reporting(call):
            updates, surgery = decide(features, rows, {}, joint.present, apart=True)
            own = dict(_through_trunk(updates, common, own, plain, sums, retain_graph))
        joint, _ = meet([own])
        distributed.average_gradients(ranks, joint, [], own, set())
        return list(own.items()), surgery

    with ranks.reporting(call):
        # what is shared is known when the ranks have met; until then all that may be has rows
        columns = [p for p in reached if not is_per_task(p) and (read.shared is None or p in read.shared)]
        rows, own = _task_gradients(read, reached, columns, None, retain_graph)
        held = [{p: g for p, g in zip(columns, row, strict=True) if g is not None} for row in rows]
        del rows
    joint, common = meet([*held, own])
    return operate_on_means(common, held, own, joint, read.named, decide, ranks)


def operate_on_means(
    common: Sequence[Tensor],
    held: list[dict[Tensor, Tensor]],
    own: dict[Tensor, Tensor],
    joint: distributed.Joint,
    named: Mapping[Tensor, str],
    decide: Callable[..., tuple[list[tuple[Tensor, Tensor]], Surgery]],
    ranks: Ranks,
) -> tuple[list[tuple[Tensor, Tensor]], Surgery]:
    """Surgery on the means over the ranks of T rows by parameter, which replace them, and of other gradients."""
    for p in common:
        if joint.kinds[p] - {distributed.DENSE}:
            raise sparse_shared(torch.sparse_coo, p, named)
    in_common = set(common)
    for row in held:
        for p, g in row.items():
            if p not in in_common:
                add_own(own, p, g)
    distributed.average_gradients(ranks, joint, held, own, in_common)
    rows: list[Row] = [[row.get(p) for p in common] for row in held]
    return decide(common, rows, own, joint.present)


def on_shards(
    common: Sequence[Tensor], decide: Callable[..., tuple[list[tuple[Tensor, Tensor]], Surgery]]
) -> tuple[list[tuple[Tensor, Tensor]], Surgery]:
    """Surgery on this rank's shards of the parameters in `common`."""
    shards = {distributed.local(p): p for p in common}
    updates, surgery = decide(list(shards), apart=True)
    return [(shards.get(p, p), g) for p, g in updates], surgery


def _task_gradients(
    read: _Read,
    reached: Mapping[Tensor, int],
    common: Sequence[Tensor],
    dense: Mapping[Tensor, str] | None,
    retain_graph: bool,
) -> tuple[list[Row], dict[Tensor, Tensor]]:
    """T rows of the shared parameters' gradients, and the summed gradients of the others.

    `dense`: the names of those in `common` if a sparse gradient of theirs is an error.
    """
    tasks, found = read.tasks, read.found
    slots = {p: i for i, p in enumerate(common)}
    rows: list[Row] = [[None] * len(common) for _ in tasks]
    own: dict[Tensor, Tensor] = {}
    for t, grads in gradients(tasks, reached, found.overlap, retain_graph, read.chunk_size, found.donated):
        row = rows[t]
        for p, g in grads:
            slot = slots.get(p)
            if slot is None:
                if g is not None:
                    add_own(own, p, g)
            else:
                if dense is not None and g is not None and g.layout is not torch.strided:
                    raise sparse_shared(g.layout, p, dense)
                row[slot] = g
    return rows, own


def _feature_gradients(
    read: _Read,
    parts: _features.Split,
    reached: Mapping[Tensor, int],
    common: Sequence[Tensor],
    retain_graph: bool,
) -> tuple[list[Row], dict[Tensor, Tensor], list[tuple[Tensor, Tensor]]]:
    """T passes to the features: their gradients, the sums of others on the way, and the features' plain sums where
    parameters behind them want these, for a pass of their own. Then `_through_trunk`."""
    _features.check_trunk(common, parts, read.named, read.names, read.shared is not None)
    features = list(parts.features)
    in_common = set(common)
    plain = [p for p in reached if p in parts.trunk and p not in in_common]
    past = {p: mask for p, mask in parts.past.items() if p in reached}
    # a pass that must stop at the features still runs through the graph behind them, and would free it
    stop = bool(parts.nested) or any(p in parts.trunk for p in past)
    if parts.donated and (retain_graph or stop or plain):
        raise RuntimeError(DONATED)
    with _features.cut_at(features, stop):
        rows, own = _task_gradients(
            read, parts.features | past, features, dict.fromkeys(features, "features"), retain_graph or stop
        )
    return rows, own, plain, _features.plain_sums(rows, features) if plain else []


def _through_trunk(
    updates: Sequence[tuple[Tensor, Tensor]],
    common: Sequence[Tensor],
    own: dict[Tensor, Tensor],
    plain: Sequence[Tensor],
    sums: Sequence[tuple[Tensor, Tensor]],
    retain_graph: bool,
) -> list[tuple[Tensor, Tensor]]:
    """One pass from the features on; one more for the parameters behind them that want the plain sum."""
    out = _features.through_trunk(updates, common, retain_graph or bool(plain)) if updates else []
    if plain:
        for p, g in _features.through_trunk(sums, plain, retain_graph):
            add_own(own, p, g)
    out.extend(own.items())
    return out


def split_shared(
    reached: Mapping[Tensor, int],
    named: Mapping[Tensor, str],
    shared: Mapping[Tensor, str] | None,
    *,
    in_gram: bool = True,
) -> list[Tensor]:
    """The shared parameters among the reached ones (parameter -> bit mask of tasks), checked.

    `in_gram`: their gradients go into a Gram matrix, so that they need a kernel and one device.

    Raises:
        TypeError: complex parameters, or shared ones of a dtype that has no kernel.
        ValueError: no loss reaches any parameter in `shared`; several devices.
    """
    if shared is not None and not any(p in reached for p in shared) and any(p.requires_grad for p in shared):
        raise ValueError("shared: no loss reaches any of these parameters")
    common = []
    for p, mask in reached.items():
        if p.is_complex():
            raise TypeError(f"{describe(p, named[p])}: expected a real parameter, got {p.dtype}")
        if is_per_task(p) or not (mask & (mask - 1) if shared is None else p in shared):
            continue
        if in_gram and p.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"{describe(p, named[p])} is shared: expected float64, float32, bfloat16 or float16, got {p.dtype}"
            )
        if in_gram and common and p.device != common[0].device:
            raise ValueError(
                f"{describe(p, named[p])} is shared and on {p.device}, but {describe(common[0], named[common[0]])} "
                f"is on {common[0].device}: the parameters in one Gram matrix must be on one device"
            )
        common.append(p)
    return common


def check_within(shared: Mapping[Tensor, str], named: Mapping[Tensor, str]) -> None:
    for p, name in shared.items():
        if p.requires_grad and p not in named:
            raise ValueError(f"shared: {describe(p, name)} is not among params")


def sparse_shared(layout: torch.layout, param: Tensor, named: Mapping[Tensor, str]) -> TypeError:
    return TypeError(
        f"{describe(param, named[param])} is shared and has a sparse gradient ({layout}), which has no place "
        "in a Gram matrix: mark it with fastmtl.mark_per_task or leave it out of shared= (it then gets the plain sum "
        "of its gradients), or make the gradient dense"
    )


def add_own(own: dict[Tensor, Tensor], param: Tensor, grad: Tensor) -> None:
    """Sums gradients of a parameter that is not shared; never in place, since autograd may hold `grad` too."""
    before = own.get(param)
    if before is None:
        own[param] = grad
    else:
        with torch.no_grad():
            # sparse + dense is not defined, dense + sparse is
            own[param] = grad + before if before.layout is not torch.strided else before + grad


def operate(
    common: Sequence[Tensor],
    rows: list[Row],
    own: dict[Tensor, Tensor],
    present: Sequence[bool],
    names: Sequence[str],
    method: Weighting,
    scale: float | Tensor | None,
    device: torch.device,
    held: int = 0,
    ranks: Ranks | None = None,
    apart: bool = False,
) -> tuple[list[tuple[Tensor, Tensor]], Surgery]:
    """The surgery itself: T rows of shared gradients in, every parameter with its update out. Empties `rows` and `own`.

    `device` is where the Gram matrix goes when there is no shared gradient; `held` counts the references that the
    caller still has to each gradient, besides `rows`. Updates are written into the gradients' own memory where
    nobody else can see it.

    `ranks`: who decides together, with the rows equal on all of them, or `apart`: each rank has columns of its own.
    """
    updates: list[tuple[Tensor, Tensor]] = []
    num_tasks, n = len(names), len(common)
    # what ops.gram checks is known here: autograd gives every gradient its parameter's shape, dtype and device
    index = [t * n + i for t, row in enumerate(rows) for i, g in enumerate(row) if g is not None]
    tensors = [g for row in rows for g in row if g is not None]
    rows.clear()
    with torch.no_grad(), without_autocast((common[0].device if common else device).type):
        if tensors or (apart and common):
            params = [common[i] for i in present_params(index, n)]
            columns = _result_memory(params, tensors, index, n, held)
            known = Rows(tensors, index, num_tasks, n)
            if ranks is None and type(method) is methods.PCGrad:  # whose weights don't depend on the scale
                gram, weights = method.operate(known, columns, present)
                gram = unscaled(gram, scale)
            else:
                if tensors:
                    gram = gram_rows(known)
                else:  # the other ranks have some
                    dtype = accumulate_dtype([p.dtype for p in common])
                    gram = torch.zeros(num_tasks, num_tasks, dtype=dtype, device=device)
                if ranks is not None and apart:
                    gram = ranks.total_gram(gram)
                gram = unscaled(gram, scale)
                weights = _decide(method, gram, present, ranks)
                if tensors:
                    combine_into(weights, known, columns)
            updates.extend(zip(params, columns, strict=True))
        else:
            gram = torch.zeros(num_tasks, num_tasks, device=device)
            weights = torch.zeros(num_tasks, dtype=torch.float64, device=device)
            for t, here in enumerate(present):
                if here:
                    weights[t].fill_(1.0)
    updates.extend(own.items())
    own.clear()  # another reference to each
    return updates, Surgery(gram, weights, names, present)


def _decide(method: Weighting, gram: Tensor, present: Sequence[bool], ranks: Ranks | None) -> Tensor:
    """The weights; the first rank's, where there are several."""
    if ranks is None:
        return methods.solve(method, gram, present)
    if not isinstance(method, methods.Method):
        # whatever it does, it may raise on one rank alone; it does not mind waiting for the host
        with ranks.together(f"method {getattr(method, '__qualname__', method)!r}"):
            weights = methods.solve(method, gram, present)
        return ranks.first_of(weights)
    try:
        weights = methods.solve(method, gram, present)
    except Exception:
        # the others must not wait; they get NaN
        ranks.first_of(torch.full_like(gram[0], torch.nan, dtype=torch.float64))
        raise
    return ranks.first_of(weights)


def _result_memory(
    params: Sequence[Tensor], tensors: Sequence[Tensor], index: Sequence[int], n: int, held: int
) -> list[Tensor]:
    """For each parameter its first task's gradient, to be overwritten, if nobody else holds it; else new memory.

    New memory would add P to the peak, and on a CPU its first touch costs as much as the combine itself.
    """
    first: dict[int, int] = {}
    for k, position in enumerate(index):
        first.setdefault(position % n, k)
    seen: set[int] = set()
    alone = references_alone()
    memory = []
    for p, (_, k) in zip(params, sorted(first.items()), strict=True):
        g = tensors[k]
        if sys.getrefcount(g) <= alone + held and can_keep(p, g, seen):
            memory.append(g)
        else:
            memory.append(torch.empty_like(p, dtype=g.dtype))
    return memory


def unscaled(gram: Tensor, scale: float | Tensor | None) -> Tensor:
    """The Gram matrix of the gradients without the loss scale."""
    if scale is None:
        return gram
    squared = scale.to(torch.float64) ** 2 if isinstance(scale, Tensor) else scale**2
    return (gram.to(torch.float64) / squared).to(gram.dtype)


def write(updates: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Accumulates into `.grad` as autograd does: in place where there is one, else in the parameter's layout."""
    seen: set[int] = set()
    alone = references_alone()
    with torch.no_grad():
        for p, g in updates:
            before = p.grad
            if before is None:
                # detached, a view lets go of its base
                keep = sys.getrefcount(g) <= alone and can_keep(p, g, seen)
                p.grad = g.detach() if keep else _copy_like(p, g)
            elif before.layout is not torch.strided and g.layout is torch.strided:
                p.grad = g + before
            elif before.layout is torch.strided and 0 in before.stride():
                p.grad = before + g  # an expanded tensor can't be added to in place
            else:
                before.add_(g)


@torch.no_grad()
def after_accumulation(updates: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Runs what `register_post_accumulate_grad_hook` registered, as autograd does: an optimizer may sit there."""
    for p, _ in updates:
        hooks = getattr(p, "_post_accumulate_grad_hooks", None)
        for hook in tuple(hooks.values()) if hooks else ():
            hook(p)


def _copy_like(param: Tensor, grad: Tensor) -> Tensor:
    if grad.layout is not torch.strided:
        return grad.clone()
    return torch.empty_like(param, dtype=grad.dtype).copy_(grad)
