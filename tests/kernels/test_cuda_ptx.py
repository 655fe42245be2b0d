"""nvcc's PTX of the CUDA kernels, translated to C++ (tests/host/ptx/), in the cases of the run of their bodies.

That the run sees what it should: faults are planted in the PTX. `FASTMTL_AOT=all` (`make aot`) runs every case of
`test_cuda_on_host.py` for every dtype and both architectures, some of every dtype under the checks of races.h, and
plants faults in all kernels.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cases
import host_kernels as host
import pytest
import test_cuda_on_host as on_host
import test_cuda_races as races
import torch
from cases import BankCase, ListCase
from conftest import skip_or_fail
from host.ptx import build, mutations
from host.ptx.faults import CONTROL, DATA, ORDER
from host.ptx.module import Kernel, PtxError, read
from host.ptx.mutations import Fault, Outcome, faults_in, outcome
from host.ptx.translate import translate
from host_kernels import FORWARD, REVERSE, Cut, HostError

from fastmtl.benchmarks.machine_code.kernel_table import kernel_of, nvcc
from fastmtl.ops.gradients import reference
from fastmtl.ops.gradients.order import Draw, drawn_order, order_state

ALL = os.environ.get("FASTMTL_AOT") == "all"
needs_nvcc = pytest.mark.skipif(nvcc() is None, reason="no nvcc")
only_in_aot = pytest.mark.skipif(not ALL, reason="part of `make aot`")
DTYPES = (torch.float32, torch.bfloat16)


def built(how: host.Build) -> Iterator[None]:
    """Inside, the host's launches run these kernels."""
    if host.compiler() is None:
        skip_or_fail("no C++ compiler")
    with host.using(how):
        host.library()
        yield


@pytest.fixture(scope="module")
def translated() -> Iterator[None]:
    yield from built(host.PTX)


def levels(num_tasks: int, dtype: torch.dtype) -> None:
    """Five slots in groups of two, and a drawn order, against one group and the same order, and against the oracle."""
    grads = host.bank_gradients(BankCase(num_tasks, 300, dtype).make())
    state = order_state(7)
    drawn = drawn_order(Draw(3, state.clone()), num_tasks, torch.device("cpu"))
    found = host.solved_gram(grads, None, Cut(64, 2, REVERSE), project=True, key=3, state=state)
    assert state.tolist() == [7, 1]
    expected = host.solved_gram(grads, drawn, Cut(64, 9, FORWARD), project=True)
    for x, y in zip(found, expected, strict=True):
        assert torch.allclose(x, y, rtol=1e-5)
    cases.assert_gram(found[0], cases.bank64(BankCase(num_tasks, 300, dtype)), [dtype], 1.0)
    # of a matrix that was rounded on its way out
    coefficients = reference.pcgrad_coefficients(found[0].double(), drawn)
    assert torch.allclose(found[1], coefficients, rtol=0.0, atol=1e-4 * float(coefficients.abs().max()))


def long_slot(num_tasks: int, dtype: torch.dtype) -> None:
    """More steps than a queue holds, and in float32 more than a float32 sum takes. All rows begin on 16 bytes, without
    which nothing goes through a queue."""
    case = BankCase(num_tasks, 6500 if dtype == torch.float32 else 2600, dtype)
    m = host.gram(host.bank_gradients(case.make()), Cut(6528, 0))
    cases.assert_gram(m, cases.bank64(case), [dtype], 1.0)


def exact(num_tasks: int, dtype: torch.dtype, slots_per_group: int, num_slots: int = 5) -> None:
    """Of whole numbers whose sums no step rounds: the lower halves of float64 numbers count too. An order of fewer
    visits than tasks, so that most coefficients stay what they are at first; then its weights, with and without absent
    tasks."""
    generator = cases.generator_of((num_tasks, slots_per_group, num_slots))
    most = 99 if num_slots == 5 else 9  # float32 holds sums below 2^24
    bank = torch.randint(-most, most + 1, (num_tasks, 64 * num_slots - 20), generator=generator)
    grads = host.bank_gradients(bank.to(dtype))
    m = (bank @ bank.mT).double()
    order = cases.random_order(num_tasks, min(3, num_tasks))
    c = reference.pcgrad_coefficients(m, order)
    cut = Cut(64, slots_per_group, REVERSE)
    found, solved = host.solved_gram(grads, order, cut, project=True)
    assert cut.slots == num_slots and torch.equal(found.double(), m)
    torch.testing.assert_close(solved, c, rtol=1e-12, atol=1e-12)
    for present in (None, on_host.absent_tasks(num_tasks)):
        found, solved = host.solved_gram(grads, order, cut, mean=present is not None, present=present)
        assert torch.equal(found.double(), m)
        expected = on_host.expected_weights(c, present, present is not None)
        torch.testing.assert_close(solved, expected, rtol=1e-12, atol=1e-12)


