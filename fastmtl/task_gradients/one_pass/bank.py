"""`OnePassBank`: what the backward pass inside a `one_pass` block has left, by task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl import methods
from fastmtl.distributed.averaging import Slot, average, average_rows
from fastmtl.distributed.ranks import Ranks, reporting
from fastmtl.distributed.wrappers import find_ranks
from fastmtl.methods import Weighting
from fastmtl.parameters import describe
from fastmtl.surgery.accumulate import accumulate
from fastmtl.surgery.result import PartitionSurgery, Surgery
from fastmtl.surgery.solve import SurgeryOptions, solve
from fastmtl.surgery.task_gradients import Row, TaskGradients
from fastmtl.task_gradients.bank import position
from fastmtl.task_gradients.one_pass.autograd.registry import takes_apart
from fastmtl.task_gradients.one_pass.batch import Batch, Collected, TaskRows, added
from fastmtl.task_gradients.one_pass.report import Report
from fastmtl.task_gradients.one_pass.sample_axis import SAMPLE_SUM, Constant, PerSample
from fastmtl.task_gradients.one_pass.stream import StreamedGradients
from fastmtl.task_gradients.one_pass.tracker import Tracker
from fastmtl.task_gradients.reach import LossValues, read_loss_scale, read_loss_values

_APPLY = "OnePassBank.apply"


class OnePassBank:
    """T rows of task gradients, filled by the backward pass inside a `one_pass` block.

    Attributes:
        params: the parameters in the bank, each once.
        names: the T task names.
    """

    def __init__(self, params: Mapping[Tensor, str], names: Sequence[str]) -> None:
        self._where: tuple[Any, Any, Any] = (None, None, None)
        self._loss_reduction = "sum"
        self._named = dict(params)
        self.params = list(params)
        self.names = tuple(names)
        self._batch: Batch | None = None
        self._report: Report | None = None  # of the block that `apply` has ended
        self.clear()

    def clear(self) -> None:
        """Forgets every row."""
        self._rows: dict[Tensor, TaskRows] = {}
        self._unprojected: dict[Tensor, Tensor] = {}  # of samples that belong to no task
        self._counts: list[int] | None = [0] * len(self.names)
        self._tally: Tensor | None = None  # `[T + 1]` samples of each task, and of none
        self._present: Tensor | None = None  # where the host doesn't know
        self._poison: Tensor | None = None
        self._by_samples = False
        self._versions: dict[Tensor, int] = {}  # of the parameters, when the rows were made
        self._filled = self._applied = False

    # --- inside the block

    def samples(self, x: Tensor, dim: int = 0) -> Tensor:
        """Tells that dimension `dim` of `x` carries the samples of the batch, in their order.

        With `sort=True` that is the order of `sorted`.

        For tensors whose place can't be seen: inputs with the samples elsewhere than in `batch_dim`, results of a
        `torch.autograd.Function`, a scripted module or a call that is not followed.

        Returns:
            `x` itself.

        Raises:
            RuntimeError: outside the block.
            TypeError, ValueError: no tensor; a dimension that it does not have, or of another size than the batch.
                A parameter of the bank that was used on the way to `x` unseen: its gradient would miss the rows.
        """
        tracker = self._tracker("samples")
        x, dim = _read_samples(x, dim, len(tracker.task_ids))
        self._check_unseen(x)
        tracker.mark(x, PerSample(dim, tracker.task_ids))
        tracker.count_word("samples")
        tracker.seen = True
        return x

    def sorted(self, *tensors: Tensor, dim: int | None = None) -> Any:
        """Puts a batch in the order of its tasks, of `one_pass(..., sort=True)`: samples of no task come last.

        Each layer then reads a task's samples as they lie, and gathers nothing. All that belongs to the batch goes
        through here, task ids that the model reads among it. A tensor from outside that was left in its own order
        raises where it meets the rest; what is made inside the block of Python's numbers is taken for a constant, as
        ever, and can't be seen to be in another order. Samples of one task keep their order.

        Args:
            tensors: each with N samples along `dim`.
            dim: None: `batch_dim`.

        Returns:
            The tensor in the new order, or a tuple of them; a tensor whose order is right already is returned itself.

        Raises:
            RuntimeError: outside the block, or of a block without `sort=True`.
            TypeError, ValueError: no tensor; a dimension that it does not have, or of another size than the batch.
                A parameter of the bank that was used on the way to it unseen: its gradient would miss the rows.

        Example:
            >>> net = torch.nn.Linear(4, 1)
            >>> x, ids = torch.ones(3, 4), torch.tensor([1, 0, 1])
            >>> with fastmtl.one_pass(net, ids, 2, sort=True) as bank:
            ...     x, ids = bank.sorted(x, ids)
            ...     net(x).square().mean().backward()
            >>> ids
            tensor([0, 1, 1])
        """
        tracker = self._tracker("sorted")
        batch = self._batch
        assert batch is not None
        if not batch.options.sort:
            raise RuntimeError("OnePassBank.sorted: expected a block of one_pass(..., sort=True)")
        if not tensors:
            raise TypeError("tensors: expected at least one")
        read = [_read_samples(x, batch.options.batch_dim if dim is None else dim, len(batch.ids)) for x in tensors]
        found = []
        for x, d in read:
            axis = tracker.axis_of(x)
            known = axis.task_ids if isinstance(axis, PerSample) and axis.axis == d else None
            if known is None:
                self._check_unseen(x)
            elif known.key not in (batch.outside.key, batch.task_ids.key):
                raise ValueError("tensors: expected samples in the order of task_ids, got some in another order")
            if batch.order is not None and not (known is not None and known.key == batch.task_ids.key):
                with tracker.on(False):
                    x = x.index_select(d, batch.order)
            tracker.mark(x, PerSample(d, batch.task_ids))
            found.append(x)
        tracker.seen = True
        return found[0] if len(found) == 1 else tuple(found)

    def constant(self, x: Tensor) -> Tensor:
        """Tells that `x` carries no samples, though one of its dimensions has their number.

        Returns:
            `x` itself.

        Raises:
            RuntimeError: outside the block.
            TypeError: no tensor.
            ValueError: it needs a gradient.
        """
        tracker = self._tracker("constant")
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
        if x.requires_grad:
            raise ValueError("x: expected a tensor that needs no gradient")
        tracker.mark(x, Constant(named=True))
        tracker.count_word("constant")
        return x

    def summed(self, loss: Tensor) -> Tensor:
        """Tells that a loss is a sum of terms of single samples, where that can't be seen (or is accepted so).

        Returns:
            `loss` itself.

        Raises:
            RuntimeError: outside the block.
            TypeError: no tensor.
            ValueError: a parameter of the bank was used on the way unseen: its gradient would miss the rows.
        """
        tracker = self._tracker("summed")
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss: expected a tensor, got {type(loss).__name__}")
        self._check_unseen(loss)
        tracker.mark(loss, SAMPLE_SUM)
        tracker.count_word("summed")
        return loss

    def verify(self, loss: Tensor, task: int | str | None = None) -> None:
        """Runs the loss of one task's samples back and requires all other rows to be zero. Fills nothing.

        Args:
            loss: made from the outputs for one task's samples alone, such as `losses[task_ids == t].mean()`; its graph
                is kept.
            task: whose it is, position or name; None: whichever it turns out to be.

        Raises:
            RuntimeError: another row is not zero: samples of several tasks meet in the model; or outside the block.
            ValueError: no such task; a loss that can't be followed.

        Waits for the device.
        """
        tracker = self._tracker("verify")
        batch = self._batch
        assert batch is not None
        expected = None if task is None else self.names[position(task, self.names)]
        batch.check_loss(tracker.axis_of(loss))
        stand_ins = [held.rows for held in batch.held.values()]
        with tracker.on():
            found = torch.autograd.grad(loss, stand_ins, retain_graph=True, allow_unused=True)
        owner = expected
        for p, g in zip(batch.held, found, strict=True):
            if g is None:
                continue
            filled = (g.flatten(1) != 0).any(1).tolist()  # NaN is not zero either
            for t, here in enumerate(filled):
                if not here:
                    continue
                name = self.names[t] if t < len(self.names) else "-1 (of no task)"
                if owner is None:
                    owner = name
                elif name != owner:
                    raise RuntimeError(
                        f"one_pass: the loss of task {owner!r} has a gradient in the row of task {name!r}, for "
                        f"{describe(p, self._named[p])}: samples of different tasks meet in the model or in the loss"
                    )

    # --- afterwards

    def report(self) -> Report:
        """What the rows of the latest block are known from: calls followed by a rule, calls tried, and what you told.

        In a compiled model calls are followed when it is traced, and not counted.

        Raises:
            RuntimeError: no block has used this bank.
        """
        if self._batch is not None:
            return self._batch.tracker.report()
        if self._report is None:
            raise RuntimeError("OnePassBank.report: no block has used this bank")
        return self._report

    def row(self, task: int | str) -> list[Tensor | None]:
        """Task t's gradients, aligned with `params`; None: zero, for want of a sample or of a way from the loss to it.

        Raises:
            RuntimeError: no backward pass has filled the bank, or it keeps no rows (`memory="stream"`).
            TypeError, ValueError: no such task.
        """
        t = position(task, self.names)
        self._check_filled("row")
        if self._streamed():
            raise RuntimeError("OnePassBank.row: memory='stream' keeps no rows")
        return [self._rows[p][t] if p in self._rows else None for p in self.params]

    @torch._disable_dynamo
    def apply(
        self,
        method: str | Weighting = "pcgrad",
        *,
        loss_scale: float | Tensor | None = None,
        losses: LossValues | None = None,
    ) -> Surgery:
        """Operates on the rows, accumulates the result into `.grad`, and empties the bank.

        Post-accumulate hooks of the parameters run then, once; their gradient hooks don't run.

        Args:
            method: as for `fastmtl.backward`.
            loss_scale: as for `fastmtl.backward`.
            losses: for a method that needs them: each task's part of the one loss that was differentiated, in order, or
                a dict by name; multiplied by `loss_scale`, where that is given. Scalar tensors or numbers, None where
                absent.

        Returns:
            A `Surgery`, as `fastmtl.backward`. A task without samples is absent; where the ids lie on a device,
            `present` is a `[T]` bool tensor there.

        Raises:
            RuntimeError: no backward pass has filled the bank; a model changed since.
            TypeError, ValueError: as `fastmtl.backward`; a method that needs losses without them, one that needs a
                second batch, and with `memory="stream"` one that needs the task gradients themselves. Nothing has been
                written then, and the rows are still there.
        """
        ranks = find_ranks(*self._where, _APPLY)
        with reporting(ranks, _APPLY):
            options = SurgeryOptions(methods.for_one_call(method), read_loss_scale(loss_scale), ranks)
            self._check_filled("apply")
            missing = {"second_batch": "use fastmtl.backward with second_losses=, or a GradientBank with second="}
            if self._streamed():
                missing["gradients"] = "memory='stream' keeps none: use memory='bank'"
            methods.check_needs(options.method, _APPLY, missing)
            present = self._present_tasks()
            values = read_loss_values(losses, self.names, present, options.method, _APPLY)
            options = options._replace(losses=values)
            batch = self._batch
            assert batch is not None
            batch.check_model()
        with batch.tracker.on(False):
            return self._apply(options, batch)

    def _apply(self, options: SurgeryOptions, batch: Batch) -> Surgery:
        if options.ranks is None:
            present = self._present_tasks()
        else:
            present, shares = self._average(options.ranks, batch)
            if options.losses is not None and self._loss_reduction == "mean":
                # their mean over the ranks is the mean over all samples then
                losses = [
                    x if x is None else (x.detach() if isinstance(x, Tensor) else x) * share
                    for x, share in zip(options.losses, shares, strict=True)
                ]
                options = options._replace(losses=losses)
        gradients = (
            StreamedGradients(batch, self.params, present, self._poison)
            if batch.options.stream
            else self._task_gradients(present, batch.ids.device)
        )
        updates, surgery = solve(gradients, options)
        if self._by_samples:
            surgery = PartitionSurgery.of(surgery)
        batch.tracker.boundaries.clear()
        self.clear()
        self._applied = True
        self._batch, self._report = None, batch.tracker.report()
        accumulate(updates, run_hooks=True)
        return surgery

    def _present_tasks(self) -> list[bool] | Tensor:
        if self._counts is not None:
            return [count > 0 for count in self._counts]
        assert self._present is not None
        return self._present

    def _task_gradients(self, present: Sequence[bool] | Tensor, device: torch.device) -> TaskGradients:
        params = [p for p in self.params if p in self._rows]
        known = [True] * len(self.names) if isinstance(present, Tensor) else present
        each = [rows.unbind(0) if isinstance(rows, Tensor) else rows for rows in map(self._rows.__getitem__, params)]
        rows: list[Row] = [
            [of_param[t] for of_param in each] if here else [None] * len(params) for t, here in enumerate(known)
        ]
        del each
        unshared = {p: self._unprojected[p] for p in self.params if p in self._unprojected}
        return TaskGradients(params, rows, unshared, self.names, present, device, poison=self._poison, references=1)

    def _average(self, ranks: Ranks, batch: Batch) -> tuple[list[bool], Tensor]:
        """Makes the rows those of the whole batch, which the ranks have in parts; and which tasks that has, and what
        this rank's samples of each are, over the mean number of a rank."""
        for p, rows in self._rows.items():
            if isinstance(rows, list):
                self._rows[p] = torch.stack([torch.zeros_like(p) if row is None else row for row in rows])
        assert self._tally is not None
        counts = self._tally
        rows_of = {p: rows for p, rows in self._rows.items() if isinstance(rows, Tensor)}
        totals = average_rows(
            ranks, self._named, self.names, rows_of, self._unprojected, counts, self._loss_reduction, _APPLY
        )
        self._rows.update(rows_of)
        self._average_others(ranks, counts, totals, batch)
        shares = counts[:-1].to(torch.float64) * ranks.size / totals[:-1].clamp(min=1)
        return (totals[:-1] > 0).tolist(), shares

    def _average_others(self, ranks: Ranks, counts: Tensor, totals: Tensor, batch: Batch) -> None:
        """The gradients of parameters outside the bank, which DDP has not reduced inside the block."""
        if not isinstance(batch.model, nn.Module):
            return
        named: dict[Tensor, str] = {p: name for name, p in batch.model.named_parameters()}
        others = {p: name for p, name in named.items() if p.requires_grad and p not in self._named}
        uneven = self._loss_reduction == "mean" and bool((counts * ranks.size != totals).any())
        flags = torch.tensor([uneven, *(p.grad is not None for p in others)], dtype=torch.int64, device=counts.device)
        ranks.start_sum(flags).wait()
        uneven, *reached = flags.tolist()
        if uneven and any(reached):
            name = next(name for name, r in zip(others.values(), reached, strict=True) if r)
            raise ValueError(
                f"loss_reduction: expected 'sum' where parameters outside the bank, such as {name!r}, get gradients, "
                "and ranks have unequal numbers of samples of a task: for 'mean' it is not known whose they are"
            )
        held = {p: p.grad for p in others if p.grad is not None}
        slots = [Slot(held, p) for p, here in zip(others, reached, strict=True) if here]
        average(ranks, slots)
        for slot in slots:
            slot.param.grad = held[slot.param]

    # --- between a block and its bank

    def _open(self, batch: Batch, where: tuple[Any, Any, Any], loss_reduction: str) -> None:
        """A block begins."""
        batch.enter(self._run_backward)
        self._batch, self._where, self._loss_reduction = batch, where, loss_reduction

    def _run_backward(self, *args: Any, **kwargs: Any) -> None:
        """`loss.backward(*args, **kwargs)` inside the block."""
        assert self._batch is not None
        collected = self._batch.backward(*args, **kwargs)
        if collected is not None:
            self._add(collected)

    def _add(self, collected: Collected) -> None:
        """What a backward pass has left is added to what there was."""
        self._add_presence(collected)
        num_tasks = len(self.names)
        for p, g in collected.rows.items():
            self._rows[p] = added(self._rows.get(p), g[:num_tasks])
            extra = g[num_tasks] if len(g) > num_tasks else None
            if extra is not None:
                self._unprojected[p] = extra if p not in self._unprojected else self._unprojected[p] + extra
        if collected.poison is not None:
            self._poison = collected.poison if self._poison is None else self._poison + collected.poison
        self._by_samples |= collected.by_samples
        assert self._batch is not None
        self._versions = self._batch.versions
        self._filled = True

    def _add_presence(self, collected: Collected) -> None:
        """Which tasks a backward pass had, and how many samples of each."""
        ids, num_tasks = collected.ids, len(self.names)
        if collected.counts is not None and self._counts is not None:
            self._counts = [a + b for a, b in zip(self._counts, collected.counts, strict=True)]
        else:
            now = (ids[:, None] == torch.arange(num_tasks, device=ids.device)).any(0)
            before = self._present
            if before is None and self._counts is not None and self._filled:
                before = torch.tensor([c > 0 for c in self._counts]).to(now.device)
            self._present = now if before is None else before | now
            self._counts = None
        if collected.counts is not None and ids.device.type == "cpu":
            tally = torch.tensor([*collected.counts, len(ids) - sum(collected.counts)])
        else:
            tally = (ids[:, None] == torch.arange(num_tasks + 1, device=ids.device)).sum(0)
        self._tally = tally if self._tally is None else self._tally + tally

    def _streamed(self) -> bool:
        return self._batch is not None and self._batch.options.stream

    def _check_filled(self, call: str) -> None:
        if not self._filled and self._applied:
            raise RuntimeError(f"OnePassBank.{call}: the bank was applied, which empties it: read rows before")
        if not self._filled:
            raise RuntimeError(f"OnePassBank.{call}: no backward pass has filled the bank")

    def _tracker(self, call: str) -> Tracker:
        if self._batch is None or not self._batch.entered:
            raise RuntimeError(f"OnePassBank.{call}: call it inside the one_pass block")
        return self._batch.tracker

    def _check_same(self, params: Mapping[Tensor, str], names: Sequence[str]) -> None:
        if self.names != tuple(names):
            raise ValueError(f"bank: expected the tasks {list(names)}, got a bank of {list(self.names)}")
        if len(self.params) != len(params) or any(a is not b for a, b in zip(self.params, params, strict=True)):
            raise ValueError("bank: expected a bank of the same parameters in the same order")
        for p, version in self._versions.items():
            if p._version != version:
                raise RuntimeError(
                    f"bank: {describe(p, self._named[p])} was changed since the block that filled it: rows of "
                    "different weights don't add up (apply the bank, or clear it, before optimizer.step())"
                )

    def _check_unseen(self, x: Tensor) -> None:
        """No parameter may have gone into `x` unseen."""
        todo: list[Any] = [x.grad_fn]
        seen: set[Any] = {None}
        while todo:
            node = todo.pop()
            if node in seen or takes_apart(node):
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is not None and leaf in self._named:
                raise ValueError(
                    f"one_pass: {describe(leaf, self._named[leaf])} was used on the way to this tensor where calls "
                    "can't be seen (a torch.autograd.Function, a scripted module): leave it out by shared= or "
                    "fastmtl.mark_per_task, or write the call in torch functions"
                )
            todo.extend(child for child, _ in node.next_functions)

    def __repr__(self) -> str:
        state = "filled" if self._filled else "empty"
        return f"OnePassBank({len(self.params)} parameters, {len(self.names)} tasks, {state})"


def _read_samples(x: Any, dim: Any, num_samples: int) -> tuple[Tensor, int]:
    """A tensor of as many samples along `dim`, which is made positive."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim: expected an int, got {type(dim).__name__}")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim: expected a dimension of a tensor of shape {list(x.shape)}, got {dim}")
    dim %= x.dim()
    if x.shape[dim] != num_samples:
        raise ValueError(f"dim: expected a dimension of {num_samples} samples, got {x.shape[dim]} in {list(x.shape)}")
    return x, dim
