"""Modules with per-task weights, and the context that tells them the tasks of a batch."""

from fastmtl.nn.context import checkpoint_contexts, tasks
from fastmtl.nn.conv import TaskConv2d
from fastmtl.nn.layer import TaskParameters
from fastmtl.nn.linear import TaskLinear

__all__ = ["TaskConv2d", "TaskLinear", "TaskParameters", "checkpoint_contexts", "tasks"]
