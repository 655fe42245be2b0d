"""CAGrad: the best direction for the worst task, near the mean gradient (Liu et al. 2021)."""

from __future__ import annotations

from fastmtl.methods.arguments import Argument, number
from fastmtl.methods.gram_method import GramMethod


class CAGrad(GramMethod):
    """The update improves the worst task as much as any within a ball around the mean gradient g_0.

    It maximises `min_i <g_i, d>` over all d with `|d - g_0| <= c |g_0|`. For c below 1 it descends on the mean loss,
    not on each task's. Where no d in the ball serves all tasks better than standing still, d is the point nearest to
    g_0 that harms none. A present task with a zero gradient counts in the mean, and is served by no direction.

    Args:
        c: radius of the ball in lengths of the mean gradient, from 0 (the mean itself).

    Raises:
        TypeError: c is no number.
        ValueError: c is negative or not finite.

    Source: Liu, Liu, Jin, Stone, Liu 2021, *Conflict-Averse Gradient Descent for Multi-task Learning*, equation 3; the
    update is the mean's, not rescaled by `1 + c^2`. c = 0.5 is the middle of the values that the paper tries.

    Example:
        >>> CAGrad(c=0.5).weights(torch.eye(2))
        tensor([0.7500, 0.7500], dtype=torch.float64)
    """

    _op_name = "cagrad"
    c = Argument(number(least=0.0))

    def __init__(self, c: float = 0.5) -> None:
        self.c = c
        super().__init__()

    @property
    def _options(self) -> list[float]:
        return [self.c]

    def __repr__(self) -> str:
        return f"CAGrad(c={self.c!r})"
