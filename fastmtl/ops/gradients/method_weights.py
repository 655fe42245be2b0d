"""The weights of the methods that need the Gram matrix alone: one small problem in float64, solved where it lies."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmtl.core.dispatch import choose
from fastmtl.core.schemas import define_kernel, define_op
from fastmtl.ops.gradients import reference
from fastmtl.ops.gradients.arguments import check_gram, check_gram_values, check_present, kernel_matrix

# method: the number of a solver in csrc/common/solvers/methods.h. rounding: the relative error of an entry of `gram`.
# gram, out: `[T, T]` and `[T]`, or `[L, T, T]` and `[L, T]`: L problems that have the rest in common.
_kernel = define_kernel(
    "_method_weights(Tensor gram, int method, float[] options, float rounding, Tensor? present, Tensor? preferences, "
    "Tensor? per_task, Tensor(a!) out) -> ()"
)


class _Option(NamedTuple):
    """A number that a method takes, and what it may be."""

    name: str
    fits: Callable[[float], bool]
    expected: str


# below it the quadratic programs are worse conditioned than float64 tells apart
LEAST_REG_EPS = 1e-8
# a kernel that runs for longer looks like one that hangs
MOST_STEPS = 10_000
_REG_EPS = _Option("reg_eps", lambda x: LEAST_REG_EPS <= x < math.inf, f"a number from {LEAST_REG_EPS:g}")

# in the order of `solvers::Kind`
OPTIONS: dict[str, tuple[_Option, ...]] = {
    "mgda": (),
    "cagrad": (_Option("c", lambda x: 0 <= x < math.inf, "a number from 0"),),
    "imtlg": (),
    "config": (),
    "nashmtl": (_Option("max_norm", lambda x: 0 <= x < math.inf, "a positive number, or 0 for none"),),
    "fairgrad": (_Option("alpha", lambda x: 0.1 <= x <= 100, "a number from 0.1 to 100"),),
    "alignedmtl": (
        _Option("scale", lambda x: x in (0, 1, 2), "0 (min), 1 (median) or 2 (rmse)"),
        _Option("reduction", lambda x: x in (0, 1), "0 (mean) or 1 (sum)"),
    ),
    "upgrad": (_REG_EPS,),
    "dualproj": (_REG_EPS,),
    "krum": (
        _Option("byzantine", lambda x: x >= 0 and x == x // 1, "a whole number from 0"),
        _Option("selected", lambda x: x >= 1 and x == x // 1, "a whole number from 1"),
        _Option("squared", lambda x: x in (0, 1), "0 (distances) or 1 (their squares)"),
    ),
    "pcd": (
        _Option("primary", lambda x: x >= 0 and x == x // 1, "a whole number from 0"),
        _Option("tau", lambda x: 0 <= x <= 1, "a number from 0 to 1"),
    ),
    "sdmgrad": (
        _Option("lr", lambda x: 0 < x < math.inf, "a positive number"),
        _Option("momentum", lambda x: 0 <= x < 1, "a number from 0 to below 1"),
        _Option("steps", lambda x: 1 <= x <= MOST_STEPS and x == x // 1, f"a whole number from 1 to {MOST_STEPS}"),
        _Option("lambda_", lambda x: 0 <= x < math.inf, "a number from 0"),
    ),
    "modo": (
        _Option("gamma", lambda x: 0 < x < math.inf, "a positive number"),
        _Option("rho", lambda x: 0 <= x < math.inf, "a number from 0"),
    ),
}
NUMBERS = {name: k for k, name in enumerate(OPTIONS)}
WITH_PREFERENCES = ("config", "alignedmtl", "upgrad", "dualproj", "pcd", "sdmgrad")
WITH_PER_TASK = ("pcd", "sdmgrad", "modo")
# of two batches: what they solve for is no Gram matrix
OF_TWO_BATCHES = ("sdmgrad", "modo")


def method_weights(
    gram: Tensor,
    method: str,
    options: Sequence[float] = (),
    *,
    present: Tensor | None = None,
    preferences: Tensor | None = None,
    per_task: Tensor | None = None,
) -> Tensor:
    """The weights that a method gives to T tasks, from the Gram matrix of their gradients alone.

    The classes of `fastmtl.methods` say what each method is, and have its options by name.

    Args:
        gram: `[T, T]` floating-point Gram matrix, T from 1 to 128; for sdmgrad and modo the inner products of each
            gradient with those of a second batch, which need not be symmetric.
        method: `"mgda"`, `"cagrad"`, `"imtlg"`, `"config"`, `"nashmtl"`, `"fairgrad"`, `"alignedmtl"`, `"upgrad"`,
            `"dualproj"`, `"krum"`, `"pcd"`, `"sdmgrad"` or `"modo"`.
        options: the method's numbers, in order: cagrad `[c]`; nashmtl `[max_norm]`, 0 for none; fairgrad `[alpha]`;
            alignedmtl `[scale, reduction]`, scale 0 (min), 1 (median) or 2 (rmse), reduction 0 (mean) or 1 (sum);
            upgrad and dualproj `[reg_eps]`; krum `[byzantine, selected, squared]`; pcd `[primary, tau]`, primary the
            number of a task; sdmgrad `[lr, momentum, steps, lambda_]`; modo `[gamma, rho]`; none for the others.
        present: `[T]` bool, on the device of `gram`: tasks that take part. The others get weight 0, and what `gram`
            holds in their rows and columns is not looked at. None: all.
        preferences: `[T]` floating point, on the device of `gram`: what each task counts, for config, alignedmtl,
            upgrad, dualproj and sdmgrad; for pcd the scale of each gradient. None: 1/n for each of the n present tasks
            (alignedmtl with reduction 1: 1), as for sdmgrad where those of all present tasks are 0.
        per_task: `[T]` floating point, on the device of `gram`: for pcd tau by task, in place of the option; for
            sdmgrad and modo the weights that they start from (None, or NaN for a task: 1/n).

    Returns:
        `[T]` float64, on the device of `gram`. Where an entry of a present task is not finite, the weights of all
        present tasks are NaN. Eigenvalues count as zero up to `max(n, 32) eps` of the largest, eps of the dtype of
            `gram` (alignedmtl: up to `n eps`, where the eigenvector is that of gradients so short that rounding of
            their entries makes no more). Preferences of 0 for all present tasks give them the weight 0, as an absent
            task has it (sdmgrad: see above; pcd takes positive ones).

    Raises:
        TypeError: dtypes other than the above.
        ValueError: an unknown method, options, preferences or numbers by task that it does not take, shapes or devices
            that do not agree; with `FASTMTL_CHECK=1`, which waits for a GPU, a matrix that is no Gram matrix.

    Not differentiable: the weights are constants to autograd. Source: each method's class in `fastmtl.methods`.

    Example:
        >>> m = torch.tensor([[4.0, 0.0], [0.0, 1.0]])
        >>> method_weights(m, "mgda")
        tensor([0.2000, 0.8000], dtype=torch.float64)
    """
    check_method_arguments(gram, method, options, present, preferences, per_task)
    if method not in OF_TWO_BATCHES:
        check_gram_values(gram, present)
    return method_weights_op(gram.detach(), method, options, present, preferences, per_task)


def check_method(method: str, options: Sequence[float], has_preferences: bool) -> None:
    """Raises where there is no such method, or where it does not take these options."""
    if method not in OPTIONS:
        raise ValueError(f"method: expected one of {', '.join(OPTIONS)}, got {method!r}")
    wanted = OPTIONS[method]
    if len(options) != len(wanted):
        names = ", ".join(option.name for option in wanted)
        raise ValueError(f"options: {method} takes {len(wanted)} numbers [{names}], got {list(options)}")
    for option, value in zip(wanted, options, strict=True):
        if not option.fits(value):
            raise ValueError(f"{option.name}: expected {option.expected}, got {value!r}")
    if has_preferences and method not in WITH_PREFERENCES:
        raise ValueError(f"preferences: {method} takes none; {', '.join(WITH_PREFERENCES)} do")


def check_method_arguments(
    gram: Tensor,
    method: str,
    options: Sequence[float],
    present: Tensor | None,
    preferences: Tensor | None,
    per_task: Tensor | None = None,
) -> None:
    """Raises what `method_weights` raises, but for a matrix that is no Gram matrix."""
    check_gram(gram)
    check_method(method, options, preferences is not None)
    if per_task is not None and method not in WITH_PER_TASK:
        raise ValueError(f"per_task: {method} takes none; {', '.join(WITH_PER_TASK)} do")
    if present is not None:
        check_present(present, gram)
    for name, vector in (("preferences", preferences), ("per_task", per_task)):
        if vector is None:
            continue
        if not isinstance(vector, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(vector).__name__}")
        if not vector.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {vector.dtype}")
        if vector.shape != gram.shape[:1]:
            raise ValueError(f"{name}: expected shape [{gram.shape[0]}], got {list(vector.shape)}")
        if vector.device != gram.device:
            raise ValueError(f"{name}: expected device {gram.device} as the Gram matrix, got {vector.device}")


def _compiled(
    gram: Tensor,
    method: str,
    options: Sequence[float],
    present: Tensor | None,
    preferences: Tensor | None,
    per_task: Tensor | None,
) -> Tensor:
    out = torch.empty(gram.shape[:-1], dtype=torch.float64, device=gram.device)
    _kernel(
        kernel_matrix(gram),
        NUMBERS[method],
        options,
        torch.finfo(gram.dtype).eps,
        None if present is None else present.contiguous(),
        None if preferences is None else preferences.to(torch.float64).contiguous(),
        None if per_task is None else per_task.to(torch.float64).contiguous(),
        out,
    )
    return out


def _each_by_reference(
    grams: Tensor,
    method: str,
    options: Sequence[float],
    present: Tensor | None,
    preferences: Tensor | None,
    per_task: Tensor | None,
) -> Tensor:
    found = [reference.method_weights(m, method, options, present, preferences, per_task) for m in grams.unbind(0)]
    return torch.stack(found)


_GROUPS = {"cpu": _compiled, "cuda": _compiled, "reference": _each_by_reference}


def method_weights_groups(
    grams: Tensor,
    method: str,
    options: Sequence[float] = (),
    *,
    present: Tensor | None = None,
    preferences: Tensor | None = None,
) -> Tensor:
    """`method_weights` of L Gram matrices `[L, T, T]` at once, `[L, T]`: one launch. The other arguments are those of
    each. Not recorded, no public op: what a surgery with groups calls."""
    check_method_arguments(grams[0], method, options, present, preferences)
    if method not in OF_TWO_BATCHES:
        for m in grams.unbind(0):
            check_gram_values(m, present)
    implementation = choose("method_weights", grams.device.type, _GROUPS)
    return implementation(grams.detach(), method, options, present, preferences, None)


_IMPLEMENTATIONS = {"cpu": _compiled, "cuda": _compiled, "reference": reference.method_weights}


def _method_weights(
    gram: Tensor,
    method: str,
    options: Sequence[float],
    present: Tensor | None = None,
    preferences: Tensor | None = None,
    per_task: Tensor | None = None,
) -> Tensor:
    check_method_arguments(gram, method, options, present, preferences, per_task)
    implementation = choose("method_weights", gram.device.type, _IMPLEMENTATIONS)
    return implementation(gram, method, options, present, preferences, per_task)


def _method_weights_fake(
    gram: Tensor,
    method: str,
    options: Sequence[float],
    present: Tensor | None = None,
    preferences: Tensor | None = None,
    per_task: Tensor | None = None,
) -> Tensor:
    check_method_arguments(gram, method, options, present, preferences, per_task)
    return gram.new_empty(gram.shape[:1], dtype=torch.float64)


method_weights_op = define_op(
    "method_weights(Tensor gram, str method, float[] options, Tensor? present=None, Tensor? preferences=None, "
    "Tensor? per_task=None) -> Tensor",
    _method_weights,
    _method_weights_fake,
)
