"""LiNeS: lower layers keep less of what a task has learned, higher ones more, after training.

    +    convert(network, DOMAINS, "dense", joint=False)      # a difference of each task from the pretrained weights
    ...                                                       # trained on batches that mix the domains
    +    line_scale(network, alpha, beta)                     # layer l of L keeps alpha + beta * l / (L - 1)
    +    vectors = task_vectors(network)                      # summed, and added to the pretrained weights

Scaled vectors are looked at in two ways: one task's alone, which should keep what the pretrained network could do, and
the sum of all, one network for all tasks without any part of a task.
"""

from __future__ import annotations

import copy
import functools
import operator
from typing import Any

import torch
from data import pools
from experiment import Claim, Experiment, Record, Settings, Table, grouped, main, mean, spread
from matplotlib.figure import Figure
from networks import Sets, accuracies, fit, mlp
from torch import Tensor, nn

from fastmtl.nn import convert, line_scale, merge, param_groups, task_vectors

# the same digits, a little changed: tasks differ in their pixels
DOMAINS = ("shifted", "sheared", "faded", "noisy")
# two digits each: tasks differ in what they ask for
PAIRS = ("0 or 1", "2 or 3", "4 or 5", "6 or 7", "8 or 9")
FAMILIES = {"domains": DOMAINS, "pairs": PAIRS}
LAYERS, RATE = 6, 1e-3
TUNING = 400  # pictures of the training set, on which the factors are chosen
FACTORS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
# by the factors of the bottom and the top layer
SHAPES = {
    "unscaled": lambda bottom, top: bottom == top == 1,
    "uniform": operator.eq,
    "line": operator.le,
    "reversed": operator.ge,
}
LABELS = {
    "unscaled": "unscaled",
    "uniform": "uniform",
    "line": "LiNeS: top layers keep more",
    "reversed": "reversed: bottom layers keep more",
}
STYLES = {"uniform": ("o-", "#000000"), "line": ("s-", "#0072b2"), "reversed": ("^-", "#d55e00")}


def cases(seeds: int, quick: bool) -> list[Settings]:
    families = ("domains",) if quick else FAMILIES
    return [{"family": f, "steps": 120 if quick else 300, "seed": s} for f in families for s in range(seeds)]


