"""`fastmtl.backward`: the backward passes of several losses, with gradient surgery on what they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmtl import methods
from fastmtl.core.gradient_rows import MAX_TASKS
from fastmtl.distributed.averaging import average_gradients
from fastmtl.distributed.dtensors import refuse_dtensors
from fastmtl.distributed.ranks import SAME_PASSES, Joint, Ranks, reporting, statement_of
from fastmtl.distributed.wrappers import find_ranks
from fastmtl.methods import Every, Method, Weighting
from fastmtl.parameters import Params, is_per_task, read_params
from fastmtl.surgery.accumulate import Updates, accumulate
from fastmtl.surgery.groups import Groups, GroupsArgument, read_groups
from fastmtl.surgery.result import ReusedSurgery, Surgery
from fastmtl.surgery.solve import SurgeryOptions, solve, solve_groups
from fastmtl.surgery.task_gradients import Row, TaskGradients
from fastmtl.task_gradients.features import (
    Split,
    check_trunk,
    cut_at,
    plain_sums,
    read_features,
    split_at_features,
    through_trunk,
)
from fastmtl.task_gradients.fully_shard import grads_aside, sharded_gradients
from fastmtl.task_gradients.passes import DONATED, grad, read_chunk_size, run_passes
from fastmtl.task_gradients.rank_means import averaged, of_shards
from fastmtl.task_gradients.reach import Reach, names_of, reach, read_loss_scale, read_losses
from fastmtl.task_gradients.sharing import add_unshared, check_within, sparse_shared, split_shared
from fastmtl.task_gradients.weighted_pass import norm_of, weighted_pass

_SECOND_WAY = "pass second_losses=, the same tasks' losses on a second batch"


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
    process_group: Any = None,
    second_losses: Sequence[Tensor | None] | Tensor | Mapping[Any, Tensor | None] | None = None,
    groups: GroupsArgument | None = None,
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
            is not asked when nothing is shared, as with a single loss and no `shared`. `Every(method, k)` is asked at
            every k-th call, and makes the others one pass.
        retain_graph: keep the graphs for a further backward pass.
        loss_scale: what the losses were multiplied by (`scaler.get_scale()`, or better a device tensor): the
            method sees the Gram matrix divided by its square. The result stays scaled like the losses.
        features: the shared representation: a tensor, or an iterable of tensors (which may depend on each other, as
            the stages of a backbone), of any shape, float64, 32, 16 or bfloat16, that every loss goes through. T
            passes then stop there, `method` sees the Gram matrix of the gradients with respect to the features, and
            one pass takes their weighted sum through the trunk: exactly `sum_t weights[t] * g_t` of the shared
            parameters, with weights that are an approximation (docs/guides/training-loops.md says what holds). Shared
            parameters must lie behind the features, and be reached through them alone. Those behind them that are
            not shared (outside `shared`, marked, reached by one loss) get the plain sum, for one more pass.
        chunk_size: how many backward passes to run at once (`torch.autograd.grad` with `is_grads_batched`, which is
            `vmap`). None or 1: one at a time. Equal up to rounding; more memory, and no custom function or
            compiled graph that vmap can't batch.
        process_group: the ranks whose gradients are averaged, whatever `params` is. None: those of the
            `DistributedDataParallel` or `fully_shard` module that `params` (or `shared`) itself is or contains; else
            this process alone. docs/guides/distributed.md says what each rank passes and what is sent.
        second_losses: the same tasks' losses on a second, independent batch, for a method that needs one (`MoDo`): in
            the form of `losses`, with the same names and absent tasks, and scaled alike; at most 64 tasks. T more
            passes take their gradients of the shared parameters, which enter the method's Gram matrices and nothing
            else.
        groups: groups of shared parameters, each with a Gram matrix and weights of its own: "tensor" (each parameter),
            "layer" (those of one module together, as its weight and bias; `params` must be a module), a sequence of
            modules or lists of parameters, or a dict of them with names. What a method keeps from one step to the next
            it keeps for each group. Parameters in a group that are not shared have no part in it. None: all together.

    Returns:
        A `Surgery`: Gram matrix, weights, cosines, conflicts. With `groups`, of L of them: `gram` is `[L, T, T]`,
        `weights` `[L, T]`, and `surgery.groups` has their names.

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
            `chunk_size` or `process_group` with a `fully_shard` module. A method that needs a second batch without
            `second_losses`, which is the other way round an error too, as are other tasks in them than in `losses`,
            more than 64, or `features` beside them. `groups` that overlap, lack a shared parameter or have an unknown
            name; together with `features` or `methods.Every`, which have one set of weights for all.
        RuntimeError: several ranks and neither `params` nor `process_group` says what to do; another rank raised; what
            autograd raises; what vmap can't batch; a compiled graph with donated buffers (see below).

    Nothing has been written to any `.grad` when one of these is raised.

    A non-finite gradient in any task shows in `.grad`, so that `GradScaler` skips the step. Peak extra memory: the
    T gradients of the shared parameters (with `features`: of the features); the result is written into the first of
    them where nobody else holds it. Hooks on a parameter run once per pass that reaches it: for each task (with
    `features` once, with `chunk_size` once per chunk, on a batch of gradients). Hooks after accumulation
    (`register_post_accumulate_grad_hook`) run once, when every `.grad` is written. Graphs compiled by inductor with
    donated buffers refuse a second backward pass: import `torch._functorch.config` and set its `donated_buffer = False`
    before their first call, pass `features=` where the trunk alone is compiled, or use `GradientBank`.

    Source: the shared/own split and PCGrad, Yu et al. 2020, Algorithm 1; the gradient of the representation, Sener
    and Koltun 2018, *Multi-Task Learning as Multi-Objective Optimization*, section 3.3.

    Example:
        >>> trunk, heads = torch.nn.Linear(4, 8), torch.nn.ModuleList(torch.nn.Linear(8, 1) for _ in range(2))
        >>> x = trunk(torch.ones(3, 4)).relu()
        >>> surgery = backward([head(x).square().mean() for head in heads], method="sum")
        >>> surgery.weights
        tensor([1., 1.], dtype=torch.float64)
    """
    return run_backward(
        losses,
        params,
        shared,
        method,
        retain_graph,
        loss_scale,
        features=features,
        chunk_size=chunk_size,
        process_group=process_group,
        second_losses=second_losses,
        groups=groups,
    )


