"""From a network to one of several tasks, in place."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastmtl.nn.containers import Tasks, read_names
from fastmtl.nn.layers.weights import TaskLayer
from fastmtl.nn.models.kinds import KINDS, Kind, Make, what
from fastmtl.nn.models.where import (
    Place,
    Where,
    check_where,
    counted_from,
    matches,
    means_exactly,
    places,
    read_counted,
)
from fastmtl.nn.module import TaskComposite, TaskModule, task_layers
from fastmtl.parameters import compiled_module, is_per_task

# what others call an option
_HINTS = {
    "r": "; the rank is rank=",
    **dict.fromkeys(("alpha", "lora_alpha"), "; PEFT's alpha / r is scaling="),
    "target_modules": "; which layers are meant is where=",
    "modules_to_save": '; a call with kind="separate" and their names in where= gives each task such layers of its own',
}
# what layers with the same weight have in common
_OF_THE_WEIGHT = ("delta", "A", "B", "gate")


def convert(
    model: nn.Module,
    tasks: Tasks,
    kind: str = "taps",
    where: Where = None,
    *,
    joint: bool | None = None,
    **options: Any,
) -> nn.Module:
    """Gives each task parts of its own in the layers of a network, which computes the same as before at first.

    The model is changed in place: its layers are replaced by those of `fastmtl.nn`, which hold the very parameters
    of the plain ones. It is then called inside `with fastmtl.nn.tasks(task_ids):`, or `with
    fastmtl.nn.tasks("name"):` for a batch of one task. Several calls compose. A `state_dict` of the plain model loads
    before and after. Nothing is changed if anything is refused. Make the optimizer afterwards, of
    `param_groups(model)`: one from before does not know the tasks' parameters.

    Args:
        model: any module; its layers are found by their types.
        tasks: the number of tasks (named "0", "1", ...) or their names; ids count in this order.
        kind: what each task has of its own:

            - `"taps"`: a difference that a learned gate switches on where it is worth it (`TapsGate`), in convolutions
              and linear layers, and batch norms by task. Options: `threshold=0.1`, `start=0.15`, `rank=None` (of
              low-rank differences), `scaling=1.0`, `per_task_bias=False`. Wallingford et al. 2022 (TAPS).
            - `"dense"`: a difference. Options: `gate=None`, `per_task_bias=False`.
            - `"lora"`: a difference of a low rank; not in grouped convolutions. Options: `rank=8` (or one for each task
              by name; more than a layer can use is taken, and of no use), `scaling=1.0` (the factor itself: PEFT's
              `lora_alpha / r`), `gate=None`, `per_task_bias=False`. Hu et al. 2022 (LoRA).
            - `"patch"`: scale, shift and statistics of norms, and depthwise convolutions. Mudrakarta et al. 2019
              (K for the price of 1).
            - `"separate"`: a copy of the whole layer, norms too. Zhang et al. 2021 (Rethinking Hard-Parameter Sharing).
            - `"modulator"`: a 1 x 1 convolution behind a shared one, and batch norms by task. Kanakis et al. 2020
              (Reparameterizing convolutions).
            - `"hypergrid"`: factors of the shared weight, on a grid. Option: `grid=None` (rows and columns). Tay et al.
              2021 (HyperGrid).
        where: which layers: a pattern of names (`"layer4"`, `"*.attention.*"`: all that lies in what it matches), a
            type, a predicate of name and module, or a sequence of these; or, counted among the layers that the kind
            converts, in the order in which the model holds them, `"bottom:2"`, `"top:2"` (a number of layers),
            `"bottom:0.05"` (those with up to that share of the model's parameters). Norms then go with the layers
            before them. None: all that the kind converts. Embeddings are converted only where they are named.
        joint: whether parameters that all tasks share are trained, too; None: as the kind has it (frozen with `"taps"`,
            `"lora"`, `"patch"` and `"modulator"`).
        options: of the kind.

    Returns:
        `model`, or the new layer if it is a single layer.

    Raises:
        TypeError: no module, or a scripted one; options or a `where` that the kind does not know.
        ValueError: a compiled model; an unknown kind; nothing that can be converted, or one of several names that
            matches nothing; a layer that is converted already; other tasks than those of an earlier call; a layer whose
            weight is computed, that has hooks, or a forward of its own; layers in a Transformer of torch with
            `batch_first=False`, but for its attention.

    Warns:
        UserWarning: shared parameters are frozen while norms that tasks share keep running statistics, which training
            any task moves for all; a rank that is more than any of the layers can use.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> model = convert(model, ["photo", "sketch"], "taps")
        >>> with tasks(torch.tensor([1, 0])):
        ...     y = model(torch.ones(2, 3, 5, 5))
        >>> y.shape
        torch.Size([2, 8, 3, 3])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise TypeError("model: expected a module in Python, got a scripted one; script the merged network")
    compiled = compiled_module(model)
    if compiled is not None:
        raise ValueError(
            f"model: expected one that is not compiled yet, got {compiled!r}; compile what convert returns"
        )
    names = read_names(tasks)
    if not isinstance(kind, str):
        raise TypeError(f"kind: expected a str, got {type(kind).__name__}")
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if joint is not None and not isinstance(joint, bool):
        raise TypeError(f"joint: expected a bool or None, got {type(joint).__name__}")
    check_where(where)
    chosen_kind = KINDS[kind]
    for name in options:
        if name not in chosen_kind.options:
            known = ", ".join(chosen_kind.options) or "none"
            raise TypeError(f"options: expected {known} with kind {kind!r}, got {name!r}{_HINTS.get(name, '')}")
    for path, layer in task_layers(model):
        if layer.tasks != names:
            raise ValueError(
                f"tasks: expected {', '.join(layer.tasks)} as {path or 'the model'!r} has, got {', '.join(names)}"
            )
    given = {**chosen_kind.options, **options}
    meant = _chosen(model, kind, chosen_kind, where)
    _check_batch_first(model, [place for place, _ in meant])
    new = [(place.module, _made(place, make, names, given)) for place, make in meant]
    _tie(new)
    made = {id(old): layer for old, layer in new}
    _warn_of_rank([(place.path, layer) for (place, _), (_, layer) in zip(meant, new, strict=True)])
    result = _replaced(model, made)
    if chosen_kind.freezes if joint is None else not joint:
        for p in result.parameters():
            if not is_per_task(p):
                p.requires_grad_(False)
        _warn_of_statistics(result)
    return result


def _warn_of_statistics(model: nn.Module) -> None:
    """Shared parameters are frozen, but no statistics are: training one task would change what others compute."""
    inside = {id(m) for _, layer in task_layers(model) for m in layer.modules()}
    found = [
        (path, module)
        for path, module in model.named_modules()
        if id(module) not in inside
        and getattr(module, "running_mean", None) is not None
        and isinstance(module, nn.modules.batchnorm._NormBase)
    ]
    if not found:
        return
    some = ", ".join(repr(path) for path, _ in found[:3]) + (", ..." if len(found) > 3 else "")
    # those of two dimensions can be each task's own
    ways = "keep them in eval mode while a task is trained"
    if any(type(module) is nn.BatchNorm2d for _, module in found):
        ways = 'convert those of BatchNorm2d first, by kind "patch" and where=torch.nn.BatchNorm2d, or ' + ways
    warnings.warn(
        f"the shared parameters are frozen, but not the running statistics of the norms {some}: in training mode every "
        f"task moves them for all; {ways}",
        stacklevel=3,
    )


def _warn_of_rank(new: Sequence[tuple[str, nn.Module]]) -> None:
    """A rank is taken that some layers can't use, a small classifier say; one that none can use is a slip."""
    useful, path, asked = 0, "", 0
    for place, module in new:
        for inside, layer in task_layers(module, place):
            if not isinstance(layer, TaskLayer) or layer.rank is None:
                continue
            assert layer.A is not None and layer.B is not None
            name = layer.tasks[0]
            most = min(layer.A[name].numel(), layer.B[name].numel()) // layer.rank[name]
            asked = max(layer.rank.values())
            if most > useful:
                useful, path = most, inside
    if asked > useful > 0:
        warnings.warn(
            f"rank: expected at most {useful}, which is all that the largest layer converted ({path or 'the model'!r}) "
            f"can use, got {asked}: the rest costs memory and time for nothing; kind 'dense' costs less",
            stacklevel=3,
        )


def _chosen(model: nn.Module, kind: str, chosen: Kind, where: Where) -> list[tuple[Place, Make]]:
    """The layers that are meant, with what makes the new ones."""
    found = places(model)
    layers = [place for place in found if what(place.module) in chosen.layers]
    norms = [place for place in found if what(place.module) in chosen.norms and place not in layers]
    counted = read_counted(where) if isinstance(where, str) else None
    if counted is not None:
        meant = counted_from(counted, layers, model)
        if not meant:
            raise _nothing(model, kind, chosen, where, found, bool(layers))
        # norms go with the layers: up to the next one on the side where nothing is converted
        order = {id(place.module): at for at, place in enumerate(found)}
        ends = [order[id(place.module)] for place in meant]
        others = [order[id(place.module)] for place in layers if place not in meant]
        if counted.top:
            first = max((at for at in others if at < min(ends)), default=-1)
            first = min(ends) if first >= 0 else -1
            meant += [place for place in norms if order[id(place.module)] > first]
        else:
            last = min((at for at in others if at > max(ends)), default=len(found))
            meant += [place for place in norms if order[id(place.module)] < last]
        return [(place, _make_of(chosen, place)) for place in meant]
    hits = [place for place in found if matches(where, place)]
    if where is not None and isinstance(where, Sequence) and not isinstance(where, str) and hits:
        for one in where:
            # of types and predicates a caller may name more than a network has
            if isinstance(one, str) and not any(matches(one, place) for place in found):
                hint = _way_to_names([one], found)
                raise ValueError(
                    f"where: expected each name to match a layer, got {one!r}, which matches nothing{hint}"
                )
    for place in hits:
        exact = means_exactly(where, place)
        if isinstance(place.module, (TaskModule, TaskComposite)):
            if where is not None and (exact or _makes(chosen, place.module)):
                raise ValueError(
                    f"where: expected layers that are not converted yet, got {place.path!r}, a "
                    f"{type(place.module).__name__}; leave it out of one of the calls"
                )
        elif exact and where is not None and _unknown(chosen, place):
            type_name, name = type(place.module).__name__, what(place.module)
            got = f"{place.path!r}, {'an' if type_name[0] in 'AEIOU' else 'a'} {type_name}"
            others = [repr(other) for other, of in KINDS.items() if name in {**of.layers, **of.norms, **of.asked}]
            hint = f"; kinds that convert it: {', '.join(others)}" if others else ""
            raise ValueError(f"where: expected {_types(chosen)} for kind {kind!r}, got {got}{hint}")
    named = () if where is None else chosen.asked
    meant = [place for place in hits if place in layers or place in norms or what(place.module) in named]
    if not any(place not in norms for place in meant) and not (where is not None and meant):
        raise _nothing(model, kind, chosen, where, found, bool(hits))
    return [(place, _make_of(chosen, place)) for place in meant]


# torch's own networks, whose layers see what their attention sees
_TRANSFORMERS = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)


