"""What the task ops refuse: the exception, and what it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import Backend
from torch import Tensor

from fastmtl.ops import (
    task_batch_norm,
    task_conv2d,
    task_conv2d_weight_grad,
    task_linear,
    task_linear_weight_grad,
    task_plan,
    task_scale_shift,
)


@dataclass(frozen=True)
class Bad:
    """One argument changed in a call that is right otherwise."""

    name: str
    change: dict[str, Any]
    error: type[Exception]
    match: str

    def __str__(self) -> str:
        return self.name


def _v(*shape: int, **options: Any) -> Tensor:
    return torch.ones(*shape, **options)


META = {"device": "meta"}
INT, F64, BF16, COMPLEX = ({"dtype": d} for d in (torch.int64, torch.float64, torch.bfloat16, torch.complex64))

# the calls: x [4, 2, 5, 5] or [4, 2], T = 3, Cout = 6


def _conv_arguments() -> dict[str, Any]:
    return {
        "x": _v(4, 2, 5, 5),
        "weight": _v(6, 2, 3, 3),
        "delta": [_v(6, 2, 3, 3), None, _v(6, 2, 3, 3)],
        "task_ids": torch.tensor([0, 2, 1, 0]),
        "gate": _v(3),
        "bias": _v(3, 6),
    }


def _linear_arguments() -> dict[str, Any]:
    return {
        "x": _v(4, 5, 2),
        "weight": _v(6, 2),
        "delta": [_v(6, 2), None, _v(6, 2)],
        "task_ids": torch.tensor([0, 2, 1, 0]),
        "gate": _v(3),
        "bias": _v(3, 6),
    }


def _ids_of(kind: str) -> list[Bad]:
    """What every op says of ids that don't fit its 4 samples and 3 tasks."""
    shapes = r"\[4\] or \[4, 5\]" if kind == "linear" else r"\[4\]"
    return [
        Bad("ids list", {"task_ids": [0, 1, 2, 0]}, TypeError, r"task_ids: expected an int64 .*TaskPlan, got list"),
        Bad("ids none", {"task_ids": None}, TypeError, r"task_ids: expected an int64 .*, got NoneType"),
        Bad("ids float", {"task_ids": _v(4)}, TypeError, r"task_ids: expected int64 or int32, got torch.float32"),
        Bad("ids int16", {"task_ids": _v(4).short()}, TypeError, r"task_ids: .*got torch.int16"),
        Bad("ids bool", {"task_ids": _v(4).bool()}, TypeError, r"task_ids: .*got torch.bool"),
        Bad("ids short", {"task_ids": torch.tensor([0, 1])}, ValueError, rf"task_ids: expected shape {shapes}.*\[2\]"),
        Bad("ids long", {"task_ids": torch.zeros(5).long()}, ValueError, rf"task_ids: expected shape {shapes}.*\[5\]"),
        Bad("ids 0-d", {"task_ids": torch.tensor(1)}, ValueError, rf"task_ids: expected shape {shapes}.*got \[\]"),
        Bad("ids 2-d", {"task_ids": torch.zeros(4, 1).long()}, ValueError, rf"task_ids: .*{shapes}.*got \[4, 1\]"),
        Bad("ids meta", {"task_ids": torch.zeros(4, **META).long()}, ValueError, r"task_ids: .*cpu as x, got meta"),
        Bad("ids large", {"task_ids": torch.tensor([0, 1, 3, 0])}, ValueError, r"ids from 0 to 2, got 3"),
        Bad("ids less", {"task_ids": torch.tensor([0, -1, 7, 0]).int()}, ValueError, r"ids from 0 to 2, got -1"),
        Bad(
            "plan T", {"task_ids": task_plan(torch.zeros(4).long(), 2)}, ValueError, r"a plan of 3 tasks, got one of 2"
        ),
        Bad("plan N", {"task_ids": task_plan(torch.zeros(3).long(), 3)}, ValueError, rf"task_ids: .*{shapes}.*\[3\]"),
    ]