def as_domain(images: Tensor, name: str) -> Tensor:
    if name == "shifted":
        return images.roll(1, 2)
    if name == "sheared":
        return torch.stack([images[:, row].roll(row // 3, 1) for row in range(8)], 1)
    if name == "faded":
        return 0.5 + 0.25 * images
    if name == "noisy":
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(len(images)))
        return images + 0.3 * noise
    return images


def sets_of(names: tuple[str, ...]) -> tuple[Sets, Sets, Sets]:
    """For training, for choosing factors, for testing."""
    training, testing = pools()

    def of(images: Tensor, labels: Tensor) -> Sets:
        if names != PAIRS:
            seen = torch.stack([as_domain(images, name) for name in names])
            return Sets(2 * seen - 1, labels.expand(len(names), -1))
        # of each pair as many, so that some pictures come twice
        rows = [(labels // 2 == t).nonzero()[:, 0] for t in range(len(PAIRS))]
        rows = [found[torch.arange(len(labels) // 4) % len(found)] for found in rows]
        return Sets(torch.stack([2 * images[found] - 1 for found in rows]), torch.stack([labels[f] for f in rows]))

    kept = slice(TUNING, None), slice(0, TUNING)
    first, second = (of(training.images[part], training.labels[part]) for part in kept)
    return first, second, of(testing.images, testing.labels)


@functools.cache
def pretrained(steps: int, seed: int) -> nn.Sequential:
    """On plain digits; its random numbers are its own."""
    with torch.random.fork_rng():
        torch.manual_seed(1000 + seed)
        network = mlp(LAYERS)
        fit(network, sets_of(("plain",))[0], torch.optim.Adam(network.parameters(), lr=RATE), steps)
    return network


def summed(base: nn.Module, network: nn.Module, alpha: float, beta: float) -> nn.Module:
    """One plain network: the pretrained one, and the scaled vectors of all tasks."""
    scaled = copy.deepcopy(network)
    line_scale(scaled, alpha, beta)
    state = copy.deepcopy(base.state_dict())
    for vector in task_vectors(scaled).values():
        for name, delta in vector.items():
            state[name] += delta
    merged = copy.deepcopy(base)
    merged.load_state_dict(state)
    return merged


def run(family: str, steps: int, seed: int) -> dict[str, Any]:
    names = FAMILIES[family]
    training, tuning, testing = sets_of(names)
    plain = sets_of(("plain",))[2]
    base = pretrained(steps, seed)
    network = convert(copy.deepcopy(base), names, "dense", joint=False)
    fit(network, training, torch.optim.Adam(param_groups(network), lr=RATE), steps)

    # all in one: factors of the bottom and the top layer, chosen on pictures that are not tested on
    grid = [(bottom, top) for bottom in FACTORS for top in FACTORS]
    levels = {(b, t): mean(accuracies(summed(base, network, b, t - b), tuning)) for b, t in grid}
    merged = {}
    for shape, fits in SHAPES.items():
        bottom, top = max((pair for pair in grid if fits(*pair)), key=levels.__getitem__)
        level = mean(accuracies(summed(base, network, bottom, top - bottom), testing))
        merged[shape] = [bottom, top, round(level, 3)]

    # each alone, from nothing of its vector, or of one end of it, to all of it
    def alone(bottom: float, top: float) -> tuple[float, float]:
        scaled = copy.deepcopy(network)
        line_scale(scaled, bottom, top - bottom)
        own = [accuracies(merge(scaled, name), testing.one(t))[0] for t, name in enumerate(names)]
        before = [accuracies(merge(scaled, name), plain)[0] for name in names]
        return round(mean(own), 3), round(mean(before), 3)

    ends = {"uniform": lambda a: (a, a), "line": lambda a: (a, 1.0), "reversed": lambda a: (1.0, a)}
    return {
        "pretrained": [round(mean(accuracies(base, testing)), 3), accuracies(base, plain)[0]],
        "each": round(mean(accuracies(network, testing)), 3),
        "merged": merged,
        "alone": {shape: [alone(*end(a)) for a in FACTORS] for shape, end in ends.items()},
    }


def kept(records: list[Record], shape: str) -> list[float]:
    """Of each seed, the best accuracy on what was known before, with at most 3 points less on the task's own."""
    return [
        max(before for own, before in record.result["alone"][shape] if own >= record.result["each"] - 3)
        for record in records
    ]


def table(records: list[Record]) -> Table:
    rows = []
    for (family,), group in grouped(records, "family").items():
        for shape, label in LABELS.items():
            found = [record.result["merged"][shape] for record in group]
            factors = f"{mean([f[0] for f in found]):.2f} to {mean([f[1] for f in found]):.2f}"
            known = spread(kept(group, shape) if shape in STYLES else known_unscaled(group))
            rows.append([family, label, spread([f[2] for f in found]), factors, known])
    return Table(["tasks", "scaling", "one merged network, %", "factors, bottom to top", "known before, %"], rows)


def known_unscaled(records: list[Record]) -> list[float]:
    """Of each seed, the accuracy on what was known before, with all of the vector."""
    return [record.result["alone"]["uniform"][-1][1] for record in records]


def draw(records: list[Record], figure: Figure) -> None:
    groups = grouped(records, "family")
    axes = figure.subplots(1, len(groups), squeeze=False)[0]
    for at, ((family,), group) in zip(axes, groups.items(), strict=True):
        for shape, (style, colour) in STYLES.items():
            points = [
                [mean([r.result["alone"][shape][k][side] for r in group]) for k in range(len(FACTORS))]
                for side in (0, 1)
            ]
            at.plot(*points, style, color=colour, markersize=4.5, linewidth=1.5, label=LABELS[shape])
        own, before = (mean([r.result["pretrained"][side] for r in group]) for side in (0, 1))
        at.plot(own, before, "P", color="#009e73", markersize=10, zorder=3, label="pretrained network")
        own, before = mean([r.result["each"] for r in group]), mean(known_unscaled(group))
        at.plot(own, before, "X", color="#cc79a7", markersize=10, zorder=3, label="trained for the task")
        what = "four domains" if family == "domains" else "two digits each"
        at.set(title=f"tasks: {what}", xlabel="accuracy on the task itself, %")
    axes[0].set_ylabel("accuracy on what was known before, %")
    axes[-1].legend(loc="lower left", fontsize=9, frameon=False)


def claims(records: list[Record]) -> list[Claim]:
    found = []
    for (family,), group in grouped(records, "family").items():
        level = {shape: mean([r.result["merged"][shape][2] for r in group]) for shape in SHAPES}
        held = {shape: mean(kept(group, shape)) for shape in STYLES}
        where = "Domains" if family == "domains" else "Two digits each"
        found += [
            Claim(
                f"{where}: a sum of task vectors has to be scaled down: one network for all tasks reaches "
                f"{level['unscaled']:.1f}% with the sum as it is, {level['uniform']:.1f}% with one factor for all.",
                level["uniform"] > level["unscaled"],
            ),
            Claim(
                f"{where}: LiNeS makes a merged network that is better by half a point or more than one factor for all "
                f"layers: {level['line']:.1f} against {level['uniform']:.1f}%.",
                level["line"] >= level["uniform"] + 0.5,
                stable=False,
            ),
            Claim(
                f"{where}: where a task gives up at most 3 points, LiNeS keeps more of what was known before than one "
                f"factor does: {held['line']:.1f} against {held['uniform']:.1f}%.",
                held["line"] > held["uniform"],
                stable=False,
            ),
        ]
        if family == "domains":
            found.append(
                Claim(
                    f"{where}: which end keeps more matters less than a point to the merged network: LiNeS "
                    f"{level['line']:.1f}%, the line turned round {level['reversed']:.1f}%.",
                    abs(level["reversed"] - level["line"]) < 1,
                    stable=False,
                )
            )
    return found


EXPERIMENT = Experiment(
    title="LiNeS: scaling what a task has learned, layer by layer",
    paper=(
        "Wang et al. 2024, *LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging*, "
        "[arXiv 2410.17146](https://arxiv.org/abs/2410.17146)."
    ),
    claim="""
What training on a task has changed, the task vector, is scaled after training by a factor that rises in a line from
the bottom layer to the top. The paper says that the network then forgets less, and that a sum of several tasks'
vectors makes a better network for all of them, since bottom layers hold what tasks have in common. Here a perceptron
of six layers and a head has learned plain digits, and is trained on four mildly changed domains, or on two digits for
each task. Three shapes are compared: one factor for all layers, the line, and the line turned round. Factors of the
merged network are chosen on 400 pictures that are not tested on. The last column is about one task's own network: how
many plain digits of all kinds it still knows where scaling costs at most three points of its task.
""",
    reading="""
That a sum of task vectors must be scaled down is plain. Beyond one factor for all layers the line brings nothing here;
the numbers do not support the paper's claims on this data. On domains, all shapes make merged networks that are equally
good within the spread; the factors are chosen freely, and for LiNeS the choice falls on one factor for all layers. On
pairs of digits the best factor is zero or nearly so: the pretrained network knows all digits, and a sum of networks
that each know two makes it no better.

For one task's own network the picture shows the exchange of old knowledge for new, from the pretrained network (green)
to the trained one. The line is drawn here with a top layer that keeps all, so that it cannot come near the pretrained
network: on pairs the 63.6 in the table is the most that it keeps. Where it can be compared with one factor for all,
most of its points lie below that curve, by up to 2 points on domains and up to 16 on pairs. One point of each picture
lies above it: by 0.3 points on domains, next to the trained network, and by 3.4 on pairs, at the other end. **On pairs
the line turned round, whose bottom layers keep more, does better than both**: all of its points but the common end lie
above the curve of one factor, by up to 22 points. It keeps 50% of what was known before where the task loses nothing;
the trained network keeps 28%. But the curve is steep there, and the points of both lines differ by 0.3 points of the
task's own accuracy at most, which are eight of 2,500 tested pictures. On domains the line turned round lies within a
point of the curve.

The paper's reason for a line is that bottom layers hold what tasks have in common. These domains differ in their
pixels, so that bottom layers are where they have to differ (the heat map of TAPS above shows the same), and on pairs of
digits six small layers have no such order either. Large pretrained networks may well have it; this experiment cannot
tell.
""",
    cases=cases,
    run=run,
    table=table,
    draw=draw,
    claims=claims,
    size=(10, 4.2),
    seeds=5,
)

if __name__ == "__main__":
    main(EXPERIMENT)
