"""Nash-MTL: the Nash bargaining solution between tasks (Navon et al. 2022)."""

from __future__ import annotations

from fastmtl.methods.gram_method import GramMethod


class NashMTL(GramMethod):
    """The weights solve `K a = 1 / a`: no other update improves the product of the tasks' utilities.

    The weights are positive, and are in proportion to the inverse length of the gradients by definition: with a loss
    scale, hand it to `backward` or `apply`, so that it is taken out first. Where no direction serves all tasks they are
    as large as rounding lets them be. A zero gradient has weight 0, and is no party.

    Args:
        max_norm: the length that the update has at most; None: any.

    Raises:
        ValueError: `max_norm` is not positive.

    Source: Navon, Shamsian, Achituve, Maron, Kawaguchi, Chechik, Fetaya 2022, *Multi-Task Learning as a
    Bargaining Game*, claim 3.1 (`G G^T a = 1 / a`), solved by Newton's method and not by a sequence of approximations.

    Example:
        >>> NashMTL().weights(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([0.5000, 1.0000], dtype=torch.float64)
    """

    _op_name = "nashmtl"

    def __init__(self, max_norm: float | None = None) -> None:
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm: expected a positive number or None, got {max_norm!r}")
        super().__init__(0.0 if max_norm is None else max_norm)
        self.max_norm = max_norm

    def __repr__(self) -> str:
        return f"NashMTL(max_norm={self.max_norm!r})"
