"""`examples/landscapes.py`: the papers' losses, and where the methods end on them."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from paths import ROOT

pytest.importorskip("matplotlib")
sys.path.insert(0, str(ROOT / "examples"))
import landscapes

sys.path.pop(0)


def test_losses_are_those_of_the_papers() -> None:
    for a, b in ((0.5, -3.0), (-2.0, 6.1), (1.83, -1.56), (-8.5, 7.5), (9.0, 9.0), (-8.5, -5.0)):
        x = torch.tensor([a, b], dtype=torch.float64)
        valley = (
            20 * math.log(max(abs(0.5 * a + math.tanh(b)), 5e-6)),
            25 * math.log(max(abs(0.5 * a - math.tanh(b) + 2), 5e-6)),
        )
        assert list(map(float, landscapes.valley_losses(x))) == pytest.approx(valley, rel=1e-12)
        c1, c2 = max(math.tanh(0.5 * b), 0), max(math.tanh(-0.5 * b), 0)
        front = (
            c1 * (math.log(max(abs(0.5 * (-a - 7) - math.tanh(-b)), 5e-6)) + 6)
            + c2 * (((-a + 7) ** 2 + 0.1 * (-b - 8) ** 2) / 10 - 20),
            c1 * (math.log(max(abs(0.5 * (-a + 3) + math.tanh(-b) + 2), 5e-6)) + 6)
            + c2 * (((-a - 7) ** 2 + 0.1 * (-b - 8) ** 2) / 10 - 20),
        )
        assert list(map(float, landscapes.front_losses(x))) == pytest.approx(front, rel=1e-12)


def test_the_front_is_optimal() -> None:
    """No point of a fine grid is better for both tasks than one of the front."""
    points = landscapes.front()
    assert points[0, 0] == -7 and points[-1, 0] == 7 and (points[:, 1] + 8.4).abs().max() < 0.1
    first, second = landscapes.front_losses(points)
    _, _, *grid = landscapes.grid(landscapes.LANDSCAPES["front"])
    for k in range(len(points)):
        better = (grid[0] < first[k] - 1e-3) & (grid[1] < second[k] - 1e-3)
        assert not better.any()


def test_pcgrad_leaves_the_valley_that_the_sum_is_stuck_in() -> None:
    valley = landscapes.LANDSCAPES["valley"]
    ways = landscapes.descend(valley, ["sum", "pcgrad"], 4000, 1e-2)[:, :, 0]
    stuck, left = ways[-100:].mean(0)  # they bounce from wall to wall
    first, second = valley.losses(ways[-100:, 0])
    assert 1.2 < stuck[0] < 2.6 and -2.8 < stuck[1] < -1.2 and first.mean() < -25 and second.mean() > 28
    # up the valley, towards that of the other task
    assert left[0] < stuck[0] - 0.2 and left[1] > stuck[1] + 0.4


@pytest.mark.slow
def test_pcgrad_reaches_the_other_valley() -> None:
    valley = landscapes.LANDSCAPES["valley"]
    ways = landscapes.descend(valley, ["sum", "pcgrad"], 30_000, 1e-2)[:, :, 0]
    stuck, left = ways[:, 0], ways[-1, 1]
    assert stuck[1:, 0].min() > 0.3 and valley.losses(stuck[-1])[1] > 25
    assert left[0] < -1 and left[1] > 0.2 and min(valley.losses(p)[1] for p in ways[-100:, 1]) < -20


def test_mgda_stops_where_it_meets_the_front() -> None:
    ends = landscapes.descend(landscapes.LANDSCAPES["front"], ["mgda"], 2400, 2.5e-2)[-1, 0]
    assert (ends[:, 1] + 8.4).abs().max() < 0.1
    assert ends[:, 0].tolist() == pytest.approx([-2.84, -6.99, 2.87], abs=0.4)


@pytest.mark.slow
def test_cagrad_goes_to_the_best_mean_from_every_start() -> None:
    ends = landscapes.descend(landscapes.LANDSCAPES["front"], ["cagrad"], 9000, 2e-2)[-1, 0]
    assert (ends - torch.tensor([0.0, -8.355])).abs().max() < 0.2


def test_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    arguments = ["--methods", "sum", "nashmtl", "upgrad", "--steps", "30", "--lr", "0.1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["landscapes.py", *arguments])
    landscapes.main()
    torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert out.count("valley, ") == 3 and out.count("front, ") == 9
    from matplotlib.image import imread

    for name in landscapes.LANDSCAPES:
        assert imread(tmp_path / f"{name}.png").std() > 0.05, "an empty plot"


def test_every_method_descends() -> None:
    """From the start that has no wall on the way, all methods reach the front."""
    front = landscapes.LANDSCAPES["front"]._replace(starts=((-8.5, -5.0),))
    ways = landscapes.descend(front, landscapes.METHODS, 800, 5e-2)[:, :, 0]
    for name, end in zip(landscapes.METHODS, ways[-1], strict=True):
        nearest = (landscapes.front() - end).norm(dim=1).min()
        assert nearest < 0.3, name
    best = ways[-1, landscapes.METHODS.index("cagrad")]
    assert (best - torch.tensor([0.0, -8.355])).abs().max() < 0.2  # that of the mean
