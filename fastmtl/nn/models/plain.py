"""What a merged model still needs to be one that others take for a plain one."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import noop_context_fn

from fastmtl.nn.context import checkpoint_contexts
from fastmtl.nn.module import as_parameter


def forget_contexts(model: nn.Module) -> None:
    """Puts torch's own `context_fn` where a model keeps `checkpoint_contexts`: of tasks nothing is left to recompute.

    `gradient_checkpointing_enable` of transformers keeps it in a partial at modules, others in dictionaries.
    """
    for module in model.modules():
        for name, value in list(module.__dict__.items()):
            found = _without_contexts(value)
            if found is not value:
                module.__dict__[name] = found


def _without_contexts(value: Any) -> Any:
    """`value` itself, if `checkpoint_contexts` is not in it."""
    if value is checkpoint_contexts:
        return noop_context_fn
    if isinstance(value, functools.partial):
        old = value.func, value.args, value.keywords
        new = tuple(map(_without_contexts, old))
        return functools.partial(new[0], *new[1], **new[2]) if _differ(old, new) else value
    if type(value) is dict:
        new_values = {key: _without_contexts(x) for key, x in value.items()}
        return new_values if _differ(value.values(), new_values.values()) else value
    if type(value) in (list, tuple):
        new_items = [_without_contexts(x) for x in value]
        return type(value)(new_items) if _differ(value, new_items) else value
    return value


def _differ(old: Any, new: Any) -> bool:
    return any(a is not b for a, b in zip(old, new, strict=True))


@torch.no_grad()
def tie_again(model: nn.Module, task: str) -> None:
    """Ties what a model of transformers says is tied, where it is equal still, and unties the rest, as a warning says.

    Such a model keeps one tensor of those that it ties, and drops the others from its file. What is no longer equal
    must therefore have a tensor of its own; it is loaded as it is then, since transformers compares before it ties. The
    configuration stays as it is: some models (T5's relatives) compute something else with another.
    """
    untied: list[str] = []
    for path, module in model.named_modules():
        groups: dict[str, list[str]] = {}
        for target, source in _declared(module):
            groups.setdefault(source, []).append(target)
        for source, targets in groups.items():
            first, taken = module.get_parameter(source), {id(module.get_parameter(source))}
            for target in targets:
                here = module.get_parameter(target)
                if here is first:
                    continue
                if here.shape == first.shape and here.dtype == first.dtype and torch.equal(here, first):
                    _put(module, target, first)
                    continue
                untied += [f"{path}.{name}" if path else name for name in (target, source)]
                if id(here) in taken:
                    _put(module, target, as_parameter(here))
                taken.add(id(here))
    if untied:
        warnings.warn(
            f"task {task!r} differs in weights that the plain model ties, which are untied in the merged one: "
            f"{', '.join(dict.fromkeys(untied))}; save_pretrained writes each, and from_pretrained keeps them so",
            stacklevel=3,
        )


def _declared(module: nn.Module) -> Iterator[tuple[str, str]]:
    """The names that a model of transformers ties, as it expands them: a target, and what it is tied to."""
    expand = getattr(module, "get_expanded_tied_weights_keys", None)
    if expand is None:
        return
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for target, source in expand(all_submodels=False).items():
        if target in parameters and source in parameters:
            yield target, source


def _put(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, parameter)
