"""Suite `conv`: a mixed-task batch through per-task weights, on layers of ResNet-18, ResNet-50 and ViT-B."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.benchmarks.baselines import conv as baselines
from fastmtl.benchmarks.runner.registry import Candidate, Case, Check
from fastmtl.benchmarks.suites import conv_low_rank
from fastmtl.benchmarks.suites.conv_check import Oracle, largest
from fastmtl.benchmarks.suites.conv_parts import batch_norm_case, plan_case, scale_shift_case, weight_grad_case
from fastmtl.benchmarks.suites.conv_shapes import LAYERS, Batch, Spec
from fastmtl.benchmarks.tuning.probes import WAYS
from fastmtl.ops.task_weights.cpu.ways import watching
from fastmtl.tuning.search import use_table
from fastmtl.tuning.table import uniform

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# a weight per sample is not tried above this
MOST_PER_SAMPLE_BYTES = 1 << 30


# --- calls: a layer's forward made into what is timed


Forward = Callable[[Batch], Tensor]


def ours(b: Batch, stacked: bool = False) -> Tensor:
    delta = b.stacked if stacked else b.deltas
    if b.layer.linear:
        return ops.task_linear(b.x, b.weight, delta, b.plan, gate=b.gate)
    return ops.task_conv2d(b.x, b.weight, delta, b.plan, gate=b.gate, stride=b.layer.stride, padding=b.layer.padding)


def leaves(b: Batch, label: str, stacked: bool) -> list[Tensor]:
    """What a candidate's backward gives gradients for."""
    if label == "shared":
        return [b.x, b.weight]
    one = label in ("stacked", "grouped", "vmap", "groupedmm") or (label == "ours" and stacked)
    return [b.x, b.weight, *([b.stacked] if one else b.deltas), *([b.gate] if b.gate_grad else [])]


@dataclass
class Recorded:
    """A batch that went forward, ready for its backward."""

    y: Tensor
    leaves: list[Tensor]
    grad_out: Tensor


def backward(r: Recorded) -> tuple[Tensor | None, ...]:
    # a delta that nothing reached has no gradient
    return torch.autograd.grad(r.y, r.leaves, r.grad_out, allow_unused=True)


def _calls(spec: Spec, label: str, forward: Forward) -> Callable[[Any], Any]:
    if spec.direction == "forward":
        return forward
    if spec.direction == "backward":
        return backward

    def both(b: Batch) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        y = forward(b)
        return y, backward(Recorded(y, leaves(b, label, spec.stacked), b.grad_out))

    return both


def _forwards(spec: Spec) -> dict[str, tuple[Forward, str]]:
    given = "one tensor" if spec.stacked else "a list"
    found: dict[str, tuple[Forward, str]] = {
        "ours": (partial(ours, stacked=spec.stacked), f"fastmtl.ops, deltas as {given}, plan given"),
        "shared": (baselines.shared, "one shared weight for all"),
    }
    labels = ["loop", *([] if spec.sort else ["loop_permuted"])]
    # with many tasks it takes many seconds, and masks do not care for order
    labels += ["stacked"] if not spec.sort or spec.num_tasks <= 8 else []
    if spec.per_sample and not spec.packed:
        labels += ["vmap"] if spec.layer.linear else ["grouped", "vmap"]
    if spec.layer.linear:
        labels += ["groupedmm", "adapter"]
    return found | {label: baselines.BASELINES[label] for label in labels}


