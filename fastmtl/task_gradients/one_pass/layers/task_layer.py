"""`torch.ops.fastmtl.task_conv2d`, `task_linear` and `task_lora`: the weight and the bias that all tasks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmtl.task_gradients.one_pass.autograd.task_layer import SharedByTask
from fastmtl.task_gradients.one_pass.layers.embeddings import looked_up
from fastmtl.task_gradients.one_pass.layers.protocol import (
    Followed,
    Layer,
    LayerTracker,
    Unproven,
    carries_samples,
    first_sample_axis,
    from_parameters,
    weight_of,
)
from fastmtl.task_gradients.one_pass.sample_axis import PerSample
from fastmtl.task_gradients.one_pass.torch_call import TorchCall


def _task_layer(tracker: LayerTracker, call: TorchCall) -> Followed:
    """`W + s_t Delta_t`."""
    x, w, delta, delta_tasks, gate, b, order, offsets, *geometry = call.args

    def run(weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return call.func(x, weight, delta, delta_tasks, gate, bias, order, offsets, *geometry)

    return _shared(tracker, run, x, w, b, (*delta, gate), (order, offsets), tuple(geometry))


def _task_lora(tracker: LayerTracker, call: TorchCall) -> Followed:
    """`W + s_t B_t A_t`."""
    x, w, A, B, delta_tasks, scaling, b, order, offsets = call.args

    def run(weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return call.func(x, weight, A, B, delta_tasks, scaling, bias, order, offsets)

    return _shared(tracker, run, x, w, b, (*A, *B, scaling), (order, offsets))


def _shared(
    tracker: LayerTracker,
    run: Callable[[Tensor | None, Tensor | None], Tensor],
    x: Tensor,
    w: Tensor | None,
    b: Tensor | None,
    of_tasks: Sequence[Tensor | None],
    plan: tuple[Tensor, Tensor],
    geometry: tuple[Any, ...] = (),
) -> Followed:
    """The op runs as it is; only its shared weight and bias get rows, what is of single tasks keeps its own gradients.

    Args:
        run: the op, from the weight and bias that it is to see.
        x, w, b: what it was called with.
        of_tasks: the arguments that belong to single tasks.
        plan: order and offsets of the layer.
        geometry: of a convolution.
    """
    axis = first_sample_axis(tracker, x)
    if any(from_parameters(tracker, p) for p in of_tasks if p is not None):
        raise Unproven("what belongs to single tasks is in the bank")
    if any(carries_samples(tracker, p) and p.requires_grad and not p.is_leaf for p in of_tasks if p is not None):
        raise Unproven("what belongs to tasks was computed from samples")
    added = None
    if b is not None and b.dim() > 1 and from_parameters(tracker, b):
        added = _picked(tracker, b, axis, *plan)
        b = None
    weight, bias = weight_of(tracker, w), weight_of(tracker, b)
    y = run(*(p.value if p.value is None or not p.form else p.value.detach() for p in (weight, bias)))
    # of a parameter that is not in the bank, the op gives the gradient
    plain = (p.value if p.value is None or p.form else p.value.detach() for p in (weight, bias))
    y = SharedByTask.apply(
        y, x.detach(), *plain, *axis.task_ids.plan(axis.outer, axis.inner), geometry or None,
        weight.form, bias.form, *weight.targets, *bias.targets,
    )  # fmt: skip
    if added is not None:
        spread = (-1, added.shape[1], *(1,) * (y.dim() - 2)) if geometry else (len(y), *(1,) * (y.dim() - 2), -1)
        y = y + added.reshape(spread).to(y.dtype)
    return y, axis


def _picked(tracker: LayerTracker, bias: Tensor, axis: PerSample, order: Tensor, offsets: Tensor) -> Tensor:
    """Each sample's row of a bias per task that is computed from a shared one, by the plan of the layer."""
    task = torch.searchsorted(offsets[1:], torch.arange(len(order), device=order.device), right=True)
    index = torch.empty_like(order).scatter_(0, order, task)
    tracker.mark(index, axis)
    return looked_up(tracker, bias, index)[0]


LAYERS: dict[str, Layer] = {
    "task_conv2d.default": _task_layer,
    "task_linear.default": _task_layer,
    "task_lora.default": _task_lora,
}
