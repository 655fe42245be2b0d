"""Suite `methods`: the weights that each method makes of a `[T, T]` matrix, over T; the whole call `method(grads)`; and
the passes of the methods that look at the gradients, whose floor is bytes."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastmtl import methods, ops
from fastmtl.benchmarks.baselines import peer_methods
from fastmtl.benchmarks.runner.registry import WHOLE_CALL, Candidate, Case, Check
from fastmtl.benchmarks.workloads.gradients import random_bank
from fastmtl.core.dispatch import use_backend
from fastmtl.core.gradient_rows import MAX_TASKS

TASKS = (2, 4, 8, 16, 32, 64, 128)
# tasks and columns of the whole calls
CALLS = ((8, 100_000), (8, 1_000_000), (64, 100_000))
PARAMS = 1000
# calls in a row, of which the mean is what a call takes with warm caches
AGAIN = 50
# how far the update may be from the oracle's, over its length: two ways of solving what is conditioned as these are
TOLERANCE = 1e-6
# the same of float32 gradients, of which the oracle is in float64
CALL_TOLERANCE = 3e-5
ORACLE = "float64 oracle on the timed inputs"
# method -> tasks from which its reference takes seconds a call: it checks once, and is not timed
SLOW_REFERENCE = {"upgrad": 128}
# seconds of timing for all candidates of the weights together: calls of microseconds
WEIGHTS_BUDGET_S = 1.5
METHODS: dict[str, Callable[[], methods.Method]] = {
    "pcgrad": methods.PCGrad,
    "mgda": methods.MGDA,
    "cagrad": partial(methods.CAGrad, c=peer_methods.CAGRAD_C),
    "imtlg": methods.IMTLG,
    "config": methods.ConFIG,
    "nashmtl": methods.NashMTL,
    "fairgrad": partial(methods.FairGrad, alpha=peer_methods.FAIRGRAD_ALPHA),
    "alignedmtl": methods.AlignedMTL,
    "upgrad": methods.UPGrad,
    "dualproj": methods.DualProj,
    "krum": methods.Krum,
    "pcd": partial(methods.PCD, tau=peer_methods.PCD_TAU),
    "gradvac": partial(methods.GradVac, peer_methods.GRADVAC_BETA),
    "sdmgrad": partial(methods.SDMGrad, lambda_=peer_methods.SDMGRAD_LAMBDA),
    "graddrop": methods.GradDrop,
    "trimmed_mean": partial(methods.TrimmedMean, 1),
}
# the op that makes the weights, where it is another than `method_weights`
COVERED = {"gradvac": "gradvac_step", "pcgrad": "pcgrad_weights", "pcd": "method_step", "sdmgrad": "method_step"}
OF_GRAM = tuple(name for name in METHODS if "gradients" not in METHODS[name]().needs)
# a second batch is none of its arguments
OF_GRADIENTS = tuple(name for name in METHODS if name != "sdmgrad")


@dataclass
class Problem:
    """A Gram matrix `[T, T]`, and a root of it for those who take no Gram matrix: gradients of T columns."""

    gram: Tensor
    root: Tensor
    rounded: Tensor  # the root in float32, in which LibMTL computes


def conflicting_problem(num_tasks: int, device: torch.device) -> Problem:
    """Of random gradients from which most of what they share is taken: many conflicts."""
    bank = random_bank(num_tasks, PARAMS, torch.float64, device, seed=num_tasks)
    bank = bank - 0.9 * bank.mean(0)
    root = torch.linalg.qr(bank.mT, mode="r").R.mT.contiguous()
    return Problem(bank @ bank.mT, root, root.float())


def weighing(method: methods.Method, num_tasks: int) -> Callable[[Tensor], Tensor]:
    """What makes weights of a Gram matrix: the method, to which the second batch of SDMGrad is the first again."""
    if method.needs != {"second_batch"}:
        return method.weights
    names, present = [str(t) for t in range(num_tasks)], [True] * num_tasks
    return lambda gram: method.weigh(gram, methods.Seen(names, present, second=gram))


def _anew(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The call with the random order that all get which are to be compared."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(peer_methods.SEED)
        return call(x)


def _by_reference(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with use_backend("reference"):
        return call(x)


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _on_gradients(peer: peer_methods.Peer, read: Callable[[Any], Tensor], detail: str = "") -> Candidate:
    """A peer that makes its update of gradients, which `read` takes from the inputs."""
    update = peer.update
    call = (lambda x: update(read(x))) if update is not None else read
    return Candidate(peer.label, call, peer.detail + detail, unavailable=peer.unavailable)


def weights_case(name: str, num_tasks: int, device: torch.device) -> Case:
    """The weights of the method of that name, a key of `METHODS`, from a Gram matrix."""
    make = METHODS[name]

    def fresh(method: methods.Method | None = None) -> Callable[[Tensor], Tensor]:
        return weighing(method or make(), num_tasks)

    theirs = {peer.label: peer for peer in peer_methods.all_of(name, num_tasks, device, weights=True)}
    ours, again, plain = fresh(), fresh(), fresh()

    def check(x: Problem, call: Callable[[Problem], Tensor]) -> Check:
        # what the timed method keeps from step to step is nothing yet
        found = _anew(lambda gram: call(replace(x, gram=gram)), x.gram)
        expected = _anew(lambda gram: _by_reference(fresh(), gram), x.gram)
        return Check(_distance(found @ x.root, expected @ x.root), TOLERANCE, "the reference on the timed inputs")

    def verify(x: Problem, candidate: Candidate) -> Check:
        peer = theirs.get(candidate.label)
        if peer is None:
            return check(x, candidate.call)
        with torch.random.fork_rng(devices=[]):
            peer.begin()
            found = candidate.call(x)
        expected = _anew(fresh(peer.ours() if peer.ours else None), x.gram) @ x.root
        # weights may be far apart where gradients cancel: the updates are compared
        found = found @ x.root if peer.weigh else found
        return Check(_distance(found, expected), peer.tolerance, "our method, in the peer's order")

    candidates = [
        Candidate("ours", lambda x: ours(x.gram), f"fastmtl.methods: {make()!r}", "ours", graph=True),
        Candidate("again", lambda x: again(x.gram), f"ours, {AGAIN} calls in a row", "yardstick", again=AGAIN),
        Candidate(
            "plain",
            lambda x: _by_reference(plain, x.gram),
            "the reference: plain torch",
            unavailable="a call takes seconds" if num_tasks >= SLOW_REFERENCE.get(name, MAX_TASKS + 1) else None,
        ),
    ]
    for peer in theirs.values():
        if peer.weigh is not None:
            candidates.append(Candidate(peer.label, lambda x, weigh=peer.weigh: weigh(x.gram), peer.detail))
        else:
            read = operator.attrgetter("rounded" if peer.label == "libmtl" else "root")
            candidates.append(_on_gradients(peer, read, ", of a [T, T] root of the matrix"))
    return Case(
        suite="methods",
        name=f"{name} T={num_tasks}",
        op=name,
        covers=frozenset({COVERED.get(name, "method_weights")}),
        params={"T": num_tasks, "dtype": "float64"},
        make=partial(conflicting_problem, num_tasks),
        candidates=tuple(candidates),
        check=check,
        verify=verify,
        budget_s=WEIGHTS_BUDGET_S,
        memory_of=frozenset(),
        quick=num_tasks == 8,
    )


def coefficients_case(num_tasks: int, device: torch.device) -> Case:
    """GradVac's coefficients, of an order and targets that are given."""
    order = ops.random_order(num_tasks, generator=ops.order_state(num_tasks, device=device))
    targets = torch.full((num_tasks, num_tasks), 0.1, dtype=torch.float64, device=device)

    def ours(x: Problem) -> Tensor:
        return ops.gradvac_coefficients(x.gram, order, targets)[0]

    def plain(x: Problem) -> Tensor:
        with use_backend("reference"):
            return ours(x)

    def check(x: Problem, call: Callable[[Problem], Tensor]) -> Check:
        return Check(_distance(call(x), plain(x)), TOLERANCE, "the reference on the timed inputs")

    return Case(
        suite="methods",
        name=f"gradvac_coefficients T={num_tasks}",
        op="gradvac_coefficients",
        covers=frozenset({"gradvac_coefficients"}),
        params={"T": num_tasks, "dtype": "float64"},
        make=partial(conflicting_problem, num_tasks),
        candidates=(
            Candidate("ours", ours, "fastmtl.ops.gradvac_coefficients", "ours", graph=True),
            Candidate("plain", plain, "the reference: plain torch"),
        ),
        check=check,
        budget_s=WEIGHTS_BUDGET_S,
        memory_of=frozenset(),
        quick=num_tasks == 8,
    )


