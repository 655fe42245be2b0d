"""A layer whose weight each task scales by blocks: HyperGrid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmtl.nn.containers import TaskParameters, Tasks
from fastmtl.nn.layers.around import AroundPlain
from fastmtl.nn.layers.scale_shift import scale_shift_of_last
from fastmtl.ops import task_scale_shift

# a grid of at most so many rows and columns, unless one is asked for
_MOST = 16


class TaskHyperGrid(AroundPlain):
    """`W * (r_t x c_t)`: each task scales the blocks of a shared weight, by a factor of its row and one of its column.

    The factors are `r_t = 2 sigmoid(row_t)` and `c_t = 2 sigmoid(column_t)`, from 0 to 2, each for as many rows or
    columns of the weight as one cell of the grid has. `row_t` and `column_t` are zero at first, so that all factors are
    1, and the layer computes what the plain one does. As the grid is an outer product, no task's weight is ever made:
    the layer is `r_t * (W (c_t * x)) + b`. A bias is not scaled.

    Args:
        layer: an `nn.Conv2d` that pads with zeros, an `nn.Linear`, or a `Conv1D` of `transformers`, whose very
            parameters it holds.
        tasks: the number of tasks (named "0", "1", ...) or their names; ids count in this order.
        grid: rows (a divisor of the output's width) and columns (a divisor of the input's); None: of each the largest
            divisor up to 16.

    `forward(x)` takes what the plain layer takes; the ids are `[N]`, for linear layers also the shape of more leading
    dimensions. Parameters: `weight` and `bias` as in the plain layer; `row` and `column` are dictionaries of one
    parameter per task, which gradient surgery leaves alone.

    Raises:
        TypeError: another layer, or one with a forward of its own; a grid that is no pair of ints.
        ValueError: a grid that does not divide the weight; another `padding_mode`; a weight that is computed
            (weight_norm, parametrizations); hooks; tasks that are none; a name with a dot or one that
            `nn.ParameterDict` uses.
        RuntimeError: (from forward) outside `fastmtl.nn.tasks`.

    Source: Tay et al. 2021 (HyperGrid transformers), whose grids come from the input, too; here they belong to the
    task.

    Example:
        >>> layer = TaskHyperGrid(torch.nn.Linear(24, 10), ["left", "right"])
        >>> layer.grid
        (10, 12)
    """

    def __init__(self, layer: nn.Module, tasks: Tasks, *, grid: Sequence[int] | None = None) -> None:
        super().__init__(layer, tasks)
        sizes = self._sizes()
        self.grid = _read_grid(grid, sizes)
        self.row, self.column = TaskParameters(), TaskParameters()
        self._start_tasks()

    def _start(self, name: str) -> None:
        self.row[name] = nn.Parameter(self.weight.new_zeros(self.grid[0]))
        self.column[name] = nn.Parameter(self.weight.new_zeros(self.grid[1]))

    def _reset_task(self, name: str) -> None:
        self.row[name].zero_()
        self.column[name].zero_()

    def effective_weight(self, task: int | str) -> Tensor:
        """The shared weight, scaled as the task has it; differentiable.

        Args:
            task: position or name.

        Raises:
            TypeError, ValueError: no such task.
        """
        name = self.task_name(task)
        w = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        sizes = self._sizes()
        rows = _expanded(self.row[name].to(w.dtype), sizes[0])
        columns = _expanded(self.column[name].to(w.dtype), sizes[1])
        if self.kind == "Conv1D":
            w = columns[:, None] * w * rows
        elif self.kind == "Linear":
            w = rows[:, None] * w * columns
        else:
            # each group of filters sees channels of its own
            seen = columns.view(self.groups, 1, -1).expand(-1, sizes[0] // self.groups, -1).flatten(0, 1)
            w = rows.view(-1, 1, 1, 1) * w * seen[..., None, None]
        return w.to(self.weight.dtype)

    @torch.no_grad()
    def changed(self, task: int | str) -> bool:
        """Whether any factor of the task is another than 1. Waits for the device."""
        return any(bool((x != 0).any()) for x in self.part(task).values())

    def merged(self, task: int | str, memo: dict[int, Any] | None = None) -> nn.Module:
        name = self.task_name(task)
        return self._merged_layer(self.effective_weight(name) if self.changed(name) else None, memo)

    def forward(self, x: Tensor) -> Tensor:
        x = self._checked(x)
        plan = self._plan(x, self._leading(x))
        sizes = self._sizes()
        rows = _expanded(self._stacked(self.row, plan), sizes[0])
        columns = _expanded(self._stacked(self.column, plan), sizes[1])
        scale = task_scale_shift if self.kind == "Conv2d" else scale_shift_of_last
        x = scale(x, columns, torch.zeros_like(columns), plan)
        y = scale(self._through_plain(x), rows, torch.zeros_like(rows), plan)
        if self.bias is None:
            return y
        # not as the shift of all tasks: a shared bias is in the Gram matrix of one_pass, and a shift is not
        bias = self.bias.to(y.dtype)
        return y + (bias.view(-1, 1, 1) if self.kind == "Conv2d" else bias)

    def extra_repr(self) -> str:
        return f"{self._repr_of_plain()}, grid={self.grid}"


def _expanded(x: Tensor, size: int) -> Tensor:
    """The factors of `[..., cells]` numbers, each as often as its cell has rows or columns."""
    return (2 * torch.sigmoid(x)).repeat_interleave(size // x.shape[-1], -1)


def _read_grid(grid: Any, sizes: tuple[int, int]) -> tuple[int, int]:
    if grid is None:
        rows, columns = (max(d for d in range(1, min(n, _MOST) + 1) if n % d == 0) for n in sizes)
        return rows, columns
    if isinstance(grid, (str, bytes)) or not isinstance(grid, Sequence) or len(grid) != 2:
        raise TypeError(f"grid: expected rows and columns or None, got {grid!r}")
    for n, size, what in zip(grid, sizes, ("rows", "columns"), strict=True):
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"grid: expected two ints, got {type(n).__name__} for the {what}")
        if n < 1 or size % n:
            raise ValueError(f"grid: expected {what} that divide {size}, got {n}")
    return grid[0], grid[1]