def _x_of(dims: str) -> list[Bad]:
    return [
        Bad("x list", {"x": [1.0]}, TypeError, r"x: expected a tensor, got list"),
        Bad("x none", {"x": None}, TypeError, r"x: expected a tensor, got NoneType"),
        Bad("x int", {"x": _v(4, 2, 5, 5, **INT)}, TypeError, r"x: expected float64, .*got torch.int64"),
        Bad("x complex", {"x": _v(4, 2, 5, 5, **COMPLEX)}, TypeError, r"x: expected float64, .*complex64"),
        Bad("x sparse", {"x": _v(4, 2).to_sparse()}, TypeError, r"x: expected a dense .*layout torch.sparse_coo"),
        Bad("x 1-d", {"x": _v(4)}, ValueError, rf"x: expected shape {dims}, got \[4\]"),
    ]


def _weights_of(shape: tuple[int, ...], names: str) -> list[Bad]:
    """What convolution and linear layer say of weights."""
    one = "[" + ", ".join(map(str, shape)) + "]"
    escaped = one.replace("[", r"\[").replace("]", r"\]")
    less = (5, *shape[1:])

    def w(**options: Any) -> Tensor:
        return _v(*shape, **options)

    def stack(count: int, **options: Any) -> Tensor:
        return _v(count, *shape, **options)

    return [
        Bad("nothing", {"weight": None, "delta": None}, ValueError, r"weight, delta: expected a weight or the"),
        Bad("weight kind", {"weight": 3.0}, TypeError, r"weight: expected a tensor, got float"),
        Bad("weight int", {"weight": w(**INT)}, TypeError, r"weight: expected float64.*got torch.int64"),
        Bad("weight dims", {"weight": w()[0]}, ValueError, rf"weight: expected shape {names}"),
        Bad("weight dtype", {"weight": w(**F64)}, TypeError, r"weight: expected torch.float32 beside x .*float64"),
        Bad("weight narrow", {"weight": w(**BF16)}, TypeError, r"weight: expected torch.float32 .*got torch.bfloat16"),
        Bad("weight meta", {"weight": w(**META)}, ValueError, r"weight: expected device cpu as x, got meta"),
        Bad("delta number", {"delta": 1.0}, TypeError, r"delta: expected a \[T, ...\] tensor, a list .*got float"),
        Bad("delta dict", {"delta": {0: w()}}, TypeError, r"delta: expected a .*got dict"),
        Bad("delta string", {"delta": "abc"}, TypeError, r"delta: expected a .*got str"),
        Bad("delta generator", {"delta": (w() for _ in "abc")}, TypeError, r"delta: expected a .*got generator"),
        Bad("delta entry", {"delta": [w(), 2.0, None]}, TypeError, r"delta\[1\]: expected a tensor or None, got float"),
        Bad("delta dims", {"delta": [None, w()[0], None]}, ValueError, rf"delta\[1\]: expected shape {names}"),
        Bad(
            "delta shape",
            {"delta": [w(), None, _v(*less)]},
            ValueError,
            rf"delta\[2\]: expected shape {escaped}, got \[5",
        ),
        Bad("delta dtype", {"delta": [w(), None, w(**F64)]}, TypeError, r"delta\[2\]: expected torch.float32.*float64"),
        Bad("delta int", {"delta": [w(**INT), None, None]}, TypeError, r"delta\[0\]: .*got torch.int64"),
        Bad("delta meta", {"delta": [w(), None, w(**META)]}, ValueError, r"delta\[2\]: expected device cpu .*got meta"),
        Bad("delta sparse", {"delta": [w().to_sparse(), None, None]}, TypeError, r"delta\[0\]: .*sparse_coo"),
        Bad("delta as weight", {"delta": w()}, ValueError, r"delta: expected shape \[T, Cout, Cin"),
        Bad("stack shape", {"delta": _v(3, *less)}, ValueError, r"delta: expected shape \[3, 6, 2"),
        Bad("stack dtype", {"delta": stack(3, **F64)}, TypeError, r"delta: expected torch.float32 .*got torch.float64"),
        Bad("stack meta", {"delta": stack(3, **META)}, ValueError, r"delta: expected device cpu as x, got meta"),
        Bad("stack int", {"delta": stack(3, **INT)}, TypeError, r"delta: expected float64.*got torch.int64"),
        Bad("no task", {"weight": None, "delta": []}, ValueError, r"weight, delta: .* of at least one task, got none"),
        Bad("none alone", {"weight": None, "delta": [None] * 3}, ValueError, r"weight, delta: .*one task, got none"),
        Bad("gate kind", {"gate": [1.0, 0.0, 1.0]}, TypeError, r"gate: expected a tensor, got list"),
        Bad("gate bool", {"gate": _v(3).bool()}, TypeError, r"gate: expected float64.*got torch.bool"),
        Bad("gate dims", {"gate": _v(3, 1)}, ValueError, r"gate: expected shape \[T\], got \[3, 1\]"),
        Bad("gate dtype", {"gate": _v(3, **F64)}, TypeError, r"gate: expected torch.float32 .*got torch.float64"),
        Bad("gate meta", {"gate": _v(3, **META)}, ValueError, r"gate: expected device cpu as x, got meta"),
        Bad("bias kind", {"bias": 1.0}, TypeError, r"bias: expected a tensor, got float"),
        Bad("bias short", {"bias": _v(5)}, ValueError, r"bias: expected shape \[6\] or \[T, 6\], got \[5\]"),
        Bad("bias dims", {"bias": _v(1, 3, 6)}, ValueError, r"bias: expected shape \[6\] or \[T, 6\], got \[1, 3, 6\]"),
        Bad("bias dtype", {"bias": _v(6, **F64)}, TypeError, r"bias: expected torch.float32 .*got torch.float64"),
        Bad("bias meta", {"bias": _v(6, **META)}, ValueError, r"bias: expected device cpu as x, got meta"),
        Bad("T of gate", {"gate": _v(4)}, ValueError, r"gate: expected 3 tasks as in delta, got 4"),
        Bad("T of bias", {"bias": _v(2, 6)}, ValueError, r"bias: expected 3 tasks as in delta, got 2"),
        Bad("T of stack", {"delta": stack(4)}, ValueError, r"gate: expected 4 tasks as in delta, got 3"),
        Bad(
            "T of bias alone",
            {"delta": None, "bias": _v(2, 6)},
            ValueError,
            r"bias: expected 3 tasks as in gate, got 2",
        ),
        Bad("T = 0", {"delta": stack(0), "gate": None, "bias": None}, ValueError, r"delta: expected at least one task"),
        Bad(
            "T = 0 gate", {"delta": None, "gate": _v(0), "bias": None}, ValueError, r"gate: expected at least one task"
        ),
    ]


