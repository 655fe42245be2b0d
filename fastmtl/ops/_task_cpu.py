"""Per-task weights on the CPU: the batch in segments of one weight each.

Segments with many rows (output pixels) go through torch's own convolution: oneDNN is hard to beat, and what costs is
around it. One scratch weight holds `W + s_t Delta_t` of one task at a time, tasks that see W itself are one segment,
samples are copied only where calls on the runs in which they lie would cost more, and the weight gradient of a task is
spread over dDelta, dW and the gate while it is in the cache. Segments with few rows are bound by the weights, which
oneDNN would reorder first: they go through `csrc/cpu/task_conv.cpp`, which reads each weight once and copies no sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtl._library import define_kernel
from fastmtl.ops._task import Geometry, TaskWeights, is_channels_last, memory_format

_rows_kernel = define_kernel(
    "_task_conv2d_rows(Tensor x, Tensor? weight, Tensor? delta, float gate, Tensor? bias, int[] samples, "
    "int[] geometry, Tensor(a!) y) -> ()"
)
_rows_backward_kernel = define_kernel(
    "_task_conv2d_rows_backward(Tensor grad_out, Tensor x, Tensor? weight, Tensor? delta, float gate, int[] samples, "
    "int[] geometry, Tensor(a!)? grad_x, Tensor(b!)? grad_weight, bool add, Tensor(c!)? grad_delta, "
    "Tensor(d!)? grad_gate) -> ()"
)
_advise_huge_pages = define_kernel("_advise_huge_pages(Tensor(a!) x) -> ()")

# what decides between copying the samples of a segment together and one call per run of neighbours:
# bytes that could be copied while torch and oneDNN prepare one more call
CALL_BYTES = 1_000_000
# passes over the weight that such a call makes before it multiplies: oneDNN reorders it, and reads it
WEIGHT_PASSES = 3
# a segment of at most so many rows goes through the direct product; docs/task-kernels-cpu.md has the figures
FORWARD_ROWS = 96
INPUT_GRADIENT_ROWS = 64
# the weight gradient, by the memory order of the weights: oneDNN is slow for few rows in channels_last
WEIGHT_GRADIENT_ROWS = {True: 256, False: 128}
# results from this size on ask for huge pages
HUGE_BYTES = 4 << 20


class Segment(NamedTuple):
    """Samples that see one weight.

    `task`: whose `W + s_t Delta_t`; None: W itself. `samples`: ascending positions in the batch.
    """

    task: int | None
    samples: np.ndarray

    @property
    def runs(self) -> list[tuple[int, int]]:
        """Neighbours in the batch, as (first, end)."""
        s = self.samples
        if s[-1] - s[0] + 1 == len(s):
            return [(int(s[0]), int(s[-1]) + 1)]
        cuts = np.flatnonzero(np.diff(s) != 1) + 1
        return [(int(part[0]), int(part[-1]) + 1) for part in np.split(s, cuts)]


class Batch:
    """A batch cut by task; everything here is on the host."""

    def __init__(self, weights: TaskWeights, order: Tensor, offsets: Tensor) -> None:
        self.num_tasks = offsets.shape[0] - 1
        self.deltas = weights.by_task(self.num_tasks)
        self.gates = None if weights.gate is None else weights.gate.detach().tolist()
        self._positions = order.numpy()
        self._bounds = offsets.tolist()
        self.present = [t for t in range(self.num_tasks) if self._bounds[t + 1] > self._bounds[t]]

    def samples(self, tasks: Sequence[int]) -> np.ndarray:
        parts = [self._positions[self._bounds[t] : self._bounds[t + 1]] for t in tasks]
        return parts[0] if len(parts) == 1 else np.sort(np.concatenate(parts))

    def gate(self, task: int) -> float:
        return 1.0 if self.gates is None else self.gates[task]

    def is_open(self, task: int) -> bool:
        """Whether the task sees its Delta. A gate that is NaN is open."""
        return self.deltas[task] is not None and self.gate(task) != 0

    def segments(self) -> list[Segment]:
        """One per task that sees its Delta, and one for all others."""
        found = [Segment(t, self.samples([t])) for t in self.present if self.is_open(t)]
        shared = [t for t in self.present if not self.is_open(t)]
        if shared:
            found.append(Segment(None, self.samples(shared)))
        return found


class Stage:
    """The one scratch weight."""

    def __init__(self, weights: TaskWeights, batch: Batch, dtype: torch.dtype) -> None:
        self.weights, self.batch, self.dtype = weights, batch, dtype
        self._scratch: Tensor | None = None

    def weight(self, task: int | None) -> Tensor | None:
        """`W + s_t Delta_t` in the dtype of x, valid until the next call; W for None; None where that is zero."""
        base = self.weights.weight
        if task is None:
            return None if base is None else base.detach().to(self.dtype)
        delta, gate = self.batch.deltas[task], self.batch.gate(task)
        assert delta is not None
        delta = delta.detach()
        if base is None and gate == 1:
            return delta.to(self.dtype)
        if self._scratch is None:
            like = delta if base is None else base
            self._scratch = torch.empty_like(like, dtype=self.dtype, requires_grad=False)
        if base is None:
            return torch.mul(delta, gate, out=self._scratch)
        return torch.add(base.detach(), delta, alpha=gate, out=self._scratch)


class Direct:
    """The direct product for segments with few rows: one group, all weights dense in one memory order.

    It computes in float32; samples in 16 bits are widened first, once for all segments.
    """

    def __init__(self, x: Tensor, weights: TaskWeights, batch: Batch, geometry: Geometry, pixels: int) -> None:
        self.pixels, self.batch = pixels, batch
        self.last = is_channels_last(weights.like)
        kernel = weights.shape[2:]
        self.geometry = [*kernel, *geometry.stride, *geometry.padding, *geometry.dilation, int(self.last)]
        self.serves = geometry.groups == 1 and x.numel() > 0 and torch.float64 not in (x.dtype, weights.like.dtype)
        self.weight: Tensor | None = None
        if self.serves and weights.weight is not None:
            self.weight = self.rows(weights.weight)
            self.serves = self.weight is not None
        self._wide: dict[int, tuple[Tensor, Tensor]] = {}

    def rows(self, w: Tensor) -> Tensor | None:
        """`[Cout, Cin kh kw]` in the order of memory; None if `w` is not dense in the common order."""
        w = w.detach()
        w = w.permute(0, 2, 3, 1) if self.last else w
        return w.view(w.shape[0], -1) if w.is_contiguous() else None

    def as_filter(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """Rows back as `[Cout, Cin, kh, kw]`."""
        out, channels, height, width = shape
        if self.last:
            return rows.view(out, height, width, channels).permute(0, 3, 1, 2)
        return rows.view(out, channels, height, width)

    def _delta(self, task: int | None) -> Tensor | None:
        if task is None:
            return None
        delta = self.batch.deltas[task]
        assert delta is not None
        return self.rows(delta)

    def takes(self, segment: Segment, limit: int) -> bool:
        """Whether the segment has few rows, a weight at all, and that as rows."""
        if not self.serves or len(segment.samples) * self.pixels > limit:
            return False
        return self.weight is not None if segment.task is None else self._delta(segment.task) is not None

    def _weights(self, segment: Segment) -> tuple[Tensor | None, Tensor | None, float]:
        gate = 1.0 if segment.task is None else self.batch.gate(segment.task)
        return self.weight, self._delta(segment.task), gate

    def _in_float32(self, x: Tensor, copy: bool = True) -> Tensor:
        if x.dtype == torch.float32:
            return x
        if id(x) not in self._wide:
            wide = torch.empty_like(x, dtype=torch.float32, requires_grad=False)
            self._wide[id(x)] = x, wide.copy_(x) if copy else wide
        return self._wide[id(x)][1]

    def _put(self, wide: Tensor, out: Tensor, segment: Segment) -> None:
        if wide is not out:
            for first, end in segment.runs:
                out[first:end].copy_(wide[first:end])

    def forward(self, segment: Segment, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
        """Into the samples of y."""
        wide = self._in_float32(y, copy=False)
        bias = None if bias is None else bias.to(torch.float32).contiguous()
        samples = segment.samples.tolist()
        _rows_kernel(self._in_float32(x), *self._weights(segment), bias, samples, self.geometry, wide)
        self._put(wide, y, segment)

    def input_gradient(self, segment: Segment, grad_out: Tensor, x: Tensor, grad_x: Tensor) -> None:
        """Into the samples of grad_x."""
        wide = self._in_float32(grad_x, copy=False)
        sides = self._in_float32(grad_out), self._in_float32(x)
        none = None, False, None, None
        samples = segment.samples.tolist()
        _rows_backward_kernel(*sides, *self._weights(segment), samples, self.geometry, wide, *none)
        self._put(wide, grad_x, segment)

    def weight_gradient(
        self,
        segment: Segment,
        grad_out: Tensor,
        x: Tensor,
        weight: Tensor | None,
        add: bool,
        delta: Tensor | None,
        gate: Tensor | None,
    ) -> None:
        """Into `weight` (added with `add`), `delta` and one element of the gate's gradient, those that are given."""
        sides = self._in_float32(grad_out), self._in_float32(x)
        samples = segment.samples.tolist()
        total = None if weight is None else self.rows(weight)
        own = None if delta is None else self.rows(delta)
        if delta is not None and own is None:
            # dDelta_t is wanted in another memory order than the weights have
            own = torch.empty(delta.shape[0], delta[0].numel(), dtype=delta.dtype)
        targets = None, total, add, own, gate
        _rows_backward_kernel(*sides, *self._weights(segment), samples, self.geometry, *targets)
        if delta is not None and own is not None and own.data_ptr() != delta.data_ptr():
            delta.copy_(self.as_filter(own, delta.shape))


