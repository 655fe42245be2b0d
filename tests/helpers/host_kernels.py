"""The bodies of the CUDA kernels on CPU tensors: builds `tests/host/` with the host compiler and calls it.

Built in several ways, of which FASTMTL_HOST or `using` chooses one: see `Build`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import dataclasses
import fcntl
import functools
import hashlib
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from host.ptx import build as ptx
from paths import ROOT
from torch import Tensor

from fastmtl.core.gradient_rows import GradientRows, accumulate_dtype, present_params

HOST = ROOT / "tests" / "host"
CUDA = ROOT / "csrc" / "cuda"
SOURCES = [HOST / "kernels_on_host.cpp", *sorted((CUDA / "gradients").glob("kernels_*.cu"))]
TASK_SOURCES = [
    *(HOST / f"task_{name}_on_host.cpp" for name in ("weights", "functions")),
    *sorted((CUDA / "task_weights").glob("kernels_*.cu")),
]
FOLDER = ROOT / "build" / "host"
# a struct of one number and that number are the same memory to the kernels
FLAGS = ["-std=c++20", "-fPIC", "-fno-strict-aliasing", "-Wall", "-Wno-unknown-pragmas"]
INCLUDE = [f"-I{ROOT / 'csrc'}", f"-I{HOST}"]


@dataclass(frozen=True)
class Build:
    """A way to build the kernels: flags for the kernels and their driver, which are `sources`; sources compiled without
    these; objects that a C++ compiler makes elsewhere."""

    name: str
    flags: tuple[str, ...] = ("-O1", "-g0")
    sources: tuple[Path, ...] = tuple(SOURCES)
    more_sources: tuple[Path, ...] = ()
    more_flags: tuple[str, ...] = ()
    objects: Callable[[str], list[Path]] | None = field(default=None, repr=False)


PLAIN = Build("plain")
# the kernels of the task convolution, and a driver of their own
TASK = Build("task", sources=tuple(TASK_SOURCES))
# under the address sanitizer, which must be loaded before Python
SANITIZED = Build("sanitized", ("-O1", "-g1", "-fsanitize=address", "-fno-omit-frame-pointer"))
# under the checks of races.h
RACES = Build(
    "races",
    ("-O1", "-g1", "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0", "-DFASTMTL_RACES"),
    more_sources=(HOST / "races.cpp",),
    more_flags=("-O2", "-g0", "-DFASTMTL_RACES"),
)


def _ptx_runtime(name: str, races: bool = False) -> Build:
    """What kernels of PTX call, without any."""
    # a kernel's virtual registers, and 32 KiB of arguments more than once
    flags = ("-g0", "-DFASTMTL_STACK_KIB=512", *(["-DFASTMTL_RACES"] if races else []))
    more = (HOST / "ptx" / "ptx.cpp", *([HOST / "races.cpp"] if races else []))
    return Build(name, ("-O0", *flags), (), more, ("-O2", *flags))


def ptx_sources(dtypes: Sequence[str]) -> list[str]:
    """What is compiled to PTX for these dtypes, without the suffix."""
    of_dtypes = [f"kernels_{groups}{dtype}" for dtype in dtypes for groups in ("", "groups_")]
    return [*of_dtypes, "kernels_solve", "tables"]


def task_ptx_sources(dtypes: Sequence[str]) -> list[str]:
    """The same for the kernels of the task convolution."""
    return [*(f"kernels_task_{dtype}" for dtype in dtypes), "kernels_task"]


def _in_place(
    name: str,
    sources: Sequence[Path],
    compiled: Sequence[str],
    arch: int,
    races: bool = False,
    faulty: str | None = None,
) -> Build:
    """Kernels as nvcc's PTX has them, of the sources `compiled`, in the place of their bodies: unoptimised, the driver
    calls each of them by its name."""
    objects = functools.partial(ptx.objects, compiled, arch, faulty)
    return dataclasses.replace(_ptx_runtime(name, races), sources=tuple(sources), objects=objects)


def _of_ptx(name: str, dtypes: Sequence[str], arch: int, races: bool = False, faulty: str | None = None) -> Build:
    return _in_place(name, SOURCES, ptx_sources(dtypes), arch, races, faulty)


SOME, EVERY = ("f32", "bf16"), ("f32", "f64", "bf16", "f16")
# kernels that tests plant faults in: two, or all of them
FAULTY = "combine_split_kernelIfE|gram_mma_kernelIfLi2E"
# for Triton's kernels, each in a library of its own
PTX_RUNTIME = _ptx_runtime("ptx_runtime", races=True)
PTX = _of_ptx("ptx", SOME, 90, faulty=FAULTY)
PTX_RACES = _of_ptx("ptx_races", SOME, 90, races=True, faulty=FAULTY)
PTX_MUTATIONS = _of_ptx("ptx_mutations", SOME, 90, faulty="")
PTX_MUTATIONS_RACES = _of_ptx("ptx_mutations_races", SOME, 90, races=True, faulty="")
PTX_EVERY = {arch: _of_ptx(f"ptx_every_{arch}", EVERY, arch) for arch in (80, 90)}
PTX_EVERY_RACES = _of_ptx("ptx_every_races", EVERY, 90, races=True)
TASK_FAULTY = (
    "task_(product_kernelI13__nv_bfloat16Li2|pieces_kernelI13__nv_bfloat16Li2|stage_kernelI13__nv_bfloat16Li2)E"
)
TASK_PTX = _in_place("task_ptx", TASK_SOURCES, task_ptx_sources(SOME), 80, races=True, faulty=TASK_FAULTY)
TASK_PTX_EVERY = {
    arch: _in_place(f"task_ptx_every_{arch}", TASK_SOURCES, task_ptx_sources(("f32", "bf16", "f16")), arch, races=True)
    for arch in (80, 90)
}
BUILDS = {build.name: build for build in (PLAIN, SANITIZED, RACES, *PTX_EVERY.values())}
_chosen = BUILDS[os.environ.get("FASTMTL_HOST", "plain")]
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# elements before and after each output that must not be written
MARGIN = 64

FORWARD, REVERSE = 0, 1


class HostError(RuntimeError):
    """What the driver found: a barrier not reached, a ticket left behind, a write beyond the workspace."""


def compiler() -> str | None:
    wanted = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, wanted)), None)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def _flags(cxx: str) -> list[str]:
    """g++ makes variables in inline functions and templates one for all libraries of a process, however these are
    loaded: a kernel's shared memory of one build would be that of another, which may be smaller."""
    return FLAGS if "clang" in Path(cxx).name else [*FLAGS, "-fno-gnu-unique"]


