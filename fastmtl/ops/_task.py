"""What the per-task ops share: reading their arguments, with their errors; memory for their gradients."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastmtl.core.schemas import autocast_is_on

Delta: TypeAlias = "Tensor | Sequence[Tensor | None] | torch.nn.ParameterList | None"
Pair: TypeAlias = int | Sequence[int]

# a grid has at most 65535 programs along y and z, where the kernels have one for each task and, where rows are split,
# up to a few more for each processor of the device: not more than 1024
TRITON_MAX_TASKS = 65_535 - 1_024

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class TaskPlan(NamedTuple):
    """A batch sorted by task; made by `task_plan`, accepted by every task op in place of `task_ids`.

    `order[offsets[t] : offsets[t + 1]]` are the samples of task t, in the order in which the batch has them. Samples
    whose id is out of range (only on a GPU; the CPU raises) come last, from `offsets[T]` on.

    Example:
        >>> task_plan(torch.tensor([1, 0, 1]), 2).offsets
        tensor([0, 1, 3])
    """

    task_ids: Tensor  # as given: [N], or [N, L] for packed sequences
    order: Tensor  # [N] int64, flat positions sorted by task
    offsets: Tensor  # [T + 1] int64

    @property
    def num_tasks(self) -> int:
        return self.offsets.shape[0] - 1


class Geometry(NamedTuple):
    """How the filter moves: as in `F.conv2d`, height first."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @classmethod
    def of(cls, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> Geometry:
        return cls((stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]), groups)

    def pixelwise(self, kernel: Sequence[int]) -> bool:
        """Whether each output pixel sees the one input pixel in its place."""
        return (*kernel, *self.stride, *self.padding) == (1, 1, 1, 1, 0, 0)

    def output_size(self, size: Sequence[int], kernel: Sequence[int]) -> tuple[int, int]:
        h, w = (
            (size[k] + 2 * self.padding[k] - self.dilation[k] * (kernel[k] - 1) - 1) // self.stride[k] + 1
            for k in (0, 1)
        )
        return h, w


def shape_of_one(weights: TaskWeights) -> torch.Size:
    """`weights.shape`, as a function: dynamo of torch 2.10 traces no property of a named tuple."""
    if weights.weight is not None:
        return weights.weight.shape
    stacked = len(weights.delta) == 1 and not weights.delta_tasks
    return weights.delta[0].shape[1:] if stacked else weights.delta[0].shape


class TaskWeights(NamedTuple):
    """`W + s_t * Delta_t` of all tasks, as the ops pass it on.

    `delta` is one `[T, ...]` tensor (`delta_tasks` is then empty), or the tensors of the tasks in `delta_tasks`;
    empty: no task has one. `weight=None`: wholly separate weights.
    """

    weight: Tensor | None
    delta: Sequence[Tensor]
    delta_tasks: Sequence[int]
    gate: Tensor | None

    @property
    def stacked(self) -> bool:
        return len(self.delta) == 1 and not self.delta_tasks

    def by_task(self, num_tasks: int) -> list[Tensor | None]:
        """Each task's delta, as views."""
        if self.stacked:
            return list(self.delta[0].unbind(0))
        found: list[Tensor | None] = [None] * num_tasks
        for t, d in zip(self.delta_tasks, self.delta, strict=True):
            found[t] = d
        return found

    @property
    def shape(self) -> torch.Size:
        """Of one weight: `[Cout, Cin / groups, kh, kw]` or `[Cout, Cin]`."""
        return shape_of_one(self)

    @property
    def like(self) -> Tensor:
        """A tensor with the dtype and memory order that one task's weight gradient has."""
        if self.weight is not None:
            return self.weight
        return self.delta[0][0] if self.stacked else self.delta[0]


def checking() -> bool:
    """Whether task ids on a GPU are checked up front, at the price of waiting for it."""
    return os.environ.get("FASTMTL_CHECK", "0") not in ("", "0")


def is_channels_last(x: Tensor) -> bool:
    """Whether the strides of a 4-D tensor say channels_last; NCHW where they would fit both."""
    if x.dim() != 4 or x.stride(1) == 0:
        return False
    least = 0
    for d in (1, 3, 2, 0):
        if x.shape[d] == 0 or x.stride(d) < least or (d == 0 and least == x.stride(1)):
            return False
        least = x.stride(d) * max(x.shape[d], 1)
    return True


