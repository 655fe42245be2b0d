"""GradDrop: of each column the elements of one sign, drawn by how much of the column has it: one read of G."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmtl.core.dispatch import choose, triton_kernels
from fastmtl.core.gradient_rows import GradientRows, device_type_of
from fastmtl.core.schemas import define_kernel, define_op
from fastmtl.ops.gradients import reference
from fastmtl.ops.gradients.arguments import Grads, check_flags, check_task_numbers, read_rows
from fastmtl.ops.gradients.columns import columns_of, empty_columns, into_columns
from fastmtl.ops.gradients.order import Draw, Randomness, traceable_source

_kernel = define_kernel(
    "_graddrop(Tensor[] tensors, int[] index, int num_tasks, int num_params, int key, Tensor? state, Tensor? leak, "
    "Tensor? present, Tensor(a!)[] out) -> ()"
)


def graddrop(
    grads: Grads,
    *,
    leak: Tensor | None = None,
    present: Tensor | None = None,
    generator: Randomness | None = None,
    out: Tensor | Sequence[Any] | None = None,
) -> Tensor | list[Tensor | None]:
    """The sum of the gradients, in each column over the elements of one sign alone, which is drawn.

    A column's positive elements are kept with the probability that is their share of the sum of absolute values, else
    its negative ones. The numbers are those of the stream of `order_state`'s key and counter: equal seeds draw the same
    on every device and backend, and each replay of a captured CUDA graph draws anew.

    Args:
        grads: a `[T, P]` bank (any strides), or T lists of n tensors (None: a zero gradient), as for `gram`.
        leak: `[T]` floating point, on the device of the gradients: what part of a task's elements of the other sign
            passes nevertheless. None: nothing.
        present: `[T]` bool, on the device of the gradients: tasks that take part; what the others hold is not looked
            at. None: all.
        generator: source of randomness, as for `random_order`.
        out: memory for the result, as for `combine`: also a gradient's own.

    Returns:
        `out`, or new memory in the dtype of the gradients, accumulated in at least float32: `[P]` for a bank, for lists
        a list of n tensors (None where a parameter has no gradient in any task). A column whose absolute values don't
        have a finite sum gives NaN.

    Raises:
        TypeError, ValueError: what `gram` raises for the gradients, `random_order` for the generator, `combine` for
            `out`; a `leak` or a `present` of another shape, dtype or device.
        RuntimeError: `out` together with an argument that needs a gradient.

    Not differentiable: the result is a constant to autograd. Source: Chen et al. 2020, *Just Pick a Sign: Optimizing
    Deep Multitask Models with Gradient Sign Dropout*, Algorithm 1.

    Example:
        >>> g = torch.tensor([[1.0, 1.0, -1.0], [2.0, 0.0, -4.0]])
        >>> graddrop(g)
        tensor([ 3.,  1., -5.])
    """
    rows = read_rows(grads)
    if leak is not None:
        check_task_numbers(leak, "leak", rows)
        leak = leak.detach().to(torch.float64).contiguous()
    if present is not None:
        check_flags(present, rows)
        present = present.contiguous()
    # without a tensor it is the state that says where
    device = rows.tensors[0].device if rows.tensors else getattr(generator, "device", torch.device("cpu"))
    source = traceable_source(generator, device)
    found = columns_of(
        grads,
        rows,
        out,
        lambda rows: graddrop_op(*rows, source.key, source.state, leak, present),
        lambda rows, targets: _write(rows, source, leak, present, targets),
    )
    advance(source)
    return found


def advance(source: Draw) -> None:
    """The next call draws other numbers."""
    if source.state is not None:
        source.state[1].add_(1)


def graddrop_into(
    rows: GradientRows, source: Draw, leak: Tensor | None, present: Tensor | None, out: Sequence[Tensor]
) -> None:
    """`graddrop` into given memory; leak: `[T]` float64, present: contiguous. Nothing is checked here."""
    into_columns(rows, out, lambda rows, out: _write(rows, source, leak, present, out))
    advance(source)


def _compiled(
    rows: GradientRows, source: Draw, leak: Tensor | None, present: Tensor | None, out: Sequence[Tensor]
) -> None:
    if out:  # else no tensor says on which device
        _kernel(*rows, source.key, source.state, leak, present, out)


def _triton(
    rows: GradientRows, source: Draw, leak: Tensor | None, present: Tensor | None, out: Sequence[Tensor]
) -> None:
    triton_kernels("gradients.elementwise_launchers").graddrop(rows, source.key, source.state, leak, present, out)


def _reference(
    rows: GradientRows, source: Draw, leak: Tensor | None, present: Tensor | None, out: Sequence[Tensor]
) -> None:
    for target, x in zip(out, reference.graddrop(*rows, source.key, source.state, leak, present), strict=True):
        target.copy_(x)


_INTO = {"cpu": _compiled, "triton": _triton, "reference": _reference}


def _write(
    rows: GradientRows, source: Draw, leak: Tensor | None, present: Tensor | None, out: Sequence[Tensor]
) -> None:
    choose("graddrop", device_type_of(rows.tensors), _INTO)(rows, source, leak, present, out)


def _graddrop(
    tensors: Sequence[Tensor],
    index: Sequence[int],
    num_tasks: int,
    num_params: int,
    key: int,
    state: Tensor | None,
    leak: Tensor | None,
    present: Tensor | None = None,
) -> list[Tensor]:
    out = empty_columns(tensors, index, num_params)
    _write(GradientRows(list(tensors), list(index), num_tasks, num_params), Draw(key, state), leak, present, out)
    return out


def _graddrop_fake(
    tensors: Sequence[Tensor],
    index: Sequence[int],
    num_tasks: int,
    num_params: int,
    key: int,
    state: Tensor | None,
    leak: Tensor | None,
    present: Tensor | None = None,
) -> list[Tensor]:
    return empty_columns(tensors, index, num_params)


graddrop_op = define_op(
    "graddrop(Tensor[] tensors, int[] index, int num_tasks, int num_params, int key, Tensor? state, Tensor? leak, "
    "Tensor? present=None) -> Tensor[]",
    _graddrop,
    _graddrop_fake,
)