def _candidates(spec: Spec, device: torch.device) -> tuple[Candidate, ...]:
    trains = spec.direction != "forward"
    found = []
    for label, (forward, detail) in _forwards(spec).items():
        kind: Literal["ours", "baseline", "yardstick"] = "baseline"
        if label in ("ours", "shared"):
            kind = "ours" if label == "ours" else "yardstick"
        traffic, unavailable = 0, None
        if label == "stacked" and trains:
            # autograd's slice of a parameter is a gradient of the whole parameter, once per task, in fresh memory
            traffic = 12 * spec.num_tasks**2 * spec.weight_bytes
        if label in ("grouped", "vmap"):
            if spec.batch * spec.weight_bytes > MOST_PER_SAMPLE_BYTES:
                unavailable = f"a weight per sample takes {spec.batch * spec.weight_bytes / 2**30:.1f} GiB"
            # a weight is written, read, and in training its gradient too; rates far below copying were seen
            traffic = spec.batch * spec.weight_bytes * (24 if trains else 8)
        if label == "groupedmm":
            unavailable = baselines.grouped_mm_missing(spec.dtype, device)
        found.append(
            Candidate(
                label,
                _calls(spec, label, forward),
                detail,
                kind,
                traffic=traffic,
                # masks wait for the host
                graph=label != "stacked",
                unavailable=unavailable,
            )
        )
    if device.type == "cpu":
        found += _ways(spec)
    return tuple(found)


def _ways(spec: Spec) -> list[Candidate]:
    """Ours on the CPU, every segment the same way as far as that serves it."""
    call = _calls(spec, "ours", partial(ours, stacked=spec.stacked))
    pixelwise = spec.layer.kernel < 2 and spec.layer.stride == 1

    def by(way: str) -> Callable[[Any], Any]:
        table = uniform(WAYS[way])

        def run(inputs: Any) -> Any:
            with use_table(table):
                return call(inputs)

        return run

    names = [way for way in WAYS if pixelwise or way != "matmul"]
    return [Candidate(f"ours_{way}", by(way), f"{way} for all segments", "way") for way in names]


def _chosen(spec: Spec, b: Batch) -> dict[str, Any]:
    """In words, which ways the segments of ours took."""
    with watching() as taken:
        y = ours(b, spec.stacked)
        if spec.direction != "forward":
            backward(Recorded(y, leaves(b, "ours", spec.stacked), b.grad_out))
    products = {"forward": "y", "input_gradient": "dx", "weight_gradient": "dW"}
    words = []
    for product, short in products.items():
        ways = {way: count for (of, way), count in taken.items() if of == product}
        if not ways or (spec.direction == "backward" and product == "forward"):
            continue
        alone = len(ways) == 1
        words.append(f"{short} " + " + ".join(way if alone else f"{count} {way}" for way, count in ways.items()))
    return {"chosen": ", ".join(words)}


def _check(spec: Spec) -> Callable[[Batch, Callable[[Any], Any]], Check]:
    def check(b: Batch, call: Callable[[Any], Any]) -> Check:
        oracle = Oracle(b)
        if spec.direction == "forward":
            errors = oracle.forward(call(b))
        elif spec.direction == "backward":
            recorded = _record(spec, b, "ours")
            errors = oracle.forward(recorded.y) + oracle.backward(call(recorded))
        else:
            y, grads = call(b)
            errors = oracle.forward(y) + oracle.backward(grads)
        return largest(errors, spec.dtype, b.x.device)

    return check


def _record(spec: Spec, b: Batch, label: str) -> Recorded:
    # the ways of ours differ in what is timed alone
    label = "ours" if label.startswith("ours") else label
    return Recorded(_forwards(spec)[label][0](b), leaves(b, label, spec.stacked), b.grad_out)


# --- the cases


def layer_case(spec: Spec, device: torch.device) -> Case:
    """Forward, backward or both of `task_conv2d` or `task_linear`."""
    deltas = spec.active_deltas() * spec.weight_bytes
    # forward reads each delta; backward reads it for dx and writes its gradient
    passes = {"forward": 1, "backward": 2, "both": 3}[spec.direction]
    op = "task_linear" if spec.layer.linear else "task_conv2d"
    held = spec.samples_bytes * (1 if spec.direction == "forward" else 2) + (spec.num_tasks + 1) * spec.weight_bytes
    return Case(
        suite="conv",
        name=spec.name,
        op=op,
        covers=frozenset({op}),
        params=spec.params,
        make=spec.make,
        candidates=_candidates(spec, device),
        check=_check(spec),
        input_bytes=held,
        moved={"floor": passes * deltas},
        floor_from="shared",
        prepare=(lambda b, label: _record(spec, b, label)) if spec.direction == "backward" else None,
        finish=partial(_chosen, spec) if device.type == "cpu" else None,
        quick=spec.quick,
    )


