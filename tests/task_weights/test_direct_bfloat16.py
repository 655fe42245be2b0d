"""The direct product of bfloat16: in pairs where the processor multiplies them so, widened to float32 elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import cases_task as table
import pytest
import torch
import torch.nn.functional as F
from cases_task import BF16, F32, ConvCase, LinearCase, TaskCase
from conftest import Backend
from torch import Tensor

from fastmtl.core import dispatch
from fastmtl.ops import task_linear
from fastmtl.tuning.search import use_table
from fastmtl.tuning.table import Limits, uniform


@pytest.fixture(autouse=True)
def directly() -> Iterator[None]:
    with use_table(uniform(Limits(None, 0))):
        yield


# sums of odd lengths, more than one panel of results, more than one panel of weights (768 steps)
CASES: list[TaskCase] = [
    LinearCase(leading=(1,), cin=1, cout=2, num_tasks=1),
    LinearCase(leading=(17,), cin=33, cout=65, bias="per_task", gate="values"),
    LinearCase(leading=(40,), cin=803, cout=17, ids="sorted", num_tasks=2),
    LinearCase(leading=(14,), cin=130, cout=801, delta="stacked", gate="zeros"),
    LinearCase(leading=(9,), cin=70, cout=34, shared=False),
    ConvCase(cin=7, cout=19, x_layout="channels_last", weight_layout="channels_last", bias="shared", gate="values"),
    ConvCase(cin=66, cout=5, stride=2, x_layout="channels_last", weight_layout="channels_last"),
    ConvCase(cin=6, cout=70, dilation=(1, 2)),
]


@pytest.mark.parametrize("weight_dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: TaskCase, weight_dtype: torch.dtype, level: Backend) -> None:
    case = case.but(dtype=BF16, weight_dtype=weight_dtype)
    made, want = case.make().leaves(), table.expected(case)
    y = case.run(made)
    table.assert_result(case, y, want)
    table.assert_gradients(case, made, table.gradients(y, made), want)


def test_same_bits_for_any_number_of_threads(level: Backend, threads: None) -> None:
    """One panel of results, which threads share by rows, and several, of which each has its own."""
    for case in (LinearCase(leading=(75,), cin=803, cout=50), LinearCase(leading=(60,), cin=301, cout=200)):
        case = case.but(dtype=BF16, num_tasks=1, gate="values")
        found: list[list[Tensor]] = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            made = case.make().leaves()
            y = case.run(made)
            found.append([y, *(g for g in table.gradients(y, made).values() if g is not None)])
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def run(x: Tensor, weight: Tensor, delta: Tensor, grad_out: Tensor) -> list[Tensor]:
    """y, dx and dDelta of a linear layer of one task."""
    x, delta = x.clone().requires_grad_(), delta.clone().requires_grad_()
    y = task_linear(x, weight, [delta], torch.zeros(len(x), dtype=torch.int64))
    return [y.detach(), *torch.autograd.grad(y, [x, delta], grad_out)]


def test_not_finite(level: Backend) -> None:
    """Where it shows, and as what, is where torch shows it in float32."""
    for at in range(4):
        for value in (torch.nan, torch.inf, -torch.inf):
            x, weight, delta, grad_out = (torch.randn(s).to(BF16) for s in ((5, 7), (18, 7), (18, 7), (5, 18)))
            (x, weight, delta, grad_out)[at][3, 5] = value
            effective = weight.float() + delta.float()
            exact = [F.linear(x.float(), effective), grad_out.float() @ effective, grad_out.float().t() @ x.float()]
            for found, expected in zip(run(x, weight, delta, grad_out), exact, strict=True):
                assert torch.equal(found.isnan(), expected.isnan())
                infinite = expected.isinf()
                assert torch.equal(found.isinf(), infinite) and torch.equal(found.float()[infinite], expected[infinite])


@pytest.mark.parametrize("size", [2.0**-133, 2.0**-127], ids=["smallest", "largest power"])
def test_subnormal(size: float, level: Backend) -> None:
    """Numbers below 2**-126 count as zero in products of pairs, as they do in oneDNN's; in float32 they are exact."""
    if level.name != "cpu":
        pytest.skip("the reference is torch's product")
    zero, one = torch.zeros(16, 8, dtype=BF16), torch.ones(16, 8, dtype=BF16)
    x, g = torch.full((4, 8), size, dtype=BF16), torch.full((4, 16), size, dtype=BF16)
    y, dx, ddelta = run(x, zero, one, g)
    pairs = dispatch.extension.multiplies_pairs()
    for found, count in ((y, 8), (dx, 16)):
        assert torch.equal(found, torch.full_like(found, 0.0 if pairs else count * size))
    assert not ddelta.any()  # below the smallest number in any case
    # the smallest of the others
    y = run(torch.full((4, 8), 2.0**-126, dtype=BF16), zero, one, g)[0]
    assert torch.equal(y, torch.full_like(y, 2.0**-123))