def _check_batch_first(model: nn.Module, meant: Sequence[Place]) -> None:
    """Raises where layers would take a sequence for the batch: where both are as long, nothing else shows it."""
    paths = {id(place.module): place.path for place in meant if not isinstance(place.module, nn.MultiheadAttention)}
    for path, module in model.named_modules():
        if not isinstance(module, _TRANSFORMERS):
            continue
        attention = next((m for m in module.modules() if isinstance(m, (nn.MultiheadAttention, TaskComposite))), None)
        inside = [paths[id(m)] for m in module.modules() if id(m) in paths]
        if inside and attention is not None and not getattr(attention, "batch_first", True):
            raise ValueError(
                f"{path or 'model'}: expected batch_first=True, since {inside[0]!r} would see [L, N, ...] and ids are "
                "of the first dimension, got False; build it with batch_first=True, or convert its attention alone by "
                "where="
            )


def _make_of(chosen: Kind, place: Place) -> Make:
    name = what(place.module)
    assert name is not None
    for table in (chosen.layers, chosen.norms, chosen.asked):
        if name in table:
            return table[name]
    raise AssertionError(name)


def _unknown(chosen: Kind, place: Place) -> bool:
    """Whether a module has parameters of its own, and the kind makes nothing of it."""
    name = what(place.module)
    known = name in chosen.layers or name in chosen.norms or name in chosen.asked
    return not known and any(p is not None for p in place.module._parameters.values())


