"""examples/start.ipynb runs, draws what it shows, and is committed with its output."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from paths import ROOT

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed (it comes with nbclient)")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")
pytest.importorskip("sklearn")

NOTEBOOK = ROOT / "examples" / "start.ipynb"


def printed(notebook: object) -> str:
    return "".join(o.text for c in notebook.cells for o in c.get("outputs", ()) if o.output_type == "stream")


def pictures(notebook: object) -> int:
    return sum("image/png" in o.get("data", {}) for c in notebook.cells for o in c.get("outputs", ()))


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    committed = nbformat.read(NOTEBOOK, as_version=4)
    found = nbformat.read(NOTEBOOK, as_version=4)
    for cell in found.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbclient.NotebookClient(
        found, timeout=900, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    assert pictures(found) == pictures(committed) >= 4
    for notebook in (found, committed):
        right = [float(x) for x in re.findall(r"digit ([\d.]+)%", printed(notebook))]
        assert len(right) == 2 and min(right) > 80, "nothing was learned"
        (off,) = re.findall(r"merged network differs by at most (\S+)", printed(notebook))
        assert float(off) < 1e-4
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "committed as it was run"
