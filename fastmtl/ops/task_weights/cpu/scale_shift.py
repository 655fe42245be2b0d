"""`task_scale_shift` on the CPU, as plain torch calls with sums in at least float32."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


def _table_rows(table: Tensor, task_ids: Tensor, dims: int, dtype: torch.dtype) -> Tensor:
    rows = table.detach().index_select(0, task_ids).to(dtype)
    return rows.reshape(*rows.shape, *[1] * (dims - 2))


def _promoted(*tensors: Tensor) -> torch.dtype:
    return functools.reduce(torch.promote_types, [x.dtype for x in tensors], torch.float32)


def scale_shift(x: Tensor, scale: Tensor, shift: Tensor, task_ids: Tensor) -> Tensor:
    """`task_scale_shift`; see there."""
    promoted = _promoted(x, scale, shift)
    a, b = (_table_rows(table, task_ids, x.dim(), promoted) for table in (scale, shift))
    return torch.addcmul(b, x.detach(), a, out=torch.empty_like(x, requires_grad=False))


def scale_shift_backward(
    grad_out: Tensor, x: Tensor, scale: Tensor, shift: Tensor, task_ids: Tensor, wanted: Sequence[bool]
) -> list[Tensor]:
    """`task_scale_shift_backward`; see there."""
    promoted = _promoted(x, scale, shift)
    axes = list(range(2, x.dim()))
    out = []
    if wanted[0]:
        rows = _table_rows(scale, task_ids, x.dim(), promoted)
        out.append(torch.mul(grad_out, rows, out=torch.empty_like(x, requires_grad=False)))

    def by_task(each: Tensor, like: Tensor) -> Tensor:
        total = torch.zeros(like.shape, dtype=promoted)
        return total.index_add_(0, task_ids, each.to(promoted)).to(like.dtype)

    if wanted[1]:
        product = grad_out.to(promoted) * x.detach().to(promoted)
        out.append(by_task(product.sum(axes) if axes else product, scale))
    if wanted[2]:
        out.append(by_task(grad_out.sum(axes, dtype=promoted) if axes else grad_out, shift))
    return out
