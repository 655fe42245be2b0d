"""Loss functions: a loss for each sample, or their sum or mean."""

from __future__ import annotations

from fastmtl.task_gradients.one_pass.rules.agreement import joined, only_axis
from fastmtl.task_gradients.one_pass.sample_axis import SAMPLE_SUM, Axes, MixedSamples, Unknown
from fastmtl.task_gradients.one_pass.torch_call import Rule, TorchCall
from fastmtl.task_gradients.one_pass.torch_names import ELEMENTWISE_LOSSES, LOSSES


def _loss(call: TorchCall) -> Axes:
    name, x, out = call.name, call.first(), call.out
    summed = out.dim() == 0 and x.dim() > 0
    if name in ELEMENTWISE_LOSSES:
        found = joined(call)
        if isinstance(found, Unknown):
            return found
        return SAMPLE_SUM if summed else found.axis.at(out.dim() - found.right)
    axis = only_axis(call)
    if isinstance(axis, Unknown):
        return axis
    if x.dim() < (3 if name == "ctc_loss" else 2):
        return MixedSamples(f"{name} of a single sample takes the axis of the samples for its classes")
    if axis.axis != (1 if name == "ctc_loss" else 0):
        return Unknown(f"{name} takes samples along its first axis, but they lie along axis {axis.axis}")
    return SAMPLE_SUM if summed else axis.at(0)


RULES: dict[str, Rule] = dict.fromkeys(LOSSES, _loss)
