"""CR-MOGM: a running average of a method's weights (Zhou et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmtl.methods.arguments import Argument, check_mapping, number
from fastmtl.methods.base import Method, Seen, Weighting, check_inner_state, needs_of, seen_by_position, weights_of
from fastmtl.methods.every import Every
from fastmtl.methods.gram_method import GramMethod
from fastmtl.methods.names import get
from fastmtl.methods.state import Field, NamedState
from fastmtl.ops.gradients.arguments import check_gram, check_present
from fastmtl.ops.gradients.method_step import method_step_op


class CRMOGM(Method):
    """A running average of the weights that another method gives: `momentum` times the last one, plus the rest times
    the new weights. So weights depend less on the noise of the batch whose gradients they weigh.

    Args:
        method: whose weights: a `Method`, the name of one, or a callable `[T, T] -> [T]`.
        momentum: what the average keeps at each call, from 0 (the method as it is) to below 1. The paper lets it grow
            towards 1 as the learning rate falls: set the attribute.

    Raises:
        TypeError: `method` is no method, or one that makes its update of the gradients themselves; `momentum` is no
            number.
        ValueError: `momentum` out of range.

    `needs` what the method needs. State: the average, by task name, and the method's own. A task's first weight is
    taken as it is. The average of an absent task stays what it was, and its weight is 0; those of the others are not
    scaled up for it. A step with weights that are not finite leaves the average as it was.

    Source: Zhou et al. 2022, *On the Convergence of Stochastic Multi-Objective Gradient Manipulation and Beyond*, the
    algorithm CR-MOGM.

    Example:
        >>> method = CRMOGM(MGDA(), momentum=0.5)
        >>> method.weights(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor([0.5000, 0.5000], dtype=torch.float64)
        >>> method.weights(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        tensor([0.3500, 0.6500], dtype=torch.float64)
    """

    momentum = Argument(number(least=0.0, below=1.0))

    def __init__(self, method: str | Weighting, momentum: float = 0.9) -> None:
        self.method = method
        self.momentum = momentum
        self._state = NamedState(average=Field(1, math.nan))

    @property
    def method(self) -> Weighting:
        """Whose weights are averaged. One that is set later goes on from the average there is."""
        return self._method

    @method.setter
    def method(self, method: str | Weighting) -> None:
        method = get(method)
        if isinstance(method, Every):
            raise TypeError(
                "method: expected one that is asked at every step, got an Every: write Every(CRMOGM(...), k)"
            )
        if "gradients" in needs_of(method):
            raise TypeError(
                f"method: expected one with weights, got {method!r}, which makes its update of the gradients"
            )
        self._method, self.needs = method, needs_of(method)  # type: ignore[misc]

    @property
    def by_group(self) -> bool:  # type: ignore[override]
        """As of the method."""
        return not isinstance(self.method, Method) or self.method.by_group

    def weights(self, gram: Tensor, *, present: Tensor | None = None) -> Tensor:
        check_gram(gram)
        if present is not None:
            check_present(present, gram)
        if self.needs:
            raise self._needs_more()
        return self.weigh(gram, seen_by_position(gram.shape[0], present))

    def weigh(self, gram: Tensor, seen: Seen) -> Tensor:
        self._check_seen(gram, seen)
        present, method = seen.mask(gram.device), self.method
        (average,) = self._state.lend(seen.names, gram.device)
        with torch.no_grad():
            if isinstance(method, GramMethod) and method.is_the_op:
                w = method.averaged_weights(gram.detach(), average, self.momentum, present, seen.names)  # one launch
            else:
                new = weights_of(method, gram, seen)
                w = method_step_op(
                    gram.detach(),
                    "given",
                    [],
                    average=average,
                    momentum=self.momentum,
                    present=present,
                    preferences=new,
                )
        self._state.take_back(seen.names, [average])
        return w

    def state_dict(self) -> dict[str, Any]:
        """The average (`"average"`) and the state of the method (`"method"`)."""
        inner = self.method.state_dict() if isinstance(self.method, Method) else {}
        return {"average": self._state.state_dict(), "method": inner}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned.

        Raises:
            TypeError, ValueError: not the state of such a method. Nothing has changed then.
        """
        self.check_state(state)
        if isinstance(self.method, Method):
            self.method.load_state_dict(state["method"])
        self._state.load_state_dict(state["average"], "CRMOGM")

    def check_state(self, state: Mapping[str, Any]) -> None:
        check_mapping(state, "state", ["average", "method"], "CRMOGM")
        self._state.check(state["average"], "CRMOGM")
        check_inner_state(self.method, state["method"], "CRMOGM")

    def reset(self) -> None:
        self._state.reset()
        if isinstance(self.method, Method):
            self.method.reset()

    def state_tensors(self, names: Sequence[str], device: torch.device) -> list[Tensor]:
        inner = self.method.state_tensors(names, device) if isinstance(self.method, Method) else []
        return [*inner, *self._state.tensors(names, device)]

    def __repr__(self) -> str:
        return f"CRMOGM({self.method!r}, momentum={self.momentum})"
