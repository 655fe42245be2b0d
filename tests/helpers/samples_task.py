"""Samples for opcheck of the per-task ops, as they are registered; what is differentiable needs a gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from cases import generator_of
from cases_lora import SAMPLE_LORAS
from cases_task import BF16, F32, F64, LAYOUTS, ConvCase, LinearCase, TaskCase, make_ids
from torch import Tensor

from fastmtl.ops import task_plan

_SAMPLE_CONVS = (
    ConvCase(ids="turns", delta="list", gate="zeros", bias="per_task"),
    ConvCase(ids="absent", delta="stacked", gate="values", bias="shared", x_layout="channels_last", num_tasks=4),
    ConvCase(ids="turns", delta="nones", dtype=BF16, weight_dtype=F32, weight_layout="mixed", x_layout="channels_last"),
    ConvCase(ids="runs", delta="stacked", shared=False, dtype=F64, groups=2, cin=4, stride=(2, 1), x_layout="sliced"),
    ConvCase(n=0, delta="stacked", bias="per_task"),
)
_SAMPLE_LINEARS = (
    LinearCase(ids="turns", delta="list", gate="zeros", bias="per_task", x_layout="sliced"),
    LinearCase(leading=(2, 3), ids_dims=2, ids="absent", delta="stacked", gate="values", bias="shared", num_tasks=4),
    LinearCase(leading=(4, 3), ids="turns", delta="nones", dtype=BF16, weight_dtype=F32, weight_layout="mixed"),
    LinearCase(leading=(3, 2), ids="runs", delta="stacked", shared=False, dtype=F64, x_layout="batch_inside"),
    LinearCase(leading=(0,), delta="stacked", bias="per_task"),
)
Samples = list[tuple[Any, ...]]


def _forward_samples(cases: Sequence[TaskCase]) -> Samples:
    return [case.op_arguments(case.make().leaves()) for case in cases]


def _backward_samples(cases: Sequence[TaskCase]) -> Samples:
    """Without gradients of their own: the second derivative is composed, and depends on the data."""
    samples = []
    for k, case in enumerate(cases):
        made = case.make()
        args = case.op_arguments(made)
        wanted = [[True] * 4, [True, False, True, False], [False, True, False, True]][k % 3]
        if made.weight is None:
            wanted = [wanted[0], False, *wanted[2:]]
        samples.append((made.grad_out, *args, wanted, list(range(len(args[2])))[k % 2 :]))
    return samples


def _conv_grad_samples(out: Callable[[tuple[int, ...]], Tensor] | None = None) -> Samples:
    samples = []
    for case in _SAMPLE_CONVS:
        made = case.make()
        if out is None:
            made = made.leaves()
        x, _, _, _, _, _, order, offsets, *geometry = case.op_arguments(made)
        if out is None:
            samples.append((x, made.grad_out, order, offsets, list(case.kernel), *geometry))
        else:
            samples.append((x, made.grad_out, order, offsets, *geometry, out((case.num_tasks, *case.weight_shape))))
    if out is None:
        samples += [(*samples[2], F32), (*samples[0], F64)]
    return samples


def _linear_grad_samples(out: Callable[[tuple[int, ...]], Tensor] | None = None) -> Samples:
    samples = []
    for case in _SAMPLE_LINEARS:
        made = case.make() if out is not None else case.make().leaves()
        x, *_, order, offsets = case.op_arguments(made)
        last = () if out is None else (out((case.num_tasks, *case.weight_shape)),)
        samples.append((x, made.grad_out, order, offsets, *last))
    if out is None:
        samples += [(*samples[2], F32), (*samples[0], F64)]
    return samples


def _lora_samples() -> Samples:
    return [case.op_arguments(case.make().leaves()) for case in SAMPLE_LORAS]


def _lora_backward_samples() -> Samples:
    """As `_backward_samples`."""
    samples = []
    for k, case in enumerate(SAMPLE_LORAS):
        made = case.make()
        args = case.op_arguments(made)
        scaled, with_bias = args[5] is not None, made.bias is not None
        wanted = [
            [True, made.weight is not None, scaled, with_bias],
            [True, False, scaled, False],
            [False, made.weight is not None, False, with_bias],
        ][k % 3]
        count = len(args[2])
        samples.append((made.grad_out, *args, wanted, list(range(count))[k % 2 :], list(range(count))[k % 3 :]))
    return samples


def _bank_rows(shape: tuple[int, ...]) -> Tensor:
    """Rows of a bank, wider than the weight."""
    size = math.prod(shape[1:])
    return torch.zeros(shape[0], size + 3)[:, 2 : 2 + size].unflatten(1, shape[1:])


def _scale_samples() -> Samples:
    samples = []
    for shape, dtype, wide, layout in (
        ((6, 3, 4, 5), F32, F32, "channels_last"),
        ((6, 3), F64, F64, "transposed"),
        ((6, 3, 4), BF16, F32, "sliced"),
        ((0, 3), F32, F32, "contiguous"),
    ):
        generator = generator_of((shape, dtype))
        x = LAYOUTS[layout](torch.randn(shape, generator=generator, dtype=F64).to(dtype))
        scale, shift = (torch.randn(4, 3, generator=generator, dtype=F64).to(wide) for _ in "ab")
        samples.append((*(y.detach().requires_grad_() for y in (x, scale, shift)), make_ids("absent", shape[:1], 4)))
    return samples


def _scale_backward_samples() -> Samples:
    wanted = ([True] * 3, [True, False, True], [False, True, False], [True] * 3)
    found = []
    for (x, scale, shift, ids), want in zip(_scale_samples(), wanted, strict=True):
        found.append((torch.ones_like(x).detach(), x.detach(), scale.detach(), shift.detach(), ids, want))
    return found


def _norm_arguments() -> Samples:
    """x, weight, bias, given mean and variance, order and offsets, eps."""
    samples = []
    for shape, dtype, wide, layout, form, given in (
        ((9, 3, 4, 5), F32, F32, "channels_last", "list", False),
        ((9, 3, 4, 5), F32, F32, "contiguous", "stacked", True),
        ((9, 3), F64, F64, "transposed", "shared", False),
        ((9, 3, 4), BF16, F32, "sliced", "list", True),
        ((9, 3, 2, 2), BF16, BF16, "channels_last_sliced", "none", False),
        ((0, 3), F32, F32, "contiguous", "stacked", False),
    ):
        generator = generator_of((shape, dtype, form))

        def draw(*size: int, to: torch.dtype, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(size, generator=generator, dtype=F64).to(to)

        x = LAYOUTS[layout](draw(*shape, to=dtype))
        tables = []
        for _ in range(4):
            rows = draw(4, 3, to=wide)
            as_form = {"list": list(rows), "stacked": [rows], "shared": [rows[0]], "none": []}[form]
            tables.append([p.clone() for p in as_form])
        weight, bias, mean, var = tables
        # in a list a task without samples has a gradient in a graph, and none outside
        plan = task_plan(torch.arange(shape[0]) % 4 if form == "list" else torch.arange(shape[0]) // 3, 4)
        statistics = (mean, [v.square() for v in var]) if given else ([], [])
        samples.append((x, weight, bias, *statistics, plan.order, plan.offsets, 1e-5))
    return samples


def _norm_samples() -> Samples:
    samples = []
    for x, weight, bias, *rest in _norm_arguments():
        samples.append((x.requires_grad_(), *([p.requires_grad_() for p in q] for q in (weight, bias)), *rest))
    return samples


def _norm_backward_samples() -> Samples:
    samples = []
    for k, (x, weight, bias, mean, var, order, offsets, eps) in enumerate(_norm_arguments()):
        wanted = ([True] * 3, [True, False, True], [False, True, False])[k % 3]
        _, *used = torch.ops.fastmtl.task_batch_norm(x, weight, bias, mean, var, order, offsets, eps)
        samples.append((torch.ones_like(x), x, weight, *used, order, offsets, not mean, eps, wanted))
    return samples


def _norm_update_samples() -> Samples:
    samples = []
    for k, dtype in enumerate((F32, F64, BF16)):
        wide = torch.promote_types(dtype, F32)
        mean, var = torch.arange(12, dtype=wide).reshape(4, 3), torch.arange(1, 13, dtype=wide).reshape(4, 3)
        held = [torch.full((4, 3), 2.0, dtype=dtype) for _ in "mv"]
        tracked = torch.arange(4)
        kept = ([held[0]], [held[1]], [tracked]) if k else ([*held[0].clone()], [*held[1].clone()], [])
        kept = tuple([p.clone() for p in params] for params in kept)
        samples.append((mean, var, torch.tensor([0, 2, 3, 3, 7]), k + 1, None if k == 1 else 0.25, *kept))
    return samples


TASK_OPCHECK_SAMPLES: dict[str, Callable[[], Samples]] = {
    "task_plan": lambda: [
        (make_ids("random", (7,), 3), 3),
        (make_ids("absent", (2, 5), 4, torch.int32), 4),
        (make_ids("random", (0,), 2), 2),
        (make_ids("strided", (9,), 3), 3),
    ],
    "task_batch_norm": _norm_samples,
    "task_batch_norm_backward": _norm_backward_samples,
    "task_batch_norm_update": _norm_update_samples,
    "task_conv2d": lambda: _forward_samples(_SAMPLE_CONVS),
    "task_conv2d_backward": lambda: _backward_samples(_SAMPLE_CONVS),
    "task_conv2d_weight_grad": _conv_grad_samples,
    "task_conv2d_weight_grad_out": lambda: _conv_grad_samples(_bank_rows),
    "task_linear": lambda: _forward_samples(_SAMPLE_LINEARS),
    "task_linear_backward": lambda: _backward_samples(_SAMPLE_LINEARS),
    "task_linear_weight_grad": _linear_grad_samples,
    "task_linear_weight_grad_out": lambda: _linear_grad_samples(_bank_rows),
    "task_lora": _lora_samples,
    "task_lora_backward": _lora_backward_samples,
    "task_scale_shift": _scale_samples,
    "task_scale_shift_backward": _scale_backward_samples,
}
