"""The layers of `fastmtl.nn` on CUDA tensors: against plain torch in float64 on the CPU, in graphs, without waiting."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from cases_layers import CASES, IDS, NAMES, by_hand, filled
from torch import nn

from fastmtl.nn import TaskBatchNorm2d, TaskConv2d, TaskHeads, tasks

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
# heads of any kind ask which tasks have samples
NEVER_WAIT = [name for name in CASES if name != "heads_modules"]


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    """cuDNN and cuBLAS may otherwise round float32 operands to tf32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("ids", [IDS, torch.tensor([0, 2, 2, 0, 0])], ids=["all", "one_absent"])
@pytest.mark.parametrize("name", CASES)
def test_equals_plain_torch(name: str, ids: torch.Tensor) -> None:
    """Values and every gradient; a task without samples has a gradient of zero, or none."""
    case = CASES[name]
    wide, x = filled(case.make()), case.x()
    layer = copy.deepcopy(wide).float()
    wide.load_state_dict(layer.state_dict())
    narrow = x.float() if x.is_floating_point() else x
    with tasks(ids.to(DEVICE)):
        y = case.call(layer.to(DEVICE), narrow.to(DEVICE))
    expected = by_hand(case, wide, narrow.double() if x.is_floating_point() else x, ids)
    torch.testing.assert_close(y.cpu().double(), expected, rtol=1e-4, atol=1e-4)
    g = torch.randn(y.shape)
    y.backward(g.to(DEVICE))
    expected.backward(g.double())
    for key, p in wide.named_parameters():
        found = layer.get_parameter(key).grad
        if p.grad is None:
            assert found is None or not found.any(), key
        else:
            torch.testing.assert_close(found.cpu().double(), p.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NEVER_WAIT)
def test_never_waits_for_the_host(name: str) -> None:
    case = CASES[name]
    layer, x, ids = filled(case.make(), torch.float32).to(DEVICE), case.x().to(DEVICE), IDS.to(DEVICE)
    x = x.float() if x.is_floating_point() else x
    for block in (ids, "sketch"):
        with tasks(block):
            case.call(layer, x).sum().backward()  # kernels are compiled
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with tasks(block):
                case.call(layer, x).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_evaluation_never_waits_for_the_host(gate: float) -> None:
    """Without gradients, where layers on the CPU read gates, and batch norms of one task are torch's own."""
    network = nn.Sequential(TaskConv2d(3, 4, 3, NAMES, gate=gate), TaskBatchNorm2d(4, NAMES)).eval()
    with torch.no_grad():
        for t, name in enumerate(NAMES):
            network[0].delta[name].normal_()
            network[1].running_mean[name].fill_(float(t))
    x = torch.randn(5, 3, 6, 6)
    on_device = copy.deepcopy(network).to(DEVICE)
    for block in (IDS, "sketch"):
        with tasks(block), torch.no_grad():
            expected = network(x)
        given, told = x.to(DEVICE), block if isinstance(block, str) else block.to(DEVICE)
        with tasks(told), torch.no_grad():
            on_device(given)  # kernels are compiled
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with tasks(told), torch.no_grad():
                found = on_device(given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["embedding_taps", "heads_padded", "attention_dense", "layer_norm"])
def test_in_a_graph_with_other_ids(name: str) -> None:
    case = CASES[name]
    layer, x, ids = filled(case.make(), torch.float32).to(DEVICE), case.x().to(DEVICE), IDS.to(DEVICE)
    x = x.float() if x.is_floating_point() else x
    with torch.no_grad(), tasks(ids):
        case.call(layer, x)  # kernels are compiled
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = case.call(layer, x)
    ids.copy_(IDS.flip(0))
    graph.replay()
    with torch.no_grad(), tasks(ids):
        torch.testing.assert_close(y, case.call(layer, x))


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("heads_modules")])
def test_a_sample_of_no_task_is_nan(name: str) -> None:
    """And reads nothing out of bounds; the others are what they were."""
    case = CASES[name]
    layer, x = filled(case.make(), torch.float32).to(DEVICE), case.x().to(DEVICE)
    x = x.float() if x.is_floating_point() else x
    stray = torch.tensor([2, 0, 7, -1, 2], device=DEVICE)
    with torch.no_grad():
        with tasks(IDS.to(DEVICE)):
            expected = case.call(layer, x)
        with tasks(stray):
            y = case.call(layer, x)
    torch.cuda.synchronize()
    assert y[2:4].flatten(1).isnan().any(1).all()
    torch.testing.assert_close(y[[0, 1, 4]], expected[[0, 1, 4]])


def test_heads_of_any_kind() -> None:
    heads = TaskHeads.from_modules({name: nn.Linear(4, 3 + k) for k, name in enumerate(NAMES)}, output="padded").to(
        DEVICE
    )
    heads.heads["photo"].register_forward_hook(lambda *args: None)  # so that they run one after another
    x = torch.randn(5, 4, device=DEVICE)
    with tasks(torch.tensor([2, 0, 7, 0, 2], device=DEVICE)):
        y = heads(x)
    assert y[2].isnan().all()
    torch.testing.assert_close(y[1, :3], heads.heads["photo"](x[1]))
    assert y.shape == (5, 5) and y[1, 3:].isneginf().all()
