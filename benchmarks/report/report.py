"""Results: the file, the table, the plots, and the section of the README drawn from the file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastmtl.benchmarks.report import plots
from fastmtl.benchmarks.runner.registry import TASK_STEP
from fastmtl.benchmarks.suites import step_tasks

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
COLUMNS = (
    "case",
    "ours",
    "x floor",
    "x 2 reads",
    "in new memory",
    "vs naive",
    "vs best plain torch",
    "vs TorchJD",
    "peak extra memory",
)
GPU_COLUMNS = (
    "case",
    "ours",
    "x floor",
    "x 2 reads",
    "by Triton",
    "x one bank",
    "vs naive",
    "vs best plain torch",
    "vs TorchJD",
    "peak extra memory",
)
CONV_COLUMNS = (
    "case",
    "ours",
    "x floor",
    "x shared",
    "vs fair loop",
    "vs stacked loop",
    "vs best other",
    "extra memory (weights)",
)
TASK_COLUMNS = (
    "case",
    "one_pass",
    "x plain step",
    "vs forward and backward per task",
    "vs T backwards",
    "vs TorchJD",
    "memory over a plain step (x bank)",
    "streamed x plain step",
    "streamed memory x plain step's",
)
# of a row of suite `conv`: what is neither loop
OTHERS = ("grouped", "vmap", "groupedmm", "adapter", "plain")
# what tells runs of different suites in one file apart
RUN = ("commit", "uncommitted_changes", "date", "versions", "system")


def seconds(value: float | None) -> str:
    if value is None:
        return "-"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale or unit == "us":
            return f"{value / scale:.3g} {unit}"
    return "-"


def mebibytes(value: float) -> str:
    return f"{value / 2**20:.3g} MiB"


def _over(row: dict[str, Any], name: str) -> str:
    ratio = row.get("time_over", {}).get(name)
    return "-" if ratio is None else f"{ratio:.2f}"


def _in_new_memory(row: dict[str, Any]) -> str:
    """Over two reads, where the result goes into memory that has never been touched."""
    over = row.get("time_over", {})
    return f"{over['two_reads'] / over['fresh']:.2f}" if "two_reads" in over and "fresh" in over else "-"


def _times_faster(ratio: float) -> str:
    return f"{ratio:.3g}x" if ratio < 1000 else f"{ratio:.0f}x"


def _reason(entry: dict[str, Any]) -> str:
    """Why it has no time."""
    reason = entry.get("skipped", "failed")
    return reason if reason in ("failed", "not installed") else "skipped"


def _versus(row: dict[str, Any], family: str) -> str:
    ratio = row.get("speedup_over_best", {}).get(family)
    if ratio is not None:
        return _times_faster(ratio)
    for label, entry in row.get("times", {}).items():
        if label.split("_")[0] == family:
            return _reason(entry)
    return "-"


def _fastest(row: dict[str, Any], labels: Sequence[str]) -> str:
    """Against the fastest of these."""
    ratios = [row["speedup"][label] for label in labels if label in row["speedup"]]
    if ratios:
        return _times_faster(min(ratios))
    return next((_reason(row["times"][label]) for label in labels if label in row["times"]), "-")


def _best_other(row: dict[str, Any]) -> str:
    """Against the fastest of what is neither loop, and which that is."""
    ratios = {family: row["speedup_over_best"][family] for family in OTHERS if family in row["speedup_over_best"]}
    if not ratios:
        return next((text for text in (_versus(row, family) for family in OTHERS) if text != "-"), "-")
    family = min(ratios, key=lambda name: ratios[name])
    return f"{_versus(row, family)} ({family})"


def _extra_memory(row: dict[str, Any]) -> str:
    """Peak memory of a call beyond what it returns, and how many weights of the layer that is."""
    memory, weight = row.get("memory", {}).get("ours"), row["params"].get("weight_bytes")
    if memory is None:
        return "-"
    extra = max(memory["peak_extra_bytes"] - memory["result_bytes"], 0)
    return f"{mebibytes(extra)} ({extra / weight:.1f})" if weight else mebibytes(extra)


def _peak(memory: dict[str, Any]) -> int:
    """Bytes by torch's allocator where they were counted, which is exact; else the growth of the resident set."""
    return memory.get("allocated_bytes", memory["peak_extra_bytes"])


