"""Linear layer of a mixed-task batch with low-rank deltas: `W + s_t B_t A_t`, of which no product is ever made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtl.core.autograd import no_view
from fastmtl.core.dispatch import choose, triton_kernels
from fastmtl.core.schemas import define_op
from fastmtl.core.task_weights import LoraGradients, LowRankDeltas, SortedBatch, TaskLoraCall, TaskPlan
from fastmtl.core.tensors import PLAIN
from fastmtl.ops.task_weights import reference
from fastmtl.ops.task_weights.arguments import (
    Delta,
    Scaling,
    agreed_tasks,
    check_bias,
    check_ids,
    check_input,
    check_leading,
    read_low_rank,
    scaling_tensor,
    triton_declines,
)
from fastmtl.ops.task_weights.composed import composed_backward
from fastmtl.ops.task_weights.cpu.low_rank import fits
from fastmtl.ops.task_weights.cpu.low_rank import lora as lora_on_cpu
from fastmtl.ops.task_weights.cpu.low_rank import lora_backward as lora_backward_on_cpu
from fastmtl.ops.task_weights.operators import no_gradient, wanted_deltas
from fastmtl.ops.task_weights.precision import cast_by_autocast
from fastmtl.ops.task_weights.straight import may_go_straight
from fastmtl.ops.task_weights.task_plan import read_plan, task_plan


def task_lora(
    x: Tensor,
    weight: Tensor | None,
    A: Delta,
    B: Delta,
    task_ids: Tensor | TaskPlan,
    *,
    scaling: Scaling = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Linear layer of a mixed-task batch with low-rank deltas: sample b sees `W + s_t B_t A_t` with `t = task_ids[b]`.

    The products `B_t A_t` are never made: a row goes through A_t, which shrinks it to the r_t numbers of the delta's
    rank, then through B_t. One batch may hold any number of tasks, of different ranks.

    Args:
        x: `[N, ..., Cin]`; float64 (CPU), float32, bfloat16 or float16. Under autocast it is cast to autocast's dtype.
        weight: W, `[Cout, Cin]`, shared by all tasks; None: there are the deltas alone, for example beside a layer
            whose weight is quantised. In the dtype of x, or float32 beside a 16-bit x.
        A: one `[T, r, Cin]` tensor, or a list of T tensors `[r_t, Cin]` and Nones (None: that task has no delta), or
            None (no task has one). In the dtype of x, or float32 beside a 16-bit x, whichever `weight` has. Of a task
            that has neither W nor a delta nothing is multiplied: its result is the bias, or zero.
        B: one `[T, Cout, r]` tensor, or a list of T tensors `[Cout, r_t]` and Nones: of the kind of A and in its dtype.
        task_ids: int32 or int64 from 0 to T - 1, in the shape of one or more leading dimensions of x: `[N]`, or
            `[N, L]` for packed sequences. Or a `TaskPlan` of such ids.
        scaling: s; None: ones; one number for all tasks; or one for each, as a `[T]` tensor (in the dtype of x, or
            float32 beside a 16-bit x) or a sequence. A tensor gets a gradient. Where it is exactly 0 it closes: A_t and
            B_t are not read, so that a NaN in them reaches nothing but the gradient of s_t, if that is wanted, and
            their gradients are zero. On a GPU a sequence costs a launch for each run of equal numbers.
        bias: `[Cout]`, or `[T, Cout]`: one per task.

    Returns:
        `[N, ..., Cout]`, contiguous, in the dtype of x (or autocast's).

    Raises:
        TypeError, ValueError: an argument of another type, dtype, device, shape or number of tasks; `A` and `B` that
            are not of one kind, or of which one lacks a task that the other has; a rank of 0; neither weight nor delta;
            on the CPU an id out of range (on a GPU those samples become NaN; see `task_plan`).

    Differentiable in x, weight, A, B, scaling and bias, twice. On the CPU the A and B of a list's task that has no
    sample get None for a gradient, except in a compiled graph; on a GPU zeros.

    Source: Hu et al., "LoRA", ICLR 2022, equation 3; one batch for many tasks: Chen et al., "Punica", MLSys 2024, and
    Sheng et al., "S-LoRA", MLSys 2024.

    Example:
        >>> x, ids = torch.ones(2, 3), torch.tensor([1, 0])
        >>> A, B = [None, torch.ones(2, 3)], [None, torch.ones(1, 2)]
        >>> task_lora(x, torch.ones(1, 3), A, B, ids, scaling=0.5).flatten()
        tensor([6., 3.])
    """
    if not torch.compiler.is_compiling():
        y = _straight(x, weight, A, B, task_ids, scaling, bias)
        if y is not None:
            return y
    check_input(x)
    if x.dim() < 2:
        raise ValueError(f"x: expected shape [N, ..., Cin], got {list(x.shape)}")
    x = cast_by_autocast(x)
    check_ids(task_ids, x.device)
    deltas, (num_out, num_in), tasks = read_low_rank(x, weight, A, B, scaling)
    check_bias(x, bias, num_out, tasks)
    if x.shape[-1] != num_in:
        raise ValueError(f"x: expected {num_in} columns as the weights, got {x.shape[-1]}")
    check_leading(task_ids, x.shape[:-1])
    num_tasks = agreed_tasks(tasks)
    factors_a = deltas.A
    if num_in == 0:
        # sums of nothing, and the bias: no backend multiplies matrices without columns
        weight, *factors_a = (None if w is None else F.pad(w, (0, 1)) for w in (weight, *factors_a))
        x = F.pad(x, (0, 1))
    if num_tasks is None:
        # nothing here belongs to a task
        assert weight is not None
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    plan = read_plan(task_ids, num_tasks)
    s = scaling_tensor(x, scaling, num_tasks)
    return task_lora_op(x, weight, factors_a, deltas.B, deltas.tasks, s, bias, plan.order, plan.offsets)


