"""The data of these experiments: scikit-learn's bundled handwritten digits, 1,797 pictures of 8 x 8 pixels.

Pixels lie between 0 and 1. The split is the same in every experiment and for every seed: the first 400 of a fixed
shuffle are for testing.
"""

from __future__ import annotations

import functools
import sys
from typing import NamedTuple

import torch
from torch import Tensor

try:
    from sklearn.datasets import load_digits
except ModuleNotFoundError:
    sys.exit("scikit-learn is not installed: pip install matplotlib scikit-learn")

TESTING = 400


class Pool(NamedTuple):
    """Pictures `[N, 8, 8]` in float32 and the digits that they show, `[N]` in int64."""

    images: Tensor
    labels: Tensor


@functools.cache
def pools() -> tuple[Pool, Pool]:
    """For training (1,397) and for testing (400)."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32) / 16
    labels = torch.tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return Pool(images[TESTING:], labels[TESTING:]), Pool(images[:TESTING], labels[:TESTING])


DOMAINS = ("plain", "inverted", "turned", "shuffled", "scattered")


def domain(images: Tensor, name: str) -> Tensor:
    """The same digits as another domain shows them; all but `inverted` move pixels and keep their values."""
    if name == "plain":
        return images
    if name == "inverted":
        return 1 - images
    if name == "turned":
        return images.rot90(1, (1, 2))
    order = torch.randperm(64, generator=torch.Generator().manual_seed({"shuffled": 1, "scattered": 2}[name]))
    return images.flatten(1)[:, order].reshape(images.shape)


LABELS = {"digit": 10, "parity": 2, "half": 2, "third": 3, "loops": 3}  # task -> number of classes


def labels_of(labels: Tensor, task: str) -> Tensor:
    """What a task asks of a digit: which it is, odd or even, below 5 or not, its rest by 3, its closed loops."""
    return {
        "digit": labels,
        "parity": labels % 2,
        "half": labels // 5,
        "third": labels % 3,
        "loops": torch.tensor([1, 0, 0, 0, 0, 0, 1, 0, 2, 1])[labels],
    }[task]


def overlaid(pool: Pool, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Two digits in each picture, as in MultiMNIST: pictures `[size, 12, 12]`, labels of the left and the right one."""
    left, right = torch.randint(len(pool.labels), (2, size), generator=generator)
    picture = torch.zeros(size, 12, 12)
    picture[:, :8, :8] = pool.images[left]
    picture[:, 4:, 4:] = torch.maximum(picture[:, 4:, 4:], pool.images[right])
    return picture, pool.labels[left], pool.labels[right]
