"""TAPS on networks of the size it was made for: conversion, a mixed step, and a plain network of each task.

    +    convert(network, TASKS, "separate", "head")
    +    convert(network, TASKS, "taps")
    ...
    +    plain = merge(network, "photo")                   # without gates, deltas and fastmtl

Three well-known shapes, written out below, with random weights: what is shown is that these calls are all it takes,
that the merged networks compute what the mixed one does, and what the differences cost. Nothing is learned here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from experiment import Claim, Experiment, Record, Settings, Table, main
from matplotlib.figure import Figure
from torch import Tensor, nn

from fastmtl.nn import convert, layer_report, merge, param_groups, sparsity_loss, task_parameters, tasks

TASKS = ("photo", "sketch")
CLASSES, SIDE, SAMPLES = 10, 64, 4


class Bottleneck(nn.Module):
    """Of ResNet-50: 1 x 1, 3 x 3 and 1 x 1 convolutions, and a way around them."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        after = 4 * width
        self.inside = nn.Sequential(
            nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, after, 1, bias=False), nn.BatchNorm2d(after),
        )  # fmt: skip
        self.around: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.around = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.inside(x) + self.around(x))


class Dense(nn.Module):
    """Of DenseNet: a layer that adds 32 channels to what it sees."""

    def __init__(self, before: int, growth: int = 32) -> None:
        super().__init__()
        self.inside = nn.Sequential(
            nn.BatchNorm2d(before), nn.ReLU(), nn.Conv2d(before, 4 * growth, 1, bias=False),
            nn.BatchNorm2d(4 * growth), nn.ReLU(), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.inside(x)], 1)


def stem() -> list[nn.Module]:
    return [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]


class Classified(nn.Module):
    def __init__(self, body: list[nn.Module], width: int) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(*body), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.head(x.mean((2, 3)) if x.dim() == 4 else x.mean(1))


