"""Both sides of the diffs in docs/migration train the same; of peers that are no package, the new side alone."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import types
from typing import Any

import pytest
import torch
from paths import ROOT
from torch import nn

import fastmtl

PAGES = ROOT / "docs/migration"
# page -> the package of its old side; None: there is none to install
PEERS = {"torchjd": "torchjd", "libmtl": "LibMTL", "pytorch-pcgrad": None, "peft": "peft", "taps": None}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (PAGES / f"{page}.md").read_text(), re.MULTILINE | re.DOTALL)


def side(diff: str, sign: str) -> str:
    """The old ("-") or the new ("+") text of a diff."""
    return "".join(line[1:] + "\n" for line in diff.splitlines() if line[:1] in (" ", sign))


def run(code: str, names: dict[str, Any]) -> dict[str, Any]:
    exec(compile(code, "page", "exec"), names)
    return names


def begin() -> dict[str, Any]:
    """The set-up of the training loops, with the same numbers each time; without dropout, whose masks come out of the
    generator that PCGrad's orders come out of."""
    torch.manual_seed(3)
    page = (ROOT / "docs/guides/training-loops.md").read_text()
    names = run(page.split("```python\n")[1].split("```")[0], {})
    for module in names["trunk"]:
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return names


def need(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if package == "LibMTL":
        # its networks want torchvision, and none of them is used here
        monkeypatch.setitem(sys.modules, "LibMTL.model", types.ModuleType("LibMTL.model"))
        # it counts on gradients that are zeros after `zero_grad`, as they were before torch 2.0
        architecture = importlib.import_module("LibMTL.architecture").HPS
        monkeypatch.setattr(
            architecture, "zero_grad_share_params", lambda self: self.encoder.zero_grad(set_to_none=False)
        )


def trained(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach() for p in model.parameters()]


def test_every_page_is_here() -> None:
    assert {page.stem for page in PAGES.glob("*.md")} == {"index", *PEERS}
    index = (PAGES / "index.md").read_text()
    for page, package in PEERS.items():
        row = next(line for line in index.splitlines() if f"({page}.md)" in line)
        assert ("| yes," in row) == (package is not None)


@pytest.mark.parametrize("page", ["torchjd", "libmtl", "pytorch-pcgrad"])
def test_a_loop(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if PEERS[page]:
        need(monkeypatch, PEERS[page])
    (diff,) = blocks(page, "diff")
    start = trained(begin()["model"])
    new = trained(run(side(diff, "+"), begin())["model"])
    assert not all(map(torch.equal, start, new))
    if PEERS[page]:
        old = trained(run(side(diff, "-"), begin())["model"])
        torch.testing.assert_close(new, old, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("row", ["heads", "vector", "one-pass", "constant"])
def test_a_row_of_torchjd(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`autojac.backward` and what takes its place: all parameters are in the Jacobian, heads too."""
    need(monkeypatch, "torchjd")
    aggregation, autojac = (importlib.import_module(f"torchjd.{name}") for name in ("aggregation", "autojac"))
    torch.manual_seed(0)
    tasks, samples = 3, 5
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, tasks if row in ("heads", "constant") else 1))
    x, y, weights = torch.randn(samples, 6), torch.randn(samples, model[2].out_features), torch.tensor([0.5, 2.0, 0.1])

    def losses() -> torch.Tensor:
        errors = (model(x) - y) ** 2
        return errors.mean(0) if row in ("heads", "constant") else errors[:, 0]

    def gradients() -> list[torch.Tensor]:
        found = [p.grad for p in model.parameters()]
        model.zero_grad()
        return found

    autojac.backward(losses())
    aggregator = aggregation.Constant(weights) if row == "constant" else aggregation.UPGrad()
    autojac.jac_to_grad(model.parameters(), aggregator)
    want = gradients()
    if row == "one-pass":
        with fastmtl.one_pass(model, torch.arange(samples), samples) as bank:
            losses().sum().backward()
        bank.apply("upgrad")
    else:
        method = (lambda gram: weights) if row == "constant" else "upgrad"
        surgery = fastmtl.backward(losses(), model, shared=model, method=method)
        assert row != "constant" or torch.equal(surgery.weights, weights)
    torch.testing.assert_close(gradients(), want, rtol=1e-4, atol=1e-6)


def test_features_of_torchjd(monkeypatch: pytest.MonkeyPatch) -> None:
    """`features=` there names the trunk's output; left out here it is the same update, and handed over another one."""
    need(monkeypatch, "torchjd")
    aggregation, autojac = (importlib.import_module(f"torchjd.{name}") for name in ("aggregation", "autojac"))
    torch.manual_seed(1)
    trunk, heads = nn.Linear(6, 8), nn.ModuleList(nn.Linear(8, 1) for _ in range(3))
    x, y = torch.randn(16, 6), torch.randn(16, 3)

    def update(step: Any) -> torch.Tensor:
        h = trunk(x).tanh()
        step([(head(h)[:, 0] - y[:, t]).square().mean() for t, head in enumerate(heads)], h)
        found = torch.cat([p.grad.flatten() for p in trunk.parameters()])
        for module in (trunk, heads):
            module.zero_grad()
        return found

    def theirs(losses: list[torch.Tensor], h: torch.Tensor) -> None:
        autojac.mtl_backward(losses, features=h)
        autojac.jac_to_grad(trunk.parameters(), aggregation.UPGrad())

    want = update(theirs)
    found = update(lambda losses, h: fastmtl.backward(losses, method="upgrad"))
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-5)
    other = update(lambda losses, h: fastmtl.backward(losses, features=h, method="upgrad"))
    assert (other - want).norm() > 0.05 * want.norm()


def test_mgda_of_torchjd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both go for the shortest combination; theirs comes nearer with every hundred steps."""
    need(monkeypatch, "torchjd")
    aggregation = importlib.import_module("torchjd.aggregation")
    jacobian = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1
    ours = fastmtl.methods.MGDA().weights(jacobian @ jacobian.T) @ jacobian
    away = [(aggregation.MGDA(1e-12, k)(jacobian) - ours).norm() / ours.norm() for k in (10, 100, 1000)]
    assert away[0] > 2 * away[1] > 4 * away[2] and away[1] > 5e-3 > away[2]
    assert ours.norm() < aggregation.MGDA()(jacobian).norm()


def test_cagrad_of_torchjd(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same c; small gradients and a gradient of zero, of which theirs makes no update."""
    need(monkeypatch, "torchjd")
    aggregation = importlib.import_module("torchjd.aggregation")
    jacobian = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.3

    def ours(rows: torch.Tensor, **c: float) -> torch.Tensor:
        return fastmtl.methods.CAGrad(**c).weights(rows @ rows.T) @ rows

    for c in (0.2, 0.5, 1.5):
        want = aggregation.CAGrad(c)(jacobian)
        torch.testing.assert_close(ours(jacobian, c=c), want, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours(jacobian), ours(jacobian, c=0.5))
    torch.testing.assert_close(ours(jacobian * 1e-3), ours(jacobian) * 1e-3)
    assert not aggregation.CAGrad(0.5)(jacobian * 1e-3).any()
    jacobian[2] = 0
    assert not aggregation.CAGrad(0.5)(jacobian).any()
    torch.testing.assert_close(ours(jacobian), jacobian.mean(0))


def test_a_weighting_for_the_trainer_of_libmtl(monkeypatch: pytest.MonkeyPatch) -> None:
    need(monkeypatch, "LibMTL")
    (weighting,) = blocks("libmtl", "python")
    (diff,) = blocks("libmtl", "diff")
    ours = (
        side(diff, "-").replace("import PCGrad", "import PCGrad as Theirs").replace("(HPS, PCGrad)", "(HPS, Surgery)")
    )
    found = trained(run(f"{weighting}\n{ours}", begin())["model"])
    want = trained(run(side(diff, "+"), begin())["model"])
    torch.testing.assert_close(found, want)


def test_mixed_adapters_of_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters that were trained there, taken over, give the same scores."""
    need(monkeypatch, "peft")
    setup, take_over = blocks("peft", "python")
    (diff,) = blocks("peft", "diff")
    old, new = (run(side(diff, sign), run(setup, {})) for sign in "-+")
    torch.testing.assert_close(new["logits"], old["logits"])
    torch.manual_seed(4)
    for name, p in old["model"].named_parameters():
        if "lora_" in name:
            nn.init.normal_(p)
    run(take_over, new)["take_over"](old["model"], new["model"])
    found = run("with tasks(names):\n    logits = model(**batch).logits", new)["logits"]
    want = run("logits = model(**batch, adapter_names=names).logits", old)["logits"]
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    # in training, where PEFT takes no batch that mixes adapters
    new["model"].train()
    run("with tasks(names):\n    model(**batch).logits.sum().backward()", new)
    assert all(p.grad.any() for name, p in new["model"].named_parameters() if ".B." in name)
    assert not torch.allclose(found, run("logits = model(**batch, adapter_names=names[::-1]).logits", old)["logits"])


def test_taps() -> None:
    (code,) = blocks("taps", "python")
    found = run(code, {})
    assert found["sketch"](torch.randn(2, 3, 8, 8)).shape == (2, 10)
    deltas = [p for name, p in found["model"].named_parameters() if ".delta." in name]
    assert deltas and all(p.any() for p in deltas)
