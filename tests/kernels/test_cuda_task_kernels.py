"""The CUDA kernels of the task convolution on the host, against the float64 oracle.

Their bodies run as the host's C++ compiler makes them, and as nvcc's PTX has them (tests/host/ptx/), always checked for
races. `FASTMTL_AOT=all` (`make aot`) runs the PTX of every dtype and of both architectures.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cases
import host_kernels as host
import pytest
import task_kernels_on_host as task
import test_cuda_ptx as ptx
import torch
from cases_task import (
    BF16,
    F16,
    F32,
    TASK_TOLERANCE,
    ConvCase,
    Expected,
    LinearCase,
    Made,
    TaskCase,
    bound,
    expected,
    expected_of,
)
from conftest import skip_or_fail
from host.ptx import build
from host.ptx.faults import ORDER
from host.ptx.mutations import faults_in
from torch import Tensor

from fastmtl.benchmarks.machine_code.kernel_table import nvcc
from fastmtl.core.task_weights import STILL, SortedBatch, TaskConvCall, TaskWeights
from fastmtl.ops.task_weights import reference

ALL = os.environ.get("FASTMTL_AOT") == "all"
CHOSEN = task.Choice.of()
# float32 as three products of truncated tf32 parts: up to 3 * 2^-20 of each product
SLACK = {F32: 4.0, BF16: 1.0, F16: 1.0}
SCHEDULES = {"rising": host.FORWARD, "falling": host.REVERSE, "shuffled": 3}


def _running(how: host.Build) -> Iterator[None]:
    if host.compiler() is None:
        skip_or_fail("no C++ compiler")
    with host.using(how):
        yield


@pytest.fixture
def bodies() -> Iterator[None]:
    yield from _running(host.TASK)


@pytest.fixture
def translated(request: pytest.FixtureRequest) -> Iterator[None]:
    """nvcc's PTX of the architecture that the test asks for, else of sm_80."""
    if nvcc() is None:
        pytest.skip("no nvcc")
    arch = getattr(request, "param", 80)
    yield from _running(host.TASK_PTX_EVERY[arch] if ALL else host.TASK_PTX)


def as_conv(case: TaskCase, made: Made) -> tuple[Tensor, TaskConvCall, Tensor]:
    """x, call and grad_out of the convolution that the layer is."""
    x, *rest = case.op_arguments(made)
    call = TaskConvCall.of(*rest)
    if isinstance(case, ConvCase):
        return x, call, made.grad_out
    n = call.batch.order.shape[0]
    weight, delta = call.weights[:2]
    weight, *delta = (None if w is None else w[..., None, None] for w in (weight, *delta))
    weights = call.weights._replace(weight=weight, delta=delta)
    images = [reference._images(y, n) for y in (x, made.grad_out)]
    return images[0], TaskConvCall(weights, call.batch, STILL, call.bias), images[1]


def as_given(case: TaskCase, picture: Tensor) -> Tensor:
    return picture.movedim(1, -1) if isinstance(case, LinearCase) else picture


def run(case: TaskCase, made: Made, choice: task.Choice = CHOSEN, schedule: int = host.FORWARD) -> dict[str, Tensor]:
    """The result and every gradient, by name."""
    x, call, grad_out = as_conv(case, made)
    of_weights = task.Choice.of(choice.tile, -1, choice.split_rows, choice.chunks)
    deltas = range(len(call.weights.delta))
    found = [
        as_given(case, task.input_gradient(grad_out, x, call, choice, schedule)),
        *task.weight_gradients(grad_out, x, call, [True] * 3, deltas, of_weights, schedule),
    ]
    y = as_given(case, task.forward(x, call, choice, schedule))
    return {"y": y, **dict(zip(made.named(), found, strict=True))}


def assert_as(case: TaskCase, found: dict[str, Tensor], want: Expected, exact: bool = False) -> None:
    """Within the tolerance of the dtype of x. NaN where the oracle has it, and nowhere else."""
    tolerance = SLACK[case.dtype] * TASK_TOLERANCE[case.dtype]
    for name, value in found.items():
        oracle, size = (want.y, want.y_size) if name == "y" else (want.grads[name], want.grad_sizes[name])
        value = value.reshape(oracle.shape)
        try:
            assert torch.equal(value.isnan(), oracle.isnan()), "not NaN where the oracle is, or where it is not"
            limit = bound(size, oracle, tolerance, value.dtype)
            cases.assert_within(*(x.nan_to_num() for x in (value, oracle, limit)))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def check(case: TaskCase, choice: task.Choice = CHOSEN, schedule: int = host.FORWARD) -> None:
    made = case.make()
    found = run(case, made, choice, schedule)
    assert {name: x.dtype for name, x in found.items()} == {
        "y": case.dtype, **{name: x.dtype for name, x in made.named().items()}
    }  # fmt: skip
    assert_as(case, found, expected(case))


