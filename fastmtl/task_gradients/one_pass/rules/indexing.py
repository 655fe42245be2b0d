"""Functions that pick elements by numbers, masks and slices, or write them back to where they were picked."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmtl.task_gradients.one_pass.rules.agreement import input_axis, joined
from fastmtl.task_gradients.one_pass.rules.owners import along, axis_of_owners, in_row
from fastmtl.task_gradients.one_pass.sample_axis import Axes, Constant, PerSample, SampleAxis, Unknown
from fastmtl.task_gradients.one_pass.task_ids import TaskIds
from fastmtl.task_gradients.one_pass.tensors import SameTensor, nested, version
from fastmtl.task_gradients.one_pass.torch_call import Rule, TorchCall, dims_of

_MERGED = "a part of an axis of samples that are merged with another dimension"


def index_key(index: Tensor) -> tuple[Any, ...]:
    """Tells two indices apart: by their values where that needs no waiting, else only the same tensor is the same."""
    if index.device.type == "cpu" and not torch.compiler.is_compiling():
        return "values", index.dtype, index.shape, index.detach().numpy().tobytes()
    return "index", SameTensor(index), version(index)


def _is_mask(index: Tensor) -> bool:
    return index.dtype in (torch.bool, torch.uint8)


# --- slices and single dimensions


def _indices(where: slice, length: int) -> tuple[int, int, int]:
    """`where.indices(length)` of a slice of a tensor, whose step is positive; dynamo of torch 2.11 can't trace that."""

    def bound(at: Any, default: int) -> int:
        if at is None:
            return default
        at = at if isinstance(at, int) else operator.index(at)
        return max(at + length, 0) if at < 0 else min(at, length)

    return bound(where.start, 0), bound(where.stop, length), 1 if where.step is None else where.step


def sliced(axis: PerSample, where: slice, length: int) -> PerSample | Unknown:
    """The axis of which a slice along it was taken."""
    start, stop, step = _indices(where, length)
    if (start, stop, step) == (0, length, 1):
        return axis
    part = axis.task_ids.part(start, stop) if step == 1 and axis.outer == axis.inner == 1 else None
    if part is not None:
        return axis._replace(task_ids=part)
    if axis.outer != 1 or axis.inner != 1:
        if not axis.task_ids.on_host():
            return Unknown(_MERGED)
        return PerSample(axis.axis, TaskIds.of_rows(axis.positions()[start:stop:step], axis.task_ids.num_rows))
    return axis._replace(task_ids=axis.task_ids.take(slice(start, stop, step), ("slice", start, stop, step)))


def _narrow(call: TorchCall) -> Axes:
    x, axis = call.args[0], input_axis(call)
    if isinstance(axis, Unknown):
        return axis
    dim = dims_of(x, call.argument(1, "dim"))[0]
    start = call.argument(2, "start")
    if dim != axis.axis:
        return axis
    if not isinstance(start, int):
        return Unknown("narrow by a tensor")
    start = start + x.shape[dim] if start < 0 else start
    return sliced(axis, slice(start, start + call.out.shape[dim]), x.shape[dim])


def _select(call: TorchCall) -> Axes:
    axis = input_axis(call)
    if isinstance(axis, Unknown):
        return axis
    dim = dims_of(call.args[0], call.argument(1, "dim"))[0]
    if dim == axis.axis:
        index = call.argument(2, "index")
        return _single(call, axis, index, call.out) if isinstance(index, int) else Unknown("select by a tensor")
    return axis.at(axis.axis - (dim < axis.axis))


def _single(call: TorchCall, axis: PerSample, position: int, out: Tensor) -> SampleAxis:
    """One position of the axis of the samples: all that is there belongs to its task."""
    if not axis.task_ids.on_host() or axis.task_ids.partial or not out.requires_grad:
        return Unknown(f"{call.name} takes single samples")
    return in_row(out, int(axis.positions()[position]), axis.task_ids.num_rows)


# --- index tensors


class _Pick(NamedTuple):
    """An index tensor: the dimension where it begins, of how many it picks, and how many of the result stand before."""

    dim: int
    tensor: Tensor
    width: int
    place: int


def taken(axis: PerSample, index: Tensor, place: int) -> PerSample | Unknown:
    """Samples picked by a mask or by positions, which lie along `place` then."""
    if axis.outer != 1 or axis.inner != 1:
        if not axis.task_ids.on_host():
            return Unknown(_MERGED)
        return PerSample(place, TaskIds.of_rows(axis.positions()[index], axis.task_ids.num_rows))
    return PerSample(place, axis.task_ids.take(index, index_key(index)))


