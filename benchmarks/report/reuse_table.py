"""What weights that are reused for k steps (`fastmtl.methods.Every`) cost in accuracy, and save in time.

    python -m fastmtl.benchmarks.report.reuse_table
    python -m fastmtl.benchmarks.report.reuse_table --write docs/training-loops.md

The digits network is trained for equal numbers of steps from several seeds, each of which sets the start and the
batches. A method's accuracy is the mean over the seeds, with their standard deviation; its time is the mean over all
steps, since one step in k costs more than the others, and the median over the seeds of that. All methods of a seed are
trained in turn, a few steps each.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import fastmtl
from fastmtl import methods
from fastmtl.benchmarks.report.passes_table import write
from fastmtl.benchmarks.report.report import seconds
from fastmtl.benchmarks.runner import machine
from fastmtl.benchmarks.workloads import digits

MARKS = ("<!-- reuse:begin -->", "<!-- reuse:end -->")
WIDTHS, BATCH, STEPS, SEEDS = (16, 32, 64), 64, 480, 5
TURN = 16  # steps of one method before the next one's
SUM = "plain sum"
METHODS: dict[str, Callable[[], methods.Every | None]] = {
    "PCGrad": lambda: methods.Every(methods.PCGrad(), 1),
    "`Every(PCGrad(), 4)`": lambda: methods.Every(methods.PCGrad(), 4),
    "`Every(PCGrad(), 16)`": lambda: methods.Every(methods.PCGrad(), 16),
    "MGDA": lambda: methods.Every(methods.MGDA(), 1),
    "`Every(MGDA(), 4)`": lambda: methods.Every(methods.MGDA(), 4),
    "`Every(MGDA(), 16)`": lambda: methods.Every(methods.MGDA(), 16),
    SUM: lambda: None,
}


@dataclass
class Training:
    """One network in training by one method."""

    method: methods.Every | None
    network: digits.Network
    optimizer: torch.optim.Optimizer
    first_batch: int
    steps: int = 0
    spent_s: float = 0.0

    def run(self, pictures: digits.Pictures, steps: int) -> None:
        begin = time.perf_counter()
        for _ in range(steps):
            x, labels = pictures.batch(self.first_batch + self.steps, BATCH)
            self.optimizer.zero_grad()
            losses = digits.losses(self.network(x)[1], labels)
            if self.method is None:
                torch.stack(list(losses.values())).sum().backward()
            else:
                fastmtl.backward(losses, method=self.method)
            self.optimizer.step()
            self.steps += 1
        self.spent_s += time.perf_counter() - begin


def start(label: str, seed: int, widths: tuple[int, ...], steps: int) -> Training:
    """Of one seed all methods have the same start and the same batches."""
    torch.manual_seed(seed)
    network = digits.Network(widths)
    return Training(METHODS[label](), network, torch.optim.Adam(network.parameters(), lr=1e-3), seed * steps)


def train(seed: int, steps: int, widths: tuple[int, ...] = WIDTHS) -> dict[str, Training]:
    pictures = digits.Pictures()
    trainings = {label: start(label, seed, widths, steps) for label in METHODS}
    for done in range(0, steps, TURN):
        for training in trainings.values():
            training.run(pictures, min(TURN, steps - done))
    return trainings


def accuracies(trainings: Sequence[Training], held_out: tuple[Tensor, dict[str, Tensor]]) -> list[str]:
    """For each task the mean over the seeds and their standard deviation."""
    found = [digits.accuracy(training.network, *held_out) for training in trainings]
    shown = []
    for task in digits.TASKS:
        shares = [100 * accuracy[task] for accuracy in found]
        shown.append(f"{statistics.mean(shares):.1f} ± {statistics.stdev(shares):.1f}%")
    return shown


def section(
    seeds: int = SEEDS, steps: int = STEPS, widths: tuple[int, ...] = WIDTHS, tell: Callable[[str], None] = print
) -> str:
    described = machine.describe(torch.device("cpu"))
    held_out = digits.Pictures().held_out()
    runs = []
    for seed in range(seeds):
        tell(f"seed {seed}")
        runs.append(train(seed, steps, widths))
    lines: list[Sequence[str]] = [
        ("method", "time per step", "time / plain step", *digits.TASKS),
        ("---", *["---:"] * (2 + len(digits.TASKS))),
    ]
    for label in METHODS:
        spent = statistics.median(run[label].spent_s for run in runs) / steps
        over = statistics.median(run[label].spent_s / run[SUM].spent_s for run in runs)
        lines.append((label, seconds(spent), f"{over:.2f}x", *accuracies([run[label] for run in runs], held_out)))
    commit = (described["commit"] or "unknown")[:10]
    head = (
        f"Measured on {described['device']} ({described['date'][:10]}, commit {commit}, "
        f"torch {described['versions']['torch']}): the digits network (widths {', '.join(map(str, widths))}; batch "
        f"{BATCH}, Adam), {steps} steps from each of {seeds} seeds; accuracy on pictures of digits that were not trained "
        "on, mean and standard deviation over the seeds."
    )
    return head + "\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="What reused weights cost in accuracy and save in time, on the CPU.")
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the section between the markers of FILE")
    options = parser.parse_args()
    if options.write is None:
        print(section())
    else:
        write(options.write, section(), MARKS)


if __name__ == "__main__":
    main()
