"""SDMGrad: direction-oriented descent, by steps on the weights that two independent batches make unbiased."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fastmtl.methods.arguments import Argument, TaskNumbers, TaskNumbersArgument, count, number, read_preferences
from fastmtl.methods.base import Seen
from fastmtl.methods.state import Field, FusedMethod
from fastmtl.ops.gradients.method_step import method_step_op
from fastmtl.ops.gradients.method_weights import MOST_STEPS


class SDMGrad(FusedMethod):
    """The weights follow the stochastic gradient of `|G^T w + lambda g_0|^2 / 2` on the simplex; g_0 is preferred.

    With the inner products `A = G G'^T` of the task gradients and those of a second, independent batch, each call makes
    `steps` steps `w <- P(w - lr (A / s^2) (w + lambda u))` with momentum, where P projects on the simplex,
    `g_0 = G^T u` is the preferred direction, and s is the mean of `sqrt(max(A_ii, 0))`, so that the steps do not depend
    on the scale of the gradients. The weights of the update are `(w + lambda u) / (1 + lambda)`. It needs a second
    batch (`second_losses=` of `backward`, `second=` of a `GradientBank`). The paper takes the update's gradients from a
    third batch; here they are the first's.

    w is kept by the tasks' names, and where the next call starts; tasks that are present share the simplex. Where no
    `A_ii` is positive, no step is made.

    Args:
        lr: length of a step, positive.
        momentum: of the steps, from 0, below 1; it starts anew at each call.
        steps: how many at each call, from 1 to 10000.
        lambda_: how far the update is drawn to the preferred direction, from 0.
        preferences: the shares of g_0: T numbers from 0 in the order of the tasks, or a mapping from the name of each
            task; None, or where those of all present tasks are 0: the mean of the present gradients.

    Raises:
        TypeError: something else than numbers.
        ValueError: numbers other than the above; (when called) no second batch, preferences of other tasks.

    Source: Xiao, Ban, Ji 2023, *Direction-oriented Multi-objective Learning: Simple and Provable Stochastic
    Algorithms*. Momentum and the scale s are of the authors' implementation, which TorchJD and LibMTL follow.

    Example:
        >>> second = torch.tensor([[1.0, -0.5], [-0.5, 3.0]])
        >>> seen = Seen(["a", "b"], [True, True], second=second)
        >>> SDMGrad(lr=0.1, lambda_=0.0).weigh(torch.eye(2), seen)
        tensor([0.7001, 0.2999], dtype=torch.float64)
    """

    needs: ClassVar[frozenset[str]] = frozenset({"second_batch"})
    lr = Argument(number(above=0.0))
    momentum = Argument(number(least=0.0, below=1.0))
    steps = Argument(count(least=1, most=MOST_STEPS))
    lambda_ = Argument(number(least=0.0))

    def __init__(
        self,
        lr: float = 10.0,
        momentum: float = 0.5,
        steps: int = 20,
        lambda_: float = 0.3,
        preferences: TaskNumbersArgument | None = None,
    ) -> None:
        super().__init__(weights=Field(1, torch.nan))
        self.lr, self.momentum, self.steps, self.lambda_ = lr, momentum, steps, lambda_
        self.preferences = preferences

    @property
    def preferences(self) -> Tensor | dict[str, float] | None:
        """`[T]` float64, a dict from names of tasks, or None."""
        return None if self._preferences is None else self._preferences.value

    @preferences.setter
    def preferences(self, preferences: TaskNumbersArgument | None) -> None:
        self._preferences: TaskNumbers | None = read_preferences(preferences)

    @property
    def by_group(self) -> bool:  # type: ignore[override]
        """Whether it goes without names of tasks, which are others in each group."""
        return self._preferences is None or not self._preferences.by_name

    def _weigh(self, gram: Tensor, seen: Seen, present: Tensor | None) -> Tensor:
        assert seen.second is not None
        preferences = None if self._preferences is None else self._preferences.of(seen.names, gram.device)
        options = [self.lr, self.momentum, float(self.steps), self.lambda_]
        kept = self._state.lend(seen.names, gram.device)
        w = method_step_op(seen.second, "sdmgrad", options, *kept, present=present, preferences=preferences, also=gram)
        self._state.take_back(seen.names, kept)
        return w

    def __repr__(self) -> str:
        told = "" if self._preferences is None else f", preferences={self._preferences!r}"
        numbers = f"lr={self.lr!r}, momentum={self.momentum!r}, steps={self.steps!r}, lambda_={self.lambda_!r}"
        return f"SDMGrad({numbers}{told})"
