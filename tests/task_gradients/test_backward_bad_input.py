"""`fastmtl.backward` on numbers at the edge and scaled losses, and every input it must refuse."""

from __future__ import annotations

import copy

import pytest
import torch
from cases_backward import ORDER, PCGRAD, Table, assert_grads, expected, make, refuses
from torch import Tensor, nn

import fastmtl
from fastmtl import methods

# --- numbers at the edge


@pytest.mark.parametrize("method", ["pcgrad", "sum", "mean", "randomweights"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_non_finite_gradient_shows(backend, method, value):
    rows = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    rows[1, 2] = value
    table = Table(rows)
    fastmtl.backward(table.losses(), method=method)
    assert not torch.isfinite(table.w.grad).all()


def test_a_non_finite_gradient_shows_under_a_zero_weight():
    table = Table(torch.tensor([[1.0, torch.nan], [1.0, 1.0]]))
    fastmtl.backward(table.losses(), method=lambda gram: torch.tensor([0.0, 1.0]))
    assert torch.isnan(table.w.grad[1])


@pytest.mark.parametrize("method", ["pcgrad", "sum", "mean", "randomweights"])
def test_all_zero_gradients_give_zero(backend, method):
    table = Table(torch.zeros(3, 6))
    surgery = fastmtl.backward(table.losses(), method=method)
    assert table.w.grad.tolist() == [0.0] * 6
    assert surgery.grad_norm() == 0 and surgery.cosines().tolist() == torch.zeros(3, 3).tolist()


def test_overflow_shows(backend):
    table = Table(torch.tensor([[1e30, 1e30], [-1e30, 1e29]]))
    surgery = fastmtl.backward(table.losses())
    assert not torch.isfinite(surgery.gram).any() and not torch.isfinite(table.w.grad).any()


def test_subnormal_gradients(backend):
    rows = torch.tensor([[1e-42, 2e-42], [-1e-42, 1e-42]])
    table = Table(rows)
    surgery = fastmtl.backward(table.losses())
    assert bool(torch.isfinite(surgery.gram).all())
    # their products underflow, so no conflict is seen: the plain sum
    torch.testing.assert_close(table.w.grad, rows.sum(0), rtol=0, atol=3e-45)


# --- scaled losses


@pytest.mark.parametrize("scale", [1024.0, torch.tensor(1024.0), torch.tensor([1024.0])])
def test_loss_scale_divides_the_gram_and_not_the_result(scale):
    net, x = make()
    seen = []

    def method(gram: Tensor) -> Tensor:
        seen.append(gram)
        return torch.tensor([1.0, 2.0, 3.0])

    plain = fastmtl.backward(net.losses(x), method=method)
    want = {p: p.grad.double() * 1024 for p in net.parameters()}
    net.zero_grad()
    scaled = fastmtl.backward([loss * 1024.0 for loss in net.losses(x)], method=method, loss_scale=scale)
    assert_grads(want)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(scaled.gram, plain.gram, rtol=1e-5, atol=0)
    torch.testing.assert_close(scaled.grad_norm(), plain.grad_norm(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [False, True])
def test_grad_scaler_steps_or_skips(bad):
    net, x = make()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    before = copy.deepcopy(net.state_dict())
    losses = net.losses(x)
    want = expected(losses, [*net.trunk.parameters()], [*net.heads.parameters()])
    if bad:
        losses[1] = losses[1] * torch.inf
    fastmtl.backward([scaler.scale(loss) for loss in losses], method=PCGRAD, loss_scale=scaler.get_scale())
    scaler.step(optimizer)
    scaler.update()
    for name, p in net.named_parameters():
        step = 0 if bad else 0.1 * want[p]
        torch.testing.assert_close(p.detach().double(), before[name].double() - step, rtol=1e-5, atol=1e-6)
    assert scaler.get_scale() == (256.0 if bad else 512.0)


# --- bad input: refused with a clear error, nothing written


@pytest.mark.parametrize(
    ("losses", "error", "match"),
    [
        (lambda good: [], ValueError, "at least one loss, got none"),
        (lambda good: {}, ValueError, "at least one loss, got none"),
        (lambda good: torch.stack(good)[:0], ValueError, "at least one loss, got none"),
        (lambda good: [None, None], ValueError, "2 times None"),
        (lambda good: [good[0], torch.stack(good)], ValueError, r"loss '1'.*scalar.*\[3\]"),
        (lambda good: {"a": good[0], "depth": good[1].reshape(1)}, ValueError, r"loss 'depth'.*scalar.*\[1\]"),
        (lambda good: [good[0], good[1].detach()], ValueError, "loss '1': needs no gradient"),
        (lambda good: [*good, torch.tensor(0.0)], ValueError, "loss '3': .*a task that is absent is None"),
        (lambda good: torch.stack(good).detach(), ValueError, "loss '0': needs no gradient"),
        (lambda good: {"a": good[0], "b": torch.tensor(3)}, TypeError, "loss 'b'.*int64"),
        (lambda good: [good[0] * 1j], TypeError, "loss '0'.*complex64"),
        (lambda good: [good[0], 0.0], TypeError, "loss '1'.*float"),
        (lambda good: good[0], ValueError, r"1-D tensor.*dict.*shape \[\]; pass the losses, not their sum"),
        (lambda good: torch.stack(good)[None], ValueError, r"shape \[1, 3\]"),
        (lambda good: "abc", TypeError, "got str"),
        (lambda good: 3, TypeError, "got int"),
        (lambda good: [good[0]] * 129, ValueError, "at most 128 losses, got 129"),
        (lambda good: {1: good[0], "1": good[1]}, ValueError, "different names"),
        (lambda good: torch.cat([good[0].expand(2), good[1].reshape(1)]), ValueError, "elements of one vector"),
        (lambda good: torch.stack(good) * torch.stack(good), ValueError, "'0', '1', '2' are elements of one vector"),
        (lambda good: [*(torch.stack(good) ** 2)], ValueError, "elements of one vector.*shared="),
    ],
)
def test_refuses_bad_losses(losses, error, match):
    net, x = make()
    refuses(lambda: fastmtl.backward(losses(net.losses(x)), net), error, match, net)


def test_a_vector_that_cannot_be_followed_works_with_shared():
    net, x = make()
    want = expected(net.losses(x), [*net.trunk.parameters()], [*net.heads.parameters()])
    out = torch.stack([head(net.trunk(x)) for head in net.heads])
    target = torch.tensor([3.0, -3.0, 3.0])[:, None, None]
    fastmtl.backward((out - target).square().mean((1, 2)), shared=net.trunk, method=PCGRAD)
    assert_grads(want)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (lambda net: {"params": []}, ValueError, "params: expected at least one parameter"),
        (lambda net: {"params": nn.ReLU()}, ValueError, "params: expected at least one parameter"),
        (lambda net: {"params": 3}, TypeError, "params: expected a module.*int"),
        (lambda net: {"params": dict(net.named_parameters())}, TypeError, "got dict"),
        (lambda net: {"params": net.named_parameters()}, TypeError, r"params\[0\].*tuple"),
        (lambda net: {"params": [net.trunk[0].weight * 2]}, ValueError, r"params\[0\] of shape \[6, 4\].*computed"),
        (lambda net: {"params": nn.Linear(2, 2)}, ValueError, "no loss reaches any of the 2 parameters"),
        (lambda net: {"params": net, "shared": []}, ValueError, "shared: expected at least one"),
        (lambda net: {"params": net, "shared": nn.Linear(2, 2)}, ValueError, "shared: parameter 'weight'.*not among"),
        (lambda net: {"shared": nn.Linear(2, 2)}, ValueError, "shared: no loss reaches"),
        (lambda net: {"method": "nash"}, ValueError, "'nash'"),
        (lambda net: {"method": methods.PCGrad}, TypeError, r"PCGrad\(\)"),
        (lambda net: {"method": 1}, TypeError, "method.*int"),
        (lambda net: {"method": lambda gram: torch.ones(2)}, ValueError, r"3 weights.*\[2\]"),
        (lambda net: {"method": lambda gram: torch.ones(3).int()}, TypeError, "int32"),
        (lambda net: {"method": lambda gram: None}, TypeError, "NoneType"),
        (lambda net: {"method": methods.PCGrad(order=ORDER + 1)}, ValueError, "order"),
        (lambda net: {"method": methods.PCGrad(order=ORDER[:2])}, ValueError, "order"),
        (lambda net: {"loss_scale": 0.0}, ValueError, "loss_scale.*positive.*0"),
        (lambda net: {"loss_scale": float("nan")}, ValueError, "loss_scale.*nan"),
        (lambda net: {"loss_scale": "big"}, TypeError, "loss_scale.*str"),
        (lambda net: {"loss_scale": torch.ones(2)}, ValueError, r"loss_scale.*\[2\]"),
        (lambda net: {"loss_scale": torch.ones((), dtype=torch.int64)}, TypeError, "loss_scale.*int64"),
        (lambda net: {"features": ()}, ValueError, "features: expected at least one tensor"),
        (lambda net: {"process_group": 1}, TypeError, "process_group: expected a process group or None, got int"),
    ],
)
def test_refuses_bad_arguments(arguments, error, match):
    net, x = make()
    losses = net.losses(x)
    refuses(lambda: fastmtl.backward(losses, **arguments(net)), error, match, net)


def test_refuses_a_sparse_gradient_of_a_shared_parameter():
    net = nn.ModuleDict({"table": nn.Embedding(9, 4, sparse=True), "trunk": nn.Linear(4, 4)})
    h = net["trunk"](net["table"](torch.tensor([1, 2])))
    losses = [h.mean(), -h.square().mean()]
    match = r"'table.weight' of shape \[9, 4\] is shared.*sparse.*shared="
    refuses(lambda: fastmtl.backward(losses, net), TypeError, match, net)
    h = net["trunk"](net["table"](torch.tensor([1, 2])))
    match = r"\(of those that the losses reach\) of shape \[9, 4\] is shared"
    refuses(lambda: fastmtl.backward([h.mean(), -h.square().mean()]), TypeError, match, net)


def test_refuses_shared_parameters_without_a_kernel():
    net = nn.ParameterDict({"z": nn.Parameter(torch.ones(2, dtype=torch.complex32)), "w": nn.Parameter(torch.ones(2))})
    losses = [net["z"].real.float().sum() * net["w"].sum(), net["z"].real.float().sum()]
    refuses(lambda: fastmtl.backward(losses, net), TypeError, "'z'.*complex32: fastmtl.mark_per_task gives it", net)


def test_refuses_shared_parameters_on_several_devices():
    class Away(torch.autograd.Function):
        @staticmethod
        def forward(ctx, p):
            return torch.ones(2)

        @staticmethod
        def backward(ctx, g):
            return torch.empty(2, device="meta")

    near, far = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, device="meta"))
    y = (near * Away.apply(far)).sum()
    with pytest.raises(ValueError, match=r"params\[1\].*on meta, but .*params\[0\].*on cpu"):
        fastmtl.backward([y, y * 2], [near, far])
    assert near.grad is None


def test_an_error_in_a_later_backward_pass_writes_nothing():
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise ArithmeticError("no gradient today")

    net, x = make()
    losses = net.losses(x)
    losses[2] = Fails.apply(losses[2])
    refuses(lambda: fastmtl.backward(losses, net), ArithmeticError, "today", net)


def test_refuses_to_run_on_several_ranks(monkeypatch):
    net, x = make()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    refuses(lambda: fastmtl.backward(net.losses(x), net), RuntimeError, "2 ranks", net)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    fastmtl.backward(net.losses(x), net)


def test_mark_per_task_refuses_other_things():
    with pytest.raises(TypeError, match="int"):
        fastmtl.mark_per_task(3)
    p = nn.Parameter(torch.ones(2))
    assert fastmtl.mark_per_task(p) is p
    assert fastmtl.mark_per_task([p]) == [p]
