"""The backward passes of a `fully_shard` module, which gathers parameters and reduces gradients in hooks of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from fastmtl.distributed.dtensors import local
from fastmtl.distributed.ranks import Ranks
from fastmtl.task_gradients.reach import Reach


def sharded_gradients(
    ranks: Ranks,
    losses: Sequence[Tensor | None],
    found: Reach,
    named: Mapping[Tensor, str],
    retain_graph: bool,
) -> Iterator[tuple[int, list[tuple[Tensor, Tensor]]]]:
    """For each task its parameters in `named` and this rank's shards of their gradients, from `.backward()`.

    `autograd.grad` would go past the hooks of `fully_shard`, which gather and reduce. Every `.grad` in reach
    is set aside meanwhile, and so are hooks after accumulation: torch runs them in
    each pass, where no `.grad` is final.
    """
    assert ranks.managed is not None
    inside = {ranks.managed.get(leaf, leaf) for leaf in found.leaves} | set(named)
    aside = [(p, p.grad) for p in inside]
    hooks = []
    try:
        for p in inside:
            if waiting := getattr(p, "_post_accumulate_grad_hooks", None):
                hooks.append((waiting, dict(waiting)))
                waiting.clear()
        for t, loss in enumerate(losses):
            if loss is None or not any(mask >> t & 1 for mask in found.leaves.values()):
                continue
            for p in inside:
                p.grad = None
            loss.backward(retain_graph=retain_graph or bool(found.overlap[t] >> (t + 1)))
            yield t, [(p, local(p.grad)) for p in named if p.grad is not None]
    finally:
        for waiting, kept in hooks:
            waiting.update(kept)
        for p, g in aside:
            p.grad = g
