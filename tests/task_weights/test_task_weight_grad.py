"""`task_conv2d_weight_grad` and `task_linear_weight_grad`: values, `out=`, derivatives."""

from __future__ import annotations

import math
from typing import Any

import cases_task as table
import pytest
import torch
import torch.nn.functional as F
from cases import assert_within, short
from cases_task import BF16, DTYPES, F16, F32, F64, GEOMETRIES, TASK_TOLERANCE, ConvCase, LinearCase, TaskCase, bound
from conftest import Backend, skip_or_fail
from torch import Tensor

from fastmtl.core.dispatch import unavailable
from fastmtl.core.task_weights import Geometry, SortedBatch
from fastmtl.ops import task_conv2d_weight_grad, task_linear_weight_grad, task_plan
from fastmtl.ops.task_weights.cpu.weight_grads import weight_grads
from fastmtl.tuning import search
from fastmtl.tuning.table import Limits, uniform


def run(case: TaskCase, x: Tensor, grad_out: Tensor, ids: Any, **options: Any) -> Tensor:
    if isinstance(case, LinearCase):
        return task_linear_weight_grad(x, grad_out, ids, case.num_tasks, **options)
    return task_conv2d_weight_grad(x, grad_out, ids, case.num_tasks, case.kernel, **case.options, **options)


def by_autograd(case: TaskCase, x: Tensor, grad_out: Tensor, ids: Tensor) -> Tensor:
    """Each task's samples by themselves, through torch's own layer and autograd, in float64."""
    found = []
    for t in range(case.num_tasks):
        weight = torch.zeros(case.weight_shape, dtype=F64, requires_grad=True)
        own = ids == t
        if not own.any():
            found.append(weight.detach())
            continue
        a, g = x.detach()[own].double(), grad_out.detach()[own].double()
        y = F.linear(a, weight) if isinstance(case, LinearCase) else F.conv2d(a, weight, **case.options)
        found += torch.autograd.grad(y, weight, g)
    return torch.stack(found)


def shape_of(case: TaskCase) -> tuple[int, ...]:
    return (case.num_tasks, *case.weight_shape)


def assert_weight_grad(case: TaskCase, actual: Tensor, x: Tensor, grad_out: Tensor, ids: Tensor) -> None:
    exact, size = by_autograd(case, x, grad_out, ids), by_autograd(case, x.abs(), grad_out.abs(), ids)
    tolerance = TASK_TOLERANCE[x.dtype] if actual.dtype != F64 else max(TASK_TOLERANCE[x.dtype], 1e-14)
    assert_within(actual, exact, bound(size, exact, tolerance, actual.dtype))


