"""The tasks of a batch, told to every layer of a network from outside its `forward`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from fastmtl.ops import TaskPlan, task_plan
from fastmtl.ops.task_weights.arguments import check_ids

# process-wide: the recomputation of a checkpoint runs on autograd's threads
_entered: list[tasks] = []
# the innermost one under a name of its own: a compiled graph then does not depend on how many are around it
_current: tasks | None = None


class tasks:
    """Tells every `TaskConv2d` and `TaskLinear` that runs inside the `with` block the tasks of its batch.

    It holds for the whole process, in every thread. The innermost block counts; the outer one holds again
    when it ends, whatever ends it. The batch is sorted once per number of tasks and block. What a forward pass has seen
    is saved for its backward pass, which may run after the block; a checkpoint that recomputes its forward then must
    know the tasks again: see `checkpoint_contexts`. Under `torch.compile` the sort is part of the graph, unless a
    `TaskPlan` is given; new ids don't compile again.

    Args:
        task_ids: `[N]` int32 or int64, the task of each sample, from 0 to T - 1; `[N, L]` for packed sequences in
            linear layers; or a `TaskPlan`, for a network whose layers all have the same number of tasks.

    Raises:
        TypeError: ids that are neither int32 nor int64, nor a plan.

    Example:
        >>> layer = TaskLinear(2, 1, ["left", "right"], bias=False)
        >>> with tasks(torch.tensor([1, 0, 1])):
        ...     y = layer(torch.ones(3, 2))
        >>> y.shape
        torch.Size([3, 1])
    """

    def __init__(self, task_ids: Tensor | TaskPlan) -> None:
        check_ids(task_ids)
        self.task_ids = task_ids
        self._plans: dict[tuple[int, int, bool], TaskPlan] = {}

    def __enter__(self) -> tasks:
        _entered.append(self)
        _set_current()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # the last entry of this very object: blocks of generators and threads may end out of turn
        for k in range(len(_entered) - 1, -1, -1):
            if _entered[k] is self:
                del _entered[k]
                break
        if not any(other is self for other in _entered):
            self._plans.clear()
        _set_current()

    def plan(self, num_tasks: int) -> TaskPlan:
        """The batch sorted by task, for layers of `num_tasks` tasks."""
        ids = self.task_ids
        if isinstance(ids, TaskPlan):
            return ids
        if torch.compiler.is_compiling():
            # a graph that wrote into this object would hold another guard for its second call
            return task_plan(ids, num_tasks)
        # ids may be rewritten in place; and what is sorted while a CUDA graph is captured has no values yet
        version = 0 if ids.is_inference() else ids._version
        key = num_tasks, version, ids.is_cuda and torch.cuda.is_current_stream_capturing()
        plan = self._plans.get(key)
        if plan is None:
            # made in inference mode it could not be saved for a backward pass of the same block
            with torch.inference_mode(False):
                plan = self._plans[key] = task_plan(ids, num_tasks)
        return plan


def _set_current() -> None:
    global _current
    _current = _entered[-1] if _entered else None


def current_plan(num_tasks: int, layer: str) -> TaskPlan:
    """The plan of the innermost `tasks` block.

    Raises:
        RuntimeError: there is none.
    """
    if _current is not None:
        return _current.plan(num_tasks)
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"{layer}: a checkpoint recomputes its forward pass outside `with fastmtl.nn.tasks(task_ids):`; call "
            "backward() inside the block, or checkpoint(..., context_fn=fastmtl.nn.checkpoint_contexts)"
        )
    raise RuntimeError(
        f"{layer}: the tasks of the batch are not known; call the model inside `with fastmtl.nn.tasks(task_ids):`"
    )


def checkpoint_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """The `context_fn` with which a non-reentrant checkpoint recomputes with the tasks that its forward pass saw.

    Without it `backward()` must be called inside the block of that very batch: outside it raises, and inside the block
    of another batch it would take that one's tasks.

    Returns:
        What surrounds the forward pass, and what surrounds its recomputation.

    Example:
        >>> from torch.utils.checkpoint import checkpoint
        >>> layer = TaskLinear(2, 1, 2)
        >>> with tasks(torch.tensor([1, 0])):
        ...     y = checkpoint(layer, torch.ones(2, 2), use_reentrant=False, context_fn=checkpoint_contexts)
        >>> y.sum().backward()
    """
    seen = nullcontext() if _current is None else tasks(_current.task_ids)
    return nullcontext(), seen