CONV = [
    *_x_of(r"\[N, Cin, H, W\]"),
    *_ids_of("conv"),
    *_weights_of((6, 2, 3, 3), r"\[Cout, Cin / groups, kh, kw\]"),
    Bad("x 3-d", {"x": _v(2, 5, 5)}, ValueError, r"x: expected shape \[N, Cin, H, W\], got \[2, 5, 5\]"),
    Bad("channels", {"x": _v(4, 3, 5, 5)}, ValueError, r"x: expected 2 channels \(2 x 1 groups, .*\), got 3"),
    Bad("group channels", {"groups": 2}, ValueError, r"x: expected 4 channels \(2 x 2 groups, .*\), got 2"),
    Bad("groups", {"groups": 4}, ValueError, r"groups: expected a divisor of Cout = 6, got 4"),
    Bad("groups 0", {"groups": 0}, ValueError, r"groups: expected at least 1, got 0"),
    Bad("groups kind", {"groups": 1.0}, TypeError, r"groups: expected an int, got float"),
    Bad("groups bool", {"groups": True}, TypeError, r"groups: expected an int, got bool"),
    Bad(
        "too small", {"x": _v(4, 2, 2, 5)}, ValueError, r"x: expected at least \[3, 3\] pixels after padding.*\[2, 5\]"
    ),
    Bad("dilated", {"dilation": (1, 3)}, ValueError, r"x: expected at least \[3, 7\] pixels .*got \[5, 5\]"),
    Bad("stride 0", {"stride": 0}, ValueError, r"stride: expected at least 1, got 0"),
    Bad("stride less", {"stride": (1, -1)}, ValueError, r"stride: expected at least 1, got \(1, -1\)"),
    Bad(
        "stride three", {"stride": (1, 1, 1)}, TypeError, r"stride: expected an int or a pair of ints, got \(1, 1, 1\)"
    ),
    Bad("stride float", {"stride": 1.5}, TypeError, r"stride: expected an int or a pair of ints, got 1.5"),
    Bad("stride none", {"stride": None}, TypeError, r"stride: expected an int or a pair of ints, got None"),
    Bad("padding less", {"padding": -1}, ValueError, r"padding: expected at least 0, got -1"),
    Bad(
        "padding float", {"padding": (0.5, 1)}, TypeError, r"padding: expected an int or a pair of ints, got \(0.5, 1\)"
    ),
    Bad("padding word", {"padding": "full"}, ValueError, r"padding: expected ints, 'same' or 'valid', got 'full'"),
    Bad("same", {"padding": "same", "stride": 2}, ValueError, r"padding: 'same' needs stride 1, got stride 2"),
    Bad("dilation 0", {"dilation": (0, 1)}, ValueError, r"dilation: expected at least 1, got \(0, 1\)"),
    Bad("dilation kind", {"dilation": "2"}, TypeError, r"dilation: expected an int or a pair of ints, got '2'"),
    Bad(
        "no filter",
        {"weight": _v(6, 2, 0, 3), "delta": None},
        ValueError,
        r"weight: expected a filter of at least 1 x 1, got \[0, 3\]",
    ),
]
LINEAR = [
    *_x_of(r"\[N, ..., Cin\]"),
    *_ids_of("linear"),
    *_weights_of((6, 2), r"\[Cout, Cin\]"),
    Bad("columns", {"x": _v(4, 5, 3)}, ValueError, r"x: expected 2 columns as the weights, got 3"),
    Bad("packed", {"task_ids": torch.zeros(4, 6).long()}, ValueError, r"expected shape \[4\] or \[4, 5\].*\[4, 6\]"),
    Bad("all of x", {"task_ids": torch.zeros(4, 5, 2).long()}, ValueError, r"expected shape \[4\] or \[4, 5\], as x"),
]


