"""The table of the per-task ops' tests: layers by geometry, tasks, dtype and layout; oracle, tolerances, samples.

As in `cases.py`: inputs are rounded to the dtype under test, then upcast and given to the oracles.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from cases import assert_within, generator_of, short, unit_roundoff
from torch import Tensor

from fastmtl.core.task_weights import TaskConvCall
from fastmtl.ops import task_conv2d, task_linear
from fastmtl.ops.task_weights import reference
from fastmtl.ops.task_weights.arguments import read_geometry

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = (F64, F32, BF16, F16)
# of x and of the weights
DTYPE_PAIRS = ((F64, F64), (F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32))

# relative to the same expression on absolute values, on top of one rounding of the result to its dtype. In 16 bits
# `W + s Delta`, the bias and each task's weight gradient are rounded once to the dtype of x, one unit roundoff, or not
# at all on a CPU that lacks its arithmetic (`widen`).
TASK_TOLERANCE = {F64: 1e-14, F32: 2e-6, BF16: 2.0**-8, F16: 2.0**-11}
# the least number of a dtype below which a result is rounded by half of that
SMALLEST = {F64: 0.0, F32: 1e-38, BF16: 1e-38, F16: 2.0**-24}


# --- task ids


def make_ids(kind: str, shape: Sequence[int], num_tasks: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Ids of a batch. `absent`: tasks 1 and the last have no sample; `runs`: equal ids side by side, tasks repeated."""
    n = math.prod(shape)
    random = torch.randint(num_tasks, (n,), generator=generator_of((kind, n, num_tasks)))
    ids = {
        "random": lambda: random,
        "sorted": lambda: random.sort().values,
        "reversed": lambda: random.sort(descending=True).values,
        "runs": lambda: (torch.arange(n) // 2) % num_tasks,
        "turns": lambda: torch.arange(n) % num_tasks,
        "one": lambda: torch.full((n,), num_tasks - 1),
        "absent": lambda: torch.where((random == 1) | (random == num_tasks - 1), 0, random),
        "strided": lambda: torch.stack([random, torch.full((n,), -1)], 1)[:, 0],
    }[kind]()
    return ids.to(dtype).reshape(shape) if kind != "strided" else ids.reshape(shape)


# --- memory: each stores the values of `x` in other strides; what lies between them is NaN


def _sliced(x: Tensor) -> Tensor:
    wide = x.new_full((x.shape[0] + 1, *x.shape[1:-1], x.shape[-1] + 3), torch.nan)
    return wide[1:, ..., 2 : 2 + x.shape[-1]].copy_(x)


def _channels_last_sliced(x: Tensor) -> Tensor:
    wide = x.new_full((x.shape[0], x.shape[1] + 3, *x.shape[2:]), torch.nan)
    return wide.contiguous(memory_format=torch.channels_last)[:, 2 : 2 + x.shape[1]].copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.clone(memory_format=torch.contiguous_format),
    "channels_last": lambda x: x.clone(memory_format=torch.channels_last),
    "channels_last_sliced": _channels_last_sliced,
    "sliced": _sliced,
    "transposed": lambda x: x.mT.contiguous().mT,
    "batch_inside": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "expanded_batch": lambda x: x[:1].clone().expand(x.shape),
    "expanded": lambda x: x[tuple(slice(0, 1) for _ in x.shape)].clone().expand(x.shape) if x.numel() else x.clone(),
}
X_LAYOUTS = tuple(LAYOUTS)
LINEAR_LAYOUTS = ("contiguous", "sliced", "transposed", "batch_inside", "expanded_batch", "expanded")


# --- cases


