"""The methods of TorchJD and LibMTL by the name that ours have, each with what its answer is compared with.

LibMTL's weighting classes run the backward passes themselves. Here a subclass hands them task gradients that are there
already, in place of `_compute_grad`, and keeps the update in place of `_reset_grad`, which copies it into the
parameters: what is timed is the method alone, without the passes and copies around it. Its package imports a module
that torchvision has no longer, so that the weightings are loaded without the package's own `__init__`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import random
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastmtl import methods
from fastmtl.benchmarks.baselines.peers import drawn_order, torchjd_missing

Call = Callable[[Tensor], Tensor]
CAGRAD_C, FAIRGRAD_ALPHA, GRADVAC_BETA, PCD_TAU, SDMGRAD_LAMBDA = 0.5, 2.0, 0.01, 0.02, 0.3
# how far an update may be from ours, over its length. The peers' Gram matrices have the gradients' dtype, and their
# solvers stop earlier; a wrong reduction, order or constant is off by far more
CLOSE = 1e-2
# both stop as soon as a step on the simplex is short: with many tasks they are far from the point that they seek. How
# far stands beside the time
ROUGH = {"mgda": 1.0}


@dataclass
class Peer:
    """A method of another library.

    Args:
        label: of the candidate.
        detail: what it is, in words.
        weigh: `[T, T]` Gram matrix -> `[T]` weights; None: it makes none.
        update: `[T, P]` gradients -> `[P]`; None: it makes none.
        ours: the method of ours that must give the same, with the peer's random order where it draws one.
        begin: makes the next call a first one, with the draws that `ours` was told.
        tolerance: how far its update may be from ours, over its length.
        unavailable: why it cannot run here.
    """

    label: str
    detail: str
    weigh: Call | None = None
    update: Call | None = None
    ours: Callable[[], methods.Method] | None = None
    begin: Callable[[], object] = lambda: None
    tolerance: float = CLOSE
    unavailable: str | None = None


# --- TorchJD


def _others_order(num_tasks: int, seed: int) -> Tensor:
    """The order that its GradVac draws right after that seed: of each task the others, then itself."""
    rows = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for i in range(num_tasks):
            others = [j for j in range(num_tasks) if j != i]
            rows.append([*(others[k] for k in torch.randperm(num_tasks - 1).tolist()), i])
    return torch.tensor(rows)


@dataclass(frozen=True)
class _TorchJD:
    """Names in `torchjd.aggregation` of a method's weighting and its aggregator, and the arguments of both."""

    weighting: str | None
    aggregator: str | None
    arguments: Mapping[str, Any] = field(default_factory=dict)


_TORCHJD: dict[str, _TorchJD] = {
    "pcgrad": _TorchJD("PCGradWeighting", "PCGrad"),
    "mgda": _TorchJD("MGDAWeighting", "MGDA"),
    "cagrad": _TorchJD("CAGradWeighting", "CAGrad", {"c": CAGRAD_C}),
    "imtlg": _TorchJD("IMTLGWeighting", "IMTLG"),
    "config": _TorchJD(None, "ConFIG"),
    "nashmtl": _TorchJD(None, "NashMTL", {"max_norm": 0.0}),
    "fairgrad": _TorchJD("FairGradWeighting", "FairGrad", {"alpha": FAIRGRAD_ALPHA}),
    "alignedmtl": _TorchJD("AlignedMTLWeighting", "AlignedMTL"),
    "upgrad": _TorchJD("UPGradWeighting", "UPGrad"),
    "dualproj": _TorchJD("DualProjWeighting", "DualProj"),
    "krum": _TorchJD("KrumWeighting", "Krum", {"n_byzantine": 0, "n_selected": 1}),
    "pcd": _TorchJD("PCDWeighting", "PCD", {"tau": PCD_TAU}),
    "sdmgrad": _TorchJD("SDMGradWeighting", None, {"lambda_": SDMGRAD_LAMBDA}),
    "gradvac": _TorchJD("GradVacWeighting", "GradVac", {"beta": GRADVAC_BETA}),
    "graddrop": _TorchJD(None, "GradDrop"),
    "trimmed_mean": _TorchJD(None, "TrimmedMean", {"trim_number": 1}),
}
# of those that draw an order: (T, seed) -> the order
_TORCHJD_ORDERS = {"pcgrad": drawn_order, "gradvac": _others_order}


def _in_order(name: str, order: Tensor, device: torch.device, **arguments: Any) -> methods.Method:
    if name == "pcgrad":
        return methods.PCGrad(order=order.to(device), **arguments)
    return methods.GradVac(GRADVAC_BETA, order=order.to(device), **arguments)


