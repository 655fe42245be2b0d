"""The table of what weights that are reused for k steps (`fastmtl.methods.Every`) cost in accuracy, from the results.

It stands in the page of suite `step` and, between its marks, in docs/guides/training-loops.md.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from fastmtl.benchmarks.runner.registry import REUSE_ACCURACY

MARKS = ("<!-- reuse:begin -->", "<!-- reuse:end -->")
SUM = "plain sum"


def rows_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a results file that the table is made of."""
    return [row for row in results["rows"] if row["op"] == REUSE_ACCURACY and row["status"] == "ok"]


def label_of(method: str, every: int) -> str:
    return method if every == 1 else f"`Every({method}(), {every})`"


def passes_per_step(num_tasks: int, every: int) -> str:
    return f"{(num_tasks + every - 1) / every:.4g}"


def _shares(by_seed: Sequence[dict[str, float]]) -> list[str]:
    """For each task the mean over the seeds and their standard deviation."""
    shown = []
    for task in by_seed[0]:
        shares = [100 * accuracy[task] for accuracy in by_seed]
        shown.append(f"{statistics.mean(shares):.1f} ± {statistics.stdev(shares):.1f}%")
    return shown


def table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The header and a line for each method and number of steps between two solutions, the plain sum last."""
    tasks = list(rows[0]["extra"]["by_seed"]["sum"][0])
    lines = []
    for row in rows:
        params, extra = row["params"], row["extra"]
        for label, every in sorted(extra["every"].items(), key=lambda item: item[1]):
            passes = passes_per_step(params["T"], every)
            lines.append([label_of(params["method"], every), passes, *_shares(extra["by_seed"][label])])
    # the sum is trained beside each method, in the same way
    return ["method", "passes per step", *tasks], [*lines, [SUM, "1", *_shares(rows[0]["extra"]["by_seed"]["sum"])]]


def caption(rows: Sequence[dict[str, Any]]) -> str:
    params = rows[0]["params"]
    return (
        f"The digits network (widths {', '.join(map(str, params['widths']))}, {params['depth']} block each; batch "
        f"{params['batch']}, Adam), {params['steps']} steps from each of {params['seeds']} seeds. Accuracy on pictures "
        "of digits that were not trained on, mean and standard deviation over the seeds:"
    )
