"""TAPS: each task learns which layers it changes, and pays for each of them.

    +    convert(network, DOMAINS, "separate", "head")         # a classifier for each task
    +    convert(network, DOMAINS, "taps")                     # a gated difference on every other layer
    +    optimizer = torch.optim.SGD(param_groups(network), lr=0.01, momentum=0.9)
    ...
    +    with tasks(task_ids):
             loss = F.cross_entropy(network(pictures), labels)
    +        loss = loss + lam * sparsity_loss(network)

A network that has learned plain digits is adapted to three other domains: sequentially (its weights stay as they are),
from a network that all domains trained together (memory-efficient joint), or with its weights trained along (full
joint).
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from experiment import Claim, Experiment, Record, Settings, Table, grouped, main, mean, spread, values
from matplotlib.figure import Figure
from networks import Sets, accuracies, domain_sets, fit, mlp, sgd
from torch import nn

from fastmtl.nn import convert, layer_report, param_groups, sparsity_loss

DOMAINS = ("inverted", "turned", "shuffled")
LAYERS = 5
LAMBDAS = (0.0, 0.1, 0.3, 1.0, 3.0)
RATE = 0.01
VARIANTS = {"sequential": "TAPS, sequential", "from joint": "TAPS, memory-efficient joint", "joint": "TAPS, full joint"}
BASELINES = {
    "head": "head only",
    "full": "full fine-tuning",
    "independent": "independent, from scratch",
    "shared": "one network for all domains",
}
COLOURS = dict(zip(VARIANTS, ("#0072b2", "#d55e00", "#009e73"), strict=True))


def cases(seeds: int, quick: bool) -> list[Settings]:
    steps = 120 if quick else 400
    lambdas = (0.0, 0.3, 3.0) if quick else LAMBDAS
    some = [(name, None) for name in BASELINES] + [
        (name, lam) for name in (["sequential"] if quick else VARIANTS) for lam in lambdas
    ]
    return [{"variant": v, "lam": lam, "steps": steps, "seed": s} for v, lam in some for s in range(seeds)]


@functools.cache
def pretrained(steps: int, seed: int, on: tuple[str, ...]) -> nn.Sequential:
    """One network for the domains, which do not differ for it; its random numbers are its own."""
    with torch.random.fork_rng():
        torch.manual_seed(1000 + seed)
        network = mlp(LAYERS)
        fit(network, domain_sets(on)[0], sgd(network.parameters(), RATE), steps)
    return network


def adapted(variant: str, lam: float, steps: int, seed: int, training: Sets) -> nn.Module:
    base = pretrained(steps, seed, DOMAINS if variant == "from joint" else ("plain",))
    network = copy.deepcopy(base)
    convert(network, DOMAINS, "separate", "head")
    convert(network, DOMAINS, "taps", joint=variant == "joint")

    def price() -> torch.Tensor:
        return lam * sparsity_loss(network)

    if variant == "joint":
        fit(network, training, sgd(param_groups(network), RATE), steps, penalty=price)
    else:
        # one after another: none touches what another has
        for t, name in enumerate(DOMAINS):
            fit(network, training.one(t), sgd(param_groups(network, task=name), RATE), steps, [name], price)
    return network


def run(variant: str, lam: float | None, steps: int, seed: int) -> dict[str, Any]:
    training, testing = domain_sets(DOMAINS)
    if variant in VARIANTS:
        network = adapted(variant, lam or 0.0, steps, seed, training)
        report = layer_report(network)
        active = [[int(c) for c in report.changed[name][:LAYERS]] for name in DOMAINS]
        return {"accuracy": accuracies(network, testing), "active": active, "size": round(report.size, 3)}
    if variant == "shared":
        found = accuracies(pretrained(steps, seed, DOMAINS), testing)
        return {"accuracy": found, "active": None, "size": None}
    found = []
    for t in range(len(DOMAINS)):
        network = mlp(LAYERS) if variant == "independent" else copy.deepcopy(pretrained(steps, seed, ("plain",)))
        trained = network.head if variant == "head" else network
        fit(network, training.one(t), sgd(trained.parameters(), RATE), steps)
        found += accuracies(network, testing.one(t))
    return {"accuracy": found, "active": None, "size": None}


def average(records: list[Record]) -> list[float]:
    """Of each seed, over the domains."""
    return [mean(record.result["accuracy"]) for record in records]


def shares(records: list[Record]) -> list[float]:
    """Of each seed, the share of layers that are active, in percent."""
    return [100 * mean([c for row in record.result["active"] for c in row]) for record in records]


def table(records: list[Record]) -> Table:
    rows = []
    for (variant, lam), group in grouped(records, "variant", "lam").items():
        taps = variant in VARIANTS
        rows.append([
            VARIANTS[variant] if taps else BASELINES[variant],
            f"{lam:g}" if taps else "",
            spread(average(group)),
            spread(shares(group), 0) if taps else "",
            f"{mean(values(group, 'size')):.2f}x" if taps else "",
        ])  # fmt: skip
    return Table(["network", "lambda", "accuracy, %", "active layers, %", "numbers kept, x one network"], rows)


def draw(records: list[Record], figure: Figure) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    groups = grouped(records, "variant", "lam")
    styles = {"head": ":", "full": "-", "independent": "--", "shared": "-."}
    for name, label in BASELINES.items():
        level = mean(average(groups[name, None]))
        left.axhline(level, color="0.45", linestyle=styles[name], linewidth=1.3, label=f"{label} ({level:.1f})")
    for variant, label in VARIANTS.items():
        points = [(lam, mean(shares(g)), mean(average(g))) for (v, lam), g in groups.items() if v == variant]
        if points:
            _, x, y = zip(*points, strict=True)
            left.plot(x, y, "o-", color=COLOURS[variant], markersize=5, label=label)
        if variant == "sequential":
            for lam, share, level in points:
                left.annotate(f"λ={lam:g}", (share, level), (4, -22), textcoords="offset points", fontsize=9)
    left.set(
        xlabel="active layers, % of all layers and domains", ylabel="accuracy, %, mean over domains", xlim=(-4, 104)
    )
    left.set_title("What a changed layer is worth", loc="left")
    left.legend(loc="lower right", bbox_to_anchor=(1, 0.12), fontsize=8.5, frameon=False)
    lambdas = [lam for variant, lam in groups if variant == "sequential"]
    rows = [(domain, lam) for domain in range(len(DOMAINS)) for lam in lambdas]
    cells = [
        [mean([r.result["active"][domain][k] for r in groups["sequential", lam]]) for k in range(LAYERS)]
        for domain, lam in rows
    ]
    shown = right.imshow(cells, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    right.set_yticks(range(len(rows)), [f"{lam:g}" for _, lam in rows], fontsize=8.5)
    right.set_xticks(range(LAYERS), [str(k) for k in range(LAYERS)])
    right.set(xlabel="layer, 0 is next to the pixels", ylabel="λ")
    for domain, name in enumerate(DOMAINS):
        begin = domain * len(lambdas)
        right.axhline(begin - 0.5, color="black", linewidth=1)
        right.text(LAYERS - 0.4, begin + (len(lambdas) - 1) / 2, name, rotation=270, va="center", fontsize=9)
    right.set_title("Which layers are active (sequential)", loc="left")
    bar = figure.colorbar(shown, ax=right, pad=0.1)
    bar.set_label("share of seeds")


def claims(records: list[Record]) -> list[Claim]:
    groups = grouped(records, "variant", "lam")
    taps = {lam: group for (variant, lam), group in groups.items() if variant == "sequential"}
    free, middle, dear = (taps[lam] for lam in (0.0, 0.3, 3.0))
    full, head = mean(average(groups["full", None])), mean(average(groups["head", None]))
    open_, some, few = (mean(shares(group)) for group in (free, middle, dear))
    layers = [mean([row[k] for g in taps.values() for r in g for row in r.result["active"]]) for k in range(LAYERS)]
    bottom, top = 100 * layers[0], 100 * layers[-1]
    found = [
        Claim(
            f"A higher λ leaves fewer layers active: {open_:.0f}% at λ = 0, {some:.0f}% at 0.3, {few:.0f}% at 3.",
            open_ > some > few,
        ),
        Claim(
            f"With {some:.0f}% of the layers (λ = 0.3) TAPS comes within 2 points of full fine-tuning "
            f"({mean(average(middle)):.1f} against {full:.1f}%), which a new head alone misses by far ({head:.1f}%).",
            mean(average(middle)) > full - 2 and head < full - 10,
            stable=False,
        ),
        Claim(
            f"TAPS with λ = 0.3 beats a new head alone ({mean(average(middle)):.1f} against {head:.1f}%).",
            mean(average(middle)) > head,
        ),
        Claim(
            f"Here the active layers lie at the bottom: over all λ the lowest is active in {bottom:.0f}% of cases, the "
            f"topmost in {top:.0f}%.",
            bottom > top,
        ),
    ]
    other = {v: [g for (w, lam), g in groups.items() if w == v and lam == 0.3] for v in ("from joint", "joint")}
    if all(other.values()):
        first, second = other["from joint"][0], other["joint"][0]
        found.append(
            Claim(
                f"Both joint variants need fewer layers at λ = 0.3 ({mean(shares(first)):.0f}% and "
                f"{mean(shares(second)):.0f}%, against {some:.0f}%), since their shared weights know all domains.",
                max(mean(shares(first)), mean(shares(second))) < some,
            )
        )
    return found


EXPERIMENT = Experiment(
    title="TAPS: which layers does a task change?",
    paper="Wallingford et al. 2022, *Task Adaptive Parameter Sharing for Multi-Task Learning*, "
    "[arXiv 2203.16708](https://arxiv.org/abs/2203.16708).",
    claim="""
