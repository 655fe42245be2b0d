"""Tables of crossovers: which one is read, which are refused with a warning; `fastmtl tune` and `fastmtl info`."""

from __future__ import annotations

import argparse
import json
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import Backend, skip_or_fail

from fastmtl import __main__ as command
from fastmtl import info
from fastmtl.benchmarks.tuning import cli, probes
from fastmtl.benchmarks.tuning.choose import choose, fit_calls, of_direct, way_of
from fastmtl.benchmarks.tuning.probes import CallCost, Sizes, Timed
from fastmtl.core.dispatch import unavailable
from fastmtl.ops import task_conv2d, task_linear
from fastmtl.ops.task_weights.cpu.ways import Ways, in_pairs, watching
from fastmtl.tuning import search
from fastmtl.tuning.processor import PAIRS, Processor, this_processor
from fastmtl.tuning.table import (
    DEFAULTS,
    KEYS,
    PRODUCTS,
    ByShape,
    Limits,
    Shape,
    Table,
    TableError,
    parse,
    read,
    uniform,
)

ANY = Shape(1, 1)
HERE = Processor("Some CPU, family 1 model 2", "SomeVendor", "avx512", 4)
TINY = Sizes(((4, 8), (16, 8)), (1, 6), (4, 12), ((1, 2, 1), (2, 2, 2)), 2, 1, 1, 0.01)


