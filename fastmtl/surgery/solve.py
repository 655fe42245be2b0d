"""The surgery itself: the one place that makes a Gram matrix, asks the method, and combines the task gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmtl import methods
from fastmtl.core.schemas import without_autocast
from fastmtl.distributed.ranks import Ranks
from fastmtl.methods import Every, Method, Seen, Weighting
from fastmtl.surgery.accumulate import Updates
from fastmtl.surgery.groups import Groups
from fastmtl.surgery.result import GroupedSurgery, Surgery
from fastmtl.surgery.task_gradients import SurgeryInput, TaskGradients


class SurgeryOptions(NamedTuple):
    """How a surgery is made.

    Attributes:
        method: what makes the update of the task gradients.
        loss_scale: what the losses were multiplied by; None: by nothing.
        ranks: who decides together; None: this process alone.
        groups: of shared parameters that are solved for apart; None: all together.
        losses: the tasks' losses, tensors or numbers, with the loss scale, None where absent; None unless the method
            needs them.
    """

    method: Weighting
    loss_scale: float | Tensor | None = None
    ranks: Ranks | None = None
    losses: Sequence[Tensor | float | None] | None = None
    groups: Groups | None = None


def solve(gradients: SurgeryInput, options: SurgeryOptions) -> tuple[Updates, Surgery]:
    """What is to be added to each parameter's `.grad`, and what was seen on the way. `gradients` are used up."""
    names, present = gradients.names, gradients.present
    with torch.no_grad():
        if gradients.is_empty:
            gram = torch.zeros(len(names), len(names), device=gradients.device)
            weights = _ones_of_present(present, gradients.device)
            return gradients.combine(weights), Surgery(gram, weights, names, present)
        with without_autocast(gradients.device.type):
            if isinstance(gradients, TaskGradients) and _has_update(gradients, options):
                return _update(gradients, options)
            gram, second = _parts_of(gradients.gram(), gradients, options)
            weights = _weigh(gram, gradients, _seen(gradients, options, second), options)
        return gradients.combine(weights), Surgery(gram, weights, names, present)


def solve_groups(
    gradients: TaskGradients, options: SurgeryOptions, named: Mapping[Tensor, str]
) -> tuple[Updates, Surgery]:
    """As `solve`, for each group of shared parameters apart, if there are groups."""
    if options.groups is None:
        return solve(gradients, options)
    names, present = gradients.names, gradients.present
    parts = options.groups.divide(gradients.receivers, named)
    if not parts:
        return solve(gradients, options)
    group_of = {i: k for k, positions in enumerate(parts.values()) for i in positions}
    groups = [group_of[i] for i in range(len(gradients.receivers))]
    if not _updates_groups(gradients, options) and gradients.can_group(groups, len(parts)):
        return _solve_together(gradients, options, groups, list(parts))
    updates: Updates = []
    surgeries = []
    for part in gradients.split(parts):
        some, surgery = solve(part, options)
        updates += some
        surgeries.append(surgery)
    return updates, GroupedSurgery.of(surgeries, list(parts), names, present)


def _updates_groups(gradients: TaskGradients, options: SurgeryOptions) -> bool:
    """Whether the method makes the update of each group itself."""
    method = options.method
    if not _has_update(gradients, options):
        return False
    return "gradients" in methods.needs_of(method) or "weigh_groups" not in vars(type(method))


def _solve_together(
    gradients: TaskGradients, options: SurgeryOptions, groups: Sequence[int], group_names: Sequence[str]
) -> tuple[Updates, Surgery]:
    """The surgery on all groups by one Gram matrix each, one question to the method and one combine. groups: of each
    parameter."""
    names, present = gradients.names, gradients.present
    with torch.no_grad(), without_autocast(gradients.device.type):
        grams, second = _parts_of(gradients.gram_groups(groups, len(group_names)), gradients, options)
        common = _seen(gradients, options, None)
        seen = [
            common._replace(
                # what a method keeps of a task it keeps for each group
                names=[f"{group}/{task}" for task in names],
                second=None if second is None else second[k],
            )
            for k, group in enumerate(group_names)
        ]
        weights = _weigh(grams, gradients, seen, options)
        updates = gradients.combine_groups(weights, groups)
    return updates, GroupedSurgery(grams, weights, group_names, names, present)


def _ones_of_present(present: Sequence[bool] | Tensor, device: torch.device) -> Tensor:
    if isinstance(present, Tensor):
        return present.to(torch.float64)
    weights = torch.zeros(len(present), dtype=torch.float64, device=device)
    for t, here in enumerate(present):
        if here:
            weights[t].fill_(1.0)  # a fill: a copy from the host would wait
    return weights


def _parts_of(gram: Tensor, gradients: SurgeryInput, options: SurgeryOptions) -> tuple[Tensor, Tensor | None]:
    """The Gram matrix of all ranks without the loss scale, and the task gradients' inner products with a second
    batch's. gram: of all rows that this process has; or `[L, ...]`, of each group."""
    num_tasks = len(gradients.names)
    if options.ranks is not None and gradients.partitioned:
        gram = options.ranks.total_gram(gram)
    gram = _unscaled(gram, options.loss_scale)
    if gram.shape[-1] == num_tasks:
        return gram, None
    return gram[..., :num_tasks, :num_tasks].contiguous(), gram[..., :num_tasks, num_tasks:]


