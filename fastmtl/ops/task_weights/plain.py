"""The layers by torch's own operators, and so by cuDNN and cuBLAS, on a GPU: where all samples see one weight, and
linear layers of several tasks by `torch._grouped_mm`.

Nothing here waits for the device, so all of it may be captured. Samples of no task, which the device alone knows, are
overwritten: with NaN in results, with zeros in copies of both operands of a weight gradient. Convolutions are asked for
algorithms of cuDNN that give the same bits each time.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtl.core.task_weights import Geometry, SortedBatch, TaskConvCall, TaskWeights
from fastmtl.core.tensors import memory_format

# of `torch._grouped_mm`: elements of 16 bytes, and fewer groups than this
_ALIGNED = 8
_MOST_GROUPS = 1024


def sees_one_weight(call: TaskConvCall) -> bool:
    """Whether there is nothing that differs between samples but whether they have a task."""
    tasks = call.batch.offsets.shape[0] - 1
    bias = call.bias
    return tasks == 1 or (not call.weights.delta and (bias is None or bias.dim() == 1))


def declines(
    product: str, x: Tensor, shape: Sequence[int], one_weight: bool, num_tasks: int, wider: bool
) -> str | None:
    """Why torch's operators are not asked for a product (`"forward"`, `"backward"`, `"weight_grad"`) of a layer; None:
    they may be.

    shape: of one weight; one_weight: as `sees_one_weight` says, and of weight gradients whether there is one task;
    wider: weights, or the weight gradients that are asked for, have more digits than x.
    """
    if x.dtype == torch.float16:
        return "its gradients of a weight are float16 before they meet a gate, and may be infinite there"
    if x.dtype != torch.bfloat16:
        return "what its float32 is depends on a setting of the process"
    if wider and product != "forward":
        return "its gradients of a weight have the digits of x alone"
    if x.numel() == 0 or min(shape) < 1:
        return "there is nothing to multiply"
    if one_weight:
        return None
    if len(shape) != 2:
        return "it has no convolution of several weights"
    if shape[0] % _ALIGNED or shape[1] % _ALIGNED:
        return "its products in groups take channels in multiples of 8"
    if num_tasks >= _MOST_GROUPS:
        return "its products in groups take less than 1024 groups"
    if x.shape[:-1].numel() >= 1 << 31:
        return "its products in groups take less than 2^31 rows"
    if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] not in (9, 10):
        return "its products in groups wait for the host but on sm_90 and sm_100"
    return None


def conv2d(x: Tensor, call: TaskConvCall) -> Tensor:
    """Forward, where all samples see one weight: `[N, Cout, Ho, Wo]`, NaN for samples of no task."""
    bias = None if call.bias is None else call.bias.reshape(-1).to(x.dtype)
    with _SAME_BITS:
        y = F.conv2d(x, _one_weight(call, x.dtype), bias, *call.geometry)
    y.masked_fill_(_without_task(call.batch)[:, None, None, None], torch.nan)
    return y.contiguous(memory_format=memory_format(x))


def conv2d_backward(
    grad_out: Tensor, x: Tensor, call: TaskConvCall, wanted: Sequence[bool], wanted_delta: Sequence[int]
) -> list[Tensor]:
    """The gradients of x, weight, deltas, gate and bias, of these the wanted ones; as the reference gives them."""
    of_filter = _wants_filter(call, wanted, wanted_delta)
    no_task = _without_task(call.batch)[:, None, None, None]
    grad_out = grad_out.masked_fill(no_task, 0)
    grad_x, grad_eff, _ = _conv_backward(
        grad_out, x.masked_fill(no_task, 0) if of_filter else x, _one_weight(call, x.dtype), call.geometry,
        wanted[0], of_filter,
    )  # fmt: skip
    if wanted[0]:
        grad_x = grad_x.masked_fill_(no_task, torch.nan).contiguous(memory_format=memory_format(x))
    sums = grad_out.sum((0, 2, 3), dtype=torch.float32)[None] if _wants_bias(call, wanted) else None
    return _gradients(call, grad_x, None if grad_eff is None else grad_eff[None], sums, wanted, wanted_delta)


def conv2d_weight_grad(x: Tensor, grad_out: Tensor, batch: SortedBatch, geometry: Geometry, out: Tensor) -> None:
    """The one task's gradient of a filter into out, `[1, Cout, Cin / groups, kh, kw]` of any strides."""
    no_task = _without_task(batch)[:, None, None, None]
    grad_out, x = grad_out.masked_fill(no_task, 0), x.masked_fill(no_task, 0)
    _, grad, _ = _conv_backward(grad_out, x, x.new_empty(out.shape[1:]), geometry, False, True)
    out[0].copy_(grad)


