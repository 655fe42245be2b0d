"""Which table is used: found once, when an op first asks for a number."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from fastmtl.tuning.processor import Processor, this_processor
from fastmtl.tuning.table import DEFAULTS, Table, TableError, read

VARIABLE = "FASTMTL_TUNED"
SHIPPED = "shipped with fastmtl"  # the place of a table that the package brings


class Found(NamedTuple):
    """The table that is used, where it lies (None: nowhere, it is the defaults), what that place is, and which others
    were refused, each with the reason."""

    table: Table
    path: Path | None
    place: str
    refused: Sequence[tuple[Path, str]]


def cache_path(processor: Processor) -> Path:
    """Where `fastmtl tune` leaves the table of a processor, and where it is looked for."""
    # of a user without a home this is no place, and holds no table
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(folder) / "fastmtl" / f"tuned-{processor.slug}-{processor.threads}.json"


def shipped_tables() -> list[Path]:
    """The tables that the package brings, in the order of their names."""
    folder = Path(str(resources.files("fastmtl.tuning"))) / "tables"
    return sorted(folder.glob("*.json"))


def foreign(table: Table, processor: Processor) -> str | None:
    """Why a table of a user is not of this processor; None if it is. The number of threads may differ."""
    for what, of in (("name", "of another processor"), ("level", "of this processor with other instructions")):
        of_table, here = getattr(table.processor, what), getattr(processor, what)
        if of_table != here:
            return f"it is {of}: {of_table!r}, and this one is {here!r}"
    return None


def _distance(table: Table, processor: Processor) -> tuple[bool, bool, bool, int]:
    """How far a shipped table is from a processor: by name, instructions, vendor, and then the number of threads."""
    of_table = table.processor
    return (
        of_table.name != processor.name,
        of_table.level != processor.level,
        of_table.vendor != processor.vendor,
        abs(of_table.threads - processor.threads),
    )


def find(processor: Processor) -> Found:
    """The table that a process on this processor uses, and why not another.

    A file named by `FASTMTL_TUNED`; else that of the user's cache folder; else the nearest that the package brings;
    else the defaults.
    """
    refused: list[tuple[Path, str]] = []
    named = os.environ.get(VARIABLE)
    places = [(Path(os.path.expanduser(named)), f"named by {VARIABLE}")] if named else []
    mine = cache_path(processor)
    if os.path.exists(mine):
        places.append((mine, "of the cache folder"))
    for path, place in places:
        try:
            table = read(path)
            reason = foreign(table, processor)
        except TableError as error:
            reason = str(error)
        if reason is None:
            return Found(table, path, place, refused)
        refused.append((path, reason))
    near: list[tuple[tuple[bool, bool, bool, int], Path, Table]] = []
    for path in shipped_tables():
        try:
            table = read(path)
        except TableError as error:
            refused.append((path, str(error)))
        else:
            near.append((_distance(table, processor), path, table))
    if near:
        _, path, table = min(near, key=lambda entry: entry[:2])
        return Found(table, path, SHIPPED, refused)
    return Found(DEFAULTS, None, "the defaults", refused)


_lock = threading.Lock()
_found: Found | None = None
_given: Table | None = None


@functools.cache
def _warn(path: Path, reason: str) -> None:
    warnings.warn(
        f"fastmtl refuses the table of measured crossovers in {path}: {reason}. Results are right without it; see "
        "`fastmtl info`, and measure anew by `fastmtl tune`.",
        RuntimeWarning,
        stacklevel=2,
    )


def found() -> Found:
    """What `find` finds here, asked once in a process; refused tables are warned of."""
    global _found
    answer = _found
    if answer is None:
        with _lock:
            if _found is None:
                _found = find(this_processor())
            answer = _found
        # once it is known, without the lock: what shows warnings may call an op, or raise
        for path, reason in answer.refused:
            _warn(path, reason)
    return answer


def current() -> Table:
    """The table that the ops use."""
    if _given is not None:
        return _given
    return (_found or found()).table


@contextlib.contextmanager
def use_table(table: Table) -> Iterator[None]:
    """Another table for every op inside the `with` block, in all threads of this process."""
    global _given
    before, _given = _given, table
    try:
        yield
    finally:
        _given = before
