"""Four tasks on overlaid handwritten digits, trained with gradient surgery: what changes in a training loop.

    -    sum(losses.values()).backward()
    +    surgery = fastmtl.backward(losses)

Two digits overlap in each picture, as in MultiMNIST. The tasks: the left digit, the right digit, the parity of their
sum, the sum. They share a residual network and have one linear head each; fastmtl finds out by itself which
parameters are shared.

    python examples/digits.py --method pcgrad
    python examples/digits.py --method sum
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastmtl

TASKS = {"left": 10, "right": 10, "parity": 2, "sum": 19}  # task -> number of classes


def load_pools() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Digits for training and, none of them among those, for testing: `[N, 1, 12, 12]` and labels `[N]`."""
    data = load_digits()
    images = F.interpolate(torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, size=(12, 12), mode="bilinear")
    labels = torch.tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return (images[400:], labels[400:]), (images[:400], labels[:400])


def overlay(pool: tuple[Tensor, Tensor], size: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Pictures `[size, 1, 16, 16]` of two overlapping digits, and the labels by task."""
    images, labels = pool
    left, right = torch.randint(len(labels), (2, size), generator=generator)
    picture = torch.zeros(size, 1, 16, 16)
    picture[:, :, :12, :12] = images[left]
    picture[:, :, 4:, 4:] = torch.maximum(picture[:, :, 4:, 4:], images[right])
    total = labels[left] + labels[right]
    return picture, {"left": labels[left], "right": labels[right], "parity": total % 2, "sum": total}


class Residual(nn.Module):
    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.inside = nn.Sequential(
            nn.Conv2d(before, channels, 3, stride, 1, bias=False),
            nn.GroupNorm(8, channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            nn.GroupNorm(8, channels),
        )
        self.around = nn.Conv2d(before, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.inside(x) + self.around(x))


class Network(nn.Module):
    """A shared residual network and one head per task."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Sequential(
            nn.Conv2d(1, 32, 3, 1, 1),
            nn.ReLU(),
            Residual(32, 32, 1),
            Residual(32, 64, 2),
            Residual(64, 64, 1),
            Residual(64, 128, 2),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.heads = nn.ModuleDict({task: nn.Linear(512, classes) for task, classes in TASKS.items()})

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        features = self.shared(pictures)
        return {task: head(features) for task, head in self.heads.items()}


@torch.no_grad()
def accuracy(model: nn.Module, pictures: Tensor, labels: dict[str, Tensor]) -> dict[str, float]:
    scores = model(pictures)
    return {task: float((scores[task].argmax(1) == labels[task]).float().mean()) for task in TASKS}


def main() -> None:
    parser = argparse.ArgumentParser(description="Four tasks on overlaid digits, with and without gradient surgery.")
    parser.add_argument("--method", choices=("sum", "pcgrad"), default="pcgrad")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    training, testing = load_pools()
    test_pictures, test_labels = overlay(testing, 1000, generator)
    model = Network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    for step in range(1, options.steps + 1):
        pictures, labels = overlay(training, options.batch_size, generator)
        scores = model(pictures)
        losses = {task: F.cross_entropy(scores[task], labels[task]) for task in TASKS}
        optimizer.zero_grad()
        if options.method == "sum":
            sum(losses.values()).backward()
        else:
            surgery = fastmtl.backward(losses, method="pcgrad")
        optimizer.step()

        if step % 100 == 0 or step == options.steps:
            right = accuracy(model, test_pictures, test_labels)
            print(f"step {step}: " + ", ".join(f"{task} {share:.1%}" for task, share in right.items()))
            if options.method == "pcgrad":
                # device tensors until here: reading them is what waits for the device
                log = surgery.log_dict("surgery/")
                print("  " + ", ".join(f"{name} {float(value):.3g}" for name, value in log.items()))


if __name__ == "__main__":
    main()
