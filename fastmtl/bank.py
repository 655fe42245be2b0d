"""`GradientBank`: collects task gradients over several backward passes, and operates on them once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl import methods
from fastmtl._graph import read_loss_scale
from fastmtl._marks import Params, compiled_module, is_per_task, read_params
from fastmtl.methods import Weighting
from fastmtl.ops._rows import check_num_tasks
from fastmtl.surgery import (
    Row,
    Surgery,
    add_own,
    check_single_process,
    check_within,
    operate,
    sparse_shared,
    split_shared,
    write,
)


class GradientBank:
    """Rows of task gradients for loops that run one forward per task, or that accumulate micro-batches.

    `with bank.task(t): loss.backward()` sets every `.grad` aside, keeps what autograd leaves there as row t and
    puts `.grad` back. No graph is retained and nothing is copied. A second visit of a task adds to its row.
    `apply` operates once on the accumulated rows, adds the result to `.grad` and empties the bank. (One `backward`
    per micro-batch is a different algorithm: it operates on each micro-batch alone.)

    Args:
        params: a module or an iterable of parameters. Gradients of others are left alone.
        num_tasks_or_names: T, 1 to 128 (tasks named "0", "1", ...), or T different names.
        shared: the shared ones among `params`; all others get the plain sum of their gradients. None: those that
            two or more tasks reach. Needed where `params` is, or contains, a compiled module, whose backward leaves
            zeros for heads that a loss never touched; if `params` is an iterable this can't be seen.
            Parameters marked by `fastmtl.mark_per_task` are never shared.
        process_group: not available yet.

    Raises:
        TypeError: `params`, `shared` or `num_tasks_or_names` of another type.
        ValueError: no parameter, one that is not a leaf, `shared` not within `params`, a compiled module without
            `shared`, no task, more than 128, equal names.
        RuntimeError: in a process group of several ranks, which would silently diverge.

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
        if process_group is not None:
            raise NotImplementedError("fastmtl.GradientBank: process_group is not available yet")
        check_single_process()
        self._named = read_params(params, "params")
        self._params = list(self._named)
        self._shared = None if shared is None else read_params(shared, "shared")
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

    def clear(self) -> None:
        """Forgets every row."""
        self._rows: list[dict[Tensor, Tensor]] = [{} for _ in self.names]
        self._own: dict[Tensor, Tensor] = {}
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
            RuntimeError: inside another task of this bank.
        """
        t = position(task, self.names)
        if self._active:
            raise RuntimeError("GradientBank.task: already inside a task of this bank; tasks can't be nested")
        self._active = True
        aside = [p.grad for p in self._params]
        for p in self._params:
            p.grad = None
        try:
            yield
            visit = [(p, p.grad) for p in self._params if p.grad is not None]
        finally:
            for p, g in zip(self._params, aside, strict=True):
                p.grad = g
            self._active = False
        self._keep(t, visit)

    def _keep(self, t: int, visit: Sequence[tuple[Tensor, Tensor]]) -> None:
        row = self._rows[t]
        for p, g in visit:
            self._present[t] = True
            g = g.detach()  # create_graph=True leaves gradients with a graph
            if is_per_task(p) or (self._shared is not None and p not in self._shared):
                add_own(self._own, p, g)
            elif p not in row:
                row[p] = g
            elif row[p].layout is torch.strided:
                row[p].add_(g)
            else:
                add_own(row, p, g)

    @torch._disable_dynamo
    def apply(self, method: str | Weighting = "pcgrad", *, loss_scale: float | Tensor | None = None) -> Surgery:
        """Operates on the collected rows, accumulates the result into `.grad`, and empties the bank.

        Args:
            method, loss_scale: as for `fastmtl.backward`.

        Returns:
            A `Surgery`, as `fastmtl.backward`. A task that was not visited is absent.

        Raises:
            RuntimeError: nothing was collected, or a call inside a task.
            TypeError, ValueError: as `fastmtl.backward`. Nothing has been written then, and the rows are still there.
        """
        if self._active:
            raise RuntimeError("GradientBank.apply: called inside a task of this bank")
        check_single_process()
        method = methods.get(method)
        scale = read_loss_scale(loss_scale)
        if not any(self._present):
            raise RuntimeError("GradientBank.apply: no gradient was collected since the bank was made or applied")
        reached = dict.fromkeys(self._params, 0)
        for t, row in enumerate(self._rows):
            for p in row:
                reached[p] |= 1 << t
        reached = {p: mask for p, mask in reached.items() if mask or p in self._own}
        common = split_shared(reached, self._named, self._shared)
        own = dict(self._own)
        in_common = set(common)
        for row in self._rows:
            for p, g in row.items():
                if p not in in_common:
                    add_own(own, p, g)
                elif g.layout is not torch.strided:
                    raise sparse_shared(g, p, self._named)
        rows: list[Row] = [[row.get(p) for p in common] for row in self._rows]
        device = next(iter(reached)).device
        updates, surgery = operate(common, rows, own, self._present, self.names, method, scale, device, held=1)
        self.clear()
        write(updates)
        return surgery

    def __repr__(self) -> str:
        seen = [name for name, here in zip(self.names, self._present, strict=True) if here]
        return f"GradientBank({len(self._params)} parameters, {len(self.names)} tasks, collected: {seen})"


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
