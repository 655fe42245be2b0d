"""Eager calls past an op: `task_linear` and `task_conv2d` of plain tensors on the CPU, of few rows for each task.

An op's dispatch, its checks and a walk over the segments in Python take several times as long as such a layer itself.
Where the direct product serves every segment, one call of C++ reads the tensors, checks them and computes the whole
layer, and one more its gradients. Whatever does not fit is left to the op, which says what is wrong with it. Nothing of
an earlier call is used but what follows from sizes alone.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastmtl.core.dispatch import extension, straight_to_cpu
from fastmtl.core.memory import keep_freed_memory
from fastmtl.core.schemas import autocast_is_on
from fastmtl.core.task_weights import TaskPlan
from fastmtl.core.tensors import PLAIN, is_channels_last, memory_format
from fastmtl.ops.task_weights.arguments import Delta, Pair, read_geometry
from fastmtl.ops.task_weights.cpu.memory import fresh
from fastmtl.ops.task_weights.cpu.task_plan import task_plan
from fastmtl.ops.task_weights.cpu.ways import BESIDE_OTHERS, Ways, watched
from fastmtl.ops.task_weights.operators import by_argument, wanted_deltas

_IDS = frozenset({torch.int64, torch.int32})
_LISTS = frozenset({list, tuple, torch.nn.ParameterList})
# stride, padding and dilation, height and width each; None: a linear layer
Moves = tuple[int, int, int, int, int, int] | None


def may_go_straight(x: Tensor) -> bool:
    """Whether an eager call with this tensor may go past its op, which no mode, transform or trace must see then."""
    return x.is_cpu and straight_to_cpu() and not autocast_is_on("cpu") and not watched()


def linear(
    backward_op: Any,
    x: Tensor,
    weight: Tensor | None,
    delta: Delta,
    task_ids: Tensor | TaskPlan,
    gate: Tensor | None,
    bias: Tensor | None,
) -> Tensor | None:
    """`task_linear`; None: the op must see the call, or say what is wrong with it."""
    layer = _Layer.of(x, weight, delta, task_ids, gate, bias, 2)
    if layer is None:
        return None
    y = x.new_empty((*x.shape[:-1], layer.shape[0]), requires_grad=False)
    return layer.run(backward_op, x, y, None)


def conv2d(
    backward_op: Any,
    x: Tensor,
    weight: Tensor | None,
    delta: Delta,
    task_ids: Tensor | TaskPlan,
    gate: Tensor | None,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair | str,
    dilation: Pair,
    groups: int,
) -> Tensor | None:
    """`task_conv2d`; None: the op must see the call, or say what is wrong with it."""
    layer = _Layer.of(x, weight, delta, task_ids, gate, bias, 4)
    if layer is None:
        return None
    try:
        moves, size = _moves(x.shape, layer.shape, stride, padding, dilation, groups)
    except (TypeError, ValueError):
        return None
    return layer.run(backward_op, x, fresh(size, x), moves)


@functools.lru_cache(4096, typed=True)
def _moves(
    x: torch.Size, weight: torch.Size, stride: Pair, padding: Pair | str, dilation: Pair, groups: int
) -> tuple[Moves, tuple[int, ...]]:
    """How the filter moves, and the size of the result.

    Raises:
        TypeError, ValueError: it is not for the direct product, or not right.
    """
    geometry, extra = read_geometry(stride, padding, dilation, groups, weight[2:])
    size = (x[0], weight[0], *geometry.output_size(x[2:], weight[2:]))
    if groups != 1 or extra != (0, 0) or min(size) < 1:
        raise ValueError("not for the direct product")
    return (*geometry.stride, *geometry.padding, *geometry.dilation), size


def _limits(x: Tensor, filters: torch.Size, moves: Moves) -> tuple[int, int, int]:
    """The most rows of a segment of which the direct product makes y, dx and weight gradients; -1: however many."""
    last = moves is None or is_channels_last(x)
    strided = moves is not None and moves[:2] != (1, 1)
    return Ways(x.dtype, filters, moves is None or moves[:4] == (1, 1, 0, 0), last, strided).direct_limits()


class _Layer:
    """A layer's arguments in the form that C++ reads."""

    __slots__ = ("bias", "deltas", "gate", "ids", "num_tasks", "offsets", "order", "shape", "tasks", "weight")

    @classmethod
    def of(
        cls,
        x: Tensor,
        weight: Tensor | None,
        delta: Delta,
        task_ids: Tensor | TaskPlan,
        gate: Tensor | None,
        bias: Tensor | None,
        dims: int,
    ) -> _Layer | None:
        if type(x) not in PLAIN or x.dtype is not torch.float32 or x.layout is not torch.strided:
            return None
        if x.dim() < 2 or (dims == 4 and x.dim() != 4) or x.is_neg() or not may_go_straight(x):
            return None
        self = cls()
        self.weight, self.gate, self.bias = weight, gate, bias
        if type(delta) in _LISTS:
            self.num_tasks = len(delta)
            self.deltas, self.tasks = list(delta), list(range(self.num_tasks))
            if any(d is None for d in delta):
                self.tasks = [t for t, d in enumerate(delta) if d is not None]
                self.deltas = [delta[t] for t in self.tasks]
        elif type(delta) in PLAIN and delta.dim() == dims + 1:
            self.num_tasks, self.deltas, self.tasks = delta.shape[0], [delta], []
        elif delta is None and type(gate) in PLAIN and gate.dim() == 1:
            self.num_tasks, self.deltas, self.tasks = gate.shape[0], [], []
        elif delta is None and type(bias) in PLAIN and bias.dim() == 2:
            self.num_tasks, self.deltas, self.tasks = bias.shape[0], [], []
        else:
            return None
        like = self.deltas[0] if weight is None and self.deltas else weight
        if type(like) not in PLAIN:
            return None
        self.shape = like.shape[-dims:]
        if len(self.shape) != dims or self.num_tasks == 0:
            return None
        if type(task_ids) is TaskPlan:
            self.ids, self.order, self.offsets = task_ids
            return self if type(self.ids) is Tensor and self.ids.dtype in _IDS else None
        if type(task_ids) is not Tensor or task_ids.dtype not in _IDS or not task_ids.is_cpu or task_ids.dim() == 0:
            return None
        plan = task_plan(task_ids, self.num_tasks)
        if plan is None:
            return None
        self.ids, (self.order, self.offsets) = task_ids, plan
        return self

    def run(self, backward_op: Any, x: Tensor, y: Tensor, moves: Moves) -> Tensor | None:
        """y, recorded where autograd records; None: it is not for the direct product, or not right."""
        weight, deltas, gate, bias = self.weight, self.deltas, self.gate, self.bias
        if not extension.task_conv_few(
            weight, deltas, self.tasks, gate, self.order, self.offsets, moves,
            self.num_tasks, self.ids, x, bias, _limits(x, self.shape, moves)[0], BESIDE_OTHERS, y,
        ):  # fmt: skip
            return None
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(x, weight, gate, bias, deltas)):
            return y
        call = backward_op, self.shape, self.tasks, moves
        return _Few.apply(call, [y], x, weight, gate, bias, self.order, self.offsets, *deltas)


