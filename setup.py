"""Builds the one compiled extension, `fastmtl._C`, against torch's stable ABI.

`build_backend/fastmtl_build.py` runs it where pip builds, and finds the torch to build against. CUDA sources are
compiled whenever an `nvcc` is found that fits torch, with or without a GPU; a torch without CUDA takes any
(FASTMTL_CUDA=0 turns it off, FASTMTL_CUDA=1 fails where there is none; TORCH_CUDA_ARCH_LIST as usual). Without a C++
compiler, and elsewhere than on Linux, the package installs without the extension. `fastmtl info` says what was left out
and why.
"""

from __future__ import annotations

import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
# older releases stop at the licence field of pyproject.toml, and don't say why
OLDEST_SETUPTOOLS = 77
VERSION = runpy.run_path(str(ROOT / "fastmtl" / "_version.py"))
# of the oldest torch there
TORCH_TARGET_VERSION = "0x020a000000000000"
# commands that need the package's files alone: a source distribution is made without torch
WITHOUT_EXTENSION = {"sdist", "egg_info", "dist_info"}
BUILD_NEEDS = ('"torch>=2.10"', '"pybind11>=2.13"', "ninja")
# what csrc/ asks of a compiler: C++20, and on x86 the products of pairs of processors with AVX512-BF16
CXX_PROBE = """
#include <bit>
#include <concepts>
static_assert(std::countr_zero(8u) == 3 && std::integral<int>);
#if defined(__x86_64__)
#include <immintrin.h>
__attribute__((target("avx512f,avx512bf16"))) __m512 product(__m512 sum, __m512bh a, __m512bh b) {
  return _mm512_dpbf16_ps(sum, a, b);
}
#endif
"""
# its headers look at the host's compiler
NVCC_PROBE = "#include <cuda_runtime.h>\n#include <bit>\n"
DEFAULT_CUDA_ARCHITECTURES = "8.0;9.0+PTX"


# beginnings of names of sources, by how long they compile: one for minutes, the others down to half a minute
LONGEST = ("kernels_methods", "kernels_bf16", "kernels_f", "kernels_avx512", "kernels_", "surgery", "runtime")


def build_rank(source: str) -> int:
    """The place of a source in the order of the build."""
    return next((k for k, start in enumerate(LONGEST) if Path(source).name.startswith(start)), len(LONGEST))


def check_setuptools() -> None:
    """Where builds are isolated pip brings the right one; with --no-build-isolation the environment's own is used."""
    if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
        raise SystemExit(
            f"fastmtl: building needs setuptools {OLDEST_SETUPTOOLS} or later, found {setuptools.__version__}: "
            f'pip install "setuptools>={OLDEST_SETUPTOOLS}"'
        )


def find_cxx() -> str | None:
    if os.environ.get("CXX"):
        found = shutil.which(shlex.split(os.environ["CXX"])[0])
        if found is None:
            raise SystemExit(f"fastmtl: CXX={os.environ['CXX']!r} is no program that can be found")
        return found
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def program(command: str) -> str:
    """What a compiler calls itself."""
    said = subprocess.run([*shlex.split(command), "--version"], capture_output=True, text=True).stdout.strip()
    return f"{command} ({said.splitlines()[0] if said else 'which names no version'})"


def why(output: str) -> str:
    """The first line of a compiler's output that names an error; without one, the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line or "fatal" in line), lines[-1] if lines else "no word")


def check_cxx(cxx: str) -> None:
    """Ends the build where the compiler is too old for csrc/, before it compiles for minutes."""
    command = [*shlex.split(cxx), "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    done = subprocess.run(command, input=CXX_PROBE, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(
            f"fastmtl: {program(cxx)} does not compile what fastmtl is written in, C++20 and vectors of this "
            f"processor ({why(done.stderr)}). g++ 11 or later does; CXX names another compiler"
        )


def check_nvcc(home: Path) -> None:
    """Ends the build where nvcc does not take the host's compiler."""
    nvcc, host = home / "bin" / "nvcc", os.environ.get("CC")
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.cu"
        probe.write_text(NVCC_PROBE)
        # torch's build command hands it CC
        command = [str(nvcc), "-std=c++20", "-E", "-o", os.devnull, str(probe), *(["-ccbin", host] if host else [])]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        taken = f"CC={host}" if host else "the one that it finds on PATH, or by NVCC_CCBIN"
        raise SystemExit(
            f"fastmtl: {nvcc} (CUDA {nvcc_release(home)}) does not take the host's compiler, {taken}: "
            f"{why(done.stderr + done.stdout)}. Name one that it takes by NVCC_CCBIN (or CC and CXX), or build without "
            "CUDA (FASTMTL_CUDA=0)"
        )


