"""A sparse network for two tasks: the larger one of the weighted losses (Chebyshev) in place of their weighted sum.

    -loss = weights @ losses                     # weighted sum
    +loss = (weights * losses).max()             # weighted Chebyshev
     loss.backward()
     optimizer.step()
    +shrink(model, step_size * strength)         # towards zero: single weights, and all weights of a unit

    or, with gradient surgery on the trunk:  fastmtl.backward(weighted_losses, method="upgrad")

Two overlaid digits are read while the layers of the trunk are driven to zeros: L1 on every weight, and a group norm on
the weights of each unit, so that whole units vanish. How well are both tasks still read at each share of zeros?

    python examples/papers/chebyshev.py
    python examples/papers/chebyshev.py --quick
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from experiment import Claim, Experiment, Record, Settings, Table, grouped, main, mean, spread, values
from matplotlib.figure import Figure
from torch import nn
from two_digits import TASKS, Batches, TwoDigits, cross_entropies

import fastmtl

WAYS = {
    "sum": ("weighted sum", "#0072B2", "o"),
    "chebyshev": ("Chebyshev", "#D55E00", "s"),
    "upgrad": ("UPGrad", "#009E73", "^"),
}
WEIGHTS = torch.tensor([0.75, 0.25])  # the left digit counts three times as much as the right one
RATE = 2e-3


def cases(seeds: int, quick: bool) -> list[Settings]:
    return [
        {"way": way, "strength": strength, "steps": 500 if quick else 1500, "seed": seed}
        for way in WAYS
        for strength in ((0.0, 0.2) if quick else (0.0, 0.05, 0.1, 0.2, 0.3))
        for seed in range(seeds)
    ]


@torch.no_grad()
def shrink(model: TwoDigits, by: float) -> None:
    """The proximal step of the sparsity term, half of it an L1 norm and half the norms of the units' weights, each
    times the root of its size: what is smaller than the step becomes an exact zero."""
    for layer in model.trunk:
        if isinstance(layer, nn.Linear):
            weight = layer.weight
            weight.copy_(weight.sign() * (weight.abs() - 0.5 * by).clamp(min=0))
            norms = weight.norm(dim=1, keepdim=True)
            limit = 0.5 * by * weight.shape[1] ** 0.5
            weight.mul_((1 - limit / norms.clamp(min=1e-12)).clamp(min=0))


def run(way: str, strength: float, steps: int, seed: int) -> dict[str, Any]:
    model, batches = TwoDigits(64), Batches(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    for _ in range(steps):
        pictures, labels = batches.draw()
        weighted = WEIGHTS * torch.stack(list(cross_entropies(model(pictures), labels).values()))
        optimizer.zero_grad()
        if way == "sum":
            weighted.sum().backward()
        elif way == "chebyshev":
            weighted.max().backward()
        else:
            fastmtl.backward(weighted, method=way)
        optimizer.step()
        if strength:
            shrink(model, RATE * strength)
    weights = [layer.weight.detach() for layer in model.trunk if isinstance(layer, nn.Linear)]
    total, zeros = sum(w.numel() for w in weights), sum(int((w == 0).sum()) for w in weights)
    units, gone = sum(len(w) for w in weights), sum(int((w == 0).all(1).sum()) for w in weights)
    accuracy = batches.accuracy(model)
    return {
        "zeros": round(100 * zeros / total, 2),
        "units gone": round(100 * gone / units, 2),
        **accuracy,
        **{f"{task} loss": loss for task, loss in batches.test_losses(model).items()},
    }


def table(records: list[Record]) -> Table:
    head = [
        "scalarisation",
        "strength",
        "zeros, %",
        "units gone, %",
        "left, % right",
        "right, % right",
        "right loss / left",
    ]
    rows = [
        [
            WAYS[way][0],
            f"{strength:g}",
            *(spread(values(found, key)) for key in ("zeros", "units gone", *TASKS)),
            spread([r.result["right loss"] / r.result["left loss"] for r in found]),
        ]
        for (way, strength), found in grouped(records, "way", "strength").items()
    ]
    return Table(head, rows)


def draw(records: list[Record], figure: Figure) -> None:
    axes = figure.subplots(1, 2, sharey=True)
    for axis, task in zip(axes, TASKS, strict=True):
        for way, (name, color, marker) in WAYS.items():
            groups = [found for (at, _), found in grouped(records, "way", "strength").items() if at == way]
            zeros, right = [mean(values(g, "zeros")) for g in groups], [mean(values(g, task)) for g in groups]
            off = [statistics.stdev(values(g, task)) if len(g) > 1 else 0.0 for g in groups]
            axis.errorbar(zeros, right, yerr=off, color=color, marker=marker, capsize=3, label=name)
        axis.set(
            title=f"{task} digit, weight {float(WEIGHTS[TASKS.index(task)]):g}",
            xlabel="zeros among the trunk's weights, %",
        )
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("digits read right, %")
    axes[0].legend(loc="lower left")


def claims(records: list[Record]) -> list[Claim]:
    groups = grouped(records, "way", "strength")
    strengths = [strength for way, strength in groups if way == "sum"]
    zeros = [mean([mean(values(groups[way, strength], "zeros")) for way in WAYS]) for strength in strengths]
    gap = {
        way: [
            mean(values(groups[way, strength], "left")) - mean(values(groups[way, strength], "right"))
            for strength in strengths
        ]
        for way in WAYS
    }
    return [
        Claim(
            f"The sparsity term makes exact zeros: {zeros[0]:.0f}% of the trunk's weights at strength 0, "
            f"{zeros[-1]:.0f}% at {strengths[-1]:g}.",
            zeros[0] == 0 and zeros[-1] > 20,
        ),
        Claim(
            "Chebyshev lets the task with the smaller weight fall further behind: the left digit is read better than "
            f"the right one by {mean(gap['chebyshev']):.1f} points, with the weighted sum by {mean(gap['sum']):.1f}, "
            f"with UPGrad by {mean(gap['upgrad']):.1f} (means over the strengths).",
            mean(gap["chebyshev"]) > mean(gap["sum"]),
        ),
    ]


EXPERIMENT = Experiment(
    title="Weighted Chebyshev and a sparse network",
    paper="Hotegni, Berkemeier and Peitz 2023, *Multi-Objective Optimization for Sparse Deep Multi-Task Learning*, "
    "[arXiv 2308.12243](https://arxiv.org/abs/2308.12243).",
    claim="""A weighted sum of losses can miss trade-offs that a non-convex front has; the weighted Chebyshev form
