"""LibMTL's methods on task gradients that are there already. Where it is not installed, its entries say so."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastmtl.benchmarks.runner.registry import Candidate

# method -> its class and that one's options; `CAGrad` of version 1.1.5 has the number of tasks written into it, 3
_CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "pcgrad": ("PCGrad", {}),
    "gradvac": ("GradVac", {"beta": 0.01}),
    "mgda": ("MGDA", {"mgda_gn": "none"}),
}


def missing() -> str | None:
    return None if importlib.util.find_spec("LibMTL") else "not installed"


def _weighting(name: str) -> type[Any]:
    """A class of `LibMTL.weighting`. The package itself imports its models, which want torchvision; those don't."""
    spec = importlib.util.find_spec("LibMTL")
    assert spec is not None and spec.submodule_search_locations is not None
    if "LibMTL" not in sys.modules:
        package = types.ModuleType("LibMTL")
        package.__path__ = list(spec.submodule_search_locations)
        package.__spec__ = spec
        sys.modules["LibMTL"] = package
    return getattr(importlib.import_module(f"LibMTL.weighting.{name}"), name)


def on_gradients(name: str, num_tasks: int, options: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """Its method as a function of a `[T, P]` matrix: what it does with the gradients, without its own way to them (T
    backward passes and copies by way of the host)."""
    kind = _weighting(name)

    class OnGradients(kind):  # type: ignore[misc, valid-type]
        def _compute_grad_dim(self) -> None:
            pass

        def _compute_grad(self, losses: Any, mode: str, rep_grad: bool = False) -> Tensor:
            return self.grads

        def _reset_grad(self, new_grads: Tensor) -> None:
            self.out = new_grads

    method = OnGradients()
    method.task_num, method.rep_grad = num_tasks, False
    losses = [torch.zeros(()) for _ in range(num_tasks)]

    def call(grads: Tensor) -> Tensor:
        method.grads, method.device = grads, grads.device
        method.backward(losses, **options)
        return method.out

    return call


def candidate(method: str, num_tasks: int) -> Candidate:
    """Its whole method on a `[T, P]` matrix."""
    nothing: Callable[[Any], Any] = lambda grads: None  # noqa: E731
    if method not in _CLASSES:
        return Candidate("libmtl", nothing, f"LibMTL: {method}", unavailable="its last release has none that runs")
    if missing() is not None:
        return Candidate("libmtl", nothing, f"LibMTL: {method}", unavailable=missing())
    name, options = _CLASSES[method]
    return Candidate("libmtl", on_gradients(name, num_tasks, options), f"LibMTL: {name}, without its backward passes")
