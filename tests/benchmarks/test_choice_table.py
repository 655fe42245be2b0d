"""The table of `one_pass` beside `GradientBank`: every row of a batch in no order, and the faster one in bold."""

from __future__ import annotations

from typing import Any

from fastmtl.benchmarks.report import choice_table
from fastmtl.benchmarks.runner.registry import TASK_STEP


def _row(num_tasks: int, ours: float, bank: float | None, **changes: Any) -> dict[str, Any]:
    times = {"ours": {"median": ours}, "sum": {"median": 2.0}}
    times["per_task_bank"] = {"skipped": "long"} if bank is None else {"median": bank}
    params = {"T": num_tasks, "network": "net", "batch": 8, "sorted": False}
    return {"op": TASK_STEP, "status": "ok", "params": params, "times": times} | changes


def test_cells() -> None:
    other = {"T": 16, "network": "other", "batch": 9, "sorted": False}
    rows = [
        _row(2, 3.0, 2.5),
        _row(16, 3.0, 5.0),
        _row(16, 2.2, 2.2, params=other),
        _row(4, 1.0, None),
        _row(4, 1.0, 9.0, status="error"),
        _row(4, 1.0, 9.0, op="another"),
        _row(4, 1.0, 9.0, params=other | {"sorted": True}),
    ]
    header, lines = choice_table.table(choice_table.rows_of({"rows": rows}))
    assert header == ["network", "batch", "T=2", "T=16"]
    assert lines == [
        ["net", "8", "1.50 / **1.25**", "**1.50** / 2.50"],
        ["other", "9", "-", "**1.10** / 1.10"],
    ]
