"""What calls are given for the parameters of a bank, and for what was computed from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fastmtl.task_gradients.one_pass.autograd.rows import STACKED
from fastmtl.task_gradients.one_pass.known_tensors import Held, KnownTensors
from fastmtl.task_gradients.one_pass.layers.protocol import Weight
from fastmtl.task_gradients.one_pass.sample_axis import CONSTANT, FromParameters, PerSample, SampleAxis, Unknown
from fastmtl.task_gradients.one_pass.task_ids import TaskIds
from fastmtl.task_gradients.one_pass.tensors import nested
from fastmtl.task_gradients.one_pass.torch_call import TorchCall
from fastmtl.task_gradients.one_pass.torch_names import name_of


class ParameterRows(KnownTensors):
    """Hands out what receives the rows of a parameter, and counts its uses.

    Args:
        bounded: what was computed from parameters keeps its graph beside the samples.
    """

    def __init__(
        self,
        task_ids: TaskIds,
        batch_dim: int,
        held: Mapping[Tensor, Held],
        constants: Iterable[Tensor],
        outside: TaskIds | None,
        bounded: bool,
    ) -> None:
        super().__init__(task_ids, batch_dim, held, constants, outside)
        self.bounded = bounded
        self.running = False  # a backward pass
        self.looped: dict[Tensor, bool] = {}  # whose rows need a backward pass per task
        self.met: dict[Tensor, list[TaskIds]] = {}  # which parts of the batch each parameter saw; () all of it
        self.of_all: set[int] = set()  # ids of parameters that saw the whole batch on a short way
        self.uses: dict[int, int] = {}  # by the id of a parameter
        self._unbound: dict[Tensor, tuple[Tensor, ...]] = {}

    def weight(self, p: Tensor) -> Weight:
        """A parameter of the bank, what was computed from some, or a tensor with its own gradient."""
        held = self.held(p)
        if held is not None:
            rows, value, _ = held
            self._use(p)
            return Weight(value, STACKED, (rows,))
        if not isinstance(self.axis_of(p), FromParameters):
            return Weight(p, 0, ())
        value = p if self.bounded else p.detach()
        return Weight(value, self.task_ids.num_rows, self._copies(p))

    def _use(self, p: Tensor) -> None:
        """Rows of a parameter arrive from each of its uses; those of a recomputation are no more of them."""
        if not torch.compiler.is_compiling() and not self.running:
            self.uses[id(p)] = self.uses.get(id(p), 0) + 1

    def use(self, p: Tensor) -> None:
        """A parameter of the bank meets the whole batch on a short way."""
        self.of_all.add(id(p))
        self._use(p)

    def _copies(self, p: Tensor) -> tuple[Tensor, ...]:
        """For each row a copy of a parameter; of what was computed from some, computed again from their copies."""
        held = self.held(p)
        if held is not None:
            found = None if torch.compiler.is_compiling() else self._unbound.get(p)
            if found is None:
                self._use(p)
                found = held[0].unbind(0)
                if not torch.compiler.is_compiling():
                    self._unbound[p] = found
            return found
        return self._copies_by(self._recipe_of(p))

    def _copies_by(self, axis: FromParameters) -> tuple[Tensor, ...]:
        """As `_copies`, of what was computed like that."""
        recipe = axis.recipe
        assert recipe is not None
        if recipe.copies is None:
            if not recipe.still_holds():
                raise RuntimeError(
                    f"one_pass: what {name_of(recipe.func)} computed from parameters can't be computed again: a "
                    "constant beside them was changed in place since"
                )
            copies = [self._copies(x) if known.recipe is None else self._copies_by(known)
                      for x, known in recipe.sources()]  # fmt: skip
            recipe.copies = [nested(recipe.again([c[r] for c in copies])) for r in range(self.task_ids.num_rows)]
        return tuple(row[axis.result] for row in recipe.copies)

    def _recipe_of(self, p: Tensor) -> FromParameters:
        """Of what was computed from parameters: how."""
        axis = self.axis_of(p)
        assert isinstance(axis, FromParameters)
        return axis

    def _leaf(self, x: Tensor) -> Tensor:
        """A parameter's leaf for such passes, or what was computed from parameters, from theirs."""
        held = self.held(x)
        if held is not None:
            self.looped[x] = True
            return held[2]
        axis = self.axis_of(x)
        return self._leaf_by(axis) if isinstance(axis, FromParameters) else x

    def _leaf_by(self, axis: FromParameters) -> Tensor:
        recipe = axis.recipe
        assert recipe is not None
        sources = [self._leaf(x) if known.recipe is None else self._leaf_by(known) for x, known in recipe.sources()]
        return nested(recipe.again(sources))[axis.result]

    def _axis_beside_leaves(self, x: Tensor) -> SampleAxis:
        axis = self.axis_of(x)
        leaf = isinstance(axis, FromParameters) or (isinstance(axis, Unknown) and x.grad_fn is not None)
        return CONSTANT if leaf else axis

    def _note(self, call: TorchCall) -> None:
        """Which samples the parameters meet here."""
        tensors = call.tensors()
        axes = [self.axis_of(x) for x in tensors]
        parts = [axis.task_ids for axis in axes if isinstance(axis, PerSample)]
        for x, axis in zip(tensors, axes, strict=True):
            if isinstance(axis, FromParameters):
                for leaf in self._leaves(x):
                    self.met.setdefault(leaf, []).extend(parts)

    def _leaves(self, p: Tensor) -> list[Tensor]:
        """The parameters that something was computed from."""
        axis = self.axis_of(p)
        return _leaves_by(p, axis) if isinstance(axis, FromParameters) else []


def _leaves_by(p: Tensor, axis: FromParameters) -> list[Tensor]:
    if axis.recipe is None:
        return [p]
    return [leaf for x, known in axis.recipe.sources() for leaf in _leaves_by(x, known)]