def _plain_call(name: str, plain: methods.Method) -> Callable[[Tensor], Tensor]:
    """The method on `[T, P]` gradients in plain torch."""
    if name == "graddrop":
        return plain_graddrop
    if name == "trimmed_mean":
        return plain_trimmed_mean

    def call(grads: Tensor) -> Tensor:
        return _by_reference(plain.weights, grads @ grads.mT).to(grads.dtype) @ grads

    return call


def check_graddrop(found: Tensor, grads: Tensor) -> Check:
    """Each number must be the sum of its positive or of its negative gradients, and as many of each as are due."""
    positive, negative = grads.clamp(min=0).sum(0), grads.clamp(max=0).sum(0)
    off = torch.minimum((found - positive).abs(), (found - negative).abs()).max() / grads.abs().sum(0).max()
    chance = 0.5 * (1 + grads.sum(0) / grads.abs().sum(0))
    up = ((found - positive).abs() < (found - negative).abs()).to(chance.dtype)
    # in standard deviations of that share, of which ten are out of the question
    share = (up - chance).sum().abs() / (chance * (1 - chance)).sum().sqrt()
    return Check(float(torch.maximum(off, share / 10 * CALL_TOLERANCE)), CALL_TOLERANCE, "the definition, and the odds")


def call_case(name: str, num_tasks: int, num_params: int, device: torch.device) -> Case:
    """The whole of `method(grads)`: Gram matrix, weights and update of float32 gradients `[T, P]`."""
    make = METHODS[name]
    seeds = itertools.count()
    theirs = {peer.label: peer for peer in peer_methods.all_of(name, num_tasks, device, weights=False)}
    ours = make()
    plain = _plain_call(name, make())

    def checked(found: Tensor, grads: Tensor, method: methods.Method, tolerance: float, against: str) -> Check:
        if name == "graddrop":
            return check_graddrop(found, grads)
        expected = _anew(lambda x: _by_reference(method, x), grads.double())
        return Check(_distance(found.double(), expected), tolerance, against)

    def check(grads: Tensor, call: Callable[[Tensor], Tensor]) -> Check:
        found = _anew(call, grads)
        return checked(found, grads, make(), CALL_TOLERANCE, ORACLE)

    def verify(grads: Tensor, candidate: Candidate) -> Check:
        peer = theirs.get(candidate.label)
        if peer is None:
            # its Gram matrix is float32
            found = _anew(candidate.call, grads)
            return checked(found, grads, make(), peer_methods.CLOSE, ORACLE)
        with torch.random.fork_rng(devices=[]):
            peer.begin()
            found = candidate.call(grads)
        method = peer.ours() if peer.ours else make()
        return checked(found, grads, method, peer.tolerance, "our method, in the peer's order")

    candidates = [
        Candidate("ours", lambda grads: ours(grads), f"fastmtl.methods: {ours!r} called", "ours", graph=True),
        Candidate("plain", plain, "G @ G.T, the reference's weights, w @ G"),
    ]
    candidates += [_on_gradients(peer, lambda grads: grads) for peer in theirs.values()]
    return Case(
        suite="methods",
        name=f"{name}{WHOLE_CALL} T={num_tasks} P={num_params / 1e6:g}M",
        op=name + WHOLE_CALL,
        covers=frozenset(),
        params={"T": num_tasks, "P": num_params, "dtype": "float32"},
        make=lambda device: random_bank(num_tasks, num_params, torch.float32, device, next(seeds)),
        candidates=tuple(candidates),
        check=check,
        verify=verify,
        input_bytes=4 * num_tasks * num_params,
        quick=(num_tasks, num_params) == CALLS[0],
    )


