"""TAG: which tasks to train together, read from one joint training and checked against training every group.

         for pictures, labels in loader:
    +        seen.append(task_affinity(lambda: losses_of(pictures, labels), model, lr=0.1))
             optimizer.zero_grad()
             fastmtl.backward(losses_of(pictures, labels), method="sum")
             optimizer.step()
    +    groups = TaskAffinity.mean(seen).groups(2)

The affinity of task i for task j is the share of the loss of j that a step for i takes away. With four tasks the truth
can be had, too: all 15 groups are trained, each by a network of its own.

    python examples/papers/tag.py
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from data import LABELS, domain, labels_of, pools
from experiment import Claim, Experiment, Record, Settings, Table, grouped, main, mean, spread
from matplotlib.figure import Figure
from torch import Tensor, nn

import fastmtl
from fastmtl.analysis import TaskAffinity, first_order_affinity, task_affinity

TASKS = ("plain digit", "plain half", "scattered digit", "scattered half")  # a domain, and what is asked of it
PICTURES, WIDTH, BATCH, LR = 100, 16, 32, 0.1
KINDS = ("lookahead", "first order")
PARTITIONS = (
    *(((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2))),
    *(((alone,), tuple(t for t in range(4) if t != alone)) for alone in range(4)),
)


def losses_of(model: nn.ModuleDict, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    losses = {}
    for task, head in model["heads"].items():
        where, asked = task.split()
        losses[task] = F.cross_entropy(head(model["trunk"](domain(images, where))), labels_of(labels, asked))
    return losses


def run(group: list[int], steps: int, seed: int) -> dict:
    tasks = [TASKS[t] for t in group]
    training, testing = pools()
    generator = torch.Generator().manual_seed(seed)
    few = torch.randperm(len(training.labels), generator=generator)[:PICTURES]
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())
    heads = nn.ModuleDict({task: nn.Linear(WIDTH, LABELS[task.split()[1]]) for task in tasks})
    model = nn.ModuleDict({"trunk": trunk, "heads": heads})
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    ahead, first = [], []
    for step in range(steps):
        rows = few[torch.randint(PICTURES, (BATCH,), generator=generator)]
        images, labels = training.images[rows], training.labels[rows]
        losses = losses_of(model, images, labels)
        optimizer.zero_grad()
        surgery = fastmtl.backward(losses, method="sum")
        if len(tasks) == len(TASKS) and step % 10 == 0:
            ahead.append(task_affinity(lambda x=images, y=labels: losses_of(model, x, y), model, lr=LR))
            first.append(first_order_affinity(surgery, losses, lr=LR))
        optimizer.step()
    with torch.no_grad():
        result = {
            "losses": [round(float(loss), 4) for loss in losses_of(model, testing.images, testing.labels).values()]
        }
    for kind, seen in zip(KINDS, (ahead, first), strict=True):
        if seen:
            result[kind] = [[round(x, 5) for x in row] for row in TaskAffinity.mean(seen).matrix.tolist()]
    return result


def cases(seeds: int, quick: bool) -> list[Settings]:
    groups = [list(g) for size in (1, 2, 3, 4) for g in itertools.combinations(range(4), size)]
    return [{"group": g, "steps": 150 if quick else 300, "seed": s} for s in range(seeds) for g in groups]


def affinity(records: list[Record], kind: str) -> TaskAffinity:
    """The mean over the seeds, of the trainings of all four tasks."""
    seen = [torch.tensor(r.result[kind], dtype=torch.float64) for r in records if kind in r.result]
    return TaskAffinity.mean([TaskAffinity(matrix, TASKS, kind, LR) for matrix in seen])


def losses_by_group(records: list[Record]) -> dict[tuple[int, ...], list[float]]:
    """For each group its tasks' losses on the test pictures, averaged over the seeds."""
    found = {}
    for record in records:
        found.setdefault(tuple(record.settings["group"]), []).append(record.result["losses"])
    return {group: [mean(x) for x in zip(*seeds, strict=True)] for group, seeds in found.items()}