@contextlib.contextmanager
def _alone(name: str) -> Iterator[None]:
    """Of several processes that want a build one makes it, and the others find it."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _units(sources: Sequence[Path], folder: Path) -> list[Path]:
    """What is compiled as one, so that headers are read and templates made once: the kernels of a dtype with those for
    groups, the solvers, the driver."""
    units: dict[str, list[Path]] = {}
    for source in sources:
        name = source.stem.removeprefix("kernels_").removeprefix("groups_")
        units.setdefault("solvers" if name in ("solve", "gradvac", "methods") else name, []).append(source)
    for name, together in units.items():
        (folder / f"{name}.cpp").write_text("".join(f'#include "{source}"\n' for source in together))
    return [folder / f"{name}.cpp" for name in units]


def build(how: Build) -> Path:
    """The shared library, compiled if its sources are not those of the last time."""
    with _alone(how.name):
        return _build(how)


def _build(how: Build) -> Path:
    cxx = compiler()
    assert cxx is not None
    made = how.objects(cxx) if how.objects is not None else []
    digest = hashlib.sha256(f"{cxx} {_flags(cxx)} {how} {[one.name for one in made]}".encode())
    files = {f for folder in ("csrc/common", "csrc/cuda", "tests/host") for f in (ROOT / folder).rglob("*")}
    for file in sorted(f for f in files if f.suffix in (".h", ".cuh", ".inc", ".cu", ".cpp")):
        digest.update(file.read_bytes())
    library = FOLDER / f"{how.name}-{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library
    work = FOLDER / f"{library.stem}.{os.getpid()}"
    work.mkdir(parents=True)
    # of two definitions of a function in a header the linker takes the first one
    sources = [*((s, how.more_flags) for s in how.more_sources), *((s, how.flags) for s in _units(how.sources, work))]
    objects = [work / f"{source.stem}.o" for source, _ in sources]
    compiles = [
        [cxx, *_flags(cxx), *flags, *INCLUDE, "-x", "c++", "-c", str(source), "-o", str(target)]
        for (source, flags), target in zip(sources, objects, strict=True)
    ]
    sanitizer = ["-fsanitize=address"] if how is SANITIZED else []
    try:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            list(pool.map(_run, compiles))
        _run([cxx, *sanitizer, "-shared", *map(str, [*made, *objects]), "-o", str(work / "kernels.so")])
        for old in FOLDER.glob(f"{how.name}-*.so"):
            old.unlink(missing_ok=True)
        (work / "kernels.so").replace(library)
    finally:
        shutil.rmtree(work)
    return library


@functools.cache
def _loaded(how: Build) -> ctypes.CDLL:
    found = ctypes.CDLL(str(build(how)))
    if how.sources:
        found.host_error.restype = ctypes.c_char_p
    if HOST / "ptx" / "ptx.cpp" in how.more_sources:
        found.ptx_entered.restype = found.ptx_launch.restype = ctypes.c_char_p
    if HOST / "races.cpp" in how.more_sources:
        found.races_sites.restype = ctypes.c_char_p
    return found


def library() -> ctypes.CDLL:
    return _loaded(_chosen)


def chosen() -> Build:
    return _chosen


@contextlib.contextmanager
def using(how: Build) -> Iterator[None]:
    """The kernels in another build."""
    global _chosen
    before, _chosen = _chosen, how
    try:
        yield
    finally:
        _chosen = before


def _source_of(offset: str) -> str:
    """The line of source behind an offset in the library."""
    tool = shutil.which("addr2line")
    if tool is None:
        return f"offset {offset}"
    where = hex(int(offset, 16) - 1)  # within the call that returns there
    command = [tool, "-e", library()._name, "-i", where]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")
    # the innermost line that is a kernel's
    found = next((line for line in lines if "/csrc/" in line), lines[0])
    return re.sub(r"\s.*", "", found).removeprefix(f"{ROOT}/")


def _checked(status: int) -> None:
    if status != 0:
        text = library().host_error().decode()
        raise HostError(re.sub(r"\+(0x[0-9a-f]+)", lambda found: _source_of(found[1]), text))


_int64 = ctypes.c_int64
_int64s = ctypes.POINTER(ctypes.c_int64)


class _HostRows(ctypes.Structure):
    _fields_ = (
        ("num_tasks", _int64),
        ("num_params", _int64),
        ("num_out", _int64),
        ("is_bank", _int64),
        ("numel", _int64s),
        ("dtype", _int64s),
        ("row", _int64s),
        ("stride", _int64s),
        ("out", _int64s),
    )


class Cut(ctypes.Structure):
    """How a call is cut and in which order its blocks run; 0: as csrc/cuda/gradients/plan.h says, in rising order."""

    _fields_ = (
        ("columns_per_slot", _int64),
        ("slots_per_group", _int64),
        ("schedule", ctypes.c_uint64),
        ("launches", _int64),
        ("slots", _int64),
        ("groups", _int64),
    )


class _HostSolve(ctypes.Structure):
    _fields_ = (
        ("project", _int64),
        ("include_self", _int64),
        ("mean", _int64),
        ("order", ctypes.c_void_p),
        ("num_visits", _int64),
        ("key", ctypes.c_uint64),
        ("state", ctypes.c_void_p),
        ("absent", ctypes.c_uint64 * 2),
        ("result", ctypes.c_void_p),
    )


def _array(values: Sequence[int]) -> Any:
    return (ctypes.c_int64 * max(len(values), 1))(*values)


class Output:
    """A NaN-filled dense tensor amid NaN; `rows`: K rows that lie apart by more than their length."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, rows: int | None = None, offset: int = 0) -> None:
        numel = math.prod(shape)
        pitch = numel if rows is None else numel + (-numel) % 16 + 16
        total = pitch * (rows or 1)
        # 16 bytes: where memory begins, and with it the output if `offset` is 0
        self.memory = torch.full((2 * MARGIN + total + offset,), torch.nan, dtype=dtype)
        inner = self.memory[MARGIN + offset : MARGIN + offset + total]
        self.tensor = inner.view(shape) if rows is None else inner.view(rows, pitch)[:, :numel]
        self.pieces = [self.tensor] if rows is None else list(self.tensor.unbind(0))

    def check(self) -> None:
        """Nothing beside the tensor was written."""
        rest = self.memory.clone()
        start = self.tensor.storage_offset()
        rest.as_strided(self.tensor.shape, self.tensor.stride(), start).fill_(torch.nan)
        assert rest.isnan().all(), "written beside an output"


