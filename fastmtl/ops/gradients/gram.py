"""The Gram matrix M = G G^T of T task gradients: one read of G."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmtl.core.dispatch import choose, extension, straight_unrecorded, triton_kernels
from fastmtl.core.gradient_rows import GradientRows, accumulate_dtype, bank_rows, device_type_of
from fastmtl.core.schemas import define_kernel, define_op
from fastmtl.ops.gradients import reference
from fastmtl.ops.gradients.arguments import Grads, check_bank, is_bank, read_lists
from fastmtl.ops.gradients.combine import combine_list_op, combine_op, pick_positions

_gram_kernel = define_kernel(
    "_gram(Tensor[] tensors, int[] index, int num_tasks, int num_params, Tensor(a!) out) -> ()"
)


def gram(grads: Grads) -> Tensor:
    """Gram matrix of T task gradients, `M[s, t] = <g_s, g_t>`.

    Args:
        grads: a `[T, P]` bank (any strides), or T lists of n tensors, where None is a zero gradient; float64,
            float32, bfloat16 or float16 on one device, T from 1 to 128. In lists the dtype may differ from
            one parameter to the next, not between tasks.

    Returns:
        `[T, T]`, symmetric: float64 if any gradient is float64, else float32. On the CPU products are summed in
        float32 within blocks of at most 1024 columns (float64 for float64 input) and in float64 across blocks; on a
        GPU likewise, a block being what one thread sums. In a fixed order: the same input gives the same bits,
        whatever the number of threads or multiprocessors.
        A sum beyond the range of float32 shows as inf or NaN; products of float32 gradients with norms
        below about 1e-19 underflow to zero.

    Raises:
        TypeError: `grads` is neither form, or not floating-point, or sparse.
        ValueError: shapes, devices or lengths that do not agree, T outside 1 to 128.

    Differentiable, twice. Source: Yu et al. 2020 (PCGrad) needs nothing else of the gradients; nor do the other
    Gramian methods.

    Example:
        >>> gram(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))
        tensor([[ 5.,  1.],
                [ 1., 10.]])
    """
    if is_bank(grads):
        check_bank(grads)
        if straight_unrecorded(grads):
            out = torch.empty(grads.shape[0], grads.shape[0], dtype=accumulate_dtype([grads.dtype]))
            if extension.gram_bank(grads, out):
                return out
        return gram_op(grads)
    return gram_list_op(*read_lists(grads))


def _compiled(rows: GradientRows) -> Tensor:
    out = empty_gram(rows)
    _gram_kernel(*rows, out)
    return out


def _triton(rows: GradientRows) -> Tensor:
    out = empty_gram(rows)
    triton_kernels("gradients.launchers").gram(rows, out)
    return out


def empty_gram(rows: GradientRows) -> Tensor:
    """Memory for the Gram matrix of these rows."""
    device = rows.tensors[0].device if rows.tensors else None
    dtype = accumulate_dtype([x.dtype for x in rows.tensors])
    return torch.empty(rows.num_tasks, rows.num_tasks, dtype=dtype, device=device)


def _bank_compiled(grads: Tensor) -> Tensor:
    return _compiled(bank_rows(grads))


def _list_compiled(*rows: Any) -> Tensor:
    return _compiled(GradientRows(*rows))


_BANK = {
    "cpu": _bank_compiled,
    "cuda": _bank_compiled,
    "triton": lambda grads: _triton(bank_rows(grads)),
    "reference": reference.gram,
}
_LISTS = {
    "cpu": _list_compiled,
    "cuda": _list_compiled,
    "triton": lambda *rows: _triton(GradientRows(*rows)),
    "reference": reference.gram_list,
}


def gram_rows(rows: GradientRows) -> Tensor:
    """The Gram matrix of rows that are known to be right, past the dispatcher: not recorded for autograd."""
    return choose("gram", device_type_of(rows.tensors), _LISTS)(*rows)


def _gram(grads: Tensor) -> Tensor:
    check_bank(grads)
    return choose("gram", grads.device.type, _BANK)(grads)


def _gram_list(tensors: Sequence[Tensor], index: Sequence[int], num_tasks: int, num_params: int) -> Tensor:
    return choose("gram", device_type_of(tensors), _LISTS)(tensors, index, num_tasks, num_params)


def _gram_fake(grads: Tensor) -> Tensor:
    return grads.new_empty((grads.shape[0], grads.shape[0]), dtype=accumulate_dtype([grads.dtype]))


def _gram_list_fake(tensors: Sequence[Tensor], index: Sequence[int], num_tasks: int, num_params: int) -> Tensor:
    dtype = accumulate_dtype([x.dtype for x in tensors])
    device = tensors[0].device if tensors else None
    return torch.empty(num_tasks, num_tasks, dtype=dtype, device=device)


def _setup(ctx, inputs, output) -> None:
    (grads,) = inputs
    ctx.save_for_backward(grads)


def _gram_backward(ctx, grad_gram: Tensor) -> Tensor:
    (grads,) = ctx.saved_tensors
    return combine_op(grad_gram + grad_gram.mT, grads)


def _setup_list(ctx, inputs, output) -> None:
    tensors, ctx.index, ctx.num_tasks, ctx.num_params = inputs
    ctx.save_for_backward(*tensors)


def _gram_list_backward(ctx, grad_gram: Tensor):
    tensors = list(ctx.saved_tensors)
    columns = combine_list_op(grad_gram + grad_gram.mT, tensors, ctx.index, ctx.num_params)
    return pick_positions(columns, ctx.index, ctx.num_params), None, None, None


gram_op = define_op(
    "gram(Tensor grads) -> Tensor",
    _gram,
    _gram_fake,
    backward=_gram_backward,
    setup_context=_setup,
)
gram_list_op = define_op(
    "gram_list(Tensor[] tensors, int[] index, int num_tasks, int num_params) -> Tensor",
    _gram_list,
    _gram_list_fake,
    backward=_gram_list_backward,
    setup_context=_setup_list,
)
