"""Reading the gradients that the ops take: one `[T, P]` bank, or T lists of n tensors and Nones.

Lists travel through op schemas as the tensors that exist plus their positions `task * n + parameter`
(a `Tensor?[]` argument would silently not be differentiable).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from fastmtl.core.dispatch import checking
from fastmtl.core.gradient_rows import MAX_TASKS, GradientRows, bank_rows
from fastmtl.core.tensors import FLOAT_DTYPES

GradLists: TypeAlias = Sequence[Sequence[Tensor | None]]
Grads: TypeAlias = Tensor | GradLists


def check_num_tasks(num_tasks: int, argument: str) -> None:
    if not 1 <= num_tasks <= MAX_TASKS:
        raise ValueError(f"{argument}: expected 1 to {MAX_TASKS} tasks, got {num_tasks}")


def _check_tensor(x: Tensor, where: str) -> None:
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{where}: expected float64, float32, bfloat16 or float16, got {x.dtype}")
    if x.layout is not torch.strided:
        raise TypeError(f"{where}: expected a dense (strided) tensor, got layout {x.layout}")


def check_bank(grads: Tensor, argument: str = "grads") -> None:
    if grads.dim() != 2:
        raise ValueError(f"{argument}: expected a [T, P] tensor, got shape {tuple(grads.shape)}")
    check_num_tasks(grads.shape[0], argument)
    _check_tensor(grads, argument)


def check_gram(gram: Tensor, argument: str = "gram") -> None:
    """Raises unless `gram` is a square floating-point matrix of 1 to 128 tasks."""
    if not isinstance(gram, Tensor):
        raise TypeError(f"{argument}: expected a tensor, got {type(gram).__name__}")
    if not gram.is_floating_point():
        raise TypeError(f"{argument}: expected a floating-point tensor, got {gram.dtype}")
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"{argument}: expected a square [T, T] matrix, got shape {list(gram.shape)}")
    check_num_tasks(gram.shape[0], argument)


def check_gram_values(gram: Tensor, present: Tensor | None = None) -> None:
    """With `FASTMTL_CHECK=1`, raises ValueError where no present tasks' gradients have this Gram matrix; that waits for
    the device. A matrix that is not finite passes: its weights are NaN."""
    if not checking():
        return
    m = gram.detach().to("cpu", torch.float64)
    if present is not None:
        here = present.cpu()
        m = m[here][:, here]
    if m.numel() == 0 or not m.isfinite().all():
        return
    eps = torch.finfo(gram.dtype).eps
    # beyond rounding: each entry may be off by some roundings of the lengths that it is of
    lengths = m.diagonal().clamp(min=0).sqrt()
    off = (m - m.mT).abs() - 64 * eps * lengths[:, None] * lengths
    if (off > 0).any():
        i, j = divmod(int(off.argmax()), len(m))
        raise ValueError(f"gram: expected a symmetric matrix, got {float(m[i, j]):g} and {float(m[j, i]):g} for a pair")
    scale = torch.where(lengths > 0, 1 / lengths, 0.0)
    values = torch.linalg.eigvalsh(0.5 * (m + m.mT) * scale[:, None] * scale)
    if (m.diagonal() < 0).any():
        got = f"negative eigenvalues: {float(m.diagonal().min()):g} on its diagonal"
        raise ValueError(f"gram: expected a Gram matrix, got one with {got}")
    if values[0] < -64 * eps * len(m):
        got = f"negative eigenvalues: {float(values[0]):g} among those of its cosines"
        raise ValueError(f"gram: expected a Gram matrix, got one with {got}")


def check_order(order: Tensor, num_tasks: int, device: torch.device | None) -> None:
    if not isinstance(order, Tensor):
        raise TypeError(f"order: expected a tensor, got {type(order).__name__}")
    if order.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"order: expected int32 or int64, got {order.dtype}")
    if order.dim() != 2 or order.shape[0] != num_tasks:
        raise ValueError(f"order: expected shape [{num_tasks}, K] for {num_tasks} tasks, got {list(order.shape)}")
    if device is not None and order.device != device:
        raise ValueError(f"order: expected device {device}, got {order.device}")


def check_order_values(order: Tensor, num_tasks: int) -> None:
    """Raises where an entry is out of range, on the CPU."""
    # looking at the values would make a GPU wait for the host
    if order.device.type == "cpu" and order.numel() and type(order) is Tensor:
        low, high = order.aminmax()
        if low < 0 or high >= num_tasks:
            raise ValueError(f"order: expected entries in 0..{num_tasks - 1}, got {int(low)}..{int(high)}")


def check_present(present: Tensor, gram: Tensor) -> None:
    """Raises where `present` is no `[T]` bool tensor beside this `[T, T]` Gram matrix."""
    if not isinstance(present, Tensor):
        raise TypeError(f"present: expected a tensor, got {type(present).__name__}")
    if present.dtype != torch.bool:
        raise TypeError(f"present: expected torch.bool, got {present.dtype}")
    if present.shape != gram.shape[:1]:
        raise ValueError(f"present: expected shape [{gram.shape[0]}], got {list(present.shape)}")
    if present.device != gram.device:
        raise ValueError(f"present: expected device {gram.device} as the Gram matrix, got {present.device}")


def is_bank(grads: Grads, argument: str = "grads") -> bool:
    if isinstance(grads, Tensor):
        return True
    if isinstance(grads, (str, bytes)) or not isinstance(grads, Sequence):
        raise TypeError(f"{argument}: expected a [T, P] tensor or T lists of tensors, got {type(grads).__name__}")
    return False


def read_rows(grads: Grads) -> GradientRows:
    """A bank or lists, checked, in the form that the kernels take. Raises what `check_bank` and `read_lists` do."""
    if is_bank(grads):
        check_bank(grads)
        return bank_rows(grads)
    return read_lists(grads)


def check_task_numbers(x: Tensor, argument: str, rows: GradientRows) -> None:
    """Raises where `x` is no floating-point `[T]` tensor on the device of the gradients."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{argument}: expected a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{argument}: expected a floating-point tensor, got {x.dtype}")
    if x.shape != (rows.num_tasks,):
        raise ValueError(f"{argument}: expected shape [{rows.num_tasks}], got {list(x.shape)}")
    if rows.tensors and x.device != rows.tensors[0].device:
        raise ValueError(f"{argument}: expected device {rows.tensors[0].device} as the gradients, got {x.device}")


