"""Results: the file, the table, the plots, and the README's table and the pages drawn from the files."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastmtl.benchmarks.report import choice_table, cost_table, plots, reuse_table
from fastmtl.benchmarks.runner.registry import (
    FIRST_STEP,
    FOLLOWED,
    REUSE,
    REUSE_ACCURACY,
    TAPS_MEMORY,
    TASK_STEP,
    WHOLE_CALL,
)

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
    "chosen",
    "extra memory (weights)",
)
TASK_COLUMNS = (
    "case",
    "one_pass",
    "x plain step",
    "with sort=True",
    "vs forward and backward per task",
    "vs T backwards",
    "vs TorchJD",
    "memory over a plain step (x bank)",
    "streamed x plain step",
    "streamed memory x plain step's",
)
WEIGHTS_COLUMNS = (
    "case",
    "ours",
    "in a row",
    "vs plain torch",
    "vs TorchJD",
    "TorchJD is off by",
    "vs LibMTL",
    "LibMTL is off by",
)
CALL_COLUMNS = (*(column for column in WEIGHTS_COLUMNS if column != "in a row"), "peak extra memory")
MODEL_COLUMNS = (
    "case",
    "ours",
    "x plain network",
    "vs loop over tasks",
    "vs T plain networks",
    "vs adapter loop",
    "memory x plain network's",
)
TAPS_COLUMNS = (
    "case",
    "full joint",
    "sequential, one task",
    "plain network",
    "T plain networks",
    "full joint x sequential",
)
FOLLOWED_COLUMNS = ("case", "a call inside one_pass", "outside", "following it", "of which torch's own mode")
FIRST_COLUMNS = ("case", "first step", "plain step", "x plain step")
REUSE_COLUMNS = ("case", "time per step", "plain step", "x plain step")
# of a row of suite `conv`: what is neither loop
OTHERS = ("grouped", "vmap", "groupedmm", "adapter", "masked", "gathered", "plain")
# suite -> its page in docs/benchmarks, its title, its plots
PAGES = {
    "surgery": ("surgery.md", "Gradient surgery", ("floor", "speedup")),
    "step": ("step.md", "Training steps", (plots.TASKS, "step")),
    "conv": ("task-weights.md", "Per-task weights", ("conv",)),
    "methods": ("methods.md", "Methods", ("methods", "calls")),
    "models": ("models.md", "Converted networks", ("models",)),
}
README_COLUMNS = ("what", "on", "fastmtl", "the fastest way without it", "fastmtl is")
# the README's rows, in words; where fastmtl is slower is shown too
README_CASES = {
    "pcgrad T=8 P=11M float32": "PCGrad of 8 gradients of 11M numbers",
    "small ViT T=16 shuffled": "step of a small ViT, 16 tasks, `one_pass`",
    "half-width ResNet-18 64x64 T=8 shuffled": "step of a ResNet-18, 64x64, 8 tasks, `one_pass`",
    "ResNet-18 layer1 fwd+bwd T=8 B=32 float32 unsorted": "3x3 convolution of 8 tasks, mixed batch",
    "ResNet-50 layer3 1x1 in fwd+bwd T=8 B=32 float32 sorted": "1x1 convolution of 8 tasks, sorted batch",
}
# candidates that are fastmtl too
OF_FASTMTL = ("per_task_bank", "backward", "streamed", "sorting")
OTHER_WORDS = {
    "per_task": "forward and backward per task",
    "loop": "loop over tasks",
    "loop_permuted": "loop over tasks, permuted batch",
    "plain_blocked": "plain torch, in blocks",
}
# packages whose versions a page tells
PEERS = {"torchjd": "TorchJD", "LibMTL": "LibMTL"}
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
    return [
        _time(row["times"]["ours"]),
        _over(row, "sum"),
        _over_plain_step(row, "sorting"),
        _versus(row, "per"),
        _fastest(row, ("t_backwards", "backward")),
        _versus(row, "torchjd"),
        over,
        _over_plain_step(row, "streamed"),
        streamed_memory,
    ]


def _over_plain_step(row: dict[str, Any], label: str) -> str:
    medians = {x: entry["median"] for x, entry in row["times"].items() if "median" in entry}
    if {label, "sum"} <= set(medians):
        return f"{medians[label] / medians['sum']:.2f}"
    return "failed" if "failed" in row["times"].get(label, {}) else "-"


def _followed_cells(row: dict[str, Any]) -> list[str]:
    """Of a call: inside the block less the block itself, outside it, what is left, and how much of that is torch."""
    times = {label: entry["median"] / row["params"]["calls"] for label, entry in row["times"].items()}
    inside = times["ours"] - times["block"]
    mode = seconds(times["mode"] - times["plain"]) if "mode" in times else "-"
    return [seconds(inside), seconds(times["plain"]), seconds(inside - times["plain"]), mode]


def _model_cells(row: dict[str, Any]) -> list[str]:
    """Of a converted network: its time beside the others', and the memory of a call beside a plain network's."""
    memory = row.get("memory", {})
    over = f"{_peak(memory['ours']) / _peak(memory['plain']):.2f}" if {"ours", "plain"} <= set(memory) else "-"
    others = [_versus(row, label) for label in ("loop", "separate", "adapter")]
    return [_time(row["times"]["ours"]), _over(row, "plain"), *others, over]


def _taps_cells(row: dict[str, Any]) -> list[str]:
    """Of the variants of TAPS: all the memory that a training holds."""
    peaks = {label: _peak(memory) for label, memory in row.get("memory", {}).items()}
    found = [mebibytes(peaks[x]) if x in peaks else "-" for x in ("ours", "sequential", "plain", "separate")]
    ratio = f"{peaks['ours'] / peaks['sequential']:.2f}" if {"ours", "sequential"} <= set(peaks) else "-"
    return [*found, ratio]


def _off_by(row: dict[str, Any], label: str) -> str:
    """How far the update of a peer is from ours, over its length."""
    found = row.get("check", {}).get("others", {}).get(label)
    return "-" if found is None else f"{found['error']:.0e}"


def _method_cells(row: dict[str, Any]) -> list[str]:
    """Of a method's weights, or of its whole call: beside plain torch and each peer, and how far off the peer is."""
    found = [_versus(row, "plain")]
    for label in ("torchjd", "libmtl"):
        found += [_versus(row, label), _off_by(row, label)]
    time = _time(row["times"]["ours"])
    if columns(row) == WEIGHTS_COLUMNS:
        again = row["times"].get("again", {})
        return [time, seconds(again["median"]) if "median" in again else "-", *found]
    memory = row.get("memory", {}).get("ours")
    return [time, *found, mebibytes(memory["peak_extra_bytes"]) if memory else "-"]