def assert_refused(call: Callable[..., Any], arguments: dict[str, Any], bad: Bad) -> None:
    with pytest.raises(bad.error, match=bad.match):
        call(**{**arguments, **bad.change})


def test_the_calls_are_right_otherwise(backend: Backend) -> None:
    """Every refusal below is because of what was changed."""
    assert task_conv2d(**_conv_arguments()).shape == (4, 6, 3, 3)
    assert task_linear(**_linear_arguments()).shape == (4, 5, 6)
    assert task_scale_shift(**_scale_arguments()).shape == (4, 2, 5)
    assert task_batch_norm(**_norm_arguments()).shape == (4, 2, 5)
    assert task_conv2d_weight_grad(**_conv_grad_arguments()).shape == (3, 6, 2, 3, 3)
    assert task_linear_weight_grad(**_linear_grad_arguments()).shape == (3, 6, 2)


@pytest.mark.parametrize("bad", CONV, ids=str)
def test_conv2d(bad: Bad, backend: Backend) -> None:
    assert_refused(task_conv2d, _conv_arguments(), bad)


@pytest.mark.parametrize("bad", LINEAR, ids=str)
def test_linear(bad: Bad, backend: Backend) -> None:
    assert_refused(task_linear, _linear_arguments(), bad)


def test_wide_weights_beside_narrow_x_only(backend: Backend) -> None:
    """float32 beside 16 bits is legal, float64 is not, nor is the other 16-bit dtype; all weights are of one dtype."""
    arguments = _linear_arguments() | {"gate": None, "bias": None}
    x = arguments["x"].bfloat16()
    assert task_linear(**{**arguments, "x": x}).dtype == torch.bfloat16
    for dtype in (torch.float64, torch.float16):
        with pytest.raises(TypeError, match=r"weight: expected torch.bfloat16 or torch.float32 beside x"):
            task_linear(**{**arguments, "x": x, "weight": arguments["weight"].to(dtype)})
    with pytest.raises(TypeError, match=r"delta\[0\]: expected torch.bfloat16 as the other weights, got torch.float32"):
        task_linear(**{**arguments, "x": x, "weight": arguments["weight"].bfloat16()})


# --- scale and shift


def _scale_arguments() -> dict[str, Any]:
    return {"x": _v(4, 2, 5), "scale": _v(3, 2), "shift": _v(3, 2), "task_ids": torch.tensor([0, 2, 1, 0])}


