"""The examples run, with few steps."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import skip_or_fail
from paths import ROOT

import fastmtl

EXAMPLES = ROOT / "examples"
pytest.importorskip("sklearn")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    module.main()


@pytest.mark.parametrize("method", ["sum", "pcgrad"])
def test_digits(method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(load("digits"), monkeypatch, "--steps", "2", "--batch-size", "8", "--method", method)
    out = capsys.readouterr().out
    assert re.search(r"step 2: left [\d.]+%, right [\d.]+%, parity [\d.]+%, sum [\d.]+%", out)
    assert ("surgery/" in out) == (method == "pcgrad")


def test_domains(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    domains = load("domains")
    run(domains, monkeypatch, "--quick", "--steps", "3", "--batch-size", "24")
    out = capsys.readouterr().out
    losses = re.findall(r"step \d+/3: loss fastmtl ([\d.]+), loop ([\d.]+)", out)
    assert len(losses) == 3 and all(float(a) == pytest.approx(float(b), rel=1e-5) for a, b in losses)
    assert losses[0] != losses[1], "nothing was learned"
    shares = re.findall(r"^  (fastmtl|loop) +((?:[\d.]+% *){8})$", out, re.MULTILINE)
    assert [way for way, _ in shares] == ["loop", "fastmtl"]
    assert re.search(r"largest relative difference: loss \S+, gradients \S+", out)
    assert float(re.search(r"merged networks, .* at most (\S+) apart", out)[1]) < 1e-4
    assert re.search(r"^turned +10 of 10 ", out, re.MULTILINE)


def test_domains_stops_where_the_two_ways_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    domains = load("domains")
    usual = domains.loop_over_domains
    # the loop with the domains of its neighbours
    monkeypatch.setattr(domains, "loop_over_domains", lambda p, m, x, t: usual(p, m, x, (t + 1) % len(domains.DOMAINS)))
    with pytest.raises(SystemExit, match=r"step 1: gradients \S+ apart|step 2: \w+ \S+ apart"):
        run(domains, monkeypatch, "--quick", "--steps", "2", "--batch-size", "24")


def start(name: str, *arguments: str, needs: str, cwd: Path | None = None) -> str:
    """What the example prints, run as a user runs it: these libraries leave settings behind in the process."""
    if importlib.util.find_spec(needs) is None:
        skip_or_fail(f"{needs} is not installed (pip install 'torch-fastmtl[examples]')")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def shares(out: str) -> dict[str, float]:
    """Held-out accuracy by task, in percent."""
    (line,) = re.findall("^held out: (.*)$", out, re.MULTILINE)
    return {task: float(share) for task, share in re.findall(r"(\w+) ([\d.]+)%", line)}


LEARNED = {"digit": 80, "odd": 85, "large": 80, "loop": 85}  # a guess gets 10, 50, 50 and 60


@pytest.mark.parametrize("precision", ["32-true", pytest.param("bf16-mixed", marks=pytest.mark.slow)])
def test_lightning_loop(precision: str, tmp_path: Path) -> None:
    out = start("lightning_loop", "--steps", "40", "--precision", precision, needs="lightning", cwd=tmp_path)
    assert re.search(r"^step 40: surgery/weight digit [\d.]+, odd [\d.]+, large [\d.]+, loop [\d.]+$", out, re.M)
    right = shares(out)
    assert all(right[task] > least for task, least in LEARNED.items()), right


@pytest.mark.parametrize(
    "how",
    [
        ("--accumulate", "2", "--mixed-precision", "bf16"),
        pytest.param(("--accumulate", "1"), marks=pytest.mark.slow),
        pytest.param(("--accumulate", "2", "--mixed-precision", "fp16"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_accelerate_loop(how: tuple[str, ...]) -> None:
    out = start("accelerate_loop", "--steps", "40", "--batch-size", "48", *how, needs="accelerate")
    assert re.search(r"^step 40: loss digit [\d.]+, .*; \d of 6 pairs of tasks in conflict$", out, re.M)
    right = shares(out)
    assert all(right[task] > least for task, least in LEARNED.items()), right


def test_transformers_one_pass() -> None:
    out = start("transformers_one_pass", "--steps", "3", "--batch-size", "16", needs="transformers")
    for kind in ("vit", "bert"):
        losses = re.findall(rf"^{kind} step \d/3: loss ([\d.]+), \d of 6 pairs", out, re.M)
        assert len(losses) == 3 and len(set(losses)) == 3, "nothing was learned"
        (off,) = re.findall(rf"^{kind}: .* rows at most (\S+) apart, updates (\S+)$", out, re.M)
        assert max(map(float, off)) < 1e-5


def test_transformers_one_pass_stops_where_the_two_ways_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    example = load("transformers_one_pass")
    usual = fastmtl.one_pass
    # the bank of other tasks
    monkeypatch.setattr(fastmtl, "one_pass", lambda model, ids, names: usual(model, (ids + 1) % 4, names))
    with pytest.raises(SystemExit, match="vit, step 1: the two ways are apart"):
        run(example, monkeypatch, "--steps", "1", "--batch-size", "8", "--model", "vit")


def test_monitor(tmp_path: Path) -> None:
    out = start("monitor", "--steps", "25", "--every", "10", "--out", str(tmp_path), needs="tensorboard")
    assert re.search(r"^conflict rate at step 25: digit-odd [\d.]+, .*large-loop [\d.]+$", out, re.M)
    from matplotlib.image import imread
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert imread(tmp_path / "monitor.png").std() > 0.05, "an empty plot"
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = events.Tags()["scalars"]
    assert len(tags) == 4 + 4 + 6 + 6 and events.Tags()["images"] == ["monitor"]
    for tag in tags:
        scalars = events.Scalars(tag)
        assert [scalar.step for scalar in scalars] == [10, 20, 25]
        values = [scalar.value for scalar in scalars]
        low, high = {"cosine": (-1, 1), "conflict rate": (0, 1)}.get(tag.partition("/")[0], (1e-6, 100))
        assert all(low <= value <= high for value in values), tag
        # a conflict in some of the steps and not in others is what a rate is for
        assert not tag.startswith("conflict") or all(abs(v * 10 - round(v * 10)) < 1e-5 for v in values[:2])


def test_monitor_with_a_method_that_has_state(tmp_path: Path) -> None:
    start("monitor", "--steps", "12", "--momentum", "0.9", "--out", str(tmp_path), needs="tensorboard")
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["method"]
    assert saved["average"]["names"] == ["digit", "odd", "large", "loop"]
    method = fastmtl.methods.CRMOGM(fastmtl.methods.PCGrad(), 0.9)
    method.load_state_dict(saved)
    average = saved["average"]["average"]
    seen = fastmtl.methods.Seen(saved["average"]["names"], [True] * 4)
    torch.testing.assert_close(method.weigh(torch.eye(4), seen), 0.9 * average + 0.1)


def test_monitor_of_a_method_without_weights(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    monitor = load("monitor").Monitor(["a", "b"], 2, tmp_path)
    gram = torch.tensor([[4.0, -2.0], [-2.0, 1.0]])
    monitor.add(fastmtl.Surgery(gram, None, ["a", "b"], [True, True], torch.tensor(1.0)))
    monitor.close()
    assert monitor.history == {
        "step": [1],
        "norm/a": [2],
        "norm/b": [1],
        "cosine/a-b": [-1],
        "conflict rate/a-b": [1],
    }


def test_monitor_of_reused_weights(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    monitor = load("monitor").Monitor(["a", "b"], 2, tmp_path)
    w = torch.ones(2, requires_grad=True)
    method = fastmtl.methods.Every(fastmtl.methods.Sum(), 2)
    for _ in range(3):
        monitor.add(fastmtl.backward({"a": w[0] + w[1], "b": 2 * w[0] - w[1]}, [w], method=method))
    monitor.close()
    assert monitor.history["step"] == [3] and monitor.history["weight/a"] == [1]


def test_monitor_means(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    monitor = load("monitor").Monitor(["a", "b"], 2, tmp_path)
    for gram in ([[4.0, -2.0], [-2.0, 1.0]], [[16.0, 0.0], [0.0, 9.0]], [[1.0, 1.0], [1.0, 1.0]]):
        monitor.add(fastmtl.Surgery(torch.tensor(gram), torch.tensor([1.0, gram[0][0]]), ["a", "b"], [True, True]))
    monitor.close()
    assert monitor.history == {
        "step": [2, 3],
        "weight/a": [1, 1],
        "weight/b": [10, 1],
        "norm/a": [3, 1],
        "norm/b": [2, 1],
        "cosine/a-b": [-0.5, 1],
        "conflict rate/a-b": [0.5, 0],
    }
