"""Gates that switch a task's delta on and off, as TAPS learns them."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_variadic


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


class _ScaledByGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate)
        return torch.where(gate == 0, 0, x * gate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, gate = ctx.saved_tensors
        of_x = torch.where(gate == 0, 0, grad * gate) if ctx.needs_input_grad[0] else None
        return of_x, (grad * x).sum_to_size(gate.shape) if ctx.needs_input_grad[1] else None


def scaled_by_gate(x: Tensor, gate: Tensor) -> Tensor:
    """`x * gate`; where a gate is exactly 0, x is not read, and gets no gradient other than zero.

    Args:
        x: of any shape.
        gate: broadcasts to x. Its gradient is that of the product, also where it is 0.
    """
    if not torch.compiler.is_compiling() and has_torch_function_variadic(x, gate):
        # a mode (one_pass follows a batch by one) sees this call, and not what an autograd.Function does
        return handle_torch_function(scaled_by_gate, (x, gate), x, gate)
    if (
        gate.dim() == 0
        and gate.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and float(gate.detach()) != 0
    ):
        return x * gate
    if torch.overrides.has_torch_function((x, gate)):
        # one_pass sees a function by its name, and none that is an autograd.Function
        return torch.overrides.handle_torch_function(scaled_by_gate, (x, gate), x, gate)
    return _ScaledByGate.apply(x, gate)


@functools.cache
def rounded(value: float, dtype: torch.dtype) -> float:
    """The number that a tensor of some dtype is compared with, when it is compared with `value`."""
    return torch.tensor(value, dtype=dtype).item()


def finite(value: float, argument: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{argument}: expected a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{argument}: expected a finite number, got {value}")
    return float(value)
