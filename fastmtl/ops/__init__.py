"""Fused ops on task gradients. All live in `torch.ops.fastmtl`; these are their checked Python calls."""

from fastmtl.ops.combine import combine
from fastmtl.ops.gram import gram
from fastmtl.ops.pcgrad import pcgrad, pcgrad_coefficients, pcgrad_project, random_order

__all__ = ["combine", "gram", "pcgrad", "pcgrad_coefficients", "pcgrad_project", "random_order"]
