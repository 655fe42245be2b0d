"""What a benchmark is: inputs, candidates, the bytes and flops of its floor, and the check that must pass first."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

# suite -> module with `cases(device, quick) -> list[Case]`
SUITES: dict[str, str] = {
    "surgery": "fastmtl.benchmarks.suites.surgery",
    "methods": "fastmtl.benchmarks.suites.methods",
    "step": "fastmtl.benchmarks.suites.step",
    "conv": "fastmtl.benchmarks.suites.conv",
    "models": "fastmtl.benchmarks.suites.models",
}
# the op of rows of suite `step` in which every sample of a batch has one task
TASK_STEP = "one-task-per-sample step"
# ops of rows of suite `step` on weights that are reused: their time, and the accuracy that they lead to
REUSE, REUSE_ACCURACY = "training steps that reuse weights", "accuracy of reused weights"
# ops of rows of suite `step` on what `one_pass` costs beside the layers: following a call, and a first step
FOLLOWED, FIRST_STEP = "calls inside one_pass", "first step of one_pass"
# the op of rows of suite `models` on the memory that TAPS needs in its variants
TAPS_MEMORY = "memory of TAPS"
# end of the op of rows of suite `methods` that are a whole `method(grads)`
WHOLE_CALL = "(grads)"


@dataclass(frozen=True)
class Candidate:
    """One way of doing the work of a case.

    Args:
        label: key in the results: `ours`; `naive`, `plain`, `torchjd` for baselines. A second variant of a
            baseline is `<baseline>_<variant>`: a ratio is claimed against the fastest of the variants.
        call: what is timed; takes one set of inputs (or what `Case.prepare` made of it).
        detail: what it is, in words.
        kind: `baseline`: reported as a speed-up of ours over it; `yardstick`: as our time over its time; `way`: ours,
            made to take one way throughout where it chooses between several: none may be much faster than its choice.
        traffic: bytes it moves, roughly: tells what would take too long before it is tried.
        graph: on a GPU, whether it can be captured in a CUDA graph (it never waits for the host).
        unavailable: why it cannot run here, if so.
        builds: its first call compiles for seconds: it is called once before the clock starts.
        again: calls in a row of which a sample is the mean, after one that is not timed: what a call takes that finds
            code and data in the caches; 0: a sample follows other candidates, as a step of a training loop does.
    """

    label: str
    call: Callable[[Any], Any]
    detail: str
    kind: Literal["ours", "baseline", "yardstick", "way"] = "baseline"
    traffic: int = 0
    graph: bool = False
    unavailable: str | None = None
    builds: bool = False
    again: int = 0


@dataclass(frozen=True)
class Check:
    """Result of comparing ours with the oracle: the largest error, relative to the scale of the result."""

    error: float
    tolerance: float
    against: str

    @property
    def passed(self) -> bool:
        # a NaN error must not pass
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Case:
    """One row of the results.

    Args:
        suite, name: identify the row; `name` is unique within the suite.
        op: what is measured.
        covers: names in `torch.ops.fastmtl` that ours calls.
        params: T, P, dtype, layout and so on, for the results file.
        make: device -> one set of random inputs. Called several times when inputs are rotated.
        candidates: ours first.
        check: (inputs, the call of ours) -> Check. Runs before anything is timed.
        input_bytes: size of one set of inputs: small ones are rotated so that no cache serves them. 0: one set.
        moved: name of a floor -> bytes that must move for it; the name `floor` takes `flops` into account too.
        flops: floating-point operations that must be done, for `floor`.
        floor_from: label of a yardstick whose time in the same run is added to the bytes of `floor`.
        prepare: (inputs, label) -> argument of the call; not timed.
        reps: a fixed number of samples instead of a time budget.
        finish: inputs -> further figures, after the timing.
        quick: belongs to the telling few of `--quick`.
        verify: (inputs, a candidate) -> Check: of every other candidate before it is timed; a wrong one is not.
        at_least: label -> samples that it gets in any case.
        budget_s: seconds of timing for all candidates together, instead of the run's setting.
        memory_of: labels whose peak memory is measured; None: all.
        prepare_memory: (inputs, label) -> argument of the call whose memory is measured, on a CPU in two ways; None:
            `prepare`'s.
    """

    suite: str
    name: str
    op: str
    covers: frozenset[str]
    params: Mapping[str, Any]
    make: Callable[[torch.device], Any]
    candidates: tuple[Candidate, ...]
    check: Callable[[Any, Callable[[Any], Any]], Check]
    input_bytes: int = 0
    moved: Mapping[str, int] = field(default_factory=dict)
    flops: int = 0
    floor_from: str | None = None
    prepare: Callable[[Any, str], Any] | None = None
    reps: int | None = None
    finish: Callable[[Any], dict[str, Any]] | None = None
    quick: bool = False
    verify: Callable[[Any, Candidate], Check] | None = None
    at_least: Mapping[str, int] = field(default_factory=dict)
    budget_s: float | None = None
    memory_of: frozenset[str] | None = None
    prepare_memory: Callable[[Any, str], Any] | None = None

    @property
    def ours(self) -> Candidate:
        return self.candidates[0]


def collect(
    suites: Iterable[str], device: torch.device, *, quick: bool = False, pattern: str | None = None
) -> list[Case]:
    """The cases of the suites, in order; `pattern` keeps those with that text in `suite/name`.

    Raises:
        ValueError: an unknown suite.
    """
    found: list[Case] = []
    for suite in suites:
        if suite not in SUITES:
            raise ValueError(f"suite: expected one of {', '.join(SUITES)}, got {suite!r}")
        found += importlib.import_module(SUITES[suite]).cases(device, quick)
    return [case for case in found if pattern is None or pattern in f"{case.suite}/{case.name}"]


def covered_ops() -> set[str]:
    """Names in `torch.ops.fastmtl` that some case measures; a test compares them with the registered ones."""
    return {op for case in collect(SUITES, torch.device("cpu")) for op in case.covers}
