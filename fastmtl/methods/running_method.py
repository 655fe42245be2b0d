"""What the methods share that keep something of the size of the gradients from one step to the next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastmtl.core.gradient_rows import GradientRows
from fastmtl.methods.arguments import check_mapping
from fastmtl.methods.base import Seen
from fastmtl.methods.held import HeldGradients, device_of
from fastmtl.methods.state import Field, StatefulMethod


class RunningMethod(StatefulMethod):
    """A method with numbers for each task (`_state`) and tensors of the gradients' shapes (`_held`).

    A subclass implements `update`, and says in `_holds` what the tensors are.
    """

    # it counts its calls, and its tensors are of one set of parameters
    by_group = False
    _holds: ClassVar[str]

    def __init__(self, **fields: Field) -> None:
        super().__init__(**fields)
        self._held = HeldGradients()

    def state_dict(self) -> dict[str, Any]:
        """Numbers (`"numbers"`), and tensors for each task and shared parameter by the name of the task; empty before
        the first step. `torch.load(weights_only=True)` reads them."""
        numbers = self._state.state_dict()
        return {"numbers": numbers, self._holds: self._held.state_dict()} if numbers else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.check_state(state)
        who = type(self).__name__
        if not state:
            state = {"numbers": {}, self._holds: {}}
        self._state.load_state_dict(state["numbers"], who)
        self._held.load_state_dict(state[self._holds], who)

    def check_state(self, state: Mapping[str, Any]) -> None:
        who = type(self).__name__
        check_mapping(state, f"state: {who}")
        if not state:
            return
        check_mapping(state, "state", ["numbers", self._holds], who)
        self._state.check(state["numbers"], who)
        self._held.check(state[self._holds], who)
        known = state["numbers"].get("names", [])
        if other := [name for name in state[self._holds] if name not in known]:
            raise ValueError(f"state: {who}: expected {self._holds} of the tasks {list(known)}, got {other}")

    def reset(self) -> None:
        super().reset()
        self._held.reset()

    def _device(self, rows: GradientRows, seen: Seen) -> torch.device:
        self._check_handed(seen, rows.num_tasks, "in the gradients")
        return device_of(rows, seen, self._state.device)


def decayed(factor: float, decay: float, step: Tensor) -> Tensor:
    """`factor / step^decay`, 0-d float64."""
    return factor / step**decay


def where_present(present: Tensor | None, value: Tensor, other: float) -> Tensor:
    return value if present is None else torch.where(present, value, other)
