"""From the sources of csrc/cuda by nvcc's PTX to objects for the host, each kept by a digest of what makes it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import hashlib
import os
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from host.ptx.faults import faults_of
from host.ptx.module import Kernel, read
from host.ptx.translate import no_faults, translate

from fastmtl.benchmarks.machine_code.kernel_table import nvcc

HERE = Path(__file__).parent
ROOT = HERE.parent.parent.parent
FOLDER = ROOT / "build" / "host" / "ptx"
OBJECTS = FOLDER / "objects"
TRANSLATOR = ("module.py", "instructions.py", "translate.py", "faults.py", "ptx.h")
KEPT_DAYS = 14  # what no build has used since goes
NVCC_FLAGS = ["-ptx", "-O3", "-lineinfo", "-std=c++20", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}"]
# doubles and floats are rounded after every operation, and a value is read with another type than it was written
FLAGS = ["-std=c++20", "-O1", "-g0", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", f"-I{HERE}"]
QUIET = ["-Wall", "-Wno-unused-label", "-Wno-unused-but-set-variable", "-Wframe-larger-than=262144"]


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def _run(command: Sequence[str], target: Path) -> Path:
    """command -o target, which is there whole or not at all."""
    work = target.with_name(f"{target.name}.{os.getpid()}")
    done = subprocess.run([*command, "-o", str(work)], capture_output=True, text=True)
    if done.returncode != 0 or done.stderr:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return work.replace(target)


@functools.cache
def _compiler_version(program: str) -> str:
    return subprocess.run([program, "--version"], capture_output=True, check=True, text=True).stdout


def ptx_of(source: str, arch: int) -> Path:
    """`<source>.cu` of `csrc/cuda/`, or one of the files here, as PTX of sm_<arch>."""
    program = nvcc()
    if program is None:
        raise FileNotFoundError("no nvcc")
    here = HERE / f"{source}.cu"
    (file,) = [here] if here.exists() else (ROOT / "csrc" / "cuda").rglob(f"{source}.cu")
    headers = [f for folder in ("common", "cuda") for f in sorted((ROOT / "csrc" / folder).rglob("*"))]
    contents = [f.read_bytes() for f in (file, *headers) if f.suffix in (".h", ".cuh", ".inc", ".cu")]
    FOLDER.mkdir(parents=True, exist_ok=True)
    target = FOLDER / f"{source}_{arch}-{_digest(_compiler_version(program), str(NVCC_FLAGS), *contents)}.ptx"
    if not target.exists():
        _run([program, *NVCC_FLAGS, f"-arch=compute_{arch}", str(file)], target)
    return target


def _object(text: str, cxx: str, folder: Path) -> Path:
    target = folder / f"{_digest(cxx, str(FLAGS), (HERE / 'ptx.h').read_bytes(), text)}.o"
    if target.exists():
        return target
    source = target.with_suffix(f".{os.getpid()}.cpp")
    source.write_text(text)
    _run([cxx, *FLAGS, *QUIET, "-c", str(source)], target)
    source.unlink()
    return target


def _translator() -> list[bytes]:
    return [(HERE / name).read_bytes() for name in TRANSLATOR]


def library(text: str, cxx: str, runtime: Path, folder: Path, faulty: bool) -> Path:
    """Kernels of PTX in a library of their own; runtime: one that `host_kernels` has built with ptx.cpp."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{_digest(cxx, str(FLAGS), runtime.name, str(faulty), text, *_translator())}.so"
    if not target.exists():
        faults = faults_of if faulty else no_faults
        made = [str(_object(translate(kernel, faults), cxx, folder)) for kernel in read(text)]
        _run([cxx, "-shared", *made, str(runtime)], target)
    target.touch()
    return target


@functools.cache
def kernels_of(source: str, arch: int) -> list[Kernel]:
    return read(ptx_of(source, arch).read_text())


def names_of(source: str, arch: int) -> list[str]:
    """Of its kernels, mangled."""
    return re.findall(r"\.entry\s+([\w$]+)", ptx_of(source, arch).read_text())


def _texts(file: Path, faulty: str | None) -> list[str]:
    return [
        translate(kernel, faults_of if faulty is not None and re.search(faulty, kernel.name) else no_faults)
        for kernel in read(file.read_text())
    ]


def objects(sources: Sequence[str], arch: int, faulty: str | None, cxx: str) -> list[Path]:
    """An object of each kernel; faulty: a pattern of the names of those in which faults can be planted. Two compilers
    at a time."""
    folder = OBJECTS
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for file in list(pool.map(functools.partial(ptx_of, arch=arch), sources)):
            # names of the objects, so that nothing is translated that was before
            names = FOLDER / f"{file.stem}-{_digest(cxx, str(FLAGS), str(faulty), *_translator())}.txt"
            found = [folder / name for name in names.read_text().split()] if names.exists() else []
            if not found or not all(one.exists() for one in found):
                found = list(pool.map(functools.partial(_object, cxx=cxx, folder=folder), _texts(file, faulty)))
                names.write_text("\n".join(one.name for one in found))
            for one in (file, names, *found):
                one.touch()
            made += found
    for one in (*folder.iterdir(), *FOLDER.glob("*.*")):
        with contextlib.suppress(FileNotFoundError):  # what another process is making, which now has its own name
            if one.stat().st_mtime < time.time() - KEPT_DAYS * 86400:
                one.unlink()
    return made
