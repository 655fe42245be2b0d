"""Oracles of the ops with per-task weights in plain PyTorch: short, obviously right, exact in float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtl.core.task_weights import STILL, Geometry, SortedBatch, TaskConvCall, TaskLoraCall, TaskWeights
from fastmtl.core.tensors import memory_format
from fastmtl.ops.task_weights.precision import is_misread, widen


def task_plan(task_ids: Tensor, num_tasks: int) -> tuple[Tensor, Tensor]:
    """Positions sorted by task, and where each task begins; ids out of range come last."""
    ids = task_ids.reshape(-1).to(torch.int64)
    ids = torch.where((ids < 0) | (ids >= num_tasks), num_tasks, ids)
    ordered, order = torch.sort(ids, stable=True)
    return order, torch.searchsorted(ordered, torch.arange(num_tasks + 1, device=ids.device))


def _recorded(gate: Tensor) -> bool:
    return torch.is_grad_enabled() and gate.requires_grad


def effective_weight(weights: TaskWeights, task: int, dtype: torch.dtype, num_tasks: int) -> Tensor:
    """`W + s_t Delta_t` in `dtype`, added in the widest dtype of the weights. A closed gate does not read Delta.

    Where a derivative of a derivative is recorded, a closed gate reads it: that derivative depends on it.
    """
    weight, delta, gate = weights.weight, weights.by_task(num_tasks)[task], weights.gate
    promoted = torch.promote_types(weights.like.dtype, torch.float32)
    base = torch.zeros_like(weights.like, dtype=promoted) if weight is None else weight.to(promoted)
    if delta is None or (gate is not None and gate[task] == 0 and not _recorded(gate)):
        return base.to(dtype)
    return (base + (delta.to(promoted) if gate is None else gate[task].to(promoted) * delta.to(promoted))).to(dtype)


def task_conv2d(x: Tensor, call: TaskConvCall) -> Tensor:
    """Each task's samples through `W + s_t Delta_t`; samples of no task are NaN."""
    weights, batch, geometry, bias = call
    size = (x.shape[0], weights.shape[0], *geometry.output_size(x.shape[2:], weights.shape[2:]))
    given, x = x, widen(x)
    y = torch.full(size, torch.nan, dtype=x.dtype, device=x.device)
    for t, rows in batch.segments():
        w = effective_weight(weights, t, x.dtype, batch.num_tasks)
        b = None if bias is None else (bias if bias.dim() == 1 else bias[t]).to(x.dtype)
        y = y.index_copy(0, rows, F.conv2d(x[rows], w, b, *geometry))
    return y.to(given.dtype).contiguous(memory_format=memory_format(given))


