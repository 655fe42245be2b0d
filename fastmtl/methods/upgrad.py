"""UPGrad: every gradient projected on the cone without conflict (Quinton and Rey 2024)."""

from __future__ import annotations

from fastmtl.methods.gram_method import GramMethod, Preferences


class UPGrad(GramMethod):
    """Each gradient is projected on the cone of directions that harm no task; the projections are averaged.

    The update is in conflict with no task, up to the regularisation. The projections are those of the Gram matrix over
    its trace, plus `reg_eps` times the identity, and do not depend on the scale of the gradients. A zero gradient has
    its preference as its weight. Where all gradients are zero, the weights are the preferences.

    Args:
        reg_eps: the regularisation, from 1e-8. The default is 840 eps of float32. Below one eps of the dtype of the
            Gram matrix (1.2e-7 in float32) the rounding of its entries counts for more.
        preferences: T numbers from 0, what each task counts; None: 1/n for each of the n present tasks.

    Raises:
        TypeError: `preferences` are no numbers.
        ValueError: `reg_eps` below 1e-8; preferences that are no such numbers.

    Source: Quinton, Rey 2024, *Jacobian Descent for Multi-Objective Optimization*, section 2.2 and its equation of the
    regularised problem.

    Example:
        >>> UPGrad().weights(torch.tensor([[1.0, -0.5], [-0.5, 1.0]]))
        tensor([0.7500, 0.7500], dtype=torch.float64)
    """

    _op_name = "upgrad"

    def __init__(self, reg_eps: float = 1e-4, preferences: Preferences | None = None) -> None:
        super().__init__(reg_eps, preferences=preferences)
        self.reg_eps = reg_eps

    def __repr__(self) -> str:
        return f"UPGrad(reg_eps={self.reg_eps!r})"