def run_backward(
    losses: Sequence[Tensor | None] | Tensor | Mapping[Any, Tensor | None],
    params: Params | None,
    shared: Params | None,
    method: str | Weighting,
    retain_graph: bool,
    loss_scale: float | Tensor | None,
    *,
    overwrite: bool = False,
    features: Tensor | Sequence[Tensor] | None = None,
    chunk_size: int | None = None,
    process_group: Any = None,
    second_losses: Sequence[Tensor | None] | Tensor | Mapping[Any, Tensor | None] | None = None,
    groups: GroupsArgument | None = None,
    module: torch.nn.Module | None = None,
    call: str = "fastmtl.backward",
) -> Surgery:
    """`backward`; with `overwrite` every `.grad` of `params` is overwritten, by None where not reached.

    `module`: what `params` are the parameters of, if that is known, for the ranks that take part.
    """
    ranks = find_ranks(params if module is None else module, shared, process_group, call)
    with reporting(ranks, call):
        read = _read(losses, params, shared, method, loss_scale, features, chunk_size, second_losses, ranks, call)
        if groups is not None:
            read = read._replace(groups=_read_groups(groups, params, read, ranks))
    updates, surgery = _collect_and_solve(read, retain_graph, ranks, call)
    if overwrite:
        for p in read.named:
            p.grad = None
    accumulate(updates, run_hooks=True)
    return surgery


