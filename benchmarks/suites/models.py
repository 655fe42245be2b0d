"""Suite `models`: converted networks on batches that mix tasks, in training and in evaluation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastmtl import use_backend
from fastmtl.benchmarks.baselines import models as baselines
from fastmtl.benchmarks.runner import measure
from fastmtl.benchmarks.runner.registry import TAPS_MEMORY, Candidate, Case, Check
from fastmtl.benchmarks.suites.step_mixed_batches import Batch, difference, make_batch
from fastmtl.benchmarks.workloads.networks import EncoderLayer, PublishedResNet, ViT, Workload
from fastmtl.nn import TaskBatchNorm2d, convert, merge, tasks
from fastmtl.nn.layers.weights import TaskLayer
from fastmtl.nn.module import task_layers
from fastmtl.ops import TaskPlan, task_plan

TASKS = (2, 8, 32)
SCALING = 0.5
# how far outputs and gradients may be from those of a plain network for each task: see `difference`. Batch norms of a
# few pixels and samples of one task multiply rounding errors: a tiny ResNet was 1e-5 off. A GPU's convolutions round to
# TF32 by default, and by another algorithm for each batch size
TOLERANCE = {"cpu": 1e-4, "cuda": 5e-3}
# up to which an error may be rounding: it may be twice what slower ways are off themselves in float32
MOST_ROUNDING = 1e-2

Labels = Literal["ours", "plain", "loop", "separate", "adapter"]


class Kind(NamedTuple):
    """How a network is converted.

    Args:
        name: of the kind.
        calls: of `fastmtl.nn.convert`, one after the other: kind, where, options.
    """

    name: str
    calls: tuple[tuple[str, str | None, Mapping[str, Any]], ...]

    def convert(self, model: nn.Module, num_tasks: int) -> nn.Module:
        for kind, where, options in self.calls:
            model = convert(model, num_tasks, kind, where, **options)
        return model


# the norms of all layers are by task: else a mixed batch has other statistics than a batch of one task
NORMS = ("patch", None, {"joint": True})
TAPS = Kind("taps", (("taps", None, {"joint": True}),))
LORA = Kind("lora", (("lora", "layers", {"rank": 8, "scaling": SCALING}),))
SEPARATE = Kind("separate bottom", (("separate", "bottom:0.05", {}), NORMS))


@dataclass(frozen=True)
class Spec:
    """What tells one row from another.

    Args:
        workload: the network and its batch.
        kind: how it is converted.
        num_tasks: T.
        train: a training step (forward, backward, SGD with momentum); else a forward pass in evaluation mode.
        closed: the gates of TAPS are closed, so that nothing but norms differs by task.
        alone: the whole batch belongs to the first task, and is told so by name; of closed gates in evaluation.
        quick: belongs to the telling few.
    """

    workload: Workload
    kind: Kind
    num_tasks: int
    train: bool
    closed: bool = False
    quick: bool = False
    alone: bool = False

    @property
    def name(self) -> str:
        mode = "train" if self.train else "eval"
        name = f"{self.workload.name} {self.kind.name} T={self.num_tasks} {mode}"
        return name + ", gates closed" * self.closed + ", one task" * self.alone

    @property
    def labels(self) -> tuple[Labels, ...]:
        if self.alone:
            return ("ours", "plain")
        return ("ours", "plain", "loop", "separate", *(("adapter",) if self.kind is LORA else ()))


# --- one way of doing the work, with its models


@dataclass
class Trainee:
    """A network, or one for each task, with the batch that all ways of a row share."""

    workload: Workload
    batch: Batch
    rows: Mapping[str, Tensor]
    plan: TaskPlan
    models: Sequence[nn.Module]
    train: bool
    optimizer: torch.optim.Optimizer | None = None

    def __post_init__(self) -> None:
        for model in self.models:
            model.train(self.train)
        if self.train:
            params = [p for model in self.models for p in model.parameters() if p.requires_grad]
            self.optimizer = torch.optim.SGD(params, lr=1e-3, momentum=0.9)

    @property
    def model(self) -> nn.Module:
        return self.models[0]

    def loss(self, outputs: Tensor, where: Tensor | slice = slice(None)) -> Tensor:
        """What these samples add to the mean loss of the batch."""
        return self.workload.losses(outputs, self.batch.y[where]).sum() / len(self.batch.y)


def mixed(trainee: Trainee) -> Tensor:
    with tasks(trainee.plan):
        return trainee.model(trainee.batch.x)


def alone(trainee: Trainee) -> Tensor:
    with tasks("0"):
        return trainee.model(trainee.batch.x)


def plain(trainee: Trainee) -> Tensor:
    return trainee.model(trainee.batch.x)


def whole(forward: Callable[[Trainee], Tensor], trainee: Trainee) -> Tensor:
    """The whole batch in one pass; its outputs `[N, C]`."""
    if not trainee.train:
        with torch.no_grad():
            return forward(trainee)
    outputs = forward(trainee)
    trainee.loss(outputs).backward()
    return outputs.detach()


def _task_of_converted(trainee: Trainee, task: str, x: Tensor) -> Tensor:
    with tasks(task):
        return trainee.model(x)


def _network_of_task(trainee: Trainee, task: str, x: Tensor) -> Tensor:
    return trainee.models[int(task)](x)


def by_task(run: Callable[[Trainee, str, Tensor], Tensor], trainee: Trainee) -> Tensor:
    """Each task's samples on their own; outputs `[N, C]` in the order of the batch."""
    if not trainee.train:
        with torch.no_grad():
            return baselines.forward_by_task(trainee.batch.x, trainee.rows, partial(run, trainee))
    return baselines.step_by_task(trainee.batch.x, trainee.rows, partial(run, trainee), trainee.loss)


