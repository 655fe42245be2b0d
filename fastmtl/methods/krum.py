"""Krum: the gradients that have others near them (Blanchard et al. 2017)."""

from __future__ import annotations

from fastmtl.methods.arguments import Argument, count, read_flag
from fastmtl.methods.gram_method import GramMethod


class Krum(GramMethod):
    """The mean of the gradients that are nearest to others: up to `byzantine` of them may be wrong in any way.

    Each gradient scores the sum of its squared distances to the n - byzantine - 2 nearest others of the n present tasks
    (to one at least). The `selected` lowest scores have equal weights, of equal scores the first. Distances come from
    the Gram matrix, and so are seen to the rounding of the gradients' squared lengths.

    Args:
        byzantine: how many gradients may be wrong, from 0.
        selected: how many are averaged, from 1: Multi-Krum from 2 on.
        squared: sum squared distances, as the paper does; False: distances, as TorchJD does.

    Raises:
        TypeError: `byzantine` or `selected` is no integer, `squared` no bool.
        ValueError: a number below those above; (when called) fewer tasks than selected, or than byzantine + 3 with a
            positive byzantine.

    Source: Blanchard, El Mhamdi, Guerraoui, Stainer 2017, *Machine Learning with Adversaries: Byzantine Tolerant
    Gradient Descent*: the Krum function, and Multi-Krum.

    Example:
        >>> g = torch.tensor([[1.0, 0.0], [1.1, 0.0], [0.9, 0.1], [-9.0, 5.0]])
        >>> Krum(byzantine=1).weights(g @ g.mT)
        tensor([1., 0., 0., 0.], dtype=torch.float64)
    """

    _op_name = "krum"
    byzantine = Argument(count())
    selected = Argument(count(least=1))
    squared = Argument(read_flag)

    def __init__(self, byzantine: int = 0, selected: int = 1, *, squared: bool = True) -> None:
        self.byzantine, self.selected, self.squared = byzantine, selected, squared
        super().__init__()

    @property
    def _options(self) -> list[float]:
        return [float(self.byzantine), float(self.selected), float(self.squared)]

    def _check_tasks(self, num_tasks: int) -> None:
        least = max(self.byzantine + 3 if self.byzantine > 0 else 1, self.selected)
        if num_tasks < least:
            raise ValueError(f"gram: {self!r} needs at least {least} tasks, got {num_tasks}")

    def __repr__(self) -> str:
        return f"Krum(byzantine={self.byzantine!r}, selected={self.selected!r}, squared={self.squared!r})"