# --- implementations


def _triton(x: Tensor, call: TaskLoraCall) -> Tensor:
    return triton_kernels("task_weights.lora_launchers").lora(x, call)


def _triton_backward(*args: Any) -> list[Tensor]:
    return triton_kernels("task_weights.lora_launchers").lora_backward(*args)


_FORWARD = {"cpu": lora_on_cpu, "triton": _triton, "reference": reference.task_lora}
_BACKWARD = {"cpu": lora_backward_on_cpu, "triton": _triton_backward, "reference": reference.task_lora_backward}


def _run(x: Tensor, *spelled: Any) -> Tensor:
    call = TaskLoraCall.of(*spelled)
    return choose("task_lora", x.device.type, _FORWARD, triton_declines(x, offsets=call.batch.offsets))(x, call)


def _fake(x: Tensor, *spelled: Any) -> Tensor:
    call = TaskLoraCall.of(*spelled)
    return torch.empty((*x.shape[:-1], call.shape[0]), dtype=x.dtype, device=x.device)


def _run_backward(grad_out: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    *spelled, wanted, wanted_a, wanted_b = rest
    call = TaskLoraCall.of(*spelled)
    chosen = choose("task_lora", x.device.type, _BACKWARD, triton_declines(x, offsets=call.batch.offsets))
    return chosen(grad_out, x, call, wanted, wanted_a, wanted_b)


def _fake_backward(grad_out: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    *spelled, wanted, wanted_a, wanted_b = rest
    return LoraGradients.empty(x, TaskLoraCall.of(*spelled), wanted, wanted_a, wanted_b).listed()


# --- derivatives


def _setup(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    x, weight, A, B, ctx.tasks, scaling, bias, order, offsets = inputs
    ctx.count = len(A)
    ctx.save_for_backward(x, weight, scaling, bias, order, offsets, *A, *B)


def _derivative(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    x, weight, scaling, bias, order, offsets, *factors = ctx.saved_tensors
    call = TaskLoraCall.of(weight, factors[: ctx.count], factors[ctx.count :], ctx.tasks, scaling, bias, order, offsets)
    grad_x, grad_weight, grad_a, grad_b, grad_scaling, grad_bias = _gradients(
        grad_out, x, call, ctx.needs_input_grad, _by_op
    )
    return grad_x, grad_weight, grad_a, grad_b, no_gradient(ctx.tasks), grad_scaling, grad_bias, None, None


def _by_op(grad_out: Tensor, x: Tensor, call: TaskLoraCall, *wanted: Any) -> list[Tensor]:
    weight, (A, B, tasks, scaling), batch, bias = call
    scaling = scaling_tensor(x, scaling, batch.num_tasks)
    return task_lora_backward_op(grad_out, x, weight, A, B, tasks, scaling, bias, *batch, *wanted)


def _gradients(
    grad_out: Tensor, x: Tensor, call: TaskLoraCall, needs: Sequence[Any], backward: Callable[..., Sequence[Tensor]]
) -> tuple[Any, ...]:
    """Of x, weight, A, B, scaling and bias, None for what is not wanted. `needs`: as the op's arguments are."""
    deltas, offsets = call.deltas, call.batch.offsets
    wanted = [needs[0], needs[1], needs[5], needs[6]]
    wanted_a, wanted_b = (
        wanted_deltas(needs[k], held, deltas.tasks, offsets) for k, held in ((2, deltas.A), (3, deltas.B))
    )
    found = iter(backward(grad_out, x, call, wanted, wanted_a, wanted_b))
    grad_x, grad_weight = (next(found) if want else None for want in wanted[:2])
    grad_a: list[Tensor | None] = [None] * len(deltas.A)
    grad_b: list[Tensor | None] = [None] * len(deltas.B)
    for grads, positions in ((grad_a, wanted_a), (grad_b, wanted_b)):
        for k in positions:
            grads[k] = next(found)
    grad_scaling, grad_bias = (next(found) if want else None for want in wanted[2:])
    return grad_x, grad_weight, grad_a, grad_b, grad_scaling, grad_bias


def _setup_backward(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    grad_out, x, weight, A, B, ctx.tasks, scaling, bias, order, offsets, *ctx.rest = inputs
    ctx.count = len(A)
    ctx.save_for_backward(grad_out, x, weight, scaling, bias, order, offsets, *A, *B)


def _plain_backward(grad_out: Tensor, x: Tensor, *rest: Any) -> Sequence[Tensor]:
    *spelled, wanted, wanted_a, wanted_b = rest
    return reference.task_lora_backward(grad_out, x, TaskLoraCall.of(*spelled), wanted, wanted_a, wanted_b)


def _second_derivative(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    grad_out, x, weight, scaling, bias, order, offsets, *factors = ctx.saved_tensors
    A, B = factors[: ctx.count], factors[ctx.count :]
    args = (grad_out, x, weight, A, B, ctx.tasks, scaling, bias, order, offsets, *ctx.rest)
    return composed_backward(_plain_backward, args, ctx.needs_input_grad, grads)


_ARGUMENTS = (
    "Tensor? weight, Tensor[] A, Tensor[] B, int[] delta_tasks, Tensor? scaling, Tensor? bias, "
    "Tensor order, Tensor offsets"
)
task_lora_op = define_op(
    f"task_lora(Tensor x, {_ARGUMENTS}) -> Tensor", _run, _fake, backward=_derivative, setup_context=_setup
)
task_lora_backward_op = define_op(
    f"task_lora_backward(Tensor grad_out, Tensor x, {_ARGUMENTS}, bool[] wanted, int[] wanted_a, int[] wanted_b) "
    "-> Tensor[]",
    _run_backward,
    _fake_backward,
    backward=_second_derivative,
    setup_context=_setup_backward,
)


# --- past the op, which takes longer than a small layer itself


def _straight(
    x: Tensor,
    weight: Tensor | None,
    A: Delta,
    B: Delta,
    task_ids: Tensor | TaskPlan,
    scaling: Scaling,
    bias: Tensor | None,
) -> Tensor | None:
    """`task_lora` of plain tensors on the CPU, eager; None: the op must see the call, or say what is wrong with it."""
    if type(x) not in PLAIN or not may_go_straight(x):
        return None
    tasks: list[int] = []
    if isinstance(A, list) and isinstance(B, list) and len(A) == len(B):
        num_tasks = len(A)
        tasks = [t for t, a in enumerate(A) if a is not None]
        if len(tasks) < num_tasks:
            if [t for t, b in enumerate(B) if b is not None] != tasks:
                return None
            A, B = [A[t] for t in tasks], [B[t] for t in tasks]
        if not tasks:
            return None
    elif isinstance(A, Tensor) and isinstance(B, Tensor) and A.dim() == 3:
        num_tasks, A, B = A.shape[0], [A], [B]
    else:
        return None
    others = [w for w in (weight, bias) if w is not None]
    of_tasks = None
    if isinstance(scaling, Tensor):
        of_tasks = scaling
        others.append(scaling)
    elif type(scaling) is float or (type(scaling) is int and scaling.bit_length() < 64):
        scaling = float(scaling)
    elif scaling is not None:
        return None
    if not {*map(type, A), *map(type, B), *map(type, others)} <= PLAIN:
        return None
    if not isinstance(task_ids, TaskPlan):
        if type(task_ids) is not Tensor or not task_ids.is_cpu or task_ids.dim() == 0 or num_tasks == 0:
            return None
        task_ids = task_plan(task_ids, num_tasks)
    ids, order, offsets = task_ids
    if not fits(x, weight, A, B, tasks, num_tasks, of_tasks, bias, ids, order, offsets):
        return None
    if torch.is_grad_enabled() and any(w.requires_grad for w in (x, *others, *A, *B)):
        return _Straight.apply(len(A), tasks, x, weight, scaling, bias, order, offsets, *A, *B)
    deltas = LowRankDeltas(A, B, tasks, scaling)
    return no_view(lora_on_cpu(x, TaskLoraCall(weight, deltas, SortedBatch(order, offsets), bias)))


class _Straight(torch.autograd.Function):
    """The op's forward and backward, with what it leaves of torch's dispatch; of higher derivatives the op's own."""

    @staticmethod
    def forward(
        ctx: Any,
        count: int,
        tasks: list[int],
        x: Tensor,
        weight: Tensor | None,
        scaling: Tensor | float | None,
        bias: Tensor | None,
        order: Tensor,
        offsets: Tensor,
        *factors: Tensor,
    ) -> Tensor:
        ctx.count, ctx.tasks = count, tasks
        of_tasks = scaling if isinstance(scaling, Tensor) else None
        ctx.number = None if of_tasks is not None else scaling
        ctx.save_for_backward(x, weight, of_tasks, bias, order, offsets, *factors)
        deltas = LowRankDeltas(factors[:count], factors[count:], tasks, scaling)
        return no_view(lora_on_cpu(x, TaskLoraCall(weight, deltas, SortedBatch(order, offsets), bias)))

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        x, weight, scaling, bias, order, offsets, *factors = ctx.saved_tensors
        count, needs = ctx.count, ctx.needs_input_grad[2:]
        scaling = ctx.number if scaling is None else scaling
        call = TaskLoraCall.of(weight, factors[:count], factors[count:], ctx.tasks, scaling, bias, order, offsets)
        as_of_op = needs[0], needs[1], needs[6 : 6 + count], needs[6 + count :], None, needs[2], needs[3]
        straight = not torch.is_grad_enabled() and type(grad_out) is Tensor and may_go_straight(grad_out)
        run = lora_backward_on_cpu if straight else _by_op
        grad_x, grad_weight, grad_a, grad_b, grad_scaling, grad_bias = _gradients(grad_out, x, call, as_of_op, run)
        return None, None, grad_x, grad_weight, grad_scaling, grad_bias, None, None, *grad_a, *grad_b
