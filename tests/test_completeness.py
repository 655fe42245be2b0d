"""Fails when a registered op lacks its oracle, fake, case or benchmark entry; and checks the checks."""

from __future__ import annotations

import importlib
import inspect
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import cases
import pytest
import torch
from cases import BankCase
from conftest import Backend, skip_or_fail
from samples_task import TASK_OPCHECK_SAMPLES
from torch import Tensor

from fastmtl.core.schemas import PUBLIC_OPS
from fastmtl.core.task_weights import (
    Geometry,
    LowRankDeltas,
    SortedBatch,
    TaskConvCall,
    TaskLoraCall,
    TaskWeights,
)
from fastmtl.ops import combine
from fastmtl.ops.gradients import reference as of_gradients
from fastmtl.ops.task_weights import reference as of_task_weights

OPCHECK_SAMPLES = cases.OPCHECK_SAMPLES | TASK_OPCHECK_SAMPLES
# the oracles of both families under one roof
REFERENCE = types.SimpleNamespace(**vars(of_gradients) | vars(of_task_weights))


# what an oracle takes as one value, and the arguments of a schema that it stands for, as far as there are such
VALUES: dict[str, tuple[Callable[..., Any], frozenset[str]]] = {
    "geometry": (lambda *args: Geometry.of(*args) if args else Geometry(), frozenset(Geometry._fields)),
    "batch": (SortedBatch, frozenset(SortedBatch._fields)),
}
VALUES["call"] = (
    TaskConvCall.of,
    frozenset({*TaskWeights._fields, "bias"}).union(*(names for _, names in VALUES.values())),
)
VALUES["lora"] = (
    TaskLoraCall.of,
    frozenset({"weight", "delta_tasks", "bias", *LowRankDeltas._fields, *SortedBatch._fields}),
)


def shares(oracle: Callable[..., Any], arguments: Sequence[str]) -> list[int] | None:
    """How many of the arguments each parameter of an oracle stands for; None where it takes others."""
    found, rest = [], list(arguments)
    for parameter in inspect.signature(oracle).parameters:
        count = 1
        if parameter in VALUES and parameter not in rest:
            _, names = VALUES[parameter]
            count = next((k for k, name in enumerate(rest) if name not in names), len(rest))
        if count > len(rest):
            return None
        found.append(count)
        del rest[:count]
    return None if rest else found


def with_values(oracle: Callable[..., Any], arguments: Sequence[str], args: Sequence[Any]) -> list[Any]:
    """The arguments of an op, as its oracle takes them."""
    parameters = list(inspect.signature(oracle).parameters)[: len(args)]
    packed, rest = [], list(args)
    for parameter, count in zip(parameters, shares(oracle, arguments) or (), strict=False):
        values, rest = rest[:count], rest[count:]
        packed += [VALUES[parameter][0](*values)] if parameter in VALUES and parameter not in arguments else values
    return packed


def argument_names(name: str, implementation: Callable[..., Any]) -> list[str]:
    """By the op's schema; of an op that is not registered, by its implementation."""
    op = getattr(torch.ops.fastmtl, name, None)
    if op is None:
        return list(inspect.signature(implementation).parameters)
    return [argument.name for argument in op.default._schema.arguments]


def missing(
    ops: Mapping[str, tuple[Callable[..., Any], Callable[..., Any]]],
    oracles: object,
    samples: Collection[str],
    benchmarks: Collection[str] | None = None,
) -> list[str]:
    """What the ops lack, one line each; `benchmarks=None` leaves the benchmark entries out."""
    lacking = []
    for name, (implementation, fake) in sorted(ops.items()):
        oracle = getattr(oracles, name, None)
        if not callable(oracle):
            lacking.append(f"{name}: no oracle of that name in a reference.py of fastmtl/ops")
        elif shares(oracle, argument_names(name, implementation)) is None:
            lacking.append(f"{name}: its oracle takes other arguments than the op")
        if not callable(fake):
            lacking.append(f"{name}: no fake implementation")
        if name not in samples:
            lacking.append(f"{name}: no entry in the opcheck samples of tests/")
        # a backward is timed as part of its op
        if benchmarks is not None and not name.endswith("_backward") and name not in benchmarks:
            lacking.append(f"{name}: no entry in benchmarks/runner/registry.py")
    return lacking


