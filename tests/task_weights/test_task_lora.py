"""`task_lora`: values and every gradient, gates, bits, double backward, compiled graphs, and what it refuses."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import cases_lora as table
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
import torch.utils.flop_counter
from cases import assert_within
from cases_lora import FEW_LORA_CASES, LORA_CASES, LoraCase, MadeLora
from cases_task import BF16, F16, F32, F64, assert_dense, assert_own_memory, bound, make_ids
from conftest import Backend
from torch import Tensor

from fastmtl.core.dispatch import use_backend
from fastmtl.ops import task_linear, task_lora, task_plan
from fastmtl.ops.task_weights import precision

# the function hides its module of the same name
task_lora_module = sys.modules["fastmtl.ops.task_weights.task_lora"]


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


rows = pytest.mark.parametrize(
    "layer",
    [LoraCase(leading=(6,), ids="turns"), LoraCase(leading=(3, 4), ids_dims=2, ids="turns")],
    ids=["rows", "packed"],
)
kinds = pytest.mark.parametrize("factors", ["list", "stacked"])


def same(a: dict[str, Tensor | None], b: dict[str, Tensor | None]) -> bool:
    return all((a[n] is None and b[n] is None) or torch.equal(a[n], b[n]) for n in a | b)


def factor(found: dict[str, Tensor | None], name: str, task: int) -> Tensor | None:
    """A or B of a task, or its gradient, whether in a list or stacked."""
    return found[name][task] if name in found else found[f"{name}[{task}]"]


def spoil(made: MadeLora, task: int, value: float) -> None:
    with torch.no_grad():
        made.A[task].fill_(value)
        made.B[task].fill_(value)


# --- what else the same layer is


@pytest.mark.parametrize("ids_dims", [1, 2])
@kinds
def test_is_task_linear_with_products(factors: str, ids_dims: int, backend: Backend) -> None:
    case = LoraCase(leading=(5, 3), ids_dims=ids_dims, factors=factors, scaling="zeros", bias="per_task", dtype=F64)
    made = case.make()
    deltas = [b @ a for a, b in zip(made.A, made.B, strict=True)]
    dense = task_linear(made.x, made.weight, deltas, made.task_ids, gate=made.scaling, bias=made.bias)
    torch.testing.assert_close(case.run(made), dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ids", ["random", "sorted", "runs"])
def test_packed_equals_flat(ids: str, backend: Backend) -> None:
    """Ids `[N, L]` are those of the N L rows."""
    case = LoraCase(leading=(4, 5), ids_dims=2, ids=ids, scaling="values", bias="per_task", ranks=(2, 3, 1))
    made = case.make()
    flat = task_lora(
        made.x.flatten(0, 1), made.weight, made.A, made.B, made.task_ids.flatten(), scaling=made.scaling, bias=made.bias
    )
    assert torch.equal(case.run(made).flatten(0, 1), flat)


@pytest.mark.parametrize("ids_dims", [1, 2])
def test_plan_equals_ids(ids_dims: int, backend: Backend) -> None:
    case = LoraCase(leading=(5, 3), ids_dims=ids_dims, scaling="zeros", bias="per_task")
    made = case.make().leaves()
    plan = task_plan(made.task_ids, case.num_tasks)
    y, planned = case.run(made), case.run(made, plan)
    assert torch.equal(y, planned)
    assert same(table.gradients(y, made), table.gradients(planned, made))


@pytest.mark.parametrize("way", ["number", "numbers", "tuple", "ints"])
def test_scaling_in_other_words(way: str, backend: Backend) -> None:
    case = LoraCase(ranks=(2, 1), bias="shared")
    made = case.make()
    given, values = {
        "number": (0.5, [0.5] * 3),
        "numbers": ([2.0, 0.0, 0.25], [2.0, 0.0, 0.25]),
        "tuple": ((1.0, 1.0, 3.0), [1.0, 1.0, 3.0]),
        "ints": (2, [2.0] * 3),
    }[way]
    made.scaling = given
    y = case.run(made)
    made.scaling = torch.tensor(values)
    assert torch.equal(y, case.run(made))


@pytest.mark.parametrize("given", [None, 1, 1.0, [1.0, 1.0, 1.0]])
def test_scaling_of_ones(given: float | list[float] | None, backend: Backend) -> None:
    case = LoraCase(ranks=(2, 1))
    made = case.make()
    made.scaling = given
    y = case.run(made)
    made.scaling = torch.ones(3)
    assert torch.equal(y, case.run(made))


def test_parameter_lists_and_tuples(backend: Backend) -> None:
    case = LoraCase(ranks=(2, 1, 3))
    made = case.make()
    y = case.run(made)
    made.A, made.B = (torch.nn.ParameterList(held) for held in (made.A, made.B))
    assert torch.equal(y, case.run(made))
    made.A, made.B = tuple(made.A), tuple(made.B)
    assert torch.equal(y, case.run(made))


def test_no_task_anywhere_is_a_plain_layer(backend: Backend) -> None:
    case = LoraCase(factors=None, bias="shared", dtype=BF16, weight_dtype=F32)
    made = case.make()
    assert torch.equal(case.run(made), F.linear(made.x, made.weight.bfloat16(), made.bias.bfloat16()))


@pytest.mark.parametrize("factors", [None, "list", "stacked"])
@pytest.mark.parametrize("per_task", [False, True])
def test_no_columns_leave_the_bias(factors: str | None, per_task: bool, backend: Backend) -> None:
    case = LoraCase(leading=(5, 2), cin=0, factors=factors, bias="per_task" if per_task else "shared")
    made = case.make().leaves()
    y = case.run(made)
    want = (made.bias[made.task_ids] if per_task else made.bias.expand(5, 4))[:, None].expand(5, 2, 4)
    assert torch.equal(y, want)
    found = table.gradients(y, made)
    shapes = {n: x.shape for n, x in made.named().items()}
    assert all(found[n] is None or found[n].shape == shapes[n] for n in shapes)
    grad = torch.autograd.grad(want, made.bias, made.grad_out)[0]
    torch.testing.assert_close(found["bias"], grad)


@kinds
def test_no_rows_of_output(factors: str, backend: Backend) -> None:
    case = LoraCase(leading=(5, 2), cout=0, factors=factors, scaling="values")
    made = case.make().leaves()
    y = case.run(made)
    assert y.shape == (5, 2, 0)
    found = table.gradients(y, made)
    assert not found["x"].any() and not found["scaling"].any()


# --- closed tasks, and what is not finite


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("ids", ["turns", "sorted", "one"])
@kinds
@rows
def test_closed_scaling_hides_its_factors(
    layer: LoraCase, factors: str, ids: str, value: float, backend: Backend
) -> None:
    """What is behind a scaling of 0 reaches that scaling's own gradient only."""
    case = layer.but(factors=factors, scaling="values", bias="per_task", ids=ids)
    made = case.make().leaves()
    with torch.no_grad():
        made.scaling[2] = 0.0
    want = table.expected_of(case, made)
    spoil(made, 2, value)
    y = case.run(made)
    table.assert_result(case, y, want)
    found = table.gradients(y, made)
    of_scaling = found["scaling"]
    assert not torch.isfinite(of_scaling[2])
    assert torch.isfinite(of_scaling[:2]).all()
    found["scaling"] = want.grads["scaling"].float()
    table.assert_gradients(case, made, found, want)
    for name in "AB":
        dead = factor(found, name, 2)
        assert torch.equal(dead, torch.zeros_like(dead)), f"the gradient of {name} behind a closed scaling is not zero"


