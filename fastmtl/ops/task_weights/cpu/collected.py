"""What the backward walk collects: the gradients of W, the deltas and the gate, of these the wanted ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl.core.memory import keep_freed_memory
from fastmtl.core.task_weights import TaskWeights
from fastmtl.core.tensors import like_parameter, memory_format
from fastmtl.ops.task_weights.cpu.batch import Batch
from fastmtl.ops.task_weights.cpu.direct import Direct, Job
from fastmtl.ops.task_weights.cpu.memory import fresh_stack


class Gradients:
    """dW, the wanted dDelta and the gate's gradient, filled task by task."""

    def __init__(
        self,
        x: Tensor,
        weights: TaskWeights,
        batch: Batch,
        want_weight: bool,
        wanted_delta: Sequence[int],
        want_gate: bool,
    ) -> None:
        keep_freed_memory()  # the gradients of a step are the next one's memory
        self.batch, self.weights = batch, weights
        self.promoted = torch.promote_types(weights.like.dtype, torch.float32)
        self.weight: Tensor | None = None
        if want_weight:
            assert weights.weight is not None
            # summed in at least float32
            self.weight = like_parameter(weights.weight.detach().to(self.promoted))
        self._weight_empty = True
        self.gate = torch.zeros(batch.num_tasks, dtype=self.promoted) if want_gate else None
        present = set(batch.present)
        self._stacked: Tensor | None = None
        self._slots: dict[int, int] = {}  # task -> place in the list
        self._list: list[Tensor | None] = [None] * len(wanted_delta)
        self._likes: list[Tensor] = []
        if wanted_delta and weights.stacked:
            self._stacked = fresh_stack(weights.delta[0])
            wanted_tasks = list(range(batch.num_tasks))
        else:
            wanted_tasks = [weights.delta_tasks[k] for k in wanted_delta]
            self._slots = {t: k for k, t in enumerate(wanted_tasks)}
            self._likes = [weights.delta[k] for k in wanted_delta]
        self._wanted = {t for t in wanted_tasks if t in present and batch.is_open(t)}
        gated = {t for t in present if batch.deltas[t] is not None} if want_gate else set()
        # the tasks that need a weight gradient of their own
        self.alone = self._wanted | gated
        self._held: Tensor | None = None
        if self._stacked is not None:
            for t in range(batch.num_tasks):
                if t not in self._wanted:
                    self._stacked[t].zero_()
        for t, k in self._slots.items():
            if t not in self._wanted:
                self._list[k] = like_parameter(self._likes[k]).zero_()

    def hold(self, grad: Tensor) -> None:
        """One task's weight gradient, or a part of it, until it is spread."""
        if self._held is None:
            self._held = grad
        else:
            # parts of 16-bit samples are rounded once each, their sum is not
            self._held = self._held.to(self.promoted).add_(grad)

    def add_held_to_weight(self) -> None:
        """What is held, over dW alone."""
        grad, self._held = self._held, None
        assert grad is not None
        self._add_to_weight(grad)

    def _add_to_weight(self, grad: Tensor) -> None:
        assert self.weight is not None
        if self._weight_empty:
            self.weight.copy_(grad)
            self._weight_empty = False
        else:
            self.weight.add_(grad)

    def by_direct(
        self, direct: Direct, jobs: Sequence[Job], grad_out: Tensor, x: Tensor, grad_x: Tensor | None
    ) -> None:
        """Jobs of the direct product, which spreads a task's weight gradient over dW, dDelta_t and the gate as it is
        made."""
        tasks = [job.segment.task for job in jobs if job.wants_weight and job.segment.task is not None]
        targets = {t: self._target(t) for t in tasks if t in self._wanted}
        total = self.weight if tasks else None
        direct.backward(jobs, grad_out, x, grad_x, total, not self._weight_empty, targets, self.gate)
        self._weight_empty = self._weight_empty and total is None

    def _target(self, task: int) -> Tensor:
        """Memory for dDelta_t."""
        if self._stacked is not None:
            return self._stacked[task]
        k = self._slots[task]
        self._list[k] = like_parameter(self._likes[k])
        return self._list[k]

    def spread(self, task: int) -> None:
        """What is held, over dW, dDelta_t and the gate."""
        grad, self._held = self._held, None
        assert grad is not None
        if self.weight is not None:
            self._add_to_weight(grad)
        if self.gate is not None:
            delta = self.batch.deltas[task]
            assert delta is not None
            self.gate[task] = (grad.to(self.promoted) * delta.detach().to(self.promoted)).sum()
        if task not in self._wanted:
            return
        gate = self.batch.gate(task)
        if self._stacked is None and gate == 1:
            k = self._slots[task]
            like = self._likes[k]
            if grad.dtype == like.dtype and grad.is_contiguous(memory_format=memory_format(like)):
                # the gradient itself; nobody else holds it
                self._list[k] = grad
                return
        # rounded to the dtype of the weights alone, which may be wider than that of x, or narrower
        target = self._target(task)
        promoted = grad.to(torch.promote_types(grad.dtype, target.dtype))
        if promoted.dtype == target.dtype:
            torch.mul(promoted, gate, out=target)
        else:
            target.copy_(promoted if gate == 1 else promoted * gate)

    def collect(self) -> list[Tensor]:
        out: list[Tensor] = []
        if self.weight is not None:
            if self._weight_empty:
                self.weight.zero_()
            assert self.weights.weight is not None
            out.append(self.weight.to(self.weights.weight.dtype))
        if self._stacked is not None:
            out.append(self._stacked)
        out += [g for g in self._list if g is not None]
        if self.gate is not None:
            assert self.weights.gate is not None
            out.append(self.gate.to(self.weights.gate.dtype))
        return out
