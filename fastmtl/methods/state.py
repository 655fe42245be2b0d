"""Numbers that a method keeps from one step to the next, by the names of the tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmtl.methods.arguments import check_mapping
from fastmtl.methods.base import Method, Seen, seen_by_position
from fastmtl.ops.gradients.arguments import check_gram, check_gram_values, check_present


class Field(NamedTuple):
    """A value that a method keeps.

    Attributes:
        dims: 0 for a number (such as a count of steps), 1 for one of each task, 2 for one of each pair of tasks.
        initial: what it is before the first step, and for a task (a pair) that was not seen before. NaN tells a method
            that there is no value yet.
    """

    dims: int
    initial: float


class NamedState:
    """Float64 tensors on the device of the gradients, with an entry for each task that was ever seen.

    A task that goes keeps its entry, and finds it when it comes back. Values are written in place, and nothing waits
    for the host, so that a captured step goes on from what the one before it has left: run a step with all tasks before
    the capture, since entries of new tasks take new memory.

    Example:
        >>> state = NamedState(mean=Field(1, 0.0))
        >>> device = torch.device("cpu")
        >>> state.keep(["a", "b"], None, mean=torch.tensor([1.0, 2.0]))
        >>> state.read(["c", "b"], device)["mean"]
        tensor([0., 2.], dtype=torch.float64)
    """

    def __init__(self, **fields: Field) -> None:
        self._fields = fields
        self.names: list[str] = []
        self._values: dict[str, Tensor] = {}

    @property
    def device(self) -> torch.device | None:
        """Where the values are; None before the first step."""
        return next((x.device for x in self._values.values()), None)

    def read(self, names: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        """The value of each field for these tasks: 0-d, `[T]` or `[T, T]` float64 on that device."""
        self.prepare(names, device)
        at = self._positions(names, device)
        return {key: _taken(self._values[key], at, field.dims) for key, field in self._fields.items()}

    def keep(self, names: Sequence[str], present: Tensor | None, **values: Tensor) -> None:
        """Takes over new values of some fields, of the tasks that are present; the others keep what they had.

        Args:
            names: of the tasks that the values are for.
            present: `[T]` bool on the device of the values; None: all. Of a pair both must be.
            values: 0-d, `[T]` or `[T, T]`. One field is taken over as a whole or not at all: not if a value of a
                present task is not finite, as in a step that overflowed and that a `GradScaler` skips.
        """
        device = next(iter(values.values())).device
        self.prepare(names, device)
        at = self._positions(names, device)
        with torch.no_grad():
            for key, value in values.items():
                dims, new = self._fields[key].dims, value.detach().to(torch.float64)
                before = _taken(self._values[key], at, dims)
                here = _present_in(present, dims)
                if here is not None:
                    new = torch.where(here, new, before)
                    fine = (new.isfinite() | ~here).all()
                else:
                    fine = new.isfinite().all()
                _put(self._values[key], at, torch.where(fine, new, before))

    def lend(self, names: Sequence[str], device: torch.device) -> list[Tensor]:
        """The values of all fields for these tasks, in the order of the fields, for an op that changes them in place.

        They are the state's own where the tasks are all that it knows, in order; else copies. `take_back` must follow.
        """
        self.prepare(names, device)
        at = self._positions(names, device)
        return list(self._values.values()) if at is None else list(self.read(names, device).values())

    def take_back(self, names: Sequence[str], values: Sequence[Tensor]) -> None:
        """The values that were lent, changed."""
        for key, value in zip(self._fields, values, strict=True):
            if value is not self._values[key]:
                _put(self._values[key], self._positions(names, value.device), value)

    def prepare(self, names: Sequence[str], device: torch.device) -> None:
        """Makes entries for new tasks, and moves all to the device."""
        if list(names) == self.names and all(x.device == device for x in self._values.values()):
            return
        new = [name for name in names if name not in self.names]
        count = len(self.names) + len(new)
        for key, (dims, initial) in self._fields.items():
            value = self._values.get(key)
            if value is None or (new and dims > 0):
                # what is kept outlives an inference mode in which it was made
                with torch.inference_mode(False):
                    grown = torch.full((count,) * dims, initial, dtype=torch.float64, device=device)
                if value is not None and self.names:
                    grown[(slice(len(self.names)),) * dims] = value.to(device)
                self._values[key] = grown
            elif value.device != device:
                self._values[key] = value.to(device)
        self.names += new

    def tensors(self, names: Sequence[str], device: torch.device) -> list[Tensor]:
        """All values, of every task that was ever seen: as `Method.state_tensors`."""
        self.prepare(names, device)
        return list(self._values.values())

    def state_dict(self) -> dict[str, Any]:
        """The names and copies of the values; empty before the first step."""
        if not self._values:
            return {}
        return {"names": list(self.names), **{key: value.clone() for key, value in self._values.items()}}

    def check(self, state: Mapping[str, Any], who: str) -> None:
        """Raises TypeError or ValueError where this is not what `state_dict` returned; who: whose, for the error."""
        check_mapping(state, f"state: {who}")
        if not state:
            return
        check_mapping(state, "state", ["names", *self._fields], who)
        names = state["names"]
        if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(x, str) for x in names):
            raise ValueError(f"state: {who}: expected a list of names of tasks, got {names!r}")
        if len(set(names)) != len(names):
            raise ValueError(f"state: {who}: expected different names of tasks, got {list(names)}")
        for key, field in self._fields.items():
            value, shape = state[key], (len(names),) * field.dims
            if not isinstance(value, Tensor) or value.shape != shape or not value.is_floating_point():
                got = f"{value.dtype} of {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"state: {who}: expected {key} of shape {list(shape)}, floating point, got {got}")
            good = value.isfinite()
            if math.isnan(field.initial):
                good = good | value.isnan()  # a task that was never present
            if not bool(good.all()):
                raise ValueError(f"state: {who}: expected finite numbers as {key}, got {value.tolist()}")

    def load_state_dict(self, state: Mapping[str, Any], who: str) -> None:
        """Takes over what `state_dict` returned. Raises what `check` does; nothing has changed then."""
        self.check(state, who)
        if not state:
            self.names, self._values = [], {}
            return
        names = list(state["names"])
        same = names == self.names
        for key in self._fields:
            if same and key in self._values:
                self._values[key].copy_(state[key])  # a captured step goes on from here
            else:
                value = torch.empty_like(state[key], dtype=torch.float64, memory_format=torch.contiguous_format)
                self._values[key] = value.copy_(state[key].detach())
        self.names = names

    def reset(self) -> None:
        """All values are the initial ones again, in place."""
        for key, value in self._values.items():
            value.fill_(self._fields[key].initial)

    def _positions(self, names: Sequence[str], device: torch.device) -> Tensor | None:
        """`[T]` int64 positions of these tasks' entries, by fills on the device; None: they are all, in order."""
        if list(names) == self.names:
            return None
        at = torch.empty(len(names), dtype=torch.int64, device=device)
        for t, name in enumerate(names):
            at[t].fill_(self.names.index(name))
        return at


