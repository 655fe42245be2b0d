"""What `convert` makes of a layer, by kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

from fastmtl.nn.containers import Tasks
from fastmtl.nn.layers.attention import TaskMultiheadAttention
from fastmtl.nn.layers.batch_norm import TaskBatchNorm2d
from fastmtl.nn.layers.conv import TaskConv2d
from fastmtl.nn.layers.conv1d import TaskConv1D, conv1d_class
from fastmtl.nn.layers.embedding import TaskEmbedding
from fastmtl.nn.layers.gate import TapsGate
from fastmtl.nn.layers.hypergrid import TaskHyperGrid
from fastmtl.nn.layers.linear import TaskLinear
from fastmtl.nn.layers.modulator import TaskModulator
from fastmtl.nn.layers.norms import TaskLayerNorm, TaskRMSNorm, is_rms_norm

Make = Callable[..., nn.Module]


class Kind(NamedTuple):
    """One way to give tasks parts of their own."""

    layers: Mapping[str, Make]  # of the layers that `where` counts, by what they are (see `what`)
    norms: Mapping[str, Make]  # of those that go with the layers around them
    options: Mapping[str, Any]  # what `convert` takes beside, with the usual values
    freezes: bool  # whether shared parameters are not trained, unless asked for
    asked: Mapping[str, Make]  # of layers that are converted where they are named alone


def what(module: nn.Module) -> str | None:
    """What kind of layer a module is to `convert`; None: none that it knows."""
    kind = conv1d_class()
    if kind is not None and isinstance(module, kind):
        return "Conv1D"
    if is_rms_norm(module):
        return "RMSNorm"
    for base in (nn.Conv2d, nn.Linear, nn.MultiheadAttention, nn.Embedding, nn.BatchNorm2d, nn.LayerNorm):
        if isinstance(module, base):
            if base is nn.Conv2d and module.groups > 1:
                return "depthwise" if module.groups == module.in_channels else "grouped"
            return base.__name__
    return None


_CONVS = {"Conv2d": TaskConv2d, "grouped": TaskConv2d, "depthwise": TaskConv2d}
_LINEARS = {"Linear": TaskLinear, "Conv1D": TaskConv1D, "MultiheadAttention": TaskMultiheadAttention}


def _weights(**given: Any) -> dict[str, Make]:
    """Layers with per-task weights, made with these options and those of the call."""

    def make(kind: Any) -> Make:
        return lambda layer, tasks, **options: kind.from_layer(layer, tasks, **given, **options)

    return {name: make(kind) for name, kind in (_CONVS | _LINEARS).items()}


def _by(kind: Any, **given: Any) -> Make:
    def make(layer: nn.Module, tasks: Tasks, **options: Any) -> nn.Module:
        return kind.from_layer(layer, tasks, **given)

    return make


def _taps(layer: nn.Module, tasks: Tasks, *, threshold: float, start: float, **options: Any) -> nn.Module:
    gate = TapsGate(threshold, start)
    name = what(layer)
    assert name is not None
    return (_CONVS | _LINEARS)[name].from_layer(layer, tasks, gate=gate, **options)


def _embedding(layer: nn.Module, tasks: Tasks, *, gate: Any = None, **options: Any) -> nn.Module:
    return TaskEmbedding.from_layer(layer, tasks, gate=gate)


def _taps_embedding(layer: nn.Module, tasks: Tasks, *, threshold: float, start: float, **options: Any) -> nn.Module:
    return TaskEmbedding.from_layer(layer, tasks, gate=TapsGate(threshold, start))


_BATCH_NORM = {"BatchNorm2d": _by(TaskBatchNorm2d)}
_NORMS = {**_BATCH_NORM, "LayerNorm": _by(TaskLayerNorm), "RMSNorm": _by(TaskRMSNorm)}
_SEPARATE = {name: _by(kind, shared=False) for name, kind in (_CONVS | _LINEARS).items()}
_LORA = {name: make for name, make in _weights().items() if name not in ("grouped", "depthwise")}

KINDS: dict[str, Kind] = {
    "taps": Kind(
        dict.fromkeys(_CONVS | _LINEARS, _taps),
        _BATCH_NORM,
        {"threshold": 0.1, "start": 0.15, "rank": None, "scaling": 1.0, "per_task_bias": False},
        True,
        {"Embedding": _taps_embedding},
    ),
    "dense": Kind(_weights(), {}, {"gate": None, "per_task_bias": False}, False, {"Embedding": _embedding}),
    "lora": Kind(_LORA, {}, {"rank": 8, "scaling": 1.0, "gate": None, "per_task_bias": False}, True, {}),
    "patch": Kind({**_NORMS, "depthwise": _by(TaskConv2d, shared=False)}, {}, {}, True, {}),
    "separate": Kind(_SEPARATE, _NORMS, {}, False, {"Embedding": _by(TaskEmbedding, shared=False)}),
    # `convert` itself freezes, once all layers are made
    "modulator": Kind(
        {name: _by(TaskModulator, joint=True) for name in (*_CONVS, "Linear", "Conv1D")}, _BATCH_NORM, {}, True, {}
    ),
    "hypergrid": Kind(
        {
            name: lambda layer, tasks, **options: TaskHyperGrid.from_layer(layer, tasks, **options)
            for name in ("Conv2d", "grouped", "depthwise", "Linear", "Conv1D")
        },
        {},
        {"grid": None},
        False,
        {},
    ),
}
