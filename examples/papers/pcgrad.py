"""What PCGrad says makes gradients of several tasks interfere, measured along the training of a small real network.

    -    sum(losses.values()).backward()
    +    surgery = fastmtl.backward(losses, method="pcgrad")

Its figure in two dimensions, where gradient descent on the sum gets stuck in a valley, is drawn by
`examples/landscapes.py`. Here a network reads two overlaid digits. Every ten steps the three conditions of the paper
are measured on the batch at hand, and a step with the sum's gradient is tried beside one with PCGrad's.

    python examples/papers/pcgrad.py
    python examples/papers/pcgrad.py --quick
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from experiment import Claim, Experiment, Record, Settings, Table, grouped, main, mean, spread, values
from matplotlib.figure import Figure
from torch import Tensor, nn
from two_digits import TASKS, Batches, TwoDigits, cross_entropies

import fastmtl

METHODS = {"sum": ("the sum", "#0072B2"), "pcgrad": ("PCGrad", "#D55E00")}
RATE = 0.1  # of the steps that are tried
EVERY, BINS = 10, 20  # a probe every ten steps; curves of twenty means
SCALES = {1.0: "equal losses", 0.1: "right loss x 0.1"}
Losses = Callable[[], dict[str, Tensor]]


def cases(seeds: int, quick: bool) -> list[Settings]:
    steps = 600 if quick else 2000
    return [
        {"scale": scale, "method": method, "steps": steps, "seed": seed}
        for scale in SCALES
        for method in METHODS
        for seed in range(seeds)
    ]


def loss_after(model: nn.Module, losses: Losses, step: list[Tensor]) -> float:
    """The sum of the losses after a step of the trunk, which is taken back."""
    with torch.no_grad():
        before = [p.clone() for p in model.trunk.parameters()]
        for p, change in zip(model.trunk.parameters(), step, strict=True):
            p.add_(change)
        total = float(sum(losses().values()))
        for p, old in zip(model.trunk.parameters(), before, strict=True):
            p.copy_(old)
    return total


def probe(model: nn.Module, losses: Losses) -> dict[str, float]:
    """The three conditions, and by how much one step lowers the sum of the losses: along the sum's gradient, along
    PCGrad's update, and along the latter at the length of the former."""
    steps, lengths = {}, {}
    for method in METHODS:
        model.zero_grad()
        surgery = fastmtl.backward(losses(), method=method)
        steps[method] = [-RATE * p.grad for p in model.trunk.parameters()]
        lengths[method] = RATE * float(surgery.grad_norm())
    model.zero_grad()
    now = loss_after(model, losses, [torch.zeros_like(change) for change in steps["sum"]])
    scaled = [change * (lengths["sum"] / lengths["pcgrad"]) for change in steps["pcgrad"]]
    after = {method: loss_after(model, losses, change) for method, change in steps.items()}
    first, second = surgery.gram.diagonal().sqrt().tolist()
    promised = lengths["sum"] ** 2 / RATE  # g . g * RATE: what the loss would fall by if it were linear
    return {
        "cosine": float(surgery.cosines()[0, 1]),
        "similarity": 2 * first * second / (first**2 + second**2),
        "curvature": 2 * (after["sum"] - now + promised) / lengths["sum"] ** 2,
        "better": float(after["pcgrad"] < after["sum"]),
        "better_at_length": float(loss_after(model, losses, scaled) < after["sum"]),
        "length": lengths["pcgrad"] / lengths["sum"],
    }