def _both_sorts(spec: Spec) -> list[Spec]:
    return [replace(spec, sort=sort) for sort in (True, False)]


PLOTTED = (
    "ResNet-18 layer1",
    "ResNet-18 layer2",
    "ResNet-18 layer3",
    "ResNet-18 layer4",
    "ResNet-18 layer2 stride 2",
    "ResNet-50 layer1 1x1 out",
    "ResNet-50 layer3 1x1 in",
    "ResNet-50 layer4 1x1 out",
)


def _cpu_specs() -> list[Spec]:
    def at(name: str, num_tasks: int, batch: int, **more: Any) -> Spec:
        return Spec(LAYERS[name], num_tasks, batch, **more)

    stem, layer1, layer3, layer4 = (f"ResNet-18 {x}" for x in ("conv1", "layer1", "layer3", "layer4"))
    narrow, wide, fc1 = "ResNet-50 layer3 1x1 in", "ResNet-50 layer4 1x1 out", "ViT-B fc1"
    quick = {(layer1, 8), (layer4, 32), (narrow, 8)}
    found = []
    for name in PLOTTED:
        for t in (8, 32):
            per_sample = t == 8 and name in (layer1, layer3, narrow)
            for spec in _both_sorts(at(name, t, 32, quick=(name, t) in quick)):
                found.append(replace(spec, per_sample=per_sample and not spec.sort))
    found += [x for t in (8, 32) for x in _both_sorts(at(fc1, t, 8))]
    for name, t in ((layer1, 8), (layer3, 32), (narrow, 8)):
        found += _both_sorts(at(name, t, 64, direction="forward"))
    found += [
        at(layer4, 8, 64, direction="forward", sort=True, quick=True),
        at(layer4, 8, 64, direction="forward", per_sample=True, quick=True),
    ]
    found += [
        at(fc1, 8, 8, direction="forward", per_sample=True, quick=True),
        at(stem, 8, 16),
        at("ResNet-18 layer4 shortcut", 8, 32),
        at("ResNet-50 layer3 3x3 stride 2", 8, 32),
        at("ViT-B qkv", 8, 8),
        at("ViT-B fc2", 8, 8),
        at("ViT-B proj", 8, 8, packed=True),
        at("ViT-B head", 32, 256, per_sample=True),
        # batch and number of tasks
        *(at(layer3, t, 32) for t in (1, 2)),
        at(layer4, 8, 8),
        at(layer4, 32, 256),
        at(layer1, 8, 256, direction="forward"),
        at(wide, 32, 256, direction="forward"),
        *_both_sorts(at(layer3, 8, 32, direction="backward")),
        # gates
        *(at(layer4, 32, 32, gates=gates) for gates in ("third", "off")),
        *(at(layer1, 8, 32, gates=gates, direction="forward") for gates in ("third", "off")),
        at(layer3, 8, 32, gate_grad=True),
        at(layer3, 8, 32, gates="third", gate_grad=True),
        # layout, form and dtype
        at(layer1, 8, 32, layout="NCHW"),
        at(layer4, 8, 32, layout="NCHW"),
        at(narrow, 8, 32, layout="NCHW"),
        at(layer4, 8, 32, stacked=True),
        at(layer3, 8, 32, dtype=BF16),
        at(layer3, 8, 32, dtype=BF16, weight_dtype=F32),
        at(layer4, 32, 32, dtype=BF16),
        at(fc1, 8, 8, dtype=BF16),
    ]
    return found


