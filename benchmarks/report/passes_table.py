"""What `features=` and `chunk_size=` of `fastmtl.backward` save or cost beside T passes one at a time.

    python -m fastmtl.benchmarks.report.passes_table
    python -m fastmtl.benchmarks.report.passes_table --write docs/guides/training-loops.md

Median time of the backward passes and the surgery, without the forward pass; the peak memory of both. Every way's
gradients are compared with those of T passes before anything is timed. And how far the Gram matrix of the features'
gradients is from that of the parameters' gradients, over a training.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastmtl
from fastmtl.benchmarks.report.report import seconds
from fastmtl.benchmarks.runner import machine, measure
from fastmtl.benchmarks.workloads import digits

Forward = Callable[[], tuple[Tensor, list[Tensor]]]  # features, losses
Case = tuple[nn.Module, Forward]
BEGIN, END = "<!-- passes:begin -->", "<!-- passes:end -->"
BUDGET_S = 20.0  # for the samples of one network
HEADER = ("network", "passes", "time", "speed (one at a time: 1)", "time / plain sum", "peak memory")


def digits_network(batch: int) -> Case:
    network, (pictures, labels) = digits.Network(), digits.Pictures().batch(0, batch)
    for block in network.modules():
        if isinstance(block, digits.Block):
            nn.init.ones_(block.norm2.weight)  # zeros would leave most of the backward pass without anything to do

    def forward() -> tuple[Tensor, list[Tensor]]:
        features, scores = network(pictures)
        return features, list(digits.losses(scores, labels).values())

    return network, forward


def perceptron(num_tasks: int, width: int, batch: int) -> Case:
    """The size of networks in multi-task reinforcement learning."""
    layers: list[nn.Module] = []
    for before in (40, width, width):
        layers += [nn.Linear(before, width), nn.ReLU()]
    network = nn.ModuleList([nn.Sequential(*layers), *(nn.Linear(width, 4) for _ in range(num_tasks))])
    x, goals = torch.randn(batch, 40), torch.randn(num_tasks, batch, 4)

    def forward() -> tuple[Tensor, list[Tensor]]:
        h = network[0](x)
        return h, [(head(h) - goal).square().mean() for head, goal in zip(network[1:], goals, strict=True)]

    return network, forward


CASES: dict[str, Callable[[], Case]] = {
    "digits network, batch 64, T = 4": lambda: digits_network(64),
    "MLP 3 x 400, batch 128, T = 10": lambda: perceptron(10, 400, 128),
    "MLP 3 x 400, batch 128, T = 50": lambda: perceptron(50, 400, 128),
    "MLP 3 x 64, batch 16, T = 10": lambda: perceptron(10, 64, 16),
}


def sampler(network: nn.Module, forward: Forward, way: str, chunk_size: int | None = None) -> Callable[[], float]:
    def sample() -> float:
        network.zero_grad()
        features, losses = forward()
        begin = time.perf_counter()
        if way == "plain sum":
            sum(losses[1:], losses[0]).backward()
        else:
            arguments: dict[str, Any] = {"features": features} if way == "features" else {}
            # the sum, whose result all ways have in common
            fastmtl.backward(losses, method="sum", chunk_size=chunk_size, **arguments)
        return time.perf_counter() - begin

    return sample


def samplers_of(network: nn.Module, forward: Forward) -> dict[str, Callable[[], float]]:
    num_tasks = len(forward()[1])
    ways: dict[str, tuple[str, int | None]] = {
        "one at a time": ("loop", None),
        "plain sum": ("plain sum", None),
        "`features=`": ("features", None),
    }
    ways |= {f"`chunk_size={k}`": ("loop", k) for k in (num_tasks // 2, num_tasks)}
    return {label: sampler(network, forward, *way) for label, way in ways.items()}


def compare(network: nn.Module, samplers: dict[str, Callable[[], float]]) -> None:
    """Raises RuntimeError where a way's gradients are not those of T passes."""
    want: list[Tensor] | None = None
    for label, sample in samplers.items():
        sample()
        got = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in network.parameters()]
        want = want or got
        for g, w in zip(got, want, strict=True):
            off = float((g - w).norm())
            if not off <= 1e-4 * float(w.norm()) + 1e-6:
                raise RuntimeError(f"{label}: a gradient is {off:.1e} away from that of T passes ({w.norm():.1e})")


