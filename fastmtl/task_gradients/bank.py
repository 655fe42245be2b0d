"""`GradientBank`: collects task gradients over several backward passes, and operates on them once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl import methods
from fastmtl.core.gradient_rows import MAX_TASKS
from fastmtl.core.memory import has_other_holders
from fastmtl.distributed.dtensors import local, refuse_dtensors
from fastmtl.distributed.ranks import SAME_PASSES, Ranks, reporting, statement_of
from fastmtl.distributed.wrappers import check_reduces, find_ranks
from fastmtl.methods import Weighting
from fastmtl.ops.gradients.arguments import check_num_tasks
from fastmtl.parameters import Params, compiled_module, is_per_task, read_params
from fastmtl.surgery.accumulate import accumulate
from fastmtl.surgery.result import Surgery
from fastmtl.surgery.solve import SurgeryOptions, solve
from fastmtl.surgery.task_gradients import Row, TaskGradients
from fastmtl.task_gradients.rank_means import averaged, of_shards
from fastmtl.task_gradients.reach import LossValues, read_loss_scale, read_loss_values
from fastmtl.task_gradients.sharing import add_unshared, check_within, sparse_shared, split_shared

_APPLY = "GradientBank.apply"


class GradientBank:
    """Rows of task gradients for loops that run one forward per task, or that accumulate micro-batches.

    `with bank.task(t): loss.backward()` sets every `.grad` aside, keeps what autograd leaves there as row t and
    puts `.grad` back. No graph is retained and nothing is copied. A second visit of a task adds to its row.
    `apply` operates once on the task gradients, adds the result to `.grad` and empties the bank. (One `backward`
    per micro-batch is a different algorithm: it operates on each micro-batch alone.)

    Attributes:
        params: the parameters that the bank looks at, each once.
        names: the T task names.

    Args:
        params: a module or an iterable of parameters. Gradients of others are left alone.
        num_tasks_or_names: T, 1 to 128 (tasks named "0", "1", ...), or T different names.
        shared: the shared ones among `params`; all others get the plain sum of their gradients. None: those that
            two or more tasks reach. Needed where `params` is, or contains, a compiled module, whose backward leaves
            zeros for heads that a loss never touched; if `params` is an iterable this can't be seen.
            Parameters marked by `fastmtl.mark_per_task` are never shared.
        process_group: the ranks whose gradients are averaged at `apply`, whatever `params` is. None: those of the
            `DistributedDataParallel` or `fully_shard` module that `params` is or contains; else this process alone.

    Raises:
        TypeError: `params`, `shared`, `num_tasks_or_names` or `process_group` of another type; tensor-parallel
            parameters.
        ValueError: no parameter, one that is not a leaf, `shared` not within `params`, a compiled module without
            `shared`, no task, more than 128, equal names; a `process_group` without this rank, or for a `fully_shard`
            module.
        RuntimeError: several ranks, and neither `params` nor `process_group` says what to do.

    With several ranks (docs/guides/distributed.md): under DDP run the backward passes in `no_sync()`, as what they
    reduce is reduced again. Every row becomes its mean over the ranks at `apply`, once, whether DDP has reduced it or
    not. A task that some rank visited is present on all.

    Example:
        >>> net = torch.nn.Linear(4, 2)
        >>> bank = GradientBank(net, ["left", "right"], shared=net)
        >>> for i, task in enumerate(bank.names):
        ...     with bank.task(task):
        ...         net(torch.ones(3, 4))[:, i].mean().backward()
        >>> bank.apply("sum").weights
        tensor([1., 1.], dtype=torch.float64)
    """

    def __init__(
        self,
        params: Params,
        num_tasks_or_names: int | Sequence[str],
        *,
        shared: Params | None = None,
        process_group: Any = None,
    ) -> None:
        # modules alone can say which ranks there are; an iterable may be used up
        self._modules = [x if isinstance(x, nn.Module) else None for x in (params, shared)]
        self._process_group = process_group
        ranks = self._ranks("fastmtl.GradientBank")
        self._named = read_params(params, "params")
        self._shared = None if shared is None else read_params(shared, "shared")
        if ranks is not None:
            self._named = ranks.rename(self._named)
            self._shared = self._shared and ranks.rename(self._shared)
            ranks.check_params(self._named, "fastmtl.GradientBank")
        else:
            refuse_dtensors(self._named, "fastmtl.GradientBank")
        self.params = list(self._named)
        if self._shared is not None:
            check_within(self._shared, self._named)
        elif isinstance(params, nn.Module) and (name := compiled_module(params)) is not None:
            raise ValueError(
                f"params: module {name!r} is compiled, and leaves zero gradients where a loss reaches nothing: pass "
                "shared=, the parameters (or the module) that the tasks share"
            )
        self.names = read_names(num_tasks_or_names, "num_tasks_or_names")
        self._active = False
        self.clear()

    def _ranks(self, call: str) -> Ranks | None:
        return find_ranks(*self._modules, self._process_group, call)

    def clear(self) -> None:
        """Forgets every row."""
        self._rows: list[dict[Tensor, Tensor]] = [{} for _ in self.names]
        self._unshared: dict[Tensor, Tensor] = {}
        self._present = [False] * len(self.names)

    @contextlib.contextmanager
    def task(self, task: int | str) -> Iterator[None]:
        """Gradients that autograd leaves inside the block become, or are added to, this task's row.

        A task whose visits leave no gradient at all is absent. On an exception `.grad` is restored and this
        visit's gradients are dropped. `zero_grad()` before the backward pass is harmless.

        Args:
            task: position 0..T-1, or name.

        Raises:
            TypeError, ValueError: no such task.
            RuntimeError: inside another task of this bank; a `fully_shard` module that did not reduce its gradients.
        """
        t = position(task, self.names)
        if self._active:
            raise RuntimeError("GradientBank.task: already inside a task of this bank; tasks can't be nested")
        self._active = True
        # DDP's next backward pass writes into its buckets, of which gradients may be views
        aside = [g.clone() if (g := p.grad) is not None and _in_a_bucket(g) else g for p in self.params]
        for p in self.params:
            p.grad = None
        try:
            yield
            check_reduces([m for m in self._modules if m is not None], "GradientBank.task")
            visit = [(p, p.grad) for p in self.params if p.grad is not None]
        finally:
            for p, g in zip(self.params, aside, strict=True):
                p.grad = g
            self._active = False
        self._keep(t, visit)

    def _keep(self, t: int, visit: Sequence[tuple[Tensor, Tensor]]) -> None:
        row = self._rows[t]
        for p, g in visit:
            self._present[t] = True
            # create_graph=True leaves gradients with a graph
            g = g.detach().clone() if _in_a_bucket(g) else g.detach()
            if is_per_task(p) or (self._shared is not None and p not in self._shared):
                add_unshared(self._unshared, p, g)
            elif p not in row:
                row[p] = g
            elif row[p].layout is torch.strided:
                row[p].add_(g)
            else:
                add_unshared(row, p, g)

    def row(self, task: int | str) -> list[Tensor | None]:
        """Task t's gradients as collected so far, aligned with `params`, before any mean over ranks.

        None: the task did not reach it; or it is marked as a task's own or not in `shared`, and so in no row. The
        tensors are the bank's own: read them, and copy what is to outlast `apply` or a further visit.

        Args:
            task: position 0..T-1, or name.

        Raises:
            TypeError, ValueError: no such task.
            RuntimeError: inside a task of this bank, whose gradients are not collected yet; or nothing was collected
                since the bank was made or applied.

        Example:
            >>> net = torch.nn.Linear(2, 1, bias=False)
            >>> bank = GradientBank(net, 2)
            >>> with bank.task(1):
            ...     net(torch.ones(1, 2)).sum().backward()
            >>> bank.row(0), bank.row(1)
            ([None], [tensor([[1., 1.]])])
        """
        row = self._rows[position(task, self.names)]
        if self._active:
            raise RuntimeError("GradientBank.row: inside a task of this bank: its gradients are collected when it ends")
        if not any(self._present):
            raise RuntimeError(
                "GradientBank.row: no gradient was collected since the bank was made or applied, which empties it: "
                "read rows before"
            )
        return [row.get(p) for p in self.params]

    @torch._disable_dynamo
    def apply(
        self,
        method: str | Weighting = "pcgrad",
        *,
        loss_scale: float | Tensor | None = None,
        losses: LossValues | None = None,
        second: GradientBank | None = None,
    ) -> Surgery:
        """Operates on the collected task gradients, accumulates the result into `.grad`, and empties the bank.

        Args:
            method: as for `fastmtl.backward`.
            loss_scale: as for `fastmtl.backward`.
            losses: for a method that needs them: the tasks' losses, in order, or a dict by name, as their gradients
                were collected: multiplied by `loss_scale`, where that is given. Scalar tensors on any device or
                numbers, None where absent.
            second: for a method that needs one: another bank of the same parameters and tasks, filled from a second,
                independent batch. Its gradients enter the method's Gram matrices and nothing else, and it is emptied,
                too. At most 64 tasks.

        Returns:
            A `Surgery`, as `fastmtl.backward`. A task that was not visited is absent.

        Raises:
            RuntimeError: nothing was collected (on any rank), or a call inside a task; another rank raised.
            TypeError, ValueError: as `fastmtl.backward`; a method that needs losses or a second batch without them; a
                second bank that is not of the same parameters and tasks. Nothing has been written then, and they are
                still there.
        """
        ranks = self._ranks(_APPLY)
        num_tasks = len(self.names)
        with reporting(ranks, _APPLY):
            if self._active:
                raise RuntimeError("GradientBank.apply: called inside a task of this bank")
            method = methods.for_one_call(method)
            scale = read_loss_scale(loss_scale)
            self._check_second(second, method)
            values = read_loss_values(losses, self.names, self._present, method, _APPLY)
        held = self._rows if second is None else [*self._rows, *second._rows]
        masks = dict.fromkeys(self.params, 0)
        for t, row in enumerate(held):
            for p in row:
                masks[p] |= 1 << t
        present = self._present
        if ranks is not None:
            names = [*self.names, *(f"second {name}" for name in self.names)][: len(held)]
            mine = statement_of(
                _APPLY,
                names,
                method,
                self._named,
                self._shared,
                present if second is None else [*present, *second._present],
                masks,
                [*self._rows, self._unshared],
            )
            joint = ranks.meet(mine, self._named, same=SAME_PASSES if ranks.sharded else None)
            joint = joint._replace(present=joint.present[:num_tasks])
            masks, present = joint.masks, joint.present
        # what a second batch alone reaches gets nothing
        masks = {p: mask & ((1 << num_tasks) - 1) for p, mask in masks.items()}
        reached = {
            p: mask for p, mask in masks.items() if mask or (p in self._unshared if ranks is None else joint.kinds[p])
        }
        if not any(present):
            raise RuntimeError("GradientBank.apply: no gradient was collected since the bank was made or applied")
        shared = split_shared(reached, self._named, self._shared)
        device = next(iter(reached)).device
        unshared = dict(self._unshared)
        if ranks is not None and not ranks.sharded:
            # if the method raises, the means stand where the gradients were; those of means are the same
            gradients = averaged(ranks, joint, shared, held, unshared, self._named, self.names, device, references=1)
        else:
            gradients = self._collected(held, shared, unshared, present, device, sharded=ranks is not None)
        updates, surgery = solve(gradients, SurgeryOptions(method, scale, ranks, values))
        self.clear()
        if second is not None:
            second.clear()
        # hooks ran in each backward pass
        accumulate(updates, run_hooks=False)
        return surgery

    def _check_second(self, second: GradientBank | None, method: Weighting) -> None:
        if second is None:
            methods.check_needs(method, _APPLY, {"second_batch": "pass second=, a bank that was filled from it"})
            return
        if not isinstance(second, GradientBank):
            raise TypeError(f"second: expected a GradientBank or None, got {type(second).__name__}")
        if "second_batch" not in methods.needs_of(method):
            raise ValueError(f"second: method {method!r} takes no second batch")
        if second is self:
            raise ValueError("second: expected another bank than the one that is applied")
        if second._active:
            raise RuntimeError("GradientBank.apply: called inside a task of the second bank")
        if second.names != self.names:
            raise ValueError(f"second: expected a bank of the tasks {list(self.names)}, got {list(second.names)}")
        if len(second.params) != len(self.params) or any(
            a is not b for a, b in zip(second.params, self.params, strict=True)
        ):
            raise ValueError("second: expected a bank of the same parameters in the same order")
        if 2 * len(self.names) > MAX_TASKS:
            raise ValueError(f"second: expected at most {MAX_TASKS // 2} tasks, got {len(self.names)}")
        for name, here, there in zip(self.names, self._present, second._present, strict=True):
            if here != there:
                has, lacks = ("the bank", "the second") if here else ("the second bank", "the first")
                raise ValueError(f"second: task {name!r} has gradients in {has} and none in {lacks}")

    def _collected(
        self,
        held: Sequence[dict[Tensor, Tensor]],
        shared: Sequence[Tensor],
        unshared: dict[Tensor, Tensor],
        present: Sequence[bool],
        device: torch.device,
        *,
        sharded: bool,
    ) -> TaskGradients:
        """The task gradients of this process, or its shards of them; all others go to `unshared`."""
        is_shared = set(shared)
        for t, row in enumerate(held):
            for p, g in row.items():
                if p not in is_shared:
                    if t < len(self.names):  # of a second batch nothing else is wanted
                        add_unshared(unshared, p, g)
                elif g.layout is not torch.strided:
                    raise sparse_shared(g.layout, p, self._named)
        rows: list[Row] = [[row.get(p) for p in shared] for row in held]
        if not sharded:
            return TaskGradients(shared, rows, unshared, self.names, present, device, references=1)
        rows = [[None if g is None else local(g) for g in row] for row in rows]
        unshared = {p: local(g) for p, g in unshared.items()}
        return of_shards(shared, rows, unshared, self.names, present, device, references=1)

    def __repr__(self) -> str:
        seen = [name for name, here in zip(self.names, self._present, strict=True) if here]
        return f"GradientBank({len(self.params)} parameters, {len(self.names)} tasks, collected: {seen})"


def _in_a_bucket(grad: Tensor) -> bool:
    """Whether DDP may write into this gradient's memory (`gradient_as_bucket_view=True`)."""
    return torch.distributed.is_available() and torch.distributed.is_initialized() and has_other_holders(grad)


