"""The script of a first GPU run: that it starts where it should, and names its parts."""

from __future__ import annotations

import subprocess

from paths import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu" / "gpu_check.sh"


def test_it_runs_from_the_root() -> None:
    (line,) = [line for line in SCRIPT.read_text().splitlines() if line.startswith("cd ")]
    run = subprocess.run(["bash", "-c", f"{line} && pwd -P", SCRIPT], capture_output=True, text=True, cwd="/")
    assert run.stdout.strip() == str(ROOT), run.stderr


def test_an_unknown_part_is_refused() -> None:
    run = subprocess.run(["bash", SCRIPT, "everything"], capture_output=True, text=True)
    assert run.returncode == 2
    assert "no part everything; the parts: smoke surgery" in run.stdout
