"""A table of crossovers: what `fastmtl tune` measured on one processor, as a value and as a JSON file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from fastmtl.tuning.processor import Processor

SCHEMA = 1
# what is computed of a segment: y, dx, dW_eff
PRODUCTS = ("forward", "input_gradient", "weight_gradient")
# how: by the filter and by how pictures lie. A pixelwise filter on rows side by side is a plain matrix product
KINDS = ("pixelwise", "channels_last", "contiguous")
# in which dtype torch would be asked; float16 counts as bfloat16
DTYPES = ("float32", "bfloat16")
# by the numbers of one weight: fewer than so many, the last without end. What fits into a core's L2 cache, what fits
# into a few of them, and what does not
WEIGHTS: Mapping[str, float] = MappingProxyType({"small": 2**18, "medium": 2**20, "large": math.inf})
# no number of a table is greater: C++ counts rows in 64 bits, and products with it stay finite
MOST = 2**53


class Limits(NamedTuple):
    """Which way a segment takes, by its rows (output pixels): at most `direct` rows are multiplied by the direct
    product in C++, at most `matmul` by torch's matrix product, more by torch's convolution. None: however many."""

    direct: int | None
    matmul: int | None


class TableError(ValueError):
    """A file is no table that can be used here; the message says why."""


def size_of(numbers: int) -> str:
    """Which of `WEIGHTS` a weight of so many numbers is."""
    return next(name for name, end in WEIGHTS.items() if numbers < end)


def key(kind: str, dtype: str, size: str) -> str:
    """Of one entry of `Table.limits`."""
    return f"{kind} {dtype} {size}"


KEYS = tuple(key(kind, dtype, size) for kind in KINDS for dtype in DTYPES for size in WEIGHTS)


class Table(NamedTuple):
    """The numbers that the CPU's ops ask for.

    `limits`: product -> kind, dtype and size of the weight -> `Limits`. `call_bytes`: bytes that could be copied while
    torch and oneDNN prepare one more call. `weight_passes`: passes over the weight that such a call makes before it
    multiplies. `origin`: processor, versions, commit and date. `measured`: the times that the numbers were found from,
    for readers alone.
    """

    limits: Mapping[str, Mapping[str, Limits]]
    call_bytes: int
    weight_passes: float
    origin: Mapping[str, Any]
    measured: Mapping[str, Any]

    @property
    def processor(self) -> Processor:
        return Processor(*(self.origin[name] for name in Processor._fields))

    def to_json(self) -> str:
        """The file's text: readable, a line for each entry."""

        def lines(entries: Mapping[str, Any], depth: int) -> str:
            inner = ",\n".join(f"{'  ' * depth}{json.dumps(k)}: {json.dumps(v)}" for k, v in entries.items())
            return "{\n" + inner + "\n" + "  " * (depth - 1) + "}"

        limits = ",\n".join(
            f"    {json.dumps(product)}: " + lines({k: v._asdict() for k, v in entries.items()}, 3)
            for product, entries in self.limits.items()
        )
        parts = [
            f'  "schema": {SCHEMA}',
            f'  "origin": {lines(self.origin, 2)}',
            '  "limits": {\n' + limits + "\n  }",
            f'  "call_bytes": {self.call_bytes}',
            f'  "weight_passes": {self.weight_passes}',
            f'  "measured": {lines(self.measured, 2)}',
        ]
        return "{\n" + ",\n".join(parts) + "\n}\n"


def _limit(value: Any, where: str) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MOST):
        raise TableError(f"{where}: expected a number of rows or null, got {value!r}")
    return value


def _number(found: Mapping[str, Any], name: str) -> Any:
    value = found.get(name)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= MOST:
        raise TableError(f"{name}: expected a number from 0 to 2^53, got {value!r}")
    return value


def parse(text: str) -> Table:
    """A table from its file's text.

    Raises:
        TableError: the text is damaged, or of another schema.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TableError(f"it is damaged: {error}") from None
    if not isinstance(found, dict) or "schema" not in found:
        raise TableError("it is damaged: it has no schema")
    if found["schema"] != SCHEMA:
        raise TableError(f"it has schema {found['schema']!r}, and this fastmtl reads {SCHEMA}")
    origin, limits = found.get("origin"), found.get("limits")
    if not isinstance(origin, dict) or not isinstance(limits, dict):
        raise TableError("it is damaged: it has no origin or no limits")
    expected = {"name": str, "vendor": str, "level": str, "threads": int, "date": str}
    for name, kind in expected.items():
        if not isinstance(origin.get(name), kind):
            raise TableError(f"it is damaged: origin {name}: expected {kind.__name__}, got {origin.get(name)!r}")
    read: dict[str, dict[str, Limits]] = {}
    for product in PRODUCTS:
        entries = limits.get(product)
        if not isinstance(entries, dict):
            raise TableError(f"it is damaged: it has no limits of {product}")
        read[product] = {}
        for k in KEYS:
            entry = entries.get(k)
            if not isinstance(entry, dict) or set(entry) != set(Limits._fields):
                raise TableError(f"it is damaged: {product}, {k}: expected direct and matmul, got {entry!r}")
            read[product][k] = Limits(*(_limit(entry[f], f"it is damaged: {product}, {k}") for f in Limits._fields))
    try:
        call_bytes, weight_passes = int(_number(found, "call_bytes")), _number(found, "weight_passes")
    except TableError as error:
        raise TableError(f"it is damaged: {error}") from None
    measured = found.get("measured")
    return Table(read, call_bytes, weight_passes, origin, measured if isinstance(measured, dict) else {})


def read(path: Path) -> Table:
    """A table from a file.

    Raises:
        TableError: the file cannot be read, is damaged, or of another schema.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        # a pipe would keep the process waiting
        raise TableError("it cannot be read: it is no file")
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise TableError(f"it cannot be read: {error}") from None
    return parse(text)


def uniform(limits: Limits, call_bytes: int = 1_000_000, weight_passes: float = 3) -> Table:
    """A table with the same limits for all products: every segment the same way, whatever is the fastest."""
    entries = MappingProxyType(dict.fromkeys(KEYS, limits))
    return Table(dict.fromkeys(PRODUCTS, entries), call_bytes, weight_passes, {}, {})


def _defaults() -> Table:
    """What is used where not even a shipped table can be read: crossovers of one machine, set by hand."""
    rows = {
        "forward": dict.fromkeys(KINDS, 96),
        "input_gradient": dict.fromkeys(KINDS, 64),
        # oneDNN is slow for few rows in channels_last
        "weight_gradient": {"pixelwise": 256, "channels_last": 256, "contiguous": 128},
    }
    limits = {
        product: {
            # oneDNN is asked for the product itself in 16 bits, MKL in float32
            key(kind, dtype, size): Limits(
                rows[product][kind], None if (kind, dtype) == ("pixelwise", "bfloat16") else 0
            )
            for kind in KINDS
            for dtype in DTYPES
            for size in WEIGHTS
        }
        for product in PRODUCTS
    }
    return Table(limits, 1_000_000, 3, {}, {})


DEFAULTS = _defaults()
