"""The `torch.ops.fastmtl` namespace: every schema is defined once, in Python, through this file.

The compiled extension only registers implementations for the private `_*` schemas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("fastmtl", "DEF")

# public op name -> (implementation, fake); the completeness test walks this table.
PUBLIC_OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}


def define_op(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any],
    setup_context: Callable[..., Any],
) -> Any:
    """Defines a public op with an implementation for every device, a fake and an autograd formula.

    `implementation` chooses the backend itself (see `fastmtl._backend.choose`), so that the choice is
    made when the op runs, in eager mode and inside a compiled graph alike.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastmtl::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd(f"fastmtl::{name}", backward, setup_context=setup_context, lib=LIBRARY)
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
