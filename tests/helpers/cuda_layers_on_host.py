"""The `cuda` backend of the layers with per-task weights on CPU tensors: the extension's launcher as before a GPU, and
behind it the kernels on the host (`host_kernels`)."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import host_kernels as host

import fastmtl
from fastmtl.benchmarks.gpu import host_time


@contextlib.contextmanager
def running(build: host.Build = host.TASK, schedule: int = host.FORWARD) -> Iterator[ctypes.CDLL]:
    """Inside the block `task_conv2d` and `task_linear` take CPU tensors for the CUDA kernels, which are forced.

    schedule: in which order blocks and threads take turns, see `tests/host/cuda_on_host.h`.
    """
    with host.using(build):
        library = host.library()
        library.host_conv_functions.restype = ctypes.c_void_p
        library.host_conv_tables.restype = ctypes.c_int64
        library.host_conv_schedule(ctypes.c_uint64(schedule))
        with host_time.with_conv_functions(library.host_conv_functions()), fastmtl.use_backend("cuda"):
            yield library