`max(w_t L_t)` reaches all of them, and the paper trains sparse multi-task networks with it. Here two overlaid digits
are read by a shared trunk of two layers. The left digit's loss has weight 0.75, the right one's 0.25. After each step
a proximal step takes all weights of the trunk towards zero: single ones (L1), and all weights of a unit (group norm).
We compare the weighted sum, the larger one of the two weighted losses, and UPGrad on the weighted losses
(`fastmtl.backward`) at several strengths. The paper's own sparsity term, its augmented Lagrangian and its network
with monitors are not here.""",
    reading="""The sparsity term does its work: with a strength of 0.05 well over a third of the trunk's weights are
exact zeros at little cost to the weighted sum. (A part of them belongs to the two corners of the picture where no
digit ever lies.)

**Chebyshev does what its formula says, and that is not what a user may want.** Where the network gets too small for
both tasks, it brings the weighted losses to one size, so that the right digit's loss is nearly three times the left
one's, as the weights 0.75 and 0.25 ask for. The weighted sum, with the same weights, does not let that task go so
far, and reads both digits better at the same strength. At the largest strength Chebyshev gives the right digit up: a
guess costs less than its weight allows. UPGrad on the weighted losses goes with the sum. So nothing here favours
Chebyshev; the front of these two tasks is convex (previous section), and what the paper asks for, points that no
weighted sum can reach, does not arise on it.""",
    cases=cases,
    run=run,
    table=table,
    draw=draw,
    claims=claims,
    size=(9, 4.2),
    seeds=3,
)

if __name__ == "__main__":
    main(EXPERIMENT)