def _taken(value: Tensor, at: Tensor | None, dims: int) -> Tensor:
    if at is None or dims == 0:
        return value.clone()
    for dim in range(dims):
        value = value.index_select(dim, at)
    return value


def _put(value: Tensor, at: Tensor | None, new: Tensor) -> None:
    if at is None or value.dim() == 0:
        value.copy_(new)
    elif value.dim() == 1:
        value.index_copy_(0, at, new)
    else:
        value.index_put_((at[:, None], at), new)


def _present_in(present: Tensor | None, dims: int) -> Tensor | None:
    if present is None or dims == 0:
        return None
    return present if dims == 1 else present[:, None] & present


class StatefulMethod(Method):
    """A method whose weights also depend on what it keeps by the names of the tasks, or on more than the Gram matrix.

    A subclass makes its `NamedState` in `__init__`, and implements `_weigh`.
    """

    def __init__(self, **fields: Field) -> None:
        self._state = NamedState(**fields)

    def weights(self, gram: Tensor, *, present: Tensor | None = None) -> Tensor:
        m = self._read(gram, present)
        if self.needs:
            raise self._needs_more()
        return self._weigh_present(m, seen_by_position(m.shape[0], present), present)

    def weigh(self, gram: Tensor, seen: Seen) -> Tensor:
        self._check_seen(gram, seen)
        present = seen.mask(gram.device)
        return self._weigh_present(self._read(gram, present), seen, present)

    def _weigh_present(self, gram: Tensor, seen: Seen, present: Tensor | None) -> Tensor:
        with torch.no_grad():
            w = self._weigh(gram.detach(), seen, present)
        return w if present is None else torch.where(present, w, 0.0)

    def _weigh(self, gram: Tensor, seen: Seen, present: Tensor | None) -> Tensor:
        """`[T, T]` float64 with zeros for absent tasks -> `[T]` float64; absent entries are overwritten. `present` is
        `seen.mask`."""
        raise self._lacks("_weigh(gram, seen, present)")

    def state_dict(self) -> dict[str, Any]:
        """The names of the tasks that were ever seen, and tensors with an entry for each; empty before the first step.
        `torch.load(weights_only=True)` reads them."""
        return self._state.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned. Tensors go to the device of the gradients at the next step.

        Raises:
            TypeError, ValueError: not the state of such a method. Nothing has changed then.
        """
        self.check_state(state)
        self._state.load_state_dict(state, type(self).__name__)

    def check_state(self, state: Mapping[str, Any]) -> None:
        self._state.check(state, type(self).__name__)

    def reset(self) -> None:
        """All is as before the first step."""
        self._state.reset()

    def state_tensors(self, names: Sequence[str], device: torch.device) -> list[Tensor]:
        return self._state.tensors(names, device)


class FusedMethod(StatefulMethod):
    """A stateful method of which one op makes the weights and changes the state, in one launch.

    A subclass implements `_weigh` by such an op, which does not look at absent tasks and gives them weight 0.
    """

    def _read(self, gram: Tensor, present: Tensor | None) -> Tensor:
        # as it is: its dtype says how far its entries are rounded
        check_gram(gram)
        if present is not None:
            check_present(present, gram)
        check_gram_values(gram, present)
        return gram

    def _weigh_present(self, gram: Tensor, seen: Seen, present: Tensor | None) -> Tensor:
        with torch.no_grad():
            return self._weigh(gram.detach(), seen, present)
