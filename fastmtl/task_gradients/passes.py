"""The backward passes of T losses: one by one, or several cotangents at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fastmtl.core.memory import keep_freed_memory

DONATED = (
    "fastmtl.backward: a compiled model (torch.compile, inductor) overwrites its saved tensors in a backward pass "
    "(donated buffers), so that a second one can't follow. Import torch._functorch.config and set its donated_buffer = "
    "False before the model's first call (afterwards it is too late for the graphs that are compiled); or compile "
    "the trunk alone and pass features=, its output, which needs a single pass through it; or use a GradientBank "
    "with a forward per task"
)


def read_chunk_size(chunk_size: int | None) -> int:
    if chunk_size is None:
        return 1
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
        raise TypeError(f"chunk_size: expected an int or None, got {type(chunk_size).__name__}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
    return chunk_size


def run_passes(
    tasks: Sequence[Tensor | None],
    inputs: Mapping[Tensor, int],
    overlap: Sequence[int],
    retain_graph: bool,
    chunk_size: int,
    donated: int,
) -> Iterator[tuple[int, list[tuple[Tensor, Tensor | None]]]]:
    """For each task that reaches any of `inputs` (tensor -> bit mask of tasks): those that it reaches, with gradients.

    A graph that no later loss needs (`overlap`, as in `Reach`) is freed with the last pass through it.
    """
    if any(tensor.device.type == "cpu" for tensor in inputs):
        keep_freed_memory()  # the gradients of a step are the next one's memory
    active = [t for t, loss in enumerate(tasks) if loss is not None and any(m >> t & 1 for m in inputs.values())]
    for start in range(0, len(active), chunk_size):
        chunk = active[start : start + chunk_size]
        keep = retain_graph or any(overlap[t] >> (chunk[-1] + 1) for t in chunk)
        bits = sum(1 << t for t in chunk)
        if keep and donated & bits:
            raise RuntimeError(DONATED)
        mine = [p for p, mask in inputs.items() if mask & bits]
        losses = [loss for t in chunk if (loss := tasks[t]) is not None]
        if len(chunk) == 1:
            yield chunk[0], list(zip(mine, grad(losses, mine, None, keep), strict=True))
            continue
        batched = _grad_batched(losses, mine, keep, chunk_size)
        for i, t in enumerate(chunk):
            # a parameter that this loss does not reach has a row of zeros here, and none when taken alone
            yield (
                t,
                [(p, None if g is None else g[i]) for p, g in zip(mine, batched, strict=True) if inputs[p] >> t & 1],
            )


def grad(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor] | None, retain_graph: bool
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad`, None where not reached; errors that only this library's caller can mend say how."""
    try:
        return torch.autograd.grad(outputs, inputs, cotangents, retain_graph=retain_graph, allow_unused=True)
    except RuntimeError as error:
        if "donated buffer" in str(error):
            raise RuntimeError(DONATED) from error
        raise


def _grad_batched(
    losses: Sequence[Tensor], inputs: Sequence[Tensor], retain_graph: bool, chunk_size: int
) -> tuple[Tensor | None, ...]:
    """Gradients with one more dimension in front: the loss."""
    cotangents = [torch.zeros(len(losses), dtype=loss.dtype, device=loss.device) for loss in losses]
    for i, cotangent in enumerate(cotangents):
        cotangent[i] = 1
    try:
        return torch.autograd.grad(
            losses, inputs, cotangents, retain_graph=retain_graph, allow_unused=True, is_grads_batched=True
        )
    except (RuntimeError, ValueError) as error:
        if "donated buffer" in str(error):
            raise RuntimeError(DONATED) from error
        # frames of C++ that torch appends help nobody here; the whole error is its cause
        said = str(error).partition("\nException raised from")[0].strip()
        raise RuntimeError(
            f"fastmtl.backward: {len(losses)} backward passes at once (chunk_size={chunk_size}) failed; if the model "
            f"holds something that vmap can't batch, use chunk_size=1. torch says: {said}"
        ) from error
