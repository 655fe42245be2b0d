"""Suite `methods`: the weights of each method that one solver makes of a `[T, T]` matrix, over T (latency: no floor),
and the passes of the methods that look at the gradients, whose floor is bytes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass
class Held:
    """A bank, and what runs along with it."""

    grads: Tensor
    held: Tensor
    factors: Tensor
    state: Tensor
    out: Tensor


def _plain_graddrop(x: Held) -> Tensor:
    total, size = x.grads.sum(0), x.grads.abs().sum(0)
    up = torch.rand_like(total) * size < 0.5 * (size + total)
    return torch.where((x.grads > 0) == up, x.grads, 0.0).sum(0)


def _plain_trimmed_mean(x: Held) -> Tensor:
    return x.grads.sort(dim=0).values[1:-1].mean(0)


def _plain_average(x: Held) -> Tensor:
    x.held.mul_(0.5).add_(x.grads, alpha=0.5)
    return x.held @ x.held.mT


def _plain_excess(x: Held) -> Tensor:
    x.held.addcmul_(x.grads, x.grads)
    return (x.grads.square() / x.held.sqrt()).sum(1)


@dataclass(frozen=True)
class _Pass:
    """An op that passes over the gradients: its call, plain torch's, TorchJD's, and its bytes in units of P."""

    ours: Callable[[Held], Tensor]
    plain: Callable[[Held], Tensor]
    peer: tuple[str, tuple[int, ...]] | None
    moved: Callable[[int], int]


PASSES: dict[str, _Pass] = {
    "graddrop": _Pass(
        lambda x: ops.graddrop(x.grads, generator=x.state, out=x.out),
        _plain_graddrop,
        ("GradDrop", ()),
        lambda t: t + 1,
    ),
    "trimmed_mean": _Pass(
        lambda x: ops.trimmed_mean(x.grads, 1, out=x.out), _plain_trimmed_mean, ("TrimmedMean", (1,)), lambda t: t + 1
    ),
    "average_gradients": _Pass(
        lambda x: ops.average_gradients(x.grads, x.held, x.factors, x.factors, gram=True),
        _plain_average,
        None,
        lambda t: 3 * t,
    ),
    "excess_risks": _Pass(
        lambda x: ops.excess_risks(x.grads, x.held, 2 * x.factors), _plain_excess, None, lambda t: 3 * t
    ),
}


def pass_case(name: str, num_tasks: int, num_params: int) -> Case:
    """A case of the op of that name (a key of `PASSES`) on a float32 bank."""
    it = PASSES[name]
    row_bytes = 4 * num_params
    seeds = itertools.count()

    def make(device: torch.device) -> Held:
        grads = random_bank(num_tasks, num_params, torch.float32, device, next(seeds))
        halves = torch.full((num_tasks,), 0.5, dtype=torch.float64, device=device)
        state = ops.order_state(0, device=device)
        return Held(grads, torch.ones_like(grads), halves, state, torch.ones_like(grads[0]))

    def check(x: Held, ours: Callable[[Held], Tensor]) -> Check:
        counter, held = x.state.clone(), x.held.clone()
        found = ours(x).double().clone()
        x.state.copy_(counter)
        x.held.copy_(held)
        with use_backend("reference"):
            expected = it.ours(x).double()
        # nothing is missing at any place: the largest error over the largest entry
        return Check(
            float((found - expected).abs().max() / expected.abs().max()), 1e-5, "the reference on the timed inputs"
        )

    candidates = [
        Candidate("ours", it.ours, f"fastmtl.ops.{name}", "ours", traffic=it.moved(num_tasks) * row_bytes),
        Candidate("plain", it.plain, "plain torch on the matrix"),
    ]
    if it.peer is not None:
        candidates.append(peers.aggregator_candidate(*it.peer))
    return Case(
        suite="methods",
        name=f"{name} T={num_tasks} P={num_params / 1e6:g}M",
        op=name,
        covers=frozenset({name}),
        params={"T": num_tasks, "P": num_params, "dtype": "float32"},
        make=make,
        candidates=tuple(candidates),
        check=check,
        input_bytes=num_tasks * row_bytes,
        moved={"floor": it.moved(num_tasks) * row_bytes},
        quick=num_tasks == 8,
    )


def cases(device: torch.device, quick: bool = False) -> list[Case]:
    """The suite; `quick`: 8 tasks."""
    found = [methods_case(name, num_tasks, device) for name in (*METHODS, *OPS) for num_tasks in TASKS]
    found += [pass_case(name, num_tasks, 1_000_000) for name in PASSES for num_tasks in (4, 8, 32)]
    return [case for case in found if case.quick or not quick]
