"""The two ends of the graph of a batch: where the rows of a parameter arrive, and where samples flow into a loss."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.task_gradients.one_pass.autograd.rows import in_plain_pass


class CollectRows(torch.autograd.Function):
    """The stand-ins of parameters for their rows, `[R, ...]` without memory: what arrives there goes to `receivers`.

    One node for all: the backward pass runs the nodes that were made first last, and so has no use for several.
    """

    @staticmethod
    def forward(ctx, token, num_rows, receivers, *params):
        ctx.receivers = receivers
        ctx.set_materialize_grads(False)  # no zeros where all rows went to a receiver by parts
        return tuple(p.expand(num_rows, *p.shape) for p in params)

    @staticmethod
    def backward(ctx, *gradients):
        with torch._C.DisableTorchFunction():
            for g, receiver in zip(gradients, ctx.receivers, strict=True):
                if g is not None:
                    receiver(g)
        return (None,) * (3 + len(gradients))


class Place:
    """Where samples flow together into a loss: keeps the cotangent that arrived there."""

    def __init__(self) -> None:
        self.cotangent: Tensor | None = None


class Boundary(torch.autograd.Function):
    """Nothing, but a place in the graph.

    In a backward pass from such places, what comes from one behind it ends here: it is in the cotangent that this place
    has kept, from which that pass begins, too.
    """

    @staticmethod
    def forward(ctx, x, place):
        ctx.place = place
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        if in_plain_pass():
            return None, None
        ctx.place.cotangent = g if ctx.place.cotangent is None else ctx.place.cotangent + g
        return g, None
