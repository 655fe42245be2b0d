"""The table of docs/training-loops.md on reused weights: equal steps from equal starts, and every row is there."""

from __future__ import annotations

import pytest
import torch
from paths import ROOT

from fastmtl import methods

pytest.importorskip("sklearn")

from fastmtl.benchmarks.report import reuse_table as reuse
from fastmtl.benchmarks.workloads import digits

DOCUMENT = ROOT / "docs" / "training-loops.md"
WIDTHS = (8, 8)
LABELS = [*(reuse.label_of(name, every) for name in reuse.INNER for every in reuse.EVERY), reuse.SUM]


def test_the_section_has_a_row_for_each_method():
    told: list[str] = []
    lines = reuse.section(2, 1, WIDTHS, told.append).splitlines()
    assert told == LABELS
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")][2:] == LABELS
    assert all(line.count("±") == len(digits.TASKS) for line in lines if line.startswith("| ") and "±" in line)
    # one step: every method starts at one point and sees one batch, and the first step is no reuse
    assert lines[-7].split(" | ")[2:] == lines[-6].split(" | ")[2:] == lines[-5].split(" | ")[2:]


def test_passes_per_step():
    assert [reuse.passes_per_step(every) for every in reuse.EVERY] == ["4", "1.75", "1.188"]


def test_a_training_reuses_weights():
    asked = []

    class Counted(methods.Sum):
        def _weights(self, gram, present):
            asked.append(gram)
            return super()._weights(gram, present)

    network = reuse.train(methods.Every(Counted(), 3), 0, 5, WIDTHS)
    assert len(asked) == 2
    plain = reuse.train(None, 0, 5, WIDTHS)
    for p, q in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_the_document_has_every_row():
    section = DOCUMENT.read_text().partition(reuse.MARKS[0])[2].partition(reuse.MARKS[1])[0]
    for label in LABELS:
        assert f"| {label} |" in section
    assert f"{reuse.STEPS} steps from each of {reuse.SEEDS} seeds" in section.replace("\n", " ")
