"""The `cuda` backend of `task_conv2d` and `task_linear` on CPU tensors: the launcher that a GPU would have, and behind
it the kernels on the host (tests/helpers/cuda_layers_on_host.py), against the float64 oracle."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import host_kernels as host
import pytest
import torch
from cases import assert_within
from cases_task import (
    BF16,
    CONV_CASES,
    F16,
    F32,
    F64,
    FEW_CASES,
    GEOMETRIES,
    LINEAR_CASES,
    TASK_TOLERANCE,
    ConvCase,
    LinearCase,
    TaskCase,
    assert_gradients,
    assert_result,
    bound,
    by_op,
    expected,
    gradients,
    make_ids,
)
from conftest import skip_or_fail
from torch import Tensor

import fastmtl
from fastmtl.benchmarks.machine_code.kernel_table import nvcc
from fastmtl.core import dispatch
from fastmtl.core.task_weights import Geometry, SortedBatch
from fastmtl.ops import task_conv2d, task_conv2d_weight_grad, task_linear, task_linear_weight_grad, task_plan
from fastmtl.ops.task_weights import cuda, reference
from fastmtl.ops.task_weights.task_conv2d import task_conv2d_op

if dispatch.extension is None or host.compiler() is None:
    pytest.skip("no compiled extension, or no C++ compiler", allow_module_level=True)
from cuda_layers_on_host import running

# float32 as three products of truncated tf32 parts: up to 3 * 2^-20 of each product
SLACK = {F32: 4.0, BF16: 1.0, F16: 1.0}
# what these kernels take of the whole table
TABLE = [c for c in (*CONV_CASES, *LINEAR_CASES) if c.dtype != F64 and getattr(c, "groups", 1) == 1]
ALL = os.environ.get("FASTMTL_AOT") == "all"
CONV = ConvCase(n=5, cin=8, cout=16, size=(5, 6), num_tasks=4, ids="absent", gate="zeros", bias="per_task")
LINEAR = LinearCase(leading=(3, 5), cin=16, cout=8, gate="values", bias="shared")


@pytest.fixture(autouse=True)
def on_host() -> Iterator[Any]:
    if dispatch.interpreting():
        skip_or_fail("TRITON_INTERPRET=1")
    with running(schedule=host.REVERSE) as library:
        yield library


def launched(y: Tensor) -> bool:
    return "Launched" in y.grad_fn.name()


def check(case: TaskCase, with_plan: bool = False) -> None:
    """The result and every gradient. with_plan: of ids that have been sorted, whose arguments C++ checks."""
    made, want = case.make().leaves(), expected(case)
    tolerance = SLACK[case.dtype] * TASK_TOLERANCE[case.dtype]
    y = case.run(made, task_plan(made.task_ids, case.num_tasks) if with_plan else None)
    assert_result(case, y, want, tolerance)
    assert_gradients(case, made, gradients(y, made), want, tolerance)


def check_all(cases: Sequence[TaskCase], with_plan: bool) -> None:
    for case in cases:
        try:
            check(case, with_plan)
        except Exception as error:
            raise AssertionError(f"{type(case).__name__} {case}: {error}") from error


@pytest.mark.parametrize("part", range(8))
def test_whole_table(part: int) -> None:
    check_all(TABLE[part::8], with_plan=part % 2 == 0)


@pytest.mark.skipif(nvcc() is None, reason="no nvcc")
@pytest.mark.parametrize("part", range(16) if ALL else range(1))
def test_table_on_ptx(part: int) -> None:
    """By what nvcc makes of the kernels, with races looked for: the whole table, or a few of it."""
    cases = TABLE[part::16] if ALL else [case for case in FEW_CASES if case.dtype in (F32, BF16)]
    with running(host.TASK_PTX_EVERY[80] if ALL else host.TASK_PTX, host.REVERSE):
        check_all(cases, with_plan=part % 2 == 0)


@pytest.mark.parametrize("case", [CONV, LINEAR, CONV.but(x_layout="channels_last", delta="stacked")], ids=str)
def test_as_the_op(case: TaskCase) -> None:
    """Past the op and through it: the same bits and strides, and nothing recorded where nothing is."""
    made = case.make().leaves()
    y, op = case.run(made), by_op(case, made)
    assert launched(y) and not launched(op)
    assert torch.equal(y, op) and y.stride() == op.stride()
    of_op = gradients(op, made)
    for name, grad in gradients(y, made).items():
        assert (grad is None) == (of_op[name] is None), name
        assert grad is None or (torch.equal(grad, of_op[name]) and grad.stride() == of_op[name].stride()), name
    with torch.no_grad():
        assert torch.equal(case.run(made, task_plan(made.task_ids, case.num_tasks)), y)


@pytest.mark.parametrize("case", [CONV, LINEAR], ids=["conv", "linear"])
def test_what_watches_sees_the_op(case: TaskCase) -> None:
    made = case.make().leaves()
    with torch.autograd.profiler.profile() as profile:
        assert not launched(case.run(made))
    assert any("fastmtl::task_" in event.key for event in profile.key_averages())
    compiled = torch.compile(lambda: case.run(made), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(), case.run(made))


def test_second_derivatives_are_those_of_the_op() -> None:
    made = CONV.but(gate="values", ids="turns").make().leaves()
    inputs = list(made.named().values())

    def second(y: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))

    y = CONV.run(made)
    assert launched(y)
    torch.testing.assert_close(second(y), second(by_op(CONV, made)))


@pytest.mark.parametrize("case", [CONV.but(ids="turns"), LINEAR], ids=["conv", "linear"])
def test_each_gradient_by_itself(case: TaskCase) -> None:
    """Whatever else is frozen."""
    want = expected(case)
    for name in case.make().named():
        made = case.make()
        made.named()[name].requires_grad_()
        (found,) = torch.autograd.grad(case.run(made), [made.named()[name]], made.grad_out)
        exact, size = want.grads[name], want.grad_sizes[name]
        assert_within(found, exact, bound(size, exact, SLACK[F32] * TASK_TOLERANCE[F32], found.dtype))


def test_more_tasks_than_arguments_hold(on_host: Any) -> None:
    """Their deltas are found by a table in the device's memory."""
    before = on_host.host_conv_tables()
    check(LinearCase(leading=(90,), cin=8, cout=8, num_tasks=70, ids="absent", gate="values"))
    assert on_host.host_conv_tables() > before


