"""`task_scale_shift`: values and gradients at every rank, layout and dtype."""

from __future__ import annotations

from typing import Any

import cases_task as table
import pytest
import torch
from cases import assert_within, generator_of, short
from cases_task import BF16, DTYPE_PAIRS, F32, F64, LAYOUTS, bound, make_ids
from conftest import Backend
from torch import Tensor

from fastmtl.ops import task_plan, task_scale_shift

# in 16 bits everything is computed in float32 and rounded once
TOLERANCE = {F64: 1e-14, F32: 1e-6, BF16: 1e-6, torch.float16: 1e-6}
SHAPES = (
    (7, 3),
    (5, 4, 6),
    (6, 3, 5, 4),
    (3, 2, 2, 3, 2),
    (1, 1),
    (1, 5, 1, 1),
    (0, 3),
    (0, 3, 4, 4),
    (4, 3, 0),
    (4, 0, 2),
)
IDS = ("random", "sorted", "absent", "one", "strided")


class Inputs:
    """x, scale, shift, ids and the gradient of the result."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32),
        layout: str = "contiguous",
        ids: str = "random",
        num_tasks: int = 4,
        grad_layout: str = "contiguous",
    ) -> None:
        generator = generator_of((shape, dtypes, layout, ids))

        def draw(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.randn(size, generator=generator, dtype=F64).to(dtype)

        self.x = LAYOUTS[layout](draw(*shape, dtype=dtypes[0])).detach().requires_grad_()
        self.scale = draw(num_tasks, shape[1], dtype=dtypes[1]).requires_grad_()
        self.shift = draw(num_tasks, shape[1], dtype=dtypes[1]).requires_grad_()
        self.ids = make_ids(ids, shape[:1], num_tasks)
        self.grad_out = LAYOUTS[grad_layout](draw(*shape, dtype=dtypes[0]))

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.x, self.scale, self.shift

    def run(self, ids: Any = None) -> Tensor:
        return task_scale_shift(*self.leaves, self.ids if ids is None else ids)

    def expected(self, absolute: bool = False) -> list[Tensor]:
        """Result and gradients, sample by sample in float64."""
        x, scale, shift, g = (y.detach().double() for y in (*self.leaves, self.grad_out))
        if absolute:
            x, scale, shift, g = (y.abs() for y in (x, scale, shift, g))
        x, scale, shift = (y.requires_grad_() for y in (x, scale, shift))
        tail = [1] * (x.dim() - 2)
        rows = [
            x[b] * scale[t].reshape(-1, *tail) + shift[t].reshape(-1, *tail) for b, t in enumerate(self.ids.tolist())
        ]
        y = torch.stack(rows) if rows else (x * 0 + scale.sum() * 0 + shift.sum() * 0)
        found = torch.autograd.grad(y, (x, scale, shift), g, allow_unused=True)
        return [
            y.detach(),
            *(torch.zeros_like(p) if d is None else d for p, d in zip((x, scale, shift), found, strict=True)),
        ]


def check(inputs: Inputs) -> None:
    y = inputs.run()
    found = torch.autograd.grad(y, inputs.leaves, inputs.grad_out)
    like = (inputs.x, *inputs.leaves)
    tolerance = TOLERANCE[inputs.x.dtype]
    for name, actual, exact, size, parameter in zip(
        ("y", "x", "scale", "shift"), (y, *found), inputs.expected(), inputs.expected(True), like, strict=True
    ):
        assert actual.dtype == parameter.dtype, name
        assert_within(actual, exact, bound(size, exact, tolerance, actual.dtype))
        table.assert_dense(actual, name)
    table.assert_own_memory(
        {"y": y, "grad x": found[0], "grad scale": found[1], "grad shift": found[2]},
        {"x": inputs.x, "scale": inputs.scale, "shift": inputs.shift, "grad_out": inputs.grad_out},
    )


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=lambda pair: "-".join(map(short, pair)))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(
    shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype], backend: Backend
) -> None:
    for ids in ("random", "absent"):
        check(Inputs(shape, dtypes, ids=ids))


@pytest.mark.parametrize("grad_layout", ["contiguous", "channels_last", "expanded"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, grad_layout: str, backend: Backend) -> None:
    inputs = Inputs((6, 3, 5, 4), layout=layout, grad_layout=grad_layout)
    check(inputs)
    y = inputs.run()
    (grad_x,) = torch.autograd.grad(y, inputs.x, inputs.grad_out)
    for out in (y, grad_x):
        assert out.stride() == torch.empty_like(inputs.x).stride()


@pytest.mark.parametrize("num_tasks", [1, 2, 17])
@pytest.mark.parametrize("ids", IDS)
def test_tasks(ids: str, num_tasks: int, backend: Backend) -> None:
    check(Inputs((9, 5, 3), ids=ids, num_tasks=num_tasks))


def test_plan_and_int32_equal_ids(backend: Backend) -> None:
    inputs = Inputs((8, 3, 4))
    y = inputs.run()
    found = torch.autograd.grad(y, inputs.leaves, inputs.grad_out)
    for ids in (task_plan(inputs.ids, 4), inputs.ids.int(), task_plan(inputs.ids.int(), 4)):
        other = inputs.run(ids)
        assert torch.equal(other, y)
        again = torch.autograd.grad(other, inputs.leaves, inputs.grad_out)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_some_are_frozen(wanted: tuple[int, ...], backend: Backend) -> None:
    inputs = Inputs((6, 3, 4), ids="absent")
    everything = torch.autograd.grad(inputs.run(), inputs.leaves, inputs.grad_out)
    for k, leaf in enumerate(inputs.leaves):
        leaf.requires_grad_(k in wanted)
    inputs.run().backward(inputs.grad_out)
    for k, leaf in enumerate(inputs.leaves):
        assert leaf.grad is None if k not in wanted else torch.equal(leaf.grad, everything[k])


def test_tasks_do_not_mix(backend: Backend) -> None:
    inputs = Inputs((8, 3, 2), ids="turns")
    with torch.no_grad():
        inputs.x[5] = torch.nan  # of task 1
        inputs.scale[2] = torch.inf
    y = inputs.run()
    bad = (inputs.ids == 2) | (torch.arange(8) == 5)
    assert not torch.isfinite(y[bad]).any() and torch.isfinite(y[~bad]).all()
    dx, dscale, dshift = torch.autograd.grad(y, inputs.leaves, inputs.grad_out)
    assert torch.isfinite(dx[inputs.ids != 2]).all() and not torch.isfinite(dx[inputs.ids == 2]).any()
    assert torch.isnan(dscale[1]).all() and torch.isfinite(dscale[[0, 2, 3]]).all() and torch.isfinite(dshift).all()


@pytest.mark.parametrize("shape", [(4, 2), (3, 2, 2, 2)])
def test_gradcheck(shape: tuple[int, ...], backend: Backend) -> None:
    inputs = Inputs(shape, (F64, F64), num_tasks=3, ids="absent")
    assert torch.autograd.gradcheck(lambda *p: task_scale_shift(*p, inputs.ids), inputs.leaves)
    assert torch.autograd.gradgradcheck(lambda *p: task_scale_shift(*p, inputs.ids), inputs.leaves)


def test_same_bits_and_threads(backend: Backend, threads: None) -> None:
    inputs = Inputs((16, 33, 9, 7))
    results = []
    for count in (1, 1, 2, 3):
        torch.set_num_threads(count)
        y = inputs.run()
        results.append((y, *torch.autograd.grad(y, inputs.leaves, inputs.grad_out)))
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    for other in results[2:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_backward_twice(backend: Backend) -> None:
    inputs = Inputs((6, 3, 4))
    y = inputs.run()
    first = torch.autograd.grad(y, inputs.leaves, inputs.grad_out, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(y, inputs.leaves, 2 * inputs.grad_out)
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    assert all(torch.equal(2 * a, b) for a, b in zip(first, second, strict=True))


def test_autocast_casts_x_alone(backend: Backend) -> None:
    inputs = Inputs((6, 3, 4))
    narrow = inputs.x.detach().bfloat16().requires_grad_()
    expected = task_scale_shift(narrow, inputs.scale, inputs.shift, inputs.ids)
    grad_out = inputs.grad_out.bfloat16()
    wanted = torch.autograd.grad(expected, (narrow, inputs.scale, inputs.shift), grad_out)
    with torch.autocast("cpu", dtype=BF16):
        y = inputs.run()
    found = torch.autograd.grad(y, inputs.leaves, grad_out)
    assert torch.equal(y, expected) and all(g.dtype == F32 for g in found)
    assert all(torch.equal(a, b.float()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool, backend: Backend, fresh_compiler: None) -> None:
    compiled = torch.compile(
        lambda x, a, b, ids: task_scale_shift(x * 2, a, b, ids).relu(),
        fullgraph=True, backend="aot_eager", dynamic=dynamic,
    )  # fmt: skip
    for ids in ("random", "absent"):
        inputs = Inputs((6, 3, 5, 4), ids=ids, layout="channels_last", grad_layout="channels_last")
        y = compiled(*inputs.leaves, inputs.ids)
        eager = task_scale_shift(inputs.x * 2, inputs.scale, inputs.shift, inputs.ids).relu()
        assert torch.equal(y, eager) and y.stride() == eager.stride()
        a, b = (torch.autograd.grad(z, inputs.leaves, inputs.grad_out) for z in (y, eager))
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_a_float32_shift_beside_16_bits_is_rounded_once(backend: Backend) -> None:
    x, ids = torch.full((1, 1), -1.0, dtype=BF16), torch.tensor([0])
    shift = torch.full((1, 1), 1.001)
    for scale in (torch.ones(1, 1, dtype=BF16), torch.ones(1, 1)):
        assert torch.equal(task_scale_shift(x, scale, shift, ids), (shift - 1).to(BF16))
