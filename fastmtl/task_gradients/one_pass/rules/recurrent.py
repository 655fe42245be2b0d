"""LSTM, GRU and RNN layers, their cells, and the packed sequences that they take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmtl.task_gradients.one_pass.rules.agreement import computed_from_samples, first_axis, input_axis
from fastmtl.task_gradients.one_pass.sample_axis import CONSTANT, Axes, MixedSamples, PerSample, Unknown
from fastmtl.task_gradients.one_pass.task_ids import TaskIds
from fastmtl.task_gradients.one_pass.tensors import nested
from fastmtl.task_gradients.one_pass.torch_call import Rule, TorchCall


def _layer(call: TorchCall) -> Axes:
    """lstm, gru, rnn: outputs as the input, states `[layers, n, hidden]`."""
    x, axis = call.args[0], input_axis(call)
    if isinstance(axis, Unknown):
        return axis
    if x.dim() == 2:
        whole = _batch_of(axis, call.args[1])
        if whole is None:
            return Unknown(f"{call.name} of packed sequences that were put together otherwise than by torch")
        of_states, state, weights = PerSample(1, whole), call.args[2], call.args[3]
    else:
        if axis.axis != (0 if call.args[8] else 1):  # batch_first
            return MixedSamples(f"{call.name} runs along the axis of the samples")
        of_states, state, weights = axis.at(1), call.args[1], call.args[2]
    for each in nested((state,)):
        own = call.axis_of(each)
        if isinstance(own, PerSample) and (own.axis != 1 or not own.agrees(of_states)):
            return Unknown(f"{call.name} with states of other samples, or along another axis than 1")
    if computed_from_samples(call, nested((weights,))):
        return Unknown(f"{call.name} with weights that were computed from samples")
    return [axis, *[of_states] * (len(nested(call.out)) - 1)]


def _cell(call: TorchCall) -> Axes:
    """One step: input, state and weights."""
    if computed_from_samples(call, nested((call.args[2:], call.kwargs))):
        return Unknown(f"{call.name} with weights that were computed from samples")
    return first_axis(call)


# --- packed sequences: of each step those samples that are not over yet, which are the first ones


def _steps(sizes: Tensor) -> tuple[Any, ...]:
    """Tells apart how many samples there are in each step."""
    return ("packed", *sizes.tolist())


def _batch_of(axis: PerSample, sizes: Any) -> TaskIds | None:
    """The batch whose sequences were packed like that; None: it can't be told."""
    ids = axis.task_ids
    plain = axis.axis == 0 and axis.outer == axis.inner == 1 and isinstance(sizes, Tensor)
    if not plain or torch.compiler.is_compiling() or ids.parent is None:
        return None
    return ids.parent if ids.key == (*ids.parent.key, _steps(sizes)) else None


def _pack(call: TorchCall) -> Axes:
    axis = input_axis(call)
    if isinstance(axis, Unknown):
        return axis
    if axis.axis != (0 if call.argument(2, "batch_first") else 1) or axis.outer * axis.inner != 1:
        return Unknown("sequences packed along the axis of the samples")
    if torch.compiler.is_compiling():
        return Unknown("packed sequences, in a compiled model")
    sizes = call.out[1]
    index = torch.cat([torch.arange(n) for n in sizes.tolist()]).to(axis.task_ids.ids.device)
    return [PerSample(0, axis.task_ids.take(index, _steps(sizes))), CONSTANT]


def _pad(call: TorchCall) -> Axes:
    axis = input_axis(call)
    if isinstance(axis, Unknown):
        return axis
    whole = _batch_of(axis, call.argument(1, "batch_sizes"))
    if whole is None:
        return Unknown("packed sequences that were put together otherwise than by torch")
    return [PerSample(0 if call.argument(2, "batch_first") else 1, whole), PerSample(0, whole)]


RULES: dict[str, Rule] = {
    **dict.fromkeys(("lstm", "gru", "rnn"), _layer),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), _cell),
    "_pack_padded_sequence": _pack,
    "_pad_packed_sequence": _pad,
}
