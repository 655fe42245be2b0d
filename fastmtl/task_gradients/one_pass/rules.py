"""How each torch function hands the axis of the samples on. What is not here is unknown, never guessed from a size."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmtl.task_gradients.one_pass.sample_axis import (
    CONST,
    CONSTANT,
    MIXING,
    SAMPLES,
    SUM,
    TOTAL,
    UNKNOWN,
    Same,
    Samples,
    Tag,
    index_key,
    mixing,
    nested,
    unknown,
)
from fastmtl.task_gradients.one_pass.torch_names import (
    ALONG,
    BATCH_FIRST,
    LINEAR,
    LOSSES,
    POINTWISE,
    REDUCTIONS,
    SPATIAL,
)

Get = Callable[[Any], Tag]


def argument(args: Sequence[Any], kwargs: dict[str, Any], position: int, name: str, default: Any = None) -> Any:
    return args[position] if len(args) > position else kwargs.get(name, default)


def tag_of_result(name: str, args: Any, kwargs: dict[str, Any], out: Any, get: Get) -> Any:
    """The tag of what `name(*args, **kwargs)` returned, or a list of tags for its tensors in turn.

    `get` tells the tags of the arguments, none of which is a parameter with a gradient.
    """
    tags = [get(x) for x in nested((args, kwargs))]
    kinds = {t.kind for t in tags}
    if name == "arange":
        return Tag(CONST, recipe=_arange_length(args, kwargs))
    if name.startswith(("new_", "zeros_like", "ones_like", "empty_like", "full_like", "rand")) and kinds <= {CONST}:
        return CONSTANT
    if name.startswith("new_") or name in ("nonzero", "argwhere"):
        return CONSTANT
    if kinds <= {CONST}:
        return _of_constants(name, tags, out)
    if name == "where" and len(args) + len(kwargs) == 1:  # positions
        return CONSTANT
    if name in ("detach", "data.get") and not kinds & {SAMPLES, UNKNOWN}:
        return CONSTANT
    for t in tags:
        if t.kind == UNKNOWN:
            return t
    for t in tags:
        if t.kind == MIXING:
            return t
    if TOTAL in kinds:
        return _of_totals(name, args, get, SAMPLES in kinds)
    rule = _RULES.get(name)
    if rule is None:
        return unknown(f"{name} can't be followed")
    return rule(name, args, kwargs, out, get)


def _of_constants(name: str, tags: Sequence[Tag], out: Any) -> Tag:
    found = next((t for t in tags if t.why), CONSTANT)
    if found is CONSTANT and len(tags) == 1 and name in _ARANGED and isinstance(out, Tensor):
        known = tags[0].recipe
        return Tag(CONST, recipe=known) if out.numel() == known else CONSTANT
    return found


# an arange stays one, in whatever shape
_ARANGED = frozenset(("getitem", "view", "reshape", "unsqueeze", "to", "long", "int", "contiguous"))


def _of_totals(name: str, args: Any, get: Get, with_samples: bool) -> Tag:
    if with_samples:
        return mixing(f"{name} joins a sum over samples with single ones")
    if name in LINEAR:
        return SUM
    first = args[0] if args else None
    if name == "mul":
        both = [isinstance(x, Tensor) and get(x).kind == TOTAL for x in args[:2]]
        if not all(both):
            return SUM
    if name == "div" and isinstance(first, Tensor) and get(first).kind == TOTAL:
        other = args[1] if len(args) > 1 else None
        if not isinstance(other, Tensor) or get(other).kind == CONST:
            return SUM
    return mixing(f"{name} of a sum over samples is no sum over samples")


# --- helpers


def _arange_length(args: Any, kwargs: dict[str, Any]) -> int | None:
    """Of `arange(n)`, or with a start of 0: n."""
    values = [kwargs[k] for k in ("start", "end", "step") if k in kwargs]
    values = [*args, *values]
    if len(values) == 1:
        return values[0] if isinstance(values[0], int) else None
    start, end, step = [*values, 1][:3]
    return end if start == 0 and step == 1 and isinstance(end, int) else None


def dims_of(x: Tensor, value: Any) -> list[int]:
    """Dimensions as given, from 0 on; None or (): all."""
    n = x.dim()
    if value is None:
        return list(range(n))
    if isinstance(value, int):
        return [value + n if value < 0 else value]
    found = [v + n if v < 0 else v for v in value]
    return found or list(range(n))


def _sizes(values: Sequence[Any]) -> list[int]:
    """Sizes given one by one, or as one list."""
    if len(values) == 1 and isinstance(values[0], (tuple, list, torch.Size)):
        return list(values[0])
    return list(values)


def _first(args: Any, kwargs: dict[str, Any]) -> Tensor:
    if args and isinstance(args[0], Tensor):
        return args[0]
    return nested((args, kwargs))[0]


def aligned(name: str, tensors: Sequence[Tensor], get: Get) -> tuple[Tag, int] | Tag:
    """Of tensors that broadcast against each other: the tag they agree on, and its axis counted from the right."""
    found: Tag | None = None
    right = 0
    for x in tensors:
        t = get(x)
        if t.kind != SAMPLES:
            continue
        mine = x.dim() - t.axis
        if found is None:
            found, right = t, mine
        elif right != mine:
            return unknown(f"{name} joins tensors that carry the samples on different axes")
        elif not found.agrees(t):
            return unknown(f"{name} joins different samples")
    assert found is not None
    return found, right


_COMPARISONS = frozenset(("eq", "ne", "lt", "le", "gt", "ge"))

# --- rules: (name, args, kwargs, out, get) -> tag


def _pointwise(name: str, args: Any, kwargs: Any, out: Any, get: Get) -> Any:
    joined = aligned(name, nested((args, kwargs)), get)
    if isinstance(joined, Tag):
        return joined
    tag, right = joined
    first = nested(out)[0] if nested(out) else None
    if first is None:
        return CONSTANT
    recipe = None
    if name in _COMPARISONS and len(args) == 2 and isinstance(args[1], int) and get(args[0]) is tag:
        recipe = (name, Same(args[0]), 0 if args[0].is_inference() else args[0]._version, args[1])
    return tag._replace(axis=first.dim() - right, recipe=recipe)


def _same(name: str, args: Any, kwargs: Any, out: Any, get: Get) -> Any:
    """One input that carries samples, which keep their axis, counted from the left."""
    return _only(name, args, kwargs, get)


def _only(name: str, args: Any, kwargs: Any, get: Get) -> Tag:
    found = [get(x) for x in nested((args, kwargs))]
    found = [t for t in found if t.kind == SAMPLES]
    for t in found[1:]:
        if t.axis != found[0].axis:
            return unknown(f"{name} joins samples along axis {found[0].axis} with samples along axis {t.axis}")
        if not t.agrees(found[0]):
            return unknown(f"{name} joins different samples")
    return found[0]


def _spatial(name: str, args: Any, kwargs: Any, out: Any, get: Get) -> Any:
    tag = _only(name, args, kwargs, get)
    x = _first(args, kwargs)
    if tag.kind == SAMPLES and tag.axis >= x.dim() - SPATIAL[name]:
        if name == "one_hot":
            return tag
        return mixing(f"{name} works along the axis of the samples")
    return tag


def _batch_first(name: str, args: Any, kwargs: Any, out: Any, get: Get) -> Any:
    tag = _only(name, args, kwargs, get)
    if tag.kind == SAMPLES and tag.axis != 0:
        return unknown(f"{name} takes samples along axis 0, but they lie along axis {tag.axis}")
    return tag


_ELEMENTWISE_LOSSES = frozenset(
    (
        "mse_loss",
        "l1_loss",
        "smooth_l1_loss",
        "huber_loss",
        "kl_div",
        "poisson_nll_loss",
        "soft_margin_loss",
        "hinge_embedding_loss",
        "margin_ranking_loss",
        "gaussian_nll_loss",
        "binary_cross_entropy",
        "binary_cross_entropy_with_logits",
    )
)


def _loss(name: str, args: Any, kwargs: Any, out: Any, get: Get) -> Any:
    x = _first(args, kwargs)
    total = out.dim() == 0 and x.dim() > 0
    if name in _ELEMENTWISE_LOSSES:
        joined = aligned(name, nested((args, kwargs)), get)
        if isinstance(joined, Tag):
            return joined
        return SUM if total else joined[0].at(out.dim() - joined[1])
    tag = _only(name, args, kwargs, get)
    if tag.kind != SAMPLES:
        return tag
    if x.dim() < (3 if name == "ctc_loss" else 2):
        return mixing(f"{name} of a single sample takes the axis of the samples for its classes")
    if tag.axis != (1 if name == "ctc_loss" else 0):
        return unknown(f"{name} takes samples along its first axis, but they lie along axis {tag.axis}")
    return SUM if total else tag.at(0)


def _reduction(name: str, args: Any, kwargs: Any, out: Any, get: Get) -> Any:
    x = _first(args, kwargs)
    if name in ("max", "min") and len(nested(args)) == 2:
        return _pointwise(name, args, kwargs, out, get)
    tag = get(x)
    position = 2 if name in ("norm", "quantile", "nanquantile", "kthvalue") else 1
    dim = argument(args, kwargs, position, "dim", kwargs.get("axis"))
    if name in ("var", "std", "var_mean", "std_mean") and isinstance(dim, bool):  # var(unbiased)
        dim = None
    dims = dims_of(x, dim)
    if x.dim() == 0:
        return tag
    if name in ("quantile", "nanquantile") and isinstance(argument(args, kwargs, 1, "q"), Tensor):
        return unknown(f"{name} of several q can't be followed")
    if tag.axis in dims:
        if REDUCTIONS[name]:
            return SUM
        return CONSTANT if not _differentiable(out) else mixing(f"{name} over the axis of the samples")
    keep = argument(args, kwargs, position + 1, "keepdim", False)
    if name in ("var", "std", "var_mean", "std_mean") and "keepdim" in kwargs:
        keep = kwargs["keepdim"]
    if keep and isinstance(keep, bool):
        return tag
    return tag.at(tag.axis - sum(d < tag.axis for d in dims))


def _differentiable(out: Any) -> bool:
    return any(x.requires_grad for x in nested(out))


def _along(name: str, args: Any, kwargs: Any, out: Any, get: Get) -> Any:
    x = _first(args, kwargs)
    if name in ("cosine_similarity", "pairwise_distance"):
        joined = aligned(name, nested((args, kwargs)), get)
        if isinstance(joined, Tag):
            return joined
        tag, right = joined
        wide = max(nested((args, kwargs)), key=lambda v: v.dim())
        if name == "pairwise_distance":
            if right == 1:
                return mixing(f"{name} over the axis of the samples")
            return tag.at(wide.dim() - right)
        dim = dims_of(wide, argument(args, kwargs, 2, "dim", 1))[0]
        before = wide.dim() - right
        return mixing(f"{name} over the axis of the samples") if before == dim else tag.at(before - (dim < before))
    tag = get(x)
    positions = {"topk": 2, "normalize": 2, "gumbel_softmax": 4, "diff": 2, "glu": 1}
    defaults = {"normalize": 1, "flip": None, "msort": 0, "softmax": None, "log_softmax": None}
    dim = argument(args, kwargs, positions.get(name, 1), "dim", kwargs.get("dims", defaults.get(name, -1)))
    if name == "flip":
        dim = _sizes(args[1:]) if len(args) > 1 else kwargs.get("dims")
    if dim is None or isinstance(dim, torch.dtype):
        return unknown(f"{name} without dim can't be followed")
    if tag.axis in dims_of(x, dim):
        return mixing(f"{name} along the axis of the samples")
    return tag


def _view(name: str, args: Any, kwargs: Any, out: Any, get: Get) -> Any:
    x = _first(args, kwargs)
    if name == "view" and len(args) > 1 and isinstance(args[1], torch.dtype):
        return unknown("view as another dtype can't be followed")
    return reshaped(name, x.shape, get(x), out.shape)


def reshaped(name: str, before: Sequence[int], tag: Tag, after: Sequence[int]) -> Tag:
    """The tag after the elements of a tensor were laid out anew in the same order."""
    if tag.kind != SAMPLES:
        return tag
    n = len(tag.samples)
    total_outer = math.prod(before[: tag.axis]) * tag.outer
    total_inner = math.prod(before[tag.axis + 1 :]) * tag.inner
    if total_outer * n * total_inner == 0:
        return unknown(f"{name} of an empty tensor can't be followed")
    if list(after[: tag.axis + 1]) == list(before[: tag.axis + 1]):
        return tag
    if n == 1:
        return _reshaped_one(before, tag, after)
    # the samples are the stretch of memory order from total_inner on: one dimension must hold it whole
    inner = 1
    for axis in range(len(after) - 1, -1, -1):
        size = after[axis]
        if total_inner % inner == 0 and (inner * size) % (total_inner * n) == 0:
            here = total_inner // inner
            return tag._replace(axis=axis, outer=size // (here * n), inner=here)
        inner *= size
    return unknown(f"{name} from {list(before)} to {list(after)} takes the axis of the samples apart")


def _reshaped_one(before: Sequence[int], tag: Tag, after: Sequence[int]) -> Tag:
    """A batch of one sample: all elements are its own, and any dimension of size 1 may stand for it."""
    for axis in [tag.axis, *range(len(after))]:
        if axis < len(after) and after[axis] == 1:
            return tag._replace(axis=axis, outer=1, inner=1)
    if len(after) == 0:
        return SUM
    return tag._replace(axis=0, outer=1, inner=after[0])


def _transpose(name: str, args: Any, kwargs: Any, out: Any, get: Get) -> Any:
    x = args[0]
    tag = get(x)
    a, b = argument(args, kwargs, 1, "dim0"), argument(args, kwargs, 2, "dim1")
    if a is None:
        a, b = kwargs.get("axis0"), kwargs.get("axis1")
    a, b = dims_of(x, a)[0], dims_of(x, b)[0]
    return tag.at({a: b, b: a}.get(tag.axis, tag.axis))


def _t(name: str, args: Any, kwargs: Any, out: Any, get: Get) -> Any:
    x = args[0]
    tag = get(x)
    if x.dim() < 2:
        return tag
    last = x.dim() - 1
    if name in ("mT.get", "mH.get", "adjoint", "t", "H.get"):
        return tag.at({last: last - 1, last - 1: last}.get(tag.axis, tag.axis))
    return tag.at(last - tag.axis)  # T reverses all


def _permute(name: str, args: Any, kwargs: Any, out: Any, get: Get) -> Any:
    x = args[0]
    dims = _sizes(args[1:]) if len(args) > 1 else list(kwargs["dims"])
    return get(x).at([d % x.dim() for d in dims].index(get(x).axis))


def _movedim(name: str, args: Any, kwargs: Any, out: Any, get: Get) -> Any:
    x = args[0]
    source = dims_of(x, argument(args, kwargs, 1, "source"))
    target = dims_of(x, argument(args, kwargs, 2, "destination"))
    order = [d for d in range(x.dim()) if d not in source]
    for t, s in sorted(zip(target, source, strict=True)):
        order.insert(t, s)
    return get(x).at(order.index(get(x).axis))


def _unsqueeze(name: str, args: Any, kwargs: Any, out: Any, get: Get) -> Any:
    x = args[0]
    dim = argument(args, kwargs, 1, "dim")
    dim = dim + x.dim() + 1 if dim < 0 else dim
    return get(x).at(get(x).axis + (dim <= get(x).axis))


def _squeeze(name: str, args: Any, kwargs: Any, out: Any, get: Get) -> Any:
    x = args[0]
    tag = get(x)
    dim = argument(args, kwargs, 1, "dim")
    gone = [d for d in dims_of(x, dim) if x.shape[d] == 1]
    if tag.axis in gone:
        return _reshaped_one(x.shape, tag, out.shape) if len(tag.samples) == 1 else unknown("squeeze")
    return tag.at(tag.axis - sum(d < tag.axis for d in gone))


def _expand(name: str, args: Any, kwargs: Any, out: Any, get: Get) -> Any:
    x = args[0]
    tag = get(x)
    if tag.kind != SAMPLES:  # expand_as something that carries samples
        return CONSTANT
    axis = tag.axis + out.dim() - x.dim()
    if out.shape[axis] != x.shape[tag.axis]:
        return tag._replace(axis=axis, inner=tag.inner * out.shape[axis])  # one sample, several times
    return tag.at(axis)


def _repeat(name: str, args: Any, kwargs: Any, out: Any, get: Get) -> Any:
    x = args[0]
    tag = get(x)
    times = _sizes(args[1:]) if len(args) > 1 else list(kwargs.get("repeats", kwargs.get("dims", ())))
    times = [1] * (x.dim() - len(times)) + list(times)
    axis = tag.axis + len(times) - x.dim()
    return tag._replace(axis=axis, outer=tag.outer * times[axis])


def _repeat_interleave(name: str, args: Any, kwargs: Any, out: Any, get: Get) -> Any:
    x = args[0]
    tag = get(x)
    times, dim = argument(args, kwargs, 1, "repeats"), argument(args, kwargs, 2, "dim")
    if not isinstance(times, int) or dim is None:
        return unknown("repeat_interleave by a tensor, or without dim, can't be followed")
    return tag._replace(inner=tag.inner * times) if dims_of(x, dim)[0] == tag.axis else tag


def _cat(name: str, args: Any, kwargs: Any, out: Any, get: Get) -> Any:
    parts = list(argument(args, kwargs, 0, "tensors"))
    # empty 1-D tensors are skipped by torch
    parts = [x for x in parts if x.dim() == out.dim()]
    dim = {"hstack": min(1, out.dim() - 1), "vstack": 0, "dstack": 2}.get(name)
    if dim is None:
        dim = argument(args, kwargs, 1, "dim", kwargs.get("axis", 0))
    dim = dim % out.dim()
    joined = aligned(name, parts, get)
    if isinstance(joined, Tag) or out.dim() - joined[1] != dim:
        if not isinstance(joined, Tag):
            return joined[0].at(out.dim() - joined[1])
        tags = [get(x) for x in parts]
        if not all(t.kind == SAMPLES and t.axis == dim for t in tags):
            return joined
    tags = [get(x) for x in parts]
    if not all(t.kind == SAMPLES and t.axis == dim for t in tags):
        return unknown("cat along the axis of the samples with something that carries none")
    if any(t.outer != 1 or t.inner != tags[0].inner for t in tags):
        return unknown("cat along an axis of samples that are merged with another dimension")
    return Tag(SAMPLES, dim, Samples.join([t.samples for t in tags]), 1, tags[0].inner)


def _stack(name: str, args: Any, kwargs: Any, out: Any, get: Get) -> Any:
    parts = list(argument(args, kwargs, 0, "tensors"))
    joined = aligned(name, parts, get)
    if isinstance(joined, Tag):
        return joined
    dim = argument(args, kwargs, 1, "dim", 0)
    dim = dim + out.dim() if dim < 0 else dim
    axis = parts[0].dim() - joined[1]
    return joined[0].at(axis + (dim <= axis))


def _pieces(name: str, args: Any, kwargs: Any, out: Any, get: Get) -> Any:
    """split, chunk, tensor_split, unbind."""
    x = args[0]
    tag = get(x)
    dim = argument(args, kwargs, 1 if name == "unbind" else 2, "dim", 0)
    dim = dims_of(x, dim)[0]
    if name == "unbind":
        if dim == tag.axis:
            return unknown("unbind takes the axis of the samples apart")
        return tag.at(tag.axis - (dim < tag.axis))
    if dim != tag.axis:
        return tag
    found, start = [], 0
    for piece in out:
        found.append(_slice(tag, slice(start, start + piece.shape[dim], 1), x.shape[dim]))
        start += piece.shape[dim]
    return found


def _indices(where: slice, length: int) -> tuple[int, int, int]:
    """`where.indices(length)` of a slice of a tensor, whose step is positive; dynamo of torch 2.11 can't trace that."""

    def bound(at: Any, default: int) -> int:
        if at is None:
            return default
        at = at if isinstance(at, int) else operator.index(at)
        return max(at + length, 0) if at < 0 else min(at, length)

    return bound(where.start, 0), bound(where.stop, length), 1 if where.step is None else where.step


