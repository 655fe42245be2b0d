"""Chains of random torch calls through `one_pass`, against what really depends on what.

Run it as a script, for as many chains as there is time for::

    python tests/helpers/fuzz_one_pass.py --seed 0 --count 1000

A chain begins where a parameter meets samples, and ends in a loss, or in a second parameter and a loss behind it.
Either it is refused, or its rows must be right. Right means: the loss is a sum of parts of single tasks (its second
derivative by two tasks' copies of the parameter is zero), and each row is the gradient of that task's copy. Where a
second parameter meets the end of the chain, each element there must depend on the samples of one task alone, whose copy
it gets.
"""

from __future__ import annotations

import argparse
import random
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmtl

Step = Callable[[Tensor], Tensor]
_LARGEST = 400
_TOLERANCE = 1e-8


class Draw:
    """Random numbers and tensors for the arguments of a call on `x`."""

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
        return self.choose.randrange(-x.dim(), x.dim())

    def dims(self, x: Tensor) -> tuple[int, int]:
        return self.choose.randrange(x.dim()), self.choose.randrange(x.dim())

    def beside(self, x: Tensor) -> Tensor:
        """A constant that broadcasts against x."""
        shape = [s if self.choose.random() < 0.6 else 1 for s in x.shape]
        return self.values(*shape[self.choose.randrange(len(shape) + 1) :])

    def mask(self, x: Tensor, dims: int | None = None) -> Tensor:
        shape = x.shape if dims is None else x.shape[:dims]
        return self.values(*shape) > -0.3


def _pick(d: Draw, x: Tensor) -> Step:
    dim = d.dim(x)
    index = d.numbers(x.shape[dim], d.choose.choice([1, 2, x.shape[dim], d.n]))
    return lambda x: x.index_select(dim, index)


def _reorder(d: Draw, x: Tensor) -> Step:
    dim = d.choose.randrange(x.dim())
    order = d.order(x.shape[dim])
    return lambda x: x[(slice(None),) * dim + (order,)]


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


def _written(d: Draw, x: Tensor) -> Step:
    dim, other = d.choose.randrange(x.dim()), d.beside(x)
    size = x.shape[dim]
    start, length = d.choose.randrange(size), d.choose.randrange(1, size + 1)
    how = d.choose.randrange(4)
    index = (slice(None),) * dim + (slice(start, start + length),)

    def write(x: Tensor) -> Tensor:
        out = torch.zeros_like(x) if how == 3 else x * 1.0
        if how == 0:
            out[index] = 0.5
        elif how == 1:
            out[index] = (x * 2)[index]
        elif how == 2:
            out[index].mul_(0.5)
        else:
            out[index] = x[index]
        return out + 0 * other

    return write


def _added(d: Draw, x: Tensor) -> Step:
    dim = d.choose.randrange(x.dim())
    size = d.choose.choice([2, 3, x.shape[dim], d.n])
    index = d.numbers(size, x.shape[dim])
    shape = [*x.shape[:dim], size, *x.shape[dim + 1 :]]
    spread = index.reshape([-1 if k == dim else 1 for k in range(x.dim())]).expand(x.shape)
    how = d.choose.randrange(4)

    def add(x: Tensor) -> Tensor:
        out = x.new_zeros(shape)
        if how == 0:
            return out.index_add(dim, index, x)
        if how == 1:
            return out.scatter_add(dim, spread, x)
        if how == 2:
            return out.index_add_(dim, index, x)
        return out.scatter_reduce(dim, spread, x, "amax", include_self=False)

    return add


def _gathered(d: Draw, x: Tensor) -> Step:
    dim = d.choose.randrange(x.dim())
    index = d.numbers(x.shape[dim], *x.shape)
    return lambda x: x.gather(dim, index)


def _joined(d: Draw, x: Tensor) -> Step:
    dim, other, how = d.dim(x), d.values(*x.shape), d.choose.randrange(5)

    def join(x: Tensor) -> Tensor:
        if how == 0:
            return torch.cat([x, x * 2], dim)
        if how == 1:
            return torch.cat([x, other], dim)
        if how == 2:
            return torch.stack([x, x.exp()], dim)
        if how == 3:
            return torch.cat(list(x.chunk(2, dim))[::-1], dim)
        return torch.stack([part * 2 for part in x.unbind(dim)], dim)

    return join


