"""The coordinate-wise trimmed mean (Yin et al. 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from fastmtl.core.gradient_rows import GradientRows
from fastmtl.methods.arguments import Argument, count
from fastmtl.methods.base import Method, Seen
from fastmtl.methods.held import as_lists, device_of
from fastmtl.ops.gradients.gram import gram_rows
from fastmtl.ops.gradients.trimmed_mean import trimmed_mean_into


class TrimmedMean(Method):
    """The mean of the gradients, in each element of the parameters without the `trim` smallest and largest of them.

    So no single task (no `trim` tasks) can move the update far. Made for learners of which some are broken or hostile.

    Args:
        trim: how many elements to leave out at either end. More than `2 trim` tasks must be present.

    Raises:
        TypeError, ValueError: `trim` is no integer from 0.
        ValueError: (when called) as many present tasks as are left out, or fewer; where the device alone knows which
            are present the update is NaN.

    `needs` the gradients. A gradient that is None for a parameter counts as zeros, if its task is present. An element
    that is not finite makes the update NaN there, though it might have been left out, so that a `GradScaler` sees it.
    The Gram matrix that a `Surgery` shows takes a read of the gradients of its own.

    Source: Yin et al. 2018, *Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates*, coordinate-wise
    trimmed mean.

    Example:
        >>> TrimmedMean(1)(torch.tensor([[1.0, 9.0], [2.0, 1.0], [90.0, 3.0]]))
        tensor([2., 3.])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})
    trim = Argument(count())

    def __init__(self, trim: int) -> None:
        self.trim = trim

    def update(self, rows: GradientRows, out: Sequence[Tensor], seen: Seen) -> tuple[Tensor, None]:
        self._check_handed(seen, rows.num_tasks, "in the gradients")
        count = len(seen.present) if isinstance(seen.present, Tensor) else sum(seen.present)
        if count <= 2 * self.trim and rows.tensors:
            raise ValueError(
                f"TrimmedMean({self.trim}) leaves out {2 * self.trim} tasks: expected more of them, got {count} present"
            )
        gram = seen.total(gram_rows(as_lists(rows)))
        trimmed_mean_into(rows, self.trim, seen.mask(device_of(rows, seen)), out)
        return gram, None

    def __repr__(self) -> str:
        return f"TrimmedMean({self.trim})"
