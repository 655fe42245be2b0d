"""What dtypes, strides and memory formats say of a tensor, and new memory with the same."""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# the types of tensors whose memory is their own: no subclass that must see the ops called
PLAIN = frozenset({Tensor, torch.nn.Parameter})
# in a Gram matrix each of these counts as two real numbers
COMPLEX_DTYPES = (torch.complex128, torch.complex64)


def as_real(x: Tensor) -> Tensor:
    """The real numbers of a complex tensor, two along a new last dimension, in the same memory; others as they are."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def is_dense(x: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlaps, in some order of the dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1):
        if stride != expected:
            return x.numel() == 0
        expected *= size
    return True


def is_channels_last(x: Tensor) -> bool:
    """Whether the strides of a 4-D tensor say channels_last; NCHW where they would fit both."""
    if x.dim() != 4 or x.numel() == 0:
        return False
    (_, c, h, w), (of_sample, of_channel, of_row, of_pixel) = x.shape, x.stride()
    # from the innermost dimension to the outermost; of a single channel and pixel both fit
    falls = of_pixel < of_channel * c or of_row < of_pixel * w or of_sample < of_row * h
    return not (falls or of_channel == 0 or of_row * h == of_channel)


def has_rows(x: Tensor) -> bool | None:
    """Whether the channels of a pixel of `[N, C, ...]` lie side by side; False: pixels of a channel; None: neither."""
    if x.movedim(1, -1).is_contiguous():
        return True
    return False if x.is_contiguous() else None


def laid_out(x: Tensor, rows: bool) -> Tensor:
    """x with the channels of a pixel side by side, or the pixels of a channel; a copy where it lies otherwise."""
    if has_rows(x) == rows:
        return x
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if rows else x.contiguous()


def memory_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def like_parameter(p: Tensor) -> Tensor:
    """An empty gradient in the dtype and memory order of a weight, as autograd's own are."""
    if p.dim() == 4:
        return torch.empty(p.shape, dtype=p.dtype, device=p.device, memory_format=memory_format(p))
    return torch.empty(p.shape, dtype=p.dtype, device=p.device)


def like_stacked(delta: Tensor) -> Tensor:
    """An empty gradient of a `[T, ...]` delta, contiguous."""
    return torch.empty(delta.shape, dtype=delta.dtype, device=delta.device)
