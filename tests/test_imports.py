"""Imports point one way, from what finds gradients to what knows nothing of them: docs/project/architecture.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from paths import ROOT

# what may import what stands behind it, and nothing before it
LAYERS = (
    ("fastmtl.benchmarks",),
    ("fastmtl.analysis", "fastmtl.integrations", "fastmtl.optim"),
    ("fastmtl.task_gradients",),
    ("fastmtl.surgery",),
    ("fastmtl.distributed", "fastmtl.methods", "fastmtl.nn"),
    ("fastmtl.ops",),
    ("fastmtl.parameters",),
    ("fastmtl.kernels",),
    ("fastmtl.tuning",),
    ("fastmtl.core",),
    ("fastmtl._C", "fastmtl._version"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# the package itself, its command line and what that prints may know everything
TOP = ("fastmtl/__init__.py", "fastmtl/__main__.py", "fastmtl/info.py")
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("fastmtl", "kernels", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
    if path.relative_to(ROOT).as_posix() not in TOP
)


def module_of(file: str) -> str:
    parts = Path(file).with_suffix("").parts
    parts = parts if parts[0] == "fastmtl" else ("fastmtl", *parts)
    return ".".join(parts).removesuffix(".__init__")


def imported(source: str) -> Iterator[str]:
    """Every module of fastmtl that is imported, in functions, for types and by name too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("fastmtl."))
        elif isinstance(node, ast.ImportFrom) and node.module == "fastmtl":
            yield from (f"fastmtl.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastmtl."):
            yield node.module
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called, name = ast.unparse(node.func).rpartition(".")[2], str(node.args[0].value)
            if called == "triton_kernels":
                yield f"fastmtl.kernels.{name}"
            elif called == "import_module" and name.startswith("fastmtl."):
                yield name


def layer_of(module: str) -> str | None:
    return next((name for name in LEVEL if module == name or module.startswith(f"{name}.")), None)


def arrows_back(file: str, source: str) -> list[str]:
    here = layer_of(module_of(file))
    assert here is not None, f"{file} is in no layer"
    found = []
    for module in imported(source):
        there = layer_of(module)
        if there is None or there == here:
            continue
        if LEVEL[there] <= LEVEL[here]:
            found.append(f"{file} imports {module}")
    return found


@pytest.mark.parametrize("file", FILES)
def test_imports_point_one_way(file: str) -> None:
    assert arrows_back(file, (ROOT / file).read_text()) == []


def test_an_arrow_back_is_found() -> None:
    assert arrows_back("fastmtl/surgery/x.py", "from fastmtl.task_gradients.bank import GradientBank") != []
    assert arrows_back("kernels/x.py", "def f():\n    import fastmtl.surgery.solve") != []
    assert arrows_back("fastmtl/methods/x.py", "from fastmtl import distributed") != []
    assert arrows_back("fastmtl/core/x.py", 'triton_kernels("gradients.launchers")') != []
    assert arrows_back("fastmtl/core/x.py", 'importlib.import_module("fastmtl.ops")') != []
    assert arrows_back("fastmtl/task_gradients/x.py", "from fastmtl import methods, ops") == []


MODULES = frozenset(map(module_of, FILES))


@pytest.mark.parametrize("file", FILES)
def test_kernels_that_are_loaded_by_name_exist(file: str) -> None:
    loaded = {name for name in imported((ROOT / file).read_text()) if name.startswith("fastmtl.kernels.")}
    assert loaded - MODULES == set()


def modules_imported(source: str) -> set[str]:
    """The files that an import names, also as `from package import module`."""
    found = {module for module in imported(source) if module in MODULES}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES
            if len(names) == len(node.names):  # the package itself is not asked for anything
                found.discard(node.module or "")
            found |= names
    return found


def circle(imports: Mapping[str, set[str]]) -> list[str]:
    """Modules each of which imports the next, and the last the first; empty: there are none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_file_imports_itself_by_way_of_others() -> None:
    assert circle({module_of(f): modules_imported((ROOT / f).read_text()) - {module_of(f)} for f in FILES}) == []


def test_a_circle_is_found() -> None:
    rules = "fastmtl.task_gradients.one_pass.rules"
    assert modules_imported(f"from {rules} import shapes") == {f"{rules}.shapes"}
    assert modules_imported(f"def f():\n    from {rules}.shapes import RULES") == {f"{rules}.shapes"}
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) != []
    assert circle({"a": {"b", "c"}, "b": {"c"}}) == []