def _slice(tag: Tag, where: slice, length: int) -> Tag:
    start, stop, step = _indices(where, length)
    if (start, stop, step) == (0, length, 1):
        return tag
    part = tag.samples.part(start, stop) if step == 1 and tag.outer == tag.inner == 1 else None
    if part is not None:
        return tag._replace(samples=part)
    if tag.outer != 1 or tag.inner != 1:
        return unknown("a part of an axis of samples that are merged with another dimension")
    samples = tag.samples.take(slice(start, stop, step), ("slice", start, stop, step))
    return tag._replace(samples=samples)


def _narrow(name: str, args: Any, kwargs: Any, out: Any, get: Get) -> Any:
    x, tag = args[0], get(args[0])
    dim = dims_of(x, argument(args, kwargs, 1, "dim"))[0]
    start = argument(args, kwargs, 2, "start")
    if dim != tag.axis:
        return tag
    if not isinstance(start, int):
        return unknown("narrow by a tensor")
    start = start + x.shape[dim] if start < 0 else start
    return _slice(tag, slice(start, start + out.shape[dim]), x.shape[dim])


def _select(name: str, args: Any, kwargs: Any, out: Any, get: Get) -> Any:
    x, tag = args[0], get(args[0])
    dim = dims_of(x, argument(args, kwargs, 1, "dim"))[0]
    if dim == tag.axis:
        return unknown("select takes single samples")
    return tag.at(tag.axis - (dim < tag.axis))