class _Few(torch.autograd.Function):
    """What has been computed, with its derivative: past the op, too, but for derivatives of that."""

    @staticmethod
    def forward(
        ctx: Any,
        call: tuple[Any, torch.Size, list[int], Moves],
        result: list[Tensor],
        x: Tensor,
        weight: Tensor | None,
        gate: Tensor | None,
        bias: Tensor | None,
        order: Tensor,
        offsets: Tensor,
        *deltas: Tensor,
    ) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(x, weight, gate, bias, order, offsets, *deltas)
        return result[0]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        x, weight, gate, bias, order, offsets, *deltas = ctx.saved_tensors
        backward_op, filters, tasks, moves = ctx.call
        _, _, of_x, of_weight, of_gate, of_bias, _, _, *of_deltas = ctx.needs_input_grad
        wanted_delta = wanted_deltas(of_deltas, deltas, tasks, offsets)
        if (
            not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and type(grad_out) is Tensor
            and not grad_out.is_neg()
            and may_go_straight(grad_out)
        ):
            keep_freed_memory()  # the gradients of a step are the next one's memory
            grads: list[Tensor | None] = [None] * len(deltas)
            for k in wanted_delta:
                grads[k] = torch.empty_like(deltas[k])
            found = [
                torch.empty_like(p) if want else None
                for p, want in ((x, of_x), (weight, of_weight), (gate, of_gate), (bias, of_bias))
            ]
            grad_x, grad_weight, grad_gate, grad_bias = found
            if extension.task_conv_few_backward(
                weight, deltas, tasks, gate, order, offsets, moves,
                x, _dense(grad_out, x), *_limits(x, filters, moves)[1:], BESIDE_OTHERS,
                grad_x, grad_weight, grads, grad_gate, grad_bias,
            ):  # fmt: skip
                return None, None, grad_x, grad_weight, grad_gate, grad_bias, None, None, *grads
        geometry = [] if moves is None else [moves[:2], moves[2:4], moves[4:], 1]
        wanted = [of_x, of_weight, of_gate, of_bias]
        got = backward_op(
            grad_out, x, weight, deltas, tasks, gate, bias, order, offsets, *geometry, wanted, wanted_delta
        )
        grad_x, grad_weight, grads, grad_gate, grad_bias = by_argument(got, wanted, wanted_delta, len(deltas))
        return None, None, grad_x, grad_weight, grad_gate, grad_bias, None, None, *grads


def _dense(grad_out: Tensor, x: Tensor) -> Tensor:
    """The gradient of a result as C++ reads it; a copy only where it does not lie in one of the common orders."""
    if grad_out.is_contiguous() or (x.dim() == 4 and grad_out.is_contiguous(memory_format=torch.channels_last)):
        return grad_out
    return grad_out.contiguous(memory_format=memory_format(x))
