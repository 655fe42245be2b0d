"""TAG's affinity between tasks: how much a step for one task lowers the loss of another."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl import ops
from fastmtl.analysis.grouping import TaskGroups, group_tasks
from fastmtl.core.schemas import without_autocast
from fastmtl.distributed.dtensors import refuse_dtensors
from fastmtl.parameters import Params, read_params
from fastmtl.surgery.result import Surgery
from fastmtl.task_gradients.passes import run_passes
from fastmtl.task_gradients.reach import Losses, Reach, names_of, reach, read_losses
from fastmtl.task_gradients.sharing import check_within, sparse_shared, split_shared

LOOKAHEAD = "lookahead"
FIRST_ORDER = "first order"


class TaskAffinity:
    """Affinities of tasks: what a step of gradient descent for one task does to the loss of another.

    Attributes:
        matrix: `[T, T]` float64 on the CPU. Entry i, j is the share of the loss of task j that a step for task i takes
            away: positive where the step helps task j, negative where it harms it. NaN where one of the two is absent.
        names: the T task names.
        kind: "lookahead" (losses after the step) or "first order" (estimated from inner products of gradients).
        lr: the length of the step in gradients.
    """

    __slots__ = ("kind", "lr", "matrix", "names")

    def __init__(self, matrix: Tensor, names: Sequence[str], kind: str, lr: float) -> None:
        self.matrix = matrix
        self.names = tuple(names)
        self.kind = kind
        self.lr = lr

    @staticmethod
    def mean(affinities: Sequence[TaskAffinity]) -> TaskAffinity:
        """The mean over several batches or steps of a training, as the paper takes it.

        Each entry is the mean of where it is known: batches in which a task is absent do not count for it. `lr` is the
        mean, too.

        Raises:
            ValueError: none are given; names or kinds differ.
        """
        found = list(affinities)
        if not found:
            raise ValueError("affinities: expected at least one, got none")
        for other in found:
            if other.names != found[0].names:
                raise ValueError(f"affinities: expected the same tasks, got {found[0].names} and {other.names}")
            if other.kind != found[0].kind:
                raise ValueError(f"affinities: expected one kind, got {found[0].kind!r} and {other.kind!r}")
        matrix = torch.stack([a.matrix for a in found]).nanmean(0)
        return TaskAffinity(matrix, found[0].names, found[0].kind, sum(a.lr for a in found) / len(found))

    def groups(self, count: int, *, alone: float | None = None) -> TaskGroups:
        """At most `count` groups of tasks to train together: `group_tasks` of the matrix, which says how."""
        return group_tasks(self.matrix, count, names=self.names, alone=alone)

    def plot(self, ax: Any = None) -> Any:
        """A heat map in matplotlib: rows are the tasks that take the step, columns those that feel it.

        The diagonal, which is larger than the rest, is not coloured. Blue helps, red harms.

        Args:
            ax: matplotlib axes; None: a figure of its own.

        Returns:
            The axes.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        if ax is None:
            from matplotlib import pyplot

            ax = pyplot.subplots(figsize=(2 + 0.7 * len(self.names), 1.5 + 0.7 * len(self.names)), layout="tight")[1]
        others = self.matrix.clone().fill_diagonal_(float("nan"))
        largest = float(others.abs().nan_to_num(nan=0.0).max())
        drawn = ax.imshow(others.numpy(), cmap="RdBu", vmin=-largest or -1.0, vmax=largest or 1.0)
        for i, row in enumerate(self.matrix.tolist()):
            for j, value in enumerate(row):
                color = "white" if i != j and abs(value) > 0.6 * largest else "black"
                text = "" if math.isnan(value) else f"{value:.2g}"
                ax.text(j, i, text, ha="center", va="center", fontsize="small", color=color)
        ax.set_xticks(range(len(self.names)), self.names, rotation=45, ha="right")
        ax.set_yticks(range(len(self.names)), self.names)
        ax.set(xlabel="what happens to the loss of", ylabel="a step for", title=f"affinity ({self.kind})")
        ax.figure.colorbar(drawn, ax=ax, shrink=0.8)
        return ax

    def __repr__(self) -> str:
        return f"TaskAffinity({self.kind}, {', '.join(self.names)})"


