"""Who holds a gradient's memory, so that it may be kept or written over, and what becomes of it when it is freed."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

# Blocks of at least so many bytes glibc maps anew each time: the most that it gets to by itself, when it keeps twice as
# much of what is free, and what it is asked for, which older releases don't take (2.36 does).
_MAPPED_BY_ITSELF, _MAPPED = 32 << 20, 256 << 20
# what is kept of freed memory at most: mallopt takes no greater number
_MOST_KEPT = (1 << 31) - 1
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# set by whoever has made up his mind about the memory of the process
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
KEEP_MEMORY = "FASTMTL_KEEP_MEMORY"


def why_memory_is_not_kept() -> str | None:
    """What forbids `keep_freed_memory`; None: nothing does."""
    if os.environ.get(KEEP_MEMORY, "1").strip().lower() in ("0", "false", "no", "off"):
        return f"{KEEP_MEMORY}={os.environ[KEEP_MEMORY]}"
    if found := next((name for name in _SETTINGS if name in os.environ), None):
        return f"{found} is set"
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return "GLIBC_TUNABLES is set"
    if not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        return "the C library is not glibc"
    return None


@functools.cache
def keep_freed_memory() -> bool:
    """Has glibc keep freed memory (up to 2 GB, and to a quarter of what there is) instead of handing it back.

    Once in a process; whether it does. The gradients of a step are freed before the next one takes as much again, and
    by default glibc gives what is free above 64 MB back to the system, whose pages then come one fault at a time: a
    sixth of the step of a ResNet-18 with deltas of 8 tasks. Blocks of 256 MB and more (32 MB where an older glibc takes
    no more) it maps anew each time.
    `malloc_trim(0)` of the C library gives the main thread's memory back. Other threads gain nothing: glibc gives them
    arenas of 64 MB. A process that is forked, such as a worker of a DataLoader, keeps 64 MB as before until it calls
    this itself. Where the environment has a setting of glibc's memory, or `FASTMTL_KEEP_MEMORY=0`, nothing is changed,
    and other C libraries are left alone.
    """
    if why_memory_is_not_kept() is not None:
        return False
    _tell_children()
    most = min(_MOST_KEPT, _memory() // 4)
    return _keep(most, _MAPPED) or _keep(most, _MAPPED_BY_ITSELF)


def _keep(most: int, mapped: int) -> bool:
    mallopt = ctypes.CDLL(None).mallopt
    mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
    return bool(mallopt(_M_MMAP_THRESHOLD, mapped) and mallopt(_M_TRIM_THRESHOLD, most))


@functools.cache
def _tell_children() -> None:
    os.register_at_fork(after_in_child=_as_before)


def _as_before() -> None:
    _keep(2 * _MAPPED_BY_ITSELF, _MAPPED_BY_ITSELF)
    keep_freed_memory.cache_clear()


def _memory() -> int:
    """Bytes of the machine, or of the container where that has a limit."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _LIMITS:
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        found = min(found, int(text)) if text.isdecimal() else found
    return found


@functools.cache
def references_alone() -> int:
    """What getrefcount shows for an object that one local variable and one container hold."""
    g = object()
    return sys.getrefcount(g) + 1


def can_keep(param: Tensor, grad: Tensor, seen: set[int]) -> bool:
    """Whether `grad` may become `.grad` itself: right layout, and nobody else looks into its memory.

    The caller has counted the references to the object `grad`.
    """
    if id(grad) in seen or param._backward_hooks:  # a hook may have kept it
        return False
    seen.add(id(grad))
    if grad.layout is not torch.strided:
        return True
    storage = grad.untyped_storage()
    return (
        grad.stride() == param.stride()
        and storage.nbytes() == grad.numel() * grad.element_size()
        and storage.resizable()  # not somebody else's memory, as of a numpy array
        and sys.getrefcount(storage) <= _fresh_storage()
        and _unheld(grad, storage)
    )


@functools.cache
def _fresh_storage() -> int:
    """References to the storage object of a tensor whose storage nobody asked for."""
    fresh = torch.empty(1)
    storage = fresh.untyped_storage()
    return sys.getrefcount(storage)


def _unheld(grad: Tensor, storage: torch.UntypedStorage) -> bool:
    # a custom backward may return a tensor that it saved, which autograd would copy as well
    of_tensor, of_storage = getattr(grad, "_use_count", None), getattr(torch._C, "_storage_Use_Count", None)
    if of_tensor is None or of_storage is None:
        return False
    holders = 2  # `grad`, and the object `storage`
    base = grad._base
    if base is not None:
        # the weight gradient of a linear layer is a transposed view of a tensor that nobody else has
        fresh_uses, fresh_references = _fresh_base()
        if base._use_count() > fresh_uses or sys.getrefcount(base) > fresh_references:
            return False
        holders += 1
    return of_tensor() <= 1 and of_storage(storage._cdata) <= holders


@functools.cache
def _fresh_base() -> tuple[int, int]:
    """Uses and references of the base of a view, where the view alone holds it."""
    view = torch.empty(1, 2).t()
    base = view._base
    assert base is not None
    return base._use_count(), sys.getrefcount(base)


def has_other_holders(grad: Tensor) -> bool:
    """Whether somebody else can see this gradient's memory, or nobody can tell. The caller's own references to the
    object don't count."""
    if grad.layout is not torch.strided or type(grad) is not Tensor:
        return False
    storage = grad.untyped_storage()
    of_storage = getattr(torch._C, "_storage_Use_Count", None)
    return of_storage is None or of_storage(storage._cdata) > 2  # `grad`, and the object `storage`
