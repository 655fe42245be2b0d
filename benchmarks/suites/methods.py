"""Suite `methods`: the weights that each method makes of a `[T, T]` matrix, over T (latency: no floor); whole methods
on a bank; and the passes of the methods that look at the gradients, whose floor is bytes."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastmtl import methods, ops
from fastmtl.benchmarks.baselines import libmtl, peers
from fastmtl.benchmarks.runner.registry import Candidate, Case, Check
from fastmtl.benchmarks.workloads.gradients import random_bank
from fastmtl.core.dispatch import use_backend

TASKS = (2, 8, 32, 64, 128)
PARAMS = 1000
# how far the update may be from the oracle's, over its length: two ways of solving what is conditioned as these are
TOLERANCE = 1e-6


class _Method:
    """A method as a case calls it, with what is needed to ask it twice from the same state."""

    def __init__(self, make: Callable[[], methods.Method], order: Tensor | None = None) -> None:
        self.method, self._order = make(), order

    def weights(self, gram: Tensor) -> Tensor:
        """`[T]`; of a method that needs a second batch, the same one once more."""
        if not self.method.needs:
            return self.method.weights(gram)
        num_tasks = len(gram)
        return self.method.weigh(
            gram, methods.Seen([str(t) for t in range(num_tasks)], [True] * num_tasks, second=gram)
        )

    def __call__(self, grads: Tensor) -> Tensor:
        out = self.method(grads)
        assert isinstance(out, Tensor)
        return out

    def by_reference(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The same call in plain torch, from the same state, which it leaves as it was."""
        with self.unchanged(), use_backend("reference"):
            return call(x)

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        state, order = self.method.state_dict(), None if self._order is None else self._order.clone()
        try:
            yield
        finally:
            self.method.load_state_dict(state)
            if self._order is not None:
                self._order.copy_(order)


def _drawing(kind: Callable[..., methods.Method], num_tasks: int, device: torch.device) -> _Method:
    order = ops.order_state(num_tasks, device=device)
    return _Method(lambda: kind(generator=order), order)


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
    "sdmgrad": methods.SDMGrad,
    "modo": methods.MoDo,
    "crmogm": partial(methods.CRMOGM, "mgda"),
}
# those that draw an order at each call
DRAWING: dict[str, Callable[..., methods.Method]] = {"pcgrad": methods.PCGrad, "gradvac": methods.GradVac}
# the op that makes the weights, where it is another than `method_weights`
COVERS = dict.fromkeys(("pcd", "sdmgrad", "modo", "crmogm"), "method_step")
COVERS |= {"pcgrad": "pcgrad_weights", "gradvac": "gradvac_step"}
# of the whole call: those that users have from TorchJD or LibMTL
WHOLE = ("pcgrad", "gradvac", "mgda", "cagrad", "nashmtl", "upgrad")


