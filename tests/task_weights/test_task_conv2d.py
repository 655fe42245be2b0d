"""`task_conv2d`: values and every gradient on every geometry, dtype, memory layout and way to name tasks."""

from __future__ import annotations

import cases_task as table
import pytest
import torch
import torch.nn.functional as F
from cases_task import CONV_CASES, F32, F64, GEOMETRIES, ConvCase, Made
from conftest import Backend
from torch import Tensor

from fastmtl.ops import task_conv2d, task_conv2d_weight_grad, task_plan


def effective(made: Made, t: int) -> Tensor:
    """`W + s_t Delta_t`, differentiable, written out."""
    delta = None if made.delta is None else made.delta[t]
    base = made.weight
    if base is None:
        base = torch.zeros_like(next(d for d in made.delta if d is not None))
    if delta is None:
        return base
    return base + (delta if made.gate is None else made.gate[t] * delta)


def bias_of(made: Made, t: int) -> Tensor | None:
    return made.bias if made.bias is None or made.bias.dim() == 1 else made.bias[t]


def sample_by_sample(case: ConvCase, made: Made) -> Tensor:
    """Every sample alone, through `F.conv2d`."""
    rows = [
        F.conv2d(made.x[b : b + 1], effective(made, t), bias_of(made, t), **case.options)
        for b, t in enumerate(made.task_ids.tolist())
    ]
    return torch.cat(rows) if rows else made.x.new_zeros(case.out_shape)


_ONE_DTYPE = list(dict.fromkeys(case.but(dtype=F64, weight_dtype=None) for case in CONV_CASES))


