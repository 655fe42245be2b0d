"""One backward pass for all tasks, with weights that are known before: what a surgery costs when it solves nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastmtl.core.tensors import as_real
from fastmtl.distributed.ranks import Ranks
from fastmtl.task_gradients.passes import DONATED
from fastmtl.task_gradients.reach import Reach, entries, tasks_of

# losses, parameters, cotangents of the losses, whether to keep the graph -> gradients, None where not reached
RunPass: TypeAlias = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], bool], Sequence[Tensor | None]]


def weighted_pass(
    tasks: Sequence[Tensor | None],
    weights: Tensor,
    reached: Mapping[Tensor, int],
    shared: Collection[Tensor],
    found: Reach,
    retain_graph: bool,
    run: RunPass,
) -> dict[Tensor, Tensor]:
    """The gradients that the reached parameters get: `sum_t weights[t] * g_t` where shared, else the plain sum.

    One pass begins at every loss with 1. What arrives where a task's own part of the graph ends is multiplied by the
    task's weight, so that the heads ahead of it get their own loss's gradient, and all that lies behind it the
    weighted sum. Parameters that are not shared but lie behind it take a second pass, without weights.

    Args:
        tasks: T losses, None where absent.
        weights: `[T]` float64, on the device of the shared parameters.
        reached: the parameters, each with the bit mask of tasks whose loss reaches it.
        shared: those among them whose gradients are weighted.
        found: what the losses reach.
        run: `autograd.grad`, or what stands in its place.

    Raises:
        RuntimeError: a second pass would go through a compiled graph with donated buffers; what autograd raises.
    """
    is_shared = set(shared)
    plain = [p for p, mask in reached.items() if p not in is_shared and len(tasks_of(mask)) > 1]
    rest = [p for p in reached if p not in set(plain)]
    losses = [loss for loss in tasks if loss is not None]
    if found.donated and (retain_graph or (plain and rest)):
        raise RuntimeError(DONATED)
    gradients: dict[Tensor, Tensor] = {}
    if rest:
        with _weighted_where_tasks_meet(tasks, weights) as cotangents:
            grads = run(losses, rest, cotangents, retain_graph or bool(plain))
        for p, g in zip(rest, grads, strict=True):
            if g is not None:
                alone = tasks_of(reached[p])
                # declared to be shared, and reached by one task: no weight has met its gradient yet
                gradients[p] = _scaled(g, weights[alone[0]]) if p in is_shared and len(alone) == 1 else g
    if plain:
        grads = run(losses, plain, [torch.ones_like(loss) for loss in losses], retain_graph)
        gradients.update((p, g) for p, g in zip(plain, grads, strict=True) if g is not None)
    return gradients


@contextlib.contextmanager
def _weighted_where_tasks_meet(tasks: Sequence[Tensor | None], weights: Tensor) -> Iterator[list[Tensor]]:
    """Inside, a task's gradient takes its weight where it enters what several tasks have in common.

    Yields the cotangents of the present losses.
    """
    met = entries(tasks)
    handles = []
    try:
        for node, inputs, t in met.entries:
            handles.append(node.register_hook(_weigh(inputs, weights[t])))
        yield [
            _scaled(torch.ones_like(loss), weights[t]) if t in met.losses else torch.ones_like(loss)
            for t, loss in enumerate(tasks)
            if loss is not None
        ]
    finally:
        for handle in handles:
            handle.remove()


def _weigh(inputs: Collection[int], weight: Tensor) -> Any:
    def hook(grad_inputs: Sequence[Tensor | None], grad_outputs: Any) -> tuple[Tensor | None, ...]:
        return tuple(_scaled(g, weight) if g is not None and i in inputs else g for i, g in enumerate(grad_inputs))

    return hook


def norm_of(gradients: Sequence[Tensor], device: torch.device, ranks: Ranks | None) -> Tensor:
    """0-d float64 norm of them all; not finite where one of them is not. `ranks`: of whose shards they are."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for g in gradients:
        values = as_real(g if g.layout is torch.strided else g.coalesce().values())
        kinds.setdefault((values.dtype, g.device), []).append(values)
    squares = torch.zeros((), dtype=torch.float64, device=device)
    with torch.no_grad():
        for (dtype, _), some in kinds.items():
            norms = torch.stack(torch._foreach_norm(some, 2, dtype=torch.promote_types(dtype, torch.float32)))
            squares = squares + norms.to(device=device, dtype=torch.float64).square().sum()
        if ranks is not None:
            squares = ranks.total_gram(squares.reshape(1, 1)).reshape(())
    return squares.sqrt()


def _scaled(grad: Tensor, weight: Tensor) -> Tensor:
    """`weight * grad`, in new memory: autograd may hold `grad` elsewhere. The weight is not rounded to 16 bits."""
    with torch.no_grad():
        exact = torch.promote_types(grad.dtype, torch.float32)
        factor = weight.to(device=grad.device, dtype=exact.to_real())
        return (grad.to(exact) * factor).to(grad.dtype)
