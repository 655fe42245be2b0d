"""How ops are recorded for autograd (`fastmtl/core/autograd.py`): as by torch's own registration, and no tangents."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from fastmtl import ops

IDS = torch.tensor([0, 1, 2, 1])
F64 = torch.float64


def made() -> tuple[Tensor, Tensor, Tensor]:
    x, scale, shift = torch.randn(4, 5, dtype=F64), torch.randn(3, 5, dtype=F64), torch.randn(3, 5, dtype=F64)
    return x, scale.requires_grad_(), shift


def test_a_tangent_is_refused() -> None:
    x, scale, shift = made()
    tangent = torch.ones_like(scale)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(scale.detach(), tangent)
        with pytest.raises(NotImplementedError, match=r"^fastmtl::task_scale_shift: has no forward-mode derivative"):
            ops.task_scale_shift(x, dual, shift, IDS)
        with pytest.raises(NotImplementedError, match=r"^fastmtl::combine_list: has no forward-mode derivative"):
            ops.combine(torch.ones(2, dtype=F64), [[dual], [scale.detach()]])
        # without one nothing is refused
        ops.task_scale_shift(x, scale, shift, IDS)
    with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
        torch.func.jvp(lambda s: ops.task_scale_shift(x, s, shift, IDS), (scale.detach(),), (tangent,))


def test_a_graph_dies_with_its_result() -> None:
    x, scale, shift = made()
    y = ops.task_scale_shift(x, scale, shift, IDS)
    node = weakref.ref(y.grad_fn)
    assert node() is not None
    del y
    assert node() is None


def test_a_change_in_between_is_seen() -> None:
    x, scale, shift = made()
    y = ops.task_scale_shift(x.requires_grad_(), scale, shift, IDS)
    with torch.no_grad():
        scale.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_modes_see_the_op_and_its_backward() -> None:
    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list[Any] = []
    x, scale, shift = made()
    with Noted():
        ops.task_scale_shift(x, scale, shift, IDS).sum().backward()
    for op in (torch.ops.fastmtl.task_scale_shift, torch.ops.fastmtl.task_scale_shift_backward):
        assert op.default in seen


def test_a_tensor_given_twice_gets_the_sum() -> None:
    x, scale, _ = made()
    ops.task_scale_shift(x, scale, scale, IDS).sum().backward()
    expected = torch.zeros(3, 5, dtype=F64).index_add_(0, IDS, x + 1)
    torch.testing.assert_close(scale.grad, expected)


def test_of_several_results_one_may_go_unused() -> None:
    """Batch norm by task: y, means and variances."""
    x = torch.randn(4, 3, 2, 2, dtype=F64, requires_grad=True)
    weight = [torch.ones(3, dtype=F64, requires_grad=True) for _ in range(3)]
    plan = ops.task_plan(IDS, 3)
    y, *_ = torch.ops.fastmtl.task_batch_norm(x, weight, [], [], [], plan.order, plan.offsets, 1e-5)
    y[:, 0].square().sum().backward()
    assert x.grad is not None and x.grad[:, 0].abs().sum() > 0 and not x.grad[:, 1:].any()
    assert all(w.grad is not None and w.grad[0] != 0 and not w.grad[1:].any() for w in weight)