def total(groups: tuple, losses: dict) -> float:
    """The mean loss of four tasks, each served by the best of the groups that it is in."""
    of = [min(losses[g][g.index(t)] for g in groups if t in g) for t in range(4)]
    return mean(of)


def chosen(records: list[Record], kind: str) -> tuple:
    names = affinity(records, kind).groups(2).groups
    return tuple(sorted(tuple(TASKS.index(t) for t in group) for group in names))


def gains(records: list[Record]) -> Tensor:
    """`[4, 4]`: by how much training task i beside it lowers the test loss of task j, as a share."""
    losses = losses_by_group(records)
    found = torch.full((4, 4), float("nan"), dtype=torch.float64)
    for pair in itertools.combinations(range(4), 2):
        for i, j in (pair, pair[::-1]):
            found[i, j] = 1 - losses[pair][pair.index(j)] / losses[j,][0]
    return found


def off_diagonal(matrix: Tensor) -> Tensor:
    return matrix[~torch.eye(4, dtype=torch.bool)]


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([off_diagonal(a), off_diagonal(b)]))[0, 1])


def written(groups: tuple) -> str:
    return " / ".join(" + ".join(TASKS[t] for t in group) for group in groups)


def table(records: list[Record]) -> Table:
    losses = losses_by_group(records)
    picks = {kind: chosen(records, kind) for kind in KINDS}
    options = {((0, 1, 2, 3),), tuple((t,) for t in range(4)), *PARTITIONS, *picks.values()}
    rows = []
    for groups in sorted(options, key=lambda g: total(g, losses)):
        picked = [kind for kind, pick in picks.items() if pick == groups]
        by_seed = [total(groups, losses_by_group(seed)) for seed in grouped(records, "seed").values()]
        rows.append([written(groups), str(len(groups)), spread(by_seed, 3), ", ".join(picked)])
    return Table(["groups", "networks", "test loss, mean of the tasks", "picked by the affinity"], rows)


def claims(records: list[Record]) -> list[Claim]:
    matrix, measured, losses = affinity(records, KINDS[0]).matrix, gains(records), losses_by_group(records)
    same, other = [], []
    for i, j in itertools.permutations(range(4), 2):
        (same if i // 2 == j // 2 else other).append(float(matrix[i, j]))
    ranked = sorted(PARTITIONS, key=lambda g: total(g, losses))
    pick = chosen(records, KINDS[0])
    picks = [chosen(seed, KINDS[0]) for seed in grouped(records, "seed").values()]
    place = f"number {ranked.index(pick) + 1} of them" if pick in ranked else "none of them, which have no task in both"
    digits = [(TASKS[digit], losses[digit,][0], losses[digit, half][0]) for digit, half in ((0, 1), (2, 3))]
    harm = ", ".join(f"from {alone:.3f} to {beside:.3f} ({task})" for task, alone, beside in digits)
    return [
        Claim(
            f"a step for a task does more for the other task on the same domain ({mean(same):+.4f} of its loss on "
            f"average) than for tasks on the other domain ({mean(other):+.4f})",
            mean(same) > mean(other),
        ),
        Claim(
            f"the first-order affinity orders the pairs as the lookahead does: correlation "
            f"{correlation(matrix, affinity(records, KINDS[1]).matrix):.2f}",
            correlation(matrix, affinity(records, KINDS[1]).matrix) > 0.5,
        ),
        Claim(
            f"pairs of higher affinity gain more from being trained together: correlation "
            f"{correlation(matrix, measured):.2f} over the twelve ordered pairs with the lookahead, "
            f"{correlation(affinity(records, KINDS[1]).matrix, measured):.2f} with the first-order estimate",
            correlation(matrix, measured) > 0.3,
            stable=False,
        ),
        Claim(
            f'"below five" learned beside "which digit" raises the test loss of the latter: {harm}',
            all(beside > alone for _, alone, beside in digits),
            stable=False,
        ),
        Claim(
            f"the grouping that the affinity picks ({written(pick)}; in {sum(p == pick for p in picks)} of "
            f"{len(picks)} seeds) is the best of the seven ways to split the tasks in two: it is {place}, and has a "
            f"test loss of {total(pick, losses):.3f}, against {total(ranked[0], losses):.3f} of the best and "
            f"{total(ranked[-1], losses):.3f} of the worst",
            pick == ranked[0],
            stable=False,
        ),
        Claim(
            f"it is better than one network for all four tasks, by test loss: {total(pick, losses):.3f} against "
            f"{total(((0, 1, 2, 3),), losses):.3f}",
            total(pick, losses) < total(((0, 1, 2, 3),), losses),
            stable=False,
        ),
    ]


def draw(records: list[Record], figure: Figure) -> None:
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1, 1.15])
    for ax, kind in zip((left, middle), KINDS, strict=True):
        affinity(records, kind).plot(ax)
        ax.set_title(f"affinity, {kind}")
        ax.images[0].colorbar.remove()
    middle.set(ylabel="", yticks=[])
    measured = gains(records)
    for kind, marker, color in zip(KINDS, "os", ("#0072b2", "#e69f00"), strict=True):
        matrix = affinity(records, kind).matrix
        fit = f"{kind} (r = {correlation(matrix, measured):.2f})"
        right.scatter(off_diagonal(matrix), 100 * off_diagonal(measured), c=color, marker=marker, label=fit)
    right.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    right.axvline(0, color="0.7", linewidth=0.8, zorder=0)
    right.set(title="affinity against truth", xlabel="affinity of i for j", ylabel="test loss of j saved beside i (%)")
    right.set_xticks([-0.04, 0, 0.04, 0.08])
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)


