"""Means of gradients over the ranks, in a few large all-reduces."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmtl.core.memory import can_keep, references_alone
from fastmtl.distributed.ranks import DENSE, Joint, Kind, Ranks, statement_of
from fastmtl.parameters import describe

# bytes of one all-reduce of several gradients, where there are as many; and what is worth one of its own: a copy into
# new memory costs more than an all-reduce's latency
BUCKET_BYTES = 32 << 20
LARGE_BYTES = 1 << 18


class Slot(NamedTuple):
    """A place of a gradient, missing where this rank has none."""

    holder: dict[Tensor, Tensor]
    param: Tensor
    kind: Kind = DENSE


def average(ranks: Ranks, slots: Sequence[Slot]) -> None:
    """Replaces every gradient by its mean over the ranks; one that this rank lacks counts as zero.

    The slots must be the same on all ranks, in the same order. Small dense gradients are copied into buckets of
    `BUCKET_BYTES`, one all-reduce each, and the means are views of these. Large ones are reduced where they are,
    if nobody else holds them. All are in the layout of the parameter. What a copy replaces is let go of at once,
    so that the peak is one bucket above what there was. Sparse ones go one by one.
    """
    works = []
    seen: set[int] = set()
    with torch.no_grad():
        for bucket in _buckets([s for s in slots if s.kind == DENSE]):
            if len(bucket) == 1:
                mean = _scaled(ranks, bucket[0], seen)
                # ranks may hold it in one memory order only: flat, it is the parameter's on each
                works.append(ranks.start_sum(mean.as_strided((mean.numel(),), (1,))))
                continue
            first = bucket[0].param
            flat = torch.empty(sum(s.param.numel() for s in bucket), dtype=first.dtype, device=first.device)
            offset = 0
            for s in bucket:
                strides = torch.empty_like(s.param, device="meta").stride()  # of the parameter, without gaps
                _fill(ranks, flat.as_strided(s.param.shape, strides, offset), s)
                offset += s.param.numel()
            works.append(ranks.start_sum(flat))
        for s in slots:
            if s.kind == DENSE:
                continue
            g = s.holder.get(s.param)
            s.holder[s.param] = mean = (_no_rows(s) if g is None else g / ranks.size).coalesce()
            works.append(ranks.start_sum(mean))
    for work in works:
        work.wait()


def _scaled(ranks: Ranks, s: Slot, seen: set[int]) -> Tensor:
    """The gradient over the number of ranks, in its own memory if that can be."""
    g = s.holder.get(s.param)
    dense = g is not None and g.layout is torch.strided and g.dtype == s.param.dtype
    if dense and sys.getrefcount(g) <= references_alone() and can_keep(s.param, g, seen):
        return g.div_(ranks.size)
    return _fill(ranks, torch.empty_like(s.param), s)


def _fill(ranks: Ranks, mean: Tensor, s: Slot) -> Tensor:
    """Puts `mean` in the slot, with what this rank contributes to it."""
    g = s.holder.get(s.param)
    if g is None:
        mean.zero_()
    elif g.layout is torch.strided:
        torch.div(g, ranks.size, out=mean)
    else:
        mean.copy_(g.to_dense()).div_(ranks.size)
    s.holder[s.param] = mean
    return mean


def average_gradients(
    ranks: Ranks, joint: Joint, rows: Sequence[dict[Tensor, Tensor]], own: dict[Tensor, Tensor], common: set[Tensor]
) -> None:
    """Means over the ranks of the task gradients of parameters in `common` and of all other gradients, in place."""
    slots = []
    for p, kinds in joint.kinds.items():
        if not kinds:
            continue
        kind = next(iter(kinds)) if len(kinds) == 1 else DENSE
        if p in common:
            slots.extend(Slot(row, p) for t, row in enumerate(rows) if joint.masks[p] >> t & 1)
        else:
            slots.append(Slot(own, p, kind))
    average(ranks, slots)


def average_rows(
    ranks: Ranks,
    named: Mapping[Tensor, str],
    names: Sequence[str],
    rows: dict[Tensor, Tensor],
    loose: dict[Tensor, Tensor],
    counts: Tensor,
    loss_reduction: str = "sum",
    call: str = "fastmtl.one_pass",
) -> Tensor:
    """From the task gradients of one rank's part of a batch, where every sample has a task, to those of the whole.

    They are replaced, in place where there are any, and equal bits on every rank.

    Args:
        ranks: those that the batch is spread over, not sharded.
        named: the parameters in the bank, with their names.
        names: the T tasks.
        rows: by parameter `[T, ...]`, of any strides: row t is the gradient of task t's part of this rank's loss as
            written, zero for a task without samples here. A parameter that this rank's loss does not reach is missing,
            and is put in if another's does.
        loose: by parameter, the gradient of samples that belong to no task, likewise.
        counts: `[T + 1]` int64, on the device of the rows: this rank's samples of each task, and of none.
        loss_reduction: what the one loss over the whole batch is.
            `"sum"`: the mean over the R ranks of their losses, each as written, which is what DDP's gradients belong
            to. Row t becomes `sum_r rows[r][t] / R`. One process has the same where a loss is a sum over samples
            divided by a constant (`N / R` for the mean over all N), and where it is a mean and the parts are equal.
            `"mean"`: every rank's loss is the sum over tasks of the mean over that rank's samples of the task, and so
            is that of the whole batch, over all of them. Row t becomes
            `sum_r rows[r][t] * counts[r][t] / sum_r counts[r][t]`, however unequal the parts are.

    Returns:
        `[T + 1]` int64, on the device of `counts`: the samples on all ranks. A task with zero is absent.

    Raises:
        ValueError: ranks that disagree on T, names, parameters or the reduction (on every rank).
    """
    with ranks.reporting(call):
        if loss_reduction not in ("sum", "mean"):
            raise ValueError(f"loss_reduction: expected 'sum' or 'mean', got {loss_reduction!r}")
        if counts.dtype != torch.int64 or counts.shape != (len(names) + 1,):
            raise ValueError(
                f"counts: expected torch.int64 of shape [{len(names) + 1}], got {counts.dtype} of {list(counts.shape)}"
            )
        for p, x in rows.items():
            if x.shape != (len(names), *p.shape):
                raise ValueError(
                    f"rows of {describe(p, named[p])}: expected shape {[len(names), *p.shape]}, got {list(x.shape)}"
                )
    mine = statement_of(call, names, None, named, None, [True] * len(names), {}, [])
    # which of the two a parameter has here stands in place of its gradient's kind
    kinds = tuple(tuple(k for k, held in enumerate((rows, loose)) if p in held) for p in named)
    joint = ranks.meet(mine._replace(method=f"loss_reduction={loss_reduction!r}", kinds=kinds), named)
    totals = counts.clone()
    work = ranks.start_sum(totals)
    for p, some in joint.kinds.items():
        if 0 in some and p not in rows:
            rows[p] = torch.stack([torch.zeros_like(p)] * len(names))
        if 1 in some and p not in loose:
            loose[p] = torch.zeros_like(p)
    work.wait()
    factors = torch.full_like(totals, 1 / ranks.size, dtype=torch.float64)
    if loss_reduction == "mean":
        factors = counts.double() / totals.clamp(min=1)
    with torch.no_grad():
        scaled = [(rows[p], factors[:-1]) for p in named if p in rows]
        scaled += [(loose[p], factors[-1:]) for p in named if p in loose]
        for x, factor in scaled:
            promoted = torch.promote_types(x.dtype, torch.float32)  # 7/8 of a bfloat16 row is rounded once
            torch.mul(x, factor.to(promoted).reshape(-1, *[1] * (x.dim() - 1)), out=x)
        _sum_in_place(ranks, [x for x, _ in scaled])
    return totals


def _sum_in_place(ranks: Ranks, tensors: Sequence[Tensor]) -> None:
    """Sums over the ranks: large tensors as they are, small ones in buckets."""
    works, packed = [], []
    for bucket in _buckets([Slot({}, x) for x in tensors]):
        xs = [s.param for s in bucket]
        if len(xs) == 1 and xs[0].is_contiguous():
            works.append(ranks.start_sum(xs[0]))
            continue
        flat = torch.cat([x.reshape(-1) for x in xs])
        works.append(ranks.start_sum(flat))
        packed.append((flat, xs))
    for work in works:
        work.wait()
    for flat, xs in packed:
        for x, part in zip(xs, flat.split([x.numel() for x in xs]), strict=True):
            x.copy_(part.reshape(x.shape))


def _buckets(slots: Sequence[Slot]) -> Iterator[list[Slot]]:
    """Large ones, each alone; small ones of one dtype and device, about `BUCKET_BYTES` together."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Slot]] = {}
    for s in slots:
        if s.param.numel() * s.param.element_size() >= LARGE_BYTES:
            yield [s]
        else:
            kinds.setdefault((s.param.dtype, s.param.device), []).append(s)
    for some in kinds.values():
        bucket: list[Slot] = []
        held = 0
        for s in some:
            bucket.append(s)
            held += s.param.numel() * s.param.element_size()
            if held >= BUCKET_BYTES:
                yield bucket
                bucket, held = [], 0
        if bucket:
            yield bucket


def _no_rows(slot: Slot) -> Tensor:
    """A sparse gradient without entries."""
    p, n = slot.param, slot.kind
    return torch.sparse_coo_tensor(
        torch.empty(n, 0, dtype=torch.int64, device=p.device),
        torch.empty(0, *p.shape[n:], dtype=p.dtype, device=p.device),
        p.shape,
        check_invariants=False,
    )