# so many rows of partial sums that every load of `sum_rows`'s first round has one, by the number of tasks
SUMMED_ROWS = {2: 520, 4: 260, 8: 70, 16: 20, 32: 20, 48: 20, 64: 20, 97: 20}


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
            for columns in (64, 192, 0):  # the first: slots that begin with a parameter
                yield f"gram-{case}-{columns}", bind(on_host.test_gram_of_lists, case, columns)
            yield f"combine-{case}", bind(on_host.test_combine_of_lists, case, 9 if case.num_tasks < 13 else 1)
            yield f"split-{case}", bind(on_host.test_split_combine_of_lists, case)
        # as many tasks as each kernel takes: with fewer, some of its tiles hold no task, and nothing sees a fault there
        for num_tasks in (2, 4, 8, 16, 32, 48, 64):
            # 70 parameters in a slot, of which a batch of pointers holds four
            yield f"many-{num_tasks}-{d}", bind(on_host.test_gram_of_lists, ListCase("many", num_tasks, dtype), 64 * 70)
            yield f"levels-{num_tasks}-{d}", bind(levels, num_tasks, dtype)
            yield f"long-{num_tasks}-{d}", bind(long_slot, num_tasks, dtype)
        for num_tasks, per_group in itertools.product((2, 4, 8, 16, 32, 48, 64, 97), (2, 9)):
            yield f"exact-{num_tasks}-{per_group}-{d}", bind(exact, num_tasks, dtype, per_group)
        for num_tasks, rows in SUMMED_ROWS.items() if ALL else ():
            for per_group in (
                2 + rows // 128,
                rows,
                2 * rows,
            ):  # many rows of groups, of which there are tickets for 256; of slots
                yield f"rows-{num_tasks}-{per_group}-{d}", bind(exact, num_tasks, dtype, per_group, 2 * rows)
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
    for num_tasks in (3, 16, 17, 32, 33, 64, 65, 128):
        yield f"coefficients-{num_tasks}", bind(on_host.test_coefficients, num_tasks, False)
        yield f"no-gradients-{num_tasks}", bind(on_host.test_coefficients_of_a_matrix_of_no_gradients, num_tasks)
    for num_tasks in (3, 17, 33, 66):
        yield f"weights-of-groups-{num_tasks}", bind(on_host.test_pcgrad_weights_of_groups, num_tasks, REVERSE)
    for case in GROUP_CASES:
        yield f"gram-of-groups-{case}", bind(on_host.test_gram_of_groups, case, 64, 2, 3)
    for case in GROUP_CASES[:4]:
        yield f"combine-of-groups-{case}", bind(on_host.test_combine_of_groups, case, 64, 3)
    yield "bad-entries", bind(on_host.test_coefficients_of_bad_entries, 40)
    yield "tables", on_host.test_tables


# every kernel for groups of parameters
GROUP_CASES = [
    *(ListCase("nones", num_tasks, dtype) for num_tasks in (2, 3, 7, 9, 20, 40, 66) for dtype in DTYPES),
    ListCase("mixed_dtypes", 5),
]
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
    kernels = {name for source in host.ptx_sources(host.SOME) for name in build.names_of(source, 90)}
    assert len(kernels) == 47
    assert set().union(*ENTERED.values()) == kernels


# --- the translation itself

HEAD = ".version 8.0\n.target sm_80\n.address_size 64\n"


def kernel_text(body: str) -> str:
    """A kernel `k` of two pointers, which are in %rd0 and %rd1."""
    registers = ".reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<99>; .reg .f32 %f<9>; .reg .b64 %rd<9>;"
    arguments = "ld.param.u64 %rd0, [k_0];\nld.param.u64 %rd1, [k_1];"
    return f"{HEAD}.visible .entry k(.param .u64 k_0, .param .u64 k_1) {{\n{registers}\n{arguments}\n{body}\nret;\n}}\n"


