"""How much of the matrix units' rate the main loops of the task convolution leave, by machine code alone, on no GPU.

    python -m fastmtl.benchmarks.machine_code.task_model [--compile]

From a checkout. Draws the tables between the markers in `docs/kernels/task-kernels-cuda.md` out of `task_loops.json`
beside this file. With `--compile` that is made anew first: nvcc and Triton compile the loops, some minutes.

Of a step of a main loop, four things take their clocks of a multiprocessor, side by side where enough warps are there:
products in the matrix units; what shared memory gives (`ldmatrix`: four clocks for four matrices of a warp) and takes
(copies: 128 bytes a clock); issued instructions, one a clock and scheduler; and bytes from the L2 cache. The share of
the products in the longest of them, times the share of a tile that the layer fills, is the fraction of the rate that
the loop can reach. Latencies, the beginning and the end of a tile, and waves that are not full come on top.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmtl.benchmarks.gpu import host_time
from fastmtl.benchmarks.machine_code import cubin, kernel_table
from fastmtl.core.task_weights import Geometry, SortedBatch, TaskConvCall, TaskWeights

DATA = Path(__file__).with_name("task_loops.json")
DOCS = kernel_table.ROOT / "docs" / "kernels" / "task-kernels-cuda.md"
BEGIN, END = "<!-- task-model:begin -->", "<!-- task-model:end -->"
SAMPLES, TASKS = 64, 8
PRODUCTS = ("forward", "input gradient", "weight gradient")


class Card(NamedTuple):
    """Multiprocessors; clocks that a warp's product keeps its matrix unit; bytes of L2 a clock and multiprocessor."""

    name: str
    arch: int
    sms: int
    clocks: float
    l2: float


# of an A100: 8 clocks, and 5120 bytes a clock of L2; of an H100 mma.sync is said to reach five eighths of wgmma's rate,
# and L2 to give 5.5 TB/s at 1.755 GHz
CARDS = (Card("A100", 80, 108, 8.0, 47.4), Card("H100", 90, 132, 6.4, 23.7))


class Layer(NamedTuple):
    """Of ResNet-50: input and output channels, filter, stride, size of the result's pictures."""

    name: str
    channels: int
    features: int
    kernel: int
    stride: int
    size: int


LAYERS = (
    Layer("layer1, 1x1", 64, 64, 1, 1, 56),
    Layer("layer1, 3x3", 64, 64, 3, 1, 56),
    Layer("layer1, 1x1 out", 64, 256, 1, 1, 56),
    Layer("layer1, 1x1 in", 256, 64, 1, 1, 56),
    Layer("layer2, 3x3", 128, 128, 3, 1, 28),
    Layer("layer2, 1x1 out", 128, 512, 1, 1, 28),
    Layer("layer2, 1x1 in", 512, 128, 1, 1, 28),
    Layer("layer3, 3x3", 256, 256, 3, 1, 14),
    Layer("layer3, 1x1 out", 256, 1024, 1, 1, 14),
    Layer("layer3, 1x1 in", 1024, 256, 1, 1, 14),
    Layer("layer4, 3x3", 512, 512, 3, 1, 7),
    Layer("layer4, 1x1 out", 512, 2048, 1, 1, 7),
    Layer("layer4, 1x1 in", 2048, 512, 1, 1, 7),
)


class Step(NamedTuple):
    """Of a main loop, for a block: products of a warp, bytes through shared memory's 128 a clock as clocks, issued
    instructions of all warps, bytes from L2; and the block's warps."""

    products: int
    shared: int
    instructions: int
    bytes: int
    warps: int

    def fraction(self, card: Card, again: float = 0.0) -> float:
        """Of the rate of the matrix units. again: the share of the bytes that the first-level cache has, which gives
        them by way of shared memory."""
        units = self.products * card.clocks / 4
        shared = self.shared + again * self.bytes / 128
        return units / max(units, shared, self.instructions / 4, (1 - again) * self.bytes / card.l2)


_MATRICES = re.compile(r"LDSM\.16\.M?T?88(?:\.(\d))?")


def step_of(loops: list[cubin.Loop], warps: int) -> Step:
    """Of the loop with the most products."""
    loop = max(loops, key=lambda one: sum(op.name.startswith("HMMA") for op in one.path))
    products = shared = copied = 0
    for op in loop.path:
        products += op.name.startswith("HMMA")
        if found := _MATRICES.match(op.name):
            shared += int(found[1] or 1)
        elif op.name.startswith(("LDS", "STS")):
            words = op.name.split(".")
            shared += 4 if "128" in words else 2 if "64" in words else 1
        elif op.is_copy:
            shared += cubin.WARP * op.loads // 128
        copied += cubin.WARP * op.loads
    return Step(products * warps, shared * warps, len(loop.path) * warps, copied * warps, warps)


# --- what is launched


