"""What the tests of `fastmtl.backward` share: a net, its gradients computed apart in float64, and refusals."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmtl
from fastmtl import methods
from fastmtl.ops.gradients.reference import pcgrad_loop

ORDER = torch.tensor([[1, 2, 0], [2, 0, 1], [0, 1, 2]])
PCGRAD = methods.PCGrad(order=ORDER)


class Net(nn.Module):
    """A trunk and T heads."""

    def __init__(self, num_tasks: int = 3, width: int = 6) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(width, 2) for _ in range(num_tasks))

    def losses(self, x: Tensor) -> list[Tensor]:
        h = self.trunk(x)
        # pulled to opposite targets, so that tasks conflict
        return [F.mse_loss(head(h), torch.full((len(x), 2), 3.0 * (-1) ** t)) for t, head in enumerate(self.heads)]


def make(num_tasks: int = 3, seed: int = 0) -> tuple[Net, Tensor]:
    torch.manual_seed(seed)
    return Net(num_tasks), torch.randn(5, 4)


def grad64(loss: Tensor | None, params: Sequence[Tensor]) -> list[Tensor]:
    if loss is None:
        return [torch.zeros(p.shape, dtype=torch.float64) for p in params]
    grads = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
    return [
        torch.zeros(p.shape, dtype=torch.float64) if g is None else g.to_dense().double()
        for p, g in zip(params, grads, strict=True)
    ]


def expected(
    losses: Sequence[Tensor | None], shared: Sequence[Tensor], own: Sequence[Tensor], order: Tensor = ORDER
) -> dict[Tensor, Tensor]:
    """Flatten, project by the loop of the paper, sum: all in float64; absent tasks must not be in `order`."""
    bank = torch.stack([torch.cat([g.flatten() for g in grad64(loss, shared)]) for loss in losses])
    rows = [t for t, loss in enumerate(losses) if loss is not None]
    update = pcgrad_loop(bank, order)[rows].sum(0)
    out = dict(zip(shared, update.split([p.numel() for p in shared]), strict=True))
    for i, total in enumerate(zip(*[grad64(loss, own) for loss in losses], strict=True)):
        out[own[i]] = sum(total)
    return {p: g.reshape(p.shape) for p, g in out.items()}


def assert_grads(want: dict[Tensor, Tensor], rtol: float = 1e-4, atol: float = 1e-6) -> None:
    for p, g in want.items():
        assert p.grad is not None
        torch.testing.assert_close(p.grad.to_dense().double(), g, rtol=rtol, atol=atol)


def in_conflict(surgery: fastmtl.Surgery) -> bool:
    return bool(surgery.conflicts().any())


class Table(nn.Module):
    """Task t's gradient of `w` is row t."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows
        self.w = nn.Parameter(torch.zeros(rows.shape[1], dtype=rows.dtype))

    def losses(self) -> list[Tensor]:
        return [(row * self.w).sum() for row in self.rows]


def refuses(call: Callable[[], object], error: type[Exception], match: str, model: nn.Module) -> None:
    before = {p: torch.randn_like(p) if i % 2 else None for i, p in enumerate(model.parameters()) if not p.is_complex()}
    for p, g in before.items():
        p.grad = None if g is None else g.clone()
    with pytest.raises(error, match=match):
        call()
    for p, g in before.items():
        assert p.grad is None if g is None else torch.equal(p.grad, g)
        p.grad = None
