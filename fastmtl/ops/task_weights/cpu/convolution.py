"""torch's own convolution, as the segments call it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.core.task_weights import Geometry
from fastmtl.core.tensors import memory_format


def plain_strides(w: Tensor) -> Tensor:
    """w without gaps, its dimensions of size 1 with the strides that torch itself would give them: oneDNN misreads
    others."""
    if not any(w.is_contiguous(memory_format=fmt) for fmt in (torch.contiguous_format, torch.channels_last)):
        w = w.contiguous(memory_format=memory_format(w))
    for fmt in (memory_format(w), torch.channels_last):
        if w.is_contiguous(memory_format=fmt):
            return w.as_strided(w.shape, torch.empty(w.shape, device="meta", memory_format=fmt).stride())
    return w


def convolution_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, want_x: bool, want_weight: bool
) -> tuple[Tensor, Tensor]:
    found = torch.ops.aten.convolution_backward(
        grad_out,
        x,
        weight,
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        False,
        (0, 0),
        geometry.groups,
        (want_x, want_weight, False),
    )
    return found[0], found[1]
