"""GradVac: the T x T problem, with the targets that it moves."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmtl.core.dispatch import choose
from fastmtl.core.schemas import define_kernel, define_op
from fastmtl.ops.gradients import reference
from fastmtl.ops.gradients.arguments import (
    check_gram,
    check_gram_values,
    check_order,
    check_order_values,
    check_present,
    kernel_matrix,
)

UPDATES = ("always", "triggered")

# always: see UPDATES. rounding: the relative error of an entry of `gram`.
_kernel = define_kernel(
    "_gradvac_coefficients(Tensor gram, Tensor order, Tensor targets, float beta, bool always, float rounding, "
    "Tensor(a!) out, Tensor(b!) new_targets) -> ()"
)


def gradvac_coefficients(
    gram: Tensor, order: Tensor, targets: Tensor, beta: float = 0.01, *, update: str = "always"
) -> tuple[Tensor, Tensor]:
    """Coefficients of the gradients that are turned towards each other, and the targets that come next.

    Row i starts as g = g_i. For each j in `order[i]`, j != i, with the cosine c of g and g_j and the target
    `h = targets[i, j]`: if `c < h`, then `g += |g| (h sqrt(1 - c^2) - c sqrt(1 - h^2)) / (|g_j| sqrt(1 - h^2)) g_j`,
    which makes the cosine h. Then `targets[i, j]` becomes `(1 - beta) h + beta c`.

    Args:
        gram: `[T, T]` floating-point Gram matrix, T from 1 to 128.
        order: `[T, K]` int32 or int64, values in 0..T-1: row i lists the tasks that i visits, in turn.
        targets: `[T, T]` floating point, from -1 to 1: the cosine that g_i is to have with g_j at least.
        beta: what the newest cosine counts in a target, from 0 to 1.
        update: `"always"`: every visit moves its target (the paper); `"triggered"`: only one that turns the gradient.

    Returns:
        The coefficients c, `[T, T]` float64: row i of `c G` is the turned gradient of task i; and the new targets,
        `[T, T]` float64. A zero gradient, and one that its steps have brought to zero, has no cosine: such visits do
        nothing. Cosines and targets count as at most `1 - 8 eps` in size, eps of the dtype of `gram`. A non-finite
        entry met on the way makes row i of the coefficients NaN, and leaves row i of the targets as it was.

    Raises:
        TypeError: dtypes other than the above.
        ValueError: shapes or devices that do not agree, a beta or an update other than the above, values of `order` out
            of range (checked on the CPU; on a GPU such an entry makes row i NaN, since it can't be seen without waiting
            for the device); with `FASTMTL_CHECK=1`, which waits for a GPU, a matrix that is no Gram matrix.

    Not differentiable: the coefficients are constants to autograd. Source: Wang, Tsvetkov, Firat, Cao 2021, *Gradient
    Vaccine: Investigating and Improving Multi-task Optimization in Massively Multilingual Models*, Algorithm 1.

    Example:
        >>> m = torch.tensor([[1.0, -0.5], [-0.5, 1.0]])
        >>> c, targets = gradvac_coefficients(m, torch.tensor([[1], [0]]), torch.zeros(2, 2), beta=0.5)
        >>> c
        tensor([[1.0000, 0.5000],
                [0.5000, 1.0000]], dtype=torch.float64)
        >>> targets
        tensor([[ 0.0000, -0.2500],
                [-0.2500,  0.0000]], dtype=torch.float64)
    """
    _check(gram, order, targets, beta, update)
    check_gram_values(gram)
    return gradvac_coefficients_op(gram.detach(), order, targets.detach(), float(beta), update)


def check_beta(beta: float, argument: str = "beta") -> None:
    if isinstance(beta, bool) or not isinstance(beta, (int, float)):
        raise TypeError(f"{argument}: expected a number, got {type(beta).__name__}")
    if not 0 <= beta <= 1 or math.isnan(beta):
        raise ValueError(f"{argument}: expected a number from 0 to 1, got {beta!r}")


def check_update(update: str) -> None:
    if update not in UPDATES:
        raise ValueError(f"update: expected 'always' or 'triggered', got {update!r}")


def _check(gram: Tensor, order: Tensor | None, targets: Tensor, beta: float, update: str) -> None:
    check_gram(gram)
    if order is not None:
        check_order(order, gram.shape[0], gram.device)
    check_gram(targets, "targets")
    if targets.shape != gram.shape:
        raise ValueError(f"targets: expected shape {list(gram.shape)}, got {list(targets.shape)}")
    if targets.device != gram.device:
        raise ValueError(f"targets: expected device {gram.device} as the Gram matrix, got {targets.device}")
    check_beta(beta)
    check_update(update)


def _compiled(gram: Tensor, order: Tensor, targets: Tensor, beta: float, update: str) -> tuple[Tensor, Tensor]:
    out = torch.empty(gram.shape, dtype=torch.float64, device=gram.device)
    new_targets = torch.empty_like(out)
    _kernel(
        kernel_matrix(gram),
        order.to(torch.int64).contiguous(),
        targets.to(torch.float64).contiguous(),
        beta,
        update == "always",
        torch.finfo(gram.dtype).eps,
        out,
        new_targets,
    )
    return out, new_targets


_IMPLEMENTATIONS = {"cpu": _compiled, "cuda": _compiled, "reference": reference.gradvac_coefficients}


def _gradvac_coefficients(
    gram: Tensor, order: Tensor, targets: Tensor, beta: float, update: str = "always"
) -> tuple[Tensor, Tensor]:
    _check(gram, order, targets, beta, update)
    check_order_values(order, gram.shape[0])
    implementation = choose("gradvac_coefficients", gram.device.type, _IMPLEMENTATIONS)
    return implementation(gram, order, targets, beta, update)


def _gradvac_coefficients_fake(
    gram: Tensor, order: Tensor, targets: Tensor, beta: float, update: str = "always"
) -> tuple[Tensor, Tensor]:
    _check(gram, order, targets, beta, update)
    return gram.new_empty(gram.shape, dtype=torch.float64), gram.new_empty(gram.shape, dtype=torch.float64)


gradvac_coefficients_op = define_op(
    "gradvac_coefficients(Tensor gram, Tensor order, Tensor targets, float beta, str update='always') "
    "-> (Tensor, Tensor)",
    _gradvac_coefficients,
    _gradvac_coefficients_fake,
)


# --- a step: the weights, and the targets changed in place

# always, mean, rounding: as above. order: none is drawn from key and state, as PCGrad's.
_step_kernel = define_kernel(
    "_gradvac_step(Tensor gram, Tensor(a!) targets, Tensor? order, int key, Tensor(b!)? state, Tensor? present, "
    "float beta, bool always, bool mean, float rounding, Tensor(c!) out) -> ()"
)


def _step_compiled(
    gram: Tensor,
    targets: Tensor,
    order: Tensor | None,
    key: int,
    state: Tensor | None,
    present: Tensor | None,
    beta: float,
    update: str,
    reduction: str,
) -> Tensor:
    out = torch.empty(gram.shape[:1], dtype=torch.float64, device=gram.device)
    _step_kernel(
        kernel_matrix(gram),
        targets,
        None if order is None else order.to(torch.int64).contiguous(),
        key,
        state,
        None if present is None else present.contiguous(),
        beta,
        update == "always",
        reduction == "mean",
        torch.finfo(gram.dtype).eps,
        out,
    )
    return out


_STEPS = {"cpu": _step_compiled, "cuda": _step_compiled, "reference": reference.gradvac_step}


def _check_step(
    gram: Tensor, targets: Tensor, order: Tensor | None, present: Tensor | None, beta: float, update: str
) -> None:
    _check(gram, order, targets, beta, update)
    if targets.dtype != torch.float64 or not targets.is_contiguous():
        raise ValueError(f"targets: expected contiguous float64 numbers, got {targets.dtype}")
    if present is not None:
        check_present(present, gram)


def _gradvac_step(
    gram: Tensor,
    targets: Tensor,
    order: Tensor | None,
    key: int,
    state: Tensor | None,
    present: Tensor | None,
    beta: float,
    update: str,
    reduction: str,
) -> Tensor:
    _check_step(gram, targets, order, present, beta, update)
    if order is not None:
        check_order_values(order, gram.shape[0])
    implementation = choose("gradvac_step", gram.device.type, _STEPS)
    return implementation(gram, targets, order, key, state, present, beta, update, reduction)


def _gradvac_step_fake(
    gram: Tensor,
    targets: Tensor,
    order: Tensor | None,
    key: int,
    state: Tensor | None,
    present: Tensor | None,
    beta: float,
    update: str,
    reduction: str,
) -> Tensor:
    _check_step(gram, targets, order, present, beta, update)
    return gram.new_empty(gram.shape[:1], dtype=torch.float64)


# What `methods.GradVac` calls: the sum or mean (reduction) of the turned gradients, as weights `[T]` float64 of the
# tasks that take part, 0 for the others. targets, `[T, T]` float64, move for pairs of tasks that take part, and only
# where all weights are finite. order: None is drawn from `key` and `state`, which is advanced.
gradvac_step_op = define_op(
    "gradvac_step(Tensor gram, Tensor(a!) targets, Tensor? order, int key, Tensor(b!)? state, Tensor? present, "
    "float beta, str update, str reduction) -> Tensor",
    _gradvac_step,
    _gradvac_step_fake,
)
