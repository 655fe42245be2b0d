"""Linear layer of a mixed-task batch with `W + s_t Delta_t`, and each task's gradient of a shared matrix.

A linear layer is a 1x1 convolution over rows: the implementations are those of `task_conv2d`, on views.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtl.core.dispatch import choose, triton_kernels
from fastmtl.core.schemas import define_op
from fastmtl.core.task_weights import Geometry, TaskPlan, TaskWeights, empty_gradients, shape_of_one
from fastmtl.ops.gradients.combine import mark_written
from fastmtl.ops.task_weights import reference
from fastmtl.ops.task_weights.arguments import (
    Delta,
    agreed_tasks,
    check_bias,
    check_ids,
    check_input,
    check_leading,
    read_weights,
    triton_declines,
)
from fastmtl.ops.task_weights.composed import composed_backward
from fastmtl.ops.task_weights.cpu import conv2d as task_cpu
from fastmtl.ops.task_weights.precision import cast_by_autocast
from fastmtl.ops.task_weights.task_conv2d import (
    check_grad_out,
    check_out,
    check_result_dtype,
    gradients_by_argument,
    no_gradient,
    wanted_deltas,
)
from fastmtl.ops.task_weights.task_plan import read_plan


def task_linear(
    x: Tensor,
    weight: Tensor | None,
    delta: Delta,
    task_ids: Tensor | TaskPlan,
    *,
    gate: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Linear layer of a mixed-task batch: sample b sees `W + s_t * Delta_t` with `t = task_ids[b]`.

    Args:
        x: `[N, ..., Cin]`; float64 (CPU), float32, bfloat16 or float16. Under autocast it is cast to autocast's dtype.
        weight: W, `[Cout, Cin]`, shared by all tasks; None: wholly separate weights. In the dtype of x, or float32
            beside a 16-bit x.
        delta: one `[T, Cout, Cin]` tensor, or a list of T tensors and Nones (None: that task sees W), or None. In the
            dtype of `weight`.
        task_ids: int32 or int64 from 0 to T - 1, in the shape of one or more leading dimensions of x: `[N]`, or
            `[N, L]` for packed sequences. Or a `TaskPlan` of such ids.
        gate: s, `[T]`; None: all ones. What a gate that is exactly 0 means: see `task_conv2d`.
        bias: `[Cout]`, or `[T, Cout]`: one per task.

    Returns:
        `[N, ..., Cout]`, contiguous, in the dtype of x (or autocast's).

    Raises:
        TypeError, ValueError: as `task_conv2d`.

    Differentiable in x, weight, delta, gate and bias, twice, as `task_conv2d`.

    Example:
        >>> x, ids = torch.ones(2, 3), torch.tensor([1, 0])
        >>> task_linear(x, torch.ones(1, 3), [None, torch.ones(1, 3)], ids, gate=torch.tensor([1.0, 0.5])).flatten()
        tensor([4.5000, 3.0000])
    """
    check_input(x)
    if x.dim() < 2:
        raise ValueError(f"x: expected shape [N, ..., Cin], got {list(x.shape)}")
    x = cast_by_autocast(x)
    check_ids(task_ids, x.device)
    weights, tasks = read_weights(x, weight, delta, gate, 2)
    shape = shape_of_one(weights)
    check_bias(x, bias, shape[0], tasks)
    if x.shape[-1] != shape[1]:
        raise ValueError(f"x: expected {shape[1]} columns as the weights, got {x.shape[-1]}")
    check_leading(task_ids, x.shape[:-1])
    num_tasks = agreed_tasks(tasks)
    if num_tasks is None:
        # nothing here belongs to a task
        assert weight is not None
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    plan = read_plan(task_ids, num_tasks)
    return task_linear_op(x, weight, weights.delta, weights.delta_tasks, gate, bias, plan.order, plan.offsets)


