"""Running averages of T task gradients, with their Gram matrix or their squared lengths: one pass over both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmtl.core.dispatch import choose, triton_kernels
from fastmtl.core.gradient_rows import GradientRows, accumulate_dtype, bank_rows, device_type_of, first_of_params
from fastmtl.core.schemas import define_kernel, define_op, without_autocast
from fastmtl.core.tensors import is_dense
from fastmtl.ops.gradients import reference
from fastmtl.ops.gradients.arguments import Grads, check_task_numbers, read_rows
from fastmtl.ops.gradients.combine import mark_written

_kernel = define_kernel(
    "_average_gradients(Tensor[] tensors, int[] index, int num_tasks, int num_params, Tensor keep, Tensor take, "
    "Tensor(a!)[] averages, Tensor(b!) out) -> ()"
)


def average_gradients(grads: Grads, averages: Grads, keep: Tensor, take: Tensor, *, gram: bool = False) -> Tensor:
    """Adds T task gradients to their running averages, `m_t = keep_t m_t + take_t g_t`, in place.

    Args:
        grads: a `[T, P]` bank (any strides), or T lists of n tensors (None: a zero gradient), as for `gram`.
        averages: written: `[T, P]` with dense rows, or T lists of n tensors, dense ones; float64 where the gradients
            are, else float32. In lists there is one for every task and parameter that has a gradient in any task;
            the others are not looked at.
        keep: `[T]` floating point, on the device of the gradients.
        take: likewise. A gradient with `take_t = 0` is not looked at.
        gram: what to return.

    Returns:
        The averages' squared lengths, `[T]` float64; or, with `gram`, their Gram matrix, `[T, T]` float64. An element
        of an average that would not be finite stays as it was, and makes its task's numbers NaN: so an overflow shows,
        and does not stay for good.

    Raises:
        TypeError, ValueError: what `gram` raises for the gradients; averages or factors that do not fit them.

    Not differentiable: it writes into an argument.

    Example:
        >>> m = torch.zeros(2, 2)
        >>> half = torch.full((2,), 0.5)
        >>> average_gradients(torch.tensor([[2.0, 0.0], [4.0, 6.0]]), m, half, half)
        tensor([ 1., 13.], dtype=torch.float64)
        >>> m
        tensor([[1., 0.],
                [2., 3.]])
    """
    rows = read_rows(grads)
    held = read_held(averages, rows, "averages")
    check_task_numbers(keep, "keep", rows)
    check_task_numbers(take, "take", rows)
    return average_gradients_of(rows, held, keep, take, gram=gram)


def read_held(held: Any, rows: GradientRows, argument: str) -> list[Tensor]:
    """What runs along with these gradients, checked, in the form that the kernels take."""
    if rows.bank is not None:
        if not isinstance(held, Tensor):
            raise TypeError(f"{argument}: expected a tensor as the gradients are, got {type(held).__name__}")
        dtype = accumulate_dtype([rows.bank.dtype])
        if held.shape != rows.bank.shape or held.dtype != dtype or held.device != rows.bank.device:
            raise ValueError(
                f"{argument}: expected shape {list(rows.bank.shape)}, {dtype}, {rows.bank.device}, "
                f"got {list(held.shape)}, {held.dtype}, {held.device}"
            )
        if (held.shape[1] > 1 and held.stride(1) != 1) or (held.shape[0] > 1 and abs(held.stride(0)) < held.shape[1]):
            raise ValueError(f"{argument}: expected rows without gaps or overlap, got strides {list(held.stride())}")
        return [held]
    if isinstance(held, Tensor) or not isinstance(held, Sequence) or len(held) != rows.num_tasks:
        raise TypeError(
            f"{argument}: expected {rows.num_tasks} lists of {rows.num_params} tensors as the gradients are"
        )
    found = []
    for t, row in enumerate(held):
        if isinstance(row, Tensor) or not isinstance(row, Sequence) or len(row) != rows.num_params:
            raise TypeError(f"{argument}[{t}]: expected a list of {rows.num_params} tensors")
        for i, like in first_of_params(rows.tensors, rows.index, rows.num_params).items():
            x = row[i]
            dtype = accumulate_dtype([like.dtype])
            if not isinstance(x, Tensor):
                raise TypeError(f"{argument}[{t}][{i}]: expected a tensor, got {type(x).__name__}")
            if x.shape != like.shape or x.dtype != dtype or x.device != like.device:
                raise ValueError(
                    f"{argument}[{t}][{i}]: expected shape {list(like.shape)}, {dtype}, {like.device}, "
                    f"got {list(x.shape)}, {x.dtype}, {x.device}"
                )
            if not is_dense(x):
                raise ValueError(f"{argument}[{t}][{i}]: expected a dense tensor, got strides {list(x.stride())}")
            found.append(x)
    _check_same_order(found, rows, argument)
    return found


def _check_same_order(held: Sequence[Tensor], rows: GradientRows, argument: str) -> None:
    """Raises where a parameter's tensors have several memory orders."""
    width = len(held) // rows.num_tasks
    for k, x in enumerate(held):
        if not same_order(x, held[k % width]):
            raise ValueError(f"{argument}[{k // width}]: expected strides as in {argument}[0], got {list(x.stride())}")


