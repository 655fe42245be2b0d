"""The kernels of `task_plan` and `task_scale_shift` in Triton's interpreter, against the float64 oracle."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import fastmtl
from fastmtl.core import dispatch
from fastmtl.ops import task_plan, task_scale_shift
from fastmtl.ops.task_weights import reference

if not dispatch.interpreting():
    pytest.skip("needs TRITON_INTERPRET=1, set before Triton is imported", allow_module_level=True)
pytest.importorskip("triton")

from fastmtl.kernels.task_weights import task_plan as plan_kernels
from fastmtl.kernels.task_weights import task_scale_shift as scale_kernels

# the interpreter cuts bfloat16 off instead of rounding: 2^-8 on a GPU
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11}
# float32 arithmetic, relative to the sum of the magnitudes that are added
ACCUMULATED = 1e-6
SMALLEST = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-25}


@pytest.fixture(autouse=True)
def triton_backend() -> Iterator[None]:
    with fastmtl.use_backend("triton"):
        yield


# --- task_plan


def assert_plan(found: tuple[Tensor, Tensor], task_ids: Tensor, num_tasks: int) -> None:
    for x, y in zip(found, reference.task_plan(task_ids, num_tasks), strict=True):
        assert x.dtype == torch.int64
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=["int64", "int32"])
@pytest.mark.parametrize(
    ("num_ids", "num_tasks"), [(0, 1), (1, 1), (1, 5), (7, 3), (63, 1), (1024, 2), (1025, 4), (4097, 3), (60, 200)]
)
def test_plan(num_ids: int, num_tasks: int, dtype: torch.dtype) -> None:
    # ids of two tasks out of three, so that some have no samples
    task_ids = (torch.randint(0, num_tasks, (num_ids,)) // 3 * 3).to(dtype)
    plan = task_plan(task_ids, num_tasks)
    assert_plan((plan.order, plan.offsets), task_ids, num_tasks)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=["int64", "int32"])
def test_plan_of_ids_out_of_range(dtype: torch.dtype) -> None:
    limits = torch.iinfo(dtype)
    task_ids = torch.tensor([2, -1, 0, 3, limits.max, 1, limits.min, 0, 2], dtype=dtype)
    order, offsets = plan_kernels.task_plan(task_ids, 3)
    assert order.tolist() == [2, 7, 5, 0, 8, 1, 3, 4, 6]
    assert offsets.tolist() == [0, 2, 3, 5]
    assert_plan(plan_kernels.task_plan(task_ids[1:2], 1), task_ids[1:2], 1)


def test_plan_of_packed_and_strided_ids() -> None:
    wide = torch.randint(0, 4, (6, 10))
    for task_ids in (wide[:, ::2], wide.mT, wide[1:1]):
        plan = task_plan(task_ids, 4)
        assert_plan((plan.order, plan.offsets), task_ids, 4)
        assert plan.task_ids is task_ids


def test_plan_of_a_large_batch_is_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    task_ids = torch.randint(-1, 6, (plan_kernels.MAX_IDS + 3,))
    assert_plan(plan_kernels.task_plan(task_ids, 5), task_ids, 5)
    assert_plan(plan_kernels.task_plan(task_ids[:9], 2000), task_ids[:9], 2000)
    # the same by the kernel
    monkeypatch.setattr(plan_kernels, "MAX_IDS", 1 << 20)
    assert_plan(plan_kernels.task_plan(task_ids, 5), task_ids, 5)


# --- task_scale_shift


class Case(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    table: torch.dtype = torch.float32
    layout: str = "contiguous"
    ids: torch.dtype = torch.int64
    num_tasks: int = 4

    def __str__(self) -> str:
        types = "-".join(str(t).removeprefix("torch.") for t in (self.dtype, self.table, self.ids))
        return f"{'x'.join(map(str, self.shape))}-{self.layout}-{types}-T{self.num_tasks}"

    def make(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x, scale, shift, task_ids, grad_out; the last task but one has no samples."""
        n, c = self.shape[:2]
        x, grad_out = (lay_out(torch.randn(self.shape).to(self.dtype), self.layout) for _ in range(2))
        scale, shift = (torch.randn(self.num_tasks, c).to(self.table) for _ in range(2))
        task_ids = torch.randint(0, self.num_tasks, (n,))
        if self.num_tasks > 2:
            task_ids = torch.where(task_ids == self.num_tasks - 2, 0, task_ids)
        return x, scale, shift, task_ids.to(self.ids), grad_out


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The values of x in other strides; what lies between them is NaN."""
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "strided":
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan)
        view = wide[..., 1::2]
        return view.copy_(x)
    if layout == "batch innermost":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    return x


HALF = (torch.bfloat16, torch.float16)
CASES = [
    Case((5, 3)),
    Case((1, 1), num_tasks=1),
    Case((37, 300), num_tasks=3),
    Case((19, 260), torch.bfloat16, torch.bfloat16),
    Case((4, 5), layout="channels_last"),
    Case((0, 3, 2, 2)),
    Case((3, 0)),
    Case((3, 4, 0)),
    Case((2, 3, 1, 1)),
    Case((2, 1, 5)),
    Case((3, 5, 63)),
    Case((3, 5, 7), layout="channels_last"),
    Case((2, 3, 1100)),
    Case((2, 3, 5000), torch.bfloat16),
    Case((3, 20, 9, 9)),
    Case((2, 70, 4, 5), layout="channels_last"),
    Case((2, 260, 3, 3), layout="channels_last"),
    Case((1, 6, 40, 40), layout="channels_last"),
    Case((3, 4, 2, 3, 2)),
    Case((3, 4, 2, 3, 2), layout="channels_last"),
    Case((3, 4, 5, 6), layout="strided"),
    Case((3, 4), layout="strided"),
    Case((3, 4, 5, 6), layout="batch innermost"),
    # more rows than one chunk of the reduction
    Case((300, 3), num_tasks=2),
    *(
        Case((3, 6, 5, 4), dtype, table, layout, ids)
        for dtype, layout in itertools.product(HALF, ("contiguous", "channels_last"))
        for table, ids in ((dtype, torch.int64), (torch.float32, torch.int32))
    ),
]


def assert_rounded(actual: Tensor, expected: Tensor, magnitude: Tensor) -> None:
    """As close as float32 arithmetic and one rounding to the result's dtype come, NaN where NaN is expected."""
    assert actual.shape == expected.shape
    unit = UNIT[actual.dtype] * 1.001
    bound = ACCUMULATED * magnitude + unit * expected.abs() + SMALLEST[actual.dtype]
    off = (actual.double() - expected).abs() > bound
    assert torch.equal(actual.isnan(), expected.isnan()) and not off.any(), f"{int(off.sum())} of {off.numel()} off"


