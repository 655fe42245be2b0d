"""Layers of ResNet-18, ResNet-50 and ViT-B, and mixed-task batches for them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmtl import ops
from fastmtl.ops import TaskPlan

Gates = Literal["on", "third", "off"]
Layout = Literal["NCHW", "channels_last"]
Direction = Literal["forward", "backward", "both"]
SHORT: dict[Direction, str] = {"forward": "fwd", "backward": "bwd", "both": "fwd+bwd"}


@dataclass(frozen=True)
class Layer:
    """A layer without bias: its filter or matrix, and the size of what it sees.

    Args:
        name: network and place.
        cin, cout: channels.
        size: height and width of the pictures; of a linear layer the number of tokens of a sample.
        kernel: height and width of the filter; 0: a linear layer.
    """

    name: str
    cin: int
    cout: int
    size: int
    kernel: int = 0
    stride: int = 1
    padding: int = 0

    @property
    def linear(self) -> bool:
        return self.kernel == 0

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.cout, self.cin) if self.linear else (self.cout, self.cin, self.kernel, self.kernel)

    @property
    def out_size(self) -> int:
        return self.size if self.linear else (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    def output_shape(self, batch: int) -> tuple[int, ...]:
        return (batch, self.size, self.cout) if self.linear else (batch, self.cout, self.out_size, self.out_size)

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.linear:
            return F.linear(x, weight)
        return F.conv2d(x, weight, None, self.stride, self.padding)


RESNET18 = (
    Layer("ResNet-18 conv1", 3, 64, 224, 7, 2, 3),
    Layer("ResNet-18 layer1", 64, 64, 56, 3, 1, 1),
    Layer("ResNet-18 layer2", 128, 128, 28, 3, 1, 1),
    Layer("ResNet-18 layer3", 256, 256, 14, 3, 1, 1),
    Layer("ResNet-18 layer4", 512, 512, 7, 3, 1, 1),
    Layer("ResNet-18 layer2 stride 2", 64, 128, 56, 3, 2, 1),
    Layer("ResNet-18 layer4 shortcut", 256, 512, 14, 1, 2, 0),
)
RESNET50 = (
    Layer("ResNet-50 layer1 1x1 out", 64, 256, 56, 1),
    Layer("ResNet-50 layer3 1x1 in", 1024, 256, 14, 1),
    Layer("ResNet-50 layer4 1x1 out", 512, 2048, 7, 1),
    Layer("ResNet-50 layer3 3x3 stride 2", 256, 256, 28, 3, 2, 1),
)
VIT_B = (
    Layer("ViT-B qkv", 768, 2304, 197),
    Layer("ViT-B proj", 768, 768, 197),
    Layer("ViT-B fc1", 768, 3072, 197),
    Layer("ViT-B fc2", 3072, 768, 197),
    Layer("ViT-B head", 768, 1000, 1),
)
LAYERS = {layer.name: layer for layer in (*RESNET18, *RESNET50, *VIT_B)}


def random_ids(num_tasks: int, shape: tuple[int, ...], *, sort: bool) -> Tensor:
    """Uniformly drawn ids, the same for each call, so that bytes are known before the batch is made."""
    ids = torch.randint(num_tasks, shape, generator=torch.Generator().manual_seed(1234 + num_tasks))
    return ids.flatten().sort().values.view(shape) if sort else ids


def gate_values(gates: Gates, num_tasks: int) -> list[float]:
    """A gate per task; a closed one is exactly 0. `third`: every third task's is open."""
    opened = [gates == "on" or (gates == "third" and t % 3 == 0) for t in range(num_tasks)]
    return [0.5 + (t % 8) / 8 if o else 0.0 for t, o in enumerate(opened)]