def same_order(a: Tensor, b: Tensor) -> bool:
    # a dimension of size 1 is never stepped along
    return all(n <= 1 or s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True))


def average_gradients_of(
    rows: GradientRows, held: Sequence[Tensor], keep: Tensor, take: Tensor, *, gram: bool = False
) -> Tensor:
    """`average_gradients` of what is known to fit."""
    with torch.no_grad():
        factors = (x.detach().to(torch.float64).contiguous() for x in (keep, take))
        return average_gradients_op(*rows, *factors, list(held), gram)


def in_order_of_held(rows: GradientRows, held: Sequence[Tensor]) -> GradientRows:
    """Gradients in another memory order than what runs along are copied: the kernels walk over both at once."""
    if rows.bank is not None:
        return rows
    slots = {i: k for k, i in enumerate(first_of_params(rows.tensors, rows.index, rows.num_params))}
    tensors = []
    for x, position in zip(rows.tensors, rows.index, strict=True):
        like = held[slots[position % rows.num_params]]
        tensors.append(x if same_order(x, like) else torch.empty_like(like, dtype=x.dtype).copy_(x))
    return rows._replace(tensors=tensors)


def _compiled(rows: GradientRows, keep: Tensor, take: Tensor, held: Sequence[Tensor], gram: bool) -> Tensor:
    out = _result(rows.tensors, rows.num_tasks, gram)
    _kernel(*in_order_of_held(rows, held), keep, take, held, out)
    return out


def _triton(rows: GradientRows, keep: Tensor, take: Tensor, held: Sequence[Tensor], gram: bool) -> Tensor:
    out = _result(rows.tensors, rows.num_tasks, False)
    triton_kernels("gradients.elementwise_launchers").average_gradients(rows, keep, take, held, out)
    if not gram:
        return out
    # another pass over the averages, by the kernel whose products are made by matrix instructions
    m = torch.empty(rows.num_tasks, rows.num_tasks, dtype=torch.float64, device=out.device)
    triton_kernels("gradients.launchers").gram(held_rows(rows, held), m)
    poison = out - out  # NaN of a task with an element that was not finite
    return m + poison[:, None] + poison


def held_rows(rows: GradientRows, held: Sequence[Tensor]) -> GradientRows:
    """What runs along as gradient rows themselves, of the parameters that have a gradient."""
    if rows.bank is not None:
        return bank_rows(held[0])
    return GradientRows(list(held), list(range(len(held))), rows.num_tasks, len(held) // rows.num_tasks)


def _reference(rows: GradientRows, keep: Tensor, take: Tensor, held: Sequence[Tensor], gram: bool) -> Tensor:
    return reference.average_gradients(*rows, keep, take, held, gram)


_IMPLEMENTATIONS = {"cpu": _compiled, "triton": _triton, "reference": _reference}


def _result(tensors: Sequence[Tensor], num_tasks: int, gram: bool) -> Tensor:
    device = tensors[0].device if tensors else None
    return torch.empty((num_tasks, num_tasks) if gram else (num_tasks,), dtype=torch.float64, device=device)


def _average(
    tensors: Sequence[Tensor],
    index: Sequence[int],
    num_tasks: int,
    num_params: int,
    keep: Tensor,
    take: Tensor,
    averages: Sequence[Tensor],
    gram: bool,
) -> Tensor:
    rows = GradientRows(list(tensors), list(index), num_tasks, num_params)
    run = choose("average_gradients", device_type_of(tensors), _IMPLEMENTATIONS)
    with torch.no_grad(), without_autocast(device_type_of(tensors)):
        found = run(rows, keep, take, averages, gram)
    mark_written(averages)
    return found


def _average_fake(
    tensors: Sequence[Tensor],
    index: Sequence[int],
    num_tasks: int,
    num_params: int,
    keep: Tensor,
    take: Tensor,
    averages: Sequence[Tensor],
    gram: bool,
) -> Tensor:
    return _result(tensors, num_tasks, gram)


average_gradients_op = define_op(
    "average_gradients(Tensor[] tensors, int[] index, int num_tasks, int num_params, Tensor keep, Tensor take, "
    "Tensor(a!)[] averages, bool gram) -> Tensor",
    _average,
    _average_fake,
)