_KINDS = ("random", "sorted", "absent", "runs", "one", "turns")
CASES: list[TaskCase] = [
    ConvCase(**{"ids": _KINDS[(i + j) % len(_KINDS)], **table.MEMORY[(i + 2 * j) % len(table.MEMORY)], **geometry}).but(
        dtype=dtype
    )
    for i, geometry in enumerate(GEOMETRIES.values())
    for j, dtype in enumerate(DTYPES)
]
CASES += [ConvCase(num_tasks=t, n=n, ids="runs") for t, n in ((1, 5), (2, 1), (17, 9), (3, 0))]
CASES += [
    LinearCase(**rows, ids=_KINDS[(i + j) % len(_KINDS)], dtype=dtype, x_layout=layout, grad_layout=layout)
    for i, rows in enumerate(
        (
            {"leading": (7,)},
            {"leading": (4, 3)},
            {"leading": (3, 5), "ids_dims": 2},
            {"leading": (0,)},
            {"leading": (3, 0)},
            {"leading": (60,), "cin": 33, "cout": 17},
        )
    )
    for j, (dtype, layout) in enumerate(zip(DTYPES, ("contiguous", "expanded", "transposed", "sliced"), strict=True))
]
FEW: list[TaskCase] = [
    ConvCase(ids="absent", num_tasks=4),
    ConvCase(**GEOMETRIES["all"], ids="random", x_layout="channels_last"),
    ConvCase(**GEOMETRIES["k1_wide"], ids="sorted", x_layout="channels_last"),
    LinearCase(leading=(5, 3), ids="absent", num_tasks=4),
    LinearCase(leading=(5, 3), ids_dims=2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case: TaskCase, backend: Backend) -> None:
    made = case.make()
    found = run(case, made.x, made.grad_out, made.task_ids)
    assert found.dtype == case.dtype and found.is_contiguous()
    assert_weight_grad(case, found, made.x, made.grad_out, made.task_ids)
    absent = [t for t in range(case.num_tasks) if t not in table.present_tasks(case, made)]
    assert torch.equal(found[absent], torch.zeros_like(found[absent]))
    table.assert_own_memory({"result": found}, {"x": made.x, "grad_out": made.grad_out})


@pytest.mark.parametrize("case", FEW, ids=str)
def test_sum_over_tasks_is_the_gradient_of_the_batch(case: TaskCase, backend: Backend) -> None:
    made = case.but(dtype=F64).make()
    found = run(case, made.x, made.grad_out, made.task_ids)
    together = by_autograd(case.but(num_tasks=1), made.x, made.grad_out, torch.zeros_like(made.task_ids))
    torch.testing.assert_close(found.sum(0, keepdim=True), together, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [*DTYPES, None], ids=str)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=short)
