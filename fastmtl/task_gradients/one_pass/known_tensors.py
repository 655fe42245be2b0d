"""What a block knows of each tensor: where it carries the samples, or that it is of the model."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from fastmtl.task_gradients.one_pass.sample_axis import (
    ATTRIBUTE,
    CONSTANT,
    PARAMETER,
    Constant,
    FromParameters,
    PerSample,
    SampleAxis,
    Unknown,
    packed,
    reason,
    unpacked,
    whole,
)
from fastmtl.task_gradients.one_pass.task_ids import TaskIds
from fastmtl.task_gradients.one_pass.tensors import version

# what a tensor of the model is inside the block: the fields of a parameter's `Held`, or () of a constant
OF_MODEL = "_fastmtl_of_model"


# nodes of graphs that torch makes behind the block's back, and what to do about them
_KNOWN_NODES = {
    "CheckpointFunctionBackward": "reentrant checkpointing can't be followed: use_reentrant=False can",
    "BackwardHookFunctionBackward": (
        "a module has a hook of register_full_backward_hook, which can't be followed: remove it for the step, or use a "
        "fastmtl.GradientBank"
    ),
}

# for the first parameter of a bank: tensors from outside that carried no samples of its earlier batches, and how often
# each had been written to by then
_constants_of = WeakIdKeyDictionary()


class Held(NamedTuple):
    """What stands for a parameter of the bank.

    Attributes:
        rows: `[R, ...]` without memory, which receives its rows.
        value: what layers compute with.
        leaf: what calls compute with whose rows need a backward pass per task; None: there are no such.
    """

    rows: Tensor
    value: Tensor
    leaf: Tensor | None


class _Told(tuple[Any, ...]):
    """The value of that attribute: what is copied or saved inside the block takes nothing of it along."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