@pytest.mark.parametrize("kind", ["tensor", "numbers"])
@kinds
@rows
def test_closed_scaling_that_is_frozen(layer: LoraCase, factors: str, kind: str, backend: Backend) -> None:
    """Nothing reads the factors where the scaling's gradient is not wanted either."""
    case = layer.but(factors=factors, scaling="zeros")
    made = case.make()
    for t in (0, 2):
        spoil(made, t, torch.nan)
    scaling = made.scaling if kind == "tensor" else made.scaling.tolist()
    made = made.leaves()
    made.scaling = scaling
    y = case.run(made)
    named = {n: x for n, x in made.named().items() if x.requires_grad}
    found = torch.autograd.grad(y, list(named.values()), made.grad_out.detach())
    assert torch.isfinite(y).all() and all(torch.isfinite(g).all() for g in found)


@kinds
@rows
def test_scaling_of_minus_zero_is_closed(layer: LoraCase, factors: str, backend: Backend) -> None:
    made = layer.but(factors=factors, scaling="closed").make()
    made.scaling.neg_()
    spoil(made, 1, torch.nan)
    assert torch.isfinite(layer.run(made)).all()


@rows
def test_scaling_that_is_nan_is_open(layer: LoraCase, backend: Backend) -> None:
    made = layer.but(scaling="values").make()
    made.scaling[1] = torch.nan
    y, own = layer.run(made), made.task_ids == 1
    assert torch.isnan(y[own]).all() and torch.isfinite(y[~own]).all()


