"""Gradient surgery's kernels outside of the tests: under a sanitizer, against the copy rate, under a profiler.

python -m fastmtl.benchmarks.gpu.surgery_check kernels    # the kernels that read gradients, small, against the oracle
python -m fastmtl.benchmarks.gpu.surgery_check solvers    # the methods' weights and groups of parameters, against a CPU
python -m fastmtl.benchmarks.gpu.surgery_check rates      # bytes per second of each kernel, and of a copy
python -m fastmtl.benchmarks.gpu.surgery_check profile    # a few calls of the two main kernels, for ncu
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastmtl
from fastmtl import methods, ops
from fastmtl.benchmarks.runner import measure
from fastmtl.benchmarks.suites import methods as suite
from fastmtl.benchmarks.workloads import gradients
from fastmtl.core import dispatch
from fastmtl.ops.gradients import reference
from fastmtl.ops.gradients.method_weights import OPTIONS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# one or more for every kernel that T chooses, and for every branch of their launches
TASKS = (2, 4, 8, 13, 20, 40, 60, 100)
# aligned rows; rows that are not, and a tail; enough columns for several groups of partial sums
COLUMNS = (2048, 1027, 135_168 + 5)
# of the largest result
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 5e-3, torch.float16: 6e-4}
# of weights and of updates by them, which two orders of summation move
SOLVER_TOLERANCE = 1e-5


def _rows(num_tasks: int, num_params: int, dtype: torch.dtype) -> Tensor:
    """`[T, P]` float64 on the CPU, rounded to `dtype`; half of the tasks against the others."""
    generator = torch.Generator().manual_seed(num_tasks * 1000 + num_params)
    noise = torch.randn(num_tasks, num_params, generator=generator)
    common = torch.randn(num_params, generator=generator)
    signs = torch.tensor([0.5, -0.5]).repeat(num_tasks)[:num_tasks, None]
    return (noise + signs * common).to(dtype).double()


def _forms(rows: Tensor, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Any, Tensor]]:
    """A bank, one whose columns lie apart, and lists of three parameters of which two have gaps; and their rows."""
    bank = rows.to(device, dtype)
    yield "bank", bank, rows
    if rows.shape[1] < 4096:
        yield "transposed", bank.mT.contiguous().mT, rows
    sizes = (65, rows.shape[1] // 2, rows.shape[1] - rows.shape[1] // 2 - 65)
    lists: list[list[Tensor | None]] = [[x.clone() for x in row.split(sizes)] for row in bank]
    zeroed = [[x.clone() for x in row.split(sizes)] for row in rows]
    for t in range(1, len(lists), 3):
        lists[t][t % 2] = None
        zeroed[t][t % 2].zero_()
    yield "lists", lists, torch.stack([torch.cat(row) for row in zeroed])


def _flat(found: Any) -> Tensor:
    """`[P]` or `[T, P]` float64 on the CPU."""
    if isinstance(found, Tensor):
        return found.double().cpu()
    if isinstance(found[0], list):
        return torch.stack([_flat(row) for row in found])
    return torch.cat([x.double().cpu() for x in found])


def _off(found: Any, expected: Tensor) -> float:
    return float((_flat(found) - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def check_kernels(device: torch.device, say: Callable[[str], None]) -> int:
    """Runs everything once and compares it with the float64 oracle; the number of wrong results."""
    wrong = checked = 0
    for dtype in DTYPES:
        for num_tasks in TASKS:
            for num_params in COLUMNS if num_tasks in (8, 60) else COLUMNS[:2]:
                rows = _rows(num_tasks, num_params, dtype)
                order = ops.random_order(num_tasks, generator=torch.Generator().manual_seed(1))
                state = ops.order_state(3, device=device)
                drawn = ops.random_order(num_tasks, generator=ops.order_state(3))
                for form, grads, exact in _forms(rows, dtype, device):
                    m = reference.gram(exact)
                    c = reference.pcgrad_coefficients(m, order)
                    state[1].fill_(0)
                    weights = torch.linspace(-1, 1, num_tasks, dtype=torch.float64)
                    results = {
                        "gram": (ops.gram(grads), m),
                        "combine": (ops.combine(weights.to(device), grads), weights @ exact),
                        "pcgrad": (ops.pcgrad(grads, order.to(device)), c.sum(0) @ exact),
                        "drawn": (
                            ops.pcgrad(grads, generator=state),
                            reference.pcgrad_coefficients(m, drawn).sum(0) @ exact,
                        ),
                    }
                    if num_params < 4096:
                        results["pcgrad_project"] = (ops.pcgrad_project(grads, order.to(device)), c @ exact)
                    for op, (found, expected) in results.items():
                        # a Gram matrix is float32 whatever the 16-bit gradients are
                        tolerance = TOLERANCE[torch.float32 if op == "gram" and dtype.itemsize == 2 else dtype]
                        error = _off(found, expected)
                        checked += 1
                        if not error <= tolerance:
                            wrong += 1
                            say(
                                f"WRONG {op} {form} T={num_tasks} P={num_params} {dtype}: {error:.2g} > {tolerance:.2g}"
                            )
    for num_tasks in (8, 40, 100):
        m = reference.gram(_rows(num_tasks, 512, torch.float64))
        order = ops.random_order(num_tasks, generator=torch.Generator().manual_seed(1))
        error = _off(ops.pcgrad_coefficients(m.to(device), order.to(device)), reference.pcgrad_coefficients(m, order))
        checked += 1
        if not error <= 1e-9:
            wrong += 1
            say(f"WRONG pcgrad_coefficients T={num_tasks}: {error:.2g}")
    say(f"{checked} results, {wrong} wrong")
    return wrong


# --- solvers

# one or more for every solver that T chooses: matrices in registers, in shared memory, in global memory
SOLVED_TASKS = (1, 2, 8, 16, 17, 33, 64, 65, 128)
STEPS = 2


def _solvers(num_tasks: int) -> Iterator[methods.GramMethod]:
    """Every method that is solved by a kernel, with one that wraps another and one with preferences by name."""
    for name in OPTIONS:
        yield methods.get(name)
    yield methods.GradVac(0.3, order=ops.random_order(num_tasks, generator=ops.order_state(1)))
    yield methods.PCGrad(order=ops.random_order(num_tasks, generator=ops.order_state(2)))
    yield methods.CRMOGM(methods.MGDA(), momentum=0.5)
    yield methods.UPGrad(preferences={str(t): 1.0 + t for t in range(num_tasks)})


def _weighed(method: methods.GramMethod, gram: Tensor, second: Tensor, device: torch.device) -> Tensor:
    """Weights of a few steps, one after the other; the last task is absent."""
    num_tasks = len(gram)
    if getattr(method, "order", None) is not None:
        method.order = method.order.to(device)
    present = torch.arange(num_tasks, device=device) < max(num_tasks - 1, 1)
    seen = methods.Seen([str(t) for t in range(num_tasks)], present, second=second.to(device))
    return torch.stack([method.weigh(gram.to(device), seen) for _ in range(STEPS)]).cpu()


def _grouped_update(num_tasks: int, name: str, device: torch.device) -> Tensor:
    """The update of a network whose layers are weighed each by itself."""
    torch.manual_seed(num_tasks)
    net = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(24, 24), nn.Tanh()))).double().to(device)
    x = torch.randn(6, 24, dtype=torch.float64).to(device)
    losses = [(net(x + t) - (-1.0) ** t).square().mean() for t in range(num_tasks)]
    method: methods.Method = methods.MGDA()
    if name == "pcgrad":
        method = methods.PCGrad(order=ops.random_order(num_tasks, generator=ops.order_state(2)).to(device))
    fastmtl.backward(losses, net, method=method, groups="layer")
    return torch.cat([p.grad.flatten() for p in net.parameters()]).cpu()


def check_solvers(device: torch.device, say: Callable[[str], None]) -> int:
    """Weights of every method and number of tasks, and updates by groups, against the CPU's; how many are wrong."""
    results: list[tuple[str, Tensor, Tensor]] = []
    cpu = torch.device("cpu")
    for num_tasks in SOLVED_TASKS:
        bank, other = torch.randn(
            2, num_tasks, 2 * num_tasks + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(num_tasks)
        )
        bank = bank - 0.8 * bank.mean(0)
        gram, second = bank @ bank.mT, bank @ other.mT
        for on_device, on_host in zip(_solvers(num_tasks), _solvers(num_tasks), strict=True):
            found = _weighed(on_device, gram, second, device)
            with fastmtl.use_backend("cpu"):
                expected = _weighed(on_host, gram, second, cpu)
            results.append((f"{on_host!r} T={num_tasks}", found, expected))
    for num_tasks in (3, 16, 40, 70):
        for name in ("pcgrad", "mgda"):
            found = _grouped_update(num_tasks, name, device)
            with fastmtl.use_backend("cpu"):
                expected = _grouped_update(num_tasks, name, cpu)
            results.append((f"{name} by layer T={num_tasks}", found, expected))
    wrong = 0
    for what, found, expected in results:
        error = _off(found, expected)
        if not error <= SOLVER_TOLERANCE:
            wrong += 1
            say(f"WRONG {what}: {error:.2g} > {SOLVER_TOLERANCE:.2g}")
    say(f"{len(results)} results, {wrong} wrong")
    return wrong


