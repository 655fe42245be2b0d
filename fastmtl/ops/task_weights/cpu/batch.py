"""A batch on the CPU cut by task: which samples see which weight, and how they get to a convolution and back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmtl.core.schemas import define_kernel
from fastmtl.core.task_weights import SortedBatch, TaskWeights
from fastmtl.core.tensors import is_channels_last, memory_format
from fastmtl.tuning.search import current

_copy_rows = define_kernel(
    "_copy_rows(Tensor source, Tensor? source_rows, Tensor(a!) target, Tensor? target_rows) -> ()"
)


class Segment(NamedTuple):
    """Samples that see one weight.

    `task`: whose `W + s_t Delta_t`; None: W itself. `samples`: ascending positions in the batch.
    """

    task: int | None
    samples: np.ndarray

    @property
    def num_runs(self) -> int:
        """How many groups of neighbours the samples lie in."""
        s = self.samples
        if s[-1] - s[0] + 1 == len(s):
            return 1
        return int(np.count_nonzero(s[1:] - s[:-1] != 1)) + 1

    @property
    def runs(self) -> list[tuple[int, int]]:
        """Neighbours in the batch, as (first, end)."""
        s = self.samples
        if s[-1] - s[0] + 1 == len(s):
            return [(int(s[0]), int(s[-1]) + 1)]
        last = np.append(np.flatnonzero(s[1:] - s[:-1] != 1), len(s) - 1)
        ends = s[last] + 1
        return list(zip(s[np.append(0, last[:-1] + 1)].tolist(), ends.tolist(), strict=True))


class Batch:
    """A batch cut by task; everything here is on the host."""

    def __init__(self, weights: TaskWeights, batch: SortedBatch) -> None:
        self.num_tasks = batch.num_tasks
        self.deltas = weights.by_task(self.num_tasks)
        self.gates = None if weights.gate is None else weights.gate.detach().tolist()
        positions, bounds = batch.order.numpy(), batch.offsets.tolist()
        self.present = [t for t in range(self.num_tasks) if bounds[t + 1] > bounds[t]]
        self._samples = {t: positions[bounds[t] : bounds[t + 1]] for t in self.present}

    def samples(self, tasks: Sequence[int]) -> np.ndarray:
        """Of tasks that have some, in the order of the batch."""
        parts = [self._samples[t] for t in tasks]
        return parts[0] if len(parts) == 1 else np.sort(np.concatenate(parts))

    def gate(self, task: int) -> float:
        return 1.0 if self.gates is None else self.gates[task]

    def is_open(self, task: int) -> bool:
        """Whether the task sees its Delta. A gate that is NaN is open."""
        return self.deltas[task] is not None and self.gate(task) != 0

    @functools.cached_property
    def segments(self) -> Sequence[Segment]:
        """One per task that sees its Delta, and one for all others."""
        found = [Segment(t, self.samples([t])) for t in self.present if self.is_open(t)]
        shared = [t for t in self.present if not self.is_open(t)]
        if shared:
            found.append(Segment(None, self.samples(shared)))
        return found


class Cut(NamedTuple):
    """A part of a segment that is one call: a slice of the batch, or samples to gather."""

    first: int
    end: int
    samples: Tensor | None  # positions, if they are to be gathered


def call_bytes(weight_bytes: int) -> int:
    """Bytes that could be copied in the time that one more call costs before it multiplies: what torch and oneDNN
    prepare, and passes over the weight, which oneDNN reorders and reads."""
    table = current()
    return table.call_bytes + int(table.weight_passes * weight_bytes)


def cuts(segment: Segment, sample_bytes: int, weight_bytes: int) -> Iterator[Cut]:
    """One cut if the samples are neighbours or cheap to copy, else one per run of neighbours."""
    runs = segment.num_runs
    copied = 2 * sample_bytes * len(segment.samples)
    if runs > 1 and (runs - 1) * call_bytes(weight_bytes) > copied:
        yield Cut(0, 0, torch.from_numpy(segment.samples))
        return
    for first, end in segment.runs:
        yield Cut(first, end, None)


class Samples:
    """The samples of a tensor as rows of memory, each without gaps, all in NCHW or all in channels_last order.

    `x`: the tensor, copied only if its samples are not so, or not in the order of `like`. `pixelwise`: the convolution
    sees each pixel alone, so that the samples of a call may be one long picture: oneDNN is up to four times slower on
    many small ones.
    """

    def __init__(self, x: Tensor, like: Tensor | None = None, *, pixelwise: bool = False) -> None:
        x = x.detach()
        last = self.channels_last = is_channels_last(x if like is None else like)
        n, c, h, w = x.shape
        self.inner = (1, w * c, c) if last else (h * w, w, 1)
        if not self._dense(x):
            x = x.contiguous(memory_format=memory_format(x if like is None else like))
        self.width = c * h * w
        # both sides of a backward call must be long pictures, or none
        self.joined = pixelwise and last
        if self.joined and n > 1 and x.stride(0) != self.width:
            x = x.contiguous(memory_format=torch.channels_last)
        self.x = x
        self.stride, self.offset = x.stride(0) if n > 1 else self.width, x.storage_offset()
        self.rows = x.as_strided((n, self.width), (self.stride, 1))

    def _dense(self, x: Tensor) -> bool:
        (_, *sizes), (_, *strides) = x.shape, x.stride()
        if tuple(strides) == self.inner:
            return True
        return all(size == 1 or stride == own for size, stride, own in zip(sizes, strides, self.inner, strict=True))

    @property
    def sample_bytes(self) -> int:
        return self.width * self.x.element_size()

    def take(self, cut: Cut) -> Tensor:
        """The samples of a cut, as pictures or as one long picture."""
        if cut.samples is None:
            rows, count, stride, offset = (
                self.x,
                cut.end - cut.first,
                self.stride,
                self.offset + cut.first * self.stride,
            )
        else:
            count, stride, offset = cut.samples.shape[0], self.width, 0
            rows = torch.empty(count, self.width, dtype=self.x.dtype)
            _copy_rows(self.rows, cut.samples, rows, None)
        _, c, h, w = self.x.shape
        if self.joined:
            length = count * h * w
            return rows.as_strided((1, c, 1, length), (length * c, 1, length * c, c), offset)
        return rows.as_strided((count, c, h, w), (stride if count > 1 else self.width, *self.inner), offset)

    def put(self, cut: Cut, result: Tensor) -> None:
        """What a call made of the samples of a cut, in any order of memory, into those of this tensor."""
        count = cut.end - cut.first if cut.samples is None else cut.samples.shape[0]
        if result.shape[0] == count and result.shape[1:] == self.x.shape[1:]:
            if cut.samples is None and not self.joined:
                self.take(cut).copy_(result)
                return
            if not self._dense(result):
                result = result.contiguous(memory_format=memory_format(self.x))
            stride = result.stride(0) if count > 1 else self.width
        else:
            # one long picture
            result, stride = result.contiguous(memory_format=torch.channels_last), self.width
        source = result.as_strided((count, self.width), (stride, 1))
        if cut.samples is None:
            _copy_rows(source, None, self.rows[cut.first : cut.end], None)
        else:
            _copy_rows(source, None, self.rows, cut.samples)

    def fill(self, cut: Cut, product: Callable[[Tensor], None]) -> None:
        """What `product` writes into the `[rows, C]` that it is given: the samples of a cut, in channels_last order.

        They are written where they lie if they are neighbours without gaps, else copied there.
        """
        _, c, h, w = self.x.shape
        count = cut.end - cut.first if cut.samples is None else cut.samples.shape[0]
        apart = cut.samples is not None or (count > 1 and self.rows.stride(0) != self.width)
        rows = torch.empty(count, self.width, dtype=self.x.dtype) if apart else self.rows[cut.first : cut.end]
        product(rows.as_strided((count * h * w, c), (c, 1)))
        if apart:
            into = self.rows if cut.samples is not None else self.rows[cut.first : cut.end]
            _copy_rows(rows, None, into, cut.samples)