def oracle(case_inputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    """Result and gradients in float64, and the sums of the magnitudes that each adds up."""
    x, scale, shift, task_ids, grad_out = case_inputs
    x, scale, shift, grad_out = (y.double() for y in (x, scale, shift, grad_out))
    everything = [True, True, True]
    return (
        reference.task_scale_shift(x, scale, shift, task_ids),
        reference.task_scale_shift_backward(grad_out, x, scale, shift, task_ids, everything),
        reference.task_scale_shift(x.abs(), scale.abs(), shift.abs(), task_ids),
        reference.task_scale_shift_backward(grad_out.abs(), x.abs(), scale.abs(), shift, task_ids, everything),
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scale_shift(case: Case) -> None:
    inputs = case.make()
    expected, expected_grads, magnitude, magnitudes = oracle(inputs)
    x, scale, shift, task_ids, grad_out = inputs
    leaves = [y.requires_grad_() for y in (x.detach(), scale, shift)]
    y = task_scale_shift(*leaves, task_ids)
    assert (y.dtype, y.shape, y.stride()) == (x.dtype, x.shape, torch.empty_like(x).stride())
    assert_rounded(y.detach(), expected, magnitude)
    grads = torch.autograd.grad(y, leaves, grad_out)
    assert grads[0].stride() == torch.empty_like(x).stride()
    for leaf, actual, one, bound in zip(leaves, grads, expected_grads, magnitudes, strict=True):
        assert actual.dtype == leaf.dtype
        assert_rounded(actual, one, bound)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_sums_in_chunks(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More parts of samples than one program reduces, several per sample."""
    monkeypatch.setattr(scale_kernels, "ROWS_PER_CHUNK", 32)
    monkeypatch.setattr(scale_kernels, "PIXELS_PER_SUM", {"contiguous": 16, "channels_last": 16})
    inputs = Case((17, 5, 2, 1030), torch.float16, layout=layout, num_tasks=3).make()
    _, expected, _, magnitudes = oracle(inputs)
    x, scale, shift, task_ids, grad_out = inputs
    found = scale_kernels.scale_shift_backward(grad_out, x, scale, shift, task_ids, [True, True, True])
    for actual, one, bound in zip(found, expected, magnitudes, strict=True):
        assert_rounded(actual, one, bound)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("shape", [(6, 5, 3, 4), (7, 5)], ids=["pictures", "rows"])
def test_only_what_is_wanted(shape: tuple[int, ...], layout: str) -> None:
    x, scale, shift, task_ids, grad_out = Case(shape, layout=layout).make()
    args = (grad_out, x, scale, shift, task_ids)
    everything = scale_kernels.scale_shift_backward(*args, [True, True, True])
    for wanted in itertools.product((False, True), repeat=3):
        found = scale_kernels.scale_shift_backward(*args, list(wanted))
        expected = [g for g, want in zip(everything, wanted, strict=True) if want]
        assert len(found) == len(expected)
        assert all(torch.equal(g, e) for g, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(6, 5, 3, 4), (6, 5)], ids=["pictures", "rows"])
@pytest.mark.parametrize("ids", [torch.int64, torch.int32], ids=["int64", "int32"])
def test_ids_out_of_range(shape: tuple[int, ...], layout: str, ids: torch.dtype) -> None:
    """Their rows are NaN and count for no task; nothing is read for them."""
    x, scale, shift, _, grad_out = Case(shape, layout=layout, num_tasks=2).make()
    limits = torch.iinfo(ids)
    task_ids = torch.tensor([0, 2, 1, -1, limits.max, limits.min], dtype=ids)
    expected, expected_grads, magnitude, magnitudes = oracle((x, scale, shift, task_ids, grad_out))
    y = scale_kernels.scale_shift(x, scale, shift, task_ids)
    assert y[[1, 3, 4, 5]].isnan().all() and y[[0, 2]].isfinite().all()
    assert_rounded(y, expected, magnitude)
    found = scale_kernels.scale_shift_backward(grad_out, x, scale, shift, task_ids, [True, True, True])
    assert found[0][[1, 3, 4, 5]].isnan().all()
    for actual, one, bound in zip(found, expected_grads, magnitudes, strict=True):
        assert_rounded(actual, one, bound)


@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (4, 3)], ids=["pictures", "rows"])
def test_non_finite_values_stay_in_their_task(shape: tuple[int, ...]) -> None:
    x, scale, shift, _, grad_out = Case(shape, num_tasks=3).make()
    task_ids = torch.tensor([0, 1, 2, 1])
    x[1, 0] = torch.inf
    grad_out[2, 1] = torch.nan
    grad_x, grad_scale, grad_shift = scale_kernels.scale_shift_backward(
        grad_out, x, scale, shift, task_ids, [True, True, True]
    )
    assert grad_x.isfinite().flatten(1).all(1).tolist() == [True, True, False, True]
    assert grad_scale.isfinite().tolist() == [[True] * 3, [False, True, True], [True, False, True]]
    assert grad_shift.isfinite().tolist() == [[True] * 3, [True] * 3, [True, False, True]]


def test_expanded_gradient_and_strided_tables() -> None:
    x, scale, shift, task_ids, _ = Case((3, 4, 5, 5)).make()
    wide = torch.stack([scale, shift], dim=2)
    spread_ids = torch.stack([task_ids, task_ids + 9], dim=1)[:, 0]
    leaves = [y.detach().requires_grad_() for y in (x, wide[..., 0], wide[..., 1])]
    assert not leaves[1].is_contiguous() and not spread_ids.is_contiguous()
    grads = torch.autograd.grad(task_scale_shift(*leaves, spread_ids).sum(), leaves)
    _, expected_grads, _, magnitudes = oracle((x, scale, shift, task_ids, torch.ones_like(x)))
    for actual, one, bound in zip(grads, expected_grads, magnitudes, strict=True):
        assert_rounded(actual, one, bound)


def test_a_plan_in_place_of_ids() -> None:
    x, scale, shift, task_ids, _ = Case((6, 3, 4)).make()
    plan = task_plan(task_ids, scale.shape[0])
    assert torch.equal(task_scale_shift(x, scale, shift, plan), task_scale_shift(x, scale, shift, task_ids))


def test_positions_past_32_bits_are_those_of_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 64-bit variant of each kernel, on tensors that do not need it."""
    for layout, shape in itertools.product(("contiguous", "channels_last"), ((3, 5, 4, 4), (5, 7))):
        inputs = Case(shape, layout=layout).make()
        x, scale, shift, task_ids, grad_out = inputs

        def run(x=x, scale=scale, shift=shift, task_ids=task_ids, grad_out=grad_out) -> list[Tensor]:
            y = scale_kernels.scale_shift(x, scale, shift, task_ids)
            return [y, *scale_kernels.scale_shift_backward(grad_out, x, scale, shift, task_ids, [True, True, True])]

        narrow = run()
        with monkeypatch.context() as patch:
            patch.setattr(scale_kernels._Tiling, "int64_offsets", True)
            wide = run()
        assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


def test_second_derivative() -> None:
    x, scale, shift, task_ids, _ = Case((3, 2, 3)).make()
    leaves = [y.requires_grad_() for y in (x, scale, shift)]

    def penalty(run, leaves: list[Tensor]) -> Tensor:
        grads = torch.autograd.grad(run(*leaves, task_ids).square().sum(), leaves, create_graph=True)
        return sum((g.square().sum() for g in grads), torch.zeros(()))

    found = torch.autograd.grad(penalty(task_scale_shift, leaves), leaves)
    wide = [y.detach().double().requires_grad_() for y in leaves]
    expected = torch.autograd.grad(penalty(reference.task_scale_shift, wide), wide)
    for actual, one in zip(found, expected, strict=True):
        torch.testing.assert_close(actual.double(), one, rtol=1e-4, atol=1e-4)


def test_float64_is_declined() -> None:
    x, scale, shift, task_ids, _ = Case((3, 2)).make()
    with pytest.raises(RuntimeError, match=r"task_scale_shift: backend 'triton' is forced .*no float64"):
        task_scale_shift(x.double(), scale.double(), shift.double(), task_ids)
