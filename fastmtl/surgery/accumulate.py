"""The one place that writes `.grad`, and runs the hooks that wait for it."""

from __future__ import annotations

import sys
from typing import TypeAlias

import torch
from torch import Tensor

from fastmtl.core.memory import can_keep, references_alone
from fastmtl.distributed.dtensors import add_shard, is_dtensor

# parameters, each with what is to be added to its `.grad`: of a DTensor this rank's shard
Updates: TypeAlias = list[tuple[Tensor, Tensor]]


def accumulate(updates: Updates, *, run_hooks: bool) -> None:
    """Adds every update to its parameter's `.grad` as autograd does: in place where there is one, else in the
    parameter's layout, and without a copy where nobody else holds the update.

    Args:
        run_hooks: run what `register_post_accumulate_grad_hook` registered, once for each parameter and when every
            `.grad` is written: an optimizer may sit there.
    """
    alone = references_alone()
    with torch.no_grad():
        kept: set[int] = set()
        for p, g in updates:
            before = p.grad
            if is_dtensor(p):
                add_shard(p, g)
            elif before is None:
                # detached, a view lets go of its base
                keep = sys.getrefcount(g) <= alone and can_keep(p, g, kept)
                p.grad = g.detach() if keep else _copy_like(p, g)
            elif before.layout is not torch.strided and g.layout is torch.strided:
                p.grad = g + before
            elif before.layout is torch.strided and 0 in before.stride():
                p.grad = before + g  # an expanded tensor can't be added to in place
            else:
                before.add_(g)
        for p in dict.fromkeys(p for p, _ in updates) if run_hooks else ():
            hooks = getattr(p, "_post_accumulate_grad_hooks", None)
            for hook in tuple(hooks.values()) if hooks else ():
                hook(p)


def _copy_like(param: Tensor, grad: Tensor) -> Tensor:
    if grad.layout is not torch.strided:
        return grad.clone()
    return torch.empty_like(param, dtype=grad.dtype).copy_(grad)
