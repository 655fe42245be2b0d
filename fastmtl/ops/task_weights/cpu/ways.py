"""Which way each segment of a call takes, by the table of this machine (docs/kernels/tuning.md)."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from fastmtl.core import dispatch
from fastmtl.tuning.processor import PAIRS
from fastmtl.tuning.search import current
from fastmtl.tuning.table import PRODUCTS, Limits, Shape, key

# the direct product of `direct.py`; torch's product of matrices; torch's convolution
Way = Literal["direct", "matmul", "convolution"]
# the limits that hold in a dtype: those of float64 are nobody's, and it is always torch's convolution
_NEVER = Limits(0, 0)
# a segment beyond the direct product's limit, beside others that are not, may have so many times as many rows
BESIDE_OTHERS = 3
# where a filter of several pixels skips some, weight gradients are made directly of so many times as many rows: oneDNN
# takes longer for them, and no table was measured with a stride
_OF_STRIDES = 2
# rows of a segment of 16 bits that is widened to float32, which torch's own products of 16 bits are not
_MOST_WIDENED = 28


def in_pairs(dtype: torch.dtype) -> bool:
    """Whether the direct product multiplies samples of this dtype in pairs, as they are, in place of widening them."""
    return dtype == torch.bfloat16 and dispatch.extension is not None and dispatch.extension.multiplies_pairs()


_watched: Counter[tuple[str, str]] | None = None


@contextlib.contextmanager
def watching() -> Iterator[Counter[tuple[str, str]]]:
    """Counts which way how many segments take inside the block, by product and way; for reports."""
    global _watched
    before, _watched = _watched, Counter()
    try:
        yield _watched
    finally:
        _watched = before


def watched() -> bool:
    """Whether somebody counts: calls past the op take the same ways, and tell nobody."""
    return _watched is not None


def note(product: str, way: Way) -> None:
    """A segment takes a way."""
    if _watched is not None:
        _watched[product, way] += 1


def _higher(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else max(one, other)


def _at_most(limit: int | None) -> int:
    return _MOST_WIDENED if limit is None else min(limit, _MOST_WIDENED)


class Ways:
    """The limits of one call: x and the gradient of the output lie alike, so that they hold for all its products.

    `weight`: the shape of one, a matrix `[Cout, Cin]` or filters. `matrix`: the filters are pixelwise, of one group,
    and all rows of a cut lie side by side, so that a product of matrices is the same. Filters of one pixel that skip
    pixels (a stride) are no such product, and were not measured: oneDNN is slow with them, so that they have the higher
    one of the direct product's limits of matrices and of larger filters. `strided`: the filter skips pixels.
    """

    def __init__(
        self, dtype: torch.dtype, weight: torch.Size, matrix: bool, channels_last: bool, strided: bool = False
    ) -> None:
        kind = "contiguous" if not channels_last else "pixelwise" if weight[2:].numel() == 1 else "channels_last"
        self._matrix = matrix
        self._exact = False  # no segment may have more rows than its limit says
        table = current()
        limits = table.limits
        if dtype == torch.float64:
            self._of = dict.fromkeys(limits, _NEVER)
            return
        name = key(kind, "float32" if dtype == torch.float32 else "bfloat16")
        shape = Shape(max(weight[1:].numel(), 1), max(weight[0], 1))
        self._of = {product: entries[name].nearest(shape) for product, entries in limits.items()}
        if kind == "pixelwise" and not matrix:
            other = name.replace(kind, "channels_last")
            self._of = {
                p: limit._replace(direct=_higher(limit.direct, limits[p][other].nearest(shape).direct))
                for p, limit in self._of.items()
            }
        elif kind != "pixelwise" and strided:
            limit = self._of["weight_gradient"]
            most = None if limit.direct is None else _OF_STRIDES * limit.direct
            self._of["weight_gradient"] = limit._replace(direct=most)
        if dtype.itemsize == 2 and not in_pairs(dtype) and table.origin.get("level", "").endswith(PAIRS):
            # measured with products in pairs, and these are float32's, beside torch's of 16 bits
            self._exact = True
            self._of = {p: limit._replace(direct=_at_most(limit.direct)) for p, limit in self._of.items()}

    def beside_others(self, rows: Sequence[int]) -> None:
        """The segments of the call have so many rows: what most of them take, the others take with somewhat more.

        A single call of torch's beside the direct product's finds its scratch weight, and oneDNN's copy of it, in no
        cache, where calls that follow each other share them, as they did when the limits were measured.
        """
        if self._exact:
            return
        for product, limits in self._of.items():
            most = limits.direct
            if most and 2 * sum(n <= most for n in rows) > len(rows):
                self._of[product] = limits._replace(direct=BESIDE_OTHERS * most)

    def takes_direct(self, product: str, rows: int) -> bool:
        """Whether a segment is for the direct product, if that serves it."""
        limit = self._of[product].direct
        return limit is None or rows <= limit

    def direct_limits(self) -> tuple[int, int, int]:
        """The most rows of a segment for which it makes y, dx and weight gradients; -1: however many."""
        y, dx, dw = (-1 if self._of[product].direct is None else self._of[product].direct for product in PRODUCTS)
        return y, dx, dw

    def of_torch(self, product: str, rows: int) -> Way:
        """Which of torch's own ways a segment takes otherwise."""
        if not self._matrix:
            return "convolution"
        limit = self._of[product].matmul
        return "matmul" if limit is None or rows <= limit else "convolution"


def as_matrix(pictures: Tensor) -> Tensor:
    """`[rows, C]`, a view of pictures whose channels lie side by side and which have no gaps."""
    return pictures.permute(0, 2, 3, 1).reshape(-1, pictures.shape[1])


def as_weight(filters: Tensor) -> Tensor:
    """`[Cout, Cin]`, a view of filters of one pixel."""
    return filters.flatten(1)
