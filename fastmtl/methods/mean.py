"""The plain mean of the task gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.methods.base import Method


class Mean(Method):
    """Weight 1/n for each of the n present tasks.

    Example:
        >>> Mean().weights(torch.eye(2))
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """

    def _weights(self, gram: Tensor, present: Tensor | None) -> Tensor:
        ones = torch.ones(gram.shape[0], dtype=torch.float64, device=gram.device)
        return ones / (gram.shape[0] if present is None else present.sum())

    def __repr__(self) -> str:
        return "Mean()"
