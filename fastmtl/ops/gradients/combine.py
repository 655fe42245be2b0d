"""Weighted sums of T task gradients, w G or C G: one read of G."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmtl.core.dispatch import choose, extension, straight_unrecorded, triton_kernels
from fastmtl.core.gradient_rows import (
    MAX_TASKS,
    GradientRows,
    accumulate_dtype,
    bank_rows,
    device_type_of,
    first_of_params,
    present_params,
)
from fastmtl.core.schemas import define_kernel, define_op, without_autocast
from fastmtl.core.tensors import is_dense
from fastmtl.ops.gradients import reference
from fastmtl.ops.gradients.arguments import Grads, check_bank, is_bank, read_lists

_combine_kernel = define_kernel(
    "_combine(Tensor weights, Tensor[] tensors, int[] index, int num_params, Tensor(a!)[] out) -> ()"
)


def combine(
    weights: Tensor, grads: Grads, *, out: Tensor | Sequence[Any] | None = None
) -> Tensor | list[Tensor | None] | list[list[Tensor | None]]:
    """Weighted sum of T task gradients, `sum_t w_t g_t`, or K such sums at once.

    Args:
        weights: `[T]` or `[K, T]`, floating-point, on the device of the gradients.
        grads: a `[T, P]` bank (any strides), or T lists of n tensors (None: a zero gradient), as for `gram`.
        out: memory for the result, of its shape and dtype, each tensor dense; not recorded for autograd. For one
            sum it may be a gradient's own memory, which is then overwritten; it must not overlap one otherwise.
            None: new memory, whose first touch can cost as much as the sum (large results ask for huge pages).

    Returns:
        `out`, or new memory in the dtype of the gradients, accumulated in at least float32. `[P]` or `[K, P]` for a
        bank; for lists a list of n tensors or K such lists, each tensor in the memory layout of its parameter's
        first gradient, None where a parameter has no gradient in any task. Zero weights are not skipped: a
        non-finite row shows.

    Raises:
        TypeError: weights or gradients that are not floating-point tensors, sparse gradients.
        ValueError: weights of the wrong length or device; an `out` that does not fit; what `gram` raises for the
            gradients.
        RuntimeError: `out` together with an argument that needs a gradient.

    Differentiable in both arguments, twice.

    Example:
        >>> combine(torch.tensor([1.0, 0.5]), torch.tensor([[1.0, 2.0], [4.0, -2.0]]))
        tensor([3., 1.])
    """
    if is_bank(grads):
        check_bank(grads)
        check_weights(weights, grads.shape[0], grads.device)
        if out is None:
            if weights.dim() == 1 and straight_unrecorded(grads, weights):
                result = torch.empty(grads.shape[1], dtype=grads.dtype)
                if extension.combine_bank(weights, grads, result):
                    return result
            return combine_op(weights, grads)
        targets = read_out_bank(out, weights.shape[:-1] + grads.shape[1:], grads)
        check_unrecorded(weights, grads, *targets)
        combine_into(weights, bank_rows(grads), targets)
        return out
    rows = read_lists(grads)
    check_weights(weights, rows.num_tasks, rows.tensors[0].device if rows.tensors else None)
    if out is not None:
        count = 1 if weights.dim() == 1 else weights.shape[0]
        targets = read_out_lists([out] if weights.dim() == 1 else out, count, rows)
        check_unrecorded(weights, *rows.tensors, *targets)
        combine_into(weights, rows, targets)
        return out
    columns = combine_list_op(weights, rows.tensors, rows.index, rows.num_params)
    if weights.dim() == 1:
        return with_absent(columns, rows.index, rows.num_params)
    width = len(columns) // weights.shape[0] if weights.shape[0] else 0
    return [
        with_absent(columns[k * width : (k + 1) * width], rows.index, rows.num_params) for k in range(weights.shape[0])
    ]


def check_weights(weights: Tensor, num_tasks: int, device: torch.device | None) -> None:
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights: expected a tensor, got {type(weights).__name__}")
    if not weights.is_floating_point():
        raise TypeError(f"weights: expected a floating-point tensor, got {weights.dtype}")
    if weights.dim() not in (1, 2) or weights.shape[-1] != num_tasks:
        raise ValueError(
            f"weights: expected shape [{num_tasks}] or [K, {num_tasks}] for {num_tasks} tasks, "
            f"got {list(weights.shape)}"
        )
    if device is not None and weights.device != device:
        raise ValueError(f"weights: expected device {device} as the gradients, got {weights.device}")


def with_absent(columns: Sequence[Tensor], index: Sequence[int], num_params: int) -> list[Tensor | None]:
    """n entries from the tensors of the present parameters; None for the others."""
    out: list[Tensor | None] = [None] * num_params
    for i, column in zip(present_params(index, num_params), columns, strict=True):
        out[i] = column
    return out


def kernel_weights(weights: Tensor) -> Tensor:
    """`[K, T]` float64, contiguous: the one form that the kernels take."""
    return weights.detach().to(torch.float64).reshape(-1, weights.shape[-1]).contiguous()


def _bank_compiled(weights: Tensor, grads: Tensor) -> Tensor:
    out = torch.empty(weights.shape[:-1] + grads.shape[1:], dtype=grads.dtype, device=grads.device)
    _into_compiled(weights, bank_rows(grads), [out])
    return out


def _list_compiled(weights: Tensor, tensors: Sequence[Tensor], index: Sequence[int], num_params: int) -> list[Tensor]:
    out = combine_list_fake(weights, tensors, index, num_params)
    _combine_kernel(kernel_weights(weights), tensors, index, num_params, out)
    return out


def _into_compiled(weights: Tensor, rows: GradientRows, out: Sequence[Tensor]) -> None:
    _combine_kernel(kernel_weights(weights), rows.tensors, rows.index, rows.num_params, out)


def _bank_triton(weights: Tensor, grads: Tensor) -> Tensor:
    out = torch.empty(weights.shape[:-1] + grads.shape[1:], dtype=grads.dtype, device=grads.device)
    _into_triton(weights, bank_rows(grads), [out])
    return out


def _list_triton(weights: Tensor, tensors: Sequence[Tensor], index: Sequence[int], num_params: int) -> list[Tensor]:
    out = combine_list_fake(weights, tensors, index, num_params)
    _into_triton(weights, GradientRows(list(tensors), list(index), weights.shape[-1], num_params), out)
    return out


def _into_triton(weights: Tensor, rows: GradientRows, out: Sequence[Tensor]) -> None:
    triton_kernels("gradients.launchers").combine(kernel_weights(weights), rows, out)


def _into_reference(weights: Tensor, rows: GradientRows, out: Sequence[Tensor]) -> None:
    if rows.bank is not None:
        out[0].copy_(reference.combine(weights, rows.bank))
        return
    for target, x in zip(out, reference.combine_list(weights, rows.tensors, rows.index, rows.num_params), strict=True):
        target.copy_(x)


_INTO = {"cpu": _into_compiled, "cuda": _into_compiled, "triton": _into_triton, "reference": _into_reference}


def combine_into(weights: Tensor, rows: GradientRows, out: Sequence[Tensor]) -> None:
    """`combine` into given memory, of the whole bank or of K times the present parameters. Nothing is checked here."""
    with torch.no_grad(), without_autocast(weights.device.type):
        choose("combine", device_type_of(rows.tensors), _INTO)(weights, rows, out)
    mark_written(out)


def mark_written(out: Sequence[Tensor]) -> None:
    """Tells autograd, which then refuses a backward pass that had saved one of these."""
    if not torch.compiler.is_compiling():  # where the kernel's schema says so
        torch.autograd.graph.increment_version(out)


def check_unrecorded(*tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise RuntimeError("out: can't be recorded for autograd: leave it out, or detach the arguments and `out`")


def read_out_bank(out: Any, shape: torch.Size, grads: Tensor) -> list[Tensor]:
    """The result `[P]` or `[K, P]`, checked, in the form that the kernels take."""
    if not isinstance(out, Tensor):
        raise TypeError(f"out: expected a tensor, got {type(out).__name__}")
    if out.shape != shape or out.dtype != grads.dtype or out.device != grads.device:
        raise ValueError(
            f"out: expected shape {list(shape)}, {grads.dtype}, {grads.device}, "
            f"got {list(out.shape)}, {out.dtype}, {out.device}"
        )
    if out.shape[-1] > 1 and out.stride(-1) != 1:
        raise ValueError(f"out: expected rows without gaps, got strides {list(out.stride())}")
    if out.dim() == 2 and out.shape[0] > 1 and abs(out.stride(0)) < out.shape[1]:
        raise ValueError(f"out: expected rows that don't overlap, got strides {list(out.stride())}")
    if out.dim() == 2 and out.shape[0] > 1:
        _check_apart([out], [grads])
    else:
        _check_row_or_apart(out.reshape(-1), grads)
    return [out]


def read_out_lists(out: Any, count: int, rows: GradientRows) -> list[Tensor]:
    """`count` lists of n result tensors (None where no task has a gradient), checked, the Nones dropped."""
    like = first_of_params(rows.tensors, rows.index, rows.num_params)
    if isinstance(out, Tensor) or not isinstance(out, Sequence):
        raise TypeError(f"out: expected lists of tensors as the gradients, got {type(out).__name__}")
    if len(out) != count or any(isinstance(x, Tensor) or len(x) != rows.num_params for x in out):
        raise ValueError(f"out: expected {rows.num_params} tensors for each of {count} sums")
    found: list[Tensor] = []
    strides: dict[int, tuple[int, ...]] = {}
    for target in out:
        for i, x in like.items():
            t = target[i]
            if not isinstance(t, Tensor):
                raise TypeError(f"out[{i}]: expected a tensor, got {type(t).__name__}")
            if t.shape != x.shape or t.dtype != x.dtype or t.device != x.device:
                raise ValueError(
                    f"out[{i}]: expected shape {list(x.shape)}, {x.dtype}, {x.device}, "
                    f"got {list(t.shape)}, {t.dtype}, {t.device}"
                )
            stride = strides.setdefault(i, t.stride())  # all sums share one walk over the gradients
            if t.stride() != stride or not is_dense(t):
                raise ValueError(f"out[{i}]: expected dense memory in one layout, got strides {list(t.stride())}")
            found.append(t)
    pointers = [x.data_ptr() for x in found if x.numel()]
    if len(set(pointers)) != len(pointers):
        raise ValueError("out: expected different tensors, got one twice")
    if count > 1:
        _check_apart(found, rows.tensors)
    else:
        held = {x.data_ptr(): k % rows.num_params for x, k in zip(rows.tensors, rows.index, strict=True) if x.numel()}
        for i, x in zip(like, found, strict=True):
            if x.numel() and held.get(x.data_ptr(), i) != i:
                raise ValueError(f"out[{i}]: is the gradient of parameter {held[x.data_ptr()]}, which is still needed")
    return found


def _check_row_or_apart(out: Tensor, grads: Tensor) -> None:
    """One sum may be written over a whole row, element by element, but over nothing else that is still read."""
    same_storage = out.untyped_storage().data_ptr() == grads.untyped_storage().data_ptr()
    if not same_storage or out.numel() == 0 or grads.numel() == 0:
        return
    first, last = out.storage_offset(), out.storage_offset() + out.shape[0]
    steps = 1 if out.shape[0] == 1 else grads.stride(1)
    for t in range(grads.shape[0]):
        start = grads.storage_offset() + t * grads.stride(0)
        if (start != first or steps != 1) and start < last and first <= start + steps * (out.shape[0] - 1):
            raise ValueError(f"out: overlaps row {t} of the gradients, which is still needed, without being that row")


def _check_apart(out: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    held = {x.untyped_storage().data_ptr() for x in grads}
    if any(x.numel() and x.untyped_storage().data_ptr() in held for x in out):
        raise ValueError("out: several sums can't be written into the memory of the gradients")


_BANK = {"cpu": _bank_compiled, "cuda": _bank_compiled, "triton": _bank_triton, "reference": reference.combine}
_LISTS = {"cpu": _list_compiled, "cuda": _list_compiled, "triton": _list_triton, "reference": reference.combine_list}


def _combine(weights: Tensor, grads: Tensor) -> Tensor:
    check_bank(grads)
    check_weights(weights, grads.shape[0], grads.device)
    return choose("combine", grads.device.type, _BANK)(weights, grads)


def _combine_list(weights: Tensor, tensors: Sequence[Tensor], index: Sequence[int], num_params: int) -> list[Tensor]:
    return choose("combine", device_type_of(tensors), _LISTS)(weights, tensors, index, num_params)


def _combine_fake(weights: Tensor, grads: Tensor) -> Tensor:
    return grads.new_empty(weights.shape[:-1] + grads.shape[1:])


def combine_list_fake(
    weights: Tensor, tensors: Sequence[Tensor], index: Sequence[int], num_params: int
) -> list[Tensor]:
    like = list(first_of_params(tensors, index, num_params).values())
    count = 1 if weights.dim() == 1 else weights.shape[0]
    return [torch.empty_like(x) for _ in range(count) for x in like]


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _combine_backward(ctx, grad_out: Tensor):
    weights, grads = ctx.saved_tensors
    # [T], [P] is the case K = 1
    w = weights.reshape(-1, weights.shape[-1])
    g = grad_out.reshape(w.shape[0], grads.shape[1])
    grad_weights = grad_grads = None
    if ctx.needs_input_grad[0]:
        grad_weights = inner_products(g, grads).reshape(weights.shape).to(weights.dtype)
    if ctx.needs_input_grad[1]:
        # K may be beyond the number of rows that one combine takes, or 0
        parts = [combine_op(w[k : k + MAX_TASKS].mT, g[k : k + MAX_TASKS]) for k in range(0, w.shape[0], MAX_TASKS)]
        grad_grads = sum(parts[1:], parts[0]) if parts else torch.zeros_like(grads)
    return grad_weights, grad_grads


def inner_products(a: Tensor, b: Tensor) -> Tensor:
    """`[K, P], [T, P] -> [K, T]` in the accumulation dtype; plain torch, so differentiable to any order."""
    dtype = accumulate_dtype([a.dtype, b.dtype])
    with without_autocast(a.device.type):
        return a.to(dtype) @ b.to(dtype).mT


def inner_products_list(
    columns: Sequence[Tensor], tensors: Sequence[Tensor], index: Sequence[int], num_rows: int, num_tasks: int, n: int
) -> Tensor:
    """`inner_products` of K lists of the present parameters with T lists: `[K, T]`."""
    present = present_params(index, n)
    by_position = dict(zip(index, tensors, strict=True))
    dtype = accumulate_dtype([x.dtype for x in tensors])
    device = tensors[0].device if tensors else None
    total = torch.zeros(num_rows, num_tasks, dtype=dtype, device=device)
    for slot, i in enumerate(present):
        a = torch.stack([columns[k * len(present) + slot].reshape(-1) for k in range(num_rows)])
        like = by_position[min(k for k in index if k % n == i)]
        zero = torch.zeros_like(like)
        b = torch.stack([by_position.get(t * n + i, zero).reshape(-1) for t in range(num_tasks)])
        total = total + inner_products(a, b)
    return total


def pick_positions(columns: Sequence[Tensor], index: Sequence[int], num_params: int) -> list[Tensor]:
    """Of T lists of the present parameters, the tensors at the positions in `index`."""
    present = present_params(index, num_params)
    slot = {i: k for k, i in enumerate(present)}
    return [columns[(k // num_params) * len(present) + slot[k % num_params]] for k in index]


def _setup_list(ctx, inputs, output) -> None:
    weights, tensors, ctx.index, ctx.num_params = inputs
    ctx.save_for_backward(weights, *tensors)


def _combine_list_backward(ctx, grad_columns: Sequence[Tensor]):
    weights, *tensors = ctx.saved_tensors
    n = ctx.num_params
    w = weights.reshape(-1, weights.shape[-1])
    grad_weights = None
    grad_tensors: list[Tensor] = []
    if ctx.needs_input_grad[0]:
        grad_weights = inner_products_list(grad_columns, tensors, ctx.index, w.shape[0], w.shape[1], n)
        grad_weights = grad_weights.reshape(weights.shape).to(weights.dtype)
    if tensors:
        present = present_params(ctx.index, n)
        width = len(present)
        for first in range(0, w.shape[0], MAX_TASKS):
            part = w[first : first + MAX_TASKS]
            position = [k * n + i for k in range(part.shape[0]) for i in present]
            columns = list(grad_columns[first * width : first * width + len(position)])
            picked = pick_positions(combine_list_op(part.mT, columns, position, n), ctx.index, n)
            grad_tensors = [a + b for a, b in zip(grad_tensors, picked, strict=True)] if grad_tensors else picked
        grad_tensors = grad_tensors or [torch.zeros_like(x) for x in tensors]
    return grad_weights, grad_tensors, None, None


combine_op = define_op(
    "combine(Tensor weights, Tensor grads) -> Tensor",
    _combine,
    _combine_fake,
    backward=_combine_backward,
    setup_context=_setup,
)
combine_list_op = define_op(
    "combine_list(Tensor weights, Tensor[] tensors, int[] index, int num_params) -> Tensor[]",
    _combine_list,
    combine_list_fake,
    backward=_combine_list_backward,
    setup_context=_setup_list,
)
