"""nvcc's PTX of the CUDA kernels, translated to C++ (tests/host/ptx/), in the cases of the run of their bodies.

That the run sees what it should: faults are planted in the PTX. `FASTMTL_AOT=all` (`make aot`) runs every case of
`test_cuda_on_host.py` for every dtype and both architectures, the cases of `test_cuda_races.py` under its checks, and
all faults of tests/host/ptx/mutations.py.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import cases
import host_kernels as host
import pytest
import test_cuda_on_host as on_host
import test_cuda_races as races
import torch
from cases import BankCase, ListCase
from conftest import skip_or_fail
from host.ptx import build, instructions, module, translate
from host.ptx.faults import faults_of
from host_kernels import FORWARD, REVERSE

from fastmtl.benchmarks.kernel_table import kernel_of, nvcc

ALL = os.environ.get("FASTMTL_AOT") == "all"
needs_nvcc = pytest.mark.skipif(nvcc() is None, reason="no nvcc")
only_in_aot = pytest.mark.skipif(not ALL, reason="part of `make aot`")
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module")
def translated() -> Iterator[None]:
    if host.compiler() is None:
        skip_or_fail("no C++ compiler")
    with host.using(host.PTX):
        host.library()
        yield


def _cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """A few of each test, so that every kernel runs, with whole and with narrow loads, by banks and by lists."""
    bind = functools.partial
    for dtype in DTYPES:
        d = cases.short(dtype)
        for num_tasks in (1, 2, 3, 4, 5, 8, 9, 16, 17, 24, 33, 48, 50, 65, 97):
            yield f"gram-{num_tasks}-{d}", bind(on_host.test_gram_of_a_bank, num_tasks, dtype)
        for num_tasks, num_columns in ((3, 65), (8, 1000), (16, 127), (66, 131)):
            for layout in cases.LAYOUTS:
                test = bind(on_host.test_gram_of_a_bank_of_any_strides, num_tasks, num_columns, layout, dtype)
                yield f"gram-{num_tasks}-{layout}-{d}", test
        for num_tasks, task in ((3, 1), (16, 0), (20, 19)):
            test = bind(on_host.test_what_is_not_finite_shows, num_tasks, task, torch.nan, dtype)
            yield f"not-finite-{num_tasks}-{d}", test
        for num_tasks, num_out in ((1, 1), (8, 1), (17, 3), (33, 9), (128, 1)):
            yield f"combine-{num_tasks}-{num_out}-{d}", bind(on_host.test_combine_of_a_bank, num_tasks, num_out, dtype)
        for layout in cases.LAYOUTS:
            test = bind(on_host.test_combine_of_a_bank_of_any_strides, 9, 1000, 1, layout, dtype)
            yield f"combine-9-{layout}-{d}", test
            for num_tasks, num_columns in ((8, 257), (50, 770)):
                test = bind(on_host.test_split_combine_of_a_bank, num_tasks, num_columns, layout, dtype)
                yield f"split-{num_tasks}-{layout}-{d}", test
        for offset in (0, 1):
            yield f"in-place-{offset}-{d}", bind(on_host.test_combine_in_place, dtype, offset)
        lists = (ListCase("nones", 2, dtype), ListCase("nones", 12, dtype), ListCase("nones", 40, dtype))
        for case in (*lists, ListCase("dense", 17, dtype), ListCase("mixed_layouts", 33, dtype)):
            for columns in (192, 0):
                yield f"gram-{case}-{columns}", bind(on_host.test_gram_of_lists, case, columns)
            yield f"combine-{case}", bind(on_host.test_combine_of_lists, case, 9)
            yield f"split-{case}", bind(on_host.test_split_combine_of_lists, case)
        for num_tasks in (2, 5, 17):
            case = BankCase(num_tasks, 259, dtype)
            yield f"pcgrad-{case}", bind(on_host.test_pcgrad, case, False)
    yield "gram-mixed_dtypes", bind(on_host.test_gram_of_lists, ListCase("mixed_dtypes", 3), 192)
    yield "gram-many", bind(on_host.test_gram_of_lists, ListCase("many", 3), 64 * 70)
    yield "scales", bind(on_host.test_layers_of_very_different_scale, 20)
    for case in (BankCase(3, 2000), BankCase(16, 2000, torch.bfloat16), BankCase(66, 700)):
        yield f"orders-{case}", bind(on_host.test_the_order_of_blocks_does_not_matter, case, 3)
    for num_tasks in (1, 7, 16, 33, 64, 65):
        yield f"fused-{num_tasks}", bind(on_host.test_fused_solver, num_tasks, torch.float32)
        yield f"drawn-{num_tasks}", bind(on_host.test_drawn_orders, num_tasks, REVERSE)
    for num_tasks in (3, 16, 17, 33, 65):
        yield f"coefficients-{num_tasks}", bind(on_host.test_coefficients, num_tasks, False)
        yield f"no-gradients-{num_tasks}", bind(on_host.test_coefficients_of_a_matrix_of_no_gradients, num_tasks)
    yield "bad-entries", bind(on_host.test_coefficients_of_bad_entries, 40)
    yield "tables", on_host.test_tables


CASES = dict(_cases())
ENTERED: dict[str, set[str]] = {}  # case -> kernels


def entered() -> set[str]:
    """The kernels of PTX that ran since the last call."""
    return set(host.ptx_entered())


@needs_nvcc
@pytest.mark.parametrize("case", CASES)
def test_ptx(case: str, translated: None) -> None:
    entered()
    CASES[case]()
    ENTERED[case] = entered()


@needs_nvcc
def test_every_kernel_ran(translated: None) -> None:
    if set(ENTERED) != set(CASES):
        pytest.skip("some cases were not run")
    sources = [*(f"kernels_{dtype}" for dtype in host.SOME), "kernels_solve", "tables"]
    kernels = {kernel.name for source in sources for kernel in build.kernels_of(source, 90)}
    assert len(kernels) == 27
    assert set().union(*ENTERED.values()) == kernels
