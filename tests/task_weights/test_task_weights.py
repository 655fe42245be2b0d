"""What `task_conv2d` and `task_linear` share: gates, frozen parts, bits, double backward, compiled graphs, autocast."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import cases_task as table
import pytest
import torch
import torch._dynamo.testing
from cases import short
from cases_task import BF16, F16, F32, F64, GEOMETRIES, ConvCase, LinearCase, Made, TaskCase
from conftest import Backend
from torch import Tensor

from fastmtl.ops import task_conv2d, task_conv2d_weight_grad, task_linear, task_linear_weight_grad, task_plan
from fastmtl.ops.task_weights import precision
from fastmtl.ops.task_weights.cpu import weight_grads as task_cpu
from fastmtl.tuning import search
from fastmtl.tuning.table import Limits, uniform

# one of each kind, small
LAYERS: dict[str, TaskCase] = {
    "conv": ConvCase(ids="turns"),
    "conv_1x1": ConvCase(**GEOMETRIES["k1"], ids="turns", x_layout="channels_last"),
    "conv_s2": ConvCase(**GEOMETRIES["k3_s2"], ids="turns", x_layout="channels_last", weight_layout="channels_last"),
    "linear": LinearCase(ids="turns", leading=(6,)),
    "packed": LinearCase(leading=(3, 4), ids_dims=2, ids="turns"),
}
layers = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
deltas = pytest.mark.parametrize("delta", ["list", "stacked"])


def rows_of(made: Made, task: int) -> Tensor:
    """Which samples (of a packed batch: which positions) are the task's."""
    return made.task_ids == task


def set_delta(made: Made, task: int, value: float) -> None:
    with torch.no_grad():
        made.delta[task].fill_(value)


def same(a: dict[str, Tensor | None], b: dict[str, Tensor | None]) -> bool:
    return all((a[n] is None and b[n] is None) or torch.equal(a[n], b[n]) for n in a | b)


# --- gates


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("ids", ["turns", "sorted", "one"])
@deltas
@layers
def test_closed_gate_hides_its_delta(layer: TaskCase, delta: str, ids: str, value: float, backend: Backend) -> None:
    """What is behind a closed gate reaches that gate's own gradient only; the rest is as without the delta."""
    case = layer.but(delta=delta, gate="values", bias="per_task", ids=ids)
    made = case.make().leaves()
    with torch.no_grad():
        made.gate[2] = 0.0
    want = table.expected_of(case, made)
    set_delta(made, 2, value)
    y = case.run(made)
    table.assert_result(case, y, want)
    found = table.gradients(y, made)
    gate_gradient = found.pop("gate")
    table.assert_gradients(case, replace(made, gate=None), found, want)
    dead = found["delta"][2] if delta == "stacked" else found["delta[2]"]
    assert torch.equal(dead, torch.zeros_like(dead)), "the gradient of a delta behind a closed gate is not zero"
    assert not torch.isfinite(gate_gradient[2])
    assert torch.isfinite(gate_gradient[:2]).all()


@deltas
@layers
def test_closed_gate_of_a_frozen_gate(layer: TaskCase, delta: str, backend: Backend) -> None:
    """Nothing reads the delta where the gate's gradient isn't wanted either."""
    case = layer.but(delta=delta, gate="zeros")
    made = case.make()
    set_delta(made, 0, torch.nan)
    set_delta(made, 2, torch.nan)
    made = replace(made.leaves(), gate=made.gate)
    y = case.run(made)
    named = {n: x for n, x in made.named().items() if n != "gate"}
    found = torch.autograd.grad(y, list(named.values()), made.grad_out.detach())
    assert torch.isfinite(y).all() and all(torch.isfinite(g).all() for g in found)