def problem(layer: Layer, device: str) -> tuple[Tensor, Tensor, TaskConvCall]:
    """x, the gradient of the result, and the call, in bfloat16 and channels_last; a list of deltas."""

    def empty(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.bfloat16, device=device, memory_format=torch.channels_last)

    geometry = Geometry((layer.stride,) * 2, (layer.kernel // 2,) * 2)
    shape = (layer.features, layer.channels, layer.kernel, layer.kernel)
    weights = TaskWeights(empty(*shape), [empty(*shape) for _ in range(TASKS)], list(range(TASKS)), None)
    batch = SortedBatch(*(torch.zeros(n, dtype=torch.int64, device=device) for n in (SAMPLES, TASKS + 1)))
    x = empty(SAMPLES, layer.channels, layer.size * layer.stride, layer.size * layer.stride)
    return x, empty(SAMPLES, layer.features, layer.size, layer.size), TaskConvCall(weights, batch, geometry, None)


def cuda_tiles(layer: Layer, card: Card) -> tuple[int, int, int]:
    """Of the products: places in the tables of `csrc/cuda/task_weights`. The launcher and its plans run on tensors of
    the CPU, whose memory nobody touches."""
    from fastmtl.ops.task_weights import cuda

    x, grad_out, call = problem(layer, "cpu")
    with host_time.without_launches() as made:
        made.host_conv_sms(card.sms)
        cuda.conv2d(x, call)
        forward = made.product_tile()
        cuda.conv2d_backward(grad_out, x, call, [True, True, False, False], list(range(TASKS)))
        return forward, made.product_tile(), made.pieces_tile()


def triton_launches(layer: Layer, card: Card) -> Iterator[Any]:
    """Of the products, in their order."""
    from unittest import mock

    from fastmtl.kernels.common.launches import forgetting, recording
    from fastmtl.kernels.task_weights import configs, conv_launchers

    x, grad_out, call = problem(layer, "meta")
    limits = configs.Limits(card.sms, 163 * 1024 if card.arch == 80 else 227 * 1024, card.arch == 90)
    configs._plan_wgrad.cache_clear()
    with mock.patch.object(configs, "device_limits", lambda device: limits), forgetting(), recording() as made:
        conv_launchers.conv2d(x, call)
        conv_launchers.conv2d_backward(grad_out, x, call, [True, True, False, False], list(range(TASKS)))
    configs._plan_wgrad.cache_clear()
    for name in ("fwd", "dgrad", "wgrad_"):
        yield next(one for one in made if f"task_conv2d_{name}" in one.fn.__name__)


# --- compiled


def compiled_cuda(folder: Path) -> dict[str, Step]:
    found = {}
    for card in CARDS:
        for name, code in cubin.read(kernel_table.compile_cubin("kernels_task_bf16", card.arch, folder)).items():
            kernel = kernel_table.kernel_of(name)
            if kernel.name in ("task_product_kernel", "task_pieces_kernel"):
                found[f"{kernel.name} {kernel.numbers[0]} sm_{card.arch}"] = step_of(code.loops, 4)
    return found


def compiled_triton(folder: Path) -> dict[str, list[Step]]:
    """By layer, of the products, on sm_80; on sm_90 its products are those of a warp group."""
    import triton
    from triton.backends.compiler import GPUTarget

    from fastmtl.kernels.common.build_target import as_target

    @functools.cache
    def compiled(signature: str) -> Step:
        target = targets[signature]
        source = triton.compiler.ASTSource(target.fn, target.signature, target.constexprs, target.attrs)
        options = {"num_warps": target.num_warps, "num_stages": target.num_stages}
        built = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options)
        file = folder / "triton.cubin"
        file.write_bytes(built.asm["cubin"])
        (code,) = cubin.read(file).values()
        return step_of(code.loops, target.num_warps)

    targets: dict[str, Any] = {}
    found: dict[str, list[Step]] = {}
    for layer in LAYERS:
        found[layer.name] = []
        for launch in triton_launches(layer, CARDS[0]):
            target = as_target("", launch, torch.bfloat16, False, True, True)
            signature = repr((target.fn.__name__, target.signature, target.constexprs, target.attrs, target[5:7]))
            targets[signature] = target
            found[layer.name].append(compiled(signature))
    return found


def load() -> tuple[dict[str, Step], dict[str, list[Step]]]:
    """The loops as last compiled: CUDA C++'s by kernel, tile and architecture; Triton's by layer."""
    data = json.loads(DATA.read_text())
    return (
        {name: Step(*step) for name, step in data["cuda"].items()},
        {name: [Step(*step) for step in steps] for name, steps in data["triton"].items()},
    )


def of_tile(kernel: str) -> tuple[str, int, int]:
    """The name, rows and columns of a kernel with its tile."""
    name, tile = kernel.split()
    rows, columns = _names(name)[int(tile)].split("x")
    return name, int(rows), int(columns)


def again(layer: Layer, card: Card, kernel: str) -> float:
    """The share of a step's bytes that were read not long before, for another tap, by copies that go through the
    first-level cache. kernel: with its tile."""
    if card.arch < 90:
        return 0.0
    name, rows, columns = of_tile(kernel)
    if name == "task_pieces_kernel":
        # taps of a line of the filter, of 32 pixels
        taps = max(1, min(layer.kernel, columns // layer.channels)) if columns > 128 else 1
        return columns * (1 - (32 + taps - 1) / (32 * taps)) / (rows + columns)
    # all taps of a tile's pixels, which are lines of a picture
    distinct = rows + (layer.kernel - 1) * layer.size
    return rows * (1 - min(1.0, distinct / (rows * layer.kernel**2))) / (rows + columns)


def in_use(layer: Layer, product: str, kernel: str) -> float:
    """The share of its tiles that a product fills; that a task's rows may end within a tile is not counted."""
    _, rows, columns = of_tile(kernel)
    if product != "weight gradient":
        wide = layer.features if product == "forward" else layer.channels
        return wide / (-(-wide // columns) * columns)
    depth = layer.channels * layer.kernel**2
    return layer.features * depth / (-(-layer.features // rows) * rows * -(-depth // columns) * columns)


def fractions(layer: Layer, card: Card, loops: dict[str, Step]) -> list[float]:
    """Of the rate of the matrix units, of the products by CUDA C++."""
    return [
        loops[f"{kernel} sm_{card.arch}"].fraction(card, again(layer, card, kernel)) * in_use(layer, product, kernel)
        for product, kernel in zip(PRODUCTS, _cuda_kernels(layer, card), strict=True)
    ]


def seconds(card: Card) -> dict[str, dict[str, float]]:
    """By product of the ops and backend, what the main loops of all layers take together, in no unit: products over the
    fraction of the rate. A backward is an input gradient and a weight gradient."""
    cuda, triton = load()
    found = {product: {"cuda": 0.0, "triton": 0.0} for product in ("forward", "backward", "weight_grad")}
    for layer in LAYERS:
        work = layer.channels * layer.features * (layer.kernel * layer.size) ** 2
        of_triton = [step.fraction(card) for step in triton[layer.name]]
        for backend, of_backend in (("cuda", fractions(layer, card, cuda)), ("triton", of_triton)):
            forward, back, weight = (work / fraction for fraction in of_backend)
            for product, took in (("forward", forward), ("backward", back + weight), ("weight_grad", weight)):
                found[product][backend] += took
    return found


def _cuda_kernels(layer: Layer, card: Card) -> list[str]:
    """Of the products, with their tiles."""
    kernels = ("task_product_kernel", "task_product_kernel", "task_pieces_kernel")
    return [f"{kernel} {tile}" for kernel, tile in zip(kernels, cuda_tiles(layer, card), strict=True)]


# --- tables


def table() -> list[str]:
    """Markdown: of each layer and product the tile and the fraction of the rate."""
    cuda, triton = load()
    heads = [f"{card.name}, {product}" for card in CARDS for product in PRODUCTS]
    lines = [f"| layer | {' | '.join(heads)} | Triton, A100, the same |", "|---|" + "---|" * (len(heads) + 1)]
    for layer in LAYERS:
        cells = []
        for card in CARDS:
            for kernel, fraction in zip(_cuda_kernels(layer, card), fractions(layer, card, cuda), strict=True):
                _, rows, columns = of_tile(kernel)
                cells.append(f"{rows}x{columns}: {fraction:.2f}")
        others = "; ".join(f"{step.fraction(CARDS[0]):.2f}" for step in triton[layer.name])
        lines.append(f"| {layer.name}, {layer.channels} to {layer.features} | {' | '.join(cells)} | {others} |")
    return lines


def _names(kernel: str) -> tuple[str, ...]:
    """The tiles in the order of their tables (product.cuh, weight_grads.cuh)."""
    return ("128x128", "128x64", "64x64") if kernel == "task_product_kernel" else ("128x128", "64x192", "64x64")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="the loops anew, by nvcc and Triton")
    options = parser.parse_args()
    if options.compile:
        with tempfile.TemporaryDirectory() as folder:
            data = {"cuda": compiled_cuda(Path(folder)), "triton": compiled_triton(Path(folder))}
        lines = [f" {json.dumps(name)}: {json.dumps(found)}" for name, found in data.items()]
        DATA.write_text("{\n" + ",\n".join(line.replace('], "', '],\n  "') for line in lines) + "\n}\n")
    text = DOCS.read_text()
    before, rest = text.split(BEGIN)
    DOCS.write_text("\n".join([before + BEGIN, "", *table(), "", END + rest.split(END)[1]]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
