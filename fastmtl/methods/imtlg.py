"""IMTL-G: an update with equal projections on all gradients (Liu et al. 2021)."""

from __future__ import annotations

from fastmtl.methods.gram_method import GramMethod


class IMTLG(GramMethod):
    """The projections of the update on all gradients are of equal length; the weights add up to 1.

    Weights may be negative, and grow without bound as the solution before it is normalised comes to add up to zero.
    Where gradients depend on each other, the least-squares solution of least length is taken: where no direction has
    equal projections (as with two opposite gradients and a third), the nearest to it. A zero gradient has weight 0;
    where that solution is zero, all weights are 0.

    Source: Liu, Li, Kuang, Xue, Chen, Yang, Liao, Zhang 2021, *Towards Impartial Multi-task Learning*, the closed
    form of its gradient balance.

    Example:
        >>> IMTLG().weights(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([0.3333, 0.6667], dtype=torch.float64)
    """

    _op_name = "imtlg"

    def __init__(self) -> None:
        super().__init__()

    def __repr__(self) -> str:
        return "IMTLG()"
