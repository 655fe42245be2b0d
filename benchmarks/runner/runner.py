"""Runs cases: check first, then interleaved timing against the floor of the same run, then peak memory."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastmtl.benchmarks.runner import measure
from fastmtl.benchmarks.runner.measure import Rates
from fastmtl.benchmarks.runner.registry import Candidate, Case

# small inputs are rotated: together they are larger than any cache, by this factor
CACHE_FACTOR = 4
MOST_ROTATED = 256
# calls are grouped until a sample lasts about this long
SAMPLE_S = 1e-3
FEWEST_OF_OURS = 9
# a way that ours did not choose may be so much faster
MOST_GAINED = 1.05


@dataclass
class Settings:
    """How much time a run takes.

    Args:
        budget_s: seconds of timing for one case, all candidates together.
        longest_s: a baseline whose single call would take longer, by its traffic, is skipped.
        memory: whether peak memory is measured.
        ways: whether the other ways that ours could have taken are timed too, and a row fails where one is faster.
        settle: as many budgets more for ours and its nearest rivals, where their samples do not tell who is faster.
    """

    budget_s: float = 3.0
    longest_s: float = 10.0
    memory: bool = True
    ways: bool = True
    settle: float = 2.0


QUICK = Settings(budget_s=2.0, longest_s=1.0, settle=0.0)


def near_rivals(case: Case, samples: Mapping[str, Sequence[float]]) -> list[str]:
    """The fastest baseline and the fastest way, where four of five samples of ours and of theirs overlap."""
    found = []
    ours = measure.summary(samples[case.ours.label])
    for kind in ("baseline", "way"):
        of_kind = [c.label for c in case.candidates if c.kind == kind and samples.get(c.label)]
        if not of_kind:
            continue
        rival = min(of_kind, key=lambda label: statistics.median(samples[label]))
        theirs = measure.summary(samples[rival])
        apart = theirs["p80"] < ours["p20"] or ours["p80"] < theirs["p20"]
        if not apart:
            found.append(rival)
    return found


def wrong_choice(case: Case, times: dict[str, Any]) -> str | None:
    """Which way would have been faster than what ours chose, by over 5%; None: none.

    The median decides, and four of five of its samples must be faster than the median of ours: noise is none's fault.
    """
    ours = times[case.ours.label]
    for candidate in case.candidates:
        other = times.get(candidate.label, {})
        if candidate.kind != "way" or "median" not in other:
            continue
        if other["median"] * MOST_GAINED < ours["median"] and other["p80"] < ours["median"]:
            ratio = other["median"] / ours["median"]
            return (
                f"right results, a slower choice: {candidate.detail} takes {ratio:.2f} of the time of what was chosen; "
                "`fastmtl tune` measures the choices on this machine, and beside other work such a row means little"
            )
    return None


class Runner:
    """Runs cases on one device, one after the other.

    Args:
        device: where the inputs are.
        settings: how much time to take.
        report: called with a line on what is being done; for a progress display.
    """

    def __init__(
        self,
        device: torch.device,
        settings: Settings | None = None,
        report: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.device = device
        self.settings = settings or Settings()
        self.report = report
        self.rates = Rates(device)
        self.rates.copy()
        self.seconds_per_byte = self.rates.copy()

    def run(self, cases: Iterable[Case]) -> list[dict[str, Any]]:
        return [self.run_case(case) for case in cases]

    def run_case(self, case: Case) -> dict[str, Any]:
        """One row of the results. A case that fails its check, or raises, has `status` and `error`, and no times."""
        row: dict[str, Any] = {
            "suite": case.suite,
            "case": case.name,
            "op": case.op,
            "params": dict(case.params),
            "device": self.device.type,
        }
        begin = time.perf_counter()
        try:
            self._fill(case, row)
        except Exception as error:
            row = {key: value for key, value in row.items() if key not in ("times", "time_over", "speedup", "memory")}
            row |= {"status": "error", "error": f"{type(error).__name__}: {error}"}
        row["took_s"] = time.perf_counter() - begin
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return row

    def _fill(self, case: Case, row: dict[str, Any]) -> None:
        self.report("making inputs")
        first = case.make(self.device)
        self.report("checking against the oracle")
        check = case.check(first, case.ours.call)
        row["check"] = {"error": check.error, "tolerance": check.tolerance, "against": check.against}
        if not check.passed:
            row["status"] = "failed"
            row["error"] = f"wrong result: error {check.error:.2g} > {check.tolerance:.2g} ({check.against})"
            return
        inputs = [first, *(case.make(self.device) for _ in range(self._rotated(case) - 1))]
        row["rotated_inputs"] = len(inputs)
        row["times"] = times = {}
        samples = self._time(case, inputs, times, row["check"])
        self._add_floors(case, row, samples)
        self._add_ratios(case, row)
        if self.settings.memory:
            self.report("peak memory")
            row["memory"] = self._memory(case, first, times)
        if case.finish is not None:
            self.report("last figures")
            row["extra"] = case.finish(first)
        row["status"] = "ok"
        slower = wrong_choice(case, times)
        if slower is not None:
            row |= {"status": "failed", "error": slower}

    def _rotated(self, case: Case) -> int:
        if case.input_bytes <= 0:
            return 1
        wanted = CACHE_FACTOR * measure.cache_bytes(self.device) // case.input_bytes + 1
        return max(1, min(MOST_ROTATED, wanted))

    # --- timing

    def _time(
        self, case: Case, inputs: list[Any], times: dict[str, Any], checked: dict[str, Any]
    ) -> dict[str, list[float]]:
        """The samples; `times` gets an entry per candidate, `checked` the errors of those that were verified."""
        samplers: dict[str, Callable[[], float]] = {}
        turn = [0]
        for candidate in case.candidates:
            if candidate.kind == "way" and not self.settings.ways:
                continue
            reason = candidate.unavailable or self._too_slow(candidate)
            if reason:
                times[candidate.label] = {"skipped": reason, "detail": candidate.detail}
            elif (candidate.builds and (error := self._built(candidate, inputs[0]))) or (
                case.verify is not None
                and candidate is not case.ours
                and (error := self._verified(case, candidate, inputs[0], checked))
            ):
                times[candidate.label] = {"failed": error, "detail": candidate.detail}
            else:
                samplers[candidate.label] = self._sampler(case, candidate, inputs, turn)
        if case.moved:
            samplers["(copy)"] = self.rates.copy
        if case.flops:
            samplers["(multiply)"] = self.rates.multiply(getattr(torch, case.params["dtype"]))
        samplers |= self._graphs(case, inputs, set(samplers))
        samples, failed = self._interleave(case, samplers)
        if case.ours.label in failed:
            raise RuntimeError(failed[case.ours.label])
        self._settle(case, samplers, samples)
        for candidate in case.candidates:
            label = candidate.label
            if label in failed:
                times[label] = {"failed": failed[label], "detail": candidate.detail}
            elif label in samples:
                times[label] = {**measure.summary(samples[label]), "detail": candidate.detail}
                graph = f"{label} (graph)"
                if graph in samples:
                    times[label]["graph"] = measure.summary(samples[graph])
        return samples

    def _interleave(
        self, case: Case, samplers: dict[str, Callable[[], float]]
    ) -> tuple[dict[str, list[float]], dict[str, str]]:
        done = [0]

        def tick() -> None:
            done[0] += 1
            self.report(f"timing, sample {done[0]}")

        # what every ratio of the row hangs on is sampled more often
        hinges = [case.ours.label, "(copy)", *([case.floor_from] if case.floor_from else [])]
        at_least = dict.fromkeys(hinges, FEWEST_OF_OURS) | dict(case.at_least)
        budget_s = self.settings.budget_s if case.budget_s is None else case.budget_s
        warm = case.verify is not None
        measure.warm_up(self.device)
        return measure.interleave(samplers, budget_s, at_least=at_least, reps=case.reps, warm=warm, tick=tick)

    def _settle(self, case: Case, samplers: dict[str, Callable[[], float]], samples: dict[str, list[float]]) -> None:
        """Ours and its near rivals take more turns: a few samples of equals differ by a tenth on a shared machine."""
        budget_s = self.settings.settle * (self.settings.budget_s if case.budget_s is None else case.budget_s)
        if not budget_s or case.reps is not None or self.device.type != "cpu":
            return
        rivals = near_rivals(case, samples)
        if not rivals:
            return
        # the floor of the same minutes, too
        labels = [case.ours.label, *rivals, *(label for label in ("(copy)",) if label in samplers)]
        self.report("settling")
        together = sum(statistics.median(samples[label]) for label in labels)
        more, failed = measure.interleave(
            {label: samplers[label] for label in labels},
            budget_s,
            reps=max(1, min(60, int(budget_s / together))),
        )
        if failed:
            raise RuntimeError("; ".join(f"{label}: {error}" for label, error in failed.items()))
        for label in labels:
            samples[label] += more[label]

    def _built(self, candidate: Candidate, inputs: Any) -> str | None:
        """Calls it once, so that no sample holds what it compiles; what it raised, if it did."""
        self.report(f"compiling {candidate.label}")
        try:
            candidate.call(inputs)
        except Exception as error:
            return f"{type(error).__name__}: {error}".splitlines()[0]
        return None

    def _verified(self, case: Case, candidate: Candidate, inputs: Any, checked: dict[str, Any]) -> str | None:
        """Compares it with the oracle; what is wrong with it, if anything."""
        assert case.verify is not None
        self.report(f"checking {candidate.label}")
        try:
            check = case.verify(inputs, candidate)
        except Exception as error:
            return f"{type(error).__name__}: {error}".splitlines()[0]
        found = {"error": check.error, "tolerance": check.tolerance, "against": check.against}
        checked.setdefault("others", {})[candidate.label] = found
        if check.passed:
            return None
        return f"wrong result: error {check.error:.2g} > {check.tolerance:.2g} ({check.against})"

    def _too_slow(self, candidate: Candidate) -> str | None:
        expected = candidate.traffic * self.seconds_per_byte
        if candidate.kind == "ours" or expected <= self.settings.longest_s:
            return None
        return f"a call moves {candidate.traffic / 1e9:.0f} GB, over {expected:.0f} s"

    def _sampler(self, case: Case, candidate: Candidate, inputs: list[Any], turn: list[int]) -> Callable[[], float]:
        """Each sample takes the next inputs in turn, shared by all candidates: none finds its own in a cache."""
        number: list[int] = []

        def sample() -> float:
            if not number:
                number.append(1)
                # the first call imports, builds and allocates; the second tells how many make a sample
                first = one_sample(1)
                if case.prepare is None and len(inputs) > 1:
                    first = one_sample(1)
                    number[0] = max(1, min(len(inputs), int(SAMPLE_S / max(first, 1e-7))))
                return first
            return one_sample(number[0])

        def one_sample(count: int) -> float:
            chosen = [inputs[(turn[0] + k) % len(inputs)] for k in range(count)]
            turn[0] += count
            if case.prepare is not None:
                chosen = [case.prepare(x, candidate.label) for x in chosen]
            if candidate.again:
                candidate.call(chosen[0])
                chosen = chosen[:1] * candidate.again
            return measure.seconds_per_call(candidate.call, chosen, self.device)

        return sample

    def _graphs(self, case: Case, inputs: list[Any], available: set[str]) -> dict[str, Callable[[], float]]:
        """On a GPU: replays of one graph with a call per rotated input, for what never waits for the host."""
        if self.device.type != "cuda" or case.prepare is not None:
            return {}
        found: dict[str, Callable[[], float]] = {}
        for candidate in case.candidates:
            if not candidate.graph or candidate.label not in available:
                continue
            some = inputs[: min(len(inputs), 16)]
            try:
                graph = measure.capture(candidate.call, some)
            except Exception as error:
                self.report(f"{candidate.label}: no graph ({type(error).__name__})")
                continue

            def replay(graph: Any = graph, count: int = len(some)) -> float:
                return measure.seconds_per_call(lambda _: graph.replay(), [None], self.device) / count

            found[f"{candidate.label} (graph)"] = replay
        return found

    # --- figures

    def _add_floors(self, case: Case, row: dict[str, Any], samples: dict[str, list[float]]) -> None:
        row["floors"] = {}
        if not case.moved:
            return
        copy = measure.summary(samples["(copy)"])
        row["copy_bytes_per_s"] = {"median": 1 / copy["median"], "p20": 1 / copy["p80"], "p80": 1 / copy["p20"]}
        for name, moved in case.moved.items():
            row["floors"][name] = {"bytes": moved, "s": moved * copy["median"]}
        if case.flops and "(multiply)" in samples:
            multiply = measure.summary(samples["(multiply)"])["median"]
            row["flops_per_s"] = 1 / multiply
            floor = row["floors"]["floor"]
            floor |= {"flops": case.flops, "bytes_s": floor["s"], "flops_s": case.flops * multiply}
            floor["s"] = max(floor["bytes_s"], floor["flops_s"])
        if case.floor_from is not None:
            least = self.best_seconds(row["times"][case.floor_from])
            if least is None:
                # it could not run, so there is no floor
                del row["floors"]["floor"]
                return
            floor = row["floors"]["floor"]
            floor |= {"from": case.floor_from, "from_s": least, "bytes_s": floor["s"], "s": floor["s"] + least}

    @staticmethod
    def best_seconds(entry: dict[str, Any]) -> float | None:
        """The median that is compared: of graph replays where there are any, else of plain calls."""
        if "median" not in entry:
            return None
        return entry.get("graph", entry)["median"]

    def _add_ratios(self, case: Case, row: dict[str, Any]) -> None:
        times = row["times"]
        ours = self.best_seconds(times[case.ours.label])
        assert ours is not None
        row["time_over"] = {name: ours / floor["s"] for name, floor in row["floors"].items()}
        row["speedup"] = {}
        for candidate in case.candidates[1:]:
            other = self.best_seconds(times.get(candidate.label, {}))
            if other is None or candidate.kind == "way":
                continue
            if candidate.kind == "yardstick":
                row["time_over"][candidate.label] = ours / other
            else:
                row["speedup"][candidate.label] = other / ours
        # against the fastest variant of each baseline
        row["speedup_over_best"] = {}
        for label, ratio in row["speedup"].items():
            family = label.split("_")[0]
            row["speedup_over_best"][family] = min(ratio, row["speedup_over_best"].get(family, float("inf")))

    def _memory(self, case: Case, inputs: Any, times: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for candidate in case.candidates:
            seconds = self.best_seconds(times.get(candidate.label, {}))
            # one more call of something slow is not worth the wait, except of ours; of those that train, all take
            # it, so that all have trained for as long
            slow = case.prepare is None and candidate.kind != "ours" and (seconds or 0) > 2 * self.settings.budget_s
            left_out = case.memory_of is not None and candidate.label not in case.memory_of
            left_out = left_out or candidate.kind == "way"
            if seconds is None or slow or left_out:
                continue
            prepare = case.prepare_memory or case.prepare
            argument = prepare(inputs, candidate.label) if prepare else inputs
            found[candidate.label] = measure.peak_memory(candidate.call, argument, self.device)
            if case.prepare_memory is not None and self.device.type == "cpu":
                # a resident set holds what libraries keep for later, a few MiB more or less each time
                argument = case.prepare_memory(inputs, candidate.label)
                found[candidate.label]["allocated_bytes"], _ = measure.allocated_by_torch(candidate.call, argument)
        return found
