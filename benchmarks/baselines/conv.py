"""A mixed-task batch through `W + s_t Delta_t` without fastmtl: each as well as its kind can be written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtl.benchmarks.suites.conv_shapes import Batch


def shared(b: Batch) -> Tensor:
    """One weight for all: what the work would cost without tasks."""
    return b.layer(b.x, b.weight.to(b.x.dtype))


def _weight_of(b: Batch, task: int) -> Tensor:
    """A task's weight, in one pass over the delta; a closed gate's is W."""
    if b.gate_grad:
        w = torch.addcmul(b.weight, b.gate[task], b.deltas[task])
    else:
        w = torch.add(b.weight, b.deltas[task], alpha=b.gates[task]) if b.gates[task] else b.weight
    return w.to(b.x.dtype)


def loop(b: Batch) -> Tensor:
    """A call per task that is there, weights in a list; slices of a sorted batch, else gathered and written back."""
    if b.sorted:
        parts = b.samples.split(b.sizes)
        done = [b.layer(part, _weight_of(b, t)) for t, part in zip(b.rows, parts, strict=True)]
        return torch.cat(done).view(b.output_shape)
    x, out = b.samples, None
    for t, rows in b.rows.items():
        y = b.layer(x[rows], _weight_of(b, t))
        if out is None:
            out = _empty(b, y)
        out = out.index_copy_(0, rows, y)
    assert out is not None
    return out.view(b.output_shape)


def loop_permuted(b: Batch) -> Tensor:
    """The same with one sort of the whole batch and one back: faster in training, where each write costs a copy."""
    parts = b.samples[b.plan.order].split(b.sizes)
    done = [b.layer(part, _weight_of(b, t)) for t, part in zip(b.rows, parts, strict=True)]
    return torch.cat(done)[b.back].view(b.output_shape)


def stacked(b: Batch) -> Tensor:
    """The loop as it is mostly written: one stacked parameter, a mask per task."""
    x, out = b.samples, None
    for t in range(len(b.gates)):
        mask = b.ids.flatten() == t
        if not mask.any():
            continue
        w = b.weight + b.gate[t] * b.stacked[t] if b.gate_grad or b.gates[t] else b.weight
        y = b.layer(x[mask], w.to(x.dtype))
        if out is None:
            out = _empty(b, y)
        out[mask] = y
    assert out is not None
    return out.view(b.output_shape)


def _empty(b: Batch, part: Tensor) -> Tensor:
    channels_last = part.dim() == 4 and b.x.is_contiguous(memory_format=torch.channels_last)
    form = torch.channels_last if channels_last else torch.contiguous_format
    size = (b.samples.shape[0], *part.shape[1:])
    return torch.empty(size, dtype=part.dtype, device=part.device, memory_format=form)


def _all_weights(b: Batch) -> Tensor:
    gate = b.gate.view(-1, *[1] * b.weight.dim())
    return torch.addcmul(b.weight, gate, b.stacked).to(b.x.dtype)


def grouped(b: Batch) -> Tensor:
    """A weight per sample, and one convolution with as many groups as samples."""
    n, _, h, w = b.x.shape
    weights = _all_weights(b)[b.ids].flatten(0, 1)
    y = F.conv2d(b.x.reshape(1, -1, h, w), weights, None, b.layer.stride, b.layer.padding, groups=n)
    return y.view(b.output_shape)


def vmap(b: Batch) -> Tensor:
    """A weight per sample, under `torch.func.vmap`."""
    weights = _all_weights(b)[b.ids]
    if b.layer.linear:
        return torch.func.vmap(F.linear)(b.x, weights)
    return torch.func.vmap(lambda x, w: b.layer(x[None], w)[0])(b.x, weights)


def grouped_mm(b: Batch) -> Tensor:
    """`torch._grouped_mm` over rows sorted by task; all T weights are made."""
    weights = _all_weights(b).mT
    rows_per_id = b.samples.flatten(0, -2).shape[0] // b.plan.order.shape[0]
    offsets = (b.plan.offsets[1:] * rows_per_id).to(torch.int32)
    x = b.samples if b.sorted else b.samples[b.plan.order]
    y = torch._grouped_mm(x.flatten(0, -2), weights, offs=offsets)
    y = y.view(*x.shape[:-1], b.layer.cout)
    return (y if b.sorted else y[b.back]).view(b.output_shape)


def adapter(b: Batch) -> Tensor:
    """As adapter libraries serve a mixed batch: the shared layer on all, then each open task's delta on its rows."""
    x = b.samples
    y = b.layer(x, b.weight.to(x.dtype))
    for t, rows in b.rows.items():
        if not (b.gate_grad or b.gates[t]):
            continue
        scale = b.gate[t] if b.gate_grad else b.gates[t]
        y = y.index_add(0, rows, (b.layer(x[rows], b.deltas[t].to(x.dtype)) * scale).to(y.dtype))
    return y.view(b.output_shape)


