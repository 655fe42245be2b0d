"""Derivatives of derivatives: through the plain torch formula of a backward op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def _is_list(x: Any) -> bool:
    return isinstance(x, (list, tuple)) and (not x or isinstance(x[0], Tensor))


def _alias(x: Tensor, need: Any, wanted: list[Tensor]) -> Tensor:
    if need is not True:
        return x
    # a name of its own, so that a path from one argument to another is not counted twice
    wanted.append(x.view_as(x))
    return wanted[-1]


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
    # no function in here calls itself: as a cycle it would keep these tensors until the next collection of garbage
    wanted: list[Tensor] = []
    named: list[Any] = []
    with torch.enable_grad():
        for x, need in zip(args, needs, strict=True):
            if isinstance(x, Tensor):
                named.append(_alias(x, need, wanted))
            elif x and _is_list(x):
                named.append([_alias(y, n, wanted) for y, n in zip(x, need, strict=True)])
            else:
                named.append(x)
        outputs = function(*named)
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
    out: list[Any] = []
    for x, need in zip(args, needs, strict=True):
        if isinstance(x, Tensor):
            out.append(next(remaining) if need is True else None)
        elif _is_list(x):
            out.append([next(remaining) if n is True else None for n in need or []])
        else:
            out.append(None)
    return tuple(out)
