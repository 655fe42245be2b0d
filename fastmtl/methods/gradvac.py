"""GradVac: gradients turned towards the similarity that tasks had so far (Wang et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.methods.base import Seen
from fastmtl.methods.state import Field, StatefulMethod
from fastmtl.ops.gradients.gradvac import check_beta, check_update
from fastmtl.ops.gradients.order import Randomness, check_generator, random_order
from fastmtl.ops.gradients.pcgrad import REDUCTIONS, check_no_generator


class GradVac(StatefulMethod):
    """Each gradient is turned towards every task with which its cosine is below a target, in random order.

    The target of a pair of tasks is the running average of their cosines, 0 at first, so that the first step is
    PCGrad's. It is kept by the tasks' names. A task that is absent, or whose gradient is zero, has no cosine: its
    targets stay as they are. The weights do not depend on the scale of the gradients.

    Args:
        beta: what the newest cosine counts in a target, from 0 to 1.
        reduction: `"sum"` of the turned gradients (the paper) or their `"mean"` over the present tasks.
        update: `"always"`: every visit moves its target (the paper, TorchJD); `"triggered"`: only one that turns the
            gradient (LibMTL).
        order: `[T, K]` int32 or int64 visiting order on the device of the gradients: row i lists the tasks that i
            visits, in turn. None: a fresh random one at each call.
        generator: source of the random order, as for `fastmtl.ops.random_order`: a `torch.Generator`, or a state made
            by `fastmtl.ops.order_state`; None: torch's default CPU generator. It is no part of `state_dict()`.

    Raises:
        ValueError: a beta, a reduction or an update other than the above; an order together with a generator.
        TypeError: `beta` is no number, `order` no tensor, `generator` no generator or state.
        TypeError, ValueError: (when called) an order or a state that does not fit the gradients.

    Source: Wang, Tsvetkov, Firat, Cao 2021, *Gradient Vaccine: Investigating and Improving Multi-task Optimization in
    Massively Multilingual Models*, Algorithm 1, with all shared parameters as one group.

    Example:
        >>> m = torch.tensor([[1.0, -0.5], [-0.5, 1.0]])
        >>> method = GradVac(beta=0.5)
        >>> method.weights(m)
        tensor([1.5000, 1.5000], dtype=torch.float64)
        >>> method.state_dict()["targets"]
        tensor([[ 0.0000, -0.2500],
                [-0.2500,  0.0000]], dtype=torch.float64)
    """

    def __init__(
        self,
        beta: float = 0.01,
        reduction: str = "sum",
        *,
        update: str = "always",
        order: Tensor | None = None,
        generator: Randomness | None = None,
    ) -> None:
        super().__init__(targets=Field(2, 0.0))
        check_beta(beta)
        check_update(update)
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction: expected 'sum' or 'mean', got {reduction!r}")
        check_generator(generator)
        if order is not None:
            check_no_generator(generator)
            if not isinstance(order, Tensor):
                raise TypeError(f"order: expected a tensor or None, got {type(order).__name__}")
        self.beta = float(beta)
        self.reduction = reduction
        self.target_update = update
        self.order = order
        self.generator = generator

    def _weigh(self, gram: Tensor, seen: Seen, present: Tensor | None) -> Tensor:
        targets = self._state.read(seen.names, gram.device)["targets"]
        order = self.order
        if order is None:
            order = random_order(gram.shape[0], generator=self.generator, device=gram.device)
        c, targets = ops.gradvac_coefficients(gram, order, targets, self.beta, update=self.target_update)
        self._state.keep(seen.names, present, targets=targets)
        # an absent task has a zero column, which no row meets; its own row must not count
        w = (c if present is None else torch.where(present[:, None], c, 0.0)).sum(0)
        if self.reduction == "mean":
            w = w / (gram.shape[0] if present is None else present.sum())
        return w

    def _read(self, gram: Tensor, present: Tensor | None) -> Tensor:
        # in its own dtype, which says how far its entries are rounded
        return super()._read(gram, present).to(gram.dtype)

    def __repr__(self) -> str:
        return f"GradVac(beta={self.beta!r}, reduction={self.reduction!r}, update={self.target_update!r})"
