"""The examples run, with few steps."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
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


def test_domains_stops_where_the_two_ways_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    domains = load("domains")
    usual = domains.loop_over_domains
    # the loop with the domains of its neighbours
    monkeypatch.setattr(domains, "loop_over_domains", lambda p, m, x, t: usual(p, m, x, (t + 1) % len(domains.DOMAINS)))
    with pytest.raises(SystemExit, match=r"step 1: gradients \S+ apart|step 2: \w+ \S+ apart"):
        run(domains, monkeypatch, "--quick", "--steps", "2", "--batch-size", "24")
