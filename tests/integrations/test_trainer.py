"""The mixins for the `Trainer` of `transformers`: the same weights as a loop written by hand, and what they refuse."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from paths import ROOT
from torch import Tensor, nn

import fastmtl
from fastmtl.integrations import LossesTraining, OnePassTraining

pytest.importorskip("accelerate", reason="accelerate is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

NAMES = ("left", "right")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 7), nn.Tanh())
        self.heads = nn.ModuleDict({name: nn.Linear(7, 3) for name in NAMES})

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss of each task and their mean; labels `[N, 2]`."""
        h = self.trunk(x)
        losses = {name: F.cross_entropy(self.heads[name](h), labels[:, k]) for k, name in enumerate(NAMES)}
        return {"loss": sum(losses.values()), **losses}


class OneHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.trunk(x), labels[:, 0])}


class OnLosses(LossesTraining, transformers.Trainer):
    def task_losses(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out = model(**inputs)
        return {name: out[name] for name in NAMES}


class InOnePass(OnePassTraining, transformers.Trainer):
    tasks = NAMES


ITEMS = [
    {"x": torch.randn(5, generator=torch.Generator().manual_seed(k)), "labels": [k % 3, k % 2], "task_ids": k % 2}
    for k in range(8)
]
BATCH = {
    "x": torch.stack([item["x"] for item in ITEMS]),
    "labels": torch.tensor([item["labels"] for item in ITEMS]),
}
IDS = torch.tensor([item["task_ids"] for item in ITEMS])


def arguments(folder: Path, **others: Any) -> Any:
    usual = {"max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "logging_steps": 1}
    # the whole of the items is one step, so that shuffling changes nothing
    settings = usual | {"max_grad_norm": 0.0, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    settings |= {"remove_unused_columns": False, "disable_tqdm": True, "lr_scheduler_type": "constant"}
    return transformers.TrainingArguments(str(folder), **settings | others)


def trained(kind: type, model: nn.Module, folder: Path, items: list[Any], **others: Any) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    trainer = kind(
        model, arguments(folder, **others), train_dataset=items, eval_dataset=items, optimizers=(optimizer, None)
    )
    trainer.train()
    return trainer


def without_ids(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: x for name, x in item.items() if name != "task_ids"} for item in items]


def assert_same_weights(found: nn.Module, expected: nn.Module, start: nn.Module) -> None:
    for (name, a), b, c in zip(found.named_parameters(), expected.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
        assert not torch.equal(a, c), f"{name} was not trained"


def test_several_losses(tmp_path: Path) -> None:
    """As `fastmtl.backward` on the whole batch, with accumulation over two micro-batches."""
    model = Net()
    by_hand, start = copy.deepcopy(model), copy.deepcopy(model)
    trainer = trained(OnLosses, model, tmp_path, without_ids(ITEMS), prediction_loss_only=True)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        out = by_hand(**BATCH)
        surgery = fastmtl.backward({name: out[name] for name in NAMES}, by_hand)
        optimizer.step()
    assert_same_weights(model, by_hand, start)
    torch.testing.assert_close(trainer.surgery.gram, surgery.gram, rtol=1e-4, atol=1e-6)
    logged = trainer.state.log_history[1]
    assert logged["surgery/norm/left"] == pytest.approx(float(surgery.gram[0, 0].sqrt()), rel=1e-4)
    assert logged["loss"] == pytest.approx(float(out["loss"].detach()), rel=1e-4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(by_hand(**BATCH)["loss"].detach()), rel=1e-4)


def test_one_pass(tmp_path: Path) -> None:
    """As `fastmtl.backward` on the tasks' parts of the loss of the whole batch."""
    model = OneHead()
    by_hand, start = copy.deepcopy(model), copy.deepcopy(model)
    trainer = trained(InOnePass, model, tmp_path, ITEMS)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        each = F.cross_entropy(by_hand.trunk(BATCH["x"]), BATCH["labels"][:, 0], reduction="none")
        surgery = fastmtl.backward({name: each[t == IDS].sum() / 8 for t, name in enumerate(NAMES)}, by_hand)
        optimizer.step()
    assert_same_weights(model, by_hand, start)
    torch.testing.assert_close(trainer.surgery.gram, surgery.gram, rtol=1e-4, atol=1e-6)
    assert "surgery/weight/right" in trainer.state.log_history[1]
    expected = float(by_hand(**BATCH)["loss"].detach())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", [OnLosses, InOnePass])
def test_the_plain_sum_is_what_the_trainer_does_itself(kind: type, tmp_path: Path) -> None:
    """Clipping and mixed precision among it."""
    model = Net() if kind is OnLosses else OneHead()
    plain, start = copy.deepcopy(model), copy.deepcopy(model)
    settings = {"max_grad_norm": 0.3, "bf16": True, "gradient_accumulation_steps": 1}
    items = without_ids(ITEMS) if kind is OnLosses else ITEMS
    summed = type("Summed", (kind,), {"method": "sum"})
    transformers.set_seed(0)
    trained(summed, model, tmp_path / "a", items, **settings)
    transformers.set_seed(0)
    trained(transformers.Trainer, plain, tmp_path / "b", without_ids(ITEMS), **settings)
    for a, b, c in zip(model.parameters(), plain.parameters(), start.parameters(), strict=True):
        # bfloat16's passes are rounded one by one
        assert (a - b).norm() <= 2e-2 * (a - c).norm() and not torch.equal(a, c)


def test_what_they_refuse(tmp_path: Path) -> None:
    with pytest.raises(
        KeyError, match=r"task_ids.*the batch has no ids of tasks, only x, labels.*remove_unused_columns"
    ):
        trained(InOnePass, OneHead(), tmp_path, without_ids(ITEMS))
    for returned, error, words in (
        ([1.0], TypeError, "task_losses: expected a dict from the task's name to its loss, got list"),
        ({"left": None}, ValueError, "task_losses: expected the loss of at least one task, got none"),
    ):
        own = type("Own", (OnLosses,), {"task_losses": lambda self, model, inputs, r=returned: r})
        with pytest.raises(error, match=words):
            trained(own, Net(), tmp_path, without_ids(ITEMS))
    bare = type("Bare", (LossesTraining, transformers.Trainer), {})
    with pytest.raises(NotImplementedError, match=r"Bare\.task_losses: return a dict"):
        trained(bare, Net(), tmp_path, without_ids(ITEMS))


PAGE = (ROOT / "docs" / "guides" / "integrations.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["losses", "one-pass"])
def test_snippet_of_the_page(snippet: str, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(compile(snippet, "integrations", "exec"), names)
    assert names["trainer"].state.global_step == 4
    assert "surgery/grad_norm" in capsys.readouterr().out
