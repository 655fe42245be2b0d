"""The stable-ABI promise without gigabytes: csrc/ compiles against the headers of every torch release that it names.

A build under the torch that is installed does not show a name that an older release lacks. `make abi` builds and runs.
The headers are fetched once; without an index the compilations skip, unless FASTMTL_REQUIRE_HEADERS=1, as CI says.
"""

from __future__ import annotations

import concurrent.futures
import http.server
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from abi import old_headers
from abi.old_headers import RELEASES, include_folder
from conftest import skip_or_fail
from paths import ROOT

SOURCES = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cu", ".cuh", ".h", ".inc"))
TARGET = re.search(r'TORCH_TARGET_VERSION = "(0x\w+)"', (ROOT / "setup.py").read_text())[1]  # type: ignore[index]

# What csrc/ takes from torch. A name belongs here once `test_compiles` has seen it in the oldest release, or once
# csrc/common/abi.h says how to do without it there.
NAMES = {
    "STABLE_TORCH_ERROR_CODE_CHECK",  # csrc/common/abi.h
    "STABLE_TORCH_LIBRARY_IMPL",
    "STD_TORCH_CHECK",
    "TORCH_ABI_VERSION",
    "TORCH_BOX",
    "TORCH_ERROR_CODE_CHECK",
    "TORCH_TARGET_VERSION",
    "aoti_torch__reinterpret_tensor",
    "aoti_torch_get_current_cuda_stream",
    "aoti_torch_get_layout",
    "aoti_torch_layout_strided",
    "torch::headeronly::DeviceType",
    "torch::headeronly::HeaderOnlyArrayRef",
    "torch::headeronly::ScalarType",
    "torch::stable::Device",
    "torch::stable::Tensor",
    "torch::stable::accelerator::DeviceGuard",
    "torch::stable::copy_",
    "torch::stable::detail::from",
    "torch::stable::detail::to",
    "torch::stable::empty",
    "torch::stable::empty_like",
    "torch::stable::get_num_threads",
    "torch::stable::narrow",
    "torch::stable::new_empty",
    "torch::stable::parallel_for",
    "torch::stable::transpose",
    "torch::stable::view",
    "torch_call_dispatcher",
}
_NAME = re.compile(
    r"torch::(?:stable|headeronly)::(?:(?:accelerator|detail)::)?\w+"
    r"|\b(?:aoti_torch_\w+|torch_[a-z]\w*(?=\()|(?:STABLE|STD)_TORCH_\w+|TORCH_[A-Z]\w+)"
)


def test_every_name_of_torch_is_listed() -> None:
    found = {name for source in SOURCES for name in _NAME.findall(source.read_text())}
    assert found == NAMES


def _command(source: Path, include: Path) -> list[str] | None:
    """Compiles one source without leaving code behind; None where the compiler for it is missing."""
    import pybind11

    folders = [ROOT / "csrc", include, Path(pybind11.get_include()), Path(sysconfig.get_path("include"))]
    common = ["-std=c++20", f"-DTORCH_TARGET_VERSION={TARGET}", *(f"-I{folder}" for folder in folders)]
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if source.suffix == ".cu":
        # one architecture, and no machine code: the compiler's front end is what reads the headers
        return nvcc and [
            nvcc,
            *common,
            "-DUSE_CUDA",
            "--expt-relaxed-constexpr",
            "-arch=sm_90",
            "-ptx",
            "-o",
            "/dev/null",
        ]
    cxx = shutil.which("c++") or shutil.which("g++")
    cuda = [f"-I{Path(nvcc).resolve().parent.parent / 'include'}", "-DFASTMTL_WITH_CUDA"] if nvcc else []
    return cxx and [cxx, "-fsyntax-only", *common, *cuda]


def _users() -> set[Path]:
    """Files of csrc/ that include a header of torch, themselves or by way of another."""
    includes = {}
    for p in SOURCES:
        names = re.findall(r'#include [<"]([^>"]+)[>"]', p.read_text())
        includes[p] = {q for name in names for q in (p.parent / name, ROOT / "csrc" / name) if q.exists()}
        if any(name.startswith("torch/") for name in names):
            includes[p].add(Path("torch"))
    users = {Path("torch")}
    while more := {p for p, found in includes.items() if {q.resolve() for q in found} & users or found & users} - users:
        users |= more
    return users - {Path("torch")}