def task_affinity(
    losses: Callable[[], Losses], params: Params | None = None, *, shared: Params | None = None, lr: float
) -> TaskAffinity:
    """TAG's affinity of each task to each other, by lookahead.

    The shared parameters take a step for task i alone, all losses are computed there, and the step is taken back:
    entry i, j is `1 - L_j(theta - lr g_i) / L_j(theta)`. Parameters that are not shared stay as they are. That is one
    forward and one backward pass of all tasks, and a forward pass more for each task.

    Args:
        losses: computes the losses of one batch, as `backward` takes them: a dict name -> scalar, or a sequence; None
            where a task is absent. It is called once for the gradients, and once more for each present task, without
            autograd's graph.
        params: the parameters to look at, a module or an iterable. None: all that the losses reach.
        shared: those of them that the tasks share, where reach does not say it, as for `backward`.
        lr: the length of the step in gradients, such as the learning rate of the training. The step is a plain one,
            without momentum, as in the paper.

    Returns:
        A `TaskAffinity` of kind "lookahead".

    Raises:
        TypeError: `losses` is not callable, or returns no losses; parameters that `backward` refuses, or that lie on
            several ranks.
        ValueError: `lr` is not positive; nothing is shared; a loss that is not positive (the affinity is a share of
            it); losses whose names change from call to call; reach that can't be read without `shared`.

    Parameters come back bit for bit from a copy, also when `losses` raises. Every call draws the same random numbers
    (dropout). Buffers of `params`, where it is a module (the statistics of batch norm), and the state of torch's
    generators are left as one call leaves them. No `.grad` is touched. Waits for the
    device. Memory:
    T gradients and a copy of the shared parameters. The affinity of this process's batch: ranks that want that of all
    average their matrices.

    Source: Fifty, Amid, Zhao, Yu, Anil, Finn 2021, *Efficiently Identifying Task Groupings for Multi-Task Learning*,
    section 3.1.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> task_affinity(lambda: {"a": (w**2).sum(), "b": ((w - 3) ** 2).sum()}, lr=0.1).matrix
        tensor([[ 0.3600, -0.2100],
                [-0.9600,  0.3600]], dtype=torch.float64)
    """
    if not callable(losses):
        raise TypeError(f"losses: expected a function that computes them, got {type(losses).__name__}")
    lr = _read_lr(lr)
    named = None if params is None else read_params(params, "params")
    replay = _Replay(losses, list(params.buffers()) if isinstance(params, nn.Module) else [])
    names, tasks = read_losses(replay.first())
    present = [loss is not None for loss in tasks]
    found = reach(tasks)
    chosen, named = _shared_of(found, names, named, shared)
    before = _values(tasks)
    _check_positive(before, names)
    rows: list[list[Tensor | None]] = [[None] * len(chosen) for _ in tasks]
    slots = {p: i for i, p in enumerate(chosen)}
    for t, grads in run_passes(tasks, {p: found.leaves[p] for p in chosen}, found.overlap, False, 1, found.donated):
        for p, g in grads:
            if g is not None and g.layout is not torch.strided:
                raise sparse_shared(g.layout, p, named)
            rows[t][slots[p]] = g
    del tasks, found  # and the graphs with them
    point = [p.detach() for p in chosen]
    start = [p.clone() for p in point]
    weights = torch.tensor([1.0, -lr], dtype=torch.float64).to(point[0].device)
    after = []
    with torch.no_grad():
        try:
            for row, here in zip(rows, present, strict=True):
                if not here:
                    after.append(torch.full_like(before, float("nan")))
                    continue
                with without_autocast(point[0].device.type):
                    ops.combine(weights, [start, row], out=point)
                after.append(_values(replay.again(names, present)))
        finally:
            for p, value in zip(point, start, strict=True):
                p.copy_(value)
            replay.finish()
    return TaskAffinity((1 - torch.stack(after) / before).cpu(), names, LOOKAHEAD, lr)


def first_order_affinity(
    gram: Tensor | Surgery, losses: Losses | Sequence[float], *, lr: float, names: Sequence[str] | None = None
) -> TaskAffinity:
    """The affinity to first order in the step: `lr <g_i, g_j> / L_j`, from the Gram matrix alone.

    No further forward pass is needed, so that it can be had from the `Surgery` of any training step. It is what
    `task_affinity` comes to for small steps. With a curved loss and the step of a training the two differ, also in
    sign: a lookahead sees the curvature, inner products do not.

    Args:
        gram: the Gram matrix `[T, T]` of the shared parameters' gradients, or the `Surgery` that holds it.
        losses: T losses, as tensors or numbers, in a sequence, a tensor or a dict; None where a task is absent. Without
            a loss scale, as the Gram matrix is.
        lr: the length of the step in gradients.
        names: T task names. None: those of the surgery or the dict, else "0", "1", ...

    Returns:
        A `TaskAffinity` of kind "first order".

    Raises:
        TypeError: `gram` is neither.
        ValueError: `lr` is not positive; shapes that do not agree; a loss that is not positive.

    Source: the expansion of the affinity of Fifty et al. 2021, section 3.1, in the step; not their method.

    Example:
        >>> first_order_affinity(torch.tensor([[4.0, -1.0], [-1.0, 1.0]]), [2.0, 0.5], lr=0.1).matrix
        tensor([[ 0.2000, -0.2000],
                [-0.0500,  0.2000]], dtype=torch.float64)
    """
    lr = _read_lr(lr)
    if isinstance(gram, Surgery):
        if gram.reused:
            raise ValueError("gram: a step that reused weights has no Gram matrix: take one that did not")
        names = gram.names if names is None else names
        gram = gram.gram
    if not isinstance(gram, Tensor):
        raise TypeError(f"gram: expected a Gram matrix or a Surgery, got {type(gram).__name__}")
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"gram: expected shape [T, T], got {list(gram.shape)}")
    if isinstance(losses, Mapping):
        names = [str(name) for name in losses] if names is None else names
        losses = list(losses.values())
    values = _values([None if x is None else torch.as_tensor(x) for x in losses])
    count = gram.shape[0]
    if len(values) != count:
        raise ValueError(f"losses: expected {count} as the Gram matrix has rows, got {len(values)}")
    names = [str(t) for t in range(count)] if names is None else list(names)
    if len(names) != count:
        raise ValueError(f"names: expected {count} as the Gram matrix has rows, got {len(names)}")
    _check_positive(values, names)
    matrix = lr * gram.detach().to("cpu", torch.float64) / values.cpu()
    matrix[values.cpu().isnan()] = float("nan")  # its column is already
    return TaskAffinity(matrix, names, FIRST_ORDER, lr)