NAN, INF, ONE, TWO, NEXT = "0f7FC00000", "0f7F800000", "0f3F800000", "0f40000000", "0f3F800001"
# what computes %r0 -> its bits
COMPUTED = {
    "add.s32 %r0, -1, 3;": 2,
    "mul.lo.s32 %r0, 65537, 65537;": 0x20001,
    "mul.hi.s32 %r0, -2, 3;": 0xFFFFFFFF,
    "mul.hi.u32 %r0, -2, 3;": 2,
    "mul.wide.s32 %rd2, -2, 3; shr.u64 %rd2, %rd2, 32; cvt.u32.u64 %r0, %rd2;": 0xFFFFFFFF,
    "mul.wide.u32 %rd2, -2, 3; shr.u64 %rd2, %rd2, 32; cvt.u32.u64 %r0, %rd2;": 2,
    "mad.lo.s32 %r0, 65536, 65536, 7;": 7,
    "div.s32 %r0, -7, 2;": 0xFFFFFFFD,
    "rem.s32 %r0, -7, 2;": 0xFFFFFFFF,
    "popc.b32 %r0, 0xF0000001;": 5,
    "mov.b64 %rd2, -1; popc.b64 %r0, %rd2;": 64,
    "min.s32 %r0, -1, 1;": 0xFFFFFFFF,
    "min.u32 %r0, -1, 1;": 1,
    "shl.b32 %r0, 1, 32;": 0,
    "shr.u32 %r0, -1, 33;": 0,
    "shr.s32 %r0, -8, 99;": 0xFFFFFFFF,
    "shf.l.wrap.b32 %r0, 0x80000000, 1, 33;": 3,
    "shf.r.clamp.b32 %r0, 1, 0x12345678, 40;": 0x12345678,
    "prmt.b32 %r0, 0x33221180, 0x77665544, 0x7048;": 0x778044FF,
    "lop3.b32 %r0, 0xF0F0F0F0, 0xCCCCCCCC, 0xAAAAAAAA, 0xE8;": 0xE8E8E8E8,
    "bfi.b32 %r0, 0xFF, 0, 8, 4;": 0xF00,
    "bfi.b32 %r0, 0xFF, 5, 0, 32;": 0xFF,
    "mov.u16 %h0, -2; cvt.s32.s8 %r0, %h0;": 0xFFFFFFFE,
    "mov.u16 %h0, 0x1FE; cvt.u32.u16 %r0, %h0;": 0x1FE,
    "mov.u16 %h0, 1; mov.u16 %h1, 2; mov.b32 %r0, {%h0, %h1};": 0x20001,
    "mov.b32 {%h0, %h1}, 0x50007; cvt.u32.u16 %r0, %h1;": 5,
    "cvt.rzi.s32.f32 %r0, 0fC0200000;": 0xFFFFFFFE,
    f"cvt.rzi.s32.f32 %r0, {NAN};": 0,
    f"cvt.rzi.s32.f32 %r0, {INF};": 0x7FFFFFFF,
    "cvt.rzi.u32.f32 %r0, 0fBF800000;": 0,
    "cvt.rn.f32.s32 %f0, 16777217; mov.b32 %r0, %f0;": 0x4B800000,
    "cvt.rn.bf16.f32 %h0, 0f3F808000; cvt.u32.u16 %r0, %h0;": 0x3F80,
    "cvt.rn.f16.f32 %h0, 0f477FF000; cvt.u32.u16 %r0, %h0;": 0x7C00,
    f"fma.rn.f32 %f0, {NEXT}, {NEXT}, 0fBF800002; mov.b32 %r0, %f0;": 0x28800000,
    f"min.f32 %f0, {NAN}, {TWO}; mov.b32 %r0, %f0;": 0x40000000,
    f"neg.f32 %f0, {ONE}; mov.b32 %r0, %f0;": 0xBF800000,
    # true: 1
    **{
        f"setp.{how}.f32 %p0, {x}, {y}; selp.u32 %r0, 1, 0, %p0;": result
        for how, x, y, result in (
            ("lt", ONE, TWO, 1),
            ("lt", NAN, TWO, 0),
            ("ltu", NAN, TWO, 1),
            ("geu", ONE, TWO, 0),
            ("geu", ONE, NAN, 1),
            ("ne", NAN, NAN, 0),
            ("neu", NAN, NAN, 1),
            ("eq", NAN, NAN, 0),
            ("equ", NAN, ONE, 1),
            ("num", ONE, ONE, 1),
            ("nan", ONE, NAN, 1),
        )
    },
    "setp.lt.s32 %p0, -1, 1; selp.u32 %r0, 1, 0, %p0;": 1,
    "setp.lt.u32 %p0, -1, 1; selp.u32 %r0, 1, 0, %p0;": 0,
    "mov.pred %p1, 1; setp.eq.and.s32 %p0|%p1, 1, 2, %p1; selp.u32 %r0, 1, 2, %p1;": 1,
    "mov.u32 %r0, 4; mov.pred %p0, 0; @!%p0 mov.u32 %r0, 5;": 5,
    # lane 0's
    "mov.u32 %r1, %tid.x; shfl.sync.bfly.b32 %r0, %r1, 5, 31, -1;": 5,
    "mov.u32 %r1, %tid.x; shfl.sync.idx.b32 %r0, %r1, 9, 31, -1;": 9,
    "mov.u32 %r1, %tid.x; shfl.sync.idx.b32 %r0, %r1, 9, 6175, -1;": 1,
    "mov.u32 %r1, %tid.x; shfl.sync.down.b32 %r0, %r1, 3, 31, -1;": 3,
    "mov.u32 %r1, %tid.x; shfl.sync.up.b32 %r0|%p0, %r1, 1, 0, -1; selp.u32 %r0, 1, 2, %p0;": 2,
    "mov.u32 %r1, %tid.x; setp.gt.u32 %p0, %r1, 3; vote.sync.ballot.b32 %r0, %p0, -1;": 0xFFFFFFF0,
    "mov.u32 %r1, %tid.x; redux.sync.add.s32 %r0, %r1, -1;": 496,
}


