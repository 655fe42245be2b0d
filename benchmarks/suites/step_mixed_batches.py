"""Rows of suite `step` in which every sample of a batch has one task: training steps with PCGrad over T tasks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

import fastmtl
from fastmtl.benchmarks.baselines import peers
from fastmtl.benchmarks.baselines import surgery as baselines
from fastmtl.benchmarks.runner import measure
from fastmtl.benchmarks.runner.registry import TASK_STEP, Candidate, Case, Check
from fastmtl.benchmarks.workloads.networks import (
    DIGITS,
    FULL_RESNET,
    FULL_RESNET_64,
    RESNET,
    RESNET_64,
    RL,
    VIT,
    Workload,
)
from fastmtl.ops.gradients import reference

TASKS = (2, 4, 8, 16)
RL_TASKS = (2, 8, 16, 50)
# how far a candidate's update may be from the oracle's: see `difference`. A GPU's convolutions round to TF32 by
# default, and by another algorithm for each batch size
TOLERANCE = {"cpu": 1e-5, "cuda": 5e-3}
# up to which an error may be rounding: it may be twice what float32 is off itself, see `Workshop.rounding`
MOST_ROUNDING = 1e-2
# whose Gram matrix is float32 throughout: of a ViT's gradients it was 3e-4 off, and UPGrad's update 3e-3
FLOAT32_GRAM = frozenset(("torchjd", "torchjd_upgrad", "torchjd_autogram"))
# what a check must be able to tell apart: PCGrad's update from the plain sum
CONFLICT = 2e-2
# seeds what TorchJD draws in the step that is checked; all other candidates are given that order
SEED = 7


@dataclass
class Batch:
    """A batch of N samples, and what a loop over its tasks can know of it beforehand."""

    x: Tensor
    y: Tensor
    task_ids: Tensor
    # 1 / samples of the task: with them a sum of sample losses is the sum of the tasks' mean losses
    weights: Tensor
    # a slice where the ids are sorted, else positions
    of_task: list[slice | Tensor]


def draw_ids(batch: int, num_tasks: int, in_order: bool, seed: int = 2) -> Tensor:
    """Task ids `[batch]`, drawn uniformly except that every task has a sample; their numbers differ."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(num_tasks, (batch - num_tasks,), generator=generator)
    ids = torch.cat([torch.arange(num_tasks), drawn])
    return ids.sort().values if in_order else ids[torch.randperm(batch, generator=generator)]


def make_batch(workload: Workload, num_tasks: int, in_order: bool, device: torch.device) -> Batch:
    ids = draw_ids(workload.batch, num_tasks, in_order)
    x, y = workload.data(ids)
    counts = torch.bincount(ids, minlength=num_tasks)
    ends = counts.cumsum(0).tolist()
    of_task: list[slice | Tensor] = [
        slice(end - count, end) if in_order else (ids == t).nonzero()[:, 0].to(device)
        for t, (end, count) in enumerate(zip(ends, counts.tolist(), strict=True))
    ]
    return Batch(x.to(device), y.to(device), ids.to(device), (1 / counts)[ids].to(device), of_task)


