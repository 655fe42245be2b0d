"""Which parameters the tasks share, and the sums of gradients of those that they don't."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastmtl.core.tensors import COMPLEX_DTYPES, FLOAT_DTYPES
from fastmtl.parameters import describe, is_per_task


def split_shared(
    reached: Mapping[Tensor, int],
    named: Mapping[Tensor, str],
    shared: Mapping[Tensor, str] | None,
    *,
    in_gram: bool = True,
) -> list[Tensor]:
    """The shared parameters among the reached ones (parameter -> bit mask of tasks), checked.

    `in_gram`: their gradients go into a Gram matrix, so that they need a kernel and one device.

    Raises:
        TypeError: shared parameters of a dtype that has no kernel.
        ValueError: no loss reaches any parameter in `shared`; several devices.
    """
    if shared is not None and not any(p in reached for p in shared) and any(p.requires_grad for p in shared):
        raise ValueError("shared: no loss reaches any of these parameters")
    found = []
    for p, mask in reached.items():
        if is_per_task(p) or not (mask & (mask - 1) if shared is None else p in shared):
            continue
        if in_gram and p.dtype not in (*FLOAT_DTYPES, *COMPLEX_DTYPES):
            raise TypeError(
                f"{describe(p, named[p])} is shared: expected float64, float32, bfloat16, float16, complex128 or "
                f"complex64, got {p.dtype}: fastmtl.mark_per_task gives it the plain sum of its gradients"
            )
        if in_gram and found and p.device != found[0].device:
            raise ValueError(
                f"{describe(p, named[p])} is shared and on {p.device}, but {describe(found[0], named[found[0]])} "
                f"is on {found[0].device}: the parameters in one Gram matrix must be on one device"
            )
        found.append(p)
    return found


def check_within(shared: Mapping[Tensor, str], named: Mapping[Tensor, str]) -> None:
    for p, name in shared.items():
        if p.requires_grad and p not in named:
            raise ValueError(f"shared: {describe(p, name)} is not among params")


def sparse_shared(layout: torch.layout, param: Tensor, named: Mapping[Tensor, str]) -> TypeError:
    return TypeError(
        f"{describe(param, named[param])} is shared and has a sparse gradient ({layout}), which has no place "
        "in a Gram matrix: mark it with fastmtl.mark_per_task or leave it out of shared= (it then gets the plain sum "
        "of its gradients), or make the gradient dense"
    )


def add_unshared(unshared: dict[Tensor, Tensor], param: Tensor, grad: Tensor) -> None:
    """Sums gradients of a parameter that is not shared; never in place, since autograd may hold `grad` too."""
    before = unshared.get(param)
    if before is None:
        unshared[param] = grad
    else:
        with torch.no_grad():
            # sparse + dense is not defined, dense + sparse is
            unshared[param] = grad + before if before.layout is not torch.strided else before + grad
