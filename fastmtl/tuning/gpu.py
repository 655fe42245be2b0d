"""Whether CUDA C++ or Triton makes a layer with per-task weights, by shape of its weight: a table for each card.

What no card has measured yet is a *model*: `MODEL` says which, and why. docs/kernels/tuning.md explains both.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fastmtl.tuning.table import Shape

PRODUCTS = ("forward", "backward", "weight_grad")
# one pixel to one pixel, or several
KINDS = ("pixelwise", "filter")
# float16 counts as bfloat16
DTYPES = ("float32", "bfloat16")
BACKENDS = ("cuda", "triton")


class GpuTable(NamedTuple):
    """`fastest`: product -> kind and dtype -> backend by shape of the weight. `source`: `"measured"` or `"model"`."""

    card: str
    source: str
    fastest: Mapping[str, Mapping[str, Mapping[Shape, str]]]

    def nearest(self, product: str, kind: str, dtype: str, shape: Shape) -> str:
        """What was the fastest for the nearest shape; of two that are as near, of the first."""
        entries = self.fastest[product][f"{kind} {dtype}"]
        return entries[min(entries, key=shape.distance)]


def _uniform(backend: str) -> dict[str, dict[str, dict[Shape, str]]]:
    return {
        product: {f"{kind} {dtype}": {Shape(1, 1): backend} for kind in KINDS for dtype in DTYPES}
        for product in PRODUCTS
    }


# Triton's kernels have been tested and measured on a GPU, CUDA C++'s have not: they wait for that, and are asked where
# they are forced or Triton declines.
MODEL = GpuTable("any", "model", _uniform("triton"))


def current(device: torch.device) -> GpuTable:
    """The table of a card."""
    return MODEL


def order(product: str, x: Tensor, shape: torch.Size) -> tuple[str, ...]:
    """The backends, the fastest first, for x and a weight `[Cout, Cin, ...]`."""
    return _order(product, x.device, x.dtype, shape)


@functools.lru_cache(4096)
def _order(product: str, device: torch.device, dtype: torch.dtype, shape: torch.Size) -> tuple[str, ...]:
    kind = "pixelwise" if shape[2:].numel() == 1 else "filter"
    name = "float32" if dtype == torch.float32 else "bfloat16"
    weight = Shape(max(1, shape[1:].numel()), max(1, shape[0]))
    first = current(device).nearest(product, kind, name, weight)
    return (first, *(other for other in BACKENDS if other != first))