class _Read(NamedTuple):
    """Arguments of `backward`, read and checked, and what was found in the graph."""

    method: Weighting
    scale: float | Tensor | None
    names: list[str]
    tasks: list[Tensor | None]  # T losses, or 2T with those of a second batch behind them
    named: dict[Tensor, str]
    shared: dict[Tensor, str] | None
    any_leaf: bool  # named are the leaves that were found
    chunk_size: int
    features: list[Tensor]
    parts: Split | None  # None: no features, or no loss
    found: Reach
    groups: Groups | None = None

    @property
    def losses(self) -> list[Tensor | None]:
        return self.tasks[: len(self.names)]

    @property
    def present(self) -> list[bool]:
        return [loss is not None for loss in self.losses]

    @property
    def options(self) -> SurgeryOptions:
        losses = self.losses if "losses" in methods.needs_of(self.method) else None
        return SurgeryOptions(self.method, self.scale, losses=losses, groups=self.groups)

    @property
    def device(self) -> torch.device:
        """Where a Gram matrix of nothing goes."""
        return next((loss.device for loss in self.tasks if loss is not None), next(iter(self.named)).device)

    def reached(self) -> dict[Tensor, int]:
        """Parameters that the tasks reach, with the bit mask of those that do, a second batch's included."""
        masks = self.found.leaves
        return {p: masks[p] for p in self.named if p in masks and self.by_tasks(masks[p])}

    def by_tasks(self, mask: int) -> int:
        """The bits of the T tasks, without those of a second batch."""
        return mask & ((1 << len(self.names)) - 1)

    def split(self, reached: Mapping[Tensor, int]) -> list[Tensor]:
        """The shared ones among them."""
        reached = {p: self.by_tasks(mask) for p, mask in reached.items() if self.by_tasks(mask)}
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
    second_losses: Sequence[Tensor | None] | Tensor | Mapping[Any, Tensor | None] | None,
    ranks: Ranks | None,
    call: str,
) -> _Read:
    method = methods.for_one_call(method)
    scale = read_loss_scale(loss_scale)
    means = ranks is not None and not ranks.sharded
    names, tasks = read_losses(losses, may_be_absent=means and params is not None)
    if second_losses is not None:
        tasks += _read_second(second_losses, names, tasks, method, features)
    else:
        methods.check_needs(method, call, {"second_batch": _SECOND_WAY})
    named = None if params is None else read_params(params, "params")
    shared_named = None if shared is None else read_params(shared, "shared")
    if ranks is not None:
        named = named and ranks.rename(named)
        shared_named = shared_named and ranks.rename(shared_named)
    chunk = read_chunk_size(chunk_size)
    cut = [] if features is None else read_features(features)
    if ranks is not None and ranks.sharded and (cut or chunk > 1):
        raise ValueError(
            f"{call}: {'features' if cut else 'chunk_size'}: not available for fully_shard modules, whose gradients "
            "come from one ordinary .backward() per task"
        )
    parts = split_at_features(tasks, names, cut) if cut and any(loss is not None for loss in tasks) else None
    found = reach(tasks) if parts is None else parts.found
    if ranks is not None and ranks.managed is not None:
        found = found._replace(leaves={ranks.managed.get(p, p): mask for p, mask in found.leaves.items()})
    if shared is None and (found.compiled or found.entangled or found.joined):
        both = [*names, *(f"second {name}" for name in names)]
        through = names_of(found.compiled or found.entangled or found.joined, both)
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
        refuse_dtensors(named, call)
    else:
        ranks.check_params(named, call)
    return _Read(method, scale, names, tasks, named, shared_named, params is None, chunk, cut, parts, found)