EXPERIMENT = Experiment(
    title="TAG: which tasks to train together",
    paper="Fifty, Amid, Zhao, Yu, Anil, Finn 2021, *Efficiently Identifying Task Groupings for Multi-Task Learning*, "
    "[arXiv 2109.04617](https://arxiv.org/abs/2109.04617).",
    claim="""
Some tasks help each other when one network learns them, and others get in each other's way. To find out which, one
would have to train every group of them. TAG reads it from a single joint training: it takes a step for one task, looks
at what that does to the losses of the others, and takes the step back: a lookahead. The affinity of task i for task j
is the share of the loss of j that a step for i takes away. These affinities say which tasks to train together.

Here four tasks are learned from 100 pictures: which digit, and whether it is below five, on plain pictures and on ones
whose pixels are scattered. `fastmtl.analysis.task_affinity` measures the affinities at every tenth step of the joint
training, `first_order_affinity` estimates them from the Gram matrix of the same steps at no cost, and `groups(2)` picks
at most two groups, which may overlap: a task that is in both counts with the better one. Then all fifteen groups are
trained, so that the choice can be compared with what each grouping gives. The diagonal of the pictures is what a step
for a task does for its own loss; no choice looks at it, and it is not coloured.
""",
    reading="""
The affinity sees what is alike: in each seed's full training it puts the two tasks on one domain together. Its estimate
from the Gram matrix orders the pairs almost as the lookahead does, though it promises larger gains, as it does not see
that losses curve. As a forecast of what a pair gains both are weak here; the estimate is the slightly better one, which
means little with twelve pairs. Two networks with the tasks that the affinity picks are better than one network for all
four, but so is every other way to split them, and a network for each task is as good as any. What the affinity cannot
see is the test loss: it looks at the losses on training pictures, where "below five" does "which digit" no harm worth
mentioning, while on test pictures it does. The paper finds a clear gain on a large data set; with 100 pictures the
differences between the groupings lie within the spread over the seeds.
""",
    cases=cases,
    run=run,
    table=table,
    draw=draw,
    claims=claims,
    size=(11, 4.6),
    seeds=5,
)

if __name__ == "__main__":
    main(EXPERIMENT)
