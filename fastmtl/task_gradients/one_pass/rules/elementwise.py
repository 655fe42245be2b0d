"""Functions of single elements, which broadcast: the samples stay where they are, counted from the right."""

from __future__ import annotations

from fastmtl.task_gradients.one_pass.rules.agreement import joined, only_axis
from fastmtl.task_gradients.one_pass.sample_axis import CONSTANT, Axes, Unknown
from fastmtl.task_gradients.one_pass.tensors import nested
from fastmtl.task_gradients.one_pass.torch_call import Rule, TorchCall
from fastmtl.task_gradients.one_pass.torch_names import POINTWISE


def pointwise(call: TorchCall) -> Axes:
    found = joined(call)
    if isinstance(found, Unknown):
        return found
    results = nested(call.out)
    if not results:
        return CONSTANT
    return found.axis.at(results[0].dim() - found.right)


def _same(call: TorchCall) -> Axes:
    """One input that carries samples, which keep their axis, counted from the left."""
    return only_axis(call)


def _bucketize(call: TorchCall) -> Axes:
    if any(map(call.carries_samples, call.tensors()[1:])):
        return Unknown("bucketize by boundaries that carry samples")
    return only_axis(call)


RULES: dict[str, Rule] = {
    **dict.fromkeys(POINTWISE, pointwise),
    "bucketize": _bucketize,
    # of fastmtl.nn
    "scaled_by_gate": pointwise,
    # a new last dimension comes behind all others
    **dict.fromkeys(("_assert", "_assert_async", "retain_grad", "view_as_real"), _same),
}
