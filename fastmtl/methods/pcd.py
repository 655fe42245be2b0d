"""PCD: priority-constrained descent, which follows one task and lets none of the others fall behind."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fastmtl.methods.arguments import Argument, TaskNumbers, check_task_names, number, optional, read_name, read_number
from fastmtl.methods.base import Seen
from fastmtl.methods.state import Field, FusedMethod
from fastmtl.ops.gradients.method_step import method_step_op


class PCD(FusedMethod):
    """The update follows the gradient of one task as closely as a least progress of all others allows.

    Gradients have scales `s_i = 1 / sqrt(v_i + eps)`, with v_i the running average of the squared length of g_i. The
    direction is the d nearest to `s_1 g_1` with `s_j g_j . d >= tau (s_j |g_j|)^2` for all others j, where g_1 is that
    of the primary task; the update is d, at the length of g_1. Where no d satisfies all of these it is g_1. Where g_1
    or d is zero the update is zero. Where the primary task is absent the first that is present has its place. A zero
    gradient constrains nothing.

    The averages are kept by the tasks' names; an absent task's stays as it is.

    Args:
        tau: what part of the progress along its own scaled gradient each other task must make, from 0 to 1: one number,
            or a mapping from names to numbers, 0 for tasks that it lacks.
        beta: what of an average is kept at each step, from 0, below 1. It is corrected for its start.
        eps: added to the averages, from 0. At 0 the update does not depend on the scale of the gradients; TorchJD has
            1e-8.
        primary: the name of the task to follow; None: the first that is handed over.

    Raises:
        TypeError: something else than numbers and names.
        ValueError: numbers other than the above; (when called) no task is called `primary`, or as a name in `tau`.

    Source: *Not All Objectives Are Born Equal: Priority-Constrained Descent for Hierarchical Multi-Objective
    Optimization*, arXiv 2606.29521. The solver: Goldfarb, Idnani 1983, *A Numerically Stable Dual Method for Solving
    Strictly Convex Quadratic Programs*.

    Example:
        >>> PCD(tau=0.0).weights(torch.tensor([[1.0, -0.5], [-0.5, 1.0]]))
        tensor([1.1547, 0.5774], dtype=torch.float64)
    """

    beta = Argument(number(least=0.0, below=1.0))
    eps = Argument(number(least=0.0))
    primary = Argument(optional(read_name))

    @property
    def by_group(self) -> bool:  # type: ignore[override]
        """Whether it goes without names of tasks, which are others in each group."""
        return self.primary is None and self._taus is None

    def __init__(
        self,
        tau: float | Mapping[str, float] = 0.02,
        beta: float = 0.999,
        *,
        eps: float = 0.0,
        primary: str | None = None,
    ) -> None:
        # the averages are `squares / counted`
        super().__init__(squares=Field(1, 0.0), counted=Field(1, 0.0))
        self.tau, self.beta, self.eps, self.primary = tau, beta, eps, primary

    @property
    def tau(self) -> float | dict[str, float]:
        return self._tau if self._taus is None else self._taus.value

    @tau.setter
    def tau(self, tau: float | Mapping[str, float]) -> None:
        if isinstance(tau, Mapping):
            self._taus: TaskNumbers | None = TaskNumbers(tau, "tau", rest=0.0, most=1.0)
            self._tau = 0.0
        else:
            self._tau = read_number(tau, "tau", least=0.0, most=1.0)
            self._taus = None

    def _weigh(self, gram: Tensor, seen: Seen, present: Tensor | None) -> Tensor:
        names = list(seen.names)
        if self.primary is not None:
            check_task_names([self.primary], "primary", names)
        primary = 0 if self.primary is None else names.index(self.primary)
        taus = None if self._taus is None else self._taus.of(names, gram.device)
        options = [float(primary), self._tau, self.beta, self.eps]
        kept = self._state.lend(names, gram.device)
        w = method_step_op(gram, "pcd", options, *kept, present=present, per_task=taus)
        self._state.take_back(names, kept)
        return w

    def __repr__(self) -> str:
        return f"PCD(tau={self.tau!r}, beta={self.beta!r}, eps={self.eps!r}, primary={self.primary!r})"
