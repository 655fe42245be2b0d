"""Gradient surgery in Lightning: manual optimisation, and one line instead of `manual_backward`.

    -    self.manual_backward(sum(losses.values()))
    +    surgery = fastmtl.backward(losses, self)

Four questions about each handwritten digit share a convolutional trunk.

    python examples/lightning_loop.py
    python examples/lightning_loop.py --precision bf16-mixed
"""

from __future__ import annotations

import argparse

import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import fastmtl

TASKS = {"digit": 10, "odd": 2, "large": 2, "loop": 2}  # task -> number of classes


def load() -> TensorDataset:
    """Pictures `[N, 1, 8, 8]` and labels `[N, 4]`: the digit; is it odd, is it above 4, has it a closed loop."""
    data = load_digits()
    digit = torch.tensor(data.target)
    loop = torch.isin(digit, torch.tensor([0, 6, 8, 9]))
    labels = torch.stack([digit, digit % 2, (digit > 4).long(), loop.long()], 1)
    return TensorDataset(torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, labels)


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, 2, 1),
            nn.GroupNorm(8, 64),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(1024, 64),
            nn.ReLU(),
        )
        self.heads = nn.ModuleDict({task: nn.Linear(64, classes) for task, classes in TASKS.items()})

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        features = self.trunk(pictures)
        return {task: head(features) for task, head in self.heads.items()}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        pictures, labels = batch
        scores = self(pictures)
        losses = {task: F.cross_entropy(scores[task], labels[:, i]) for i, task in enumerate(TASKS)}
        # what manual_backward does first: under precision="16-mixed" it scales the loss (and so the norms in the log)
        scaled = {task: self.trainer.precision_plugin.pre_backward(loss, self) for task, loss in losses.items()}
        optimizer = self.optimizers()
        optimizer.zero_grad()
        surgery = fastmtl.backward(scaled, self)
        optimizer.step()
        self.log_dict({f"loss/{task}": loss for task, loss in losses.items()})
        self.log_dict({name: value.float() for name, value in surgery.log_dict("surgery/").items()})

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        pictures, labels = batch
        scores = self(pictures)
        for i, task in enumerate(TASKS):
            self.log(f"accuracy/{task}", (scores[task].argmax(1) == labels[:, i]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description="Gradient surgery in a LightningModule.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precision", default="32-true", help="as for Lightning's Trainer")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    lightning.seed_everything(options.seed, verbose=False)
    training, testing = random_split(load(), [1397, 400])
    trainer = lightning.Trainer(
        max_steps=options.steps,
        precision=options.precision,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Digits()
    trainer.fit(model, DataLoader(training, options.batch_size, shuffle=True, drop_last=True))
    last = {name: float(value) for name, value in trainer.logged_metrics.items()}
    for what in ("loss", "surgery/weight", "surgery/conflicts"):
        print(f"step {trainer.global_step}: {what} " + ", ".join(f"{t} {last[f'{what}/{t}']:.3g}" for t in TASKS))
    (right,) = trainer.test(model, DataLoader(testing, 400), verbose=False)
    print("held out: " + ", ".join(f"{task} {right[f'accuracy/{task}']:.1%}" for task in TASKS))


if __name__ == "__main__":
    main()
