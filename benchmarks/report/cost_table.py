"""What the weights of each method cost, on every machine that suite `methods` ran on.

It stands, between its marks, in docs/methods/index.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastmtl.methods.names import METHODS

MARKS = ("<!-- cost:begin -->", "<!-- cost:end -->")
TASKS = (8, 64)


def times_of(results: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    """(method, number of tasks) -> what the time of its weights was, of the rows that were measured."""
    return {
        (row["op"], row["params"]["T"]): row["times"]["ours"]
        for row in results["rows"]
        if row["suite"] == "methods" and row["status"] == "ok" and row["case"] == f"{row['op']} T={row['params']['T']}"
        if row["params"]["T"] in TASKS and "plain" in row["times"]
    }


def table(runs: Sequence[dict[str, Any]], shown: Callable[[dict[str, Any]], str]) -> tuple[list[str], list[list[str]]]:
    """The header, and a line for each method with a cell for each run and number of tasks that it has.

    Args:
        runs: results with rows of suite `methods`.
        shown: a time as text.
    """
    found = [times_of(run) for run in runs]
    columns = [(k, T) for k, times in enumerate(found) for T in TASKS if any(count == T for _, count in times)]
    header = ["method", *(f"{runs[k]['machine']['device'].split(',')[0]}, T = {T}" for k, T in columns)]
    lines = [
        [f"`{of.__name__}`", *(shown(found[k][name, T]) if (name, T) in found[k] else "-" for k, T in columns)]
        for name, of in METHODS.items()
        if any(name == method for times in found for method, _ in times)
    ]
    return header, lines


def caption(runs: Sequence[dict[str, Any]]) -> str:
    when = "; ".join(f"{run['machine']['device']}, {run['suites']['methods']['date'][:10]}" for run in runs)
    return (
        f"Time of one call `method.weights(gram)` on a `[T, T]` matrix ({when}). On a CPU the caches are full of other "
        "data, on a GPU it is a replayed CUDA graph:"
    )
