"""What the CUDA compiler makes of the kernels, without a GPU: registers, spills, vector loads; and the build itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fastmtl import _backend

ROOT = Path(__file__).parent.parent
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
ALL = os.environ.get("FASTMTL_AOT") == "all"

DTYPES = {"float": 4, "double": 8, "__nv_bfloat16": 2, "__half": 2}
ARCHITECTURES = (80, 90, 100) if ALL else (80, 90)
# every instantiation that csrc/cuda/combine.cu launches; one per dtype unless all are asked for
CONFIGURATIONS = [
    (dtype, vector, outputs)
    for dtype, size in DTYPES.items()
    for vector in (16 // size, 1)
    for outputs in (1, 2, 3, 4)
    if ALL or (vector > 1 and outputs == 4)
]

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda arch: f"sm_{arch}")
def resources(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Mangled kernel name -> ptxas's report, and under "sass"/"ptx" the code."""
    folder = tmp_path_factory.mktemp("cubin")
    source = folder / "kernels.cu"
    lines = [
        f"template __global__ void combine_fwd_kernel<{dtype}, {vector}, {outputs}>(const CombineParams);"
        for dtype, vector, outputs in CONFIGURATIONS
    ]
    source.write_text('#include "cuda/combine.cuh"\nnamespace fastmtl::cuda {\n' + "\n".join(lines) + "\n}\n")
    arch = request.param
    flags = ["-O3", "-std=c++20", f"-I{ROOT / 'csrc'}", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    half = ["-D__CUDA_NO_HALF_OPERATORS__", "-D__CUDA_NO_HALF_CONVERSIONS__", "-D__CUDA_NO_BFLOAT16_CONVERSIONS__"]
    report = subprocess.run(
        [NVCC, *flags, *half, "-cubin", "-Xptxas=-v,-warn-spills", str(source), "-o", str(folder / "k.cubin")],
        capture_output=True,
        text=True,
    )
    assert report.returncode == 0, report.stderr
    ptx = subprocess.run(
        [NVCC, *flags, *half, "-ptx", str(source), "-o", str(folder / "k.ptx")], capture_output=True, text=True
    )
    assert ptx.returncode == 0, ptx.stderr
    kernels = re.split(r"Compiling entry function '", report.stderr)[1:]
    found = {text.split("'", 1)[0]: text for text in kernels}
    found["ptx"] = (folder / "k.ptx").read_text()
    return found


@needs_nvcc
def test_every_kernel_compiles_without_spills(resources: dict[str, str]) -> None:
    kernels = {name: text for name, text in resources.items() if name != "ptx"}
    assert len(kernels) == len(CONFIGURATIONS)
    for name, text in kernels.items():
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in text, f"{name}: {text}"
        registers = int(re.search(r"Used (\d+) registers", text).group(1))  # type: ignore[union-attr]
        assert registers <= 255


@needs_nvcc
def test_wide_kernels_load_and_store_16_bytes_at_once(resources: dict[str, str]) -> None:
    entries = re.split(r"\.visible \.entry |\.weak \.entry ", resources["ptx"])[1:]
    wide = [entry for entry in entries if not re.search(r"Li1ELi\d", entry.split("(", 1)[0])]
    assert wide
    for entry in wide:
        # 4 x 32 or 2 x 64 bits
        assert re.search(r"ld\.global\S*\.v(4|2)\.\S*(32|64)", entry), entry.split("(", 1)[0]
        assert re.search(r"st\.global\S*\.v(4|2)\.\S*(32|64)", entry), entry.split("(", 1)[0]


def test_extension_needs_libtorch_and_holds_the_architectures() -> None:
    extension = _backend.extension
    if extension is None:
        pytest.skip(f"no compiled extension ({_backend.extension_error})")
    needed = subprocess.run(["readelf", "-d", extension.__file__], capture_output=True, text=True, check=True).stdout
    # dropped, the weak symbol of the CUDA half stays null on a CUDA torch
    assert "[libtorch.so]" in needed
    assert not re.search(r"NEEDED.*(libtorch_python|libtorch_cuda|libcudart)", needed)
    architectures = _backend.build_info()["cuda_architectures"]
    if _backend.build_note("cuda") is None and NVCC is not None and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        assert architectures == [80, 90]
