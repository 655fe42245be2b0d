"""`task_batch_norm`: values, gradients and running statistics against `F.batch_norm` of each task's samples."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import cases_task as table
import pytest
import torch
import torch.nn.functional as F
from cases import assert_within, generator_of, short
from cases_task import BF16, DTYPE_PAIRS, F16, F32, F64, LAYOUTS, bound, make_ids
from conftest import Backend
from torch import Tensor

from fastmtl.ops import task_batch_norm, task_plan
from fastmtl.ops.task_weights import reference

# of a result, relative to the magnitudes that it is made of; 16 bits are computed in float32 and rounded once
TOLERANCE = {F64: 1e-13, F32: 4e-6, BF16: 4e-6, F16: 4e-6}
EPS, MOMENTUM = 1e-5, 0.3
SHAPES = (
    (16, 3),
    (15, 4, 6),
    (14, 3, 5, 4),
    (9, 5, 7, 9),
    (13, 2, 2, 3, 2),
    (12, 1, 1, 2),
    (10, 70, 3, 3),
    (8, 300, 2, 1),
    (6, 3, 37, 61),
    (0, 3),
    (0, 3, 4, 4),
    (4, 3, 0),
    (4, 0, 2),
)
FORMS = ("list", "stacked", "shared", None)


@dataclass(frozen=True)
class Case:
    """`form`: of weight and bias; `running`: of the running statistics."""

    shape: tuple[int, ...] = (14, 3, 5, 4)
    dtype: torch.dtype = F32
    table: torch.dtype = F32
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    ids: str = "turns"
    num_tasks: int = 4
    form: str | None = "list"
    running: str | None = "list"
    training: bool = True
    momentum: float | None = MOMENTUM
    offset: float = 1.0

    def make(self) -> Inputs:
        return Inputs(self)


def _as(form: str | None, rows: Tensor) -> Any:
    if form is None:
        return None
    return {"list": [row.clone() for row in rows], "stacked": rows.clone(), "shared": rows[0].clone()}[form]


def _leaves(value: Any) -> list[Tensor]:
    return [] if value is None else [value] if isinstance(value, Tensor) else list(value)


class Inputs:
    """The arguments of one call, and the gradient of its result."""

    def __init__(self, case: Case) -> None:
        self.case = case
        generator = generator_of(str(case))
        channels, tasks = case.shape[1], case.num_tasks

        def draw(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.randn(size, generator=generator, dtype=F64).to(dtype)

        x = draw(*case.shape, dtype=F64) * 2 + case.offset
        self.x = LAYOUTS[case.layout](x.to(case.dtype)).detach().requires_grad_()
        self.weight, self.bias = (_as(case.form, draw(tasks, channels, dtype=case.table)) for _ in "wb")
        for p in (*_leaves(self.weight), *_leaves(self.bias)):
            p.requires_grad_()
        self.running_mean = _as(case.running, draw(tasks, channels, dtype=case.table))
        self.running_var = _as(case.running, draw(tasks, channels, dtype=case.table).square() + 0.5)
        self.tracked = _as(case.running, torch.arange(tasks))
        self.ids = make_ids(case.ids, case.shape[:1], tasks)
        self.grad_out = LAYOUTS[case.grad_layout](draw(*case.shape, dtype=case.dtype))

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, *_leaves(self.weight), *_leaves(self.bias)]

    @property
    def kept(self) -> list[Tensor]:
        return [*_leaves(self.running_mean), *_leaves(self.running_var), *_leaves(self.tracked)]

    def run(self, ids: Any = None, call: Any = task_batch_norm) -> Tensor:
        case = self.case
        ids = self.ids if ids is None else ids
        if ids is self.ids and case.form in (None, "shared") and case.running is None:
            ids = task_plan(ids, case.num_tasks)
        return call(
            self.x, ids, self.weight, self.bias, self.running_mean, self.running_var,
            training=case.training, momentum=case.momentum, eps=EPS, num_batches_tracked=self.tracked,
        )  # fmt: skip


class Expected:
    """Result, gradients and statistics of a loop of `F.batch_norm` over the tasks in float64, and their magnitudes."""

    def __init__(self, inputs: Inputs) -> None:
        case, ids = inputs.case, inputs.ids
        self.x = inputs.x.detach().double().requires_grad_()
        double = {
            name: [p.detach().double() for p in _leaves(getattr(inputs, name))]
            for name in ("weight", "bias", "running_mean", "running_var")
        }
        self.present = sorted(set(ids.tolist())) if math.prod(case.shape[2:]) else []
        self.weight, self.bias = ([p.requires_grad_() for p in double[name]] for name in ("weight", "bias"))
        self.running_mean, self.running_var = double["running_mean"], double["running_var"]
        self.tracked = [p.clone() for p in _leaves(inputs.tracked)]
        y, size = torch.zeros_like(self.x), torch.zeros_like(self.x)
        self.sizes: dict[str, Any] = {"x": torch.zeros_like(self.x)}
        g = inputs.grad_out.double()
        axes = [d for d in range(g.dim()) if d != 1]
        of_weight, of_bias = (torch.zeros(case.num_tasks, g.shape[1], dtype=F64) for _ in "wb")

        def spread(v: Tensor) -> Tensor:
            return v.reshape(1, -1, *[1] * (g.dim() - 2))

        for t in self.present:
            rows = (ids == t).nonzero()[:, 0]
            mean, var = (self._of(double[name], t) for name in ("running_mean", "running_var"))
            w, b = self._of(self.weight, t), self._of(self.bias, t)
            share = case.momentum
            if case.training and mean is not None:
                count = self._of(self.tracked, t)
                count += 1
                share = 1.0 / count.item() if share is None else share
            if not self.x.numel():
                continue  # without channels, which torch refuses
            part = self.x[rows]
            y = y.index_copy(0, rows, F.batch_norm(part, mean, var, w, b, case.training, share or 0.0, EPS))
            with torch.no_grad():
                used = (part.mean(axes), part.var(axes, correction=0)) if case.training else (mean, var)
                scale = spread((used[1] + EPS).rsqrt())
                normal = (part.abs() + spread(used[0].abs())) * scale
                factor = torch.ones_like(normal) if w is None else spread(w.abs()).expand_as(normal)
                size[rows] = normal * factor + (0.0 if b is None else spread(b.abs()))
                products = g[rows].abs() * normal
                inner = g[rows].abs()
                if case.training:
                    inner = inner + spread(inner.mean(axes)) + normal * spread(products.mean(axes))
                self.sizes["x"][rows] = inner * scale * factor
                of_weight[t], of_bias[t] = products.sum(axes), g[rows].abs().sum(axes)
        self.y, self.y_size = y.detach(), size
        leaves = [self.x, *self.weight, *self.bias]
        if y.requires_grad:
            self.grads = list(torch.autograd.grad(y, leaves, g, allow_unused=True))
        else:
            self.grads = [None] * len(leaves)
        tables = [self._sizes_of(params, rows) for params, rows in ((self.weight, of_weight), (self.bias, of_bias))]
        self.grad_sizes = [self.sizes["x"], *tables[0], *tables[1]]

    @staticmethod
    def _of(params: list[Tensor], t: int) -> Any:
        if not params:
            return None
        if len(params) > 1:
            return params[t]
        by_task = params[0].dim() == (1 if params[0].dtype == torch.int64 else 2)
        return params[0][t] if by_task else params[0]

    @staticmethod
    def _sizes_of(params: list[Tensor], rows: Tensor) -> list[Tensor]:
        if len(params) != 1:
            return list(rows) if params else []
        return [rows if params[0].dim() == 2 else rows.sum(0)]


def check(case: Case) -> None:
    inputs = case.make()
    before = [p.clone() for p in inputs.kept]
    want = Expected(inputs)
    y = inputs.run()
    tolerance = TOLERANCE[case.dtype]
    assert y.dtype == case.dtype and y.stride() == torch.empty_like(inputs.x).stride()
    assert_within(y, want.y, bound(want.y_size, want.y, tolerance, y.dtype))
    grads = torch.autograd.grad(y, inputs.leaves, inputs.grad_out, allow_unused=True)
    for k, (leaf, actual, exact, size) in enumerate(
        zip(inputs.leaves, grads, want.grads, want.grad_sizes, strict=True)
    ):
        own = case.form == "list" and k > 0 and case.num_tasks > 1
        if own and (k - 1) % case.num_tasks not in set(inputs.ids.tolist()):
            assert actual is None, f"leaf {k}: a task without samples got a gradient"
            continue
        assert actual is not None and actual.dtype == leaf.dtype
        exact = torch.zeros(leaf.shape, dtype=F64) if exact is None else exact
        assert_within(actual, exact, bound(size, exact, tolerance, actual.dtype))
    assert grads[0] is not None and grads[0].stride() == torch.empty_like(inputs.x).stride()
    table.assert_own_memory({"y": y, "grad x": grads[0]}, {"x": inputs.x, "grad_out": inputs.grad_out})
    exact_kept = [*want.running_mean, *want.running_var]
    for actual, exact, old in zip(inputs.kept, exact_kept, before, strict=False):
        assert_within(actual, exact, bound(exact.abs() + 1, exact, tolerance, actual.dtype))
        if not case.training:
            assert torch.equal(actual, old)
    for actual, exact in zip(_leaves(inputs.tracked), want.tracked, strict=True):
        assert torch.equal(actual, exact)


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=lambda pair: "-".join(map(short, pair)))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_gradients_and_statistics(
    shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype], level: Backend
) -> None:
    for training, layout in itertools.product((True, False), ("contiguous", "channels_last")):
        if layout == "contiguous" or len(shape) == 4:
            check(Case(shape, *dtypes, layout, ids="turns", num_tasks=3, training=training))


@pytest.mark.parametrize("grad_layout", ["contiguous", "channels_last", "expanded"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, grad_layout: str, backend: Backend) -> None:
    for training in (True, False):
        check(Case(layout=layout, grad_layout=grad_layout, training=training))


@pytest.mark.parametrize("num_tasks", [1, 2, 17])
@pytest.mark.parametrize("ids", ["random", "sorted", "reversed", "absent", "one", "strided"])
def test_tasks(ids: str, num_tasks: int, backend: Backend) -> None:
    for training in (True, False):
        check(Case((9, 5, 3, 2), ids=ids, num_tasks=num_tasks, training=training))


@pytest.mark.parametrize("running", ["list", "stacked", None])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", [True, False])
def test_forms(training: bool, form: str | None, running: str | None, backend: Backend) -> None:
    if training or running is not None:
        for ids in ("turns", "absent"):
            check(Case(ids=ids, form=form, running=running, training=training))


@pytest.mark.parametrize("num_tasks", [1, 3])
@pytest.mark.parametrize("running", ["list", "stacked"])
def test_an_average_of_all_batches(running: str, num_tasks: int, backend: Backend) -> None:
    check(Case(momentum=None, running=running, num_tasks=num_tasks, ids="absent"))


@pytest.mark.parametrize("shape", [(8, 3, 40, 33), (8, 70, 5, 5)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_variance_far_from_zero(layout: str, shape: tuple[int, ...], level: Backend) -> None:
    """A mean of 1000 deviations: the variance must not come from a difference of squares."""
    case = Case(shape, layout=layout, num_tasks=2, offset=2000.0)
    inputs = case.make()
    want = Expected(inputs)
    y = inputs.run()
    # x itself has 2^-13 of a deviation between neighbours; its rounding is in the oracle too, that of the mean is not
    assert (y - want.y).abs().max() < 3e-3
    for actual, exact in zip(_leaves(inputs.running_var), want.running_var, strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=0)


def test_plan_and_int32_equal_ids(backend: Backend) -> None:
    inputs = Case().make()
    y = inputs.run()
    found = torch.autograd.grad(y, inputs.leaves, inputs.grad_out)
    for ids in (task_plan(inputs.ids, 4), inputs.ids.int(), task_plan(inputs.ids.int(), 4)):
        other = inputs.run(ids)
        assert torch.equal(other, y)
        again = torch.autograd.grad(other, inputs.leaves, inputs.grad_out)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
@pytest.mark.parametrize("training", [True, False])
def test_some_are_frozen(training: bool, wanted: tuple[int, ...], backend: Backend) -> None:
    inputs = Case(form="stacked", ids="absent", training=training).make()
    everything = torch.autograd.grad(inputs.run(), inputs.leaves, inputs.grad_out)
    for k, leaf in enumerate(inputs.leaves):
        leaf.requires_grad_(k in wanted)
    inputs.run().backward(inputs.grad_out)
    for k, leaf in enumerate(inputs.leaves):
        assert leaf.grad is None if k not in wanted else torch.equal(leaf.grad, everything[k])


def test_one_task_of_a_list_is_frozen(backend: Backend) -> None:
    inputs = Case().make()
    everything = torch.autograd.grad(inputs.run(), inputs.leaves, inputs.grad_out)
    inputs.weight[1].requires_grad_(False)
    inputs.run().backward(inputs.grad_out)
    assert inputs.weight[1].grad is None
    assert torch.equal(inputs.weight[2].grad, everything[3]) and torch.equal(inputs.bias[1].grad, everything[6])


@pytest.mark.parametrize("training", [True, False])
def test_tasks_do_not_mix(training: bool, backend: Backend) -> None:
    """What a sample, a weight or a gradient that is not finite spoils is its own task."""
    inputs = Case((8, 3, 2, 2), ids="turns", training=training).make()
    with torch.no_grad():
        inputs.x[5, 1] = torch.nan  # of task 1, in one channel
        inputs.weight[2].fill_(torch.inf)
    y = inputs.run()
    bad = torch.zeros(8, 3, dtype=torch.bool)
    bad[5, 1] = True
    if training:
        bad[1, 1] = True
    bad |= (inputs.ids == 2)[:, None]
    assert torch.equal(~torch.isfinite(y).flatten(2).all(2), bad)
    dx, *grads = torch.autograd.grad(y, inputs.leaves, inputs.grad_out)
    assert torch.isfinite(dx[(inputs.ids == 0) | (inputs.ids == 3)]).all()
    weights, biases = grads[:4], grads[4:]
    assert [bool(torch.isfinite(g).all()) for g in weights] == [True, False, True, True]
    assert all(torch.isfinite(g).all() for g in biases)
    assert [bool(torch.isfinite(m).all()) for m in inputs.running_mean] == [True, not training, True, True]


def test_absent_tasks_keep_their_statistics(backend: Backend) -> None:
    inputs = Case(ids="absent").make()
    with torch.no_grad():
        inputs.running_mean[1].fill_(torch.nan)
        inputs.running_var[3].fill_(torch.inf)
    before = [p.clone() for p in inputs.kept]
    inputs.run()
    for k, (actual, old) in enumerate(zip(inputs.kept, before, strict=True)):
        same = torch.equal(actual.nan_to_num(7.0), old.nan_to_num(7.0))
        assert same == (k % 4 in (1, 3)), k


@pytest.mark.parametrize("shape", [(7, 2), (6, 2, 1, 2)], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str | None, training: bool, shape: tuple[int, ...], backend: Backend) -> None:
    inputs = Case(shape, F64, F64, num_tasks=2, form=form, ids="turns", training=training).make()
    plan = task_plan(inputs.ids, 2)

    def run(x: Tensor, *params: Tensor) -> Tensor:
        rest = iter(params)
        weight, bias = (
            None if form is None else [next(rest) for _ in "01"] if form == "list" else next(rest) for _ in "wb"
        )
        given = (None, None) if training else (inputs.running_mean, inputs.running_var)
        return task_batch_norm(x, plan, weight, bias, *given, training=training)

    assert torch.autograd.gradcheck(run, inputs.leaves)
    assert torch.autograd.gradgradcheck(run, inputs.leaves)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(16, 33, 9, 7), (9, 3, 41, 37)], ids=str)
def test_same_bits_whatever_the_threads(shape: tuple[int, ...], layout: str, backend: Backend, threads: None) -> None:
    results = []
    for count in (1, 1, 2, 3):
        torch.set_num_threads(count)
        inputs = Case(shape, layout=layout).make()
        y = inputs.run()
        results.append((y, *torch.autograd.grad(y, inputs.leaves, inputs.grad_out), *inputs.kept))
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    for other in results[2:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_backward_twice(backend: Backend) -> None:
    inputs = Case().make()
    y = inputs.run()
    first = torch.autograd.grad(y, inputs.leaves, inputs.grad_out, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(y, inputs.leaves, 2 * inputs.grad_out)
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    assert all(torch.equal(2 * a, b) for a, b in zip(first, second, strict=True))


def test_statistics_may_move_before_the_backward_pass(backend: Backend) -> None:
    """As with two batches before one `backward()`; nothing of the backward pass reads the running statistics."""
    for training in (True, False):
        inputs, other = (Case(training=training).make() for _ in "ab")
        y = inputs.run()
        for p in inputs.kept:
            p.zero_()
        found = torch.autograd.grad(y, inputs.leaves, inputs.grad_out)
        expected = torch.autograd.grad(other.run(), other.leaves, other.grad_out)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_autocast_leaves_x_as_it_is(backend: Backend) -> None:
    expected = Case().make().run()
    with torch.autocast("cpu", dtype=BF16):
        assert torch.equal(Case().make().run(), expected)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_compile(training: bool, dynamic: bool, backend: Backend, fresh_compiler: None) -> None:
    def step(x: Tensor, ids: Tensor, weight: Any, bias: Any, mean: Any, var: Any, **options: Any) -> Tensor:
        return task_batch_norm(x * 2, ids, weight, bias, mean, var, **options).relu()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for ids, momentum in itertools.product(("turns", "absent"), (MOMENTUM, None)):
        a, b = (Case(ids=ids, layout="channels_last", training=training, momentum=momentum).make() for _ in "ab")
        y, eager = a.run(call=compiled), b.run(call=step)
        assert torch.equal(y, eager) and y.stride() == eager.stride()
        # in a graph a task without samples gets zeros
        found = torch.autograd.grad(y, a.leaves, a.grad_out, materialize_grads=True)
        expected = torch.autograd.grad(eager, b.leaves, b.grad_out, materialize_grads=True)
        assert all(torch.equal(p, q) for p, q in zip(found, expected, strict=True))
        assert all(torch.equal(p, q) for p, q in zip(a.kept, b.kept, strict=True))


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 1, 1)], ids=str)
def test_a_single_value_is_refused_before_anything_is_written(shape: tuple[int, ...], backend: Backend) -> None:
    inputs = Case(shape, num_tasks=3).make()
    inputs.ids = torch.tensor([0, 2, 0, 0])
    before = [p.clone() for p in inputs.kept]
    with pytest.raises(ValueError, match=r"x: expected more than 1 value per channel of each task.*got 1 for task 2"):
        inputs.run()
    assert all(torch.equal(a, b) for a, b in zip(inputs.kept, before, strict=True))
    wider = Case((4, 3, 1, 2), num_tasks=3).make()
    wider.ids = inputs.ids
    assert torch.isfinite(wider.run()).all()
    # running statistics serve single values
    check(Case(shape, num_tasks=4, training=False))


def test_the_reference_makes_a_single_value_nan() -> None:
    """What a GPU gives, where nobody can tell without waiting."""
    inputs = Case((4, 3), F64, F64, num_tasks=3).make()
    plan = task_plan(torch.tensor([0, 2, 0, 0]), 3)
    batch = reference.SortedBatch(plan.order, plan.offsets)
    y, mean, var = reference.task_batch_norm(inputs.x.detach(), [], [], [], [], batch, EPS)
    assert torch.isnan(y).all(1).tolist() == [False, True, False, False] and torch.isfinite(y[[0, 2, 3]]).all()
    assert torch.isnan(mean).any(1).tolist() == torch.isnan(var).any(1).tolist() == [False, False, True]
    kept = inputs.running_mean, inputs.running_var, inputs.tracked
    before = [p.clone() for p in inputs.kept]
    reference.task_batch_norm_update(mean, var, plan.offsets, 1, MOMENTUM, *kept)
    moved = [not torch.equal(a, b) for a, b in zip(inputs.kept, before, strict=True)]
    assert moved == [True, False, False] * 3


def test_samples_of_no_task_are_nan_in_the_reference() -> None:
    inputs = Case((5, 3, 2, 2), F64, F64, num_tasks=2).make()
    order, offsets = reference.task_plan(torch.tensor([0, 7, 0, -1, 0]), 2)
    batch = reference.SortedBatch(order, offsets)
    x, weight = inputs.x.detach(), [p.detach() for p in inputs.weight]
    y, mean, var = reference.task_batch_norm(x, weight, weight, [], [], batch, EPS)
    gx, gw, _ = reference.task_batch_norm_backward(inputs.grad_out, x, weight, mean, var, batch, True, EPS, [True] * 3)
    for out in (y, gx):
        assert torch.isnan(out).flatten(1).all(1).tolist() == [False, True, False, True, False]
    assert torch.isfinite(gw).all() and not gw[1].any()


def test_example_of_the_docstring_is_a_batch_norm_per_task(backend: Backend) -> None:
    x, ids = torch.tensor([[1.0], [10.0], [3.0], [30.0]]), torch.tensor([0, 1, 0, 1])
    y = task_batch_norm(x, ids, None, None, torch.zeros(2, 1), torch.ones(2, 1), training=True)
    for t in (0, 1):
        torch.testing.assert_close(y[ids == t], F.batch_norm(x[ids == t], None, None, training=True))
