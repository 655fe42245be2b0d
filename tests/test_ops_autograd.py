"""How ops are recorded for autograd (`fastmtl/core/autograd.py`): as by torch's own registration, and no tangents."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastmtl import ops

IDS = torch.tensor([0, 1, 2, 1])
F64 = torch.float64


def made() -> tuple[Tensor, Tensor, Tensor]:
    x, scale, shift = torch.randn(4, 5, dtype=F64), torch.randn(3, 5, dtype=F64), torch.randn(3, 5, dtype=F64)
    return x, scale.requires_grad_(), shift


def test_a_tangent_is_refused() -> None:
    x, scale, shift = made()
    tangent = torch.ones_like(scale)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(scale.detach(), tangent)
        with pytest.raises(NotImplementedError, match=r"^fastmtl::task_scale_shift: has no forward-mode derivative"):
            ops.task_scale_shift(x, dual, shift, IDS)
        with pytest.raises(NotImplementedError, match=r"^fastmtl::combine_list: has no forward-mode derivative"):
            ops.combine(torch.ones(2, dtype=F64), [[dual], [scale.detach()]])
        # without one nothing is refused
        ops.task_scale_shift(x, scale, shift, IDS)
    with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
        torch.func.jvp(lambda s: ops.task_scale_shift(x, s, shift, IDS), (scale.detach(),), (tangent,))


def test_a_graph_dies_with_its_result() -> None:
    x, scale, shift = made()
    y = ops.task_scale_shift(x, scale, shift, IDS)
    node = weakref.ref(y.grad_fn)
    assert node() is not None
    del y
    assert node() is None


def test_a_change_in_between_is_seen() -> None:
    x, scale, shift = made()
    y = ops.task_scale_shift(x.requires_grad_(), scale, shift, IDS)
    with torch.no_grad():
        scale.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_modes_see_the_op_and_its_backward() -> None:
    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list[Any] = []
    x, scale, shift = made()
    with Noted():
        ops.task_scale_shift(x, scale, shift, IDS).sum().backward()
    for op in (torch.ops.fastmtl.task_scale_shift, torch.ops.fastmtl.task_scale_shift_backward):
        assert op.default in seen


def test_a_tensor_given_twice_gets_the_sum() -> None:
    x, scale, _ = made()
    ops.task_scale_shift(x, scale, scale, IDS).sum().backward()
    expected = torch.zeros(3, 5, dtype=F64).index_add_(0, IDS, x + 1)
    torch.testing.assert_close(scale.grad, expected)


def test_of_several_results_one_may_go_unused() -> None:
    """Batch norm by task: y, means and variances."""
    x = torch.randn(4, 3, 2, 2, dtype=F64, requires_grad=True)
    weight = [torch.ones(3, dtype=F64, requires_grad=True) for _ in range(3)]
    plan = ops.task_plan(IDS, 3)
    y, *_ = torch.ops.fastmtl.task_batch_norm(x, weight, [], [], [], plan.order, plan.offsets, 1e-5)
    y[:, 0].square().sum().backward()
    assert x.grad is not None and x.grad[:, 0].abs().sum() > 0 and not x.grad[:, 1:].any()
    assert all(w.grad is not None and w.grad[0] != 0 and not w.grad[1:].any() for w in weight)


# --- the ops as functions of what can have a gradient: results as one tensor

Differentiable = tuple[Callable[..., Tensor], list[Tensor]]


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=F64, requires_grad=True) for shape in shapes]


def scale_shift() -> Differentiable:
    return lambda x, a, b: ops.task_scale_shift(x, a, b, IDS), leaves((4, 5), (3, 5), (3, 5))


def linear() -> Differentiable:
    inputs = leaves((4, 5), (6, 5), (3,), (3, 6), *[(6, 5)] * 3)
    return lambda x, w, s, b, *delta: ops.task_linear(x, w, list(delta), IDS, gate=s, bias=b), inputs


def conv() -> Differentiable:
    return lambda x, w, delta: ops.task_conv2d(x, w, delta, IDS, padding=1), leaves(
        (4, 2, 3, 3), (2, 2, 3, 3), (3, 2, 2, 3, 3)
    )


def lora() -> Differentiable:
    inputs = leaves((4, 5), (6, 5), *[(2, 5)] * 3, *[(6, 2)] * 3)
    return lambda x, w, *ab: ops.task_lora(x, w, list(ab[:3]), list(ab[3:]), IDS), inputs


def batch_norm() -> Differentiable:
    inputs = leaves((4, 5, 3), *[(5,)] * 6)
    return lambda x, *wb: ops.task_batch_norm(x, IDS, list(wb[:3]), list(wb[3:]), training=True), inputs


def combine_lists() -> Differentiable:
    inputs = leaves((2,), (3,), (2,), (3,), (2,))
    return lambda w, *g: torch.cat(ops.combine(w, [list(g[:2]), list(g[2:])])), inputs


def value(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def weighted(*inputs: Tensor) -> Tensor:
        y = op(*inputs)
        return (y * torch.arange(1.0, 1 + y.numel(), dtype=F64).view_as(y)).sin().sum()

    return weighted


EVERY = [scale_shift, linear, conv, lora, batch_norm, combine_lists]
each_op = pytest.mark.parametrize("make", EVERY, ids=lambda make: make.__name__)


@pytest.mark.parametrize("make", [scale_shift, linear, combine_lists], ids=lambda make: make.__name__)
def test_threads_go_backward_through_one_graph(make: Callable[[], Differentiable]) -> None:
    op, inputs = make()
    meet = threading.Barrier(2)
    apart = False

    def unpack(x: Tensor) -> Tensor:
        if not apart:
            meet.wait(60)  # both are inside the formula
        return x

    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
        y = op(*inputs)
    # each thread wants the gradients of others
    wanted, cotangent = [inputs, inputs[1:2]], torch.randn_like(y)
    found: list[Any] = [None, None]

    def backward(k: int) -> None:
        try:
            found[k] = torch.autograd.grad(y, wanted[k], cotangent, retain_graph=True)
        except Exception as error:  # seen below, in the thread of the test
            found[k] = error
            meet.abort()

    threads = [threading.Thread(target=backward, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    apart = True
    for got, some in zip(found, wanted, strict=True):
        expected = torch.autograd.grad(y, some, cotangent, retain_graph=True)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@each_op
def test_nothing_outlives_a_derivative_of_a_derivative(make: Callable[[], Differentiable]) -> None:
    op, inputs = make()
    gc.disable()
    try:
        y = op(*inputs)
        grads = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in grads), inputs, allow_unused=True)
        held = [weakref.ref(x) for x in inputs]
        del y, grads, inputs
        assert [x() is None for x in held] == [True] * len(held)
    finally:
        gc.enable()


@each_op
def test_saved_tensors_may_be_elsewhere(make: Callable[[], Differentiable], tmp_path: Path) -> None:
    """On disk, or not saved at all: made again by a checkpoint of either kind."""

    def pack(x: Tensor) -> Path:
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        torch.save(x, path)
        return path

    op, inputs = make()
    with torch.autograd.graph.saved_tensors_hooks(pack, torch.load):
        kept_on_disk = op(*inputs)
    y = op(*inputs)
    cotangent = torch.randn_like(y)
    expected = torch.autograd.grad(y, inputs, cotangent)
    results = [kept_on_disk, *(checkpoint(op, *inputs, use_reentrant=reentrant) for reentrant in (False, True))]
    for other in results:
        for x in inputs:
            x.grad = None
        other.backward(cotangent)
        torch.testing.assert_close([x.grad for x in inputs], list(expected), rtol=0, atol=0)


@pytest.mark.parametrize("make", EVERY[:5], ids=lambda make: make.__name__)
def test_backward_passes_inside_autocast_are_as_outside(make: Callable[[], Differentiable]) -> None:
    op, inputs = make()
    inputs = [x.detach().float().requires_grad_() for x in inputs]

    def twice() -> list[tuple[Tensor | None, ...]]:
        grads = torch.autograd.grad(y, inputs, cotangent, create_graph=True)
        length = sum(g.square().sum() for g in grads)
        return [grads, torch.autograd.grad(length, inputs, allow_unused=True)]

    y = op(*inputs)
    cotangent = torch.randn_like(y)
    outside = twice()
    with torch.autocast("cpu", torch.bfloat16):
        inside = twice()
    for some, others in zip(inside, outside, strict=True):
        for a, b in zip(some, others, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("make", [linear, batch_norm], ids=lambda make: make.__name__)
def test_a_compiled_backward_pass(make: Callable[[], Differentiable], fresh_compiler: None) -> None:
    """Compiled autograd, where the compiler reads the formulas."""
    op, inputs = make()
    expected = torch.autograd.grad(value(op)(*inputs), inputs)
    loss = value(op)(*inputs)
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda: loss.backward(), backend="aot_eager")()
    torch.testing.assert_close([x.grad for x in inputs], list(expected))


# --- torch.func


@each_op
def test_torch_func_grad_is_autograds(make: Callable[[], Differentiable]) -> None:
    op, inputs = make()
    every = tuple(range(len(inputs)))
    expected = torch.autograd.grad(value(op)(*inputs), inputs, create_graph=True)
    found = torch.func.grad(value(op), every)(*inputs)  # recorded, as the inputs need gradients
    torch.testing.assert_close(found, expected)
    second = torch.autograd.grad(sum(g.square().sum() for g in expected), inputs, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(sum(g.square().sum() for g in found), inputs), second)

    def length(*inputs: Tensor) -> Tensor:
        return sum(g.square().sum() for g in torch.func.grad(value(op), every)(*inputs))

    torch.testing.assert_close(torch.func.grad(length, every)(*(x.detach() for x in inputs)), second)


@each_op
def test_torch_func_vmap_is_a_loop(make: Callable[[], Differentiable]) -> None:
    op, inputs = make()
    every = tuple(range(len(inputs)))
    stacked = [torch.stack([x, -2 * x], dim=-1).detach().requires_grad_() for x in inputs]
    slices = [[x[..., k] for x in stacked] for k in range(2)]
    mapped = torch.func.vmap(op, in_dims=-1)(*stacked)
    expected = torch.stack([op(*each) for each in slices])
    torch.testing.assert_close(mapped, expected)
    cotangent = torch.randn_like(mapped)
    grads = (torch.autograd.grad(y, stacked, cotangent) for y in (mapped, expected))
    torch.testing.assert_close(next(grads), next(grads))
    found = torch.func.vmap(torch.func.grad(value(op), every), in_dims=-1, out_dims=-1)(*stacked)
    one_by_one = [torch.func.grad(value(op), every)(*each) for each in slices]
    torch.testing.assert_close(found, tuple(torch.stack(gs, -1) for gs in zip(*one_by_one, strict=True)))


def test_torch_func_of_ids_that_differ_and_of_jacobians() -> None:
    op, (x, scale, shift) = scale_shift()
    ids = torch.stack([IDS, IDS.flip(0)])
    mapped = torch.func.vmap(lambda i: ops.task_linear(x, None, [scale, shift, scale], i))(ids)
    torch.testing.assert_close(mapped[1], ops.task_linear(x, None, [scale, shift, scale], ids[1]))
    jacobian = torch.func.jacrev(op)(x, scale, shift)
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(lambda x: op(x, scale, shift), x))
    with pytest.raises(NotImplementedError, match=r"^fastmtl::task_linear: vmap needs at least one slice, got 0"):
        torch.func.vmap(lambda x: ops.task_linear(x, None, scale[:, None], IDS))(torch.ones(0, 4, 5, dtype=F64))


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("op", ["task_linear", "task_lora", "task_scale_shift"])
def test_results_may_be_written_into(op: str, grad: bool) -> None:
    """As those of `F.linear` may (`nn.ReLU(inplace=True)`), whatever was reshaped inside."""
    x, weight = torch.randn(4, 5, 3, dtype=F64), torch.randn(2, 3, dtype=F64, requires_grad=True)
    a, b = [torch.randn(1, 3, dtype=F64) for _ in range(3)], [torch.randn(2, 1, dtype=F64) for _ in range(3)]
    table = torch.randn(3, 5, dtype=F64)
    calls: dict[str, Callable[[], Tensor]] = {
        "task_linear": lambda: ops.task_linear(x, weight, [torch.ones(2, 3, dtype=F64)] * 3, IDS),
        "task_lora": lambda: ops.task_lora(x, weight, a, b, IDS),
        "task_scale_shift": lambda: ops.task_scale_shift(x, weight.new_ones(3, 5) * weight.sum(), table, IDS),
    }
    found = []
    for write in (lambda y: y.mul_(y.detach() * 2), lambda y: y * (y.detach() * 2)):
        with torch.set_grad_enabled(grad):
            y = calls[op]()
        y = write(y)
        found.append([y] if not grad else [y, *torch.autograd.grad(y.sum(), [weight])])
    assert all(map(torch.equal, *found))
