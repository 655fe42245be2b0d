"""Runs functions of torch that are written in Python so that each call in them is seen."""

from __future__ import annotations

import types
from typing import Any


def _no_override(*args: Any) -> bool:
    return False


_copies: dict[Any, Any] = {}


def without_override(func: Any) -> Any:
    """A copy of a function that does not ask for overrides, so that its body runs."""
    copy = _copies.get(func)
    if copy is None:
        scope = dict(func.__globals__)
        scope.update(dict.fromkeys((n for n in scope if n.startswith("has_torch_function")), _no_override))
        copy = types.FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
        copy.__kwdefaults__ = func.__kwdefaults__
        _copies[func] = copy
    return copy
