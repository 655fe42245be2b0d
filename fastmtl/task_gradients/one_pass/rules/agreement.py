"""Which of the tensors of a call carry samples, and whether they agree: the same samples along the same axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fastmtl.task_gradients.one_pass.sample_axis import PerSample, Unknown
from fastmtl.task_gradients.one_pass.torch_call import TorchCall


class Joined(NamedTuple):
    """The samples on which tensors agree that broadcast against each other.

    Attributes:
        axis: as one of the tensors carries them.
        right: where their axis lies, counted from the right: 1 is the last dimension.
    """

    axis: PerSample
    right: int


def joined(call: TorchCall, tensors: Sequence[Tensor] | None = None) -> Joined | Unknown:
    """Of tensors that broadcast against each other (None: all of the call), at least one of which carries samples."""
    found: Joined | None = None
    for x in call.tensors() if tensors is None else tensors:
        axis = call.axis_of(x)
        if not isinstance(axis, PerSample):
            continue
        right = x.dim() - axis.axis
        if found is None:
            found = Joined(axis, right)
        elif len(axis.task_ids) == 1 and axis.task_ids.key == found.axis.task_ids.key:
            continue  # the one sample of both, wherever it lies
        elif found.right != right:
            return Unknown(
                f"{call.name} joins tensors that carry the samples on different axes; one that only has their number "
                "along batch_dim is told by bank.constant(x)"
            )
        elif not found.axis.agrees(axis):
            return Unknown(f"{call.name} joins different samples")
    assert found is not None
    return found


def input_axis(call: TorchCall) -> PerSample | Unknown:
    """The axis of the first argument, of functions that give its elements another place or work along a dimension."""
    axis = call.axis_of(call.first())
    if isinstance(axis, PerSample):
        return axis
    return Unknown(f"{call.name} of a tensor without samples, and samples among its other arguments")


def only_axis(call: TorchCall) -> PerSample | Unknown:
    """The axis, counted from the left, on which all tensors agree that carry samples."""
    carried = [call.axis_of(x) for x in call.tensors()]
    found = [axis for axis in carried if isinstance(axis, PerSample)]
    for axis in found[1:]:
        if axis.axis != found[0].axis:
            return Unknown(f"{call.name} joins samples along axis {found[0].axis} with samples along axis {axis.axis}")
        if not axis.agrees(found[0]):
            return Unknown(f"{call.name} joins different samples")
    return found[0]


def first_axis(call: TorchCall) -> PerSample | Unknown:
    """As `only_axis`, of functions that take the samples along dimension 0."""
    axis = only_axis(call)
    if isinstance(axis, PerSample) and axis.axis != 0:
        return Unknown(f"{call.name} takes samples along axis 0, but they lie along axis {axis.axis}")
    return axis


def computed_from_samples(call: TorchCall, weights: Sequence[Tensor]) -> bool:
    """Whether one of these tensors of a call was computed from samples, and has not their number by chance."""
    return any(x.requires_grad and call.carries_samples(x) for x in weights)
