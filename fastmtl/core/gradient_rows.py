"""The gradients of T tasks in the one form that every op and kernel takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MAX_TASKS = 128


class GradientRows(NamedTuple):
    """T gradient rows of n tensors each, without the Nones; or one bank, the form that the kernels take alike."""

    tensors: list[Tensor]  # or the `[T, P]` bank alone
    index: list[int]  # position of each tensor: task * num_params + parameter, strictly increasing; empty for a bank
    num_tasks: int
    num_params: int

    @property
    def bank(self) -> Tensor | None:
        return self.tensors[0] if self.tensors and not self.index else None

    def by_param(self) -> list[dict[int, Tensor]]:
        """For each parameter with a gradient, in order, its gradients by task: those that are there. A bank is one
        parameter."""
        if self.bank is not None:
            return [dict(enumerate(self.bank.unbind(0)))]
        found: dict[int, dict[int, Tensor]] = {i: {} for i in present_params(self.index, self.num_params)}
        for x, k in zip(self.tensors, self.index, strict=True):
            found[k % self.num_params][k // self.num_params] = x
        return list(found.values())


def device_type_of(tensors: Sequence[Tensor]) -> str | None:
    """Where they lie; None: there is none."""
    return tensors[0].device.type if tensors else None


def accumulate_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """dtype of a Gram matrix: float64 if any gradient is float64, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def bank_rows(grads: Tensor) -> GradientRows:
    """A `[T, P]` bank in the form that the kernels take."""
    return GradientRows([grads], [], grads.shape[0], 1)


def present_params(index: Sequence[int], num_params: int) -> list[int]:
    """Parameters with a gradient in at least one task, in order."""
    return sorted({k % num_params for k in index}) if num_params else []


def first_of_params(tensors: Sequence[Tensor], index: Sequence[int], num_params: int) -> dict[int, Tensor]:
    """The first tensor of each present parameter, by parameter, in order: it gives shape, dtype and layout."""
    found: dict[int, Tensor] = {}
    for x, k in zip(tensors, index, strict=True):
        found.setdefault(k % num_params, x)
    return dict(sorted(found.items()))
