"""Suite `step`: what weights that are reused for k steps (`fastmtl.methods.Every`) cost in accuracy.

The digits network is trained for equal numbers of steps from several seeds, each of which sets the start and the
batches; of one seed all methods have the same. A sample of the timing is a training: the last figures are the
accuracies of the networks that were trained while the clock ran.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastmtl
from fastmtl import methods
from fastmtl.benchmarks.runner.registry import REUSE_ACCURACY, Candidate, Case, Check
from fastmtl.benchmarks.workloads import digits

WIDTHS, DEPTH, BATCH = (16, 32, 64), 1, 64
STEPS, SEEDS = 400, 5
QUICK_STEPS, QUICK_SEEDS = 10, 2
METHODS: dict[str, type[methods.Method]] = {"PCGrad": methods.PCGrad, "MGDA": methods.MGDA}
# steps from one solution of the weights to the next; the longest first, which the row is about
EVERY = (16, 4, 1)
TOLERANCE = 1e-3

Make = Callable[[], methods.Method]


def label_of(every: int) -> str:
    return "ours" if every == EVERY[0] else f"every_{every}"


@dataclass
class Training:
    """One training from one seed; `network` is what it has left."""

    device: torch.device
    steps: int
    seed: int
    widths: tuple[int, ...] = WIDTHS
    network: digits.Network | None = None

    def run(self, backward: Callable[[digits.Network, dict[str, Tensor], int], object]) -> None:
        """`backward` fills `.grad`, from the network, the losses, and how many steps there were."""
        torch.manual_seed(self.seed)
        pictures, network = digits.Pictures(), digits.Network(self.widths, DEPTH).to(self.device)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        for step in range(self.steps):
            x, labels = pictures.batch(self.seed * self.steps + step, BATCH)
            labels = {task: y.to(self.device) for task, y in labels.items()}
            optimizer.zero_grad()
            backward(network, digits.losses(network(x.to(self.device))[1], labels), step)
            optimizer.step()
        self.network = network


def reusing(make: Make, every: int, training: Training) -> None:
    method = methods.Every(make(), every)
    training.run(lambda network, losses, step: fastmtl.backward(losses, method=method))


def plain_sum(training: Training) -> None:
    training.run(lambda network, losses, step: torch.stack(list(losses.values())).sum().backward())


def by_hand(make: Make, every: int, training: Training) -> None:
    """What `reusing` must do, spelled out: T gradients at each step, and the weights of the last asking."""
    method, weights = make(), torch.empty(0)

    def backward(network: digits.Network, losses: dict[str, Tensor], step: int) -> None:
        nonlocal weights
        shared = list(network.backbone.parameters())
        rows, heads = [], []
        for task, loss in losses.items():
            head = list(network.heads[task].parameters())
            grads = torch.autograd.grad(loss, [*shared, *head], retain_graph=True)
            rows.append(grads[: len(shared)])
            heads += list(zip(head, grads[len(shared) :], strict=True))
        if step % every == 0:
            bank = torch.stack([torch.cat([g.flatten() for g in row]).double() for row in rows])
            weights = method.weights(bank @ bank.mT).to(rows[0][0].dtype)
        for p, column in zip(shared, zip(*rows, strict=True), strict=True):
            p.grad = sum(w * g for w, g in zip(weights, column, strict=True))
        for p, g in heads:
            p.grad = g

    training.run(backward)


@dataclass
class Trainings:
    """What each candidate has trained so far."""

    device: torch.device
    steps: int
    widths: tuple[int, ...]
    of: dict[str, list[Training]] = field(default_factory=dict)

    def next(self, label: str) -> Training:
        before = self.of.setdefault(label, [])
        before.append(Training(self.device, self.steps, len(before), self.widths))
        return before[-1]


def _way(training: Training) -> Tensor:
    """How far the training has gone from its start, all parameters in a row."""
    start = Training(training.device, 0, training.seed, training.widths)
    start.run(lambda *_: None)
    ends = [torch.cat([p.detach().flatten() for p in x.network.parameters()]) for x in (training, start)]
    return (ends[0] - ends[1]).double()


def check_training(make: Make, every: int, trainings: Trainings, call: Callable[[Training], Any]) -> Check:
    """Three steps by that call, and by hand: the second is one that reuses weights, unless k is 1."""
    ways = []
    for run in (call, partial(by_hand, make, every)):
        training = Training(trainings.device, 3, 0, trainings.widths)
        run(training)
        ways.append(_way(training))
    return Check(float((ways[0] - ways[1]).norm() / ways[1].norm()), TOLERANCE, "T gradients and weights by hand")


def accuracy_case(name: str, steps: int, seeds: int, widths: tuple[int, ...] = WIDTHS) -> Case:
    """Trainings with the method of that name (a key of `METHODS`), its weights at every step, 4th, and 16th."""
    make = METHODS[name]

    def verify(trainings: Trainings, candidate: Candidate) -> Check:
        if candidate.label == "sum":
            return check_training(methods.Sum, 1, trainings, candidate.call)
        every = next(k for k in EVERY if label_of(k) == candidate.label)
        return check_training(make, every, trainings, candidate.call)

    def finish(trainings: Trainings) -> dict[str, Any]:
        pictures, labels = digits.Pictures().held_out()
        labels = {task: x.to(trainings.device) for task, x in labels.items()}
        pictures = pictures.to(trainings.device)
        return {
            "by_seed": {
                label: [digits.accuracy(x.network, pictures, labels) for x in done]
                for label, done in trainings.of.items()
            },
            "every": {label_of(k): k for k in EVERY},
        }

    return Case(
        suite="step",
        name=f"digits, accuracy with {name}",
        op=REUSE_ACCURACY,
        covers=frozenset(),
        params={
            "T": len(digits.TASKS),
            "dtype": "float32",
            "batch": BATCH,
            "widths": list(widths),
            "depth": DEPTH,
            "steps": steps,
            "seeds": seeds,
            "method": name,
        },
        make=lambda device: Trainings(device, steps, widths),
        candidates=(
            *(
                Candidate(
                    label_of(k),
                    partial(reusing, make, k),
                    f"methods.Every(methods.{name}(), {k})",
                    "ours" if k == EVERY[0] else "yardstick",
                )
                for k in EVERY
            ),
            Candidate("sum", plain_sum, "sum(losses).backward(): no surgery", "yardstick"),
        ),
        check=partial(check_training, make, EVERY[0]),
        verify=verify,
        prepare=lambda trainings, label: trainings.next(label),
        # each is called once to warm up: that is a training too
        reps=seeds - 1,
        memory_of=frozenset(),
        finish=finish,
        quick=True,
    )


def cases(quick: bool) -> list[Case]:
    steps, seeds = (QUICK_STEPS, QUICK_SEEDS) if quick else (STEPS, SEEDS)
    return [accuracy_case(name, steps, seeds) for name in METHODS]