@pytest.mark.parametrize("layer", [FEW[1], FEW[3]], ids=["conv", "linear"])
def test_dtype_of_the_result(
    layer: TaskCase, x_dtype: torch.dtype, dtype: torch.dtype | None, backend: Backend
) -> None:
    case = layer.but(dtype=x_dtype)
    made = case.make()
    found = run(case, made.x, made.grad_out, made.task_ids, dtype=dtype)
    assert found.dtype == (dtype or x_dtype)
    assert_weight_grad(case, found, made.x, made.grad_out, made.task_ids)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_plan_equals_ids(case: TaskCase, backend: Backend) -> None:
    made = case.make()
    plain = run(case, made.x, made.grad_out, made.task_ids)
    for ids in (made.task_ids.int(), task_plan(made.task_ids, case.num_tasks)):
        assert torch.equal(run(case, made.x, made.grad_out, ids), plain)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_is_the_gradient_of_a_layer_without_deltas(case: TaskCase, backend: Backend) -> None:
    """The same numbers as the deltas' gradients of the layer itself."""
    case = case.but(delta="stacked", dtype=F64)
    made = case.make().leaves()
    by_layer = table.gradients(case.run(made), made)["delta"]
    found = run(case, made.x.detach(), made.grad_out.detach(), made.task_ids)
    torch.testing.assert_close(found, by_layer, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_both_ways_to_reach_the_samples(case: TaskCase, gather: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_given", uniform(Limits(0, 0), 10**12 if gather else 0, 0))
    made = case.make()
    found = run(case, made.x, made.grad_out, made.task_ids)
    assert_weight_grad(case, found, made.x, made.grad_out, made.task_ids)


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_gradients_of_biases(
    gather: bool, channels_last: bool, num_threads: int, monkeypatch: pytest.MonkeyPatch, threads: None
) -> None:
    """What `one_pass` takes as it is made: with more tasks than threads, and with fewer."""
    if (reason := unavailable("cpu", "cpu")) is not None:
        skip_or_fail(reason)
    monkeypatch.setattr(search, "_given", uniform(Limits(0, 0), 10**12 if gather else 0, 0))
    torch.set_num_threads(num_threads)
    fmt = torch.channels_last if channels_last else torch.contiguous_format
    x, g = (torch.randn(9, c, 5, 6, dtype=F64).contiguous(memory_format=fmt) for c in (4, 6))
    ids = torch.tensor([0, 3, 3, 0, 1, 0, 3, 1, 0])  # neighbours and not; none of task 2
    plan, geometry = task_plan(ids, 4), Geometry((1, 1), (1, 1), (1, 1), 1)
    for size in (3, 1):
        padding = (size // 2, size // 2)
        w = torch.empty(6, 4, size, size, dtype=F64)
        moves = geometry._replace(padding=padding)
        found, sums = weight_grads(x, g, SortedBatch(plan.order, plan.offsets), moves, w, bias=True)
        assert found[2] is None and not sums[2].any()
        for t in (0, 1, 3):
            here = ids == t
            expected = torch.nn.grad.conv2d_weight(x[here], w.shape, g[here], padding=padding)
            torch.testing.assert_close((found[t], sums[t]), (expected, g[here].sum((0, 2, 3))), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_same_bits_and_threads(case: TaskCase, backend: Backend, threads: None) -> None:
    made = case.make()
    torch.set_num_threads(1)
    first = run(case, made.x, made.grad_out, made.task_ids)
    assert torch.equal(run(case, made.x, made.grad_out, made.task_ids), first)
    torch.set_num_threads(2)
    assert_weight_grad(case, run(case, made.x, made.grad_out, made.task_ids), made.x, made.grad_out, made.task_ids)


def test_non_finite_stays_with_its_task(backend: Backend) -> None:
    for case in (ConvCase(ids="turns"), LinearCase(ids="turns")):
        made = case.make()
        made.x[4] = torch.nan  # of task 1
        made.grad_out[2] = torch.inf  # of task 2
        found = run(case, made.x, made.grad_out, made.task_ids)
        assert torch.isfinite(found[0]).all()
        assert torch.isnan(found[1]).any() and not torch.isfinite(found[2]).all()


# --- out=


def _bank_rows(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Columns 5.. of the rows of a wider bank."""
    size = math.prod(shape[1:])
    bank = torch.full((shape[0], size + 11), 7.0).to(dtype)
    return bank, bank[:, 5 : 5 + size].unflatten(1, shape[1:])


def _bank_rows_channels_last(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same, each row in the order of a channels_last parameter, or of a transposed matrix."""
    bank, rows = _bank_rows((shape[0], shape[1], *shape[3:], shape[2]), dtype)
    return bank, rows.movedim(-1, 2)


def _spread(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Every other element, tasks innermost."""
    bank = torch.full((*shape[1:], 2 * shape[0]), 7.0).to(dtype)
    return bank, bank[..., ::2].movedim(-1, 0)


def _plain(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    out = torch.full(shape, 7.0).to(dtype)
    return out, out


OUTS = {"plain": _plain, "bank": _bank_rows, "bank_channels_last": _bank_rows_channels_last, "spread": _spread}


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=short)
@pytest.mark.parametrize("memory", OUTS)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_out(case: TaskCase, memory: str, dtype: torch.dtype, backend: Backend) -> None:
    """The result is where it was asked for, and nothing beside it is touched."""
    made = case.make()
    bank, out = OUTS[memory](shape_of(case), dtype)
    out.fill_(torch.nan)
    beside = bank.clone()
    version = out._version
    found = run(case, made.x, made.grad_out, made.task_ids, out=out)
    assert found is out and out._version > version
    assert_weight_grad(case, out, made.x, made.grad_out, made.task_ids)
    outside = ~torch.isnan(beside)
    assert torch.equal(bank[outside], beside[outside])
    assert torch.equal(out, run(case, made.x, made.grad_out, made.task_ids, out=out.clone(), dtype=dtype))


def test_out_of_16_bit_inputs_is_rounded_once_more_at_most(backend: Backend) -> None:
    case = ConvCase(dtype=BF16)
    made = case.make()
    out = torch.empty(shape_of(case), dtype=F32)
    assert_weight_grad(
        case, run(case, made.x, made.grad_out, made.task_ids, out=out), made.x, made.grad_out, made.task_ids
    )


def test_out_without_samples_is_zero(backend: Backend) -> None:
    for case in (ConvCase(n=0), LinearCase(leading=(0,)), LinearCase(leading=(2, 0))):
        made = case.make()
        out = torch.full(shape_of(case), torch.nan)
        assert torch.equal(run(case, made.x, made.grad_out, made.task_ids, out=out), torch.zeros_like(out))


BAD_OUTS: dict[str, tuple[Any, type[Exception], str]] = {
    "list": (lambda out, made: [out], TypeError, r"out: expected a tensor, got list"),
    "integers": (lambda out, made: out.long(), TypeError, r"out: expected float64.*got torch.int64"),
    "tasks": (lambda out, made: out[1:], ValueError, r"out: expected shape \[3, .*\] on cpu, got \[2, "),
    "flat": (lambda out, made: out.flatten(1), ValueError, r"out: expected shape \[3, .*\] on cpu, got"),
    "device": (lambda out, made: out.to("meta"), ValueError, r"out: expected shape .* on cpu, got .* on meta"),
    "expanded": (
        lambda out, made: out[:1].expand(out.shape),
        ValueError,
        r"out: expected elements that don't overlap, got strides",
    ),
    "overlapping": (
        lambda out, made: torch.zeros(1000).as_strided(out.shape, [1] * out.dim()),
        ValueError,
        r"out: expected elements that don't overlap",
    ),
    "of x": (
        lambda out, made: made.x.flatten()[: out.numel()].view(out.shape),
        ValueError,
        r"out: expected memory of its own, got that of x",
    ),
    "of grad_out": (
        lambda out, made: made.grad_out.flatten()[: out.numel()].view(out.shape),
        ValueError,
        r"out: expected memory of its own, got that of grad_out",
    ),
    "needs a gradient": (lambda out, made: out.requires_grad_(), RuntimeError, r"out: can't be recorded for autograd"),
}


@pytest.mark.parametrize("kind", BAD_OUTS)
@pytest.mark.parametrize("case", [ConvCase(), LinearCase(leading=(20,))], ids=["conv", "linear"])
def test_bad_out(case: TaskCase, kind: str, backend: Backend) -> None:
    make, error, match = BAD_OUTS[kind]
    made = case.make()
    out = make(torch.full(shape_of(case), 7.0), made)
    before = out.detach().clone() if isinstance(out, Tensor) and out.device.type == "cpu" else None
    with pytest.raises(error, match=match):
        run(case, made.x, made.grad_out, made.task_ids, out=out)
    assert before is None or torch.equal(out, before)


@pytest.mark.parametrize("case", [ConvCase(), LinearCase()], ids=["conv", "linear"])
def test_out_is_not_recorded(case: TaskCase, backend: Backend) -> None:
    made = case.make()
    out = torch.zeros(shape_of(case))
    for name in ("x", "grad_out"):
        x, g = (y.detach().requires_grad_(n == name) for n, y in (("x", made.x), ("grad_out", made.grad_out)))
        with pytest.raises(RuntimeError, match="out: can't be recorded for autograd"):
            run(case, x, g, made.task_ids, out=out)
        assert torch.equal(out, torch.zeros_like(out))
        with torch.no_grad():
            assert (run(case, x, g, made.task_ids, out=out) != 0).any()
        out.zero_()


def test_written_memory_is_seen_by_autograd(backend: Backend) -> None:
    """A tensor saved for backward and then given as `out`."""
    case = ConvCase()
    made = case.make()
    out = torch.ones(shape_of(case))
    leaf = torch.ones(shape_of(case), requires_grad=True)
    product = leaf * out
    run(case, made.x, made.grad_out, made.task_ids, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


# --- derivatives and compiled graphs


SMALL: list[TaskCase] = [
    ConvCase(n=3, cin=2, cout=2, size=(3, 2), kernel=(2, 2), ids="turns", dtype=F64, num_tasks=2),
    ConvCase(n=3, cin=2, cout=2, groups=2, size=(3, 3), kernel=(2, 1), stride=(2, 1), dtype=F64, ids="one"),
    LinearCase(leading=(3,), cin=2, cout=2, dtype=F64, ids="turns"),
    LinearCase(leading=(2, 2), ids_dims=2, cin=2, cout=2, dtype=F64, ids="turns"),
]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck(case: TaskCase, backend: Backend) -> None:
    made = case.make()
    pair = tuple(y.detach().requires_grad_() for y in (made.x, made.grad_out))
    assert torch.autograd.gradcheck(lambda x, g: run(case, x, g, made.task_ids), pair)
    assert torch.autograd.gradgradcheck(lambda x, g: run(case, x, g, made.task_ids), pair)


@pytest.mark.parametrize("case", SMALL[:3:2], ids=str)
def test_gradients_in_another_dtype(case: TaskCase, backend: Backend) -> None:
    """Of a float32 result of bfloat16 inputs, against float64."""
    made = case.but(dtype=BF16).make()
    pair = [y.detach().requires_grad_() for y in (made.x, made.grad_out)]
    exact = [y.detach().double().requires_grad_() for y in pair]
    found = torch.autograd.grad(run(case, *pair, made.task_ids, dtype=F32).square().sum(), pair)
    wanted = torch.autograd.grad(run(case, *exact, made.task_ids).square().sum(), exact)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == BF16
        torch.testing.assert_close(a.double(), b, rtol=0.05, atol=0.05 * b.abs().max().item())


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", [FEW[1], FEW[4]], ids=["conv", "linear"])
def test_compile(case: TaskCase, dynamic: bool, backend: Backend, fresh_compiler: None) -> None:
    def function(x: Tensor, grad_out: Tensor, ids: Tensor) -> Tensor:
        return run(case, x * 2, grad_out, ids, dtype=F64) + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    made = case.make()
    for kind in ("random", "one"):
        ids = table.make_ids(kind, case.ids_shape, case.num_tasks)
        x, g = (y.detach().requires_grad_() for y in (made.x, made.grad_out))
        found, eager = compiled(x, g, ids), function(x, g, ids)
        assert torch.equal(found, eager)
        ways = [torch.autograd.grad(z.square().sum(), (x, g)) for z in (found, eager)]
        assert all(torch.equal(a, b) for a, b in zip(*ways, strict=True))


@pytest.mark.parametrize("case", [FEW[1], FEW[4]], ids=["conv", "linear"])
def test_compile_out(case: TaskCase, backend: Backend, fresh_compiler: None) -> None:
    made = case.make()

    def function(x: Tensor, g: Tensor, ids: Tensor, out: Tensor) -> Tensor:
        return run(case, x, g, ids, out=out) + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    outs = [_bank_rows(shape_of(case), F32)[1] for _ in range(2)]
    y, eager = (f(made.x, made.grad_out, made.task_ids, o) for f, o in zip((compiled, function), outs, strict=True))
    assert torch.equal(y, eager) and torch.equal(*outs)


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_a_float32_cotangent_of_16_bit_samples_is_not_narrowed(kind: str, backend: Backend) -> None:
    size = (1, 1, 1, 1) if kind == "conv" else (1, 1)
    x, g = (torch.full(size, 1e-3, dtype=F16, requires_grad=True) for _ in range(2))
    ids, more = torch.tensor([0]), [(1, 1)] if kind == "conv" else []
    op = task_conv2d_weight_grad if kind == "conv" else task_linear_weight_grad
    out = op(x, g, ids, 1, *more, dtype=F32)
    for found in torch.autograd.grad(out, [x, g], torch.full_like(out, 1e5)):
        torch.testing.assert_close(found.float(), torch.full(size, 100.0), rtol=2e-3, atol=0.0)
