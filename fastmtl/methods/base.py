"""What a gradient method is, and how one is asked for its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.ops.gradients.arguments import Grads, check_present
from fastmtl.ops.gradients.pcgrad import check_gram


class Method:
    """A method that turns T task gradients into one update `w^T G`, where w depends on the Gram matrix alone.

    A subclass implements `_weights`. Everything stays on the device of the Gram matrix: nothing waits for the host,
    so that a step can be captured in a CUDA graph.
    """

    def weights(self, gram: Tensor, *, present: Tensor | None = None) -> Tensor:
        """The weight of each task.

        Args:
            gram: `[T, T]` floating-point Gram matrix, T from 1 to 128.
            present: `[T]` bool, on the device of `gram`: tasks that take part. The others get weight 0 and are
                not in the problem; what `gram` holds in their rows and columns is not looked at. None: all.

        Returns:
            `[T]` float64, on the device of `gram`.

        Raises:
            TypeError: dtypes other than the above.
            ValueError: shapes or devices that do not agree.
        """
        check_gram(gram)
        m = gram.to(torch.float64)
        if present is None:
            return self._weights(m, None)
        check_present(present, gram)
        w = self._weights(torch.where(present[:, None] & present, m, 0.0), present)
        return torch.where(present, w, 0.0)

    def __call__(self, grads: Grads) -> Tensor | list[Tensor | None]:
        """The update itself: `[T, P] -> [P]`, or T lists of n tensors (None: zero) -> a list of n tensors.

        Raises what `fastmtl.ops.gram` raises for `grads`.
        """
        return ops.combine(self.weights(ops.gram(grads)), grads)

    def _weights(self, gram: Tensor, present: Tensor | None) -> Tensor:
        """`[T, T]` float64 with zeros for absent tasks -> `[T]` float64; absent entries are overwritten."""
        raise NotImplementedError


Weighting: TypeAlias = Method | Callable[[Tensor], Tensor]


def weights_of(method: Weighting, gram: Tensor, present: Sequence[bool]) -> Tensor:
    """Weights `[T]` float64 of the tasks, 0 for absent ones, from a `Method` or any callable `[T, T] -> [T]`.

    A callable sees the Gram matrix of the present tasks only. What comes back is checked.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: the wrong length or device; no task present.
    """
    tasks = [t for t, here in enumerate(present) if here]
    if not tasks:
        raise ValueError("present: expected at least one task, got none")
    if isinstance(method, Method):
        w = method.weights(gram, present=_on_device(present, gram.device))
        _check_weights(method, w, len(present), gram.device)
        return w.to(torch.float64)
    if len(tasks) == len(present):
        w = method(gram)
        _check_weights(method, w, len(present), gram.device)
        return w.to(torch.float64)
    # a list of rows, and not an index: indexing with a Python list copies it to the device, and waits
    w = method(torch.stack([torch.stack([gram[s, t] for t in tasks]) for s in tasks]))
    _check_weights(method, w, len(tasks), gram.device)
    out = torch.zeros(len(present), dtype=torch.float64, device=gram.device)
    for k, t in enumerate(tasks):
        out[t] = w[k]
    return out


def _on_device(present: Sequence[bool], device: torch.device) -> Tensor | None:
    """`[T]` bool written by fills on the device: a copy from the host would wait. None if all are present."""
    if all(present):
        return None
    mask = torch.ones(len(present), dtype=torch.bool, device=device)
    for t, here in enumerate(present):
        if not here:
            mask[t].fill_(False)
    return mask


def _check_weights(method: Weighting, weights: Tensor, count: int, device: torch.device) -> None:
    who = f"method {method!r}"
    if not isinstance(weights, Tensor):
        raise TypeError(f"{who}: expected a tensor of {count} weights, got {type(weights).__name__}")
    if not weights.is_floating_point():
        raise TypeError(f"{who}: expected floating-point weights, got {weights.dtype}")
    if weights.shape != (count,):
        raise ValueError(f"{who}: expected {count} weights, shape [{count}], got shape {list(weights.shape)}")
    if weights.device != device:
        raise ValueError(f"{who}: expected weights on {device}, got {weights.device}")
