"""The kernels of `task_conv2d` and `task_linear` in Triton's interpreter, against the float64 oracle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from cases import assert_within
from cases_task import (
    BF16,
    F16,
    F32,
    LAYOUTS,
    ConvCase,
    LinearCase,
    Made,
    TaskCase,
    expected_of,
    gradients,
    present_tasks,
)
from torch import Tensor

import fastmtl
from fastmtl.core import dispatch
from fastmtl.ops import TaskPlan, task_conv2d, task_conv2d_weight_grad, task_linear, task_linear_weight_grad
from fastmtl.ops.task_weights import reference

if not dispatch.interpreting():
    pytest.skip("needs TRITON_INTERPRET=1, set before Triton is imported", allow_module_level=True)
pytest.importorskip("triton")

import triton
import triton.language as tl

from fastmtl.core.task_weights import STILL, SortedBatch, TaskConvCall, TaskWeights
from fastmtl.kernels.common import launches
from fastmtl.kernels.task_weights import configs, operands
from fastmtl.kernels.task_weights import conv_launchers as launchers
from fastmtl.kernels.task_weights.configs import Tile
from fastmtl.kernels.task_weights.tiles import quotient
from fastmtl.ops.task_weights.arguments import TRITON_MAX_TASKS, read_geometry, triton_declines

# of one rounding to the dtype; the interpreter cuts bfloat16 off instead of rounding: 2^-8 on a GPU
UNIT = {F32: 2.0**-24, BF16: 2.0**-7, F16: 2.0**-11}
# relative to the sum of the magnitudes that are added: W + s Delta is rounded once to a 16-bit dtype
TOLERANCE = {F32: 1e-6, BF16: 2.0**-7, F16: 2.0**-11}
SMALLEST = {F32: 1e-38, BF16: 1e-38, F16: 2.0**-24}

# smaller than the layers below, so that every loop goes round more than once
SMALL = {name: Tile(16, 16, 32, 4, 1) for name in ("fwd", "fwd_fused", "fwd_packed", "dgrad", "dgrad_fused")}
SMALL |= {
    "wgrad": Tile(16, 16, 16, 4, 1),
    "wgrad_split": Tile(16, 16, 16, 4, 1),
    "wgrad_packed": Tile(16, 32, 16, 4, 1),
}
STAGED = {"schedule": "staged", "mode": "walk", "chunks": 1}
FUSED = {"schedule": "fused", "mode": "split", "split_rows": 16, "chunks": 2}


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    with fastmtl.use_backend("triton"), configs.force(**SMALL), launches.forgetting():
        yield


class Seen(NamedTuple):
    """A launch, as it is made."""

    name: str
    grid: tuple[int, ...]
    settled: dict[str, Any]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    """Takes the launches of a test."""
    found: list[Seen] = []
    call = launches.Prepared.__call__

    def launch(self: launches.Prepared, **filled: Any) -> None:
        found.append(Seen(self._fn.__name__, self._grid, self._settled))
        call(self, **filled)

    monkeypatch.setattr(launches.Prepared, "__call__", launch)
    return found


def assert_close(x: Tensor, exact: Tensor, size: Tensor, dtype: torch.dtype) -> None:
    assert x.shape == exact.shape
    bound = TOLERANCE[dtype] * size + 1.001 * UNIT[x.dtype] * exact.abs() + SMALLEST[x.dtype]
    assert_within(x.double(), exact, bound)


def check(case: TaskCase, made: Made | None = None, exact: Made | None = None, **forced: Any) -> dict[str, Any]:
    """Result and every gradient; `exact`: what the oracle gets, where `made` has a NaN that nobody may read."""
    made = case.make() if made is None else made
    want = expected_of(case, made if exact is None else exact)
    leaves = made.leaves()
    with configs.force(**forced):
        y = case.run(leaves)
        found = gradients(y, leaves)
    assert y.dtype == case.dtype
    assert_close(y.detach(), want.y, want.y_size, case.dtype)
    for name, g in found.items():
        if name.startswith("delta[") and int(name[6:-1]) not in present_tasks(case, made):
            assert g is None
            continue
        assert g is not None and g.dtype == leaves.named()[name].dtype, name
        assert_close(g, want.grads[name], want.grad_sizes[name], case.dtype)
    return found


PLAIN = ConvCase(gate="values", bias="per_task", delta="nones", cin=4, cout=17, n=4, size=(3, 4))
# more channels than a block of the product is deep
WIDE = PLAIN.but(cin=33, cout=18, n=3, size=(2, 3), x_layout="channels_last", kernel=(1, 2), padding=(0, 1))

STAGED_LAYERS = [
    PLAIN,
    WIDE,
    PLAIN.but(delta="stacked", gate="zeros", ids="absent", num_tasks=5, cout=3),
    PLAIN.but(delta="stacked_permuted", gate=None, bias=None, cout=3),
    WIDE.but(kernel=(1, 1), padding=0, stride=2, weight_layout="mixed"),
    PLAIN.but(kernel=(3, 2), stride=(2, 1), dilation=(2, 3), padding=(2, 2), weight_layout="channels_last", cout=3),
    PLAIN.but(kernel=(2, 2), stride=3, padding=1, dilation=2, size=(5, 4), cout=3, n=3),
    PLAIN.but(kernel=(3, 2), padding="same", x_layout="transposed", grad_layout="expanded", cout=3, n=3),
    PLAIN.but(groups=3, cin=6, cout=9, stride=2, weight_layout="mixed", n=3),
    PLAIN.but(groups=3, cin=3, cout=6, bias="shared", x_layout="expanded_batch", n=3),
    PLAIN.but(num_tasks=20, n=3, cout=3, kernel=(1, 2)),
]
FUSED_LAYERS = [
    PLAIN,
    WIDE,
    PLAIN.but(delta="list", gate=None, bias="shared", shared=False, cout=3),
    PLAIN.but(delta="all_none", ids="reversed", cout=3),
    WIDE.but(delta="stacked", kernel=(1, 1), padding=0, gate="closed"),
    WIDE.but(kernel=(2, 1), stride=2, num_tasks=1, delta="list"),
    PLAIN.but(kernel=(3, 3), stride=(2, 3), dilation=(4, 3), padding=(5, 4), n=3, cout=3),
    PLAIN.but(kernel=(2, 3), padding="same", x_layout="channels_last_sliced", grad_layout="channels_last", cout=3),
    PLAIN.but(groups=2, cin=50, cout=34, x_layout="channels_last", n=2, size=(2, 2), kernel=(1, 2)),
    PLAIN.but(groups=4, cin=4, cout=4, delta="stacked", n=3),
    PLAIN.but(ids="one", ids_dtype=torch.int32, x_layout="batch_inside", cout=3),
]


@pytest.mark.parametrize("case", STAGED_LAYERS, ids=str)
def test_staged_and_walked(case: ConvCase) -> None:
    check(case, **STAGED)


@pytest.mark.parametrize("case", FUSED_LAYERS, ids=str)
def test_fused_and_split(case: ConvCase) -> None:
    check(case, **FUSED)


@pytest.mark.parametrize(("dtype", "weight_dtype"), [(BF16, None), (F16, None), (BF16, F32), (F16, F32)])
def test_sixteen_bits(dtype: torch.dtype, weight_dtype: torch.dtype | None) -> None:
    case = PLAIN.but(dtype=dtype, weight_dtype=weight_dtype, n=3, cout=3)
    check(case.but(x_layout="channels_last"), **STAGED)
    check(case.but(delta="stacked", stride=2), **FUSED)


@pytest.mark.parametrize(
    "case",
    [
        LinearCase(gate="values", bias="per_task", cin=37, cout=18, leading=(9,), delta="nones"),
        LinearCase(gate="zeros", bias="shared", cin=21, leading=(3, 5), delta="stacked", x_layout="transposed"),
        LinearCase(gate="values", leading=(3, 5), ids_dims=2, shared=False, dtype=BF16, weight_dtype=F32),
    ],
    ids=str,
)
def test_linear_and_gradients(case: LinearCase) -> None:
    check(case, **STAGED)
    check(case, **FUSED)


@pytest.mark.parametrize("mode", ["walk", "split"])
@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_tasks_in_chunks(mode: str, chunks: int) -> None:
    case = PLAIN.but(num_tasks=5, cin=2, cout=3, delta="list", kernel=(1, 2), padding=0)
    check(case, schedule="staged", mode=mode, chunks=chunks, split_rows=16)


@pytest.mark.parametrize("case", [PLAIN, WIDE], ids=["packed", "wide"])
def test_tiles_and_schedules_as_the_rules_choose_them(case: ConvCase) -> None:
    with configs.force(**dict.fromkeys(SMALL)):
        check(case)


@pytest.mark.parametrize("case", [PLAIN.but(n=2, cout=3), WIDE.but(n=2, stride=2)], ids=["packed", "wide"])
@pytest.mark.parametrize("forced", [STAGED, FUSED], ids=["staged-walk", "fused-split"])
def test_offsets_of_64_bits(case: ConvCase, forced: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operands, "INT32_MAX", 0)
    check(case, **forced)


@pytest.mark.parametrize("wide", [False, True], ids=["32-bit", "64-bit"])
@pytest.mark.parametrize("forced", [STAGED, FUSED], ids=["staged-walk", "fused-split"])
def test_pictures_too_large_for_divisions_in_float32(
    forced: dict[str, Any], wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "SMALL_PIXELS", 0)
    if wide:
        monkeypatch.setattr(operands, "INT32_MAX", 0)
    check(PLAIN.but(n=3, cout=3, stride=(2, 1)), **forced)


# not multiples of 16, which Triton sees by itself: 16 bytes are 8 elements, or 4 in float32
EIGHTS = ConvCase(
    cin=40, cout=24, n=3, size=(2, 3), kernel=(1, 2), padding=(0, 1), gate="values", bias="per_task", dtype=BF16,
    x_layout="channels_last", grad_layout="channels_last", weight_layout="channels_last",
)  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [EIGHTS, EIGHTS.but(delta="stacked_permuted", kernel=(1, 1), padding=0), EIGHTS.but(dtype=F32, cin=28, cout=12)],
    ids=["list", "stacked", "fours"],
)
@pytest.mark.parametrize("forced", [STAGED, FUSED], ids=["staged-walk", "fused-split"])
def test_channels_of_sixteen_bytes(case: ConvCase, forced: dict[str, Any]) -> None:
    check(case, **forced)


def test_what_is_known_of_strides_and_sizes() -> None:
    """What is so and no more: a multiple that is none would lead to wrong addresses."""
    x = torch.empty(2, 40, 3, 5, dtype=BF16).contiguous(memory_format=torch.channels_last)
    assert operands.common_multiple(x) == operands.common_multiple(x, sizes=(8, 1000)) == 8
    assert operands.common_multiple(x, sizes=(8, 36)) == 1
    assert operands.common_multiple(x.float(), sizes=(36,)) == 4
    # pixels lie 43 apart, or side by side, or are one
    assert operands.common_multiple(torch.empty(2, 43, 3, 5).contiguous(memory_format=torch.channels_last)[:, :40]) == 1
    assert operands.common_multiple(x.contiguous()) == 1
    assert operands.common_multiple(x[..., :1, :1].contiguous(), x) == 8
    # filters: taps side by side; one tap; stacks whose rows lie apart
    stack = torch.empty(3, 8, 40, 2, 2, dtype=BF16)
    assert operands.common_multiple(stack) == operands.common_multiple(stack[0]) == 1
    assert operands.common_multiple(stack.movedim(2, -1).contiguous().movedim(-1, 2)) == 8
    assert operands.common_multiple(torch.empty(3, 8, 40, 1, 1, dtype=BF16)) == 8
    bank = torch.empty(3, 8 * 40 + 1, dtype=BF16)
    rows = bank[:, 1:].unflatten(1, (8, 40, 1, 1))
    assert operands.common_multiple(rows) == 1 and operands.common_multiple(rows[0]) == 8
    # a list is reached through a table of addresses, which must be multiples of 16 bytes
    assert operands.deltas_of([rows[2], rows[2]], [0, 1], 2).multiple == (8 if rows[2].data_ptr() % 16 == 0 else 1)
    assert {operands.deltas_of([rows[k]], [0], 1).multiple for k in range(3)} >= {1}


def _quotients(x: Tensor, y: Tensor, ulps: int) -> Tensor:
    """`stage.quotient` in numpy, the reciprocal off by so many units in its last place."""
    one = np.float32(1) / y.numpy().astype(np.float32)
    one = (one.view(np.int32) + np.int32(ulps)).view(np.float32)
    return torch.from_numpy(((x.numpy().astype(np.float32) + np.float32(0.5)) * one).astype(np.int32))


@triton.jit
def _quotient_kernel(p_x, p_y, p_out, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_out + at, quotient(tl.load(p_x + at), tl.load(p_y + at)))


def test_quotients_in_float32_are_exact() -> None:
    """On both sides of every boundary near the largest x, where the device's reciprocal is off by up to two units."""
    largest = configs.SMALL_PIXELS + 2**16
    y = torch.cat([torch.arange(1, 4097), torch.randint(1, largest, (60_000,)), largest - torch.arange(1440)])
    multiple = torch.stack([largest // y * y, torch.randint(0, largest, y.shape) // y * y])
    for shift in (-1, 0):
        x = (multiple + shift).clamp(min=0).flatten().to(torch.int32)
        each = y.repeat(2).to(torch.int32)
        for ulps in (-2, -1, 0, 1, 2):
            assert torch.equal(_quotients(x, each, ulps), x // each)
        out = torch.empty_like(x)
        _quotient_kernel[(x.numel() // 4096,)](x, each, out, BLOCK=4096)
        count = x.numel() // 4096 * 4096
        assert torch.equal(out[:count], (x // each)[:count])
    assert not torch.equal(_quotients(x * 8, each, 2), x * 8 // each)


@pytest.mark.parametrize("stacked", [False, True], ids=["list", "stacked"])
@pytest.mark.parametrize("forced", [STAGED, FUSED], ids=["staged-walk", "fused-split"])
def test_nothing_behind_a_closed_gate_is_read(stacked: bool, forced: dict[str, Any]) -> None:
    # tasks 0 and 2 are closed, task 1 has no samples
    case = ConvCase(
        cin=2, cout=3, n=5, size=(2, 3), gate="zeros", ids="absent", num_tasks=4, delta="stacked" if stacked else "list"
    )
    made, exact = case.make(), case.make()
    for t in (0, 1, 2):
        made.delta[t].fill_(torch.nan)
    want = expected_of(case, exact)
    leaves = made.leaves()
    with configs.force(**forced):
        y = case.run(leaves)
        found = gradients(y, leaves)
    assert_close(y.detach(), want.y, want.y_size, F32)
    for name, g in found.items():
        if name == "gate":
            continue
        if g is not None:
            assert_close(g, want.grads[name], want.grad_sizes[name], F32)
    closed = found["delta"][0] if stacked else found["delta[0]"]
    assert torch.equal(closed, torch.zeros_like(closed))
    # its own gradient shows it, where the task has samples; that of the absent task does not
    assert torch.isnan(found["gate"][0]) and found["gate"][1] == 0 and torch.isfinite(found["gate"][3])


@pytest.mark.parametrize("forced", [STAGED, FUSED], ids=["staged-walk", "fused-split"])
def test_non_finite_samples_and_gates(forced: dict[str, Any]) -> None:
    # task 0 is closed, task 1 is not, task 2 has no samples and an infinite gate
    x, grad_out = torch.randn(4, 2, 2, 3), torch.randn(4, 3, 2, 3)
    x[0, 1, 0, 0] = torch.nan
    ids = torch.tensor([0, 1, 1, 0])
    weight = torch.randn(3, 2, 1, 1, requires_grad=True)
    delta = torch.randn(3, 3, 2, 1, 1, requires_grad=True)
    gate = torch.tensor([0.0, 0.5, torch.inf], requires_grad=True)
    with configs.force(**forced):
        y = task_conv2d(x, weight, delta, ids, gate=gate)
        grad_weight, grad_delta, grad_gate = torch.autograd.grad(y, [weight, delta, gate], grad_out)
    assert torch.isnan(y).nonzero()[:, 0].unique().tolist() == [0]
    assert torch.isnan(grad_weight[:, 1]).all() and torch.isfinite(grad_weight[:, 0]).all()
    assert (grad_delta[[0, 2]] == 0).all() and torch.isfinite(grad_delta[1]).all()
    assert torch.isnan(grad_gate[0]) and torch.isfinite(grad_gate[1]) and grad_gate[2] == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("forced", [STAGED, FUSED], ids=["staged-walk", "fused-split"])
def test_a_gate_that_is_not_finite_beside_no_delta(forced: dict[str, Any], value: float) -> None:
    # task 0 sees W as it is, whatever its gate
    x, ids, grad_out = torch.randn(4, 2, 2, 3), torch.tensor([0, 1, 1, 0]), torch.randn(4, 3, 2, 3)
    x.requires_grad_()
    weight, own = (torch.randn(3, 2, 1, 1, requires_grad=True) for _ in range(2))
    gate = torch.tensor([value, 0.5], requires_grad=True)
    leaves = [x, weight, own]
    with configs.force(**forced):
        y = task_conv2d(x, weight, [None, own], ids, gate=gate)
        *found, grad_gate = torch.autograd.grad(y, [*leaves, gate], grad_out)
    exact = [p.detach().double().requires_grad_() for p in leaves]
    each = exact[1] + torch.tensor([0.0, 0.5])[ids].double()[:, None, None, None, None] * exact[2]
    want = torch.einsum("nchw,noc->nohw", exact[0], each[..., 0, 0])
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    for a, b in zip(found, torch.autograd.grad(want, exact, grad_out.double()), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    assert grad_gate[0] == 0 and torch.isfinite(grad_gate[1])


@pytest.mark.parametrize("wanted", ["x", "weight", "delta", "gate", "bias", "one delta"])
@pytest.mark.parametrize("mode", ["walk", "split"])
def test_each_gradient_alone(wanted: str, mode: str) -> None:
    case = ConvCase(cin=2, cout=3, n=5, size=(2, 3), gate="zeros", bias="shared", delta="list", ids="turns")
    made = case.make()
    want = expected_of(case, made)
    name = {"delta": "delta[1]", "one delta": "delta[0]"}.get(wanted, wanted)
    names = [f"delta[{t}]" for t in range(3)] if wanted == "delta" else [name]
    for n in names:
        made.named()[n].requires_grad_()
    with configs.force(mode=mode, split_rows=16):
        found = torch.autograd.grad(case.run(made), [made.named()[n] for n in names], made.grad_out)
    for n, g in zip(names, found, strict=True):
        assert_close(g, want.grads[n], want.grad_sizes[n], F32)


@pytest.mark.parametrize("forced", [STAGED, FUSED], ids=["staged-walk", "fused-split"])
def test_samples_of_no_task(forced: dict[str, Any]) -> None:
    case = ConvCase(cin=2, cout=3, n=6, size=(2, 3), gate="values", bias="per_task", delta="nones")
    made = case.make()
    ids = torch.tensor([-1, 2, 7, 0, 3, 2])
    plan = TaskPlan(ids, *reference.task_plan(ids, 3))
    good = (ids >= 0) & (ids < 3)
    leaves = made.leaves()
    with configs.force(**forced):
        y = case.run(leaves, plan)
        found = gradients(y, leaves)
    for rows in (y, found["x"]):
        assert torch.isnan(rows[~good]).all()
    # the others as if the batch had only them
    fewer = case.but(n=int(good.sum()))
    kept = Made(made.x[good], made.weight, made.delta, made.gate, made.bias, ids[good], made.grad_out[good])
    want = expected_of(fewer, kept)
    assert_close(y.detach()[good], want.y, want.y_size, F32)
    assert_close(found.pop("x")[good], want.grads["x"], want.grad_sizes["x"], F32)
    for name, g in found.items():
        if g is not None:
            assert_close(g, want.grads[name], want.grad_sizes[name], F32)


def test_only_the_shared_gradients_with_samples_of_no_task() -> None:
    # W's and the bias' gradients are made over the whole batch at once: those samples must stay out
    x, grad_out = torch.randn(5, 3, 3, 2), torch.randn(5, 4, 3, 2)
    ids = torch.tensor([0, 9, 1, -3, 0])
    plan = TaskPlan(ids, *reference.task_plan(ids, 2))
    w, b = torch.randn(4, 3, 3, 3, requires_grad=True), torch.randn(4, requires_grad=True)
    y = task_conv2d(x, w, None, plan, gate=torch.ones(2), bias=b, padding=1)
    found = torch.autograd.grad(y, [w, b], grad_out)
    good = torch.tensor([0, 2, 4])
    weight = w.detach().double().requires_grad_()
    bias = b.detach().double().requires_grad_()
    exact = torch.nn.functional.conv2d(x[good].double(), weight, bias, padding=1)
    want = torch.autograd.grad(exact, [weight, bias], grad_out[good].double())
    for g, e in zip(found, want, strict=True):
        assert_close(g, e, e.abs() + 10, F32)


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("mode", ["walk", "split"])
def test_small_batches(n: int, mode: str) -> None:
    case = ConvCase(n=n, cin=2, cout=3, size=(2, 3), gate="values", bias="per_task", delta="stacked")
    check(case, mode=mode)


@pytest.mark.parametrize("mode", ["walk", "split"])
@pytest.mark.filterwarnings("error")
def test_samples_without_rows(mode: str) -> None:
    """Nothing is read, and nothing divided by their number."""
    x = torch.randn(3, 0, 5, requires_grad=True)
    leaves = [x, *(torch.randn(*size, requires_grad=True) for size in ((6, 5), (2, 6, 5), (2,), (2, 6)))]
    with configs.force(mode=mode):
        y = task_linear(x, *leaves[1:3], torch.tensor([0, 1, 0]), gate=leaves[3], bias=leaves[4])
        found = torch.autograd.grad(y, leaves, torch.empty_like(y))
    assert y.shape == (3, 0, 6)
    for g, p in zip(found, leaves, strict=True):
        assert torch.equal(g, torch.zeros_like(p))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_memory_orders_of_results(layout: str) -> None:
    case = PLAIN.but(x_layout=layout, weight_layout=layout, delta="list", n=2, cout=3)
    made = case.make().leaves()
    order = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    y = case.run(made)
    assert y.is_contiguous(memory_format=order)
    found = gradients(y, made)
    for name in ("x", "weight", f"delta[{next(iter(present_tasks(case, made)))}]"):
        assert found[name].is_contiguous(memory_format=order), name


WEIGHT_GRADS = [
    (ConvCase(cin=3, cout=18, stride=2, n=3), "walk", None),
    (
        ConvCase(cin=26, cout=5, n=4, size=(3, 3), kernel=(2, 1), ids="absent", num_tasks=4, x_layout="channels_last"),
        "split",
        F16,
    ),
    (ConvCase(cin=6, cout=4, n=3, groups=2, dtype=BF16), "walk", F32),
]


@pytest.mark.parametrize(("case", "mode", "dtype"), WEIGHT_GRADS, ids=["strided", "absent", "groups"])
def test_weight_grad(case: ConvCase, mode: str, dtype: torch.dtype | None) -> None:
    made = case.make()
    batch = SortedBatch(*reference.task_plan(made.task_ids, case.num_tasks))
    exact, size = (
        reference.task_conv2d_weight_grad(
            m.x, m.grad_out, batch, case.kernel, read_geometry(**case.options, kernel=case.kernel)[0]
        )
        for m in (made.double(), made.double().map(torch.abs))
    )
    with configs.force(mode=mode, split_rows=16):
        found = task_conv2d_weight_grad(
            made.x, made.grad_out, made.task_ids, case.num_tasks, case.kernel, dtype=dtype, **case.options
        )
        assert found.dtype == (dtype or case.dtype)
        assert_close(found, exact, size, case.dtype)
        # rows of a bank, in the memory order of a channels_last filter
        columns = exact[0].numel()
        bank = torch.full((case.num_tasks, columns + 7), -1.0)
        co, ci, kh, kw = exact.shape[1:]
        out = bank[:, 3 : 3 + columns].unflatten(1, (co, kh, kw, ci)).permute(0, 1, 4, 2, 3)
        task_conv2d_weight_grad(
            made.x, made.grad_out, made.task_ids, case.num_tasks, case.kernel, out=out, **case.options
        )
    assert_close(out, exact, size, case.dtype)
    assert (bank[:, :3] == -1).all() and (bank[:, 3 + columns :] == -1).all()


def test_linear_weight_grad() -> None:
    x, grad_out, ids = torch.randn(3, 4, 21), torch.randn(3, 4, 5), torch.tensor([2, 0, 2])
    bank = torch.full((3, 5 * 21 + 4), -1.0)
    out = bank[:, 4:].unflatten(1, (5, 21))
    task_linear_weight_grad(x, grad_out, ids, 3, out=out)
    batch = SortedBatch(*reference.task_plan(ids, 3))
    exact = reference.task_linear_weight_grad(x.double(), grad_out.double(), batch)
    assert_close(out, exact, reference.task_linear_weight_grad(x.double().abs(), grad_out.double().abs(), batch), F32)
    assert (bank[:, :4] == -1).all()


def test_the_same_bits_twice() -> None:
    case = PLAIN.but(delta="list", cout=3)
    runs = []
    for _ in range(2):
        made = case.make().leaves()
        with configs.force(mode="split", split_rows=16):
            y = case.run(made)
            runs.append([y.detach(), *(g for g in gradients(y, made).values() if g is not None)])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_pointer_table() -> None:
    tensors = [None if k % 3 == 1 else torch.ones(k + 1) for k in range(37)]
    table = launches.pointer_table(tensors)
    assert table.tolist() == [0 if x is None else x.data_ptr() for x in tensors]
    assert launches.pointer_table(tensors) is table
    assert launches.pointer_table(tensors[1:] + tensors[:1]) is not table


def test_rules() -> None:
    """Large layers get large tiles."""
    x = torch.empty(0, dtype=BF16)
    with configs.force(**dict.fromkeys(SMALL)):
        large = configs.pick_tile("fwd", 8, 6272, 256, 1, x)
        small = configs.pick_tile("fwd", 8, 8, 64, 1, x)
    assert large.rows * large.cols > small.rows * small.cols
    assert configs.pick_schedule(configs.FUSED_MAX_ROWS, True) == "fused"
    assert configs.pick_schedule(configs.FUSED_MAX_ROWS + 1, True) == "staged"
    assert configs.pick_schedule(1, False) == "staged"


@pytest.mark.parametrize("mode", ["walk", "split"])
def test_grids_of_the_most_tasks(mode: str, seen: list[Seen]) -> None:
    """With more samples than tasks, so that every split may hold a task of its own."""
    tasks, samples = TRITON_MAX_TASKS, 2 * TRITON_MAX_TASKS
    x, y, weight, delta, gate, bias = (
        torch.empty(size, device="meta")
        for size in ((samples, 32, 3, 3), (samples, 8, 3, 3), (8, 32, 1, 1), (tasks, 8, 32, 1, 1), tasks, (tasks, 8))
    )
    order, offsets = (torch.empty(n, dtype=torch.int64, device="meta") for n in (samples, tasks + 1))
    call = TaskConvCall(TaskWeights(weight, [delta], [], gate), SortedBatch(order, offsets), STILL, bias)
    with configs.force(**dict.fromkeys(SMALL), schedule="staged", mode=mode), launches.recording():
        launchers.conv2d(x, call)
        launchers.conv2d_backward(y, x, call, [True] * 4, [0])
    names = {made.name for made in seen}
    assert {"stage_kernel", f"task_conv2d_wgrad_{mode}_kernel", "bias_grad_kernel", "wgrad_finish_kernel"} <= names
    assert tasks < max(max(each.grid[1:]) for each in seen) < 65_536
    assert max(each.grid[0] for each in seen) < 2**31


def test_more_tasks_than_a_grid_has_programs() -> None:
    num_tasks = TRITON_MAX_TASKS + 1
    x, ids, gate = torch.randn(2, 3), torch.tensor([0, num_tasks - 1]), torch.ones(num_tasks)
    x.requires_grad_()
    weight = torch.randn(2, 3)
    plan = TaskPlan(ids, *reference.task_plan(ids, num_tasks))
    match = rf"backend 'triton' is forced .*at most {TRITON_MAX_TASKS} tasks, got {num_tasks}"
    calls = (
        lambda: task_linear(x, weight, None, plan, gate=gate),
        lambda: task_conv2d(x[..., None, None], weight[..., None, None], None, plan, gate=gate),
        lambda: task_linear_weight_grad(x, x, plan, num_tasks),
        lambda: task_conv2d_weight_grad(x[..., None, None], x[..., None, None], plan, num_tasks, 1),
    )
    for call in calls:
        with pytest.raises(RuntimeError, match=match):
            call()
    with fastmtl.use_backend("reference"):
        y = task_linear(x, weight, None, plan, gate=gate)
    with pytest.raises(RuntimeError, match=match):
        y.sum().backward()
    assert triton_declines(x, offsets=plan.offsets[1:]) == {"triton": None}


@pytest.mark.parametrize(
    "layouts", [("contiguous",) * 2, ("channels_last",) * 2, ("channels_last", "contiguous")], ids=str
)
def test_staging_skips_what_nobody_needs(layouts: tuple[str, str], seen: list[Seen]) -> None:
    """Slots of closed and absent tasks are not written: the kernels take W's slot for them."""
    case = ConvCase(num_tasks=4, gate="zeros", ids="absent", n=5, delta="list", cout=3)
    made = case.make()
    # filters in the workspace's own order are a line of elements, if both are
    made.weight, made.delta = LAYOUTS[layouts[0]](made.weight), [LAYOUTS[layouts[1]](d) for d in made.delta]
    weights = TaskWeights(made.weight, made.delta, [0, 1, 2, 3], made.gate)
    deltas = operands.deltas_of(weights.delta, weights.delta_tasks, 4)
    with configs.force(schedule="staged"):
        batch = operands.Batch.of(SortedBatch(*reference.task_plan(made.task_ids, 4)))
        operand = operands.plan_operand(F32, weights, deltas, batch, 64)
        staged = operand.pointers(weights, deltas, made.gate, batch, F32)["p_w"]
    assert [each.settled["KH"] for each in seen if each.name == "stage_kernel"] == [
        1 if layouts == ("channels_last",) * 2 else 3
    ]
    open_tasks = [t for t in present_tasks(case, made) if made.gate[t] != 0]
    assert torch.equal(staged[4], made.weight.permute(0, 2, 3, 1))
    for t in range(4):
        if t in open_tasks:
            exact = made.weight.double() + made.gate[t].double() * made.delta[t].double()
            assert_close(staged[t], exact.permute(0, 2, 3, 1), exact.abs().permute(0, 2, 3, 1), F32)
        else:
            assert torch.isnan(staged[t]).all()


FAR = 2**30  # of float16 elements; three of them are past 32 bits


@pytest.fixture(scope="module")
def far_memory() -> Tensor:
    # from numpy, which leaves the pages untouched: a few of them are used
    return torch.from_numpy(np.empty(3 * FAR + 2**12, dtype=np.float16))


@pytest.mark.parametrize("forced", [STAGED, FUSED], ids=["staged-walk", "fused-split"])
@pytest.mark.parametrize("far", ["co", "ci", "kh", "kw"])
@pytest.mark.parametrize("held", ["weight", "delta", "stacked"])
def test_weights_past_32_bits(held: str, far: str, forced: dict[str, Any], far_memory: Tensor) -> None:
    # the kernels are asked for by their rule; only one dimension's offsets reach that far
    shape = (4, 4, 1, 1) if far in ("co", "ci") else (2, 3, 4, 1) if far == "kh" else (2, 3, 1, 4)
    strides = [FAR if name == far else s for name, s in zip(("co", "ci", "kh", "kw"), (64, 1, 16, 16), strict=True)]
    near = [torch.randn(shape).half() for _ in range(3)]
    weight, deltas = near[0], [near[1], near[2]]
    if held == "weight":
        weight = torch.as_strided(far_memory, shape, strides).copy_(near[0])
    elif held == "delta":
        deltas[0] = torch.as_strided(far_memory, shape, strides).copy_(near[1])
        deltas[1] = torch.as_strided(far_memory, shape, strides, 512).copy_(near[2])
    else:
        deltas = torch.as_strided(far_memory, (2, *shape), (512, *strides)).copy_(torch.stack(near[1:]))
    x, ids = torch.randn(3, shape[1], 4, 4).half(), torch.tensor([1, 0, 1])
    grad_out = torch.randn(3, shape[0], 5 - shape[2], 5 - shape[3]).half()
    gate = torch.tensor([0.5, 2.0]).half()

    def run(w: Tensor, d: Any, **kwargs: Any) -> list[Tensor]:
        inputs = [t.requires_grad_() for t in (x.detach(), gate.detach())]
        with configs.force(**kwargs):
            y = task_conv2d(inputs[0], w, d, ids, gate=inputs[1])
            return [y.detach(), *torch.autograd.grad(y, inputs, grad_out)]

    apart = run(weight, deltas, **forced)
    for a, b in zip(apart, run(near[0], near[1:], **forced), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("case", "copied"),
    [
        (WIDE.but(delta="stacked", shared=False, gate=None, kernel=(1, 1), padding=0, ids="absent"), False),
        (PLAIN.but(delta="stacked", shared=False, gate=None, kernel=(1, 1), cout=3, bias=None, num_tasks=4), False),
        # what is not the product's operand as it is: gated, of another dtype, with channels apart
        (PLAIN.but(delta="stacked", shared=False, kernel=(1, 1), cout=3), True),
        (PLAIN.but(delta="stacked", shared=False, gate=None, kernel=(1, 1), cout=3, weight_dtype=F32, dtype=F16), True),
        (PLAIN.but(delta="stacked", shared=False, gate=None, cout=3), True),
    ],
    ids=str,
)
def test_separate_weights_are_read_as_they_are(case: ConvCase, copied: bool, seen: list[Seen]) -> None:
    check(case, **STAGED)
    names = [made.name for made in seen]
    assert ("stage_kernel" in names) == copied
    assert {"task_conv2d_fwd_kernel", "task_conv2d_dgrad_kernel"} < set(names)


def test_separate_weights_and_samples_of_no_task() -> None:
    delta, x = torch.randn(2, 3, 4, 1, 1), torch.randn(4, 4, 2, 2)
    ids = torch.tensor([1, -1, 0, 2])
    plan = TaskPlan(ids, *reference.task_plan(ids, 2))
    y = task_conv2d(x, None, delta, plan)
    assert torch.isnan(y[[1, 3]]).all()
    want = torch.einsum("nchw,noc->nohw", x[[0, 2]].double(), delta.double()[[1, 0], :, :, 0, 0])
    torch.testing.assert_close(y[[0, 2]].double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("forced", [STAGED, FUSED], ids=["staged-walk", "fused-split"])
def test_a_plan_is_filled_with_other_memory(forced: dict[str, Any]) -> None:
    case = PLAIN.but(delta="list", cout=3, ids="turns")
    check(case, **forced)
    kept = len(launches._plans)
    check(case, **forced)
    assert kept == len(launches._plans) > 0
    # nothing of it serves another shape
    check(case.but(size=(4, 3)), **forced)
    assert len(launches._plans) > kept


@pytest.mark.parametrize("first", ["expanded", "overlapping"])
def test_lists_whose_first_delta_overlaps_itself(first: str) -> None:
    made = PLAIN.but(delta="list", num_tasks=3).make()
    given = made.delta[0]
    odd = given.new_ones(1, *given.shape[1:]).expand(given.shape)
    if first == "overlapping":
        odd = torch.randn(given.numel() + 3).to(given).as_strided(given.shape, (2, 1, 1, 1))
    deltas = [odd, *made.delta[1:]]
    args = made.x, made.weight
    with configs.force(**STAGED):
        found = task_conv2d(*args, deltas, made.task_ids, gate=made.gate)
    same = task_conv2d(*args, [d.clone() for d in deltas], made.task_ids, gate=made.gate)
    torch.testing.assert_close(found, same)
