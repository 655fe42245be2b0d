"""Calls whose samples all belong to one task: whatever they do, the gradient of their parameters is that task's."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.task_gradients.one_pass.autograd.broadcast import ExpandByTask
from fastmtl.task_gradients.one_pass.layers.protocol import Followed, LayerTracker, from_parameters
from fastmtl.task_gradients.one_pass.rules.owners import in_row
from fastmtl.task_gradients.one_pass.rules.registry import axes_of_result
from fastmtl.task_gradients.one_pass.sample_axis import PerSample
from fastmtl.task_gradients.one_pass.tensors import replaced
from fastmtl.task_gradients.one_pass.torch_call import TorchCall
from fastmtl.task_gradients.one_pass.torch_names import writes


def of_one_row(tracker: LayerTracker, call: TorchCall) -> Followed | None:
    """The call as it is, with parameters that belong to that task; None: the samples are of several, nobody knows of
    which, or it writes into a tensor."""
    carried = [axis for axis in map(tracker.axis_of, call.tensors()) if isinstance(axis, PerSample)]
    rows = {axis.task_ids.single_row() for axis in carried}
    if len(rows) != 1 or None in rows or writes(call.func):
        return None
    (row,), num_rows = rows, carried[0].task_ids.num_rows

    def lifted(p: Tensor) -> Tensor:
        return in_row_of(tracker, p, row, num_rows) if from_parameters(tracker, p) else p

    args, kwargs = replaced(call.args, lifted), replaced(call.kwargs, lifted)
    out = tracker.run(call.func, args, kwargs)
    return out, axes_of_result(call._replace(args=args, kwargs=kwargs, out=out))


def in_row_of(tracker: LayerTracker, p: Tensor, row: int, num_rows: int) -> Tensor:
    """A parameter as one that belongs to a row of the bank."""
    ids = torch.full((1,), row, device=tracker.task_ids.ids.device)
    weight = tracker.weight(p).viewed(lambda v: v.unsqueeze(0))
    out = ExpandByTask.apply(weight.value, ids, 0, weight.form, num_rows, *weight.targets).squeeze(0)
    tracker.mark(out, in_row(out, row, num_rows))
    return out