def fresh(shape: Sequence[int], like: Tensor) -> Tensor:
    """Memory for a result like x."""
    y = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format(like))
    if y.nbytes >= HUGE_BYTES:
        _advise_huge_pages(y)
    return y


# --- samples as rows of memory


def dense_samples(x: Tensor) -> Tensor:
    """x, each sample without gaps in NCHW or channels_last order; copied only if it is not so."""
    _, c, h, w = x.shape
    plain, last = (c * h * w, h * w, w, 1), (c * h * w, 1, w * c, c)
    wanted = last if is_channels_last(x) else plain
    if all(x.shape[d] == 1 or x.stride(d) == wanted[d] for d in (1, 2, 3)):
        return x
    return x.contiguous(memory_format=memory_format(x))


def _rows(x: Tensor) -> Tensor:
    """`[N, C H W]`, a view of dense samples in the order of memory."""
    n = x.shape[0]
    width = x.numel() // n
    return x.as_strided((n, width), (x.stride(0) if n > 1 else width, 1))


def _like_rows(rows: Tensor, x: Tensor) -> Tensor:
    """Rows of dense samples back as pictures in the memory order of x."""
    c, h, w = x.shape[1:]
    strides = (1, w * c, c) if is_channels_last(x) else (h * w, w, 1)
    return rows.as_strided((rows.shape[0], c, h, w), (rows.stride(0) if rows.shape[0] > 1 else c * h * w, *strides))


