"""Runs a call again on other values of its arguments, without leaving a trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastmtl.task_gradients.one_pass.tensors import nested, replaced, version
from fastmtl.task_gradients.one_pass.torch_call import TorchCall
from fastmtl.task_gradients.one_pass.torch_names import writes

SEED = 77

# what a call may raise that does not take the values of a trial
FAILURES = (Exception, SystemExit)


class Unfit(Exception):
    """Why a call can't be tried."""


class Trials:
    """The runs of one call.

    Args:
        call: it, after it has run.
        unfollowed: a context in which calls inside are not followed.
        kept: tensors of the model, which no run may change.

    Attributes:
        runs: how many there were.
    """

    def __init__(self, call: TorchCall, unfollowed: Callable[[], object], kept: Sequence[Tensor]) -> None:
        self.call, self.unfollowed, self._kept = call, unfollowed, kept
        self.tensors = list({id(x): x for x in call.tensors()}.values())
        self.writes = writes(call.func)
        self.runs = 0
        self._devices = sorted({x.device.index for x in self.tensors if x.device.type == "cuda"})

    def run(self, change: Callable[[Tensor], Tensor], *, seed: int = SEED) -> list[Tensor]:
        """The results, with every tensor among the arguments replaced by `change(tensor)`, which must be a copy."""
        self.runs += 1
        copies: dict[int, Tensor] = {}

        def copy_of(x: Tensor) -> Tensor:
            if id(x) not in copies:
                copies[id(x)] = change(x)
            return copies[id(x)]

        args, kwargs = replaced(self.call.args, copy_of), replaced(self.call.kwargs, copy_of)
        before = {k: version(x) for k, x in copies.items()}
        with self.unfollowed(), torch.random.fork_rng(devices=self._devices):  # type: ignore[attr-defined]
            torch.default_generator.manual_seed(seed)
            for index in self._devices:
                torch.cuda.default_generators[index].manual_seed(seed)
            out = self.call.func(*args, **kwargs)
        first = id(self.call.args[0]) if self.writes else None
        if any(version(x) != before[k] for k, x in copies.items() if k != first):
            raise Unfit("it changes its arguments")
        return [args[0]] if self.call.name == "setitem" else nested(out)

    def first_run(self) -> list[Tensor]:
        """On the values as they are. The model's own tensors are put back, if the call changed one."""
        kept = [(x, version(x), x.detach().clone()) for x in self._kept]
        try:
            return self.run(same)
        finally:
            changed = [(x, copy) for x, before, copy in kept if version(x) != before]
            if changed:
                with torch.no_grad():
                    for x, copy in changed:
                        x.copy_(copy)
                raise Unfit("it changes a tensor of the model")


def same(x: Tensor) -> Tensor:
    """A copy of the same values in the same memory order."""
    return x.detach().clone()


def equal(a: Tensor, b: Tensor) -> Tensor:
    """Element by element; NaN is NaN."""
    found = a == b
    if a.is_floating_point() or a.is_complex():
        found = found | (a.isnan() & b.isnan())
    return found


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two results are the same but for rounding, which may differ where one was made with a graph."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point() and not a.is_complex():
        return bool((a == b).all())
    return torch.allclose(
        a, b, rtol=1e4 * torch.finfo(a.dtype).eps, atol=1e4 * torch.finfo(a.dtype).tiny, equal_nan=True
    )


def all_equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether two runs gave the same."""
    return len(a) == len(b) and all(
        x.shape == y.shape and x.dtype == y.dtype and bool(equal(x, y).all()) for x, y in zip(a, b, strict=True)
    )