def find_cuda_home(torch_cuda: str | None) -> tuple[Path | None, str | None]:
    """The toolkit's root, or None and the reason. torch_cuda: the release of CUDA that torch was built with, if any."""
    wanted = os.environ.get("FASTMTL_CUDA", "")
    if wanted not in ("", "auto", "0", "1"):
        raise SystemExit(
            f"fastmtl: FASTMTL_CUDA={wanted!r}: expected 1 (CUDA code, or no build), 0 (none), or auto (where nvcc is "
            "found), which leaving it out means, too"
        )
    if wanted == "0":
        return None, "FASTMTL_CUDA=0 was set when it was built"
    given = {name: Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)}
    candidates = list(given.values())
    nvcc = shutil.which("nvcc")
    if nvcc:
        candidates.append(Path(nvcc).resolve().parent.parent)
    candidates.append(Path("/usr/local/cuda"))
    if torch_cuda is not None:
        candidates.append(Path(f"/usr/local/cuda-{torch_cuda}"))
    others = []
    for home in dict.fromkeys(candidates):
        if (home / "bin" / "nvcc").exists() and cuda_folder(home, "cuda_runtime.h", CUDA_INCLUDES):
            # torch's own build command refuses another major release
            release = None if torch_cuda is None else nvcc_release(home)
            if torch_cuda is None or (release is not None and release.split(".")[0] == torch_cuda.split(".")[0]):
                for name, empty in given.items():
                    if not (empty / "bin" / "nvcc").exists():
                        print(f"fastmtl: {name}={empty} has no bin/nvcc: taking {home}", file=sys.stderr)
                return home, None
            others.append(f"{home} has {release or 'an nvcc that does not run'}")
    without = [f"{name}={home} has none" for name, home in given.items() if not (home / "bin" / "nvcc").exists()]
    looked = [f"{name}={home}" for name, home in given.items()] or ["CUDA_HOME, which was not set"]
    reason = f"no nvcc was found when it was built ({', '.join(looked)}; PATH; /usr/local/cuda)"
    if others:
        reason = (
            f"no nvcc was found that fits torch's CUDA {torch_cuda} when it was built "
            f"({', '.join([*others, *without])}): point CUDA_HOME to such a toolkit and install again"
        )
    if wanted == "1":
        raise SystemExit(f"fastmtl: FASTMTL_CUDA=1, but {reason}")
    return None, reason


def nvcc_release(home: Path) -> str | None:
    """What its nvcc says; None: it can't be run, or names none."""
    try:
        said = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout
    except OSError:
        return None
    found = re.search(r"release (\d+\.\d+)", said)
    return None if found is None else found[1]


# the toolkit's own installer has lib64; conda and the wheels have lib or a folder by target
CUDA_TARGET = "targets/sbsa-linux" if platform.machine() == "aarch64" else "targets/x86_64-linux"
CUDA_INCLUDES = ("include", f"{CUDA_TARGET}/include")
CUDA_LIBRARIES = ("lib64", f"{CUDA_TARGET}/lib", "lib")


def cuda_folder(home: Path, file: str, folders: tuple[str, ...]) -> Path | None:
    """The first of a toolkit's folders that holds a file."""
    return next((home / folder for folder in folders if (home / folder / file).exists()), None)


def cuda_folders(home: Path) -> tuple[Path, Path]:
    """Where a toolkit keeps its headers and the static runtime library."""
    include = cuda_folder(home, "cuda_runtime.h", CUDA_INCLUDES)
    library = cuda_folder(home, "libcudart_static.a", CUDA_LIBRARIES)
    if include is None or library is None:
        missing = "cuda_runtime.h" if include is None else "libcudart_static.a"
        looked = ", ".join(CUDA_INCLUDES if include is None else CUDA_LIBRARIES)
        raise SystemExit(
            f"fastmtl: {home} has nvcc, but no {missing} in {looked}: install the CUDA runtime's development "
            "files, point CUDA_HOME to a whole toolkit, or build without CUDA (FASTMTL_CUDA=0)"
        )
    return include, library