@dataclass
class Made:
    """The arguments of one call, and the gradient of its result."""

    x: Tensor
    weight: Tensor | None
    delta: Tensor | list[Tensor | None] | None
    gate: Tensor | None
    bias: Tensor | None
    task_ids: Tensor
    grad_out: Tensor

    def named(self) -> dict[str, Tensor]:
        """The differentiable arguments, in the order in which a backward op returns their gradients."""
        found = {"x": self.x, "weight": self.weight}
        if isinstance(self.delta, list):
            found |= {f"delta[{t}]": d for t, d in enumerate(self.delta)}
        else:
            found["delta"] = self.delta
        found |= {"gate": self.gate, "bias": self.bias}
        return {name: x for name, x in found.items() if x is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> Made:
        """The same with another tensor for each floating-point one."""

        def apply(x: Any) -> Any:
            if isinstance(x, list):
                return [apply(y) for y in x]
            return x if x is None else function(x)

        made = {f.name: apply(getattr(self, f.name)) for f in fields(self) if f.name != "task_ids"}
        return Made(task_ids=self.task_ids, **made)

    def leaves(self) -> Made:
        return self.map(lambda x: x.detach().requires_grad_())

    def double(self) -> Made:
        return self.map(lambda x: x.detach().double())


@dataclass(frozen=True)
class TaskCase:
    """What convolutions and linear layers share."""

    num_tasks: int = 3
    ids: str = "random"
    ids_dtype: torch.dtype = torch.int64
    delta: str | None = "list"
    gate: str | None = None
    bias: str | None = None
    shared: bool = True  # whether there is a weight
    dtype: torch.dtype = F32
    weight_dtype: torch.dtype | None = None  # of weight, delta, gate and bias; None: that of x
    x_layout: str = "contiguous"
    weight_layout: str = "contiguous"
    grad_layout: str = "contiguous"

    def __str__(self) -> str:
        parts = []
        for f in fields(self):
            value = getattr(self, f.name)
            if value != f.default:
                parts.append(f"{f.name}={short(value) if isinstance(value, torch.dtype) else value}".replace(" ", ""))
        return "-".join(parts) or "plain"

    def but(self, **changes: Any) -> TaskCase:
        return replace(self, **changes)

    # of one weight
    @property
    def weight_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def x_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def ids_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def out_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def run(self, made: Made, task_ids: Any = None) -> Tensor:
        raise NotImplementedError

    def reference(self, made: Made) -> tuple[Tensor, dict[str, Tensor]]:
        """Result and gradients by the reference functions, in the dtypes of `made`."""
        raise NotImplementedError

    def _weight_layout(self, t: int = 0) -> Callable[[Tensor], Tensor]:
        name = self.weight_layout
        if name == "mixed":
            name = ("contiguous", "channels_last", "transposed")[t % 3]
        if name == "channels_last" and len(self.weight_shape) != 4:
            name = "transposed"
        return LAYOUTS[name]

    def _make_delta(self, draw: Callable[..., Tensor]) -> Tensor | list[Tensor | None] | None:
        stack = draw(self.num_tasks, *self.weight_shape)
        if self.delta is None:
            return None
        if self.delta == "stacked":
            return stack
        if self.delta == "stacked_sliced":
            return _sliced(stack)
        if self.delta == "stacked_permuted":
            # the order of a channels_last parameter, or a transposed matrix, task by task
            return stack.movedim(2, -1).contiguous().movedim(-1, 2)
        assert self.delta in ("list", "nones", "all_none")
        keep = {"list": lambda t: True, "nones": lambda t: t % 3 != 1, "all_none": lambda t: False}[self.delta]
        return [self._weight_layout(t + 1)(stack[t]) if keep(t) else None for t in range(self.num_tasks)]

    def _make_gate(self, draw: Callable[..., Tensor]) -> Tensor | None:
        values = draw(self.num_tasks)
        zero = {None: [], "values": [], "zeros": range(0, self.num_tasks, 2), "closed": range(self.num_tasks)}
        values[list(zero[self.gate])] = 0.0
        return None if self.gate is None else values

    def make(self) -> Made:
        generator = generator_of((type(self).__name__, str(self)))
        narrow, wide = self.dtype, self.weight_dtype or self.dtype

        def draw(*shape: int, dtype: torch.dtype = wide, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator, dtype=F64) * scale).to(dtype)

        scale = 1 / math.sqrt(max(1, math.prod(self.weight_shape[1:])))
        weight = self._weight_layout()(draw(*self.weight_shape, scale=scale))
        num_out = self.weight_shape[0]
        return Made(
            x=LAYOUTS[self.x_layout](draw(*self.x_shape, dtype=narrow)),
            weight=weight if self.shared else None,
            delta=self._make_delta(functools.partial(draw, scale=scale)),
            gate=self._make_gate(draw),
            bias={None: None, "shared": draw(num_out), "per_task": draw(self.num_tasks, num_out)}[self.bias],
            task_ids=make_ids(self.ids, self.ids_shape, self.num_tasks, self.ids_dtype),
            grad_out=LAYOUTS[self.grad_layout](draw(*self.out_shape, dtype=narrow)),
        )


