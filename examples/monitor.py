"""What gradient surgery does over a training: weights, cosines and conflict rates, in TensorBoard and in a plot.

    +monitor = Monitor(list(TASKS), every=20, folder="runs/monitor")
     ...
     surgery = fastmtl.backward(losses, model)
    +monitor.add(surgery)

Sums are kept on the device and read once every `every` steps, so that watching does not make each step wait.

    python examples/monitor.py --out runs/monitor
    python examples/monitor.py --out runs/smooth --momentum 0.9    # weights that change slowly, by a method with state
    tensorboard --logdir runs/monitor
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

import fastmtl
from fastmtl import methods

matplotlib.use("agg")
import matplotlib.pyplot as plt

TASKS = {"digit": 10, "odd": 2, "large": 2, "loop": 2}  # task -> number of classes


class Monitor:
    """Means over the last `every` surgeries of each task's weight and gradient norm, each pair's cosine, and how often
    a pair was in conflict."""

    def __init__(self, names: list[str], every: int, folder: Path) -> None:
        self.names, self.every, self.folder = names, every, folder
        self.pairs = list(itertools.combinations(range(len(names)), 2))
        self.writer = SummaryWriter(str(folder))
        self.history: dict[str, list[float]] = {"step": []}
        self.step = self.seen = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, surgery: fastmtl.Surgery) -> None:
        self.step += 1
        if surgery.reused:  # a step of methods.Every that saw no task's gradient alone
            return
        # cosines of absent tasks are 0: with tasks missing from batches, count the steps of each pair as well
        norms = surgery.gram.diagonal().sqrt()
        new = {"norm": norms, "cosine": surgery.cosines(), "conflict rate": surgery.conflicts()}
        if surgery.weights is not None:  # some methods make their update without
            new["weight"] = surgery.weights
        self.sums = {kind: self.sums.get(kind, 0.0) + value.double() for kind, value in new.items()}
        self.seen += 1
        if self.seen == self.every:
            self.flush()

    def flush(self) -> None:
        if not self.seen:
            return
        means = {kind: (total / self.seen).tolist() for kind, total in self.sums.items()}  # waits
        values = {}
        for kind, mean in means.items():
            if kind in ("weight", "norm"):
                values |= {f"{kind}/{name}": mean[t] for t, name in enumerate(self.names)}
            else:
                values |= {f"{kind}/{self.names[i]}-{self.names[j]}": mean[i][j] for i, j in self.pairs}
        for name, value in values.items():
            self.writer.add_scalar(name, value, self.step)
            self.history.setdefault(name, []).append(value)
        self.history["step"].append(self.step)
        self.sums, self.seen = {}, 0

    def close(self) -> Path:
        """Writes what is left, and the plot."""
        self.flush()
        figure, axes = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
        for axis, kind in zip(axes, ("weight", "cosine", "conflict rate"), strict=True):
            for name, values in self.history.items():
                if name.startswith(f"{kind}/"):
                    axis.plot(self.history["step"], values, marker=".", label=name.partition("/")[2])
            axis.set(title=kind, xlabel="step")
            if axis.lines:
                axis.legend(fontsize="small")
        axes[1].axhline(0, color="black", linewidth=0.8)
        axes[2].set_ylim(-0.05, 1.05)
        path = self.folder / "monitor.png"
        figure.savefig(path, dpi=120)
        plt.close(figure)
        self.writer.add_image("monitor", torch.tensor(plt.imread(path))[..., :3], self.step, dataformats="HWC")
        self.writer.close()
        return path


def main() -> None:
    parser = argparse.ArgumentParser(description="Watches gradient surgery over a training.")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--momentum", type=float, default=0.0, help="of a running average of the weights")
    parser.add_argument("--out", type=Path, default=Path("runs/monitor"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    data = load_digits()
    pictures, digit = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    loop = torch.isin(digit, torch.tensor([0, 6, 8, 9]))
    labels = {"digit": digit, "odd": digit % 2, "large": (digit > 4).long(), "loop": loop.long()}

    trunk = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16), nn.ReLU())
    model = nn.ModuleDict({"trunk": trunk} | {task: nn.Linear(16, classes) for task, classes in TASKS.items()})
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    method = methods.CRMOGM(methods.PCGrad(), options.momentum) if options.momentum else methods.PCGrad()
    monitor = Monitor(list(TASKS), options.every, options.out)
    for _ in range(options.steps):
        rows = torch.randint(len(digit), (options.batch_size,))
        features = model["trunk"](pictures[rows])
        losses = {task: F.cross_entropy(model[task](features), labels[task][rows]) for task in TASKS}
        optimizer.zero_grad()
        monitor.add(fastmtl.backward(losses, model, method=method))
        optimizer.step()
    plot = monitor.close()
    # the average of the weights is part of where the training stands, by the names of the tasks
    torch.save({"model": model.state_dict(), "method": method.state_dict()}, options.out / "checkpoint.pt")

    for kind in ("weight", "cosine", "conflict rate"):
        last = {name.partition("/")[2]: v[-1] for name, v in monitor.history.items() if name.startswith(f"{kind}/")}
        print(f"{kind} at step {monitor.step}: " + ", ".join(f"{name} {value:.2f}" for name, value in last.items()))
    print(f"wrote {plot}; tensorboard --logdir {options.out}")


if __name__ == "__main__":
    main()
