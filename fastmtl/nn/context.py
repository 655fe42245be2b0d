"""The tasks of a batch, told to every layer of a network from outside its `forward`."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmtl.ops import TaskPlan, task_plan
from fastmtl.ops.task_weights.arguments import check_ids, hint_of_ids
from fastmtl.ops.task_weights.operators import known_bounds

# process-wide: the recomputation of a checkpoint runs on autograd's threads
# each with the thread that has entered it; None: a compiled graph, which can't tell
_entered: list[tuple[tasks, int | None]] = []
_lock = threading.Lock()
# the innermost one under a name of its own: a compiled graph then does not depend on how many are around it
_current: tasks | None = None
# the same, and whether blocks of several threads are open, each of which then sees its own. As one value: a thread that
# read the two one after the other could take another thread's block for its own
_seen: tuple[tasks | None, bool] = None, False


class Present(NamedTuple):
    """The tasks that have samples.

    Args:
        positions: among the layer's tasks, rising.
        plan: of the batch; None: it is not made, since all samples belong to one task.
    """

    positions: tuple[int, ...]
    plan: TaskPlan | None


class tasks:
    """Tells every layer of `fastmtl.nn` that runs inside the `with` block the tasks of its batch.

    It holds for the whole process, in every thread that has no block of its own. The innermost block counts; the outer
    one holds again when it ends, whatever ends it. The batch is sorted once per number of tasks and block, and again
    where ids are rewritten in place (but for ids that were made in inference mode, which must stay as they are). What a
    forward pass has seen is saved for its backward pass, which may run after the block; a checkpoint that recomputes
    its forward then must know the tasks again: see `checkpoint_contexts`. Under `torch.compile` the sort is part of the
    graph, unless a `TaskPlan` is given; new ids don't compile again. Compiled models that several threads run at once
    need a lock: their graphs know one block for the process.

    Args:
        task_ids: `[N]` int32 or int64, the task of each sample, from 0 to T - 1; `[N, L]` for packed sequences in
            linear layers; a sequence of N names; the name of one task, that of all samples; or a `TaskPlan`, for a
            network whose layers all have the same number of tasks.
        repeat: whether a layer may see `k * N` samples, k in a row from each of the batch, as networks with windows
            make them (Swin): the ids are then repeated. Without it that is an error.

    Raises:
        TypeError: ids that are neither int32 nor int64, nor names, nor a plan.
        ValueError: (from forward) a name that is no task of the layer.

    Example:
        >>> layer = TaskLinear(2, 1, ["left", "right"], bias=False)
        >>> with tasks(torch.tensor([1, 0, 1])):
        ...     y = layer(torch.ones(3, 2))
        >>> y.shape
        torch.Size([3, 1])
        >>> with tasks("left"):
        ...     y = layer(torch.ones(5, 2))
        >>> y.shape
        torch.Size([5, 1])
    """

    def __init__(self, task_ids: Tensor | TaskPlan | str | Sequence[str], *, repeat: bool = False) -> None:
        if isinstance(task_ids, (list, tuple)) and not isinstance(task_ids, TaskPlan):
            for name in task_ids:
                if not isinstance(name, str):
                    raise TypeError(
                        f"task_ids: expected a tensor of ids, or names (str), got a {type(task_ids).__name__} with "
                        f"{type(name).__name__} in it{hint_of_ids(task_ids)}"
                    )
            task_ids = tuple(task_ids)
        elif not isinstance(task_ids, str):
            if not isinstance(task_ids, (Tensor, TaskPlan)):
                raise TypeError(
                    "task_ids: expected an int64 or int32 tensor with the id of each sample, names, the name of one "
                    f"task for all samples, or a TaskPlan, got {type(task_ids).__name__}"
                )
            check_ids(task_ids)
            # a tensor object of its own: a graph compiled while the caller's was an input of the model, too, would take
            # that input for the ids ever after
            task_ids = (
                TaskPlan(*(x.detach() for x in task_ids)) if isinstance(task_ids, TaskPlan) else task_ids.detach()
            )
        if not isinstance(repeat, bool):
            raise TypeError(f"repeat: expected a bool, got {type(repeat).__name__}")
        self.task_ids = task_ids
        self.repeat = repeat
        self._plans: dict[Any, TaskPlan] = {}
        # what the tasks can be read from, if that lies in the host's memory, and whether it counts its versions: what
        # was made in inference mode does not. A graph that is being compiled does not ask
        held = task_ids.offsets if isinstance(task_ids, TaskPlan) else task_ids
        known = not torch.compiler.is_compiling() and type(held) is Tensor and held.device.type == "cpu"
        self._held = held if known else None
        self._versioned = self._held is not None and not self._held.is_inference()
        # the last question that `present` was asked, and its answer: most layers of a network ask the same. As one
        # value: threads may share a block
        self._answered: tuple[tuple[Any, ...], Present | None] | None = None

    def __enter__(self) -> tasks:
        if torch.compiler.is_compiling():
            _enter(self, None)
        else:
            with _lock:
                _enter(self, threading.get_ident())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if torch.compiler.is_compiling():
            _leave(self, None)
        else:
            with _lock:
                _leave(self, threading.get_ident())
        if not any(block is self for block, _ in _entered):
            self._plans.clear()
            self._answered = None

    def plan(self, names: Sequence[str], leading: Sequence[int], device: torch.device) -> TaskPlan:
        """The batch sorted by task, for a layer with these tasks whose input has these leading dimensions."""
        ids = self.task_ids
        if isinstance(ids, TaskPlan):
            times = self._times(ids.task_ids.shape, leading)
            if times == 1:
                return ids
            ids = ids.task_ids
        elif isinstance(ids, Tensor):
            times = self._times(ids.shape, leading)
        else:
            times = self._times((len(ids),), leading) if isinstance(ids, tuple) else leading[0]
        if torch.compiler.is_compiling():
            # a graph that wrote into this object would hold another guard for its second call
            return _plan_of(ids, times, names, device)
        key: tuple[Any, ...] = (len(names), times)
        if isinstance(ids, Tensor):
            # ids may be rewritten in place (those made in inference mode do not tell); and what is sorted while a CUDA
            # graph is captured has no values yet
            version = 0 if ids.is_inference() else ids._version
            key = *key, version, ids.is_cuda and torch.cuda.is_current_stream_capturing()
        else:
            capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
            key = *key, tuple(names), device, capturing
        plan = self._plans.get(key)
        if plan is None:
            # made in inference mode it could not be saved for a backward pass of the same block
            with torch.inference_mode(False):
                plan = self._plans[key] = _plan_of(ids, times, names, device)
        return plan

    def present(self, names: tuple[str, ...], leading: Sequence[int], device: torch.device) -> Present | None:
        """The tasks that have samples, for a layer with these tasks and such an input.

        None: the host does not know them without waiting for the device, or the ids don't fit the input, of which an op
        then says more. Not for graphs that are being compiled.
        """
        held = self._held
        if held is not None:
            # as in `plan`: ids may be rewritten in place
            asked: tuple[Any, ...] = names, leading, device, held._version if self._versioned else 0
        else:
            ids = self.task_ids
            if not isinstance(ids, (str, tuple)) or isinstance(ids, TaskPlan):
                return None
            asked = (names,) if isinstance(ids, str) else (names, leading, device)
        answered = self._answered
        if answered is None or answered[0] != asked:
            answered = self._answered = asked, self._find_present(names, leading, device)
        return answered[1]

    def _find_present(self, names: tuple[str, ...], leading: Sequence[int], device: torch.device) -> Present | None:
        ids = self.task_ids
        if isinstance(ids, str):
            return Present((_position(ids, names),), None)
        shape = (len(ids),) if not isinstance(ids, (Tensor, TaskPlan)) else tuple(_ids_of(ids).shape)
        if self._times(shape, leading) == 1 and tuple(leading[: len(shape)]) != shape:
            return None
        plan = self.plan(names, leading, device)
        if not isinstance(ids, (Tensor, TaskPlan)):
            return Present(tuple(sorted({_position(name, names) for name in ids})), plan)
        if plan.offsets.device != device or plan.offsets.shape[0] != len(names) + 1:
            return None
        bounds = known_bounds(plan.offsets)
        if bounds is None:
            return None
        return Present(tuple(t for t in range(len(names)) if bounds[t + 1] > bounds[t]), plan)

    def _times(self, shape: Sequence[int], leading: Sequence[int]) -> int:
        """How many samples of a layer belong to one of the batch."""
        if self.repeat and len(shape) == 1 and shape[0] > 0 and leading[0] % shape[0] == 0:
            return leading[0] // shape[0]
        return 1


def _ids_of(ids: Tensor | TaskPlan) -> Tensor:
    return ids.task_ids if isinstance(ids, TaskPlan) else ids


def _plan_of(ids: Tensor | str | tuple[str, ...], times: int, names: Sequence[str], device: torch.device) -> TaskPlan:
    if isinstance(ids, str):
        return _plan_of_one(_position(ids, names), times, len(names), device)
    if isinstance(ids, tuple):
        ids = torch.tensor([_position(name, names) for name in ids], dtype=torch.int64).to(device, non_blocking=True)
    return task_plan(ids if times == 1 else ids.repeat_interleave(times), len(names))


def _plan_of_one(task: int, count: int, num_tasks: int, device: torch.device) -> TaskPlan:
    """Of a batch of one task: nothing to sort, and nothing that is copied to the device."""
    begins = (torch.arange(num_tasks + 1, device=device) > task).long() * count
    return TaskPlan(torch.full((count,), task, device=device), torch.arange(count, device=device), begins)


def _position(name: str, names: Sequence[str]) -> int:
    if name not in names:
        raise ValueError(f"tasks: expected one of {', '.join(names)}, got {name!r}")
    return list(names).index(name)


def _enter(block: tasks, thread: int | None) -> None:
    _entered.append((block, thread))
    _set_current()


def _leave(block: tasks, thread: int | None) -> None:
    """Takes out the last entry of this very object: blocks of generators and threads may end out of turn."""
    found = [k for k, (other, _) in enumerate(_entered) if other is block]
    own = [k for k in found if _entered[k][1] == thread]
    if found:
        del _entered[(own or found)[-1]]
    _set_current()


def _set_current() -> None:
    global _current, _seen
    _current = _entered[-1][0] if _entered else None
    _seen = _current, len(_entered) > 1 and any(thread != _entered[0][1] for _, thread in _entered)


def current_tasks() -> tasks | None:
    """The innermost `tasks` block of this thread; where it has none, of the process; or None."""
    if torch.compiler.is_compiling():
        return _current
    innermost, several = _seen
    if several:
        own = threading.get_ident()
        # of a copy: other threads may enter and leave meanwhile
        for block, thread in reversed(list(_entered)):
            if thread == own or thread is None:
                return block
    return innermost


def current_plan(names: Sequence[str], layer: str, leading: Sequence[int], device: torch.device) -> TaskPlan:
    """The plan of the innermost `tasks` block for a layer with these tasks.

    Raises:
        RuntimeError: there is none.
        ValueError: a name that is no task of the layer.
    """
    block = current_tasks()
    if block is not None:
        return block.plan(names, leading, device)
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"{layer}: a checkpoint recomputes its forward pass outside `with fastmtl.nn.tasks(task_ids):`; call "
            "backward() inside the block, or checkpoint(..., context_fn=fastmtl.nn.checkpoint_contexts)"
        )
    raise RuntimeError(
        f"{layer}: the tasks of the batch are not known; call the model inside `with fastmtl.nn.tasks(task_ids):`, or, "
        "for samples of one task, `with fastmtl.nn.tasks(name):`"
    )


def present_tasks(names: tuple[str, ...], x: Tensor, dims: int) -> Present | None:
    """The tasks that have samples in the innermost `tasks` block, where the host knows them, or None.

    Args:
        names: the layer's tasks.
        x: its input; of a plain `Tensor` alone more than None is said.
        dims: how many leading dimensions of x the ids may have.

    Not for graphs that are being compiled.
    """
    # as `current_tasks`, without a call of it in most cases: this runs in every layer
    block, several = _seen
    if several:
        block = current_tasks()
    if block is None or type(x) is not Tensor or not 0 < dims <= x.dim() or x.is_nested:
        return None
    if torch._C._is_tracing():
        # the trace would hold for these tasks and gates alone
        return None
    return block.present(names, x.shape[:dims], x.device)


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
    block = current_tasks()
    seen = nullcontext() if block is None else tasks(block.task_ids, repeat=block.repeat)
    return nullcontext(), seen