A network that has learned one thing is adapted to several tasks. Each task may change any layer, but pays λ for each
that it changes: a gate in front of the layer's difference is learned together with it. The paper says that a fraction
of the layers is enough to come close to fine-tuning all of them. Here a perceptron of five equal layers, trained on
plain digits, is adapted to three other domains (inverted, turned by 90 degrees, pixels shuffled), each with a head of
its own. A layer is active where its gate is open at the end and its difference is not zero.

The paper has three variants. *Sequential*: the pretrained weights stay as they are, and one task after another gets its
differences. *Memory-efficient joint*: first one plain network is trained on all domains together, then it is adapted as
in the sequential variant. *Full joint*: the shared weights are trained together with the gates and the differences of
all tasks, on batches that mix the domains. The last column is what has to be kept for all three tasks, the shared
network, the differences of active layers and the heads, as a multiple of one plain network.
""",
    reading="""
Read the left picture from right to left: as λ rises, layers are given up, and accuracy falls by a point or two until
about a quarter of them is left; at λ = 3 some seeds close a layer too many, and the spread grows. That agrees with the
paper. **Which** layers stay does not: in the paper's figure the changed layers lie mostly near the classifier, here
they lie next to the pixels. These domains move or invert pixels and ask for the same digits, so what has to change is
how pixels are read; photographs share edges and textures, and differ in what they show. The heat map tells where a
task differs from what the network has learned, and is no law about layers.

Even at λ = 0, where a layer costs nothing, 15% of the layers end inactive in the sequential variant and 52% in the
memory-efficient joint one. Their differences are not zero; their gates have closed. A gate begins at 0.15, is open from
0.1 on, and follows a gradient of its own: it falls where less of the layer's difference would lower the loss of the
batch at hand. While it is closed, the difference is not trained. We looked at the gates of these two variants in a
trial that is not in the records: each of the inactive layers had a closed gate and a difference that was not zero. In
the sequential variant these layers are among the upper two. In the memory-efficient joint one, whose shared weights
know the domains, the differences stay small (their norms are 3% of the weights', against 17%), and so do the gradients
of the gates: two thirds of all gates ended within 0.01 of the threshold, and more than half had crossed it more than
once.

In the joint variants the shared weights have seen all domains already, and one network for all is as good here as
fine-tuning. Differences have nothing left to win: a price of 0.3 closes nearly every gate and costs less than a point.
Independent networks are as good as any, because a digit needs so little training: nothing on this page says that
adapting beats training anew.
""",
    cases=cases,
    run=run,
    table=table,
    draw=draw,
    claims=claims,
    size=(10, 4.4),
    seeds=5,
)

if __name__ == "__main__":
    main(EXPERIMENT)