def _products(d: Draw, x: Tensor) -> Step:
    last = x.shape[-1]
    how = d.choose.randrange(9)
    first = x.shape[-2] if x.dim() > 1 else last
    w, left, table = d.values(last, 3), d.values(3, first), d.values(4, last)
    letters = "abcde"[: x.dim()]
    gone = d.choose.choice(letters)
    rest = letters.replace(gone, "z")
    size = x.shape[letters.index(gone)]
    square = d.values(size, d.choose.choice([2, size]))
    return [
        lambda x: x @ w,
        lambda x: left @ x,
        lambda x: x @ x.mT,
        lambda x: torch.cdist(x, table),
        lambda x: torch.einsum(f"{letters},{gone}z->{rest}", x, square),
        lambda x: torch.kron(x, w[:2]),
        lambda x: torch.tensordot(x, w, 1),
        lambda x: torch.einsum(f"{letters},{letters}->{letters.replace(gone, '')}", x, x),
        lambda x: torch.einsum("...k,kj->...j", x, w),
    ][how]


def _simple(d: Draw, x: Tensor) -> Step:
    dim, other, mask = d.dim(x), d.beside(x), d.mask(x)
    a, b = d.dims(x)
    k = d.choose.randrange(x.shape[dim])
    part = d.mask(x, d.choose.randrange(1, x.dim() + 1))
    return d.choose.choice(
        [
            lambda x: x.tanh(), lambda x: F.relu(x), lambda x: x * other, lambda x: x + other, lambda x: other - x,
            lambda x: x / (1 + x.square()), lambda x: torch.where(mask, x, 0.0), lambda x: x.masked_fill(mask, 0.3),
            lambda x: x.clamp(-1, 1), lambda x: F.dropout(x, 0.3), lambda x: torch.lerp(x, x * 2, 0.3),
            lambda x: x.transpose(a, b), lambda x: x.movedim(a, b), lambda x: x.unsqueeze(dim), lambda x: x.squeeze(),
            lambda x: x.flatten(), lambda x: x.roll(1, dim), lambda x: x.flip(dim), lambda x: x.rot90(1, [a, b]),
            lambda x: x.narrow(dim, k, 1), lambda x: x.select(dim, k), lambda x: x[::2], lambda x: x[..., None, :],
            lambda x: x[part], lambda x: x.masked_select(mask), lambda x: x.repeat_interleave(2, dim),
            lambda x: x.expand(2, *x.shape), lambda x: x.repeat(*[2] * x.dim()), lambda x: x.diagonal(0, a, b),
            lambda x: x.tril(), lambda x: torch.diag_embed(x), lambda x: F.pad(x, (1, 0)),
            lambda x: x.unfold(dim, 1, 1),
            lambda x: x.take(torch.arange(x.numel())), lambda x: torch.atleast_3d(x), lambda x: torch.block_diag(x, x),
            lambda x: x.contiguous().as_strided(x.shape, x.contiguous().stride()),
            lambda x: torch.stack(torch.meshgrid(x.flatten(), x.flatten(), indexing="ij")),
            lambda x: x.sum(dim), lambda x: x.mean(dim, keepdim=True), lambda x: x.amax(dim),
            lambda x: x.logsumexp(dim),
            lambda x: x.var(dim), lambda x: x.norm(dim=dim), lambda x: x.prod(dim), lambda x: x.median(dim).values,
            lambda x: x.cumsum(dim), lambda x: x.cumprod(dim), lambda x: x.softmax(dim),
            lambda x: F.log_softmax(x, dim),
            lambda x: x.sort(dim).values, lambda x: x.topk(1, dim).values, lambda x: F.normalize(x, dim=dim),
            lambda x: F.layer_norm(x, x.shape[-1:]), lambda x: x.diff(dim=dim), lambda x: torch.trapezoid(x, dim=dim),
            lambda x: x.logcumsumexp(dim), lambda x: x.quantile(0.4, dim), lambda x: x - x.mean(dim, keepdim=True),
            lambda x: x / (1 + x.square().sum(dim, keepdim=True)), lambda x: x + x.flip(dim),
            lambda x: x * x.roll(1, dim),
            lambda x: torch.fft.fft(x, dim=dim).real, lambda x: x.renorm(2, a, 0.7), lambda x: x.sum(),
            lambda x: x.mean(),
            lambda x: F.avg_pool1d(x, 2, ceil_mode=True), lambda x: F.max_pool1d(x, 1),
            lambda x: F.cosine_similarity(x, x.exp(), dim=dim), lambda x: x.kthvalue(1, dim).values,
            lambda x: F.group_norm(x, 1), lambda x: F.instance_norm(x), lambda x: F.glu(torch.cat([x, x], dim), dim),
            lambda x: F.interpolate(x, scale_factor=2), lambda x: x.detach().sign() * x,
            lambda x: x * x.detach().mean(),
            lambda x: x[x.detach() > 0], lambda x: x * (x.detach() > x.detach().mean()), lambda x: torch.dstack([x, x]),
            lambda x: x.square().mean().sqrt() * x, lambda x: torch.hstack([x, x]), lambda x: torch.cov(x),
            lambda x: x.T, lambda x: x.mT, lambda x: torch.linalg.vector_norm(x, dim=dim), lambda x: x.nan_to_num(),
            lambda x: torch.logaddexp(x, x.flip(dim)), lambda x: F.threshold(x, 0.1, 0.0), lambda x: torch.inner(x, x),
        ]
    )  # fmt: skip


