"""fastmtl: fused kernels for multi-task learning in PyTorch."""

from fastmtl import methods, nn, ops, optim
from fastmtl._backend import use_backend
from fastmtl._marks import mark_per_task
from fastmtl._version import __version__
from fastmtl.bank import GradientBank
from fastmtl.one_pass import OnePassBank, one_pass
from fastmtl.surgery import Surgery, backward

__all__ = [
    "GradientBank",
    "OnePassBank",
    "Surgery",
    "__version__",
    "backward",
    "mark_per_task",
    "methods",
    "nn",
    "one_pass",
    "ops",
    "optim",
    "use_backend",
]
