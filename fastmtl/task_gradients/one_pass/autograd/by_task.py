"""Calls that no layer takes apart: the gradients of their parameters by a backward pass of the call for each task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from fastmtl.core.autograd import no_view
from fastmtl.task_gradients.one_pass.autograd.rows import (
    STACKED,
    Receiver,
    deliver,
    give_rows,
    in_plain_pass,
    receiver_of,
    takes_parts,
)
from fastmtl.task_gradients.one_pass.overrides import without_override

_gradients = without_override(torch.autograd.grad)
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)

# one for each result, or None where no gradient arrives; one for each leaf
Gradients: TypeAlias = Sequence[Tensor | None]


class Passes(Protocol):
    """The backward passes of one call. Its leaves stand for the tensors through which a gradient flows.

    Attributes:
        saved: tensors that they need.
        num_leaves: how many leaves there are.
    """

    saved: Sequence[Tensor]
    num_leaves: int

    def whole(self, saved: Sequence[Tensor], cotangents: Gradients, wanted: Sequence[int]) -> Gradients:
        """The gradients of the leaves at these places."""
        ...

    def of_row(self, saved: Sequence[Tensor], cotangents: Gradients, wanted: Sequence[int], row: int) -> Gradients:
        """The same, if only what belongs to that row of the bank counts."""
        ...


class OnItsGraph:
    """Passes over the graph that the call has left: as it ran, with the random numbers that it drew.

    Args:
        leaves, results: the ends of the graph.
        places: for each result the row of the bank of each position along its axis, and that axis.
    """

    saved: Sequence[Tensor] = ()

    def __init__(self, leaves: Sequence[Tensor], results: Sequence[Tensor], places: Sequence[tuple[Tensor, int]]):
        self.leaves, self.results, self.places = leaves, results, places
        self.num_leaves = len(leaves)

    def whole(self, saved: Sequence[Tensor], cotangents: Gradients, wanted: Sequence[int]) -> Gradients:
        return _of_leaves(self.results, [self.leaves[k] for k in wanted], cotangents, keep=True)

    def of_row(self, saved: Sequence[Tensor], cotangents: Gradients, wanted: Sequence[int], row: int) -> Gradients:
        masked: list[Tensor | None] = []
        with torch._C.DisableTorchFunction():
            for g, (ids, axis) in zip(cotangents, self.places, strict=True):
                if g is not None:
                    shape = [1] * g.dim()
                    shape[axis] = -1
                    g = torch.where((ids == row).reshape(shape), g, 0.0)
                masked.append(g)
        return self.whole(saved, masked, wanted)


class OnItsSamples:
    """Passes over the call on the samples of each row alone, computed again: of one that draws no random numbers.

    Args:
        run: the results, those through which a gradient flows, of such tensors in the place of `saved`.
        saved: all tensors of the call.
        leaf_of: for each of them which leaf it is; None: no gradient flows through it.
        axes: for each of them where its samples lie; None: it has none.
        out_axes: the same of the results.
        ids: the row of the bank of each sample.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Tensor]], Sequence[Tensor]],
        saved: Sequence[Tensor],
        leaf_of: Sequence[int | None],
        axes: Sequence[int | None],
        out_axes: Sequence[int],
        ids: Tensor,
    ) -> None:
        self.run, self.saved, self.leaf_of, self.axes, self.out_axes, self.ids = (
            run, saved, leaf_of, axes, out_axes, ids
        )  # fmt: skip
        self.num_leaves = len({k for k in leaf_of if k is not None})

    def whole(self, saved: Sequence[Tensor], cotangents: Gradients, wanted: Sequence[int]) -> Gradients:
        return self._of(saved, cotangents, wanted, None)

    def of_row(self, saved: Sequence[Tensor], cotangents: Gradients, wanted: Sequence[int], row: int) -> Gradients:
        return self._of(saved, cotangents, wanted, (self.ids == row).nonzero()[:, 0])

    def _of(
        self, saved: Sequence[Tensor], cotangents: Gradients, wanted: Sequence[int], index: Tensor | None
    ) -> Gradients:
        def part(x: Tensor, axis: int | None) -> Tensor:
            return x if index is None or axis is None else x.index_select(axis, index)

        with torch._C.DisableTorchFunction():
            given = [part(x.detach(), axis) for x, axis in zip(saved, self.axes, strict=True)]
            at = {leaf: k for k, leaf in enumerate(self.leaf_of) if leaf is not None}
            for k in at.values():
                given[k] = given[k].detach().requires_grad_()
            parts = [None if g is None else part(g, axis) for g, axis in zip(cotangents, self.out_axes, strict=True)]
            with torch.enable_grad():
                results = self.run(given)
            found = _of_leaves(results, [given[at[k]] for k in wanted], parts, keep=False)
            if index is None:
                return found
            listed: list[Tensor | None] = []
            for k, g in zip(wanted, found, strict=True):
                axis = self.axes[at[k]]
                if g is not None and axis is not None:
                    g = torch.zeros_like(saved[at[k]]).index_copy_(axis, index, g)
                listed.append(g)
            return listed


