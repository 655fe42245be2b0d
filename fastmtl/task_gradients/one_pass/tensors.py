"""The tensors in the arguments and results of torch calls: in lists, tuples and dicts too."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def nested(values: Any) -> list[Tensor]:
    """The tensors in arguments or results, in the order in which they stand there."""
    found: list[Tensor] = []
    _collect((values,), found)
    return found


def _collect(values: Iterable[Any], found: list[Tensor]) -> None:
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            _collect(value, found)
        elif isinstance(value, dict):
            _collect(value.values(), found)


def replaced(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Arguments with every tensor replaced by `change(tensor)`, in the order of `nested`."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        parts = [replaced(v, change) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        return [replaced(v, change) for v in value]
    if isinstance(value, dict):
        return {k: replaced(v, change) for k, v in value.items()}
    return value


def version(x: Tensor) -> int:
    """How often a tensor was written to."""
    return 0 if x.is_inference() else x._version


def versions(values: Any) -> tuple[int, ...]:
    """How often each tensor was written to."""
    return tuple(version(x) for x in nested(values))


class SameTensor:
    """A tensor in a key: equal to itself alone, and kept, so that no other takes its place in memory."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SameTensor) and other.x is self.x

    def __hash__(self) -> int:
        return id(self.x)


class Again:
    """A function that draws random numbers, so that it draws the same each time: those that come next now.

    Args:
        func: it.
        tensors: what it is called with: on their devices it draws.
    """

    def __init__(self, func: Callable[..., Any], tensors: Iterable[Tensor]) -> None:
        self.func, self.__name__ = func, getattr(func, "__name__", "")
        self._devices = sorted({x.device.index for x in tensors if x.device.type == "cuda"})
        self._states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(index) for index in self._devices)]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.random.fork_rng(devices=self._devices):  # type: ignore[attr-defined]
            torch.set_rng_state(self._states[0])
            for index, state in zip(self._devices, self._states[1:], strict=True):
                torch.cuda.set_rng_state(state, index)
            return self.func(*args, **kwargs)


class Written:
    """A function that changes its first argument in place, on a copy of it, which is its result."""

    def __init__(self, func: Callable[..., Any]) -> None:
        self.func, self.__name__ = func, getattr(func, "__name__", "")

    def __call__(self, first: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copy = first.clone()
        self.func(copy, *args, **kwargs)
        return copy