Pair = int | tuple[int, int]


@dataclass(frozen=True)
class ConvCase(TaskCase):
    n: int = 6
    cin: int = 3
    cout: int = 4
    size: tuple[int, int] = (5, 6)
    kernel: tuple[int, int] = (3, 3)
    stride: Pair = 1
    padding: Pair | str = 1
    dilation: Pair = 1
    groups: int = 1

    __str__ = TaskCase.__str__

    @property
    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("stride", "padding", "dilation", "groups")}

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.cout, self.cin // self.groups, *self.kernel)

    @property
    def x_shape(self) -> tuple[int, ...]:
        return (self.n, self.cin, *self.size)

    @property
    def ids_shape(self) -> tuple[int, ...]:
        return (self.n,)

    @functools.cached_property
    def out_shape(self) -> tuple[int, ...]:
        x, w = torch.empty(self.x_shape, device="meta"), torch.empty(self.weight_shape, device="meta")
        return tuple(F.conv2d(x, w, None, **self.options).shape)

    def run(self, made: Made, task_ids: Any = None) -> Tensor:
        ids = made.task_ids if task_ids is None else task_ids
        return task_conv2d(made.x, made.weight, made.delta, ids, gate=made.gate, bias=made.bias, **self.options)

    def op_arguments(self, made: Made) -> tuple[Any, ...]:
        """The arguments of `torch.ops.fastmtl.task_conv2d`; zeros for an uneven `"same"` are put after x."""
        geometry, extra = read_geometry(**self.options, kernel=self.kernel)
        x = F.pad(made.x, (0, extra[1], 0, extra[0])) if extra != (0, 0) else made.x
        lists = [list(v) if isinstance(v, tuple) else v for v in geometry]
        return (x, *weight_arguments(self, made), *lists)

    def reference(self, made: Made) -> tuple[Tensor, dict[str, Tensor]]:
        args = self.op_arguments(made)
        call = TaskConvCall.of(*args[1:])
        with torch.no_grad():
            y = reference.task_conv2d(args[0], call)
            found = reference.task_conv2d_backward(made.grad_out, args[0], call, [True] * 4, range(len(args[2])))
        grads = dict(zip(made.named(), found, strict=True))
        h, w = made.x.shape[2:]
        grads["x"] = grads["x"][:, :, :h, :w]
        return y, grads


@dataclass(frozen=True)
class LinearCase(TaskCase):
    leading: tuple[int, ...] = (7,)
    cin: int = 5
    cout: int = 4
    ids_dims: int = 1

    __str__ = TaskCase.__str__

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.cout, self.cin)

    @property
    def x_shape(self) -> tuple[int, ...]:
        return (*self.leading, self.cin)

    @property
    def ids_shape(self) -> tuple[int, ...]:
        return self.leading[: self.ids_dims]

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (*self.leading, self.cout)

    def run(self, made: Made, task_ids: Any = None) -> Tensor:
        ids = made.task_ids if task_ids is None else task_ids
        return task_linear(made.x, made.weight, made.delta, ids, gate=made.gate, bias=made.bias)

    def op_arguments(self, made: Made) -> tuple[Any, ...]:
        return (made.x, *weight_arguments(self, made))

    def reference(self, made: Made) -> tuple[Tensor, dict[str, Tensor]]:
        args = self.op_arguments(made)
        call = TaskConvCall.of(*args[1:])
        with torch.no_grad():
            y = reference.task_linear(args[0], call)
            found = reference.task_linear_backward(made.grad_out, args[0], call, [True] * 4, range(len(args[2])))
        return y, dict(zip(made.named(), found, strict=True))


