"""A task's parts on their own: taken out, kept in a small file, put into a model without touching the others."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fastmtl.nn.containers import check_name
from fastmtl.nn.models.merge import name_of_task, task_names
from fastmtl.nn.module import TaskModule, left_out, task_layers, together
from fastmtl.parameters import unwrapped

# what is left out of a file is no matter of the version: readers fill what `TaskModule.optional` names
VERSION = 1
# behind these names stand the version, what the layers are, and what their shared weights are about
_VERSION, _LAYERS, _BASE = "fastmtl.version", "fastmtl.layers", "fastmtl.base"
# how far the sums of `_base` may be off, in units of the root of the weights' mean square: 16 bits move them by some
# 0.005
_ABOUT_THE_SAME = 0.05
# between a layer's path and the name of a tensor in it; paths and names have none
_SEP = "/"


@torch.no_grad()
def extract(model: nn.Module, task: int | str, *, unused: bool = False) -> dict[str, Tensor]:
    """One task's parts of all layers, to be saved as a small file and put into another copy of the model.

    Save it with `torch.save(state, "birds.pt")`, or `safetensors.torch.save_file(state, "birds.safetensors")`.

    Args:
        model: with layers of `fastmtl.nn`; compiled, in DDP or as an `AveragedModel`, too: the file is that of the
            model inside.
        task: position or name.
        unused: whether tensors that change nothing (deltas behind closed gates, and deltas of zero that have a gate)
            are in it, too. Otherwise a tensor without elements stands in their places, and `insert` begins them anew:
            dense ones are zero, of those of a low rank `A` is random and `B` zero.

    Returns:
        Copies of the tensors, by layer and name, and three small ones that tell `insert` what they belong to. The
        task's name is not in them.

    Raises:
        TypeError, ValueError: no such task; no layers with parts of tasks.

    Example:
        >>> model = convert(torch.nn.Linear(4, 2), ["left", "right"], "dense")
        >>> sorted(extract(model, "left"))
        ['/delta', 'fastmtl.base', 'fastmtl.layers', 'fastmtl.version']
    """
    name = name_of_task(model, task)
    model = unwrapped(model)
    state = {
        _VERSION: torch.tensor(VERSION),
        _LAYERS: _fingerprint(model),
        _BASE: _base(model),
    }
    for path, layer in _layers(model):
        without = frozenset() if unused else layer.unused(name)
        for part, x in layer.part(name).items():
            kept = x.new_empty(0) if part in without else x.detach().clone(memory_format=torch.contiguous_format)
            state[f"{path}{_SEP}{part}"] = kept
    return state


def insert(
    model: nn.Module, task: str, state: Mapping[str, Tensor] | str | os.PathLike[str], *, check_base: bool = True
) -> None:
    """Puts one task's parts into a model: as a new task, or in the place of one of the same name.

    All is checked before anything is changed. A new task comes behind the others, and an optimizer must be told of it.
    A task that is there keeps its parameters, which get other values; but those whose shape is another one, as low-rank
    deltas of another rank have it, are new parameters, and an optimizer goes on holding the old: make a new one, of
    `param_groups(model)`. No other task's tensors are touched.

    Args:
        model: with the same layers as the one that the parts come from.
        task: the name that the task has here.
        state: what `extract` gave, or the path of a file that holds it: `.safetensors`, or what `torch.save` wrote,
            which is read with `weights_only=True`, so that no code in it runs.
        check_base: whether all that tasks share, in the whole model, must be about the same as what the parts belong
            to: weights, and the statistics of batch norms that are no task's own. Switch it off where they have been
            trained on since.

    Raises:
        TypeError: no name; a state that is none.
        ValueError: a state that is truncated, of another version, of a model with other layers or (with `check_base`)
            other shared weights; tensors that are missing, not expected, of another shape, sparse or without memory; a
            file that is empty, cut off, a directory, or holds more than tensors (code, a whole model).
        FileNotFoundError: no such file.

    Example:
        >>> model = convert(torch.nn.Linear(4, 2), ["left", "right"], "dense")
        >>> insert(model, "up", extract(model, "left"))
        >>> task_names(model)
        ('left', 'right', 'up')
    """
    names = task_names(model)
    if isinstance(state, (str, os.PathLike)):
        state = _read(Path(state))
    if not isinstance(state, Mapping):
        raise TypeError(f"state: expected what extract returns, or a path, got {type(state).__name__}")
    model = unwrapped(model)
    layers = list(_layers(model))
    if isinstance(task, str) and task not in names:
        check_name(task)
    elif not isinstance(task, str):
        raise TypeError(f"task: expected a name, got {type(task).__name__}")
    parts = _parts(model, state, check_base)
    for path, layer in layers:
        layer.check_part(parts[path], f"state: layer {path!r}")
        parts[path] = {name: x for name, x in parts[path].items() if not left_out(x)}
    with together(layer for _, layer in layers):
        for path, layer in layers:
            if task in names:
                layer.set_part(task, parts[path])
            else:
                layer.add_part(task, parts[path])


def _parts(model: nn.Module, state: Mapping[str, Tensor], check_base: bool) -> dict[str, dict[str, Tensor]]:
    """The tensors of each layer, once the rest of a state says that they belong here."""
    for key, x in state.items():
        if not isinstance(key, str) or not isinstance(x, Tensor):
            raise ValueError(f"state: expected tensors by name, got {type(x).__name__} at {key!r}")
        if x.layout != torch.strided or x.is_meta or x.is_quantized or x.is_nested:
            got = "no memory" if x.is_meta else "a quantized one" if x.is_quantized else "a nested one"
            got = got if x.layout == torch.strided else str(x.layout)
            raise ValueError(f"state: expected dense tensors, got {got} at {key!r}")
    missing = [key for key in (_VERSION, _LAYERS, _BASE) if key not in state]
    if missing:
        raise ValueError(f"state: expected what extract returns, got nothing at {', '.join(map(repr, missing))}")
    version = state[_VERSION]
    if version.numel() != 1 or version.is_floating_point() or version.is_complex() or int(version) != VERSION:
        got = int(version) if version.numel() == 1 and not version.is_complex() else list(version.shape)
        raise ValueError(f"state: expected version {VERSION}, got {got}")
    parts: dict[str, dict[str, Tensor]] = {path: {} for path, _ in _layers(model)}
    for key, x in state.items():
        if key in (_VERSION, _LAYERS, _BASE):
            continue
        path, sep, part = key.rpartition(_SEP)
        if not sep or path not in parts:
            raise ValueError(f"state: expected the layers of this model, got one of another, {key!r}")
        parts[path][part] = x
    here, there = _fingerprint(model), state[_LAYERS]
    if not (there.shape == here.shape and bool((there.cpu() == here).all())):
        raise ValueError("state: expected a task of a model with the same layers, got one of another model")
    theirs = state[_BASE]
    if theirs.dim() != 2 or theirs.shape[1] != 5 or not theirs.is_floating_point():
        raise ValueError(f"state: expected {_BASE} of shape [L, 5], got {list(theirs.shape)}")
    if check_base:
        names, base = _names_of_base(model), _base(model)
        if len(theirs) != len(base):
            raise ValueError(
                f"state: expected a task of a model that shares {len(base)} layers and tensors, as this one does, got "
                f"one that shares {len(theirs)}; check_base=False if only what lies outside of layers by task differs"
            )
        size = base[:, 4].clamp_min(torch.finfo(torch.float32).tiny)
        off = ((theirs.cpu().double() - base).abs().amax(1) / size).nan_to_num(nan=float("inf"))
        for name, distance in zip(names, off.tolist(), strict=True):
            if distance > _ABOUT_THE_SAME:
                raise ValueError(
                    f"state: expected a task that belongs to these shared weights, got one of others ({name}); load "
                    "those that it was trained with first, or, if these have been trained on since and the task is to "
                    "go along, check_base=False"
                )
    return parts


def _layers(model: nn.Module) -> Iterator[tuple[str, TaskModule]]:
    """As `task_layers`, by paths that are the same if a part of the model is compiled."""
    for path, layer in task_layers(model):
        yield ".".join(part for part in path.split(".") if part != "_orig_mod"), layer


def _outside(model: nn.Module) -> list[tuple[str, Tensor]]:
    """What is saved of the model beside its layers by task, each tensor once."""
    inside = {id(m) for _, layer in task_layers(model) for m in layer.modules()}
    found: dict[int, tuple[str, Tensor]] = {}
    for path, module in model.named_modules():
        if id(module) in inside:
            continue
        saved = {k: x for k, x in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for name, x in {**module._parameters, **saved}.items():
            if x is not None and x.is_floating_point():
                found.setdefault(id(x), (f"{path}.{name}" if path else name, x))
    return list(found.values())


def _shared(layer: TaskModule) -> list[tuple[str, Tensor]]:
    own = {id(x) for task in layer.tasks for x in layer.part(task).values()}
    return [(name, p) for name, p in layer.named_parameters() if id(p) not in own]


def _fingerprint(model: nn.Module) -> Tensor:
    """Which layers there are, of which kind and shapes, and what a part means in them, as 32 numbers."""
    text = []
    for path, layer in _layers(model):
        own = sorted(name for name in layer.part(layer.tasks[0]))
        shapes = [(name, list(p.shape)) for name, p in _shared(layer)]
        text.append(f"{path} {type(layer).__name__} {own} {shapes} {layer.meaning()}".rstrip())
    return torch.frombuffer(bytearray(hashlib.sha256("\n".join(text).encode()).digest()), dtype=torch.uint8).clone()


def _names_of_base(model: nn.Module) -> list[str]:
    return [f"layer {path!r}" for path, _ in _layers(model)] + [repr(name) for name, _ in _outside(model)]


@torch.no_grad()
def _base(model: nn.Module) -> Tensor:
    """What all that tasks share is about, `[L, 5]` float64: a row for the shared parameters of each layer by task, and
    for each tensor beside them.
    """
    rows = [_about([p for _, p in _shared(layer)]) for _, layer in _layers(model)]
    return torch.stack(rows + [_about([x]) for _, x in _outside(model)])


def _about(tensors: list[Tensor]) -> Tensor:
    """Four projections on fixed waves, in units of a sum of independent numbers, and the root of the mean square.
    Rounding to 16 bits moves them little, other weights much.
    """
    values = [x.detach().double().flatten().cpu() for x in tensors]
    x = torch.cat(values) if values else torch.zeros(0, dtype=torch.float64)
    if len(x) == 0:
        return torch.zeros(5, dtype=torch.float64)
    at = torch.arange(len(x), dtype=torch.float64)
    waves = [float(torch.sin(at * pace + 0.5) @ x) / len(x) ** 0.5 for pace in (0.7, 1.3, 1.9, 2.6)]
    return torch.tensor([*waves, float(x.square().mean().sqrt())], dtype=torch.float64)


def _read(path: Path) -> Mapping[str, Tensor]:
    """A file's tensors; no code in it is run."""
    if not path.exists():
        raise FileNotFoundError(f"state: expected a file, got {str(path)!r}, which does not exist")
    if path.is_dir():
        raise ValueError(f"state: expected a file, got {str(path)!r}, which is a directory")
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError("state: a .safetensors file needs the package safetensors") from error
        try:
            return load_file(path)
        except Exception as error:
            raise ValueError(f"state: expected a file of safetensors, got {str(path)!r}: {error}") from error
    with path.open("rb") as file:
        # opened here, so that a file that may not be read is no file that is none
        begin = file.read(9)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # without the cause: torch's text tells the reader to switch off `weights_only`, which runs the code of a file
        raise ValueError(
            f"state: expected a file of tensors, whole and without code, got {str(path)!r}, {_why_not(begin, error)}"
        ) from None
    if not isinstance(found, Mapping):
        raise ValueError(f"state: expected a file with what extract returns, got {type(found).__name__}")
    return found


# how torch's reader names what it does not make of a file
_REFUSED = re.compile(r"\bGLOBAL ([\w.]+)")


def _why_not(begin: bytes, error: Exception) -> str:
    """What a file is that `torch.load` does not read, by its first bytes."""
    if not begin:
        return "which is empty"
    refused = _REFUSED.search(str(error))
    if refused is not None:
        return f"which holds more than tensors ({refused[1]}) and is not read; save what extract returns, nothing else"
    if begin[8:] == b"{":
        return "which looks like one of safetensors; give it a name that ends in .safetensors"
    if begin[:2] == b"PK":
        return "which is cut off or damaged; copy or save it again"
    return "which torch.save has not written, or which is cut off or damaged"
