"""Small networks, torch's own and those of `transformers`, and what the tests of converted models do with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fastmtl.nn import TaskModule, tasks

NAMES = ("photo", "sketch", "clipart")
IDS = torch.tensor([2, 0, 1, 0])


class BasicBlock(nn.Module):
    """Of a ResNet: two convolutions, and a third beside them where the size changes."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout)
        self.conv2, self.bn2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout)
        self.downsample = None
        if stride != 1 or cin != cout:
            self.downsample = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """A residual network of three blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.layer1, self.layer2, self.layer3 = BasicBlock(8, 8, 1), BasicBlock(8, 16, 2), BasicBlock(16, 16, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


class DenseNet(nn.Module):
    """Each layer sees the results of all before it, with norms before the convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 4 * k) for k in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(8 + 4 * k, 4, 3, padding=1, bias=False) for k in range(3))
        self.classifier = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(torch.relu(norm(x)))], 1)
        return self.classifier(x.mean((2, 3)))


class TinyViT(nn.Module):
    """Patches, torch's own encoder (with its fused attention), a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True), 2,
            enable_nested_tensor=False,
        )  # fmt: skip
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.patches(x).flatten(2).mT).mean(1))


class Case(NamedTuple):
    """A network and a batch of four."""

    model: nn.Module
    inputs: dict[str, Tensor]
    repeat: bool = False  # whether it folds windows into the batch

    def run(self, model: nn.Module) -> Tensor:
        y = model(**self.inputs)
        return y if isinstance(y, Tensor) else y.logits


def _pictures(model: nn.Module, size: int = 8) -> Case:
    return Case(model, {"x": torch.randn(4, 3, size, size)})


def _transformers() -> Any:
    return pytest.importorskip("transformers", reason="transformers is not installed")


def _vit() -> Case:
    tf = _transformers()
    config = tf.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                          image_size=16, patch_size=8, num_labels=5)  # fmt: skip
    return Case(tf.ViTForImageClassification(config), {"pixel_values": torch.randn(4, 3, 16, 16)})


def _bert() -> Case:
    tf = _transformers()
    config = tf.BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                           intermediate_size=32, num_labels=5, max_position_embeddings=16)  # fmt: skip
    return Case(tf.BertForSequenceClassification(config), {"input_ids": torch.randint(0, 50, (4, 7))})


def _gpt2() -> Case:
    tf = _transformers()
    config = tf.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    return Case(tf.GPT2LMHeadModel(config), {"input_ids": torch.randint(0, 50, (4, 7))})


def _llama() -> Case:
    tf = _transformers()
    config = tf.LlamaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                            intermediate_size=32)  # fmt: skip
    return Case(tf.LlamaForCausalLM(config), {"input_ids": torch.randint(0, 50, (4, 7))})


def _swin() -> Case:
    tf = _transformers()
    config = tf.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4,
                           num_labels=5)  # fmt: skip
    return Case(tf.SwinForImageClassification(config), {"pixel_values": torch.randn(4, 3, 16, 16)}, repeat=True)


def _convnext() -> Case:
    tf = _transformers()
    config = tf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=5, image_size=16)
    return Case(tf.ConvNextForImageClassification(config), {"pixel_values": torch.randn(4, 3, 16, 16)})


MODELS: dict[str, Callable[[], Case]] = {
    "resnet": lambda: _pictures(ResNet()),
    "densenet": lambda: _pictures(DenseNet()),
    "encoder": lambda: _pictures(TinyViT(), 16),
    "vit": _vit,
    "bert": _bert,
    "gpt2": _gpt2,
    "llama": _llama,
    "swin": _swin,
    "convnext": _convnext,
}


def make(name: str) -> Case:
    torch.manual_seed(0)
    case = MODELS[name]()
    case.model.eval()
    return case


def tell(case: Case, ids: Any = None) -> tasks:
    return tasks(IDS if ids is None else ids, repeat=case.repeat)


@torch.no_grad()
def move(model: nn.Module, amount: float = 0.1) -> None:
    """Moves all that belongs to single tasks, each task another way."""
    generator = torch.Generator().manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, TaskModule):
            for name in layer.tasks:
                for x in layer.part(name).values():
                    if x.is_floating_point():
                        x.add_(torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype), alpha=amount)
