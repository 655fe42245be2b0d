"""Convolution of a mixed-task batch with `W + s_t Delta_t`, and each task's gradient of a shared filter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtl.core.dispatch import choose, triton_kernels
from fastmtl.core.task_weights import Geometry, SortedBatch, TaskConvCall, TaskPlan, shape_of_one
from fastmtl.core.tensors import memory_format
from fastmtl.ops.gradients.combine import check_unrecorded, mark_written
from fastmtl.ops.task_weights import cuda, plain, reference, straight
from fastmtl.ops.task_weights.arguments import (
    Delta,
    Pair,
    agreed_tasks,
    check_bias,
    check_ids,
    check_input,
    check_leading,
    check_pictures,
    read_geometry,
    read_pair,
    read_weights,
    triton_declines,
)
from fastmtl.ops.task_weights.cpu.backward import conv2d_backward as conv2d_backward_on_cpu
from fastmtl.ops.task_weights.cpu.forward import conv2d as conv2d_on_cpu
from fastmtl.ops.task_weights.cpu.weight_grads import weight_grad as weight_grad_on_cpu
from fastmtl.ops.task_weights.cpu.weight_grads import weight_grads
from fastmtl.ops.task_weights.eager import Layer
from fastmtl.ops.task_weights.operators import GEOMETRY, define_layer, define_weight_grad, spelled_out
from fastmtl.ops.task_weights.precision import cast_by_autocast
from fastmtl.ops.task_weights.task_plan import read_plan


def task_conv2d(
    x: Tensor,
    weight: Tensor | None,
    delta: Delta,
    task_ids: Tensor | TaskPlan,
    *,
    gate: Tensor | None = None,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """2-D convolution of a mixed-task batch: sample b sees `W + s_t Delta_t` with `t = task_ids[b]`.

    Args:
        x: `[N, Cin, H, W]`, NCHW or channels_last; float64 (CPU), float32, bfloat16 or float16. Under autocast it is
            cast to autocast's dtype.
        weight: W, `[Cout, Cin / groups, kh, kw]`, shared by all tasks; None: wholly separate weights. In the dtype of
            x, or float32 beside a 16-bit x (added in float32, rounded once).
        delta: one `[T, Cout, Cin / groups, kh, kw]` tensor, or a list of T tensors and Nones (None: that task sees W),
            or None: every task sees W. In the dtype of `weight`. A task that has neither sees zeros.
        task_ids: `[N]` int32 or int64 from 0 to T - 1, in any order; a task may have no sample. Or a `TaskPlan`, so
            that a network sorts its batch once.
        gate: s, `[T]`; None: all ones. A gate that is exactly 0: that Delta is not read, neither forward nor for the
            gradients of x, `weight` and `delta` (which is zero); the gate's own gradient is `<dW_eff[t], Delta_t>`.
        bias: `[Cout]`, or `[T, Cout]`: one per task.
        stride: as for `F.conv2d`, as are `padding` (`"same"` and `"valid"` included), `dilation` and `groups`.
        padding: see `stride`.
        dilation: see `stride`.
        groups: see `stride`; `groups=Cin` is a depthwise convolution.

    Returns:
        `[N, Cout, Ho, Wo]` in the dtype of x (or autocast's); channels_last if x is.

    Raises:
        TypeError: arguments of the wrong kind or dtype.
        ValueError: shapes, devices or numbers of tasks that do not agree; neither a weight nor a delta; on the CPU an
            id out of range. On a GPU such a sample's result is NaN; `FASTMTL_CHECK=1` raises there too, and waits.

    Differentiable in x, weight, delta, gate and bias, twice (the second derivative through plain torch). On the CPU
    the delta of a task without samples, if it is one of a list, gets no gradient (None). Source: Wallingford et al.
    2022 (TAPS), equation `w = W + 1[s >= tau] delta`.

    Example:
        >>> x, ids = torch.ones(2, 1, 3, 3), torch.tensor([1, 0])
        >>> task_conv2d(x, torch.ones(1, 1, 3, 3), [None, torch.ones(1, 1, 3, 3)], ids).flatten()
        tensor([18.,  9.])
    """
    if not torch.compiler.is_compiling():
        y = straight.conv2d(
            task_conv2d_backward_op, x, weight, delta, task_ids, gate, bias, stride, padding, dilation, groups
        )
        if y is None:
            moves = (stride, padding, dilation, groups)
            y = _layer.of_plain(x, weight, delta, task_ids, gate, bias, moves)
        if y is not None:
            return y
    check_input(x)
    if x.dim() != 4:
        raise ValueError(f"x: expected shape [N, Cin, H, W], got {list(x.shape)}")
    x = cast_by_autocast(x)
    check_ids(task_ids, x.device)
    weights, tasks = read_weights(x, weight, delta, gate, 4)
    shape = shape_of_one(weights)
    check_bias(x, bias, shape[0], tasks)
    geometry, extra = read_geometry(stride, padding, dilation, groups, shape[2:])
    check_channels(x, shape, groups)
    check_leading(task_ids, x.shape[:1])
    num_tasks = agreed_tasks(tasks)
    if extra != (0, 0):
        x = F.pad(x, (0, extra[1], 0, extra[0]))
    check_pictures(x.shape, shape[2:], geometry)
    if num_tasks is None:
        # nothing here belongs to a task
        assert weight is not None
        return F.conv2d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), *geometry)
    plan = read_plan(task_ids, num_tasks)
    return _layer(x, TaskConvCall(weights, SortedBatch(plan.order, plan.offsets), geometry, bias))


def task_conv2d_weight_grad(
    x: Tensor,
    grad_out: Tensor,
    task_ids: Tensor | TaskPlan,
    num_tasks: int,
    kernel_size: Pair,
    *,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Each task's gradient of a filter that all tasks share, in one walk over the batch.

    Args:
        x: `[N, Cin, H, W]`, the input of the convolution.
        grad_out: `[N, Cout, Ho, Wo]` in the dtype of x, the gradient of its output.
        task_ids: `[N]` int32 or int64 from 0 to T - 1, or a `TaskPlan`.
        num_tasks: T.
        kernel_size: kh and kw, or one number for both.
        stride: of the convolution, as are `padding`, `dilation` and `groups`.
        padding: see `stride`.
        dilation: see `stride`.
        groups: see `stride`.
        dtype: of the result; None: that of x.
        out: memory for the result, `[T, Cout, Cin / groups, kh, kw]` of any strides that do not overlap and any
            floating-point dtype: rows of a gradient bank in the parameter's own memory order, for instance. Not
            recorded for autograd.

    Returns:
        `out`, or `[T, Cout, Cin / groups, kh, kw]`; zero for a task without samples. Their sum over the tasks is the
        gradient of the whole batch.

    Raises:
        TypeError, ValueError: as `task_conv2d`; a `grad_out` or `out` that does not fit.
        RuntimeError: `out` together with an argument that needs a gradient.

    Differentiable in x and grad_out, twice. Source: PCGrad and its kin need g_t of each task (Yu et al. 2020).

    Example:
        >>> x = torch.ones(3, 1, 2, 2)
        >>> task_conv2d_weight_grad(x, x, torch.tensor([0, 1, 1]), 2, 1).flatten()
        tensor([4., 8.])
    """
    check_input(x)
    if x.dim() != 4:
        raise ValueError(f"x: expected shape [N, Cin, H, W], got {list(x.shape)}")
    check_ids(task_ids, x.device)
    check_grad_out(grad_out, x)
    kernel = read_pair(kernel_size, "kernel_size", 1)
    geometry, extra = read_geometry(stride, padding, dilation, groups, kernel)
    check_leading(task_ids, x.shape[:1])
    if extra != (0, 0):
        x = F.pad(x, (0, extra[1], 0, extra[0]))
    if grad_out.dim() != 4:
        raise ValueError(f"grad_out: expected shape [N, Cout, Ho, Wo], got {list(grad_out.shape)}")
    if x.shape[1] % groups or grad_out.shape[1] % groups:
        raise ValueError(
            f"groups: expected a divisor of Cin = {x.shape[1]} and Cout = {grad_out.shape[1]}, got {groups}"
        )
    shape = (grad_out.shape[1], x.shape[1] // groups, *kernel)
    check_pictures(x.shape, kernel, geometry)
    expected = [x.shape[0], shape[0], *geometry.output_size(x.shape[2:], kernel)]
    if list(grad_out.shape) != expected:
        raise ValueError(f"grad_out: expected shape {expected}, got {list(grad_out.shape)}")
    plan = read_plan(task_ids, num_tasks)
    if out is None:
        check_result_dtype(dtype)
        return task_conv2d_weight_grad_op(x, grad_out, plan.order, plan.offsets, kernel, *spelled_out(geometry), dtype)
    check_out(out, [num_tasks, *shape], x, grad_out, dtype)
    task_conv2d_weight_grad_out_op(x, grad_out, plan.order, plan.offsets, *spelled_out(geometry), out)
    mark_written([out])
    return out


# --- checks


def check_channels(x: Tensor, shape: Sequence[int], groups: int) -> None:
    if shape[0] % groups:
        raise ValueError(f"groups: expected a divisor of Cout = {shape[0]}, got {groups}")
    if shape[1] == 0:
        raise ValueError("weight: expected at least one input channel, got none")
    if x.shape[1] != shape[1] * groups:
        raise ValueError(
            f"x: expected {shape[1] * groups} channels ({shape[1]} x {groups} groups, by the weights), got {x.shape[1]}"
        )


def check_grad_out(grad_out: Any, x: Tensor) -> None:
    check_input(grad_out, "grad_out")
    if grad_out.dtype != x.dtype:
        raise TypeError(f"grad_out: expected {x.dtype} as x, got {grad_out.dtype}")
    if grad_out.device != x.device:
        raise ValueError(f"grad_out: expected device {x.device} as x, got {grad_out.device}")


def check_result_dtype(dtype: Any) -> None:
    if dtype is not None and (not isinstance(dtype, torch.dtype) or not dtype.is_floating_point):
        raise TypeError(f"dtype: expected a floating-point dtype or None, got {dtype!r}")


def check_out(out: Any, shape: Sequence[int], x: Tensor, grad_out: Tensor, dtype: torch.dtype | None) -> None:
    check_input(out, "out")
    if list(out.shape) != list(shape) or out.device != x.device:
        raise ValueError(f"out: expected shape {list(shape)} on {x.device}, got {list(out.shape)} on {out.device}")
    if dtype is not None and dtype != out.dtype:
        raise ValueError(f"dtype: expected {out.dtype} as out, or None, got {dtype}")
    reach = 1
    for stride, size in sorted((s, n) for s, n in zip(out.stride(), out.shape, strict=True) if n > 1):
        if stride < reach:
            raise ValueError(f"out: expected elements that don't overlap, got strides {list(out.stride())}")
        reach = stride * (size - 1) + reach
    if not torch.compiler.is_compiling():  # there, tensors have no address
        held = out.untyped_storage().data_ptr() if out.numel() else None
        for name, y in (("x", x), ("grad_out", grad_out)):
            if y.numel() and y.untyped_storage().data_ptr() == held:
                raise ValueError(f"out: expected memory of its own, got that of {name}")
    check_unrecorded(x, grad_out, out)


# --- implementations


def _triton_launchers() -> Any:
    return triton_kernels("task_weights.conv_launchers")


def _triton(x: Tensor, call: TaskConvCall) -> Tensor:
    return _triton_launchers().conv2d(x, call)


def _triton_backward(
    grad_out: Tensor, x: Tensor, call: TaskConvCall, wanted: Sequence[bool], wanted_delta: Sequence[int]
) -> list[Tensor]:
    return _triton_launchers().conv2d_backward(grad_out, x, call, wanted, wanted_delta)


def _triton_weight_grad(x: Tensor, grad_out: Tensor, batch: SortedBatch, geometry: Geometry, out: Tensor) -> None:
    _triton_launchers().weight_grad(x, grad_out, batch, geometry, out)


def _fake(x: Tensor, call: TaskConvCall) -> Tensor:
    shape = call.weights.shape
    size = (x.shape[0], shape[0], *call.geometry.output_size(x.shape[2:], shape[2:]))
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _weight_grad_fake(
    x: Tensor,
    grad_out: Tensor,
    order: Tensor,
    offsets: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    shape = (offsets.shape[0] - 1, grad_out.shape[1], x.shape[1] // groups, *kernel_size)
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device)


_FORWARD = {
    "cpu": conv2d_on_cpu,
    "cuda": cuda.conv2d,
    "torch": plain.conv2d,
    "triton": _triton,
    "reference": reference.task_conv2d,
}
_BACKWARD = {
    "cpu": conv2d_backward_on_cpu,
    "cuda": cuda.conv2d_backward,
    "torch": plain.conv2d_backward,
    "triton": _triton_backward,
    "reference": reference.task_conv2d_backward,
}
_WEIGHT_GRAD = {
    "cpu": weight_grad_on_cpu,
    "cuda": cuda.conv2d_weight_grad,
    "torch": plain.conv2d_weight_grad,
    "triton": _triton_weight_grad,
    "reference": reference.task_conv2d_weight_grad_out,
}

task_conv2d_op, task_conv2d_backward_op = define_layer("task_conv2d", GEOMETRY, _FORWARD, _BACKWARD, _fake)
_layer = Layer("task_conv2d", True, _FORWARD, _BACKWARD, task_conv2d_op, task_conv2d_backward_op)
task_conv2d_weight_grad_op, task_conv2d_weight_grad_out_op = define_weight_grad(
    "task_conv2d",
    ", int[] kernel_size",
    GEOMETRY,
    _WEIGHT_GRAD,
    _weight_grad_fake,
    (task_conv2d_op, task_conv2d_backward_op),
)


def weight_grad_parts(
    x: Tensor,
    grad_out: Tensor,
    order: Tensor,
    offsets: Tensor,
    geometry: Geometry,
    weight: Tensor,
    bias: bool = False,
) -> tuple[list[Tensor | None], Tensor | None] | None:
    """The weight gradients as they are made, one tensor for each task (None: no sample), in the dtype of `weight`; and
    with `bias` those of the bias, `[T, Cout]`, in at least float32.

    None where another backend than the CPU's would be asked, which makes them in one piece.
    """
    if x.device.type != "cpu" or not (x.numel() and grad_out.numel()):
        return None
    run = choose("task_conv2d_weight_grad", "cpu", _WEIGHT_GRAD, triton_declines(x, offsets=offsets))
    if run is not weight_grad_on_cpu:
        return None
    grads, sums = weight_grads(x, grad_out, SortedBatch(order, offsets), geometry, weight, bias)
    return [None if grad is None else grad.to(weight.dtype) for grad in grads], sums