def _read_lr(lr: float) -> float:
    if isinstance(lr, bool) or not isinstance(lr, (int, float)):
        raise TypeError(f"lr: expected a number, got {type(lr).__name__}")
    if not 0 < lr < float("inf"):
        raise ValueError(f"lr: expected a positive finite number, got {lr}")
    return float(lr)


def _shared_of(
    found: Reach, names: Sequence[str], named: Mapping[Tensor, str] | None, shared: Params | None
) -> tuple[list[Tensor], Mapping[Tensor, str]]:
    """The shared parameters, and what errors call each parameter."""
    shared_named = None if shared is None else read_params(shared, "shared")
    untold = found.compiled or found.entangled or found.joined
    if shared is None and untold:
        raise ValueError(
            f"losses {names_of(untold, names)} do not tell what each of them reaches (a compiled graph, or elements of "
            "one tensor): pass shared=, the parameters (or the module) that the tasks share"
        )
    if named is None:
        leaves = [p for p in found.leaves if isinstance(p, nn.Parameter)] or list(found.leaves)
        named = {p: f"{i} (of those that the losses reach)" for i, p in enumerate(leaves)} | (shared_named or {})
    if shared_named is not None:
        check_within(shared_named, named)
    refuse_dtensors(named, "fastmtl.analysis.task_affinity")
    chosen = split_shared({p: found.leaves[p] for p in named if p in found.leaves}, named, shared_named)
    if not chosen:
        raise ValueError("params: no parameter is reached by two losses, so that no task can feel the step of another")
    return chosen, named


class _Replay:
    """Calls a function again and again with the random numbers and the buffers that its first call met."""

    def __init__(self, losses: Callable[[], Losses], buffers: Sequence[Tensor]) -> None:
        self._losses, self._buffers = losses, buffers
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        self._met = [b.detach().clone() for b in buffers]

    def first(self) -> Losses:
        with torch.enable_grad():
            losses = self._losses()
        self._left = [b.detach().clone() for b in self._buffers]
        return losses

    def again(self, names: Sequence[str], present: Sequence[bool]) -> list[Tensor | None]:
        """The losses, without a graph, checked against what the first call gave."""
        self._write(self._met)
        with torch.random.fork_rng(range(len(self._cuda))):
            torch.set_rng_state(self._cpu)
            if self._cuda:
                torch.cuda.set_rng_state_all(self._cuda)
            losses = self._losses()
        if isinstance(losses, Mapping):
            found = {str(name): loss for name, loss in losses.items()}
        else:
            found = {str(t): loss for t, loss in enumerate(losses)}
        if list(found) != list(names) or [loss is not None for loss in found.values()] != list(present):
            raise ValueError(
                f"losses: expected those of the first call, {list(names)}, got {list(found)} or others absent"
            )
        return list(found.values())

    def finish(self) -> None:
        """Leaves the buffers as the first call did."""
        self._write(self._left)

    def _write(self, values: Sequence[Tensor]) -> None:
        for buffer, value in zip(self._buffers, values, strict=True):
            buffer.copy_(value)


def _values(losses: Sequence[Tensor | None]) -> Tensor:
    """`[T]` float64 on their device, NaN where absent."""
    device = next((loss.device for loss in losses if loss is not None), torch.device("cpu"))
    absent = torch.full((), float("nan"), dtype=torch.float64, device=device)
    return torch.stack([absent if loss is None else loss.detach().to(device, torch.float64) for loss in losses])


def _check_positive(values: Tensor, names: Sequence[str]) -> None:
    for name, value in zip(names, values.tolist(), strict=True):
        if value <= 0:
            raise ValueError(f"loss {name!r}: expected a positive number, of which an affinity is a share, got {value}")
