"""Which layers of a model are meant: by name, by type, by a predicate, or counted from the bottom or the top."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import nn

from fastmtl.nn.module import TaskComposite, TaskModule

Predicate = Callable[[str, nn.Module], bool]
Where = str | type[nn.Module] | Predicate | Sequence["str | type[nn.Module] | Predicate"] | None

_COUNTED = re.compile(r"(bottom|top):(.*)", re.DOTALL)


class Place(NamedTuple):
    """A module of a model, at one of its paths."""

    path: str
    module: nn.Module


def places(model: nn.Module) -> list[Place]:
    """Every module that can be meant, each once: what lies inside a layer with parts of tasks, or inside an attention
    that is converted as a whole, can't."""
    found, seen = [], set()

    def walk(module: nn.Module, path: str) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        found.append(Place(path, module))
        if isinstance(module, (TaskModule, TaskComposite, nn.MultiheadAttention)):
            return
        for name, child in module.named_children():
            walk(child, f"{path}.{name}" if path else name)

    walk(model, "")
    return found


class Counted(NamedTuple):
    """`"bottom:2"`: two layers; `"bottom:0.05"`: layers with up to 5% of all parameters."""

    top: bool
    layers: int | None
    share: float | None


def read_counted(where: str) -> Counted | None:
    """`where`, if it counts layers.

    Raises:
        ValueError: a number that is none, or none that can be.
    """
    match = _COUNTED.fullmatch(where)
    if match is None:
        return None
    top, text = match[1] == "top", match[2]
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    layers = int(number) if re.fullmatch(r"\d+", text) else None
    if (layers is None and not 0 < number <= 1) or layers == 0:
        raise ValueError(
            f"where: expected {match[1]}:2 (a number of layers) or {match[1]}:0.05 (a share of the parameters, above 0 "
            f"and up to 1.0), got {where!r}"
        )
    return Counted(top, layers, None if layers is not None else number)


def matches(where: Where, place: Place) -> bool:
    """Whether a place is meant by something that does not count. A name means all that lies in the module, too.

    Raises:
        TypeError: no name, type, predicate or sequence of these.
    """
    if where is None:
        return True
    if isinstance(where, str):
        parts = place.path.split(".") if place.path else []
        above = [".".join(parts[:k]) for k in range(1, len(parts) + 1)]
        return any(fnmatch.fnmatchcase(path, where) for path in above)
    if isinstance(where, type):
        return isinstance(place.module, where)
    if callable(where):
        answer = where(place.path, place.module)
        if not isinstance(answer, bool):
            raise TypeError(f"where: expected a predicate that answers with a bool, got {type(answer).__name__}")
        return answer
    return any(matches(one, place) for one in where)


def check_where(where: object, inside: bool = False) -> None:
    """Raises TypeError or ValueError for a `where` that is none."""
    if where is None and not inside:
        return
    if isinstance(where, str):
        if not where:
            raise ValueError("where: expected a name, got an empty one")
        counted = read_counted(where)
        if counted is not None and inside:
            raise ValueError(f"where: expected {where!r} alone, got it in a sequence")
        return
    if isinstance(where, type):
        if not issubclass(where, nn.Module):
            raise TypeError(f"where: expected a type of nn.Module, got {where.__name__}")
        return
    # a layer is callable, too, but no predicate
    if callable(where) and not isinstance(where, nn.Module):
        return
    if inside or isinstance(where, nn.Module) or not isinstance(where, Sequence):
        raise TypeError(
            f"where: expected a name, a type of nn.Module, a predicate, or a sequence of these, got "
            f"{type(where).__name__}" + (" (a layer itself; its name is meant)" if isinstance(where, nn.Module) else "")
        )
    if not where:
        raise ValueError("where: expected at least one name, type or predicate, got none")
    for one in where:
        check_where(one, inside=True)


def means_exactly(where: Where, place: Place) -> bool:
    """Whether a place itself was named, or its type, and not only something around it."""
    if isinstance(where, str):
        return read_counted(where) is None and where == place.path
    if isinstance(where, type):
        return type(place.module) is where
    if where is None or callable(where):
        return False
    return any(means_exactly(one, place) for one in where)


def counted_from(counted: Counted, layers: Sequence[Place], model: nn.Module) -> list[Place]:
    """The layers at one end, as many as asked for.

    Raises:
        ValueError: more layers than there are.
    """
    ordered = list(layers)[::-1] if counted.top else list(layers)
    if counted.layers is not None:
        if counted.layers > len(ordered) > 0:
            end = "top" if counted.top else "bottom"
            raise ValueError(
                f"where: expected at most {end}:{len(ordered)}, since the kind converts {len(ordered)} layers of this "
                f"model, got {end}:{counted.layers}"
            )
        return ordered[: counted.layers]
    assert counted.share is not None
    room = counted.share * sum(p.numel() for p in model.parameters())
    chosen: list[Place] = []
    for place in ordered:
        room -= sum(p.numel() for p in place.module.parameters())
        if room < 0:
            break
        chosen.append(place)
    return chosen
