"""`one_pass` on a GPU: the rows of T backward passes, without waiting for the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases_cuda import captured
from cases_one_pass import IDS, MODELS, T, assert_rows, cross_entropy, expected_rows
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastmtl

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
ORDER = torch.arange(T).repeat(T, 1)


@pytest.fixture(autouse=True)
def labels_on_the_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import cases_one_pass

    monkeypatch.setattr(cases_one_pass, "LABELS", cases_one_pass.LABELS.to(DEVICE))
    monkeypatch.setattr(cases_one_pass, "IDS", IDS.to(DEVICE))
    # torch has no deterministic backward of some layers on a GPU, pooling among them; what tests/conftest.py asked for
    # fills uninitialised memory as well, which stays
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(True)


def _made(name: str) -> tuple[Any, nn.Module, Tensor]:
    torch.manual_seed(0)
    case = MODELS[name]
    x = case.x()
    model = case.model().to(DEVICE).eval()  # dropout apart, which the CPU cases have
    for layer in model.modules():
        if isinstance(layer, nn.RNNBase):
            layer.train()  # cuDNN has no backward pass in eval mode
    return case, model, x.to(DEVICE, torch.float32 if x.is_floating_point() else x.dtype)


def _mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5)).to(DEVICE)


@pytest.mark.parametrize("ids_on", ["cpu", DEVICE])
@pytest.mark.parametrize("name", MODELS)
def test_rows(name: str, ids_on: str) -> None:
    case, model, x = _made(name)
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        rows = expected_rows(case, model, x, IDS.to(DEVICE))
        with fastmtl.one_pass(model, IDS.to(ids_on), T, batch_dim=case.batch_dim, **case.arguments) as bank:
            case.per_sample(model(x)).sum().backward()
        assert_rows(bank, rows, 1e-4)
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
    bank.apply(fastmtl.methods.PCGrad(order=ORDER.to(DEVICE)))


@pytest.mark.parametrize("memory", ["bank", "stream"])
def test_never_waits_for_the_host(memory: str) -> None:
    model, x = _mlp(), torch.randn(8, 6, device=DEVICE)
    ids, order = torch.tensor([0, 2, 2, 0, 0, 2, -1, 0], device=DEVICE), ORDER.to(DEVICE)
    for _ in range(2):  # the first step compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            with fastmtl.one_pass(model, ids, T, memory=memory) as bank:
                cross_entropy(model(x)).sum().backward()
            surgery = bank.apply(fastmtl.methods.PCGrad(order=order))
        except RuntimeError as error:
            assert "synchroniz" not in str(error), error
            raise
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert surgery.present.tolist() == [True, False, True]
    assert surgery.weights[1] == 0


def test_ids_out_of_range_make_the_update_nan() -> None:
    model, x = _mlp(), torch.randn(8, 6, device=DEVICE)
    ids = torch.tensor([0, 2, 7, 0, 0, 2, -1, 0], device=DEVICE)
    with fastmtl.one_pass(model, ids, T) as bank:
        cross_entropy(model(x)).sum().backward()
    bank.apply("sum")
    assert all(p.grad.isnan().any() for p in model.parameters())


def test_batch_norm_by_other_tasks_is_nan_in_a_captured_step() -> None:
    """The host can't compare the tasks of the statistics with those of the bank there."""
    torch.manual_seed(0)
    norm = fastmtl.nn.TaskBatchNorm2d(4, T)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).to(DEVICE)
    x, ids = torch.randn(8, 3, 5, 5, device=DEVICE), torch.tensor([0, 2, 1, 0, 0, 2, 1, 0], device=DEVICE)
    of_the_norm = ids.clone()

    def step() -> fastmtl.Surgery:
        model.zero_grad(set_to_none=False)
        with fastmtl.nn.tasks(of_the_norm), fastmtl.one_pass(model, ids, T) as bank:
            cross_entropy(model(x)).sum().backward()
        return bank.apply("sum")

    graph, _ = captured(step)
    shared = [p for name, p in model.named_parameters() if not name.startswith("1.")]
    # the same tasks, the same under other names, statistics over samples of several tasks
    for told, finite in ((ids, True), ((ids + 1) % T, True), (ids.roll(1), False)):
        of_the_norm.copy_(told)
        graph.replay()
        assert all(bool(p.grad.isfinite().all()) is finite for p in shared), told


def test_checkpoints_are_recomputed_on_threads_of_autograd() -> None:
    model, x = _mlp(), torch.randn(8, 6, device=DEVICE)
    losses = cross_entropy(model(x))
    params = list(model.parameters())
    want = [list(torch.autograd.grad(losses[IDS.to(DEVICE) == t].sum(), params, retain_graph=True)) for t in range(T)]
    with fastmtl.one_pass(model, IDS, T) as bank:
        cross_entropy(checkpoint(model, x, use_reentrant=False)).sum().backward()
    assert_rows(bank, want, 1e-4)


def test_float16_autocast_and_scaler() -> None:
    model, x = _mlp(), torch.randn(8, 6, device=DEVICE)
    scaler = torch.amp.GradScaler("cuda", init_scale=256.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with fastmtl.one_pass(model, IDS, T) as bank:
        with torch.autocast("cuda", torch.float16):
            loss = cross_entropy(model(x).float()).sum()
        scaler.scale(loss).backward()
    bank.apply("sum", loss_scale=scaler.get_scale())
    scaler.unscale_(optimizer)
    want = torch.autograd.grad(cross_entropy(model(x)).sum(), list(model.parameters()))
    for p, g in zip(model.parameters(), want, strict=True):
        assert (p.grad - g).norm() < 2e-2 * g.norm()
