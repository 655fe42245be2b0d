"""What setup.py finds of a CUDA toolkit, and what it says when something is missing."""

from __future__ import annotations

import os
import platform
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import setuptools
import torch
from paths import ROOT

import fastmtl
from fastmtl import info
from fastmtl.core import dispatch


@pytest.fixture
def setup_file(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Its names, without a build."""
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    monkeypatch.setattr(os, "environ", dict(os.environ))  # it sets TORCH_CUDA_ARCH_LIST
    return runpy.run_path(str(ROOT / "setup.py"))


def toolkit(root: Path, include: str = "include", library: str | None = "lib64", release: str = "13.0") -> Path:
    for name in ("bin/nvcc", f"{include}/cuda_runtime.h", *([f"{library}/libcudart_static.a"] if library else [])):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    nvcc = root / "bin/nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
    nvcc.chmod(0o755)
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
    for torch_cuda in (None, "13.0", "13.2"):
        assert setup_file["find_cuda_home"](torch_cuda) == (home, None)
    assert setup_file["cuda_folders"](home) == (home / include, home / library)


def test_the_toolkit_must_fit_torch(
    tmp_path: Path, setup_file: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = toolkit(tmp_path / "old", release="12.8"), toolkit(tmp_path / "new")
    find = setup_file["find_cuda_home"]
    monkeypatch.setitem(os.environ, "CUDA_HOME", str(new))
    monkeypatch.setitem(os.environ, "CUDA_PATH", str(old))
    monkeypatch.delitem(os.environ, "FASTMTL_CUDA", raising=False)
    assert find("12.6") == (old, None)
    assert find("13.0") == (new, None)
    home, reason = find("11.8")
    assert home is None
    assert reason.startswith("no nvcc was found that fits torch's CUDA 11.8")
    assert f"{new} has 13.0, {old} has 12.8" in reason
    assert "CUDA_HOME" in reason
    monkeypatch.setitem(os.environ, "FASTMTL_CUDA", "1")
    with pytest.raises(SystemExit, match=r"FASTMTL_CUDA=1, but no nvcc was found that fits torch's CUDA 11\.8"):
        find("11.8")
    monkeypatch.setitem(os.environ, "FASTMTL_CUDA", "0")
    assert find("13.0") == (None, "FASTMTL_CUDA=0 was set when it was built")


def test_a_given_folder_without_a_toolkit_is_named(
    tmp_path: Path, setup_file: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "CUDA_HOME", str(tmp_path / "nowhere"))
    monkeypatch.setitem(os.environ, "CUDA_PATH", str(toolkit(tmp_path / "old", release="12.8")))
    monkeypatch.delitem(os.environ, "FASTMTL_CUDA", raising=False)
    _, reason = setup_file["find_cuda_home"]("11.8")
    assert "old has 12.8" in reason and f"CUDA_HOME={tmp_path / 'nowhere'} has none" in reason
    monkeypatch.delitem(os.environ, "CUDA_PATH")
    monkeypatch.setattr(Path, "exists", lambda path: False)
    home, reason = setup_file["find_cuda_home"]("13.0")
    assert home is None and f"(CUDA_HOME={tmp_path / 'nowhere'}; PATH; /usr/local/cuda)" in reason


@pytest.mark.parametrize("broken", ["not executable", "no program", "silent"])
def test_an_nvcc_that_does_not_run(
    broken: str, tmp_path: Path, setup_file: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = toolkit(tmp_path / "bad"), toolkit(tmp_path / "good")
    nvcc = bad / "bin/nvcc"
    nvcc.write_text({"no program": "text", "silent": "#!/bin/sh\nexit 3\n"}.get(broken, nvcc.read_text()))
    nvcc.chmod(0o644 if broken == "not executable" else 0o755)
    monkeypatch.setitem(os.environ, "CUDA_HOME", str(bad))
    monkeypatch.setitem(os.environ, "CUDA_PATH", str(good))
    monkeypatch.delitem(os.environ, "FASTMTL_CUDA", raising=False)
    assert setup_file["find_cuda_home"]("13.0") == (good, None)
    _, reason = setup_file["find_cuda_home"]("11.8")
    assert f"{bad} has an nvcc that does not run" in reason


def test_no_static_runtime(tmp_path: Path, setup_file: dict[str, Any]) -> None:
    home = toolkit(tmp_path, library=None)
    with pytest.raises(SystemExit, match=r"no libcudart_static\.a in lib64, targets/.*FASTMTL_CUDA=0"):
        setup_file["cuda_folders"](home)


@pytest.mark.parametrize("version", ["68.0.0", "76.1.0"])
def test_old_setuptools(version: str, setup_file: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setuptools, "__version__", version)
    with pytest.raises(SystemExit, match=rf"setuptools 77 or later, found {version}"):
        setup_file["check_setuptools"]()


def test_the_note_of_what_was_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lies where setup.py writes it, beside the package's `__init__.py`, and `fastmtl info` prints it."""
    assert Path(fastmtl.__file__).with_name("_build.json") == dispatch.BUILD_NOTE
    assert dispatch.extension is None or dispatch.BUILD_NOTE.exists()
    note = tmp_path / "_build.json"
    note.write_text('{"extension": null, "cuda": "no nvcc here"}')
    monkeypatch.setattr(dispatch, "BUILD_NOTE", note)
    assert dispatch.build_note("cuda") == "no nvcc here" and dispatch.build_note("extension") is None
    facts = {"cpu_levels": ["portable"]}
    monkeypatch.setattr(dispatch, "build_info", lambda: facts)
    built = Mock(__file__="x", **{"build_info.return_value": facts, "cpu_level.return_value": "portable"})
    monkeypatch.setattr(info.dispatch, "extension", built)
    assert "no nvcc here" in info.report()


def run_setup(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
    """The names of setup.py when it is run with arguments."""
    monkeypatch.setattr(sys, "argv", ["setup.py", *arguments])
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.usefixtures("setup_file")
@pytest.mark.parametrize("command", ["sdist", "dist_info"])
def test_a_source_distribution_needs_no_torch(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert run_setup(monkeypatch, command)["ext_modules"] == []
    with pytest.raises(
        SystemExit,
        match=r'building needs torch, which is not installed\. Install it first:\n    pip install "torch>=2\.10"',
    ):
        run_setup(monkeypatch, "bdist_wheel")


@pytest.mark.usefixtures("setup_file")
def test_a_build_against_an_old_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    with pytest.raises(SystemExit, match=r"needs torch 2\.10 or later, found torch 2\.9\.1"):
        run_setup(monkeypatch, "bdist_wheel")


@pytest.mark.usefixtures("setup_file")
@pytest.mark.parametrize(("system", "name"), [("darwin", "Darwin"), ("win32", "Windows")])
def test_other_systems_get_no_extension(
    system: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "system", lambda: name)
    found = run_setup(monkeypatch, "bdist_wheel")
    assert found["ext_modules"] == []
    assert found["missing"] == {"extension": f"the compiled kernels are for Linux, and it was installed on {name}"}
    assert f"it was installed on {name}: installing without compiled kernels" in capsys.readouterr().err


@pytest.mark.usefixtures("setup_file")
def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(os.environ, "CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = run_setup(monkeypatch, "bdist_wheel")
    assert found["ext_modules"] == [] and "no C++ compiler was found" in found["missing"]["extension"]
    monkeypatch.setitem(os.environ, "CXX", "g++-99 -m64")
    with pytest.raises(SystemExit, match=r"CXX='g\+\+-99 -m64' is no program that can be found"):
        run_setup(monkeypatch, "bdist_wheel")


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_an_old_compiler(tmp_path: Path, setup_file: dict[str, Any]) -> None:
    old = script(
        tmp_path / "g++-9",
        'case "$*" in *--version*) echo "g++-9 (Debian) 9.3.0";; '
        "*) echo \"g++-9: error: unrecognized command line option '-std=c++20'\" >&2; exit 1;; esac",
    )
    with pytest.raises(SystemExit) as told:
        setup_file["check_cxx"](str(old))
    for word in ("g++-9 (Debian) 9.3.0", "C++20", "unrecognized command line option", "CXX names another"):
        assert word in str(told.value)
    setup_file["check_cxx"](setup_file["find_cxx"]())


def test_nvcc_without_a_compiler_that_it_takes(
    tmp_path: Path, setup_file: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(os.environ, "CC", raising=False)
    home = toolkit(tmp_path)
    setup_file["check_nvcc"](home)
    release = (home / "bin/nvcc").read_text().splitlines()[1]
    script(
        home / "bin/nvcc",
        f'case "$*" in *--version*) {release};; *) echo "host_config.h(153): fatal error: unsupported GNU version! '
        'gcc versions later than 15 are not supported!" >&2; exit 1;; esac',
    )
    with pytest.raises(SystemExit) as told:
        setup_file["check_nvcc"](home)
    for word in (f"{home}/bin/nvcc (CUDA 13.0)", "unsupported GNU version", "NVCC_CCBIN", "FASTMTL_CUDA=0"):
        assert word in str(told.value)
    monkeypatch.setitem(os.environ, "CC", "gcc-99")
    with pytest.raises(SystemExit, match="CC=gcc-99"):
        setup_file["check_nvcc"](home)


def test_a_compiler_in_a_folder_with_a_space(
    tmp_path: Path, setup_file: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my tools"
    folder.mkdir()
    cxx = script(folder / "g++", "exit 0")
    monkeypatch.setitem(os.environ, "CXX", f"'{cxx}' -m64")
    assert setup_file["find_cxx"]() == str(cxx)
    setup_file["check_cxx"](os.environ["CXX"])


@pytest.mark.parametrize("value", ["yes", "off", "2"])
def test_other_values_of_fastmtl_cuda(value: str, setup_file: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "FASTMTL_CUDA", value)
    with pytest.raises(SystemExit, match=rf"FASTMTL_CUDA='{value}': expected 1 .*, 0 .*, or auto"):
        setup_file["find_cuda_home"](None)


def test_a_stale_build_is_not_packed(tmp_path: Path, setup_file: dict[str, Any]) -> None:
    (tmp_path / "lib" / "fastmtl").mkdir(parents=True)
    (tmp_path / "lib" / "fastmtl" / "gone.py").touch()
    distribution = setuptools.Distribution({"name": "x", "packages": []})
    command = setup_file["BuildPy"](distribution)
    command.build_lib = str(tmp_path / "lib")
    command.ensure_finalized()
    command.run()
    assert [path.name for path in (tmp_path / "lib").rglob("*.*")] == ["_build.json"]


def test_a_given_folder_that_is_passed_over_is_named(
    tmp_path: Path, setup_file: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = toolkit(tmp_path / "other")
    monkeypatch.setitem(os.environ, "CUDA_HOME", str(tmp_path / "nowhere"))
    monkeypatch.setitem(os.environ, "CUDA_PATH", str(other))
    monkeypatch.delitem(os.environ, "FASTMTL_CUDA", raising=False)
    assert setup_file["find_cuda_home"](None) == (other, None)
    assert f"CUDA_HOME={tmp_path / 'nowhere'} has no bin/nvcc: taking {other}" in capsys.readouterr().err


def test_a_wheel_has_no_files_of_pytest(setup_file: dict[str, Any]) -> None:
    distribution = setuptools.Distribution({"name": "x", "packages": []})
    distribution.script_name = "setup.py"
    command = setup_file["BuildPy"](distribution)
    command.ensure_finalized()
    found = {
        Path(file).name for _, _, file in command.find_package_modules("fastmtl.benchmarks", str(ROOT / "benchmarks"))
    }
    assert found == {"__init__.py"}
