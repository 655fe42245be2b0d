"""MoCo: multi-objective gradient correction (Fernando et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fastmtl.core.gradient_rows import GradientRows
from fastmtl.methods.arguments import Argument, choice, number
from fastmtl.methods.base import Seen
from fastmtl.methods.held import as_lists, combine_held, scale_of
from fastmtl.methods.running_method import RunningMethod, decayed, where_present
from fastmtl.methods.simplex import project_on_simplex
from fastmtl.methods.state import Field
from fastmtl.ops.gradients.average_gradients import average_gradients_of


class MoCo(RunningMethod):
    """Weights that follow the shortest convex combination of running averages of the gradients, a step at each call.

    At step k: `y_t <- y_t - b (y_t - g_t)` with `b = beta / k^beta_sigma`; then
    `lambda <- P(lambda - c (Y Y^T + rho I) lambda)` with `c = gamma / k^gamma_sigma`, where P projects on the simplex;
    the update is `lambda^T Y`. The averages take out most of the noise that makes weights from one batch's gradients
    wrong in expectation.

    Args:
        beta: how far an average goes towards the gradient, above 0 to 1.
        beta_sigma: how fast that falls with the steps, from 0 (not at all).
        gamma: the length of lambda's step, above 0. Its slope grows with the square of the gradients, so that the right
            one does, too: the method depends on scale by definition.
        gamma_sigma: how fast that falls with the steps, from 0.
        rho: what draws lambda to equal weights, from 0.
        projection: P: `"simplex"`, the nearest point (the paper), or `"softmax"`, which LibMTL takes.

    Raises:
        TypeError: an argument that is no number.
        ValueError: an argument out of range.

    `needs` the gradients. The averages and their Gram matrix are made in one pass, so that lambda's step sees the new
    averages (the paper's has those of the step before); the defaults are LibMTL's, which also divides each gradient by
    its length and multiplies it by its loss before it is averaged.

    State: the averages, by task name, T times the memory of the shared gradients in float32 (float64 for float64);
    lambda, by task name; the number of steps. A task that was not seen before begins with 1/n, n tasks being present.
    An absent task's average and lambda stay as they were. A step that overflows leaves the averages of its non-finite
    elements as they were, and is not counted.

    Source: Fernando et al. 2023, *Mitigating Gradient Bias in Multi-objective Learning: A Provably Convergent
    Approach*, the algorithm MoCo.

    Example:
        >>> method = MoCo(beta=1.0, beta_sigma=0.0, gamma=0.1)
        >>> method(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))  # lambda: 0.425, 0.575
        tensor([0.8500, 0.5750])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})
    _holds = "averages"
    beta = Argument(number(above=0.0, most=1.0))
    beta_sigma = Argument(number(least=0.0))
    gamma = Argument(number(above=0.0))
    gamma_sigma = Argument(number(least=0.0))
    rho = Argument(number(least=0.0))
    projection = Argument(choice("simplex", "softmax"))

    def __init__(
        self,
        beta: float = 0.5,
        beta_sigma: float = 0.5,
        gamma: float = 0.1,
        gamma_sigma: float = 0.5,
        rho: float = 0.0,
        *,
        projection: str = "simplex",
    ) -> None:
        super().__init__(step=Field(0, 0.0), weights=Field(1, math.nan))
        self.beta, self.beta_sigma = beta, beta_sigma
        self.gamma, self.gamma_sigma, self.rho = gamma, gamma_sigma, rho
        self.projection = projection

    def update(self, rows: GradientRows, out: Sequence[Tensor], seen: Seen) -> tuple[Tensor, Tensor]:
        rows = as_lists(rows)
        device = self._device(rows, seen)
        present = seen.mask(device)
        scale = scale_of(seen, device)
        before = self._state.read(seen.names, device)
        step = before["step"] + 1
        share = decayed(self.beta, self.beta_sigma, step).expand(rows.num_tasks)
        held = self._held.of(rows, seen.names)
        keep, take = where_present(present, 1 - share, 1.0), where_present(present, share / scale, 0.0)
        gram = seen.total(average_gradients_of(rows, held, keep, take, gram=True))
        if present is not None:
            gram = torch.where(present[:, None] & present, gram, 0.0)
        weights = self._stepped(before["weights"], gram, decayed(self.gamma, self.gamma_sigma, step), present)
        combine_held(weights * scale, held, rows.num_tasks, out)
        fine = weights.isfinite().all()
        self._state.keep(seen.names, present, weights=weights)
        self._state.keep(seen.names, None, step=torch.where(fine, step, step - 1))
        return gram * scale**2, weights

    def _stepped(self, before: Tensor, gram: Tensor, gamma: Tensor, present: Tensor | None) -> Tensor:
        """The new lambda, `[T]`, from the old one (NaN: none yet)."""
        count = len(before) if present is None else present.sum().to(before.dtype)
        before = where_present(present, torch.where(before.isnan(), 1 / count, before), 0.0)
        moved = before - gamma * (gram @ before + self.rho * before)
        if self.projection == "simplex":
            return project_on_simplex(moved, present)
        # a task that is not there has no share; of none at all nothing is NaN
        w = where_present(present, moved, -torch.inf).softmax(0)
        return where_present(present, w, 0.0)

    def __repr__(self) -> str:
        return (
            f"MoCo(beta={self.beta}, beta_sigma={self.beta_sigma}, gamma={self.gamma}, "
            f"gamma_sigma={self.gamma_sigma}, rho={self.rho}, projection={self.projection!r})"
        )