def weight_arguments(case: TaskCase, made: Made) -> tuple[Any, ...]:
    """weight, delta, delta_tasks, gate, bias, order, offsets of an op."""
    delta, positions = [], []
    if isinstance(made.delta, list):
        positions = [t for t, d in enumerate(made.delta) if d is not None]
        delta = [made.delta[t] for t in positions]
    elif made.delta is not None:
        delta = [made.delta]
    return made.weight, delta, positions, made.gate, made.bias, *reference.task_plan(made.task_ids, case.num_tasks)


def present_tasks(case: TaskCase, made: Made) -> set[int]:
    return set(made.task_ids.flatten().tolist())


# --- expected


@dataclass
class Expected:
    """Result and gradients in float64, and each of them on absolute values."""

    y: Tensor
    grads: dict[str, Tensor]
    y_size: Tensor
    grad_sizes: dict[str, Tensor]


def expected_of(case: TaskCase, made: Made) -> Expected:
    double = made.double()
    return Expected(*case.reference(double), *case.reference(double.map(torch.abs)))


@functools.cache
def expected(case: TaskCase) -> Expected:
    return expected_of(case, case.make())


def bound(size: Tensor, exact: Tensor, tolerance: float, out_dtype: torch.dtype) -> Tensor:
    return tolerance * size + 1.001 * unit_roundoff(out_dtype) * exact.abs() + SMALLEST[out_dtype]


def assert_result(case: TaskCase, y: Tensor, want: Expected, tolerance: float | None = None) -> None:
    """Within `tolerance`, by default that of the dtype of x."""
    assert y.dtype == case.dtype
    assert_within(y, want.y, bound(want.y_size, want.y, tolerance or TASK_TOLERANCE[case.dtype], y.dtype))


def assert_gradients(
    case: TaskCase,
    made: Made,
    actual: dict[str, Tensor | None],
    want: Expected,
    tolerance: float | None = None,
) -> None:
    """Values and dtypes; None for a delta of a list whose task has no sample, and for nothing else."""
    tolerance = tolerance or TASK_TOLERANCE[case.dtype]
    present = present_tasks(case, made)
    for name, parameter in made.named().items():
        g = actual[name]
        absent = name.startswith("delta[") and int(name[6:-1]) not in present
        if absent:
            assert g is None, f"{name}: a task without samples got a gradient"
            continue
        assert g is not None, f"{name}: no gradient"
        assert g.dtype == parameter.dtype, name
        exact = want.grads[name]
        try:
            assert_within(g, exact, bound(want.grad_sizes[name], exact, tolerance, g.dtype))
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}: {error}") from error


def gradients(y: Tensor, made: Made, grad_out: Tensor | None = None, **options: Any) -> dict[str, Tensor | None]:
    """The gradients of `made.leaves()`, by name."""
    named = made.named()
    found = torch.autograd.grad(
        y, list(named.values()), made.grad_out.detach() if grad_out is None else grad_out, allow_unused=True, **options
    )
    return dict(zip(named, found, strict=True))


def memory_format_of(layout: str) -> torch.memory_format:
    return torch.channels_last if layout.startswith("channels_last") else torch.contiguous_format


def assert_dense(x: Tensor, name: str) -> None:
    reach = 1
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        assert stride == reach or x.numel() == 0, f"{name} has strides {x.stride()}"
        reach = stride * size


