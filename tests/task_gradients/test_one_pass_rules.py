"""Every rule of `one_pass` against what really depends on what: a changed sample changes its own part alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtl.ops import task_batch_norm, task_conv2d, task_linear, task_lora, task_plan, task_scale_shift
from fastmtl.task_gradients.one_pass.experiments import verdict
from fastmtl.task_gradients.one_pass.rules import registry
from fastmtl.task_gradients.one_pass.sample_axis import (
    Constant,
    MixedSamples,
    PerSample,
    SampleAxis,
    SampleSum,
    Unknown,
    reason,
)
from fastmtl.task_gradients.one_pass.task_ids import TaskIds
from fastmtl.task_gradients.one_pass.tensors import nested
from fastmtl.task_gradients.one_pass.torch_names import name_of, writes
from fastmtl.task_gradients.one_pass.tracker import Tracker

N = 4


def _tracker(probe: bool) -> Tracker:
    ids = torch.arange(N)
    return Tracker(TaskIds(ids, N, ("batch",)), 0, {}, {}, (), probe=probe, backward=lambda *a: None)


def _axes(op: Callable[..., Any], x: Tensor, axis: int, probe: bool) -> tuple[list[Tensor], list[SampleAxis]]:
    tracker = _tracker(probe)
    tracker.mark(x, PerSample(axis, tracker.task_ids))
    with tracker:
        out = op(x)
    found = nested(out)
    return found, [tracker.axis_of(t) for t in found]


def _check(op: Callable[..., Any], shape: tuple[int, ...], axis: int, probe: bool = False) -> list[type[SampleAxis]]:
    """What is known of the results, after each was compared with the truth."""
    torch.manual_seed(0)
    data = torch.rand(shape, dtype=torch.float64) + 0.1
    x = data.clone().requires_grad_()
    torch.manual_seed(1)
    results, axes = _axes(op, x, axis, probe)
    for k, found in enumerate(axes):
        if isinstance(found, PerSample):
            _check_samples(op, data, axis, k, results[k], found)
        elif isinstance(found, SampleSum):
            _check_sum(op, data, axis, k)
        elif isinstance(found, Constant):
            assert not results[k].requires_grad
    return [type(found) for found in axes]


def _changed(data: Tensor, axis: int, i: int) -> Tensor:
    other = data.clone()
    other.select(axis, i).mul_(0.5).add_(0.01)
    return other.requires_grad_()


def _result(op: Callable[..., Any], x: Tensor, k: int) -> Tensor:
    torch.manual_seed(1)
    return nested(op(x))[k].detach()


def _check_samples(op: Any, data: Tensor, axis: int, k: int, result: Tensor, found: PerSample) -> None:
    n = len(found.task_ids)
    assert result.shape[found.axis] == found.outer * n * found.inner
    owner = found.task_ids.ids[:, None].expand(-1, found.inner).reshape(-1).repeat(found.outer)
    for i in range(N):
        other = _result(op, _changed(data, axis, i), k)
        differs = (other != result).movedim(found.axis, 0).reshape(result.shape[found.axis], -1).any(1)
        assert not differs[owner != i].any(), f"sample {i} changes {differs.nonzero().flatten().tolist()}, {found}"


def _check_sum(op: Any, data: Tensor, axis: int, k: int) -> None:
    """The gradient of one sample does not depend on another."""

    def gradient(x: Tensor) -> Tensor:
        torch.manual_seed(1)
        (g,) = torch.autograd.grad(nested(op(x))[k].sum(), x)
        return g

    before = gradient(data.clone().requires_grad_())
    for i in range(N):
        after = gradient(_changed(data, axis, i))
        rest = [j for j in range(N) if j != i]
        index = torch.tensor(rest)
        torch.testing.assert_close(after.index_select(axis, index), before.index_select(axis, index))


def _weight(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


# op, shape (the samples have size N), the axes that may carry them, and what is known of the result
LABELS = torch.tensor([0, 1, 2, 0])
OF_TASKS = torch.tensor([1, 0, 0, 1])
MASK = torch.tensor([[1, 0, 1], [0, 1, 1], [0, 0, 1], [1, 0, 0]]).bool()
PLAN = task_plan(OF_TASKS, 2)
TOKENS = LABELS.repeat(5)
CASES: dict[str, tuple[Callable[..., Any], tuple[int, ...], tuple[int, ...], type[SampleAxis]]] = {
    "relu": (torch.relu, (4, 3), (0,), PerSample),
    "add": (lambda x: x + _weight(3), (4, 3), (0,), PerSample),
    "radd": (lambda x: 1 + x, (4, 3), (0, ), PerSample),
    "rsub": (lambda x: 1 - x, (3, 4), (1,), PerSample),
    "rdiv": (lambda x: 1 / x, (3, 4), (1,), PerSample),
    "pow": (lambda x: x**2 + 2**x, (3, 4), (1,), PerSample),
    "join": (lambda x: x * x.unsqueeze(0), (4, 3), (0,), PerSample),
    "outer": (lambda x: x[:, None] * x[None, :], (4,), (0,), Unknown),
    "clamp": (lambda x: x.clamp(0.2, 0.5), (4, 3), (0,), PerSample),
    "where": (lambda x: torch.where(x > 0.5, x, 0.0), (4, 3), (0,), PerSample),
    "masked_fill": (lambda x: x.masked_fill(x > 0.5, 1.0), (4, 3), (0,), PerSample),
    "view": (lambda x: x.view(4, 2, 3), (4, 6), (0,), PerSample),
    "view merged": (lambda x: x.view(-1, 3), (4, 4, 3), (0, 1), PerSample),
    "view back": (lambda x: x.view(-1, 3).view(2, 4, 3), (2, 4, 3), (1,), PerSample),
    "view parts": (lambda x: x.view(2, 2, 3), (4, 3), (0,), Unknown),
    "view swapped": (lambda x: x.view(4, 2, 3), (2, 4, 3), (1,), Unknown),
    "reshape": (lambda x: x.transpose(0, 1).reshape(-1, 3), (2, 4, 3), (1,), PerSample),
    "flatten": (lambda x: x.flatten(1), (4, 2, 3), (0,), PerSample),
    "flatten all": (torch.flatten, (4, 4, 4), (0, 1, 2), PerSample),
    "unflatten": (lambda x: x.unflatten(1, (2, 3)), (4, 6), (0,), PerSample),
    "transpose": (lambda x: x.transpose(0, 2), (4, 2, 4), (0, 2), PerSample),
    "mT": (lambda x: x.mT, (4, 2, 4), (0, 2), PerSample),
    "T": (lambda x: x.T, (4, 2), (0,), PerSample),
    "t": (lambda x: x.t(), (4, 2), (0,), PerSample),
    "permute": (lambda x: x.permute(2, 0, 1), (4, 4, 4), (0, 1, 2), PerSample),
    "permute negative": (lambda x: x.permute(-1, 0, 1), (4, 4, 4), (0, 1, 2), PerSample),
    "movedim": (lambda x: x.movedim(0, 2), (4, 4, 4), (0, 1, 2), PerSample),
    "movedim several": (lambda x: x.movedim((0, 1), (2, 0)), (4, 4, 4), (0, 1, 2), PerSample),
    "unsqueeze": (lambda x: x.unsqueeze(-2), (4, 4), (0, 1), PerSample),
    "squeeze": (lambda x: x.unsqueeze(0).squeeze(), (4, 4), (0, 1), PerSample),
    "squeeze dim": (lambda x: x.unsqueeze(1).squeeze(1), (4, 4), (0, 1), PerSample),
    "expand": (lambda x: x.unsqueeze(1).expand(-1, 5, -1), (4, 3), (0,), PerSample),
    "expand front": (lambda x: x.expand(5, -1, -1), (4, 3), (0,), PerSample),
    "repeat": (lambda x: x.repeat(2, 3), (4, 3), (0,), PerSample),
    "repeat front": (lambda x: x.repeat(3, 1, 1), (4, 3), (0,), PerSample),
    "tile": (lambda x: x.tile(3), (4, 3), (0,), PerSample),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 0), (4, 3), (0,), PerSample),
    "repeat_interleave of ids": (lambda x: x.repeat_interleave(3), (4,), (0,), PerSample),
    "repeat_interleave flat": (lambda x: x.repeat_interleave(3), (4, 2), (0,), PerSample),
    "repeat_interleave flat, samples last": (lambda x: x.repeat_interleave(3), (2, 4), (1,), PerSample),
    "repeat_interleave by a tensor": (
        lambda x: x.repeat_interleave(torch.tensor([2, 0, 1, 3]), 1), (3, 4), (1,), PerSample
    ),
    "repeat_interleave evenly": (lambda x: x.repeat_interleave(torch.tensor([2] * 4), 0), (4, 3), (0,), PerSample),
    "repeat_interleave merged": (
        lambda x: x.reshape(-1).repeat_interleave(torch.tensor([1, 2] * 4)), (4, 2), (0,), PerSample
    ),
    "repeat_interleave others by a tensor": (
        lambda x: x.repeat_interleave(torch.tensor([1, 2, 0]), 1), (4, 3), (0,), PerSample
    ),
    "grid_sample of one picture": (
        lambda x: F.grid_sample(_weight(1, 2, 3, 3), x.tanh()[None], align_corners=False), (4, 3, 2), (0,), PerSample
    ),
    "task_linear": (
        lambda x: task_linear(x, _weight(5, 3), [_weight(5, 3), None], OF_TASKS), (4, 2, 3), (0,), PerSample
    ),
    "task_linear by samples": (
        lambda x: task_linear(x, None, x[:, None].expand(-1, 2, -1) * 1, torch.arange(4)), (4, 3), (0,), Unknown
    ),
    "task_linear of others": (
        lambda x: task_linear(_weight(4, 3), None, x[:, None].expand(-1, 2, -1) * 1, torch.arange(4)), (4, 3), (0,),
        Unknown,
    ),
    "task_linear turned": (lambda x: task_linear(x, None, _weight(2, 5, 3), PLAN), (4, 4, 3), (1,), Unknown),
    "task_conv2d": (
        lambda x: task_conv2d(x, None, _weight(2, 5, 3, 2, 2), OF_TASKS), (4, 3, 3, 3), (0,), PerSample
    ),
    "task_lora": (
        lambda x: task_lora(x, _weight(5, 3), _weight(2, 2, 3), _weight(2, 5, 2), OF_TASKS), (4, 3), (0,), PerSample
    ),
    "task_scale_shift": (
        lambda x: task_scale_shift(x, _weight(2, 3), _weight(2, 3), OF_TASKS), (4, 3, 2), (0,), PerSample
    ),
    "task_batch_norm, eval": (
        lambda x: task_batch_norm(
            x, OF_TASKS, running_mean=_weight(2, 3), running_var=_weight(2, 3), training=False
        ), (4, 3, 2), (0,), PerSample,
    ),
    # in these tests each sample is its own task
    "task_batch_norm": (
        lambda x: task_batch_norm(x, torch.arange(4), _weight(4, 3), training=True), (4, 3, 2), (0,), PerSample
    ),
    "repeat_interleave other": (lambda x: x.repeat_interleave(2, 1), (4, 3), (0,), PerSample),
    "sum": (lambda x: x.sum(), (4, 3), (0, ), SampleSum),
    "sum samples": (lambda x: x.sum(0), (4, 3), (0,), SampleSum),
    "sum rest": (lambda x: x.sum((0, 2)), (2, 4, 3), (1,), PerSample),
    "sum keepdim": (lambda x: x.sum(0, keepdim=True), (2, 4, 3), (1,), PerSample),
    "mean": (lambda x: x.mean(-1), (4, 3), (0,), PerSample),
    "mean all": (lambda x: x.mean(), (4, 3), (0,), SampleSum),
    "mean squared": (lambda x: x.mean() ** 2, (4, 3), (0,), MixedSamples),
    "mean scaled": (lambda x: -2 * x.mean() / 3 + 1, (4, 3), (0,), SampleSum),
    "mean by mean": (lambda x: x.mean() / x.sum(), (4, 3), (0,), MixedSamples),
    "mean minus": (lambda x: x - x.mean(0), (4, 3), (0,), MixedSamples),
    "totals added": (lambda x: x.mean() + x.square().sum(), (4, 3), (0,), SampleSum),
    "total and samples": (lambda x: x + x.sum(), (4, 3), (0,), MixedSamples),
    "std": (lambda x: x.std(1), (4, 3), (0,), PerSample),
    "var unbiased": (lambda x: x.var(1, unbiased=False), (4, 3), (0,), PerSample),
    "var samples": (lambda x: x.var(0), (4, 3), (0,), MixedSamples),
    "var_mean": (lambda x: torch.var_mean(x, 1), (4, 3), (0,), PerSample),
    "norm": (lambda x: x.norm(dim=1), (4, 3), (0,), PerSample),
    "norm all": (lambda x: x.norm(), (4, 3), (0,), MixedSamples),
    "vector_norm": (lambda x: torch.linalg.vector_norm(x, dim=1), (4, 3), (0,), PerSample),
    "max": (lambda x: x.max(1).values, (4, 3), (0,), PerSample),
    "max pair": (lambda x: torch.max(x, x * 2), (4, 3), (0,), PerSample),
    "max all": (lambda x: x.max(), (4, 3), (0,), MixedSamples),
    "amax": (lambda x: x.amax((1, 2)), (4, 3, 2), (0,), PerSample),
    "logsumexp": (lambda x: x.logsumexp(0), (3, 4), (1,), PerSample),
    "argmax": (lambda x: x.argmax(1), (4, 3), (0,), PerSample),
    "any": (lambda x: (x > 2).any(), (4, 3), (0,), Constant),
    "softmax": (lambda x: x.softmax(-1), (4, 3), (0,), PerSample),
    "softmax samples": (lambda x: x.softmax(0), (4, 3), (0,), MixedSamples),
    "F.softmax": (lambda x: F.softmax(x, dim=1), (4, 3), (0,), PerSample),
    "log_softmax": (lambda x: F.log_softmax(x, 1), (4, 3), (0,), PerSample),
    "cumsum": (lambda x: x.cumsum(1), (4, 3), (0,), PerSample),
    "cumsum samples": (lambda x: x.cumsum(0), (4, 3), (0,), MixedSamples),
    "sort": (lambda x: x.sort(1), (4, 3), (0,), PerSample),
    "topk": (lambda x: x.topk(2, 1), (4, 3), (0,), PerSample),
    "flip": (lambda x: x.flip(1), (4, 3), (0,), PerSample),
    "flip samples": (lambda x: x.flip(0), (4, 3), (0,), MixedSamples),
    "normalize": (lambda x: F.normalize(x, dim=1), (4, 3), (0,), PerSample),
    "cosine": (lambda x: F.cosine_similarity(x, x * 2, dim=1), (4, 3), (0,), PerSample),
    "roll": (lambda x: x.roll(1, 1), (4, 3), (0,), PerSample),
    "roll samples": (lambda x: x.roll(1, 0), (4, 3), (0,), Unknown),
    "vstack of vectors": (lambda x: torch.vstack([x[:, 0], x[:, 1]]), (4, 3), (0,), PerSample),
    "linear of constants": (lambda x: F.linear(_weight(5, 3), x), (4, 3), (0,), PerSample),
    "gram by linear": (lambda x: F.linear(x, x), (4, 3), (0,), MixedSamples),
    "conv by samples": (lambda x: F.conv1d(x, x), (4, 2, 6), (0,), Unknown),
    "bilinear": (lambda x: F.bilinear(x, x, _weight(2, 3, 3)), (4, 3), (0,), PerSample),
    "tensordot": (lambda x: torch.tensordot(_weight(5, 3), x, dims=([1], [1])), (4, 3), (0,), PerSample),
    "outer with a constant": (lambda x: torch.outer(_weight(5), x), (4,), (0,), PerSample),
    "einsum ellipsis": (lambda x: torch.einsum("...d,...d->...", x, x), (4, 2, 3), (0,), PerSample),
    "cat": (lambda x: torch.cat([x, x], 1), (4, 3), (0,), PerSample),
    "vstack 1-D": (lambda x: torch.vstack([x, x * 2, _weight(4)]), (4,), (0,), PerSample),
    "vstack samples": (lambda x: torch.vstack([x, x * 2]), (4, 4), (0, 1), PerSample),
    "view_as_real": (lambda x: torch.view_as_real(x.to(torch.complex128)), (4, 4, 4), (0, 1, 2), PerSample),
    "cat samples": (lambda x: torch.cat([x, x * 2], 0), (4, 3), (0,), PerSample),
    "cat constant": (lambda x: torch.cat([x, _weight(1, 3)], 0), (4, 3), (0,), Unknown),
    "stack": (lambda x: torch.stack([x, x], 0), (4, 3), (0,), PerSample),
    "stack last": (lambda x: torch.stack([x, x], -1), (4, 3), (0,), PerSample),
    "split": (lambda x: x.split([1, 2], 1), (4, 3), (0,), PerSample),
    "split samples": (lambda x: x.split([1, 3], 0), (4, 3), (0,), PerSample),
    "chunk": (lambda x: x.chunk(2, -1), (4, 6), (0,), PerSample),
    "chunk samples": (lambda x: torch.cat(x.chunk(2)), (4, 3), (0,), PerSample),
    "unbind": (lambda x: x.unbind(1), (4, 3), (0,), PerSample),
    "iterate": (lambda x: list(x), (3, 4), (1,), PerSample),
    "iterate over samples": (lambda x: list(x), (4, 3), (0,), PerSample),
    "unbind samples": (lambda x: x.unbind(0), (4, 3), (0,), PerSample),
    "select": (lambda x: x.select(0, 1), (3, 4), (1,), PerSample),
    "narrow": (lambda x: x.narrow(0, 1, 2), (4, 3), (0,), PerSample),
    "index int": (lambda x: x[:, 0], (4, 3), (0,), PerSample),
    "index last": (lambda x: x[-1], (3, 4), (1,), PerSample),
    "index sample": (lambda x: x[1], (4, 3), (0,), PerSample),
    "index slice": (lambda x: x[1:], (4, 3), (0,), PerSample),
    "index step": (lambda x: x[::2], (4, 3), (0,), PerSample),
    "index none": (lambda x: x[:, None, :, None], (4, 3), (0,), PerSample),
    "index ellipsis": (lambda x: x[..., 0], (4, 3), (0,), PerSample),
    "index by a mask over more": (lambda x: x[MASK], (4, 3, 2), (0,), PerSample),
    "index merged": (lambda x: x.reshape(-1, 2)[MASK.flatten()], (4, 3, 2), (0,), PerSample),
    "slice merged": (lambda x: x.reshape(-1, 2)[1:7:2], (4, 3, 2), (0,), PerSample),
    "scatter_add": (lambda x: x.new_zeros(4).scatter_add(0, torch.tensor([2, 0, 1, 3]), x), (4,), (0,), PerSample),
    "scatter_add joins": (lambda x: x.new_zeros(2).scatter_add(0, OF_TASKS, x), (4,), (0,), Unknown),
    "embedding of samples": (lambda x: F.embedding(torch.tensor([1, 0, 3, 2]), x), (4, 3), (0,), Unknown),
    "losses in turn": (lambda x: torch.stack([r.square().sum() for r in x]).sqrt(), (4, 3), (0,), PerSample),
    "index mask": (lambda x: x[torch.tensor([True, False, True, True])], (4, 3), (0,), PerSample),
    "index list": (lambda x: x[[2, 0]], (4, 3), (0,), PerSample),
    "index tensor": (lambda x: x[torch.tensor([3, 3, 0])], (4, 3), (0,), PerSample),
    "index other": (lambda x: x[:, torch.tensor([2, 0])], (4, 3), (0,), PerSample),
    "index two": (lambda x: x[:, torch.tensor([2, 0]), torch.tensor([1, 1])], (4, 3, 2), (0,), PerSample),
    "index apart": (lambda x: x[torch.tensor([2, 0]), :, torch.tensor([1, 1])], (3, 4, 2), (1,), PerSample),
    "index own": (lambda x: x[torch.arange(4), torch.tensor([2, 0, 1, 1])], (4, 3), (0,), PerSample),
    "index foreign": (lambda x: x[torch.tensor([1, 0, 2, 3]), torch.tensor([2, 0, 1, 1])], (4, 3), (0,), PerSample),
    "index arange of more dimensions": (
        lambda x: x[torch.arange(4)[:, None, None], torch.arange(3)[None, None, :]], (4, 3), (0,), PerSample
    ),
    "index by a row of arange": (lambda x: x[torch.arange(4), torch.zeros(5, 4).long()], (4, 3), (0,), PerSample),
    "index changed arange": (lambda x: x[_turned(), torch.zeros(4).long()], (4, 3), (0,), PerSample),
    "index single tensor": (lambda x: x[:, torch.tensor(1)], (4, 3), (0,), PerSample),
    "index tensors apart": (
        lambda x: x[:, torch.tensor(1), :, torch.tensor([0, 2])], (4, 3, 2, 3), (0,), Unknown
    ),
    "cumsum axis": (lambda x: x.cumsum(axis=0), (4, 3), (0,), MixedSamples),
    "cumprod axis": (lambda x: x.cumprod(axis=0), (4, 3), (0,), MixedSamples),
    "stack axis": (lambda x: torch.stack([x] * 4, axis=1), (4, 3), (0,), PerSample),
    "mean axis": (lambda x: x.mean(axis=0, keepdims=True), (3, 4), (1,), PerSample),
    "var_mean unbiased": (lambda x: torch.var_mean(x, True), (4, 3), (0,), MixedSamples),
    "renorm": (lambda x: x.renorm(2, 1, 0.5), (4, 3), (0,), Unknown),
    "quantile": (lambda x: x.quantile(0.5, 1), (4, 3), (0,), PerSample),
    "quantiles": (lambda x: x.quantile(torch.tensor([0.1, 0.5]).double(), 1), (4, 3), (0,), Unknown),
    "channel_shuffle": (lambda x: F.channel_shuffle(x, 2), (4, 4, 3, 3), (0,), PerSample),
    "matmul batched vector": (lambda x: x @ _weight(3), (4, 2, 3), (0, ), PerSample),
    "vector matmul batched": (lambda x: _weight(2) @ x, (4, 2, 3), (0,), PerSample),
    "matmul by name": (lambda x: torch.matmul(other=_weight(3, 5), input=x), (4, 3), (0,), PerSample),
    "dot": (lambda x: x @ (x * 2), (4,), (0,), SampleSum),
    "outer products": (lambda x: x.T @ x, (4, 3), (0,), SampleSum),
    "squeeze_": (lambda x: (x[None] * 1).squeeze_(0), (4, 3), (0,), Unknown),
    "cross_entropy of one": (lambda x: F.cross_entropy(x, torch.tensor(2)), (4,), (0,), MixedSamples),
    "mse crossed": (lambda x: F.mse_loss(x[:, :1], x[:, 0] * 2), (4, 3), (0,), Unknown),
    "pairwise_distance": (lambda x: F.pairwise_distance(x, x * 2), (4, 3), (0,), PerSample),
    "pairwise_distance of one": (lambda x: F.pairwise_distance(x, x * 2), (4,), (0,), MixedSamples),
    "put into a square": (lambda x: _put(x), (4, 6), (0,), Unknown),
    "broadcast_tensors": (lambda x: torch.broadcast_tensors(x, _weight(3)), (4, 3), (0,), PerSample),
    "split and joined": (lambda x: torch.cat([r * 2 for r in x.split(3)]) + x, (4, 3), (0,), PerSample),
    "joined and split": (lambda x: (lambda a, b: a * b)(*torch.cat([x, x * 2]).chunk(2)), (4, 3), (0,), PerSample),
    "scatter": (lambda x: torch.zeros_like(x).scatter(1, LABELS[:, None], 1.0) * x, (4, 3), (0,), PerSample),
    "index_add": (lambda x: x.new_zeros(4, 3).index_add(0, PICK, x[PICK] * 2), (4, 3), (0,), PerSample),
    "index_add of others": (lambda x: x.new_zeros(4, 3).index_add(0, PICK, x[PICK.flip(0)]), (4, 3), (0,), PerSample),
    "routing": (lambda x: _routed(x), (4, 3), (0,), PerSample),
    "index_select": (lambda x: x.index_select(0, torch.tensor([1, 3])), (4, 3), (0,), PerSample),
    "gather": (lambda x: x.gather(1, torch.zeros(4, 1, dtype=torch.long)), (4, 3), (0,), PerSample),
    "table": (lambda x: _weight(7, 2)[(x * 5).long()], (4, 3), (0,), PerSample),
    "embedding": (lambda x: F.embedding((x * 5).long(), _weight(7, 2)), (4, 3), (0,), PerSample),
    "one_hot": (lambda x: F.one_hot((x * 5).long(), 7), (4, 3), (0,), PerSample),
    "linear": (lambda x: F.linear(x, _weight(5, 3)), (4, 2, 3), (0,), PerSample),
    "linear samples": (lambda x: F.linear(x, _weight(5, 4)), (3, 4), (1,), MixedSamples),
    "matmul": (lambda x: x @ _weight(3, 5), (4, 2, 3), (0,), PerSample),
    "rmatmul": (lambda x: _weight(5, 2) @ x, (4, 2, 3), (0,), PerSample),
    "rmatmul columns": (lambda x: _weight(5, 2) @ x, (2, 4), (1,), PerSample),
    "matmul vector": (lambda x: x @ _weight(3), (4, 3), (0,), PerSample),
    "vector matmul": (lambda x: _weight(4) @ x, (4, 3), (0,), SampleSum),
    "matmul contracted": (lambda x: _weight(5, 4) @ x, (4, 3), (0,), SampleSum),
    "bmm": (lambda x: torch.bmm(x, x.transpose(1, 2)), (4, 2, 3), (0,), PerSample),
    "gram": (lambda x: x @ x.T, (4, 3), (0,), MixedSamples),
    "einsum": (lambda x: torch.einsum("ncd,de->nec", x, _weight(3, 5)), (4, 2, 3), (0,), PerSample),
    "einsum pair": (lambda x: torch.einsum("nij,nkj->nik", x, x), (4, 2, 3), (0,), PerSample),
    "einsum sum": (lambda x: torch.einsum("ncd,de->ec", x, _weight(3, 5)), (4, 2, 3), (0,), SampleSum),
    "conv1d": (lambda x: F.conv1d(x, _weight(5, 2, 3)), (4, 2, 6), (0,), PerSample),
    "conv2d": (lambda x: F.conv2d(x, _weight(5, 2, 3, 3), padding=1), (4, 2, 6, 5), (0,), PerSample),
    "conv unbatched": (lambda x: F.conv1d(x, _weight(5, 4, 3)), (4, 6), (0,), MixedSamples),
    "conv_transpose2d": (lambda x: F.conv_transpose2d(x, _weight(2, 5, 3, 3)), (4, 2, 6, 5), (0,), PerSample),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), (4, 2, 6, 4), (0,), PerSample),
    "max_pool indices": (lambda x: F.max_pool2d(x, 2, return_indices=True), (4, 2, 6, 4), (0,), PerSample),
    "avg_pool": (lambda x: F.adaptive_avg_pool2d(x, 2), (4, 2, 6, 4), (0, ), PerSample),
    "interpolate": (lambda x: F.interpolate(x, scale_factor=2), (4, 2, 3, 3), (0,), PerSample),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), (4, 8, 3, 3), (0,), PerSample),
    "unfold": (lambda x: F.unfold(x, 2), (4, 2, 3, 3), (0,), PerSample),
    "Tensor.unfold": (lambda x: x.unfold(1, 2, 1), (4, 5), (0,), PerSample),
    "pad": (lambda x: F.pad(x, (1, 1)), (4, 5), (0,), PerSample),
    "pad samples": (lambda x: F.pad(x, (0, 0, 1, 1)), (4, 5), (0,), Unknown),
    "layer_norm": (lambda x: F.layer_norm(x, (3,)), (4, 2, 3), (0, ), PerSample),
    "layer_norm samples": (lambda x: F.layer_norm(x, (4, 3)), (4, 3), (0,), MixedSamples),
    "rms_norm": (lambda x: F.rms_norm(x, (3,)), (4, 2, 3), (0,), PerSample),
    "group_norm": (lambda x: F.group_norm(x, 2), (4, 4, 3), (0,), PerSample),
    "instance_norm": (lambda x: F.instance_norm(x), (4, 4, 3), (0,), PerSample),
    "batch_norm eval": (lambda x: F.batch_norm(x, _weight(3), _weight(3)), (4, 3), (0,), PerSample),
    "prelu": (lambda x: F.prelu(x - 0.5, _weight(3)), (4, 3), (0,), PerSample),
    "glu": (lambda x: F.glu(x, -1), (4, 6), (0,), PerSample),
    "glu samples": (lambda x: F.glu(x, 0), (4, 6), (0,), MixedSamples),
    "glu before": (lambda x: F.glu(x, 1), (4, 6, 3), (0,), PerSample),
    "dropout": (lambda x: F.dropout(x, 0.5), (4, 6), (0,), PerSample),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x), (4, 2, 3, 5), (0,), PerSample),
    "attention over samples": (lambda x: F.scaled_dot_product_attention(x, x, x), (2, 4, 5), (1,), MixedSamples),
    "cross_entropy": (lambda x: F.cross_entropy(x, LABELS, reduction="none"), (4, 3), (0,), PerSample),
    "cross_entropy mean": (lambda x: F.cross_entropy(x, LABELS), (4, 3), (0,), SampleSum),
    "cross_entropy pixels": (
        lambda x: F.cross_entropy(x, torch.zeros(4, 5, dtype=torch.long)), (4, 3, 5), (0,), SampleSum
    ),
    "cross_entropy tokens": (lambda x: F.cross_entropy(x.view(-1, 3), TOKENS), (4, 5, 3), (0,), SampleSum),
    "mse": (lambda x: F.mse_loss(x, torch.zeros(4, 3).double()), (4, 3), (0,), SampleSum),
    "mse time first": (lambda x: F.mse_loss(x, torch.zeros(3, 4).double(), reduction="none"), (3, 4), (1,), PerSample),
    "bce": (lambda x: F.binary_cross_entropy(x.sigmoid(), torch.zeros(4, 3).double()), (4, 3), (0,), SampleSum),
    "kl_div": (lambda x: F.kl_div(x.log_softmax(1), _weight(4, 3), reduction="batchmean"), (4, 3), (0,), SampleSum),
    "gaussian_nll": (lambda x: F.gaussian_nll_loss(x, torch.zeros(4, 3).double(), x), (4, 3), (0,), SampleSum),
    "triplet": (lambda x: F.triplet_margin_loss(x, x * 2, x + 1), (4, 3), (0,), SampleSum),
    "smooth_l1": (lambda x: F.smooth_l1_loss(x, torch.zeros(4, 3).double(), reduction="sum"), (4, 3), (0,), SampleSum),
    "gumbel": (lambda x: F.gumbel_softmax(x, dim=1), (4, 3), (0,), PerSample),
    "detach": (lambda x: x.detach() * 2, (4, 3), (0,), PerSample),
    "new_zeros": (lambda x: x.new_zeros(x.shape[0], 2), (4, 3), (0,), Constant),
    "zeros_like": (lambda x: torch.zeros_like(x) + x, (4, 3), (0,), PerSample),
    "fill shifted": (lambda x: _filled(x, (slice(None), slice(1, None))), (4, 3), (0,), PerSample),
    "fill samples": (lambda x: _filled(x, (slice(1, None), slice(None))), (4, 3), (0,), Unknown),
    "scatter back": (lambda x: _scattered(x), (4, 3), (0,), PerSample),
    "clone": (lambda x: x.clone().contiguous().to(torch.float32).double(), (4, 3), (0,), PerSample),
    "diff": (lambda x: x.diff(dim=1), (4, 3), (0,), PerSample),
    "logdet": (lambda x: torch.logdet(x @ x.mT + torch.eye(3)), (4, 3, 3), (0,), PerSample),
    "lerp": (lambda x: torch.lerp(x, x * 2, 0.5), (4, 3), (0,), PerSample),
    "cdist": (lambda x: torch.cdist(x, _weight(5, 3)), (4, 3), (0,), Unknown),
    "tril": (lambda x: x.tril(), (4, 3, 3), (0,), PerSample),
    "meshgrid": (lambda x: torch.meshgrid(x, x, indexing="ij"), (4,), (0,), Unknown),
    "nonzero": (lambda x: x.nonzero(), (4, 3), (0,), Constant),
    "masked_select": (lambda x: x.masked_select(MASK), (4, 3), (0,), PerSample),
}  # fmt: skip


def _filled(x: Tensor, index: Any) -> Tensor:
    out = x.new_zeros(x.shape)
    out[index] = x[index] * 2
    return out


PICK = torch.tensor([2, 0])


def _turned() -> Tensor:
    index = torch.arange(4)
    index.view(-1).copy_(torch.tensor([1, 0, 3, 2]))
    return index


def _put(x: Tensor) -> Tensor:
    z = x[:, None].expand(-1, 4, -1) * 1
    z[:, :] = x
    return z


def _routed(x: Tensor) -> Tensor:
    """A mixture of experts: samples picked by a gate, and put back."""
    out = torch.zeros_like(x)
    for k in range(3):
        rows, columns = torch.where(x[:, :2] * 3 > k)
        rows = rows[columns == 0]
        out[rows] += x[rows] * (k + 1)
    return out


def _scattered(x: Tensor) -> Tensor:
    mask = torch.tensor([True, False, True, False])
    out = x.new_zeros(x.shape)
    out[mask] = x[mask] * 2
    return out


@pytest.mark.parametrize("name", CASES)
def test_rule(name: str) -> None:
    op, shape, axes, expected = CASES[name]
    for axis in axes:
        found = _check(op, shape, axis)
        assert set(found) == {expected}, found


# What an experiment can't tell: values outside of what a function takes are refused by it, a sample of which a mask has
# left nothing takes no part, and that a result is constant, or a number, is not seen.
_UNTRIED = frozenset(("any", "bce", "broadcast_tensors", "masked_fill", "routing", "argmax"))


@pytest.mark.parametrize("name", [name for name in CASES if name not in _UNTRIED])
def test_experiment_in_place_of_the_rule(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a rule knows where the samples are, so does a trial of the call; and what a trial finds is the truth."""
    op, shape, axes, expected = CASES[name]
    monkeypatch.setattr(registry, "RULES", {})
    verdict.forget()
    for axis in axes:
        found = _check(op, shape, axis, probe=True)
        if expected in (PerSample, SampleSum, Constant):
            assert set(found) == {expected}, found


