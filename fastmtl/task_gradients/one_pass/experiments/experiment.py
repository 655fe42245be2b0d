"""Finds out by experiment what no rule tells of the result of a call."""

from __future__ import annotations

import contextlib
import functools
import time
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastmtl.task_gradients.one_pass.experiments.backwards import is_a_sum, reaches_its_own
from fastmtl.task_gradients.one_pass.experiments.forwards import Layout, layouts_seen, owners_seen
from fastmtl.task_gradients.one_pass.experiments.trials import FAILURES, SEED, Trials, Unfit, all_equal, close, same
from fastmtl.task_gradients.one_pass.experiments.values import (
    KINDS,
    TELLING,
    other_values,
    permuted,
    same_memory,
    samples_at,
    varies,
)
from fastmtl.task_gradients.one_pass.experiments.verdict import (
    NoKey,
    Placed,
    Refused,
    Summed,
    Verdict,
    keep,
    key_of,
    known,
)
from fastmtl.task_gradients.one_pass.rules.owners import along, axis_of_owners
from fastmtl.task_gradients.one_pass.sample_axis import (
    SAMPLE_SUM,
    Axes,
    Constant,
    MixedSamples,
    PerSample,
    SampleAxis,
    Unknown,
)
from fastmtl.task_gradients.one_pass.task_ids import TaskIds
from fastmtl.task_gradients.one_pass.torch_call import TorchCall

_OTHER_SEED = 78
# ops of other ranks too, which would wait for as many runs of them
_OF_RANKS = frozenset(("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor", "symm_mem"))


def _is_traced(call: TorchCall, results: Sequence[Tensor]) -> bool:
    """Whether tensors have no values: a compiler looks at the call, in the backward pass of a compiled model too."""
    modes = torch._C._TorchDispatchModeKey
    if any(torch._C._get_dispatch_mode(mode) is not None for mode in (modes.FAKE, modes.FUNCTIONAL, modes.PROXY)):
        return True
    return any(x.is_meta or isinstance(x, FakeTensor) for x in (*call.tensors(), *results))


class Experiments:
    """The experiments of one block.

    Args:
        unfollowed: a context in which calls are not followed.
        kept: tensors of the model, which no experiment may change.

    Attributes:
        runs: how many times calls were run again.
        seconds: how long that took.
        verdicts: by the name of a function: what is said of its results in `OnePassBank.report`.
    """

    def __init__(self, unfollowed: Callable[[], object], kept: Sequence[Tensor]) -> None:
        self._unfollowed, self._kept = unfollowed, kept
        self.runs, self.seconds = 0, 0.0
        self.verdicts: dict[str, list[str]] = {}

    def settle(self, call: TorchCall, axes: Axes, *, formula: bool = False) -> Axes:
        """What is known of the results of a call that has run, with experiments for those that no rule knows.

        Args:
            formula: it may be of a backward formula, of which nothing needs to be known; what is recomputed there was
                tried in the forward pass.
        """
        results = call.results()
        listed = list(axes) if isinstance(axes, list) else [axes] * len(results)
        if not any(isinstance(axis, Unknown) for axis in listed):
            return axes
        if torch._C._are_functorch_transforms_active():  # no values can be looked at
            return axes
        began = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            verdicts = self._verdicts(call, results, formula)
        self.seconds += time.perf_counter() - began
        if verdicts is None:
            return axes
        victims = _victims(call)
        task_ids = next(iter(victims.values())).task_ids
        settled = [
            _read(call, verdict, axis, x, task_ids) if isinstance(axis, Unknown) else axis
            for verdict, axis, x in zip(verdicts, listed, results, strict=True)
        ]
        said = self.verdicts.setdefault(call.name, [])
        for verdict, axis in zip(verdicts, listed, strict=True):
            if isinstance(axis, Unknown) and _told(verdict) not in said:
                said.append(_told(verdict))
        return settled if isinstance(axes, list) or len(settled) != 1 else settled[0]

    def _verdicts(self, call: TorchCall, results: Sequence[Tensor], formula: bool) -> list[Verdict] | None:
        """Of each result; None: nothing can be tried."""
        victims = _victims(call)
        if not results or not victims or _is_traced(call, results):
            return None
        flows = any(x.requires_grad for x in call.tensors() if id(x) in victims)
        for x in call.tensors():
            axis = call.axis_of(x)
            # data of which it is not known whose it is would do for a constant only beside what has a gradient
            if x.requires_grad or not flows:
                plain = isinstance(axis, Constant) and not axis.from_samples
                if not isinstance(axis, PerSample) and not plain:
                    return None
        if getattr(call.func, "namespace", "") in _OF_RANKS:
            return [Refused("all ranks take part in it, so that it can't be run again")] * len(results)
        keys = []
        with contextlib.suppress(NoKey):
            keys = [key_of(call, call.axis_of, victims, very=very) for very in (False, True)]
        before = next((found for key in keys if (found := known(key)) is not None), None)
        if before is not None and not any(isinstance(verdict, Placed) for verdict in before):
            return before
        if formula and keys and before is None:
            return None
        experiment = _Experiment(call, results, victims, Trials(call, self._unfollowed, self._kept))
        try:
            verdicts = experiment.verdicts() if before is None else experiment.placed_again(before)
        except Unfit as error:
            verdicts = [Refused(str(error))] * len(results)
        self.runs += experiment.trials.runs
        if keys and before is None and not experiment.of_these_tasks:
            keep(keys[0 if experiment.general else 1], verdicts)
        return verdicts


