"""GradDrop: in each column the elements of one sign, drawn (Chen et al. 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from fastmtl.core.gradient_rows import GradientRows
from fastmtl.methods.arguments import TaskNumbers, TaskNumbersArgument
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
        leak: what part of a task's gradient passes where it is dropped: T numbers from 0 to 1 in the order of the
            tasks, or a mapping from names of tasks, 0 for those that it lacks. None: nothing.
        generator: source of the random numbers, as for `fastmtl.ops.random_order`: a `torch.Generator`, or a state made
            by `fastmtl.ops.order_state`; None: torch's default CPU generator. Equal seeds draw the same on every
            device.

    Raises:
        TypeError: `generator` is no generator or state, `leak` no numbers.
        ValueError: a leak outside 0 to 1; (when called) one of other tasks.

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

    def __init__(self, leak: TaskNumbersArgument | None = None, *, generator: Randomness | None = None) -> None:
        check_generator(generator)
        self.leak = leak
        self.generator = generator

    @property
    def leak(self) -> Tensor | dict[str, float] | None:
        """`[T]` float64, a dict from names of tasks, or None."""
        return None if self._leak is None else self._leak.value

    @leak.setter
    def leak(self, leak: TaskNumbersArgument | None) -> None:
        self._leak = None if leak is None else TaskNumbers(leak, "leak", rest=0.0, most=1.0)

    @property
    def by_group(self) -> bool:  # type: ignore[override]
        """Whether it goes without names of tasks, which are others in each group."""
        return self._leak is None or not self._leak.by_name

    def update(self, rows: GradientRows, out: Sequence[Tensor], seen: Seen) -> tuple[Tensor, None]:
        self._check_handed(seen, rows.num_tasks, "in the gradients")
        kept = self.generator.device if isinstance(self.generator, Tensor) else None
        device = device_of(rows, seen, kept)
        leak = None if self._leak is None else self._leak.of(seen.names, device)
        gram = seen.total(gram_rows(as_lists(rows)))
        own = traceable_source(self.generator, device)
        source = shared_source(own, device, None if seen.first is as_it_is else seen.first)
        graddrop_into(rows, source, leak, seen.mask(device), out)
        if source is not own:
            advance(own)
        return gram, None

    def __repr__(self) -> str:
        return "GradDrop()" if self._leak is None else f"GradDrop(leak={self._leak!r})"