def _worth_gathering(segment: Segment, runs: int, sample_bytes: int, weight_bytes: int) -> bool:
    copied = 2 * sample_bytes * len(segment.samples)
    return (runs - 1) * (CALL_BYTES + WEIGHT_PASSES * weight_bytes) > copied


class Cut(NamedTuple):
    """A part of a segment that is one call: a slice of the batch, or samples to gather."""

    first: int
    end: int
    samples: Tensor | None  # positions, if they are to be gathered

    def take(self, x: Tensor) -> Tensor:
        if self.samples is None:
            return x[self.first : self.end]
        return _like_rows(_rows(x).index_select(0, self.samples), x)

    def put(self, result: Tensor, out: Tensor) -> None:
        """Into the samples of `out`; both dense, in one memory order."""
        if self.samples is None:
            out[self.first : self.end].copy_(result)
            return
        source, target = _rows(result.contiguous(memory_format=memory_format(out))), _rows(out)
        target.index_copy_(0, self.samples, source)

    def fill(self, out: Tensor) -> None:
        """Zeros in the samples of `out`."""
        if self.samples is None:
            out[self.first : self.end].zero_()
        else:
            out.index_fill_(0, self.samples, 0)


def cuts(segment: Segment, sample_bytes: int, weight_bytes: int) -> Iterator[Cut]:
    runs = segment.runs
    if len(runs) > 1 and _worth_gathering(segment, len(runs), sample_bytes, weight_bytes):
        yield Cut(0, 0, torch.from_numpy(segment.samples))
        return
    for first, end in runs:
        yield Cut(first, end, None)


