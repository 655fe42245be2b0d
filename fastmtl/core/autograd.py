"""How an op is recorded for autograd: what `torch.library.register_autograd` does, with less work for the host.

That function describes the arguments of each call by trees, and goes through the dispatcher once more in between. A
schema says once which arguments are lists of tensors, and plain tensors need no dispatcher to find the implementation.
Layers of small networks are called thousands of times a second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_KEYS = torch._C.DispatchKey
_PLAIN = (_KEYS.CPU, _KEYS.CUDA)
_BELOW = torch._C._after_autograd_keyset


def _has_tangent(args: Sequence[Any]) -> bool:
    flat = (y for x in args for y in (x if isinstance(x, (list, tuple)) else (x,)))
    return any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in flat)


def register_autograd(
    library: torch.library.Library,
    name: str,
    implementation: Callable[..., Any],
    backward: Callable[..., Any],
    setup_context: Callable[..., None] | None,
) -> None:
    """Gives an op its formula.

    Args:
        library: that defines it.
        name: in the library.
        implementation: for every device; called at once where all tensors are plain ones, and otherwise found by the
            dispatcher (fake tensors, subclasses, modes, function transforms).
        backward: `(ctx, *grads)` to a tuple with a gradient, a list of gradients or None for each argument;
            `ctx.needs_input_grad` has a bool for each argument, of a list of tensors a list.
        setup_context: `(ctx, inputs, output)`, which saves what `backward` needs.
    """
    op = getattr(getattr(torch.ops, library.ns), name).default
    arguments = op._schema.arguments
    of_tensors = torch.ListType(torch.TensorType.get())
    lists = frozenset(k for k, x in enumerate(arguments) if x.type.isSubtypeOf(of_tensors))
    assert not any(x.kwarg_only for x in arguments), name

    def run(keys: Any, args: Sequence[Any]) -> Any:
        below = keys & _BELOW
        with torch._C._AutoDispatchBelowAutograd():
            if below.remove(_KEYS.ADInplaceOrView).highestPriorityTypeId() in _PLAIN:
                return implementation(*args)
            return op.redispatch(below, *args)

    def forward(ctx: Any, keys: Any, args: tuple[Any, ...], *tensors: Tensor) -> Any:
        result = run(keys, args)
        if setup_context is not None:
            # the dispatcher leaves out what is a default
            inputs = (*args, *(x.default_value for x in arguments[len(args) :]))
            setup_context(ctx, inputs, result)
        # how many tensors each argument has; -1: it is one tensor; None: no tensor
        ctx.counts = tuple(
            len(x) if k in lists else -1 if isinstance(x, Tensor) else None for k, x in enumerate(args)
        )  # fmt: skip
        ctx.is_list = isinstance(result, list)
        return tuple(result) if ctx.is_list else result

    def formula(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = ctx.needs_input_grad
        flat = iter(given[2:])
        needs: list[Any] = []
        for count in ctx.counts:
            if count is None:
                needs.append(False)
            else:
                needs.append(next(flat) if count < 0 else [next(flat) for _ in range(count)])
        needs += [False] * (len(arguments) - len(needs))
        ctx.needs_input_grad = tuple(needs)
        try:
            found = backward(ctx, list(grads)) if ctx.is_list else backward(ctx, *grads)
        finally:
            ctx.needs_input_grad = given
        out: list[Tensor | None] = [None, None]
        for count, grad in zip(ctx.counts, found if isinstance(found, tuple) else (found,), strict=False):
            if count is None:
                continue
            if count < 0:
                out.append(grad)
            else:
                out.extend([None] * count if grad is None else grad)
        return tuple(out)

    node = type(
        f"BackwardOf_{name}",
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(formula)},
    )

    def autograd(keys: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0 and _has_tangent(args):
            raise NotImplementedError(f"fastmtl::{name}: has no forward-mode derivative (jvp), use the reverse mode")
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return run(keys, args)
        tensors: list[Tensor] = []
        for k, x in enumerate(args):
            if k in lists:
                tensors.extend(x)
            elif isinstance(x, Tensor):
                tensors.append(x)
        result = node.apply(keys, args, *tensors)
        return list(result) if result_is_list else result

    result_is_list = op._schema.returns[0].type.isSubtypeOf(of_tensors)
    library.impl(name, autograd, "Autograd", with_keyset=True)
