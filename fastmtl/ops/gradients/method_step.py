"""A step of the methods that keep numbers: their weights, and what they keep, in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl.core.dispatch import choose
from fastmtl.core.schemas import define_kernel, define_op
from fastmtl.ops.gradients import reference
from fastmtl.ops.gradients.arguments import check_gram, check_gram_values, check_present, kernel_matrix
from fastmtl.ops.gradients.method_weights import NUMBERS, OF_TWO_BATCHES, OPTIONS

# as `solvers::Kind` numbers them
_NUMBERS = NUMBERS | {"paretomtl": len(NUMBERS), "given": len(NUMBERS) + 1}
# how many options each takes: those of `method_weights`, and for pcd what its averages keep and what is added to them
_COUNTS = {name: len(options) for name, options in OPTIONS.items()} | {"paretomtl": 2, "given": 0}
_KEPT_COUNTS = {"pcd": 4, "sdmgrad": 4, "modo": 2, "paretomtl": 2}

_kernel = define_kernel(
    "_method_step(Tensor gram, Tensor? also, int method, float[] options, float rounding, Tensor? present, "
    "Tensor? preferences, Tensor? per_task, Tensor? vectors, float momentum, Tensor(a!)? kept, Tensor(b!)? counted, "
    "Tensor(c!)? average, Tensor(d!) out) -> ()"
)


def _check(gram: Tensor, method: str, options: Sequence[float], kept: Tensor | None, present: Tensor | None) -> None:
    check_gram(gram)
    counts = _COUNTS if kept is None else _KEPT_COUNTS
    if counts.get(method) != len(options):
        raise ValueError(f"method: expected one of {', '.join(counts)} with its options, got {method!r}, {options}")
    if present is not None:
        check_present(present, gram)


def _compiled(
    gram: Tensor,
    method: str,
    options: Sequence[float],
    kept: Tensor | None,
    counted: Tensor | None,
    average: Tensor | None,
    momentum: float,
    present: Tensor | None,
    preferences: Tensor | None,
    per_task: Tensor | None,
    also: Tensor | None,
    vectors: Tensor | None,
) -> Tensor:
    out = torch.empty(gram.shape[:1], dtype=torch.float64, device=gram.device)
    _kernel(
        kernel_matrix(gram),
        None if also is None else kernel_matrix(also),
        _NUMBERS[method],
        options,
        torch.finfo(gram.dtype).eps,
        None if present is None else present.contiguous(),
        None if preferences is None else preferences.to(torch.float64).contiguous(),
        None if per_task is None else per_task.to(torch.float64).contiguous(),
        vectors,
        momentum,
        kept,
        counted,
        average,
        out,
    )
    return out


_IMPLEMENTATIONS = {"cpu": _compiled, "cuda": _compiled, "reference": reference.method_step}


def _method_step(
    gram: Tensor,
    method: str,
    options: Sequence[float],
    kept: Tensor | None = None,
    counted: Tensor | None = None,
    average: Tensor | None = None,
    momentum: float = 0.0,
    present: Tensor | None = None,
    preferences: Tensor | None = None,
    per_task: Tensor | None = None,
    also: Tensor | None = None,
    vectors: Tensor | None = None,
) -> Tensor:
    _check(gram, method, options, kept, present)
    if method not in OF_TWO_BATCHES:
        check_gram_values(gram, present)
    implementation = choose("method_step", gram.device.type, _IMPLEMENTATIONS)
    return implementation(
        gram, method, options, kept, counted, average, momentum, present, preferences, per_task, also, vectors
    )


def _method_step_fake(
    gram: Tensor,
    method: str,
    options: Sequence[float],
    kept: Tensor | None = None,
    counted: Tensor | None = None,
    average: Tensor | None = None,
    momentum: float = 0.0,
    present: Tensor | None = None,
    preferences: Tensor | None = None,
    per_task: Tensor | None = None,
    also: Tensor | None = None,
    vectors: Tensor | None = None,
) -> Tensor:
    _check(gram, method, options, kept, present)
    return gram.new_empty(gram.shape[:1], dtype=torch.float64)


# What `methods.PCD`, `methods.SDMGrad`, `methods.MoDo`, `methods.ParetoMTL` and `methods.CRMOGM` call. The weights
# `[T]` float64 of the tasks that take part, 0 for the others, as of `method_weights` with these options; what is kept
# changes for the tasks that take part, and only where all that they have is finite:
#   pcd      kept, counted: `[T]` running averages of the squared lengths, times how much they count, and that. options:
#            its two, what the averages keep, and what is added to them
#   sdmgrad, modo   kept: `[T]` weights, NaN where there are none yet. sdmgrad's result is mixed with the preferences
#   paretomtl   kept, counted: 0-d, whether the second phase has begun, and how many steps the first one took. vectors:
#            `[K, T]` of length 1; per_task: the losses; options: which of the vectors, and the most steps of the first
# average: `[T]` running average of the weights, NaN where there is none yet, with which they are mixed, and which takes
# the mixture over: `momentum` times itself, plus the rest times the weights. method "given": of the preferences.
# also: a matrix of which an entry that is not finite counts as one of `gram`.
method_step_op = define_op(
    "method_step(Tensor gram, str method, float[] options, Tensor(a!)? kept=None, Tensor(b!)? counted=None, "
    "Tensor(c!)? average=None, float momentum=0.0, Tensor? present=None, Tensor? preferences=None, "
    "Tensor? per_task=None, Tensor? also=None, Tensor? vectors=None) -> Tensor",
    _method_step,
    _method_step_fake,
)
