"""Which samples an experiment changes, and to what."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastmtl.task_gradients.one_pass.rules.owners import along
from fastmtl.task_gradients.one_pass.sample_axis import PerSample

# for numbers with a fraction; others are exchanged for those of other samples, which are valid
KINDS = ("nan", "exchange", "inf", "-inf", "large", "opposite")
# these find out whose each element is
TELLING = ("nan", "exchange")
# these show what samples do that all have other signs than now, or are far larger
TURNED = frozenset(("large", "opposite"))
# these confirm it, with so many sets of samples; where four sets tell all samples apart, with those
_FEW = {"inf": 2, "-inf": 2, "large": 4, "opposite": 4}
_TOLD_BY_FOUR = math.comb(4, 2)


class Change(NamedTuple):
    """What an experiment does to the samples: their values are replaced for those that are chosen.

    Attributes:
        kind: one of `KINDS`.
        chosen: `[n]` bool.
        partner: `[n]`, the sample whose values a chosen one gets when they are exchanged.
    """

    kind: str
    chosen: Tensor
    partner: Tensor


def has_fractions(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def codes(n: int, generator: torch.Generator) -> list[Tensor]:
    """Sets of samples such that of any two each is in one that the other is not in: the bits of shuffled numbers that
    have as many ones each, of which there are a third fewer than bits of all numbers and their opposites."""
    bits = next(bits for bits in itertools.count(1) if math.comb(bits, (bits + 1) // 2) >= n)
    numbers = torch.arange(2**bits)
    ones = (numbers[:, None] >> torch.arange(bits) & 1).sum(1)
    numbers = numbers[ones == (bits + 1) // 2]
    numbers = numbers[torch.randperm(len(numbers), generator=generator)[:n]]
    return [chosen for bit in range(bits) if bool((chosen := (numbers >> bit & 1).bool()).any())]


def halves(n: int, count: int, generator: torch.Generator) -> list[Tensor]:
    """Half of the samples, and the others, so that there are `count` sets."""
    found: list[Tensor] = []
    while len(found) < count:
        here = torch.randperm(n, generator=generator) < (n + 1) // 2
        found += [here, ~here]
    return [chosen for chosen in found if bool(chosen.any())]


def changes(kind: str, n: int, generator: torch.Generator) -> Iterator[Change]:
    """The changes of one kind."""
    few = kind in _FEW and n > _TOLD_BY_FOUR
    for chosen in halves(n, _FEW[kind], generator) if few else codes(n, generator):
        yield Change(kind, chosen, torch.randperm(n, generator=generator))


def samples_at(axis: PerSample) -> Tensor:
    """Which of the n samples each position of the axis belongs to."""
    n = len(axis.task_ids)
    if axis.outer == axis.inner == 1:
        return torch.arange(n)
    return torch.arange(n)[:, None].expand(-1, axis.inner).reshape(-1).repeat(axis.outer)


def changed(x: Tensor, axis: PerSample, change: Change) -> Tensor:
    """A copy of `x` with other values for the chosen samples."""
    at = samples_at(axis)
    if change.kind == "exchange" or not has_fractions(x):
        return _exchanged(x, axis, torch.where(change.chosen, change.partner, torch.arange(len(axis.task_ids))))
    return poisoned(x, along(change.chosen[at], x.dim(), axis.axis), change.kind)


def permuted(x: Tensor, axis: PerSample, order: Tensor) -> Tensor:
    """A copy of `x` with its samples in another order."""
    return _exchanged(x, axis, order)


def _exchanged(x: Tensor, axis: PerSample, source: Tensor) -> Tensor:
    n = len(axis.task_ids)
    place = torch.arange(x.shape[axis.axis])
    inner, outer = place % axis.inner, place // (n * axis.inner)
    picked = outer * n * axis.inner + source[samples_at(axis)] * axis.inner + inner
    out = same_memory(x)
    return out.copy_(x.detach().index_select(axis.axis, picked.to(x.device)))


def same_memory(x: Tensor) -> Tensor:
    """Memory for other values of `x`, in the order in which a copy of it lies."""
    return torch.empty_like(x.detach())


def poisoned(x: Tensor, here: Tensor, kind: str) -> Tensor:
    """A copy of `x` with other values where `here` says so."""
    x = x.detach()
    if kind == "large":
        other = 100 * x + x.abs().mean()
    elif kind == "opposite":
        other = -10 * x - 0.1 * x.abs().mean()
    else:
        other = torch.full_like(x, complex(float(kind), float(kind)) if x.is_complex() else float(kind))
    return same_memory(x).copy_(torch.where(here.to(x.device), other, x))


def varies(x: Tensor) -> bool:
    """Whether there are other values of `x` that a call takes: of whole numbers those that it has already."""
    return has_fractions(x) or x.dtype == torch.bool or (x.numel() > 0 and bool(x.min() != x.max()))


def other_values(x: Tensor) -> Tensor:
    """A copy of `x` in which every element is another, and whole numbers stay between the lowest and the highest."""
    x = x.detach()
    if x.dtype == torch.bool:
        other = ~x
    elif has_fractions(x):
        other = 2 * x + 1
    else:
        other = torch.where(x == x.max(), x.min(), x + 1)
    return same_memory(x).copy_(other)
