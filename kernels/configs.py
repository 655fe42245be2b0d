"""Tile sizes of the Triton kernels, the rules that choose between schedules, and what is compiled ahead of time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

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
# elements that a block of the staging kernel writes
STAGE_BLOCK = 2048
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


_WIDE, _NARROW = "16 bit", "32 bit"

# kernel -> width of the dtype -> tiles, largest first. Rows of forward and dgrad are pixels; of wgrad they are output
# channels, and depth counts pixels.
TILES: dict[str, dict[str, tuple[Tile, ...]]] = {
    "fwd": {
        _WIDE: (
            Tile(128, 128, 64, 8, 3),
            Tile(128, 64, 64, 4, 4),
            Tile(64, 128, 64, 4, 3),
            Tile(64, 64, 64, 4, 4),
            Tile(64, 32, 64, 4, 4),
            Tile(64, 16, 32, 4, 4),
            Tile(32, 64, 64, 4, 4),
            Tile(16, 64, 64, 4, 4),
        ),
        _NARROW: (
            Tile(128, 64, 32, 8, 3),
            Tile(64, 64, 32, 4, 3),
            Tile(64, 32, 32, 4, 3),
            Tile(64, 16, 32, 4, 3),
            Tile(32, 64, 32, 4, 3),
            Tile(16, 64, 32, 4, 3),
        ),
    },
}

# bytes of traffic weighed against products in the wave model below. To be set by measurement.
LOAD_COST = 64

_forced: dict[str, Any] = {}


@contextlib.contextmanager
def force(**choices: Any) -> Iterator[None]:
    """Overrides the rules inside the block, for tests and measurements.

    Args:
        choices: `schedule` ("staged" or "fused"), `wgrad` ("walk" or "split"), `chunks` (of tasks), `split_rows`, and
            the tiles `fwd`, `dgrad`, `wgrad_tile` (a `Tile`).
    """
    before = dict(_forced)
    _forced.update(choices)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def forced(choice: str) -> Any:
    return _forced.get(choice)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def tiles_of(kernel: str, dtype: torch.dtype) -> tuple[Tile, ...]:
    return TILES[kernel][_NARROW if dtype == torch.float32 else _WIDE]


def pick_tile(
    kernel: str,
    dtype: torch.dtype,
    num_tasks: int,
    rows: int,
    cols: int,
    depth: int,
    groups: int,
    sms: int,
    shared: int,
) -> Tile:
    """The tile with the least cost: waves of blocks, each the products and loads of its tile.

    Args:
        kernel: of `TILES`.
        dtype: of the operands.
        num_tasks: parts of which a tile holds one only.
        rows: of each part.
        cols: of the product, per group; depth: likewise.
        groups: independent products.
        sms: processors of the device.
        shared: bytes of shared memory that a block may take.
    """
    if (tile := forced(kernel)) is not None:
        return tile

    def cost(tile: Tile) -> int:
        blocks = num_tasks * _cdiv(rows, tile.rows) * _cdiv(cols, tile.cols) * groups
        work = tile.rows * tile.cols + LOAD_COST * (tile.rows + tile.cols)
        return _cdiv(blocks, sms) * work

    best = min(tiles_of(kernel, dtype), key=cost)
    block = (best.rows + best.cols) * best.depth * dtype.itemsize
    stages = max(1, min(best.num_stages, shared // max(block, 1)))
    return best._replace(num_stages=stages, depth=min(best.depth, max(16, next_power_of_2(depth))))


def pick_schedule(rows_per_task: int, channels_contiguous: bool) -> str:
    """ "staged": W_eff of the tasks in use is written first; "fused": W + s Delta is added in the main loop."""
    if (schedule := forced("schedule")) is not None:
        return schedule
    return "fused" if channels_contiguous and rows_per_task <= FUSED_MAX_ROWS else "staged"


def build_targets() -> Iterator[BuildTarget]:
    """Every kernel in every configuration, for compiling without a device. Not under the interpreter."""
    from fastmtl.kernels import _targets

    yield from _targets.build_targets()
