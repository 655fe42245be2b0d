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


class Counted(LossesTraining, transformers.Trainer):
    """Losses of single labels, of which some are left out, over the number of all in the step."""

    def task_losses(
        self, model: nn.Module, inputs: Mapping[str, Tensor], num_items_in_batch: Tensor | None = None
    ) -> dict[str, Tensor]:
        labels, h = inputs["labels"], model.trunk(inputs["x"])
        return {
            name: F.cross_entropy(model.heads[name](h), labels[:, k], reduction="sum") / num_items_in_batch
            for k, name in enumerate(NAMES)
        }


def test_each_label_counts_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The `Trainer`'s number reaches the losses: as one call on the whole batch, however labels are spread."""
    items = without_ids(ITEMS)
    for k, item in enumerate(items):
        item["labels"] = [-100 if k < 3 else item["labels"][0], -100 if k % 4 == 0 else item["labels"][1]]
    batch = BATCH | {"labels": torch.tensor([item["labels"] for item in items])}
    model = Net()
    model.accepts_loss_kwargs = True
    by_hand, start = copy.deepcopy(model), copy.deepcopy(model)
    trainer = trained(Counted, model, tmp_path, items, prediction_loss_only=True)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.5)
    number = batch["labels"].ne(-100).sum()
    for _ in range(2):
        losses = Counted.task_losses(trainer, by_hand, batch, number)
        optimizer.zero_grad()
        surgery = fastmtl.backward(losses, by_hand)
        optimizer.step()
    assert_same_weights(model, by_hand, start)
    torch.testing.assert_close(trainer.surgery.gram, surgery.gram, rtol=1e-4, atol=1e-6)
    total = float(sum(losses.values()).detach())
    assert trainer.state.log_history[1]["loss"] == pytest.approx(total, rel=1e-4)
    # gradients are means over ranks, and the number is that of all of them
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 3)
    with torch.no_grad():
        found = trainer.compute_loss(by_hand, batch, num_items_in_batch=number)
        torch.testing.assert_close(found, 3 * sum(Counted.task_losses(trainer, by_hand, batch, number).values()))


def test_losses_that_say_they_are_scaled(tmp_path: Path) -> None:
    class Halved(OnLosses):
        loss_is_scaled_for_ga = True

        def task_losses(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: loss / 2 for name, loss in super().task_losses(model, inputs).items()}

    transformers.set_seed(0)
    found = trained(Halved, net_of(Halved), tmp_path / "a", items_of(Halved))
    transformers.set_seed(0)
    torch.testing.assert_close(
        weights_of(found), weights_of(trained(OnLosses, net_of(OnLosses), tmp_path / "b", items_of(OnLosses)))
    )


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


def items_of(kind: type) -> list[dict[str, Any]]:
    return ITEMS if issubclass(kind, InOnePass) else without_ids(ITEMS)


def net_of(kind: type) -> nn.Module:
    torch.manual_seed(3)
    return OneHead() if issubclass(kind, InOnePass) else Net()