@needs_nvcc
def test_instructions(translated: None, tmp_path: Path) -> None:
    """Edges of the PTX ISA's definitions, lane 0 of a warp."""
    store = "mov.u32 %r9, %tid.x; setp.eq.u32 %p8, %r9, 0; @%p8 st.global.u32 [%rd0+{}], %r0;"
    body = "\n".join(f"{text}\n{store.format(4 * k)}" for k, text in enumerate(COMPUTED))
    out = torch.zeros(len(COMPUTED), dtype=torch.int32)
    host.run_ptx(kernel_text(body), [out, out], tmp_path)
    found = dict(zip(COMPUTED, (x % 2**32 for x in out.tolist()), strict=True))
    assert {text: hex(found[text]) for text in COMPUTED} == {text: hex(x) for text, x in COMPUTED.items()}


@needs_nvcc
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("ld.global.u32 %r0, [%rd0+2];", "a misaligned load"),
        ("ld.global.v2.u32 {%r0, %r1}, [%rd0+4];", "a misaligned load"),
        ("ld.global.u32 %r0, [8];", "a load at address 8"),
        (".shared .align 4 .b8 s[8];\nst.shared.u32 [s+128], 1;", "a store beyond the 128 bytes of shared memory"),
        ("cp.async.ca.shared.global [0], [%rd0], 16;", "a copy beyond shared memory"),
        (".shared .align 16 .b8 s[16];\ncp.async.ca.shared.global [s], [%rd0], 16;", "nobody waits for"),
        ("ld.param.u64 %rd2, [k_1+8];", "a load beside the arguments"),
        (
            "mov.u32 %r1, %tid.x; setp.eq.u32 %p0, %r1, 3; @%p0 bra E; bar.warp.sync -1; E:",
            "not all of its threads",
        ),
        ("shfl.sync.bfly.b32 %r0, %r1, 5, 31, 1;", "some lanes only"),
        ("st.global.u32 [%rd0], 1; griddepcontrol.wait;", "a store before the launch in front is waited for"),
    ],
)
def test_what_a_kernel_does_wrong_is_seen(body: str, said: str, translated: None, tmp_path: Path) -> None:
    out = torch.zeros(64, dtype=torch.int64)
    with pytest.raises(HostError, match=said):
        host.run_ptx(kernel_text(body), [out, out], tmp_path)