def test_samples_of_no_task() -> None:
    """NaN in the result and in the gradient of x; in no sum."""
    x, delta = torch.randn(4, 8, 5, 5), torch.randn(2, 16, 8, 3, 3)
    order, offsets = torch.tensor([2, 0, 1, 3]), torch.tensor([0, 1, 3])
    leaves = [x.requires_grad_(), delta.requires_grad_()]
    y = task_conv2d_op(x, None, [delta], [], None, None, order, offsets, [1, 1], [1, 1], [1, 1], 1)
    grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
    for found in (y, grads[0]):
        assert found[3].isnan().all() and found[:3].isfinite().all()
    assert grads[1].isfinite().all()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_weight_grads(dtype: torch.dtype) -> None:
    """Of one's own memory, and into rows of a bank of float32."""
    ids = make_ids("absent", (6,), 4)
    x, g = (torch.randn(6, c, 5, 6).to(dtype) for c in (5, 6))
    batch = SortedBatch(*reference.task_plan(ids, 4))
    options = (3, 3), Geometry(padding=(1, 1))
    exact = reference.task_conv2d_weight_grad(x.double(), g.double(), batch, *options)
    size = reference.task_conv2d_weight_grad(x.double().abs(), g.double().abs(), batch, *options)
    tolerance = SLACK[dtype] * TASK_TOLERANCE[dtype]
    found = task_conv2d_weight_grad(x, g, ids, 4, 3, padding=1)
    assert_within(found, exact, bound(size, exact, tolerance, dtype))
    bank = torch.full((4, 300), torch.nan)
    out = bank.as_strided((4, 6, 5, 3, 3), (300, 45, 1, 15, 5), 17)
    task_conv2d_weight_grad(x, g, ids, 4, 3, padding=1, out=out)
    assert_within(out, exact, bound(size, exact, tolerance, F32))
    assert bank[:, :17].isnan().all() and bank[:, 17 + 270 :].isnan().all()
    x, g = x.movedim(1, -1).flatten(1, 2), g.movedim(1, -1).flatten(1, 2)
    exact = reference.task_linear_weight_grad(x.double(), g.double(), batch)
    size = reference.task_linear_weight_grad(x.double().abs(), g.double().abs(), batch)
    assert_within(task_linear_weight_grad(x, g, ids, 4), exact, bound(size, exact, tolerance, dtype))


