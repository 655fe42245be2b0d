"""Oracles of `gradvac_coefficients`, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.ops.gradients.order import Draw, drawn_order


def gradvac_coefficients(
    gram: Tensor, order: Tensor, targets: Tensor, beta: float, update: str = "always"
) -> tuple[Tensor, Tensor]:
    """GradVac's coefficients and new targets (Wang et al. 2021, Algorithm 1) from the Gram matrix alone.

    All rows advance together, step by step: they don't see each other. A step leaves the part of g across g_j alone,
    and makes the cosine h: so |g| becomes `|g| sqrt(1 - c^2) / sqrt(1 - h^2)`.
    """
    m = gram.to(torch.float64)
    num_tasks = m.shape[0]
    rounding = torch.finfo(gram.dtype).eps
    most = 1 - 8 * rounding
    lengths = m.diagonal().sqrt()
    rows = torch.arange(num_tasks, device=m.device)
    c = torch.eye(num_tasks, dtype=torch.float64, device=m.device)
    before = targets.to(torch.float64).contiguous()
    h = before.clone()
    norm, total = lengths.clone(), lengths.clone()  # of each row's gradient; of all that it is a sum of
    bad = torch.zeros(num_tasks, dtype=torch.bool, device=m.device)
    for step in range(order.shape[1]):
        j = order[:, step].to(m.device, torch.int64)
        visit = j != rows
        out_of_range = (j < 0) | (j >= num_tasks)
        j = j.clamp(0, num_tasks - 1)
        # only columns that the row uses are met: 0 * NaN must not leak from a task never visited
        dots = torch.where(c != 0, c * m[:, j].mT, torch.zeros_like(c)).sum(1)
        target = h[rows, j]
        finite = torch.isfinite(dots) & torch.isfinite(lengths) & torch.isfinite(lengths[j]) & torch.isfinite(target)
        bad = bad | (visit & (out_of_range | ~finite))
        meets = visit & ~bad & (lengths > 0) & (lengths[j] > 0) & (norm > 8 * rounding * total)
        size = torch.where(meets, norm * lengths[j], 1.0)
        cosine = torch.where(meets, dots / size, 0.0).clamp(-most, most)
        wanted = torch.where(meets, target, 0.0).clamp(-most, most)
        turns = meets & (cosine < wanted)
        across, across_wanted = ((1 - cosine) * (1 + cosine)).sqrt(), ((1 - wanted) * (1 + wanted)).sqrt()
        factor = norm * (wanted * across - cosine * across_wanted) / (lengths[j] * across_wanted)
        factor = torch.where(turns, factor, 0.0)
        c = c + torch.nn.functional.one_hot(j, num_tasks).to(c.dtype) * factor[:, None]
        total = total + torch.where(turns, factor * lengths[j], 0.0).abs()
        norm = torch.where(turns, norm * across / across_wanted, norm)
        moves = meets if update == "always" else turns
        h[rows, j] = torch.where(moves, target + beta * (cosine - target), target)
    c = torch.where(bad[:, None], torch.full_like(c, torch.nan), c)
    return c, torch.where(bad[:, None], before, h)


def gradvac_step(
    gram: Tensor,
    targets: Tensor,
    order: Tensor | None,
    key: int,
    state: Tensor | None,
    present: Tensor | None,
    beta: float,
    update: str,
    reduction: str,
) -> Tensor:
    """The weights `[T]` of the sum or mean of the turned gradients; moves the targets of the tasks that take part."""
    if order is None:
        order = drawn_order(Draw(key, state), gram.shape[0], gram.device)
    here = torch.ones(gram.shape[0], dtype=torch.bool, device=gram.device) if present is None else present
    both = here[:, None] & here
    c, moved = gradvac_coefficients(torch.where(both, gram, 0.0), order, targets, beta, update)
    w = torch.where(here, torch.where(here[:, None], c, 0.0).sum(0), 0.0)
    if reduction == "mean":
        w = w / here.sum()
    targets.copy_(torch.where(both & w[here].isfinite().all(), moved, targets))
    return torch.where(here, w, 0.0)


def gradvac_loop(grads: Tensor, order: Tensor, targets: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of the paper, word for word, on the vectors themselves: the turned gradients and the new targets.

    The check on the oracle, for gradients of which none is zero and no two are parallel.
    """
    turned, h = [], targets.clone()
    for i, visits in enumerate(order.tolist()):
        g = grads[i].clone()
        for j in visits:
            if j == i:
                continue
            c = torch.dot(g, grads[j]) / (g.norm() * grads[j].norm())
            if c < h[i, j]:
                across, wanted = (1 - c**2).sqrt(), (1 - h[i, j] ** 2).sqrt()
                g = g + g.norm() * (h[i, j] * across - c * wanted) / (grads[j].norm() * wanted) * grads[j]
            h[i, j] = (1 - beta) * h[i, j] + beta * c
        turned.append(g)
    return torch.stack(turned), h
