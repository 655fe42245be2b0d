"""Parameters that are written into samples: `x[mask] = parameter`."""

from __future__ import annotations

from torch import Tensor

from fastmtl.task_gradients.one_pass.layers.broadcast import lift
from fastmtl.task_gradients.one_pass.layers.one_row import in_row_of
from fastmtl.task_gradients.one_pass.layers.protocol import (
    Followed,
    Layer,
    LayerTracker,
    Unproven,
    from_parameters,
)
from fastmtl.task_gradients.one_pass.rules.indexing import getitem
from fastmtl.task_gradients.one_pass.sample_axis import Constant, PerSample, SampleSum, reason
from fastmtl.task_gradients.one_pass.tensors import nested
from fastmtl.task_gradients.one_pass.torch_call import TorchCall


def _setitem(tracker: LayerTracker, call: TorchCall) -> Followed:
    """Every place that is written gets its own copy of the parameter, which belongs to the sample of that place."""
    x, index, value = call.args
    if not from_parameters(tracker, value) or any(from_parameters(tracker, y) for y in (x, *nested(index))):
        raise Unproven("samples written into a parameter")
    axis = tracker.axis_of(x)
    if isinstance(axis, Constant) and isinstance(index, Tensor):
        axis = _by_mask(tracker, x, index) or axis
    if not isinstance(axis, PerSample):
        raise Unproven(reason(axis) or "it is written into a constant")
    tracker.mark(x, axis)
    if tracker.axis_of(x) != axis:
        raise Unproven("it is written into a tensor of the model")
    picked = x.detach()[index].requires_grad_()
    place = getitem(TorchCall("getitem", Tensor.__getitem__, (x, index), {}, tracker.axis_of, picked))
    assert not isinstance(place, list)
    if isinstance(place, SampleSum) and place.row is not None:  # a single number of a single sample
        lifted = in_row_of(tracker, value, place.row, place.num_rows)
    elif not isinstance(place, PerSample):
        raise Unproven(reason(place) or "it is written into several samples at once")
    elif value.dim() > picked.dim():
        raise Unproven("a parameter of more dimensions than the place where it is written")
    else:
        lifted = lift(tracker, value, picked.dim() - place.axis, place)
    tracker.run(call.func, (x, index, lifted), call.kwargs)
    return None, axis


def _by_mask(tracker: LayerTracker, x: Tensor, mask: Tensor) -> PerSample | None:
    """Of a constant, by a mask that carries samples: each sample's part is what its part of the mask tells of."""
    axis = tracker.axis_of(mask)
    return axis if isinstance(axis, PerSample) and mask.shape == x.shape[: mask.dim()] else None


LAYERS: dict[str, Layer] = {"setitem": _setitem}