_PLAIN_OF = {
    "TaskConv2d": ("Conv2d", "grouped", "depthwise"),
    "TaskModulator": ("Conv2d", "Linear", "Conv1D"),
    "TaskHyperGrid": ("Conv2d", "Linear", "Conv1D"),
}


def _makes(chosen: Kind, module: nn.Module) -> bool:
    """Whether the kind would have converted the layer that a converted one was made of."""
    name = type(module).__name__
    plain = _PLAIN_OF.get(name, (name.removeprefix("Task"),))
    return any(p in chosen.layers or p in chosen.norms for p in plain)


def _types(chosen: Kind) -> str:
    names = {**chosen.layers, **chosen.norms, **chosen.asked}
    words = {"grouped": "grouped Conv2d", "depthwise": "depthwise Conv2d"}
    return ", ".join(dict.fromkeys(words.get(name, name) for name in names))


def _nothing(
    model: nn.Module, kind: str, chosen: Kind, where: Where, found: Sequence[Place], any_hit: bool
) -> ValueError:
    types = _types(chosen)
    converted = [place.path for place in found if isinstance(place.module, TaskModule)]
    if where is None or (isinstance(where, str) and read_counted(where) is not None and not any_hit):
        already = f"; converted already: {', '.join(map(repr, converted[:3]))}, ..." if converted else ""
        return ValueError(f"model: expected a layer that kind {kind!r} converts ({types}), got none{already}")
    told = repr(where) if isinstance(where, (str, list, tuple)) else getattr(where, "__name__", repr(where))
    if isinstance(where, str) and read_counted(where) is not None:
        return ValueError(f"where: expected a share that one layer fits in, got {where!r}")
    have = [place.path for place in found if what(place.module) in chosen.layers or what(place.module) in chosen.norms]
    some = ", ".join(map(repr, have[:5])) + (", ..." if len(have) > 5 else "") if have else "none"
    if any_hit:
        return ValueError(
            f"where: expected a layer that kind {kind!r} converts ({types}), got {told}, which matches other modules "
            f"alone; layers that it converts: {some}"
        )
    names = [where] if isinstance(where, str) else where if isinstance(where, (list, tuple)) else []
    hint = _way_to_names([name for name in names if isinstance(name, str)], found)
    return ValueError(f"where: expected to match a layer, got {told}, which matches nothing{hint}; layers: {some}")


