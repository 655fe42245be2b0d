"""PCGrad: the T x T problem on its own, and fused with the two reads of G around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmtl.core.dispatch import choose, extension, straight_unrecorded, triton_kernels
from fastmtl.core.gradient_rows import GradientRows, bank_rows, device_type_of
from fastmtl.core.schemas import define_kernel, define_op, without_autocast
from fastmtl.ops.gradients import reference
from fastmtl.ops.gradients.arguments import (
    Grads,
    check_bank,
    check_gram,
    check_gram_values,
    check_order,
    check_order_values,
    is_bank,
    read_lists,
)
from fastmtl.ops.gradients.combine import (
    check_unrecorded,
    combine_list_fake,
    combine_list_op,
    combine_op,
    inner_products,
    inner_products_list,
    mark_written,
    pick_positions,
    read_out_bank,
    read_out_lists,
    with_absent,
)
from fastmtl.ops.gradients.gram import empty_gram, gram_list_op, gram_op
from fastmtl.ops.gradients.order import (
    Draw,
    Randomness,
    check_generator,
    check_no_generator,
    draw_source,
    drawn_order,
    drawn_orders,
    is_plain,
    random_order,
)

REDUCTIONS = ("sum", "mean")
_NO_DRAW = Draw(0, None)

_coefficients_kernel = define_kernel(
    "_pcgrad_coefficients(Tensor gram, Tensor order, bool include_self, Tensor(a!) out) -> ()"
)
_coefficients_backward_kernel = define_kernel(
    "_pcgrad_coefficients_backward(Tensor grad, Tensor gram, Tensor order, bool include_self, Tensor(a!) out) -> ()"
)
# order: None draws one from `key` and `state` (see `order.py`), and advances the state. present: a flag per task,
# empty: all. weights `[T]`: the column sums of the coefficients (over the present tasks; `mean`: divided by
# their number); `[T, T]`: the coefficients themselves, for the projected gradients.
_pcgrad_kernel = define_kernel(
    "_pcgrad(Tensor[] tensors, int[] index, int num_tasks, int num_params, Tensor? order, int key, Tensor(a!)? state, "
    "bool include_self, int[] present, bool mean, Tensor(b!)[] out, Tensor(c!) gram, Tensor(d!) weights) -> ()"
)
# L problems: gram `[L, T, T]`, weights `[L, T]`. Problem k draws the order of the k-th call from here on: with the
# state's counter + k, or k without a state, and the state is advanced by L. A given order serves all of them.
_weights_kernel = define_kernel(
    "_pcgrad_weights(Tensor gram, Tensor? order, int key, Tensor(a!)? state, bool include_self, int[] present, "
    "bool mean, Tensor(b!) weights) -> ()"
)


def pcgrad_coefficients(gram: Tensor, order: Tensor, *, include_self: bool = False) -> Tensor:
    """Coefficients of the projected gradients, from the Gram matrix alone.

    Row i starts as e_i; for each j in `order[i]`: `d = c_i . M[:, j]`; if `d < 0` then `c_i[j] -= d / M[j, j]`.
    The projected gradient is `c_i G`.

    Args:
        gram: `[T, T]` floating-point Gram matrix, T from 1 to 128.
        order: `[T, K]` int32 or int64, values in 0..T-1: row i lists the tasks that i visits, in turn.
        include_self: visit j = i as some ports do, instead of skipping it as the paper does.

    Returns:
        `[T, T]` float64. A task with `M[j, j] == 0` is never divided by. A non-finite entry met on the way makes
        row i NaN (a comparison with NaN is false, and would silently leave the row alone).

    Raises:
        TypeError: dtypes other than the above.
        ValueError: shapes that do not agree, values out of range (checked on the CPU; on a GPU such an entry
            makes row i NaN, since it can't be seen without waiting for the device); with `FASTMTL_CHECK=1`, which waits
            for a GPU, a matrix that is no Gram matrix.

    Differentiable in `gram`. Source: Yu et al. 2020, *Gradient Surgery for Multi-Task Learning*, Algorithm 1.

    Example:
        >>> m = torch.tensor([[1.0, -0.5], [-0.5, 1.0]])
        >>> pcgrad_coefficients(m, torch.tensor([[1], [0]]))
        tensor([[1.0000, 0.5000],
                [0.5000, 1.0000]], dtype=torch.float64)
    """
    check_gram(gram)
    check_order(order, gram.shape[0], gram.device)
    check_gram_values(gram)
    return coefficients_op(gram, order, include_self)


def pcgrad(
    grads: Grads,
    order: Tensor | None = None,
    *,
    reduction: str = "sum",
    generator: Randomness | None = None,
    include_self: bool = False,
    out: Tensor | Sequence[Tensor | None] | None = None,
) -> Tensor | list[Tensor | None]:
    """The PCGrad update: conflicting gradients are projected, then reduced. Two reads of G; on a GPU, two launches.

    Args:
        grads: a `[T, P]` bank (any strides), or T lists of n tensors (None: a zero gradient), as for `gram`.
        order: `[T, K]` int32 or int64 visiting order, as for `pcgrad_coefficients`; None: a fresh random order,
            drawn where the gradients are.
        reduction: `"sum"` (the paper) or `"mean"` (the older PyTorch port).
        generator: source of the random order, as for `random_order`: a `torch.Generator`, or a state made by
            `order_state`; None: torch's default CPU generator.
        include_self: as for `pcgrad_coefficients`.
        out: memory for the result, as for `combine`: it may be a gradient's own.

    Returns:
        `out`, or `[P]` for a bank, a list of n tensors for lists (None where no task has a gradient), in the dtype
        of the gradients. NaN or inf in any task shows in the result.

    Raises:
        TypeError, ValueError: as `gram` and `pcgrad_coefficients`; an unknown reduction; an `out` that does not fit; a
            generator that does not, or beside an order.
        RuntimeError: `out` together with gradients that need a gradient.

    Differentiable in `grads`, once. Source: Yu et al. 2020, Algorithm 1.

    Example:
        >>> g = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
        >>> pcgrad(g, torch.tensor([[1], [0]]))
        tensor([0.5000, 1.5000])
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected 'sum' or 'mean', got {reduction!r}")
    mean = reduction == "mean"
    if is_bank(grads):
        check_bank(grads)
        if order is None and out is None and not isinstance(generator, Tensor) and straight_unrecorded(grads):
            result = torch.empty(grads.shape[1], dtype=grads.dtype)
            source = draw_source(generator, grads.device)
            if not extension.pcgrad_bank(grads, source.key, include_self, mean, result):
                pcgrad_rows_into(bank_rows(grads), None, source, [result], mean=mean, include_self=include_self)
            return result
        rows = bank_rows(grads)
        order, source = _order_or_source(order, rows, generator, out is not None)
        if out is None and source is None:
            return pcgrad_op(grads, order, reduction, include_self)
        result = grads.new_empty(grads.shape[1:]) if out is None else out
        targets = [result] if out is None else read_out_bank(out, grads.shape[1:], grads)
        check_unrecorded(grads, *targets)
        pcgrad_rows_into(rows, order, source, targets, mean=mean, include_self=include_self)
        return result
    rows = read_lists(grads)
    order, source = _order_or_source(order, rows, generator, out is not None)
    if out is not None:
        targets = read_out_lists([out], 1, rows)
        check_unrecorded(*rows.tensors, *targets)
        pcgrad_rows_into(rows, order, source, targets, mean=mean, include_self=include_self)
        return out
    if source is None:
        columns = pcgrad_list_op(*rows, order, reduction, include_self)
    else:
        columns = combine_list_fake(
            torch.empty(rows.num_tasks, device="meta"), rows.tensors, rows.index, rows.num_params
        )
        pcgrad_rows_into(rows, order, source, columns, mean=mean, include_self=include_self)
    return with_absent(columns, rows.index, rows.num_params)


def pcgrad_project(
    grads: Grads,
    order: Tensor | None = None,
    *,
    generator: Randomness | None = None,
    include_self: bool = False,
) -> Tensor | list[list[Tensor | None]]:
    """Every task's projected gradient, unreduced.

    Arguments, errors and source as for `pcgrad`.

    Returns:
        `[T, P]` for a bank; T lists of n tensors for lists.

    Example:
        >>> g = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
        >>> pcgrad_project(g, torch.tensor([[1], [0]]))
        tensor([[0.5000, 0.5000],
                [0.0000, 1.0000]])
    """
    if is_bank(grads):
        check_bank(grads)
        rows = bank_rows(grads)
        order, source = _order_or_source(order, rows, generator, False)
        if source is None:
            return pcgrad_project_op(grads, order, include_self)
        result = grads.new_empty(grads.shape)
        pcgrad_rows_into(rows, order, source, [result], project=True, include_self=include_self)
        return result
    rows = read_lists(grads)
    order, source = _order_or_source(order, rows, generator, False)
    if source is None:
        columns = pcgrad_project_list_op(*rows, order, include_self)
    else:
        shape = torch.empty(rows.num_tasks, rows.num_tasks, device="meta")
        columns = combine_list_fake(shape, rows.tensors, rows.index, rows.num_params)
        pcgrad_rows_into(rows, order, source, columns, project=True, include_self=include_self)
    width = len(columns) // rows.num_tasks
    return [
        with_absent(columns[t * width : (t + 1) * width], rows.index, rows.num_params) for t in range(rows.num_tasks)
    ]


def _order_or_source(
    order: Tensor | None, rows: GradientRows, generator: Randomness | None, into: bool
) -> tuple[Tensor | None, Draw | None]:
    """The order, given or drawn, or None and where the kernel shall draw it.

    The source is None where the call must go through the op: nothing else can be recorded, compiled or intercepted.
    It costs a second and third pass of the arguments through the dispatcher. `into`: the result goes into given memory.
    """
    # without a tensor it is a state that says where
    device = rows.tensors[0].device if rows.tensors else getattr(generator, "device", torch.device("cpu"))
    check_generator(generator)
    if order is not None:
        check_order(order, rows.num_tasks, device if rows.tensors else None)
        check_no_generator(generator)
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in rows.tensors)
    seen = [*rows.tensors, *(x for x in (order, generator) if isinstance(x, Tensor))]
    if recorded or not rows.tensors or torch.compiler.is_compiling() or not is_plain(seen):
        if order is None:
            order = random_order(rows.num_tasks, generator=generator, device=device)
        return order, _NO_DRAW if into else None
    return (None, draw_source(generator, device)) if order is None else (order, _NO_DRAW)


