"""What of `task_lora` is compiled ahead of time: its launches on tensors of the meta device, tile by tile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmtl.core.task_weights import TaskLoraCall
from fastmtl.kernels.common.build_target import _TYPE_NAMES, BuildTarget, as_target
from fastmtl.kernels.common.launches import Launch, recording
from fastmtl.kernels.task_weights import configs

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_TASKS, _CHANNELS, _FEATURES = 8, 768, 3072


class Case(NamedTuple):
    """A variant of a kernel, in all tiles of one table. `number`: which of the kernel's launches in a backward pass."""

    kernel: str
    variant: str
    tiles: str  # of `configs.TILES`; empty: the kernel has no tiles
    backward: bool
    number: int = 0
    ranks: tuple[int, ...] = (16,)
    listed: bool = True
    wide_factors: bool = False  # float32 beside 16 bits
    force: tuple[tuple[str, Any], ...] = (("mode", "walk"),)
    mma: bool = True
    representative: bool = False


_SHRINK, _EXPAND, _WGRAD = "task_lora_shrink_kernel", "task_lora_expand_kernel", "task_lora_wgrad_kernel"
_SPLIT = (("mode", "split"), ("split_rows", 512))
CASES = (
    Case(_SHRINK, "forward", "lora_shrink", False, representative=True),
    Case(_SHRINK, "backward", "lora_shrink", True, ranks=(8, 16)),
    Case(_SHRINK, "wide-factors", "lora_shrink", False, wide_factors=True),
    Case(_SHRINK, "stacked", "lora_shrink", True, listed=False),
    Case(_EXPAND, "forward", "lora_expand", False, representative=True),
    Case(_EXPAND, "input", "lora_expand", True, ranks=(8, 16)),
    Case(_EXPAND, "stacked", "lora_expand", False, listed=False),
    Case(_WGRAD, "A", "lora_wgrad", True, representative=True),
    Case(_WGRAD, "B", "lora_wgrad", True, number=1, ranks=(8, 16)),
    Case(_WGRAD, "A-split", "lora_wgrad", True, force=_SPLIT),
    Case("task_lora_finish_kernel", "A", "", True, force=_SPLIT, mma=False, representative=True),
    Case("task_lora_finish_kernel", "B", "", True, number=1, ranks=(8, 16), force=_SPLIT, mma=False),
    Case("task_lora_scaling_grad_kernel", "scaling", "", True, mma=False, representative=True),
)


def _empty(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def _launches(case: Case, dtype: torch.dtype) -> list[Launch]:
    from fastmtl.kernels.task_weights import lora_launchers

    factor_dtype = torch.float32 if case.wide_factors else dtype
    x, y = _empty(64, 197, _CHANNELS, dtype=dtype), _empty(64, 197, _FEATURES, dtype=dtype)
    ranks = [case.ranks[t % len(case.ranks)] for t in range(_TASKS)]
    if case.listed:
        A = [_empty(r, _CHANNELS, dtype=factor_dtype) for r in ranks]
        B = [_empty(_FEATURES, r, dtype=factor_dtype) for r in ranks]
    else:
        A = [_empty(_TASKS, ranks[0], _CHANNELS, dtype=factor_dtype)]
        B = [_empty(_TASKS, _FEATURES, ranks[0], dtype=factor_dtype)]
    order, offsets = (torch.empty(n, dtype=torch.int64, device="meta") for n in (64, _TASKS + 1))
    tasks = list(range(_TASKS)) if case.listed else []
    scaling = _empty(_TASKS, dtype=torch.float32)
    call = TaskLoraCall.of(_empty(_FEATURES, _CHANNELS, dtype=dtype), A, B, tasks, scaling, None, order, offsets)
    with recording() as made:
        if case.backward:
            every = list(range(len(A)))
            lora_launchers.lora_backward(y, x, call, [True, False, True, False], every, every)
        else:
            lora_launchers.lora(x, call)
    return [each for each in made if each.fn.__name__ == case.kernel]


def build_targets() -> Iterator[BuildTarget]:
    """Every kernel of `task_lora` in every configuration."""
    for dtype in DTYPES:
        for case in CASES:
            if case.wide_factors and dtype == torch.float32:
                continue
            first = True
            for tile in configs.tiles_of(case.tiles, dtype) if case.tiles else (None,):
                forced = dict(case.force) | ({} if tile is None else {case.tiles: tile})
                with configs.force(**forced):
                    made = _launches(case, dtype)[case.number]
                size = "" if tile is None else f"-{tile.rows}x{tile.cols}x{tile.depth}"
                name = f"{case.kernel}-{case.variant}{size}-{_TYPE_NAMES[dtype]}"
                yield as_target(name, made, dtype, case.representative and first, case.mma, case.mma)
                first = False