@deltas
@layers
@pytest.mark.parametrize("bias", [None, "shared", "per_task"])
def test_separate_weights_behind_closed_gates(layer: TaskCase, delta: str, bias: str | None, backend: Backend) -> None:
    """`weight=None` and a gate of 0: zeros, and the bias."""
    case = layer.but(delta=delta, gate="zeros", shared=False, bias=bias)
    made = case.make().leaves()
    for t in (0, 2):
        set_delta(made, t, torch.nan)
    y = case.run(made)
    channels = 1 if isinstance(case, ConvCase) else -1
    for t in (0, 2):
        part = y[rows_of(made, t)].movedim(channels, -1)
        row = torch.zeros(y.shape[channels])
        if bias is not None:
            row = (made.bias[t] if bias == "per_task" else made.bias).detach()
        assert torch.equal(part, row.expand_as(part))
    found = table.gradients(y, made)
    assert torch.equal(found["x"][rows_of(made, 0)], torch.zeros_like(made.x[rows_of(made, 0)]))
    for t in range(3):
        g = found["delta"][t] if delta == "stacked" else found[f"delta[{t}]"]
        assert torch.isfinite(g).all() and (g == 0).all() == (t != 1)
        assert torch.isfinite(found["gate"][t]) == (t == 1)


@layers
def test_gate_of_minus_zero_is_closed(layer: TaskCase, backend: Backend) -> None:
    made = layer.but(gate="closed").make()
    made.gate.neg_()
    set_delta(made, 1, torch.nan)
    assert torch.isfinite(layer.run(made)).all()


@layers
def test_gate_that_is_nan_is_open(layer: TaskCase, backend: Backend) -> None:
    made = layer.but(gate="values").make()
    made.gate[1] = torch.nan
    y = layer.run(made)
    assert torch.isnan(y[rows_of(made, 1)]).all() and torch.isfinite(y[~rows_of(made, 1)]).all()


@deltas
@layers
def test_gate_of_a_task_without_samples_has_no_gradient(layer: TaskCase, delta: str, backend: Backend) -> None:
    """Even where its delta is not finite."""
    case = layer.but(delta=delta, gate="values", ids="absent", num_tasks=4)
    made = case.make().leaves()
    for t in (1, 3):
        set_delta(made, t, torch.nan)
    y = case.run(made)
    found = table.gradients(y, made)
    assert torch.isfinite(y).all() and torch.isfinite(found["x"]).all() and torch.isfinite(found["weight"]).all()
    assert torch.equal(found["gate"][[1, 3]], torch.zeros(2))
    if delta == "stacked":
        assert torch.equal(found["delta"][[1, 3]], torch.zeros_like(found["delta"][[1, 3]]))
        assert (found["delta"][[0, 2]] != 0).flatten(1).any(1).all()
    else:
        assert found["delta[1]"] is None and found["delta[3]"] is None


# --- what needs a gradient


WANTED = (
    ("x",), ("weight",), ("gate",), ("bias",), ("delta[1]",), ("delta[0]", "delta[2]"), ("delta",),
    ("x", "gate"), ("weight", "bias"), ("delta[2]", "gate"), ("delta", "weight"),
)  # fmt: skip


@pytest.mark.parametrize("wanted", WANTED, ids="+".join)
@pytest.mark.parametrize("ids", ["turns", "absent"])
@pytest.mark.parametrize("gate", ["values", "zeros"])
@layers
def test_some_are_frozen(layer: TaskCase, gate: str, ids: str, wanted: tuple[str, ...], backend: Backend) -> None:
    """Each gradient alone equals the one that is found together with all others; the frozen ones get none."""
    case = layer.but(delta="stacked" if "delta" in wanted else "list", gate=gate, bias="per_task", ids=ids)
    made = case.make()
    for name, x in made.named().items():
        x.requires_grad_(name in wanted)
    case.run(made).backward(made.grad_out)
    found = {name: x.grad for name, x in made.named().items()}
    assert all(found[name] is None for name in found if name not in wanted)
    want = table.expected(case)
    present = table.present_tasks(case, made)
    for name in wanted:
        if name.startswith("delta[") and int(name[6:-1]) not in present:
            assert found[name] is None
            continue
        exact = want.grads[name]
        table.assert_within(found[name], exact, table.bound(want.grad_sizes[name], exact, 2e-6, F32))


