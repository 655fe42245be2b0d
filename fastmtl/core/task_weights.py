"""What the ops with per-task weights pass on: a batch sorted by task, its weights, how a filter moves, a whole call."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmtl.core.tensors import like_parameter, like_stacked, memory_format


class TaskPlan(NamedTuple):
    """A batch sorted by task; made by `task_plan`, accepted by every task op in place of `task_ids`.

    `order[offsets[t] : offsets[t + 1]]` are the samples of task t, in the order in which the batch has them. Samples
    whose id is out of range (only on a GPU; the CPU raises) come last, from `offsets[T]` on.

    Example:
        >>> task_plan(torch.tensor([1, 0, 1]), 2).offsets
        tensor([0, 1, 3])
    """

    task_ids: Tensor  # as given: [N], or [N, L] for packed sequences
    order: Tensor  # [N] int64, flat positions sorted by task
    offsets: Tensor  # [T + 1] int64

    @property
    def num_tasks(self) -> int:
        return self.offsets.shape[0] - 1


class SortedBatch(NamedTuple):
    """What a `TaskPlan` says of a batch once its ids are known: the samples in the order of their tasks."""

    order: Tensor  # [N] int64, flat positions sorted by task; samples of no task come last
    offsets: Tensor  # [T + 1] int64, where each task begins in `order`

    @property
    def num_tasks(self) -> int:
        return self.offsets.shape[0] - 1

    def segments(self) -> Iterator[tuple[int, Tensor]]:
        """Each task that has samples, with their positions. Waits for the device."""
        for t, (begin, end) in enumerate(itertools.pairwise(self.offsets.tolist())):
            if end > begin:
                yield t, self.order[begin:end]


class Geometry(NamedTuple):
    """How the filter moves: as in `F.conv2d`, height first."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @classmethod
    def of(cls, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> Geometry:
        return cls(tuple(stride), tuple(padding), tuple(dilation), groups)

    def pixelwise(self, kernel: Sequence[int]) -> bool:
        """Whether each output pixel sees the one input pixel in its place."""
        return (*kernel, *self.stride, *self.padding) == (1, 1, 1, 1, 0, 0)

    def output_size(self, size: Sequence[int], kernel: Sequence[int]) -> tuple[int, int]:
        h, w = (
            (size[k] + 2 * self.padding[k] - self.dilation[k] * (kernel[k] - 1) - 1) // self.stride[k] + 1
            for k in (0, 1)
        )
        return h, w


# of a linear layer: a filter of one pixel
STILL = Geometry()


def shape_of_one(weights: TaskWeights) -> torch.Size:
    """`weights.shape`, as a function: dynamo of torch 2.10 traces no property of a named tuple."""
    if weights.weight is not None:
        return weights.weight.shape
    stacked = len(weights.delta) == 1 and not weights.delta_tasks
    return weights.delta[0].shape[1:] if stacked else weights.delta[0].shape


class TaskWeights(NamedTuple):
    """`W + s_t * Delta_t` of all tasks, as the ops pass it on.

    `delta` is one `[T, ...]` tensor (`delta_tasks` is then empty), or the tensors of the tasks in `delta_tasks`;
    empty: no task has one. `weight=None`: wholly separate weights.
    """

    weight: Tensor | None
    delta: Sequence[Tensor]
    delta_tasks: Sequence[int]
    gate: Tensor | None

    @property
    def stacked(self) -> bool:
        return len(self.delta) == 1 and not self.delta_tasks

    def by_task(self, num_tasks: int) -> list[Tensor | None]:
        """Each task's delta, as views."""
        if self.stacked:
            return list(self.delta[0].unbind(0))
        found: list[Tensor | None] = [None] * num_tasks
        for t, d in zip(self.delta_tasks, self.delta, strict=True):
            found[t] = d
        return found

    @property
    def shape(self) -> torch.Size:
        """Of one weight: `[Cout, Cin / groups, kh, kw]` or `[Cout, Cin]`."""
        return shape_of_one(self)

    @property
    def like(self) -> Tensor:
        """A tensor with the dtype and memory order that one task's weight gradient has."""
        if self.weight is not None:
            return self.weight
        return self.delta[0][0] if self.stacked else self.delta[0]


class TaskConvCall(NamedTuple):
    """All that a convolution or a linear layer with per-task weights is told beside x; its gradients are told the same.

    The backends take it as one value. The schemas of `torch.ops.fastmtl` spell it out, since a schema knows tensors and
    lists alone: see `of`.
    """

    weights: TaskWeights
    batch: SortedBatch
    geometry: Geometry  # of a linear layer: a filter of one pixel, which does not move
    bias: Tensor | None  # [Cout], or [T, Cout]: one per task

    @classmethod
    def of(
        cls,
        weight: Tensor | None,
        delta: Sequence[Tensor],
        delta_tasks: Sequence[int],
        gate: Tensor | None,
        bias: Tensor | None,
        order: Tensor,
        offsets: Tensor,
        *geometry: Any,
    ) -> TaskConvCall:
        """From a schema's arguments, in their order. `geometry`: stride, padding, dilation and groups, or nothing."""
        weights, batch = TaskWeights(weight, delta, delta_tasks, gate), SortedBatch(order, offsets)
        return cls(weights, batch, Geometry.of(*geometry) if geometry else STILL, bias)


class LowRankDeltas(NamedTuple):
    """The deltas `s_t B_t A_t` of all tasks, as `task_lora` passes them on.

    `A` and `B` are one `[T, r, Cin]` and one `[T, Cout, r]` tensor (`tasks` is then empty), or `[r_t, Cin]` and
    `[Cout, r_t]` tensors of the tasks in `tasks`; empty: no task has a delta.
    """

    A: Sequence[Tensor]
    B: Sequence[Tensor]
    tasks: Sequence[int]
    scaling: Tensor | float | None  # s, [T]; None: all ones; a number for all only past the op, on the CPU

    @property
    def stacked(self) -> bool:
        return len(self.A) == 1 and not self.tasks

    def by_task(self, num_tasks: int) -> list[tuple[Tensor, Tensor] | None]:
        """Each task's A and B, as views."""
        if self.stacked:
            return list(zip(self.A[0].unbind(0), self.B[0].unbind(0), strict=True))
        found: list[tuple[Tensor, Tensor] | None] = [None] * num_tasks
        for t, a, b in zip(self.tasks, self.A, self.B, strict=True):
            found[t] = a, b
        return found


class TaskLoraCall(NamedTuple):
    """All that a linear layer with low-rank deltas is told beside x; its gradients are told the same."""

    weight: Tensor | None
    deltas: LowRankDeltas
    batch: SortedBatch
    bias: Tensor | None  # [Cout], or [T, Cout]: one per task

    @classmethod
    def of(
        cls,
        weight: Tensor | None,
        A: Sequence[Tensor],
        B: Sequence[Tensor],
        delta_tasks: Sequence[int],
        scaling: Tensor | None,
        bias: Tensor | None,
        order: Tensor,
        offsets: Tensor,
    ) -> TaskLoraCall:
        """From a schema's arguments, in their order."""
        return cls(weight, LowRankDeltas(A, B, delta_tasks, scaling), SortedBatch(order, offsets), bias)

    @property
    def shape(self) -> tuple[int, int]:
        """Of one weight: `[Cout, Cin]`."""
        if self.weight is not None:
            return self.weight.shape[0], self.weight.shape[1]
        return self.deltas.B[0].shape[-2], self.deltas.A[0].shape[-1]


class LoraGradients(NamedTuple):
    """What the backward of `task_lora` returns; None, or an empty list, for what is not wanted."""

    x: Tensor | None
    weight: Tensor | None
    A: Sequence[Tensor]
    B: Sequence[Tensor]
    scaling: Tensor | None
    bias: Tensor | None

    @classmethod
    def empty(
        cls, x: Tensor, call: TaskLoraCall, wanted: Sequence[bool], wanted_a: Sequence[int], wanted_b: Sequence[int]
    ) -> LoraGradients:
        """Memory for those that are wanted of x, weight, scaling and bias, and for A and B at the wanted positions."""

        def like(p: Tensor | None, want: bool = True) -> Tensor | None:
            return torch.empty(p.shape, dtype=p.dtype, device=p.device) if want and p is not None else None

        deltas = call.deltas
        of_a, of_b = ([like(held[k]) for k in ks] for held, ks in ((deltas.A, wanted_a), (deltas.B, wanted_b)))
        of_x, of_weight, of_scaling, of_bias = (
            like(p, want) for p, want in zip((x, call.weight, deltas.scaling, call.bias), wanted, strict=True)
        )
        return cls(of_x, of_weight, of_a, of_b, of_scaling, of_bias)

    def listed(self) -> list[Tensor]:
        """As a schema returns them: in this order, without those that are not wanted."""
        found = (self.x, self.weight, *self.A, *self.B, self.scaling, self.bias)
        return [g for g in found if g is not None]

    def zero_(self) -> list[Tensor]:
        """`listed`, all zero."""
        return [g.zero_() for g in self.listed()]


def empty_gradients(
    x: Tensor,
    call: TaskConvCall,
    wanted: Sequence[bool],
    wanted_delta: Sequence[int],
    together: Tensor | None = None,
) -> list[Tensor]:
    """Memory for what a backward op returns: x, weight, deltas, gate, bias, of these the wanted ones.

    `together`: memory for those of the deltas, one after another.
    """
    weights, out = call.weights, []
    if wanted[0]:
        out.append(torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x)))
    if wanted[1] and weights.weight is not None:
        out.append(like_parameter(weights.weight))
    if together is not None:
        out.extend(together.unbind(0))
    else:
        for k in wanted_delta:
            out.append(like_stacked(weights.delta[k]) if weights.stacked else like_parameter(weights.delta[k]))
    for want, p in zip(wanted[2:], (weights.gate, call.bias), strict=True):
        if want and p is not None:
            out.append(torch.empty(p.shape, dtype=p.dtype, device=p.device))
    return out