def memory_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def cast_by_autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype, where autocast is on; weights stay as they are and are cast while staged."""
    kind = x.device.type
    if not autocast_is_on(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind)) if x.is_floating_point() and x.dtype != torch.float64 else x


def _added_up_in_their_own_dtype() -> set[torch.dtype]:
    """The 16-bit dtypes of which torch's convolutions and matrix products on this CPU make sums in 16 bits.

    oneDNN adds up in float32, but takes a dtype only where the CPU has instructions for it. torch asks it the same
    questions; a torch without oneDNN cannot.
    """
    questions = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    answers = {dtype: getattr(torch.ops.mkldnn, name, lambda: False)() for dtype, name in questions.items()}
    return {dtype for dtype, served in answers.items() if not served}


# what `widen` widens on a CPU
WIDENED = _added_up_in_their_own_dtype()


def widen(x: Tensor) -> Tensor:
    """x in a dtype of which torch makes sums in at least float32: x itself, or a copy in float32 in its memory format.

    What is computed from the copy is to be rounded to the dtype of x, once.
    """
    if x.device.type != "cpu" or x.dtype not in WIDENED:
        return x
    return x.to(torch.float32, memory_format=memory_format(x))


# --- memory for gradients


def like_parameter(p: Tensor) -> Tensor:
    """An empty gradient in the dtype and memory order of a weight, as autograd's own are."""
    if p.dim() == 4:
        return torch.empty(p.shape, dtype=p.dtype, device=p.device, memory_format=memory_format(p))
    return torch.empty(p.shape, dtype=p.dtype, device=p.device)


def like_stacked(delta: Tensor) -> Tensor:
    """An empty gradient of a `[T, ...]` delta, contiguous."""
    return torch.empty(delta.shape, dtype=delta.dtype, device=delta.device)


def empty_gradients(
    x: Tensor,
    weights: TaskWeights,
    bias: Tensor | None,
    wanted: Sequence[bool],
    wanted_delta: Sequence[int],
    together: Tensor | None = None,
) -> list[Tensor]:
    """Memory for what a backward op returns: x, weight, deltas, gate, bias, of these the wanted ones.

    `together`: memory for those of the deltas, one after another.
    """
    out = []
    if wanted[0]:
        out.append(torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x)))
    if wanted[1] and weights.weight is not None:
        out.append(like_parameter(weights.weight))
    if together is not None:
        out.extend(together.unbind(0))
    else:
        for k in wanted_delta:
            out.append(like_stacked(weights.delta[k]) if weights.stacked else like_parameter(weights.delta[k]))
    for want, p in zip(wanted[2:], (weights.gate, bias), strict=True):
        if want and p is not None:
            out.append(torch.empty(p.shape, dtype=p.dtype, device=p.device))
    return out


# --- checks


def check_input(x: Any, argument: str = "x") -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{argument}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{argument}: expected float64, float32, bfloat16 or float16, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"{argument}: expected a dense (strided) tensor, got layout {x.layout}")


def read_pair(value: Any, argument: str, least: int) -> tuple[int, int]:
    """An int or a pair of ints, as height and width of at least `least` each."""
    pair = (value, value) if isinstance(value, int) else value
    if not isinstance(pair, (tuple, list)) or len(pair) not in (1, 2) or not all(isinstance(v, int) for v in pair):
        raise TypeError(f"{argument}: expected an int or a pair of ints, got {value!r}")
    pair = (pair[0], pair[-1])
    if min(pair) < least:
        raise ValueError(f"{argument}: expected at least {least}, got {value!r}")
    return pair


def check_companion(value: Any, argument: str, x: Tensor) -> None:
    """A weight, delta, gate or bias: in the dtype of x, or float32 beside a 16-bit x; on the device of x."""
    check_input(value, argument)
    if value.dtype != x.dtype and not (value.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)):
        wide = " or torch.float32" if x.dtype in (torch.bfloat16, torch.float16) else ""
        raise TypeError(f"{argument}: expected {x.dtype}{wide} beside x in {x.dtype}, got {value.dtype}")
    if value.device != x.device:
        raise ValueError(f"{argument}: expected device {x.device} as x, got {value.device}")


