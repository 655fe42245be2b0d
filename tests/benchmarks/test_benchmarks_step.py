"""Benchmarks of steps in which every sample has one task: right candidates, honest checks, table and picture."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import fastmtl
from fastmtl.benchmarks.baselines import peers
from fastmtl.benchmarks.report import plots, report
from fastmtl.benchmarks.runner import measure, registry
from fastmtl.benchmarks.runner.registry import TASK_STEP
from fastmtl.benchmarks.runner.runner import Runner, Settings
from fastmtl.benchmarks.suites import step_following, step_mixed_batches
from fastmtl.benchmarks.workloads import networks
from fastmtl.benchmarks.workloads.networks import Workload
from fastmtl.ops.gradients import reference
from fastmtl.task_gradients.one_pass.experiments import verdict

CPU = torch.device("cpu")
MLP = Workload("tiny MLP", lambda: networks.mlp(8, 1), (networks.OBSERVED,), batch=14, regression=True)
RESNET = Workload("tiny ResNet", lambda: networks.ResNet(8, 1), (3, 8, 8), batch=10)
VIT = Workload("tiny ViT", lambda: networks.ViT(8, 4, 16, 1, 2), (3, 8, 8), batch=10)
ORDERS = pytest.mark.parametrize("in_order", [True, False], ids=["sorted", "shuffled"])
LABELS = list(step_mixed_batches.METHODS)


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner(CPU, Settings(budget_s=0.05, longest_s=1.0))


def workshop(workload: Workload = MLP, num_tasks: int = 3, in_order: bool = False) -> step_mixed_batches.Workshop:
    batch = step_mixed_batches.make_batch(workload, num_tasks, in_order, CPU)
    made = step_mixed_batches.Workshop(workload, num_tasks, batch, CPU)
    made.expect()
    return made


def call_of(label: str):
    (candidate,) = step_mixed_batches.candidates([label], {})
    if candidate.unavailable:
        pytest.skip(candidate.unavailable)
    return candidate.call


# --- the candidates


@ORDERS
@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("workload", [MLP, RESNET, VIT], ids=lambda w: w.name)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_every_candidate_leaves_the_same_update(workload, label, in_order):
    found = workshop(workload, 4, in_order).verify(label, call_of(label))
    assert found.passed, found
    # in networks as small as these all of them are as exact
    assert found.error <= (1e-3 if label == "torchjd_upgrad" else 1e-5)
    assert label in step_mixed_batches.FLOAT32_GRAM or found.tolerance == 1e-5


def test_an_error_may_be_twice_what_float32_is_off_itself(monkeypatch):
    here = workshop()
    monkeypatch.setattr(here, "rounding", lambda label: 1e-3)

    def off_by(error):
        def call(trainee):
            call_of("per_task")(trainee)
            for p in trainee.params:
                p.grad.mul_(1 + error)

        return here.verify("per_task", call)

    assert off_by(1.5e-3).passed and not off_by(2.5e-3).passed
    monkeypatch.undo()
    assert here.rounding("per_task") < 1e-5 and not off_by(2e-5).passed


@pytest.mark.parametrize("label", ["per_task", "per_task_bank", "t_backwards", "backward", "torchjd"])
def test_the_check_refuses_another_order(label, monkeypatch):
    here = workshop(num_tasks=6)
    assert here.verify(label, call_of(label)).passed
    # those that are given it, and TorchJD, which draws it
    here.order = here.order.flip(1)
    monkeypatch.setattr(step_mixed_batches, "SEED", step_mixed_batches.SEED + 1)
    assert not here.verify(label, call_of(label)).passed


def test_the_check_refuses_the_sum_and_missing_gradients():
    here = workshop()
    assert not here.verify("per_task", call_of("sum")).passed
    assert here.verify("sum", call_of("sum")).passed

    def one_is_missing(trainee):
        call_of("per_task")(trainee)
        trainee.params[-1].grad = None

    def one_is_off(trainee):
        call_of("per_task")(trainee)
        # the smallest tensor counts like any other
        min(trainee.params, key=lambda p: p.numel()).grad.mul_(1 + 1e-3)

    assert not here.verify("per_task", one_is_missing).passed
    assert not here.verify("per_task", one_is_off).passed
    assert not here.verify("per_task", lambda trainee: None).passed


def test_upgrad_is_checked_against_its_own_weights():
    here = workshop()
    assert not here.verify("torchjd", call_of("torchjd_upgrad")).passed
    assert here.verify("torchjd_upgrad", call_of("torchjd_upgrad")).passed


@pytest.mark.parametrize("num_tasks", [2, 5, 17])
def test_the_order_is_the_one_that_torchjd_draws(num_tasks):
    aggregation = pytest.importorskip("torchjd.aggregation")
    g = torch.randn(num_tasks, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = g @ g.T
    order = peers.drawn_order(num_tasks, 11)
    torch.manual_seed(11)
    theirs = aggregation.PCGradWeighting()(gram)
    torch.testing.assert_close(reference.pcgrad_coefficients(gram, order).sum(0), theirs)


def test_drawing_the_order_leaves_torchs_generator_alone():
    before = torch.get_rng_state()
    peers.drawn_order(4, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_tasks_that_do_not_conflict_are_no_benchmark(monkeypatch):
    def same_targets(self, task_ids, seed=1):
        x = torch.ones(self.batch, *self.sample)
        return x, torch.ones(self.batch, networks.ACTIONS)

    monkeypatch.setattr(Workload, "data", same_targets)
    with pytest.raises(RuntimeError, match="tasks don't conflict"):
        workshop()


# --- batches and networks


@ORDERS
def test_a_batch_has_every_task_and_weights_of_means(in_order):
    here = workshop(num_tasks=5, in_order=in_order)
    batch, trainee = here.batch, here.new()
    assert sorted(set(batch.task_ids.tolist())) == list(range(5))
    assert (batch.task_ids.diff() >= 0).all().item() is in_order
    total = sum(trainee.task_loss(t) for t in range(5))
    torch.testing.assert_close(trainee.sample_losses().sum(), total)
    torch.testing.assert_close(torch.stack(trainee.task_losses()).sum(), total)
    for t, which in enumerate(batch.of_task):
        assert (batch.task_ids[which] == t).all() and len(batch.x[which]) == (batch.task_ids == t).sum()


def test_sorted_and_shuffled_batches_have_the_same_ids():
    assert torch.equal(
        step_mixed_batches.draw_ids(64, 8, True), step_mixed_batches.draw_ids(64, 8, False).sort().values
    )


ALL_NETWORKS = [MLP, RESNET, VIT, networks.DIGITS]


@pytest.mark.parametrize("workload", ALL_NETWORKS, ids=lambda w: w.name)
def test_networks_mix_no_samples_and_reach_all_parameters(workload):
    model = workload.model().double()
    x, y = workload.data(torch.arange(workload.batch) % 2)
    x, y = x.double(), y.double() if y.is_floating_point() else y
    out = model(x)
    torch.testing.assert_close(model(x[:3]), out[:3])
    assert workload.losses(out, y).shape == (workload.batch,)
    workload.losses(out, y).sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in model.parameters())
    again = dict(workload.model().named_parameters())
    assert all(torch.equal(p.float(), again[name]) for name, p in model.named_parameters())


def test_sizes_of_networks():
    """ResNet-18 for small pictures with ten classes has 11.17 million; these have four, and biases."""
    full = step_mixed_batches.parameters(networks.FULL_RESNET)
    assert abs(full - (11_173_962 - 6 * 513 + 4_800)) < 100
    assert step_mixed_batches.parameters(networks.RL) == 39 * 400 + 400 + 2 * (400 * 400 + 400) + 400 * 4 + 4
    # biases and affine norms throughout
    for module in networks.ResNet(8, 1).modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.GroupNorm | torch.nn.Linear):
            assert module.bias is not None and module.weight is not None


# --- the cases


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_suite_has_every_network_number_of_tasks_and_order(device):
    cases = step_mixed_batches.cases(torch.device(device))
    assert len({case.name for case in cases}) == len(cases)
    by_network: dict[str, set] = {}
    for case in cases:
        by_network.setdefault(case.params["network"], set()).add((case.params["T"], case.params["sorted"]))
    assert len(by_network) == 5
    for network, found in by_network.items():
        if network == networks.RESNET_64.name:
            assert found == {(8, False), (16, False)}
            continue
        expected = step_mixed_batches.RL_TASKS if network == networks.RL.name else step_mixed_batches.TASKS
        assert {t for t, in_order in found if not in_order} == set(expected)
        assert any(in_order for _, in_order in found)
    for case in cases:
        assert case.ours.label == "ours" and case.candidates[0].kind == "ours"
    quick = step_mixed_batches.cases(torch.device(device), quick=True)
    assert 1 <= len(quick) <= 2 and all(case.quick for case in quick)
    assert set(registry.collect(["step"], CPU, pattern="ViT")[0].at_least) == set(step_mixed_batches.SINGLE_PASS)


@pytest.mark.parametrize("labels", [LABELS, step_mixed_batches.SINGLE_PASS], ids=["all", "single"])
def test_a_case_gives_a_row(labels, runner):
    row = json.loads(json.dumps(runner.run_case(step_mixed_batches.task_case(MLP, 3, False, labels=labels))))
    assert row["status"] == "ok", row
    missing = {"torchjd", "torchjd_autogram"} if peers.torchjd_missing() else set()
    missing |= {"torchjd_upgrad"} if peers.upgrad_missing() else set()
    assert {label for label, entry in row["times"].items() if "median" not in entry} == missing & set(labels)
    assert {"sum", "streamed"} <= set(row["time_over"])
    for label in set(labels) - missing - {"ours"}:
        assert row["check"]["others"][label]["error"] <= row["check"]["others"][label]["tolerance"]
    assert row["check"]["error"] <= row["check"]["tolerance"] == 1e-5
    assert set(row["memory"]) == set(labels) - missing
    assert all(entry["allocated_bytes"] > 0 for entry in row["memory"].values())
    for label in step_mixed_batches.SINGLE_PASS:
        assert row["times"][label]["reps"] >= step_mixed_batches.FEWEST
    cells = report.cells(row)
    assert len(cells) == len(report.columns(row)) == len(report.TASK_COLUMNS)
    assert cells[2] == f"{row['times']['ours']['median'] / row['times']['sum']['median']:.2f}"
    assert cells[5] == "-" if labels is step_mixed_batches.SINGLE_PASS else cells[5].endswith("x")


def test_a_wrong_baseline_is_not_timed(runner):
    case = step_mixed_batches.task_case(MLP, 3, False, labels=("ours", "sum", "per_task", "per_task_bank"))
    spoiled = [replace(c, call=call_of("sum")) if c.label == "per_task" else c for c in case.candidates]
    row = runner.run_case(replace(case, candidates=tuple(spoiled)))
    assert row["status"] == "ok", row
    assert "wrong result" in row["times"]["per_task"]["failed"] and "per_task" not in row["speedup"]
    assert row["speedup"]["per_task_bank"] > 0


def test_a_wrong_result_of_ours_is_not_timed(runner):
    case = step_mixed_batches.task_case(MLP, 3, False, labels=step_mixed_batches.SINGLE_PASS)
    row = runner.run_case(replace(case, candidates=(replace(case.ours, call=call_of("sum")), *case.candidates[1:])))
    assert row["status"] == "failed" and "times" not in row
    assert report.cells(row)[1] == "FAILED"


def test_without_one_pass_the_row_is_an_error(runner, monkeypatch):
    monkeypatch.delattr(fastmtl, "one_pass")
    row = runner.run_case(step_mixed_batches.task_case(MLP, 3, False, labels=step_mixed_batches.SINGLE_PASS))
    assert row["status"] == "error" and "one_pass" in row["error"]


def test_what_is_left_out_says_why(runner):
    case = step_mixed_batches.task_case(MLP, 3, False, left_out={"torchjd": "takes long", "backward": "takes long"})
    row = runner.run_case(case)
    assert row["status"] == "ok" and row["extra"]["torchjd_parallel_chunk_size"] is None
    assert row["times"]["backward"]["skipped"] == "takes long"
    assert row["times"]["torchjd"]["skipped"] in ("takes long", "not installed")
    assert "backward" not in row["memory"]


def test_the_memory_of_a_step_holds_what_a_method_keeps():
    """The hand loop keeps its bank from step to step: the trainee that is measured has none yet, but momentum."""
    here = workshop()
    trainee = here.prepare("per_task")
    call_of("per_task")(trainee)
    assert here.prepare("per_task").bank is not None
    fresh = here.prepare_memory("per_task")
    assert fresh.bank is None and all(p.grad is None for p in fresh.params)
    assert len(fresh.optimizer.state) == len(fresh.params)


def test_memory_counts_a_bank():
    """T x P of a step beyond a plain one, in a network large enough for the resolution of resident sets."""
    wide = Workload("wide MLP", lambda: networks.mlp(1500, 2), (networks.OBSERVED,), batch=16, regression=True)
    here = workshop(wide, 6)
    bank = 6 * step_mixed_batches.parameters(wide) * 4
    resident, counted = {}, {}
    for label in ("sum", "per_task_bank", "per_task"):
        here.verify(label, call_of(label))
        found = measure.peak_memory(call_of(label), here.prepare_memory(label), CPU)
        resident[label] = found["peak_extra_bytes"]
        counted[label], _ = measure.allocated_by_torch(call_of(label), here.prepare_memory(label))
    row = bank / 6
    # the last rows of a bank become the update, where a plain step has one gradient; the hand loop makes another one
    assert 4.9 * row < counted["per_task_bank"] - counted["sum"] < 6.2 * row
    assert 5.9 * row < counted["per_task"] - counted["sum"] < 7.2 * row
    assert 0.7 * bank < resident["per_task_bank"] - resident["sum"] < 1.3 * bank


def test_what_was_checked_is_warmed_up_once():
    calls = {"cold": 0, "warm": 0}

    def sampler(label):
        def sample():
            calls[label] += 1
            return 0.01

        return sample

    for label, warm in (("cold", False), ("warm", True)):
        measure.interleave({label: sampler(label)}, 0.0, fewest=2, warm=warm)
    assert calls == {"cold": 4, "warm": 3}


# --- table and picture


def task_row(num_tasks: int, device: str = "cpu", network: str = "small net", **changes) -> dict:
    """A row as the runner makes them, with times that tell the columns apart."""
    seconds = {
        "ours": 1.1,
        "sum": 1.0,
        "streamed": 1.9,
        "sorting": 1.05,
        "per_task": 2.2,
        "per_task_bank": 3.3,
        "t_backwards": 8.8,
        "backward": 7.7,
        "torchjd": 6.6,
        "torchjd_autogram": 5.5,
    }
    peaks = {"ours": 11.0, "sum": 3.0, "streamed": 3.9}
    slower = {label: s / 1.1 for label, s in seconds.items() if label not in ("ours", "sum", "streamed", "sorting")}
    row = {
        "suite": "step",
        "case": f"{network} T={num_tasks} shuffled",
        "op": TASK_STEP,
        "params": {"T": num_tasks, "P": 262144, "dtype": "float32", "network": network, "batch": 8, "sorted": False},
        "device": device,
        "status": "ok",
        "took_s": 1.0,
        "times": {label: {"median": s, "p20": s, "p80": s, "reps": 3} for label, s in seconds.items()},
        "time_over": {"sum": 1.1, "streamed": 1.1 / 1.9},
        "speedup": slower,
        "speedup_over_best": {
            "per": 2.0,
            "t": slower["t_backwards"],
            "backward": slower["backward"],
            "torchjd": slower["torchjd_autogram"],
        },
        "memory": {label: {"peak_extra_bytes": 7, "allocated_bytes": int(x * 2**20)} for label, x in peaks.items()},
    }
    return row | changes


def results_of(*rows: dict, device: str = "chip", kind: str = "cpu", date: str = "2026-01-01") -> dict:
    machine = {
        "device": device,
        "device_type": kind,
        "date": date,
        "commit": "c0ffee",
        "uncommitted_changes": False,
        "versions": {"torch": "2"},
        "system": "s",
    }
    suites = report.suite_runs(rows, machine, {"quick": False})
    return {"schema": 2, "slug": device, "machine": machine, "suites": suites, "rows": list(rows)}


def test_cells_of_a_step_by_tasks():
    row = task_row(8)
    # 8 MiB over a plain step, of a bank of 8 MiB
    assert report.cells(row) == [
        "small net T=8 shuffled",
        "1.1 s",
        "1.10",
        "1.05",
        "2x",
        "7x",
        "5x",
        "8 MiB (1.00)",
        "1.90",
        "1.30",
    ]
    row["times"]["streamed"] = {"failed": "no"}
    del row["times"]["sorting"]
    del row["memory"]["streamed"], row["memory"]["sum"]
    row["speedup"] = {}
    row["times"]["backward"] = row["times"]["t_backwards"] = {"skipped": "left out: long"}
    assert report.cells(row)[3:] == ["-", "2x", "skipped", "5x", "-", "failed", "-"]


def test_calls_and_first_steps_are_rows(runner):
    """Of calls of each kind, and of a first step that makes experiments, which the others don't."""
    rows = [runner.run_case(step_following.call_case(name, 2)) for name in step_following.CALLED]
    small = Workload("tiny", lambda: step_following.unruled_vit(VIT), VIT.sample, batch=10)
    rows.append(runner.run_case(step_following.first_case(small, 3)))
    assert [row["status"] for row in rows] == ["ok"] * len(rows), rows
    assert [len(report.cells(row)) for row in rows] == [5] * len(step_following.CALLED) + [4]
    seconds = {"ours": 7e-3, "block": 1e-3, "plain": 2e-3, "mode": 3e-3}
    times = {label: {"median": s} for label, s in seconds.items()}
    cells = report.cells(rows[0] | {"times": times, "params": {"calls": 1000}})
    assert cells[1:] == ["6 us", "2 us", "4 us", "1 us"]


