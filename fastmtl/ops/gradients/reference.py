"""Oracles of the ops on task gradients: short, obviously right, in plain PyTorch, exact in float64.

Used by the tests, by the benchmarks' checks and as the `reference` backend; those of the ops with per-task weights are
in `task_weights/reference.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl.core.gradient_rows import accumulate_dtype, first_of_params
from fastmtl.ops.gradients.order import Draw, drawn_order
from fastmtl.ops.gradients.reference_elementwise import average_gradients as average_gradients
from fastmtl.ops.gradients.reference_elementwise import excess_risks as excess_risks
from fastmtl.ops.gradients.reference_elementwise import graddrop as graddrop
from fastmtl.ops.gradients.reference_elementwise import trimmed_mean as trimmed_mean
from fastmtl.ops.gradients.reference_gradvac import gradvac_coefficients as gradvac_coefficients
from fastmtl.ops.gradients.reference_gradvac import gradvac_loop as gradvac_loop
from fastmtl.ops.gradients.reference_gradvac import gradvac_step as gradvac_step
from fastmtl.ops.gradients.reference_methods import method_step as method_step
from fastmtl.ops.gradients.reference_methods import method_weights as method_weights


def bank_from_lists(tensors: Sequence[Tensor], index: Sequence[int], num_tasks: int, num_params: int) -> Tensor:
    """The `[T, P]` bank of the lists, in the accumulation dtype; None becomes zero."""
    dtype = accumulate_dtype([x.dtype for x in tensors])
    by_position = dict(zip(index, tensors, strict=True))
    columns = []
    for i, like in first_of_params(tensors, index, num_params).items():
        zero = torch.zeros_like(like)
        rows = [by_position.get(t * num_params + i, zero).reshape(-1).to(dtype) for t in range(num_tasks)]
        columns.append(torch.stack(rows))
    return torch.cat(columns, dim=1) if columns else torch.zeros(num_tasks, 0, dtype=dtype)


def _mirrored(m: Tensor) -> Tensor:
    # a matrix product may round M[s, t] and M[t, s] differently
    return m.triu() + m.triu(1).mT


def gram(grads: Tensor) -> Tensor:
    """M = G G^T. `[T, P] -> [T, T]`, symmetric, float32 (float64 for float64)."""
    rows = grads.to(accumulate_dtype([grads.dtype]))
    return _mirrored(rows @ rows.mT)


def gram_list(tensors: Sequence[Tensor], index: Sequence[int], num_tasks: int, num_params: int) -> Tensor:
    """`gram` of T lists: summed parameter by parameter, so that no concatenated copy is made."""
    dtype = accumulate_dtype([x.dtype for x in tensors])
    by_position = dict(zip(index, tensors, strict=True))
    device = tensors[0].device if tensors else None
    total = torch.zeros(num_tasks, num_tasks, dtype=dtype, device=device)
    for i, like in first_of_params(tensors, index, num_params).items():
        zero = torch.zeros_like(like)
        rows = torch.stack([by_position.get(t * num_params + i, zero).reshape(-1) for t in range(num_tasks)]).to(dtype)
        total = total + rows @ rows.mT
    return _mirrored(total)


def combine(weights: Tensor, grads: Tensor) -> Tensor:
    """w G. `[T], [T, P] -> [P]` or `[K, T], [T, P] -> [K, P]`, in the dtype of `grads`."""
    dtype = accumulate_dtype([grads.dtype])
    return (weights.to(dtype) @ grads.to(dtype)).to(grads.dtype)


def combine_list(weights: Tensor, tensors: Sequence[Tensor], index: Sequence[int], num_params: int) -> list[Tensor]:
    """`combine` of T lists: n' tensors, or K n' for `[K, T]` weights; n' counts the present parameters."""
    num_tasks = weights.shape[-1]
    by_position = dict(zip(index, tensors, strict=True))
    first = first_of_params(tensors, index, num_params)
    columns = []
    for i, like in first.items():
        zero = torch.zeros_like(like)
        rows = torch.stack([by_position.get(t * num_params + i, zero).reshape(-1) for t in range(num_tasks)])
        flat = combine(weights.reshape(-1, num_tasks), rows)
        columns.append(flat.reshape(flat.shape[0], *like.shape))
    # each in the memory layout of its parameter's first gradient
    likes = list(first.values())
    count = 1 if weights.dim() == 1 else weights.shape[0]
    return [torch.empty_like(x).copy_(c[k]) for k in range(count) for x, c in zip(likes, columns, strict=True)]


