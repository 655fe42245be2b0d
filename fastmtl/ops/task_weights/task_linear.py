"""Linear layer of a mixed-task batch with `W + s_t Delta_t`, and each task's gradient of a shared matrix.

A linear layer is a 1x1 convolution over rows: the implementations are those of `task_conv2d`, on views.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtl.core.dispatch import triton_kernels
from fastmtl.core.task_weights import STILL, Geometry, SortedBatch, TaskConvCall, TaskPlan, TaskWeights, shape_of_one
from fastmtl.ops.gradients.combine import mark_written
from fastmtl.ops.task_weights import cuda, plain, reference, straight
from fastmtl.ops.task_weights.arguments import (
    Delta,
    agreed_tasks,
    check_bias,
    check_ids,
    check_input,
    check_leading,
    read_weights,
)
from fastmtl.ops.task_weights.cpu.backward import conv2d_backward as conv2d_backward_on_cpu
from fastmtl.ops.task_weights.cpu.forward import conv2d as conv2d_on_cpu
from fastmtl.ops.task_weights.cpu.weight_grads import weight_grad as weight_grad_on_cpu
from fastmtl.ops.task_weights.eager import Layer
from fastmtl.ops.task_weights.operators import define_layer, define_weight_grad
from fastmtl.ops.task_weights.precision import cast_by_autocast
from fastmtl.ops.task_weights.task_conv2d import check_grad_out, check_out, check_result_dtype
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
            dtype of `weight`. A task that has neither sees zeros.
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
    if not torch.compiler.is_compiling():
        y = straight.linear(task_linear_backward_op, x, weight, delta, task_ids, gate, bias)
        if y is None:
            y = _layer.of_plain(x, weight, delta, task_ids, gate, bias)
        if y is not None:
            return y
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
    if x.shape[-1] == 0:
        # sums of nothing, and the bias: no backend multiplies matrices without columns
        weight, *deltas = (None if w is None else F.pad(w, (0, 1)) for w in (weight, *weights.delta))
        x, weights = F.pad(x, (0, 1)), weights._replace(weight=weight, delta=deltas)
    if num_tasks is None:
        # nothing here belongs to a task
        assert weight is not None
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    plan = read_plan(task_ids, num_tasks)
    return _layer(x, TaskConvCall(weights, SortedBatch(plan.order, plan.offsets), STILL, bias))


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


def _rows(y: Tensor, x: Tensor) -> Tensor:
    # [N, C, 1, R] back to rows; a view where y is channels_last, as the kernels make it
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], y.shape[1])


def _filter(w: Tensor) -> Tensor:
    return w[..., None, None]


def _with_filters(call: TaskConvCall) -> TaskConvCall:
    (weight, delta, delta_tasks, gate), batch, geometry, bias = call
    filters = TaskWeights(None if weight is None else _filter(weight), [_filter(d) for d in delta], delta_tasks, gate)
    return TaskConvCall(filters, batch, geometry, bias)


def _forward_by(conv2d: Callable[..., Tensor], x: Tensor, call: TaskConvCall) -> Tensor:
    return _rows(conv2d(_images(x, call.batch.order), _with_filters(call)), x)


def _cpu(x: Tensor, call: TaskConvCall) -> Tensor:
    return _forward_by(conv2d_on_cpu, x, call)


def _triton(x: Tensor, call: TaskConvCall) -> Tensor:
    return _forward_by(triton_kernels("task_weights.conv_launchers").conv2d, x, call)


def _fake(x: Tensor, call: TaskConvCall) -> Tensor:
    return torch.empty((*x.shape[:-1], call.weights.shape[0]), dtype=x.dtype, device=x.device)


def _backward_by(
    conv2d_backward: Callable[..., list[Tensor]],
    grad_out: Tensor,
    x: Tensor,
    call: TaskConvCall,
    wanted: Sequence[bool],
    wanted_delta: Sequence[int],
) -> list[Tensor]:
    images = _images(grad_out, call.batch.order), _images(x, call.batch.order)
    found = conv2d_backward(*images, _with_filters(call), wanted, wanted_delta)
    first = [_rows(found.pop(0), x)] if wanted[0] else []
    # of filters, matrices again; gradients of gate and bias have fewer dimensions
    return [*first, *(g.view(g.shape[:-2]) if g.dim() > 2 else g for g in found)]


def _cpu_backward(*args: Any) -> list[Tensor]:
    return _backward_by(conv2d_backward_on_cpu, *args)


def _triton_backward(*args: Any) -> list[Tensor]:
    return _backward_by(triton_kernels("task_weights.conv_launchers").conv2d_backward, *args)


def _weight_grad_by(
    weight_grad: Callable[..., None],
    x: Tensor,
    grad_out: Tensor,
    batch: SortedBatch,
    geometry: Geometry,
    out: Tensor,
) -> None:
    weight_grad(_images(x, batch.order), _images(grad_out, batch.order), batch, geometry, _filter(out))


def _cpu_weight_grad(*args: Any) -> None:
    _weight_grad_by(weight_grad_on_cpu, *args)


def _triton_weight_grad(*args: Any) -> None:
    _weight_grad_by(triton_kernels("task_weights.conv_launchers").weight_grad, *args)


def _weight_grad_fake(
    x: Tensor, grad_out: Tensor, order: Tensor, offsets: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    shape = (offsets.shape[0] - 1, grad_out.shape[-1], x.shape[-1])
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device)


_FORWARD = {
    "cpu": _cpu,
    "cuda": cuda.linear,
    "torch": plain.linear,
    "triton": _triton,
    "reference": reference.task_linear,
}
_BACKWARD = {
    "cpu": _cpu_backward,
    "cuda": cuda.linear_backward,
    "torch": plain.linear_backward,
    "triton": _triton_backward,
    "reference": reference.task_linear_backward,
}
_WEIGHT_GRAD = {
    "cpu": _cpu_weight_grad,
    "cuda": cuda.linear_weight_grad,
    "torch": plain.linear_weight_grad,
    "triton": _triton_weight_grad,
    "reference": reference.task_linear_weight_grad_out,
}

task_linear_op, task_linear_backward_op = define_layer("task_linear", "", _FORWARD, _BACKWARD, _fake)
_layer = Layer("task_linear", False, _FORWARD, _BACKWARD, task_linear_op, task_linear_backward_op)
task_linear_weight_grad_op, task_linear_weight_grad_out_op = define_weight_grad(
    "task_linear", "", "", _WEIGHT_GRAD, _weight_grad_fake, (task_linear_op, task_linear_backward_op)
)
