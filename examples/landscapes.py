"""Two losses of two parameters that gradient descent on their sum gets stuck on, with every method.

    -x.grad = grads.sum(0)            # [tasks, 2]: gradient descent on the sum
    +x.grad = methods.CAGrad()(grads)
     optimizer.step()

The first landscape is that of the PCGrad paper (Yu et al. 2020): a deep, curved valley of one task crosses that of the
other. The second is the toy problem of CAGrad, Nash-MTL and others (Liu et al. 2021, Navon et al. 2022), with three
starts and a front of optima between which the tasks must trade. One picture each: trajectories, coloured by step. With
all twenty methods they take minutes, since the valley is 60,000 steps long.

    python examples/landscapes.py --out runs/landscapes
    python examples/landscapes.py --landscape front --methods sum pcgrad cagrad nashmtl
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from torch import Tensor

from fastmtl import methods

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

# Left out: `mean` and `every` go the ways of `sum` and of the method inside. Of two tasks `krum` has none to prefer and
# `trimmedmean` nothing to keep. `dbmtl` takes logarithms of losses, and `paretomtl` their angles: these are negative.
METHODS: dict[str, Callable[[], methods.Method]] = {
    "sum": methods.Sum,
    "pcgrad": methods.PCGrad,
    "gradvac": methods.GradVac,
    "graddrop": methods.GradDrop,
    "mgda": methods.MGDA,
    "cagrad": methods.CAGrad,
    "imtlg": methods.IMTLG,
    "nashmtl": methods.NashMTL,
    "fairgrad": methods.FairGrad,
    "alignedmtl": methods.AlignedMTL,
    "config": methods.ConFIG,
    "upgrad": methods.UPGrad,
    "dualproj": methods.DualProj,
    "pcd": methods.PCD,  # task 1 comes first
    "moco": methods.MoCo,
    "modo": methods.MoDo,
    "sdmgrad": methods.SDMGrad,
    "crmogm": lambda: methods.CRMOGM(methods.MGDA()),
    "excessmtl": methods.ExcessMTL,
    "randomweights": methods.RandomWeights,
}


def valley_losses(x: Tensor) -> tuple[Tensor, Tensor]:
    """Yu et al. 2020, of parameters in the last dimension."""
    a, b = x.unbind(-1)
    first = 20 * (0.5 * a + b.tanh()).abs().clamp(min=5e-6).log()
    second = 25 * (0.5 * a - b.tanh() + 2).abs().clamp(min=5e-6).log()
    return first, second


def front_losses(x: Tensor) -> tuple[Tensor, Tensor]:
    """Liu et al. 2021, of parameters in the last dimension."""
    a, b = x.unbind(-1)
    above, below = (b / 2).tanh().clamp(min=0), (-b / 2).tanh().clamp(min=0)
    walls = (0.5 * (-a - 7) - (-b).tanh(), 0.5 * (-a + 3) + (-b).tanh() + 2)
    bowls = ((-a + 7) ** 2, (-a - 7) ** 2)
    return tuple(
        above * (wall.abs().clamp(min=5e-6).log() + 6) + below * ((bowl + 0.1 * (-b - 8) ** 2) / 10 - 20)
        for wall, bowl in zip(walls, bowls, strict=True)
    )


class Landscape(NamedTuple):
    losses: Callable[[Tensor], tuple[Tensor, Tensor]]
    starts: tuple[tuple[float, float], ...]
    across: tuple[float, float]
    up: tuple[float, float]


LANDSCAPES = {
    "valley": Landscape(valley_losses, ((0.5, -3.0),), (-6, 6), (-6, 8)),
    "front": Landscape(front_losses, ((-8.5, 7.5), (-8.5, -5.0), (9.0, 9.0)), (-11, 11), (-11, 11)),
}


def update_of(method: methods.Method, grads: Tensor) -> Tensor:
    """`[tasks, 2]` -> `[2]`. Methods that want a second, independent batch get the same: nothing here is random."""
    if "second_batch" not in method.needs:
        return method(grads)
    gram = grads @ grads.mT
    return method.weigh(gram, methods.Seen(["1", "2"], [True, True], second=gram)) @ grads


def descend(landscape: Landscape, names: Sequence[str], steps: int, lr: float, keep: int = 500) -> Tensor:
    """Adam with every method from every start, side by side: what they pass through, `[points, methods, starts, 2]`.

    Adam moves each number by itself, so that one optimiser serves all.
    """
    chosen = [[METHODS[name]() for _ in landscape.starts] for name in names]  # some have state
    x = torch.tensor(landscape.starts, dtype=torch.float64).repeat(len(names), 1, 1).requires_grad_()
    optimizer = torch.optim.Adam([x], lr)
    x.grad = torch.zeros_like(x)
    way = [x.detach().clone()]
    for step in range(1, steps + 1):
        grads = [torch.autograd.grad(loss.sum(), x, retain_graph=True)[0] for loss in landscape.losses(x)]
        bank = torch.stack(grads, 2)  # [methods, starts, tasks, 2]
        for own, update, found in zip(chosen, x.grad, bank, strict=True):
            for start, method in enumerate(own):
                update[start] = update_of(method, found[start])
        optimizer.step()
        if step % max(1, steps // keep) == 0:
            way.append(x.detach().clone())
    return torch.stack(way)


def grid(landscape: Landscape, points: int = 400) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both losses over the picture: x `[W]`, y `[H]`, and `[H, W]` for each loss."""
    x, y = torch.linspace(*landscape.across, points), torch.linspace(*landscape.up, points)
    losses = landscape.losses(torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).double())
    return x, y, *losses


