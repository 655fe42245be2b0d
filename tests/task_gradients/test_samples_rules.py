"""Every rule of `one_pass` against what really depends on what: a changed sample changes its own part alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtl.task_gradients.one_pass.sample_axis import CONST, MIXING, SAMPLES, TOTAL, UNKNOWN, Samples, Tag, nested
from fastmtl.task_gradients.one_pass.tracker import Follow

N = 4


def _follow() -> Follow:
    ids = torch.arange(N)
    return Follow(Samples(ids, N, ("batch",)), 0, {}, {}, {}, {}, backward=lambda *a: None)


def _tags(op: Callable[..., Any], x: Tensor, axis: int) -> tuple[list[Tensor], list[Tag]]:
    follow = _follow()
    follow.mark(x, Tag(SAMPLES, axis, follow.samples))
    with follow:
        out = op(x)
    found = nested(out)
    return found, [follow.tag(t) for t in found]


def _check(op: Callable[..., Any], shape: tuple[int, ...], axis: int) -> list[str]:
    """The kinds of the results' tags, after each was compared with the truth."""
    torch.manual_seed(0)
    data = torch.rand(shape, dtype=torch.float64) + 0.1
    x = data.clone().requires_grad_()
    torch.manual_seed(1)
    results, tags = _tags(op, x, axis)
    for k, tag in enumerate(tags):
        if tag.kind == SAMPLES:
            _check_samples(op, data, axis, k, results[k], tag)
        elif tag.kind == TOTAL:
            _check_total(op, data, axis, k)
        elif tag.kind == CONST:
            assert not results[k].requires_grad
    return [t.kind for t in tags]


def _changed(data: Tensor, axis: int, i: int) -> Tensor:
    other = data.clone()
    other.select(axis, i).mul_(0.5).add_(0.01)
    return other.requires_grad_()


def _result(op: Callable[..., Any], x: Tensor, k: int) -> Tensor:
    torch.manual_seed(1)
    return nested(op(x))[k].detach()


def _check_samples(op: Any, data: Tensor, axis: int, k: int, result: Tensor, tag: Tag) -> None:
    n = len(tag.samples)
    assert result.shape[tag.axis] == tag.outer * n * tag.inner
    owner = tag.samples.ids[:, None].expand(-1, tag.inner).reshape(-1).repeat(tag.outer)
    for i in range(N):
        other = _result(op, _changed(data, axis, i), k)
        differs = (other != result).movedim(tag.axis, 0).reshape(result.shape[tag.axis], -1).any(1)
        assert not differs[owner != i].any(), f"sample {i} changes {differs.nonzero().flatten().tolist()}, {tag}"


def _check_total(op: Any, data: Tensor, axis: int, k: int) -> None:
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


