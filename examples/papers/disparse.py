"""DiSparse: a shared weight is pruned only where every task agrees that it does without it.

    +    bank = fastmtl.GradientBank(model.parameters(), TASKS)
    +    for task in TASKS:
    +        with bank.task(task):
    +            loss_of(task).backward()
    +    importance = [(g * w).abs() for g, w in zip(bank.row("digit"), bank.params)]    # of each weight to one task

The usual importance is that to the sum of the losses, where tasks can hide each other. Here each task ranks the weights
by itself, and a weight counts as much as it does to the task that needs it most.

    python examples/papers/disparse.py
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from data import LABELS, labels_of, pools
from experiment import Claim, Experiment, Record, Settings, Table, grouped, main, mean, spread
from matplotlib.figure import Figure
from torch import Tensor, nn

import fastmtl

TASKS = ("digit", "parity", "third", "loops")
CRITERIA = {"all tasks agree": "#0072b2", "sum of the losses": "#e69f00", "magnitude": "#009e73", "random": "#999999"}
SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98)
WIDTH, BATCH = 64, 64


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())
        self.heads = nn.ModuleDict({task: nn.Linear(WIDTH, LABELS[task]) for task in TASKS})

    @property
    def shared(self) -> list[nn.Parameter]:
        """The weights that are pruned."""
        return [layer.weight for layer in self.trunk if isinstance(layer, nn.Linear)]

    def losses(self, images: Tensor, labels: Tensor, digit_weight: float) -> dict[str, Tensor]:
        features = self.trunk(images)
        losses = {t: F.cross_entropy(head(features), labels_of(labels, t)) for t, head in self.heads.items()}
        return losses | {"digit": digit_weight * losses["digit"]}

    @torch.no_grad()
    def accuracy(self) -> list[float]:
        images, labels = pools()[1]
        features = self.trunk(images)
        right = [head(features).argmax(1) == labels_of(labels, t) for t, head in self.heads.items()]
        return [round(100 * float(r.float().mean()), 2) for r in right]


def batch_of(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    training = pools()[0]
    rows = torch.randint(len(training.labels), (BATCH,), generator=generator)
    return training.images[rows], training.labels[rows]


def train(network: Network, steps: int, digit_weight: float, generator: torch.Generator, masks: list[Tensor]) -> None:
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(steps):
        losses = network.losses(*batch_of(generator), digit_weight)
        optimizer.zero_grad()
        fastmtl.backward(losses, method="sum")
        optimizer.step()
        apply_masks(network, masks)


@torch.no_grad()
def apply_masks(network: Network, masks: list[Tensor]) -> None:
    for weight, mask in zip(network.shared, masks, strict=bool(masks)):
        weight.mul_(mask)


def importance(network: Network, digit_weight: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """|g w| over some batches: `[T, P]` of each task's loss, and `[P]` of the sum of the losses."""
    weights = torch.cat([w.detach().flatten() for w in network.shared])
    by_task, of_sum = torch.zeros(len(TASKS), len(weights)), torch.zeros(len(weights))
    for _ in range(20):
        bank = fastmtl.GradientBank(network.shared, TASKS)
        losses = network.losses(*batch_of(generator), digit_weight)
        for task in TASKS:
            with bank.task(task):
                losses[task].backward(retain_graph=True)
        gradients = torch.stack([torch.cat([g.flatten() for g in bank.row(task)]) for task in TASKS])
        by_task += (gradients * weights).abs()
        of_sum += (gradients.sum(0) * weights).abs()
    return by_task, of_sum


def scores_of(network: Network, digit_weight: float, generator: torch.Generator) -> dict[str, Tensor]:
    by_task, of_sum = importance(network, digit_weight, generator)
    places = by_task.argsort(1).argsort(1)  # a weight's place in each task's own ranking
    weights = torch.cat([w.detach().flatten() for w in network.shared])
    return {
        # what is below a place in every ranking is pruned first
        "all tasks agree": places.max(0).values.float(),
        "sum of the losses": of_sum,
        "magnitude": weights.abs(),
        "random": torch.rand(len(weights), generator=generator),
    }