def task_conv2d_backward(
    grad_out: Tensor, x: Tensor, call: TaskConvCall, wanted: Sequence[bool], wanted_delta: Sequence[int]
) -> list[Tensor]:
    """The gradients of x, weight, `delta[k]` for k in `wanted_delta`, gate and bias, of these the wanted ones.

    With dW_eff[t] the weight gradient over task t's samples: dW = sum_t dW_eff[t], dDelta_t = s_t dW_eff[t],
    ds_t = <dW_eff[t], Delta_t>. Plain differentiable torch: the second derivative is that of this function.
    """
    weights, batch, geometry, bias = call
    weight, delta, delta_tasks, gate = weights
    num_tasks = batch.num_tasks
    deltas = weights.by_task(num_tasks)
    promoted = torch.promote_types(weights.like.dtype, torch.float32)
    zero = torch.zeros(weights.shape, dtype=promoted, device=x.device)
    misread = is_misread(x, geometry, weights.shape[2:])
    given, x, grad_out = x, widen(x, misread), widen(grad_out, misread)
    grad_x = torch.full_like(x, torch.nan, memory_format=torch.contiguous_format)
    grad_eff = [zero] * num_tasks
    grad_bias = [torch.zeros(weights.shape[0], dtype=promoted, device=x.device)] * num_tasks
    for t, rows in batch.segments():
        part, w = grad_out[rows], effective_weight(weights, t, x.dtype, batch.num_tasks)
        inputs = x[rows]
        if inputs.numel() == 0:
            continue  # rows of no width, which a convolution refuses
        grad_x = grad_x.index_copy(0, rows, torch.nn.grad.conv2d_input(inputs.shape, w, part, *geometry))
        grad_eff[t] = torch.nn.grad.conv2d_weight(inputs, w.shape, part, *geometry).to(promoted)
        grad_bias[t] = part.to(promoted).sum((0, 2, 3))
    present = {t for t, _ in batch.segments()}
    grad_delta = []
    for t in range(num_tasks):
        # of a task without samples not even its gate is read
        unread = t not in present or (gate is not None and gate[t] == 0 and not _recorded(gate))
        scaled = grad_eff[t] if gate is None or unread else gate[t].to(promoted) * grad_eff[t]
        grad_delta.append(torch.zeros_like(scaled) if unread else scaled)
    out = []
    if wanted[0]:
        out.append(grad_x.to(given.dtype).contiguous(memory_format=memory_format(given)))
    if wanted[1] and weight is not None:
        out.append(sum(grad_eff, zero).to(weight.dtype).contiguous(memory_format=memory_format(weight)))
    for k in wanted_delta:
        if weights.stacked:
            out.append(torch.stack(grad_delta).to(delta[k].dtype).contiguous())
        else:
            d = delta[k]
            out.append(grad_delta[delta_tasks[k]].to(d.dtype).contiguous(memory_format=memory_format(d)))
    if wanted[2] and gate is not None:
        # also where the gate is closed; a task without samples has none
        terms = [
            zero.sum() if d is None or t not in present else (grad_eff[t] * d.to(promoted)).sum()
            for t, d in enumerate(deltas)
        ]
        out.append(torch.stack(terms).to(gate.dtype))
    if wanted[3] and bias is not None:
        total = torch.stack(grad_bias)
        out.append((total if bias.dim() == 2 else total.sum(0)).to(bias.dtype))
    return out