def registered() -> set[str]:
    """Every public name in `torch.ops.fastmtl`, as the dispatcher knows them."""
    names = {
        name.removeprefix("fastmtl::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("fastmtl::")
    }
    return {name for name in names if not name.startswith("_")}


def test_every_op_is_complete() -> None:
    assert missing(PUBLIC_OPS, REFERENCE, OPCHECK_SAMPLES) == []


def test_every_registered_op_is_in_the_table() -> None:
    assert registered() == PUBLIC_OPS.keys()


def test_every_op_has_a_benchmark() -> None:
    try:
        registry = importlib.import_module("fastmtl.benchmarks.runner.registry")
    except ModuleNotFoundError as error:
        skip_or_fail(f"fastmtl.benchmarks is not installed ({error})")
    assert missing(PUBLIC_OPS, REFERENCE, OPCHECK_SAMPLES, registry.covered_ops()) == []


def test_no_sample_without_an_op() -> None:
    assert OPCHECK_SAMPLES.keys() <= PUBLIC_OPS.keys()


def test_a_new_op_is_seen() -> None:
    """The check can fail: a copy of the table with an op that has nothing."""
    ops = {**PUBLIC_OPS, "gram_of_nothing": (lambda grads: grads, None)}
    lacking = missing(ops, REFERENCE, OPCHECK_SAMPLES, benchmarks=PUBLIC_OPS.keys())
    assert [line.split(": ")[0] for line in lacking] == ["gram_of_nothing"] * 4
    for what in ("no oracle", "no fake", "opcheck samples", "benchmarks/runner/registry.py"):
        assert any(what in line for line in lacking), what


def test_an_oracle_of_other_arguments_is_seen() -> None:
    """The check can fail, of values that stand for several arguments too."""
    names = ["x", "weight", "delta", "delta_tasks", "gate", "bias", "order", "offsets", "stride", "out"]
    assert shares(lambda x, call, out: None, names) == [1, 8, 1]
    assert shares(lambda x, call: None, names) is None
    assert shares(lambda x, call, out, more: None, names) is None
    assert shares(lambda x, batch, out: None, ["x", "order", "offsets", "kernel_size", "out"]) is None
    assert shares(lambda x, batch, geometry, out: None, ["x", "order", "offsets", "out"]) == [1, 2, 0, 1]
    ops = {"task_linear": PUBLIC_OPS["task_linear"]}
    oracles = types.SimpleNamespace(task_linear=lambda x, batch: x)
    assert missing(ops, oracles, {"task_linear"}) == ["task_linear: its oracle takes other arguments than the op"]


@pytest.mark.parametrize("name", PUBLIC_OPS)
def test_a_missing_entry_is_seen(name: str) -> None:
    rest = PUBLIC_OPS.keys() - {name}
    assert missing(PUBLIC_OPS, REFERENCE, rest) == [f"{name}: no entry in the opcheck samples of tests/"]
    oracles = type("Oracles", (), {other: staticmethod(getattr(REFERENCE, other)) for other in rest})
    assert missing(PUBLIC_OPS, oracles, OPCHECK_SAMPLES) == [
        f"{name}: no oracle of that name in a reference.py of fastmtl/ops"
    ]
    expected = [] if name.endswith("_backward") else [f"{name}: no entry in benchmarks/runner/registry.py"]
    assert missing(PUBLIC_OPS, REFERENCE, OPCHECK_SAMPLES, rest) == expected


# --- every op on its samples


def _samples() -> list[Any]:
    return [
        pytest.param(name, k, id=f"{name}-{k}")
        for name in sorted(OPCHECK_SAMPLES)
        for k in range(len(OPCHECK_SAMPLES[name]()))
    ]


# what looks at what a backend returns
OF_A_BACKEND = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize(("name", "number"), _samples())
def test_opcheck(name: str, number: int, backend: Backend) -> None:
    """Schema, fake against real (shapes, dtypes, strides) and autograd registration; on the compiled backend AOT with
    dynamic shapes too, which traces fakes and autograd formulas: the same ones whichever backend then runs."""
    checks = {"test_utils": OF_A_BACKEND} if backend.name == "reference" else {}
    torch.library.opcheck(getattr(torch.ops.fastmtl, name).default, OPCHECK_SAMPLES[name]()[number], **checks)


def _upcast(x: Any) -> Any:
    """Tensors to new float64 ones, and a dtype asked for to float64."""
    if isinstance(x, Tensor):
        return x.detach().to(torch.float64, copy=True) if x.is_floating_point() else x.clone()
    if isinstance(x, torch.dtype):
        return torch.float64
    return [_upcast(y) for y in x] if isinstance(x, list) else x


# which argument of an op runs along with the gradients
HELD = {"average_gradients": 6, "excess_risks": 5}
OP_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def _results(op: Callable[..., Any], args: Sequence[Any], written: Sequence[int]) -> list[Tensor]:
    """What the op returns, and what it has written into these of its arguments."""
    out = op(*args)
    changed = [x for k in written for x in (args[k] if isinstance(args[k], list) else [args[k]]) if x is not None]
    if out is None:
        return changed
    return [*([out] if isinstance(out, Tensor) else out), *changed]


def written_by(name: str, count: int) -> list[int]:
    """Which of the first arguments of the op it writes into."""
    arguments = getattr(torch.ops.fastmtl, name).default._schema.arguments[:count]
    return [k for k, x in enumerate(arguments) if x.alias_info is not None and x.alias_info.is_write]


@pytest.mark.parametrize(("name", "number"), _samples())
def test_op_equals_its_oracle(name: str, number: int, backend: Backend) -> None:
    """The op as registered, without its Python wrapper, against the float64 oracle of the same name."""
    args = OPCHECK_SAMPLES[name]()[number]
    wide, written = _upcast(list(args)), written_by(name, len(args))
    out = _results(getattr(torch.ops.fastmtl, name), args, written)
    with torch.no_grad():
        oracle = getattr(REFERENCE, name)
        values = with_values(oracle, argument_names(name, oracle), wide)
        # of packed values none is written
        expected = _results(oracle, values, written if len(values) == len(wide) else [len(values) - 1] * len(written))
    assert out or name.endswith("_backward")
    for x, y in zip(out, expected, strict=True):
        if not x.is_floating_point():
            assert torch.equal(x, y)
            continue
        assert y.dtype == torch.float64
        dtypes = {x.dtype}
        if name.startswith("task_"):
            # computed in the dtype of x, whatever that of the result
            dtypes |= {a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point()}
        if name in HELD:  # a float64 result of sums in the dtype of what runs along
            dtypes |= {a.dtype for a in args[HELD[name]]}
        tolerance = max(OP_TOLERANCE[dtype] for dtype in dtypes)
        # lists of several dtypes: conflicts are decided by a sum that is partly float32
        tolerance = max(tolerance, 1e-6) if name.endswith("_list") else tolerance
        atol = tolerance * max(1.0, _largest(y.nan_to_num()))
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=atol, equal_nan=True)


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


