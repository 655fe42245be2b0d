"""Stop-watches: interleaved samples, copy and matrix rates, peak memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MIB = 1 << 20
WORTH_REPEATING_S = 4.0


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median and 20th and 80th percentile, in the unit of the samples, and their number."""
    x = torch.tensor(samples, dtype=torch.float64)
    p20, median, p80 = torch.quantile(x, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return {"median": median, "p20": p20, "p80": p80, "reps": len(samples)}


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """For a check of results: cuDNN and cuBLAS may otherwise round the operands of float32 products to tf32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def seconds_per_call(call: Callable[[Any], Any], arguments: Sequence[Any], device: torch.device) -> float:
    """Time of one call in seconds, over one call per argument; on a GPU between two events on its stream."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for argument in arguments:
            call(argument)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / len(arguments)
    begin = time.perf_counter()
    for argument in arguments:
        call(argument)
    return (time.perf_counter() - begin) / len(arguments)


def warm_up(device: torch.device, seconds: float = 0.03) -> None:
    """Keeps a GPU busy: its clock falls while the host makes inputs, checks and captures, and rises in milliseconds.

    An H100 that had been idle took 1.7 times as long for a convolution.
    """
    if device.type != "cuda":
        return
    a = torch.randn(2048, 2048, device=device, dtype=torch.bfloat16)
    torch.cuda.synchronize(device)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(20):
            a.matmul(a)
        torch.cuda.synchronize(device)


def capture(call: Callable[[Any], Any], arguments: Sequence[Any]) -> torch.cuda.CUDAGraph:
    """One CUDA graph of one call per argument."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for argument in arguments[:2]:
            call(argument)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for argument in arguments:
            call(argument)
    return graph


def _timed(sample: Callable[[], float]) -> tuple[float, float]:
    begin = time.perf_counter()
    first = sample()
    return time.perf_counter() - begin, first


def interleave(
    samplers: Mapping[str, Callable[[], float]],
    budget_s: float,
    *,
    fewest: int = 3,
    most: int = 60,
    at_least: Mapping[str, int] | None = None,
    reps: int | None = None,
    warm: bool = False,
    tick: Callable[[], None] = lambda: None,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Takes turns between candidates until the time is spent; what else the machine does then hits them alike.

    Each is sampled twice to warm up (the first may import, build or allocate). One whose single sample exceeds its
    share of the budget, and a second, keeps that as its only sample.

    Args:
        samplers: label -> a function that takes one sample, in seconds.
        budget_s: seconds for all of them together.
        fewest, most: bounds on the number of samples of each; `at_least` raises the lower one for some labels.
        reps: a fixed number of samples of each, instead of the budget.
        warm: each has run before: one sample more is enough.
        tick: called after every sample.

    Returns:
        label -> samples, and label -> error for those that raised.
    """
    samples: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    wanted: dict[str, int] = {}
    share = budget_s / max(len(samplers), 1)
    for label, sample in samplers.items():
        lower = max(fewest, (at_least or {}).get(label, 0))
        try:
            took, first = _timed(sample)
            tick()
            if reps is not None:
                wanted[label], samples[label] = reps, []
                continue
            if took < WORTH_REPEATING_S and not warm:
                took, first = _timed(sample)
                tick()
        except Exception as error:
            failed[label] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        if took > max(share, 1.0) and lower == fewest:
            wanted[label], samples[label] = 0, [first]
        else:
            wanted[label], samples[label] = min(most, max(lower, int(share / took))), []
    rounds = max(wanted.values(), default=0)
    order = list(samples)
    drawn = random.Random(0)
    for turn in range(rounds):
        # another predecessor each time: what one leaves in the caches, and to the allocator, is not always the same
        # one's luck
        drawn.shuffle(order)
        for label in order:
            if (turn + 1) * wanted[label] // rounds > turn * wanted[label] // rounds:
                samples[label].append(samplers[label]())
                tick()
    return samples, failed


def cache_bytes(device: torch.device) -> int:
    """Size of the largest cache of the device."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [32 * MIB]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        scale = {"K": 1 << 10, "M": MIB, "G": 1 << 30}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KMG")) * scale)
    return max(sizes)


class Rates:
    """Samplers of what the machine can do in this run: copying, and multiplying matrices."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size = max(128 * MIB, 4 * cache_bytes(device))
        self._source = torch.randn(size // 4, device=device)
        self._target = torch.empty_like(self._source).copy_(self._source)
        side = 4096 if device.type == "cuda" else 1024
        self._matrix = torch.randn(side, side, device=device)

    def copy(self) -> float:
        """Seconds to move one byte: a copied byte is read once and written once."""
        t = seconds_per_call(self._target.copy_, [self._source], self.device)
        return t / (2 * self._source.nbytes)

    def multiply(self, dtype: torch.dtype) -> Callable[[], float]:
        """Sampler of the seconds for one flop of a large matrix product in `dtype`."""
        a = self._matrix.to(dtype)
        return lambda: seconds_per_call(a.matmul, [a], self.device) / (2 * a.shape[0] ** 3)


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key} in /proc/self/status")


def tensor_bytes(result: Any) -> int:
    """Bytes of the tensors in a result, nested lists included."""
    if isinstance(result, Tensor):
        return result.nbytes
    if isinstance(result, (list, tuple)):
        return sum(tensor_bytes(x) for x in result)
    return 0


def peak_memory(call: Callable[[Any], Any], argument: Any, device: torch.device) -> dict[str, Any]:
    """Most memory that one call holds above what was held before it, its result included, in bytes.

    On a GPU from torch's allocator. On Linux the growth of the process's peak resident set, which the kernel keeps
    (so that scratch memory outside torch is seen too; exact to a few hundred KiB); elsewhere torch's own
    allocations, by its profiler.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call(argument)
        torch.cuda.synchronize(device)
        peak, how = torch.cuda.max_memory_allocated(device) - before, "torch.cuda allocator"
    else:
        try:
            # pages that malloc keeps for later would hide what the call takes
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            before = _status_bytes("VmRSS")
            result = call(argument)
            peak, how = _status_bytes("VmHWM") - before, "peak resident set"
        except (OSError, AttributeError):
            peak, result = allocated_by_torch(call, argument)
            how = "torch profiler"
    return {"peak_extra_bytes": max(peak, 0), "result_bytes": tensor_bytes(result), "how": how}


def allocated_by_torch(call: Callable[[Any], Any], argument: Any) -> tuple[int, Any]:
    """Peak of the bytes that torch's CPU allocator handed out during one call, and the result of the call."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = call(argument)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak, result