SCALE = [
    *_x_of(r"\[N, C, ...\]"),
    *_ids_of("scale"),
    *(
        bad
        for name in ("scale", "shift")
        for bad in (
            Bad(f"{name} kind", {name: 1.0}, TypeError, rf"{name}: expected a tensor, got float"),
            Bad(f"{name} none", {name: None}, TypeError, rf"{name}: expected a tensor, got NoneType"),
            Bad(f"{name} int", {name: _v(3, 2, **INT)}, TypeError, rf"{name}: expected float64.*got torch.int64"),
            Bad(f"{name} dtype", {name: _v(3, 2, **F64)}, TypeError, rf"{name}: expected torch.float32.*float64"),
            Bad(f"{name} meta", {name: _v(3, 2, **META)}, ValueError, rf"{name}: expected device cpu as x, got meta"),
            Bad(f"{name} dims", {name: _v(2)}, ValueError, rf"{name}: expected shape \[T, 2\], got \[2\]"),
            Bad(f"{name} channels", {name: _v(3, 5)}, ValueError, rf"{name}: expected shape \[T, 2\], got \[3, 5\]"),
        )
    ),
    Bad("T", {"shift": _v(4, 2)}, ValueError, r"shift: expected 3 tasks as in scale, got 4"),
    Bad("T = 0", {"scale": _v(0, 2), "shift": _v(0, 2)}, ValueError, r"scale: expected at least one task, got 0"),
]


@pytest.mark.parametrize("bad", SCALE, ids=str)
def test_scale_shift(bad: Bad, backend: Backend) -> None:
    assert_refused(task_scale_shift, _scale_arguments(), bad)


# --- batch norm


def _norm_arguments() -> dict[str, Any]:
    return {
        "x": _v(4, 2, 5),
        "task_ids": torch.tensor([0, 2, 1, 0]),
        "weight": [_v(2)] * 3,
        "bias": _v(3, 2),
        "running_mean": [torch.zeros(2) for _ in range(3)],
        "running_var": _v(3, 2),
        "num_batches_tracked": torch.zeros(3).long(),
        "training": True,
    }


_NO_TABLES = dict.fromkeys(("weight", "bias", "running_mean", "running_var", "num_batches_tracked"))
_COUNTS = "num_batches_tracked"
NORM = [
    *_x_of(r"\[N, C, ...\]"),
    *_ids_of("norm"),
    *(
        bad
        for name, one in (("weight", r"\[2\] or "), ("bias", r"\[2\] or "), ("running_mean", ""), ("running_var", ""))
        for bad in (
            Bad(f"{name} kind", {name: 1.0}, TypeError, rf"{name}: expected a tensor, a list of T .*got float"),
            Bad(
                f"{name} item", {name: [_v(2), None, _v(2)]}, TypeError, rf"{name}\[1\]: expected a tensor, got NoneTy"
            ),
            Bad(f"{name} empty", {name: []}, ValueError, rf"{name}: expected at least one task, got 0"),
            Bad(f"{name} int", {name: _v(3, 2, **INT)}, TypeError, rf"{name}: expected float64.*got torch.int64"),
            Bad(f"{name} dtype", {name: _v(3, 2, **F64)}, TypeError, rf"{name}: expected torch.float32.*float64"),
            Bad(f"{name} meta", {name: _v(3, 2, **META)}, ValueError, rf"{name}: expected device cpu as x, got meta"),
            Bad(
                f"{name} dims",
                {name: _v(3, 1, 2)},
                ValueError,
                rf"{name}: expected shape {one}\[T, 2\], got \[3, 1, 2\]",
            ),
            Bad(f"{name} wide", {name: _v(3, 5)}, ValueError, rf"{name}: expected shape {one}\[T, 2\], got \[3, 5\]"),
            Bad(
                f"{name} row",
                {name: [_v(2), _v(2), _v(3)]},
                ValueError,
                rf"{name}\[2\]: expected shape \[2\], got \[3\]",
            ),
        )
    ),
    Bad("mean of all", {"running_mean": _v(2)}, ValueError, r"running_mean: expected shape \[T, 2\], got \[2\]"),
    Bad("T", {"bias": _v(4, 2)}, ValueError, r"bias: expected 3 tasks as in weight, got 4"),
    Bad("T list", {"running_mean": [_v(2)] * 2}, ValueError, r"running_mean: expected 3 tasks as in weight, got 2"),
    Bad("T counts", {_COUNTS: torch.zeros(2).long()}, ValueError, rf"{_COUNTS}: expected 3 tasks as in weight, got 2"),
    Bad("counts float", {_COUNTS: _v(3)}, TypeError, rf"{_COUNTS}: expected int64, got torch.float32"),
    Bad("counts dims", {_COUNTS: _v(3, 1, **INT)}, ValueError, rf"{_COUNTS}: expected shape \[T\], got \[3, 1\]"),
    Bad("counts item", {_COUNTS: [_v(1, **INT)] * 3}, ValueError, rf"{_COUNTS}\[0\]: expected shape \[\], got \[1\]"),
    Bad("counts meta", {_COUNTS: _v(3, **INT, **META)}, ValueError, rf"{_COUNTS}: expected device cpu as x, got meta"),
    Bad(
        "mean alone", {"running_var": None}, ValueError, r"running_var: expected statistics beside running_mean, got No"
    ),
    Bad(
        "var alone", {"running_mean": None}, ValueError, r"running_mean: expected statistics beside running_var, got No"
    ),
    Bad(
        "counts alone",
        {"running_mean": None, "running_var": None},
        ValueError,
        rf"{_COUNTS}: expected None, since there are no running statistics, got counts",
    ),
    Bad(
        "eval of nothing",
        {"training": False, "running_mean": None, "running_var": None, _COUNTS: None},
        ValueError,
        r"running_mean, running_var: expected statistics, since training is False, got None",
    ),
    Bad("average", {"momentum": None, _COUNTS: None}, ValueError, rf"{_COUNTS}: expected the batches seen .*got None"),
    Bad("momentum", {"momentum": "0.1"}, TypeError, r"momentum: expected a number or None, got str"),
    Bad("momentum bool", {"momentum": True}, TypeError, r"momentum: expected a number or None, got bool"),
    Bad("momentum inf", {"momentum": float("inf")}, ValueError, r"momentum: expected a finite number, got inf"),
    Bad("eps", {"eps": None}, TypeError, r"eps: expected a number, got NoneType"),
    Bad("eps 0", {"eps": 0.0}, ValueError, r"eps: expected a positive number in training, got 0.0"),
    Bad("eps less", {"eps": -1.0, "training": False}, ValueError, r"eps: expected a finite number that is .*got -1.0"),
    Bad("eps nan", {"eps": float("nan")}, ValueError, r"eps: expected a positive number in training, got nan"),
    Bad("training", {"training": 1}, TypeError, r"training: expected a bool, got int"),
    Bad("no T", _NO_TABLES, ValueError, r"task_ids: expected a TaskPlan, since no other argument tells the number of"),
    Bad("one value", {"x": _v(4, 2)}, ValueError, r"x: expected more than 1 value per channel of each.*1 for task 1"),
]


