"""Layer norm and RMS norm by task in 16 bits and under autocast: rounded once, in the dtype of the plain layer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastmtl.nn import TaskLayerNorm, TaskRMSNorm, tasks

NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer norm": lambda: nn.LayerNorm(24),
    "layer norm without bias": lambda: nn.LayerNorm(24, bias=False),
    "layer norm of two dimensions": lambda: nn.LayerNorm((3, 8)),
    "rms norm": lambda: nn.RMSNorm(24, eps=1e-6),
    "rms norm with torch's eps": lambda: nn.RMSNorm(24),
}


def _plain(kind: str, dtype: torch.dtype) -> nn.Module:
    layer = NORMS[kind]()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(0.5, 2.0)
    return layer.to(dtype)


def _by_task(layer: nn.Module) -> nn.Module:
    return (TaskLayerNorm if isinstance(layer, nn.LayerNorm) else TaskRMSNorm).from_layer(layer, 2)


def _run(layer: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(grad.to(y.dtype))
    assert x.grad is not None
    return y.detach(), x.grad


def _assert_rounded_once(found: Tensor, expected: Tensor) -> None:
    half = torch.finfo(found.dtype).eps / 2
    # 1e-5: what float32 makes of it on the way
    assert ((found.double() - expected).abs() <= half * expected.abs() * 1.01 + 1e-5 * expected.abs().max()).all()


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("weights", ["narrow", "float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_norm_is_rounded_once(kind: str, weights: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = _plain(kind, dtype if weights == "narrow" else torch.float32)
    converted = _by_task(layer)
    shape = (6, *getattr(layer, "normalized_shape", (24,)))
    x, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    wide = copy.deepcopy(layer).double()
    if isinstance(wide, nn.RMSNorm) and wide.eps is None:
        wide.eps = torch.finfo(torch.float32).eps
    y, dx = _run(wide, x.double(), grad.double())
    with tasks(torch.tensor([0, 1, 1, 0, 1, 0])):
        found, found_dx = _run(converted, x, grad)
    assert found.dtype == found_dx.dtype == dtype
    _assert_rounded_once(found, y)
    _assert_rounded_once(found_dx, dx)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_leaves_the_dtype_of_the_plain_norm(kind: str, dtype: torch.dtype) -> None:
    """A residual stream in float32 stays in it."""
    torch.manual_seed(0)
    layer = _plain(kind, torch.float32)
    converted = _by_task(layer)
    x = torch.randn(4, *getattr(layer, "normalized_shape", (24,))).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16), tasks(torch.tensor([1, 0, 1, 0])):
        expected, found = layer(x), converted(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-5)
