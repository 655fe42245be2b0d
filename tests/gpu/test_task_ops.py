"""The per-task ops on CUDA tensors, against the float64 oracle on the CPU; streams, graphs, and no waiting."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import cases
import pytest
import torch
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
    Made,
    TaskCase,
    bound,
    expected,
    gradients,
    make_ids,
)
from gpu_tables import fastest_everywhere
from torch import Tensor

import fastmtl
from fastmtl.core import dispatch
from fastmtl.core.dispatch import unavailable
from fastmtl.core.task_weights import Geometry, SortedBatch, TaskConvCall
from fastmtl.ops import (
    task_batch_norm,
    task_conv2d,
    task_conv2d_weight_grad,
    task_linear,
    task_linear_weight_grad,
    task_plan,
    task_scale_shift,
)
from fastmtl.ops.task_weights import choice, reference

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
# float32 as three products of truncated tf32 parts: up to 3 * 2^-20 of each product
SLACK = {F64: 1.0, F32: 4.0, BF16: 1.0, F16: 1.0}
ON_GPU = [case.but(dtype=F32) if case.dtype == F64 else case for case in FEW_CASES]


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    """cuDNN and cuBLAS, which the reference calls, may otherwise round float32 operands to tf32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(params=["cuda", "triton", "reference"])
def forced(request: pytest.FixtureRequest) -> Iterator[str]:
    reason = dispatch.unavailable(request.param, DEVICE)
    if reason is not None:
        pytest.skip(reason)
    with fastmtl.use_backend(request.param):
        yield request.param


@pytest.fixture(params=["cuda", "triton"])
def compiled(request: pytest.FixtureRequest) -> Iterator[str]:
    reason = dispatch.unavailable(request.param, DEVICE)
    if reason is not None:
        pytest.skip(reason)
    with fastmtl.use_backend(request.param):
        yield request.param


def on_device(x: Tensor) -> Tensor:
    """x with the strides and the memory around it that it has on the CPU."""
    storage = x.detach().untyped_storage()
    copy = torch.tensor([], dtype=x.dtype, device=DEVICE)
    held = torch.empty(storage.nbytes(), dtype=torch.uint8, device=DEVICE)
    held.copy_(torch.tensor([], dtype=torch.uint8).set_(storage))
    return copy.set_(held.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def made_on_device(case: TaskCase) -> Made:
    made = case.make()
    moved = made.map(on_device).leaves()
    moved.task_ids = on_device(made.task_ids)
    return moved


def check(case: TaskCase) -> None:
    """Result and every gradient; a task without samples gets a gradient of zeros."""
    made, want = made_on_device(case), expected(case)
    y = case.run(made)
    tolerance = SLACK[case.dtype] * TASK_TOLERANCE[case.dtype]
    assert (y.dtype, y.device.type) == (case.dtype, DEVICE)
    cases.assert_within(y, want.y, bound(want.y_size, want.y, tolerance, y.dtype))
    grads = gradients(y, made)
    for name, parameter in made.named().items():
        g, exact = grads[name], want.grads[name]
        assert g is not None and g.dtype == parameter.dtype, name
        cases.assert_within(g, exact, bound(want.grad_sizes[name], exact, tolerance, g.dtype))


# --- values and gradients


@pytest.mark.parametrize("case", ON_GPU, ids=str)
def test_few(case: TaskCase, forced: str) -> None:
    if forced == "cuda" and getattr(case, "groups", 1) > 1:
        with pytest.raises(RuntimeError, match="its kernels have no groups"):
            check(case)
        return
    check(case)


@pytest.mark.parametrize("name", ["k1_s2", "k3_s2", "k3_same", "k7_s2", "all", "depthwise", "one_pixel_in"])
def test_geometries(name: str) -> None:
    check(ConvCase(**GEOMETRIES[name], delta="list", gate="zeros", bias="shared", dtype=BF16, x_layout="channels_last"))


def test_more_tasks_than_arguments_hold(compiled: str) -> None:
    """Of the deltas' addresses, which then lie in a table on the device."""
    check(LinearCase(leading=(90,), cin=8, cout=8, num_tasks=70, ids="absent", gate="values", bias="per_task"))


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in (*CONV_CASES, *LINEAR_CASES) if c.dtype != F64], ids=str)
def test_whole_table_in_cuda(case: TaskCase) -> None:
    if getattr(case, "groups", 1) == 1:
        with fastmtl.use_backend("cuda"):
            check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in (*CONV_CASES, *LINEAR_CASES) if c.dtype != F64], ids=str)
