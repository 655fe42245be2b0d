"""Batch norm of a mixed-task batch: each task has statistics, and a weight and a bias, of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastmtl.core.dispatch import checking, choose, straight_to_cpu, triton_kernels
from fastmtl.core.schemas import define_op
from fastmtl.core.task_weights import SortedBatch, TaskPlan
from fastmtl.ops.task_weights import reference
from fastmtl.ops.task_weights.arguments import agreed_tasks, check_companion, check_ids, check_input, triton_declines
from fastmtl.ops.task_weights.composed import composed_backward
from fastmtl.ops.task_weights.cpu import batch_norm as batch_norm_cpu
from fastmtl.ops.task_weights.operators import known_bounds
from fastmtl.ops.task_weights.task_plan import read_plan

PerTask: TypeAlias = Tensor | Sequence[Tensor] | None


def task_batch_norm(
    x: Tensor,
    task_ids: Tensor | TaskPlan,
    weight: PerTask = None,
    bias: PerTask = None,
    running_mean: PerTask = None,
    running_var: PerTask = None,
    *,
    training: bool,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    num_batches_tracked: PerTask = None,
) -> Tensor:
    """Batch norm by task: `F.batch_norm` of each task's samples on their own, in one call for a batch that mixes tasks.

    Args:
        x: `[N, C, ...]` of any rank from 2 on, any strides; float64 (CPU), float32, bfloat16 or float16.
        task_ids: `[N]` int32 or int64 from 0 to T - 1, or a `TaskPlan`. A plan, if no other argument tells T.
        weight: what the normalised values are multiplied by: a list of T tensors `[C]`, one `[T, C]`, one `[C]` that
            all tasks share, or None. In the dtype of x, or float32 beside a 16-bit x.
        bias: what is added then, as `weight`.
        running_mean: a list of T tensors `[C]`, one `[T, C]`, or None. In the dtype of x, or float32 beside a 16-bit x.
        running_var: as `running_mean`; both or neither.
        training: True: normalise by the mean and the (biased) variance of the task's samples in the batch, over
            samples and pixels, and move the running statistics, if given, in place towards them (the variance made
            unbiased). False: normalise by the running statistics.
        momentum: how far the running statistics move; None: they become the average of all batches in which the task
            had samples, of which `num_batches_tracked` has the number.
        eps: added to the variance.
        num_batches_tracked: batches that each task has seen, a list of T int64 scalars or one `[T]`; counted on in
            training. Only beside running statistics.

    Returns:
        The shape, dtype and memory order of x; computed in at least float32, rounded once.

    Raises:
        TypeError: arguments of the wrong kind or dtype.
        ValueError: shapes or devices that do not agree; no running statistics although `training` is False; on the CPU
            an id out of range, and in training a task with a single value per channel. On a GPU these can't be seen
            without waiting: the result of such samples is NaN, and the running statistics of such a task stay as they
            are; `FASTMTL_CHECK=1` raises there too, and waits.

    A task without samples keeps its running statistics. On the CPU, in eager mode, its weight and bias in a list get no
    gradient; elsewhere zeros. Differentiable in x, weight and bias, twice (the second derivative through plain torch).
    Source: Bilen and Vedaldi 2017 (Universal representations), domain-specific batch norm.

    Example:
        >>> x, ids = torch.tensor([[1.0], [10.0], [3.0], [30.0]]), torch.tensor([0, 1, 0, 1])
        >>> mean, var = torch.zeros(2, 1), torch.ones(2, 1)
        >>> task_batch_norm(x, ids, None, None, mean, var, training=True, momentum=1.0).flatten().round(decimals=2)
        tensor([-1., -1.,  1.,  1.])
        >>> mean.flatten()
        tensor([ 2., 20.])
    """
    check_input(x)
    if x.dim() < 2:
        raise ValueError(f"x: expected shape [N, C, ...], got {list(x.shape)}")
    check_ids(task_ids, x.device)
    ids = task_ids.task_ids if isinstance(task_ids, TaskPlan) else task_ids
    if list(ids.shape) != [x.shape[0]]:
        raise ValueError(f"task_ids: expected shape [{x.shape[0]}], as x, got {list(ids.shape)}")
    _check_options(training, momentum, eps)
    tasks: dict[str, int] = {}
    weights = _read(weight, "weight", x, tasks, shared=True)
    biases = _read(bias, "bias", x, tasks, shared=True)
    means = _read(running_mean, "running_mean", x, tasks, shared=False)
    variances = _read(running_var, "running_var", x, tasks, shared=False)
    tracked = _read_tracked(num_batches_tracked, x, tasks)
    if (len(means) == 0) != (len(variances) == 0):  # dynamo of torch 2.10 takes no `bool` of a list
        given, missing = ("running_mean", "running_var") if means else ("running_var", "running_mean")
        raise ValueError(f"{missing}: expected statistics beside {given}, got None")
    if not training and not means:
        raise ValueError("running_mean, running_var: expected statistics, since training is False, got None")
    if tracked and not means:
        raise ValueError("num_batches_tracked: expected None, since there are no running statistics, got counts")
    if training and momentum is None and means and not tracked:
        raise ValueError("num_batches_tracked: expected the batches seen so far, since momentum is None, got None")
    num_tasks = agreed_tasks(tasks)
    if num_tasks is None:
        if not isinstance(task_ids, TaskPlan):
            raise ValueError("task_ids: expected a TaskPlan, since no other argument tells the number of tasks")
        num_tasks = task_ids.offsets.shape[0] - 1
    plan = read_plan(task_ids, num_tasks)
    given = ([], []) if training else (means, variances)
    y, mean, var = task_batch_norm_op(x, weights, biases, *given, plan.order, plan.offsets, eps)
    if training and means:
        values = math.prod(x.shape[2:])
        share = None if momentum is None else float(momentum)
        task_batch_norm_update_op(mean, var, plan.offsets, values, share, means, variances, tracked)
    return y


def task_batch_norm_given(
    x: Tensor,
    plan: TaskPlan,
    names: tuple[str, ...],
    weight: Mapping[str, Tensor | None] | None,
    bias: Mapping[str, Tensor | None] | None,
    running_mean: Mapping[str, Tensor | None],
    running_var: Mapping[str, Tensor | None],
    eps: float,
) -> Tensor | None:
    """`task_batch_norm` by running statistics, for a layer on the CPU of which nothing asks for gradients; or None.

    A call of the op takes longer than a small layer itself: this one goes straight to the kernel. None: call
    `task_batch_norm`, which serves all that is left, and says what is wrong. Not for graphs that are being compiled.

    Args:
        x: `[N, C, H, W]`.
        plan: of the batch.
        names: of the T tasks.
        weight: tensors `[C]` by the tasks' names, or None; of tasks that have no samples nothing is read.
        bias: as `weight`.
        running_mean: as `weight`, but not None.
        running_var: as `running_mean`.
        eps: added to the variance.
    """
    if type(x) is not Tensor or not x.is_cpu or not straight_to_cpu():
        return None
    return batch_norm_cpu.given(x, names, weight, bias, running_mean, running_var, plan.order, plan.offsets, eps)


# --- arguments


def _check_options(training: Any, momentum: Any, eps: Any) -> None:
    if not isinstance(training, bool):
        raise TypeError(f"training: expected a bool, got {type(training).__name__}")
    if momentum is not None and (isinstance(momentum, bool) or not isinstance(momentum, (int, float))):
        raise TypeError(f"momentum: expected a number or None, got {type(momentum).__name__}")
    # compared with infinity: dynamo does not trace math.isfinite of a number that it does not know
    if momentum is not None and not -math.inf < momentum < math.inf:
        raise ValueError(f"momentum: expected a finite number, got {momentum}")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps: expected a number, got {type(eps).__name__}")
    if not (eps > 0 if training else eps >= 0) or not eps < math.inf:
        least = "a positive number in training" if training else "a finite number that is not negative"
        raise ValueError(f"eps: expected {least}, got {eps}")


def _as_list(value: Any, name: str, one: str) -> list[Any]:
    """The tensors of a list, or the one tensor."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, torch.nn.ParameterList):
        value = list(value)
    if isinstance(value, (str, bytes, dict)) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: expected a tensor, a list of T tensors {one} or None, got {type(value).__name__}")
    for t, p in enumerate(value):
        if not isinstance(p, Tensor):
            raise TypeError(f"{name}[{t}]: expected a tensor, got {type(p).__name__}")
    if not value:
        raise ValueError(f"{name}: expected at least one task, got 0")
    return list(value)


