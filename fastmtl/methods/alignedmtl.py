"""Aligned-MTL: orthogonal principal components of one length (Senushkin et al. 2023)."""

from __future__ import annotations

from fastmtl.methods.arguments import Argument, TaskNumbersArgument, choice
from fastmtl.methods.gram_method import GramMethod

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
        preferences: what each task counts, in place of the reduction's 1/n or 1: T numbers from 0 in the order of the
            tasks, or a mapping from the name of each task. Where those of all present tasks are 0, the update is zero,
            as where no task is present.

    Raises:
        ValueError: an unknown scale or reduction; preferences that are no such numbers; (when called) those of
            other tasks.
        TypeError: `preferences` are no numbers.

    Source: Senushkin, Patakin, Kuznetsov, Konushin 2023, *Independent Component Alignment for Multi-Task Learning*,
    algorithm 1.

    Example:
        >>> AlignedMTL().weights(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([0.2500, 0.5000], dtype=torch.float64)
    """

    _op_name = "alignedmtl"
    scale = Argument(choice(*SCALES))
    reduction = Argument(choice(*REDUCTIONS))

    def __init__(
        self, scale: str = "min", reduction: str = "mean", preferences: TaskNumbersArgument | None = None
    ) -> None:
        self.scale, self.reduction = scale, reduction
        super().__init__(preferences)

    @property
    def _options(self) -> list[float]:
        return [float(SCALES.index(self.scale)), float(REDUCTIONS.index(self.reduction))]

    def __repr__(self) -> str:
        return f"AlignedMTL({self.scale!r}, {self.reduction!r}{self._told})"
