"""The experiment backwards: which samples does the gradient of each element reach, and does it depend on others?"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fastmtl.task_gradients.one_pass.experiments.trials import FAILURES, Trials, Unfit, same
from fastmtl.task_gradients.one_pass.experiments.values import KINDS, changed, changes, codes, has_fractions, samples_at
from fastmtl.task_gradients.one_pass.sample_axis import PerSample
from fastmtl.task_gradients.one_pass.task_ids import TaskIds

_ROUNDINGS = 64


def _unhooked() -> contextlib.AbstractContextManager[object]:
    """The user's hooks, such as those of checkpointing, see nothing of what a graph saves that is made inside."""
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda x: x)


class Graph:
    """One run of a call with a graph, from which gradients can be taken several times.

    Args:
        value_of: the value that each of `victims` has in it.
    """

    def __init__(
        self, trials: Trials, victims: Mapping[int, PerSample], value_of: Callable[[Tensor], Tensor], *, seed: int
    ) -> None:
        self.leaves: dict[int, Tensor] = {}

        def leaf(x: Tensor) -> Tensor:
            if id(x) not in victims or not x.requires_grad:
                return same(x)
            found = self.leaves[id(x)] = value_of(x).requires_grad_()
            return found.clone() if trials.writes else found

        with torch.enable_grad(), _unhooked():
            self.results = trials.run(leaf, seed=seed)
        self._unfollowed = trials.unfollowed

    def gradients(self, which: int, cotangent: Tensor) -> list[Tensor]:
        """Of one result, for each of the leaves."""
        leaves = list(self.leaves.values())
        with self._unfollowed():
            found = torch.autograd.grad(self.results[which], leaves, cotangent, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def reaches_its_own(
    trials: Trials,
    victims: Mapping[int, PerSample],
    which: int,
    labels: Tensor,
    label_of: Callable[[PerSample], Tensor],
    generator: torch.Generator,
    *,
    seed: int,
) -> str:
    """Whether the gradient of each element of a result reaches the samples of its own label alone; else why not.

    Args:
        which: of the results.
        labels: such as broadcast to the shape of the result; below 0: what belongs to none.
        label_of: the label of each position of a victim's axis.
    """
    graph = Graph(trials, victims, same, seed=seed)
    out = graph.results[which]
    if not out.requires_grad:
        return "run again, its result needs no gradient"
    labels = labels.to(out.device)
    cotangent = torch.rand(out.shape, generator=generator).to(out.device, out.dtype) + 0.5
    base = graph.gradients(which, cotangent)
    flows = any(bool((g != 0).any()) for g in base)
    present = labels[labels >= 0].unique().cpu()
    mine = [label_of(victims[k]) for k in graph.leaves]
    for chosen in codes(len(present), generator):
        some = present[chosen]
        here = torch.isin(labels.cpu(), some).to(out.device)
        now = graph.gradients(which, torch.where(here, torch.nan, cotangent))
        for k, own, a, b in zip(graph.leaves, mine, base, now, strict=True):
            if _strays(a, b, victims[k].axis, ~torch.isin(own, some)):
                return "it mixes samples: the gradient of one reaches others"
            flows = flows or bool(b.isnan().any())  # one that is zero by chance
    return "" if flows else "no gradient flows through it"


def is_a_sum(
    trials: Trials,
    victims: Mapping[int, PerSample],
    which: int,
    task_ids: TaskIds,
    generator: torch.Generator,
    *,
    seed: int,
) -> bool:
    """Whether a result is a linear sum over the samples: the gradient of one does not depend on another's values."""
    if trials.writes or any(not has_fractions(x) for x in trials.tensors if id(x) in victims):
        return False
    graph = Graph(trials, victims, same, seed=seed)
    out = graph.results[which]
    if not out.requires_grad:
        return False
    cotangent = torch.rand(out.shape, generator=generator).to(out.device, out.dtype) + 0.5
    base = graph.gradients(which, cotangent)
    if not any(bool((g != 0).any()) for g in base):
        return False
    ran: list[str] = []
    for kind in KINDS:
        try:
            for change in changes(kind, len(task_ids), generator):
                other = Graph(trials, victims, lambda x, c=change: changed(x, victims[id(x)], c), seed=seed)
                if other.results[which].shape != out.shape:
                    return False
                for k, a, b in zip(graph.leaves, base, other.gradients(which, cotangent), strict=True):
                    if _strays(a, b, victims[k].axis, ~change.chosen[samples_at(victims[k])]):
                        return False
            ran.append(kind)
        except Unfit:
            raise
        except FAILURES:
            # it does not take such values, and others must do
            continue
    return "exchange" in ran and len(ran) > 1


def _strays(a: Tensor, b: Tensor, axis: int, rest: Tensor) -> bool:
    """Whether two gradients differ by more than rounding at some of these positions; what is not finite in one must be
    the same in the other.

    Args:
        rest: `[n]` bool, the positions along the axis.
    """
    at = rest.nonzero().squeeze(1).to(a.device)
    mine, other = a.index_select(axis, at), b.index_select(axis, at)
    if torch.equal(mine, other):
        return False
    finite = a[a.isfinite()].abs()
    size = finite.max() if finite.numel() else torch.zeros((), device=a.device)
    close = (mine - other).abs() <= _ROUNDINGS * torch.finfo(a.dtype).eps * (mine.abs() + other.abs() + size * _SMALL)
    return not bool((close | (mine == other) | (mine.isnan() & other.isnan())).all())


# a gradient of one element is rounded in units of its own size, or of sums in which larger ones take part
_SMALL = 1e-3
