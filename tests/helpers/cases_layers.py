"""The table of the layers of `fastmtl.nn`: how each is made, and what one sample is through plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmtl.nn import (
    TapsGate,
    TaskBatchNorm2d,
    TaskConv1D,
    TaskConv2d,
    TaskEmbedding,
    TaskHeads,
    TaskHyperGrid,
    TaskLayerNorm,
    TaskLinear,
    TaskModulator,
    TaskMultiheadAttention,
    TaskRMSNorm,
    TaskScaleShift,
    tasks,
)
from fastmtl.parameters import is_per_task

NAMES = ["photo", "sketch", "clipart"]
IDS = torch.tensor([2, 0, 1, 0, 2])

Plain = Callable[[nn.Module, str, Tensor], Tensor]


@dataclass(frozen=True)
class LayerCase:
    """A layer, its inputs, and what it computes for one sample of a task, written down in plain torch."""

    make: Callable[[], nn.Module]  # in float32, as it is at first
    x: Callable[[], Tensor]  # of the samples of IDS, in float64
    one: Plain  # (layer, task's name, one sample as a batch of 1): differentiable in the layer's parameters
    plain: Callable[[], nn.Module] | None = None  # the layer that it begins as, whose state_dict it reads
    from_plain: Callable[[nn.Module], nn.Module] | None = None
    tokens: bool = False  # whether ids may be [N, L]
    merges: bool = True
    call: Callable[[nn.Module, Tensor], Tensor] = field(default=lambda layer, x: layer(x))


def filled(layer: nn.Module, dtype: torch.dtype | None = torch.float64) -> nn.Module:
    """The layer with random numbers in every parameter; a TAPS score is on either side of its threshold."""
    layer = layer if dtype is None else layer.to(dtype)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            p.copy_(torch.randn(p.shape) * (0.5 if p.dim() > 1 else 1))
            if ".row." in f".{name}" or ".column." in f".{name}":
                p.mul_(2)
        for name, x in layer.named_buffers():
            if "running" in name and "._" not in f".{name}":
                x.copy_(torch.rand(x.shape) + 0.5)
        for child in layer.modules():
            if getattr(child, "taps", None) is not None:
                for k, score in enumerate(child.gate.values()):
                    score.fill_(0.05 if k == 0 else 0.3)
    return layer


# --- what a task sees, in plain torch


def gate_of(layer: nn.Module, name: str) -> Tensor | float:
    if layer.gate is None:
        return 1.0
    score = layer.gate[name]
    if layer.taps is None:
        return score
    return (score >= 0.1).to(score.dtype) + score - score.detach()


def weight_of(layer: nn.Module, name: str) -> Tensor:
    if not layer.shared:
        return layer.delta[name]
    if layer.delta is not None:
        return layer.weight + gate_of(layer, name) * layer.delta[name]
    down, up = layer.A[name].flatten(1), layer.B[name].flatten(1)
    product = (up @ down).t() if isinstance(layer, TaskConv1D) else (up @ down).view(layer.weight.shape)
    return layer.weight + layer.scaling * gate_of(layer, name) * product


def bias_of(layer: nn.Module, name: str) -> Tensor | None:
    if layer.task_bias is None:
        return layer.bias
    return layer.task_bias[name] if layer.bias is None else layer.bias + layer.task_bias[name]


def conv(layer: nn.Module, name: str, x: Tensor) -> Tensor:
    geometry = layer.stride, layer.padding, layer.dilation, layer.groups
    return F.conv2d(x, weight_of(layer, name), bias_of(layer, name), *geometry)


def linear(layer: nn.Module, name: str, x: Tensor) -> Tensor:
    return F.linear(x, weight_of(layer, name), bias_of(layer, name))


def conv1d(layer: nn.Module, name: str, x: Tensor) -> Tensor:
    return x @ weight_of(layer, name) + bias_of(layer, name)


def embedding(layer: nn.Module, name: str, x: Tensor) -> Tensor:
    return F.embedding(x, weight_of(layer, name), layer.padding_idx)


def layer_norm(layer: nn.Module, name: str, x: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias[name]
    return F.layer_norm(x, layer.normalized_shape, layer.weight[name], bias, layer.eps)


def rms_norm(layer: nn.Module, name: str, x: Tensor) -> Tensor:
    return F.rms_norm(x, layer.normalized_shape, layer.weight[name], layer.eps)


def batch_norm(layer: nn.Module, name: str, x: Tensor) -> Tensor:
    """In evaluation, where a sample does not depend on the others."""
    held = (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    return F.batch_norm(x, *(tensors[name] for tensors in held), eps=layer.eps)


def scale_shift(layer: nn.Module, name: str, x: Tensor) -> Tensor:
    spread = (-1, *(1,) * (x.dim() - 2))
    return x * layer.scale[name].view(spread) + layer.shift[name].view(spread)


def head(layer: nn.Module, name: str, x: Tensor) -> Tensor:
    y = layer.heads[name](x)
    return F.pad(y, (0, 5 - y.shape[-1]), value=-7.0) if layer.output == "padded" else y


def attention(layer: nn.Module, name: str, x: Tensor) -> Tensor:
    weights = torch.cat([weight_of(inner, name) for inner in (layer.q_proj, layer.k_proj, layer.v_proj)])
    biases = [bias_of(inner, name) for inner in (layer.q_proj, layer.k_proj, layer.v_proj)]
    turned = x.transpose(0, 1)
    y, _ = F.multi_head_attention_forward(
        turned, turned, turned, layer.embed_dim, layer.num_heads, weights, torch.cat(biases), None, None, False, 0.0,
        weight_of(layer.out_proj, name), bias_of(layer.out_proj, name), need_weights=False,
    )  # fmt: skip
    return y.transpose(0, 1)


def around(layer: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    if layer.kind == "Conv2d":
        return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    return x @ (weight if layer.kind == "Conv1D" else weight.t())


def with_bias(layer: nn.Module, y: Tensor) -> Tensor:
    if layer.bias is None:
        return y
    return y + (layer.bias[:, None, None] if layer.kind == "Conv2d" else layer.bias)


def modulator(layer: nn.Module, name: str, x: Tensor) -> Tensor:
    v, g = layer.v[name], layer.g[name]
    mixing = g[:, None] * v / v.square().sum(1, keepdim=True).sqrt()
    y = around(layer, layer.weight, x)
    return with_bias(layer, torch.einsum("oc,nc...->no..." if layer.kind == "Conv2d" else "oc,n...c->n...o", mixing, y))


def hypergrid(layer: nn.Module, name: str, x: Tensor) -> Tensor:
    rows, columns = (2 / (1 + torch.exp(-held[name])) for held in (layer.row, layer.column))
    w = layer.weight
    out, into = w.shape[:2] if layer.kind != "Conv1D" else w.shape[::-1]
    into = into * (layer.groups if layer.kind == "Conv2d" else 1)
    scale_out = torch.stack([rows[o * len(rows) // out] for o in range(out)])
    scale_in = torch.stack([columns[i * len(columns) // into] for i in range(into)])
    if layer.kind == "Conv2d":
        each = into // layer.groups
        seen = torch.stack([scale_in[(o * layer.groups // out) * each :][:each] for o in range(out)])
        w = w * (scale_out[:, None] * seen)[..., None, None]
    else:
        grid = scale_out[:, None] * scale_in
        w = w * (grid.t() if layer.kind == "Conv1D" else grid)
    return with_bias(layer, around(layer, w, x))


# --- the table


def transformers_conv1d(out: int = 6, into: int = 4) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(out, into)


def picture() -> Tensor:
    return torch.randn(len(IDS), 4, 7, 6, dtype=torch.float64)


def rows() -> Tensor:
    return torch.randn(len(IDS), 3, 4, dtype=torch.float64)


def words() -> Tensor:
    return torch.randint(0, 9, (len(IDS), 6)).index_fill(1, torch.tensor([2]), 1)


TAPS = TapsGate()
RANKS = {"photo": 1, "sketch": 3, "clipart": 2}
GEOMETRY: dict[str, Any] = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}


def _of_weights(kind: Any, plain: Any, x: Any, one: Plain, options: dict[str, Any], **more: Any) -> LayerCase:
    return LayerCase(
        make=lambda: kind.from_layer(plain(), NAMES, **options),
        x=x,
        one=one,
        plain=plain,
        from_plain=lambda layer: kind.from_layer(layer, NAMES, **options),
        **more,
    )


def _weights() -> dict[str, LayerCase]:
    found = {}
    ways: dict[str, dict[str, Any]] = {
        "dense": {},
        "gate": {"gate": 0.5},
        "taps": {"gate": TAPS},
        "bias": {"per_task_bias": True},
        "rank": {"rank": 2, "scaling": 0.5},
        "ranks": {"rank": RANKS, "gate": 1.5, "per_task_bias": True},
        "separate": {"shared": False},
    }
    for way, options in ways.items():
        found[f"conv_{way}"] = _of_weights(TaskConv2d, lambda: nn.Conv2d(4, 6, 3, **GEOMETRY), picture, conv, options)
        found[f"linear_{way}"] = _of_weights(TaskLinear, lambda: nn.Linear(4, 6), rows, linear, options, tokens=True)
        found[f"conv1d_{way}"] = _of_weights(TaskConv1D, transformers_conv1d, rows, conv1d, options, tokens=True)
    found["conv_grouped"] = _of_weights(
        TaskConv2d, lambda: nn.Conv2d(4, 6, 3, padding="same", groups=2, bias=False), picture, conv, {"gate": TAPS}
    )
    found["conv_depthwise"] = _of_weights(
        TaskConv2d, lambda: nn.Conv2d(4, 4, 3, groups=4), picture, conv, {"shared": False}
    )
    found["linear_no_bias"] = _of_weights(
        TaskLinear, lambda: nn.Linear(4, 6, bias=False), rows, linear, {"shared": False}, tokens=True
    )
    for way in ("dense", "gate", "taps", "separate"):
        found[f"embedding_{way}"] = _of_weights(
            TaskEmbedding, lambda: nn.Embedding(9, 4, padding_idx=1), words, embedding, ways[way], tokens=True
        )
    for way in ("dense", "taps", "bias", "rank", "separate"):
        found[f"attention_{way}"] = _of_weights(
            TaskMultiheadAttention, lambda: nn.MultiheadAttention(4, 2, batch_first=True), rows, attention, ways[way],
            tokens=True, call=lambda layer, x: layer(x, x, x, need_weights=False)[0],
        )  # fmt: skip
    return found


def _norms() -> dict[str, LayerCase]:
    return {
        "layer_norm": _of_weights(TaskLayerNorm, lambda: nn.LayerNorm(4), rows, layer_norm, {}, tokens=True),
        "layer_norm_two": _of_weights(TaskLayerNorm, lambda: nn.LayerNorm((3, 4)), rows, layer_norm, {}),
        "layer_norm_no_bias": _of_weights(
            TaskLayerNorm, lambda: nn.LayerNorm(4, 1e-3, bias=False), rows, layer_norm, {}, tokens=True
        ),
        "rms_norm": _of_weights(TaskRMSNorm, lambda: nn.RMSNorm(4), rows, rms_norm, {}, tokens=True),
        "batch_norm": _of_weights(TaskBatchNorm2d, lambda: nn.BatchNorm2d(4).eval(), picture, batch_norm, {}),
        "scale_shift": LayerCase(lambda: TaskScaleShift(4, NAMES), picture, scale_shift, merges=False),
        "scale_shift_rows": LayerCase(
            lambda: TaskScaleShift(4, NAMES), lambda: rows()[:, 0], scale_shift, merges=False
        ),
    }


def _heads() -> dict[str, LayerCase]:
    sizes = {"photo": 3, "sketch": 5, "clipart": 2}
    return {
        "heads": LayerCase(
            lambda: TaskHeads(4, dict.fromkeys(NAMES, 5)), rows, head, lambda: nn.Linear(4, 5),
            lambda plain: TaskHeads.from_layer(plain, NAMES), tokens=True,
        ),
        "heads_no_bias": LayerCase(
            lambda: TaskHeads(4, dict.fromkeys(NAMES, 5), bias=False), rows, head, lambda: nn.Linear(4, 5, bias=False),
            lambda plain: TaskHeads.from_layer(plain, NAMES), tokens=True,
        ),
        "heads_padded": LayerCase(
            lambda: TaskHeads(4, sizes, output="padded", fill=-7.0), rows, head, tokens=True, merges=False
        ),
        "heads_modules": LayerCase(
            lambda: TaskHeads.from_modules(
                {t: nn.Sequential(nn.Linear(4, 3 + k), nn.Tanh(), nn.Linear(3 + k, 5)) for k, t in enumerate(NAMES)}
            ),
            rows, head, tokens=True,
        ),
    }  # fmt: skip


def _around() -> dict[str, LayerCase]:
    found = {}
    for name, kind, one, options in (
        ("modulator", TaskModulator, modulator, {"joint": True}),
        ("hypergrid", TaskHyperGrid, hypergrid, {}),
    ):
        found[f"{name}_conv"] = _of_weights(kind, lambda: nn.Conv2d(4, 6, 3, **GEOMETRY), picture, one, options)
        found[f"{name}_grouped"] = _of_weights(
            kind, lambda: nn.Conv2d(4, 6, 3, groups=2, padding="same", bias=False), picture, one, options
        )
        found[f"{name}_linear"] = _of_weights(kind, lambda: nn.Linear(4, 6), rows, one, options, tokens=True)
        found[f"{name}_conv1d"] = _of_weights(kind, transformers_conv1d, rows, one, options, tokens=True)
    found["hypergrid_coarse"] = _of_weights(
        TaskHyperGrid, lambda: nn.Conv2d(4, 6, 3, groups=2), picture, hypergrid, {"grid": (3, 2)}
    )
    return found


CASES: dict[str, LayerCase] = {**_weights(), **_norms(), **_heads(), **_around()}


def by_hand(case: LayerCase, layer: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
    """Each sample (of ids [N, L]: each token) on its own through plain torch."""
    if ids.dim() == 1:
        found = [case.one(layer, layer.tasks[t], x[k : k + 1]) for k, t in enumerate(ids.tolist())]
        return torch.cat(found)
    flat = x.flatten(0, 1)
    found = [case.one(layer, layer.tasks[t], flat[k : k + 1]) for k, t in enumerate(ids.flatten().tolist())]
    return torch.cat(found).unflatten(0, ids.shape)


def tolerance_of(dtype: torch.dtype, size: float) -> dict[str, float]:
    """Of a result whose largest number is `size`, after a few roundings."""
    unit = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    return {"rtol": 8 * unit, "atol": 8 * unit * max(size, math.ulp(0.0))}


# --- what the tests of layers share

ALL = pytest.mark.parametrize("name", CASES)
TOKENS = pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.tokens])
MERGED = pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.merges])
PLAIN = pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.plain is not None])


def made(name: str) -> tuple[LayerCase, nn.Module, Tensor]:
    case = CASES[name]
    return case, filled(case.make()), case.x()


def call(case: LayerCase, layer: nn.Module, x: Tensor, ids: Any, **options: Any) -> Tensor:
    with tasks(ids, **options):
        return case.call(layer, x)


def own(layer: nn.Module) -> set[str]:
    """The names of the parameters that belong to single tasks."""
    return {name for name, p in layer.named_parameters() if is_per_task(p)}


def assert_same_gradients(case: LayerCase, layer: nn.Module, x: Tensor, ids: Tensor, y: Tensor) -> None:
    expected = by_hand(case, layer, x, ids)
    torch.testing.assert_close(y, expected)
    g = torch.randn_like(y)
    wanted = {"x": x} if x.requires_grad else {}
    wanted.update(layer.named_parameters())
    found = torch.autograd.grad(y, list(wanted.values()), g, allow_unused=True)
    other = torch.autograd.grad(expected, list(wanted.values()), g, allow_unused=True)
    for key, a, b in zip(wanted, found, other, strict=True):
        assert (a is None) == (b is None), f"{key}: {a}, {b}"
        if a is not None:
            torch.testing.assert_close(a, b, msg=lambda text, key=key: f"{key}: {text}")
