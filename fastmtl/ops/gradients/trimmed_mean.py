"""The mean of T task gradients, in each column without its smallest and largest elements: one read of G."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastmtl.core.dispatch import choose, triton_kernels, unavailable
from fastmtl.core.gradient_rows import GradientRows, device_type_of
from fastmtl.core.schemas import define_kernel, define_op
from fastmtl.ops.gradients import reference
from fastmtl.ops.gradients.arguments import Grads, check_flags, read_rows
from fastmtl.ops.gradients.columns import columns_of, empty_columns, into_columns

# what every backend has registers for
ALWAYS_SERVED = 40

_kernel = define_kernel(
    "_trimmed_mean(Tensor[] tensors, int[] index, int num_tasks, int num_params, int trim, Tensor? present, "
    "Tensor(a!)[] out) -> ()"
)


def trimmed_mean(
    grads: Grads,
    trim: int,
    *,
    present: Tensor | None = None,
    out: Tensor | Sequence[Any] | None = None,
) -> Tensor | list[Tensor | None]:
    """The mean of the gradients, in each column without its `trim` smallest and `trim` largest elements.

    Args:
        grads: a `[T, P]` bank (any strides), or T lists of n tensors, as for `gram`. None is a zero gradient, and
            counts as one.
        trim: how many elements to leave out at either end, from 0 to (T - 1) / 2.
        present: `[T]` bool, on the device of the gradients: tasks that take part; what the others hold is not looked
            at. None: all. Where no more than `2 trim` take part, the result is NaN.
        out: memory for the result, as for `combine`: also a gradient's own.

    Returns:
        `out`, or new memory in the dtype of the gradients, accumulated in at least float32: `[P]` for a bank, for lists
        a list of n tensors (None where a parameter has no gradient in any task). A column with an element that is not
        finite gives NaN, whether that would have been left out or not.

    Raises:
        TypeError, ValueError: what `gram` raises for the gradients and `combine` for `out`; a `trim` that leaves
            nothing; a `present` of another shape, dtype or device.
        RuntimeError: `out` together with an argument that needs a gradient.

    Not differentiable: the result is a constant to autograd. Source: Yin et al. 2018, *Byzantine-Robust Distributed
    Learning: Towards Optimal Statistical Rates*, coordinate-wise trimmed mean.

    Example:
        >>> trimmed_mean(torch.tensor([[1.0, 9.0], [2.0, 1.0], [90.0, 3.0]]), 1)
        tensor([2., 3.])
    """
    rows = read_rows(grads)
    check_trim(trim, rows.num_tasks)
    if present is not None:
        check_flags(present, rows)
        present = present.contiguous()
    return columns_of(
        grads,
        rows,
        out,
        lambda rows: trimmed_mean_op(*rows, trim, present),
        lambda rows, targets: _write(rows, trim, present, targets),
    )


def check_trim(trim: object, num_tasks: int) -> None:
    if not isinstance(trim, int) or isinstance(trim, bool):
        raise TypeError(f"trim: expected an integer, got {type(trim).__name__}")
    if trim < 0 or 2 * trim >= num_tasks:
        raise ValueError(f"trim: expected 0 to {(num_tasks - 1) // 2} for {num_tasks} tasks, got {trim}")


def trimmed_mean_into(rows: GradientRows, trim: int, present: Tensor | None, out: Sequence[Tensor]) -> None:
    """`trimmed_mean` into given memory. Nothing is checked here."""
    into_columns(rows, out, lambda rows, out: _write(rows, trim, present, out))


def _compiled(rows: GradientRows, trim: int, present: Tensor | None, out: Sequence[Tensor]) -> None:
    if out:  # else no tensor says on which device
        _kernel(*rows, trim, present, out)


def _triton(rows: GradientRows, trim: int, present: Tensor | None, out: Sequence[Tensor]) -> None:
    triton_kernels("gradients.elementwise_launchers").trimmed_mean(rows, trim, present, out)


def _reference(rows: GradientRows, trim: int, present: Tensor | None, out: Sequence[Tensor]) -> None:
    for target, x in zip(out, reference.trimmed_mean(*rows, trim, present), strict=True):
        target.copy_(x)


_INTO = {"cpu": _compiled, "triton": _triton, "reference": _reference}


def _write(rows: GradientRows, trim: int, present: Tensor | None, out: Sequence[Tensor]) -> None:
    device_type = device_type_of(rows.tensors)
    declined = None
    if device_type is not None and trim > ALWAYS_SERVED and unavailable("triton", device_type) is None:
        declined = {"triton": triton_kernels("gradients.elementwise_launchers").trimmed_mean_declined(rows, trim)}
    choose("trimmed_mean", device_type, _INTO, declined)(rows, trim, present, out)


def _trimmed_mean(
    tensors: Sequence[Tensor],
    index: Sequence[int],
    num_tasks: int,
    num_params: int,
    trim: int,
    present: Tensor | None = None,
) -> list[Tensor]:
    check_trim(trim, num_tasks)
    out = empty_columns(tensors, index, num_params)
    _write(GradientRows(list(tensors), list(index), num_tasks, num_params), trim, present, out)
    return out


def _trimmed_mean_fake(
    tensors: Sequence[Tensor],
    index: Sequence[int],
    num_tasks: int,
    num_params: int,
    trim: int,
    present: Tensor | None = None,
) -> list[Tensor]:
    return empty_columns(tensors, index, num_params)


trimmed_mean_op = define_op(
    "trimmed_mean(Tensor[] tensors, int[] index, int num_tasks, int num_params, int trim, Tensor? present=None) "
    "-> Tensor[]",
    _trimmed_mean,
    _trimmed_mean_fake,
)