@kinds
@rows
def test_scaling_of_a_task_without_samples_has_no_gradient(layer: LoraCase, factors: str, backend: Backend) -> None:
    """Even where its factors are not finite."""
    case = layer.but(factors=factors, scaling="values", ids="absent", num_tasks=4)
    made = case.make().leaves()
    for t in (1, 3):
        spoil(made, t, torch.nan)
    y = case.run(made)
    found = table.gradients(y, made)
    assert torch.isfinite(y).all() and torch.isfinite(found["x"]).all() and torch.isfinite(found["weight"]).all()
    assert torch.equal(found["scaling"][[1, 3]], torch.zeros(2))
    for name in "AB":
        for t in range(4):
            g = factor(found, name, t)
            if t in (0, 2):
                assert g.any()
            else:
                assert g is None if factors == "list" else not g.any()


@pytest.mark.parametrize("kind", ["nan", "inf"])
@kinds
def test_non_finite_factors_show_in_their_task_only(factors: str, kind: str, backend: Backend) -> None:
    case = LoraCase(leading=(9,), ids="turns", factors=factors, scaling="values")
    made = case.make().leaves()
    spoil(made, 1, float(kind))
    y, own = case.run(made), made.task_ids == 1
    assert not torch.isfinite(y[own]).any() and torch.isfinite(y[~own]).all()
    found = table.gradients(y, made)
    assert not torch.isfinite(found["x"][own]).any() and torch.isfinite(found["x"][~own]).all()
    assert torch.isfinite(found["weight"]).all()
    for name in "AB":
        assert all(torch.isfinite(factor(found, name, t)).all() for t in (0, 2))


@kinds
def test_non_finite_rows_of_x_stay_with_their_task(factors: str, backend: Backend) -> None:
    case = LoraCase(leading=(9,), ids="turns", factors=factors, scaling="values")
    made = case.make()
    made.x[4] = torch.nan
    made = made.leaves()
    y = case.run(made)
    assert torch.isnan(y[4]).all() and torch.isfinite(y[torch.arange(9) != 4]).all()
    found = table.gradients(y, made)
    assert torch.isnan(factor(found, "A", 1)).all() and torch.isnan(factor(found, "B", 1)).all()
    assert all(torch.isfinite(factor(found, name, t)).all() for name in "AB" for t in (0, 2))


# --- what needs a gradient


WANTED = (
    ("x",), ("weight",), ("scaling",), ("bias",), ("A",), ("B",), ("A[1]",), ("B[0]", "B[2]"),
    ("x", "scaling"), ("weight", "bias"), ("A[2]", "scaling"), ("A", "weight"), ("A", "B"), ("A[0]", "B[1]", "x"),
)  # fmt: skip


@pytest.mark.parametrize("wanted", WANTED, ids="+".join)
@pytest.mark.parametrize("ids", ["turns", "absent", "sorted"])
@pytest.mark.parametrize("scaling", ["values", "zeros"])
def test_some_are_frozen(scaling: str, ids: str, wanted: tuple[str, ...], backend: Backend) -> None:
    """Each gradient alone equals the one that is found together with all others; the frozen ones get none."""
    stacked = "A" in wanted or "B" in wanted
    case = LoraCase(factors="stacked" if stacked else "list", scaling=scaling, bias="per_task", ids=ids)
    made = case.make()
    for name, x in made.named().items():
        x.requires_grad_(name in wanted)
    case.run(made).backward(made.grad_out)
    found = {name: x.grad for name, x in made.named().items()}
    assert all(found[name] is None for name in found if name not in wanted)
    want, present = table.expected(case), table.present_tasks(made)
    for name in wanted:
        if name[:2] in ("A[", "B[") and int(name[2:-1]) not in present:
            assert found[name] is None
            continue
        exact = want.grads[name]
        assert_within(found[name], exact, bound(want.grad_sizes[name], exact, 2e-6, F32))


def test_nothing_is_recorded_where_nothing_needs_a_gradient(backend: Backend) -> None:
    case = LoraCase(scaling="values", bias="per_task")
    made = case.make()
    assert not case.run(made).requires_grad
    leaves = made.leaves()
    with torch.no_grad():
        assert not case.run(leaves).requires_grad
    with torch.inference_mode():
        assert torch.equal(case.run(leaves), case.run(made))


# --- threads, ways to walk


