"""Tile sizes of the Triton kernels, the rules that choose between schedules, and what is compiled ahead of time."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

# where there is no device to ask: an H100's
ASSUMED_SMS = 132
ASSUMED_SHARED = 227 * 1024

# rows of the product per task up to which W + s Delta is added in the main loop: about one tile, so that each weight
# is read once either way. To be set by measurement.
FUSED_MAX_ROWS = 128
# a 3x3 in NCHW is copied to channels_last from this many channels on: below, a tile gathers single elements anyway
CHANNELS_LAST_MIN_CHANNELS = 8
# channels per group up to which a K block spans several taps
PACKED_MAX_CHANNELS = 24
# pixels of a picture up to which its rows are found by division in float32, which is exact there
SMALL_PIXELS = 2**20
# elements that a block of the staging kernel writes
STAGE_BLOCK = 2048
# likewise of the kernel that finishes a split weight gradient; and columns, rows of a step of the bias gradient
FINISH_BLOCK = 512
BIAS_TILE = (64, 32)
# blocks per SM that a weight gradient should at least have; below, rows are split too
WGRAD_BLOCKS_PER_SM = 1
# rows that a split of the weight gradient should at least have
WGRAD_MIN_SPLIT_ROWS = 256


class Tile(NamedTuple):
    """One configuration: rows, columns and depth of a block's product."""

    rows: int
    cols: int
    depth: int
    num_warps: int
    num_stages: int


class BuildTarget(NamedTuple):
    """One kernel in one configuration, as `triton.compiler.ASTSource` takes it."""

    name: str
    fn: Any  # the JITFunction
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[tuple[int], list[list[Any]]]
    num_warps: int
    num_stages: int
    dtype: torch.dtype
    representative: bool  # the one of its kernel and dtype that every test run compiles
    expects_mma: bool
    expects_wide_loads: bool
    max_registers: int | None = None


_WIDE, _NARROW = "16 bit", "32 bit"

# kernel -> width of the dtype -> tiles, largest first. Rows of forward and dgrad are pixels; of wgrad they are output
# channels, and depth counts pixels.
TILES: dict[str, dict[str, tuple[Tile, ...]]] = {
    "fwd": {
        _WIDE: (
            Tile(128, 128, 64, 8, 3),
            Tile(128, 64, 64, 8, 4),
            Tile(64, 64, 64, 4, 4),
            Tile(64, 32, 64, 4, 4),
            Tile(64, 16, 32, 4, 4),
            Tile(32, 64, 64, 4, 4),
            Tile(16, 64, 64, 4, 4),
        ),
        _NARROW: (
            Tile(128, 64, 32, 8, 3),
            Tile(64, 64, 32, 8, 3),
            Tile(64, 32, 32, 4, 3),
            Tile(64, 16, 32, 4, 3),
            Tile(32, 64, 32, 4, 3),
            Tile(16, 64, 32, 4, 3),
        ),
    },
    "fwd_fused": {
        _WIDE: (Tile(128, 64, 32, 8, 3), Tile(64, 64, 64, 4, 3), Tile(32, 64, 64, 4, 3), Tile(16, 64, 64, 4, 3)),
        _NARROW: (Tile(64, 64, 32, 8, 3), Tile(64, 32, 32, 4, 3), Tile(32, 64, 32, 8, 2), Tile(16, 64, 32, 4, 3)),
    },
    "fwd_packed": {
        _WIDE: (Tile(128, 64, 32, 8, 2), Tile(64, 64, 32, 4, 2), Tile(64, 32, 32, 4, 2), Tile(64, 16, 16, 4, 2)),
        _NARROW: (Tile(64, 64, 16, 8, 2), Tile(64, 32, 16, 4, 2), Tile(64, 16, 16, 4, 2)),
    },
    "dgrad": {
        _WIDE: (
            Tile(128, 128, 64, 8, 3),
            Tile(128, 64, 64, 8, 4),
            Tile(64, 64, 64, 4, 4),
            Tile(64, 32, 64, 4, 4),
            Tile(64, 16, 32, 4, 4),
            Tile(32, 64, 64, 4, 4),
            Tile(16, 64, 64, 4, 4),
        ),
        _NARROW: (
            Tile(128, 64, 32, 8, 3),
            Tile(64, 64, 32, 8, 3),
            Tile(64, 32, 32, 4, 3),
            Tile(64, 16, 32, 4, 3),
            Tile(32, 64, 32, 4, 3),
            Tile(16, 64, 32, 4, 3),
        ),
    },
    "dgrad_fused": {
        _WIDE: (Tile(128, 64, 32, 8, 3), Tile(64, 64, 64, 4, 3), Tile(32, 64, 64, 4, 3), Tile(16, 64, 64, 4, 3)),
        _NARROW: (Tile(64, 64, 32, 8, 3), Tile(64, 32, 32, 4, 3), Tile(32, 64, 32, 8, 2), Tile(16, 64, 32, 4, 3)),
    },
    "wgrad": {
        _WIDE: (Tile(128, 128, 32, 8, 4), Tile(64, 128, 64, 8, 4), Tile(64, 64, 64, 4, 4), Tile(32, 64, 64, 4, 4)),
        _NARROW: (Tile(64, 64, 16, 8, 4), Tile(64, 32, 32, 8, 3), Tile(32, 32, 32, 4, 3)),
    },
    "wgrad_packed": {
        _WIDE: (Tile(64, 64, 32, 8, 2), Tile(64, 32, 32, 4, 2), Tile(16, 16, 32, 4, 1)),
        _NARROW: (Tile(32, 64, 16, 8, 2), Tile(32, 32, 16, 8, 2), Tile(16, 16, 16, 4, 1)),
    },
}

