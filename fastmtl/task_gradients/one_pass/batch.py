"""One batch inside a `one_pass` block: its backward pass, and the rows that arrive."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastmtl.core.gradient_rows import GradientRows
from fastmtl.core.memory import keep_freed_memory
from fastmtl.core.schemas import without_autocast
from fastmtl.core.tensors import as_real
from fastmtl.ops.gradients.gram import gram_rows
from fastmtl.ops.task_weights.task_plan import task_plan_op
from fastmtl.parameters import Params, describe, is_registered
from fastmtl.task_gradients.one_pass.autograd.ends import CollectRows
from fastmtl.task_gradients.one_pass.autograd.rows import RECEIVER, plain_gradients
from fastmtl.task_gradients.one_pass.known_tensors import Held
from fastmtl.task_gradients.one_pass.sample_axis import (
    CONSTANT,
    Constant,
    FromParameters,
    MixedSamples,
    PerSample,
    SampleAxis,
    SampleSum,
    Unknown,
)
from fastmtl.task_gradients.one_pass.task_ids import TaskIds
from fastmtl.task_gradients.one_pass.tracker import Tracker

# how far the rows of a step may be from those of T backward passes, when checked
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
# and beside that, in units of the last place of the norm of the task's whole gradient
_ROUNDINGS = 4

# of a DDP module, off inside the block
_OF_DDP = ("require_backward_grad_sync", "find_unused_parameters", "static_graph")

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


class BatchOptions(NamedTuple):
    """How a batch is followed, as the caller of `one_pass` has said.

    Attributes:
        batch_dim: the dimension of the samples in tensors from outside.
        partition: layers that mix samples are accepted (`mixing="partition"`).
        loop: layers that can't be taken apart get their rows by T backward passes (`fallback="loop"`).
        stream: only the Gram matrix is kept (`memory="stream"`).
        check: the rows are compared with T backward passes.
        probe: what no rule tells is found out by experiment (`unknown="probe"`).
        sort: the batch is in the order of its tasks, but for tensors from outside.
        shared_named: the caller has named the shared parameters.
    """

    batch_dim: int
    partition: bool
    loop: bool
    stream: bool
    check: bool
    probe: bool
    sort: bool
    shared_named: bool


class Collected(NamedTuple):
    """What the backward pass of one batch has left.

    Attributes:
        rows: of each parameter that got any; with `memory="stream"` there are none.
        ids: `[N]`, whose row each sample belongs to, or T: of no task.
        counts: the number of samples of each task; None: the device alone knows.
        poison: NaN where an id was out of range on a device, or a batch norm by task met samples of several, else 0;
            None: none can be.
        by_samples: the rows are parts of the batch's gradient by samples, not gradients of the tasks' losses.
    """

    rows: dict[Tensor, TaskRows]
    ids: Tensor
    counts: list[int] | None
    poison: Tensor | None
    by_samples: bool


class Batch:
    """One batch: what is followed inside a `one_pass` block, and its backward pass.

    Args:
        model, params: as for `one_pass`; the parameters with their names.
        names: of the tasks.
        given_ids: `[N]` as the caller has them: 0 to T - 1, or -1.
        options: how it is followed.
    """

    def __init__(
        self,
        model: Params,
        params: Mapping[Tensor, str],
        names: Sequence[str],
        given_ids: Tensor,
        options: BatchOptions,
    ) -> None:
        self.model, self.params, self.names, self.given_ids = model, params, names, given_ids
        self.options = options
        self.check = options.check and not (isinstance(model, nn.Module) and model in _checked)
        self.done = False
        self.entered = False  # and not left yet
        num_tasks = len(names)
        device = next(iter(params)).device
        # what the host knows of the tasks, or what the device does
        ids = given_ids.detach()
        self.counts: list[int] | None = None
        self.poison: Tensor | None = None
        loose = True
        if device.type == "cpu":
            keep_freed_memory()  # the rows of a step are the next one's memory
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
        order, offsets = task_plan_op(ids, self.num_rows)
        self.outside = self.task_ids = TaskIds(ids, self.num_rows, ("batch",), (order, offsets))
        self.order: Tensor | None = None  # into which `sorted` puts what comes from outside
        if options.sort:
            in_turn = torch.arange(len(order), device=device)
            if device.type != "cpu" or not torch.equal(order, in_turn):
                self.order = order
                self.task_ids = TaskIds(ids[order], self.num_rows, ("sorted",), (in_turn, offsets))

    # --- the ends of the block

    def enter(self, run_backward: Callable[..., None]) -> None:
        """Follows every torch call from here on. `run_backward`: what `loss.backward()` calls."""
        plain = self.options.stream or self.check  # passes that want plain gradients
        self.more_passes = plain or self.options.loop
        token = torch.zeros((), requires_grad=True, device=next(iter(self.params)).device)
        self.held: dict[Tensor, Held] = {}
        with torch.enable_grad():
            receivers = [_Receiver(self, p) for p in self.params]
            values = [p.detach() for p in self.params]
            stand_ins = CollectRows.apply(token, self.num_rows, receivers, *values)
            for p, value, rows, receiver in zip(self.params, values, stand_ins, receivers, strict=True):
                setattr(rows, RECEIVER, receiver)
                leaf = p.detach().requires_grad_() if self.options.loop else None
                self.held[p] = Held(rows, value.requires_grad_() if plain else value, leaf)
        self.versions = {p: p._version for p in self.params}
        self.tracker = Tracker(
            self.task_ids,
            self.options.batch_dim,
            self.held,
            self.params,
            self.model.buffers() if isinstance(self.model, nn.Module) else (),
            partition=self.options.partition,
            loop=self.options.loop,
            bounded=self.more_passes,
            probe=self.options.probe,
            backward=run_backward,
            outside=self.outside,
        )
        self.tracker.mark(self.given_ids, PerSample(0, self.outside))
        # parameters in the bank never reach DDP's hooks, which would wait for them: `apply` averages. The other two
        # settings would have DDP hand on its outputs by a function of its own, which can't be followed
        wrapped = dist.is_available() and dist.is_initialized() and isinstance(self.model, nn.Module)
        modules = self.model.modules() if wrapped else ()
        self.wrappers = [
            (m, {k: getattr(m, k) for k in _OF_DDP}) for m in modules if isinstance(m, DistributedDataParallel)
        ]
        for m, _ in self.wrappers:
            for setting in _OF_DDP:
                setattr(m, setting, False)
        for held in self.held.values():
            if held.leaf is not None:
                self.tracker.mark(held.leaf, CONSTANT)
        self.received: dict[Tensor, TaskRows] = {}
        self.in_gram: set[Tensor] = set()  # parameters whose rows were added to `gram`
        self.gram: Tensor | None = None
        self.gram_dtype = torch.float32  # the dtype that the Gram matrix of all rows has
        self.running = False
        self.tracker.attach()
        self.tracker.__enter__()
        self.entered = True

    def leave(self) -> None:
        self.entered = False
        self.tracker.__exit__(None, None, None)
        self.tracker.detach()
        self.tracker.clear()
        self.tracker.backward = _left  # a cycle less
        for m, settings in self.wrappers:
            for setting, value in settings.items():
                setattr(m, setting, value)

    # --- the backward pass

    def backward(
        self,
        loss: Tensor,
        gradient: Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> Collected | None:
        """What `loss.backward()` does inside the block. None: of a loss without samples, which fills no row."""
        axis = self.tracker.axis_of(loss)
        if create_graph or inputs is not None:
            raise ValueError("one_pass: backward inside the block takes neither create_graph nor inputs")
        if isinstance(axis, (Constant, FromParameters)) and self.tracker.seen:
            self.tracker.check_no_data([loss])
            # of what is not in the bank, or a penalty on parameters alone
            self.tracker.engine(loss, gradient, retain_graph)
            return None
        self.check_loss(axis)
        if self.done:
            raise RuntimeError(
                "one_pass: backward was called before in this block, which fills its rows once: sum the losses and "
                "call it once, or open a second block with bank= to add to the rows"
            )
        self.check_model()
        if self.more_passes and isinstance(axis, PerSample):
            loss = self.tracker.bound(loss)
        self.running = self.done = True
        try:
            self.tracker.engine(loss, gradient, retain_graph or self.more_passes)
        except BaseException:
            # what has arrived is a part of the rows; the block has had its backward pass
            self.received, self.gram = {}, None
            self.tracker.boundaries.clear()
            raise
        finally:
            self.running = False
        self._own_samples()
        with torch.no_grad():
            if self.tracker.looped:
                self._loop()
            if not self.received and self.gram is None:
                raise ValueError(
                    "one_pass: no parameter of the bank took part in this loss. Is it of another model than the one "
                    "that the block was given, or of a part of it that has no shared parameters?"
                )
            if self.check:
                self._compare()
        self.tracker.remember_constants()
        rows, self.received = self.received, {}
        if self.options.stream:
            for p, g in rows.items():
                self._add_gram(p, g)
            rows = {}
        else:
            self.tracker.boundaries.clear()
        poison = self.poison
        for x in self.tracker.poisons:
            poison = x if poison is None else poison + x
        by_samples = self.tracker.mixed or self.options.partition
        return Collected(rows, self.ids, self.counts, poison, by_samples)

    def check_loss(self, axis: SampleAxis) -> None:
        """Raises unless it is that of a sum over samples, or of a loss for each."""
        if isinstance(axis, (SampleSum, PerSample)) or (isinstance(axis, MixedSamples) and self.options.partition):
            return
        if not (self.tracker.seen or self.tracker.met or self.tracker.of_all):
            n = len(self.task_ids)
            raise ValueError(
                f"task_ids: expected the length of the batch, got {n}: no tensor with {n} along dimension "
                f"{self.options.batch_dim} came into the block (batch_dim= and bank.samples(x, dim) say where the "
                "samples are; a part of a batch is taken before the block, and the forward pass runs inside it)"
            )
        if isinstance(axis, MixedSamples):
            raise ValueError(
                f"one_pass: the loss mixes samples of different tasks ({axis.why}), so that it has no part that is one "
                "task's; mixing='partition' takes each sample's part of the gradient, and bank.summed(loss) tells that "
                "it is a sum over samples all the same"
            )
        why = axis.why if isinstance(axis, Unknown) else "it depends on no sample"
        raise ValueError(f"one_pass: it can't be told that the loss is a sum over samples: {why}")

    def check_model(self) -> None:
        for p, version in self.versions.items():
            if p._version != version:
                raise RuntimeError(f"one_pass: {describe(p, self.params[p])} was changed since the block began")
        # a module may also have parameters of its own making, which `parameters()` alone tells
        if isinstance(self.model, nn.Module) and not is_registered(self.params, self.model):
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
        if self.options.stream and complete and not self.check and p not in self.tracker.looped:
            self._add_gram(p, rows)
        else:
            self.received[p] = rows

    def _add_gram(self, p: Tensor, rows: TaskRows) -> None:
        num_tasks = len(self.names)
        known = {t: as_real(row) for t in range(num_tasks) if (row := rows[t]) is not None}
        if not known:
            return
        self.in_gram.add(p)
        with torch.no_grad(), without_autocast(self.ids.device.type):
            part = gram_rows(GradientRows(list(known.values()), list(known), num_tasks, 1))
            self.gram_dtype = part.dtype if self.gram is None else torch.promote_types(self.gram_dtype, part.dtype)
            part = part.to(torch.float64)
            self.gram = part if self.gram is None else self.gram + part

    def _own_samples(self) -> None:
        """Parameters that saw the samples of one task alone are no shared ones."""
        if self.options.shared_named or self.counts is None or sum(c > 0 for c in self.counts) < 2:
            return
        for p, parts in self.tracker.met.items():
            if id(p) in self.tracker.of_all or any(s.key == self.task_ids.key for s in parts):
                continue
            seen = torch.cat([s.ids.reshape(-1) for s in parts]).unique().tolist()
            if len(seen) == 1 and seen[0] < len(self.names):
                raise ValueError(
                    f"one_pass: {describe(p, self.params[p])} saw the samples of task {self.names[seen[0]]!r} "
                    "alone: a head belongs to its task, and would change the norms of the gradients. Name the shared "
                    "parameters by shared=, or mark it with fastmtl.mark_per_task"
                )

    # --- passes for plain gradients

    def weighted_gradients(
        self, scale: Tensor, params: Sequence[Tensor], *, keep: bool = True, of_layers: bool = True
    ) -> dict[Tensor, Tensor]:
        """Gradients of `params` where every sample's cotangent is multiplied by `scale[its row]`.

        `keep`: the graph, for another pass. `of_layers`: what comes from layers that are taken apart, too.
        """
        outputs, cotangents = [], []
        for x, axis, place in self.tracker.boundaries:
            g = place.cotangent
            if g is None:
                continue
            shape = [1] * g.dim()
            shape[axis.axis] = -1
            each = scale[axis.task_ids.plan(axis.outer, axis.inner)[0]].to(g.dtype).reshape(shape)
            outputs.append(x)
            cotangents.append(torch.where(each == 0, 0.0, each * g))  # zero times what is not finite
        if not outputs:
            return {}
        # a value may have come from the parameter itself, its stand-in in layers, or that in looped calls
        given = [(p, (p, self.held[p].value if of_layers else None, self.held[p].leaf)) for p in params]
        leaves = [(p, x) for p, each in given for x in each if x is not None and x.requires_grad]
        with plain_gradients(), self.tracker.backwards(), torch.enable_grad():
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
        params = list(self.tracker.looped)
        for p in params:
            leaf = self.held[p].leaf
            assert leaf is not None
            leaf.grad = None
        # what layers gave for these parameters is in `received`; only the stand-in of looped calls counts here
        passes = [self.weighted_gradients(mask, params, of_layers=False) for mask in self._masks()]
        for p in params:
            if any(p in found for found in passes):
                rows = torch.stack([found[p] if p in found else torch.zeros_like(p) for found in passes])
                self.received[p] = added(self.received.get(p), rows)

    def _compare(self) -> None:
        """The rows against T backward passes."""
        for t, mask in enumerate(self._masks()):
            found = self.weighted_gradients(mask, list(self.params))
            whole = math.sqrt(sum(float(as_real(g).double().norm()) ** 2 for g in found.values()))
            for p, expected in found.items():
                got = self.received.get(p)
                row = None if got is None else got[t]
                row, expected = as_real(torch.zeros_like(expected) if row is None else row), as_real(expected)
                size, error = expected.double().norm(), (row.double() - expected.double()).norm()
                # a gradient may be zero but for rounding, as that of a bias of an attention's keys
                rounding = _ROUNDINGS * torch.finfo(p.dtype).eps * whole
                if not error <= _TOLERANCE[expected.dtype] * size + rounding + torch.finfo(p.dtype).tiny:
                    raise RuntimeError(
                        f"one_pass: row {t} of {describe(p, self.params[p])} differs from a backward pass of that "
                        f"task's loss by {float(error / size):.2g} of its norm: please report this"
                    )
        tried = self.tracker.report()
        print(
            f"one_pass: the rows are right; {tried.runs} runs of calls without a rule took {1e3 * tried.seconds:.1f} ms"
        )
        if isinstance(self.model, nn.Module):
            _checked.add(self.model)


def _left(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("one_pass: the block has ended")


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
        self._hand_over(rows, batch is not None and self._deliveries == batch.tracker.uses.get(id(self._param)))

    def _hand_over(self, rows: TaskRows, complete: bool) -> None:
        batch = self._batch()
        if batch is None:
            raise RuntimeError("one_pass: the block and its bank are gone, but gradients still arrive")
        batch.receive(self._param, rows, complete)
