"""Rows of suite `step` on what `one_pass` costs beside the layers: following a call, and a first step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fastmtl
from fastmtl.benchmarks.runner.registry import FIRST_STEP, FOLLOWED, Candidate, Case, Check
from fastmtl.benchmarks.suites import step_mixed_batches
from fastmtl.benchmarks.workloads.networks import VIT, Workload
from fastmtl.task_gradients.one_pass import short_ways
from fastmtl.task_gradients.one_pass.experiments import verdict

CALLS, QUICK_CALLS = 500, 100
SAMPLES, TASKS = 8, 4


# --- following a call


class Layers(nn.Module):
    """One layer of each kind that has a short way, so small that a call of it is host time."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(16, 16), nn.Conv2d(8, 8, 1)
        self.group_norm, self.layer_norm = nn.GroupNorm(2, 8), nn.LayerNorm(16)


@dataclass
class Operands:
    """What is called: rows `[N, 16]` and pictures `[N, 8, 2, 2]` that carry samples, and their labels."""

    layers: Layers
    rows: Tensor
    pictures: Tensor
    labels: Tensor
    task_ids: Tensor

    @classmethod
    def of(cls, device: torch.device) -> Operands:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(SAMPLES, 16, generator=generator)
        pictures = torch.randn(SAMPLES, 8, 2, 2, generator=generator)
        ids = torch.arange(SAMPLES)
        layers = Layers().to(device)
        return cls(layers, rows.to(device), pictures.to(device), ids.to(device), (ids % TASKS).to(device))

    def made(self) -> tuple[Tensor, Tensor]:
        """Rows and pictures that a layer has made, as most calls of a network meet them."""
        return self.layers.linear(self.rows), self.layers.conv(self.pictures)


# name -> a call of the operands and what `made` made of them
CALLED: dict[str, Callable[[Operands, Tensor, Tensor], Tensor]] = {
    "relu": lambda _, rows, pictures: F.relu(rows),
    "add": lambda _, rows, pictures: rows + rows,
    "flatten": lambda _, rows, pictures: pictures.flatten(1),
    "avg_pool2d": lambda _, rows, pictures: F.avg_pool2d(pictures, 2),
    "cross_entropy": lambda on, rows, pictures: F.cross_entropy(rows, on.labels),
    "linear": lambda on, rows, pictures: on.layers.linear(rows),
    "conv2d": lambda on, rows, pictures: on.layers.conv(pictures),
    "group_norm": lambda on, rows, pictures: on.layers.group_norm(pictures),
    "layer_norm": lambda on, rows, pictures: on.layers.layer_norm(rows),
}


def called(name: str, calls: int, on: Operands) -> Tensor | None:
    rows, pictures = on.made()
    out = None
    for _ in range(calls):
        out = CALLED[name](on, rows, pictures)
    return out


class Empty(TorchFunctionMode):
    """Shows calls to Python and does nothing: what torch takes for any follower."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def shown(name: str, calls: int, on: Operands) -> Tensor | None:
    with Empty():
        return called(name, calls, on)


def followed(name: str, calls: int, on: Operands) -> Tensor | None:
    with fastmtl.one_pass(on.layers, on.task_ids, TASKS):
        return called(name, calls, on)


def check_followed(name: str, on: Operands, call: Callable[[Operands], Any]) -> Check:
    """A call that is followed has the result of one that is not."""
    got, expected = call(on), called(name, 1, on)
    error = (got - expected).abs().max() / expected.abs().max()
    return Check(float(error.detach()), 1e-5, "the same call outside the block")


def call_case(name: str, calls: int) -> Case:
    return Case(
        suite="step",
        name=f"following {name}",
        op=FOLLOWED,
        covers=frozenset(),
        params={"calls": calls, "batch": SAMPLES, "T": TASKS},
        make=Operands.of,
        candidates=(
            Candidate("ours", functools.partial(followed, name, calls), f"{calls} calls inside one_pass", "ours"),
            Candidate("block", functools.partial(followed, name, 0), "the block without them", "yardstick"),
            Candidate("plain", functools.partial(called, name, calls), "the same calls outside", "yardstick"),
            Candidate("mode", functools.partial(shown, name, calls), "in an empty torch function mode", "yardstick"),
        ),
        check=functools.partial(check_followed, name),
        quick=name in ("relu", "conv2d"),
        memory_of=frozenset(),
    )


# --- a first step


class Unruled(nn.Module):
    """GELU by a function that no rule of `one_pass` knows: experiments tell what it does with samples."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.special.log_ndtr(x).exp()


def unruled_vit(workload: Workload = VIT) -> nn.Module:
    model = workload.build()
    for layer in model.layers:
        layer.activation = Unruled()
    return model


def first_step(trainee: step_mixed_batches.Trainee) -> None:
    short_ways.forget()
    verdict.forget()
    step_mixed_batches.step(step_mixed_batches.one_pass, trainee)


def first_case(workload: Workload, num_tasks: int = 8) -> Case:
    """A step for which nothing of the model is known yet, over a plain one."""
    return Case(
        suite="step",
        name=f"first step of {workload.name}",
        op=FIRST_STEP,
        covers=frozenset(),
        params={"T": num_tasks, "batch": workload.batch, "network": workload.name},
        make=lambda device: step_mixed_batches.Workshop(
            workload, num_tasks, step_mixed_batches.make_batch(workload, num_tasks, False, device), device
        ),
        candidates=(
            Candidate("ours", first_step, "fastmtl.one_pass, nothing of the model known", "ours"),
            *step_mixed_batches.candidates(("sum",), {}),
        ),
        check=step_mixed_batches.check,
        verify=step_mixed_batches.verify,
        prepare=step_mixed_batches.Workshop.prepare,
        quick=workload is VIT,
        memory_of=frozenset(),
    )


def cases(quick: bool = False) -> list[Case]:
    """The rows; `quick`: a telling few, and fewer calls in a sample."""
    unruled = replace(VIT, name="small ViT without a rule for its GELU", build=unruled_vit)
    calls = QUICK_CALLS if quick else CALLS
    found = [*(call_case(name, calls) for name in CALLED), first_case(VIT), first_case(unruled)]
    return [case for case in found if case.quick or not quick]
