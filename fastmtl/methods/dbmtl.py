"""DB-MTL: losses on one scale by their logarithm, gradients of one length (Lin et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fastmtl.core.gradient_rows import GradientRows
from fastmtl.methods.arguments import Argument, number
from fastmtl.methods.base import Seen
from fastmtl.methods.held import as_lists, combine_held, scale_of
from fastmtl.methods.running_method import RunningMethod, decayed, where_present
from fastmtl.methods.state import Field
from fastmtl.ops.gradients.average_gradients import average_gradients_of


class DBMTL(RunningMethod):
    """The sum of running averages of the gradients of the losses' logarithms, all brought to the longest one's length.

    With `g_t / (L_t + eps)`, the gradient of `log(L_t + eps)`: `m_t <- b m_t + (1 - b) g_t / (L_t + eps)`, where b is
    `beta / k^beta_sigma` at step k; the update is `sum_t (max_s |m_s| / |m_t|) m_t`. An average of zeros has weight 0.

    Args:
        beta: what the averages keep, from 0 (no averages) to below 1.
        beta_sigma: how fast that falls with the steps, from 0 (not at all).
        eps: what is added to a loss before its logarithm is taken, from 0.

    Raises:
        TypeError: an argument that is no number.
        ValueError: an argument out of range.

    `needs` the losses and the gradients. A loss below `-eps`, one of 0 without `eps` and one that is not finite have no
    logarithm: the update is NaN. The unshared parameters' gradients are those of the losses themselves; the paper's are
    those of the logarithms.

    State: the averages, by task name, T times the memory of the shared gradients in float32 (float64 for float64), and
    the number of steps. An absent task's average stays as it was, and takes no part. A step that overflows leaves the
    averages of its non-finite elements as they were, and is not counted.

    Source: Lin et al. 2023, *Dual-Balancing for Multi-Task Learning*, Algorithm 1. The gradients' averages and their
    Gram matrix are made in one pass.

    Example:
        >>> w = torch.ones(2, requires_grad=True)
        >>> losses = [w[0] + w[1], 4 * w[0] + 4 * w[1]]
        >>> _ = fastmtl.backward(losses, [w], method=DBMTL(beta=0.0))
        >>> w.grad
        tensor([1., 1.])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"losses", "gradients"})
    _holds = "averages"
    beta = Argument(number(least=0.0, below=1.0))
    beta_sigma = Argument(number(least=0.0))
    eps = Argument(number(least=0.0))

    def __init__(self, beta: float = 0.9, beta_sigma: float = 0.0, eps: float = 1e-8) -> None:
        super().__init__(step=Field(0, 0.0))
        self.beta, self.beta_sigma, self.eps = beta, beta_sigma, eps

    def update(self, rows: GradientRows, out: Sequence[Tensor], seen: Seen) -> tuple[Tensor, Tensor]:
        rows = as_lists(rows)
        device = self._device(rows, seen)
        assert seen.losses is not None
        present = seen.mask(device)
        scale = scale_of(seen, device)
        step = self._state.read(seen.names, device)["step"] + 1
        kept = decayed(self.beta, self.beta_sigma, step)
        losses = seen.losses + self.eps
        fine = (losses > 0) & losses.isfinite()
        take = torch.where(fine, (1 - kept) / losses, torch.nan) / scale
        held = self._held.of(rows, seen.names)
        gram = average_gradients_of(
            rows,
            held,
            where_present(present, kept.expand(rows.num_tasks), 1.0),
            where_present(present, take, 0.0),
            gram=True,
        )
        gram = seen.total(gram)
        lengths = gram.diagonal().sqrt()
        if present is not None:
            gram = torch.where(present[:, None] & present, gram, 0.0)
            lengths = torch.where(present, lengths, 0.0)
        weights = torch.where(lengths == 0, 0.0, lengths.max() / torch.where(lengths == 0, 1.0, lengths))
        combine_held(weights.to(device) * scale, held, rows.num_tasks, out)
        fine = weights.isfinite().all()
        self._state.keep(seen.names, None, step=torch.where(fine, step, step - 1))
        return gram * scale**2, weights

    def __repr__(self) -> str:
        return f"DBMTL(beta={self.beta}, beta_sigma={self.beta_sigma}, eps={self.eps})"
