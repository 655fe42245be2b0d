"""The `torch.ops.fastmtl` namespace: every schema is defined once, in Python, through this file.

The compiled extension only registers implementations for the private `_*` schemas.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastmtl.core.autograd import register_autograd

# asked once, since torch.compile cannot trace the question before torch 2.12
_DEVICES_WITH_AUTOCAST = frozenset(
    kind for kind in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla") if torch.amp.is_autocast_available(kind)
)


def autocast_is_on(device_type: str) -> bool:
    """Whether autocast is on for tensors of a kind of device; a device without autocast never has it on."""
    return device_type in _DEVICES_WITH_AUTOCAST and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str | None) -> contextlib.AbstractContextManager[Any]:
    """Autocast off, where it is on: the ops accumulate in at least float32, whatever region they are called in."""
    if device_type is not None and autocast_is_on(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _first_device_type(args: Sequence[Any]) -> str:
    for x in args:
        if isinstance(x, torch.Tensor):
            return x.device.type
        if isinstance(x, (list, tuple)) and x and isinstance(x[0], torch.Tensor):
            return x[0].device.type
    return "cpu"


def _outside_autocast(implementation: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(implementation)
    def call(*args: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return implementation(*args)
        with without_autocast(_first_device_type(args)):
            return implementation(*args)

    return call


LIBRARY = torch.library.Library("fastmtl", "DEF")

# public op name -> (implementation, fake); the completeness test walks this table.
PUBLIC_OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}


def define_op(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> Any:
    """Defines a public op with an implementation for every device, a fake and an autograd formula.

    Without `backward` the op is not differentiable: its results are integers, or it writes into an argument.

    `implementation` chooses the backend itself (see `fastmtl.core.dispatch.choose`), so that the choice is
    made when the op runs, in eager mode and inside a compiled graph alike.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    run = _outside_autocast(implementation)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastmtl::{name}", fake, lib=LIBRARY)
    if backward is not None:
        register_autograd(LIBRARY, name, run, _outside_autocast(backward), setup_context)
    PUBLIC_OPS[name] = (implementation, fake)
    return getattr(torch.ops.fastmtl, name).default


def define_kernel(schema: str) -> Any:
    """Defines a private schema (`_name`) that the compiled extension implements for CPU and/or CUDA."""
    name = schema.split("(", 1)[0]
    if not name.startswith("_"):
        raise ValueError(f"kernel schemas start with an underscore, got {name!r}")
    LIBRARY.define(schema)
    torch.library.register_fake(f"fastmtl::{name}", lambda *args: None, lib=LIBRARY)  # they write into arguments
    return getattr(torch.ops.fastmtl, name).default