def rows(name: str, make: Callable[[], Case], budget_s: float = BUDGET_S) -> list[list[str]]:
    """The table's rows of one network."""
    torch.manual_seed(0)
    network, forward = make()
    samplers = samplers_of(network, forward)
    compare(network, samplers)
    samples, failed = measure.interleave(samplers, budget_s, fewest=15, most=400)
    if failed:
        raise RuntimeError(f"{name}: {failed}")
    medians = {label: measure.summary(taken)["median"] for label, taken in samples.items()}
    device = torch.device("cpu")
    out = []
    for label, sample in samplers.items():
        peaks = []
        for _ in range(5):
            network.zero_grad()  # else a sample begins by giving memory back
            peaks.append(measure.peak_memory(lambda _, f=sample: f(), None, device)["peak_extra_bytes"])
        peak = statistics.median(peaks) / 2**20
        speed = medians["one at a time"] / medians[label]
        cost = medians[label] / medians["plain sum"]
        # what the system tells is exact to a few hundred KiB
        shown = f"{peak:.3g} MiB" if peak >= 1 else "< 1 MiB"
        out.append([name, label, seconds(medians[label]), f"{speed:.2f}x", f"{cost:.2f}x", shown])
    return out


def agreement(steps: int, batch: int = 64) -> str:
    """A line on how the features' gradients and the shared parameters' see the tasks, in one training with PCGrad."""
    torch.manual_seed(0)
    network, pictures = digits.Network(), digits.Pictures()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    same, apart, size = [], [], []
    pairs = torch.ones(len(digits.TASKS), len(digits.TASKS)).triu(1).bool()
    for step in range(steps):
        x, labels = pictures.batch(step, batch)
        features, scores = network(x)
        losses = digits.losses(scores, labels)
        seen = fastmtl.backward(losses, features=features, retain_graph=True).cosines()[pairs]
        optimizer.zero_grad()
        true = fastmtl.backward(losses).cosines()[pairs]
        optimizer.step()
        same.append(((seen < 0) == (true < 0)).double().mean())
        apart.append((seen - true).abs().mean())
        size.append(true.abs().mean())
    agree, off, usual = (float(torch.stack(values).mean()) for values in (same, apart, size))
    return (
        f"Over {steps} training steps of the digits network (batch {batch}, PCGrad), the features' gradients and the "
        f"parameters' agreed on {agree:.0%} of the pairs whether they conflict; their cosines differed by {off:.2f} "
        f"on average, where the parameters' own were {usual:.2f} in size."
    )


def section(budget_s: float = BUDGET_S, steps: int = 200, tell: Callable[[str], None] = print) -> str:
    described = machine.describe(torch.device("cpu"))
    lines: list[Sequence[str]] = [HEADER, ("---", "---", *["---:"] * (len(HEADER) - 2))]
    for name, make in CASES.items():
        tell(name)
        lines += rows(name, make, budget_s)
    tell("agreement")
    commit = (described["commit"] or "unknown")[:10]
    head = (
        f"Measured on {described['device']} ({described['date'][:10]}, commit {commit}, "
        f"torch {described['versions']['torch']}); medians."
    )
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{head}\n\n{table}\n\n{agreement(steps)}"


def write(path: Path, text: str, marks: tuple[str, str] = (BEGIN, END)) -> None:
    """Replaces what stands between the markers.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    first, last = marks
    before = path.read_text()
    begin, end = before.find(first), before.find(last)
    if before.count(first) != 1 or before.count(last) != 1 or end < begin:
        raise ValueError(f"{path}: expected one {first} and after it one {last}")
    path.write_text(f"{before[: begin + len(first)]}\n\n{text}\n\n{before[end:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description="What features= and chunk_size= save or cost, on the CPU.")
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the section between the markers of FILE")
    options = parser.parse_args()
    if options.write is None:
        print(section())
    else:
        write(options.write, section())


if __name__ == "__main__":
    main()