def step(way: Callable[[Trainee], Tensor], trainee: Trainee) -> Tensor:
    """What is timed: a forward pass in evaluation, a whole step in training, before which `.grad` was freed."""
    outputs = way(trainee)
    if trainee.optimizer is not None:
        trainee.optimizer.step()
    return outputs


# label -> kind, way, in words
WAYS: dict[Labels, tuple[Literal["ours", "baseline", "yardstick"], Callable[[Trainee], Tensor], str]] = {
    "ours": ("ours", partial(whole, mixed), "the converted network on the mixed batch, the plan given"),
    "plain": ("yardstick", partial(whole, plain), "the network before it was converted, no tasks, all of it trained"),
    "loop": ("baseline", partial(by_task, _task_of_converted), "the converted network on each task's samples in turn"),
    "separate": ("baseline", partial(by_task, _network_of_task), "T plain networks, each on its task's samples"),
    "adapter": ("baseline", partial(whole, plain), "the shared layer, then each adapter's product on its rows"),
}


# ours, where the whole batch belongs to one task
ALONE: tuple[Literal["ours"], Callable[[Trainee], Tensor], str] = (
    "ours", partial(whole, alone), "the converted network on the batch, all of one task, told by its name"
)  # fmt: skip


def candidates(labels: Sequence[Labels], of_one_task: bool = False) -> tuple[Candidate, ...]:
    ways = {**WAYS, "ours": ALONE} if of_one_task else WAYS
    return tuple(
        Candidate(label, partial(step, way), detail, kind)
        for label, (kind, way, detail) in ((label, ways[label]) for label in labels)
    )


# --- the oracle: a plain network for each task


