"""TorchJD, at its best settings. Where it is not installed, its entries say so."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.benchmarks.registry import Candidate


def torchjd_missing() -> str | None:
    return None if importlib.util.find_spec("torchjd") else "not installed"


def aggregate(grads: Tensor) -> Tensor:
    """PCGrad's aggregator on a `[T, P]` matrix; it draws its own order."""
    from torchjd.aggregation import PCGrad

    return PCGrad()(grads)


def coefficients(gram: Tensor) -> Tensor:
    from torchjd.aggregation import PCGradWeighting

    return PCGradWeighting()(gram)


def jacobian_params(grads: Sequence[Sequence[Tensor]]) -> list[nn.Parameter]:
    """Parameters with the `.jac` fields that TorchJD's own backward would have left."""
    params = []
    for rows in zip(*grads, strict=True):
        p = nn.Parameter(torch.zeros_like(rows[0]))
        p.jac = torch.stack(rows)  # type: ignore[attr-defined]
        params.append(p)
    return params


def jacobians_to_grads(params: Sequence[nn.Parameter], *, gramian: bool) -> list[Tensor | None]:
    """`jac_to_grad`; `gramian`: parameter by parameter, without the concatenated Jacobian."""
    from torchjd.aggregation import PCGrad
    from torchjd.autojac import jac_to_grad

    jac_to_grad(params, PCGrad(), retain_jac=True, optimize_gramian_computation=gramian)
    grads = [p.grad for p in params]
    # the next call starts without: `jac_to_grad` would add, and peak memory would miss what it replaces
    for p in params:
        p.grad = None
    return grads


def candidate(
    label: str, call: Callable[[Any], Any], detail: str, *, traffic: int = 0, only_if: str | None = None
) -> Candidate:
    """A TorchJD candidate, unavailable where the package is (or for the reason `only_if`)."""
    return Candidate(label, call, f"TorchJD: {detail}", traffic=traffic, unavailable=torchjd_missing() or only_if)


def backward(losses: Sequence[Tensor], features: Tensor, shared: Sequence[nn.Parameter], chunk: int | None) -> None:
    """`mtl_backward`, then PCGrad's aggregator on the shared parameters."""
    from torchjd.aggregation import PCGrad
    from torchjd.autojac import jac_to_grad, mtl_backward

    mtl_backward(losses, features, shared_params=shared, parallel_chunk_size=chunk)
    jac_to_grad(shared, PCGrad())


def engine(module: nn.Module) -> Any:
    """Its autogram engine on the shared part; `batch_dim=None`, since the losses are means over the batch."""
    from torchjd.autogram import Engine

    return Engine(module, batch_dim=None)


def engine_backward(losses: Sequence[Tensor], engine: Any) -> None:
    from torchjd.aggregation import PCGradWeighting

    stacked = torch.stack(list(losses))
    stacked.backward(PCGradWeighting()(engine.compute_gramian(stacked)))


def tune_chunk(step: Callable[[int | None], None], num_tasks: int) -> int | None:
    """The fastest `parallel_chunk_size`, of one at a time, two, and all at once."""
    times: dict[int | None, float] = {}
    for chunk in dict.fromkeys((1, min(2, num_tasks), None)):
        step(chunk)
        begin = time.perf_counter()
        for _ in range(2):
            step(chunk)
        times[chunk] = time.perf_counter() - begin
    return min(times, key=lambda chunk: times[chunk])
