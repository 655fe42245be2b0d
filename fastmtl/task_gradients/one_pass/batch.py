"""One batch inside a `one_pass` block: its backward pass, and the rows that arrive."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastmtl.core.gradient_rows import GradientRows
from fastmtl.core.schemas import without_autocast
from fastmtl.ops.gradients.gram import gram_rows
from fastmtl.ops.task_weights.task_plan import task_plan_op
from fastmtl.parameters import Params, describe
from fastmtl.surgery.accumulate import Updates
from fastmtl.task_gradients.one_pass import autograd
from fastmtl.task_gradients.one_pass.sample_axis import CONST, MIXING, PARAM, SAMPLES, TOTAL, UNKNOWN, Samples, Tag
from fastmtl.task_gradients.one_pass.tracker import Follow

# how far the rows of a step may be from those of T backward passes, when checked
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}

_checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()

# the rows of one parameter: `[R, ...]`, or one tensor for each row (None: zero)
TaskRows: TypeAlias = Tensor | list[Tensor | None]


def added(before: TaskRows | None, now: TaskRows) -> TaskRows:
    """The sum of two sets of rows, in the memory of the first."""
    if before is None:
        return now
    with torch.no_grad():
        if isinstance(before, Tensor) and isinstance(now, Tensor):
            return before.add_(now)
        return [b if a is None else a if b is None else a.add_(b) for a, b in zip(before, now, strict=True)]


class Batch:
    """One batch: what is followed inside a `one_pass` block, and what its backward pass left.

    Args:
        model, params, task_ids, batch_dim, mixing, fallback, memory, check: as for `one_pass`.
        names: of the tasks.
        deliver: called with this once the backward pass has filled it.
        told: the caller named the shared parameters.
    """

    def __init__(
        self,
        model: Params,
        params: Mapping[Tensor, str],
        names: Sequence[str],
        deliver: Callable[[Batch], None],
        task_ids: Tensor,
        batch_dim: int,
        mixing: str,
        fallback: str,
        memory: str,
        check: bool,
        *,
        told: bool,
    ) -> None:
        self.model, self.params, self.task_ids = model, params, task_ids
        self.names, self.deliver = names, deliver
        self.stream = memory == "stream"
        self.partition = mixing == "partition"
        self.check = check and not (isinstance(model, nn.Module) and model in _checked)
        self.done = False
        self.entered = False  # and not left yet
        self.told = told  # which parameters are shared
        num_tasks = len(names)
        device = next(iter(params)).device
        # what the host knows of the tasks, or what the device does
        ids = task_ids.detach()
        self.counts: list[int] | None = None
        self.poison: Tensor | None = None
        loose = True
        if ids.device.type == "cpu":
            none, *self.counts = torch.bincount(ids.long() + 1, minlength=num_tasks + 1).tolist()
            loose = none > 0
        else:
            wrong = (ids < -1) | (ids >= num_tasks)
            self.poison = torch.where(wrong.any(), torch.nan, 0.0)
            ids = torch.where(wrong, -1, ids)
        self.num_rows = num_tasks + loose
        ids = ids.to(device, torch.int64)
        ids = torch.where(ids < 0, num_tasks, ids) if loose else ids
        self.ids = ids
        self.samples = Samples(ids, self.num_rows, ("batch",), tuple(task_plan_op(ids, self.num_rows)))  # type: ignore[arg-type]
        self.fallback, self.batch_dim = fallback, batch_dim

    # --- the ends of the block

    def enter(self) -> None:
        second = self.stream or self.check  # passes that want plain gradients
        self.second = second or self.fallback == "loop"
        token = torch.zeros((), requires_grad=True, device=next(iter(self.params)).device)
        rows, values, loop = {}, {}, {}
        with torch.enable_grad():
            for p in self.params:
                receiver = _Receiver(self, p)
                rows[p] = autograd.Collect.apply(token, p.detach(), self.num_rows, receiver)
                setattr(rows[p], autograd.RECEIVE, receiver)
                values[p] = p.detach().requires_grad_() if second else p.detach()
                if self.fallback == "loop":
                    loop[p] = p.detach().requires_grad_()
        # a compiled graph is guarded by what is in here: nothing that is new in every block
        constants = dict.fromkeys(self.model.buffers(), True) if isinstance(self.model, nn.Module) else {}
        self.rows, self.values, self.loop = rows, values, loop
        self.versions = {p: p._version for p in self.params}
        self.follow = Follow(
            self.samples,
            self.batch_dim,
            rows,
            values,
            self.params,
            constants,
            partition=self.partition,
            loop=loop if self.fallback == "loop" else None,
            bounded=self.second,
            backward=self.backward,
        )
        self.follow.mark(self.task_ids, Tag(SAMPLES, 0, self.samples))
        # parameters in the bank never reach DDP's hooks, which would wait for them: `apply` averages
        modules = self.model.modules() if isinstance(self.model, nn.Module) else ()
        self.synced = [m for m in modules if isinstance(m, DistributedDataParallel) and m.require_backward_grad_sync]
        for m in self.synced:
            m.require_backward_grad_sync = False
        for leaf in loop.values():
            self.follow.mark(leaf, Tag(CONST))
        self.received: dict[Tensor, TaskRows] = {}
        self.gram: Tensor | None = None
        self.running = False
        self.follow.__enter__()
        self.entered = True

    def leave(self) -> None:
        self.entered = False
        self.follow.__exit__(None, None, None)
        self.follow.clear()
        self.follow.backward = _left  # a cycle less
        for m in self.synced:
            m.require_backward_grad_sync = True

    # --- the backward pass

    def backward(
        self,
        loss: Tensor,
        gradient: Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        """What `loss.backward()` does inside the block."""
        tag = self.follow.tag(loss)
        if create_graph or inputs is not None:
            raise ValueError("one_pass: backward inside the block takes neither create_graph nor inputs")
        if tag.kind in (CONST, PARAM) and self.follow.seen:
            self.follow.check_no_data([loss])
            # of what is not in the bank, or a penalty on parameters alone
            self.follow.engine(loss, gradient, retain_graph)
            return
        self._check_loss(tag, loss)
        if self.done:
            raise RuntimeError(
                "one_pass: backward was called before in this block, which fills its rows once: sum the losses and "
                "call it once, or open a second block with bank= to add to the rows"
            )
        self.check_model()
        if self.second and tag.kind == SAMPLES:
            loss = self.follow.bound(loss)
        self.running = self.done = True
        try:
            self.follow.engine(loss, gradient, retain_graph or self.second)
        except BaseException:
            # what has arrived is a part of the rows; the block has had its backward pass
            self.received, self.gram = {}, None
            self.follow.boundaries.clear()
            raise
        finally:
            self.running = False
        self._own_samples()
        with torch.no_grad():
            if self.follow.looped:
                self._loop()
            if self.check:
                self._compare()
        if self.stream:
            for g in self.received.values():
                self._add_gram(g)
        self.deliver(self)
        if not self.stream:
            self.follow.boundaries.clear()
        self.received = {}

    def _check_loss(self, tag: Tag, loss: Tensor) -> None:
        if tag.kind in (TOTAL, SAMPLES) or (tag.kind == MIXING and self.partition):
            return
        if not self.follow.seen and not self.follow.met:
            raise ValueError(
                f"task_ids: expected the length of the batch, got {len(self.samples)}: no tensor with "
                f"{len(self.samples)} along dimension {self.batch_dim} came into the block (batch_dim= and "
                "bank.samples(x, dim) say where the samples are; a part of a batch is taken before the block)"
            )
        if tag.kind == MIXING:
            raise ValueError(
                f"one_pass: the loss mixes samples of different tasks ({tag.why}), so that it has no part that is one "
                "task's; mixing='partition' takes each sample's part of the gradient, and bank.summed(loss) tells that "
                "it is a sum over samples all the same"
            )
        why = tag.why if tag.kind == UNKNOWN else "it depends on no sample"
        raise ValueError(f"one_pass: it can't be told that the loss is a sum over samples: {why}")

    def check_model(self) -> None:
        for p, version in self.versions.items():
            if p._version != version:
                raise RuntimeError(f"one_pass: {describe(p, self.params[p])} was changed since the block began")
        if isinstance(self.model, nn.Module):
            now = dict.fromkeys(self.model.parameters(), True)
            gone = next((p for p in self.params if p not in now), None)
            if gone is not None:
                raise RuntimeError(
                    f"one_pass: {describe(gone, self.params[gone])} is no longer in the model, which was changed "
                    "since the block began"
                )

    def receive(self, p: Tensor, g: TaskRows, complete: bool) -> None:
        """The rows of a parameter arrive: `[R, ...]`, or one tensor for each row (None: zero).

        `complete`: after these there are none to come.
        """
        if not self.running:
            raise RuntimeError(
                "one_pass: gradients arrived outside loss.backward() inside the block: call it there, once, and not "
                "through torch.autograd"
            )
        rows = added(self.received.pop(p, None), g)
        if self.stream and complete and not self.check and p not in self.follow.looped:
            self._add_gram(rows)
        else:
            self.received[p] = rows

    def _add_gram(self, rows: TaskRows) -> None:
        num_tasks = len(self.names)
        known = [t for t in range(num_tasks) if rows[t] is not None]
        if not known:
            return
        with torch.no_grad(), without_autocast(self.ids.device.type):
            part = gram_rows(GradientRows([rows[t] for t in known], known, num_tasks, 1))
            self.wide = part.dtype if self.gram is None else torch.promote_types(self.wide, part.dtype)
            part = part.to(torch.float64)
            self.gram = part if self.gram is None else self.gram + part

    def _own_samples(self) -> None:
        """Parameters that saw the samples of one task alone are no shared ones."""
        if self.told or self.counts is None or sum(c > 0 for c in self.counts) < 2:
            return
        for p, parts in self.follow.met.items():
            if any(s is self.samples or s.key == self.samples.key for s in parts):
                continue
            seen = torch.cat([s.ids.reshape(-1) for s in parts]).unique().tolist()
            if len(seen) == 1 and seen[0] < len(self.names):
                raise ValueError(
                    f"one_pass: {describe(p, self.params[p])} saw the samples of task {self.names[seen[0]]!r} "
                    "alone: a head belongs to its task, and would change the norms of the gradients. Name the shared "
                    "parameters by shared=, or mark it with fastmtl.mark_per_task"
                )

    # --- passes for plain gradients

    def plain(self, scale: Tensor, params: Sequence[Tensor], *, keep: bool = True) -> dict[Tensor, Tensor]:
        """Gradients of `params` where every sample's cotangent is multiplied by `scale[its row]`.

        `keep`: the graph, for another pass.
        """
        outputs, cotangents = [], []
        for x, tag, place in self.follow.boundaries:
            g = place.cotangent
            if g is None:
                continue
            shape = [1] * g.dim()
            shape[tag.axis] = -1
            each = scale[tag.samples.plan(tag.outer, tag.inner)[0]].to(g.dtype).reshape(shape)
            outputs.append(x)
            cotangents.append(torch.where(each == 0, 0.0, each * g))  # zero times what is not finite
        if not outputs:
            return {}
        # a value may have come from the parameter itself, its stand-in in layers, or that in looped calls
        leaves = [(p, x) for p in params for x in (p, self.values[p], self.loop.get(p)) if x is not None]
        leaves = [(p, x) for p, x in leaves if x.requires_grad]
        with autograd.native(), self.follow.on(), torch.enable_grad():
            found = torch.autograd.grad(
                outputs, [x for _, x in leaves], cotangents, retain_graph=keep, allow_unused=True
            )
        total: dict[Tensor, Tensor] = {}
        for (p, _), g in zip(leaves, found, strict=True):
            if g is not None:
                total[p] = g if p not in total else total[p] + g
        return total

    def _masks(self) -> list[Tensor]:
        return list(torch.eye(self.num_rows, device=self.ids.device).unbind(0))

    def _loop(self) -> None:
        """The rows of parameters in layers that are not taken apart, by a pass per task."""
        params = list(self.follow.looped)
        for p in params:
            self.loop[p].grad = None
        # what layers gave for these parameters is in `received`; only the stand-in of looped calls counts here
        values = {p: self.values[p] for p in params}
        self.values.update((p, p.detach()) for p in params)
        try:
            passes = [self.plain(mask, params) for mask in self._masks()]
        finally:
            self.values.update(values)
        for p in params:
            if any(p in found for found in passes):
                rows = torch.stack([found[p] if p in found else torch.zeros_like(p) for found in passes])
                self.received[p] = added(self.received.get(p), rows)

    def _compare(self) -> None:
        """The rows against T backward passes."""
        for t, mask in enumerate(self._masks()):
            for p, expected in self.plain(mask, list(self.params)).items():
                got = self.received.get(p)
                row = None if got is None else got[t]
                row = torch.zeros_like(expected) if row is None else row
                size, error = expected.double().norm(), (row.double() - expected.double()).norm()
                if not error <= _TOLERANCE[p.dtype] * size + torch.finfo(p.dtype).tiny:
                    raise RuntimeError(
                        f"one_pass: row {t} of {describe(p, self.params[p])} differs from a backward pass of that "
                        f"task's loss by {float(error / size):.2g} of its norm: please report this"
                    )
        if isinstance(self.model, nn.Module):
            _checked.add(self.model)


def _left(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("one_pass: the block has ended")


class StreamedGradients:
    """Task gradients of which the Gram matrix alone was kept: the update takes one more backward pass."""

    is_empty = partitioned = False

    def __init__(
        self, batch: Batch, params: Sequence[Tensor], present: Sequence[bool] | Tensor, poison: Tensor | None
    ) -> None:
        self.names, self.device = batch.names, batch.ids.device
        self.present, self.poison = present, poison
        self._batch, self._params = batch, params

    def gram(self) -> Tensor:
        if self._batch.gram is None:
            return torch.zeros(len(self.names), len(self.names), device=self.device)
        return self._batch.gram.to(self._batch.wide)

    def combine(self, weights: Tensor) -> Updates:
        # samples of no task count as they are
        found = self._batch.plain(torch.cat([weights, weights.new_ones(1)]), self._params, keep=False)
        return list(found.items())


class _Receiver:
    """Takes the rows of one parameter; holds no reference that would keep a graph alive."""

    def __init__(self, batch: Batch, param: Tensor) -> None:
        self._batch, self._param = weakref.ref(batch), param
        self._deliveries = 0

    def __call__(self, g: TaskRows) -> None:
        """What autograd has summed up: the last that arrives."""
        self._hand_over(g, True)

    def takes_parts(self) -> bool:
        batch = self._batch()
        return batch is not None and batch.running

    def parts(self, rows: TaskRows) -> None:
        """The rows of one use of the parameter, as soon as there are."""
        if isinstance(rows, list):
            rows = [None if row is None else row.to(self._param.dtype) for row in rows]  # narrower under autocast
        else:
            rows = rows.to(self._param.dtype)
        self._deliveries += 1
        batch = self._batch()
        self._hand_over(rows, batch is not None and self._deliveries == batch.follow.uses.get(self._param))

    def _hand_over(self, rows: TaskRows, complete: bool) -> None:
        batch = self._batch()
        if batch is None:
            raise RuntimeError("one_pass: the block and its bank are gone, but gradients still arrive")
        batch.receive(self._param, rows, complete)
