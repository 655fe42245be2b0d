"""Which nodes of a graph are those of this folder, and so have the rows of the parameters behind them."""

from __future__ import annotations

from typing import Any

from fastmtl.task_gradients.one_pass.autograd.broadcast import ExpandByTask, SplitByTask
from fastmtl.task_gradients.one_pass.autograd.by_task import ByTask
from fastmtl.task_gradients.one_pass.autograd.conv import ConvByTask
from fastmtl.task_gradients.one_pass.autograd.embeddings import EmbeddingByTask
from fastmtl.task_gradients.one_pass.autograd.ends import CollectRows
from fastmtl.task_gradients.one_pass.autograd.linear import LinearByTask
from fastmtl.task_gradients.one_pass.autograd.norms import BatchNormByTask, GroupNormByTask, LayerNormByTask
from fastmtl.task_gradients.one_pass.autograd.products import GroupedByTask, ProductByTask
from fastmtl.task_gradients.one_pass.autograd.task_layer import SharedByTask

FUNCTIONS = (
    LinearByTask,
    ProductByTask,
    GroupedByTask,
    ConvByTask,
    SharedByTask,
    ByTask,
    EmbeddingByTask,
    ExpandByTask,
    SplitByTask,
    LayerNormByTask,
    GroupNormByTask,
    BatchNormByTask,
    CollectRows,
)
_NODES = tuple(f._backward_cls for f in FUNCTIONS)


def takes_apart(node: Any) -> bool:
    """Whether a node of a graph gives rows to the parameters that its function was called with."""
    return isinstance(node, _NODES)