# --- the ops


def conv2d(
    x: Tensor, weights: TaskWeights, bias: Tensor | None, order: Tensor, offsets: Tensor, geometry: Geometry
) -> Tensor:
    """`task_conv2d`; see there."""
    shape = weights.shape
    size = (x.shape[0], shape[0], *geometry.output_size(x.shape[2:], shape[2:]))
    y = fresh(size, x)
    if y.numel() == 0:
        return y
    batch = Batch(weights, order, offsets)
    stage = Stage(weights, batch, x.dtype)
    direct = Direct(x, weights, batch, geometry, size[2] * size[3])
    x = dense_samples(x.detach())
    shared_bias = None if bias is None or bias.dim() == 2 else bias.detach().to(x.dtype)
    weight_bytes = shape.numel() * x.element_size()
    for segment in batch.segments():
        own_bias = shared_bias
        if bias is not None and bias.dim() == 2 and segment.task is not None:
            own_bias = bias[segment.task].detach().to(x.dtype)
        if direct.takes(segment, FORWARD_ROWS):
            direct.forward(segment, x, own_bias, y)
            if bias is not None and segment.task is None and bias.dim() == 2:
                _add_bias(y, bias.detach(), batch, segment)
            continue
        w = stage.weight(segment.task)
        for cut in cuts(segment, _sample_bytes(x, y), weight_bytes):
            if w is None:
                cut.fill(y)
            else:
                cut.put(F.conv2d(cut.take(x), w, own_bias, *geometry), y)
        if bias is not None and (w is None or (segment.task is None and bias.dim() == 2)):
            _add_bias(y, bias.detach(), batch, segment)
    return y


def _sample_bytes(x: Tensor, y: Tensor) -> int:
    return (x[0].numel() + y[0].numel()) * x.element_size()


def _add_bias(y: Tensor, bias: Tensor, batch: Batch, segment: Segment) -> None:
    """To the samples of a segment of several tasks, each its own."""
    members = [segment.task] if segment.task is not None else [t for t in batch.present if not batch.is_open(t)]
    for t in members:
        row = (bias if bias.dim() == 1 else bias[t]).to(y.dtype)[:, None, None]
        for first, end in Segment(t, batch.samples([t])).runs:
            y[first:end] += row


def conv2d_backward(
    grad_out: Tensor,
    x: Tensor,
    weights: TaskWeights,
    bias: Tensor | None,
    order: Tensor,
    offsets: Tensor,
    geometry: Geometry,
    wanted: Sequence[bool],
    wanted_delta: Sequence[int],
) -> list[Tensor]:
    """`task_conv2d_backward`; see there."""
    want_x, want_weight = wanted[0], wanted[1] and weights.weight is not None
    want_gate, want_bias = wanted[2] and weights.gate is not None, wanted[3] and bias is not None
    batch = Batch(weights, order, offsets)
    empty = grad_out.numel() == 0 or x.numel() == 0
    if empty:
        batch.present = []
    grads = Gradients(x, weights, batch, want_weight, wanted_delta, want_gate)
    grad_x = None
    if want_x:
        grad_x = fresh(x.shape, x)
    if not empty:
        like = memory_format(x)
        # dx and dW of a segment are one call: both sides in one memory order
        grad_out = dense_samples(grad_out.detach().contiguous(memory_format=like))
        x = dense_samples(x.detach())
        _walk(grad_out, x, weights, batch, geometry, grad_x, grads)
    elif grad_x is not None:
        grad_x.zero_()
    out = [] if grad_x is None else [grad_x]
    out += grads.collect()
    if want_bias:
        assert bias is not None
        out.append(_bias_gradient(grad_out, bias, batch))
    return out


