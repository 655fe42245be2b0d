"""The experiment forwards: whose values does each element of a result change with?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmtl.task_gradients.one_pass.experiments.trials import FAILURES, Trials, Unfit, equal, same
from fastmtl.task_gradients.one_pass.experiments.values import (
    TURNED,
    Change,
    changed,
    changes,
    codes,
    has_fractions,
    poisoned,
    samples_at,
)
from fastmtl.task_gradients.one_pass.rules.owners import along
from fastmtl.task_gradients.one_pass.sample_axis import PerSample
from fastmtl.task_gradients.one_pass.task_ids import TaskIds


class Layout(NamedTuple):
    """The samples lie along one axis of a result, as `PerSample` says it."""

    axis: int
    outer: int
    inner: int

    def of(self, task_ids: TaskIds) -> PerSample:
        return PerSample(self.axis, task_ids, self.outer, self.inner)


def layouts(shape: Sequence[int], n: int) -> list[Layout]:
    """The ways in which n samples can lie along one axis of a tensor."""
    found = []
    for axis, size in enumerate(shape):
        if size and size % n == 0:
            times = size // n
            found += [Layout(axis, times // k, k) for k in range(1, times + 1) if times % k == 0]
    return found


class Candidates:
    """How the samples may lie in one result, after what was seen so far.

    Attributes:
        left: the layouts that nothing has spoken against.
        why: what has spoken against the last of them.
    """

    def __init__(self, shape: Sequence[int], task_ids: TaskIds) -> None:
        self._task_ids = task_ids
        found = layouts(shape, len(task_ids))
        # which positions of the axis were seen to change
        self.left = {each: torch.zeros(shape[each.axis], dtype=torch.bool) for each in found}
        self.why = "no axis of its result has room for the samples"

    def see(self, chosen: Tensor, differs: Tensor) -> None:
        """In one trial the chosen samples were changed, and these elements differed then."""
        differs = differs.cpu()
        for each, seen in list(self.left.items()):
            here = differs.movedim(each.axis, 0).reshape(differs.shape[each.axis], -1).any(1)
            whose = samples_at(each.of(self._task_ids))
            if bool((here & ~chosen[whose]).any()):
                del self.left[each]
                self.why = "it mixes samples: one changes what belongs to others"
            else:
                seen |= here

    def verdict(self) -> Layout | str:
        """The one layout in which every sample was seen to change all of its positions; or why there is none.

        A position that no sample changes may be constant, and belong to none.
        """
        if not self.left:
            return self.why
        full = [each for each, seen in self.left.items() if bool(seen.all())]
        if len(full) > 1:
            return "its samples may lie along several axes"
        return full[0] if full else "not every sample was seen to change its part"


def layouts_seen(
    trials: Trials,
    victims: Mapping[int, PerSample],
    task_ids: TaskIds,
    others: Callable[[Tensor], Tensor],
    generator: torch.Generator,
    *,
    kinds: Sequence[str],
    seed: int,
) -> list[Layout | str]:
    """For each result how the samples lie in it, or why that can't be said.

    Args:
        victims: by the id of a tensor among the arguments: how it carries the samples `task_ids`.
        others: a copy of any other tensor.
        kinds: of values.
        seed: for random numbers in the call.

    Raises:
        Unfit: it can't be run on other values.
    """
    base = trials.run(lambda x: same(x) if id(x) in victims else others(x), seed=seed)
    found = [Candidates(x.shape, task_ids) for x in base]
    ran: list[str] = []
    refused: Exception | None = None
    if not any(has_fractions(x) for x in trials.tensors if id(x) in victims):
        kinds = ("exchange",)

    def run(change: Change) -> list[Tensor]:
        now = trials.run(lambda x: _changed(x, victims, others, change), seed=seed)
        if len(now) != len(base):
            raise Unfit("how many results it gives depends on values")
        return now

    def see(before: list[Tensor], now: list[Tensor], chosen: Tensor) -> None:
        for candidates, a, b in zip(found, before, now, strict=True):
            if a.shape != b.shape:
                candidates.left, candidates.why = {}, "the shape of its result depends on values"
            else:
                candidates.see(chosen, ~equal(a, b))

    for kind in kinds:
        try:
            every = None
            if kind in TURNED:
                every = run(Change(kind, torch.ones(len(task_ids), dtype=torch.bool), torch.arange(len(task_ids))))
            for change in changes(kind, len(task_ids), generator):
                now = run(change)
                see(base, now, change.chosen)
                if every is not None:  # where all are changed, those that are not chosen were put back
                    see(every, now, ~change.chosen)
            ran.append(kind)
        except Unfit:
            raise
        except FAILURES as error:
            # it does not take such values, and others must do
            refused = error
    if "exchange" not in ran or len(ran) < min(len(kinds), 2):
        raise Unfit(f"it can't be run on the values of other samples ({type(refused).__name__}: {refused})")
    return [candidates.verdict() for candidates in found]


def _changed(x: Tensor, victims: Mapping[int, PerSample], others: Callable[[Tensor], Tensor], change: Change) -> Tensor:
    axis = victims.get(id(x))
    return others(x) if axis is None else changed(x, axis, change)


def owners_seen(
    trials: Trials, victims: Mapping[int, PerSample], generator: torch.Generator, *, seed: int
) -> list[Tensor | str]:
    """For each element of each result the one row of the bank whose samples change it, or -1 if none does; or why not.

    As `layouts_seen`, for results in which the samples lie in no order, or whose samples are parts of the batch. It
    holds for the very values of the other arguments.
    """
    if not all(has_fractions(x) for x in trials.tensors if id(x) in victims):
        raise Unfit("its samples are whole numbers")
    present = torch.cat([axis.positions() for axis in victims.values()]).unique()
    base = trials.run(same, seed=seed)
    owners = [torch.full(x.shape, -1) for x in base]
    why = [""] * len(base)
    marks: list[list[tuple[Tensor, Tensor]]] = [[] for _ in base]

    def run(kind: str, rows: Tensor) -> list[Tensor]:
        return trials.run(lambda x: _poisoned_rows(x, victims, rows, kind), seed=seed)

    def mark(before: list[Tensor], now: list[Tensor], rows: Tensor) -> None:
        for k, (a, b) in enumerate(zip(before, now, strict=True)):
            if a.shape != b.shape:
                why[k] = "the shape of its result depends on values"
            else:
                marks[k].append((rows, ~equal(a, b)))

    for kind in ("nan", "inf", "-inf", "large", "opposite"):
        every = run(kind, present) if kind in TURNED else None
        for chosen in codes(len(present), generator):
            now = run(kind, present[chosen])
            mark(base, now, present[chosen])
            if every is not None:
                mark(every, now, present[~chosen])
        if kind == "nan":
            for k, seen in enumerate(marks):
                if not why[k]:
                    owners[k], why[k] = _decoded(seen, present, base[k].shape)
    for k, seen in enumerate(marks):
        for rows, differs in seen:
            if not why[k] and bool((differs & ~torch.isin(owners[k], rows)).any()):
                why[k] = "it mixes samples: one changes what belongs to others"
    return [reason or owner for reason, owner in zip(why, owners, strict=True)]


def _poisoned_rows(x: Tensor, victims: Mapping[int, PerSample], rows: Tensor, kind: str) -> Tensor:
    axis = victims.get(id(x))
    if axis is None:
        return same(x)
    return poisoned(x, along(torch.isin(axis.positions(), rows), x.dim(), axis.axis), kind)


def _decoded(seen: Sequence[tuple[Tensor, Tensor]], present: Tensor, shape: torch.Size) -> tuple[Tensor, str]:
    """Whose each element is, from the sets of rows that change it."""
    fits = torch.ones((len(present), *shape), dtype=torch.bool)
    touched = torch.zeros(shape, dtype=torch.bool)
    for rows, differs in seen:
        here = torch.isin(present, rows)
        fits &= differs == along(here, len(shape) + 1, 0)
        touched |= differs
    if bool((touched & ~fits.any(0)).any()):
        return touched.long(), "it mixes samples of different tasks"
    return torch.where(touched, present[fits.int().argmax(0)], -1), ""
