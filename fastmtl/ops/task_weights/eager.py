"""Eager calls of layers on a GPU past their ops, to the launchers themselves.

An op costs the host more than its launchers do: its lists of tensors are flattened, boxed and unboxed, forward and
backward, and each tensor passes all keys of the dispatcher. Of plain tensors that nobody watches none of that is
needed: autograd records one node over what a launcher has made, and that node calls the launcher of the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmtl.core.autograd import no_view
from fastmtl.core.dispatch import choose_backend, forced_backend, unwatched
from fastmtl.core.task_weights import Geometry, SortedBatch, TaskConvCall, TaskWeights
from fastmtl.core.tensors import PLAIN
from fastmtl.ops.task_weights import choice
from fastmtl.ops.task_weights.operators import by_argument, spelled_out, wanted_deltas

# whose launchers are called past the op; the CPU has ways of its own (`straight.py`)
LAUNCHED = frozenset({"cuda", "triton"})


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
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(x, weight, gate, bias, delta)):
            return no_view(self.forward[backend](x, call))
        with torch.no_grad():
            y = self.forward[backend](x, call)
        return _Launched.apply(self, (delta_tasks, geometry), [no_view(y)], *tensors)

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
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            backend = layer.launched("backward", layer.backward, x, call, (grad_out,))
        if backend is not None:
            found = no_view(layer.backward[backend](grad_out, x, call, wanted, wanted_delta))
        else:
            found = layer.backward_op(
                grad_out, x, weight, delta, delta_tasks, gate, bias, order, offsets,
                *layer.spelled(geometry), wanted, wanted_delta,
            )  # fmt: skip
        grad_x, grad_weight, grads, grad_gate, grad_bias = by_argument(found, wanted, wanted_delta, len(delta))
        return None, None, None, grad_x, grad_weight, grad_gate, grad_bias, None, None, *grads
