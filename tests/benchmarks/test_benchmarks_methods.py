"""Suite `methods`: checks that see mistakes, the table and the plot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastmtl.benchmarks.report import plots, report
from fastmtl.benchmarks.runner.runner import Runner, Settings
from fastmtl.benchmarks.suites import methods as suite

CPU = torch.device("cpu")


def test_table_and_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runner = Runner(CPU, Settings(budget_s=0.02, longest_s=1.0, memory=False))
    cases = [suite.methods_case(name, t, CPU) for name in ("mgda", "upgrad") for t in (2, 8)]
    cases.append(suite.pass_case("trimmed_mean", 3, 500))
    rows = [runner.run_case(case) for case in cases]
    assert [row["status"] for row in rows] == ["ok"] * 5
    machine = {"device": "chip", "date": "2026-01-01", "commit": "c0", "uncommitted_changes": False}
    machine |= {"versions": {"torch": "2"}, "system": "s"}
    results = {"slug": "chip", "machine": machine, "suites": report.suite_runs(rows, machine, {}), "rows": rows}
    assert [path.name for path in plots.draw(results, tmp_path)] == ["chip-methods.png"]
    section = report.section(results, "methods")
    assert "Weights of a `[T, T]` matrix" in section
    assert section.count("| mgda T=") == 2


@pytest.mark.parametrize("name", ["mgda", "cagrad", "upgrad", "dualproj", "krum"])
def test_other_weights_are_seen(name: str) -> None:
    case = suite.methods_case(name, 8, CPU)
    gram = case.make(CPU)

    def shifted(m: Tensor) -> Tensor:
        return case.candidates[0].call(m) * 1.001

    assert case.check is not None
    right, wrong = case.check(gram, case.candidates[0].call), case.check(gram, shifted)
    assert right.error <= right.tolerance < wrong.error
