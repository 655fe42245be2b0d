"""`fastmtl.backward(features=)`: surgery on gradients of a shared representation, and one pass through its trunk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmtl.core.tensors import FLOAT_DTYPES
from fastmtl.parameters import describe
from fastmtl.task_gradients.passes import grad
from fastmtl.task_gradients.reach import Edge, Reach, names_of, reach, reach_from


class Split(NamedTuple):
    """A graph cut at the features. Sets of tasks are bit masks."""

    features: dict[Tensor, int]  # feature -> tasks that reach it past no other feature
    trunk: dict[Tensor, int]  # leaf behind the features -> tasks that reach it through them
    past: dict[Tensor, int]  # leaf -> tasks that reach it otherwise
    nested: set[Edge]  # features behind others
    found: Reach  # ahead of the features, but its leaves are those of both kinds
    donated: int  # `Reach.donated` behind them


def read_features(features: Any) -> list[Tensor]:
    """The features, each once, checked.

    Raises:
        TypeError: no tensor or iterable of tensors; a dtype that has no kernel.
        ValueError: none, a leaf, one that needs no gradient; several devices.
    """
    if isinstance(features, Tensor):
        named = {features: "features"}
    else:
        if isinstance(features, (str, bytes, Mapping)) or not isinstance(features, Iterable):
            raise TypeError(f"features: expected a tensor or an iterable of tensors, got {type(features).__name__}")
        named = {}
        for i, f in enumerate(features):
            if not isinstance(f, Tensor):
                raise TypeError(f"features[{i}]: expected a tensor, got {type(f).__name__}")
            named.setdefault(f, f"features[{i}]")
    if not named:
        raise ValueError("features: expected at least one tensor, got none")
    first = next(iter(named))
    for f, name in named.items():
        if f.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name}: expected float64, float32, bfloat16 or float16, got {f.dtype}")
        if not f.requires_grad:
            raise ValueError(
                f"{name}: needs no gradient: nothing before it is trained, or it was detached or computed under no_grad"
            )
        if f.is_leaf:
            raise ValueError(
                f"{name}: is a leaf, so nothing lies before it: expected what the shared part of the model returned, "
                "with its graph (for surgery on the leaf itself pass shared=)"
            )
        if f.device != first.device:
            raise ValueError(f"{name}: expected a tensor on {first.device}, as features[0], got {f.device}")
    return list(named)


def split_at_features(tasks: Sequence[Tensor | None], names: Sequence[str], features: Sequence[Tensor]) -> Split:
    """What each loss reaches through the features, and past them.

    Raises:
        ValueError: a loss that does not reach the features, or is one; a hook on a feature that others depend on.
    """
    edges: dict[Edge, Tensor] = {(f.grad_fn, f.output_nr): f for f in features}
    for t, loss in enumerate(tasks):
        if loss is not None and (loss.grad_fn, loss.output_nr) in edges:
            raise ValueError(f"features: loss {names[t]!r} is one of them: expected what the loss was computed from")
    ahead = reach(tasks, edges)
    arrived = 0
    for mask in ahead.crossed.values():
        arrived |= mask
    for t, loss in enumerate(tasks):
        if loss is not None and not arrived >> t & 1:
            raise ValueError(
                f"features: loss {names[t]!r} does not reach any of them: it was computed from another forward, from "
                "a copy or a part of the features made earlier or changed in place since, in one compiled graph "
                "together with them (compile the trunk and the heads apart), or by one DistributedDataParallel module "
                "with find_unused_parameters=True, which returns a copy of each output (compute the losses from the "
                "features that it returned)"
            )
    behind, nested = reach_from(ahead.crossed)
    for edge in nested:
        if edges[edge]._backward_hooks:
            # the hook would see each task's part and never the part that comes through the others
            raise ValueError(
                f"features: one of shape {list(edges[edge].shape)} has a hook, and others are computed from it: hook "
                "what it was computed from instead, or leave one of them out"
            )
    found = ahead
    if len(set(ahead.crossed.values())) > 1:
        # what lies behind is only told apart where the tasks take different features
        found = found._replace(compiled=ahead.compiled | behind.compiled, joined=ahead.joined | behind.joined)
    leaves = {p: behind.leaves.get(p, 0) | ahead.leaves.get(p, 0) for p in (behind.leaves | ahead.leaves)}
    taken = {edges[edge]: mask for edge, mask in ahead.crossed.items()}
    return Split(taken, behind.leaves, ahead.leaves, nested, found._replace(leaves=leaves), behind.donated)


def check_trunk(
    common: Sequence[Tensor], parts: Split, named: Mapping[Tensor, str], names: Sequence[str], given: bool
) -> None:
    """Raises ValueError where a shared parameter is not reached through the features, or past them as well."""
    for p in common:
        if p in parts.past:
            also = "as well as through them" if p in parts.trunk else "and not through them"
            out = "leave it out of shared=" if given else "pass shared=, without it"
            raise ValueError(
                f"{describe(p, named[p])} is shared, but losses {names_of(parts.past[p], names)} reach it past the "
                f"features, {also}: a single pass through the trunk can't weigh its gradients. Choose features that "
                f"all shared parameters lie behind, or {out}, or mark it with fastmtl.mark_per_task (it then gets the "
                "plain sum of its gradients)"
            )
    if not common:
        raise ValueError("features: no shared parameter among params lies behind them")


@contextlib.contextmanager
def cut_at(features: Iterable[Tensor], nested: bool) -> Iterator[None]:
    """Inside, gradients stop at the features, where one lies behind another: each counts as a variable of its own."""
    handles = []
    try:
        if nested:
            outputs: dict[Any, set[int]] = {}
            for f in features:
                outputs.setdefault(f.grad_fn, set()).add(f.output_nr)
            for node, numbers in outputs.items():
                # what autograd.grad returns was taken before this hook runs
                handles.append(node.register_prehook(_stop(numbers)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _stop(numbers: set[int]) -> Any:
    return lambda grads: tuple(None if i in numbers else g for i, g in enumerate(grads))


def through_trunk(
    cotangents: Sequence[tuple[Tensor, Tensor]], params: Sequence[Tensor], retain_graph: bool
) -> list[tuple[Tensor, Tensor]]:
    """One backward pass from the features. Their tensor hooks ran when each task's gradient was taken: not again."""
    aside = []
    try:
        for f, _ in cotangents:
            if f._backward_hooks:
                aside.append((f._backward_hooks, dict(f._backward_hooks)))
                f._backward_hooks.clear()
        grads = grad([f for f, _ in cotangents], params, [g for _, g in cotangents], retain_graph)
    finally:
        for hooks, kept in aside:
            hooks.update(kept)
    return [(p, g) for p, g in zip(params, grads, strict=True) if g is not None]


def plain_sums(rows: Sequence[Sequence[Tensor | None]], features: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Every feature's gradient summed over the tasks, in new memory."""
    with torch.no_grad():
        sums = []
        for i, f in enumerate(features):
            here = [g for row in rows if (g := row[i]) is not None]
            if here:
                total = here[0].clone()
                for g in here[1:]:
                    total.add_(g)
                sums.append((f, total))
    return sums