def _read_second(
    losses: Sequence[Tensor | None] | Tensor | Mapping[Any, Tensor | None],
    names: Sequence[str],
    tasks: Sequence[Tensor | None],
    method: Weighting,
    features: Tensor | Sequence[Tensor] | None,
) -> list[Tensor | None]:
    """The losses of the same tasks on a second batch, in their order."""
    if "second_batch" not in methods.needs_of(method):
        raise ValueError(f"second_losses: method {method!r} takes no second batch")
    if features is not None:
        raise ValueError(
            "second_losses: expected None beside features=: two batches have features of their own, so that the "
            "gradients with respect to them have no inner product"
        )
    second_names, found = read_losses(losses, may_be_absent=True, argument="second_losses")
    if set(second_names) != set(names):
        raise ValueError(f"second_losses: expected the tasks of losses, {list(names)}, got {second_names}")
    if 2 * len(names) > MAX_TASKS:
        raise ValueError(f"second_losses: expected at most {MAX_TASKS // 2} tasks, got {len(names)}")
    by_name = dict(zip(second_names, found, strict=True))
    for name, loss in zip(names, tasks, strict=True):
        if (loss is None) != (by_name[name] is None):
            has, lacks = ("losses", "second_losses") if loss is not None else ("second_losses", "losses")
            raise ValueError(f"second_losses: task {name!r} has a loss in {has} and none in {lacks}")
    return [by_name[name] for name in names]


def _read_groups(groups: GroupsArgument, params: Params | None, read: _Read, ranks: Ranks | None) -> Groups:
    """The groups, where each may have weights of its own."""
    if read.features or isinstance(read.method, methods.Every):
        other = "features=" if read.features else "methods.Every"
        raise ValueError(f"groups: expected None beside {other}, which takes one set of weights through a single pass")
    if isinstance(read.method, Method) and not read.method.by_group:
        raise ValueError(
            f"groups: not available with {read.method!r}, which keeps tensors of all shared parameters or knows tasks "
            "by name"
        )
    return read_groups(groups, params, read.named, dict if ranks is None else ranks.rename)


def _collect_and_solve(read: _Read, retain_graph: bool, ranks: Ranks | None, call: str) -> tuple[Updates, Surgery]:
    """The backward passes, and the surgery on what they leave."""
    call = f"{call} with features=" if read.features else call
    if isinstance(read.method, Every):
        reused = _reuse_weights(read, read.method, retain_graph, ranks, call)
        if reused is not None:
            return reused
    if read.features:
        return _solve_by_features(read, retain_graph, ranks, call)
    if ranks is None:
        gradients = _collect_alone(read, retain_graph)
    elif ranks.sharded:
        gradients = _collect_shards(read, retain_graph, ranks, call)
    else:
        gradients = _collect_means(read, retain_graph, ranks, call)
    return solve_groups(gradients, read.options._replace(ranks=ranks), read.named)


def _collect_alone(read: _Read, retain_graph: bool) -> TaskGradients:
    reached = read.reached()
    shared = read.split(reached)
    rows, unshared = _collect_rows(read, reached, shared, read.named, retain_graph)
    return TaskGradients(shared, rows, unshared, read.names, read.present, read.device)


def _meet(
    read: _Read, ranks: Ranks, call: str, holders: Sequence[Mapping[Tensor, Tensor]] = (), same: str | None = None
) -> tuple[Joint, list[Tensor]]:
    """What the ranks have together, and the parameters that are shared then."""
    names = [*read.names, *(f"second {name}" for name in read.names)][: len(read.tasks)]
    present = [loss is not None for loss in read.tasks]
    if read.groups is not None:
        call = f"{call} with groups {[read.groups.members.get(p) for p in read.named]}"
    mine = statement_of(call, names, read.method, read.named, read.shared, present, read.reached(), holders)
    joint = ranks.meet(mine, read.named, same=same)
    if not any(joint.present):
        raise ValueError(f"losses: expected at least one loss, got {len(read.names)} times None on every rank")
    joint = joint._replace(present=joint.present[: len(read.names)])
    return joint, read.split({p: mask for p, mask in joint.masks.items() if mask})


def _collect_shards(read: _Read, retain_graph: bool, ranks: Ranks, call: str) -> TaskGradients:
    joint, shared = _meet(read, ranks, call, same=SAME_PASSES)
    rows: list[Row] = [[None] * len(shared) for _ in read.tasks]
    unshared: dict[Tensor, Tensor] = {}
    slots = {p: i for i, p in enumerate(shared)}
    for t, grads in sharded_gradients(ranks, read.tasks, read.found, read.named, retain_graph):
        for p, g in grads:
            if p in slots:
                rows[t][slots[p]] = g
            elif t < len(read.names):
                add_unshared(unshared, p, g)
    return of_shards(shared, rows, unshared, read.names, joint.present, read.device)


