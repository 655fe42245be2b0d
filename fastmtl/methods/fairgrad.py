"""FairGrad: alpha-fair shares of improvement (Ban and Ji 2024)."""

from __future__ import annotations

from fastmtl.methods.arguments import Argument, number
from fastmtl.methods.gram_method import GramMethod


class FairGrad(GramMethod):
    """The weights solve `K a = a^(-1 / alpha)`: the update is alpha-fair to the tasks.

    alpha = 1 is Nash-MTL; a larger one favours the tasks that improve least. The weights are positive, and depend on
    the length of the gradients by definition: with a loss scale, hand it to `backward` or `apply`, so that it is taken
    out first. Where no direction serves all tasks they are as large as rounding lets them be. A zero gradient has
    weight 0, and is no party.

    Args:
        alpha: how fair, from 0.1 to 100.

    Raises:
        TypeError: alpha is no number.
        ValueError: alpha is outside that range.

    Source: Ban, Ji 2024, *Fair Resource Allocation in Multi-Task Learning*, the system
    `G G^T w = w^(-1/alpha)`; alpha = 1 is the default of the
    authors' code. Theirs is a least-squares fit of that equation, here it is solved.

    Example:
        >>> FairGrad(alpha=2.0).weights(torch.eye(2) * 8.0)
        tensor([0.2500, 0.2500], dtype=torch.float64)
    """

    _op_name = "fairgrad"
    alpha = Argument(number(least=0.1, most=100.0))

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = alpha
        super().__init__()

    @property
    def _options(self) -> list[float]:
        return [self.alpha]

    def __repr__(self) -> str:
        return f"FairGrad(alpha={self.alpha!r})"
