"""The benchmark runner: coverage of ops, fair and right candidates, failed checks, files. No assertion on time."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from paths import ROOT

from fastmtl import methods, ops
from fastmtl.benchmarks.baselines import surgery as baselines
from fastmtl.benchmarks.report import report
from fastmtl.benchmarks.runner import cli, measure, registry
from fastmtl.benchmarks.runner.runner import Runner, Settings
from fastmtl.benchmarks.suites import surgery
from fastmtl.benchmarks.workloads import digits, gradients
from fastmtl.core.schemas import PUBLIC_OPS
from fastmtl.ops.gradients import reference

CPU = torch.device("cpu")
SHAPES = [(8, 3, 3, 3), (8,), (10, 72), (10,)]


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner(CPU, Settings(budget_s=0.05, longest_s=1.0))


def tiny_cases() -> list[registry.Case]:
    banks = [surgery.bank_case(op, 3, 1000, dtype) for op in surgery.OPS for dtype in surgery.DTYPES]
    lists = [surgery.list_case(op, 3, SHAPES, "tiny") for op in surgery.OPS]
    return [*banks, *lists, surgery.coefficients_case(5)]


def name(case: registry.Case) -> str:
    return case.name


def order(num_tasks: int) -> torch.Tensor:
    return ops.random_order(num_tasks, generator=torch.Generator().manual_seed(0))


def test_every_public_op_is_measured():
    public = {op for op in PUBLIC_OPS if not op.endswith("_backward")}
    assert registry.covered_ops() >= public
    assert registry.covered_ops() <= set(PUBLIC_OPS)


def test_case_names_are_unique():
    names = [(case.suite, case.name) for case in registry.collect(registry.SUITES, CPU)]
    assert len(names) == len(set(names))
    quick = registry.collect(registry.SUITES, CPU, quick=True)
    assert 20 <= len(quick) < len(names)
    assert all(case.quick for case in quick)


def test_collect_filters_and_refuses():
    only = registry.collect(["surgery"], CPU, quick=True, pattern="coefficients")
    assert {case.op for case in only} == {"pcgrad_coefficients"}
    with pytest.raises(ValueError, match="expected one of surgery, methods, step, conv, models, got 'speed'"):
        registry.collect(["speed"], CPU)


@pytest.mark.parametrize("case", tiny_cases(), ids=name)
def test_baselines_compute_what_ours_computes(case):
    inputs = case.make(CPU)
    if isinstance(inputs.grads, torch.Tensor) and inputs.grads.dtype == torch.bfloat16:
        pytest.skip("baselines may round a Gram matrix to bfloat16, as their authors' code does")
    inputs = replace(inputs, order=order(inputs.weights.shape[0]))
    for candidate in case.candidates:
        if candidate.label.startswith("torchjd"):
            continue  # draws its own order
        result = candidate.call(inputs)
        lists = isinstance(inputs.grads, list)
        if lists and candidate.label in ("ours", "fresh"):
            # ours gives lists back; the baselines' flat result is split by views in everyday code
            parts = result if isinstance(result[0], list) else [result]
            result = result if isinstance(result, torch.Tensor) else torch.stack([baselines.flatten(x) for x in parts])
        expected = case.ours.call(replace(inputs.on_bank if lists else inputs, out=None))
        torch.testing.assert_close(
            result.reshape(expected.shape).double(),
            expected.double(),
            rtol=1e-4,
            atol=1e-4 * float(expected.abs().max()),
        )


@pytest.mark.parametrize("case", tiny_cases(), ids=name)
def test_a_case_gives_a_row(case, runner):
    row = json.loads(json.dumps(runner.run_case(case)))
    assert row["status"] == "ok", row
    assert row["check"]["error"] <= row["check"]["tolerance"]
    for label in ("naive", "plain"):
        assert row["speedup"][label] > 0
        assert row["speedup_over_best"][label] <= row["speedup"][label]
    for entry in row["times"].values():
        assert "median" not in entry or 0 < entry["p20"] <= entry["median"] <= entry["p80"]
    assert "peak_extra_bytes" in row["memory"]["ours"]
    if case.moved:
        assert row["copy_bytes_per_s"]["median"] > 0
        assert all(row["time_over"][floor] > 0 for floor in case.moved)
        assert row["floors"]["floor"]["s"] >= row["floors"]["floor"]["bytes_s"]
    if case.params.get("layout") == "list":
        assert row["time_over"]["bank"] > 0
    assert len(report.cells(row)) == len(report.COLUMNS)


def wrong(case: registry.Case, call) -> registry.Case:
    return replace(case, candidates=(replace(case.ours, call=call), *case.candidates[1:]))


@pytest.mark.parametrize("op", list(surgery.OPS))
@pytest.mark.parametrize("spoil", [lambda x: x * 1.01, lambda x: torch.full_like(x, torch.nan)], ids=["off", "nan"])
def test_a_wrong_result_is_not_timed(op, spoil, runner):
    case = surgery.bank_case(op, 3, 1000)
    right = case.ours.call
    row = runner.run_case(wrong(case, lambda x: spoil(right(x))))
    assert row["status"] == "failed"
    assert "wrong result" in row["error"]
    assert "times" not in row and "speedup" not in row
    assert report.cells(row)[1] == "FAILED"


def test_an_op_that_raises_gives_an_error_row(runner):
    def broken(x):
        raise RuntimeError("no such kernel")

    row = runner.run_case(wrong(surgery.bank_case("gram", 3, 1000), broken))
    assert (row["status"], row["error"]) == ("error", "RuntimeError: no such kernel")


def test_a_baseline_may_fail_be_missing_or_be_too_slow(runner):
    def broken(x):
        raise RuntimeError("not for this dtype")

    case = surgery.bank_case("pcgrad", 2, 1000)
    ours, naive, plain, _, peer, _ = case.candidates
    candidates = (
        ours,
        replace(naive, traffic=10**15),
        replace(plain, call=broken),
        replace(peer, unavailable="not installed"),
    )
    row = runner.run_case(replace(case, candidates=candidates))
    assert row["status"] == "ok"
    assert "GB" in row["times"]["naive"]["skipped"]
    assert row["times"]["plain"]["failed"] == "RuntimeError: not for this dtype"
    assert report.cells(row)[5:8] == ["skipped", "failed", "not installed"]


# --- the suite on a GPU, as far as it can be seen without one

CUDA = torch.device("cuda")


def test_gpu_cases_are_built_without_a_device():
    cases = surgery.cases(CUDA)
    assert not torch.cuda.is_initialized() or torch.cuda.is_available()
    names = [case.name for case in cases]
    assert len(names) == len(set(names))
    if torch.cuda.is_available():
        return  # what fits depends on its memory
    quick = surgery.cases(CUDA, quick=True)
    assert 10 <= len(quick) < len(cases) and {case.name for case in quick} <= set(names)
    found = {(c.op, c.params["T"], c.params["P"], c.params["dtype"]) for c in cases if c.params.get("layout") == "bank"}
    for num_tasks in surgery.TASKS:
        for num_params in surgery.GPU_SIZES:
            for dtype in ("float32", "bfloat16"):
                fits = num_tasks * num_params * (4 if dtype == "float32" else 2) <= 0.85 * 141e9
                for op in ("pcgrad", "gram+combine"):
                    assert ((op, num_tasks, num_params, dtype) in found) == fits
    assert {("pcgrad", 50, 100_000, "float32"), ("pcgrad", 50, 1_000_000, "float32")} <= found
    networks = {(c.params["network"], c.params["dtype"], c.params["tensors"]) for c in cases if "network" in c.params}
    assert networks >= {("ResNet-50", "float32", 161), ("1.2B transformer", "bfloat16", 146)}


def test_gpu_cases_have_every_candidate():
    for case in surgery.cases(CUDA):
        labels = [candidate.label for candidate in case.candidates]
        assert labels[0] == "ours" and len(labels) == len(set(labels))
        assert {"naive", "plain", "triton"} <= set(labels)
        if case.params.get("layout") == "bank":
            assert "plain_compiled" in labels
        if case.params.get("layout") == "list":
            assert "bank" in labels
        if case.op == "pcgrad":
            assert "torchjd" in labels
            assert ("given" in labels) == (case.params["P"] <= surgery.SMALL)
        # a replay is compared with replays
        assert all(c.graph for c in case.candidates if c.kind != "baseline")
        # and what waits for the host has none
        assert not any(c.graph for c in case.candidates if c.label == "naive" or c.label.startswith("torchjd"))


@pytest.mark.parametrize("op", ["gram+combine", "pcgrad"])
def test_gpu_candidates_compute_what_ours_computes(op, fresh_compiler):
    case = surgery.on_gpu(surgery.bank_case(op, 3, 9000))
    inputs = case.make(CPU)
    inputs = replace(inputs, order=inputs.given)
    expected = case.ours.call(inputs).clone()
    checked = {c.label: c for c in case.candidates if c.label in ("plain_blocked", "plain_compiled", "given")}
    assert len(checked) == 2 + (op == "pcgrad")
    for candidate in checked.values():
        torch.testing.assert_close(candidate.call(inputs), expected, rtol=1e-4, atol=1e-4)


def test_a_gpu_case_gives_a_row(runner):
    """On the CPU, where Triton is out of reach: its entry says so, and the rest of the row stands."""
    case = surgery.on_gpu(surgery.bank_case("gram+combine", 2, 1000))
    candidates = tuple(c for c in case.candidates if c.label != "plain_compiled")
    row = json.loads(json.dumps(runner.run_case(replace(case, candidates=candidates))))
    assert row["status"] == "ok", row
    triton = row["times"]["triton"]
    assert "backend 'triton' is forced" in triton.get("failed", "") or "Triton cannot be imported" in triton["skipped"]
    assert row["speedup"]["plain_blocked"] > 0 and row["params"]["backend"] in ("cuda", "triton")
    row["device"] = "cuda"
    row["times"]["ours"]["graph"] = row["times"]["ours"]
    row["times"]["triton"] = row["times"]["ours"]
    cells = dict(zip(report.columns(row), report.cells(row), strict=True))
    assert cells["by Triton"] == cells["ours"] and "(eager " in cells["ours"]
    assert cells["x one bank"] == "-" and cells["vs TorchJD"] == "-"


def test_what_compiles_is_called_once_before_the_clock_starts(runner):
    calls = []
    case = surgery.bank_case("gram", 2, 1000)
    slow = registry.Candidate("triton", lambda x: calls.append(x), "", "yardstick", builds=True)
    row = runner.run_case(replace(case, candidates=(case.ours, slow), reps=1))
    # before the clock, to warm up, the sample, and for its peak memory
    assert row["status"] == "ok" and len(calls) >= 4


def test_calls_in_a_row_share_a_sample(runner, monkeypatch):
    """All of one set of inputs: one that is not timed, then those whose mean is the sample."""
    seen, timed = [], []
    case = surgery.bank_case("gram", 2, 1000)
    again = registry.Candidate("again", seen.append, "", "yardstick", again=3)
    stop_watch = measure.seconds_per_call

    def noted(call, arguments, device):
        before = len(seen)
        took = stop_watch(call, arguments, device)
        if call is again.call:
            timed.append((before, len(seen)))
        return took

    monkeypatch.setattr(measure, "seconds_per_call", noted)
    row = runner.run_case(replace(case, candidates=(case.ours, again), memory_of=frozenset(), reps=2))
    assert row["status"] == "ok" and row["times"]["again"]["reps"] == 2
    assert timed == [(4 * k + 1, 4 * k + 4) for k in range(len(timed))] and len(seen) == 4 * len(timed) >= 8
    assert all(seen[k] is seen[k - k % 4] for k in range(len(seen)))


@pytest.mark.parametrize(
    ("shapes", "tensors", "numbers"),
    [
        (gradients.resnet18_shapes, 62, 11_689_512),
        (gradients.resnet50_shapes, 161, 25_557_032),
        (gradients.transformer_shapes, 146, 1_235_814_400),
    ],
)
def test_shapes_of_networks(shapes, tensors, numbers):
    assert len(shapes()) == tensors
    assert sum(torch.Size(shape).numel() for shape in shapes()) == numbers


@pytest.mark.parametrize("dtype", surgery.DTYPES)
def test_random_gradients_conflict_and_differ(dtype):
    bank = gradients.random_bank(4, 20_000, dtype, CPU, seed=0)
    m = reference.gram(bank.double())
    norms = m.diagonal().sqrt()
    cosines = m / (norms[:, None] * norms)
    assert cosines[0, 1] < -0.05 and cosines[0, 2] > 0.05
    assert norms.max() / norms.min() > 1.05
    assert (bank == 0).float().mean() < 1e-3


def test_oracle_reads_lists_and_banks_alike():
    inputs = surgery.list_case("gram", 3, SHAPES, "tiny").make(CPU)
    torch.testing.assert_close(gradients.oracle_gram(inputs.grads), gradients.oracle_gram(inputs.bank))


@pytest.mark.parametrize("read", [measure.allocated_by_torch, None], ids=["allocator", "peak_memory"])
def test_peak_memory_sees_a_known_allocation(read):
    # blocks that glibc maps anew even where freed memory is kept: a hole of just that size serves none (alignment)
    n = 72 << 20

    def call(count):
        a = torch.ones(count)
        b = a * 2
        del a
        return b + 1

    if read is None:
        found = measure.peak_memory(call, n, CPU)
        assert found["result_bytes"] == 4 * n
        peak = found["peak_extra_bytes"]
    else:
        peak, _ = read(call, n)
    assert abs(peak - 8 * n) < 0.05 * 8 * n


def test_interleave_takes_turns_and_survives_errors():
    taken = []

    def sampler(label):
        def sample():
            taken.append(label)
            return 1.0

        return sample

    def broken():
        raise ValueError("no")

    samples, failed = measure.interleave({"a": sampler("a"), "b": sampler("b"), "c": broken}, 1.0, reps=5)
    assert failed == {"c": "ValueError: no"}
    assert [len(x) for x in samples.values()] == [5, 5]
    assert {frozenset(taken[2 + 2 * k : 4 + 2 * k]) for k in range(5)} == {frozenset("ab")}


# --- the training step


@pytest.fixture(scope="module")
def step():
    pytest.importorskip("sklearn")
    from fastmtl.benchmarks.suites import step

    return step


WIDTHS = (8, 8)


@pytest.mark.parametrize("kind", ["training", "backward"])
def test_step_cases_give_rows(kind, step, runner):
    make = step.training_case if kind == "training" else step.backward_case
    row = json.loads(json.dumps(runner.run_case(make(2, batch_size=4, widths=WIDTHS))))
    assert row["status"] == "ok", row
    yardstick = "sum" if kind == "training" else "t_backwards"
    assert row["time_over"][yardstick] > 0
    if kind == "training":
        steps = row["extra"]["steps_trained"]
        assert len(set(steps.values())) == 1, steps
        assert set(row["extra"]["accuracy"]["ours"]) == set(digits.TASKS)
        assert row["speedup"]["naive"] > 0 and row["speedup"]["plain"] > 0


def test_step_check_refuses_a_plain_sum_and_missing_gradients(step, runner):
    case = step.training_case(1, batch_size=4, widths=WIDTHS)
    summed = next(candidate.call for candidate in case.candidates if candidate.label == "sum")
    assert runner.run_case(wrong(case, summed))["status"] == "failed"
    assert runner.run_case(wrong(case, lambda batch: None))["status"] == "failed"


@pytest.mark.parametrize("every", [1, 2])
def test_steps_that_reuse_weights_give_rows(every, step, runner):
    row = json.loads(json.dumps(runner.run_case(step.reuse_case(every, 1, batch_size=8, widths=WIDTHS))))
    assert row["status"] == "ok", row
    assert row["time_over"]["sum"] > 0 and row["params"]["every"] == every


def test_the_check_of_reused_weights_refuses_what_reuses_none_and_what_reuses_too_much(step):
    case = step.reuse_case(2, 1, batch_size=8, widths=WIDTHS)
    assert case.check(case.make(CPU), case.ours.call).passed
    for fill in (step.ours, step.plain_sum, lambda batch: None):
        assert not case.check(case.make(CPU), lambda course, fill=fill: course.run(fill)).passed

    def stale(course):
        course.classroom.trainees["check"].every = methods.Every(methods.PCGrad(), 2)
        course.run(step.reusing)

    # weights of the step before, where each step is to have its own
    asked = step.reuse_case(1, 1, batch_size=8, widths=WIDTHS)
    assert not asked.check(asked.make(CPU), stale).passed


@pytest.mark.parametrize("label", ["plain", "torchjd", "torchjd_autogram"])
def test_step_baselines_pass_the_same_check(label, step):
    case = step.training_case(1, batch_size=4, widths=WIDTHS)
    candidate = next(candidate for candidate in case.candidates if candidate.label == label)
    if candidate.unavailable:
        pytest.skip(candidate.unavailable)
    classroom = case.make(CPU)
    if label == "torchjd_autogram":
        candidate.call(classroom.batch(label))  # weights the heads too, so that the check does not apply
    else:
        assert case.check(classroom, candidate.call).passed


def test_port_reduces_shared_and_keeps_own_gradients():
    shared = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    own = torch.nn.Parameter(torch.tensor([2.0]))
    port = baselines.PortPCGrad(torch.optim.SGD([shared, own], lr=0.1), reduction="sum")
    port.pc_backward([shared[0] - shared[1] + 3 * own[0], -shared[0] * 2])
    # g_1 = (1, -1 | 3), g_2 = (-2, 0 | 0): the head counts in the norm of g_1, as in the code that people copy
    first = torch.tensor([1.0, -1.0, 3.0]) + 2 / 4 * torch.tensor([-2.0, 0.0, 0.0])
    second = torch.tensor([-2.0, 0.0, 0.0]) + 2 / 11 * torch.tensor([1.0, -1.0, 3.0])
    torch.testing.assert_close(torch.cat([shared.grad, own.grad]), first + second)


def test_pictures_are_the_same_every_time_and_split_by_digit():
    pytest.importorskip("sklearn")
    a, b = digits.Pictures(), digits.Pictures()
    x, labels = a.batch(3, 8)
    y, again = b.batch(3, 8)
    assert torch.equal(x, y) and all(torch.equal(labels[task], again[task]) for task in digits.TASKS)
    assert torch.equal(labels["left"] + labels["right"], labels["sum"])
    assert len(a.train[0]) + len(a.test[0]) == 1797
    assert all(int(labels[task].max()) < classes for task, classes in digits.TASKS.items())


# --- the command line, files and the README


@pytest.fixture(scope="module")
def written(tmp_path_factory, step):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    out = tmp_path_factory.mktemp("results")
    cases = [replace(surgery.bank_case("pcgrad", t, 500), quick=True) for t in (2, 3)]
    cases += [wrong(surgery.bank_case("gram", 2, 500, quick=True), lambda x: x.grads), step.training_case(1, 4, WIDTHS)]
    results = cli.run_cases(cases, CPU, quick=True, out=out)
    return out, results


def test_an_interrupted_run_keeps_what_it_has(tmp_path, monkeypatch, capsys):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    options = argparse.Namespace(
        suite="surgery", quick=True, out=tmp_path, device="cpu", filter="pcgrad_coefficients", list=False
    )
    names = [case.name for case in registry.collect(["surgery"], CPU, quick=True, pattern=options.filter)]
    assert len(names) > 1
    measured, run_case = [], Runner.run_case

    def one_case(self, case):
        if measured:
            raise KeyboardInterrupt
        measured.append(case.name)
        return run_case(self, case)

    monkeypatch.setattr(Runner, "run_case", one_case)
    assert cli.run(options) == 1
    (path,) = tmp_path.glob("*.json")
    assert path.stem.endswith("-interrupted")  # beside an earlier whole run, not in its place
    assert [row["case"] for row in json.loads(path.read_text())["rows"]] == measured == names[:1]
    monkeypatch.setattr(Runner, "run_case", lambda self, case: (_ for _ in ()).throw(KeyboardInterrupt()))
    capsys.readouterr()
    before = path.read_text()
    assert cli.run(options) == 1
    assert "interrupted before the first case was done: nothing is written" in capsys.readouterr().out
    assert [*tmp_path.glob("*.json")] == [path] and path.read_text() == before


def test_results_are_written(written, capsys):
    out, results = written
    (path,) = out.glob("*.json")
    assert path.stem == results["slug"]
    stored = json.loads(path.read_text())
    assert stored["machine"]["cpu"]["threads"] == torch.get_num_threads()
    assert {"commit", "date", "versions", "memory_bytes", "system"} <= set(stored["machine"])
    assert stored["machine"]["versions"]["torch"] == torch.__version__
    assert [row["status"] for row in stored["rows"]] == ["ok", "ok", "error", "ok"]
    assert {p.name.removeprefix(f"{path.stem}-") for p in out.glob("*.png")} == {
        "floor.png",
        "speedup.png",
        "step.png",
    }
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in out.glob("*.png"))


def run_of(suite: str, *cases: str, commit: str = "c0", date: str = "2026-01-01") -> dict:
    """Results of a run of one suite, as `run_cases` makes them."""
    machine = {"device": "chip", "date": date, "commit": commit, "versions": {"torch": "2"}, "system": "s"}
    rows = [{"suite": suite, "case": case, "op": "x", "params": {}, "status": "ok", "took_s": 1.5} for case in cases]
    suites = report.suite_runs(rows, machine, {"quick": False})
    return {"schema": 2, "slug": "chip", "machine": machine, "suites": suites, "rows": rows}


def test_a_suite_that_runs_again_replaces_its_own_rows_only(tmp_path):
    def stored():
        return json.loads((tmp_path / "chip.json").read_text())

    def names():
        return [(row["suite"], row["case"]) for row in stored()["rows"]]

    report.write(run_of("surgery", "a", "b"), tmp_path)
    report.write(run_of("conv", "a", commit="c1", date="2026-02-02"), tmp_path)
    assert names() == [("surgery", "a"), ("surgery", "b"), ("conv", "a")]
    # each suite says where its rows are from
    assert {suite: run["commit"] for suite, run in stored()["suites"].items()} == {"surgery": "c0", "conv": "c1"}
    assert stored()["suites"]["surgery"]["took_s"] == 3.0
    assert stored()["machine"]["date"] == "2026-02-02"
    report.write(run_of("surgery", "b", commit="c2"), tmp_path)
    assert names() == [("surgery", "b"), ("conv", "a")]
    assert {suite: run["commit"] for suite, run in stored()["suites"].items()} == {"surgery": "c2", "conv": "c1"}
    assert [path.name for path in tmp_path.iterdir()] == ["chip.json"]


def test_a_file_of_the_older_version_is_kept(tmp_path):
    old = run_of("surgery", "a")
    del old["suites"]
    path = tmp_path / "chip.json"
    path.write_text(json.dumps(old | {"schema": 1, "settings": {"quick": True}, "took_s": 9.0}))
    report.write(run_of("conv", "b", commit="c1"), tmp_path)
    results = report.read(path)
    assert results["schema"] == 2 and len(results["rows"]) == 2
    assert results["suites"]["surgery"]["settings"] == {"quick": True}
    assert results["suites"]["surgery"]["commit"] == "c0"
    for suite, commit in (("surgery", "c0"), ("conv", "c1")):
        assert f"Measured on 2026-01-01, commit {commit}" in report.section(results | {"rows": []}, suite)


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": []}'], ids=["broken", "list", "no machine"])
def test_a_file_that_is_not_of_results_is_refused_before_the_run(text, tmp_path, capsys):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    path = tmp_path / f"{cli.slug(cli.describe(CPU))}.json"
    path.write_text(text)
    case = ["--suite", "surgery", "--quick", "--filter", "coefficients T=8", "--device", "cpu"]
    assert bench(*case, "--out", str(tmp_path)) == 2
    assert "not a file of results" in capsys.readouterr().err
    assert path.read_text() == text


def test_docs_are_what_the_command_draws_from_the_committed_results():
    for path, text in report.texts(ROOT).items():
        assert path.read_text() == text, f"{path.relative_to(ROOT)} is not drawn anew: make docs-tables"
    for text in (path.read_text() for path in (ROOT / "docs/benchmarks").glob("*.md")):
        assert "not measured" not in text


def test_no_row_of_the_readme_is_without_a_time():
    table = (ROOT / "README.md").read_text().split(report.BEGIN)[1].split(report.END)[0].strip().splitlines()
    assert len(table) == 2 + 5
    assert not any(word in line for line in table for word in ("FAILED", "ERROR", "not measured", "skipped"))
    assert any("(slower)" in line for line in table)


def test_the_command_writes_readme_and_pages(written, tmp_path, monkeypatch):
    out, results = written
    folder = tmp_path / "benchmarks/results"
    shutil.copytree(out, folder)
    readme = tmp_path / "README.md"
    readme.write_text(f"# before\n{report.BEGIN}\nold figures\n{report.END}\nafter\n")
    monkeypatch.setattr(report, "README_CASES", {"pcgrad T=2 P=0.5k float32": "in words"})
    command = ["--root", str(tmp_path)]
    assert report.main(command) == 0
    once = readme.read_text()
    assert once.startswith("# before\n") and once.endswith(f"{report.END}\nafter\n")
    assert "old figures" not in once and once.count("| in words |") == 1
    page = (tmp_path / "docs/benchmarks/surgery.md").read_text()
    assert page.count("| pcgrad T=2 P=0.5k float32 |") == 1
    assert f"(../../benchmarks/results/{results['slug']}-floor.png)" in page
    # a second time changes nothing
    assert report.main([*command, "--no-plots"]) == 0
    assert readme.read_text() == once and (tmp_path / "docs/benchmarks/surgery.md").read_text() == page


def test_the_newest_results_come_first(tmp_path):
    with pytest.raises(ValueError, match="no results"):
        report.newest_first(tmp_path)
    for stem, date in (("a", "2026-01-01"), ("b", "2026-03-01")):
        (tmp_path / f"{stem}.json").write_text(json.dumps(run_of("surgery", stem, date=date)))
    assert [run["machine"]["date"] for run in report.newest_first(tmp_path)] == ["2026-03-01", "2026-01-01"]


def test_readme_without_markers_is_left_alone(written, tmp_path, capsys, monkeypatch):
    out, _ = written
    shutil.copytree(out, tmp_path / "benchmarks/results")
    readme = tmp_path / "README.md"
    readme.write_text("# no markers\n")
    monkeypatch.setattr(report, "README_CASES", {"pcgrad T=2 P=0.5k float32": "in words"})
    assert report.main(["--root", str(tmp_path), "--no-plots"]) == 1
    assert report.BEGIN in capsys.readouterr().err
    assert readme.read_text() == "# no markers\n" and not (tmp_path / "docs").exists()


def bench(*arguments: str) -> int:
    from fastmtl.__main__ import main

    return main(["bench", *arguments])


def test_command_line_lists_cases(capsys):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    assert bench("--suite", "surgery", "--quick", "--list", "--filter", "coefficients") == 0
    assert capsys.readouterr().out.split("\n")[:2] == [f"surgery/pcgrad_coefficients T={t}" for t in (8, 64)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--suite", "speed"], "got 'speed'"), (["--suite", "surgery", "--filter", "nothing"], "no case")],
)
def test_command_line_refuses(arguments, message, capsys):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    assert bench(*arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("module", "suite"), [("rich", "surgery"), ("matplotlib", "surgery"), ("sklearn", "step")])
def test_missing_extras_are_named(module, suite, monkeypatch, capsys):
    find = cli.importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == module else find(name))
    assert bench("--suite", suite, "--quick") == 2
    error = capsys.readouterr().err
    assert 'pip install "torch-fastmtl[bench]"' in error
    assert {"sklearn": "scikit-learn"}.get(module, module) in error


def test_importing_the_command_line_needs_no_extra(monkeypatch):
    for module in ("rich", "matplotlib", "sklearn", "torchjd"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(
        sys, "modules", {k: v for k, v in sys.modules.items() if not k.startswith("fastmtl.benchmarks")}
    )