def front() -> Tensor:
    """Where one loss of the second landscape falls at the other's cost alone: optima of weighted sums, `[101, 2]`."""
    share = torch.linspace(0, 1, 101, dtype=torch.float64)[:, None]
    down = torch.linspace(-10, -7, 601, dtype=torch.float64)
    across = (7 * (2 * share - 1)).expand(-1, 601)  # the middle of the two bowls, as the weights have it
    first, second = front_losses(torch.stack([across, down.expand_as(across)], -1))
    best = (share * first + (1 - share) * second).argmin(1)
    return torch.stack([across[:, 0], down[best]], 1)


def around(landscape: Landscape, ways: Tensor) -> Landscape:
    """The landscape with as much more to each side as the ways need, ends and stars included."""
    low, high = ways.flatten(0, -2).aminmax(dim=0)
    sides = []
    for (left, right), least, most in zip((landscape.across, landscape.up), low.tolist(), high.tolist(), strict=True):
        margin = 0.04 * (right - left)
        sides.append((min(left, least - margin), max(right, most + margin)))
    return landscape._replace(across=sides[0], up=sides[1])


def draw_ways(axis: Axes, contours: tuple[Tensor, Tensor, Tensor], ways: Tensor) -> None:
    """Trajectories `[points, starts, 2]` over the sum's contours, from yellow to dark; a star is where they end."""
    x, y, total = contours
    axis.contour(x, y, total, levels=25, cmap="Greys_r", linewidths=0.6)
    time = torch.linspace(0, 1, len(ways))
    for way in ways.unbind(1):
        axis.scatter(way[:, 0], way[:, 1], c=time, cmap="plasma_r", s=4, zorder=2)
        axis.plot(*way[0], "o", color="black", markersize=5, zorder=3)
        axis.plot(*way[-1], "*", color="tab:red", markersize=12, markeredgecolor="black", zorder=4)
    axis.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]))


def draw(name: str, names: Sequence[str], ways: Tensor, path: Path) -> None:
    """The landscape, both tasks' contours, and each method's trajectories."""
    x, y, first, second = grid(around(LANDSCAPES[name], ways))
    best = front() if name == "front" else None
    columns = 5 if len(names) > 5 else 4
    rows = -(-(len(names) + 3) // columns)
    figure = plt.figure(figsize=(4 * columns, 3.6 * rows), layout="constrained")
    surface = figure.add_subplot(rows, columns, 1, projection="3d")
    surface.plot_surface(*torch.meshgrid(x, y, indexing="xy"), first + second, cmap="viridis", rcount=80, ccount=80)
    surface.set_title("sum of the losses")
    for k, (title, values) in enumerate({"task 1": first, "task 2": second}.items()):
        axis = figure.add_subplot(rows, columns, 2 + k)
        axis.contourf(x, y, values, levels=25, cmap="viridis")
        axis.set_title(title)
    for k, method in enumerate(names):
        axis = figure.add_subplot(rows, columns, 4 + k)
        draw_ways(axis, (x, y, first + second), ways[:, k])
        if best is not None:
            axis.plot(*best.T, color="tab:green", linewidth=3, alpha=0.6, zorder=1)
        axis.set_title("Adam on the sum" if method == "sum" else f"Adam with {method}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Two landscapes of the papers, with every method.")
    parser.add_argument("--landscape", choices=[*LANDSCAPES, "both"], default="both")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=None, help="default: 60,000 in the valley, 20,000 to the front")
    parser.add_argument("--lr", type=float, default=5e-3, help="the papers take 1e-3 and five times as many steps")
    parser.add_argument("--out", type=Path, default=Path("runs/landscapes"))
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)  # some draw random numbers
    options.out.mkdir(parents=True, exist_ok=True)
    for name in LANDSCAPES if options.landscape == "both" else [options.landscape]:
        landscape = LANDSCAPES[name]
        steps = options.steps or {"valley": 60_000, "front": 20_000}[name]
        ways = descend(landscape, options.methods, steps, options.lr)
        for method, ends in zip(options.methods, ways[-1], strict=True):
            for start, end in zip(landscape.starts, ends, strict=True):
                first, second = map(float, landscape.losses(end))
                print(
                    f"{name}, {method} from ({start[0]:g}, {start[1]:g}): "
                    f"({end[0]:.2f}, {end[1]:.2f}), losses {first:.2f} and {second:.2f}"
                )
        draw(name, options.methods, ways, options.out / f"{name}.png")
        print(f"wrote {options.out / f'{name}.png'}")


if __name__ == "__main__":
    main()
