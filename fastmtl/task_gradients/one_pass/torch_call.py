"""`TorchCall`: one call of a torch function, as the rules and the layers take it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastmtl.task_gradients.one_pass.sample_axis import Axes, PerSample, SampleAxis
from fastmtl.task_gradients.one_pass.tensors import nested


class TorchCall(NamedTuple):
    """A call of a torch function, and what is known of the tensors in it.

    Attributes:
        name: of the function, as `torch_names.name_of` gives it.
        func: the function.
        args, kwargs: what it is given.
        axis_of: tells what is known of a tensor among the arguments.
        out: what it returned; None: it has not run yet.
    """

    name: str
    func: Callable[..., Any]
    args: Sequence[Any]
    kwargs: dict[str, Any]
    axis_of: Callable[[Tensor], SampleAxis]
    out: Any = None

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """The argument that can be given by position or by name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def returned(self, out: Any) -> TorchCall:
        """The call after it has run."""
        return TorchCall(self.name, self.func, self.args, self.kwargs, self.axis_of, out)

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return nested((self.args, self.kwargs))

    def results(self) -> list[Tensor]:
        """The tensors among its results, or the one that it has written into."""
        return [self.args[0]] if self.name == "setitem" else nested(self.out)

    def first(self) -> Tensor:
        """The first argument, or the first tensor among those given by name."""
        if self.args and isinstance(self.args[0], Tensor):
            return self.args[0]
        return self.tensors()[0]

    def factors(self) -> tuple[Tensor, Tensor]:
        """Of a product, left and right."""
        args, kwargs = self.args, self.kwargs
        a = args[0] if args else kwargs["input"]
        names = ("other", "mat2", "vec", "vec2", "tensor")
        b = args[1] if len(args) > 1 else next(kwargs[k] for k in names if k in kwargs)
        return (b, a) if self.name == "rmatmul" else (a, b)

    def carries_samples(self, x: Tensor) -> bool:
        return isinstance(self.axis_of(x), PerSample)


# what is known of the result of a call, or of the tensors in it
Rule: TypeAlias = Callable[[TorchCall], Axes]


def dims_of(x: Tensor, value: Any) -> list[int]:
    """Dimensions as given, from 0 on; None or (): all."""
    n = x.dim()
    if value is None:
        return list(range(n))
    if isinstance(value, int):
        return [value + n if value < 0 else value]
    found = [v + n if v < 0 else v for v in value]
    return found or list(range(n))


def sizes_of(values: Sequence[Any]) -> list[int]:
    """Sizes given one by one, or as one list."""
    if len(values) == 1 and isinstance(values[0], (tuple, list, torch.Size)):
        return list(values[0])
    return list(values)
