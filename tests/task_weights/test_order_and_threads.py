"""`task_conv2d`, `task_linear` and `task_lora`: the same bits each time, for any number of threads and any order."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import cases_lora
import cases_task
import pytest
import torch
from cases_lora import FEW_LORA_CASES, LoraCase
from cases_task import FEW_CASES, TaskCase
from conftest import Backend
from torch import Tensor

# each with the table that knows what it must give
CASES = [pytest.param(case, cases_task, id=str(case)) for case in FEW_CASES]
CASES += [pytest.param(case, cases_lora, id=f"lora-{case}") for case in FEW_LORA_CASES]
cases = pytest.mark.parametrize(("case", "table"), CASES)


def same(a: dict[str, Tensor | None], b: dict[str, Tensor | None]) -> bool:
    return all((a[n] is None and b[n] is None) or torch.equal(a[n], b[n]) for n in a | b)


@cases
def test_same_bits(case: TaskCase | LoraCase, table: ModuleType, backend: Backend) -> None:
    made = case.make().leaves()
    y = case.run(made)
    first = table.gradients(y, made)
    for _ in range(2):
        again = case.run(made)
        assert torch.equal(again, y) and same(table.gradients(again, made), first)


@cases
def test_number_of_threads(case: TaskCase | LoraCase, table: ModuleType, backend: Backend, threads: None) -> None:
    want = table.expected(case)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        made = case.make().leaves()
        y = case.run(made)
        table.assert_result(case, y, want)
        table.assert_gradients(case, made, table.gradients(y, made), want)


@cases
def test_permuted_batch(case: TaskCase | LoraCase, table: ModuleType, backend: Backend) -> None:
    """Another order of the samples is another order of the rows, and the same gradients."""
    made = case.make().leaves()
    order = torch.randperm(made.x.shape[0], generator=torch.Generator().manual_seed(1))
    moved = replace(
        made,
        x=made.x.detach()[order].requires_grad_(),
        task_ids=made.task_ids[order],
        grad_out=made.grad_out.detach()[order],
    )
    want = table.expected(case)
    y = case.run(moved)
    table.assert_result(case, y[order.argsort()], want)
    found = table.gradients(y, moved)
    found["x"] = found["x"][order.argsort()]
    table.assert_gradients(case, made, found, want)