def weights_of(trainer: Any) -> list[Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


class StopsOnce(transformers.TrainerCallback):
    """Ends the first training between two micro-batches of a step."""

    def __init__(self) -> None:
        self.to_come = True

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        if self.to_come:
            self.to_come = False
            raise KeyboardInterrupt


@pytest.mark.parametrize("kind", [OnLosses, InOnePass])
def test_each_training_begins_with_nothing_collected(kind: type, tmp_path: Path) -> None:
    """A new model each time, and an interrupted accumulation before: the weights are those of a trainer's first run."""
    found = []
    for callbacks in ([], [StopsOnce()]):
        trainer = kind(
            None,
            arguments(tmp_path, learning_rate=0.1),
            train_dataset=items_of(kind),
            model_init=lambda: net_of(kind),
            callbacks=callbacks,
        )
        if callbacks:
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
        for _ in range(2):
            trainer.train()
            found.append(weights_of(trainer))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


@pytest.mark.parametrize("kind", [OnLosses, InOnePass])
def test_a_step_that_raises_leaves_nothing_for_the_next(kind: type, tmp_path: Path) -> None:
    """Its second micro-batch fails and is passed over: that step changes nothing, and the next one is whole."""
    calls = []

    class Passing(kind):
        def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            calls.append(1)
            try:
                return super().training_step(
                    model, {**inputs, "x": "broken"} if len(calls) == 2 else inputs, *args, **kwargs
                )
            except (TypeError, AttributeError):
                return torch.zeros(())

    settings = {"train_sampling_strategy": "sequential"}
    passing = trained(Passing, net_of(kind), tmp_path / "a", items_of(kind), **settings)
    straight = trained(kind, net_of(kind), tmp_path / "b", items_of(kind), max_steps=1, **settings)
    assert len(calls) == 4
    torch.testing.assert_close(weights_of(passing), weights_of(straight))


@pytest.mark.parametrize("kind", [OnLosses, InOnePass])
def test_a_resumed_training_has_the_state_of_its_method(kind: type, tmp_path: Path) -> None:
    def run(resume: str | None = None) -> Any:
        own = type("Own", (kind,), {"method": fastmtl.methods.GradVac(beta=0.5)})
        settings = arguments(tmp_path, learning_rate=0.1, max_steps=4, save_strategy="steps", save_steps=2)
        trainer = own(net_of(kind), settings, train_dataset=items_of(kind))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    straight = run()
    checkpoint = tmp_path / "checkpoint-2"
    resumed = run(str(checkpoint))
    torch.testing.assert_close(weights_of(resumed), weights_of(straight))
    found, expected = (
        {name: x for name, x in trainer.method.state_dict().items() if isinstance(x, Tensor)}
        for trainer in (resumed, straight)
    )
    assert expected
    torch.testing.assert_close(found, expected)
    (checkpoint / "surgery_method.pt").unlink()
    with pytest.warns(UserWarning, match=r"has no surgery_method\.pt: GradVac goes on from the state that it has"):
        anew = run(str(checkpoint))
    assert not all(torch.equal(a, b) for a, b in zip(weights_of(anew), weights_of(straight), strict=True))


def test_the_trainer_comes_last() -> None:
    with pytest.raises(TypeError, match=r"LossesTraining must come before.*class Wrong\(LossesTraining, Trainer\)"):
        type("Wrong", (transformers.Trainer, LossesTraining), {})
    with pytest.raises(TypeError, match="OnePassTraining must come before the Trainer"):
        type("Wrong", (transformers.Seq2SeqTrainer, OnePassTraining), {})


@pytest.mark.parametrize(
    ("kind", "settings", "error", "words"),
    [
        (InOnePass, {"optim": "galore_adamw_layerwise"}, ValueError, "changes parameters during the backward pass"),
        (OnLosses, {"optim": "adalomo"}, ValueError, "optim='adalomo' changes parameters"),
    ],
)
def test_arguments_without_a_place_for_surgery(
    kind: type, settings: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        trained(kind, net_of(kind), tmp_path, items_of(kind), **settings)


def test_training_that_they_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = type("Bare", (OnePassTraining, transformers.Trainer), {})
    with pytest.raises(TypeError, match=r"Bare\.tasks: expected the names of the tasks"):
        trained(bare, OneHead(), tmp_path, ITEMS)
    trainer = OnLosses(Net(), arguments(tmp_path), train_dataset=without_ids(ITEMS))
    trainer.args.label_smoothing_factor = 0.1
    with pytest.raises(ValueError, match="label_smoothing_factor does not reach task_losses"):
        trainer.train()
    trainer.args.label_smoothing_factor = 0.0
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs["loss"]
    with pytest.raises(ValueError, match="compute_loss_func does not reach task_losses"):
        trainer.train()
    monkeypatch.setattr(trainer.args, "_n_gpu", 2)
    with pytest.raises(RuntimeError, match=r"one process on 2 GPUs is nn\.DataParallel.*torchrun"):
        trainer._check_training()
    trainer.is_deepspeed_enabled = True
    with pytest.raises(RuntimeError, match="DeepSpeed owns the gradients"):
        trainer._check_training()


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
