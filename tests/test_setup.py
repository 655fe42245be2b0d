"""What setup.py finds of a CUDA toolkit, and what it says when something is missing."""

from __future__ import annotations

import os
import runpy
from pathlib import Path
from typing import Any

import pytest
import setuptools

ROOT = Path(__file__).parent.parent


@pytest.fixture
def setup_file(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Its names, without a build."""
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    monkeypatch.setattr(os, "environ", dict(os.environ))  # it sets TORCH_CUDA_ARCH_LIST
    return runpy.run_path(str(ROOT / "setup.py"))


def toolkit(root: Path, include: str, library: str | None) -> Path:
    for name in ("bin/nvcc", f"{include}/cuda_runtime.h", *([f"{library}/libcudart_static.a"] if library else [])):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


@pytest.mark.parametrize("layout", ["installer", "conda", "wheels"])
def test_toolkits(layout: str, tmp_path: Path, setup_file: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    target = setup_file["CUDA_TARGET"]
    include, library = {
        "installer": ("include", "lib64"),
        "conda": (f"{target}/include", f"{target}/lib"),
        "wheels": ("include", "lib"),
    }[layout]
    home = toolkit(tmp_path, include, library)
    monkeypatch.setitem(os.environ, "CUDA_HOME", str(home))
    monkeypatch.delitem(os.environ, "FASTMTL_CUDA", raising=False)
    assert setup_file["find_cuda_home"]() == (home, None)
    assert setup_file["cuda_folders"](home) == (home / include, home / library)


def test_no_static_runtime(tmp_path: Path, setup_file: dict[str, Any]) -> None:
    home = toolkit(tmp_path, "include", None)
    with pytest.raises(SystemExit, match=r"no libcudart_static\.a in lib64, targets/.*FASTMTL_CUDA=0"):
        setup_file["cuda_folders"](home)


@pytest.mark.parametrize("version", ["68.0.0", "76.1.0"])
def test_old_setuptools(version: str, setup_file: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setuptools, "__version__", version)
    with pytest.raises(SystemExit, match=rf"setuptools 77 or later, found {version}"):
        setup_file["check_setuptools"]()
