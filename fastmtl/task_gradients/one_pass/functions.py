"""Shows calls of `torch.autograd.Function` to a tracker, which torch shows to no torch function mode."""

from __future__ import annotations

import contextlib
import functools
import sys
from typing import Any, Protocol

import torch
from torch.autograd.function import _SingleLevelFunction
from torch.overrides import _get_current_function_mode_stack, _pop_mode_temporarily

# a Function of these is shown as the call that it is a part of
_NOT_SHOWN = ("fastmtl.", "torch.utils.", "torch._", "torch.autograd.", "torch.nn.")

# a compiled graph, whose calls were followed when it was made
_COMPILED = "torch._functorch."

_trackers: list[Shown] = []


class Shown(Protocol):
    """A torch function mode that may be told not to follow."""

    def on(self, following: bool = True) -> contextlib.AbstractContextManager[None]:
        """Whether calls inside are followed."""
        ...

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any: ...


class _Applied:
    """`cls.apply` as it is."""

    def __init__(self, cls: Any) -> None:
        self.cls, self.__name__ = cls, f"{cls.__name__}.apply"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super(_SingleLevelFunction, self.cls).apply(*args, **kwargs)


# one for each class, by which verdicts are remembered
_applied = functools.lru_cache(maxsize=1024)(_Applied)


def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """What `Function.apply` ends in, whatever name it was given before the block."""
    plain = _applied(cls)
    if cls.__module__.startswith(_COMPILED):
        with contextlib.ExitStack() as unfollowed:
            for tracker in _trackers:
                unfollowed.enter_context(tracker.on(False))
            return plain(*args, **kwargs)
    if f"{cls.__module__}.".startswith(_NOT_SHOWN) or torch._C._is_torch_function_all_disabled():
        return plain(*args, **kwargs)
    if not any(mode in _trackers for mode in _get_current_function_mode_stack()):
        return plain(*args, **kwargs)
    with contextlib.ExitStack() as popped:
        while True:
            mode = popped.enter_context(_pop_mode_temporarily())
            if mode in _trackers:  # as torch calls its modes: without itself and those inside it
                return mode.__torch_function__(plain, (), args, kwargs)


def show_to(tracker: Shown) -> None:
    """From here on, until `hide_from`."""
    if not _trackers:
        # dynamo, which runs a Function as it is behind a graph break, is not to trace this
        seen = sys.modules["torch._dynamo"].disable(_apply) if "torch._dynamo" in sys.modules else _apply
        _SingleLevelFunction.apply = classmethod(seen)  # type: ignore[assignment,method-assign]
    _trackers.append(tracker)


def hide_from(tracker: Shown) -> None:
    _trackers.remove(tracker)
    if not _trackers:
        del _SingleLevelFunction.apply