def converted(spec: Spec) -> nn.Module:
    """The converted network in the midst of training: what belongs to tasks is no zero, and no two tasks' are alike.

    With closed gates the norms stay those of the plain network.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        model = spec.kind.convert(spec.workload.model(), spec.num_tasks)
        for _, layer in task_layers(model):
            for task in layer.tasks:
                for name, x in layer.part(task).items():
                    if name == "gate":
                        x.fill_(0.0 if spec.closed else 0.15)
                    elif name in ("delta", "A", "B"):
                        x.add_(torch.randn_like(x), alpha=0.1 * (x.numel() / len(x)) ** -0.5)
                    elif name in ("weight", "bias", "task_bias") and not spec.closed:
                        x.add_(torch.randn_like(x), alpha=0.05)
    return model


def by_parts(model: nn.Module, grads: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The gradients of a converted network, from those of a plain network for each task, by the chain rule.

    Args:
        model: converted.
        grads: task -> name of a parameter of the plain network -> gradient.

    Returns:
        name of a parameter of `model` that trains -> gradient.
    """
    found: dict[str, Tensor] = {}
    taken: set[str] = set()
    for path, layer in task_layers(model):
        for task, own in grads.items():
            of_weight = own[f"{path}.weight"]
            mine = _own_gradients(layer, task, of_weight, own.get(f"{path}.bias"))
            found |= {f"{path}.{name}.{task}": g for name, g in mine.items()}
        if not isinstance(layer, TaskLayer) or not layer.shared:
            taken |= {f"{path}.weight", f"{path}.bias"}
    for name in next(iter(grads.values())):
        if name not in taken:
            found[name] = torch.stack([own[name] for own in grads.values()]).sum(0)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    return {name: found[name] for name in trained}


def _own_gradients(layer: nn.Module, task: str, of_weight: Tensor, of_bias: Tensor | None) -> dict[str, Tensor]:
    """Of what belongs to one task in a layer, from the gradients of the plain layer's weight and bias."""
    if isinstance(layer, TaskBatchNorm2d):
        assert of_bias is not None
        return {"weight": of_weight, "bias": of_bias}
    assert isinstance(layer, TaskLayer)
    if layer.rank is not None:
        assert layer.A is not None and layer.B is not None
        down, up = layer.A[task].detach(), layer.B[task].detach()
        return {"A": layer.scaling * up.mT @ of_weight, "B": layer.scaling * of_weight @ down.mT}
    assert layer.delta is not None
    if not layer.shared:
        return {"delta": of_weight} | ({} if of_bias is None else {"task_bias": of_bias})
    # of TAPS with an open gate
    return {"delta": of_weight, "gate": (of_weight * layer.delta[task].detach()).sum()}


# --- the cases