def _peer_reasons(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Why peers have no time, each reason once with the cases that it holds for."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for label in ("torchjd", "libmtl"):
            entry = row.get("times", {}).get(label, {})
            reason = entry.get("skipped") or entry.get("failed")
            if reason is not None and reason != "not installed":
                found.setdefault((entry["detail"].split(",")[0], reason), []).append(f"`{row['case']}`")
    return [f"{detail} {reason} ({', '.join(cases)})." for (detail, reason), cases in found.items()]


def columns(row: dict[str, Any]) -> tuple[str, ...]:
    """The header of the table that a row stands in."""
    if row["op"] == TASK_STEP:
        return TASK_COLUMNS
    if row["op"] in (REUSE, REUSE_ACCURACY):
        return REUSE_COLUMNS
    if row["op"] in (FOLLOWED, FIRST_STEP):
        return FOLLOWED_COLUMNS if row["op"] == FOLLOWED else FIRST_COLUMNS
    if row["suite"] == "methods" and row["op"].endswith(WHOLE_CALL):
        return CALL_COLUMNS
    if row["suite"] == "methods" and "P" not in row["params"]:
        return WEIGHTS_COLUMNS
    if row["suite"] == "conv":
        return CONV_COLUMNS
    if row["suite"] == "models":
        return TAPS_COLUMNS if row["op"] == TAPS_MEMORY else MODEL_COLUMNS
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
        # of a row that failed by its choice of a way the times are right, and kept in the file
        return [name, row["status"].upper(), *["-"] * (len(columns(row)) - 2)]
    if row["op"] == TASK_STEP:
        return [name, *_task_cells(row)]
    if columns(row) == FOLLOWED_COLUMNS:
        return [name, *_followed_cells(row)]
    if columns(row) == FIRST_COLUMNS:
        return [name, _time(row["times"]["ours"]), _time(row["times"]["sum"]), _over(row, "sum")]
    if columns(row) == REUSE_COLUMNS:
        steps = row["params"]["steps"]
        per_step = [seconds(row["times"][label]["median"] / steps) for label in ("ours", "sum")]
        return [name, *per_step, _over(row, "sum")]
    if columns(row) in (WEIGHTS_COLUMNS, CALL_COLUMNS):
        return [name, *_method_cells(row)]
    if row["suite"] == "models":
        return [name, *(_taps_cells(row) if row["op"] == TAPS_MEMORY else _model_cells(row))]
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
            row.get("extra", {}).get("chosen", "-"),
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
    if trained := reuse_table.rows_of(results):
        title = f"accuracy after {trained[0]['params']['steps']} steps, {trained[0]['params']['seeds']} seeds"
        console.print(_rich_table(title, *reuse_table.table(trained)))


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


def _rich_table(title: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for k, column in enumerate(header):
        table.add_column(column, justify="left" if k == 0 else "right")
    for line in lines:
        table.add_row(*line)
    return table


def _accuracy_table(row: dict[str, Any]) -> Any:
    return _rich_table(f"{row['case']}: {row['extra']['steps_trained']['ours']} steps", *_accuracy_lines(row))


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


# --- the README and the pages of docs/benchmarks


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    table = [list(header), ["---", *["---:"] * (len(header) - 1)], *map(list, lines)]
    return "\n".join("| " + " | ".join(line) + " |" for line in table)


def _run_text(run: dict[str, Any]) -> str:
    versions = run["versions"]
    peer = "".join(f", {name} {versions[key]}" for key, name in PEERS.items() if versions.get(key))
    commit = (run["commit"] or "unknown")[:10] + (" with local changes" if run["uncommitted_changes"] else "")
    return f"{run['date'][:10]}, commit {commit}, torch {versions['torch']}{peer}"


def _note(header: tuple[str, ...], suite: str) -> str:
    """What stands above a table."""
    if header == REUSE_COLUMNS:
        return (
            "Steps that reuse the weights of an earlier one (`methods.Every`), several losses on the same samples; a "
            "row on accuracy is of its longest reuse, over whole trainings:"
        )
    if header == WEIGHTS_COLUMNS:
        return (
            "Weights of a `[T, T]` matrix. All candidates find the caches full of other data, as a step of a training "
            'loop leaves them; "in a row" is ours called again and again. What a peer is off by is the distance of its '
            "update from ours, over the length of ours; MGDA stops before it has arrived:"
        )
    if header == CALL_COLUMNS:
        return "The whole of `method(grads)`, on float32 gradients `[T, P]`:"
    if suite == "methods":
        return "Passes over the gradients, element by element:"
    if header == FOLLOWED_COLUMNS:
        return "What following a call costs, on tensors so small that all is time of the host (medians, per call):"
    if header == FIRST_COLUMNS:
        return "A step for which `one_pass` knows nothing of the model yet, T = 8:"
    if header == TASK_COLUMNS:
        return (
            "Training steps in which every sample has one task, PCGrad over T tasks (forward, gradients, SGD with "
            "momentum; the same batch and update for all candidates):"
        )
    if header == CONV_COLUMNS:
        return (
            "Per-task weights. The floor is one shared layer in the same run, and the bytes of the deltas in use (one "
            "read forward, two reads and one write with the backward pass) at the copy rate:"
        )
    if header == MODEL_COLUMNS:
        return (
            "Converted networks on a batch that mixes tasks: training steps (forward, backward, SGD with momentum) and "
            "forward passes in evaluation mode:"
        )
    if header == TAPS_COLUMNS:
        return (
            "All that a training of TAPS holds, by its variants: weights, gradients, momentum and activations (the "
            "memory-efficient joint variant trains the plain network, then runs the sequential one):"
        )
    return "Gradient surgery, and steps of several losses on the same samples:"


def section(results: dict[str, Any], suite: str, images: Sequence[str] = ()) -> str:
    """What one run of a suite measured: device and versions, every row, accuracy, plots.

    Args:
        results: a results file, as `read` returns it.
        suite: whose rows.
        images: paths of its plots, as the page names them.
    """
    rows = [row for row in results["rows"] if row["suite"] == suite]
    parts = [
        f"## {results['machine']['device']}",
        f"Measured on {_run_text(results['suites'][suite])}. Times are medians; the floor is the bytes that must "
        "move, at the copy rate of the same run.",
        *(f"![{Path(image).stem}]({image})" for image in images),
    ]
    for header, lines in _by_table(rows).items():
        parts += [_note(header, suite), _markdown(header, [cells(row) for row in lines])]
    if suite == "methods":
        parts += _peer_reasons(rows)
    parts += [f"`{row['case']}`: {row['error']}" for row in rows if row["status"] != "ok" and row.get("error")]
    for row in rows:
        if "accuracy" in row.get("extra", {}):
            header, accuracy = _accuracy_lines(row)
            parts.append(f"Four tasks on overlaid digits after {row['extra']['steps_trained']['ours']} steps:")
            parts.append(_markdown(header, accuracy))
    if suite == "step" and (trained := reuse_table.rows_of(results)):
        parts += [reuse_table.caption(trained), _markdown(*reuse_table.table(trained))]
    return "\n\n".join(parts)


def page(suite: str, runs: Sequence[dict[str, Any]], results_dir: Path, docs: Path) -> str:
    """A whole page of `docs/benchmarks/`: a section for each run of the suite, the newest first."""
    title, plotted = PAGES[suite][1:]
    parts = [
        f"# {title}",
        "Drawn by `make docs-tables` from the committed results. [What each figure is, and how it is made](index.md).",
    ]
    if not any(suite in results["suites"] for results in runs):
        parts.append(
            "No results of this suite are committed so far. What it compares is written down "
            f"[beside it](index.md#suites); `fastmtl bench --suite {suite}` runs it on your machine."
        )
    for results in runs:
        if suite in results["suites"]:
            files = [results_dir / f"{results['slug']}-{name}.png" for name in plotted]
            images = [plots.relative(file.resolve(), docs.resolve()) for file in files if file.exists()]
            parts.append(section(results, suite, images))
    return "\n\n".join(parts) + "\n"


def _fastest_other(row: dict[str, Any]) -> str:
    """Which way that is not fastmtl's was the fastest."""
    return max(
        (label for label in row["speedup"] if label not in OF_FASTMTL), key=lambda label: 1 / row["speedup"][label]
    )


def readme_table(runs: Sequence[dict[str, Any]]) -> str:
    """The five rows of the README, each of the newest run that has it, beside the fastest other way.

    Raises:
        ValueError: no run has a row, or the row has no times.
    """
    lines = []
    for case, words in README_CASES.items():
        found = next(
            (
                (row, run["machine"]["device"])
                for run in runs
                for row in run["rows"]
                if row["case"] == case and row["status"] == "ok" and row["speedup"]
            ),
            None,
        )
        if found is None:
            raise ValueError(f"no results have times of {case!r}, which the README shows")
        row, device = found
        label = _fastest_other(row)
        other = row["times"][label]["median"]
        ratio = row["speedup"][label]
        # the chip, without what follows a comma: the number of threads is that of every run
        lines.append(
            [
                words,
                device.split(",")[0],
                seconds(row["times"]["ours"]["median"]),
                f"{seconds(other)} ({OTHER_WORDS.get(label, label)})",
                f"{ratio:.2f}x" + (" (slower)" if ratio < 1 else ""),
            ]
        )
    return _markdown(README_COLUMNS, lines)


def reuse_section(results: dict[str, Any]) -> str:
    """What docs/guides/training-loops.md shows of weights that are reused: the accuracy, and where it was measured."""
    rows = reuse_table.rows_of(results)
    origin = f"Measured on {results['machine']['device']}, {_run_text(results['suites']['step'])}."
    return "\n\n".join([origin, reuse_table.caption(rows), _markdown(*reuse_table.table(rows))])


def choice_section(results: dict[str, Any]) -> str:
    """What docs/guides/one-pass.md shows of `one_pass` beside `GradientBank`, and where it was measured."""
    origin = f"Measured on {results['machine']['device']}, {_run_text(results['suites']['step'])}."
    return "\n\n".join([origin, choice_table.caption(), _markdown(*choice_table.table(choice_table.rows_of(results)))])


def newest_first(folder: Path) -> list[dict[str, Any]]:
    """All results files of a folder, by the date in them (a checkout does not keep the times of files).

    Raises:
        ValueError: there is none.
    """
    runs = [read(path) for path in sorted(folder.glob("*.json"))]
    if not runs:
        raise ValueError(f"{folder}: no results; run `fastmtl bench --out {folder}`")
    return sorted(runs, key=lambda run: run["machine"]["date"], reverse=True)


def between_markers(text: str, drawn: str, name: str, marks: tuple[str, str] = (BEGIN, END)) -> str:
    """The text with what stands between its markers replaced.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    first, last = marks
    begin, end = text.find(first), text.find(last)
    if text.count(first) != 1 or text.count(last) != 1 or end < begin:
        raise ValueError(f"{name}: expected one {first} and after it one {last}")
    return f"{text[: begin + len(first)]}\n\n{drawn}\n\n{text[end:]}"


def texts(root: Path) -> dict[Path, str]:
    """README and pages of a checkout, as its committed results make them, and the tables of three other pages."""
    folder, docs = root / "benchmarks/results", root / "docs/benchmarks"
    runs = newest_first(folder)
    readme = root / "README.md"
    drawn = {readme: between_markers(readme.read_text(), readme_table(runs), "README.md")}
    loops = root / "docs/guides/training-loops.md"
    if trained := next((run for run in runs if reuse_table.rows_of(run)), None):
        drawn[loops] = between_markers(loops.read_text(), reuse_section(trained), loops.name, reuse_table.MARKS)
    costs = root / "docs/methods/index.md"
    if asked := [run for run in runs if "methods" in run["suites"]]:
        section_of = "\n\n".join([cost_table.caption(asked), _markdown(*cost_table.table(asked, _time))])
        drawn[costs] = between_markers(costs.read_text(), section_of, costs.name, cost_table.MARKS)
    choice = root / "docs/guides/one-pass.md"
    if measured := next((run for run in runs if choice_table.rows_of(run)), None):
        drawn[choice] = between_markers(choice.read_text(), choice_section(measured), choice.name, choice_table.MARKS)
    return drawn | {docs / PAGES[suite][0]: page(suite, runs, folder, docs) for suite in PAGES}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastmtl.benchmarks.report.report",
        description="Draws the README's table, the pages of docs/benchmarks and the plots from committed results.",
    )
    parser.add_argument("--root", type=Path, default=Path(), help="the checkout (.)")
    parser.add_argument("--no-plots", action="store_true", help="leaves the pictures as they are")
    options = parser.parse_args(argv)
    try:
        folder = options.root / "benchmarks/results"
        if not options.no_plots:
            for results in newest_first(folder):
                plots.draw(results, folder)
        for path, text in texts(options.root).items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