def _read(value: PerTask, name: str, x: Tensor, tasks: dict[str, int], shared: bool) -> list[Tensor]:
    """As the op takes it: no tensor, one `[C]` or `[T, C]`, or T of `[C]`, checked against x."""
    if value is None:
        return []
    channels = x.shape[1]
    found = _as_list(value, name, f"[{channels}]")
    if isinstance(value, Tensor):
        check_companion(value, name, x)
        if value.dim() not in ((1, 2) if shared else (2,)) or value.shape[-1] != channels:
            alone = f"[{channels}] or " if shared else ""
            raise ValueError(f"{name}: expected shape {alone}[T, {channels}], got {list(value.shape)}")
        if value.dim() == 2:
            tasks[name] = value.shape[0]
        return found
    for t, p in enumerate(found):
        check_companion(p, f"{name}[{t}]", x)
        if list(p.shape) != [channels]:
            raise ValueError(f"{name}[{t}]: expected shape [{channels}], got {list(p.shape)}")
        if p.dtype != found[0].dtype:
            raise TypeError(f"{name}[{t}]: expected {found[0].dtype} as {name}[0], got {p.dtype}")
    tasks[name] = len(found)
    # of a single task, `[1, C]` tells it from a tensor that all tasks share
    return [found[0][None]] if len(found) == 1 else found


