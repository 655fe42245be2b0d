"""Soft modularisation and CARE: tasks share a few modules, and each mixes them in shares of its own.

-    y = F.linear(x, weight)
+    shares = routing.softmax(1)                                # [T, K], learned
+    weights = torch.einsum("tk,koi->toi", shares, modules)     # each task's mixture of K weights
+    y = fastmtl.ops.task_linear(x, None, weights, task_ids)    # the whole mixed batch in one call

python examples/papers/soft_modules.py
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from data import domain, labels_of, pools
from experiment import Claim, Experiment, Record, Settings, Table, grouped, main, mean, spread, values
from matplotlib.figure import Figure
from torch import Tensor, nn

from fastmtl.ops import task_linear

# tasks on the same order of the pixels can share their first layers
TASKS = tuple((order, asked) for order in ("plain", "shuffled", "scattered") for asked in ("digit", "third"))
T, K, WIDTH, CLASSES = len(TASKS), 4, 16, 10
WAYS = ("one network", "one network, wider", "CARE", "soft modules", "network per task")
COLORS = ("#999999", "#56b4e9", "#e69f00", "#0072b2", "#d55e00")


def uniform(*shape: int) -> nn.Parameter:
    """Weights as `nn.Linear` draws them."""
    return nn.Parameter(torch.empty(shape).uniform_(-1, 1) / math.sqrt(shape[-1]))


class Mixed(nn.Module):
    """A linear layer of K modules, which every task mixes by shares that add up to 1."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.weights = uniform(K, outside, inside)
        self.bias = nn.Parameter(torch.zeros(K, outside))
        self.routing = nn.Parameter(torch.zeros(T, K))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        shares = self.routing.softmax(1)
        weights = torch.einsum("tk,koi->toi", shares, self.weights)
        return task_linear(x, None, weights, ids, bias=shares @ self.bias)


class Encoders(nn.Module):
    """CARE's: K encoders, whose results every task mixes; linear layers with a ReLU each."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.all = nn.Linear(inside, K * outside)
        self.routing = nn.Parameter(torch.zeros(T, K))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        results = F.relu(self.all(x)).unflatten(1, (K, -1))
        return torch.einsum("nk,nko->no", self.routing.softmax(1)[ids], results)


class Own(nn.Module):
    """A layer for each task, such as the heads."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.weight, self.bias = uniform(T, outside, inside), nn.Parameter(torch.zeros(T, outside))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return task_linear(x, None, self.weight, ids, bias=self.bias)


class Shared(nn.Linear):
    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return super().forward(x)


class Network(nn.Module):
    """Two layers of a kind, and a head for each task."""

    def __init__(self, way: str) -> None:
        super().__init__()
        width = 38 if way == "one network, wider" else WIDTH  # as many parameters as the soft modules
        first, second = {
            "CARE": (Encoders, Shared),
            "soft modules": (Mixed, Mixed),
            "network per task": (Own, Own),
        }.get(way, (Shared, Shared))
        self.first, self.second, self.head = first(64, width), second(width, width), Own(width, CLASSES)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(x, ids)), ids)), ids)


