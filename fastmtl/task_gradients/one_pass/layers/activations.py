"""Activations with parameters of their own: prelu."""

from __future__ import annotations

import torch

from fastmtl.task_gradients.one_pass.layers.protocol import (
    Followed,
    Layer,
    LayerTracker,
    Unproven,
    follow_one,
    sample_axis,
)
from fastmtl.task_gradients.one_pass.torch_call import TorchCall


def _prelu(tracker: LayerTracker, call: TorchCall) -> Followed:
    x, w = call.argument(0, "input"), call.argument(1, "weight")
    axis = sample_axis(tracker, x)
    if w.numel() > 1:
        if axis.axis != 0:
            raise Unproven("prelu with samples along another axis than the first")
        w, _ = follow_one(tracker, torch.Tensor.reshape, w, (-1, *(1,) * (x.dim() - 2)))
    below, found = follow_one(tracker, torch.mul, x, w)
    return torch.where(x > 0, x, below), found


LAYERS: dict[str, Layer] = {"prelu": _prelu}