def _walk(
    grad_out: Tensor,
    x: Tensor,
    weights: TaskWeights,
    batch: Batch,
    geometry: Geometry,
    grad_x: Tensor | None,
    grads: Gradients,
) -> None:
    """One walk over the segments for dx, and for the weight gradients of the tasks that need one of their own."""
    stage = Stage(weights, batch, x.dtype)
    direct = Direct(x, weights, batch, geometry, grad_out.shape[2] * grad_out.shape[3])
    weight_bytes = weights.shape.numel() * x.element_size()
    sample_bytes = _sample_bytes(x, grad_out)
    alone = grads.alone
    # the samples whose weight gradient goes into dW alone
    rest = [t for t in batch.present if t not in alone] if grads.weight is not None else []
    done: set[int] = set()
    for segment in batch.segments():
        members = [segment.task] if segment.task is not None else [t for t in batch.present if not batch.is_open(t)]
        own = segment.task is not None and segment.task in alone
        joint = segment.task is None and members == rest
        want_x = grad_x is not None
        want_weight = own or (joint and weights.weight is not None)
        if own and direct.takes(segment, WEIGHT_GRADIENT_ROWS[direct.last]):
            grads.spread_direct(segment, direct, grad_out, x)
            done.add(segment.task)
            want_weight = own = False
        if grad_x is not None and not want_weight and direct.takes(segment, INPUT_GRADIENT_ROWS):
            direct.input_gradient(segment, grad_out, x, grad_x)
            want_x = False
        if not want_x and not want_weight:
            continue
        w = stage.weight(segment.task)
        for cut in cuts(segment, sample_bytes, weight_bytes):
            if w is None:
                cut.fill(grad_x)
                continue
            gx, gw = convolution_backward(cut.take(grad_out), cut.take(x), w, geometry, want_x, want_weight)
            if want_x:
                cut.put(gx, grad_x)
            if own:
                grads.hold(gw)
            elif want_weight:
                grads.add_to_weight(gw)
        if own:
            grads.spread(segment.task)
            done.add(segment.task)
        elif want_weight:
            rest = []
    like = weights.like.detach().to(x.dtype)
    for t in sorted(alone - done):
        # closed, and only its gate wants to know
        segment = Segment(t, batch.samples([t]))
        if direct.takes(segment, WEIGHT_GRADIENT_ROWS[direct.last]):
            grads.spread_direct(segment, direct, grad_out, x)
            continue
        for cut in cuts(segment, sample_bytes, weight_bytes):
            grads.hold(convolution_backward(cut.take(grad_out), cut.take(x), like, geometry, False, True)[1])
        grads.spread(t)
    if rest:
        everything = len(rest) == len(batch.present)
        whole = np.arange(x.shape[0]) if everything else batch.samples(rest)
        for cut in cuts(Segment(None, whole), sample_bytes, weight_bytes):
            gw = convolution_backward(cut.take(grad_out), cut.take(x), like, geometry, False, True)[1]
            grads.add_to_weight(gw)


def convolution_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, want_x: bool, want_weight: bool
) -> tuple[Tensor, Tensor]:
    found = torch.ops.aten.convolution_backward(
        grad_out,
        x,
        weight,
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        False,
        (0, 0),
        geometry.groups,
        (want_x, want_weight, False),
    )
    return found[0], found[1]


def _bias_gradient(grad_out: Tensor, bias: Tensor, batch: Batch) -> Tensor:
    wide = torch.promote_types(grad_out.dtype, torch.float32)
    if bias.dim() == 1:
        return grad_out.sum((0, 2, 3), dtype=wide).to(bias.dtype)
    each = grad_out.sum((2, 3), dtype=wide)
    total = torch.zeros(bias.shape, dtype=wide)
    for t in batch.present:
        samples = batch.samples([t])
        total[t] = each[torch.from_numpy(samples)].sum(0)
    return total.to(bias.dtype)