def assert_own_memory(results: dict[str, Tensor | None], inputs: dict[str, Tensor]) -> None:
    """No result shares its memory with an argument or with another result."""
    held = {x.untyped_storage().data_ptr(): name for name, x in inputs.items() if x.numel()}
    for name, x in results.items():
        if x is None or x.numel() == 0:
            continue
        other = held.setdefault(x.untyped_storage().data_ptr(), name)
        assert other == name, f"{name} lies in the memory of {other}"


# --- the table


def given(**options: Any) -> dict[str, Any]:
    return options


# every way in which a filter may move; sizes are odd on purpose
GEOMETRIES: dict[str, dict[str, Any]] = {
    "k1": given(kernel=(1, 1), padding=0),
    "k1_s2": given(kernel=(1, 1), padding=0, stride=2),
    "k1_p1": given(kernel=(1, 1), padding=1),
    "k1_g2": given(kernel=(1, 1), padding=0, groups=2, cin=4, cout=6),
    "k1_wide": given(kernel=(1, 1), padding=0, cin=33, cout=17, size=(7, 7)),
    "k3": {},
    "k3_wide": given(cin=16, cout=24, size=(9, 8)),
    "k3_s2": given(stride=2, size=(6, 7)),
    "k3_valid": given(padding="valid"),
    "k3_same": given(padding="same", dilation=(2, 1)),
    "k3_d2": given(dilation=2, padding=2),
    "k2": given(kernel=(2, 2), padding=0),
    "k2_same": given(kernel=(2, 2), padding="same"),
    "k4x3_same": given(kernel=(4, 3), padding="same", size=(7, 5)),
    "k3x2_s2x1": given(kernel=(3, 2), stride=(2, 1), padding=(1, 0)),
    "k1x5": given(kernel=(1, 5), padding=(0, 2)),
    "k5": given(kernel=(5, 5), padding=2, cin=2, size=(6, 5)),
    "k7_s2": given(kernel=(7, 7), stride=2, padding=3, size=(9, 10)),
    "all": given(kernel=(3, 2), stride=(2, 3), padding=(2, 1), dilation=(1, 2), groups=2, cin=4, cout=2, size=(7, 8)),
    "groups": given(groups=3, cin=6, cout=3),
    "depthwise": given(groups=4, cin=4, cout=4),
    "depthwise_x2": given(groups=3, cin=3, cout=6, stride=2),
    "cin1": given(cin=1),
    "cout1": given(cout=1),
    "one_pixel_out": given(padding=0, size=(3, 3)),
    "one_pixel_in": given(kernel=(1, 1), padding=0, size=(1, 1)),
    "one_pixel_k3": given(size=(1, 1)),
    # a sample alone is work enough
    "k1_large": given(kernel=(1, 1), padding=0, cin=32, cout=64, size=(28, 28), n=5),
    "k3_large": given(cin=16, cout=32, size=(32, 30), n=5),
}

# ways to say what a task sees; geometries take turns through them
TASKS: tuple[dict[str, Any], ...] = (
    given(delta="list", gate="zeros", bias="per_task", ids="random"),
    given(delta="stacked", gate="values", bias="shared", ids="sorted"),
    given(delta="nones", gate=None, bias=None, ids="runs", ids_dtype=torch.int32),
    given(delta="stacked", gate=None, bias="per_task", ids="absent", shared=False),
    given(delta="nones", gate="zeros", bias="shared", ids="reversed"),
    given(delta="list", gate=None, bias=None, ids="absent", num_tasks=5, shared=False),
    given(delta="list", gate="values", bias=None, ids="turns", num_tasks=2),
)
MEMORY = (
    given(x_layout="contiguous", weight_layout="contiguous"),
    given(x_layout="channels_last", weight_layout="channels_last", grad_layout="channels_last"),
    given(x_layout="channels_last", weight_layout="contiguous"),
    given(x_layout="contiguous", weight_layout="mixed", grad_layout="channels_last"),
    given(x_layout="sliced", weight_layout="channels_last", grad_layout="expanded"),
)


