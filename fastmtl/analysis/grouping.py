"""Which tasks to train together: TAG's selection of networks from pairwise affinities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

MAX_GROUPED_TASKS = 10


class TaskGroups(NamedTuple):
    """Groups of tasks, each to be trained by a network of its own.

    Attributes:
        groups: the names in each group, in the order of the tasks. A task may be in several: in one it is trained to be
            used, in others to help.
        served_by: for each task the position of the group whose network is used for it.
        affinity: the mean over all tasks of the affinity onto each in the group that serves it.
    """

    groups: tuple[tuple[str, ...], ...]
    served_by: dict[str, int]
    affinity: float


def group_tasks(
    matrix: Tensor, count: int, *, names: Sequence[str] | None = None, alone: float | None = None
) -> TaskGroups:
    """The groups of tasks with the highest mean affinity, at most `count` of them.

    The affinity onto a task in a group is the mean of the pairwise affinities of the others onto it. Every task must be
    in a group, and counts with the best that it is in. The diagonal of the matrix is not looked at. The result is the
    optimum, found by branch and bound: a set of groups is worth at most what it has plus the largest gains that single
    groups would still bring. The cost grows steeply with the tasks and with `count`: for random
    affinities, the worst case, some 0.3 s for 8 tasks in 4 groups, 5 s for 9 in 5, 70 s for 10 in 5.

    Args:
        matrix: `[T, T]` affinities, entry i, j of task i onto task j; T from 2 to 10.
        count: how many groups at most, from 1.
        names: T task names; None: "0", "1", ...
        alone: the affinity onto a task that trains alone. None: none does. 0 lets a task train alone that the others
            would harm.

    Returns:
        `TaskGroups`.

    Raises:
        TypeError: `count` is no int.
        ValueError: a matrix of another shape, or that is not finite off the diagonal; `count` below 1.

    Source: Fifty, Amid, Zhao, Yu, Anil, Finn 2021, *Efficiently Identifying Task Groupings for Multi-Task Learning*,
    section 3.2; tasks in several groups and none alone as in the authors' code.

    Example:
        >>> group_tasks(torch.tensor([[1.0, 0.5, -0.5], [0.4, 1.0, -0.5], [0.1, -0.2, 1.0]]), 2, alone=0.0).groups
        (('0', '1'), ('2',))
    """
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"count: expected an int, got {type(count).__name__}")
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    if not isinstance(matrix, Tensor) or matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"matrix: expected shape [T, T], got {list(getattr(matrix, 'shape', []))}")
    z = matrix.detach().double().cpu().numpy()
    tasks = len(z)
    if not 2 <= tasks <= MAX_GROUPED_TASKS:
        raise ValueError(f"matrix: expected 2 to {MAX_GROUPED_TASKS} tasks, got {tasks}")
    names = [str(t) for t in range(tasks)] if names is None else list(names)
    if len(names) != tasks:
        raise ValueError(f"names: expected {tasks}, got {len(names)}")
    off = z[~np.eye(tasks, dtype=bool)]
    if not np.isfinite(off).all():
        raise ValueError("matrix: expected finite affinities, but some are not (tasks that never met?)")
    members, values = _all_groups(z, alone)
    chosen = _Search(members, values).best(count)
    served = np.where(members[chosen], values[chosen], -math.inf)
    return TaskGroups(
        tuple(tuple(name for name, here in zip(names, members[g], strict=True) if here) for g in chosen),
        {name: int(served[:, t].argmax()) for t, name in enumerate(names)},
        float(served.max(0).mean()),
    )


def _all_groups(z: np.ndarray, alone: float | None) -> tuple[np.ndarray, np.ndarray]:
    """`[G, T]` bool, who is in each group; `[G, T]`, the affinity onto each member, 0 for others."""
    tasks = len(z)
    members = (np.arange(1, 2**tasks)[:, None] >> np.arange(tasks) & 1).astype(bool)
    size = members.sum(1)
    if alone is None:
        members, size = members[size > 1], size[size > 1]
    others = np.where(np.eye(tasks, dtype=bool), 0.0, z)
    values = members @ others / np.maximum(size - 1, 1)[:, None]
    values[size == 1] = 0.0 if alone is None else alone
    return members, np.where(members, values, 0.0)


class _Search:
    """Branch and bound over sets of groups.

    The value of a set is `sum_t max(least_t, max over its groups of the value of t)`, where `least_t` is the worst that
    any group gives t. It never falls as groups are added, and what a group adds never grows as others join: a set with
    r groups more gains at most what the r best of them gain alone. Where all tasks are covered it is the value that is
    looked for.
    """

    def __init__(self, members: np.ndarray, values: np.ndarray) -> None:
        self.members = members
        self.least = np.where(members, values, math.inf).min(0)
        self.values = np.where(members, values, self.least)  # one who is not in it has the least
        self.found: list[int] = []
        self.highest = -math.inf

    def best(self, count: int) -> list[int]:
        """Positions of the best groups, at most `count`; the fewest that do as well."""
        for limit in range(1, count + 1):
            self._extend([], self.least, np.zeros(len(self.least), dtype=bool), limit, np.arange(len(self.values)))
        return self.found

    def _extend(self, chosen: list[int], have: np.ndarray, covered: np.ndarray, left: int, allowed: np.ndarray) -> None:
        total = float(have.sum())
        if covered.all() and total > self.highest + 1e-12 * (1 + abs(total)):
            self.highest, self.found = total, chosen
        if left == 0:
            return
        gains = np.maximum(self.values[allowed] - have, 0.0).sum(1)
        order = np.argsort(-gains, kind="stable")
        allowed, gains = allowed[order], gains[order]
        for k, group in enumerate(allowed):
            # this group and those behind it alone: those before it have had their turn
            if total + gains[k : k + left].sum() <= self.highest + 1e-12 * (1 + abs(total)):
                return
            missing = ~(covered | self.members[group])
            if left == 1 and missing.any():
                continue
            self._extend(
                [*chosen, int(group)],
                np.maximum(have, self.values[group]),
                ~missing,
                left - 1,
                allowed[k + 1 :],
            )
