"""MGDA: the shortest vector in the convex hull of the gradients (Desideri 2012)."""

from __future__ import annotations

from fastmtl.methods.gram_method import GramMethod


class MGDA(GramMethod):
    """The update is the shortest convex combination of the gradients: a descent direction of every task, or zero.

    The weights are not negative and add up to 1. They are exact (Wolfe's algorithm), where Frank-Wolfe's steps are far
    from the solution for many tasks or gradients of very different lengths. A present task with a zero gradient gets
    weight 1, and the update is zero.

    Source: Desideri 2012, *Multiple-Gradient Descent Algorithm*; Sener and Koltun 2018, *Multi-Task Learning as
    Multi-Objective Optimization*, equation 3. The solver: Wolfe 1976, *Finding the Nearest Point in a Polytope*.

    Example:
        >>> MGDA().weights(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([0.2000, 0.8000], dtype=torch.float64)
    """

    _op_name = "mgda"

    def __init__(self) -> None:
        super().__init__()

    def __repr__(self) -> str:
        return "MGDA()"
