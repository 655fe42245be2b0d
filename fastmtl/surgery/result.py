"""What a surgery saw and decided, for whoever called it and for a logger."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


class Surgery:
    """What one surgery saw and decided. All tensors are on the device of the gradients; nothing is copied to the
    host until asked.

    Attributes:
        gram: `[T, T]` Gram matrix of the shared parameters' gradients, float32 (float64 for float64 gradients),
            already divided by `loss_scale**2`. Zero for absent tasks. After `backward(features=)` it is the features'
            gradients that this, the cosines, conflicts and norms are about.
            Of a method that combines other vectors than the task gradients (running averages of them), it is of those.
        weights: `[T]` float64 (what a callable returned, for one): the update of the shared parameters is
            `sum_t weights[t] * g_t`, where g_t are their own gradients in any case. 0 for absent tasks. Where no
            parameter is shared the method is not asked: every present task has weight 1. None where the update is no
            weighted sum (`GradDrop`, `TrimmedMean`).
        names: the T task names.
        present: per task, whether it had a loss (or a gradient, in a bank). After `one_pass` with task ids on a
            device a `[T]` bool tensor there, and `log_dict` then has all tasks.
    """

    __slots__ = ("_norm", "gram", "names", "present", "weights")

    def __init__(
        self,
        gram: Tensor,
        weights: Tensor | None,
        names: Sequence[str],
        present: Sequence[bool] | Tensor,
        norm: Tensor | None = None,
    ) -> None:
        self.gram = gram
        self.weights = weights
        self._norm = norm  # of the update, where the weights don't tell
        self.names = tuple(names)
        self.present = present if isinstance(present, Tensor) else tuple(present)

    @property
    def reused(self) -> bool:
        """Whether the weights are those of an earlier step (`fastmtl.methods.Every`): then `gram` is NaN, `cosines` and
        `conflicts` raise, and `log_dict` has weights and `grad_norm` alone."""
        return False

    def cosines(self) -> Tensor:
        """`[T, T]` float64 cosines between the tasks' gradients; 0 where one of the two is zero."""
        m = self.gram.to(torch.float64)
        norms = m.diagonal(dim1=-2, dim2=-1).sqrt()
        scale = norms[..., :, None] * norms[..., None, :]
        return torch.where(scale == 0, 0.0, m / torch.where(scale == 0, 1.0, scale))

    def conflicts(self) -> Tensor:
        """`[T, T]` bool: which pairs of gradients have a negative inner product."""
        return self.gram < 0  # a diagonal entry is a squared norm

    def grad_norm(self) -> Tensor:
        """0-d float64: norm of the shared parameters' update (with `features=`: of the gradient that enters the
        trunk), without the loss scale: `sqrt(w^T M w)`, or of the update itself where there are no weights."""
        if self.weights is None:
            assert self._norm is not None
            return self._norm
        w = self.weights.to(torch.float64)
        return (w @ self.gram.to(torch.float64) @ w).clamp(min=0).sqrt()

    def log_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """0-d tensors for a logger: `weight/<task>`, `norm/<task>` and `conflicts/<task>` (with how many tasks) of
        every present task, `grad_norm`, and `conflicts` (pairs). No `weight/<task>` where there are no weights.
        `prefix` is put before each key.
        """
        norms = self.gram.diagonal().sqrt()
        conflicts = self.conflicts().sum(1)
        out = {f"{prefix}grad_norm": self.grad_norm(), f"{prefix}conflicts": conflicts.sum() // 2}
        known = [True] * len(self.names) if isinstance(self.present, Tensor) else self.present
        for t, (name, here) in enumerate(zip(self.names, known, strict=True)):
            if here:
                if self.weights is not None:
                    out[f"{prefix}weight/{name}"] = self.weights[t]
                out[f"{prefix}norm/{name}"] = norms[t]
                out[f"{prefix}conflicts/{name}"] = conflicts[t]
        return out

    def __repr__(self) -> str:
        if isinstance(self.present, Tensor):
            text = ", ".join(self.names)
        else:
            tasks = zip(self.names, self.present, strict=True)
            text = ", ".join(name if here else f"{name} (absent)" for name, here in tasks)
        return f"Surgery({text}{self._shown()})"

    def _shown(self) -> str:
        """The cosines for `repr`, of tensors on the CPU; elsewhere showing values would wait for the device."""
        if type(self) is not Surgery or self.gram.device.type != "cpu" or isinstance(self.gram, FakeTensor):
            return ""
        return f"; cosines {[[round(x, 2) for x in row] for row in self.cosines().tolist()]}"


class PartitionSurgery(Surgery):
    """A surgery on parts of a batch's gradient, taken by samples, that are not the gradients of the tasks' losses."""

    __slots__ = ()

    @classmethod
    def of(cls, surgery: Surgery) -> PartitionSurgery:
        return cls(surgery.gram, surgery.weights, surgery.names, surgery.present, surgery._norm)

    def _refuse(self, what: str) -> RuntimeError:
        return RuntimeError(
            f"Surgery.{what}: mixing='partition' has rows that are each sample's part of the gradient; tasks whose "
            "samples share batch statistics have no gradients of their own to compare"
        )

    def cosines(self) -> Tensor:
        raise self._refuse("cosines")

    def conflicts(self) -> Tensor:
        raise self._refuse("conflicts")

    def log_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """As of `Surgery`, without what tells of conflicts."""
        norms = self.gram.diagonal().sqrt()
        out = {f"{prefix}grad_norm": self.grad_norm()}
        for t, name in enumerate(self.names):
            if self.weights is not None:
                out[f"{prefix}weight/{name}"] = self.weights[t]
            out[f"{prefix}norm/{name}"] = norms[t]
        return out


class GroupedSurgery(Surgery):
    """Surgeries on L groups of shared parameters, each on its own (`backward(groups=)`).

    Attributes:
        gram, weights: `[L, T, T]` and `[L, T]`, and so `cosines()` and `conflicts()` are `[L, T, T]`.
        groups: the names of the groups.
    """

    __slots__ = ("groups",)

    def __init__(
        self,
        gram: Tensor,
        weights: Tensor | None,
        groups: Sequence[str],
        names: Sequence[str],
        present: Sequence[bool] | Tensor,
        norm: Tensor | None = None,
    ) -> None:
        super().__init__(gram, weights, names, present, norm)
        self.groups = tuple(groups)

    @classmethod
    def of(
        cls, parts: Sequence[Surgery], groups: Sequence[str], names: Sequence[str], present: Sequence[bool] | Tensor
    ) -> GroupedSurgery:
        dtype = torch.float64 if any(x.gram.dtype == torch.float64 for x in parts) else torch.float32
        gram = torch.stack([x.gram.to(dtype) for x in parts])
        weights = [x.weights.to(torch.float64) for x in parts if x.weights is not None]
        norm = torch.stack([x.grad_norm() for x in parts]).square().sum().sqrt()
        return cls(gram, torch.stack(weights) if len(weights) == len(parts) else None, groups, names, present, norm)

    def grad_norm(self) -> Tensor:
        """0-d float64: norm of the update of all groups together, without the loss scale."""
        if self._norm is not None:
            return self._norm
        assert self.weights is not None
        w = self.weights.to(torch.float64)
        squares = (w[:, None] @ self.gram.to(torch.float64) @ w[:, :, None]).clamp(min=0)
        return squares.sum().sqrt()

    def log_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """As of `Surgery`, with `weight/<group>/<task>`, `norm/<group>/<task>` and `conflicts/<group>/<task>`;
        `grad_norm` and `conflicts` are of all groups together."""
        norms, conflicts = self.gram.diagonal(dim1=1, dim2=2).sqrt(), self.conflicts().sum(2)
        out = {f"{prefix}grad_norm": self.grad_norm(), f"{prefix}conflicts": conflicts.sum() // 2}
        known = [True] * len(self.names) if isinstance(self.present, Tensor) else self.present
        for i, group in enumerate(self.groups):
            for t, (name, here) in enumerate(zip(self.names, known, strict=True)):
                if here:
                    if self.weights is not None:
                        out[f"{prefix}weight/{group}/{name}"] = self.weights[i, t]
                    out[f"{prefix}norm/{group}/{name}"] = norms[i, t]
                    out[f"{prefix}conflicts/{group}/{name}"] = conflicts[i, t]
        return out


class ReusedSurgery(Surgery):
    """A step that reused the weights of an earlier one (`fastmtl.methods.Every`). Nothing was seen of the single tasks:
    the Gram matrix is NaN."""

    __slots__ = ()

    def __init__(self, weights: Tensor, norm: Tensor, names: Sequence[str], present: Sequence[bool]) -> None:
        count = len(names)
        gram = torch.full((count, count), torch.nan, dtype=torch.float32, device=weights.device)
        super().__init__(gram, weights, names, present, norm)

    @property
    def reused(self) -> bool:
        return True

    def _refuse(self, what: str) -> RuntimeError:
        return RuntimeError(
            f"Surgery.{what}: this step reused weights (methods.Every), and saw no task's gradient alone: ask where "
            "surgery.reused is False"
        )

    def cosines(self) -> Tensor:
        raise self._refuse("cosines")

    def conflicts(self) -> Tensor:
        raise self._refuse("conflicts")

    def grad_norm(self) -> Tensor:
        """0-d float64: norm of the shared parameters' update, without the loss scale."""
        assert self._norm is not None
        return self._norm

    def log_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """As of `Surgery`, without norms and conflicts of single tasks."""
        assert self.weights is not None
        out = {f"{prefix}grad_norm": self.grad_norm()}
        for name, here, weight in zip(self.names, self.present, self.weights, strict=True):
            if here:
                out[f"{prefix}weight/{name}"] = weight
        return out