def task_conv2d_weight_grad(
    x: Tensor,
    grad_out: Tensor,
    batch: SortedBatch,
    kernel_size: Sequence[int],
    geometry: Geometry,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Each task's gradient of a shared weight: the weight gradient over its samples, zero where it has none."""
    shape = (grad_out.shape[1], x.shape[1] // geometry.groups, *kernel_size)
    dtype = dtype or x.dtype
    misread = is_misread(x, geometry, kernel_size)
    x, grad_out = widen(x, misread), widen(grad_out, misread)
    found = [torch.zeros(shape, dtype=dtype, device=x.device)] * batch.num_tasks
    for t, rows in batch.segments():
        found[t] = torch.nn.grad.conv2d_weight(x[rows], shape, grad_out[rows], *geometry).to(dtype)
    return torch.stack(found).contiguous()


def task_conv2d_weight_grad_out(
    x: Tensor, grad_out: Tensor, batch: SortedBatch, geometry: Geometry, out: Tensor
) -> None:
    """`task_conv2d_weight_grad` into `out`, `[T, Cout, Cin / groups, kh, kw]` of any strides."""
    out.copy_(task_conv2d_weight_grad(x, grad_out, batch, out.shape[3:], geometry, out.dtype))


def _samples(x: Tensor, num_samples: int) -> Tensor:
    """`[N, ..., C]` as `[N, R, C]`; either of N and R may be 0."""
    return x.reshape(num_samples, x.shape[:-1].numel() // max(num_samples, 1), x.shape[-1])


def _images(x: Tensor, num_samples: int) -> Tensor:
    """`[N, ..., C]` as N images of one row: `[N, C, 1, R]`, a view of contiguous x."""
    return _samples(x, num_samples).transpose(1, 2).unsqueeze(2)


def task_linear(x: Tensor, call: TaskConvCall) -> Tensor:
    """Each task's rows through `W + s_t Delta_t`; the samples are the first `order.numel()` slices of x."""
    weights, batch, _, bias = call
    given, x = x, widen(x)
    rows_of = _samples(x, batch.order.shape[0])
    y = torch.full((*rows_of.shape[:2], weights.shape[0]), torch.nan, dtype=x.dtype, device=x.device)
    for t, rows in batch.segments():
        b = None if bias is None else (bias if bias.dim() == 1 else bias[t]).to(x.dtype)
        y = y.index_copy(0, rows, F.linear(rows_of[rows], effective_weight(weights, t, x.dtype, batch.num_tasks), b))
    return y.to(given.dtype).reshape(*x.shape[:-1], weights.shape[0])


def task_linear_backward(
    grad_out: Tensor, x: Tensor, call: TaskConvCall, wanted: Sequence[bool], wanted_delta: Sequence[int]
) -> list[Tensor]:
    """`task_conv2d_backward` of the 1x1 convolution over rows that a linear layer is."""
    weight, delta, delta_tasks, gate = call.weights
    n = call.batch.order.shape[0]
    weight, *delta = (None if w is None else w[..., None, None] for w in (weight, *delta))
    filters = call._replace(weights=TaskWeights(weight, delta, delta_tasks, gate))
    found = task_conv2d_backward(_images(grad_out, n), _images(x, n), filters, wanted, wanted_delta)
    out = []
    if wanted[0]:
        out.append(found.pop(0).squeeze(2).transpose(1, 2).reshape(x.shape).contiguous())
    count = len(wanted_delta) + (wanted[1] and weight is not None)
    return [*out, *(w[..., 0, 0].contiguous() for w in found[:count]), *found[count:]]


def task_linear_weight_grad(
    x: Tensor, grad_out: Tensor, batch: SortedBatch, dtype: torch.dtype | None = None
) -> Tensor:
    """Each task's gradient of a shared weight: `[T, Cout, Cin]`."""
    inputs, grads = (_samples(widen(y), batch.order.shape[0]) for y in (x, grad_out))
    shape = (grad_out.shape[-1], x.shape[-1])
    dtype = dtype or x.dtype
    found = [torch.zeros(shape, dtype=dtype, device=x.device)] * batch.num_tasks
    for t, rows in batch.segments():
        found[t] = (grads[rows].flatten(0, 1).mT @ inputs[rows].flatten(0, 1)).to(dtype)
    return torch.stack(found)


def task_linear_weight_grad_out(
    x: Tensor, grad_out: Tensor, batch: SortedBatch, geometry: Geometry, out: Tensor
) -> None:
    """`task_linear_weight_grad` into `out`, `[T, Cout, Cin]` of any strides; a linear layer has one geometry."""
    out.copy_(task_linear_weight_grad(x, grad_out, batch, out.dtype))


def _is_closed(scaling: Tensor | None, task: int) -> bool:
    return scaling is not None and bool(scaling[task] == 0) and not _recorded(scaling)


def _with_dense_deltas(x: Tensor, lora: TaskLoraCall) -> TaskConvCall:
    """The layer with each `B_t A_t` in full; without those of closed tasks."""
    weight, deltas, batch, bias = lora
    dtypes = [w.dtype for w in (weight, *deltas.A[:1], x) if w is not None]
    promoted = functools.reduce(torch.promote_types, dtypes, torch.float32)
    dense, tasks = [], []
    for t, pair in enumerate(deltas.by_task(batch.num_tasks)):
        if pair is not None and not _is_closed(deltas.scaling, t):
            a, b = (w.to(promoted) for w in pair)
            dense.append(b @ a)
            tasks.append(t)
    base = torch.zeros(lora.shape, dtype=promoted, device=x.device) if weight is None else weight
    return TaskConvCall(TaskWeights(base, dense, tasks, deltas.scaling), batch, STILL, bias)


def _without_weight(lora: TaskLoraCall, call: TaskConvCall) -> list[Tensor]:
    """The samples of each task that has neither W nor an open delta: of these nothing is multiplied."""
    if lora.weight is not None:
        return []
    return [rows for t, rows in lora.batch.segments() if t not in call.weights.delta_tasks]


def task_lora(x: Tensor, lora: TaskLoraCall) -> Tensor:
    """`task_linear` with the deltas `B_t A_t`; samples of no task are NaN."""
    call = _with_dense_deltas(x, lora)
    samples = _samples(x, lora.batch.order.shape[0])
    for rows in _without_weight(lora, call):
        samples = samples.index_fill(0, rows, 0)
    return task_linear(samples, call).reshape(*x.shape[:-1], lora.shape[0])


def task_lora_backward(
    grad_out: Tensor,
    x: Tensor,
    lora: TaskLoraCall,
    wanted: Sequence[bool],
    wanted_a: Sequence[int],
    wanted_b: Sequence[int],
) -> list[Tensor]:
    """The gradients of x, weight, `A[k]` for k in `wanted_a`, `B[k]` in `wanted_b`, scaling, bias: the wanted ones.

    With dW_eff[t] as in `task_conv2d_backward`: dA_t = s_t B_t^T dW_eff[t], dB_t = s_t dW_eff[t] A_t^T, ds_t =
    <dW_eff[t], B_t A_t>. Plain differentiable torch: the second derivative is that of this function.
    """
    weight, deltas, batch, bias = lora
    call, num_tasks, n = _with_dense_deltas(x, lora), batch.num_tasks, batch.order.shape[0]
    pairs, scaling = deltas.by_task(num_tasks), deltas.scaling
    promoted = torch.promote_types(call.weights.like.dtype, torch.promote_types(x.dtype, torch.float32))
    given, inputs, grads = x, _samples(widen(x), n), _samples(widen(grad_out), n)
    grad_x = torch.full_like(inputs, torch.nan)
    zero = torch.zeros(lora.shape, dtype=promoted, device=x.device)
    grad_eff: dict[int, Tensor] = {}
    grad_bias = [zero.new_zeros(zero.shape[0])] * num_tasks
    for t, rows in batch.segments():
        part, own = grads[rows], inputs[rows]
        grad_x = grad_x.index_copy(0, rows, part @ effective_weight(call.weights, t, inputs.dtype, num_tasks))
        grad_eff[t] = (part.flatten(0, 1).mT @ own.flatten(0, 1)).to(promoted)
        grad_bias[t] = part.to(promoted).sum((0, 1))
    for rows in _without_weight(lora, call):
        grad_x = grad_x.index_fill(0, rows, 0)

    def gradient(which: int, task: int, like: Tensor) -> Tensor:
        if task not in grad_eff or _is_closed(scaling, task):
            return torch.zeros_like(like, memory_format=torch.contiguous_format)
        a, b = (w.to(promoted) for w in pairs[task])
        grad = b.mT @ grad_eff[task] if which == 0 else grad_eff[task] @ a.mT
        return (grad if scaling is None else scaling[task].to(promoted) * grad).to(like.dtype)

    out = []
    if wanted[0]:
        out.append(grad_x.to(given.dtype).reshape(given.shape))
    if wanted[1] and weight is not None:
        out.append(sum(grad_eff.values(), zero).to(weight.dtype))
    for which, held, positions in ((0, deltas.A, wanted_a), (1, deltas.B, wanted_b)):
        for k in positions:
            if deltas.stacked:
                out.append(torch.stack([gradient(which, t, held[k][t]) for t in range(num_tasks)]))
            else:
                out.append(gradient(which, deltas.tasks[k], held[k]))
    if wanted[2] and scaling is not None:
        # also where it is closed; a task without samples has none
        terms = [zero.sum()] * num_tasks
        for t in [t for t in grad_eff if pairs[t] is not None]:
            a, b = (w.to(promoted) for w in pairs[t])
            terms[t] = (grad_eff[t] * (b @ a)).sum()
        out.append(torch.stack(terms).to(scaling.dtype))
    if wanted[3] and bias is not None:
        total = torch.stack(grad_bias)
        out.append((total if bias.dim() == 2 else total.sum(0)).to(bias.dtype))
    return out


def _rows_of_tasks(table: Tensor, task_ids: Tensor, dims: int) -> Tensor:
    """`table[task_ids]`, NaN for ids out of range, broadcast over what follows the channels."""
    num_tasks = table.shape[0]
    bad = (task_ids < 0) | (task_ids >= num_tasks)
    rows = torch.where(bad[:, None], torch.nan, table[task_ids.to(torch.int64).clamp(0, num_tasks - 1)])
    return rows.reshape(*rows.shape, *[1] * (dims - 2))


def task_scale_shift(x: Tensor, scale: Tensor, shift: Tensor, task_ids: Tensor) -> Tensor:
    """`x * scale[task] + shift[task]`, channel by channel, computed in the widest of the dtypes."""
    promoted = torch.promote_types(torch.promote_types(x.dtype, scale.dtype), torch.float32)
    a, b = (_rows_of_tasks(y.to(promoted), task_ids, x.dim()) for y in (scale, shift))
    return torch.empty_like(x).copy_(x.to(promoted) * a + b)


def task_scale_shift_backward(
    grad_out: Tensor, x: Tensor, scale: Tensor, shift: Tensor, task_ids: Tensor, wanted: Sequence[bool]
) -> list[Tensor]:
    """The gradients of x, scale and shift, of these the wanted ones."""
    promoted = torch.promote_types(torch.promote_types(x.dtype, scale.dtype), torch.float32)
    num_tasks, g = scale.shape[0], grad_out.to(promoted)
    member = task_ids[None, :] == torch.arange(num_tasks, device=x.device)[:, None]

    def by_task(y: Tensor) -> Tensor:
        # [N, C, ...] -> [T, C]
        y = y.flatten(2).sum(2) if y.dim() > 2 else y
        return torch.stack([torch.where(m[:, None], y, 0.0).sum(0) for m in member])

    out = []
    if wanted[0]:
        out.append(torch.empty_like(x).copy_(g * _rows_of_tasks(scale.to(promoted), task_ids, x.dim())))
    if wanted[1]:
        out.append(by_task(g * x.to(promoted)).to(scale.dtype))
    if wanted[2]:
        out.append(by_task(g).to(shift.dtype))
    return out


def rows_of_tasks(tensors: Sequence[Tensor], num_tasks: int, dtype: torch.dtype) -> Tensor | None:
    """`[T, C]` of one tensor `[C]` for all tasks, of one `[T, C]`, or of T tensors `[C]`; None of no tensor."""
    if not tensors:
        return None
    if len(tensors) == 1:
        (only,) = tensors
        return (only if only.dim() == 2 else only.expand(num_tasks, -1)).to(dtype)
    return torch.stack(list(tensors)).to(dtype)


def _along_channels(values: Tensor, dims: int) -> Tensor:
    """`[C]`, broadcast over samples and over what follows the channels."""
    return values.reshape(1, -1, *[1] * (dims - 2))


def _channel_sums(x: Tensor) -> Tensor:
    return x.sum([d for d in range(x.dim()) if d != 1])


def _statistics(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel; NaN where a channel has a single value, 0 where it has none."""
    count = samples.shape[0] * math.prod(samples.shape[2:])
    if count < 2:
        nothing = samples.new_full((samples.shape[1],), torch.nan if count else 0.0)
        return nothing, nothing
    mean = _channel_sums(samples) / count
    return mean, _channel_sums((samples - _along_channels(mean, samples.dim())).square()) / count


def task_batch_norm(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    mean: Sequence[Tensor],
    var: Sequence[Tensor],
    batch: SortedBatch,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each task's samples normalised by their own statistics, or by given ones, times weight plus bias.

    Returns the result, and the means and biased variances `[T, C]` that it was made with, in float32 at least. Those of
    the batch are 0 for tasks without samples, and NaN for a task with a single value per channel. Samples of no task
    are NaN.
    """
    promoted = torch.promote_types(x.dtype, torch.float32)
    num_tasks, dims = batch.num_tasks, x.dim()
    w, b, given_mean, given_var = (rows_of_tasks(p, num_tasks, promoted) for p in (weight, bias, mean, var))
    nothing = torch.zeros(x.shape[1], dtype=promoted, device=x.device)
    means, variances = [nothing] * num_tasks, [nothing] * num_tasks
    if given_mean is not None and given_var is not None:
        means, variances = list(given_mean), list(given_var)
    y = torch.full(x.shape, torch.nan, dtype=promoted, device=x.device)
    for t, rows in batch.segments():
        samples = x[rows].to(promoted)
        if given_mean is None:
            means[t], variances[t] = _statistics(samples)
        scale = torch.rsqrt(variances[t] + eps)
        normal = (samples - _along_channels(means[t], dims)) * _along_channels(scale, dims)
        if w is not None:
            normal = normal * _along_channels(w[t], dims)
        if b is not None:
            normal = normal + _along_channels(b[t], dims)
        y = y.index_copy(0, rows, normal)
    return torch.empty_like(x).copy_(y), torch.stack(means), torch.stack(variances)


def task_batch_norm_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Sequence[Tensor],
    mean: Tensor,
    var: Tensor,
    batch: SortedBatch,
    of_batch: bool,
    eps: float,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """The gradients of x, and of weight and bias as `[T, C]` in float32 at least; of these the wanted ones.

    `of_batch`: mean and variance are those of the batch. They are computed again here, so that the derivative of this
    function with respect to x is whole.
    """
    promoted = torch.promote_types(x.dtype, torch.float32)
    num_tasks, dims = batch.num_tasks, x.dim()
    w = rows_of_tasks(weight, num_tasks, promoted)
    grad_x = torch.full(x.shape, torch.nan, dtype=promoted, device=x.device)
    nothing = torch.zeros(x.shape[1], dtype=promoted, device=x.device)
    grad_weight, grad_bias = [nothing] * num_tasks, [nothing] * num_tasks
    for t, rows in batch.segments():
        samples, g = x[rows].to(promoted), grad_out[rows].to(promoted)
        count = samples.shape[0] * math.prod(samples.shape[2:])
        m, v = _statistics(samples) if of_batch else (mean[t].to(promoted), var[t].to(promoted))
        scale = _along_channels(torch.rsqrt(v + eps), dims)
        normal = (samples - _along_channels(m, dims)) * scale
        grad_weight[t], grad_bias[t] = _channel_sums(g * normal), _channel_sums(g)
        inner = g
        if of_batch and count > 0:
            # what mean and variance hand on
            along_mean, along_normal = (_along_channels(s / count, dims) for s in (grad_bias[t], grad_weight[t]))
            inner = g - along_mean - normal * along_normal
        inner = inner * scale
        grad_x = grad_x.index_copy(0, rows, inner if w is None else inner * _along_channels(w[t], dims))
    out = []
    if wanted[0]:
        out.append(torch.empty_like(x).copy_(grad_x))
    if wanted[1]:
        out.append(torch.stack(grad_weight))
    if wanted[2]:
        out.append(torch.stack(grad_bias))
    return out


def task_batch_norm_update(
    mean: Tensor,
    var: Tensor,
    offsets: Tensor,
    values: int,
    momentum: float | None,
    running_mean: Sequence[Tensor],
    running_var: Sequence[Tensor],
    num_batches_tracked: Sequence[Tensor],
) -> None:
    """Moves the running statistics of each task with two values per channel or more towards those of this batch.

    `values`: of a channel in one sample. The variance is made unbiased. `momentum=None`: the average of all batches, of
    which `num_batches_tracked` has the number. Nothing waits for the device.
    """
    num_tasks = mean.shape[0]
    count = offsets.diff() * values
    seen = count > 1
    tracked = None
    if num_batches_tracked:
        tracked = num_batches_tracked[0] if num_batches_tracked[0].dim() else torch.stack(list(num_batches_tracked))
        tracked = tracked + seen
        _write_rows(num_batches_tracked, tracked)
    if momentum is None:
        assert tracked is not None
        share = (1.0 / tracked.clamp(min=1).to(mean.dtype))[:, None]
    else:
        share = torch.full((num_tasks, 1), momentum, dtype=mean.dtype, device=mean.device)
    unbiased = var * (count.to(var.dtype) / (count - 1).clamp(min=1))[:, None]
    for held, found in ((running_mean, mean), (running_var, unbiased)):
        before = rows_of_tasks(held, num_tasks, mean.dtype)
        assert before is not None
        _write_rows(held, torch.where(seen[:, None], (1 - share) * before + share * found, before))


def _write_rows(held: Sequence[Tensor], rows: Tensor) -> None:
    """Row t into the tensor of task t, or all rows into the one tensor that holds them."""
    if len(held) == 1 and held[0].dim() == rows.dim():
        held[0].copy_(rows)
        return
    for one, row in zip(held, rows, strict=True):
        one.copy_(row)
