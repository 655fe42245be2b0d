"""Eager calls of layers on a GPU past their ops, to the launchers themselves.

An op costs the host more than its launchers do: its lists of tensors are flattened, boxed and unboxed, forward and
backward, and each tensor passes all keys of the dispatcher. Of plain tensors that nobody watches none of that is
needed: autograd records one node over what a launcher has made, and that node calls the launcher of the gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmtl.core.dispatch import choose_backend, extension, forced_backend, unwatched
from fastmtl.core.task_weights import (
    STILL,
    Geometry,
    SortedBatch,
    TaskConvCall,
    TaskPlan,
    TaskWeights,
    shape_of_one,
)
from fastmtl.core.tensors import PLAIN
from fastmtl.ops.task_weights import choice
from fastmtl.ops.task_weights.arguments import Pair, check_pictures, read_geometry
from fastmtl.ops.task_weights.operators import by_argument, spelled_out, wanted_deltas
from fastmtl.ops.task_weights.precision import cast_by_autocast

# whose launchers are called past the op; the CPU has ways of its own (`straight.py`)
LAUNCHED = frozenset({"cuda", "triton", "torch"})
_IDS = frozenset({torch.int64, torch.int32})


@dataclass(frozen=True)
class Layer:
    """A layer's ops, and what they choose among.

    Args:
        name: as messages know it.
        moves: whether it has a geometry, which its schemas spell out.
        forward, backward: as `define_layer` takes them.
        op, backward_op: as it returns them.
    """

    name: str
    moves: bool
    forward: Mapping[str, Callable[..., Tensor]]
    backward: Mapping[str, Callable[..., list[Tensor]]]
    op: Any
    backward_op: Any

    def __call__(self, x: Tensor, call: TaskConvCall) -> Tensor:
        """The result of arguments that have been checked, recorded where autograd records."""
        (weight, delta, delta_tasks, gate), (order, offsets), geometry, bias = call
        if torch.compiler.is_compiling() or (x.is_cpu and forced_backend() not in LAUNCHED):
            return self.op(x, weight, delta, delta_tasks, gate, bias, order, offsets, *self.spelled(geometry))
        tensors = (x, weight, gate, bias, order, offsets, *delta)
        backend = self.launched("forward", self.forward, x, call, tensors)
        if backend is None:
            return self.op(x, weight, delta, delta_tasks, gate, bias, order, offsets, *self.spelled(geometry))
        # nothing of it is recorded, views neither: torch refuses to write into those that a node returns
        with torch._C._AutoDispatchBelowADInplaceOrView():
            y = self.forward[backend](x, call)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(x, weight, gate, bias, delta)):
            return y
        return _Launched.apply(self, (delta_tasks, geometry), [y], *tensors)

    def of_plain(
        self,
        x: Any,
        weight: Any,
        delta: Any,
        task_ids: Any,
        gate: Any,
        bias: Any,
        moves: tuple[Any, ...] | None = None,
    ) -> Tensor | None:
        """The same of arguments as the user gives them, checked in C++ at once; None: one at least is not as most are,
        or not right, which the checks in Python say.

        moves: stride, padding, dilation and groups; None: a linear layer.
        """
        if extension is None or type(task_ids) is not TaskPlan or type(x) not in PLAIN:
            return None
        if x.is_cpu and forced_backend() not in LAUNCHED:
            return None
        ids, order, offsets = task_ids
        groups = 1 if moves is None else moves[3]
        if type(groups) is not int or getattr(ids, "dtype", None) not in _IDS:
            return None
        x = cast_by_autocast(x)
        if not extension.task_layer_fits(weight, delta, gate, bias, ids, order, offsets, moves is None, groups, x):
            return None
        tasks: list[int] = []
        deltas: list[Tensor] = []
        if isinstance(delta, (list, tuple)):
            tasks = [t for t, d in enumerate(delta) if d is not None]
            deltas = list(delta) if len(tasks) == len(delta) else [delta[t] for t in tasks]
        elif delta is not None:
            deltas = [delta]
        weights = TaskWeights(weight, deltas, tasks, gate)
        geometry = STILL
        if moves is not None:
            try:
                geometry = _geometry(x.shape, shape_of_one(weights), *moves)
            except (TypeError, ValueError):
                return None
        return self(x, TaskConvCall(weights, SortedBatch(order, offsets), geometry, bias))

    def launched(
        self,
        product: str,
        choices: Mapping[str, Any],
        x: Tensor,
        call: TaskConvCall,
        tensors: Sequence[Tensor | None],
    ) -> str | None:
        """The backend whose launcher may be called with these tensors; None: the op must see the call."""
        if not all(t is None or (type(t) in PLAIN and not t.is_neg()) for t in tensors) or not unwatched():
            return None
        backend = choose_backend(self.name, x.device.type, choices, *choice.of_layer(product, x, call))
        return backend if backend in LAUNCHED else None

    def spelled(self, geometry: Geometry) -> tuple[Any, ...]:
        return spelled_out(geometry) if self.moves else ()


@functools.lru_cache(4096, typed=True)
def _geometry(
    x: torch.Size, weight: torch.Size, stride: Pair, padding: Pair | str, dilation: Pair, groups: int
) -> Geometry:
    """How the filter moves.

    Raises:
        TypeError, ValueError: it is not right, or zeros must be put after x.
    """
    geometry, extra = read_geometry(stride, padding, dilation, groups, weight[2:])
    if extra != (0, 0):
        raise ValueError("zeros after x")
    check_pictures(x, weight[2:], geometry)
    return geometry


class _Launched(torch.autograd.Function):
    """What a launcher has made, with its derivative."""

    @staticmethod
    def forward(ctx: Any, layer: Layer, told: Any, result: list[Tensor], *tensors: Tensor | None) -> Tensor:
        """`told`: what else the call needs beside its tensors, which are x, weight, gate, bias, order, offsets and the
        deltas."""
        ctx.layer, ctx.told = layer, told
        ctx.save_for_backward(*tensors)
        return result[0]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        x, weight, gate, bias, order, offsets, *delta = ctx.saved_tensors
        layer, (delta_tasks, geometry) = ctx.layer, ctx.told
        _, _, _, of_x, of_weight, of_gate, of_bias, _, _, *of_delta = ctx.needs_input_grad
        wanted = [of_x, of_weight, of_gate, of_bias]
        wanted_delta = wanted_deltas(of_delta, delta, delta_tasks, offsets)
        weights = TaskWeights(weight, delta, delta_tasks, gate)
        call = TaskConvCall(weights, SortedBatch(order, offsets), geometry, bias)
        backend = None
        # gradients that are recorded themselves are the op's
        # and those of a batch of gradients (`is_grads_batched`), which has no memory that a launcher reads
        batched = torch._C._functorch.is_legacy_batchedtensor(grad_out)
        if not (batched or torch.is_grad_enabled() or torch.compiler.is_compiling()):
            backend = layer.launched("backward", layer.backward, x, call, (grad_out,))
        if backend is not None:
            with torch._C._AutoDispatchBelowADInplaceOrView():
                found = layer.backward[backend](grad_out, x, call, wanted, wanted_delta)
        else:
            found = layer.backward_op(
                grad_out, x, weight, delta, delta_tasks, gate, bias, order, offsets,
                *layer.spelled(geometry), wanted, wanted_delta,
            )  # fmt: skip
        grad_x, grad_weight, grads, grad_gate, grad_bias = by_argument(found, wanted, wanted_delta, len(delta))
        return None, None, None, grad_x, grad_weight, grad_gate, grad_bias, None, None, *grads