@pytest.mark.parametrize("case", _ONE_DTYPE, ids=str)
def test_oracle(case: ConvCase) -> None:
    """The oracle itself: a loop over samples and autograd."""
    made = case.make().leaves()
    y, named = sample_by_sample(case, made), made.named()
    want = table.expected_of(case, made)
    torch.testing.assert_close(want.y, y, rtol=1e-12, atol=1e-12)
    if not y.requires_grad:
        assert case.n == 0
        return
    found = torch.autograd.grad(y, list(named.values()), made.grad_out.detach(), allow_unused=True)
    for (name, parameter), g in zip(named.items(), found, strict=True):
        g = torch.zeros_like(parameter) if g is None else g
        torch.testing.assert_close(want.grads[name], g, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_values_and_gradients(case: ConvCase, backend: Backend) -> None:
    made = case.make().leaves()
    before = made.map(lambda x: x.detach().clone())
    y = case.run(made)
    want = table.expected(case)
    table.assert_result(case, y, want)
    found = table.gradients(y, made)
    table.assert_gradients(case, made, found, want)
    # every result is dense, in memory of its own and in the order of what it belongs to
    like = table.memory_format_of(case.x_layout if case.n else "contiguous")
    assert y.is_contiguous(memory_format=like), f"strides {y.stride()}"
    assert found["x"].is_contiguous(memory_format=like), f"strides {found['x'].stride()}"
    for name, g in found.items():
        if g is not None:
            table.assert_dense(g, name)
    assert "delta" not in found or found["delta"].is_contiguous(), f"strides {found['delta'].stride()}"
    table.assert_own_memory({"y": y, **{f"grad {n}": g for n, g in found.items()}}, made.named())
    for (name, x), old in zip(made.named().items(), before.named().values(), strict=True):
        assert torch.equal(x, old), f"{name} was written to"


@pytest.mark.parametrize("x_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("weight_layout", ["contiguous", "channels_last", "mixed"])
def test_weight_gradients_have_the_weights_memory_order(x_layout: str, weight_layout: str, backend: Backend) -> None:
    case = ConvCase(x_layout=x_layout, weight_layout=weight_layout, ids="turns", gate="values")
    made = case.make().leaves()
    for name, g in table.gradients(case.run(made), made).items():
        parameter = made.named()[name]
        if name == "weight" or name.startswith("delta"):
            channels_last = parameter.is_contiguous(memory_format=torch.channels_last)
            memory_format = torch.channels_last if channels_last else torch.contiguous_format
            assert g.is_contiguous(memory_format=memory_format), f"{name}: {g.stride()} for {parameter.stride()}"


@pytest.mark.parametrize("name", ["k3", "k1", "k3_s2", "depthwise", "k2_same", "k1_large", "k3_large"])
@pytest.mark.parametrize("x_layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("ids", ["sorted", "runs", "turns", "one"])
def test_float32_is_as_good_as_the_plain_loop(name: str, x_layout: str, ids: str, backend: Backend) -> None:
    """Values again, more batches: each sample against its own convolution in float64, at a tighter tolerance."""
    case = ConvCase(**GEOMETRIES[name], x_layout=x_layout, ids=ids, delta="stacked", gate="zeros", bias="per_task")
    made = case.make()
    want = sample_by_sample(case, made.double())
    size = sample_by_sample(case, made.double().map(torch.abs))
    table.assert_within(case.run(made), want, 1e-6 * size)


def test_tasks_do_not_mix(backend: Backend) -> None:
    """NaN in one sample reaches its own row, its task's delta, gate and bias, and what all tasks share."""
    case = ConvCase(num_tasks=3, ids="turns", delta="list", gate="values", bias="per_task")
    made = case.make().leaves()
    with torch.no_grad():
        made.x[4] = torch.nan  # of task 1
    y = case.run(made)
    bad = torch.arange(case.n) == 4
    assert torch.isnan(y[bad]).all() and torch.isfinite(y[~bad]).all()
    found = table.gradients(y, made)
    for t in range(3):
        assert torch.isfinite(found[f"delta[{t}]"]).all() == (t != 1)
        assert torch.isfinite(found["gate"][t]) == (t != 1)
    assert torch.isfinite(found["x"]).all() and torch.isfinite(found["bias"]).all()
    assert torch.isnan(found["weight"]).any()


@pytest.mark.parametrize("kind", ["nan", "inf"])
@pytest.mark.parametrize("x_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["k3", "k1", "k1_large"])
def test_non_finite_delta_shows_in_its_task_only(kind: str, x_layout: str, name: str, backend: Backend) -> None:
    case = ConvCase(**GEOMETRIES[name], x_layout=x_layout, ids="turns", delta="stacked", gate="values")
    made = case.make().leaves()
    with torch.no_grad():
        made.delta[1] = float(kind)
    y = case.run(made)
    own = made.task_ids == 1
    assert not torch.isfinite(y[own]).any() and torch.isfinite(y[~own]).all()
    found = table.gradients(y, made)
    assert not torch.isfinite(found["x"][own]).any() and torch.isfinite(found["x"][~own]).all()
    assert torch.isfinite(found["weight"]).all() and torch.isfinite(found["delta"]).all()


def test_channels_of_a_padded_even_filter_take_gradients(backend: Backend) -> None:
    """`padding="same"` of an even filter pads after x; that row and column don't come back."""
    case = ConvCase(**GEOMETRIES["k2_same"], dtype=F64, x_layout="channels_last")
    made = case.make().leaves()
    y = case.run(made)
    assert y.shape[2:] == made.x.shape[2:]
    assert table.gradients(y, made)["x"].shape == made.x.shape


@pytest.mark.parametrize("delta", ["stacked", "list"])
def test_overflow_and_underflow_stay_visible(delta: str, backend: Backend) -> None:
    case = ConvCase(delta=delta, dtype=torch.float16, weight_dtype=F32, num_tasks=2, ids="turns")
    made = case.make()
    rows = made.delta if isinstance(made.delta, list) else made.delta.unbind(0)
    rows[1].fill_(1e6)
    y = case.run(made)
    assert torch.isfinite(y[0::2]).all() and not torch.isfinite(y[1::2]).all()


def test_arguments_as_sequences(backend: Backend) -> None:
    """Lists, tuples and sequences of one number, as `F.conv2d` takes them; a tuple of deltas."""
    case = ConvCase(stride=(2, 2), padding=(1, 1), dilation=(1, 1), bias="shared")
    made = case.make()
    y = case.run(made)
    options = {"stride": [2, 2], "padding": [1], "dilation": (1,)}
    again = task_conv2d(
        made.x, made.weight, tuple(made.delta), made.task_ids.int(), gate=None, bias=made.bias, **options
    )
    assert torch.equal(y, again)


@pytest.mark.parametrize("ids", ["random", "sorted", "absent"])
def test_plan_equals_ids(ids: str, backend: Backend) -> None:
    """One plan for several layers gives the bits that the ids give."""
    cases = [
        ConvCase(n=8, ids=ids, num_tasks=4, gate="zeros"),
        ConvCase(**GEOMETRIES["k1_wide"], n=8, ids=ids, num_tasks=4, x_layout="channels_last"),
    ]
    plan = task_plan(cases[0].make().task_ids, 4)
    for case in cases:
        made = case.make().leaves()
        made.task_ids = plan.task_ids
        y, planned = case.run(made), case.run(made, plan)
        assert torch.equal(y, planned)
        a, b = table.gradients(y, made), table.gradients(planned, made)
        assert all((a[n] is None and b[n] is None) or torch.equal(a[n], b[n]) for n in a)


def test_no_task_anywhere_is_a_plain_convolution(backend: Backend) -> None:
    case = ConvCase(delta=None, bias="shared", dtype=torch.bfloat16, weight_dtype=F32)
    made = case.make()
    expected = F.conv2d(made.x, made.weight.bfloat16(), made.bias.bfloat16(), **case.options)
    assert torch.equal(case.run(made), expected)


@pytest.mark.parametrize(("size", "kernel", "stride"), [((3, 1), (2, 3), 2), ((1, 1), (5, 5), 3), ((2, 2), (3, 3), 3)])
def test_bfloat16_pictures_narrower_than_the_stride(
    size: tuple[int, int], kernel: tuple[int, int], stride: int, backend: Backend
) -> None:
    """oneDNN's weight gradient takes for theirs what lies beside such pictures."""
    kh, kw = kernel
    case = ConvCase(
        n=5, cin=16, cout=16, size=size, kernel=kernel, stride=stride, padding=(kh // 2, kw // 2), num_tasks=2,
        dtype=torch.bfloat16, gate="values", delta="nones",
    )  # fmt: skip
    want = table.expected(case)
    for _ in range(8):
        made = case.make().leaves()
        y = case.run(made)
        beside = [torch.full((1 << k,), torch.nan, dtype=torch.bfloat16) for k in range(4, 14)]
        del beside  # freed, for whoever allocates next
        table.assert_gradients(case, made, table.gradients(y, made), want, table.TASK_TOLERANCE[torch.bfloat16])
        plan = task_plan(made.task_ids, 2)
        found = task_conv2d_weight_grad(made.x, made.grad_out, plan, 2, kernel, **case.options)
        assert found.isfinite().all()
