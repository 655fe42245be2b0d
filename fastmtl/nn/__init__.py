"""Layers and networks with per-task parts, and the context that tells them the tasks of a batch."""

from fastmtl.nn.containers import TaskBuffers, TaskModules, TaskParameters
from fastmtl.nn.context import checkpoint_contexts, tasks
from fastmtl.nn.layers.attention import TaskMultiheadAttention
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
from fastmtl.nn.module import TaskModule

__all__ = [
    "TapsGate",
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
    "checkpoint_contexts",
    "tasks",
]