def linear(x: Tensor, call: TaskConvCall) -> Tensor:
    """Forward: `[..., Cout]`, NaN for samples of no task."""
    size = (*x.shape[:-1], call.weights.shape[0])
    if sees_one_weight(call):
        bias = None if call.bias is None else call.bias.reshape(-1).to(x.dtype)
        y = F.linear(x, _one_weight(call, x.dtype), bias).reshape(size)
        _samples(y, call.batch).masked_fill_(_without_task(call.batch)[:, None, None], torch.nan)
        return y
    rows = _Rows(x, call.batch)
    made = rows.product(rows.sorted(x), _staged(call, x.dtype).mT)
    if call.bias is not None:
        bias = call.bias.to(x.dtype)
        made += bias if bias.dim() == 1 else bias.index_select(0, rows.task)
    return rows.unsorted(made.masked_fill_(rows.no_task[:, None], torch.nan)).reshape(size)


def linear_backward(
    grad_out: Tensor, x: Tensor, call: TaskConvCall, wanted: Sequence[bool], wanted_delta: Sequence[int]
) -> list[Tensor]:
    of_filter = _wants_filter(call, wanted, wanted_delta)
    grad_x = grad_eff = sums = None
    if sees_one_weight(call):
        no_task = _without_task(call.batch)[:, None, None]
        rows_of = [_samples(y, call.batch) for y in (grad_out, x)]
        g, inputs = (y.masked_fill(no_task, 0).flatten(0, 1) for y in rows_of)
        if wanted[0]:
            grad_x = _samples(g @ _one_weight(call, x.dtype), call.batch)
            grad_x = grad_x.masked_fill_(no_task, torch.nan).reshape(x.shape)
            grad_x = grad_x.contiguous(memory_format=memory_format(x))
        if of_filter:
            grad_eff = (g.mT @ inputs)[None]
        if _wants_bias(call, wanted):
            sums = g.sum(0, dtype=torch.float32)[None]
        return _gradients(call, grad_x, grad_eff, sums, wanted, wanted_delta)
    rows = _Rows(x, call.batch)
    g = rows.sorted(grad_out)
    if wanted[0]:
        made = rows.product(g, _staged(call, x.dtype))
        grad_x = rows.unsorted(made.masked_fill_(rows.no_task[:, None], torch.nan)).reshape(x.shape)
        grad_x = grad_x.contiguous(memory_format=memory_format(x))
    if of_filter:
        grad_eff = rows.weight_grads(g, rows.sorted(x))
    if _wants_bias(call, wanted):
        sums = rows.sums(g)
    return _gradients(call, grad_x, grad_eff, sums, wanted, wanted_delta)


def linear_weight_grad(x: Tensor, grad_out: Tensor, batch: SortedBatch, geometry: Geometry, out: Tensor) -> None:
    """Each task's gradient of a shared matrix into out, `[T, Cout, Cin]` of any strides."""
    if batch.num_tasks == 1:
        no_task = _without_task(batch)[:, None, None]
        g, inputs = (_samples(y, batch).masked_fill(no_task, 0).flatten(0, 1) for y in (grad_out, x))
        out[0].copy_(g.mT @ inputs)
        return
    rows = _Rows(x, batch)
    out.copy_(rows.weight_grads(rows.sorted(grad_out), rows.sorted(x)))