class Gradients:
    """dW, the wanted dDelta and the gate's gradient, filled task by task."""

    def __init__(
        self,
        x: Tensor,
        weights: TaskWeights,
        batch: Batch,
        want_weight: bool,
        wanted_delta: Sequence[int],
        want_gate: bool,
    ) -> None:
        from fastmtl.ops.task_conv2d import like_parameter, like_stacked

        self.batch, self.weights = batch, weights
        self.wide = torch.promote_types(weights.like.dtype, torch.float32)
        self.weight: Tensor | None = None
        if want_weight:
            assert weights.weight is not None
            # summed in at least float32
            self.weight = like_parameter(weights.weight.detach().to(self.wide))
        self._weight_empty = True
        self.gate = torch.zeros(batch.num_tasks, dtype=self.wide) if want_gate else None
        present = set(batch.present)
        self._stacked: Tensor | None = None
        self._slots: dict[int, int] = {}  # task -> place in the list
        self._list: list[Tensor | None] = [None] * len(wanted_delta)
        self._likes: list[Tensor] = []
        if wanted_delta and weights.stacked:
            self._stacked = like_stacked(weights.delta[0])
            if self._stacked.nbytes >= HUGE_BYTES:
                _advise_huge_pages(self._stacked)
            wanted_tasks = list(range(batch.num_tasks))
        else:
            wanted_tasks = [weights.delta_tasks[k] for k in wanted_delta]
            self._slots = {t: k for k, t in enumerate(wanted_tasks)}
            self._likes = [weights.delta[k] for k in wanted_delta]
        self._wanted = {t for t in wanted_tasks if t in present and batch.is_open(t)}
        gated = {t for t in present if batch.deltas[t] is not None} if want_gate else set()
        # the tasks that need a weight gradient of their own
        self.alone = self._wanted | gated
        self._held: Tensor | None = None
        if self._stacked is not None:
            for t in range(batch.num_tasks):
                if t not in self._wanted:
                    self._stacked[t].zero_()
        for t, k in self._slots.items():
            if t not in self._wanted:
                self._list[k] = like_parameter(self._likes[k]).zero_()

    def hold(self, grad: Tensor) -> None:
        """One task's weight gradient, or a part of it, until it is spread."""
        if self._held is None:
            self._held = grad
        else:
            # parts of 16-bit samples are rounded once each, their sum is not
            self._held = self._held.to(self.wide).add_(grad)

    def add_to_weight(self, grad: Tensor) -> None:
        assert self.weight is not None
        if self._weight_empty:
            self.weight.copy_(grad)
            self._weight_empty = False
        else:
            self.weight.add_(grad)

    def spread_direct(self, segment: Segment, direct: Direct, grad_out: Tensor, x: Tensor) -> None:
        """One task's weight gradient by the direct product, over dW, dDelta_t and the gate as it is made."""
        task = segment.task
        assert task is not None
        direct.weight_gradient(
            segment,
            grad_out,
            x,
            self.weight,
            not self._weight_empty,
            self._target(task) if task in self._wanted else None,
            None if self.gate is None else self.gate[task : task + 1],
        )
        self._weight_empty = self._weight_empty and self.weight is None

    def _target(self, task: int) -> Tensor:
        """Memory for dDelta_t."""
        if self._stacked is not None:
            return self._stacked[task]
        from fastmtl.ops.task_conv2d import like_parameter

        k = self._slots[task]
        self._list[k] = like_parameter(self._likes[k])
        return self._list[k]

    def spread(self, task: int) -> None:
        """What is held, over dW, dDelta_t and the gate."""
        grad, self._held = self._held, None
        assert grad is not None
        if self.weight is not None:
            self.add_to_weight(grad)
        if self.gate is not None:
            delta = self.batch.deltas[task]
            assert delta is not None
            self.gate[task] = (grad.to(self.wide) * delta.detach().to(self.wide)).sum()
        if task not in self._wanted:
            return
        gate = self.batch.gate(task)
        if self._stacked is None and gate == 1:
            k = self._slots[task]
            like = self._likes[k]
            if grad.dtype == like.dtype and grad.is_contiguous(memory_format=memory_format(like)):
                # the gradient itself; nobody else holds it
                self._list[k] = grad
                return
        # in the dtype of the weights, which may be wider than that of x
        target = self._target(task)
        torch.mul(grad.to(target.dtype), gate, out=target)

    def collect(self) -> list[Tensor]:
        out: list[Tensor] = []
        if self.weight is not None:
            if self._weight_empty:
                self.weight.zero_()
            assert self.weights.weight is not None
            out.append(self.weight.to(self.weights.weight.dtype))
        if self._stacked is not None:
            out.append(self._stacked)
        out += [g for g in self._list if g is not None]
        if self.gate is not None:
            assert self.weights.gate is not None
            out.append(self.gate.to(self.weights.gate.dtype))
        return out


