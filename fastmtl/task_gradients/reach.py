"""Losses as callers give them, and which parameters each one reaches, read from the graph in one pass."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastmtl.core.gradient_rows import MAX_TASKS
from fastmtl.distributed.wrappers import WRAPPER_NODES
from fastmtl.methods import Weighting, check_needs, needs_of

# nodes that act on each element of a vector alone, as long as they have one input that needs a gradient
_ELEMENTWISE_NODES = frozenset(
    {
        "MulBackward0",
        "DivBackward0",
        "AddBackward0",
        "SubBackward0",
        "NegBackward0",
        "ToCopyBackward0",
        "CloneBackward0",
    }
)


_JOINS = frozenset({"CatBackward0", "StackBackward0"})
# nodes that take a part of a tensor
_PARTS = frozenset({"SelectBackward0", "SliceBackward0", "IndexBackward0", "IndexSelectBackward0"})
_SPLITS = frozenset({"UnbindBackward0", "SplitBackward0", "SplitWithSizesBackward0", "UnsafeSplitBackward0"})

Losses: TypeAlias = Sequence[Tensor | None] | Tensor | Mapping[Any, Tensor | None]
# of those whose gradients were collected already
LossValues: TypeAlias = Sequence[Tensor | float | None] | Tensor | Mapping[Any, Tensor | float | None]
Edge = tuple[Any, int]  # a node of the graph, and which of its outputs


class Reach(NamedTuple):
    """Sets of tasks are bit masks: bit t stands for task t."""

    leaves: dict[Tensor, int]  # leaf that needs a gradient -> tasks whose loss reaches it
    overlap: list[int]  # task -> tasks whose graph has a node in common with its own
    compiled: int  # tasks that go through a compiled graph together with another task
    entangled: int  # tasks whose losses are elements of one vector that can't be followed to separate scalars
    joined: int  # tasks that take different parts of one tensor joined by cat or stack
    crossed: dict[Edge, int]  # edge in `cut` -> tasks that arrive at it
    donated: int  # tasks that share a compiled graph whose backward overwrites what it saved


def reach(losses: Sequence[Tensor | None], cut: Collection[Edge] = ()) -> Reach:
    """One pass over the graphs of all losses: O(nodes + edges), without recursion. Edges in `cut` are not followed.

    A loss that is an element of a vector made by `torch.stack` or `torch.cat` of scalars (perhaps scaled since,
    by constants) is followed to its own scalar. Of other vectors all elements reach all leaves: `entangled`.
    A loss that turns out to be a constant reaches nothing.
    """
    roots = _roots(losses)
    masks, vectors, unclear = dict(roots.masks), roots.vectors, roots.unclear
    found, inner = _spread(masks, cut)
    for mask in inner.union(vectors.values()):
        for t in tasks_of(mask):
            found.overlap[t] |= mask & ~(1 << t)
    entangled = 0
    for mask in unclear.values():
        if _several(mask):
            entangled |= mask
    return found._replace(overlap=found.overlap[: len(losses)], entangled=entangled)


class Entry(NamedTuple):
    """Where what one task alone has in the graph leads into what several have."""

    node: Any  # of that task alone
    inputs: frozenset[int]  # which of its inputs lead there
    task: int


class Entries(NamedTuple):
    """All such places, and the tasks whose loss itself lies there."""

    entries: list[Entry]
    losses: set[int]


def entries(losses: Sequence[Tensor | None]) -> Entries:
    """Where the tasks' own parts of the graph end: a gradient that is scaled there is scaled behind it, and ahead of
    it is what it was. Of a vector that `reach` can't follow the parts begin at the vector."""
    roots = _roots(losses)
    masks = dict(roots.masks)
    _spread(masks, ())
    found = []
    for node, mask in masks.items():
        if _several(mask):
            continue
        ahead = [_beyond(pair, [])[0] if pair[0] is not None else None for pair in node.next_functions]
        inputs = frozenset(i for i, child in enumerate(ahead) if child is not None and _several(masks[child]))
        if inputs:
            found.append(Entry(node, inputs, mask.bit_length() - 1))
    return Entries(found, {t for t, root in roots.nodes.items() if _several(masks[root])})


