"""The rules that choose tiles and schedules of the task kernels, and `force`, which overrides them, without Triton."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastmtl.kernels import configs
from fastmtl.kernels.configs import Tile

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
