"""`task_plan`: the sort by task, and what every task op makes of a plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases_task import make_ids
from conftest import Backend

from fastmtl.ops import (
    TaskPlan,
    task_batch_norm,
    task_conv2d,
    task_conv2d_weight_grad,
    task_linear,
    task_linear_weight_grad,
    task_plan,
    task_scale_shift,
)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 17, 200])
@pytest.mark.parametrize("shape", [(0,), (1,), (9,), (300,), (3, 4), (2, 3, 2), (0, 4), (4, 0)], ids=str)
@pytest.mark.parametrize("kind", ["random", "sorted", "reversed", "runs", "one", "absent"])
def test_sorts(kind: str, shape: tuple[int, ...], num_tasks: int, dtype: torch.dtype, backend: Backend) -> None:
    """By counting in plain Python: stable, every position once."""
    ids = make_ids(kind, shape, num_tasks, dtype)
    plan = task_plan(ids, num_tasks)
    flat = ids.flatten().tolist()
    by_task = [[b for b, t in enumerate(flat) if t == task] for task in range(num_tasks)]
    assert plan.order.tolist() == [b for part in by_task for b in part]
    ends = [0]
    for part in by_task:
        ends.append(ends[-1] + len(part))
    assert plan.offsets.tolist() == ends
    assert plan.order.dtype == plan.offsets.dtype == torch.int64
    assert plan.task_ids is ids and plan.num_tasks == num_tasks


def test_ids_of_any_strides(backend: Backend) -> None:
    wide = torch.arange(12).remainder(3).reshape(4, 3)
    for ids in (wide[:, 1], wide[::2, 0], wide.T, torch.tensor([2]).expand(5), wide[1:]):
        plan, plain = task_plan(ids, 3), task_plan(ids.clone(memory_format=torch.contiguous_format), 3)
        assert torch.equal(plan.order, plain.order) and torch.equal(plan.offsets, plain.offsets)


def test_ids_are_left_alone(backend: Backend) -> None:
    ids = torch.tensor([2, 0, 1, 0])
    task_plan(ids, 3)
    assert ids.tolist() == [2, 0, 1, 0]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool, backend: Backend, fresh_compiler: None) -> None:
    compiled = torch.compile(
        lambda ids: tuple(task_plan(ids, 3))[1:], fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    for kind in ("random", "one"):
        ids = make_ids(kind, (7,), 3)
        assert all(torch.equal(a, b) for a, b in zip(compiled(ids), task_plan(ids, 3)[1:], strict=True))


# --- bad input


BAD: list[tuple[str, Any, Any, type[Exception], str]] = [
    (
        "list",
        [0, 1],
        2,
        TypeError,
        r"task_ids: expected an int64 or int32 tensor, or a TaskPlan, got list; torch\.tensor\(task_ids\) makes",
    ),
    ("float", torch.zeros(2), 2, TypeError, r"task_ids: expected int64 or int32, got torch.float32"),
    ("bool", torch.zeros(2, dtype=torch.bool), 2, TypeError, r"task_ids: expected int64 or int32, got torch.bool"),
    ("uint8", torch.zeros(2, dtype=torch.uint8), 2, TypeError, r"task_ids: expected int64 or int32, got torch.uint8"),
    ("0-d", torch.tensor(1), 2, ValueError, r"task_ids: expected shape \[N\] or \[N, L\], got \[\]"),
    ("plan", TaskPlan(*[torch.zeros(1).long()] * 3), 2, TypeError, r"task_ids: .* got a TaskPlan"),
    ("too large", torch.tensor([0, 3, 1]), 3, ValueError, r"task_ids: expected ids from 0 to 2, got 3"),
    ("negative", torch.tensor([0, -1, 5]), 3, ValueError, r"task_ids: expected ids from 0 to 2, got -1"),
    ("int32", torch.tensor([[0, 7]], dtype=torch.int32), 3, ValueError, r"task_ids: expected ids from 0 to 2, got 7"),
    ("no task", torch.tensor([0]), 0, ValueError, r"num_tasks: expected at least 1, got 0"),
    ("less", torch.tensor([0]), -2, ValueError, r"num_tasks: expected at least 1, got -2"),
    ("number", torch.tensor([0]), 2.0, TypeError, r"num_tasks: expected an int, got float"),
    ("truth", torch.tensor([0]), True, TypeError, r"num_tasks: expected an int, got bool"),
    ("tensor", torch.tensor([0]), torch.tensor(2), TypeError, r"num_tasks: expected an int, got Tensor"),
]


@pytest.mark.parametrize(("ids", "num_tasks", "error", "match"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(ids: Any, num_tasks: Any, error: type[Exception], match: str, backend: Backend) -> None:
    with pytest.raises(error, match=match):
        task_plan(ids, num_tasks)


IDS = torch.tensor([1, 0, 1, 0])
X, W = torch.ones(4, 2, 3, 3), torch.ones(3, 2, 1, 1)
CALLS: dict[str, Any] = {
    "conv": lambda plan: task_conv2d(X, W, torch.ones(2, 3, 2, 1, 1), plan),
    "linear": lambda plan: task_linear(X[..., 0, 0], W[..., 0, 0], torch.ones(2, 3, 2), plan),
    "scale_shift": lambda plan: task_scale_shift(X, torch.ones(2, 2), torch.ones(2, 2), plan),
    "batch_norm": lambda plan: task_batch_norm(X, plan, torch.ones(2, 2), training=True),
    "conv_grad": lambda plan: task_conv2d_weight_grad(X, torch.ones(4, 3, 3, 3), plan, 2, 1),
    "linear_grad": lambda plan: task_linear_weight_grad(X[..., 0, 0], torch.ones(4, 3), plan, 2),
}


@pytest.mark.parametrize("name", CALLS)
def test_plan_of_another_number_of_tasks(name: str, backend: Backend) -> None:
    CALLS[name](task_plan(IDS, 2))
    for count in (3, 4):
        with pytest.raises(ValueError, match=rf"task_ids: expected a plan of 2 tasks, got one of {count}"):
            CALLS[name](task_plan(IDS, count))


@pytest.mark.parametrize("name", CALLS)
def test_plan_of_another_batch(name: str, backend: Backend) -> None:
    with pytest.raises(ValueError, match=r"task_ids: expected shape \[4\].* as x, got \[3\]"):
        CALLS[name](task_plan(IDS[:3], 2))


@pytest.mark.parametrize("name", ["conv", "linear", "batch_norm", "conv_grad", "linear_grad"])
def test_plan_that_is_none(name: str, backend: Backend) -> None:
    """Fields of the wrong size, dtype or device."""
    plan = task_plan(IDS, 2)
    for bad in (
        plan._replace(order=plan.order[:3]),
        plan._replace(order=plan.order.int()),
        plan._replace(offsets=plan.offsets.double()),
        plan._replace(offsets=plan.offsets.to("meta")),
        plan._replace(order=plan.order[:, None]),
    ):
        with pytest.raises(ValueError, match=r"task_ids: expected a plan as `task_plan` makes it, got"):
            CALLS[name](bad)


@pytest.mark.parametrize("offsets", [[0, 1, 2], [1, 2, 3], [0, 4, 3]])
def test_offsets_that_do_not_cut_the_batch(offsets: list[int], backend: Backend) -> None:
    plan = task_plan(torch.tensor([0, 1, 1]), 2)._replace(offsets=torch.tensor(offsets))
    with pytest.raises(ValueError, match="task_ids: expected a plan as `task_plan` makes it, got offsets"):
        task_linear(torch.ones(3, 2), torch.ones(1, 2), [None, torch.ones(1, 2)], plan)


def test_positions_beyond_the_batch_are_not_read() -> None:
    plan = task_plan(torch.tensor([0, 1] * 300), 2)
    plan = plan._replace(order=plan.order.index_fill(0, torch.tensor([5]), 400_000))
    with pytest.raises(RuntimeError, match="sample 400000 of 600"):
        task_linear(torch.ones(600, 2), torch.ones(1, 2), [None, torch.ones(1, 2)], plan)
