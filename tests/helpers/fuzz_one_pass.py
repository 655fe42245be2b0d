"""Chains of random torch calls through `one_pass`, against what really depends on what.

Run it as a script, for as many chains as there is time for, in one thread::

    OMP_NUM_THREADS=1 python tests/helpers/fuzz_one_pass.py --seed 0 --count 50000

A chain begins where a parameter meets samples, and ends in a loss, or in a second parameter, some calls and a loss
behind it. Either it is refused, or its rows must be right. Right means: the loss is a sum of parts of single tasks (its
second derivative by two tasks' copies of the parameters is zero), and each row is the gradient of that task's copies.
Where a second parameter meets the chain, each element there must depend on the samples of one task alone, whose copy it
gets; or it joins a sum over samples, and is no task's.

How far a row may be off is some roundings of its own length and one of the longest row. Where one is farther off, the
condition of the chain is measured: the same rows are computed in float32, three times, from values that are rounded at
random, and how far they are off, scaled down to the roundings of float64, is allowed `_TIMES` over. Where that is more
than 1e-8 of the longest row, the chain proves little, and counts as "right, as far as rounding lets tell".
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import random
import time
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fuzz_calls import MAKERS, Draw, Step
from torch import Tensor, nn

import fastmtl

_LARGEST = 400
_TIMES = 64
_EPS, _EPS32 = torch.finfo(torch.float64).eps, torch.finfo(torch.float32).eps
_TELLS = 1e-8
# an element that moves less depends on no task: the parts of a gradient that it would add are as small
_DEPENDS = 1e-13
# rows as short as this are zero but for rounding, as those behind a norm of one element: what is drawn is about 1
_ZERO = 1e-12
# second derivatives by the copies of two tasks, relative to what a row is summed up from
_MIXES = 1e-10
# of the positions that depend on no task, in how many ways they may be given to tasks
_MOST_WAYS = 64

RIGHT, VAGUE = "right", "right, as far as rounding lets tell"
REFUSED, NEEDLESS, UNTOLD = "refused: it mixes", "refused, and could be told apart", "refused, and can't be told"
NOTHING = "nothing to try"
FINE = frozenset((RIGHT, VAGUE, REFUSED, NEEDLESS, UNTOLD, NOTHING))


class Meeting(NamedTuple):
    """Where a second parameter meets the chain.

    Attributes:
        param: its value.
        call: of what comes there and the parameter.
        last: it needs whole rows of the last dimension.
    """

    param: Tensor
    call: Callable[[Tensor, Tensor], Tensor]
    last: bool


class Chain(NamedTuple):
    """
    Attributes:
        x: the batch, `[N, ...]`.
        ids, num_tasks: the task of each sample, -1 for none.
        weight: a parameter for each place of a sample.
        steps: what happens to their product.
        meeting: with a second parameter, behind them; None: there is none.
        then: what happens behind that.
        loss: of the end.
    """

    x: Tensor
    ids: Tensor
    num_tasks: int
    weight: Tensor
    steps: list[Step]
    meeting: Meeting | None
    then: list[Step]
    loss: Step

    def in_float32(self, noise: torch.Generator) -> Chain:
        """The same chain, its values rounded to float32 at random."""

        def rounded(x: Tensor) -> Tensor:
            return (x * (1 + _EPS32 * (torch.rand(x.shape, dtype=x.dtype, generator=noise) - 0.5))).float()

        meeting = self.meeting
        return self._replace(
            x=rounded(self.x),
            weight=rounded(self.weight.detach()),
            steps=[_in_float32(step) for step in self.steps],
            meeting=None
            if meeting is None
            else meeting._replace(param=rounded(meeting.param), call=_in_float32(meeting.call)),
            then=[_in_float32(step) for step in self.then],
        )

    def rows_of(self) -> Tensor:
        """Of the bank, for each sample: that of no task is the last."""
        return torch.where(self.ids < 0, self.num_tasks, self.ids)


_LOSSES: list[Step] = [
    lambda z: z.sum(),
    lambda z: z.square().sum(),
    lambda z: z.tanh().mean(),
    lambda z: F.mse_loss(z, torch.zeros_like(z)),
    lambda z: F.huber_loss(z, torch.zeros_like(z), reduction="none").sum(),
    lambda z: F.soft_margin_loss(z, torch.ones_like(z)),
    lambda z: F.cross_entropy(z, torch.zeros(len(z), dtype=torch.long)) if z.dim() == 2 else z.square().mean(),
    lambda z: z.square().sum(-1).add(1e-3).sqrt().mean() if z.dim() > 1 else z.sum(),
    lambda z: z.sum(-1).square().mean() if z.dim() else z,
    lambda z: z.square().sum().sqrt(),
    lambda z: z.exp().sum().log(),
]


def _seed() -> None:
    # `torch.manual_seed` asks every device, which takes as long as a chain
    torch.default_generator.manual_seed(1)


def _through(steps: Sequence[Step], value: Tensor) -> Tensor:
    for step in steps:
        value = step(value)
    return value


def _in_float32(step: Step) -> Step:
    """The same call with its constants in float32."""
    if not isinstance(step, types.FunctionType):
        return step
    if not step.__closure__:
        return step
    cells = [types.CellType(_float32(cell.cell_contents)) for cell in step.__closure__]
    return types.FunctionType(step.__code__, step.__globals__, step.__name__, step.__defaults__, tuple(cells))


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.float64 else value


def _extended(d: Draw, value: Tensor, count: int) -> list[Step]:
    """So many calls, each on what the one before gives."""
    steps: list[Step] = []
    for _ in range(count):
        for _ in range(10):
            try:
                step = d.choose.choice(MAKERS)(d, value)
                _seed()
                found = step(value)
                if found.dtype != torch.float64 or not 0 < found.numel() < _LARGEST:
                    continue
                (back,) = torch.autograd.grad(found, value, torch.rand_like(found) + 0.5)
            except Exception:
                continue  # not a call for a tensor like this one, or without a gradient
            # where nothing flows but rounding (a norm over one element), nothing can be compared
            if bool(found.isfinite().all()) and bool((back.abs() > _DEPENDS).any()):
                steps.append(step)
                value = found.detach().requires_grad_()
                break
    return steps


class _Product(torch.autograd.Function):
    """`F.linear`, into which nobody can look."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        last = x.shape[-1]
        return g @ w, g.reshape(-1, len(w)).T @ x.reshape(-1, last)


