"""What is compiled ahead of time: the launches that the launchers make on tensors of the meta device, tile by tile."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmtl.core.task_weights import Geometry, SortedBatch, TaskConvCall, TaskWeights
from fastmtl.kernels.common.build_target import _TYPE_NAMES, BuildTarget, as_target
from fastmtl.kernels.common.launches import Launch, recording
from fastmtl.kernels.task_weights import configs
from fastmtl.kernels.task_weights.configs import Tile

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_CHANNELS, _FEATURES, _TASKS = 256, 256, 8


def _empty(*size: int, dtype: torch.dtype, channels_last: bool = True) -> Tensor:
    x = torch.empty(size, dtype=dtype, device="meta")
    return x.contiguous(memory_format=torch.channels_last) if channels_last and len(size) == 4 else x


class Problem:
    """A layer on the meta device: 8 tasks, 64 pictures. order: whether its filters are channels_last."""

    def __init__(
        self,
        dtype: torch.dtype,
        kernel: int,
        stride: int = 1,
        channels: int = _CHANNELS,
        features: int = _FEATURES,
        listed: bool = True,
        order: bool = True,
    ) -> None:
        self.x = _empty(64, channels, 28, 28, dtype=dtype)
        geometry = Geometry((stride, stride), (kernel // 2, kernel // 2))
        self.y = _empty(64, features, *geometry.output_size((28, 28), (kernel, kernel)), dtype=dtype)
        shape = (features, channels, kernel, kernel)
        tasks = list(range(_TASKS)) if listed else []
        delta = [_empty(*shape, dtype=dtype, channels_last=order) for _ in tasks] or [self._stacked(shape, dtype)]
        gate = _empty(_TASKS, dtype=torch.float32)
        weights = TaskWeights(_empty(*shape, dtype=dtype, channels_last=order), delta, tasks, gate)
        batch = SortedBatch(*(torch.empty(n, dtype=torch.int64, device="meta") for n in (64, _TASKS + 1)))
        self.call = TaskConvCall(weights, batch, geometry, _empty(_TASKS, features, dtype=dtype))

    @staticmethod
    def _stacked(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        # channels last within each task, as a stack of channels_last filters is
        co, ci, kh, kw = shape
        return _empty(_TASKS, co, kh, kw, ci, dtype=dtype).permute(0, 1, 4, 2, 3)

    def forward(self) -> None:
        from fastmtl.kernels.task_weights import conv_launchers

        conv_launchers.conv2d(self.x, self.call)

    def backward(self, *wanted: bool) -> None:
        """`wanted`: x, weight, gate, bias, deltas."""
        from fastmtl.kernels.task_weights import conv_launchers

        deltas = range(len(self.call.weights.delta)) if wanted[4] else []
        conv_launchers.conv2d_backward(self.y, self.x, self.call, wanted[:4], deltas)


def _recorded(run: Callable[[], None], kernel: str, **forced: Any) -> Launch:
    with configs.force(**forced), recording() as launches:
        run()
    return next(made for made in launches if made.fn.__name__ == kernel)


# what a backward is asked for: only the input's gradient, only W's, all but the input's, only the deltas'
_ONLY_X, _ONLY_W = (True, False, False, False, False), (False, True, False, False, False)
_ALL_BUT_X, _ONLY_DELTAS = (False, True, True, True, True), (False, False, False, False, True)


class Case(NamedTuple):
    """A variant of a kernel, in all tiles of one table."""

    kernel: str
    variant: str
    tiles: str  # of `configs.TILES`; empty: the kernel has no tiles
    problem: dict[str, Any]
    wanted: tuple[bool, ...] | None  # None: the forward
    force: dict[str, Any]
    loads16: bool = True
    representative: bool = False


_FWD, _DGRAD = "task_conv2d_fwd_kernel", "task_conv2d_dgrad_kernel"
_WALK, _SPLIT = "task_conv2d_wgrad_walk_kernel", "task_conv2d_wgrad_split_kernel"
_STEM = {"kernel": 7, "stride": 2, "channels": 3}
# multiples of 8, which Triton does not look for: it sees multiples of 16
_EIGHTS = {"kernel": 3, "channels": 40, "features": 72}
_HEAD = {"kernel": 1, "channels": 1000, "features": 1000}

CASES = (
    Case(_FWD, "staged", "fwd", {"kernel": 3}, None, {"schedule": "staged"}, representative=True),
    Case(_FWD, "fused", "fwd_fused", {"kernel": 1}, None, {"schedule": "fused"}, representative=True),
    Case(_FWD, "fused-3x3-stacked", "fwd_fused", {"kernel": 3, "listed": False}, None, {"schedule": "fused"}),
    Case(_FWD, "packed", "fwd_packed", _STEM, None, {"schedule": "staged"}, loads16=False),
    Case(_DGRAD, "staged", "dgrad", {"kernel": 3}, _ONLY_X, {"schedule": "staged"}, representative=True),
    Case(_DGRAD, "strided", "dgrad", {"kernel": 3, "stride": 2}, _ONLY_X, {"schedule": "staged"}),
    Case(_DGRAD, "fused", "dgrad_fused", {"kernel": 1}, _ONLY_X, {"schedule": "fused"}, representative=True),
    Case(_DGRAD, "fused-3x3-stacked", "dgrad_fused", {"kernel": 3, "listed": False}, _ONLY_X, {"schedule": "fused"}),
    Case(_WALK, "all", "wgrad", {"kernel": 3}, _ALL_BUT_X, {"mode": "walk"}, representative=True),
    Case(_WALK, "deltas", "wgrad", {"kernel": 1, "listed": False}, _ONLY_DELTAS, {"mode": "walk"}),
    Case(_WALK, "weight", "wgrad", {"kernel": 3}, _ONLY_W, {"mode": "walk"}),
    Case(_WALK, "packed", "wgrad_packed", _STEM, _ALL_BUT_X, {"mode": "walk"}, loads16=False),
    Case(_SPLIT, "all", "wgrad_split", {"kernel": 3}, _ALL_BUT_X, {"mode": "split"}, representative=True),
    Case(_SPLIT, "deltas", "wgrad_split", {"kernel": 1, "listed": False}, _ONLY_DELTAS, {"mode": "split"}),
    Case(_SPLIT, "packed", "wgrad_packed", _STEM, _ALL_BUT_X, {"mode": "split"}, loads16=False),
    Case(_FWD, "eights", "fwd", _EIGHTS, None, {"schedule": "staged"}),
    Case(_FWD, "eights-fused", "fwd_fused", _HEAD, None, {"schedule": "fused"}),
    Case(_DGRAD, "eights", "dgrad", _EIGHTS, _ONLY_X, {"schedule": "staged"}),
    Case(_DGRAD, "eights-fused", "dgrad_fused", _HEAD, _ONLY_X, {"schedule": "fused"}),
    Case(_WALK, "eights", "wgrad", _EIGHTS, _ALL_BUT_X, {"mode": "walk"}),
    Case(_SPLIT, "eights", "wgrad_split", _EIGHTS, _ALL_BUT_X, {"mode": "split"}),
    Case("stage_kernel", "eights", "", _EIGHTS, None, {"schedule": "staged"}),
    Case("wgrad_finish_kernel", "eights", "", _HEAD, _ALL_BUT_X, {"mode": "split"}),
    Case("stage_kernel", "1x1", "", {"kernel": 1}, None, {"schedule": "staged"}),
    Case("stage_kernel", "3x3", "", {"kernel": 3}, None, {"schedule": "staged"}, representative=True),
    Case("stage_kernel", "3x3-contiguous", "", {"kernel": 3, "order": False}, None, {"schedule": "staged"}, False),
    Case("stage_kernel", "7x7-stacked", "", {"kernel": 7, "listed": False}, None, {"schedule": "staged"}, False),
    Case("wgrad_finish_kernel", "all", "", {"kernel": 3}, _ALL_BUT_X, {"mode": "split"}, representative=True),
    Case("wgrad_finish_kernel", "deltas", "", {"kernel": 3}, _ONLY_DELTAS, {"mode": "split"}),
    Case("sum_parts_kernel", "3x3", "", {"kernel": 3}, _ALL_BUT_X, {"chunks": 4}, representative=True),
    Case("gate_grad_kernel", "gate", "", {"kernel": 3}, _ALL_BUT_X, {}, False, representative=True),
    Case("bias_grad_kernel", "bias", "", {"kernel": 3}, _ALL_BUT_X, {}, representative=True),
    Case("pointer_table_kernel", "list", "", {"kernel": 3}, None, {}, False, representative=True),
)


def _tiles(case: Case, dtype: torch.dtype) -> dict[Tile | None, tuple[int, ...]]:
    """What a case is compiled with, and for which architectures; the first of each table comes first there."""
    if not case.tiles:
        return {None: (80, 90)}
    general, hopper = (configs.tiles_of(case.tiles, dtype, on_hopper) for on_hopper in (False, True))
    archs = dict.fromkeys(general, (80, 90))
    return archs | {tile: (90,) for tile in hopper if tile not in archs}


def _targets(case: Case, dtype: torch.dtype) -> Iterator[BuildTarget]:
    problem = Problem(dtype, **case.problem)
    run = problem.forward if case.wanted is None else functools.partial(problem.backward, *case.wanted)
    archs_before: set[tuple[int, ...]] = set()
    for tile, archs in _tiles(case, dtype).items():
        forced = case.force if tile is None else {**case.force, case.tiles: tile}
        made = _recorded(run, case.kernel, **forced)
        size = "" if tile is None else f"-{tile.rows}x{tile.cols}x{tile.depth}"
        # another table may have a tile of that size for more or fewer warps
        size += "-hopper" if archs == (90,) else ""
        name = f"{case.kernel}-{case.variant}{size}-{_TYPE_NAMES[dtype]}"
        representative = case.representative and archs not in archs_before
        archs_before.add(archs)
        target = as_target(name, made, dtype, representative, tile is not None, case.loads16)
        group = tile is not None and dtype != torch.float32 and tile.rows >= 64 and tile.num_warps >= 4
        yield target._replace(archs=archs, expects_wgmma=group)


def build_targets() -> Iterator[BuildTarget]:
    """Every kernel of `task_conv2d` and `task_linear` in every configuration."""
    for dtype in DTYPES:
        for case in CASES:
            yield from _targets(case, dtype)
