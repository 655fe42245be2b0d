"""Tables of parameters, from which the samples pick rows by numbers: embeddings and indexing."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtl.task_gradients.one_pass.autograd.embeddings import EmbeddingByTask
from fastmtl.task_gradients.one_pass.layers.protocol import (
    Followed,
    Layer,
    LayerTracker,
    Unproven,
    from_parameters,
    plan_of,
    sample_axis,
)
from fastmtl.task_gradients.one_pass.sample_axis import PerSample
from fastmtl.task_gradients.one_pass.torch_call import TorchCall, dims_of


def looked_up(tracker: LayerTracker, w: Tensor, index: Tensor, padding: int = -1) -> tuple[Tensor, PerSample]:
    """`w[index]`, the index carrying samples. The row `padding` gets no gradient; -1: there is none of the kind."""
    axis = sample_axis(tracker, index)
    ids, _, _ = plan_of(index, axis)
    weight, num_rows = tracker.weight(w), axis.task_ids.num_rows
    y = EmbeddingByTask.apply(weight.value, index, ids, padding, weight.form, num_rows, *weight.targets)
    return y, axis


def _embedding(tracker: LayerTracker, call: TorchCall) -> Followed:
    # F.embedding(input, weight, padding_idx, max_norm, ...); torch.embedding(weight, indices, padding_idx, ...)
    plain = getattr(call.func, "__module__", None) == "torch.nn.functional"
    if plain:
        index, w = call.argument(0, "input"), call.argument(1, "weight")
        padding, norm = call.argument(2, "padding_idx"), call.argument(3, "max_norm")
        scale, sparse = (call.argument(k, n, False) for k, n in ((5, "scale_grad_by_freq"), (6, "sparse")))
        if norm is not None:
            raise Unproven("an embedding with max_norm, which changes its table")
    else:
        w, index = call.argument(0, "weight"), call.argument(1, "indices")
        padding = call.argument(2, "padding_idx", -1)
        scale, sparse = (call.argument(k, n, False) for k, n in ((3, "scale_grad_by_freq"), (4, "sparse")))
    if scale or sparse:
        raise Unproven("an embedding with scale_grad_by_freq or sparse gradients")
    padding = -1 if padding is None else padding + w.shape[0] if padding < 0 and plain else padding
    return looked_up(tracker, w, index, padding)


def _getitem(tracker: LayerTracker, call: TorchCall) -> Followed:
    w, index = call.args
    if isinstance(index, tuple) and len(index) == 1:
        index = index[0]
    number = isinstance(index, Tensor) and index.dtype not in (torch.bool, torch.uint8)
    if not number or not from_parameters(tracker, w):
        raise Unproven("a parameter indexed by samples in more than its first dimension")
    if index.dim() == 0:
        raise Unproven("a parameter indexed by a single number")
    return looked_up(tracker, w, index)


def _index_select(tracker: LayerTracker, call: TorchCall) -> Followed:
    w, index = call.args[0], call.argument(2, "index")
    if not from_parameters(tracker, w) or dims_of(w, call.argument(1, "dim"))[0] != 0:
        raise Unproven("a parameter indexed by samples in another than its first dimension")
    return looked_up(tracker, w, index)


LAYERS: dict[str, Layer] = {"embedding": _embedding, "getitem": _getitem, "index_select": _index_select}
