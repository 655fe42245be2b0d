"""Whether CUDA C++, Triton or torch's own operators make a layer with per-task weights, by shape of its weight: a table
for each card.

`fastmtl tune` measures one on a machine with a GPU. Where none was measured it is a *model*, which says so, and whose
kernels are not asked first before they have run on a card. docs/kernels/tuning.md explains both.
"""

from __future__ import annotations

import functools
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmtl.tuning.table import Shape, TableError, read_shape

SCHEMA = 2
# what is computed: y; all gradients; each task's gradient of a shared weight
PRODUCTS = ("forward", "backward", "weight_grad")
# one pixel to one pixel, or several; and the same where all samples see one weight
KINDS = ("pixelwise", "filter", "pixelwise of one weight", "filter of one weight")
# float16 counts as bfloat16
DTYPES = ("float32", "bfloat16")
BACKENDS = ("cuda", "triton", "torch")
# whose kernels have run on a card: a model alone puts no other one in front
HAVE_RUN = frozenset({"triton"})


def key(kind: str, dtype: str) -> str:
    """Of one entry of `GpuTable.fastest`."""
    return f"{kind} {dtype}"


KEYS = tuple(key(kind, dtype) for kind in KINDS for dtype in DTYPES)
Rankings = Mapping[str, Mapping[str, Mapping[Shape, Sequence[str]]]]


class GpuTable(NamedTuple):
    """`card`: as the driver calls it, or the architecture of a model. `source`: `"measured"` or `"model"`. `fastest`:
    product -> kind and dtype -> backends by shape of the weight, the fastest first. `origin` and
    `measured` are for readers alone."""

    card: str
    source: str
    fastest: Rankings
    origin: Mapping[str, Any] = MappingProxyType({})
    measured: Mapping[str, Any] = MappingProxyType({})

    def nearest(self, product: str, kind: str, dtype: str, shape: Shape) -> Sequence[str]:
        """How fast the backends were for the nearest shape; of two that are as near, for the first."""
        entries = self.fastest[product][key(kind, dtype)]
        return entries[min(entries, key=shape.distance)]

    def order(self, product: str, kind: str, dtype: str, shape: Shape) -> tuple[str, ...]:
        """The backends, the one to be asked first in front."""
        ranking = self.nearest(product, kind, dtype, shape)
        found = (*ranking, *(other for other in BACKENDS if other not in ranking))
        if self.source == "model":
            return tuple(sorted(found, key=lambda backend: backend not in HAVE_RUN))
        return found

    def to_json(self) -> str:
        fastest = {
            product: {
                name: {str(shape): list(ranking) for shape, ranking in entries.items()}
                for name, entries in by_key.items()
            }
            for product, by_key in self.fastest.items()
        }
        found = {"schema": SCHEMA, **self._asdict(), "fastest": fastest}
        return json.dumps({k: dict(v) if isinstance(v, Mapping) else v for k, v in found.items()}, indent=1) + "\n"


def _model(arch: str, **fastest: str) -> GpuTable:
    entries = {
        product: MappingProxyType(dict.fromkeys(KEYS, MappingProxyType({Shape(1, 1): (backend,)})))
        for product, backend in fastest.items()
    }
    return GpuTable(arch, "model", MappingProxyType(entries))


# By the main loops of ResNet-50's layers together (docs/kernels/task-kernels-cuda.md): before sm_90 both multiply by
# mma.sync, which takes CUDA C++ less time. On sm_90 Triton multiplies by wgmma, and was measured at the rate that L2
# leaves to most loops of CUDA C++. Torch's own operators have no model.
MODELS = {
    80: _model("sm_80", forward="cuda", backward="cuda", weight_grad="cuda"),
    90: _model("sm_90", forward="triton", backward="triton", weight_grad="triton"),
}


