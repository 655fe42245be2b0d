"""How methods read their arguments: numbers, counts, choices, and numbers of each task. One style of error for all.

A reader takes a value and the name of the argument, and returns what the method keeps. As an `Argument` it makes an
attribute that is read and checked again whenever somebody sets it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")
Reader: TypeAlias = Callable[[Any, str], _T]
TaskNumbersArgument: TypeAlias = Tensor | Sequence[float] | Mapping[str, float]


class Argument(Generic[_T]):
    """An attribute of a method that may be set at any time: each value is read by `read`, and checked so.

    Example:
        >>> class Scaled:
        ...     factor = Argument(number(above=0.0))
        >>> scaled = Scaled()
        >>> scaled.factor = 2
        >>> scaled.factor
        2.0
    """

    def __init__(self, read: Reader[_T], argument: str | None = None) -> None:
        self._read, self._argument = read, argument

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name
        # dynamo of torch 2.10 asks the descriptor again where the value lies under its name
        self._place = f"_argument_{name}"
        self._argument = self._argument or name  # what errors call it

    def __get__(self, method: Any, owner: type | None = None) -> Any:
        if method is None:
            return self
        try:
            return method.__dict__[self._place]
        except KeyError:
            raise AttributeError(f"{type(method).__name__}: {self._name} was not set") from None

    def __set__(self, method: Any, value: Any) -> None:
        method.__dict__[self._place] = self._read(value, self._argument)


# --- one number


def read_number(
    value: Any,
    argument: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    hint: str = "",
) -> float:
    """A finite number within bounds, of which `above` and `below` are themselves left out. hint: what the error adds
    about other types.

    Raises:
        TypeError: no number (a bool and a tensor are none).
        ValueError: out of bounds, infinite or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{argument}: expected a number, got {type(value).__name__}{hint and f'; {hint}'}")
    x = float(value)
    good = (
        math.isfinite(x)
        and (least is None or x >= least)
        and (above is None or x > above)
        and (most is None or x <= most)
        and (below is None or x < below)
    )
    if not good:
        lower = f" from {least:g}" if least is not None else "" if above is None else f" above {above:g}"
        upper = f" to {most:g}" if most is not None else "" if below is None else f" to below {below:g}"
        expected = "a positive number" if above == 0 and not upper else f"a number{lower}{upper}"
        raise ValueError(f"{argument}: expected {expected}, got {value!r}")
    return x


def number(*, hint: str = "", **bounds: float) -> Reader[float]:
    """A reader by `read_number` with these bounds."""
    return lambda value, argument: read_number(value, argument, hint=hint, **bounds)


def optional(read: Reader[_T]) -> Reader[_T | None]:
    """A reader that lets None pass."""
    return lambda value, argument: None if value is None else read(value, argument)


def read_count(value: Any, argument: str, *, least: int = 0, most: int | None = None) -> int:
    """A whole number within bounds.

    Raises:
        TypeError: no integer (a bool and a float are none).
        ValueError: out of bounds.
    """
    try:
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    if found is None:
        raise TypeError(f"{argument}: expected an integer, got {type(value).__name__}")
    if found < least or (most is not None and found > most):
        upper = "" if most is None else f" to {most}"
        raise ValueError(f"{argument}: expected an integer from {least}{upper}, got {found}")
    return found


def count(*, least: int = 0, most: int | None = None) -> Reader[int]:
    """A reader by `read_count` with these bounds."""
    return lambda value, argument: read_count(value, argument, least=least, most=most)


def choice(*choices: str) -> Reader[str]:
    """A reader of one of these words; ValueError for any other."""

    def read(value: Any, argument: str) -> str:
        if not isinstance(value, str) or value not in choices:
            expected = " or ".join([", ".join(map(repr, choices[:-1])), repr(choices[-1])])
            raise ValueError(f"{argument}: expected {expected}, got {value!r}")
        return value

    return read


def read_flag(value: Any, argument: str) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{argument}: expected True or False, got {type(value).__name__}")
    return value


