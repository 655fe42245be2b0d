"""Gradient surgery over several processes, started by torchrun; the result is that of one process.

    python examples/distributed.py
    torchrun --nproc-per-node=2 examples/distributed.py
    torchrun --nproc-per-node=2 examples/distributed.py --wrapper fully_shard

Three regression tasks on synthetic data share a trunk. What fastmtl adds to an ordinary loop is one line: the call gets
the wrapped model, which says whose gradients belong together.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fastmtl

TASKS = ["sum", "product", "distance"]
BATCH_SIZE = 32  # of all ranks together


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(64, 1) for _ in TASKS)

    def forward(self, x: Tensor) -> list[Tensor]:
        h = self.trunk(x)
        return [head(h)[:, 0] for head in self.heads]


def wrap(model: nn.Module, wrapper: str, device: torch.device) -> nn.Module:
    model.to(device)
    if not dist.is_initialized():
        return model
    if wrapper == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    fully_shard(model.trunk, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(model: nn.Module) -> dict[str, Any]:
    """The weights, of all shards together, on the CPU."""
    tensors = getattr(model, "module", model).state_dict().items()
    return {name: (x.full_tensor() if hasattr(x, "full_tensor") else x).cpu() for name, x in tensors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--wrapper", choices=["ddp", "fully_shard"], default="ddp")
    parser.add_argument("--save", help="where to write the weights")
    args = parser.parse_args()

    device = torch.device("cpu")
    if "RANK" in os.environ:  # torchrun
        if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    torch.manual_seed(0)  # the same model and data everywhere
    x = torch.rand(1024, 2) * 2 - 1
    data = TensorDataset(x, torch.stack([x.sum(1), x.prod(1), x.norm(dim=1)]).T)
    sampler = DistributedSampler(data, size, rank, shuffle=False)
    loader = DataLoader(data, BATCH_SIZE // size, sampler=sampler)
    model = wrap(Model(), args.wrapper, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    step = 0
    while step < args.steps:
        for inputs, targets in loader:
            outputs = model(inputs.to(device))
            targets = targets.T.to(device)
            losses = {t: F.mse_loss(y, z) for t, y, z in zip(TASKS, outputs, targets, strict=True)}
            optimizer.zero_grad()
            surgery = fastmtl.backward(losses, model)  # the wrapped model, not what it wraps
            optimizer.step()
            step += 1
            if step % 20 == 0 or step == args.steps:
                seen = torch.stack([loss.detach() for loss in losses.values()])
                if size > 1:
                    dist.all_reduce(seen)
                if rank == 0:
                    shown = ", ".join(f"{t} {v:.4f}" for t, v in zip(TASKS, (seen / size).tolist(), strict=True))
                    conflicts = int(surgery.conflicts().sum()) // 2
                    print(f"step {step}/{args.steps} on {size} ranks: losses {shown}; {conflicts} pairs in conflict")
            if step == args.steps:
                break

    weights = whole(model)
    if args.save and rank == 0:
        torch.save(weights, args.save)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
