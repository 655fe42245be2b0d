"""Which backends a layer with per-task weights may take on a GPU, and in which order they are asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmtl.core.dispatch import forced_backend, unavailable
from fastmtl.core.task_weights import Geometry, TaskConvCall
from fastmtl.ops.task_weights import cuda, plain
from fastmtl.ops.task_weights.arguments import triton_declines
from fastmtl.tuning import gpu


class Choice(NamedTuple):
    """The last arguments of `choose`."""

    unsupported: Mapping[str, str | None]
    order: Sequence[str] | None


def of_layer(product: str, x: Tensor, call: TaskConvCall) -> Choice:
    """Of `"forward"` or `"backward"`."""
    wider = call.weights.like.dtype != x.dtype
    return _of(product, x, call.weights.shape, call.geometry, call.batch.offsets, plain.sees_one_weight(call), wider)


def of_weight_grad(x: Tensor, out: Tensor, geometry: Geometry, offsets: Tensor) -> Choice:
    """out: `[T, ...]`, each task's gradient of a shared weight."""
    wider = out.dtype != x.dtype
    found = _of("weight_grad", x, out.shape[1:], geometry, offsets, offsets.shape[0] == 2, wider, out)
    if found.unsupported.get("cuda") is None and out.dtype not in (x.dtype, torch.float32):
        declined = {**found.unsupported, "cuda": f"it writes {x.dtype} or float32, got {out.dtype}"}
        return found._replace(unsupported=declined)
    return found


def _of(
    product: str,
    x: Tensor,
    shape: torch.Size,
    geometry: Geometry,
    offsets: Tensor,
    one_weight: bool,
    wider: bool,
    *others: Tensor,
) -> Choice:
    declined = triton_declines(x, *others, offsets=offsets)
    device_type = x.device.type
    if unavailable("cuda", device_type) is not None:
        return Choice(declined, None)
    num_tasks = offsets.shape[0] - 1
    declined["cuda"] = cuda.declines(x, shape, geometry, num_tasks)
    if forced_backend() is None:
        if declined["cuda"] is None and not gpu.may_run("cuda", x.device):
            declined["cuda"] = "its kernels have not run on a card so far: use_backend('cuda') asks for them"
        may_run = gpu.may_run("torch", x.device)
        unmeasured = "it has not run on a card so far: `fastmtl tune` measures it"
        why = plain.declines(product, x, shape, one_weight, num_tasks, wider) if may_run else unmeasured
        declined["torch"] = why
    return Choice(declined, gpu.order(product, x, shape, one_weight))
