"""Suite `methods`: the weights of each method that one solver makes of a `[T, T]` matrix, over T. Latency: no floor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastmtl import methods, ops
from fastmtl.benchmarks.baselines import peers
from fastmtl.benchmarks.runner.registry import Candidate, Case, Check
from fastmtl.benchmarks.workloads.gradients import random_bank
from fastmtl.core.dispatch import use_backend

TASKS = (2, 8, 64)
PARAMS = 1000
# how far the update may be from the oracle's, over its length: two ways of solving what is conditioned as these are
TOLERANCE = 1e-6
METHODS: dict[str, Callable[[], methods.Method]] = {
    "mgda": methods.MGDA,
    "cagrad": methods.CAGrad,
    "imtlg": methods.IMTLG,
    "config": methods.ConFIG,
    "nashmtl": methods.NashMTL,
    "fairgrad": partial(methods.FairGrad, alpha=2.0),
    "alignedmtl": methods.AlignedMTL,
    "upgrad": methods.UPGrad,
    "dualproj": methods.DualProj,
    "krum": methods.Krum,
    "pcd": methods.PCD,
}
# those whose classes hand an op what they keep from step to step, too
OPS = ("gradvac", "sdmgrad")


def conflicting_gram(num_tasks: int, device: torch.device) -> Tensor:
    """The Gram matrix `[T, T]` of random gradients from which most of what they share is taken: many conflicts."""
    bank = random_bank(num_tasks, PARAMS, torch.float64, device, seed=num_tasks)
    bank = bank - 0.9 * bank.mean(0)
    return bank @ bank.mT


def _solver(name: str, num_tasks: int, device: torch.device) -> tuple[Callable[[Tensor], Tensor], str]:
    """What makes weights of a Gram matrix, and that in words."""
    if name == "sdmgrad":
        options = [10.0, 0.5, 20.0, 0.3]
        return lambda m: ops.method_weights(m, "sdmgrad", options), "fastmtl.ops.method_weights: 20 steps"
    if name == "gradvac":
        order = ops.random_order(num_tasks, generator=ops.order_state(num_tasks, device=device))
        targets = torch.full((num_tasks, num_tasks), 0.1, dtype=torch.float64, device=device)
        return lambda m: ops.gradvac_coefficients(m, order, targets)[0].sum(0), "fastmtl.ops.gradvac_coefficients"
    method = METHODS[name]()
    return method.weights, f"fastmtl.methods: {method!r}"


def _by_reference(weights: Callable[[Tensor], Tensor], gram: Tensor) -> Tensor:
    with use_backend("reference"):
        return weights(gram)


def methods_case(name: str, num_tasks: int, device: torch.device) -> Case:
    """A case of the method of that name: a key of `METHODS`, or one of `OPS`."""
    weights, detail = _solver(name, num_tasks, device)

    def check(gram: Tensor, ours: Callable[[Tensor], Tensor]) -> Check:
        expected = _by_reference(weights, gram)
        wrong = ours(gram) - expected
        # as lengths of the updates: weights may be large where gradients cancel
        error = torch.sqrt((wrong @ gram @ wrong).clamp(min=0) / (expected @ gram @ expected))
        return Check(float(error), TOLERANCE, "the reference on the timed inputs")

    return Case(
        suite="methods",
        name=f"{name} T={num_tasks}",
        op=name,
        covers=frozenset({"gradvac_coefficients" if name == "gradvac" else "method_weights"}),
        params={"T": num_tasks, "dtype": "float64"},
        make=partial(conflicting_gram, num_tasks),
        candidates=(
            Candidate("ours", weights, detail, "ours"),
            Candidate("plain", partial(_by_reference, weights), "the reference: plain torch"),
            peers.weights_candidate(name),
        ),
        check=check,
        quick=num_tasks == 8,
    )


def cases(device: torch.device, quick: bool = False) -> list[Case]:
    """The suite; `quick`: 8 tasks."""
    found = [methods_case(name, num_tasks, device) for name in (*METHODS, *OPS) for num_tasks in TASKS]
    return [case for case in found if case.quick or not quick]
