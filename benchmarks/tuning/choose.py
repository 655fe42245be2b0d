"""Limits, made of the times of every way."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from fastmtl.benchmarks.tuning.probes import CallCost, Timed
from fastmtl.tuning.table import Limits

# a way that was not tried, because it was hopeless with fewer rows, counts as so many times as slow as the best
UNTRIED = 3.0
# what is tried for the cost of one more call
CALL_BYTES = tuple(round(1e5 * 2 ** (k / 2)) for k in range(15))
WEIGHT_PASSES = tuple(k / 4 for k in range(41))


class Choice(NamedTuple):
    """The limits with the least loss, and that loss: by how much longer than the best way the chosen ones take, on
    average and at most."""

    limits: Limits
    mean_loss: float
    largest_loss: float


def way_of(limits: Limits, rows: int) -> str:
    """Which way a pixelwise segment takes that the direct product could serve."""
    for way, limit in zip(("direct", "matmul"), limits, strict=True):
        if limit is None or rows <= limit:
            return way
    return "convolution"


def losses(limits: Limits, timed: Sequence[Timed]) -> list[float]:
    """Of each layer, how many times as long as the best way the chosen one takes."""
    found = []
    for _, rows, seconds in timed:
        best = min(seconds.values())
        found.append(seconds.get(way_of(limits, rows), UNTRIED * best) / best)
    return found


def of_direct(product: str, kind: str, dtype: str) -> float:
    """What part of its time the direct product counts with, since a product that is measured alone is not in a step.

    Convolutions leave a scratch weight and oneDNN's copy of it in the cache, which costs the products that follow:
    forward and backward of ViT-B's fc2, whose products take as long either way, took 62 ms by the direct product and 70
    otherwise. But where dx of a filter is oneDNN's, dW comes from the same call, and shares its copies of the pictures:
    ResNet-18's layer2 with 32 tasks, whose dW takes as long either way, took 8% less so. In 16 bits nothing was seen.
    """
    if dtype != "float32":
        return 1.0
    return 1.1 if product == "weight_gradient" and kind != "pixelwise" else 0.95


def choose(timed: Sequence[Timed], part: float = 1.0) -> Choice:
    """The pair of limits under which all layers together lose least, each counted by its ratio to the best way, and the
    direct product by `part` of its time. The losses told are of what was measured."""
    counted = [
        one._replace(seconds={w: s * part if w == "direct" else s for w, s in one.seconds.items()}) for one in timed
    ]
    rows = sorted({one.rows for one in timed})
    # between two measured numbers of rows, as far from either in ratio
    between = [round(math.sqrt(a * b)) for a, b in itertools.pairwise(rows)]
    directs: list[int | None] = [0, *between, None]
    matmuls: list[int | None] = [0, *between, None] if any("matmul" in one.seconds for one in timed) else [0]
    of_torch = [one._replace(seconds={way: s for way, s in one.seconds.items() if way != "direct"}) for one in timed]

    def loss(limits: Limits) -> tuple[float, float]:
        # where the direct product takes all that was measured, torch's own ways are weighed against each other
        hidden = losses(limits._replace(direct=0), of_torch)
        return round(sum(map(math.log, losses(limits, counted))), 9), sum(map(math.log, hidden))

    best = min((Limits(d, m) for d in directs for m in matmuls), key=loss)
    # beyond what was measured, nothing is known of the direct product but that it falls behind
    if best.direct is None:
        best = best._replace(direct=rows[-1])
    found = losses(best, timed)
    return Choice(best, math.exp(sum(map(math.log, found)) / len(found)) - 1, max(found) - 1)


def fit_calls(costs: Sequence[CallCost]) -> tuple[int, float]:
    """`call_bytes` and `weight_passes`: what one more call costs, by the bytes of a weight, as near to all as can be in
    ratio."""

    def off(fitted: tuple[int, float]) -> float:
        call_bytes, passes = fitted
        found = (math.log((call_bytes + passes * weight) / max(cost, 1e4)) for weight, cost in costs)
        return sum(x * x for x in found)

    return min(itertools.product(CALL_BYTES, WEIGHT_PASSES), key=off)
