"""Triton's kernels on CPU tensors by way of their PTX: what Triton compiles for sm_80, on the fibers of `tests/host`.

The launchers bind and specialise their arguments as before a GPU; what Triton would load on it is translated by
`tests/host/ptx/`, and what it would give to the driver is given to that.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import host_kernels as host
import triton.compiler
from host.ptx import module
from triton.backends.compiler import GPUTarget

from fastmtl.benchmarks.gpu import host_time
from fastmtl.kernels.task_weights import configs

ARCH = 80
# of an A100: tiles are chosen for it
LIMITS = configs.Limits(sms=108, shared=163 * 1024, hopper=False)
NUMBERS = {
    **{"i1": ctypes.c_uint8, "i8": ctypes.c_int8, "i16": ctypes.c_int16, "i32": ctypes.c_int32, "i64": ctypes.c_int64},
    **{"fp32": ctypes.c_float, "fp64": ctypes.c_double},
}


@dataclass
class Ran:
    """A launch of a build: Triton's, and its PTX as it is read and as a library."""

    built: Any
    kernel: module.Kernel
    library: ctypes.CDLL

    @property
    def name(self) -> str:
        return self.kernel.name


def _argument(kind: str, x: Any) -> Any:
    if kind.startswith("*"):
        return ctypes.c_void_p(x.data_ptr() if hasattr(x, "data_ptr") else x)
    return NUMBERS[kind](x)


class _Launcher:
    """In the place of the one that Triton makes for the driver."""

    def __init__(self, built: Any, launched: list[Ran], faulty: str | None, schedule: int) -> None:
        self.built, self.launched, self.faulty, self.schedule = built, launched, faulty, schedule

    @functools.cached_property
    def _run(self) -> Ran:
        text = self.built.asm["ptx"]
        (kernel,) = module.read(text)
        return Ran(self.built, kernel, host.ptx_library(text, faulty=self.faulty == kernel.name))

    def __call__(self, *given: Any) -> None:
        made = host_time.Launched.of(self.built, given)
        run = self._run
        self.launched.append(run)
        kinds = self.built.src.signature.values()
        pairs = [(kind, x) for kind, x in zip(kinds, made.arguments, strict=True) if kind != "constexpr"]
        arguments = [_argument(kind, x) for kind, x in pairs]
        # memory of Triton's own, for what the kernels don't do
        metadata = self.built.metadata
        assert metadata.global_scratch_size == metadata.profile_scratch_size == 0
        arguments += [ctypes.c_void_p()] * (len(run.kernel.parameters) - len(arguments))
        assert [p.size for p in run.kernel.parameters] == [ctypes.sizeof(x) for x in arguments]
        threads = 32 * metadata.num_warps
        host.launch_ptx(run.library, run.name, arguments, made.grid, threads, metadata.shared, self.schedule)


@contextlib.contextmanager
def running(schedule: int = host.FORWARD, faulty: str | None = None) -> Iterator[list[Ran]]:
    """Inside the block Triton's kernels run on tensors of the CPU, checked for races; the block gets their launches.

    Args:
        schedule: in which order blocks and threads take turns, see `tests/host/cuda_on_host.h`.
        faulty: the name of a kernel in which faults can be planted.
    """
    launched: list[Ran] = []
    compile_for_gpu = triton.compiler.compile

    def compiled(src: Any, target: GPUTarget | None = None, options: Any = None, **_: Any) -> Any:
        built = compile_for_gpu(src, target=target, options=options)
        built.module = built.function = 0  # nothing to load
        built._run = _Launcher(built, launched, faulty, schedule)
        return built

    with (
        host.using(host.PTX_RUNTIME),
        mock.patch.object(configs, "device_limits", lambda device: LIMITS),
        host_time.without_gpu(compiled, ARCH),
    ):
        yield launched
