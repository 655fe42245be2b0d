"""Running sums of squared task gradients, and the squares of the gradients in their metric: one pass over both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl.core.dispatch import choose, triton_kernels
from fastmtl.core.gradient_rows import GradientRows, device_type_of
from fastmtl.core.schemas import define_kernel, define_op, without_autocast
from fastmtl.ops.gradients import reference
from fastmtl.ops.gradients.arguments import Grads, check_task_numbers, read_rows
from fastmtl.ops.gradients.average_gradients import in_order_of_held, read_held
from fastmtl.ops.gradients.combine import mark_written

_kernel = define_kernel(
    "_excess_risks(Tensor[] tensors, int[] index, int num_tasks, int num_params, Tensor scale, "
    "Tensor(a!)[] squares, Tensor(b!) out) -> ()"
)


def excess_risks(grads: Grads, squares: Grads, scale: Tensor) -> Tensor:
    """Adds the squares of T task gradients to their running sums, in place, and gives each task's excess risk.

    With `x_t = scale_t g_t`: `s_t += x_t²`, and the risk of task t is the sum over columns of `x_t² / sqrt(s_t)`, where
    0 / 0 is 0.

    Args:
        grads: a `[T, P]` bank (any strides), or T lists of n tensors (None: a zero gradient), as for `gram`.
        squares: written: `[T, P]` with dense rows, or T lists of n dense tensors; float64 where the gradients are, else
            float32. In lists there is one for every task and parameter that has a gradient in any task.
        scale: `[T]` floating point, on the device of the gradients. A gradient with `scale_t = 0` is not looked at.

    Returns:
        `[T]` float64. An element whose square is not finite leaves its sum as it was, and makes its task's risk NaN.

    Raises:
        TypeError, ValueError: what `gram` raises for the gradients; sums or scales that do not fit them.

    Not differentiable: it writes into an argument. Source: He et al. 2024, *Robust Multi-Task Learning with Excess
    Risks*, Section 3.2.

    Example:
        >>> s = torch.zeros(1, 2)
        >>> excess_risks(torch.tensor([[3.0, -4.0]]), s, torch.ones(1))
        tensor([7.], dtype=torch.float64)
        >>> s
        tensor([[ 9., 16.]])
    """
    rows = read_rows(grads)
    held = read_held(squares, rows, "squares")
    check_task_numbers(scale, "scale", rows)
    return excess_risks_of(rows, held, scale)


def excess_risks_of(rows: GradientRows, held: Sequence[Tensor], scale: Tensor) -> Tensor:
    """`excess_risks` of what is known to fit."""
    with torch.no_grad():
        return excess_risks_op(*rows, scale.detach().to(torch.float64).contiguous(), list(held))


def _compiled(rows: GradientRows, scale: Tensor, held: Sequence[Tensor]) -> Tensor:
    out = _result(rows.tensors, rows.num_tasks)
    _kernel(*in_order_of_held(rows, held), scale, held, out)
    return out


def _triton(rows: GradientRows, scale: Tensor, held: Sequence[Tensor]) -> Tensor:
    out = _result(rows.tensors, rows.num_tasks)
    triton_kernels("gradients.elementwise_launchers").excess_risks(rows, scale, held, out)
    return out


def _reference(rows: GradientRows, scale: Tensor, held: Sequence[Tensor]) -> Tensor:
    return reference.excess_risks(*rows, scale, held)


_IMPLEMENTATIONS = {"cpu": _compiled, "triton": _triton, "reference": _reference}


def _result(tensors: Sequence[Tensor], num_tasks: int) -> Tensor:
    return torch.empty(num_tasks, dtype=torch.float64, device=tensors[0].device if tensors else None)


def _excess(
    tensors: Sequence[Tensor],
    index: Sequence[int],
    num_tasks: int,
    num_params: int,
    scale: Tensor,
    squares: Sequence[Tensor],
) -> Tensor:
    rows = GradientRows(list(tensors), list(index), num_tasks, num_params)
    run = choose("excess_risks", device_type_of(tensors), _IMPLEMENTATIONS)
    with torch.no_grad(), without_autocast(device_type_of(tensors)):
        found = run(rows, scale, squares)
    mark_written(squares)
    return found


def _excess_fake(
    tensors: Sequence[Tensor],
    index: Sequence[int],
    num_tasks: int,
    num_params: int,
    scale: Tensor,
    squares: Sequence[Tensor],
) -> Tensor:
    return _result(tensors, num_tasks)


excess_risks_op = define_op(
    "excess_risks(Tensor[] tensors, int[] index, int num_tasks, int num_params, Tensor scale, Tensor(a!)[] squares) "
    "-> Tensor",
    _excess,
    _excess_fake,
)
