"""`task_lora`: values and every gradient, gates, bits, double backward, compiled graphs, and what it refuses."""

from __future__ import annotations

import cases_lora as table
import pytest
import torch
import torch.nn.functional as F
from cases_lora import LORA_CASES, LoraCase, MadeLora
from cases_task import F64, assert_dense, assert_own_memory
from conftest import Backend
from torch import Tensor


def row_by_row(case: LoraCase, made: MadeLora) -> Tensor:
    """Every sample alone, by the two products of a PEFT-style adapter."""
    rows, scales = [], made.scales(case.num_tasks)
    for t, x in zip(made.task_ids.flatten().tolist(), made.x.flatten(0, case.ids_dims - 1), strict=True):
        y = x.new_zeros(*x.shape[:-1], case.cout) if made.weight is None else F.linear(x, made.weight)
        if made.A is not None and made.A[t] is not None:
            y = y + scales[t] * F.linear(F.linear(x, made.A[t]), made.B[t])
        if made.bias is not None:
            y = y + (made.bias if made.bias.dim() == 1 else made.bias[t])
        rows.append(y)
    return torch.stack(rows).reshape(case.out_shape) if rows else made.x.new_zeros(case.out_shape)


_ONE_DTYPE = list(dict.fromkeys(case.but(dtype=F64, weight_dtype=None, factor_dtype=None) for case in LORA_CASES))


@pytest.mark.parametrize("case", _ONE_DTYPE, ids=str)
def test_oracle(case: LoraCase) -> None:
    """The oracle itself: a loop over samples and autograd."""
    made = case.make().leaves()
    y, named = row_by_row(case, made), made.named()
    want = table.expected_of(case, made)
    torch.testing.assert_close(want.y, y, rtol=1e-12, atol=1e-12)
    if not y.requires_grad:
        # no rows, or none that sees a parameter
        assert not any(g.any() for g in want.grads.values())
        return
    found = torch.autograd.grad(y, list(named.values()), made.grad_out.detach(), allow_unused=True)
    for (name, parameter), g in zip(named.items(), found, strict=True):
        g = torch.zeros_like(parameter) if g is None else g
        torch.testing.assert_close(want.grads[name], g, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", LORA_CASES, ids=str)
def test_values_and_gradients(case: LoraCase, backend: Backend) -> None:
    made = case.make().leaves()
    before = made.map(lambda x: x.detach().clone())
    y = case.run(made)
    want = table.expected(case)
    table.assert_result(case, y, want)
    found = table.gradients(y, made)
    table.assert_gradients(case, made, found, want)
    assert y.is_contiguous() and found["x"].is_contiguous(), (y.stride(), found["x"].stride())
    for name, g in found.items():
        if g is not None:
            assert_dense(g, name)
    assert_own_memory({"y": y, **{f"grad {n}": g for n, g in found.items()}}, made.named())
    for (name, x), old in zip(made.named().items(), before.named().values(), strict=True):
        assert torch.equal(x, old), f"{name} was written to"