def _masked(axis: PerSample, mask: Tensor, first: int, place: int) -> PerSample | Unknown:
    """Picked by a mask over the axis of the samples and others, which begins at dimension `first`: each keeps its own
    sample's task."""
    if torch.compiler.is_compiling():
        return Unknown("a mask over the axis of the samples and others")
    position = mask.nonzero()[:, axis.axis - first]
    key = ("mask", axis.outer, axis.inner, axis.axis - first, index_key(mask))
    every = axis.task_ids
    if axis.outer != 1 or axis.inner != 1:
        every = TaskIds(axis.positions(), every.num_rows, (*every.key, axis.outer, axis.inner), partial=every.partial)
    return PerSample(place, every.take(position, key))


def _index_select(call: TorchCall) -> Axes:
    x, index = call.args[0], call.argument(2, "index")
    dim = dims_of(x, call.argument(1, "dim"))[0]
    axis = call.axis_of(x)
    if isinstance(axis, PerSample):
        return taken(axis, index, dim) if dim == axis.axis else axis
    # constant rows picked by numbers that belong to samples
    axis = call.axis_of(index)
    if isinstance(axis, PerSample) and dim == 0 and index.dim() == 1:
        return axis.at(dim)
    return Unknown("index_select by samples")


def getitem(call: TorchCall) -> Axes:
    x, index = call.args
    items = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(i, (list, range, bool)) for i in items):
        items = [torch.tensor(i) if isinstance(i, (list, range)) else i for i in items]
    single = [isinstance(i, Tensor) and i.dim() == 0 and i.dtype is not torch.bool for i in items]
    if any(single) and any(isinstance(i, Tensor) and not s for i, s in zip(items, single, strict=True)):
        return Unknown("an index of single numbers in tensors beside other tensors")
    used = sum(i.dim() if isinstance(i, Tensor) and _is_mask(i) else 1
               for i in items if i is not None and i is not Ellipsis and not isinstance(i, bool))  # fmt: skip
    if any(isinstance(i, bool) for i in items):
        return Unknown("indexing by True or False")
    if any(i is Ellipsis for i in items):
        at = next(k for k, i in enumerate(items) if i is Ellipsis)
        items[at : at + 1] = [slice(None)] * (x.dim() - used)
    else:
        items += [slice(None)] * (x.dim() - used)
    axis: SampleAxis = call.axis_of(x)
    if not isinstance(axis, PerSample):
        return _constant_rows(call, items)
    # walk over the dimensions of x; `kept` holds for each dimension of the result the one of x, or None
    dim = 0
    kept: list[int | None] = []
    picks: list[_Pick] = []
    for i in items:
        if i is None:
            kept.append(None)
        elif isinstance(i, slice):
            if dim == axis.axis:
                axis = sliced(axis, i, x.shape[dim])
                if isinstance(axis, Unknown):
                    return axis
            kept.append(dim)
            dim += 1
        elif isinstance(i, Tensor) and not (i.dim() == 0 and i.dtype is not torch.bool):
            width = i.dim() if _is_mask(i) else 1
            picks.append(_Pick(dim, i, width, len(kept)))
            dim += width
        else:
            if dim == axis.axis:
                if not isinstance(i, int) or picks or any(isinstance(k, Tensor) for k in items):
                    return Unknown("an index that takes single samples")
                return _single(call, axis, i, call.results()[0])
            dim += 1
    if not picks:
        return axis.at(kept.index(axis.axis))
    return _picked(call, axis, items, kept, picks)


def _picked(
    call: TorchCall, axis: PerSample, items: list[Any], kept: list[int | None], picks: list[_Pick]
) -> PerSample | Unknown:
    """The axis of `x[items]` with index tensors among the items."""
    x, tensors = call.args[0], [p.tensor for p in picks]
    mine = [p for p in picks if p.dim <= axis.axis < p.dim + p.width]
    width = max(1 if _is_mask(i) else i.dim() for i in tensors)
    # the results of the tensors stand where they stood, if they are neighbours; else in front
    at = [k for k, i in enumerate(items) if isinstance(i, Tensor)]
    adjacent = at == list(range(at[0], at[-1] + 1))
    place = picks[0].place if adjacent else 0
    if not mine:
        if any(call.carries_samples(i) for i in tensors):
            return Unknown("an index that differs from sample to sample, without one along their own axis")
        position = kept.index(axis.axis)
        return axis.at(position + (width if position >= place else 0))
    own = mine[0].tensor
    if mine[0].width != 1 or _is_mask(own):
        if len(picks) == 1 and own.dim() == 1:
            return taken(axis, own, place)
        if len(picks) == 1:
            return _masked(axis, own, mine[0].dim, place)
        return Unknown("a mask over the axis of the samples, beside other index tensors")
    rows, known = x.shape[axis.axis], call.axis_of(own)
    every = isinstance(known, Constant) and known.arange_length == rows == own.numel()  # sample in turn
    if own.dim() == 1 and all(i.dim() <= 1 for i in tensors):
        # each result is picked from the sample that this index names
        if every:
            return axis.at(place)
        if any(i.shape[0] not in (1, own.shape[0]) for i in tensors if i.dim()):
            return Unknown("index tensors of different lengths")
        return taken(axis, own, place)
    # arange(n) in one of several dimensions: x[arange(n)[:, None], positions]
    long = [d for d in range(own.dim()) if own.shape[d] != 1]
    if every and len(long) <= 1:
        behind = own.dim() - long[0] if long else own.dim()
        return axis.at(place + width - behind)
    return Unknown("several index tensors, the one along the axis of the samples not torch.arange of their number")


