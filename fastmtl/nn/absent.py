"""Tasks without samples: how what belongs to them stays in the graph, where another rank may have samples of them.

A tensor of such a task gets no gradient. In a process of its own it is therefore left out of the graph. A rank's is in
it all the same, with a gradient that is None: `DistributedDataParallel` waits for every parameter, since it must be
reduced where another rank has samples of its task, and reads from the graph which it need not wait for. With
`static_graph=True` it is zero, since DDP never again reduces what got none in the first step.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fastmtl.nn.containers import TaskParameters
from fastmtl.ops.task_weights.operators import known_bounds


def presence(offsets: Tensor) -> list[bool] | None:
    """Which tasks have samples; None where the host can't know without waiting, or no graph is made of it."""
    bounds = known_bounds(offsets) if torch.is_grad_enabled() else None
    return None if bounds is None else [end > begin for begin, end in itertools.pairwise(bounds)]


def stacked(held: TaskParameters, names: Sequence[str], offsets: Tensor, zeros: bool) -> Tensor:
    """`[T, ...]`, the tasks' tensors in the order of `names`; those without samples get no gradient, if known.

    `zeros`: as of `in_graph`.
    """
    rows, here = held.of_tasks(names), presence(offsets)
    if here is None or all(here):
        return torch.stack(rows)
    found = torch.stack([p if present else p.detach() for p, present in zip(rows, here, strict=True)])
    return in_graph(found, [p for p, present in zip(rows, here, strict=True) if not present], zeros)


def listed(
    held: Sequence[TaskParameters | None], names: Sequence[str], offsets: Tensor, zeros: bool
) -> list[list[Tensor] | None]:
    """Of each of `held` the tasks' tensors in the order of `names`, for an op that gets all these lists.

    The op gives those without samples no gradient; zeros where they are wanted, as of `in_graph`.
    """
    rows = [None if of is None else of.of_tasks(names) for of in held]
    first = next((of for of in rows if of), None)
    here = presence(offsets) if zeros and first is not None else None
    if first is not None and here is not None and not all(here):
        absent = [of[t] for of in rows if of is not None for t, present in enumerate(here) if not present]
        # whether or not the op gives this one a gradient
        first[0] = in_graph(first[0] if here[0] else first[0].detach(), absent, zeros)
    return rows


def in_graph(x: Tensor, absent: Sequence[Tensor], zeros: bool) -> Tensor:
    """A view of `x`, in a process group with tensors of tasks without samples in its graph; outside one `x` itself.

    Args:
        x: a parameter, or what was made of some; nothing that a caller of the layer may write into.
        absent: whose gradients are None.
        zeros: they are zero instead.
    """
    trained = [p for p in absent if p.requires_grad]
    if not trained or not torch.is_grad_enabled() or torch.compiler.is_compiling() or not in_process_group():
        return x
    return _joined(zeros, x, *trained)


def _joined(zeros: bool, x: Tensor, *absent: Tensor) -> Tensor:
    if has_torch_function_variadic(x, *absent):
        # a mode (one_pass follows a batch by one) sees this call, and not what an autograd.Function does
        return handle_torch_function(_joined, (x, *absent), zeros, x, *absent)
    return _InGraph.apply(zeros, x, *absent)


class _InGraph(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, zeros: bool, x: Tensor, *absent: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.count, ctx.like = len(absent), absent if zeros else ()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, grad, *(map(torch.zeros_like, ctx.like) if ctx.like else [None] * ctx.count)


def in_process_group() -> bool:
    """Whether there may be other ranks, with samples of other tasks."""
    return dist.is_available() and dist.is_initialized()


def in_static_graph(before: bool) -> bool:
    """Whether a layer runs inside a DDP module that must see a gradient of every parameter.

    `before`: whether it did when it was called last. A reentrant checkpoint calls it again in the backward pass.
    """
    wrapper = DistributedDataParallel._get_active_ddp_module()
    if wrapper is None:
        return before and torch._C._current_graph_task_id() != -1
    return wrapper.static_graph
