"""The build backend: that of setuptools, with the torch of the environment that fastmtl is installed into.

pip builds in an environment of its own. With torch among what that one requires, pip would fetch the newest torch, and
with it gigabytes of CUDA packages, in order to compile a library that runs under every torch from 2.10 on. Therefore
nothing is required: this backend looks up where the interpreter keeps its packages outside of the build, and compiles
against the torch that lies there. Where there is none, it says at once what to do.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import runpy
import site
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import build_sdist

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

OLDEST_PYTHON = (3, 10)
VERSION = runpy.run_path(str(Path(__file__).resolve().parents[1] / "fastmtl" / "_version.py"))


def check_python() -> None:
    """pip would say so too, once it has the metadata; this comes before anything is looked for."""
    if sys.version_info[:2] < OLDEST_PYTHON:
        raise SystemExit(
            f"fastmtl needs Python {'.'.join(map(str, OLDEST_PYTHON))} or later, this is {platform.python_version()} "
            f"({sys.executable})"
        )


def target_folders() -> list[str]:
    """Where the interpreter keeps packages when no build is going on."""
    folders = site.getsitepackages()
    if sys.prefix == sys.base_prefix:  # no virtual environment
        folders.append(site.getusersitepackages())
    return folders


def use_torch() -> None:
    """Makes torch importable: the one that is already, or the one of the environment that is installed into.

    Raises:
        SystemExit: there is none, or too old a one.
    """
    check_python()
    if not sys.platform.startswith("linux") or importlib.util.find_spec("torch") is not None:
        return  # elsewhere nothing is compiled; setup.py looks at the release of what can be imported
    for folder in target_folders():
        for found in metadata.distributions(name="torch", path=[folder]):
            problem = VERSION["torch_problem"](found.version)
            if problem is not None:
                raise SystemExit(f"{problem} (in {folder})")
            # behind all else, so that the build's own requirements come first
            sys.path.append(folder)
            return
    oldest = ".".join(map(str, VERSION["OLDEST_TORCH"]))
    raise SystemExit(
        f"fastmtl is built against the torch of the environment that it is installed into, and there is none in "
        f"{os.pathsep.join(target_folders())}.\n"
        f'Install torch first:\n    pip install "torch>={oldest}"\nOn a machine without a GPU take its CPU build '
        "(pytorch.org says how): the usual one brings gigabytes of CUDA packages.\n"
        "Tools that make an environment for each build (uv, python -m build) do not show yours: let them build in it "
        "(--no-build-isolation, --no-isolation; it needs setuptools>=77, ninja and pybind11>=2.13), or name the torch "
        f'to fetch for the build: -C torch="torch>={oldest}".'
    )


def _requirements(config_settings: Any) -> list[str]:
    """A torch that the caller named for the build; otherwise none, but there must be one."""
    named = (config_settings or {}).get("torch")
    if named:
        check_python()
        return [named]
    use_torch()
    return []


def get_requires_for_build_sdist(config_settings: Any = None) -> list[str]:
    check_python()
    return []


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return _requirements(config_settings)


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return _requirements(config_settings)


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Any = None) -> str:
    check_python()
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Any = None) -> str:
    check_python()
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    use_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    use_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
