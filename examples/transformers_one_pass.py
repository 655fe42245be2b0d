"""Four tasks on a `transformers` model that knows nothing of them: one forward, one backward, the bank of gradients.

    +with fastmtl.one_pass(model, domain, 4) as bank:       # domain [N]: the task of each sample
         loss = F.cross_entropy(model(x).logits, labels)
         loss.backward()
    +bank.apply("pcgrad")

A ViT sees scikit-learn's digits as pictures, a BERT as sentences of 64 grey levels; both are made from a config, with
random weights. The digits come from four domains: plain, inverted, turned over, with other labels. Every step runs
twice from the same weights, dropout masks and projection order: through `fastmtl.one_pass`, and through
`fastmtl.backward` on four losses, which takes four backward passes. Task gradients and updates must agree.

    python examples/transformers_one_pass.py
    python examples/transformers_one_pass.py --model bert --steps 50
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

import fastmtl

DOMAINS = ("plain", "inverted", "turned", "renamed")
TOLERANCE = 1e-4  # relative; what differs is the order of float32 sums


def make(kind: str) -> nn.Module:
    if kind == "vit":
        config = ViTConfig(
            image_size=8, patch_size=2, num_channels=1, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
            intermediate_size=128, num_labels=10, hidden_dropout_prob=0.1,
        )  # fmt: skip
        return ViTForImageClassification(config)
    config = BertConfig(
        vocab_size=17, max_position_embeddings=64, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=128, num_labels=10,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def draw(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A mixed batch: grey levels `[size, 8, 8]` from 0 to 16, labels `[size]`, domains `[size]`."""
    data = load_digits()
    chosen = torch.randint(len(data.target), (size,), generator=generator)
    domain = torch.randint(len(DOMAINS), (size,), generator=generator)
    x, labels = torch.tensor(data.images)[chosen].long(), torch.tensor(data.target)[chosen]
    x = torch.where((domain == 1)[:, None, None], 16 - x, x)
    x = torch.where((domain == 2)[:, None, None], x.flip(1, 2), x)
    return x, torch.where(domain == 3, 9 - labels, labels), domain


def inputs(kind: str, x: Tensor) -> dict[str, Tensor]:
    if kind == "vit":
        return {"pixel_values": x[:, None] / 16}
    return {"input_ids": x.flatten(1)}


def apart(found: list[Tensor], expected: list[Tensor]) -> float:
    """The distance of two lists of gradients, relative to the second."""
    a, b = (torch.cat([g.flatten() for g in gradients]) for gradients in (found, expected))
    return float((a - b).norm() / b.norm())


def train(kind: str, steps: int, batch_size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = make(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    spent: dict[str, list[float]] = {"one_pass": [], "backward": []}
    off = {"rows": 0.0, "update": 0.0}
    for step in range(1, steps + 1):
        x, labels, domain = draw(batch_size, generator)
        batch = inputs(kind, x)

        # four losses of one forward, as without one_pass
        torch.manual_seed(step)
        begin = time.perf_counter()
        each = F.cross_entropy(model(**batch).logits, labels, reduction="none")
        losses = [each[domain == t].sum() / batch_size for t in range(len(DOMAINS))]
        order = fastmtl.methods.PCGrad(generator=torch.Generator().manual_seed(step))
        fastmtl.backward(losses, model, method=order, retain_graph=True)
        spent["backward"].append(time.perf_counter() - begin)
        usual = [p.grad for p in model.parameters()]
        want = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
        optimizer.zero_grad()

        # the whole bank from one forward and one backward
        torch.manual_seed(step)
        begin = time.perf_counter()
        with fastmtl.one_pass(model, domain, DOMAINS) as bank:
            loss = F.cross_entropy(model(**batch).logits, labels)
            loss.backward()
        took = time.perf_counter() - begin
        for t in range(len(DOMAINS)):
            row = [torch.zeros_like(p) if g is None else g for p, g in zip(bank.params, bank.row(t), strict=True)]
            of = dict(zip(model.parameters(), want[t], strict=True))
            off["rows"] = max(off["rows"], apart(row, [of[p] for p in bank.params]))
        begin = time.perf_counter()
        order = fastmtl.methods.PCGrad(generator=torch.Generator().manual_seed(step))
        surgery = bank.apply(order)
        spent["one_pass"].append(took + time.perf_counter() - begin)
        off["update"] = max(off["update"], apart([p.grad for p in model.parameters()], usual))
        if max(off.values()) > TOLERANCE:
            sys.exit(f"{kind}, step {step}: the two ways are apart, relatively: {off}")
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, steps // 5) == 0:
            pairs = int(surgery.conflicts().sum()) // 2
            print(f"{kind} step {step}/{steps}: loss {loss.item():.3f}, {pairs} of 6 pairs of domains in conflict")
    usual_ms, ours_ms = (1e3 * statistics.median(spent[way]) for way in ("backward", "one_pass"))
    print(
        f"{kind}: forward, backward, surgery: {ours_ms:.1f} ms by one_pass, {usual_ms:.1f} ms by four backward passes; "
        f"rows at most {off['rows']:.0e} apart, updates {off['update']:.0e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="The bank of four tasks' gradients on a ViT and a BERT.")
    parser.add_argument("--model", choices=("vit", "bert", "both"), default="both")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for kind in ("vit", "bert"):
        if options.model in (kind, "both"):
            train(kind, options.steps, options.batch_size, options.seed)


if __name__ == "__main__":
    main()
