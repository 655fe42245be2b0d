"""The rules that choose tiles and schedules of the task kernels, and `force`, which overrides them, without Triton."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from paths import ROOT

from fastmtl.kernels.task_weights import configs
from fastmtl.kernels.task_weights.configs import Filter, Tile, WgradPlan

X = torch.empty(0, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("choice", "value", "error", "match"),
    [
        # a tile's name is none, and a mode is no tile
        ("wgrad", "walk", TypeError, r"wgrad: expected a Tile, got 'walk'"),
        ("wgrad_mode", "walk", ValueError, r"force: expected choices among schedule, mode, .*, got 'wgrad_mode'"),
        ("mode", "walks", ValueError, r"mode: expected one of walk, split, got 'walks'"),
        ("mode", 1, ValueError, r"mode: expected one of walk, split, got 1"),
        ("schedule", "stage", ValueError, r"schedule: expected one of staged, fused, got 'stage'"),
        ("chunks", 0, ValueError, r"chunks: expected numbers of at least 1, got 0"),
        ("chunks", True, ValueError, r"chunks: expected numbers of at least 1, got True"),
        ("split_rows", 2.5, ValueError, r"split_rows: expected numbers of at least 1, got 2.5"),
        ("fwd", (64, 64, 64, 4, 3), TypeError, r"fwd: expected a Tile, got \(64"),
        ("fwd", Tile(64, 64, 0, 4, 3), ValueError, r"fwd: expected numbers of at least 1, got Tile"),
    ],
)
def test_force_takes_what_it_knows(choice: str, value: Any, error: type[Exception], match: str) -> None:
    with configs.force(mode="walk"):
        with pytest.raises(error, match=match), configs.force(**{"split_rows": 16, choice: value}):
            pass
        # nothing of the call is left behind
        assert configs.forced("split_rows") is None and configs.forced("mode") == "walk"


def test_force_overrides_and_none_gives_back() -> None:
    tile = Tile(16, 16, 32, 4, 1)
    with configs.force(fwd=tile, mode="split", split_rows=48):
        assert configs.pick_tile("fwd", 8, 6272, 256, 1, X) == tile
        with configs.force(fwd=None, split_rows=None):
            assert configs.pick_tile("fwd", 8, 6272, 256, 1, X) in configs.tiles_of("fwd", X.dtype)
            assert configs.forced("mode") == "split" and configs.forced("split_rows") is None
        assert configs.forced("split_rows") == 48
    assert configs.forced("fwd") is None


# --- weight gradients

# name, input and output channels, kernel, stride, size of the result's pictures
RESNET50 = (
    ("conv1", 3, 64, 7, 2, 112),
    ("layer1, first 1x1", 64, 64, 1, 1, 56),
    ("layer1, 3x3", 64, 64, 3, 1, 56),
    ("layer1, last 1x1 and shortcut", 64, 256, 1, 1, 56),
    ("layer1, 1x1 in", 256, 64, 1, 1, 56),
    ("layer2, first 1x1", 256, 128, 1, 1, 56),
    ("layer2, 3x3", 128, 128, 3, 1, 28),
    ("layer2, 1x1 out", 128, 512, 1, 1, 28),
    ("layer2, shortcut", 256, 512, 1, 2, 28),
    ("layer2, 1x1 in", 512, 128, 1, 1, 28),
    ("layer3, first 1x1", 512, 256, 1, 1, 28),
    ("layer3, 3x3", 256, 256, 3, 1, 14),
    ("layer3, 1x1 out", 256, 1024, 1, 1, 14),
    ("layer3, shortcut", 512, 1024, 1, 2, 14),
    ("layer3, 1x1 in", 1024, 256, 1, 1, 14),
    ("layer4, first 1x1", 1024, 512, 1, 1, 14),
    ("layer4, 3x3", 512, 512, 3, 1, 7),
    ("layer4, 1x1 out", 512, 2048, 1, 1, 7),
    ("layer4, shortcut", 1024, 2048, 1, 2, 7),
    ("layer4, 1x1 in", 2048, 512, 1, 1, 7),
)
SAMPLES, TASKS = 64, 8


class Chosen(NamedTuple):
    """A plan, and what follows from it where tasks are equally large."""

    plan: WgradPlan
    steps: int  # one after another, of a block
    blocks: int
    workspace: int  # bytes


def choose(channels: int, features: int, kernel: int, size: int, samples: int = SAMPLES, tasks: int = TASKS) -> Chosen:
    rows = samples * size * size
    shape = Filter.of(features, channels, kernel * kernel, 1)
    plan = configs.pick_wgrad(shape, tasks, min(tasks, samples), rows, True, X)
    tile, task = plan.tile, math.ceil(rows / tasks)
    if plan.split_rows:
        pieces = tasks * math.ceil(task / plan.split_rows)
        steps = math.ceil(min(plan.split_rows, task) / tile.depth)
        return Chosen(plan, steps, shape.tiles(tile) * pieces, 4 * shape.size * pieces)
    chunks = math.ceil(tasks / plan.chunk_tasks)
    workspace = 4 * shape.size * chunks if chunks > 1 else 0
    return Chosen(plan, plan.chunk_tasks * math.ceil(task / tile.depth), shape.tiles(tile) * chunks, workspace)


def table() -> list[str]:
    """Rows of the table in docs/kernels/task-kernels.md."""
    rows = []
    for name, channels, features, kernel, stride, size in RESNET50:
        found = choose(channels, features, kernel, size)
        tile, split = found.plan.tile, found.plan.split_rows
        rows.append(
            f"| {name} | {channels} to {features}, {kernel}x{kernel}{f' / {stride}' if stride > 1 else ''}, "
            f"{size} x {size} | {tile.rows} x {tile.cols} x {tile.depth}, {tile.num_warps} warps | "
            f"{f'pieces of {split}' if split else 'walk'} | {found.steps} | {found.blocks} | "
            f"{found.blocks / configs.ASSUMED_SMS:.1f} | {found.workspace / 1e6:.1f} |"
        )
    return rows


def test_weight_gradients_fill_the_device_without_long_chains() -> None:
    for _, channels, features, kernel, _, size in RESNET50:
        found = choose(channels, features, kernel, size)
        layer = f"{channels} to {features}, {kernel}x{kernel} at {size}: {found}"
        assert found.steps <= 320, layer
        # half of the processors with large tiles were faster than all with small ones
        assert 0.45 * configs.ASSUMED_SMS <= found.blocks <= 5 * configs.ASSUMED_SMS, layer
        assert found.plan.split_rows % found.plan.tile.depth == 0, layer
        # not more than x and grad_out, or the gradients themselves
        assert found.workspace <= 2 * max(SAMPLES * size * size * (channels + features), 10 * TASKS * 512 * 512), layer


def test_the_table_in_the_docs_is_what_is_chosen() -> None:
    text = (ROOT / "docs/kernels/task-kernels.md").read_text()
    missing = [row for row in table() if row not in text]
    assert not missing, "docs/kernels/task-kernels.md should have these rows:\n" + "\n".join(table())


def test_pieces_hold_no_more_than_one_and_a_half_tasks() -> None:
    """The chain of a block does not grow with the largest task."""
    for tasks in (2, 8, 64):
        for _, channels, features, kernel, _, size in RESNET50:
            plan = choose(channels, features, kernel, size, samples=256, tasks=tasks).plan
            assert plan.split_rows <= max(1.5 * 256 * size * size / tasks, configs.WGRAD_MIN_SPLIT_ROWS) + 64


def test_splits_stay_within_a_grid() -> None:
    """Together with a piece more for each task: 65535 programs along z."""
    for rows in (1, 1000, 10**6, 10**9):
        for shape in (Filter.of(1, 1, 1, 1), Filter.of(64, 3, 49, 1), Filter.of(4096, 64, 9, 1)):
            for tasks in (1, 8, 64_511):
                plan = configs.pick_wgrad(shape, tasks, tasks, max(rows, tasks), True, X)
                pieces = math.ceil(max(rows, tasks) / plan.split_rows) + tasks if plan.split_rows else 1
                assert pieces <= 65_535 and math.ceil(tasks / plan.chunk_tasks) <= 65_535


def test_rows_of_a_bank_need_no_sum() -> None:
    """Without W's gradient each task's is final as it is made: chunks of tasks cost no workspace."""
    shape = Filter.of(512, 1024, 1, 1)
    summed, apart = (configs.pick_wgrad(shape, 64, 64, 64 * 196, wanted, X) for wanted in (True, False))
    assert apart.split_rows == 0 and apart.cost < summed.cost


def test_forced_weight_gradients() -> None:
    shape, walk_tile, split_tile = Filter.of(128, 128, 9, 1), Tile(64, 64, 64, 8, 4), Tile(128, 64, 64, 4, 3)

    def plan() -> WgradPlan:
        return configs.pick_wgrad(shape, 8, 8, 50176, True, X)

    before = plan()
    with configs.force(mode="walk", chunks=3, wgrad=walk_tile):
        assert plan()[:3] == (walk_tile, 3, 0)
    with configs.force(mode="split", split_rows=640, wgrad=walk_tile, wgrad_split=split_tile, chunks=8):
        assert plan()[:3] == (split_tile, 1, 640)
    # a packed filter has one table for both
    with configs.force(mode="split", wgrad=walk_tile, wgrad_packed=split_tile):
        assert configs.pick_wgrad(Filter.of(64, 3, 49, 1), 8, 8, 50176, True, X).tile == split_tile
    assert plan() == before