class Patches(nn.Module):
    """Of a vision transformer: 16 x 16 pixels become a token; with learned positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, width, 16, 16)
        self.positions = nn.Parameter(torch.zeros(1, (SIDE // 16) ** 2, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x).flatten(2).mT + self.positions


def resnet(quick: bool) -> nn.Module:
    body, before = stem(), 64
    for stage, depth in enumerate((1, 1, 1, 1) if quick else (3, 4, 6, 3)):
        for block in range(depth):
            body.append(Bottleneck(before, 64 << stage, 2 if stage and block == 0 else 1))
            before = 256 << stage
    return Classified(body, before)


def densenet(quick: bool) -> nn.Module:
    body, width = stem(), 64
    depths = (2, 2) if quick else (6, 12, 24, 16)
    for stage, depth in enumerate(depths):
        for _ in range(depth):
            body.append(Dense(width))
            width += 32
        body += [nn.BatchNorm2d(width), nn.ReLU()]
        if stage < len(depths) - 1:
            body += [nn.Conv2d(width, width // 2, 1, bias=False), nn.AvgPool2d(2)]
            width //= 2
    return Classified(body, width)


def vit(quick: bool) -> nn.Module:
    width, heads, depth = (192, 3, 2) if quick else (768, 12, 12)
    layer = nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    encoder = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
    return Classified([Patches(width), encoder], width)


SHAPES: dict[str, Callable[[bool], nn.Module]] = {"ResNet-50": resnet, "DenseNet-121": densenet, "ViT-B/16": vit}


def cases(seeds: int, quick: bool) -> list[Settings]:
    return [{"shape": shape, "quick": quick, "seed": seed} for shape in SHAPES for seed in range(seeds)]


def run(shape: str, quick: bool, seed: int) -> dict[str, Any]:
    network = SHAPES[shape](quick)
    # an attention has a weight for each of query, key and value in one, and a linear layer behind them
    weights = {nn.Conv2d: 1, nn.Linear: 1, nn.MultiheadAttention: 3}
    products = sum(n for layer in network.modules() for kind, n in weights.items() if isinstance(layer, kind)) - 1
    pictures = torch.randn(2 * SAMPLES, 3, SIDE, SIDE)
    labels, ids = torch.randint(CLASSES, (2 * SAMPLES,)), torch.arange(2 * SAMPLES) % 2
    convert(network, TASKS, "separate", "head")
    begin = time.process_time()
    convert(network, TASKS, "taps")
    converting = time.process_time() - begin
    optimizer = torch.optim.SGD(param_groups(network), lr=0.01, momentum=0.9)
    begin = time.process_time()
    with tasks(ids):
        loss = F.cross_entropy(network(pictures), labels) + 0.1 * sparsity_loss(network)
    loss.backward()
    optimizer.step()
    stepping = time.process_time() - begin
    # after one step all gates are open still: some are closed by hand, so that both kinds are merged
    gates = {name: [p for p in task_parameters(network, name) if p.dim() == 0] for name in TASKS}
    with torch.no_grad():
        for t, name in enumerate(TASKS):
            for gate in gates[name][t::3]:
                gate.fill_(0)

    # in float64, since deep networks with random weights amplify the rounding of float32
    network.double().eval()
    pictures = pictures.double()
    with torch.no_grad():
        with tasks(ids):
            mixed = network(pictures)
        begin = time.process_time()
        plain = {name: merge(network, name) for name in TASKS}
        merging = time.process_time() - begin
        apart = max(
            float((plain[name](pictures[ids == t]) - mixed[ids == t]).norm() / mixed[ids == t].norm())
            for t, name in enumerate(TASKS)
        )
    foreign = {type(layer).__module__ for model in plain.values() for layer in model.modules()}
    report = layer_report(network)
    deltas = sum(layer.delta["photo"].numel() for layer in network.modules() if "delta" in dict(layer.named_children()))
    return {
        "base": report.base,
        "products": products,
        "gated": len(gates["photo"]),
        "closed": len(gates["photo"][::3]),
        "deltas": deltas,
        "size": round(report.size, 3),
        "seconds": {"convert": round(converting, 2), "step": round(stepping, 2), "merge": round(merging, 2)},
        "apart": float(f"{apart:.2e}"),
        "foreign": sorted(name for name in foreign if name.startswith("fastmtl")),
    }


def table(records: list[Record]) -> Table:
    head = ["network", "numbers, millions", "gated layers", "deltas of a task, MB", "both tasks merged: apart"]
    rows = []
    for record in records:
        result = record.result
        seconds = result["seconds"]
        rows.append([
            record.settings["shape"] + (" (cut short)" if record.settings["quick"] else ""),
            f"{result['base'] / 1e6:.1f}",
            str(result["gated"]),
            f"{result['deltas'] * 4 / 1e6:.0f}",
            f"{result['apart']:.0e}",
            *(f"{seconds[what]:.1f}" for what in ("convert", "step", "merge")),
        ])  # fmt: skip
    return Table([*head, "convert, CPU s", "step, CPU s", "merge, CPU s"], rows)


def draw(records: list[Record], figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    names = [record.settings["shape"] for record in records]
    places = range(len(names))
    megabytes = [[record.result[key] * 4 / 1e6 for record in records] for key in ("base", "deltas")]
    for shift, label, values, colour in zip(
        (-0.2, 0.2),
        ("shared weights", "deltas of one task, all gates open"),
        megabytes,
        ("#000000", "#0072b2"),
        strict=True,
    ):
        bars = left.bar([k + shift for k in places], values, 0.38, color=colour, label=label)
        left.bar_label(bars, [f"{v:.0f}" for v in values], fontsize=9, padding=2)
    left.set(ylabel="megabytes, float32", ylim=(0, 1.25 * max(megabytes[0])))
    left.set_title("What is kept", loc="left")
    left.legend(loc="upper left", fontsize=9, frameon=False)
    colours = {"convert": "#56b4e9", "step": "#e69f00", "merge": "#009e73"}
    for k, (what, colour) in enumerate(colours.items()):
        taken = [record.result["seconds"][what] for record in records]
        label = {"convert": "convert", "step": "first training step", "merge": "merge, both tasks"}[what]
        bars = right.bar([p + 0.27 * (k - 1) for p in places], taken, 0.25, color=colour, label=label)
        right.bar_label(bars, [f"{v:.1f}" for v in taken], fontsize=9, padding=2)
    right.set(ylabel="CPU seconds", ylim=(0, 1.15 * max(max(r.result["seconds"].values()) for r in records)))
    right.set_title("What the calls take", loc="left")
    right.legend(loc="upper left", fontsize=9, frameon=False)
    for at in (left, right):
        at.set_xticks(places, names)


def claims(records: list[Record]) -> list[Claim]:
    furthest = max(record.result["apart"] for record in records)
    gated = ", ".join(f"{record.settings['shape']} {record.result['gated']}" for record in records)
    closed = all(0 < record.result["closed"] < record.result["gated"] for record in records)
    return [
        Claim(
            "The merged network of each task computes what the mixed one does, with some gates open and some closed: "
            f"scores are at most {furthest:.0e} apart, relatively, in float64.",
            furthest < 1e-10 and closed,
        ),
        Claim(
            f"All convolutions and linear layers but the head are gated: {gated}.",
            all(record.result["gated"] == record.result["products"] for record in records),
        ),
        Claim(
            "No layer of fastmtl is left in a merged network.",
            not any(record.result["foreign"] for record in records),
        ),
    ]


EXPERIMENT = Experiment(
    title="TAPS on ResNet-50, DenseNet-121 and ViT-B",
    paper="Wallingford et al. 2022, *Task Adaptive Parameter Sharing for Multi-Task Learning*, "
    "[arXiv 2203.16708](https://arxiv.org/abs/2203.16708).",
    claim="""
The paper adapts large pretrained networks. Weights for them are not at hand here, so this shows the code path alone,
on networks of the right shape with random weights: a call converts them, a batch of both tasks trains one step, some
gates are closed, and each task's network is merged and compared with the mixed one. Pictures are of 64 x 64 pixels,
the batch has 4 of each of two tasks.
""",
    reading="""
The networks have the sizes of the published ones, but for heads of ten classes. Differences of one task are as large
as the gated weights while all gates are open, which is the memory to reckon with in training; `extract` keeps the open
ones alone. The comparison is made in float64: deep networks with random weights amplify the rounding of float32, and
what is to be seen is whether both compute the same. Seconds are of one processor with one thread, the first step
includes what every first step does, and merging is done in float64; they say that this is a matter of seconds, and are
no benchmark ([benchmarks](../benchmarks/index.md) are elsewhere). No accuracy of the paper is reproduced.
""",
    cases=cases,
    run=run,
    table=table,
    draw=draw,
    claims=claims,
    size=(10, 4),
    seeds=1,
)

if __name__ == "__main__":
    main(EXPERIMENT)
