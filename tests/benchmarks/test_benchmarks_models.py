"""Benchmarks of converted networks: every candidate does the same work, honest checks, table and picture."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from fastmtl.benchmarks.baselines import models as baselines
from fastmtl.benchmarks.report import plots, report
from fastmtl.benchmarks.runner import measure
from fastmtl.benchmarks.runner.registry import TAPS_MEMORY, Candidate
from fastmtl.benchmarks.runner.runner import Runner, Settings
from fastmtl.benchmarks.suites import models
from fastmtl.benchmarks.workloads.networks import EncoderLayer, PublishedResNet, ViT, Workload, fused_layer

CPU = torch.device("cpu")
RESNET = Workload("tiny ResNet", lambda: PublishedResNet(8), (3, 64, 64), batch=7)
VIT = Workload("tiny ViT", lambda: ViT(8, 4, 32, 2, 2, EncoderLayer), (3, 8, 8), batch=9)
SPECS = {
    "taps": models.Spec(RESNET, models.TAPS, 3, True),
    "separate": models.Spec(RESNET, models.SEPARATE, 3, True),
    "lora": models.Spec(VIT, models.LORA, 3, True),
    "taps on a ViT": models.Spec(VIT, models.TAPS, 3, True),
}


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner(CPU, Settings(budget_s=0.01, longest_s=1.0))


def workshop(spec: models.Spec) -> models.Workshop:
    made = models._make(spec, CPU)
    made.expect()
    return made


def call_of(spec: models.Spec, label: str):
    return next(c.call for c in models.candidates(spec.labels) if c.label == label)


def doubled(candidate: Candidate) -> Candidate:
    return replace(candidate, call=lambda inputs: candidate.call(inputs) * 2)


# --- the candidates


@pytest.mark.parametrize("name", SPECS)
def test_every_candidate_gives_the_same_outputs_and_gradients(name):
    spec = SPECS[name]
    for one in (spec, replace(spec, train=False)):
        here = workshop(one)
        for label in one.labels:
            found = here.verify(label, call_of(one, label))
            assert found.passed and found.tolerance == 1e-4, (label, found)


@pytest.mark.parametrize("spec", [SPECS["taps"], SPECS["taps on a ViT"]], ids=["ResNet", "ViT"])
def test_closed_gates_give_what_the_plain_network_gives(spec):
    here = workshop(replace(spec, train=False, closed=True))
    for label in ("ours", "plain", "loop", "separate"):
        assert here.verify(label, call_of(spec, label)).passed, label
    alone = workshop(replace(spec, train=False, closed=True, alone=True))
    for candidate in models.candidates(alone.spec.labels, alone.spec.alone):
        assert alone.verify(candidate.label, candidate.call).passed, candidate.label
    # of open gates the plain network's outputs are others
    opened = workshop(replace(spec, train=False))
    assert here.expected is not None and opened.expected is not None
    assert models._largest(here.expected[0], opened.expected[0]) > 1e-2


@pytest.mark.parametrize("label", ["ours", "loop", "separate", "adapter"])
def test_the_check_refuses_wrong_outputs_and_wrong_or_missing_gradients(label):
    spec = SPECS["lora"]
    here, call = workshop(spec), call_of(spec, label)

    def swapped(trainee):
        return call(trainee).flip(0)

    def one_is_missing(trainee):
        outputs = call(trainee)
        next(p for p in trainee.models[-1].parameters() if p.requires_grad).grad = None
        return outputs

    def one_is_off(trainee):
        outputs = call(trainee)
        next(p for p in trainee.models[-1].parameters() if p.grad is not None and p.ndim == 2).grad.mul_(1.01)
        return outputs

    assert here.verify(label, call).passed
    for wrong in (swapped, one_is_missing, one_is_off):
        # of T networks, what is missing in one that the converted network does not train is no error
        if label == "separate" and wrong is not swapped:
            wrong = lambda trainee: _spoiled(call, trainee, wrong is one_is_missing)  # noqa: B023, E731
        assert not here.verify(label, wrong).passed, wrong


def _spoiled(call, trainee, missing: bool):
    outputs = call(trainee)
    weight = trainee.models[1].get_submodule("layers.0.up").weight
    weight.grad = torch.full_like(weight.grad, torch.nan) if missing else weight.grad * 1.01
    return outputs


def test_the_check_refuses_gradients_of_another_task():
    """T networks in another order: each is right, but not for its samples."""
    spec = SPECS["separate"]
    here = workshop(spec)

    def turned(trainee):
        trainee.models = trainee.models[::-1]
        return call_of(spec, "separate")(trainee)

    assert not here.verify("separate", turned).passed


def test_the_plain_network_is_checked():
    spec = SPECS["taps"]
    here = workshop(spec)
    assert here.verify("plain", call_of(spec, "plain")).passed
    assert not here.verify("plain", lambda trainee: call_of(spec, "plain")(trainee) * 1.001).passed


def test_steps_train_each_network_and_no_other():
    spec = SPECS["lora"]
    here = workshop(spec)
    for label in spec.labels:
        assert here.verify(label, call_of(spec, label)).passed
    # the loop goes on with our network: the parameters are the same
    assert set(here.trainees) == {"ours", "plain", "separate", "adapter"}
    before = {name: p.detach().clone() for name, p in here.prepare("ours").model.named_parameters()}
    assert all(p.grad is None for p in here.prepare("ours").model.parameters())
    call_of(spec, "ours")(here.prepare("ours"))
    moved = {name for name, p in here.trainees["ours"].model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in here.trainees["ours"].model.named_parameters() if p.requires_grad}
    # the start is nobody's
    again = models.converted(spec)
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in here.base.named_parameters())


def test_adapters_are_low_rank_layers():
    layer = torch.nn.Linear(6, 4)
    A, B = ({name: torch.randn(*shape) for name in "ab"} for shape in ((2, 6), (4, 2)))
    rows = {"a": torch.tensor([0, 3]), "b": torch.tensor([2])}
    found = baselines.AdapterLinear(layer, A, B, 0.5, rows)
    x = torch.randn(4, 5, 6)
    y = found(x)
    for name, where in rows.items():
        expected = x[where] @ (layer.weight + 0.5 * B[name] @ A[name]).T + layer.bias
        torch.testing.assert_close(y[where], expected)
    torch.testing.assert_close(y[1], layer(x[1]))
    assert {name for name, p in found.named_parameters() if p.requires_grad} == {"A.a", "A.b", "B.a", "B.b"}


def test_networks_are_those_that_are_told():
    with torch.device("meta"):
        # ResNet-18 with a thousand classes has 11,689,512
        assert sum(p.numel() for p in PublishedResNet().parameters()) == 11_689_512 - 513_000 + 4 * 513
        sizes = [sum(p.numel() for p in ViT(layer=layer).parameters()) for layer in (EncoderLayer, fused_layer)]
    assert sizes[0] == sizes[1]


def test_both_encoder_layers_compute_the_same():
    ours, fused = EncoderLayer(8, 2), fused_layer(8, 2)
    attention = fused.self_attn
    with torch.no_grad():
        parts = zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True)
        for layer, (w, b) in zip((ours.query, ours.key, ours.value), parts, strict=True):
            layer.load_state_dict({"weight": w, "bias": b})
        for layer, other in (
            (ours.out, attention.out_proj), (ours.up, fused.linear1), (ours.down, fused.linear2),
            (ours.norm1, fused.norm1), (ours.norm2, fused.norm2),
        ):  # fmt: skip
            layer.load_state_dict(other.state_dict())
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(ours(x), fused(x))


# --- the cases


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_suite_has_every_kind_and_number_of_tasks(device):
    cases = models.cases(torch.device(device))
    assert len({case.name for case in cases}) == len(cases)
    for train in (True, False):
        for kind in ("taps", "lora", "separate bottom"):
            found = {
                c.params["T"]
                for c in cases
                if not c.quick and c.op != TAPS_MEMORY and (c.params["kind"], c.params["train"]) == (kind, train)
            }
            assert found == set(models.TASKS)
    assert {c.params["T"] for c in cases if c.params.get("gates") == "closed"} == set(models.TASKS)
    assert {c.params["T"] for c in cases if c.op == TAPS_MEMORY} == set(models.TASKS)
    for case in cases:
        expected = {"ours", "sequential", "plain", "separate"} if case.op == TAPS_MEMORY else set(models.WAYS)
        if case.params["kind"] != "lora":
            expected.discard("adapter")
        if case.params.get("tasks of a batch") == "one":
            expected = {"ours", "plain"}
        assert {c.label for c in case.candidates} == expected and case.ours.label == "ours"
    quick = models.cases(torch.device(device), quick=True)
    assert all(case.quick and case.params["T"] == 8 for case in quick) and 5 <= len(quick) <= 8


@pytest.mark.parametrize("name", ["lora", "taps on a ViT"])
def test_a_case_gives_a_row(name, runner):
    row = json.loads(json.dumps(runner.run_case(models.model_case(SPECS[name]))))
    assert row["status"] == "ok", row
    labels = set(SPECS[name].labels)
    assert set(row["speedup"]) == labels - {"ours", "plain"} and row["time_over"]["plain"] > 0
    assert set(row["check"]["others"]) == labels - {"ours"}
    assert set(row["memory"]) == labels and all(entry["allocated_bytes"] > 0 for entry in row["memory"].values())
    cells = report.cells(row)
    assert len(cells) == len(report.columns(row)) == len(report.MODEL_COLUMNS)
    assert cells[5] == ("-" if name != "lora" else f"{row['speedup']['adapter']:.3g}x")


def test_a_wrong_result_is_not_timed(runner):
    case = models.model_case(replace(SPECS["lora"], train=False))
    wrong = [doubled(c) if c.label == "loop" else c for c in case.candidates]
    row = runner.run_case(replace(case, candidates=tuple(wrong)))
    assert row["status"] == "ok" and "wrong result" in row["times"]["loop"]["failed"] and "loop" not in row["speedup"]
    row = runner.run_case(replace(case, candidates=(doubled(case.ours), *case.candidates[1:])))
    assert row["status"] == "failed" and report.cells(row)[1] == "FAILED"


def test_the_memory_of_a_training_holds_weights_gradients_and_momentum(runner):
    """Per task of the joint variant a delta, its gradient and its momentum, beside those of the shared weights."""
    row = runner.run_case(models.memory_case(VIT, 3))
    assert row["status"] == "ok", row
    peak = {label: entry["allocated_bytes"] for label, entry in row["memory"].items()}
    with torch.device("meta"):
        network = 4 * sum(p.numel() for p in VIT.build().parameters())
    # of a layer's weight 12 tensors (shared and three deltas, each with its gradient and momentum) beside 4, of what
    # has no delta 3 beside 1; of T networks 9 beside 3, and fewer activations at a time
    assert 6 * network < peak["ours"] - peak["sequential"] < 8 * network
    assert 4 * network < peak["separate"] - peak["plain"] < 6 * network
    cells = report.cells(row)
    assert len(cells) == len(report.columns(row)) == len(report.TAPS_COLUMNS)
    assert cells[5] == f"{peak['ours'] / peak['sequential']:.2f}"


def test_the_memory_of_a_wrong_training_is_not_shown(runner):
    case = models.memory_case(VIT, 3)
    wrong = [doubled(c) if c.label == "plain" else c for c in case.candidates]
    row = runner.run_case(replace(case, candidates=tuple(wrong)))
    assert "wrong result" in row["times"]["plain"]["failed"] and "plain" not in row["memory"]


def test_a_step_allocates_more_than_an_evaluation():
    """The figure of memory is of one call: a step holds activations and gradients."""
    peaks = {}
    for train in (True, False):
        spec = replace(SPECS["lora"], train=train)
        here = workshop(spec)
        here.verify("ours", call_of(spec, "ours"))
        peaks[train], _ = measure.allocated_by_torch(call_of(spec, "ours"), here.prepare("ours"))
    assert peaks[True] > 2 * peaks[False] > 0


# --- table and picture


def model_row(num_tasks: int, train: bool = True, kind: str = "taps", **changes) -> dict:
    """A row as the runner makes them, with times that tell the columns apart."""
    times = {"ours": 1.5, "plain": 1.0, "loop": 3.0, "separate": 6.0, "adapter": 4.5}
    row = {
        "suite": "models",
        "case": f"net {kind} T={num_tasks} {'train' if train else 'eval'}",
        "op": "step of a converted network" if train else "evaluation of a converted network",
        "params": {"T": num_tasks, "network": "net", "kind": kind, "train": train, "gates": "open", "batch": 8},
        "device": "cpu",
        "status": "ok",
        "took_s": 1.0,
        "times": {label: {"median": s, "p20": s, "p80": s, "reps": 3} for label, s in times.items()},
        "time_over": {"plain": 1.5},
        "speedup": {label: s / 1.5 for label, s in times.items() if label not in ("ours", "plain")},
        "speedup_over_best": {label: s / 1.5 for label, s in times.items() if label not in ("ours", "plain")},
        "memory": {"ours": {"peak_extra_bytes": 9, "allocated_bytes": 5 << 20}, "plain": {"peak_extra_bytes": 4 << 20}},
    }
    return row | changes


def results_of(*rows: dict) -> dict:
    machine = {"device": "chip", "date": "2026-01-01", "commit": "c0", "uncommitted_changes": False}
    machine |= {"versions": {"torch": "2"}, "system": "s"}
    suites = report.suite_runs(rows, machine, {"quick": False})
    return {"schema": 2, "slug": "chip", "machine": machine, "suites": suites, "rows": list(rows)}


def test_cells():
    row = model_row(8)
    assert report.cells(row) == ["net taps T=8 train", "1.5 s", "1.50", "2x", "4x", "3x", "1.25"]
    del row["times"]["adapter"], row["speedup_over_best"]["adapter"], row["memory"]["plain"]
    row["times"]["loop"] = {"failed": "no"}
    del row["speedup_over_best"]["loop"]
    assert report.cells(row)[3:] == ["failed", "4x", "-", "-"]
    memory = {"ours": 8.0, "sequential": 2.0, "plain": 3.0}
    row |= {"op": TAPS_MEMORY, "memory": {k: {"peak_extra_bytes": int(v * 2**20)} for k, v in memory.items()}}
    assert report.cells(row)[1:] == ["8 MiB", "2 MiB", "3 MiB", "-", "4.00"]


def test_a_page_with_and_without_results(tmp_path):
    pytest.importorskip("matplotlib")
    empty = report.page("models", [results_of()], tmp_path, tmp_path)
    assert "No results of this suite are committed" in empty and "`fastmtl bench --suite models`" in empty
    _, drawn = report.write(results_of(model_row(2), model_row(8)), tmp_path)
    assert [path.name for path in drawn] == ["chip-models.png"]
    text = report.page("models", report.newest_first(tmp_path), tmp_path, tmp_path)
    assert "No results" not in text and "![chip-models](chip-models.png)" in text
    assert "| net taps T=8 train | 1.5 s | 1.50 |" in text


def test_lines_of_the_plot(tmp_path, monkeypatch):
    """A panel for each kind and mode; each point is a ratio within its row; closed gates have no point."""
    pytest.importorskip("matplotlib")
    seen = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: seen.append(figure) or path)
    closed = model_row(4)
    closed["params"]["gates"] = "closed"
    slow = model_row(32)
    slow["times"]["separate"] = {"skipped": "left out"}
    memory = model_row(16, op=TAPS_MEMORY)
    del memory["params"]["gates"]
    rows = [slow, model_row(2), closed, memory, model_row(8, status="error", times={})]
    plots._models(results_of(*rows, model_row(8, False), model_row(2, False)), tmp_path / "x.png")
    panels = [axes for axes in seen[0].axes if axes.get_lines()]
    assert len(panels) == 2
    lines = {line.get_label(): line.get_xydata().tolist() for line in panels[0].get_lines()}
    assert lines["the converted network, a mixed batch"] == [[2.0, 1.5], [32.0, 1.5]]
    assert lines["T plain networks"] == [[2.0, 6.0]]
    assert plots._models(results_of(), tmp_path / "x.png") is None
