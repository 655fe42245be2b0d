"""Layers by torch's own operators, which the table of a GPU may choose: forced through the chooser on CPU tensors,
against the float64 oracle."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import assert_within
from cases_task import (
    BF16,
    CONV_CASES,
    F16,
    F32,
    F64,
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
from gpu_tables import fastest_everywhere
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmtl.core.task_weights import STILL, Geometry, SortedBatch, TaskConvCall
from fastmtl.ops.task_weights import choice, eager, plain, reference, task_conv2d, task_linear
from fastmtl.ops.task_weights.precision import WIDENED, is_misread

declines = plain.declines


@pytest.fixture(autouse=True)
def asked_first(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a card whose table says so everywhere. float32 is taken too, which no process has set to tf32 here, and
    weights of more digits than x."""
    monkeypatch.setattr(choice, "unavailable", lambda backend, device: None)
    monkeypatch.setattr(choice.cuda, "declines", lambda *a: "there is none")
    monkeypatch.setattr(plain, "declines", taken)
    with fastest_everywhere("torch"):
        yield


def taken(
    product: str, x: torch.Tensor, shape: torch.Size, one_weight: bool, num_tasks: int, wider: bool
) -> str | None:
    return declines(product, x.to(BF16), shape, one_weight, num_tasks, False)


def is_taken(case: TaskCase) -> bool:
    if case.dtype in (F64, F16) or case.dtype in WIDENED:
        return False
    args = case.op_arguments(case.make())
    x, call = args[0], TaskConvCall.of(*args[1:])
    if call.weights.weight is None and not call.weights.delta:
        return False
    one_weight = plain.sees_one_weight(call)
    return taken("backward", x, call.weights.shape, one_weight, case.num_tasks, False) is None and not (
        isinstance(case, ConvCase) and is_misread(x, call.geometry, case.kernel)
    )


def distinct(cases: list[TaskCase]) -> list[TaskCase]:
    return list(dict.fromkeys(case for case in cases if is_taken(case)))


ONE_TASK = distinct([case.but(num_tasks=1) for case in (*CONV_CASES, *LINEAR_CASES)])
NO_DELTA = distinct([case for case in (*CONV_CASES, *LINEAR_CASES) if case.delta in (None, "all_none")])
SEVERAL = distinct([case.but(cin=16, cout=24, dtype=dtype) for case in LINEAR_CASES for dtype in (F32, BF16)])


@pytest.mark.parametrize("cases", [ONE_TASK, NO_DELTA, SEVERAL], ids=["one task", "no delta", "several"])
def test_whole_table(cases: list[TaskCase]) -> None:
    assert len(cases) > 10
    for case in cases:
        made, want = case.make().leaves(), expected(case)
        args = case.op_arguments(made)
        found = choice.of_layer("forward", args[0], TaskConvCall.of(*args[1:]))
        assert found.order[0] == "torch" and found.unsupported["torch"] is None
        tolerance = 2 * TASK_TOLERANCE[case.dtype]
        try:
            y = by_op(case, made)
            assert_result(case, y, want, tolerance)
            assert_gradients(case, made, gradients(y, made), want, tolerance)
        except Exception as error:
            raise AssertionError(f"{type(case).__name__} {case}: {error}") from error


