"""Predicted times: their figures come from compiled kernels, from `plan.h` and from committed results."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
from paths import ROOT

from fastmtl.benchmarks.gpu import surgery_check
from fastmtl.benchmarks.machine_code import predict
from fastmtl.benchmarks.machine_code.kernel_table import Kernel
from fastmtl.core import dispatch

CSRC = ROOT / "csrc" / "cuda" / "gradients"
cards = pytest.mark.parametrize("card", predict.CARDS, ids=lambda card: card.name)

pytestmark = [
    pytest.mark.skipif(dispatch.extension is None, reason=f"no compiled extension: {dispatch.extension_error}"),
    pytest.mark.skipif(not predict.RESULTS.exists(), reason="an sdist has no results"),
]


# --- what was measured


@cards
def test_every_rated_row_is_read_and_predicted(card: predict.Card) -> None:
    for t, p, dtype in surgery_check.RATED:
        name = str(dtype)[6:]
        assert (t, p, name, False) in predict.ROWS
        for op in ("gram", "combine", "pcgrad"):
            assert 1e-6 < card.measured[op, t, p, name] < 0.1
    assert len(card.measured) == 3 * len(surgery_check.RATED)


def test_the_first_section_of_rates_is_read() -> None:
    assert (predict.H100.copy, predict.H200.copy) == pytest.approx((2.78e12, 4.03e12))
    assert predict.H100.measured["pcgrad", 50, 100_000, "float32"] == pytest.approx(50.6e-6)
    # with early launches, further down, it was 66.3
    assert predict.H200.measured["pcgrad", 50, 100_000, "float32"] == pytest.approx(68.4e-6)


def test_results_without_rates_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "RESULTS", tmp_path)
    (tmp_path / "none.txt").write_text("a card\n\n== small sizes\nT 8 coefficients 3.0\n")
    with pytest.raises(ValueError, match=r"none.txt: expected the output of surgery_check rates"):
        _ = predict.Card("none", "none.txt").copy


def test_times_of_the_solver() -> None:
    assert (predict.clock(), predict.launch()) == pytest.approx((1.98e9, 1.44e-6))
    assert sorted(predict.solve_times()) == [8, 16, 17, 32, 50, 64, 128]
    assert predict.solve_seconds(50) == pytest.approx(20.4e-6 - predict.launch())
    # fewer tasks than were measured: fewer visits
    assert predict.solve_seconds(4) == pytest.approx(predict.solve_seconds(8) / 2)
    times = [predict.solve_seconds(t) for t in (8, 16, 17, 32, 50, 64, 128)]
    assert times == sorted(times)


# --- kernels and cuts


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_the_kernel_is_the_launched_one(dtype: str) -> None:
    launcher = (CSRC / "kernels.inc").read_text()
    choices = re.findall(
        r"if \(T <= (\d+)\) \S*?(?:launch_(gram_mma)<(\d+)>|.*?(gram_rows)_kernel<In, (\d+)>)", launcher
    )
    assert [int(most) for most, *_ in choices] == [2, 4, 8, 16, 32, 48]
    (last,) = re.findall(r"else launch_gram_mma<(\d+)>", launcher)
    for t in range(1, 129):
        mma, groups, rows_name, rows = next((c[1:] for c in choices if t <= int(c[0])), ("gram_mma", last, "", ""))
        name = f"{mma or rows_name}_kernel"
        kernel, room = predict.gram_kernel(t, dtype)
        assert kernel == Kernel(name, dtype, (int(groups or rows),))
        assert room >= min(t, 64)


@pytest.mark.parametrize("num_tasks", [1, 2, 8, 9, 16, 17, 50, 64, 65, 128])
@pytest.mark.parametrize("columns", [1, 1000, 100_000, 262_145, 1_000_000, 25_600_000, 1_000_000_000])
def test_cuts_cover_the_columns(columns: int, num_tasks: int) -> None:
    header = (CSRC / "plan.h").read_text()
    (longest,) = re.findall(r"kLongestSlot = (\d+);", header)
    (split,) = re.findall(r"kSplitColumns = (\d+);", header)
    cut = predict.plan(columns, num_tasks, 1)
    for kernel in ("gram", "combine"):
        each, slots = cut[f"{kernel}_columns"], cut[f"{kernel}_slots"]
        assert (slots - 1) * each < 64 * -(-columns // 64) <= slots * each and each % 64 == 0
    assert num_tasks > 8 or cut["gram_columns"] <= int(longest)
    assert cut["blocks_per_slot"] == (1 if num_tasks <= 64 else 6 if num_tasks > 96 else 3)
    assert cut["combine_split"] == (num_tasks > 8 and columns <= 1024 * int(split))
    assert not cut["combine_split"] or cut["combine_columns"] == int(split)
    assert not predict.plan(columns, num_tasks, 2)["combine_split"]


def test_without_an_extension_nothing_is_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "extension", None)
    monkeypatch.setattr(dispatch, "extension_error", "left out")
    with pytest.raises(RuntimeError, match="no compiled extension, which knows how a call is cut: left out"):
        predict.plan(1000, 2, 1)


def test_a_loop_is_as_compiled() -> None:
    """What a step of a warp takes follows from its bytes, the rows that it takes and the element's size."""
    for kernel, entry in predict.kernels().items():
        if kernel.dtype not in predict.ITEMSIZE or not kernel.name.startswith("gram"):
            continue
        rows = kernel.numbers[0] * (8 if kernel.name == "gram_mma_kernel" else 1)
        loop = predict.Loop.of(kernel, rows)
        assert loop.columns * rows * predict.ITEMSIZE[kernel.dtype] == entry["rows"]["bytes"]
        assert (loop.blocks, loop.rounds) == (entry["blocks"], entry["rows"]["rounds"])


