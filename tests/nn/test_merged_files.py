"""Merged and converted models as others keep them: `save_pretrained`, and processes without fastmtl."""

from __future__ import annotations

import functools
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import task_models
import torch
from task_models import NAMES, move
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from fastmtl.nn import TaskModule, checkpoint_contexts, convert, merge, tasks

X = torch.arange(24).view(4, 6)


def gpt2() -> nn.Module:
    return task_models.make("gpt2").model


def t5() -> nn.Module:
    tf = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = tf.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return tf.T5ForConditionalGeneration(config).eval()


def change(model: nn.Module) -> None:
    """Moves what belongs to tasks, and opens their gates."""
    move(model)
    for name, p in model.named_parameters():
        if ".gate." in name:
            nn.init.constant_(p, 0.6)


def run(model: nn.Module) -> Tensor:
    labels = {"labels": X} if hasattr(model, "shared") else {}
    return model(input_ids=X, **labels).logits


BOTH = {gpt2: ["transformer.wte", "lm_head"], t5: ["*.embed_tokens", "lm_head", "shared"]}


def saved_and_loaded(model: nn.Module, folder: Path) -> nn.Module:
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()


@pytest.mark.parametrize("kind", ["dense", "separate", "taps"])
@pytest.mark.parametrize("make", [gpt2, t5])
def test_what_is_tied_is_saved_tied(make: Any, kind: str, tmp_path: Path) -> None:
    model = convert(make(), NAMES, kind, BOTH[make])
    change(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        single = merge(model, "photo")
    tied = single.get_expanded_tied_weights_keys()
    assert tied and all(single.get_parameter(a) is single.get_parameter(b) for a, b in tied.items())
    with tasks("photo"):
        expected = run(model)
    assert not torch.allclose(run(make()), expected, atol=1e-2)
    back = saved_and_loaded(single, tmp_path)
    torch.testing.assert_close(run(back), expected, atol=1e-5, rtol=1e-4)
    assert all(back.get_parameter(a) is back.get_parameter(b) for a, b in tied.items())


@pytest.mark.parametrize(
    ("make", "where", "named"),
    [
        (gpt2, "lm_head", "lm_head.weight, transformer.wte.weight"),
        (gpt2, "transformer.wte", "lm_head.weight, transformer.wte.weight"),
        (t5, "lm_head", "lm_head.weight, shared.weight"),
        # what stays as it was is tied among itself, and would be loaded from the one that is kept
        (t5, "shared", "encoder.embed_tokens.weight, shared.weight, decoder.embed_tokens.weight, lm_head.weight"),
        (t5, "encoder.embed_tokens", "encoder.embed_tokens.weight, shared.weight"),
    ],
)
@pytest.mark.parametrize("kind", ["dense", "separate"])
def test_what_differs_is_saved_untied(make: Any, kind: str, where: str, named: str, tmp_path: Path) -> None:
    model = convert(make(), NAMES, kind, [where])
    change(model)
    with pytest.warns(UserWarning, match=rf"task 'photo' differs in weights .*: {named}; save_pretrained"):
        single = merge(model, "photo")
    assert single.config.to_dict() == model.config.to_dict()
    with tasks("photo"):
        expected = run(model)
    back = saved_and_loaded(single, tmp_path)
    torch.testing.assert_close(run(back), expected, atol=1e-5, rtol=1e-4)
    for name, p in single.named_parameters(remove_duplicate=False):
        assert torch.equal(back.get_parameter(name), p), name


def test_copies_that_are_equal_are_tied_again(tmp_path: Path) -> None:
    model = convert(gpt2(), NAMES, "separate", "lm_head")
    single = merge(model, "photo")
    assert single.lm_head.weight is single.transformer.wte.weight
    torch.testing.assert_close(run(saved_and_loaded(single, tmp_path)), run(gpt2()))


@pytest.mark.parametrize("kind", ["dense", "separate", "taps"])
@pytest.mark.parametrize("make", [gpt2, t5])
def test_a_converted_model_is_saved_as_a_trainer_saves_it(make: Any, kind: str, tmp_path: Path) -> None:
    load_file = pytest.importorskip("safetensors.torch", reason="safetensors is not installed").load_file
    model = convert(make(), NAMES, kind, BOTH[make])
    change(model)
    model.save_pretrained(tmp_path)
    other = convert(make(), NAMES, kind, BOTH[make])
    # as Trainer loads: what is tied stands in the file once
    assert not other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False).unexpected_keys
    for name in NAMES:
        with tasks(name):
            assert torch.equal(run(other), run(model))
    plain = make()
    assert all(
        set(m._tied_weights_keys) == set() for m in convert(plain, NAMES, kind, "lm_head").modules()
        if isinstance(m, TaskModule)
    )  # fmt: skip


class Recomputed(nn.Module):
    """Keeps what it hands to checkpoints, as a dictionary, a partial and a function."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.how: dict[str, Any] = {"use_reentrant": False, "nested": [{"context_fn": checkpoint_contexts}]}
        self.run = functools.partial(checkpoint, use_reentrant=False, context_fn=checkpoint_contexts)
        self.context_fn, self.other = checkpoint_contexts, functools.partial(torch.add, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.inner, x)


def loaded_without_fastmtl(model: nn.Module, x: Tensor, tmp_path: Path) -> Tensor:
    """The result of a pickled model in a process in which importing fastmtl raises."""
    torch.save((model, x), tmp_path / "model.pt")
    script = f"""
import sys
sys.modules["fastmtl"] = None
sys.path.insert(0, {str(Path(__file__).parent)!r})
sys.path.insert(0, {str(Path(task_models.__file__).parent)!r})
import torch
model, x = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
y = model(x)
y = y if isinstance(y, torch.Tensor) else y.logits
y.sum().backward()
assert all(p.grad is not None for p in model.parameters())
torch.save(y.detach(), {str(tmp_path / "y.pt")!r})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(tmp_path / "y.pt")


def test_of_checkpoints_nothing_of_fastmtl_is_left(tmp_path: Path) -> None:
    model = convert(Recomputed(), NAMES, "dense")
    change(model)
    single = merge(model, "photo")
    assert single.run.keywords == {"use_reentrant": False, "context_fn": noop_context_fn}
    assert single.how == {"use_reentrant": False, "nested": [{"context_fn": noop_context_fn}]}
    assert single.context_fn is noop_context_fn and single.other.args == (1,)
    # the converted one goes on as before
    assert model.run.keywords["context_fn"] is model.context_fn is checkpoint_contexts
    # a partial is pickled by the name of this very file's class, so a network of torch alone goes over
    x = torch.ones(2, 4)
    alone = single.inner
    alone.run = single.run
    with tasks("photo"):
        expected = model.inner(x)
    torch.testing.assert_close(loaded_without_fastmtl(alone, x, tmp_path), expected)


def test_a_model_of_transformers_that_was_checkpointed(tmp_path: Path) -> None:
    model = convert(gpt2(), NAMES, "lora")
    change(model)
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts})
    with pytest.warns(UserWarning, match="untied"):
        single = merge(model, "photo").train()
    for module in single.modules():
        module._forward_hooks.clear()  # that of transformers, which asks for gradients of the input, can't be pickled
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with tasks("photo"):
        expected = run(model.eval())
    found = loaded_without_fastmtl(single, X, tmp_path)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
