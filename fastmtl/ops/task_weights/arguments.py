"""Reading the arguments that the ops with per-task weights share, with their errors."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastmtl.core.task_weights import Geometry, LowRankDeltas, TaskPlan, TaskWeights
from fastmtl.core.tensors import FLOAT_DTYPES

Delta: TypeAlias = "Tensor | Sequence[Tensor | None] | torch.nn.ParameterList | None"
# of `task_lora`, which multiplies each task's delta
Scaling: TypeAlias = "Tensor | float | Sequence[float] | None"
Pair: TypeAlias = int | Sequence[int]

# a grid has at most 65535 programs along y and z, where the kernels have one for each task and, where rows are split,
# up to a few more for each processor of the device: not more than 1024
TRITON_MAX_TASKS = 65_535 - 1_024


def check_input(x: Any, argument: str = "x") -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{argument}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in FLOAT_DTYPES:
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


def read_geometry(
    stride: Pair, padding: Pair | str, dilation: Pair, groups: int, kernel: Sequence[int]
) -> tuple[Geometry, tuple[int, int]]:
    """The geometry, and rows and columns of zeros that `padding="same"` needs after x beyond it."""
    strides, dilations = read_pair(stride, "stride", 1), read_pair(dilation, "dilation", 1)
    if not isinstance(groups, int) or isinstance(groups, bool):
        raise TypeError(f"groups: expected an int, got {type(groups).__name__}")
    if groups < 1:
        raise ValueError(f"groups: expected at least 1, got {groups}")
    extra = (0, 0)
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"padding: expected ints, 'same' or 'valid', got {padding!r}")
        total = (0, 0)
        if padding == "same":
            if strides != (1, 1):
                raise ValueError(f"padding: 'same' needs stride 1, got stride {stride!r}")
            total = tuple(d * (k - 1) for d, k in zip(dilations, kernel, strict=True))
        pads = (total[0] // 2, total[1] // 2)
        extra = (total[0] % 2, total[1] % 2)
    else:
        pads = read_pair(padding, "padding", 0)
    return Geometry(strides, pads, dilations, groups), extra


def check_companion(value: Any, argument: str, x: Tensor) -> None:
    """A weight, delta, gate or bias: in the dtype of x, or float32 beside a 16-bit x; on the device of x."""
    check_input(value, argument)
    if value.dtype != x.dtype and not (value.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)):
        or_float32 = " or torch.float32" if x.dtype in (torch.bfloat16, torch.float16) else ""
        raise TypeError(f"{argument}: expected {x.dtype}{or_float32} beside x in {x.dtype}, got {value.dtype}")
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
    if weight is None and not held:
        raise ValueError("weight, delta: expected a weight or the delta of at least one task, got none")
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


def read_low_rank(
    x: Tensor, weight: Tensor | None, A: Delta, B: Delta, scaling: Scaling
) -> tuple[LowRankDeltas, tuple[int, int], dict[str, int]]:
    """The low-rank deltas, checked against each other, the weight and x, with a scaling that is a tensor as it is; the
    shape `[Cout, Cin]` of a weight; and the number of tasks by the argument that tells it.

    Raises:
        TypeError, ValueError: as `task_lora`.
    """
    tasks: dict[str, int] = {}
    if weight is not None:
        check_companion(weight, "weight", x)
        if weight.dim() != 2:
            raise ValueError(f"weight: expected shape [Cout, Cin], got {list(weight.shape)}")
    held_a, positions = _read_factors(x, "A", A, "[r, Cin]", "[T, r, Cin]", tasks)
    held_b, positions_b = _read_factors(x, "B", B, "[Cout, r]", "[T, Cout, r]", tasks)
    for name, given, other, beside in (("A", A, B, "B"), ("B", B, A, "A")):
        if (given is None) != (other is None):
            if given is None:
                raise ValueError(f"{name}: expected the factors that {beside} is to be multiplied with, got None")
        elif isinstance(given, Tensor) and not isinstance(other, Tensor):
            raise TypeError(f"{beside}: expected one [T, ...] tensor as {name}, got {type(other).__name__}")
    agreed_tasks(tasks)
    if positions != positions_b:
        t = min(set(positions) ^ set(positions_b))
        expected, got = ("a tensor", "None") if t in positions else ("None", "a tensor")
        raise ValueError(f"B[{t}]: expected {expected} as A[{t}], got {got}")
    if weight is None and not held_a:
        raise ValueError("weight, A, B: expected a weight or the factors of at least one task, got none")
    held = [*held_a, *held_b]
    num_out, num_in = weight.shape if weight is not None else (held_b[0][1].shape[-2], held_a[0][1].shape[-1])
    for name, w in held:
        if w.dtype != held[0][1].dtype:
            raise TypeError(f"{name}: expected {held[0][1].dtype} as {held[0][0]}, got {w.dtype}")
    for (name_a, a), (name_b, b) in zip(held_a, held_b, strict=True):
        rank, lead = a.shape[-2], list(a.shape[:-2])
        if a.shape[-1] != num_in:
            raise ValueError(f"{name_a}: expected shape {[*lead, rank, num_in]}, got {list(a.shape)}")
        if b.shape[-2:] != (num_out, rank):
            raise ValueError(f"{name_b}: expected shape {[*lead, num_out, rank]}, got {list(b.shape)}")
        if rank == 0:
            raise ValueError(f"{name_a}: expected a rank of at least 1, got shape {list(a.shape)}")
    _check_scaling(x, scaling, tasks)
    kept = scaling if isinstance(scaling, Tensor) else None
    return (
        LowRankDeltas([a for _, a in held_a], [b for _, b in held_b], positions, kept),
        (num_out, num_in),
        tasks,
    )


def _read_factors(
    x: Tensor, argument: str, given: Any, shape: str, stacked: str, tasks: dict[str, int]
) -> tuple[list[tuple[str, Tensor]], list[int]]:
    """`A` or `B` of `task_lora`: the tensors with their names, and whose they are."""
    if given is None:
        return [], []
    if isinstance(given, Tensor):
        check_companion(given, argument, x)
        if given.dim() != 3:
            raise ValueError(f"{argument}: expected shape {stacked}, got {list(given.shape)}")
        tasks[argument] = given.shape[0]
        return [(argument, given)], []
    if isinstance(given, torch.nn.ParameterList):
        given = list(given)
    if isinstance(given, (str, bytes, dict)) or not isinstance(given, Sequence):
        raise TypeError(
            f"{argument}: expected a {stacked} tensor, a list of T tensors and Nones, or None, "
            f"got {type(given).__name__}"
        )
    held, positions = [], []
    for t, w in enumerate(given):
        if w is None:
            continue
        if not isinstance(w, Tensor):
            raise TypeError(f"{argument}[{t}]: expected a tensor or None, got {type(w).__name__}")
        check_companion(w, f"{argument}[{t}]", x)
        if w.dim() != 2:
            raise ValueError(f"{argument}[{t}]: expected shape {shape}, got {list(w.shape)}")
        held.append((f"{argument}[{t}]", w))
        positions.append(t)
    tasks[argument] = len(given)
    return held, positions


def _check_scaling(x: Tensor, scaling: Any, tasks: dict[str, int]) -> None:
    if scaling is None:
        return
    if _is_number(scaling):
        _check_size(scaling, "scaling")
        return
    if isinstance(scaling, Tensor):
        check_companion(scaling, "scaling", x)
        if scaling.dim() != 1:
            raise ValueError(f"scaling: expected shape [T], got {list(scaling.shape)}")
    else:
        if isinstance(scaling, (str, bytes, dict)) or not isinstance(scaling, Sequence):
            raise TypeError(
                "scaling: expected a number, a [T] tensor, a sequence of T numbers or None, "
                f"got {type(scaling).__name__}"
            )
        for t, s in enumerate(scaling):
            if not _is_number(s):
                raise TypeError(f"scaling[{t}]: expected a number, got {type(s).__name__}")
            _check_size(s, f"scaling[{t}]")
    tasks["scaling"] = len(scaling)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_size(value: float, argument: str) -> None:
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise ValueError(f"{argument}: expected a number that a float holds, got an int of {value.bit_length()} bits")


def scaling_tensor(x: Tensor, scaling: Scaling, num_tasks: int) -> Tensor | None:
    """s as `[T]`, or None for ones. What is no tensor yet is written where x lies, without a copy from the host."""
    if scaling is None or isinstance(scaling, Tensor):
        return scaling
    dtype = torch.promote_types(x.dtype, torch.float32)
    values = [float(s) for s in scaling] if isinstance(scaling, Sequence) else [float(scaling)] * num_tasks
    if all(s == 1 for s in values):
        return None
    runs: list[tuple[float, int]] = []
    for s in values:
        if runs and runs[-1][0] == s:
            runs[-1] = s, runs[-1][1] + 1
        else:
            runs.append((s, 1))
    parts = [torch.full((count,), s, dtype=dtype, device=x.device) for s, count in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


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
        raise TypeError(
            f"task_ids: expected an int64 or int32 tensor, or a TaskPlan, got {type(task_ids).__name__}"
            + hint_of_ids(task_ids)
        )
    if task_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"task_ids: expected int64 or int32, got {task_ids.dtype}")
    if device is not None and task_ids.device != device:
        raise ValueError(f"task_ids: expected device {device} as x, got {task_ids.device}")


def hint_of_ids(task_ids: Any) -> str:
    """For errors: how ids are made of plain ints."""
    ints = isinstance(task_ids, (list, tuple)) and len(task_ids) > 0 and all(type(t) is int for t in task_ids)
    return "; torch.tensor(task_ids) makes ids of ints" if ints else ""


def check_leading(task_ids: Tensor | TaskPlan, leading: Sequence[int]) -> None:
    """Ids must have the shape of one or more leading dimensions of x."""
    ids = task_ids.task_ids if isinstance(task_ids, TaskPlan) else task_ids
    if ids.dim() == 0 or list(ids.shape) != list(leading[: ids.dim()]):
        options = " or ".join(str(list(leading[: k + 1])) for k in range(len(leading)))
        raise ValueError(f"task_ids: expected shape {options}, as x, got {list(ids.shape)}")


def check_pictures(x: Sequence[int], kernel: Sequence[int], geometry: Geometry) -> None:
    """x: its shape, `[N, Cin, H, W]`."""
    if min(kernel) < 1:
        raise ValueError(f"weight: expected a filter of at least 1 x 1, got {list(kernel)}")
    padded = [x[2 + k] + 2 * geometry.padding[k] for k in (0, 1)]
    spread = [geometry.dilation[k] * (kernel[k] - 1) + 1 for k in (0, 1)]
    if padded[0] < spread[0] or padded[1] < spread[1]:
        raise ValueError(f"x: expected at least {spread} pixels after padding, as the filter spans, got {padded}")


def triton_declines(*tensors: Tensor, offsets: Tensor | None = None) -> dict[str, str | None]:
    """For `choose`: why the Triton kernels cannot take these tensors, or the tasks of a plan."""
    for x in tensors:
        if x.dtype == torch.float64:
            return {"triton": "its kernels have no float64"}
    num_tasks = 0 if offsets is None else offsets.shape[0] - 1
    if num_tasks > TRITON_MAX_TASKS:
        return {"triton": f"its kernels take at most {TRITON_MAX_TASKS} tasks, got {num_tasks}"}
    return {"triton": None}
