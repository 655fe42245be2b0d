"""What the ops share that give one value for each column of T task gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmtl.core.gradient_rows import GradientRows, device_type_of, first_of_params
from fastmtl.core.schemas import without_autocast
from fastmtl.ops.gradients.arguments import Grads
from fastmtl.ops.gradients.combine import check_unrecorded, mark_written, read_out_bank, read_out_lists, with_absent


def empty_columns(tensors: Sequence[Tensor], index: Sequence[int], num_params: int) -> list[Tensor]:
    """Memory for one value a column: of a bank `[P]`, of lists a tensor for each parameter with a gradient."""
    if tensors and not index:
        return [tensors[0].new_empty(tensors[0].shape[1:])]
    return [torch.empty_like(x) for x in first_of_params(tensors, index, num_params).values()]


def into_columns(
    rows: GradientRows, out: Sequence[Tensor], write: Callable[[GradientRows, Sequence[Tensor]], Any]
) -> None:
    """`write(rows, out)` as every op writes into given memory. Nothing is checked here."""
    with torch.no_grad(), without_autocast(device_type_of(rows.tensors)):
        write(rows, out)
    mark_written(out)


def columns_of(
    grads: Grads,
    rows: GradientRows,
    out: Tensor | Sequence[Any] | None,
    make: Callable[[GradientRows], list[Tensor]],
    write: Callable[[GradientRows, Sequence[Tensor]], Any],
) -> Any:
    """The result in the form of the gradients: from `make(rows)`, or in `out`, checked, by `write(rows, targets)`."""
    if out is not None:
        targets = (
            read_out_lists([out], 1, rows) if rows.bank is None else read_out_bank(out, rows.bank.shape[1:], grads)
        )
        check_unrecorded(*rows.tensors, *targets)
        into_columns(rows, targets, write)
        return out
    with torch.no_grad():
        columns = make(rows)
    return columns[0] if rows.bank is not None else with_absent(columns, rows.index, rows.num_params)
