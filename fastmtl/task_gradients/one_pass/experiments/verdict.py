"""What experiments gave, kept for later calls of the same kind."""

from __future__ import annotations

import collections
import weakref
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastmtl.task_gradients.one_pass.experiments.forwards import Layout
from fastmtl.task_gradients.one_pass.sample_axis import PerSample, SampleAxis
from fastmtl.task_gradients.one_pass.tensors import version
from fastmtl.task_gradients.one_pass.torch_call import TorchCall


class Summed(NamedTuple):
    """The result is a linear sum over the samples."""


class Refused(NamedTuple):
    """Nothing is proven; `why` says what was seen. `mixes`: that it mixes samples."""

    why: str
    mixes: bool = False


class Placed(NamedTuple):
    """Each element belongs to one task, which holds for this very call alone: `axis` is how they lie."""

    axis: PerSample


# of one result
Verdict: TypeAlias = Layout | Summed | Refused | Placed

_KEPT = 4096
_verdicts: collections.OrderedDict[Any, list[Verdict]] = collections.OrderedDict()

_PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.layout,
          torch.memory_format, type(Ellipsis))  # fmt: skip


class _Same:
    """A tensor in a key: equal to itself alone, as long as it lives and nobody writes to it."""

    def __init__(self, x: Tensor) -> None:
        self._ref, self._version, self._hash = weakref.ref(x), version(x), id(x)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Same):
            return False
        mine = self._ref()
        return mine is not None and mine is other._ref() and self._version == other._version

    def __hash__(self) -> int:
        return self._hash


class NoKey(Exception):
    """A call has an argument whose value can't be told from others later."""


def key_of(call: TorchCall, axis_of: Callable[[Tensor], SampleAxis], victims: Collection[int], *, very: bool) -> Any:
    """Tells calls apart of which one verdict may not hold for another.

    Args:
        victims: the ids of the tensors whose samples were changed.
        very: whether it holds for the very tensors beside these alone.

    Raises:
        NoKey: an argument is neither a tensor nor a plain value.
    """
    autocast = [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")]

    def of_tensor(x: Tensor) -> Any:
        axis = axis_of(x)
        here: tuple[Any, ...] = (type(axis).__name__,)
        if isinstance(axis, PerSample):
            here = (axis.axis, axis.outer, axis.inner, len(axis.task_ids))
        if very and id(x) not in victims:
            here = (*here, _Same(x))
        return (tuple(x.shape), x.stride(), x.dtype, x.device, x.requires_grad, *here)

    return call.func, tuple(autocast), _key(call.args, of_tensor), _key(call.kwargs, of_tensor)


def _key(value: Any, of_tensor: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return of_tensor(value)
    if isinstance(value, (list, tuple)):
        return (type(value), *[_key(v, of_tensor) for v in value])
    if isinstance(value, dict):
        return tuple((k, _key(v, of_tensor)) for k, v in sorted(value.items()))
    if isinstance(value, slice):
        return ("slice", *[_key(v, of_tensor) for v in (value.start, value.stop, value.step)])
    if isinstance(value, _PLAIN):
        return (type(value), value)
    raise NoKey(type(value).__name__)


def known(key: Any) -> list[Verdict] | None:
    found = _verdicts.get(key)
    if found is not None:
        _verdicts.move_to_end(key)
    return found


def keep(key: Any, verdicts: list[Verdict]) -> None:
    _verdicts[key] = verdicts
    if len(_verdicts) > _KEPT:
        _verdicts.popitem(last=False)


def forget() -> None:
    """Forgets every verdict."""
    _verdicts.clear()