LAST = {"x_layout": "channels_last", "weight_layout": "channels_last", "grad_layout": "channels_last"}
# more steps than a pipeline has stages; channels that no tile divides, task 1 without samples
CONV = ConvCase(n=9, cin=40, cout=24, size=(5, 6), num_tasks=4, ids="absent", gate="zeros", bias="per_task", **LAST)
CASES: dict[str, TaskCase] = {
    "conv": CONV,
    # of contiguous filters, which are transposed when they are staged, in more than one run; no tile of rows is full
    "contiguous": ConvCase(n=4, cin=40, cout=72, size=(3, 3), delta="nones", bias="shared"),
    "contiguous-runs": ConvCase(n=2, cin=264, cout=8, size=(2, 3), num_tasks=2, gate="values"),
    "mixed-filters": ConvCase(n=4, cin=40, cout=8, size=(3, 3), weight_layout="mixed"),
    "strided": CONV.but(n=5, cin=16, cout=16, size=(7, 6), stride=(2, 3), padding=(1, 2), kernel=(3, 5), ids="random"),
    "dilated": CONV.but(n=4, cin=8, cout=16, size=(7, 8), dilation=(2, 1), padding=2, stride=(1, 2), gate="values"),
    # 16 bytes hold several taps, or parts of them
    "odd": ConvCase(n=5, cin=3, cout=20, size=(6, 7), stride=2, gate="values", bias="shared", delta="stacked"),
    "odd-strided": ConvCase(
        n=5, cin=5, cout=7, size=(7, 7), stride=2, kernel=(4, 3), gate="zeros", dilation=(1, 2), bias="per_task"
    ),
    "seven": ConvCase(n=3, cin=3, cout=8, size=(9, 9), kernel=(7, 7), stride=2, padding=3, **LAST),
    "own": CONV.but(shared=False, gate=None, bias=None, delta="stacked_permuted", ids="turns"),
    "no-delta": CONV.but(delta=None, gate=None, bias="shared"),
    "linear": LinearCase(leading=(3, 50), cin=72, cout=40, gate="values", bias="per_task", delta="nones"),
    "linear-odd": LinearCase(leading=(70,), cin=70, cout=36, gate="closed", bias="shared", delta="stacked"),
    "many-tasks": LinearCase(leading=(90,), cin=8, cout=8, num_tasks=70, ids="absent", gate="values", bias="per_task"),
    "one-sample": CONV.but(n=1, ids="one", size=(2, 3)),
}
# several tiles in each direction, of every size
LARGE = ConvCase(
    n=7, cin=72, cout=136, size=(6, 7), num_tasks=3, gate="values", delta="list", kernel=(1, 3), padding=0, **LAST
)


# by both ways of staging, with weights in float32 beside 16 bits
MIXED = ConvCase(n=4, cin=8, cout=16, size=(4, 5), weight_dtype=F32, gate="values", bias="per_task", dtype=BF16)
DTYPES = (F32, BF16, F16)
SHORT = {F32: "f32", BF16: "bf16", F16: "f16"}


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, DTYPES[k % 3]) for k, name in enumerate(CASES)], ids=lambda x: SHORT.get(x, x)
)
def test_bodies(name: str, dtype: torch.dtype, bodies: None) -> None:
    check(CASES[name].but(dtype=dtype), schedule=host.REVERSE)