def _collect_means(read: _Read, retain_graph: bool, ranks: Ranks, call: str) -> TaskGradients:
    if ranks.same_passes:
        _meet(read, ranks, call, same=SAME_PASSES)
    with ranks.reporting(call):
        # what is shared is known when the ranks have met; until then all that may be has rows
        reached = read.reached()
        columns = [p for p in reached if not is_per_task(p) and (read.shared is None or p in read.shared)]
        rows, unshared = _collect_rows(read, reached, columns, None, retain_graph)
        held = [{p: g for p, g in zip(columns, row, strict=True) if g is not None} for row in rows]
        del rows
    joint, shared = _meet(read, ranks, call, [*held, unshared])
    return averaged(ranks, joint, shared, held, unshared, read.named, read.names, read.device)


def _solve_by_features(read: _Read, retain_graph: bool, ranks: Ranks | None, call: str) -> tuple[Updates, Surgery]:
    """Surgery on the features' gradients, of which over several ranks each has those of its own samples."""
    reached = read.reached()
    if ranks is None:
        assert read.parts is not None
        shared = read.split(reached)
        passes = _collect_rows_of_features(read, read.parts, reached, shared, retain_graph)
        gradients = TaskGradients(list(read.parts.features), passes.rows, {}, read.names, read.present, read.device)
        updates, surgery = solve(gradients, read.options)
        return _run_through_trunk(updates, shared, passes, retain_graph), surgery

    if ranks.same_passes:
        _meet(read, ranks, call, same=SAME_PASSES)
    joint, shared = _meet(read, ranks, call)
    passes = _FeaturePasses([], {}, [], [])
    with ranks.together(call):
        if read.parts is not None:
            passes = _collect_rows_of_features(read, read.parts, reached, shared, retain_graph)
    cut = read.features if read.parts is None else list(read.parts.features)
    with ranks.reporting(call):
        gradients = TaskGradients(cut, passes.rows, {}, read.names, joint.present, read.device, partitioned=True)
        updates, surgery = solve(gradients, read.options._replace(ranks=ranks))
        mine = dict(_run_through_trunk(updates, shared, passes, retain_graph))
    joint, _ = _meet(read, ranks, call, [mine])
    average_gradients(ranks, joint, [], mine, set())
    return list(mine.items()), surgery


def _reuse_weights(
    read: _Read, method: Every, retain_graph: bool, ranks: Ranks | None, call: str
) -> tuple[Updates, Surgery] | None:
    """The update by the weights that were kept, from one pass for all tasks; None: the method must be asked.

    A second batch and features have nothing to do then.
    """
    reached = {p: read.by_tasks(mask) for p, mask in read.reached().items()}
    if ranks is None:
        present, shared = read.present, read.split(reached)
        due = method.due(read.names, present)
    else:
        joint, shared = _meet(read, ranks, call, same=SAME_PASSES if ranks.sharded or ranks.same_passes else None)
        present = joint.present
        due = ranks.any_of(method.due(read.names, present))
    if due:
        method.expire()  # if another rank asks, so does this one
        return None
    device = shared[0].device if shared else read.device
    weights = method.reuse(read.names, device)
    if ranks is None:
        gradients = weighted_pass(read.losses, weights, reached, shared, read.found, retain_graph, grad)
    else:
        weights = ranks.first_of(weights)
        gradients = _weighted_over_ranks(read, weights, reached, shared, retain_graph, ranks, call)
    weighted = [g for p in shared if (g := gradients.get(p)) is not None]
    for p in shared if not read.features else ():
        if (g := gradients.get(p)) is not None and g.layout is not torch.strided:
            raise sparse_shared(g.layout, p, read.named)
    norm = norm_of(weighted, device, ranks if ranks is not None and ranks.sharded else None)
    method.notice(norm.isfinite())
    if read.scale is not None:
        norm = norm / read.scale
    return list(gradients.items()), ReusedSurgery(weights, norm, read.names, present)


