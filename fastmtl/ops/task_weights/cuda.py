"""The layers by the kernels of CUDA C++ (docs/kernels/task-kernels-cuda.md): what those take, and how their launcher in
the extension is called. One call of it makes a whole layer, or all gradients of one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmtl.core.dispatch import extension
from fastmtl.core.task_weights import Geometry, SortedBatch, TaskConvCall, TaskWeights, empty_gradients
from fastmtl.core.tensors import is_channels_last, memory_format

# as csrc/common/params.h numbers them
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# stride, padding and dilation, height and width each; None: a linear layer
Moves = tuple[int, ...] | None


def declines(x: Tensor, shape: Sequence[int], geometry: Geometry, num_tasks: int) -> str | None:
    """Why these kernels do not take a layer, which is then Triton's or the reference's; None: they do.

    shape: of one weight, `[Cout, Cin / groups, kh, kw]`; of a linear layer `[Cout, Cin]`, and x is `[..., Cin]`.
    """
    if geometry.groups != 1:
        return f"its kernels have no groups, got {geometry.groups}"
    # rows without elements are no work; pictures without any may have results, by their padding
    size = tuple(x.shape[2:]) if len(shape) == 4 else (1, max(1, x.shape[:-1].numel()))
    return _declines(x.dtype, size, tuple(shape), geometry, num_tasks)


@functools.lru_cache(4096)
def _declines(
    dtype: torch.dtype, size: tuple[int, int], shape: tuple[int, ...], geometry: Geometry, num_tasks: int
) -> str | None:
    features, channels, kh, kw = (*shape, 1, 1)[:4]
    sizes = (channels, features, *size, *geometry.output_size(size, (kh, kw)), kh, kw)
    if min(sizes) < 1:
        return "its kernels take no pictures or filters without elements"
    if max(*geometry.padding, *geometry.dilation) >= 1 << 29:
        return "its kernels take no padding or dilation from 2^29 on"
    found = extension.task_conv_refusal(
        _DTYPES[dtype], *sizes, *geometry.stride, *geometry.padding, *geometry.dilation, num_tasks
    )
    return None if found is None else f"its kernels do not take {found} of this layer"


def conv2d(x: Tensor, call: TaskConvCall) -> Tensor:
    """Forward: `[N, Cout, Ho, Wo]`, channels_last if x is; samples of no task are NaN."""
    shape = call.weights.shape
    size = (x.shape[0], shape[0], *call.geometry.output_size(x.shape[2:], shape[2:]))
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    return _forward(x, call, _moves(call.geometry), y)


def linear(x: Tensor, call: TaskConvCall) -> Tensor:
    """Forward: `[..., Cout]`."""
    y = torch.empty((*x.shape[:-1], call.weights.shape[0]), dtype=x.dtype, device=x.device)
    return _forward(x, call, None, y)


def conv2d_backward(
    grad_out: Tensor, x: Tensor, call: TaskConvCall, wanted: Sequence[bool], wanted_delta: Sequence[int]
) -> list[Tensor]:
    """The gradients of x, weight, deltas, gate and bias, of these the wanted ones; as the reference gives them."""
    return _backward(grad_out, x, call, _moves(call.geometry), wanted, wanted_delta)


def linear_backward(
    grad_out: Tensor, x: Tensor, call: TaskConvCall, wanted: Sequence[bool], wanted_delta: Sequence[int]
) -> list[Tensor]:
    return _backward(grad_out, x, call, None, wanted, wanted_delta)


def conv2d_weight_grad(x: Tensor, grad_out: Tensor, batch: SortedBatch, geometry: Geometry, out: Tensor) -> None:
    """Each task's gradient of a shared filter into out, `[T, Cout, Cin, kh, kw]` of any strides."""
    _weight_grad(x, grad_out, batch, _moves(geometry), out)


def linear_weight_grad(x: Tensor, grad_out: Tensor, batch: SortedBatch, geometry: Geometry, out: Tensor) -> None:
    _weight_grad(x, grad_out, batch, None, out)


# --- the launcher


def _moves(geometry: Geometry) -> Moves:
    return (*geometry.stride, *geometry.padding, *geometry.dilation)


def _readable(x: Tensor, moves: Moves) -> Tensor:
    """x as the kernels read pictures and rows, by a copy where it lies otherwise."""
    if moves is None:
        return x.contiguous()
    if x.stride(1) == 1 or x.shape[1] == 1:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def _written(promised: Tensor, moves: Moves) -> Tensor:
    """Memory that the kernels write: that of a result, or some to be copied from."""
    if moves is None:
        lies_as_rows = promised.is_contiguous()
        return promised if lies_as_rows else torch.empty_like(promised, memory_format=torch.contiguous_format)
    if promised.stride(1) == 1 or promised.shape[1] == 1:
        return promised
    return torch.empty_like(promised, memory_format=torch.channels_last)


def _told(call: TaskConvCall, moves: Moves) -> tuple[Any, ...]:
    (weight, delta, tasks, gate), (order, offsets), _, bias = call
    return weight, delta, tasks, gate, bias, order, offsets, moves


