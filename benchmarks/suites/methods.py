"""Suite `methods`: the weights of each method that needs the Gram matrix alone, over T. Latency: no floor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastmtl import methods
from fastmtl.benchmarks.baselines import peers
from fastmtl.benchmarks.runner.registry import Candidate, Case, Check
from fastmtl.benchmarks.workloads.gradients import random_bank
from fastmtl.core.dispatch import use_backend
from fastmtl.methods.gram_method import GramMethod

TASKS = (2, 8, 64)
PARAMS = 1000
# how far the update may be from the oracle's, over its length: two ways of solving what is conditioned as these are
TOLERANCE = 1e-6
METHODS: dict[str, Callable[[], GramMethod]] = {
    "mgda": methods.MGDA,
    "cagrad": methods.CAGrad,
    "imtlg": methods.IMTLG,
    "config": methods.ConFIG,
    "nashmtl": methods.NashMTL,
    "fairgrad": partial(methods.FairGrad, alpha=2.0),
    "alignedmtl": methods.AlignedMTL,
    "upgrad": methods.UPGrad,
    "dualproj": methods.DualProj,
}


def conflicting_gram(num_tasks: int, device: torch.device) -> Tensor:
    """The Gram matrix `[T, T]` of random gradients from which most of what they share is taken: many conflicts."""
    bank = random_bank(num_tasks, PARAMS, torch.float64, device, seed=num_tasks)
    bank = bank - 0.9 * bank.mean(0)
    return bank @ bank.mT


def _by_reference(method: GramMethod, gram: Tensor) -> Tensor:
    with use_backend("reference"):
        return method.weights(gram)


def methods_case(name: str, num_tasks: int) -> Case:
    """A case of the method of that name (a key of `METHODS`)."""
    method = METHODS[name]()

    def check(gram: Tensor, ours: Callable[[Tensor], Tensor]) -> Check:
        expected = _by_reference(method, gram)
        wrong = ours(gram) - expected
        # as lengths of the updates: weights may be large where gradients cancel
        error = torch.sqrt((wrong @ gram @ wrong).clamp(min=0) / (expected @ gram @ expected))
        return Check(float(error), TOLERANCE, "the reference on the timed inputs")

    return Case(
        suite="methods",
        name=f"{name} T={num_tasks}",
        op=name,
        covers=frozenset({"method_weights"}),
        params={"T": num_tasks, "dtype": "float64"},
        make=partial(conflicting_gram, num_tasks),
        candidates=(
            Candidate("ours", method.weights, f"fastmtl.methods: {method!r}", "ours"),
            Candidate("plain", partial(_by_reference, method), "the reference: plain torch"),
            peers.weights_candidate(name),
        ),
        check=check,
        quick=num_tasks == 8,
    )


def cases(device: torch.device, quick: bool = False) -> list[Case]:
    """The suite; `quick`: 8 tasks."""
    found = [methods_case(name, num_tasks) for name in METHODS for num_tasks in TASKS]
    return [case for case in found if case.quick or not quick]