def pcgrad_coefficients(gram: Tensor, order: Tensor, include_self: bool = False) -> Tensor:
    """Projection coefficients of PCGrad (Yu et al. 2020, Algorithm 1) from the Gram matrix alone.

    Row i starts as e_i. For each j in `order[i]`: d = c_i . M[:, j]; if d < 0: c_i[j] -= d / M[j, j].
    All rows advance together, step by step: they don't see each other.
    """
    m = gram.to(torch.float64)
    num_tasks = m.shape[0]
    c = torch.eye(num_tasks, dtype=torch.float64, device=m.device)
    bad = torch.zeros(num_tasks, dtype=torch.bool, device=m.device)
    rows = torch.arange(num_tasks, device=m.device)
    for step in range(order.shape[1]):
        j = order[:, step].to(m.device, torch.int64)
        visit = torch.ones_like(bad) if include_self else j != rows
        # out of range: seen by the caller on the CPU; on a GPU it must neither be read nor pass unseen
        bad = bad | (j < 0) | (j >= num_tasks)
        j = j.clamp(0, num_tasks - 1)
        # only columns that the row uses are met: 0 * NaN must not leak from a task never visited
        terms = torch.where(c != 0, c * m[:, j].mT, torch.zeros_like(c))
        d = terms.sum(1)
        norm = m[j, j]
        bad = bad | (visit & ~(torch.isfinite(d) & torch.isfinite(norm)))
        hit = visit & (d < 0) & (norm != 0)
        delta = torch.where(hit, d / torch.where(hit, norm, torch.ones_like(norm)), torch.zeros_like(d))
        c = c - torch.nn.functional.one_hot(j, num_tasks).to(c.dtype) * delta[:, None]
    return torch.where(bad[:, None], torch.full_like(c, torch.nan), c)


def pcgrad(grads: Tensor, order: Tensor, reduction: str = "sum", include_self: bool = False) -> Tensor:
    """The PCGrad update, `[T, P] -> [P]`: the sum or the mean of the projected gradients."""
    c = pcgrad_coefficients(gram(grads), order, include_self)
    return combine(c.sum(0) if reduction == "sum" else c.mean(0), grads)


def pcgrad_project(grads: Tensor, order: Tensor, include_self: bool = False) -> Tensor:
    """Every projected gradient, `[T, P] -> [T, P]`."""
    return combine(pcgrad_coefficients(gram(grads), order, include_self), grads)


def pcgrad_loop(grads: Tensor, order: Tensor, include_self: bool = False) -> Tensor:
    """Algorithm 1 of the paper, word for word, on the vectors themselves: `[T, P] -> [T, P]`.

    The check on the oracle: `pcgrad_project` must equal it.
    """
    projected = []
    for i, visits in enumerate(order.tolist()):
        g = grads[i].clone()
        for j in visits:
            if j == i and not include_self:
                continue
            d = torch.dot(g, grads[j])
            norm = torch.dot(grads[j], grads[j])
            if d < 0 and norm != 0:
                g = g - d / norm * grads[j]
        projected.append(g)
    return torch.stack(projected)


def pcgrad_weights(
    gram: Tensor, order: Tensor | None, key: int, state: Tensor | None, include_self: bool, reduction: str
) -> Tensor:
    """The weights `[T]` of the sum or mean of the projected gradients."""
    if order is None:
        order = drawn_order(Draw(key, state), gram.shape[0], gram.device)
    c = pcgrad_coefficients(gram, order, include_self)
    return getattr(c, reduction)(0)


def pcgrad_coefficients_backward(grad: Tensor, gram: Tensor, order: Tensor, include_self: bool) -> Tensor:
    """Gradient of `pcgrad_coefficients` with respect to the Gram matrix: the steps of each row, undone in turn."""
    m = gram.to(torch.float64)
    num_tasks = m.shape[0]
    grad_gram = torch.zeros_like(m, memory_format=torch.contiguous_format)
    order = order.to(m.device, torch.int64)
    for i in range(num_tasks):
        c = torch.eye(num_tasks, dtype=torch.float64, device=m.device)[i]
        steps = []  # (j, d, row before the step)
        for j in order[i].tolist():
            if j == i and not include_self:
                continue
            d = c @ m[:, j]
            if d < 0 and m[j, j] != 0:
                steps.append((j, d, c))
                c = c.clone()
                c[j] -= d / m[j, j]
        grad_c = grad[i].to(torch.float64).clone()
        for j, d, before in reversed(steps):
            grad_d = -grad_c[j] / m[j, j]
            grad_gram[j, j] += grad_c[j] * d / m[j, j] ** 2
            grad_gram[:, j] += grad_d * before
            grad_c += grad_d * m[:, j]
    return grad_gram.to(gram.dtype)


def pcgrad_list(
    tensors: Sequence[Tensor],
    index: Sequence[int],
    num_tasks: int,
    num_params: int,
    order: Tensor,
    reduction: str = "sum",
    include_self: bool = False,
) -> list[Tensor]:
    """`pcgrad` of T lists: n' tensors, n' counts the present parameters."""
    c = pcgrad_coefficients(gram_list(tensors, index, num_tasks, num_params), order, include_self)
    return combine_list(c.sum(0) if reduction == "sum" else c.mean(0), tensors, index, num_params)


def pcgrad_project_list(
    tensors: Sequence[Tensor],
    index: Sequence[int],
    num_tasks: int,
    num_params: int,
    order: Tensor,
    include_self: bool = False,
) -> list[Tensor]:
    """`pcgrad_project` of T lists: T n' tensors."""
    c = pcgrad_coefficients(gram_list(tensors, index, num_tasks, num_params), order, include_self)
    return combine_list(c, tensors, index, num_params)