def _task_cells(row: dict[str, Any]) -> list[str]:
    """Of a step in which every sample has one task: time and memory beside those of a plain step."""
    memory = row.get("memory", {})
    over = streamed_memory = "-"
    if "ours" in memory and "sum" in memory:
        p = row["params"]
        bank = p["T"] * p["P"] * getattr(torch, p["dtype"]).itemsize
        extra = _peak(memory["ours"]) - _peak(memory["sum"])
        over = f"{mebibytes(extra)} ({extra / bank:.2f})"
    if "streamed" in memory and "sum" in memory:
        streamed_memory = f"{_peak(memory['streamed']) / _peak(memory['sum']):.2f}"
    medians = {label: entry["median"] for label, entry in row["times"].items() if "median" in entry}
    streamed = f"{medians['streamed'] / medians['sum']:.2f}" if {"streamed", "sum"} <= set(medians) else "-"
    if streamed == "-" and "failed" in row["times"].get("streamed", {}):
        streamed = "failed"
    return [
        _time(row["times"]["ours"]),
        _over(row, "sum"),
        _versus(row, "per"),
        _fastest(row, ("t_backwards", "backward")),
        _versus(row, "torchjd"),
        over,
        streamed,
        streamed_memory,
    ]


def columns(row: dict[str, Any]) -> tuple[str, ...]:
    """The header of the table that a row stands in."""
    if row["op"] == TASK_STEP:
        return TASK_COLUMNS
    if row["suite"] == "conv":
        return CONV_COLUMNS
    return GPU_COLUMNS if _on_gpu(row) else COLUMNS


def _on_gpu(row: dict[str, Any]) -> bool:
    return row["suite"] == "surgery" and row["device"] == "cuda"


def _time(entry: dict[str, Any]) -> str:
    """Median time, of graph replays where there are any, with the eager one beside it."""
    if "median" not in entry:
        return entry.get("skipped", "failed")
    time = seconds(entry["median"])
    return f"{seconds(entry['graph']['median'])} (eager {time})" if "graph" in entry else time


def _name(case: str, device: str) -> str:
    return case if device == "cpu" else f"{case} ({device})"


def cells(row: dict[str, Any]) -> list[str]:
    """One line of the table, by `columns(row)`."""
    name = _name(row["case"], row["device"])
    if row["status"] != "ok":
        return [name, row["status"].upper(), *["-"] * (len(columns(row)) - 2)]
    if row["op"] == TASK_STEP:
        return [name, *_task_cells(row)]
    time = _time(row["times"]["ours"])
    if row["suite"] == "conv":
        return [
            name,
            time,
            _over(row, "floor"),
            _over(row, "shared"),
            _versus(row, "loop"),
            _versus(row, "stacked"),
            _best_other(row),
            _extra_memory(row),
        ]
    floor = _over(row, "floor")
    for label, text in (("t_backwards", "of T passes"), ("sum", "of a plain step")):
        if label in row["time_over"]:
            floor = f"{row['time_over'][label]:.3f} {text}"
    memory = row.get("memory", {}).get("ours")
    common = [
        *(_versus(row, family) for family in ("naive", "plain", "torchjd")),
        mebibytes(memory["peak_extra_bytes"]) if memory else "-",
    ]
    if _on_gpu(row):
        triton = _time(row["times"]["triton"]) if "triton" in row["times"] else "-"
        return [name, time, floor, _over(row, "two_reads"), triton, _over(row, "bank"), *common]
    return [name, time, floor, _over(row, "two_reads"), _in_new_memory(row), *common]