def test_a_first_step_tries_what_has_no_rule():
    model = step_following.unruled_vit(VIT)
    x, ids = torch.randn(6, *VIT.sample), torch.arange(6) % 3
    for first in (True, False):
        if first:
            verdict.forget()
        with fastmtl.one_pass(model, ids, 3) as bank:
            model(x).sum().backward()
        assert (bank.report().runs > 0) == first


def test_a_page_has_each_run_of_its_suite_and_the_newest_first(tmp_path):
    pytest.importorskip("matplotlib")
    report.write(results_of(task_row(8)), tmp_path)
    failed = task_row(4, "cuda", status="error", error="out of memory")
    report.write(results_of(failed, device="gpu", kind="cuda", date="2026-02-02"), tmp_path)
    report.write(results_of(device="without", date="2026-03-03"), tmp_path)
    text = report.page("step", report.newest_first(tmp_path), tmp_path, tmp_path)
    assert text.index("## gpu\n") < text.index("## chip\n") and "without" not in text
    assert "| small net T=8 shuffled | 1.1 s | 1.10 |" in text and "![chip-tasks](chip-tasks.png)" in text
    # a page hides no failure, and says what it was
    assert "| small net T=4 shuffled (cuda) | ERROR |" in text and "out of memory" in text


def row_of_readme(case: str, **speedup: float) -> dict:
    row = task_row(8)
    medians = {label: {"median": ratio * 1.1} for label, ratio in speedup.items()}
    return row | {"case": case, "speedup": speedup, "times": {"ours": {"median": 1.1}, **medians}}


