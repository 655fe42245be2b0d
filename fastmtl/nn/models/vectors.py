"""Task vectors: what a task's weights differ by, layer by layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmtl.nn.layers.gate import finite
from fastmtl.nn.layers.weights import TaskLayer
from fastmtl.nn.models.merge import name_of_task, task_names
from fastmtl.nn.module import task_layers


def _layers(model: nn.Module) -> list[tuple[str, TaskLayer]]:
    """Layers with a shared weight that tasks differ from, from the bottom to the top."""
    task_names(model)
    found = [(path, layer) for path, layer in task_layers(model) if isinstance(layer, TaskLayer) and layer.shared]
    if not found:
        raise ValueError("model: expected layers with deltas (kinds 'taps', 'dense', 'lora'), got none")
    return found


@torch.no_grad()
def task_vectors(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Each task's difference from the shared weight, gates multiplied in, by task and by the weight's name.

    Args:
        model: with deltas.

    Returns:
        `{task: {"layer1.0.conv1.weight": delta, ...}}`, copies in the shape of the weights; a layer whose gate is
        closed is left out. Added to the plain model's `state_dict` they give the task's. Biases and norms by task are
        not in them.

    Raises:
        TypeError, ValueError: a model without deltas.

    Source: Ilharco et al. 2023 (Editing models with task arithmetic).

    Example:
        >>> model = convert(torch.nn.Linear(2, 1), ["left", "right"], "dense")
        >>> task_vectors(model)["left"]
        {'weight': tensor([[0., 0.]])}
    """
    vectors: dict[str, dict[str, Tensor]] = {name: {} for name in task_names(model)}
    for path, layer in _layers(model):
        for name in layer.tasks:
            delta = layer.effective_delta(name)
            if delta is not None:
                vectors[name][f"{path}.weight" if path else "weight"] = delta.detach().clone()
    return vectors


@torch.no_grad()
def line_scale(model: nn.Module, alpha: float, beta: float, *, task: int | str | None = None) -> None:
    """Scales the delta of layer l of L by `alpha + beta * l / (L - 1)`, from the bottom to the top, in place.

    So the bottom layers, which hold what tasks have in common, keep less of a task's difference than the top ones.

    Args:
        model: with deltas.
        alpha: the factor of the bottom layer.
        beta: what the top layer's is more.
        task: position or name; None: all tasks.

    Raises:
        TypeError, ValueError: a model without deltas; no such task; factors that are no finite numbers.

    Source: Wang et al. 2024 (LiNeS: post-training layer scaling prevents forgetting and enhances model merging), eq. 3.

    Example:
        >>> model = convert(torch.nn.Linear(2, 1), ["left", "right"], "dense")
        >>> line_scale(model, 0.5, 0.5)
    """
    alpha, beta = finite(alpha, "alpha"), finite(beta, "beta")
    layers = _layers(model)
    names = task_names(model) if task is None else (name_of_task(model, task),)
    seen: set[int] = set()
    for at, (_, layer) in enumerate(layers):
        factor = alpha + beta * at / max(1, len(layers) - 1)
        held = layer.delta if layer.delta is not None else layer.B
        assert held is not None
        for name in names:
            if id(held[name]) not in seen:
                seen.add(id(held[name]))
                held[name].mul_(factor)