def _recurrent(x: Tensor, p: Tensor, *, w: Tensor, first: bool) -> Tensor:
    state = x.new_zeros(1, x.shape[0 if first else 1], 2)
    return torch.rnn_tanh(x, state, [p, w.to(p.dtype)], False, 1, 0.0, False, False, first)[0]  # type: ignore[no-any-return]


def _written(x: Tensor, p: Tensor, *, where: Any) -> Tensor:
    out = x * 1
    out[where] = p
    return out


def _drawn_meeting(d: Draw, end: Tensor) -> Meeting:
    near = [lambda x, p: x * p, lambda x, p: p * x.tanh(), lambda x, p: torch.where(x > 0, x, x * p)]
    if not end.dim() or d.choose.random() < 0.3:
        return Meeting(1 + 0.3 * d.values(), d.choose.choice(near), False)
    last = end.shape[-1]
    how = d.choose.randrange(10)
    if how == 0:
        return Meeting(d.values(3, last), lambda x, p: F.linear(x, p), True)
    if how == 1:
        return Meeting(d.values(last, 2), lambda x, p: x @ p, True)
    if how == 2:
        return Meeting(d.values(last), lambda x, p: F.layer_norm(x, p.shape, p), True)
    if how == 3 and end.dim() == 3:
        return Meeting(d.values(2, end.shape[1], 1), lambda x, p: F.conv1d(x, p), True)
    if how == 4:
        return Meeting(d.values(1), lambda x, p: F.prelu(x, p), False)
    if how == 5:
        return Meeting(d.values(2, last), _Product.apply, True)
    if how == 6 and end.dim() == 2:
        state, w = d.values(len(end), 2), d.values(2, 2)
        return Meeting(d.values(2, last), lambda x, p: torch.rnn_tanh_cell(x, state, p, w), True)
    if how == 7 and end.dim() == 3:
        call = functools.partial(_recurrent, w=d.values(2, 2), first=d.choose.random() < 0.5)
        return Meeting(d.values(2, last), call, True)
    if how == 8:
        where = d.mask(end) if d.choose.random() < 0.5 else (..., 0)
        return Meeting(d.values(), functools.partial(_written, where=where), False)
    return Meeting(d.values(*d.choose.choice([(last,), (1,)])), d.choose.choice([*near, lambda x, p: x + p]), False)