# op, shape (the samples have size N), the axes that may carry them, and the kind of the result
LABELS = torch.tensor([0, 1, 2, 0])
TOKENS = LABELS.repeat(5)
CASES: dict[str, tuple[Callable[..., Any], tuple[int, ...], tuple[int, ...], str]] = {
    "relu": (torch.relu, (4, 3), (0,), SAMPLES),
    "add": (lambda x: x + _weight(3), (4, 3), (0,), SAMPLES),
    "radd": (lambda x: 1 + x, (4, 3), (0, ), SAMPLES),
    "rsub": (lambda x: 1 - x, (3, 4), (1,), SAMPLES),
    "rdiv": (lambda x: 1 / x, (3, 4), (1,), SAMPLES),
    "pow": (lambda x: x**2 + 2**x, (3, 4), (1,), SAMPLES),
    "join": (lambda x: x * x.unsqueeze(0), (4, 3), (0,), SAMPLES),
    "outer": (lambda x: x[:, None] * x[None, :], (4,), (0,), UNKNOWN),
    "clamp": (lambda x: x.clamp(0.2, 0.5), (4, 3), (0,), SAMPLES),
    "where": (lambda x: torch.where(x > 0.5, x, 0.0), (4, 3), (0,), SAMPLES),
    "masked_fill": (lambda x: x.masked_fill(x > 0.5, 1.0), (4, 3), (0,), SAMPLES),
    "view": (lambda x: x.view(4, 2, 3), (4, 6), (0,), SAMPLES),
    "view merged": (lambda x: x.view(-1, 3), (4, 4, 3), (0, 1), SAMPLES),
    "view back": (lambda x: x.view(-1, 3).view(2, 4, 3), (2, 4, 3), (1,), SAMPLES),
    "view parts": (lambda x: x.view(2, 2, 3), (4, 3), (0,), UNKNOWN),
    "view swapped": (lambda x: x.view(4, 2, 3), (2, 4, 3), (1,), UNKNOWN),
    "reshape": (lambda x: x.transpose(0, 1).reshape(-1, 3), (2, 4, 3), (1,), SAMPLES),
    "flatten": (lambda x: x.flatten(1), (4, 2, 3), (0,), SAMPLES),
    "flatten all": (torch.flatten, (4, 4, 4), (0, 1, 2), SAMPLES),
    "unflatten": (lambda x: x.unflatten(1, (2, 3)), (4, 6), (0,), SAMPLES),
    "transpose": (lambda x: x.transpose(0, 2), (4, 2, 4), (0, 2), SAMPLES),
    "mT": (lambda x: x.mT, (4, 2, 4), (0, 2), SAMPLES),
    "T": (lambda x: x.T, (4, 2), (0,), SAMPLES),
    "t": (lambda x: x.t(), (4, 2), (0,), SAMPLES),
    "permute": (lambda x: x.permute(2, 0, 1), (4, 4, 4), (0, 1, 2), SAMPLES),
    "permute negative": (lambda x: x.permute(-1, 0, 1), (4, 4, 4), (0, 1, 2), SAMPLES),
    "movedim": (lambda x: x.movedim(0, 2), (4, 4, 4), (0, 1, 2), SAMPLES),
    "movedim several": (lambda x: x.movedim((0, 1), (2, 0)), (4, 4, 4), (0, 1, 2), SAMPLES),
    "unsqueeze": (lambda x: x.unsqueeze(-2), (4, 4), (0, 1), SAMPLES),
    "squeeze": (lambda x: x.unsqueeze(0).squeeze(), (4, 4), (0, 1), SAMPLES),
    "squeeze dim": (lambda x: x.unsqueeze(1).squeeze(1), (4, 4), (0, 1), SAMPLES),
    "expand": (lambda x: x.unsqueeze(1).expand(-1, 5, -1), (4, 3), (0,), SAMPLES),
    "expand front": (lambda x: x.expand(5, -1, -1), (4, 3), (0,), SAMPLES),
    "repeat": (lambda x: x.repeat(2, 3), (4, 3), (0,), SAMPLES),
    "repeat front": (lambda x: x.repeat(3, 1, 1), (4, 3), (0,), SAMPLES),
    "tile": (lambda x: x.tile(3), (4, 3), (0,), SAMPLES),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 0), (4, 3), (0,), SAMPLES),
    "repeat_interleave other": (lambda x: x.repeat_interleave(2, 1), (4, 3), (0,), SAMPLES),
    "sum": (lambda x: x.sum(), (4, 3), (0, ), TOTAL),
    "sum samples": (lambda x: x.sum(0), (4, 3), (0,), TOTAL),
    "sum rest": (lambda x: x.sum((0, 2)), (2, 4, 3), (1,), SAMPLES),
    "sum keepdim": (lambda x: x.sum(0, keepdim=True), (2, 4, 3), (1,), SAMPLES),
    "mean": (lambda x: x.mean(-1), (4, 3), (0,), SAMPLES),
    "mean all": (lambda x: x.mean(), (4, 3), (0,), TOTAL),
    "mean squared": (lambda x: x.mean() ** 2, (4, 3), (0,), MIXING),
    "mean scaled": (lambda x: -2 * x.mean() / 3 + 1, (4, 3), (0,), TOTAL),
    "mean by mean": (lambda x: x.mean() / x.sum(), (4, 3), (0,), MIXING),
    "mean minus": (lambda x: x - x.mean(0), (4, 3), (0,), MIXING),
    "totals added": (lambda x: x.mean() + x.square().sum(), (4, 3), (0,), TOTAL),
    "total and samples": (lambda x: x + x.sum(), (4, 3), (0,), MIXING),
    "std": (lambda x: x.std(1), (4, 3), (0,), SAMPLES),
    "var unbiased": (lambda x: x.var(1, unbiased=False), (4, 3), (0,), SAMPLES),
    "var samples": (lambda x: x.var(0), (4, 3), (0,), MIXING),
    "var_mean": (lambda x: torch.var_mean(x, 1), (4, 3), (0,), SAMPLES),
    "norm": (lambda x: x.norm(dim=1), (4, 3), (0,), SAMPLES),
    "norm all": (lambda x: x.norm(), (4, 3), (0,), MIXING),
    "vector_norm": (lambda x: torch.linalg.vector_norm(x, dim=1), (4, 3), (0,), SAMPLES),
    "max": (lambda x: x.max(1).values, (4, 3), (0,), SAMPLES),
    "max pair": (lambda x: torch.max(x, x * 2), (4, 3), (0,), SAMPLES),
    "max all": (lambda x: x.max(), (4, 3), (0,), MIXING),
    "amax": (lambda x: x.amax((1, 2)), (4, 3, 2), (0,), SAMPLES),
    "logsumexp": (lambda x: x.logsumexp(0), (3, 4), (1,), SAMPLES),
    "argmax": (lambda x: x.argmax(1), (4, 3), (0,), SAMPLES),
    "any": (lambda x: (x > 2).any(), (4, 3), (0,), CONST),
    "softmax": (lambda x: x.softmax(-1), (4, 3), (0,), SAMPLES),
    "softmax samples": (lambda x: x.softmax(0), (4, 3), (0,), MIXING),
    "F.softmax": (lambda x: F.softmax(x, dim=1), (4, 3), (0,), SAMPLES),
    "log_softmax": (lambda x: F.log_softmax(x, 1), (4, 3), (0,), SAMPLES),
    "cumsum": (lambda x: x.cumsum(1), (4, 3), (0,), SAMPLES),
    "cumsum samples": (lambda x: x.cumsum(0), (4, 3), (0,), MIXING),
    "sort": (lambda x: x.sort(1), (4, 3), (0,), SAMPLES),
    "topk": (lambda x: x.topk(2, 1), (4, 3), (0,), SAMPLES),
    "flip": (lambda x: x.flip(1), (4, 3), (0,), SAMPLES),
    "flip samples": (lambda x: x.flip(0), (4, 3), (0,), MIXING),
    "normalize": (lambda x: F.normalize(x, dim=1), (4, 3), (0,), SAMPLES),
    "cosine": (lambda x: F.cosine_similarity(x, x * 2, dim=1), (4, 3), (0,), SAMPLES),
    "roll": (lambda x: x.roll(1, 1), (4, 3), (0,), SAMPLES),
    "roll samples": (lambda x: x.roll(1, 0), (4, 3), (0,), UNKNOWN),
    "cat": (lambda x: torch.cat([x, x], 1), (4, 3), (0,), SAMPLES),
    "cat samples": (lambda x: torch.cat([x, x * 2], 0), (4, 3), (0,), SAMPLES),
    "cat constant": (lambda x: torch.cat([x, _weight(1, 3)], 0), (4, 3), (0,), UNKNOWN),
    "stack": (lambda x: torch.stack([x, x], 0), (4, 3), (0,), SAMPLES),
    "stack last": (lambda x: torch.stack([x, x], -1), (4, 3), (0,), SAMPLES),
    "split": (lambda x: x.split([1, 2], 1), (4, 3), (0,), SAMPLES),
    "split samples": (lambda x: x.split([1, 3], 0), (4, 3), (0,), SAMPLES),
    "chunk": (lambda x: x.chunk(2, -1), (4, 6), (0,), SAMPLES),
    "chunk samples": (lambda x: torch.cat(x.chunk(2)), (4, 3), (0,), SAMPLES),
    "unbind": (lambda x: x.unbind(1), (4, 3), (0,), SAMPLES),
    "iterate": (lambda x: list(x), (3, 4), (1,), SAMPLES),
    "iterate over samples": (lambda x: list(x), (4, 3), (0,), UNKNOWN),
    "unbind samples": (lambda x: x.unbind(0), (4, 3), (0,), UNKNOWN),
    "select": (lambda x: x.select(0, 1), (3, 4), (1,), SAMPLES),
    "narrow": (lambda x: x.narrow(0, 1, 2), (4, 3), (0,), SAMPLES),
    "index int": (lambda x: x[:, 0], (4, 3), (0,), SAMPLES),
    "index last": (lambda x: x[-1], (3, 4), (1,), SAMPLES),
    "index sample": (lambda x: x[1], (4, 3), (0,), UNKNOWN),
    "index slice": (lambda x: x[1:], (4, 3), (0,), SAMPLES),
    "index step": (lambda x: x[::2], (4, 3), (0,), SAMPLES),
    "index none": (lambda x: x[:, None, :, None], (4, 3), (0,), SAMPLES),
    "index ellipsis": (lambda x: x[..., 0], (4, 3), (0,), SAMPLES),
    "index mask": (lambda x: x[torch.tensor([True, False, True, True])], (4, 3), (0,), SAMPLES),
    "index list": (lambda x: x[[2, 0]], (4, 3), (0,), SAMPLES),
    "index tensor": (lambda x: x[torch.tensor([3, 3, 0])], (4, 3), (0,), SAMPLES),
    "index other": (lambda x: x[:, torch.tensor([2, 0])], (4, 3), (0,), SAMPLES),
    "index two": (lambda x: x[:, torch.tensor([2, 0]), torch.tensor([1, 1])], (4, 3, 2), (0,), SAMPLES),
    "index apart": (lambda x: x[torch.tensor([2, 0]), :, torch.tensor([1, 1])], (3, 4, 2), (1,), SAMPLES),
    "index own": (lambda x: x[torch.arange(4), torch.tensor([2, 0, 1, 1])], (4, 3), (0,), SAMPLES),
    "index foreign": (lambda x: x[torch.tensor([1, 0, 2, 3]), torch.tensor([2, 0, 1, 1])], (4, 3), (0,), SAMPLES),
    "index arange of more dimensions": (
        lambda x: x[torch.arange(4)[:, None, None], torch.arange(3)[None, None, :]], (4, 3), (0,), SAMPLES
    ),
    "index by a row of arange": (lambda x: x[torch.arange(4), torch.zeros(5, 4).long()], (4, 3), (0,), SAMPLES),
    "index changed arange": (lambda x: x[_turned(), torch.zeros(4).long()], (4, 3), (0,), SAMPLES),
    "index single tensor": (lambda x: x[:, torch.tensor(1)], (4, 3), (0,), SAMPLES),
    "index tensors apart": (
        lambda x: x[:, torch.tensor(1), :, torch.tensor([0, 2])], (4, 3, 2, 3), (0,), UNKNOWN
    ),
    "cumsum axis": (lambda x: x.cumsum(axis=0), (4, 3), (0,), MIXING),
    "cumprod axis": (lambda x: x.cumprod(axis=0), (4, 3), (0,), MIXING),
    "stack axis": (lambda x: torch.stack([x] * 4, axis=1), (4, 3), (0,), SAMPLES),
    "mean axis": (lambda x: x.mean(axis=0, keepdims=True), (3, 4), (1,), SAMPLES),
    "var_mean unbiased": (lambda x: torch.var_mean(x, True), (4, 3), (0,), MIXING),
    "renorm": (lambda x: x.renorm(2, 1, 0.5), (4, 3), (0,), UNKNOWN),
    "quantile": (lambda x: x.quantile(0.5, 1), (4, 3), (0,), SAMPLES),
    "quantiles": (lambda x: x.quantile(torch.tensor([0.1, 0.5]).double(), 1), (4, 3), (0,), UNKNOWN),
    "channel_shuffle": (lambda x: F.channel_shuffle(x, 2), (4, 4, 3, 3), (0,), SAMPLES),
    "matmul batched vector": (lambda x: x @ _weight(3), (4, 2, 3), (0, ), SAMPLES),
    "vector matmul batched": (lambda x: _weight(2) @ x, (4, 2, 3), (0,), SAMPLES),
    "matmul by name": (lambda x: torch.matmul(other=_weight(3, 5), input=x), (4, 3), (0,), SAMPLES),
    "dot": (lambda x: x @ (x * 2), (4,), (0,), TOTAL),
    "outer products": (lambda x: x.T @ x, (4, 3), (0,), TOTAL),
    "squeeze_": (lambda x: (x[None] * 1).squeeze_(0), (4, 3), (0,), UNKNOWN),
    "cross_entropy of one": (lambda x: F.cross_entropy(x, torch.tensor(2)), (4,), (0,), MIXING),
    "mse crossed": (lambda x: F.mse_loss(x[:, :1], x[:, 0] * 2), (4, 3), (0,), UNKNOWN),
    "pairwise_distance": (lambda x: F.pairwise_distance(x, x * 2), (4, 3), (0,), SAMPLES),
    "pairwise_distance of one": (lambda x: F.pairwise_distance(x, x * 2), (4,), (0,), MIXING),
    "put into a square": (lambda x: _put(x), (4, 6), (0,), UNKNOWN),
    "broadcast_tensors": (lambda x: torch.broadcast_tensors(x, _weight(3)), (4, 3), (0,), SAMPLES),
    "split and joined": (lambda x: torch.cat([r * 2 for r in x.split(3)]) + x, (4, 3), (0,), SAMPLES),
    "joined and split": (lambda x: (lambda a, b: a * b)(*torch.cat([x, x * 2]).chunk(2)), (4, 3), (0,), SAMPLES),
    "scatter": (lambda x: torch.zeros_like(x).scatter(1, LABELS[:, None], 1.0) * x, (4, 3), (0,), SAMPLES),
    "index_add": (lambda x: x.new_zeros(4, 3).index_add(0, PICK, x[PICK] * 2), (4, 3), (0,), SAMPLES),
    "index_add of others": (lambda x: x.new_zeros(4, 3).index_add(0, PICK, x[PICK.flip(0)]), (4, 3), (0,), UNKNOWN),
    "routing": (lambda x: _routed(x), (4, 3), (0,), SAMPLES),
    "index_select": (lambda x: x.index_select(0, torch.tensor([1, 3])), (4, 3), (0,), SAMPLES),
    "gather": (lambda x: x.gather(1, torch.zeros(4, 1, dtype=torch.long)), (4, 3), (0,), SAMPLES),
    "table": (lambda x: _weight(7, 2)[(x * 5).long()], (4, 3), (0,), SAMPLES),
    "embedding": (lambda x: F.embedding((x * 5).long(), _weight(7, 2)), (4, 3), (0,), SAMPLES),
    "one_hot": (lambda x: F.one_hot((x * 5).long(), 7), (4, 3), (0,), SAMPLES),
    "linear": (lambda x: F.linear(x, _weight(5, 3)), (4, 2, 3), (0,), SAMPLES),
    "linear samples": (lambda x: F.linear(x, _weight(5, 4)), (3, 4), (1,), MIXING),
    "matmul": (lambda x: x @ _weight(3, 5), (4, 2, 3), (0,), SAMPLES),
    "rmatmul": (lambda x: _weight(5, 2) @ x, (4, 2, 3), (0,), SAMPLES),
    "rmatmul columns": (lambda x: _weight(5, 2) @ x, (2, 4), (1,), SAMPLES),
    "matmul vector": (lambda x: x @ _weight(3), (4, 3), (0,), SAMPLES),
    "vector matmul": (lambda x: _weight(4) @ x, (4, 3), (0,), TOTAL),
    "matmul contracted": (lambda x: _weight(5, 4) @ x, (4, 3), (0,), TOTAL),
    "bmm": (lambda x: torch.bmm(x, x.transpose(1, 2)), (4, 2, 3), (0,), SAMPLES),
    "gram": (lambda x: x @ x.T, (4, 3), (0,), MIXING),
    "einsum": (lambda x: torch.einsum("ncd,de->nec", x, _weight(3, 5)), (4, 2, 3), (0,), SAMPLES),
    "einsum pair": (lambda x: torch.einsum("nij,nkj->nik", x, x), (4, 2, 3), (0,), SAMPLES),
    "einsum sum": (lambda x: torch.einsum("ncd,de->ec", x, _weight(3, 5)), (4, 2, 3), (0,), TOTAL),
    "conv1d": (lambda x: F.conv1d(x, _weight(5, 2, 3)), (4, 2, 6), (0,), SAMPLES),
    "conv2d": (lambda x: F.conv2d(x, _weight(5, 2, 3, 3), padding=1), (4, 2, 6, 5), (0,), SAMPLES),
    "conv unbatched": (lambda x: F.conv1d(x, _weight(5, 4, 3)), (4, 6), (0,), MIXING),
    "conv_transpose2d": (lambda x: F.conv_transpose2d(x, _weight(2, 5, 3, 3)), (4, 2, 6, 5), (0,), SAMPLES),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), (4, 2, 6, 4), (0,), SAMPLES),
    "max_pool indices": (lambda x: F.max_pool2d(x, 2, return_indices=True), (4, 2, 6, 4), (0,), SAMPLES),
    "avg_pool": (lambda x: F.adaptive_avg_pool2d(x, 2), (4, 2, 6, 4), (0, ), SAMPLES),
    "interpolate": (lambda x: F.interpolate(x, scale_factor=2), (4, 2, 3, 3), (0,), SAMPLES),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), (4, 8, 3, 3), (0,), SAMPLES),
    "unfold": (lambda x: F.unfold(x, 2), (4, 2, 3, 3), (0,), SAMPLES),
    "Tensor.unfold": (lambda x: x.unfold(1, 2, 1), (4, 5), (0,), SAMPLES),
    "pad": (lambda x: F.pad(x, (1, 1)), (4, 5), (0,), SAMPLES),
    "pad samples": (lambda x: F.pad(x, (0, 0, 1, 1)), (4, 5), (0,), UNKNOWN),
    "layer_norm": (lambda x: F.layer_norm(x, (3,)), (4, 2, 3), (0, ), SAMPLES),
    "layer_norm samples": (lambda x: F.layer_norm(x, (4, 3)), (4, 3), (0,), MIXING),
    "rms_norm": (lambda x: F.rms_norm(x, (3,)), (4, 2, 3), (0,), SAMPLES),
    "group_norm": (lambda x: F.group_norm(x, 2), (4, 4, 3), (0,), SAMPLES),
    "instance_norm": (lambda x: F.instance_norm(x), (4, 4, 3), (0,), SAMPLES),
    "batch_norm eval": (lambda x: F.batch_norm(x, _weight(3), _weight(3)), (4, 3), (0,), SAMPLES),
    "prelu": (lambda x: F.prelu(x - 0.5, _weight(3)), (4, 3), (0,), SAMPLES),
    "glu": (lambda x: F.glu(x, -1), (4, 6), (0,), SAMPLES),
    "glu samples": (lambda x: F.glu(x, 0), (4, 6), (0,), MIXING),
    "glu before": (lambda x: F.glu(x, 1), (4, 6, 3), (0,), SAMPLES),
    "dropout": (lambda x: F.dropout(x, 0.5), (4, 6), (0,), SAMPLES),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x), (4, 2, 3, 5), (0,), SAMPLES),
    "attention over samples": (lambda x: F.scaled_dot_product_attention(x, x, x), (2, 4, 5), (1,), MIXING),
    "cross_entropy": (lambda x: F.cross_entropy(x, LABELS, reduction="none"), (4, 3), (0,), SAMPLES),
    "cross_entropy mean": (lambda x: F.cross_entropy(x, LABELS), (4, 3), (0,), TOTAL),
    "cross_entropy pixels": (lambda x: F.cross_entropy(x, torch.zeros(4, 5, dtype=torch.long)), (4, 3, 5), (0,), TOTAL),
    "cross_entropy tokens": (lambda x: F.cross_entropy(x.view(-1, 3), TOKENS), (4, 5, 3), (0,), TOTAL),
    "mse": (lambda x: F.mse_loss(x, torch.zeros(4, 3).double()), (4, 3), (0,), TOTAL),
    "mse time first": (lambda x: F.mse_loss(x, torch.zeros(3, 4).double(), reduction="none"), (3, 4), (1,), SAMPLES),
    "bce": (lambda x: F.binary_cross_entropy(x.sigmoid(), torch.zeros(4, 3).double()), (4, 3), (0,), TOTAL),
    "kl_div": (lambda x: F.kl_div(x.log_softmax(1), _weight(4, 3), reduction="batchmean"), (4, 3), (0,), TOTAL),
    "gaussian_nll": (lambda x: F.gaussian_nll_loss(x, torch.zeros(4, 3).double(), x), (4, 3), (0,), TOTAL),
    "triplet": (lambda x: F.triplet_margin_loss(x, x * 2, x + 1), (4, 3), (0,), TOTAL),
    "smooth_l1": (lambda x: F.smooth_l1_loss(x, torch.zeros(4, 3).double(), reduction="sum"), (4, 3), (0,), TOTAL),
    "gumbel": (lambda x: F.gumbel_softmax(x, dim=1), (4, 3), (0,), SAMPLES),
    "detach": (lambda x: x.detach() * 2, (4, 3), (0,), SAMPLES),
    "new_zeros": (lambda x: x.new_zeros(x.shape[0], 2), (4, 3), (0,), CONST),
    "zeros_like": (lambda x: torch.zeros_like(x) + x, (4, 3), (0,), SAMPLES),
    "fill shifted": (lambda x: _filled(x, (slice(None), slice(1, None))), (4, 3), (0,), SAMPLES),
    "fill samples": (lambda x: _filled(x, (slice(1, None), slice(None))), (4, 3), (0,), UNKNOWN),
    "scatter back": (lambda x: _scattered(x), (4, 3), (0,), SAMPLES),
    "clone": (lambda x: x.clone().contiguous().to(torch.float32).double(), (4, 3), (0,), SAMPLES),
    "diff": (lambda x: x.diff(dim=1), (4, 3), (0,), SAMPLES),
    "logdet": (lambda x: torch.logdet(x @ x.mT + torch.eye(3)), (4, 3, 3), (0,), SAMPLES),
    "lerp": (lambda x: torch.lerp(x, x * 2, 0.5), (4, 3), (0,), SAMPLES),
    "cdist": (lambda x: torch.cdist(x, _weight(5, 3)), (4, 3), (0,), UNKNOWN),
    "tril": (lambda x: x.tril(), (4, 3, 3), (0,), SAMPLES),
    "meshgrid": (lambda x: torch.meshgrid(x, x, indexing="ij"), (4,), (0,), UNKNOWN),
    "nonzero": (lambda x: x.nonzero(), (4, 3), (0,), CONST),
    "masked_select": (lambda x: x.masked_select(x > 0.4), (4, 3), (0,), UNKNOWN),
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
        kinds = _check(op, shape, axis)
        assert set(kinds) == {expected}, kinds
