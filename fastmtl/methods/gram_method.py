"""What the methods have in common whose weights one op solves for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.methods.base import Method, Seen
from fastmtl.ops.gradients.method_step import method_step_op
from fastmtl.ops.gradients.method_weights import check_method, check_method_arguments, method_weights_groups

Preferences: TypeAlias = Tensor | Sequence[float]


class GramMethod(Method):
    """A method whose weights are a function of the Gram matrix, solved for by `fastmtl.ops.method_weights`.

    A subclass names it in `_op_name`, and hands its numbers and its preferences over.
    """

    _op_name: ClassVar[str]

    def __init__(self, *options: float, preferences: Preferences | None = None) -> None:
        for x in options:
            if not isinstance(x, (int, float)):
                raise TypeError(
                    f"{type(self).__name__}: expected numbers, got {type(x).__name__}; preferences go by name"
                )
        self._options = [float(x) for x in options]
        check_method(self._op_name, self._options, preferences is not None)
        self.preferences = None if preferences is None else read_preferences(preferences)

    def weights(self, gram: Tensor, *, present: Tensor | None = None) -> Tensor:
        if isinstance(gram, Tensor) and gram.dim() == 2:
            self._check_tasks(gram.shape[0])
        preferences = self._preferences_on(gram)
        return ops.method_weights(gram, self._op_name, self._options, present=present, preferences=preferences)

    @property
    def is_the_op(self) -> bool:
        """Whether its weights are what the op gives: a class derived from one of these may have weights of its own."""
        own = type(self)
        return (own.weigh, own.weights, own._weights) == (Method.weigh, GramMethod.weights, GramMethod._weights)

    def averaged_weights(self, gram: Tensor, average: Tensor, momentum: float, present: Tensor | None) -> Tensor:
        """The running average of the weights, `[T]` float64, which is changed in place: see `CRMOGM`."""
        self._check_tasks(gram.shape[0])
        preferences = self._preferences_on(gram)
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
        if not self.is_the_op:
            return super().weigh_groups(grams, seen)
        for x in seen:
            self._check_seen(grams[0], x)
        self._check_tasks(grams.shape[1])
        return method_weights_groups(
            grams,
            self._op_name,
            self._options,
            present=seen[0].mask(grams.device),
            preferences=self._preferences_on(grams),
        )

    def _weights(self, gram: Tensor, present: Tensor | None) -> Tensor:
        return self.weights(gram, present=present)

    def _check_tasks(self, num_tasks: int) -> None:
        """Raises ValueError where these are too few for the method."""

    def _preferences_on(self, gram: Tensor) -> Tensor | None:
        preferences = self.preferences
        if preferences is not None and isinstance(gram, Tensor) and preferences.device != gram.device:
            # kept there: a copy at each call would wait for the device
            preferences = self.preferences = preferences.to(gram.device)
        return preferences


def read_preferences(preferences: Preferences) -> Tensor:
    """`[T]` float64, checked."""
    if not isinstance(preferences, (Tensor, Sequence)) or isinstance(preferences, (str, bytes)):
        raise TypeError(f"preferences: expected T numbers, got {type(preferences).__name__}")
    found = torch.as_tensor(preferences, dtype=torch.float64).detach().clone()
    if found.dim() != 1 or found.numel() == 0:
        raise ValueError(f"preferences: expected T numbers, got shape {list(found.shape)}")
    if not bool((torch.isfinite(found) & (found >= 0)).all()) or not bool((found > 0).any()):
        raise ValueError(f"preferences: expected numbers from 0, not all of them 0, got {found.tolist()}")
    return found