def _by_table(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    tables: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        tables.setdefault(columns(row), []).append(row)
    return tables


def print_table(results: dict[str, Any], console: Any) -> None:
    """A rich table of all rows of the same kind, and accuracy by method where networks were trained."""
    from rich.table import Table

    for header, rows in _by_table(results["rows"]).items():
        table = Table(title=results["machine"]["device"], title_justify="left")
        for k, column in enumerate(header):
            table.add_column(column, justify="left" if k == 0 else "right", no_wrap=k == 0)
        for row in rows:
            style = {"failed": "red", "error": "red"}.get(row["status"])
            table.add_row(*cells(row), style=style)
        console.print(table)
    for row in results["rows"]:
        if row["status"] != "ok":
            console.print(f"{row['case']}: {row['error']}", style="red", markup=False)
    for row in results["rows"]:
        if "accuracy" in row.get("extra", {}):
            console.print(_accuracy_table(row))


def _accuracy_lines(row: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    accuracy = row["extra"]["accuracy"]
    tasks = list(accuracy["ours"])
    lines = []
    for label, entry in row["times"].items():
        memory = row.get("memory", {}).get(label)
        shares = [f"{accuracy[label][task]:.1%}" for task in tasks] if label in accuracy else ["-"] * len(tasks)
        peak = mebibytes(memory["peak_extra_bytes"]) if memory else "-"
        lines.append([label, seconds(entry.get("median")), *shares, peak])
    return ["method", "time per step", *tasks, "peak memory of a step"], lines


def _accuracy_table(row: dict[str, Any]) -> Any:
    from rich.table import Table

    header, lines = _accuracy_lines(row)
    table = Table(title=f"{row['case']}: {row['extra']['steps_trained']['ours']} steps", title_justify="left")
    for k, column in enumerate(header):
        table.add_column(column, justify="left" if k == 0 else "right")
    for line in lines:
        table.add_row(*line)
    return table


# --- the file


def suite_runs(rows: Sequence[dict[str, Any]], machine: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Suite -> commit, date, versions, settings and seconds of the run that its rows are from."""
    return {
        suite: {
            **{key: machine.get(key) for key in RUN},
            "settings": settings,
            "took_s": sum(row.get("took_s", 0.0) for row in rows if row["suite"] == suite),
        }
        for suite in dict.fromkeys(row["suite"] for row in rows)
    }


def read(path: Path) -> dict[str, Any]:
    """A results file; one of an older version, whose rows are all of one run, as this version has it.

    Raises:
        ValueError: it is not a results file.
    """
    try:
        results = json.loads(path.read_text())
        if "suites" not in results:
            results["suites"] = suite_runs(results["rows"], results["machine"], results.pop("settings", {}))
            results.pop("took_s", None)
        return results | {"schema": 2}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not a file of results ({type(error).__name__}: {error})") from error


def file_of(results_slug: str, out: Path) -> Path:
    return out / f"{results_slug}.json"


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The new results, and of the old ones the suites that did not run again: a suite's rows are all of one run."""
    suites = {**old["suites"], **new["suites"]}
    rows = [row for row in old["rows"] if row["suite"] not in new["suites"]] + new["rows"]
    place = list(suites)
    return {**new, "suites": suites, "rows": sorted(rows, key=lambda row: place.index(row["suite"]))}


def write(results: dict[str, Any], out: Path) -> tuple[Path, list[Path]]:
    """Writes `<out>/<slug>.json`, in which it keeps the suites that did not run, and the plots; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    path = file_of(results["slug"], out)
    if path.exists():
        results = merged(read(path), results)
    # whole or not at all: the file holds figures of other runs
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    part.replace(path)
    return path, plots.draw(results, out)


# --- the README


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    table = [list(header), ["---", *["---:"] * (len(header) - 1)], *map(list, lines)]
    return "\n".join("| " + " | ".join(line) + " |" for line in table)


def _run_text(run: dict[str, Any]) -> str:
    versions = run["versions"]
    peer = f", TorchJD {versions['torchjd']}" if versions.get("torchjd") else ""
    commit = (run["commit"] or "unknown")[:10] + (" with local changes" if run["uncommitted_changes"] else "")
    return f"{run['date'][:10]}, commit {commit}, torch {versions['torch']}{peer}"


def _when(results: dict[str, Any]) -> str:
    """Date, commit and versions: once if all suites share them, else by suite."""
    by_text: dict[str, list[str]] = {}
    for suite, run in results["suites"].items():
        by_text.setdefault(_run_text(run), []).append(suite)
    if len(by_text) == 1:
        return next(iter(by_text))
    return "; ".join(f"{', '.join(suites)}: {text}" for text, suites in by_text.items())


def _task_lines(device: str, runs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The headline rows of steps with one task per sample on a kind of device; without a run: which would be there."""
    for results in runs:
        rows = [row for row in results["rows"] if row["op"] == TASK_STEP and row["device"] == device]
        if rows:
            return [cells(row) for row in rows if row["headline"]]
    names = [_name(case.name, device) for case in step_tasks.cases(torch.device(device)) if case.headline]
    return [[name, *["not measured"] * (len(TASK_COLUMNS) - 1)] for name in names]


def readme_section(results: dict[str, Any], images: Sequence[str], others: Sequence[dict[str, Any]] = ()) -> str:
    """The text between the markers: machine, headline rows, accuracy, plots.

    Args:
        results: what the section is drawn from.
        images: paths of its plots; that of the steps with one task per sample stands first.
        others: results for the rows of those steps on devices on which `results` has none.
    """
    pictures = [f"![{Path(image).stem}]({image})" for image in images]
    first = [text for text, image in zip(pictures, images, strict=True) if plots.is_tasks(image)]
    parts = [
        *first,
        f"Measured on {results['machine']['device']} ({_when(results)}); "
        f"medians; floor: the bytes that must move, at the copy rate of the same run.",
        "Training steps in which every sample has one task, PCGrad over T tasks (forward, gradients, SGD with "
        "momentum; the same batch and update for all candidates):",
        _markdown(
            TASK_COLUMNS, [line for device in ("cpu", "cuda") for line in _task_lines(device, [results, *others])]
        ),
    ]
    # that these rows are of another run than the rest must be seen
    parts += [
        f"Here {' and '.join(sorted(_kinds(run)))}: {run['machine']['device']} ({_run_text(run['suites']['step'])})."
        for run in others
    ]
    rows = [row for row in results["rows"] if row["headline"] and row["op"] != TASK_STEP]
    for header, lines in _by_table(rows).items():
        if header == CONV_COLUMNS:
            parts.append(
                "Per-task weights; floor: one shared layer in the same run, and the bytes of the deltas in use (one "
                "read forward, two reads and one write with the backward pass) at the copy rate:"
            )
        else:
            parts.append("Gradient surgery, and steps of several losses on the same samples:")
        parts.append(_markdown(header, [cells(row) for row in lines]))
    for row in results["rows"]:
        if "accuracy" in row.get("extra", {}):
            header, accuracy = _accuracy_lines(row)
            parts.append(f"Four tasks on overlaid digits after {row['extra']['steps_trained']['ours']} steps:")
            parts.append(_markdown(header, accuracy))
    parts += [text for text in pictures if text not in first]
    return "\n\n".join(parts)


def newest_results(folder: Path) -> Path:
    """The results file with the latest date in it (a checkout does not keep the times of files).

    Raises:
        ValueError: there is none.
    """
    dates = {path: json.loads(path.read_text())["machine"]["date"] for path in sorted(folder.glob("*.json"))}
    if not dates:
        raise ValueError(f"{folder}: no results; run `fastmtl bench --out {folder}`")
    return max(dates, key=lambda path: dates[path])


def _kinds(results: dict[str, Any]) -> set[str]:
    """The kinds of devices on which steps with one task per sample ran."""
    return {row["device"] for row in results["rows"] if row["op"] == TASK_STEP}


def with_other_steps(results: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """Of the files beside a results file: for each kind of device on which it has no steps with one task per sample,
    the newest that has some."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(path.parent.glob("*.json")):
        if file.resolve() == path.resolve():
            continue
        other = read(file)
        for kind in _kinds(other) - _kinds(results):
            if kind not in found or other["machine"]["date"] > found[kind]["machine"]["date"]:
                found[kind] = other
    return list(found.values())


def rewrite_readme(readme: Path, results_path: Path) -> None:
    """Replaces what stands between the markers in `readme`, and draws the plots beside the results.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    text = readme.read_text()
    begin, end = text.find(BEGIN), text.find(END)
    if text.count(BEGIN) != 1 or text.count(END) != 1 or end < begin:
        raise ValueError(f"{readme}: expected one {BEGIN} and after it one {END}")
    results = read(results_path)
    others = with_other_steps(results, results_path)
    drawn = plots.draw(results, results_path.parent)
    drawn += [path for other in others for path in plots.draw(other, results_path.parent) if plots.is_tasks(path.name)]
    root = readme.resolve().parent
    images = [plots.relative(path.resolve(), root) for path in drawn]
    section = readme_section(results, images, others)
    readme.write_text(f"{text[: begin + len(BEGIN)]}\n\n{section}\n\n{text[end:]}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastmtl.benchmarks.report.report",
        description="Draws the README's table and plots from results.",
    )
    parser.add_argument(
        "--results", type=Path, help="a file that `fastmtl bench` wrote (default: the newest in benchmarks/results)"
    )
    parser.add_argument("--readme", type=Path, default=Path("README.md"), help="file with the markers (README.md)")
    options = parser.parse_args(argv)
    try:
        rewrite_readme(options.readme, options.results or newest_results(options.readme.parent / "benchmarks/results"))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
