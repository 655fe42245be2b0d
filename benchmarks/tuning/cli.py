"""`fastmtl tune`: measures, with the progress shown, and writes the table."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastmtl.benchmarks.runner.machine import describe
from fastmtl.benchmarks.tuning import choose, gpu, probes
from fastmtl.benchmarks.tuning.probes import FULL, SHORT, Group, Sizes, Timed
from fastmtl.core.dispatch import unavailable
from fastmtl.tuning.gpu import cache_path as gpu_path
from fastmtl.tuning.processor import this_processor
from fastmtl.tuning.search import VARIABLE, cache_path
from fastmtl.tuning.table import DTYPES, KINDS, PRODUCTS, ByShape, Limits, Shape, Table, key

INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--full", action="store_true", help="more layers, and more calls of each: several minutes")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the table goes (default: your cache folder)")


def run(options: argparse.Namespace) -> int:
    """Exit code: 0; 2 when nothing can be measured or written here; 130 when it was interrupted."""
    reason = unavailable("cpu", "cpu")
    if reason is not None:
        print(f"fastmtl tune: there is nothing to choose between: {reason}", file=sys.stderr)
        return 2
    path = options.out or cache_path(this_processor())
    if os.path.isdir(path):
        print(f"fastmtl tune: {path} cannot be written: it is a folder", file=sys.stderr)
        return 2
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass  # so that no minutes are lost
    except OSError as error:
        print(f"fastmtl tune: {path} cannot be written: {error}", file=sys.stderr)
        return 2
    print(
        f"measures which way layers by task are multiplied fastest on this CPU: {'four' if options.full else 'two'} "
        "minutes where nothing else runs, several times that beside other work\n"
        f"writes {path} when it is done: delete that file to undo it",
        flush=True,
    )
    try:
        table = tuned(FULL if options.full else SHORT, Progress())
        write_whole(table.to_json(), path)
    except KeyboardInterrupt:
        print("\nfastmtl tune: interrupted, nothing is written", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        print(f"fastmtl tune: {path} cannot be written: {error}", file=sys.stderr)
        return 2
    print(summary(table))
    print(f"written: {path}; read by every process that starts from now on{_condition(options.out)}")
    return tune_gpus()


def tune_gpus() -> int:
    """Measures each kind of card that is there, and writes its table; the exit code of `run`."""
    if not torch.cuda.is_available():
        print("GPU: there is none here")
        return 0
    missing = {name: reason for name in ("cuda", "triton") if (reason := unavailable(name, "cuda")) is not None}
    if missing:
        print(f"GPU: there is nothing to choose between: {missing}")
        return 0
    cards = {torch.cuda.get_device_name(k): torch.device("cuda", k) for k in range(torch.cuda.device_count())}
    for card, device in cards.items():
        path = gpu_path(card)
        try:
            with torch.cuda.device(device):
                table = gpu.measured(card, device, origin())
            write_whole(table.to_json(), path)
        except KeyboardInterrupt:
            print(f"\nfastmtl tune: interrupted, nothing is written of {card}", file=sys.stderr)
            return INTERRUPTED
        except (OSError, ValueError) as error:
            print(f"fastmtl tune: {path} is not written: {error}", file=sys.stderr)
            return 2
        print(f"written: {path}, by which CUDA C++, Triton or torch's own operators make the layers by task on {card}")
    return 0


def write_whole(text: str, path: Path) -> None:
    """In one step: a process that reads it meanwhile finds the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


def _condition(out: Path | None) -> str:
    """Under which the table is read, as a process here would look for it."""
    if out is not None:
        return f" with {VARIABLE} set to it"
    return f" without {VARIABLE}, which names {os.environ[VARIABLE]}" if os.environ.get(VARIABLE) else ""


