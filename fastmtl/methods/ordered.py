"""What methods that visit tasks in an order have in common: an order that is given, or the source of random ones."""

from __future__ import annotations

from torch import Tensor

from fastmtl.methods.base import Method
from fastmtl.ops.gradients.order import Randomness, check_generator, check_no_generator


class OrderedMethod(Method):
    """A method with an `order`, or a `generator` of fresh ones; both may be set later, and are checked then."""

    def __init__(self, order: Tensor | None, generator: Randomness | None) -> None:
        self._order: Tensor | None = None
        self._generator: Randomness | None = None
        self.generator = generator
        self.order = order

    @property
    def order(self) -> Tensor | None:
        """`[T, K]` visiting order, or None: a fresh one at each call."""
        return self._order

    @order.setter
    def order(self, order: Tensor | None) -> None:
        if order is not None:
            if not isinstance(order, Tensor):
                raise TypeError(f"order: expected a tensor or None, got {type(order).__name__}")
            check_no_generator(self._generator)
        self._order = order

    @property
    def generator(self) -> Randomness | None:
        """Source of the random order."""
        return self._generator

    @generator.setter
    def generator(self, generator: Randomness | None) -> None:
        check_generator(generator)
        if self._order is not None:
            check_no_generator(generator)
        self._generator = generator
