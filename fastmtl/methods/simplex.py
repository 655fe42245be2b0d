"""The probability simplex: weights from 0 on that add up to 1."""

from __future__ import annotations

import torch
from torch import Tensor


def project_on_simplex(x: Tensor, present: Tensor | None = None) -> Tensor:
    """The nearest point of the simplex, `[T] -> [T]`, in a few operations on the device of `x`.

    Args:
        x: `[T]` floating point.
        present: `[T]` bool: the simplex is that of these tasks. The others get 0, and what `x` has for them is not
            looked at. None: all.

    Returns:
        `[T]`; NaN for all present tasks where one of them is not finite, and zeros where none is present.

    Source: Held, Wolfe and Crowder 1974, *Validation of Subgradient Optimization*.

    Example:
        >>> project_on_simplex(torch.tensor([0.6, 0.2, -3.0]))
        tensor([0.7000, 0.3000, 0.0000])
    """
    here = torch.ones_like(x, dtype=torch.bool) if present is None else present
    fine = (x.isfinite() | ~here).all()
    y = torch.where(here & fine, x, -torch.inf)
    largest = y.sort(descending=True).values
    shifts = (largest.cumsum(0) - 1) / torch.arange(1, len(x) + 1, dtype=x.dtype, device=x.device)
    count = (largest > shifts).sum()  # a run of the largest ones; -inf > -inf is false
    shift = shifts.gather(0, (count - 1).clamp(min=0)[None])
    w = torch.where(here, (y - shift).clamp(min=0), 0.0)
    return torch.where(fine | ~here, w, torch.nan)
