"""MoDo: multi-objective gradient descent with double sampling (Chen et al. 2023)."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from fastmtl.methods.arguments import Argument, number
from fastmtl.methods.base import Seen
from fastmtl.methods.state import Field, FusedMethod
from fastmtl.ops.gradients.method_step import method_step_op


class MoDo(FusedMethod):
    """Weights that follow the shortest convex combination by one projected gradient step at each call.

    The slope of `|lambda^T G|^2 / 2` in lambda is `G (G^T lambda)`. From one batch its expectation is wrong, since the
    noise of the two factors is the same; with the gradients G' of a second, independent batch, it is right:
    `lambda <- P(lambda - gamma (G G'^T lambda + rho lambda))`, where P projects on the simplex. The update is
    `lambda^T G` with the new lambda.

    Args:
        gamma: the length of a step, above 0. The slope grows with the square of the gradients, so that the right one
            does, too: the method depends on scale by definition.
        rho: what draws lambda to equal weights, from 0.

    Raises:
        TypeError: `gamma` or `rho` is no number.
        ValueError: `gamma` or `rho` out of range.

    `needs` a second batch: `backward(losses, second_losses=...)`, or a second bank (`GradientBank.apply(second=...)`).
    The paper's step takes the mean of both batches' gradients, or those of a third; here it takes the first batch's,
    whose unshared parameters get their gradients too.

    State: lambda, by task name. A task that was not seen before begins with 1/n, n tasks being present; lambda of the
    present tasks is projected on the simplex of these, and the others keep theirs.

    Source: Chen et al. 2023, *Three-Way Trade-Off in Multi-Objective Learning: Optimization, Generalization and
    Conflict-Avoidance*, section 2 (the algorithm MoDo).

    Example:
        >>> m = torch.tensor([[4.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
        >>> method = MoDo(gamma=0.1, rho=0.0)
        >>> method.weigh(m, Seen(["a", "b"], [True, True], second=m))
        tensor([0.4500, 0.5500], dtype=torch.float64)
    """

    needs: ClassVar[frozenset[str]] = frozenset({"second_batch"})
    gamma = Argument(number(above=0.0))
    rho = Argument(number(least=0.0))

    def __init__(self, gamma: float = 1e-3, rho: float = 0.1) -> None:
        # the name of the paper, and no other method's
        super().__init__(**{"lambda": Field(1, math.nan)})
        self.gamma, self.rho = gamma, rho

    def _weigh(self, gram: Tensor, seen: Seen, present: Tensor | None) -> Tensor:
        assert seen.second is not None
        kept = self._state.lend(seen.names, gram.device)
        w = method_step_op(seen.second, "modo", [self.gamma, self.rho], *kept, present=present, also=gram)
        self._state.take_back(seen.names, kept)
        return w

    def __repr__(self) -> str:
        return f"MoDo(gamma={self.gamma}, rho={self.rho})"
