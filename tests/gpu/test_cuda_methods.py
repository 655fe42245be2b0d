"""The weights of the Gram methods by one block of a GPU: those of the CPU, without a wait for the host."""

from __future__ import annotations

import pytest
import torch

from fastmtl import methods, ops
from fastmtl.ops.gradients.method_weights import OPTIONS

pytestmark = pytest.mark.gpu
DEFAULTS = {"cagrad": [0.5], "nashmtl": [0.0], "fairgrad": [2.0], "alignedmtl": [0.0, 0.0]}
DEFAULTS |= {"upgrad": [1e-4], "dualproj": [1e-4], "krum": [1.0, 2.0, 1.0], "pcd": [0.0, 0.1]}
DEFAULTS |= {"sdmgrad": [10.0, 0.5, 20.0, 0.3], "modo": [0.01, 0.2]}


@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("num_tasks", [1, 2, 8, 16, 17, 64, 65, 128])
def test_weights(num_tasks: int, method: str) -> None:
    g = torch.randn(num_tasks, 2 * num_tasks + 1, dtype=torch.float64)
    g = g - 0.8 * g.mean(0)
    m, options = g @ g.mT, DEFAULTS.get(method, [])
    present = torch.arange(num_tasks) != 4
    wanted = ops.method_weights(m, method, options, present=present)
    m, present = m.cuda(), present.cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = ops.method_weights(m, method, options, present=present)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-6, atol=1e-6 * wanted.abs().max().item())


@pytest.mark.parametrize("update", ["always", "triggered"])
@pytest.mark.parametrize("num_tasks", [1, 2, 8, 16, 17, 32, 33, 64, 65, 128])
def test_gradvac(num_tasks: int, update: str) -> None:
    g = torch.randn(num_tasks, 2 * num_tasks + 1, dtype=torch.float64)
    m, targets = g @ g.mT, 1.2 * torch.rand(num_tasks, num_tasks, dtype=torch.float64) - 0.6
    order = ops.random_order(num_tasks)
    wanted = ops.gradvac_coefficients(m, order, targets, 0.1, update=update)
    inputs = m.cuda(), order.cuda(), targets.cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = ops.gradvac_coefficients(*inputs, 0.1, update=update)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x.cpu(), y, rtol=1e-9, atol=1e-9 * y.abs().max().item())


def test_captured_steps_of_gradvac_go_on() -> None:
    """Each replay moves the targets on."""
    grads, order = torch.randn(6, 1000, device="cuda"), ops.random_order(6, device="cuda")
    captured, eager = methods.GradVac(0.3, order=order), methods.GradVac(0.3, order=order)
    captured(grads), eager(grads)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = captured(grads)
    for _ in range(3):
        graph.replay()
        torch.testing.assert_close(found, eager(grads))
        torch.testing.assert_close(captured.state_dict()["targets"], eager.state_dict()["targets"])


@pytest.mark.parametrize("method", [name for name in OPTIONS if not methods.get(name).needs])
def test_a_captured_step(method: str) -> None:
    grads, solver = torch.randn(6, 1000, device="cuda"), methods.get(method)
    expected = solver(grads)  # makes what the method keeps, too
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = solver(grads)
    graph.replay()
    torch.testing.assert_close(found, expected)


def with_state() -> list[methods.Method]:
    vectors = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) + 0.01
    pareto = methods.ParetoMTL(vectors, 1, max_start_steps=2)
    order = ops.random_order(4, generator=torch.Generator().manual_seed(0))
    return [
        methods.MoDo(0.05),
        methods.SDMGrad(0.1),
        methods.PCD({"a": 0.1, "c": 0.3}, 0.9),
        methods.GradVac(0.3, order=order),
        methods.CRMOGM(methods.MGDA(), momentum=0.5),
        methods.CRMOGM(methods.UPGrad(), momentum=0.5),
        methods.CRMOGM(methods.SDMGrad(0.1), momentum=0.5),
        pareto,
        # none, but numbers by name that are kept on the device
        methods.UPGrad(preferences={"d": 3.0, "a": 1.0, "b": 2.0, "c": 0.5}),
        methods.SDMGrad(0.1, preferences={"d": 3.0, "a": 1.0, "b": 2.0, "c": 0.5}),
    ]


@pytest.mark.parametrize("which", range(10))
def test_state_advances_in_a_captured_step(which: int) -> None:
    """Each replay goes on from what the one before it has left, and nothing waits for the host."""
    names = ["a", "b", "c", "d"]
    g, other = torch.randn(2, 4, 50, dtype=torch.float64)
    losses = torch.rand(4, dtype=torch.float64)
    on_host, solver = with_state()[which], with_state()[which]
    gram, rest = g @ g.mT, {"losses": losses, "second": g @ other.mT}
    wanted = [on_host.weigh(gram, methods.Seen(names, [True] * 4, **rest)) for _ in range(5)]

    gram, here = gram.cuda(), torch.ones(4, dtype=torch.bool, device="cuda")
    if isinstance(solver, methods.GradVac):
        solver.order = solver.order.cuda()
    seen = methods.Seen(names, here, **{key: x.cuda() for key, x in rest.items()})
    found = [solver.weigh(gram, seen)]  # takes the memory of the state
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found.append(solver.weigh(gram, seen))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        w = solver.weigh(gram, seen)
    for _ in range(3):
        graph.replay()
        found.append(w.clone())
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=1e-8)
