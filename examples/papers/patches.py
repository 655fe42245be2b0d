"""K for the price of 1: one frozen network, and for each further task a patch of a few hundred numbers.

    +    convert(network, DOMAINS, "separate", "head")                      # a classifier for each task
    +    convert(network, DOMAINS, "patch", where=nn.BatchNorm2d)           # scale, shift and statistics of each norm
    +    convert(network, DOMAINS, "patch", where="depthwise*")              # the depthwise filters
    ...
    +    with tasks(task_ids):
             loss = F.cross_entropy(network(pictures), labels)

The network is made of depthwise convolutions (3 x 3, one filter per channel) and pointwise ones (1 x 1), with a batch
norm behind each, as mobile networks are. Almost all of its numbers are in the pointwise ones, which stay frozen.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from statistics import stdev
from typing import Any

import torch
from experiment import Claim, Experiment, Record, Settings, Table, grouped, main, mean, spread
from matplotlib.figure import Figure
from networks import CLASSES, Spread, accuracies, domain_sets, fit
from torch import nn

from fastmtl.nn import TaskScaleShift, convert, param_groups, shared_parameters, task_parameters

DOMAINS = ("inverted", "turned", "shuffled")
BLOCKS, WIDTH = 3, 48
RATE = 5e-3
KINDS = {
    "head": "head",
    "scale": "head + scale and shift (`TaskScaleShift`)",
    "norms": "head + batch norms",
    "depthwise": "head + depthwise filters",
    "both": "head + norms + depthwise filters",
    "norms alone": "norms alone, one head for all",
    "full": "full fine-tuning",
}


def cases(seeds: int, quick: bool) -> list[Settings]:
    kinds = ("head", "norms", "full") if quick else KINDS
    return [{"kind": kind, "steps": 60 if quick else 200, "seed": seed} for kind in kinds for seed in range(seeds)]


def mobile() -> nn.Sequential:
    parts: list[tuple[str, nn.Module]] = [("spread", Spread(WIDTH))]
    for k in range(BLOCKS):
        parts += [
            (f"depthwise{k}", nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH, bias=False)),
            (f"norm{k}a", nn.BatchNorm2d(WIDTH)),
            (f"pointwise{k}", nn.Conv2d(WIDTH, WIDTH, 1, bias=False)),
            (f"norm{k}b", nn.BatchNorm2d(WIDTH)),
            (f"relu{k}", nn.ReLU()),
        ]
    parts += [("pool", nn.AdaptiveAvgPool2d(1)), ("flat", nn.Flatten()), ("head", nn.Linear(WIDTH, CLASSES))]
    return nn.Sequential(OrderedDict(parts))


@functools.cache
def pretrained(steps: int, seed: int) -> nn.Sequential:
    """On plain digits; its random numbers are its own."""
    with torch.random.fork_rng():
        torch.manual_seed(1000 + seed)
        network = mobile()
        fit(network, domain_sets(["plain"])[0], torch.optim.Adam(network.parameters(), lr=RATE), steps)
    return network


def patched(kind: str, network: nn.Sequential) -> nn.Sequential:
    """The network with parts for each domain, in the mode in which it is trained."""
    if kind in ("norms", "both", "norms alone"):
        convert(network, DOMAINS, "patch", where=nn.BatchNorm2d)
    else:
        network.eval()  # one norm for all, whose statistics stay
    if kind in ("depthwise", "both"):
        convert(network, DOMAINS, "patch", where="depthwise*", joint=True)
    if kind == "scale":
        for name, norm in list(network.named_children()):
            if isinstance(norm, nn.BatchNorm2d):
                setattr(network, name, nn.Sequential(norm, TaskScaleShift(WIDTH, DOMAINS)))
    if kind != "norms alone":
        convert(network, DOMAINS, "separate", "head")
    for p in shared_parameters(network):
        p.requires_grad_(False)
    return network


def run(kind: str, steps: int, seed: int) -> dict[str, Any]:
    training, testing = domain_sets(DOMAINS)
    base = pretrained(steps, seed)
    size = sum(p.numel() for p in base.parameters())
    if kind == "full":
        found = []
        for t in range(len(DOMAINS)):
            network = copy.deepcopy(base)
            fit(network, training.one(t), torch.optim.Adam(network.parameters(), lr=RATE), steps)
            found += accuracies(network, testing.one(t))
        return {"accuracy": found, "own": size, "size": size}
    network = patched(kind, copy.deepcopy(base))
    fit(network, training, torch.optim.Adam(param_groups(network), lr=RATE), steps)
    own = sum(p.numel() for p in task_parameters(network, 0))
    return {"accuracy": accuracies(network, testing), "own": own, "size": size}


def average(records: list[Record]) -> list[float]:
    """Of each seed, over the domains."""
    return [mean(record.result["accuracy"]) for record in records]


def table(records: list[Record]) -> Table:
    rows = []
    for (kind,), group in grouped(records, "kind").items():
        own, size = group[0].result["own"], group[0].result["size"]
        domains = [spread([r.result["accuracy"][t] for r in group]) for t in range(len(DOMAINS))]
        rows.append([KINDS[kind], f"{own:,}", f"{100 * own / size:.0f}", spread(average(group)), *domains])
    return Table(["trained for each task", "numbers per task", "% of the network", "accuracy, %", *DOMAINS], rows)


def draw(records: list[Record], figure: Figure) -> None:
    axes = figure.subplots()
    colours = dict(
        zip(KINDS, ("#000000", "#e69f00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#d55e00"), strict=True)
    )
    markers = dict(zip(KINDS, "osD^vPX", strict=True))
    for (kind,), group in grouped(records, "kind").items():
        share = 100 * group[0].result["own"] / group[0].result["size"]
        axes.errorbar(
            share, mean(average(group)), stdev(average(group)) if len(group) > 1 else 0, fmt=markers[kind],
            color=colours[kind], markersize=9, capsize=3, linestyle="none", label=KINDS[kind].replace("`", ""),
        )  # fmt: skip
    axes.set_xscale("log")
    ticks = (3, 5, 10, 20, 30, 50, 100)
    axes.set_xticks(ticks, [f"{t}%" for t in ticks])
    axes.minorticks_off()
    axes.set(
        xlabel="numbers that each task trains, % of the network's (logarithmic)", ylabel="accuracy, %, mean of domains"
    )
    axes.set_title("What a patch costs and brings", loc="left")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=9, frameon=False)


def claims(records: list[Record]) -> list[Claim]:
    groups = {kind: group for (kind,), group in grouped(records, "kind").items()}
    level = {kind: mean(average(group)) for kind, group in groups.items()}
    share = {kind: 100 * group[0].result["own"] / group[0].result["size"] for kind, group in groups.items()}
    found = [
        Claim(
            f"A patch of the norms beside the head ({share['norms']:.0f}% of the network per task) beats the head "
            f"alone: {level['norms']:.1f} against {level['head']:.1f}%.",
            level["norms"] > level["head"],
        ),
        Claim(
            f"Full fine-tuning, with all numbers for each task, stays ahead of the norm patch: {level['full']:.1f}%.",
            level["full"] > level["norms"],
            stable=False,
        ),
    ]
    if "both" in level:
        closed = 100 * (level["both"] - level["head"]) / (level["full"] - level["head"])
        found.append(
            Claim(
                f"Norms and depthwise filters together ({share['both']:.0f}% of the network) close more than half of "
                f"the distance from the head alone to full fine-tuning: {closed:.0f}%, with {level['both']:.1f}%.",
                closed > 50,
                stable=False,
            )
        )
        found.append(
            Claim(
                f"Statistics of each domain help: norms by task, which have them, reach {level['norms']:.1f}%, scale "
                f"and shift behind a frozen norm {level['scale']:.1f}%, with as many trained numbers.",
                level["norms"] > level["scale"],
                stable=False,
            )
        )
    return found


EXPERIMENT = Experiment(
    title="K for the price of 1: model patches",
    paper=(
        "Mudrakarta et al. 2019, *K For The Price Of 1: Parameter-efficient Multi-task And Transfer Learning*, "
        "[arXiv 1810.10703](https://arxiv.org/abs/1810.10703)."
    ),
    claim="""
A trained network is kept as it is, and a new task gets a *patch*: a scale and a shift for each channel, or depthwise
filters, few numbers that stand throughout the network. The paper says that such patches do much better than a new
classifier alone. Here a small network of depthwise and pointwise convolutions has learned plain digits; three other
domains are added, all in one mixed batch.
""",
    reading="""
Patches do what the paper says of them: a few numbers in every layer are worth far more than a new classifier, and the
order is the expected one. Two kinds of patch together are worth more than either alone. Norms by task with one head
for all, the one that has learned plain digits, even beat a new head without a patch. Scale and shift behind a frozen
norm train exactly as many numbers as norms by task; what the latter have beside are the mean and the variance of their
own domain, and here that is most welcome, since pixels that are inverted or shuffled leave the first layers with other
statistics.

What differs from the paper is the price. In this network of some nine thousand numbers a patch is a tenth to a quarter
of all; in a network for photographs the pointwise convolutions grow with the square of the width and the patch with
the width, so that its share becomes very small. Full fine-tuning stays ahead here, because three domains of digits are
easy to learn anew.
""",
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
