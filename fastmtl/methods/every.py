"""Weights that are solved for at every k-th step, and reused in between."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmtl.methods.arguments import Argument, check_mapping, count, read_count, read_name
from fastmtl.methods.base import Method, Seen, Weighting, check_inner_state, needs_of, seen_by_position, weights_of
from fastmtl.methods.names import get


class Every(Method):
    """Asks a method for weights at every k-th step, and reuses them at the steps between.

    With `fastmtl.backward` a step that reuses weights takes one backward pass for all tasks: shared parameters get the
    sum of the task gradients with the weights kept, and any other parameter its own loss's gradient, as always. Such a
    step costs what `sum(losses).backward()` costs. A `GradientBank` and `one_pass` have the task gradients at every
    step, and make the Gram matrix of them: there it is the method's own work alone that is saved.

    A step is one call: of `backward` or `apply`, of `weights`, of the method on gradients. The method is asked ahead of
    its turn where the weights kept are no good: at the first step; where other tasks are present than those they were
    solved for, or the host does not know which; and after a step whose gradients were not finite. Such a step leaves an
    update that is not finite either, so that a `GradScaler` skips it, and its weights are not kept. The host learns of
    it from a flag that it never waits for: on a GPU that may be a step or two later.

    Args:
        method: a `Method`, the name of one, or a callable `[T, T] -> [T]`.
        k: at every how manieth step the method is asked, from 1. It may be set later: weights that have served for k
            steps by then are used no more.

    Raises:
        TypeError: `method` is none, or an `Every`; `k` is no integer; a method that has no weights, since it makes its
            update of the gradients themselves.
        ValueError: `k` below 1.
        RuntimeError: (when called, with k > 1) in a CUDA graph's capture: which passes run is decided on the host.

    Over several ranks the first one's weights are reused, and one rank that needs new weights makes all ask.

    Example:
        >>> method = Every(lambda gram: 1 / gram.diagonal(), 4)
        >>> method.weights(torch.eye(2))
        tensor([1., 1.], dtype=torch.float64)
        >>> method.weights(5 * torch.eye(2))
        tensor([1., 1.], dtype=torch.float64)
    """

    k = Argument(count(least=1))

    def __init__(self, method: str | Weighting, k: int) -> None:
        self.method, self.k = method, k

    @property
    def method(self) -> Weighting:
        """Which is asked. One that is set later is asked at the next step."""
        return self._method

    @method.setter
    def method(self, method: str | Weighting) -> None:
        method = get(method)
        if isinstance(method, Every):
            raise TypeError(
                f"method: expected one that gives new weights whenever it is asked, got {method!r}: write one Every, "
                "with the product of both k"
            )
        if "gradients" in needs_of(method):
            raise TypeError(
                f"method: expected one with weights, which can be kept, got {method!r}, whose update is no weighted sum"
            )
        self._method, self.needs = method, needs_of(method)  # type: ignore[misc]
        self._forget()

    # --- asking, or not

    def weights(self, gram: Tensor, *, present: Tensor | None = None) -> Tensor:
        """As of `Method`. With `present`, which the host does not know, the method is always asked."""
        self._read(gram, present)
        if self.needs:
            raise self._needs_more()
        return self.weigh(gram, seen_by_position(gram.shape[0], present))

    def weigh(self, gram: Tensor, seen: Seen) -> Tensor:
        self._check_seen(gram, seen)
        with torch.no_grad():
            if not self.due(seen.names, seen.present):
                self.notice(gram.isfinite().all())
                return self.reuse(seen.names, gram.device)
            weights = weights_of(self.method, gram, seen)
            if self.k > 1 and not isinstance(seen.present, Tensor):
                self._keep(gram, weights, seen.names, seen.present)
            return weights

    def due(self, names: Sequence[str], present: Sequence[bool] | Tensor) -> bool:
        """Whether the method must be asked at this step, in which these tasks are present."""
        if self.k == 1 or isinstance(present, Tensor):
            if self.k == 1:
                self._kept = {}  # steps are not counted: they would be too old once k grows
            return True
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "Every: the host decides at each step which passes run, and a captured step repeats those of the "
                "capture: pass the method itself, or leave the step out of the CUDA graph"
            )
        self._look()
        here = {name for name, is_here in zip(names, present, strict=True) if is_here}
        return self._steps >= self.k or not here or self._kept.keys() != here

    def reuse(self, names: Sequence[str], device: torch.device) -> Tensor:
        """The weights kept, `[T]` float64, 0 for absent tasks; counts the step."""
        self._steps += 1
        if any(w.device != device for w in self._kept.values()):
            self._kept = {name: w.to(device) for name, w in self._kept.items()}  # were loaded
        absent = torch.zeros((), dtype=torch.float64, device=device)
        return torch.stack([self._kept.get(name, absent) for name in names])

    def notice(self, finite: Tensor) -> None:
        """Tells whether the gradients of this step were finite (0-d bool): the method is asked next time if not."""
        self._flags.append(_Flag(finite))

    def expire(self) -> None:
        """The method is asked next time."""
        self._steps = self.k

    def _keep(self, gram: Tensor, weights: Tensor, names: Sequence[str], present: Sequence[bool]) -> None:
        finite = gram.isfinite().all() & weights.isfinite().all()
        here = {name: w for name, w, is_here in zip(names, weights.unbind(), present, strict=True) if is_here}
        if self._kept.keys() == here.keys():
            here = {name: torch.where(finite, w, self._kept[name].to(w.device)) for name, w in here.items()}
        self._kept = {name: w.clone() for name, w in here.items()}
        self._steps = 1
        self.notice(finite)

    def _look(self, *, wait: bool = False) -> None:
        """Forgets the weights after a step that was not finite, as far as the host has heard of it."""
        while self._flags and (finite := self._flags[0].read(wait=wait)) is not None:
            self._flags.popleft()
            if not finite:
                self._kept = {}

    # --- state

    def state_dict(self) -> dict[str, Any]:
        """The weights kept by task, how many steps they have served, and the method's own state. Waits for the device,
        to know whether the last steps were finite."""
        self._look(wait=True)
        inner = self.method.state_dict() if isinstance(self.method, Method) else {}
        return {"steps": self._steps, "weights": {name: w.clone() for name, w in self._kept.items()}, "method": inner}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned. The weights go to the device of the gradients at the next step.

        Raises:
            TypeError, ValueError: not the state of such a method. Nothing has changed then.
        """
        self.check_state(state)
        if isinstance(self.method, Method):
            self.method.load_state_dict(state["method"])
        self._forget()
        self._steps = state["steps"]
        self._kept = {name: w.detach().to(torch.float64, copy=True) for name, w in state["weights"].items()}

    def check_state(self, state: Mapping[str, Any]) -> None:
        check_mapping(state, "state", ["steps", "weights", "method"], "Every")
        read_count(state["steps"], "state: Every: steps")
        check_mapping(state["weights"], "state: Every: weights")
        for name, w in state["weights"].items():
            read_name(name, "state: Every: weights")
            if not isinstance(w, Tensor) or w.dim() != 0 or not w.is_floating_point() or not bool(w.isfinite()):
                raise ValueError(f"state: Every: expected a finite 0-d tensor as the weight of {name!r}, got {w!r}")
        check_inner_state(self.method, state["method"], "Every")

    def reset(self) -> None:
        """The method is asked next time, and begins anew itself."""
        self._forget()
        if isinstance(self.method, Method):
            self.method.reset()

    def state_tensors(self, names: Sequence[str], device: torch.device) -> list[Tensor]:
        return self.method.state_tensors(names, device) if isinstance(self.method, Method) else []

    def __repr__(self) -> str:
        return f"Every({self.method!r}, {self.k})"

    def _forget(self) -> None:
        self._kept: dict[str, Tensor] = {}  # of the tasks that were present; float64, 0-d
        self._steps = 0  # since the method was asked, with that one
        self._flags: deque[_Flag] = deque()


class _Flag:
    """A bool of the device, which the host reads when it has arrived. (Of devices other than CUDA's, it waits.)"""

    def __init__(self, value: Tensor) -> None:
        self._value, self._arrived = value, None
        if value.device.type == "cuda":
            self._value = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(value, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(value.device))

    def read(self, *, wait: bool) -> bool | None:
        """None: not here yet."""
        if self._arrived is not None and not wait and not self._arrived.query():
            return None
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._value)
