"""Gradient surgery in a loop of Hugging Face Accelerate, with gradient accumulation and mixed precision.

    +bank = fastmtl.GradientBank(model, TASKS)
     ...
     with accelerator.accumulate(model):
    -    accelerator.backward(sum(losses.values()))
    +    for task, loss in losses.items():
    +        with bank.task(task):
    +            accelerator.backward(loss)
    +    if accelerator.sync_gradients:
    +        surgery = bank.apply("pcgrad")     # once, on what all micro-batches left

Without accumulation `fastmtl.backward(losses, model)` is shorter; a `GradientBank` also takes losses that Accelerate
scales. Four questions about each handwritten digit share a convolutional trunk.

    python examples/accelerate_loop.py
    python examples/accelerate_loop.py --accumulate 4 --mixed-precision bf16
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
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


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
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


def main() -> None:
    parser = argparse.ArgumentParser(description="Gradient surgery with Accelerate.")
    parser.add_argument("--steps", type=int, default=300, help="of the optimizer")
    parser.add_argument("--batch-size", type=int, default=64, help="of a micro-batch")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches in a step")
    parser.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    set_seed(options.seed)
    accelerator = Accelerator(mixed_precision=options.mixed_precision, gradient_accumulation_steps=options.accumulate)
    training, testing = random_split(load(), [1397, 400])
    model = Network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model, optimizer, loader, test_loader = accelerator.prepare(
        model,
        optimizer,
        DataLoader(training, options.batch_size, shuffle=True, drop_last=True),
        DataLoader(testing, len(testing)),
    )
    bank = fastmtl.GradientBank(model, list(TASKS))

    step = 0
    while step < options.steps:
        for pictures, labels in loader:
            with accelerator.accumulate(model):
                with accelerator.autocast():
                    scores = model(pictures)
                    losses = {task: F.cross_entropy(scores[task], labels[:, i]) for i, task in enumerate(TASKS)}
                for i, (task, loss) in enumerate(losses.items()):
                    with bank.task(task):
                        accelerator.backward(loss, retain_graph=i < len(losses) - 1)
                if accelerator.sync_gradients:
                    surgery = bank.apply("pcgrad")
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                step += 1
                if step % 100 == 0 or step == options.steps:
                    shown = ", ".join(f"{task} {loss.item():.3g}" for task, loss in losses.items())
                    pairs = int(surgery.log_dict()["conflicts"])
                    accelerator.print(f"step {step}: loss {shown}; {pairs} of 6 pairs of tasks in conflict")
            if step == options.steps:
                break

    with torch.no_grad():
        pictures, labels = next(iter(test_loader))
        scores = model(pictures)
        right = {task: (scores[task].argmax(1) == labels[:, i]).float().mean() for i, task in enumerate(TASKS)}
    accelerator.print("held out: " + ", ".join(f"{task} {float(share):.1%}" for task, share in right.items()))


if __name__ == "__main__":
    main()
