"""Gradients of group and layer norm by task, as `one_pass` takes them, against autograd in float64 for each task."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import skip_or_fail
from torch import Tensor

import fastmtl
from fastmtl.core.dispatch import unavailable
from fastmtl.core.task_weights import SortedBatch
from fastmtl.ops import task_plan
from fastmtl.ops.task_weights.cpu.norm_grads import can_take, group_norm_backward, layer_norm_backward

F32, F64 = torch.float32, torch.float64
TOLERANCE = {F32: 2e-5, F64: 1e-11}
IDS = torch.tensor([0, 3, 3, 0, 1, 0, 3])  # none of task 2


@pytest.fixture(autouse=True)
def _needs_extension() -> None:
    if (reason := unavailable("cpu", "cpu")) is not None:
        skip_or_fail(reason)


def batch_of(ids: Tensor) -> SortedBatch:
    plan = task_plan(ids, 4)
    return SortedBatch(plan.order, plan.offsets)


def assert_gradients(found: tuple[Tensor | None, ...], run, x: Tensor, g: Tensor, w: Tensor | None, b: Tensor) -> None:
    """`run(x, w, b)` in float64, for each task alone."""
    gx, rows_w, rows_b = found
    for t in range(4):
        here = t == IDS
        leaves = [y.double().requires_grad_() for y in (x[here], b) + (() if w is None else (w,))]
        y = run(leaves[0], leaves[2] if len(leaves) == 3 else None, leaves[1])
        exact = torch.autograd.grad(y, leaves, g[here].double())
        pairs = zip((gx[here], rows_b[t], rows_w[t] if rows_w is not None else None), exact, strict=False)
        for got, expected in pairs:
            size = max(float(expected.abs().max()), 1.0) if expected.numel() else 1.0
            torch.testing.assert_close(got.double(), expected, rtol=0, atol=TOLERANCE[x.dtype] * size)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("shape", [(6,), (6, 3), (4, 4, 4), (6, 5, 7), (2, 1100)], ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_group_norm(shape: tuple[int, ...], affine: bool, dtype: torch.dtype, threads: None) -> None:
    x, g = (torch.randn(len(IDS), *shape, dtype=dtype) for _ in range(2))
    x += 3  # sums of g * (x - mean) must not cancel
    w, b = torch.randn(shape[0], dtype=dtype) if affine else None, torch.randn(shape[0], dtype=dtype)
    pixels = x[0, 0].numel()
    _, mean, rstd = torch.native_group_norm(x, None, None, len(IDS), shape[0], pixels, 2, 1e-5)
    assert can_take(g, x, mean, rstd, w)
    found = group_norm_backward(g, x, mean, rstd, w, batch_of(IDS), 2, (True, affine, True))
    assert_gradients(found, lambda x, w, b: F.group_norm(x, 2, torch.ones_like(b) if w is None else w, b), x, g, w, b)
    torch.set_num_threads(1)
    again = group_norm_backward(g, x, mean, rstd, w, batch_of(IDS), 2, (False, False, True))
    assert again[:2] == (None, None) and torch.equal(again[2], found[2])


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("shape", [(1,), (5,), (40,), (3, 21), (1100,)], ids=str)
@pytest.mark.parametrize("rows", [(), (90,)], ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm(
    rows: tuple[int, ...], shape: tuple[int, ...], affine: bool, dtype: torch.dtype, threads: None
) -> None:
    x, g = (torch.randn(len(IDS), *rows, *shape, dtype=dtype) for _ in range(2))
    x += 3
    if rows:
        g = g.transpose(0, 1).contiguous().transpose(0, 1)  # as it comes from layers whose samples lie along axis 1
    w, b = torch.randn(shape, dtype=dtype) if affine else None, torch.randn(shape, dtype=dtype)
    _, mean, rstd = torch.native_layer_norm(x, shape, w, b, 1e-5)
    assert can_take(g, x, mean, rstd, w)
    found = layer_norm_backward(g, x, shape, mean, rstd, w, batch_of(IDS), (True, affine, True))
    assert_gradients(found, lambda x, w, b: F.layer_norm(x, shape, w, b), x, g, w, b)
    torch.set_num_threads(1)
    again = layer_norm_backward(g, x, shape, mean, rstd, w, batch_of(IDS), (False, affine, False))
    assert again[0] is again[2] is None and (not affine or torch.equal(again[1], found[1]))


def test_what_is_left_to_torch() -> None:
    x = torch.randn(2, 4, 3)
    assert not can_take(x.bfloat16(), x.bfloat16()) and not can_take(x, x.double())
    assert not can_take(x, x.mT.contiguous().mT) and not can_take(x[:0], x[:0])


@pytest.mark.parametrize("shared", [[0, 1], [1]], ids=str)
def test_group_norm_of_data_in_channels_last(shared: list[int]) -> None:
    """Whose own gradient is not asked for; weight and bias lie in the bank, or the bias alone."""
    x, g = torch.randn(len(IDS), 6, 3, 5, dtype=F64), torch.randn(len(IDS), 6, 3, 5, dtype=F64)
    params = [torch.randn(6, dtype=F64, requires_grad=True) for _ in range(2)]
    losses = (F.group_norm(x, 2, *params) * g).flatten(1).sum(1)
    rows = [torch.autograd.grad(losses[t == IDS].sum(), params, retain_graph=True) for t in range(4)]
    data = x.contiguous(memory_format=torch.channels_last)
    with fastmtl.one_pass([params[k] for k in shared], IDS, 4) as bank:
        (F.group_norm(data, 2, *params) * g).sum().backward()
    for t in range(4):
        torch.testing.assert_close(bank.row(t), [rows[t][k] for k in shared])
    if shared == [1]:
        torch.testing.assert_close(params[0].grad, sum(row[0] for row in rows))
