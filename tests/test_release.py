"""What is published and how it is built: the backend, the name and version wherever they stand, licences, workflows."""

from __future__ import annotations

import ast
import importlib.util
import platform
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from paths import ROOT

from fastmtl import _version, info

PROJECT = (ROOT / "pyproject.toml").read_text()
BUILD_FILES = ("build_backend/fastmtl_build.py", "setup.py", "fastmtl/_version.py")


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """In a build environment: no torch can be imported, and `sys.path` may grow."""
    spec = importlib.util.spec_from_file_location("fastmtl_build", ROOT / BUILD_FILES[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return module


def environment(folder: Path, version: str) -> Path:
    """Where an interpreter keeps packages, with a torch of that version."""
    metadata = folder / f"torch-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    return folder


@pytest.mark.parametrize("hook", ["get_requires_for_build_wheel", "get_requires_for_build_editable"])
def test_the_build_takes_the_torch_that_is_installed(
    hook: str, backend: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [str(tmp_path / "without"), str(environment(tmp_path / "with", "2.10.0+cpu"))]
    monkeypatch.setattr(backend.site, "getsitepackages", lambda: folders)
    assert getattr(backend, hook)() == []
    assert sys.path[-1] == folders[1], "behind what the build itself requires"


def test_a_build_without_torch_says_what_to_do(
    backend: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "target_folders", lambda: [str(tmp_path)])
    for ask in (backend.get_requires_for_build_wheel, lambda: backend.build_wheel(str(tmp_path))):
        with pytest.raises(SystemExit) as told:
            ask()
        for word in (
            str(tmp_path),
            "Install torch first",
            "CPU build",
            "--no-build-isolation",
            '-C torch="torch>=2.10"',
        ):
            assert word in str(told.value)
    assert backend.get_requires_for_build_wheel({"torch": "torch==2.13.0"}) == ["torch==2.13.0"]
    assert backend.get_requires_for_build_sdist() == []
    monkeypatch.setattr(sys, "platform", "darwin")  # nothing is compiled there
    assert backend.get_requires_for_build_wheel() == []


def test_an_old_torch_is_refused_by_the_build_and_by_the_import(
    backend: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = environment(tmp_path, "2.9.1")
    monkeypatch.setattr(backend, "target_folders", lambda: [str(folder)])
    words = r'needs torch 2\.10 or later, found torch 2\.9\.1: pip install --upgrade "torch>=2\.10"'
    with pytest.raises(SystemExit, match=rf"{words} \(in {re.escape(str(folder))}\)"):
        backend.get_requires_for_build_wheel()
    _version.require_torch()
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    with pytest.raises(ImportError, match=words):
        _version.require_torch()
    for version, serves in (("2.10.0", True), ("2.14.0.dev20260101+cpu", True), ("3.0.0a0", True), ("1.13.1", False)):
        assert (_version.torch_problem(version) is None) == serves


def test_an_old_python_is_refused(backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 18, "final", 0))
    monkeypatch.setattr(platform, "python_version", lambda: "3.9.18")
    with pytest.raises(SystemExit, match=r"fastmtl needs Python 3\.10 or later, this is 3\.9\.18"):
        backend.get_requires_for_build_wheel()


@pytest.mark.parametrize("file", BUILD_FILES)
def test_an_old_python_can_read_what_refuses_it(file: str) -> None:
    source = (ROOT / file).read_text()
    ast.parse(source, feature_version=(3, 8))
    assert "from __future__ import annotations" in source, "annotations such as `str | None` would be evaluated"


def test_one_name_and_one_version_everywhere() -> None:
    name, version = _version.DISTRIBUTION, _version.__version__
    assert f'\nname = "{name}"\n' in PROJECT
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^## \[{re.escape(version)}\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    oldest = ".".join(map(str, _version.OLDEST_TORCH))
    assert f'dependencies = ["torch>={oldest}", "numpy"]' in PROJECT
    target = "0x{:02x}{:02x}000000000000".format(*_version.OLDEST_TORCH)
    assert f'\nTORCH_TARGET_VERSION = "{target}"\n' in (ROOT / "setup.py").read_text()
    told = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.py")]
    told += [*(ROOT / "fastmtl").rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "examples").glob("*.ipynb")]
    others = r"pip install [^\n`]*(?<![\w-])fastmtl(?=\[|\b(?!-)).*"
    for path in told:
        wrong = re.findall(others, path.read_text())
        assert not [x for x in wrong if "another" not in x and "installs that one" not in x], path


def test_the_other_project_of_that_name_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"fastmtl": "1.2.1", "triton": "3.6.0"}
    monkeypatch.setattr(info, "version", found.__getitem__)
    monkeypatch.setattr(info, "PackageNotFoundError", KeyError)
    assert "another project, fastmtl 1.2.1, is installed" in info.report()
    del found["fastmtl"]
    assert "another project" not in info.report()


def array(key: str) -> list[str]:
    """A list of pyproject.toml, which is one of Python's too (3.10 reads no TOML)."""
    text = PROJECT.partition(f"\n{key} = ")[2]
    for end in re.finditer(r"\]$", text, re.MULTILINE):
        try:
            return ast.literal_eval(text[: end.end()])
        except SyntaxError:  # the bracket of an extra
            continue
    raise AssertionError(f"{key} is no list")


def test_every_requirement_has_its_licence_in_the_table() -> None:
    (table,) = re.findall(
        r"^\| package \| needed for .*?\n\n", RELEASE_PAGE.read_text() + "\n", re.MULTILINE | re.DOTALL
    )
    listed = {name.strip() for row in table.strip().splitlines() for name in row.split("|")[1].split(",")}
    asked = [
        x for key in ("requires", "dependencies", "bench", "examples", "triton", "test", "dev") for x in array(key)
    ]
    assert {re.match(r"[\w-]+", requirement)[0] for requirement in asked} - listed == set()


RELEASE_PAGE = next((ROOT / "docs").rglob("release.md"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_and_targets_exist(path: Path) -> None:
    text = path.read_text()
    for action in re.findall(r"uses: (.+)", text):
        assert action.startswith("./") or re.search(r"@[0-9a-f]{40} # v\d+\.\d+\.\d+$", action), action
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"run: make ([\w-]+)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    assert "permissions:" in text
    assert text.count("persist-credentials: false") == text.count("actions/checkout@")
    assert text.count("timeout-minutes:") == text.count("runs-on:")