def check_flags(present: Tensor, rows: GradientRows) -> None:
    """Raises where `present` is no `[T]` bool tensor on the device of the gradients."""
    if not isinstance(present, Tensor):
        raise TypeError(f"present: expected a tensor, got {type(present).__name__}")
    if present.dtype != torch.bool:
        raise TypeError(f"present: expected torch.bool, got {present.dtype}")
    if present.shape != (rows.num_tasks,):
        raise ValueError(f"present: expected shape [{rows.num_tasks}], got {list(present.shape)}")
    if rows.tensors and present.device != rows.tensors[0].device:
        raise ValueError(f"present: expected device {rows.tensors[0].device} as the gradients, got {present.device}")


def read_lists(grads: GradLists, argument: str = "grads") -> GradientRows:
    """Checks T lists of n tensors (None: a zero gradient) and drops the Nones.

    Raises:
        TypeError: an entry is not a dense floating-point tensor, or dtypes differ between tasks.
        ValueError: no task, more than 128, lists of different lengths, shapes or devices that differ.
    """
    num_tasks = len(grads)
    check_num_tasks(num_tasks, argument)
    for t, row in enumerate(grads):
        if isinstance(row, Tensor) or not isinstance(row, Sequence):
            raise TypeError(f"{argument}[{t}]: expected a list of tensors, got {type(row).__name__}")
    num_params = len(grads[0])
    first: list[Tensor | None] = [None] * num_params
    device: torch.device | None = None
    tensors: list[Tensor] = []
    index: list[int] = []
    for t, row in enumerate(grads):
        if len(row) != num_params:
            raise ValueError(f"{argument}[{t}]: expected {num_params} tensors as in {argument}[0], got {len(row)}")
        for i, x in enumerate(row):
            if x is None:
                continue
            if not isinstance(x, Tensor):
                raise TypeError(f"{argument}[{t}][{i}]: expected a tensor or None, got {type(x).__name__}")
            reference = first[i]
            if reference is None:
                _check_tensor(x, f"{argument}[{t}][{i}]")
                first[i] = x
                if device is None:
                    device = x.device
            else:
                if x.shape != reference.shape:
                    raise ValueError(
                        f"{argument}[{t}][{i}]: expected shape {tuple(reference.shape)} as in the tasks before it, "
                        f"got {tuple(x.shape)}"
                    )
                if x.dtype != reference.dtype:
                    raise TypeError(
                        f"{argument}[{t}][{i}]: expected {reference.dtype} as in the tasks before it, got {x.dtype}"
                    )
                if x.layout is not torch.strided:
                    _check_tensor(x, f"{argument}[{t}][{i}]")
            if x.device != device:
                raise ValueError(f"{argument}[{t}][{i}]: expected device {device}, got {x.device}")
            tensors.append(x)
            index.append(t * num_params + i)
    return GradientRows(tensors, index, num_tasks, num_params)


def kernel_matrix(matrix: Tensor) -> Tensor:
    """A square matrix as the solvers read it: float32 or float64, of any distance between rows, which are dense; or
    several, contiguous."""
    if matrix.dtype not in (torch.float32, torch.float64):
        return matrix.to(torch.float64).contiguous()
    return matrix if matrix.dim() == 2 and matrix.stride(1) == 1 else matrix.contiguous()
