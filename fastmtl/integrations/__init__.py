"""Gradient surgery in training loops that others run: mixins for the `Trainer` of `transformers`.

They import none of these libraries; docs/guides/integrations.md shows Lightning and Accelerate too, which need no more
than the calls themselves.
"""

from fastmtl.integrations.trainer import LossesTraining, OnePassTraining

__all__ = ["LossesTraining", "OnePassTraining"]