# --- arguments that are checked in one call


def arguments(**changes: Any) -> dict[str, Any]:
    """Of `task_conv2d`: a 3x3 filter of 4 to 6 channels, 2 tasks, 3 samples."""
    told: dict[str, Any] = {
        "x": torch.randn(3, 4, 5, 5),
        "weight": torch.randn(6, 4, 3, 3),
        "delta": [torch.randn(6, 4, 3, 3), None],
        "task_ids": task_plan(torch.tensor([0, 1, 1]), 2),
        "gate": torch.ones(2),
        "bias": torch.ones(2, 6),
    }
    return {**told, **changes}


WRONG: dict[str, dict[str, Any]] = {
    "x of three dimensions": {"x": torch.randn(3, 4, 5)},
    "ints": {"x": torch.ones(3, 4, 5, 5, dtype=torch.int64)},
    "channels": {"x": torch.randn(3, 5, 5, 5)},
    "samples": {"x": torch.randn(2, 4, 5, 5)},
    "few pixels": {"x": torch.randn(3, 4, 2, 5)},
    "device": {"x": torch.empty(3, 4, 5, 5, device="meta")},
    "weight's dtype": {"weight": torch.randn(6, 4, 3, 3, dtype=F64)},
    "weight is none": {"weight": "W"},
    "matrix": {"weight": torch.randn(6, 4)},
    "delta's shape": {"delta": [torch.randn(6, 4, 3, 2), None]},
    "delta's dtype": {"delta": [torch.randn(6, 4, 3, 3).half(), None]},
    "delta is a number": {"delta": [1.0, None]},
    "deltas": {"delta": [torch.randn(6, 4, 3, 3)]},
    "stack": {"delta": torch.randn(3, 6, 4, 3, 3)},
    "nothing": {"weight": None, "delta": [None, None]},
    "gates": {"gate": torch.ones(3)},
    "gate of two dimensions": {"gate": torch.ones(2, 1)},
    "bias": {"bias": torch.ones(5)},
    "bias of tasks": {"bias": torch.ones(3, 6)},
    "groups": {"groups": 3},
    "groups is a bool": {"groups": True},
    "stride": {"stride": 0},
    "padding": {"padding": "some"},
    "dilation": {"dilation": (1, 2, 3)},
}


@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_as_elsewhere(changes: dict[str, Any]) -> None:
    with fastmtl.use_backend("reference"), pytest.raises((TypeError, ValueError)) as expected_error:
        task_conv2d(**arguments(**changes))
    with pytest.raises(expected_error.type) as found:
        task_conv2d(**arguments(**changes))
    assert str(found.value) == str(expected_error.value)


@pytest.mark.parametrize(
    ("changes", "rows"),
    [({}, True), ({"delta": torch.randn(2, 6, 4, 3, 3), "bias": None}, True), ({"delta": None}, True),
     ({"weight": None, "delta": [torch.randn(6, 4, 3, 3)] * 2}, True), ({"gate": torch.ones(2)[:0]}, False)],
    ids=["list", "stack", "gates alone", "no weight", "no gates"],
)  # fmt: skip
def test_what_fits(changes: dict[str, Any], rows: bool) -> None:
    told = arguments(**changes)
    fits = dispatch.extension.task_layer_fits(
        told["weight"], told["delta"], told["gate"], told["bias"], *told["task_ids"], False, 1, told["x"]
    )
    assert fits is rows


def test_autocast_is_seen() -> None:
    x, weight = torch.randn(3, 4), torch.randn(6, 4)
    plan = task_plan(torch.tensor([0, 1, 1]), 2)
    with torch.autocast("cpu", torch.bfloat16):
        y = task_linear(x, weight, [None, weight], plan)
        assert y.dtype == BF16
        y.sum()
    assert task_linear(x, weight, [None, weight], plan).dtype == F32


def test_autocast_is_seen_before_dtypes_are_compared() -> None:
    """The bits of one 16-bit type would be read as another's."""
    x, weight, ids = torch.randn(3, 4).half(), torch.randn(6, 4).half(), torch.tensor([0, 1, 1])
    for task_ids in (ids, task_plan(ids, 2)):
        with (
            torch.autocast("cpu", torch.bfloat16),
            pytest.raises(TypeError, match=r"weight: .*beside x in torch.bfloat"),
        ):
            task_linear(x, weight, [None, weight], task_ids)


