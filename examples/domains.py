"""One network, several domains in one mixed batch, a small difference per domain on every convolution.

         network = Network()
    +    network = convert(network, DOMAINS, "dense", where=nn.Conv2d)
    ...
    -    scores = network(pictures)
    +    with tasks(domain):                      # [N]: the domain of each picture
    +        scores = network(pictures)
    ...
    +    plain = merge(network, "turned")         # for one domain, without fastmtl

The handwritten digits appear plain, turned over, inverted, noisy, occluded, shifted, sheared, and with other labels.
The network's own forward stays as it is. Beside it runs what is usually written: a loop over the domains of the batch,
each through plain convolutions with `weight + delta`. At every step both compute the loss and all gradients from the
same parameters, and must agree. In the end each domain's merged network must score as the mixed one does.

    python examples/domains.py
    python examples/domains.py --quick
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import sys
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fastmtl.nn import TaskConv2d, convert, layer_report, merge, tasks

DOMAINS = ("plain", "turned", "inverted", "noisy", "occluded", "shifted", "sheared", "renamed")

# relative; what differs is the order of float32 sums
TOLERANCE = {"loss": 1e-5, "gradients": 1e-3}


def load_pools() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Digits for training and others for testing: `[N, 1, 16, 16]` and labels `[N]`."""
    data = load_digits()
    images = F.interpolate(torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, size=(16, 16), mode="bilinear")
    labels = torch.tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return (images[400:], labels[400:]), (images[:400], labels[:400])