def run(way: str, steps: int, seed: int) -> dict:
    (images, labels), (test_images, test_labels) = pools()
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.stack([domain(images, order).flatten(1) for order, _ in TASKS])  # [T, N, 64]
    answers = torch.stack([labels_of(labels, asked) for _, asked in TASKS])
    network = Network(way)
    routing = [p for name, p in network.named_parameters() if name.endswith("routing")]
    others = [p for name, p in network.named_parameters() if not name.endswith("routing")]
    # shares lie behind a softmax: at the rate of the weights they had hardly moved when the weights were learned
    optimizer = torch.optim.Adam([{"params": others}, {"params": routing, "lr": 2e-2}], lr=2e-3)
    for _ in range(steps):
        ids = torch.randint(T, (96,), generator=generator)
        rows = torch.randint(len(labels), (96,), generator=generator)
        loss = F.cross_entropy(network(pictures[ids, rows], ids), answers[ids, rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = []
        for t, (order, asked) in enumerate(TASKS):
            ids = torch.full((len(test_labels),), t)
            scores = network(domain(test_images, order).flatten(1), ids)
            right.append(float((scores.argmax(1) == labels_of(test_labels, asked)).float().mean()))
    result = {
        "by_task": [round(100 * x, 2) for x in right],
        "accuracy": round(100 * mean(right), 3),
        "parameters": sum(p.numel() for p in network.parameters()),
    }
    if isinstance(network.first, (Mixed, Encoders)):
        result["shares"] = [[round(x, 4) for x in row] for row in network.first.routing.softmax(1).tolist()]
    return result


def cases(seeds: int, quick: bool) -> list[Settings]:
    ways = ("one network", "soft modules", "network per task") if quick else WAYS
    return [{"way": way, "steps": 500 if quick else 1000, "seed": seed} for seed in range(seeds) for way in ways]


def likeness(shares: list[list[float]]) -> tuple[float, float]:
    """The part of the shares that two tasks have in common: on the same order of pixels, and on different ones."""
    same, other = [], []
    for a in range(T):
        for b in range(a):
            overlap = sum(map(min, shares[a], shares[b]))
            (same if TASKS[a][0] == TASKS[b][0] else other).append(overlap)
    return mean(same), mean(other)


def table(records: list[Record]) -> Table:
    rows = []
    for (way,), found in grouped(records, "way").items():
        alike = [likeness(r.result["shares"]) for r in found if "shares" in r.result]
        same, other = ([f"{100 * mean(x):.0f}%" for x in zip(*alike, strict=True)]) if alike else ("", "")
        size = found[0].result["parameters"]
        rows.append([way, f"{size:,}", spread(values(found, "accuracy")), same, other])
    head = ["network", "parameters", "accuracy %", "modules in common, same pixels", "other pixels"]
    return Table(head, rows)


def claims(records: list[Record]) -> list[Claim]:
    of = grouped(records, "way")
    accuracy = {way: mean(values(found, "accuracy")) for (way,), found in of.items()}
    size = {way: found[0].result["parameters"] for (way,), found in of.items()}
    alike = [likeness(r.result["shares"]) for r in of["soft modules",]]
    same, other = (mean(x) for x in zip(*alike, strict=True))
    soft, one, own = (accuracy[way] for way in ("soft modules", "one network", "network per task"))
    found = [
        Claim(f"mixed modules serve six tasks better than one network: {soft:.1f}% against {one:.1f}%", soft > one),
        Claim(
            f"tasks on the same order of pixels come to use the same modules: they have {same:.0%} of their shares in "
            f"the first layer in common, tasks on different orders {other:.0%}",
            same > other,
            stable=False,
        ),
        Claim(
            f"a network for each task, {size['network per task'] / size['soft modules']:.1f} times the parameters, is "
            f"not better: {own:.1f}% against {soft:.1f}%",
            own <= soft,
            stable=False,
        ),
    ]
    if "CARE" in accuracy:
        wide, care = accuracy["one network, wider"], accuracy["CARE"]
        found += [
            Claim(
                f"one network with as many parameters as all modules does no worse: {wide:.1f}% against {soft:.1f}%",
                wide >= soft,
                stable=False,
            ),
            Claim(f"mixed encoders alone (CARE) are better than one network: {care:.1f}%", care > one, stable=False),
        ]
    return found


def draw(records: list[Record], figure: Figure) -> None:
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    for place, ((way,), found) in enumerate(grouped(records, "way").items()):
        accuracy = values(found, "accuracy")
        left.plot(accuracy, [place] * len(found), "o", color=COLORS[WAYS.index(way)], alpha=0.7)
        left.plot(mean(accuracy), place, "|", color="black", markersize=18)
    ways = [way for (way,) in grouped(records, "way")]
    sizes = {way: found[0].result["parameters"] for (way,), found in grouped(records, "way").items()}
    left.set_yticks(range(len(ways)), [f"{way}\n{sizes[way]:,} parameters" for way in ways])
    left.margins(y=0.12)
    left.invert_yaxis()
    left.set(title="Accuracy of six tasks: seeds, and their mean", xlabel="accuracy (%)")
    left.grid(axis="x", alpha=0.25)
    shares = next(r.result["shares"] for r in records if r.settings["way"] == "soft modules")
    shown = right.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for t, row in enumerate(shares):
        for k, x in enumerate(row):
            right.text(k, t, f"{x:.2f}", ha="center", va="center", color="white" if x > 0.6 else "black")
    right.set_yticks(range(T), [" ".join(task) for task in TASKS])
    right.set_xticks(range(K), [str(k + 1) for k in range(K)])
    right.set(title="Who uses which module (seed 0)", xlabel="module of the first layer")
    figure.colorbar(shown, ax=right, label="share")


EXPERIMENT = Experiment(
    title="Soft modularisation and CARE: each task mixes shared modules",
    paper="Yang, Xu, Wu, Wang 2020, *Multi-Task Reinforcement Learning with Soft Modularization* (NeurIPS); Sodhani, "
    "Zhang, Pineau 2021, *Multi-Task Reinforcement Learning with Context-based Representations*, "
    "[arXiv 2102.06177](https://arxiv.org/abs/2102.06177).",
    claim="""
Between one network for all tasks and a network for each lies a third way: a few modules that all tasks train, and for
each task a learned mixture of them. Soft modularisation mixes modules in every layer, CARE the results of several
encoders. In the papers the mixtures of robots' tasks are computed from the task (and, in the first, from what the
robot sees); here they are numbers that belong to the task.

Six tasks ask of handwritten digits which they are and their rest by 3, in three orders of the pixels. Tasks on the
same order could share all but their heads. With four modules in a layer, a task's weight is the mixture of four, and
`fastmtl.ops.task_linear` takes the mixed weights of all tasks for a mixed batch in one call.
""",
    reading="""
Mixtures pay: with four modules in each layer, six tasks do as well as with a network for each, which takes more
parameters, and far better than in one network of a single module's size. CARE, which mixes encoders alone, gets more
than half of that. But on these tasks size explains more than mixing: one plain network with as many parameters as the
soft modules does better still. Nor do the mixtures find what was built into the tasks. In the first layer of the soft
modules every task settles for a single one, and which one has little to do with the order of its pixels. The papers
report gains on robots' tasks that are learned by reinforcement; nothing is said about those here.
""",
    cases=cases,
    run=run,
    table=table,
    draw=draw,
    claims=claims,
    size=(10, 4.2),
    seeds=4,
)

if __name__ == "__main__":
    main(EXPERIMENT)