def _read_tracked(value: PerTask, x: Tensor, tasks: dict[str, int]) -> list[Tensor]:
    name = "num_batches_tracked"
    if value is None:
        return []
    found = _as_list(value, name, "[]")
    for t, p in enumerate(found):
        own, dims = (name, 1) if isinstance(value, Tensor) else (f"{name}[{t}]", 0)
        if p.dtype != torch.int64:
            raise TypeError(f"{own}: expected int64, got {p.dtype}")
        if p.dim() != dims:
            raise ValueError(f"{own}: expected shape {'[T]' if dims else '[]'}, got {list(p.shape)}")
        if p.device != x.device:
            raise ValueError(f"{own}: expected device {x.device} as x, got {p.device}")
    tasks[name] = found[0].shape[0] if isinstance(value, Tensor) else len(found)
    return [found[0][None]] if len(found) == 1 and found[0].dim() == 0 else found


def _check_counts(offsets: Tensor, values: int) -> None:
    """Raises for a task with a single value per channel, which has no variance. Waits for the device."""
    counts = (offsets.diff() * values).tolist()
    if 1 in counts:
        raise ValueError(
            "x: expected more than 1 value per channel of each task when training, got 1 for task "
            f"{counts.index(1)}, a single sample with a single pixel"
        )


# --- normalise


def _triton(x, weight, bias, mean, var, batch, eps) -> tuple[Tensor, Tensor, Tensor]:
    return triton_kernels("task_weights.batch_norm_launchers").batch_norm(x, weight, bias, mean, var, batch, eps)


_FORWARD = {"cpu": batch_norm_cpu.batch_norm, "triton": _triton, "reference": reference.task_batch_norm}


def _task_batch_norm(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    mean: Sequence[Tensor],
    var: Sequence[Tensor],
    order: Tensor,
    offsets: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if not mean and (x.device.type == "cpu" or checking()):
        _check_counts(offsets, math.prod(x.shape[2:]))
    run = choose("task_batch_norm", x.device.type, _FORWARD, triton_declines(x, offsets=offsets))
    return run(x, weight, bias, mean, var, SortedBatch(order, offsets), eps)


def _fake(x, weight, bias, mean, var, order, offsets, eps) -> tuple[Tensor, Tensor, Tensor]:
    size, dtype = (offsets.shape[0] - 1, x.shape[1]), torch.promote_types(x.dtype, torch.float32)
    return torch.empty_like(x), x.new_empty(size, dtype=dtype), x.new_empty(size, dtype=dtype)


def _triton_backward(grad_out, x, weight, mean, var, batch, of_batch, eps, wanted) -> list[Tensor]:
    return triton_kernels("task_weights.batch_norm_launchers").batch_norm_backward(
        grad_out, x, weight, mean, var, batch, of_batch, eps, wanted
    )


_BACKWARD = {
    "cpu": batch_norm_cpu.batch_norm_backward,
    "triton": _triton_backward,
    "reference": reference.task_batch_norm_backward,
}


def _task_batch_norm_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Sequence[Tensor],
    mean: Tensor,
    var: Tensor,
    order: Tensor,
    offsets: Tensor,
    of_batch: bool,
    eps: float,
    wanted: Sequence[bool],
) -> list[Tensor]:
    run = choose("task_batch_norm", x.device.type, _BACKWARD, triton_declines(x, offsets=offsets))
    return run(grad_out, x, weight, mean, var, SortedBatch(order, offsets), of_batch, eps, wanted)


def _backward_fake(grad_out, x, weight, mean, var, order, offsets, of_batch, eps, wanted) -> list[Tensor]:
    out = [torch.empty_like(x)] if wanted[0] else []
    return out + [mean.new_empty(mean.shape) for want in wanted[1:] if want]


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, bias, mean, _, order, offsets, ctx.eps = inputs
    _, found_mean, found_var = output
    ctx.mark_non_differentiable(found_mean, found_var)
    ctx.of_batch = not mean
    ctx.num_given = len(mean)
    ctx.kinds = [[(p.dim(), p.dtype) for p in params] for params in (weight, bias)]
    ctx.save_for_backward(x, found_mean, found_var, order, offsets, *weight)