def reach_from(starts: Mapping[Edge, int]) -> tuple[Reach, set[Edge]]:
    """What tasks reach through given edges, and which of these edges lie behind another of them."""
    masks: dict[Any, int] = {}
    for (node, _), mask in starts.items():
        masks[node] = masks.get(node, 0) | mask
    found, _ = _spread(masks, starts.keys(), through=True)
    return found, {edge for edge in starts if edge in found.crossed}


def _spread(masks: dict[Any, int], cut: Collection[Edge], *, through: bool = False) -> tuple[Reach, set[int]]:
    """Hands the sets of tasks on from the nodes in `masks`, to which it adds; and the sets of all inner nodes.

    `through`: edges in `cut` are followed, and noted all the same.
    """
    edges: dict[Any, list[Any]] = {}
    passed: dict[Any, list[Any]] = {}
    crossing: dict[Any, list[Edge]] = {}
    parents: dict[Any, int] = {}
    todo = list(masks)
    while todo:
        node = todo.pop()
        if node in edges:
            continue
        pairs = [pair for pair in node.next_functions if pair[0] is not None]
        if cut and (met := [pair for pair in pairs if pair in cut]):
            crossing[node] = met
            pairs = pairs if through else [pair for pair in pairs if pair not in cut]
        if any(type(child).__name__ in WRAPPER_NODES for child, _ in pairs):
            passed[node] = between = []
            pairs = [pair for pair in (_beyond(pair, between) for pair in pairs) if pair[0] is not None]
        edges[node] = children = [child for child, _ in pairs]
        for child in children:
            parents[child] = parents.get(child, 0) + 1
            todo.append(child)

    # a node is passed once all of its parents were, so every mask is complete when it is handed on
    leaves: dict[Tensor, int] = {}
    crossed: dict[Edge, int] = {}
    inner: set[int] = set()
    passing: dict[Any, int] = {}
    compiled = joined = donated = 0
    parts: dict[Any, tuple[bool, set[int]]] = {}  # join -> only parts of it are taken; by which tasks each
    ready = [node for node in edges if node not in parents]
    while ready:
        node = ready.pop()
        mask = masks[node]
        kind = type(node).__name__
        if kind == "AccumulateGrad":
            leaves[node.variable] = mask
            continue
        inner.add(mask)
        for between in passed.get(node, ()):
            passing[between] = passing.get(between, 0) | mask
        for edge in crossing.get(node, ()):
            crossed[edge] = crossed.get(edge, 0) | mask
        if "CompiledFunctionBackward" in kind and _several(mask):
            compiled |= mask
            if _overwrites(node):
                donated |= mask
        if kind in _JOINS and _several(mask):
            only_parts, takers = parts.get(node, (False, set()))
            if only_parts and takers != {mask}:
                joined |= mask
        for child in edges[node]:
            if type(child).__name__ in _JOINS:
                only_parts, takers = parts.get(child, (True, set()))
                # the outputs of a split are not told apart here: each may go to another task
                taken = {0, mask} if kind in _SPLITS else {mask}
                parts[child] = (only_parts and kind in _PARTS | _SPLITS, takers | taken)
            masks[child] = masks.get(child, 0) | mask
            parents[child] -= 1
            if not parents[child]:
                ready.append(child)

    # a pass frees them whole, whichever of their outputs it came through
    inner.update(passing.values())
    return Reach(leaves, [0] * MAX_TASKS, compiled, 0, joined, crossed, donated), inner


def _beyond(edge: Edge, between: list[Any]) -> Edge:
    """The edge itself, or the one that it stands for on the other side of nodes that hand each output on."""
    node, number = edge
    while type(node).__name__ in WRAPPER_NODES:
        between.append(node)
        wanted = node.needs_input_grad  # also of arguments that are no tensors, one of them ahead of the inputs
        if not wanted[number + 1]:
            return None, 0
        ahead = sum(wanted[: number + 1])
        node, number = [pair for pair in node.next_functions if pair[0] is not None][ahead]
    return node, number