def _weighted_over_ranks(
    read: _Read,
    weights: Tensor,
    reached: Mapping[Tensor, int],
    shared: Sequence[Tensor],
    retain_graph: bool,
    ranks: Ranks,
    call: str,
) -> dict[Tensor, Tensor]:
    """This rank's shards, or the means over the ranks."""
    if ranks.sharded:
        with grads_aside(ranks, read.found, read.named) as run:
            return weighted_pass(read.losses, weights, reached, shared, read.found, retain_graph, run)
    with ranks.reporting(call):
        gradients = weighted_pass(read.losses, weights, reached, shared, read.found, retain_graph, grad)
    joint, _ = _meet(read, ranks, call, [gradients])
    average_gradients(ranks, joint, [], gradients, set())
    return gradients


def _collect_rows(
    read: _Read,
    reached: Mapping[Tensor, int],
    shared: Sequence[Tensor],
    dense: Mapping[Tensor, str] | None,
    retain_graph: bool,
) -> tuple[list[Row], dict[Tensor, Tensor]]:
    """The task gradients of the shared parameters, and the summed gradients of the others.

    `dense`: the names of those in `shared` if a sparse gradient of theirs is an error.
    """
    tasks, found = read.tasks, read.found
    slots = {p: i for i, p in enumerate(shared)}
    rows: list[Row] = [[None] * len(shared) for _ in tasks]
    unshared: dict[Tensor, Tensor] = {}
    # of a second batch nothing else is wanted
    inputs = {p: mask if p in slots else read.by_tasks(mask) for p, mask in reached.items()}
    for t, grads in run_passes(tasks, inputs, found.overlap, retain_graph, read.chunk_size, found.donated):
        row = rows[t]
        for p, g in grads:
            slot = slots.get(p)
            if slot is None:
                if g is not None:
                    add_unshared(unshared, p, g)
            else:
                if dense is not None and g is not None and g.layout is not torch.strided:
                    raise sparse_shared(g.layout, p, dense)
                row[slot] = g
    return rows, unshared


# --- with features=: T passes to them, and one through the trunk


class _FeaturePasses(NamedTuple):
    """What the passes to the features left."""

    rows: list[Row]  # of the features' gradients
    unshared: dict[Tensor, Tensor]  # sums of the gradients of parameters on the way
    plain: list[Tensor]  # parameters behind the features that want the plain sum of their gradients
    plain_sums: Updates  # the sums of the features' gradients that those want


def _collect_rows_of_features(
    read: _Read, parts: Split, reached: Mapping[Tensor, int], shared: Sequence[Tensor], retain_graph: bool
) -> _FeaturePasses:
    check_trunk(shared, parts, read.named, read.names, read.shared is not None)
    cut = list(parts.features)
    is_shared = set(shared)
    plain = [p for p in reached if p in parts.trunk and p not in is_shared]
    past = {p: mask for p, mask in parts.past.items() if p in reached}
    # a pass that must stop at the features still runs through the graph behind them, and would free it
    stop = bool(parts.nested) or any(p in parts.trunk for p in past)
    if parts.donated and (retain_graph or stop or plain):
        raise RuntimeError(DONATED)
    with cut_at(cut, stop):
        rows, unshared = _collect_rows(
            read, parts.features | past, cut, dict.fromkeys(cut, "features"), retain_graph or stop
        )
    return _FeaturePasses(rows, unshared, plain, plain_sums(rows, cut) if plain else [])


def _run_through_trunk(
    updates: Updates, shared: Sequence[Tensor], passes: _FeaturePasses, retain_graph: bool
) -> Updates:
    """One pass from the features on; one more for the parameters behind them that want the plain sum."""
    plain, unshared = passes.plain, passes.unshared
    found = through_trunk(updates, shared, retain_graph or bool(plain)) if updates else []
    if plain:
        for p, g in through_trunk(passes.plain_sums, plain, retain_graph):
            add_unshared(unshared, p, g)
    found.extend(unshared.items())
    unshared.clear()  # another reference to each
    return found