def _index_select(name: str, args: Any, kwargs: Any, out: Any, get: Get) -> Any:
    x, index = args[0], argument(args, kwargs, 2, "index")
    dim = dims_of(x, argument(args, kwargs, 1, "dim"))[0]
    if get(x).kind != SAMPLES:
        # constant rows picked by numbers that belong to samples
        return get(index).at(dim) if dim == 0 and index.dim() == 1 else unknown("index_select by samples")
    return _taken(get(x), index, get) if dim == get(x).axis else get(x)


def _taken(tag: Tag, index: Tensor, get: Get) -> Tag:
    """Samples picked by a mask or by positions."""
    if tag.outer != 1 or tag.inner != 1:
        return unknown("a part of an axis of samples that are merged with another dimension")
    return tag._replace(samples=tag.samples.take(index, index_key(index, get(index))), recipe=None)


def _getitem(name: str, args: Any, kwargs: Any, out: Any, get: Get) -> Any:
    x, index = args[0], args[1]
    items = list(index) if isinstance(index, tuple) else [index]
    tag = get(x)
    if any(isinstance(i, (list, range, bool)) for i in items):
        items = [torch.tensor(i) if isinstance(i, (list, range)) else i for i in items]
    single = [isinstance(i, Tensor) and i.dim() == 0 and i.dtype is not torch.bool for i in items]
    if any(single) and any(isinstance(i, Tensor) and not s for i, s in zip(items, single, strict=True)):
        return unknown("an index of single numbers in tensors beside other tensors")
    used = sum(i.dim() if isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) else 1
               for i in items if i is not None and i is not Ellipsis and not isinstance(i, bool))  # fmt: skip
    if any(isinstance(i, bool) for i in items):
        return unknown("indexing by True or False")
    if any(i is Ellipsis for i in items):
        at = next(k for k, i in enumerate(items) if i is Ellipsis)
        items[at : at + 1] = [slice(None)] * (x.dim() - used)
    else:
        items += [slice(None)] * (x.dim() - used)
    if tag.kind != SAMPLES:
        return _constant_rows(x, items, get)
    # walk over the dimensions of x; `kept` holds for each dimension of the result the one of x, or None
    dim, kept, advanced = 0, [], []
    for i in items:
        if i is None:
            kept.append(None)
        elif isinstance(i, slice):
            if dim == tag.axis:
                tag = _slice(tag, i, x.shape[dim])
                if tag.kind != SAMPLES:
                    return tag
            kept.append(dim)
            dim += 1
        elif isinstance(i, Tensor) and not (i.dim() == 0 and i.dtype is not torch.bool):
            width = i.dim() if i.dtype in (torch.bool, torch.uint8) else 1
            advanced.append((dim, i, width, len(kept)))
            dim += width
        else:
            if dim == tag.axis:
                return unknown("an index that takes single samples")
            dim += 1
    if not advanced:
        return tag.at(kept.index(tag.axis))
    return _advanced(x, tag, items, kept, advanced, get)


