"""In which dtype the ops with per-task weights compute: autocast's, or float32 where 16-bit sums would be rounded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl.core.schemas import autocast_is_on
from fastmtl.core.task_weights import Geometry
from fastmtl.core.tensors import memory_format


def cast_by_autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype, where autocast is on; weights stay as they are and are cast while staged."""
    kind = x.device.type
    if not autocast_is_on(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind)) if x.is_floating_point() and x.dtype != torch.float64 else x


def _added_up_in_their_own_dtype() -> set[torch.dtype]:
    """The 16-bit dtypes of which torch's convolutions and matrix products on this CPU make sums in 16 bits.

    oneDNN adds up in float32, but takes a dtype only where the CPU has instructions for it. torch asks it the same
    questions; a torch without oneDNN cannot.
    """
    questions = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    answers = {dtype: getattr(torch.ops.mkldnn, name, lambda: False)() for dtype, name in questions.items()}
    return {dtype for dtype, served in answers.items() if not served}


# what `widen` widens on a CPU
WIDENED = _added_up_in_their_own_dtype()


def widen(x: Tensor, always: bool = False) -> Tensor:
    """x in a dtype of which torch makes sums in at least float32: x itself, or a copy in float32 in its memory format.

    What is computed from the copy is to be rounded to the dtype of x, once. `always`: a copy of all that is narrower.
    """
    if x.device.type != "cpu" or not (x.dtype in WIDENED or (always and x.dtype.itemsize < 4)):
        return x
    return x.to(torch.float32, memory_format=memory_format(x))


def is_misread(x: Tensor, geometry: Geometry, kernel: Sequence[int]) -> bool:
    """Whether oneDNN's weight gradient of these pictures takes what lies beside them in memory for numbers of theirs.

    It does so with bfloat16 (torch 2.13): with pictures that are narrower than the stride (16 channels and more), and
    with filters of more than 3 pixels a side of which some meet nothing but padding (128 channels and more). The result
    is then anything, NaN included. In float32 it is right.
    """
    if x.device.type != "cpu" or x.dtype != torch.bfloat16:
        return False
    if x.shape[-1] < geometry.stride[-1]:
        return True
    sides = zip(x.shape[-2:], kernel, geometry.output_size(x.shape[-2:], kernel), *geometry[:3], strict=True)
    return any(_meets_padding_alone(*side) for side in sides)


def _meets_padding_alone(size: int, kernel: int, out: int, stride: int, padding: int, dilation: int) -> bool:
    """Whether some place of a filter of more than 3 pixels lies outside the picture for every output pixel."""
    if kernel <= 3:
        return False
    for k in range(kernel):
        # the first output pixel for which this place lies at 0 or beyond, and where it lies then
        first = max(0, -((k * dilation - padding) // stride))
        if first >= out or first * stride - padding + k * dilation >= size:
            return True
    return False