def headers(release: str) -> Path:
    """The folder of a release's headers; skips without them, or fails where they are required."""
    try:
        return include_folder(release)
    except OSError as problem:
        # an index that can't be reached says nothing about the sources; the names above are checked all the same
        reason = f"the headers of torch {release} could not be fetched: {problem}"
    if os.environ.get("FASTMTL_REQUIRE_HEADERS") == "1":
        pytest.fail(f"FASTMTL_REQUIRE_HEADERS=1, but: {reason}")
    pytest.skip(reason)


@pytest.fixture
def index_without_json(tmp_path: Path) -> Iterator[str]:
    """The address of a package index that answers with a page."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html></html>")

        def log_message(self, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/simple"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("answers", [True, False])
@pytest.mark.parametrize("required", ["1", "0", None])
def test_without_headers_it_skips_or_fails(
    required: str | None, answers: bool, index_without_json: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of an index that answers with something else, and where nobody listens."""
    monkeypatch.setattr(old_headers, "FOLDER", tmp_path)
    monkeypatch.setattr(old_headers, "ATTEMPTS", 1)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("PIP_INDEX_URL", index_without_json if answers else "http://127.0.0.1:9/simple")
    if required is None:
        monkeypatch.delenv("FASTMTL_REQUIRE_HEADERS", raising=False)
    else:
        monkeypatch.setenv("FASTMTL_REQUIRE_HEADERS", required)
    outcome = pytest.fail.Exception if required == "1" else pytest.skip.Exception
    why = "does not list torch as JSON" if answers else "URLError"
    with pytest.raises(outcome, match=rf"the headers of torch 2\.10\.0 could not be fetched: .*{why}"):
        headers("2.10.0")


def test_other_headers_are_never_skipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A digest that differs is a failure, wherever that is seen."""
    monkeypatch.setattr(old_headers, "FOLDER", tmp_path)
    monkeypatch.setattr(old_headers, "_fetch", lambda release, folder: folder.mkdir(parents=True))
    with pytest.raises(old_headers.HeadersError, match=r"the headers of torch 2\.10\.0 have the digest"):
        headers("2.10.0")
    assert list(tmp_path.iterdir()) == []


def _read_once(include: Path, folder: Path) -> list[str]:
    """Options with which a source finds the release's headers already read: most of the time goes into these. That each
    source includes what it uses, the build of the extension shows."""
    used = {name for p in SOURCES for name in re.findall(r"#include <(torch/[^>]+)>", p.read_text())}
    header = folder / "torch_headers.h"
    header.write_text("".join(f"#include <{name}>\n" for name in sorted(used)))
    command = _command(header.with_suffix(".cpp"), include)
    if command is None:
        return []
    command = [*(word for word in command if word != "-fsyntax-only"), "-x", "c++-header", str(header)]
    done = subprocess.run([*command, "-o", f"{header}.gch"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ["-include", str(header)]


@pytest.mark.parametrize("release", RELEASES)
def test_compiles(release: str, tmp_path: Path) -> None:
    include = headers(release)
    sources = [p for p in sorted(_users()) if p.suffix in (".cpp", ".cu")]
    assert len(sources) >= 6
    commands = {p: _command(p, include) for p in sources}
    read_once = _read_once(include, tmp_path)
    for p, command in commands.items():
        if command is not None and p.suffix == ".cpp":
            command += read_once

    def run(source: Path) -> str:
        done = subprocess.run([*commands[source], str(source)], capture_output=True, text=True)  # type: ignore[misc]
        return "" if done.returncode == 0 else f"{source.name}:\n{done.stderr}"

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        errors = [error for error in pool.map(run, [p for p in sources if commands[p] is not None]) if error]
    assert not errors, "\n".join(errors)
    missing = [p.name for p, command in commands.items() if command is None]
    if missing:
        skip_or_fail(f"no compiler for {', '.join(missing)}")


def test_a_name_that_is_missing_is_seen(tmp_path: Path) -> None:
    """The check can fail: a source with a name that no release has."""
    source = tmp_path / "wrong.cpp"
    source.write_text("#include <torch/csrc/stable/library.h>\nint x = torch::stable::no_such_name();\n")
    include = headers(next(iter(RELEASES)))
    command = _command(source, include)
    if command is None:
        skip_or_fail("no C++ compiler")
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert done.returncode != 0 and "no_such_name" in done.stderr, sys.executable
