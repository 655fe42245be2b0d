"""`fastmtl.optim.PCGrad`: the wrapper for loops written for the older port."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fastmtl
from fastmtl.ops.gradients.reference import pcgrad_loop


@pytest.fixture
def net() -> nn.ModuleDict:
    return nn.ModuleDict({"trunk": nn.Linear(4, 6), "a": nn.Linear(6, 1), "b": nn.Linear(6, 1)})


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def losses(net: nn.ModuleDict) -> list[Tensor]:
    h = net["trunk"](X).tanh()
    # the second pulls the trunk away from where the first does
    return [net["a"](h).mean(), net["b"](h).square().mean() - 2 * (h @ net["a"].weight.detach().mT).mean()]


def expected(net: nn.ModuleDict, reduction: str) -> dict[str, Tensor]:
    """With two tasks the order does not matter, so the wrapper's random one may be used."""
    order = torch.tensor([[1], [0]])
    names = [name for name, _ in net.named_parameters()]
    grads = [
        torch.autograd.grad(loss, [*net.parameters()], materialize_grads=True, retain_graph=True)
        for loss in losses(net)
    ]
    bank = torch.stack([torch.cat([g.flatten() for g in row[:2]]) for row in grads]).double()
    update = getattr(pcgrad_loop(bank, order), reduction)(0)
    out = {names[0]: update[:24].reshape(6, 4), names[1]: update[24:]}
    for i in range(2, 6):
        out[names[i]] = (grads[0][i] + grads[1][i]).double()
    return out


def assert_grads(net: nn.Module, want: dict[str, Tensor]) -> None:
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad.double(), want[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reduction", [None, "mean", "sum"])
def test_a_loop_that_never_calls_zero_grad(net, reduction):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    wrapped = fastmtl.optim.PCGrad(optimizer, **({"reduction": reduction} if reduction else {}))
    for _ in range(3):
        want = expected(net, reduction or "mean")
        before = {name: p.detach().double().clone() for name, p in net.named_parameters()}
        surgery = wrapped.pc_backward(losses(net))
        assert_grads(net, want)
        wrapped.step()
        for name, p in net.named_parameters():
            torch.testing.assert_close(p.detach().double(), before[name] - 0.1 * want[name], rtol=1e-5, atol=1e-6)
    assert isinstance(surgery, fastmtl.Surgery) and bool(surgery.conflicts().any())


def test_what_no_loss_reaches_is_not_stepped_again(net):
    wrapped = fastmtl.optim.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1))
    wrapped.pc_backward(losses(net))
    first, _ = losses(net)
    wrapped.pc_backward({"a": first, "b": None})
    assert net["b"].weight.grad is None and net["a"].weight.grad is not None


def test_an_error_leaves_grad_alone(net):
    wrapped = fastmtl.optim.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1))
    wrapped.pc_backward(losses(net))
    held = [(p.grad, p.grad.clone()) for p in net.parameters()]
    for bad, error in (([], ValueError), ([losses(net)[0], None, 3.0], TypeError), ([torch.ones(())], ValueError)):
        with pytest.raises(error):
            wrapped.pc_backward(bad)
    assert all(p.grad is g and torch.equal(g, copy) for p, (g, copy) in zip(net.parameters(), held, strict=True))


def test_passes_through_to_the_optimizer(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    wrapped = fastmtl.optim.PCGrad(optimizer)
    assert wrapped.optimizer is optimizer and wrapped.param_groups is optimizer.param_groups
    scheduler = torch.optim.lr_scheduler.StepLR(wrapped.optimizer, 1, gamma=0.5)
    wrapped.pc_backward(losses(net))
    wrapped.step()
    scheduler.step()
    assert wrapped.param_groups[0]["lr"] == 0.05
    state = wrapped.state_dict()
    assert state["param_groups"][0]["lr"] == 0.05 and len(state["state"]) == 6
    other = fastmtl.optim.PCGrad(torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.9))
    other.load_state_dict(state)
    assert other.param_groups[0]["lr"] == 0.05
    wrapped.zero_grad(set_to_none=False)
    assert all(p.grad.abs().sum() == 0 for p in net.parameters())
    wrapped.zero_grad()
    assert all(p.grad is None for p in net.parameters())
    assert wrapped.step(lambda: 3.0) == 3.0
    assert "SGD" in repr(wrapped) and "mean" in repr(wrapped)


def test_several_groups_and_frozen_parameters(net):
    net["trunk"].bias.requires_grad_(False)
    groups = [{"params": [*net["trunk"].parameters()]}, {"params": [*net["a"].parameters()], "lr": 1.0}]
    wrapped = fastmtl.optim.PCGrad(torch.optim.Adam(groups))
    wrapped.pc_backward(losses(net))
    assert net["trunk"].bias.grad is None and net["b"].weight.grad is None
    assert net["trunk"].weight.grad is not None and net["a"].weight.grad is not None


def test_refuses_bad_arguments(net):
    with pytest.raises(TypeError, match=r"torch.optim.Optimizer, got Linear"):
        fastmtl.optim.PCGrad(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="'max'"):
        fastmtl.optim.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1), reduction="max")