@layers
def test_nothing_is_recorded_where_nothing_needs_a_gradient(layer: TaskCase, backend: Backend) -> None:
    made = layer.but(gate="values", bias="per_task").make()
    assert not layer.run(made).requires_grad
    leaves = made.leaves()
    with torch.no_grad():
        assert not layer.run(leaves).requires_grad
    with torch.inference_mode():
        assert torch.equal(layer.run(leaves), layer.run(made))


def without_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """All segments through torch's convolution: small ones go through the direct product otherwise."""
    monkeypatch.setattr(search, "_given", uniform(Limits(0, 0)))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("x_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "geometry",
    [
        # more panels than one pass takes, a last panel that is not full, and more rows than are staged at a time
        {"cin": 70, "cout": 71, "size": (3, 3)},
        {"cin": 1100, "cout": 13, "size": (2, 3), "kernel": (1, 1), "padding": 0},
        {"cin": 3, "cout": 130, "size": (7, 6), "stride": 2},
    ],
    ids=str,
)
def test_direct_product_in_several_passes(
    geometry: dict[str, Any], x_layout: str, dtype: torch.dtype, level: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "_given", uniform(Limits(None, 0)))
    for options in ({"gate": "values", "bias": "per_task"}, {"gate": "zeros", "delta": "nones"}):
        case = ConvCase(dtype=dtype, x_layout=x_layout, weight_layout=x_layout, **geometry, **options)
        made, want = case.make().leaves(), table.expected(case)
        y = case.run(made)
        table.assert_result(case, y, want)
        table.assert_gradients(case, made, table.gradients(y, made), want)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("channels", [slice(0, 8), slice(1, 7)])
