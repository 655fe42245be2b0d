"""Memory for results: large ones ask for huge pages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl.core.schemas import define_kernel
from fastmtl.core.tensors import like_stacked, memory_format

_advise_huge_pages = define_kernel("_advise_huge_pages(Tensor(a!) x) -> ()")

# results from this size on ask for huge pages
HUGE_BYTES = 4 << 20


def _advised(x: Tensor) -> Tensor:
    if x.nbytes >= HUGE_BYTES:
        _advise_huge_pages(x)
    return x


def fresh_like(x: Tensor) -> Tensor:
    """Memory for a result in the shape, dtype and memory order of x."""
    return _advised(torch.empty_like(x, requires_grad=False))


def fresh(shape: Sequence[int], like: Tensor) -> Tensor:
    """Memory for a result like x."""
    return _advised(torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format(like)))


def fresh_stack(delta: Tensor) -> Tensor:
    """Memory for the gradient of a `[T, ...]` delta, contiguous."""
    return _advised(like_stacked(delta))


def fresh_rows(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory for rows, contiguous."""
    return _advised(torch.empty(shape, dtype=dtype, device="cpu"))
