"""Models of torchvision and timm, where they are installed: surgery, one pass and conversion."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastmtl
from fastmtl.nn import convert, merge, tasks


def model_of(library: str) -> nn.Module:
    # a torchvision that does not fit torch raises a RuntimeError when it is imported
    module = pytest.importorskip(library, exc_type=(ImportError, RuntimeError))  # type: ignore[arg-type]
    if library == "torchvision":
        return module.models.resnet18(num_classes=4)
    return module.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=4)


@pytest.mark.filterwarnings("ignore:the shared parameters are frozen")
@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_models(library: str) -> None:
    model = model_of(library).eval()
    x, labels, ids = torch.randn(6, 3, 32, 32), torch.arange(6) % 4, torch.arange(6) % 2
    each = F.cross_entropy(model(x), labels, reduction="none")
    surgery = fastmtl.backward([each[ids == t].sum() for t in range(2)], model)
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with fastmtl.one_pass(model, ids, 2) as bank:
        F.cross_entropy(model(x), labels, reduction="sum").backward()
    torch.testing.assert_close(bank.apply().gram, surgery.gram, rtol=1e-3, atol=1e-4)
    for p, want in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-3, atol=1e-4)

    convert(model, ["a", "b"], "lora", rank=2)
    with torch.no_grad(), tasks(ids):
        mixed = model(x)
        torch.testing.assert_close(mixed[ids == 1], merge(model, "b")(x[ids == 1]), rtol=1e-4, atol=1e-5)