@pytest.mark.parametrize(
    "case", [ConvCase(num_tasks=1), LinearCase(cin=16, cout=24, bias="per_task")], ids=["conv", "linear"]
)
def test_as_the_op(case: TaskCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the op, as eager calls go on a GPU, and through it."""
    monkeypatch.setattr(eager, "forced_backend", lambda: "triton")  # or a tensor of the CPU goes other ways
    made = case.make().leaves()
    x, *rest = case.op_arguments(made)
    layer = task_conv2d._layer if isinstance(case, ConvCase) else task_linear._layer
    y, op = layer(x, TaskConvCall.of(*rest)), by_op(case, made)
    assert "Launched" in y.grad_fn.name() and torch.equal(y, op) and not y._is_view()
    of_op: Any = gradients(op, made)
    for name, grad in gradients(y, made).items():
        assert (grad is None) == (of_op[name] is None)
        assert grad is None or (torch.equal(grad, of_op[name]) and grad.stride() == of_op[name].stride()), name


def without_tasks(case: TaskCase) -> tuple[torch.Tensor, TaskConvCall, torch.Tensor]:
    """x, call and grad_out; samples 1 and 3 have no task, and are not finite."""
    made = case.make()
    args = case.op_arguments(made)
    ids = made.task_ids.clone()
    ids.view(-1)[1], ids.view(-1)[3] = -1, case.num_tasks
    call = TaskConvCall.of(*args[1:])._replace(batch=SortedBatch(*reference.task_plan(ids, case.num_tasks)))
    x, grad_out = args[0].clone(), made.grad_out.clone()
    for y in (x, grad_out):
        y[1], y[3] = torch.nan, torch.inf
    return x, call, grad_out


CONV = ConvCase(num_tasks=1, gate="values", bias="per_task", ids="one")
LINEAR = LinearCase(leading=(7, 2), num_tasks=1, gate="values", bias="shared", ids="one")
GROUPED = LinearCase(leading=(9, 2), cin=16, cout=24, num_tasks=4, gate="zeros", bias="per_task", ids="absent")
LAYERS = {"conv": CONV, "linear": LINEAR, "several": GROUPED}


@pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS)
def test_samples_of_no_task(case: TaskCase) -> None:
    """NaN in the result and in the gradient of x; in no sum, whatever they hold."""
    x, call, grad_out = without_tasks(case)
    wanted, deltas = [True] * 4, range(len(call.weights.delta))
    conv = isinstance(case, ConvCase)
    forward, backward = (plain.conv2d, plain.conv2d_backward) if conv else (plain.linear, plain.linear_backward)
    oracle, oracle_back = (
        (reference.task_conv2d, reference.task_conv2d_backward)
        if conv
        else (reference.task_linear, reference.task_linear_backward)
    )
    for found, want in zip(
        [forward(x, call), *backward(grad_out, x, call, wanted, deltas)],
        [oracle(x, call), *oracle_back(grad_out, x, call, wanted, deltas)],
        strict=True,
    ):
        assert found.dtype == want.dtype and found.stride() == want.stride()
        torch.testing.assert_close(found, want, equal_nan=True, atol=1e-4, rtol=1e-4)
    assert forward(x, call)[[1, 3]].isnan().all()


@pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS)
def test_closed_gates_and_absent_tasks_read_no_delta(case: TaskCase) -> None:
    made = case.but(gate="closed", delta="list").make().leaves()
    with torch.no_grad():
        for d in made.delta:
            d.fill_(torch.nan)
    y = by_op(case, made)
    grads = gradients(y, made)
    assert y.isfinite().all() and all(grads[name].isfinite().all() for name in ("x", "weight", "bias"))
    assert not any(grads[f"delta[{t}]"].any() for t in set(made.task_ids.flatten().tolist()))
    # a task without samples, whose gate is not read either
    absent = case.but(num_tasks=max(2, case.num_tasks), ids="one", delta="list", cin=16, cout=24, bias="shared")
    if isinstance(case, LinearCase):
        made = absent.make().leaves()
        with torch.no_grad():
            made.gate[0], made.delta[0][:] = torch.nan, torch.nan
        y = by_op(absent, made)
        assert y.isfinite().all() and gradients(y, made)["gate"].tolist()[0] == 0


@pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS)
def test_nothing_waits_for_the_device(case: TaskCase) -> None:
    """A tensor without numbers stops whoever asks for one."""
    case = case.but(dtype=BF16)
    args = case.op_arguments(case.make())
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        x, grad_out, *rest = (
            mode.from_tensor(a) if isinstance(a, torch.Tensor) else [mode.from_tensor(d) for d in a] if k == 1 else a
            for k, a in enumerate((args[0], case.make().grad_out, *args[1:]))
        )
        rest[1] = [mode.from_tensor(d) for d in rest[1]]
        call = TaskConvCall.of(*rest)
        conv = isinstance(case, ConvCase)
        forward, backward, weight_grad = (
            (plain.conv2d, plain.conv2d_backward, plain.conv2d_weight_grad)
            if conv
            else (plain.linear, plain.linear_backward, plain.linear_weight_grad)
        )
        assert forward(x, call).shape == grad_out.shape
        assert len(backward(grad_out, x, call, [True] * 4, range(len(call.weights.delta)))) == len(case.make().named())
        weight_grad(x, grad_out, call.batch, call.geometry, x.new_empty(case.num_tasks, *case.weight_shape))


@pytest.mark.parametrize("num_tasks", [1, 4])
def test_weight_grads(num_tasks: int) -> None:
    ids = make_ids("absent" if num_tasks > 1 else "one", (6,), num_tasks)
    batch = SortedBatch(*reference.task_plan(ids, num_tasks))
    x, g = torch.randn(6, 3, 16), torch.randn(6, 3, 24)
    out = torch.full((num_tasks, 24, 16), torch.nan)
    plain.linear_weight_grad(x, g, batch, STILL, out)
    exact = reference.task_linear_weight_grad(x.double(), g.double(), batch)
    size = reference.task_linear_weight_grad(x.double().abs(), g.double().abs(), batch)
    assert_within(out, exact, bound(size, exact, TASK_TOLERANCE[F32], F32))
    if num_tasks == 1:
        x, g = torch.randn(6, 5, 4, 5), torch.randn(6, 7, 4, 5)
        out, moves = torch.full((1, 7, 5, 3, 3), torch.nan), Geometry(padding=(1, 1))
        plain.conv2d_weight_grad(x, g, batch, moves, out)
        exact = reference.task_conv2d_weight_grad(x.double(), g.double(), batch, (3, 3), moves)
        torch.testing.assert_close(out.double(), exact, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (CONV, "a setting of the process"),
        (CONV.but(n=0, dtype=BF16), "nothing to multiply"),
        (CONV.but(num_tasks=2, dtype=BF16), "no convolution of several weights"),
        (GROUPED.but(cin=12, dtype=BF16), "channels in multiples of 8"),
        (GROUPED.but(dtype=F16), "before they meet a gate"),
        (
            GROUPED.but(leading=(1100,), num_tasks=1024, ids="turns", dtype=BF16, delta="stacked"),
            "less than 1024 groups",
        ),
        (CONV.but(dtype=BF16, weight_dtype=F32), "the digits of x alone"),
    ],
    ids=["float32", "empty", "conv", "channels", "float16", "groups", "wider"],
)
def test_what_is_declined(case: TaskCase, reason: str) -> None:
    x, *rest = case.op_arguments(case.make())
    call = TaskConvCall.of(*rest)
    wider = call.weights.like.dtype != x.dtype
    told = (x, call.weights.shape, plain.sees_one_weight(call), case.num_tasks, wider)
    assert reason in str(declines("backward", *told))
    # of a forward pass the weight is rounded as every backend does
    assert (declines("forward", *told) is None) == wider


def test_the_gate_of_a_task_without_delta_is_not_read() -> None:
    """Whatever it is, and whatever that task's samples are, beside tasks that have one."""
    case = LinearCase(leading=(8, 2), cin=16, cout=24, num_tasks=4, ids="turns", gate="values", delta="list")
    x, *rest = case.op_arguments(case.make())
    call = TaskConvCall.of(*rest)
    _, deltas, tasks, gate = call.weights
    gate = gate.clone()
    gate[1] = torch.inf
    weights = call.weights._replace(delta=[d for t, d in zip(tasks, deltas, strict=True) if t != 1],
                                    delta_tasks=[t for t in tasks if t != 1], gate=gate)  # fmt: skip
    call = call._replace(weights=weights)
    y = plain.linear(x, call)
    torch.testing.assert_close(y, reference.task_linear(x, call), atol=1e-5, rtol=1e-5)
    assert y.isfinite().all()
    x = x.clone()
    x[1] = torch.inf  # of task 1
    found = plain.linear_backward(torch.ones_like(y), x, call, [False, False, True, False], [])[0]
    assert found[1] == 0 and found.isfinite().all()


def test_the_setting_of_cudnn_is_put_back_by_whoever_is_last() -> None:
    before = torch.backends.cudnn.deterministic
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with plain._SAME_BITS:
            inside.set()
            leave.wait(20)

    other = threading.Thread(target=hold)
    with plain._SAME_BITS:
        other.start()
        assert inside.wait(20) and torch.backends.cudnn.deterministic
    assert torch.backends.cudnn.deterministic  # the other one still needs it
    leave.set()
    other.join()
    assert torch.backends.cudnn.deterministic == before


def test_gradients_have_memory_of_their_own() -> None:
    """Of one task W and its delta have the same gradient, in two places."""
    case = LINEAR.but(gate=None, delta="list")
    made = case.make().leaves()
    grads = [g for g in gradients(by_op(case, made), made).values() if g is not None]
    assert len({g.data_ptr() for g in grads}) == len(grads)