def test_sums_of_a_long_batch_do_not_depend_on_the_number_of_threads(threads: None) -> None:
    """The parts of which sums are added up are the same for any number of threads, and so are the bits."""
    case = LoraCase(leading=(700, 3), cin=9, cout=33, ranks=(2, 20, 5), scaling="values", bias="per_task", shared=False)
    made, found = case.make().leaves(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        y = case.run(made)
        found.append({"y": y, **table.gradients(y, made)})
    assert same(found[0], found[1]) and same(found[0], found[2])


# rows, columns and ranks about the sizes that the CPU's pass takes at a time
_ODD = [(1, 1, 1), (2, 3, 2), (5, 7, 4), (8, 8, 5), (15, 16, 7), (16, 17, 13), (25, 24, 3), (40, 31, 6)]


@pytest.mark.parametrize("dtype", [F32, F64, BF16, torch.float16], ids=str)
@pytest.mark.parametrize(("cin", "cout", "rank"), _ODD)
def test_odd_columns_and_ranks(cin: int, cout: int, rank: int, dtype: torch.dtype, backend: Backend) -> None:
    case = LoraCase(
        leading=(37,), cin=cin, cout=cout, ranks=(rank, rank + 1), scaling="values", bias="per_task", dtype=dtype
    )
    made, want = case.make().leaves(), table.expected(case)
    y = case.run(made)
    table.assert_result(case, y, want)
    table.assert_gradients(case, made, table.gradients(y, made), want)


@pytest.mark.parametrize("rows", [31, 32, 33, 127, 128, 129, 260])
@pytest.mark.parametrize("ids", ["one", "turns", "runs"])
def test_rows_about_those_of_a_part(ids: str, rows: int, backend: Backend) -> None:
    """Each task's rows are taken some at a time; the last time there are fewer, and samples may be cut in two."""
    for leading, ids_dims in (((rows,), 1), ((rows, 3), 1), ((3, rows), 2)):
        case = LoraCase(leading=leading, ids_dims=ids_dims, ids=ids, ranks=(3, 17, 0), scaling="values", bias="shared")
        made, want = case.make().leaves(), table.expected(case)
        y = case.run(made)
        table.assert_result(case, y, want)
        table.assert_gradients(case, made, table.gradients(y, made), want)


@pytest.mark.parametrize("rank", [16, 64, 130])
@pytest.mark.parametrize("factors", ["list", "stacked"])
def test_large_ranks(factors: str, rank: int, backend: Backend) -> None:
    """Larger ranks than there are columns, with sums of more rows at a time."""
    case = LoraCase(leading=(300, 5), cin=24, cout=20, ranks=(rank,), factors=factors, scaling="zeros", ids="turns")
    made, want = case.make().leaves(), table.expected(case)
    y = case.run(made)
    table.assert_result(case, y, want)
    table.assert_gradients(case, made, table.gradients(y, made), want)


@pytest.mark.parametrize("case", [c for c in FEW_LORA_CASES if c.dtype != F64], ids=str)
def test_layouts_of_rows(case: LoraCase, backend: Backend) -> None:
    """Rows are read where they lie, in x and in the gradient."""
    for options in ({}, {"x_layout": "sliced", "ids": "runs"}, {"ids": "turns", "grad_layout": "expanded_batch"}):
        varied = case.but(**options)
        made, want = varied.make().leaves(), table.expected(varied)
        y = varied.run(made)
        table.assert_result(varied, y, want)
        table.assert_gradients(varied, made, table.gradients(y, made), want)


# --- past the op


def test_plain_tensors_go_past_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU an eager call needs no op; what it cannot see, and what watches, makes it call the op."""
    called: list[int] = []
    real = task_lora_module.task_lora_op

    def op(*args: Any) -> Tensor:
        called.append(1)
        return real(*args)

    monkeypatch.setattr(task_lora_module, "task_lora_op", op)
    case = LoraCase(scaling="values", bias="shared")
    made = case.make().leaves()

    def calls(run: Any) -> int:
        called.clear()
        run()
        return len(called)

    assert calls(lambda: case.run(made)) == 0
    assert calls(lambda: case.run(made.map(lambda x: x.detach()))) == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert calls(lambda: case.run(made)) == 1
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        assert calls(lambda: case.run(made)) == 1
    with use_backend("reference"):
        assert calls(lambda: case.run(made)) == 1


@pytest.mark.parametrize("scaling", [None, "number", "values"])
@kinds
def test_the_op_gives_the_same_bits(factors: str, scaling: str | None) -> None:
    """With and without the op: result, gradients, and gradients of gradients."""
    case = LoraCase(leading=(6, 3), factors=factors, scaling=scaling, bias="per_task", ranks=(3,))
    made = case.make().leaves()
    y = case.run(made)
    by_op = task_lora_module.task_lora_op(*case.op_arguments(made))
    assert torch.equal(y, by_op)
    found, expected = table.gradients(y, made, retain_graph=True), table.gradients(by_op, made, retain_graph=True)
    assert same(found, expected)
    again, other = (table.gradients(out, made, create_graph=True) for out in (y, by_op))
    twice, expected = (
        table.gradients(sum(g.square().sum() for g in of.values() if g is not None), made, torch.ones(()))
        for of in (again, other)
    )
    assert same(twice, expected)


# --- what autograd holds


@rows
def test_backward_twice(layer: LoraCase, backend: Backend) -> None:
    """`retain_graph`: the same bits again, and what was accumulated is not written over."""
    case = layer.but(scaling="zeros", bias="per_task", ids="sorted")
    made = case.make().leaves()
    y = case.run(made)
    first = table.gradients(y, made, retain_graph=True)
    kept = {n: g if g is None else g.clone() for n, g in first.items()}
    second = table.gradients(y, made, grad_out=2 * made.grad_out.detach(), retain_graph=True)
    assert same(first, kept)
    assert same(second, {n: g if g is None else 2 * g for n, g in first.items()})


@pytest.mark.parametrize("name", ["x", "weight", "A[1]", "B[0]", "scaling"])
def test_a_changed_argument_is_seen(name: str, backend: Backend) -> None:
    case = LoraCase(ids="turns", scaling="values", bias="per_task")
    made = case.make().leaves()
    y = case.run(made)
    with torch.no_grad():
        made.named()[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        table.gradients(y, made)


# --- derivatives of derivatives


SMALL = {
    "rows": LoraCase(leading=(3,), cin=2, cout=2, dtype=F64, num_tasks=2, ids="turns", ranks=(2, 1)),
    "packed": LoraCase(leading=(2, 2), ids_dims=2, cin=2, cout=3, dtype=F64, num_tasks=2, ids="turns", ranks=(1,)),
}
DIFFERENTIATED: dict[str, dict[str, Any]] = {
    "list": {"bias": "per_task"},
    "stacked": {"factors": "stacked", "bias": "shared"},
    "scaled": {"scaling": "values", "bias": "per_task"},
    "scaled_stacked": {"factors": "stacked", "scaling": "values"},
    "number": {"scaling": "number"},
    "closed": {"scaling": "zeros"},
    "closed_stacked": {"factors": "stacked", "scaling": "zeros", "bias": "per_task"},
    "alone": {"factors": "stacked", "scaling": "zeros", "shared": False},
    "nones": {"ranks": (2, 0), "scaling": "values"},
    "absent": {"factors": "stacked", "scaling": "values", "num_tasks": 3, "ids": "one"},
}


def function_of(case: LoraCase, made: MadeLora) -> Any:
    """The layer as a function of its differentiable arguments."""

    def run(*tensors: Tensor) -> Tensor:
        rest = dict(zip(made.named(), tensors, strict=True))
        factors = {}
        for name in "AB":
            held = getattr(made, name)
            factors[name] = (
                [rest.get(f"{name}[{t}]") for t in range(len(held))] if isinstance(held, list) else rest.get(name)
            )
        scaling = rest.get("scaling", made.scaling)
        return case.run(
            replace(made, x=rest["x"], weight=rest.get("weight"), scaling=scaling, bias=rest.get("bias"), **factors)
        )

    return run


@pytest.mark.parametrize("way", DIFFERENTIATED)
@pytest.mark.parametrize("layer", SMALL.values(), ids=SMALL)
def test_gradcheck(layer: LoraCase, way: str, backend: Backend) -> None:
    case = layer.but(**DIFFERENTIATED[way])
    made = case.make().leaves()
    tensors = tuple(made.named().values())
    # the whole Jacobian for one, one projection of it for the other
    fast = layer is not SMALL["rows"]
    assert torch.autograd.gradcheck(function_of(case, made), tensors, fast_mode=fast)
    assert torch.autograd.gradgradcheck(function_of(case, made), tensors, fast_mode=fast)


def test_gradgradcheck_of_some(backend: Backend) -> None:
    """The second derivative where only some of the arguments take part."""
    case = SMALL["rows"].but(scaling="values", bias="per_task")
    made = case.make().leaves()
    everything = made.named()
    for wanted in (("x",), ("weight", "scaling"), ("A[1]",), ("B[0]", "x"), ("A[0]", "B[0]")):

        def run(*tensors: Tensor, wanted: tuple[str, ...] = wanted) -> Tensor:
            detached = {n: x.detach() for n, x in everything.items()} | dict(zip(wanted, tensors, strict=True))
            return function_of(case, made)(*detached.values())

        assert torch.autograd.gradgradcheck(run, tuple(everything[n] for n in wanted), fast_mode=True)


# --- compiled graphs, autocast


@pytest.mark.parametrize(
    ("options", "dynamic"),
    [
        ({"ranks": (2, 3, 1), "scaling": "zeros", "bias": "per_task"}, False),
        ({"ranks": (2, 3, 1), "scaling": "zeros", "bias": "per_task"}, True),
        ({"factors": "stacked", "scaling": "values", "bias": "shared"}, True),
        ({"ranks": (2, 0, 1), "scaling": "numbers"}, False),
        ({"factors": "stacked", "shared": False, "dtype": BF16, "factor_dtype": F32, "scaling": "number"}, False),
    ],
    ids=["list", "list_dynamic", "stacked_dynamic", "nones", "alone_bfloat16"],
)
def test_compile(options: dict[str, Any], dynamic: bool, backend: Backend, fresh_compiler: None) -> None:
    """One graph, the bits of eager; other ids and other scalings, even absent tasks, do not compile again."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    case = LoraCase(leading=(3, 4), ids_dims=2, ids="turns", **options)

    @torch.compile(fullgraph=True, backend=counter, dynamic=dynamic)
    def compiled(*tensors: Tensor, task_ids: Tensor) -> Tensor:
        return function_of(case, replace(made, task_ids=task_ids))(*tensors) * 2

    def zeros_for_none(found: dict[str, Tensor | None]) -> dict[str, Tensor]:
        return {n: torch.zeros_like(made.named()[n]) if g is None else g for n, g in found.items()}

    made = case.make().leaves()
    for ids in ("turns", "sorted", "absent"):
        made.task_ids = make_ids(ids, (3, 4), case.num_tasks)
        if isinstance(made.scaling, Tensor):
            with torch.no_grad():
                made.scaling.copy_(made.scaling.roll(1))
        tensors = tuple(made.named().values())
        y, eager = compiled(*tensors, task_ids=made.task_ids), case.run(made) * 2
        assert torch.equal(y, eager) and y.stride() == eager.stride()
        found, expected = table.gradients(y, made), table.gradients(eager, made)
        # which tasks are absent is not known while compiling: their gradient is zero instead of None
        assert same(zeros_for_none(found), zeros_for_none(expected))
    assert counter.frame_count == 1


@rows
def test_autocast_casts_x_alone(layer: LoraCase, backend: Backend) -> None:
    """bfloat16 through float32 parameters; gradients in the dtype of what they belong to."""
    case = layer.but(scaling="values", bias="per_task")
    made = case.make().leaves()
    narrow = replace(made, x=made.x.detach().bfloat16().requires_grad_())
    expected = case.run(narrow)
    grad_out = made.grad_out.detach().bfloat16()
    wanted = table.gradients(expected, narrow, grad_out)
    with torch.autocast("cpu", dtype=BF16):
        y = case.run(made)
        inside = table.gradients(y, made, grad_out, retain_graph=True)
    for found in (inside, table.gradients(y, made, grad_out)):
        assert y.dtype == BF16 and torch.equal(y, expected)
        for name, g in found.items():
            assert g.dtype == F32
            assert torch.equal(g, wanted[name].float()), name


@pytest.mark.parametrize("wide", [False, True], ids=["narrow_parameters", "float32_parameters"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("case", [c for c in FEW_LORA_CASES if c.dtype == F32], ids=str)
def test_widened_results_are_rounded_once(
    case: LoraCase, dtype: torch.dtype, wide: bool, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU for which oneDNN has no 16-bit arithmetic: within the rounding of the result."""
    monkeypatch.setattr(precision, "WIDENED", {BF16, F16})
    of_parameters = F32 if wide else None
    case = case.but(dtype=dtype, weight_dtype=of_parameters, factor_dtype=of_parameters)
    made = case.make().leaves()
    want = table.expected_of(case, made)
    y = case.run(made)
    table.assert_result(case, y, want, 1e-5)
    table.assert_gradients(case, made, table.gradients(y, made), want, tolerance=1e-5)


# --- what it refuses


def _v(*shape: int, **options: Any) -> Tensor:
    return torch.ones(*shape, **options)


META = {"device": "meta"}
INT, DOUBLE, NARROW = {"dtype": torch.int64}, {"dtype": F64}, {"dtype": BF16}


def _arguments() -> dict[str, Any]:
    """x `[4, 5, 2]`, T = 3, Cout = 6, ranks 1 and 3."""
    return {
        "x": _v(4, 5, 2),
        "weight": _v(6, 2),
        "A": [_v(1, 2), None, _v(3, 2)],
        "B": [_v(6, 1), None, _v(6, 3)],
        "task_ids": torch.tensor([0, 2, 1, 0]),
        "scaling": _v(3),
        "bias": _v(3, 6),
    }


_STACKED = {"A": _v(3, 2, 2), "B": _v(3, 6, 2)}
_ALONE = {"weight": None, "A": None, "B": None}
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x list": ({"x": [1.0]}, TypeError, r"x: expected a tensor, got list"),
    "x int": ({"x": _v(4, 5, 2, **INT)}, TypeError, r"x: expected float64, .*got torch.int64"),
    "x sparse": ({"x": _v(4, 2).to_sparse()}, TypeError, r"x: expected a dense .*layout torch.sparse_coo"),
    "x 1-d": ({"x": _v(4)}, ValueError, r"x: expected shape \[N, ..., Cin\], got \[4\]"),
    "x columns": ({"x": _v(4, 5, 3)}, ValueError, r"x: expected 2 columns as the weights, got 3"),
    "ids list": ({"task_ids": [0, 1, 2, 0]}, TypeError, r"task_ids: expected an int64 .*TaskPlan, got list"),
    "ids float": ({"task_ids": _v(4)}, TypeError, r"task_ids: expected int64 or int32, got torch.float32"),
    "ids short": ({"task_ids": torch.tensor([0])}, ValueError, r"task_ids: expected shape \[4\] or \[4, 5\].*\[1\]"),
    "ids all": ({"task_ids": _v(4, 5, 2).long()}, ValueError, r"expected shape \[4\] or \[4, 5\], as x"),
    "ids meta": ({"task_ids": _v(4, **META).long()}, ValueError, r"task_ids: .*cpu as x, got meta"),
    "ids large": ({"task_ids": torch.tensor([0, 1, 3, 0])}, ValueError, r"ids from 0 to 2, got 3"),
    "plan": ({"task_ids": task_plan(_v(4).long(), 2)}, ValueError, r"a plan of 3 tasks, got one of 2"),
    "weight kind": ({"weight": 3.0}, TypeError, r"weight: expected a tensor, got float"),
    "weight dims": ({"weight": _v(6)}, ValueError, r"weight: expected shape \[Cout, Cin\], got \[6\]"),
    "weight dtype": ({"weight": _v(6, 2, **DOUBLE)}, TypeError, r"weight: expected torch.float32 .*float64"),
    "weight meta": ({"weight": _v(6, 2, **META)}, ValueError, r"weight: expected device cpu as x, got meta"),
    "nothing": (_ALONE, ValueError, r"weight, A, B: expected a weight or the factors of at least one task, got none"),
    "scaling huge": ({"scaling": 10**400}, ValueError, r"scaling: expected a number that a float holds, got an int of"),
    "scaling huge of one": ({"scaling": [1, 10**400, 1]}, ValueError, r"scaling\[1\]: expected a number that a float"),
    "nothing in lists": (
        {"weight": None, "A": [None] * 3, "B": [None] * 3},
        ValueError,
        r"weight, A, B: expected a weight or the factors",
    ),
    "A alone": ({"B": None}, ValueError, r"B: expected the factors that A is to be multiplied with, got None"),
    "B alone": ({"A": None}, ValueError, r"A: expected the factors that B is to be multiplied with, got None"),
    "A number": ({"A": 1.0}, TypeError, r"A: expected a \[T, r, Cin\] tensor, a list of T tensors .*got float"),
    "B number": ({"B": 1.0}, TypeError, r"B: expected a \[T, Cout, r\] tensor, a list of T tensors .*got float"),
    "A dict": ({"A": {0: _v(1, 2)}}, TypeError, r"A: expected a .*got dict"),
    "A string": ({"A": "abc"}, TypeError, r"A: expected a .*got str"),
    "A entry": ({"A": [_v(1, 2), 2.0, None]}, TypeError, r"A\[1\]: expected a tensor or None, got float"),
    "A dims": ({"A": [_v(2), None, _v(3, 2)]}, ValueError, r"A\[0\]: expected shape \[r, Cin\], got \[2\]"),
    "B dims": ({"B": [_v(6), None, _v(6, 3)]}, ValueError, r"B\[0\]: expected shape \[Cout, r\], got \[6\]"),
    "A columns": ({"A": [_v(1, 2), None, _v(3, 4)]}, ValueError, r"A\[2\]: expected shape \[3, 2\], got \[3, 4\]"),
    "B rows": ({"B": [_v(6, 1), None, _v(5, 3)]}, ValueError, r"B\[2\]: expected shape \[6, 3\], got \[5, 3\]"),
    "rank": ({"B": [_v(6, 2), None, _v(6, 3)]}, ValueError, r"B\[0\]: expected shape \[6, 1\], got \[6, 2\]"),
    "rank 0": (
        {"A": [_v(0, 2), None, None], "B": [_v(6, 0), None, None]},
        ValueError,
        r"A\[0\]: expected a rank of at least 1",
    ),
    "A dtype": ({"A": [_v(1, 2), None, _v(3, 2, **DOUBLE)]}, TypeError, r"A\[2\]: expected torch.float32 .*float64"),
    "A meta": ({"A": [_v(1, 2, **META), None, _v(3, 2)]}, ValueError, r"A\[0\]: expected device cpu as x, got meta"),
    "B without A": (
        {"B": [_v(6, 1), _v(6, 1), _v(6, 3)]},
        ValueError,
        r"B\[1\]: expected None as A\[1\], got a tensor",
    ),
    "A without B": ({"B": [_v(6, 1), None, None]}, ValueError, r"B\[2\]: expected a tensor as A\[2\], got None"),
    "T of B": ({"B": [_v(6, 1), None]}, ValueError, r"B: expected 3 tasks as in A, got 2"),
    "A stacked alone": ({"A": _v(3, 1, 2)}, TypeError, r"B: expected one \[T, ...\] tensor as A, got list"),
    "B stacked alone": ({"B": _v(3, 6, 1)}, TypeError, r"A: expected one \[T, ...\] tensor as B, got list"),
    "stack dims": ({**_STACKED, "A": _v(2, 2)}, ValueError, r"A: expected shape \[T, r, Cin\], got \[2, 2\]"),
    "stack columns": ({**_STACKED, "A": _v(3, 2, 4)}, ValueError, r"A: expected shape \[3, 2, 2\], got \[3, 2, 4\]"),
    "stack rank": ({**_STACKED, "B": _v(3, 6, 1)}, ValueError, r"B: expected shape \[3, 6, 2\], got \[3, 6, 1\]"),
    "stack rank 0": ({"A": _v(3, 0, 2), "B": _v(3, 6, 0)}, ValueError, r"A: expected a rank of at least 1"),
    "stack T": ({**_STACKED, "B": _v(4, 6, 2)}, ValueError, r"B: expected 3 tasks as in A, got 4"),
    "stack int": ({**_STACKED, "A": _v(3, 2, 2, **INT)}, TypeError, r"A: expected float64.*got torch.int64"),
    "T = 0": ({"A": _v(0, 2, 2), "B": _v(0, 6, 2)}, ValueError, r"A: expected at least one task, got 0"),
    "scaling string": ({"scaling": "1.0"}, TypeError, r"scaling: expected a number, a \[T\] tensor, .*got str"),
    "scaling bool": ({"scaling": True}, TypeError, r"scaling: expected a number, a \[T\] tensor, .*got bool"),
    "scaling entry": ({"scaling": [1.0, None, 2.0]}, TypeError, r"scaling\[1\]: expected a number, got NoneType"),
    "scaling dims": ({"scaling": _v(3, 1)}, ValueError, r"scaling: expected shape \[T\], got \[3, 1\]"),
    "scaling dtype": ({"scaling": _v(3, **DOUBLE)}, TypeError, r"scaling: expected torch.float32 .*torch.float64"),
    "scaling meta": ({"scaling": _v(3, **META)}, ValueError, r"scaling: expected device cpu as x, got meta"),
    "T of scaling": ({"scaling": _v(4)}, ValueError, r"scaling: expected 3 tasks as in A, got 4"),
    "T of numbers": ({"scaling": [1.0, 2.0]}, ValueError, r"scaling: expected 3 tasks as in A, got 2"),
    "bias kind": ({"bias": 1.0}, TypeError, r"bias: expected a tensor, got float"),
    "bias short": ({"bias": _v(5)}, ValueError, r"bias: expected shape \[6\] or \[T, 6\], got \[5\]"),
    "T of bias": ({"bias": _v(2, 6)}, ValueError, r"bias: expected 3 tasks as in A, got 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, backend: Backend) -> None:
    change, error, match = BAD[name]
    with pytest.raises(error, match=match):
        task_lora(**{**_arguments(), **change})


def test_the_call_is_right_otherwise(backend: Backend) -> None:
    """Every refusal above is because of what was changed."""
    assert task_lora(**_arguments()).shape == (4, 5, 6)
    assert task_lora(**{**_arguments(), **_STACKED}).shape == (4, 5, 6)


def test_wide_parameters_beside_narrow_x_only(backend: Backend) -> None:
    """float32 beside 16 bits is legal, of the weight and of the factors each; float64 is not, nor the other 16 bits."""
    arguments = _arguments() | {"scaling": None, "bias": None}
    x = arguments["x"].bfloat16()
    narrow = {name: [w if w is None else w.bfloat16() for w in arguments[name]] for name in "AB"}
    for change in ({}, narrow, {"weight": arguments["weight"].bfloat16()}):
        assert task_lora(**{**arguments, "x": x, **change}).dtype == BF16
    for dtype in (F64, F16):
        with pytest.raises(TypeError, match=r"weight: expected torch.bfloat16 or torch.float32 beside x"):
            task_lora(**{**arguments, "x": x, "weight": arguments["weight"].to(dtype)})
    with pytest.raises(TypeError, match=r"B\[0\]: expected torch.bfloat16 as A\[0\], got torch.float32"):
        task_lora(**{**arguments, "x": x, "A": narrow["A"]})
