"""Per-task weights on the CPU: the batch in segments of one weight each.

Segments with many rows (output pixels) go through torch's own convolution: oneDNN is hard to beat, and what costs is
around it. One scratch weight holds `W + s_t Delta_t` of one task at a time, tasks that see W itself are one segment,
samples are copied only where calls on the runs in which they lie would cost more, and the weight gradient of a task is
spread over dDelta, dW and the gate while it is in the cache. Segments with few rows are bound by the weights, which
oneDNN would reorder first: they go through `csrc/cpu/task_weights/task_conv.cpp`, which reads each weight once and
copies no sample.

Where oneDNN has no arithmetic for a 16-bit dtype, torch would add up in 16 bits. Such samples and gradients are widened
to float32 here, once for all tasks, and so is a weight while it is staged; results are rounded once (`widen`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtl.core.dispatch import unavailable
from fastmtl.core.schemas import define_kernel
from fastmtl.core.task_weights import Geometry, TaskWeights
from fastmtl.core.tensors import like_parameter, like_stacked, memory_format
from fastmtl.ops.task_weights.cpu.batch import Batch, Cut, Samples, Segment, cuts
from fastmtl.ops.task_weights.cpu.direct import Direct
from fastmtl.ops.task_weights.precision import widen

_advise_huge_pages = define_kernel("_advise_huge_pages(Tensor(a!) x) -> ()")

_convolution_weight_grads = define_kernel(
    "_convolution_weight_grads(Tensor[] grad_out, Tensor[] x, Tensor weight, int[] stride, int[] padding, "
    "int[] dilation, int groups, bool bias) -> Tensor[]"
)
_linear_weight_grads = define_kernel(
    "_linear_weight_grads(Tensor grad_out, Tensor x, Tensor? order, int[] bounds) -> Tensor[]"
)

# results from this size on ask for huge pages
HUGE_BYTES = 4 << 20


def plain_strides(w: Tensor) -> Tensor:
    """w, its dimensions of size 1 with the strides that torch itself would give them: oneDNN misreads others."""
    for fmt in (memory_format(w), torch.channels_last):
        if w.is_contiguous(memory_format=fmt):
            return w.as_strided(w.shape, torch.empty(w.shape, device="meta", memory_format=fmt).stride())
    return w


class Stage:
    """The one scratch weight."""

    def __init__(self, weights: TaskWeights, batch: Batch, dtype: torch.dtype) -> None:
        self.weights, self.batch, self.dtype = weights, batch, dtype
        # `W + s_t Delta_t` is rounded to `dtype` alone, which may be narrower than the weights, or wider
        self._wide = torch.promote_types(weights.like.dtype, dtype)
        self._scratch: Tensor | None = None

    def weight(self, task: int | None) -> Tensor | None:
        """`W + s_t Delta_t` in the dtype of x, valid until the next call; W for None; None where that is zero."""
        base = self._base
        if task is None:
            return None if base is None else plain_strides(base.to(self.dtype))
        delta, gate = self.batch.deltas[task], self.batch.gate(task)
        assert delta is not None
        delta = delta.detach()
        if base is None and gate == 1:
            return plain_strides(delta.to(self.dtype))
        if self._scratch is None:
            like = delta if base is None else base
            self._scratch = plain_strides(torch.empty_like(like, dtype=self.dtype, requires_grad=False))
        if base is None:
            return torch.mul(delta.to(self._wide), gate, out=self._scratch)
        return torch.add(base, delta, alpha=gate, out=self._scratch)

    @functools.cached_property
    def _base(self) -> Tensor | None:
        """W, a copy only where x is wider."""
        base = self.weights.weight
        return None if base is None else base.detach().to(self._wide)

    @functools.cached_property
    def like(self) -> Tensor:
        """For weight gradients alone: of it only shape, dtype and memory order are read."""
        like = self.weights.like.detach()
        return plain_strides(like if like.dtype == self.dtype else torch.empty_like(like, dtype=self.dtype))


def fresh(shape: Sequence[int], like: Tensor) -> Tensor:
    """Memory for a result like x."""
    y = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format(like))
    if y.nbytes >= HUGE_BYTES:
        _advise_huge_pages(y)
    return y


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
    result, x = y, widen(x)
    if x.dtype != y.dtype:
        y = fresh(size, x)
    batch = Batch(weights, order, offsets)
    stage = Stage(weights, batch, x.dtype)
    direct = Direct(x, weights, batch, geometry, size[2] * size[3])
    pixelwise = geometry.pixelwise(shape[2:])
    source, target = Samples(x, pixelwise=pixelwise), Samples(y, like=x)
    shared_bias = None if bias is None or bias.dim() == 2 else bias.detach().to(x.dtype)
    weight_bytes = shape.numel() * x.element_size()
    for segment in batch.segments():
        own_bias = shared_bias
        if bias is not None and bias.dim() == 2 and segment.task is not None:
            own_bias = bias[segment.task].detach().to(x.dtype)
        if direct.takes_forward(segment):
            direct.forward(segment, source.x, own_bias, y)
            if bias is not None and segment.task is None and bias.dim() == 2:
                _add_bias(y, bias.detach(), batch, segment)
            continue
        w = stage.weight(segment.task)
        for cut in cuts(segment, source.sample_bytes + target.sample_bytes, weight_bytes):
            if w is None:
                target.fill(cut)
            else:
                target.put(cut, F.conv2d(source.take(cut), w, own_bias, *geometry))
        if bias is not None and (w is None or (segment.task is None and bias.dim() == 2)):
            _add_bias(y, bias.detach(), batch, segment)
    return result if y is result else result.copy_(y)


def _add_bias(y: Tensor, bias: Tensor, batch: Batch, segment: Segment) -> None:
    """To the samples of a segment of several tasks, each its own."""
    members = [segment.task] if segment.task is not None else [t for t in batch.present if not batch.is_open(t)]
    bias = (bias if bias.dim() == 2 else bias[None]).to(y.dtype)
    if len(members) == batch.num_tasks or segment.num_runs > len(members):
        samples = torch.from_numpy(np.concatenate([batch.samples([t]) for t in members]))
        counts = torch.tensor([len(batch.samples([t])) for t in members])
        tasks = torch.tensor(members).repeat_interleave(counts)
        rows = bias.index_select(0, tasks if bias.shape[0] > 1 else torch.zeros_like(tasks))
        y.index_add_(0, samples, rows[:, :, None, None].expand(-1, -1, *y.shape[2:]))
        return
    for t in members:
        row = bias[t if bias.shape[0] > 1 else 0][:, None, None]
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
    given, x, grad_out = x, widen(x), widen(grad_out)
    grads = Gradients(x, weights, batch, want_weight, wanted_delta, want_gate)
    grad_x = None
    if want_x:
        grad_x = fresh(x.shape, x)
    if not empty:
        pixelwise = geometry.pixelwise(weights.shape[2:])
        source = Samples(x, pixelwise=pixelwise)
        # dx and dW of a segment are one call: both sides in one memory order
        back = Samples(grad_out, like=x, pixelwise=pixelwise)
        target = None if grad_x is None else Samples(grad_x, like=x)
        _walk(back, source, weights, batch, geometry, target, grads)
    elif grad_x is not None:
        grad_x.zero_()
    if grad_x is not None and grad_x.dtype != given.dtype:
        grad_x = fresh(given.shape, given).copy_(grad_x)
    out = [] if grad_x is None else [grad_x]
    out += grads.collect()
    if want_bias:
        assert bias is not None
        out.append(_bias_gradient(grad_out, bias, batch))
    return out


def _walk(
    grad_out: Samples,
    source: Samples,
    weights: TaskWeights,
    batch: Batch,
    geometry: Geometry,
    grad_x: Samples | None,
    grads: Gradients,
) -> None:
    """One walk over the segments for dx, and for the weight gradients of the tasks that need one of their own."""
    x, g = source.x, grad_out.x
    stage = Stage(weights, batch, x.dtype)
    direct = Direct(x, weights, batch, geometry, g.shape[2] * g.shape[3])
    weight_bytes = weights.shape.numel() * x.element_size()
    sample_bytes = source.sample_bytes + grad_out.sample_bytes
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
        if own and direct.takes_weight_gradient(segment):
            grads.spread_direct(segment, direct, g, x)
            done.add(segment.task)
            want_weight = own = False
        if grad_x is not None and not want_weight and direct.takes_input_gradient(segment):
            direct.input_gradient(segment, g, grad_x.x)
            want_x = False
        if not want_x and not want_weight:
            continue
        w = stage.weight(segment.task)
        for cut in cuts(segment, sample_bytes, weight_bytes):
            if w is None:
                # W is zero: there is only dx to write
                assert grad_x is not None
                grad_x.fill(cut)
                continue
            gx, gw = convolution_backward(grad_out.take(cut), source.take(cut), w, geometry, want_x, want_weight)
            if want_x and grad_x is not None:
                grad_x.put(cut, gx)
            if own:
                grads.hold(gw)
            elif want_weight:
                grads.add_to_weight(gw)
        if own:
            grads.spread(segment.task)
            done.add(segment.task)
        elif want_weight:
            rest = []
    for t in sorted(alone - done):
        # closed, and only its gate wants to know
        segment = Segment(t, batch.samples([t]))
        if direct.takes_weight_gradient(segment):
            grads.spread_direct(segment, direct, g, x)
            continue
        for cut in cuts(segment, sample_bytes, weight_bytes):
            grads.hold(convolution_backward(grad_out.take(cut), source.take(cut), stage.like, geometry, False, True)[1])
        grads.spread(t)
    if rest:
        everything = len(rest) == len(batch.present)
        whole = np.arange(x.shape[0]) if everything else batch.samples(rest)
        for cut in cuts(Segment(None, whole), sample_bytes, weight_bytes):
            gw = convolution_backward(grad_out.take(cut), source.take(cut), stage.like, geometry, False, True)[1]
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
        # rounded to the dtype of the weights alone, which may be wider than that of x, or narrower
        target = self._target(task)
        torch.mul(grad.to(torch.promote_types(grad.dtype, target.dtype)), gate, out=target)

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
    for row, (grad, _) in zip(out, weight_grads(x, grad_out, order, offsets, geometry, out[0]), strict=True):
        if grad is None:
            row.zero_()
        else:
            row.copy_(grad)


def weight_grads(
    x: Tensor,
    grad_out: Tensor,
    order: Tensor,
    offsets: Tensor,
    geometry: Geometry,
    weight: Tensor,
    bias: bool = False,
) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """Each task's weight gradient, as oneDNN makes it, and with `bias` that of the bias; None without samples.

    Of `weight` only the shape and the memory order are read. In the dtype of x, or float32 where x is widened.
    """
    x, grad_out = widen(x), widen(grad_out)
    bounds, positions = offsets.tolist(), order.numpy()
    pixelwise = geometry.pixelwise(weight.shape[2:])
    source, back = Samples(x, pixelwise=pixelwise), Samples(grad_out, like=x, pixelwise=pixelwise)
    like = torch.empty(weight.shape, dtype=x.dtype, memory_format=memory_format(weight))
    wide = torch.promote_types(x.dtype, torch.float32)
    weight_bytes, sample_bytes = like.nbytes, source.sample_bytes + back.sample_bytes
    segments = [Segment(t, positions[a:b]) for t, (a, b) in enumerate(itertools.pairwise(bounds)) if a < b]
    pieces = {segment.task: list(cuts(segment, sample_bytes, weight_bytes)) for segment in segments}
    whole = [segment for segment in segments if len(pieces[segment.task]) == 1]
    together = {}
    if len(whole) >= torch.get_num_threads() > 1:
        together = _together(whole, pieces, source, back, like, geometry, bias)
    for t in range(len(bounds) - 1):
        if t not in pieces:
            yield None, None
            continue
        if t in together:
            yield together.pop(t)
            continue
        total: Tensor | None = None
        summed: Tensor | None = None
        for cut in pieces[t]:
            part = back.take(cut)
            grad = convolution_backward(part, source.take(cut), like, geometry, False, True)[1]
            # parts of 16-bit samples are rounded once each, their sum is not
            total = grad if total is None else total.to(wide).add_(grad)
            if bias:
                each = part.sum((0, 2, 3), dtype=wide)
                summed = each if summed is None else summed + each
        yield total, summed


def _together(
    segments: Sequence[Segment],
    pieces: Mapping[int | None, Sequence[Cut]],
    source: Samples,
    back: Samples,
    like: Tensor,
    geometry: Geometry,
    bias: bool,
) -> dict[int | None, tuple[Tensor, Tensor | None]]:
    """Weight gradients of tasks whose samples go in one call each, one thread to a task: the longest first."""
    order = sorted(segments, key=lambda segment: -len(segment.samples))
    cut = [pieces[segment.task][0] for segment in order]
    found = _convolution_weight_grads(
        [back.take(c) for c in cut],
        [source.take(c) for c in cut],
        like,
        *map(list, geometry[:3]),
        geometry.groups,
        bias,
    )
    sums = found[len(order) :] if bias else [None] * len(order)
    return {segment.task: (grad, each) for segment, grad, each in zip(order, found, sums, strict=False)}


def linear_weight_grads(x: Tensor, grad_out: Tensor, order: Tensor, offsets: Tensor) -> list[Tensor | None]:
    """Each task's `[Cout, Cin]` from `[n, r, Cin]` and `[n, r, Cout]`; None for a task without samples.

    In the dtype of x, or float32 where x is widened.
    """
    x, grad_out = (widen(y.detach()).contiguous() for y in (x, grad_out))
    bounds = offsets.tolist()
    present = [(t, a, b) for t, (a, b) in enumerate(itertools.pairwise(bounds)) if a < b]
    is_sorted = bool((order[1:] > order[:-1]).all())
    out: list[Tensor | None] = [None] * (len(bounds) - 1)
    if unavailable("cpu", "cpu") is None and len(present) >= torch.get_num_threads():
        # the longest first: tasks are handed to whichever thread is free
        present.sort(key=lambda task: task[1] - task[2])
        cuts_of = [at for _, a, b in present for at in (a, b)]
        found = _linear_weight_grads(grad_out, x, None if is_sorted else order, cuts_of)
        for (t, _, _), grad in zip(present, found, strict=True):
            out[t] = grad
        return out
    if not is_sorted:
        x, grad_out = x.index_select(0, order), grad_out.index_select(0, order)
    for t, a, b in present:
        out[t] = grad_out[a:b].reshape(-1, grad_out.shape[2]).t() @ x[a:b].reshape(-1, x.shape[2])
    return out
