"""The ops that look at the gradients element by element on a GPU, by Triton: values, draws, captured steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import cases_elementwise as elementwise
import pytest
import torch
from cases import BankCase, ListCase
from torch import Tensor

import fastmtl
from fastmtl import methods, ops
from fastmtl.core.gradient_rows import GradientRows
from fastmtl.methods import Method, Seen

pytestmark = pytest.mark.gpu

CASES = [case for case in elementwise.CASES if not (case.dtype == torch.float64 and case.num_tasks > 64)]
FEW = (BankCase(5, 1025, torch.bfloat16), BankCase(3, 1023), ListCase("mixed_layouts", 8), ListCase("nones", 3))
METHODS: dict[str, Callable[[], Method]] = {
    "graddrop": lambda: methods.GradDrop(generator=ops.order_state(3, device="cuda")),
    "leak": lambda: methods.GradDrop([0.25, 0.5, 0.75], generator=ops.order_state(3, device="cuda")),
    "trimmedmean": lambda: methods.TrimmedMean(1),
    "dbmtl": methods.DBMTL,
    "moco": lambda: methods.MoCo(gamma=0.01),
    "excessmtl": methods.ExcessMTL,
}
NAMES = ["a", "b", "c"]


@pytest.fixture
def no_waits() -> Iterator[None]:
    """The mode that a test sets ends with it."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case: BankCase | ListCase) -> None:
    with fastmtl.use_backend("triton"):
        elementwise.check_graddrop(case, device="cuda")
        elementwise.check_trimmed_mean(case, device="cuda")
        elementwise.check_average_gradients(case, device="cuda")
        elementwise.check_excess_risks(case, device="cuda")


@pytest.mark.parametrize("case", FEW, ids=str)
def test_graddrop_draws_what_the_cpu_draws(case: BankCase | ListCase) -> None:
    found = ops.graddrop(case.make("cuda"), generator=ops.order_state(11, device="cuda"))
    expected = ops.graddrop(case.make(), generator=ops.order_state(11))
    assert torch.equal(elementwise.result(found), elementwise.result(expected))


def test_a_trim_beyond_the_registers() -> None:
    """float64 and 100 tasks: Triton declines, and plain torch serves."""
    grads = torch.randn(101, 300, dtype=torch.float64, device="cuda")
    expected = grads.sort(dim=0).values[50]
    torch.testing.assert_close(ops.trimmed_mean(grads, 50), expected)
    with fastmtl.use_backend("triton"), pytest.raises(RuntimeError, match="takes more registers than a thread has"):
        ops.trimmed_mean(grads, 50)


def given(k: int, dtype: torch.dtype = torch.float32) -> tuple[GradientRows, list[Tensor], Seen]:
    generator = torch.Generator().manual_seed(k)
    tensors = [torch.randn(*shape, generator=generator).to("cuda", dtype) for shape in ((40, 7), (9,)) * 3]
    losses = torch.rand(3, generator=generator, dtype=torch.float64).cuda() + 0.1
    out = [torch.empty_like(x) for x in tensors[:2]]
    return GradientRows(tensors, list(range(6)), 3, 2), out, Seen(NAMES, [True] * 3, losses=losses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_methods_equal_the_reference_and_do_not_wait(name: str, dtype: torch.dtype, no_waits: None) -> None:
    method, plain = METHODS[name](), METHODS[name]()
    for k in range(3):
        rows, out, seen = given(k, dtype)
        expected = [torch.empty_like(x) for x in out]
        with fastmtl.use_backend("reference"):
            plain.update(rows, expected, seen)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if k else "default")  # the first call builds kernels
        method.update(rows, out, seen)
        torch.cuda.set_sync_debug_mode("default")
        for x, y in zip(out, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_a_captured_step(name: str) -> None:
    """Each replay goes on from what the one before it has left: state advances, and random numbers are new."""
    method, plain = METHODS[name](), METHODS[name]()
    rows, out, seen = given(0)

    def step(m: Method, into: list[Tensor]) -> Any:
        return m.update(rows, into, seen)

    step(method, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(method, out)
    expected = [torch.empty_like(x) for x in out]
    step(plain, expected)
    for k in range(3):
        fresh, _, _ = given(k + 1)
        for x, y in zip(rows.tensors, fresh.tensors, strict=True):
            x.copy_(y)
        graph.replay()
        step(plain, expected)
        for x, y in zip(out, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_a_captured_draw_without_a_state() -> None:
    grads = torch.randn(2, 100_000, device="cuda")
    ops.graddrop(grads)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = ops.graddrop(grads)
    graph.replay()
    first = found.clone()
    graph.replay()
    assert not torch.equal(first, found)
