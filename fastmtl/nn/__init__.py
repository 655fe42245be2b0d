"""Layers and networks with per-task parts, and the context that tells them the tasks of a batch."""

from fastmtl.nn.containers import TaskBuffers, TaskModules, TaskParameters
from fastmtl.nn.context import checkpoint_contexts, tasks
from fastmtl.nn.layers.attention import TaskMultiheadAttention
from fastmtl.nn.layers.batch_norm import TaskBatchNorm2d
from fastmtl.nn.layers.conv import TaskConv2d
from fastmtl.nn.layers.conv1d import TaskConv1D
from fastmtl.nn.layers.embedding import TaskEmbedding
from fastmtl.nn.layers.gate import TapsGate
from fastmtl.nn.layers.heads import TaskHeads
from fastmtl.nn.layers.hypergrid import TaskHyperGrid
from fastmtl.nn.layers.linear import TaskLinear
from fastmtl.nn.layers.modulator import TaskModulator
from fastmtl.nn.layers.norms import TaskLayerNorm, TaskRMSNorm
from fastmtl.nn.layers.scale_shift import TaskScaleShift
from fastmtl.nn.models.convert import convert
from fastmtl.nn.models.exchange import extract, insert
from fastmtl.nn.models.members import (
    add_task,
    freeze_task,
    param_groups,
    remove_task,
    shared_parameters,
    task_parameters,
)
from fastmtl.nn.models.merge import merge, task_names
from fastmtl.nn.models.report import LayerReport, heatmap, layer_report
from fastmtl.nn.models.training import sparsity_loss
from fastmtl.nn.models.vectors import line_scale, task_vectors
from fastmtl.nn.module import TaskModule

__all__ = [
    "LayerReport",
    "TapsGate",
    "TaskBatchNorm2d",
    "TaskBuffers",
    "TaskConv1D",
    "TaskConv2d",
    "TaskEmbedding",
    "TaskHeads",
    "TaskHyperGrid",
    "TaskLayerNorm",
    "TaskLinear",
    "TaskModulator",
    "TaskModule",
    "TaskModules",
    "TaskMultiheadAttention",
    "TaskParameters",
    "TaskRMSNorm",
    "TaskScaleShift",
    "add_task",
    "checkpoint_contexts",
    "convert",
    "extract",
    "freeze_task",
    "heatmap",
    "insert",
    "layer_report",
    "line_scale",
    "merge",
    "param_groups",
    "remove_task",
    "shared_parameters",
    "sparsity_loss",
    "task_names",
    "task_parameters",
    "task_vectors",
    "tasks",
]