def _kernel_order(order: Tensor) -> Tensor:
    return order.to(torch.int64).contiguous()


# --- pcgrad_coefficients


def _coefficients_compiled(gram: Tensor, order: Tensor, include_self: bool) -> Tensor:
    out = torch.empty(gram.shape, dtype=torch.float64, device=gram.device)
    _coefficients_kernel(gram.to(torch.float64).contiguous(), _kernel_order(order), include_self, out)
    return out


def _coefficients_backward_compiled(grad: Tensor, gram: Tensor, order: Tensor, include_self: bool) -> Tensor:
    out = torch.empty(gram.shape, dtype=torch.float64, device=gram.device)
    m = gram.to(torch.float64).contiguous()
    _coefficients_backward_kernel(grad.contiguous(), m, _kernel_order(order), include_self, out)
    return out.to(gram.dtype)


def _coefficients_triton(gram: Tensor, order: Tensor, include_self: bool) -> Tensor:
    out = torch.empty(gram.shape, dtype=torch.float64, device=gram.device)
    triton_kernels("gradients.launchers").coefficients(
        gram.to(torch.float64).contiguous(), _kernel_order(order), include_self, out
    )
    return out


_COEFFICIENTS = {
    "cpu": _coefficients_compiled,
    "cuda": _coefficients_compiled,
    "triton": _coefficients_triton,
    "reference": reference.pcgrad_coefficients,
}
_COEFFICIENTS_BACKWARD = {
    "cpu": _coefficients_backward_compiled,
    "reference": reference.pcgrad_coefficients_backward,
}


