"""Nash-MTL: the Nash bargaining solution between tasks (Navon et al. 2022)."""

from __future__ import annotations

from fastmtl.methods.arguments import Argument, number, optional
from fastmtl.methods.gram_method import GramMethod


class NashMTL(GramMethod):
    """The weights solve `K a = 1 / a`: no other update improves the product of the tasks' utilities.

    The weights are positive, and are in proportion to the inverse length of the gradients by definition: with a loss
    scale, hand it to `backward` or `apply`, so that it is taken out first. Where no direction serves all tasks they are
    as large as rounding lets them be. A zero gradient has weight 0, and is no party.

    Args:
        max_norm: the length that the update has at most; None: any.

    Raises:
        TypeError: `max_norm` is no number.
        ValueError: `max_norm` is not positive, or not finite.

    Source: Navon, Shamsian, Achituve, Maron, Kawaguchi, Chechik, Fetaya 2022, *Multi-Task Learning as a
    Bargaining Game*, claim 3.1 (`G G^T a = 1 / a`), solved by Newton's method and not by a sequence of approximations.

    Example:
        >>> NashMTL().weights(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([0.5000, 1.0000], dtype=torch.float64)
    """

    _op_name = "nashmtl"
    max_norm = Argument(optional(number(above=0.0)))

    def __init__(self, max_norm: float | None = None) -> None:
        self.max_norm = max_norm
        super().__init__()

    @property
    def _options(self) -> list[float]:
        return [0.0 if self.max_norm is None else self.max_norm]

    def __repr__(self) -> str:
        return f"NashMTL(max_norm={self.max_norm!r})"