def test_pixelwise_with_gaps_between_samples(
    every: int, channels: slice, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1x1 on channels_last pictures that are not side by side: both sides of the backward call are cut alike."""
    without_direct(monkeypatch)
    whole = torch.randn(8, 8, 2, 3, dtype=F64).contiguous(memory_format=torch.channels_last)
    x = whole[::every, channels].requires_grad_()
    ids = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0])[: x.shape[0]]
    weight = torch.randn(5, x.shape[1], 1, 1, dtype=F64, requires_grad=True)
    delta = torch.randn(2, *weight.shape, dtype=F64, requires_grad=True)
    leaves = [x, weight, delta]
    found = torch.autograd.grad(task_conv2d(x, weight, delta, ids).square().sum(), leaves)
    by_hand = torch.einsum("nchw,noc->nohw", x, (weight + delta[ids])[..., 0, 0])
    for a, b in zip(found, torch.autograd.grad(by_hand.square().sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_strides_of_sizes_of_one_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own convolution misreads such a weight beside channels_last pictures."""
    without_direct(monkeypatch)
    x = torch.randn(3, 128, 2, 7).contiguous(memory_format=torch.channels_last)
    weight, delta = (torch.randn(10 * 64 * 3).as_strided((10, 64, 1, 3), (192, 1, 1, 64)) for _ in range(2))
    options = {"stride": (3, 1), "dilation": (2, 1), "groups": 2}
    y = task_conv2d(x, weight, [delta, None], torch.tensor([0, 1, 0]), **options)
    for b, w in enumerate((weight + delta, weight, weight + delta)):
        expected = torch.nn.functional.conv2d(x[b : b + 1].double(), w.double().contiguous(), **options)
        torch.testing.assert_close(y[b : b + 1].double(), expected, rtol=1e-4, atol=1e-3)


def test_weights_with_gaps_are_read_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own convolution takes uninitialised memory for numbers of such a weight, where all its tasks share it."""
    without_direct(monkeypatch)
    x = torch.randn(1, 1, 6, 8).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(16, 1, 4, 10)[..., 2:9]
    y = task_conv2d(x, weight, [torch.randn(16, 1, 4, 7)], torch.tensor([0]), gate=torch.zeros(1), stride=(1, 4))
    expected = torch.nn.functional.conv2d(x.double(), weight.double().contiguous(), stride=(1, 4))
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    x = torch.randn(1, 64, 7, 2).bfloat16().contiguous(memory_format=torch.channels_last)
    weight = torch.randn(5, 64, 1, 3).bfloat16()[..., 1:2]
    options = {"stride": (2, 4), "padding": (3, 6), "dilation": (2, 3)}
    y = task_conv2d(x, weight, [None], torch.tensor([0]), **options)
    expected = torch.nn.functional.conv2d(x.double(), weight.double().contiguous(), **options)
    torch.testing.assert_close(y.double(), expected, rtol=2e-2, atol=0.1)


@pytest.mark.parametrize("size", [((1, 12), (7, 3), (3, 1)), ((2, 2), (7, 7), (3, 3)), ((1, 3), (5, 1), (2, 0))])
def test_places_of_a_filter_that_meet_padding_alone_have_no_gradient(size: tuple, monkeypatch) -> None:
    """oneDNN gives them anything in bfloat16, NaN included."""
    without_direct(monkeypatch)
    pictures, kernel, padding = size
    x = torch.randn(2, 160, *pictures, dtype=torch.bfloat16)
    weight = torch.randn(130, 160, *kernel, dtype=torch.bfloat16, requires_grad=True)
    for fmt in (torch.contiguous_format, torch.channels_last):
        a = x.contiguous(memory_format=fmt)
        y = task_conv2d(a, weight, [None, None], torch.tensor([0, 1]), padding=padding)
        (found,) = torch.autograd.grad(y.float().sum(), weight)
        again = weight.detach().double().requires_grad_()
        expected = torch.nn.functional.conv2d(a.double(), again, padding=padding)
        (expected,) = torch.autograd.grad(expected.sum(), again)
        torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2)


def test_many_runs_under_one_weight_get_each_their_bias(backend: Backend) -> None:
    x, bias, ids = torch.randn(50, 4), torch.randn(3, 2), torch.arange(50) % 3
    weight = torch.randn(2, 4)
    y = task_linear(x, weight, [None, None, None], ids, bias=bias)
    torch.testing.assert_close(y, x @ weight.T + bias[ids])


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("ids", ["random", "runs", "turns", "reversed"])
@pytest.mark.parametrize("x_layout", ["contiguous", "channels_last", "sliced"])
@layers
def test_both_ways_to_reach_the_samples(
    layer: TaskCase, x_layout: str, ids: str, gather: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU copies the samples of a task together, or makes a call per run of neighbours; small cases only copy."""
    if isinstance(layer, LinearCase) and x_layout == "channels_last":
        x_layout = "transposed"
    monkeypatch.setattr(search, "_given", uniform(Limits(0, 0), 10**12 if gather else 0, 0))
    for options in (
        {"delta": "list", "gate": "values", "bias": "per_task"},
        {"delta": "nones", "gate": "zeros", "bias": "per_task"},
        {"delta": "stacked", "shared": False, "bias": "shared"},
        {"delta": "stacked", "gate": "zeros", "shared": False, "bias": "shared"},
        {"delta": "all_none"},
    ):
        case = layer.but(x_layout=x_layout, ids=ids, **options)
        made, want = case.make().leaves(), table.expected(case)
        y = case.run(made)
        table.assert_result(case, y, want)
        table.assert_gradients(case, made, table.gradients(y, made), want)


# --- what autograd holds


@layers
def test_backward_twice(layer: TaskCase, backend: Backend) -> None:
    """`retain_graph`: the same bits again, and what was accumulated is not written over."""
    case = layer.but(gate="zeros", bias="per_task", ids="sorted")
    made = case.make().leaves()
    y = case.run(made)
    first = table.gradients(y, made, retain_graph=True)
    kept = {n: g if g is None else g.clone() for n, g in first.items()}
    second = table.gradients(y, made, grad_out=2 * made.grad_out.detach(), retain_graph=True)
    assert same(first, kept)
    assert same(second, {n: g if g is None else 2 * g for n, g in first.items()})
    y.backward(made.grad_out.detach(), retain_graph=True)
    y.backward(made.grad_out.detach())
    assert same({n: x.grad for n, x in made.named().items()}, second)


@pytest.mark.parametrize("name", ["x", "weight", "delta[1]", "gate"])
@layers
def test_a_changed_argument_is_seen(layer: TaskCase, name: str, backend: Backend) -> None:
    case = layer.but(gate="values", bias="per_task")
    made = case.make().leaves()
    y = case.run(made)
    with torch.no_grad():
        made.named()[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        table.gradients(y, made)


@layers
def test_tensors_that_need_a_gradient_are_not_held_twice(layer: TaskCase, backend: Backend) -> None:
    """A layer used twice: both calls add up."""
    case = layer.but(delta="stacked", gate="values", dtype=F64)
    made = case.make().leaves()
    once = table.gradients(case.run(made), made)
    twice = table.gradients(case.run(made) + case.run(made), made)
    for n, g in once.items():
        torch.testing.assert_close(twice[n], 2 * g, rtol=1e-12, atol=1e-12)


# --- gradcheck


SMALL: dict[str, TaskCase] = {
    "conv": ConvCase(n=3, cin=2, cout=2, size=(3, 2), kernel=(2, 2), ids="turns", dtype=F64, num_tasks=2),
    "groups": ConvCase(
        n=3, cin=2, cout=2, groups=2, size=(3, 3), kernel=(2, 1), stride=(2, 1), dtype=F64, num_tasks=2, ids="turns"
    ),
    "linear": LinearCase(leading=(3,), cin=2, cout=2, dtype=F64, num_tasks=2, ids="turns"),
    "packed": LinearCase(leading=(2, 2), ids_dims=2, cin=2, cout=2, dtype=F64, num_tasks=2, ids="turns"),
}
WAYS: dict[str, dict[str, Any]] = {
    "list": {"delta": "list", "bias": "per_task"},
    "stacked": {"delta": "stacked", "bias": "shared"},
    "gates": {"delta": "list", "gate": "values", "bias": "per_task"},
    "gates_stacked": {"delta": "stacked", "gate": "values"},
    "closed": {"delta": "list", "gate": "zeros"},
    "closed_stacked": {"delta": "stacked", "gate": "zeros", "bias": "per_task"},
    "separate": {"delta": "stacked", "gate": "zeros", "shared": False},
    "nones": {"delta": "nones", "gate": "values"},
    "absent": {"delta": "stacked", "gate": "values", "num_tasks": 3, "ids": "one"},
}


def function_of(case: TaskCase, made: Made) -> Any:
    """The layer as a function of its differentiable arguments."""

    def run(*tensors: Tensor) -> Tensor:
        rest = dict(zip(made.named(), tensors, strict=True))
        delta = made.delta
        if isinstance(delta, list):
            delta = [rest.get(f"delta[{t}]") for t in range(len(delta))]
        elif delta is not None:
            delta = rest["delta"]
        plain = {n: rest.get(n) for n in ("x", "weight", "gate", "bias")}
        return case.run(replace(made, delta=delta, **plain))

    return run


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layer", SMALL.values(), ids=SMALL)
def test_gradcheck(layer: TaskCase, way: str, backend: Backend) -> None:
    case = layer.but(**WAYS[way])
    made = case.make().leaves()
    tensors = tuple(made.named().values())
    # the whole Jacobian for two, one projection of it for the rest
    fast = layer is not SMALL["linear"] and (layer is not SMALL["groups"] or way != "gates")
    assert torch.autograd.gradcheck(function_of(case, made), tensors, fast_mode=fast)
    assert torch.autograd.gradgradcheck(function_of(case, made), tensors, fast_mode=fast)


def test_gradgradcheck_of_some(backend: Backend) -> None:
    """The second derivative where only some of the arguments take part."""
    case = SMALL["conv"].but(delta="list", gate="values", bias="per_task")
    made = case.make().leaves()
    everything = made.named()
    for wanted in (("x",), ("weight", "gate"), ("delta[1]",), ("delta[0]", "x")):

        def run(*tensors: Tensor, wanted: tuple[str, ...] = wanted) -> Tensor:
            detached = {n: x.detach() for n, x in everything.items()} | dict(zip(wanted, tensors, strict=True))
            return function_of(case, made)(*detached.values())

        assert torch.autograd.gradgradcheck(run, tuple(everything[n] for n in wanted), fast_mode=True)


# --- compiled graphs


# compiled code hands over the gradient in the memory order of the result
_COMPILED_CONV = LAYERS["conv_s2"].but(grad_layout="channels_last")


def _zeros_for_none(found: dict[str, Tensor | None], made: Made) -> dict[str, Tensor]:
    return {n: torch.zeros_like(made.named()[n]) if g is None else g for n, g in found.items()}


@pytest.mark.parametrize(
    ("options", "dynamic"),
    [
        ({"delta": "list", "gate": "zeros", "bias": "per_task"}, False),
        ({"delta": "list", "gate": "zeros", "bias": "per_task"}, True),
        ({"delta": "stacked", "gate": "values", "bias": "shared"}, True),
        ({"delta": "nones"}, False),
        ({"delta": "stacked", "shared": False, "dtype": BF16, "weight_dtype": F32}, False),
    ],
    ids=["list", "list_dynamic", "stacked_dynamic", "nones", "separate_bfloat16"],
)
@pytest.mark.parametrize("layer", [_COMPILED_CONV, LAYERS["packed"]], ids=["conv", "packed"])
def test_compile(
    layer: TaskCase, options: dict[str, Any], dynamic: bool, backend: Backend, fresh_compiler: None
) -> None:
    """One graph, the bits of the op; other ids and other gates, even absent tasks, do not compile again."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    case = layer.but(**options)

    @torch.compile(fullgraph=True, backend=counter, dynamic=dynamic)
    def compiled(*tensors: Tensor, task_ids: Tensor) -> Tensor:
        return function_of(case, replace(made, task_ids=task_ids))(*tensors) * 2

    made = case.make().leaves()
    for ids in ("turns", "sorted", "absent"):
        made.task_ids = table.make_ids(ids, case.ids_shape, case.num_tasks)
        if made.gate is not None:
            with torch.no_grad():
                made.gate.copy_(made.gate.roll(1))
        tensors = tuple(made.named().values())
        y, eager = compiled(*tensors, task_ids=made.task_ids), table.by_op(case, made) * 2
        assert torch.equal(y, eager) and y.stride() == eager.stride()
        found, expected = table.gradients(y, made), table.gradients(eager, made)
        # which tasks are absent is not known while compiling: their gradient is zero instead of None
        assert same(_zeros_for_none(found, made), _zeros_for_none(expected, made))
    assert counter.frame_count == 1


def test_compile_with_a_plan(backend: Backend, fresh_compiler: None) -> None:
    """The sort is in the graph; its plan serves two layers."""
    case = ConvCase(delta="list", gate="values", cout=3)
    made = case.make().leaves()

    def two_layers(x: Tensor, task_ids: Tensor) -> Tensor:
        plan = task_plan(task_ids, 3)
        return case.run(replace(made, x=case.run(replace(made, x=x), plan).relu()), plan)

    compiled = torch.compile(two_layers, fullgraph=True, backend="aot_eager")
    for ids in ("random", "turns"):
        task_ids = table.make_ids(ids, (case.n,), 3)
        y, eager = compiled(made.x, task_ids), two_layers(made.x, task_ids)
        assert torch.equal(y, eager)
        assert same(
            _zeros_for_none(table.gradients(y, made), made), _zeros_for_none(table.gradients(eager, made), made)
        )


# --- autocast


@layers
def test_autocast_casts_x_alone(layer: TaskCase, backend: Backend) -> None:
    """bfloat16 through float32 weights; gradients in the dtype of what they belong to; backward inside or outside."""
    case = layer.but(gate="values", bias="per_task")
    made = case.make().leaves()
    narrow = replace(made, x=made.x.detach().bfloat16().requires_grad_())
    expected = case.run(narrow)
    grad_out = made.grad_out.detach().bfloat16()
    wanted = table.gradients(expected, narrow, grad_out)
    for inside in (True, False):
        with torch.autocast("cpu", dtype=BF16):
            y = case.run(made)
            found = table.gradients(y, made, grad_out) if inside else None
        if found is None:
            found = table.gradients(y, made, grad_out)
        assert y.dtype == BF16 and torch.equal(y, expected)
        for name, g in found.items():
            assert g.dtype == F32
            assert torch.equal(g, wanted[name].float()), name


@layers
def test_autocast_leaves_float64(layer: TaskCase, backend: Backend) -> None:
    case = layer.but(dtype=F64, gate="values")
    made = case.make()
    with torch.autocast("cpu", dtype=BF16):
        y = case.run(made)
    assert y.dtype == F64 and torch.equal(y, case.run(made))


@layers
def test_autocast_is_off_inside_the_op(layer: TaskCase, backend: Backend) -> None:
    """`torch.ops` called in an autocast region computes in the dtypes that it is given."""
    case = layer.but(gate="values", bias="per_task")
    args = case.op_arguments(case.make())
    op = torch.ops.fastmtl.task_linear if isinstance(case, LinearCase) else torch.ops.fastmtl.task_conv2d
    expected = op(*args)
    with torch.autocast("cpu", dtype=BF16):
        assert torch.equal(op(*args), expected)


# --- CPUs without 16-bit arithmetic, on which torch would add up in 16 bits

WIDENED_LAYERS: dict[str, TaskCase] = {
    **LAYERS,
    "conv_all": ConvCase(**GEOMETRIES["all"], ids="absent"),
    "conv_runs": ConvCase(**GEOMETRIES["k3_large"], ids="random"),
    "conv_1x1_large": ConvCase(**GEOMETRIES["k1_large"], ids="runs", x_layout="channels_last"),
    "conv_one_pixel": ConvCase(**GEOMETRIES["one_pixel_in"], ids="turns", cin=1, x_layout="channels_last"),
    "linear_large": LinearCase(leading=(5, 170), cin=64, cout=48, ids="random"),
}
narrow = pytest.mark.parametrize("dtype", [BF16, F16], ids=short)
# what float32 leaves of a sum of a few thousand products
ROUNDED_ONCE = 1e-5


@pytest.fixture
def widened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both 16-bit dtypes as on a CPU for which oneDNN has neither."""
    monkeypatch.setattr(precision, "WIDENED", {BF16, F16})


def test_widened_where_torch_says_that_onednn_has_no_arithmetic() -> None:
    assert (BF16 in precision.WIDENED) == (not torch.ops.mkldnn._is_mkldnn_bf16_supported())
    assert (F16 in precision.WIDENED) == (not torch.ops.mkldnn._is_mkldnn_fp16_supported())
    assert {BF16, F16} >= precision.WIDENED


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channels_last_sliced", "expanded_batch"])
@narrow
def test_widen_keeps_values_and_memory_format(dtype: torch.dtype, layout: str, widened: None) -> None:
    x = table.LAYOUTS[layout](torch.randn(3, 4, 5, 6).to(dtype))
    wide = precision.widen(x)
    assert wide.dtype == F32 and torch.equal(wide.to(dtype), x)
    assert wide.is_contiguous(memory_format=table.memory_format_of(layout))
    for plain in (x.float(), x.double(), x.to("meta")):
        assert precision.widen(plain) is plain


@pytest.mark.parametrize("wide_weights", [False, True], ids=["narrow_weights", "float32_weights"])
@pytest.mark.parametrize(("delta", "shared"), [("list", True), ("stacked", False), ("nones", True)])
@narrow
@pytest.mark.parametrize("layer", WIDENED_LAYERS.values(), ids=WIDENED_LAYERS)
def test_widened_results_are_rounded_once(
    layer: TaskCase, delta: str, dtype: torch.dtype, shared: bool, wide_weights: bool, widened: None, backend: Backend
) -> None:
    """Within the rounding of the result, where the layers' tolerance allows one of each weight as well."""
    case = layer.but(
        delta=delta, gate="values", bias="per_task", shared=shared, dtype=dtype,
        weight_dtype=F32 if wide_weights else None,
    )  # fmt: skip
    made = case.make().leaves()
    want = table.expected_of(case, made)
    y = case.run(made)
    found = table.gradients(y, made)
    table.assert_result(case, y, want, ROUNDED_ONCE)
    table.assert_gradients(case, made, found, want, ROUNDED_ONCE)
    if isinstance(case, ConvCase):
        fmt = table.memory_format_of(case.x_layout)
        assert y.is_contiguous(memory_format=fmt) and found["x"].is_contiguous(memory_format=fmt)
    held = {name: x.detach() for name, x in made.named().items()}
    table.assert_own_memory({"result": y.detach()} | found, held | {"grad_out": made.grad_out})


@pytest.mark.parametrize("layer", WIDENED_LAYERS.values(), ids=WIDENED_LAYERS)
@narrow
def test_widened_weight_gradients_are_rounded_once(
    layer: TaskCase, dtype: torch.dtype, widened: None, backend: Backend
) -> None:
    """As results, in rows of a bank, and unrounded in float32."""
    case = layer.but(dtype=dtype)
    made = case.make()

    def run(x: Tensor, grad_out: Tensor, **options: Any) -> Tensor:
        if isinstance(case, LinearCase):
            return task_linear_weight_grad(x, grad_out, made.task_ids, case.num_tasks, **options)
        return task_conv2d_weight_grad(
            x, grad_out, made.task_ids, case.num_tasks, case.kernel, **case.options, **options
        )

    exact = run(made.x.double(), made.grad_out.double())
    size = run(made.x.double().abs(), made.grad_out.double().abs())
    bank = torch.empty(case.num_tasks, math.prod(case.weight_shape) + 3, dtype=F32)
    rows = bank[:, 3:].view(case.num_tasks, *case.weight_shape)
    for options, expected_dtype in (({}, dtype), ({"dtype": F32}, F32), ({"out": rows}, F32)):
        found = run(made.x, made.grad_out, **options)
        assert found.dtype == expected_dtype
        table.assert_within(found, exact, table.bound(size, exact, ROUNDED_ONCE, found.dtype))


@narrow
def test_widened_linear_weight_gradients_task_by_task(dtype: torch.dtype, widened: None) -> None:
    """What `one_pass` takes as it is made: sorted or not, with tasks enough for the threads and with one."""
    x, g = torch.randn(9, 40, 8).to(dtype), torch.randn(9, 40, 5).to(dtype)
    for ids in (torch.arange(9) % 4, torch.arange(9) // 3, torch.zeros(9, dtype=torch.int64)):
        plan = task_plan(ids, 4)
        grads, sums = task_cpu.linear_weight_grads(x, g, plan.order, plan.offsets, bias=True)
        for t, (found, summed) in enumerate(zip(grads, sums, strict=True)):
            exact, size = (y[ids == t].double().sum((0, 1)) for y in (g, g.abs()))
            table.assert_within(summed, exact, table.bound(size, exact, ROUNDED_ONCE, F32))
            if found is None:
                assert not (ids == t).any()
                continue
            a, b = x[ids == t].flatten(0, 1).double(), g[ids == t].flatten(0, 1).double()
            assert found.dtype == F32
            table.assert_within(found, b.T @ a, table.bound(b.abs().T @ a.abs(), b.T @ a, ROUNDED_ONCE, F32))


@narrow
@pytest.mark.parametrize("layer", ["conv", "linear"])
def test_widened_second_derivatives(layer: str, dtype: torch.dtype, widened: None, backend: Backend) -> None:
    """Those of plain torch in float64, but for one rounding of each of the three passes."""
    case = LAYERS[layer].but(gate="values", dtype=dtype)
    made = case.make().leaves()

    def penalty(made: Made) -> Tensor:
        y = case.run(made)
        (gx,) = torch.autograd.grad(y, made.x, made.grad_out.detach(), create_graph=True)
        return gx.double().square().sum()

    (found,) = torch.autograd.grad(penalty(made), made.weight)
    double = made.double().leaves()
    (exact,) = torch.autograd.grad(penalty(double), double.weight)
    assert found.dtype == dtype
    unit = torch.finfo(dtype).eps
    assert (found.double() - exact).abs().max() <= 2 * unit * exact.abs().max()
