"""The scratch weight that holds `W + s_t Delta_t` of one task at a time."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastmtl.core.task_weights import TaskWeights
from fastmtl.ops.task_weights.cpu.batch import Batch
from fastmtl.ops.task_weights.cpu.convolution import plain_strides


class Stage:
    """The one scratch weight."""

    def __init__(self, weights: TaskWeights, batch: Batch, dtype: torch.dtype) -> None:
        self.weights, self.batch, self.dtype = weights, batch, dtype
        # `W + s_t Delta_t` is rounded to `dtype` alone, which may be narrower than the weights, or wider
        self._promoted = torch.promote_types(weights.like.dtype, dtype)
        self._scratch: Tensor | None = None
        self._sum: Tensor | None = None  # before it is rounded, where it is

    def weight(self, task: int | None) -> Tensor:
        """`W + s_t Delta_t` in the dtype of x, valid until the next call; W for None, zeros where there is none."""
        base = self._base
        if task is None:
            return plain_strides(torch.zeros_like(self.like) if base is None else base.to(self.dtype))
        delta, gate = self.batch.deltas[task], self.batch.gate(task)
        assert delta is not None
        delta = delta.detach()
        if base is None and gate == 1:
            return plain_strides(delta.to(self.dtype))
        like = delta if base is None else base
        if self._scratch is None:
            self._scratch = plain_strides(torch.empty_like(like, dtype=self.dtype, requires_grad=False))
            if self._promoted != self.dtype:
                self._sum = torch.empty_like(self._scratch, dtype=self._promoted)
        # torch computes into a narrower dtype several times as slowly as it computes and then rounds
        into = self._scratch if self._sum is None else self._sum
        if base is None:
            torch.mul(delta.to(self._promoted), gate, out=into)
        else:
            torch.add(base, delta, alpha=gate, out=into)
        return into if self._sum is None else self._scratch.copy_(into)

    @functools.cached_property
    def _base(self) -> Tensor | None:
        """W, a copy only where x is wider."""
        base = self.weights.weight
        return None if base is None else base.detach().to(self._promoted)

    @functools.cached_property
    def like(self) -> Tensor:
        """For weight gradients alone: of it only shape, dtype and memory order are read."""
        like = self.weights.like.detach()
        return plain_strides(like if like.dtype == self.dtype else torch.empty_like(like, dtype=self.dtype))