def _coefficients(gram: Tensor, order: Tensor, include_self: bool = False) -> Tensor:
    check_order_values(order, gram.shape[0])
    return choose("pcgrad_coefficients", gram.device.type, _COEFFICIENTS)(gram, order, include_self)


def _coefficients_fake(gram: Tensor, order: Tensor, include_self: bool = False) -> Tensor:
    return gram.new_empty(gram.shape, dtype=torch.float64)


def _setup_coefficients(ctx, inputs, output) -> None:
    gram, order, ctx.include_self = inputs
    ctx.save_for_backward(gram, order)


def _coefficients_gradient(ctx, grad: Tensor):
    gram, order = ctx.saved_tensors
    return coefficients_backward_op(grad, gram, order, ctx.include_self), None, None


def _coefficients_backward(grad: Tensor, gram: Tensor, order: Tensor, include_self: bool) -> Tensor:
    implementation = choose("pcgrad_coefficients_backward", gram.device.type, _COEFFICIENTS_BACKWARD)
    return implementation(grad, gram, order, include_self)


def _coefficients_backward_fake(grad: Tensor, gram: Tensor, order: Tensor, include_self: bool) -> Tensor:
    return torch.empty_like(gram, memory_format=torch.contiguous_format)


def _no_second_derivative(ctx, *grads: Any):
    raise RuntimeError("fastmtl: the projection coefficients of PCGrad are differentiable once, not twice")