def _of_leaves(results: Sequence[Tensor], leaves: Sequence[Tensor], cotangents: Gradients, *, keep: bool) -> Gradients:
    given = [(x, g) for x, g in zip(results, cotangents, strict=True) if g is not None]
    if not given or not leaves:
        return [None] * len(leaves)
    # what unpacks saved tensors here is followed: recomputation under checkpointing
    return list(_gradients([x for x, _ in given], leaves, [g for _, g in given], retain_graph=keep, allow_unused=True))


class ByTask(torch.autograd.Function):
    """The results of a call; its gradients come from a backward pass of it for each row of which there are samples.

    No element of a result may depend on samples of several rows: then the gradients of its inputs are the sums over
    these passes.
    """

    @staticmethod
    def forward(ctx, passes: Passes, results, rows, num_rows, forms, *tensors):
        """
        Args:
            results: those through which a gradient flows.
            rows: of the bank, of which there are samples.
            forms: of each parameter; see `autograd`.
            tensors: those for which the leaves stand, the parameters last; then the targets of each of them.
        """
        ctx.save_for_backward(*passes.saved)
        ctx.passes, ctx.rows, ctx.num_rows, ctx.forms = passes, rows, num_rows, forms
        ctx.set_materialize_grads(False)
        targets = tensors[passes.num_leaves :]
        ctx.receivers = []
        for form in forms:
            count = 1 if form == STACKED else form
            ctx.receivers.append(receiver_of(form, targets[:count]))
            targets = targets[count:]
        return tuple(no_view(x.detach()) for x in results)

    @staticmethod
    def backward(ctx, *cotangents):
        passes: Passes | None = ctx.passes
        saved = ctx.saved_tensors
        if passes is None:
            raise RuntimeError("one_pass: a second backward pass through a graph that was freed: retain_graph=True")
        inputs = passes.num_leaves - len(ctx.forms)
        needs = ctx.needs_input_grad[5 : 5 + passes.num_leaves]
        found: list[Tensor | None] = [None] * passes.num_leaves
        rows: list[list[Tensor | None]] = [[None] * ctx.num_rows for _ in ctx.forms]
        if in_plain_pass():
            wanted = [k for k, needed in enumerate(needs) if needed]
            for k, g in zip(wanted, passes.whole(saved, cotangents, wanted), strict=True):
                found[k] = g
        else:
            wanted = [k for k in range(passes.num_leaves) if k >= inputs or needs[k]]
            for row in ctx.rows:
                for k, g in zip(wanted, passes.of_row(saved, cotangents, wanted, row), strict=True):
                    if k >= inputs:
                        rows[k - inputs][row] = g
                    elif g is not None:
                        found[k] = _sum(found[k], g)
        targets: list[Tensor | None] = []
        for form, receiver, each in zip(ctx.forms, ctx.receivers, rows, strict=True):
            targets += _given(form, receiver, each)
        if not _keeps_graph():
            ctx.passes = None
        return (*(None,) * 5, *found, *targets)


def _sum(a: Tensor | None, b: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        return b if a is None else a + b


def _given(form: int, receiver: Receiver | None, rows: list[Tensor | None]) -> Sequence[Tensor | None]:
    """The rows of a parameter in the form of its targets; past autograd, where that can be."""
    if form == STACKED and takes_parts(receiver):
        receiver.parts(rows)
        return (None,)
    there: Any = next((row for row in rows if row is not None), None)
    if there is None:
        return give_rows(None, form)
    if form != STACKED:
        return rows[:form]
    with torch._C.DisableTorchFunction():
        return (deliver(receiver, torch.stack([torch.zeros_like(there) if row is None else row for row in rows])),)