def conflicting_bank(num_tasks: int, num_params: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random gradients from which most of what they share is taken: many conflicts."""
    bank = random_bank(num_tasks, num_params, dtype, device, seed=num_tasks)
    return bank - 0.9 * bank.mean(0)


def conflicting_gram(num_tasks: int, device: torch.device) -> Tensor:
    bank = conflicting_bank(num_tasks, PARAMS, torch.float64, device)
    return bank @ bank.mT


def _method(name: str, num_tasks: int, device: torch.device) -> _Method:
    return _drawing(DRAWING[name], num_tasks, device) if name in DRAWING else _Method(METHODS[name])


def methods_case(name: str, num_tasks: int, device: torch.device) -> Case:
    """The weights of the method of that name, a key of `METHODS` or `DRAWING`, from a `[T, T]` matrix."""
    it = _method(name, num_tasks, device)

    def check(gram: Tensor, ours: Callable[[Tensor], Tensor]) -> Check:
        with it.unchanged():
            found = ours(gram)
        expected = it.by_reference(it.weights, gram)
        wrong = found - expected
        # as lengths of the updates: weights may be large where gradients cancel
        error = torch.sqrt((wrong @ gram @ wrong).clamp(min=0) / (expected @ gram @ expected))
        return Check(float(error), TOLERANCE, "the reference on the timed inputs")

    return Case(
        suite="methods",
        name=f"{name} T={num_tasks}",
        op=name,
        covers=frozenset({COVERS.get(name, "method_weights")}),
        params={"T": num_tasks, "dtype": "float64"},
        make=partial(conflicting_gram, num_tasks),
        candidates=(
            Candidate("ours", it.weights, f"fastmtl.methods: {it.method!r}", "ours"),
            Candidate("plain", partial(it.by_reference, it.weights), "the reference: plain torch"),
            peers.weights_candidate(name),
        ),
        check=check,
        budget_s=1.5,
        quick=num_tasks == 8,
    )


def coefficients_case(num_tasks: int, device: torch.device) -> Case:
    """GradVac's coefficients, of an order and targets that are given."""
    order = ops.random_order(num_tasks, generator=ops.order_state(num_tasks, device=device))
    targets = torch.full((num_tasks, num_tasks), 0.1, dtype=torch.float64, device=device)

    def ours(gram: Tensor) -> Tensor:
        return ops.gradvac_coefficients(gram, order, targets)[0]

    def plain(gram: Tensor) -> Tensor:
        with use_backend("reference"):
            return ours(gram)

    def check(gram: Tensor, ours: Callable[[Tensor], Tensor]) -> Check:
        expected = plain(gram)
        error = (ours(gram) - expected).abs().max() / expected.abs().max()
        return Check(float(error), TOLERANCE, "the reference on the timed inputs")

    return Case(
        suite="methods",
        name=f"gradvac_coefficients T={num_tasks}",
        op="gradvac_coefficients",
        covers=frozenset({"gradvac_coefficients"}),
        params={"T": num_tasks, "dtype": "float64"},
        make=partial(conflicting_gram, num_tasks),
        candidates=(
            Candidate("ours", ours, "fastmtl.ops.gradvac_coefficients", "ours"),
            Candidate("plain", plain, "the reference: plain torch"),
        ),
        check=check,
        quick=num_tasks == 8,
    )


def whole_case(name: str, num_tasks: int, num_params: int, device: torch.device) -> Case:
    """The whole method on a float32 bank: Gram matrix, weights and weighted sum."""
    it = _method(name, num_tasks, device)

    def check(grads: Tensor, ours: Callable[[Tensor], Tensor]) -> Check:
        with it.unchanged():
            found = ours(grads).double()
        expected = it.by_reference(it, grads.double())
        return Check(float((found - expected).norm() / expected.norm()), 1e-4, "the reference in float64")

    row_bytes = 4 * num_params
    return Case(
        suite="methods",
        name=f"{name}(grads) T={num_tasks} P={num_params / 1e6:g}M",
        op=name,
        covers=frozenset(),
        params={"T": num_tasks, "P": num_params, "dtype": "float32"},
        make=partial(conflicting_bank, num_tasks, num_params, torch.float32),
        candidates=(
            Candidate("ours", it, f"fastmtl.methods: {it.method!r}", "ours", traffic=(2 * num_tasks + 1) * row_bytes),
            Candidate("plain", partial(it.by_reference, it), "the reference: plain torch on the matrix"),
            peers.method_candidate(name),
            libmtl.candidate(name, num_tasks),
        ),
        check=check,
        input_bytes=num_tasks * row_bytes,
        moved={"floor": (num_tasks + 1) * row_bytes, "two_reads": (2 * num_tasks + 1) * row_bytes},
        quick=name in ("gradvac", "nashmtl") and num_tasks == 8 and num_params == 100_000,
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
    found = [methods_case(name, num_tasks, device) for name in (*DRAWING, *METHODS) for num_tasks in TASKS]
    found += [coefficients_case(num_tasks, device) for num_tasks in (8, 64)]
    found += [
        whole_case(name, num_tasks, num_params, device)
        for name in WHOLE
        for num_tasks, num_params in ((2, 100_000), (8, 100_000), (64, 100_000), (8, 1_000_000))
    ]
    found += [pass_case(name, num_tasks, 1_000_000) for name in PASSES for num_tasks in (4, 8, 32)]
    return [case for case in found if case.quick or not quick]