@dataclass
class Gradients:
    """Rows in the form that the driver takes; keeps alive what it points to."""

    c: _HostRows
    num_tasks: int
    dtypes: list[torch.dtype]
    keep: list[Any]


def _row(x: Tensor) -> Tensor:
    """`[numel]` in logical order: a view where one stride will do, as csrc/common/rows.cpp has it."""
    if x.is_contiguous():
        return x.reshape(-1)
    if sum(size > 1 for size in x.shape) == 1:
        return x.squeeze()
    return x.contiguous().reshape(-1)


def _gradients(
    num_tasks: int, columns: list[dict[int, Tensor]], out: list[list[Tensor]], is_bank: bool = False
) -> Gradients:
    """`columns[i][t]`: parameter i of task t, 1-D; `out[i]`: its K outputs, 1-D."""
    dtypes = [next(iter(column.values())).dtype for column in columns]
    zero = torch.zeros(0)
    rows = [column.get(t, zero) for column in columns for t in range(num_tasks)]
    arrays = [
        _array([next(iter(column.values())).numel() for column in columns]),
        _array([DTYPES[d] for d in dtypes]),
        # an empty tensor's memory may begin nowhere: a row that exists has some address
        _array([x.data_ptr() or 1 if x is not zero else 0 for x in rows]),
        _array([x.stride(0) if x.numel() > 1 else 1 for x in rows]),
        _array([x.data_ptr() for pieces in out for x in pieces]),
    ]
    pointers = [ctypes.cast(a, _int64s) for a in arrays]
    c = _HostRows(num_tasks, len(columns), len(out[0]) if out else 0, is_bank, *pointers)
    return Gradients(c, num_tasks, dtypes, [arrays, rows, out])


