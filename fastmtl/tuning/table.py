"""A table of crossovers: what `fastmtl tune` measured on one processor, as a value and as a JSON file."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from fastmtl.tuning.processor import Processor

SCHEMA = 2
# what is computed of a segment: y, dx, dW_eff
PRODUCTS = ("forward", "input_gradient", "weight_gradient")
# how: by the filter and by how pictures lie. A pixelwise filter on rows side by side is a plain matrix product
KINDS = ("pixelwise", "channels_last", "contiguous")
# in which dtype torch would be asked; float16 counts as bfloat16
DTYPES = ("float32", "bfloat16")
# no number of a table is greater: C++ counts rows in 64 bits, and products with it stay finite
MOST = 2**53


class Limits(NamedTuple):
    """Which way a segment takes, by its rows (output pixels): at most `direct` rows are multiplied by the direct
    product in C++, at most `matmul` by torch's matrix product, more by torch's convolution. None: however many."""

    direct: int | None
    matmul: int | None


class TableError(ValueError):
    """A file is no table that can be used here; the message says why."""


class Shape(NamedTuple):
    """Of a weight, as a product of matrices sees it: how many numbers each output sums up (input channels of its group,
    times height and width of the filter), and how many outputs there are."""

    inner: int
    outer: int

    def __str__(self) -> str:
        return f"{self.inner}x{self.outer}"

    def distance(self, other: Shape) -> float:
        """How far apart two are: the ratios of both numbers, in logarithms."""
        return abs(math.log(self.inner / other.inner)) + abs(math.log(self.outer / other.outer))


class ByShape(dict[Shape, Limits]):
    """Limits by the shapes that were measured."""

    def __init__(self, limits: Mapping[Shape, Limits]) -> None:
        super().__init__(limits)
        self._nearest: dict[Shape, Limits] = {}

    def nearest(self, shape: Shape) -> Limits:
        """The limits of the nearest shape; of two that are as near, of the first."""
        found = self._nearest.get(shape)
        if found is None:
            found = self._nearest[shape] = self[min(self, key=shape.distance)]
        return found


def key(kind: str, dtype: str) -> str:
    """Of one entry of `Table.limits`."""
    return f"{kind} {dtype}"


KEYS = tuple(key(kind, dtype) for kind in KINDS for dtype in DTYPES)


class Table(NamedTuple):
    """The numbers that the CPU's ops ask for.

    `limits`: product -> kind and dtype -> `Limits` by shape of the weight. `call_bytes`: bytes that could be copied
    while torch and oneDNN prepare one more call. `weight_passes`: passes over the weight that such a call makes before
    it multiplies. `origin`: processor, versions, commit and date. `measured`: the times that the numbers were found
    from, for readers alone.
    """

    limits: Mapping[str, Mapping[str, ByShape]]
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
            f"    {json.dumps(product)}: "
            + lines({k: {str(shape): v._asdict() for shape, v in by.items()} for k, by in entries.items()}, 3)
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


def read_shape(text: str, where: str) -> Shape:
    """The shape that `str` has written.

    Raises:
        TableError: it is none; `where` begins the message.
    """
    if not re.fullmatch("[1-9][0-9]{0,15}x[1-9][0-9]{0,15}", text):
        raise TableError(f"{where}: expected the shape of a weight, such as 256x768, got {text!r}")
    return Shape(*map(int, text.split("x")))


def _by_shape(entries: Any, where: str) -> ByShape:
    if not isinstance(entries, dict) or not entries:
        raise TableError(f"{where}: expected limits by shape, got {entries!r}")
    read: dict[Shape, Limits] = {}
    for text, entry in entries.items():
        if not isinstance(entry, dict) or set(entry) != set(Limits._fields):
            raise TableError(f"{where}, {text}: expected direct and matmul, got {entry!r}")
        limits = Limits(*(_limit(entry[f], f"{where}, {text}") for f in Limits._fields))
        read[read_shape(text, where)] = limits
    return ByShape(read)


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
    read: dict[str, dict[str, ByShape]] = {}
    for product in PRODUCTS:
        entries = limits.get(product)
        if not isinstance(entries, dict):
            raise TableError(f"it is damaged: it has no limits of {product}")
        read[product] = {}
        for k in KEYS:
            read[product][k] = _by_shape(entries.get(k), f"it is damaged: {product}, {k}")
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


def _all_shapes(limits: Limits) -> ByShape:
    """The same for every weight."""
    return ByShape({Shape(1, 1): limits})


def uniform(limits: Limits, call_bytes: int = 1_000_000, weight_passes: float = 3) -> Table:
    """A table with the same limits for all products: every segment the same way, whatever is the fastest."""
    entries = MappingProxyType(dict.fromkeys(KEYS, _all_shapes(limits)))
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
            key(kind, dtype): _all_shapes(
                Limits(rows[product][kind], None if (kind, dtype) == ("pixelwise", "bfloat16") else 0)
            )
            for kind in KINDS
            for dtype in DTYPES
        }
        for product in PRODUCTS
    }
    return Table(limits, 1_000_000, 3, {}, {})


DEFAULTS = _defaults()
