"""GradVac: gradients turned towards the similarity that tasks had so far (Wang et al. 2021)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmtl.methods.arguments import Argument, choice, number
from fastmtl.methods.base import Seen
from fastmtl.methods.ordered import OrderedMethod
from fastmtl.methods.state import Field, FusedMethod
from fastmtl.ops.gradients.gradvac import UPDATES, gradvac_step_op
from fastmtl.ops.gradients.order import Draw, Randomness, traceable_source
from fastmtl.ops.gradients.pcgrad import REDUCTIONS


class GradVac(FusedMethod, OrderedMethod):
    """Each gradient is turned towards every task with which its cosine is below a target, in random order.

    The target of a pair of tasks is the running average of their cosines, 0 at first, so that the first step is
    PCGrad's. It is kept by the tasks' names. A task that is absent, or whose gradient is zero, has no cosine: its
    targets stay as they are. The weights do not depend on the scale of the gradients.

    Args:
        beta: what the newest cosine counts in a target, from 0 to 1.
        reduction: `"sum"` of the turned gradients (the paper) or their `"mean"` over the present tasks.
        update: `"always"`: every visit moves its target (the paper, TorchJD); `"triggered"`: only one that turns the
            gradient (LibMTL). As an attribute it is `target_update`: `update` is a method of every `Method`.
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

    beta = Argument(number(least=0.0, most=1.0))
    reduction = Argument(choice(*REDUCTIONS))
    target_update = Argument(choice(*UPDATES), "update")

    def __init__(
        self,
        beta: float = 0.01,
        reduction: str = "sum",
        *,
        update: str = "always",
        order: Tensor | None = None,
        generator: Randomness | None = None,
    ) -> None:
        OrderedMethod.__init__(self, order, generator)
        FusedMethod.__init__(self, targets=Field(2, 0.0))
        self.beta, self.reduction, self.target_update = beta, reduction, update

    def _weigh(self, gram: Tensor, seen: Seen, present: Tensor | None) -> Tensor:
        source = Draw(0, None) if self.order is not None else traceable_source(self.generator, gram.device)
        (targets,) = self._state.lend(seen.names, gram.device)
        w = gradvac_step_op(gram, targets, self.order, *source, present, self.beta, self.target_update, self.reduction)
        self._state.take_back(seen.names, [targets])
        # a single task is compared with nothing
        return torch.where(gram[0].isfinite(), w, torch.nan) if len(gram) == 1 else w

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "update":
            raise AttributeError(
                "GradVac: update is a method; the argument of that name is the attribute target_update"
            )
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        return f"GradVac(beta={self.beta!r}, reduction={self.reduction!r}, update={self.target_update!r})"
