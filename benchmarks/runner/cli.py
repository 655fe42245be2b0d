"""`fastmtl bench`: runs suites on this machine, prints the table, writes JSON and plots."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import torch

from fastmtl._version import DISTRIBUTION
from fastmtl.benchmarks.report import report
from fastmtl.benchmarks.runner import registry
from fastmtl.benchmarks.runner.machine import describe, slug
from fastmtl.benchmarks.runner.runner import QUICK, Runner, Settings

# module -> distribution
EXTRAS = {"rich": "rich", "matplotlib": "matplotlib"}
STEP_EXTRAS = {"sklearn": "scikit-learn"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--suite", default=",".join(registry.SUITES), help=f"suites, by commas (default: {','.join(registry.SUITES)})"
    )
    parser.add_argument("--quick", action="store_true", help="a telling few cases: some minutes on two cores")
    parser.add_argument("--out", type=Path, default=Path("fastmtl-bench"), help="folder for results (fastmtl-bench)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one, else cpu")
    parser.add_argument("--filter", metavar="TEXT", help="only cases with this text in suite/name")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")


def missing_extras(suites: list[str]) -> list[str]:
    """Distributions that a run of the suites needs and this environment lacks."""
    needed = EXTRAS | (STEP_EXTRAS if "step" in suites else {})
    return [name for module, name in needed.items() if importlib.util.find_spec(module) is None]


def run(options: argparse.Namespace) -> int:
    """Exit code: 0; 1 when a row failed or the run was interrupted; 2 when it could not start."""
    suites = [name.strip() for name in options.suite.split(",") if name.strip()]
    missing = missing_extras(suites)
    if missing:
        way = f'pip install "{DISTRIBUTION}[bench]", in a checkout pip install ".[bench]"'
        print(f"fastmtl bench needs {', '.join(missing)}: {way}", file=sys.stderr)
        return 2
    if options.device == "cuda" and not torch.cuda.is_available():
        print("fastmtl bench: --device cuda, but torch sees no CUDA device", file=sys.stderr)
        return 2
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        cases = registry.collect(suites, device, quick=options.quick, pattern=options.filter)
    except ValueError as error:
        print(f"fastmtl bench: {error}", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(f"{case.suite}/{case.name}" for case in cases))
        return 0
    if not cases:
        print(f"fastmtl bench: no case has {options.filter!r} in its name", file=sys.stderr)
        return 2
    try:
        # before the run, not after it
        kept = report.file_of(slug(describe(device)), options.out)
        if kept.exists():
            report.read(kept)
    except ValueError as error:
        print(f"fastmtl bench: {error}", file=sys.stderr)
        return 2
    results = run_cases(cases, device, quick=options.quick, out=options.out)
    done = len(results["rows"]) == len(cases)
    return 0 if done and all(row["status"] == "ok" for row in results["rows"]) else 1


def run_cases(cases: list[registry.Case], device: torch.device, *, quick: bool, out: Path) -> dict[str, Any]:
    """Runs the cases with a progress display, prints the table, writes the files; returns the results of this run.

    Interrupted, it keeps what it has measured, in files of their own.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    # torch's profiler, which counts allocations, writes a line into the progress display at each start and stop
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    # into a file or a pipe: wide enough for the table
    console = Console(width=None if sys.stdout.isatty() else 170)
    settings = QUICK if quick else Settings()
    machine = describe(device)
    console.print(
        f"fastmtl {machine['versions']['fastmtl']}, torch {machine['versions']['torch']}: {machine['device']}"
    )
    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    rows, interrupted = [], False
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("measuring the copy rate", total=len(cases))
        current = [""]
        runner = Runner(
            device, settings, lambda text: progress.update(task, description=f"{current[0]}: {text}", refresh=False)
        )
        try:
            for case in cases:
                current[0] = case.name
                row = runner.run_case(case)
                rows.append(row)
                progress.advance(task)
                name, ours, ratio, *_ = report.cells(row)
                line = f"{name}: {ours}, {report.columns(row)[2]}: {ratio}"
                progress.console.print(line, highlight=False, markup=False)
        except KeyboardInterrupt:
            if not rows:
                progress.console.print("interrupted before the first case was done: nothing is written")
                return {"rows": rows}
            interrupted = True
            progress.console.print(f"interrupted in {current[0]}: {len(rows)} of {len(cases)} cases are kept")
    how = {"quick": quick, "budget_s": settings.budget_s, "longest_s": settings.longest_s}
    results = {
        "schema": 2,
        # a part of a suite must not take the place of an earlier whole
        "slug": slug(machine) + ("-interrupted" if interrupted else ""),
        "machine": machine,
        "suites": report.suite_runs(rows, machine, how),
        "rows": rows,
    }
    report.print_table(results, console)
    console.print(
        "x floor, x shared: of a lower bound of the time, smaller is better; vs: how many times as fast as that, "
        "larger is faster; docs/benchmarks explains every column",
        highlight=False,
        markup=False,
    )
    path, images = report.write(results, out)
    console.print("written: " + ", ".join(str(x) for x in (path, *images)), highlight=False, markup=False)
    return results