def torchjd(name: str, num_tasks: int, device: torch.device, *, weights: bool) -> Peer:
    """TorchJD's method of that name for T tasks; `weights`: its weighting, where it has one."""
    entry = _TORCHJD[name]
    kind = entry.weighting if weights and entry.weighting is not None else entry.aggregator
    peer = Peer("torchjd", f"TorchJD: {kind}", tolerance=ROUGH.get(name, CLOSE))
    peer.unavailable = torchjd_missing()
    if peer.unavailable is not None:
        return peer
    if kind is None:
        peer.unavailable = "has no aggregator of that name"
        return peer
    arguments = dict(entry.arguments)
    if name == "nashmtl":
        # what it keeps from call to call stays: each begins where the last has ended, which is its fastest
        arguments["n_tasks"] = num_tasks
    try:
        made = getattr(importlib.import_module("torchjd.aggregation"), kind)(**arguments)
    except ImportError as error:
        peer.unavailable = f"not installed: {error}".splitlines()[0]
        return peer
    except AttributeError:
        peer.unavailable = "this release has none of that name"
        return peer
    if kind == entry.weighting:
        peer.weigh = made
    else:
        peer.update = made

    def begin() -> None:
        if hasattr(made, "reset"):
            made.reset()
        torch.manual_seed(SEED)

    peer.begin = begin
    if name in _TORCHJD_ORDERS:
        order = _TORCHJD_ORDERS[name](num_tasks, SEED)
        peer.ours = lambda: _in_order(name, order, device)
    return peer


# --- LibMTL

LIBMTL = "LibMTL"
SEED = 17
# method -> its weighting and the settings with which its `backward` is called
_LIBMTL: dict[str, tuple[str, dict[str, Any]]] = {
    "pcgrad": ("PCGrad", {}),
    "gradvac": ("GradVac", {"beta": GRADVAC_BETA}),
    "cagrad": ("CAGrad", {"calpha": CAGRAD_C, "rescale": 0}),
    "mgda": ("MGDA", {"mgda_gn": "none"}),
    "imtlg": ("IMTL", {}),
}


def libmtl_missing() -> str | None:
    return None if importlib.util.find_spec(LIBMTL) else "not installed"


@functools.cache
def libmtl_weighting(name: str) -> type[torch.nn.Module]:
    """A weighting class of LibMTL, loaded without the networks of its package."""
    packages = (LIBMTL, f"{LIBMTL}.weighting")
    before = {package: sys.modules.pop(package, None) for package in packages}
    try:
        # their own `__init__` import every network and every weighting: here they stand for their folders alone
        for package in packages:
            spec = importlib.util.find_spec(package)
            assert spec is not None
            sys.modules[package] = importlib.util.module_from_spec(spec)
        return getattr(importlib.import_module(f"{LIBMTL}.weighting.{name}"), name)
    finally:
        for package, module in before.items():
            sys.modules.pop(package, None)
            if module is not None:
                sys.modules[package] = module


def libmtl_orders(name: str, num_tasks: int, seed: int) -> Tensor:
    """The visiting order that its PCGrad (the task itself among the others) or GradVac draws right after that seed."""
    generator, rows = random.Random(seed), []
    for i in range(num_tasks):
        row = [j for j in range(num_tasks) if j != i or name == "pcgrad"]
        generator.shuffle(row)
        rows.append(row if name == "pcgrad" else [*row, i])
    return torch.tensor(rows)


def _on_given_gradients(kind: type[torch.nn.Module], num_tasks: int, device: torch.device) -> Any:
    """A weighting of LibMTL that is handed task gradients in place of the losses' backward passes."""

    class Given(kind):  # type: ignore[misc, valid-type]
        grads: Tensor
        made: Tensor

        def _compute_grad_dim(self) -> None:
            pass

        def _compute_grad(self, losses: Any, mode: str, rep_grad: bool = False) -> Tensor:
            return self.grads

        def _reset_grad(self, new_grads: Tensor) -> None:
            self.made = new_grads

    weighting = Given()
    weighting.task_num, weighting.device, weighting.rep_grad = num_tasks, device, False
    weighting.init_param()
    return weighting


def libmtl(name: str, num_tasks: int, device: torch.device) -> Peer | None:
    """LibMTL's method of that name for T tasks, on gradients that are given; None: it has none."""
    if name not in _LIBMTL:
        return None
    kind, settings = _LIBMTL[name]
    peer = Peer("libmtl", f"LibMTL: {kind} on given gradients", tolerance=ROUGH.get(name, CLOSE))
    peer.unavailable = libmtl_missing()
    if peer.unavailable is not None:
        return peer
    if name == "cagrad" and num_tasks != 3:
        peer.unavailable = "is written for three tasks"
        return peer
    try:
        weighting = _on_given_gradients(libmtl_weighting(kind), num_tasks, device)
    except ImportError as error:
        peer.unavailable = f"not installed: {error}".splitlines()[0]
        return peer
    losses = torch.ones(num_tasks, device=device)  # which only some look at, and none takes for the gradients

    def update(grads: Tensor) -> Tensor:
        weighting.grads = grads
        with torch.no_grad():
            weighting.backward(losses, **settings)
        return weighting.made

    def begin() -> None:
        random.seed(SEED)
        weighting.rho_T = torch.zeros(num_tasks, num_tasks, device=device)

    peer.update, peer.begin = update, begin
    if name in ("pcgrad", "gradvac"):
        order = libmtl_orders(name, num_tasks, SEED)
        arguments = {"include_self": True} if name == "pcgrad" else {"update": "triggered"}
        peer.ours = lambda: _in_order(name, order, device, **arguments)
    return peer


def all_of(name: str, num_tasks: int, device: torch.device, *, weights: bool) -> list[Peer]:
    """TorchJD's and LibMTL's methods of that name; `weights`: of a Gram matrix, or a root of it."""
    found = [torchjd(name, num_tasks, device, weights=weights)] if name in _TORCHJD else []
    theirs = libmtl(name, num_tasks, device)
    return found if theirs is None else [*found, theirs]
