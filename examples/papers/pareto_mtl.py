"""Five models on one front of trade-offs: Pareto MTL, which takes preferences, beside weighted sums of the losses.

    +method = methods.ParetoMTL(preferences, index=2)      # the third of five trade-offs
    -(weights[2] @ torch.stack(losses)).backward()
    +fastmtl.backward(losses, method=method)

First a synthetic problem, as the paper has one: two losses of twenty numbers whose front of best trade-offs is concave,
so that a weighted sum ends at one of its ends, whatever the weights. Then two overlaid digits, left and right, in a
network that is too narrow for both.

    python examples/papers/pareto_mtl.py
    python examples/papers/pareto_mtl.py --quick
"""

from __future__ import annotations

import math
from typing import Any

import torch
from experiment import Claim, Experiment, Record, Settings, Table, grouped, main, mean, spread, values
from matplotlib.figure import Figure
from torch import Tensor
from two_digits import TASKS, Batches, TwoDigits, cross_entropies

import fastmtl
from fastmtl import methods

COUNT = 5
ANGLES = [math.pi / 2 * k / (COUNT - 1) for k in range(COUNT)]
# vectors of losses: the first lets the first loss be large and wants the second small
PREFERENCES = [[math.cos(a), math.sin(a)] for a in ANGLES]
SHARES = [(k + 0.5) / COUNT for k in range(COUNT)]  # weight of the first loss in the weighted sums
PROBLEMS = {"concave": "concave front", "digits": "two digits"}
WAYS = {"pareto": ("Pareto MTL", "#D55E00", "o"), "linear": ("weighted sums", "#0072B2", "X")}
SIZE = 20  # numbers that the concave problem has


def cases(seeds: int, quick: bool) -> list[Settings]:
    return [
        {"problem": problem, "way": way, "index": k, "steps": steps, "seed": seed}
        for problem, steps in (("concave", 400), ("digits", 300 if quick else 1000))
        for way in WAYS
        for k in range(COUNT)
        for seed in range(seeds)
    ]


def concave_losses(x: Tensor) -> dict[str, Tensor]:
    """Fonseca and Fleming's problem, of `[..., 20]`. On the front all numbers are equal, from -20^-0.5 to 20^-0.5."""
    return {
        "left": 1 - torch.exp(-(x - SIZE**-0.5).square().sum(-1)),
        "right": 1 - torch.exp(-(x + SIZE**-0.5).square().sum(-1)),
    }


