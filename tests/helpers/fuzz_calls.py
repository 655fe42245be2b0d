"""The torch calls that random chains are made of: each is drawn for a tensor of one shape, and takes one like it.

Every maker gives a function of one tensor that returns one tensor, and leaves its argument as it is: what is written in
place is written into a copy, or into a view of one.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Step = Callable[[Tensor], Tensor]


class Draw:
    """Random numbers and tensors for the arguments of a call on `x`, in a batch of n samples."""

    def __init__(self, seed: int, n: int) -> None:
        self.choose = random.Random(seed)
        self._generator = torch.Generator().manual_seed(seed)
        self.n = n

    def values(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=self._generator)

    def numbers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=self._generator)

    def order(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self._generator)

    def dim(self, x: Tensor) -> int:
        """More often not the first, which carries the samples most of the time: what mixes them is refused."""
        if x.dim() > 1 and self.choose.random() < 0.8:
            return self.choose.choice([-1, self.choose.randrange(1, x.dim())])
        return self.choose.randrange(-x.dim(), x.dim())

    def place(self, x: Tensor) -> int:
        """A dimension, counted from the first."""
        return self.dim(x) % x.dim()

    def dims(self, x: Tensor) -> tuple[int, int]:
        return self.choose.randrange(x.dim()), self.choose.randrange(x.dim())

    def beside(self, x: Tensor) -> Tensor:
        """A constant that broadcasts against x."""
        shape = [s if self.choose.random() < 0.6 else 1 for s in x.shape]
        return self.values(*shape[self.choose.randrange(len(shape) + 1) :])

    def mask(self, x: Tensor, dims: int | None = None) -> Tensor:
        shape = x.shape if dims is None else x.shape[:dims]
        return self.values(*shape) > -0.3

    def shape_along(self, x: Tensor, dim: int, size: int) -> list[int]:
        """Of `x`, with another size in one dimension."""
        return [*x.shape[:dim], size, *x.shape[dim + 1 :]]


def _at(dim: int, index: object) -> tuple[object, ...]:
    """What picks `index` from a dimension."""
    return (slice(None),) * dim + (index,)


def _shapes(d: Draw, x: Tensor) -> Step:
    dim, k = d.dim(x), d.place(x)
    a, b = d.dims(x)
    order = d.order(x.dim()).tolist()
    return d.choose.choice(
        [
            lambda x: x.transpose(a, b), lambda x: x.movedim(a, b), lambda x: x.swapaxes(a, b),
            lambda x: x.permute(order), lambda x: x.unsqueeze(dim), lambda x: x.squeeze(), lambda x: x.squeeze(dim),
            lambda x: x.T, lambda x: x.mT, lambda x: x.flatten(), lambda x: x.flatten(k), lambda x: x.flatten(0, k),
            lambda x: x.ravel(), lambda x: x.unflatten(dim, (1, -1)), lambda x: x.reshape(*x.shape[:k], -1),
            lambda x: x.reshape(-1, x.shape[-1]), lambda x: x.view(*x.shape, 1), lambda x: x.contiguous().view(-1),
            lambda x: x.view_as(x), lambda x: x[None], lambda x: x[..., None, :], lambda x: x.expand(2, *x.shape),
            lambda x: x.unsqueeze(dim).expand_as(x.unsqueeze(dim)), lambda x: torch.broadcast_to(x, (2, *x.shape)),
            lambda x: torch.atleast_3d(x), lambda x: torch.atleast_2d(x), lambda x: x.repeat(*[2] * x.dim()),
            lambda x: x.tile(2), lambda x: x.repeat_interleave(2, dim),
            lambda x: x.repeat_interleave(torch.arange(x.shape[dim]), dim), lambda x: x.diagonal(0, a, b),
            lambda x: torch.diag_embed(x), lambda x: x.tril(), lambda x: x.triu(1), lambda x: x.roll(1, dim),
            lambda x: x.roll((1, 1), (a, b)), lambda x: x.flip(dim), lambda x: x.flip(a, b) if a != b else x.flip(a),
            lambda x: x.rot90(1, [a, b]), lambda x: x.fliplr(), lambda x: F.pad(x, (1, 0)),
            lambda x: F.pad(x, (0, 0, 0, 1)), lambda x: F.pad(x, (1, 1), mode="circular"),
            lambda x: F.pad(x, (1, 0), mode="replicate"), lambda x: x.unfold(dim, 1, 1), lambda x: x.unfold(dim, 2, 1),
            lambda x: x.clone(), lambda x: x.contiguous(),
            lambda x: x.contiguous().as_strided(x.shape, x.contiguous().stride()), lambda x: torch.block_diag(x, x),
            lambda x: torch.stack(torch.meshgrid(x.flatten(), x.flatten(), indexing="ij")),
            lambda x: torch.combinations(x), lambda x: torch.cartesian_prod(x, x), lambda x: torch.vander(x, 3),
            lambda x: F.pixel_shuffle(x, 2), lambda x: F.channel_shuffle(x, 2), lambda x: F.unfold(x, 1),
            lambda x: F.one_hot(x.detach().argmax(dim)) * x.amax(dim, keepdim=True),
        ]
    )  # fmt: skip


def _reshape(d: Draw, x: Tensor) -> Step:
    sizes = list(x.shape)
    if d.choose.random() < 0.5 and len(sizes) > 1:
        k = d.choose.randrange(len(sizes) - 1)
        sizes[k : k + 2] = [sizes[k] * sizes[k + 1]]
    else:
        k = d.choose.randrange(len(sizes))
        parts = [a for a in range(1, sizes[k] + 1) if sizes[k] % a == 0]
        a = d.choose.choice(parts)
        sizes[k : k + 1] = [a, sizes[k] // a]
    return lambda x: x.reshape(sizes)


def _elementwise(d: Draw, x: Tensor) -> Step:
    dim, other, mask = d.dim(x), d.beside(x), d.mask(x)
    return d.choose.choice(
        [
            lambda x: x.tanh(), lambda x: F.relu(x), lambda x: F.gelu(x), lambda x: F.silu(x), lambda x: x.sigmoid(),
            lambda x: F.softplus(x), lambda x: F.elu(x), lambda x: F.leaky_relu(x, 0.1), lambda x: F.hardtanh(x),
            lambda x: x.sin(), lambda x: x.clamp(-3, 3).exp(), lambda x: x.abs(), lambda x: x.square(),
            lambda x: x.abs().add(1).log(), lambda x: x.abs().add(1).sqrt(), lambda x: x.abs().add(1).pow(1.5),
            lambda x: x.erf(), lambda x: x.atan(), lambda x: x * other, lambda x: x + other, lambda x: other - x,
            lambda x: other * x.sigmoid() - x, lambda x: -x, lambda x: x / (1 + x.square()),
            lambda x: torch.addcmul(x, x, other), lambda x: torch.addcdiv(x, x, 2 + other.square()),
            lambda x: torch.where(mask, x, 0.0), lambda x: torch.where(mask, x, -x),
            lambda x: torch.where(x > 0, x, x * other), lambda x: x.masked_fill(mask, 0.3), lambda x: x * mask,
            lambda x: x.clamp(-1, 1), lambda x: x.clamp(max=other), lambda x: torch.maximum(x, other),
            lambda x: torch.minimum(x, x.flip(dim)), lambda x: x.fmod(1.5), lambda x: x.nan_to_num(),
            lambda x: F.threshold(x, 0.1, 0.0), lambda x: torch.lerp(x, x * 2, 0.3),
            lambda x: torch.lerp(x, other, 0.3), lambda x: torch.logaddexp(x, x.flip(dim)),
            lambda x: torch.atan2(x, 1 + other.square()), lambda x: torch.hypot(x, 1 + other.square()),
            lambda x: x.copysign(other), lambda x: torch.xlogy(x, 1 + other.square()), lambda x: x.detach().sign() * x,
            lambda x: x * x.detach().mean(), lambda x: x * (x.detach() > x.detach().mean()),
            lambda x: x * x.detach().mean(dim, keepdim=True), lambda x: x * x.detach().argsort(dim),
            lambda x: x + x.flip(dim), lambda x: x * x.roll(1, dim),
            lambda x: x * x.detach().round().long().clamp(-2, 2), lambda x: x * (x > 0).sum(dim, keepdim=True),
            lambda x: x * torch.bucketize(x.detach(), torch.tensor([-0.5, 0.5], dtype=x.dtype)),
            lambda x: x / x.numel(), lambda x: x * (x.detach() > 0).any(dim, keepdim=True),
            lambda x: x * torch.isfinite(x), lambda x: x.to(x.dtype),
            lambda x: x * torch.arange(x.shape[dim]).reshape([-1 if k == dim % x.dim() else 1 for k in range(x.dim())]),
        ]
    )  # fmt: skip


def _random(d: Draw, x: Tensor) -> Step:
    dim, seed = d.dim(x), d.choose.randrange(100)

    def own(x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return x * torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)

    def drawn(x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return x * torch.bernoulli(x.detach().sigmoid(), generator=generator)

    return d.choose.choice(
        [
            own, drawn, lambda x: F.dropout(x, 0.3), lambda x: F.alpha_dropout(x, 0.2, True),
            lambda x: F.dropout1d(x, 0.3), lambda x: F.dropout2d(x, 0.3),
            lambda x: F.feature_alpha_dropout(x, 0.3, True), lambda x: F.rrelu(x, training=True),
            lambda x: x + torch.randn_like(x), lambda x: x * torch.rand(x.shape), lambda x: x[torch.randperm(len(x))],
            lambda x: x.index_select(dim, torch.randperm(x.shape[dim])), lambda x: x * torch.rand(()),
            lambda x: x * x.detach().sigmoid().bernoulli(), lambda x: x * torch.empty_like(x).bernoulli_(0.7),
            lambda x: F.gumbel_softmax(x, dim=dim), lambda x: x * torch.randint_like(x, 3),
            lambda x: x.detach().exp().multinomial(1) * x, lambda x: F.dropout(x, 0.3, inplace=False) * 1.0,
            lambda x: F.dropout(x, 0.5, False),
        ]
    )  # fmt: skip


def _picked(d: Draw, x: Tensor) -> Step:
    k = d.place(x)
    size = x.shape[k]
    index = d.numbers(size, d.choose.choice([1, 2, size, d.n]))
    order, one, step = d.order(size), d.choose.randrange(size), d.choose.choice([2, 3])
    spread, all_of = d.numbers(size, *x.shape), d.numbers(x.numel(), 3)
    part, mask = d.mask(x, d.choose.randrange(1, x.dim() + 1)), d.mask(x)
    rows, columns = d.numbers(x.shape[0], 3), d.numbers(x.shape[-1], 3)
    return d.choose.choice(
        [
            lambda x: x.index_select(k, index), lambda x: x[_at(k, order)], lambda x: x[_at(k, index)],
            lambda x: x[_at(k, slice(None, None, step))], lambda x: x[_at(k, one)], lambda x: x[_at(k, [one])],
            lambda x: x[..., one], lambda x: x[one:], lambda x: x[..., :-1], lambda x: x[_at(k, slice(one, None))],
            lambda x: x.narrow(k, one, 1), lambda x: x.select(k, one), lambda x: x.gather(k, spread),
            lambda x: x.take_along_dim(spread, k), lambda x: x.gather(k, x.detach().argsort(k)),
            lambda x: x.take(torch.arange(x.numel())), lambda x: x.take(all_of), lambda x: x[part],
            lambda x: x.masked_select(mask), lambda x: x[x.detach() > 0], lambda x: x[rows, columns],
            lambda x: x[torch.arange(x.shape[0]), columns[0]], lambda x: x[rows[:, None], columns],
            lambda x: x[torch.arange(x.shape[0]), x.detach().argmax(1)], lambda x: x[torch.arange(x.shape[0])],
            lambda x: x[order.argsort()], lambda x: x[torch.arange(len(x)).flip(0)],
            lambda x: x.index_select(k, order).index_select(k, order.argsort()),
            lambda x: torch.tensor_split(x, 2, k)[0], lambda x: x.split(1, k)[0], lambda x: x.chunk(2, k)[-1],
            lambda x: x.unbind(k)[one], lambda x: x.hsplit(1)[0], lambda x: x[x.detach().sum(-1) > 0],
            lambda x: x[(x.detach() > 0).nonzero(as_tuple=True)], lambda x: torch.argwhere(x.detach() > 0) * x.sum(),
            lambda x: x[None, ..., 0],
        ]
    )  # fmt: skip


def _written(d: Draw, x: Tensor) -> Step:
    k, other, mask = d.place(x), d.beside(x), d.mask(x)
    size = x.shape[k]
    start, length = d.choose.randrange(size), d.choose.randrange(1, size + 1)
    index, whole, one = _at(k, slice(start, start + length)), d.values(*x.shape), d.choose.randrange(size)
    places, order = d.numbers(size, 2), d.order(size)
    how = d.choose.randrange(24)

    def write(x: Tensor) -> Tensor:
        out = torch.zeros_like(x) if how in (3, 4) else x * 1.0
        if how == 0:
            out[index] = 0.5
        elif how == 1:
            out[index] = (x * 2)[index]
        elif how == 2:
            out[index].mul_(0.5)
        elif how == 3:
            out[index] = x[index]
        elif how == 4:
            out.copy_(x)
        elif how == 5:
            out[mask] = 0.0
        elif how == 6:
            out[mask] = x[mask] * 2
        elif how == 7:
            out.add_(other.expand(x.shape)).mul_(2)
        elif how == 8:
            out.clamp_(-1, 1).sub_(x)
        elif how == 9:
            out.masked_fill_(mask, 0.1)
        elif how == 10:
            out.index_fill_(k, places, 0.2)
        elif how == 11:
            out.index_copy_(k, order, x)
        elif how == 12:
            out.index_put_((torch.arange(len(x)),), x * 3)
        elif how == 13:
            out.select(k, one).add_(1).mul_(2)
        elif how == 14:
            out.transpose(0, -1).mul_(2)
        elif how == 15:
            out.view(-1)[::2] = 0.5
        elif how == 16:
            out += whole
        elif how == 17:
            out.neg_().tanh_()
        elif how == 18:
            out.masked_scatter_(mask, whole)
        elif how == 19:
            out.diagonal().mul_(3)
        elif how == 20:
            out.narrow(k, start, 1).copy_(x.narrow(k, one, 1))
        elif how == 21:
            out.select(k, one).zero_()
        elif how == 22:
            torch.nn.functional.relu(out, inplace=True)
        else:
            out.fill_diagonal_(0.4)
        return out

    return write


def _scattered(d: Draw, x: Tensor) -> Step:
    k = d.place(x)
    size = d.choose.choice([2, 3, x.shape[k], d.n])
    index = d.numbers(size, x.shape[k])
    shape = d.shape_along(x, k, size)
    spread = index.reshape([-1 if j == k else 1 for j in range(x.dim())]).expand(x.shape)
    apart, one, places = d.numbers(size, *x.shape), d.choose.randrange(x.shape[k]), d.numbers(x.shape[k], 2)
    how = d.choose.choice(["sum", "prod", "mean", "amax", "amin"])
    order = d.order(x.shape[k])
    return d.choose.choice(
        [
            lambda x: x.new_zeros(shape).index_add(k, index, x),
            lambda x: x.new_zeros(shape).index_add_(k, index, x, alpha=2.0),
            lambda x: x.new_zeros(shape).scatter_add(k, spread, x),
            lambda x: x.new_zeros(shape).scatter_add_(k, apart, x), lambda x: x.new_zeros(shape).scatter(k, spread, x),
            lambda x: x.new_ones(shape).scatter_reduce(k, spread, x, how, include_self=False),
            lambda x: x.new_ones(shape).scatter_reduce(k, apart, x, how),
            lambda x: x.new_ones(shape).index_reduce(k, index, x, "mean"),
            lambda x: x.index_put((index % len(x),), x[index % len(x)] * 2),
            lambda x: x.new_zeros(shape).index_copy(k, index, x),
            lambda x: x.select_scatter(x.select(k, one) * 2, k, one),
            lambda x: x.slice_scatter(x.narrow(k, one, 1) * 2, k, one, one + 1),
            lambda x: x.diagonal_scatter(x.diagonal() * 2), lambda x: x.index_fill(k, places, 0.4),
            lambda x: x.index_copy(k, order, x),
            lambda x: x.new_zeros(size, *x.shape[1:]).index_put((index,), x, accumulate=True),
            lambda x: x.scatter(k, spread % x.shape[k], 0.5),
            lambda x: torch.segment_reduce(x, "sum", lengths=torch.tensor([1, len(x) - 1])),
            lambda x: x.masked_scatter(x.detach() > 0, x * 2),
            lambda x: torch.zeros(size, dtype=x.dtype).put_(torch.arange(size), x.flatten()[:size]) + 0 * x.sum(),
        ]
    )  # fmt: skip


def _joined(d: Draw, x: Tensor) -> Step:
    k, other, length = d.place(x), d.values(*x.shape), d.choose.choice([1, 2])
    more = d.values(*d.shape_along(x, k, length))
    return d.choose.choice(
        [
            lambda x: torch.cat([x, x * 2], k), lambda x: torch.cat([x, other], k), lambda x: torch.cat([more, x], k),
            lambda x: torch.stack([x, x.sin()], k), lambda x: torch.stack([x, other], k),
            lambda x: torch.cat(list(x.chunk(2, k))[::-1], k),
            lambda x: torch.stack([part * 2 for part in x.unbind(k)], k),
            lambda x: torch.cat([p.tanh() for p in x.split(1, k)], k),
            lambda x: torch.stack(list(x.unbind(k))[::-1], k), lambda x: torch.dstack([x, x]),
            lambda x: torch.hstack([x, x]), lambda x: torch.vstack([x, other]), lambda x: torch.column_stack([x, x]),
            lambda x: sum(x.unbind(k)), lambda x: torch.cat([x[:1], x], 0),
            lambda x: torch.stack([x[i] * (i + 1) for i in range(len(x))]),
            lambda x: torch.cat([x[i : i + 1].sigmoid() for i in range(len(x))]),
        ]
    )  # fmt: skip


def _products(d: Draw, x: Tensor) -> Step:
    last = x.shape[-1]
    first = x.shape[-2] if x.dim() > 1 else last
    w, left, table = d.values(last, 3), d.values(3, first), d.values(4, last)
    letters = "abcdefgh"[: x.dim()]
    gone = d.choose.choice(letters)
    rest = letters.replace(gone, "z")
    size = x.shape[letters.index(gone)]
    square = d.values(size, d.choose.choice([2, size]))
    batch = d.values(x.shape[0], last, 2)
    kernel, half, bias, cube = d.values(2, first, 2), d.values(first, 1, 1), d.values(3), d.values(4, last, last)
    return d.choose.choice(
        [
            lambda x: x @ w, lambda x: left @ x, lambda x: x @ x.mT, lambda x: torch.cdist(x, table),
            lambda x: torch.kron(x, w[:2]), lambda x: torch.einsum(f"{letters},{gone}z->{rest}", x, square),
            lambda x: torch.tensordot(x, w, 1),
            lambda x: torch.einsum(f"{letters},{letters}->{letters.replace(gone, '')}", x, x),
            lambda x: torch.einsum("...k,kj->...j", x, w), lambda x: F.linear(x, table),
            lambda x: torch.addmm(bias, x, w), lambda x: torch.bmm(x, batch), lambda x: x.matmul(batch),
            lambda x: torch.baddbmm(batch[:, :1], x, batch), lambda x: torch.einsum("a...,a...->a", x, x),
            lambda x: x.mv(w[:, 0]), lambda x: torch.outer(x, w[:, 0]), lambda x: torch.outer(x, x),
            lambda x: torch.dot(x, x), lambda x: torch.inner(x, table), lambda x: torch.inner(x, x),
            lambda x: torch.linalg.multi_dot([x, w, bias[:, None]]), lambda x: F.bilinear(x, x, cube),
            lambda x: F.conv1d(x, kernel), lambda x: F.conv_transpose1d(x, kernel.transpose(0, 1)),
            lambda x: F.conv1d(x, half, groups=first), lambda x: F.scaled_dot_product_attention(x, x, x),
            lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]),
            lambda x: torch.softmax(x @ x.mT, -1) @ x, lambda x: F.cosine_similarity(x[:, None], table[None], -1),
            lambda x: torch.cross(x, w[:, :1].T.expand_as(x), -1), lambda x: torch.linalg.vecdot(x, x),
            lambda x: x.mul(x).sum(-1, keepdim=True) * x, lambda x: torch.matrix_power(x @ x.mT, 2),
            lambda x: torch.chain_matmul(x, w), lambda x: torch.func.vmap(lambda row: row @ w)(x),
            lambda x: F.embedding(x.detach().abs().long().clamp(max=3), table) * x[..., None],
            lambda x: torch.einsum("ab,cb->ac", x, x), lambda x: torch.einsum("ab,ab,cb->ac", x, x, table),
        ]
    )  # fmt: skip


def _reductions(d: Draw, x: Tensor) -> Step:
    dim, (a, b) = d.dim(x), d.dims(x)
    keep, both = d.choose.random() < 0.5, tuple(sorted({a, b}))
    mask = d.mask(x)
    return d.choose.choice(
        [
            lambda x: x.sum(dim, keep), lambda x: x.mean(dim, keep), lambda x: x.sum(both, keep),
            lambda x: x.mean(both), lambda x: x.amax(dim, keep), lambda x: x.amin(both), lambda x: x.max(dim).values,
            lambda x: x.min(dim, keep).values, lambda x: x.max(dim).indices * x.sum(dim),
            lambda x: torch.aminmax(x, dim=dim)[0], lambda x: x.logsumexp(dim, keep), lambda x: x.var(dim),
            lambda x: x.std(dim, keepdim=keep), lambda x: torch.std_mean(x, dim)[0],
            lambda x: torch.var_mean(x, dim, keepdim=keep)[1], lambda x: x.norm(dim=dim, keepdim=keep),
            lambda x: x.norm(p=1, dim=dim), lambda x: torch.linalg.vector_norm(x, 3, dim),
            lambda x: torch.linalg.norm(x, dim=dim), lambda x: torch.linalg.matrix_norm(x),
            lambda x: x.prod(dim, keep), lambda x: x.median(dim).values, lambda x: x.nanmedian(dim).values,
            lambda x: x.quantile(0.4, dim), lambda x: x.mode(dim).values, lambda x: x.kthvalue(1, dim, keep).values,
            lambda x: x.nansum(dim), lambda x: x.nanmean(dim, keep), lambda x: x.sum(), lambda x: x.mean(),
            lambda x: x.max(), lambda x: x.norm(), lambda x: x.trace(), lambda x: torch.trapezoid(x, dim=dim),
            lambda x: x.diff(dim=dim), lambda x: x.sum_to_size(1, *x.shape[1:]), lambda x: torch.cov(x),
            lambda x: torch.masked.mean(x, dim, mask=mask), lambda x: (x * mask).sum(dim) / mask.sum(dim).clamp(min=1),
            lambda x: x.abs().sum(dim, keep), lambda x: x.square().mean(dim).add(1e-2).sqrt(),
            lambda x: F.cosine_similarity(x, x.sin(), dim=dim), lambda x: F.pairwise_distance(x, x.sin()),
            lambda x: torch.linalg.det(x @ x.mT + torch.eye(x.shape[-2], dtype=x.dtype)),
            lambda x: torch.linalg.slogdet(x @ x.mT + torch.eye(x.shape[-2], dtype=x.dtype))[1],
            lambda x: x.count_nonzero(dim) * x.sum(dim),
        ]
    )  # fmt: skip


def _along(d: Draw, x: Tensor) -> Step:
    dim, (a, _) = d.dim(x), d.dims(x)
    table = d.values(3)
    return d.choose.choice(
        [
            lambda x: x.cumsum(dim), lambda x: x.cumprod(dim), lambda x: x.logcumsumexp(dim),
            lambda x: x.cummax(dim).values, lambda x: x.cummin(dim)[0],
            lambda x: torch.cumulative_trapezoid(x, dim=dim), lambda x: x.softmax(dim),
            lambda x: F.log_softmax(x, dim), lambda x: F.softmin(x, dim), lambda x: x.sort(dim).values,
            lambda x: x.sort(dim, descending=True)[0], lambda x: x.msort(), lambda x: x.topk(1, dim).values,
            lambda x: x.topk(min(2, x.shape[dim]), dim)[0], lambda x: F.normalize(x, dim=dim),
            lambda x: x - x.mean(dim, keepdim=True), lambda x: x / (1 + x.square().sum(dim, keepdim=True)),
            lambda x: F.layer_norm(x, x.shape[-1:]), lambda x: F.rms_norm(x, x.shape[-1:]),
            lambda x: F.layer_norm(x, x.shape[1:]), lambda x: F.group_norm(x, 1), lambda x: F.instance_norm(x),
            lambda x: F.batch_norm(x, None, None, training=True), lambda x: F.local_response_norm(x, 2),
            lambda x: x.renorm(2, a, 0.7), lambda x: torch.fft.fft(x, dim=dim).real,
            lambda x: torch.fft.rfft(x, dim=dim).abs(), lambda x: torch.fft.fft2(x).imag,
            lambda x: torch.fft.ifft(torch.fft.fft(x, dim=dim), dim=dim).real,
            lambda x: torch.view_as_real(torch.complex(x, x.sin())).sum(-1),
            lambda x: F.avg_pool1d(x, 2, ceil_mode=True), lambda x: F.max_pool1d(x, 1),
            lambda x: F.max_pool1d(x, 2, return_indices=True)[0], lambda x: F.adaptive_avg_pool1d(x, 1),
            lambda x: F.adaptive_max_pool1d(x, 1), lambda x: F.lp_pool1d(x, 2, 1),
            lambda x: F.interpolate(x, scale_factor=2), lambda x: F.interpolate(x, size=2, mode="linear"),
            lambda x: F.glu(torch.cat([x, x], dim), dim), lambda x: torch.linalg.qr(x).R,
            lambda x: torch.linalg.svdvals(x), lambda x: torch.linalg.eigvalsh(x @ x.mT),
            lambda x: torch.linalg.cholesky(x @ x.mT + torch.eye(x.shape[-2], dtype=x.dtype)),
            lambda x: torch.linalg.solve(x @ x.mT + torch.eye(x.shape[-2], dtype=x.dtype), x),
            lambda x: torch.linalg.inv(x @ x.mT + torch.eye(x.shape[-2], dtype=x.dtype)),
            lambda x: torch.matrix_exp(0.1 * x @ x.mT), lambda x: torch.gradient(x, dim=dim)[0],
            lambda x: checkpoint(torch.tanh, x, use_reentrant=False),
            lambda x: checkpoint(lambda y: y.softmax(dim) * y, x, use_reentrant=False),
            lambda x: torch.stack([torch.outer(row, table).sum(-1) for row in x]),
            lambda x: torch.func.vmap(torch.cumsum, (0, None))(x, 0), lambda x: F.unfold(x[:, None], 1),
        ]
    )  # fmt: skip


# how often each is drawn
MAKERS = (
    [_shapes] * 4 + [_elementwise] * 5 + [_random, _scattered]
    + [_reshape, _picked, _written, _joined, _products, _reductions, _along] * 2
)  # fmt: skip