def _way_to_names(names: Sequence[str], found: Sequence[Place]) -> str:
    """For errors: how the last part of a path, as PEFT takes it, is written here."""
    ends = [name for name in names if any(place.path.endswith(f".{name}") for place in found)]
    return f"; a name means a whole path, and {f'*.{ends[0]}'!r} all that end so" if ends else ""


def _made(place: Place, make: Make, names: tuple[str, ...], options: dict[str, Any]) -> nn.Module:
    try:
        return make(place.module, names, **options)
    except (TypeError, ValueError) as error:
        hint = "" if str(error).startswith(tuple(options)) else "; leave it out by where="
        raise type(error)(f"{place.path or 'model'}: {error}{hint}") from error


def _tie(new: Sequence[tuple[nn.Module, nn.Module]]) -> None:
    """Layers with the same weight get the same parts, so that a tied weight stays one for each task."""
    first: dict[tuple[Any, ...], TaskModule] = {}
    for old, layer in new:
        weight = old._parameters.get("weight")
        if weight is None or not isinstance(layer, TaskModule):
            continue
        parts = {name: held for name, held in layer.containers().items() if name in _OF_THE_WEIGHT}
        key = (id(weight), *((name, tuple(p.shape for p in held.values())) for name, held in parts.items()))
        if key not in first:
            first[key] = layer
            continue
        for child in parts:
            held = first[key].containers()[child]
            held._tied = True
            setattr(layer, child, held)


def _replaced(model: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    if id(model) in made:
        return made[id(model)]
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child is not None and id(child) in made:
                setattr(module, name, made[id(child)])
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and next(task_layers(module), None) is not None:
            # torch's fused encoder reads the weights of its layers past their forwards
            module.use_nested_tensor = False
    return model