def _constant_rows(call: TorchCall, items: list[Any]) -> PerSample | Unknown:
    """A constant table indexed by numbers that belong to samples."""
    tensors = [(k, i) for k, i in enumerate(items) if isinstance(i, Tensor)]
    if len(tensors) == 1 and not _is_mask(tensors[0][1]):
        k, index = tensors[0]
        axis = call.axis_of(index)
        before = sum(not isinstance(i, int) for i in items[:k])
        if isinstance(axis, PerSample):
            return axis.at(axis.axis + before)
    return Unknown("a constant indexed by samples in several dimensions")


# --- writing


def _setitem(call: TorchCall) -> Axes:
    """What is known of the tensor that is written into, afterwards."""
    x, index, value = call.args
    before = call.axis_of(x)
    axis = call.axis_of(value) if isinstance(value, Tensor) else None
    if axis is None or isinstance(axis, Constant):
        if isinstance(before, PerSample) or not any(call.carries_samples(i) for i in nested(index)):
            return before
        return Unknown("setitem by samples")
    if isinstance(axis, PerSample) and isinstance(index, Tensor) and axis.task_ids.parent is not None:
        # rows of a part of the batch go back to where they were taken from
        whole = axis.task_ids.parent
        taken = (*whole.key, index_key(index))
        if axis.axis == 0 and index.dim() == 1 and axis.task_ids.key == taken and len(whole) == x.shape[0]:
            if isinstance(before, Constant):
                return PerSample(0, whole)
            if isinstance(before, PerSample) and before.axis == 0 and before.task_ids.key == whole.key:
                return before
    if isinstance(axis, PerSample) and isinstance(before, Constant):
        return _filled(x, index, value, axis)
    if isinstance(axis, PerSample) and isinstance(before, PerSample) and axis.agrees(before):
        picked = getitem(call._replace(name="setitem", args=(x, index), kwargs={}, out=x))
        items = index if isinstance(index, tuple) else (index,)
        plain = all(isinstance(i, (slice, int)) for i in items)
        dims = x.dim() - sum(isinstance(i, int) for i in items)
        right = value.dim() - axis.axis
        if plain and isinstance(picked, PerSample) and picked.agrees(before) and dims - picked.axis == right:
            return before
    return Unknown("writing samples into a tensor by an index can't be followed")


def _filled(x: Tensor, index: Any, value: Tensor, axis: PerSample) -> PerSample | Unknown:
    """Samples written into a constant: a stretch of every sample's part, as when a sequence is shifted."""
    items = list(index) if isinstance(index, tuple) else [index]
    if all(isinstance(i, (slice, int)) or i is Ellipsis for i in items):
        if Ellipsis in items:
            at = items.index(Ellipsis)
            items[at : at + 1] = [slice(None)] * (x.dim() - len(items) + 1)
        items += [slice(None)] * (x.dim() - len(items))
        kept = [d for d, i in enumerate(items) if isinstance(i, slice)]
        position = len(kept) - (value.dim() - axis.axis)
        if position >= 0:
            dim = kept[position]
            if _indices(items[dim], x.shape[dim]) == (0, value.shape[axis.axis], 1) and x.shape[dim] > 1:
                return axis.at(dim)
    return Unknown("writing samples into a tensor by an index that does not keep all of them apart")


# --- gather and its inverses


def _masked_select(call: TorchCall) -> Axes:
    x, mask = call.args[0], call.argument(1, "mask")
    axis = input_axis(call)
    if isinstance(axis, Unknown) or torch.compiler.is_compiling():
        return Unknown("masked_select of what carries no samples, or in a compiled model")
    shape = torch.broadcast_shapes(x.shape, mask.shape)
    dim = axis.axis + len(shape) - x.dim()
    if shape[dim] != x.shape[axis.axis]:
        return Unknown("masked_select of one sample by a mask for several")
    return _masked(axis.at(dim), mask.expand(shape), 0, 0)