@pytest.mark.parametrize("bad", NORM, ids=str)
def test_batch_norm(bad: Bad, backend: Backend) -> None:
    arguments = _norm_arguments()
    assert_refused(task_batch_norm, arguments, bad)
    kept = arguments["running_mean"], arguments["running_var"], arguments["num_batches_tracked"]
    assert not any(m.any() for m in kept[0]) and bool((kept[1] == 1).all()) and not kept[2].any()


# --- weight gradients


def _conv_grad_arguments() -> dict[str, Any]:
    ids = torch.tensor([0, 2, 1, 0])
    return {"x": _v(4, 2, 5, 5), "grad_out": _v(4, 6, 3, 3), "task_ids": ids, "num_tasks": 3, "kernel_size": 3}


def _linear_grad_arguments() -> dict[str, Any]:
    return {"x": _v(4, 5, 2), "grad_out": _v(4, 5, 6), "task_ids": torch.tensor([0, 2, 1, 0]), "num_tasks": 3}


_OF_GRADIENTS = [
    Bad("grad kind", {"grad_out": 1.0}, TypeError, r"grad_out: expected a tensor, got float"),
    Bad("grad none", {"grad_out": None}, TypeError, r"grad_out: expected a tensor, got NoneType"),
    Bad("grad dtype", {"grad_out": _v(4, 6, 3, 3, **F64)}, TypeError, r"grad_out: expected torch.float32 as x"),
    Bad("grad meta", {"grad_out": _v(4, 6, 3, 3, **META)}, ValueError, r"grad_out: expected device cpu as x, got meta"),
    Bad("num_tasks kind", {"num_tasks": 3.0}, TypeError, r"num_tasks: expected an int, got float"),
    Bad("num_tasks 0", {"num_tasks": 0}, ValueError, r"num_tasks: expected at least 1, got 0"),
    Bad("num_tasks less", {"num_tasks": 2}, ValueError, r"task_ids: expected ids from 0 to 1, got 2"),
    Bad(
        "dtype kind", {"dtype": "float32"}, TypeError, r"dtype: expected a floating-point dtype or None, got 'float32'"
    ),
    Bad("dtype int", {"dtype": torch.int64}, TypeError, r"dtype: expected a floating-point dtype.*got torch.int64"),
]
CONV_GRAD = [
    *_x_of(r"\[N, Cin, H, W\]"),
    *_ids_of("conv"),
    *_OF_GRADIENTS,
    Bad("grad dims", {"grad_out": _v(4, 6)}, ValueError, r"grad_out: expected shape \[N, Cout, Ho, Wo\], got \[4, 6\]"),
    Bad("grad size", {"grad_out": _v(4, 6, 3, 4)}, ValueError, r"grad_out: expected shape \[4, 6, 3, 3\], got"),
    Bad("grad samples", {"grad_out": _v(3, 6, 3, 3)}, ValueError, r"grad_out: expected shape \[4, 6, 3, 3\], got"),
    Bad("groups", {"groups": 3}, ValueError, r"groups: expected a divisor of Cin = 2 and Cout = 6, got 3"),
    Bad("groups 0", {"groups": 0}, ValueError, r"groups: expected at least 1, got 0"),
    Bad("stride", {"stride": 0}, ValueError, r"stride: expected at least 1, got 0"),
    Bad("padding", {"padding": "full"}, ValueError, r"padding: expected ints, 'same' or 'valid', got 'full'"),
    Bad("kernel 0", {"kernel_size": 0}, ValueError, r"kernel_size: expected at least 1, got 0"),
    Bad("kernel kind", {"kernel_size": (3, 3, 3)}, TypeError, r"kernel_size: expected an int or a pair of ints"),
    Bad("kernel large", {"kernel_size": 6}, ValueError, r"x: expected at least \[6, 6\] pixels after padding"),
    Bad(
        "dtype of out", {"out": _v(3, 6, 2, 3, 3), "dtype": torch.float64}, ValueError, r"dtype: expected torch.float32"
    ),
]
LINEAR_GRAD = [
    *_x_of(r"\[N, ..., Cin\]"),
    *_ids_of("linear"),
    *_OF_GRADIENTS,
    Bad(
        "grad rows", {"grad_out": _v(4, 4, 6)}, ValueError, r"grad_out: expected shape \[4, 5, Cout\], got \[4, 4, 6\]"
    ),
    Bad("grad dims", {"grad_out": _v(4, 6)}, ValueError, r"grad_out: expected shape \[4, 5, Cout\], got \[4, 6\]"),
    Bad(
        "dtype of out",
        {"out": _v(3, 6, 2), "dtype": torch.float64},
        ValueError,
        r"dtype: expected torch.float32 as out",
    ),
]