def parse(text: str) -> GpuTable:
    """A table from its file's text.

    Raises:
        TableError: the text is damaged, or of another schema.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TableError(f"it is damaged: {error}") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise TableError(f"it is no table of a GPU of schema {SCHEMA}")
    if not isinstance(found.get("card"), str) or found.get("source") != "measured":
        raise TableError("it is damaged: it has no card, or was not measured")
    fastest: dict[str, dict[str, dict[Shape, Sequence[str]]]] = {}
    by_product = _object(found.get("fastest"))
    for product in PRODUCTS:
        fastest[product] = {}
        for name in KEYS:
            entries = _object(by_product.get(product)).get(name)
            if not isinstance(entries, dict) or not entries:
                raise TableError(f"it is damaged: it has no entries of {product}, {name}")
            fastest[product][name] = {
                read_shape(text, f"it is damaged: {name}"): _ranking(one, name) for text, one in entries.items()
            }
    return GpuTable(found["card"], "measured", fastest, _object(found.get("origin")), _object(found.get("measured")))


def _object(entry: Any) -> dict[str, Any]:
    """Of JSON; what is none has no entries."""
    return entry if isinstance(entry, dict) else {}


def _ranking(names: Any, entry: str) -> tuple[str, ...]:
    is_one = isinstance(names, list) and len(names) > 0 and all(isinstance(name, str) for name in names)
    if not is_one or len(set(names)) < len(names) or not {*names} <= {*BACKENDS}:
        raise TableError(f"it is damaged: {entry}: expected a list of {', '.join(BACKENDS)}, got {names!r}")
    return tuple(names)


# --- which table is used


def cache_path(card: str) -> Path:
    """Where `fastmtl tune` leaves the table of a card, and where it is looked for."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(folder) / "fastmtl" / f"tuned-gpu-{re.sub(r'[^a-z0-9]+', '-', card.lower()).strip('-')}.json"


def find(card: str, capability: int) -> tuple[GpuTable, str | None]:
    """The table of a card (90: sm_90), and why its own was refused, if it was."""
    model = MODELS[max((arch for arch in MODELS if arch <= capability), default=min(MODELS))]
    path = cache_path(card)
    if not path.is_file():
        return model, None
    try:
        found = parse(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        return model, f"{path} cannot be read: {error}"
    except TableError as error:
        return model, f"{path}: {error}"
    if found.card != card:
        return model, f"{path}: it is of another card: {found.card!r}, and this one is {card!r}"
    return found, None


@functools.cache
def current(device: torch.device) -> GpuTable:
    """The table that is used for tensors on a device; looked for once."""
    if device.type != "cuda":
        return MODELS[80]
    major, minor = torch.cuda.get_device_capability(device)
    table, refused = find(torch.cuda.get_device_name(device), 10 * major + minor)
    if refused is not None:
        warnings.warn(
            f"fastmtl refuses the table of a GPU, {refused}. Results are right without it; measure anew by "
            "`fastmtl tune`.",
            RuntimeWarning,
            stacklevel=2,
        )
    return table


def may_run(backend: str, device: torch.device) -> bool:
    """Whether kernels may be chosen that nobody has asked for: they have run on a card, or on this one in
    `fastmtl tune`."""
    return backend in HAVE_RUN or current(device).source == "measured"


def order(product: str, x: Tensor, shape: Sequence[int], one_weight: bool) -> tuple[str, ...]:
    """The backends, the one to be asked first in front, for x and a weight `[Cout, Cin, ...]`; one_weight: which all
    samples see."""
    return _order(product, x.device, x.dtype, tuple(shape), one_weight)


@functools.lru_cache(4096)
def _order(
    product: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], one_weight: bool
) -> tuple[str, ...]:
    inner = 1
    for size in shape[1:]:
        inner *= max(1, size)
    kind = KINDS[(inner != max(1, shape[1])) + 2 * one_weight]
    name = "float32" if dtype == torch.float32 else "bfloat16"
    return current(device).order(product, kind, name, Shape(inner, max(1, shape[0])))
