"""Convolutions in one, two and three dimensions, and their transposes."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from fastmtl.ops.task_weights.precision import cast_by_autocast
from fastmtl.task_gradients.one_pass.autograd.conv import ConvByTask
from fastmtl.task_gradients.one_pass.layers.protocol import (
    Followed,
    Layer,
    LayerTracker,
    Unproven,
    sample_axis,
    weight_of,
)
from fastmtl.task_gradients.one_pass.torch_call import TorchCall

_DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "output_padding": 0}


def _conv(tracker: LayerTracker, call: TorchCall) -> Followed:
    transposed = call.name.startswith("conv_transpose")
    dims = int(call.name[-2])
    names = ["input", "weight", "bias", "stride", "padding"]
    names += ["output_padding", "groups", "dilation"] if transposed else ["dilation", "groups"]
    given = {n: call.argument(k, n, _DEFAULTS.get(n)) for k, n in enumerate(names)}
    x, w, b = given["input"], given["weight"], given["bias"]
    axis = sample_axis(tracker, x)
    if axis.axis != 0 or x.dim() != dims + 2:
        raise Unproven(f"samples along axis {axis.axis} of an input of {x.dim()} dimensions, where they must be first")

    if x.is_complex() or w.is_complex():
        raise Unproven("complex numbers in a convolution")

    def many(value: Any) -> list[int]:
        values = [value] if isinstance(value, int) else list(value)
        return values * dims if len(values) == 1 else values

    stride, dilation = many(given["stride"]), many(given["dilation"])
    padding = given["padding"]
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, w.shape[2:], strict=True)]
        padding = [t // 2 for t in total]
        if any(t % 2 for t in total):
            x = F.pad(x, [v for t in reversed(total) for v in (0, t % 2)])
    output_padding = many(given.get("output_padding", 0))
    plan = axis.task_ids.plan(axis.outer, axis.inner)
    weight, bias = tracker.weight(w), weight_of(tracker, b)
    value, offset = cast_by_autocast(weight.tensor()), None if b is None else cast_by_autocast(bias.tensor())
    if value.dtype != weight.tensor().dtype or x.dtype != value.dtype:
        x = cast_by_autocast(x)
    y = ConvByTask.apply(
        x, value, offset, *plan, stride, many(padding), dilation, transposed, output_padding, given["groups"],
        weight.form, bias.form, *weight.targets, *bias.targets,
    )  # fmt: skip
    return y, axis


LAYERS: dict[str, Layer] = dict.fromkeys([f"conv{t}{k}d" for t in ("", "_transpose") for k in (1, 2, 3)], _conv)
