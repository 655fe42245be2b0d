"""The operators of a layer with per-task weights: forward, backward and weight gradients, with their derivatives.

`task_conv2d` and `task_linear` are two such layers. Each brings its implementations, which take a `TaskConvCall`;
those of weight gradients take a `SortedBatch` and a `Geometry`. A schema knows tensors and lists only: here alone these
values are packed from its arguments, and unpacked for autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmtl.core.dispatch import choose
from fastmtl.core.schemas import define_op
from fastmtl.core.task_weights import STILL, Geometry, SortedBatch, TaskConvCall, empty_gradients
from fastmtl.ops.task_weights import choice
from fastmtl.ops.task_weights.composed import composed_backward

Backends = Mapping[str, Callable[..., Any]]

_WEIGHTS = "Tensor? weight, Tensor[] delta, int[] delta_tasks, Tensor? gate, Tensor? bias"
_PLAN = "Tensor order, Tensor offsets"
# the geometry of a convolution, as schemas have it; a linear layer has none
GEOMETRY = ", int[] stride, int[] padding, int[] dilation, int groups"


def spelled_out(geometry: Geometry) -> tuple[list[int], list[int], list[int], int]:
    """As the schemas take it."""
    return list(geometry.stride), list(geometry.padding), list(geometry.dilation), geometry.groups


# --- forward and backward


def define_layer(
    name: str, geometry: str, forward: Backends, backward: Backends, fake: Callable[[Tensor, TaskConvCall], Tensor]
) -> tuple[Any, Any]:
    """The ops `name` and `name_backward`.

    Args:
        name: as messages know it.
        geometry: `GEOMETRY`, or nothing.
        forward: by backend, `(x, call)` to the result.
        backward: by backend, `(grad_out, x, call, wanted, wanted_delta)` to a list: the gradients of x, weight,
            `delta[k]` for k in `wanted_delta`, gate and bias, of these the wanted ones. The reference's is plain
            differentiable torch.
        fake: `(x, call)` to an empty result.
    """

    def run(x: Tensor, *spelled: Any) -> Tensor:
        call = TaskConvCall.of(*spelled)
        return choose(name, x.device.type, forward, *choice.of_layer("forward", x, call))(x, call)

    def run_fake(x: Tensor, *spelled: Any) -> Tensor:
        return fake(x, TaskConvCall.of(*spelled))

    def run_backward(grad_out: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
        *spelled, wanted, wanted_delta = rest
        call = TaskConvCall.of(*spelled)
        chosen = choose(name, x.device.type, backward, *choice.of_layer("backward", x, call))
        return chosen(grad_out, x, call, wanted, wanted_delta)

    def run_backward_fake(grad_out: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
        *spelled, wanted, wanted_delta = rest
        return empty_gradients(x, TaskConvCall.of(*spelled), wanted, wanted_delta)

    def setup(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
        x, weight, delta, ctx.delta_tasks, gate, bias, order, offsets, *ctx.geometry = inputs
        ctx.save_for_backward(x, weight, gate, bias, order, offsets, *delta)

    def derivative(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        x, weight, gate, bias, order, offsets, *delta = ctx.saved_tensors
        needs = ctx.needs_input_grad
        wanted = [needs[0], needs[1], needs[4], needs[5]]
        wanted_delta = wanted_deltas(needs[2], delta, ctx.delta_tasks, offsets)
        found = backward_op(
            grad_out, x, weight, delta, ctx.delta_tasks, gate, bias, order, offsets, *ctx.geometry, wanted, wanted_delta
        )
        grad_x, grad_weight, grad_delta, grad_gate, grad_bias = by_argument(found, wanted, wanted_delta, len(delta))
        rest = [None] * (2 + len(ctx.geometry))
        return grad_x, grad_weight, grad_delta, no_gradient(ctx.delta_tasks), grad_gate, grad_bias, *rest

    def setup_backward(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
        grad_out, x, weight, delta, delta_tasks, gate, bias, order, offsets, *rest = inputs
        ctx.delta_tasks, ctx.rest = delta_tasks, rest
        ctx.save_for_backward(grad_out, x, weight, gate, bias, order, offsets, *delta)

    def plain_backward(grad_out: Tensor, x: Tensor, *rest: Any) -> Sequence[Tensor]:
        *spelled, wanted, wanted_delta = rest
        return backward["reference"](grad_out, x, TaskConvCall.of(*spelled), wanted, wanted_delta)

    def second_derivative(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
        grad_out, x, weight, gate, bias, order, offsets, *delta = ctx.saved_tensors
        args = (grad_out, x, weight, delta, ctx.delta_tasks, gate, bias, order, offsets, *ctx.rest)
        return composed_backward(plain_backward, args, ctx.needs_input_grad, grads)

    op = define_op(
        f"{name}(Tensor x, {_WEIGHTS}, {_PLAN}{geometry}) -> Tensor",
        run,
        run_fake,
        backward=derivative,
        setup_context=setup,
    )
    backward_op = define_op(
        f"{name}_backward(Tensor grad_out, Tensor x, {_WEIGHTS}, {_PLAN}{geometry}, "
        "bool[] wanted, int[] wanted_delta) -> Tensor[]",
        run_backward,
        run_backward_fake,
        backward=second_derivative,
        setup_context=setup_backward,
    )
    return op, backward_op


def by_argument(
    found: Sequence[Tensor], wanted: Sequence[bool], wanted_delta: Sequence[int], num_delta: int
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None], Tensor | None, Tensor | None]:
    """What a backward op returned, as x, weight, delta, gate, bias."""
    rest = iter(found)
    x, weight = (next(rest) if want else None for want in wanted[:2])
    deltas: list[Tensor | None] = [None] * num_delta
    for k in wanted_delta:
        deltas[k] = next(rest)
    gate, bias = (next(rest) if want else None for want in wanted[2:])
    return x, weight, deltas, gate, bias


def no_gradient(positions: Sequence[int]) -> list[Tensor] | None:
    """What a formula returns for a list of ints: torch takes an empty one for a list of tensors."""
    return None if positions else []


def wanted_deltas(needs: Any, delta: Sequence[Tensor], delta_tasks: Sequence[int], offsets: Tensor) -> list[int]:
    """Positions in `delta` whose gradient is wanted. On the CPU a task of a list that has no sample gets none."""
    found = [k for k in range(len(delta)) if needs[k]]
    bounds = known_bounds(offsets) if delta_tasks else None
    if bounds is not None:
        found = [k for k in found if bounds[delta_tasks[k] + 1] > bounds[delta_tasks[k]]]
    return found


def known_bounds(offsets: Tensor) -> list[int] | None:
    """Where each task's samples begin, if it can be read: on the CPU, with nothing that records or transforms it."""
    if offsets.device.type != "cpu" or type(offsets) is not Tensor or torch.compiler.is_compiling():
        return None
    return None if torch._C._functorch.is_functorch_wrapped_tensor(offsets) else offsets.tolist()


