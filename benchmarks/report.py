"""Results: the file, the table, the plots, and the section of the README drawn from the file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastmtl.benchmarks import plots

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


def _versus(row: dict[str, Any], family: str) -> str:
    ratio = row.get("speedup_over_best", {}).get(family)
    if ratio is not None:
        return f"{ratio:.3g}x" if ratio < 1000 else f"{ratio:.0f}x"
    for label, entry in row.get("times", {}).items():
        if label.split("_")[0] == family:
            reason = entry.get("skipped", "failed")
            return reason if reason in ("failed", "not installed") else "skipped"
    return "-"


def cells(row: dict[str, Any]) -> list[str]:
    """One line of the table, by `COLUMNS`."""
    name = row["case"] if row["device"] == "cpu" else f"{row['case']} ({row['device']})"
    if row["status"] != "ok":
        return [name, row["status"].upper(), *["-"] * (len(COLUMNS) - 2)]
    ours = row["times"]["ours"]
    time = seconds(ours["median"])
    if "graph" in ours:
        time = f"{seconds(ours['graph']['median'])} (eager {time})"
    floor = _over(row, "floor")
    for label, text in (("t_backwards", "of T passes"), ("sum", "of a plain step")):
        if label in row["time_over"]:
            floor = f"{row['time_over'][label]:.3f} {text}"
    memory = row.get("memory", {}).get("ours")
    return [
        name,
        time,
        floor,
        _over(row, "two_reads"),
        _in_new_memory(row),
        *(_versus(row, family) for family in ("naive", "plain", "torchjd")),
        mebibytes(memory["peak_extra_bytes"]) if memory else "-",
    ]


def print_table(results: dict[str, Any], console: Any) -> None:
    """A rich table of all rows, and accuracy by method where networks were trained."""
    from rich.table import Table

    table = Table(title=results["machine"]["device"], title_justify="left")
    for k, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if k == 0 else "right", no_wrap=k == 0)
    for row in results["rows"]:
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


def write(results: dict[str, Any], out: Path) -> tuple[Path, list[Path]]:
    """Writes `<out>/<slug>.json` and the plots; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{results['slug']}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path, plots.draw(results, out)


# --- the README


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    table = [list(header), ["---", *["---:"] * (len(header) - 1)], *map(list, lines)]
    return "\n".join("| " + " | ".join(line) + " |" for line in table)


def readme_section(results: dict[str, Any], images: Sequence[str]) -> str:
    """The text between the markers: machine, headline rows, accuracy, plots."""
    machine = results["machine"]
    versions = machine["versions"]
    peer = f", TorchJD {versions['torchjd']}" if versions.get("torchjd") else ""
    commit = (machine["commit"] or "unknown")[:10] + (" with local changes" if machine["uncommitted_changes"] else "")
    parts = [
        f"Measured on {machine['device']} ({machine['date'][:10]}, commit {commit}, torch {versions['torch']}{peer}); "
        f"medians; floor: the bytes that must move, at the copy rate of the same run.",
        _markdown(COLUMNS, [cells(row) for row in results["rows"] if row["headline"]]),
    ]
    for row in results["rows"]:
        if "accuracy" in row.get("extra", {}):
            header, lines = _accuracy_lines(row)
            parts.append(f"Four tasks on overlaid digits after {row['extra']['steps_trained']['ours']} steps:")
            parts.append(_markdown(header, lines))
    parts += [f"![{Path(image).stem}]({image})" for image in images]
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


def rewrite_readme(readme: Path, results_path: Path) -> None:
    """Replaces what stands between the markers in `readme`, and draws the plots beside the results.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    text = readme.read_text()
    begin, end = text.find(BEGIN), text.find(END)
    if text.count(BEGIN) != 1 or text.count(END) != 1 or end < begin:
        raise ValueError(f"{readme}: expected one {BEGIN} and after it one {END}")
    results = json.loads(results_path.read_text())
    drawn = plots.draw(results, results_path.parent)
    root = readme.resolve().parent
    images = [plots.relative(path.resolve(), root) for path in drawn]
    section = readme_section(results, images)
    readme.write_text(f"{text[: begin + len(BEGIN)]}\n\n{section}\n\n{text[end:]}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastmtl.benchmarks.report", description="Draws the README's table and plots from results."
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