def task_linear_weight_grad(
    x: Tensor,
    grad_out: Tensor,
    task_ids: Tensor | TaskPlan,
    num_tasks: int,
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Each task's gradient of a matrix that all tasks share, in one walk over the batch.

    Args:
        x: `[N, ..., Cin]`, the input of the layer.
        grad_out: `[N, ..., Cout]` in the dtype of x, the gradient of its output.
        task_ids: as for `task_linear`.
        num_tasks: T.
        dtype: of the result; None: that of x.
        out: memory for the result, `[T, Cout, Cin]` of any strides that do not overlap and any floating-point dtype.
            Not recorded for autograd.

    Returns:
        `out`, or `[T, Cout, Cin]`; zero for a task without samples.

    Raises:
        TypeError, ValueError: as `task_linear`; a `grad_out` or `out` that does not fit.
        RuntimeError: `out` together with an argument that needs a gradient.

    Differentiable in x and grad_out, twice. Source: PCGrad and its kin need g_t of each task (Yu et al. 2020).

    Example:
        >>> task_linear_weight_grad(torch.eye(2), torch.ones(2, 1), torch.tensor([0, 1]), 2).flatten(1)
        tensor([[1., 0.],
                [0., 1.]])
    """
    check_input(x)
    if x.dim() < 2:
        raise ValueError(f"x: expected shape [N, ..., Cin], got {list(x.shape)}")
    check_ids(task_ids, x.device)
    check_grad_out(grad_out, x)
    if grad_out.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"grad_out: expected shape [{', '.join(map(str, x.shape[:-1]))}, Cout], got {list(grad_out.shape)}"
        )
    check_leading(task_ids, x.shape[:-1])
    plan = read_plan(task_ids, num_tasks)
    if out is None:
        check_result_dtype(dtype)
        return task_linear_weight_grad_op(x, grad_out, plan.order, plan.offsets, dtype)
    check_out(out, [num_tasks, grad_out.shape[-1], x.shape[-1]], x, grad_out, dtype)
    task_linear_weight_grad_out_op(x, grad_out, plan.order, plan.offsets, out)
    mark_written([out])
    return out


# --- implementations: rows as pictures of one line, [N, C, 1, R], channels last


def _images(x: Tensor, order: Tensor) -> Tensor:
    count = order.shape[0]
    rows = x.numel() // (count * x.shape[-1]) if count and x.shape[-1] else 0
    x = x.contiguous().view(count, rows, x.shape[-1])
    # strides spelled out: those of dimensions of size 1 would otherwise depend on the way here
    return x.as_strided((count, x.shape[2], 1, rows), (rows * x.shape[2], 1, rows * x.shape[2], x.shape[2]))


def _filter(w: Tensor) -> Tensor:
    return w[..., None, None]


def _filters(weight, delta, delta_tasks, gate) -> TaskWeights:
    return TaskWeights(None if weight is None else _filter(weight), [_filter(d) for d in delta], delta_tasks, gate)


def _cpu(x, weight, delta, delta_tasks, gate, bias, order, offsets):
    y = task_cpu.conv2d(_images(x, order), _filters(weight, delta, delta_tasks, gate), bias, order, offsets, Geometry())
    return _rows(y, x)


def _triton(x, weight, delta, delta_tasks, gate, bias, order, offsets):
    weights = _filters(weight, delta, delta_tasks, gate)
    return _rows(
        triton_kernels("task_weights.task_conv2d").conv2d(_images(x, order), weights, bias, order, offsets, Geometry()),
        x,
    )


def _rows(y: Tensor, x: Tensor) -> Tensor:
    # [N, C, 1, R] back to rows; a view where y is channels_last, as the kernels make it
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], y.shape[1])


_FORWARD = {"cpu": _cpu, "triton": _triton, "reference": reference.task_linear}


def _task_linear(x, weight, delta, delta_tasks, gate, bias, order, offsets) -> Tensor:
    run = choose("task_linear", x.device.type, _FORWARD, triton_declines(x, offsets=offsets))
    return run(x, weight, delta, delta_tasks, gate, bias, order, offsets)


def _fake(x, weight, delta, delta_tasks, gate, bias, order, offsets):
    shape = TaskWeights(weight, delta, delta_tasks, gate).shape
    return torch.empty((*x.shape[:-1], shape[0]), dtype=x.dtype, device=x.device)


def _backward_on(run, grad_out, x, weight, delta, delta_tasks, gate, bias, order, offsets, wanted, wanted_delta):
    weights = _filters(weight, delta, delta_tasks, gate)
    images = _images(grad_out, order), _images(x, order)
    found = run(*images, weights, bias, order, offsets, Geometry(), wanted, wanted_delta)
    plain = TaskWeights(weight, delta, delta_tasks, gate)
    like = _gradient_shapes(x, plain, bias, wanted, wanted_delta)
    first = [_rows(found.pop(0), x)] if wanted[0] else []
    return [*first, *(g.reshape(shape) for g, shape in zip(found, like[len(first) :], strict=True))]


def _gradient_shapes(x, weights, bias, wanted, wanted_delta) -> list[torch.Size]:
    shapes = [x.shape] if wanted[0] else []
    if wanted[1] and weights.weight is not None:
        shapes.append(weights.weight.shape)
    shapes += [weights.delta[k].shape for k in wanted_delta]
    return shapes + [
        p.shape for want, p in zip(wanted[2:], (weights.gate, bias), strict=True) if want and p is not None
    ]


def _backward_cpu(*args):
    return _backward_on(task_cpu.conv2d_backward, *args)


def _backward_triton(*args):
    return _backward_on(triton_kernels("task_weights.task_conv2d").conv2d_backward, *args)


_BACKWARD = {"cpu": _backward_cpu, "triton": _backward_triton, "reference": reference.task_linear_backward}


def _task_linear_backward(
    grad_out, x, weight, delta, delta_tasks, gate, bias, order, offsets, wanted, wanted_delta
) -> list[Tensor]:
    run = choose("task_linear", x.device.type, _BACKWARD, triton_declines(x, offsets=offsets))
    return run(grad_out, x, weight, delta, delta_tasks, gate, bias, order, offsets, wanted, wanted_delta)


def _backward_fake(grad_out, x, weight, delta, delta_tasks, gate, bias, order, offsets, wanted, wanted_delta):
    return empty_gradients(x, TaskWeights(weight, delta, delta_tasks, gate), bias, wanted, wanted_delta)


def _weight_grad_into(run, x, grad_out, order, offsets, out) -> Tensor:
    run(_images(x, order), _images(grad_out, order), order, offsets, Geometry(), _filter(out))
    return out


def _weight_grad_cpu(x, grad_out, order, offsets, dtype=None):
    out = _weight_grad_fake(x, grad_out, order, offsets, dtype)
    return _weight_grad_into(task_cpu.weight_grad, x, grad_out, order, offsets, out)


def _weight_grad_triton(x, grad_out, order, offsets, dtype=None):
    out = _weight_grad_fake(x, grad_out, order, offsets, dtype)
    return _weight_grad_into(triton_kernels("task_weights.task_conv2d").weight_grad, x, grad_out, order, offsets, out)


_WEIGHT_GRAD = {
    "cpu": _weight_grad_cpu,
    "triton": _weight_grad_triton,
    "reference": reference.task_linear_weight_grad,
}


def _weight_grad(
    x: Tensor, grad_out: Tensor, order: Tensor, offsets: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    run = choose("task_linear_weight_grad", x.device.type, _WEIGHT_GRAD, triton_declines(x, offsets=offsets))
    return run(x, grad_out, order, offsets, dtype)


def _weight_grad_fake(x, grad_out, order, offsets, dtype=None):
    shape = (offsets.shape[0] - 1, grad_out.shape[-1], x.shape[-1])
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device)


def _weight_grad_out_cpu(*args) -> None:
    _weight_grad_into(task_cpu.weight_grad, *args)


def _weight_grad_out_triton(*args) -> None:
    _weight_grad_into(triton_kernels("task_weights.task_conv2d").weight_grad, *args)


_WEIGHT_GRAD_OUT = {
    "cpu": _weight_grad_out_cpu,
    "triton": _weight_grad_out_triton,
    "reference": reference.task_linear_weight_grad_out,
}


def _weight_grad_out(x, grad_out, order, offsets, out) -> None:
    run = choose("task_linear_weight_grad", x.device.type, _WEIGHT_GRAD_OUT, triton_declines(x, out, offsets=offsets))
    run(x, grad_out, order, offsets, out)


# --- autograd


def _setup(ctx, inputs, output) -> None:
    x, weight, delta, ctx.delta_tasks, gate, bias, order, offsets = inputs
    ctx.save_for_backward(x, weight, gate, bias, order, offsets, *delta)


def _backward(ctx, grad_out: Tensor):
    x, weight, gate, bias, order, offsets, *delta = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wanted = [needs[0], needs[1], needs[4], needs[5]]
    wanted_delta = wanted_deltas(needs[2], delta, ctx.delta_tasks, offsets)
    found = task_linear_backward_op(
        grad_out, x, weight, delta, ctx.delta_tasks, gate, bias, order, offsets, wanted, wanted_delta
    )
    grad_x, grad_weight, grad_delta, grad_gate, grad_bias = gradients_by_argument(
        found, wanted, wanted_delta, len(delta)
    )
    return grad_x, grad_weight, grad_delta, no_gradient(ctx.delta_tasks), grad_gate, grad_bias, None, None


def _setup_backward(ctx, inputs, output) -> None:
    grad_out, x, weight, delta, delta_tasks, gate, bias, order, offsets, *rest = inputs
    ctx.delta_tasks, ctx.rest = delta_tasks, rest
    ctx.save_for_backward(grad_out, x, weight, gate, bias, order, offsets, *delta)


def _backward_backward(ctx, grads: Sequence[Tensor]):
    grad_out, x, weight, gate, bias, order, offsets, *delta = ctx.saved_tensors
    args = (grad_out, x, weight, delta, ctx.delta_tasks, gate, bias, order, offsets, *ctx.rest)
    return composed_backward(reference.task_linear_backward, args, ctx.needs_input_grad, grads)


def _setup_weight_grad(ctx, inputs, output) -> None:
    x, grad_out, order, offsets, _ = inputs
    ctx.save_for_backward(x, grad_out, order, offsets)


def _weight_grad_backward(ctx, grad: Tensor):
    # linear in both: with the incoming gradient as each task's matrix, a linear layer and its input gradient
    x, grad_out, order, offsets = ctx.saved_tensors
    grad = grad.to(x.dtype)
    grad_x = grad_grad_out = None
    if ctx.needs_input_grad[0]:
        wanted = [True, False, False, False]
        (grad_x,) = task_linear_backward_op(grad_out, x, None, [grad], [], None, None, order, offsets, wanted, [])
    if ctx.needs_input_grad[1]:
        grad_grad_out = task_linear_op(x, None, [grad], [], None, None, order, offsets)
    return grad_x, grad_grad_out, None, None, None


_WEIGHTS = "Tensor? weight, Tensor[] delta, int[] delta_tasks, Tensor? gate, Tensor? bias"
_PLAN = "Tensor order, Tensor offsets"

task_linear_op = define_op(
    f"task_linear(Tensor x, {_WEIGHTS}, {_PLAN}) -> Tensor",
    _task_linear,
    _fake,
    backward=_backward,
    setup_context=_setup,
)
task_linear_backward_op = define_op(
    f"task_linear_backward(Tensor grad_out, Tensor x, {_WEIGHTS}, {_PLAN}, bool[] wanted, int[] wanted_delta) "
    "-> Tensor[]",
    _task_linear_backward,
    _backward_fake,
    backward=_backward_backward,
    setup_context=_setup_backward,
)
task_linear_weight_grad_op = define_op(
    f"task_linear_weight_grad(Tensor x, Tensor grad_out, {_PLAN}, ScalarType? dtype=None) -> Tensor",
    _weight_grad,
    _weight_grad_fake,
    backward=_weight_grad_backward,
    setup_context=_setup_weight_grad,
)
task_linear_weight_grad_out_op = define_op(
    f"task_linear_weight_grad_out(Tensor x, Tensor grad_out, {_PLAN}, Tensor(a!) out) -> ()",
    _weight_grad_out,
    lambda *args: None,
)