def _backward(ctx: Any, grad_out: Tensor, *_: Any):
    x, mean, var, order, offsets, *weight = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wanted = [needs[0], any(needs[1]), any(needs[2])]
    found = iter(
        task_batch_norm_backward_op(grad_out, x, weight, mean, var, order, offsets, ctx.of_batch, ctx.eps, wanted)
    )
    grad_x, *tables = (next(found) if want else None for want in wanted)
    grad_weight, grad_bias = (
        _by_parameter(table, kinds, need, offsets)
        for table, kinds, need in zip(tables, ctx.kinds, needs[1:3], strict=True)
    )
    given: list[Tensor | None] = [None] * ctx.num_given
    return grad_x, grad_weight, grad_bias, given, given, None, None, None


def _by_parameter(
    table: Tensor | None, kinds: Sequence[tuple[int, torch.dtype]], needs: Sequence[bool], offsets: Tensor
) -> list[Tensor | None]:
    """The gradients of parameters, from those by task. On the CPU a task of a list that has no sample gets none."""
    if table is None:
        return [None] * len(kinds)
    if len(kinds) == 1:
        ((dims, dtype),) = kinds
        return [(table if dims == 2 else table.sum(0)).to(dtype)]
    kept, bounds = list(needs), known_bounds(offsets)
    if bounds is not None:
        kept = [need and bounds[t + 1] > bounds[t] for t, need in enumerate(needs)]
    return [row.to(dtype) if keep else None for row, keep, (_, dtype) in zip(table, kept, kinds, strict=True)]


def _setup_backward(ctx: Any, inputs: Any, output: Any) -> None:
    grad_out, x, weight, mean, var, order, offsets, *ctx.rest = inputs
    ctx.save_for_backward(grad_out, x, mean, var, order, offsets, *weight)


def _plain_backward(grad_out, x, weight, mean, var, order, offsets, of_batch, eps, wanted) -> Sequence[Tensor]:
    batch = SortedBatch(order, offsets)
    return reference.task_batch_norm_backward(grad_out, x, weight, mean, var, batch, of_batch, eps, wanted)


def _backward_backward(ctx: Any, grads: Sequence[Tensor]):
    grad_out, x, mean, var, order, offsets, *weight = ctx.saved_tensors
    args = (grad_out, x, weight, mean, var, order, offsets, *ctx.rest)
    return composed_backward(_plain_backward, args, ctx.needs_input_grad, grads)


# mean, var: statistics that are given, or empty: those of the batch; and the ones that the result was made with
task_batch_norm_op = define_op(
    "task_batch_norm(Tensor x, Tensor[] weight, Tensor[] bias, Tensor[] mean, Tensor[] var, Tensor order, "
    "Tensor offsets, float eps) -> (Tensor, Tensor, Tensor)",
    _task_batch_norm,
    _fake,
    backward=_backward,
    setup_context=_setup,
)
task_batch_norm_backward_op = define_op(
    "task_batch_norm_backward(Tensor grad_out, Tensor x, Tensor[] weight, Tensor mean, Tensor var, Tensor order, "
    "Tensor offsets, bool of_batch, float eps, bool[] wanted) -> Tensor[]",
    _task_batch_norm_backward,
    _backward_fake,
    backward=_backward_backward,
    setup_context=_setup_backward,
)


# --- running statistics


def _triton_update(*args: Any) -> None:
    triton_kernels("task_weights.batch_norm_launchers").batch_norm_update(*args)


_UPDATE = {
    "cpu": batch_norm_cpu.batch_norm_update,
    "triton": _triton_update,
    "reference": reference.task_batch_norm_update,
}


def _update(mean, var, offsets, values, momentum, running_mean, running_var, num_batches_tracked) -> None:
    run = choose("task_batch_norm_update", mean.device.type, _UPDATE, triton_declines(mean))
    run(mean, var, offsets, values, momentum, running_mean, running_var, num_batches_tracked)


task_batch_norm_update_op = define_op(
    "task_batch_norm_update(Tensor mean, Tensor var, Tensor offsets, SymInt values, float? momentum, "
    "Tensor(a!)[] running_mean, Tensor(b!)[] running_var, Tensor(c!)[] num_batches_tracked) -> ()",
    _update,
    lambda *args: None,
)
