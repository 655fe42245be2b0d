"""`examples/landscapes.py`: the papers' losses, and where the methods end on them."""

from __future__ import annotations

import functools
import math
import sys
from pathlib import Path

import pytest
import torch
from paths import ROOT

from fastmtl import methods

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
    ways = landscapes.descend(valley, ["sum", "pcgrad"], 2000, 2e-2)[:, :, 0]
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
    """All methods by default; a coarse grid is quicker to draw."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(landscapes, "grid", functools.partial(landscapes.grid, points=80))
    arguments = ["--steps", "30", "--lr", "0.1", "--out", str(tmp_path)]
    for more in (["--landscape", "valley"], ["--landscape", "front", "--methods", "sum", "nashmtl", "upgrad"]):
        monkeypatch.setattr(sys, "argv", ["landscapes.py", *arguments, *more])
        landscapes.main()
    torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert out.count("valley, ") == len(landscapes.METHODS) and out.count("front, ") == 9
    from matplotlib.image import imread

    for name in landscapes.LANDSCAPES:
        assert imread(tmp_path / f"{name}.png").std() > 0.05, "an empty plot"


def test_the_picture_has_every_star(tmp_path: Path) -> None:
    """AlignedMTL leaves the valley's usual section upwards: the picture then has as much more."""
    from matplotlib import pyplot

    valley = landscapes.LANDSCAPES["valley"]
    ways = torch.tensor([[0.5, -3.0], [-2.0, 8.5]], dtype=torch.float64)[:, None, None]  # [points, methods, starts, 2]
    wider = landscapes.around(valley, ways)
    assert wider.across == valley.across and wider.up[0] == valley.up[0] and 8.5 < wider.up[1] < 9.5
    assert landscapes.around(valley, ways.clamp(max=7)) == valley
    x, y, first, second = landscapes.grid(wider, 80)
    figure, axis = pyplot.subplots()
    landscapes.draw_ways(axis, (x, y, first + second), ways[:, 0])
    low, high = axis.get_ylim()
    assert low <= -6 and high == pytest.approx(wider.up[1])
    stars = [line for line in axis.lines if line.get_marker() == "*"]
    assert [(float(star.get_xdata()[0]), float(star.get_ydata()[0])) for star in stars] == [(-2.0, 8.5)]
    figure.savefig(tmp_path / "stars.png", dpi=50)
    pyplot.close(figure)
    from matplotlib.image import imread

    red = imread(tmp_path / "stars.png")[..., :3] @ [1.0, -1.0, -1.0]
    assert red.max() > 0.4, "no star"


# where each method arrives from the start that has no wall on the way, across: at the best mean, where it meets the
# front, or in between, on its way along it
BASINS = {
    "mean": ((-0.8, 0.8), ("sum", "cagrad", "graddrop", "randomweights")),
    "met": ((-7.1, -6.2), ("mgda", "crmogm", "pcd", "moco", "imtlg")),
    "between": (
        (-6.2, -1.0),
        (
            *("pcgrad", "gradvac", "nashmtl", "fairgrad", "alignedmtl", "config"),
            *("upgrad", "dualproj", "sdmgrad", "excessmtl", "modo"),
        ),
    ),
}


def test_every_method_descends_to_its_basin() -> None:
    assert sorted(name for _, names in BASINS.values() for name in names) == sorted(landscapes.METHODS)
    front = landscapes.LANDSCAPES["front"]._replace(starts=((-8.5, -5.0),))
    ends = landscapes.descend(front, list(landscapes.METHODS), 500, 8e-2)[-1, :, 0]
    at = dict(zip(landscapes.METHODS, ends, strict=True))
    for (low, high), names in BASINS.values():
        for name in names:
            assert low < at[name][0] < high, (name, at[name])
            assert (landscapes.front() - at[name]).norm(dim=1).min() < 0.3, (name, at[name])
    best = torch.tensor([0.0, -8.355])
    assert (at["sum"] - best).abs().max() < 0.1 and (at["cagrad"] - best).abs().max() < 0.1
    # the task that comes first stays at the other's optimum, which it must not leave
    assert at["pcd"][0] < -6.8


def test_methods_that_are_left_out_are_named() -> None:
    """In the comment over the table, each with a reason."""
    left = {"mean", "every", "krum", "trimmedmean", "dbmtl", "paretomtl"}
    names = {kind.__name__.lower() for kind in vars(methods).values() if isinstance(kind, type)}
    kinds = {name for name in names if issubclass(_class_of(name), methods.Method)} - {"method"}
    assert kinds - set(landscapes.METHODS) == left
    text = Path(landscapes.__file__).read_text()
    assert all(f"`{name}`" in text for name in left)


def _class_of(name: str) -> type:
    return next(kind for kind in vars(methods).values() if isinstance(kind, type) and kind.__name__.lower() == name)


def test_a_second_batch_is_the_same() -> None:
    method = methods.MoDo(gamma=0.1, rho=0.0)
    grads = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    # one step of lambda from (1/2, 1/2): slopes 2 and 1/2
    expected = torch.tensor([0.425, 0.575], dtype=torch.float64) @ grads
    torch.testing.assert_close(landscapes.update_of(method, grads), expected)
    torch.testing.assert_close(landscapes.update_of(methods.Sum(), grads), grads.sum(0))