def _overwrites(node: Any) -> bool:
    """Whether inductor compiled this graph's backward to reuse its saved tensors' memory (donated buffers).

    torch refuses a second pass through it only as long as the setting is on, and is wrong without a word if it was
    turned off since. A backward that is not compiled yet is compiled for what the first pass asks for.
    """
    compiled = getattr(node, "_forward_cls", None)
    donated = getattr(getattr(compiled, "metadata", None), "bw_donated_idxs", None)
    return bool(donated) and getattr(compiled, "compiled_bw", None) is not None


def tasks_of(mask: int) -> list[int]:
    """The tasks in a bit mask, in order."""
    return [t for t in range(mask.bit_length()) if mask >> t & 1]


def _several(mask: int) -> bool:
    return mask & (mask - 1) != 0


class _Roots(NamedTuple):
    """Where the walks of all losses start. Nodes with bit masks of tasks."""

    nodes: dict[int, Any]  # task -> where its walk starts; a constant has none
    masks: dict[Any, int]  # these nodes
    vectors: dict[Any, int]  # nodes that were passed by on the way
    unclear: dict[Any, int]  # vectors that could not be followed to separate scalars


def _roots(losses: Sequence[Tensor | None]) -> _Roots:
    found = _Roots({}, {}, {}, {})
    for t, loss in enumerate(losses):
        if loss is None:
            continue
        edge, path, clear = _root(loss)
        root, _ = _beyond(edge, path)
        if root is not None:
            found.nodes[t] = root
            found.masks[root] = found.masks.get(root, 0) | 1 << t
        for node in path:  # and nodes that are passed by
            found.vectors[node] = found.vectors.get(node, 0) | 1 << t
        if not clear:
            found.unclear[path[0]] = found.unclear.get(path[0], 0) | 1 << t
    return found


def _root(loss: Tensor) -> tuple[Edge, list[Any], bool]:
    """Where the walk of one loss starts (None: a constant), the nodes of the vectors it was picked from, and
    whether it could be followed through them."""
    node = loss.grad_fn
    if node is None:
        return (torch.autograd.graph.get_gradient_edge(loss).node, 0), [], True
    kind = type(node).__name__
    if kind == "UnbindBackward0":
        position = loss.output_nr
    elif kind == "SelectBackward0" and len(node._saved_self_sym_sizes) == 1:
        position = node._saved_index
        if position >= 1 << 63:  # a negative index, shown as unsigned
            position += node._saved_self_sym_sizes[0] - (1 << 64)
    else:
        return (node, loss.output_nr), [], True
    edge = node.next_functions[0]
    path = [edge[0]]
    if type(path[0]).__name__ == "AccumulateGrad":
        return edge, path, True
    while True:
        edge = _beyond(edge, path)
        if type(edge[0]).__name__ not in _ELEMENTWISE_NODES:
            break
        path.append(edge[0])
        inputs = [pair for pair in edge[0].next_functions if pair[0] is not None]
        if len(inputs) != 1:
            return (node, loss.output_nr), path, False
        edge = inputs[0]
    path.append(edge[0])
    if _is_row_of_scalars(edge[0], position):
        return edge[0].next_functions[position], path, True
    return (node, loss.output_nr), path, False


def _is_row_of_scalars(node: Any, position: int) -> bool:
    """Whether `node` joins scalars (stack), or tensors of one element (cat), more than `position` of them."""
    if node is None or position >= len(node.next_functions):
        return False
    kind = type(node).__name__
    if kind == "StackBackward0":
        return True
    # a constant among the inputs of a cat does not tell its length
    return kind == "CatBackward0" and all(
        child is not None and tuple(child._input_metadata[number].shape) == (1,)
        for child, number in node.next_functions
    )


