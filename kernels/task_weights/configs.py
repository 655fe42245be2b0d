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
STAGE_BLOCK = 4096
# likewise of the kernel that finishes a split weight gradient; and columns, rows of a step of the bias gradient
FINISH_BLOCK = 512
BIAS_TILE = (64, 32)
# waves of blocks that a weight gradient with split rows is tried in, and rows that a piece has at least
WGRAD_WAVES = (1, 2, 3, 4)
WGRAD_MIN_SPLIT_ROWS = 256
# pieces beside one for each task, which is as much as a grid has room for: see TRITON_MAX_TASKS
MAX_PIECES = 1024
# blocks per SM of the bias gradient
BIAS_BLOCKS_PER_SM = 2


class Tile(NamedTuple):
    """One configuration: rows, columns and depth of a block's product."""

    rows: int
    cols: int
    depth: int
    num_warps: int
    num_stages: int


_SIXTEEN_BIT, _FLOAT32, _HOPPER = "16 bit", "float32", "16 bit on sm_90"

# kernel -> width of the dtype -> tiles, largest first. Rows of forward and dgrad are pixels; of wgrad they are output
# channels, and depth counts pixels. On sm_90 four warps hold 128 x 128 without spills (operands are read from shared
# memory), so that two blocks share a processor.
TILES: dict[str, dict[str, tuple[Tile, ...]]] = {
    "fwd": {
        _SIXTEEN_BIT: (
            Tile(128, 128, 64, 8, 3),
            Tile(128, 64, 64, 8, 4),
            Tile(64, 64, 64, 4, 4),
            Tile(64, 32, 64, 4, 4),
            Tile(64, 16, 32, 4, 4),
            Tile(32, 64, 64, 4, 4),
            Tile(16, 64, 64, 4, 4),
        ),
        _HOPPER: (
            Tile(128, 128, 64, 4, 3),
            Tile(64, 128, 64, 4, 4),
            Tile(128, 64, 64, 4, 4),
            Tile(64, 64, 64, 4, 4),
            Tile(64, 32, 64, 4, 4),
            Tile(64, 16, 32, 4, 4),
            Tile(32, 64, 64, 4, 4),
            Tile(16, 64, 64, 4, 4),
        ),
        _FLOAT32: (
            Tile(128, 64, 32, 8, 3),
            Tile(64, 64, 32, 8, 3),
            Tile(64, 32, 32, 4, 3),
            Tile(64, 16, 32, 4, 3),
            Tile(32, 64, 32, 4, 3),
            Tile(16, 64, 32, 4, 3),
        ),
    },
    "fwd_fused": {
        _SIXTEEN_BIT: (Tile(128, 64, 32, 8, 3), Tile(64, 64, 64, 4, 3), Tile(32, 64, 64, 4, 3), Tile(16, 64, 64, 4, 3)),
        _FLOAT32: (Tile(64, 64, 32, 8, 3), Tile(64, 32, 32, 4, 3), Tile(32, 64, 32, 8, 2), Tile(16, 64, 32, 4, 3)),
    },
    "fwd_packed": {
        _SIXTEEN_BIT: (Tile(128, 64, 32, 8, 2), Tile(64, 64, 32, 4, 2), Tile(64, 32, 32, 4, 2), Tile(64, 16, 16, 4, 2)),
        _FLOAT32: (Tile(64, 64, 16, 8, 2), Tile(64, 32, 16, 4, 2), Tile(64, 16, 16, 4, 2)),
    },
    "dgrad": {
        _SIXTEEN_BIT: (
            Tile(128, 128, 64, 8, 3),
            Tile(128, 64, 64, 8, 4),
            Tile(64, 64, 64, 4, 4),
            Tile(64, 32, 64, 4, 4),
            Tile(64, 16, 32, 4, 4),
            Tile(32, 64, 64, 4, 4),
            Tile(16, 64, 64, 4, 4),
        ),
        _HOPPER: (
            Tile(128, 128, 64, 4, 3),
            Tile(64, 128, 64, 4, 4),
            Tile(128, 64, 64, 4, 4),
            Tile(64, 64, 64, 4, 4),
            Tile(64, 32, 64, 4, 4),
            Tile(64, 16, 32, 4, 4),
            Tile(32, 64, 64, 4, 4),
            Tile(16, 64, 64, 4, 4),
        ),
        _FLOAT32: (
            Tile(128, 64, 32, 8, 3),
            Tile(64, 64, 32, 8, 3),
            Tile(64, 32, 32, 4, 3),
            Tile(64, 16, 32, 4, 3),
            Tile(32, 64, 32, 4, 3),
            Tile(16, 64, 32, 4, 3),
        ),
    },
    "dgrad_fused": {
        _SIXTEEN_BIT: (Tile(128, 64, 32, 8, 3), Tile(64, 64, 64, 4, 3), Tile(32, 64, 64, 4, 3), Tile(16, 64, 64, 4, 3)),
        _FLOAT32: (Tile(64, 64, 32, 8, 3), Tile(64, 32, 32, 4, 3), Tile(32, 64, 32, 8, 2), Tile(16, 64, 32, 4, 3)),
    },
    # a walk holds two accumulators: the task's and the sum. On sm_90 tiles are square: rows and columns of different
    # sizes are loaded in two layouts, each with places of its own, and took twice as long
    "wgrad": {
        _SIXTEEN_BIT: (Tile(128, 128, 32, 8, 2), Tile(64, 128, 32, 8, 4), Tile(64, 64, 64, 8, 4)),
        _HOPPER: (Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 8, 4)),
        _FLOAT32: (Tile(64, 64, 16, 8, 4), Tile(64, 32, 32, 8, 3), Tile(32, 32, 32, 4, 3)),
    },
    "wgrad_split": {
        _SIXTEEN_BIT: (
            Tile(128, 128, 32, 8, 4),
            Tile(64, 128, 64, 8, 4),
            Tile(64, 64, 64, 8, 4),
            Tile(32, 64, 32, 4, 4),
        ),
        _HOPPER: (Tile(128, 128, 64, 4, 3), Tile(64, 64, 64, 8, 4)),
        _FLOAT32: (Tile(64, 64, 16, 8, 4), Tile(64, 32, 32, 8, 3), Tile(32, 32, 32, 4, 3)),
    },
    "wgrad_packed": {
        _SIXTEEN_BIT: (Tile(64, 64, 32, 8, 2), Tile(64, 32, 32, 8, 2), Tile(16, 16, 32, 4, 1)),
        _FLOAT32: (Tile(32, 64, 16, 8, 2), Tile(32, 32, 16, 8, 2), Tile(16, 16, 16, 4, 1)),
    },
    # low-rank deltas: columns are the rank's; of the gradients of A and B, rows are columns of x or of dY
    "lora_shrink": {
        _SIXTEEN_BIT: (
            Tile(64, 64, 64, 4, 3),
            Tile(64, 32, 64, 4, 3),
            Tile(64, 16, 64, 4, 4),
            Tile(32, 32, 64, 4, 4),
            Tile(32, 16, 64, 4, 4),
            Tile(16, 16, 128, 4, 4),
        ),
        _FLOAT32: (Tile(64, 32, 32, 4, 3), Tile(64, 16, 32, 4, 3), Tile(32, 16, 32, 4, 3), Tile(16, 16, 64, 4, 3)),
    },
    "lora_expand": {
        _SIXTEEN_BIT: (Tile(64, 128, 32, 4, 2), Tile(64, 64, 32, 4, 2), Tile(32, 64, 32, 4, 2), Tile(16, 64, 32, 4, 2)),
        _FLOAT32: (Tile(64, 64, 16, 4, 2), Tile(32, 64, 16, 4, 2), Tile(16, 64, 16, 4, 2)),
    },
    "lora_wgrad": {
        _SIXTEEN_BIT: (
            Tile(128, 64, 64, 4, 3),
            Tile(128, 32, 64, 4, 3),
            Tile(128, 16, 64, 4, 3),
            Tile(64, 16, 64, 4, 4),
        ),
        _FLOAT32: (Tile(64, 32, 32, 4, 3), Tile(64, 16, 32, 4, 3), Tile(32, 16, 32, 4, 3)),
    },
}

