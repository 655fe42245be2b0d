"""`memory="stream"`: the surgery on a batch whose Gram matrix alone was kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtl.parameters import describe
from fastmtl.surgery.accumulate import Updates
from fastmtl.task_gradients.one_pass.batch import Batch


class StreamedGradients:
    """Task gradients of which the Gram matrix alone was kept: the update takes one more backward pass."""

    is_empty = partitioned = False

    def __init__(
        self, batch: Batch, params: Sequence[Tensor], present: Sequence[bool] | Tensor, poison: Tensor | None
    ) -> None:
        self.names, self.device = batch.names, batch.ids.device
        self.present, self.poison = present, poison
        self._batch, self._params = batch, params

    def gram(self) -> Tensor:
        if self._batch.gram is None:
            return torch.zeros(len(self.names), len(self.names), device=self.device)
        return self._batch.gram.to(self._batch.gram_dtype)

    def combine(self, weights: Tensor) -> Updates:
        # samples of no task count as they are
        found = self._batch.weighted_gradients(torch.cat([weights, weights.new_ones(1)]), self._params, keep=False)
        lost = next((p for p in self._params if p in self._batch.in_gram and p not in found), None)
        if lost is not None:
            name = describe(lost, self._batch.params[lost])
            raise RuntimeError(
                f"one_pass: memory='stream' takes a second backward pass, which gave {name} no gradient, "
                "as that of a compiled graph does: use memory='bank', or call the model uncompiled"
            )
        return list(found.items())