def test_deltas_in_a_tuple_with_names() -> None:
    x, weight, plan = torch.randn(3, 4), torch.randn(6, 4), task_plan(torch.tensor([0, 1, 1]), 2)
    pair = NamedTuple("pair", [("first", Tensor), ("second", Tensor)])(weight, -weight)
    assert torch.equal(task_linear(x, weight, pair, plan), task_linear(x, weight, list(pair), plan))


def test_out_of_memory_is_torchs_own_error() -> None:
    """The staged weights of 1024 tasks of 64 MB each."""
    resource = pytest.importorskip("resource")
    weight, plan = torch.zeros(4096, 4096), task_plan(torch.tensor([0, 1]), 1024)
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (60 << 30, before[1]))
    try:
        with torch.no_grad(), pytest.raises(torch.OutOfMemoryError, match=r"no workspace of \d{11} bytes"):
            task_linear(torch.randn(2, 4096), weight, [weight] * 1024, plan)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_rows_whose_memory_is_that_of_pictures() -> None:
    x = torch.randn(3, 5, 2, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, ids = torch.randn(6, 4), torch.tensor([0, 1, 1])
    found = torch.autograd.grad(task_linear(x, weight, [weight, None], ids).sum(), x)[0]
    expected = torch.stack([(2 - ids[k].clamp(max=1)) * weight.sum(0).expand(5, 2, 4) for k in range(3)])
    torch.testing.assert_close(found, expected)


def test_batches_of_gradients_are_the_ops() -> None:
    """Which says, as on every backend, that it has no rule for them."""
    made = CONV.make().leaves()
    y = CONV.run(made)
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        torch.autograd.grad(y, [made.x], torch.ones(3, *y.shape), is_grads_batched=True)


def test_gradients_are_nobodys_views() -> None:
    """A step may write into them, and into the result."""
    made = LINEAR.make().leaves()
    y = LINEAR.run(made, task_plan(made.task_ids, LINEAR.num_tasks))
    grads = torch.autograd.grad(torch.relu_(y), list(made.delta), made.grad_out)
    assert not y._is_view() and not any(g._is_view() for g in grads)
    for grad in grads:
        grad.add_(1)
    assert len({g.data_ptr() for g in grads}) == len(grads) and all(g.data_ptr() % 16 == 0 for g in grads)


# --- what is declined


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (ConvCase(**GEOMETRIES["groups"]), "no groups, got 3"),
        (ConvCase(**GEOMETRIES["depthwise"]), "no groups, got 4"),
        (ConvCase(dtype=F64), "do not take float64"),
        (ConvCase(stride=9), "do not take the stride"),
        (ConvCase(kernel=(1, 17), padding=(0, 8)), "do not take the number of taps"),
        (LinearCase(num_tasks=1025, leading=(2,)), "do not take the number of tasks"),
        (ConvCase(size=(0, 6), kernel=(1, 1)), "without elements"),
    ],
    ids=["groups", "depthwise", "float64", "stride", "taps", "tasks", "empty"],
)
def test_what_the_kernels_do_not_take(case: TaskCase, reason: str) -> None:
    made = case.make()
    with pytest.raises(RuntimeError, match=rf"'cuda' is forced but cannot serve this call: its kernels .*{reason}"):
        case.run(made)


def test_weight_grads_of_a_dtype_that_is_not_written() -> None:
    x, out = torch.randn(3, 4, dtype=BF16), torch.empty(2, 5, 4, dtype=F64)
    with pytest.raises(RuntimeError, match=r"it writes torch.bfloat16 or float32, got torch.float64"):
        task_linear_weight_grad(x, torch.randn(3, 5, dtype=BF16), torch.tensor([0, 1, 1]), 2, out=out)


def test_without_cuda_it_says_so() -> None:
    dispatch.extension.use_conv_functions(0)
    if dispatch.build_info()["cuda_architectures"]:
        pytest.skip("built with CUDA")
    x = torch.randn(2, 4)
    with pytest.raises(RuntimeError, match="built without CUDA"):
        cuda.declines(x, torch.Size((6, 4)), Geometry(), 2)


# --- the launcher by itself


