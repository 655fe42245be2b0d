"""The kernels of `task_batch_norm` in Triton's interpreter, against the float64 oracle."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import assert_within, generator_of
from cases_task import BF16, F16, F32, F64, LAYOUTS, make_ids
from torch import Tensor

import fastmtl
from fastmtl.core import dispatch
from fastmtl.core.task_weights import SortedBatch
from fastmtl.ops import task_batch_norm, task_plan
from fastmtl.ops.task_weights import reference

if not dispatch.interpreting():
    pytest.skip("needs TRITON_INTERPRET=1, set before Triton is imported", allow_module_level=True)
pytest.importorskip("triton")

from fastmtl.kernels.task_weights import batch_norm_launchers as kernels

# of one rounding to the dtype; the interpreter cuts bfloat16 off instead of rounding: 2^-8 on a GPU
UNIT = {F32: 2.0**-24, BF16: 2.0**-7, F16: 2.0**-11}
# of float32 arithmetic, relative to the largest magnitude of a tensor
ARITHMETIC = 1e-5
EPS = 1e-5
ALL = [True, True, True]


@pytest.fixture(autouse=True)
def triton_backend() -> Iterator[None]:
    with fastmtl.use_backend("triton"):
        yield


@pytest.fixture(params=["one launch", "pieces"])
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways, on small pictures; pieces of one or two tiles, and totals of several pieces."""
    if request.param == "pieces":
        monkeypatch.setattr(kernels, "ONE_LAUNCH_ELEMENTS", 0)
        monkeypatch.setattr(kernels, "PROGRAMS", 16)
        monkeypatch.setattr(kernels, "TILE", 128)
        monkeypatch.setattr(kernels, "PIXELS", 32)
        monkeypatch.setattr(kernels, "CHANNELS", 16)
        monkeypatch.setattr(kernels, "FINISH_PIECES", 4)
        monkeypatch.setattr(kernels, "FINISH_CHANNELS", 16)
    return request.param


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    dtype: torch.dtype = F32
    table: torch.dtype = F32
    layout: str = "contiguous"
    ids: str = "turns"
    form: str = "list"
    num_tasks: int = 3
    offset: float = 1.0

    def __str__(self) -> str:
        dtypes = "-".join(str(t).removeprefix("torch.") for t in (self.dtype, self.table))
        return f"{'x'.join(map(str, self.shape))}-{self.layout}-{dtypes}-{self.ids}-{self.form}-T{self.num_tasks}"

    def make(self) -> Made:
        generator = generator_of(str(self))
        channels = self.shape[1]

        def draw(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.randn(size, generator=generator, dtype=F64).to(dtype)

        def table(rows: Tensor) -> list[Tensor]:
            forms = {"list": lambda: [r.clone() for r in rows], "stacked": lambda: [rows], "shared": lambda: [rows[0]]}
            return [] if self.form == "none" else forms[self.form]()

        x, g = (LAYOUTS[self.layout](draw(*self.shape, dtype=self.dtype) + offset) for offset in (self.offset, 0))
        weight, bias = (table(draw(self.num_tasks, channels, dtype=self.table)) for _ in "wb")
        mean, var = ([draw(self.num_tasks, channels, dtype=self.table)] for _ in "mv")
        plan = task_plan(make_ids(self.ids, self.shape[:1], self.num_tasks), self.num_tasks)
        return Made(x, g, weight, bias, mean, [var[0].square() + 0.25], SortedBatch(plan.order, plan.offsets))


@dataclass
class Made:
    x: Tensor
    grad_out: Tensor
    weight: list[Tensor]
    bias: list[Tensor]
    mean: list[Tensor]
    var: list[Tensor]
    batch: SortedBatch

    def double(self) -> Made:
        lists = [[p.double() for p in params] for params in (self.weight, self.bias, self.mean, self.var)]
        return Made(self.x.double(), self.grad_out.double(), *lists, self.batch)

    def run(self, family: Any, given: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Result with statistics, and gradients, by the kernels or the oracle."""
        name = "task_batch_norm" if family is reference else "batch_norm"
        statistics = (self.mean, self.var) if given else ([], [])
        out = getattr(family, name)(self.x, self.weight, self.bias, *statistics, self.batch, EPS)
        back = getattr(family, f"{name}_backward")
        grads = back(self.grad_out, self.x, self.weight, out[1], out[2], self.batch, not given, EPS, ALL)
        return list(out), grads


def assert_close(actual: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    assert torch.equal(actual.isnan(), exact.isnan())
    actual, exact = actual.nan_to_num(), exact.nan_to_num()
    largest = exact.abs().max() if exact.numel() else torch.zeros(())
    assert_within(actual, exact, 1.001 * UNIT[dtype] * exact.abs() + ARITHMETIC * largest.clamp(min=1.0))


def check(case: Case, given: bool) -> None:
    made = case.make()
    found, grads = made.run(kernels, given)
    exact, exact_grads = made.double().run(reference, given)
    for actual, want, dtype in zip((*found, *grads), (*exact, *exact_grads), (case.dtype, F32, F32) * 2, strict=True):
        assert_close(actual, want, dtype)
    for out in (found[0], grads[0]):
        assert out.stride() == torch.empty_like(made.x).stride()


CASES = [
    Case((9, 5)),
    Case((12, 20), num_tasks=4, ids="absent"),
    Case((7, 3), layout="transposed"),
    Case((5, 5, 3, 7), form="stacked"),
    Case((5, 5, 3, 7), layout="channels_last"),
    Case((4, 19, 5, 3), layout="channels_last", form="stacked", num_tasks=2),
    Case((6, 4, 6, 6), ids="random", form="shared"),
    Case((6, 4, 3, 3), ids="absent", form="none", num_tasks=4, layout="channels_last"),
    Case((2, 2, 11, 13), num_tasks=1),
    Case((4, 3, 3, 3), layout="sliced", num_tasks=2),
    Case((4, 3, 0)),
    *(
        Case((4, 16, 5, 4), dtype, table, layout, num_tasks=2)
        for dtype, table, layout in ((BF16, BF16, "contiguous"), (BF16, F32, "channels_last"), (F16, F32, "contiguous"))
    ),
]


@pytest.mark.parametrize("given", [False, True], ids=["of batch", "given"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: Case, given: bool, launches: str) -> None:
    check(case, given)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_variance_far_from_zero(layout: str, launches: str) -> None:
    case = Case((6, 3, 7, 9), layout=layout, num_tasks=2, offset=1000.0)
    made = case.make()
    (_, mean, var), _ = made.run(kernels, given=False)
    (_, exact_mean, exact_var), _ = made.double().run(reference, given=False)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_samples_of_no_task(layout: str, launches: str) -> None:
    """They are NaN, and count for no task."""
    made = Case((7, 3, 2, 3), layout=layout, num_tasks=2).make()
    ids = torch.tensor([0, 5, 1, -1, 0, 1, 0])
    made.batch = SortedBatch(*reference.task_plan(ids, 2))
    for given in (False, True):
        found, grads = made.run(kernels, given)
        exact, exact_grads = made.double().run(reference, given)
        assert found[0][[1, 3]].isnan().all() and grads[0][[1, 3]].isnan().all()
        for actual, want in zip((*found, *grads), (*exact, *exact_grads), strict=True):
            assert_close(actual, want, F32)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 1, 1)], ids=str)
def test_a_single_value_is_nan(shape: tuple[int, ...], launches: str) -> None:
    made = Case(shape).make()
    made.batch = SortedBatch(*reference.task_plan(torch.tensor([0, 2, 0, 0]), 3))
    found, grads = made.run(kernels, given=False)
    for out in (found[0], grads[0]):
        assert out.flatten(1).isnan().all(1).tolist() == [False, True, False, False]
    for table in found[1:]:
        assert table.isnan().all(1).tolist() == [False, False, True] and not table[1].any()


@pytest.mark.parametrize("given", [False, True], ids=["of batch", "given"])
def test_only_what_is_wanted(given: bool, launches: str) -> None:
    made = Case((4, 3, 2, 2), layout="channels_last", num_tasks=2).make()
    (_, mean, var), everything = made.run(kernels, given)
    for wanted in itertools.product((False, True), repeat=3):
        args = (made.grad_out, made.x, made.weight, mean, var, made.batch, not given, EPS, list(wanted))
        found = kernels.batch_norm_backward(*args)
        expected = [g for g, want in zip(everything, wanted, strict=True) if want]
        assert len(found) == len(expected)
        assert all(torch.equal(g, e) for g, e in zip(found, expected, strict=True))


def test_given_statistics_do_not_read_x_for_its_gradient(launches: str) -> None:
    made = Case((6, 3, 2, 2)).make()
    made.x[2, 1] = torch.inf
    _, (grad_x, grad_weight, _) = made.run(kernels, given=True)
    assert grad_x.isfinite().all() and not grad_weight.isfinite().all()


def test_non_finite_values_stay_in_their_task(launches: str) -> None:
    for layout in ("contiguous", "channels_last"):
        made = Case((6, 3, 2, 2), layout=layout).make()
        made.x[1, 0] = torch.inf  # of task 1
        made.grad_out[5, 2] = torch.nan  # of task 2
        (y, mean, _), (grad_x, grad_weight, grad_bias) = made.run(kernels, given=False)
        assert y.isfinite().flatten(1).all(1).tolist() == [True, False, True] * 2
        assert grad_x.isfinite().flatten(1).all(1).tolist() == [True, False, False] * 2
        assert mean.isfinite().all(1).tolist() == [True, False, True]
        assert grad_weight.isfinite().all(1).tolist() == [True, False, False]
        assert grad_bias.isfinite().all(1).tolist() == [True, True, False]


def test_counts_past_32_bits_are_those_of_32_bits(launches: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The 64-bit variant of each kernel, on tensors that do not need it."""
    for layout in ("contiguous", "channels_last"):
        made = Case((4, 3, 2, 2), layout=layout, num_tasks=2).make()
        narrow = made.run(kernels, given=False)
        with monkeypatch.context() as patch:
            patch.setattr(kernels._Shape, "int64_offsets", True)
            wide = made.run(kernels, given=False)
        for a, b in zip((*narrow[0], *narrow[1]), (*wide[0], *wide[1]), strict=True):
            assert torch.equal(a, b)


# --- running statistics, and the op as it is called


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("form", ["list", "stacked", "strided"])
def test_update(form: str, dtype: torch.dtype, momentum: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "UPDATE_CHANNELS", 8)
    generator = generator_of((form, dtype))
    mean, var = (torch.randn(4, 19, generator=generator).square() for _ in "mv")
    offsets = torch.tensor([0, 3, 3, 4, 9])
    for values in (1, 6):
        rows = [torch.randn(4, 19, generator=generator).to(dtype) for _ in "mv"]
        tracked = torch.arange(4)

        def held(rows: list[Tensor] = rows, tracked: Tensor = tracked) -> list[list[Tensor]]:
            if form == "stacked":
                return [[r.clone()] for r in (*rows, tracked)]
            if form == "list":
                return [[x.clone() for x in r] for r in (*rows, tracked)]
            return [[torch.stack([x, x], -1)[..., 0] for x in r] for r in (*rows, tracked)]

        found, expected = held(), held()
        kernels.batch_norm_update(mean, var, offsets, values, momentum, *found)
        reference.task_batch_norm_update(mean.double(), var.double(), offsets, values, momentum, *expected)
        for actual, want in zip(found, expected, strict=True):
            for a, b in zip(actual, want, strict=True):
                if a.dtype == torch.int64:
                    assert torch.equal(a, b)
                    continue
                unit = 2.0**-7 if dtype == BF16 else 2.0**-22
                assert_within(a, b.double(), unit * b.double().abs() + 1e-6)
        # the second task has no sample; the third has a single value where a sample has one
        still = {1} if values > 1 else {1, 2}
        moved = torch.stack(found[2]) if form != "stacked" else found[2][0]
        assert {t for t in range(4) if moved[t] == t} == still


@pytest.mark.parametrize("training", [True, False])
def test_the_op(training: bool) -> None:
    made = Case((8, 3, 4, 4)).make()
    ids = make_ids("turns", (8,), 3)
    leaves = [made.x, *made.weight, *made.bias]
    results = []
    for backend in ("triton", "reference"):
        own = [x.detach().clone().requires_grad_() for x in leaves]
        kept = [[torch.zeros(3) for _ in range(3)], [torch.ones(3) for _ in range(3)]]
        with fastmtl.use_backend(backend):
            y = task_batch_norm(own[0], ids, own[1:4], own[4:], *kept, training=training)
            grads = torch.autograd.grad(y, own, made.grad_out, create_graph=True)
            again = torch.autograd.grad(sum(g.square().sum() for g in grads), own[:4], allow_unused=True)
        results.append((y, *grads, *kept[0], *kept[1], *(g for g in again if g is not None)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_float64_is_declined() -> None:
    x = torch.randn(4, 2, dtype=F64)
    with pytest.raises(RuntimeError, match=r"task_batch_norm: backend 'triton' is forced .*no float64"):
        task_batch_norm(x, task_plan(torch.tensor([0, 1, 0, 1]), 2), training=True)