coefficients_op = define_op(
    "pcgrad_coefficients(Tensor gram, Tensor order, bool include_self=False) -> Tensor",
    _coefficients,
    _coefficients_fake,
    backward=_coefficients_gradient,
    setup_context=_setup_coefficients,
)
coefficients_backward_op = define_op(
    "pcgrad_coefficients_backward(Tensor grad, Tensor gram, Tensor order, bool include_self) -> Tensor",
    _coefficients_backward,
    _coefficients_backward_fake,
    backward=_no_second_derivative,
    setup_context=lambda ctx, inputs, output: None,
)


# --- the weights of several groups of parameters


def pcgrad_weights_groups(
    grams: Tensor,
    order: Tensor | None,
    source: Draw,
    *,
    mean: bool = False,
    include_self: bool = False,
    present: Sequence[bool] | None = None,
) -> Tensor:
    """PCGrad's weights `[L, T]` float64 of L Gram matrices `[L, T, T]`, 0 for tasks that are not present: one launch.
    Only the order is checked, and nothing is recorded.

    order: of every group; None: each draws its own, as so many calls of `random_order` with a state would.
    """
    if order is not None:
        check_order_values(order, grams.shape[1])
    flags = [] if present is None or all(present) else [int(here) for here in present]
    implementation = choose("pcgrad_coefficients", grams.device.type, _WEIGHTS)
    return implementation(grams.detach(), order, source, include_self, flags, mean)


def _weights_compiled(grams, order, source, include_self, present, mean) -> Tensor:
    weights = torch.empty(grams.shape[:2], dtype=torch.float64, device=grams.device)
    m = grams.to(torch.float64).contiguous()
    visits = None if order is None else _kernel_order(order)
    _weights_kernel(m, visits, source.key, source.state, include_self, present, mean, weights)
    return weights


def _weights_by(solve: Callable[[Tensor, Tensor, bool], Tensor]) -> Callable[..., Tensor]:
    """One call for each group, for backends whose solver takes one matrix."""

    def call(grams, order, source, include_self, present, mean) -> Tensor:
        count, num_tasks = grams.shape[:2]
        if order is None:
            orders = drawn_orders(source, count, num_tasks, grams.device)
        else:
            orders = order.expand(count, *order.shape)
        found = [solve(m, visits, include_self) for m, visits in zip(grams.unbind(0), orders.unbind(0), strict=True)]
        return _sum_of_rows(torch.stack(found), present, mean)

    return call


def _sum_of_rows(c: Tensor, present: Sequence[int], mean: bool) -> Tensor:
    """`[..., T, T]` coefficients, overwritten -> `[..., T]`, 0 for absent tasks. Absent rows must not count."""
    absent = [t for t, here in enumerate(present) if not here]
    for t in absent:
        c[..., t, :].fill_(0.0)
    w = c.sum(-2) / (c.shape[-1] - len(absent) if mean else 1)
    for t in absent:
        w[..., t].fill_(0.0)
    return w


_WEIGHTS = {
    "cpu": _weights_compiled,
    "cuda": _weights_compiled,
    "triton": _weights_by(_coefficients_triton),
    "reference": _weights_by(reference.pcgrad_coefficients),
}


def _weights(
    gram: Tensor, order: Tensor | None, key: int, state: Tensor | None, include_self: bool, reduction: str
) -> Tensor:
    check_gram(gram)
    if order is not None:
        check_order(order, gram.shape[0], gram.device)
    source = Draw(key, state)
    return pcgrad_weights_groups(gram[None], order, source, mean=reduction == "mean", include_self=include_self)[0]


def _weights_fake(
    gram: Tensor, order: Tensor | None, key: int, state: Tensor | None, include_self: bool, reduction: str
) -> Tensor:
    return gram.new_empty(gram.shape[:1], dtype=torch.float64)