def test_whole_table(case: TaskCase) -> None:
    check(case)


def test_float64_runs_the_reference() -> None:
    check(ConvCase(delta="list", gate="values", bias="per_task", dtype=F64))
    with fastmtl.use_backend("triton"), pytest.raises(RuntimeError, match="no float64"):
        check(ConvCase(dtype=F64))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=cases.short)
def test_layers_of_ordinary_size(dtype: torch.dtype, compiled: str) -> None:
    """Tiles full and partly full, several per task, both rows and channels past one tile."""
    common: dict[str, Any] = {"num_tasks": 5, "ids": "absent", "gate": "zeros", "dtype": dtype}
    check(ConvCase(n=9, cin=96, cout=136, size=(15, 14), x_layout="channels_last", weight_layout="mixed", **common))
    check(ConvCase(n=9, cin=64, cout=200, size=(14, 14), kernel=(1, 1), padding=0, bias="per_task", **common))
    check(LinearCase(leading=(6, 100), cin=192, cout=130, delta="stacked", **common))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("schedule", ["staged", "fused"])
def test_schedules(schedule: str, layout: str) -> None:
    """Whatever the rule would choose."""
    configs = pytest.importorskip("fastmtl.kernels.task_weights.configs")
    with configs.force(schedule=schedule):
        check(ConvCase(n=7, cin=32, cout=48, kernel=(1, 1), padding=0, gate="zeros", x_layout=layout, dtype=F16))


@pytest.mark.parametrize("mode", ["walk", "split"])
def test_weight_gradient_modes(mode: str) -> None:
    configs = pytest.importorskip("fastmtl.kernels.task_weights.configs")
    with configs.force(mode=mode):
        check(ConvCase(n=40, cin=32, cout=48, size=(13, 12), num_tasks=4, gate="values", ids="absent", dtype=BF16))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=cases.short)
def test_weight_grad_ops(dtype: torch.dtype, forced: str) -> None:
    """A result of its own, and rows of a bank."""
    ids = make_ids("absent", (9,), 4)
    x, g = (torch.randn(9, c, 8, 8).to(dtype) for c in (5, 6))
    tolerance = SLACK[dtype] * TASK_TOLERANCE[dtype]
    batch = SortedBatch(*reference.task_plan(ids, 4))
    options = (3, 3), Geometry(padding=(1, 1))
    exact = reference.task_conv2d_weight_grad(x.double(), g.double(), batch, *options)
    size = reference.task_conv2d_weight_grad(x.double().abs(), g.double().abs(), batch, *options)
    args = (x.to(DEVICE), g.to(DEVICE), ids.to(DEVICE), 4)
    found = task_conv2d_weight_grad(*args, 3, padding=1)
    assert found.dtype == dtype
    cases.assert_within(found, exact, bound(size, exact, tolerance, dtype))
    bank = torch.full((4, 300), torch.nan, device=DEVICE)
    out = bank.as_strided((4, 6, 5, 3, 3), (300, 45, 1, 15, 5), 17)
    task_conv2d_weight_grad(*args, 3, padding=1, out=out)
    cases.assert_within(out, exact, bound(size, exact, tolerance, F32))
    assert bank[:, :17].isnan().all() and bank[:, 17 + 270 :].isnan().all()

    x, g = x.movedim(1, -1).flatten(1, 2), g.movedim(1, -1).flatten(1, 2)
    exact = reference.task_linear_weight_grad(x.double(), g.double(), batch)
    size = reference.task_linear_weight_grad(x.double().abs(), g.double().abs(), batch)
    found = task_linear_weight_grad(x.to(DEVICE), g.to(DEVICE), ids.to(DEVICE), 4)
    cases.assert_within(found, exact, bound(size, exact, tolerance, dtype))


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32], ids=["int64", "int32"])
@pytest.mark.parametrize(
    ("num_ids", "num_tasks"), [(0, 1), (1, 3), (63, 5), (1024, 2), (16384, 40), (16385, 40), (100000, 7), (50, 3000)]
)
def test_plan(num_ids: int, num_tasks: int, ids_dtype: torch.dtype, forced: str) -> None:
    ids = torch.randint(-1, num_tasks + 1, (num_ids,)).to(ids_dtype)
    plan = task_plan(ids.to(DEVICE), num_tasks)
    order, offsets = reference.task_plan(ids, num_tasks)
    assert torch.equal(plan.order.cpu(), order) and torch.equal(plan.offsets.cpu(), offsets)


