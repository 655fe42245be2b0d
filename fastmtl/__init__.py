"""fastmtl: fused kernels for multi-task learning in PyTorch."""

from fastmtl import ops
from fastmtl._backend import use_backend

__version__ = "0.1.0"

__all__ = ["ops", "use_backend", "__version__"]
