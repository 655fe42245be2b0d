"""What weights that are reused for k steps (`fastmtl.methods.Every`) cost in accuracy.

    python -m fastmtl.benchmarks.report.reuse_table
    python -m fastmtl.benchmarks.report.reuse_table --write docs/training-loops.md

The digits network is trained for equal numbers of steps from several seeds, each of which sets the start and the
batches. A method's accuracy is the mean over the seeds, with their standard deviation. What a step takes is told in
backward passes; the suite `step` measures the time.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import fastmtl
from fastmtl import methods
from fastmtl.benchmarks.report.passes_table import write
from fastmtl.benchmarks.runner import machine
from fastmtl.benchmarks.workloads import digits

MARKS = ("<!-- reuse:begin -->", "<!-- reuse:end -->")
WIDTHS, DEPTH, BATCH, STEPS, SEEDS = (16, 32, 64), 1, 64, 400, 5
SUM = "plain sum"
INNER: dict[str, type[methods.Method]] = {"PCGrad": methods.PCGrad, "MGDA": methods.MGDA}
EVERY = (1, 4, 16)


def label_of(name: str, every: int) -> str:
    return name if every == 1 else f"`Every({name}(), {every})`"


def passes_per_step(every: int) -> str:
    return f"{(len(digits.TASKS) + every - 1) / every:.4g}"


def train(method: methods.Method | None, seed: int, steps: int, widths: tuple[int, ...]) -> digits.Network:
    """A trained network. Of one seed all methods have the same start and the same batches."""
    torch.manual_seed(seed)
    pictures, network = digits.Pictures(), digits.Network(widths, DEPTH)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for step in range(steps):
        x, labels = pictures.batch(seed * steps + step, BATCH)
        optimizer.zero_grad()
        losses = digits.losses(network(x)[1], labels)
        if method is None:
            torch.stack(list(losses.values())).sum().backward()
        else:
            fastmtl.backward(losses, method=method)
        optimizer.step()
    return network


def accuracies(networks: Sequence[digits.Network], held_out: tuple[Tensor, dict[str, Tensor]]) -> list[str]:
    """For each task the mean over the seeds and their standard deviation."""
    found = [digits.accuracy(network, *held_out) for network in networks]
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
    lines: list[Sequence[str]] = [
        ("method", "passes per step", *digits.TASKS),
        ("---", *["---:"] * (1 + len(digits.TASKS))),
    ]

    def add(label: str, passes: str, make: Callable[[], methods.Method | None]) -> None:
        tell(label)
        networks = [train(make(), seed, steps, widths) for seed in range(seeds)]
        lines.append((label, passes, *accuracies(networks, held_out)))

    for name, kind in INNER.items():
        for every in EVERY:
            add(label_of(name, every), passes_per_step(every), lambda kind=kind, k=every: methods.Every(kind(), k))
    add(SUM, "1", lambda: None)
    commit = (described["commit"] or "unknown")[:10]
    head = (
        f"{described['date'][:10]}, commit {commit}, torch {described['versions']['torch']}, on a CPU: the digits "
        f"network (widths {', '.join(map(str, widths))}, {DEPTH} block each; batch {BATCH}, Adam), {steps} steps from "
        f"each of {seeds} seeds. Accuracy on pictures of digits that were not trained on, mean and standard deviation "
        "over the seeds."
    )
    return head + "\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="What reused weights cost in accuracy.")
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the section between the markers of FILE")
    options = parser.parse_args()
    if options.write is None:
        print(section())
    else:
        write(options.write, section(), MARKS)


if __name__ == "__main__":
    main()
