"""Derivatives of derivatives: through the plain torch formula of a backward op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def composed_backward(
    function: Callable[..., Sequence[Tensor]], args: Sequence[Any], needs: Sequence[Any], grads: Sequence[Tensor]
) -> tuple[Any, ...]:
    """Vector-Jacobian product of `function`, which is plain differentiable torch.

    Args:
        function: from `args` to a list of tensors.
        args: tensors, lists of tensors and anything else, as an op takes them.
        needs: for each argument whether its gradient is wanted; a list of bools for a list of tensors.
        grads: the gradients of the results.

    Returns:
        One gradient (or None) per argument, lists for lists; recorded where autograd records.
    """
    wanted: list[Tensor] = []

    def alias(x: Any, need: Any) -> Any:
        if isinstance(x, Tensor) and need is True:
            # a name of its own, so that a path from one argument to another is not counted twice
            wanted.append(x.view_as(x))
            return wanted[-1]
        if isinstance(x, (list, tuple)) and x and isinstance(x[0], Tensor):
            return [alias(y, n) for y, n in zip(x, need, strict=True)]
        return x

    with torch.enable_grad():
        outputs = function(*(alias(x, n) for x, n in zip(args, needs, strict=True)))
        pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if y.requires_grad]
    found: list[Tensor | None] = [None] * len(wanted)
    if pairs and wanted:
        found = list(
            torch.autograd.grad(
                [y for y, _ in pairs],
                wanted,
                [g for _, g in pairs],
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
        )
    remaining = iter(found)

    def take(x: Any, need: Any) -> Any:
        if isinstance(x, Tensor):
            return next(remaining) if need is True else None
        if isinstance(x, (list, tuple)) and (not x or isinstance(x[0], Tensor)):
            return [take(y, n) for y, n in zip(x, need or [], strict=True)]
        return None

    return tuple(take(x, n) for x, n in zip(args, needs, strict=True))