def _advanced(x: Tensor, tag: Tag, items: list[Any], kept: list[Any], advanced: list[Any], get: Get) -> Tag:
    tensors = [i for _, i, _, _ in advanced]
    mine = [a for a in advanced if a[0] <= tag.axis < a[0] + a[2]]
    width = max(1 if i.dtype in (torch.bool, torch.uint8) else i.dim() for i in tensors)
    # the results of the tensors stand where they stood, if they are neighbours; else in front
    at = [k for k, i in enumerate(items) if isinstance(i, Tensor)]
    adjacent = at == list(range(at[0], at[-1] + 1))
    place = advanced[0][3] if adjacent else 0
    if not mine:
        if any(get(i).kind == SAMPLES for i in tensors):
            return unknown("an index that differs from sample to sample, without one along their own axis")
        position = kept.index(tag.axis)
        return tag.at(position + (width if position >= place else 0))
    own = mine[0][1]
    if mine[0][2] != 1 or own.dtype in (torch.bool, torch.uint8):
        if len(advanced) == 1 and own.dim() == 1:
            return _taken(tag, own, get).at(place)
        return unknown("a mask over the axis of the samples and others")
    if own.dim() == 1 and all(i.dim() <= 1 for i in tensors):
        # each result is picked from the sample that this index names
        rows = x.shape[tag.axis]
        known = get(own)
        if known.kind == CONST and known.recipe == rows == own.numel():
            return tag.at(place)
        if any(i.shape[0] not in (1, own.shape[0]) for i in tensors if i.dim()):
            return unknown("index tensors of different lengths")
        return _taken(tag, own, get).at(place)
    # arange(n) in one of several dimensions: x[arange(n)[:, None], positions]
    rows = x.shape[tag.axis]
    long = [d for d in range(own.dim()) if own.shape[d] != 1]
    if get(own).kind == CONST and get(own).recipe == rows and own.numel() == rows and len(long) <= 1:
        behind = own.dim() - long[0] if long else own.dim()
        return tag.at(place + width - behind)
    return unknown("several index tensors, the one along the axis of the samples not torch.arange of their number")