class _Experiment:
    """The experiments on one call.

    Attributes:
        general: whether the verdicts hold for other tensors in the place of those that carry no samples.
        of_these_tasks: what was refused might be right for other tasks of the samples.
    """

    def __init__(self, call: TorchCall, results: Sequence[Tensor], victims: dict[int, PerSample], trials: Trials):
        self.call, self.results, self.victims, self.trials = call, results, victims, trials
        self.general = self.of_these_tasks = False
        self.generator = torch.Generator().manual_seed(0)
        self.task_ids = next(iter(victims.values())).task_ids
        self.needs_gradient = any(x.requires_grad for x in trials.tensors if id(x) in victims)
        self.one = len({axis.task_ids.key for axis in victims.values()}) == 1  # all carry the same samples

    def verdicts(self) -> list[Verdict]:
        """Of each result."""
        random = self._check_that_it_repeats()
        if self.task_ids.partial:
            raise Unfit("some positions carry no sample")
        seeds = (SEED, _OTHER_SEED) if random else (SEED,)
        if not self.one:
            found: list[Layout | str] = ["it joins different samples"] * len(self.results)
        elif len(self.task_ids) < 2:
            # all is the one sample's
            found = [Layout(0, 1, x.shape[0]) if x.dim() else "it is a number" for x in self.results]
            self.general = True
        else:
            found = self._layouts(same, seeds)
            self.general = self._holds_for_others(found, seeds)
        verdicts = [self._verdict(k, layout, random) for k, layout in enumerate(found)]
        if not all_equal(self.trials.run(same), self._base):
            raise Unfit("it keeps a state: run again, it gives something else")
        return verdicts

    def _check_that_it_repeats(self) -> bool:
        """Whether it draws random numbers.

        Raises:
            Unfit: run again, it gives something else.
        """
        trials = self.trials
        try:
            self._base = trials.first_run()
            again, other = trials.run(same), trials.run(same, seed=_OTHER_SEED)
        except Unfit:
            raise
        except FAILURES as error:
            raise Unfit(f"it can't be run again ({type(error).__name__}: {error})") from error
        if not all_equal(self._base, again):
            raise Unfit("run again, it gives something else")
        random = not all_equal(self._base, other)
        if len(self._base) != len(self.results):
            raise Unfit("how many results it gives depends on more than its arguments")
        pairs = zip(self._base, self.results, strict=True)
        if not random and not trials.writes and not all(close(a, b.detach()) for a, b in pairs):
            raise Unfit("run again, it gives something else")
        return random

    def _layouts(
        self, others: Callable[[Tensor], Tensor], seeds: Sequence[int], kinds: Sequence[str] = KINDS
    ) -> list[Layout | str]:
        """As seen under every seed."""
        copies: dict[int, Tensor] = {}

        def other(x: Tensor) -> Tensor:
            # the same others in every run
            if id(x) not in copies:
                copies[id(x)] = others(x)
            return copies[id(x)].clone()

        try:
            runs = [
                layouts_seen(self.trials, self.victims, self.task_ids, other, self.generator, kinds=kinds, seed=seed)
                for seed in seeds
            ]
        except Unfit:
            raise
        except FAILURES as error:
            raise Unfit(f"it can't be run on other values ({type(error).__name__}: {error})") from error
        first = runs[0]
        return [
            x if all(x == run[k] for run in runs) else "how its samples lie depends on random numbers"
            for k, x in enumerate(first)
        ]

    def _holds_for_others(self, found: Sequence[Layout | str], seeds: Sequence[int]) -> bool:
        """Whether it is the same with other values of the tensors through which no gradient flows."""
        others = [x for x in self.trials.tensors if id(x) not in self.victims]
        if not others:
            return True
        if any(not varies(x) for x in others):
            return False  # there are no other values of which it is known that the call takes them
        try:
            return all(
                self._layouts(functools.partial(self._other, how), seeds, TELLING) == found
                for how in ("turned", "moved", "shuffled", "values", "mixed")
            )
        except Unfit:
            return False

    def _other(self, how: str, x: Tensor) -> Tensor:
        """Other values of a tensor: those of its samples or elements in another order, or others than there were."""
        axis = self.call.axis_of(x)
        if how == "values":
            return other_values(x)
        if how == "mixed":  # of what has one value everywhere, such as a mask of ones, the others are no other order
            some = torch.rand(x.shape, generator=self.generator) < 0.5
            return same_memory(x).copy_(torch.where(some.to(x.device), other_values(x), x.detach()))
        n = len(axis.task_ids) if isinstance(axis, PerSample) else x.numel()
        order = torch.arange(n)
        order = {"turned": order.flip(0), "moved": order.roll(1)}.get(how, torch.randperm(n, generator=self.generator))
        if isinstance(axis, PerSample):
            return permuted(x, axis, order)
        return same_memory(x).copy_(x.detach().reshape(-1)[order.to(x.device)].reshape(x.shape))

    def placed_again(self, before: Sequence[Verdict]) -> list[Verdict]:
        """The verdicts of an earlier call, with new ones in the place of those that held for it alone."""
        return [self._unordered(k, v, False) if isinstance(v, Placed) else v for k, v in enumerate(before)]

    def _verdict(self, k: int, layout: Layout | str, random: bool) -> Verdict:
        result = self.results[k]
        if isinstance(layout, Layout):
            if not result.requires_grad:
                return layout
            labels = along(samples_at(layout.of(self.task_ids)), result.dim(), layout.axis)
            why = self._backwards(k, labels, samples_at)
            return Refused(why, "mixes" in why) if why else layout
        mixes = "mixes" in layout
        if not result.requires_grad or not self.needs_gradient:
            return Refused(layout, mixes)
        return self._unordered(k, layout, random)

    def _unordered(self, k: int, before: str | Placed, random: bool) -> Verdict:
        """Of a result in which the samples lie in no order: each element may belong to one task, or be a sum.

        Args:
            before: why there is no order, or how it was in an earlier call.
        """
        verdict: Verdict = Refused(before, "mixes" in before) if isinstance(before, str) else Refused("")
        if self.results[k].dim() and not random:
            verdict = self._placed(k, before)
            if isinstance(verdict, Placed):
                return verdict
        try:
            if self.one and is_a_sum(self.trials, self.victims, k, self.task_ids, self.generator, seed=SEED):
                return Summed()
        except Unfit:
            raise
        except FAILURES as error:
            return Refused(f"its gradients can't be taken again ({type(error).__name__}: {error})")
        return verdict if self.results[k].dim() else Refused("it mixes samples, and is no sum over them", mixes=True)

    def _placed(self, k: int, before: str | Placed) -> Verdict:
        """Whose each element is in this very call. `before`: what was seen of it already."""
        if not all(axis.task_ids.on_host() and not axis.task_ids.partial for axis in self.victims.values()):
            return Refused("the host does not know the tasks of its samples")
        self.of_these_tasks = True
        try:
            owners = owners_seen(self.trials, self.victims, self.generator, seed=SEED)[k]
        except FAILURES as error:
            # values that it does not take: it is refused for what was seen before, if anything was
            why = f"it can't be run on other values ({type(error).__name__}: {error})"
            return Refused(why) if isinstance(before, Placed) else Refused(before, "mixes" in before)
        if isinstance(owners, str):
            return Refused(owners, "mixes" in owners)
        axis = axis_of_owners(owners, self.task_ids.num_rows)
        if axis is None:
            return Refused("its elements belong to tasks in no order of an axis")
        why = self._backwards(k, owners, PerSample.positions)
        if why:
            return Refused(why, "mixes" in why)
        self.of_these_tasks = False
        return Placed(axis)

    def _backwards(self, k: int, labels: Tensor, label_of: Callable[[PerSample], Tensor]) -> str:
        try:
            return reaches_its_own(self.trials, self.victims, k, labels, label_of, self.generator, seed=SEED)
        except Unfit:
            raise
        except FAILURES as error:
            return f"its gradients can't be taken again ({type(error).__name__}: {error})"


