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
    """ResNet's basic block: two 3x3 convolutions and a way around them.

    With group norms and biases, or with batch norms and without biases, as it was published.
    """

    def __init__(self, channels_in: int, channels: int, stride: int, batch_norms: bool = False) -> None:
        super().__init__()

        def norm() -> nn.Module:
            return nn.BatchNorm2d(channels) if batch_norms else nn.GroupNorm(8, channels)

        bias = not batch_norms
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=bias)
        self.norm1 = norm()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=bias)
        self.norm2 = norm()
        self.around: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.around = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=bias), norm())

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


class PublishedResNet(nn.Module):
    """ResNet-18 as it was published: a 7x7 stem and a pool, batch norms, convolutions without biases.

    `width` 64 is its own, 32 is half of it.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        ]  # fmt: skip
        before = width
        for stage in range(4):
            for block in range(2):
                stride = 2 if stage and block == 0 else 1
                layers.append(ResidualBlock(before, width << stage, stride, batch_norms=True))
                before = width << stage
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(before, CLASSES)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.classifier(self.features(pictures))


class EncoderLayer(nn.Module):
    """An encoder layer that normalises first, with an `nn.Linear` for each projection, as libraries of models have it.

    These are what adapters are put on.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (p(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.query, self.key, self.value))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def fused_layer(width: int, heads: int) -> nn.Module:
    """torch's own encoder layer, whose attention has one weight for query, key and value."""
    return nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )


class ViT(nn.Module):
    """Vision transformer: patches, a class token, position embeddings, encoder layers that normalise first."""

    def __init__(
        self,
        side: int = 32,
        patch: int = 4,
        width: int = 128,
        depth: int = 6,
        heads: int = 4,
        layer: Callable[[int, int], nn.Module] = fused_layer,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, (side // patch) ** 2 + 1, width))
        self.layers = nn.ModuleList(layer(width, heads) for _ in range(depth))
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
                    if isinstance(module, nn.GroupNorm | nn.LayerNorm | nn.BatchNorm2d):
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