@pytest.mark.parametrize(
    "instruction",
    [
        "wgmma.wait_group.sync.aligned 0",
        "mbarrier.init.shared.b64 [0], 1",
        "cp.async.bulk.prefetch.L2.global [%rd0], 16",
        "fence.proxy.async",
        "bar.sync 1, 64",
        "add.sat.s32 %r0, %r0, 1",
        "add.rz.f32 %f0, %f0, %f0",
        "ld.acquire.gpu.global.u32 %r0, [%rd0]",
        "atom.global.acquire.gpu.add.u32 %r0, [%rd0], 1",
        "mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%f0}, {%r0}, {%r0}, {%f0}",
        "cvt.rz.f16.f32 %h0, %f0",
        "mov.u32 %r0, %nothing",
    ],
)
def test_what_is_not_known_is_named(instruction: str) -> None:
    (kernel,) = read(kernel_text(f"{instruction};"))
    with pytest.raises(PtxError, match=instruction.split()[0].replace(".", r"\.")):
        translate(kernel)


# --- races, and faults that are planted


@pytest.fixture(scope="module")
def under_races() -> Iterator[None]:
    yield from built(host.PTX_RACES)


@pytest.fixture
def one_thread(threads: None) -> None:
    torch.set_num_threads(1)  # a forked process has no others


@needs_nvcc
@pytest.mark.parametrize("case", races.CASES)
def test_no_race(case: str, under_races: None) -> None:
    races.CASES[case]()


def cases_of(kernel: Kernel, chosen: dict[str, Callable[[], None]]) -> dict[str, Callable[[], None]]:
    """Those in which the kernel runs."""
    found = {}
    for name, case in chosen.items():
        entered()
        case()
        if kernel.name in entered():
            found[name] = case
    return found


def faulty_kernel(name: str) -> Kernel:
    """The one of `host.FAULTY` of that name."""
    kernels = (kernel for kernel in build.kernels_of("kernels_f32", 90) if re.search(host.FAULTY, kernel.name))
    (found,) = (kernel for kernel in kernels if name in kernel.name)
    return found


# lines of csrc whose faults no case can tell of -> why
EXPLAINED = {
    "__syncthreads();  // before another round": "to 64 tasks there is none, and a barrier is before the redo",
    "seen[w] |= __shfl_xor_sync": "a false alarm, after which the path for unusual orders gives the same numbers",
    "distinct += __popc": "a false alarm, see above",
    "count += __shfl_xor_sync": "a false alarm, see above",
    "numbers[e] = static_cast<Number>": "the ranks do not add up, and all is done again with whole numbers",
}


@functools.cache
def _lines(name: str) -> list[str]:
    (file,) = (host.ROOT / "csrc").rglob(name)
    return file.read_text().splitlines()


def explanation(fault: Fault) -> str | None:
    file, _, line = fault.right.source.partition(":")
    if not line or not list((host.ROOT / "csrc").rglob(file)):
        return None
    text = _lines(file)[int(line) - 1]
    return next((why for piece, why in EXPLAINED.items() if piece in text), None)


class Tried:
    """Faults of a kernel, tried one by one."""

    def __init__(
        self, faults: Sequence[Fault], chosen: dict[str, Callable[[], None]], seconds: int = mutations.SECONDS
    ) -> None:
        self.found: list[tuple[Fault, Outcome]] = [(f, outcome(host.library(), f, chosen, seconds)) for f in faults]

    @property
    def not_reached(self) -> list[str]:
        return [str(fault) for fault, one in self.found if not one.reached]

    @property
    def not_seen(self) -> list[str]:
        """Whose instruction is run, that no case tells of, and that `EXPLAINED` does not name."""
        return [str(fault) for fault in self._silent if explanation(fault) is None]

    @property
    def explained(self) -> int:
        return len(self._silent) - len(self.not_seen)

    @property
    def _silent(self) -> list[Fault]:
        return [fault for fault, one in self.found if one.reached and not one.seen]

    def __str__(self) -> str:
        counts = (len(self.not_reached), "not reached"), (self.explained, "explained"), (len(self.not_seen), "not seen")
        lines = [", ".join([f"{len(self.found)} tried", *(f"{count} {what}" for count, what in counts)])]
        return "\n  ".join(lines + [f"not seen: {x}" for x in self.not_seen])