def bank_gradients(bank: Tensor, out: Sequence[Tensor] = ()) -> Gradients:
    """`bank`: `[T, P]` of any strides; `out`: K tensors `[P]` at equal distances."""
    return _gradients(bank.shape[0], [dict(enumerate(bank.unbind(0)))], [list(out)], is_bank=True)


def list_gradients(rows: GradientRows, out: Sequence[Sequence[Tensor]] = ()) -> Gradients:
    """`out[k][i]`: output k of present parameter i, contiguous."""
    position = {param: i for i, param in enumerate(present_params(rows.index, rows.num_params))}
    columns: list[dict[int, Tensor]] = [{} for _ in position]
    for x, k in zip(rows.tensors, rows.index, strict=True):
        columns[position[k % rows.num_params]][k // rows.num_params] = _row(x)
    pieces = [[outs[i].reshape(-1) for outs in out] for i in range(len(columns))]
    return _gradients(rows.num_tasks, columns, pieces)


def _solve(
    num_tasks: int,
    result: Tensor,
    order: Tensor | None,
    *,
    key: int = 0,
    state: Tensor | None = None,
    include_self: bool = False,
    mean: bool = False,
    present: Sequence[bool] | None = None,
) -> _HostSolve:
    absent = [0, 0]
    for t, here in enumerate(present or ()):
        absent[t // 64] |= (not here) << (t % 64)
    if order is not None:
        assert order.dtype == torch.int64 and order.is_contiguous() and order.shape[0] == num_tasks
    return _HostSolve(
        result.dim() == 2,
        include_self,
        mean,
        # an order of no visits has no memory, and is an order all the same
        None if order is None else order.data_ptr() or ctypes.addressof(ctypes.c_int64()),
        0 if order is None else order.shape[1],
        key % (1 << 64),
        None if state is None else state.data_ptr(),
        (ctypes.c_uint64 * 2)(*absent),
        result.data_ptr(),
    )


def gram(grads: Gradients, cut: Cut | None = None) -> Tensor:
    """The Gram matrix, `[T, T]` float32 or float64."""
    m = Output((grads.num_tasks, grads.num_tasks), accumulate_dtype(grads.dtypes))
    status = library().host_gram(
        ctypes.byref(grads.c),
        ctypes.byref(cut or Cut()),
        None,
        ctypes.c_void_p(m.tensor.data_ptr()),
        _int64(m.tensor.dtype == torch.float64),
    )
    _checked(status)
    m.check()
    return m.tensor


def solved_gram(
    grads: Gradients, order: Tensor | None, cut: Cut | None = None, *, project: bool = False, **options: Any
) -> tuple[Tensor, Tensor]:
    """The Gram matrix, and the weights `[T]` float64 or (`project`) the coefficients `[T, T]`, of one call.

    order: `[T, K]` int64, or None: drawn from `key` and `state`. options: as `_solve` takes them.
    """
    T = grads.num_tasks
    m = Output((T, T), accumulate_dtype(grads.dtypes))
    w = Output((T, T) if project else (T,), torch.float64)
    solve = _solve(T, w.tensor, order, **options)
    status = library().host_gram(
        ctypes.byref(grads.c),
        ctypes.byref(cut or Cut()),
        ctypes.byref(solve),
        ctypes.c_void_p(m.tensor.data_ptr()),
        _int64(m.tensor.dtype == torch.float64),
    )
    _checked(status)
    m.check()
    w.check()
    return m.tensor, w.tensor


def combine(weights: Tensor, grads: Gradients, cut: Cut | None = None, *, split: bool = False) -> None:
    """`weights`: `[K, T]` float64; the result goes where `grads` has its outputs.

    split: by the kernel for few columns and one output, whose blocks take 256; without a `cut` as it is planned.
    """
    assert weights.dtype == torch.float64 and weights.is_contiguous()
    if split:
        assert weights.shape[0] == 1
        cut = cut or Cut()
        cut.columns_per_slot = 256
    status = library().host_combine(
        ctypes.byref(grads.c), ctypes.byref(cut or Cut()), ctypes.c_void_p(weights.data_ptr()), _int64(split)
    )
    _checked(status)


def gram_groups(grads: Gradients, groups: Sequence[int], num_groups: int, cut: Cut | None = None) -> Tensor:
    """The Gram matrices `[L, T, T]` of groups; `groups`: of each parameter of `grads`. `cut.groups` becomes the number
    of tickets."""
    m = Output((num_groups, grads.num_tasks, grads.num_tasks), accumulate_dtype(grads.dtypes))
    status = library().host_gram_groups(
        ctypes.byref(grads.c),
        _array(groups),
        _int64(num_groups),
        ctypes.byref(cut or Cut()),
        ctypes.c_void_p(m.tensor.data_ptr()),
        _int64(m.tensor.dtype == torch.float64),
    )
    _checked(status)
    m.check()
    return m.tensor


def combine_groups(weights: Tensor, grads: Gradients, groups: Sequence[int], cut: Cut | None = None) -> None:
    """`weights`: `[L, T]` float64; the result goes where `grads` has its outputs."""
    assert weights.dtype == torch.float64
    status = library().host_combine_groups(
        ctypes.byref(grads.c),
        _array(groups),
        _int64(weights.shape[0]),
        ctypes.byref(cut or Cut()),
        *_pointers(weights),
    )
    _checked(status)


def pcgrad_weights(m: Tensor, order: Tensor | None, schedule: int = FORWARD, **options: Any) -> Tensor:
    """PCGrad's weights `[L, T]` of float64 Gram matrices `[L, T, T]`. options: as `_solve` takes them."""
    w = Output(m.shape[:2], torch.float64)
    # the result is no `[T, T]` matrix of coefficients
    solve = _solve(m.shape[1], w.tensor.reshape(-1), order, **options)
    status = library().host_pcgrad_weights(
        *_pointers(m), _int64(m.shape[0]), _int64(m.shape[1]), ctypes.byref(solve), ctypes.c_uint64(schedule)
    )
    _checked(status)
    w.check()
    return w.tensor


def coefficients(m: Tensor, order: Tensor, include_self: bool = False, schedule: int = FORWARD) -> Tensor:
    """PCGrad's coefficients `[T, T]` of a float64 Gram matrix."""
    c = Output(m.shape, torch.float64)
    solve = _solve(m.shape[0], c.tensor, order, include_self=include_self)
    before = m.clone()
    _checked(
        library().host_coefficients(
            ctypes.c_void_p(m.data_ptr()), _int64(m.shape[0]), ctypes.byref(solve), ctypes.c_uint64(schedule)
        )
    )
    c.check()
    assert torch.equal(m.nan_to_num(), before.nan_to_num()), "the Gram matrix was written"
    return c.tensor


def gradvac(
    m: Tensor,
    order: Tensor,
    targets: Tensor,
    beta: float,
    always: bool = True,
    rounding: float = torch.finfo(torch.float64).eps,
    schedule: int = FORWARD,
) -> tuple[Tensor, Tensor]:
    """GradVac's coefficients and new targets, `[T, T]` each, of a float64 Gram matrix."""
    c, moved = Output(m.shape, torch.float64), Output(m.shape, torch.float64)
    assert order.dtype == torch.int64 and order.is_contiguous() and targets.is_contiguous()
    status = library().host_gradvac(
        *_pointers(m),
        _int64(m.shape[0]),
        ctypes.c_void_p(order.data_ptr() or ctypes.addressof(ctypes.c_int64())),
        _int64(order.shape[1]),
        *_pointers(targets),
        ctypes.c_double(beta),
        _int64(always),
        ctypes.c_double(rounding),
        *_pointers(c.tensor, moved.tensor),
        ctypes.c_uint64(schedule),
    )
    _checked(status)
    c.check()
    moved.check()
    return c.tensor, moved.tensor


def _matrix(m: Tensor) -> list[Any]:
    """A matrix with dense rows: where it begins, the distance between rows, whether it is float64."""
    assert m.dtype in (torch.float32, torch.float64) and (m.stride(-1) == 1 or m.shape[-1] == 1)
    assert m.dim() == 2 or m.is_contiguous()
    step = m.shape[-1] if m.dim() == 3 else m.stride(0)
    return [ctypes.c_void_p(m.data_ptr()), _int64(step), _int64(m.dtype == torch.float64)]


def _optional(*tensors: Tensor | None) -> list[Any]:
    return [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in tensors]


def gradvac_step(
    m: Tensor,
    targets: Tensor,
    order: Tensor | None,
    key: int,
    state: Tensor | None,
    present: Tensor | None,
    beta: float,
    update: str = "always",
    reduction: str = "sum",
    schedule: int = FORWARD,
) -> Tensor:
    """GradVac's weights `[T]`; moves the targets. The arguments are those of the op `gradvac_step`."""
    w = Output(m.shape[:1], torch.float64)
    assert targets.is_contiguous() and (order is None or (order.dtype == torch.int64 and order.is_contiguous()))
    status = library().host_gradvac_step(
        *_matrix(m),
        _int64(m.shape[0]),
        *_optional(order),
        _int64(0 if order is None else order.shape[1]),
        ctypes.c_uint64(key % 2**64),
        *_optional(state, present),
        ctypes.c_double(beta),
        _int64(update == "always"),
        _int64(reduction == "mean"),
        ctypes.c_double(torch.finfo(m.dtype).eps),
        *_optional(targets, w.tensor),
        ctypes.c_uint64(schedule),
    )
    _checked(status)
    w.check()
    return w.tensor


def method_weights(
    m: Tensor,
    method: int,
    options: Sequence[float] = (),
    rounding: float = torch.finfo(torch.float64).eps,
    present: Tensor | None = None,
    preferences: Tensor | None = None,
    per_task: Tensor | None = None,
    also: Tensor | None = None,
    kept: Tensor | None = None,
    counted: Tensor | None = None,
    average: Tensor | None = None,
    momentum: float = 0.0,
    vectors: Tensor | None = None,
    schedule: int = FORWARD,
) -> Tensor:
    """The weights of a method, by its number: `[T]` of a float32 or float64 matrix with dense rows, or `[L, T]` of
    contiguous `[L, T, T]` matrices.

    kept, counted, average: changed in place. also: a matrix of which a bad entry counts, like `m` in dtype and strides.
    """
    w = Output(m.shape[:-1], torch.float64)
    given = (ctypes.c_double * 4)(*options)
    assert also is None or (also.stride(), also.dtype) == (m.stride(), m.dtype)
    status = library().host_method_weights(
        *_matrix(m),
        _int64(m.shape[0] if m.dim() == 3 else 1),
        _int64(m.shape[-1]),
        _int64(method),
        given,
        ctypes.c_double(rounding),
        *_optional(present, preferences, per_task, also, kept, counted, average, vectors, w.tensor),
        _int64(0 if vectors is None else len(vectors)),
        ctypes.c_double(momentum),
        ctypes.c_uint64(schedule),
    )
    _checked(status)
    w.check()
    return w.tensor


def table(words: Tensor, large: bool) -> tuple[Tensor, int]:
    """The int64 words `[N]` as a pointer table's launches write them, and how many launches that takes."""
    found = torch.full((words.numel() + 1,), -1, dtype=torch.int64)
    launches = _int64()
    status = library().host_table(
        *_pointers(words), _int64(words.numel()), _int64(large), *_pointers(found), ctypes.byref(launches)
    )
    _checked(status)
    assert found[-1] == -1, "written beyond the table"
    return found[:-1], launches.value


def to_16_bits(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 -> int16, the bits."""
    y = torch.zeros(x.shape, dtype=torch.int16)
    library().host_to_16_bits(*_pointers(x, y), _int64(x.numel()), _int64(dtype == torch.float16))
    return y


def from_16_bits(x: Tensor, dtype: torch.dtype) -> Tensor:
    """int16, the bits -> float32."""
    y = torch.zeros(x.shape, dtype=torch.float32)
    library().host_from_16_bits(*_pointers(x, y), _int64(x.numel()), _int64(dtype == torch.float16))
    return y


def to_tf32(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    library().host_to_tf32(*_pointers(x, y), _int64(x.numel()))
    return y


def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    assert all(x.is_contiguous() for x in tensors)
    return [ctypes.c_void_p(x.data_ptr()) for x in tensors]


def plan(columns: int, num_tasks: int) -> tuple[int, int, int]:
    """Columns of a slot, slots, and slots to a group, of so many counted columns."""
    result = (ctypes.c_int64 * 3)()
    library().host_plan(_int64(columns), _int64(num_tasks), result)
    return result[0], result[1], result[2]


def faulty(fault: int, schedule: int = FORWARD) -> float:
    """Runs one of the driver's small kernels; `fault` says what it does wrong."""
    result = ctypes.c_double()
    _checked(library().host_faulty(_int64(fault), ctypes.c_uint64(schedule), ctypes.byref(result)))
    return result.value


def ptx_entered() -> list[str]:
    """The kernels of PTX that ran since the last call, by their mangled names."""
    return library().ptx_entered().decode().split()


def races_sites() -> set[tuple[str, int]]:
    """The barriers, fences and atomics that ran since the last call, by the name of their file and their line."""
    sites = (line.rpartition(":") for line in library().races_sites().decode().splitlines())
    return {(Path(file).name, int(number)) for file, _, number in sites}


def run_ptx(text: str, arguments: Sequence[Tensor], folder: Path, num_threads: int = 32) -> None:
    """One block of the one kernel in a PTX file, whose arguments are pointers; in a build with PTX.

    folder: for what is compiled.
    """
    kernels = ptx_library(text, folder)
    (kernel,) = ptx.read(text)
    launch_ptx(kernels, kernel.name, [ctypes.c_void_p(x.data_ptr()) for x in arguments], (1, 1, 1), num_threads)


def ptx_library(text: str, folder: Path | None = None, faulty: bool = False) -> ctypes.CDLL:
    """Kernels of PTX, to run on the chosen build. folder: for what is compiled, else where it is found again; faulty:
    whether faults can be planted."""
    cxx = compiler()
    assert cxx is not None
    return ctypes.CDLL(str(ptx.library(text, cxx, Path(library()._name), folder or ptx.OBJECTS, faulty)))


def launch_ptx(
    kernels: ctypes.CDLL,
    name: str,
    arguments: Sequence[Any],
    grid: Sequence[int],
    num_threads: int,
    dynamic_shared: int = 0,
    schedule: int = FORWARD,
) -> None:
    """One kernel of a `ptx_library`; its arguments as numbers of ctypes."""
    given = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(x) for x in arguments))
    blocks, call = (ctypes.c_uint * 3)(*grid), getattr(kernels, f"call_{name}")
    error = library().ptx_launch(call, given, blocks, num_threads, _int64(dynamic_shared), ctypes.c_uint64(schedule))
    if error is not None:
        raise HostError(error.decode())