_MAKERS = [_simple] * 6 + [_pick, _reorder, _reshape, _reshape, _written, _added, _gathered, _joined, _products]


class Chain(NamedTuple):
    """
    Attributes:
        x: the batch, `[N, ...]`.
        ids, num_tasks: the task of each sample.
        weight: a parameter for each place of a sample.
        steps: what happens to their product.
        scale: a second parameter, which the end is multiplied with; None: there is none.
        loss: of the end.
    """

    x: Tensor
    ids: Tensor
    num_tasks: int
    weight: Tensor
    steps: list[Step]
    scale: Tensor | None
    loss: Step

    def end(self, product: Tensor) -> Tensor:
        for step in self.steps:
            product = step(product)
        return product


_LOSSES: list[Step] = [
    lambda z: z.sum(),
    lambda z: z.square().sum(),
    lambda z: z.tanh().mean(),
    lambda z: z.square().sum().sqrt(),
    lambda z: F.mse_loss(z, torch.zeros_like(z)),
    lambda z: z.sum(-1).square().mean() if z.dim() else z,
    lambda z: z.exp().sum().log(),
]


def draw_chain(seed: int) -> Chain | None:
    """A chain that torch can run; None: nothing came of this seed."""
    choose = random.Random(seed)
    n, num_tasks = choose.choice([4, 5, 6]), choose.choice([2, 3])
    d = Draw(seed, n)
    x = d.values(n, *[choose.choice([1, 2, 3, n]) for _ in range(choose.randrange(3))])
    ids = d.numbers(num_tasks, n)
    weight = 1 + 0.3 * d.values(*x.shape[1:])
    steps: list[Step] = []
    value = (x * weight).requires_grad_()
    for _ in range(choose.randrange(1, 6)):
        for _ in range(10):
            try:
                step = choose.choice(_MAKERS)(d, value)
                torch.manual_seed(1)
                found = step(value)
            except Exception:
                continue  # not a call for a tensor like this one
            if found.numel() in range(1, _LARGEST) and found.requires_grad and bool(found.isfinite().all()):
                steps.append(step)
                value = found.detach().requires_grad_()
                break
    if not steps:
        return None
    scale = 1 + 0.3 * d.values() if choose.random() < 0.5 else None
    return Chain(x, ids, num_tasks, weight, steps, scale, choose.choice(_LOSSES))


def _owners(chain: Chain, values: Tensor) -> Tensor | None:
    """`[T, *end]` bool: which tasks each element at the end depends on, with random directions; None: it has no second
    derivative."""
    leaf = values.detach().requires_grad_()
    torch.manual_seed(1)
    end = chain.end(leaf)
    probe = torch.ones_like(end).requires_grad_()
    try:
        (back,) = torch.autograd.grad(end, leaf, probe, create_graph=True, allow_unused=True)
        found = []
        for t in range(chain.num_tasks):
            here = (chain.ids == t).reshape(-1, *(1,) * (leaf.dim() - 1))
            direction = torch.where(here, torch.rand_like(leaf) + 0.5, 0.0)
            (moved,) = torch.autograd.grad((back * direction).sum(), probe, retain_graph=True, allow_unused=True)
            found.append(torch.zeros_like(end, dtype=torch.bool) if moved is None else moved.abs() > 1e-13)
    except RuntimeError:
        return None
    return torch.stack(found)


