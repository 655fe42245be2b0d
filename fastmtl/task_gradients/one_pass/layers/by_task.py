"""Calls of any kind that keep samples apart and that no layer takes apart: LSTM and its kin, distances to a table.

The call runs as it is. In the backward pass there is one of that call for each task: through the graph that it has
left, with zeros for what belongs to others; or, of recurrent layers without dropout, of the task's samples alone.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmtl.core.schemas import autocast_is_on
from fastmtl.task_gradients.one_pass.autograd.by_task import ByTask, OnItsGraph, OnItsSamples, Passes
from fastmtl.task_gradients.one_pass.layers.protocol import Followed, LayerTracker, Unproven, carries_samples
from fastmtl.task_gradients.one_pass.sample_axis import CONSTANT, FromParameters, PerSample, SampleAxis, reason
from fastmtl.task_gradients.one_pass.tensors import Written, nested, replaced, versions
from fastmtl.task_gradients.one_pass.torch_call import TorchCall
from fastmtl.task_gradients.one_pass.torch_names import writes


def by_task(tracker: LayerTracker, call: TorchCall) -> Followed:
    """The call as it is, if it is proven, by a rule or by experiment, that it keeps samples apart.

    Raises:
        Unproven: why it isn't, or can't be run like that.
    """
    unfit = f"{call.name} is not among the layers that one_pass takes apart"
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        raise Unproven(unfit)
    # dynamo, which runs this as it is behind a graph break, is not to trace parts of it
    run = _disabled() if "torch._dynamo" in sys.modules else _by_task
    if not writes(call.func):
        return run(tracker, call, unfit)  # type: ignore[no-any-return]
    x = call.first()
    if x is not call.args[0] or not carries_samples(tracker, x):
        raise Unproven(f"{unfit}; it writes into what carries no samples")
    # on a copy of the samples, which is copied back
    out, axis = run(tracker, call._replace(func=Written(call.func)), unfit)
    tracker.mark(out, axis)
    return tracker.follow(Tensor.copy_, (x, out), {})


@functools.lru_cache
def _disabled() -> Any:
    return sys.modules["torch._dynamo"].disable(_by_task)


def _by_task(tracker: LayerTracker, call: TorchCall, unfit: str) -> Followed:
    tensors = list({id(x): x for x in call.tensors()}.values())
    axes = [tracker.axis_of(x) for x in tensors]
    if all(axis.task_ids.single_row() is not None for axis in axes if isinstance(axis, PerSample)):
        raise Unproven(unfit)  # of one task alone, which needs no proof
    params = [x for x, axis in zip(tensors, axes, strict=True) if isinstance(axis, FromParameters)]
    inputs = [
        x for x, axis in zip(tensors, axes, strict=True) if x.requires_grad and not isinstance(axis, FromParameters)
    ]
    leaves = {id(x): x.detach().requires_grad_() for x in (*inputs, *params)}
    before = versions(tensors)
    args, kwargs = (replaced(given, lambda x: leaves.get(id(x), x)) for given in (call.args, call.kwargs))
    with torch.enable_grad():
        out = call.func(*args, **kwargs)
    if versions(tensors) != before:
        raise Unproven(f"{unfit}; it changes its arguments")
    standing = {id(leaves[id(x)]): x for x in (*inputs, *params)}

    def axis_of(x: Tensor) -> SampleAxis:
        axis = tracker.axis_of(standing.get(id(x), x))
        return CONSTANT if isinstance(axis, FromParameters) else axis

    # where the samples need no gradient, they would count as constants beside the parameters
    flows = any(isinstance(axis, PerSample) and x.requires_grad for x, axis in zip(tensors, axes, strict=True))
    ran = TorchCall(call.name, call.func, args, kwargs, axis_of, out if flows else replaced(out, lambda x: x.detach()))
    found = tracker.settled(ran)
    results = nested(out)
    passed = [k for k, x in enumerate(results) if x.requires_grad]
    listed = found if isinstance(found, list) else [found] * len(results)
    along: list[PerSample] = []
    for k in passed:
        axis = listed[k]
        if not isinstance(axis, PerSample):
            raise Unproven(f"{unfit}; {reason(axis) or f'{call.name} sums over the samples'}")
        along.append(axis)
    if not passed:
        return out, found
    positions = [axis.positions() for axis in along]
    on_host = positions[0].device.type == "cpu"
    num_rows = tracker.task_ids.num_rows
    rows: Sequence[int] = torch.cat(positions).unique().tolist() if on_host else range(num_rows)
    passes: Passes | None = _on_its_samples(ran, list(leaves.values()), along, passed) if on_host else None
    if passes is None:
        places = [(ids, axis.axis) for ids, axis in zip(positions, along, strict=True)]
        passes = OnItsGraph(list(leaves.values()), [results[k] for k in passed], places)
    weights = [tracker.weight(p) for p in params]
    given = iter(
        ByTask.apply(
            passes, [results[k] for k in passed], rows, num_rows, [w.form for w in weights],
            *inputs, *[w.value for w in weights], *[t for w in weights for t in w.targets],
        )
    )  # fmt: skip
    outs = iter([next(given) if x.requires_grad else x for x in results])
    return replaced(out, lambda _: next(outs)), found


def _on_its_samples(
    call: TorchCall, leaves: Sequence[Tensor], out_axes: Sequence[PerSample], passed: Sequence[int]
) -> OnItsSamples | None:
    """Of recurrent layers, whose samples can be taken one task at a time. None: it is another call, or draws random
    numbers."""
    if len(call.args) < 2 or call.kwargs or autocast_is_on(call.first().device.type):
        return None
    x, state = call.args[0], nested(call.args[1])
    if call.name in ("lstm", "gru", "rnn") and x.dim() == 3:  # not packed
        dropout, train, batch_first = call.args[5], call.args[6], call.args[8]
        if dropout and train:
            return None
        own, of_state = (0 if batch_first else 1), 1
    elif call.name in ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"):
        own = of_state = 0
    else:
        return None
    tensors = call.tensors()
    axes: list[int | None] = [own, *[of_state] * len(state), *[None] * (len(tensors) - 1 - len(state))]
    if any(a is b for a in (x, *state) for b in tensors[1 + len(state) :]):
        return None
    of_leaf = {id(leaf): k for k, leaf in enumerate(leaves)}
    # a tensor that stands in several places is one leaf, and gathered once
    places: dict[int, int] = {}
    saved: list[Tensor] = []
    kept: list[int | None] = []
    for y, axis in zip(tensors, axes, strict=True):
        if id(y) in places:
            if kept[places[id(y)]] != axis:
                return None
            continue
        places[id(y)] = len(saved)
        saved.append(y)
        kept.append(axis)
    order = [places[id(y)] for y in tensors]
    func, nothing = call.func, torch.empty(0)
    args = replaced(call.args, lambda _: nothing)

    def run(values: Sequence[Tensor]) -> Sequence[Tensor]:
        turn = iter(order)
        again = nested(func(*replaced(args, lambda _: values[next(turn)])))
        return [again[k] for k in passed]

    return OnItsSamples(
        run, [y.detach() for y in saved], [of_leaf.get(id(y)) for y in saved], kept,
        [axis.axis for axis in out_axes], out_axes[0].positions(),
    )  # fmt: skip