# The models of time below count in products of one processor: about 2100 in a clock of an H100 in 16 bits.
# An element of an operand, loaded; with it the model's order of the forward's tiles is the measured one.
LOAD_COST = 64
# Of weight gradients, where an element's way is longer; what a step waits, whatever its size; a block's first loads and
# its results; a launch more; a byte of a workspace, written and read; a piece in the sum of the pieces, which one block
# adds up; and how much longer than the average chunk of tasks the largest is. With these the model is within 30% of
# what an H100 took for seven of eight layers; see docs/kernels/task-kernels.md.
WGRAD_LOAD_COST = 100
STEP_COST = 400_000
BLOCK_COST = 4_000_000
LAUNCH_COST = 10_000_000
WORKSPACE_COST = 2.6
PIECE_COST = 200_000
IMBALANCE = 1.75

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


def choices() -> tuple[Any, ...]:
    """What is forced, for plans that depend on it."""
    return tuple(_forced.items())


def forced(choice: str) -> Any:
    return _forced.get(choice)


class Limits(NamedTuple):
    """Of a device: processors, bytes of shared memory that a block may take, and whether it is an sm_90."""

    sms: int
    shared: int
    hopper: bool


@functools.cache
def device_limits(device: torch.device) -> Limits:
    if device.type != "cuda":
        return Limits(ASSUMED_SMS, ASSUMED_SHARED, True)
    found = torch.cuda.get_device_properties(device)
    return Limits(found.multi_processor_count, found.shared_memory_per_block_optin, found.major == 9)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def tiles_of(kernel: str, dtype: torch.dtype, hopper: bool = True) -> tuple[Tile, ...]:
    """The tiles of a kernel; `hopper`: on sm_90."""
    table = TILES[kernel]
    if dtype == torch.float32:
        return table[_FLOAT32]
    return table[_HOPPER] if hopper and _HOPPER in table else table[_SIXTEEN_BIT]