def run(scale: float, method: str, steps: int, seed: int) -> dict[str, Any]:
    model, batches = TwoDigits(16), Batches(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    probes = []
    for step in range(steps):
        pictures, labels = batches.draw()

        def losses(pictures: Tensor = pictures, labels: dict[str, Tensor] = labels) -> dict[str, Tensor]:
            found = cross_entropies(model(pictures), labels)
            return found | {"right": scale * found["right"]}

        if step % EVERY == 0:
            probes.append(probe(model, losses))
        optimizer.zero_grad()
        fastmtl.backward(losses(), method=method)
        optimizer.step()
    seen = {key: torch.tensor([p[key] for p in probes], dtype=torch.float64) for key in probes[0]}
    conflict = seen["cosine"] < 0
    curves = {
        key: [round(float(part.mean()), 4) for part in seen[key].tensor_split(BINS)]
        for key in ("cosine", "similarity", "curvature")
    }
    in_conflict = {key: round(float(seen[key][conflict].mean()), 4) for key in ("better", "better_at_length", "length")}
    accuracy = batches.accuracy(model)
    return {
        **curves,
        **in_conflict,
        "conflict": round(float(conflict.double().mean()), 4),
        "mean_similarity": round(float(seen["similarity"].mean()), 4),
        "mean_curvature": round(float(seen["curvature"].mean()), 4),
        **{task: accuracy[task] for task in TASKS},
    }


def percent(records: list[Record], key: str) -> str:
    return spread([100 * share for share in values(records, key)], 0)


def table(records: list[Record]) -> Table:
    head = (
        "losses",
        "trained with",
        "steps in conflict, %",
        "magnitude similarity",
        "curvature",
        "length of PCGrad's step / the sum's",
        "PCGrad's step better, % of conflicts",
        "better at equal length, %",
        "left, % right",
        "right, % right",
    )
    rows = [
        [
            SCALES[scale],
            METHODS[method][0],
            percent(found, "conflict"),
            spread(values(found, "mean_similarity"), 2),
            spread(values(found, "mean_curvature")),
            spread(values(found, "length"), 2),
            percent(found, "better"),
            percent(found, "better_at_length"),
            *(spread(values(found, task)) for task in TASKS),
        ]
        for (scale, method), found in grouped(records, "scale", "method").items()
    ]
    return Table(head, rows)


PANELS = {  # title, limits, where a line is drawn, what it means, and how high in the picture that is written
    "cosine": ("Conflict: cosine of both gradients", (-0.45, 0.25), 0.0, "below the line: conflict", 0.06),
    "similarity": ("Dominance: magnitude similarity", (0, 1.05), 1.0, "the line: both equally long", 0.86),
    "curvature": (
        "Curvature along the sum's gradient",
        (0, 24),
        2 / RATE,
        "above the line a step raises the loss",
        0.86,
    ),
}


def draw(records: list[Record], figure: Figure) -> None:
    axes = figure.subplots(len(SCALES), len(PANELS), sharex=True, sharey="col")
    for row, (scale, name) in zip(axes, SCALES.items(), strict=True):
        for axis, (key, (title, limits, line, meaning, height)) in zip(row, PANELS.items(), strict=True):
            axis.axhline(line, color="black", linewidth=0.9, linestyle="--")
            for method, (label, color) in METHODS.items():
                found = [r for r in records if (r.settings["scale"], r.settings["method"]) == (scale, method)]
                curves = torch.tensor([r.result[key] for r in found], dtype=torch.float64)
                steps = (torch.arange(BINS) + 0.5) * found[0].settings["steps"] / BINS
                axis.plot(steps, curves.mean(0), color=color, label=f"trained with {label}")
                axis.fill_between(steps, *curves.aminmax(dim=0), color=color, alpha=0.18, linewidth=0)
            axis.set_ylim(limits)
            axis.grid(alpha=0.25)
            if scale == 1:
                axis.set_title(title, fontsize=11)
            else:
                axis.set_xlabel("training step")
                axis.text(0.97, height, meaning, transform=axis.transAxes, fontsize=8.5, ha="right")
        row[0].set_ylabel(name, fontsize=11)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)


