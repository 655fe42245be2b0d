"""Builds the one compiled extension, `fastmtl._C`, against torch's stable ABI.

CUDA sources are compiled whenever an `nvcc` is found that fits torch, with or without a GPU; a torch without CUDA
takes any (FASTMTL_CUDA=0 turns it off, FASTMTL_CUDA=1 fails where there is none; TORCH_CUDA_ARCH_LIST as usual).
Without a C++ compiler the package installs without the extension. `fastmtl info` says what was left out and why.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
# older releases stop at the licence field of pyproject.toml, and don't say why
OLDEST_SETUPTOOLS = 77
# torch 2.10: the oldest release whose stable ABI has all that csrc/ uses
TORCH_TARGET_VERSION = "0x020a000000000000"
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
        found = shutil.which(os.environ["CXX"].split()[0])
        if found is None:
            raise SystemExit(f"fastmtl: CXX={os.environ['CXX']!r} is no program that can be found")
        return found
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def find_cuda_home(torch_cuda: str | None) -> tuple[Path | None, str | None]:
    """The toolkit's root, or None and the reason. torch_cuda: the release of CUDA that torch was built with, if any."""
    wanted = os.environ.get("FASTMTL_CUDA", "")
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
    if find_cxx() is None:
        reason = "no C++ compiler was found when it was installed (c++, g++, clang++)"
        print(f"fastmtl: {reason}: installing without compiled kernels", file=sys.stderr)
        return [], {}, {"extension": reason}

    import pybind11
    import torch
    from torch.utils import cpp_extension

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
ext_modules, commands, missing = extension()


class BuildPy(build_py):
    """Leaves a note of what was not built and why, for `fastmtl info`."""

    def run(self) -> None:
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
    ext_modules=ext_modules,
    cmdclass={"build_py": BuildPy, **commands},
)
