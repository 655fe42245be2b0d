"""What runs where parameters of the bank meet samples: the same layer, its weight gradient apart by task."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtl.core.schemas import autocast_is_on
from fastmtl.ops.task_weights.precision import cast_by_autocast
from fastmtl.task_gradients.one_pass import autograd
from fastmtl.task_gradients.one_pass.attention import multi_head_attention
from fastmtl.task_gradients.one_pass.rules import aligned, argument, dims_of, factors, tag_of_result
from fastmtl.task_gradients.one_pass.sample_axis import CONSTANT, PARAM, SAMPLES, Tag, nested, replaced
from fastmtl.task_gradients.one_pass.torch_names import LOSSES, POINTWISE, name_of

if TYPE_CHECKING:
    from fastmtl.task_gradients.one_pass.tracker import Follow


class Weight(NamedTuple):
    """A parameter, or what was computed from some, as the functions of `ops._per_task` take it."""

    value: Tensor | None
    count: int
    targets: tuple[Tensor, ...]

    def viewed(self, view: Callable[[Tensor], Tensor]) -> Weight:
        """The same view of the value and of everything that receives its rows."""
        assert self.value is not None
        if self.count == autograd.STACKED:
            # every row is the value itself, so the view of one is expanded to all
            rows = self.targets[0]
            shape = view(self.value).shape
            return Weight(view(self.value), self.count, (rows.reshape(rows.shape[0], *shape),))
        return Weight(view(self.value), self.count, tuple(view(t) for t in self.targets))


NOTHING = Weight(None, 0, ())


class Unproven(Exception):
    """Why a call can't be followed, though it meets a parameter."""