def claims(records: list[Record]) -> list[Claim]:
    equal, scaled = ([r for r in records if r.settings["scale"] == scale] for scale in SCALES)
    conflict = 100 * mean(values(records, "conflict"))
    alike = [mean(values(found, "mean_similarity")) for found in (equal, scaled)]
    better = [100 * mean(values(found, "better")) for found in (equal, scaled)]
    at_length = [100 * mean(values(found, "better_at_length")) for found in (equal, scaled)]
    curvature = [mean(values(found, "mean_curvature")) for found in (equal, scaled)]
    return [
        Claim(f"The two tasks' gradients conflict in {conflict:.0f}% of the steps.", conflict > 20),
        Claim(
            "One loss at a tenth of its size makes the other task dominate: the magnitude similarity falls from "
            f"{alike[0]:.2f} to {alike[1]:.2f}.",
            alike[1] < alike[0] - 0.2,
        ),
        Claim(
            f"The loss curves upwards along the sum's gradient (curvature {curvature[0]:.1f} with equal losses, "
            f"{curvature[1]:.1f} with a scaled one): a step gains less than its gradient promises.",
            min(curvature) > 0,
        ),
        Claim(
            "Where the gradients conflict, PCGrad's step lowers the sum of the losses further than the sum's own step "
            f"more often with a dominated task ({better[1]:.0f}% of them) than with equal losses ({better[0]:.0f}%).",
            better[1] > better[0],
        ),
        Claim(
            "Brought to the length of the sum's step, PCGrad's is the better one in most of these cases: "
            f"{at_length[1]:.0f}% with a dominated task, {at_length[0]:.0f}% with equal losses.",
            min(at_length) > 50,
            stable=False,
        ),
    ]


EXPERIMENT = Experiment(
    title="PCGrad: conflict, dominance and curvature along a training",
    paper="Yu et al. 2020, *Gradient Surgery for Multi-Task Learning*, "
    "[arXiv 2001.06782](https://arxiv.org/abs/2001.06782).",
    claim="""Following the sum of several losses goes wrong, the paper says, where three conditions meet: the task
gradients conflict (their cosine is negative), one is much longer than the other (magnitude similarity `2 |g1| |g2| /
(|g1|² + |g2|²)` far below 1), and the loss curves strongly along the sum's gradient. PCGrad removes from each
gradient what conflicts with another. Here a small network reads two overlaid digits, once with both losses equal and
once with that of the right digit multiplied by 0.1. Every ten steps we measure all three on the batch at hand. The
curvature is `2 (L(θ') - L(θ) - g · (θ' - θ)) / |θ' - θ|²`, where L is the sum of the losses, g its gradient in the
trunk, and `θ' = θ - 0.1 g`: how far the loss after a step lies above what its gradient predicts. From the same point
and on the same batch we also try a step with PCGrad's update. The paper's figure in two dimensions is drawn by
[examples/landscapes.py](../../examples/landscapes.py).""",
    reading="""Lines are means over five seeds, bands reach from the lowest to the highest. All three conditions are
there in an ordinary training: more than half of the steps are in conflict, though mostly in a mild one (the mean
cosine is close to 0 after the first quarter); dominance comes from the scaled loss, and curvature rises within the
first steps. **What PCGrad gains in a single step depends on dominance.** With a dominated task its step lowers the
sum of the losses further in most conflicts. With equal losses it seldom does: both gradients lose their conflicting
part, the update is a tenth longer than the sum, and at a curvature this close to the dashed line a longer step
overshoots. At the length of the sum's step it is the better one in most conflicts there, too. The paper asks for high
curvature; here the gain is larger where curvature is lower.

What this does not show is that the final network is better. With equal losses both accuracies are the same within the
spread. With the scaled loss PCGrad's networks of 16 units read more of the neglected digits after 2,000 steps, with a
large spread over the seeds; the next section has more methods and the average of both digits.""",
    cases=cases,
    run=run,
    table=table,
    draw=draw,
    claims=claims,
    size=(10, 5.6),
    seeds=5,
)

if __name__ == "__main__":
    main(EXPERIMENT)
