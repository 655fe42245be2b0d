"""TorchJD, at its best settings. Where it is not installed, its entries say so."""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.benchmarks.runner.registry import Candidate

# a call that takes longer is not repeated to find the fastest setting
SLOW_S = 2.0


def torchjd_missing() -> str | None:
    return None if importlib.util.find_spec("torchjd") else "not installed"


def upgrad_missing() -> str | None:
    """Why its UPGrad cannot run: the solver of its quadratic program is an optional dependency."""
    found = all(importlib.util.find_spec(module) for module in ("torchjd", "qpsolvers", "quadprog"))
    return None if found else "not installed"


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


def jacobian_backward(losses: Sequence[Tensor], params: Sequence[nn.Parameter], name: str, chunk: int | None) -> None:
    """`backward` where all parameters are shared, then the aggregator of that name."""
    from torchjd import aggregation
    from torchjd.autojac import backward, jac_to_grad

    backward(losses, inputs=params, parallel_chunk_size=chunk)
    jac_to_grad(params, getattr(aggregation, name)())


def upgrad_weights(gram: Tensor) -> Tensor:
    """`[T]`: what its UPGrad gives for a Gram matrix."""
    from torchjd.aggregation import UPGradWeighting

    return UPGradWeighting()(gram)


def drawn_order(num_tasks: int, seed: int) -> Tensor:
    """The visiting order `[T, T]` that its PCGrad draws, from torch's global generator, right after that seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.stack([torch.randperm(num_tasks) for _ in range(num_tasks)])


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
    importlib.import_module("torchjd.autojac")
    times: dict[int | None, float] = {}
    for chunk in dict.fromkeys((1, min(2, num_tasks), None)):
        begin = time.perf_counter()
        step(chunk)
        # the first call may import and build; a slow one tells all the same
        if time.perf_counter() - begin < SLOW_S:
            begin = time.perf_counter()
            for _ in range(2):
                step(chunk)
            times[chunk] = (time.perf_counter() - begin) / 2
        else:
            times[chunk] = time.perf_counter() - begin
    return min(times, key=lambda chunk: times[chunk])