def call_layer(follow: Follow, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The result and its tag (or tags), of a call that joins parameters of the bank with samples.

    Raises:
        Unproven: no way is known to take the gradients of these parameters apart.
    """
    layer = _LAYERS.get(name)
    if layer is not None:
        return layer(follow, name, func, args, kwargs)
    if name in POINTWISE or name in _BROADCASTS:
        return _broadcast(follow, name, func, args, kwargs)
    if name in LOSSES:
        raise Unproven(
            "an output that carries no samples: was the input made inside the block, or does it carry them along "
            "another dimension than batch_dim"
        )
    raise Unproven(f"{name} is not among the layers that one_pass takes apart")


def _samples_of(follow: Follow, x: Any) -> Tag:
    """The tag of a layer's input."""
    if not isinstance(x, Tensor):
        raise Unproven("its input is no tensor")
    tag = follow.tag(x)
    if tag.kind != SAMPLES:
        raise Unproven(tag.why or "its input carries no samples")
    return tag


# --- broadcasting


def _broadcast(follow: Follow, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Every sample gets its own copy of the parameter (a view), and the function runs as it is."""
    tensors = nested((args, kwargs))
    joined = aligned(name, tensors, follow.tag)
    if isinstance(joined, Tag):
        raise Unproven(joined.why)
    tag, right = joined
    if name in ("cat", "stack"):
        whole = next(x for x in tensors if follow.tag(x).kind == SAMPLES).dim()
        dim = argument(args, kwargs, 1, "dim", 0) % (whole + (name == "stack"))
        if name == "cat" and dim == whole - right:
            raise Unproven("a parameter joins the samples as one more of them")

    def lifted(x: Tensor) -> Tensor:
        return lift(follow, x, right, tag) if follow.tag(x).kind == PARAM else x

    args, kwargs = replaced(args, lifted), replaced(kwargs, lifted)
    out = follow.run(func, args, kwargs)
    return out, tag_of_result(name, args, kwargs, out, follow.tag)


def lift(follow: Follow, p: Tensor, right: int, tag: Tag) -> Tensor:
    """A parameter with an axis of samples, counted from the right: a tensor that carries samples."""
    weight = follow.weight(p)
    if p.dim() < right:
        shape = (1,) * (right - p.dim()) + tuple(p.shape)
        weight = weight.viewed(lambda x: x.reshape(shape))
    value = weight.value
    assert value is not None
    axis = value.dim() - right
    ids, _, _ = tag.samples.plan(tag.outer, tag.inner)
    n = ids.shape[0]
    if value.shape[axis] == n and n > 1:
        if value.stride(axis) == 0:
            # expanded by hand: all samples have the same
            return _expanded(follow, Weight(*_narrowed(weight, axis)), axis, ids, tag)
        if not copied(follow, p, p.dim() - right):
            raise Unproven("its own positions would lie along the axis of the samples")
        out = autograd.PerSample.apply(value, ids, axis, weight.count, tag.samples.num_rows, *weight.targets)
    elif value.shape[axis] == 1:
        return _expanded(follow, weight, axis, ids, tag)
    else:
        raise Unproven(f"a parameter of size {value.shape[axis]} along the axis of {n} samples")
    follow.mark(out, tag.at(axis))
    return out


def copied(follow: Follow, p: Tensor, axis: int) -> bool:
    """Whether all positions of `axis` hold the same, as after `expand` or `repeat` of a parameter."""
    tag = follow.tag(p)
    if p in follow.rows or tag.kind != PARAM:
        return False
    recipe = tag.recipe.recipe
    name, args = name_of(recipe.func), recipe.args
    if name in _COPIES:
        source = axis - (p.dim() - args[0].dim())
        return source < 0 or args[0].shape[source] == 1 or copied(follow, args[0], source)
    if name in ("embedding", "getitem", "index_select"):
        return _same_along(nested((args, recipe.kwargs)), p, axis)
    params = [x for x in nested((args, recipe.kwargs)) if follow.tag(x).kind == PARAM]
    if name in POINTWISE or name in ("where", "masked_fill"):
        # whatever constants there are, every parameter must be spread, or hold the same
        right = p.dim() - axis
        spread = [x for x in params if x.dim() >= right and x.shape[-right] != 1]
        return all(copied(follow, x, x.dim() - right) for x in spread)
    if name not in _KEEP:
        return False
    for x in params:
        for own in range(x.dim()):
            if x.shape[own] != p.shape[axis]:
                continue
            found = tag_of_result(name, args, recipe.kwargs, p, functools.partial(_alone, x, own, follow))
            if isinstance(found, list):
                found = found[tag.recipe.pick]
            if found.kind == SAMPLES and found.axis == axis and found.outer * found.inner == 1:
                return copied(follow, x, own)
    return False


def _same_along(tensors: Sequence[Tensor], picked: Tensor, axis: int) -> bool:
    """Whether a table was asked for the same at every position of an axis of the result."""
    for index in tensors:
        if not index.is_floating_point() and index.shape == picked.shape[: index.dim()] and axis < index.dim():
            # where an index was expanded, nothing needs to be compared
            return index.stride(axis) == 0 or bool((index == index.narrow(axis, 0, 1)).all())
    return False


def _alone(x: Tensor, axis: int, follow: Follow, y: Tensor) -> Tag:
    return Tag(SAMPLES, axis, follow.samples) if y is x else CONSTANT


_COPIES = frozenset(("repeat", "tile", "expand", "expand_as", "broadcast_to"))
# of the rest these keep positions apart, whatever else they are given
_KEEP = frozenset(("view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "flatten", "linear", "layer_norm",
                   "rms_norm", "chunk", "split", "getitem", "softmax", "mT.get"))  # fmt: skip


def _narrowed(weight: Weight, axis: int) -> tuple[Any, int, tuple[Tensor, ...]]:
    one = weight.value.narrow(axis, 0, 1)  # type: ignore[union-attr]
    shift = 1 if weight.count == autograd.STACKED else 0
    return one, weight.count, tuple(t.narrow(axis + shift, 0, 1) for t in weight.targets)


def _expanded(follow: Follow, weight: Weight, axis: int, ids: Tensor, tag: Tag) -> Tensor:
    out = autograd.Expand.apply(weight.value, ids, axis, weight.count, tag.samples.num_rows, *weight.targets)
    follow.mark(out, tag.at(axis))
    return out


# --- linear


def _linear(follow: Follow, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    x, w = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "weight")
    return _affine(follow, x, w, argument(args, kwargs, 2, "bias"), transposed=False)


def _affine(follow: Follow, x: Tensor, w: Tensor, b: Tensor | None, *, transposed: bool) -> tuple[Tensor, Tag]:
    tag = _samples_of(follow, x)
    if w.dim() != 2 or x.dim() < 2 or tag.axis == x.dim() - 1:
        raise Unproven("samples along the last axis, or a weight that is no matrix")
    if follow.tag(w).kind == SAMPLES:
        raise Unproven("a weight that belongs to samples")
    outer = tag.outer
    for size in x.shape[: tag.axis]:
        outer *= size
    ids, order, offsets = tag.samples.plan(outer, tag.inner)
    weight, bias = follow.weight(w), NOTHING if b is None else follow.weight(b)
    y = autograd.Linear.apply(
        x, weight.value, bias.value, ids, order, offsets, tag.axis, transposed, weight.count, bias.count,
        *weight.targets, *bias.targets,
    )  # fmt: skip
    return y, tag


def _addmm(follow: Follow, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    b, x, w = (argument(args, kwargs, k, n) for k, n in enumerate(("input", "mat1", "mat2")))
    if kwargs.get("alpha", 1) != 1 or kwargs.get("beta", 1) != 1:
        raise Unproven("addmm with alpha or beta")
    if follow.tag(x).kind == SAMPLES and follow.tag(b).kind != SAMPLES and b.dim() == 1:
        return _affine(follow, x, w, b, transposed=True)
    y, tag = _matmul(follow, "matmul", torch.matmul, (x, w), {})
    follow.mark(y, tag)
    return follow.call(torch.add, (b, y), {})


def _matmul(follow: Follow, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    a, b = factors(name, args, kwargs)
    left = follow.tag(a).kind == SAMPLES
    x, p = (a, b) if left else (b, a)
    tag = _samples_of(follow, x)
    if left and p.dim() == 2:
        return _affine(follow, x, p, None, transposed=True)
    if left and p.dim() == 1 and x.dim() >= 2:
        weight = follow.weight(p).viewed(lambda v: v.reshape(-1, 1))
        y, tag = _affine_of(follow, x, weight, tag)
        return y.squeeze(-1), tag
    if not left and p.dim() == 2 and x.dim() >= 2 and tag.axis != x.dim() - 2:
        last = x.dim() - 1
        turned, axis = x.mT, {last: last - 1, last - 1: last}.get(tag.axis, tag.axis)
        follow.mark(turned, tag.at(axis))
        y, found = _affine(follow, turned, p, None, transposed=False)
        return y.mT, found.at({last: last - 1, last - 1: last}.get(found.axis, found.axis))
    right = x.dim() - tag.axis
    if p.dim() < 3 or right < 3:
        raise Unproven("a product over the axis of the samples")
    lifted = lift(follow, p, right, tag)
    out = torch.matmul(x, lifted) if left else torch.matmul(lifted, x)
    return out, tag.at(out.dim() - right)


def _affine_of(follow: Follow, x: Tensor, weight: Weight, tag: Tag) -> tuple[Tensor, Tag]:
    if tag.axis == x.dim() - 1:
        raise Unproven("a product over the axis of the samples")
    outer = tag.outer
    for size in x.shape[: tag.axis]:
        outer *= size
    plan = tag.samples.plan(outer, tag.inner)
    y = autograd.Linear.apply(x, weight.value, None, *plan, tag.axis, True, weight.count, 0, *weight.targets)
    return y, tag


def _einsum(follow: Follow, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    equation, operands = args[0], nested(args[1:])
    if not isinstance(equation, str) or "." in equation or "->" not in equation:
        raise Unproven("einsum with an ellipsis, or without a result")
    left, _, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    joined = {term[follow.tag(x).axis]: follow.tag(x) for term, x in zip(terms, operands, strict=True)
              if follow.tag(x).kind == SAMPLES}  # fmt: skip
    if len(joined) != 1:
        raise Unproven("einsum of samples along several letters")
    letter, tag = next(iter(joined.items()))
    if letter not in result:
        raise Unproven("einsum sums over the samples")
    changed = []
    for k, (term, p) in enumerate(zip(terms, operands, strict=True)):
        if follow.tag(p).kind == PARAM:
            if letter in term:
                raise Unproven("a parameter along the letter of the samples")
            terms[k] = letter + term
            p = lift(follow, p, p.dim() + 1, tag)
        changed.append(p)
    out = torch.einsum(f"{','.join(terms)}->{result}", *changed)
    return out, tag.at(result.index(letter))


# --- convolutions


def _conv(follow: Follow, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    transposed = name.startswith("conv_transpose")
    dims = int(name[-2])
    names = ["input", "weight", "bias", "stride", "padding"]
    names += ["output_padding", "groups", "dilation"] if transposed else ["dilation", "groups"]
    defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "output_padding": 0}
    given = {n: argument(args, kwargs, k, n, defaults.get(n)) for k, n in enumerate(names)}
    x, w, b = given["input"], given["weight"], given["bias"]
    tag = _samples_of(follow, x)
    if tag.axis != 0 or x.dim() != dims + 2:
        raise Unproven(f"samples along axis {tag.axis} of an input of {x.dim()} dimensions, where they must be first")

    def many(value: Any) -> list[int]:
        values = [value] if isinstance(value, int) else list(value)
        return values * dims if len(values) == 1 else values

    stride, dilation = many(given["stride"]), many(given["dilation"])
    padding = given["padding"]
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, w.shape[2:], strict=True)]
        padding = [t // 2 for t in total]
        if any(t % 2 for t in total):
            x = F.pad(x, [v for t in reversed(total) for v in (0, t % 2)])
    output_padding = many(given.get("output_padding", 0))
    plan = tag.samples.plan(tag.outer, tag.inner)
    weight, bias = follow.weight(w), NOTHING if b is None else follow.weight(b)
    value, offset = cast_by_autocast(_value(weight)), None if b is None else cast_by_autocast(_value(bias))
    if value.dtype != _value(weight).dtype or x.dtype != value.dtype:
        x = cast_by_autocast(x)
    y = autograd.Conv.apply(
        x, value, offset, *plan, stride, many(padding), dilation, transposed, output_padding, given["groups"],
        weight.count, bias.count, *weight.targets, *bias.targets,
    )  # fmt: skip
    return y, tag


def _value(weight: Weight) -> Tensor:
    assert weight.value is not None
    return weight.value


# --- tables


def _embedding(follow: Follow, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    # F.embedding(input, weight, padding_idx, max_norm, ...); torch.embedding(weight, indices, padding_idx, ...)
    plain = getattr(func, "__module__", None) == "torch.nn.functional"
    if plain:
        index, w = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "weight")
        padding, norm = argument(args, kwargs, 2, "padding_idx"), argument(args, kwargs, 3, "max_norm")
        scale, sparse = (argument(args, kwargs, k, n, False) for k, n in ((5, "scale_grad_by_freq"), (6, "sparse")))
        if norm is not None:
            raise Unproven("an embedding with max_norm, which changes its table")
    else:
        w, index = argument(args, kwargs, 0, "weight"), argument(args, kwargs, 1, "indices")
        padding = argument(args, kwargs, 2, "padding_idx", -1)
        scale, sparse = (argument(args, kwargs, k, n, False) for k, n in ((3, "scale_grad_by_freq"), (4, "sparse")))
    if scale or sparse:
        raise Unproven("an embedding with scale_grad_by_freq or sparse gradients")
    padding = -1 if padding is None else padding + w.shape[0] if padding < 0 and plain else padding
    return _table(follow, w, index, padding)


def _table(follow: Follow, w: Tensor, index: Tensor, padding: int) -> tuple[Tensor, Tag]:
    """`w[index]`, the index carrying samples."""
    tag = _samples_of(follow, index)
    outer = tag.outer
    for size in index.shape[: tag.axis]:
        outer *= size
    ids, _, _ = tag.samples.plan(outer, tag.inner)
    weight = follow.weight(w)
    y = autograd.Embedding.apply(weight.value, index, ids, padding, weight.count, tag.samples.num_rows, *weight.targets)
    return y, tag


def _getitem(follow: Follow, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    w, index = args
    if isinstance(index, tuple) and len(index) == 1:
        index = index[0]
    if not isinstance(index, Tensor) or index.dtype in (torch.bool, torch.uint8) or follow.tag(w).kind != PARAM:
        raise Unproven("a parameter indexed by samples in more than its first dimension")
    if index.dim() == 0:
        raise Unproven("a parameter indexed by a single number")
    return _table(follow, w, index, -1)


def _index_select(follow: Follow, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    w, index = args[0], argument(args, kwargs, 2, "index")
    if follow.tag(w).kind != PARAM or dims_of(w, argument(args, kwargs, 1, "dim"))[0] != 0:
        raise Unproven("a parameter indexed by samples in another than its first dimension")
    return _table(follow, w, index, -1)


# --- norms


def _widened(follow: Follow, x: Tensor) -> Tensor:
    """Norms run in float32 under autocast."""
    kind = x.device.type
    if autocast_is_on(kind) and kind != "cpu":
        return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return x


def _scale_and_shift(w: Tensor | None, b: Tensor | None, follow: Follow) -> tuple[Weight, Weight]:
    return tuple(NOTHING if p is None else follow.weight(p) for p in (w, b))  # type: ignore[return-value]


def _same_dtype(x: Tensor, *weights: Weight) -> bool:
    return all(w.value is None or w.value.dtype == x.dtype for w in weights)


def _layer_norm(follow: Follow, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    x, shape = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "normalized_shape")
    w, b = argument(args, kwargs, 2, "weight"), argument(args, kwargs, 3, "bias")
    eps = argument(args, kwargs, 4, "eps", 1e-5)
    shape = [shape] if isinstance(shape, int) else list(shape)
    tag = _samples_of(follow, x)
    if tag.axis >= x.dim() - len(shape):
        raise Unproven("a norm over the axis of the samples")
    x = _widened(follow, x)
    weight, bias = _scale_and_shift(w, b, follow)
    if not _same_dtype(x, weight, bias):
        plain, found = F.layer_norm(x, shape, None, None, eps), tag
        return _affine_after(follow, plain, found, w, b)
    outer = tag.outer
    for size in x.shape[: tag.axis]:
        outer *= size
    ids, _, _ = tag.samples.plan(outer, tag.inner)
    y = autograd.LayerNorm.apply(
        x, weight.value, bias.value, ids, tag.axis, shape, eps, weight.count, bias.count, tag.samples.num_rows,
        *weight.targets, *bias.targets,
    )  # fmt: skip
    return y, tag


def _affine_after(
    follow: Follow, y: Tensor, tag: Tag, w: Tensor | None, b: Tensor | None, channels: bool = False
) -> tuple[Tensor, Tag]:
    """`y * w + b` by broadcasting, for norms that are not taken apart in one piece; w, b along dimension 1 or last."""
    follow.mark(y, tag)
    for op, p in ((torch.mul, w), (torch.add, b)):
        if p is None:
            continue
        if channels:
            p, found = follow.call(torch.Tensor.reshape, (p, (-1, *(1,) * (y.dim() - 2))), {})
            follow.mark(p, found)
        y, tag = follow.call(op, (y, p), {})
        follow.mark(y, tag)
    return y, tag


def _rms_norm(follow: Follow, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    x, shape = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "normalized_shape")
    w, eps = argument(args, kwargs, 2, "weight"), argument(args, kwargs, 3, "eps")
    tag = _samples_of(follow, x)
    shape = [shape] if isinstance(shape, int) else list(shape)
    if tag.axis >= x.dim() - len(shape):
        raise Unproven("a norm over the axis of the samples")
    return _affine_after(follow, torch.rms_norm(x, shape, None, eps), tag, w, None)


def _first_axis(follow: Follow, x: Tensor) -> Tag:
    tag = _samples_of(follow, x)
    if tag.axis != 0:
        raise Unproven(f"samples along axis {tag.axis}, where they must be first")
    return tag


def _group_norm(follow: Follow, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    x, groups = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "num_groups")
    w, b = argument(args, kwargs, 2, "weight"), argument(args, kwargs, 3, "bias")
    eps = argument(args, kwargs, 4, "eps", 1e-5)
    tag = _first_axis(follow, x)
    x = _widened(follow, x)
    weight, bias = _scale_and_shift(w, b, follow)
    if not _same_dtype(x, weight, bias):
        return _affine_after(follow, F.group_norm(x, groups, None, None, eps), tag, w, b, channels=True)
    ids, _, _ = tag.samples.plan(tag.outer, tag.inner)
    y = autograd.GroupNorm.apply(
        x, weight.value, bias.value, ids, groups, eps, weight.count, bias.count, tag.samples.num_rows,
        *weight.targets, *bias.targets,
    )  # fmt: skip
    return y, tag


def _instance_norm(follow: Follow, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    x = argument(args, kwargs, 0, "input")
    mean, var = argument(args, kwargs, 1, "running_mean"), argument(args, kwargs, 2, "running_var")
    w, b = argument(args, kwargs, 3, "weight"), argument(args, kwargs, 4, "bias")
    rest = [argument(args, kwargs, k, n, d) for k, n, d in
            ((5, "use_input_stats", True), (6, "momentum", 0.1), (7, "eps", 1e-5))]  # fmt: skip
    tag = _first_axis(follow, x)
    y = F.instance_norm(x, mean, var, None, None, *rest)
    return _affine_after(follow, y, tag, w, b, channels=True)


def _batch_norm(follow: Follow, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    x, mean, var = (argument(args, kwargs, k, n) for k, n in enumerate(("input", "running_mean", "running_var")))
    w, b = argument(args, kwargs, 3, "weight"), argument(args, kwargs, 4, "bias")
    training = argument(args, kwargs, 5, "training", False)
    momentum, eps = argument(args, kwargs, 6, "momentum", 0.1), argument(args, kwargs, 7, "eps", 1e-5)
    tag = _first_axis(follow, x)
    if training:
        follow.meet_shared_statistics()
    x = _widened(follow, x)
    weight, bias = _scale_and_shift(w, b, follow)
    if not _same_dtype(x, weight, bias):
        y = F.batch_norm(x, mean, var, None, None, training, momentum, eps)
        return _affine_after(follow, y, tag, w, b, channels=True)
    ids, _, _ = tag.samples.plan(tag.outer, tag.inner)
    y = autograd.BatchNorm.apply(
        x, weight.value, bias.value, ids, (mean, var), training, momentum, eps, weight.count, bias.count,
        tag.samples.num_rows, *weight.targets, *bias.targets,
    )  # fmt: skip
    return y, tag


# --- the rest


def _prelu(follow: Follow, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    x, w = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "weight")
    tag = _samples_of(follow, x)
    if w.numel() > 1:
        if tag.axis != 0:
            raise Unproven("prelu with samples along another axis than the first")
        w, found = follow.call(torch.Tensor.reshape, (w, (-1, *(1,) * (x.dim() - 2))), {})
        follow.mark(w, found)
    below, found = follow.call(torch.mul, (x, w), {})
    return torch.where(x > 0, x, below), found


def _attention(follow: Follow, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """A mask that is computed from parameters, such as a relative position bias."""
    names = ("query", "key", "value", "attn_mask")
    given = {n: argument(args, kwargs, k, n) for k, n in enumerate(names)}
    carriers = [x for x in given.values() if x is not None and follow.tag(x).kind == SAMPLES]
    tag = follow.tag(carriers[0])
    right = carriers[0].dim() - tag.axis
    if right < 3:
        raise Unproven("attention over the axis of the samples")
    for k, n in enumerate(names):
        if given[n] is not None and follow.tag(given[n]).kind == PARAM:
            args, kwargs = _with(args, kwargs, k, n, lift(follow, given[n], right, tag))
    out = func(*args, **kwargs)
    return out, tag_of_result(name, args, kwargs, out, follow.tag)


def _with(
    args: Sequence[Any], kwargs: dict[str, Any], position: int, name: str, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if len(args) > position:
        return (*args[:position], value, *args[position + 1 :]), kwargs
    return tuple(args), {**kwargs, name: value}


def _multi_head(follow: Follow, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    with follow:
        out, weights = multi_head_attention(*args, **kwargs)
    if weights is None:
        return (out, None), [follow.tag(out)]
    return (out, weights), [follow.tag(out), follow.tag(weights)]


def _baddbmm(follow: Follow, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    if kwargs.get("alpha", 1) != 1 or kwargs.get("beta", 1) != 1:
        raise Unproven("baddbmm with alpha or beta")
    b, x, y = (argument(args, kwargs, k, n) for k, n in enumerate(("input", "batch1", "batch2")))
    product, tag = follow.call(torch.matmul, (x, y), {})
    follow.mark(product, tag)
    return follow.call(torch.add, (b, product), {})


def _task_layer(follow: Follow, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """`torch.ops.fastmtl.task_conv2d` or `task_linear`: the weight and the bias that all tasks share."""
    x, w, delta, delta_tasks, gate, b, *rest = args
    tag = _first_axis(follow, x)
    if any(follow.tag(p).kind == PARAM for p in (*delta, gate) if p is not None):
        raise Unproven("what belongs to single tasks is in the bank")
    added = None
    if b is not None and b.dim() > 1 and follow.tag(b).kind == PARAM:
        b, added = None, _picked(follow, b, x, tag, *rest[:2])
    weight, bias = (NOTHING if p is None else follow.weight(p) for p in (w, b))
    y = func(x, weight.value, delta, delta_tasks, gate, bias.value, *rest)
    plan = tag.samples.plan(tag.outer, tag.inner)
    y = autograd.Shared.apply(
        y, x.detach(), weight.value, bias.value, *plan, tuple(rest[2:]) or None, weight.count, bias.count,
        *weight.targets, *bias.targets,
    )  # fmt: skip
    if added is not None:
        spread = (-1, added.shape[1], *(1,) * (y.dim() - 2)) if len(rest) > 2 else (len(y), *(1,) * (y.dim() - 2), -1)
        y = y + added.reshape(spread).to(y.dtype)
    return y, tag


def _picked(follow: Follow, bias: Tensor, x: Tensor, tag: Tag, order: Tensor, offsets: Tensor) -> Tensor:
    """Each sample's row of a bias per task that is computed from a shared one, by the plan of the layer."""
    task = torch.searchsorted(offsets[1:], torch.arange(len(order), device=order.device), right=True)
    index = torch.empty_like(order).scatter_(0, order, task)
    follow.mark(index, tag)
    return _table(follow, bias, index, -1)[0]


# broadcast like pointwise functions do
_BROADCASTS = frozenset(("cat", "stack", "where", "masked_fill", "lerp", "addcmul"))

_LAYERS: dict[str, Callable[..., tuple[Any, Any]]] = {
    "linear": _linear,
    "addmm": _addmm,
    "matmul": _matmul,
    "rmatmul": _matmul,
    "einsum": _einsum,
    **dict.fromkeys([f"conv{t}{k}d" for t in ("", "_transpose") for k in (1, 2, 3)], _conv),
    "embedding": _embedding,
    "getitem": _getitem,
    "index_select": _index_select,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    "batch_norm": _batch_norm,
    "prelu": _prelu,
    "scaled_dot_product_attention": _attention,
    "multi_head_attention_forward": _multi_head,
    "baddbmm": _baddbmm,
    "task_conv2d.default": _task_layer,
    "task_linear.default": _task_layer,
}