def _functions() -> dict[str, list[Callable[..., Any]]]:
    """Functions of torch by the names of their rules."""
    found: dict[str, list[Callable[..., Any]]] = {}
    spaces = (torch, F, torch.special, torch.linalg, torch._C._nn, torch.Tensor)
    for space in spaces:
        for each in dir(space):
            function = getattr(space, each, None)
            if isinstance(function, property) or (hasattr(function, "__objclass__") and not callable(function)):
                found.setdefault(f"{each}.get", []).append(function.__get__)
            elif callable(function):
                found.setdefault(name_of(function), []).append(function)
    return found


FUNCTIONS = _functions()
OWN = {"scaled_by_gate"}  # of fastmtl.nn, and the ops


def test_rules_are_of_functions_that_there_are() -> None:
    gone = {name for name in registry.RULES if name not in FUNCTIONS and not name.endswith(".default")} - OWN
    assert not gone


# ways to call a function on samples [4, 6] or [4, 2, 6, 6]
CALLS: tuple[Callable[[Any, Tensor], Any], ...] = (
    lambda f, x: f(x),
    lambda f, x: f(x, x * 0.5 + 0.1),
    lambda f, x: f(x, 2.0),
    lambda f, x: f(x, 1),
    lambda f, x: f(x, x, x),
    lambda f, x: f(x, x > 0.5, 0.3),
    lambda f, x: f(x > 0.5, x, x * 2),
    lambda f, x: f([x, x]),
    lambda f, x: f((x * 5).long(), 2),
    lambda f, x: f(x, _weight(x.shape[-1], x.shape[-1])),
    lambda f, x: f(x, [2, 2]),
)
SINGLE = [
    name for name in sorted(registry.RULES) if name in FUNCTIONS and name not in ("cuda", "pin_memory", "rmatmul")
]
# its random numbers depend on how many other samples draw; results without a value, whatever the samples are
_UNSEEN = frozenset(("_standard_gamma", "empty_like", "logdet"))