def _victims(call: TorchCall) -> dict[int, PerSample]:
    """The tensors whose samples an experiment changes: those through which a gradient flows, or all if none does."""
    carried = {}
    for x in call.tensors():
        axis = call.axis_of(x)
        if isinstance(axis, PerSample):
            carried[x] = axis
    needing = {x: axis for x, axis in carried.items() if x.requires_grad}
    return {id(x): axis for x, axis in (needing or carried).items()}


def _read(call: TorchCall, verdict: Verdict, before: Unknown, x: Tensor, task_ids: TaskIds) -> SampleAxis:
    """What a verdict says of a result."""
    if isinstance(verdict, Layout):
        return verdict.of(task_ids)
    if isinstance(verdict, Summed):
        return SAMPLE_SUM
    if isinstance(verdict, Placed):
        return verdict.axis
    why = f"{before.why} by a rule, and by experiment {verdict.why}"
    return MixedSamples(why) if verdict.mixes and x.requires_grad else Unknown(why)


def _told(verdict: Verdict) -> str:
    """For a person."""
    if isinstance(verdict, Layout):
        merged = "" if verdict.outer == verdict.inner == 1 else ", merged with others"
        return f"samples along axis {verdict.axis}{merged}"
    if isinstance(verdict, Summed):
        return "a sum over samples"
    if isinstance(verdict, Placed):
        return f"tasks along axis {verdict.axis.axis}, looked at in each step"
    return f"refused: {verdict.why}"
