"""On both sides of every crossover a task op gives the same results: those of the float64 reference."""

from __future__ import annotations

import cases_task as table
import pytest
import torch
from cases_task import ConvCase, LinearCase, TaskCase
from conftest import skip_or_fail

from fastmtl.core.dispatch import unavailable
from fastmtl.tuning.search import use_table
from fastmtl.tuning.table import Limits, uniform

# a linear layer, a pixelwise filter on rows side by side and on runs of pixels, and a 3x3 in both orders
LAYERS: dict[str, TaskCase] = {
    "linear": LinearCase(),
    "1x1 channels_last": ConvCase(kernel=(1, 1), padding=0, x_layout="channels_last", weight_layout="channels_last"),
    "1x1 contiguous": ConvCase(kernel=(1, 1), padding=0),
    "1x1 grouped": ConvCase(kernel=(1, 1), padding=0, groups=2, cin=4, cout=6, x_layout="channels_last"),
    "3x3 channels_last": ConvCase(x_layout="channels_last", weight_layout="channels_last"),
    "3x3 contiguous": ConvCase(),
}
WAYS = {"direct": Limits(None, 0), "matmul": Limits(0, None), "convolution": Limits(0, 0)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LAYERS)
def test_every_way_gives_the_reference(name: str, way: str, dtype: torch.dtype) -> None:
    if (reason := unavailable("cpu", "cpu")) is not None:
        skip_or_fail(reason)
    for call_bytes in (0, 10**12):  # a call per run of neighbours; samples copied together
        for options in (
            {"gate": "values", "bias": "per_task"},
            {"gate": "zeros", "delta": "list", "bias": "shared"},
            {"delta": "stacked", "shared": False},
        ):
            case = LAYERS[name].but(dtype=dtype, ids="random", **options)
            made, want = case.make().leaves(), table.expected(case)
            with use_table(uniform(WAYS[way], call_bytes, 0)):
                y = case.run(made)
                found = table.gradients(y, made)
            table.assert_result(case, y, want)
            table.assert_gradients(case, made, found, want)