SHAPES = ((70, 33), (5, 768), (4, 3, 50), (6, 64, 14, 14), (6, 24, 7, 7), (3, 300, 20, 20), (2, 5, 3, 4, 6))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "table"), [(F32, F32), (BF16, BF16), (F16, F32)], ids=["f32", "bf16", "f16-f32"])
def test_scale_shift(shape: tuple[int, ...], layout: str, dtype: torch.dtype, table: torch.dtype) -> None:
    ids = make_ids("absent", shape[:1], 4)

    def draw() -> Tensor:
        x = torch.randn(shape).to(dtype)
        if layout == "channels_last":
            return x.movedim(1, -1).contiguous().movedim(-1, 1)
        return torch.cat([x, x], -1)[..., : shape[-1]] if layout == "sliced" else x

    x, g, scale, shift = draw(), draw(), torch.randn(4, shape[1]).to(table), torch.randn(4, shape[1]).to(table)
    leaves = [on_device(p).requires_grad_() for p in (x, scale, shift)]
    with fastmtl.use_backend("triton"):
        y = task_scale_shift(*leaves, ids.to(DEVICE))
        grads = torch.autograd.grad(y, leaves, on_device(g))
    assert y.stride() == torch.empty_like(x).stride()
    wide, everything = [p.double() for p in (x, scale, shift)], [True, True, True]
    exact = [
        reference.task_scale_shift(*wide, ids),
        *reference.task_scale_shift_backward(g.double(), *wide, ids, everything),
    ]
    size = [p.abs() for p in wide]
    sizes = [
        reference.task_scale_shift(*size, ids),
        *reference.task_scale_shift_backward(g.double().abs(), *size, ids, everything),
    ]
    for actual, one, magnitude in zip((y, *grads), exact, sizes, strict=True):
        cases.assert_within(actual, one, bound(magnitude, one, 2e-6, actual.dtype))


