"""What the experiments of this folder share: options, cases that are kept as they finish, tables and pictures.

An experiment is a list of cases, each a few settings such as `{"lam": 0.1, "seed": 2}`. Each case is run by itself and
written to `OUT/NAME.json` as soon as it is finished, so that an interrupted command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import inspect
import json
import multiprocessing
import os
import platform
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

import fastmtl

try:
    import matplotlib
except ModuleNotFoundError:
    sys.exit("matplotlib is not installed: pip install matplotlib scikit-learn")

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

Settings = dict[str, Any]  # of one case: strings, numbers, lists
SCHEMA = 1


class Record(NamedTuple):
    """A finished case: its settings, what `run` returned for them, and how long that took."""

    settings: Settings
    result: dict[str, Any]
    seconds: float


class Table(NamedTuple):
    """What is printed, and shown in `docs/papers/reproductions.md`; all cells are text."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def text(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.head, *self.rows, strict=True)]
        lines = ([self.head, ["-" * width for width in widths], *self.rows]) if self.rows else [self.head]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)

    def markdown(self) -> str:
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class Claim(NamedTuple):
    """A direction that the records show or do not show, in a sentence with its numbers.

    `stable` claims are asserted by the tests on the records of `--quick`; what depends on the seed is not stable.
    """

    text: str
    holds: bool
    stable: bool = True


@dataclass(frozen=True)
class Experiment:
    """One command of this folder.

    Args:
        title: a line for the head of its section.
        paper: whose claim it is: authors, year, title, arXiv number, in Markdown.
        claim: what the paper says, and how it is tried here; Markdown.
        reading: what the committed numbers say, what they do not, and where they differ from the paper; Markdown.
        cases: from the number of seeds and `quick` to the settings of each case; keys are the arguments of `run`.
        run: a case's settings as keyword arguments -> what JSON can hold. A function of the script's own module.
        table: from the records to what is printed.
        draw: draws the records into a figure. The figure is `size` inches wide and high.
        claims: from the records to the directions that they show.
        seeds: how many, by default.
        processes: how many cases at once, by default; 1 where times are measured.
    """

    title: str
    paper: str
    claim: str
    reading: str
    cases: Callable[[int, bool], list[Settings]]
    run: Callable[..., dict[str, Any]]
    table: Callable[[list[Record]], Table]
    draw: Callable[[list[Record], Figure], None]
    claims: Callable[[list[Record]], list[Claim]]
    size: tuple[float, float] = (8, 4)
    seeds: int = 3
    processes: int = 2

    @property
    def path(self) -> Path:
        return Path(inspect.getfile(self.run))

    @property
    def name(self) -> str:
        return self.path.stem

    def digest(self) -> str:
        """Of the sources that make the records: the script and the modules of this folder that it takes from."""
        taken = re.findall(r"^from (\w+) import", self.path.read_text(), re.MULTILINE)
        shared = {Path(__file__).parent / f"{name}.py" for name in {"data", *taken} - {"experiment"}}
        sources = sorted({self.path, *(path for path in shared if path.exists())})
        return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


# --- what finished cases look like on disk


class Unusable(Exception):
    """A file or folder that the command cannot work with; the message says what to do."""


class Store:
    """The records of one experiment in `OUT/NAME.json`, rewritten as a whole after each case."""

    def __init__(self, experiment: Experiment, folder: Path, quick: bool, fresh: bool = False) -> None:
        self.path = folder / f"{experiment.name}{'-quick' if quick else ''}.json"
        self.digest = experiment.digest()
        self.records: list[Record] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".{experiment.name}-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise Unusable(
                f"cannot write into {folder}: {error.strerror or error}; give --out another folder"
            ) from None
        self.lock = lock(self.path)
        if self.path.exists():
            try:
                digest, self.records = read(self.path)
                if digest != self.digest:
                    raise Unusable(f"{self.path} was made by another version of this script")
            except Unusable as error:
                if not fresh:
                    raise Unusable(f"{error}; --fresh starts anew, --out keeps it") from None
                self.records = []

    def find(self, settings: Settings) -> Record | None:
        return next((record for record in self.records if record.settings == settings), None)

    def add(self, record: Record) -> None:
        """Keeps a record, in place of an earlier one of the same settings."""
        self.records = [kept for kept in self.records if kept.settings != record.settings]
        self.records.append(record)
        content = {
            "schema": SCHEMA,
            "digest": self.digest,
            "origin": origin(),
            "records": [record._asdict() for record in self.records],
        }
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps(content, indent=1) + "\n")
        draft.replace(self.path)


