"""DualProj: the mean gradient projected on the cone without conflict (Lopez-Paz and Ranzato 2017)."""

from __future__ import annotations

from fastmtl.methods.arguments import Argument, TaskNumbersArgument, number
from fastmtl.methods.gram_method import GramMethod
from fastmtl.ops.gradients.method_weights import LEAST_REG_EPS


class DualProj(GramMethod):
    """The mean gradient is projected on the cone of directions that harm no task.

    The update is in conflict with no task, up to the regularisation. The projections are those of the Gram matrix over
    its trace, plus `reg_eps` times the identity, and do not depend on the scale of the gradients. A zero gradient has
    its preference as its weight. Where all gradients are zero, the weights are the preferences.

    Args:
        reg_eps: the regularisation, from 1e-8. The default is 840 eps of float32. Below one eps of the dtype of the
            Gram matrix (1.2e-7 in float32) the rounding of its entries counts for more.
        preferences: what each task counts: T numbers from 0 in the order of the tasks, or a mapping from the name of
            each task; None: 1/n for each of the n present tasks. Where those of all present tasks are 0, the update is
            zero, as where no task is present.

    Raises:
        TypeError: `reg_eps` or `preferences` are no numbers.
        ValueError: `reg_eps` below 1e-8; preferences that are no such numbers; (when called) those of other tasks.

    Source: Lopez-Paz, Ranzato 2017, *Gradient Episodic Memory for Continual Learning*, equation 11, with every task on
    both sides, as Quinton and Rey 2024 compare it.

    Example:
        >>> DualProj().weights(torch.tensor([[4.0, -2.0], [-2.0, 1.0]]))
        tensor([0.5000, 0.9995], dtype=torch.float64)
    """

    _op_name = "dualproj"
    reg_eps = Argument(number(least=LEAST_REG_EPS, hint="preferences go by name, preferences="))

    def __init__(self, reg_eps: float = 1e-4, preferences: TaskNumbersArgument | None = None) -> None:
        self.reg_eps = reg_eps
        super().__init__(preferences)

    @property
    def _options(self) -> list[float]:
        return [self.reg_eps]

    def __repr__(self) -> str:
        return f"DualProj(reg_eps={self.reg_eps!r}{self._told})"
