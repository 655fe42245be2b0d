"""Which layer takes a call apart in which parameters of the bank meet samples."""

from __future__ import annotations

from fastmtl.task_gradients.one_pass.layers import (
    activations,
    attention,
    broadcast,
    conv,
    embeddings,
    linear,
    norms,
    products,
    task_layer,
    writing,
)
from fastmtl.task_gradients.one_pass.layers.by_task import by_task
from fastmtl.task_gradients.one_pass.layers.one_row import of_one_row
from fastmtl.task_gradients.one_pass.layers.protocol import Followed, Layer, LayerTracker, Unproven
from fastmtl.task_gradients.one_pass.torch_call import TorchCall
from fastmtl.task_gradients.one_pass.torch_names import LOSSES

LAYERS: dict[str, Layer] = {
    **linear.LAYERS,
    **products.LAYERS,
    **conv.LAYERS,
    **embeddings.LAYERS,
    **norms.LAYERS,
    **activations.LAYERS,
    **attention.LAYERS,
    **task_layer.LAYERS,
    **broadcast.LAYERS,
    **writing.LAYERS,
}


def run_layer(tracker: LayerTracker, call: TorchCall) -> Followed:
    """The result of a call that joins parameters of the bank with samples, and what is known of it.

    Raises:
        Unproven: no way is known to take the gradients of these parameters apart.
    """
    try:
        return _by_layer(tracker, call)
    except Unproven:
        found = of_one_row(tracker, call)
        if found is None:
            raise
        return found


def _by_layer(tracker: LayerTracker, call: TorchCall) -> Followed:
    layer = LAYERS.get(call.name)
    if layer is not None:
        return layer(tracker, call)
    if call.name in broadcast.BROADCASTS:
        return broadcast.broadcast(tracker, call)
    if call.name in LOSSES:
        raise Unproven(
            "an output that carries no samples: was the input made inside the block, or does it carry them along "
            "another dimension than batch_dim"
        )
    return by_task(tracker, call)