def _gather(call: TorchCall) -> Axes:
    x, index = call.args[0], call.argument(2, "index")
    dim = dims_of(x, call.argument(1, "dim"))[0]
    found = joined(call, [x, index])
    if isinstance(found, Unknown):
        return found
    axis = x.dim() - found.right
    if axis == dim:
        return Unknown("gather along the axis of the samples")
    if x.shape[axis] != index.shape[axis]:
        return Unknown("gather by an index of another length than the batch")
    return found.axis.at(axis)


def _scatter(call: TorchCall) -> Axes:
    """Within each sample."""
    x, index = call.args[0], call.argument(2, "index")
    found = joined(call)
    if isinstance(found, Unknown):
        return found
    axis = x.dim() - found.right
    dim = dims_of(x, call.argument(1, "dim"))[0]
    if axis == dim and call.name == "scatter_add":
        return _collected(call, x, index, call.argument(3, "src"), dim)
    if axis == dim or index.shape[axis] != x.shape[axis]:
        return Unknown(f"{call.name} along the axis of the samples")
    return found.axis.at(axis)


def _collected(call: TorchCall, x: Tensor, index: Tensor, source: Tensor, dim: int) -> PerSample | Unknown:
    """Sums of samples at places that an index names, along their own axis: such as losses by task.

    Each place belongs to the task of what arrives there, if that is of one task alone.
    """
    axis, before = call.axis_of(source), call.axis_of(x)
    lost = Unknown(f"{call.name} along the axis of the samples")
    if not isinstance(axis, PerSample) or not axis.task_ids.on_host() or axis.task_ids.partial or axis.axis != dim:
        return lost
    if isinstance(before, PerSample) and (before.axis != dim or before.task_ids.partial):
        return lost
    rows = along(axis.positions(), source.dim(), dim).expand(source.shape)
    if index.dim() < source.dim():  # of index_add
        index = along(index.long(), source.dim(), dim).expand(source.shape)
    elif index.shape != source.shape:
        return Unknown(f"{call.name} of a part of its source")
    low, high = (
        torch.full(x.shape, -1).scatter_reduce(dim, index, rows, reduce, include_self=False)
        for reduce in ("amin", "amax")
    )
    joins = low != high
    if isinstance(before, PerSample):
        own = along(before.positions(), x.dim(), dim).expand(x.shape)
        joins |= (low >= 0) & (low != own)
        low = own
    if bool(joins.any()):
        return Unknown(f"{call.name} joins samples of different tasks")
    return axis_of_owners(low, axis.task_ids.num_rows) or Unknown(f"{call.name} leaves samples in no order")


def _index_add(call: TorchCall) -> Axes:
    """Parts of the batch go back to the samples that they were taken from."""
    x, index, source = call.args[0], call.argument(2, "index"), call.argument(3, "source")
    dim, axis, before = dims_of(x, call.argument(1, "dim"))[0], call.axis_of(source), call.axis_of(x)
    other = Unknown(f"{call.name} of something else than what the same index took from the samples")
    if not isinstance(axis, PerSample) or axis.axis != dim:
        return other
    whole = axis.task_ids.parent
    known = whole is not None and axis.task_ids.key == (*whole.key, index_key(index)) and len(whole) == x.shape[dim]
    if isinstance(before, PerSample):
        known = known and before.axis == dim and before.task_ids.key == whole.key and before.outer * before.inner == 1
    if known:
        return PerSample(dim, whole)
    return _collected(call, x, index, source, dim) if axis.task_ids.on_host() else other


def _embedding(call: TorchCall) -> Axes:
    """Of a constant table."""
    plain = getattr(call.func, "__module__", None) == "torch.nn.functional"
    names = ("input", "weight") if plain else ("indices", "weight")
    index, table = (call.argument(k if plain else 1 - k, n) for k, n in enumerate(names))
    axis = call.axis_of(index)
    if call.carries_samples(table) and table.requires_grad:
        return Unknown("an embedding whose table carries samples")
    return axis if isinstance(axis, PerSample) else Unknown("an embedding of what carries no samples")


RULES: dict[str, Rule] = {
    "narrow": _narrow,
    "select": _select,
    "index_select": _index_select,
    "getitem": getitem,
    "setitem": _setitem,
    "masked_select": _masked_select,
    "gather": _gather,
    "scatter": _scatter,
    "scatter_add": _scatter,
    "index_add": _index_add,
    "embedding": _embedding,
}