ENTERED: dict[Any, set[str]] = {}
PTX_CASES = {
    **{
        f"{name}-{SHORT[d]}": (case.but(dtype=d), CHOSEN)
        for name, case in CASES.items()
        for d in DTYPES
        if ALL or d != F16
    },
    **{
        f"tile-{tile}-{SHORT[d]}": (LARGE.but(dtype=d), task.Choice.of(tile, tile + 1, 64 * (tile + 1), 2))
        for tile in range(4)
        for d in DTYPES
        if ALL or d != F16
    },
    # chunks of contiguous filters, too
    **{
        f"chunks-{SHORT[d]}": (CASES["contiguous"].but(dtype=d), task.Choice.of(split_rows=16, chunks=2))
        for d in DTYPES
        if ALL or d != F16
    },
    **{
        f"float32-weights-{layout}": (MIXED.but(weight_layout=layout), CHOSEN)
        for layout in ("contiguous", "channels_last")
    },
    **(
        {
            f"float32-weights-f16-{layout}": (MIXED.but(weight_layout=layout, dtype=F16), CHOSEN)
            for layout in ("contiguous", "channels_last")
        }
        if ALL
        else {}
    ),
}


@pytest.mark.parametrize("translated", (80, 90) if ALL else (80,), indirect=True, ids=lambda arch: f"sm_{arch}")
@pytest.mark.parametrize("name", PTX_CASES)
def test_ptx(name: str, translated: None) -> None:
    case, choice = PTX_CASES[name]
    host.ptx_entered()
    check(case, choice, host.REVERSE)
    ENTERED[name] = set(host.ptx_entered())


@pytest.mark.skipif(nvcc() is None, reason="no nvcc")
def test_every_kernel_ran() -> None:
    if set(ENTERED) != set(PTX_CASES):
        pytest.skip("some cases were not run")
    kernels = {
        name
        for source in host.task_ptx_sources(("f32", "bf16", "f16") if ALL else host.SOME)
        for name in build.names_of(source, 80)
    }
    assert set().union(*ENTERED.values()) == kernels


# --- what else holds


@pytest.mark.parametrize("case", [CASES["conv"], CASES["odd"], CASES["linear"]], ids=("conv", "odd", "linear"))
def test_rows_of_no_task(case: TaskCase, translated: None) -> None:
    """Samples whose ids are out of range are NaN, and take no part in sums."""
    made = case.but(dtype=BF16).make()
    made.task_ids[1], made.task_ids[-1] = -1, case.num_tasks
    assert_as(case.but(dtype=BF16), run(case, made), expected_of(case, made))


def test_closed_gates_and_absent_tasks_read_no_delta(translated: None) -> None:
    case = CONV.but(bias=None, dtype=BF16)
    made, want = case.make(), expected(case)
    absent = set(range(case.num_tasks)) - set(made.task_ids.tolist())
    closed = {t for t in range(case.num_tasks) if made.gate[t] == 0}
    assert absent - closed and closed - absent and made.delta is not None
    for t in absent | closed:
        made.delta[t].fill_(torch.nan)
    for t in absent:
        made.gate[t] = torch.nan
    x, call, grad_out = as_conv(case, made)
    found = {"y": task.forward(x, call), "x": task.input_gradient(grad_out, x, call)}
    deltas = range(case.num_tasks)
    grads = task.weight_gradients(grad_out, x, call, [True, False, False], deltas)
    found |= {"weight": grads[0], **{f"delta[{t}]": grads[1 + t] for t in deltas}}
    assert_as(case, found, want)
    for t in absent | closed:
        assert not found[f"delta[{t}]"].any()


@pytest.mark.parametrize("wanted", ["weight", "gate", "bias", "delta", "one-delta", "weight-bias"])
@pytest.mark.parametrize("bias", ["shared", "per_task"])
def test_some_of_the_gradients(wanted: str, bias: str, translated: None) -> None:
    case = CONV.but(bias=bias, dtype=BF16, ids="random")
    made, want = case.make(), expected(case)
    x, call, grad_out = as_conv(case, made)
    deltas = {"delta": range(4), "one-delta": [2]}.get(wanted, [])
    flags = [name in wanted for name in ("weight", "gate", "bias")]
    found = task.weight_gradients(grad_out, x, call, flags, deltas, task.Choice.of(split_rows=32))
    names = [*["weight"] * flags[0], *(f"delta[{t}]" for t in deltas), *["gate"] * flags[1], *["bias"] * flags[2]]
    assert_as(case, dict(zip(names, found, strict=True)), want)


@pytest.mark.parametrize("case", [CASES["conv"], LARGE], ids=("conv", "large"))
def test_the_order_of_blocks_does_not_matter(case: TaskCase, translated: None) -> None:
    made = case.but(dtype=BF16).make()
    choice = task.Choice.of(blocks=3, split_rows=32, chunks=2)
    rising, *others = (run(case, made, choice, schedule) for schedule in SCHEDULES.values())
    for found in others:
        for name, value in rising.items():
            assert torch.equal(value, found[name]), name


