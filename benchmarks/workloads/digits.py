"""Two overlaid handwritten digits per picture, as in MultiMNIST, four tasks, and a residual network for them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# task -> number of classes
TASKS: dict[str, int] = {"left": 10, "right": 10, "parity": 2, "sum": 19}
SIDE = 16
HELD_OUT = 400


class Pictures:
    """Pairs of scikit-learn's bundled digits: one in the upper left corner, one in the lower right, overlapping.

    Pictures for testing are made of digits that no training picture contains.
    """

    def __init__(self, seed: int = 0) -> None:
        from sklearn.datasets import load_digits

        data = load_digits()
        images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16.0
        images = F.interpolate(images, size=(12, 12), mode="bilinear", align_corners=False)
        labels = torch.tensor(data.target, dtype=torch.int64)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        self.test = images[order[:HELD_OUT]], labels[order[:HELD_OUT]]
        self.train = images[order[HELD_OUT:]], labels[order[HELD_OUT:]]

    @staticmethod
    def _overlay(pool: tuple[Tensor, Tensor], size: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        images, labels = pool
        left, right = torch.randint(len(labels), (2, size), generator=torch.Generator().manual_seed(seed))
        picture = torch.zeros(size, 1, SIDE, SIDE)
        picture[:, :, :12, :12] = images[left]
        picture[:, :, 4:, 4:] = torch.maximum(picture[:, :, 4:, 4:], images[right])
        total = labels[left] + labels[right]
        return picture, {"left": labels[left], "right": labels[right], "parity": total % 2, "sum": total}

    def batch(self, index: int, size: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Training batch number `index`: pictures `[size, 1, 16, 16]` and the labels by task; the same every time."""
        return self._overlay(self.train, size, 1 + index)

    def held_out(self, size: int = 2000) -> tuple[Tensor, dict[str, Tensor]]:
        return self._overlay(self.test, size, 0)


class Block(nn.Module):
    """Two 3x3 convolutions with group normalisation, and a way around them."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(8, channels)
        # every block starts as the way around it: twenty steps then already learn something
        nn.init.zeros_(self.norm2.weight)
        self.around: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.around = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.GroupNorm(8, channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.around(x))


class Network(nn.Module):
    """A shared residual backbone (63 tensors) and one linear head per task."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128), depth: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, widths[0], 3, 1, 1, bias=False), nn.GroupNorm(8, widths[0]), nn.ReLU()]
        before = widths[0]
        for stage, width in enumerate(widths):
            for block in range(depth):
                layers.append(Block(before, width, 2 if stage and block == 0 else 1))
                before = width
        self.backbone = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.heads = nn.ModuleDict({task: nn.Linear(4 * before, classes) for task, classes in TASKS.items()})

    def forward(self, pictures: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Shared features, and the class scores of every task."""
        features = self.backbone(pictures)
        return features, {task: head(features) for task, head in self.heads.items()}


def losses(scores: dict[str, Tensor], labels: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cross-entropy of every task."""
    return {task: F.cross_entropy(scores[task], labels[task]) for task in scores}


@torch.no_grad()
def accuracy(model: nn.Module, pictures: Tensor, labels: dict[str, Tensor]) -> dict[str, float]:
    """Share of right answers by task."""
    right = dict.fromkeys(TASKS, 0)
    for start in range(0, len(pictures), 250):
        part = slice(start, start + 250)
        _, scores = model(pictures[part])
        for task in TASKS:
            right[task] += int((scores[task].argmax(1) == labels[task][part]).sum())
    return {task: n / len(pictures) for task, n in right.items()}