def _turns(i: int, j: int) -> dict[str, Any]:
    return {**TASKS[(i + j) % len(TASKS)], **MEMORY[(i + 2 * j) % len(MEMORY)]}


CONV_CASES = [
    ConvCase(**{**_turns(i, j), **geometry, "dtype": dtype, "weight_dtype": wide if wide != dtype else None})
    for i, geometry in enumerate(GEOMETRIES.values())
    for j, (dtype, wide) in enumerate(DTYPE_PAIRS)
]
# one thing changed at a time, on a 3x3, a 1x1 and a strided filter
_BASES = tuple(ConvCase(**GEOMETRIES[name]) for name in ("k3", "k1", "k3_s2"))
_CHANGES: list[dict[str, Any]] = [
    *(given(x_layout=layout, bias="shared") for layout in X_LAYOUTS[1:]),
    *(given(x_layout=layout, ids="sorted", gate="values", delta="stacked") for layout in X_LAYOUTS[1:]),
    *(given(grad_layout=layout) for layout in X_LAYOUTS[1:]),
    *(given(grad_layout=layout, x_layout="channels_last", ids="sorted") for layout in X_LAYOUTS),
    *(given(weight_layout=layout, delta="nones") for layout in ("channels_last", "transposed", "sliced", "mixed")),
    *(given(weight_layout="mixed", shared=shared, x_layout="channels_last") for shared in (True, False)),
    *(given(delta=delta, gate="zeros") for delta in ("stacked", "stacked_sliced", "stacked_permuted", "nones")),
    *(given(delta=delta, shared=False) for delta in ("stacked", "stacked_sliced", "stacked_permuted", "list", "nones")),
    *(given(delta=None, gate=gate, bias=bias) for gate in (None, "zeros") for bias in (None, "shared", "per_task")),
    *(given(delta="all_none", gate=gate, bias="per_task") for gate in (None, "values")),
    *(given(gate="closed", delta=delta, bias="per_task") for delta in ("list", "stacked", "nones")),
    *(
        given(gate="closed", delta=delta, shared=False, bias=bias)
        for delta, bias in (("list", None), ("stacked", None))
    ),
    *(given(gate="zeros", shared=False, bias=bias, ids="runs") for bias in (None, "shared", "per_task")),
    *(given(ids=ids, gate="zeros", num_tasks=4, n=8) for ids in ("sorted", "reversed", "runs", "turns", "one")),
    *(given(ids=ids, delta=delta, num_tasks=4) for ids in ("absent", "strided") for delta in ("stacked", "list")),
    *(given(num_tasks=t, n=9, ids="runs", gate="zeros", bias="per_task") for t in (1, 2, 7, 16, 17)),
    *(given(num_tasks=1, delta=delta, ids="sorted") for delta in ("stacked", "list", "nones")),
    *(given(n=n, gate="values", bias="per_task", delta=delta) for n in (0, 1) for delta in ("stacked", "list")),
    *(given(n=n, shared=False, x_layout="channels_last") for n in (0, 1)),
    given(n=0, delta=None, bias="per_task"),
]
CONV_CASES += [base.but(**change) for base in _BASES for change in _CHANGES]
CONV_CASES = list(dict.fromkeys(CONV_CASES))