def like_layer(shape: tuple[int, ...], layout: Layout, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random numbers; the last three of four or five dimensions in channels_last order if asked for."""
    if layout == "channels_last" and len(shape) >= 4:
        *leading, c, h, w = shape
        return torch.randn(*leading, h, w, c, dtype=dtype, device=device).movedim(-1, -3)
    return torch.randn(shape, dtype=dtype, device=device)


@dataclass
class Batch:
    """A layer, its weights and a mixed-task batch. What the loops need of the ids is worked out once, as for ours.

    Args:
        x: `[N, Cin, H, W]` or `[N, L, Cin]`.
        weight: shared by all tasks.
        stacked: `[T, ...]` deltas as one parameter.
        deltas: the same numbers as T parameters.
        gate: `[T]`; `gates` are its values.
        ids: `[N]`, or `[N, L]` for packed sequences.
    """

    layer: Layer
    x: Tensor
    weight: Tensor
    stacked: Tensor
    deltas: list[Tensor]
    gate: Tensor
    gates: list[float]
    ids: Tensor
    grad_out: Tensor
    sorted: bool
    gate_grad: bool = False
    plan: TaskPlan = field(init=False)
    rows: dict[int, Tensor] = field(init=False)
    sizes: list[int] = field(init=False)
    back: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.plan = ops.task_plan(self.ids, len(self.gates))
        bounds = list(itertools.pairwise(self.plan.offsets.tolist()))
        # the samples of each task that has some, and the permutation that undoes the sort
        self.rows = {t: self.plan.order[begin:end] for t, (begin, end) in enumerate(bounds) if end > begin}
        self.sizes = [len(rows) for rows in self.rows.values()]
        self.back = self.plan.order.argsort()

    @property
    def samples(self) -> Tensor:
        """x with one dimension for all that has an id of its own."""
        return self.x.flatten(0, self.ids.dim() - 1) if self.ids.dim() > 1 else self.x

    @property
    def output_shape(self) -> tuple[int, ...]:
        return self.layer.output_shape(self.x.shape[0])


def make_batch(
    layer: Layer,
    num_tasks: int,
    batch: int,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    sort: bool = False,
    gates: Gates = "on",
    layout: Layout = "channels_last",
    grad: bool = False,
    gate_grad: bool = False,
    packed: bool = False,
) -> Batch:
    """Random inputs; `grad`: everything that trains asks for a gradient."""
    weight_dtype = weight_dtype or dtype
    fan_in = layer.cin * max(layer.kernel, 1) ** 2
    values = gate_values(gates, num_tasks)
    shape = (batch, layer.size, layer.cin) if layer.linear else (batch, layer.cin, layer.size, layer.size)
    x = like_layer(shape, layout, dtype, device)
    weight = like_layer(layer.weight_shape, layout, weight_dtype, device).mul_(fan_in**-0.5)
    stacked = like_layer((num_tasks, *layer.weight_shape), layout, weight_dtype, device).mul_(fan_in**-0.5)
    ids = random_ids(num_tasks, (batch, layer.size) if packed else (batch,), sort=sort).to(device)
    made = Batch(
        layer=layer,
        x=x,
        weight=weight,
        stacked=stacked,
        # parameters of their own over the same memory: it would not hold them twice
        deltas=[d.detach() for d in stacked.unbind(0)],
        gate=torch.tensor(values, dtype=weight_dtype, device=device),
        gates=values,
        ids=ids,
        grad_out=like_layer(layer.output_shape(batch), layout, dtype, device),
        sorted=sort,
        gate_grad=gate_grad,
    )
    if grad:
        for leaf in (made.x, made.weight, made.stacked, *made.deltas, *([made.gate] if gate_grad else [])):
            leaf.requires_grad_()
    return made


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Spec:
    """What tells one case of `task_conv2d` or `task_linear` from another.

    Args:
        layer, num_tasks, batch, direction, dtype: `direction="both"` is forward and backward together.
        sort: whether the ids come sorted by task.
        gates: how many are open.
        layout: memory order of pictures and filters.
        stacked: ours gets the deltas as one parameter instead of a list.
        weight_dtype: of the weights, where it is not that of x.
        gate_grad: the gates are trained too.
        packed: an id per token, not per sample.
        per_sample: also the baselines that make a weight per sample.
        quick: belongs to the telling few.
    """

    layer: Layer
    num_tasks: int
    batch: int
    direction: Direction = "both"
    dtype: torch.dtype = torch.float32
    sort: bool = False
    gates: Gates = "on"
    layout: Layout = "channels_last"
    stacked: bool = False
    weight_dtype: torch.dtype | None = None
    gate_grad: bool = False
    packed: bool = False
    per_sample: bool = False
    quick: bool = False

    @property
    def name(self) -> str:
        dtype = dtype_name(self.dtype) + (f"/{dtype_name(self.weight_dtype)} weights" if self.weight_dtype else "")
        marks = ["sorted" if self.sort else "unsorted"]
        marks += [f"gates {self.gates}"] if self.gates != "on" else []
        marks += ["NCHW"] if self.layout == "NCHW" and not self.layer.linear else []
        marks += [text for flag, text in ((self.stacked, "stacked"), (self.packed, "packed")) if flag]
        marks += ["gates trained"] if self.gate_grad else []
        head = f"{self.layer.name} {SHORT[self.direction]} T={self.num_tasks} B={self.batch} {dtype}"
        return f"{head} {', '.join(marks)}"

    @property
    def weight_bytes(self) -> int:
        return torch.Size(self.layer.weight_shape).numel() * (self.weight_dtype or self.dtype).itemsize

    @property
    def samples_bytes(self) -> int:
        """Of x and y."""
        layer = self.layer
        x = layer.cin * layer.size * (1 if layer.linear else layer.size)
        y = torch.Size(layer.output_shape(1)).numel()
        return self.batch * (x + y) * self.dtype.itemsize

    @property
    def flops(self) -> int:
        """Of one forward pass."""
        layer = self.layer
        return 2 * self.batch * torch.Size(layer.output_shape(1)).numel() * torch.Size(layer.weight_shape[1:]).numel()

    def active_deltas(self) -> int:
        """Tasks with samples and an open gate: only their deltas must be read (all present ones for `ds_t`)."""
        shape = (self.batch, self.layer.size) if self.packed else (self.batch,)
        present = set(random_ids(self.num_tasks, shape, sort=self.sort).flatten().tolist())
        values = gate_values(self.gates, self.num_tasks)
        return sum(1 for t in present if self.gate_grad or values[t])

    @property
    def params(self) -> dict[str, Any]:
        layer = self.layer
        return {
            "layer": layer.name,
            "N": self.batch,
            "Cin": layer.cin,
            "H": 1 if layer.linear else layer.size,
            "W": layer.size,
            "Cout": layer.cout,
            "k": max(layer.kernel, 1),
            "stride": layer.stride,
            "T": self.num_tasks,
            "B": self.batch,
            "dtype": dtype_name(self.dtype),
            "weight_dtype": dtype_name(self.weight_dtype or self.dtype),
            "direction": self.direction,
            "sorted": self.sort,
            "gates": self.gates,
            "gates_trained": self.gate_grad,
            "layout": "rows" if layer.linear else self.layout,
            "delta": "stacked" if self.stacked else "list",
            "ids": "per token" if self.packed else "per sample",
            "active_deltas": self.active_deltas(),
            "weight_bytes": self.weight_bytes,
            "flops_forward": self.flops,
        }

    def make(self, device: torch.device) -> Batch:
        return make_batch(
            self.layer,
            self.num_tasks,
            self.batch,
            device,
            dtype=self.dtype,
            weight_dtype=self.weight_dtype,
            sort=self.sort,
            gates=self.gates,
            layout=self.layout,
            grad=self.direction != "forward",
            gate_grad=self.gate_grad,
            packed=self.packed,
        )
