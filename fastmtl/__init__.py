"""fastmtl: fused kernels for multi-task learning in PyTorch."""

from fastmtl import methods, nn, ops, optim
from fastmtl._backend import use_backend
from fastmtl._marks import mark_per_task
from fastmtl._version import __version__
from fastmtl.bank import GradientBank
from fastmtl.surgery import Surgery, backward

__all__ = [
    "GradientBank",
    "Surgery",
    "__version__",
    "backward",
    "mark_per_task",
    "methods",
    "nn",
    "ops",
    "optim",
    "use_backend",
]