def _unscaled(gram: Tensor, scale: float | Tensor | None) -> Tensor:
    """The Gram matrix of the gradients without the loss scale."""
    if scale is None:
        return gram
    squared = scale.to(torch.float64) ** 2 if isinstance(scale, Tensor) else scale**2
    return (gram.to(torch.float64) / squared).to(gram.dtype)


def _seen(gradients: SurgeryInput, options: SurgeryOptions, second: Tensor | None) -> Seen:
    """What the method may see beside the Gram matrix."""
    seen = Seen(gradients.names, gradients.present, second=second, loss_scale=options.loss_scale)
    ranks = options.ranks
    if options.losses is not None:
        seen = seen._replace(losses=_values_of(options.losses, gradients, options))
    if ranks is None:
        return seen
    device = gradients.device
    # a rank without columns may have made its Gram matrix anywhere
    total = (lambda gram: ranks.total_gram(gram.to(device))) if gradients.partitioned else seen.total
    return seen._replace(first=lambda x: ranks.first_of(x.to(device)), total=total)


def _values_of(losses: Sequence[Tensor | float | None], gradients: SurgeryInput, options: SurgeryOptions) -> Tensor:
    """`[T]` float64 losses without the loss scale, 0 for absent tasks."""
    device, present = gradients.device, gradients.present
    zero = torch.zeros((), dtype=torch.float64, device=device)
    found = []
    for x in losses:
        if isinstance(x, Tensor):
            found.append(x.detach().to(device, torch.float64))
        else:
            found.append(zero.new_full((), x or 0.0))  # a fill: a copy from the host would wait
    values = torch.stack(found)
    if options.loss_scale is not None:
        scale = options.loss_scale
        values = values / (scale.to(device, torch.float64) if isinstance(scale, Tensor) else scale)
    if isinstance(present, Tensor):
        values = torch.where(present, values, 0.0)
    return values if options.ranks is None else options.ranks.mean_of(values)


def _has_update(gradients: TaskGradients, options: SurgeryOptions) -> bool:
    """Whether the method makes the update itself, because it must, or because that is faster."""
    method = options.method
    if "gradients" in methods.needs_of(method):
        return True
    # a class derived from a faster one may have weights of its own
    faster = isinstance(method, Method) and "update" in vars(type(method))
    return faster and options.ranks is None and not isinstance(gradients.present, Tensor)


def _update(gradients: TaskGradients, options: SurgeryOptions) -> tuple[Updates, Surgery]:
    method, ranks, names = options.method, options.ranks, gradients.names
    assert isinstance(method, Method)
    second = _parts_of(gradients.gram(), gradients, options)[1] if "second_batch" in method.needs else None
    seen = _seen(gradients, options, second)
    if ranks is not None:
        _take_first(ranks, method.state_tensors(names, gradients.device))
    gram, weights, square, updates = gradients.update(method, seen)
    norm = None
    if square is not None:
        if ranks is not None and gradients.partitioned:
            square = ranks.total_gram(square)
        norm = _unscaled(square, options.loss_scale).to(torch.float64).sqrt().reshape(())
    surgery = Surgery(_unscaled(gram, options.loss_scale), weights, names, gradients.present, norm)
    return updates, surgery


def _take_first(ranks: Ranks, tensors: Sequence[Tensor]) -> None:
    """Makes float64 tensors the first rank's, in place, in one all-reduce."""
    if tensors:
        found = ranks.first_of(torch.cat([x.flatten() for x in tensors]))
        for x, y in zip(tensors, found.split([x.numel() for x in tensors]), strict=True):
            x.copy_(y.reshape(x.shape))


def _weigh(gram: Tensor, gradients: SurgeryInput, seen: Seen | Sequence[Seen], options: SurgeryOptions) -> Tensor:
    """The method's weights; the first rank's, where there are several, and so what the method keeps. `[T]`, or of Gram
    matrices `[L, T, T]`, each with what is seen of its group, `[L, T]`."""
    method, ranks = options.method, options.ranks
    each = [seen] if isinstance(seen, Seen) else seen
    if ranks is None:
        return _weigh_alone(gram, gradients, seen, method)
    if isinstance(method, Every) and ranks.any_of(any(method.due(x.names, x.present) for x in each)):
        method.expire()  # where one asks all do: what is asked may meet the other ranks
    if not isinstance(method, Method):
        # whatever it does, it may raise on one rank alone; it does not mind waiting for the host
        with ranks.together(f"method {getattr(method, '__qualname__', method)!r}"):
            weights = _weigh_alone(gram, gradients, seen, method)
        return ranks.first_of(weights)
    try:
        weights = _weigh_alone(gram, gradients, seen, method)
    except Exception:
        # the others must not wait; they get NaN
        weights = torch.full_like(gram[..., 0], torch.nan, dtype=torch.float64)
        _take_first(ranks, [weights, *_state_of(method, each, gram.device)])
        raise
    weights = weights.clone()
    _take_first(ranks, [weights, *_state_of(method, each, gram.device)])
    return weights


def _state_of(method: Method, seen: Sequence[Seen], device: torch.device) -> list[Tensor]:
    # at once: what is made ready for the tasks of another group may be new memory
    return method.state_tensors([name for some in seen for name in some.names], device)


def _weigh_alone(gram: Tensor, gradients: SurgeryInput, seen: Seen | Sequence[Seen], method: Weighting) -> Tensor:
    if isinstance(seen, Seen):
        weights = methods.weights_of(method, gram, seen)
    else:
        weights = methods.group_weights_of(method, gram, seen)
    return weights if gradients.poison is None else weights + gradients.poison
