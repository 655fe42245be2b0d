"""How the functions of this folder make the rows of a parameter and hand them over, instead of one gradient."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor

from fastmtl.core.dispatch import unavailable
from fastmtl.core.tensors import as_real, is_channels_last
from fastmtl.ops.task_weights.cpu.memory import HUGE_BYTES

STACKED = -1

# process-wide: on a GPU the backward pass runs on autograd's threads
_plain_gradients = [False]


@contextlib.contextmanager
def plain_gradients() -> Iterator[None]:
    """Backward passes inside the block give every parameter its plain gradient, and no rows."""
    before, _plain_gradients[0] = _plain_gradients[0], True
    try:
        yield
    finally:
        _plain_gradients[0] = before


def in_plain_pass() -> bool:
    """Whether this is a backward pass for plain gradients."""
    return _plain_gradients[0]


def unseen(compute: Callable[..., Any]) -> Any:
    """The backward of a Function, `compute(ctx, g, *saved)`, whose calls no torch function mode sees.

    What unpacks the saved tensors is still seen: recomputation under checkpointing.
    """

    def backward(ctx: Any, g: Tensor) -> Any:
        saved = ctx.saved_tensors
        if torch.compiler.is_compiling():
            return compute(ctx, g, *saved)
        with torch._C.DisableTorchFunction():
            return compute(ctx, g, *saved)

    return staticmethod(backward)


def by_position(x: Tensor, n: int, last: int = 1) -> Tensor:
    """`[n, r, ...]` of a tensor whose dimensions but the `last` hold n positions, r times each one after another."""
    before = x.dim() - last
    # torch infers no dimension where there are no elements
    times = -1 if x.numel() else math.prod(x.shape[:before]) // max(n, 1)
    return x.reshape(n, times, *x.shape[before:])


def rows_like(param: Tensor, num_rows: int) -> Tensor:
    """Memory for the rows of a parameter, each in its memory order."""
    shape = (num_rows, *param.shape)
    if is_channels_last(param) and not param.is_contiguous():
        a, b, c, d = param.shape
        rows = torch.empty((num_rows, a, c, d, b), dtype=param.dtype, device=param.device).permute(0, 1, 4, 2, 3)
    else:
        rows = torch.empty(shape, dtype=param.dtype, device=param.device)
    large = rows.device.type == "cpu" and rows.nbytes >= HUGE_BYTES and not torch.compiler.is_compiling()
    if large and unavailable("cpu", "cpu") is None:
        torch.ops.fastmtl._advise_huge_pages.default(rows)
    return rows


def sum_by_row(values: Tensor, ids: Tensor, num_rows: int, dtype: torch.dtype) -> Tensor:
    """`[n, ...] -> [R, ...]`: sums of the rows of equal id, in at least float32, in a fixed order."""
    if values.is_complex():
        real = sum_by_row(as_real(values), ids, num_rows, dtype.to_real())
        return torch.view_as_complex(real) if dtype.is_complex else real[..., 0].contiguous()
    promoted = torch.promote_types(values.dtype, torch.float32)
    if not values.numel():
        return torch.zeros((num_rows, *values.shape[1:]), dtype=dtype, device=values.device)
    flat = values.reshape(values.shape[0], -1).to(promoted)
    # the gradient of a table that the ids look up: sorted first on a GPU, so the same bits come twice
    total = torch.ops.aten.embedding_dense_backward(flat, ids, num_rows, -1, False)
    return total.to(dtype).reshape(num_rows, *values.shape[1:])


def give_rows(rows: Tensor | None, form: int) -> tuple[Tensor | None, ...]:
    """The rows in the form of the targets."""
    if form == STACKED:
        return (rows,)
    if rows is None:
        return (None,) * form
    return tuple(rows.unbind(0))[:form]


# the attribute of a stand-in that takes rows as they are made, one tensor for each task, past autograd
RECEIVER = "_fastmtl_receiver"


class Receiver(Protocol):
    """What takes the rows of one parameter."""

    def __call__(self, rows: Tensor) -> None:
        """Takes what autograd has summed up; there is no more to come."""
        ...

    def takes_parts(self) -> bool:
        """Whether rows can be handed over now, past autograd."""
        ...

    def parts(self, rows: Tensor | list[Tensor | None]) -> None:
        """Takes the rows of one use of the parameter: `[R, ...]`, or one tensor for each row (None: zero)."""
        ...


def receiver_of(form: int, targets: Sequence[Tensor]) -> Receiver | None:
    """What takes the parts of the first target, if that is a stand-in itself."""
    if form != STACKED or torch.compiler.is_compiling():
        return None
    return getattr(targets[0], RECEIVER, None)


def takes_parts(receiver: Receiver | None) -> TypeGuard[Receiver]:
    return receiver is not None and receiver.takes_parts()


def deliver(receiver: Receiver | None, rows: Tensor) -> Tensor | None:
    """Hands the rows over at once, if that can be: through autograd they would wait until the backward pass ends."""
    if not takes_parts(receiver):
        return rows
    receiver.parts(rows)
    return None


def wants(form: int, needs: bool) -> tuple[bool, bool]:
    """Whether the rows of a parameter, and whether its plain gradient."""
    if form == 0:
        return False, needs
    return (False, needs) if _plain_gradients[0] else (True, False)