def test_the_readme_compares_with_the_fastest_way_that_is_not_fastmtl():
    cases = dict.fromkeys(report.README_CASES)
    rows = [row_of_readme(case, per_task=0.5, torchjd=3.0, backward=0.25) for case in cases]
    table = report.readme_table([results_of(*rows)])
    assert table.count("| 550 ms (forward and backward per task) | 0.50x (slower) |") == len(cases) == 5
    with pytest.raises(ValueError, match="no results have times"):
        report.readme_table([results_of(*rows[1:])])
    # the newest run that has times of a row; one that failed is passed over
    failed = results_of(*(row | {"status": "failed"} for row in rows), device="broken")
    newer = results_of(*(row_of_readme(case, torchjd=2.0) for case in cases), device="newer")
    assert (
        report.readme_table([failed, newer, results_of(*rows)]).count("| newer | 1.1 s | 2.2 s (torchjd) | 2.00x |")
        == 5
    )


def test_the_plot_of_steps_is_the_first_picture(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    rows = [task_row(t, network=network) for network in ("a net", "another") for t in (16, 2, 8)]
    _, drawn = report.write(results_of(*rows), tmp_path)
    assert [p.name for p in drawn] == ["chip-tasks.png"]
    height, width, _ = pyplot.imread(drawn[0]).shape
    assert width > 1000 and height > 300
    body = report.page("step", report.newest_first(tmp_path), tmp_path, tmp_path)
    assert body.count("![chip-tasks](chip-tasks.png)") == 1 and body.index("-tasks.png") < body.index("| case |")


def test_lines_of_the_plot(tmp_path, monkeypatch):
    """The line to beat is drawn first; each point is a ratio within its row; batches in order have no point."""
    pytest.importorskip("matplotlib")
    seen = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: seen.append(figure) or path)
    slow = task_row(16)
    slow["times"]["torchjd"] = {"skipped": "left out"}
    in_order = task_row(4)
    in_order["params"]["sorted"] = True
    broken = task_row(32, status="error", times={})
    plots._tasks(results_of(slow, task_row(2), in_order, broken), tmp_path / "x.png")
    axes, *_ = seen[0].axes
    lines = {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}
    assert next(iter(lines)) == "a forward and backward per task"
    assert len(lines) == 8
    assert lines["fastmtl.one_pass"].get_xydata().tolist() == [[2.0, 1.1], [16.0, 1.1]]
    assert lines["TorchJD, PCGrad"].get_xydata().tolist() == [[2.0, 6.6]]
    assert plots._tasks(results_of(), tmp_path / "x.png") is None
