"""A table of embeddings with a small difference per task."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmtl.core.task_weights import TaskPlan
from fastmtl.nn.containers import Tasks, known_ids, segments
from fastmtl.nn.layers.gate import TapsGate, scaled_by_gate
from fastmtl.nn.layers.weights import TaskLayer, check_plain
from fastmtl.ops.task_weights.arguments import check_leading


class TaskEmbedding(TaskLayer):
    """`nn.Embedding` in which sample b reads rows of `weight + gate[t] * delta[t]`, t its task.

    Args:
        num_embeddings: rows of the table, V.
        embedding_dim: columns of the table, D.
        tasks: the number of tasks (named "0", "1", ...) or their names; ids count in this order.
        padding_idx: a row that is not trained, as in `nn.Embedding`: neither the shared one nor a task's.
        gate: the first value of a learned scalar per task, or a `TapsGate`, which opens and closes by a learned score;
            None: no gates.
        shared: whether there is a table that all tasks share; False: wholly separate tables, the same for all tasks at
            first.
        device: of all parameters.
        dtype: of all parameters.

    `forward(x)` takes row numbers of shape `[N, ...]` and gives `[N, ..., D]`; the ids have the shape of one or more
    leading dimensions. Row numbers `[1, ...]`, as those of positions, are those of all samples. Parameters: `weight` as
    in `nn.Embedding`, `delta` and `gate` as in `TaskLinear`.

    What it costs: on the CPU each task's rows are read from its own table. On a GPU and under `torch.compile`, where
    the number of a task's samples is not known without waiting, all deltas are put into one table of T V rows, at each
    call: that moves 8 T V D bytes in float32, and as many backward.

    Raises:
        TypeError, ValueError: sizes, a `padding_idx`, tasks or a gate that are none; a name with a dot or one that
            `nn.ParameterDict` uses; (from forward) row numbers that are none, or, on the CPU, out of range. On a GPU
            those trip torch's own check, and are NaN where there is no shared table.
        RuntimeError: (from forward) outside `fastmtl.nn.tasks`.

    Example:
        >>> table = TaskEmbedding(100, 4, ["german", "french"], padding_idx=0)
        >>> with tasks(torch.tensor([1, 0])):
        ...     y = table(torch.tensor([[5, 7, 0], [5, 99, 3]]))
        >>> y.shape
        torch.Size([2, 3, 4])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        tasks: Tasks,
        padding_idx: int | None = None,
        *,
        gate: float | TapsGate | None = None,
        shared: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for argument, size in (("num_embeddings", num_embeddings), ("embedding_dim", embedding_dim)):
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"{argument}: expected an int, got {type(size).__name__}")
            if size < 1:
                raise ValueError(f"{argument}: expected at least 1, got {size}")
        if padding_idx is not None:
            if isinstance(padding_idx, bool) or not isinstance(padding_idx, int):
                raise TypeError(f"padding_idx: expected an int or None, got {type(padding_idx).__name__}")
            if not -num_embeddings <= padding_idx < num_embeddings:
                raise ValueError(f"padding_idx: expected {-num_embeddings}..{num_embeddings - 1}, got {padding_idx}")
            padding_idx %= num_embeddings
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        super().__init__(
            (num_embeddings, embedding_dim), tasks, False, gate=gate, rank=None, scaling=1.0, shared=shared,
            per_task_bias=False, device=device, dtype=dtype,
        )  # fmt: skip

    @classmethod
    def from_layer(cls, layer: nn.Embedding, tasks: Tasks, **options: Any) -> TaskEmbedding:
        """The same table with a delta of zero per task. It holds the very parameter of the plain layer.

        With `shared=False` each task has a copy of it instead.

        Args:
            layer: an `nn.Embedding`.
            tasks: as for the class.
            options: `gate` and `shared` of the class.

        Raises:
            TypeError: another layer, or one with a forward of its own.
            ValueError: one with `max_norm`, `scale_grad_by_freq` or `sparse`; a weight that is computed
                (parametrizations); hooks; or what the class raises.
        """
        check_plain(layer, nn.Embedding, "forward")
        if layer.max_norm is not None:
            raise ValueError(
                f"layer: expected max_norm None, got {layer.max_norm}: it would rescale the shared table and not its "
                "differences; rescale the table once (torch.renorm) and set layer.max_norm = None"
            )
        if layer.scale_grad_by_freq:
            raise ValueError(
                "layer: expected scale_grad_by_freq False, got True: a row has two gradients here; set "
                "layer.scale_grad_by_freq = False"
            )
        if layer.sparse:
            raise ValueError(
                "layer: expected sparse False, got True: the gradients here are dense; set layer.sparse = False and "
                "use an optimizer of dense gradients"
            )
        size = layer.num_embeddings, layer.embedding_dim
        return cls(*size, tasks, layer.padding_idx, **options, device="meta")._take(layer)

    def merged(self, task: int | str, memo: dict[int, Any] | None = None) -> nn.Embedding:
        name = self.task_name(task)
        plain = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        plain.weight = self._merged_weight(name, memo)
        return plain.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
        if x.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"x: expected int64 or int32, got {x.dtype}")
        if x.dim() == 0:
            raise ValueError("x: expected shape [N, ...], got []")
        plan = self._plan(x, x.dim())
        if x.shape[0] == 1 and plan.task_ids.dim() == 1:
            # the numbers of all samples, as of positions; added to, and not expanded, so that one_pass sees the samples
            x = x + torch.zeros_like(plan.task_ids, dtype=x.dtype).view(-1, *(1,) * (x.dim() - 1))
        check_leading(plan, x.shape)
        try:
            return self._looked_up(x, plan)
        except IndexError as error:
            raise ValueError(
                f"x: expected row numbers 0..{self.num_embeddings - 1}, got {int(x.min())}..{int(x.max())}"
            ) from error

    def _looked_up(self, x: Tensor, plan: TaskPlan) -> Tensor:
        if not self.shared:
            y = next(iter(self.delta.values())).new_zeros(*x.shape, self.embedding_dim)
        else:
            y = F.embedding(x, self.weight, self.padding_idx)
            if self._is_plain(x, plan.task_ids.dim()):
                return y
        # added before it is rounded, as the deltas of other layers are
        promoted = y.to(torch.promote_types(y.dtype, torch.float32))
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            promoted = self._add_by_segments(promoted, x, plan)
        else:
            promoted = promoted + self._from_one_table(x, plan).to(promoted.dtype)
        return promoted.to(y.dtype)

    def _add_by_segments(self, y: Tensor, x: Tensor, plan: TaskPlan) -> Tensor:
        """Adds each task's rows to its samples."""
        assert self.delta is not None
        count, each = plan.task_ids.numel(), math.prod(x.shape[plan.task_ids.dim() :])
        rows, sums, gates = x.reshape(count, each), y.view(count, each, self.embedding_dim), self._gates(plan)
        tables, present = self.delta.of_tasks(self.tasks), dict(segments(plan))
        absent = [table for t, table in enumerate(tables) if t not in present]
        if not present:
            own = absent if self.gate is None else [*absent, *self.gate.of_tasks(self.tasks)]
            sums = sums + self._in_graph(y.new_zeros(()), own)
        for t, at in present.items():
            table, absent = self._in_graph(tables[t], absent), []
            found = F.embedding(rows[at], table, self.padding_idx).to(y.dtype)
            if gates is not None:
                found = self._without_padding(rows[at], scaled_by_gate(found, gates[t].to(y.dtype)))
            sums.index_add_(0, at, found)
        return sums.view(y.shape)

    def _from_one_table(self, x: Tensor, plan: TaskPlan) -> Tensor:
        """Each sample's rows of its task's table, out of all in one: nothing is asked of the samples' number."""
        assert self.delta is not None
        known, ids = known_ids(plan)
        spread = (*ids.shape, *(1,) * (x.dim() - ids.dim()))
        table = torch.cat([getattr(self.delta, name) for name in self.tasks])
        # a row beyond a task's table would be another task's
        inside = (x >= 0) & (x < self.num_embeddings)
        y = F.embedding(torch.where(inside, x, 0) + ids.view(spread) * self.num_embeddings, table)
        gates = self._gates(plan)
        if gates is not None:
            y = scaled_by_gate(y, gates[ids].view(*spread, 1))
        return torch.where((known.view(spread) & inside)[..., None], self._without_padding(x, y), torch.nan)

    def _without_padding(self, x: Tensor, y: Tensor) -> Tensor:
        """No gradient where x is the padding: neither for a row, nor for a gate."""
        return y if self.padding_idx is None else torch.where((x == self.padding_idx)[..., None], y.detach(), y)

    def _reset_plain(self, weight: Tensor, bias: Tensor | None) -> None:
        nn.init.normal_(weight)
        if self.padding_idx is not None:
            weight[self.padding_idx].zero_()

    def extra_repr(self) -> str:
        text = f"{self.num_embeddings}, {self.embedding_dim}"
        if self.padding_idx is not None:
            text += f", padding_idx={self.padding_idx}"
        return text + self._repr_of_layer(may_have_bias=False)