def table_of(processor: Processor, call_bytes: int = 7) -> Table:
    """A whole table as a file would hold it."""
    limits = uniform(Limits(12, None)).limits
    origin = {**processor._asdict(), "torch": "2.13.0", "fastmtl": "0.1.0", "commit": "abcdef123", "date": "2026-11-28"}
    return Table({p: dict(entries) for p, entries in limits.items()}, call_bytes, 2.5, origin, {"forward": {"4x8": {}}})


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache folder and shipped tables of the test's own; nothing was read so far."""
    monkeypatch.delenv(search.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(search, "shipped_tables", lambda: sorted((tmp_path / "shipped").glob("*.json")))
    monkeypatch.setattr(search, "_found", None)
    monkeypatch.setattr(search, "_given", None)
    search._warn.cache_clear()
    yield
    search._warn.cache_clear()


def put(path: Path, table: Table) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(table.to_json())
    return path


def test_a_table_comes_back_from_its_file(tmp_path: Path) -> None:
    table = table_of(HERE)
    found = read(put(tmp_path / "a.json", table))
    assert found == table and found.processor == HERE
    assert found.limits["forward"][KEYS[0]] == {Shape(1, 1): Limits(12, None)}


def test_the_order_in_which_tables_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert search.find(HERE).table is DEFAULTS and search.find(HERE).path is None
    shipped = {
        "other": table_of(Processor("Other", "OtherVendor", "avx2", 4), 1),
        "level": table_of(HERE._replace(name="Newer", vendor="OtherVendor"), 2),
        "vendor": table_of(HERE._replace(name="Newer", threads=64), 3),
        "near": table_of(HERE._replace(name="Newer", threads=2), 4),
    }
    for k, (name, table) in enumerate(shipped.items()):
        put(tmp_path / "shipped" / f"{name}.json", table)
        found = search.find(HERE)
        assert found.table.call_bytes == k + 1 and found.place == "shipped with fastmtl" and not found.refused
    put(tmp_path / "shipped" / "a.json", table_of(HERE, 5))
    assert search.find(HERE).table.call_bytes == 5
    mine = put(search.cache_path(HERE), table_of(HERE, 6))
    assert mine.parent == tmp_path / "cache/fastmtl" and mine.name == "tuned-some-cpu-family-1-model-2-4.json"
    assert (search.find(HERE).table.call_bytes, search.find(HERE).path) == (6, mine)
    # of another number of threads: of this processor all the same
    named = put(tmp_path / "named.json", table_of(HERE._replace(threads=1), 7))
    monkeypatch.setenv(search.VARIABLE, str(named))
    assert (search.find(HERE).table.call_bytes, search.find(HERE).path) == (7, named)


def without(text: str, *path: str) -> str:
    """The JSON without one entry."""
    whole = json.loads(text)
    inner = whole
    for name in path[:-1]:
        inner = inner[name]
    del inner[path[-1]]
    return json.dumps(whole)


GOOD = table_of(HERE).to_json()
REFUSED = {
    "cut off": (GOOD[: len(GOOD) // 2], "damaged"),
    "no JSON object": ("[1]", "has no schema"),
    "another schema": (GOOD.replace('"schema": 2', '"schema": 1'), "has schema 1, and this fastmtl reads 2"),
    "no origin": (without(GOOD, "origin"), "no origin"),
    "no level": (without(GOOD, "origin", "level"), "origin level"),
    "a product is missing": (without(GOOD, "limits", "forward"), "no limits of forward"),
    "an entry is missing": (without(GOOD, "limits", "forward", KEYS[0]), f"forward, {KEYS[0]}"),
    "no shape": (without(GOOD, "limits", "forward", KEYS[0], "1x1"), "expected limits by shape, got {}"),
    "a shape of nothing": (
        GOOD.replace('"1x1"', '"0x1"'),
        "expected the shape of a weight, such as 256x768, got '0x1'",
    ),
    "a limit is missing": (without(GOOD, "limits", "forward", KEYS[0], "1x1", "direct"), "expected direct and matmul"),
    "a limit is below zero": (
        GOOD.replace('"direct": 12', '"direct": -1'),
        "expected a number of rows or null, got -1",
    ),
    "a limit is no number": (GOOD.replace('"direct": 12', '"direct": true'), "got True"),
    "no call_bytes": (without(GOOD, "call_bytes"), "call_bytes"),
    "passes are not finite": (GOOD.replace('"weight_passes": 2.5', '"weight_passes": NaN'), "weight_passes"),
    "more rows than 64 bits hold": (GOOD.replace('"direct": 12', f'"direct": {2**63}'), "expected a number of rows"),
    "more bytes than a float holds": (GOOD.replace('"call_bytes": 7', f'"call_bytes": {10**400}'), "call_bytes"),
    "passes whose bytes are not finite": (
        GOOD.replace('"weight_passes": 2.5', '"weight_passes": 1e308'),
        "weight_passes",
    ),
    "nested without end": ("[" * 100_000, "damaged"),
    "another processor": (table_of(HERE._replace(name="Another")).to_json(), "another processor: 'Another'"),
    "another level": (table_of(HERE._replace(level="avx2")).to_json(), "other instructions: 'avx2'"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_that_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the variable and in the cache folder alike; with one warning, and the shipped table instead."""
    text, reason = REFUSED[kind]
    put(tmp_path / "shipped/near.json", table_of(HERE, 99))
    named = tmp_path / "named.json"
    named.write_text(text)
    monkeypatch.setenv(search.VARIABLE, str(named))
    mine = put(search.cache_path(HERE), table_of(HERE))
    mine.write_text(text)
    found = search.find(HERE)
    assert found.table.call_bytes == 99
    assert [path for path, _ in found.refused] == [named, mine] and all(reason in why for _, why in found.refused)


def test_a_named_file_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(search.VARIABLE, str(tmp_path / "no.json"))
    ((path, reason),) = search.find(HERE).refused
    assert path == tmp_path / "no.json" and "cannot be read" in reason


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setenv(search.VARIABLE, str(tmp_path / "pipe"))
    ((_, reason),) = search.find(HERE).refused
    assert "it is no file" in reason


def test_what_shows_the_warning_may_call_ops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(search.VARIABLE, str(tmp_path / "no.json"))
    asked: list[Table] = []
    monkeypatch.setattr(warnings, "showwarning", lambda *_: asked.append(search.current()))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert search.current() is DEFAULTS
    assert asked == [DEFAULTS]


def test_a_refused_table_is_warned_of_once_and_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = tmp_path / "named.json"
    named.write_text("{")
    monkeypatch.setenv(search.VARIABLE, str(named))
    with pytest.warns(RuntimeWarning, match=r"refuses the table .*named\.json: it is damaged") as seen:
        assert search.current() is DEFAULTS
        put(named, table_of(this_processor()))
        assert search.current() is DEFAULTS
    assert len(seen) == 1


def test_the_table_decides_which_way_an_op_takes() -> None:
    if (reason := unavailable("cpu", "cpu")) is not None:
        skip_or_fail(reason)
    x, ids = torch.randn(9, 8), torch.tensor([0] * 7 + [1] * 2)
    weight, delta = torch.randn(4, 8), torch.randn(2, 4, 8)
    expected = torch.einsum("nc,noc->no", x, weight + delta[ids])
    for limits, ways in (
        (Limits(2, 6), {("forward", "direct"): 1, ("forward", "convolution"): 1}),
        (Limits(2, 7), {("forward", "direct"): 1, ("forward", "matmul"): 1}),
        (Limits(0, None), {("forward", "matmul"): 2}),
    ):
        with search.use_table(uniform(limits)), watching() as taken:
            y = task_linear(x, weight, delta, ids)
        assert taken == ways
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize(
    ("samples", "ways"),
    [
        ([4, 4, 12], {"direct": 3}),
        ([4, 4, 13], {"direct": 2, "convolution": 1}),
        ([4, 5], {"direct": 1, "convolution": 1}),
        ([4, 5, 5], {"direct": 1, "convolution": 2}),
        ([5, 5], {"convolution": 2}),
    ],
)
def test_a_segment_beside_others_that_are_multiplied_directly(samples: list[int], ways: dict[str, int]) -> None:
    """It may have three times the limit's rows if more than half of the segments keep to the limit."""
    if (reason := unavailable("cpu", "cpu")) is not None:
        skip_or_fail(reason)
    ids = torch.arange(len(samples)).repeat_interleave(torch.tensor(samples))
    x, deltas = torch.randn(len(ids), 8), [torch.randn(4, 8) for _ in samples]
    with search.use_table(uniform(Limits(4, 0))), watching() as taken:
        y = task_linear(x, None, deltas, ids)
    assert taken == {("forward", way): count for way, count in ways.items()}
    torch.testing.assert_close(y, torch.einsum("nc,noc->no", x, torch.stack(deltas)[ids]))


def test_limits_measured_in_pairs_hold_for_products_in_pairs_alone(level: Backend) -> None:
    measured = {
        product: {k: ByShape({ANY: Limits(7 if "float32" in k else 100, 200)}) for k in entries}
        for product, entries in DEFAULTS.limits.items()
    }
    weight = torch.Size([4, 8, 1, 1])
    for instructions, widened in (("avx512", 100), (f"avx512{PAIRS}", 28)):
        with search.use_table(DEFAULTS._replace(limits=measured, origin={"level": instructions})):
            for dtype in (torch.bfloat16, torch.float16):
                ways = Ways(dtype, weight, True, True)
                assert ways.direct_limits() == (100 if in_pairs(dtype) else widened,) * 3
                assert ways.of_torch("forward", 200) == "matmul"
                # a segment beside others may have more rows, but for those that are widened
                ways.beside_others([1, 1, 1000])
                most = 300 if in_pairs(dtype) or widened == 100 else widened
                assert ways.direct_limits() == (most,) * 3
            few = {
                product: dict.fromkeys(entries, ByShape({ANY: Limits(3, 0)})) for product, entries in measured.items()
            }
            with search.use_table(DEFAULTS._replace(limits=few, origin={"level": instructions})):
                assert Ways(torch.float16, weight, True, True).direct_limits() == (3, 3, 3)
            assert Ways(torch.float32, weight, True, True).direct_limits() == (7, 7, 7)


def test_filters_of_one_pixel_that_skip_pixels_have_the_higher_limit() -> None:
    if (reason := unavailable("cpu", "cpu")) is not None:
        skip_or_fail(reason)
    x = torch.randn(5, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    deltas, ids = [torch.randn(4, 8, 1, 1) for _ in range(2)], torch.tensor([0, 0, 0, 0, 1])
    for matrices, larger in ((4, 0), (0, 4)):
        limits = {
            product: {
                k: ByShape({ANY: Limits(matrices if k.startswith("pixelwise") else larger, None)}) for k in entries
            }
            for product, entries in DEFAULTS.limits.items()
        }
        with search.use_table(DEFAULTS._replace(limits=limits)), watching() as taken:
            y = task_conv2d(x, None, deltas, ids, stride=2)
        assert taken == {("forward", "direct"): 1, ("forward", "convolution"): 1}
        expected = torch.cat([F.conv2d(x[i : i + 1], deltas[t], stride=2) for i, t in enumerate(ids)])
        torch.testing.assert_close(y, expected)


def test_weight_gradients_of_filters_that_skip_pixels_have_twice_the_limit() -> None:
    with search.use_table(uniform(Limits(4, 0))):
        for weight, limits in ((torch.Size([4, 8, 3, 3]), (4, 4, 8)), (torch.Size([4, 8, 1, 1]), (4, 4, 4))):
            assert Ways(torch.float32, weight, False, True, strided=True).direct_limits() == limits
            assert Ways(torch.float32, weight, False, True).direct_limits() == (4, 4, 4)
    with search.use_table(uniform(Limits(None, 0))):
        assert Ways(torch.float32, torch.Size([4, 8, 3, 3]), False, True, strided=True).direct_limits() == (-1, -1, -1)


def test_the_shipped_tables_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    tables = [read(path) for path in search.shipped_tables()]
    assert tables and all(table.measured and table.origin["commit"] for table in tables)


def test_defaults_are_a_whole_table() -> None:
    origin = table_of(HERE).origin
    assert parse(DEFAULTS._replace(origin=origin).to_json()).limits == DEFAULTS.limits
    assert set(DEFAULTS.limits) == set(PRODUCTS)


def test_a_layer_has_the_limits_of_the_nearest_shape() -> None:
    """Of the ratios of inputs and outputs; a filter's inputs are those of all its taps."""
    by = ByShape({Shape(768, 3072): Limits(1, 0), Shape(3072, 768): Limits(2, 0), Shape(576, 64): Limits(3, 0)})
    nearest = {(768, 3072): 1, (1024, 4096): 1, (4096, 1024): 2, (9, 1): 3, (64, 64): 3, (10**9, 1): 3, (1536, 1536): 1}
    assert {shape: by.nearest(Shape(*shape)).direct for shape in nearest} == nearest
    limits = {product: dict.fromkeys(entries, by) for product, entries in DEFAULTS.limits.items()}
    with search.use_table(DEFAULTS._replace(limits=limits)):
        for weight, direct in (((2048, 512), 1), ((512, 2048), 2), ((64, 64, 3, 3), 3), ((512, 256, 3, 3), 2)):
            assert Ways(torch.float32, torch.Size(weight), len(weight) == 2, True).direct_limits() == (direct,) * 3
        # a layer of no outputs
        assert Ways(torch.float32, torch.Size([0, 8]), True, True).takes_direct("forward", 1)


# --- limits of times


def test_torchs_ways_are_weighed_where_the_direct_product_takes_all_that_was_measured() -> None:
    timed = [
        Timed(Shape(768, 3072), rows, {"direct": rows, "matmul": 2 * rows, "convolution": 4 * rows})
        for rows in (1, 4, 16, 49)
    ]
    assert choose(timed).limits == Limits(49, None)
    turned = [one._replace(seconds=one.seconds | {"matmul": 5.0 * one.rows}) for one in timed]
    assert choose(turned).limits == Limits(49, 0)


def test_limits_lose_least() -> None:
    """By few rows the direct product wins, by many the convolution; between them torch's matrix product or nobody."""

    def timed(rows: int, **seconds: float) -> Timed:
        return Timed(Shape(4, 8), rows, seconds)

    times = [
        timed(4, direct=1.0, matmul=2.0, convolution=3.0),
        timed(16, direct=2.0, matmul=1.9, convolution=3.0),
        timed(64, direct=9.0, matmul=5.0, convolution=4.9),
        timed(256, matmul=20.0, convolution=10.0),
    ]
    found = choose(times)
    assert found.limits == Limits(8, 32)
    assert [way_of(found.limits, rows) for rows in (4, 16, 64, 256)] == ["direct", "matmul", *["convolution"] * 2]
    assert (found.mean_loss, found.largest_loss) == (0, 0)
    # without a matrix product; the direct product is not trusted beyond what was measured
    filters = [timed(4, direct=1.0, convolution=3.0), timed(16, direct=2.0, convolution=3.0)]
    assert choose(filters).limits == Limits(16, 0)
    always = [timed(4, direct=3.0, matmul=1.0, convolution=3.0), timed(16, direct=4.0, matmul=2.0, convolution=3.0)]
    assert choose(always).limits == Limits(0, None)
    # two layers that disagree: the one that would lose more decides
    disagree = [timed(4, direct=1.0, convolution=2.0), timed(4, direct=1.1, convolution=1.0)]
    assert way_of(choose(disagree).limits, 4) == "direct" and choose(disagree).largest_loss == pytest.approx(0.1)
    # a near tie goes to the direct product in float32, and counts as the loss that it is
    tie = [timed(4, direct=1.0, convolution=2.0), timed(16, direct=1.03, convolution=1.0)]
    assert choose(tie).limits == Limits(8, 0)
    near = choose(tie, of_direct("forward", "filter", "float32"))
    assert near.limits == Limits(16, 0) and near.largest_loss == pytest.approx(0.03)
    # but not of a filter's weight gradient, which one call of torch's makes beside dx
    close = [timed(4, direct=1.0, convolution=2.0), timed(16, direct=0.97, convolution=1.0)]
    assert choose(close, of_direct("weight_gradient", "channels_last", "float32")).limits == Limits(8, 0)
    assert choose(close, of_direct("weight_gradient", "pixelwise", "float32")).limits == Limits(16, 0)
    assert of_direct("forward", "pixelwise", "bfloat16") == 1


def test_the_cost_of_a_call_is_fitted() -> None:
    call_bytes, passes = fit_calls([CallCost(w, 8e5 + 3 * w) for w in (10**5, 10**6, 10**7)])
    assert call_bytes == pytest.approx(8e5, rel=0.2) and passes == pytest.approx(3, abs=0.5)


# --- the command


def run_tune(*arguments: str) -> int:
    return command.main(["tune", *arguments])


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    if (reason := unavailable("cpu", "cpu")) is not None:
        skip_or_fail(reason)
    monkeypatch.setattr(cli, "SHORT", TINY)


def test_tune_writes_a_table_that_is_read(
    tiny: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(probes, "WIDENED", {torch.bfloat16})
    assert run_tune() == 0
    said = capsys.readouterr().out
    path = search.cache_path(this_processor())
    assert f"written: {path}" in said and "GPU: " in said and "forward, pixelwise, float32" in said
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o644
    found = search.found()
    assert found.path == path and all(set(entries) == set(KEYS) for entries in found.table.limits.values())
    shapes = {k: {str(shape) for shape in by} for k, by in found.table.limits["forward"].items()}
    assert shapes["pixelwise float32"] == {"4x8", "16x8"} and shapes["contiguous float32"] == {"36x4", "108x12"}
    # 16 bits that are widened ask for float32's limits
    forward = found.table.limits["forward"]
    assert all(forward[k] == forward[k.replace("bfloat16", "float32")] for k in KEYS)
    times = found.table.measured["forward, pixelwise, float32"]["16x8"]
    assert times["rows"] == [1, 6] and all(min(times[way]) > 0 for way in probes.WAYS)
    assert info.collect()["tuned"]["path"] == str(path)
    assert f"tuned       by {path} (of the cache folder, of today)" in info.report()
    monkeypatch.setenv(search.VARIABLE, "named.json")
    assert cli._condition(None) == " without FASTMTL_TUNED, which names named.json"
    assert cli._condition(path) == " with FASTMTL_TUNED set to it"


def test_info_dates_a_shipped_table(tmp_path: Path) -> None:
    if (reason := unavailable("cpu", "cpu")) is not None:
        skip_or_fail(reason)
    path = put(tmp_path / "shipped/table.json", table_of(this_processor()))
    date = read(path).origin["date"].split("T")[0]
    assert f"tuned       by {path} (shipped with fastmtl, measured on {date})" in info.report()


def test_tune_that_is_interrupted_leaves_nothing(
    tiny: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(probes, "measure", interrupted)
    out = put(tmp_path / "out/table.json", table_of(HERE))
    before = out.read_text()
    assert run_tune("--out", str(out)) == cli.INTERRUPTED
    told = capsys.readouterr()
    assert "interrupted, nothing is written" in told.err and f"writes {out} when it is done" in told.out
    assert [p.name for p in out.parent.iterdir()] == [out.name] and out.read_text() == before


def test_tune_into_a_folder_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if (reason := unavailable("cpu", "cpu")) is not None:
        skip_or_fail(reason)
    (tmp_path / "file").write_text("")
    assert run_tune("--out", str(tmp_path / "file" / "table.json")) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert run_tune("--out", str(tmp_path)) == 2
    assert "it is a folder" in capsys.readouterr().err


def test_tune_without_an_extension(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "unavailable", lambda *_: "no compiled extension")
    assert cli.run(argparse.Namespace(full=False, out=None)) == 2
    assert "nothing to choose between: no compiled extension" in capsys.readouterr().err


def test_info_tells_what_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    named = tmp_path / "named.json"
    named.write_text("{")
    monkeypatch.setenv(search.VARIABLE, str(named))
    tuned = info.collect()["tuned"]
    assert tuned["place"] == "the defaults" and "damaged" in tuned["refused"][str(named)]
    with pytest.raises(TableError):
        read(named)