@pytest.mark.parametrize(
    "case", [CONV.but(n=0, ids="random"), CASES["linear"].but(leading=(3, 0))], ids=("samples", "pixels")
)
def test_batches_without_rows(case: TaskCase, translated: None) -> None:
    """Sums over nothing are written, too."""
    found = run(case, case.but(dtype=BF16).make())
    assert found.pop("y").numel() == found.pop("x").numel() == 0
    assert not any(value.any() for value in found.values())


def far_apart(x: Tensor, file: Path) -> Tensor:
    """The same numbers in a file with holes: samples and lines lie more than 2^31 elements apart."""
    n, channels, h, _ = x.shape
    line, sample = 2**31 + 64, 2**31 * h + 128
    size = sample * n
    with file.open("wb") as made:
        made.truncate(size * x.element_size())
    memory = torch.from_file(str(file), shared=True, size=size, dtype=x.dtype)
    file.unlink()
    return memory.as_strided(x.shape, (sample, 1, line, channels)).copy_(x)


def test_offsets_of_64_bits(translated: None, tmp_path: Path) -> None:
    case = CONV.but(n=2, cin=8, cout=8, size=(2, 3), num_tasks=2, ids="turns", gate=None, dtype=BF16)
    made = case.make()
    near = run(case, made)
    made.x, made.grad_out = far_apart(made.x, tmp_path / "x"), far_apart(made.grad_out, tmp_path / "grad_out")
    far = run(case, made)
    for name, value in near.items():
        assert torch.equal(value, far[name]), name


def test_long_sums_of_float32(translated: None) -> None:
    """Of positive numbers: tensor cores cut digits off, which adds up unless sums are added to a total in between."""
    case = LinearCase(leading=(40,), cin=4096, cout=8, num_tasks=1, delta=None)
    made = case.make().map(torch.abs)
    x, call, _ = as_conv(case, made)
    want = expected_of(case, made)
    assert_as(case, {"y": as_given(case, task.forward(x, call))}, want)


@pytest.mark.parametrize(("dtype", "most"), [(F16, 8192), (F32, 32768)], ids=str)
def test_rows_of_a_piece(dtype: torch.dtype, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 16 bits, whose sums lose digits, a piece is bounded; in float32 the tiles alone keep the device busy here."""
    x, grad_out = (torch.zeros(32768, 512, 1, 1, dtype=dtype) for _ in range(2))
    batch = SortedBatch(torch.arange(32768), torch.tensor([0, 32768]))
    call = TaskConvCall(TaskWeights(torch.zeros(512, 512, 1, 1), [], [], None), batch, STILL, None)
    with host.using(host.TASK):
        planned: list[int] = []
        monkeypatch.setattr(
            task._library(), "host_weight_grads", lambda params, plan, *_: planned.append(plan._obj.split_rows) or 0
        )
        task.weight_gradients(grad_out, x, call, [True, False, False], [])
    assert planned == [most]


# --- that the run sees what it should

STEPS = CONV.but(n=7, ids="turns", num_tasks=2, cin=64, gate="values", dtype=BF16)


@pytest.mark.parametrize(("kernel", "least"), [("product", 9), ("pieces", 7), ("stage", 2)])
def test_faults_of_order_are_seen(kernel: str, least: int, translated: None, threads: None) -> None:
    """A barrier left out, a copy that is waited for a group late or not committed."""
    if ALL:
        pytest.skip("a build without faults")
    torch.set_num_threads(1)  # a forked process has no others
    kernels = (one for one in build.kernels_of("kernels_task_bf16", 80) if re.search(host.TASK_FAULTY, one.name))
    (found,) = (one for one in kernels if f"task_{kernel}" in one.name)
    # several tiles to a block, and several groups of rows to a piece
    choice = task.Choice.of(2, split_rows=256) if kernel == "pieces" else task.Choice.of(2, 1, 400)
    chosen = {order: functools.partial(check, STEPS, choice, schedule) for order, schedule in SCHEDULES.items()}
    tried = ptx.Tried(faults_in(found, ORDER), chosen, seconds=3)
    assert tried.not_seen == []
    assert len(tried.found) >= least and tried.not_reached == []
