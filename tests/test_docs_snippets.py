"""The snippets of the pages run as they stand there, behind the first one of docs/guides/training-loops.md where the
page says so, and train the model that it makes."""

from __future__ import annotations

import copy
import functools
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT

from fastmtl import methods

DOCS = ROOT / "docs"


def read(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (DOCS / name).read_text(), re.MULTILINE | re.DOTALL)


SETUP, *SNIPPETS = read("guides/training-loops.md")
SNIPPETS += read("guides/amp-compile-graphs.md") + read("guides/monitoring.md")


def first_words(snippet: str) -> str:
    return re.sub(r"\W+", "-", snippet.splitlines()[0])[:40]


def run(snippet: str) -> dict[str, Any]:
    """The snippet behind the first one; checks that it trained every parameter of the model."""
    names: dict[str, Any] = {}
    captured = "CUDAGraph" in snippet
    exec(compile(SETUP.replace('"cpu"', '"cuda"') if captured else SETUP, "set-up", "exec"), names)
    start = copy.deepcopy(names["model"].state_dict())
    # a snippet may turn donated buffers off: for itself alone
    with torch._functorch.config.patch(donated_buffer=torch._functorch.config.donated_buffer):
        exec(compile(snippet, first_words(snippet), "exec"), names)
    for name, p in names["model"].named_parameters():
        assert p.isfinite().all() and not torch.equal(p, start.get(name, torch.zeros_like(p))), f"{name} not trained"
    return names


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("snippet", SNIPPETS, ids=first_words)
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_snippet(snippet: str, compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if compiler == "inductor" and "torch.compile" not in snippet:
        pytest.skip("compiles nothing")
    if "CUDAGraph" in snippet and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=compiler))
    names = run(snippet)
    bank = names.get("bank")
    assert bank is None or "collected: []" in repr(bank)


def test_settings_of_torch_in_a_process_that_has_just_started() -> None:
    """At the top of a script, where no optimizer has imported the rest of torch yet."""
    (snippet,) = [x for x in SNIPPETS if "donated_buffer" in x]
    setting = snippet.partition("compiled = ")[0]
    script = f"import torch\nimport fastmtl\n{setting}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_there_are_snippets_for_the_table() -> None:
    text = "".join(SNIPPETS)
    for part in ("torch.compile", "GradScaler", "features=h", "mark_per_task", "GradientBank", "optimizers[critic]"):
        assert part in text


def test_a_snippet_that_trains_nothing_is_seen() -> None:
    with pytest.raises(AssertionError, match="not trained"):
        run("for x, y in loader: fastmtl.backward(losses_of(model(x), y))")


METHODS = [snippet for page in ("index", "own", "affinity") for snippet in read(f"methods/{page}.md")]


