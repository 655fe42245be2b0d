"""What the same work looks like without fastmtl: as people write it, and as well as plain PyTorch can."""

from __future__ import annotations

import copy
import random
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# columns per block of `blocked_gram`: eight float32 rows of it stay in a second-level cache
BLOCK = 4096


def visiting_order(num_tasks: int, order: Tensor | None) -> list[list[int]]:
    """The given order as lists, or a random one."""
    if order is not None:
        return order.tolist()
    return [random.sample(range(num_tasks), num_tasks) for _ in range(num_tasks)]


# --- naive: what is found in most repositories


def naive_gram(rows: Sequence[Tensor]) -> Tensor:
    """T² dot products of flat gradients, one Python line at a time."""
    m = torch.zeros(len(rows), len(rows))
    for i, g_i in enumerate(rows):
        for j, g_j in enumerate(rows):
            m[i, j] = torch.dot(g_i, g_j).item()
    return m


def naive_combine(weights: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """`sum_t w_t g_t`, one term after the other."""
    total = torch.zeros_like(rows[0])
    for w, g in zip(weights, rows, strict=True):
        total = total + w.to(g.dtype) * g
    return total


def naive_project(rows: Sequence[Tensor], order: Tensor | None) -> list[Tensor]:
    """PCGrad as the paper's pseudo-code reads: a clone per task, and a host wait at every `if`."""
    projected = []
    for i, visits in enumerate(visiting_order(len(rows), order)):
        g = rows[i].clone()
        for j in visits:
            if j == i:
                continue
            dot = torch.dot(g, rows[j])
            if dot < 0:
                g -= dot / (rows[j].norm() ** 2) * rows[j]
        projected.append(g)
    return projected


def naive_pcgrad(rows: Sequence[Tensor], order: Tensor | None) -> Tensor:
    return torch.stack(naive_project(rows, order)).sum(0)


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1) for x in tensors])


