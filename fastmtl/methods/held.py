"""Tensors of the size of the gradients that a method keeps from one step to the next, by the names of the tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmtl.core.gradient_rows import GradientRows, accumulate_dtype, first_of_params
from fastmtl.methods.base import Seen
from fastmtl.ops.gradients.average_gradients import same_order
from fastmtl.ops.gradients.combine import combine_into


class HeldGradients:
    """One tensor for each task that was ever seen and each parameter: T times the memory of the gradients, float64
    where they are, else float32.

    They begin as zeros. A task that goes keeps its own. Parameters are known by their place among the shared ones, so
    that these must be the same at every step.
    """

    def __init__(self) -> None:
        self._rows: dict[str, list[Tensor | None]] = {}
        self._is_reset = False

    def of(self, rows: GradientRows, names: Sequence[str]) -> list[Tensor]:
        """Those of these tasks, for each parameter that has a gradient, one task after the other.

        Raises:
            ValueError: other parameters than before.
        """
        first = first_of_params(rows.tensors, rows.index, rows.num_params)
        wrong = [name for name in self._rows if not _fits(self._rows[name], first, rows.num_params)]
        if wrong and self._is_reset:
            self._rows.clear()
        elif wrong:
            shapes = [list(x.shape) for x in first.values()]
            kept = [None if x is None else list(x.shape) for x in self._rows[wrong[0]]]
            raise ValueError(
                f"task {wrong[0]!r}: the method keeps tensors of other shared parameters, of shapes {kept}; got "
                f"{rows.num_params} parameters, gradients of shapes {shapes}: reset() the method, or name the shared "
                "parameters where that can be done (`shared=`), so that they stay the same"
            )
        self._is_reset = False
        held = [self._rows.setdefault(name, [None] * rows.num_params) for name in names]
        found: list[list[Tensor]] = [[] for _ in names]
        for i, like in first.items():
            order = next((row[i] for row in held if row[i] is not None), like)
            for t, row in enumerate(held):
                row[i] = _made(row[i], order, like)
                found[t].append(row[i])
        return [x for row in found for x in row]

    def state_dict(self) -> dict[str, list[Tensor | None]]:
        return {name: [None if x is None else x.clone() for x in row] for name, row in self._rows.items()}

    def check(self, state: Any, who: str) -> None:
        """Raises ValueError where this is not what `state_dict` returned; `who` is whose, for the error."""
        good = isinstance(state, Mapping) and all(
            isinstance(name, str)
            and isinstance(row, Sequence)
            and not isinstance(row, str)
            and all(x is None or (isinstance(x, Tensor) and x.is_floating_point()) for x in row)
            for name, row in state.items()
        )
        if not good:
            raise ValueError(f"state: {who}: expected a list of tensors for the name of each task, got {_told(state)}")
        if len({len(row) for row in state.values()}) > 1:
            counts = ", ".join(f"{len(row)} of {name!r}" for name, row in state.items())
            raise ValueError(f"state: {who}: expected as many tensors of each task, got {counts}")

    def load_state_dict(self, state: Any, who: str) -> None:
        """Takes over what `state_dict` returned. Raises what `check` does; nothing has changed then."""
        self.check(state, who)
        kept = {}
        for name, row in state.items():
            before = self._rows.get(name, [])
            if len(before) != len(row):
                before = [None] * len(row)
            kept[name] = [_taken_over(old, new) for old, new in zip(before, row, strict=True)]
        self._rows = kept

    def reset(self) -> None:
        """All are zeros again, in place; or of other parameters, if such come next."""
        self._is_reset = True
        for row in self._rows.values():
            for x in row:
                if x is not None:
                    x.zero_()


def _told(state: Any) -> str:
    if not isinstance(state, Mapping):
        return type(state).__name__
    return "{" + ", ".join(f"{name!r}: {type(row).__name__}" for name, row in state.items()) + "}"


def _fits(held: Sequence[Tensor | None], first: Mapping[int, Tensor], num_params: int) -> bool:
    if len(held) != num_params:
        return False
    pairs = [(held[i], like) for i, like in first.items() if held[i] is not None]
    return all(x.shape == like.shape and x.dtype == accumulate_dtype([like.dtype]) for x, like in pairs)


def _made(held: Tensor | None, order: Tensor, like: Tensor) -> Tensor:
    """`held` on the device of the gradients and in the memory order of another task's; zeros where there is none."""
    if held is not None and held.device == like.device and same_order(held, order):
        return held
    # what is kept outlives an inference mode in which it was made
    with torch.inference_mode(False):
        made = torch.zeros_like(order, dtype=accumulate_dtype([like.dtype]), device=like.device)
    return made if held is None else made.copy_(held)


def _taken_over(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    if new is None:
        return None
    if old is not None and old.shape == new.shape and old.dtype == new.dtype:
        return old.copy_(new)  # a captured step goes on from here
    return new.detach().clone()


def as_lists(rows: GradientRows) -> GradientRows:
    """A bank as T lists of one tensor: what is kept by task has no bank."""
    if rows.bank is None:
        return rows
    return GradientRows(list(rows.bank.unbind(0)), list(range(rows.num_tasks)), rows.num_tasks, 1)


def device_of(rows: GradientRows, seen: Seen, *kept: torch.device | None) -> torch.device:
    """Where the gradients are; a rank without columns has none, and goes by what else it knows."""
    if rows.tensors:
        return rows.tensors[0].device
    known = [x.device for x in (seen.losses, seen.present) if isinstance(x, Tensor)]
    return next((device for device in (*known, *kept) if device is not None), torch.device("cpu"))


def scale_of(seen: Seen, device: torch.device) -> Tensor | float:
    """The loss scale as a factor of float64 numbers on that device."""
    scale = seen.loss_scale
    if scale is None:
        return 1.0
    return scale.detach().to(device, torch.float64) if isinstance(scale, Tensor) else float(scale)


def combine_held(weights: Tensor, held: Sequence[Tensor], num_tasks: int, out: Sequence[Tensor]) -> None:
    """The weighted sums of what is kept, into memory of the gradients' dtypes: 16 bits by way of float32."""
    if not out:
        return
    rows = GradientRows(list(held), list(range(len(held))), num_tasks, len(out))
    targets = []
    for x, like in zip(out, held[: len(out)], strict=True):
        targets.append(x if x.dtype == like.dtype else torch.empty_like(x, dtype=like.dtype))
    combine_into(weights, rows, targets)
    for x, target in zip(out, targets, strict=True):
        if x is not target:
            x.copy_(target)
