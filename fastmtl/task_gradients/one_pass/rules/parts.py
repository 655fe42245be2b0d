"""Functions that join tensors to one, or cut one into several: cat and stack, split and unbind."""

from __future__ import annotations

from fastmtl.task_gradients.one_pass.rules.agreement import input_axis, joined
from fastmtl.task_gradients.one_pass.rules.indexing import sliced
from fastmtl.task_gradients.one_pass.rules.owners import in_row, stacked_rows
from fastmtl.task_gradients.one_pass.sample_axis import Axes, PerSample, SampleAxis, Unknown
from fastmtl.task_gradients.one_pass.task_ids import TaskIds
from fastmtl.task_gradients.one_pass.torch_call import Rule, TorchCall, dims_of


def _cat(call: TorchCall) -> Axes:
    out = call.out
    parts = list(call.argument(0, "tensors"))
    if call.name != "vstack":  # which makes rows of 1-D tensors; cat skips empty ones
        parts = [x for x in parts if x.dim() == out.dim()]
    dim = {"hstack": min(1, out.dim() - 1), "vstack": 0, "dstack": 2}.get(call.name)
    if dim is None:
        dim = call.argument(1, "dim", call.kwargs.get("axis", 0))
    dim = dim % out.dim()
    found = joined(call, parts)
    if not isinstance(found, Unknown) and out.dim() - found.right != dim:
        return found.axis.at(out.dim() - found.right)
    known = [call.axis_of(x) for x in parts if x.dim() == out.dim()]
    axes = [axis for axis in known if isinstance(axis, PerSample) and axis.axis == dim]
    if len(axes) < len(parts):
        if isinstance(found, Unknown):
            return found
        return Unknown("cat along the axis of the samples with something that carries none")
    if any(axis.outer != 1 or axis.inner != axes[0].inner for axis in axes):
        return Unknown("cat along an axis of samples that are merged with another dimension")
    return PerSample(dim, TaskIds.join([axis.task_ids for axis in axes]), 1, axes[0].inner)


def _stack(call: TorchCall) -> Axes:
    parts, out = list(call.argument(0, "tensors")), call.out
    found = joined(call, parts)
    if isinstance(found, Unknown):
        return stacked_rows(call) or found
    dim = call.argument(1, "dim", 0)
    dim = dim + out.dim() if dim < 0 else dim
    before = parts[0].dim() - found.right
    return found.axis.at(before + (dim <= before))


def _split(call: TorchCall) -> Axes:
    """split, chunk, tensor_split, unbind."""
    x, axis = call.args[0], input_axis(call)
    if isinstance(axis, Unknown):
        return axis
    dim = call.argument(1 if call.name == "unbind" else 2, "dim", 0)
    dim = dims_of(x, dim)[0]
    if call.name == "unbind":
        if dim == axis.axis:
            if not axis.task_ids.on_host() or axis.task_ids.partial or not call.out or not call.out[0].requires_grad:
                return Unknown("unbind takes the axis of the samples apart")
            rows = axis.positions().tolist()
            return [in_row(part, row, axis.task_ids.num_rows) for part, row in zip(call.out, rows, strict=True)]
        return axis.at(axis.axis - (dim < axis.axis))
    if dim != axis.axis:
        return axis
    found: list[SampleAxis] = []
    start = 0
    for piece in call.out:
        found.append(sliced(axis, slice(start, start + piece.shape[dim], 1), x.shape[dim]))
        start += piece.shape[dim]
    return found


RULES: dict[str, Rule] = {
    **dict.fromkeys(("cat", "hstack", "vstack"), _cat),
    "stack": _stack,
    **dict.fromkeys(("split", "chunk", "tensor_split", "split_with_sizes", "unbind"), _split),
}
