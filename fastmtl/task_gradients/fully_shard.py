"""The backward passes of a `fully_shard` module, which gathers parameters and reduces gradients in hooks of its own.

`autograd.grad` would go past these hooks, so that a pass is an ordinary backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fastmtl.distributed.dtensors import local
from fastmtl.distributed.ranks import Ranks
from fastmtl.task_gradients.reach import Reach
from fastmtl.task_gradients.weighted_pass import RunPass


@contextlib.contextmanager
def grads_aside(ranks: Ranks, found: Reach, named: Mapping[Tensor, str]) -> Iterator[RunPass]:
    """Inside, every `.grad` in reach is set aside, and so are hooks after accumulation: torch runs them in each pass,
    where no `.grad` is final.

    Yields what runs a pass and tells the gradients of parameters, this rank's shards of them.
    """
    assert ranks.managed is not None
    inside = {ranks.managed.get(leaf, leaf) for leaf in found.leaves} | set(named)
    aside = [(p, p.grad) for p in inside]
    hooks = []

    def run(
        losses: Sequence[Tensor], params: Sequence[Tensor], cotangents: Sequence[Tensor], retain_graph: bool
    ) -> list[Tensor | None]:
        for p in inside:
            p.grad = None
        torch.autograd.backward(losses, cotangents, retain_graph=retain_graph)
        return [None if p.grad is None else local(p.grad) for p in params]

    try:
        for p in inside:
            if waiting := getattr(p, "_post_accumulate_grad_hooks", None):
                hooks.append((waiting, dict(waiting)))
                waiting.clear()
        yield run
    finally:
        for waiting, kept in hooks:
            waiting.update(kept)
        for p, g in aside:
            p.grad = g


def sharded_gradients(
    ranks: Ranks,
    losses: Sequence[Tensor | None],
    found: Reach,
    named: Mapping[Tensor, str],
    retain_graph: bool,
) -> Iterator[tuple[int, list[tuple[Tensor, Tensor]]]]:
    """For each task its parameters in `named` and this rank's shards of their gradients, by a pass of its own."""
    params = list(named)
    with grads_aside(ranks, found, named) as run:
        for t, loss in enumerate(losses):
            if loss is None or not any(mask >> t & 1 for mask in found.leaves.values()):
                continue
            keep = retain_graph or bool(found.overlap[t] >> (t + 1))
            grads = run([loss], params, [torch.ones_like(loss)], keep)
            yield t, [(p, g) for p, g in zip(params, grads, strict=True) if g is not None]
