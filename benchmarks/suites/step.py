"""Suite `step`: whole training steps; here of four tasks on overlaid handwritten digits, all on the same samples."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastmtl
from fastmtl import methods
from fastmtl.benchmarks.baselines import peers
from fastmtl.benchmarks.baselines import surgery as baselines
from fastmtl.benchmarks.runner.registry import REUSE, Candidate, Case, Check
from fastmtl.benchmarks.suites import step_accuracy, step_following, step_mixed_batches
from fastmtl.benchmarks.workloads import digits
from fastmtl.ops.gradients import reference

BATCH = 64
STEPS, QUICK_STEPS = 120, 20
PASSES, QUICK_PASSES = 40, 15
# steps from one solution of the weights to the next; a sample is as many steps as the largest
EVERY = (1, 4, 16)
COURSES, QUICK_COURSES = 5, 1


@dataclass
class Trainee:
    """One model in training, with everything that its method needs."""

    model: digits.Network
    optimizer: torch.optim.Optimizer
    port: baselines.PortPCGrad
    every: methods.Every
    engine: Any = None
    batches: int = 0

    @property
    def shared(self) -> list[nn.Parameter]:
        return list(self.model.backbone.parameters())


@dataclass
class Classroom:
    """The pictures, one trainee per method, all from the same start and on the same batches."""

    pictures: digits.Pictures
    device: torch.device
    batch_size: int
    widths: tuple[int, ...]
    trainees: dict[str, Trainee] = field(default_factory=dict)
    chunk: int | None = None
    every: int = 1

    def new(self, label: str) -> Trainee:
        torch.manual_seed(0)
        model = digits.Network(self.widths).to(self.device)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        # the sum, as the other methods have it, so that all train at the same rate
        port = baselines.PortPCGrad(optimizer, reduction="sum")
        trainee = Trainee(model, optimizer, port, methods.Every(methods.PCGrad(), self.every))
        if label == "torchjd_autogram":
            trainee.engine = peers.engine(model.backbone)
        return trainee

    def batch(self, label: str) -> Batch:
        """The trainee's next batch; gradients of the last step are gone."""
        if label not in self.trainees:
            self.trainees[label] = self.new(label)
        trainee = self.trainees[label]
        pictures, labels = self.pictures.batch(trainee.batches, self.batch_size)
        trainee.batches += 1
        trainee.optimizer.zero_grad(set_to_none=True)
        labels = {task: x.to(self.device) for task, x in labels.items()}
        return Batch(trainee, pictures.to(self.device), labels, self.chunk)


@dataclass
class Batch:
    trainee: Trainee
    pictures: Tensor
    labels: dict[str, Tensor]
    chunk: int | None
    features: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)

    def forward(self) -> dict[str, Tensor]:
        self.features, scores = self.trainee.model(self.pictures)
        self.losses = digits.losses(scores, self.labels)
        return self.losses


# --- how each method fills `.grad`, from a batch that went forward


def ours(batch: Batch) -> None:
    fastmtl.backward(batch.losses)


def reusing(batch: Batch) -> None:
    fastmtl.backward(batch.losses, method=batch.trainee.every)


def plain_sum(batch: Batch) -> None:
    sum(batch.losses.values()).backward()  # type: ignore[union-attr]


def port(batch: Batch) -> None:
    batch.trainee.port.pc_backward(list(batch.losses.values()))


def plain(batch: Batch) -> None:
    baselines.plain_backward(list(batch.losses.values()), batch.trainee.model, batch.trainee.shared)


def torchjd(batch: Batch) -> None:
    assert batch.features is not None
    peers.backward(list(batch.losses.values()), batch.features, batch.trainee.shared, batch.chunk)


def torchjd_autogram(batch: Batch) -> None:
    peers.engine_backward(list(batch.losses.values()), batch.trainee.engine)


def task_passes(batch: Batch) -> None:
    """One backward pass per task and nothing else: what no method that needs every task's gradient can avoid."""
    model, count = batch.trainee.model, len(batch.losses)
    shared = batch.trainee.shared
    for t, (task, loss) in enumerate(batch.losses.items()):
        torch.autograd.grad(loss, [*shared, *model.heads[task].parameters()], retain_graph=t < count - 1)


def _step(method: Callable[[Batch], None], batch: Batch) -> None:
    batch.forward()
    method(batch)
    batch.trainee.optimizer.step()


