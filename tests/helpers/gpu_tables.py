"""Tables of a card that say the same everywhere, as if `fastmtl tune` had measured them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

from fastmtl.tuning import gpu
from fastmtl.tuning.gpu import GpuTable
from fastmtl.tuning.table import Shape


@contextlib.contextmanager
def fastest_everywhere(backend: str) -> Iterator[GpuTable]:
    """Inside the block every card has a measured table of which `backend` is the first choice."""
    entries = {product: {name: {Shape(1, 1): (backend,)} for name in gpu.KEYS} for product in gpu.PRODUCTS}
    table = GpuTable("a card", "measured", entries)
    gpu._order.cache_clear()
    try:
        with mock.patch.object(gpu, "current", lambda device: table):
            yield table
    finally:
        gpu._order.cache_clear()