def read_names(num_tasks_or_names: int | Sequence[str], argument: str) -> tuple[str, ...]:
    if isinstance(num_tasks_or_names, int) and not isinstance(num_tasks_or_names, bool):
        check_num_tasks(num_tasks_or_names, argument)
        return tuple(str(t) for t in range(num_tasks_or_names))
    if isinstance(num_tasks_or_names, (str, bytes, bool)) or not isinstance(num_tasks_or_names, Sequence):
        raise TypeError(f"{argument}: expected a number or names, got {type(num_tasks_or_names).__name__}")
    check_num_tasks(len(num_tasks_or_names), argument)
    for name in num_tasks_or_names:
        if not isinstance(name, str):
            raise TypeError(f"{argument}: expected names, got {type(name).__name__}")
    if len(set(num_tasks_or_names)) != len(num_tasks_or_names):
        raise ValueError(f"{argument}: expected different names, got {list(num_tasks_or_names)}")
    return tuple(num_tasks_or_names)


def position(task: int | str, names: tuple[str, ...]) -> int:
    """A task's position, checked."""
    if isinstance(task, str):
        if task not in names:
            raise ValueError(f"task: expected one of {', '.join(names)}, got {task!r}")
        return names.index(task)
    if isinstance(task, bool) or not isinstance(task, int):
        raise TypeError(f"task: expected a position or a name, got {type(task).__name__}")
    if not 0 <= task < len(names):
        raise ValueError(f"task: expected 0..{len(names) - 1}, got {task}")
    return task
