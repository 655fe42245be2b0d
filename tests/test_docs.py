"""Public names say what they take, raise and give; their examples run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT

import fastmtl
from fastmtl import ops


def public(module: Any) -> dict[str, Any]:
    """The functions and classes that a module exports, by dotted name."""
    names = {name: getattr(module, name) for name in module.__all__}
    return {f"{module.__name__}.{n}": x for n, x in names.items() if inspect.isfunction(x) or inspect.isclass(x)}


def _modules() -> list[Any]:
    found = [fastmtl, *(getattr(fastmtl, name) for name in fastmtl.__all__ if inspect.ismodule(getattr(fastmtl, name)))]
    return [module for module in found if hasattr(module, "__all__")]


PUBLIC = {name: x for module in _modules() for name, x in public(module).items()}
OPS = public(ops)


@pytest.mark.parametrize("name", PUBLIC)
def test_has_a_docstring(name: str) -> None:
    doc = inspect.getdoc(PUBLIC[name])
    assert doc and len(doc.splitlines()[0]) > 20, f"{name} does not say what it is for"
    assert doc.splitlines()[0].rstrip().endswith((".", ":", ",")) or len(doc.splitlines()) > 1


@pytest.mark.parametrize("name", OPS)
def test_op_docstring_is_complete(name: str) -> None:
    doc = inspect.getdoc(OPS[name])
    assert "Example:" in doc and ">>>" in doc, f"{name} shows no example"
    if inspect.isclass(OPS[name]):
        # what an op returns: it takes nothing from the user, and raises nothing
        return
    # or a reference to the op that raises the same
    assert "Raises:" in doc or ("errors" in doc and "as for" in doc), f"{name} does not say what it raises"
    for parameter in inspect.signature(OPS[name]).parameters:
        assert f"{parameter}:" in doc or "as for" in doc, f"{name} does not explain {parameter!r}"


def test_the_reference_has_every_public_name_once() -> None:
    public_names = {f"{module.__name__}.{name}" for module in _modules() for name in module.__all__}
    modules = {module.__name__ for module in _modules()} | {"fastmtl.optim"}
    text = "".join(page.read_text() for page in (ROOT / "docs/reference").glob("*.md"))
    shown = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    assert len(shown) == len(set(shown)), "shown twice"
    assert set(shown) == public_names - modules | {"fastmtl.optim.PCGrad"}


def _doctests(function: Any, namespace: dict[str, Any]) -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(recurse=inspect.isclass(function))
    tests = finder.find(function, globs=dict(namespace))
    return [test for test in tests if test.examples]


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.filterwarnings("ignore:fastmtl runs its plain PyTorch reference:RuntimeWarning")
def test_examples_run(name: str) -> None:
    module = importlib.import_module(name.rpartition(".")[0])
    namespace = {"torch": torch, "fastmtl": fastmtl, **{n: getattr(module, n) for n in module.__all__}}
    report: list[str] = []
    for test in _doctests(PUBLIC[name], namespace):
        runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
        if runner.run(test, out=report.append).failed:
            pytest.fail("".join(report))


def test_a_wrong_example_is_seen() -> None:
    def wrong() -> None:
        """
        >>> 1 + 1
        3
        """

    (test,) = _doctests(wrong, {})
    assert doctest.DocTestRunner().run(test, out=lambda text: None).failed == 1


PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks/results/PENDING.md"]
# what a path in backquotes begins with; one that the build makes is not in a checkout
FOLDERS = "fastmtl|kernels|csrc|tests|benchmarks|docs|examples"
PATH = re.compile(rf"`((?:{FOLDERS})/[\w./-]*[\w/])`")


def missing_paths(text: str, page: Path) -> list[str]:
    """The links (relative to the page) and paths in backquotes (relative to the checkout) that lead nowhere."""
    links = re.findall(r"\]\((?!https?:)([^)\s]+)\)", text)
    named = [path for path in PATH.findall(text) if not (ROOT / path).exists()]
    return [link for link in links if not leads_somewhere(link, text, page)] + named


def leads_somewhere(link: str, text: str, page: Path) -> bool:
    """Whether there is such a file and, behind a `#`, such a heading in it."""
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    if not target.exists():
        return False
    return not anchor or anchor in anchors(text if target == page else target.read_text())


def anchors(text: str) -> set[str]:
    """What the headings of a page are called in links to them, and rows that name themselves."""
    headings = re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    named = re.findall(r'<a id="([\w-]+)"></a>', text)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings} | {*named}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_exist(page: Path) -> None:
    # the changelog names files as they were called then
    if page.name != "CHANGELOG.md":
        assert missing_paths(page.read_text(), page) == []


def test_a_path_that_leads_nowhere_is_seen() -> None:
    text = "## X `y`, z\n[a](docs/nothing.md) [b](#x-y-z) [c](#y) `fastmtl/nothing.py` `fastmtl/nn/layers/conv.py`"
    assert missing_paths(text, ROOT / "README.md") == ["docs/nothing.md", "#y", "fastmtl/nothing.py"]
