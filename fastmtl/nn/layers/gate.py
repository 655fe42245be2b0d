"""Gates that switch a task's delta on and off, as TAPS learns them."""

from __future__ import annotations

import math

from torch import Tensor, nn


class TapsGate(nn.Module):
    """TAPS's gate: open (1) where the task's score has reached a threshold, closed (0) below, trained straight through.

    The score's gradient is that of the gate, as if the step were a straight line: `dL/ds = <dL/dW, Delta>`, also while
    the gate is closed. So a layer whose difference would help opens again.

    Args:
        threshold: tau.
        start: the score of a new task.

    Raises:
        TypeError: a number that is none.
        ValueError: one that is not finite.

    `forward(scores)` takes scores of any shape, and returns 0 or 1 for each, in their dtype. Source: Wallingford et al.
    2022 (TAPS), eq. 2 and 3: `w = W + 1[s >= tau] Delta`.

    Example:
        >>> scores = torch.tensor([0.15, 0.05], requires_grad=True)
        >>> gates = TapsGate()(scores)
        >>> gates.sum().backward()
        >>> gates.tolist(), scores.grad.tolist()
        ([1.0, 0.0], [1.0, 1.0])
    """

    def __init__(self, threshold: float = 0.1, start: float = 0.15) -> None:
        super().__init__()
        self.threshold = finite(threshold, "threshold")
        self.start = finite(start, "start")

    def forward(self, scores: Tensor) -> Tensor:
        hard = (scores.detach() >= self.threshold).to(scores.dtype)
        # the difference is exactly 0, so the sum is exactly the gate; (hard + s) - s would not be. A score that is not
        # finite makes a gate that is NaN
        return hard + (scores - scores.detach())

    def extra_repr(self) -> str:
        return f"threshold={self.threshold:g}, start={self.start:g}"


def finite(value: float, argument: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{argument}: expected a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{argument}: expected a finite number, got {value}")
    return float(value)
