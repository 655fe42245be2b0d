"""What single-task networks can give: features to match (distillation), and logits to fuse. Plain torch throughout.

     features = trunk(pictures)
-    losses = {t: F.cross_entropy(heads[t](features), labels[t]) for t in TASKS}
+    losses = {t: F.cross_entropy(heads[t](features), labels[t])
+                 + distance(adapters[t](features), teachers[t].trunk(pictures)) for t in TASKS}
     fastmtl.backward(losses)                    # adapters are reached by one loss each: they stay out of the surgery

python examples/papers/distillation.py
"""

from __future__ import annotations

import copy
import itertools

import torch
import torch.nn.functional as F
from data import DOMAINS, LABELS, domain, labels_of, pools
from experiment import Claim, Experiment, Record, Settings, Table, main, mean, spread
from matplotlib.figure import Figure
from torch import Tensor, nn

import fastmtl

TASKS = ("digit", "third", "loops")
METHODS = ("sum", "pcgrad")
WIDTH, FEW, BATCH = 24, 300, 32


class Network(nn.Module):
    """A trunk, and a head for each task."""

    def __init__(self, tasks: tuple[str, ...], width: int = WIDTH) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.heads = nn.ModuleDict({task: nn.Linear(width, LABELS[task]) for task in tasks})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.trunk(images)
        return {task: head(features) for task, head in self.heads.items()}


def right(scores: Tensor, labels: Tensor) -> float:
    return round(100 * float((scores.argmax(1) == labels).float().mean()), 2)


# --- distillation: a shared network matches the features of one network for each task


def distance(found: Tensor, wanted: Tensor) -> Tensor:
    """Between features of length 1, as the teachers' lengths differ."""
    return (F.normalize(found) - F.normalize(wanted)).square().sum(1).mean()


def learn(tasks: tuple[str, ...], steps: int, seed: int, method: str = "sum", teachers: dict | None = None) -> Network:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    training = pools()[0]
    few = torch.randperm(len(training.labels), generator=generator)[:FEW]
    network = Network(tasks)
    adapters = nn.ModuleDict({task: nn.Linear(WIDTH, WIDTH) for task in tasks})
    optimizer = torch.optim.Adam([*network.parameters(), *adapters.parameters()], lr=3e-3)
    for _ in range(steps):
        rows = few[torch.randint(FEW, (BATCH,), generator=generator)]
        images, labels = training.images[rows], training.labels[rows]
        features = network.trunk(images)
        losses = {t: F.cross_entropy(network.heads[t](features), labels_of(labels, t)) for t in tasks}
        for task, teacher in (teachers or {}).items():
            with torch.no_grad():
                wanted = teacher.trunk(images)
            losses[task] = losses[task] + distance(adapters[task](features), wanted)
        optimizer.zero_grad()
        fastmtl.backward(losses, method=method)
        optimizer.step()
    return network


@torch.no_grad()
def accuracy(network: Network) -> list[float]:
    images, labels = pools()[1]
    return [right(scores, labels_of(labels, task)) for task, scores in network(images).items()]


def distil(steps: int, seed: int) -> dict[str, list[float]]:
    teachers = {task: learn((task,), steps, seed) for task in TASKS}
    result = {"a network per task": [accuracy(teachers[task])[0] for task in TASKS]}
    for method, teaching in itertools.product(METHODS, (None, teachers)):
        name = f"shared, {method}" + (" + distillation" if teaching else "")
        result[name] = accuracy(learn(TASKS, steps, seed, method, teaching))
    return result


# --- fusion: small experts steer a large network that was never trained on their task