def grouped_mm_missing(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why `torch._grouped_mm` cannot be measured: it is tried once on a small product, forward and backward."""
    if not hasattr(torch, "_grouped_mm"):
        return "this torch has no _grouped_mm"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    x = torch.randn(32, 16, dtype=dtype, device=device, requires_grad=True)
    w = torch.randn(2, 16, 16, dtype=dtype, device=device, requires_grad=True)
    try:
        y = torch._grouped_mm(x, w.mT, offs=torch.tensor([16, 32], dtype=torch.int32, device=device))
        torch.autograd.grad(y, (x, w), torch.ones_like(y))
    except (RuntimeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


# --- each task's weight gradient, and scale and shift


def loop_weight_grad(b: Batch, out: Tensor | None = None) -> Tensor:
    """A call per task into rows of the result."""
    x, g = b.samples, b.grad_out.flatten(0, b.ids.dim() - 1) if b.ids.dim() > 1 else b.grad_out
    if out is None:
        out = torch.zeros(len(b.gates), *b.layer.weight_shape, dtype=x.dtype, device=x.device)
    else:
        absent = [t for t in range(len(b.gates)) if t not in b.rows]
        for t in absent:
            out[t].zero_()
    done = 0
    for (t, rows), size in zip(b.rows.items(), b.sizes, strict=True):
        part = slice(done, done + size) if b.sorted else rows
        done += size
        out[t].copy_(weight_grad(b, x[part], g[part]))
    return out


def shared_weight_grad(b: Batch) -> Tensor:
    """One gradient for the whole batch."""
    return weight_grad(b, b.x, b.grad_out)


def weight_grad(b: Batch, x: Tensor, g: Tensor) -> Tensor:
    if b.layer.linear:
        return g.flatten(0, -2).mT @ x.flatten(0, -2)
    return torch.nn.grad.conv2d_weight(x, b.layer.weight_shape, g, b.layer.stride, b.layer.padding)


def gathered_scale_shift(x: Tensor, scale: Tensor, shift: Tensor, ids: Tensor) -> Tensor:
    """Rows of both tables, then one `addcmul`."""
    dims = [1] * (x.dim() - 2)
    a, b = (table[ids].view(x.shape[0], -1, *dims) for table in (scale, shift))
    return torch.addcmul(b, x, a)


class NormBatch(Protocol):
    """What the baselines of batch norm read of a case."""

    x: Tensor
    weight: list[Tensor]
    bias: list[Tensor]
    running: tuple[list[Tensor], list[Tensor]]
    rows: list[tuple[int, Tensor | slice]]


def loop_batch_norm(b: NormBatch, training: bool) -> Tensor:
    """`F.batch_norm` of each task's samples, gathered and put back; slices where the batch is sorted."""
    parts = []
    for t, rows in b.rows:
        statistics = b.running[0][t], b.running[1][t]
        parts.append(F.batch_norm(b.x[rows], *statistics, b.weight[t], b.bias[t], training))
    if isinstance(b.rows[0][1], slice):
        return torch.cat(parts)
    y = torch.empty_like(b.x)
    return y.index_copy(0, torch.cat([rows for _, rows in b.rows]), torch.cat(parts))  # type: ignore[arg-type]


def shared_batch_norm(b: NormBatch, training: bool) -> Tensor:
    """One batch norm of the whole batch, by the parameters of the first task."""
    statistics = b.running[0][0], b.running[1][0]
    return F.batch_norm(b.x, *statistics, b.weight[0], b.bias[0], training)


def sort_and_count(ids: Tensor, num_tasks: int) -> tuple[Tensor, Tensor]:
    flat = ids.flatten()
    counts = torch.bincount(flat, minlength=num_tasks)
    return flat.argsort(stable=True), F.pad(counts.cumsum(0), (1, 0))


BASELINES: dict[str, tuple[Callable[[Batch], Tensor], str]] = {
    "loop": (loop, "a call per task, weights in a list, index lists given; slices where the batch is sorted"),
    "loop_permuted": (loop_permuted, "the same, the batch permuted once there and once back"),
    "stacked": (stacked, "a call per task, one stacked parameter, boolean masks"),
    "grouped": (grouped, "a weight per sample, groups=N"),
    "vmap": (vmap, "a weight per sample, torch.func.vmap"),
    "groupedmm": (grouped_mm, "torch._grouped_mm over sorted rows, T weights made"),
    "adapter": (adapter, "shared layer, then each task's delta on its rows, as adapter libraries do"),
}
