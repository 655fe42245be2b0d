"""fastmtl: fused kernels for multi-task learning in PyTorch."""

from fastmtl._version import __version__, require_torch

require_torch()

from fastmtl import analysis, integrations, methods, nn, ops, optim
from fastmtl.core.dispatch import use_backend
from fastmtl.parameters import mark_per_task
from fastmtl.surgery.result import Surgery
from fastmtl.task_gradients.backward import backward
from fastmtl.task_gradients.bank import GradientBank
from fastmtl.task_gradients.one_pass.bank import OnePassBank
from fastmtl.task_gradients.one_pass.context import one_pass

__all__ = [
    "GradientBank",
    "OnePassBank",
    "Surgery",
    "__version__",
    "analysis",
    "backward",
    "integrations",
    "mark_per_task",
    "methods",
    "nn",
    "one_pass",
    "ops",
    "optim",
    "use_backend",
]
