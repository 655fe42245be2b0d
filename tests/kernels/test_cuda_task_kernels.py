"""The CUDA kernels of the task convolution on the host, against the float64 oracle.

Their bodies run as the host's C++ compiler makes them, and as nvcc's PTX has them (tests/host/ptx/). `FASTMTL_AOT=all`
(`make aot`) runs the PTX of every dtype and of both architectures.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import host_kernels as host
import pytest
import task_kernels_on_host as task
import torch
from cases import assert_within
from cases_task import (
    BF16,
    F16,
    F32,
    TASK_TOLERANCE,
    ConvCase,
    LinearCase,
    Made,
    TaskCase,
    assert_result,
    bound,
    expected,
)
from conftest import skip_or_fail
from torch import Tensor

from fastmtl.core.task_weights import STILL, TaskConvCall
from fastmtl.ops.task_weights import reference

ALL = os.environ.get("FASTMTL_AOT") == "all"
DTYPES = (F32, BF16, F16)
CHOSEN = task.Choice.of()
# float32 as three products of truncated tf32 parts: up to 3 * 2^-20 of each product
SLACK = {F32: 4.0, BF16: 1.0, F16: 1.0}


@pytest.fixture(scope="module")
def bodies() -> Iterator[None]:
    if host.compiler() is None:
        skip_or_fail("no C++ compiler")
    with host.using(host.TASK):
        yield


def as_conv(case: TaskCase, made: Made) -> tuple[Tensor, TaskConvCall, Tensor]:
    """x, call and grad_out of the convolution that the layer is."""
    x, *rest = case.op_arguments(made)
    call = TaskConvCall.of(*rest)
    if isinstance(case, ConvCase):
        return x, call, made.grad_out
    n = call.batch.order.shape[0]
    weight, delta = call.weights[:2]
    weight, *delta = (None if w is None else w[..., None, None] for w in (weight, *delta))
    weights = call.weights._replace(weight=weight, delta=delta)
    images = [reference._images(y, n) for y in (x, made.grad_out)]
    return images[0], TaskConvCall(weights, call.batch, STILL, call.bias), images[1]


def check(case: TaskCase, choice: task.Choice = CHOSEN, schedule: int = host.FORWARD) -> None:
    """The result and every gradient."""
    made, want = case.make(), expected(case)
    tolerance = SLACK[case.dtype] * TASK_TOLERANCE[case.dtype]
    x, call, grad_out = as_conv(case, made)
    y = task.forward(x, call, choice, schedule)
    assert_result(
        case, y.movedim(1, -1).reshape(case.out_shape) if isinstance(case, LinearCase) else y, want, tolerance
    )
    deltas = range(len(call.weights.delta))
    of_weights = task.Choice.of(min(choice.tile, 2), -1, choice.split_rows, choice.chunks)  # one tile less
    found = [
        task.input_gradient(grad_out, x, call, choice, schedule),
        *task.weight_gradients(grad_out, x, call, [True] * 3, deltas, of_weights, schedule),
    ]
    for (name, given), g in zip(made.named().items(), found, strict=True):
        exact, size = want.grads[name], want.grad_sizes[name]
        if name == "x" and isinstance(case, LinearCase):
            g = g.movedim(1, -1)
        assert g.dtype == given.dtype, name
        try:
            assert_within(g.reshape(exact.shape), exact, bound(size, exact, tolerance, g.dtype))
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}: {error}") from error


LAST = {"x_layout": "channels_last", "weight_layout": "channels_last", "grad_layout": "channels_last"}
# more steps than a pipeline has stages; channels that no tile divides, task 1 without samples
CONV = ConvCase(n=9, cin=40, cout=24, size=(5, 6), num_tasks=4, ids="absent", gate="zeros", bias="per_task", **LAST)
CASES: dict[str, TaskCase] = {
    "conv": CONV,
    # of contiguous filters, which are transposed when they are staged; no tile of rows is full
    "contiguous": ConvCase(n=4, cin=32, cout=72, size=(3, 3), delta="nones", bias="shared"),
    "strided": CONV.but(n=5, cin=16, cout=16, size=(7, 6), stride=(2, 3), padding=(1, 2), kernel=(3, 5), ids="random"),
    "dilated": CONV.but(n=4, cin=8, cout=16, size=(7, 8), dilation=(2, 1), padding=2, stride=(1, 2), gate="values"),
    # 16 bytes hold several taps, or parts of them
    "odd": ConvCase(n=5, cin=3, cout=20, size=(6, 7), stride=2, gate="values", bias="shared", delta="stacked"),
    "odd-strided": ConvCase(n=5, cin=5, cout=7, size=(7, 7), stride=2, kernel=(4, 3), gate="zeros", dilation=(1, 2)),
    "seven": ConvCase(n=3, cin=3, cout=8, size=(9, 9), kernel=(7, 7), stride=2, padding=3, **LAST),
    "own": CONV.but(shared=False, gate=None, bias=None, delta="stacked_permuted", ids="turns"),
    "no-delta": CONV.but(delta=None, gate=None, bias="shared"),
    "linear": LinearCase(leading=(3, 50), cin=72, cout=40, gate="values", bias="per_task", delta="nones"),
    "linear-odd": LinearCase(leading=(70,), cin=70, cout=36, gate="closed", bias="shared", delta="stacked"),
    "many-tasks": LinearCase(leading=(90,), cin=8, cout=8, num_tasks=70, ids="absent", gate="values", bias="per_task"),
    "one-sample": CONV.but(n=1, ids="one", size=(2, 3)),
}
# several tiles in each direction, of every size
LARGE = ConvCase(
    n=7, cin=72, cout=136, size=(6, 7), num_tasks=3, gate="values", delta="list", kernel=(1, 2), padding=0, **LAST
)


@pytest.mark.parametrize("dtype", DTYPES, ids=("f32", "bf16", "f16"))
@pytest.mark.parametrize("name", CASES)
def test_bodies(name: str, dtype: torch.dtype, bodies: None) -> None:
    check(CASES[name].but(dtype=dtype), schedule=host.REVERSE)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=("f32", "bf16"))
@pytest.mark.parametrize("tile", range(4))
def test_bodies_of_every_tile(tile: int, dtype: torch.dtype, bodies: None) -> None:
    check(LARGE.but(dtype=dtype), task.Choice.of(tile, blocks=tile + 1, split_rows=64 * (tile + 1), chunks=2))