def draw_chain(seed: int) -> Chain | None:
    """A chain that torch can run; None: nothing came of this seed."""
    choose = random.Random(seed)
    n, num_tasks = choose.choice([4, 5, 6]), choose.choice([2, 3])
    d = Draw(seed, n)
    x = d.values(n, *[choose.choice([1, 2, 3, n]) for _ in range(choose.randrange(3))])
    ids = d.numbers(num_tasks, n)
    if choose.random() < 0.2:
        ids = torch.where(d.values(n) > 1, -1, ids)
    weight = 1 + 0.3 * d.values(*x.shape[1:])
    value = (x * weight).requires_grad_()
    steps = _extended(d, value, choose.randrange(1, 6))
    if not steps:
        return None
    meeting, then = None, []
    if choose.random() < 0.5:
        _seed()
        value = _through(steps, value).detach().requires_grad_()
        meeting = _drawn_meeting(d, value)
        then = _extended(d, meeting.call(value, meeting.param), choose.randrange(3))
    chain = Chain(x, ids, num_tasks, weight.clone(), steps, meeting, then, choose.choice(_LOSSES))
    try:
        found = torch.autograd.grad(_plain_loss(chain, weight.requires_grad_()), weight, allow_unused=True)
    except RuntimeError:
        return None  # torch itself has no gradient of it
    return chain if found[0] is None or bool(found[0].isfinite().all()) else None


def _plain_loss(chain: Chain, weight: Tensor, param: Tensor | None = None) -> Tensor:
    product = chain.x * weight
    _seed()
    value = _through(chain.steps, product)
    if chain.meeting is not None:
        value = _through(chain.then, chain.meeting.call(value, chain.meeting.param if param is None else param))
    return chain.loss(value)


def _owners(chain: Chain, end: Tensor, product: Tensor, rows: Tensor, count: int) -> Tensor | None:
    """`[R, *end]` bool: which rows' samples each element depends on; None: it has no second derivative."""
    cotangent = torch.ones_like(end).requires_grad_()
    try:
        (back,) = torch.autograd.grad(end, product, cotangent, create_graph=True, allow_unused=True)
        found = []
        for t in range(count):
            here = (rows == t).reshape(-1, *(1,) * (product.dim() - 1))
            direction = torch.where(here, torch.rand_like(product) + 0.5, 0.0)
            (moved,) = torch.autograd.grad((back * direction).sum(), cotangent, retain_graph=True, allow_unused=True)
            found.append(torch.zeros_like(end, dtype=torch.bool) if moved is None else moved.abs() > _DEPENDS)
    except RuntimeError:
        return None
    return torch.stack(found)


def _joins(chain: Chain, product: Tensor, rows: Tensor) -> bool:
    """Whether elements would depend on several tasks, if the batch had other values."""
    for _ in range(2):
        other = torch.randn_like(product).requires_grad_()
        try:
            _seed()
            owners = _owners(chain, _through(chain.steps, other), other, rows, chain.num_tasks + 1)
        except Exception:
            return True
        if owners is None or bool((owners.sum(0) > 1).any()):
            return True
    return False


def _ways(owners: Tensor) -> list[Tensor] | None:
    """The ways in which the elements may lie: whose each of them is. None: there are too many.

    A position that depends on no task goes with those beside it, along whichever axis that fits, and if there are none,
    it may be any row's: it belongs to one of the samples, and only `one_pass` knows which.
    """
    count, shape = len(owners), owners.shape[1:]
    owner = torch.where(owners.any(0), owners.int().argmax(0), -1)
    if not shape:
        return [owner] if int(owner) >= 0 else [torch.tensor(t) for t in range(count)]
    found = []
    for axis, size in enumerate(shape):
        rows = owner.movedim(axis, 0).reshape(size, -1)
        top = rows.amax(1)
        if not bool(((rows == top[:, None]) | (rows < 0)).all()):
            continue
        free = (top < 0).nonzero().flatten()
        if count ** len(free) > _MOST_WAYS:
            return None
        for given in itertools.product(range(count), repeat=len(free)):
            whole = top.index_put((free,), torch.tensor(given, dtype=top.dtype))
            found.append(whole.reshape([-1 if k == axis else 1 for k in range(len(shape))]))
    return found