@pytest.mark.parametrize("name", SINGLE)
def test_rule_and_experiment_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a function can be called in one of these ways: what its rule knows, the experiment doesn't deny."""
    for function in FUNCTIONS[name][:1]:
        if writes(function):
            continue
        for call in CALLS:
            for shape in ((4, 6), (4, 2, 6, 6)):
                x = (torch.rand(shape, dtype=torch.float64) + 0.1).requires_grad_()
                try:
                    if not all(each.numel() for each in nested(call(function, x))):
                        continue
                except Exception:  # not in this way
                    continue
                _compare(lambda x, c=call, f=function: c(f, x), x, name, monkeypatch)


def _compare(op: Callable[..., Any], x: Tensor, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    results, known = _axes(op, x, 0, False)
    verdict.forget()
    with monkeypatch.context() as patch:
        patch.setattr(registry, "RULES", {})
        torch.manual_seed(1)
        _, tried = _axes(op, x, 0, True)
    for k, (rule, seen) in enumerate(zip(known, tried, strict=True)):
        if not isinstance(rule, PerSample) or name in _UNSEEN or not results[k].requires_grad:
            continue
        if isinstance(seen, PerSample):
            assert seen.axis == rule.axis and torch.equal(seen.positions(), rule.positions())
        else:
            assert "mixes samples" not in (reason(seen) or ""), (name, rule, seen)
