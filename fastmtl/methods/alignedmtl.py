"""Aligned-MTL: orthogonal principal components of one length (Senushkin et al. 2023)."""

from __future__ import annotations

from fastmtl.methods.gram_method import GramMethod, Preferences

SCALES = ("min", "median", "rmse")
REDUCTIONS = ("mean", "sum")


class AlignedMTL(GramMethod):
    """The principal components of the gradients are brought to one length; then they are averaged or summed.

    The matrix of gradients is replaced by the nearest one whose condition number is 1, at the scale of one of its
    singular values, on the space that the gradients span. A zero gradient has weight 0.

    Args:
        scale: to which squared singular value, of those that are not zero, all are brought: the least (`"min"`), the
            lower `"median"`, or their mean (`"rmse"`).
        reduction: `"mean"` or `"sum"` over the present tasks, where no preferences are given.
        preferences: T numbers from 0, what each task counts, in place of the reduction's 1/n or 1.

    Raises:
        ValueError: an unknown scale or reduction; preferences that are no such numbers.
        TypeError: `preferences` are no numbers.

    Source: Senushkin, Patakin, Kuznetsov, Konushin 2023, *Independent Component Alignment for Multi-Task Learning*,
    algorithm 1.

    Example:
        >>> AlignedMTL().weights(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([0.2500, 0.5000], dtype=torch.float64)
    """

    _op_name = "alignedmtl"

    def __init__(self, scale: str = "min", reduction: str = "mean", preferences: Preferences | None = None) -> None:
        if scale not in SCALES:
            raise ValueError(f"scale: expected 'min', 'median' or 'rmse', got {scale!r}")
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction: expected 'mean' or 'sum', got {reduction!r}")
        super().__init__(SCALES.index(scale), REDUCTIONS.index(reduction), preferences=preferences)
        self.scale = scale
        self.reduction = reduction

    def __repr__(self) -> str:
        return f"AlignedMTL({self.scale!r}, {self.reduction!r})"
