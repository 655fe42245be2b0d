"""`task_batch_norm` on the CPU, in C++: two passes over x forward, two over x and the gradient backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastmtl.core.dispatch import extension
from fastmtl.core.schemas import define_kernel
from fastmtl.core.task_weights import SortedBatch
from fastmtl.core.tensors import has_rows, laid_out
from fastmtl.ops.task_weights import reference
from fastmtl.ops.task_weights.cpu.memory import fresh_like
from fastmtl.ops.task_weights.reference import rows_of_tasks

_kernel = define_kernel(
    "_task_batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor order, Tensor offsets, bool rows, bool of_batch, "
    "float eps, Tensor(a!) mean, Tensor(b!) var, Tensor(c!) y) -> ()"
)
_backward_kernel = define_kernel(
    "_task_batch_norm_backward(Tensor grad_out, Tensor x, Tensor? weight, Tensor mean, Tensor var, Tensor order, "
    "Tensor offsets, bool rows, bool of_batch, float eps, bool sums_wanted, Tensor(a!)? grad_x, "
    "Tensor(b!) grad_weight, Tensor(c!) grad_bias) -> ()"
)
_update_kernel = define_kernel(
    "_task_batch_norm_update(Tensor mean, Tensor var, Tensor offsets, int values, float? momentum, "
    "Tensor(a!)[] running_mean, Tensor(b!)[] running_var, Tensor(c!)[] num_batches_tracked) -> ()"
)


def _table(params: Sequence[Tensor], num_tasks: int, dtype: torch.dtype) -> Tensor | None:
    table = rows_of_tasks(params, num_tasks, dtype)
    return None if table is None else table.detach().contiguous()


def batch_norm(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    mean: Sequence[Tensor],
    var: Sequence[Tensor],
    batch: SortedBatch,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`task_batch_norm`; see the reference."""
    x = x.detach()
    promoted = torch.promote_types(x.dtype, torch.float32)
    w, b, means, variances = (_table(p, batch.num_tasks, promoted) for p in (weight, bias, mean, var))
    of_batch = means is None or variances is None
    if means is None or variances is None:
        means, variances = (torch.zeros(batch.num_tasks, x.shape[1], dtype=promoted) for _ in "mv")
    else:
        # what the op returns lies in memory of its own
        means, variances = means.clone(), variances.clone()
    return normalised(x, w, b, means, variances, *_sorted(batch), of_batch, eps), means, variances


def normalised(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    order: Tensor,
    offsets: Tensor,
    of_batch: bool,
    eps: float,
) -> Tensor:
    """`(x - mean) / sqrt(var + eps) * weight + bias` of tables `[T, C]` in at least float32.

    With `of_batch` the statistics are those of the samples, and are written into `mean` and `var`.
    """
    y = fresh_like(x)
    if x.numel() == 0:
        return y
    rows = bool(has_rows(x))
    source = laid_out(x, rows)
    target = y if has_rows(y) == rows else torch.empty_like(source)
    _kernel(source, weight, bias, order, offsets, rows, of_batch, eps, mean, var, target)
    return y if target is y else y.copy_(target)


def given(
    x: Tensor,
    names: tuple[str, ...],
    weight: Mapping[str, Tensor | None] | None,
    bias: Mapping[str, Tensor | None] | None,
    mean: Mapping[str, Tensor | None],
    var: Mapping[str, Tensor | None],
    order: Tensor,
    offsets: Tensor,
    eps: float,
) -> Tensor | None:
    """The result alone, by given statistics, of tensors `[C]` by the tasks' names; None: `batch_norm` must do it.

    What belongs to tasks without samples is not read. Tensors that do not fit, and those that lie otherwise than the
    kernel reads them, are left to `batch_norm`. Needs the extension.
    """
    if x.is_neg():
        return None
    y = torch.empty_like(x)
    done = extension.task_batch_norm_given(x, y, names, weight, bias, mean, var, order, offsets, eps)
    return y if done else None


def _sorted(batch: SortedBatch) -> tuple[Tensor, Tensor]:
    return batch.order.contiguous(), batch.offsets.contiguous()


def batch_norm_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Sequence[Tensor],
    mean: Tensor,
    var: Tensor,
    batch: SortedBatch,
    of_batch: bool,
    eps: float,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """`task_batch_norm_backward`; see the reference."""
    weights = _table(weight, batch.num_tasks, mean.dtype)
    return gradients(
        grad_out.detach(), x.detach(), weights, mean.contiguous(), var.contiguous(), *_sorted(batch), of_batch, eps,
        wanted,
    )  # fmt: skip


def gradients(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    order: Tensor,
    offsets: Tensor,
    of_batch: bool,
    eps: float,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Of x, and as tables of weight and bias, those that are wanted; the arguments as in `normalised`."""
    grad_x = fresh_like(x) if wanted[0] else None
    tables = [torch.zeros(mean.shape, dtype=mean.dtype) for _ in "wb"]
    if x.numel():
        rows = bool(has_rows(x))
        source = laid_out(x, rows)
        target = grad_x
        if grad_x is not None and has_rows(grad_x) != rows:
            target = torch.empty_like(source)
        _backward_kernel(
            laid_out(grad_out, rows), source, weight, mean, var, order, offsets, rows, of_batch, eps,
            wanted[1] or wanted[2], target, *tables,
        )  # fmt: skip
        if grad_x is not None and target is not None and target is not grad_x:
            grad_x.copy_(target)
    return [y for y, want in zip((grad_x, *tables), wanted, strict=True) if y is not None and want]


def batch_norm_update(
    mean: Tensor,
    var: Tensor,
    offsets: Tensor,
    values: int,
    momentum: float | None,
    running_mean: Sequence[Tensor],
    running_var: Sequence[Tensor],
    num_batches_tracked: Sequence[Tensor],
) -> None:
    """`task_batch_norm_update`; see the reference, which serves statistics in 16 bits and those that are not dense."""
    held = (*running_mean, *running_var, *num_batches_tracked)
    plain = all(p.is_contiguous() and p.dtype in (mean.dtype, torch.int64) for p in held)
    run = _update_kernel if plain else reference.task_batch_norm_update
    run(
        mean.contiguous(), var.contiguous(), offsets.contiguous(), values, momentum, running_mean, running_var,
        num_batches_tracked,
    )  # fmt: skip