def read_losses(
    losses: Losses,
    *,
    may_be_absent: bool = False,
    needs_graph: bool = True,
    argument: str = "losses",
) -> tuple[list[str], list[Tensor | None]]:
    """Task names and losses, None where absent, checked. `may_be_absent`: all of them may be. `needs_graph`: they
    are to be differentiated; else numbers serve, too. `argument`: for errors."""
    if isinstance(losses, Tensor):
        if losses.dim() != 1:
            raise ValueError(
                f"{argument}: expected a 1-D tensor of scalars, a sequence or a dict, "
                f"got a tensor of shape {list(losses.shape)}"
                + ("; pass the losses, not their sum" if losses.dim() == 0 else "")
            )
        with torch.enable_grad():  # under no_grad the elements would lose the graph
            tasks: list[Tensor | None] = list(losses.unbind())
        names = [str(t) for t in range(len(tasks))]
    elif isinstance(losses, Mapping):
        names, tasks = [str(name) for name in losses], list(losses.values())
        if len(set(names)) != len(names):
            raise ValueError(f"{argument}: expected different names, got {names}")
    elif isinstance(losses, Iterable) and not isinstance(losses, (str, bytes)):
        tasks = list(losses)  # dict.values() and generators too; a row of numpy's is one of numbers
        names = [str(t) for t in range(len(tasks))]
    else:
        raise TypeError(f"{argument}: expected a sequence, a 1-D tensor or a dict, got {type(losses).__name__}")
    if not tasks:
        raise ValueError(f"{argument}: expected at least one loss, got none")
    if len(tasks) > MAX_TASKS:
        raise ValueError(f"{argument}: expected at most {MAX_TASKS} losses, got {len(tasks)}")
    if not may_be_absent and all(loss is None for loss in tasks):
        raise ValueError(f"{argument}: expected at least one loss, got {len(tasks)} times None")
    expected = "a scalar tensor" if needs_graph else "a scalar tensor, a number"
    of = "loss" if argument == "losses" else f"{argument}: loss"
    for name, loss in zip(names, tasks, strict=True):
        if loss is None or (not needs_graph and isinstance(loss, Real) and not isinstance(loss, bool)):
            continue
        if not isinstance(loss, Tensor):
            raise TypeError(f"{of} {name!r}: expected {expected} or None, got {type(loss).__name__}")
        if not loss.is_floating_point():
            raise TypeError(f"{of} {name!r}: expected a floating-point tensor, got {loss.dtype}")
        if loss.dim() != 0:
            hint = ": squeeze it" if loss.numel() == 1 else ""
            raise ValueError(f"{of} {name!r}: expected a scalar (0 dimensions), got shape {list(loss.shape)}{hint}")
        if needs_graph and not loss.requires_grad:
            raise ValueError(
                f"{of} {name!r}: needs no gradient: it was computed without parameters, or detached; the loss of a "
                "task that is absent is None"
            )
    return names, tasks


def read_loss_values(
    losses: LossValues | None,
    names: Sequence[str],
    present: Sequence[bool] | Tensor,
    method: Weighting,
    call: str,
) -> list[Tensor | float | None] | None:
    """The losses of these tasks, which are known by their gradients alone, for a method that needs them."""
    if losses is None:
        check_needs(method, call, {"losses": "pass losses=, those whose gradients were collected"})
        return None
    found_names, found = read_losses(losses, needs_graph=False)
    if len(found) != len(names) or (isinstance(losses, Mapping) and set(found_names) != set(names)):
        raise ValueError(f"losses: expected those of the tasks {list(names)}, got {found_names}")
    if isinstance(losses, Mapping):
        by_name = dict(zip(found_names, found, strict=True))
        found = [by_name[name] for name in names]
    if not isinstance(present, Tensor):
        for name, here, loss in zip(names, present, found, strict=True):
            if here and loss is None:
                raise ValueError(f"losses: expected a loss of task {name!r}, of which there are gradients, got None")
        found = [loss if here else None for here, loss in zip(present, found, strict=True)]
    return found if "losses" in needs_of(method) else None


def names_of(mask: int, names: Sequence[str]) -> str:
    return ", ".join(repr(names[t]) for t in tasks_of(mask))


def read_loss_scale(scale: float | Tensor | None) -> float | Tensor | None:
    if isinstance(scale, Tensor):
        if not scale.is_floating_point():
            raise TypeError(f"loss_scale: expected a floating-point tensor, got {scale.dtype}")
        if scale.numel() != 1:
            raise ValueError(f"loss_scale: expected a single number, got shape {list(scale.shape)}")
        return scale.detach().reshape(())
    if scale is None:
        return None
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"loss_scale: expected a number or a tensor, got {type(scale).__name__}")
    if not 0 < scale < float("inf"):
        raise ValueError(f"loss_scale: expected a positive finite number, got {scale}")
    return float(scale)
