"""The accuracy of reused weights: equal steps from equal starts, checks that see mistakes, every line of the table."""

from __future__ import annotations

import json
from functools import partial, partialmethod

import pytest
import torch
from paths import ROOT

from fastmtl import methods

pytest.importorskip("sklearn")

from fastmtl.benchmarks.report import report, reuse_table
from fastmtl.benchmarks.runner.runner import Runner, Settings
from fastmtl.benchmarks.suites import step, step_accuracy
from fastmtl.benchmarks.workloads import digits

CPU = torch.device("cpu")
WIDTHS = (8, 8)
LABELS = [reuse_table.label_of(name, every) for name in step_accuracy.METHODS for every in (1, 4, 16)]


@pytest.fixture(scope="module")
def results(small) -> dict:
    """Of trainings of one step from two seeds."""
    runner = Runner(CPU, Settings(memory=False))
    cases = [step_accuracy.accuracy_case(name, 1, 2, WIDTHS) for name in step_accuracy.METHODS]
    rows = json.loads(json.dumps([runner.run_case(case) for case in cases]))
    assert [row["status"] for row in rows] == ["ok", "ok"], rows
    machine = {"device": "chip", "date": "2026-01-01", "commit": "c0", "uncommitted_changes": False}
    machine |= {"versions": {"torch": "2"}, "system": "s"}
    return {"slug": "chip", "machine": machine, "suites": report.suite_runs(rows, machine, {}), "rows": rows}


@pytest.fixture(scope="module")
def small():
    """Small batches and few pictures: a step of the whole size tells no more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_accuracy, "BATCH", 8)
        patch.setattr(digits.Pictures, "held_out", partialmethod(digits.Pictures.held_out, size=100))
        yield patch


def test_the_page_has_a_line_for_each_method_and_its_seeds(results):
    page = report.section(results, "step")
    lines = [line for line in page.splitlines() if "±" in line]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines] == [*LABELS, reuse_table.SUM]
    assert all(line.count("±") == len(digits.TASKS) for line in lines)
    assert [line.split(" | ")[1] for line in lines[:3]] == ["4", "1.75", "1.188"]
    # one step: every k starts at one point and sees one batch, and the first step is no reuse
    assert lines[0].split(" | ")[2:] == lines[1].split(" | ")[2:] == lines[2].split(" | ")[2:]
    assert all(len(found) == 2 for row in results["rows"] for found in row["extra"]["by_seed"].values())
    assert "1 steps from each of 2 seeds" in page
    assert page.count("| digits, accuracy with ") == 2


def test_the_document_shows_the_newest_that_was_measured(results, tmp_path, monkeypatch):
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    (tmp_path / "docs/guides").mkdir(parents=True)
    (tmp_path / "benchmarks/results/chip.json").write_text(json.dumps(results | {"schema": 2}))
    (tmp_path / "README.md").write_text(f"{report.BEGIN}{report.END}")
    first, last = reuse_table.MARKS
    (tmp_path / "docs/guides/training-loops.md").write_text(f"before\n{first}\nold\n{last}\nafter\n")
    monkeypatch.setattr(report, "README_CASES", {})
    text = report.texts(tmp_path)[tmp_path / "docs/guides/training-loops.md"]
    assert text.startswith("before\n") and text.endswith(f"{last}\nafter\n") and "old" not in text
    assert text.count("±") == (len(LABELS) + 1) * len(digits.TASKS) and "Measured on chip, 2026-01-01" in text


def test_mean_and_deviation():
    assert reuse_table._shares([{"a": 0.5, "b": 0.1}, {"a": 0.7, "b": 0.1}]) == ["60.0 ± 14.1%", "10.0 ± 0.0%"]


def test_a_training_reuses_weights(small):
    asked = []

    class Counted(methods.Sum):
        def _weights(self, gram, present):
            asked.append(gram)
            return super()._weights(gram, present)

    case = step_accuracy.accuracy_case("PCGrad", 5, 2, WIDTHS)
    reused, plain = (case.make(CPU).next("a") for _ in range(2))
    step_accuracy.reusing(Counted, 3, reused)
    assert len(asked) == 2
    step_accuracy.plain_sum(plain)
    for p, q in zip(reused.network.parameters(), plain.network.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_the_check_refuses_other_trainings(small):
    case = step_accuracy.accuracy_case("MGDA", 3, 2, WIDTHS)
    trainings = case.make(CPU)
    assert case.check(trainings, case.ours.call).passed
    for call in (
        partial(step_accuracy.reusing, methods.MGDA, 1),
        partial(step_accuracy.reusing, methods.CAGrad, 16),
        step_accuracy.plain_sum,
    ):
        assert not case.check(trainings, call).passed


def test_seeds_differ_and_methods_start_alike(small):
    trainings = step_accuracy.accuracy_case("PCGrad", 1, 2, WIDTHS).make(CPU)
    ends = []
    for label in ("a", "a", "b"):
        training = trainings.next(label)
        step_accuracy.plain_sum(training)
        ends.append(torch.cat([p.detach().flatten() for p in training.network.parameters()]))
    assert torch.equal(ends[0], ends[2]) and not torch.equal(ends[0], ends[1])


def test_the_suite_has_the_time_and_the_accuracy_for_each_k():
    names = [case.name for case in step.cases(CPU) if "accuracy" in case.name or "weights at" in case.name]
    assert names == [
        *(f"digits, 16 steps, weights at every {k}" for k in ("step", "4th", "16th")),
        *(f"digits, accuracy with {name}" for name in step_accuracy.METHODS),
    ]


def test_the_document_has_every_row():
    text = (ROOT / "docs/guides/training-loops.md").read_text()
    section = text.partition(reuse_table.MARKS[0])[2].partition(reuse_table.MARKS[1])[0]
    for label in (*LABELS, reuse_table.SUM):
        assert f"| {label} |" in section
    steps, seeds = step_accuracy.STEPS, step_accuracy.SEEDS
    assert f"{steps} steps from each of {seeds} seeds" in section.replace("\n", " ")
