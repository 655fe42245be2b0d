"""The table of compiled surgery kernels: compiles `csrc/cuda`, reads the cubins, rewrites what is made of them.

    python -m fastmtl.benchmarks.machine_code.kernel_table [--arch 90] [--cubins FOLDER]

From a checkout with nvcc, some minutes. Writes every loop of every kernel into `kernels_sm_90.json` beside this file,
and the table between two markers in `docs/kernels/surgery-kernels.md`. Needs no GPU.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastmtl.benchmarks.machine_code import cubin

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs" / "kernels" / "surgery-kernels.md"
BEGIN, END = "<!-- kernels:begin -->", "<!-- kernels:end -->"
DTYPES = {"f": "f32", "d": "f64", "13__nv_bfloat16": "bf16", "6__half": "f16"}
SOURCES = [f"kernels_{dtype}" for dtype in DTYPES.values()]
THREADS = 256

_ARGUMENTS = re.compile(r"(?:I(f|d|13__nv_bfloat16|6__half)?((?:Li\d+E)*)E)?")


class Kernel(NamedTuple):
    """An instantiation: `dtype` is empty where the kernel has none."""

    name: str
    dtype: str = ""
    numbers: tuple[int, ...] = ()

    @property
    def like(self) -> str:
        """Of a kernel for groups of parameters the name of the one whose loops it has; else its own."""
        return self.name.replace("_groups", "")

    def __str__(self) -> str:
        return "-".join([self.name, *filter(None, [self.dtype]), *map(str, self.numbers)])


def kernel_of(mangled: str) -> Kernel:
    # names stand behind their lengths, which may stand behind other digits
    for length in re.finditer(r"(?=(\d+))", mangled):
        start = length.end(1)
        name = mangled[start : start + int(length[1])]
        if name.endswith("_kernel") and len(name) == int(length[1]):
            arguments = _ARGUMENTS.match(mangled, start + len(name))
            assert arguments is not None
            dtype, numbers = arguments.groups()
            return Kernel(name, DTYPES.get(dtype or "", ""), tuple(int(n) for n in re.findall(r"\d+", numbers or "")))
    raise AssertionError(f"no kernel's name: {mangled}")


def nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def compile_cubin(source: str, arch: int, folder: Path) -> Path:
    """`<source>.cu` of `csrc/cuda`, with the flags of setup.py that matter to machine code."""
    from torch.utils import cpp_extension

    program = nvcc()
    if program is None:
        raise FileNotFoundError("no nvcc")
    target = folder / f"{source}_{arch}.cubin"
    flags = ["-O3", "-std=c++20", f"-I{ROOT / 'csrc'}", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    flags += cpp_extension.COMMON_NVCC_FLAGS
    if not source.startswith("kernels_"):  # the launchers know nothing of torch
        flags += [f"-I{path}" for path in cpp_extension.include_paths()]
        flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"]
    (file,) = (ROOT / "csrc" / "cuda").rglob(f"{source}.cu")
    report = subprocess.run([program, *flags, "-cubin", str(file), "-o", str(target)], capture_output=True, text=True)
    if report.returncode != 0:
        raise RuntimeError(report.stderr)
    return target


def memory_bound(kernel: Kernel, loop: cubin.Loop) -> str | None:
    """Which loop that is: "rows" walks the gradients, 16 bytes a load; "sums" adds up what blocks have left. Others
    are tables of lists, rows that are not aligned, and the T x T problem.
    """
    widest, count = max(loop.loads.items())
    if kernel.like == "gram_mma_kernel":
        rows = loop.has(r"[HD]MMA")
    else:
        rows = kernel.like in ("gram_rows_kernel", "combine_kernel", "combine_split_kernel")
    if widest == 16 and rows:
        return "rows"
    # past the first-level cache
    sums = widest == 8 and count >= 16 and loop.has(r"LDG\.E\.64\.STRONG\.GPU") and loop.has("DADD")
    return "sums" if sums and kernel.name.startswith("gram_") else None


def entry(kernel: Kernel, code: cubin.Code) -> dict[str, Any]:
    """What the table and `predict` want of a kernel: of each kind of loop the one with the most rounds."""
    found: dict[str, Any] = {
        "kernel": kernel.name,
        "dtype": kernel.dtype,
        "numbers": list(kernel.numbers),
        "registers": code.registers,
        "stack": code.stack,
        "shared": code.shared,
        "blocks": code.blocks(THREADS),
    }
    for kind in ("rows", "sums"):
        loops = [loop for loop in code.loops if memory_bound(kernel, loop) == kind]
        if loops:
            loop = max(loops, key=lambda loop: loop.rounds)
            size, count = max(loop.loads.items())
            found[kind] = {
                "loads": count,
                "bytes": cubin.WARP * size * count,
                "rounds": round(loop.rounds, 3),
                "instructions": len(loop.path),
            }
    return found


def table(entries: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown."""
    lines = ["| kernel | registers | blocks an SM | loads of a step | rounds | in flight an SM | instructions | sums |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|")
    for one in entries:
        name = " ".join([f"`{one['kernel']}`", one["dtype"], *map(str, one["numbers"])])
        rows, sums = one["rows"], one.get("sums")
        flight = rows["bytes"] / rows["rounds"] * one["blocks"] * THREADS / cubin.WARP / 1024
        cells = [name, one["registers"], one["blocks"], f"{rows['loads']} x 16 B", f"{rows['rounds']:g}"]
        cells += [f"{flight:.0f} KB", rows["instructions"], f"{sums['loads']} in {sums['rounds']:g}" if sums else "-"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def rewrite(file: Path, lines: Sequence[str]) -> None:
    """Replaces what stands between the markers."""
    text = file.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{file}: expected one {BEGIN} and after it one {END}")
    before, rest = text.split(BEGIN)
    file.write_text("\n".join([before + BEGIN, "", *lines, "", END + rest.split(END)[1]]))


def data_file(arch: int = 90) -> Path:
    return Path(__file__).with_name(f"kernels_sm_{arch}.json")


def load(arch: int = 90) -> dict[Kernel, dict[str, Any]]:
    """The kernels as last compiled."""
    entries = json.loads(data_file(arch).read_text())["kernels"]
    return {Kernel(one["kernel"], one["dtype"], tuple(one["numbers"])): one for one in entries}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastmtl.benchmarks.machine_code.kernel_table", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--cubins", type=Path, help="compiled already: <source>_<arch>.cubin of each source")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.cubins or Path(temporary)
        if options.cubins is None:
            with concurrent.futures.ThreadPoolExecutor(2) as pool:
                list(pool.map(lambda source: compile_cubin(source, options.arch, folder), SOURCES))
        found = {}
        for source in SOURCES:
            for name, code in cubin.read(folder / f"{source}_{options.arch}.cubin").items():
                found[kernel_of(name)] = code
    order = ("gram_rows_kernel", "gram_mma_kernel", "combine_kernel", "combine_split_kernel")
    dtypes = list(DTYPES.values())
    kernels = sorted(found, key=lambda k: (order.index(k.name), dtypes.index(k.dtype), k.numbers))
    entries = [entry(kernel, found[kernel]) for kernel in kernels]
    program = nvcc()
    version = subprocess.run([program, "--version"], capture_output=True, text=True).stdout if program else ""
    release = re.search(r"release ([\d.]+)", version)
    data = {"nvcc": release[1] if release else "unknown", "arch": options.arch, "kernels": entries}
    data_file(options.arch).write_text(json.dumps(data, indent=1) + "\n")
    rewrite(DOCS, table(entries))
    return 0


if __name__ == "__main__":
    sys.exit(main())