def _constant_rows(x: Tensor, items: list[Any], get: Get) -> Tag:
    """A constant table indexed by numbers that belong to samples."""
    tensors = [(k, i) for k, i in enumerate(items) if isinstance(i, Tensor)]
    if len(tensors) == 1 and tensors[0][1].dtype not in (torch.bool, torch.uint8):
        k, index = tensors[0]
        before = sum(not isinstance(i, int) for i in items[:k])
        return get(index).at(get(index).axis + before)
    return unknown("a constant indexed by samples in several dimensions")


def _setitem(name: str, args: Any, kwargs: Any, out: Any, get: Get) -> Any:
    """The tag that the tensor written into has afterwards."""
    x, index, value = args
    before = get(x)
    if not isinstance(value, Tensor) or get(value).kind == CONST:
        return before if before.kind == SAMPLES else _masked(before, index, get)
    tag = get(value)
    if tag.kind == SAMPLES and isinstance(index, Tensor) and tag.samples.parent is not None:
        # rows of a part of the batch go back to where they were taken from
        whole = tag.samples.parent
        taken = (*whole.key, index_key(index, get(index)))
        if tag.axis == 0 and index.dim() == 1 and tag.samples.key == taken and len(whole) == x.shape[0]:
            if before.kind == CONST:
                return Tag(SAMPLES, 0, whole)
            if before.kind == SAMPLES and before.axis == 0 and before.samples.key == whole.key:
                return before
    if before.kind == CONST and tag.kind == SAMPLES:
        return _filled(x, index, value, tag)
    if before.kind == SAMPLES and tag.kind == SAMPLES and tag.agrees(before):
        picked = _getitem("setitem", (x, index), {}, x, get)
        items = index if isinstance(index, tuple) else (index,)
        plain = all(isinstance(i, (slice, int)) for i in items)
        dims = x.dim() - sum(isinstance(i, int) for i in items)
        if plain and picked.kind == SAMPLES and picked.agrees(before) and dims - picked.axis == value.dim() - tag.axis:
            return before
    return unknown("writing samples into a tensor by an index can't be followed")