# What `methods.PCGrad` calls on a Gram matrix without a gradient: the sum or mean (reduction) of the projected
# gradients, as weights `[T]` float64. order: None is drawn from `key` and `state`, which is advanced.
weights_op = define_op(
    "pcgrad_weights(Tensor gram, Tensor? order, int key, Tensor(a!)? state, bool include_self, str reduction) "
    "-> Tensor",
    _weights,
    _weights_fake,
)


# --- fused: Gram, coefficients and combine in one call


def _scale(reduction: str, num_tasks: int) -> float:
    return 1.0 / num_tasks if reduction == "mean" else 1.0


def pcgrad_rows_into(
    rows: GradientRows,
    order: Tensor | None,
    source: Draw,
    out: Sequence[Tensor],
    *,
    mean: bool = False,
    project: bool = False,
    include_self: bool = False,
    present: Sequence[bool] | None = None,
) -> tuple[Tensor, Tensor]:
    """PCGrad of these rows into `out`, which may be the first rows' own memory; only the order is checked.

    Returns the Gram matrix and the weights: `[T]` float64, 0 for tasks that are not present; or, to `project`, the
    coefficients `[T, T]`.
    """
    device_type = device_type_of(rows.tensors)
    if order is not None:
        check_order_values(order, rows.num_tasks)
    implementation = choose("pcgrad", device_type, _OPERATE)
    flags = [] if present is None or all(present) else [int(here) for here in present]
    with torch.no_grad(), without_autocast(device_type):
        found = implementation(rows, order, source, include_self, flags, mean, project, out)
    mark_written(out)
    return found


def _results(rows: GradientRows, project: bool) -> tuple[Tensor, Tensor]:
    gram = empty_gram(rows)
    shape = (rows.num_tasks, rows.num_tasks) if project else (rows.num_tasks,)
    return gram, torch.empty(shape, dtype=torch.float64, device=gram.device)


def _operate_compiled(rows, order, source, include_self, present, mean, project, out) -> tuple[Tensor, Tensor]:
    found = _results(rows, project)
    visits = None if order is None else _kernel_order(order)
    _pcgrad_kernel(*rows, visits, source.key, source.state, include_self, present, mean, out, *found)
    return found


def _operate_triton(rows, order, source, include_self, present, mean, project, out) -> tuple[Tensor, Tensor]:
    found = _results(rows, project)
    visits = None if order is None else _kernel_order(order)
    kernel = triton_kernels("gradients.launchers").pcgrad
    kernel(rows, visits, source.key, source.state, include_self, present, mean, out, *found)
    return found


def _operate_reference(rows, order, source, include_self, present, mean, project, out) -> tuple[Tensor, Tensor]:
    gram = reference.gram_list(*rows) if rows.bank is None else reference.gram(rows.bank)
    visits = drawn_order(source, rows.num_tasks, gram.device) if order is None else order
    w = reference.pcgrad_coefficients(gram, visits, include_self)
    if not project:
        w = _sum_of_rows(w, present, mean)
    if rows.bank is not None:
        out[0].copy_(reference.combine(w, rows.bank))
    else:
        columns = reference.combine_list(w, rows.tensors, rows.index, rows.num_params)
        for target, x in zip(out, columns, strict=True):
            target.copy_(x)
    return gram, w


_OPERATE = {
    "cpu": _operate_compiled,
    "cuda": _operate_compiled,
    "triton": _operate_triton,
    "reference": _operate_reference,
}


def _bank_by(operate: Callable[..., Any]) -> Callable[..., Tensor]:
    def run(grads: Tensor, order: Tensor, reduction: str, include_self: bool) -> Tensor:
        out = _pcgrad_fake(grads, order, reduction, include_self)
        operate(bank_rows(grads), order, _NO_DRAW, include_self, [], reduction == "mean", False, [out])
        return out

    return run


def _project_bank_by(operate: Callable[..., Any]) -> Callable[..., Tensor]:
    def run(grads: Tensor, order: Tensor, include_self: bool) -> Tensor:
        out = _project_fake(grads, order, include_self)
        operate(bank_rows(grads), order, _NO_DRAW, include_self, [], False, True, [out])
        return out

    return run


