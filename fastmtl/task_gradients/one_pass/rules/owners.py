"""Results of which each element belongs to a task that the host knows, whatever samples it was computed from."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.task_gradients.one_pass.sample_axis import Constant, PerSample, SampleAxis, SampleSum
from fastmtl.task_gradients.one_pass.task_ids import TaskIds
from fastmtl.task_gradients.one_pass.torch_call import TorchCall


def along(values: Tensor, dims: int, axis: int) -> Tensor:
    """`[n]` as a tensor of `dims` dimensions that broadcasts along all but `axis`."""
    shape = [1] * dims
    shape[axis] = -1
    return values.reshape(shape)


def in_row(x: Tensor, row: int, num_rows: int) -> PerSample | SampleSum:
    """Of a tensor that belongs to one row of the bank as a whole: any of its axes will do."""
    if x.dim() == 0 or x.shape[0] == 0:
        return SampleSum(row, num_rows)
    return PerSample(0, TaskIds.of_row(row, x.shape[0], num_rows))


def axis_of_owners(owners: Tensor, num_rows: int) -> PerSample | None:
    """The axis along which each position belongs to one row of the bank, if there is one.

    Args:
        owners: the row that each element belongs to, or -1: to none, since it is constant.
    """
    for axis in range(owners.dim()):
        by_position = owners.movedim(axis, 0).reshape(owners.shape[axis], -1)
        if by_position.numel() == 0:
            return None
        rows = by_position.amax(1)
        if bool(((by_position == rows[:, None]) | (by_position < 0)).all()) and bool((rows >= 0).any()):
            return PerSample(axis, TaskIds.of_rows(rows, num_rows))
    return None


def stacked_rows(call: TorchCall) -> PerSample | None:
    """A new dimension of parts that belong to one row of the bank each, or are constant; None: they don't."""
    parts = call.argument(0, "tensors")
    rows: list[int] = []
    num_rows = 0
    if torch.compiler.is_compiling() or isinstance(parts, Tensor):
        return None
    for x in parts:
        axis: SampleAxis = call.axis_of(x)
        row = None
        if isinstance(axis, Constant):
            row = -1
        elif isinstance(axis, SampleSum):
            row = axis.row
            num_rows = axis.num_rows or num_rows
        elif isinstance(axis, PerSample):
            row, num_rows = axis.task_ids.single_row(), axis.task_ids.num_rows
        if row is None:
            return None
        rows.append(row)
    dim = call.argument(1, "dim", 0)
    dim = dim + call.out.dim() if dim < 0 else dim
    return PerSample(dim, TaskIds.of_rows(torch.tensor(rows), num_rows))