def change(x: Tensor, labels: Tensor, domain: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The pictures and labels as the domain has them."""
    if domain == "turned":
        return x.flip(2, 3), labels
    if domain == "inverted":
        return 1 - x, labels
    if domain == "noisy":
        return x + 0.4 * torch.randn(x.shape, generator=generator), labels
    if domain == "occluded":
        x = x.clone()
        for picture, corner in zip(x, torch.randint(0, 10, (len(x), 2), generator=generator).tolist(), strict=True):
            picture[:, corner[0] : corner[0] + 6, corner[1] : corner[1] + 6] = 0
        return x, labels
    if domain == "shifted":
        return x.roll((5, 5), (2, 3)), labels
    if domain == "sheared":
        return torch.stack([x[:, :, row].roll(row // 2, -1) for row in range(x.shape[2])], 2), labels
    if domain == "renamed":
        return x, (labels + 1) % 10
    return x, labels


def draw(pool: tuple[Tensor, Tensor], size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A mixed batch: pictures `[size, 1, 16, 16]`, labels `[size]`, domains `[size]` in any order."""
    chosen = torch.randint(len(pool[1]), (size,), generator=generator)
    domain = torch.randint(len(DOMAINS), (size,), generator=generator)
    pictures, labels = pool[0][chosen], pool[1][chosen]
    for t, name in enumerate(DOMAINS):
        rows = domain == t
        pictures[rows], labels[rows] = change(pictures[rows], labels[rows], name, generator)
    return pictures, labels, domain


class Residual(nn.Module):
    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, channels, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.around = nn.Conv2d(before, channels, 1, stride, bias=False)
        self.norms = nn.ModuleList(nn.GroupNorm(8, channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(y)) + self.around(x))


class Network(nn.Module):
    """An ordinary network that knows nothing of domains."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, 1, 1)
        self.blocks = nn.Sequential(
            Residual(width, width, 1), Residual(width, 2 * width, 2), Residual(2 * width, 4 * width, 2)
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16 * width, 10))

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.stem(pictures))))


def loop_over_domains(plain: nn.Module, mixed: nn.Module, pictures: Tensor, domain: Tensor) -> Tensor:
    """The usual way: the plain network once per domain, with the weights that `mixed` has for it."""
    layers = {path: layer for path, layer in mixed.named_modules() if isinstance(layer, TaskConv2d)}
    scores = pictures.new_empty(len(pictures), 10)
    for t, name in enumerate(DOMAINS):
        rows = (domain == t).nonzero()[:, 0]
        if len(rows):
            weights = {f"{path}.weight": layer.weight + layer.delta[name] for path, layer in layers.items()}
            own = torch.func.functional_call(plain, weights, (pictures[rows],))
            scores = scores.index_copy(0, rows, own)
    return scores


def gradients(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def apart(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative difference, tensor by tensor."""
    norms = ((float((a - b).norm()), float(b.norm())) for a, b in zip(found, expected, strict=True))
    return max(difference / size if size else difference for difference, size in norms)


@torch.no_grad()
def accuracy(scores: Tensor, labels: Tensor, domain: Tensor) -> dict[str, float]:
    right = (scores.argmax(1) == labels).float()
    return {name: float(right[domain == t].mean()) for t, name in enumerate(DOMAINS)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Digits in several domains: per-task deltas against a loop over tasks."
    )
    parser.add_argument("--steps", type=int, default=None, help="default: 150, or 20 with --quick")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--width", type=int, default=None, help="channels of the first layer; default: 32, or 16")
    parser.add_argument("--quick", action="store_true", help="a small network and a few steps")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    steps = options.steps if options.steps is not None else (20 if options.quick else 150)
    width = options.width if options.width is not None else (16 if options.quick else 32)

    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    training, testing = load_pools()
    plain = Network(width)
    # the convolutions of the copy hold the very weights of the plain ones, as all its other parameters do
    mixed = copy.deepcopy(plain, memo={id(p): p for p in plain.parameters()})
    mixed = convert(mixed, DOMAINS, "dense", where=nn.Conv2d)
    optimizer = torch.optim.Adam(mixed.parameters(), lr=2e-3)

    def one_pass(pictures: Tensor, domain: Tensor) -> Tensor:
        with tasks(domain):
            return mixed(pictures)

    ways = {"loop": functools.partial(loop_over_domains, plain, mixed), "fastmtl": one_pass}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    furthest = dict.fromkeys(TOLERANCE, 0.0)
    for step in range(1, steps + 1):
        pictures, labels, domain = draw(training, options.batch_size, generator)
        losses, grads = {}, {}
        # in turn, so that neither is always the one that finds a warm cache
        for way in list(ways)[:: 1 if step % 2 else -1]:
            mixed.zero_grad()
            begin = time.perf_counter()
            loss = F.cross_entropy(ways[way](pictures, domain), labels)
            loss.backward()
            seconds[way].append(time.perf_counter() - begin)
            losses[way], grads[way] = loss.detach(), gradients(mixed)
        optimizer.step()
        off = {
            "loss": apart([losses["fastmtl"]], [losses["loop"]]),
            "gradients": apart(grads["fastmtl"], grads["loop"]),
        }
        for what, value in off.items():
            furthest[what] = max(furthest[what], value)
            if not value <= TOLERANCE[what]:
                sys.exit(f"step {step}: {what} {value:.1e} apart, expected at most {TOLERANCE[what]:.0e}")
        if step % max(1, steps // 10) == 0:
            both = ", ".join(f"{way} {float(loss):.6f}" for way, loss in sorted(losses.items()))
            print(f"step {step}/{steps}: loss {both}", flush=True)

    pictures, labels, domain = draw(testing, 1600, generator)
    print("accuracy   " + " ".join(f"{name:>9}" for name in DOMAINS))
    for way, forward in ways.items():
        with torch.no_grad():
            right = accuracy(forward(pictures, domain), labels, domain)
        print(f"  {way:<9}" + " ".join(f"{share:9.1%}" for share in right.values()))
    merged = torch.empty(len(pictures), 10)
    for t, name in enumerate(DOMAINS):
        with torch.no_grad():
            merged[domain == t] = merge(mixed, name)(pictures[domain == t])
    off = apart([merged], [one_pass(pictures, domain).detach()])
    if not off <= TOLERANCE["gradients"]:
        sys.exit(f"merged networks: scores {off:.1e} apart, expected at most {TOLERANCE['gradients']:.0e}")
    print(f"merged networks, one for each domain: scores at most {off:.1e} apart")
    print(layer_report(mixed))
    medians = {way: 1e3 * statistics.median(taken) for way, taken in seconds.items()}
    print(f"largest relative difference: loss {furthest['loss']:.1e}, gradients {furthest['gradients']:.1e}")
    print(
        f"forward and backward, median: fastmtl {medians['fastmtl']:.1f} ms, loop {medians['loop']:.1f} ms "
        f"({medians['loop'] / medians['fastmtl']:.2f}x)"
    )


if __name__ == "__main__":
    main()
