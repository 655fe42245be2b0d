"""`make check` runs every op on the reference and on the CPU, and few cases of the rest."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from paths import ROOT

from fastmtl.core.schemas import PUBLIC_OPS


@pytest.fixture(scope="module")
def collected() -> list[str]:
    """The tests that `make check` runs."""
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    paths = re.search(r"^CHECKED = (.*)$", makefile, re.MULTILINE)[1].split()
    command = [sys.executable, "-m", "pytest", *paths, "--check", "--collect-only", "-q"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return [line for line in run.stdout.splitlines() if "::" in line]


def test_every_op_is_checked_on_each_backend(collected: list[str]) -> None:
    for name in PUBLIC_OPS:
        for backend in ("reference", "cpu"):
            wanted = re.compile(rf"test_op_equals_its_oracle\[{backend}-{name}-")
            assert any(wanted.search(test) for test in collected), f"{name} on {backend}"


def test_it_is_a_subset_that_trains_and_reads_the_docs(collected: list[str]) -> None:
    assert 300 < len(collected) < 2000
    for part in ("test_backward.py", "test_bank.py", "test_one_pass.py", "test_imports.py", "test_docs.py"):
        assert any(part in test for test in collected), part
