"""Fused ops on task gradients and with per-task weights.

All live in `torch.ops.fastmtl`; these are their checked Python calls.
"""

from fastmtl.core.task_weights import TaskPlan
from fastmtl.ops.gradients.average_gradients import average_gradients
from fastmtl.ops.gradients.combine import combine
from fastmtl.ops.gradients.excess_risks import excess_risks
from fastmtl.ops.gradients.graddrop import graddrop
from fastmtl.ops.gradients.gradvac import gradvac_coefficients
from fastmtl.ops.gradients.gram import gram
from fastmtl.ops.gradients.method_weights import method_weights
from fastmtl.ops.gradients.order import order_state, random_order
from fastmtl.ops.gradients.pcgrad import pcgrad, pcgrad_coefficients, pcgrad_project
from fastmtl.ops.gradients.trimmed_mean import trimmed_mean
from fastmtl.ops.task_weights.task_batch_norm import task_batch_norm
from fastmtl.ops.task_weights.task_conv2d import task_conv2d, task_conv2d_weight_grad
from fastmtl.ops.task_weights.task_linear import task_linear, task_linear_weight_grad
from fastmtl.ops.task_weights.task_lora import task_lora
from fastmtl.ops.task_weights.task_plan import task_plan
from fastmtl.ops.task_weights.task_scale_shift import task_scale_shift

__all__ = [
    "TaskPlan",
    "average_gradients",
    "combine",
    "excess_risks",
    "graddrop",
    "gradvac_coefficients",
    "gram",
    "method_weights",
    "order_state",
    "pcgrad",
    "pcgrad_coefficients",
    "pcgrad_project",
    "random_order",
    "task_batch_norm",
    "task_conv2d",
    "task_conv2d_weight_grad",
    "task_linear",
    "task_linear_weight_grad",
    "task_lora",
    "task_plan",
    "task_scale_shift",
    "trimmed_mean",
]
