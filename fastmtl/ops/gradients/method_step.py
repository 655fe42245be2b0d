"""A step of the methods that keep a number for each task: their weights, and what they keep, in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl.core.dispatch import choose
from fastmtl.core.schemas import define_kernel, define_op
from fastmtl.ops.gradients import reference
from fastmtl.ops.gradients.arguments import check_present, kernel_matrix
from fastmtl.ops.gradients.method_weights import NUMBERS
from fastmtl.ops.gradients.pcgrad import check_gram

# how many options each takes: those of `method_weights`, and for pcd what its averages keep and what is added to them
STEPPING = {"pcd": 4, "sdmgrad": 4, "modo": 2}

_kernel = define_kernel(
    "_method_step(Tensor gram, Tensor? also, int method, float[] options, float rounding, Tensor? present, "
    "Tensor? preferences, Tensor? per_task, Tensor(a!) kept, Tensor(b!)? counted, Tensor(c!) out) -> ()"
)


def _check(gram: Tensor, method: str, options: Sequence[float], kept: Tensor, present: Tensor | None) -> None:
    check_gram(gram)
    if method not in STEPPING or len(options) != STEPPING[method]:
        raise ValueError(f"method: expected one of {', '.join(STEPPING)} with its options, got {method!r}, {options}")
    if kept.shape != gram.shape[:1] or kept.dtype != torch.float64:
        raise ValueError(f"kept: expected [{gram.shape[0]}] float64, got {list(kept.shape)} {kept.dtype}")
    if present is not None:
        check_present(present, gram)


def _compiled(
    gram: Tensor,
    method: str,
    options: Sequence[float],
    kept: Tensor,
    counted: Tensor | None,
    present: Tensor | None,
    preferences: Tensor | None,
    per_task: Tensor | None,
    also: Tensor | None,
) -> Tensor:
    out = torch.empty(gram.shape[:1], dtype=torch.float64, device=gram.device)
    _kernel(
        kernel_matrix(gram),
        None if also is None else kernel_matrix(also),
        NUMBERS[method],
        options,
        torch.finfo(gram.dtype).eps,
        None if present is None else present.contiguous(),
        preferences,
        per_task,
        kept,
        counted,
        out,
    )
    return out


_IMPLEMENTATIONS = {"cpu": _compiled, "cuda": _compiled, "reference": reference.method_step}


def _method_step(
    gram: Tensor,
    method: str,
    options: Sequence[float],
    kept: Tensor,
    counted: Tensor | None = None,
    present: Tensor | None = None,
    preferences: Tensor | None = None,
    per_task: Tensor | None = None,
    also: Tensor | None = None,
) -> Tensor:
    _check(gram, method, options, kept, present)
    implementation = choose("method_step", gram.device.type, _IMPLEMENTATIONS)
    return implementation(gram, method, options, kept, counted, present, preferences, per_task, also)


def _method_step_fake(
    gram: Tensor,
    method: str,
    options: Sequence[float],
    kept: Tensor,
    counted: Tensor | None = None,
    present: Tensor | None = None,
    preferences: Tensor | None = None,
    per_task: Tensor | None = None,
    also: Tensor | None = None,
) -> Tensor:
    _check(gram, method, options, kept, present)
    return gram.new_empty(gram.shape[:1], dtype=torch.float64)


# What `methods.PCD`, `methods.SDMGrad` and `methods.MoDo` call. The weights `[T]` float64 of the tasks that take
# part, 0 for the others, as of `method_weights` with these options; what is kept changes for the tasks that take part,
# and only where all that they have is finite:
#   pcd      kept, counted: running averages of the squared lengths, times how much they count, and that. options: its
#            two, what the averages keep, and what is added to them
#   sdmgrad, modo   kept: the weights, NaN where there are none yet. sdmgrad's result is mixed with the preferences
# also: a matrix of which an entry that is not finite counts as one of `gram`.
method_step_op = define_op(
    "method_step(Tensor gram, str method, float[] options, Tensor(a!) kept, Tensor(b!)? counted=None, "
    "Tensor? present=None, Tensor? preferences=None, Tensor? per_task=None, Tensor? also=None) -> Tensor",
    _method_step,
    _method_step_fake,
)