def unflatten(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    return [x.view_as(y) for x, y in zip(flat.split([y.numel() for y in like]), like, strict=True)]


class PortPCGrad:
    """An optimizer wrapper of the kind most people copy: flat, zero-padded gradients and a T² loop of dots.

    Heads are part of the flat vectors, so they count in the projections; parameters that all losses reach get the
    reduced projected gradient, the others its sum.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, reduction: str = "mean") -> None:
        self.optimizer = optimizer
        self.reduction = reduction

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        self.optimizer.step()

    def pc_backward(self, losses: Sequence[Tensor]) -> None:
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        rows, reached = [], []
        for loss in losses:
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward(retain_graph=True)
            rows.append(flatten(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params))
            reached.append(flatten(torch.full_like(p, float(p.grad is not None)) for p in params))
        shared = torch.stack(reached).prod(0).bool()
        projected, others = copy.deepcopy(rows), list(rows)
        for g_i in projected:
            random.shuffle(others)
            for g_j in others:
                dot = torch.dot(g_i, g_j)
                if dot < 0:
                    g_i -= dot * g_j / (g_j.norm() ** 2)
        stacked = torch.stack(projected)
        merged = torch.zeros_like(stacked[0])
        merged[shared] = stacked[:, shared].mean(0) if self.reduction == "mean" else stacked[:, shared].sum(0)
        merged[~shared] = stacked[:, ~shared].sum(0)
        for p, g in zip(params, unflatten(merged, params), strict=True):
            p.grad = g


# --- the best plain PyTorch that a competent person would write


def solve(gram: Tensor, order: Tensor | None) -> Tensor:
    """PCGrad's coefficients from the Gram matrix, all rows at once, without waiting for the host."""
    m = gram.to(torch.float64)
    num_tasks = m.shape[0]
    if order is None:
        order = torch.rand(num_tasks, num_tasks, device=m.device).argsort(1)
    rows = torch.arange(num_tasks, device=m.device)
    norms = m.diagonal()
    c = torch.eye(num_tasks, dtype=m.dtype, device=m.device)
    for j in order.unbind(1):
        d = (c * m[j]).sum(1).clamp_(max=0.0)
        d = d.masked_fill_(j == rows, 0.0)
        c[rows, j] -= d / norms[j]
    return c


def plain_combine(weights: Tensor, grads: Tensor, out: Tensor | None = None) -> Tensor:
    w = weights.to(grads.dtype)
    return w @ grads if out is None else torch.mm(w[None], grads, out=out[None])[0]


def plain_pcgrad(grads: Tensor, order: Tensor | None, out: Tensor | None = None) -> Tensor:
    """One `G @ G.T`, the T x T problem, one `w @ G`."""
    return plain_combine(solve(grads @ grads.T, order).sum(0), grads, out)


def plain_project(grads: Tensor, order: Tensor | None) -> Tensor:
    return solve(grads @ grads.T, order).to(grads.dtype) @ grads


def blocked_gram(grads: Tensor) -> Tensor:
    """`G @ G.T` as a batched product over blocks of columns; on a CPU the one product is slow for long rows."""
    if grads.dtype not in (torch.float32, torch.float64):
        # the batched product of 16-bit types is slower than the one product
        return grads @ grads.T
    whole = grads.shape[1] // BLOCK * BLOCK
    blocks = grads[:, :whole].unflatten(1, (-1, BLOCK)).transpose(0, 1)  # [P / BLOCK, T, BLOCK]
    rest = grads[:, whole:]
    return torch.bmm(blocks, blocks.mT).sum(0) + rest @ rest.T


def axpy_combine(weights: Tensor, grads: Tensor, out: Tensor | None = None) -> Tensor:
    """`w @ G` as T passes of `add_`; on a CPU faster than the matrix-vector product."""
    first, *others = weights.tolist()
    total = torch.mul(grads[0], first, out=out)
    for w, g in zip(others, grads[1:], strict=True):
        total.add_(g, alpha=w)
    return total


def blocked_pcgrad(
    grads: Tensor,
    order: Tensor | None,
    out: Tensor | None = None,
    *,
    combine: Callable[[Tensor, Tensor, Tensor | None], Tensor] = axpy_combine,
) -> Tensor:
    return combine(solve(blocked_gram(grads), order).sum(0), grads, out)


class Compiled:
    """`torch.compile` of a function of tensors, without dynamic shapes; compiled at the first call.

    Every instance has code of its own: what was compiled for one case is no entry in the next one's cache, which is
    searched at each call and has a limit.
    """

    def __init__(self, function: Callable[..., Any], mode: str) -> None:
        code = function.__code__
        # equal to the original, but another object
        own = types.FunctionType(
            code.replace(), function.__globals__, function.__name__, function.__defaults__, function.__closure__
        )
        self._call = torch.compile(own, mode=mode, dynamic=False, fullgraph=True)

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)


# --- a whole step


def plain_backward(losses: Sequence[Tensor], model: nn.Module, shared: Sequence[nn.Parameter]) -> None:
    """PCGrad in a training step, in plain PyTorch: the shared gradients in one bank, the heads' as they are."""
    taken = {id(p) for p in shared}
    own = [p for p in model.parameters() if id(p) not in taken]
    bank = torch.empty(len(losses), sum(p.numel() for p in shared), device=shared[0].device)
    for t, loss in enumerate(losses):
        last = t == len(losses) - 1
        grads = torch.autograd.grad(loss, [*shared, *own], retain_graph=not last, allow_unused=True)
        torch.cat([g.reshape(-1) for g in grads[: len(shared)]], out=bank[t])
        for p, g in zip(own, grads[len(shared) :], strict=True):
            if g is not None:
                p.grad = g
    for p, g in zip(shared, unflatten(plain_pcgrad(bank, None), shared), strict=True):
        p.grad = g