def _met(chain: Chain, end: Tensor, copies: Tensor, way: Tensor) -> Tensor:
    """What comes out of the meeting, if each position meets the copy of its row."""
    assert chain.meeting is not None
    each = [chain.meeting.call(end, p) for p in copies]
    out = torch.stack(each)
    whose = way.expand(torch.broadcast_shapes(way.shape, out.shape[1:]) if out.dim() > 1 else ())
    if whose.shape != out.shape[1:]:
        raise ValueError("the meeting gives another shape than the samples lie in")
    # in the memory order that it has in the chain, which random numbers are drawn in
    return torch.empty_like(each[0]).copy_(out.gather(0, whose[None])[0])


def _grads(chain: Chain, way: Tensor | None, graph: bool) -> list[list[Tensor]]:
    """The rows of each parameter, and the copies that they are of."""
    count, rows = chain.num_tasks + 1, chain.rows_of()
    copies = chain.weight.expand(count, *chain.weight.shape).clone().requires_grad_()
    params = [copies]
    product = chain.x * copies[rows]
    _seed()
    value = _through(chain.steps, product)
    if chain.meeting is not None:
        assert way is not None
        param = chain.meeting.param
        params.append(param.expand(count, *param.shape).clone().requires_grad_())
        value = _through(chain.then, _met(chain, value, params[1], way))
    grads = torch.autograd.grad(chain.loss(value), params, create_graph=graph, allow_unused=True)
    return [[torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)], params]


class Got(NamedTuple):
    """What `one_pass` gave.

    Attributes:
        rows: of each parameter `[T, ...]`; None: it streamed them.
        total: of each parameter the sum of all rows, those of no task among them.
    """

    rows: list[Tensor] | None
    total: list[Tensor]


def _possible_ways(chain: Chain) -> Iterator[Tensor | None] | None:
    """The ways in which the elements before the meeting may lie, as `_met` takes them. None: that can't be told."""
    if chain.meeting is None:
        return iter([None])
    rows = chain.rows_of()
    product = (chain.x * chain.weight).detach().requires_grad_()
    _seed()
    end = _through(chain.steps, product)
    owners = _owners(chain, end, product, rows, chain.num_tasks + 1)
    if owners is None:
        return None
    # what joins a sum over samples is a term of parameters alone, outside the bank, as what is of no task
    alone = torch.full((1,) * end.dim(), chain.num_tasks)
    if bool((owners.sum(0) > 1).any()):
        return iter([alone])
    ways = _ways(owners)
    if ways is None:
        return None
    joined = (alone for _ in range(1) if _joins(chain, product, rows))
    return itertools.chain(ways, joined)


def judge(chain: Chain, got: Got | None) -> str:
    """What came of a chain. `got` None: it was refused."""
    ways = _possible_ways(chain)
    if ways is None:
        return UNTOLD if got is None else NOTHING
    untold = additive = False
    least = float("inf")
    for way in ways:
        if way is not None and way.numel() > 1 and chain.meeting.last and way.shape[-1] > 1:  # type: ignore[union-attr]
            # it sums over the samples, which one task's may be
            if bool((way != way.flatten()[0]).any()):
                continue
            way = way.flatten()[:1].reshape((1,) * way.dim())
        try:
            grads, params = _grads(chain, way, True)
        except ValueError:
            continue
        except RuntimeError:
            untold = True
            continue
        rows = [g.detach() for g in grads]
        longest = max(float(_size(g).max()) for g in rows)
        if longest <= _ZERO and got is not None and _off(got, rows, [torch.full((len(g),), _ZERO) for g in rows]) <= 1:
            return VAGUE
        allowed: list[Tensor] | None = [_TIMES * _EPS * _size(g) + _EPS * longest for g in rows]
        off = 0.0 if got is None else _off(got, rows, allowed)
        apart = _is_sum(grads, params, longest)
        if off > 1 or apart is False:
            # the condition of the chain is asked for where it matters
            allowed = _with_float32(chain, way, rows, allowed)
            if allowed is not None:
                off = 0.0 if got is None else _off(got, rows, allowed)
                apart = _is_sum(grads, params, max(float(a.max()) for a in allowed) / (_TIMES * _EPS))
        if apart is None or allowed is None:
            untold = True
        elif apart:
            additive = True
            if got is None:
                return NEEDLESS
            if off <= 1:
                return RIGHT if all(float(a.max()) <= _TELLS * longest for a in allowed) else VAGUE
            least = min(least, off)
    if got is None:
        return UNTOLD if untold else REFUSED
    if additive:
        return f"wrong: rows are {least:.2g} times as far off as rounding could take them"
    return NOTHING if untold else "wrong: it mixes tasks"


