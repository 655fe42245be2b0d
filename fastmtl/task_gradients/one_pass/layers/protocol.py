"""What layers are given and what they answer: the tracker as they see it, weights, and why a call can't be followed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

from torch import Tensor

from fastmtl.task_gradients.one_pass.autograd.rows import STACKED
from fastmtl.task_gradients.one_pass.sample_axis import Axes, FromParameters, PerSample, SampleAxis, reason, whole
from fastmtl.task_gradients.one_pass.task_ids import TaskIds
from fastmtl.task_gradients.one_pass.torch_call import TorchCall


class Unproven(Exception):
    """Why a call can't be followed, though it meets a parameter of the bank."""


class Weight(NamedTuple):
    """A parameter, or what was computed from some, as the functions of `autograd` take it.

    Attributes:
        value: what the layer computes with; None: the layer has no such parameter.
        form: `STACKED`; R, the number of rows; or 0: not in the bank. See `autograd`.
        targets: what receives the rows, in the form that `form` says.
    """

    value: Tensor | None
    form: int
    targets: tuple[Tensor, ...]

    def viewed(self, view: Callable[[Tensor], Tensor]) -> Weight:
        """The same view of the value and of everything that receives its rows."""
        value = view(self.tensor())
        if self.form == STACKED:
            # every row is the value itself, so the view of one is expanded to all
            rows = self.targets[0]
            return Weight(value, self.form, (rows.reshape(rows.shape[0], *value.shape),))
        return Weight(value, self.form, tuple(view(t) for t in self.targets))

    def narrowed(self, axis: int) -> Weight:
        """The first position of an axis alone."""
        shift = 1 if self.form == STACKED else 0
        targets = tuple(t.narrow(axis + shift, 0, 1) for t in self.targets)
        return Weight(self.tensor().narrow(axis, 0, 1), self.form, targets)

    def tensor(self) -> Tensor:
        """The value of a parameter that is there."""
        assert self.value is not None
        return self.value


NO_WEIGHT = Weight(None, 0, ())

# the result of a call, and what is known of it
Followed: TypeAlias = tuple[Any, Axes]


class LayerTracker(Protocol):
    """What a layer may ask of the tracker. Inside `with tracker:` every torch call comes back to it."""

    task_ids: TaskIds

    def axis_of(self, x: Tensor) -> SampleAxis:
        """What is known of a tensor."""
        ...

    def mark(self, x: Tensor, axis: SampleAxis) -> None:
        """Says what is known of a tensor that was made here."""
        ...

    def weight(self, p: Tensor) -> Weight:
        """A parameter in the form that the functions of `autograd` take."""
        ...

    def in_bank(self, x: Tensor) -> bool:
        """Whether it is itself one of the bank's parameters."""
        ...

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """A call as it is; a tensor that it writes into keeps what was known of it."""
        ...

    def follow(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Followed:
        """A call as if the model had made it."""
        ...

    def settled(self, call: TorchCall) -> Axes:
        """What is known of the results of a call that has run: by a rule, or else by experiment."""
        ...

    def meet_shared_statistics(self) -> None:
        """Called where statistics are taken over samples of all tasks; raises unless that was accepted."""
        ...

    def meet_task_statistics(self, y: Tensor, axis: PerSample, order: Tensor, offsets: Tensor) -> Tensor:
        """Called where statistics are taken over each segment of a layer's own plan, with the layer's result.

        Raises unless no segment has samples of several tasks, or that was accepted. Where the host can't see it, it
        sees to it that the update is NaN then, in a compiled graph by the result that it returns.
        """
        ...

    def __enter__(self) -> Any: ...

    def __exit__(self, *error: Any) -> Any: ...


Layer: TypeAlias = Callable[[LayerTracker, TorchCall], Followed]


def follow_one(tracker: LayerTracker, func: Any, *args: Any) -> tuple[Tensor, SampleAxis]:
    """The only result of a call as if the model had made it, marked with what is known of it."""
    out, axis = tracker.follow(func, args, {})
    assert not isinstance(axis, list)
    tracker.mark(out, axis)
    return out, axis


def weight_of(tracker: LayerTracker, p: Tensor | None) -> Weight:
    """As `tracker.weight`, of a parameter that may be missing."""
    return NO_WEIGHT if p is None else tracker.weight(p)


def carries_samples(tracker: LayerTracker, x: Tensor) -> bool:
    return isinstance(tracker.axis_of(x), PerSample)


def from_parameters(tracker: LayerTracker, x: Tensor) -> bool:
    """Whether it is a parameter of the bank, or computed from some."""
    return isinstance(tracker.axis_of(x), FromParameters)


def sample_axis(tracker: LayerTracker, x: Any) -> PerSample:
    """The axis of a layer's input."""
    if not isinstance(x, Tensor):
        raise Unproven("its input is no tensor")
    axis = tracker.axis_of(x)
    if not isinstance(axis, PerSample):
        raise Unproven(reason(axis) or "its input carries no samples")
    return whole(axis, x.shape) if axis.axis != 0 and len(axis.task_ids) == 1 else axis


def first_sample_axis(tracker: LayerTracker, x: Tensor) -> PerSample:
    """The axis of the input of a layer that takes the samples along dimension 0."""
    axis = sample_axis(tracker, x)
    if axis.axis != 0:
        raise Unproven(f"samples along axis {axis.axis}, where they must be first")
    return axis


def plan_of(x: Tensor, axis: PerSample) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, order and offsets of all positions of x from the first dimension to that of the samples."""
    outer = axis.outer
    for size in x.shape[: axis.axis]:
        outer *= size
    return axis.task_ids.plan(outer, axis.inner)
