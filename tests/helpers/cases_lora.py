"""The table of `task_lora`'s tests: layers by ranks, tasks, dtype and layout, with their oracle in float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from cases import assert_within, generator_of, short
from cases_task import BF16, DTYPE_PAIRS, F32, F64, LAYOUTS, LINEAR_LAYOUTS, TASK_TOLERANCE, bound, given, make_ids
from torch import Tensor

from fastmtl.core.task_weights import TaskLoraCall
from fastmtl.ops import task_lora
from fastmtl.ops.task_weights import reference

Factors = Tensor | list[Tensor | None] | None

# In 16 bits a number that passes both factors is rounded at most four times on its way, beside the result's own
# rounding, which `bound` counts: A, B, the product of one of them, and what this one is multiplied with or added to.
ROUNDINGS = 4


def tolerance_of(dtype: torch.dtype) -> float:
    return TASK_TOLERANCE[dtype] * (ROUNDINGS if dtype.itemsize == 2 else 1)


@dataclass
class MadeLora:
    """The arguments of one call, and the gradient of its result."""

    x: Tensor
    weight: Tensor | None
    A: Factors
    B: Factors
    scaling: Tensor | float | list[float] | None
    bias: Tensor | None
    task_ids: Tensor
    grad_out: Tensor

    def named(self) -> dict[str, Tensor]:
        """The differentiable arguments, in the order in which the backward op returns their gradients."""
        found: dict[str, Any] = {"x": self.x, "weight": self.weight}
        for name, held in (("A", self.A), ("B", self.B)):
            found |= {f"{name}[{t}]": w for t, w in enumerate(held)} if isinstance(held, list) else {name: held}
        found |= {"scaling": self.scaling, "bias": self.bias}
        return {name: x for name, x in found.items() if isinstance(x, Tensor)}

    def map(self, function: Callable[[Tensor], Tensor]) -> MadeLora:
        """The same with another tensor for each floating-point one."""

        def apply(x: Any) -> Any:
            if isinstance(x, list):
                return [apply(y) for y in x]
            return function(x) if isinstance(x, Tensor) else x

        made = {f.name: apply(getattr(self, f.name)) for f in fields(self) if f.name != "task_ids"}
        return MadeLora(task_ids=self.task_ids, **made)

    def leaves(self) -> MadeLora:
        return self.map(lambda x: x.detach().requires_grad_())

    def double(self) -> MadeLora:
        return self.map(lambda x: x.detach().double())

    def scales(self, num_tasks: int) -> list[Any]:
        """s of each task."""
        s = 1.0 if self.scaling is None else self.scaling
        return [s] * num_tasks if isinstance(s, (int, float)) else [s[t] for t in range(num_tasks)]

    def scaling_tensor(self, num_tasks: int) -> Tensor | None:
        if self.scaling is None or isinstance(self.scaling, Tensor):
            return self.scaling
        return torch.tensor(self.scales(num_tasks), dtype=torch.promote_types(self.x.dtype, F32))


@dataclass(frozen=True)
class LoraCase:
    """A layer. `ranks`: of the tasks in turn; 0: that task has no delta; `factors`: "stacked" takes the first rank."""

    leading: tuple[int, ...] = (7,)
    cin: int = 5
    cout: int = 4
    ids_dims: int = 1
    num_tasks: int = 3
    ranks: tuple[int, ...] = (2,)
    factors: str | None = "list"
    ids: str = "random"
    ids_dtype: torch.dtype = torch.int64
    scaling: str | None = None
    bias: str | None = None
    shared: bool = True  # whether there is a weight
    dtype: torch.dtype = F32
    weight_dtype: torch.dtype | None = None  # of weight and bias; None: that of x
    factor_dtype: torch.dtype | None = None  # of A, B and scaling; None: that of x
    x_layout: str = "contiguous"
    weight_layout: str = "contiguous"  # of the weight and the factors
    grad_layout: str = "contiguous"

    def __str__(self) -> str:
        parts = []
        for f in fields(self):
            value = getattr(self, f.name)
            if value != f.default:
                parts.append(f"{f.name}={short(value) if isinstance(value, torch.dtype) else value}".replace(" ", ""))
        return "-".join(parts) or "plain"

    def but(self, **changes: Any) -> LoraCase:
        return replace(self, **changes)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (*self.leading, self.cout)

    def rank(self, task: int) -> int:
        return self.ranks[task % len(self.ranks)]

    def _factors(self, draw: Callable[..., Tensor]) -> tuple[Factors, Factors]:
        if self.factors is None:
            return None, None
        place = LAYOUTS[self.weight_layout]
        if self.factors == "stacked":
            return place(draw(self.num_tasks, self.ranks[0], self.cin)), place(
                draw(self.num_tasks, self.cout, self.ranks[0])
            )
        A: list[Tensor | None] = []
        B: list[Tensor | None] = []
        for r in map(self.rank, range(self.num_tasks)):
            A.append(place(draw(r, self.cin)) if r else None)
            B.append(place(draw(self.cout, r)) if r else None)
        return A, B

    def _scaling(self, draw: Callable[..., Tensor]) -> Any:
        values = draw(self.num_tasks)
        if self.scaling in ("zeros", "closed"):
            values[:: 2 if self.scaling == "zeros" else 1] = 0.0
        return {
            None: None, "number": 0.5, "numbers": [0.5, 0.5, 2.0, 0.0][: self.num_tasks] + [1.5] * (self.num_tasks - 4),
        }.get(self.scaling, values)  # fmt: skip

    def make(self) -> MadeLora:
        generator = generator_of((type(self).__name__, str(self)))

        def draw(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator, dtype=F64) * scale).to(dtype)

        of_weight, of_factors = self.weight_dtype or self.dtype, self.factor_dtype or self.dtype
        scale = 1 / math.sqrt(max(1, self.cin))
        A, B = self._factors(functools.partial(draw, dtype=of_factors, scale=math.sqrt(scale)))
        weight = LAYOUTS[self.weight_layout](draw(self.cout, self.cin, dtype=of_weight, scale=scale))
        bias = {None: (), "shared": (self.cout,), "per_task": (self.num_tasks, self.cout)}[self.bias]
        return MadeLora(
            x=LAYOUTS[self.x_layout](draw(*self.leading, self.cin, dtype=self.dtype)),
            weight=weight if self.shared else None,
            A=A,
            B=B,
            scaling=self._scaling(functools.partial(draw, dtype=of_factors)),
            bias=draw(*bias, dtype=of_weight) if bias else None,
            task_ids=make_ids(self.ids, self.leading[: self.ids_dims], self.num_tasks, self.ids_dtype),
            grad_out=LAYOUTS[self.grad_layout](draw(*self.out_shape, dtype=self.dtype)),
        )

    def run(self, made: MadeLora, task_ids: Any = None) -> Tensor:
        ids = made.task_ids if task_ids is None else task_ids
        return task_lora(made.x, made.weight, made.A, made.B, ids, scaling=made.scaling, bias=made.bias)

    def op_arguments(self, made: MadeLora) -> tuple[Any, ...]:
        """x, weight, A, B, delta_tasks, scaling, bias, order, offsets of the op."""
        A, B, positions = [], [], []
        if isinstance(made.A, list):
            positions = [t for t, w in enumerate(made.A) if w is not None]
            A, B = ([held[t] for t in positions] for held in (made.A, made.B))
        elif made.A is not None:
            A, B = [made.A], [made.B]
        plan = reference.task_plan(made.task_ids, self.num_tasks)
        return made.x, made.weight, A, B, positions, made.scaling_tensor(self.num_tasks), made.bias, *plan

    def reference(self, made: MadeLora) -> tuple[Tensor, dict[str, Tensor]]:
        """Result and gradients by the reference functions, in the dtypes of `made`."""
        x, *rest = self.op_arguments(made)
        call, count = TaskLoraCall.of(*rest), len(rest[1])
        with torch.no_grad():
            y = reference.task_lora(x, call)
            wanted = [True, True, isinstance(made.scaling, Tensor), True]
            found = reference.task_lora_backward(made.grad_out, x, call, wanted, range(count), range(count))
        return y, dict(zip(made.named(), found, strict=True))


def present_tasks(made: MadeLora) -> set[int]:
    return set(made.task_ids.flatten().tolist())


# --- expected


@dataclass
class Expected:
    """Result and gradients in float64, and each of them on absolute values."""

    y: Tensor
    grads: dict[str, Tensor]
    y_size: Tensor
    grad_sizes: dict[str, Tensor]


def _absolute(made: MadeLora) -> MadeLora:
    scaling = made.scaling
    if isinstance(scaling, list):
        scaling = [abs(s) for s in scaling]
    return replace(made.map(torch.abs), scaling=scaling if not isinstance(scaling, Tensor) else scaling.abs())


def expected_of(case: LoraCase, made: MadeLora) -> Expected:
    double = made.double()
    return Expected(*case.reference(double), *case.reference(_absolute(double)))


@functools.cache
def expected(case: LoraCase) -> Expected:
    return expected_of(case, case.make())


def assert_result(case: LoraCase, y: Tensor, want: Expected, tolerance: float | None = None) -> None:
    """Within `tolerance`, by default that of the dtype of x."""
    assert y.dtype == case.dtype
    assert_within(y, want.y, bound(want.y_size, want.y, tolerance or tolerance_of(case.dtype), y.dtype))


def assert_gradients(
    case: LoraCase,
    made: MadeLora,
    actual: dict[str, Tensor | None],
    want: Expected,
    zeros: bool = False,
    tolerance: float | None = None,
) -> None:
    """Values and dtypes; None for A and B of a list whose task has no sample (with `zeros` 0), and for nothing else."""
    present = present_tasks(made)
    for name, parameter in made.named().items():
        g = actual[name]
        if not zeros and name[:2] in ("A[", "B[") and int(name[2:-1]) not in present:
            assert g is None, f"{name}: a task without samples got a gradient"
            continue
        assert g is not None, f"{name}: no gradient"
        assert g.dtype == parameter.dtype, name
        exact, allowed = want.grads[name], tolerance or tolerance_of(case.dtype)
        try:
            assert_within(g, exact, bound(want.grad_sizes[name], exact, allowed, g.dtype))
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}: {error}") from error


def gradients(y: Tensor, made: MadeLora, grad_out: Tensor | None = None, **options: Any) -> dict[str, Tensor | None]:
    """The gradients of `made.leaves()`, by name."""
    named = made.named()
    found = torch.autograd.grad(
        y, list(named.values()), made.grad_out.detach() if grad_out is None else grad_out, allow_unused=True, **options
    )
    return dict(zip(named, found, strict=True))


# --- the table

_WAYS: tuple[dict[str, Any], ...] = (
    given(ranks=(2, 3, 1), scaling="zeros", bias="per_task"),
    given(factors="stacked", ranks=(3,), scaling="values", bias="shared", ids="sorted"),
    given(ranks=(1, 0, 4), ids="runs", ids_dtype=torch.int32, scaling="number"),
    given(factors="stacked", ranks=(1,), bias="per_task", ids="absent", shared=False),
    given(ranks=(5, 2), scaling="numbers", bias="shared", ids="reversed", num_tasks=6),
    given(ranks=(0, 3), ids="absent", num_tasks=5, shared=False, scaling="values"),
    given(ranks=(7,), ids="turns", num_tasks=1, scaling="values"),
)
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
    given(leading=(150,), cin=40, cout=24),
)
LORA_CASES = [
    LoraCase(
        **{
            **_WAYS[(i + j) % len(_WAYS)],
            **rows,
            "dtype": dtype,
            "weight_dtype": wide if wide != dtype and i % 3 else None,
            "factor_dtype": wide if wide != dtype and i % 3 != 1 else None,
            "x_layout": LINEAR_LAYOUTS[(i + 2 * j) % 4],
            "weight_layout": ("contiguous", "transposed", "sliced")[(i + j) % 3],
            "grad_layout": LINEAR_LAYOUTS[(2 * i + j) % len(LINEAR_LAYOUTS)],
        }
    )
    for i, rows in enumerate(_ROWS)
    for j, (dtype, wide) in enumerate(DTYPE_PAIRS)
]
LORA_CASES += [
    LoraCase(**{**rows, **change})
    for rows in (given(leading=(7,)), given(leading=(3, 4), ids_dims=2))
    for change in (
        *(given(x_layout=layout, scaling="zeros", ranks=(2, 1)) for layout in LINEAR_LAYOUTS),
        *(given(x_layout=layout, ids="sorted", factors="stacked") for layout in LINEAR_LAYOUTS),
        *(given(grad_layout=layout, bias="per_task") for layout in LINEAR_LAYOUTS),
        *(given(factors=None, scaling=s, bias=b) for s in ("number", "values") for b in ("shared", "per_task")),
        *(
            given(scaling="closed", factors=factors, shared=shared, bias=bias)
            for factors in ("list", "stacked")
            for shared in (True, False)
            for bias in (None, "shared", "per_task")
        ),
        *(given(ids=ids, num_tasks=4, bias="shared") for ids in ("sorted", "reversed", "runs", "one", "absent")),
        *(given(num_tasks=t, scaling="zeros", bias="per_task", ranks=(1, 2, 0)) for t in (1, 2, 17)),
        *(given(ranks=ranks, shared=False) for ranks in ((8,), (0, 1), (16, 3))),
    )
]
LORA_CASES += [
    LoraCase(**{**rows, **change})
    for rows in (given(leading=(0,)), given(leading=(1,)), given(leading=(0, 3)), given(leading=(3, 0)))
    for change in (
        given(scaling="values", bias="per_task", ranks=(2, 1)),
        given(factors="stacked", shared=False),
    )
]
LORA_CASES = list(dict.fromkeys(LORA_CASES))

# a few, for the tests that need not see everything
FEW_LORA_CASES = [
    LoraCase(ranks=(2, 3, 1), scaling="zeros", bias="per_task"),
    LoraCase(leading=(3, 5), ids_dims=2, factors="stacked", scaling="values", bias="shared"),
    LoraCase(leading=(90,), cin=33, cout=65, ranks=(4, 0, 9), ids="sorted", dtype=BF16, factor_dtype=F32),
    LoraCase(leading=(4, 6), factors="stacked", shared=False, ids="absent", dtype=F64),
    LoraCase(leading=(200,), cin=48, cout=72, ranks=(8, 4, 16, 0), num_tasks=5, scaling="numbers"),
]

SAMPLE_LORAS = (
    LoraCase(ids="turns", ranks=(2, 3, 1), scaling="zeros", bias="per_task", x_layout="sliced"),
    LoraCase(leading=(2, 3), ids_dims=2, ids="absent", factors="stacked", scaling="values", bias="shared", num_tasks=4),
    LoraCase(leading=(4, 3), ids="turns", ranks=(2, 0), dtype=BF16, factor_dtype=F32, weight_layout="transposed"),
    LoraCase(leading=(3, 2), ids="runs", factors="stacked", shared=False, dtype=F64, x_layout="batch_inside"),
    LoraCase(leading=(0,), factors="stacked", bias="per_task"),
)
