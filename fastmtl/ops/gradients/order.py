"""PCGrad's random visiting orders: a function of a key and a counter, the same bits on every backend.

The task that row i visits at step k is the one with the k-th smallest of T numbers, the SplitMix64 outputs (Steele,
Lea, Flood 2014, *Fast Splittable Pseudorandom Number Generators*) number `counter * 2**14 + i * T + j` of the stream
`key`. `csrc/common/solvers.h` and `kernels/` draw the same.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastmtl.core.gradient_rows import MAX_TASKS
from fastmtl.core.tensors import PLAIN
from fastmtl.ops.gradients.arguments import check_num_tasks

# one counter's numbers: more than any T * T
NUMBERS_PER_COUNT = MAX_TASKS * MAX_TASKS
# as signed 64-bit integers
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))

Randomness: TypeAlias = torch.Generator | Tensor


class Draw(NamedTuple):
    """Where an order comes from: the key is `key` xor `state[0]`, the counter `state[1]`; no state: 0 and 0."""

    key: int
    state: Tensor | None


def order_state(seed: int | None = None, *, device: torch.device | str | None = None) -> Tensor:
    """A state from which PCGrad draws its random orders on the device: `[2]` int64, a key and a counter.

    Pass it as `generator=`: every call reads it and adds one to the counter, on the device, so that each replay of a
    captured CUDA graph draws another order. Equal seeds give equal orders on every device and backend. It can be
    saved and copied back like any tensor. What comes next is `random_order(T, generator=state.clone())`.

    One state is for one thread. Under activation checkpointing draw the order outside: the recomputation would advance
    the state, and draw another.

    Args:
        seed: any 64-bit integer. None: drawn from torch's default CPU generator, which `torch.manual_seed` seeds.
        device: of the gradients. Default: the CPU.

    Raises:
        TypeError, ValueError: `seed` is not an integer, or has more than 64 bits.

    Example:
        >>> state = order_state(7)
        >>> random_order(3, generator=state).equal(random_order(3, generator=state))
        False
        >>> state[1]
        tensor(2)
    """
    if seed is None:
        seed = _host_key(None)
    seed = _integer(seed, "seed", "an integer or None")
    if not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"seed: expected 64 bits, got {seed}")
    state = torch.zeros(2, dtype=torch.int64, device="cpu" if device is None else device)
    state[0].fill_(seed - (1 << 64) if seed >= 1 << 63 else seed)
    return state


def random_order(
    num_tasks: int, *, generator: Randomness | None = None, device: torch.device | str | None = None
) -> Tensor:
    """A fresh uniformly random visiting order for every task, `[T, T]` int64: row i is a permutation of the tasks.

    Args:
        num_tasks: T, 1 to 128.
        generator: source of randomness. None or a CPU `torch.Generator` (None: torch's default one): a key drawn on
            the host, so that equal seeds give equal orders on every device; in a captured CUDA graph a counter on
            the device makes every replay another one, and in a graph of `torch.compile` the key of None comes from
            torch's generator of the device. A CUDA `torch.Generator`: a key drawn on the device. A state made by
            `order_state`: read and advanced on the device.
        device: where the order is drawn, without waiting for the host. Default: the state's, else the CPU.

    Raises:
        TypeError: `num_tasks` is no integer; `generator` is something else.
        ValueError: `num_tasks` outside 1 to 128; a generator or state of another device, a state of another shape.
        RuntimeError: a first random order on this device inside a CUDA graph capture, without a state.

    Example:
        >>> random_order(3).sort(dim=1).values
        tensor([[0, 1, 2],
                [0, 1, 2],
                [0, 1, 2]])
    """
    num_tasks = _integer(num_tasks, "num_tasks", "an integer")
    check_num_tasks(num_tasks, "num_tasks")
    check_generator(generator)
    if device is None:
        device = generator.device if isinstance(generator, Tensor) else "cpu"
    where = torch.empty(0, device=device).device  # "cuda" is the current one of them
    return drawn_order(traceable_source(generator, where), num_tasks, where)


def _integer(value: object, argument: str, expected: str) -> int:
    try:
        if not isinstance(value, bool):
            return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        pass
    raise TypeError(f"{argument}: expected {expected}, got {type(value).__name__}")


def _has_values() -> bool:
    """Whether tensors that are made here have values: not among fake tensors."""
    return type(torch.empty(0, device="cpu")) is Tensor


def is_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether these are tensors with memory of their own, and no subclass, mode or transform that must see the ops."""
    if torch._C._functorch.maybe_current_level() is not None or torch._C._len_torch_dispatch_stack() > 0:
        return False
    if torch.jit.is_tracing():
        return False
    return all(type(x) in PLAIN for x in tensors)


def check_generator(generator: object) -> None:
    """Raises TypeError unless it is a generator, a state or None."""
    # a tensor first and by itself: dynamo of torch 2.14 does not ask whether one is a generator
    if generator is not None and not isinstance(generator, Tensor) and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator or a state, got {type(generator).__name__}")


def check_no_generator(generator: Randomness | None) -> None:
    if generator is not None:
        raise ValueError("generator: expected None beside a given order, from which nothing is drawn")


def draw_source(generator: Randomness | None, device: torch.device) -> Draw:
    """Where the next order on `device` comes from, checked; nothing waits for the device."""
    check_generator(generator)
    if isinstance(generator, Tensor):
        if generator.dtype != torch.int64:
            raise TypeError(f"generator: expected an int64 state, got {generator.dtype}")
        if generator.shape != (2,) or not generator.is_contiguous():
            raise ValueError(
                f"generator: expected a contiguous state of shape [2], got shape {list(generator.shape)}, "
                f"strides {list(generator.stride())}"
            )
        if generator.device != device:
            raise ValueError(f"generator: expected a state on {device}, got one on {generator.device}")
        return Draw(0, generator)
    if generator is not None and generator.device.type != "cpu":
        if generator.device.type != device.type:
            raise ValueError(f"generator: expected one of {device} or of the CPU, got one of {generator.device}")
        return Draw(0, torch.randint(0, (1 << 63) - 1, (2,), generator=generator, device=device))
    return Draw(_host_key(generator), _replay_counter(device))


def traceable_source(generator: Randomness | None, device: torch.device) -> Draw:
    """`draw_source`; in a graph being compiled, or among fake tensors, with a key that is no number of the host's."""
    check_generator(generator)
    if not isinstance(generator, Tensor) and (torch.compiler.is_compiling() or not _has_values()):
        source = device if generator is None else generator.device
        key = torch.randint(0, (1 << 63) - 1, (1,), generator=generator, device=source).to(device)
        generator = torch.cat([key, torch.zeros_like(key)])
    return draw_source(generator, device)


_HALF = 1 << 32


def shared_source(source: Draw, device: torch.device, first: Callable[[Tensor], Tensor] | None) -> Draw:
    """The source of the first of several ranks on all of them; `first`: as `Seen.first`, None where there is one.

    Key and counter travel as halves of 32 bits, which float64 holds.
    """
    if first is None:
        return source
    if source.state is None:
        words = torch.zeros(2, dtype=torch.int64, device=device)
        words[0].fill_(source.key)
    else:
        words = torch.stack([source.state[0] ^ source.key, source.state[1]])
    halves = first(torch.cat([words >> 32, words & _HALF - 1]).to(torch.float64)).to(torch.int64)
    return Draw(0, (halves[:2] << 32) + halves[2:])


def split_mix(key: int | Tensor, numbers: Tensor) -> Tensor:
    """The outputs of these numbers of the SplitMix64 stream `key`, as signed 64-bit integers."""
    z = (numbers + 1) * _GOLDEN + key
    for shift, factor in zip((30, 27), _MIX, strict=True):
        z = (z ^ (z >> shift & (1 << 64 - shift) - 1)) * factor
    return z ^ (z >> 31 & (1 << 33) - 1)


def drawn_orders(source: Draw, count: int, num_tasks: int, device: torch.device) -> Tensor:
    """The orders of so many calls in a row, `[L, T, T]` int64; advances the state by as many. Without a state the
    counter begins at 0."""
    numbers = torch.arange(num_tasks * num_tasks, device=device)
    counters = torch.arange(count, device=device)[:, None]
    if source.state is None:
        z = split_mix(source.key, numbers + counters * NUMBERS_PER_COUNT)
    else:
        key, counter = source.state.unbind(0)
        z = split_mix(key ^ source.key, numbers + (counter + counters) * NUMBERS_PER_COUNT)
        counter.add_(count)
    return z.reshape(count, num_tasks, num_tasks).argsort(dim=2, stable=True)


def drawn_order(source: Draw, num_tasks: int, device: torch.device) -> Tensor:
    """The order in plain torch, `[T, T]` int64; advances the state."""
    numbers = torch.arange(num_tasks * num_tasks, device=device)
    if source.state is None:
        z = split_mix(source.key, numbers)
    else:
        key, counter = source.state.unbind(0)
        z = split_mix(key ^ source.key, numbers + counter * NUMBERS_PER_COUNT)
        counter.add_(1)
    return z.reshape(num_tasks, num_tasks).argsort(dim=1, stable=True)


def _host_key(generator: torch.Generator | None) -> int:
    # on the CPU, whatever torch's default device is
    return int(torch.randint(0, (1 << 63) - 1, (), generator=generator, device="cpu"))


class _ReplayCounters:
    """States of captured graphs: zeros made before any capture, each given to one captured call for good."""

    SIZE = 4096

    def __init__(self) -> None:
        self._free: dict[torch.device, list[Tensor]] = {}
        self._kept: list[Tensor] = []  # graphs hold addresses, which must stay theirs

    def prepare(self, device: torch.device) -> None:
        free = self._free.setdefault(device, [])
        if len(free) < self.SIZE // 2:
            self._kept.append(torch.zeros(self.SIZE, 2, dtype=torch.int64, device=device))
            free.extend(self._kept[-1].unbind(0))

    def take(self, device: torch.device) -> Tensor:
        free = self._free.get(device)
        if not free:
            raise RuntimeError(
                f"fastmtl: a CUDA graph capture needs a counter on {device} for its random orders: run the step once "
                "before the capture, as for all of torch, or pass generator=fastmtl.ops.order_state(device=...)"
            )
        return free.pop()


_replay_counters = _ReplayCounters()


def _replay_counter(device: torch.device) -> Tensor | None:
    """None outside of a CUDA graph capture."""
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):  # of whose stream the question is
        capturing = torch.cuda.is_current_stream_capturing()
    if capturing:
        return _replay_counters.take(device)
    _replay_counters.prepare(device)
    return None
