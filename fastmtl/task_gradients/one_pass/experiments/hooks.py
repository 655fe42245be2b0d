"""Whether a hook of an activation's gradient keeps samples apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastmtl.task_gradients.one_pass.experiments.trials import FAILURES, SEED, equal, same
from fastmtl.task_gradients.one_pass.experiments.values import halves, poisoned, samples_at
from fastmtl.task_gradients.one_pass.rules.owners import along
from fastmtl.task_gradients.one_pass.sample_axis import PerSample


def keeps_samples_apart(hook: Callable[[Tensor], Any], g: Tensor, axis: PerSample) -> bool:
    """Runs it with the gradients of some samples replaced: what it makes of the others must keep its bits.

    Args:
        hook: gives a gradient in the place of `g`, or writes into it.
    """

    def made(x: Tensor) -> Tensor:
        devices = [x.device.index] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(SEED)
            out = hook(x)
        return x if out is None else out

    generator, at = torch.Generator().manual_seed(0), samples_at(axis)
    try:
        base = made(same(g))
        if base.shape != g.shape:
            return False
        for kind in ("nan", "large"):
            for chosen in halves(len(axis.task_ids), 2, generator):
                again = made(poisoned(g, along(chosen[at], g.dim(), axis.axis), kind))
                rest = along(~chosen[at], g.dim(), axis.axis).to(g.device)
                if again.shape != g.shape or bool((~equal(base, again) & rest).any()):
                    return False
    except FAILURES:
        return False
    return True
