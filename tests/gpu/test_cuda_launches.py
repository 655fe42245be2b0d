"""What a call launches, and that nothing waits: not the host, nor on sm_90 the second launch for the first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import cases_cuda
import pytest
import torch
from cases import BankCase
from cases_cuda import (
    DEVICE,
    driver_version,
    never_early,
    run_python,
    served_by,
    use,
)

from fastmtl import methods
from fastmtl.core import dispatch
from fastmtl.ops import (
    combine,
    gram,
    order_state,
    pcgrad,
    pcgrad_project,
)
from fastmtl.ops.gradients.method_weights import OPTIONS

pytestmark = pytest.mark.gpu
forced = cases_cuda.forced


@pytest.mark.parametrize("order", [None, "given"])
def test_never_waits_for_the_host(order: str | None) -> None:
    grads = BankCase(5, 4097).make(DEVICE)
    lists = [[row[:100], row[100:]] for row in grads]
    given = None if order is None else cases.random_order(5).to(DEVICE)
    weights = torch.ones(5, device=DEVICE)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x in (grads, lists):
            gram(x)
            combine(weights, x)
            pcgrad(x, given)
            pcgrad_project(x, given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def kernels_launched(call: Callable[[], Any]) -> list[str]:
    """What one call has the device do, by name; copies and fills included."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    found = [event for event in recorded.events() if event.device_type == DeviceType.CUDA]
    return [event.name for event in sorted(found, key=lambda event: event.time_range.start)]


@pytest.mark.parametrize("form", ["drawn", "given", "state", "lists"])
@pytest.mark.parametrize("num_tasks", [8, 50])
def test_two_launches(num_tasks: int, form: str, forced: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if served_by(forced) == "reference":
        pytest.skip("the reference is plain torch")
    # filling what torch.empty gives is a launch too
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    grads: Any = BankCase(num_tasks, 100_000).make(DEVICE)
    out: Any = torch.empty_like(grads[0])
    options: dict[str, Any] = {}
    if form == "given":
        options["order"] = cases.random_order(num_tasks).to(DEVICE)
    if form == "state":
        options["generator"] = order_state(0, device=DEVICE)
    if form == "lists":
        grads = [list(row.split((64, 90_000, 9_936))) for row in grads]
        out = list(out.split((64, 90_000, 9_936)))
    with use("pcgrad", forced):
        for _ in range(2):
            pcgrad(grads, out=out, **options)
        launched = kernels_launched(lambda: pcgrad(grads, out=out, **options))
    assert len(launched) == 2, launched
    assert "gram" in launched[0] and "combine" in launched[1]


# RandomWeights, Sum and Mean make their weights by torch; those that look at the gradients have passes of their own
SOLVED = [methods.get(name) for name in (*OPTIONS, "gradvac") if not methods.get(name).needs]
SOLVED += [methods.PCD({"0": 0.5}), methods.UPGrad(preferences=[1.0] * 8), methods.CRMOGM(methods.CAGrad())]


@pytest.mark.parametrize("method", SOLVED, ids=repr)
def test_three_launches(method: methods.Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Gram matrix, the weights with what the method keeps, the weighted sum."""
    if dispatch.unavailable("cuda", "cuda") is not None:
        pytest.skip("no compiled kernels")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    grads = BankCase(8, 100_000).make(DEVICE)
    for _ in range(2):
        method(grads)  # takes the memory of its state
    launched = kernels_launched(lambda: method(grads))
    assert len(launched) == 3, launched
    assert "gram" in launched[0] and "combine" in launched[2]


SAME_BITS = """
import torch
from cases import BankCase, ListCase, random_order
from fastmtl.ops import pcgrad, pcgrad_project

def tensors(x):
    return [x] if isinstance(x, torch.Tensor) else [z for y in x for z in tensors(y)]

def show(name, x):
    total = 0
    for y in tensors(x):
        # a tensor's bytes, each times a number of its own
        byte = y.flatten().view(torch.uint8).to(torch.int64)
        total = total * 31 + int((byte * (torch.arange(byte.numel(), device="cuda") % 1_000_003 + 1)).sum())
    print(name, total % (1 << 64), flush=True)

def steps(bank, order, count):
    # each step reads what the last one's combine wrote, and writes what it still read
    for k in range(count):
        bank[k % len(bank)].copy_(0.3 * pcgrad(bank, order))

for T in (2, 8, 9, 17, 40, 64, 100):
    for P, dtype in ((1000, "float32"), (100_000, "float32"), (300_001, "float32"), (100_000, "bfloat16")):
        case = BankCase(T, P, getattr(torch, dtype))
        order = random_order(T).to("cuda")
        bank = case.make("cuda")
        show(f"{case} once", [pcgrad(bank, order), pcgrad_project(bank, order)])
        steps(bank, order, 20)
        show(f"{case} steps", bank)
        row = bank.clone()
        pcgrad(row, order, out=row[1])
        show(f"{case} in place", row)
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.graph(graph, stream=side):
            steps(bank, order, 4)
        for _ in range(5):
            graph.replay()
        show(f"{case} graph", bank)
for case in (ListCase("nones", 5), ListCase("mixed_dtypes", 19), ListCase("many", 12), ListCase("large", 8)):
    made, order = case.make("cuda"), random_order(case.num_tasks).to("cuda")
    for _ in range(20):
        found = pcgrad(made, order)
    show(str(case), found)
"""


def test_early_launches_give_the_same_bits() -> None:
    """The combine kernel begins while the Gram kernel still solves, unless FASTMTL_PDL=0."""
    if (reason := dispatch.unavailable("cuda", DEVICE)) is not None:
        pytest.skip(reason)
    expected = run_python(SAME_BITS, FASTMTL_PDL="0")
    assert len(expected) == 7 * 4 * 4 + 4
    for _ in range(3):
        assert run_python(SAME_BITS, FASTMTL_PDL="1") == expected


OVERLAP = """
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from cases import BankCase, random_order
from fastmtl.ops import pcgrad

bank, order = BankCase(128, 100_000).make("cuda"), random_order(128).to("cuda")
for _ in range(3):
    pcgrad(bank, order)
torch.cuda.synchronize()
with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
    pcgrad(bank, order)
    torch.cuda.synchronize()
events = {("gram" if "gram" in e.name else "combine"): e.time_range
          for e in recorded.events() if e.device_type == DeviceType.CUDA and "_kernel" in e.name}
print(events["combine"].start < events["gram"].end)
"""


@pytest.mark.parametrize("early", [False, True])
def test_launches_are_early_unless_turned_off(early: bool) -> None:
    """The T x T problem of 128 tasks takes hundreds of microseconds: time enough for the next launch to begin."""
    if (reason := dispatch.unavailable("cuda", DEVICE)) is not None:
        pytest.skip(reason)
    capability = torch.cuda.get_device_capability()
    if (reason := never_early(driver_version(), capability, dispatch.build_info()["cuda_architectures"])) is not None:
        pytest.skip(reason)
    assert run_python(OVERLAP, FASTMTL_PDL=str(int(early)))[-1] == str(early)
