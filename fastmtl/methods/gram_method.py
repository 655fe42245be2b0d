"""What the methods have in common whose weights one op solves for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.methods.arguments import TaskNumbers, TaskNumbersArgument, read_preferences
from fastmtl.methods.base import Method, Seen
from fastmtl.ops.gradients.method_step import method_step_op
from fastmtl.ops.gradients.method_weights import check_method, check_method_arguments, method_weights_groups


class GramMethod(Method):
    """A method whose weights are a function of the Gram matrix, solved for by `fastmtl.ops.method_weights`.

    A subclass names it in `_op_name`, and hands its numbers over in `_options`.
    """

    _op_name: ClassVar[str]

    def __init__(self, preferences: TaskNumbersArgument | None = None) -> None:
        check_method(self._op_name, self._options, preferences is not None)
        self.preferences = preferences

    @property
    def _options(self) -> list[float]:
        """The numbers that the op takes, in its order, as the attributes are now."""
        return []

    @property
    def preferences(self) -> Tensor | dict[str, float] | None:
        """`[T]` float64, a dict from names of tasks, or None."""
        return None if self._preferences is None else self._preferences.value

    @preferences.setter
    def preferences(self, preferences: TaskNumbersArgument | None) -> None:
        check_method(self._op_name, self._options, preferences is not None)
        self._preferences: TaskNumbers | None = read_preferences(preferences)

    @property
    def by_group(self) -> bool:  # type: ignore[override]
        """Whether it goes without names of tasks, which are others in each group."""
        return self._preferences is None or not self._preferences.by_name

    @property
    def _told(self) -> str:
        """The preferences, as `repr` adds them."""
        return "" if self._preferences is None else f", preferences={self._preferences!r}"

    def weights(self, gram: Tensor, *, present: Tensor | None = None) -> Tensor:
        if type(self)._weights is GramMethod._weights:
            return self._solved(gram, present, None)
        # a class derived from one of these; its matrix keeps its dtype, which says how far entries are rounded
        self._read(gram, present)
        gram = gram if present is None else torch.where(present[:, None] & present, gram, 0.0)
        w = self._weights(gram, present)
        return w if present is None else torch.where(present, w, 0.0)

    def weigh(self, gram: Tensor, seen: Seen) -> Tensor:
        if self.by_group or not self.is_the_op:
            return super().weigh(gram, seen)
        self._check_seen(gram, seen)
        return self._solved(gram, seen.mask(gram.device), seen.names)

    @property
    def is_the_op(self) -> bool:
        """Whether its weights are what the op gives: a class derived from one of these may have weights of its own."""
        own = type(self)
        return (own.weigh, own.weights, own._weights) == (GramMethod.weigh, GramMethod.weights, GramMethod._weights)

    def averaged_weights(
        self, gram: Tensor, average: Tensor, momentum: float, present: Tensor | None, names: Sequence[str]
    ) -> Tensor:
        """The running average of the weights, `[T]` float64, which is changed in place: see `CRMOGM`."""
        self._check_tasks(gram.shape[0])
        preferences = self._preferences_of(gram, names)
        check_method_arguments(gram, self._op_name, self._options, present, preferences)
        return method_step_op(
            gram,
            self._op_name,
            self._options,
            average=average,
            momentum=momentum,
            present=present,
            preferences=preferences,
        )

    def weigh_groups(self, grams: Tensor, seen: Sequence[Seen]) -> Tensor:
        """As of `Method`, in one call."""
        if not (self.is_the_op and self.by_group):
            return super().weigh_groups(grams, seen)
        for x in seen:
            self._check_seen(grams[0], x)
        self._check_tasks(grams.shape[1])
        return method_weights_groups(
            grams,
            self._op_name,
            self._options,
            present=seen[0].mask(grams.device),
            preferences=self._preferences_of(grams[0], None),
        )

    def _weights(self, gram: Tensor, present: Tensor | None) -> Tensor:
        return self._solved(gram, present, None)

    def _solved(self, gram: Tensor, present: Tensor | None, names: Sequence[str] | None) -> Tensor:
        if isinstance(gram, Tensor) and gram.dim() == 2:
            self._check_tasks(gram.shape[0])
        preferences = self._preferences_of(gram, names)
        return ops.method_weights(gram, self._op_name, self._options, present=present, preferences=preferences)

    def _check_tasks(self, num_tasks: int) -> None:
        """Raises ValueError where these are too few for the method."""

    def _preferences_of(self, gram: Tensor, names: Sequence[str] | None) -> Tensor | None:
        """Those of these tasks; names: None is "0" to "T-1"."""
        if self._preferences is None or not isinstance(gram, Tensor) or gram.dim() != 2:
            return None
        names = [str(t) for t in range(len(gram))] if names is None else names
        return self._preferences.of(names, gram.device)