def layer(**changes: Any) -> list[Any]:
    """Arguments of `task_conv_launch`: a 3x3 filter of 4 to 6 channels, 2 tasks, 3 samples."""
    told = {
        "weight": torch.randn(6, 4, 3, 3),
        "deltas": [torch.randn(6, 4, 3, 3), torch.randn(6, 4, 3, 3)],
        "tasks": [0, 1],
        "gate": None,
        "bias": None,
        "order": torch.tensor([0, 1, 2]),
        "offsets": torch.tensor([0, 1, 3]),
        "moves": (1, 1, 1, 1, 1, 1),
        "x": torch.randn(3, 4, 5, 5).contiguous(memory_format=torch.channels_last),
        "y": torch.empty(3, 6, 5, 5).contiguous(memory_format=torch.channels_last),
    }
    return list({**told, **changes}.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.randn(3, 5, 5, 5).contiguous(memory_format=torch.channels_last)}, "channels that agree"),
        ({"y": torch.empty(3, 6, 4, 5).contiguous(memory_format=torch.channels_last)}, "the filter's moves agree with"),
        ({"tasks": [0, 2]}, "tasks of the batch"),
        ({"tasks": [0]}, "one tensor for each of its tasks"),
        ({"order": torch.tensor([0, 1, 2], dtype=torch.int32)}, "a plan as task_plan makes it"),
        ({"gate": torch.ones(3)}, r"gate: expected shape \[T\]"),
        ({"bias": torch.ones(5)}, r"bias: expected shape \[Cout\]"),
        ({"weight": "none"}, "weight: expected a dense tensor"),
        ({"x": torch.empty(3, 4, 5, 5, device="meta")}, "x: expected a dense tensor with memory on the device"),
        ({"moves": (1, 1)}, "expected stride, padding and dilation"),
        ({"weight": torch.randn(6, 4)}, "weight: expected one filter"),
        ({"moves": (1, 1, 2**29, 1, 1, 1)}, r"a padding and a dilation below 2\^29"),
        ({"deltas": [torch.randn(6, 4, 1, 1)] * 2}, "delta: expected the shape and dtype of the weight"),
        ({"deltas": [torch.randn(6, 4, 3, 3).half()] * 2}, "delta: expected the shape and dtype of the weight"),
        ({"weight": torch.randn(6, 4, 3, 3).double(), "deltas": [], "tasks": []}, "weight: expected the dtype of x"),
        ({"gate": torch.ones(2).half()}, "gate, bias: expected the dtype of x"),
    ],
)
def test_the_launcher_says_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        dispatch.extension.task_conv_launch(*layer(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"x": torch.randn(3, 4, 5, 5)},
        {"deltas": [torch.randn(6, 4, 3, 3), torch.randn(6, 4, 3, 3).contiguous(memory_format=torch.channels_last)]},
        {"gate": torch.ones(4)[::2]},
    ],
    ids=["channels apart", "mixed deltas", "gate with gaps"],
)
def test_the_launcher_reads_what_lies_as_it_wants(changes: dict[str, Any]) -> None:
    assert dispatch.extension.task_conv_launch(*layer()) is True
    assert dispatch.extension.task_conv_launch(*layer(**changes)) is False


def test_functions_of_another_build_are_refused() -> None:
    import ctypes

    other = (ctypes.c_int64 * 32)(1)
    with pytest.raises(RuntimeError, match=r"built from another launch\.h"):
        dispatch.extension.use_conv_functions(ctypes.addressof(other))


def test_threads_at_the_same_time() -> None:
    """A launch waits for nobody's lock, and keeps what it reads."""
    made = LINEAR.make()
    want = LINEAR.run(made)
    wrong: list[int] = []

    def work(k: int) -> None:
        # a forced backend is every thread's
        if not torch.equal(LINEAR.run(made), want):
            wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_layer_without_deltas_or_a_weight() -> None:
    x, ids = torch.randn(5, 8), torch.tensor([0, 1, 1, 0, 1])
    weight, gate = torch.randn(6, 8), torch.ones(2)
    torch.testing.assert_close(task_linear(x, weight, None, ids, gate=gate), x @ weight.mT, atol=1e-5, rtol=1e-5)
    y = task_conv2d(x[:, :, None, None], None, [None, weight[:, :, None, None]], ids)
    assert not y[ids == 0].any() and fastmtl.core.dispatch.forced_backend() == "cuda"