@dataclass
class Trainee:
    """One model in training by one method, on a batch that it shares with all others."""

    workload: Workload
    batch: Batch
    model: nn.Module
    optimizer: torch.optim.Optimizer
    chunk: int | None = None
    # given in the step that is checked, else each step draws one
    order: Tensor | None = None
    engine: Any = None
    bank: Tensor | None = None

    @property
    def params(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @property
    def method(self) -> str | fastmtl.methods.PCGrad:
        return "pcgrad" if self.order is None else fastmtl.methods.PCGrad(order=self.order)

    def sample_losses(self) -> Tensor:
        """Forward pass of the mixed batch; `[N]`: their sum is the sum of the tasks' mean losses."""
        return self.weighted_losses(self.batch.x, self.batch.y, self.batch.weights)

    def weighted_losses(self, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        return self.workload.losses(self.model(x), y) * weights

    def task_losses(self) -> tuple[Tensor, ...]:
        """Forward pass of the mixed batch, and the T mean losses."""
        losses = self.sample_losses()
        by_task = torch.zeros(len(self.batch.of_task), device=losses.device, dtype=losses.dtype)
        return by_task.index_add(0, self.batch.task_ids, losses).unbind()

    def task_loss(self, task: int) -> Tensor:
        """Forward pass of one task's samples, and their mean loss."""
        which = self.batch.of_task[task]
        return self.workload.losses(self.model(self.batch.x[which]), self.batch.y[which]).mean()


# --- how each method fills `.grad`


def plain_sum(trainee: Trainee) -> None:
    trainee.sample_losses().sum().backward()


def one_pass(trainee: Trainee, memory: str = "bank", sort: bool = False) -> None:
    batch = trainee.batch
    given = batch.x, batch.y, batch.weights
    with fastmtl.one_pass(trainee.model, batch.task_ids, len(batch.of_task), memory=memory, sort=sort) as bank:
        trainee.weighted_losses(*(bank.sorted(*given) if sort else given)).sum().backward()
    bank.apply(trainee.method)


def backward(trainee: Trainee) -> None:
    fastmtl.backward(trainee.task_losses(), shared=trainee.model, method=trainee.method)


def _operate(trainee: Trainee, fill: Callable[[Tensor], None]) -> None:
    """PCGrad in plain torch on a bank that is kept between the steps and filled anew."""
    params = trainee.params
    if trainee.bank is None:
        shape = len(trainee.batch.of_task), sum(p.numel() for p in params)
        trainee.bank = torch.empty(shape, device=params[0].device)
    fill(trainee.bank)
    # of the two the faster on the device
    pcgrad = baselines.plain_pcgrad if trainee.bank.is_cuda else baselines.blocked_pcgrad
    update = pcgrad(trainee.bank, trainee.order)
    for p, g in zip(params, baselines.unflatten(update, params), strict=True):
        p.grad = g


def per_task(trainee: Trainee) -> None:
    def fill(bank: Tensor) -> None:
        for t, row in enumerate(bank):
            grads = torch.autograd.grad(trainee.task_loss(t), trainee.params)
            torch.cat([g.reshape(-1) for g in grads], out=row)

    _operate(trainee, fill)


def per_task_bank(trainee: Trainee) -> None:
    num_tasks = len(trainee.batch.of_task)
    bank = fastmtl.GradientBank(trainee.model, num_tasks, shared=trainee.model)
    for t in range(num_tasks):
        with bank.task(t):
            trainee.task_loss(t).backward()
    bank.apply(trainee.method)


def t_backwards(trainee: Trainee) -> None:
    def fill(bank: Tensor) -> None:
        losses = trainee.task_losses()
        for t, row in enumerate(bank):
            grads = torch.autograd.grad(losses[t], trainee.params, retain_graph=t < len(bank) - 1)
            torch.cat([g.reshape(-1) for g in grads], out=row)

    _operate(trainee, fill)


def _seed(trainee: Trainee) -> None:
    """TorchJD takes no order: it draws from torch's generator."""
    if trainee.order is not None:
        torch.manual_seed(SEED)


def torchjd(trainee: Trainee, name: str = "PCGrad") -> None:
    losses = trainee.task_losses()
    _seed(trainee)
    peers.jacobian_backward(losses, trainee.params, name, trainee.chunk)


def torchjd_autogram(trainee: Trainee) -> None:
    if trainee.engine is None:
        trainee.engine = peers.engine(trainee.model)
    losses = trainee.task_losses()
    _seed(trainee)
    peers.engine_backward(losses, trainee.engine)


def step(method: Callable[[Trainee], None], trainee: Trainee) -> None:
    """One training step; `.grad` was freed before it."""
    method(trainee)
    trainee.optimizer.step()


# label -> kind, how it fills `.grad`, in words
METHODS: dict[str, tuple[Literal["ours", "baseline", "yardstick"], Callable[[Trainee], None], str]] = {
    "ours": ("ours", one_pass, "fastmtl.one_pass: one forward, one backward"),
    "streamed": ("yardstick", partial(one_pass, memory="stream"), 'fastmtl.one_pass(memory="stream")'),
    "sorting": ("yardstick", partial(one_pass, sort=True), "fastmtl.one_pass(sort=True)"),
    "per_task": ("baseline", per_task, "a forward and backward per task on its samples, plain torch"),
    "per_task_bank": ("baseline", per_task_bank, "the same with fastmtl.GradientBank"),
    "sum": ("yardstick", plain_sum, "the sum of the losses: no surgery"),
    "t_backwards": ("baseline", t_backwards, "one forward of the mixed batch, T autograd.grad, plain torch"),
    "torchjd": ("baseline", torchjd, "backward with the fastest chunk size, PCGrad"),
    "torchjd_upgrad": ("baseline", partial(torchjd, name="UPGrad"), "the same with UPGrad"),
    "torchjd_autogram": ("baseline", torchjd_autogram, "autogram engine, PCGradWeighting"),
    "backward": ("baseline", backward, "fastmtl.backward of the T losses"),
}


# forward and backward of every sample once or twice, however many tasks there are
SINGLE_PASS = ("ours", "streamed", "sorting", "sum", "per_task", "per_task_bank")
FEWEST = 7


def candidates(labels: Sequence[str], left_out: Mapping[str, str]) -> tuple[Candidate, ...]:
    found = []
    for label in labels:
        kind, method, detail = METHODS[label]
        call = partial(step, method)
        reason = left_out.get(label)
        if label.startswith("torchjd"):
            missing = peers.upgrad_missing() if label.endswith("upgrad") else None
            found.append(peers.candidate(label, call, detail, only_if=missing or reason))
        else:
            found.append(Candidate(label, call, detail, kind, unavailable=reason))
    return tuple(found)


# --- the oracle


def oracle_rows(workload: Workload, model: nn.Module, batch: Batch) -> Tensor:
    """T flat gradients `[T, P]` in the model's dtype, each from a forward and backward pass of one task's samples."""
    params = list(model.parameters())
    x = batch.x.to(params[0].dtype)
    return torch.stack(
        [
            baselines.flatten(torch.autograd.grad(workload.losses(model(x[which]), batch.y[which]).mean(), params))
            for which in batch.of_task
        ]
    ).cpu()


def rule(label: str) -> str:
    """What a candidate's update is: that of the plain sum, of TorchJD's UPGrad, or of PCGrad."""
    return {"sum": "sum", "torchjd_upgrad": "upgrad"}.get(label, "pcgrad")


def expected_weights(gram: Tensor, order: Tensor) -> dict[str, Tensor]:
    """The weights `[T]` by rule, from the oracle's Gram matrix and the order of the step that is checked."""
    found = {
        "sum": torch.ones(len(gram), dtype=gram.dtype),
        "pcgrad": reference.pcgrad_coefficients(gram, order).sum(0),
    }
    if peers.upgrad_missing() is None:
        found["upgrad"] = peers.upgrad_weights(gram)
    return found


def difference(got: Sequence[Tensor | None], expected: Sequence[Tensor]) -> float:
    """Relative error of an update, or a tenth of that of its worst tensor; NaN if one is missing or not finite.

    A tensor's error is measured by its norm, or by what an average tensor of its size has in this update if that is
    more: where the exact gradient is nearly zero (of a bias before a norm, for one), float32 leaves rounding errors.
    """
    if any(g is None for g in got):
        return float("nan")
    norms = torch.stack([e.norm() for e in expected])
    errors = torch.stack(
        [(g.detach().double().cpu() - e).norm() for g, e in zip(got, expected, strict=True) if g is not None]
    )
    sizes = torch.tensor([e.numel() for e in expected], dtype=torch.float64)
    average = norms.norm() * (sizes / sizes.sum()).sqrt()
    worst = (errors / torch.maximum(norms, average)).max()
    # torch.maximum hands NaN on
    return float(torch.maximum(errors.norm() / norms.norm(), worst / 10))


# --- the cases


@dataclass
class Workshop:
    """One trainee per method, all from the same start, and what the first step of each must leave in `.grad`."""

    workload: Workload
    num_tasks: int
    batch: Batch
    device: torch.device
    chunk: int | None = None
    trainees: dict[str, Trainee] = field(default_factory=dict)
    expected: Mapping[str, list[Tensor]] = field(default_factory=dict)
    order: Tensor = field(init=False)
    # by whether the Gram matrix is float32 too, and by rule
    _rounding: dict[bool, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.order = peers.drawn_order(self.num_tasks, SEED)

    def new(self) -> Trainee:
        model = self.workload.model().to(self.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        return Trainee(self.workload, self.batch, model, optimizer, self.chunk)

    def expect(self) -> None:
        """Works out what the first step of each rule must leave in `.grad`.

        Raises:
            RuntimeError: PCGrad's update is that of the plain sum, so that no check could tell them apart.
        """
        model = self.new().model.double()
        bank = oracle_rows(self.workload, model, self.batch)
        weights = expected_weights(reference.gram(bank), self.order)
        self.expected = self._updates(weights, bank)
        self._rounding = {}
        apart = difference(self.expected["sum"], self.expected["pcgrad"])
        if not apart > CONFLICT:
            raise RuntimeError(f"the tasks don't conflict: PCGrad's update is the sum's to {apart:.1g}")

    def _updates(self, weights: Mapping[str, Tensor], bank: Tensor) -> dict[str, list[Tensor]]:
        params = list(self.new().model.parameters())
        return {rule: baselines.unflatten(w.double() @ bank.double(), params) for rule, w in weights.items()}

    def rounding(self, label: str) -> float:
        """How far a forward and backward pass per task in float32 is off, and one in float64 with weights that are
        rounded otherwise: of the tens of millions of ReLUs in a step some are that near to zero. For TorchJD's ways the
        same from a Gram matrix in float32."""
        float32_gram = label in FLOAT32_GRAM
        if float32_gram not in self._rounding:
            rows, moved = (oracle_rows(self.workload, model, self.batch) for model in (self.new().model, self._moved()))
            matrices = {False: (rows.double(), moved), True: (rows,)}[float32_gram]
            found = [self._updates(expected_weights((m @ m.T).double(), self.order), m) for m in matrices]
            self._rounding[float32_gram] = {
                rule: max(difference(updates[rule], self.expected[rule]) for updates in found) for rule in self.expected
            }
        return self._rounding[float32_gram][rule(label)]

    def _moved(self) -> nn.Module:
        """The network in float64, its weights off by what float32 leaves out."""
        model = self.new().model.double()
        generator = torch.Generator().manual_seed(SEED)
        with torch.no_grad():
            for p in model.parameters():
                noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
                p.mul_(1 + torch.finfo(torch.float32).eps / 2 * noise.to(p.device))
        return model

    def verify(self, label: str, call: Callable[[Trainee], Any]) -> Check:
        """The first step of a method, in the given order; its trainee goes on from there in the timing."""
        trainee = self.trainees[label] = self.new()
        trainee.order = self.order.to(self.device)
        with measure.without_tf32():
            call(trainee)
        trainee.order = None
        error = difference([p.grad for p in trainee.params], self.expected[rule(label)])
        tolerance = TOLERANCE[self.device.type]
        if tolerance < error <= MOST_ROUNDING:
            with measure.without_tf32():
                tolerance = max(tolerance, 2 * self.rounding(label))
        return Check(error, tolerance, f"{rule(label)} in float64 of a forward and backward per task")

    def prepare(self, label: str) -> Trainee:
        """The trainee of a method before its next step, without gradients."""
        if label not in self.trainees:
            self.trainees[label] = self.new()
        trainee = self.trainees[label]
        trainee.optimizer.zero_grad(set_to_none=True)
        return trainee

    def prepare_memory(self, label: str) -> Trainee:
        """A trainee that holds what a plain step leaves: what a method keeps between its steps is its own memory."""
        self.trainees.pop(label, None)
        trainee = self.new()
        step(plain_sum, trainee)
        trainee.optimizer.zero_grad(set_to_none=True)
        return trainee


def check(workshop: Workshop, call: Callable[[Trainee], Any]) -> Check:
    """The gradient that ours leaves must be PCGrad's in a given order, from T passes of a task's samples alone."""
    workshop.expect()
    return workshop.verify("ours", call)


def verify(workshop: Workshop, candidate: Candidate) -> Check:
    return workshop.verify(candidate.label, candidate.call)


# (network, tasks that ran at once, device) -> TorchJD's fastest chunk size
_CHUNKS: dict[tuple[str, int, str], int | None] = {}


def tune(workshop: Workshop) -> int | None:
    """TorchJD's fastest chunk size: on a GPU for these tasks, on a CPU, where it takes long, for the first four."""
    num_tasks = workshop.num_tasks if workshop.device.type == "cuda" else min(4, workshop.num_tasks)
    key = workshop.workload.name, num_tasks, workshop.device.type
    if key not in _CHUNKS:
        trainee = workshop.new()

        def run(chunk: int | None) -> None:
            losses = trainee.task_losses()[:num_tasks]
            peers.jacobian_backward(losses, trainee.params, "PCGrad", chunk)
            trainee.optimizer.zero_grad(set_to_none=True)
            if workshop.device.type == "cuda":
                torch.cuda.synchronize(workshop.device)

        _CHUNKS[key] = peers.tune_chunk(run, num_tasks)
    return _CHUNKS[key]


def _make(workload: Workload, num_tasks: int, in_order: bool, device: torch.device, with_torchjd: bool) -> Workshop:
    workshop = Workshop(workload, num_tasks, make_batch(workload, num_tasks, in_order, device), device)
    if with_torchjd and peers.torchjd_missing() is None:
        workshop.chunk = tune(workshop)
    return workshop


@functools.cache
def parameters(workload: Workload) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in workload.build().parameters())


def task_case(
    workload: Workload,
    num_tasks: int,
    in_order: bool,
    *,
    labels: Sequence[str] = tuple(METHODS),
    left_out: Mapping[str, str] | None = None,
    quick: bool = False,
    memory_of: Sequence[str] | None = None,
    budget_s: float | None = None,
    fewest: int = FEWEST,
) -> Case:
    """Whole steps (forward, gradients, SGD with momentum), every method training its own model on the same batch.

    Args:
        workload, num_tasks, in_order: the network and its batch, the tasks, whether the batch is sorted by task.
        labels: which of `METHODS`.
        left_out: label -> why it is not tried here.
        memory_of: those whose peak memory is measured; None: all.
        budget_s: seconds of timing for all of them together.
        fewest: samples of those that need no T passes through the whole batch, in any case.
    """
    return Case(
        suite="step",
        name=f"{workload.name} T={num_tasks} {'sorted' if in_order else 'shuffled'}",
        op=TASK_STEP,
        covers=frozenset(),
        params={
            "T": num_tasks,
            "P": parameters(workload),
            "dtype": "float32",
            "batch": workload.batch,
            "network": workload.name,
            "sorted": in_order,
        },
        make=lambda device: _make(
            workload, num_tasks, in_order, device, "torchjd" in labels and "torchjd" not in (left_out or {})
        ),
        candidates=candidates(labels, left_out or {}),
        check=check,
        verify=verify,
        prepare=Workshop.prepare,
        prepare_memory=Workshop.prepare_memory,
        finish=lambda workshop: {"torchjd_parallel_chunk_size": workshop.chunk},
        quick=quick,
        memory_of=None if memory_of is None else frozenset(memory_of),
        budget_s=budget_s,
        at_least=dict.fromkeys(SINGLE_PASS, fewest),
    )


def _on_gpu() -> list[Case]:
    found = []
    for workload in (DIGITS, FULL_RESNET, FULL_RESNET_64, VIT, RL):
        for num_tasks in RL_TASKS if workload is RL else TASKS:
            for in_order in (False, True):
                telling = not in_order and num_tasks == (50 if workload is RL else 8)
                quick = telling and workload in (FULL_RESNET, RL)
                found.append(task_case(workload, num_tasks, in_order, quick=quick, budget_s=2 if quick else 5))
    return found


def _on_cpu(quick: bool) -> list[Case]:
    found = []
    for workload in (DIGITS, RESNET, VIT, RL):
        main = 50 if workload is RL else 8
        for num_tasks in RL_TASKS if workload is RL else TASKS:
            found.append(
                task_case(
                    workload,
                    num_tasks,
                    False,
                    # more steps of those that take long are worth the wait once
                    memory_of=None if num_tasks == main and not quick else SINGLE_PASS,
                    quick=workload in (DIGITS, RL) and num_tasks == 8,
                    budget_s=2 if quick else 5,
                )
            )
        # the order of the samples is nothing to those that take the whole batch T times
        found.append(task_case(workload, main, True, labels=SINGLE_PASS, budget_s=5))
    slow = "left out: T passes of this network take long on a CPU"
    left_out = {label: slow for label in METHODS if label not in SINGLE_PASS}
    for num_tasks in (8, 16):
        found.append(
            task_case(
                RESNET_64,
                num_tasks,
                False,
                left_out=left_out,
                memory_of=("ours", "streamed", "sum") if num_tasks == 8 else (),
                budget_s=5,
                fewest=3,
            )
        )
    return found


def cases(device: torch.device, quick: bool = False) -> list[Case]:
    """The rows; `quick`: a telling few. On a CPU half-width ResNets, and what takes long at few sizes only."""
    found = _on_gpu() if device.type == "cuda" else _on_cpu(quick)
    return [case for case in found if case.quick or not quick]