def _list_by(operate: Callable[..., Any]) -> Callable[..., list[Tensor]]:
    def run(tensors, index, num_tasks, num_params, order, reduction, include_self) -> list[Tensor]:
        rows = GradientRows(list(tensors), list(index), num_tasks, num_params)
        out = _pcgrad_list_fake(*rows, order, reduction, include_self)
        operate(rows, order, _NO_DRAW, include_self, [], reduction == "mean", False, out)
        return out

    return run


def _project_list_by(operate: Callable[..., Any]) -> Callable[..., list[Tensor]]:
    def run(tensors, index, num_tasks, num_params, order, include_self) -> list[Tensor]:
        rows = GradientRows(list(tensors), list(index), num_tasks, num_params)
        out = _project_list_fake(*rows, order, include_self)
        operate(rows, order, _NO_DRAW, include_self, [], False, True, out)
        return out

    return run


def _kernels_and(reference_form: Callable[..., Any], by: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return {
        "cpu": by(_operate_compiled),
        "cuda": by(_operate_compiled),
        "triton": by(_operate_triton),
        "reference": reference_form,
    }


_FUSED: dict[str, dict[str, Callable[..., Any]]] = {
    "pcgrad": _kernels_and(reference.pcgrad, _bank_by),
    "pcgrad_list": _kernels_and(reference.pcgrad_list, _list_by),
    "pcgrad_project": _kernels_and(reference.pcgrad_project, _project_bank_by),
    "pcgrad_project_list": _kernels_and(reference.pcgrad_project_list, _project_list_by),
}


def _pcgrad(grads: Tensor, order: Tensor, reduction: str, include_self: bool) -> Tensor:
    check_bank(grads)
    check_order(order, grads.shape[0], grads.device)
    check_order_values(order, grads.shape[0])
    return choose("pcgrad", grads.device.type, _FUSED["pcgrad"])(grads, order, reduction, include_self)


def _project(grads: Tensor, order: Tensor, include_self: bool) -> Tensor:
    check_bank(grads)
    check_order(order, grads.shape[0], grads.device)
    check_order_values(order, grads.shape[0])
    return choose("pcgrad_project", grads.device.type, _FUSED["pcgrad_project"])(grads, order, include_self)


def _pcgrad_list(tensors, index, num_tasks, num_params, order, reduction, include_self) -> list[Tensor]:
    check_order_values(order, num_tasks)
    implementation = choose("pcgrad", device_type_of(tensors), _FUSED["pcgrad_list"])
    return implementation(tensors, index, num_tasks, num_params, order, reduction, include_self)


def _project_list(tensors, index, num_tasks, num_params, order, include_self) -> list[Tensor]:
    check_order_values(order, num_tasks)
    implementation = choose("pcgrad_project", device_type_of(tensors), _FUSED["pcgrad_project_list"])
    return implementation(tensors, index, num_tasks, num_params, order, include_self)


def _pcgrad_fake(grads: Tensor, order: Tensor, reduction: str, include_self: bool) -> Tensor:
    return grads.new_empty(grads.shape[1:])


def _project_fake(grads: Tensor, order: Tensor, include_self: bool) -> Tensor:
    return grads.new_empty(grads.shape)


def _pcgrad_list_fake(tensors, index, num_tasks, num_params, order, reduction, include_self) -> list[Tensor]:
    return combine_list_fake(order.new_empty(num_tasks), tensors, index, num_params)


def _project_list_fake(tensors, index, num_tasks, num_params, order, include_self) -> list[Tensor]:
    return combine_list_fake(order.new_empty(num_tasks, num_tasks), tensors, index, num_params)


def _setup_bank(ctx, inputs, output) -> None:
    grads, order, *ctx.options = inputs
    ctx.save_for_backward(grads, order)


def _setup_lists(ctx, inputs, output) -> None:
    tensors, ctx.index, ctx.num_tasks, ctx.num_params, order, *ctx.options = inputs
    ctx.save_for_backward(order, *tensors)


def _gram_gradient(grad_coefficients: Tensor, gram: Tensor, order: Tensor, include_self: bool) -> Tensor:
    """Gradient of the loss with respect to G through the coefficients is this `[T, T]` matrix times G."""
    grad_gram = coefficients_backward_op(grad_coefficients.to(torch.float64), gram, order, include_self)
    return grad_gram + grad_gram.mT


def _pcgrad_backward(ctx, grad_out: Tensor):
    grads, order = ctx.saved_tensors
    reduction, include_self = ctx.options
    num_tasks = grads.shape[0]
    m = gram_op(grads).to(torch.float64)
    w = coefficients_op(m, order, include_self).sum(0) * _scale(reduction, num_tasks)
    grad_w = inner_products(grad_out[None], grads) * _scale(reduction, num_tasks)
    through_gram = _gram_gradient(grad_w.expand(num_tasks, num_tasks), m, order, include_self)
    return combine_op(w[:, None], grad_out[None]) + combine_op(through_gram, grads), None, None, None


def _project_backward(ctx, grad_out: Tensor):
    grads, order = ctx.saved_tensors
    (include_self,) = ctx.options
    m = gram_op(grads).to(torch.float64)
    c = coefficients_op(m, order, include_self)
    through_gram = _gram_gradient(inner_products(grad_out, grads), m, order, include_self)
    return combine_op(c.mT, grad_out) + combine_op(through_gram, grads), None, None


def _lists_gradient(
    ctx, weights: Tensor, grad_columns: Sequence[Tensor], through_gram: Tensor, tensors: list[Tensor]
) -> list[Tensor]:
    """`weights^T grad_out + through_gram G`, at the positions that exist. weights: `[K, T]`."""
    n, width = ctx.num_params, len(grad_columns) // weights.shape[0]
    present = sorted({k % n for k in ctx.index}) if n else []
    position = [k * n + i for k in range(weights.shape[0]) for i in present[:width]]
    direct = combine_list_op(weights.mT, list(grad_columns), position, n)
    indirect = combine_list_op(through_gram, tensors, ctx.index, n)
    return pick_positions([a + b for a, b in zip(direct, indirect, strict=True)], ctx.index, n)


def _pcgrad_list_backward(ctx, grad_columns: Sequence[Tensor]):
    order, *tensors = ctx.saved_tensors
    reduction, include_self = ctx.options
    num_tasks, n = ctx.num_tasks, ctx.num_params
    m = gram_list_op(tensors, ctx.index, num_tasks, n).to(torch.float64)
    w = coefficients_op(m, order, include_self).sum(0) * _scale(reduction, num_tasks)
    grad_w = inner_products_list(grad_columns, tensors, ctx.index, 1, num_tasks, n) * _scale(reduction, num_tasks)
    through_gram = _gram_gradient(grad_w.expand(num_tasks, num_tasks), m, order, include_self)
    return _lists_gradient(ctx, w[None], grad_columns, through_gram, tensors), *[None] * 6


def _project_list_backward(ctx, grad_columns: Sequence[Tensor]):
    order, *tensors = ctx.saved_tensors
    (include_self,) = ctx.options
    num_tasks, n = ctx.num_tasks, ctx.num_params
    m = gram_list_op(tensors, ctx.index, num_tasks, n).to(torch.float64)
    c = coefficients_op(m, order, include_self)
    grad_c = inner_products_list(grad_columns, tensors, ctx.index, num_tasks, num_tasks, n)
    through_gram = _gram_gradient(grad_c, m, order, include_self)
    return _lists_gradient(ctx, c, grad_columns, through_gram, tensors), *[None] * 5


pcgrad_op = define_op(
    "pcgrad(Tensor grads, Tensor order, str reduction, bool include_self) -> Tensor",
    _pcgrad,
    _pcgrad_fake,
    backward=_pcgrad_backward,
    setup_context=_setup_bank,
)
pcgrad_project_op = define_op(
    "pcgrad_project(Tensor grads, Tensor order, bool include_self) -> Tensor",
    _project,
    _project_fake,
    backward=_project_backward,
    setup_context=_setup_bank,
)
pcgrad_list_op = define_op(
    "pcgrad_list(Tensor[] tensors, int[] index, int num_tasks, int num_params, Tensor order, str reduction, "
    "bool include_self) -> Tensor[]",
    _pcgrad_list,
    _pcgrad_list_fake,
    backward=_pcgrad_list_backward,
    setup_context=_setup_lists,
)
pcgrad_project_list_op = define_op(
    "pcgrad_project_list(Tensor[] tensors, int[] index, int num_tasks, int num_params, Tensor order, "
    "bool include_self) -> Tensor[]",
    _project_list,
    _project_list_fake,
    backward=_project_list_backward,
    setup_context=_setup_lists,
)
