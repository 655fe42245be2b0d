"""The table of docs/guides/training-loops.md: every way is compared before it is timed, and the section is replaced."""

from __future__ import annotations

import pytest
import torch
from paths import ROOT

import fastmtl
from fastmtl.benchmarks.report import passes_table as passes

DOCUMENT = ROOT / "docs/guides/training-loops.md"


def small() -> passes.Case:
    return passes.perceptron(4, 8, 4)


def test_rows_of_one_network():
    rows = passes.rows("small", small, budget_s=0.0)
    assert [row[1] for row in rows] == ["one at a time", "plain sum", "`features=`", "`chunk_size=2`", "`chunk_size=4`"]
    assert all(len(row) == len(passes.HEADER) for row in rows)
    assert rows[0][3] == "1.00x" and rows[1][4] == "1.00x"


@pytest.mark.parametrize("wrong", ["features", "chunk_size"])
def test_a_wrong_gradient_is_not_timed(wrong, monkeypatch):
    usual = fastmtl.backward

    def backward(losses, **arguments):
        surgery = usual(losses, **arguments)
        if arguments.get(wrong) is not None:
            network[0][0].weight.grad.mul_(1.001)
        return surgery

    torch.manual_seed(0)
    network, forward = small()
    passes.compare(network, passes.samplers_of(network, forward))
    monkeypatch.setattr(fastmtl, "backward", backward)
    with pytest.raises(RuntimeError, match=f"{wrong}=.*away from that of T passes"):
        passes.compare(network, passes.samplers_of(network, forward))


def test_agreement_is_about_pairs_of_tasks():
    line = passes.agreement(2, batch=4)
    assert "Over 2 training steps" in line and "nan" not in line


def test_the_section_is_replaced(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{passes.BEGIN}\nold\n{passes.END}\nafter\n")
    passes.write(page, "new")
    assert page.read_text() == f"before\n{passes.BEGIN}\n\nnew\n\n{passes.END}\nafter\n"
    for text in ("none", f"{passes.END}{passes.BEGIN}", f"{passes.BEGIN}{passes.BEGIN}{passes.END}"):
        page.write_text(text)
        with pytest.raises(ValueError, match="expected one"):
            passes.write(page, "new")
        assert page.read_text() == text


def test_the_document_has_every_network():
    section = DOCUMENT.read_text().partition(passes.BEGIN)[2].partition(passes.END)[0]
    assert all(section.count(f"| {name} |") == 5 for name in passes.CASES)
    assert "Over 200 training steps" in section
