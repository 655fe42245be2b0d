"""`task_lora` on CUDA tensors, against the float64 oracle on the CPU; ids out of range, graphs, and no waiting."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import cases
import pytest
import torch
from cases_lora import (
    FEW_LORA_CASES,
    LORA_CASES,
    LoraCase,
    MadeLora,
    assert_gradients,
    expected,
    gradients,
    tolerance_of,
)
from cases_task import BF16, F16, F32, F64, bound
from torch import Tensor

import fastmtl
from fastmtl.core import dispatch
from fastmtl.ops import task_plan

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
# float32 as three products of truncated tf32 parts: up to 3 * 2^-20 of each product
SLACK = {F64: 1.0, F32: 4.0, BF16: 1.0, F16: 1.0}
ON_GPU = [case.but(dtype=F32) if case.dtype == F64 else case for case in FEW_LORA_CASES]


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    """cuBLAS may otherwise round float32 operands to tf32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(params=["triton", "reference"])
def forced(request: pytest.FixtureRequest) -> Iterator[str]:
    reason = dispatch.unavailable(request.param, DEVICE)
    if reason is not None:
        pytest.skip(reason)
    with fastmtl.use_backend(request.param):
        yield request.param


def made_on_device(case: LoraCase) -> MadeLora:
    made = case.make()
    moved = made.map(lambda x: x.to(DEVICE)).leaves()
    moved.task_ids = made.task_ids.to(DEVICE)
    return moved


def check(case: LoraCase) -> None:
    """Result and every gradient; a task without samples gets a gradient of zeros."""
    made, want = made_on_device(case), expected(case)
    y = case.run(made)
    tolerance = SLACK[case.dtype] * tolerance_of(case.dtype)
    assert (y.dtype, y.device.type) == (case.dtype, DEVICE)
    cases.assert_within(y, want.y, bound(want.y_size, want.y, tolerance, y.dtype))
    assert_gradients(case, made, gradients(y, made), want, zeros=True, tolerance=tolerance)


@pytest.mark.parametrize("case", ON_GPU, ids=str)
def test_few(case: LoraCase, forced: str) -> None:
    check(case)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=cases.short)
@pytest.mark.parametrize("ranks", [(16,), (8, 64, 4)], ids=str)
def test_layers_of_ordinary_size(ranks: tuple[int, ...], dtype: torch.dtype) -> None:
    """Tiles full and partly full, several per task; rows, columns and ranks past one tile."""
    check(
        LoraCase(
            leading=(20, 197), cin=768, cout=776, ranks=ranks, num_tasks=5, ids="absent", scaling="zeros", dtype=dtype
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in LORA_CASES if c.dtype != F64], ids=str)
def test_whole_table(case: LoraCase) -> None:
    check(case)


def test_float64_runs_the_reference() -> None:
    check(LoraCase(scaling="values", bias="per_task", dtype=F64))
    with fastmtl.use_backend("triton"), pytest.raises(RuntimeError, match="no float64"):
        check(LoraCase(dtype=F64))


@pytest.mark.parametrize("shared", [True, False])
def test_ids_out_of_range_are_nan_rows(shared: bool, forced: str) -> None:
    good, bad = [0, 2, 5, 6], [1, 3, 4]
    case = LoraCase(leading=(7, 3), factors="stacked", scaling="values", bias="per_task", shared=shared)
    made = made_on_device(case)
    made.task_ids = torch.tensor([2, 3, 0, -1, 2**40, 1, 2], device=DEVICE)
    rest = replace(
        made,
        x=made.x.detach()[good].requires_grad_(),
        grad_out=made.grad_out.detach()[good],
        task_ids=made.task_ids[good],
    )
    y, without = case.run(made), case.run(rest)
    assert y[bad].isnan().all()
    torch.testing.assert_close(y[good], without)
    found, want = gradients(y, made), gradients(without, rest)
    assert found["x"][bad].isnan().all()
    torch.testing.assert_close(found["x"][good], want["x"])
    for name in found.keys() - {"x"}:
        torch.testing.assert_close(found[name], want[name], rtol=1e-5, atol=1e-5)


# --- a step, at fixed addresses


class Step:
    """A list of factors of several ranks, one of them closed; `scaling` is trained too."""

    def __init__(self) -> None:
        case = LoraCase(
            leading=(12, 9),
            cin=64,
            cout=48,
            ranks=(8, 16, 4),
            num_tasks=4,
            scaling="zeros",
            dtype=BF16,
            factor_dtype=F32,
        )
        self.case, self.made = case, made_on_device(case)

    def run(self) -> list[Tensor]:
        """The result and every gradient."""
        made = self.made
        y = self.case.run(made, task_plan(made.task_ids, 4))
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), list(made.named().values()))]

    def renew(self) -> None:
        """Other data and other ids, in the same memory."""
        with torch.no_grad():
            self.made.x.copy_(torch.randn(self.made.x.shape).to(BF16))
            self.made.task_ids.copy_(self.made.task_ids.flip(0).add(1) % 4)


@pytest.fixture
def triton_backend() -> Iterator[None]:
    with fastmtl.use_backend("triton"):
        yield


def test_never_waits_for_the_host(triton_backend: None) -> None:
    step = Step()
    step.run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.run()
        step.made.scaling = [1.0, 0.5, 0.5, 0.0]
        step.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graph_replays_with_other_data_and_ids(triton_backend: None) -> None:
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
    before: Tensor | None = None
    for _ in range(3):
        step.renew()
        graph.replay()
        found = [x.clone() for x in captured]
        for k, (x, y) in enumerate(zip(found, step.run(), strict=True)):
            assert torch.equal(x, y), f"result {k} differs"
        assert before is None or not torch.equal(found[0], before)
        before = found[0]


def test_same_bits(triton_backend: None) -> None:
    step = Step()
    first = step.run()
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(first, step.run(), strict=True))