# bytes of traffic weighed against products in the wave model below. To be set by measurement.
LOAD_COST = 64

_forced: dict[str, Any] = {}
# what can be forced beside a tile
_NAMED: dict[str, tuple[str, ...]] = {"schedule": ("staged", "fused"), "mode": ("walk", "split")}
_COUNTS = ("chunks", "split_rows")


@contextlib.contextmanager
def force(**choices: Any) -> Iterator[None]:
    """Overrides the rules inside the block, for tests and measurements.

    Args:
        choices: `schedule` ("staged" or "fused"); of the weight gradient `mode` ("walk" or "split"), `chunks` (of
            tasks) and `split_rows`; and a `Tile` under the name of any kernel of `TILES`. None: the rule.

    Raises:
        TypeError, ValueError: another name, or a value that is none of its choice.
    """
    for choice, value in choices.items():
        _check_choice(choice, value)
    before = dict(_forced)
    _forced.update(choices)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def _check_choice(choice: str, value: Any) -> None:
    if choice not in (*_NAMED, *_COUNTS, *TILES):
        expected = ", ".join((*_NAMED, *_COUNTS, *TILES))
        raise ValueError(f"force: expected choices among {expected}, got {choice!r}")
    if value is None:
        return
    if choice in _NAMED:
        if value not in _NAMED[choice]:
            raise ValueError(f"{choice}: expected one of {', '.join(_NAMED[choice])}, got {value!r}")
        return
    sizes = (value,)
    if choice in TILES:
        if not isinstance(value, Tile):
            raise TypeError(f"{choice}: expected a Tile, got {value!r}")
        sizes = value
    if any(not isinstance(size, int) or isinstance(size, bool) or size < 1 for size in sizes):
        raise ValueError(f"{choice}: expected numbers of at least 1, got {value!r}")


def forced(choice: str) -> Any:
    return _forced.get(choice)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@functools.cache
def device_limits(device: torch.device) -> tuple[int, int]:
    """Processors, and bytes of shared memory that a block may take."""
    if device.type != "cuda":
        return ASSUMED_SMS, ASSUMED_SHARED
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, found.shared_memory_per_block_optin


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def tiles_of(kernel: str, dtype: torch.dtype) -> tuple[Tile, ...]:
    return TILES[kernel][_NARROW if dtype == torch.float32 else _WIDE]


def pick_tile(kernel: str, parts: int, rows: int, cols: int, groups: int, operand: Tensor) -> Tile:
    """The tile with the least cost: waves of blocks, each the products and loads of its tile.

    Args:
        kernel: of `TILES`.
        parts: products of `rows` x `cols`, of which a tile holds one only; and so `groups` times.
        rows, cols, groups: see `parts`.
        operand: a tensor of the operands' dtype and device.
    """
    if (tile := forced(kernel)) is not None:
        return tile
    sms, shared = device_limits(operand.device)

    def cost(tile: Tile) -> int:
        blocks = parts * _cdiv(rows, tile.rows) * _cdiv(cols, tile.cols) * groups
        return _cdiv(blocks, sms) * (tile.rows * tile.cols + LOAD_COST * (tile.rows + tile.cols))

    best = min(tiles_of(kernel, operand.dtype), key=cost)
    # fused: two filters on the way in
    block = (best.rows + best.cols * (2 if kernel.endswith("fused") else 1)) * best.depth * operand.dtype.itemsize
    return best._replace(num_stages=max(1, min(best.num_stages, shared // block)))


class WgradPlan(NamedTuple):
    """How a weight gradient is shared out. `split_rows` 0: a block walks the tasks of a chunk."""

    chunk_tasks: int
    split_rows: int


def pick_wgrad(tiles: int, num_tasks: int, parts: int, rows: int, depth: int, operand: Tensor) -> WgradPlan:
    """Walk where tiles, or tiles and chunks of tasks, fill the device; else split the rows.

    Args:
        tiles: of the filter.
        num_tasks: T; `parts` of them can have rows.
        rows: of the batch; `depth` of them in a step.
        parts, depth: see above.
        operand: a tensor on the device.
    """
    sms = device_limits(operand.device)[0]
    chunks = min(max(1, sms * WGRAD_BLOCKS_PER_SM // max(tiles, 1)), num_tasks)
    walk = (chunks == 1 and tiles >= sms // 2) or parts >= 2 * chunks > 2
    mode = forced("mode") or ("walk" if walk else "split")
    chunk_tasks = _cdiv(num_tasks, forced("chunks") or chunks)
    if mode == "walk":
        return WgradPlan(chunk_tasks, 0)
    return WgradPlan(chunk_tasks, pick_split_rows(tiles, rows, depth, operand))


def pick_split_rows(tiles: int, rows: int, depth: int, operand: Tensor) -> int:
    """Rows of a split, a multiple of `depth`, so that `tiles` times the splits fill the device."""
    if (split := forced("split_rows")) is not None:
        return split
    splits = max(1, device_limits(operand.device)[0] * WGRAD_BLOCKS_PER_SM // max(tiles, 1))
    return _cdiv(max(_cdiv(rows, splits), WGRAD_MIN_SPLIT_ROWS), depth) * depth


def pick_schedule(rows_per_task: int, channels_contiguous: bool) -> str:
    """ "staged": W_eff of the tasks in use is written first; "fused": W + s Delta is added in the main loop."""
    if (schedule := forced("schedule")) is not None:
        return schedule
    return "fused" if channels_contiguous and rows_per_task <= FUSED_MAX_ROWS else "staged"


def build_targets() -> Iterator[BuildTarget]:
    """Every kernel in every configuration, for compiling without a device. Not under the interpreter."""
    from fastmtl.kernels import _targets

    yield from _targets.build_targets()