def plain_graddrop(grads: Tensor) -> Tensor:
    total, size = grads.sum(0), grads.abs().sum(0)
    up = torch.rand_like(total) * size < 0.5 * (size + total)
    return torch.where((grads > 0) == up, grads, 0.0).sum(0)


def plain_trimmed_mean(grads: Tensor) -> Tensor:
    return grads.sort(dim=0).values[1:-1].mean(0)


@dataclass
class Held:
    """A bank, and what runs along with it."""

    grads: Tensor
    held: Tensor
    factors: Tensor
    state: Tensor
    out: Tensor


def _plain_average(x: Held) -> Tensor:
    x.held.mul_(0.5).add_(x.grads, alpha=0.5)
    return x.held @ x.held.mT


def _plain_excess(x: Held) -> Tensor:
    x.held.addcmul_(x.grads, x.grads)
    return (x.grads.square() / x.held.sqrt()).sum(1)


@dataclass(frozen=True)
class _Pass:
    """An op that passes over the gradients: its call, plain torch's, and its bytes in units of P."""

    ours: Callable[[Held], Tensor]
    plain: Callable[[Held], Tensor]
    moved: Callable[[int], int]


PASSES: dict[str, _Pass] = {
    "graddrop": _Pass(
        lambda x: ops.graddrop(x.grads, generator=x.state, out=x.out),
        lambda x: plain_graddrop(x.grads),
        lambda t: t + 1,
    ),
    "trimmed_mean": _Pass(
        lambda x: ops.trimmed_mean(x.grads, 1, out=x.out), lambda x: plain_trimmed_mean(x.grads), lambda t: t + 1
    ),
    "average_gradients": _Pass(
        lambda x: ops.average_gradients(x.grads, x.held, x.factors, x.factors, gram=True),
        _plain_average,
        lambda t: 3 * t,
    ),
    "excess_risks": _Pass(lambda x: ops.excess_risks(x.grads, x.held, 2 * x.factors), _plain_excess, lambda t: 3 * t),
}