def weight_grad(x: Tensor, grad_out: Tensor, order: Tensor, offsets: Tensor, geometry: Geometry, out: Tensor) -> None:
    """`task_conv2d_weight_grad_out`; see there."""
    if not (x.numel() and grad_out.numel() and out.numel()):
        out.zero_()
        return
    bounds, positions = offsets.tolist(), order.numpy()
    x = dense_samples(x.detach())
    grad_out = dense_samples(grad_out.detach().contiguous(memory_format=memory_format(x)))
    # only its shape and memory order are read
    like = torch.empty(out.shape[1:], dtype=x.dtype, memory_format=memory_format(out[0]))
    weight_bytes, sample_bytes = like.nbytes, _sample_bytes(x, grad_out)
    for t in range(out.shape[0]):
        if bounds[t] == bounds[t + 1]:
            out[t].zero_()
            continue
        segment = Segment(t, positions[bounds[t] : bounds[t + 1]])
        for k, cut in enumerate(cuts(segment, sample_bytes, weight_bytes)):
            grad = convolution_backward(cut.take(grad_out), cut.take(x), like, geometry, False, True)[1]
            if k == 0:
                out[t].copy_(grad)
            else:
                out[t].add_(grad)


# --- scale and shift


def _table_rows(table: Tensor, task_ids: Tensor, dims: int, dtype: torch.dtype) -> Tensor:
    rows = table.detach().index_select(0, task_ids).to(dtype)
    return rows.reshape(*rows.shape, *[1] * (dims - 2))


def scale_shift(x: Tensor, scale: Tensor, shift: Tensor, task_ids: Tensor) -> Tensor:
    """`task_scale_shift`; see there."""
    wide = torch.promote_types(x.dtype, scale.dtype)
    a, b = (_table_rows(table, task_ids, x.dim(), wide) for table in (scale, shift))
    return torch.addcmul(b, x.detach(), a, out=torch.empty_like(x, requires_grad=False))


def scale_shift_backward(
    grad_out: Tensor, x: Tensor, scale: Tensor, shift: Tensor, task_ids: Tensor, wanted: Sequence[bool]
) -> list[Tensor]:
    """`task_scale_shift_backward`; see there."""
    wide = torch.promote_types(torch.promote_types(x.dtype, scale.dtype), torch.float32)
    axes = list(range(2, x.dim()))
    out = []
    if wanted[0]:
        rows = _table_rows(scale, task_ids, x.dim(), torch.promote_types(x.dtype, scale.dtype))
        out.append(torch.mul(grad_out, rows, out=torch.empty_like(x, requires_grad=False)))

    def by_task(each: Tensor, like: Tensor) -> Tensor:
        total = torch.zeros(like.shape, dtype=wide)
        return total.index_add_(0, task_ids, each.to(wide)).to(like.dtype)

    if wanted[1]:
        product = grad_out.to(wide) * x.detach().to(wide)
        out.append(by_task(product.sum(axes) if axes else product, scale))
    if wanted[2]:
        out.append(by_task(grad_out.sum(axes, dtype=wide) if axes else grad_out, shift))
    return out