# --- rates

# T, P, dtype: the rows of the table of targets, and what lies between
RATED = (
    (2, 25_600_000, torch.float32),
    (8, 25_600_000, torch.float32),
    (8, 25_600_000, torch.bfloat16),
    (16, 25_600_000, torch.float32),
    (16, 25_600_000, torch.bfloat16),
    (32, 25_600_000, torch.float32),
    (64, 25_600_000, torch.float32),
    (64, 25_600_000, torch.bfloat16),
    (8, 1_000_000, torch.float32),
    (8, 100_000, torch.float32),
    (50, 100_000, torch.float32),
)


def _seconds(call: Callable[[Any], Any], inputs: Sequence[Any], device: torch.device) -> float:
    """Median over replays of a graph with one call per input."""
    graph = measure.capture(call, inputs)
    measure.warm_up(device)
    samples = [measure.seconds_per_call(lambda _: graph.replay(), [None], device) for _ in range(12)]
    return measure.summary(samples[2:])["median"] / len(inputs)


def print_rates(device: torch.device, say: Callable[[str], None], backend: str | None = None) -> None:
    """Time and bytes per second of each op, by one backend or by each, over the copy rate; time of methods' weights."""
    rates = measure.Rates(device)
    rates.copy()
    copy = measure.summary([rates.copy() for _ in range(20)])["median"]
    say(f"copy: {1e-12 / copy:.2f} TB/s, a copied byte read once and written once")
    names = ("cuda", "triton") if backend is None else (backend,)
    backends = [name for name in names if dispatch.unavailable(name, device.type) is None]
    for num_tasks, num_params, dtype in RATED:
        row = num_params * dtype.itemsize
        count = min(16, 4 * measure.cache_bytes(device) // (num_tasks * row) + 1)
        banks = [gradients.random_bank(num_tasks, num_params, dtype, device, seed) for seed in range(count)]
        out = torch.empty(num_params, dtype=dtype, device=device)
        weights = torch.ones(num_tasks, dtype=torch.float64, device=device)
        calls: dict[str, tuple[Callable[[Tensor], Any], int]] = {
            "gram": (ops.gram, num_tasks * row),
            "combine": (partial(ops.combine, weights, out=out), (num_tasks + 1) * row),
            "pcgrad": (partial(ops.pcgrad, out=out), (2 * num_tasks + 1) * row),
        }
        for op, (call, moved) in calls.items():
            for name in backends:
                with fastmtl.use_backend(name):
                    seconds = _seconds(call, banks, device)
                what = f"T={num_tasks:3} P={num_params / 1e6:g}M {str(dtype)[6:]:8} {op:8} {name:6}"
                rate = f"{moved / seconds / 1e12:5.2f} TB/s  {seconds / (moved * copy):.3f} x floor"
                say(f"{what} {seconds * 1e6:9.1f} us  {rate}")
        del banks
    for num_tasks in (8, 64, 128):
        gram = suite.conflicting_problem(num_tasks, device).gram
        for name in suite.OF_GRAM:
            seconds = _seconds(suite.weighing(suite.METHODS[name](), num_tasks), [gram] * 10, device)
            say(f"T={num_tasks:3} weights of {name:10} {seconds * 1e6:9.1f} us")


def run_for_a_profiler(device: torch.device) -> None:
    """Both main kernels of PCGrad, for few tasks and for many."""
    for num_tasks, dtype in ((8, torch.float32), (8, torch.bfloat16), (64, torch.float32), (64, torch.bfloat16)):
        grads = gradients.random_bank(num_tasks, 25_600_000, dtype, device, 0)
        out = torch.empty(25_600_000, dtype=dtype, device=device)
        ops.pcgrad(grads, out=out)
    torch.cuda.synchronize()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastmtl.benchmarks.gpu.surgery_check", description=__doc__)
    parser.add_argument("what", choices=("kernels", "solvers", "rates", "profile"))
    parser.add_argument(
        "--device", default="cuda", help="kernels, solvers: cpu checks the compiled CPU code in the same way"
    )
    parser.add_argument("--backend", choices=("cuda", "triton"), help="forces it")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    with fastmtl.use_backend(options.backend) if options.backend else nullcontext():
        if options.what == "kernels":
            return min(check_kernels(device, print), 1)
        if options.what == "solvers":
            return min(check_solvers(device, print), 1)
        if options.what == "rates":
            print_rates(device, lambda line: print(line, flush=True), options.backend)
        else:
            run_for_a_profiler(device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
