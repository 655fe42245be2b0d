"""ConFIG: an update that shares one cosine with all gradients (Liu, Chu, Thuerey 2025)."""

from __future__ import annotations

from fastmtl.methods.arguments import TaskNumbersArgument
from fastmtl.methods.gram_method import GramMethod


class ConFIG(GramMethod):
    """The direction has equal (or the preferred) cosines to all gradients; its length is the sum of their projections.

    Where gradients depend on each other, the least-squares solution is taken. A zero gradient has weight 0; where that
    solution is zero (two opposite gradients alone), all weights are 0.

    Args:
        preferences: to what the cosines are in proportion: T numbers from 0 in the order of the tasks, or a mapping
            from the name of each task; None: all equal. Where those of all present tasks are 0, the update is zero, as
            where no task is present.

    Raises:
        TypeError, ValueError: `preferences` are no such numbers; (when called) those of other tasks.

    Source: Liu, Chu, Thuerey 2025, *ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks*,
    equations 2 and 3.

    Example:
        >>> ConFIG().weights(torch.eye(2))
        tensor([1., 1.], dtype=torch.float64)
    """

    _op_name = "config"

    def __init__(self, preferences: TaskNumbersArgument | None = None) -> None:
        super().__init__(preferences)

    def __repr__(self) -> str:
        return "ConFIG()" if self._preferences is None else f"ConFIG({self._preferences!r})"