# --- each task's gradient of a shared weight


def define_weight_grad(
    name: str, kernel_size: str, geometry: str, into: Backends, fake: Callable[..., Tensor], layer: tuple[Any, Any]
) -> tuple[Any, Any]:
    """The ops `name_weight_grad`, which returns `[T, ...]`, and `name_weight_grad_out`, which writes it into memory.

    Args:
        name: of the layer.
        kernel_size: the argument of the first for it in a schema, or nothing.
        geometry: `GEOMETRY`, or nothing.
        into: by backend, `(x, grad_out, batch, geometry, out)`, which fills `out`, `[T, ...]` of any strides and dtype.
        fake: from the arguments of the first to an empty result.
        layer: its ops as `define_layer` returns them. Weight gradients are linear in x and grad_out: with the incoming
            gradient as each task's weight, their derivatives are a layer and its input gradient.
    """
    layer_op, layer_backward_op = layer

    def run(x: Tensor, grad_out: Tensor, order: Tensor, offsets: Tensor, *rest: Any) -> Tensor:
        out = fake(x, grad_out, order, offsets, *rest)
        moves = Geometry.of(*rest[1:5]) if geometry else STILL
        chosen = choose(f"{name}_weight_grad", x.device.type, into, *choice.of_weight_grad(x, out, moves, offsets))
        chosen(x, grad_out, SortedBatch(order, offsets), moves, out)
        return out

    def run_into(x: Tensor, grad_out: Tensor, order: Tensor, offsets: Tensor, *rest: Any) -> None:
        *spelled, out = rest
        moves = Geometry.of(*spelled) if spelled else STILL
        chosen = choose(f"{name}_weight_grad", x.device.type, into, *choice.of_weight_grad(x, out, moves, offsets))
        chosen(x, grad_out, SortedBatch(order, offsets), moves, out)

    def setup(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
        x, grad_out, order, offsets, *rest, _dtype = inputs
        ctx.geometry = rest[1:]  # what follows the size of the filter
        ctx.save_for_backward(x, grad_out, order, offsets)

    def derivative(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, grad_out, order, offsets = ctx.saved_tensors
        # as each task's weight, which may be float32 beside a 16-bit x
        each = grad if grad.dtype == torch.float32 and x.dtype.itemsize == 2 else grad.to(x.dtype)
        each_weight = None, [each], [], None, None
        grad_x = grad_grad_out = None
        if ctx.needs_input_grad[0]:
            wanted = [True, False, False, False]
            (grad_x,) = layer_backward_op(grad_out, x, *each_weight, order, offsets, *ctx.geometry, wanted, [])
        if ctx.needs_input_grad[1]:
            grad_grad_out = layer_op(x, *each_weight, order, offsets, *ctx.geometry)
        return grad_x, grad_grad_out, *[None] * (len(ctx.needs_input_grad) - 2)

    op = define_op(
        f"{name}_weight_grad(Tensor x, Tensor grad_out, {_PLAN}{kernel_size}{geometry}, ScalarType? dtype=None) "
        "-> Tensor",
        run,
        fake,
        backward=derivative,
        setup_context=setup,
    )
    out_op = define_op(
        f"{name}_weight_grad_out(Tensor x, Tensor grad_out, {_PLAN}{geometry}, Tensor(a!) out) -> ()",
        run_into,
        lambda *args: None,
    )
    return op, out_op
