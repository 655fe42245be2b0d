"""The plain sum of the task gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.methods.base import Method


class Sum(Method):
    """Weight 1 for every present task: the update of `sum(losses).backward()`.

    Example:
        >>> Sum().weights(torch.eye(2))
        tensor([1., 1.], dtype=torch.float64)
    """

    def _weights(self, gram: Tensor, present: Tensor | None) -> Tensor:
        return torch.ones(gram.shape[0], dtype=torch.float64, device=gram.device)

    def __repr__(self) -> str:
        return "Sum()"