def _evened(call: TaskConvCall) -> TaskConvCall:
    """The same, with copies of what the kernels do not read as it lies: deltas of other strides than the first."""
    (weight, delta, tasks, gate), (order, offsets), geometry, bias = call
    if tasks:
        delta = _alike(delta)
    gate, bias = (None if p is None else p.contiguous() for p in (gate, bias))
    batch = SortedBatch(order.contiguous(), offsets.contiguous())
    return TaskConvCall(TaskWeights(weight, delta, tasks, gate), batch, geometry, bias)


def _alike(delta: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of one order in memory, without overlaps: copies of those that lie otherwise."""
    strides = torch.empty_like(delta[0], device="meta").stride()
    return [
        d if d.stride() == strides else torch.empty_strided(d.shape, strides, dtype=d.dtype, device=d.device).copy_(d)
        for d in delta
    ]


def _launch(launcher: Callable[..., bool], *args: Any) -> bool:
    """What a launcher answers; memory that is lacking raises what torch's own allocations raise."""
    try:
        return launcher(*args)
    except RuntimeError as error:
        if str(error).startswith("fastmtl: out of memory"):
            raise torch.OutOfMemoryError(str(error)) from None
        raise


def _done(launched: bool) -> None:
    assert launched, "the CUDA kernels' launcher does not read what it is given, though its layout has been evened"


def _forward(x: Tensor, call: TaskConvCall, moves: Moves, y: Tensor) -> Tensor:
    if y.numel() == 0:
        return y
    x, made = _readable(x, moves), _written(y, moves)
    if not _launch(extension.task_conv_launch, *_told(call, moves), x, made):
        _done(_launch(extension.task_conv_launch, *_told(_evened(call), moves), x, made))
    return y if made is y else y.copy_(made)


def _backward(
    grad_out: Tensor, x: Tensor, call: TaskConvCall, moves: Moves, wanted: Sequence[bool], wanted_delta: Sequence[int]
) -> list[Tensor]:
    weights = call.weights
    together = _memory_together(weights, wanted_delta)
    found = empty_gradients(x, call, wanted, wanted_delta, together)
    if grad_out.numel() == 0:
        return [g.zero_() for g in found]
    left = iter(found)
    grad_x = next(left) if wanted[0] else None
    grad_weight = next(left) if wanted[1] and weights.weight is not None else None
    grads = [next(left) for _ in wanted_delta]
    grad_gate = next(left) if wanted[2] and weights.gate is not None else None
    grad_bias = next(left) if wanted[3] and call.bias is not None else None
    tasks = [weights.delta_tasks[k] for k in wanted_delta] if weights.delta_tasks else []
    made_x = None if grad_x is None else _written(grad_x, moves)
    given = (_readable(x, moves), _readable(grad_out, moves), made_x, grad_weight)
    launcher = extension.task_conv_launch_backward
    if not _launch(launcher, *_told(call, moves), *given, grads, tasks, grad_gate, grad_bias):
        made = _alike(grads) if tasks else grads
        told = _told(_evened(call), moves)
        _done(_launch(launcher, *told, *given, made, tasks, grad_gate, grad_bias))
        for grad, one in zip(grads, made, strict=True):
            if one is not grad:
                grad.copy_(one)
    if made_x is not grad_x:
        grad_x.copy_(made_x)
    return found


def _memory_together(weights: TaskWeights, wanted_delta: Sequence[int]) -> Tensor | None:
    """Memory for the gradients of a list of deltas that lie alike, `[K, ...]`: one allocation in place of K."""
    if not weights.delta_tasks or len(wanted_delta) < 2:
        return None
    first = weights.delta[wanted_delta[0]]
    strides = first.stride()
    last = is_channels_last(first)
    for k in wanted_delta:
        other = weights.delta[k]
        if other.stride() != strides and is_channels_last(other) != last:
            return None
    return torch.empty_strided(
        *_strided(len(wanted_delta), first.shape, last, first.dtype), dtype=first.dtype, device=first.device
    )


@functools.lru_cache(4096)
def _strided(count: int, shape: torch.Size, last: bool, dtype: torch.dtype) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and strides of gradients behind each other, each in the order of `like_parameter` and on 128 bytes."""
    order = torch.channels_last if last else torch.contiguous_format
    strides = torch.empty(shape, device="meta", memory_format=order).stride()
    line = 128 // dtype.itemsize
    return (count, *shape), (-(-shape.numel() // line) * line, *strides)


def _weight_grad(x: Tensor, grad_out: Tensor, batch: SortedBatch, moves: Moves, out: Tensor) -> None:
    if grad_out.numel() == 0:
        out.zero_()
        return
    none = None, [], [], None, None
    given = _readable(x, moves), _readable(grad_out, moves)
    batch = SortedBatch(batch.order.contiguous(), batch.offsets.contiguous())
    launcher = extension.task_conv_launch_backward
    _done(_launch(launcher, *none, *batch, moves, *given, None, None, [out], [], None, None))