def _filled(x: Tensor, index: Any, value: Tensor, tag: Tag) -> Tag:
    """Samples written into a constant: a stretch of every sample's part, as when a sequence is shifted."""
    items = list(index) if isinstance(index, tuple) else [index]
    if all(isinstance(i, (slice, int)) or i is Ellipsis for i in items):
        if Ellipsis in items:
            at = items.index(Ellipsis)
            items[at : at + 1] = [slice(None)] * (x.dim() - len(items) + 1)
        items += [slice(None)] * (x.dim() - len(items))
        kept = [d for d, i in enumerate(items) if isinstance(i, slice)]
        position = len(kept) - (value.dim() - tag.axis)
        if position >= 0:
            axis = kept[position]
            if _indices(items[axis], x.shape[axis]) == (0, value.shape[tag.axis], 1) and x.shape[axis] > 1:
                return tag.at(axis)
    return unknown("writing samples into a tensor by an index that does not keep all of them apart")


def _masked(before: Tag, index: Any, get: Get) -> Tag:
    return before if all(get(i).kind != SAMPLES for i in nested(index)) else unknown("setitem by samples")


def factors(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Of a product, left and right."""
    a = args[0] if args else kwargs["input"]
    b = args[1] if len(args) > 1 else next(kwargs[k] for k in ("other", "mat2", "vec", "vec2", "tensor") if k in kwargs)
    return (b, a) if name == "rmatmul" else (a, b)


def _matmul(name: str, args: Any, kwargs: Any, out: Any, get: Get) -> Any:
    a, b = factors(name, args, kwargs)
    ta, tb = get(a), get(b)
    if ta.kind == SAMPLES and tb.kind == SAMPLES:
        if ta.axis == a.dim() - 1 and tb.axis == max(b.dim() - 2, 0) and ta.agrees(tb) and max(a.dim(), b.dim()) <= 2:
            return SUM  # over the samples, of products of each one's own
        if a.dim() < 3 or b.dim() < 3 or ta.axis >= a.dim() - 2 or tb.axis >= b.dim() - 2:
            return mixing("a product of samples with samples")
        joined = aligned("matmul", [a, b], get)
        return joined if isinstance(joined, Tag) else joined[0].at(out.dim() - joined[1])
    x, tag, left = (a, ta, True) if ta.kind == SAMPLES else (b, tb, False)
    contracted = x.dim() - 1 if left or x.dim() == 1 else x.dim() - 2
    if tag.axis == contracted:
        return SUM
    right = x.dim() - tag.axis
    other = b if left else a
    gone = other.dim() == 1 and right > 1  # a vector takes a dimension behind the samples with it
    if x.dim() == 1 and other.dim() > 1:
        return tag.at(out.dim() - 1)
    # rows of the left factor stay rows, columns of the right one stay columns
    return tag.at(out.dim() - right + gone)


def _einsum(name: str, args: Any, kwargs: Any, out: Any, get: Get) -> Any:
    equation, operands = args[0], nested(args[1:])
    if not isinstance(equation, str) or "." in equation:
        return unknown("einsum with an ellipsis or in its list form can't be followed")
    equation = equation.replace(" ", "")
    left, _, result = equation.partition("->")
    if "->" not in equation:
        letters = left.replace(",", "")
        result = "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    letters = {}
    for term, x in zip(left.split(","), operands, strict=True):
        if get(x).kind == SAMPLES:
            letters[term[get(x).axis]] = get(x)
    if len(letters) != 1:
        return mixing("einsum of samples along several letters")
    letter, tag = next(iter(letters.items()))
    several = [get(x) for x in operands if get(x).kind == SAMPLES]
    if not all(t.agrees(tag) for t in several):
        return unknown("einsum joins different samples")
    if letter in result:
        return tag.at(result.index(letter))
    return SUM


def _pad(name: str, args: Any, kwargs: Any, out: Any, get: Get) -> Any:
    x = _first(args, kwargs)
    tag = get(x)
    widths = argument(args, kwargs, 1, "pad")
    last = x.dim() - len(widths) // 2
    if tag.axis >= last and any(widths[2 * (x.dim() - 1 - tag.axis) :][:2]):
        return unknown("pad along the axis of the samples")
    return tag


def _gather(name: str, args: Any, kwargs: Any, out: Any, get: Get) -> Any:
    x, index = args[0], argument(args, kwargs, 2, "index")
    dim = dims_of(x, argument(args, kwargs, 1, "dim"))[0]
    joined = aligned(name, [x, index], get)
    if isinstance(joined, Tag):
        return joined
    tag, right = joined
    axis = x.dim() - right
    if axis == dim:
        return unknown("gather along the axis of the samples")
    if x.shape[axis] != index.shape[axis]:
        return unknown("gather by an index of another length than the batch")
    return tag.at(axis)


def _scatter(name: str, args: Any, kwargs: Any, out: Any, get: Get) -> Any:
    """Within each sample."""
    x = args[0]
    joined = aligned(name, nested((args, kwargs)), get)
    if isinstance(joined, Tag):
        return joined
    tag, right = joined
    axis, index = x.dim() - right, argument(args, kwargs, 2, "index")
    if axis == dims_of(x, argument(args, kwargs, 1, "dim"))[0] or index.shape[axis] != x.shape[axis]:
        return unknown(f"{name} along the axis of the samples")
    return tag.at(axis)


def _index_add(name: str, args: Any, kwargs: Any, out: Any, get: Get) -> Any:
    """Parts of the batch go back to the samples that they were taken from."""
    x, index, source = args[0], argument(args, kwargs, 2, "index"), argument(args, kwargs, 3, "source")
    dim, tag, before = dims_of(x, argument(args, kwargs, 1, "dim"))[0], get(source), get(x)
    whole = tag.samples.parent if tag.kind == SAMPLES else None
    if whole is None or tag.axis != dim or tag.samples.key != (*whole.key, index_key(index, get(index))):
        return unknown(f"{name} of something else than what the same index took from the samples")
    if before.kind == SAMPLES and (before.axis != dim or before.samples.key != whole.key):
        return unknown(f"{name} into other samples")
    return Tag(SAMPLES, dim, whole)


def _embedding(name: str, args: Any, kwargs: Any, out: Any, get: Get) -> Any:
    """Of a constant table."""
    tensors = [x for x in nested((args, kwargs)) if get(x).kind == SAMPLES]
    return get(tensors[0])


def _channelwise(name: str, args: Any, kwargs: Any, out: Any, get: Get) -> Any:
    """Layers whose weights carry no gradient: samples lie along axis 0."""
    x = _first(args, kwargs)
    if name.startswith("conv") and name[-1] == "d" and x.dim() == int(name[-2]) + 1:
        return mixing(f"{name} of a single sample takes the axis of the samples for its channels")
    return _batch_first(name, args, kwargs, out, get)


def _linear(name: str, args: Any, kwargs: Any, out: Any, get: Get) -> Any:
    tag = _only(name, args, kwargs, get)
    if tag.kind == SAMPLES and tag.axis == _first(args, kwargs).dim() - 1:
        return mixing(f"{name} over the axis of the samples")
    return tag


def _layer_norm(name: str, args: Any, kwargs: Any, out: Any, get: Get) -> Any:
    x = _first(args, kwargs)
    tag = get(x)
    shape = argument(args, kwargs, 1, "normalized_shape")
    width = 1 if isinstance(shape, int) else len(shape)
    if tag.kind == SAMPLES and tag.axis >= x.dim() - width:
        return mixing(f"{name} over the axis of the samples")
    return tag


def _batch_norm(name: str, args: Any, kwargs: Any, out: Any, get: Get) -> Any:
    tag = _batch_first(name, args, kwargs, out, get)
    training = argument(args, kwargs, 5, "training", False)
    if tag.kind == SAMPLES and training:
        return mixing(f"{name} in training mode takes its statistics over the whole batch")
    return tag


def _recurrent(name: str, args: Any, kwargs: Any, out: Any, get: Get) -> Any:
    """lstm, gru, rnn: outputs as the input, states `[layers, n, hidden]`."""
    x = args[0]
    tag = get(x)
    if len(args) < 9 or x.dim() != 3:
        return unknown(f"{name} of packed sequences can't be followed")
    first = bool(args[8])
    if tag.kind == SAMPLES and tag.axis != (0 if first else 1):
        return mixing(f"{name} runs along the axis of the samples")
    return [tag, *[tag.at(1)] * (len(nested(out)) - 1)]


def _unfold(name: str, args: Any, kwargs: Any, out: Any, get: Get) -> Any:
    x, tag = args[0], get(args[0])
    if len(nested(out)) and isinstance(argument(args, kwargs, 3, "step"), int) and nested(out)[0].dim() == x.dim() + 1:
        # Tensor.unfold(dimension, size, step)
        if dims_of(x, argument(args, kwargs, 1, "dimension"))[0] == tag.axis:
            return mixing("unfold along the axis of the samples")
        return tag
    return _batch_first(name, args, kwargs, out, get)


def _roll(name: str, args: Any, kwargs: Any, out: Any, get: Get) -> Any:
    x, tag = args[0], get(args[0])
    dims = argument(args, kwargs, 2, "dims")
    if dims is None or dims == () or tag.axis in dims_of(x, dims):
        return unknown("roll along the axis of the samples")
    return tag


def _baddbmm(name: str, args: Any, kwargs: Any, out: Any, get: Get) -> Any:
    joined = aligned(name, nested((args, kwargs)), get)
    if isinstance(joined, Tag):
        return joined
    if joined[1] < 3:
        return unknown(name)
    return joined[0].at(out.dim() - joined[1])


_RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(POINTWISE, _pointwise),
    **dict.fromkeys(SPATIAL, _spatial),
    **dict.fromkeys(BATCH_FIRST, _batch_first),
    **dict.fromkeys(LOSSES, _loss),
    **dict.fromkeys(REDUCTIONS, _reduction),
    **dict.fromkeys(ALONG, _along),
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as"), _view),
    **dict.fromkeys(("t", "T.get", "mT.get", "H.get", "mH.get", "adjoint"), _t),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    **dict.fromkeys(("repeat", "tile"), _repeat),
    **dict.fromkeys(("cat", "hstack", "vstack"), _cat),
    **dict.fromkeys(("split", "chunk", "tensor_split", "split_with_sizes", "unbind"), _pieces),
    **dict.fromkeys(("matmul", "rmatmul"), _matmul),
    **dict.fromkeys(("lstm", "gru", "rnn"), _recurrent),
    **dict.fromkeys(
        (
            "conv1d",
            "conv2d",
            "conv3d",
            "conv_transpose1d",
            "conv_transpose2d",
            "conv_transpose3d",
            "convolution",
            "prelu",
        ),
        _channelwise,
    ),
    **dict.fromkeys(("layer_norm", "rms_norm", "native_layer_norm"), _layer_norm),
    **dict.fromkeys(("_assert", "_assert_async", "set_", "retain_grad", "resize_as"), _same),
    "transpose": _transpose,
    "permute": _permute,
    "movedim": _movedim,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "repeat_interleave": _repeat_interleave,
    "stack": _stack,
    "narrow": _narrow,
    "select": _select,
    "index_select": _index_select,
    "getitem": _getitem,
    "setitem": _setitem,
    "einsum": _einsum,
    "pad": _pad,
    "gather": _gather,
    "scatter": _scatter,
    "scatter_add": _scatter,
    "index_add": _index_add,
    "embedding": _embedding,
    "linear": _linear,
    "batch_norm": _batch_norm,
    "unfold": _unfold,
    "roll": _roll,
    "baddbmm": _baddbmm,
    "task_plan.default": lambda name, args, kwargs, out, get: CONSTANT,
    **dict.fromkeys(("task_conv2d.default", "task_linear.default", "task_scale_shift.default"), _batch_first),
    "addmm": lambda name, args, kwargs, out, get: _matmul(name, args[1:3], {}, out, get),
}


def is_known(name: str) -> bool:
    return name in _RULES