@pytest.mark.parametrize("bad", CONV_GRAD, ids=str)
def test_conv2d_weight_grad(bad: Bad, backend: Backend) -> None:
    assert_refused(task_conv2d_weight_grad, _conv_grad_arguments(), bad)


@pytest.mark.parametrize("bad", LINEAR_GRAD, ids=str)
def test_linear_weight_grad(bad: Bad, backend: Backend) -> None:
    assert_refused(task_linear_weight_grad, _linear_grad_arguments(), bad)


_OUT_SHAPES = {"conv": (3, 6, 2, 3, 3), "linear": (3, 6, 2)}


@pytest.mark.parametrize("kind", _OUT_SHAPES)
def test_nothing_is_written_before_an_error(kind: str, backend: Backend) -> None:
    """`out` keeps its values under every refusal."""
    conv = kind == "conv"
    call = task_conv2d_weight_grad if conv else task_linear_weight_grad
    arguments = _conv_grad_arguments() if conv else _linear_grad_arguments()
    for bad in CONV_GRAD if conv else LINEAR_GRAD:
        if "dtype" in bad.change:
            continue
        out = torch.full(_OUT_SHAPES[kind], 7.0)
        assert_refused(call, {**arguments, "out": out}, bad)
        assert torch.equal(out, torch.full_like(out, 7.0)), bad.name


def test_a_filter_without_input_channels() -> None:
    with pytest.raises(ValueError, match="weight: expected at least one input channel, got none"):
        task_conv2d(torch.empty(2, 0, 3, 3), torch.empty(4, 0, 1, 1), None, torch.tensor([0, 0]))