@pytest.mark.parametrize("snippet", METHODS, ids=first_words)
def test_snippet_of_the_methods_page(snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the same set-up, in any order; one with a loop trains."""
    monkeypatch.chdir(tmp_path)  # one writes a file
    setup = f"from fastmtl import methods\n{snippet}"
    if "for x, y in loader" in snippet and "optimizer.step()" in snippet:
        run(setup)
        return
    names: dict[str, Any] = {}
    exec(compile(SETUP, "set-up", "exec"), names)
    exec(compile(setup, first_words(snippet), "exec"), names)


def test_methods_of_ones_own_in_the_page() -> None:
    """They are what their words say, with absent tasks, in a bank and over a file."""
    names: dict[str, Any] = {}
    for snippet in (SETUP, "from fastmtl import methods", *(x for x in METHODS if "class " in x or "def " in x)):
        exec(compile(snippet, "own", "exec"), names)
    g = torch.randn(4, 9, dtype=torch.float64)
    gram, here = g @ g.mT, torch.tensor([True, False, True, True])
    lengths = g.norm(dim=1)
    want = torch.where(here, lengths[here].mean() / lengths, 0.0)
    own = names["EqualLengths"]()
    torch.testing.assert_close(own.weights(gram, present=here), want)
    torch.testing.assert_close(names["equal_lengths"](gram), own.weights(gram))
    torch.testing.assert_close(names["Median"]()(g), g.median(0).values)
    lists = names["Median"]()([[row[:4].clone(), None, row[4:].clone()] for row in g])
    torch.testing.assert_close(torch.cat([lists[0], lists[2]]), g.median(0).values)
    left = names["LeftToLearn"]()

    def seen(*losses: float, present: Sequence[bool] = (True,) * 4) -> methods.Seen:
        return methods.Seen("abcd", present, losses=torch.tensor(losses, dtype=torch.float64))

    assert left.weigh(gram, seen(1, 2, 4, 0, present=[True, True, True, False])).tolist() == [1, 1, 1, 0]
    other = names["LeftToLearn"]()
    other.load_state_dict(left.state_dict())
    assert other.weigh(gram, seen(0.5, 1, 1, 3)).tolist() == [0.5, 0.5, 0.25, 1]


@pytest.mark.parametrize("snippet", read("start/first-steps.md"), ids=first_words)
def test_first_steps(snippet: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is a script of its own, and learns."""
    names: dict[str, Any] = {}
    exec(compile(snippet, "first steps", "exec"), names)
    loss = sum(names["losses"].values()) if "losses" in names else names["loss"]
    begin = {"losses": 7.0, "loss": 1.09}["losses" if "losses" in names else "loss"]
    assert loss.item() < begin
    assert "losses" not in names or "'left': 0." in capsys.readouterr().out


def test_whether_tasks_conflict(capsys: pytest.CaptureFixture[str]) -> None:
    """The script prints what the page shows, but for the last digits, and the tasks conflict as it says."""
    (snippet,) = read("start/conflict.md")
    names: dict[str, Any] = {}
    exec(compile(snippet, "conflict", "exec"), names)
    shown = re.search(r"^```text\n(.*?)^```$", (DOCS / "start/conflict.md").read_text(), re.MULTILINE | re.DOTALL)
    assert shown is not None
    number = re.compile(r"-?\d+(?:\.\d+)?")
    found, want = ([float(x) for x in number.findall(text)] for text in (capsys.readouterr().out, shown[1]))
    assert names["seen"] == 100 and found == pytest.approx(want, abs=0.03)
    off_diagonal = ~torch.eye(3, dtype=torch.bool)
    assert (names["cosines"] / names["seen"])[off_diagonal].max() < -0.2


def test_one_pass_snippet() -> None:
    names: dict[str, Any] = {}
    for snippet in read("guides/one-pass.md"):
        exec(compile(snippet, "one-pass", "exec"), names)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in names["model"].parameters())
    assert names["surgery"].weights.isfinite().all()


MODELS = [*read("guides/task-models.md"), *(x for x in read("guides/task-weights.md") if x.startswith("import torch"))]


@pytest.mark.parametrize("snippet", MODELS, ids=[f"{k}-{first_words(x.strip())}" for k, x in enumerate(MODELS)])
def test_snippet_of_the_page_on_models(snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each for itself, without the ones before it."""
    if "transformers" in snippet:
        pytest.importorskip("transformers", reason="transformers is not installed")
        pytest.importorskip("accelerate", reason="accelerate is not installed")
    monkeypatch.chdir(tmp_path)  # one writes a file
    names: dict[str, Any] = {}
    exec(compile(snippet, "task-models", "exec"), names)
    trainer = names.get("trainer")
    if trainer is not None:
        assert trainer.state.global_step == 4
        moved = [p for name, p in names["model"].named_parameters() if ".B." in name]
        assert moved and all(p.any() for p in moved)


def test_the_page_on_models_names_every_option() -> None:
    from fastmtl.nn.models.kinds import KINDS

    text = (DOCS / "guides/task-models.md").read_text()
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (.*?) \| (.*?) \|", text, re.MULTILINE)
    told = {name: row[1:] for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    for kind, of in KINDS.items():
        for option, usual in of.options.items():
            kinds, values = told[option]
            assert f'"{kind}"' in kinds and str(usual) in values, f"{option} of {kind}"
