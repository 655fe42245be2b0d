"""The optimizer wrapper that loops written for the older PyTorch port of PCGrad expect."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl import methods
from fastmtl.distributed.wrappers import find_ranks
from fastmtl.ops.gradients.order import Randomness
from fastmtl.surgery.result import Surgery
from fastmtl.task_gradients.backward import run_backward


class PCGrad:
    """Wraps an optimizer: `pc_backward(losses)` in place of `sum(losses).backward()`, then `step()`.

    Args:
        optimizer: any `torch.optim.Optimizer`; its parameters are those that get gradients. Learning rate schedulers
            take `.optimizer`.
        reduction: `"mean"` of the projected gradients, as the port does, or `"sum"`, as the paper does.
        generator: source of the random orders, as for `fastmtl.ops.random_order`; not part of `state_dict`.
        params: with several ranks, the `DistributedDataParallel` or `fully_shard` module that the optimizer's
            parameters belong to: it says whose gradients belong together. Which parameters get gradients is up to the
            optimizer in any case.
        process_group: the ranks to average over, where no such module says it.

    Raises:
        TypeError: `optimizer` is not a `torch.optim.Optimizer`, `generator` no generator or state, `params` no module,
            `process_group` no process group.
        ValueError: an unknown reduction; a `process_group` without this rank, or for a `fully_shard` module.
        RuntimeError: several ranks, and neither `params` nor `process_group` says what to do.

    `pc_backward` overwrites `.grad` (loops written for the port never call `zero_grad`): a parameter that no loss
    reaches is left with `.grad = None`. As everywhere in fastmtl, and unlike the port, a head that only one loss
    reaches gets its gradient unchanged and does not count in the projections.

    Source: Yu et al. 2020, *Gradient Surgery for Multi-Task Learning*, Algorithm 1.

    Example:
        >>> net = torch.nn.Linear(4, 2)
        >>> opt = PCGrad(torch.optim.SGD(net.parameters(), lr=0.1))
        >>> y = net(torch.ones(3, 4))
        >>> surgery = opt.pc_backward([y[:, 0].mean(), y[:, 1].square().mean()])
        >>> opt.step()
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        reduction: str = "mean",
        *,
        generator: Randomness | None = None,
        params: nn.Module | None = None,
        process_group: Any = None,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if params is not None and not isinstance(params, nn.Module):
            raise TypeError(f"params: expected a module or None, got {type(params).__name__}")
        find_ranks(params, None, process_group, "fastmtl.optim.PCGrad")
        self._module = params
        self._process_group = process_group
        self._method = methods.PCGrad(reduction, generator=generator)
        self._optimizer = optimizer

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The wrapped optimizer."""
        return self._optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    @torch._disable_dynamo
    def pc_backward(self, losses: Sequence[Tensor | None] | Tensor | Mapping[Any, Tensor | None]) -> Surgery:
        """Computes the update of PCGrad from the losses and overwrites `.grad` of all parameters with it.

        Args and errors as for `fastmtl.backward`; on an error no `.grad` has changed.
        """
        params = [p for group in self._optimizer.param_groups for p in group["params"]]
        return run_backward(
            losses,
            params,
            None,
            self._method,
            False,
            None,
            overwrite=True,
            process_group=self._process_group,
            module=self._module,
            call="fastmtl.optim.PCGrad.pc_backward",
        )

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """The wrapped optimizer's step."""
        return self._optimizer.step() if closure is None else self._optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self._optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state_dict)

    def __repr__(self) -> str:
        return f"fastmtl.optim.PCGrad({self._optimizer!r}, reduction={self._method.reduction!r})"
