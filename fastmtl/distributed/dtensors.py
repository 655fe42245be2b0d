"""DTensors, as `fully_shard` makes them of parameters and gradients: this rank's shard of them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastmtl.parameters import describe


def is_dtensor(p: Tensor) -> bool:
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and isinstance(p, tensor.DTensor)


def not_fully_shard(p: Any, name: str, call: str) -> TypeError:
    return TypeError(
        f"{call}: {describe(p, name)} is a DTensor with placements {p.placements}, and not known to be one of a "
        "fully_shard module. Tensor-parallel parameters are not supported: no rank has whole rows, and nobody has "
        "reduced them. For a fully_shard module pass params= the module itself, not a list of its parameters"
    )


def refuse_dtensors(named: Mapping[Tensor, str], call: str) -> None:
    """Raises TypeError for DTensors where nobody said what they are."""
    for p, name in named.items():
        if is_dtensor(p):
            raise not_fully_shard(p, name, call)


def local(x: Any) -> Tensor:
    """This rank's shard of a DTensor."""
    with torch.no_grad():
        return x.to_local() if is_dtensor(x) else x


def add_shard(param: Any, shard: Tensor) -> None:
    """Accumulates this rank's shard into `.grad`, which stays a DTensor in the parameter's placements."""
    if param.grad is not None:
        local(param.grad).add_(shard)
    else:
        param.grad = sys.modules["torch.distributed.tensor"].DTensor.from_local(
            shard, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
        )
