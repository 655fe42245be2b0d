"""HyperGrid: each task scales the blocks of a transformer's feed-forward weights, and all share the rest.

         network = Transformer()
    +    convert(network, DOMAINS, "hypergrid", where=["*.linear1", "*.linear2"], grid=(8, 8))
    ...
    -    scores = network(pictures)
    +    with tasks(domain):                      # [N]: the domain of each picture
    +        scores = network(pictures)

A task's weight is `W * (row x column)`, with factors for the blocks of a grid that are learned, and 1 at first.

    python examples/papers/hypergrid.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from data import DOMAINS, domain, pools
from experiment import Claim, Experiment, Record, Settings, Table, grouped, main, mean, spread, values
from matplotlib.figure import Figure
from torch import Tensor, nn

from fastmtl.nn import convert, tasks

GRIDS = {"grid 2 x 2": 2, "grid 8 x 8": 8, "grid 32 x 32": 32}
WAYS = ("shared", *GRIDS, "own feed-forward", "independent")
COLORS = {"shared": "#999999", "own feed-forward": "#e69f00", "independent": "#d55e00"}
FEED_FORWARD = ["*.linear1", "*.linear2"]
WIDTH, RATE = 32, 4e-3


class Transformer(nn.Module):
    """Reads a digit as eight tokens, its rows; knows nothing of tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Linear(8, WIDTH)
        self.place = nn.Parameter(0.1 * torch.randn(8, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(self.layers(self.token(pictures) + self.place).mean(1))


def network_of(way: str) -> nn.Module:
    network = Transformer()
    convert(network, DOMAINS, "separate", where="head")  # every way but `independent` shares all but what it says
    if way in GRIDS:
        convert(network, DOMAINS, "hypergrid", where=FEED_FORWARD, grid=(GRIDS[way], GRIDS[way]))
    elif way == "own feed-forward":
        convert(network, DOMAINS, "separate", where=FEED_FORWARD)
    return network


def run(way: str, steps: int, seed: int) -> dict:
    training, testing = pools()
    generator = torch.Generator().manual_seed(seed)
    shown = torch.stack([domain(training.images, name) for name in DOMAINS])
    if way == "independent":
        networks = nn.ModuleList(Transformer() for _ in DOMAINS)
    else:
        network = network_of(way)
        networks = nn.ModuleList([network])
    factors = [p for name, p in networks.named_parameters() if ".row." in name or ".column." in name]
    others = [p for name, p in networks.named_parameters() if not (".row." in name or ".column." in name)]
    optimizer = torch.optim.Adam([{"params": others}, {"params": factors}])
    rates = [RATE, 10 * RATE]  # factors lie behind a sigmoid, and have further to go
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps)

    def scores_of(pictures: Tensor, ids: Tensor) -> Tensor:
        if way == "independent":  # the ids come sorted, as many of each domain
            parts = pictures.chunk(len(DOMAINS))
            return torch.cat([own(part) for own, part in zip(networks, parts, strict=True)])
        with tasks(ids):
            return network(pictures)

    each = 16
    ids = torch.arange(len(DOMAINS)).repeat_interleave(each)
    for _ in range(steps):
        rows = torch.randint(len(training.labels), (len(ids),), generator=generator)
        loss = F.cross_entropy(scores_of(shown[ids, rows], ids), training.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    networks.eval()
    with torch.no_grad():
        pictures = torch.cat([domain(testing.images, name) for name in DOMAINS])
        ids = torch.arange(len(DOMAINS)).repeat_interleave(len(testing.labels))
        right = (scores_of(pictures, ids).argmax(1) == testing.labels.repeat(len(DOMAINS))).float()
    by_domain = right.view(len(DOMAINS), -1).mean(1)
    return {
        "accuracy": round(100 * float(right.mean()), 2),
        "by_domain": [round(100 * float(x), 2) for x in by_domain],
        "parameters": sum(p.numel() for p in networks.parameters()),
    }


def cases(seeds: int, quick: bool) -> list[Settings]:
    ways = ("shared", "grid 8 x 8", "independent") if quick else WAYS
    return [{"way": way, "steps": 150 if quick else 600, "seed": seed} for seed in range(seeds) for way in ways]


def table(records: list[Record]) -> Table:
    rows = []
    of = grouped(records, "way")
    start = of["shared",][0].result["parameters"]
    for (way,), found in of.items():
        size = found[0].result["parameters"]
        domains = zip(*[r.result["by_domain"] for r in found], strict=True)
        accuracy = spread(values(found, "accuracy"), 2)
        rows.append([way, f"{size:,}", f"{size / start:.2f}", accuracy, *map(spread, domains)])
    return Table(["network", "parameters", "of one", "accuracy %", *DOMAINS], rows)


def claims(records: list[Record]) -> list[Claim]:
    of = grouped(records, "way")
    accuracy = {way: mean(values(found, "accuracy")) for (way,), found in of.items()}
    size = {way: found[0].result["parameters"] for (way,), found in of.items()}
    grid = "grid 8 x 8"
    extra = 100 * (size[grid] / size["shared"] - 1)
    found = [
        Claim(
            f"grids of 8 x 8 blocks, {extra:.0f}% more parameters, make the shared network better: "
            f"{accuracy[grid]:.2f}% against {accuracy['shared']:.2f}%",
            accuracy[grid] > accuracy["shared"],
            stable=False,
        ),
        Claim(
            f"a network for each domain, {size['independent'] / size['shared']:.1f} times the parameters, is still "
            f"better: {accuracy['independent']:.2f}% against {accuracy[grid]:.2f}%",
            accuracy["independent"] > accuracy[grid],
        ),
    ]
    if "grid 2 x 2" in accuracy:
        small, large = accuracy["grid 2 x 2"], accuracy["grid 32 x 32"]
        found.append(
            Claim(
                f"finer grids serve better: {small:.2f}% with 2 x 2, {accuracy[grid]:.2f}% with 8 x 8, {large:.2f}% "
                "with 32 x 32",
                small < accuracy[grid] < large,
                stable=False,
            )
        )
        own = accuracy["own feed-forward"]
        found.append(
            Claim(
                f"the finest grid comes within half a point of feed-forward layers of each domain's own ({own:.2f}%), "
                f"which take {size['own feed-forward'] / size['shared']:.1f} times the parameters",
                large > own - 0.5,
                stable=False,
            )
        )
    return found


def draw(records: list[Record], figure: Figure) -> None:
    ax = figure.subplots()
    for (way,), found in grouped(records, "way").items():
        size = found[0].result["parameters"]
        accuracy = values(found, "accuracy")
        color = COLORS.get(way, "#0072b2")
        error = [[mean(accuracy) - min(accuracy)], [max(accuracy) - mean(accuracy)]]
        ax.errorbar(size, mean(accuracy), error, fmt="o", color=color, capsize=4, markersize=8)
        left = way in ("independent", "own feed-forward")
        ax.annotate(
            way,
            (size, mean(accuracy)),
            (-12 if left else 32, -3),
            textcoords="offset points",
            ha="right" if left else "left",
        )
    ax.set(xscale="log", xlabel="parameters (log scale)", ylabel="accuracy over five domains (%)")
    ax.set_title("One transformer for five domains: mean, and range over the seeds")
    ax.set_xticks([20e3, 30e3, 50e3, 100e3], ["20k", "30k", "50k", "100k"])
    ax.minorticks_off()
    ax.grid(alpha=0.25)


EXPERIMENT = Experiment(
    title="HyperGrid: one transformer, scaled by blocks for each task",
    paper="Tay, Zhao, Bahri, Metzler, Juan 2021, *HyperGrid Transformers: Towards A Single Model for Multiple Tasks* "
    "(ICLR).",
    claim="""
Instead of a network for each task, HyperGrid trains one transformer for all, and lets each task scale blocks of the
feed-forward weights: with a grid of 8 x 8 blocks a task has 8 factors for the rows of a weight and 8 for its columns,
and no weights of its own. The paper narrows the gap to a network for each task with a small part of the parameters.

Here a small transformer reads handwritten digits row by row, in five domains that show them plain, inverted, turned
and with pixels in two other orders. `convert(network, DOMAINS, "hypergrid", where=["*.linear1", "*.linear2"])` gives
the feed-forward layers their grids; each domain has a head of its own. Beside it: one network without grids,
feed-forward layers of each domain's own, and a network for each domain.
""",
    reading="""
Factors on blocks help, and finer grids help more: with 32 x 32 the shared network gains a point for 7% more parameters.
Bars in the picture reach from the lowest to the highest seed. The steps between grids are smaller than the spread over
the seeds, so that only the direction over all of them counts. What is left to a network for each domain is two points,
and feed-forward layers of each domain's own close most of that. Here the grids fall short of what the paper promises.
Its tasks read the same kind of text with a large network that was trained before; these domains move the pixels about,
and the small network starts from nothing. The grids here belong to the task alone; the paper computes them from the
input, too.
""",
    cases=cases,
    run=run,
    table=table,
    draw=draw,
    claims=claims,
    size=(8, 4.2),
    seeds=3,
)

if __name__ == "__main__":
    main(EXPERIMENT)
