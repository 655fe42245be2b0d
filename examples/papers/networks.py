"""Small networks of layers with names, and how the experiments with per-task weights train and score them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from data import Pool, domain, pools
from torch import Tensor, nn

from fastmtl.nn import tasks

CLASSES = 10
SAMPLES = 32  # of each task in a batch


class Sets(NamedTuple):
    """The data of several tasks: pictures `[T, N, 8, 8]` and labels `[T, N]`."""

    images: Tensor
    labels: Tensor

    def one(self, task: int) -> Sets:
        return Sets(self.images[task : task + 1], self.labels[task : task + 1])

    def first(self, count: int) -> Sets:
        return Sets(self.images[:count], self.labels[:count])


def domain_sets(names: Sequence[str]) -> tuple[Sets, Sets]:
    """Each task is a domain: for training, for testing. Pixels lie between -1 and 1, so that `inverted` turns signs."""

    def of(pool: Pool) -> Sets:
        images = torch.stack([domain(pool.images, name) for name in names])
        return Sets(2 * images - 1, pool.labels.expand(len(names), -1))

    training, testing = pools()
    return of(training), of(testing)


def mlp(layers: int, width: int = 64) -> nn.Sequential:
    """`layer0`, `layer1`, ... of one size, and a `head`."""
    parts: list[tuple[str, nn.Module]] = [("flat", nn.Flatten())]
    for k in range(layers):
        parts += [(f"layer{k}", nn.Linear(width if k else 64, width)), (f"relu{k}", nn.ReLU())]
    return he(nn.Sequential(OrderedDict([*parts, ("head", nn.Linear(width, CLASSES))])))


class Spread(nn.Module):
    """A picture `[N, 8, 8]` in every channel of `[N, channels, 8, 8]`, so that all layers have the same size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return x[:, None].expand(-1, self.channels, -1, -1)


def cnn(layers: int, width: int = 12) -> nn.Sequential:
    """`layer0`, `layer1`, ... of one size, convolutions of 3 x 3 behind whose second one there is a pool; a `head`."""
    parts: list[tuple[str, nn.Module]] = [("spread", Spread(width))]
    for k in range(layers):
        parts += [(f"layer{k}", nn.Conv2d(width, width, 3, padding=1)), (f"relu{k}", nn.ReLU())]
        if k == 1:
            parts.append(("pool", nn.MaxPool2d(2)))
    parts += [("flat", nn.Flatten()), ("head", nn.Linear(16 * width, CLASSES))]
    return he(nn.Sequential(OrderedDict(parts)))


def he(network: nn.Sequential) -> nn.Sequential:
    """He's initialisation, with which stacks of rectified layers without norms train."""
    for layer in network.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return network


def cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def sgd(parameters: Iterable[Any], rate: float) -> torch.optim.Optimizer:
    """Takes parameters, or the groups that `fastmtl.nn.param_groups` makes."""
    return torch.optim.SGD(parameters, lr=rate, momentum=0.9)


def fit(
    model: nn.Module,
    sets: Sets,
    optimizer: torch.optim.Optimizer,
    steps: int,
    names: Sequence[str] | None = None,
    penalty: Callable[[], Tensor] | None = None,
) -> None:
    """Trains by batches that hold samples of all tasks; the rate falls to 0 by a half cosine.

    Args:
        model: plain, or converted.
        sets: of the tasks at hand.
        optimizer: of what is to be trained.
        steps: how many batches.
        names: of the tasks, in the order of `sets`; None: they are those of the model.
        penalty: added to the loss, inside the block that tells the tasks.
    """
    schedule = cosine(optimizer, steps)
    count, total = sets.labels.shape
    rows = torch.arange(count)[:, None]
    ids = rows.expand(-1, SAMPLES).flatten()
    told: Any = ids if names is None else [names[t] for t in ids.tolist()] if len(names) > 1 else names[0]
    for _ in range(steps):
        chosen = torch.randint(total, (count, SAMPLES))
        with tasks(told):
            scores = model(sets.images[rows, chosen].flatten(0, 1))
            # each task's mean, summed: what belongs to one task learns as if there were no other
            loss = count * F.cross_entropy(scores, sets.labels[rows, chosen].flatten())
            if penalty is not None:
                loss = loss + penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def scores_of(model: nn.Module, sets: Sets, names: Sequence[str] | None = None) -> Tensor:
    """What the model in eval mode says of each task's pictures: `[T, N, 10]`."""
    training = model.training
    model.eval()
    found = []
    for t, images in enumerate(sets.images):
        told: Any = names[t] if names is not None else torch.full((len(images),), t)
        with tasks(told):
            found.append(model(images))
    model.train(training)
    return torch.stack(found)


def accuracies(model: nn.Module, sets: Sets, names: Sequence[str] | None = None) -> list[float]:
    """Percent, for each task."""
    right = scores_of(model, sets, names).argmax(2) == sets.labels
    return [round(100 * float(share), 3) for share in right.float().mean(1)]
