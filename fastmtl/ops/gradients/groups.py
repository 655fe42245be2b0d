"""Gram matrices and weighted sums of L groups of parameters, each group apart: one read of G each, in one call.

No public ops: a surgery with `groups=` calls them, with gradients that are known to be right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmtl.core.dispatch import choose, triton_kernels
from fastmtl.core.gradient_rows import GradientRows, accumulate_dtype, present_params
from fastmtl.core.schemas import define_kernel, without_autocast
from fastmtl.ops.gradients import reference
from fastmtl.ops.gradients.combine import kernel_weights, mark_written

# groups: of each of the n parameters, from 0 to L - 1
_gram_kernel = define_kernel(
    "_gram_groups(Tensor[] tensors, int[] index, int num_tasks, int num_params, int[] groups, Tensor(a!) out) -> ()"
)
_combine_kernel = define_kernel(
    "_combine_groups(Tensor weights, Tensor[] tensors, int[] index, int num_params, int[] groups, Tensor(a!)[] out) "
    "-> ()"
)


class Grouped(NamedTuple):
    """T gradient rows of n parameters in L groups."""

    rows: GradientRows
    groups: Sequence[int]  # of each parameter
    count: int  # L

    def split(self) -> list[GradientRows]:
        """The rows of each group."""
        n = self.rows.num_params
        members: list[list[int]] = [[] for _ in range(self.count)]
        for i, group in enumerate(self.groups):
            members[group].append(i)
        place = {i: k for part in members for k, i in enumerate(part)}
        parts = [GradientRows([], [], self.rows.num_tasks, len(part)) for part in members]
        for x, position in zip(self.rows.tensors, self.rows.index, strict=True):
            task, i = divmod(position, n)
            part = parts[self.groups[i]]
            part.tensors.append(x)
            part.index.append(task * part.num_params + place[i])
        return parts


def _by_group(gram: Callable[[GradientRows, Tensor], None]) -> Callable[[Grouped, Tensor], None]:
    """One call for each group, for backends whose kernels take one."""

    def call(grouped: Grouped, out: Tensor) -> None:
        for rows, m in zip(grouped.split(), out.unbind(0), strict=True):
            gram(rows, m) if rows.tensors else m.zero_()

    return call


def _gram_compiled(grouped: Grouped, out: Tensor) -> None:
    _gram_kernel(*grouped.rows, grouped.groups, out)


def _gram_triton(rows: GradientRows, out: Tensor) -> None:
    dtype = accumulate_dtype([x.dtype for x in rows.tensors])
    m = torch.empty_like(out, dtype=dtype)
    triton_kernels("gradients.launchers").gram(rows, m)
    out.copy_(m)


def _gram_reference(rows: GradientRows, out: Tensor) -> None:
    out.copy_(reference.gram_list(*rows))


_GRAM = {
    "cpu": _gram_compiled,
    "cuda": _gram_compiled,
    "triton": _by_group(_gram_triton),
    "reference": _by_group(_gram_reference),
}


def gram_groups(grouped: Grouped, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`[L, T, T]` Gram matrices of the dtype given, float32 or float64: of each group as `gram` makes it, zeros where
    no task has a gradient. Not recorded for autograd."""
    num_tasks = grouped.rows.num_tasks
    out = torch.empty(grouped.count, num_tasks, num_tasks, dtype=dtype, device=device)
    with torch.no_grad(), without_autocast(device.type):
        choose("gram", device.type, _GRAM)(grouped, out)
    return out


def _combine_compiled(weights: Tensor, grouped: Grouped, out: Sequence[Tensor]) -> None:
    rows = grouped.rows
    _combine_kernel(kernel_weights(weights), rows.tensors, rows.index, rows.num_params, grouped.groups, out)


def _outputs(grouped: Grouped, out: Sequence[Tensor]) -> list[list[Tensor]]:
    """The outputs of each group: `out` has one for each parameter with a gradient, in order."""
    found: list[list[Tensor]] = [[] for _ in range(grouped.count)]
    for i, x in zip(present_params(grouped.rows.index, grouped.rows.num_params), out, strict=True):
        found[grouped.groups[i]].append(x)
    return found


def _combine_triton(weights: Tensor, grouped: Grouped, out: Sequence[Tensor]) -> None:
    w = kernel_weights(weights)
    for k, (rows, columns) in enumerate(zip(grouped.split(), _outputs(grouped, out), strict=True)):
        if columns:
            triton_kernels("gradients.launchers").combine(w[k : k + 1], rows, columns)


def _combine_reference(weights: Tensor, grouped: Grouped, out: Sequence[Tensor]) -> None:
    for w, rows, columns in zip(weights.unbind(0), grouped.split(), _outputs(grouped, out), strict=True):
        found = reference.combine_list(w, rows.tensors, rows.index, rows.num_params)
        for target, x in zip(columns, found, strict=True):
            target.copy_(x)


_COMBINE = {
    "cpu": _combine_compiled,
    "cuda": _combine_compiled,
    "triton": _combine_triton,
    "reference": _combine_reference,
}


def combine_groups_into(weights: Tensor, grouped: Grouped, out: Sequence[Tensor]) -> None:
    """`combine` of each group with its own weights `[L, T]`, into given memory: one tensor for each parameter with a
    gradient. Nothing is checked here."""
    with torch.no_grad(), without_autocast(weights.device.type):
        choose("combine", weights.device.type, _COMBINE)(weights, grouped, out)
    mark_written(out)
