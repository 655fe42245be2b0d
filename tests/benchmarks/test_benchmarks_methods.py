"""Suite `methods`: checks that see mistakes, peers that are given what ours are, the tables and the plots."""

from __future__ import annotations

import importlib.util
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmtl import methods
from fastmtl.benchmarks.baselines import peer_methods
from fastmtl.benchmarks.report import plots, report
from fastmtl.benchmarks.runner.runner import Runner, Settings
from fastmtl.benchmarks.suites import methods as suite

CPU = torch.device("cpu")


def results_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    machine = {"device": "chip", "date": "2026-01-01", "commit": "c0", "uncommitted_changes": False}
    machine |= {"versions": {"torch": "2", "LibMTL": "1.1.5"}, "system": "s"}
    return {"slug": "chip", "machine": machine, "suites": report.suite_runs(rows, machine, {}), "rows": rows}


def test_tables_and_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runner = Runner(CPU, Settings(budget_s=0.02, longest_s=1.0, memory=False))
    cases = [suite.weights_case(name, t, CPU) for name in ("mgda", "upgrad") for t in (2, 8)]
    cases += [suite.call_case(name, 3, 500, CPU) for name in ("imtlg", "graddrop")]
    cases.append(suite.pass_case("trimmed_mean", 3, 500, CPU))
    rows = [runner.run_case(replace(case, budget_s=0.02)) for case in cases]
    assert [row["status"] for row in rows] == ["ok"] * 7, [row.get("error") for row in rows]
    results = results_of(rows)
    assert [path.name for path in plots.draw(results, tmp_path)] == ["chip-methods.png", "chip-calls.png"]
    section = report.section(results, "methods")
    assert "Weights of a `[T, T]` matrix" in section and "LibMTL 1.1.5" in section
    assert section.count("| mgda T=") == 2 and section.count("| graddrop(grads) T=3 P=0.0005M |") == 1
    assert [len(lines) for lines in report._by_table(rows).values()] == [4, 2, 1]


def test_the_page_says_how_far_a_peer_is_off_and_why_one_has_no_time() -> None:
    case = suite.weights_case("mgda", 8, CPU)
    row = Runner(CPU, Settings(memory=False)).run_case(replace(case, budget_s=0.02))
    row["check"]["others"] = {"torchjd": {"error": 0.0815, "tolerance": 1.0, "against": "ours"}}
    row["times"]["torchjd"] = {"median": 3 * row["times"]["ours"]["median"], "detail": "TorchJD: MGDA"}
    row["times"]["libmtl"] = {"failed": "ValueError: no", "detail": "LibMTL: MGDA, of a root"}
    row["speedup_over_best"] = {"torchjd": 3.0}
    cells = dict(zip(report.columns(row), report.cells(row), strict=True))
    assert (cells["vs TorchJD"], cells["TorchJD is off by"]) == ("3x", "8e-02")
    assert (cells["vs LibMTL"], cells["LibMTL is off by"]) == ("failed", "-")
    assert cells["in a row"] == report.seconds(row["times"]["again"]["median"])
    again = {**row, "case": "mgda T=9"}
    assert "\n\nLibMTL: MGDA ValueError: no (`mgda T=8`, `mgda T=9`).\n\n" in (
        report.section(results_of([row, again]), "methods") + "\n\n"
    )


@pytest.mark.parametrize("name", ["mgda", "cagrad", "upgrad", "dualproj", "krum", "pcgrad", "gradvac", "sdmgrad"])
def test_other_weights_are_seen(name: str) -> None:
    case = suite.weights_case(name, 8, CPU)
    problem = case.make(CPU)

    def shifted(x: suite.Problem) -> Tensor:
        return case.ours.call(x) * 1.001

    right, wrong = case.check(problem, case.ours.call), case.check(problem, shifted)
    assert right.error <= right.tolerance < wrong.error


@pytest.mark.parametrize("name", suite.OF_GRADIENTS)
def test_another_update_is_seen(name: str) -> None:
    case = suite.call_case(name, 5, 400, CPU)
    grads = case.make(CPU)
    assert case.check(grads, case.ours.call).passed
    wrong = [lambda x: 1.001 * case.ours.call(x), lambda x: case.ours.call(x.flip(1))]
    if name == "graddrop":  # sums of the right kind, but always the positive ones
        wrong.append(lambda x: x.clamp(min=0).sum(0))
    assert not any(case.check(grads, call).passed for call in wrong)


@pytest.mark.parametrize("name", suite.METHODS)
@pytest.mark.parametrize("label", ["torchjd", "libmtl"])
def test_a_peer_gives_what_ours_gives(name: str, label: str) -> None:
    """From their own draws and a fresh state; of the gradients and, where there are weights, of their Gram matrix."""
    num_tasks = 3 if name == "cagrad" else 6
    cases = [suite.call_case(name, num_tasks, 400, CPU)] if name in suite.OF_GRADIENTS else []
    cases += [suite.weights_case(name, num_tasks, CPU)] if name in suite.OF_GRAM else []
    found = []
    for case in cases:
        inputs = case.make(CPU)
        for candidate in case.candidates:
            if candidate.label == label and candidate.unavailable is None:
                candidate.call(inputs)  # what it keeps must not matter
                check = case.verify(inputs, candidate)
                assert check.passed, check
                found.append(candidate)
                if name not in peer_methods.ROUGH and name != "graddrop":
                    wrong = replace(candidate, call=lambda x, call=candidate.call: 1.05 * call(x))
                    assert not case.verify(inputs, wrong).passed
    if not found:
        pytest.skip("not installed, or it has no such method")


def test_libmtl_is_loaded_without_its_package() -> None:
    if peer_methods.libmtl_missing():
        pytest.skip("LibMTL is not installed")
    peer = peer_methods.libmtl("pcgrad", 4, CPU)
    assert peer is not None and peer.update is not None and peer.unavailable is None
    assert "LibMTL" not in sys.modules
    assert importlib.util.find_spec("LibMTL") is not None
    assert peer_methods.libmtl("cagrad", 4, CPU).unavailable == "is written for three tasks"
    assert peer_methods.libmtl("nashmtl", 4, CPU) is None


def test_the_order_is_the_one_that_libmtl_draws() -> None:
    """`random.shuffle`, task after task, of all tasks or of the others."""
    for name in ("pcgrad", "gradvac"):
        random.seed(5)
        expected = []
        for i in range(4):
            row = list(range(4))
            if name == "gradvac":
                row.remove(i)
            random.shuffle(row)
            expected.append(row if name == "pcgrad" else [*row, i])
        assert peer_methods.libmtl_orders(name, 4, 5).tolist() == expected


def test_every_method_with_weights_or_a_call_is_in_the_suite() -> None:
    have = {type(make()) for make in suite.METHODS.values()}
    # means and sums; no call of gradients alone; another method inside
    left = {
        methods.Sum,
        methods.Mean,
        methods.RandomWeights,
        methods.Every,
        methods.CRMOGM,
        methods.MoDo,
        methods.ParetoMTL,
    }
    left |= {methods.DBMTL, methods.MoCo, methods.ExcessMTL}
    all_of_them = {
        kind for kind in vars(methods).values() if isinstance(kind, type) and issubclass(kind, methods.Method)
    }
    assert all_of_them - {methods.Method} == have | left