def _step_candidates() -> tuple[Candidate, ...]:
    return (
        Candidate("ours", partial(_step, ours), "fastmtl.backward(losses)", "ours"),
        Candidate("sum", partial(_step, plain_sum), "sum(losses).backward(): no surgery", "yardstick"),
        Candidate("naive", partial(_step, port), "the optimizer wrapper that most people copy, written anew"),
        Candidate("plain", partial(_step, plain), "T autograd.grad into one bank, `G @ G.T`, `w @ G`"),
        peers.candidate("torchjd", partial(_step, torchjd), "mtl_backward with the fastest chunk size, PCGrad"),
        peers.candidate("torchjd_autogram", partial(_step, torchjd_autogram), "autogram engine, PCGradWeighting"),
    )


# --- the check


def _possible_weights(gram: Tensor) -> Tensor:
    """Every weight vector that PCGrad can arrive at from this Gram matrix, over all visiting orders: `[n, T]`."""
    num_tasks = gram.shape[0]
    permutations = list(itertools.permutations(range(num_tasks - 1)))
    by_row: list[list[Tensor]] = [[] for _ in range(num_tasks)]
    for permutation in permutations:
        others = [[j for j in range(num_tasks) if j != i] for i in range(num_tasks)]
        order = torch.tensor([[row[k] for k in permutation] for row in others])
        for row, c in zip(by_row, reference.pcgrad_coefficients(gram, order), strict=True):
            row.append(c)
    return torch.stack([torch.stack(rows).sum(0) for rows in itertools.product(*by_row)])


def _error_of_update(got: Tensor, bank: Tensor, solved_for: Tensor) -> Tensor:
    """How far `[P]` is from the sum of the rows of `[T, P]` with weights that PCGrad can arrive at for `solved_for`."""
    possible = _possible_weights(reference.gram(solved_for))
    weights = torch.linalg.lstsq(bank.mT, got[:, None]).solution[:, 0]
    nearest = possible[(possible - weights).norm(dim=1).argmin()]
    expected = nearest @ bank
    return (got - expected).norm() / expected.norm()


def check_surgery(classroom: Classroom, call: Callable[[Batch], Any], *, forward_first: bool) -> Check:
    """The gradients that a call leaves must be PCGrad's, for one of the visiting orders; a head's, its own."""
    batch = classroom.batch("check")
    del classroom.trainees["check"]
    model, shared = batch.trainee.model, batch.trainee.shared
    rows, own = [], []
    for task, loss in batch.forward().items():
        head = list(model.heads[task].parameters())
        grads = torch.autograd.grad(loss, [*shared, *head], retain_graph=True)
        rows.append(baselines.flatten(grads[: len(shared)]).double().cpu())
        own += list(zip(head, grads[len(shared) :], strict=True))
    bank = torch.stack(rows)
    if forward_first:
        batch.forward()
    call(batch)
    if any(p.grad is None for p in model.parameters()):
        return Check(float("nan"), 1e-4, "a parameter has no gradient")
    got = baselines.flatten(p.grad for p in shared).double().cpu()
    errors = [_error_of_update(got, bank, bank)]
    errors += [((p.grad - g).norm() / g.norm()).double().cpu() for p, g in own]
    # torch.max hands NaN on
    return Check(float(torch.stack(errors).max()), 1e-4, "float64 oracle, over all visiting orders")


# --- the cases


def _make(device: torch.device, batch_size: int, widths: tuple[int, ...]) -> Classroom:
    random.seed(0)
    classroom = Classroom(digits.Pictures(), device, batch_size, widths)
    if peers.torchjd_missing() is None:

        def step(chunk: int | None) -> None:
            batch = classroom.batch("tuning")
            batch.chunk = chunk
            _step(torchjd, batch)

        classroom.chunk = peers.tune_chunk(step, len(digits.TASKS))
        del classroom.trainees["tuning"]
    return classroom


def _params(batch_size: int, widths: Sequence[int], steps: int) -> dict[str, Any]:
    return {"T": len(digits.TASKS), "dtype": "float32", "batch": batch_size, "widths": list(widths), "steps": steps}


def training_case(steps: int, batch_size: int = BATCH, widths: tuple[int, ...] = (32, 64, 128)) -> Case:
    """Whole steps (forward, surgery, Adam), every method training its own model on the same batches."""

    def finish(classroom: Classroom) -> dict[str, Any]:
        pictures, labels = classroom.pictures.held_out()
        labels = {task: x.to(classroom.device) for task, x in labels.items()}
        pictures = pictures.to(classroom.device)
        trained: Mapping[str, Trainee] = classroom.trainees
        model = trained["ours"].model
        return {
            "accuracy": {label: digits.accuracy(x.model, pictures, labels) for label, x in trained.items()},
            "steps_trained": {label: x.batches for label, x in trained.items()},
            "torchjd_parallel_chunk_size": classroom.chunk,
            "shared_parameters": sum(p.numel() for p in model.backbone.parameters()),
            "shared_tensors": len(list(model.backbone.parameters())),
        }

    return Case(
        suite="step",
        name="digits training step",
        op="training step",
        covers=frozenset(),
        params=_params(batch_size, widths, steps),
        make=lambda device: _make(device, batch_size, widths),
        candidates=_step_candidates(),
        check=partial(check_surgery, forward_first=False),
        prepare=lambda classroom, label: classroom.batch(label),
        reps=steps,
        finish=finish,
        quick=True,
    )


