"""How an op is recorded for autograd: what `torch.library.register_autograd` does, with less work for the host.

That function describes the arguments of each call by trees, and goes through the dispatcher once more in between. A
schema says once which arguments are lists of tensors, and plain tensors need no dispatcher to find the implementation.
Layers of small networks are called thousands of times a second. `torch.func.grad` and `torch.func.vmap` work, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

_KEYS = torch._C.DispatchKey
_PLAIN = (_KEYS.CPU, _KEYS.CUDA)
_BELOW = torch._C._after_autograd_keyset


def has_tangent(args: Sequence[Any]) -> bool:
    """Whether a tensor, or one of a list, has a derivative of forward mode."""
    flat = (y for x in args for y in (x if isinstance(x, (list, tuple)) else (x,)))
    return any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in flat)


def no_view(result: Any) -> Any:
    """The same memory, of which nobody knows that it was reshaped inside: torch refuses to write into a view that an
    `autograd.Function` returns (`nn.ReLU(inplace=True)`). Of lists and tuples, each tensor."""
    if isinstance(result, Tensor):
        if torch.compiler.is_compiling():  # which traces no guards, and knows no such views
            return result.view_as(result)
        if not result._is_view():
            return result
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return result.view_as(result)
    if isinstance(result, list):
        return [*map(no_view, result)]
    return tuple(map(no_view, result)) if isinstance(result, tuple) else result


class _BackwardCall:
    """What a formula sees of its node: all that `setup_context` left there, and what this call alone is told.

    Several threads may go backward through one node at once, so that nothing is written to the node itself. Without
    slots, which the compiler of a backward pass does not find beside `__getattr__` (torch 2.13).
    """

    def __init__(self, node: Any, needs_input_grad: tuple[Any, ...]) -> None:
        self._node = node
        self.needs_input_grad = needs_input_grad

    def __getattr__(self, name: str) -> Any:
        return getattr(self._node, name)


def register_autograd(
    library: torch.library.Library,
    name: str,
    implementation: Callable[..., Any],
    backward: Callable[..., Any],
    setup_context: Callable[..., None] | None,
) -> None:
    """Gives an op its formula, and a way through `torch.func.vmap`.

    Args:
        library: that defines it.
        name: in the library.
        implementation: for every device; called at once where all tensors are plain ones, and otherwise found by the
            dispatcher (fake tensors, subclasses, modes, function transforms).
        backward: `(ctx, *grads)` to a tuple with a gradient, a list of gradients or None for each argument;
            `ctx.needs_input_grad` has a bool for each argument, of a list of tensors a list. It writes nothing to ctx.
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
                return no_view(implementation(*args))
            return op.redispatch(below, *args)

    def forward(ctx: Any, keys: Any, args: tuple[Any, ...], *tensors: Tensor) -> Any:
        if torch._C._functorch.maybe_current_level() is None:
            result = run(keys, args)
        else:
            # of the transforms around this one, each records for itself
            with torch.enable_grad():
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
        counts = ctx.counts
        flat = iter(ctx.needs_input_grad[2:])
        needs: list[Any] = []
        for count in counts:
            if count is None:
                needs.append(False)
            else:
                needs.append(next(flat) if count < 0 else [next(flat) for _ in range(count)])
        needs += [False] * (len(arguments) - len(needs))
        call = _BackwardCall(ctx, tuple(needs))
        found = backward(call, list(grads)) if ctx.is_list else backward(call, *grads)
        out: list[Tensor | None] = [None, None]
        for count, grad in zip(counts, found if isinstance(found, tuple) else (found,), strict=False):
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
        if forward_ad._current_level >= 0 and has_tangent(args):
            raise NotImplementedError(f"fastmtl::{name}: has no forward-mode derivative (jvp), use the reverse mode")
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return run(keys, args)
        tensors: list[Tensor] = []
        for k, x in enumerate(args):
            if k in lists:
                tensors.extend(x)
            elif isinstance(x, Tensor):
                tensors.append(x)
        if torch._C._functorch.maybe_current_level() is None:
            result = node.apply(keys, args, *tensors)
        else:
            # the transform itself has called this, for the tensors of its own level: nothing is left to transform here
            with enable_single_level_autograd_function():
                result = super(torch.autograd.Function, node).apply(keys, args, *tensors)
        return list(result) if result_is_list else result

    def by_slices(info: Any, dims: tuple[Any, ...], *args: Any) -> Any:
        """The op on each slice in turn, and how its stacked results lie."""
        if info.batch_size == 0:
            raise NotImplementedError(f"fastmtl::{name}: vmap needs at least one slice, got 0")

        def part(x: Any, dim: Any, k: int) -> Any:
            return x if dim is None else x.select(dim, k)

        def slice_of(x: Any, dim: Any, k: int) -> Any:
            if isinstance(x, (list, tuple)):
                return [part(y, d, k) for y, d in zip(x, dim, strict=True)]
            return part(x, dim, k)

        results = [op(*(slice_of(x, d, k) for x, d in zip(args, dims, strict=True))) for k in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = [torch.stack(each) for each in zip(*results, strict=True)]
        return (stacked, [0] * len(stacked)) if result_is_list else (tuple(stacked), (0,) * len(stacked))

    result_is_list = op._schema.returns[0].type.isSubtypeOf(of_tensors)
    library.impl(name, autograd, "Autograd", with_keyset=True)
    torch.library.register_vmap(op, by_slices, lib=library)
