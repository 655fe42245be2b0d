"""What is compiled ahead of time: the launches that the launchers make on tensors of the meta device, tile by tile."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastmtl.kernels import configs
from fastmtl.kernels._launch import Launch, recording
from fastmtl.kernels.configs import BuildTarget, Tile

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_TYPE_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int32: "i32",
}
_CHANNELS, _FEATURES, _TASKS = 256, 256, 8


def as_target(name: str, made: Launch, dtype: torch.dtype, representative: bool, mma: bool, wide: bool) -> BuildTarget:
    """The launch as Triton would specialise it: ones become constants, multiples of 16 are marked."""
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    attrs: dict[tuple[int], list[list[Any]]] = {}
    for position, param in enumerate(made.fn.params):
        value = made.arguments[param.name]
        fixed = param.is_constexpr or value is None or (not isinstance(value, Tensor) and value == 1)
        if fixed and (param.is_constexpr or not param.do_not_specialize or value is None):
            signature[param.name] = "constexpr"
            constexprs[param.name] = value
            continue
        if isinstance(value, Tensor):
            signature[param.name] = f"*{_TYPE_NAMES[value.dtype]}"
            divisible = value.data_ptr() % 16 == 0
        else:
            signature[param.name] = param.annotation_type or ("i32" if -(2**31) <= value < 2**31 else "i64")
            divisible = value % 16 == 0
        if divisible and not param.do_not_specialize:
            attrs[(position,)] = [["tt.divisibility", 16]]
    return BuildTarget(
        name, made.fn, signature, constexprs, attrs, made.num_warps, made.num_stages, dtype, representative, mma, wide
    )


def _empty(*size: int, dtype: torch.dtype, channels_last: bool = True) -> Tensor:
    x = torch.empty(size, dtype=dtype, device="meta")
    return x.contiguous(memory_format=torch.channels_last) if channels_last and len(size) == 4 else x


class Problem:
    """A layer on the meta device: 8 tasks, 64 pictures, bfloat16 or another dtype."""

    def __init__(
        self, dtype: torch.dtype, kernel: int, stride: int = 1, channels: int = _CHANNELS, listed: bool = True
    ) -> None:
        from fastmtl.ops._task import Geometry, TaskWeights

        self.x = _empty(64, channels, 28, 28, dtype=dtype)
        self.geometry = Geometry((stride, stride), (kernel // 2, kernel // 2))
        self.y = _empty(64, _FEATURES, *self.geometry.output_size((28, 28), (kernel, kernel)), dtype=dtype)
        shape = (_FEATURES, channels, kernel, kernel)
        tasks = list(range(_TASKS)) if listed else []
        delta = [_empty(*shape, dtype=dtype) for _ in tasks] or [_empty(_TASKS, *shape, dtype=dtype)]
        gate = _empty(_TASKS, dtype=torch.float32)
        self.weights = TaskWeights(_empty(*shape, dtype=dtype), delta, tasks, gate)
        self.bias = _empty(_TASKS, _FEATURES, dtype=dtype)
        self.order = torch.empty(64, dtype=torch.int64, device="meta")
        self.offsets = torch.empty(_TASKS + 1, dtype=torch.int64, device="meta")

    def forward(self) -> None:
        from fastmtl.kernels import task_conv2d

        task_conv2d.conv2d(self.x, self.weights, self.bias, self.order, self.offsets, self.geometry)


def _recorded(run: Callable[[], None], kernel: str, **forced: Any) -> Launch:
    with configs.force(**forced), recording() as launches:
        run()
    return next(made for made in launches if made.fn.__name__ == kernel)


def _tile_name(tile: Tile) -> str:
    return f"{tile.rows}x{tile.cols}x{tile.depth}"


def _forward(dtype: torch.dtype) -> Iterator[BuildTarget]:
    kernel = "task_conv2d_fwd_kernel"
    for tile in configs.tiles_of("fwd", dtype):
        first = tile == configs.tiles_of("fwd", dtype)[0]
        for schedule, size in (("staged", 3), ("fused", 1)):
            problem = Problem(dtype, size)
            made = _recorded(problem.forward, kernel, fwd=tile, schedule=schedule)
            name = f"{kernel}-{schedule}-{_tile_name(tile)}"
            yield as_target(name, made, dtype, first and schedule == "staged", True, True)
        made = _recorded(Problem(dtype, 3, 2, channels=3).forward, kernel, fwd=tile, schedule="staged")
        yield as_target(f"{kernel}-packed-{_tile_name(tile)}", made, dtype, False, True, False)


def _stage(dtype: torch.dtype) -> Iterator[BuildTarget]:
    for size in (1, 3, 7):
        for listed in (True, False):
            problem = Problem(dtype, size, listed=listed)
            made = _recorded(problem.forward, "stage_kernel", schedule="staged")
            name = f"stage_kernel-{size}x{size}-{'list' if listed else 'stacked'}"
            yield as_target(name, made, dtype, size == 3 and listed, False, False)


def build_targets() -> Iterator[BuildTarget]:
    """Every kernel in every configuration."""
    for dtype in DTYPES:
        for part in (_forward, _stage):
            for target in part(dtype):
                short = _TYPE_NAMES[dtype]
                yield target._replace(name=f"{target.name}-{short}")
    for name in ("task_plan", "task_scale_shift"):
        module = importlib.import_module(f"fastmtl.kernels.{name}")
        yield from getattr(module, "build_targets", tuple)()