@dataclass
class Workshop:
    """The network of each way of a row, all from the same start, and what the first step of each must give."""

    spec: Spec
    batch: Batch
    device: torch.device
    trainees: dict[str, Trainee] = field(default_factory=dict)
    # outputs, and gradients by the converted network's names
    expected: tuple[Tensor, Mapping[str, Tensor]] | None = None

    def __post_init__(self) -> None:
        self.base = converted(self.spec).to(self.device)
        self.rows: dict[str, Tensor] = {str(t): rows for t, rows in enumerate(self.batch.of_task)}  # type: ignore[misc]
        self.plan = task_plan(self.batch.task_ids, self.spec.num_tasks)

    def trainee(self, *models: nn.Module) -> Trainee:
        return Trainee(self.spec.workload, self.batch, self.rows, self.plan, models, self.spec.train)

    def new(self, label: str) -> Trainee:
        """The networks of one way, from the start."""
        if label in ("ours", "loop"):
            return self.trainee(copy.deepcopy(self.base))
        if label == "separate":
            return self.trainee(*(merge(self.base, task) for task in self.rows))
        bare = self.spec.workload.model().to(self.device)
        if label == "plain":
            return self.trainee(bare)
        layers = [(path, layer) for path, layer in task_layers(self.base) if isinstance(layer, TaskLayer)]
        halves = {path: (dict(layer.A.items()), dict(layer.B.items())) for path, layer in layers if layer.A and layer.B}
        return self.trainee(baselines.with_adapters(bare, halves, SCALING, self.rows))

    @staticmethod
    def place_of(label: str) -> str:
        """The loop goes on with our network: its parameters are the same, and there may be 32 times as many."""
        return "ours" if label == "loop" else label

    def expect(self) -> None:
        """Outputs and gradients of a forward and backward pass of each task's samples through its plain network, in
        float64: in float32 one of a million signs that an activation sees is another, and moves a gradient by 1e-3."""
        self.expected = self._by_plain_networks(torch.float64)

    def _by_plain_networks(self, dtype: torch.dtype) -> tuple[Tensor, Mapping[str, Tensor]]:
        outputs, grads = [], {}
        base = copy.deepcopy(self.base).to(dtype)
        with measure.without_tf32():
            for task, rows in self.rows.items():
                model = merge(base, task).train(self.spec.train)
                out = model(self.batch.x[rows].to(dtype))
                outputs.append(out)
                if self.spec.train:
                    loss = self.spec.workload.losses(out, self.batch.y[rows]).sum() / len(self.batch.y)
                    named = dict(model.named_parameters())
                    grads[task] = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
            merged = baselines.merge_outputs(outputs, self.rows).double().cpu()
            found = by_parts(base, grads) if self.spec.train else {}
        return merged, {name: g.double().cpu() for name, g in found.items()}

    def _off(self, outputs: Tensor, grads: tuple[list[Tensor | None], list[Tensor]] | None) -> float:
        """Of outputs, and of gradients beside the expected ones; NaN is handed on."""
        assert self.expected is not None
        errors = [_largest(outputs, self.expected[0])]
        if grads is not None:
            errors.append(difference(*grads))
        return float(torch.tensor(errors).max())

    def _rounding(self) -> float:
        """How far float32 itself is off: in the plain networks, with few samples of a task in a batch norm, and in the
        converted one through the ops' plain torch, in which other signs may turn."""
        assert self.expected is not None
        outputs, grads = self._by_plain_networks(torch.float32)
        expected = self.expected[1]
        off = self._off(outputs, ([grads[name] for name in expected], list(expected.values())) if expected else None)
        trainee = self.new("ours")
        with measure.without_tf32(), use_backend("reference"):
            outputs = whole(mixed, trainee)
        found = self._gradients("ours", trainee, expected) if self.spec.train else None
        return max(off, self._off(outputs, found))

    def verify(self, label: str, call: Callable[[Trainee], Tensor]) -> Check:
        """The first step of a way; its network goes on from there in the timing."""
        assert self.expected is not None
        # before the new one is made: both at once may not fit
        self.trainees.pop(self.place_of(label), None)
        trainee = self.trainees[self.place_of(label)] = self.new(label)
        tolerance = TOLERANCE[self.device.type]
        with measure.without_tf32():
            if label == "plain" and not self.spec.closed:
                return Check(self._off_float64(call(trainee)), tolerance, "the same network in float64")
            outputs = call(trainee)
        error = self._off(outputs, self._gradients(label, trainee, self.expected[1]) if self.spec.train else None)
        if tolerance < error <= MOST_ROUNDING:
            tolerance = max(tolerance, 2 * self._rounding())
        return Check(error, tolerance, "a forward and backward pass in float64 through a plain network per task")

    def _gradients(
        self, label: str, trainee: Trainee, expected: Mapping[str, Tensor]
    ) -> tuple[list[Tensor | None], list[Tensor]]:
        """A way's gradients beside the expected ones, by the converted network's names."""
        got: Mapping[str, Tensor | None]
        if label == "separate":
            by_task = {
                task: {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
                for task, model in zip(self.rows, trainee.models, strict=True)
            }
            got = by_parts(self.base, by_task)
        else:
            got = {name: p.grad for name, p in trainee.model.named_parameters() if p.requires_grad}
        if set(got) != set(expected):
            return [None], list(expected.values())[:1]
        return [got[name] for name in expected], list(expected.values())

    def _off_float64(self, outputs: Tensor) -> float:
        model = self.spec.workload.model().to(self.device).double().train(self.spec.train)
        with torch.no_grad():
            return _largest(outputs, model(self.batch.x.double()).cpu())

    def prepare(self, label: str) -> Trainee:
        """The networks of a way before their next step, without gradients."""
        place = self.place_of(label)
        if place not in self.trainees:
            self.trainees[place] = self.new(label)
        trainee = self.trainees[place]
        if trainee.optimizer is not None:
            trainee.optimizer.zero_grad(set_to_none=True)
        return trainee


def _largest(outputs: Tensor, expected: Tensor) -> float:
    """The largest error of a sample's outputs, over the norm of an average sample's."""
    scale = expected.norm() / len(expected) ** 0.5
    return float(((outputs.double().cpu() - expected).norm(dim=1) / scale).max())


def check(workshop: Workshop, call: Callable[[Trainee], Any]) -> Check:
    """Ours must give what a plain network for each task gives, and leave its gradients."""
    workshop.expect()
    return workshop.verify("ours", call)


def verify(workshop: Workshop, candidate: Candidate) -> Check:
    return workshop.verify(candidate.label, candidate.call)


def _make(spec: Spec, device: torch.device) -> Workshop:
    return Workshop(spec, make_batch(spec.workload, spec.num_tasks, False, device), device)


def _params(spec: Spec) -> dict[str, Any]:
    return {
        "T": spec.num_tasks,
        "dtype": "float32",
        "batch": spec.workload.batch,
        "network": spec.workload.name,
        "kind": spec.kind.name,
        "where": [where for _, where, _ in spec.kind.calls],
        "train": spec.train,
        "gates": "closed" if spec.closed else "open",
        "tasks of a batch": "one" if spec.alone else "mixed",
    }


def model_case(spec: Spec, budget_s: float | None = None) -> Case:
    """A training step or an evaluation of a converted network, beside the plain one and what is written by hand."""
    return Case(
        suite="models",
        name=spec.name,
        op=f"{'step' if spec.train else 'evaluation'} of a converted network",
        covers=frozenset(),
        params=_params(spec),
        make=partial(_make, spec),
        candidates=candidates(spec.labels, spec.alone),
        check=check,
        verify=verify,
        prepare=Workshop.prepare,
        # of a step in which momentum is there already: the check was the first
        prepare_memory=Workshop.prepare,
        quick=spec.quick,
        budget_s=budget_s,
        # what the ratio of closed gates hangs on
        at_least={"plain": 9},
    )


# --- the memory of a training of TAPS, all that it holds


@dataclass
class Studio:
    """What a whole training is made from."""

    workload: Workload
    num_tasks: int
    batch: Batch
    device: torch.device

    def __post_init__(self) -> None:
        self.rows: dict[str, Tensor] = {str(t): rows for t, rows in enumerate(self.batch.of_task)}  # type: ignore[misc]
        self.plan = task_plan(self.batch.task_ids, self.num_tasks)

    def train(self, models: Sequence[nn.Module], way: Callable[[Trainee], Tensor], plan: TaskPlan) -> Tensor:
        """Two steps, since momentum is there from the second on; outputs of the first."""
        trainee = Trainee(self.workload, self.batch, self.rows, plan, models, True)
        assert trainee.optimizer is not None
        first = step(way, trainee)
        trainee.optimizer.zero_grad(set_to_none=True)
        step(way, trainee)
        return first

    def network(self) -> nn.Module:
        return self.workload.model().to(self.device)


def joint(studio: Studio) -> Tensor:
    model = TAPS.convert(studio.network(), studio.num_tasks)
    return studio.train([model], WAYS["ours"][1], studio.plan)


def sequential(studio: Studio) -> Tensor:
    """One of the tasks, which are trained one after the other: its delta, beside a shared weight that is frozen."""
    model = convert(studio.network(), 1, "taps")
    return studio.train([model], WAYS["ours"][1], task_plan(torch.zeros_like(studio.batch.task_ids), 1))


def one_network(studio: Studio) -> Tensor:
    return studio.train([studio.network()], WAYS["plain"][1], studio.plan)


def networks(studio: Studio) -> Tensor:
    return studio.train([studio.network() for _ in studio.rows], WAYS["separate"][1], studio.plan)


MEMORY: dict[str, tuple[Literal["ours", "baseline", "yardstick"], Callable[[Studio], Tensor], str]] = {
    "ours": ("ours", joint, "full joint: shared weights and T deltas, mixed batches"),
    "sequential": ("yardstick", sequential, "sequential: one task, its delta beside frozen weights"),
    "plain": ("yardstick", one_network, "the plain network: the first part of the memory-efficient joint variant"),
    "separate": ("yardstick", networks, "T plain networks at once"),
}


def check_start(studio: Studio, label: str, call: Callable[[Studio], Tensor]) -> Check:
    """Nothing differs by task at the start: the first step's outputs are the plain network's.

    Of all samples where there is one norm for all, of each task's samples alone where there is one for each.
    """
    model = studio.network().train()
    with torch.no_grad(), measure.without_tf32():
        got = call(studio)
        if label in ("sequential", "plain"):
            expected = model(studio.batch.x)
        else:
            expected = baselines.forward_by_task(studio.batch.x, studio.rows, lambda task, x: model(x))
    error = _largest(got, expected.double().cpu())
    return Check(error, TOLERANCE[studio.device.type], "the plain network before it was converted")


def memory_case(workload: Workload, num_tasks: int, quick: bool = False) -> Case:
    """All that a training of TAPS holds: weights, gradients, momentum and activations."""

    def run(way: Callable[[Studio], Tensor], studio: Studio) -> Tensor:
        with torch.enable_grad():
            return way(studio)

    return Case(
        suite="models",
        name=f"{workload.name} taps T={num_tasks} memory",
        op=TAPS_MEMORY,
        covers=frozenset(),
        params={
            "T": num_tasks,
            "dtype": "float32",
            "batch": workload.batch,
            "network": workload.name,
            "kind": "taps",
            "steps": 2,
        },
        make=lambda device: Studio(workload, num_tasks, make_batch(workload, num_tasks, False, device), device),
        candidates=tuple(
            Candidate(label, partial(run, way), detail, kind) for label, (kind, way, detail) in MEMORY.items()
        ),
        check=lambda studio, call: check_start(studio, "ours", call),
        verify=lambda studio, candidate: check_start(studio, candidate.label, candidate.call),
        prepare=lambda studio, label: studio,
        prepare_memory=lambda studio, label: studio,
        reps=1,
        quick=quick,
    )


def _resnet(name: str, width: int, side: int, batch: int) -> Workload:
    return Workload(f"{name} {side}x{side}", lambda: PublishedResNet(width), (3, side, side), batch)


def _vit(side: int, patch: int, width: int, depth: int, batch: int) -> Workload:
    def build() -> nn.Module:
        return ViT(side, patch, width, depth, width // 32, EncoderLayer)

    return Workload(f"ViT, {depth} layers of {width}", build, (3, side, side), batch)


QUICK_RESNET = _resnet("quarter-width ResNet-18", 16, 64, 32)
RESNET = _resnet("half-width ResNet-18", 32, 64, 32)
FULL_RESNET = _resnet("ResNet-18", 64, 224, 64)
QUICK_VIT = _vit(32, 8, 64, 4, 32)
VIT = _vit(64, 8, 192, 6, 32)
FULL_VIT = _vit(224, 16, 384, 12, 64)


def cases(device: torch.device, quick: bool = False) -> list[Case]:
    """The rows; `quick`: a telling few, of smaller networks. On a GPU the networks are whole."""
    few = [
        *(Spec(QUICK_RESNET, TAPS, 8, train, quick=True) for train in (True, False)),
        *(Spec(QUICK_RESNET, TAPS, 8, False, closed=True, quick=True, alone=alone) for alone in (False, True)),
        Spec(QUICK_RESNET, SEPARATE, 8, True, quick=True),
        *(Spec(QUICK_VIT, LORA, 8, train, quick=True) for train in (True, False)),
    ]
    found = [model_case(spec, budget_s=1.0) for spec in few]
    found.append(memory_case(QUICK_RESNET, 8, quick=True))
    if quick:
        return found
    resnet, vit = (FULL_RESNET, FULL_VIT) if device.type == "cuda" else (RESNET, VIT)
    specs = [
        *(Spec(resnet, TAPS, t, train) for train in (True, False) for t in TASKS),
        *(Spec(resnet, TAPS, t, False, closed=True) for t in TASKS),
        *(Spec(resnet, SEPARATE, t, train) for train in (True, False) for t in TASKS),
        *(Spec(vit, LORA, t, train) for train in (True, False) for t in TASKS),
        Spec(resnet, TAPS, 8, False, closed=True, alone=True),
        *(Spec(vit, TAPS, 8, False, closed=True, alone=alone) for alone in (False, True)),
    ]
    return found + [model_case(spec) for spec in specs] + [memory_case(resnet, t) for t in TASKS]