def pass_case(name: str, num_tasks: int, num_params: int, device: torch.device) -> Case:
    """A case of the op of that name (a key of `PASSES`) on a float32 bank."""
    it = PASSES[name]
    row_bytes = 4 * num_params
    seeds = itertools.count()
    theirs = {peer.label: peer for peer in peer_methods.all_of(name, num_tasks, device, weights=False)}

    def make(device: torch.device) -> Held:
        grads = random_bank(num_tasks, num_params, torch.float32, device, next(seeds))
        halves = torch.full((num_tasks,), 0.5, dtype=torch.float64, device=device)
        state = ops.order_state(0, device=device)
        return Held(grads, torch.ones_like(grads), halves, state, torch.ones_like(grads[0]))

    def check(x: Held, call: Callable[[Held], Tensor]) -> Check:
        counter, held = x.state.clone(), x.held.clone()
        found = call(x).double().clone()
        x.state.copy_(counter)
        x.held.copy_(held)
        with use_backend("reference"):
            expected = it.ours(x).double()
        x.held.copy_(held)
        # nothing is missing at any place: the largest error over the largest entry
        return Check(
            float((found - expected).abs().max() / expected.abs().max()), 1e-5, "the reference on the timed inputs"
        )

    def verify(x: Held, candidate: Candidate) -> Check:
        if name == "graddrop":
            return check_graddrop(candidate.call(x), x.grads)  # the others draw their own numbers
        # they add up in float32
        return replace(check(x, candidate.call), tolerance=1e-3)

    candidates = [
        Candidate("ours", it.ours, f"fastmtl.ops.{name}", "ours", it.moved(num_tasks) * row_bytes, graph=True),
        Candidate("plain", it.plain, "plain torch on the matrix", graph=True),
    ]
    candidates += [_on_gradients(peer, lambda x: x.grads) for peer in theirs.values()]
    return Case(
        suite="methods",
        name=f"{name} T={num_tasks} P={num_params / 1e6:g}M",
        op=name,
        covers=frozenset({name}),
        params={"T": num_tasks, "P": num_params, "dtype": "float32"},
        make=make,
        candidates=tuple(candidates),
        check=check,
        verify=verify,
        input_bytes=num_tasks * row_bytes,
        moved={"floor": it.moved(num_tasks) * row_bytes},
        quick=num_tasks == 8,
    )


def cases(device: torch.device, quick: bool = False) -> list[Case]:
    """The suite; `quick`: 8 tasks, and the smallest of the whole calls."""
    found = [weights_case(name, num_tasks, device) for name in OF_GRAM for num_tasks in TASKS]
    found += [coefficients_case(num_tasks, device) for num_tasks in (8, 64)]
    # LibMTL's CAGrad is written for three tasks
    found += [weights_case("cagrad", 3, device), call_case("cagrad", 3, 100_000, device)]
    found += [call_case(name, *size, device) for name in OF_GRADIENTS for size in CALLS]
    found += [pass_case(name, num_tasks, 1_000_000, device) for name in PASSES for num_tasks in (4, 8, 32)]
    return [case for case in found if case.quick or not quick]
