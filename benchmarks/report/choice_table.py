"""The table by which a user chooses between `one_pass` and `GradientBank`, from the results of suite `step`.

It stands, between its marks, in docs/guides/one-pass.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastmtl.benchmarks.runner.registry import TASK_STEP

MARKS = ("<!-- choice:begin -->", "<!-- choice:end -->")
ONE_PASS, BANK = "ours", "per_task_bank"


def rows_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a results file that the table is made of: shuffled batches, with times of both and a plain step."""
    return [
        row
        for row in results["rows"]
        if row["op"] == TASK_STEP
        and row["status"] == "ok"
        and not row["params"]["sorted"]
        and all("median" in row["times"].get(label, {}) for label in (ONE_PASS, BANK, "sum"))
    ]


def _cell(row: dict[str, Any]) -> str:
    """Both times over a plain step's, the shorter one in bold."""
    plain = row["times"]["sum"]["median"]
    ours, bank = (row["times"][label]["median"] / plain for label in (ONE_PASS, BANK))
    shown = [f"{ours:.2f}", f"{bank:.2f}"]
    faster = 0 if ours <= bank else 1
    shown[faster] = f"**{shown[faster]}**"
    return " / ".join(shown)


def table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The header, and a line for each network with a cell for each number of tasks."""
    counts = sorted({row["params"]["T"] for row in rows})
    networks = dict.fromkeys((row["params"]["network"], row["params"]["batch"]) for row in rows)
    found = {(row["params"]["network"], row["params"]["T"]): _cell(row) for row in rows}
    lines = [
        [network, str(batch), *(found.get((network, count), "-") for count in counts)] for network, batch in networks
    ]
    return ["network", "batch", *(f"T={count}" for count in counts)], lines


def caption() -> str:
    return "A whole step over a plain step of the same network, `one_pass` / `GradientBank`, the faster one in bold:"
