"""Pareto MTL: the Pareto set by parts, one for each preference vector (Lin et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from fastmtl.core.gradient_rows import MAX_TASKS
from fastmtl.methods.arguments import Argument, count, optional, read_count, read_tensor
from fastmtl.methods.base import Seen
from fastmtl.methods.state import Field, FusedMethod
from fastmtl.ops.gradients.method_step import method_step_op

PreferenceVectors: TypeAlias = Tensor | Sequence[Sequence[float]]


class ParetoMTL(FusedMethod):
    """The shortest convex combination of the task gradients and of the gradients of constraints, which keep the losses
    near to one of K preference vectors.

    The vectors u_1 ... u_K part the space of losses: the part of u_k has the losses L with `(u_j - u_k) . L <= 0` for
    all j, those whose angle to u_k is the smallest. Training K models, one with each `index`, gives K points of the
    Pareto set with different trade-offs. A constraint is active where it is violated, and its gradient is
    `(u_j - u_k)^T G`. There are two phases, as in the paper:

    - At first, while the losses lie outside the part, the update is the shortest convex combination of the active
      constraints' gradients alone: it moves into the part. This phase ends for good with the first step that has no
      active constraint, or after `max_start_steps`.
    - Then it is the shortest convex combination of all task gradients and of the active constraints': along it no loss
      grows, and no violation.

    Args:
        preferences: `[K, T]` preference vectors, numbers from 0, no vector all of them 0; K + T up to 128. They are
            scaled to length 1. Column t belongs to the t-th task of each call.
        index: which of them the model is for, 0 to K - 1.
        max_start_steps: steps after which the first phase ends at the latest; None: none. With noisy losses, or losses
            that can't be brought into the part, it may else never end.

    Raises:
        TypeError, ValueError: preferences, `index` or `max_start_steps` other than the above; (when called) tasks of
            another number.

    `needs` the losses: `backward` has them, `apply` of a bank takes them (`losses=`). Weights of tasks may be negative,
    since the constraints' gradients are differences of the tasks'. Of an absent task neither the gradient nor its part
    of a constraint counts. State: which phase it is, and how many steps the first one took.

    Source: Lin et al. 2019, *Pareto Multi-Task Learning*, section 4.

    Example:
        >>> m = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
        >>> method = ParetoMTL([[1.0, 0.0], [0.0, 1.0]], 1)
        >>> method.weigh(m, Seen(["a", "b"], [True, True], losses=torch.tensor([1.0, 2.0], dtype=torch.float64)))
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """

    needs: ClassVar[frozenset[str]] = frozenset({"losses"})
    max_start_steps = Argument(optional(count()))

    def __init__(self, preferences: PreferenceVectors, index: int, *, max_start_steps: int | None = None) -> None:
        super().__init__(started=Field(0, 0.0), start_steps=Field(0, 0.0))
        self._vectors = _read_vectors(preferences)
        self.index, self.max_start_steps = index, max_start_steps

    @property
    def preferences(self) -> Tensor:
        """`[K, T]` float64, of length 1. Others that are set later must have the vector of the index."""
        return self._vectors

    @preferences.setter
    def preferences(self, preferences: PreferenceVectors) -> None:
        vectors = _read_vectors(preferences)
        if len(vectors) <= self._index:
            raise ValueError(
                f"preferences: expected at least {self._index + 1} vectors for index {self._index}, got {len(vectors)}"
            )
        self._vectors = vectors

    @property
    def index(self) -> int:
        return self._index

    @index.setter
    def index(self, index: int) -> None:
        self._index = read_count(index, "index", most=len(self._vectors) - 1)

    def _weigh(self, gram: Tensor, seen: Seen, present: Tensor | None) -> Tensor:
        num_tasks = self._vectors.shape[1]
        if len(gram) != num_tasks:
            raise ValueError(f"preferences: expected vectors of {len(gram)} tasks, got {num_tasks}")
        # kept there: a copy at each call would wait for the device
        self._vectors = self._vectors.to(gram.device)
        options = [float(self.index), math.inf if self.max_start_steps is None else float(self.max_start_steps)]
        kept = self._state.lend(seen.names, gram.device)
        w = method_step_op(
            gram, "paretomtl", options, *kept, present=present, per_task=seen.losses, vectors=self._vectors
        )
        self._state.take_back(seen.names, kept)
        return w

    def __repr__(self) -> str:
        count, num_tasks = self._vectors.shape
        return f"ParetoMTL({count} vectors of {num_tasks} tasks, index={self.index})"


def _read_vectors(preferences: PreferenceVectors) -> Tensor:
    """`[K, T]` float64 vectors of length 1, checked."""
    found = read_tensor(preferences, "preferences", "K vectors of T numbers")
    if found.dim() != 2 or found.numel() == 0:
        raise ValueError(f"preferences: expected K vectors of T numbers, [K, T], got shape {list(found.shape)}")
    if sum(found.shape) > MAX_TASKS:
        raise ValueError(f"preferences: expected K + T up to {MAX_TASKS}, got shape {list(found.shape)}")
    if not bool((torch.isfinite(found) & (found >= 0)).all()) or not bool((found > 0).any(1).all()):
        raise ValueError(f"preferences: expected numbers from 0, in no vector all of them 0, got {found.tolist()}")
    return found / found.norm(dim=1, keepdim=True)
