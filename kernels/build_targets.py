"""Every Triton kernel in every configuration, for compiling without a device."""

from __future__ import annotations

from collections.abc import Iterator

from fastmtl.kernels.common.build_target import BuildTarget
from fastmtl.kernels.gradients import elementwise_launchers, launchers
from fastmtl.kernels.task_weights import (
    batch_norm_launchers,
    conv_build_targets,
    lora_build_targets,
    task_plan,
    task_scale_shift,
)


def build_targets() -> Iterator[BuildTarget]:
    """Not under the interpreter."""
    for family in (
        conv_build_targets,
        lora_build_targets,
        task_plan,
        task_scale_shift,
        batch_norm_launchers,
        launchers,
        elementwise_launchers,
    ):
        yield from family.build_targets()
