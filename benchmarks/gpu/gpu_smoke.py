"""Every op once on a GPU, forward and backward, against the float64 oracle: the first thing to run on a new machine.

    CUDA_LAUNCH_BLOCKING=1 python -m fastmtl.benchmarks.gpu.gpu_smoke

Each line is printed before its op runs, so that a crash or a hang names its op. The tests say more; this takes seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import fastmtl
from fastmtl import ops
from fastmtl.core import dispatch
from fastmtl.ops.gradients import reference

DEVICE = torch.device("cuda")
# of the largest result
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
Step = Callable[[], tuple[Tensor, Tensor]]


def _surgery_steps() -> Iterator[tuple[str, str, torch.dtype, Step]]:
    for backend in ("cuda", "triton"):
        for dtype in TOLERANCE:
            # one number of tasks for each Gram kernel
            for num_tasks in (2, 8, 16, 32, 48, 64, 100) if backend == "cuda" else (8, 40):
                yield f"pcgrad T={num_tasks}", backend, dtype, _pcgrad(num_tasks, dtype)


def _pcgrad(num_tasks: int, dtype: torch.dtype) -> Step:
    def step() -> tuple[Tensor, Tensor]:
        grads = torch.randn(num_tasks, 40_000).to(dtype)
        order = ops.random_order(num_tasks)
        exact = grads.double()
        coefficients = reference.pcgrad_coefficients(reference.gram(exact), order)
        return ops.pcgrad(grads.to(DEVICE), order.to(DEVICE)), coefficients.sum(0) @ exact

    return step


def _task_steps() -> Iterator[tuple[str, str, torch.dtype, Step]]:
    for dtype in TOLERANCE:
        for what in ("conv2d", "linear", "scale_shift"):
            for backend in ("triton",) if what == "scale_shift" else ("cuda", "triton"):
                yield f"task_{what}", backend, dtype, _task(what, dtype)


def _task(what: str, dtype: torch.dtype) -> Step:
    """The gradients of everything, one after the other; both ways from the same numbers."""
    num_tasks, ids = 3, torch.tensor([2, 0, 0, 2, 0])

    def draw(*shape: int) -> Tensor:
        return (0.3 * torch.randn(shape)).to(dtype).double()

    leaves = {
        "conv2d": lambda: [draw(5, 16, 9, 9), draw(32, 16, 3, 3), draw(num_tasks, 32, 16, 3, 3)],
        "linear": lambda: [draw(5, 7, 32), draw(48, 32), draw(num_tasks, 48, 32)],
        "scale_shift": lambda: [draw(5, 16, 9, 9), draw(num_tasks, 16), draw(num_tasks, 16)],
    }[what]()

    def run(values: list[Tensor], ids: Tensor) -> Tensor:
        values = [x.detach().requires_grad_() for x in values]
        x, first, second = values
        if what == "conv2d":
            y = ops.task_conv2d(x, first, second, ids, padding=1)
        elif what == "linear":
            y = ops.task_linear(x, first, second, ids)
        else:
            y = ops.task_scale_shift(x, first, second, ids)
        grads = torch.autograd.grad(y.sum(), values)
        return torch.cat([y.detach().flatten(), *(g.flatten() for g in grads)])

    def step() -> tuple[Tensor, Tensor]:
        found = run([x.to(DEVICE, dtype) for x in leaves], ids.to(DEVICE))
        with fastmtl.use_backend("reference"):
            return found, run(leaves, ids)

    return step


def main() -> int:
    if not torch.cuda.is_available():
        print("torch sees no CUDA device", file=sys.stderr)
        return 2
    wrong = 0
    for name, backend, dtype, step in (*_surgery_steps(), *_task_steps()):
        print(f"{name} {backend} {str(dtype)[6:]}: ", end="", flush=True)
        if (reason := dispatch.unavailable(backend, DEVICE.type)) is not None:
            print(f"not there: {reason}")
            wrong += 1
            continue
        torch.manual_seed(0)
        try:
            with fastmtl.use_backend(backend):
                found, expected = step()
            error = float((found.double().cpu() - expected).abs().max() / expected.abs().max())
        except Exception as problem:
            # one op's failure must not hide the next one's answer
            print(f"{type(problem).__name__}: {problem}".splitlines()[0], flush=True)
            wrong += 1
            continue
        ok = error <= TOLERANCE[dtype]
        wrong += not ok
        print(f"{'ok' if ok else 'WRONG'}, off by {error:.1e} of the largest result", flush=True)
    print(f"{wrong} wrong")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
