"""ExcessMTL: weights that follow how far each task is from its optimum (He et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fastmtl.core.gradient_rows import GradientRows
from fastmtl.methods.arguments import Argument, count, number
from fastmtl.methods.base import Seen
from fastmtl.methods.held import as_lists, scale_of
from fastmtl.methods.running_method import RunningMethod, where_present
from fastmtl.methods.state import Field
from fastmtl.ops.gradients.combine import combine_into
from fastmtl.ops.gradients.excess_risks import excess_risks_of
from fastmtl.ops.gradients.gram import gram_rows


class ExcessMTL(RunningMethod):
    """Weights that grow for the tasks whose excess risk is large: what of a loss training can still take away.

    That is estimated by `r_t = sum x^2 / sqrt(s_t)` over the elements x of the gradient, where `s_t` is the running sum
    of the squares (a diagonal estimate of the Hessian, as in AdaGrad), and taken relative to what it was at first:
    `w_t <- w_t exp(step_size r_t / r_t^0)`, scaled to add up to 1. The update is `w^T G`.

    Args:
        step_size: how fast weights follow, above 0.
        warmup: how many steps of a task give its r^0, their mean, from 1. Its weight stays what it is until then. The
            paper takes three epochs.

    Raises:
        TypeError: `step_size` is no number, `warmup` no integer.
        ValueError: `step_size` or `warmup` out of range.

    `needs` the gradients. TorchJD's `n_warmup_steps` of 1 and more is `warmup`; with 0, its default, it takes the first
    step's risks as they are, which depend on the scale of the gradients. A task whose gradient was zero in all of its
    warmup goes on with a ratio of 1. The Gram matrix that a `Surgery` shows takes a read of the gradients of its own.

    State: the sums of squares, by task name, T times the memory of the shared gradients in float32 (float64 for
    float64), and numbers of each task. A task that was not seen before begins with 1/n, n tasks being present. An
    absent task keeps its own. A step that overflows leaves the sums of its non-finite elements as they were.

    Source: He et al. 2024, *Robust Multi-Task Learning with Excess Risks*, Equations 6, 7 and 9 as TorchJD cites them.

    Example:
        >>> method = ExcessMTL()
        >>> g = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> method(g)
        tensor([1.0000, 0.5000])
        >>> method(g)
        tensor([1.0000, 0.5000])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})
    _holds = "squares"
    step_size = Argument(number(above=0.0))
    warmup = Argument(count(least=1))

    def __init__(self, step_size: float = 1.0, warmup: int = 1) -> None:
        super().__init__(weights=Field(1, math.nan), risks=Field(1, 0.0), steps=Field(1, 0.0))
        self.step_size, self.warmup = step_size, warmup

    def update(self, rows: GradientRows, out: Sequence[Tensor], seen: Seen) -> tuple[Tensor, Tensor]:
        rows = as_lists(rows)
        device = self._device(rows, seen)
        present = seen.mask(device)
        gram = seen.total(gram_rows(rows))
        ones = torch.ones(rows.num_tasks, dtype=torch.float64, device=device)
        factors = where_present(present, ones / scale_of(seen, device), 0.0)
        risks = excess_risks_of(rows, self._held.of(rows, seen.names), factors)
        risks = seen.total(torch.diag(risks)).diagonal()
        before = self._state.read(seen.names, risks.device)
        weights, warming = self._stepped(before, risks, present)
        if rows.tensors:
            combine_into(weights, rows, out)
        self._state.keep(seen.names, present, weights=weights)
        fine = where_present(present, weights, 0.0).isfinite().all()
        added = torch.where(warming & fine, risks, 0.0)
        self._state.keep(seen.names, present, risks=before["risks"] + added, steps=before["steps"] + (warming & fine))
        return gram, weights

    def _stepped(self, before: dict[str, Tensor], risks: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
        """The new weights, `[T]`, and which tasks are still in their warmup."""
        warming = before["steps"] < self.warmup
        count = len(risks) if present is None else present.sum().to(risks.dtype)
        old = torch.where(before["weights"].isnan(), 1 / count, before["weights"])
        first = before["risks"] / before["steps"].clamp(min=1)
        ratio = torch.where(first > 0, risks / torch.where(first > 0, first, 1.0), torch.ones_like(risks))
        # zero, but NaN where a risk is: an overflow shows in the warmup too
        growth = torch.where(warming, risks - risks, self.step_size * ratio + (risks - risks))
        # by logarithms, so that a large risk does not overflow
        w = where_present(present, old.log() + growth, -torch.inf).softmax(0)
        return where_present(present, w, 0.0), warming

    def __repr__(self) -> str:
        return f"ExcessMTL(step_size={self.step_size}, warmup={self.warmup})"
