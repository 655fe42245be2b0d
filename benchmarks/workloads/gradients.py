"""Random gradients for suite `surgery`, and the check of results on them against a float64 oracle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.benchmarks.baselines import surgery as baselines
from fastmtl.benchmarks.runner.registry import Check
from fastmtl.ops.gradients import reference

# largest error against the float64 oracle that passes, relative to the scale of the result
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Inputs:
    """One set of inputs. `order=None`: everyone draws an own random order, as in training."""

    grads: Tensor | list[list[Tensor]]
    weights: Tensor
    order: Tensor | None = None
    given: Tensor | None = None  # an order, for what is timed with a given one
    bank: Tensor | None = None  # the same numbers as `grads`, where those are lists
    params: Sequence[nn.Parameter] = ()  # with TorchJD's `.jac`, where grads are lists
    out: Any = None  # memory for the result, of ours and of plain torch; None: new memory at each call

    flat_out: Tensor | None = None  # where grads are lists: memory for a flat result

    @property
    def flat(self) -> Inputs:
        """For what works on the matrix: the flat memory, where the gradients are lists."""
        return replace(self, out=self.flat_out) if self.bank is not None else self

    @property
    def on_bank(self) -> Inputs:
        """The same numbers as one bank, where the gradients are lists."""
        return replace(self.flat, grads=self.bank, bank=None)

    @property
    def rows(self) -> list[Tensor]:
        """Flat gradients: views of a bank, and for lists the copies that everyday code makes."""
        if isinstance(self.grads, Tensor):
            return list(self.grads.unbind(0))
        return [baselines.flatten(row) for row in self.grads]

    @property
    def matrix(self) -> Tensor:
        """The gradients as one matrix: lists are copied into a bank that is kept between calls, the fastest way."""
        if isinstance(self.grads, Tensor):
            return self.grads
        assert self.bank is not None
        for row, out in zip(self.grads, self.bank, strict=True):
            torch.cat([x.reshape(-1) for x in row], out=out)
        return self.bank


def resnet18_shapes() -> list[tuple[int, ...]]:
    """Shapes of the 62 parameter tensors of ResNet-18 (1000 classes), 11,689,512 numbers in all."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    before = 64
    for width in (64, 128, 256, 512):
        for block in range(2):
            entering = before if block == 0 else width
            shapes += [(width, entering, 3, 3), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            if block == 0 and entering != width:
                shapes += [(width, entering, 1, 1), (width,), (width,)]
        before = width
    return [*shapes, (1000, 512), (1000,)]


def resnet50_shapes() -> list[tuple[int, ...]]:
    """Shapes of the 161 parameter tensors of ResNet-50 (1000 classes), 25,557,032 numbers in all."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    before = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            entering = before if block == 0 else 4 * width
            shapes += [(width, entering, 1, 1), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            shapes += [(4 * width, width, 1, 1), (4 * width,), (4 * width,)]
            if block == 0:
                shapes += [(4 * width, entering, 1, 1), (4 * width,), (4 * width,)]
        before = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def transformer_shapes() -> list[tuple[int, ...]]:
    """Shapes of the 146 tensors of a decoder as Llama 3.2 1B is: 16 layers, tied embeddings, 1,235,814,400 numbers."""
    width, hidden, keys = 2048, 8192, 512
    layer = [(width, width), (keys, width), (keys, width), (width, width)]
    layer += [(hidden, width), (hidden, width), (width, hidden)]
    return [(128_256, width), *[*layer, (width,), (width,)] * 16, (width,)]


@cache
def _noise(device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn((1 << 24) + 1, generator=generator, device=device)


def _window(noise: Tensor, start: int, length: int) -> Tensor:
    over = start + length - noise.numel()
    return noise[start : start + length] if over <= 0 else torch.cat((noise[start:], noise[:over]))


def random_bank(num_tasks: int, num_params: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """Random gradients that conflict and differ in norm: shifted noise, plus one direction with either sign."""
    noise = _noise(device)
    generator = torch.Generator().manual_seed(seed)
    shifts = torch.randint(noise.numel(), (num_tasks + 1,), generator=generator).tolist()
    scales = (0.5 + torch.rand(num_tasks, generator=generator)).tolist()
    bank = torch.empty(num_tasks, num_params, dtype=dtype, device=device)
    # one period of the noise at a time: drawing a large bank number by number takes minutes
    for start in range(0, num_params, noise.numel()):
        length = min(noise.numel(), num_params - start)
        common = _window(noise, shifts[-1], length)
        for t, scale in enumerate(scales):
            sign = 0.4 if t % 2 else -0.4
            bank[t, start : start + length] = _window(noise, shifts[t], length).add(common, alpha=sign).mul_(scale)
    return bank


# --- the check: the timed inputs themselves against float64, a block of columns at a time


def _blocks(grads: Tensor | list[list[Tensor]], width: int = 1 << 18) -> Iterator[Tensor]:
    """Blocks of columns, `[T, n]` float64."""
    if isinstance(grads, Tensor):
        for block in grads.split(width, 1):
            yield block.double()
    else:
        for rows in zip(*grads, strict=True):
            yield torch.stack([x.reshape(-1) for x in rows]).double()


def _result_blocks(result: Any, grads: Tensor | list[list[Tensor]], width: int = 1 << 18) -> Iterator[Tensor]:
    """The same blocks of a result, `[n]` or `[K, n]`."""
    if isinstance(grads, Tensor):
        yield from result.split(width, -1)
    elif isinstance(result[0], Tensor):
        yield from (x.reshape(-1) for x in result)
    else:
        yield from (torch.stack([x.reshape(-1) for x in rows]) for rows in zip(*result, strict=True))


def oracle_gram(grads: Tensor | list[list[Tensor]]) -> Tensor:
    total: Any = 0
    for block in _blocks(grads):
        total = total + reference.gram(block)
    return total


def check_gram(result: Tensor, inputs: Inputs) -> Check:
    expected = oracle_gram(inputs.grads)
    norms = expected.diagonal().sqrt()
    error = ((result.double() - expected).abs() / (norms[:, None] * norms)).max()
    # the products of bfloat16 numbers are exact in float32, so the dtype of the gradients does not matter
    return Check(float(error), TOLERANCE[torch.float32], "float64 oracle on the timed inputs")


def check_combined(result: Any, weights: Tensor, inputs: Inputs, dtype: torch.dtype) -> Check:
    worst = scale = torch.zeros((), dtype=torch.float64, device=weights.device)
    for block, got in zip(_blocks(inputs.grads), _result_blocks(result, inputs.grads), strict=True):
        expected = reference.combine(weights.double(), block)
        # torch.maximum hands NaN on
        worst = torch.maximum(worst, (got.double() - expected).abs().max())
        scale = torch.maximum(scale, expected.abs().max())
    return Check(float(worst / scale), TOLERANCE[dtype], "float64 oracle on the timed inputs")
