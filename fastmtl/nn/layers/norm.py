"""What norms by task share: every tensor of a task begins as the plain layer has it, which is kept beside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastmtl.nn.containers import TaskBuffers, TaskParameters, Tasks
from fastmtl.nn.module import TaskModule, as_parameter

_Norm = TypeVar("_Norm", bound="TaskNorm")
# of a plain layer's tensor `weight`, what tasks begin with is the buffer `first_weight`
_FIRST = "first_"


class TaskNorm(TaskModule):
    """A norm of which each task has all tensors for itself, under the names of the plain layer's.

    What a new task begins with, and what `changed` compares with, are the plain layer's values. They are saved with the
    model, so that a checkpoint of a converted network knows them too; a `state_dict` of the plain layer brings them.
    """

    def __init__(self, tasks: Tasks, parameters: Mapping[str, Tensor | None], buffers: Mapping[str, Tensor]) -> None:
        """`parameters`, `buffers`: first values by the plain layer's names; None: such a parameter it has not."""
        super().__init__(tasks)
        for name, value in (*parameters.items(), *buffers.items()):
            if value is not None:
                self.register_buffer(_FIRST + name, value)
        for name, value in parameters.items():
            self.register_module(name, None if value is None else TaskParameters())
        for name in buffers:
            self.register_module(name, TaskBuffers())
        self._start_tasks()

    def _first(self, child: str) -> Tensor:
        value = self._buffers[_FIRST + child]
        assert value is not None
        return value

    def _start(self, name: str) -> None:
        for child, held in self.containers().items():
            value = self._first(child).detach().clone()
            held[name] = nn.Parameter(value) if isinstance(held, TaskParameters) else value

    def _take(self: _Norm, layer: nn.Module) -> _Norm:
        """Makes the values of a plain layer those that tasks begin with."""
        for child in self.containers():
            value = layer._parameters.get(child, layer._buffers.get(child))
            assert value is not None
            setattr(self, _FIRST + child, value.detach().clone())
        for name in self.tasks:
            self._start(name)
        return self.train(layer.training)

    @torch.no_grad()
    def _refill(self, value_of: Mapping[str, float]) -> None:
        """Fills what is named, for all tasks and those to come."""
        for child, held in self.containers().items():
            if child in value_of:
                for x in (self._first(child), *held.of_tasks(self.tasks)):
                    x.fill_(value_of[child])

    def plain_children(self) -> frozenset[str]:
        # files of before torch counted batches lack the number
        return frozenset(self.containers()) - {"num_batches_tracked"}

    def _read_plain(self, state_dict: dict[str, Any], prefix: str) -> None:
        for child in self.containers():
            key = prefix + _FIRST + child
            if key not in state_dict:
                # of a plain layer; or, as it is here, of a network that was converted elsewhere
                plain = state_dict.get(prefix + child, self._first(child))
                state_dict[key] = plain.detach().clone()
        super()._read_plain(state_dict, prefix)

    @torch.no_grad()
    def changed(self, task: int | str) -> bool:
        return any(
            child != "num_batches_tracked" and not torch.equal(x.to(self._first(child).dtype), self._first(child))
            for child, x in self.part(task).items()
        )

    def kept(self, task: int | str) -> dict[str, Tensor]:
        return {child: x for child, x in super().kept(task).items() if child != "num_batches_tracked"}

    def plain_size(self) -> int:
        held = self.containers().items()
        return sum(self._first(child).numel() for child, of in held if isinstance(of, TaskParameters))

    def _merge_into(self, plain: nn.Module, task: int | str) -> Any:
        """Gives a plain layer the tensors of one task."""
        for child, x in self.part(task).items():
            setattr(plain, child, as_parameter(x) if isinstance(x, nn.Parameter) else x.detach().clone())
        return plain.train(self.training)