def _expected(chain: Chain) -> tuple[bool | None, list[list[Tensor]]]:
    """Whether the loss is a sum over tasks (None: that can't be told), and the rows of both parameters in each way in
    which they may be told apart."""
    copies = chain.weight.expand(chain.num_tasks, *chain.weight.shape).clone().requires_grad_()
    product = chain.x * copies[chain.ids]
    torch.manual_seed(1)
    end = chain.end(product)
    owners = _owners(chain, product)
    if owners is None:
        return None, []
    ways: list[Tensor | None] = [None]
    if chain.scale is not None:
        if bool((owners.sum(0) > 1).any()):
            return False, []
        owner = torch.where(owners.any(0), owners.int().argmax(0), -1)
        ways = []
        # an element that depends on no task goes with those beside it: along whichever axis that fits
        for axis in range(end.dim()):
            rows = owner.movedim(axis, 0).reshape(end.shape[axis], -1)
            top = rows.amax(1)
            if bool(((rows == top[:, None]) | (rows < 0)).all()):
                if bool((top < 0).any()):
                    return None, []  # whose loss it is that such a position gives can't be said
                ways.append(top.reshape([-1 if k == axis else 1 for k in range(end.dim())]).expand(end.shape))
        if end.dim() == 0 and int(owner) >= 0:
            ways.append(owner)
    found = []
    for way in ways:
        params = [copies]
        value = end
        if way is not None:
            scales = chain.scale.expand(chain.num_tasks).clone().requires_grad_()  # type: ignore[union-attr]
            params.append(scales)
            value = end * scales[way]
        loss = chain.loss(value)
        grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
        rows = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]
        if _is_sum(rows, params):
            found.append([g.detach() for g in rows])
    return bool(found) or not ways, found


def _is_sum(rows: list[Tensor], params: list[Tensor]) -> bool:
    """Whether no row depends on another task's copies."""
    size = max(float(g.detach().abs().max()) for g in rows) + 1e-30
    for t in range(len(rows[0])):
        one = sum((g[t] * torch.rand_like(g[t])).sum() for g in rows)
        if not isinstance(one, Tensor) or not one.requires_grad:
            continue
        for g in torch.autograd.grad(one, params, retain_graph=True, allow_unused=True):
            if g is None:
                continue
            others = torch.cat([g[:t], g[t + 1 :]])
            if not bool((others.abs() <= 1e-9 * size).all()):
                return False
    return True


def try_chain(seed: int) -> str:
    """What came of one chain: "right", "refused", "nothing" if there is none to try, or what is wrong with it."""
    chain = draw_chain(seed)
    if chain is None:
        return "nothing"
    weight = nn.Parameter(chain.weight.clone())
    scale = None if chain.scale is None else nn.Parameter(chain.scale.clone())
    params = [p for p in (weight, scale) if p is not None]
    stream = seed % 5 == 0
    try:
        with fastmtl.one_pass(
            params, chain.ids, chain.num_tasks, shared=params, memory="stream" if stream else "bank"
        ) as bank:
            product = chain.x * weight
            torch.manual_seed(1)
            end = chain.end(product)
            chain.loss(end if scale is None else end * scale).backward()
    except ValueError as error:
        if "one_pass" in str(error) or "task_ids" in str(error):
            return "refused"
        return f"an error: {error}"
    except Exception as error:
        return f"an error: {type(error).__name__}: {error}"
    additive, ways = _expected(chain)
    if additive is None:
        return "nothing"
    if not additive:
        return "wrong: it mixes tasks"
    if not ways:
        return "wrong: elements of one task lie in no order"
    if not all(bool(g.isfinite().all()) for rows in ways for g in rows):
        return "nothing"
    if stream:
        bank.apply("sum")
        got = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        errors = [_error(got, [g.sum(0) for g in rows]) for rows in ways]
    else:
        found = [bank.row(t) for t in range(chain.num_tasks)]
        rows_of = [
            torch.stack([torch.zeros_like(p) if row[k] is None else row[k] for row in found])  # type: ignore[misc]
            for k, p in enumerate(params)
        ]
        errors = [_error(rows_of, rows) for rows in ways]
    return "right" if min(errors) <= _TOLERANCE else f"wrong: rows differ by {min(errors):.2g}"


def _error(got: list[Tensor], want: list[Tensor]) -> float:
    size = max(float(w.abs().max()) for w in want)
    return max(float((g - w).abs().max()) for g, w in zip(got, want, strict=True)) / max(size, 1e-3)


def run(seed: int, count: int, seconds: float = float("inf")) -> dict[str, list[int]]:
    """The seeds of `count` chains from `seed` on, by what came of them."""
    found: dict[str, list[int]] = {}
    end = time.monotonic() + seconds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for k in range(seed, seed + count):
            found.setdefault(try_chain(k), []).append(k)
            if time.monotonic() > end:
                break
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many")
    given = parser.parse_args()
    found = run(given.seed, given.count, given.seconds)
    for what, seeds in sorted(found.items()):
        few = "" if what in ("right", "refused", "nothing") else f": seeds {seeds[:10]}"
        print(f"{len(seeds):6d} {what}{few}")


if __name__ == "__main__":
    main()
