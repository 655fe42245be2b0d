"""Networks of the size that people train several tasks on, with biases and affine norms throughout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmtl.benchmarks.workloads import digits

CLASSES = 4
# of the multi-task robot arm: what it sees, how it moves
OBSERVED, ACTIONS = 39, 4


class ResidualBlock(nn.Module):
    """ResNet's basic block with group normalisation: two 3x3 convolutions and a way around them."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1)
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.norm2 = nn.GroupNorm(8, channels)
        self.around: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.around = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride), nn.GroupNorm(8, channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.around(x))


class ResNet(nn.Module):
    """ResNet-18's 4 x 2 blocks behind the 3x3 stem for small pictures; `width` 64 is its own, 32 is half of it.

    With a bias in every convolution, and affine group norms, which don't mix samples, where it has batch norms.
    """

    def __init__(self, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1), nn.GroupNorm(8, width), nn.ReLU()]
        before = width
        for stage in range(4):
            for block in range(depth):
                layers.append(ResidualBlock(before, width << stage, 2 if stage and block == 0 else 1))
                before = width << stage
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(before, CLASSES)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.classifier(self.features(pictures))


class ViT(nn.Module):
    """Vision transformer: patches, a class token, position embeddings, encoder layers that normalise first."""

    def __init__(self, side: int = 32, patch: int = 4, width: int = 128, depth: int = 6, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, (side // patch) ** 2 + 1, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.patches(pictures).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.classifier(self.norm(x[:, 0]))


def mlp(width: int = 400, depth: int = 3) -> nn.Sequential:
    """The policy of multi-task reinforcement learning on a robot arm: small layers, many tasks."""
    layers: list[nn.Module] = []
    before = OBSERVED
    for _ in range(depth):
        layers += [nn.Linear(before, width), nn.ReLU()]
        before = width
    return nn.Sequential(*layers, nn.Linear(before, ACTIONS))


def digits_network(widths: tuple[int, ...] = (32, 64, 128), depth: int = 3) -> nn.Sequential:
    """The residual backbone of the digits suite, with one classifier that all tasks share."""
    backbone = digits.Network(widths, depth).backbone
    return nn.Sequential(backbone, nn.Linear(4 * widths[-1], CLASSES))


@dataclass(frozen=True)
class Workload:
    """A network with the batch that it is trained on.

    Args:
        name: as it is called in rows and plots.
        build: makes the network.
        sample: shape of one input.
        batch: samples of a batch, of all tasks together.
        regression: the targets are `ACTIONS` numbers with a squared error, not one of `CLASSES` classes.
    """

    name: str
    build: Callable[[], nn.Module]
    sample: tuple[int, ...]
    batch: int = 64
    regression: bool = False

    def model(self, seed: int = 0) -> nn.Module:
        """The network as it might be in the midst of training: no norm, bias or token is at its neutral start.

        (A norm that starts at zero, for one, hides the gradients of everything before it.)
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build()
            with torch.no_grad():
                for p in model.parameters():
                    if p.ndim == 1 or not p.any():
                        p.add_(0.1 * torch.randn_like(p))
                for module in model.modules():
                    if isinstance(module, nn.GroupNorm | nn.LayerNorm):
                        module.weight.copy_(1 + 0.2 * torch.randn_like(module.weight))
        return model

    def data(self, task_ids: Tensor, seed: int = 1) -> tuple[Tensor, Tensor]:
        """Random inputs `[batch, *sample]` and targets, mostly those that the task prefers: so tasks conflict."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.batch, *self.sample, generator=generator)
        if self.regression:
            side = 1.0 - 2.0 * (task_ids % 2)
            return x, torch.randn(self.batch, ACTIONS, generator=generator) + side[:, None]
        drawn = torch.randint(CLASSES, (self.batch,), generator=generator)
        preferred = torch.rand(self.batch, generator=generator) < 0.9
        return x, torch.where(preferred, task_ids % CLASSES, drawn)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of every sample: `[batch]`."""
        if self.regression:
            return F.mse_loss(outputs, targets, reduction="none").mean(1)
        return F.cross_entropy(outputs, targets, reduction="none")


DIGITS = Workload("digits network", digits_network, (1, digits.SIDE, digits.SIDE))
RESNET = Workload("half-width ResNet-18 32x32", lambda: ResNet(32), (3, 32, 32))
RESNET_64 = Workload("half-width ResNet-18 64x64", lambda: ResNet(32), (3, 64, 64))
FULL_RESNET = Workload("ResNet-18 32x32", ResNet, (3, 32, 32))
FULL_RESNET_64 = Workload("ResNet-18 64x64", ResNet, (3, 64, 64))
VIT = Workload("small ViT", ViT, (3, 32, 32))
RL = Workload("RL MLP", mlp, (OBSERVED,), batch=1600, regression=True)
