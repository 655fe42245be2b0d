"""Suite `conv`: baselines that compute what ours computes, a check that sees mistakes, floors, the table and plot."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from fastmtl.benchmarks.baselines import conv as conv_baselines
from fastmtl.benchmarks.report import plots, report
from fastmtl.benchmarks.runner import measure, registry
from fastmtl.benchmarks.runner import runner as runner_module
from fastmtl.benchmarks.runner.runner import Runner, Settings, near_rivals, wrong_choice
from fastmtl.benchmarks.suites import conv, conv_low_rank, conv_parts
from fastmtl.benchmarks.suites.conv_shapes import LAYERS, Layer, Spec, gate_values, random_ids
from fastmtl.ops import TaskPlan

CPU = torch.device("cpu")
FILTER = Layer("filter", 6, 20, 9, 3, 2, 1)
MATRIX = Layer("matrix", 8, 24, 5)
F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner(CPU, Settings(budget_s=0.02, longest_s=1.0, memory=False, ways=False))


SPECS = [
    *(Spec(FILTER, 3, 7, d, sort=s, per_sample=True) for d in ("forward", "backward", "both") for s in (False, True)),
    *(Spec(MATRIX, 3, 7, d, sort=s, per_sample=True) for d in ("forward", "both") for s in (False, True)),
    Spec(FILTER, 4, 7, gates="third", per_sample=True),
    Spec(FILTER, 4, 7, gates="off"),
    Spec(FILTER, 4, 7, gates="third", gate_grad=True, per_sample=True),
    Spec(FILTER, 4, 7, layout="NCHW", stacked=True),
    Spec(FILTER, 4, 7, dtype=BF16, weight_dtype=F32),
    Spec(FILTER, 9, 7),  # tasks without samples
    Spec(MATRIX, 4, 7, packed=True),
    Spec(MATRIX, 4, 7, packed=True, gate_grad=True),
    Spec(MATRIX, 4, 7, gates="third"),
]
PARTS = [
    *(
        conv_parts.weight_grad_case(Spec(x, 3, 7, "forward"), out=out)
        for x in (FILTER, MATRIX)
        for out in (False, True)
    ),
    *(conv_parts.scale_shift_case(3, 5, 4, 6, F32, train=train) for train in (False, True)),
    *(
        conv_parts.batch_norm_case(3, 7, 4, 5, F32, direction=direction, layout=layout, sort=sort)
        for direction in ("forward", "both")
        for layout, sort in (("channels_last", False), ("NCHW", True))
    ),
    *(
        conv_low_rank.lora_case(conv_low_rank.LoraSpec(MATRIX, 3, 7, **options))
        for options in (
            {"ranks": (3,)},
            {"ranks": (2, 4), "direction": "forward", "sort": True},
            {"ranks": (2, 4, 1), "packed": True, "train_weight": True},
        )
    ),
    conv_parts.plan_case(4, (30,)),
    conv_parts.plan_case(4, (6, 5)),
]


def spec_id(spec: Spec) -> str:
    return spec.name


def case_id(case: registry.Case) -> str:
    return case.name


@pytest.mark.parametrize("spec", [s for s in SPECS if s.direction != "backward" and s.dtype == F32], ids=spec_id)
def test_baselines_compute_what_ours_computes(spec):
    case = conv.layer_case(spec, CPU)
    b = case.make(CPU)
    expected = case.ours.call(b)
    labels = set()
    for candidate in case.candidates[1:]:
        if candidate.label == "shared" or candidate.unavailable:
            continue
        labels.add(candidate.label)
        result = candidate.call(b)
        if spec.direction == "forward":
            torch.testing.assert_close(result, expected)
            continue
        torch.testing.assert_close(result[0], expected[0])
        compare_gradients(b, result[1], expected[1])
    assert {"loop", "stacked"} <= labels
    assert spec.layer.linear == ("adapter" in labels)
    assert spec.sort != ("loop_permuted" in labels)


def compare_gradients(b, got, expected):
    """In the order x, weight, deltas as a list or as one, gate."""

    def as_stacked(grads):
        x, weight, *rest = grads
        gate = [rest.pop()] if b.gate_grad else []
        like = b.stacked if len(rest) == 1 else b.weight
        found = [torch.zeros_like(like) if g is None else g for g in rest]
        return [x, weight, found[0] if len(rest) == 1 else torch.stack(found), *gate]

    for a, e in zip(as_stacked(got), as_stacked(expected), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [*(conv.layer_case(spec, CPU) for spec in SPECS), *PARTS], ids=case_id)
def test_a_case_gives_a_row(case, runner):
    # one set of inputs is enough here
    row = json.loads(json.dumps(runner.run_case(replace(case, input_bytes=0))))
    assert row["status"] == "ok", row
    assert not [label for label, entry in row["times"].items() if "failed" in entry], row["times"]
    assert row["speedup"]
    if case.floor_from is not None:
        floor = row["floors"]["floor"]
        assert floor["from"] == "shared"
        assert floor["s"] == pytest.approx(floor["from_s"] + floor["bytes_s"])
        assert floor["from_s"] == row["times"]["shared"]["median"]
        assert floor["bytes_s"] == pytest.approx(case.moved["floor"] / row["copy_bytes_per_s"]["median"])
        assert row["time_over"]["floor"] <= row["time_over"]["shared"]
    assert len(report.cells(row)) == len(report.CONV_COLUMNS) == len(report.columns(row))
    if case.op in ("task_conv2d", "task_linear"):
        # y, dx and dW, as far as they are made
        direction = case.params["direction"]
        words = {"forward": ["y"], "backward": ["dx", "dW"], "both": ["y", "dx", "dW"]}[direction]
        assert [part.split()[0] for part in row["extra"]["chosen"].split(", ")] == words


@pytest.mark.parametrize("case", PARTS, ids=case_id)
def test_other_baselines_pass_the_same_check(case):
    inputs = case.make(CPU)
    for candidate in case.candidates[1:]:
        if candidate.label == "shared":
            continue
        call = candidate.call
        if case.op == "task_plan":
            call = partial(as_plan, candidate.call)
        assert case.check(inputs, call).passed, candidate.label


def as_plan(call, ids):
    return TaskPlan(ids, *call(ids))


def spoiled(result, position: int):
    """The result of forward and backward with one of its tensors off by 1%."""
    y, grads = result
    found = [y, *grads]
    found[position] = found[position] * 1.01
    return found[0], tuple(found[1:])


@pytest.mark.parametrize("layer", [FILTER, MATRIX], ids=["filter", "matrix"])
@pytest.mark.parametrize("position", range(6), ids=["y", "x", "weight", "delta 0", "delta 1", "gate"])
def test_a_wrong_result_is_not_timed(position, layer, runner):
    case = conv.layer_case(Spec(layer, 2, 7, gate_grad=True), CPU)
    right = case.ours.call
    candidates = (replace(case.ours, call=lambda b: spoiled(right(b), position)), *case.candidates[1:])
    row = runner.run_case(replace(case, candidates=candidates))
    assert row["status"] == "failed" and "times" not in row
    assert report.cells(row)[1] == "FAILED"


def test_the_gradient_of_a_closed_gates_delta_must_be_zero(runner):
    case = conv.layer_case(Spec(FILTER, 2, 7, gates="third"), CPU)
    right = case.ours.call

    def leaking(b):
        y, (x, weight, first, _) = right(b)
        return y, (x, weight, first, torch.full_like(first, 1e-12))

    assert (
        runner.run_case(replace(case, candidates=(replace(case.ours, call=leaking), *case.candidates[1:])))["status"]
        == "failed"
    )


def test_a_wrong_id_is_seen(runner):
    case = conv.layer_case(Spec(FILTER, 3, 7, "forward"), CPU)

    def rolled(b):
        return conv.ours(replace(b, ids=b.ids.roll(1)))

    row = runner.run_case(replace(case, candidates=(replace(case.ours, call=rolled), *case.candidates[1:])))
    assert row["status"] == "failed"


def test_the_floor_counts_deltas_in_use():
    spec = Spec(FILTER, 9, 7)
    present = set(random_ids(9, (7,), sort=False).tolist())
    assert 1 < len(present) < 9
    weight = 20 * 6 * 9 * 4
    for direction, passes in (("forward", 1), ("backward", 2), ("both", 3)):
        assert conv.layer_case(replace(spec, direction=direction), CPU).moved == {
            "floor": passes * len(present) * weight
        }
    opened = [t for t in present if gate_values("third", 9)[t]]
    assert 0 < len(opened) < len(present)
    assert conv.layer_case(replace(spec, gates="third"), CPU).moved["floor"] == 3 * len(opened) * weight
    assert conv.layer_case(replace(spec, gates="off"), CPU).moved["floor"] == 0
    # a trained gate's gradient needs the delta behind it
    trained = conv.layer_case(replace(spec, gates="off", gate_grad=True), CPU)
    assert trained.moved["floor"] == 3 * len(present) * weight


def test_without_the_yardstick_there_is_no_floor(runner):
    case = replace(conv.layer_case(Spec(FILTER, 2, 7, "forward"), CPU), input_bytes=0)
    ours, shared, *others = case.candidates
    row = runner.run_case(replace(case, candidates=(ours, replace(shared, unavailable="not here"), *others)))
    assert row["status"] == "ok" and "floor" not in row["time_over"]
    assert report.cells(row)[2] == "-"


def test_a_weight_per_sample_that_is_too_large_is_not_tried():
    case = conv.layer_case(Spec(LAYERS["ResNet-18 layer4"], 8, 256, per_sample=True), CPU)
    reasons = {c.label: c.unavailable for c in case.candidates}
    assert "GiB" in reasons["grouped"] and "GiB" in reasons["vmap"] and reasons["loop"] is None


def test_why_grouped_mm_is_missing(monkeypatch):
    monkeypatch.delattr(torch, "_grouped_mm", raising=False)
    assert conv_baselines.grouped_mm_missing(F32, CPU) == "this torch has no _grouped_mm"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_the_suite_has(device):
    everything = conv.cases(torch.device(device))
    params = [case.params for case in everything if "layer" in case.params and "gates" in case.params]
    assert len({case.name for case in everything}) == len(everything)
    assert {p["direction"] for p in params} >= {"forward", "backward", "both"}
    assert {p["T"] for p in params} == {1, 2, 8, 32} and {p["B"] for p in params} >= {8, 32, 64, 256}
    assert {p["gates"] for p in params} == {"on", "third", "off"} and {p["sorted"] for p in params} == {True, False}
    assert {p["layout"] for p in params} == {"channels_last", "NCHW", "rows"}
    assert {p["dtype"] for p in params} >= {"float32", "bfloat16"}
    assert {p["layer"].split()[0] for p in params} == {"ResNet-18", "ResNet-50", "ViT-B"}
    assert {c.label for case in everything for c in case.candidates} == {
        "ours",
        "shared",
        "plain",
        "dense",
        *conv_baselines.BASELINES,
        *conv_low_rank.BASELINES,
        *(["ours_direct", "ours_matmul", "ours_convolution"] if device == "cpu" else []),
    }
    quick = conv.cases(torch.device(device), quick=True)
    assert 5 <= len(quick) <= 20 and all(case.quick for case in quick)


def test_layer_shapes():
    for layer in LAYERS.values():
        x = torch.empty(
            (2, layer.size, layer.cin) if layer.linear else (2, layer.cin, layer.size, layer.size), device="meta"
        )
        y = layer(x, torch.empty(layer.weight_shape, device="meta"))
        assert tuple(y.shape) == layer.output_shape(2), layer


def test_table_and_plot(tmp_path):
    pytest.importorskip("matplotlib")
    specs = [Spec(FILTER, t, 7, sort=sort, quick=True) for t in (8, 32) for sort in (False, True)]
    runner = Runner(CPU, Settings(budget_s=0.02, longest_s=1.0, ways=False))
    rows = [runner.run_case(replace(conv.layer_case(spec, CPU), input_bytes=0)) for spec in specs]
    assert all(" MiB (" in report.cells(row)[-1] for row in rows)
    machine = {"device": "chip", "date": "2026-01-01", "commit": "c0", "uncommitted_changes": False}
    machine |= {"versions": {"torch": "2"}, "system": "s"}
    results = {"slug": "chip", "machine": machine, "suites": report.suite_runs(rows, machine, {}), "rows": rows}
    assert [path.name for path in plots.draw(results, tmp_path)] == ["chip-conv.png"]
    section = report.section(results, "conv")
    assert "| case | ours | x floor | x shared |" in section
    assert section.count("| filter fwd+bwd T=8 B=7 float32 ") == 2
    assert "x 2 reads" not in section


def test_a_row_fails_where_another_way_is_faster():
    case = conv.layer_case(Spec(MATRIX, 3, 7), CPU)
    ways = {c.label for c in case.candidates if c.kind == "way"}
    assert ways == {"ours_direct", "ours_matmul", "ours_convolution"}
    same = {"median": 1.0, "p20": 0.9, "p80": 1.1}
    faster = {"median": 0.9, "p20": 0.85, "p80": 0.95}
    noisy = {"median": 0.9, "p20": 0.7, "p80": 1.3}
    assert wrong_choice(case, {"ours": same, "ours_matmul": noisy, "ours_direct": same, "loop": faster}) is None
    assert "matmul for all segments takes 0.90" in str(wrong_choice(case, {"ours": same, "ours_matmul": faster}))


def test_rivals_whose_samples_overlap():
    case = conv.layer_case(Spec(MATRIX, 3, 7), CPU)
    ours, near, apart = [1.0, 1.1, 1.2, 1.3, 1.4], [1.0, 1.1, 1.25, 1.3, 1.4], [0.5, 0.6, 0.7, 0.8, 0.9]
    samples = {"ours": ours, "loop": near, "stacked": [3.0] * 5, "ours_direct": apart, "ours_matmul": near}
    assert near_rivals(case, samples) == ["loop"], "the fastest way is apart"
    assert near_rivals(case, {"ours": ours, "loop": [1.38] * 3, "ours_matmul": near}) == ["ours_matmul"]
    assert near_rivals(case, {"ours": ours, "loop": [1.3] * 3}) == ["loop"], "slower ones too: both ways alike"


def test_near_rivals_are_measured_on(monkeypatch):
    case = conv.layer_case(Spec(MATRIX, 3, 7), CPU)
    monkeypatch.setattr(runner_module, "near_rivals", lambda case, samples: ["loop"])
    monkeypatch.setattr(measure, "WORTH_REPEATING_S", 0)
    settings = Settings(budget_s=1e-9, memory=False, settle=2e9)
    times = Runner(CPU, settings).run_case(replace(case, input_bytes=0))["times"]
    assert times["stacked"]["reps"] == 3 and times["ours"]["reps"] == 9 + 60 and times["loop"]["reps"] == 3 + 60


def test_a_row_tells_the_ways_that_were_timed():
    case = conv.layer_case(Spec(FILTER, 3, 7, "backward"), CPU)
    row = Runner(CPU, Settings(budget_s=0.02, memory=False)).run_case(replace(case, input_bytes=0))
    assert {"ours_direct", "ours_convolution"} <= set(row["times"])
    assert set(row["speedup"]) == {"loop", "loop_permuted", "stacked"}