def _is_sum(rows: list[Tensor], params: list[Tensor], size: float) -> bool | None:
    """Whether no row depends on another row's copies. None: there is no second derivative, or none that is finite.

    Args:
        size: of what the rows are summed up from.
    """
    for t in range(len(rows[0])):
        one = sum((g[t] * (0.5 + torch.rand_like(g[t]))).sum() for g in rows)
        if not isinstance(one, Tensor) or not one.requires_grad:
            continue
        try:
            moved = torch.autograd.grad(one, params, retain_graph=True, allow_unused=True)
        except RuntimeError:
            return None
        for g in moved:
            if g is None:
                continue
            most = float(torch.cat([g[:t], g[t + 1 :]]).abs().max())
            if not math.isfinite(most):
                return None
            if most > _MIXES * size:
                return False
    return True


def _with_float32(chain: Chain, way: Tensor | None, rows: list[Tensor], least: list[Tensor]) -> list[Tensor] | None:
    """How far rounding may take each row: see the top of the file. None: float32 has no such rows."""
    off = [torch.zeros(len(g), dtype=g.dtype) for g in rows]
    for k in range(3):
        rounded = chain.in_float32(torch.Generator().manual_seed(k))
        try:
            others, _ = _grads(rounded, way, False)
        except Exception:
            return None  # a product without float32, or a mask of what rounding has changed
        for most, g, other in zip(off, rows, others, strict=True):
            torch.maximum(most, _size(other.double() - g), out=most)
    allowed = [a + _TIMES * _EPS * most / _EPS32 for a, most in zip(least, off, strict=True)]
    return allowed if all(bool(a.isfinite().all()) for a in allowed) else None


def _size(rows: Tensor) -> Tensor:
    return rows.reshape(len(rows), -1).abs().amax(1)


def _off(got: Got, want: list[Tensor], allowed: list[Tensor]) -> float:
    """The largest error of a row and of the sum of all rows, in units of what is allowed."""
    worst = 0.0
    for k, (rows, most) in enumerate(zip(want, allowed, strict=True)):
        errors = [(got.total[k] - rows.sum(0)).abs().max()[None]]
        bounds = [most.sum()[None]]
        if got.rows is not None:
            errors.append(_size(got.rows[k] - rows[:-1]))
            bounds.append(most[:-1])
        ratio = torch.cat(errors) / torch.cat(bounds)
        ratio = torch.where(torch.cat(errors) == 0, 0.0, ratio)
        worst = max(worst, float(ratio.nan_to_num(float("inf")).max()))
    return worst


def try_chain(seed: int) -> str:
    """What came of one chain: one of `FINE`, or what is wrong with it."""
    chain = draw_chain(seed)
    if chain is None:
        return NOTHING
    weight = nn.Parameter(chain.weight.detach().clone())
    other = None if chain.meeting is None else nn.Parameter(chain.meeting.param.clone())
    params = [p for p in (weight, other) if p is not None]
    stream = seed % 5 == 0
    try:
        with fastmtl.one_pass(
            params, chain.ids, chain.num_tasks, shared=params, memory="stream" if stream else "bank"
        ) as bank:
            _plain_loss(chain, weight, other).backward()
    except ValueError as error:
        if "one_pass" not in str(error) and "task_ids" not in str(error):
            return f"an error: {error}"
        return judge(chain, None)
    except Exception as error:
        return f"an error: {type(error).__name__}: {error}"
    rows = None
    if not stream:
        found = [bank.row(t) for t in range(chain.num_tasks)]
        rows = [
            torch.stack([torch.zeros_like(p) if row[k] is None else row[k] for row in found])  # type: ignore[misc]
            for k, p in enumerate(params)
        ]
    bank.apply("sum")
    return judge(chain, Got(rows, [torch.zeros_like(p) if p.grad is None else p.grad for p in params]))


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the first chain; the others follow it")
    parser.add_argument("--count", type=int, default=1000, help="of chains")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = run(given.seed, given.count, given.seconds)
    for what, seeds in sorted(found.items()):
        few = "" if what in FINE else f": seeds {seeds[:10]}"
        print(f"{len(seeds):6d} {what}{few}")


if __name__ == "__main__":
    main()