NORM_SHAPES = ((70, 33), (24, 64, 14, 14), (24, 64, 7, 7), (40, 256, 28, 28), (12, 3, 65, 67))


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("one_launch", [True, False], ids=["one launch", "pieces"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=cases.short)
def test_batch_norm(
    shape: tuple[int, ...],
    layout: str,
    dtype: torch.dtype,
    one_launch: bool,
    training: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Values, gradients and running statistics in place, of both forms of the kernels."""
    monkeypatch.setattr(
        dispatch.triton_kernels("task_weights.batch_norm_launchers"),
        "ONE_LAUNCH_ELEMENTS",
        1 << 40 if one_launch else 0,
    )
    num_tasks, channels = 4, shape[1]
    ids = make_ids("absent", shape[:1], num_tasks)
    x, g = (torch.randn(shape).to(dtype) * 2 + offset for offset in (1, 0))
    if layout == "channels_last":
        x, g = (y.movedim(1, -1).contiguous().movedim(-1, 1) for y in (x, g))
    weight, bias, mean, var = ([torch.randn(channels) for _ in range(num_tasks)] for _ in range(4))
    var = [v.square() + 0.5 for v in var]
    leaves = [on_device(p).requires_grad_() for p in (x, *weight, *bias)]
    kept = [[on_device(p.clone()) for p in params] for params in (mean, var)]
    counts = [torch.zeros((), dtype=torch.int64, device=DEVICE) for _ in range(num_tasks)]
    with fastmtl.use_backend("triton"):
        y = task_batch_norm(
            leaves[0], ids.to(DEVICE), leaves[1 : 1 + num_tasks], leaves[1 + num_tasks :], *kept,
            training=training, num_batches_tracked=counts,
        )  # fmt: skip
        grads = torch.autograd.grad(y, leaves, on_device(g))
    batch = SortedBatch(*reference.task_plan(ids, num_tasks))
    doubled = [[p.double() for p in params] for params in (weight, bias, mean, var)]
    given = ([], []) if training else doubled[2:]
    exact, *used = reference.task_batch_norm(x.double(), *doubled[:2], *given, batch, 1e-5)
    back = reference.task_batch_norm_backward(
        g.double(), x.double(), doubled[0], *used, batch, training, 1e-5, [True] * 3
    )
    for actual, one in zip((y, *grads), (exact, back[0], *back[1], *back[2]), strict=True):
        unit = cases.unit_roundoff(actual.dtype)
        cases.assert_within(actual, one, 1.001 * unit * one.abs() + 2e-5 * one.abs().max().clamp(min=1.0))
    tracked = [torch.zeros((), dtype=torch.int64) for _ in range(num_tasks)]
    if training:
        values = math.prod(shape[2:])
        reference.task_batch_norm_update(*used, batch.offsets, values, 0.1, *doubled[2:], tracked)
    for actual, one in zip((*kept[0], *kept[1]), (*doubled[2], *doubled[3]), strict=True):
        cases.assert_within(actual, one, 1e-5 * (1 + one.abs()))
    assert [int(n) for n in counts] == [int(n) for n in tracked]


def test_batch_norm_of_a_single_value_is_nan(triton_backend: None) -> None:
    ids = torch.tensor([0, 1, 0], device=DEVICE)
    mean, var = torch.zeros(2, 5, device=DEVICE), torch.ones(2, 5, device=DEVICE)
    y = task_batch_norm(torch.randn(3, 5, device=DEVICE), ids, None, None, mean, var, training=True)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()
    assert not mean[1].any() and bool((var[1] == 1).all()) and mean[0].any()


def test_batch_norm_in_a_captured_step(triton_backend: None) -> None:
    """Statistics move at each replay; lists of parameters and statistics have tables of their own in the graph."""
    x = torch.randn(12, 16, 9, 9, device=DEVICE, requires_grad=True)
    ids = torch.randint(3, (12,), device=DEVICE)
    params = [torch.randn(16, device=DEVICE, requires_grad=True) for _ in range(6)]

    def start() -> list[list[Tensor]]:
        return [[torch.full((16,), float(k), device=DEVICE) for _ in range(3)] for k in range(2)]

    def step(kept: list[list[Tensor]]) -> list[Tensor]:
        y = task_batch_norm(x, ids, params[:3], params[3:], *kept, training=True)
        # detached: a graph of autograd that lives on binds the inputs to the stream it was made on
        return [y.detach(), *torch.autograd.grad(y, [x, *params], torch.ones_like(y))]

    eager, kept = start(), start()
    expected = [step(eager) for _ in range(3)][-1]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(start())
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(kept)
    for _ in range(3):
        graph.replay()
    assert_same_bits(found, expected)
    assert_same_bits([*kept[0], *kept[1]], [*eager[0], *eager[1]])


# --- a step of a network: plan, convolution, scale and shift, linear layer, forward and backward


class Step:
    """Inputs at fixed addresses, so that a graph can be captured."""

    def __init__(self, num_tasks: int = 4, num_samples: int = 12, dtype: torch.dtype = BF16) -> None:
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int, of: torch.dtype = F32) -> Tensor:
            return (0.3 * torch.randn(shape, generator=generator)).to(DEVICE, of)

        self.num_tasks = num_tasks
        self.x = draw(num_samples, 16, 9, 9, of=dtype).contiguous(memory_format=torch.channels_last)
        self.ids = torch.randint(num_tasks, (num_samples,), generator=generator).to(DEVICE)
        self.weight, self.linear = draw(24, 16, 3, 3), draw(10, 24)
        self.deltas: list[Tensor | None] = [draw(24, 16, 3, 3) if t != 1 else None for t in range(num_tasks)]
        self.linear_deltas = draw(num_tasks, 10, 24)
        self.gate = torch.tensor([1.0, 0.5, 0.0, -1.0], device=DEVICE)[:num_tasks]
        self.bias, self.scale, self.shift = draw(num_tasks, 24), draw(num_tasks, 24), draw(num_tasks, 24)
        # which has no kernel in CUDA C++
        self.scales = dispatch.forced_backend() != "cuda"
        self.parameters = [
            self.x,
            self.weight,
            *(d for d in self.deltas if d is not None),
            self.gate,
            self.bias,
            *([self.scale, self.shift] if self.scales else []),
            self.linear,
            self.linear_deltas,
        ]
        for p in self.parameters:
            p.requires_grad_()

    def forward(self) -> Tensor:
        plan = task_plan(self.ids, self.num_tasks)
        y = task_conv2d(self.x, self.weight, self.deltas, plan, gate=self.gate, bias=self.bias, stride=2, padding=1)
        y = (task_scale_shift(y, self.scale, self.shift, plan) if self.scales else y).relu()
        return task_linear(y.mean((2, 3)), self.linear, self.linear_deltas, plan)

    def run(self) -> list[Tensor]:
        """The result and every gradient."""
        y = self.forward()
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), self.parameters)]

    def renew(self) -> None:
        """Other data and other ids, in the same memory."""
        with torch.no_grad():
            self.x.copy_(torch.randn(self.x.shape).to(self.x.dtype))
            self.ids.copy_(self.ids.flip(0).add(1) % self.num_tasks)


@pytest.fixture
def triton_backend() -> Iterator[None]:
    with fastmtl.use_backend("triton"):
        yield


def assert_same_bits(a: list[Tensor], b: list[Tensor]) -> None:
    for k, (x, y) in enumerate(zip(a, b, strict=True)):
        assert torch.equal(x, y), f"result {k} differs"


def test_never_waits_for_the_host(compiled: str) -> None:
    step = Step()
    step.run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.run()
        task_plan(torch.zeros(20000, dtype=torch.int64, device=DEVICE), 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graph_replays_with_other_data_and_ids(compiled: str) -> None:
    step = Step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step.run()
    before: list[Tensor] | None = None
    for _ in range(3):
        step.renew()
        graph.replay()
        found = [x.clone() for x in captured]
        assert_same_bits(found, step.run())
        assert before is None or not torch.equal(found[0], before[0])
        before = found


def test_same_bits(compiled: str) -> None:
    step = Step(num_samples=40)
    first = step.run()
    for _ in range(3):
        assert_same_bits(first, step.run())


def test_step_agrees_with_the_reference(compiled: str) -> None:
    step = Step(dtype=F32)
    found = step.run()
    with fastmtl.use_backend("reference"):
        expected = step.run()
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4 * float(y.abs().max()))


def test_runs_on_the_current_stream(compiled: str) -> None:
    step = Step()
    expected = step.run()
    values = step.x.detach().clone()
    with torch.no_grad():
        step.x.zero_()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        # long enough for a kernel on another stream to read the zeros first
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            step.x.copy_(values)
        found = step.run()
    stream.synchronize()
    assert_same_bits(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_another_device(compiled: str) -> None:
    """Than the current one: launches and memory are that of the tensors."""
    x, weight = torch.randn(6, 64), torch.randn(48, 64)
    ids, delta = torch.arange(6) % 2, torch.randn(2, 48, 64)
    found = task_linear(*(t.to("cuda:1") for t in (x, weight, delta, ids)))
    exact = torch.einsum("nc,noc->no", x.double(), (weight + delta).double()[ids])
    assert found.device.index == 1 and torch.cuda.current_device() == 0
    torch.testing.assert_close(found.cpu().double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=cases.short)
def test_the_table_chooses(dtype: torch.dtype) -> None:
    """Whatever it says of this card, an unforced layer is right, also where CUDA C++ declines it."""
    check(ConvCase(n=9, cin=32, cout=48, size=(9, 8), gate="zeros", dtype=dtype, x_layout="channels_last"))
    check(ConvCase(**GEOMETRIES["depthwise"], dtype=dtype))


ONE_WEIGHT: dict[str, TaskCase] = {
    "conv": ConvCase(num_tasks=1, cin=16, cout=24, size=(9, 8), gate="values", bias="per_task", dtype=BF16),
    "depthwise": ConvCase(**GEOMETRIES["depthwise"], num_tasks=1, x_layout="channels_last", dtype=BF16),
    "linear": LinearCase(leading=(9, 5), num_tasks=1, cin=16, cout=24, gate="values", bias="shared", dtype=BF16),
    "no delta": LinearCase(leading=(9, 5), cin=16, cout=24, delta=None, gate="zeros", bias="shared", dtype=BF16),
    "several": LinearCase(leading=(9, 5), num_tasks=4, cin=16, cout=24, ids="absent", gate="zeros", bias="per_task",
                          dtype=BF16),
}  # fmt: skip


@pytest.mark.parametrize("case", ONE_WEIGHT.values(), ids=ONE_WEIGHT)
def test_by_torchs_operators(case: TaskCase) -> None:
    """Where a table chooses cuDNN, cuBLAS and `torch._grouped_mm`: values, no wait for the host, replays of a graph."""
    if (reason := unavailable("cuda", "cuda")) is not None:
        pytest.skip(f"torch's operators are asked beside the kernels of CUDA C++ alone: {reason}")
    with fastest_everywhere("torch"):
        args = case.op_arguments(made_on_device(case))
        for product in ("forward", "backward"):
            found = choice.of_layer(product, args[0], TaskConvCall.of(*args[1:]))
            if case.num_tasks > 1 and found.unsupported["torch"] is not None:
                pytest.skip(found.unsupported["torch"])
            assert found.order[0] == "torch" and found.unsupported["torch"] is None
        check(case)
        made = made_on_device(case)

        def run() -> list[Tensor]:
            y = case.run(made, task_plan(made.task_ids, case.num_tasks))
            return [y.detach(), *torch.autograd.grad(y, list(made.named().values()), made.grad_out.detach())]

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            expected_now = run()
            torch.cuda.set_sync_debug_mode("error")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        graph.replay()
        assert_same_bits(captured, expected_now)
        # ids out of range: NaN, and in no sum
        made.task_ids.view(-1)[0] = -1
        graph.replay()
        assert captured[0][0].isnan().all() and captured[0][1:].isfinite().all()
        assert captured[1][0].isnan().all() and all(g.isfinite().all() for g in captured[2:])


def test_memory_that_is_aligned_otherwise_each_time(compiled: str) -> None:
    # a build is kept for each set of alignments, and launched directly from the second time on
    ids, memory = torch.arange(6, device=DEVICE) % 2, torch.randn(6 * 64 + 8, device=DEVICE, dtype=BF16)
    weight, delta = torch.randn(48, 64, device=DEVICE, dtype=BF16), torch.randn(2, 48, 64, device=DEVICE, dtype=BF16)
    for offset in (0, 1, 0, 8, 1, 3):
        x = memory[offset : offset + 6 * 64].view(6, 64)
        found = task_linear(x, weight, delta, ids)
        effective = weight.double() + delta.double()
        exact = torch.einsum("nc,noc->no", x.double(), effective[ids])
        size = torch.einsum("nc,noc->no", x.double().abs(), effective[ids].abs())
        cases.assert_within(found, exact.cpu(), 2.0**-7 * size.cpu())


def test_compiled(compiled: str, fresh_compiler: None) -> None:
    step = Step(dtype=F32)
    expected = step.run()
    step.forward = torch.compile(step.forward, fullgraph=True)  # type: ignore[method-assign]
    for x, y in zip(step.run(), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4 * float(y.abs().max()))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=cases.short)
def test_autocast_casts_x_only(dtype: torch.dtype, triton_backend: None) -> None:
    made = made_on_device(ConvCase(n=7, cin=16, cout=8, gate="zeros", bias="per_task"))
    linear = made_on_device(LinearCase(bias="shared"))
    ids = made.task_ids
    scale, shift = (torch.randn(3, 16, device=DEVICE) for _ in range(2))

    def run(x: Tensor, rows: Tensor) -> list[Tensor]:
        return [
            task_conv2d(x, made.weight, made.delta, ids, gate=made.gate, bias=made.bias, padding=1),
            task_linear(rows, linear.weight, linear.delta, linear.task_ids, bias=linear.bias),
            task_scale_shift(x, scale, shift, ids),
        ]

    with torch.autocast(DEVICE, dtype=dtype):
        found = run(made.x, linear.x)
    assert all(y.dtype == dtype for y in found)
    assert_same_bits(found, run(made.x.to(dtype), linear.x.to(dtype)))
    grads = torch.autograd.grad(found[0].float().sum(), [made.x, made.weight])
    assert [g.dtype for g in grads] == [F32, F32]


# --- task ids out of range


def _with_bad_ids() -> tuple[Made, Made, list[int], list[int]]:
    """A batch with ids out of range, and the same without these samples."""
    good, bad = [0, 2, 5, 6], [1, 3, 4]
    made = made_on_device(ConvCase(n=7, cin=5, cout=6, delta="stacked", gate="values", bias="per_task"))
    made.task_ids = torch.tensor([2, 3, 0, -1, 2**40, 1, 2], device=DEVICE)
    rest = made.map(lambda x: x)
    rest.x = made.x.detach()[good].requires_grad_()
    rest.grad_out, rest.task_ids = made.grad_out[good], made.task_ids[good]
    return made, rest, good, bad


def test_ids_out_of_range_are_nan_rows(forced: str) -> None:
    case = ConvCase(n=7, cin=5, cout=6, delta="stacked", gate="values", bias="per_task")
    made, rest, good, bad = _with_bad_ids()
    y, without = case.run(made), case.run(rest)
    assert y[bad].isnan().all()
    torch.testing.assert_close(y[good], without)
    grads, expected = gradients(y, made), gradients(without, rest)
    assert grads["x"][bad].isnan().all()
    torch.testing.assert_close(grads["x"][good], expected["x"])
    for name in ("weight", "delta", "gate", "bias"):
        torch.testing.assert_close(grads[name], expected[name], rtol=1e-5, atol=1e-5)

    x, tables = made.x, [torch.randn(3, 5, device=DEVICE, requires_grad=True) for _ in range(2)]
    y = task_scale_shift(x, *tables, made.task_ids)
    assert y[bad].isnan().all() and y[good].isfinite().all()
    found = torch.autograd.grad(y, [x, *tables], torch.ones_like(y))
    assert found[0][bad].isnan().all() and all(g.isfinite().all() for g in (found[0][good], *found[1:]))


def test_ids_are_checked_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMTL_CHECK", "1")
    ids = torch.tensor([0, 3], device=DEVICE)
    w = torch.ones(3, 2, 2, device=DEVICE)
    calls: tuple[Callable[[], Any], ...] = (
        lambda: task_plan(ids, 3),
        lambda: task_linear(torch.ones(2, 2, device=DEVICE), None, w, ids),
        lambda: task_conv2d(torch.ones(2, 2, 1, 1, device=DEVICE), None, w[..., None, None], ids),
        lambda: task_scale_shift(torch.ones(2, 2, device=DEVICE), w[0].expand(3, 2, 2)[:, 0], w[:, 0], ids),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"task_ids: expected ids from 0 to 2, got 3"):
            call()


def test_closed_gates_hide_their_delta(forced: str) -> None:
    """NaN in it reaches its own gate's gradient and nothing else."""
    case = ConvCase(n=7, cin=16, cout=8, num_tasks=3, gate="values", ids="turns")
    made = made_on_device(case)
    with torch.no_grad():
        made.gate[1] = 0
        made.delta[1].fill_(torch.nan)
    y = case.run(made)
    assert y.isfinite().all()
    grads = gradients(y, made)
    assert grads["gate"].isnan().tolist() == [False, True, False]
    assert torch.equal(grads["delta[1]"], torch.zeros_like(grads["delta[1]"]))
    assert all(g.isfinite().all() for name, g in grads.items() if name != "gate")


def test_devices_must_agree() -> None:
    made = made_on_device(ConvCase(delta="stacked"))
    with pytest.raises(ValueError, match=r"task_ids: expected device cuda:0 as x, got cpu"):
        task_conv2d(made.x, made.weight, made.delta, made.task_ids.cpu())
    with pytest.raises(ValueError, match=r"delta: expected device cuda:0 as x, got cpu"):
        task_conv2d(made.x, made.weight, made.delta.cpu(), made.task_ids)


@pytest.mark.slow
def test_more_than_2_31_elements(triton_backend: None) -> None:
    num_pixels = 2**30 + 5
    free, _ = torch.cuda.mem_get_info()
    if free < 20 * 2**30:
        pytest.skip(f"needs 20 GiB of GPU memory, {free / 2**30:.0f} are free")
    x = torch.zeros(1, 3, num_pixels, dtype=BF16, device=DEVICE)
    at = torch.tensor([0, 1, num_pixels - 1], device=DEVICE)
    x[0, :, at] = torch.arange(1, 10, device=DEVICE).reshape(3, 3).to(BF16)
    scale, shift = torch.tensor([[2.0, 3.0, 4.0]], device=DEVICE), torch.zeros(1, 3, device=DEVICE)
    ids = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    y = task_scale_shift(x, scale, shift, ids)
    assert torch.equal(y[0, :, at], x[0, :, at] * scale[0, :, None].to(BF16))
    assert int(y.count_nonzero()) == 9


def test_unforced_is_triton() -> None:
    case = ON_GPU[0]
    made = made_on_device(case)
    with fastmtl.use_backend("triton") if dispatch.unavailable("triton", DEVICE) is None else nullcontext():
        expected = case.run(made)
    assert torch.equal(case.run(made), expected)