def read_name(value: Any, argument: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{argument}: expected the name of a task, got {type(value).__name__}")
    return value


# --- numbers of each task


def read_tensor(values: Any, argument: str, expected: str) -> Tensor:
    """A float64 copy of a tensor or of (nested) sequences of numbers; TypeError where there is something else."""
    if isinstance(values, Tensor):
        if values.dtype == torch.bool or values.is_complex():
            raise TypeError(f"{argument}: expected {expected}, got {values.dtype}")
        return values.detach().to(torch.float64, copy=True)
    if isinstance(values, (str, bytes)) or not (isinstance(values, Sequence) or hasattr(values, "__array__")):
        raise TypeError(f"{argument}: expected {expected}, got {type(values).__name__}")
    if isinstance(values, Sequence) and any(isinstance(x, bool) for x in values):
        raise TypeError(f"{argument}: expected {expected}, got {values!r}")
    try:
        return torch.as_tensor(values, dtype=torch.float64).clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{argument}: expected {expected}, got {values!r}") from error


class TaskNumbers:
    """One number for each task: T of them in the order of the tasks, or by the tasks' names.

    Args:
        values: a tensor or a sequence of T numbers, or a mapping from names to numbers.
        argument: what errors call it.
        rest: the number of tasks that a mapping lacks; None: it must have all.
        most: the largest that is allowed; None: any finite one. All are from 0.
        positive: whether one at least must be above 0.

    Raises:
        TypeError: no numbers, no names.
        ValueError: numbers out of bounds, or none at all.

    Attributes:
        by_name: whether they are known by the names of tasks.
    """

    def __init__(
        self,
        values: TaskNumbersArgument,
        argument: str,
        *,
        rest: float | None = None,
        most: float | None = None,
        positive: bool = False,
    ) -> None:
        self._argument, self._rest = argument, rest
        self.by_name = isinstance(values, Mapping)
        self._names: list[str] | None = None  # of the tasks that `_made` is for
        if isinstance(values, Mapping):
            self._by_name = {
                read_name(name, argument): read_number(x, f"{argument}[{name!r}]", least=0.0, most=most)
                for name, x in values.items()
            }
            found = list(self._by_name.values())
            wrong = not found or (positive and not any(found))
        else:
            self._made = read_tensor(values, argument, "T numbers")
            found = self._made.tolist()
            if self._made.dim() != 1 or not found:
                raise ValueError(f"{argument}: expected T numbers, got shape {list(self._made.shape)}")
            limit = math.inf if most is None else most
            wrong = not all(0 <= x <= limit and x < math.inf for x in found) or (positive and not any(found))
        self._shown = repr(self._by_name if isinstance(values, Mapping) else found)  # later it may lie on a device
        if wrong:
            upper = "" if most is None else f" to {most:g}"
            some = ", not all of them 0" if positive else ""
            raise ValueError(f"{argument}: expected numbers from 0{upper}{some}, got {found}")

    def of(self, names: Sequence[str], device: torch.device) -> Tensor:
        """Those of these tasks, `[T]` float64 on the device. They are kept there: a copy at each call would wait.

        Raises:
            ValueError: another number of tasks; a name that is none of theirs, a task that has no number.
        """
        if not self.by_name:
            self.check_length(len(names))
        elif self._names != list(names):
            self._made = torch.tensor(self._read_names(names), dtype=torch.float64)
            self._names = list(names)
        if self._made.device != device:
            self._made = self._made.to(device)
        return self._made

    def check_length(self, num_tasks: int) -> None:
        if not self.by_name and len(self._made) != num_tasks:
            raise ValueError(
                f"{self._argument}: expected {num_tasks} numbers, one for each task, got {len(self._made)}"
            )

    def _read_names(self, names: Sequence[str]) -> list[float]:
        check_task_names(self._by_name, self._argument, names)
        if self._rest is None and (missing := [name for name in names if name not in self._by_name]):
            raise ValueError(
                f"{self._argument}: expected a number for each of the tasks {', '.join(names)}, got none for "
                f"{', '.join(map(repr, missing))}"
            )
        return [self._by_name.get(name, self._rest or 0.0) for name in names]

    @property
    def value(self) -> Tensor | dict[str, float]:
        """As it was given: a float64 tensor, or a dict."""
        return dict(self._by_name) if self.by_name else self._made

    def __repr__(self) -> str:
        return self._shown


def check_task_names(given: Sequence[str] | Mapping[str, Any], argument: str, names: Sequence[str]) -> None:
    """Raises ValueError where a name that an argument mentions is none of the tasks'."""
    for name in given:
        if name not in names:
            raise ValueError(
                f"{argument}: expected one of {', '.join(names)}, got {name!r} (a task that is absent from a step has "
                "None as its loss, and keeps its name)"
            )


def read_preferences(preferences: TaskNumbersArgument | None, argument: str = "preferences") -> TaskNumbers | None:
    """What each task counts: numbers from 0, not all of them 0; None: nothing was said."""
    return None if preferences is None else TaskNumbers(preferences, argument, positive=True)


# --- state


def check_mapping(state: Any, argument: str, keys: Sequence[str] | None = None, who: str = "") -> None:
    """Raises TypeError where a state is no mapping, ValueError where it has other keys than these."""
    if not isinstance(state, Mapping):
        raise TypeError(f"{argument}: expected what state_dict() returned, got {type(state).__name__}")
    if keys is not None and set(state) != set(keys):
        got = ", ".join(map(str, state)) or "nothing"
        raise ValueError(f"{argument}: expected that of {who}, {', '.join(keys)}, got {got}")
