"""GradDrop: in each column the elements of one sign, drawn (Chen et al. 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fastmtl.core.gradient_rows import GradientRows
from fastmtl.methods.base import Method, Seen, as_it_is
from fastmtl.methods.held import as_lists, device_of
from fastmtl.ops.gradients.graddrop import advance, graddrop_into
from fastmtl.ops.gradients.gram import gram_rows
from fastmtl.ops.gradients.order import Randomness, check_generator, shared_source, traceable_source


class GradDrop(Method):
    """The sum of the gradients, in each element of the parameters over the tasks whose gradients have one sign there.

    The sign is drawn: the positive elements are kept with the probability that is their share of the sum of absolute
    values, else the negative ones. Where all agree, nothing is dropped.

    Args:
        leak: T numbers from 0 to 1, in the order of the tasks: what part of a task's gradient passes where it is
            dropped. None: nothing.
        generator: source of the random numbers, as for `fastmtl.ops.random_order`: a `torch.Generator`, or a state made
            by `fastmtl.ops.order_state`; None: torch's default CPU generator. Equal seeds draw the same on every
            device.

    Raises:
        TypeError: `generator` is no generator or state, `leak` no tensor or sequence of numbers.
        ValueError: a leak outside 0 to 1; (when called) one of another number of tasks.

    `needs` the gradients. The paper's monotone function of the share (`f` of TorchJD) is the identity, its default. The
    Gram matrix that a `Surgery` shows takes a read of the gradients of its own. With a mean over ranks all draw the
    same; where each has a part of the columns, so do equal places of their parts.

    Source: Chen et al. 2020, *Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout*,
    Algorithm 1.

    Example:
        >>> GradDrop()(torch.tensor([[1.0, 1.0, -1.0], [2.0, 0.0, -4.0]]))
        tensor([ 3.,  1., -5.])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})

    def __init__(self, leak: Tensor | Sequence[float] | None = None, *, generator: Randomness | None = None) -> None:
        check_generator(generator)
        self.leak = None if leak is None else _read_leak(leak)
        self.generator = generator

    def update(self, rows: GradientRows, out: Sequence[Tensor], seen: Seen) -> tuple[Tensor, None]:
        kept = self.generator.device if isinstance(self.generator, Tensor) else None
        device = device_of(rows, seen, kept)
        leak = self.leak
        if leak is not None:
            if len(leak) != rows.num_tasks:
                raise ValueError(f"leak: expected {rows.num_tasks} numbers, one for each task, got {len(leak)}")
            if leak.device != device:
                # kept there: a copy at each call would wait for the device
                leak = self.leak = leak.to(device)
        gram = seen.total(gram_rows(as_lists(rows)))
        own = traceable_source(self.generator, device)
        source = shared_source(own, device, None if seen.first is as_it_is else seen.first)
        graddrop_into(rows, source, leak, seen.mask(device), out)
        if source is not own:
            advance(own)
        return gram, None

    def __repr__(self) -> str:
        return "GradDrop()" if self.leak is None else f"GradDrop(leak={self.leak.tolist()})"


def _read_leak(leak: Tensor | Sequence[float]) -> Tensor:
    if not isinstance(leak, (Tensor, Sequence)) or isinstance(leak, (str, bytes)):
        raise TypeError(f"leak: expected T numbers, got {type(leak).__name__}")
    found = torch.as_tensor(leak, dtype=torch.float64).detach().clone()
    if found.dim() != 1 or found.numel() == 0:
        raise ValueError(f"leak: expected T numbers, got shape {list(found.shape)}")
    if not bool(((found >= 0) & (found <= 1)).all()):
        raise ValueError(f"leak: expected numbers from 0 to 1, got {found.tolist()}")
    return found