class Progress:
    """One line that is written over on a terminal, a line for each part elsewhere."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()
        self.part = ""

    def __call__(self, done: int, total: int, part: str, detail: str) -> None:
        elapsed = time.perf_counter() - self.begin
        line = f"[{done + 1}/{total}] {elapsed:4.0f} s  {part}"
        if sys.stdout.isatty():
            print(f"\r\x1b[2K{line} {detail}", end="", flush=True)
        elif part != self.part:
            print(line, flush=True)
        self.part = part

    def end(self) -> None:
        if sys.stdout.isatty():
            print("\r\x1b[2K", end="", flush=True)


def tuned(sizes: Sizes, progress: Callable[[int, int, str, str], None]) -> Table:
    """Measures everything and chooses."""
    found = probes.groups()
    total = len(found) * sizes.rounds + 1
    done = 0
    # all groups once, then all again: what else the machine does then seldom hits the same one twice
    timed: dict[Group, list[list[Timed]]] = {group: [] for group in found}
    for turn in range(sizes.rounds):
        for group in found:
            part = f"round {turn + 1} of {sizes.rounds}: {group}"
            progress(done, total, part, "")
            timed[group].append([])
            for one in probes.measure(group, sizes):
                timed[group][-1].append(one)
                progress(done, total, part, f"{one.shape}, {one.rows} rows")
            done += 1
    limits: dict[str, dict[str, ByShape]] = {product: {} for product in PRODUCTS}
    measured: dict[str, object] = {}
    for group in found:
        times = by_shape(probes.fastest(timed[group]))
        part = choose.of_direct(group.product, group.kind, group.dtype_name)
        choices = {shape: choose.choose(of_shape, part) for shape, of_shape in times.items()}
        chosen = ByShape({shape: choice.limits for shape, choice in choices.items()})
        limits[group.product][key(group.kind, group.dtype_name)] = chosen
        measured[str(group)] = {str(shape): _compact(times[shape], choice) for shape, choice in choices.items()}
    progress(total - 1, total, "one more call against copies", "")
    costs = list(probes.measure_calls(sizes))
    measured["calls, bytes by bytes of the weight"] = {str(c.weight_bytes): round(c.bytes) for c in costs}
    call_bytes, weight_passes = choose.fit_calls(costs)
    if isinstance(progress, Progress):
        progress.end()
    for entries in limits.values():
        for kind, dtype in itertools.product(KINDS, DTYPES):
            # a dtype that is widened to float32 asks for float32's limits
            entries.setdefault(key(kind, dtype), entries[key(kind, "float32")])
    return Table(limits, call_bytes, weight_passes, origin(), measured)


def origin() -> dict[str, object]:
    """Of a table that is measured here and now."""
    machine = describe(torch.device("cpu"))
    return {
        **this_processor()._asdict(),
        "torch": machine["versions"]["torch"],
        "fastmtl": machine["versions"]["fastmtl"],
        "commit": machine["commit"],
        "date": machine["date"],
    }


def by_shape(timed: list[Timed]) -> dict[Shape, list[Timed]]:
    """The times of each shape, in the order in which they were measured."""
    return {shape: list(group) for shape, group in itertools.groupby(timed, key=lambda one: one.shape)}


def _compact(timed: list[Timed], choice: choose.Choice) -> dict[str, object]:
    """Of one shape: what the limits lose, numbers of rows, and of each way its microseconds with them."""
    return {
        "mean_loss": round(choice.mean_loss, 3),
        "largest_loss": round(choice.largest_loss, 3),
        "rows": [one.rows for one in timed],
    } | {
        way: [round(one.seconds[way] * 1e6) if way in one.seconds else None for one in timed]
        for way in probes.WAYS
        if any(way in one.seconds for one in timed)
    }


def _in_words(by: ByShape) -> str:
    """The limits of all shapes, those for which they are the same together."""
    shapes: dict[Limits, list[str]] = {}
    for shape, limits in by.items():
        shapes.setdefault(limits, []).append(str(shape))

    def up_to(limit: int | None) -> str:
        return "always" if limit is None else "never" if limit == 0 else f"up to {limit} rows"

    return "; ".join(
        f"{', '.join(found)}: direct {up_to(limits.direct)}, then matmul {up_to(limits.matmul)}"
        for limits, found in shapes.items()
    )


def summary(table: Table) -> str:
    """What was found, for whoever waited for it."""
    lines = [
        f"{product}, {name}: {_in_words(by)}"
        for product, entries in table.limits.items()
        for name, by in entries.items()
    ]
    lines.append(f"one more call: {table.call_bytes / 1e6:.2g} MB of copies and {table.weight_passes} of its weight")
    return "\n".join(lines)