# --- one weight


def _without_task(batch: SortedBatch) -> Tensor:
    """`[N]`: whether a sample has no task."""
    order, offsets = batch
    places = torch.arange(order.shape[0], device=order.device)
    return torch.empty_like(order, dtype=torch.bool).scatter_(0, order, places >= offsets[-1])


def _samples(x: Tensor, batch: SortedBatch) -> Tensor:
    """`[..., C]` as `[N, R, C]`."""
    return x.reshape(batch.order.shape[0], -1, x.shape[-1])


def _one_weight(call: TaskConvCall, dtype: torch.dtype) -> Tensor:
    """W, or W + s Delta of the one task, in `dtype`, added in float32."""
    weights = call.weights
    if not weights.delta:
        assert weights.weight is not None
        return weights.weight.to(dtype)
    return _staged(call, dtype)[0]


def _conv_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, of_x: bool, of_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    stride, padding, dilation, groups = geometry
    wanted = [of_x, of_weight, False]
    with _SAME_BITS:
        return torch.ops.aten.convolution_backward(
            grad_out, x, weight, None, stride, padding, dilation, False, [0, 0], groups, wanted
        )


class _Deterministic:
    """Inside the block cuDNN takes no algorithm whose sums have another order each time.

    All threads of a process share that setting: the first one inside keeps what it was, and the last puts it back.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside, self.before = 0, False

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.before = torch._C._get_cudnn_deterministic()
            self.inside += 1
            torch._C._set_cudnn_deterministic(True)

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                torch._C._set_cudnn_deterministic(self.before)


_SAME_BITS = _Deterministic()


# --- several weights


class _Rows:
    """The rows of a linear layer in the order of their tasks; R of each sample."""

    def __init__(self, x: Tensor, batch: SortedBatch) -> None:
        self.batch = batch
        count = x.shape[:-1].numel()
        # where each task ends, in rows
        ends = batch.offsets[1:] * (count // batch.order.shape[0])
        self.ends = ends.to(torch.int32)
        self.present = batch.offsets.diff() > 0
        places = torch.arange(count, device=x.device)
        self.no_task = places >= ends[-1]
        self.task = torch.searchsorted(ends, places, right=True).clamp_(max=batch.num_tasks - 1)

    def sorted(self, x: Tensor) -> Tensor:
        return _samples(x, self.batch).index_select(0, self.batch.order).flatten(0, 1)

    def unsorted(self, rows: Tensor) -> Tensor:
        samples = _samples(rows, self.batch)
        return torch.empty_like(samples).index_copy_(0, self.batch.order, samples)

    def product(self, rows: Tensor, weights: Tensor) -> Tensor:
        """`[M, C]` with each task's `[T, C, D]`; what rows of no task get is not said."""
        return torch._grouped_mm(rows, weights, offs=self.ends)

    def weight_grads(self, grad_out: Tensor, x: Tensor) -> Tensor:
        """`[T, Cout, Cin]`; zero for a task without samples."""
        found = torch._grouped_mm(grad_out.mT, x, offs=self.ends)
        return found.masked_fill_(~self.present[:, None, None], 0)

    def sums(self, rows: Tensor) -> Tensor:
        """`[T, C]` float32: of each task's rows."""
        tasks = torch.arange(self.batch.num_tasks, device=rows.device)
        # each number is exact in a product of tf32, too
        of_task = (self.task == tasks[:, None]).float()
        return of_task @ rows.float().masked_fill_(self.no_task[:, None], 0)


