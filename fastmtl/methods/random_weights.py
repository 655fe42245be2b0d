"""Random weights (Lin et al. 2022)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmtl.methods.arguments import Argument, optional
from fastmtl.methods.base import Method


def _read_generator(value: Any, argument: str) -> torch.Generator:
    if not isinstance(value, torch.Generator):
        raise TypeError(f"{argument}: expected a torch.Generator, got {type(value).__name__}")
    return value


class RandomWeights(Method):
    """Softmax, over the present tasks, of fresh standard normal draws: weights that sum to 1.

    Args:
        generator: source of randomness, on the device of the gradients; None: torch's default generator there.

    Raises:
        TypeError: `generator` is no `torch.Generator`.

    Source: Lin, Ye, Zhang, Tsang 2022, *Reasonable Effectiveness of Random Weighting: A Litmus Test for
    Multi-Task Learning*, with the normal distribution; applied to gradients (RGW in the paper).

    Example:
        >>> w = RandomWeights().weights(torch.eye(3))
        >>> bool(torch.isclose(w.sum(), torch.ones((), dtype=torch.float64)))
        True
    """

    generator = Argument(optional(_read_generator))

    def __init__(self, *, generator: torch.Generator | None = None) -> None:
        self.generator = generator

    def _weights(self, gram: Tensor, present: Tensor | None) -> Tensor:
        draws = torch.randn(gram.shape[0], generator=self.generator, dtype=torch.float64, device=gram.device)
        if present is not None:
            draws = torch.where(present, draws, -torch.inf)
        return draws.softmax(0)

    def __repr__(self) -> str:
        return "RandomWeights()"