# --- the tests' own tools


def test_poisoned_memory_shows_an_unwritten_element() -> None:
    like = torch.ones(2, 3)
    for x in (
        torch.empty(3),
        torch.empty(3, dtype=torch.bfloat16),
        torch.empty_like(like),
        like.new_empty(4),
        torch.empty_strided((2, 2), (2, 1), dtype=torch.float64),
        torch.empty_like(like.to(torch.float16).expand(4, 2, 3)),
    ):
        assert torch.isnan(x).all()

    def forgets_the_last_column(weights: Tensor, grads: Tensor) -> Tensor:
        out = grads.new_empty(grads.shape[1:])
        out[:-1] = (weights @ grads)[:-1]
        return out

    grads = BankCase(3, 65).make()
    weights = torch.ones(3)
    bound = torch.full((65,), 1e3, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"1 of 65 elements are off; at \(64,\): got nan"):
        cases.assert_within(forgets_the_last_column(weights, grads), grads.double().sum(0), bound)
    cases.assert_within(combine(weights, grads), grads.double().sum(0), bound)


def test_poisoned_memory_reaches_the_extension() -> None:
    """What C++ allocates through torch is poisoned too: it is filled below Python."""
    assert torch.isnan(torch.ops.aten.empty_like.default(torch.ones(3))).all()
    assert torch.isnan(torch.ops.aten.new_empty.default(torch.ones(3), [5])).all()


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_layouts_hold_the_same_values(layout: str) -> None:
    x = cases.random_gradients(3, 5, torch.Generator().manual_seed(0))
    y = cases.LAYOUTS[layout](x)
    assert y.shape == x.shape
    if layout.startswith("expanded"):
        assert 0 in y.stride() and torch.equal(y[0, 0], x[0, 0])
    elif layout == "overlapping_rows":
        assert torch.equal(y[0, 1:], y[1, :-1])
    else:
        assert torch.equal(y, x)
        assert layout in ("contiguous", "misaligned") or y.stride() != x.stride()


def test_cases_have_their_features() -> None:
    made = {case.kind: case.make() for case in cases.LIST_CASES if case.num_tasks == 3}
    assert any(x is None for row in made["nones"] for x in row)
    assert all(row[0] is None for row in made["absent_parameter"])
    assert all(x is None for x in made["absent_task"][1])
    assert made["channels_last"][0][0].is_contiguous(memory_format=torch.channels_last)
    assert len({row[0].stride() for row in made["mixed_layouts"]}) == 3
    assert len({x.dtype for x in made["mixed_dtypes"][0]}) >= 3
    assert made["no_parameter"] == [[], [], []]
    assert made["scalars"][0][0].dim() == 0


def test_random_gradients_conflict() -> None:
    m = of_gradients.gram(cases.bank64(BankCase(8, 1024)))
    share = (m < 0).double().mean()
    assert 0.2 < share < 0.8