def read_weights(
    x: Tensor, weight: Tensor | None, delta: Delta, gate: Tensor | None, dims: int
) -> tuple[TaskWeights, dict[str, int]]:
    """The weights, checked against each other and x; and the number of tasks by the argument that tells it.

    Raises:
        TypeError, ValueError: as `task_conv2d`.
    """
    names = "[Cout, Cin / groups, kh, kw]" if dims == 4 else "[Cout, Cin]"
    tasks: dict[str, int] = {}
    if weight is not None:
        check_companion(weight, "weight", x)
        if weight.dim() != dims:
            raise ValueError(f"weight: expected shape {names}, got {list(weight.shape)}")
    held: list[tuple[str, Tensor]] = []
    positions: list[int] = []
    if isinstance(delta, Tensor):
        check_input(delta, "delta")
        if delta.dim() != dims + 1:
            raise ValueError(f"delta: expected shape [T, {names[1:]}, got {list(delta.shape)}")
        held = [("delta", delta)]
        tasks["delta"] = delta.shape[0]
    elif delta is not None:
        if isinstance(delta, torch.nn.ParameterList):
            delta = list(delta)
        if isinstance(delta, (str, bytes, dict)) or not isinstance(delta, Sequence):
            raise TypeError(
                f"delta: expected a [T, ...] tensor, a list of T tensors or None, got {type(delta).__name__}"
            )
        for t, d in enumerate(delta):
            if d is None:
                continue
            if not isinstance(d, Tensor):
                raise TypeError(f"delta[{t}]: expected a tensor or None, got {type(d).__name__}")
            if d.dim() != dims:
                raise ValueError(f"delta[{t}]: expected shape {names}, got {list(d.shape)}")
            held.append((f"delta[{t}]", d))
            positions.append(t)
        tasks["delta"] = len(delta)
    if weight is None and delta is None:
        raise ValueError("weight, delta: expected at least one of them, got None for both")
    if weight is None and not isinstance(delta, Tensor) and len(positions) < len(delta or ()):
        missing = next(t for t, d in enumerate(delta or ()) if d is None)
        raise ValueError(f"delta[{missing}]: expected a tensor, since weight is None, got None")
    if weight is None and not held:
        raise ValueError("delta: expected at least one task, since weight is None, got none")
    stacked = isinstance(delta, Tensor)
    like = weight if weight is not None else held[0][1]
    shape = weight.shape if weight is not None else held[0][1].shape[1:] if stacked else held[0][1].shape
    for name, d in held:
        check_companion(d, name, x)
        if d.dtype != like.dtype:
            raise TypeError(f"{name}: expected {like.dtype} as the other weights, got {d.dtype}")
        if (d.shape[1:] if stacked else d.shape) != shape:
            expected = [d.shape[0], *shape] if stacked else list(shape)
            raise ValueError(f"{name}: expected shape {expected}, got {list(d.shape)}")
    if gate is not None:
        check_companion(gate, "gate", x)
        if gate.dim() != 1:
            raise ValueError(f"gate: expected shape [T], got {list(gate.shape)}")
        tasks["gate"] = gate.shape[0]
    return TaskWeights(weight, [d for _, d in held], positions, gate), tasks


def check_bias(x: Tensor, bias: Tensor | None, num_out: int, tasks: dict[str, int]) -> None:
    if bias is None:
        return
    check_companion(bias, "bias", x)
    if bias.dim() not in (1, 2) or bias.shape[-1] != num_out:
        raise ValueError(f"bias: expected shape [{num_out}] or [T, {num_out}], got {list(bias.shape)}")
    if bias.dim() == 2:
        tasks["bias"] = bias.shape[0]


def agreed_tasks(tasks: dict[str, int]) -> int | None:
    """The number of tasks that all arguments tell; None if none does."""
    first: tuple[str, int] | None = None
    for name, count in tasks.items():
        if first is None:
            first = name, count
        elif count != first[1]:
            raise ValueError(f"{name}: expected {first[1]} tasks as in {first[0]}, got {count}")
    if first is not None and first[1] == 0:
        raise ValueError(f"{first[0]}: expected at least one task, got 0")
    return None if first is None else first[1]


def check_ids(task_ids: Any, device: torch.device | None = None) -> None:
    """Dtype and device of ids or of a plan's; their values are seen by `task_plan`."""
    if isinstance(task_ids, TaskPlan):
        task_ids = task_ids.task_ids
    if not isinstance(task_ids, Tensor):
        raise TypeError(f"task_ids: expected an int64 or int32 tensor, or a TaskPlan, got {type(task_ids).__name__}")
    if task_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"task_ids: expected int64 or int32, got {task_ids.dtype}")
    if device is not None and task_ids.device != device:
        raise ValueError(f"task_ids: expected device {device} as x, got {task_ids.device}")


def check_leading(task_ids: Tensor | TaskPlan, leading: Sequence[int]) -> None:
    """Ids must have the shape of one or more leading dimensions of x."""
    ids = task_ids.task_ids if isinstance(task_ids, TaskPlan) else task_ids
    if ids.dim() == 0 or list(ids.shape) != list(leading[: ids.dim()]):
        options = " or ".join(str(list(leading[: k + 1])) for k in range(len(leading)))
        raise ValueError(f"task_ids: expected shape {options}, as x, got {list(ids.shape)}")


def segments(order: Tensor, offsets: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each task that has samples, with their positions. Waits for the device."""
    bounds = offsets.tolist()
    for t, (begin, end) in enumerate(itertools.pairwise(bounds)):
        if end > begin:
            yield t, order[begin:end]


def triton_declines(*tensors: Tensor, offsets: Tensor | None = None) -> dict[str, str | None]:
    """For `choose`: why the Triton kernels cannot take these tensors, or the tasks of a plan."""
    num_tasks = 0 if offsets is None else offsets.shape[0] - 1
    reason = None
    if any(x.dtype == torch.float64 for x in tensors):
        reason = "its kernels have no float64"
    elif num_tasks > TRITON_MAX_TASKS:
        reason = f"its kernels take at most {TRITON_MAX_TASKS} tasks, got {num_tasks}"
    return {"triton": reason}
