"""Groups of parameters on a GPU: values, a number of launches that does not depend on the groups', CUDA graphs."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import cases
import cases_cuda
import pytest
import torch
from cases import ListCase, random_weights
from cases_cuda import DEVICE, served_by
from test_cuda_launches import kernels_launched
from torch import Tensor, nn

import fastmtl
from fastmtl import methods
from fastmtl.core.gradient_rows import accumulate_dtype, first_of_params
from fastmtl.ops import order_state
from fastmtl.ops.gradients import reference
from fastmtl.ops.gradients.arguments import read_lists
from fastmtl.ops.gradients.groups import Grouped, combine_groups_into, gram_groups
from fastmtl.ops.gradients.order import Draw, drawn_orders
from fastmtl.ops.gradients.pcgrad import pcgrad_weights_groups

pytestmark = pytest.mark.gpu
forced = cases_cuda.forced
CASES = [
    *(ListCase(kind, 3, dtype) for kind in ("nones", "mixed_layouts", "mixed_dtypes") for dtype in cases.DTYPES),
    *(ListCase("nones", t, dtype) for t in (2, 8, 9, 17, 40, 64, 128) for dtype in (torch.float32, torch.bfloat16)),
    ListCase("many", 20),
    ListCase("large", 8),
    ListCase("all_none", 2),
]


def grouped(case: ListCase, count: int) -> Grouped:
    """The parameters in all but the last of so many groups, by turns and not in order."""
    rows = read_lists(case.make(DEVICE))
    return Grouped(rows, [(5 * i + 2) % max(count - 1, 1) for i in range(rows.num_params)], count)


def forcing(name: str | None) -> Any:
    return nullcontext() if name is None else fastmtl.use_backend(name)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("count", [1, 4, 400])
def test_gram_and_combine(case: ListCase, count: int, forced: str | None) -> None:
    if served_by(forced) == "triton" and (count == 400 or case.num_tasks > 9):
        pytest.skip("Triton compiles for seconds per kernel, and its kernels are those of the other tests")
    both = grouped(case, count)
    dtype, device = accumulate_dtype([x.dtype for x in both.rows.tensors]), torch.device(DEVICE, 0)
    weights = random_weights((count, case.num_tasks))
    first = first_of_params(both.rows.tensors, both.rows.index, both.rows.num_params)
    with forcing(forced):
        found = [gram_groups(both, dtype, device) for _ in range(3)]
        out = [torch.empty_like(x) for x in first.values()]
        combine_groups_into(weights.to(DEVICE), both, out)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    by_param = dict(zip(first, out, strict=True))
    for k, (m, rows) in enumerate(zip(found[0], both.split(), strict=True)):
        if not rows.tensors:
            assert not bool(m.any())
            continue
        own = [x.dtype for x in rows.tensors]
        tensors = [x.cpu().double() for x in rows.tensors]
        bank = reference.bank_from_lists(tensors, rows.index, rows.num_tasks, rows.num_params)
        cases.assert_gram(m.to(cases.gram_dtype(own)).cpu(), bank, own, cases_cuda.slack(forced, case))
        members = [i for i, group in enumerate(both.groups) if group == k and i in by_param]
        update = torch.cat([by_param[i].flatten().cpu() for i in members]).double()
        unit = max(cases.unit_roundoff(x) for x in own)
        atol = 4 * unit * float(weights[k].abs().sum()) * float(bank.abs().max())
        torch.testing.assert_close(update, weights[k] @ bank, rtol=4 * unit, atol=atol)


@pytest.mark.parametrize("num_tasks", [2, 8, 16, 17, 50, 64, 65, 128])
def test_pcgrad_weights(num_tasks: int, forced: str | None) -> None:
    g = torch.randn(7, num_tasks, num_tasks + 3, dtype=torch.float64)
    m = (g - 0.9 * g.mean(1, keepdim=True)) @ (g - 0.9 * g.mean(1, keepdim=True)).mT
    present = [t % 3 != 1 for t in range(num_tasks)]
    state, twin = order_state(3, device=DEVICE), order_state(3)
    for step in range(3):
        with forcing(forced):
            w = pcgrad_weights_groups(m.to(DEVICE), None, Draw(5, state), mean=True, present=present)
        orders = drawn_orders(Draw(5, twin), 7, num_tasks, torch.device("cpu"))
        assert int(state[1]) == int(twin[1]) == 7 * (step + 1)
        for found, matrix, order in zip(w.cpu(), m, orders, strict=True):
            c = reference.pcgrad_coefficients(matrix, order)
            wanted = torch.where(torch.tensor(present), c[torch.tensor(present)].sum(0) / sum(present), 0.0)
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9 * float(c.abs().sum()))


class Deep(nn.Module):
    """So many layers, of a matrix and a vector each."""

    def __init__(self, depth: int, num_tasks: int = 3) -> None:
        super().__init__()
        self.trunk = nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(24, 24), nn.Tanh())))
        self.heads = nn.ModuleList(nn.Linear(24, 1) for _ in range(num_tasks))

    def losses(self, x: Tensor) -> list[Tensor]:
        h = self.trunk(x)
        return [(head(h) - 3.0 * (-1) ** t).square().mean() for t, head in enumerate(self.heads)]


def launched_by_the_surgery(depth: int, method: Any, groups: str) -> list[str]:
    """Names of the surgery's kernels in one step, which are this package's."""
    torch.manual_seed(0)
    net, x = Deep(depth).to(DEVICE), torch.randn(6, 24, device=DEVICE)

    def step() -> None:
        net.zero_grad()
        fastmtl.backward(net.losses(x), net, method=method, groups=groups)

    for _ in range(2):
        step()
    return [name for name in kernels_launched(step) if "fastmtl" in name and "table" not in name]


@pytest.mark.parametrize("groups", ["layer", "tensor"])
@pytest.mark.parametrize(("name", "solver"), [("pcgrad", "pcgrad_weights"), ("mgda", "method_weights")])
def test_three_launches_however_many_groups(
    groups: str, name: str, solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if served_by(None) != "cuda":
        pytest.skip("other backends have a launch for each group")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    for depth in (1, 30):
        launched = launched_by_the_surgery(depth, name, groups)
        assert len(launched) == 3, launched
        for wanted, kernel in zip(("gram_groups", solver, "combine_groups"), launched, strict=True):
            assert wanted in kernel, launched


@pytest.mark.parametrize("depth", [3, 150])
def test_a_captured_step(depth: int) -> None:
    """Replays give what eager steps give, with an order of its own for each group and replay; 300 groups have more
    tickets than a stream's set."""
    if served_by(None) != "cuda":
        pytest.skip("of the CUDA backend")
    torch.manual_seed(0)
    net, x = Deep(depth).to(DEVICE), torch.randn(6, 24, device=DEVICE)
    state = order_state(1, device=DEVICE)
    method = methods.PCGrad(generator=state)

    def step() -> fastmtl.Surgery:
        net.zero_grad(set_to_none=False)
        return fastmtl.backward(net.losses(x), net, method=method, groups="tensor")

    graph, surgery = cases_cuda.captured(step)
    before, found = state.clone(), []
    for _ in range(3):
        graph.replay()
        found.append((surgery.weights.clone(), [p.grad.clone() for p in net.parameters()]))
    assert int(state[1]) == int(before[1]) + 3 * 2 * depth
    state.copy_(before)
    for weights, grads in found:
        assert torch.equal(step().weights, weights)
        assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), grads, strict=True))
    assert not torch.equal(found[0][0], found[1][0])