def _cuda_specs() -> list[Spec]:
    def at(name: str, num_tasks: int, batch: int, **more: Any) -> Spec:
        return Spec(LAYERS[name], num_tasks, batch, **({"dtype": BF16} | more))

    layer1, layer3, layer4 = (f"ResNet-18 {x}" for x in ("layer1", "layer3", "layer4"))
    narrow, fc1 = "ResNet-50 layer3 1x1 in", "ViT-B fc1"
    quick = {(layer1, 8), (layer3, 8), (layer4, 32), (narrow, 8)}
    found = []
    for name in PLOTTED:
        for t in (8, 32):
            for spec in _both_sorts(at(name, t, 64, quick=(name, t) in quick)):
                found.append(replace(spec, per_sample=t == 8 and not spec.sort))
            found.append(at(name, t, 64, direction="forward", quick=(name, t) in quick))
    for name in (layer3, layer4, narrow):
        found += [at(name, t, b) for t in (1, 2, 8, 32) for b in (8, 32, 256)]
        found += [at(name, t, 64) for t in (1, 2)]
        found += [at(name, 8, 64, direction="backward"), at(name, 8, 64, dtype=F32), at(name, 8, 64, dtype=F16)]
        found += [at(name, 8, 64, weight_dtype=F32), at(name, 8, 64, gate_grad=True)]
        found += [at(name, 32, 64, gates=gates) for gates in ("third", "off")]
        found += [at(name, 8, 64, stacked=True), at(name, 8, 64, layout="NCHW")]
    found += [
        at("ResNet-18 conv1", 8, 64),
        at("ResNet-18 layer4 shortcut", 8, 64),
        at("ResNet-50 layer3 3x3 stride 2", 8, 64),
    ]
    for name in ("ViT-B qkv", "ViT-B proj", "ViT-B fc1", "ViT-B fc2"):
        for t in (8, 32):
            found += [at(name, t, b, per_sample=b == 8) for b in (8, 64)]
            found.append(at(name, t, 64, direction="forward", quick=(name, t) == (fc1, 8)))
    found += [at(fc1, 8, 64, sort=True, quick=True), at("ViT-B proj", 8, 64, packed=True)]
    found += [at("ViT-B head", 32, b, per_sample=True) for b in (64, 256)]
    return found


def cases(device: torch.device, quick: bool = False) -> list[Case]:
    """The suite; `quick`: a telling few. On a GPU larger batches, bfloat16 first."""
    gpu = device.type == "cuda"
    specs = [spec for spec in (_cuda_specs() if gpu else _cpu_specs()) if spec.quick or not quick]
    found = [layer_case(spec, device) for spec in specs]
    batch, dtype = (64, BF16) if gpu else (32, F32)
    filters = Spec(LAYERS["ResNet-18 layer3"], 8, batch, "forward", dtype, quick=True)
    tokens = Spec(LAYERS["ViT-B proj"], 8, 8, "forward", dtype)
    for out in (False, True):
        # a telling one: the filters' into a bank
        found.append(weight_grad_case(replace(filters, quick=out), out=out))
        found.append(weight_grad_case(tokens, out=out))
    found += [
        scale_shift_case(8, batch, 64, 56, dtype, train=False),
        scale_shift_case(8, batch, 64, 56, dtype, train=True, quick=True),
        batch_norm_case(8, batch, 64, 56, dtype, direction="both", quick=True),
        batch_norm_case(8, batch, 64, 56, dtype, direction="both", sort=True),
        batch_norm_case(8, batch, 64, 56, dtype, direction="both", layout="NCHW"),
        batch_norm_case(8, batch, 512, 7, dtype, direction="both"),
        batch_norm_case(8, batch, 512, 7, dtype, direction="both", layout="NCHW"),
        batch_norm_case(32, batch, 256, 14, dtype, direction="both"),
        batch_norm_case(8, batch, 64, 56, dtype, direction="forward"),
        plan_case(32, (256,)),
        plan_case(32, (256, 197)),
    ]
    found += conv_low_rank.cases(gpu)
    return [case for case in found if case.quick or not quick]
