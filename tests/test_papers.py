"""The experiments of `examples/papers`: their quick versions show what the claims say, and the page is up to date."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from paths import ROOT

PAPERS = ROOT / "examples" / "papers"
SHARED = ("experiment", "data", "networks", "two_digits", "report")
NAMES = sorted(path.stem for path in PAPERS.glob("*.py") if path.stem not in SHARED)
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


@pytest.fixture
def papers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PAPERS))


@pytest.mark.parametrize("name", NAMES)
def test_quick(name: str, papers: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = importlib.import_module(name).EXPERIMENT
    records = importlib.import_module("experiment").main(
        experiment, ["--quick", "--out", str(tmp_path), "--processes", "1"]
    )
    out = capsys.readouterr().out
    assert records and f"case {len(records)}/{len(records)}" in out
    assert (tmp_path / f"{name}-quick.png").stat().st_size > 5000
    claims = [claim for claim in experiment.claims(records) if claim.stable]
    assert claims, "no direction that a test can hold"
    assert not [claim.text for claim in claims if not claim.holds]


@pytest.mark.parametrize("name", NAMES)
def test_committed_records(name: str, papers: None) -> None:
    """Every case of the full run is there, and the page shows them."""
    experiment = importlib.import_module(name).EXPERIMENT
    report = importlib.import_module("report")
    _, records = importlib.import_module("experiment").read(report.RESULTS / f"{name}.json")
    found = [record.settings for record in records]
    assert all(settings in found for settings in experiment.cases(experiment.seeds, False))
    assert name in report.NAMES
    assert report.section(name) in (ROOT / "docs/papers/reproductions.md").read_text(), (
        "python examples/papers/report.py"
    )
    assert (ROOT / "docs" / report.PICTURES / f"{name}.png").exists()


@pytest.mark.parametrize("name", NAMES)
def test_page_of_papers(name: str) -> None:
    assert f"`examples/papers/{name}.py`" in (ROOT / "docs/papers/index.md").read_text()


TRIAL = """
import sys, time
sys.path.insert(0, {papers!r})
from experiment import Claim, Experiment, Table, main

def run(number, seed):
    if number == {slow}:
        time.sleep(600)
    return {{"square": number**2}}

EXPERIMENT = Experiment(
    title="Squares", paper="", claim="", reading="",
    cases=lambda seeds, quick: [{{"number": n, "seed": s}} for n in range(3) for s in range(seeds)],
    run=run,
    table=lambda records: Table(["square"], [[str(r.result["square"])] for r in records]),
    draw=lambda records, figure: figure.subplots().plot([r.result["square"] for r in records]),
    claims=lambda records: [Claim("the last is the largest", records[-1].result["square"] == 4)],
)
if __name__ == "__main__":
    main(EXPERIMENT)
"""


def trial(folder: Path, slow: int = -1) -> list[str]:
    """A script with three cases, of which one may take forever."""
    path = folder / "squares.py"
    path.write_text(TRIAL.format(papers=str(PAPERS), slow=slow))
    return [sys.executable, str(path), "--seeds", "1", "--out", str(folder / "out")]


@pytest.mark.parametrize("processes", ["1", "2"])
def test_interrupted_and_gone_on(processes: str, tmp_path: Path) -> None:
    command = [*trial(tmp_path, slow=2), "--processes", processes]
    records = tmp_path / "out" / "squares.json"
    started = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    until = time.monotonic() + 120
    while time.monotonic() < until and not (records.exists() and len(json.loads(records.read_text())["records"]) == 2):
        time.sleep(0.1)
    started.send_signal(signal.SIGINT)
    assert "2 of 3 cases are kept" in started.communicate(timeout=60)[1]
    assert started.returncode == 130
    # the script is the same but for the case that was not finished, so the digest is told to be the same
    content = json.loads(records.read_text())
    trial(tmp_path)
    content["digest"] = digest(tmp_path)
    records.write_text(json.dumps(content))
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "2 of 3 cases are in" in done.stdout and "case 3/3" in done.stdout and "holds: the last" in done.stdout
    assert (tmp_path / "out" / "squares.png").exists()


def digest(folder: Path) -> str:
    code = "import squares; print(squares.EXPERIMENT.digest())"
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment).stdout.strip()


def test_bad_options(tmp_path: Path) -> None:
    command = trial(tmp_path)
    (tmp_path / "file").touch()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "squares.json").write_text("{")
    for arguments, message in (
        (["--seeds", "0"], "must be 1 or more, got 0"),
        (["--seeds", "x"], "invalid"),
        (["--seed", "3"], "unrecognized arguments: --seed"),
        (["--out", str(tmp_path / "file" / "below")], "cannot write into"),
        (["--out", str(damaged)], "--fresh starts anew"),
        (["--processes", "0"], "must be 1 or more, got 0"),
    ):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and message in done.stderr, (arguments, done.stderr)
        assert "case 1" not in done.stdout
    done = subprocess.run([*command, "--out", str(damaged), "--fresh"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "case 3/3" in done.stdout


def test_fresh_replaces_the_cases_that_are_asked_for(tmp_path: Path) -> None:
    command = trial(tmp_path)
    command[command.index("--seeds") + 1] = "2"
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == 0
    path = tmp_path / "out" / "squares.json"
    content = json.loads(path.read_text())
    for record in content["records"]:
        record["result"]["square"] = 7
    path.write_text(json.dumps(content))
    command[command.index("--seeds") + 1] = "1"
    assert subprocess.run([*command, "--fresh"], capture_output=True, timeout=120).returncode == 0
    found = {
        (r["settings"]["number"], r["settings"]["seed"]): r["result"]["square"]
        for r in json.loads(path.read_text())["records"]
    }
    assert found == {(0, 0): 0, (1, 0): 1, (2, 0): 4, (0, 1): 7, (1, 1): 7, (2, 1): 7}


def test_two_runs_at_once_and_workers_without_a_parent(tmp_path: Path) -> None:
    command = [*trial(tmp_path, slow=2), "--processes", "2"]
    records = tmp_path / "out" / "squares.json"
    started = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while time.monotonic() < until and not (records.exists() and len(json.loads(records.read_text())["records"]) == 2):
        time.sleep(0.1)
    second = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert second.returncode == 2 and "another run of this command" in second.stderr
    started.kill()
    started.communicate(timeout=60)  # the pipe is closed when the last worker has ended


def test_records_of_another_version(tmp_path: Path) -> None:
    command = trial(tmp_path)
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == 0
    trial(tmp_path, slow=7)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "another version of this script" in done.stderr