def _staged(call: TaskConvCall, dtype: torch.dtype) -> Tensor:
    """`W + s_t Delta_t` of all tasks, `[T, ...]`, in `dtype`, added in float32."""
    weight, delta, _, gate = call.weights
    tasks = call.batch.num_tasks
    wide = torch.promote_types(call.weights.like.dtype, torch.float32)
    if not delta:
        return weight.to(dtype).expand(tasks, *weight.shape).contiguous()
    found = _stacked(call.weights, tasks).to(wide)
    if gate is not None:
        s = gate.to(wide).reshape(-1, *[1] * (found.dim() - 1))
        # a closed gate's delta may be anything
        found = torch.where(s == 0, 0.0, s * found)
        for task in _without_delta(call.weights, tasks):
            found[task].zero_()  # whatever its gate is
    return (found if weight is None else found + weight).to(dtype).contiguous()


def _stacked(weights: TaskWeights, num_tasks: int) -> Tensor:
    """The deltas, `[T, ...]`; zeros of a task that has none."""
    if weights.stacked:
        return weights.delta[0]
    nothing = torch.zeros_like(weights.delta[0])
    return torch.stack([nothing if d is None else d for d in weights.by_task(num_tasks)])


def _without_delta(weights: TaskWeights, num_tasks: int) -> list[int]:
    """The tasks of a list that have no delta."""
    if weights.stacked:
        return []
    return [task for task, d in enumerate(weights.by_task(num_tasks)) if d is None]


# --- gradients


def _wants_filter(call: TaskConvCall, wanted: Sequence[bool], wanted_delta: Sequence[int]) -> bool:
    of_gate = wanted[2] and call.weights.gate is not None and bool(call.weights.delta)
    return (wanted[1] and call.weights.weight is not None) or of_gate or len(wanted_delta) > 0


def _wants_bias(call: TaskConvCall, wanted: Sequence[bool]) -> bool:
    return wanted[3] and call.bias is not None


def _gradients(
    call: TaskConvCall,
    grad_x: Tensor | None,
    grad_eff: Tensor | None,
    sums: Tensor | None,
    wanted: Sequence[bool],
    wanted_delta: Sequence[int],
) -> list[Tensor]:
    """What a backward op returns.

    grad_eff: `[T, ...]`, each task's gradient of its weight, zero where it has no samples; or `[1, ...]`, of all
    samples together, where no task has a delta. sums: the same of grad_out by channel, in float32.
    """
    (weight, delta, delta_tasks, gate), (_, offsets), _, bias = call
    tasks = offsets.shape[0] - 1
    out = [grad_x] if wanted[0] else []
    if wanted[1] and weight is not None:
        found = grad_eff[0] if grad_eff.shape[0] == 1 else grad_eff.sum(0, dtype=torch.float32)
        out.append(found.to(weight.dtype).contiguous(memory_format=memory_format(weight)))
    if wanted_delta:
        if gate is None:
            # memory of its own, beside the weight's
            scaled = grad_eff.clone() if grad_eff.shape[0] == 1 else grad_eff
        else:
            s = gate.float().reshape(-1, *[1] * (grad_eff.dim() - 1))
            # of a task without samples not even its gate is read
            absent = (offsets.diff() == 0).reshape(s.shape)
            scaled = torch.where(absent | (s == 0), 0.0, s * grad_eff)
        for k in wanted_delta:
            if call.weights.stacked:
                out.append(scaled.to(delta[k].dtype).contiguous())
            else:
                d = delta[k]
                out.append(scaled[delta_tasks[k]].to(d.dtype).contiguous(memory_format=memory_format(d)))
    if wanted[2] and gate is not None:
        if delta:
            products = (grad_eff.float() * _stacked(call.weights, tasks)).flatten(1).sum(1)
            for task in _without_delta(call.weights, tasks):
                products[task].zero_()
            out.append(torch.where(offsets.diff() == 0, 0.0, products).to(gate.dtype))
        else:
            out.append(torch.zeros_like(gate))
    if _wants_bias(call, wanted):
        out.append((sums if bias.dim() == 2 else sums.sum(0)).to(bias.dtype).contiguous())
    return out