def extension() -> tuple[list[Extension], dict[str, type], dict[str, str | None]]:
    """Extension modules, build commands, and why parts are missing."""
    cxx_path = find_cxx()
    reason = None
    if not sys.platform.startswith("linux"):
        reason = f"the compiled kernels are for Linux, and it was installed on {platform.system()}"
    elif cxx_path is None:
        reason = "no C++ compiler was found when it was installed (c++, g++, clang++)"
    if reason is not None:
        print(f"fastmtl: {reason}: installing without compiled kernels", file=sys.stderr)
        return [], {}, {"extension": reason}

    try:
        import pybind11
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        raise SystemExit(
            f"fastmtl: building needs {error.name}, which is not installed. Install it first:\n"
            f"    pip install {' '.join(BUILD_NEEDS)}"
        ) from error
    problem = VERSION["torch_problem"](torch.__version__)
    if problem is not None:
        raise SystemExit(problem)

    cuda_home, no_cuda = find_cuda_home(torch.version.cuda)
    if no_cuda is not None:
        print(f"fastmtl: {no_cuda}: installing without CUDA C++ kernels", file=sys.stderr)
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cpp"))
    common = ["-O3", "-g0", "-std=c++20", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    cxx = [
        *common,
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fvisibility=hidden",
        "-Wall",
        "-Wno-unknown-pragmas",
        "-Wno-maybe-uninitialized",
    ]
    nvcc = [
        *(flag for flag in common if flag != "-g0"),
        "-DUSE_CUDA",
        "-Xcompiler=-fvisibility=hidden",
        "-Xptxas=-warn-spills",
        "--threads=2",
    ]
    # libtorch.so must stay among the needed libraries: on a CUDA torch it brings libtorch_cuda, and with it the
    # weak symbols that the CUDA half calls
    torch_lib = cpp_extension.library_paths()[0]
    link = ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-ltorch_cpu", "-lc10"]
    library_dirs = [torch_lib]
    if cuda_home is not None:
        cpp_extension.CUDA_HOME = str(cuda_home)
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHITECTURES)
        sources += sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cuda").rglob("*.cu"))
        cxx.append("-DFASTMTL_WITH_CUDA")
        cuda_include, cuda_library = cuda_folders(cuda_home)
        library_dirs.append(str(cuda_library))
        link += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]

    class Build(cpp_extension.BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            # one lasting place for objects, in editable builds too, so that ninja rebuilds what changed
            tag = f"{sys.implementation.cache_tag}-{'cuda' if cuda_home else 'cpu'}"
            self.build_temp = str(ROOT / "build" / f"temp-{tag}")

        def build_extensions(self) -> None:
            check_cxx(os.environ.get("CXX") or shlex.quote(cxx_path))
            if cuda_home is not None:
                check_nvcc(cuda_home)
            # under a CPU-only torch ninja is not told which headers a CUDA source includes
            headers = [p for pattern in ("*.h", "*.cuh", "*.inc") for p in (ROOT / "csrc").rglob(pattern)]
            newest = max(p.stat().st_mtime for p in headers)
            for compiled in Path(self.build_temp).rglob("cuda/**/*.o"):
                if compiled.stat().st_mtime < newest:
                    compiled.unlink()
            super().build_extensions()

        def build_extension(self, ext: Extension) -> None:
            # setuptools sorts sources by name; ninja starts them as they come here, and none runs alone in the end
            compile_all = self.compiler.compile

            def longest_first(sources: list[str], *args: Any, **options: Any) -> list[str]:
                return compile_all(sorted(sources, key=build_rank), *args, **options)

            self.compiler.compile = longest_first
            super().build_extension(ext)

    include = [str(ROOT / "csrc"), pybind11.get_include(), *cpp_extension.include_paths()]
    if cuda_home is not None:
        include.append(str(cuda_include))
    module = Extension(
        "fastmtl._C",
        sources,
        include_dirs=include,
        library_dirs=library_dirs,
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=link,
        language="c++",
    )
    return [module], {"build_ext": Build.with_options(use_ninja=True)}, {"extension": None, "cuda": no_cuda}


check_setuptools()
ext_modules, commands, missing = ([], {}, {}) if WITHOUT_EXTENSION & set(sys.argv) else extension()


# of pytest, and of a checkout: nothing that is installed reads them
LEFT_OUT = {
    "fastmtl": ["kernels/__init__.py"],
    "fastmtl.benchmarks": ["conftest.py", "test_cases.py", "results/*", "results/**/*"],
    "fastmtl.benchmarks.gpu": ["gpu_check.sh"],
}


class BuildPy(build_py):
    """Begins with an empty folder, and leaves a note of what was not built and why, for `fastmtl info`."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        found = super().find_package_modules(package, package_dir)
        return [module for module in found if Path(module[2]).name not in LEFT_OUT.get(package, ())]

    def run(self) -> None:
        if not self.editable_mode:  # modules that are gone would be in the wheel; objects lie in build/temp-...
            shutil.rmtree(Path(self.build_lib) / "fastmtl", ignore_errors=True)
        super().run()
        package = ROOT / "fastmtl" if self.editable_mode else Path(self.build_lib) / "fastmtl"
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build.json").write_text(json.dumps(missing))


setup(
    packages=[
        *find_packages(include=["fastmtl", "fastmtl.*"]),
        "fastmtl.benchmarks",
        *(f"fastmtl.{folder}.{name}" for folder in ("benchmarks", "kernels") for name in find_packages(folder)),
    ],
    package_dir={"fastmtl.benchmarks": "benchmarks", "fastmtl.kernels": "kernels"},
    package_data={"fastmtl": ["py.typed"], "fastmtl.tuning": ["tables/*.json"]},
    exclude_package_data=LEFT_OUT,
    ext_modules=ext_modules,
    cmdclass={"build_py": BuildPy, **commands},
)