def step_of(way: str, index: int, steps: int):
    """From losses to `.grad`, for one of the five trade-offs."""
    if way == "pareto":
        method = methods.ParetoMTL(PREFERENCES, index, max_start_steps=steps // 4)
        return lambda losses: fastmtl.backward(losses, method=method)
    shares = (SHARES[index], 1 - SHARES[index])
    return lambda losses: sum(share * loss for share, loss in zip(shares, losses.values(), strict=True)).backward()


def run(problem: str, way: str, index: int, steps: int, seed: int) -> dict[str, Any]:
    backward = step_of(way, index, steps)
    if problem == "concave":
        x = torch.rand(SIZE).sub(0.5).requires_grad_()
        optimizer = torch.optim.SGD([x], lr=0.3)
        for _ in range(steps):
            optimizer.zero_grad()
            backward(concave_losses(x))
            optimizer.step()
        return {task: round(float(loss), 5) for task, loss in concave_losses(x.detach()).items()}
    model, batches = TwoDigits(12), Batches(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(steps):
        pictures, labels = batches.draw()
        optimizer.zero_grad()
        backward(cross_entropies(model(pictures), labels))
        optimizer.step()
    return {**batches.test_losses(model), "right digits": batches.accuracy(model)}


def pairs(records: list[Record], problem: str, way: str) -> list[list[tuple[float, float]]]:
    """For each of the five trade-offs the two losses, by seed."""
    groups = grouped(records, "problem", "way", "index")
    return [list(zip(*(values(groups[problem, way, k], task) for task in TASKS), strict=True)) for k in range(COUNT)]


def angle(losses: tuple[float, float]) -> float:
    """Of the pair of losses, in degrees: 0 where the second is 0."""
    return math.degrees(math.atan2(losses[1], losses[0]))


def table(records: list[Record]) -> Table:
    rows = []
    for (problem, way, k), found in grouped(records, "problem", "way", "index").items():
        wanted = f"{math.degrees(ANGLES[k]):.1f}°" if way == "pareto" else f"{SHARES[k]:.1f} : {1 - SHARES[k]:.1f}"
        losses = [spread(values(found, task), 2) for task in TASKS]
        angles = spread([angle(pair) for pair in pairs(records, problem, way)[k]], 0)
        read = (
            [spread([r.result["right digits"][task] for r in found]) for task in TASKS]
            if problem == "digits"
            else ["", ""]
        )
        rows.append([PROBLEMS[problem], WAYS[way][0], wanted, *losses, f"{angles}°", *read])
    head = ["problem", "way", "asked for", "first loss", "second loss", "angle", "left, % right", "right, % right"]
    return Table(head, rows)


def draw(records: list[Record], figure: Figure) -> None:
    axes = figure.subplots(1, 2)
    line = torch.linspace(-(SIZE**-0.5), SIZE**-0.5, 200)[:, None].expand(-1, SIZE)
    axes[0].plot(*concave_losses(line).values(), color="grey", linewidth=1.2, label="front of best trade-offs")
    for axis, problem in zip(axes, PROBLEMS, strict=True):
        reach = 1.08 * max(x for way in WAYS for group in pairs(records, problem, way) for pair in group for x in pair)
        for ray in PREFERENCES:
            axis.plot([0, 2 * reach * ray[0]], [0, 2 * reach * ray[1]], color="grey", linewidth=0.7, linestyle=":")
        for way, (name, color, marker) in WAYS.items():
            found = pairs(records, problem, way)
            spots = [pair for group in found for pair in group]
            look = {"color": color, "marker": marker, "edgecolor": "black", "s": 62, "label": name, "zorder": 3}
            if problem == "concave":
                axis.scatter(*zip(*spots, strict=True), **look)
            else:
                axis.scatter(*zip(*spots, strict=True), color=color, marker=marker, s=18, alpha=0.35, linewidth=0)
                means = [tuple(map(mean, zip(*group, strict=True))) for group in found]
                axis.scatter(*zip(*means, strict=True), **look)
        axis.set(xlim=(-0.03 * reach, reach), ylim=(-0.03 * reach, reach), title=PROBLEMS[problem], aspect="equal")
        axis.grid(alpha=0.2)
    axes[0].set(xlabel="first loss", ylabel="second loss")
    axes[1].set(xlabel="test loss of the left digit", ylabel="test loss of the right digit")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)


def claims(records: list[Record]) -> list[Claim]:
    concave = {way: pairs(records, "concave", way) for way in WAYS}
    ends = sum(min(pair) < 0.05 for group in concave["linear"] for pair in group)
    count = sum(map(len, concave["linear"]))
    width = math.degrees(ANGLES[1]) / 2
    kept = sum(
        abs(angle(pair) - math.degrees(a)) <= width + 1
        for a, group in zip(ANGLES, concave["pareto"], strict=True)
        for pair in group
    )
    digits = {way: [mean([angle(pair) for pair in group]) for group in pairs(records, "digits", way)] for way in WAYS}
    ranges = {way: max(found) - min(found) for way, found in digits.items()}
    return [
        Claim(
            f"On the concave front {ends} of {count} weighted sums end where one of the losses is almost 0.",
            ends == count,
        ),
        Claim(
            f"There {kept} of {count} models of Pareto MTL end in the part of the space of losses that they were asked "
            f"for (angles within {width:.0f}° of their preference).",
            kept == count,
        ),
        Claim(
            "On the two digits Pareto MTL spreads its models further than weighted sums do: the outermost pairs of "
            f"test losses are {ranges['pareto']:.0f}° apart, those of weighted sums {ranges['linear']:.0f}°.",
            ranges["pareto"] > ranges["linear"],
            stable=False,
        ),
    ]


EXPERIMENT = Experiment(
    title="Pareto MTL: five trade-offs between two tasks",
    paper="Lin et al. 2019, *Pareto Multi-Task Learning* (NeurIPS).",
    claim="""A weighted sum of two losses reaches the trade-offs of a convex front alone. Pareto MTL instead parts the
space of losses by preference vectors, and trains one model in each part. Here five vectors at equal angles lie
between the two axes. The first problem is Fonseca and Fleming's: two losses of twenty numbers with a concave front.
The second is reading two overlaid digits with a network of 12 units. Beside each run five weighted sums. An angle is
that of the pair of losses: at 45° both are equal, at 0° the second is 0.""",
    reading="""On the concave front both behave as the paper says: every weighted sum ends at one end of the front,
and Pareto MTL places one model in each part, near to the vector though not on it, since within its part any point of
the front is as good as another. Large marks are means over the seeds, pale ones the seeds.

**On the digits the picture turns.** Their front bends towards the origin, so that weighted sums reach all of it. They
also reach much further out, and their spread over seeds is mostly smaller: Pareto MTL's first phase steers by the
constraints alone, on the losses of single batches, and its models end nearer to the middle than they were asked to.
Here the simple way is the better one; what Pareto MTL adds is that trade-offs can be asked for by angle, and that
they exist on concave fronts too.""",
    cases=cases,
    run=run,
    table=table,
    draw=draw,
    claims=claims,
    size=(9.5, 4.4),
    seeds=3,
)

if __name__ == "__main__":
    main(EXPERIMENT)