def run(digit_weight: float, sparsities: list[float], steps: int, seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    dense = Network()
    train(dense, steps, digit_weight, generator, [])
    result = {"dense": dense.accuracy(), "pruned": {}, "tuned": {}}
    sizes = [w.numel() for w in dense.shared]
    for name, score in scores_of(dense, digit_weight, generator).items():
        for sparsity in sparsities:
            keep = torch.zeros(len(score))
            keep[score.argsort(descending=True)[: round((1 - sparsity) * len(score))]] = 1
            network = copy.deepcopy(dense)
            masks = [m.view_as(w) for m, w in zip(keep.split(sizes), network.shared, strict=True)]
            apply_masks(network, masks)
            result["pruned"].setdefault(name, []).append(network.accuracy())
            train(network, steps // 3, digit_weight, torch.Generator().manual_seed(seed), masks)
            result["tuned"].setdefault(name, []).append(network.accuracy())
    return result


def cases(seeds: int, quick: bool) -> list[Settings]:
    sparsities = [0.9, 0.98] if quick else list(SPARSITIES)
    return [
        {"digit_weight": weight, "sparsities": sparsities, "steps": 300 if quick else 600, "seed": seed}
        for weight in (1.0, 10.0)
        for seed in range(seeds)
    ]


def accuracies(records: list[Record], when: str, name: str, at: int) -> list[float]:
    """The mean over the tasks, for each seed."""
    return [mean(r.result[when][name][at]) for r in records]


def table(records: list[Record]) -> Table:
    sparsities = records[0].settings["sparsities"]
    rows = []
    for (weight,), found in grouped(records, "digit_weight").items():
        dense = spread([mean(r.result["dense"]) for r in found])
        rows.append([f"{weight:g}", "dense", dense] + [""] * (len(sparsities) - 1))
        for name in CRITERIA:
            cells = [spread(accuracies(found, "tuned", name, at)) for at in range(len(sparsities))]
            rows.append([f"{weight:g}", name, *cells])
    return Table(["weight of the digit loss", "pruned by", *(f"{s:.0%} pruned" for s in sparsities)], rows)


def claims(records: list[Record]) -> list[Claim]:
    sparsities = records[0].settings["sparsities"]
    at = len(sparsities) - 1
    of = grouped(records, "digit_weight")

    def after(weight: float, name: str, at: int = at) -> float:
        return mean(accuracies(of[weight,], "tuned", name, at))

    share, most = f"{sparsities[at]:.0%}", sparsities.index(0.9)
    agree, total = "all tasks agree", "sum of the losses"
    found = [
        Claim(
            "with 90% of the shared weights pruned and the rest trained on, pruning what all tasks rank low does less "
            f"harm than at random: {after(1.0, agree, most):.1f}% against {after(1.0, 'random', most):.1f}%",
            after(1.0, agree, most) > after(1.0, "random", most),
        )
    ]
    for weight in (1.0, 10.0):
        found.append(
            Claim(
                f"with {share} pruned and the digit loss weighted by {weight:g}, pruning where all tasks agree keeps "
                f"more than pruning by the sum of the losses: {after(weight, agree):.1f}% against "
                f"{after(weight, total):.1f}%",
                after(weight, agree) > after(weight, total),
                stable=False,
            )
        )
    found.append(
        Claim(
            f"with {share} pruned it keeps more than pruning by magnitude: {after(1.0, agree):.1f}% against "
            f"{after(1.0, 'magnitude'):.1f}%",
            after(1.0, agree) > after(1.0, "magnitude"),
            stable=False,
        )
    )
    return found


def draw(records: list[Record], figure: Figure) -> None:
    axes = figure.subplots(1, 2, sharey=True)
    sparsities = records[0].settings["sparsities"]
    places = range(len(sparsities))
    for ax, ((weight,), found) in zip(axes, grouped(records, "digit_weight").items(), strict=True):
        for name, color in CRITERIA.items():
            for when, style in (("tuned", "-o"), ("pruned", ":")):
                line = [mean(accuracies(found, when, name, at)) for at in places]
                ax.plot(places, line, style, color=color, markersize=4, label=name if when == "tuned" else None)
        dense = mean([mean(r.result["dense"]) for r in found])
        ax.axhline(dense, color="black", linewidth=0.8, linestyle="--")
        ax.text(len(sparsities) - 1, dense + 0.7, "dense", fontsize="small", ha="right")
        ax.set_xticks(places, [f"{s:.0%}" for s in sparsities])
        title = "equal losses" if weight == 1 else f"digit loss times {weight:g}"
        ax.set(title=title, xlabel="shared weights pruned")
        ax.grid(alpha=0.25)
    axes[0].set_ylabel("accuracy, mean of four tasks (%)")
    handles, labels = axes[0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    legend.set_title("pruned by (solid: trained on afterwards, dotted: not)")


EXPERIMENT = Experiment(
    title="DiSparse: pruning where all tasks agree",
    paper="Sun, Hassani, Wang, Huang, Shi 2022, *DiSparse: Disentangled Sparsification for Multitask Model "
    "Compression*, "
    "[arXiv 2206.04662](https://arxiv.org/abs/2206.04662).",
    claim="""
Pruning sets the least important weights of a network to zero. In a network of several tasks, importance is usually
that to the sum of all losses, where a task with large gradients hides what the others need. DiSparse lets every task
rank the shared weights by itself, and removes a weight only where all tasks agree.

Here four tasks on handwritten digits share two layers. A weight's importance to a task is the product of the weight
and of that task's gradient, which `GradientBank.row` gives. Pruned are as many weights by each criterion, and the rest
is trained on. It is tried with equal losses and with the digit's loss multiplied by ten, in training as well as in the
sum.
""",
    reading="""
The unanimous criterion does to the sum of the losses what the paper says: it keeps as much or more at every sparsity,
and the difference grows as more is pruned. At 90% and 95% it is larger where one loss counts ten times, and so hides
the others in their sum. But magnitude, which looks at no gradient, is better than both here from 80% on, and at 98%
neither criterion made of gradients beats pruning at random by more than the spread over the seeds. Here the gradients
are those of a network that is nearly trained, small and from twenty batches; that this is the cause was not examined.
The paper prunes large networks for dense prediction, also before and during their training, and other criteria came
out worse there.
""",
    cases=cases,
    run=run,
    table=table,
    draw=draw,
    claims=claims,
    size=(9.5, 4.2),
    seeds=4,
)

if __name__ == "__main__":
    main(EXPERIMENT)
