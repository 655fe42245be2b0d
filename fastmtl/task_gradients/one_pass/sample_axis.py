"""What is known of a tensor: whose samples it carries, on which axis, and which parameters it was made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmtl.ops.task_weights.task_plan import task_plan_op

# kinds of tags, in the words of the errors
CONST = "const"  # depends on no sample and on no parameter with a gradient
PARAM = "param"  # computed from parameters alone
SAMPLES = "samples"  # every element belongs to one sample, told by its position on one axis
TOTAL = "total"  # a linear sum over samples: a loss
MIXING = "mixing"  # depends on several samples at once, in another way
UNKNOWN = "unknown"  # can't be told

ATTRIBUTE = "_fastmtl_tag"


class Same:
    """A tensor in a key: equal to itself alone, and kept, so that no other takes its place in memory."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.x is self.x

    def __hash__(self) -> int:
        return id(self.x)


def index_key(index: Tensor, tag: Tag) -> tuple[Any, ...]:
    """Tells two indices apart: by their values where that needs no waiting, else by how they were made."""
    if index.device.type == "cpu" and not torch.compiler.is_compiling():
        return "values", index.dtype, *index.tolist()
    if tag.kind == SAMPLES and tag.recipe is not None:
        return ("compared", *tag.recipe)
    return "index", Same(index), 0 if index.is_inference() else index._version


class Samples:
    """The task of each sample of a batch, or of a part of it.

    Args:
        ids: `[n]` int64 rows of the bank: 0 to T - 1, or T for samples that belong to no task.
        num_rows: T, or T + 1 where there may be samples without a task.
        key: tells two of these apart: equal keys, equal samples.
        plan: order and offsets of `ids` sorted by row, where that is known already.
        parent: the batch that this is a part of.
        parts: what this was joined from.
    """

    def __init__(
        self,
        ids: Tensor,
        num_rows: int,
        key: tuple[Any, ...],
        plan: tuple[Tensor, Tensor] | None = None,
        parent: Samples | None = None,
        parts: Sequence[Samples] = (),
    ) -> None:
        self.ids = ids
        self.num_rows = num_rows
        self.key = key
        self.parent = parent
        self.parts = tuple(parts)
        self._plans: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
        if plan is not None:
            self._plans[1, 1] = (ids, *plan)

    def __len__(self) -> int:
        return self.ids.shape[0]

    def plan(self, outer: int, inner: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, order and offsets of `outer x n x inner` elements in that order."""
        known = self._plans.get((outer, inner))
        if known is not None:
            return known
        ids = self.ids
        if inner != 1:
            ids = ids[:, None].expand(-1, inner).reshape(-1)
        if outer != 1:
            ids = ids[None].expand(outer, -1).reshape(-1)
        made = (ids, *task_plan_op(ids, self.num_rows))
        if not torch.compiler.is_compiling():  # a graph that wrote here would not fit the next call
            self._plans[outer, inner] = made
        return made

    def take(self, index: Any, key: Any) -> Samples:
        """The part of the samples that an index of the first axis picks."""
        return Samples(self.ids[index], self.num_rows, (*self.key, key), parent=self)

    def part(self, start: int, stop: int) -> Samples | None:
        """One of the parts that this was joined from, if it lies there."""
        for part in self.parts:
            if start == 0:
                return part if stop == len(part) else None
            start, stop = start - len(part), stop - len(part)
        return None

    @staticmethod
    def join(parts: Sequence[Samples]) -> Samples:
        parent, end = parts[0].parent, 0
        for p in parts:  # slices that make up what they were taken from
            here = ("slice", end, end + len(p), 1)
            if parent is None or p.parent is None or p.parent.key != parent.key or p.key[-1] != here:
                break
            end += len(p)
        else:
            if parent is not None and end == len(parent):
                return parent
        key = ("joined", *[p.key for p in parts])
        return Samples(torch.cat([p.ids for p in parts]), parts[0].num_rows, key, parts=parts)


class Tag(NamedTuple):
    """What is known of one tensor.

    With `SAMPLES`, `axis` holds `outer x n x inner` positions, the n samples in the middle: those of merged dimensions.
    """

    kind: str
    axis: int = 0
    samples: Any = None
    outer: int = 1
    inner: int = 1
    # of what is unknown, or mixes samples; of a constant: that it depends on samples; of parameters: on data
    why: str = ""
    # of what was computed from parameters; of `CONST`: the length of an arange; of samples: with what number which
    # tensor was compared
    recipe: Any = None

    def at(self, axis: int) -> Tag:
        return self._replace(axis=axis)

    def agrees(self, other: Tag) -> bool:
        """Whether both carry the same samples in the same way, apart from the position of the axis."""
        return self.samples.key == other.samples.key and self.outer == other.outer and self.inner == other.inner


CONSTANT = Tag(CONST)
SUM = Tag(TOTAL)


def unknown(why: str) -> Tag:
    return Tag(UNKNOWN, why=why)


def mixing(why: str) -> Tag:
    return Tag(MIXING, why=why)


class Recipe:
    """How a tensor was computed from parameters, so that it can be computed again from each task's copies of them.

    Args:
        func: the function that made it; `args` and `kwargs` what it was given.
        args: see `func`.
        kwargs: see `func`.
    """

    def __init__(self, func: Any, args: Any, kwargs: Any) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.versions = () if torch.compiler.is_compiling() else versions((args, kwargs))
        self.twins: list[list[Tensor]] | None = None  # for each row, the tensors of the result


class Computed(NamedTuple):
    """One of the results of a recipe."""

    recipe: Recipe
    pick: int


def nested(values: Any) -> list[Tensor]:
    """The tensors in arguments or results: in lists, tuples and dicts too."""
    found: list[Tensor] = []
    _collect(values, found)
    return found


def versions(values: Any) -> tuple[int, ...]:
    """How often each tensor was written to."""
    return tuple(0 if x.is_inference() else x._version for x in nested(values))


def _collect(value: Any, found: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, (list, tuple)):
        for v in value:
            _collect(v, found)
    elif isinstance(value, dict):
        for v in value.values():
            _collect(v, found)


def replaced(value: Any, change: Any) -> Any:
    """Arguments with every tensor replaced by `change(tensor)`."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        parts = [replaced(v, change) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return [replaced(v, change) for v in value]
    if isinstance(value, dict):
        return {k: replaced(v, change) for k, v in value.items()}
    return value