def test_time_of_a_step_and_of_a_walk() -> None:
    # one round, and the warp's own instructions; the loads of later steps under way; instructions of all warps
    assert predict.Loop(1, 100, 1.0, 128).step == pytest.approx(predict.LOAD + 100 / predict.clock())
    assert predict.Loop(1, 100, 0.5, 128).step == pytest.approx(predict.LOAD / 2)
    assert predict.Loop(3, 5000, 1.0, 128).step == pytest.approx(6 * 5000 / predict.clock())
    loop = predict.Loop(2, 100, 1.0, 128)
    one_wave = predict.MULTIPROCESSORS * 2
    assert loop.walk(1, 3) == loop.walk(one_wave, 3) == pytest.approx(3 * loop.step)
    assert loop.walk(one_wave + 1, 3) == pytest.approx(6 * loop.step)
    assert loop.walk(10 * one_wave, 3) == pytest.approx(30 * loop.step)


def test_sums_of_slots() -> None:
    """8 tasks: four threads to each of 36 entries, 16 rows at once; 50: two passes of 1024 entries, 8 rows at once."""
    sums = {"loads": 16, "rounds": 1.0}
    assert predict.level_seconds(sums, 64, 8) == pytest.approx(predict.TICKET + predict.LOAD_OF_SUMS)
    assert predict.level_seconds(sums, 65, 8) == pytest.approx(predict.TICKET + 2 * predict.LOAD_OF_SUMS)
    wide = {"loads": 32, "rounds": 3.0}
    assert predict.level_seconds(wide, 12, 50) == pytest.approx(predict.TICKET + 2 * 2 * 3 * predict.LOAD_OF_SUMS)


@pytest.mark.parametrize("figure", ["rounds", "instructions"])
@pytest.mark.parametrize(("num_tasks", "dtype"), [(8, "float32"), (8, "bfloat16"), (64, "float32"), (64, "bfloat16")])
def test_predictions_follow_the_compiled_kernels(
    num_tasks: int, dtype: str, figure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = predict.H200, num_tasks, 25_600_000, dtype
    before = predict.predict(*at)
    slower = copy.deepcopy(predict.kernels())
    for entry in slower.values():
        entry["rows"][figure] *= 100
    monkeypatch.setattr(predict, "kernels", lambda: slower)
    after = predict.predict(*at)
    assert after.gram > 5 * before.gram and after.combine_alone > 5 * before.combine_alone


# --- predictions


@cards
@pytest.mark.parametrize("row", predict.ROWS, ids=str)
def test_no_prediction_is_better_than_its_bytes(row: tuple[int, int, str, bool], card: predict.Card) -> None:
    t, p, dtype, project = row
    found = predict.predict(card, t, p, dtype, project=project)
    one_pass = t * p * predict.ITEMSIZE[predict.NAMES[dtype]] / card.copy
    assert found.gram > one_pass and found.combine_alone > one_pass
    in_cache = one_pass * card.copy <= predict.CACHE_BYTES
    assert found.total > found.floor or (in_cache and found.combine < found.combine_alone)
    assert found.total == found.gram + found.solve + found.combine


@cards
def test_what_is_bound_by_bytes_is_predicted_well(card: predict.Card) -> None:
    for t, p, dtype, project in predict.ROWS:
        if p == 25_600_000 and t <= 16 and not project:
            seconds = card.measured["pcgrad", t, p, dtype]
            assert 0.9 < seconds / predict.predict(card, t, p, dtype).total < 1.1


def test_the_table_holds_predictions_beside_what_was_measured() -> None:
    lines = predict.table()
    assert len(lines) == 2 + len(predict.ROWS)
    assert {line.count("|") for line in lines} == {11}
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in lines}
    gram = cells["50, 0.1M, float32"][2]
    x = predict.predict(predict.H100, 50, 100_000, "float32").gram
    assert gram == f"{1e6 * x:.3g}; 29.6, {29.6e-6 / x:.2f}x"
    # not measured
    assert ";" not in " ".join(cells["50, 1M, float32"])