def _fitting(tile: Tile, shared: int, itemsize: int, filters: int = 1) -> Tile:
    """With fewer buffers where the device has little shared memory."""
    buffer = (tile.rows + tile.cols * filters) * tile.depth * itemsize
    return tile._replace(num_stages=max(1, min(tile.num_stages, shared // buffer)))


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
    limits = device_limits(operand.device)

    def cost(tile: Tile) -> int:
        blocks = parts * _cdiv(rows, tile.rows) * _cdiv(cols, tile.cols) * groups
        return _cdiv(blocks, limits.sms) * (tile.rows * tile.cols + LOAD_COST * (tile.rows + tile.cols))

    best = min(tiles_of(kernel, operand.dtype, limits.hopper), key=cost)
    # fused: two filters on the way in
    return _fitting(best, limits.shared, operand.dtype.itemsize, 2 if kernel.endswith("fused") else 1)


class Filter(NamedTuple):
    """What a weight gradient's tiles cover: `groups` times `taps` matrices of `rows` x `cols`."""

    rows: int
    cols: int
    taps: int
    groups: int
    packed: bool  # the taps are among the columns

    @classmethod
    def of(cls, features: int, channels: int, taps: int, groups: int) -> Filter:
        """`features`: of all groups; `channels`: of one."""
        packed = channels <= PACKED_MAX_CHANNELS
        cols, taps = (channels * taps, 1) if packed else (channels, taps)
        return cls(features // groups, cols, taps, groups, packed)

    def tiles(self, tile: Tile) -> int:
        """Of one group."""
        return _cdiv(self.rows, tile.rows) * _cdiv(self.cols, tile.cols) * self.taps

    @property
    def size(self) -> int:
        return self.rows * self.cols * self.taps * self.groups


class WgradPlan(NamedTuple):
    """How a weight gradient is shared out. `split_rows` 0: a block walks the tasks of a chunk."""

    tile: Tile
    chunk_tasks: int
    split_rows: int
    cost: float = 0.0  # in the model


def pick_wgrad(shape: Filter, num_tasks: int, parts: int, rows: int, summed: bool, operand: Tensor) -> WgradPlan:
    """Tile, walk or split, and chunks or pieces together: the plan with the least cost in a model of time.

    How many rows each task has is known on the device only. The model takes the tasks for equally large; a piece has at
    most `split_rows` rows however large they are, a walk goes as far as the largest chunk of tasks.

    Args:
        shape: of the filter.
        num_tasks: T; `parts` of them can have rows.
        parts: see above.
        rows: of the batch.
        summed: whether W's gradient is wanted, for which chunks of tasks are added up.
        operand: a tensor of the operands' dtype and device.
    """
    given = tuple(forced(choice) for choice in ("mode", "chunks", "split_rows", "wgrad", "wgrad_split", "wgrad_packed"))
    return _plan_wgrad(shape, num_tasks, parts, rows, summed, operand.dtype, operand.device, given)


@functools.lru_cache(maxsize=4096)
def _plan_wgrad(
    shape: Filter,
    num_tasks: int,
    parts: int,
    rows: int,
    summed: bool,
    dtype: torch.dtype,
    device: torch.device,
    given: tuple[Any, ...],
) -> WgradPlan:
    mode, chunks, split_rows, walk_tile, split_tile, packed_tile = given
    limits = device_limits(device)

    def tiles(kernel: str, tile: Tile | None) -> list[Tile]:
        if shape.packed:
            kernel, tile = "wgrad_packed", packed_tile
        found = [tile] if tile is not None else tiles_of(kernel, dtype, limits.hopper)
        return [_fitting(each, limits.shared, dtype.itemsize) for each in found]

    plans = []
    if mode != "split":
        counts = [chunks] if chunks is not None else sorted({min(1 << k, num_tasks) for k in range(8)})
        for tile in tiles("wgrad", walk_tile):
            plans += [_walked(shape, tile, num_tasks, parts, rows, summed, limits.sms, count) for count in counts]
    if mode != "walk":
        for tile in tiles("wgrad_split", split_tile):
            for waves in WGRAD_WAVES:
                each = split_rows or _piece(shape, tile, parts, rows, limits.sms * waves)
                plans.append(_split(shape, tile, num_tasks, parts, rows, summed, limits.sms, chunks, each))
    return min(plans, key=lambda plan: plan.cost)


def _step(tile: Tile) -> int:
    return tile.depth * (tile.rows * tile.cols + WGRAD_LOAD_COST * (tile.rows + tile.cols)) + STEP_COST


def _walked(
    shape: Filter, tile: Tile, num_tasks: int, parts: int, rows: int, summed: bool, sms: int, chunks: int
) -> WgradPlan:
    chunk_tasks = _cdiv(num_tasks, chunks)
    chunks = _cdiv(num_tasks, chunk_tasks)
    # each task's last step is half full on average
    steps = _cdiv(_cdiv(rows, chunks), tile.depth) + _cdiv(parts, 2 * chunks)
    block = steps * _step(tile) + _cdiv(parts, chunks) * BLOCK_COST
    cost = _cdiv(shape.tiles(tile) * shape.groups * chunks, sms) * block
    if chunks > 1 and parts > 1:
        cost *= IMBALANCE
    if chunks > 1 and summed:
        cost += LAUNCH_COST + WORKSPACE_COST * 4 * shape.size * chunks
    return WgradPlan(tile, chunk_tasks, 0, cost)


def _piece(shape: Filter, tile: Tile, parts: int, rows: int, blocks: int) -> int:
    """Rows of a piece, a multiple of the tile's depth, so that the tiles' pieces are about so many blocks."""
    # the last piece of each task is half full on average
    pieces = max(1, blocks // max(1, shape.tiles(tile) * shape.groups) - parts // 2)
    # where a piece could hold a whole task, one that is larger than the others is shared out all the same
    pieces = max(pieces, min(_cdiv(2 * parts, 3), MAX_PIECES))
    return _cdiv(max(_cdiv(rows, pieces), WGRAD_MIN_SPLIT_ROWS), tile.depth) * tile.depth


def _split(
    shape: Filter,
    tile: Tile,
    num_tasks: int,
    parts: int,
    rows: int,
    summed: bool,
    sms: int,
    chunks: int | None,
    split_rows: int,
) -> WgradPlan:
    pieces = max(_cdiv(rows, split_rows) + parts // 2, parts)
    if chunks is None:
        # as many as it takes for the sums of the pieces to fill the device
        chunks = min(num_tasks, max(1, sms // max(1, _cdiv(shape.size, FINISH_BLOCK))))
    chunk_tasks = _cdiv(num_tasks, chunks)
    steps = _cdiv(min(split_rows, _cdiv(rows, parts)), tile.depth)
    cost = _cdiv(shape.tiles(tile) * shape.groups * pieces, sms) * (steps * _step(tile) + BLOCK_COST)
    cost += LAUNCH_COST * (1 + (summed and chunks > 1)) + WORKSPACE_COST * 4 * shape.size * pieces
    return WgradPlan(tile, chunk_tasks, split_rows, cost + PIECE_COST * _cdiv(pieces * chunk_tasks, num_tasks))


def pick_split_rows(tiles: int, rows: int, depth: int, operand: Tensor) -> int:
    """Rows of a piece of the bias gradient, a multiple of `depth`, so that `tiles` times the pieces fill the device."""
    if (split := forced("split_rows")) is not None:
        return split
    splits = max(1, device_limits(operand.device).sms * BIAS_BLOCKS_PER_SM // max(tiles, 1))
    return _cdiv(max(_cdiv(rows, splits), WGRAD_MIN_SPLIT_ROWS), depth) * depth


def pick_lora_wgrad(
    columns: int, width: int, num_tasks: int, parts: int, rows: int, operand: Tensor
) -> tuple[Tile, int]:
    """Tile of the gradient of A or B, and the rows of a piece of a task; 0: a block takes a whole task.

    Args:
        columns: of x or of the incoming gradient.
        width: the largest rank, filled up.
        num_tasks, parts, rows, operand: as in `pick_wgrad`.
    """
    limits = device_limits(operand.device)

    def blocks(tile: Tile) -> int:
        return _cdiv(columns, tile.rows) * _cdiv(width, tile.cols)

    def cost(tile: Tile) -> int:
        return blocks(tile) * (tile.rows * tile.cols + LOAD_COST * (tile.rows + tile.cols))

    tile = forced("lora_wgrad") or min(tiles_of("lora_wgrad", operand.dtype, limits.hopper), key=cost)
    tile = _fitting(tile, limits.shared, operand.dtype.itemsize)
    mode, split_rows = forced("mode"), forced("split_rows")
    if mode == "walk" or (mode is None and split_rows is None and blocks(tile) * parts >= limits.sms):
        return tile, 0
    if split_rows is None:
        # as many pieces as it takes to fill the device, and one more for each task, which is half full on average
        pieces = max(1, min(_cdiv(limits.sms * WGRAD_WAVES[1], blocks(tile)), MAX_PIECES))
        split_rows = _cdiv(max(_cdiv(rows, pieces), WGRAD_MIN_SPLIT_ROWS), tile.depth) * tile.depth
        if mode is None and split_rows >= _cdiv(rows, parts) * 2:
            return tile, 0
    return tile, split_rows


def pick_schedule(rows_per_task: int, channels_contiguous: bool) -> str:
    """ "staged": W_eff of the tasks in use is written first; "fused": W + s Delta is added in the main loop."""
    if (schedule := forced("schedule")) is not None:
        return schedule
    return "fused" if channels_contiguous and rows_per_task <= FUSED_MAX_ROWS else "staged"
