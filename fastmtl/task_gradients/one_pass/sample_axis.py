"""What is known of a tensor: which dimension carries the samples of the batch, or what it depends on if none does.

These are named tuples: they are made quickly, and `torch.compile` can trace them. Ask `isinstance` which one it is, and
not `==`: two of different types can be equal as tuples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastmtl.task_gradients.one_pass.task_ids import TaskIds
from fastmtl.task_gradients.one_pass.tensors import nested, replaced, versions

ATTRIBUTE = "_fastmtl_sample_axis"


class Constant(NamedTuple):
    """It depends on no sample and on no parameter with a gradient.

    Attributes:
        arange_length: n, where the elements in turn are 0 to n - 1, as `torch.arange(n)` made them; else None.
        from_samples: why it depends on samples all the same, though without a gradient; empty: it doesn't.
        named: the user has said so by `bank.constant`; a rule never does.
    """

    arange_length: int | None = None
    from_samples: str = ""
    named: bool = False


class Recipe:
    """How tensors were computed from parameters, so that they can be computed again from each task's copies of them.

    Args:
        func: the function that made them.
        args, kwargs: what it was given.
        axes: of each tensor among these what was known of it then: it may be written to since.
        compiling: inside `torch.compile`, where what is written in place can't be told.
    """

    def __init__(self, func: Any, args: Any, kwargs: Any, axes: Sequence[SampleAxis], *, compiling: bool) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self._known = [axis if isinstance(axis, FromParameters) else None for axis in axes]
        self._versions = () if compiling else versions(self._constants())
        self.copies: list[list[Tensor]] | None = None  # for each row of the bank, the tensors of the result

    def sources(self) -> list[tuple[Tensor, FromParameters]]:
        """The tensors among the arguments that come from parameters, and how."""
        tensors = nested((self.args, self.kwargs))
        return [(x, axis) for x, axis in zip(tensors, self._known, strict=True) if axis is not None]

    def _constants(self) -> list[Tensor]:
        tensors = nested((self.args, self.kwargs))
        return [x for x, axis in zip(tensors, self._known, strict=True) if axis is None]

    def still_holds(self) -> bool:
        """Whether nobody has written to its constants."""
        return not self._versions or self._versions == versions(self._constants())

    def again(self, values: Sequence[Tensor]) -> Any:
        """The result from other values of the sources, in their order."""
        known, given = iter(self._known), iter(values)

        def change(x: Tensor) -> Tensor:
            return x if next(known) is None else next(given)

        return self.func(*replaced(self.args, change), **replaced(self.kwargs, change))


class FromParameters(NamedTuple):
    """It was computed from parameters of the bank alone, or is one.

    Attributes:
        recipe: how; None: it is a parameter itself.
        result: which of the recipe's results it is.
        from_data: why it depends on data of which no tasks are known; empty: it doesn't.
    """

    recipe: Recipe | None = None
    result: int = 0
    from_data: str = ""


class PerSample(NamedTuple):
    """Every element belongs to one sample, told by its position on one axis.

    Attributes:
        axis: the dimension. It holds `outer x n x inner` positions, the n samples in the middle: those of dimensions
            that were merged.
        task_ids: of the n samples.
        outer: see `axis`.
        inner: see `axis`.
    """

    axis: int
    task_ids: TaskIds
    outer: int = 1
    inner: int = 1

    def at(self, axis: int) -> PerSample:
        """The same samples along another dimension."""
        return PerSample(axis, self.task_ids, self.outer, self.inner)

    def agrees(self, other: PerSample) -> bool:
        """Whether each position of the axis belongs to the same task in both, apart from where the axis lies.

        That is so if both carry the same samples in the same way. Other samples of the same tasks are as good, where
        the host knows the tasks.
        """
        if self.task_ids.key == other.task_ids.key:
            return self.outer == other.outer and self.inner == other.inner
        if not (self.task_ids.on_host() and other.task_ids.on_host()):
            return False
        return torch.equal(self.positions(), other.positions())

    def positions(self) -> Tensor:
        """The row of the bank that each position of the axis belongs to."""
        return self.task_ids.plan(self.outer, self.inner)[0]


def whole(axis: PerSample, shape: Sequence[int]) -> PerSample:
    """Where a batch of one sample lies in a tensor of this shape: all positions of any dimension are its own."""
    return PerSample(0, axis.task_ids, 1, shape[0])


class SampleSum(NamedTuple):
    """It is a linear sum over samples, such as a loss.

    Attributes:
        row: of the bank, to which all these samples belong, where the host knows it: then whatever is computed from it
            belongs to that row, too. None: they are of several tasks, or nobody knows.
        num_rows: how many rows there are, if `row` is known.
    """

    row: int | None = None
    num_rows: int = 0


class MixedSamples(NamedTuple):
    """It depends on several samples at once in another way than by a sum; `why` names the call."""

    why: str


class Unknown(NamedTuple):
    """It can't be told; `why` says what could not be followed."""

    why: str


SampleAxis: TypeAlias = Constant | FromParameters | PerSample | SampleSum | MixedSamples | Unknown

# of one result; or of the tensors among the results in turn
Axes: TypeAlias = SampleAxis | list[SampleAxis]

CONSTANT = Constant()
PARAMETER = FromParameters()
SAMPLE_SUM = SampleSum()


def reason(axis: SampleAxis) -> str:
    """Why a tensor does not carry one sample at each position, for errors; empty: there is no more to say."""
    if isinstance(axis, (MixedSamples, Unknown)):
        return axis.why
    if isinstance(axis, Constant):
        return axis.from_samples
    return axis.from_data if isinstance(axis, FromParameters) else ""


# dynamo of torch 2.11 loses the fields of a named tuple on its way out of a graph: tensors keep a plain one


def packed(axis: SampleAxis) -> tuple[int, tuple[Any, ...]]:
    """Plain tuples that `unpacked` makes the same axis of."""
    if isinstance(axis, PerSample):
        return 0, tuple(axis)
    if isinstance(axis, Constant):
        return 1, tuple(axis)
    if isinstance(axis, FromParameters):
        return 2, tuple(axis)
    if isinstance(axis, SampleSum):
        return 3, tuple(axis)
    return (4 if isinstance(axis, MixedSamples) else 5), tuple(axis)


def unpacked(which: int, fields: tuple[Any, ...]) -> SampleAxis:
    return _TYPES[which](*fields)


_TYPES = (PerSample, Constant, FromParameters, SampleSum, MixedSamples, Unknown)