SPLIT = [f"split-{num_tasks}-{layout}-float32" for num_tasks in (8, 50) for layout in cases.LAYOUTS]
SPLIT += [f"split-{ListCase('nones', num_tasks)}" for num_tasks in (2, 12, 40)]
QUEUE = ["long-16-float32", "levels-16-float32", "many-16-float32", f"gram-{ListCase('nones', 12)}-192"]


# a barrier left out, a copy that is not waited for or not committed, a ticket without release and acquire
@needs_nvcc
@pytest.mark.parametrize(
    ("name", "chosen", "least"),
    [("combine_split_kernel", SPLIT, 2), ("gram_mma_kernel", QUEUE, 15)],
    ids=["combine_split", "gram_mma"],
)
def test_faults_of_order_are_seen(
    name: str, chosen: list[str], least: int, under_races: None, one_thread: None
) -> None:
    faults = faults_in(faulty_kernel(name), ORDER)
    tried = Tried(faults, {**{one: CASES[one] for one in chosen}, **races.CASES}, seconds=5)
    assert tried.not_seen == []
    assert len(tried.found) >= least and tried.not_reached == []


# a store, a copy, a shuffle or a product left out; a guard removed, a comparison with another edge
@needs_nvcc
def test_faults_of_value_are_seen(translated: None, one_thread: None) -> None:
    kernel, chosen = faulty_kernel("combine_split_kernel"), {one: CASES[one] for one in SPLIT}
    data = Tried(faults_in(kernel, DATA)[::4], chosen, seconds=2)
    assert len(data.found) >= 5 and data.not_seen == []
    control = Tried(faults_in(kernel, CONTROL)[::16], chosen, seconds=2)
    # some only steer between copies of a loop that nvcc has unrolled, which do the same
    assert len(control.not_seen) <= 0.4 * len(control.found)


# --- everything, in `make aot`


@needs_nvcc
@only_in_aot
@pytest.mark.parametrize("arch", host.PTX_EVERY)
def test_every_case_of_the_host_run(arch: int) -> None:
    """All dtypes, in a process of its own."""
    environment = {**os.environ, "FASTMTL_HOST": host.PTX_EVERY[arch].name}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", on_host.__file__, "-m", "not slow"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


@needs_nvcc
@only_in_aot
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.short)
def test_no_race_of_any_dtype(dtype: torch.dtype) -> None:
    with host.using(host.PTX_EVERY_RACES):
        for num_tasks in (2, 4, 8, 12, 16, 20, 32, 40, 48, 64, 66):
            levels(num_tasks, dtype)
            long_slot(num_tasks, dtype)
            on_host.test_gram_of_lists(ListCase("many", num_tasks, dtype), 192)
            on_host.test_pcgrad(BankCase(num_tasks, 259, dtype), False)
            on_host.test_combine_of_lists(ListCase("nones", num_tasks, dtype), 9)
            on_host.test_split_combine_of_lists(ListCase("nones", num_tasks, dtype))


EVERY_KERNEL = [f"kernels_{dtype}" for dtype in host.SOME] + ["kernels_solve", "tables"]
# what is tried of each kernel: all that is about order, which is checked for races, and of the others every so many
MUTATIONS = {ORDER: (host.PTX_MUTATIONS_RACES, 1), DATA: (host.PTX_MUTATIONS, 20), CONTROL: (host.PTX_MUTATIONS, 50)}


@needs_nvcc
@only_in_aot
@pytest.mark.parametrize("kind", MUTATIONS)
@pytest.mark.parametrize("source", EVERY_KERNEL)
def test_mutations(source: str, kind: str, one_thread: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints the faults that no case tells of; docs/kernels/gpu-evidence.md says what they are."""
    how, every = MUTATIONS[kind]
    not_seen: list[str] = []
    with host.using(how):
        for kernel in build.kernels_of(source, 90):
            tried = Tried(faults_in(kernel, kind)[::every], cases_of(kernel, {**races.CASES, **CASES}))
            with capsys.disabled():
                print(f"\n{kernel_of(kernel.name)}, {kind}: {tried}")
            not_seen += tried.not_seen
    assert kind != ORDER or not_seen == []
