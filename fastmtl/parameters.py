"""Parameters as callers name them: modules or iterables of tensors, and the mark of those that belong to one task."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias, TypeVar

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

Params: TypeAlias = nn.Module | Tensor | Iterable[Tensor]
_P = TypeVar("_P", nn.Module, Tensor, Iterable[Tensor])

_MARK = "_fastmtl_per_task"


def mark_per_task(params: _P) -> _P:
    """Marks parameters that belong to single tasks, so that they never enter the Gram matrix.

    `fastmtl.backward` and `GradientBank.apply` give such a parameter the sum of its gradients, unweighted,
    whatever the losses reach and whatever `shared=` says.

    Args:
        params: a module (all its parameters), a tensor, or an iterable of tensors (not a generator, if the
            returned value is to be used).

    Returns:
        `params` itself.

    Raises:
        TypeError: `params` is none of these.

    The mark is an attribute of the tensor: it stays through `module.to(...)` and `load_state_dict`, but
    `copy.deepcopy` of a parameter drops it, as any attribute.

    Example:
        >>> head = mark_per_task(torch.nn.Linear(8, 2))
    """
    for p in read_params(params, "params", allow_empty=True):
        setattr(p, _MARK, True)
    return params


def is_per_task(param: Tensor) -> bool:
    return getattr(param, _MARK, False)


def read_params(params: Params, argument: str, *, allow_empty: bool = False) -> dict[Tensor, str]:
    """The parameters, each once (tied ones are one tensor), with the name that errors give them.

    Raises:
        TypeError: not a module, a tensor or an iterable of tensors.
        ValueError: nothing in it, or a tensor that needs a gradient and is not a leaf.
    """
    if isinstance(params, nn.Module):
        named = {p: repr(name) for name, p in params.named_parameters()}
    elif isinstance(params, Tensor):
        named = {params: argument}
    else:
        if isinstance(params, (str, bytes, dict)) or not isinstance(params, Iterable):
            raise TypeError(f"{argument}: expected a module or an iterable of parameters, got {type(params).__name__}")
        named = {}
        for i, p in enumerate(params):
            if not isinstance(p, Tensor):
                raise TypeError(f"{argument}[{i}]: expected a parameter (a tensor), got {type(p).__name__}")
            named.setdefault(p, f"{argument}[{i}]")
    if not named and not allow_empty:
        raise ValueError(f"{argument}: expected at least one parameter, got none (a generator that was used up?)")
    for p, name in named.items():
        if p.requires_grad and not p.is_leaf:
            raise ValueError(
                f"{argument}: expected leaves (parameters), but {describe(p, name)} was computed from other tensors"
            )
    return named


def is_registered(params: Iterable[Tensor], model: nn.Module) -> bool:
    """Whether all of these are parameters of a module or of one inside it."""
    modules = {model}
    todo = [model]
    registered: set[int] = set()
    for m in todo:  # as `nn.Module.parameters` goes, which takes four times as long
        registered.update(map(id, m._parameters.values()))
        for child in m._modules.values():
            if child is not None and child not in modules:
                modules.add(child)
                todo.append(child)
    return registered.issuperset(map(id, params))


def describe(param: Tensor, name: str) -> str:
    return f"parameter {name} of shape {list(param.shape)}"


def compiled_module(module: nn.Module) -> str | None:
    """The name of a compiled module in `module`, itself included, or None."""
    for name, m in module.named_modules():
        # the first is what torch.compile(module) returns; named here so that dynamo need not be imported
        if type(m).__name__ == "OptimizedModule" or getattr(m, "_compiled_call_impl", None) is not None:
            return name or type(m).__name__
    return None


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself, of one that is compiled, parallel over ranks or devices, or an average of its weights."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
    while True:
        if isinstance(module, wrappers):
            module = module.module
        elif type(module).__name__ == "OptimizedModule":
            module = module._orig_mod
        else:
            return module
