"""The kernels of `task_lora` in Triton's interpreter, against the float64 oracle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from cases import assert_within
from cases_lora import ROUNDINGS, LoraCase, MadeLora, expected_of, gradients, present_tasks
from cases_task import BF16, F16, F32
from torch import Tensor

import fastmtl
from fastmtl.core import dispatch
from fastmtl.ops import TaskPlan
from fastmtl.ops.task_weights import reference

if not dispatch.interpreting():
    pytest.skip("needs TRITON_INTERPRET=1, set before Triton is imported", allow_module_level=True)
pytest.importorskip("triton")

from fastmtl.core.task_weights import TaskLoraCall
from fastmtl.kernels.common import launches
from fastmtl.kernels.task_weights import configs
from fastmtl.kernels.task_weights.configs import Tile
from fastmtl.ops.task_weights.arguments import TRITON_MAX_TASKS

# of one rounding to the dtype; the interpreter cuts bfloat16 off instead of rounding: 2^-8 on a GPU
UNIT = {F32: 2.0**-24, BF16: 2.0**-7, F16: 2.0**-11}
TOLERANCE = {F32: 1e-6, BF16: ROUNDINGS * 2.0**-7, F16: ROUNDINGS * 2.0**-11}
SMALLEST = {F32: 1e-38, BF16: 1e-38, F16: 2.0**-24}
# smaller than the layers below, so that every loop goes round more than once
SMALL = {
    "lora_shrink": Tile(16, 16, 32, 4, 1),
    "lora_expand": Tile(16, 16, 16, 4, 1),
    "lora_wgrad": Tile(16, 16, 16, 4, 1),
}
WALK, SPLIT = {"mode": "walk"}, {"mode": "split", "split_rows": 16}


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    with fastmtl.use_backend("triton"), configs.force(**SMALL), launches.forgetting():
        yield


class Seen(NamedTuple):
    """A launch, as it is made."""

    name: str
    grid: tuple[int, ...]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    """Takes the launches of a test."""
    found: list[Seen] = []
    call = launches.Prepared.__call__

    def launch(self: launches.Prepared, **filled: Any) -> None:
        found.append(Seen(self._fn.__name__, self._grid))
        call(self, **filled)

    monkeypatch.setattr(launches.Prepared, "__call__", launch)
    return found


def assert_close(x: Tensor, exact: Tensor, size: Tensor, dtype: torch.dtype) -> None:
    assert x.shape == exact.shape
    bound = TOLERANCE[dtype] * size + 1.001 * UNIT[x.dtype] * exact.abs() + SMALLEST[x.dtype]
    assert_within(x.double(), exact, bound)


def check(case: LoraCase, made: MadeLora | None = None, **forced: Any) -> dict[str, Any]:
    """Result and every gradient."""
    made = case.make() if made is None else made
    want, leaves = expected_of(case, made), made.leaves()
    with configs.force(**forced):
        y = case.run(leaves)
        found = gradients(y, leaves)
    assert y.dtype == case.dtype and y.is_contiguous()
    assert_close(y.detach(), want.y, want.y_size, case.dtype)
    for name, g in found.items():
        if name[:2] in ("A[", "B[") and int(name[2:-1]) not in present_tasks(made):
            assert g is None
            continue
        assert g is not None and g.dtype == leaves.named()[name].dtype, name
        assert_close(g, want.grads[name], want.grad_sizes[name], case.dtype)
    return found


PLAIN = LoraCase(leading=(6,), cin=7, cout=5, ranks=(2, 0, 3), scaling="values", bias="per_task")
# more rows, columns and numbers of the rank than a tile has
LARGE = LoraCase(leading=(4, 9), cin=33, cout=18, ranks=(18, 3), scaling="values", bias="shared", num_tasks=2)
EIGHTS = LoraCase(leading=(9,), cin=40, cout=24, ranks=(8, 16), scaling="values", ids="runs")
LAYERS = [
    PLAIN,
    LARGE,
    EIGHTS,
    PLAIN.but(ranks=(4,), scaling=None, bias=None),
    PLAIN.but(factors="stacked", ranks=(3,), scaling="zeros", ids="absent", num_tasks=5),
    PLAIN.but(factors="stacked", ranks=(17,), scaling="number", bias="shared", shared=False),
    PLAIN.but(ranks=(1, 0), shared=False, bias=None, scaling="numbers", num_tasks=4),
    PLAIN.but(ranks=(0,), bias="per_task"),
    PLAIN.but(factors=None, bias="per_task"),
    PLAIN.but(scaling="closed", ranks=(2, 1)),
    PLAIN.but(leading=(3, 4), ids_dims=2, ids="turns"),
    PLAIN.but(leading=(2, 3, 4), ids_dims=2, x_layout="transposed", grad_layout="expanded"),
    PLAIN.but(weight_layout="transposed", x_layout="sliced", ranks=(2, 4)),
    PLAIN.but(num_tasks=1, ranks=(2,), ids="sorted"),
    PLAIN.but(num_tasks=9, leading=(3,)),
    PLAIN.but(leading=(1,)),
]
DTYPES = [(BF16, None, None), (F16, None, None), (BF16, F32, F32), (F16, None, F32), (BF16, F32, None)]


@pytest.mark.parametrize("forced", [WALK, SPLIT], ids=["walk", "split"])
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_values_and_gradients(case: LoraCase, forced: dict[str, Any]) -> None:
    check(case, **forced)


@pytest.mark.parametrize("forced", [WALK, SPLIT], ids=["walk", "split"])
@pytest.mark.parametrize(("dtype", "weight_dtype", "factor_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("case", [EIGHTS], ids=["eights"])
def test_sixteen_bits(
    case: LoraCase, dtype: torch.dtype, weight_dtype: Any, factor_dtype: Any, forced: dict[str, Any]
) -> None:
    check(case.but(dtype=dtype, weight_dtype=weight_dtype, factor_dtype=factor_dtype), **forced)


@pytest.mark.parametrize(
    "case", [PLAIN, LARGE, EIGHTS.but(dtype=BF16, factor_dtype=F32)], ids=["plain", "large", "bf16"]
)
def test_by_the_rules(case: LoraCase) -> None:
    """Tiles as they are chosen on a GPU."""
    check(case, **dict.fromkeys(SMALL))


@pytest.mark.parametrize("forced", [WALK, SPLIT], ids=["walk", "split"])
@pytest.mark.parametrize("factors", ["list", "stacked"])
@pytest.mark.parametrize("scaling_wanted", [True, False])
def test_closed_tasks_are_not_read(factors: str, scaling_wanted: bool, forced: dict[str, Any]) -> None:
    case = LoraCase(leading=(12,), ids="turns", factors=factors, scaling="values", bias="per_task")
    made = case.make()
    made.scaling[2] = 0.0
    want = expected_of(case, made)
    made.A[2].fill_(torch.nan)
    made.B[2].fill_(torch.nan)
    leaves = made.leaves()
    leaves.scaling.requires_grad_(scaling_wanted)
    with configs.force(**forced):
        y = case.run(leaves)
        wanted = {name: x for name, x in leaves.named().items() if x.requires_grad}
        found = dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), made.grad_out), strict=True))
    assert_close(y.detach(), want.y, want.y_size, F32)
    if scaling_wanted:
        of_scaling = found.pop("scaling")
        assert torch.isnan(of_scaling[2])
        assert_close(of_scaling[:2], want.grads["scaling"][:2], want.grad_sizes["scaling"][:2], F32)
    for name, g in found.items():
        assert_close(g, want.grads[name], want.grad_sizes[name], F32)


@pytest.mark.parametrize("forced", [WALK, SPLIT], ids=["walk", "split"])
@pytest.mark.parametrize("weight", [True, False])
def test_samples_of_no_task(weight: bool, forced: dict[str, Any]) -> None:
    """As a GPU meets ids that are out of range: their rows are NaN, and they are in no sum."""
    case = LoraCase(leading=(8, 2), num_tasks=3, scaling="values", bias="per_task", ids="turns", shared=weight)
    made = case.make().leaves()
    ids = made.task_ids.clone()
    ids[3], ids[6] = 3, -1
    plan, outside = TaskPlan(ids, *reference.task_plan(ids, 3)), [3, 6]
    assert plan.offsets.tolist()[-1] == 6
    with configs.force(**forced):
        y = case.run(made, plan)
        found = gradients(y, made)
    kept = [k for k in range(8) if k not in outside]
    few = replace(
        made,
        x=made.x.detach()[kept],
        task_ids=ids[kept],
        grad_out=made.grad_out.detach()[kept],
    )
    want = expected_of(case.but(leading=(6, 2)), few)
    assert torch.isnan(y[outside]).all() and torch.isnan(found["x"][outside]).all()
    assert_close(y[kept].detach(), want.y, want.y_size, F32)
    found["x"] = found["x"][kept]
    for name, g in found.items():
        assert_close(g, want.grads[name], want.grad_sizes[name], F32)


WANTED = (("x",), ("A[1]",), ("B[0]", "B[2]"), ("scaling",), ("A[0]", "x"), ("weight",), ("bias",), ("B[1]", "scaling"))


@pytest.mark.parametrize("forced", [WALK, SPLIT], ids=["walk", "split"])
@pytest.mark.parametrize("wanted", WANTED, ids="+".join)
def test_some_are_frozen(wanted: tuple[str, ...], forced: dict[str, Any]) -> None:
    case = LoraCase(leading=(12,), ids="turns", scaling="values", bias="per_task", ranks=(2, 1, 3))
    made = case.make()
    want = expected_of(case, made)
    named = made.named()
    for name, x in named.items():
        x.requires_grad_(name in wanted)
    with configs.force(**forced):
        case.run(made).backward(made.grad_out.detach())
    for name, x in named.items():
        assert (x.grad is not None) == (name in wanted)
        if x.grad is not None:
            assert_close(x.grad, want.grads[name], want.grad_sizes[name], F32)


def of_products(seen: list[Seen]) -> list[str]:
    """Without the table of pointers, and without the plan, which one of the tests before may have made."""
    return [each.name for each in seen if each.name not in ("pointer_table_kernel", "task_plan_kernel")]


def test_launches(seen: list[Seen]) -> None:
    """Two beside W's product forward, and four backward, where W is frozen and nothing is split."""
    case = LoraCase(leading=(6, 4), cin=16, cout=16, ranks=(4,))
    made = case.make().leaves()
    made.weight.requires_grad_(False)
    with configs.force(**WALK):
        y = case.run(made)
        assert of_products(seen) == ["task_lora_shrink_kernel", "task_lora_expand_kernel"]
        seen.clear()
        y.backward(made.grad_out)
    assert of_products(seen) == [
        "task_lora_shrink_kernel",
        "task_lora_expand_kernel",
        "task_lora_wgrad_kernel",
        "task_lora_wgrad_kernel",
    ]