class KnownTensors:
    """What is known of each tensor inside a block.

    Args:
        task_ids: the task of each sample of the batch.
        batch_dim: which dimension of the tensors that come from outside carries them.
        held: for each parameter of the bank what stands for it.
        constants: tensors of the model that are no samples, whatever their size.
        outside: the task of each sample in tensors from outside, which may be in another order; None: they are not.
    """

    def __init__(
        self,
        task_ids: TaskIds,
        batch_dim: int,
        held: Mapping[Tensor, Held],
        constants: Iterable[Tensor],
        outside: TaskIds | None,
    ) -> None:
        super().__init__()
        self.task_ids, self.batch_dim = task_ids, batch_dim
        self.outside = (task_ids if outside is None else outside).assume(batch_dim)
        # of the batch itself: those that are known, and those that the size of a dimension alone says
        self.whole = (task_ids, self.outside) if self.outside.key == task_ids.key else (task_ids,)
        self.seen = False  # a tensor from outside carried samples
        self._of_model = [(x, _Told()) for x in constants] + [(p, _Told(each)) for p, each in held.items()]
        self._told_before: list[list[Any]] = []
        self._constants: list[weakref.ref[Tensor]] = []  # tensors from outside that carry no samples
        self._constants_before = (
            _constants_of.setdefault(next(iter(held)), WeakIdKeyDictionary()) if held else WeakIdKeyDictionary()
        )
        self._marked: list[weakref.ref[Tensor]] = []

    # what is known of the model's tensors lies on these tensors: a compiled graph is guarded by the attributes of the
    # tensors that a call is given, and not by which key of a dictionary of the mode's such a tensor is, so that one
    # layer's graph would run with another layer's rows

    def attach(self) -> None:
        """Tells the tensors of the model what they are, from the beginning of the block to its end."""
        self._told_before.append([x.__dict__.get(OF_MODEL) for x, _ in self._of_model])
        for x, told in self._of_model:
            setattr(x, OF_MODEL, told)

    def detach(self) -> None:
        """Leaves them as they were: a bank that streams may be applied inside the block of another one."""
        for (x, _), before in zip(self._of_model, self._told_before.pop(), strict=True):
            if before is None:
                x.__dict__.pop(OF_MODEL, None)
            else:
                setattr(x, OF_MODEL, before)

    def held(self, x: Tensor) -> tuple[Any, ...] | None:
        """The fields of `Held` of a parameter of the bank; of other tensors None."""
        return getattr(x, OF_MODEL, None) or None

    def _stays(self, x: Tensor) -> bool:
        """Whether it is a tensor of the model, or another parameter."""
        return isinstance(x, nn.Parameter) or getattr(x, OF_MODEL, None) is not None

    def axis_of(self, x: Tensor) -> SampleAxis:
        """What is known of a tensor."""
        if self.in_bank(x):
            return PARAMETER if torch.is_grad_enabled() else CONSTANT
        found = getattr(x, ATTRIBUTE, None)
        # a tensor that got another graph since is the result of a torch.autograd.Function, whose backward is not seen
        if found is not None and found[0] is self.task_ids and _same_graph(x, found[2]):
            axis = unpacked(*found[1])
            if isinstance(axis, (PerSample, Constant, Unknown)) or x.requires_grad:
                return axis
            if isinstance(axis, FromParameters):
                return CONSTANT
            return Constant(from_samples=reason(axis) or "a number of the whole batch")
        return self._from_outside(x)

    def in_bank(self, x: Tensor) -> bool:
        """Whether it is itself one of the bank's parameters."""
        return self.held(x) is not None

    def _from_outside(self, x: Tensor) -> SampleAxis:
        """Of a tensor that no call inside the block has made."""
        if self._stays(x):
            return CONSTANT
        if torch.compiler.is_compiling():
            if x.requires_grad:
                return Unknown("a call that torch.compile does not show, such as F.pad or a torch.autograd.Function")
        elif x.grad_fn is not None:
            if (way := _KNOWN_NODES.get(type(x.grad_fn).__name__)) is not None:
                return Unknown(way)
            return Unknown(
                f"a tensor of shape {list(x.shape)} was computed outside the block, or by what torch does not show "
                f"(a scripted function, torch.func): {type(x.grad_fn).__name__}; x = bank.samples(x, dim) tells which "
                "dimension carries the samples"
            )
        dim = self.batch_dim + x.dim() if self.batch_dim < 0 else self.batch_dim
        if 0 <= dim < x.dim():
            compiling = torch.compiler.is_compiling()
            if x.shape[dim] != len(self.task_ids):
                if not compiling:
                    self._constants.append(weakref.ref(x))
                    self.mark(x, CONSTANT)
                return CONSTANT
            if compiling or self._constants_before.get(x) != version(x):
                if not compiling:
                    self.seen = True
                return PerSample(dim, self.outside)
        return CONSTANT

    def remember_constants(self) -> None:
        """Tensors from outside that carried no samples of this batch carry none of a batch of another size either, such
        as the last of an epoch, even if one of their dimensions has its number of samples then."""
        for ref in self._constants:
            x = ref()
            if x is not None:
                self._constants_before[x] = version(x)
        self._constants.clear()

    def mark(self, x: Tensor, axis: SampleAxis) -> None:
        """Says what is known of a tensor that was made or written to."""
        if self._stays(x):  # written inside the block: nothing stays on the model
            return
        if isinstance(axis, PerSample):
            size = axis.outer * len(axis.task_ids) * axis.inner
            if not 0 <= axis.axis < x.dim() or x.shape[axis.axis] != size:
                one = len(axis.task_ids) == 1 and x.dim() > 0
                axis = whole(axis, x.shape) if one else Unknown("the axis of the samples was lost")
        setattr(x, ATTRIBUTE, (self.task_ids, packed(axis), _graph(x)))
        if not torch.compiler.is_compiling() and x.grad_fn is None:
            self._marked.append(weakref.ref(x))

    def clear(self) -> None:
        """Leaves nothing on tensors that came from outside."""
        for ref in self._marked:
            x = ref()
            if x is not None:
                x.__dict__.pop(ATTRIBUTE, None)
        self._marked.clear()

    def _is_constant(self, x: Tensor) -> bool:
        """Whether it is known to be no batch: a buffer, a parameter outside the bank, or named by `bank.constant`."""
        found = getattr(x, ATTRIBUTE, None)
        axis = unpacked(*found[1]) if found is not None and found[0] is self.task_ids else CONSTANT
        named = isinstance(axis, Constant) and axis.named
        return named or self._stays(x)


def _graph(x: Tensor) -> Any:
    """What tells the graphs of a tensor apart, without holding one."""
    if torch.compiler.is_compiling():
        return x.requires_grad
    return None if x.grad_fn is None else x.grad_fn._sequence_nr()


def _same_graph(x: Tensor, before: Any) -> bool:
    if before is True or before is False or torch.compiler.is_compiling():  # a compiled graph made or takes it
        return before is not False or not x.requires_grad
    return before == _graph(x)
