"""PCGrad: project conflicting gradients (Yu et al. 2020)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.core.gradient_rows import GradientRows
from fastmtl.methods.arguments import Argument, choice, read_flag
from fastmtl.methods.base import Seen
from fastmtl.methods.ordered import OrderedMethod
from fastmtl.ops.gradients.arguments import Grads, check_gram_values, check_order
from fastmtl.ops.gradients.order import (
    Draw,
    Randomness,
    draw_source,
    is_plain,
    random_order,
    traceable_source,
)
from fastmtl.ops.gradients.pcgrad import REDUCTIONS, pcgrad_rows_into, pcgrad_weights_groups, weights_op


class PCGrad(OrderedMethod):
    """Each gradient is projected onto the normal plane of every task that it conflicts with, in random order.

    Args:
        reduction: `"sum"` of the projected gradients (the paper) or their `"mean"` over the present tasks (the
            older PyTorch port).
        order: `[T, K]` int32 or int64 visiting order on the device of the gradients: row i lists the tasks that
            i visits, in turn. None: a fresh random one at each call.
        generator: source of the random order, as for `fastmtl.ops.random_order`: a `torch.Generator`, or a state made
            by `fastmtl.ops.order_state`; None: torch's default CPU generator.
        include_self: visit j = i as some ports do, instead of skipping it as the paper does.

    Raises:
        ValueError: an unknown reduction; an order together with a generator.
        TypeError: `order` is no tensor, `generator` no generator or state, `include_self` no bool.
        TypeError, ValueError: (when called) an order or a state that does not fit the gradients.

    Source: Yu et al. 2020, *Gradient Surgery for Multi-Task Learning*, Algorithm 1.

    Example:
        >>> m = torch.tensor([[1.0, -0.5], [-0.5, 1.0]])
        >>> PCGrad().weights(m)
        tensor([1.5000, 1.5000], dtype=torch.float64)
    """

    reduction = Argument(choice(*REDUCTIONS))
    include_self = Argument(read_flag)

    def __init__(
        self,
        reduction: str = "sum",
        *,
        order: Tensor | None = None,
        generator: Randomness | None = None,
        include_self: bool = False,
    ) -> None:
        super().__init__(order, generator)
        self.reduction, self.include_self = reduction, include_self

    def __call__(self, grads: Grads) -> Tensor | list[Tensor | None]:
        return ops.pcgrad(
            grads, self.order, reduction=self.reduction, generator=self.generator, include_self=self.include_self
        )

    def _weights(self, gram: Tensor, present: Tensor | None) -> Tensor:
        if present is None and not (gram.requires_grad and torch.is_grad_enabled()):
            source = Draw(0, None) if self.order is not None else traceable_source(self.generator, gram.device)
            return _or_nan(weights_op(gram, self.order, *source, self.include_self, self.reduction), gram)
        order = self.order
        if order is None:
            order = ops.random_order(gram.shape[0], generator=self.generator, device=gram.device)
        c = ops.pcgrad_coefficients(gram, order, include_self=self.include_self)
        # an absent task has a zero column, which no row is projected on; its own row must not count
        w = (c if present is None else torch.where(present[:, None], c, 0.0)).sum(0)
        if self.reduction == "mean":
            w = w / (gram.shape[0] if present is None else present.sum())
        return w if present is None else torch.where(gram.isfinite().all(), w, torch.nan)

    def weigh_groups(self, grams: Tensor, seen: Sequence[Seen]) -> Tensor:
        """As of `Method`, in one call, with an order for each group: those of so many calls from the same `order_state`
        (of another source the first is that of one call)."""
        present, own = seen[0].present, type(self)
        if isinstance(present, Tensor) or (own.weigh, own.weights, own._weights) != _WEIGHTS:
            return super().weigh_groups(grams, seen)
        for m, x in zip(grams.unbind(0), seen, strict=True):
            self._check_seen(m, x)
            check_gram_values(m, x.mask(m.device))
        source, mask = Draw(0, None), seen[0].mask(grams.device)
        if mask is not None:
            grams = torch.where(mask[:, None] & mask, grams, 0.0)
        if self.order is None:
            source = draw_source(self.generator, grams.device)
        else:
            check_order(self.order, grams.shape[1], grams.device)
        mean = self.reduction == "mean"
        return pcgrad_weights_groups(
            grams, self.order, source, mean=mean, include_self=self.include_self, present=present
        )

    def update(self, rows: GradientRows, out: Sequence[Tensor], seen: Seen) -> tuple[Tensor, Tensor]:
        """As of `Method`, in two launches on a GPU. The host must know which tasks are present."""
        assert not isinstance(seen.present, Tensor)
        order, source = self.order, Draw(0, None)
        device = rows.tensors[0].device
        if order is not None:
            check_order(order, rows.num_tasks, device)
        elif is_plain(rows.tensors):
            source = draw_source(self.generator, device)
        else:  # the kernel may be called several times, for the parts of a tensor
            order = random_order(rows.num_tasks, generator=self.generator, device=device)
        mean = self.reduction == "mean"
        return pcgrad_rows_into(
            rows, order, source, out, mean=mean, include_self=self.include_self, present=seen.present
        )

    def __repr__(self) -> str:
        return f"PCGrad({self.reduction!r}{', include_self=True' if self.include_self else ''})"


def _or_nan(weights: Tensor, gram: Tensor) -> Tensor:
    """NaN where a single task, which nothing is compared with, has a gradient that is not finite."""
    return torch.where(gram[0].isfinite(), weights, torch.nan) if len(gram) == 1 else weights


# how this class has its weights; one derived from it may have its own
_WEIGHTS = (PCGrad.weigh, PCGrad.weights, PCGrad._weights)