def backward_case(passes: int, batch_size: int = BATCH, widths: tuple[int, ...] = (32, 64, 128)) -> Case:
    """`fastmtl.backward` alone, over the T backward passes that it contains."""

    def prepare(classroom: Classroom, label: str) -> Batch:
        batch = classroom.batch(label)
        batch.forward()
        return batch

    return Case(
        suite="step",
        name="digits backward",
        op="backward",
        covers=frozenset(),
        params=_params(batch_size, widths, passes),
        make=lambda device: Classroom(digits.Pictures(), device, batch_size, widths),
        candidates=(
            Candidate("ours", ours, "fastmtl.backward(losses)", "ours"),
            Candidate("t_backwards", task_passes, "T autograd.grad passes, nothing else", "yardstick"),
        ),
        check=partial(check_surgery, forward_first=True),
        prepare=prepare,
        reps=passes,
        quick=True,
    )


@dataclass
class Course:
    """Steps in a row: what a sample is where one step in several costs more than the others."""

    classroom: Classroom
    label: str
    steps: int = max(EVERY)

    def run(self, method: Callable[[Batch], None]) -> None:
        for _ in range(self.steps):
            _step(method, self.classroom.batch(self.label))


def check_reuse(classroom: Classroom, call: Callable[[Course], Any]) -> Check:
    """The gradients that a second step leaves must be the task gradients' sum with weights that PCGrad may have made at
    the step at which it was asked last; a head's, its own."""
    course = Course(classroom, "check", steps=2)
    trainee = classroom.trainees["check"] = classroom.new("check")
    for group in trainee.optimizer.param_groups:
        group["lr"] = 0.0  # so that both steps are at one point
    call(course)
    model, shared = trainee.model, trainee.shared
    got = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    if any(g is None for g in got):
        return Check(float("nan"), 1e-4, "a parameter has no gradient")
    grads = dict(zip(model.parameters(), got, strict=True))
    trainee.batches = 0
    banks, errors = [], []
    for _ in range(2):
        rows = []
        for task, loss in classroom.batch("check").forward().items():
            head = list(model.heads[task].parameters())
            mine = torch.autograd.grad(loss, [*shared, *head], retain_graph=True)
            rows.append(baselines.flatten(mine[: len(shared)]).double().cpu())
            errors += [
                ((grads[p] - g).norm() / g.norm()).double().cpu()
                for p, g in zip(head, mine[len(shared) :], strict=True)
            ]
        banks.append(torch.stack(rows))
    del classroom.trainees["check"], errors[: len(errors) // 2]
    update = baselines.flatten(grads[p] for p in shared).double().cpu()
    errors.append(_error_of_update(update, banks[1], banks[0 if classroom.every > 1 else 1]))
    return Check(float(torch.stack(errors).max()), 1e-4, "float64 oracle, over all visiting orders")


def reuse_case(every: int, courses: int, batch_size: int = BATCH, widths: tuple[int, ...] = (32, 64, 128)) -> Case:
    """Whole steps whose weights are solved for at every k-th of them, over plain steps."""
    return Case(
        suite="step",
        name=f"digits, {max(EVERY)} steps, weights at every " + (f"{every}th" if every > 1 else "step"),
        op=REUSE,
        covers=frozenset(),
        params=_params(batch_size, widths, max(EVERY)) | {"every": every},
        make=lambda device: Classroom(digits.Pictures(), device, batch_size, widths, every=every),
        candidates=(
            Candidate("ours", lambda course: course.run(reusing), f"methods.Every(methods.PCGrad(), {every})", "ours"),
            Candidate("sum", lambda course: course.run(plain_sum), "sum(losses).backward(): no surgery", "yardstick"),
        ),
        check=check_reuse,
        prepare=Course,
        reps=courses,
        memory_of=frozenset(),
        quick=True,
    )


def cases(device: torch.device, quick: bool = False) -> list[Case]:
    """The suite: batches of one task per sample, then several losses on the same samples; `quick`: fewer steps."""
    several = [backward_case(QUICK_PASSES if quick else PASSES), training_case(QUICK_STEPS if quick else STEPS)]
    several += [reuse_case(every, QUICK_COURSES if quick else COURSES) for every in EVERY]
    mixed = [*step_mixed_batches.cases(device, quick), *step_following.cases(quick)]
    return [*mixed, *several, *step_accuracy.cases(quick)]
