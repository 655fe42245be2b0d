"""Layers and networks with per-task parts, and the context that tells them the tasks of a batch."""

from fastmtl.nn.containers import TaskBuffers, TaskParameters
from fastmtl.nn.context import checkpoint_contexts, tasks
from fastmtl.nn.layers.conv import TaskConv2d
from fastmtl.nn.layers.conv1d import TaskConv1D
from fastmtl.nn.layers.gate import TapsGate
from fastmtl.nn.layers.linear import TaskLinear
from fastmtl.nn.layers.norms import TaskLayerNorm, TaskRMSNorm
from fastmtl.nn.layers.scale_shift import TaskScaleShift
from fastmtl.nn.module import TaskModule

__all__ = [
    "TapsGate",
    "TaskBuffers",
    "TaskConv1D",
    "TaskConv2d",
    "TaskLayerNorm",
    "TaskLinear",
    "TaskModule",
    "TaskParameters",
    "TaskRMSNorm",
    "TaskScaleShift",
    "checkpoint_contexts",
    "tasks",
]
