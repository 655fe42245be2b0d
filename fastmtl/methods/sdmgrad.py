"""SDMGrad: direction-oriented descent, by steps on the weights that two independent batches make unbiased."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.methods.base import Seen
from fastmtl.methods.gram_method import Preferences, read_preferences
from fastmtl.methods.state import Field, StatefulMethod
from fastmtl.ops.gradients.method_weights import check_method


class SDMGrad(StatefulMethod):
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
        preferences: T numbers from 0, the shares of g_0; None, or where those of all present tasks are 0: the mean of
            the present gradients.

    Raises:
        TypeError: `preferences` are no numbers.
        ValueError: numbers other than the above; (when called) no second batch.

    Source: Xiao, Ban, Ji 2023, *Direction-oriented Multi-objective Learning: Simple and Provable Stochastic
    Algorithms*. Momentum and the scale s are of the authors' implementation, which TorchJD and LibMTL follow.

    Example:
        >>> second = torch.tensor([[1.0, -0.5], [-0.5, 3.0]])
        >>> seen = Seen(["a", "b"], [True, True], second=second)
        >>> SDMGrad(lr=0.1, lambda_=0.0).weigh(torch.eye(2), seen)
        tensor([0.7001, 0.2999], dtype=torch.float64)
    """

    needs: ClassVar[frozenset[str]] = frozenset({"second_batch"})

    def __init__(
        self,
        lr: float = 10.0,
        momentum: float = 0.5,
        steps: int = 20,
        lambda_: float = 0.3,
        preferences: Preferences | None = None,
    ) -> None:
        super().__init__(weights=Field(1, torch.nan))
        self._options = [float(lr), float(momentum), float(steps), float(lambda_)]
        check_method("sdmgrad", self._options, preferences is not None)
        self.lr, self.momentum, self.steps, self.lambda_ = lr, momentum, steps, lambda_
        self.preferences = None if preferences is None else read_preferences(preferences)

    def _weigh(self, gram: Tensor, seen: Seen, present: Tensor | None) -> Tensor:
        assert seen.second is not None
        num_tasks = gram.shape[0]
        here = torch.ones(num_tasks, dtype=torch.bool, device=gram.device) if present is None else present
        shares = here.to(torch.float64)
        if self.preferences is not None:
            # kept there: a copy at each call would wait for the device
            self.preferences = self.preferences.to(gram.device)
            if self.preferences.shape != shares.shape:
                raise ValueError(f"preferences: expected shape [{num_tasks}], got {list(self.preferences.shape)}")
            wanted = shares * self.preferences
            shares = torch.where(wanted.sum() > 0, wanted, shares)
        start = self._state.read(seen.names, gram.device)["weights"]
        # a task that is new starts at its share of all
        start = torch.where(start.isnan(), 1.0 / here.sum(dtype=torch.float64), start)
        w = ops.method_weights(
            seen.second, "sdmgrad", self._options, present=present, preferences=shares, per_task=start
        )
        self._state.keep(seen.names, present, weights=w)
        w = torch.where(gram.isfinite().all(), w, torch.nan)
        return (w + self.lambda_ * shares / shares.sum()) / (1 + self.lambda_)

    def __repr__(self) -> str:
        return f"SDMGrad(lr={self.lr!r}, momentum={self.momentum!r}, steps={self.steps!r}, lambda_={self.lambda_!r})"