@pytest.mark.parametrize("mode", ["walk", "split"])
def test_grids_of_the_most_tasks(mode: str, seen: list[Seen]) -> None:
    tasks, samples = TRITON_MAX_TASKS, 2 * TRITON_MAX_TASKS
    x, y, weight, A, B, scaling, bias = (
        torch.empty(size, device="meta")
        for size in ((samples, 32), (samples, 8), (8, 32), (tasks, 4, 32), (tasks, 8, 4), tasks, (tasks, 8))
    )
    order, offsets = (torch.empty(n, dtype=torch.int64, device="meta") for n in (samples, tasks + 1))
    call = TaskLoraCall.of(weight, [A], [B], [], scaling, bias, order, offsets)
    from fastmtl.kernels.task_weights import lora_launchers

    with configs.force(**dict.fromkeys(SMALL), mode=mode), launches.recording():
        lora_launchers.lora(x, call)
        lora_launchers.lora_backward(y, x, call, [True] * 4, [0], [0])
    names = {made.name for made in seen}
    assert {"task_lora_shrink_kernel", "task_lora_expand_kernel", "task_lora_scaling_grad_kernel"} <= names
    assert ("task_lora_finish_kernel" in names) == (mode == "split")
    assert max(max(each.grid[1:]) for each in seen) < 65_536
    assert max(each.grid[0] for each in seen) < 2**31


def test_same_bits() -> None:
    made = LARGE.make().leaves()
    y = LARGE.run(made)
    first = gradients(y, made)
    again = LARGE.run(made)
    second = gradients(again, made)
    assert torch.equal(y, again)
    assert all(torch.equal(first[n], second[n]) for n in first if first[n] is not None)


def test_it_declines_float64() -> None:
    case = LoraCase()
    made = case.make().double()
    with pytest.raises(RuntimeError, match=r"backend 'triton' is forced .*no float64"):
        case.run(made)