def fit(network: Network, images: Tensor, labels: Tensor, steps: int, generator: torch.Generator) -> Network:
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(steps):
        rows = torch.randint(len(labels), (BATCH,), generator=generator)
        loss = F.cross_entropy(network(images[rows])["digit"], labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p, q) of logits, for each sample."""
    return (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)


def strength(large: Tensor, shift: Tensor, moved: Tensor) -> Tensor:
    """For each sample how much of the shift moves the large network as far as the expert has moved from its base."""
    grid = torch.linspace(0, 2, 41)
    far = divergence(large + grid[:, None, None] * shift, large)  # [41, N]
    return grid[(far - moved).square().argmin(0)]


def fuse(steps: int, seed: int) -> dict[str, list[float]]:
    training, testing = pools()
    generator = torch.Generator().manual_seed(seed)
    shown = {name: domain(training.images, name) for name in DOMAINS}
    few = torch.randperm(len(training.labels), generator=generator)[:40]
    mixed = torch.cat([shown[name][few] for name in DOMAINS])
    labels = training.labels[few].repeat(len(DOMAINS))
    small, large = (fit(Network(("digit",), w), mixed, labels, steps, generator) for w in (16, 128))
    experts = [fit(copy.deepcopy(small), shown[n], training.labels, steps, generator) for n in DOMAINS]
    result: dict[str, list[float]] = {}
    with torch.no_grad():
        for t, name in enumerate(DOMAINS):
            images = domain(testing.images, name)
            base, start = small(images)["digit"], large(images)["digit"]
            each = torch.stack([expert(images)["digit"] for expert in experts])
            shift = each[t] - base
            by_sample = strength(start, shift, divergence(each[t], base))
            trust = (-divergence(each, start)).softmax(0)  # [T, N]: experts that agree with the large network
            scores = {
                "large network": start,
                "its expert, small": each[t],
                "fused with its expert": start + shift,
                "the same, strength by sample": start + by_sample[:, None] * shift,
                "fused with all, equally": start + (each - base).mean(0),
                "fused with all, weights by sample": start + (trust[..., None] * (each - base)).sum(0),
            }
            for way, logits in scores.items():
                result.setdefault(way, []).append(right(logits, testing.labels))
    return result


def run(part: str, steps: int, seed: int) -> dict:
    return {"distillation": distil, "fusion": fuse}[part](steps, seed)


def cases(seeds: int, quick: bool) -> list[Settings]:
    steps = 200 if quick else 600
    return [{"part": part, "steps": steps, "seed": s} for part in ("distillation", "fusion") for s in range(seeds)]


def by_way(records: list[Record], part: str) -> dict[str, list[float]]:
    """The mean accuracy over tasks or domains, for each seed."""
    found: dict[str, list[float]] = {}
    for record in records:
        if record.settings["part"] == part:
            for way, each in record.result.items():
                found.setdefault(way, []).append(mean(each))
    return found


def table(records: list[Record]) -> Table:
    parts = (("distillation", "three tasks"), ("fusion", "five domains"))
    rows = [[on, way, spread(found)] for part, on in parts for way, found in by_way(records, part).items()]
    return Table(["on", "network", "accuracy %"], rows)


def claims(records: list[Record]) -> list[Claim]:
    taught = {way: mean(found) for way, found in by_way(records, "distillation").items()}
    fused = {way: mean(found) for way, found in by_way(records, "fusion").items()}
    found = []
    for method in METHODS:
        before, after = taught[f"shared, {method}"], taught[f"shared, {method} + distillation"]
        found.append(
            Claim(
                f"with `{method}`, matching the features of single-task networks makes the shared network better: "
                f"{after:.1f}% against {before:.1f}%",
                after > before,
                stable=False,
            )
        )
    large, expert = fused["large network"], fused["fused with its expert"]
    equal, chosen = fused["fused with all, equally"], fused["fused with all, weights by sample"]
    dynamic = fused["the same, strength by sample"]
    return [
        *found,
        Claim(
            f"a small expert lifts a large network that saw 40 pictures of each domain: {expert:.1f}% against "
            f"{large:.1f}%",
            expert > large,
        ),
        Claim(
            f"where it is not known which expert a picture needs, weights by sample do better than equal ones: "
            f"{chosen:.1f}% against {equal:.1f}%",
            chosen > equal,
            stable=False,
        ),
        Claim(
            f"a strength chosen for each sample does better than the full shift of the expert: {dynamic:.1f}% "
            f"against {expert:.1f}%",
            dynamic > expert,
            stable=False,
        ),
    ]


def draw(records: list[Record], figure: Figure) -> None:
    titles = {"distillation": "Distillation: three tasks", "fusion": "Fused logits: five domains"}
    for ax, (part, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        found = by_way(records, part)
        for place, accuracies in enumerate(found.values()):
            ax.plot(accuracies, [place] * len(accuracies), "o", color="#0072b2", alpha=0.6)
            ax.plot(mean(accuracies), place, "|", color="black", markersize=18)
        ax.set_yticks(range(len(found)), list(found))
        ax.margins(y=0.12)
        ax.invert_yaxis()
        ax.set(title=title, xlabel="accuracy (%): seeds, and their mean")
        ax.grid(axis="x", alpha=0.25)


EXPERIMENT = Experiment(
    title="Distillation and logits fusion: what single-task networks can give",
    paper="Li and Bilen 2020, *Knowledge Distillation for Multi-task Learning*; Fan et al. 2024, *On Giant's "
    "Shoulders: Effortless Weak to Strong by Dynamic Logits Fusion*, "
    "[arXiv 2406.15480](https://arxiv.org/abs/2406.15480).",
    claim="""
Two ways to use networks that know one task each. In distillation a shared network learns, beside its tasks, to match
the features of the single-task networks through a small adapter for each, so that no task drowns. In logits fusion
nothing is trained any more: what a small expert's logits have moved from its base is added to the logits of a large
network, with weights that are chosen for each sample.

fastmtl has nothing to speed up in either; they are here to show how they compose. The distances are parts of the
losses that `fastmtl.backward` gets, and the adapters stay out of the surgery by themselves. Fusion is tried on digits
in five domains: a large and a small network have seen 40 pictures of each domain, and a small expert for each domain
1,397. The strength by sample is the paper's idea for one expert, on a grid: as far as the expert moved from its base,
by KL divergence, the large network is to move. For several experts the rule is ours, not the paper's: the more an
expert agrees with the large network on a picture, the more it counts there.
""",
    reading="""
Distillation has nothing to win here: with 300 pictures a shared network is as good as a network for each task, and
matching features as well costs it half a point or a little more, about the spread over the seeds. The paper is about
shared networks that learn some tasks and neglect others. Fusion goes in the paper's direction: without any training
the small experts lift the large network by more than ten points, and a strength by sample adds a little, less than the
spread. Where the expert is not known, equal weights do harm, and weights by sample keep part of the gain. But each
expert alone is better than the large network that it is fused with: this one has seen little, while the large language
models of the paper are meant to bring what their small experts lack.
""",
    cases=cases,
    run=run,
    table=table,
    draw=draw,
    claims=claims,
    size=(10.5, 3.8),
    seeds=4,
)

if __name__ == "__main__":
    main(EXPERIMENT)
