"""The surgery itself: the one place that makes a Gram matrix, asks the method, and combines the task gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmtl import methods
from fastmtl.core.schemas import without_autocast
from fastmtl.distributed.ranks import Ranks
from fastmtl.methods import Method, PCGrad, Weighting
from fastmtl.surgery.accumulate import Updates
from fastmtl.surgery.result import Surgery
from fastmtl.surgery.task_gradients import SurgeryInput, TaskGradients


class SurgeryOptions(NamedTuple):
    """How a surgery is made.

    Attributes:
        method: what turns the Gram matrix into weights.
        loss_scale: what the losses were multiplied by; None: by nothing.
        ranks: who decides together; None: this process alone.
    """

    method: Weighting
    loss_scale: float | Tensor | None = None
    ranks: Ranks | None = None


def solve(gradients: SurgeryInput, options: SurgeryOptions) -> tuple[Updates, Surgery]:
    """What is to be added to each parameter's `.grad`, and what was seen on the way. `gradients` are used up."""
    names, present = gradients.names, gradients.present
    with torch.no_grad():
        if gradients.is_empty:
            gram = torch.zeros(len(names), len(names), device=gradients.device)
            weights = _ones_of_present(present, gradients.device)
            return gradients.combine(weights), Surgery(gram, weights, names, present)
        with without_autocast(gradients.device.type):
            fused = options.ranks is None and type(options.method) is PCGrad and not isinstance(present, Tensor)
            if fused and isinstance(gradients, TaskGradients):
                gram, weights, updates = gradients.pcgrad(options.method)
                return updates, Surgery(_unscaled(gram, options.loss_scale), weights, names, present)
            gram = gradients.gram()
            if options.ranks is not None and gradients.partitioned:
                gram = options.ranks.total_gram(gram)
            gram = _unscaled(gram, options.loss_scale)
            weights = _weigh(gram, gradients, options)
        return gradients.combine(weights), Surgery(gram, weights, names, present)


def _ones_of_present(present: Sequence[bool] | Tensor, device: torch.device) -> Tensor:
    if isinstance(present, Tensor):
        return present.to(torch.float64)
    weights = torch.zeros(len(present), dtype=torch.float64, device=device)
    for t, here in enumerate(present):
        if here:
            weights[t].fill_(1.0)  # a fill: a copy from the host would wait
    return weights


def _unscaled(gram: Tensor, scale: float | Tensor | None) -> Tensor:
    """The Gram matrix of the gradients without the loss scale."""
    if scale is None:
        return gram
    squared = scale.to(torch.float64) ** 2 if isinstance(scale, Tensor) else scale**2
    return (gram.to(torch.float64) / squared).to(gram.dtype)


def _weigh(gram: Tensor, gradients: SurgeryInput, options: SurgeryOptions) -> Tensor:
    """The method's weights; the first rank's, where there are several."""
    method, ranks = options.method, options.ranks
    if ranks is None:
        return _weigh_alone(gram, gradients, method)
    if not isinstance(method, Method):
        # whatever it does, it may raise on one rank alone; it does not mind waiting for the host
        with ranks.together(f"method {getattr(method, '__qualname__', method)!r}"):
            weights = _weigh_alone(gram, gradients, method)
        return ranks.first_of(weights)
    try:
        weights = _weigh_alone(gram, gradients, method)
    except Exception:
        # the others must not wait; they get NaN
        ranks.first_of(torch.full_like(gram[0], torch.nan, dtype=torch.float64))
        raise
    return ranks.first_of(weights)


def _weigh_alone(gram: Tensor, gradients: SurgeryInput, method: Weighting) -> Tensor:
    present = gradients.present
    if isinstance(present, Tensor):
        if isinstance(method, Method):
            weights = method.weights(gram, present=present)
        else:  # a callable sees the present tasks only, so that the host must know them
            weights = methods.weights_of(method, gram, present.tolist())
    elif not any(present):
        weights = torch.zeros(len(present), dtype=torch.float64, device=gram.device)
    else:
        weights = methods.weights_of(method, gram, present)
    return weights if gradients.poison is None else weights + gradients.poison