def read(path: Path) -> tuple[str, list[Record]]:
    """The digest of the script that made the records, and the records."""
    try:
        content = json.loads(path.read_text())
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']}, expected {SCHEMA}")
        return content["digest"], [Record(**record) for record in content["records"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Unusable(f"{path} cannot be read ({error})") from None


def lock(path: Path) -> Any:
    """What keeps other processes from writing this file as long as it is held; where files cannot be locked, None."""
    if fcntl is None:
        return None
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    file = (Path(tempfile.gettempdir()) / f"fastmtl-{name}.lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise Unusable(f"another run of this command writes into {path.parent}; give --out another folder") from None
    return file


def origin() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "fastmtl": fastmtl.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


# --- running


def call(run: Callable[..., dict[str, Any]], settings: Settings) -> Record:
    begin = time.perf_counter()
    torch.manual_seed(settings.get("seed", 0))
    return Record(settings, run(**settings), time.perf_counter() - begin)


def in_turn(experiment: Experiment, todo: Sequence[Settings]) -> Iterator[Record]:
    return map(functools.partial(call, experiment.run), todo)


def prepare_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)


def end_with_parent() -> None:
    """Also where the parent was killed, and could tell nobody."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def at_once(experiment: Experiment, todo: Sequence[Settings], processes: int) -> Iterator[Record]:
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=spawn, initializer=prepare_worker)
    try:
        pending = {pool.submit(call, experiment.run, settings) for settings in todo}
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
        pool.shutdown()
    except BrokenProcessPool:
        raise Unusable("a worker died (out of memory?); --processes 1 needs less") from None
    finally:
        # nothing is left after a shutdown; after Ctrl-C or an error nobody waits for what still runs
        for worker in list((getattr(pool, "_processes", None) or {}).values()):
            worker.terminate()
        pool.shutdown(wait=False, cancel_futures=True)


def brief(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {number}")
    return number


def parse(experiment: Experiment, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=experiment.title, allow_abbrev=False)
    parser.add_argument("--seeds", type=positive, default=None, help=f"default: {experiment.seeds}, or 1 with --quick")
    parser.add_argument("--quick", action="store_true", help="seconds: fewer cases, fewer steps, one seed")
    parser.add_argument("--out", type=Path, default=Path("runs/papers"), help="folder; default: runs/papers")
    parser.add_argument("--fresh", action="store_true", help="run these cases again, in place of what is kept")
    parser.add_argument(
        "--processes",
        type=positive,
        default=experiment.processes,
        help=f"cases at once; default: {experiment.processes}",
    )
    return parser.parse_args(arguments)


def main(experiment: Experiment, arguments: Sequence[str] | None = None) -> list[Record]:
    """The command: runs the cases that are not finished, prints the table, draws the picture."""
    options = parse(experiment, arguments)
    cases = experiment.cases(options.seeds or (1 if options.quick else experiment.seeds), options.quick)
    try:
        store = Store(experiment, options.out, options.quick, options.fresh)
        run_cases(experiment, store, cases, options)
        records = [store.find(settings) for settings in cases]
        picture = store.path.with_suffix(".png")
        save(experiment, records, picture)
    except Unusable as error:
        fail(str(error), 2)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    print(f"\n{experiment.table(records).text()}\n")
    for claim in experiment.claims(records):
        print(f"{'holds' if claim.holds else 'DOES NOT HOLD'}: {claim.text}")
    print(f"\npicture: {picture}\nrecords: {store.path}")
    return records


def run_cases(experiment: Experiment, store: Store, cases: Sequence[Settings], options: argparse.Namespace) -> None:
    todo = [settings for settings in cases if options.fresh or store.find(settings) is None]
    processes = options.processes
    finished = len(cases) - len(todo)
    if finished:
        print(f"{finished} of {len(cases)} cases are in {store.path} already", flush=True)
    if processes == 1 or len(todo) < 2:
        threads = torch.get_num_threads()
        records = in_turn(experiment, todo)
    else:
        threads = None
        records = at_once(experiment, todo, min(processes, len(todo)))
    try:
        if threads is not None and experiment.processes > 1:
            torch.set_num_threads(1)  # as in the workers: the same sums, and so the same records
        for record in records:
            store.add(record)
            finished += 1
            print(f"case {finished}/{len(cases)}: {brief(record.settings)} ({record.seconds:.1f} s)", flush=True)
    except KeyboardInterrupt:
        again = "the same command without --fresh" if options.fresh else "the same command"
        fail(f"interrupted: {finished} of {len(cases)} cases are kept in {store.path}; {again} goes on", 130)
    finally:
        if threads is not None:
            torch.set_num_threads(threads)


def fail(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)


def save(experiment: Experiment, records: list[Record], path: Path) -> None:
    figure = plt.figure(figsize=experiment.size, layout="constrained")
    experiment.draw(records, figure)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# --- for tables


def grouped(records: Iterable[Record], *keys: str) -> dict[tuple, list[Record]]:
    """Records by the values of these settings, in order of appearance: the seeds of each case together."""
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record.settings[key] for key in keys), []).append(record)
    return groups


def values(records: Iterable[Record], key: str) -> list[float]:
    return [float(record.result[key]) for record in records]


def mean(numbers: Sequence[float]) -> float:
    return statistics.fmean(numbers)


def spread(numbers: Sequence[float], digits: int = 1) -> str:
    """Mean and sample standard deviation over the seeds."""
    deviation = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{statistics.fmean(numbers):.{digits}f}{deviation}"
