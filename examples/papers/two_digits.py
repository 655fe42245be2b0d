"""Two overlaid digits, a network with a shared trunk and a head for each, and how well it reads them.

The experiments on gradient surgery share it: the tasks are the left digit and the right one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from data import overlaid, pools
from torch import Tensor, nn

TASKS = ("left", "right")


class TwoDigits(nn.Module):
    """Pictures `[N, 12, 12]` -> scores `[N, 10]` by task: a shared MLP of two layers, a linear head for each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(144, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.heads = nn.ModuleDict({task: nn.Linear(width, 10) for task in TASKS})

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        features = self.trunk(pictures)
        return {task: head(features) for task, head in self.heads.items()}


class Batches:
    """Fresh overlays of training digits, the same ones for the same seed, and 2,000 overlays of others for testing."""

    def __init__(self, seed: int, size: int = 64) -> None:
        self.generator, self.size = torch.Generator().manual_seed(seed), size
        self.testing = overlaid(pools()[1], 2000, torch.Generator().manual_seed(1000))

    def draw(self) -> tuple[Tensor, dict[str, Tensor]]:
        return self._split(overlaid(pools()[0], self.size, self.generator))

    @staticmethod
    def _split(batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        pictures, *labels = batch
        return pictures, dict(zip(TASKS, labels, strict=True))

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> dict[str, float]:
        """In percent, by task, on the overlays for testing."""
        pictures, labels = self._split(self.testing)
        scores = model(pictures)
        return {task: round(100 * float((scores[task].argmax(1) == labels[task]).float().mean()), 3) for task in TASKS}

    @torch.no_grad()
    def test_losses(self, model: nn.Module) -> dict[str, float]:
        pictures, labels = self._split(self.testing)
        return {task: round(float(loss), 5) for task, loss in cross_entropies(model(pictures), labels).items()}


def cross_entropies(scores: dict[str, Tensor], labels: dict[str, Tensor]) -> dict[str, Tensor]:
    return {task: F.cross_entropy(scores[task], labels[task]) for task in TASKS}
