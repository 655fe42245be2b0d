"""`one_pass`: the whole gradient bank from one forward and one backward, where every sample has one task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl import methods
from fastmtl._graph import read_loss_scale
from fastmtl._library import without_autocast
from fastmtl._marks import Params, describe, is_per_task, read_params
from fastmtl._samples.block import Block, TaskRows, added
from fastmtl._samples.mode import NAMED, Follow
from fastmtl._samples.tags import SAMPLES, SUM, Tag
from fastmtl.bank import position, read_names
from fastmtl.distributed import Ranks, Slot, average_rows, find_ranks, reporting
from fastmtl.methods import Weighting
from fastmtl.ops import _per_task
from fastmtl.ops._rows import FLOAT_DTYPES, Rows
from fastmtl.ops._task import check_ids, checking
from fastmtl.ops.combine import combine_into
from fastmtl.ops.gram import gram_rows
from fastmtl.surgery import (
    Row,
    Surgery,
    after_accumulation,
    check_within,
    operate,
    unscaled,
    write,
)

_MIXING = ("error", "partition")
_FALLBACK = ("error", "loop")
_MEMORY = ("bank", "stream")
_REDUCTION = ("sum", "mean")

_CALL, _APPLY = "fastmtl.one_pass", "OnePassBank.apply"

_active: list[Block] = []


class one_pass:
    """Fills a bank of T task gradients by one forward and one `.backward()`, where every sample has one task.

    Inside the block every torch call is followed: which axis of each tensor carries the samples is known from
    `batch_dim` on, through views, transposes and reshapes, and never guessed. Where a parameter of the bank meets
    samples, its gradient is taken apart by task as it arises, by the kernels of `fastmtl.ops`. The model is not
    changed, and `.grad` of the parameters in the bank is not touched until `bank.apply`.

    Row t is the gradient of task t's part of the loss as written; nothing is renormalised. Terms made of parameters
    alone (weight penalties) go to `.grad`, outside the bank.

    Args:
        model: a module or an iterable of parameters. Those that need a gradient are in the bank, except such as are
            marked by `fastmtl.mark_per_task`.
        task_ids: `[N]` int32 or int64, from 0 to T - 1, or -1: that sample's gradient is added unprojected. Ids on the
            CPU let the block know which tasks are absent without waiting for a device.
        num_tasks: T, 1 to 128 (tasks named "0", "1", ...), or T different names.
        batch_dim: the dimension that carries the samples in tensors from outside: those whose size there is N. Others
            can be named by `bank.samples(x, dim)`, and taken out by `bank.constant(x)`.
        mixing: `"error"`, or `"partition"`: batch norm in training mode is accepted; the rows are then the parts of the
            batch's gradient by samples, not the gradients of the tasks' losses; `cosines()` and `conflicts()` raise.
        fallback: `"error"`, or `"loop"`: parameters of layers that can be followed but not taken apart (LSTM, GRU) get
            their rows by T backward passes on masked losses.
        memory: `"bank"`: T x P; or `"stream"`: the Gram matrix layer by layer as gradients arise, and in `apply` one
            more backward pass with each sample's cotangent scaled by its task's weight. Nothing of size T x P is held,
            there are no rows to look at, and `apply` must be called before the graph is freed.
        check: compare the first step of this model with T backward passes, and raise where a row differs.
        shared: the parameters (or the module) in the bank. The others keep their ordinary gradient in `.grad`: heads
            belong there, whose gradients would change the norms.
        loss_reduction: how each rank's loss was made, under a process group: see docs/distributed.md.
        process_group: the ranks that share a batch.
        bank: the bank of an earlier block, to which the rows are added: gradient accumulation.

    Raises:
        TypeError, ValueError: arguments other than the above; ids out of range on the CPU (on a GPU that can't be seen
            without waiting, and the update is NaN); inside the block, a call in which a parameter of the bank meets
            samples and that can't be followed, naming both; a batch norm in training mode.
        RuntimeError: a block inside another one; `backward` called twice inside one, outside it or through
            `torch.autograd.backward`; a model changed inside it.

    Source: the gradient of a shared weight apart by task is the weight gradient over each task's samples; PCGrad and
    every method of the Gram matrix as in `fastmtl.backward`.

    Example:
        >>> net = torch.nn.Linear(4, 1)
        >>> x, ids = torch.ones(3, 4), torch.tensor([1, 0, 1])
        >>> with one_pass(net, ids, 2) as bank:
        ...     net(x).square().mean().backward()
        >>> bank.apply("pcgrad").weights.shape
        torch.Size([2])
    """

    def __init__(
        self,
        model: Params,
        task_ids: Tensor,
        num_tasks: int | Sequence[str],
        *,
        batch_dim: int = 0,
        mixing: str = "error",
        fallback: str = "error",
        memory: str = "bank",
        check: bool = False,
        shared: Params | None = None,
        loss_reduction: str = "sum",
        process_group: Any = None,
        bank: OnePassBank | None = None,
    ) -> None:
        for argument, value, known in (
            ("mixing", mixing, _MIXING),
            ("fallback", fallback, _FALLBACK),
            ("memory", memory, _MEMORY),
            ("loss_reduction", loss_reduction, _REDUCTION),
        ):
            if value not in known:
                raise ValueError(f"{argument}: expected {known[0]!r} or {known[1]!r}, got {value!r}")
        if isinstance(batch_dim, bool) or not isinstance(batch_dim, int):
            raise TypeError(f"batch_dim: expected an int, got {type(batch_dim).__name__}")
        where = (*(x if isinstance(x, nn.Module) else None for x in (model, shared)), process_group)
        ranks = find_ranks(*where, _CALL)
        if ranks is not None and ranks.sharded:
            raise TypeError(f"{_CALL}: fully_shard modules work with fastmtl.backward and GradientBank")
        if ranks is not None and memory == "stream":
            raise ValueError("memory: 'stream' needs the Gram matrix of the whole batch, which is no sum over ranks")
        names = read_names(num_tasks, "num_tasks")
        params = _read_bank_params(model, shared)
        if ranks is not None:
            ranks.check_params(params, _CALL)
        _check_task_ids(task_ids, len(names))
        if bank is None:
            bank = OnePassBank(params, names)
        else:
            bank._check_same(params, names)
            if memory == "stream":
                raise ValueError("bank: memory='stream' keeps no rows that others could be added to")
        bank._where, bank._loss_reduction = where, loss_reduction
        self._bank = bank
        self._block = Block(
            model, params, bank, task_ids, batch_dim, mixing, fallback, memory, check, told=shared is not None
        )

    def __enter__(self) -> OnePassBank:
        if _active:
            raise RuntimeError("one_pass: already inside a one_pass block; blocks can't be nested")
        self._block.enter()
        self._bank._block = self._block
        _active.append(self._block)
        return self._bank

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _active.remove(self._block)
        self._block.leave()


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
        self._block: Block | None = None
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
        self._filled = self._applied = False

    # --- inside the block

    def samples(self, x: Tensor, dim: int = 0) -> Tensor:
        """Tells that dimension `dim` of `x` carries the samples of the batch, in their order.

        For tensors whose place can't be seen: inputs with the samples elsewhere than in `batch_dim`, results of a
        `torch.autograd.Function`, a scripted module or a call that is not followed.

        Returns:
            `x` itself.

        Raises:
            RuntimeError: outside the block.
            TypeError, ValueError: no tensor; a dimension that it does not have, or of another size than the batch.
                A parameter of the bank that was used on the way to `x` unseen: its gradient would miss the rows.
        """
        follow = self._following("samples")
        x, dim = _read_dim(x, dim)
        if x.shape[dim] != len(follow.samples):
            raise ValueError(
                f"dim: expected a dimension of {len(follow.samples)} samples, got {x.shape[dim]} in {list(x.shape)}"
            )
        self._check_unseen(x)
        follow.mark(x, Tag(SAMPLES, dim, follow.samples))
        follow.seen = True
        return x

    def constant(self, x: Tensor) -> Tensor:
        """Tells that `x` carries no samples, though one of its dimensions has their number.

        Returns:
            `x` itself.

        Raises:
            RuntimeError: outside the block.
            TypeError: no tensor.
            ValueError: it needs a gradient.
        """
        follow = self._following("constant")
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
        if x.requires_grad:
            raise ValueError("x: expected a tensor that needs no gradient")
        follow.mark(x, NAMED)
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
        follow = self._following("summed")
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss: expected a tensor, got {type(loss).__name__}")
        self._check_unseen(loss)
        follow.mark(loss, SUM)
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
        self._following("verify")
        block = self._block
        assert block is not None
        expected = None if task is None else self.names[position(task, self.names)]
        block._check_loss(block.follow.tag(loss), loss)
        stand_ins = list(block.rows.values())
        with block.follow.on():
            found = torch.autograd.grad(loss, stand_ins, retain_graph=True, allow_unused=True)
        owner = expected
        for p, g in zip(block.rows, found, strict=True):
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
    def apply(self, method: str | Weighting = "pcgrad", *, loss_scale: float | Tensor | None = None) -> Surgery:
        """Operates on the rows, accumulates the result into `.grad`, and empties the bank.

        Post-accumulate hooks of the parameters run then, once; their gradient hooks don't run.

        Args:
            method, loss_scale: as for `fastmtl.backward`.

        Returns:
            A `Surgery`, as `fastmtl.backward`. A task without samples is absent; where the ids lie on a device,
            `present` is a `[T]` bool tensor there.

        Raises:
            RuntimeError: no backward pass has filled the bank; a model changed since.
            TypeError, ValueError: as `fastmtl.backward`. Nothing has been written then, and the rows are still there.
        """
        ranks = find_ranks(*self._where, _APPLY)
        with reporting(ranks, _APPLY):
            method = methods.get(method)
            scale = read_loss_scale(loss_scale)
            self._check_filled("apply")
            block = self._block
            assert block is not None
            block.check_model()
        with block.follow.on(False):
            return self._apply(method, scale, block, ranks)

    def _apply(self, method: Weighting, scale: float | Tensor | None, block: Block, ranks: Ranks | None) -> Surgery:
        updates: list[tuple[Tensor, Tensor]]
        if ranks is not None:
            updates, surgery = self._updates_over(ranks, method, scale, block)
        elif self._streamed():
            updates, surgery = self._streamed_updates(method, scale, block)
        elif self._counts is not None:
            common = list(self._rows)
            present = [c > 0 for c in self._counts]
            rows: list[Row] = [
                [self._rows[p][t] for p in common] if here else [None] * len(common) for t, here in enumerate(present)
            ]
            own = dict(self._unprojected)
            updates, surgery = operate(common, rows, own, present, self.names, method, scale, block.ids.device, held=1)
        else:
            updates, surgery = self._updates_on_device(method, scale)
        if self._by_samples:
            surgery = PartitionSurgery(surgery.gram, surgery.weights, surgery.names, surgery.present)
        block.follow.boundaries.clear()
        self.clear()
        self._applied = True
        self._block = None
        write(updates)
        after_accumulation([(p, g) for p, g in dict(updates).items()])
        return surgery

    def _updates_over(
        self, ranks: Ranks, method: Weighting, scale: float | Tensor | None, block: Block
    ) -> tuple[list[tuple[Tensor, Tensor]], Surgery]:
        """Of the whole batch, which the ranks have in parts."""
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
        self._average_others(ranks, counts, totals, block)
        present = (totals[:-1] > 0).tolist()
        common = [p for p in self.params if p in rows_of]
        rows = [[rows_of[p][t] if here else None for p in common] for t, here in enumerate(present)]
        own = {p: self._unprojected[p] for p in self.params if p in self._unprojected}
        return operate(common, rows, own, present, self.names, method, scale, block.ids.device, held=1, ranks=ranks)

    def _average_others(self, ranks: Ranks, counts: Tensor, totals: Tensor, block: Block) -> None:
        """The gradients of parameters outside the bank, which DDP has not reduced inside the block."""
        if not isinstance(block.model, nn.Module):
            return
        others = {p: name for name, p in block.model.named_parameters() if p.requires_grad and p not in self._named}
        uneven = self._loss_reduction == "mean" and bool((counts * ranks.size != totals).any())
        told = torch.tensor([uneven, *(p.grad is not None for p in others)], dtype=torch.int64, device=counts.device)
        ranks.start_sum(told).wait()
        uneven, *reached = told.tolist()
        if uneven and any(reached):
            name = next(name for name, r in zip(others.values(), reached, strict=True) if r)
            raise ValueError(
                f"loss_reduction: expected 'sum' where parameters outside the bank, such as {name!r}, get gradients, "
                "and ranks have unequal numbers of samples of a task: for 'mean' it is not known whose they are"
            )
        held = {p: p.grad for p in others if p.grad is not None}
        slots = [Slot(held, p) for p, here in zip(others, reached, strict=True) if here]
        ranks.average(slots)
        for slot in slots:
            slot.param.grad = held[slot.param]

    def _updates_on_device(
        self, method: Weighting, scale: float | Tensor | None
    ) -> tuple[list[tuple[Tensor, Tensor]], Surgery]:
        """Which tasks are absent is known to the device alone."""
        num_tasks, common = len(self.names), list(self._rows)
        assert self._present is not None
        rows = [self._rows[p][t] for t in range(num_tasks) for p in common]
        index = [k for k, g in enumerate(rows) if g is not None]
        known = Rows([g for g in rows if g is not None], index, num_tasks, len(common))
        with torch.no_grad(), without_autocast(self._present.device.type):
            gram = unscaled(gram_rows(known), scale)
            weights = self._weights(method, gram)
            columns = [torch.empty_like(p) for p in common]
            combine_into(weights, known, columns)
        return [*zip(common, columns, strict=True), *self._unprojected.items()], Surgery(
            gram, weights, self.names, self._present
        )

    def _weights(self, method: Weighting, gram: Tensor) -> Tensor:
        if self._counts is not None:
            if not any(self._counts):
                return torch.zeros(len(self.names), dtype=torch.float64, device=gram.device)
            return methods.solve(method, gram, [c > 0 for c in self._counts])
        assert self._present is not None
        if isinstance(method, methods.Method):
            weights = method.weights(gram, present=self._present)
        else:  # a callable sees the present tasks only, so that the host must know them
            weights = methods.solve(method, gram, self._present.tolist())
        return weights if self._poison is None else weights + self._poison

    def _streamed_updates(
        self, method: Weighting, scale: float | Tensor | None, block: Block
    ) -> tuple[list[tuple[Tensor, Tensor]], Surgery]:
        num_tasks = len(self.names)
        with torch.no_grad():
            if block.gram is None:
                gram = torch.zeros(num_tasks, num_tasks, device=block.ids.device)
            else:
                gram = unscaled(block.gram.to(block.wide), scale)
            weights = self._weights(method, gram)
            # samples of no task count as they are
            found = block.plain(torch.cat([weights, weights.new_ones(1)]), self.params, keep=False)
        present = self._present if self._counts is None else [c > 0 for c in self._counts]
        assert present is not None
        return list(found.items()), Surgery(gram, weights, self.names, present)

    # --- between a block and its bank

    def _keep(self, block: Block) -> None:
        """The rows of a backward pass."""
        num_tasks = len(self.names)
        for p, g in block.received.items():
            self._rows[p] = added(self._rows.get(p), g[:num_tasks])
            extra = g[num_tasks] if block.num_rows > num_tasks else None
            if extra is not None:
                self._unprojected[p] = extra if p not in self._unprojected else self._unprojected[p] + extra

    def _note(self, block: Block) -> None:
        """Which tasks a backward pass had."""
        if block.counts is not None and self._counts is not None:
            self._counts = [a + b for a, b in zip(self._counts, block.counts, strict=True)]
        else:
            now = (block.ids[:, None] == torch.arange(len(self.names), device=block.ids.device)).any(0)
            before = self._present
            if before is None and self._counts is not None and self._filled:
                before = torch.tensor([c > 0 for c in self._counts]).to(now.device)
            self._present = now if before is None else before | now
            self._counts = None
        tally = (block.ids[:, None] == torch.arange(len(self.names) + 1, device=block.ids.device)).sum(0)
        self._tally = tally if self._tally is None else self._tally + tally
        if block.poison is not None:
            self._poison = block.poison if self._poison is None else self._poison + block.poison
        self._by_samples |= block.follow.mixed or block.partition
        self._filled = True

    def _streamed(self) -> bool:
        return self._block is not None and self._block.stream

    def _check_filled(self, call: str) -> None:
        if not self._filled and self._applied:
            raise RuntimeError(f"OnePassBank.{call}: the bank was applied, which empties it: read rows before")
        if not self._filled:
            raise RuntimeError(f"OnePassBank.{call}: no backward pass has filled the bank")

    def _following(self, call: str) -> Follow:
        if self._block is None or self._block not in _active:
            raise RuntimeError(f"OnePassBank.{call}: call it inside the one_pass block")
        return self._block.follow

    def _check_same(self, params: Mapping[Tensor, str], names: Sequence[str]) -> None:
        if self.names != tuple(names):
            raise ValueError(f"bank: expected the tasks {list(names)}, got a bank of {list(self.names)}")
        if len(self.params) != len(params) or any(a is not b for a, b in zip(self.params, params, strict=True)):
            raise ValueError("bank: expected a bank of the same parameters in the same order")

    def _check_unseen(self, x: Tensor) -> None:
        """No parameter may have gone into `x` unseen."""
        todo, seen = [x.grad_fn], {None}
        while todo:
            node = todo.pop()
            if node in seen or isinstance(node, _OURS):
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


class PartitionSurgery(Surgery):
    """A surgery on rows that are parts of a batch's gradient by samples, and no gradients of the tasks' losses."""

    __slots__ = ()

    def _refuse(self, what: str) -> RuntimeError:
        return RuntimeError(
            f"Surgery.{what}: mixing='partition' has rows that are each sample's part of the gradient; tasks whose "
            "samples share batch statistics have no gradients of their own to compare"
        )

    def cosines(self) -> Tensor:
        raise self._refuse("cosines")

    def conflicts(self) -> Tensor:
        raise self._refuse("conflicts")

    def log_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """As of `Surgery`, without what tells of conflicts."""
        norms = self.gram.diagonal().sqrt()
        out = {f"{prefix}grad_norm": self.grad_norm()}
        for t, name in enumerate(self.names):
            out[f"{prefix}weight/{name}"] = self.weights[t]
            out[f"{prefix}norm/{name}"] = norms[t]
        return out


_OURS = tuple(
    f._backward_cls
    for f in vars(_per_task).values()
    if isinstance(f, type) and issubclass(f, torch.autograd.Function) and f is not _per_task.Boundary
)


def _read_bank_params(model: Params, shared: Params | None) -> dict[Tensor, str]:
    named = read_params(model, "model")
    if shared is not None:
        chosen = read_params(shared, "shared")
        check_within(chosen, named)
        named = {p: name for p, name in named.items() if p in chosen}
    params = {p: name.replace("_orig_mod.", "") for p, name in named.items() if p.requires_grad and not is_per_task(p)}
    if not params:
        raise ValueError("model: expected at least one parameter that needs a gradient and is shared, got none")
    first = next(iter(params))
    for p, name in params.items():
        if type(p) is not nn.Parameter and type(p) is not Tensor:
            raise TypeError(
                f"{describe(p, name)}: expected a plain parameter, got {type(p).__name__}; sharded parameters work "
                "with fastmtl.backward and GradientBank (docs/distributed.md)"
            )
        if p.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{describe(p, name)}: expected float64, float32, bfloat16 or float16, got {p.dtype}")
        if p.device != first.device:
            raise ValueError(
                f"{describe(p, name)} is on {p.device}, but {describe(first, params[first])} is on {first.device}: "
                "the parameters in one Gram matrix must be on one device"
            )
    return params


def _check_task_ids(task_ids: Any, num_tasks: int) -> None:
    if not isinstance(task_ids, Tensor):
        raise TypeError(f"task_ids: expected an int64 or int32 tensor, got {type(task_ids).__name__}")
    check_ids(task_ids)
    if task_ids.dim() != 1:
        raise ValueError(f"task_ids: expected shape [N], one task for each sample, got {list(task_ids.shape)}")
    if task_ids.shape[0] == 0:
        raise ValueError("task_ids: expected at least one sample, got none")
    if task_ids.device.type == "cpu" or checking():
        low, high = int(task_ids.min()), int(task_ids.max())
        if low < -1 or high >= num_tasks:
            raise ValueError(f"task_ids: expected -1 (no task) or 0..{num_tasks - 1}, got {low if low < -1 else high}")


def _read_dim(x: Any, dim: Any) -> tuple[Tensor, int]:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim: expected an int, got {type(dim).__name__}")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim: expected a dimension of a tensor of shape {list(x.shape)}, got {dim}")
    return x, dim % x.dim()