_ROWS: tuple[dict[str, Any], ...] = (
    given(leading=(7,)),
    given(leading=(4, 3)),
    given(leading=(3, 5), ids_dims=2),
    given(leading=(2, 3, 4), ids_dims=2),
    given(leading=(2, 2, 3), ids_dims=3),
    given(leading=(3, 1, 2)),
    given(leading=(9,), cin=1, cout=1),
    given(leading=(5, 17), cin=64, cout=48),
    given(leading=(90,), cin=33, cout=65),
)
LINEAR_CASES = [
    LinearCase(
        **{
            **TASKS[(i + j) % len(TASKS)],
            **rows,
            "dtype": dtype,
            "weight_dtype": wide if wide != dtype else None,
            "x_layout": LINEAR_LAYOUTS[(i + 2 * j) % 4],
            "weight_layout": ("contiguous", "transposed", "mixed")[(i + j) % 3],
            "grad_layout": LINEAR_LAYOUTS[(2 * i + j) % len(LINEAR_LAYOUTS)],
        }
    )
    for i, rows in enumerate(_ROWS)
    for j, (dtype, wide) in enumerate(DTYPE_PAIRS)
]
LINEAR_CASES += [
    LinearCase(**{**rows, **change})
    for rows in (given(leading=(7,)), given(leading=(3, 4), ids_dims=2))
    for change in (
        *(given(x_layout=layout, gate="zeros") for layout in LINEAR_LAYOUTS),
        *(given(x_layout=layout, ids="sorted", delta="stacked") for layout in LINEAR_LAYOUTS),
        *(given(grad_layout=layout, bias="per_task") for layout in LINEAR_LAYOUTS),
        *(given(delta=delta, gate="zeros") for delta in ("stacked", "stacked_sliced", "stacked_permuted", "nones")),
        *(
            given(delta=delta, shared=False)
            for delta in ("stacked", "stacked_sliced", "stacked_permuted", "list", "nones")
        ),
        *(given(delta=None, gate=gate, bias=bias) for gate in (None, "zeros") for bias in (None, "shared", "per_task")),
        *(
            given(gate="closed", delta=delta, shared=shared)
            for delta in ("list", "stacked")
            for shared in (True, False)
        ),
        *(given(ids=ids, num_tasks=4, bias="shared") for ids in ("sorted", "reversed", "runs", "one", "absent")),
        *(given(num_tasks=t, gate="zeros", bias="per_task") for t in (1, 2, 17)),
    )
]
LINEAR_CASES += [
    LinearCase(**{**rows, **change})
    for rows in (given(leading=(0,)), given(leading=(1,)), given(leading=(0, 3)), given(leading=(3, 0)))
    for change in (
        given(gate="values", bias="per_task"),
        given(delta="stacked", shared=False),
    )
]
LINEAR_CASES = list(dict.fromkeys(LINEAR_CASES))

# a few of each, for the tests that need not see everything
FEW_CASES: list[TaskCase] = [
    ConvCase(delta="list", gate="zeros", bias="per_task"),
    ConvCase(delta="stacked", gate="values", bias="shared", x_layout="channels_last", weight_layout="channels_last"),
    ConvCase(**GEOMETRIES["k1_wide"], delta="nones", ids="sorted", x_layout="channels_last"),
    ConvCase(**GEOMETRIES["all"], delta="stacked", shared=False, ids="absent", dtype=F64),
    ConvCase(**GEOMETRIES["k3_wide"], delta="list", gate="values", dtype=BF16, weight_dtype=F32),
    ConvCase(**GEOMETRIES["k1_large"], delta="list", gate="zeros", ids="runs"),
    ConvCase(**GEOMETRIES["k3_large"], delta="stacked", ids="turns"),
    LinearCase(delta="list", gate="zeros", bias="per_task"),
    LinearCase(leading=(3, 5), ids_dims=2, delta="stacked", gate="values", bias="shared"),
    LinearCase(leading=(90,), cin=33, cout=65, delta="nones", ids="sorted", dtype=BF16, weight_dtype=F32),
    LinearCase(leading=(4, 6), delta="stacked", shared=False, ids="absent", dtype=F64),
]


def by_op(case: TaskCase, made: Made) -> Tensor:
    """The result of the op itself: what a compiled graph calls, where eager calls may go past it."""
    op = torch.ops.fastmtl.task_conv2d if isinstance(case, ConvCase) else torch.ops.fastmtl.task_linear
    return op(*case.op_arguments(made))
